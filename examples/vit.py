"""A vision transformer: handwritten digits (scikit-learn's 1797 images of 8 x 8) in patches of 2 x 2.

    python -m examples.vit
"""

import torch
import torch.nn.functional as F
from torch import nn

from .common import Block, command, need, train, twins

DIM, HEADS, LAYERS, PATCH, BATCH = 64, 4, 3, 2, 64
N_PATCHES = (8 // PATCH) ** 2


class ViT(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.patches = nn.Conv2d(1, DIM, PATCH, stride=PATCH)  # a linear layer on every patch
        self.cls, self.places = (nn.Parameter(torch.randn(1, n, DIM) / 10) for n in (1, N_PATCHES + 1))
        self.blocks = nn.ModuleList(Block(DIM, HEADS, attend) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, images):  # (B, 8, 8)
        x = self.patches(images[:, None]).flatten(2).transpose(1, 2)  # (B, N_PATCHES, DIM)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)  # every patch sees every patch
        return self.head(self.norm(x[:, 0]))  # (B, 10)


def loss_of(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def digits(dtype):
    """Images (1797, 8, 8) around 0 and their labels, in random order."""
    data = need("sklearn.datasets", "scikit-learn").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=dtype)[order] / 8 - 1, torch.tensor(data.target)[order]


def main(steps=200, dtype=torch.float32):
    images, labels = digits(dtype)
    n_train, g = 1400, torch.Generator().manual_seed(0)
    picks = (torch.randint(n_train, (BATCH,), generator=g) for _ in range(steps))
    models = twins(ViT, dtype)
    curves = train(models, loss_of, ((images[i], labels[i]) for i in picks))
    curves.show(f"ViT: {LAYERS} layers, {N_PATCHES} patches and a class token")
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            found[name] = (model(images[n_train:]).argmax(-1) == labels[n_train:]).float().mean().item()
        print(f"{name:9s}{found[name]:.3f} of {len(images) - n_train} new images right")
    return curves, found


if __name__ == "__main__":
    command(main)

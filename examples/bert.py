"""BERT from its parts, pretrained on the manual that Python carries with it: masked words, and does this sentence follow?

    python -m examples.bert

Embeddings of tokens, positions and segments; an encoder that sees every real word; a pooler on the first token. 15 % of
the words are to be guessed: of these 80 % are hidden, 10 % replaced and 10 % left as they are.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from .common import MultiHead, command, train, twins
from .words import LENGTH, MASK, PAD, documents, encode, vocabulary

DIM, HEADS, LAYERS, BATCH = 64, 4, 2, 16
IGNORE = -100  # a target that cross-entropy leaves out


class Bert(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.tokens, self.places, self.segments = (
            nn.Embedding(n, DIM, _weight=torch.randn(n, DIM) / 10) for n in (vocabulary(), LENGTH, 2)
        )
        self.norm = nn.LayerNorm(DIM)
        self.layers = nn.ModuleList(Layer(attend) for _ in range(LAYERS))
        self.pooler = nn.Linear(DIM, DIM)

    def forward(self, ids, segments):  # (B, L) twice -> (B, L, DIM) and (B, DIM)
        keep = (ids != PAD)[:, None, None]  # (B, 1, 1, n_k)
        x = self.norm(self.tokens(ids) + self.places.weight[: ids.shape[1]] + self.segments(segments))
        for layer in self.layers:
            x = layer(x, keep)
        return x, torch.tanh(self.pooler(x[:, 0]))


class Layer(nn.Module):
    """Attention and two layers on each position, each with a norm behind it."""

    def __init__(self, attend):
        super().__init__()
        self.attention, self.norm1 = MultiHead(DIM, HEADS, attend), nn.LayerNorm(DIM)
        self.mlp, self.norm2 = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)), nn.LayerNorm(DIM)

    def forward(self, x, keep):
        x = self.norm1(x + self.attention(x, mask=keep))
        return self.norm2(x + self.mlp(x))


class Pretraining(nn.Module):
    """The two heads; words are scored against the token embeddings themselves."""

    def __init__(self, attend):
        super().__init__()
        self.bert = Bert(attend)
        self.transform = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.LayerNorm(DIM))
        self.bias, self.follows = nn.Parameter(torch.zeros(vocabulary())), nn.Linear(DIM, 2)

    def forward(self, ids, segments, hidden):  # hidden (B, L): where words are to be guessed
        x, pooled = self.bert(ids, segments)
        return self.transform(x[hidden]) @ self.bert.tokens.weight.T + self.bias, self.follows(pooled)


def loss_of(model, batch):
    ids, segments, targets, follows = batch
    hidden = targets != IGNORE
    words, nexts = model(ids, segments, hidden)
    return F.cross_entropy(words, targets[hidden]) + F.cross_entropy(nexts, follows)


def batches(steps):
    rng, g = random.Random(0), torch.Generator().manual_seed(0)
    topics = [document for document in documents().values() if len(document) > 1]
    for _ in range(steps):
        places = [(document, rng.randrange(len(document) - 1)) for document in rng.choices(topics, k=BATCH)]
        follows = torch.randint(2, (BATCH,), generator=g)
        pairs = [(d[i], d[i + 1] if real else rng.choice(rng.choice(topics))) for (d, i), real in zip(places, follows)]
        ids, segments = encode(pairs)
        dice = torch.rand(ids.shape, generator=g) / (ids > MASK)  # infinite where there is no word
        noise = torch.randint(MASK + 1, vocabulary(), ids.shape, generator=g)
        shown = torch.where(dice < 0.12, MASK, torch.where(dice < 0.135, noise, ids))
        yield shown, segments, torch.where(dice < 0.15, ids, IGNORE), follows


def main(steps=300, dtype=torch.float32):
    models = twins(Pretraining, dtype)
    curves = train(models, loss_of, batches(steps), lr=2e-3)
    curves.show(f"BERT: {LAYERS} layers, {LENGTH} tokens, loss of the masked words and of the next sentence")
    return curves, models


if __name__ == "__main__":
    command(main)

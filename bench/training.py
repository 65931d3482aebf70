"""A small character-level GPT, trained twice from the same weights on the same batches: on torch's attention and on ours.

The text is the reference manual that the standard library carries (`pydoc_data.topics`), so nothing is downloaded.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import scaled_dot_product_attention

DIM, HEADS, LAYERS, LENGTH, BATCH, STEPS = 128, 4, 4, 256, 4, 60
Attend = Callable[..., Tensor]
WHO: dict[str, Attend] = {"torch": F.scaled_dot_product_attention, "fastattn": scaled_dot_product_attention}


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:  # (B, L, DIM)
        n_b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n_b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        o = self.attend(q, k, v, is_causal=True).transpose(1, 2).reshape(n_b, n, DIM)
        x = x + self.proj(o)
        return x + self.mlp(self.norm2(x))


class CharGPT(nn.Module):
    """(B, L) characters in, (B, L, vocabulary) logits out."""

    def __init__(self, vocabulary: int, attend: Attend):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.Sequential(*(Block(attend) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


@dataclass
class Training:
    """Losses per step, and seconds of each step, by whose attention it was."""

    losses: dict[str, list[float]] = field(default_factory=lambda: {who: [] for who in WHO})
    seconds: dict[str, list[float]] = field(default_factory=lambda: {who: [] for who in WHO})

    @property
    def drift(self) -> float:
        """The largest difference between the two loss curves."""
        return max((abs(a - b) for a, b in zip(*self.losses.values())), default=0.0)

    def json(self) -> dict[str, Any]:
        return {"losses": self.losses, "seconds": self.seconds, "drift": self.drift}


def text() -> str:
    """English prose of the standard library.

    Raises:
        RuntimeError: this Python was installed without it.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as missing:
        raise RuntimeError("this Python has no pydoc_data.topics to train on") from missing
    return "\n".join(topics[name] for name in sorted(topics))


def run(device: str, steps: int = STEPS, result: Training | None = None) -> Iterator[Training]:
    """Train both side by side, one step each in turn; yields the growing result after every step."""
    corpus = text()
    characters = sorted(set(corpus))
    index = {c: i for i, c in enumerate(characters)}
    data = torch.tensor([index[c] for c in corpus], device=device)
    models = {}
    for who, attend in WHO.items():
        torch.manual_seed(0)
        models[who] = CharGPT(len(characters), attend).to(device)
    optimizers = {who: torch.optim.AdamW(model.parameters(), lr=1e-3) for who, model in models.items()}
    g = torch.Generator().manual_seed(0)
    result = Training() if result is None else result
    for step in range(steps):
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=g)
        batch = torch.stack([data[s : s + LENGTH + 1] for s in starts.tolist()])
        for who in WHO if step % 2 else reversed(WHO):
            began = _now(device)
            logits = models[who](batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizers[who].zero_grad()
            loss.backward()
            optimizers[who].step()
            result.losses[who].append(loss.item())
            result.seconds[who].append(_now(device) - began)
        yield result


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()

"""What the examples share: two functions that compute the same attention, a transformer block that takes either of them,
and a loop that trains a model on each, from the same weights on the same batches."""

import argparse
import importlib.util
import math
import sys
import time

import torch
from torch import nn

import fastattn


def eager(q, k, v, mask=None):  # (B, H, Lq, D), (B, H, Lk, D) twice; a bool tensor or one of fastattn's masks
    """Plain PyTorch: every score of every row is in memory at once."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, Lq, Lk)
    if isinstance(mask, fastattn.Mask):
        mask = mask.to_dense(q.shape[2], k.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    return scores.softmax(-1) @ v  # (B, H, Lq, D)


def fast(q, k, v, mask=None):
    """The same in one call, without the matrix of scores."""
    return fastattn.attention(q, k, v, mask=mask)


ATTENTIONS = {"eager": eager, "fastattn": fast}


class MultiHead(nn.Module):
    """Attention of x's positions to themselves, or to the positions of a memory."""

    def __init__(self, dim, heads, attend):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, memory=None, mask=None):  # (B, Lq, dim), (B, Lk, dim)
        memory = x if memory is None else memory
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(memory), self.v(memory)))
        return self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))  # (B, Lq, dim)


class Block(nn.Module):
    """Self-attention, attention to a memory in decoders, and two layers on each position, all behind a norm."""

    def __init__(self, dim, heads, attend, decoder=False):
        super().__init__()
        self.attention, self.norm1 = MultiHead(dim, heads, attend), nn.LayerNorm(dim)
        self.cross, self.norm2 = (MultiHead(dim, heads, attend), nn.LayerNorm(dim)) if decoder else (None, None)
        self.mlp, self.norm3 = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)), nn.LayerNorm(dim)

    def forward(self, x, mask=None, memory=None, memory_mask=None):
        x = x + self.attention(self.norm1(x), mask=mask)
        if self.cross is not None:
            x = x + self.cross(self.norm2(x), memory, memory_mask)
        return x + self.mlp(self.norm3(x))


def twins(make, dtype=torch.float32):
    """{name: make(attend)} with eager and with fastattn's attention, and the same weights."""
    torch.manual_seed(0)
    models = {name: make(attend).to(dtype) for name, attend in ATTENTIONS.items()}
    models["fastattn"].load_state_dict(models["eager"].state_dict())
    return models


class Curves:
    """The loss of every step and the seconds of process time of all of them, by attention."""

    def __init__(self, names):
        self.losses, self.seconds = {name: [] for name in names}, dict.fromkeys(names, 0.0)

    def show(self, title, rows=6):
        pairs = list(zip(*self.losses.values()))
        print(f"\n{title}\n  step     eager  fastattn  difference")
        for i in sorted({round(j * (len(pairs) - 1) / (rows - 1)) for j in range(rows)}):
            a, b = pairs[i]
            print(f"{i + 1:6d}{a:10.4f}{b:10.4f}{abs(a - b):12.1e}")
        print("   sec{:10.2f}{:10.2f}  of process time".format(*self.seconds.values()))


def train(models, loss_of, batches, lr=1e-3):
    """Train the models, in turn on each batch, with AdamW; loss_of(model, batch) is a scalar."""
    curves = Curves(models)
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=lr) for name, model in models.items()}
    for batch in batches:
        for name, model in models.items():
            began, loss = time.process_time(), loss_of(model, batch)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            curves.seconds[name] += time.process_time() - began
            curves.losses[name].append(loss.item())
    return curves


class Missing(ImportError):
    """A package that an example needs is not installed."""


def need(module, package):  # import a module that fastattn itself does without
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise Missing(f"this example needs {package}, which is not installed")
    return importlib.import_module(module)


def _count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def command(main, steps="training steps"):
    """Run main(steps=...) from the command line. steps: what they are."""
    parser = argparse.ArgumentParser(description=sys.modules[main.__module__].__doc__.splitlines()[0])
    parser.add_argument("--steps", type=_count, default=main.__defaults__[0], help=f"{steps} (%(default)s)")
    try:
        main(parser.parse_args().steps)
    except Missing as missing:
        sys.exit(str(missing))

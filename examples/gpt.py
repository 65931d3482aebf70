"""GPT: a small autoregressive language model of characters, trained on the manual that Python carries with it.

    python -m examples.gpt

Its perplexity comes from the chain rule, p(text) = p(x1) p(x2 | x1) p(x3 | x1 x2) ..., in one pass over the whole and
letter by letter with a cache of keys and values; then it writes, with the cache and without.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastattn import Causal

from .common import command, need, train, twins

DIM, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 64, 32
CAUSAL = Causal("bottom_right")  # the last row stands at the last key: right for a whole text and for a step on a cache


class Block(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x, past=None):  # (B, L, DIM), and the keys and values of earlier positions
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # (B, H, past + L, D)
        x = x + self.proj(self.attend(q, k, v, CAUSAL).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), (k, v)


class GPT(nn.Module):
    def __init__(self, vocabulary, attend):
        super().__init__()
        self.tokens, self.places = (nn.Embedding(n, DIM, _weight=torch.randn(n, DIM) / 10) for n in (vocabulary, LENGTH))
        self.blocks = nn.ModuleList(Block(attend) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, vocabulary)

    def forward(self, ids, cache=None):
        """Logits (B, L, vocabulary) for ids (B, L) that continue the cache, and the cache with them in it."""
        start = 0 if cache is None else cache[0][0].shape[2]
        x = self.tokens(ids) + self.places.weight[start : start + ids.shape[1]]  # (B, L, DIM)
        grown = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, None if cache is None else cache[i])
            grown.append(kv)
        return self.head(self.norm(x)), grown


def loss_of(model, ids):  # (B, L + 1): every character is predicted from those before it
    return F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model, ids, cached):
    """exp of the mean surprise -log p(x_t | x_1 .. x_t-1) over ids (L + 1,)."""
    if cached:
        steps, cache = [], None
        for x in ids[:-1]:
            logits, cache = model(x.view(1, 1), cache)
            steps.append(logits[0])
        logits = torch.cat(steps)  # (L, vocabulary)
    else:
        logits = model(ids[None, :-1])[0][0]
    log_p = logits.log_softmax(-1).gather(1, ids[1:, None])  # (L, 1)
    return math.exp(-log_p.mean())


@torch.no_grad()
def write(model, ids, n, cached):
    """The n characters that the model finds likeliest, each after those before it."""
    logits, cache = model(ids[None])
    for i in range(n):
        ids = torch.cat([ids, logits[0, -1:].argmax(-1)])
        if i < n - 1:
            logits, cache = model(ids[None, -1:], cache) if cached else model(ids[None])
    return ids[-n:]


def corpus():
    """Numbers of the text's characters, 90 % to learn from and the rest; the characters."""
    topics = need("pydoc_data.topics", "pydoc_data of the standard library").topics
    text = "\n".join(topics[name] for name in sorted(topics))
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    data, cut = torch.tensor([index[c] for c in text]), len(text) * 9 // 10
    return data[:cut], data[cut:], list(index)


def batches(data, steps):
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=g)
        yield data[starts + torch.arange(LENGTH + 1)]  # (B, L + 1)


def main(steps=300, dtype=torch.float32):
    data, held_out, characters = corpus()
    prompt = torch.tensor([characters.index(c) for c in "The function "])
    models = twins(lambda attend: GPT(len(characters), attend), dtype)
    curves = train(models, loss_of, batches(data, steps), lr=3e-3)
    curves.show(f"GPT: {LAYERS} layers, {LENGTH} characters, loss per character")
    found = {}
    for name, model in models.items():
        whole, chained = (perplexity(model, held_out[: LENGTH + 1], cached) for cached in (False, True))
        text, again = ("".join(characters[i] for i in write(model, prompt, 48, cached)) for cached in (False, True))
        found[name] = (whole, chained, text == again)
        print(f"{name:9s}perplexity {whole:.5f}, with a cache {chained:.5f}; same text with a cache: {text == again}, {text!r}")
    return curves, found


if __name__ == "__main__":
    command(main)

"""A transformer on a table, one token per column: what kind of character is this row of Python's Unicode database?

    python -m examples.tabular

Five columns are numbers (a number scales its column's vector), five are categories (each value has a vector). The answer
is the first letter of the character's general category: letter, mark, number, punctuation, symbol, separator or other.
"""

import random
import unicodedata
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from .common import Block, command, train, twins

DIM, HEADS, LAYERS, BATCH = 64, 4, 2, 64
KINDS = "LMNPSZC"


def row(c):
    """(numbers, categories, kind) of a character; nothing in it gives the kind away by itself."""
    words = unicodedata.name(c).split()
    parts = unicodedata.decomposition(c).split()
    numbers = [ord(c) / 2**16, len(words) / 4, len(words[-1]) / 8, unicodedata.combining(c) / 128, len(parts) / 2]
    tag = parts[0] if parts and parts[0].startswith("<") else ""
    width, direction = unicodedata.east_asian_width(c), unicodedata.bidirectional(c)
    return numbers, [words[0], words[-1], tag, width, direction], KINDS.index(unicodedata.category(c)[0])


def table(dtype):
    """Numbers (N, 5), categories (N, 5) and kinds (N,), in random order, and how many values each category has."""
    named = [c for c in map(chr, range(2**16)) if unicodedata.name(c, "") and not "\u3400" <= c <= "\ud7a3"]
    rows = [row(c) for c in random.Random(0).sample(named, 6000)]
    numbers, columns, kinds = zip(*rows)
    known = [[value for value, _ in Counter(column).most_common(100)] for column in zip(*columns)]
    indices = [{value: i + 1 for i, value in enumerate(values)} for values in known]  # 0: a rare value
    categories = [[index.get(value, 0) for index, value in zip(indices, values)] for values in columns]
    return torch.tensor(numbers, dtype=dtype), torch.tensor(categories), torch.tensor(kinds), [len(x) + 1 for x in known]


class TableTransformer(nn.Module):
    def __init__(self, attend, n_numbers, n_values):
        super().__init__()
        self.cls, self.scale, self.shift = (nn.Parameter(torch.randn(n, DIM) / 10) for n in (1, n_numbers, n_numbers))
        self.values = nn.ModuleList(nn.Embedding(n, DIM) for n in n_values)
        self.blocks = nn.ModuleList(Block(DIM, HEADS, attend) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, len(KINDS))

    def forward(self, numbers, categories):  # (B, n_numbers), (B, n_categories)
        measured = numbers[:, :, None] * self.scale + self.shift  # (B, n_numbers, DIM)
        named = torch.stack([embed(x) for embed, x in zip(self.values, categories.T)], 1)  # (B, n_categories, DIM)
        x = torch.cat([self.cls.expand(len(numbers), 1, -1), measured, named], 1)
        for block in self.blocks:
            x = block(x)  # every column sees every column
        return self.head(self.norm(x[:, 0]))  # (B, 7)


def loss_of(model, batch):
    numbers, categories, kinds = batch
    return F.cross_entropy(model(numbers, categories), kinds)


def main(steps=200, dtype=torch.float32):
    numbers, categories, kinds, n_values = table(dtype)
    n_train, g = 5000, torch.Generator().manual_seed(0)
    picks = (torch.randint(n_train, (BATCH,), generator=g) for _ in range(steps))
    models = twins(lambda attend: TableTransformer(attend, numbers.shape[1], n_values), dtype)
    curves = train(models, loss_of, ((numbers[i], categories[i], kinds[i]) for i in picks))
    curves.show(f"table: {LAYERS} layers, {numbers.shape[1] + len(n_values)} columns")
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            said = model(numbers[n_train:], categories[n_train:]).argmax(-1)
        found[name] = (said == kinds[n_train:]).float().mean().item()
    guess = kinds[n_train:].bincount().max().item() / (len(kinds) - n_train)
    print(f"right on new rows: {found['eager']:.3f} eager, {found['fastattn']:.3f} fastattn, {guess:.3f} by guessing")
    return curves, found


if __name__ == "__main__":
    command(main)

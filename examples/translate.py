"""An encoder-decoder translator: English number words into digits, "four thousand ninety-one" into 4 0 9 1.

    python -m examples.translate

The encoder sees the real words of its padded sentence, by a bool tensor: of many sentences this short `Padding` would do one
after the other. The decoder sees what it has written so far, and those words. It is trained on random numbers below a
million and asked for others.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from fastattn import Causal

from .common import Block, command, train, twins

DIM, HEADS, LAYERS, BATCH = 64, 4, 2, 64
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {word: i for i, word in enumerate(["[PAD]", *ONES, *TENS, "hundred", "thousand"])}
LONGEST = 9  # words of 777777: three, a hundred, two, thousand, and again; digits with a start and an end are fewer
PAD, START, END = 10, 11, 12  # after the digits


def spell(n):
    """The words of a number below a million."""
    if n >= 1000:
        return [*spell(n // 1000), "thousand", *(spell(n % 1000) if n % 1000 else [])]
    if n >= 100:
        return [ONES[n // 100], "hundred", *(spell(n % 100) if n % 100 else [])]
    if n >= 20:
        return [TENS[n // 10 - 2], *(spell(n % 10) if n % 10 else [])]
    return [ONES[n]]


def batch_of(numbers):
    """Sentences (B, LONGEST) and digits (B, 8) with START in front and END behind, padded on the right."""
    source = torch.zeros(len(numbers), LONGEST, dtype=torch.long)
    target = torch.full((len(numbers), 8), PAD)
    for i, n in enumerate(numbers):
        words, digits = spell(n), [START, *map(int, str(n)), END]
        source[i, : len(words)] = torch.tensor([WORDS[w] for w in words])
        target[i, : len(digits)] = torch.tensor(digits)
    return source, target


class Translator(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.words, self.digits = nn.Embedding(len(WORDS), DIM), nn.Embedding(13, DIM)
        self.word_places, self.digit_places = nn.Embedding(LONGEST, DIM), nn.Embedding(8, DIM)
        self.encoder = nn.ModuleList(Block(DIM, HEADS, attend) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(Block(DIM, HEADS, attend, decoder=True) for _ in range(LAYERS))
        self.norm1, self.norm2, self.head = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.Linear(DIM, 13)

    def encode(self, source):  # (B, n_k) -> (B, n_k, DIM), and which keys are real
        keep = (source != WORDS["[PAD]"])[:, None, None]  # (B, 1, 1, n_k)
        x = self.words(source) + self.word_places.weight[: source.shape[1]]
        for block in self.encoder:
            x = block(x, keep)
        return self.norm1(x), keep

    def decode(self, target, memory, keep):  # (B, n_q) -> logits (B, n_q, 13)
        x = self.digits(target) + self.digit_places.weight[: target.shape[1]]
        for block in self.decoder:
            x = block(x, Causal(), memory, keep)
        return self.head(self.norm2(x))

    @torch.no_grad()
    def translate(self, source):
        """Digit by digit, always the likeliest: (B, 8) with START in front."""
        memory, keep = self.encode(source)
        out = torch.full((len(source), 1), START)
        for _ in range(7):
            out = torch.cat([out, self.decode(out, memory, keep)[:, -1:].argmax(-1)], 1)
        return out


def loss_of(model, batch):
    source, target = batch
    logits = model.decode(target[:, :-1], *model.encode(source))
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)


def readable(digits):
    """What stands between START and END."""
    digits = digits.tolist()[1:]
    return "".join(str(d) if d < PAD else "?" for d in digits[: digits.index(END) if END in digits else None])


def main(steps=400, dtype=torch.float32):
    rng = random.Random(0)
    held_out = rng.sample(range(10**6), 256)
    known = set(held_out)
    draw = lambda: [n for n in (rng.randrange(10 ** rng.randint(1, 6)) for _ in range(BATCH)) if n not in known]
    models = twins(Translator, dtype)
    curves = train(models, loss_of, (batch_of(draw()) for _ in range(steps)), lr=2e-3)
    curves.show(f"translation: {LAYERS} + {LAYERS} layers, loss per digit")
    source, _ = batch_of(held_out)
    found = {name: [readable(x) for x in model.translate(source)] for name, model in models.items()}
    for name, answers in found.items():
        right = sum(a == str(n) for a, n in zip(answers, held_out))
        print(f"{name:9s}{right} of {len(held_out)} new numbers right; {' '.join(spell(held_out[0]))}: {answers[0]}")
    return curves, found


if __name__ == "__main__":
    command(main)

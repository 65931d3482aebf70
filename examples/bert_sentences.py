"""Pretrained BERT, fine-tuned on what its pooler says of a whole input: a class, and a number.

    python -m examples.bert_sentences

Classification: from which of four topics of Python's manual is this sentence? Cross-entropy.
Regression: how much of the first sentence is in the second, from 0 to 1? Mean squared error.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from . import bert
from .common import command, train, twins
from .words import documents, encode

TOPICS = ("compound", "debugger", "specialnames", "string-methods")
BATCH = 16


class FineTuned(nn.Module):
    def __init__(self, attend, n_out):
        super().__init__()
        self.bert, self.head = bert.Bert(attend), nn.Linear(bert.DIM, n_out)

    def forward(self, ids, segments):  # (B, L) twice -> (B, n_out)
        return self.head(self.bert(ids, segments)[1])


def pretrained(steps):
    """The weights of a BERT that has been pretrained for a while."""
    _, models = bert.main(steps)
    return models["fastattn"].bert.state_dict()


def fine_tune(weights, make, loss_of, batches, title):
    """Train make(attend), with the pretrained weights as its `bert`, on both attentions."""
    models = twins(make)
    for model in models.values():
        model.bert.load_state_dict(weights)
    train(models, loss_of, batches).show(title)
    return models


def topics():
    """(sentence, number of its topic) pairs in random order."""
    pairs = [(words, i) for i, name in enumerate(TOPICS) for words in documents()[name]]
    random.Random(0).shuffle(pairs)
    return pairs


def overlaps(n):
    """(sentence, the same with some of its words replaced, the share that is left) n times."""
    rng = random.Random(0)
    sentences = [words for document in documents().values() for words in document]
    made = []
    for first in rng.choices(sentences, k=n):
        kept = rng.random()
        second = [word if rng.random() < kept else rng.choice(rng.choice(sentences)) for word in first]
        made.append((first, second, sum(a == b for a, b in zip(first, second)) / len(first)))
    return made


def cut(data, steps):
    """Batches of random examples."""
    rng = random.Random(1)
    return [rng.choices(data, k=BATCH) for _ in range(steps)]


def classify(weights, steps):
    data = topics()
    held_out, data = data[:200], data[200:]
    together = lambda rows: (*encode([(words, []) for words, _ in rows]), torch.tensor([topic for _, topic in rows]))
    loss_of = lambda model, batch: F.cross_entropy(model(*batch[:2]), batch[2])
    make = lambda attend: FineTuned(attend, len(TOPICS))
    models = fine_tune(weights, make, loss_of, map(together, cut(data, steps)), "classification: topic of a sentence")
    ids, segments, labels = together(held_out)
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            found[name] = (model(ids, segments).argmax(-1) == labels).float().mean().item()
    guess = labels.bincount().max().item() / len(labels)
    print(f"right on new sentences: {found['eager']:.3f} eager, {found['fastattn']:.3f} fastattn, {guess:.3f} by guessing")
    return found


def regress(weights, steps):
    data = overlaps(2200)
    held_out, data = data[:200], data[200:]
    together = lambda rows: (*encode([row[:2] for row in rows]), torch.tensor([row[2] for row in rows]))
    loss_of = lambda model, batch: F.mse_loss(model(*batch[:2])[:, 0], batch[2])
    make = lambda attend: FineTuned(attend, 1)
    models = fine_tune(weights, make, loss_of, map(together, cut(data, steps)), "regression: overlap of two sentences")
    ids, segments, shares = together(held_out)
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            found[name] = F.mse_loss(model(ids, segments)[:, 0], shares).item()
    guess = shares.var().item()
    print(f"squared error on new pairs: {found['eager']:.4f} eager, {found['fastattn']:.4f} fastattn, {guess:.4f} by the mean")
    return found


def main(steps=150):
    weights = pretrained(2 * steps)
    return classify(weights, steps), regress(weights, steps)


if __name__ == "__main__":
    command(main)

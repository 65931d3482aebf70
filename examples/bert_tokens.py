"""Pretrained BERT, fine-tuned on what it says of every word: a tag, and whether an answer starts or ends here.

    python -m examples.bert_tokens

Named entities: the manual puts the names of code in quotes; without the quotes, which words are the beginning (B) or the
inside (I) of such a name, and which are outside (O)? Question answering: a sentence with one of its names taken out asks
for it; the answer is a span of the sentence itself, from its start to its end.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from . import bert
from .bert import IGNORE
from .bert_sentences import cut, fine_tune, pretrained
from .common import command
from .words import LENGTH, MASK, documents, encode

O, B, I = range(3)


class FineTuned(nn.Module):
    def __init__(self, attend, n_out):
        super().__init__()
        self.bert, self.head = bert.Bert(attend), nn.Linear(bert.DIM, n_out)

    def forward(self, ids, segments):  # (B, L) twice -> (B, L, n_out)
        return self.head(self.bert(ids, segments)[0])


def named():
    """(words without quotes, spans (start, stop) of the names that stood in quotes) in random order."""
    found = []
    for sentence in (words for document in documents().values() for words in document):
        words, spans, opened = [], [], None
        for word in sentence:
            if word != '"':
                words.append(word)
            elif opened is None:
                opened = len(words)
            else:
                spans.append((opened, len(words)))
                opened = None
        if spans and opened is None and all(stop > start for start, stop in spans):
            found.append((words, spans))
    random.Random(0).shuffle(found)
    return found


def tagged(rows):
    """ids, segments and tags (B, L), IGNORE where there is no word."""
    tags = torch.full((len(rows), LENGTH), IGNORE)
    for i, (words, spans) in enumerate(rows):
        tags[i, 1 : len(words) + 1] = O  # behind [CLS]
        for start, stop in spans:
            tags[i, start + 1], tags[i, start + 2 : stop + 1] = B, I
    return *encode([(words, []) for words, _ in rows]), tags


def asked(rows):
    """ids, segments and (start, last) of the answer (B, 2): [CLS] question [SEP] sentence [SEP]."""
    pairs, answers = [], []
    for words, spans in rows:
        start, stop = spans[len(words) % len(spans)]
        question = [*words[:start], MASK, *words[stop:]]
        pairs.append((question, words))
        answers.append((len(question) + 2 + start, len(question) + 1 + stop))
    return *encode(pairs), torch.tensor(answers)


def recognise(weights, data, held_out, steps):
    loss_of = lambda model, batch: F.cross_entropy(model(*batch[:2]).flatten(0, 1), batch[2].flatten(), ignore_index=IGNORE)
    make = lambda attend: FineTuned(attend, 3)
    models = fine_tune(weights, make, loss_of, map(tagged, cut(data, steps)), "named entities: loss per word")
    ids, segments, tags = tagged(held_out)
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            said = model(ids, segments).argmax(-1)[tags != IGNORE]
        true = tags[tags != IGNORE]
        right = ((said == true) & (true != O)).sum()
        found[name] = (2 * right / ((said != O).sum() + (true != O).sum())).item()
    print(f"F1 of the tags of names in new sentences: {found['eager']:.3f} eager, {found['fastattn']:.3f} fastattn")
    return found


def answer(weights, data, held_out, steps):
    loss_of = lambda model, batch: F.cross_entropy(model(*batch[:2]), batch[2])  # (B, L, 2): over L, for start and for last
    make = lambda attend: FineTuned(attend, 2)
    models = fine_tune(weights, make, loss_of, map(asked, cut(data, steps)), "question answering: loss of start and end")
    ids, segments, spans = asked(held_out)
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            found[name] = (model(ids, segments).argmax(1) == spans).all(1).float().mean().item()
    print(f"exact spans in new sentences: {found['eager']:.3f} eager, {found['fastattn']:.3f} fastattn")
    return found


def main(steps=150):
    weights, data = pretrained(2 * steps), named()
    held_out, data = data[:100], data[100:]
    return recognise(weights, data, held_out, steps), answer(weights, data, held_out, steps)


if __name__ == "__main__":
    command(main)

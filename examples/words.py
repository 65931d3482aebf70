"""Text for the BERT examples: the manual that Python carries with it, in sentences, and sentences as numbers."""

import functools
import re
from collections import Counter

import torch

from .common import need

LENGTH = 64  # tokens of a pair of sentences
PAD, UNKNOWN, CLS, SEP, MASK = range(5)


@functools.cache
def documents():
    """Sentences of 5 to 28 words (lists), by topic."""
    topics = need("pydoc_data.topics", "pydoc_data of the standard library").topics
    found = {}
    for name in sorted(topics):
        prose = [p for p in re.split(r"\n\s*\n", topics[name]) if p[-1:] in (".", ":") and "::=" not in p and ">>>" not in p]
        sentences = re.split(r"(?<=[.:!?])\s+(?=[A-Z\"])", " ".join(" ".join(prose).split()))
        words = [re.findall(r"\w+|[^\w\s]", sentence) for sentence in sentences]
        found[name] = [sentence for sentence in words if 5 <= len(sentence) <= 28]
    return found


@functools.cache
def index():
    """{word: its number} for the most frequent words."""
    counts = Counter(word.lower() for document in documents().values() for words in document for word in words)
    return {word: i for i, (word, _) in enumerate(counts.most_common(2500), start=MASK + 1)}


def vocabulary():
    return len(index()) + MASK + 1


def encode(pairs):
    """[CLS] first [SEP] second [SEP] of every pair of sentences: ids and segments (B, L). The second may be empty."""
    ids, segments = torch.full((len(pairs), LENGTH), PAD), torch.zeros(len(pairs), LENGTH, dtype=torch.long)
    for i, (first, second) in enumerate(pairs):
        a, b = ([word if isinstance(word, int) else index().get(word.lower(), UNKNOWN) for word in x] for x in (first, second))
        row = [CLS, *a, SEP, *b, *([SEP] if b else [])]
        ids[i, : len(row)], segments[i, len(a) + 2 : len(row)] = torch.tensor(row), 1
    return ids, segments

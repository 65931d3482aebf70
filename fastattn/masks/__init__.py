"""Masks: which keys a query row may see. An algebra (`&`, `|`) that lowers to a few key spans per row."""

from .algebra import intersect
from .base import And, Mask, Or
from .explicit import Custom, Dense, Spans
from .predicates import CustomPredicate, DensePredicate, resolve
from .ragged import Documents, Lengths, Padding
from .spans import MAX_SPANS, Bound, LoweredMask
from .structured import Causal, Chunked, Full, PrefixLM, SinkTokens, SlidingWindow

__all__ = [
    "MAX_SPANS", "And", "Bound", "Causal", "Chunked", "Custom", "CustomPredicate", "Dense", "DensePredicate",
    "Documents", "Full", "Lengths", "LoweredMask", "Mask", "Or", "Padding", "PrefixLM", "SinkTokens", "SlidingWindow",
    "Spans", "intersect", "resolve",
]  # fmt: skip

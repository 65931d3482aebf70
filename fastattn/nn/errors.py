"""The error of a drop-in module."""

from __future__ import annotations


class ArgumentError(ValueError, AssertionError, RuntimeError):
    """A ValueError, as everywhere in fastattn, that handlers written for torch.nn.MultiheadAttention catch as well: torch
    raises an AssertionError for some arguments and a RuntimeError for others."""

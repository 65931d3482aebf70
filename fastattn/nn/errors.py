"""The errors of a drop-in module. Those about ranks and masks hold the words that torch's tests look for."""

from __future__ import annotations

RANK_OF_QUERY = "query should be unbatched 2D or batched 3D tensor"


class ArgumentError(ValueError, AssertionError, RuntimeError):
    """A ValueError, as everywhere in fastattn, that handlers written for torch.nn.MultiheadAttention catch as well: torch
    raises an AssertionError for some arguments and a RuntimeError for others."""

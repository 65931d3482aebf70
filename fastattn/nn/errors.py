"""The errors of a drop-in module. Those about ranks and masks hold the words that torch's tests look for."""

from __future__ import annotations

from typing import Any

import torch

RANK_OF_QUERY = "query should be unbatched 2D or batched 3D tensor"


def check_sizes(**sizes: Any) -> None:
    """Raise unless every size is a positive int or None."""
    for name, n in sizes.items():
        if n is None:
            continue
        if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool):
            raise TypeError(f"{name} must be an int, got {n!r}")
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")


class ArgumentError(ValueError, AssertionError, RuntimeError):
    """A ValueError, as everywhere in fastattn, that handlers written for torch.nn.MultiheadAttention catch as well: torch
    raises an AssertionError for some arguments and a RuntimeError for others."""

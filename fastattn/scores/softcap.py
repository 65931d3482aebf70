"""Softcap: s -> cap * tanh(s / cap), which keeps logits within (-cap, cap) (Gemma 2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Pointwise


class Softcap(Pointwise, built_in="softcap"):
    """s -> cap * tanh(s / cap).

    Args:
        cap: positive and finite.

    Raises:
        ValueError: cap is not.
    """

    def __init__(self, cap: float) -> None:
        if not isinstance(cap, (int, float)) or not math.isfinite(cap) or cap <= 0:
            raise ValueError(f"cap must be a positive finite number, got {cap!r}")
        self.floats = (float(cap),)

    def value(self, s: Tensor) -> Tensor:
        (cap,) = self.floats
        return torch.tanh(s / cap) * cap

    def derivs(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (cap,) = self.floats
        t = torch.tanh(s / cap)
        first = 1 - t * t
        return t * cap, first, t * first * (-2 / cap)

    def device_functions(self) -> tuple[Any, ...]:
        from ..kernels import scores

        return scores.softcap_value, scores.softcap_first, scores.softcap_second

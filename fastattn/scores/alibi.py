"""ALiBi: a penalty that grows with distance, one slope a head (Press, Smith and Lewis, arXiv 2108.12409)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Additive, DeviceGradient, lead_strides, leading

if TYPE_CHECKING:
    from ..backends.tile import Tile


class ALiBi(Additive, built_in="alibi"):
    """s -> s - slope * |q - k|, or s + slope * (k - q) with distance="rel".

    Both are the same under a causal mask.

    Args:
        slopes: (Hq,) or (B, Hq) floating point; may require a gradient.
        distance: "abs" or "rel".

    Raises:
        TypeError, ValueError: slopes is no such tensor, or distance is neither.
    """

    def __init__(self, slopes: Tensor, distance: str = "abs") -> None:
        if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
            raise TypeError(f"slopes must be a floating point Tensor, got {getattr(slopes, 'dtype', type(slopes).__name__)}")
        if slopes.dim() not in (1, 2):
            raise ValueError(f"slopes must have shape (heads,) or (batch, heads), got {tuple(slopes.shape)}")
        if distance not in ("abs", "rel"):
            raise ValueError(f'distance must be "abs" or "rel", got {distance!r}')
        self.params, self.static = (slopes,), distance

    def validate(self, n_b: int, n_h: int, n_q: int, n_k: int, dtype: torch.dtype, device: torch.device) -> None:
        super().validate(n_b, n_h, n_q, n_k, dtype, device)
        if self.params[0].shape[-1] != n_h:
            raise ValueError(f"slopes must have one entry for each of {n_h} heads, got shape {tuple(self.params[0].shape)}")
        leading(self.params[0], n_b, n_h, 0, "slopes")

    def canonical(self, n_b: int, n_h: int) -> ALiBi:
        return self.with_params((leading(self.params[0], n_b, n_h, 0, "slopes"),))

    def _distance(self, tile: Tile) -> Tensor:
        distance = (tile.k - tile.q).to(tile.dtype)
        return distance if self.static == "rel" else -distance.abs()

    def term(self, tile: Tile) -> Tensor:
        return tile.heads(self.params[0]).to(tile.dtype)[:, :, None, None] * self._distance(tile)

    def accumulate(self, grads: list[Tensor], g: Tensor, tile: Tile) -> None:
        total = (g * self._distance(tile)).sum((-1, -2))  # (B, H)
        target = tile.heads(grads[0])
        target += total if target.shape[0] == total.shape[0] else total.sum(0, keepdim=True)

    def device_functions(self) -> tuple[Any, ...]:
        from ..kernels import scores

        return (scores.alibi_rel if self.static == "rel" else scores.alibi_abs,)

    def device_args(self) -> tuple[Any, ...]:
        return self.params[0], lead_strides(self.params[0])

    def device_gradient(self) -> DeviceGradient:
        from ..kernels import scores

        weight = scores.alibi_rel_weight if self.static == "rel" else scores.alibi_abs_weight
        finish = lambda sums, q, k: sums.sum(2).sum_to_size(self.params[0].shape)
        return DeviceGradient("rows", True, True, weight, finish, anywhere=True)


def alibi_slopes(n_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of the ALiBi paper: 2^(-8 (i + 1) / n) for a power of two, every second of the next one's in between.

    Args:
        n_heads: how many, at least 1. device: where they stand.

    Returns:
        float32 (n_heads,)

    Raises:
        TypeError, ValueError: n_heads is no such number.
    """
    if not isinstance(n_heads, int):
        raise TypeError(f"n_heads must be an int, got {n_heads!r}")
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(n_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)

"""RelativeBias: a learned table over the distance k - q (T5 and its kin), added."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Additive, leading

if TYPE_CHECKING:
    from ..backends.tile import Tile


class RelativeBias(Additive, built_in="relative"):
    """s -> s + table[b, h, clamp(k - q + offset, 0, n - 1)].

    Args:
        table: (n,), (Hq, n) or (B, Hq, n) floating point; may require a gradient.
        offset: the table's entry for distance 0; the middle, (n - 1) // 2, by default.

    Raises:
        TypeError, ValueError: table is no such tensor or offset no int.
    """

    def __init__(self, table: Tensor, offset: int | None = None) -> None:
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError(f"table must be a floating point Tensor, got {getattr(table, 'dtype', type(table).__name__)}")
        if table.dim() not in (1, 2, 3) or table.shape[-1] == 0:
            raise ValueError(f"table must have shape (n,), (heads, n) or (batch, heads, n), got {tuple(table.shape)}")
        if offset is not None and not isinstance(offset, int):
            raise TypeError(f"offset must be an int or None, got {type(offset).__name__}")
        self.params = (table,)
        self.ints = ((table.shape[-1] - 1) // 2 if offset is None else offset,)

    def validate(self, n_b: int, n_h: int, n_q: int, n_k: int, dtype: torch.dtype, device: torch.device) -> None:
        super().validate(n_b, n_h, n_q, n_k, dtype, device)
        leading(self.params[0], n_b, n_h, 1, "table")

    def canonical(self, n_b: int, n_h: int) -> RelativeBias:
        return self.with_params((leading(self.params[0], n_b, n_h, 1, "table"),))

    def _entries(self, tile: Tile) -> Tensor:
        """The table's entry for every pair. # int64 (B|1, 1, rows, keys)"""
        return (tile.k - tile.q + self.ints[0]).clamp(0, self.params[0].shape[-1] - 1)

    def term(self, tile: Tile) -> Tensor:
        table, at = tile.heads(self.params[0]).to(tile.dtype), self._entries(tile)
        if at.shape[0] == 1:
            return table[:, :, at[0, 0]]
        n_b, n_h = at.shape[0], table.shape[1]
        flat = at.flatten(1)[:, None].expand(-1, n_h, -1)  # (B, H, rows * keys)
        return table.expand(n_b, -1, -1).gather(2, flat).view(n_b, n_h, *at.shape[2:])

    def accumulate(self, grads: list[Tensor], g: Tensor, tile: Tile) -> None:
        target, at = tile.heads(grads[0]), self._entries(tile)
        if target.shape[1] == 1 and g.shape[1] != 1:
            g = g.sum(1, keepdim=True)
        if at.shape[0] == 1:
            if target.shape[0] == 1 and g.shape[0] != 1:
                g = g.sum(0, keepdim=True)
            target.index_add_(2, at.flatten(), g.flatten(2))
            return
        for b in range(at.shape[0]):
            target[b % target.shape[0]].index_add_(1, at[b].flatten(), g[b].flatten(1))


def t5_bucket(distance: Tensor, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """T5's bucket of a distance k - q: exact near zero, logarithmic up to max_distance, one for all beyond.

    `RelativeBias(weight[t5_bucket(torch.arange(-n, n + 1))].T)` is T5's bias for a weight (num_buckets, heads).

    Args:
        distance: integer tensor.
        bidirectional: keys ahead of the row get half of the buckets; else they share bucket 0.

    Returns:
        int64 in [0, num_buckets), in distance's shape.
    """
    distance = distance.to(torch.int64)
    start = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        start = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    span = math.log(max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) / span * (num_buckets - exact)).to(torch.int64)
    return start + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))

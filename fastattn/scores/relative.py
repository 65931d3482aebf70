"""RelativeBias: a learned table over the distance k - q (T5 and its kin), added."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..coords import FARTHEST
from .base import Additive, DeviceGradient, apart, index_add, lead_strides, leading

if TYPE_CHECKING:
    from ..backends.tile import Tile


class RelativeBias(Additive, built_in="relative"):
    """s -> s + table[b, h, clamp(k - q + offset, 0, n - 1)].

    Args:
        table: (n,), (Hq, n) or (B, Hq, n) floating point; may require a gradient.
        offset: the table's entry for distance 0; the middle, (n - 1) // 2, by default.

    Raises:
        TypeError, ValueError: table is no such tensor, or offset no int or out of range.
    """

    def __init__(self, table: Tensor, offset: int | None = None) -> None:
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError(f"table must be a floating point Tensor, got {getattr(table, 'dtype', type(table).__name__)}")
        if table.dim() not in (1, 2, 3) or table.shape[-1] == 0:
            raise ValueError(f"table must have shape (n,), (heads, n) or (batch, heads, n), got {tuple(table.shape)}")
        if offset is not None and not isinstance(offset, int):
            raise TypeError(f"offset must be an int or None, got {type(offset).__name__}")
        if offset is not None and abs(offset) >= FARTHEST:
            raise ValueError(f"offset must lie within +-2^62, got {offset}")
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

    def _diagonals(self, tile: Tile) -> Tensor | None:
        """The table's entries from the tile's lowest k - q to its highest; None where coordinates have gaps.
        # int64 (rows + keys - 1,)"""
        q, k = tile.q_range, tile.k_range
        if q is None or k is None or q.stop <= q.start or k.stop <= k.start:
            return None
        distance = torch.arange(k.start - q.stop + 1, k.stop - q.start, device=tile.device)
        return (distance + self.ints[0]).clamp_(0, self.params[0].shape[-1] - 1)

    def term(self, tile: Tile) -> Tensor:
        diagonals = self._diagonals(tile)
        if diagonals is not None:  # the last row's keys start at the lowest distance, every row above one higher
            values = tile.heads(self.params[0])[:, :, diagonals].to(tile.dtype)
            return values.unfold(2, tile.k.shape[3], 1).flip(2)
        table, at = tile.heads(self.params[0]).to(tile.dtype), self._entries(tile)
        if at.shape[0] == 1:
            return table[:, :, at[0, 0]]
        n_b, n_h = at.shape[0], table.shape[1]
        flat = at.flatten(1)[:, None].expand(-1, n_h, -1)  # (B, H, rows * keys)
        return table.expand(n_b, -1, -1).gather(2, flat).view(n_b, n_h, *at.shape[2:])

    def accumulate(self, grads: list[Tensor], g: Tensor, tile: Tile) -> None:
        target = tile.heads(grads[0])
        if target.shape[1] == 1 and g.shape[1] != 1:
            g = g.sum(1, keepdim=True)
        if target.shape[0] == 1 and g.shape[0] != 1 and tile.k.shape[0] == 1 and tile.q.shape[0] == 1:
            g = g.sum(0, keepdim=True)
        diagonals = self._diagonals(tile)
        if diagonals is not None:
            first, last = int(diagonals[0]), int(diagonals[-1])
            wider = g.dtype if g.device.type == "mps" else torch.float64  # the table's ends sum many terms
            wide = g.new_zeros(*g.shape[:2], last - first + 1, dtype=wider)
            index_add(wide, 2, diagonals - first, diagonal_sums(g).to(wider))
            target[:, :, first : last + 1] += wide.to(target.dtype)
            return
        at = self._entries(tile)
        if at.shape[0] == 1:
            index_add(target, 2, at.flatten(), g.flatten(2))
            return
        for b in range(at.shape[0]):
            index_add(target[b % target.shape[0]], 1, at[b].flatten(), g[b].flatten(1))

    def device_functions(self) -> tuple[Any, ...]:
        from ..kernels import scores

        return (scores.relative,)

    def device_args(self) -> tuple[Any, ...]:
        table = self.params[0]
        strides = (*(apart(stride) for stride in lead_strides(table)), table.stride(2))
        return table, strides, apart(table.shape[2]), apart(self.ints[0])

    def device_gradient(self) -> DeviceGradient:
        from ..kernels import scores

        n_b, n_h, _ = shape = self.params[0].shape
        finish = lambda sums, q, k: sums.sum(2, dtype=torch.float64).sum_to_size(shape)
        scattered = DeviceGradient("table", True, True, scores.ones, finish, anywhere=True, entry=scores.relative_entry)
        return DeviceGradient("diagonals", n_b > 1, n_h > 1, scores.ones, self._folded, elsewhere=scattered)

    def _folded(self, sums: Tensor, q: int, k: int) -> Tensor:
        """The gradient from sums (B|1, H|1, distances) by k - q, the lowest distance first: that of row q and key k."""
        n, m = self.params[0].shape[2], sums.shape[2]
        first = k - q + self.ints[0]
        low = min(max(-first, 0), m)
        high = max(min(n - first, m), low)
        total = torch.zeros(*sums.shape[:2], n, dtype=sums.dtype, device=sums.device)
        total[..., first + low : first + high] = sums[..., low:high]
        total[..., 0] += sums[..., :low].sum(-1)
        total[..., n - 1] += sums[..., high:].sum(-1)
        return total


def diagonal_sums(g: Tensor) -> Tensor:
    """Sums along the diagonals of the last two dimensions, the lower left corner's first. # (..., rows + keys - 1)

    Every row is laid one place further left than the row above, in rows of zeros that are as long as there are
    diagonals: then a diagonal is a column.
    """
    rows, keys = g.shape[-2:]
    width = rows + keys - 1
    flat = g.new_zeros(*g.shape[:-2], rows * width)
    lead = flat.stride()[:-1]
    flat.as_strided(g.shape, (*lead, width - 1, 1), flat.storage_offset() + rows - 1).copy_(g)
    return flat.unflatten(-1, (rows, width)).sum(-2)


def t5_bucket(distance: Tensor, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """T5's bucket of a distance k - q: exact near zero, logarithmic up to max_distance, one for all beyond.

    `RelativeBias(weight[t5_bucket(torch.arange(-n, n + 1))].T)` is T5's bias for a weight (num_buckets, heads).

    Args:
        distance: integer tensor.
        bidirectional: keys ahead of the row get half of the buckets; else they share bucket 0.

    Returns:
        int64 in [0, num_buckets), in distance's shape.

    Raises:
        TypeError, ValueError: an argument is no such tensor or number.
    """
    if not isinstance(distance, Tensor) or distance.is_floating_point() or distance.is_complex():
        raise TypeError(f"distance must be an integer Tensor, got {getattr(distance, 'dtype', type(distance).__name__)}")
    for name, n in (("num_buckets", num_buckets), ("max_distance", max_distance)):
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"{name} must be an int, got {n!r}")
    least = 4 if bidirectional else 2
    if num_buckets < least or max_distance <= num_buckets // least:
        raise ValueError(
            f"num_buckets must be at least {least} and max_distance more than num_buckets // {least}, got {num_buckets} and "
            f"{max_distance}"
        )
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

"""A rectangle of the score matrix, as scores, custom masks and dropout see it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..problem import Problem

Index = slice | Tensor  # storage indices along one dimension


def size_of(index: Index) -> int:
    return index.stop - index.start if isinstance(index, slice) else index.shape[0]


def select(x: Tensor, dim: int, index: Index) -> Tensor:
    """x restricted to `index` along `dim`; a view where the index is a slice. Dimensions of size 1 broadcast."""
    if x.shape[dim] == 1 and size_of(index) != 1:
        return x
    if isinstance(index, slice):
        if index.start == 0 and index.stop == x.shape[dim]:
            return x
        return x.narrow(dim, 0 if x.shape[dim] == 1 else index.start, index.stop - index.start)
    return x if x.shape[dim] == 1 else x.index_select(dim, index)


class Tile:
    """Rows x keys of the batch entries `b_slice` and heads `h_slice`.

    Coordinates are int64 and broadcast to (B, H, rows, keys); `q_range` and `k_range` are slices of coordinates where
    these are consecutive, else None.
    """

    def __init__(self, p: Problem, b_slice: slice, h_slice: slice, rows: slice, keys: Index) -> None:
        self.p, self.b_slice, self.h_slice, self.rows, self.keys = p, b_slice, h_slice, rows, keys
        self.dtype, self.device = p.acc_dtype, p.q.device

    @functools.cached_property
    def b(self) -> Tensor:  # (B|1, 1, 1|rows, 1)
        b = self.p.coords.b
        if isinstance(b, Tensor):
            return select(select(b.long(), 0, self.b_slice), 1, self.rows)[:, None, :, None]
        index = torch.arange(self.b_slice.start, self.b_slice.stop, device=self.device)
        return (index % max(self.p.n_b_coords, 1) + b)[:, None, None, None]

    @functools.cached_property
    def h(self) -> Tensor:  # (B|1, H, 1, 1)
        h = self.p.coords.h
        if isinstance(h, Tensor):
            return select(select(h.long(), 0, self.b_slice), 1, self.h_slice)[:, :, None, None]
        return (torch.arange(self.h_slice.start, self.h_slice.stop, device=self.device) + h)[None, :, None, None]

    @functools.cached_property
    def q(self) -> Tensor:  # (B|1, 1, rows, 1)
        q = self.p.coords.q
        if isinstance(q, Tensor):
            return select(select(q.long(), 0, self.b_slice), 1, self.rows)[:, None, :, None]
        return (torch.arange(self.rows.start, self.rows.stop, device=self.device) + q)[None, None, :, None]

    @functools.cached_property
    def k(self) -> Tensor:  # (B|1, 1, 1, keys)
        k = self.p.coords.k
        if isinstance(k, Tensor):
            return select(select(k.long(), 0, self.b_slice), 1, self.keys)[:, None, None, :]
        keys = self.keys
        index = torch.arange(keys.start, keys.stop, device=self.device) if isinstance(keys, slice) else keys
        return (index + k)[None, None, None, :]

    @property
    def q_range(self) -> slice | None:
        q = self.p.coords.q
        return None if isinstance(q, Tensor) else slice(self.rows.start + q, self.rows.stop + q)

    @property
    def k_range(self) -> slice | None:
        k = self.p.coords.k
        if isinstance(k, Tensor) or not isinstance(self.keys, slice):
            return None
        return slice(self.keys.start + k, self.keys.stop + k)

    def batch(self, x: Tensor) -> Tensor:
        """x (B|1, ...) restricted to the tile's batch entries."""
        return select(x, 0, self.b_slice)

    def heads(self, x: Tensor) -> Tensor:
        """x (B|1, H|1, ...) restricted to the tile's batch entries and heads."""
        return select(select(x, 0, self.b_slice), 1, self.h_slice)

"""What every tiled verb shares: operands in the accumulation dtype, grouped products, row statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from .regions import Region
from .tile import select

FAR = 256.0  # |lse| from which weights are off by more than 2^-16 in float32


def kv_heads(p: Problem, h: slice) -> slice:
    """The key heads that the query heads of a region read."""
    group = p.n_h // p.n_kv
    return slice(h.start // group, (h.stop - 1) // group + 1)


def q_part(x: Tensor, region: Region) -> Tensor:
    """x (B, Hq, Lq, ...) restricted to a region's batch entries, heads and rows."""
    return select(select(select(x, 0, region.b), 1, region.h), 2, region.rows)


def k_part(p: Problem, x: Tensor, region: Region) -> Tensor:
    """x (B, Hkv, Lk, ...) restricted to a region's batch entries, key heads and keys."""
    return select(select(select(x, 0, region.b), 1, kv_heads(p, region.h)), 2, region.keys)


def add_keys(p: Problem, total: Tensor, region: Region, part: Tensor) -> None:
    """total[region's batch, key heads, keys] += part."""
    target = select(select(total, 0, region.b), 1, kv_heads(p, region.h))
    if isinstance(region.keys, slice):
        target.narrow(2, region.keys.start, region.n_keys).add_(part)
    else:
        target.index_add_(2, region.keys, part.to(total.dtype))


def dot_keys(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, m, D) . k (B, Hkv, n, D) -> (B, H, m, n); the heads of a group read the same k without a copy of it."""
    if q.shape[1] == k.shape[1]:
        return q @ k.mT
    b, h, m, d = q.shape
    return (q.reshape(b, k.shape[1], h // k.shape[1] * m, d) @ k.mT).view(b, h, m, k.shape[2])


def dot_rows(w: Tensor, v: Tensor) -> Tensor:
    """w (B, H, m, n) . v (B, Hkv, n, D) -> (B, H, m, D)."""
    if w.shape[1] == v.shape[1]:
        return w @ v
    b, h, m, n = w.shape
    return (w.reshape(b, v.shape[1], h // v.shape[1] * m, n) @ v).view(b, h, m, v.shape[3])


def dot_columns(w: Tensor, x: Tensor, n_kv: int) -> Tensor:
    """w (B, H, m, n) transposed . x (B, H, m, D), summed over the heads of a group -> (B, Hkv, n, D)."""
    if w.shape[1] == n_kv:
        return w.mT @ x
    b, h, m, n = w.shape
    rows = h // n_kv * m
    return w.reshape(b, n_kv, rows, n).mT @ x.reshape(b, n_kv, rows, x.shape[3])


def exact_out(out: Tensor, out_lo: Tensor, dtype: torch.dtype) -> Tensor:
    """O in the accumulation dtype, from its high and low halves where there are two."""
    return out.to(dtype).add_(out_lo) if out_lo.numel() else out.to(dtype)


def row_dot(x: Tensor | None, y: Tensor | None, like: Tensor) -> Tensor:
    """Sum over the last dimension of x * y, zero where one is absent; the shape of `like` (B, H, L)."""
    if x is None or y is None:
        return torch.zeros_like(like)
    return (x * y).sum(-1)


def safe_lse(lse: Tensor) -> Tensor:
    """lse with +inf for rows that see nothing, so that exp(s - lse) is 0 there and never NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def is_far(lse: Tensor) -> bool:
    """Whether some row's logits are so far from 0 that what lse rounds off shows in exp(s - lse). Told on the CPU alone, since
    elsewhere the answer would wait for the device."""
    return lse.is_cpu and bool(far_rows(lse).any())


def far_rows(lse: Tensor) -> Tensor:
    """Which rows' are. # bool (B, H, L)"""
    size = lse.abs()
    return (size > FAR) & (size < torch.inf)


class RowNorm(NamedTuple):
    """What makes weights of a row's logits: w = exp(s - lse) share."""

    lse: Tensor  # (B, H, L); +inf where a row sees nothing
    share: Tensor | None = None  # (B, H, L); None for 1

    def part(self, region: Region) -> RowNorm:
        """That of a region's rows."""
        return RowNorm(q_part(self.lse, region), None if self.share is None else q_part(self.share, region))

    def weights(self, s: Tensor) -> Tensor:
        """Of logits s (B, H, L, n)."""
        w = torch.exp(s - self.lse[..., None])
        return w if self.share is None else w * self.share[..., None]


def sink_weight(p: Problem, lse: Tensor, share: Tensor | None = None) -> Tensor:
    """pi_i = exp(sink - lse_i): the share of the sink in every row's softmax, `share` as in `RowNorm`. (B, H, L)"""
    assert p.sinks is not None
    weight = torch.exp(p.sinks.to(lse.dtype)[:, :, None] - safe_lse(lse))
    return weight if share is None else weight * share


def sum_rows_like(x: Tensor, sinks: Tensor) -> Tensor:
    """Sum x (B, H, L) to the shape and dtype of sinks (B|1, H)."""
    rows = x.sum(-1)
    return (rows if sinks.shape[0] == x.shape[0] else rows.sum(0, keepdim=True)).to(sinks.dtype)

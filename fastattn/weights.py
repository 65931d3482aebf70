"""The attention weights themselves, which attention never forms: for debugging, and for modules that must return them.

    w_ij = exp(s_ij - lse_i)      over visible keys; what is missing to 1 is the sink's share

By the row's own maximum and sum, since lse rounds where all logits of a row are far from 0.

A slice of rows against all keys at a time: O(rows x n_k) memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .backends.operands import dot_keys, safe_lse
from .backends.tile import Tile
from .coords import Coordinates
from .dropout import keep_mask
from .functional import MaskLike, ScoreLike, problem
from .masks import DensePredicate, LoweredMask
from .problem import Problem
from .scores import Additive, Pointwise

SLICE = 1 << 24  # weights that are held at once where they are reduced
REDUCTIONS = (None, "entropy", "key_sums")


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: slice | Tensor | None = None,
    reduce: str | None = None,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Tensor | None = None,
    scale: float | None = None,
    coords: Coordinates | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """The weights that `attention` of the same arguments gives its values, or a summary of them. Differentiable.

    Weights of a row add up to 1 where there are no sinks, less the sink's share where there are, and to 0 where the row sees
    no key. Dropout is left out.

    Args:
        q: (B, Hq, Lq, Dk). k: (B, Hkv, Lk, Dk).
        rows: which rows: a slice, an integer tensor (n,), or None for all.
        reduce: None for the weights, "entropy" for -sum_j w log w of every row in nats, "key_sums" for the sum over `rows` of
            the weights of every key. The two summaries never hold more than a slice of the weights.
        mask, score, sinks, scale, coords: as in `attention`.
        lse: (B, Hq, Lq) that `attention` returned, of these keys or of more: weights are exp(s - lse) then.

    Returns:
        (B, Hq, n_rows, Lk), (B, Hq, n_rows) or (B, Hq, Lk); float32, float64 for float64.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what came and what is accepted.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduce!r}")
    p = problem(q, k, k, mask, score, sinks, scale, 0.0, None, None, coords)
    index = _row_index(rows, p.n_q, q.device)
    if lse is not None:
        if not isinstance(lse, Tensor) or lse.shape != (p.n_b, p.n_h, p.n_q):
            got = tuple(lse.shape) if isinstance(lse, Tensor) else type(lse).__name__
            raise ValueError(f"lse must have shape {(p.n_b, p.n_h, p.n_q)}, got {got}")
        lse = lse if index is None else lse.index_select(2, index)
    p = p if index is None else with_rows(p, index)
    if reduce is None:
        return weights(p, lse)
    step = max(1, SLICE // max(1, p.n_b * p.n_h * p.n_k))
    parts = []
    for first in range(0, p.n_q, step):
        at = torch.arange(first, min(first + step, p.n_q), device=q.device)
        w = weights(with_rows(p, at), None if lse is None else lse[:, :, first : first + step])
        parts.append(_entropy(w) if reduce == "entropy" else w.sum(2))
    if not parts:
        return p.q.new_zeros(p.n_b, p.n_h, 0 if reduce == "entropy" else p.n_k, dtype=p.acc_dtype)
    return torch.cat(parts, 2) if reduce == "entropy" else torch.stack(parts).sum(0)


def _entropy(w: Tensor) -> Tensor:
    """-sum_j w log w, with a finite gradient where w is 0."""
    return -(w * torch.log(w.masked_fill(w == 0.0, 1.0))).sum(-1)


def _row_index(rows: Any, n_q: int, device: torch.device) -> Tensor | None:
    """`rows` as int64 indices, None for all."""
    if rows is None:
        return None
    if isinstance(rows, slice):
        return torch.arange(n_q, device=device)[rows]
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
        got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
        raise TypeError(f"rows must be None, a slice or an integer tensor (n,), got {got}")
    if rows.device != device:
        raise ValueError(f"rows must be on q's device {device}, got {rows.device}")
    if rows.is_cpu and rows.numel():
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= n_q:
            raise ValueError(f"rows must lie in [0, {n_q}), got {low} to {high}")
    return rows.long()


def weights(p: Problem, lse: Tensor | None = None) -> Tensor:
    """The weights of a problem, without dropout, or exp(s - lse). # (B, Hq, n_q, n_k), accumulation dtype"""
    if lse is None:
        return shares(p)[..., : p.n_k]
    s, seen = logits(p)
    if seen is None:
        return torch.exp(s - safe_lse(lse)[..., None])
    return torch.where(seen, torch.exp(torch.where(seen, s, 0.0) - safe_lse(lse)[..., None]), 0.0)


def shares(p: Problem) -> Tensor:
    """The weights, and behind those of the keys the sink's share where there are sinks. # (B, Hq, n_q, n_k or n_k + 1)"""
    s, seen = logits(p)
    if seen is not None:
        s = s.masked_fill(~seen, -torch.inf)
    if p.sinks is not None:
        s = torch.cat((s, p.sinks.to(s.dtype)[:, :, None, None].expand(*s.shape[:3], 1)), 3)
    elif seen is None and not p.scores:
        return torch.softmax(s, 3)
    nothing = (s == -torch.inf).all(3, keepdim=True)
    return torch.softmax(s.masked_fill(nothing, 0.0), 3).masked_fill(nothing, 0.0)


def logits(p: Problem) -> tuple[Tensor, Tensor | None]:
    """The logits (B, Hq, n_q, n_k) in the accumulation dtype, and which are `visible`; None for all."""
    tile = whole(p)
    s = p.scale * dot_keys(p.q.to(p.acc_dtype), p.k.to(p.acc_dtype))
    for score in p.scores:
        if isinstance(score, Additive):
            s = s + score.term(tile)
        elif isinstance(score, Pointwise):
            s = score.value(s)
        else:
            s = score.value(s, tile)  # type: ignore[attr-defined]
    return s, None if p.mask.is_full else visible(p, tile)


def dropped(p: Problem, w: Tensor) -> Tensor:
    """Weights (B, Hq, n_q, n) under p's dropout: with the bits that its forward pass uses for these coordinates."""
    if p.dropout_p == 0.0:
        return w
    assert p.rng is not None
    tile = Tile(p, slice(0, p.n_b), slice(0, p.n_h), slice(0, p.n_q), slice(0, w.shape[3]))
    keep = keep_mask(p.rng, p.dropout_p, tile.b, tile.h, tile.q, tile.k, tile.b_slice, p.n_b)
    return w * keep / (1.0 - p.dropout_p)


def whole(p: Problem) -> Tile:
    """All of a problem as one tile."""
    return Tile(p, slice(0, p.n_b), slice(0, p.n_h), slice(0, p.n_q), slice(0, p.n_k))


def visible(p: Problem, tile: Tile) -> Tensor:
    """Which keys every row sees. # bool (B|1, H|1, n_q, n_k)"""
    start, stop = (x[..., None] for x in p.mask.rows_tensors(p.q.device))  # (B|1, H|1, R, n_q, 1)
    k_idx = torch.arange(p.n_k, dtype=torch.int32, device=p.q.device)
    seen = ((k_idx >= start) & (k_idx < stop)).any(2)
    for predicate in p.mask.predicates:
        if isinstance(predicate, DensePredicate):
            seen = seen & predicate.tensor
        else:
            seen = seen & predicate.visible(tile.b, tile.h, tile.q, tile.k)
    return seen


def with_rows(p: Problem, index: Tensor) -> Problem:
    """The problem of some of p's rows, which keep their coordinates. index: int64 (n,)"""
    rows = (x.index_select(3, index) for x in p.mask.rows_tensors(p.q.device))
    predicates = tuple(
        DensePredicate(_select(x.tensor, 2, index)) if isinstance(x, DensePredicate) else x for x in p.mask.predicates
    )
    mask = LoweredMask(index.shape[0], p.n_k, None, tuple(rows), predicates)  # type: ignore[arg-type]
    b, h, q, k = p.coords.parts
    at = q.index_select(1, index) if isinstance(q, Tensor) else (index + q)[None]
    coords = Coordinates(_select(b, 1, index) if isinstance(b, Tensor) else b, h, at, k)
    return dataclasses.replace(p, q=p.q.index_select(2, index), mask=mask, coords=coords)


def _select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return x if x.shape[dim] == 1 else x.index_select(dim, index)

"""Small calls as one region, where a call per batch entry or band would cost the host more than the scores do.

A bool tile hides what a row does not see. Keys that no row of their batch entry sees may hold anything, as in regions of their
own: they are emptied first where they hold what a weight of 0 does not silence.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import Bound, DensePredicate, LoweredMask
from ..problem import Problem
from .regions import MASK, Region, is_static, predicate_tile

CALL = 1 << 16  # score elements of a call
ENTRY = 1 << 13  # score elements of a batch entry, where entries differ
FAR = 256  # keys from which it is worth a look whether they are many more than the rows see
FEW = 1 << 12  # elements that torch selects faster than it computes with them


class Hidden(NamedTuple):
    """What a mask hides from the rows of a small call among the keys `first` to `last`; no row sees any other key."""

    visible: Tensor  # bool (B|1, H|1, rows|1, last - first)
    first: int
    last: int
    unseen: bool  # whether a key may be among them that no row of its batch entry sees


def joint(p: Problem) -> Region | None:
    """The whole call as a region, or None where it is better cut."""
    mask = p.mask
    if p.q.device.type != "cpu" or not worthwhile(p.n_b, p.n_h, p.n_q, p.n_k):
        return None
    if not mask.predicates and (mask.is_full or mask.is_causal):
        return None
    whole = slice(0, p.n_b), slice(0, p.n_h), slice(0, p.n_q)
    if is_static(mask) and not mask.predicates:
        found = of_spans(mask.spans, p.n_q, p.n_k) if _alike(1, p.n_b, p.n_h * p.n_q * p.n_k) else None
    else:
        visible = _by_spans(mask, p.n_q, p.n_k)
        if mask.predicates:
            tile = predicate_tile(p, Region(*whole, slice(0, p.n_k)), whole[2])
            visible = tile if visible is None else visible & tile
        assert visible is not None
        found = hidden_by(visible, p.n_k) if _alike(visible.shape[0], p.n_b, p.n_h * p.n_q * p.n_k) else None
    return None if found is None else Region(*whole, slice(found.first, found.last), found.visible, found.unseen)


def worthwhile(n_b: int, n_h: int, n_q: int, n_k: int) -> bool:
    """Whether a masked call of these sizes may be small enough to be one region."""
    entry = n_h * n_q * n_k
    return 0 < n_b * entry <= MASK and entry <= CALL and (n_b * entry <= CALL or entry <= ENTRY)


def _alike(n_masks: int, n_b: int, entry: int) -> bool:
    """Whether it is with masks for so many batch entries of `entry` scores: a long batch only where its entries differ."""
    return n_masks > 1 or n_b * entry <= CALL


def hidden_in(mask: LoweredMask, n_b: int, n_h: int) -> Hidden | None:
    """What a mask hides in a call that is `worthwhile`; None where its tensors do not fit or do not say it."""
    for x in mask.tensors():
        fits = x.shape[0] in (1, n_b) and (x.dim() < 4 or x.shape[1] in (1, n_h))
        if not fits or type(x) is not Tensor or not x.is_cpu:
            return None
    visible = _by_spans(mask, mask.n_q, mask.n_k)
    for predicate in mask.predicates:
        if not isinstance(predicate, DensePredicate):
            return None
        visible = predicate.tensor if visible is None else visible & predicate.tensor
    if visible is None or not _alike(visible.shape[0], n_b, n_h * mask.n_q * mask.n_k):
        return None
    return hidden_by(visible, mask.n_k)


def hidden_by(visible: Tensor, n_k: int, kept: bool = False) -> Hidden:
    """What a bool mask (B|1, H|1, rows|1, n_k|1) hides. Keys that no row sees are looked for only where that may pay.

    kept: whether the result serves many calls.
    """
    if visible.shape[3] != n_k:
        visible = visible.expand(*visible.shape[:3], n_k)
    if kept or n_k >= FAR:
        index = seen_keys(visible).amax(0).nonzero()
        if 0 < len(index) <= n_k // 2:
            first, last = int(index[0]), int(index[-1]) + 1
            if 2 * (last - first) <= n_k:
                return Hidden(visible[..., first:last], first, last, True)
    return Hidden(visible, 0, n_k, True)


def seen_keys(visible: Tensor) -> Tensor:
    """Which keys some row of a batch entry sees. # uint8 (B|1, keys)"""
    bits = visible.view(torch.uint8)
    return bits[:, 0, 0] if visible.shape[1] == visible.shape[2] == 1 else bits.amax((1, 2))


def added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible and -inf elsewhere."""
    if visible.numel() <= FEW:
        return torch.where(visible, *_ZERO_AND_HIDDEN[dtype])
    return visible.to(dtype).reciprocal_().neg_().add_(1.0)  # 1 - 1 / visible: a third of the time


_ZERO_AND_HIDDEN = {
    dtype: (torch.zeros((), dtype=dtype), torch.full((), -torch.inf, dtype=dtype)) for dtype in (torch.float32, torch.float64)
}


def is_tame(x: Tensor) -> bool:
    """Whether the squares of x have a finite sum: then 0 times an element is 0, and its product with a like one finite."""
    return math.isfinite(torch.linalg.vector_norm(x.detach()).item())


def emptied(region: Region, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of a joint region's keys, with zeros at the keys that no row sees where a tensor is not tame."""
    if not region.joint or not isinstance(region.hiding, Tensor) or all(is_tame(x) for x in tensors):
        return tensors
    unseen = seen_keys(region.hiding)[:, None, :, None] == 0
    return tuple(x.masked_fill(unseen, 0.0) for x in tensors)


@functools.lru_cache(maxsize=32)
def of_spans(spans: tuple, n_q: int, n_k: int) -> Hidden:
    """What affine spans with integer constants hide, kept: models call with the same few again and again."""
    with torch.inference_mode(False):
        visible = _by_spans(LoweredMask(n_q, n_k, spans), n_q, n_k)
        found = hidden_by(torch.ones(1, 1, 1, n_k, dtype=torch.bool) if visible is None else visible, n_k, True)
        return found._replace(unseen=not seen_keys(found.visible).all())


@functools.lru_cache(maxsize=32)
def added_of_spans(spans: tuple, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
    """What torch's kernel adds to the scores under `of_spans`, kept as well."""
    with torch.inference_mode(False):
        return added(of_spans(spans, n_q, n_k).visible, dtype)


def _by_spans(mask: LoweredMask, n_q: int, n_k: int) -> Tensor | None:
    """Which keys the spans show: bool (B|1, H|1, rows|1, n_k), None for all of them."""
    key = _index(n_k)
    if mask.rows is not None:
        first, end = mask.rows
        seen = (key >= first[..., None]) & (key < end[..., None])  # (B|1, H|1, R, n_q, n_k)
        return seen[:, :, 0] if seen.shape[2] == 1 else seen.any(2)
    visible: Tensor | None = None
    for start, stop in mask.spans or ():
        found: Tensor | None = None if _says_nothing(start, 0) else key >= _column(start, n_q)  # type: ignore[assignment]
        if not _says_nothing(stop, n_k):
            before: Tensor = key < _column(stop, n_q)  # type: ignore[assignment]
            found = before if found is None else found & before
        if found is None:
            return None
        visible = found if visible is None else visible | found
    assert visible is not None
    return visible.view((1,) * (4 - visible.dim()) + visible.shape)


def _says_nothing(bound: Bound, end: int) -> bool:
    """Whether a bound is fixed at or beyond its end of the keys, 0 or n_k."""
    if bound.row or isinstance(bound.const, Tensor):
        return False
    return bound.const <= 0 if end == 0 else bound.const >= end


def _column(bound: Bound, n_q: int) -> int | Tensor:
    """The values of a bound: an int, or int32 (n_q, 1) or (B|1, 1, n_q|1, 1)."""
    const = bound.const
    if isinstance(const, Tensor):
        const = const.view(-1, 1, 1, 1)
    return _index(n_q)[:, None] + const if bound.row else const


@functools.lru_cache(maxsize=32)
def _index(n: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(n, dtype=torch.int32)

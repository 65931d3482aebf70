"""Small calls as one region, where a call per batch entry or band would cost the host more than the scores do.

A bool tile hides what a row does not see. Keys that no row of their batch entry sees are emptied first, so that they may hold
anything, as in regions of their own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..masks import LoweredMask
from ..problem import Problem
from .regions import MASK, Region, is_static, predicate_tile

CALL = 1 << 16  # score elements of a call
ENTRY = 1 << 13  # score elements of a batch entry, where entries differ


def joint(p: Problem) -> Region | None:
    """The whole call as a region, or None where it is better cut."""
    mask, entry = p.mask, p.n_h * p.n_q * p.n_k
    if p.q.device.type != "cpu" or not 0 < p.n_b * entry <= MASK or entry > CALL:
        return None
    if not mask.predicates and (mask.is_full or mask.is_causal):
        return None
    if is_static(mask):
        visible = _affine(mask.spans, p.n_q, p.n_k)
    else:
        start, stop = mask.rows_tensors(p.q.device)
        if mask.spans is not None and all(bound.row == 0 for span in mask.spans for bound in span):
            start, stop = start[..., :1], stop[..., :1]  # the same for every row
        if p.n_b * entry > CALL and (start.shape[0] == 1 or entry > ENTRY):
            return None
        visible = _visible(start, stop, p.n_k)
    if p.n_b * entry > CALL and visible.shape[0] == 1:
        return None
    region = Region(slice(0, p.n_b), slice(0, p.n_h), slice(0, p.n_q), slice(0, p.n_k), None, True)
    if mask.predicates:
        visible = visible & predicate_tile(p, region, region.rows)
    return Region(region.b, region.h, region.rows, region.keys, visible, True)


def emptied(region: Region, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of a joint region's keys with zeros at the keys that no row sees."""
    if not region.joint or not isinstance(region.hiding, Tensor):
        return tensors
    seen = region.hiding.view(torch.uint8).amax((1, 2)).bool()  # (B|1, keys)
    if bool(seen.all()):
        return tensors
    return tuple(x.masked_fill(~seen[:, None, :, None], 0.0) for x in tensors)


@functools.lru_cache(maxsize=32)
def _affine(spans: tuple, n_q: int, n_k: int) -> Tensor:
    return _visible(*LoweredMask(n_q, n_k, spans, None, ()).rows_tensors("cpu"), n_k)


def _visible(start: Tensor, stop: Tensor, n_k: int) -> Tensor:
    """(B|1, H|1, rows|1, n_k) bool from spans (B|1, H|1, R, rows|1)."""
    key = torch.arange(n_k, dtype=torch.int32)
    return ((key >= start[..., None]) & (key < stop[..., None])).any(2)

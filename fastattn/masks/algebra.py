"""Intersection and union of lowered masks.

Affine spans stay affine where the ends compare without reading a tensor; otherwise the spans become rows, made sorted and
disjoint by tensor operations. How many spans that takes depends on the inputs' counts alone, so an error is static.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spans import MAX_SPANS, START, Bound, LoweredMask, Span


def intersect(a: LoweredMask, b: LoweredMask, device: Any) -> LoweredMask:
    """Keys that both masks show. Affine where that is decidable without reading a tensor, else rows."""
    predicates = a.predicates + b.predicates
    if a.spans is not None and b.spans is not None and len(a.spans) == len(b.spans) == 1:
        span = _affine_and(a.spans[0], b.spans[0], a.n_k)
        if span is not None:
            return LoweredMask(a.n_q, a.n_k, (span,), None, predicates)
    n_spans = a.n_spans + b.n_spans - 1
    _check_count(n_spans, "&", a, b)
    start_a, stop_a, start_b, stop_b = _common_rows(a, b, device)
    start = torch.maximum(start_a[:, :, :, None], start_b[:, :, None]).flatten(2, 3)  # (B, H, Ra * Rb, n_q)
    stop = torch.minimum(stop_a[:, :, :, None], stop_b[:, :, None]).flatten(2, 3)
    stop = torch.maximum(start, stop)
    if a.n_spans > 1 and b.n_spans > 1:  # with a single span on one side the order is right already
        empty = stop == start
        start, stop = _sort(start.masked_fill(empty, a.n_k), stop.masked_fill(empty, a.n_k))
        start, stop = start[:, :, :n_spans].contiguous(), stop[:, :, :n_spans].contiguous()
    return LoweredMask(a.n_q, a.n_k, None, (start, stop), predicates)


def unite(a: LoweredMask, b: LoweredMask, device: Any) -> LoweredMask:
    """Keys that either mask shows. Neither may have predicates."""
    if a.is_full or b.is_full:
        return a if a.is_full else b
    if a.spans is not None and b.spans is not None and len(a.spans) == len(b.spans) == 1:
        span = _affine_or(a.spans[0], b.spans[0], a.n_k)
        if span is not None:
            return LoweredMask(a.n_q, a.n_k, (span,))
    _check_count(a.n_spans + b.n_spans, "|", a, b)
    start_a, stop_a, start_b, stop_b = _common_rows(a, b, device)
    return LoweredMask(a.n_q, a.n_k, None, disjoint(torch.cat((start_a, start_b), 2), torch.cat((stop_a, stop_b), 2)))


def disjoint(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Clamped spans (B|1, H|1, R, n_q) in any order, made sorted and disjoint with the same union."""
    n_spans = start.shape[2]
    if n_spans == 1:
        return start, stop
    start, stop = _sort(start, stop)
    starts, stops = [start[:, :, 0]], [stop[:, :, 0]]
    for r in range(1, n_spans):
        starts.append(torch.maximum(start[:, :, r], stops[-1]))
        stops.append(torch.maximum(stop[:, :, r], stops[-1]))
    return torch.stack(starts, 2), torch.stack(stops, 2)


def _sort(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    start, order = torch.sort(start, 2)
    return start, stop.gather(2, order)


def _common_rows(a: LoweredMask, b: LoweredMask, device: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row tensors of both masks with the same leading dims (B|1, H|1)."""
    start_a, stop_a = a.rows_tensors(device)
    start_b, stop_b = b.rows_tensors(device)
    for dim, name in enumerate(("batch", "head")):
        _check_sizes(start_a.shape[dim], start_b.shape[dim], name)
    lead = torch.broadcast_shapes(start_a.shape[:2], start_b.shape[:2])
    start_a, stop_a = (x.expand(*lead, -1, -1) for x in (start_a, stop_a))
    start_b, stop_b = (x.expand(*lead, -1, -1) for x in (start_b, stop_b))
    return start_a, stop_a, start_b, stop_b


def _check_sizes(a: int, b: int, name: str) -> None:
    if a != b and a != 1 and b != 1:
        raise ValueError(f"masks of different {name} sizes {a} and {b} cannot be combined")


def _check_count(n_spans: int, operator: str, a: LoweredMask, b: LoweredMask) -> None:
    if n_spans > MAX_SPANS:
        raise ValueError(
            f"`{operator}` of masks with {a.n_spans} and {b.n_spans} spans per row can need {n_spans} spans; at most "
            f"{MAX_SPANS} are supported. Pass the combination as a bool tensor: Dense(mask.to_dense(n_q, n_k))"
        )


def _affine_and(a: Span, b: Span, n_k: int) -> Span | None:
    start = _later_start(a[0], b[0])
    stop = _earlier_stop(a[1], b[1], n_k)
    return None if start is None or stop is None else (start, stop)


def _later_start(a: Bound, b: Bound) -> Bound | None:
    if _is_start(a):
        return b
    if _is_start(b):
        return a
    return Bound(a.row, _extreme(a.const, b.const, True)) if a.row == b.row else None


def _earlier_stop(a: Bound, b: Bound, n_k: int) -> Bound | None:
    if a.row == b.row:
        return Bound(a.row, _extreme(a.const, b.const, False))
    if _is_end(a, n_k):
        return b
    return a if _is_end(b, n_k) else None


def _affine_or(a: Span, b: Span, n_k: int) -> Span | None:
    """The union as one span where the two surely overlap or touch and their ends compare statically."""
    if not (_surely_before(a[0], b[1], n_k) and _surely_before(b[0], a[1], n_k)):
        return None
    if _is_start(a[0]) or _is_start(b[0]):
        start = START
    elif a[0].row == b[0].row:
        start = Bound(a[0].row, _extreme(a[0].const, b[0].const, False))
    else:
        return None
    if _is_end(a[1], n_k) or _is_end(b[1], n_k):
        return start, Bound(0, n_k)
    if a[1].row == b[1].row:
        return start, Bound(a[1].row, _extreme(a[1].const, b[1].const, True))
    return None


def _surely_before(start: Bound, stop: Bound, n_k: int) -> bool:
    """Whether start <= stop, where a start of 0 counts as minus infinity and a stop of n_k as infinity."""
    if _is_start(start) or _is_end(stop, n_k):
        return True
    if start.row != stop.row or isinstance(start.const, Tensor) or isinstance(stop.const, Tensor):
        return False
    return bool(start.const <= stop.const)


def _is_start(bound: Bound) -> bool:
    return bound.row == 0 and not isinstance(bound.const, Tensor) and bound.const <= 0


def _is_end(bound: Bound, n_k: int) -> bool:
    return bound.row == 0 and not isinstance(bound.const, Tensor) and bool(bound.const == n_k)


def _extreme(a: int | Tensor, b: int | Tensor, largest: bool) -> int | Tensor:
    """max or min of two constants, each an int or (B|1,)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        _check_sizes(a.shape[0], b.shape[0], "batch")
        return torch.maximum(a, b) if largest else torch.minimum(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        x, y = (a, b) if isinstance(a, Tensor) else (b, a)
        return x.clamp(min=y) if largest else x.clamp(max=y)  # type: ignore[union-attr]
    if type(a) is int and type(b) is int:
        return max(a, b) if largest else min(a, b)
    return torch.sym_max(a, b) if largest else torch.sym_min(a, b)

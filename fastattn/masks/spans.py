"""Row spans: what every mask becomes before a backend sees it.

Query row i sees the keys  union_r [start_r(i), stop_r(i))  for which every predicate holds. A bound is affine
(`row * i + const`) or, where that cannot say it, an int32 tensor with one value per row. Spans are half-open and speak of
storage indices; predicates other than Dense see coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .predicates import DensePredicate, Predicate, coordinate_grids

MAX_SPANS = 4


class Bound(NamedTuple):
    """An affine end of a span: `row * i + const` for query row i. Unclamped: a reader clamps to [0, n_k]."""

    row: int  # 0 or 1
    const: int | Tensor  # an int, or int32 (B|1,)

    def at(self, q_idx: Tensor) -> Tensor:
        """The values at int32 row indices q_idx (n_q,), unclamped. # (B|1, n_q)"""
        const = self.const
        if isinstance(const, Tensor):
            const = const.to(q_idx.device, torch.int32, non_blocking=not const.is_cuda)[:, None]
        return q_idx[None] * self.row + const


Span = tuple[Bound, Bound]
START = Bound(0, 0)


@dataclass(frozen=True, eq=False)
class LoweredMask:
    """A mask for given lengths. Immutable: the layers of a model may share one.

    Exactly one of `spans` and `rows` is set.

    Args:
        n_q, n_k: lengths (SymInt under torch.compile).
        spans: one (start, stop) pair of Bounds per span, or None.
        rows: int32 (start, stop), each (B|1, H|1, R, n_q), disjoint and sorted with 0 <= start <= stop <= n_k, or None.
        predicates: further conditions, all of which must hold.
    """

    n_q: int
    n_k: int
    spans: tuple[Span, ...] | None
    rows: tuple[Tensor, Tensor] | None = None
    predicates: tuple[Predicate, ...] = ()

    @property
    def n_spans(self) -> int:
        """R, the number of spans per row."""
        if self.spans is not None:
            return len(self.spans)
        assert self.rows is not None
        return self.rows[0].shape[2]

    @property
    def is_full(self) -> bool:
        """Whether it is known without reading a tensor that every row sees every key."""
        if self.predicates or self.spans is None or len(self.spans) != 1:
            return False
        return covers_all(self.spans[0], self.n_k)

    @property
    def is_causal(self) -> bool:
        """Whether it is known without reading a tensor that row i sees the keys up to i and no others."""
        if self.predicates or self.spans is None or len(self.spans) != 1:
            return False
        (begin, before), (end, after) = self.spans[0]
        return (begin, end) == (0, 1) and isinstance(before, int) and isinstance(after, int) and before <= 0 and after == 1

    def tensors(self) -> list[Tensor]:
        """Every tensor inside."""
        found = list(self.rows or ())
        found += [bound.const for span in self.spans or () for bound in span if isinstance(bound.const, Tensor)]
        return found + [p.tensor for p in self.predicates if isinstance(p, DensePredicate)]

    def to(self, device: Any) -> LoweredMask:
        """The same mask with its tensors on `device`."""

        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        spans, rows = self.spans, self.rows
        if spans is not None:
            spans = tuple((Bound(a.row, move(a.const)), Bound(b.row, move(b.const))) for a, b in spans)
        if rows is not None:
            rows = (move(rows[0]), move(rows[1]))
        predicates = tuple(
            DensePredicate(move(p.tensor)) if isinstance(p, DensePredicate) else p for p in self.predicates
        )
        return LoweredMask(self.n_q, self.n_k, spans, rows, predicates)

    def rows_tensors(self, device: Any = None) -> tuple[Tensor, Tensor]:
        """The spans as clamped int32 tensors, whichever way they are encoded.

        Returns:
            (start, stop), each (B|1, H|1, R, n_q), with 0 <= start <= stop <= n_k.
        """
        device = self._device() if device is None else device
        if self.rows is not None:
            return self.rows[0].to(device), self.rows[1].to(device)
        assert self.spans is not None
        q_idx = torch.arange(self.n_q, dtype=torch.int32, device=device)
        values = torch.broadcast_tensors(*(bound.at(q_idx) for span in self.spans for bound in span))
        start, stop = torch.stack(values[0::2], 1), torch.stack(values[1::2], 1)  # (B|1, R, n_q)
        return clamp_rows(start[:, None], stop[:, None], self.n_k)

    def to_dense(self, coords: Any = None, n_b: int = 1, n_h: int = 1, device: Any = None) -> Tensor:
        """The mask as a bool tensor, True where visible: the definition that every backend is held to.

        Args:
            coords: Coordinates that Custom predicates see; None means the storage indices.
            n_b, n_h: how many batch entries and query heads Custom predicates see.
            device: of the result; by default that of the tensors inside, else the CPU.

        Returns:
            bool (B|1, H|1, n_q, n_k)
        """
        device = self._device() if device is None else device
        q_idx = torch.arange(self.n_q, device=device)[:, None]  # (n_q, 1)
        k_idx = torch.arange(self.n_k, device=device)  # (n_k,)
        seen = torch.zeros(1, 1, self.n_q, self.n_k, dtype=torch.bool, device=device)
        if self.rows is not None:
            start, stop = self.rows[0].to(device)[..., None], self.rows[1].to(device)[..., None]
            seen = ((k_idx >= start) & (k_idx < stop)).any(2)
        for a, b in self.spans or ():
            low, high = (_column(bound.const, device) + bound.row * q_idx for bound in (a, b))
            seen = seen | ((k_idx >= low) & (k_idx < high))
        for predicate in self.predicates:
            if isinstance(predicate, DensePredicate):
                seen = seen & predicate.tensor.to(device)
            else:
                seen = seen & predicate.visible(*coordinate_grids(coords, n_b, n_h, self.n_q, self.n_k, device))
        return seen

    def _device(self) -> torch.device:
        found = self.tensors()
        return found[0].device if found else torch.device("cpu")


def _column(const: int | Tensor, device: Any) -> int | Tensor:
    return const.to(device)[:, None, None, None] if isinstance(const, Tensor) else const  # (B|1, 1, 1, 1)


def covers_all(span: Span, n_k: int) -> bool:
    """Whether a span is statically [0, n_k) for every row."""
    start, stop = span
    if start.row or stop.row or isinstance(start.const, Tensor) or isinstance(stop.const, Tensor):
        return False
    return start.const <= 0 and bool(stop.const == n_k)


def clamp_rows(start: Tensor, stop: Tensor, n_k: int) -> tuple[Tensor, Tensor]:
    """int32 row tensors with 0 <= start <= stop <= n_k and one common shape."""
    start, stop = torch.broadcast_tensors(start, stop)
    start = start.clamp(0, n_k)
    stop = torch.maximum(stop.clamp(0, n_k), start)
    return start.to(torch.int32).contiguous(), stop.to(torch.int32).contiguous()

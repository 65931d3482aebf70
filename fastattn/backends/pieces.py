"""Batch invariance: a call cut into pieces that know nothing of each other, each run as a call of its own.

A piece is a batch entry's rows and keys between two cuts. There is a cut wherever the rows in front of it see no key from
which on the rows behind it see any: between documents, and where padding ends. A piece is copied, and its mask counts from
its own first row and key; so what is run does not depend on where the piece stood, nor on what stands beside it.

Padding behind a document may see its keys and so be in its piece. Therefore pieces are filled up to whole tiles of rows,
tiles begin at the piece's first row and key and come in the order of the keys, whatever they hide (`Problem.invariant`
says so to the backends): then a row's sums are the same whatever the rows in its tile see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..coords import Coordinates
from ..masks import DensePredicate, LoweredMask
from ..problem import LOW, Grads, Problem, empty_like_layout, empty_rows
from . import blocked
from .regions import ROWS, any_row, fixed
from .tile import select, size_of


class Piece(NamedTuple):
    """Rows and keys of a batch entry, and the spans of these rows in these keys, int32 (1, H|1, R, rows)."""

    entry: int
    rows: slice
    keys: slice
    start: Tensor
    stop: Tensor

    def q(self, x: Tensor) -> Tensor:
        """x (B, H, Lq, ...) of the piece's rows, a view."""
        return x[self.entry : self.entry + 1, :, self.rows]

    def k(self, x: Tensor) -> Tensor:
        """x (B, H, Lk, ...) of the piece's keys, a view."""
        return x[self.entry : self.entry + 1, :, self.keys]

    def lead(self, x: Tensor) -> Tensor:
        """x (B|1, ...) of the piece's entry, a view."""
        return x if x.shape[0] == 1 else x[self.entry : self.entry + 1]


def cut(p: Problem) -> Iterator[Piece]:
    """The pieces of a call, in order; rows that see nothing may be in none."""
    if p.n_b * p.n_h * p.n_q * p.n_k == 0:
        return
    starts, stops = p.mask.rows_tensors(p.q.device)
    for entry in range(p.n_b):
        start, stop = (x[min(entry, x.shape[0] - 1)].cpu() for x in (starts, stops))  # (H|1, R, n_q)
        some = stop > start
        low = torch.where(some, start, p.n_k).amin((0, 1))
        high = torch.where(some, stop, 0).amax((0, 1))
        seeing = (high > low).nonzero().squeeze(1)  # rows that see anything
        if len(seeing) == 0:
            continue
        before = high[seeing].cummax(0).values[:-1]
        behind = low[seeing].flip(0).cummin(0).values.flip(0)[1:]
        cuts = (before <= behind).nonzero().squeeze(1) + 1
        for rows in seeing.tensor_split(cuts):
            first, last = int(rows[0]), int(rows[-1]) + 1
            keys = slice(int(low[first:last].min()), int(high[first:last].max()))
            own = _spans(start[None, ..., first:last], stop[None, ..., first:last], keys)
            yield Piece(entry, slice(first, last), keys, *(x.to(p.q.device) for x in own))


def _spans(start: Tensor, stop: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
    """Spans counted from the first key, in the order of their keys, without those that no row has: those of the piece alone."""
    empty = stop <= start
    start, stop = (torch.where(empty, 0, x - keys.start) for x in (start, stop))
    order = torch.where(empty, torch.iinfo(torch.int32).max, start).sort(dim=2, stable=True).indices
    n = int((~empty).sum(2).max())
    return tuple(x.gather(2, order)[:, :, :n].contiguous() for x in (start, stop))  # type: ignore[return-value]


def alone(p: Problem, piece: Piece) -> Problem:
    """A piece as a call of its own, over copies. The parameters are wide, so that their gradients can be summed."""
    n_q, n_k = _whole(piece.rows), _whole(piece.keys)
    dense = [_part(x.tensor, piece, n_q, n_k) for x in p.mask.predicates if isinstance(x, DensePredicate)]
    custom = [x for x in p.mask.predicates if not isinstance(x, DensePredicate)]
    more = n_q - size_of(piece.rows)
    spans = F.pad(piece.start, (0, more)), F.pad(piece.stop, (0, more))
    params = [tuple(_copy(piece.lead(x)).to(p.acc_dtype) for x in score.params) for score in p.scores]
    own = dataclasses.replace(
        p,
        q=_filled(piece.q(p.q), n_q), k=_filled(piece.k(p.k), n_k), v=_filled(piece.k(p.v), n_k),
        mask=LoweredMask(n_q, n_k, None, spans, (*map(DensePredicate, dense), *custom)),
        scores=tuple(score.with_params(own) for score, own in zip(p.scores, params, strict=True)),
        sinks=None if p.sinks is None else _copy(piece.lead(p.sinks)),
        rng=None if p.rng is None else p.rng[piece.entry // p.n_b_coords][None],
        coords=_coords(p, piece, n_q, n_k),
    )  # fmt: skip
    seen = torch.zeros(n_k, dtype=torch.bool, device=p.q.device)
    for chunk in fixed(own):
        assert isinstance(chunk.hiding, Tensor)
        seen[chunk.keys] |= any_row(chunk.hiding)
    for x in (own.k, own.v):
        x.masked_fill_(~seen[:, None], 0.0)  # what no row sees may hold anything
    return own


def _whole(part: slice) -> int:
    """How many rows or keys a part has in whole tiles."""
    return -(-size_of(part) // ROWS) * ROWS


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _filled(x: Tensor, n: int) -> Tensor:
    """A copy of x (1, H, L, D) with zeros up to n rows."""
    return F.pad(x, (0, 0, 0, n - x.shape[2])) if n > x.shape[2] else _copy(x)


def _part(x: Tensor, piece: Piece, n_q: int, n_k: int) -> Tensor:
    """A copy of a dense mask's part, False beyond the piece; dimensions of size 1 stay."""
    x = select(select(piece.lead(x), 2, piece.rows), 3, piece.keys)
    n = [size if len(part) > 1 else 1 for size, part in ((n_q, range(x.shape[2])), (n_k, range(x.shape[3])))]
    return F.pad(x, (0, n[1] - x.shape[3], 0, n[0] - x.shape[2])).contiguous()


def _coords(p: Problem, piece: Piece, n_q: int, n_k: int) -> Coordinates:
    """A piece's coordinates; those beyond its end are its last ones, which every table has."""
    b, h, q, k = p.coords.parts
    if isinstance(b, Tensor):
        own = select(piece.lead(b), 1, piece.rows)
        b = int(own[0, 0]) if bool((own == own[0, 0]).all()) else _held(own, n_q)
    else:
        b += piece.entry % p.n_b_coords
    h = piece.lead(h) if isinstance(h, Tensor) else h
    return Coordinates(b, h, _held(_along(q, piece, piece.rows, p), n_q), _held(_along(k, piece, piece.keys, p), n_k))


def _along(x: int | Tensor, piece: Piece, part: slice, p: Problem) -> Tensor:
    """The coordinates of a piece's rows or keys. # (1, L)"""
    if isinstance(x, Tensor):
        return piece.lead(x)[:, part].int()
    return torch.arange(x + part.start, x + part.stop, dtype=torch.int32, device=p.q.device)[None]


def _held(x: Tensor, n: int) -> Tensor:
    return torch.cat([x, x[:, -1:].expand(1, n - x.shape[1])], 1)


class ByPieces:
    """The verbs of a backend, forward and backward piece by piece; tangents as ever, without a promise for their bits."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.backend, name)
        return lambda p, *rest: verb(dataclasses.replace(p, invariant=False), *rest)

    def forward(self, p: Problem, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, out_lo): see `fastattn.backends`."""
        shape = (p.n_b, p.n_h, p.n_q, p.v_dim)
        out = empty_like_layout(p.q, shape).zero_()
        out_lo = empty_like_layout(p.q, shape).zero_() if train and p.q.dtype in LOW else p.q.new_empty(0)
        lse = torch.full(shape[:3], -torch.inf, dtype=p.acc_dtype, device=p.q.device)
        if p.sinks is not None:
            lse.copy_(p.sinks[:, :, None])
        for piece in cut(p):
            high, row_lse, low = self.backend.forward(alone(p, piece), train)
            for whole, part in ((out, high), (lse, row_lse), (out_lo, low)):
                if part.numel():
                    piece.q(whole).copy_(part[:, :, : size_of(piece.rows)])
        return out, lse, out_lo

    def backward(
        self, p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor
    ) -> Grads:  # fmt: skip
        """Gradients of q, k, v, the chain's parameters and the sinks; no key is in two pieces of its entry."""
        dq, dk, dv = (empty_rows(x, tuple(x.shape)).zero_() for x in (p.q, p.k, p.v))
        params = [torch.zeros(x.shape, dtype=p.acc_dtype, device=x.device) for x in p.params]
        for piece in cut(p):
            n_q = _whole(piece.rows)
            wide = [_filled(piece.q(x), n_q) if x is not None and x.numel() else x for x in (do, out, out_lo)]
            thin = [None if x is None else _filled(piece.q(x)[..., None], n_q)[..., 0] for x in (dlse, lse)]
            found = self.backend.backward(alone(p, piece), wide[0], thin[0], wide[1], thin[1], wide[2])
            piece.q(dq).copy_(found.q[:, :, : size_of(piece.rows)])
            piece.k(dk).copy_(found.k[:, :, : size_of(piece.keys)])
            piece.k(dv).copy_(found.v[:, :, : size_of(piece.keys)])
            for total, part in zip(params, found.params):  # none where they are not wanted
                piece.lead(total).add_(part)
        dparams = [x.to(like.dtype) for x, like in zip(params, p.params, strict=True)] if p.param_grads else []
        dsinks = None
        if p.sinks is not None:
            norm = blocked.row_norm(dataclasses.replace(p, invariant=False), lse)
            dsinks = blocked.sink_gradient(p, norm, blocked.row_delta(p, do, dlse, out, out_lo, lse))
        return Grads(dq, dk, dv, dparams, dsinks)

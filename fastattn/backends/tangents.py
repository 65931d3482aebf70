"""Derivatives of the second order in tiles of torch operations: the tangents of the forward, of the backward, and of the
forward's tangents (docs/derivatives.md has the formulas). Each is one walk over the tiles from the known out and lse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Grads, Problem, Tangents, ThreeTangents, empty_like_layout
from ..scores import Additive, Pointwise, Score
from .blocked import (
    apply_chain,
    chunks,
    dropout_factor,
    hide,
    key_totals,
    rounded,
    row_delta,
    row_norm,
    tiles,
    times,
    widened,
)
from .operands import (
    RowNorm,
    add_keys,
    dot_columns,
    dot_keys,
    dot_rows,
    exact_out,
    k_part,
    q_part,
    row_dot,
    sink_weight,
    sum_rows_like,
)
from .regions import Region
from .tile import Tile


def require_second_order(p: Problem) -> None:
    """Raise where a score of the chain has no second derivative."""
    for score in p.scores:
        if score.order < 2:
            raise NotImplementedError(
                f"score {score!r} has first derivatives only, but a second derivative or a forward-mode derivative was "
                "asked for; use a Pointwise or an Additive score for those"
            )


def chain_tangent(p: Problem, ds: Tensor | None, before: list[Tensor], tile: Tile, t: Tangents) -> list[Tensor | None]:
    """The tangent in front of each modifier and, last, behind the chain; None stands for zero."""
    tangents, start = [ds], 0
    for score, s in zip(p.scores, before, strict=True):
        n = len(score.params)
        own = t.params[start : start + n]
        start += n
        if isinstance(score, Pointwise):
            ds = None if ds is None else ds * score.derivs(s)[1]
        else:
            ds = _plus_term(ds, score, own, s, tile)
        tangents.append(ds)
    return tangents


def _plus_term(ds: Tensor | None, score: Score, own: Sequence[Tensor | None], s: Tensor, tile: Tile) -> Tensor | None:
    """ds and the term of an Additive at the tangents `own` of its parameters."""
    if all(x is None for x in own):
        return ds
    assert isinstance(score, Additive)
    filled = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(score.params, own, strict=True)]
    term = score.with_params(tuple(filled)).term(tile)
    return term.expand_as(s) if ds is None else ds + term


def chain_mixed(p: Problem, steps: _Three, before: list[Tensor], tile: Tile, t: ThreeTangents) -> _Three:
    """Behind the chain: the tangents along two directions and the second derivative along both, from those in front."""
    one, two, both = steps
    start = 0
    for score, s in zip(p.scores, before, strict=True):
        own = slice(start, start + len(score.params))
        start = own.stop
        if isinstance(score, Pointwise):
            _, first, second = score.derivs(s)
            both = None if both is None else both * first
            if one is not None and two is not None:
                both = _sum(both, one * two * second)
            one, two = (None if x is None else x * first for x in (one, two))
        else:
            one, two, both = (
                _plus_term(x, score, tx.params[own], s, tile) for x, tx in zip((one, two, both), t, strict=True)
            )
    return _Three(one, two, both)


def _sum(*terms: Tensor | None) -> Tensor | None:
    """The sum of those that are there."""
    total = None
    for x in terms:
        if x is not None:
            total = x if total is None else total + x
    return total


def chain_backward_tangent(
    p: Problem, g: Tensor, dg: Tensor, before: list[Tensor], tangents: list[Tensor | None], tile: Tile,
    dparams: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """`chain_backward` and its tangent: (g, dg) in front of the chain; adds the tangents of the parameters' gradients."""
    end = len(p.params)
    for score, s, ds in zip(reversed(p.scores), reversed(before), reversed(tangents[:-1]), strict=True):
        start = end - len(score.params)
        if isinstance(score, Pointwise):
            _, first, second = score.derivs(s)
            dg = dg * first
            if ds is not None:
                dg = dg + g * second * ds
            g = g * first
        elif start < end and dparams is not None:
            assert isinstance(score, Additive)
            score.accumulate(dparams[start:end], dg, tile)
        end = start
    return g, dg


class _Three(NamedTuple):
    """Along a first direction, along a second, and along both; None stands for zero."""

    one: Tensor | None
    two: Tensor | None
    both: Tensor | None


def forward_jvp(p: Problem, t: Tangents, out: Tensor, lse: Tensor, out_lo: Tensor) -> tuple[Tensor, Tensor]:
    """Tangents of (out, lse): one pass, from the known out and lse."""
    require_second_order(p)
    w, wt = widened(p), _wide_tangents(p, t)
    o = exact_out(out, out_lo, p.acc_dtype)
    tout = empty_like_layout(p.q, tuple(out.shape), p.acc_dtype).zero_()
    tlse = torch.zeros_like(lse)
    norm = row_norm(p, lse)
    if p.sinks is not None and t.sinks is not None:
        tlse += sink_weight(p, *norm) * t.sinks.to(lse.dtype)[:, :, None]
    for chunk in chunks(p):
        kv = _Keys(k_part(p, w.k, chunk), k_part(p, w.v, chunk), *_maybe_keys(p, chunk, wt.k, wt.v))
        tq = None if wt.q is None else q_part(wt.q, chunk)
        acc, mu = _jvp_rows(p, chunk, q_part(w.q, chunk), tq, norm.part(chunk), kv, t)
        q_part(tlse, chunk).add_(mu)
        q_part(tout, chunk).copy_(acc)
    tout -= tlse[..., None] * o
    return tout.to(out.dtype), tlse


def forward_jvp2(p: Problem, t: ThreeTangents, out, lse, out_lo, tlse_one, tlse_two) -> tuple[Tensor, Tensor]:
    """The second derivative of (out, lse) along t.one and t.two, plus the first along t.both; tlse_* are lse's tangents.

        A12  = d2 of the chain     U_x = A_x - L_x
        L12  = sum P (U2 A1 + A12) + pi ((sigma2 - L2) sigma1 + sigma12)
        O12  = sum Z P ((U1 U2 + A12) v + U1 v2 + U2 v1 + v12) - L12 O
    """
    require_second_order(p)
    w, wide = widened(p), ThreeTangents(*(_wide_tangents(p, x) for x in t))
    tout = empty_like_layout(p.q, tuple(out.shape), p.acc_dtype).zero_()
    tlse = torch.zeros_like(lse)
    one, two = (torch.zeros_like(lse) if x is None else x for x in (tlse_one, tlse_two))
    norm = row_norm(p, lse)
    if p.sinks is not None:
        d_one, d_two, d_both = (None if x.sinks is None else x.sinks.to(lse.dtype)[:, :, None] for x in t)
        change = _sum(d_both, None if d_one is None else d_one * (-two if d_two is None else d_two - two))
        if change is not None:
            tlse += sink_weight(p, *norm) * change
    for chunk in chunks(p):
        kv = [_Keys(k_part(p, w.k, chunk), k_part(p, w.v, chunk), *_maybe_keys(p, chunk, x.k, x.v)) for x in wide]
        tq = _Three(*(None if x.q is None else q_part(x.q, chunk) * p.scale for x in wide))
        rows = (norm.part(chunk), q_part(one, chunk), q_part(two, chunk))
        acc, mu = _mixed_rows(p, chunk, q_part(w.q, chunk) * p.scale, tq, rows, kv, t)
        q_part(tlse, chunk).add_(mu)
        q_part(tout, chunk).copy_(acc)
    tout -= tlse[..., None] * exact_out(out, out_lo, p.acc_dtype)
    return tout.to(out.dtype), tlse


def _mixed_rows(p: Problem, chunk: Region, q, tq: _Three, rows, kv, t: ThreeTangents) -> tuple[Tensor, Tensor]:
    """sum Z P ((U1 U2 + A12) v + U1 v2 + U2 v1 + v12) and sum P (U2 A1 + A12) over the keys of a chunk of rows."""
    norm, tlse_one, tlse_two = rows
    acc = q.new_zeros(*q.shape[:3], p.v_dim)
    mu = torch.zeros_like(tlse_one)
    done = 0
    for part in tiles(p, chunk):
        n = part.region.n_keys
        (k, v, k1, v1), (_, _, k2, v2), (_, _, k12, v12) = (x.narrow(done, n) for x in kv)
        done += n
        s, before = apply_chain(p, dot_keys(q, k), part.tile)
        mixed = _sum(_score_tangent(q, tq.both, k, k12), _cross(tq.one, k2), _cross(tq.two, k1))
        front = _Three(_score_tangent(q, tq.one, k, k1), _score_tangent(q, tq.two, k, k2), mixed)
        a1, a2, a12 = chain_mixed(p, front, before, part.tile, t)
        weights = norm.weights(hide(s, part.hidden))
        z = dropout_factor(p, part.tile)
        u1, u2 = (-x[..., None] if a is None else a - x[..., None] for a, x in ((a1, tlse_one), (a2, tlse_two)))
        curvature = u1 * u2 if a12 is None else u1 * u2 + a12
        change = _sum(None if a1 is None else u2 * a1, a12)
        if change is not None:
            mu += (weights * change).sum(-1)
        acc += dot_rows(times(weights * curvature, z), v)
        for factor, x in ((u1, v2), (u2, v1), (None, v12)):
            if x is not None:
                acc += dot_rows(times(weights if factor is None else weights * factor, z), x)
    return acc, mu


def _cross(tq: Tensor | None, tk: Tensor | None) -> Tensor | None:
    return None if tq is None or tk is None else dot_keys(tq, tk)


def _wide_tangents(p: Problem, t: Tangents) -> Tangents:
    q, k, v = (None if x is None else x.to(p.acc_dtype) for x in (t.q, t.k, t.v))
    return t._replace(q=q, k=k, v=v)


def _score_tangent(q, tq, k, tk) -> Tensor | None:
    """scale (Q. K' + Q K.') with the scale already in q and tq."""
    ds = None if tq is None else dot_keys(tq, k)
    if tk is not None:
        ds = dot_keys(q, tk) if ds is None else ds + dot_keys(q, tk)
    return ds


class _Keys(NamedTuple):
    """Keys and values of a chunk, and their tangents."""

    k: Tensor
    v: Tensor
    tk: Tensor | None
    tv: Tensor | None

    def narrow(self, start: int, n: int) -> _Keys:
        tk, tv = (None if x is None else x.narrow(2, start, n) for x in (self.tk, self.tv))
        return _Keys(self.k.narrow(2, start, n), self.v.narrow(2, start, n), tk, tv)


def _maybe_keys(p: Problem, chunk: Region, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else k_part(p, x, chunk) for x in tensors]


def _jvp_rows(p: Problem, chunk: Region, q, tq, norm: RowNorm, kv: _Keys, t: Tangents) -> tuple[Tensor, Tensor]:
    """sum (Z P A.) V + (Z P) V. and sum P A. over the keys of a chunk of rows."""
    q = q * p.scale
    tq = None if tq is None else tq * p.scale
    acc = q.new_zeros(*q.shape[:3], p.v_dim)
    mu = torch.zeros_like(norm.lse)
    done = 0
    for part in tiles(p, chunk):
        n = part.region.n_keys
        k, v, tk, tv = kv.narrow(done, n)
        done += n
        s, before = apply_chain(p, dot_keys(q, k), part.tile)
        ds = chain_tangent(p, _score_tangent(q, tq, k, tk), before, part.tile, t)[-1]
        weights = norm.weights(hide(s, part.hidden))
        z = dropout_factor(p, part.tile)
        if ds is not None:
            change = weights * ds
            mu += change.sum(-1)
            acc += dot_rows(times(change, z), v)
        if tv is not None:
            acc += dot_rows(times(weights, z), tv)
    return acc, mu


class _TangentRows(NamedTuple):
    """Row-wise tensors of a chunk of rows of the backward's tangent."""

    q: Tensor
    tq: Tensor | None
    do: Tensor | None
    tdo: Tensor | None
    norm: RowNorm
    tlse: Tensor
    delta: Tensor
    tdelta: Tensor


def backward_jvp(p: Problem, t: Tangents, do, dlse, tdo, tdlse, out, lse, out_lo, tout, tlse) -> Grads:
    """Tangents of `backward`'s results along t and the tangents of its cotangents; tout, tlse are those of (out, lse)."""
    require_second_order(p)
    acc = p.acc_dtype
    w, wt = widened(p), _wide_tangents(p, t)
    do, tdo = (None if x is None else x.to(acc) for x in (do, tdo))
    delta = row_delta(p, do, dlse, out, out_lo, lse)
    tdelta = row_dot(do, None if tout is None else tout.to(acc), lse)
    tdelta = tdelta + row_dot(tdo, exact_out(out, out_lo, acc), lse)
    if tdlse is not None:
        tdelta = tdelta - tdlse
    tlse = torch.zeros_like(lse) if tlse is None else tlse
    dq, dk, dv, dparams = key_totals(p)
    wanted = dparams if p.param_grads else None
    norm = row_norm(p, lse)
    for chunk in chunks(p):
        kv = _Keys(k_part(p, w.k, chunk), k_part(p, w.v, chunk), *_maybe_keys(p, chunk, wt.k, wt.v))
        tq_part, do_part, tdo_part = (None if x is None else q_part(x, chunk) for x in (wt.q, do, tdo))
        row_stats = (q_part(x, chunk) for x in (tlse, delta, tdelta))
        stats = _TangentRows(q_part(w.q, chunk), tq_part, do_part, tdo_part, norm.part(chunk), *row_stats)
        q_part(dq, chunk).copy_(_backward_jvp_rows(p, chunk, stats, kv, dk, dv, wanted, t))
    dsinks = None
    if p.sinks is not None:
        direction = -tlse if t.sinks is None else t.sinks.to(lse.dtype)[:, :, None] - tlse
        dsinks = sum_rows_like(-sink_weight(p, *norm) * (direction * delta + tdelta), p.sinks)
    return rounded(p, dq, dk, dv, dparams, dsinks)


def _backward_jvp_rows(p: Problem, chunk: Region, r: _TangentRows, kv: _Keys, dk, dv, dparams, t: Tangents) -> Tensor:
    """The tangent of dq of a chunk of rows; adds the tangents of its shares of dk, dv and the parameters' gradients."""
    q = r.q * p.scale
    tq = None if r.tq is None else r.tq * p.scale
    dq = torch.zeros_like(q)
    done, n_kv = 0, kv.k.shape[1]
    for part in tiles(p, chunk):
        n = part.region.n_keys
        k, v, tk, tv = kv.narrow(done, n)
        done += n
        s, before = apply_chain(p, dot_keys(q, k), part.tile)
        tangents = chain_tangent(p, _score_tangent(q, tq, k, tk), before, part.tile, t)
        weights = r.norm.weights(hide(s, part.hidden))
        z = dropout_factor(p, part.tile)
        u = -r.tlse[..., None] if tangents[-1] is None else tangents[-1] - r.tlse[..., None]  # dP = P u
        centred = -r.delta[..., None] if r.do is None else times(dot_keys(r.do, v), z) - r.delta[..., None]
        change = torch.zeros_like(s)
        if r.do is not None and tv is not None:
            change += dot_keys(r.do, tv)
        if r.tdo is not None:
            change += dot_keys(r.tdo, v)
        g = weights * centred
        dg = weights * (u * centred + times(change, z) - r.tdelta[..., None])
        if r.do is not None:
            add_keys(p, dv, part.region, dot_columns(times(weights * u, z), r.do, n_kv))
        if r.tdo is not None:
            add_keys(p, dv, part.region, dot_columns(times(weights, z), r.tdo, n_kv))
        g, dg = chain_backward_tangent(p, g, dg, before, tangents, part.tile, dparams)
        dq += dot_rows(dg, k)
        add_keys(p, dk, part.region, dot_columns(dg, q, n_kv))
        if tk is not None:
            dq += dot_rows(g, tk)
        if tq is not None:
            add_keys(p, dk, part.region, dot_columns(g, tq, n_kv))
    return dq.mul_(p.scale)

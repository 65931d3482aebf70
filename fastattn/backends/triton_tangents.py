"""The Triton backend's tangents: forward mode and the second order, by the kernels of kernels/tangents.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import tangents as kernels
from ..kernels import tangents2
from ..problem import Grads, Problem, Tangents, ThreeTangents, empty_like_layout, empty_rows
from ..scores import Pointwise
from . import tangents, triton_call, triton_params
from .facts import facts
from .operands import safe_lse, sink_weight, sum_rows_like
from .triton_call import Call, column_grid, config, on_device, reachable, row_grid, strides_of
from .triton_params import params_by_torch
from .triton_rows import statistics
from .triton_tiles import column_pass, prepare, row_pass

TANGENTS = ("jvp", "jvp dq", "jvp dkdv")
TWICE = ("jvp2",)


class Moved(NamedTuple):
    """Tangents as kernel arguments; what has none is zero and takes no memory."""

    operands: tuple[Tensor, Tensor, Tensor]  # of q, k, v
    strides: tuple[tuple[int, ...], ...]
    scores: tuple[Any, ...]  # arguments of every modifier at its parameters' tangents
    pushed: tuple[bool, ...]  # whether it has any


def moved(p: Problem, t: Tangents) -> Moved:
    """The directions t of p's inputs."""
    operands = [_or_zero(x, like) for x, like in zip((t.q, t.k, t.v), (p.q, p.k, p.v), strict=True)]
    args: list[Any] = []
    pushed, start = [], 0
    for score in p.scores:
        own = t.params[start : start + len(score.params)]
        start += len(score.params)
        pushed.append(any(x is not None for x in own))
        filled = tuple(torch.zeros_like(x) if dx is None else dx for x, dx in zip(score.params, own, strict=True))
        args.append(score.with_params(filled).device_args() if pushed[-1] else ())
    return Moved((operands[0], operands[1], operands[2]), tuple(x.stride() for x in operands), tuple(args), tuple(pushed))


def _or_zero(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape) if x is None else reachable(x)


def forward_jvp(p: Problem, t: Tangents, out: Tensor, lse: Tensor, out_lo: Tensor) -> tuple[Tensor, Tensor]:
    """Tangents of (out, lse): one pass over rows."""
    tangents.require_second_order(p)
    if triton_call.misfit(*facts(p)[:4], TANGENTS):
        return tangents.forward_jvp(p, t, out, lse, out_lo)
    call, way, how = prepare(p), moved(p, t), config(p, "jvp")
    tout, tlse = empty_like_layout(p.q, tuple(out.shape)), torch.empty_like(lse)
    low = out_lo if out_lo.numel() else None
    out = reachable(out)
    strides = (
        *call.strides, *way.strides, out.stride(), strides_of(low, 4), tout.stride(), strides_of(p.sinks, 2),
        strides_of(t.sinks, 2),
    )  # fmt: skip
    with on_device(p.q):
        triton_call.run(
            kernels.forward_jvp, row_grid(p, how, p.v_dim), how, *call.operands, *way.operands, out, low, lse,
            p.sinks, t.sinks, tout, tlse, row_pass(p, call, how), way.scores, strides, p.scale, *call.ints, p.n_h,
            max(p.n_b_coords, 1), call.flags, call.predicates, call.chain, way.pushed, p.n_h // max(p.n_kv, 1), call.spans,
            how.dims(call.dims), (how.block_q, how.block_k), call.precision,
        )  # fmt: skip
    return tout, tlse


class _Rows(NamedTuple):
    """Row-wise tensors of the backward's tangent; the statistics are (B, H, n_pad)."""

    do: Tensor
    tdo: Tensor | None
    lse2: Tensor
    tlse: Tensor
    delta: Tensor
    tdelta: Tensor

    @property
    def n_pad(self) -> int:
        return self.delta.shape[2]


def backward_jvp(p: Problem, t: Tangents, do, dlse, tdo, tdlse, out, lse, out_lo, tout, tlse) -> Grads:
    """Tangents of `backward`'s results along t and the tangents of its cotangents; tout, tlse are those of (out, lse)."""
    tangents.require_second_order(p)
    if triton_call.misfit(*facts(p)[:4], TANGENTS):
        return tangents.backward_jvp(p, t, do, dlse, tdo, tdlse, out, lse, out_lo, tout, tlse)
    tlse = torch.zeros_like(lse) if tlse is None else tlse
    tout = torch.zeros_like(out) if tout is None else tout
    primal = statistics(p, do, dlse, out, lse, out_lo)
    tdelta = statistics(p, do, tdlse, tout, lse, p.q.new_empty(0)).delta
    if tdo is not None:
        tdelta = tdelta + statistics(p, tdo, None, out, lse, out_lo).delta
    padded_tlse = F.pad(tlse, (0, tdelta.shape[2] - p.n_q)).contiguous()
    rows = _Rows(primal.do, None if tdo is None else reachable(tdo), primal.lse2, padded_tlse, primal.delta, tdelta)
    dq, dk, dv = (empty_rows(x, tuple(x.shape)) for x in (p.q, p.k, p.v))
    call, way = prepare(p), moved(p, t)
    with on_device(p.q):
        _launch_rows(p, call, way, rows, _row_sums(p, t, rows, dlse, tdlse, lse, tlse), dq)
        _launch_columns(p, call, way, rows, dk, dv)
    if not p.param_grads or not p.params:
        dparams = []
    elif params_by_torch(p) is None:
        strides = (*way.strides, strides_of(rows.tdo, 4))
        along = triton_params.Moved((*way.operands, rows.tdo), strides, rows.tlse, rows.tdelta, way.scores)
        dparams = triton_params.param_grads(p, call, rows.do, rows.lse2, rows.delta, along, way.pushed)
    else:
        dparams = tangents.backward_jvp(p, t, do, dlse, tdo, tdlse, out, lse, out_lo, tout, tlse).params
    dsinks = None
    if p.sinks is not None:
        direction = -tlse if t.sinks is None else t.sinks.to(lse.dtype)[:, :, None] - tlse
        delta, tdelta = (x[:, :, : p.n_q] for x in (rows.delta, rows.tdelta))
        dsinks = sum_rows_like(-sink_weight(p, safe_lse(lse)) * (direction * delta + tdelta), p.sinks)
    return Grads(dq, dk, dv, dparams, dsinks)


def _row_sums(p: Problem, t: Tangents, rows: _Rows, dlse, tdlse, lse, tlse) -> tuple[Any, Any]:
    """The sums of P (dP - delta) over every row, delta pi + dlse, and their tangents, (B, H, n_pad); None where all are 0."""
    seen, delta, tdelta = lse != -torch.inf, rows.delta[:, :, : p.n_q], rows.tdelta[:, :, : p.n_q]
    sums, tsums = (None if x is None else x.where(seen, 0.0) for x in (dlse, tdlse))
    if p.sinks is not None:
        pi = sink_weight(p, lse)
        moving = -tlse if t.sinks is None else t.sinks.to(lse.dtype)[:, :, None] - tlse
        sums = pi * delta if sums is None else sums + pi * delta
        change = pi * (tdelta + delta * moving)
        tsums = change if tsums is None else tsums + change
    pad = (0, rows.n_pad - p.n_q)
    sums, tsums = (None if x is None else F.pad(x, pad).contiguous() for x in (sums, tsums))
    return sums, tsums


def _launch_rows(p: Problem, call: Call, way: Moved, rows: _Rows, sums: tuple[Any, Any], dq: Tensor) -> None:
    how = config(p, "jvp dq")
    zero_sum = not any(isinstance(score, Pointwise) for score in p.scores)
    triton_call.run(
        kernels.backward_dq_jvp, row_grid(p, how, call.dims[0]), how, *call.operands, *way.operands, rows.do,
        rows.tdo, rows.lse2, rows.tlse, rows.delta, rows.tdelta, *(sums if zero_sum else (None, None)), dq,
        row_pass(p, call, how), way.scores,
        (*call.strides, *way.strides, rows.do.stride(), strides_of(rows.tdo, 4), dq.stride()), p.scale, *call.ints, p.n_h,
        max(p.n_b_coords, 1), rows.n_pad, call.flags, call.predicates, call.chain, way.pushed, p.n_h // max(p.n_kv, 1),
        call.spans, how.dims(call.dims), (how.block_q, how.block_k), call.precision, zero_sum,
    )  # fmt: skip


def _launch_columns(p: Problem, call: Call, way: Moved, rows: _Rows, dk: Tensor, dv: Tensor) -> None:
    how = config(p, "jvp dkdv")
    triton_call.run(
        kernels.backward_dkdv_jvp, column_grid(p, how), how,
        *call.operands, *way.operands, rows.do, rows.tdo, rows.lse2, rows.tlse, rows.delta, rows.tdelta, dk, dv,
        column_pass(p, call, how), way.scores,
        (*call.strides, *way.strides, rows.do.stride(), strides_of(rows.tdo, 4), dk.stride(), dv.stride()), p.scale,
        *call.ints, p.n_kv, max(p.n_b_coords, 1), rows.n_pad, call.flags, call.predicates, call.chain, way.pushed,
        p.n_h // max(p.n_kv, 1), call.spans, how.dims(call.dims), (how.block_q, how.block_k), call.precision,
    )  # fmt: skip


def forward_jvp2(p: Problem, t: ThreeTangents, out, lse, out_lo, tlse_one, tlse_two) -> tuple[Tensor, Tensor]:
    """The second derivative of (out, lse) along t.one and t.two, plus the first along t.both: one pass over rows."""
    tangents.require_second_order(p)
    if triton_call.misfit(*facts(p)[:4], TWICE):
        return tangents.forward_jvp2(p, t, out, lse, out_lo, tlse_one, tlse_two)
    call, ways, how = prepare(p), [moved(p, x) for x in t], config(p, "jvp2")
    tout, tlse = empty_like_layout(p.q, tuple(out.shape)), torch.empty_like(lse)
    one, two = (torch.zeros_like(lse) if x is None else x.contiguous() for x in (tlse_one, tlse_two))
    low = out_lo if out_lo.numel() else None
    out = reachable(out)
    operands = [(x, *(way.operands[i] for way in ways)) for i, x in enumerate(call.operands)]
    flat = tuple(x for four in operands for x in four)
    strides = (*(x.stride() for x in flat), out.stride(), strides_of(low, 4), tout.stride())
    both = any(x is not None for x in (t.both.q, t.both.k, t.both.v))
    with on_device(p.q):
        triton_call.run(
            tangents2.forward_jvp2, row_grid(p, how, p.v_dim), how, flat, out, low, lse, one, two,
            _sink_share(p, t, lse, two), tout, tlse, row_pass(p, call, how), tuple(way.scores for way in ways), strides,
            p.scale, *call.ints, p.n_h, max(p.n_b_coords, 1), call.flags, call.predicates, call.chain,
            tuple(way.pushed for way in ways), p.n_h // max(p.n_kv, 1), call.spans, how.dims(call.dims),
            (how.block_q, how.block_k), call.precision, both,
        )  # fmt: skip
    return tout, tlse


def _sink_share(p: Problem, t: ThreeTangents, lse: Tensor, tlse_two: Tensor) -> Tensor | None:
    """pi ((sink2 - lse2) sink1 + sink12) of every row (B, H, L), or None where it is 0."""
    one, two, both = (None if x.sinks is None else x.sinks.to(lse.dtype)[:, :, None] for x in t)
    if p.sinks is None or (one is None and both is None):
        return None
    change = 0.0 if both is None else both
    if one is not None:
        change = change + one * (-tlse_two if two is None else two - tlse_two)
    return (sink_weight(p, safe_lse(lse)) * change).contiguous()

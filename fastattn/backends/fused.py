"""Regions through torch's own fused CPU kernel, where it computes the same thing.

It takes no dropout, no nonlinear score and no gradient into its mask; what it takes, it takes at twice the speed of tiles
of torch operations. Additive scores travel as its float mask, sinks are applied to its result (a sink only rescales a
row), and half precision runs in float32 wherever the low half of O is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import LOW, Grads, Problem, empty_like_layout, empty_rows, has_layout, rows_apart
from ..scores import Additive
from . import blocked
from .joint import added, emptied, joint
from .operands import add_keys, exact_out, k_part, q_part
from .regions import CAUSAL, Band, Region, regions
from .tile import Tile

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

BIAS = 1 << 22  # elements of an additive term that are made at once
VECTOR = 32  # keys below which the kernel takes a NaN row for a hidden one, unless it is given a mask
LONG = 1024  # keys from which large blocks beat a close fit
WIDE = 1 << 17  # elements of half precision that are widened at once, where one region is all
CALL = 1 << 17  # score elements below which a call is not worth cutting further


def refuses(p: Problem, *, backward: bool = False, dlse: bool = False) -> str | None:
    """Why torch's kernel does not compute this call, or None where it does."""
    if p.q.device.type != "cpu":
        return f"torch's fused CPU kernel does not run on {p.q.device.type}"
    if p.invariant:
        return "torch's fused CPU kernel chooses its tiles by the sizes"
    if p.dropout_p > 0.0:
        return "torch's fused CPU kernel has no dropout"
    for score in p.scores:
        if not isinstance(score, Additive):
            return f"torch's fused CPU kernel has no {score.name}"
        if backward and p.param_grads and score.params:
            return f"torch's fused CPU kernel gives no gradient to {score.name}"
    if dlse:
        return "torch's fused CPU kernel takes no gradient of lse"
    if p.scale <= 0.0:
        return f"torch's fused CPU kernel hides with -inf before it scales, here by {p.scale}"
    if p.q.shape[3] == 0 or p.v_dim == 0:
        return "torch's fused CPU kernel needs a head_dim of at least 1"
    return None


def _operand(x: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """x as the kernel wants it: one head_dim for all, the last dimension dense, rows that do not overlap."""
    x = x.to(dtype)
    if x.shape[3] < dim:
        return F.pad(x, (0, dim - x.shape[3])).contiguous()
    return x if x.stride(3) == 1 and rows_apart(x) else x.contiguous()


def _chunks(p: Problem) -> Iterator[Region]:
    """Every region, its rows cut where a band would waste work or an additive term would take much memory."""
    whole = joint(p)
    for region in regions(p) if whole is None else [whole]:
        step = _band_rows(region) if isinstance(region.hiding, Band) else region.n_rows
        if p.scores and region.n_rows * region.n_heads * region.n_keys > BIAS:
            step = min(step, max(16, BIAS // (_planes(p, region) * region.n_keys)))
        if step >= region.n_rows:
            yield region
            continue
        for row in range(0, region.n_rows, step):
            part = region.cut(row, min(row + step, region.n_rows))
            if part is not None:
                yield part


def _planes(p: Problem, region: Region) -> int:
    """How many planes (rows x keys) the additive terms of a region hold: fewer than heads where they broadcast."""
    row = region.rows.start
    tile = Tile(p, region.b, region.h, slice(row, row + 1), region.keys)
    shapes = [score.term(tile).shape[:2] for score in p.scores if isinstance(score, Additive)]
    return math.prod(torch.broadcast_shapes(*shapes))


def _band_rows(region: Region) -> int:
    """Rows per call of a banded region: few keep the work close to the band, many keep the kernel's blocks large."""
    if region.hiding == CAUSAL and region.n_keys > LONG:
        return region.n_rows  # the kernel skips what lies above the diagonal, in large blocks
    assert isinstance(region.hiding, Band)
    step = 64
    while step * region.n_heads * min(region.n_keys, 512) < CALL:
        step *= 2
    return step if region.hiding.start_step or region.n_keys <= LONG else max(step, 256)


def _float_mask(p: Problem, region: Region) -> Tensor | None:
    """What the kernel adds to the scores: the additive terms, and -inf where a mask hides."""
    total = None
    if p.scores:
        tile = Tile(p, region.b, region.h, region.rows, region.keys)
        for score in p.scores:
            assert isinstance(score, Additive)
            term = score.term(tile)
            total = term if total is None else total + term
    if region.hiding is None or region.hiding == CAUSAL:  # the kernel hides what lies above the diagonal
        if total is None and region.n_keys < VECTOR:
            return p.q.new_zeros((1, 1), dtype=p.acc_dtype)
        return total
    visible = region.visible(slice(0, region.n_rows), slice(0, region.n_keys))
    if visible is None:
        return total
    if total is None:
        return added(visible, p.acc_dtype)
    return torch.where(visible, total, -torch.inf)


def _chain(first: Region | None, rest: Iterator[Region]) -> Iterator[Region]:
    if first is not None:
        yield first
        yield from rest


def _covers_all(region: Region | None, p: Problem) -> TypeGuard[Region]:
    return region is not None and (
        region.b.stop - region.b.start == p.n_b
        and region.h.stop - region.h.start == p.n_h
        and region.n_rows == p.n_q
        and isinstance(region.keys, slice)
        and region.n_keys == p.n_k
    )


def _blocks(p: Problem, region: Region) -> Iterator[Region]:
    """A region of all heads a few at a time, no fewer than there are threads: what is widened for them stays in the cache."""
    group = p.n_h // p.n_kv
    size = group * p.n_q * (p.q.shape[3] + p.v_dim) + p.n_k * (p.q.shape[3] + p.v_dim)  # elements of a key head
    n = max(1, -(-torch.get_num_threads() // group), WIDE // size)
    for b in range(0, p.n_b, max(1, n // p.n_kv)):
        for h in range(0, p.n_kv, n):
            heads = slice(h * group, min(h + n, p.n_kv) * group)
            yield region.of(slice(b, min(b + max(1, n // p.n_kv), p.n_b)), heads)


def _region_forward(p: Problem, region: Region, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of a region's own q, k and v."""
    mask = _float_mask(p, region)
    k, v = emptied(region, k, v)
    out, lse = _forward(q, k, v, 0.0, region.hiding == CAUSAL, attn_mask=mask, scale=p.scale)
    # the kernel says 0 for the lse of a row that sees nothing
    if mask is not None and (p.scores or isinstance(region.hiding, Tensor)):
        zero = lse == 0
        if bool(zero.any()):
            lse = lse.masked_fill(zero & (mask == -torch.inf).all(-1), -torch.inf)
    if p.sinks is None:
        return out, lse
    with_sink = torch.logaddexp(lse, q_part(p.sinks.to(lse.dtype)[:, :, None], region))
    share = torch.exp(lse - with_sink).masked_fill_(lse == -torch.inf, 0.0)
    return out.mul_(share[..., None]), with_sink


def forward(p: Problem, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, out_lo): see `fastattn.backends`."""
    wide = p.q.dtype in LOW and (train or p.sinks is not None)
    dtype = torch.float32 if wide else p.q.dtype
    dim = max(p.q.shape[3], p.v_dim)
    shape = (p.n_b, p.n_h, p.n_q, p.v_dim)
    nothing = p.q.new_empty(0)
    parts = _chunks(p)
    first = next(parts, None)
    whole = first if _covers_all(first, p) else None
    if whole is not None and not wide:
        o, lse = _region_forward(p, whole, *(_operand(x, dtype, dim) for x in (p.q, p.k, p.v)))
        out = o if has_layout(o, p.q, shape) else empty_like_layout(p.q, shape).copy_(o[..., : p.v_dim])
        return out, lse.contiguous(), nothing
    out = empty_like_layout(p.q, shape)
    out_lo = empty_like_layout(p.q, shape) if wide and train else nothing
    lse = torch.empty(shape[:3], dtype=p.acc_dtype)
    if whole is not None:
        q, k, v = p.q, p.k, p.v
        parts = _blocks(p, whole)
    else:  # rows that see nothing are in no region
        out.zero_()
        out_lo.zero_()
        lse.copy_(p.sinks[:, :, None]) if p.sinks is not None else lse.fill_(-torch.inf)
        q, k, v = (_operand(x, dtype, dim) for x in (p.q, p.k, p.v))
        parts = _chain(first, parts)
    for region in parts:
        own = (q_part(q, region), k_part(p, k, region), k_part(p, v, region))
        o, row_lse = _region_forward(p, region, *(_operand(x, dtype, dim) for x in own))
        o, high = o[..., : p.v_dim], q_part(out, region)
        high.copy_(o)
        if out_lo.numel():
            q_part(out_lo, region).copy_(o.sub_(high))
        q_part(lse, region).copy_(row_lse)
    return out, lse, out_lo


def backward(p: Problem, do: Tensor, out: Tensor, lse: Tensor, out_lo: Tensor) -> Grads:
    """Gradients of q, k, v and the sinks."""
    row_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    parts = _chunks(p)
    first = next(parts, None)
    if not _covers_all(first, p):
        dq, dk, dv = _backward_in_parts(p, _chain(first, parts), do, out, out_lo, row_lse)
    elif p.q.dtype not in LOW:
        dq, dk, dv = _region_backward(p, first, p.q, p.k, p.v, do, exact_out(out, out_lo, p.acc_dtype), row_lse)
    else:
        dq, dk, dv = (empty_rows(x, tuple(x.shape)) for x in (p.q, p.k, p.v))
        for region in _blocks(p, first):
            q, do_part, high, low, rows = (
                q_part(x, region) if x.numel() else x for x in (p.q, do, out, out_lo, row_lse)
            )
            k, v = k_part(p, p.k, region), k_part(p, p.v, region)
            found = _region_backward(p, region, q, k, v, do_part, exact_out(high, low, p.acc_dtype), rows)
            for total, part in zip((q_part(dq, region), k_part(p, dk, region), k_part(p, dv, region)), found):
                total.copy_(part[..., : total.shape[3]])
    dsinks = None
    if p.sinks is not None:
        dsinks = blocked.sink_gradient(p, blocked.RowNorm(lse), blocked.row_delta(p, do, None, out, out_lo, lse))
    return Grads(_finish(dq, p.q), _finish(dk, p.k), _finish(dv, p.v), [], dsinks)


def _backward_in_parts(p: Problem, parts: Iterator[Region], do: Tensor, out: Tensor, out_lo: Tensor, lse: Tensor):
    """(dq, dk, dv) summed over regions, in the accumulation dtype and of one head_dim."""
    acc, dim = p.acc_dtype, max(p.q.shape[3], p.v_dim)
    q, k, v, do, o = (_operand(x, acc, dim) for x in (p.q, p.k, p.v, do, exact_out(out, out_lo, acc)))
    dq, dk, dv = (empty_rows(x, (*x.shape[:3], dim), acc).zero_() for x in (p.q, p.k, p.v))
    for region in parts:
        rows = (q_part(x, region) for x in (do, o, lse))
        dq_part, dk_part, dv_part = _region_backward(
            p, region, q_part(q, region), k_part(p, k, region), k_part(p, v, region), *rows
        )
        q_part(dq, region).copy_(dq_part)
        add_keys(p, dk, region, dk_part)
        add_keys(p, dv, region, dv_part)
    return dq, dk, dv


def _region_backward(p: Problem, region: Region, q, k, v, do, out, lse) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a region's own tensors, of one head_dim."""
    dim = max(p.q.shape[3], p.v_dim)
    q, k, v, do, out = (_operand(x, p.acc_dtype, dim) for x in (q, k, v, do, out))
    k, v = emptied(region, k, v)
    dq, dk, dv = _backward(
        do, q, k, v, out, lse, 0.0, region.hiding == CAUSAL, attn_mask=_float_mask(p, region), scale=p.scale,
    )  # fmt: skip
    return dq, *emptied(region, dk, dv)


def _finish(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x in x's dtype and shape."""
    _, h, n, d = x.shape
    if grad.dtype == x.dtype and grad.shape == x.shape and grad.stride() == (n * h * d, d, h * d, 1):
        return grad
    return empty_rows(x, tuple(x.shape)).copy_(grad[..., : x.shape[3]])

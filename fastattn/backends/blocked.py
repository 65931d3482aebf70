"""The tiled verbs in torch operations: every mask, score, sink, dropout and derivative, one tile of scores at a time.

Formulas: with A the scores after the chain, L the log-sum-exp, Z = keep / (1 - p) (all ones without dropout),
pi = exp(sink - L) and the cotangents dO, dL:

    P = exp(A - L)    O = (Z P) V    dP = Z (dO V')    delta = dO.O - dL    gA = P (dP - delta)
    dV = (Z P)' dO    dX = chain'(gA)    dQ = scale dX K    dK = scale dX' Q    dsink = -sum pi delta

and for tangents (a dot on top), with A. = chain'(scale (Q. K' + Q K.')) + terms of the parameters' tangents:

    L. = sum P A. + pi sink.    O. = (Z P A.) V + (Z P) V. - L. O    U = A. - L.    delta. = dO.O. + dO..O - dL.
    gA. = P (U (dP - delta) + Z (dO V.' + dO. V') - delta.)

No sum over keys is split between tiles of a row but in the order of the keys, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout import keep_mask
from ..problem import LOW, Grads, Problem, empty_like_layout, empty_rows
from ..scores import Additive, General, Pointwise
from .operands import (
    RowNorm,
    add_keys,
    dot_columns,
    dot_keys,
    dot_rows,
    exact_out,
    far_rows,
    is_far,
    k_part,
    q_part,
    row_dot,
    safe_lse,
    sink_weight,
    sum_rows_like,
)
from .regions import ROWS, Region, fixed, regions
from .tile import Tile

TILE = 1 << 18  # score elements of a tile, over all its batch entries and heads
KEYS = 512  # keys of a tile


class Part(NamedTuple):
    """A tile of a region: a chunk of its rows and a chunk of its keys, each as a region of its own, and what is hidden."""

    region: Region  # rows and keys are the tile's, in storage
    tile: Tile
    hidden: Tensor | None  # bool, broadcastable to the tile


def chunks(p: Problem) -> Iterator[Region]:
    """Every region, its rows cut so that a tile of scores stays small."""
    if p.invariant:
        yield from fixed(p)
        return
    for region in regions(p):
        step = max(16, min(256, TILE // (region.n_heads * min(KEYS, region.n_keys))))
        for row in range(0, region.n_rows, step):
            chunk = region.cut(row, min(row + step, region.n_rows))
            if chunk is not None:
                yield chunk


def tiles(p: Problem, chunk: Region) -> Iterator[Part]:
    """The tiles of a chunk of rows, in the order of their keys."""
    index, rows = chunk.keys, slice(0, chunk.n_rows)
    step = ROWS if p.invariant else KEYS
    for key in range(0, chunk.n_keys, step):
        keys = slice(key, min(key + step, chunk.n_keys))
        storage = slice(index.start + keys.start, index.start + keys.stop) if isinstance(index, slice) else index[keys]
        visible = chunk.visible(rows, keys)
        tile = Tile(p, chunk.b, chunk.h, chunk.rows, storage)
        hidden = None if visible is None else ~visible.to(p.q.device)
        yield Part(Region(chunk.b, chunk.h, chunk.rows, storage), tile, hidden)


def hide(s: Tensor, hidden: Tensor | None) -> Tensor:
    return s if hidden is None else s.masked_fill(hidden, -torch.inf)


def dropout_factor(p: Problem, tile: Tile) -> Tensor | None:
    """Z = keep / (1 - dropout_p) of a tile, or None without dropout."""
    if p.dropout_p == 0.0:
        return None
    assert p.rng is not None
    if p.dropout_p == 1.0:
        return torch.zeros((), dtype=tile.dtype, device=tile.device)
    keep = keep_mask(p.rng, p.dropout_p, tile.b, tile.h, tile.q, tile.k, tile.b_slice, p.n_b)
    return keep.to(tile.dtype).div_(1.0 - p.dropout_p)


def times(x: Tensor, z: Tensor | None) -> Tensor:
    return x if z is None else x * z


def apply_chain(p: Problem, s: Tensor, tile: Tile) -> tuple[Tensor, list[Tensor]]:
    """The scores after the chain, and the scores in front of each of its modifiers."""
    before = []
    for score in p.scores:
        before.append(s)
        if isinstance(score, Additive):
            s = s + score.term(tile)
        elif isinstance(score, Pointwise):
            s = score.value(s)
        else:
            assert isinstance(score, General)
            s = score.value(s, tile)
    return s, before


def chain_backward(p: Problem, g: Tensor, before: list[Tensor], tile: Tile, dparams: list[Tensor] | None) -> Tensor:
    """The gradient in front of the chain from the one behind it; adds the parameters' gradients to `dparams`."""
    end = len(p.params)
    for score, s in zip(reversed(p.scores), reversed(before), strict=True):
        start = end - len(score.params)
        grads = dparams[start:end] if dparams is not None else []
        end = start
        if isinstance(score, Pointwise):
            g = g * score.derivs(s)[1]
        elif isinstance(score, Additive):
            if grads:
                score.accumulate(grads, g, tile)
        else:
            assert isinstance(score, General)
            if grads:
                score.accumulate(grads, g, s, tile)
            g = g * score.derivs(s, tile)[1]
    return g


class Wide(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


def widened(p: Problem) -> Wide:
    return Wide(*(x.to(p.acc_dtype) for x in (p.q, p.k, p.v)))


def forward(p: Problem, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, out_lo): see `fastattn.backends`."""
    w = widened(p)
    shape = (p.n_b, p.n_h, p.n_q, p.v_dim)
    out = empty_like_layout(p.q, shape, p.acc_dtype).zero_()
    lse = _sink_logits(p)
    for chunk in chunks(p):
        k, v = k_part(p, w.k, chunk), k_part(p, w.v, chunk)
        lse_chunk = q_part(lse, chunk)
        acc, row_max, row_sum = _softmax_rows(p, chunk, q_part(w.q, chunk), k, v, lse_chunk)
        empty = row_max == -torch.inf
        q_part(out, chunk).copy_(acc / row_sum.masked_fill(empty, 1.0)[..., None])
        lse_chunk.copy_(torch.where(empty, row_max, row_max + torch.log(row_sum)))
    return split_out(p, out, lse, train)


def _sink_logits(p: Problem) -> Tensor:
    """The sink's logit of every row, -inf without sinks. (B, H, L)"""
    shape = (p.n_b, p.n_h, p.n_q)
    if p.sinks is None:
        return torch.full(shape, -torch.inf, dtype=p.acc_dtype, device=p.q.device)
    return p.sinks.to(p.acc_dtype)[:, :, None].expand(shape).clone(memory_format=torch.contiguous_format)


def row_norm(p: Problem, lse: Tensor) -> RowNorm:
    """What makes weights of p's logits. Where lse `is_far`, and so has lost digits of log(sum), another pass finds these."""
    if not is_far(lse):
        return RowNorm(safe_lse(lse))
    w, share, start = widened(p), torch.ones_like(lse), _sink_logits(p)
    for chunk in chunks(p):
        k, v, own = k_part(p, w.k, chunk), k_part(p, w.v, chunk)[..., :0], q_part(lse, chunk)
        _, row_max, row_sum = _softmax_rows(p, chunk, q_part(w.q, chunk), k, v, q_part(start, chunk))
        q_part(share, chunk).copy_(torch.where(far_rows(own), torch.exp(own - row_max) / row_sum, 1.0))
    return RowNorm(safe_lse(lse), share)


def split_out(p: Problem, out: Tensor, lse: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out rounded to the inputs' dtype, and what the rounding lost where a gradient will want it."""
    if p.q.dtype not in LOW:
        return out, lse, p.q.new_empty(0)
    high = out.to(p.q.dtype)
    return high, lse, (out - high).to(p.q.dtype) if train else p.q.new_empty(0)


def _softmax_rows(p: Problem, chunk: Region, q: Tensor, k: Tensor, v: Tensor, start_lse: Tensor):
    """Online softmax over the keys of a chunk of rows: (sum of exp(s - max) v, max, sum of exp(s - max)); `start_lse` is the
    sink's logit, or -inf."""
    row_max = start_lse.clone()  # [B, H, rows]
    row_sum = (start_lse != -torch.inf).to(q.dtype)
    acc = q.new_zeros(*q.shape[:3], v.shape[3])
    q = q * p.scale
    done = 0
    for part in tiles(p, chunk):
        n = part.region.n_keys
        s, _ = apply_chain(p, dot_keys(q, k.narrow(2, done, n)), part.tile)
        s = hide(s, part.hidden)
        new_max = torch.maximum(row_max, s.amax(-1))
        safe = new_max.masked_fill(new_max == -torch.inf, 0.0)
        weights = torch.exp(s - safe[..., None])
        alpha = torch.exp(row_max - safe)
        row_sum = row_sum * alpha + weights.sum(-1)
        weights = times(weights, dropout_factor(p, part.tile))
        acc = acc * alpha[..., None] + dot_rows(weights, v.narrow(2, done, n))
        row_max = new_max
        done += n
    return acc, row_max, row_sum


class _Rows(NamedTuple):
    """Row-wise tensors of a chunk of rows."""

    q: Tensor
    do: Tensor | None
    norm: RowNorm
    delta: Tensor


def key_totals(p: Problem) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Zeros to sum dq, dk, dv and the parameters' gradients in, in the accumulation dtype."""
    acc = p.acc_dtype
    dq, dk, dv = (empty_rows(x, tuple(x.shape), acc).zero_() for x in (p.q, p.k, p.v))
    return dq, dk, dv, [torch.zeros(x.shape, dtype=acc, device=x.device) for x in p.params]


def rounded(p: Problem, dq: Tensor, dk: Tensor, dv: Tensor, dparams: list[Tensor], dsinks: Tensor | None) -> Grads:
    dtype = p.q.dtype
    return Grads(
        dq.to(dtype), dk.to(dtype), dv.to(dtype),
        [g.to(x.dtype) for g, x in zip(dparams, p.params, strict=True)] if p.param_grads else [], dsinks,
    )  # fmt: skip


def sink_gradient(p: Problem, norm: RowNorm, delta: Tensor) -> Tensor | None:
    """dsink = -sum over rows of pi * delta."""
    return None if p.sinks is None else sum_rows_like(-sink_weight(p, *norm) * delta, p.sinks)


def row_delta(p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, out_lo: Tensor, lse: Tensor) -> Tensor:
    """delta = dO.O - dL in the accumulation dtype, O from both its halves."""
    acc = p.acc_dtype
    delta = row_dot(None if do is None else do.to(acc), exact_out(out, out_lo, acc), lse)
    return delta if dlse is None else delta - dlse


def backward(p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor) -> Grads:
    """Gradients of q, k, v, the chain's parameters and the sinks."""
    w = widened(p)
    do = None if do is None else do.to(p.acc_dtype)
    delta = row_delta(p, do, dlse, out, out_lo, lse)
    dq, dk, dv, dparams = key_totals(p)
    wanted = dparams if p.param_grads else None
    norm = row_norm(p, lse)
    for chunk in chunks(p):
        k, v = k_part(p, w.k, chunk), k_part(p, w.v, chunk)
        stats = _Rows(
            q_part(w.q, chunk), None if do is None else q_part(do, chunk), norm.part(chunk), q_part(delta, chunk)
        )
        q_part(dq, chunk).copy_(_backward_rows(p, chunk, stats, k, v, dk, dv, wanted))
    return rounded(p, dq, dk, dv, dparams, sink_gradient(p, norm, delta))


def _backward_rows(p: Problem, chunk: Region, r: _Rows, k_all, v_all, dk, dv, dparams) -> Tensor:
    """dq of a chunk of rows; adds its shares to dk, dv and the parameters' gradients."""
    q = r.q * p.scale
    dq = torch.zeros_like(q)
    done, n_kv = 0, k_all.shape[1]
    for part in tiles(p, chunk):
        n = part.region.n_keys
        k, v = k_all.narrow(2, done, n), v_all.narrow(2, done, n)
        done += n
        s, before = apply_chain(p, dot_keys(q, k), part.tile)
        weights = r.norm.weights(hide(s, part.hidden))
        z = dropout_factor(p, part.tile)
        if r.do is not None:
            add_keys(p, dv, part.region, dot_columns(times(weights, z), r.do, n_kv))
            g = weights * (times(dot_keys(r.do, v), z) - r.delta[..., None])
        else:
            g = weights * -r.delta[..., None]
        g = chain_backward(p, g, before, part.tile, dparams)
        dq += dot_rows(g, k)
        add_keys(p, dk, part.region, dot_columns(g, q, n_kv))
    return dq.mul_(p.scale)

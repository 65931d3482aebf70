"""Tangents: of the forward in one pass over rows, of the backward in one over rows and one over columns.

With A the scores after the chain, a dot for a tangent, and everything of kernels/backward.py:

    A. = chain.(scale (q. k' + q k.'))      lse. = sum p A. + pi sink.      out. = sum Z p (A. v + v.) - lse. out
    u = A. - lse.    r = dp - delta         g. = p (u r + Z (do v.' + do. v') - delta.)      x, x. = chain'(g, g.)
    dq. = scale (x. k + x k.)               dk. = scale (x.' q + x' q.)      dv. = (Z p u)' do + (Z p)' do.

from the lse, out and delta that are there already. What rounding to half precision adds to a row's weights does harm in the
direction of the row's mean key or value: it is summed, and taken off along the mean of one tile, which is right for any mean.
For the same reason A. is shifted by its value at a mean key. PUSHED says which modifiers have a parameter with a tangent, and
tscores has their arguments with the tangent in the parameter's place.
"""

from .backward import weights
from .chain import apply_scores
from .dropout import kept
from .masks import row_spans
from .shim import LOG2E, jit, kernel, tl
from .tiles import (
    dot_add,
    dot_rows,
    dot_rows_add,
    first_of,
    head_of,
    load_rows,
    load_some,
    mean_of,
    mean_row,
    own_columns,
    owned,
    program_tile,
    rounded,
    rounded_and_wide,
    row_sums,
    slice_of,
    store_rows,
)  # fmt: skip
from .walk import key_tile, key_walk, keys_shown, middle_tile, query_tile, query_walk, run_of, seen_keys, seen_queries


@jit
def push_scores(ds, s, at, scores, tscores, SCORES: tl.constexpr, PUSHED: tl.constexpr, n: tl.constexpr):
    """The tangent behind the first n modifiers; s and ds are the score and its tangent in front of the chain."""
    for i in tl.static_range(n):
        if SCORES[i][0]:
            ds = ds * SCORES[i][2](s, scores[i])
            s = SCORES[i][1](s, scores[i])
        else:
            s = s + SCORES[i][1](at, scores[i])
            if PUSHED[i]:
                ds = ds + SCORES[i][1](at, tscores[i])
    return ds


@jit
def pull_tangents(g, dg, s, ds, at, scores, tscores, SCORES: tl.constexpr, PUSHED: tl.constexpr, first: tl.constexpr):
    """(g, dg) in front of modifier `first` from those behind the chain: the gradient of the scores and its tangent."""
    for i in tl.static_range(len(SCORES) - first):
        if SCORES[len(SCORES) - 1 - i][0]:
            before = apply_scores(s, at, scores, SCORES, len(SCORES) - 1 - i)
            dbefore = push_scores(ds, s, at, scores, tscores, SCORES, PUSHED, len(SCORES) - 1 - i)
            slope = SCORES[len(SCORES) - 1 - i][2](before, scores[len(SCORES) - 1 - i])
            dg = dg * slope + g * dbefore * SCORES[len(SCORES) - 1 - i][3](before, scores[len(SCORES) - 1 - i])
            g = g * slope
    return g, dg


@jit
def crossed(a, ta, b, tb, DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """ta b' + a tb'"""
    return dot_rows_add(a, tb, dot_rows(ta, b, DIM, PADDED, PRECISION), DIM, PADDED, PRECISION)


@jit
def mean_change(q, tq, k, tk, strides, first, lo, hi, BLOCKS: tl.constexpr, DIMS: tl.constexpr):
    """q. mean(k)' + q mean(k.)' over the keys of the tile at `first`; strides as in `forward_jvp`. # [BLOCK_Q]"""
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    if DIMS[1] < DIMS[0]:
        k_tile = load_rows(k, first, strides[1], lo, hi, BLOCKS[1], DIMS[0], DIMS[1], True)
        tk_tile = load_rows(tk, first, strides[4], lo, hi, BLOCKS[1], DIMS[0], DIMS[1], True)
        total = tl.zeros([BLOCK_Q], tl.float32)
        for column in tl.range(0, DIMS[0], DIMS[1], num_stages=1):
            mean_k = mean_of(slice_of(k_tile, column, DIMS[0], DIMS[1]), first, lo, hi, BLOCKS[1])
            mean_tk = mean_of(slice_of(tk_tile, column, DIMS[0], DIMS[1]), first, lo, hi, BLOCKS[1])
            q_slice, tq_slice = slice_of(q, column, DIMS[0], DIMS[1]), slice_of(tq, column, DIMS[0], DIMS[1])
            total += tl.sum(tq_slice.to(tl.float32) * mean_k[None, :] + q_slice.to(tl.float32) * mean_tk[None, :], 1)
        return total
    else:
        mean_k = mean_row(k, first, strides[1], lo, hi, BLOCKS[1], DIMS[0], DIMS[1])
        mean_tk = mean_row(tk, first, strides[4], lo, hi, BLOCKS[1], DIMS[0], DIMS[1])
        return tl.sum(tq.to(tl.float32) * mean_k[None, :] + q.to(tl.float32) * mean_tk[None, :], 1)


@jit
def jvp_tiles(
    acc, mean, off, q, tq, lse2, shift, k, v, tk, tv, strides, walk, rows, first, last, scale, call, tscores,
    FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr, PUSHED: tl.constexpr, DIMS: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc += Z p ((A. - shift) v + v.), mean += p A. and off, what rounding adds to v's weights, over one run of a walk."""
    BLOCK_K: tl.constexpr = BLOCKS[1]
    data, size = call[0], call[1]
    run = run_of(walk, FLAGS, BLOCK_K, MASKED)
    for step in tl.range(run[0], run[1], BLOCK_K):
        k0, k_idx, at = key_tile(step, run, rows, call, FLAGS, BLOCK_K, MASKED)
        known = keys_shown(step, run, FLAGS, BLOCK_K, MASKED)
        k_tile = load_rows(k, k0, strides[1], first, last, BLOCK_K, DIMS[0], DIMS[1], MASKED)
        tk_tile = load_rows(tk, k0, strides[4], first, last, BLOCK_K, DIMS[0], DIMS[1], MASKED)
        product = dot_rows(q, k_tile, DIMS[0], DIMS[1], PRECISION)  # [BLOCK_Q, BLOCK_K]
        change = crossed(q, tq, k_tile, tk_tile, DIMS[0], DIMS[1], PRECISION) * scale
        p, _ = weights(product, lse2[:, None], at, scale, data[2], (), SCORES, len(SCORES))
        change = push_scores(change, product * scale, at, data[2], tscores, SCORES, PUSHED, len(SCORES))
        v_tile = load_some(v, k0, strides[2], first, last, known, BLOCK_K, DIMS[2], DIMS[3], MASKED)
        tv_tile = load_some(tv, k0, strides[5], first, last, known, BLOCK_K, DIMS[2], DIMS[3], MASKED)
        v_tile, tv_tile = own_columns(v_tile, DIMS[2], DIMS[3]), own_columns(tv_tile, DIMS[2], DIMS[3])
        if MASKED:
            seen = seen_keys(k0, k_idx, at, rows, call, FLAGS, PREDICATES)
            p, change = tl.where(seen, p, 0.0), tl.where(seen, change, 0.0)
            if len(PREDICATES) > 0 and len(known) == 0:
                some = (tl.max(seen.to(tl.int32), 0) > 0)[:, None]
                v_tile, tv_tile = tl.where(some, v_tile, 0.0), tl.where(some, tv_tile, 0.0)
        mean += row_sums(p, change)
        if FLAGS[7]:
            p = tl.where(kept(data[3], rows[3], at, k0 + size[5], BLOCKS[0], BLOCK_K, FLAGS, False), p, 0.0)
        change = p * (change - shift[:, None])
        weight, wide = rounded_and_wide(change, v_tile.dtype, FLAGS[12])
        off += tl.sum(wide - change, 1)
        acc = dot_add(weight, v_tile, acc, PRECISION)
        acc = dot_add(rounded(p, v_tile.dtype), tv_tile, acc, PRECISION)
    return acc, mean, off


@kernel
def forward_jvp(
    q, k, v, tq, tk, tv, out, out_lo, lse, sinks, tsinks, tout, tlse, data, tscores, strides, scale, n_q, n_k, start, stop,
    q_at, k_at, n_h, n_b, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr, PUSHED: tl.constexpr,
    GROUP: tl.constexpr, SPANS: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """tout and tlse of one tile of queries. strides: q, k, v, tq, tk, tv, out, out_lo, tout, sinks, tsinks."""
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    V_DIM: tl.constexpr = DIMS[3]
    size = (n_q, n_k, start, stop, q_at, k_at)
    call = (data, size, n_b)
    q0, b, h = program_tile(n_q, n_h, BLOCK_Q, True)
    q_idx = q0 + tl.arange(0, BLOCK_Q)
    ok = q_idx < n_q
    near = tl.minimum(q_idx, n_q - 1)
    q_tile = load_rows(head_of(q, b, h, strides[0]), q0, strides[0], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    tq_tile = load_rows(head_of(tq, b, h, strides[3]), q0, strides[3], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    k, v = head_of(k, b, h // GROUP, strides[1]), head_of(v, b, h // GROUP, strides[2])
    tk, tv = head_of(tk, b, h // GROUP, strides[4]), head_of(tv, b, h // GROUP, strides[5])
    row = (b * n_h + h) * n_q + q_idx
    row_lse = tl.load(lse + row, mask=ok, other=float("-inf"))
    lse2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    acc = tl.zeros([BLOCK_Q, V_DIM], tl.float32)
    mean, off = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    start_k, stop_k = row_spans(data[0], SPANS - 1, b, h, q_idx, ok, size, FLAGS)  # the means are of the last span's keys
    walk, lo, hi = key_walk(data[0], SPANS - 1, b, h, q0, start_k, stop_k, ok, size, FLAGS, PREDICATES, BLOCKS)
    middle, some = middle_tile(walk, FLAGS, BLOCKS[1])
    hi = tl.where(some, hi, lo)
    shift = mean_change(q_tile, tq_tile, k, tk, strides, middle, lo, hi, BLOCKS, DIMS) * scale
    for r in tl.range(0, SPANS, num_stages=1):
        start_k, stop_k = row_spans(data[0], r, b, h, q_idx, ok, size, FLAGS)
        walk, first, last = key_walk(data[0], r, b, h, q0, start_k, stop_k, ok, size, FLAGS, PREDICATES, BLOCKS)
        rows = (near, start_k, stop_k, b, h)
        acc, mean, off = jvp_tiles(
            acc, mean, off, q_tile, tq_tile, lse2, shift, k, v, tk, tv, strides, walk, rows, first, last, scale, call,
            tscores, FLAGS, PREDICATES, SCORES, PUSHED, DIMS, BLOCKS, PRECISION, False,
        )  # fmt: skip
        acc, mean, off = jvp_tiles(
            acc, mean, off, q_tile, tq_tile, lse2, shift, k, v, tk, tv, strides, walk, rows, first, last, scale, call,
            tscores, FLAGS, PREDICATES, SCORES, PUSHED, DIMS, BLOCKS, PRECISION, True,
        )  # fmt: skip
    acc -= off[:, None] * mean_row(v, middle, strides[2], lo, hi, BLOCKS[1], DIMS[2], DIMS[3])[None, :]
    if tsinks is not None:
        sink = tl.load(sinks + b * strides[9][0] + h * strides[9][1]).to(tl.float32)
        tsink = tl.load(tsinks + b * strides[10][0] + h * strides[10][1]).to(tl.float32)
        mean += tl.exp2(sink * LOG2E - lse2) * tsink
    if FLAGS[7]:
        acc = acc * data[3][3]
    o = load_rows(head_of(out, b, h, strides[6]), q0, strides[6], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], True)
    o = own_columns(o, DIMS[2], DIMS[3]).to(tl.float32)
    if out_lo is not None:
        low = load_rows(head_of(out_lo, b, h, strides[7]), q0, strides[7], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], True)
        o += own_columns(low, DIMS[2], DIMS[3]).to(tl.float32)
    acc -= (mean - shift)[:, None] * o
    store_rows(head_of(tout, b, h, strides[8]), acc, q0, strides[8], n_q, BLOCK_Q, DIMS[2], DIMS[3])
    tl.store(tlse + row, mean, mask=first_of(ok, DIMS))


@jit
def tangent_tile(
    product, change, dp, tdp, lse2, tlse, delta, tdelta, at, scale, scores, tscores, SCORES: tl.constexpr, PUSHED: tl.constexpr,
    first: tl.constexpr,
):  # fmt: skip
    """(p, p u, x, x.) of a tile from its raw products q k', q. k' + q k.', Z do v' and Z (do v.' + do. v').

    x and x. are the gradient in front of modifier `first` and its tangent: of the scores themselves with 0.
    """
    s, ds = product * scale, change * scale
    p, _ = weights(product, lse2, at, scale, scores, (), SCORES, len(SCORES))
    u = push_scores(ds, s, at, scores, tscores, SCORES, PUSHED, len(SCORES)) - tlse
    r = dp - delta
    x, tx = pull_tangents(p * r, p * (u * r + tdp - tdelta), s, ds, at, scores, tscores, SCORES, PUSHED, first)
    return p, p * u, x, tx


@jit
def dq_jvp_tiles(
    dq, off, toff, q, tq, do, tdo, lse2, tlse, delta, tdelta, k, v, tk, tv, strides, walk, rows, first, last, scale, call,
    tscores, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr, PUSHED: tl.constexpr, DIMS: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr, TDO: tl.constexpr, ZERO_SUM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq += x. k + x k. over one run of a walk; off and toff: the row sums of x and x. as they were rounded, with ZERO_SUM,
    else what rounding added to them."""
    BLOCK_K: tl.constexpr = BLOCKS[1]
    data, size = call[0], call[1]
    run = run_of(walk, FLAGS, BLOCK_K, MASKED)
    for step in tl.range(run[0], run[1], BLOCK_K):
        k0, k_idx, at = key_tile(step, run, rows, call, FLAGS, BLOCK_K, MASKED)
        known = keys_shown(step, run, FLAGS, BLOCK_K, MASKED)
        k_tile = load_some(k, k0, strides[1], first, last, known, BLOCK_K, DIMS[0], DIMS[1], MASKED)
        tk_tile = load_some(tk, k0, strides[4], first, last, known, BLOCK_K, DIMS[0], DIMS[1], MASKED)
        v_tile = load_rows(v, k0, strides[2], first, last, BLOCK_K, DIMS[2], DIMS[3], MASKED)
        tv_tile = load_rows(tv, k0, strides[5], first, last, BLOCK_K, DIMS[2], DIMS[3], MASKED)
        product = dot_rows(q, k_tile, DIMS[0], DIMS[1], PRECISION)  # [BLOCK_Q, BLOCK_K]
        change = crossed(q, tq, k_tile, tk_tile, DIMS[0], DIMS[1], PRECISION)
        dp = dot_rows(do, v_tile, DIMS[2], DIMS[3], PRECISION)
        tdp = dot_rows(do, tv_tile, DIMS[2], DIMS[3], PRECISION)
        if TDO:
            tdp = dot_rows_add(tdo, v_tile, tdp, DIMS[2], DIMS[3], PRECISION)
        k_tile, tk_tile = own_columns(k_tile, DIMS[0], DIMS[1]), own_columns(tk_tile, DIMS[0], DIMS[1])
        if FLAGS[7]:
            keep = kept(data[3], rows[3], at, k0 + size[5], BLOCKS[0], BLOCK_K, FLAGS, False)
            dp, tdp = tl.where(keep, dp * data[3][3], 0.0), tl.where(keep, tdp * data[3][3], 0.0)
        _, _, x, tx = tangent_tile(
            product, change, dp, tdp, lse2[:, None], tlse[:, None], delta[:, None], tdelta[:, None], at, scale, data[2],
            tscores, SCORES, PUSHED, 0,
        )  # fmt: skip
        if MASKED:
            seen = seen_keys(k0, k_idx, at, rows, call, FLAGS, PREDICATES)
            x, tx = tl.where(seen, x, 0.0), tl.where(seen, tx, 0.0)
            if len(PREDICATES) > 0 and len(known) == 0:
                some = (tl.max(seen.to(tl.int32), 0) > 0)[:, None]
                k_tile, tk_tile = tl.where(some, k_tile, 0.0), tl.where(some, tk_tile, 0.0)
        weight, wide = rounded_and_wide(x, k_tile.dtype, FLAGS[12])
        tweight, twide = rounded_and_wide(tx, k_tile.dtype, FLAGS[12])
        if ZERO_SUM:
            x, tx = 0.0, 0.0
        off += tl.sum(wide - x, 1)
        toff += tl.sum(twide - tx, 1)
        dq = dot_add(tweight, k_tile, dq, PRECISION)
        dq = dot_add(weight, tk_tile, dq, PRECISION)
    return dq, off, toff


@kernel
def backward_dq_jvp(
    q, k, v, tq, tk, tv, do, tdo, lse2, tlse, delta, tdelta, sums, tsums, dq_out, data, tscores, strides, scale, n_q, n_k,
    start, stop, q_at, k_at, n_h, n_b, n_pad, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr,
    PUSHED: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, ZERO_SUM: tl.constexpr,
):  # fmt: skip
    """The tangent of dq of one tile of queries. strides: q, k, v, tq, tk, tv, do, tdo, dq. tdo may be None.

    ZERO_SUM, without a Pointwise: sums and tsums (B, H, n_pad) are the exact row sums of x and x., None where these are 0.
    """
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    HEAD_DIM: tl.constexpr = DIMS[1]
    TDO: tl.constexpr = tdo is not None
    size = (n_q, n_k, start, stop, q_at, k_at)
    call = (data, size, n_b)
    q0, b, h = program_tile(n_q, n_h, BLOCK_Q, True)
    q_idx = q0 + tl.arange(0, BLOCK_Q)
    ok = q_idx < n_q
    near = tl.minimum(q_idx, n_q - 1)
    q_tile = load_rows(head_of(q, b, h, strides[0]), q0, strides[0], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    tq_tile = load_rows(head_of(tq, b, h, strides[3]), q0, strides[3], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    do_tile = load_rows(head_of(do, b, h, strides[6]), q0, strides[6], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], True)
    tdo_tile = do_tile
    if TDO:
        tdo_tile = load_rows(head_of(tdo, b, h, strides[7]), q0, strides[7], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], True)
    k, v = head_of(k, b, h // GROUP, strides[1]), head_of(v, b, h // GROUP, strides[2])
    tk, tv = head_of(tk, b, h // GROUP, strides[4]), head_of(tv, b, h // GROUP, strides[5])
    row = (b * n_h + h) * n_pad + q_idx
    row_lse, row_tlse = tl.load(lse2 + row), tl.load(tlse + row)
    row_delta, row_tdelta = tl.load(delta + row), tl.load(tdelta + row)
    dq = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    off, toff = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    mean_k, mean_tk = tl.zeros([HEAD_DIM], tl.float32), tl.zeros([HEAD_DIM], tl.float32)
    for r in tl.range(0, SPANS, num_stages=1):
        start_k, stop_k = row_spans(data[0], r, b, h, q_idx, ok, size, FLAGS)
        walk, first, last = key_walk(data[0], r, b, h, q0, start_k, stop_k, ok, size, FLAGS, PREDICATES, BLOCKS)
        rows = (near, start_k, stop_k, b, h)
        middle, some = middle_tile(walk, FLAGS, BLOCKS[1])
        if some:
            mean_k = mean_row(k, middle, strides[1], first, last, BLOCKS[1], DIMS[0], DIMS[1])
            mean_tk = mean_row(tk, middle, strides[4], first, last, BLOCKS[1], DIMS[0], DIMS[1])
        dq, off, toff = dq_jvp_tiles(
            dq, off, toff, q_tile, tq_tile, do_tile, tdo_tile, row_lse, row_tlse, row_delta, row_tdelta, k, v, tk, tv, strides,
            walk, rows, first, last, scale, call, tscores, FLAGS, PREDICATES, SCORES, PUSHED, DIMS, BLOCKS, PRECISION, TDO,
            ZERO_SUM, False,
        )  # fmt: skip
        dq, off, toff = dq_jvp_tiles(
            dq, off, toff, q_tile, tq_tile, do_tile, tdo_tile, row_lse, row_tlse, row_delta, row_tdelta, k, v, tk, tv, strides,
            walk, rows, first, last, scale, call, tscores, FLAGS, PREDICATES, SCORES, PUSHED, DIMS, BLOCKS, PRECISION, TDO,
            ZERO_SUM, True,
        )  # fmt: skip
    if sums is not None:
        off -= tl.load(sums + row)
    if tsums is not None:
        toff -= tl.load(tsums + row)
    dq -= toff[:, None] * mean_k[None, :] + off[:, None] * mean_tk[None, :]
    store_rows(head_of(dq_out, b, h, strides[8]), dq * scale, q0, strides[8], n_q, BLOCK_Q, DIMS[0], DIMS[1])


@jit
def dkdv_jvp_tiles(
    dk, dv, k, v, tk, tv, q, tq, do, tdo, lse2, tlse, delta, tdelta, strides, walk, columns, k0, scale, call, tscores,
    FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr, PUSHED: tl.constexpr,
    DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr, TDO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk += x.' q + x' q. and dv += (Z p u)' do + (Z p)' do. over one run of a walk."""
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    data, size = call[0], call[1]
    n_q = size[0]
    run = run_of(walk, FLAGS, BLOCK_Q, MASKED)
    for step in tl.range(run[0], run[1], BLOCK_Q):
        q0, q_idx, at = query_tile(step, run, columns, call, FLAGS, BLOCK_Q, MASKED)
        q_tile = load_rows(q, q0, strides[0], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], MASKED)
        tq_tile = load_rows(tq, q0, strides[3], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], MASKED)
        do_tile = load_rows(do, q0, strides[6], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], MASKED)
        product = dot_rows(k, q_tile, DIMS[0], DIMS[1], PRECISION)  # [BLOCK_K, BLOCK_Q]
        change = crossed(tk, k, tq_tile, q_tile, DIMS[0], DIMS[1], PRECISION)
        dp = dot_rows(v, do_tile, DIMS[2], DIMS[3], PRECISION)
        tdp = dot_rows(tv, do_tile, DIMS[2], DIMS[3], PRECISION)
        if TDO:
            tdo_tile = load_rows(tdo, q0, strides[7], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], MASKED)
            tdp = dot_rows_add(v, tdo_tile, tdp, DIMS[2], DIMS[3], PRECISION)
            tdo_tile = own_columns(tdo_tile, DIMS[2], DIMS[3])
        do_tile = own_columns(do_tile, DIMS[2], DIMS[3])
        q_tile, tq_tile = own_columns(q_tile, DIMS[0], DIMS[1]), own_columns(tq_tile, DIMS[0], DIMS[1])
        if FLAGS[7]:
            keep = kept(data[3], columns[2], at, k0 + size[5], BLOCK_Q, BLOCKS[1], FLAGS, True)
            dp, tdp = tl.where(keep, dp * data[3][3], 0.0), tl.where(keep, tdp * data[3][3], 0.0)
        p, pu, x, tx = tangent_tile(
            product, change, dp, tdp, tl.load(lse2 + q_idx)[None, :], tl.load(tlse + q_idx)[None, :],
            tl.load(delta + q_idx)[None, :], tl.load(tdelta + q_idx)[None, :], at, scale, data[2], tscores, SCORES, PUSHED, 0,
        )  # fmt: skip
        if MASKED:
            seen = seen_queries(q0, q_idx, at, columns, call, FLAGS, PREDICATES)
            p, pu = tl.where(seen, p, 0.0), tl.where(seen, pu, 0.0)
            x, tx = tl.where(seen, x, 0.0), tl.where(seen, tx, 0.0)
        if FLAGS[7]:
            p, pu = tl.where(keep, p, 0.0), tl.where(keep, pu, 0.0)
        dv = dot_add(rounded(pu, do_tile.dtype), do_tile, dv, PRECISION)
        if TDO:
            dv = dot_add(rounded(p, do_tile.dtype), tdo_tile, dv, PRECISION)
        dk = dot_add(rounded(tx, q_tile.dtype), q_tile, dk, PRECISION)
        dk = dot_add(rounded(x, q_tile.dtype), tq_tile, dk, PRECISION)
    return dk, dv


@kernel
def backward_dkdv_jvp(
    q, k, v, tq, tk, tv, do, tdo, lse2, tlse, delta, tdelta, dk_out, dv_out, data, tscores, strides, scale, n_q, n_k, start,
    stop, q_at, k_at, n_kv, n_b, n_pad, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr,
    PUSHED: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The tangents of dk and dv of one tile of keys. strides: q, k, v, tq, tk, tv, do, tdo, dk, dv. tdo may be None."""
    BLOCK_K: tl.constexpr = BLOCKS[1]
    HEAD_DIM: tl.constexpr = DIMS[1]
    V_DIM: tl.constexpr = DIMS[3]
    TDO: tl.constexpr = tdo is not None
    size = (n_q, n_k, start, stop, q_at, k_at)
    call = (data, size, n_b)
    k0, b, kv = program_tile(n_k, n_kv, BLOCK_K, False)
    k_idx = k0 + tl.arange(0, BLOCK_K)
    k_tile = load_rows(head_of(k, b, kv, strides[1]), k0, strides[1], 0, n_k, BLOCK_K, DIMS[0], DIMS[1], True)
    v_tile = load_rows(head_of(v, b, kv, strides[2]), k0, strides[2], 0, n_k, BLOCK_K, DIMS[2], DIMS[3], True)
    tk_tile = load_rows(head_of(tk, b, kv, strides[4]), k0, strides[4], 0, n_k, BLOCK_K, DIMS[0], DIMS[1], True)
    tv_tile = load_rows(head_of(tv, b, kv, strides[5]), k0, strides[5], 0, n_k, BLOCK_K, DIMS[2], DIMS[3], True)
    dk = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_K, V_DIM], tl.float32)
    for step in tl.range(0, GROUP * SPANS, num_stages=1):
        h, r = kv * GROUP + step // SPANS, step % SPANS
        walk = query_walk(data[0], r, b, h, k0, size, FLAGS, PREDICATES, BLOCKS)
        columns = (k_idx, r, b, h)
        q_head, do_head = head_of(q, b, h, strides[0]), head_of(do, b, h, strides[6])
        tq_head, tdo_head = head_of(tq, b, h, strides[3]), do_head
        if TDO:
            tdo_head = head_of(tdo, b, h, strides[7])
        row = (b * n_kv * GROUP + h) * n_pad
        dk, dv = dkdv_jvp_tiles(
            dk, dv, k_tile, v_tile, tk_tile, tv_tile, q_head, tq_head, do_head, tdo_head, lse2 + row, tlse + row, delta + row,
            tdelta + row, strides, walk, columns, k0, scale, call, tscores, FLAGS, PREDICATES, SCORES, PUSHED, DIMS, BLOCKS,
            PRECISION, TDO, False,
        )  # fmt: skip
        dk, dv = dkdv_jvp_tiles(
            dk, dv, k_tile, v_tile, tk_tile, tv_tile, q_head, tq_head, do_head, tdo_head, lse2 + row, tlse + row, delta + row,
            tdelta + row, strides, walk, columns, k0, scale, call, tscores, FLAGS, PREDICATES, SCORES, PUSHED, DIMS, BLOCKS,
            PRECISION, TDO, True,
        )  # fmt: skip
    if FLAGS[7]:
        dv = dv * data[3][3]
    own_k, own_v = owned(n_k, DIMS[0], DIMS[1], DIMS), owned(n_k, DIMS[2], DIMS[3], DIMS)
    store_rows(head_of(dk_out, b, kv, strides[8]), dk * scale, k0, strides[8], own_k, BLOCK_K, DIMS[0], DIMS[1])
    store_rows(head_of(dv_out, b, kv, strides[9]), dv, k0, strides[9], own_v, BLOCK_K, DIMS[2], DIMS[3])

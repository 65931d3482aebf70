"""Forward mode over forward mode: the second derivative of the forward along two directions, in one pass over rows.

With A1, A2 and A12 the scores' tangents along the first direction, the second and both (kernels/tangents.py), L1 and L2 those
of lse, and u1 = A1 - L1, u2 = A2 - L2:

    lse12 = sum p (u2 A1 + A12) + the sink's share
    out12 = sum Z p ((u1 u2 + A12) v + u1 v2 + u2 v1 + v12) - lse12 out
"""

from .backward import weights
from .dropout import kept
from .masks import row_spans
from .shim import LOG2E, jit, kernel, tl
from .tangents import crossed
from .tiles import (
    dot_add,
    dot_rows,
    first_of,
    head_of,
    load_rows,
    load_some,
    mean_row,
    own_columns,
    program_tile,
    rounded,
    rounded_and_wide,
    row_sums,
    store_rows,
)  # fmt: skip
from .walk import key_tile, key_walk, keys_shown, middle_tile, run_of, seen_keys


@jit
def push_twice(d1, d2, d12, s, at, scores, tscores, SCORES: tl.constexpr, PUSHED: tl.constexpr):
    """(A1, A2, A12) behind the chain from the tangents in front of it; tscores and PUSHED: along 1, 2 and both."""
    for i in tl.static_range(len(SCORES)):
        if SCORES[i][0]:
            first = SCORES[i][2](s, scores[i])
            d12 = d12 * first + d1 * d2 * SCORES[i][3](s, scores[i])
            d1, d2 = d1 * first, d2 * first
            s = SCORES[i][1](s, scores[i])
        else:
            s = s + SCORES[i][1](at, scores[i])
            if PUSHED[0][i]:
                d1 = d1 + SCORES[i][1](at, tscores[0][i])
            if PUSHED[1][i]:
                d2 = d2 + SCORES[i][1](at, tscores[1][i])
            if PUSHED[2][i]:
                d12 = d12 + SCORES[i][1](at, tscores[2][i])
    return d1, d2, d12


@jit
def jvp2_tiles(
    acc, mean, off, q, q1, q2, q12, lse2, tlse1, tlse2, keys, strides, walk, rows, first, last, scale, call, tscores,
    FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr, PUSHED: tl.constexpr, DIMS: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr, BOTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc and mean, the sums of out12 and lse12, and off, what rounding adds to v's weights, over one run of a walk.

    keys: k, k1, k2, k12, v, v1, v2, v12.
    """
    BLOCK_K: tl.constexpr = BLOCKS[1]
    data, size = call[0], call[1]
    run = run_of(walk, FLAGS, BLOCK_K, MASKED)
    for step in tl.range(run[0], run[1], BLOCK_K):
        k0, k_idx, at = key_tile(step, run, rows, call, FLAGS, BLOCK_K, MASKED)
        known = keys_shown(step, run, FLAGS, BLOCK_K, MASKED)
        k = load_rows(keys[0], k0, strides[0], first, last, BLOCK_K, DIMS[0], DIMS[1], MASKED)
        k1 = load_rows(keys[1], k0, strides[1], first, last, BLOCK_K, DIMS[0], DIMS[1], MASKED)
        k2 = load_rows(keys[2], k0, strides[2], first, last, BLOCK_K, DIMS[0], DIMS[1], MASKED)
        product = dot_rows(q, k, DIMS[0], DIMS[1], PRECISION)  # [BLOCK_Q, BLOCK_K]
        mixed = crossed(q1, q2, k1, k2, DIMS[0], DIMS[1], PRECISION)
        if BOTH:
            k12 = load_rows(keys[3], k0, strides[3], first, last, BLOCK_K, DIMS[0], DIMS[1], MASKED)
            mixed += crossed(q, q12, k, k12, DIMS[0], DIMS[1], PRECISION)
        along1 = crossed(q, q1, k, k1, DIMS[0], DIMS[1], PRECISION)
        along2 = crossed(q, q2, k, k2, DIMS[0], DIMS[1], PRECISION)
        p, _ = weights(product, lse2[:, None], at, scale, data[2], (), SCORES, len(SCORES))
        a1, a2, a12 = push_twice(
            along1 * scale, along2 * scale, mixed * scale, product * scale, at, data[2], tscores, SCORES, PUSHED
        )
        u1, u2 = a1 - tlse1[:, None], a2 - tlse2[:, None]
        v = load_some(keys[4], k0, strides[4], first, last, known, BLOCK_K, DIMS[2], DIMS[3], MASKED)
        v1 = load_some(keys[5], k0, strides[5], first, last, known, BLOCK_K, DIMS[2], DIMS[3], MASKED)
        v2 = load_some(keys[6], k0, strides[6], first, last, known, BLOCK_K, DIMS[2], DIMS[3], MASKED)
        v, v1 = own_columns(v, DIMS[2], DIMS[3]), own_columns(v1, DIMS[2], DIMS[3])
        v2 = own_columns(v2, DIMS[2], DIMS[3])
        if MASKED:
            seen = seen_keys(k0, k_idx, at, rows, call, FLAGS, PREDICATES)
            p, a1, a12 = tl.where(seen, p, 0.0), tl.where(seen, a1, 0.0), tl.where(seen, a12, 0.0)
            u1, u2 = tl.where(seen, u1, 0.0), tl.where(seen, u2, 0.0)
            some = (tl.max(seen.to(tl.int32), 0) > 0)[:, None]
            if len(PREDICATES) > 0 and len(known) == 0:
                v, v1, v2 = tl.where(some, v, 0.0), tl.where(some, v1, 0.0), tl.where(some, v2, 0.0)
        mean += row_sums(p, u2 * a1 + a12)
        if FLAGS[7]:
            p = tl.where(kept(data[3], rows[3], at, k0 + size[5], BLOCKS[0], BLOCK_K, FLAGS, False), p, 0.0)
        curvature = p * (u1 * u2 + a12)
        weight, wide = rounded_and_wide(curvature, v.dtype, FLAGS[12])
        off += tl.sum(wide - curvature, 1)
        acc = dot_add(weight, v, acc, PRECISION)
        acc = dot_add(rounded(p * u1, v.dtype), v2, acc, PRECISION)
        acc = dot_add(rounded(p * u2, v.dtype), v1, acc, PRECISION)
        if BOTH:
            v12 = load_some(keys[7], k0, strides[7], first, last, known, BLOCK_K, DIMS[2], DIMS[3], MASKED)
            v12 = own_columns(v12, DIMS[2], DIMS[3])
            if MASKED and len(PREDICATES) > 0 and len(known) == 0:
                v12 = tl.where(some, v12, 0.0)
            acc = dot_add(rounded(p, v.dtype), v12, acc, PRECISION)
    return acc, mean, off


@kernel
def forward_jvp2(
    operands, out, out_lo, lse, tlse1, tlse2, sink_share, tout, tlse, data, tscores, strides, scale, n_q, n_k, start, stop,
    q_at, k_at, n_h, n_b, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr, PUSHED: tl.constexpr,
    GROUP: tl.constexpr, SPANS: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """out12 and lse12 of one tile of queries.

    operands: q, q1, q2, q12, then k and v likewise; those of both directions are not read without BOTH. strides: theirs, then
    out, out_lo, tout. sink_share: what the sink adds to lse12 of every row, or None.
    """
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    V_DIM: tl.constexpr = DIMS[3]
    size = (n_q, n_k, start, stop, q_at, k_at)
    call = (data, size, n_b)
    q0, b, h = program_tile(n_q, n_h, BLOCK_Q, True)
    q_idx = q0 + tl.arange(0, BLOCK_Q)
    ok = q_idx < n_q
    near = tl.minimum(q_idx, n_q - 1)
    q = load_rows(head_of(operands[0], b, h, strides[0]), q0, strides[0], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    q1 = load_rows(head_of(operands[1], b, h, strides[1]), q0, strides[1], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    q2 = load_rows(head_of(operands[2], b, h, strides[2]), q0, strides[2], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    q12 = q
    if BOTH:
        q12 = load_rows(head_of(operands[3], b, h, strides[3]), q0, strides[3], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    kv = h // GROUP
    keys = (
        head_of(operands[4], b, kv, strides[4]), head_of(operands[5], b, kv, strides[5]),
        head_of(operands[6], b, kv, strides[6]), head_of(operands[7], b, kv, strides[7]),
        head_of(operands[8], b, kv, strides[8]), head_of(operands[9], b, kv, strides[9]),
        head_of(operands[10], b, kv, strides[10]), head_of(operands[11], b, kv, strides[11]),
    )  # fmt: skip
    key_strides = strides[4:12]
    row = (b * n_h + h) * n_q + q_idx
    row_lse = tl.load(lse + row, mask=ok, other=float("-inf"))
    lse2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    one, two = tl.load(tlse1 + row, mask=ok, other=0.0), tl.load(tlse2 + row, mask=ok, other=0.0)
    acc = tl.zeros([BLOCK_Q, V_DIM], tl.float32)
    mean, off = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    mean_v = tl.zeros([V_DIM], tl.float32)
    for r in tl.range(0, SPANS, num_stages=1):
        start_k, stop_k = row_spans(data[0], r, b, h, q_idx, ok, size, FLAGS)
        walk, first, last = key_walk(data[0], r, b, h, q0, start_k, stop_k, ok, size, FLAGS, PREDICATES, BLOCKS)
        rows = (near, start_k, stop_k, b, h)
        middle, some = middle_tile(walk, FLAGS, BLOCKS[1])
        if some:
            mean_v = mean_row(keys[4], middle, key_strides[4], first, last, BLOCKS[1], DIMS[2], DIMS[3])
        acc, mean, off = jvp2_tiles(
            acc, mean, off, q, q1, q2, q12, lse2, one, two, keys, key_strides, walk, rows, first, last, scale, call, tscores,
            FLAGS, PREDICATES, SCORES, PUSHED, DIMS, BLOCKS, PRECISION, BOTH, False,
        )  # fmt: skip
        acc, mean, off = jvp2_tiles(
            acc, mean, off, q, q1, q2, q12, lse2, one, two, keys, key_strides, walk, rows, first, last, scale, call, tscores,
            FLAGS, PREDICATES, SCORES, PUSHED, DIMS, BLOCKS, PRECISION, BOTH, True,
        )  # fmt: skip
    acc -= off[:, None] * mean_v[None, :]  # as in kernels/tangents.py
    if sink_share is not None:
        mean += tl.load(sink_share + row, mask=ok, other=0.0)
    if FLAGS[7]:
        acc = acc * data[3][3]
    o = load_rows(head_of(out, b, h, strides[12]), q0, strides[12], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], True)
    o = own_columns(o, DIMS[2], DIMS[3]).to(tl.float32)
    if out_lo is not None:
        low = load_rows(head_of(out_lo, b, h, strides[13]), q0, strides[13], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], True)
        o += own_columns(low, DIMS[2], DIMS[3]).to(tl.float32)
    acc -= mean[:, None] * o
    store_rows(head_of(tout, b, h, strides[14]), acc, q0, strides[14], n_q, BLOCK_Q, DIMS[2], DIMS[3])
    tl.store(tlse + row, mean, mask=first_of(ok, DIMS))

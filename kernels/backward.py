"""The backward kernels: delta, then keys inner for dq, and queries inner for dk and dv.

    p = exp(s - lse)   dp = Z (do v')   delta = do.out - dlse   g = p (dp - delta)   x = chain'(g)
    dq = scale x k     dk = scale x' q     dv = (Z p)' do

No atomics: every sum has one owner and one order. The chain's derivative is pulled back through p before dp is there, so
that raw scores need not stay alive. lse2 is lse in base 2 and +inf for rows that see nothing or do not exist: p is 0 there.
"""

from .chain import apply_scores, pull_scores
from .dropout import kept
from .masks import row_spans
from .shim import LOG2E, jit, kernel, tl
from .tiles import (
    dot_add,
    dot_rows,
    head_of,
    load_rows,
    load_some,
    mean_row,
    own_columns,
    owned,
    program_tile,
    rounded,
    rounded_and_wide,
    row_sums,
    store_rows,
)
from .walk import key_tile, key_walk, keys_shown, middle_tile, query_tile, query_walk, run_of, seen_keys, seen_queries


@kernel
def row_delta(
    do, out, out_lo, lse, dlse, delta, lse2, strides, n_q, n_pad, n_h, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta from both halves of out, and lse2, of rows padded to n_pad. strides: do, out, out_lo."""
    q0, b, h = program_tile(n_pad, n_h, BLOCK_Q, False)
    q_idx = q0 + tl.arange(0, BLOCK_Q)
    ok = q_idx < n_q
    o = load_rows(head_of(out, b, h, strides[1]), q0, strides[1], 0, n_q, BLOCK_Q, DIM, PADDED, True).to(tl.float32)
    if out_lo is not None:
        low = load_rows(head_of(out_lo, b, h, strides[2]), q0, strides[2], 0, n_q, BLOCK_Q, DIM, PADDED, True)
        o += low.to(tl.float32)
    do_tile = load_rows(head_of(do, b, h, strides[0]), q0, strides[0], 0, n_q, BLOCK_Q, DIM, PADDED, True)
    total = row_sums(o, do_tile.to(tl.float32))
    if dlse is not None:
        total -= tl.load(dlse + (b * n_h + h) * n_q + q_idx, mask=ok, other=0.0)
    row = (b * n_h + h) * n_pad + q_idx
    row_lse = tl.load(lse + (b * n_h + h) * n_q + q_idx, mask=ok, other=float("-inf"))
    seen = row_lse != float("-inf")
    tl.store(delta + row, tl.where(seen, total, 0.0))
    tl.store(lse2 + row, tl.where(seen, row_lse * LOG2E, float("inf")))


@jit
def weights(x, lse2, at, scale, scores, seen, SCORES: tl.constexpr, first: tl.constexpr):
    """p of raw products x, and p times the derivative of the modifiers from `first` on. seen: `hidden`."""
    if len(SCORES) == 0:
        p = tl.exp2(hidden(x * (scale * LOG2E) - lse2, seen, float("-inf")))
        return p, p
    else:
        x = x * scale
        p = tl.exp2(hidden(apply_scores(x, at, scores, SCORES, len(SCORES)) * LOG2E - lse2, seen, float("-inf")))
        return p, hidden(pull_scores(p, x, at, scores, SCORES, first), seen, 0.0)


@jit
def hidden(x, seen, instead):
    """x, and `instead` of what `seen`, () or (bool tensor,), hides.

    A selection in front of a conversion to 16 bits the compiler moves behind it, where it takes registers apart and joins them
    again. So factors are hidden rather than their product, and exponents rather than powers.
    """
    if len(seen) == 0:
        return x
    else:
        return tl.where(seen[0], x, instead)


@jit
def add_up(x, k_idx, sums, MASKED: tl.constexpr):
    """Add a tile of x to what earlier entries left there, and write it: in its own dtype behind the last of them.

    sums: the address of the first row's sums, their row stride, which rows exist; and where several entries share a sum its
    address in float32, whether there are earlier entries, whether there are later ones.
    """
    inside = sums[2][:, None]
    if MASKED:  # a tile's first key is a multiple of its size; a row stride says of the number of keys what there is to know
        k_idx = tl.max_contiguous(tl.multiple_of(k_idx, x.shape[1]), x.shape[1])
        inside = inside & (k_idx < sums[1])[None, :]
    at = tl.arange(0, x.shape[0])[:, None] * sums[1] + k_idx[None, :]
    if len(sums) > 3:
        x += tl.load(sums[3] + at, mask=inside & sums[4], other=0.0)
        tl.store(sums[3] + at, x, mask=inside & sums[5])
        inside = inside & (sums[5] == 0)
    tl.store(sums[0] + at, rounded(x, sums[0].dtype.element_ty), mask=inside)


@jit
def dq_tiles(
    dq, total, q, do, lse2, delta, k, v, strides, walk, rows, first, last, scale, call, sums, FLAGS: tl.constexpr,
    PREDICATES: tl.constexpr, SCORES: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    ZERO_SUM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq += x k, and the row sums of x as it was rounded, over one run of a walk; x itself goes to `sums`, if there are any."""
    BLOCK_K: tl.constexpr = BLOCKS[1]
    data, size = call[0], call[1]
    run = run_of(walk, FLAGS, BLOCK_K, MASKED)
    for step in tl.range(run[0], run[1], BLOCK_K):
        k0, k_idx, at = key_tile(step, run, rows, call, FLAGS, BLOCK_K, MASKED)
        some = keys_shown(step, run, FLAGS, BLOCK_K, MASKED)
        k_tile = load_some(k, k0, strides[1], first, last, some, BLOCK_K, DIMS[0], DIMS[1], MASKED)
        product = dot_rows(q, k_tile, DIMS[0], DIMS[1], PRECISION)  # [BLOCK_Q, BLOCK_K]
        _, w = weights(product, lse2[:, None], at, scale, data[2], (), SCORES, 0)
        v_tile = load_rows(v, k0, strides[2], first, last, BLOCK_K, DIMS[2], DIMS[3], MASKED)
        dp = dot_rows(do, v_tile, DIMS[2], DIMS[3], PRECISION)
        if FLAGS[7]:
            keep = kept(data[3], rows[3], at, k0 + size[5], BLOCKS[0], BLOCK_K, FLAGS, False)
            dp = tl.where(keep, dp * data[3][3], 0.0)
        x = w * (dp - delta[:, None])
        k_tile = own_columns(k_tile, DIMS[0], DIMS[1])
        if MASKED:
            seen = seen_keys(k0, k_idx, at, rows, call, FLAGS, PREDICATES)
            x = tl.where(seen, x, 0.0)
            if len(PREDICATES) > 0 and len(some) == 0:
                k_tile = tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], k_tile, 0.0)
        if len(sums) > 0:
            add_up(x, k_idx, sums, MASKED)
        x, wide = rounded_and_wide(x, k_tile.dtype, FLAGS[12] and len(sums) == 0)  # with sums registers are what is short
        dq = dot_add(x, k_tile, dq, PRECISION)
        if ZERO_SUM:
            total += tl.sum(wide, 1)
    return dq, total


@kernel
def backward_dq(
    q, k, v, do, lse2, delta, dlse, sinks, dq_out, grads, data, strides, scale, n_q, n_k, start, stop, q_at, k_at, n_h, n_b,
    n_pad, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr,
    DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr, ZERO_SUM: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries. strides: q, k, v, do, dq, sinks (entry, head).

    grads: () or, for the gradient of a dense bias where every tile is visited once (one span, no Pointwise), (the gradient
    (B|1, H, n_q, n_k), its row stride) and, where all entries share a sum, (one like it in float32, B): a program has the tile
    of all then. No part is None: Triton 3.6 counts no tuple that has one.
    """
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    size = (n_q, n_k, start, stop, q_at, k_at)
    q0, b, h = program_tile(n_q, n_h, BLOCK_Q, True)
    if len(grads) == 0:
        dq_rows(
            q, k, v, do, lse2, delta, dlse, sinks, dq_out, (), (data, size, n_b), strides, scale, q0, b, h, n_h, n_pad, FLAGS,
            PREDICATES, SCORES, GROUP, SPANS, DIMS, BLOCKS, PRECISION, ZERO_SUM,
        )  # fmt: skip
    else:
        q_idx = q0 + tl.arange(0, BLOCK_Q)
        own = ((b * n_h + h) * n_q + q0) * grads[1]
        if len(grads) == 2:
            sums = (grads[0] + own, grads[1], q_idx < n_q)
            dq_rows(
                q, k, v, do, lse2, delta, dlse, sinks, dq_out, sums, (data, size, n_b), strides, scale, q0, b, h, n_h, n_pad,
                FLAGS, PREDICATES, SCORES, GROUP, SPANS, DIMS, BLOCKS, PRECISION, ZERO_SUM,
            )  # fmt: skip
        else:
            for entry in tl.range(0, grads[3], num_stages=1):
                shared = (grads[0] + own, grads[1], q_idx < n_q, grads[2] + own, entry > 0, entry + 1 < grads[3])
                dq_rows(
                    q, k, v, do, lse2, delta, dlse, sinks, dq_out, shared, (data, size, n_b), strides, scale, q0, b + entry, h,
                    n_h, n_pad, FLAGS, PREDICATES, SCORES, GROUP, SPANS, DIMS, BLOCKS, PRECISION, ZERO_SUM,
                )  # fmt: skip


@jit
def dq_rows(
    q, k, v, do, lse2, delta, dlse, sinks, dq_out, sums, call, strides, scale, q0, b, h, n_h, n_pad, FLAGS: tl.constexpr,
    PREDICATES: tl.constexpr, SCORES: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr, DIMS: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr, ZERO_SUM: tl.constexpr,
):  # fmt: skip
    """dq of the rows from q0 on. sums: `add_up`, or ().

    ZERO_SUM: the exact row sum of g is delta pi + dlse, pi the sink's share; what rounding made of it is taken off the
    direction in which it does harm, a mean of the row's keys. Right for any such mean, and only without a Pointwise.
    """
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    BLOCK_K: tl.constexpr = BLOCKS[1]
    HEAD_DIM: tl.constexpr = DIMS[1]
    data, size = call[0], call[1]
    n_q = size[0]
    q_idx = q0 + tl.arange(0, BLOCK_Q)
    ok = q_idx < n_q
    near = tl.minimum(q_idx, n_q - 1)
    q_tile = load_rows(head_of(q, b, h, strides[0]), q0, strides[0], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    do_tile = load_rows(head_of(do, b, h, strides[3]), q0, strides[3], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], True)
    k, v = head_of(k, b, h // GROUP, strides[1]), head_of(v, b, h // GROUP, strides[2])
    row = (b * n_h + h) * n_pad + q_idx
    row_lse, row_delta = tl.load(lse2 + row), tl.load(delta + row)
    dq = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    reference = tl.zeros([HEAD_DIM], tl.float32)
    for r in tl.range(0, SPANS, num_stages=1):
        start_k, stop_k = row_spans(data[0], r, b, h, q_idx, ok, size, FLAGS)
        walk, first, last = key_walk(data[0], r, b, h, q0, start_k, stop_k, ok, size, FLAGS, PREDICATES, BLOCKS)
        rows = (near, start_k, stop_k, b, h)
        if ZERO_SUM:
            middle, some = middle_tile(walk, FLAGS, BLOCK_K)
            if some:
                reference = mean_row(k, middle, strides[1], first, last, BLOCK_K, DIMS[0], DIMS[1])
        dq, total = dq_tiles(
            dq, total, q_tile, do_tile, row_lse, row_delta, k, v, strides, walk, rows, first, last, scale, call, sums,
            FLAGS, PREDICATES, SCORES, DIMS, BLOCKS, PRECISION, ZERO_SUM, False,
        )  # fmt: skip
        dq, total = dq_tiles(
            dq, total, q_tile, do_tile, row_lse, row_delta, k, v, strides, walk, rows, first, last, scale, call, sums,
            FLAGS, PREDICATES, SCORES, DIMS, BLOCKS, PRECISION, ZERO_SUM, True,
        )  # fmt: skip
    if ZERO_SUM:
        if dlse is not None:
            row_dlse = tl.load(dlse + (b * n_h + h) * n_q + q_idx, mask=ok, other=0.0)
            total -= tl.where(row_lse < float("inf"), row_dlse, 0.0)
        if sinks is not None:
            sink = tl.load(sinks + b * strides[5][0] + h * strides[5][1]).to(tl.float32)
            total -= row_delta * tl.exp2(sink * LOG2E - row_lse)
        dq -= total[:, None] * reference[None, :]
    store_rows(head_of(dq_out, b, h, strides[4]), dq * scale, q0, strides[4], n_q, BLOCK_Q, DIMS[0], DIMS[1])


@jit
def dkdv_tiles(
    dk, dv, k, v, q, do, lse2, delta, strides, walk, columns, k0, scale, call, FLAGS: tl.constexpr, PREDICATES: tl.constexpr,
    SCORES: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk += x' q and dv += (Z p)' do over one run of a walk."""
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    data, size = call[0], call[1]
    n_q = size[0]
    run = run_of(walk, FLAGS, BLOCK_Q, MASKED)
    for step in tl.range(run[0], run[1], BLOCK_Q):
        q0, q_idx, at = query_tile(step, run, columns, call, FLAGS, BLOCK_Q, MASKED)
        q_tile = load_rows(q, q0, strides[0], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], MASKED)
        product = dot_rows(k, q_tile, DIMS[0], DIMS[1], PRECISION)  # [BLOCK_K, BLOCK_Q]
        seen = ()
        if MASKED:
            seen = (seen_queries(q0, q_idx, at, columns, call, FLAGS, PREDICATES),)  # type: ignore[assignment]
        p, w = weights(product, tl.load(lse2 + q_idx)[None, :], at, scale, data[2], seen, SCORES, 0)
        do_tile = load_rows(do, q0, strides[3], 0, n_q, BLOCK_Q, DIMS[2], DIMS[3], MASKED)
        dp = dot_rows(v, do_tile, DIMS[2], DIMS[3], PRECISION)
        q_tile, do_tile = own_columns(q_tile, DIMS[0], DIMS[1]), own_columns(do_tile, DIMS[2], DIMS[3])
        if FLAGS[7]:
            keep = kept(data[3], columns[2], at, k0 + size[5], BLOCK_Q, BLOCKS[1], FLAGS, True)
            p = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * data[3][3], 0.0)
        dv = dot_add(rounded(p, do_tile.dtype), do_tile, dv, PRECISION)
        x = w * hidden(dp - tl.load(delta + q_idx)[None, :], seen, 0.0)
        dk = dot_add(rounded(x, q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@kernel
def backward_dkdv(
    q, k, v, do, lse2, delta, dk_out, dv_out, data, strides, scale, n_q, n_k, start, stop, q_at, k_at, n_kv, n_b, n_pad,
    FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr,
    DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys; the query heads of its group and their spans are one loop.

    strides: q, k, v, do, dk, dv.
    """
    BLOCK_K: tl.constexpr = BLOCKS[1]
    HEAD_DIM: tl.constexpr = DIMS[1]
    V_DIM: tl.constexpr = DIMS[3]
    size = (n_q, n_k, start, stop, q_at, k_at)
    call = (data, size, n_b)
    k0, b, kv = program_tile(n_k, n_kv, BLOCK_K, False)
    k_idx = k0 + tl.arange(0, BLOCK_K)
    k_tile = load_rows(head_of(k, b, kv, strides[1]), k0, strides[1], 0, n_k, BLOCK_K, DIMS[0], DIMS[1], True)
    v_tile = load_rows(head_of(v, b, kv, strides[2]), k0, strides[2], 0, n_k, BLOCK_K, DIMS[2], DIMS[3], True)
    dk = tl.zeros([BLOCK_K, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_K, V_DIM], tl.float32)
    for step in tl.range(0, GROUP * SPANS, num_stages=1):
        h, r = kv * GROUP + step // SPANS, step % SPANS
        walk = query_walk(data[0], r, b, h, k0, size, FLAGS, PREDICATES, BLOCKS)
        columns = (k_idx, r, b, h)
        q_head, do_head = head_of(q, b, h, strides[0]), head_of(do, b, h, strides[3])
        row = (b * n_kv * GROUP + h) * n_pad
        dk, dv = dkdv_tiles(
            dk, dv, k_tile, v_tile, q_head, do_head, lse2 + row, delta + row, strides, walk, columns, k0, scale, call, FLAGS,
            PREDICATES, SCORES, DIMS, BLOCKS, PRECISION, False,
        )  # fmt: skip
        dk, dv = dkdv_tiles(
            dk, dv, k_tile, v_tile, q_head, do_head, lse2 + row, delta + row, strides, walk, columns, k0, scale, call, FLAGS,
            PREDICATES, SCORES, DIMS, BLOCKS, PRECISION, True,
        )  # fmt: skip
    if FLAGS[7]:
        dv = dv * data[3][3]
    own_k, own_v = owned(n_k, DIMS[0], DIMS[1], DIMS), owned(n_k, DIMS[2], DIMS[3], DIMS)
    store_rows(head_of(dk_out, b, kv, strides[4]), dk * scale, k0, strides[4], own_k, BLOCK_K, DIMS[0], DIMS[1])
    store_rows(head_of(dv_out, b, kv, strides[5]), dv, k0, strides[5], own_v, BLOCK_K, DIMS[2], DIMS[3])

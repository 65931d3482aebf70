"""The forward kernel: one tile of queries against the tiles of keys that its spans show.

    s = chain(scale q k')   p = exp(s - max)   out = (Z p) v / sum p   lse = max + log sum p

in base 2, with Z = keep / (1 - dropout_p). out is divided by the sum of p as it was rounded for its product with v, so
that a constant v comes out exact; lse has the unrounded sum. A sink joins both sums. For every span the tiles without a
hidden key run first, then the others in a second loop (kernels/walk.py).
"""

from .chain import apply_scores, apply_terms, terms_of
from .dropout import kept
from .masks import row_spans
from .shim import LN2, LOG2E, jit, kernel, tl
from .tiles import dot, dot_add, head_of, load_rows, load_some, program_tile, rounded, rounded_and_wide, store_rows
from .walk import key_tile, key_walk, keys_shown, run_of, seen_keys


@jit
def logits(s, at, scale, scores, terms, SCORES: tl.constexpr):
    """Raw products to scores in base 2; `terms` of the Additives, or ()."""
    if len(SCORES) == 0:
        return s * (scale * LOG2E)
    elif len(terms) == 0:
        return apply_scores(s * scale, at, scores, SCORES, len(SCORES)) * LOG2E
    else:
        return apply_terms(s * scale, terms, scores, SCORES) * LOG2E


@jit
def forward_tiles(
    acc, row_max, row_sum, out_sum, q, k, v, strides, walk, rows, first, last, scale, call, FLAGS: tl.constexpr,
    PREDICATES: tl.constexpr, SCORES: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over one run of a walk."""
    BLOCK_K: tl.constexpr = BLOCKS[1]
    data, size = call[0], call[1]
    run = run_of(walk, FLAGS, BLOCK_K, MASKED)
    for step in tl.range(run[0], run[1], BLOCK_K):
        k0, k_idx, at = key_tile(step, run, rows, call, FLAGS, BLOCK_K, MASKED)
        some = keys_shown(step, run, FLAGS, BLOCK_K, MASKED)
        k_tile = load_rows(k, k0, strides[1], first, last, BLOCK_K, DIMS[0], DIMS[1], MASKED)
        terms = ()
        if MASKED:  # a bias loaded behind the product would lay its layout on the softmax, which were then computed in two
            terms = terms_of(at, data[2], SCORES)
        s = logits(dot(q, tl.trans(k_tile), PRECISION), at, scale, data[2], terms, SCORES)  # [BLOCK_Q, BLOCK_K]
        if MASKED:
            seen = seen_keys(k0, k_idx, at, rows, call, FLAGS, PREDICATES)
            s = tl.where(seen, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2(row_max - safe)
        p = tl.exp2(s - safe[:, None])
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v_tile = load_some(v, k0, strides[2], first, last, some, BLOCK_K, DIMS[2], DIMS[3], MASKED)
        if MASKED and len(PREDICATES) > 0 and len(some) == 0:  # what no row of the tile sees may hold anything
            v_tile = tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], v_tile, 0.0)
        weights, wide = rounded_and_wide(p, v_tile.dtype, FLAGS[12])
        out_sum = out_sum * alpha + tl.sum(wide, 1)
        if FLAGS[7]:
            keep = kept(data[3], rows[3], at, k0 + size[5], BLOCKS[0], BLOCK_K, FLAGS, False)
            weights = tl.where(keep, weights, 0.0)
        acc = dot_add(weights, v_tile, acc * alpha[:, None], PRECISION)
        row_max = new_max
    return acc, row_max, row_sum, out_sum


@kernel
def forward(
    q, k, v, out, out_lo, lse, sinks, data, strides, scale, n_q, n_k, start, stop, q_at, k_at, n_h, n_b, FLAGS: tl.constexpr,
    PREDICATES: tl.constexpr, SCORES: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr, DIMS: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out, its low half (where out_lo is given) and lse of one tile of queries.

    data is (mask, coords, scores, dropout); FLAGS, PREDICATES and SCORES are what is static of them. strides are those of q,
    k, v, out, out_lo and sinks (entry, head). DIMS: head_dim, padded; v_dim, padded. BLOCKS: BLOCK_Q, BLOCK_K.
    """
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    V_DIM: tl.constexpr = DIMS[3]
    size = (n_q, n_k, start, stop, q_at, k_at)
    call = (data, size, n_b)
    q0, b, h = program_tile(n_q, n_h, BLOCK_Q, True)
    q_idx = q0 + tl.arange(0, BLOCK_Q)
    ok = q_idx < n_q
    near = tl.minimum(q_idx, n_q - 1)
    q_tile = load_rows(head_of(q, b, h, strides[0]), q0, strides[0], 0, n_q, BLOCK_Q, DIMS[0], DIMS[1], True)
    k, v = head_of(k, b, h // GROUP, strides[1]), head_of(v, b, h // GROUP, strides[2])
    acc = tl.zeros([BLOCK_Q, V_DIM], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + b * strides[5][0] + h * strides[5][1]).to(tl.float32) * LOG2E
        row_max = tl.maximum(row_max, sink)
        row_sum += tl.where(sink == float("-inf"), 0.0, 1.0 + 0.0 * sink)  # a NaN is not lost in the maximum
    out_sum = row_sum
    for r in tl.range(0, SPANS, num_stages=1):
        start_k, stop_k = row_spans(data[0], r, b, h, q_idx, ok, size, FLAGS)
        walk, first, last = key_walk(data[0], r, b, h, q0, start_k, stop_k, ok, size, FLAGS, PREDICATES, BLOCKS)
        rows = (near, start_k, stop_k, b, h)
        acc, row_max, row_sum, out_sum = forward_tiles(
            acc, row_max, row_sum, out_sum, q_tile, k, v, strides, walk, rows, first, last, scale, call, FLAGS, PREDICATES,
            SCORES, DIMS, BLOCKS, PRECISION, False,
        )  # fmt: skip
        acc, row_max, row_sum, out_sum = forward_tiles(
            acc, row_max, row_sum, out_sum, q_tile, k, v, strides, walk, rows, first, last, scale, call, FLAGS, PREDICATES,
            SCORES, DIMS, BLOCKS, PRECISION, True,
        )  # fmt: skip
    acc = acc * (1.0 / tl.where(out_sum == 0.0, 1.0, out_sum))[:, None]
    if FLAGS[7]:
        acc = acc * data[3][3]
    store_rows(head_of(out, b, h, strides[3]), acc, q0, strides[3], n_q, BLOCK_Q, DIMS[2], DIMS[3])
    if out_lo is not None:
        low = acc - rounded(acc, out.dtype.element_ty).to(tl.float32)
        store_rows(head_of(out_lo, b, h, strides[4]), low, q0, strides[4], n_q, BLOCK_Q, DIMS[2], DIMS[3])
    row_lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum)) * LN2)
    tl.store(lse + (b * n_h + h) * n_q + q_idx, row_lse, mask=ok)

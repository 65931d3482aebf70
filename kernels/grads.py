"""Gradients of an Additive's parameters, and the tangents of these gradients: g behind the modifier, recomputed tile by tile
and summed with one owner a sum.

    tile       g at (q, k), summed over the entries and heads that the parameter does not tell apart
    keys       sums over rows: one value per entry, head and key
    rows       sums over keys, of g times the modifier's weight: one value per entry, head and row
    diagonals  square tiles with the same k - q, summed over all of them: the diagonals of what is stored are the answer
    table      g by the entry of the parameter that a pair belongs to, whatever the pair's place: a program owns BLOCK_K entries
               and some rows, and skips the tiles without a pair of its own
"""

from .backward import weights
from .chain import place
from .dense import tile_class
from .dropout import kept
from .masks import functions, row_spans, spread, tile_bits
from .shim import jit, kernel, tl
from .tangents import crossed, tangent_tile
from .tiles import dot_rows, dot_rows_add, head_of, load_rows, rounded

PART = tl.constexpr(8)  # tiles of rows that a program goes over, whose sums are a table's


@jit
def walk(tile, n_q, n_k, SHAPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(first row, first key, row step, key step, steps) of the tiles that a program sums."""
    q_tiles, k_tiles = tl.cdiv(n_q, BLOCK_Q), tl.cdiv(n_k, BLOCK_K)
    if SHAPE == "tile":
        return tile // k_tiles * BLOCK_Q, tile % k_tiles * BLOCK_K, 0, 0, 1
    elif SHAPE == "keys":
        return tile * 0, tile * BLOCK_K, BLOCK_Q, 0, q_tiles
    elif SHAPE == "rows":
        return tile * BLOCK_Q, tile * 0, 0, BLOCK_K, k_tiles
    elif SHAPE == "table":
        return tile * (PART * BLOCK_Q), tile * 0, BLOCK_Q, BLOCK_K, tl.minimum(PART, q_tiles - tile * PART) * k_tiles
    else:
        ahead = tile - (q_tiles - 1)
        first = tl.maximum(-ahead, 0)
        steps = tl.maximum(tl.minimum(q_tiles, k_tiles - ahead) - first, 0)
        return first * BLOCK_Q, (first + ahead) * BLOCK_K, BLOCK_Q, BLOCK_K, steps


@jit
def tile_at(tile_map, q0, k0, b, h, size, FLAGS: tl.constexpr, BLOCKS: tl.constexpr):
    """`tile_class` of one tile by its first row and key."""
    one = tl.arange(0, 1)
    some, hidden = tile_class(tile_map, b, h, one + q0 // BLOCKS[0], one + k0 // BLOCKS[1], size, FLAGS, BLOCKS)
    return tl.max(some.to(tl.int32), 0) > 0, tl.max(hidden.to(tl.int32), 0) > 0


@jit
def tangent_products(
    q, k, do, v, operands, strides, q0, k0, b, h, size, GROUP: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(q. k' + q k.', do v.' + do. v') of one tile. operands and strides: tq, tk, tv, tdo; tdo may be None."""
    tq, tk = head_of(operands[0], b, h, strides[0]), head_of(operands[1], b, h // GROUP, strides[1])
    tq_tile = load_rows(tq, q0, strides[0], 0, size[0], BLOCKS[0], DIMS[0], DIMS[1], True)
    tk_tile = load_rows(tk, k0, strides[1], 0, size[1], BLOCKS[1], DIMS[0], DIMS[1], True)
    change = crossed(q, tq_tile, k, tk_tile, DIMS[0], DIMS[1], PRECISION)
    tv = head_of(operands[2], b, h // GROUP, strides[2])
    tv_tile = load_rows(tv, k0, strides[2], 0, size[1], BLOCKS[1], DIMS[2], DIMS[3], True)
    tdp = dot_rows(do, tv_tile, DIMS[2], DIMS[3], PRECISION)
    if operands[3] is not None:
        tdo = head_of(operands[3], b, h, strides[3])
        tdo_tile = load_rows(tdo, q0, strides[3], 0, size[0], BLOCKS[0], DIMS[2], DIMS[3], True)
        tdp = dot_rows_add(tdo_tile, v, tdp, DIMS[2], DIMS[3], PRECISION)
    return change, tdp


@jit
def gradient_tile(
    q, k, v, do, lse2, delta, strides, q0, k0, b, h, row, scale, size, n_b, data, weight_args, moved, FLAGS: tl.constexpr,
    PREDICATES: tl.constexpr, SCORES: tl.constexpr, PUSHED: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr,
    DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr, BEHIND: tl.constexpr, WEIGHT: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """g behind modifier BEHIND - 1 of one tile, or its tangent, times WEIGHT; 0 where no row sees a key. # [BLOCK_Q, BLOCK_K]

    row: where the statistics of the head begin. RAGGED: some of the tile's rows or keys do not exist.
    """
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    BLOCK_K: tl.constexpr = BLOCKS[1]
    q_idx = q0 + tl.arange(0, BLOCK_Q)
    if RAGGED:
        k_idx = k0 + tl.arange(0, BLOCK_K)
        near_q, near_k = tl.minimum(q_idx, size[0] - 1)[:, None], tl.minimum(k_idx, size[1] - 1)[None, :]
    else:  # which the compiler needs to know for wide loads along the keys
        k_idx = tl.max_contiguous(tl.multiple_of(k0 + tl.arange(0, BLOCK_K), BLOCK_K), BLOCK_K)
        near_q, near_k = q_idx[:, None], k_idx[None, :]
    at = place(data[1], b, h, near_q, near_k, size, n_b, FLAGS)
    seen = tl.zeros([BLOCK_Q, BLOCK_K], tl.int1)
    for r in tl.static_range(SPANS):
        first, last = row_spans(data[0], r, b, h, q_idx, q_idx < size[0], size, FLAGS)
        seen = seen | ((k_idx[None, :] >= first[:, None]) & (k_idx[None, :] < last[:, None]))
    g = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    some = tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0
    hides = some
    if FLAGS[9]:
        any_seen, any_hidden = tile_at(data[0][2], q0, k0, b, h, size, FLAGS, BLOCKS)
        some = some & any_seen
        hides = any_hidden | (FLAGS[9] == 2)
    if some:
        if hides:
            if FLAGS[9]:
                words = tile_bits(data[0][1], b, h, near_q, k0, PREDICATES, BLOCK_K)
                seen = seen & spread(words, tl.arange(0, BLOCK_K)[None, :])
            seen = functions(seen, at, PREDICATES)
        q_tile = load_rows(head_of(q, b, h, strides[0]), q0, strides[0], 0, size[0], BLOCK_Q, DIMS[0], DIMS[1], RAGGED)
        k_head, v_head = head_of(k, b, h // GROUP, strides[1]), head_of(v, b, h // GROUP, strides[2])
        k_tile = load_rows(k_head, k0, strides[1], 0, size[1], BLOCK_K, DIMS[0], DIMS[1], RAGGED)
        product = dot_rows(q_tile, k_tile, DIMS[0], DIMS[1], PRECISION)
        row_lse, row_delta = tl.load(lse2 + row + q_idx)[:, None], tl.load(delta + row + q_idx)[:, None]
        do_tile = load_rows(head_of(do, b, h, strides[3]), q0, strides[3], 0, size[0], BLOCK_Q, DIMS[2], DIMS[3], RAGGED)
        v_tile = load_rows(v_head, k0, strides[2], 0, size[1], BLOCK_K, DIMS[2], DIMS[3], RAGGED)
        dp = dot_rows(do_tile, v_tile, DIMS[2], DIMS[3], PRECISION)
        keep = seen
        if FLAGS[7]:
            keep = kept(data[3], b, at, k0 + size[5], BLOCK_Q, BLOCK_K, FLAGS, False)
            dp = tl.where(keep, dp * data[3][3], 0.0)
        if len(PUSHED) == 0:
            _, w = weights(product, row_lse, at, scale, data[2], (), SCORES, BEHIND)
            g = w * (dp - row_delta)
        else:
            change, tdp = tangent_products(
                q_tile, k_tile, do_tile, v_tile, moved[0], moved[1], q0, k0, b, h, size, GROUP, DIMS, BLOCKS, PRECISION
            )
            if FLAGS[7]:
                tdp = tl.where(keep, tdp * data[3][3], 0.0)
            row_tlse, row_tdelta = tl.load(moved[2] + row + q_idx)[:, None], tl.load(moved[3] + row + q_idx)[:, None]
            _, _, _, g = tangent_tile(
                product, change, dp, tdp, row_lse, row_tlse, row_delta, row_tdelta, at, scale, data[2], moved[4], SCORES,
                PUSHED, BEHIND,
            )  # fmt: skip
        g = tl.where(seen, g * WEIGHT(at, weight_args), 0.0)
    return g


@jit
def add_by_entry(total, g, entry, first, BLOCK_K: tl.constexpr):
    """total [BLOCK_Q, BLOCK_K] with g added up, row by row, in the columns of its entries, where column 0 is entry `first`."""
    column = tl.arange(0, BLOCK_K)[None, :]
    lowest, highest = tl.min(tl.min(entry, 1), 0), tl.max(tl.max(entry, 1), 0)
    for one in tl.range(tl.maximum(lowest, first), tl.minimum(highest + 1, first + BLOCK_K), num_stages=1):
        row = tl.sum(tl.where(entry == one, g, 0.0), 1)
        total += tl.where(column == one - first, row[:, None], 0.0)
    return total


@kernel
def score_grads(
    q, k, v, do, lse2, delta, grads, data, weight_args, moved, strides, scale, n_q, n_k, start, stop, q_at, k_at, n_h, n_b,
    n_pad, entries, n_table, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, SCORES: tl.constexpr, PUSHED: tl.constexpr,
    GROUP: tl.constexpr, SPANS: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    BEHIND: tl.constexpr, WEIGHT: tl.constexpr, ENTRY: tl.constexpr, SHAPE: tl.constexpr, KEEP_B: tl.constexpr,
    KEEP_H: tl.constexpr,
):  # fmt: skip
    """One program's sum, for one kept entry and head. grads: (B|1, H|1, n_q, n_k), (B, H, n_k), (B, H, n_q), or
    (B|1, H|1, tiles, BLOCK_Q, BLOCK_K) or, for n_table entries, (B|1, H|1, parts of the rows, n_table); float32, the first in
    any dtype. strides: q, k, v, do.
    entries: how many there are, B. moved and PUSHED: () for the gradient; for its tangent moved is ((tq, tk, tv, tdo), their
    strides, tlse, tdelta, tscores)."""
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    BLOCK_K: tl.constexpr = BLOCKS[1]
    size = (n_q, n_k, start, stop, q_at, k_at)
    q_tiles, k_tiles = tl.cdiv(n_q, BLOCK_Q), tl.cdiv(n_k, BLOCK_K)
    if SHAPE == "tile":
        n_tiles = q_tiles * k_tiles
    elif SHAPE == "keys":
        n_tiles = k_tiles
    elif SHAPE == "rows":
        n_tiles = q_tiles
    elif SHAPE == "table":
        n_tiles = tl.cdiv(q_tiles, PART)
    else:
        n_tiles = q_tiles + k_tiles - 1
    n_blocks = tl.cdiv(n_table, BLOCK_K)  # 1 but for a table
    first_entry, program = tl.program_id(0) % n_blocks * BLOCK_K, tl.program_id(0) // n_blocks
    tile, kept_head = program % n_tiles, (program // n_tiles).to(tl.int64)
    first_row, first_key, row_step, key_step, steps = walk(tile, n_q, n_k, SHAPE, BLOCK_Q, BLOCK_K)
    # the entries and heads that share this sum
    b_count, h_count = (1 if KEEP_B else entries), (1 if KEEP_H else n_h)
    kept_b = kept_head // (n_h if KEEP_H else 1) if KEEP_B else kept_head * 0
    kept_h = kept_head % n_h if KEEP_H else kept_head * 0
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for each in tl.range(0, b_count * h_count, num_stages=1):
        b, h = kept_b + each // h_count, kept_h + each % h_count
        row = (b * n_h + h) * n_pad
        for step in tl.range(0, steps, num_stages=1):
            if SHAPE == "table":
                q0, k0 = first_row + step // k_tiles * row_step, step % k_tiles * key_step
                near_q = tl.minimum(q0 + tl.arange(0, BLOCK_Q), n_q - 1)[:, None]
                near_k = tl.minimum(k0 + tl.arange(0, BLOCK_K), n_k - 1)[None, :]
                at = place(data[1], b, h, near_q, near_k, size, n_b, FLAGS)
                entry = ENTRY(at, weight_args)
                own = (entry >= first_entry) & (entry < first_entry + BLOCK_K)
                if tl.max(tl.max(own.to(tl.int32), 1), 0) > 0:
                    g = gradient_tile(
                        q, k, v, do, lse2, delta, strides, q0, k0, b, h, row, scale, size, n_b, data, weight_args, moved,
                        FLAGS, PREDICATES, SCORES, PUSHED, GROUP, SPANS, DIMS, BLOCKS, PRECISION, BEHIND, WEIGHT, True,
                    )  # fmt: skip
                    total = add_by_entry(total, g, entry, first_entry, BLOCK_K)
            elif SHAPE == "tile" and len(PUSHED) == 0:  # a bias, which full tiles read in wide loads
                if (first_row + BLOCK_Q <= n_q) & (first_key + BLOCK_K <= n_k):
                    total += gradient_tile(
                        q, k, v, do, lse2, delta, strides, first_row, first_key, b, h, row, scale, size, n_b, data, weight_args,
                        moved, FLAGS, PREDICATES, SCORES, PUSHED, GROUP, SPANS, DIMS, BLOCKS, PRECISION, BEHIND, WEIGHT, False,
                    )  # fmt: skip
                else:
                    total += gradient_tile(
                        q, k, v, do, lse2, delta, strides, first_row, first_key, b, h, row, scale, size, n_b, data, weight_args,
                        moved, FLAGS, PREDICATES, SCORES, PUSHED, GROUP, SPANS, DIMS, BLOCKS, PRECISION, BEHIND, WEIGHT, True,
                    )  # fmt: skip
            else:
                total += gradient_tile(
                    q, k, v, do, lse2, delta, strides, first_row + step * row_step, first_key + step * key_step, b, h, row,
                    scale, size, n_b, data, weight_args, moved, FLAGS, PREDICATES, SCORES, PUSHED, GROUP, SPANS, DIMS,
                    BLOCKS, PRECISION, BEHIND, WEIGHT, True,
                )  # fmt: skip
    q_idx, k_idx = first_row + tl.arange(0, BLOCK_Q), first_key + tl.arange(0, BLOCK_K)
    if SHAPE == "tile":
        to = grads + kept_head * n_q * n_k + q_idx.to(tl.int64)[:, None] * n_k + k_idx[None, :]
        tl.store(to, rounded(total, grads.dtype.element_ty), mask=(q_idx < n_q)[:, None] & (k_idx < n_k)[None, :])
    elif SHAPE == "keys":
        tl.store(grads + kept_head * n_k + k_idx, tl.sum(total, 0), mask=k_idx < n_k)
    elif SHAPE == "rows":
        tl.store(grads + kept_head * n_q + q_idx, tl.sum(total, 1), mask=q_idx < n_q)
    elif SHAPE == "table":
        own_entry = first_entry + tl.arange(0, BLOCK_K)
        tl.store(grads + (kept_head * n_tiles + tile) * n_table + own_entry, tl.sum(total, 0), mask=own_entry < n_table)
    else:
        to = grads + (kept_head * n_tiles + tile) * (BLOCK_Q * BLOCK_K)
        tl.store(to + tl.arange(0, BLOCK_Q)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], total)

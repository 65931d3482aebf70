"""How a pass walks over the tiles of the other side: which tiles it visits, where each stands, what of it is seen.

A walk is (lo, full_lo, full_hi, hi): tiles from lo to hi, of which those from full_lo to full_hi have no hidden pair. It is
made in two runs (from, to, jump_at, jump), the full tiles first and then those on both sides of them: steps are first indices
of tiles, and tiles from jump_at on are moved by jump. Where there is a tile map (FLAGS[9], kernels/dense.py) a walk is (list,
full tiles, mixed tiles, tiles) and a run (from, to, list): the tile at a step is entry step // BLOCK of the list.

rows is (q_idx, start, stop, b, h) of a tile of rows and one of its spans; columns is (k_idx, r, b, h) of a tile of keys and the
number of a span. call is (data, size, n_b), and data (mask, coords, scores, dropout).
"""

from .chain import place
from .masks import key_range, predicates, row_range, row_spans
from .shim import jit, tl


@jit
def listed(lists, r, b, h, tile, n_own, n):
    """The walk of a tile, one of n_own, and a span: a list of up to n tiles, full ones at its front, mixed ones at its back."""
    at = lists[0] + ((b * lists[1] + h * lists[2] + r) * n_own + tile) * (n + 2)
    return at + 2, tl.load(at), tl.load(at + 1), n


@jit
def key_walk(mask, r, b, h, q0, start, stop, ok, size, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, BLOCKS: tl.constexpr):
    """(walk over the key tiles of the rows from q0 on, first, last): keys [first, last) are those that it may load."""
    lo, full_lo, full_hi, hi, first, last = key_range(start, stop, ok, size[1], BLOCKS[1], len(PREDICATES) > 0)
    if FLAGS[9]:
        q_tiles, k_tiles = tl.cdiv(size[0], BLOCKS[0]), tl.cdiv(size[1], BLOCKS[1])
        return listed(mask[2], r, b, h, q0 // BLOCKS[0], q_tiles, k_tiles), first, last
    else:
        return (lo, full_lo, full_hi, hi), first, last


@jit
def query_walk(mask, r, b, h, k0, size, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, BLOCKS: tl.constexpr):
    """The walk over the query tiles that see the key tile at k0 through span r."""
    if FLAGS[9]:
        q_tiles, k_tiles = tl.cdiv(size[0], BLOCKS[0]), tl.cdiv(size[1], BLOCKS[1])
        return listed(mask[2], r, b, h, k0 // BLOCKS[1], k_tiles, q_tiles)
    else:
        return row_range(mask, r, b, h, k0, size, FLAGS, len(PREDICATES) > 0, BLOCKS[0], BLOCKS[1])


@jit
def run_of(walk, FLAGS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """One of the two runs of a walk."""
    if FLAGS[9]:
        if MASKED:
            return (walk[3] - walk[2]) * BLOCK, walk[3] * BLOCK, walk[0]
        else:
            return 0, walk[1] * BLOCK, walk[0]
    elif MASKED:
        jump = walk[2] - walk[1]
        return walk[0], walk[3] - jump, walk[1], jump
    else:
        return walk[1], walk[2], 0, 0


@jit
def first_index(step, run, FLAGS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The first row or key of the tile at a step of a run."""
    if FLAGS[9]:
        return tl.load(run[2] + step // BLOCK) * BLOCK
    elif MASKED:
        return tl.where(step < run[2], step, step + run[3])
    else:
        return step


@jit
def middle_tile(walk, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """(first index of a tile in the midst of a walk, whether it has any)"""
    if FLAGS[9]:
        at = tl.where(walk[1] > 0, walk[1] // 2, walk[3] - (walk[2] + 1) // 2)
        some = walk[1] + walk[2] > 0
        return tl.load(walk[0] + at, mask=some, other=0) * BLOCK, some
    else:
        return walk[0] + (walk[3] - walk[0]) // 2 // BLOCK * BLOCK, walk[3] > walk[0]


@jit
def key_tile(step, run, rows, call, FLAGS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(first key, keys, place [BLOCK_Q, BLOCK_K]) of the tile at a step of a run over keys."""
    k0 = first_index(step, run, FLAGS, BLOCK, MASKED)
    if MASKED:
        k_idx = k0 + tl.arange(0, BLOCK)
        near = tl.minimum(k_idx, call[1][1] - 1)
    else:  # all of them exist, which the compiler needs to know for wide loads along the keys
        k_idx = tl.max_contiguous(tl.multiple_of(k0 + tl.arange(0, BLOCK), BLOCK), BLOCK)
        near = k_idx
    return k0, k_idx, place(call[0][1], rows[3], rows[4], rows[0][:, None], near[None, :], call[1], call[2], FLAGS)


@jit
def seen_keys(k_idx, at, rows, call, PREDICATES: tl.constexpr):
    """Which pairs of a key tile are visible. # [BLOCK_Q, BLOCK_K]"""
    seen = (k_idx[None, :] >= rows[1][:, None]) & (k_idx[None, :] < rows[2][:, None])
    near = tl.minimum(k_idx, call[1][1] - 1)
    return predicates(seen, call[0][0], at, rows[0][:, None], near[None, :], PREDICATES)


@jit
def query_tile(step, run, columns, call, FLAGS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(first row, rows, place [BLOCK_K, BLOCK_Q]) of the tile at a step of a run over rows."""
    q0 = first_index(step, run, FLAGS, BLOCK, MASKED)
    q_idx = q0 + tl.arange(0, BLOCK)
    near, near_k = q_idx, columns[0]
    if MASKED:
        near, near_k = tl.minimum(q_idx, call[1][0] - 1), tl.minimum(columns[0], call[1][1] - 1)
    return q0, q_idx, place(call[0][1], columns[2], columns[3], near[None, :], near_k[:, None], call[1], call[2], FLAGS)


@jit
def seen_queries(q_idx, at, columns, call, FLAGS: tl.constexpr, PREDICATES: tl.constexpr):
    """Which pairs of a query tile are visible. # [BLOCK_K, BLOCK_Q]"""
    n_q = call[1][0]
    start, stop = row_spans(call[0][0], columns[1], columns[2], columns[3], q_idx, q_idx < n_q, call[1], FLAGS)
    seen = (columns[0][:, None] >= start[None, :]) & (columns[0][:, None] < stop[None, :])
    near, near_k = tl.minimum(q_idx, n_q - 1), tl.minimum(columns[0], call[1][1] - 1)
    return predicates(seen, call[0][0], at, near[None, :], near_k[:, None], PREDICATES)

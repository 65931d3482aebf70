"""How a pass walks over the tiles of the other side: which tiles it visits, where each stands, what of it is seen.

A walk is (lo, full_lo, full_hi, hi): tiles from lo to hi, of which those from full_lo to full_hi have no hidden pair. It is
made in two runs (from, to, jump_at, jump), the full tiles first and then those on both sides of them: steps are first indices
of tiles, and tiles from jump_at on are moved by jump. Where there is a tile map (FLAGS[9], kernels/dense.py) a walk is (list,
full tiles, mixed tiles, tiles, shown keys) and a run (from, to, list, shown keys): the tile at a step is entry step // BLOCK of
the list.

rows is (q_idx, start, stop, b, h) of a tile of rows and one of its spans; columns is (k_idx, r, b, h) of a tile of keys and the
number of a span. call is (data, size, n_b), and data (mask, coords, scores, dropout).
"""

from .chain import place
from .masks import WORD, functions, key_range, parts, row_range, span_bits, spans_of_columns, spread, tile_bits
from .shim import jit, tl


@jit
def listed(lists, r, b, h, tile, n_own, n):
    """The walk of a tile, one of n_own, and a span: a list of up to n tiles, full ones at its front, mixed ones at its back."""
    own = (b * lists[1] + h * lists[2] + r) * n_own + tile
    at = lists[0] + own * (n + 2)
    return at + 2, tl.load(at), tl.load(at + 1), n, own * n


@jit
def key_walk(mask, r, b, h, q0, start, stop, ok, size, FLAGS: tl.constexpr, PREDICATES: tl.constexpr, BLOCKS: tl.constexpr):
    """(walk over the key tiles of the rows from q0 on, first, last): keys [first, last) are those that it may load."""
    lo, full_lo, full_hi, hi, first, last = key_range(start, stop, ok, size[1], BLOCKS[1], len(PREDICATES) > 0)
    if FLAGS[9]:
        q_tiles, k_tiles = tl.cdiv(size[0], BLOCKS[0]), tl.cdiv(size[1], BLOCKS[1])
        tiles = listed(mask[2], r, b, h, q0 // BLOCKS[0], q_tiles, k_tiles)
        if FLAGS[9] == 1:
            tiles = (tiles[0], tiles[1], tiles[2], tiles[3], mask[2][3] + tiles[4] * parts(BLOCKS[1]))
        return tiles, first, last
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
def keys_shown(step, run, FLAGS: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr):
    """(which keys of the tile at a step of a run any row sees,), or () where all may be read, or nobody knows. # [BLOCK_K]"""
    if MASKED and FLAGS[9] == 1:
        at = run[3] + step // BLOCK_K * parts(BLOCK_K)
        words = ()
        for part in tl.static_range((BLOCK_K + WORD - 1) // WORD):
            words = words + (tl.load(at + part),)  # type: ignore[assignment]
        return (spread(words, tl.arange(0, BLOCK_K)),)
    else:
        return ()


@jit
def run_of(walk, FLAGS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """One of the two runs of a walk."""
    if FLAGS[9]:
        if MASKED:
            return (walk[3] - walk[2]) * BLOCK, walk[3] * BLOCK, walk[0], walk[4]
        else:
            return 0, walk[1] * BLOCK, walk[0], walk[4]
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
def seen_keys(k0, k_idx, at, rows, call, FLAGS: tl.constexpr, PREDICATES: tl.constexpr):
    """Which pairs of a key tile are visible. # [BLOCK_Q, BLOCK_K]"""
    BLOCK_K: tl.constexpr = k_idx.shape[0]
    if FLAGS[9]:  # WORD keys at once
        found = tile_bits(call[0][0][1], rows[3], rows[4], rows[0][:, None], k0, PREDICATES, BLOCK_K)
        words = ()
        for part in tl.static_range(len(found)):
            in_span = span_bits(rows[1][:, None], rows[2][:, None], k0 + part * WORD)
            words = words + (in_span & found[part],)  # type: ignore[assignment]
        seen = spread(words, tl.arange(0, BLOCK_K)[None, :])
    else:
        seen = (k_idx[None, :] >= rows[1][:, None]) & (k_idx[None, :] < rows[2][:, None])
    return functions(seen, at, PREDICATES)


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
def seen_queries(q0, q_idx, at, columns, call, FLAGS: tl.constexpr, PREDICATES: tl.constexpr):
    """Which pairs of a query tile are visible. # [BLOCK_K, BLOCK_Q]"""
    seen = spans_of_columns(call[0][0], columns[1], columns[2], columns[3], q_idx, columns[0], call[1], FLAGS)
    if FLAGS[9]:  # mask[1] has turned bits, WORD rows at once
        BLOCK_Q: tl.constexpr = q_idx.shape[0]
        near = tl.minimum(columns[0], call[1][1] - 1)[:, None]
        words = tile_bits(call[0][0][1], columns[2], columns[3], near, q0, PREDICATES, BLOCK_Q)
        seen = seen & spread(words, tl.arange(0, BLOCK_Q)[None, :])
    return functions(seen, at, PREDICATES)

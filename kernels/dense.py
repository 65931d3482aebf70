"""The tile map of bool masks: which tiles are empty, full or mixed, in two small passes on the device.

    cell_map     one byte per cell of CELL x CELL pairs: 1 if any is visible, plus 2 if any is hidden, over all bool tensors
    tile_lists   for every tile of a pass the tiles of the other side that it visits, spans included: plain ones, then mixed

Cells are smaller than any tile and divide it, so one map serves passes of any tile size. FLAGS[9] is 1 with a map, 2 with one
and predicates that it does not know of; FLAGS[10] and [11] say whether it tells rows, and keys, apart. mask[2] of a pass is
(lists, how many spans an entry and a head are apart), or, where a kernel asks tile by tile, (cells, how many planes they are).
"""

from .masks import key_range, row_range, row_spans, shown
from .shim import jit, kernel, tl

CELL = tl.constexpr(16)


@jit
def any_in_cell(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether a cell holds anything. # bool [BLOCK_Q, BLOCK_K] -> int32 [BLOCK_Q / CELL, BLOCK_K / CELL]"""
    x = tl.reshape(x.to(tl.int32), [BLOCK_Q // CELL, CELL, BLOCK_K // CELL, CELL])
    return tl.max(tl.max(x, 3), 1)


@kernel
def cell_map(mask, cells, n_q, n_k, n_h, PREDICATES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The cells of one block of rows and keys. cells: (entries, n_h, cdiv(n_q, CELL), cdiv(n_k, CELL)), contiguous."""
    k_blocks, k_cells = tl.cdiv(n_k, BLOCK_K), tl.cdiv(n_k, CELL)
    n_blocks, q_cells = tl.cdiv(n_q, BLOCK_Q) * k_blocks, tl.cdiv(n_q, CELL)
    block, head = tl.program_id(0) % n_blocks, (tl.program_id(0) // n_blocks).to(tl.int64)
    q0, k0 = block // k_blocks * BLOCK_Q, block % k_blocks * BLOCK_K
    q_idx, k_idx = q0 + tl.arange(0, BLOCK_Q)[:, None], k0 + tl.arange(0, BLOCK_K)[None, :]
    inside = (q_idx < n_q) & (k_idx < n_k)
    near_q, near_k = tl.minimum(q_idx, n_q - 1), tl.minimum(k_idx, n_k - 1)
    seen = shown(inside, mask, head // n_h, head % n_h, near_q, near_k, PREDICATES)
    some = any_in_cell(seen, BLOCK_Q, BLOCK_K)
    hidden = any_in_cell(inside & (seen == 0), BLOCK_Q, BLOCK_K)
    q_cell, k_cell = q0 // CELL + tl.arange(0, BLOCK_Q // CELL)[:, None], k0 // CELL + tl.arange(0, BLOCK_K // CELL)[None, :]
    to = cells + (head * q_cells + q_cell) * k_cells + k_cell
    tl.store(to, (some + 2 * hidden).to(tl.int8), mask=(q_cell < q_cells) & (k_cell < k_cells))


@jit
def tile_class(tile_map, b, h, q_tile, k_tile, size, FLAGS: tl.constexpr, BLOCKS: tl.constexpr):
    """(whether any pair of a tile is visible, whether any is hidden), of tiles by number. # [CHUNK]"""
    PER_Q: tl.constexpr = BLOCKS[0] // CELL
    PER_K: tl.constexpr = BLOCKS[1] // CELL
    q_cells, k_cells = tl.cdiv(size[0], CELL), tl.cdiv(size[1], CELL)
    cell = tl.arange(0, PER_Q * PER_K)[None, :]
    q_cell, k_cell = (q_tile * PER_Q)[:, None] + cell // PER_K, (k_tile * PER_K)[:, None] + cell % PER_K
    inside = (q_cell < q_cells) & (k_cell < k_cells)
    if not FLAGS[10]:
        q_cell, q_cells = q_cell * 0, q_cells * 0 + 1
    if not FLAGS[11]:
        k_cell, k_cells = k_cell * 0, k_cells * 0 + 1
    at = ((b * tile_map[1] + h * tile_map[2]) * q_cells + q_cell) * k_cells + k_cell
    found = tl.load(tile_map[0] + at, mask=inside, other=0).to(tl.int32)
    return tl.max(found & 1, 1) > 0, tl.max(found, 1) > 1


@kernel
def tile_lists(
    mask, tile_map, lists, n_q, n_k, start, stop, q_at, k_at, n_h, FLAGS: tl.constexpr, SPANS: tl.constexpr,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of one tile and span: how many are plain, how many mixed; plain tiles from the front, mixed from the back.

    A tile is plain where its span and the tensors hide nothing, and there is no other predicate (then FLAGS[9] is 2). lists,
    int32: (entries, n_h, SPANS, tiles, 2 + tiles of the other side). COLUMNS: for tiles of keys, else for tiles of rows.
    """
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    BLOCK_K: tl.constexpr = BLOCKS[1]
    size = (n_q, n_k, start, stop, q_at, k_at)
    BLOCK: tl.constexpr = BLOCK_Q if COLUMNS else BLOCK_K
    q_tiles, k_tiles = tl.cdiv(n_q, BLOCK_Q), tl.cdiv(n_k, BLOCK_K)
    if COLUMNS:
        n_own, n = k_tiles, q_tiles
    else:
        n_own, n = q_tiles, k_tiles
    own, spans = tl.program_id(0) % n_own, (tl.program_id(0) // n_own).to(tl.int64)
    r, b, h = spans % SPANS, spans // SPANS // n_h, spans // SPANS % n_h
    if COLUMNS:
        lo, full_lo, full_hi, hi = row_range(mask, r, b, h, own * BLOCK_K, size, FLAGS, False, BLOCK_Q, BLOCK_K)
    else:
        q_idx = own * BLOCK_Q + tl.arange(0, BLOCK_Q)
        first, last = row_spans(mask, r, b, h, q_idx, q_idx < n_q, size, FLAGS)
        lo, full_lo, full_hi, hi, _, _ = key_range(first, last, q_idx < n_q, n_k, BLOCK_K, False)
    to = lists + (spans * n_own + own) * (n + 2)
    plain, mixed = 0, 0
    for at in tl.range(lo // BLOCK, tl.cdiv(hi, BLOCK), CHUNK):
        tile = at + tl.arange(0, CHUNK)
        same = own + tl.zeros([CHUNK], tl.int32)
        if COLUMNS:
            some, hidden = tile_class(tile_map, b, h, tile, same, size, FLAGS, BLOCKS)
        else:
            some, hidden = tile_class(tile_map, b, h, same, tile, size, FLAGS, BLOCKS)
        some = some & (tile * BLOCK < hi)
        full = some & (hidden == 0) & (tile * BLOCK >= full_lo) & (tile * BLOCK < full_hi)
        if FLAGS[9] == 2:
            full = full & False
        rest = (some & (full == 0)).to(tl.int32)
        full = full.to(tl.int32)
        tl.store(to + 1 + plain + tl.cumsum(full, 0), tile, mask=full > 0)
        tl.store(to + 2 + n - mixed - tl.cumsum(rest, 0), tile, mask=rest > 0)
        plain += tl.sum(full, 0)
        mixed += tl.sum(rest, 0)
    tl.store(to, plain)
    tl.store(to + 1, mixed)

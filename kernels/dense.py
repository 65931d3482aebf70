"""Bool masks as bits, and the map of their tiles: which are empty, full or mixed. Small passes on the device.

    pack_bits    a bit per pair, of every bool tensor: the only pass that reads its bytes
    turn_bits    those bits transposed, for passes of tiles of keys
    cell_map     one byte per cell of CELL x CELL pairs: 1 if any is visible, plus 2 if any is hidden, over all bool tensors
    tile_lists   for every tile of a pass the tiles of the other side that it visits, spans included: plain ones, then mixed
    shown_keys   beside the lists of a pass over keys, a bit per key of every mixed tile: whether any row sees it

Cells are smaller than any tile and divide it, so one map serves passes of any tile size. FLAGS[9] is 1 with a map, 2 with one
and predicates that it does not know of; FLAGS[10] and [11] say whether it tells rows, and keys, apart. mask[2] of a pass is
(lists, how many spans an entry and a head are apart), followed over keys by what `shown_keys` made, unless FLAGS[9] is 2; or,
where a kernel asks tile by tile, (cells, how many planes they are).
"""

from .masks import WORD, dense_bits, key_range, parts, plane_of, plane_offset, row_range, row_spans, span_bits
from .shim import jit, kernel, tl

CELL = tl.constexpr(16)


@jit
def row_words(n_k):
    """int32 words of a row of bits: padded, so that any tile's words exist and a stride tells the compiler the same always."""
    return tl.cdiv(n_k, 16 * WORD) * 16


@kernel
def pack_bits(x, strides, wide, words, n_q, n_k, n_h, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The bits of one block of rows and keys, bit k % WORD of word k // WORD: 0 behind the last key, but where one key stands
    for all of them each bit is that one.

    x: uint8 (entries, n_h, n_q, n_k) with plane_strides and wide_plane. words: (entries, n_h, n_q, row_words), contiguous.
    """
    k_blocks = tl.cdiv(row_words(n_k) * WORD, BLOCK_K)
    n_blocks = tl.cdiv(n_q, BLOCK_Q) * k_blocks
    block, head = tl.program_id(0) % n_blocks, (tl.program_id(0) // n_blocks).to(tl.int64)
    q0, k0 = block // k_blocks * BLOCK_Q, block % k_blocks * BLOCK_K
    q_idx, k_idx = q0 + tl.arange(0, BLOCK_Q)[:, None], k0 + tl.arange(0, BLOCK_K)[None, :]
    inside = (q_idx < n_q) & ((k_idx < n_k) | (n_k == 1))
    at = plane_of(x, head // n_h, head % n_h, strides) + plane_offset(q_idx, k_idx, strides, wide)
    store_bits(tl.load(at, mask=inside, other=0) != 0, words, head, q_idx, k0, n_q, n_k, BLOCK_Q, BLOCK_K)


@kernel
def turn_bits(bits, strides, wide, words, n_q, n_k, n_h, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """What `pack_bits` would make of the transpose, from what it made: of one block of keys, which are rows here, and rows.

    bits, strides, wide: as in mask[1]. words: (entries, n_h, n_k, row_words of n_q), contiguous.
    """
    q_blocks = tl.cdiv(row_words(n_q) * WORD, BLOCK_Q)
    n_blocks = tl.cdiv(n_k, BLOCK_K) * q_blocks
    block, head = tl.program_id(0) % n_blocks, (tl.program_id(0) // n_blocks).to(tl.int64)
    k0, q0 = block // q_blocks * BLOCK_K, block % q_blocks * BLOCK_Q
    k_idx, q_idx = k0 + tl.arange(0, BLOCK_K)[:, None], q0 + tl.arange(0, BLOCK_Q)[None, :]
    inside = (k_idx < n_k) & ((q_idx < n_q) | (n_q == 1))
    at = plane_of(bits, head // n_h, head % n_h, strides) + plane_offset(q_idx, k_idx // WORD, strides, wide)
    shown = (tl.load(at, mask=inside, other=0) >> k_idx % WORD) & 1 != 0
    store_bits(shown, words, head, k_idx, q0, n_k, n_q, BLOCK_K, BLOCK_Q)


@jit
def store_bits(shown, words, head, q_idx, k0, n_q, n_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pack a block (BLOCK_Q, BLOCK_K) along its keys, and write the words of its rows q_idx (BLOCK_Q, 1)."""
    bits = shown.to(tl.int32) << (tl.arange(0, BLOCK_K) % WORD)[None, :]
    packed = tl.sum(tl.reshape(bits, [BLOCK_Q, BLOCK_K // WORD, WORD]), 2)
    word = k0 // WORD + tl.arange(0, BLOCK_K // WORD)[None, :]
    to = words + (head * n_q + q_idx) * row_words(n_k) + word
    tl.store(to, packed, mask=(q_idx < n_q) & (word < row_words(n_k)))


@jit
def any_in_cells(bits, BLOCK_Q: tl.constexpr, WORDS: tl.constexpr):
    """Whether a cell holds a bit, of the cells in the lower and in the upper half of words. # 2 x [BLOCK_Q / CELL, WORDS]"""
    bits = tl.reshape(bits, [BLOCK_Q // CELL, CELL, WORDS])
    low, high = (bits & 0xFFFF) != 0, ((bits >> CELL) & 0xFFFF) != 0
    return tl.max(low.to(tl.int32), 1), tl.max(high.to(tl.int32), 1)


@kernel
def cell_map(bits, cells, n_q, n_k, n_h, PREDICATES: tl.constexpr, BLOCK_Q: tl.constexpr, WORDS: tl.constexpr):
    """The cells of one block of rows and words. cells: (entries, n_h, cdiv(n_q, CELL), cdiv(n_k, CELL)), contiguous."""
    k_blocks, k_cells = tl.cdiv(n_k, WORDS * WORD), tl.cdiv(n_k, CELL)
    n_blocks, q_cells = tl.cdiv(n_q, BLOCK_Q) * k_blocks, tl.cdiv(n_q, CELL)
    block, head = tl.program_id(0) % n_blocks, (tl.program_id(0) // n_blocks).to(tl.int64)
    q0, first = block // k_blocks * BLOCK_Q, block % k_blocks * WORDS
    q_idx, word = q0 + tl.arange(0, BLOCK_Q)[:, None], first + tl.arange(0, WORDS)[None, :]
    exists = tl.where(q_idx < n_q, span_bits(0, n_k, word * WORD), 0)  # bits of pairs that there are
    seen = exists & dense_bits(bits, head // n_h, head % n_h, tl.minimum(q_idx, n_q - 1), word * WORD, PREDICATES)
    some_low, some_high = any_in_cells(seen, BLOCK_Q, WORDS)
    hidden_low, hidden_high = any_in_cells(exists & ~seen, BLOCK_Q, WORDS)
    q_cell, k_cell = q0 // CELL + tl.arange(0, BLOCK_Q // CELL)[:, None], (first + tl.arange(0, WORDS)[None, :]) * 2
    to = cells + (head * q_cells + q_cell) * k_cells + k_cell
    tl.store(to, (some_low + 2 * hidden_low).to(tl.int8), mask=(q_cell < q_cells) & (k_cell < k_cells))
    tl.store(to + 1, (some_high + 2 * hidden_high).to(tl.int8), mask=(q_cell < q_cells) & (k_cell + 1 < k_cells))


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


@jit
def either(a, b):
    return a | b


@kernel
def shown_keys(
    mask, tile_list, to, n_q, n_k, start, stop, q_at, k_at, n_h, FLAGS: tl.constexpr, PREDICATES: tl.constexpr,
    SPANS: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Which keys of its mixed tiles any row of one tile of rows sees through one span: a hidden key may hold anything.

    tile_list: as in mask[2] of a pass over keys. to, int32: (entries, n_h, SPANS, tiles of rows, tiles of keys, PARTS), where
    the lists have their tiles; PARTS words, or the lower half of one, are a tile's. CHUNK words are made at once.
    """
    BLOCK_K: tl.constexpr = BLOCKS[1]
    PARTS: tl.constexpr = parts(BLOCK_K)
    size = (n_q, n_k, start, stop, q_at, k_at)
    q_tiles, k_tiles = tl.cdiv(n_q, BLOCKS[0]), tl.cdiv(n_k, BLOCK_K)
    own, spans = tl.program_id(0) % q_tiles, (tl.program_id(0) // q_tiles).to(tl.int64)
    r, b, h = spans % SPANS, spans // SPANS // n_h, spans // SPANS % n_h
    q_idx = own * BLOCKS[0] + tl.arange(0, BLOCKS[0])
    first, last = row_spans(mask, r, b, h, q_idx, q_idx < n_q, size, FLAGS)
    near = tl.minimum(q_idx, n_q - 1)[:, None]
    tiles = tile_list[0] + ((b * tile_list[1] + h * tile_list[2] + r) * q_tiles + own) * (k_tiles + 2)
    to += (spans * q_tiles + own) * k_tiles * PARTS
    for at in tl.range((k_tiles - tl.load(tiles + 1)) * PARTS, k_tiles * PARTS, CHUNK):
        word = at + tl.arange(0, CHUNK)
        key = tl.load(tiles + 2 + word // PARTS, mask=word < k_tiles * PARTS, other=0) * BLOCK_K + word % PARTS * WORD
        bits = span_bits(first[:, None], last[:, None], key[None, :])
        bits = bits & dense_bits(mask[1], b, h, near, key[None, :], PREDICATES)
        tl.store(to + word, tl.reduce(bits, 0, either), mask=word < k_tiles * PARTS)

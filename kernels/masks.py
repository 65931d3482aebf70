"""Which keys a row sees: R spans [start, stop) of keys per row, and predicates on top. Hence which tiles a kernel visits.

For a tile of rows:   seen = [min start, max stop)     keys outside are never visited
                      full = [max start, min stop)     tiles of keys inside need no masking

FLAGS are (rows, row_start, row_stop), four of the coordinates (kernels/chain.py), two of dropout, three of bool tensors
(kernels/dense.py), and the PAIRS of kernels/tiles.py. With `rows`, mask[0] holds int32 tensors (start, stop) and how many spans
an entry and a head are apart; else R is 1 and a bound is `row * i + constant`, the constant an int (in `size`) or a tensor by
entry. PREDICATES are functions of coordinates, or None for a bool tensor, whose bits (kernels/dense.py; turned, with rows for
keys, in a pass of tiles of keys) are in mask[1] with their strides and with None, or 1 where an offset inside a plane of them
needs 64 bits. mask[2] is what a pass needs beside: () or, for the columns of `rows`, the table of `span_bounds` with strides
by entry and head in it; with a tile map what kernels/dense.py has.
size is (n_q, n_k, start, stop, q_at, k_at).
"""

from .shim import jit, kernel, tl

WORD = tl.constexpr(32)  # bits of a word of a bool tensor
BEYOND = tl.constexpr((1 << 31) - 1)  # no key has this index


@jit
def affine_bound(data, which: tl.constexpr, b, size):
    """The constant of a bound: an int, or an entry's element of a tensor."""
    if data[which] is None:
        return size[2 + which]
    else:
        return tl.load(data[which] + b * data[2 + which])


@jit
def row_spans(mask, r, b, h, q_idx, ok, size, FLAGS: tl.constexpr):
    """(start, stop) of span r of the rows q_idx, within [0, n_k]; rows with ok=False see nothing. # [BLOCK_Q]"""
    data = mask[0]
    if FLAGS[0]:
        at = (b * data[2] + h * data[3] + r) * size[0] + q_idx
        return tl.load(data[0] + at, mask=ok, other=0), tl.load(data[1] + at, mask=ok, other=0)
    else:
        start = q_idx * FLAGS[1] + affine_bound(data, 0, b, size)
        stop = q_idx * FLAGS[2] + affine_bound(data, 1, b, size)
        start = tl.minimum(tl.maximum(start, 0), size[1])
        stop = tl.maximum(tl.minimum(stop, size[1]), start)
        return tl.where(ok, start, 0), tl.where(ok, stop, 0)


@jit
def spans_of_columns(mask, r, b, h, q_idx, k_idx, size, FLAGS: tl.constexpr):
    """Which of the keys k_idx the rows q_idx see through span r; rows that do not exist see none. # [BLOCK_K, BLOCK_Q]

    With fewer operations a row than `row_spans`: here each of them is one for every thread that has a pair of the row.
    """
    ok = q_idx < size[0]
    if FLAGS[0]:
        start, stop = row_spans(mask, r, b, h, q_idx, ok, size, FLAGS)
    else:
        start = tl.where(ok, q_idx * FLAGS[1] + affine_bound(mask[0], 0, b, size), BEYOND)
        stop = q_idx * FLAGS[2] + affine_bound(mask[0], 1, b, size)
        k_idx = tl.where(k_idx < size[1], k_idx, BEYOND)
    return (k_idx[:, None] >= start[None, :]) & (k_idx[:, None] < stop[None, :])


@jit
def parts(BLOCK: tl.constexpr):
    """Words that hold a bit per key, or row, of a tile."""
    return BLOCK // WORD if BLOCK > WORD else 1


@jit
def spread(words, index):
    """Which bits of a tile's words, of which there are `parts`, are set; index counts the tile's keys, or rows, from 0."""
    word = words[0]
    for part in tl.static_range(1, len(words)):
        word = tl.where(index >= part * WORD, words[part], word)
    return (word >> index % WORD) & 1 != 0


@jit
def span_bits(start, stop, key):
    """A bit for each of WORD keys from `key` on: whether it is in [start, stop)."""
    lo, hi = tl.minimum(tl.maximum(start - key, 0), WORD), tl.minimum(tl.maximum(stop - key, 0), WORD)
    return below(hi) & ~below(lo)


@jit
def below(n):
    """The lowest n bits of WORD."""
    return tl.where(n == WORD, -1, (1 << n % WORD) - 1)


@jit
def aligned(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr, PREDICATED: tl.constexpr):
    """[lo, hi) and the run inside it that needs no mask, in whole tiles; the four ends come back in order."""
    lo = lo // BLOCK * BLOCK
    hi = tl.maximum(hi, lo)
    full_lo = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK) * BLOCK, lo), hi)
    full_hi = tl.maximum(tl.minimum(full_hi, hi) // BLOCK * BLOCK, full_lo)
    if PREDICATED:
        full_hi = full_lo
    return lo, full_lo, full_hi, hi


@jit
def key_range(start, stop, ok, n_k, BLOCK_K: tl.constexpr, PREDICATED: tl.constexpr):
    """The ends (seen, full, full, seen) of the key tiles of a tile of rows, and the keys [first, last) that it may load."""
    some = ok & (stop > start)
    first = tl.min(tl.where(some, start, n_k))
    last = tl.max(tl.where(some, stop, 0))
    full_lo = tl.max(tl.where(ok, start, 0))
    full_hi = tl.min(tl.where(ok, stop, n_k))
    lo, full_lo, full_hi, hi = aligned(first, full_lo, full_hi, last, BLOCK_K, PREDICATED)
    return lo, full_lo, full_hi, hi, first, last


@jit
def affine_rows(mask, b, k_lo, k_hi, size, FLAGS: tl.constexpr):
    """Rows [first, last) that see any of the keys [k_lo, k_hi), and rows [full_lo, full_hi) that see all of them."""
    n_q = size[0]
    start, stop = affine_bound(mask[0], 0, b, size), affine_bound(mask[0], 1, b, size)
    k_end = tl.minimum(k_hi, size[1])
    if FLAGS[1] == 1:  # start = i + c
        last, full_hi = k_end - start, k_lo - start + 1
    else:
        last, full_hi = tl.where(start < k_end, n_q, 0), tl.where(start <= k_lo, n_q, 0)
    if FLAGS[2] == 1:  # stop = i + c
        first, full_lo = k_lo - stop + 1, k_end - stop
    else:
        first, full_lo = tl.where(stop > k_lo, 0, n_q), tl.where(stop >= k_end, 0, n_q)
    first, last = tl.maximum(first, 0), tl.maximum(tl.minimum(last, n_q), 0)
    return first, tl.maximum(full_lo, 0), tl.maximum(tl.minimum(full_hi, n_q), 0), last


@jit
def row_range(
    mask, r, b, h, k0, size, FLAGS: tl.constexpr, PREDICATED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The ends (seen, full, full, seen) of the query tiles that see the key tile at k0 through span r.

    None of them is full where some of the tile's keys do not exist: there is nothing to look up beyond the last one.
    """
    if FLAGS[0]:
        n_tiles = tl.cdiv(size[1], BLOCK_K)
        at = mask[2][0] + ((b * mask[2][1] + h * mask[2][2] + r) * n_tiles + k0 // BLOCK_K) * 4
        first, full_lo, full_hi, last = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    else:
        first, full_lo, full_hi, last = affine_rows(mask, b, k0, k0 + BLOCK_K, size, FLAGS)
    first, full_lo, full_hi, last = aligned(first, full_lo, full_hi, last, BLOCK_Q, PREDICATED)
    return first, full_lo, tl.where(k0 + BLOCK_K <= size[1], full_hi, full_lo), last


@kernel
def span_bounds(start_ptr, stop_ptr, bounds, n_q, n_k, n_tiles, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Per row of spans and key tile: (first, full_lo, full_hi, last) as `affine_rows` has them, into bounds (S, tiles, 4).

    Rows from full_lo to full_hi see the whole tile, whatever the order of the spans; [first, last) is the exact hull.
    """
    tile, spans = tl.program_id(0) % n_tiles, (tl.program_id(0) // n_tiles).to(tl.int64)
    k_lo, k_hi = tile * BLOCK_K, tl.minimum(tile * BLOCK_K + BLOCK_K, n_k)
    first, last = tl.full([BLOCK], n_q, tl.int32), tl.full([BLOCK], 0, tl.int32)
    full_lo, full_hi = tl.full([BLOCK], 0, tl.int32), tl.full([BLOCK], n_q, tl.int32)
    for at in tl.range(0, n_q, BLOCK):
        row = at + tl.arange(0, BLOCK)
        ok = row < n_q
        start = tl.load(start_ptr + spans * n_q + row, mask=ok, other=0)
        stop = tl.load(stop_ptr + spans * n_q + row, mask=ok, other=0)
        some = (start < k_hi) & (stop > k_lo) & (start < stop)
        first = tl.where(some, tl.minimum(first, row), first)
        last = tl.where(some, row + 1, last)
        full_lo = tl.where(ok & (stop < k_hi), row + 1, full_lo)
        full_hi = tl.where(ok & (start > k_lo), tl.minimum(full_hi, row), full_hi)
    to = bounds + (spans * n_tiles + tile) * 4
    tl.store(to, tl.min(first))
    tl.store(to + 1, tl.max(full_lo))
    tl.store(to + 2, tl.min(full_hi))
    tl.store(to + 3, tl.max(last))


@jit
def plane_of(x, b, h, strides):
    """Where the plane of an entry and a head begins; both strides are pairs that add up (scores/base.py says why)."""
    return x + b * (strides[0][0] + strides[0][1]) + h * (strides[1][0] + strides[1][1])


@jit
def plane_offset(q, k, strides, wide):
    """Where (q, k) is in a plane with strides[2:]: 32 bits, half the registers of 64, unless `wide` is given."""
    if wide is None:
        return q * strides[2] + k * strides[3]
    else:
        return q.to(tl.int64) * strides[2] + k.to(tl.int64) * strides[3]


@jit
def always(b, h, q_idx, k_idx):
    """A predicate that hides nothing: with one no tile goes without its mask, and tiles come in one order."""
    return k_idx == k_idx


@jit
def dense_bits(bits, b, h, q_idx, key, PREDICATES: tl.constexpr):
    """A bit for each of WORD keys from `key` on: whether every bool tensor shows it. Turned bits: rows for keys."""
    found = -1
    for i in tl.static_range(len(PREDICATES)):
        if PREDICATES[i] is None:
            x = plane_of(bits[i][0], b, h, bits[i][1]) + plane_offset(q_idx, key // WORD, bits[i][1], bits[i][2])
            found = found & (tl.load(x) >> key % WORD)
    return found


@jit
def tile_bits(bits, b, h, q_idx, first, PREDICATES: tl.constexpr, BLOCK: tl.constexpr):
    """`dense_bits` of the BLOCK keys from `first` on, a multiple of BLOCK, in a tuple of words."""
    words = ()
    for part in tl.static_range((BLOCK + WORD - 1) // WORD):  # `parts`, whose result Triton 3.6 takes for no constant
        words = words + (dense_bits(bits, b, h, q_idx, first + part * WORD, PREDICATES),)  # type: ignore[assignment]
    return words


@jit
def functions(seen, at, PREDICATES: tl.constexpr):
    """`seen` and every predicate that is a function."""
    for i in tl.static_range(len(PREDICATES)):
        if PREDICATES[i] is not None:
            seen = seen & PREDICATES[i](at[0], at[1], at[2], at[3])
    return seen

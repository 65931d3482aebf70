"""Tiles in memory: addresses, loads, stores and products. Everything a kernel reads of q, k, v and their like passes here.

Offsets of an entry, a head and a tile's first row are int64; offsets inside a tile are int32 (the launcher sees to it
that they fit). A matrix is padded to PADDED columns with zeros; DIM of them exist.
"""

from .shim import UPCAST, jit, tl


@jit
def head_of(x, b, h, strides):
    """The (L, D) matrix of batch entry b and head h; strides are (batch, head, row, column)."""
    return x + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]


@jit
def row_pointers(x, first, strides, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Addresses of rows first to first + ROWS. # [ROWS, PADDED]"""
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    return x + first.to(tl.int64) * strides[2] + (row[:, None] * strides[2] + column[None, :] * strides[3])


@jit
def load_rows(
    x, first, strides, lo, hi, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows first to first + ROWS; MASKED: zero outside of [lo, hi). # [ROWS, PADDED]"""
    at = row_pointers(x, first, strides, ROWS, PADDED)
    row = first + tl.arange(0, ROWS)
    if MASKED:
        inside = ((row >= lo) & (row < hi))[:, None]
        if PADDED != DIM:
            inside = inside & (tl.arange(0, PADDED) < DIM)[None, :]
        return tl.load(at, mask=inside, other=0.0)
    elif PADDED != DIM:
        return tl.load(at, mask=(tl.arange(0, PADDED) < DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@jit
def mean_row(x, first, strides, lo, hi, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The mean of the rows of a tile that are in [lo, hi); what is not finite (a hidden key may be) counts as 0. # [PADDED]"""
    tile = load_rows(x, first, strides, lo, hi, ROWS, DIM, PADDED, True).to(tl.float32)
    tile = tl.where(tl.abs(tile) < float("inf"), tile, 0.0)
    n = tl.minimum(first + ROWS, hi) - tl.maximum(first, lo)
    return tl.sum(tile, 0) / tl.maximum(n, 1).to(tl.float32)


@jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 x in DTYPE, to nearest, half to even."""
    if UPCAST and tl.bfloat16 == DTYPE:  # the interpreter would cut the low bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@jit
def store_rows(x, value, first, strides, n, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Write the rows below n of value [ROWS, PADDED] in x's dtype."""
    at = row_pointers(x, first, strides, ROWS, PADDED)
    inside = (first + tl.arange(0, ROWS) < n)[:, None] & (tl.arange(0, PADDED) < DIM)[None, :]
    tl.store(at, rounded(value, x.dtype.element_ty), mask=inside)


@jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@jit
def dot_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def program_tile(n, n_h, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(first index of the program's tile, entry, head): tiles of a head are neighbours, so its keys stay in the cache."""
    n_tiles = tl.cdiv(n, BLOCK)
    tile, head = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    return tile * BLOCK, (head // n_h).to(tl.int64), (head % n_h).to(tl.int64)

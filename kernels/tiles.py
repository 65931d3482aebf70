"""Tiles in memory: addresses, loads, stores and products. Everything a kernel reads of q, k, v and their like passes here.

Offsets of an entry, a head and a tile's first row are int64; offsets inside a tile are int32 (the launcher sees to it
that they fit). A matrix is padded to PADDED columns with zeros; DIM of them exist.

Where PADDED < DIM, registers do not hold whole rows: the head_dim is split. A tile then stays in memory, as (addresses of its
rows, which of them exist, column stride); products over the head_dim sum slices of PADDED columns, in one order; and a program
owns one slice of every result, that of its second program id. What rows share is computed by all of them, and written by one.
"""

from .shim import UPCAST, jit, tl

# float32 $3 and $4 to a register of both in bfloat16, and to what they are then in float32
PAIR = tl.constexpr("cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;")


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
    """Rows first to first + ROWS; MASKED: zero outside of [lo, hi). # [ROWS, PADDED], or a tile in memory"""
    return load_some(x, first, strides, lo, hi, (), ROWS, DIM, PADDED, MASKED)


@jit
def load_some(
    x, first, strides, lo, hi, some, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """The same, where MASKED only of rows for which `some`, () or (bool [ROWS],), is true."""
    if PADDED < DIM:
        rows = tl.arange(0, ROWS)
        inside = (first + rows >= lo) & (first + rows < hi)
        if len(some) > 0:
            inside = inside & some[0]
        return x + first.to(tl.int64) * strides[2] + rows * strides[2], inside, strides[3]
    else:
        at = row_pointers(x, first, strides, ROWS, PADDED)
        row = first + tl.arange(0, ROWS)
        if MASKED:
            inside = (row >= lo) & (row < hi)
            if len(some) > 0:
                inside = inside & some[0]
            inside = inside[:, None]
            if PADDED != DIM:
                inside = inside & (tl.arange(0, PADDED) < DIM)[None, :]
            return tl.load(at, mask=inside, other=0.0)
        elif PADDED != DIM:
            return tl.load(at, mask=(tl.arange(0, PADDED) < DIM)[None, :], other=0.0)
        else:
            return tl.load(at)


@jit
def slice_of(tile, column, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Columns column to column + PADDED of a tile in memory; zero from DIM on. # [ROWS, PADDED]"""
    at = column + tl.arange(0, PADDED)
    return tl.load(tile[0][:, None] + at[None, :] * tile[2], mask=tile[1][:, None] & (at < DIM)[None, :], other=0.0)


@jit
def own_columns(tile, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The columns of a tile that the program's results have. # [ROWS, PADDED]"""
    if PADDED < DIM:
        return slice_of(tile, tl.program_id(1) * PADDED, DIM, PADDED)
    else:
        return tile


@jit
def first_of(ok, DIMS: tl.constexpr):
    """`ok` where the program writes what all slices of the head_dim share: the first of them does."""
    if DIMS[1] < DIMS[0] or DIMS[3] < DIMS[2]:
        return ok & (tl.program_id(1) == 0)
    else:
        return ok


@jit
def owned(n, DIM: tl.constexpr, PADDED: tl.constexpr, DIMS: tl.constexpr):
    """How many of n rows of a result the program writes: none where its slice lies beyond the DIM columns."""
    if DIMS[1] < DIMS[0] or DIMS[3] < DIMS[2]:
        return tl.where(tl.program_id(1) * PADDED < DIM, n, 0)
    else:
        return n


@jit
def mean_row(x, first, strides, lo, hi, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The mean of the rows of a tile that are in [lo, hi); what is not finite (a hidden key may be) counts as 0. # [PADDED]"""
    tile = own_columns(load_rows(x, first, strides, lo, hi, ROWS, DIM, PADDED, True), DIM, PADDED)
    return mean_of(tile, first, lo, hi, ROWS)


@jit
def mean_of(tile, first, lo, hi, ROWS: tl.constexpr):
    """`mean_row` of a tile at hand."""
    tile = tile.to(tl.float32)
    tile = tl.where(tl.abs(tile) < float("inf"), tile, 0.0)
    n = tl.minimum(first + ROWS, hi) - tl.maximum(first, lo)
    return tl.sum(tile, 0) / tl.maximum(n, 1).to(tl.float32)


@jit
def row_sums(a, b):
    """Sums of a * b along the rows. Without + 0.0 each of a row's lanes would add its own product unrounded to the rounded one
    of another lane, and they would disagree about the sum."""
    return tl.sum(a * b + 0.0, 1)


@jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 x in DTYPE, to nearest, half to even."""
    if UPCAST and tl.bfloat16 == DTYPE:  # the interpreter would cut the low bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@jit
def rounded_and_wide(x, DTYPE: tl.constexpr, PAIRS: tl.constexpr):
    """(`rounded`, the same in float32 again).

    Where both are wanted, compilers for NVIDIA convert to bfloat16 one by one, and join the halves by further instructions.
    PAIRS: one conversion for two neighbours.
    """
    if PAIRS and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(PAIR, "=r,=r,=r,r,r", [x], dtype=(tl.bfloat16, tl.float32), is_pure=True, pack=2)
    else:
        low = rounded(x, DTYPE)
        return low, low.to(tl.float32)


@jit
def store_rows(x, value, first, strides, n, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Write the rows below n of value [ROWS, PADDED], the program's own columns, in x's dtype."""
    if PADDED < DIM:
        column = tl.program_id(1) * PADDED
        at = row_pointers(x + column * strides[3], first, strides, ROWS, PADDED)
        inside = (first + tl.arange(0, ROWS) < n)[:, None] & (column + tl.arange(0, PADDED) < DIM)[None, :]
        tl.store(at, rounded(value, x.dtype.element_ty), mask=inside)
    else:
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
def dot_rows(a, b, DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b' of two tiles over their columns, in float32."""
    if PADDED < DIM:
        acc = tl.zeros([a[1].shape[0], b[1].shape[0]], tl.float32)
        return dot_rows_add(a, b, acc, DIM, PADDED, PRECISION)
    else:
        return dot(a, tl.trans(b), PRECISION)


@jit
def dot_rows_add(a, b, acc, DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b' of two tiles over their columns, in float32."""
    if PADDED < DIM:
        for column in tl.range(0, DIM, PADDED, num_stages=1):
            b_slice = slice_of(b, column, DIM, PADDED)
            acc = dot_add(slice_of(a, column, DIM, PADDED), tl.trans(b_slice), acc, PRECISION)
        return acc
    else:
        return dot_add(a, tl.trans(b), acc, PRECISION)


@jit
def program_tile(n, n_h, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(first index of the program's tile, entry, head): tiles of a head are neighbours, so its keys stay in the cache."""
    n_tiles = tl.cdiv(n, BLOCK)
    tile, head = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    return tile * BLOCK, (head // n_h).to(tl.int64), (head % n_h).to(tl.int64)

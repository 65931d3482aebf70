"""Which tiles a program computes, and which tiles of keys each of them visits: the same answers for producer and consumers.

Programs take work items by turns: tiles of BLOCK_Q rows of one entry and head. Heads come in sections whose keys and values fit
the L2 cache together; in a section the last rows, which see most keys under a causal mask, come first.

A walk is (tiles, top, full_lo, full_hi), one a span: so many tiles of keys, from tile `top` downwards, and tiles from full_lo
to full_hi hide nothing. The walks of a work item follow one another as one sequence of steps; where it sees nothing it has
one step in front of the keys, whose tile is zeros and hidden.
"""

from .. import shim
from ..masks import aligned, key_range, row_spans
from ..shim import tl
from .gluon import gl, jit


@shim.jit
def walk_of(lo, full_lo, full_hi, hi, BLOCK_K: tl.constexpr):
    """The walk over tiles from lo to hi, the ends that kernels/masks.py has."""
    tiles = tl.cdiv(hi - lo, BLOCK_K)
    return tiles, tl.where(tiles > 0, lo // BLOCK_K + tiles - 1, -1), full_lo // BLOCK_K, full_hi // BLOCK_K


@shim.kernel
def span_walks(
    mask, walks, n_q, n_k, n_tiles, n_h, FLAGS: tl.constexpr, SPANS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """The walk of one tile of rows and span, where spans are tensors, into walks (entries, heads, tiles, SPANS, 4)."""
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    r, tiles = tl.program_id(0) % SPANS, (tl.program_id(0) // SPANS).to(tl.int64)
    tile, b, h = (tiles % n_tiles).to(tl.int32), tiles // n_tiles // n_h, tiles // n_tiles % n_h
    q_idx = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ok = q_idx < n_q
    start, stop = row_spans(mask, r, b, h, q_idx, ok, (n_q, n_k), FLAGS)
    lo, full_lo, full_hi, hi, _, _ = key_range(start, stop, ok, n_k, BLOCKS[1], False)
    walk = walk_of(lo, full_lo, full_hi, hi, BLOCKS[1])
    for i in tl.static_range(4):
        tl.store(walks + tl.program_id(0).to(tl.int64) * 4 + i, walk[i])


@jit
def work_item(t, n_q, n_h, heads, section, BLOCK_Q: gl.constexpr):
    """(first row, entry, head) of work item t, all int32; `heads` of all entries."""
    tiles = gl.cdiv(n_q, BLOCK_Q)
    first = t // (section * tiles) * section
    size = gl.minimum(section, heads - first)
    at = t - first * tiles
    head = first + at % size
    return (tiles - 1 - at // size) * BLOCK_Q, head // n_h, head % n_h


@jit
def key_walks(mask, b, h, q0, size, FLAGS: gl.constexpr, SPANS: gl.constexpr, BLOCKS: gl.constexpr):
    """(steps, the walks of the rows from q0 on): where spans are tensors, their place in mask[2]; else the walk itself."""
    BLOCK_Q: gl.constexpr = BLOCKS[0]
    if FLAGS[0]:
        tile = (b * mask[2][1] + h * mask[2][2]) * gl.cdiv(size[0], BLOCK_Q) + q0 // BLOCK_Q
        walks = mask[2][0] + tile * (SPANS * 4)
        steps = gl.load(walks)
        for i in gl.static_range(1, SPANS):
            steps += gl.load(walks + i * 4)
        return gl.maximum(steps, 1), walks
    else:  # bounds grow with the rows
        last = gl.minimum(q0 + BLOCK_Q, size[0]) - 1
        lo, full_hi = row_spans(mask, 0, b, h, q0, q0 >= 0, size, FLAGS)
        full_lo, hi = row_spans(mask, 0, b, h, last, q0 >= 0, size, FLAGS)
        lo, full_lo, full_hi, hi = aligned(lo, full_lo, full_hi, hi, BLOCKS[1], False)
        walk = walk_of(lo, full_lo, full_hi, hi, BLOCKS[1])
        return gl.maximum(walk[0], 1), walk


@jit
def walk_step(top, full_lo, full_hi, j, BLOCK_K: gl.constexpr):
    """(first key, whether anything may be hidden) of step j of a walk."""
    tile = top - j
    return tile * BLOCK_K, (tile < full_lo) | (tile >= full_hi)


@jit
def key_step(walks, j, FLAGS: gl.constexpr, SPANS: gl.constexpr, BLOCK_K: gl.constexpr):
    """(first key, whether anything may be hidden, span) of step j.

    Walks in memory are read anew at every step: registers are scarcer than loads that nothing waits for.
    """
    r = j * 0
    if FLAGS[0]:
        k0, partial = walk_step(gl.load(walks + 1), gl.load(walks + 2), gl.load(walks + 3), j, BLOCK_K)
        before = gl.load(walks)
        for i in gl.static_range(1, SPANS):
            at = walks + i * 4
            own_k0, own_partial = walk_step(gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), j - before, BLOCK_K)
            own = j >= before
            k0, partial, r = gl.where(own, own_k0, k0), gl.where(own, own_partial, partial), gl.where(own, i, r)
            before += gl.load(at)
    else:
        k0, partial = walk_step(walks[1], walks[2], walks[3], j, BLOCK_K)
    return k0, partial, r

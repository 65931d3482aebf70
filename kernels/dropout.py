"""Dropout bits: word k % 4 of Philox4x32-10 with the counter (k // 4, q, h, b), the bits that the CPU computes.

FLAGS[7] says whether there is any; with FLAGS[8], key coordinates are consecutive from a multiple of 4, and one call
serves four keys.
dropout is (rng, entries per key, threshold, 1 / (1 - p)).
"""

from .shim import jit, tl


@jit
def philox(dropout, b, at, q, fours):
    """Four words for every row of q and every four keys; q and fours broadcast against each other."""
    group = b // dropout[1]
    key0 = tl.load(dropout[0] + group * 2).to(tl.uint32)
    key1 = tl.load(dropout[0] + group * 2 + 1).to(tl.uint32)
    nothing = (q * 0 + fours * 0).to(tl.uint32)
    c0, c1 = nothing + fours.to(tl.uint32), nothing + q.to(tl.uint32)
    c2, c3 = nothing + at[1].to(tl.uint32), nothing + at[0].to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, key0, key1)


@jit
def kept(dropout, b, at, k_first, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FLAGS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which weights stay. `at` is the place of a tile [BLOCK_Q, BLOCK_K], or of its transpose with COLUMNS; its first key
    coordinate is k_first where keys are consecutive."""
    limit = tl.full([1, 1], dropout[2], tl.uint32)
    if FLAGS[8]:
        fours = (k_first.to(tl.uint32) >> 2) + tl.arange(0, BLOCK_K // 4).to(tl.uint32)
        w0, w1, w2, w3 = philox(dropout, b, at, at[2].reshape([BLOCK_Q, 1]), fours[None, :])
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [BLOCK_Q, BLOCK_K]
        if COLUMNS:
            words = tl.trans(words)
    else:
        k = at[3].to(tl.uint32)
        w0, w1, w2, w3 = philox(dropout, b, at, at[2], k >> 2)
        which = k & 3
        words = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return words >= limit

"""The score chain inside a kernel, and where a tile stands.

SCORES is a tuple with one entry per modifier: (True, value, first, second) for a Pointwise, functions of (s, args);
(False, term) for an Additive, a function of (at, args). `at` is the tile's place: coordinates b, h, q, k in the tile's
shape or broadcast to it, then the batch entry and head in storage, by which parameters are looked up.
FLAGS[3:7] say of b, h, q, k whether it is a tensor; coords has (tensor, entry stride, row stride) or an int for b and h.
"""

from .shim import jit, tl


@jit
def coordinate(coords, which: tl.constexpr, b, index, offset, FLAGS: tl.constexpr):
    """Coordinates of storage indices: index + offset, or a tensor's elements."""
    if FLAGS[3 + which]:
        return tl.load(coords[which][0] + b * coords[which][1] + index.to(tl.int64) * coords[which][2])
    else:
        return index + offset


@jit
def place(coords, b, h, q_idx, k_idx, size, n_b, FLAGS: tl.constexpr):
    """(b, h, q, k, entry, head) of a tile with storage rows q_idx and keys k_idx, shaped to broadcast against each other.

    Batch entries are numbered anew in every group of n_b.
    """
    if FLAGS[3]:
        b_at = coordinate(coords, 0, b, q_idx, 0, FLAGS)
    else:
        b_at = (b % n_b).to(tl.int32) + coords[0]
    h_at = coordinate(coords, 1, b, h.to(tl.int32), 0, FLAGS)
    if not FLAGS[4]:
        h_at += coords[1]
    q_at = coordinate(coords, 2, b, q_idx, size[4], FLAGS)
    k_at = coordinate(coords, 3, b, k_idx, coords[3], FLAGS)  # size[5], of which the compiler knows if it is a multiple of 16
    return b_at, h_at, q_at, k_at, b, h


@jit
def apply_scores(s, at, scores, SCORES: tl.constexpr, n: tl.constexpr):
    """s after the first n modifiers, in order."""
    for i in tl.static_range(n):
        if SCORES[i][0]:
            s = SCORES[i][1](s, scores[i])
        else:
            s = s + SCORES[i][1](at, scores[i])
    return s


@jit
def terms_of(at, scores, SCORES: tl.constexpr):
    """What each modifier adds to a tile's scores, in a tuple; 0 for a Pointwise."""
    terms = ()
    for i in tl.static_range(len(SCORES)):
        if SCORES[i][0]:
            terms = terms + (0.0,)  # type: ignore[assignment]
        else:
            terms = terms + (SCORES[i][1](at, scores[i]),)  # type: ignore[assignment]
    return terms


@jit
def apply_terms(s, terms, scores, SCORES: tl.constexpr):
    """`apply_scores` of the whole chain, with the terms that `terms_of` found."""
    for i in tl.static_range(len(SCORES)):
        if SCORES[i][0]:
            s = SCORES[i][1](s, scores[i])
        else:
            s = s + terms[i]
    return s


@jit
def pull_scores(g, s, at, scores, SCORES: tl.constexpr, first: tl.constexpr):
    """The gradient in front of modifier `first` from g, the one behind the chain; s is the score in front of the chain.

    Elementwise and linear in g, so it may run before all of g is known.
    """
    for i in tl.static_range(len(SCORES) - first):
        if SCORES[len(SCORES) - 1 - i][0]:
            before = apply_scores(s, at, scores, SCORES, len(SCORES) - 1 - i)
            g = g * SCORES[len(SCORES) - 1 - i][2](before, scores[len(SCORES) - 1 - i])
    return g

"""The built-in score modifiers on the device: of a Pointwise f, f' and f'' of (s, args), of an Additive its term of (at, args).

at is (b, h, q, k, entry, head): coordinates, then the storage indices by which parameters are looked up.
"""

from .masks import plane_of, plane_offset
from .shim import LOG2E, jit, tl


@jit
def softcap_value(s, args):
    """cap tanh(s / cap), tanh z = 1 - 2 / (1 + e^2z): one division an element, shared with the derivatives."""
    return args[0] - 2 * args[0] / (1 + tl.exp2(s * (2 * LOG2E / args[0])))


@jit
def softcap_first(s, args):
    r = 1 / (1 + tl.exp2(s * (2 * LOG2E / args[0])))
    return 4 * r * (1 - r)


@jit
def softcap_second(s, args):
    r = 1 / (1 + tl.exp2(s * (2 * LOG2E / args[0])))
    return (1 - 2 * r) * 4 * r * (1 - r) * (-2 / args[0])


@jit
def alibi_slope(at, args):
    slopes, strides = args[0], args[1]
    return tl.load(slopes + at[4] * strides[0] + at[5] * strides[1]).to(tl.float32)


@jit
def alibi_abs_weight(at, args):
    return -tl.abs(at[3].to(tl.float32) - at[2].to(tl.float32))


@jit
def alibi_rel_weight(at, args):
    return at[3].to(tl.float32) - at[2].to(tl.float32)


@jit
def alibi_abs(at, args):
    return alibi_slope(at, args) * alibi_abs_weight(at, args)


@jit
def alibi_rel(at, args):
    return alibi_slope(at, args) * alibi_rel_weight(at, args)


@jit
def bias(at, args):
    """bias[entry, head, q, k]; coordinates beyond the tensor take its last row or key."""
    x, strides, n = args[0], args[1], args[2]
    q = tl.minimum(tl.maximum(at[2], 0), n[0][0] + n[0][1] - 1)
    k = tl.minimum(tl.maximum(at[3], 0), n[1][0] + n[1][1] - 1)
    return tl.load(plane_of(x, at[4], at[5], strides) + plane_offset(q, k, strides, args[3])).to(tl.float32)


@jit
def bias_inside(at, args):
    """The same where all coordinates are the tensor's: without a clamp, loads along the keys are wide."""
    x, strides = args[0], args[1]
    return tl.load(plane_of(x, at[4], at[5], strides) + plane_offset(at[2], at[3], strides, args[3])).to(tl.float32)


@jit
def relative_entry(at, args):
    """clamp(k - q + offset)"""
    n, offset = args[2], args[3]
    return tl.minimum(tl.maximum(at[3] - at[2] + (offset[0] + offset[1]), 0), n[0] + n[1] - 1)


@jit
def relative(at, args):
    """table[entry, head, clamp(k - q + offset)]"""
    x, strides = args[0], args[1]
    return tl.load(plane_of(x, at[4], at[5], strides) + relative_entry(at, args).to(tl.int64) * strides[2]).to(tl.float32)


@jit
def ones(at, args):
    return 1.0

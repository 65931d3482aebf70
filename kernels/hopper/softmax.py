"""The softmax of a warp group's 64 rows in the registers of its accumulators.

A row of an accumulator lies in four lanes, two neighbours of every eight columns in each. Sums of weights stay apart by lane
until the end ([64, 4]); only the maximum travels between lanes at every step.
"""

from ..shim import LN2
from .gluon import gl, jit, rounded

ROWS = gl.constexpr(64)  # of a warp group: the height of its matrix instruction


@jit
def lane_sums(p, BLOCK_K: gl.constexpr):
    """The sums of p's rows, by lane. # [ROWS, BLOCK_K] -> [ROWS, 4]"""
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, BLOCK_K // 8, 4, 2]), 3), 1)


@jit
def softmax_step(s, row_max, row_sum, out_sum, factor, DTYPE: gl.constexpr, BLOCK_K: gl.constexpr):
    """One tile of scores joins the softmax; factor takes s to base 2 and is positive.

    Returns (weights in DTYPE, row_max, row_sum, out_sum, alpha); out_sum is of the weights as they were rounded.
    """
    new_max = gl.maximum(row_max, gl.max(s, 1) * factor)
    safe = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(s * factor - gl.expand_dims(safe, 1))
    alpha = gl.exp2(row_max - safe)
    weights, exact = rounded(p, DTYPE)
    sums = lane_sums(p, BLOCK_K)
    by_lane = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout)), 1)
    row_sum = row_sum * by_lane + sums
    out_sum = out_sum * by_lane + lane_sums(exact, BLOCK_K)
    return weights, new_max, row_sum, out_sum, alpha


@jit
def with_sink(row_max, row_sum, out_sum, sink):
    """(row_max, row_sum, out_sum, what to multiply the accumulator by) once the sink has joined the sums; sink in base 2."""
    new_max = gl.maximum(row_max, sink)
    safe = gl.where(new_max == float("-inf"), 0.0, new_max)
    alpha, weight = gl.exp2(row_max - safe), gl.exp2(sink - safe)
    return new_max, row_sum * alpha + weight, out_sum * alpha + weight, alpha


@jit
def log_sum(row_max, row_sum):
    """lse, natural; -inf where nothing was seen, NaN where one was."""
    return gl.where(row_sum == 0.0, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)

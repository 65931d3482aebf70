"""The fused backward of sm_90 (kernels/hopper/backward.py): which calls it takes, and its launches.

It adds dq in an order that is not fixed, so it is for deterministic=False alone; every other call has the portable passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.hopper import backward as kernels
from ..kernels.hopper import gluon
from ..kernels.launch import Launch
from ..problem import LOW, Grads, Problem
from ..scores import Bias, Pointwise
from . import triton, triton_call
from .hopper_call import config, descriptor, reachable, width
from .triton_call import Call, cdiv, strides_of
from .triton_rows import Statistics
from .triton_tiles import column_pass

REGISTERS = (240, 24)  # of a thread of the second consumer, and of the producer; the first consumer has what is left: 240
FINISH = Launch(64, 64, 4, 1)


def why_not(p: Problem) -> str | None:
    """Why the portable passes compute the gradients of p, or None."""
    if not gluon.PRESENT:
        return "triton has no Gluon"
    reasons = []
    dim = max(p.q.shape[3], p.v_dim)
    if p.deterministic:
        reasons.append("it adds dq in an order that is not fixed: for deterministic=False")
    if p.q.dtype not in LOW:
        reasons.append(f"it takes float16 and bfloat16, not {str(p.q.dtype)[6:]}")
    if dim > 128:
        reasons.append(f"its sums do not fit the registers at a head_dim of {dim}: at most 128")
    if p.q.shape[3] % 8 or p.v_dim % 8:
        reasons.append("it copies rows of a multiple of 16 bytes: a head_dim that is a multiple of 8")
    if p.dropout_p > 0.0:
        reasons.append("it has no dropout")
    if p.mask.predicates:
        reasons.append("it has no bool and custom masks")
    if p.invariant:
        reasons.append("it is not batch-invariant")
    if any(isinstance(score, Bias) for score in p.scores):
        reasons.append("it has no dense bias")
    elif p.scores and dim > 64:
        reasons.append(f"with scores its tiles do not fit the registers at a head_dim of {dim}: at most 64")
    return "; ".join(reasons) or None


def description(p: Problem) -> str:
    """The backward kernel and its tile, in words."""
    how = config(p, "hopper backward")
    return (
        f"fused backward for sm_90, tiles of {how.block_q} x {how.block_k}, {how.num_stages} stages, dq in an order that is "
        "not fixed (unmeasured)"
    )


def backward(p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor) -> Grads:
    """Gradients of q, k, v, the chain's parameters and the sinks; the portable kernels' where `why_not` has a reason."""
    passes = triton.two_passes if why_not(p) is not None else one_pass
    return triton.gradients(p, do, dlse, out, lse, out_lo, passes)


def one_pass(p: Problem, call: Call, rows: Statistics, dq: Tensor, dk: Tensor, dv: Tensor, beside: None) -> None:
    """dq, dk and dv by the fused kernel, and dq's scale and dtype by another. It takes no bias, so there is nothing beside."""
    if min(p.q.numel(), p.k.numel(), p.v.numel()) == 0:
        for x in (dq, dk, dv):
            x.zero_()
        return
    how, dim, n_pad = config(p, "hopper backward"), width(max(p.q.shape[3], p.v_dim)), rows.delta.shape[2]
    zero_sum = not any(isinstance(score, Pointwise) for score in p.scores)
    total, sums = (
        torch.zeros(p.n_b, p.n_h, n_pad, n, dtype=torch.float32, device=p.q.device) for n in (dim, kernels.WIDE.value)
    )
    q, k, v, do = (reachable(name, x) for name, x in zip(("q", "k", "v", "do"), (p.q, p.k, p.v, rows.do)))
    group = p.n_h // p.n_kv
    triton_call.run(
        kernels.hopper_backward, cdiv(p.n_k, how.block_k) * p.n_b * p.n_kv, how,
        descriptor(q, how.block_q, dim), descriptor(k, how.block_k, dim, 2), descriptor(v, how.block_k, dim),
        descriptor(do, how.block_q, dim), row_descriptor(rows.lse2, how.block_q), row_descriptor(rows.delta, how.block_q),
        descriptor(dk, how.block_k // 2, dim, 2), descriptor(dv, how.block_k // 2, dim),
        descriptor(total, how.block_q, dim // 2), descriptor(sums, how.block_q, sums.shape[3]), column_pass(p, call, how),
        p.scale, *call.ints, p.n_kv, max(p.n_b_coords, 1), n_pad, call.flags, call.chain, group, call.spans, dim,
        (how.block_q, how.block_k), how.num_stages, overlap(p, call, dim), int(zero_sum), REGISTERS,
    )  # fmt: skip
    triton_call.run(
        kernels.finish_dq, cdiv(p.n_q, FINISH.block_q) * p.n_b * p.n_h, FINISH, total, sums, k, rows.lse2, rows.delta,
        rows.dlse, p.sinks, dq, call.data, (k.stride(), strides_of(dq, 4), strides_of(p.sinks, 2)), p.scale, *call.ints,
        p.n_h, n_pad, call.flags, group, call.spans, (p.q.shape[3], dim), (FINISH.block_q, FINISH.block_k), int(zero_sum),
    )  # fmt: skip


def overlap(p: Problem, call: Call, dim: int) -> int:
    """How much is in flight at once: kernels/hopper/backward.py. What leaves no local memory in the kernel."""
    return 2 if dim == 64 else 0 if call.rows or p.scores else 1


def row_descriptor(x: Tensor, rows: int) -> Any:
    """x (B, H, n_pad) float32 as one row, in tiles of so many."""
    layout = gluon.gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return gluon.TensorDescriptor(x, [x.numel()], [1], [rows], layout)

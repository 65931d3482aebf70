"""The Triton backend: fused kernels (fastattn/kernels) for fp16, bf16 and fp32 on a GPU, or in Triton's interpreter.

What stands here is the host's part: a Problem as kernel arguments, launches, and the small sums that torch does as well.
Nothing waits for the device. Out and its statistics are those of every backend, so where a derivative has no kernel yet,
the tiled backend's torch operations take it up on the same device (`falls_back` says where and why).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import backward as backward_kernels
from ..kernels import forward as forward_kernels
from ..kernels import shim
from ..kernels.launch import table_of
from ..masks import DensePredicate
from ..problem import LOW, Grads, Problem, empty_like_layout, empty_rows
from ..scores import Additive, Pointwise, Score
from ..scores.base import on_device_too
from . import blocked, triton_call
from .facts import facts
from .hopper_fit import timed
from .operands import sink_weight, sum_rows_like
from .triton_call import Call, cdiv, column_grid, config, on_device, row_grid, strides_of
from .triton_params import Beside, beside_dq, param_grads, params_by_torch
from .triton_rows import Statistics, statistics
from .triton_tangents import TANGENTS, TWICE, backward_jvp, forward_jvp, forward_jvp2
from .triton_tiles import column_pass, prepare, row_pass

__all__ = [
    "backward", "backward_jvp", "description", "falls_back", "forward", "forward_jvp", "forward_jvp2", "refusals", "supports",
]  # fmt: skip

MAX_DIM = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(p: Problem) -> str | None:
    """Why this backend cannot run the call, or None."""
    reasons = refusals(*facts(p))
    return "; ".join(reasons) if reasons else None


def refusals(
    device: torch.device, dtype: torch.dtype, dims: tuple[int, int], load: str, scores: tuple[type[Score], ...],
    customs: tuple[tuple[str, bool], ...],
) -> tuple[str, ...]:  # fmt: skip
    """Every reason why this backend cannot run a call, from what `facts` says of it."""
    reasons = [] if shim.PRESENT else ["triton is not installed"]
    if not triton_call.launches_on(device):
        reasons.append(f"the kernels run on cuda tensors, or with TRITON_INTERPRET=1 anywhere; these are on {device.type}")
    if dtype not in DTYPES:
        reasons.append(f"the kernels take float16, bfloat16 and float32, not {str(dtype)[6:]}")
    for name, dim in zip(("head_dim", "v's head_dim"), dims, strict=True):
        if not 1 <= dim <= MAX_DIM:
            reasons.append(f"the kernels take a {name} of 1 to {MAX_DIM}, not {dim}")
    if not reasons and (misfit := triton_call.misfit(device, dtype, dims, load, ("forward", "dkdv", "dq"))):
        reasons.append(misfit)
    for score in scores:
        if not issubclass(score, (Additive, Pointwise)) or not on_device_too(score):
            reasons.append(f"score {score.name} has no Triton functions (device_functions)")
    for key, has_triton in customs:
        if not has_triton:
            reasons.append(f"the custom mask {key} has no triton_fn")
    return tuple(reasons)


def falls_back(p: Problem) -> list[tuple[str, str]]:
    """(what, why) for the derivatives of p that torch operations compute."""
    found, by_torch = [], "tiles of torch operations compute them, on the same device"
    if misfit := triton_call.misfit(*facts(p)[:4], TANGENTS):
        found.append(("tangent kernels", f"{misfit}; {by_torch}"))
    elif misfit := triton_call.misfit(*facts(p)[:4], TWICE):
        found.append(("a kernel for forward mode over forward mode", f"{misfit}; {by_torch}"))
    if p.params and (reason := params_by_torch(p)):
        found.append(("a kernel for the gradient of parameters", f"{reason}; torch operations sum it"))
    return found


def description(p: Problem) -> str:
    """The forward kernel and its tile, in words."""
    if not shim.PRESENT:
        return "fused Triton kernel"
    if shim.INTERPRETED:
        arch, note = "interpreter", "Triton's interpreter: for tests"
    else:
        arch = triton_call.architecture(p.q.device)
        known = "timed on an H200: docs/benchmarks.md" if arch == "sm_90" and timed(p) else f"unmeasured on {arch}"
        note = known + ("" if table_of(arch) == arch else f", with the tiles of {table_of(arch)}")
    how = config(p, "forward")
    tile = f"{how.block_q} x {how.block_k}, {how.num_warps} warps, {how.num_stages} stages"
    dense = any(isinstance(x, DensePredicate) for x in p.mask.predicates)
    skipping = "; a map of the bool mask, made on the device, says which tiles are empty, full or mixed" if dense else ""
    return f"fused Triton kernel, tiles of {tile} ({note}){skipping}"


# Forward


def forward(p: Problem, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, out_lo): see `fastattn.backends`."""
    shape = (p.n_b, p.n_h, p.n_q, p.v_dim)
    out = empty_like_layout(p.q, shape)
    lse = p.q.new_empty(shape[:3], dtype=torch.float32)
    out_lo = empty_like_layout(p.q, shape) if train and p.q.dtype in LOW else None
    call, how = prepare(p), config(p, "forward")
    with on_device(p.q):
        triton_call.run(
            forward_kernels.forward, cdiv(p.n_q, how.block_q) * p.n_b * p.n_h, how, *call.operands, out, out_lo, lse,
            p.sinks, row_pass(p, call, how),
            (*call.strides, out.stride(), strides_of(out_lo, 4), strides_of(p.sinks, 2)), p.scale, *call.ints, p.n_h,
            max(p.n_b_coords, 1), call.flags, call.predicates, call.chain, p.n_h // max(p.n_kv, 1), call.spans, call.dims,
            (how.block_q, how.block_k), call.precision,
        )  # fmt: skip
    return out, lse, p.q.new_empty(0) if out_lo is None else out_lo


# Backward


def backward(
    p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor,
    dtype: torch.dtype | None = None,
) -> Grads:  # fmt: skip
    """Gradients of q, k, v, the chain's parameters and the sinks; those of q, k and v in `dtype`, their inputs' by default."""
    return gradients(p, do, dlse, out, lse, out_lo, two_passes, dtype)


def gradients(
    p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor,
    passes: Callable[..., None], dtype: torch.dtype | None = None,
) -> Grads:  # fmt: skip
    """`backward`, whose dq, dk and dv `passes(p, call, rows, dq, dk, dv, beside)` fills in, and what `beside_dq` names."""
    dq, dk, dv = (empty_rows(x, tuple(x.shape), dtype) for x in (p.q, p.k, p.v))
    call, rows = prepare(p), statistics(p, do, dlse, out, lse, out_lo)
    by_torch = params_by_torch(p) if p.params else None
    beside = beside_dq(p, call) if p.param_grads and by_torch is None else None
    with on_device(p.q):
        passes(p, call, rows, dq, dk, dv, beside)
    if not p.param_grads or not p.params:
        dparams = []
    elif by_torch is None:
        dparams = param_grads(p, call, rows.do, rows.lse2, rows.delta, beside=beside)
    else:
        dparams = blocked.backward(p, do, dlse, out, lse, out_lo).params
    dsinks = None
    if p.sinks is not None:
        dsinks = sum_rows_like(-sink_weight(p, lse) * rows.delta[:, :, : p.n_q], p.sinks)
    return Grads(dq, dk, dv, dparams, dsinks)


def two_passes(
    p: Problem, call: Call, rows: Statistics, dq: Tensor, dk: Tensor, dv: Tensor, beside: Beside | None = None
) -> None:  # fmt: skip
    """dq, then dk and dv, each sum with one owner and one order."""
    dq_pass(p, call, rows, dq, beside=beside)
    _launch_dkdv(p, call, rows, dk, dv)


def dq_pass(p: Problem, call: Call, rows: Statistics, dq: Tensor, *_: Tensor, beside: Beside | None = None) -> None:
    """dq alone, and the gradient of a bias."""
    shared = beside is not None and beside.partial is not None
    how = config(p, "dq", "sums" if shared else None)
    programs, slices = row_grid(p, how, call.dims[0])
    if shared:  # a program has the rows of all entries
        programs //= p.n_b
    triton_call.run(
        backward_kernels.backward_dq, (programs, slices), how, *call.operands, rows.do, rows.lse2,
        rows.delta, rows.dlse, p.sinks, dq, () if beside is None else beside.sums(p.n_b),
        row_pass(p, call, how),
        (*call.strides, rows.do.stride(), dq.stride(), strides_of(p.sinks, 2)), p.scale, *call.ints,
        p.n_h, max(p.n_b_coords, 1), rows.delta.shape[2], call.flags, call.predicates, call.chain, p.n_h // max(p.n_kv, 1),
        call.spans, how.dims(call.dims), (how.block_q, how.block_k), call.precision,
        not p.invariant and not any(isinstance(score, Pointwise) for score in p.scores),
    )  # fmt: skip


def _launch_dkdv(p: Problem, call: Call, rows: Statistics, dk: Tensor, dv: Tensor) -> None:
    how = config(p, "dkdv")
    triton_call.run(
        backward_kernels.backward_dkdv, column_grid(p, how), how, *call.operands, rows.do, rows.lse2,
        rows.delta, dk, dv, column_pass(p, call, how),
        (*call.strides, rows.do.stride(), dk.stride(), dv.stride()), p.scale, *call.ints, p.n_kv, max(p.n_b_coords, 1),
        rows.delta.shape[2], call.flags, call.predicates, call.chain, p.n_h // max(p.n_kv, 1), call.spans, how.dims(call.dims),
        (how.block_q, how.block_k), call.precision,
    )  # fmt: skip

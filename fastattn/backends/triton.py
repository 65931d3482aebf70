"""The Triton backend: fused kernels (fastattn/kernels) for fp16, bf16 and fp32 on a GPU, or in Triton's interpreter.

What stands here is the host's part: a Problem as kernel arguments, launches, and the small sums that torch does as well.
Nothing waits for the device. Out and its statistics are those of every backend, so where a derivative has no kernel yet,
the tiled backend's torch operations take it up on the same device (`falls_back` says where and why).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import backward as backward_kernels
from ..kernels import forward as forward_kernels
from ..kernels import grads as grad_kernels
from ..kernels import shim
from ..kernels.launch import table_of
from ..problem import LOW, Grads, Problem, empty_like_layout, empty_rows
from ..scores import Additive, Pointwise, Score
from ..scores.base import on_device_too
from ..scores.relative import diagonal_sums
from . import blocked, triton_call
from .facts import facts
from .operands import sink_weight, sum_rows_like
from .triton_call import Call, cdiv, config, on_device, prepare, strides_of
from .triton_rows import Statistics, key_bounds, statistics
from .triton_tangents import TANGENTS, backward_jvp, forward_jvp, forward_jvp2

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
    if device.type != "cuda" and not shim.INTERPRETED:
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
    found = []
    if misfit := triton_call.misfit(*facts(p)[:4], TANGENTS):
        found.append(("tangent kernels", f"{misfit}; tiles of torch operations compute them, on the same device"))
    found += [("a kernel for forward mode over forward mode", "tiles of torch operations compute it, on the same device")]
    if p.params:
        found.append(("a kernel for the second order of parameters", "tiles of torch operations compute their part"))
        if _params_by_torch(p):
            found.append(("a kernel for the gradient of parameters", f"{_params_by_torch(p)}; torch operations sum it"))
    return found


def _params_by_torch(p: Problem) -> str | None:
    """Why the kernels do not sum the gradients of the scores' parameters, or None."""
    for score in p.scores:
        if len(score.params) > 1 or (score.params and score.device_gradient() is None):
            return f"score {score.name} does not say how kernels sum its gradient (device_gradient)"
    if misfit := triton_call.misfit(*facts(p)[:4], ("grads",)):
        return misfit
    if isinstance(p.coords.q, Tensor) or isinstance(p.coords.k, Tensor):
        return "coordinates of rows or keys come from a tensor"
    return None


def description(p: Problem) -> str:
    """The forward kernel and its tile, in words."""
    if not shim.PRESENT:
        return "fused Triton kernel"
    if shim.INTERPRETED:
        arch, note = "interpreter", "Triton's interpreter: for tests"
    else:
        arch = triton_call.architecture(p.q.device)
        note = f"unmeasured on {arch}" + ("" if table_of(arch) == arch else f", with the tiles of {table_of(arch)}")
    how = config(p, "forward")
    tile = f"{how.block_q} x {how.block_k}, {how.num_warps} warps, {how.num_stages} stages"
    return f"fused Triton kernel, tiles of {tile} ({note})"


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
            p.sinks, call.data, (*call.strides, out.stride(), strides_of(out_lo, 4), strides_of(p.sinks, 2)), p.scale,
            *call.ints, p.n_h, max(p.n_b_coords, 1), call.flags, call.predicates, call.chain, p.n_h // max(p.n_kv, 1),
            call.spans, call.dims, (how.block_q, how.block_k), call.precision,
        )  # fmt: skip
    return out, lse, p.q.new_empty(0) if out_lo is None else out_lo


# Backward


def backward(p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor) -> Grads:
    """Gradients of q, k, v, the chain's parameters and the sinks."""
    dq, dk, dv = (empty_rows(x, tuple(x.shape)) for x in (p.q, p.k, p.v))
    call, rows = prepare(p), statistics(p, do, dlse, out, lse, out_lo)
    with on_device(p.q):
        _launch_dq(p, call, rows, dq)
        _launch_dkdv(p, call, rows, dk, dv)
    if not p.param_grads or not p.params:
        dparams = []
    elif _params_by_torch(p) is None:
        with on_device(p.q):
            dparams = _param_grads(p, call, rows)
    else:
        dparams = blocked.backward(p, do, dlse, out, lse, out_lo).params
    dsinks = None
    if p.sinks is not None:
        dsinks = sum_rows_like(-sink_weight(p, lse) * rows.delta[:, :, : p.n_q], p.sinks)
    return Grads(dq, dk, dv, dparams, dsinks)


def _launch_dq(p: Problem, call: Call, rows: Statistics, dq: Tensor) -> None:
    how = config(p, "dq")
    triton_call.run(
        backward_kernels.backward_dq, cdiv(p.n_q, how.block_q) * p.n_b * p.n_h, how, *call.operands, rows.do, rows.lse2,
        rows.delta, rows.dlse, p.sinks, dq, call.data,
        (*call.strides, rows.do.stride(), dq.stride(), strides_of(p.sinks, 2)), p.scale, *call.ints,
        p.n_h, max(p.n_b_coords, 1), rows.delta.shape[2], call.flags, call.predicates, call.chain, p.n_h // max(p.n_kv, 1),
        call.spans, call.dims, (how.block_q, how.block_k), call.precision,
        not p.invariant and not any(isinstance(score, Pointwise) for score in p.scores),
    )  # fmt: skip


def _launch_dkdv(p: Problem, call: Call, rows: Statistics, dk: Tensor, dv: Tensor) -> None:
    how = config(p, "dkdv")
    triton_call.run(
        backward_kernels.backward_dkdv, cdiv(p.n_k, how.block_k) * p.n_b * p.n_kv, how, *call.operands, rows.do, rows.lse2,
        rows.delta, dk, dv, call.data, key_bounds(p, call, how.block_k),
        (*call.strides, rows.do.stride(), dk.stride(), dv.stride()), p.scale, *call.ints, p.n_kv, max(p.n_b_coords, 1),
        rows.delta.shape[2], call.flags, call.predicates, call.chain, p.n_h // max(p.n_kv, 1), call.spans, call.dims,
        (how.block_q, how.block_k), call.precision,
    )  # fmt: skip


def _param_grads(p: Problem, call: Call, rows: Statistics) -> list[Tensor]:
    """The gradient of every Additive's parameter."""
    how, found = config(p, "grads"), []
    for i, score in enumerate(p.scores):
        if not score.params:
            continue
        assert isinstance(score, Additive)
        plan = score.device_gradient()
        assert plan is not None
        q_tiles, k_tiles = cdiv(p.n_q, how.block_q), cdiv(p.n_k, how.block_k)
        block_k = how.block_q if plan.shape == "diagonals" else how.block_k
        n_b, n_h = p.n_b if plan.keep_b else 1, p.n_h if plan.keep_h else 1
        if plan.shape == "tile":
            tiles, shape = q_tiles * k_tiles, [n_b, n_h, p.n_q, p.n_k]
        elif plan.shape == "keys":
            tiles, shape = k_tiles, [n_b, n_h, p.n_k]
        elif plan.shape == "rows":
            tiles, shape = q_tiles, [n_b, n_h, p.n_q]
        else:
            tiles = max(q_tiles + cdiv(p.n_k, block_k) - 1, 0)
            shape = [n_b, n_h, tiles, how.block_q, block_k]
        sums = torch.empty(shape, dtype=torch.float32, device=p.q.device)
        if sums.numel() == 0 or p.n_q == 0 or p.n_k == 0:
            found.append(torch.zeros_like(score.params[0]))
            continue
        triton_call.run(
            grad_kernels.score_grads, tiles * n_b * n_h, how, *call.operands, rows.do, rows.lse2, rows.delta, sums,
            call.data, score.device_args(), (*call.strides, rows.do.stride()), p.scale, *call.ints, p.n_h,
            max(p.n_b_coords, 1), rows.delta.shape[2], p.n_b, call.flags, call.predicates, call.chain,
            p.n_h // max(p.n_kv, 1), call.spans, call.dims, (how.block_q, block_k), call.precision, i + 1, plan.weight,
            plan.shape, plan.keep_b, plan.keep_h,
        )  # fmt: skip
        q_at, k_at = call.ints[4:]
        if plan.shape == "diagonals":
            sums, q_at = _folded(sums, p.n_q, p.n_k), q_at + p.n_q - 1
        found.append(plan.finish(sums, q_at, k_at).to(score.params[0].dtype))
    return found


def _folded(sums: Tensor, n_q: int, n_k: int) -> Tensor:
    """(.., tiles, n, n) -> (.., distances): sums by k - q, from 1 - n_q up, of tiles whose k - q grows by n."""
    n = sums.shape[-1]
    by_tile = torch.nn.functional.pad(diagonal_sums(sums.double()), (0, 1))  # (.., tiles, 2n): from 1 - n
    low, high = by_tile[..., :n], by_tile[..., n:]
    lines = torch.nn.functional.pad(low, (0, 0, 0, 1)) + torch.nn.functional.pad(high, (0, 0, 1, 0))
    return lines.flatten(-2).narrow(-1, cdiv(n_q, n) * n - n_q, n_q + n_k - 1)

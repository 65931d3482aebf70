"""The backend for sm_90: the forward by a warp-specialised kernel (kernels/hopper), and with deterministic=False the backward
(hopper_backward.py); every other verb by the portable kernels.

Its forward was faster than the portable one wherever the two were timed, plain and causal calls in bfloat16 on an H200
(docs/benchmarks.md): such calls run here by default (`hopper_fit.preferred`). Of others nobody knows, so they do where it is
asked for by name. What it computes is what the portable kernels compute, statistics and the low half of out included, so that
their backward and their tangents go on from its results. A verb that gets a kernel of its own takes the place of the portable
one here, and leaves `falls_back`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import shim
from ..kernels.hopper import forward as kernels
from ..kernels.hopper import gluon
from ..problem import LOW, Grads, Problem, empty_like_layout
from ..scores import Bias
from . import hopper_backward, hopper_call, triton, triton_call
from .facts import Facts, facts
from .hopper_call import ARCH, ROWS, config, descriptor, width
from .hopper_fit import LONG, misfits
from .triton_call import cdiv, on_device, strides_of
from .triton_tangents import backward_jvp, forward_jvp, forward_jvp2

__all__ = [
    "backward", "backward_jvp", "description", "falls_back", "forward", "forward_jvp", "forward_jvp2", "instead", "refusals",
    "supports",
]  # fmt: skip

MAX_DIM = 256
FASTER = "1.3 to 1.6 times the portable forward's rate on an H200 in plain and causal bfloat16 calls, 1.1 to 1.5 in training"


def supports(p: Problem) -> str | None:
    """Why this backend cannot run the call, or None."""
    reasons = [*refusals(*facts(p)), *misfits(p)]
    return "; ".join(reasons) if reasons else None


def refusals(*parts: Any) -> tuple[str, ...]:
    """The reasons why this backend cannot run a call that `facts` give; `hopper_fit.misfits` has the others."""
    known = Facts(*parts)
    reasons = list(triton.refusals(*known))
    if not gluon.PRESENT:
        reasons.append("this Triton has no Gluon for Hopper: 3.6 has")
    if known.device.type != "cuda" or triton_call.architecture(known.device) != ARCH:
        reasons.append(f"it needs a GPU of architecture {ARCH} (H100, H200), and these tensors are on {known.device}")
    if known.dtype not in LOW:
        reasons.append(f"it takes float16 and bfloat16, not {str(known.dtype)[6:]}")
    for name, dim in zip(("head_dim", "v's head_dim"), known.dims, strict=True):
        if not 8 <= dim <= MAX_DIM or dim % 8:
            reasons.append(f"it takes a {name} that is a multiple of 8 up to {MAX_DIM}, not {dim}")
    if any(issubclass(score, Bias) for score in known.scores):
        reasons.append("a dense bias runs in the portable kernels")
    return tuple(reasons)


def falls_back(p: Problem) -> list[tuple[str, str]]:
    """(what, why) for what runs elsewhere than in this backend's own kernels."""
    found = [("tangents for sm_90", "the portable Triton kernels run them"), *triton.falls_back(p)]
    if reason := hopper_backward.why_not(p):
        found.insert(0, ("fused backward for sm_90", f"{reason}; the portable Triton kernels run it"))
    return found


def instead(p: Problem) -> list[tuple[str, str]]:
    """(what, why) for a call on this architecture that the portable kernels run."""
    if not shim.PRESENT or triton_call.architecture(p.q.device) != ARCH:
        return []
    unasked = f"by default it takes plain and causal bfloat16 calls, head_dim 64 or 128, from {LONG} rows and keys on: {FASTER}"
    return [("hopper", supports(p) or f'only where it is named, backend="hopper"; {unasked}')]


def description(p: Problem) -> str:
    """The kernels and their tiles, in words."""
    how = config(p, "hopper forward")
    turns = ", which take turns" if ping_pong(p) else ""
    tile = f"{how.block_q} x {how.block_k}, {how.num_stages} stages, two warp groups{turns}"
    backward = "" if hopper_backward.why_not(p) else f"; {hopper_backward.description(p)}"
    return f"warp-specialised forward for {ARCH}, tiles of {tile} ({FASTER}){backward}"


def ping_pong(p: Problem) -> bool:
    """Whether the warp groups take turns: a tile of head_dim 256 keeps the matrix units busy without."""
    return width(max(p.q.shape[3], p.v_dim)) < 256


def forward(p: Problem, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, out_lo): see `fastattn.backends`."""
    shape = (p.n_b, p.n_h, p.n_q, p.v_dim)
    out = empty_like_layout(p.q, shape)
    lse = p.q.new_empty(shape[:3], dtype=torch.float32)
    out_lo = empty_like_layout(p.q, shape) if train else None
    call, how = triton_call.prepare(p), config(p, "hopper forward")
    q, k, v = (hopper_call.reachable(name, x) for name, x in zip("qkv", (p.q, p.k, p.v)))
    dims, heads = (width(p.q.shape[3]), width(p.v_dim)), p.n_b * p.n_h
    with on_device(p.q):
        hopper_call.run(
            kernels.hopper_forward, cdiv(p.n_q, how.block_q) * heads, p.q.device, how,
            descriptor(q, ROWS, dims[0]), descriptor(k, how.block_k, dims[0]), descriptor(v, how.block_k, dims[1]),
            descriptor(out, ROWS, dims[1]), None if out_lo is None else descriptor(out_lo, ROWS, dims[1]), lse, p.sinks,
            strides_of(p.sinks, 2), hopper_call.row_pass(p, call, how), p.scale, *call.ints, p.n_h, max(p.n_b_coords, 1), heads,
            hopper_call.section(p), call.flags, call.chain, p.n_h // p.n_kv, call.spans, dims, (how.block_q, how.block_k),
            how.num_stages, ping_pong(p), dims != (256, 256),
        )  # fmt: skip
    return out, lse, p.q.new_empty(0) if out_lo is None else out_lo


def backward(p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor) -> Grads:
    """Gradients of q, k, v, the chain's parameters and the sinks."""
    return hopper_backward.backward(p, do, dlse, out, lse, out_lo)

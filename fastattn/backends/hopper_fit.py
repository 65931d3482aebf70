"""Which calls the kernels for sm_90 fit, as far as that needs neither Triton nor a GPU to know."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem

ALIGNED = 16  # bytes of which a descriptor's base and strides are multiples
LONG = 2048  # rows and keys of the shortest call that was timed


def timed(p: Problem) -> bool:
    """Whether the kernels of sm_90 and the portable ones were timed in calls like p, on an H200: docs/benchmarks.md."""
    plain = not p.scores and p.sinks is None and p.dropout_p == 0.0 and (p.mask.is_full or p.mask.is_causal)
    return p.q.dtype == torch.bfloat16 and plain and (p.q.shape[3], p.v_dim) in ((64, 64), (128, 128))


def preferred(p: Problem) -> bool:
    """Whether p goes to these kernels unasked, where they fit: their forward was faster in all timed calls of that length.

    Not with deterministic=False, which would take their fused backward: that one was never timed.
    """
    return p.deterministic and p.n_q >= LONG and p.n_k >= LONG and timed(p)


def misfits(p: Problem) -> list[str]:
    """Why the kernels cannot run p, of what may change from call to call."""
    reasons = []
    if p.invariant:
        reasons.append("batch-invariant calls run in the portable kernels")
    if p.dropout_p > 0.0:
        reasons.append("dropout runs in the portable kernels")
    if p.mask.predicates:
        reasons.append("Dense and Custom masks run in the portable kernels; these take row spans")
    if not p.scale > 0.0:
        reasons.append(f"the scale must be positive, not {p.scale}")
    if 0 in p.q.shape or 0 in p.k.shape or 0 in p.v.shape:
        return [*reasons, "there is nothing to do in a call without entries, heads, rows or keys"]
    found = (unreachable(name, x) for name, x in zip("qkv", (p.q, p.k, p.v)))
    return reasons + [reason for reason in found if reason is not None]


def unreachable(name: str, x: Tensor) -> str | None:
    """Why a descriptor cannot describe x (B, H, L, D), or None."""
    size = x.element_size()
    if x.stride(3) != 1 and x.shape[3] != 1:
        return f"{name}'s last stride must be 1, not {x.stride(3)}"
    for dim, (n, stride) in enumerate(zip(x.shape[:3], x.stride()[:3])):
        if n > 1 and (stride <= 0 or stride * size % ALIGNED):
            return f"{name}'s stride {dim} must be a positive multiple of {ALIGNED // size}, not {stride}"
    return None

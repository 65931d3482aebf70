"""The tiled backend: O(L) memory on the CPU and on any device torch has, empty tiles skipped.

Each verb takes torch's fused CPU kernel region by region where that computes the same thing, and tiles of torch
operations otherwise. Both give the same function.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import Grads, Problem
from . import blocked, fused
from .operands import is_far
from .tangents import backward_jvp, forward_jvp, forward_jvp2

__all__ = ["backward", "backward_jvp", "forward", "forward_jvp", "forward_jvp2", "kernel", "supports"]


def supports(p: Problem) -> str | None:
    """Why this backend cannot run the call, or None: it runs every call."""
    return None


def kernel(p: Problem) -> tuple[str, str | None]:
    """(the forward kernel that runs, why not the fused one or None)."""
    reason = fused.refuses(p)
    return ("torch's fused CPU kernel, region by region", None) if reason is None else ("tiles of torch operations", reason)


def why_not_fused_backward(p: Problem, dlse: bool) -> str | None:
    """Why the backward of a call whose forward is the fused kernel runs tiles of torch operations, or None; dlse: whether lse
    has a gradient."""
    return fused.refuses(p, backward=True, dlse=dlse)


def forward(p: Problem, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not fused.refuses(p):
        found = fused.forward(p, train)
        if p.sinks is None or not is_far(found[1]):  # sinks join by lse there
            return found
    return blocked.forward(p, train)


def backward(p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor) -> Grads:
    if do is None or fused.refuses(p, backward=True, dlse=dlse is not None) or is_far(lse):
        return blocked.backward(p, do, dlse, out, lse, out_lo)
    return fused.backward(p, do, out, lse, out_lo)

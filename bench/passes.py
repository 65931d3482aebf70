"""What is computed of a workload: the passes, as functions of an implementation and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .workloads import Inputs

Attend = Callable[[Inputs], Tensor]  # (B, H, L, D) from inputs of the shapes that it was built for

# by name: floating point operations in units of the forward's, in the field's convention; None where it has none
PASSES: dict[str, float | None] = {
    "forward": 1.0,
    "backward": 2.5,
    "forward+backward": 3.5,
    "forward mode": None,
    "double backward": None,
}
SHORT = dict(zip(PASSES, ("fwd", "bwd", "fwd+bwd", "jvp", "double bwd")))


def results(attend: Attend, x: Inputs, direction: str) -> tuple[Tensor, ...]:
    """What a pass yields: out, the leaves' gradients, out's tangent, or the gradients of <gradients, tangents>."""
    if direction == "forward":
        with torch.no_grad():
            return (attend(x.detached()),)
    if direction == "forward mode":
        return (forward_mode(attend, x),)
    out = attend(x)
    if direction != "double backward":
        return torch.autograd.grad(out, x.leaves, x.do)
    grads = torch.autograd.grad(out, x.leaves, x.do, create_graph=True)
    return torch.autograd.grad(grads, x.leaves, x.tangents)


def timed(attend: Attend, x: Inputs, direction: str) -> Callable[[], Any]:
    """The pass as a call of no arguments to time; for "backward" the graph is made beforehand."""
    if direction == "forward":
        plain = x.detached()
        return torch.no_grad()(lambda: attend(plain))
    if direction == "backward":
        out = attend(x)
        return lambda: torch.autograd.grad(out, x.leaves, x.do, retain_graph=True)
    return lambda: results(attend, x, direction)


def forward_mode(attend: Attend, x: Inputs) -> Tensor:
    """out's tangent along x.tangents."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(leaf.detach(), t) for leaf, t in zip(x.leaves, x.tangents, strict=True)]
        tangent = forward_ad.unpack_dual(attend(x.with_leaves(duals))).tangent
    assert tangent is not None
    return tangent

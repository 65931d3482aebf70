"""The short way for small plain calls on the CPU, where the host's work would outweigh the attention itself.

Full or square causal attention of dense tensors, with nothing watching (no transform, no mode, no compiler, no autocast):
torch's fused kernel inside one classic autograd.Function, without describing the call as a Problem. The tiniest calls take
torch's own autograd node instead, which costs less than a Function's two visits to Python; a hook on the output steps in
where that node's backward is itself to be differentiated. Anything else goes the long way, and all give the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import compat
from .autograd import BWD
from .backends.fused import VECTOR
from .problem import rows_apart

SMALL = 1 << 23  # score elements beyond which the host's work no longer shows
CAUSAL = 1 << 19  # the same of causal calls, which the long way cuts so that less is wasted above the diagonal
TINY = 1 << 15  # elements of q, k and v that may live as long as the graph, where a Function would free them in its backward
FEW = 128  # numbers that are quickly read one by one
_forward = compat.fused_cpu_forward
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_NOTHING_HIDDEN = {dtype: torch.zeros(1, 1, dtype=dtype) for dtype in (torch.float32, torch.float64)}


def attend(q: Any, k: Any, v: Any, causal: bool, scale: float | None) -> Tensor | None:
    """The output of a plain call, or None where the call must go the long way (an error in it included)."""
    if type(q) is not Tensor or type(k) is not Tensor or type(v) is not Tensor or not compat.nothing_watches():
        return None
    shape, k_shape = q.shape, k.shape
    if len(shape) != 4 or k_shape != v.shape:
        return None
    if k_shape != shape and (causal or shape[:2] + shape[3:] != k_shape[:2] + k_shape[3:]):
        return None
    dim, dtype, size = shape[3], q.dtype, q.numel()
    if not 0 < size * k_shape[2] <= (CAUSAL if causal else SMALL) * dim:
        return None
    if dtype not in _NOTHING_HIDDEN or k.dtype != dtype or v.dtype != dtype:
        return None
    if not (q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()) and (
        q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1 or not rows_apart(q)
    ):
        return None
    if scale is None:
        scale = 1.0 / math.sqrt(dim)
    elif type(scale) is not float or not 0.0 < scale < math.inf:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if size + 2 * k.numel() > TINY:
            return compat.base_apply(_Attend, q, k, v, causal, scale)
        out = _computed(q, k, v, causal, scale)[0]
        compat.watch_gradient(out, _Again(q, k, v, causal, scale))
        return out
    return _computed(q, k, v, causal, scale)[0]


def _computed(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse). With few keys the kernel takes a NaN row for a hidden one, which its lse of 0 gives away; a mask mends it."""
    out, lse = _forward(q, k, v, 0.0, causal, scale=scale)
    if k.shape[2] < VECTOR and _holds_zero(lse):
        return _forward(q, k, v, 0.0, causal, attn_mask=_NOTHING_HIDDEN[q.dtype], scale=scale)
    return out, lse


def _holds_zero(lse: Tensor) -> bool:
    """Of (B, H, L). A few numbers are read faster in Python than torch counts them."""
    if lse.numel() > FEW:
        return torch.count_nonzero(lse).item() < lse.numel()
    for heads in lse.tolist():
        for row in heads:
            if 0.0 in row:
                return True
    return False


class _Again:
    """Torch's backward of the call gives gradients that have no derivative; where one is needed, differentiable ones take
    their place. The object watches the output's gradient, which costs least, and puts itself behind the node only then."""

    __slots__ = ("call", "handle")
    __torch_unserializable__ = True  # pickling the output cuts the graph: nothing to warn of

    def __init__(self, *call: Any) -> None:
        self.call, self.handle = call, None

    def __call__(self, do: Any) -> None:
        if _differentiated_again(do) and self.handle is None:
            self.handle = compat.running_node().register_hook(self.instead)

    def instead(self, grads: Any, cotangents: Any) -> Any:
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.remove()
        if not _differentiated_again(cotangents[0]):
            return None
        q, k, v, causal, scale = self.call
        with torch.no_grad():
            out, lse = _computed(q, k, v, causal, scale)
        found = _long_backward(cotangents[0], q, k, v, out, lse, causal, scale)
        return tuple(None if old is None else new for old, new in zip(grads, found))


def _differentiated_again(do: Any) -> bool:
    return torch.is_grad_enabled() or type(do) is not Tensor or compat.in_functorch()


def _long_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    span, ints = ("i-ri", [0, 1]) if causal else ("i-i", [0, k.shape[2]])
    spec = f"m={span}|p=|c=0000|s=|b=tiled|d=1|g=0"
    grads = BWD(do, None, q, k, v, [], [], None, None, out, lse, q.new_empty(0), spec, scale, 0.0, ints, [])
    return grads[0], grads[1], grads[2]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        out, lse = _computed(q, k, v, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        if _differentiated_again(do):
            return *_long_backward(do, q, k, v, out, lse, ctx.causal, ctx.scale), None, None
        if do.stride(3) != 1:
            do = do.contiguous()
        dq, dk, dv = _backward(do, q, k, v, out, lse, 0.0, ctx.causal, scale=ctx.scale)
        return dq, dk, dv, None, None

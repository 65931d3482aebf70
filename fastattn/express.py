"""The short way for small plain calls on the CPU, where the host's work would outweigh the attention itself.

Full or square causal attention of dense tensors, with nothing watching (no transform, no mode, no compiler, no autocast):
torch's fused kernel inside one classic autograd.Function, without describing the call as a Problem. Anything else goes the
long way and gives the same numbers; so does a backward that is itself to be differentiated.
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

SMALL = 1 << 19  # score elements beyond which the host's work no longer shows
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_NOTHING_HIDDEN = {dtype: torch.zeros(1, 1, dtype=dtype) for dtype in (torch.float32, torch.float64)}


def attend(q: Any, k: Any, v: Any, causal: bool, scale: float | None) -> Tensor | None:
    """The output of a plain call, or None where the call must go the long way (an error in it included)."""
    if type(q) is not Tensor or type(k) is not Tensor or type(v) is not Tensor or not compat.nothing_watches():
        return None
    shape, k_shape = q.shape, k.shape
    if len(shape) != 4 or k_shape != v.shape:
        return None
    if shape != k_shape and (causal or shape[:2] + shape[3:] != k_shape[:2] + k_shape[3:]):
        return None
    n_b, n_h, n_q, dim = shape
    if not 0 < n_b * n_h * n_q * k_shape[2] * dim <= SMALL * dim or not q.is_cpu or q.dtype not in _NOTHING_HIDDEN:
        return None
    if q.dtype != k.dtype or q.dtype != v.dtype or not k.is_cpu or not v.is_cpu:
        return None
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1 or not rows_apart(q):
        return None
    if scale is None:
        scale = 1.0 / math.sqrt(dim)
    elif type(scale) is not float or not 0.0 < scale < math.inf:
        return None
    mask = _NOTHING_HIDDEN[q.dtype] if k_shape[2] < VECTOR else None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return compat.base_apply(_Attend, q, k, v, causal, scale, mask)
    return _forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)[0]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None) -> Tensor:
        out, lse = _forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled() or type(do) is not Tensor or compat.in_functorch():
            span = "i-ri" if ctx.causal else "i-i"
            ints = [0, 1] if ctx.causal else [0, k.shape[2]]
            spec = f"m={span}|p=|c=0000|s=|b=tiled|d=1|g=0"
            grads = BWD(do, None, q, k, v, [], [], None, None, out, lse, q.new_empty(0), spec, ctx.scale, 0.0, ints, [])
            return grads[0], grads[1], grads[2], None, None, None
        if do.stride(3) != 1:
            do = do.contiguous()
        dq, dk, dv = _backward(do, q, k, v, out, lse, 0.0, ctx.causal, scale=ctx.scale)
        return dq, dk, dv, None, None, None

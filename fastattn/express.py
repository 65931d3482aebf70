"""The short way for small calls on the CPU, where the host's work would outweigh the attention itself.

Attention of dense tensors that is full, square causal, or under a mask, with nothing watching (no transform, no mode, no
compiler, no autocast): torch's fused kernel inside one classic autograd.Function, without describing the call as a Problem. The
tiniest calls take torch's own autograd node instead, which costs less than a Function's two visits to Python; a hook on the
output steps in where that node's backward is itself to be differentiated, and reads again what the node saved: not where hooks
on saved tensors watch. Anything else goes the long way, and all give the
same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import compat
from .autograd import BWD
from .backends import joint
from .backends.fused import VECTOR
from .backends.operands import is_far
from .backends.regions import is_static
from .masks import Bound, Causal, LoweredMask, Mask
from .problem import IDENTITY, LOW, Problem, acc_dtype, rows_apart, with_param_grads
from .scores import Bias

SMALL = 1 << 23  # score elements beyond which the host's work no longer shows
CAUSAL = 1 << 19  # the same of causal calls, which the long way cuts so that less is wasted above the diagonal
TINY = 1 << 15  # elements of q, k and v: beyond, a backward that a differentiable one replaces costs more than a Function
FEW = 128  # numbers that are quickly read one by one
_forward = compat.fused_cpu_forward
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_DTYPES = (*LOW, torch.float32, torch.float64)
_NOTHING_HIDDEN = {dtype: torch.zeros(1, 1, dtype=acc_dtype(dtype)) for dtype in _DTYPES}


def attend(q: Any, k: Any, v: Any, causal: bool, scale: float | None, grouped: bool) -> Tensor | None:
    """The output of a call without a mask, or None where the call must go the long way (an error in it included).

    grouped: whether q may have a multiple of k's heads.
    """
    if not _takes(q, k, v, scale, grouped, CAUSAL if causal else SMALL) or (causal and q.shape[2] != k.shape[2]):
        return None
    return _attend(q, k, v, None, causal, scale)


def attend_masked(q: Any, k: Any, v: Any, mask: Mask | LoweredMask, scale: float | None) -> Tensor | None:
    """The same under a mask.

    Raises:
        ValueError: the mask cannot be lowered for these lengths.
    """
    if not _takes(q, k, v, scale, True, SMALL):
        return None
    (n_b, n_h, n_q, _), n_k = q.shape, k.shape[2]
    n_scores = n_b * n_h * n_q * n_k
    if type(mask) is Causal and n_q == n_k and not isinstance(mask.align, int):
        return _attend(q, k, v, None, True, scale) if n_scores <= CAUSAL else None
    if isinstance(mask, Mask):
        if not joint.worthwhile(n_b, n_h, n_q, n_k):
            return None
        mask = mask.lower(n_q, n_k)
    elif (mask.n_q, mask.n_k) != (n_q, n_k):
        return None
    if mask.is_full:
        return _attend(q, k, v, None, False, scale)
    if mask.is_causal and n_q == n_k:
        return _attend(q, k, v, None, True, scale) if n_scores <= CAUSAL else None
    if not joint.worthwhile(n_b, n_h, n_q, n_k):
        return None
    if mask.predicates or not is_static(mask):
        hidden = joint.hidden_in(mask, n_b, n_h)
        return None if hidden is None else _attend_hidden(q, k, v, hidden, None, scale)
    if n_scores > joint.CALL:
        return None
    spans = mask.spans
    added = joint.added_of_spans(spans, n_q, n_k, acc_dtype(q.dtype))
    return _attend_hidden(q, k, v, joint.of_spans(spans, n_q, n_k), added, scale)


def attend_tensor(q: Any, k: Any, v: Any, mask: Any, scale: float | None, grouped: bool) -> Tensor | None:
    """The same under a bool tensor (True: visible) or one that is added to the scores, of any shape that broadcasts."""
    if type(mask) is not Tensor or mask.is_nested or not mask.is_cpu or mask.layout != torch.strided or mask.requires_grad:
        return None
    if not _takes(q, k, v, scale, grouped, joint.MASK):
        return None
    (n_b, n_h, n_q, _), n_k = q.shape, k.shape[2]
    shape = mask.shape
    if len(shape) > 4 or any(m not in (1, n) for m, n in zip(reversed(shape), (n_k, n_q, n_h, n_b))):
        return None
    mask = mask.view((1,) * (4 - len(shape)) + shape)
    if mask.dtype != torch.bool:
        acc = acc_dtype(q.dtype)
        return _attend(q, k, v, mask.to(acc), False, scale, numbers=True) if mask.dtype in (q.dtype, acc) else None
    if not joint.worthwhile(n_b, n_h, n_q, n_k) or (n_b * n_h * n_q * n_k > joint.CALL and mask.shape[0] == 1):
        return None
    return _attend_hidden(q, k, v, joint.hidden_by(mask, n_k), None, scale)


def _takes(q: Any, k: Any, v: Any, scale: Any, grouped: bool, most: int) -> bool:
    """Whether torch's kernel takes these as they stand, of at most so many scores, and nothing watches."""
    if type(q) is not Tensor or type(k) is not Tensor or type(v) is not Tensor or not compat.nothing_watches():
        return False
    if q.is_nested or k.is_nested or v.is_nested:
        return False
    shape, k_shape, dtype = q.shape, k.shape, q.dtype
    if len(shape) != 4 or k_shape != v.shape:
        return False
    if k_shape != shape:
        if shape[0] != k_shape[0] or shape[3] != k_shape[3]:
            return False
        heads, own = shape[1], k_shape[1]
        if heads != own and (not grouped or own == 0 or heads % own):
            return False
    if dtype not in _NOTHING_HIDDEN or k.dtype != dtype or v.dtype != dtype:
        return False
    if not 0 < q.numel() * k_shape[2] <= most * shape[3]:
        return False
    if not (q.is_cpu and k.is_cpu and v.is_cpu and q.layout == k.layout == v.layout == torch.strided):
        return False
    if scale is not None and (type(scale) is not float or not 0.0 < scale < math.inf):
        return False
    return (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()) or (
        q.stride(3) == k.stride(3) == v.stride(3) == 1 and rows_apart(q) and rows_apart(k) and rows_apart(v)
    )


def _wants_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _attend_hidden(
    q: Tensor, k: Tensor, v: Tensor, hidden: joint.Hidden, added: Tensor | None, scale: float | None
) -> Tensor | None:
    """The output where a mask hides keys; None where one that no row sees holds what a weight of 0 does not silence."""
    if hidden.last - hidden.first < k.shape[2]:
        k, v = k[:, :, hidden.first : hidden.last], v[:, :, hidden.first : hidden.last]
    trained = _wants_gradients(q, k, v)
    if hidden.unseen and trained and not (joint.is_tame(k) and joint.is_tame(v)):
        return None
    added = joint.added(hidden.visible, acc_dtype(q.dtype)) if added is None else added
    out = _attend(q, k, v, added, False, scale)
    if hidden.unseen and not trained and out is not None and math.isnan(out.sum().item()):
        return None
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, causal: bool, scale: float | None, numbers: bool = False
) -> Tensor | None:  # fmt: skip
    """The output; None for a training call in half precision that is not tiny: whole copies of it would take memory.

    numbers: whether `added` may hold others than 0 and -inf.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    if not _wants_gradients(q, k, v):
        return _computed(q, k, v, added, causal, scale)[0]
    tiny = q.numel() + 2 * k.numel() <= TINY and compat.running_node is not None and not compat.saving_is_watched()
    dtype = q.dtype
    if dtype in LOW:
        if not tiny:
            return None
        q, k, v = q.float(), k.float(), v.float()
    if not tiny:
        return compat.base_apply(_Attend, q, k, v, added, causal, scale)
    out, lse = _computed(q, k, v, added, causal, scale)
    if numbers and is_far(lse):  # torch's own node would go on from it
        return compat.base_apply(_Attend, q, k, v, added, causal, scale).to(dtype)
    compat.watch_gradient(out, _again)
    return out if dtype == out.dtype else out.to(dtype)


def _computed(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse). With few keys the kernel takes a NaN row for a hidden one, which its lse of 0 gives away; a mask mends it."""
    out, lse = _forward(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
    if added is None and k.shape[2] < VECTOR and _holds_zero(lse):
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


def _again(do: Tensor) -> None:
    """Watches an output's gradient on its way into torch's own node, whose gradients have no derivative: where one is needed,
    differentiable ones take their place behind it."""
    if _differentiated_again(do):
        assert compat.running_node is not None
        node = compat.running_node()
        if node.metadata.setdefault("fastattn", False) is False:
            node.metadata["fastattn"] = node.register_hook(_instead)


_again.__torch_unserializable__ = True  # type: ignore[attr-defined]  # pickling an output cuts the graph: nothing to warn of


def _instead(grads: Any, cotangents: Any) -> Any:
    if not _differentiated_again(cotangents[0]):
        return None
    assert compat.running_node is not None
    q, k, v, added, causal, scale, out, lse = compat.saved_by_fused_cpu_forward(compat.running_node())
    found = _long_backward(cotangents[0], out, lse, q, k, v, added, causal, scale)
    return tuple(None if old is None else new for old, new in zip(grads, found))


def _differentiated_again(do: Any) -> bool:
    return torch.is_grad_enabled() or type(do) is not Tensor or compat.in_functorch()


def _long_backward(
    do: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n_q, n_k = q.shape[2], k.shape[2]
    mask = LoweredMask(n_q, n_k, ((Bound(0, 0), Bound(1, 1) if causal else Bound(0, n_k)),))
    chain = () if added is None else (Bias(added),)
    if added is not None:  # the kernel says 0 for the lse of a row that sees nothing
        lse = lse.masked_fill((added == -torch.inf).all(-1), -torch.inf)
    packed = Problem(q, k, v, mask, chain, None, None, IDENTITY, scale, 0.0, "tiled", True).pack()
    grads = BWD(
        do, None, q, k, v, packed.mask, packed.params, None, None, out, lse, q.new_empty(0),
        with_param_grads(packed.spec, False), scale, 0.0, packed.ints, packed.floats,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, causal: bool, scale: float) -> Tensor:
        out, lse = _computed(q, k, v, added, causal, scale)
        ctx.save_for_backward(q, k, v, added, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        q, k, v, added, out, lse = ctx.saved_tensors
        if _differentiated_again(do) or is_far(lse):
            return *_long_backward(do, out, lse, q, k, v, added, ctx.causal, ctx.scale), None, None, None
        if do.stride(3) != 1:
            do = do.contiguous()
        dq, dk, dv = _backward(do, q, k, v, out, lse, 0.0, ctx.causal, attn_mask=added, scale=ctx.scale)
        return dq, dk, dv, None, None, None

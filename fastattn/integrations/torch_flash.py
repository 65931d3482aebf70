"""fastattn as one of torch's own flash attention implementations.

    from fastattn.integrations import torch_flash

    torch_flash.register()
    torch.nn.attention.activate_flash_attention_impl("fastattn")

From then on torch's flash kernels are ours wherever torch itself decides for flash: scaled_dot_product_attention without a
mask on cuda tensors, torch.nn.attention.varlen, context parallelism. On Hopper torch prefers cuDNN to flash; there
`torch.backends.cuda.enable_cudnn_sdp(False)` lets it be reached. `fastattn.install()` reaches more, masks among it.
On the CPU, where torch has no such kernels, varlen_attn begins to work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import compat, dispatch
from ..autograd import BWD
from ..functional import _run, check_qkv, checked_scale, lowered_mask
from ..masks import Documents
from ..problem import IDENTITY, Problem
from . import ledger
from .flash_attn import bottom_right

NAME = "fastattn"
Kernels = dict[str, Callable[..., Any]]


def register(name: str = NAME) -> None:
    """Make fastattn known to `torch.nn.attention.activate_flash_attention_impl`. Activates nothing.

    Args:
        name: under which it is known.

    Raises:
        ImportError: this torch has no such registry.
    """
    from torch.nn.attention import register_flash_attention_impl

    register_flash_attention_impl(name, register_fn=activate)


class Handle:
    """What torch keeps of an active implementation; `remove()` gives torch's kernels back."""

    def __init__(self) -> None:
        packed_kernels: Kernels = {
            "_flash_attention_forward": packed,
            "_flash_attention_backward": packed_backward,
            "_flash_attention_forward_no_dropout_inplace": packed_into,
        }
        dense_kernels: Kernels = {
            "_scaled_dot_product_flash_attention": dense_forward,
            "_scaled_dot_product_flash_attention_backward": dense_backward,
        }
        self._ways = [compat.implement({**dense_kernels, **packed_kernels}, "CUDA"), compat.implement(packed_kernels, "CPU")]
        compat.forget_compiled()

    def remove(self) -> None:
        """Give torch's kernels back; a second time, nothing happens."""
        while self._ways:
            self._ways.pop()()
        compat.forget_compiled()


def activate() -> Handle:
    """What torch calls on activation."""
    return Handle()


def described(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: Any, scale: Any,
    dropout_p: float, rng: Tensor | None,
) -> Problem:  # fmt: skip
    """A call on (B, H, L, D), or with cumulative lengths on (1, H, total, D), as a Problem."""
    check_qkv(q, k, v)
    mask: Any = bottom_right(causal, window)
    if cu_q is not None:
        mask = Documents(cu_seqlens=cu_q, cu_seqlens_k=cu_k, within=mask)
    n_b, n_h, n_q, head_dim = q.shape
    lowered = lowered_mask(mask, n_b, n_h, n_q, k.shape[2], q.device)
    p = Problem(
        q, k, v, lowered, (), None, rng, IDENTITY, checked_scale(scale, head_dim), float(dropout_p),
        dispatch.choose(None, q.device), True,
    )  # fmt: skip
    return dispatch.settled(p, None)


def key_of_dropout(dropout_p: float, device: torch.device) -> Tensor | None:
    """Philox's key (1, 2) int64, drawn from torch's generator; None without dropout."""
    return torch.randint(0, 1 << 32, (1, 2), dtype=torch.int64, device=device) if dropout_p > 0.0 else None


def state(rng: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The key as torch hands it to the backward: (uint64 (2,), uint64 ())."""
    zero = torch.zeros((), dtype=torch.uint64, device=device)
    return (torch.zeros(2, dtype=torch.uint64, device=device) if rng is None else rng[0].view(torch.uint64)), zero


def gradients(p: Problem, do: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed = p.pack()
    dq, dk, dv, _, _ = BWD(
        do, None, p.q, p.k, p.v, packed.mask, packed.params, None, p.rng, out, lse, p.q.new_empty(0),
        packed.spec, p.scale, p.dropout_p, packed.ints, packed.floats,
    )  # fmt: skip
    return dq, dk, dv


def dense_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """aten::_scaled_dot_product_flash_attention on (B, H, L, D)."""
    ledger.took("torch flash attention")
    rng = key_of_dropout(dropout_p, query.device)
    out, lse = _run(described(query, key, value, None, None, is_causal, (-1, -1), scale, dropout_p, rng))
    seed, offset = state(rng, query.device)
    none = query.new_empty(0)
    out = torch.empty_like(query).copy_(out) if out.stride() != query.stride() else out
    return out, lse.contiguous(), None, None, query.shape[2], key.shape[2], seed, offset, none


def dense_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    """aten::_scaled_dot_product_flash_attention_backward."""
    rng = philox_seed.view(torch.int64)[None] if dropout_p > 0.0 else None
    p = described(query, key, value, None, None, is_causal, (-1, -1), scale, dropout_p, rng)
    return gradients(p, grad_out, out, logsumexp)


def packed(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    """aten::_flash_attention_forward on (total, H, D), or (B, L, H, D) without cumulative lengths."""
    for name, x in (("seqused_k", seqused_k), ("alibi_slopes", alibi_slopes), ("block_table", block_table)):
        if x is not None:
            raise NotImplementedError(f"fastattn as torch's flash attention does not take {name}")
    ledger.took("torch flash attention, packed")
    rng = key_of_dropout(dropout_p, query.device)
    window = _window(window_size_left, window_size_right)
    q, k, v = _heads_first(cum_seq_q, query, key, value)
    out, lse = _run(described(q, k, v, cum_seq_q, _keys(cum_seq_q, cum_seq_k), is_causal, window, scale, dropout_p, rng))
    seed, offset = state(rng, query.device)
    (out,) = _rows_first(cum_seq_q, out)
    return out.contiguous(), (lse if cum_seq_q is None else lse[0]).contiguous(), seed, offset, query.new_empty(0)


def packed_into(out, *arguments: Any, **options: Any):
    """aten::_flash_attention_forward_no_dropout_inplace: the output goes into `out`."""
    found = packed(*arguments, **options)
    out.copy_(found[0])
    return found[1]


def packed_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
    *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """aten::_flash_attention_backward."""
    rng = rng_state.view(torch.int64)[None] if dropout_p > 0.0 else None
    window = _window(window_size_left, window_size_right)
    q, k, v, o, do = _heads_first(cum_seq_q, query, key, value, out, grad_out)
    p = described(q, k, v, cum_seq_q, _keys(cum_seq_q, cum_seq_k), is_causal, window, scale, dropout_p, rng)
    lse = logsumexp if cum_seq_q is None else logsumexp[None]
    grads = _rows_first(cum_seq_q, *gradients(p, do, o, lse))
    return tuple(torch.empty_like(x).copy_(g) for x, g in zip((query, key, value), grads))


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, -1 if right is None else right


def _keys(cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor | None:
    return None if cu_q is None else cu_q if cu_k is None else cu_k


def _heads_first(cu: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) if cu is None else x.transpose(0, 1)[None] for x in tensors]


def _rows_first(cu: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) if cu is None else x[0].transpose(0, 1) for x in tensors]

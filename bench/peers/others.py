"""Kernels in Triton and CUTLASS by others: flash-linear-attention's, fastflash, jvp-flash-attention and xFormers."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..passes import Attend
from ..workloads import Inputs, Workload
from .base import Peer, by_length


class Fla(Peer):
    """fla.ops.attn.parallel_attn: causal softmax attention in Triton."""

    name = "fla"
    package = "fla"
    cuda = True
    features = frozenset(["window", "documents", "grouped heads"])
    dtypes = ("float16", "bfloat16", "float32")

    def cannot(self, w: Workload, device: str, direction: str) -> str | None:
        return super().cannot(w, device, direction) or (None if w.causal else "causal only")

    def build(self, w: Workload, x: Inputs) -> Attend:
        parallel_attn = importlib.import_module("fla.ops.attn").parallel_attn
        places: dict[str, Any] = {"cu_seqlens": x.data["cu_seqlens"].long()} if w.documents else {}
        if w.window:
            places["window_size"] = w.window

        def attend(x: Inputs) -> Tensor:
            return by_length(parallel_attn(by_length(x.q), by_length(x.k), by_length(x.v), scale=w.logit_scale, **places))

        return attend


class FastFlash(Peer):
    """fastflash-attention: bf16, causal or full, in Triton."""

    name = "fastflash"
    package = "fastflash_attention"
    cuda = True
    dtypes = ("bfloat16",)
    head_dims = (16, 32, 64, 128)

    def cannot(self, w: Workload, device: str, direction: str) -> str | None:
        return super().cannot(w, device, direction) or ("no scale" if w.scale is not None else None)

    def build(self, w: Workload, x: Inputs) -> Attend:
        fast_attention = importlib.import_module("fastflash_attention").fast_attention
        return lambda x: fast_attention(x.q, x.k, x.v, is_causal=w.causal)


class JvpFlash(Peer):
    """jvp-flash-attention: forward mode in Triton."""

    name = "jvp-flash"
    package = "jvp_flash_attention"
    cuda = True
    passes = ("forward mode",)
    head_dims = (16, 32, 64, 128, 256)

    def cannot(self, w: Workload, device: str, direction: str) -> str | None:
        return super().cannot(w, device, direction) or ("no scale" if w.scale is not None else None)

    def build(self, w: Workload, x: Inputs) -> Attend:
        attention = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn
        return lambda x: attention.fwd_dual(x.q, x.k, x.v, causal=w.causal)

    def results(self, attend: Attend, x: Inputs, direction: str) -> tuple[Tensor, ...]:
        """torch.func.jvp, which is the entry that it supports."""

        def of(*leaves: Tensor) -> Tensor:
            return attend(x.with_leaves(leaves))

        return (torch.func.jvp(of, tuple(leaf.detach() for leaf in x.leaves), x.tangents)[1],)


class XFormers(Peer):
    """xformers.ops.memory_efficient_attention."""

    name = "xformers"
    package = "xformers"
    cuda = True
    features = frozenset(["documents", "bias"])

    def build(self, w: Workload, x: Inputs) -> Attend:
        ops = importlib.import_module("xformers.ops")
        masks = importlib.import_module("xformers.ops.fmha.attn_bias")
        fixed: Any = None
        if w.documents:
            kind = masks.BlockDiagonalCausalMask if w.causal else masks.BlockDiagonalMask
            fixed = kind.from_seqlens(x.data["cu_seqlens"].diff().tolist())
        elif w.causal:
            fixed = masks.LowerTriangularMask()

        def attend(x: Inputs) -> Tensor:
            added = x.params["bias"].to(x.q.dtype).expand(w.batch, -1, -1, -1) if w.bias else fixed
            q, k, v = by_length(x.q), by_length(x.k), by_length(x.v)
            return by_length(ops.memory_efficient_attention(q, k, v, attn_bias=added, scale=w.logit_scale))

        return attend

    def cannot(self, w: Workload, device: str, direction: str) -> str | None:
        return super().cannot(w, device, direction) or ("a bias or causal, not both" if w.bias and w.causal else None)

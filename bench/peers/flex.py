"""torch.nn.attention.flex_attention, compiled: by Inductor's Triton template, or by FlashAttention-4 under it."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..passes import Attend
from ..workloads import Inputs, Workload, distances, mask_mod
from .base import Peer


class Flex(Peer):
    """backend: of its kernel_options, or None for its own choice."""

    features = frozenset(
        ["window", "documents", "padding", "prefix", "mask", "softcap", "alibi", "bias", "relative bias", "grouped heads"]
    )
    compiles = True

    def __init__(self, backend: str | None = None):
        self.name = "flex" if backend is None else f"flex {backend.lower()}"
        self.options: Any = None if backend is None else {"BACKEND": backend}
        if backend is not None:
            self.cuda, self.package = True, "flash_attn.cute"

    def unavailable(self, device: str) -> str | None:
        if device == "cpu" and not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
            return "its CPU kernel needs a C++ compiler"
        return super().unavailable(device)

    def cannot(self, w: Workload, device: str, direction: str) -> str | None:
        if device == "cpu" and direction != "forward":
            return "forward only on CPU"
        return super().cannot(w, device, direction)

    def build(self, w: Workload, x: Inputs) -> Attend:
        visible = mask_mod(w, x)
        block_mask = None
        if visible is not None:
            n_b = w.batch if w.padding else None
            block_mask = create_block_mask(visible, n_b, None, w.length, w.length, device=x.q.device.type)
        bucket = distances(w, x.q.device) if w.relative else None
        cap, n, gqa = w.softcap or 0.0, w.length, w.heads != w.kv_heads
        torch.compiler.reset()  # a graph per workload: torch keeps eight and then runs uncompiled without an error
        compiled = torch.compile(flex_attention, dynamic=False)

        def attend(x: Inputs) -> Tensor:
            params = x.params

            def score_mod(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
                if w.softcap is not None:
                    s = cap * torch.tanh(s / cap)
                if w.alibi:
                    s = s - params["slopes"][0, h] * (q_idx - k_idx).abs()
                if w.bias:
                    s = s + params["bias"][0, h, q_idx, k_idx]
                if bucket is not None:
                    s = s + params["table"][bucket[k_idx - q_idx + n - 1], h]
                return s

            modified = w.features & {"softcap", "alibi", "bias", "relative bias"}
            return compiled(
                x.q, x.k, x.v, score_mod=score_mod if modified else None, block_mask=block_mask, scale=w.logit_scale,
                enable_gqa=gqa, kernel_options=self.options,
            )  # fmt: skip

        return attend

"""torch.nn.attention.flex_attention, compiled."""

from __future__ import annotations

import shutil

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..workloads import Inputs, Workload, distances, mask_mod
from .base import Call, Peer


class Flex(Peer):
    name = "flex"

    def unavailable(self, device: str) -> str | None:
        if device == "cpu" and not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
            return "its CPU kernel needs a C++ compiler"
        return None

    def cannot(self, w: Workload, device: str, gradients: bool) -> str | None:
        if device == "cpu" and gradients:
            return "no backward on CPU"
        return None

    def build(self, w: Workload, x: Inputs) -> Call:
        visible = mask_mod(w, x)
        block_mask = None
        if visible is not None:
            n_b = w.batch if w.padding else None
            block_mask = create_block_mask(visible, n_b, None, w.length, w.length, device=x.q.device.type)
        bucket = distances(w, x.q.device) if w.relative else None
        table, cap, n = x.table, w.softcap or 0.0, w.length

        def capped(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
            return cap * torch.tanh(s / cap)

        def biased(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
            assert bucket is not None
            assert table is not None
            return s + table[bucket[k_idx - q_idx + n - 1], h]

        score_mod = capped if w.softcap is not None else biased if w.relative else None
        torch.compiler.reset()  # a graph per workload: torch keeps eight and then runs uncompiled without an error
        compiled = torch.compile(flex_attention, dynamic=False)
        gqa = w.heads != w.kv_heads
        return lambda: compiled(x.q, x.k, x.v, score_mod=score_mod, block_mask=block_mask, scale=w.logit_scale, enable_gqa=gqa)

"""FlashAttention 2, 3 and 4: (B, L, H, D) tensors, windows and packed documents by argument, no mask and no bias."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..passes import Attend
from ..workloads import Inputs, Workload
from .base import Peer, by_length, packed


class Flash(Peer):
    """What the three have in common; `arguments` says how each one names the rest."""

    cuda = True
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    head_dims = range(8, 257, 8)

    def arguments(self, w: Workload, x: Inputs) -> dict[str, Any]:
        """Of a call beyond tensors, scale and causal."""
        found: dict[str, Any] = {}
        if w.window:
            found["window_size"] = (w.window - 1, 0)
        if w.softcap is not None:
            found["softcap"] = w.softcap
        return found

    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The dense function and the packed one."""
        module = importlib.import_module(self.package or "")
        return module.flash_attn_func, module.flash_attn_varlen_func

    def build(self, w: Workload, x: Inputs) -> Attend:
        dense, varlen = self.functions()
        fixed = {"softmax_scale": w.logit_scale, "causal": w.causal}
        if not w.documents:

            def attend(x: Inputs) -> Tensor:
                out = dense(by_length(x.q), by_length(x.k), by_length(x.v), **fixed, **self.arguments(w, x))
                return by_length(_first(out))

            return attend
        cu_seqlens = x.data["cu_seqlens"]
        longest = int(cu_seqlens.diff().max())  # once, as a model does for all of its layers
        places = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}

        def attend_packed(x: Inputs) -> Tensor:
            out = varlen(packed(x.q), packed(x.k), packed(x.v), **places, **fixed, **self.arguments(w, x))
            return packed(_first(out)[None]).unsqueeze(0)

        return attend_packed


class Flash2(Flash):
    name = "flash-attn 2"
    package = "flash_attn"
    features = frozenset(["window", "documents", "softcap", "alibi", "grouped heads"])

    def unavailable(self, device: str) -> str | None:
        reason = super().unavailable(device)
        if reason is None and not hasattr(importlib.import_module("flash_attn"), "flash_attn_func"):
            return "flash_attn is there without its second version"  # the fourth shares the name
        return reason

    def arguments(self, w: Workload, x: Inputs) -> dict[str, Any]:
        return super().arguments(w, x) | ({"alibi_slopes": x.params["slopes"][0].float()} if w.alibi else {})


class Flash3(Flash):
    """Its forward, as the package fa3-fwd has it."""

    name = "flash-attn 3"
    package = "fa3_fwd_interface"
    features = frozenset(["window", "documents", "softcap", "grouped heads"])
    dtypes = ("bfloat16",)
    passes = ("forward",)


class Flash4(Flash):
    """flash_attn.cute; a window's open end is None there."""

    name = "flash-attn 4"
    package = "flash_attn.cute"
    features = frozenset(["window", "documents", "softcap", "sinks", "grouped heads"])
    compiles = True

    def cannot(self, w: Workload, device: str, direction: str) -> str | None:
        reason = super().cannot(w, device, direction)
        if reason is None and w.softcap is not None and direction != "forward":
            return "no gradient with a softcap"
        if reason is None and device == "cuda" and w.head_dim > 192 and torch.cuda.get_device_capability()[0] == 9:
            return "no backward beyond head_dim 192 on sm_90" if direction != "forward" else None
        return reason

    def arguments(self, w: Workload, x: Inputs) -> dict[str, Any]:
        return super().arguments(w, x) | ({"learnable_sink": x.params["sinks"][0].to(torch.bfloat16)} if w.sinks else {})


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, (tuple, list)) else out

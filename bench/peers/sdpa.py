"""torch.nn.functional.scaled_dot_product_attention: as it chooses by itself, and each of its kernels by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..workloads import Inputs, Workload
from .base import Call, Peer
from .plain import bias

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Sdpa(Peer):
    """kernel: a name of KERNELS, or None for torch's own choice."""

    def __init__(self, kernel: str | None):
        self.kernel = kernel
        self.name = "sdpa" if kernel is None else f"sdpa {kernel}"

    def unavailable(self, device: str) -> str | None:
        if self.kernel in ("efficient", "cudnn") and device != "cuda":
            return "CUDA only"
        return None

    def cannot(self, w: Workload, device: str, gradients: bool) -> str | None:
        if w.softcap is not None:
            return "no softcap"
        if self.kernel == "flash":
            if w.relative and gradients:
                return "no gradient to a bias"
            if device == "cpu":
                return "what sdpa chooses by itself"
            if not w.plain:
                return "no mask tensor"
        return None

    def build(self, w: Workload, x: Inputs) -> Call:
        visible = None if w.plain else self._visible(w, x)
        gqa = w.heads != w.kv_heads

        def run() -> Tensor:
            mask = visible
            if w.relative:
                mask = bias(w, x)
            return F.scaled_dot_product_attention(
                x.q, x.k, x.v, attn_mask=mask, is_causal=w.causal and mask is None, scale=w.scale, enable_gqa=gqa
            )

        if self.kernel is None:
            return run
        chosen = KERNELS[self.kernel]

        def run_chosen() -> Tensor:
            with sdpa_kernel(chosen):
                return run()

        return run_chosen

    @staticmethod
    def _visible(w: Workload, x: Inputs) -> Tensor | None:
        if w.relative:
            return None
        return x.mask.to_dense(w.length, w.length, x.q.device)

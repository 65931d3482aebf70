"""torch.nn.functional.scaled_dot_product_attention: as it chooses by itself, and each of its kernels by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..passes import PASSES, Attend
from ..workloads import Inputs, Workload
from .base import Peer
from .plain import bias

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Sdpa(Peer):
    """kernel: a name of KERNELS, or None for torch's own choice."""

    features = frozenset(
        ["window", "documents", "padding", "prefix", "mask", "alibi", "bias", "relative bias", "grouped heads"]
    )

    def __init__(self, kernel: str | None):
        self.kernel = kernel
        self.name = "sdpa" if kernel is None else f"sdpa {kernel}"
        self.cuda = kernel in ("efficient", "cudnn")
        if kernel == "math":
            self.passes = tuple(PASSES)

    def cannot(self, w: Workload, device: str, direction: str) -> str | None:
        reason = super().cannot(w, device, direction)
        if reason is None and self.kernel == "flash":
            if w.learned and direction != "forward":
                return "no gradient to a bias"
            if device == "cpu":
                return "what sdpa chooses by itself"
            if not w.plain:
                return "no mask tensor"
        return reason

    def build(self, w: Workload, x: Inputs) -> Attend:
        added = bool(w.features & {"relative bias", "alibi", "bias"})
        visible = None
        if not w.plain and w.masked:
            visible = x.mask.to_dense(w.length, w.length, x.q.device)
        gqa = w.heads != w.kv_heads

        def attend(x: Inputs) -> Tensor:
            mask = visible
            if added:
                mask = bias(w, x)
                assert mask is not None
                mask = mask.to(x.q.dtype)
                if visible is not None:
                    mask = mask.masked_fill(~visible, float("-inf"))
            return F.scaled_dot_product_attention(
                x.q, x.k, x.v, attn_mask=mask, is_causal=w.causal and mask is None, scale=w.scale, enable_gqa=gqa
            )

        if self.kernel is None:
            return attend
        chosen = KERNELS[self.kernel]

        def by_name(x: Inputs) -> Tensor:
            with sdpa_kernel(chosen):
                return attend(x)

        return by_name

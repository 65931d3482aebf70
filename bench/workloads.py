"""Attention as it stands in well-known models: the shapes, masks and scores that the benchmark runs.

Lengths and batches are such that a CPU finishes in seconds; on CUDA lengths are `CUDA_FACTOR` times longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import Causal, Documents, Full, Mask, Padding, RelativeBias, Score, SlidingWindow, Softcap, t5_bucket

CUDA_FACTOR = 4
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """One model's attention.

    Attributes:
        heads, kv_heads: query heads and key heads. head_dim: of q, k and v.
        window: how many keys a row sees, its own last; None for all.
        documents: how many sequences of unequal length are packed into a row of the batch.
        padding: sequences of unequal length, padded on the right; padding keys are hidden.
        softcap: c of c tanh(s / c). relative: a learned bias per head over T5's distance buckets.
        scale: of the logits; 1 / sqrt(head_dim) by default.
    """

    name: str
    model: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window: int | None = None
    documents: int = 0
    padding: bool = False
    softcap: float | None = None
    relative: bool = False
    scale: float | None = None

    @property
    def plain(self) -> bool:
        """Whether every key counts for every row, or is_causal says which."""
        return not (self.window or self.documents or self.padding or self.softcap or self.relative)

    @property
    def logit_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        parts = [f"B{self.batch} H{heads} L{self.length} D{self.head_dim} {str(self.dtype)[6:]}"]
        parts += ["causal"] if self.causal else []
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"{self.documents} documents"] if self.documents else []
        parts += ["padding"] if self.padding else []
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        parts += ["learned relative bias"] if self.relative else []
        return " ".join(parts)


MODELS = (
    Workload("bert-base", "BERT-base, padded batch", 4, 12, 12, 384, 64, padding=True),
    Workload("gpt2", "GPT-2 small", 1, 12, 12, 1024, 64, causal=True),
    Workload("llama3-8b", "Llama-3 8B, one prompt", 1, 32, 8, 768, 128, torch.bfloat16, causal=True),
    Workload("gemma2-2b", "Gemma-2 2B, local layer", 1, 8, 4, 1024, 256, causal=True, window=512, softcap=50.0),
    Workload("t5-base", "T5-base encoder", 1, 12, 12, 512, 64, relative=True, scale=1.0),
    Workload("vit-b16", "ViT-B/16 at 224 px", 8, 12, 12, 197, 64),
    Workload("whisper-small", "Whisper small encoder, 30 s", 1, 12, 12, 1500, 64),
    Workload("packed", "GPT-2 small, packed documents", 1, 12, 12, 2048, 64, causal=True, documents=8),
    Workload("long-window", "sliding window, long context", 1, 4, 1, 4096, 64, causal=True, window=512),
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one run. `table` is (32, H): T5's bias per bucket and head. Masks are built once, outside timing."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    table: Tensor | None
    mask: Mask
    data: dict[str, Tensor] = field(default_factory=dict)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return (self.q, self.k, self.v) + ((self.table,) if self.table is not None else ())

    def detached(self) -> Inputs:
        """The same values without gradient tracking."""
        table = None if self.table is None else self.table.detach()
        return replace(self, q=self.q.detach(), k=self.k.detach(), v=self.v.detach(), table=table)

    def double(self) -> Inputs:
        """The same rounded values in float64."""
        q, k, v = (x.detach().double().requires_grad_() for x in (self.q, self.k, self.v))
        table = None if self.table is None else self.table.detach().double().requires_grad_()
        return replace(self, q=q, k=k, v=v, do=self.do.double(), table=table)


def inputs(w: Workload, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors for w, as a model holds them: (B, L, H, D) seen as (B, H, L, D), wanting gradients."""
    g = torch.Generator(device).manual_seed(seed)

    def make(heads: int) -> Tensor:
        x = torch.randn(w.batch, w.length, heads, w.head_dim, generator=g, device=device).to(w.dtype)
        return x.transpose(1, 2)

    q, k, v, do = make(w.heads), make(w.kv_heads), make(w.kv_heads), make(w.heads)
    if w.scale is not None:  # a model without a scale has small queries instead
        q = q * w.head_dim**-0.5
    table = torch.randn(32, w.heads, generator=g, device=device).requires_grad_() if w.relative else None
    mask, data = _mask(w, device)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do, table, mask, data)


def scores(w: Workload, x: Inputs) -> tuple[Score, ...]:
    """w's score chain over x's parameters."""
    if w.softcap is not None:
        return (Softcap(w.softcap),)
    if x.table is not None:
        return (RelativeBias(x.table[distances(w, x.q.device)].t()),)
    return ()


def distances(w: Workload, device: torch.device) -> Tensor:
    """The bucket of every distance j - i from 1 - length to length - 1, (2 * length - 1,)."""
    return t5_bucket(torch.arange(1 - w.length, w.length, device=device), bidirectional=True)


def mask_mod(w: Workload, x: Inputs) -> MaskMod | None:
    """w's mask as FlexAttention takes it."""
    data = x.data

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        seen = (q_idx >= k_idx) if w.causal else (q_idx >= 0)
        if w.window:
            seen = seen & (q_idx - k_idx < w.window)
        if w.documents:
            seen = seen & (data["ids"][q_idx] == data["ids"][k_idx])
        if w.padding:
            seen = seen & (k_idx < data["lengths"][b])
        return seen

    return visible if w.causal or w.window or w.documents or w.padding else None


def _mask(w: Workload, device: str) -> tuple[Mask, dict[str, Tensor]]:
    if w.documents:
        shares = torch.arange(1, w.documents + 1).cumsum(0)  # lengths as 1 : 2 : 3 : ...
        cuts = (shares * w.length // shares[-1]).to(device)
        cu_seqlens = torch.cat([cuts.new_zeros(1), cuts]).int()
        ids = torch.bucketize(torch.arange(w.length, device=device), cuts, right=True)
        return Documents(cu_seqlens=cu_seqlens, within=Causal("top_left")), {"ids": ids}
    if w.padding:
        lengths = w.length - torch.arange(w.batch, device=device) * w.length // (2 * w.batch)
        keep = torch.arange(w.length, device=device) < lengths[:, None]
        return Padding(keep), {"lengths": lengths}
    if w.window:
        return SlidingWindow(w.window - 1, 0), {}
    return (Causal() if w.causal else Full()), {}

"""Attention as it stands in well-known models: the shapes, masks and scores that the benchmark runs.

Lengths and batches are such that a CPU finishes in seconds; on CUDA lengths are `CUDA_FACTOR` times longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import (
    ALiBi,
    Bias,
    Causal,
    Dense,
    Documents,
    Full,
    Mask,
    Padding,
    PrefixLM,
    RelativeBias,
    Score,
    SlidingWindow,
    Softcap,
    t5_bucket,
)

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
        prefix: so many first keys are seen by every row, beside the causal ones.
        dense: a random bool mask that hides half of the keys.
        softcap: c of c tanh(s / c). relative: a learned bias per head over T5's distance buckets.
        alibi: ALiBi's fixed slopes. bias: a learned bias for every head, row and key. sinks: a learned logit per head.
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
    prefix: int = 0
    dense: bool = False
    softcap: float | None = None
    relative: bool = False
    alibi: bool = False
    bias: bool = False
    sinks: bool = False
    scale: float | None = None

    @property
    def features(self) -> frozenset[str]:
        """What a peer must be able to do beyond full and causal attention, in words."""
        named = {
            "window": self.window, "documents": self.documents, "padding": self.padding, "prefix": self.prefix,
            "mask": self.dense, "softcap": self.softcap, "relative bias": self.relative, "alibi": self.alibi,
            "bias": self.bias, "sinks": self.sinks, "grouped heads": self.heads != self.kv_heads,
        }  # fmt: skip
        return frozenset(name for name, value in named.items() if value)

    @property
    def plain(self) -> bool:
        """Whether every key counts for every row, or is_causal says which."""
        return not self.features - {"grouped heads"}

    @property
    def masked(self) -> bool:
        """Whether a row may not see every key."""
        return self.causal or bool(self.features & {"window", "documents", "padding", "prefix", "mask"})

    @property
    def logit_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def learned(self) -> bool:
        """Whether it has a bias with a gradient."""
        return self.relative or self.bias

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        parts = [f"B{self.batch} H{heads} L{self.length} D{self.head_dim} {str(self.dtype)[6:]}"]
        parts += ["causal"] if self.causal else []
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"{self.documents} documents"] if self.documents else []
        parts += ["padding"] if self.padding else []
        parts += [f"prefix {self.prefix}"] if self.prefix else []
        parts += ["random mask"] if self.dense else []
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        parts += ["learned relative bias"] if self.relative else []
        parts += ["ALiBi"] if self.alibi else []
        parts += ["learned bias"] if self.bias else []
        parts += ["learned sinks"] if self.sinks else []
        return " ".join(parts)


MODELS = (
    Workload("bert-base", "BERT-base, padded batch", 4, 12, 12, 384, 64, padding=True),
    Workload("gpt2", "GPT-2 small", 1, 12, 12, 1024, 64, causal=True),
    Workload("llama3-8b", "Llama-3 8B, one prompt", 1, 32, 8, 512, 128, torch.bfloat16, causal=True),
    Workload("gemma2-2b", "Gemma-2 2B, local layer", 1, 8, 4, 1024, 256, causal=True, window=512, softcap=50.0),
    Workload("t5-base", "T5-base encoder", 1, 12, 12, 512, 64, relative=True, scale=1.0),
    Workload("vit-b16", "ViT-B/16 at 224 px", 8, 12, 12, 197, 64),
    Workload("whisper-small", "Whisper small encoder, 30 s", 1, 12, 12, 1500, 64),
    Workload("packed", "GPT-2 small, packed documents", 1, 12, 12, 2048, 64, causal=True, documents=8),
    Workload("long-window", "sliding window, long context", 1, 4, 1, 4096, 64, causal=True, window=512),
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one run. Masks are built once, outside timing.

    Attributes:
        params: tensors with heads in dimension 1, by name: "table" (32, H), T5's bias per bucket and head; "bias" (1, H, L, L);
            "slopes" and "sinks" (1, H).
        data: what the mask is made of. tangents: a direction for every leaf.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    params: dict[str, Tensor]
    mask: Mask
    data: dict[str, Tensor] = field(default_factory=dict)
    tangents: tuple[Tensor, ...] = ()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return (self.q, self.k, self.v, *(p for p in self.params.values() if p.requires_grad))

    def detached(self) -> Inputs:
        """The same values without gradient tracking."""
        return self._map(lambda t: t.detach())

    def double(self) -> Inputs:
        """The same rounded values in float64."""
        return self._map(lambda t: t.detach().double().requires_grad_(t.requires_grad))

    def head(self, index: int, group: int) -> Inputs:
        """Key head `index` with its group of query heads."""

        def cut(t: Tensor, where: slice) -> Tensor:
            return t[:, where].detach().requires_grad_(t.requires_grad)

        own, one = slice(index * group, (index + 1) * group), slice(index, index + 1)
        q, k, v, *rest = self.tangents or (self.q, self.k, self.v)
        return replace(
            self, q=cut(self.q, own), k=cut(self.k, one), v=cut(self.v, one), do=cut(self.do, own),
            params={name: cut(p, own) for name, p in self.params.items()},
            tangents=(q[:, own], k[:, one], v[:, one], *(t[:, own] for t in rest)),
        )  # fmt: skip

    def with_leaves(self, leaves: Sequence[Tensor]) -> Inputs:
        """The same with other tensors in place of the leaves."""
        q, k, v, *rest = leaves
        learned = iter(rest)
        params = {name: next(learned) if p.requires_grad else p for name, p in self.params.items()}
        return replace(self, q=q, k=k, v=v, params=params)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        q, k, v, do = (change(t) for t in (self.q, self.k, self.v, self.do))
        params = {name: change(p) for name, p in self.params.items()}
        return replace(self, q=q, k=k, v=v, do=do, params=params, tangents=tuple(change(t) for t in self.tangents))


def inputs(w: Workload, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors for w, as a model holds them: (B, L, H, D) seen as (B, H, L, D), wanting gradients."""
    g = torch.Generator(device).manual_seed(seed)

    def make(heads: int) -> Tensor:
        x = torch.randn(w.batch, w.length, heads, w.head_dim, generator=g, device=device).to(w.dtype)
        return x.transpose(1, 2)

    q, k, v, do = make(w.heads), make(w.kv_heads), make(w.kv_heads), make(w.heads)
    if w.scale is not None:  # a model without a scale has small queries instead
        q = q * w.head_dim**-0.5
    params = {}
    if w.relative:
        params["table"] = torch.randn(32, w.heads, generator=g, device=device).requires_grad_()
    if w.bias:
        bias = torch.randn(1, w.heads, w.length, w.length, generator=g, device=device).to(w.dtype)
        params["bias"] = bias.requires_grad_()
    if w.alibi:
        params["slopes"] = 2 ** (-8 * torch.arange(1, w.heads + 1, device=device) / w.heads)[None]
    if w.sinks:
        params["sinks"] = torch.randn(1, w.heads, generator=g, device=device).requires_grad_()
    mask, data = _mask(w, device)
    x = Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do, params, mask, data)
    return replace(x, tangents=tuple(torch.randn(t.shape, generator=g, device=device).to(t.dtype) for t in x.leaves))


def scores(w: Workload, x: Inputs) -> tuple[Score, ...]:
    """w's score chain over x's parameters."""
    chain: list[Score] = []
    if w.softcap is not None:
        chain.append(Softcap(w.softcap))
    if w.alibi:
        chain.append(ALiBi(x.params["slopes"][0]))
    if w.bias:
        chain.append(Bias(x.params["bias"]))
    if w.relative:
        chain.append(RelativeBias(x.params["table"][distances(w, x.q.device)].t()))
    return tuple(chain)


def distances(w: Workload, device: torch.device) -> Tensor:
    """The bucket of every distance j - i from 1 - length to length - 1, (2 * length - 1,)."""
    return t5_bucket(torch.arange(1 - w.length, w.length, device=device), bidirectional=True)


def mask_mod(w: Workload, x: Inputs) -> MaskMod | None:
    """w's mask as FlexAttention takes it."""
    data = x.data

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        seen = (q_idx >= k_idx) if w.causal else (q_idx >= 0)
        if w.prefix:
            seen = seen | (k_idx < w.prefix)
        if w.window:
            seen = seen & (q_idx - k_idx < w.window)
        if w.documents:
            seen = seen & (data["ids"][q_idx] == data["ids"][k_idx])
        if w.padding:
            seen = seen & (k_idx < data["lengths"][b])
        if w.dense:
            seen = seen & data["visible"][q_idx, k_idx]
        return seen

    return visible if w.masked else None


def _mask(w: Workload, device: str) -> tuple[Mask, dict[str, Tensor]]:
    if w.documents:
        shares = torch.arange(1, w.documents + 1).cumsum(0)  # lengths as 1 : 2 : 3 : ...
        cuts = (shares * w.length // shares[-1]).to(device)
        cu_seqlens = torch.cat([cuts.new_zeros(1), cuts]).int()
        ids = torch.bucketize(torch.arange(w.length, device=device), cuts, right=True)
        return Documents(cu_seqlens=cu_seqlens, within=Causal("top_left")), {"ids": ids, "cu_seqlens": cu_seqlens}
    if w.padding:
        lengths = w.length - torch.arange(w.batch, device=device) * w.length // (2 * w.batch)
        keep = torch.arange(w.length, device=device) < lengths[:, None]
        return Padding(keep), {"lengths": lengths}
    if w.dense:
        g = torch.Generator(device).manual_seed(1)
        visible = torch.rand(w.length, w.length, generator=g, device=device) < 0.5
        visible |= torch.eye(w.length, dtype=torch.bool, device=device)  # no row without a key
        return Dense(visible), {"visible": visible}
    if w.prefix:
        return PrefixLM(w.prefix), {}
    if w.window:
        return SlidingWindow(w.window - 1, 0), {}
    return (Causal() if w.causal else Full()), {}

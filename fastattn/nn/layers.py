"""Transformer layers.

    pre-norm     x + f(norm(x))        post-norm    norm(x + f(x))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import MaskLike, lowered_for
from ..masks import Dense, LoweredMask
from ..masks.algebra import intersect
from ..scores import Score
from .attention import Attention
from .cache import Cache, DynamicCache
from .errors import check_sizes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
Scores = Score | Sequence[Score]


class FeedForward(nn.Module):
    """down(act(up(x))), or with a gated activation down(act(gate(x)) * up(x)), gate and up in one product.

    Args:
        dim: features in and out. hidden: features between; 4 * dim by default.
        activation: "relu", "gelu", "silu", "swiglu", "geglu", "reglu", or a function of a tensor.
        dropout: of what stands between, while training. bias: of both products. device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not callable(activation) and activation not in (*ACTIVATIONS, *GATED):
            raise ValueError(f"activation must be a function or one of {(*ACTIVATIONS, *GATED)}, got {activation!r}")
        check_sizes(dim=dim, hidden=hidden)
        hidden = 4 * dim if hidden is None else hidden
        self.gated = not callable(activation) and activation in GATED
        named: dict[Any, Callable[[Tensor], Tensor]] = GATED if self.gated else ACTIVATIONS
        self.activation: Any = activation if callable(activation) else named[activation]
        self.up = nn.Linear(dim, (2 if self.gated else 1) * hidden, bias, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, dim, bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim)"""
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            x = self.activation(gate) * x
        else:
            x = self.activation(x)
        return self.down(self.dropout(x))


@dataclass
class LayerCache:
    """A decoder layer's caches: of its own tokens, and of the projected memory."""

    own: Cache = field(default_factory=DynamicCache)
    memory: DynamicCache = field(default_factory=DynamicCache)


class _Layer(nn.Module):
    """Residual steps, each with its norm before or after."""

    norm_first: bool
    residual_dropout: nn.Dropout

    def _step(self, x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            return x + self.residual_dropout(f(norm(x)))
        return norm(x + self.residual_dropout(f(x)))


class EncoderLayer(_Layer):
    """Self-attention and a feed-forward step.

    Args:
        dim: features. n_heads: query heads. hidden: features of the feed-forward step, 4 * dim by default.
        activation: as in `FeedForward`. norm: "layer" or "rms". norm_first: pre-norm rather than post-norm. eps: of the norms.
        dropout: of the attention's weights, the feed-forward step and both steps' results, while training.
        bias: of all products.
        attention: further arguments of `Attention`, such as n_kv_heads, rotary, window.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        hidden: int | None = None,
        *,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        norm: str = "layer",
        norm_first: bool = True,
        eps: float = 1e-5,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.norm_first = norm_first
        self.self_attention = Attention(dim, n_heads, dropout=dropout, bias=bias, **attention, **factory)
        self.feed_forward = FeedForward(dim, hidden, activation, dropout, bias, **factory)
        self.attention_norm = make_norm(norm, dim, eps, **factory)
        self.feed_forward_norm = make_norm(norm, dim, eps, **factory)
        self.residual_dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: MaskLike = None,
        keep: Tensor | None = None,
        score: Scores = (),
        positions: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """x (B, L, dim) to the same shape.

        Args:
            keep: bool (B, L), True for real tokens, False for padding, which no row sees.
            mask, score, positions, is_causal: as in `Attention`.
        """
        mask = padded_mask(mask, keep, x, x.shape[1])

        def attend(y: Tensor) -> Tensor:
            return self.self_attention(y, mask=mask, score=score, positions=positions, is_causal=is_causal)

        return self._step(self._step(x, self.attention_norm, attend), self.feed_forward_norm, self.feed_forward)


class DecoderLayer(_Layer):
    """Causal self-attention, attention to a memory if there is one, and a feed-forward step.

    Args:
        memory_dim: features of the memory; None for a decoder without one.
        others: as in `EncoderLayer`; `attention` is for the self-attention, and its n_kv_heads, head_dim and qk_norm for both.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        hidden: int | None = None,
        *,
        memory_dim: int | None = None,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        norm: str = "layer",
        norm_first: bool = True,
        eps: float = 1e-5,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.norm_first = norm_first
        own = {"causal": True, **attention}
        self.self_attention = Attention(dim, n_heads, dropout=dropout, bias=bias, **own, **factory)
        self.cross_attention = None
        self.attention_norm = make_norm(norm, dim, eps, **factory)
        self.feed_forward_norm = make_norm(norm, dim, eps, **factory)
        if memory_dim is not None:
            shared = {name: attention[name] for name in ("n_kv_heads", "head_dim", "qk_norm") if name in attention}
            self.cross_attention = Attention(
                dim, n_heads, context_dim=memory_dim, dropout=dropout, bias=bias, **shared, **factory
            )
            self.cross_norm = make_norm(norm, dim, eps, **factory)
        self.feed_forward = FeedForward(dim, hidden, activation, dropout, bias, **factory)
        self.residual_dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: MaskLike = None,
        keep: Tensor | None = None,
        memory_mask: MaskLike = None,
        memory_keep: Tensor | None = None,
        score: Scores = (),
        positions: Tensor | None = None,
        is_causal: bool | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, L, dim) to the same shape.

        Args:
            memory: (B, Lm, memory_dim); may be left out where the cache has met it.
            keep: bool (B, Lk) over all keys, cached ones included: False for padding, which no row sees.
            memory_mask, memory_keep: the same for the memory's keys.
            mask, score, positions, is_causal: of the self-attention, as in `Attention`.
            cache: makes the rows follow those of earlier calls with the same cache.
        """
        if self.cross_attention is None and (memory is not None or memory_mask is not None or memory_keep is not None):
            raise ValueError("memory, memory_mask and memory_keep must be None: the layer was built without memory_dim")
        if not isinstance(cache, LayerCache | None):
            raise TypeError(f"cache must be a LayerCache or None, got {type(cache).__name__}")
        cached = None if cache is None else cache.own
        n_keys = x.shape[1] if keep is None else keep.shape[-1]
        mask = padded_mask(mask, keep, x, n_keys)

        def attend(y: Tensor) -> Tensor:
            return self.self_attention(
                y, mask=mask, score=score, positions=positions, is_causal=is_causal, cache=cached
            )

        x = self._step(x, self.attention_norm, attend)
        if self.cross_attention is not None:
            x = self._step(x, self.cross_norm, self._to_memory(memory, memory_mask, memory_keep, cache))
        return self._step(x, self.feed_forward_norm, self.feed_forward)

    def _to_memory(
        self, memory: Tensor | None, mask: MaskLike, keep: Tensor | None, cache: LayerCache | None
    ) -> Callable[[Tensor], Tensor]:  # fmt: skip
        cross = self.cross_attention
        assert cross is not None
        cached = None if cache is None else cache.memory

        def attend(y: Tensor) -> Tensor:
            shown = mask if keep is None else padded_mask(mask, keep, y, keep.shape[-1])
            return cross(y, memory, mask=shown, cache=cached)

        return attend


def padded_mask(mask: MaskLike, keep: Tensor | None, x: Tensor, n_k: int) -> MaskLike:
    """`mask` without the keys that keep (B, n_k) leaves out, lowered where there are both.

    Raises:
        TypeError, ValueError: keep is no bool tensor of that shape.
    """
    if keep is None:
        return mask
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"keep must be a bool Tensor (True: a real token), got {got}")
    if keep.shape != (x.shape[0], n_k):
        raise ValueError(f"keep must have shape {(x.shape[0], n_k)}, got {tuple(keep.shape)}")
    real = Dense(keep[:, None, None]).lower(x.shape[1], n_k, x.device)
    given = lowered_once(mask, x, n_k)
    return real if given is None else intersect(given, real, x.device)


def lowered_once(mask: MaskLike, x: Tensor, n_k: int) -> LoweredMask | None:
    """`mask` for x's rows and n_k keys, so that layers share the work; whether it fits them is checked by the first."""
    return None if mask is None else lowered_for(mask, x.shape[1], n_k, x.device)


def make_norm(kind: str, dim: int, eps: float, **factory: Any) -> nn.Module:
    if kind not in NORMS:
        raise ValueError(f"norm must be one of {tuple(NORMS)}, got {kind!r}")
    return NORMS[kind](dim, eps=eps, **factory)

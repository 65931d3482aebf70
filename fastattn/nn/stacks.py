"""Stacks of transformer layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..functional import MaskLike
from .cache import Cache, DynamicCache
from .errors import check_sizes
from .layers import DecoderLayer, EncoderLayer, LayerCache, Scores, lowered_once, make_norm, padded_mask


class Encoder(nn.Module):
    """A stack of encoder layers, with a norm behind it where they are pre-norm.

    Args:
        n_layers: how many. others: of `EncoderLayer`, each layer with parameters of its own.
    """

    def __init__(self, n_layers: int, dim: int, n_heads: int, hidden: int | None = None, **layer: Any) -> None:
        super().__init__()
        check_sizes(n_layers=n_layers)
        self.layers = nn.ModuleList(EncoderLayer(dim, n_heads, hidden, **layer) for _ in range(n_layers))
        self.norm = _last_norm(dim, layer)

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
        """x (B, L, dim) to the same shape; arguments as in `EncoderLayer`. The mask is lowered once for all layers."""
        mask = lowered_once(padded_mask(mask, keep, x, x.shape[1]), x, x.shape[1])
        for layer in self.layers:
            x = layer(x, mask=mask, score=score, positions=positions, is_causal=is_causal)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers, with a norm behind it where they are pre-norm.

    Args:
        n_layers: how many. others: of `DecoderLayer`, each layer with parameters of its own.
    """

    def __init__(self, n_layers: int, dim: int, n_heads: int, hidden: int | None = None, **layer: Any) -> None:
        super().__init__()
        check_sizes(n_layers=n_layers)
        self.layers = nn.ModuleList(DecoderLayer(dim, n_heads, hidden, **layer) for _ in range(n_layers))
        self.norm = _last_norm(dim, layer)

    def new_cache(self, make: Callable[[], Cache] = DynamicCache) -> list[LayerCache]:
        """Empty caches, one a layer; `make` gives the one for a layer's own tokens."""
        return [LayerCache(own=make()) for _ in self.layers]

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
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """x (B, L, dim) to the same shape; arguments as in `DecoderLayer`, `cache` as `new_cache` makes it."""
        if not isinstance(cache, Sequence | None):
            raise TypeError(f"cache must be what new_cache() makes, a LayerCache for each layer, got {type(cache).__name__}")
        if cache is not None and len(cache) != len(self.layers):
            raise ValueError(f"cache must hold one LayerCache for each of {len(self.layers)} layers, got {len(cache)}")
        if keep is not None:
            mask = padded_mask(mask, keep, x, keep.shape[-1])
        if memory_keep is not None:
            memory_mask = padded_mask(memory_mask, memory_keep, x, memory_keep.shape[-1])
        for i, layer in enumerate(self.layers):
            x = layer(
                x, memory, mask=mask, memory_mask=memory_mask, score=score, positions=positions, is_causal=is_causal,
                cache=None if cache is None else cache[i],
            )  # fmt: skip
        return self.norm(x)


def _last_norm(dim: int, layer: dict[str, Any]) -> nn.Module:
    if not layer.get("norm_first", True):
        return nn.Identity()
    factory = {name: layer.get(name) for name in ("device", "dtype")}
    return make_norm(layer.get("norm", "layer"), dim, layer.get("eps", 1e-5), **factory)

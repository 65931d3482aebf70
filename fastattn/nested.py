"""Jagged nested tensors: the documents of a packed call, in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compat
from .functional import varlen_attention
from .masks import Causal


def is_jagged(*tensors: Tensor | None) -> bool:
    return any(isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged for x in tensors)


def nested_attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, dropout_p: float, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Attention inside each entry of jagged q (B, Hq, j, D), k and v (B, Hkv, j', D).

    Args:
        is_causal: upper left inside each entry.
        others: as in `torch.nn.functional.scaled_dot_product_attention`.

    Returns:
        A jagged tensor (B, Hq, j, Dv) with q's structure.

    Raises:
        ValueError: not all three are jagged 4-D tensors that are ragged in their length; heads differ without enable_gqa.
    """
    packed, offsets = [], []
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not is_jagged(x) or x.dim() != 4 or x.transpose(1, 2).values().dim() != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a jagged nested tensor (batch, heads, ragged length, head_dim), got {got}")
        if x.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(f"{name} must be a jagged nested tensor without holes (made without lengths); copy it first")
        rows = x.transpose(1, 2)  # (B, j, H, D)
        packed.append(rows.values())  # (total, H, D)
        offsets.append(rows.offsets())  # type: ignore[attr-defined]
    heads = [x.shape[1] for x in packed]
    if not enable_gqa and len(set(heads)) != 1:
        raise ValueError(f"query, key and value must have the same heads without enable_gqa, got {heads}")
    out = varlen_attention(
        packed[0], packed[1], packed[2], offsets[0], offsets[1],
        mask=Causal("top_left") if is_causal else None, dropout_p=dropout_p, scale=scale,
    )  # fmt: skip
    return compat.jagged(out, offsets[0]).transpose(1, 2)

"""Keys and values of the tokens that went before.

A cache is anything with `offset` and `update(k, v) -> (k, v, offset)`: it takes the new keys and values (B, Hkv, L, D) and
gives those that the new rows attend to, with the index of the first new one among them: an int, or int32 (B,) where
sequences differ.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import check_sizes


@runtime_checkable
class Cache(Protocol):
    """What `Attention` asks of a cache."""

    @property
    def offset(self) -> int | Tensor:
        """Where the next token will stand: an int or int32 (B,)."""
        ...

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """Take new keys and values (B, Hkv, L, D); return all to attend to, and where the new ones begin among them."""
        ...


class DynamicCache:
    """Grows with every token, by a copy of what there is. Differentiable."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def offset(self) -> int:
        """How many tokens there are."""
        return 0 if self.k is None else self.k.shape[2]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """As in `Cache`."""
        offset = self.offset
        _check_lengths(k, v)
        if self.k is not None and self.v is not None:
            if self.k.shape[:2] != k.shape[:2]:
                raise ValueError(f"k must have the cache's batch and heads {tuple(self.k.shape[:2])}, got {tuple(k.shape)}")
            k, v = torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)
        self.k, self.v = k, v
        return k, v, offset

    def reset(self) -> None:
        """Forget everything."""
        self.k = self.v = None


class StaticCache:
    """A fixed place for `capacity` tokens, written in place, for inference. Sequences may differ in length: after a prompt
    that was padded on the right, `lengths.copy_(...)` says how many tokens of each are real, and the next ones follow those.

    Nothing waits for the device, and shapes never change: a decoding step can be compiled or captured once.

    Args:
        batch, n_kv_heads, capacity, head_dim: sizes of the keys. v_dim: features of the values, head_dim by default.
        device, dtype: of the storage.

    Raises:
        TypeError, ValueError: a size is no positive int.
    """

    def __init__(
        self, batch: int, n_kv_heads: int, capacity: int, head_dim: int, v_dim: int | None = None, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check_sizes(batch=batch, n_kv_heads=n_kv_heads, capacity=capacity, head_dim=head_dim, v_dim=v_dim)
        self.k = torch.zeros(batch, n_kv_heads, capacity, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros(batch, n_kv_heads, capacity, head_dim if v_dim is None else v_dim, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)  # tokens of each sequence
        self.used = 0  # no sequence is longer: known without asking the device

    @property
    def capacity(self) -> int:
        """How many tokens there is room for."""
        return self.k.shape[2]

    @property
    def offset(self) -> Tensor:
        """How many tokens of each sequence there are. # int32 (B,)"""
        return self.lengths.clone()

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """As in `Cache`; the whole storage is returned, and rows see what stands up to themselves only.

        Raises:
            ValueError: no room is left, shapes or dtype do not fit, or a gradient is wanted.
        """
        n = k.shape[2]
        _check_lengths(k, v)
        for name, x, own in (("k", k, self.k), ("v", v, self.v)):
            if x.shape[:2] != own.shape[:2] or x.shape[3] != own.shape[3] or x.dtype != own.dtype:
                raise ValueError(
                    f"{name} must fit the cache's {own.dtype} {tuple(own.shape)}, got {x.dtype} {tuple(x.shape)}"
                )
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} requires a gradient: StaticCache is for torch.no_grad(); DynamicCache has gradients")
        if self.used + n > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, of which up to {self.used} are used; got {n} more")
        offset = self.offset
        at = (offset[:, None] + torch.arange(n, device=offset.device)).long()[:, None, :, None]  # (B, 1, L, 1)
        self.k.scatter_(2, at.expand(k.shape), k)
        self.v.scatter_(2, at.expand(v.shape), v)
        self.lengths += n
        self.used += n
        return self.k, self.v, offset

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        self.lengths.zero_()
        self.used = 0


def _check_lengths(k: Tensor, v: Tensor) -> None:
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have the same length, got {tuple(k.shape)} and {tuple(v.shape)}")

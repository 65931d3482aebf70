"""Masks that are a formula of the row: full, causal, sliding window, chunks, prefix-LM, sink tokens.

p is a row's position among the keys: its index (top_left), or its index + n_k - n_q (bottom_right).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Mask, largest, offset
from .checks import LARGE, check_align, check_count, check_int_tensor, check_lengths, moved, peek
from .spans import START, Bound, LoweredMask, clamp_rows


class Full(Mask):
    """Every row sees every key."""

    def __init__(self) -> None:
        pass

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        return LoweredMask(n_q, n_k, ((START, Bound(0, n_k)),))

    def span_of(self, row: Any, n_q: Any, n_k: Any) -> tuple[Any, Any]:
        return 0, n_k


class Causal(Mask):
    """A row sees the keys up to its own position: k <= p.

    Args:
        align: "top_left", "bottom_right" (decoding against a cache: the last row sees every key), an int (row i stands
            at key i + align: a shard of a longer sequence), or None where n_q == n_k and the first two are the same.
    """

    def __init__(self, align: str | int | None = None) -> None:
        align = check_align(align, "Causal")
        self._set(align=align, aligned=align is not None)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        return LoweredMask(n_q, n_k, ((START, Bound(1, offset(self, n_q, n_k) + 1)),))

    def span_of(self, row: Any, n_q: Any, n_k: Any) -> tuple[Any, Any]:
        return 0, row + (offset(self, n_q, n_k) + 1)


class SlidingWindow(Mask):
    """A row sees the keys p - left .. p + right, both ends included.

    Args:
        left, right: how far a row sees to either side of its position; None for no limit. A window of w keys that ends
            at the row itself is SlidingWindow(w - 1, 0).
        align: as in Causal.
    """

    left: int | None
    right: int | None

    def __init__(self, left: int | None, right: int | None, align: str | int | None = None) -> None:
        align = check_align(align, "SlidingWindow")
        left, right = (
            None if n is None or check_count(n, f"SlidingWindow {side}") == LARGE else n
            for n, side in ((left, "left"), (right, "right"))
        )
        self._set(left=left, right=right, align=align, aligned=align is not None or (left is None and right is None))

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        start, stop = START, Bound(0, n_k)
        if not (self.left is None and self.right is None):
            shift = offset(self, n_q, n_k)
            start = START if self.left is None else Bound(1, shift - self.left)
            stop = stop if self.right is None else Bound(1, shift + self.right + 1)
        return LoweredMask(n_q, n_k, ((start, stop),))

    def span_of(self, row: Any, n_q: Any, n_k: Any) -> tuple[Any, Any]:
        if self.left is None and self.right is None:
            return 0, n_k
        p = row + offset(self, n_q, n_k)
        return 0 if self.left is None else p - self.left, n_k if self.right is None else p + (self.right + 1)


class Chunked(Mask):
    """A row sees the keys of its own chunk: p // size == k // size. For the causal form write `Causal() & Chunked(size)`.

    Args:
        size: keys per chunk.
        align: as in Causal.
    """

    size: int

    def __init__(self, size: int, align: str | int | None = None) -> None:
        align = check_align(align, "Chunked")
        self._set(size=check_count(size, "Chunked size", 1), align=align, aligned=align is not None)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        return lower_rows(self, n_q, n_k, device)

    def span_of(self, row: Any, n_q: Any, n_k: Any) -> tuple[Any, Any]:
        start = (row + offset(self, n_q, n_k)) // self.size * self.size
        return start, start + self.size


class PrefixLM(Mask):
    """Causal, and every row sees the keys of the prefix: k <= p or k < prefix.

    Args:
        prefix: length of the prefix, one for all or int (B,).
        align: as in Causal.
    """

    prefix: int | Tensor

    def __init__(self, prefix: int | Tensor, align: str | int | None = None) -> None:
        align = check_align(align, "PrefixLM")
        if isinstance(prefix, Tensor):
            values = peek(check_int_tensor(prefix, "PrefixLM prefix"))
            if values and min(values) < 0:
                raise ValueError(f"PrefixLM prefix must be at least 0, got {min(values)}")
        else:
            prefix = check_count(prefix, "PrefixLM prefix")
        self._set(prefix=prefix, align=align, aligned=align is not None)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        if not isinstance(self.prefix, Tensor):
            return lower_rows(self, n_q, n_k, device)
        row = torch.arange(n_q, dtype=torch.int32, device=device)
        prefix = moved(self.prefix, device)[:, None]  # (B, 1)
        stop = torch.maximum(row + (offset(self, n_q, n_k) + 1), prefix)[:, None, None]  # (B, 1, 1, n_q)
        return LoweredMask(n_q, n_k, None, clamp_rows(torch.zeros_like(stop), stop, n_k))

    def span_of(self, row: Any, n_q: Any, n_k: Any) -> tuple[Any, Any] | None:
        if isinstance(self.prefix, Tensor):
            return None
        return 0, largest(row + (offset(self, n_q, n_k) + 1), self.prefix)


class SinkTokens(Mask):
    """Every row sees the first n keys. Streaming attention is `SinkTokens(n) | SlidingWindow(w, 0)`."""

    n: int

    def __init__(self, n: int) -> None:
        self._set(n=check_count(n, "SinkTokens n"))

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        return LoweredMask(n_q, n_k, ((START, Bound(0, self.n)),))

    def span_of(self, row: Any, n_q: Any, n_k: Any) -> tuple[Any, Any]:
        return 0, self.n


def lower_rows(mask: Mask, n_q: int, n_k: int, device: Any) -> LoweredMask:
    """Lower a mask with a `span_of` to row tensors."""
    row = torch.arange(n_q, dtype=torch.int32, device=device)
    span = mask.span_of(row, n_q, n_k)
    assert span is not None
    start, stop = (row * 0 + x for x in span)
    return LoweredMask(n_q, n_k, None, clamp_rows(start[None, None, None], stop[None, None, None], n_k))

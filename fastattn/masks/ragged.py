"""Masks made of lengths and ids: packed documents, sequences of different lengths, padding."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .base import Mask
from .checks import brief, check_int_tensor, check_lengths, moved, peek, readable
from .spans import START, Bound, LoweredMask, clamp_rows


class Documents(Mask):
    """Packed sequences: a row sees keys of its own document only.

    Give exactly one of `ids` and `cu_seqlens`. Rows past the last document see nothing. Documents may be empty.

    Args:
        ids: int (L,) or (B, L); each maximal run of equal ids is a document.
        cu_seqlens: int32 or int64 (N + 1,): document n holds the rows cu_seqlens[n] to cu_seqlens[n + 1].
        cu_seqlens_k: the same for keys where they differ from the rows.
        within: a mask applied inside each document, with that document's lengths: Full, Causal, SlidingWindow, Chunked,
            PrefixLM with an int, SinkTokens, or `&` of these.
    """

    ids: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    within: Mask | None

    def __init__(
        self,
        ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        within: Mask | None = None,
    ) -> None:
        if (ids is None) == (cu_seqlens is None):
            raise ValueError("Documents takes exactly one of ids and cu_seqlens")
        if ids is not None:
            check_int_tensor(ids, "Documents ids", (1, 2))
            if cu_seqlens_k is not None:
                raise ValueError("Documents takes cu_seqlens_k only beside cu_seqlens, not with ids")
        for name, cu in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
            if cu is not None:
                check_cumulative(cu, f"Documents {name}")
        if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens.shape:  # type: ignore[union-attr]
            raise ValueError(
                f"Documents cu_seqlens_k describes {cu_seqlens_k.shape[0] - 1} documents, "
                f"cu_seqlens {cu_seqlens.shape[0] - 1}"  # type: ignore[union-attr]
            )
        if within is not None:
            check_within(within, cu_seqlens_k is not None, "Documents within")
        self._set(ids=ids, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, within=within)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        row = torch.arange(n_q, dtype=torch.int32, device=device)
        bounds = self._by_ids(n_q, n_k, row) if self.cu_seqlens is None else self._by_cuts(n_q, n_k, row)
        first_q, stop_q, first_k, stop_k = bounds  # each (B|1, n_q)
        if self.within is None:
            start, stop = first_k, stop_k
        else:
            len_q, len_k = stop_q - first_q, stop_k - first_k
            span = self.within.span_of(row - first_q, len_q, len_k)
            assert span is not None
            start, stop = (first_k + torch.minimum((len_k * 0 + x).clamp(min=0), len_k) for x in span)
        alive = row < stop_q  # False past the last document
        stop = torch.where(alive, stop, start)
        return LoweredMask(n_q, n_k, None, clamp_rows(start[:, None, None], stop[:, None, None], n_k))

    def _by_ids(self, n_q: int, n_k: int, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First row and end row of each row's document, for rows and keys. # each (B|1, n_q)"""
        assert self.ids is not None
        ids = moved(self.ids, row.device)
        ids = ids[None] if ids.ndim == 1 else ids  # (B|1, L)
        if ids.shape[1] != n_q or ids.shape[1] != n_k:
            raise ValueError(
                f"Documents ids of length {ids.shape[1]} need n_q == n_k == that, got n_q={n_q}, n_k={n_k}"
            )
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        number = new.cumsum(1, dtype=torch.int32)  # (B|1, L), from 1 in each row
        first = torch.searchsorted(number, number, out_int32=True)
        stop = torch.searchsorted(number, number, right=True, out_int32=True)
        return first, stop, first, stop

    def _by_cuts(self, n_q: int, n_k: int, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_by_ids`, from cumulative lengths. # each (1, n_q)"""
        assert self.cu_seqlens is not None
        for name, cu, n in (("cu_seqlens", self.cu_seqlens, n_q), ("cu_seqlens_k", self.cu_seqlens_k, n_k)):
            values = None if cu is None else peek(cu[-1:])
            if values and values[0] > n:
                raise ValueError(
                    f"Documents {name} must not exceed {'n_q' if cu is self.cu_seqlens else 'n_k'} = {n}, "
                    f"got {values[0]} at its end"
                )
        cu_q = moved(self.cu_seqlens, row.device, torch.int32)
        cu_k = cu_q if self.cu_seqlens_k is None else moved(self.cu_seqlens_k, row.device, torch.int32)
        n_docs = cu_q.shape[0] - 1
        doc = torch.searchsorted(cu_q[1:], row, right=True).clamp(max=n_docs - 1) if n_docs else row.long() * 0
        last = doc + 1 if n_docs else doc
        first_q, stop_q, first_k, stop_k = cu_q[doc][None], cu_q[last][None], cu_k[doc][None], cu_k[last][None]
        return first_q, stop_q, first_k, stop_k

    def sizes(self) -> tuple[int | None, int | None]:
        if self.ids is not None:
            return self.ids.shape[-1], self.ids.shape[-1]
        assert self.cu_seqlens is not None
        rows, keys = peek(self.cu_seqlens), None if self.cu_seqlens_k is None else peek(self.cu_seqlens_k)
        return (rows[-1] if rows else None), (keys[-1] if keys else None)


class Lengths(Mask):
    """Sequences of different lengths at the start of their buffers: k < k_lens[b], and q < q_lens[b] if given.

    Args:
        k_lens: int (B,), visible keys per batch entry (a KV cache's fill).
        q_lens: int (B,), rows per batch entry; later rows see nothing.
    """

    k_lens: Tensor
    q_lens: Tensor | None

    def __init__(self, k_lens: Tensor, q_lens: Tensor | None = None) -> None:
        for name, lens in (("k_lens", k_lens), ("q_lens", q_lens)):
            if lens is None:
                continue
            values = peek(check_int_tensor(lens, f"Lengths {name}"))
            if values and min(values) < 0:
                raise ValueError(f"Lengths {name} must be at least 0, got {min(values)}")
        if q_lens is not None and q_lens.shape != k_lens.shape:
            raise ValueError(f"Lengths k_lens {tuple(k_lens.shape)} and q_lens {tuple(q_lens.shape)} differ in shape")
        self._set(k_lens=k_lens, q_lens=q_lens)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        for side, lens, n in (("k", self.k_lens, n_k), ("q", self.q_lens, n_q)):
            values = None if lens is None else peek(lens)
            if values and max(values) > n:
                raise ValueError(f"Lengths {side}_lens must be at most n_{side} = {n}, got {max(values)}")
        k_lens = moved(self.k_lens, device, torch.int32)
        if self.q_lens is None:
            return LoweredMask(n_q, n_k, ((START, Bound(0, k_lens)),))
        row = torch.arange(n_q, dtype=torch.int32, device=device)
        stop = torch.where(row < moved(self.q_lens, device)[:, None], k_lens[:, None], 0)[:, None, None]
        return LoweredMask(n_q, n_k, None, clamp_rows(torch.zeros_like(stop), stop, n_k))


class Padding(Mask):
    """Padded keys: a row sees the keys where keep is True.

    Args:
        keep: bool (B, Lk), True for real tokens, which stand together at one end.
        side: where the padding is, "right" or "left".
    """

    keep: Tensor
    side: str

    def __init__(self, keep: Tensor, side: str = "right") -> None:
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            raise TypeError(
                f"Padding keep must be a bool tensor (True = a real token; `.bool()` converts), got {brief(keep)}"
            )
        if keep.ndim != 2:
            raise ValueError(f"Padding keep must be (B, Lk), got shape {tuple(keep.shape)}")
        if side not in ("right", "left"):
            raise ValueError(f"Padding side must be 'right' or 'left', got {side!r}")
        if readable(keep) and keep.numel():
            before, after = (keep[:, :-1], keep[:, 1:]) if side == "right" else (keep[:, 1:], keep[:, :-1])
            values = peek((after & ~before).any(1))
            if values and any(values):
                raise ValueError(
                    f"Padding keep is not padded on the {side} only: in batch entry {values.index(True)} a real token "
                    f"stands beyond the padding. Use the other side, or Dense(keep[:, None, None]) for padding anywhere"
                )
        self._set(keep=keep, side=side)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        if self.keep.shape[1] != n_k:
            raise ValueError(f"Padding keep has {self.keep.shape[1]} keys, but n_k is {n_k}")
        n_kept = moved(self.keep, device).sum(1, dtype=torch.int32)  # (B,)
        span = (START, Bound(0, n_kept)) if self.side == "right" else (Bound(0, n_k - n_kept), Bound(0, n_k))
        return LoweredMask(n_q, n_k, (span,))

    def sizes(self) -> tuple[int | None, int | None]:
        return None, self.keep.shape[1]


def check_within(within: Any, separate: bool, name: str) -> None:
    """Raise unless `within` is a mask for use inside documents; `separate`: rows and keys have lengths of their own."""
    if not isinstance(within, Mask) or within.span_of(0, 1, 1) is None:
        raise ValueError(
            f"{name} must be Full, Causal, SlidingWindow, Chunked, PrefixLM with an int, SinkTokens or `&` of "
            f"these, got {brief(within)}. Other masks combine outside: Documents(...) & mask"
        )
    if separate and not within.aligned:
        raise ValueError(
            f"{name} {within!r} needs align='top_left' or 'bottom_right' where rows and keys have cu_seqlens of their own, "
            "since a document's may differ in number"
        )


def check_cumulative(cu: Tensor, name: str) -> None:
    """Raise unless cu is an int (N + 1,) that starts with 0 and never decreases, as far as its values can be read here."""
    check_int_tensor(cu, name)
    if cu.shape[0] == 0:
        raise ValueError(f"{name} must start with 0, got an empty tensor")
    values = peek(cu)
    if not values:
        return
    if values[0] != 0:
        raise ValueError(f"{name} must start with 0, got {values[0]}")
    for i, (a, b) in enumerate(itertools.pairwise(values)):
        if b < a:
            raise ValueError(f"{name} must never decrease, got {a} then {b} at index {i + 1}")

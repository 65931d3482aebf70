"""`flash_attn_with_kvcache`: decoding against a cache that is filled in place, dense or in pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..coords import Coordinates
from ..functional import attention
from ..masks import Spans
from ..masks.checks import readable
from ..scores import ALiBi, Score, Softcap
from . import ledger


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Put new keys and values into a cache, then attend to it. Without gradients; the cache is written in place.

    Caches in pages and those that cache_batch_idx picks from are gathered first, which copies them.

    Args:
        q: (B, Lq, Hq, D).
        k_cache, v_cache: (B_cache, L_cache, Hkv, D), or with block_table (pages, page_size, Hkv, D).
        k, v: (B, L_new, Hkv, D), written behind the first cache_seqlens rows.
        rotary_cos, rotary_sin: (length, rotary_dim / 2); the first rotary_dim features of k, and of q, are rotated by their
            positions; without causal and window all rows of q stand at position cache_seqlens.
        cache_seqlens: rows that are in the cache before this call, an int or int32 (B,); all of it by default.
        cache_batch_idx: (B,), which entries of the cache belong to q's.
        cache_leftpad: (B,), rows at the start of the cache that are hidden.
        block_table: (B, pages of an entry) int32.
        rotary_interleaved: pairs are features (0, 1), (2, 3), ...; else (0, d / 2), (1, d / 2 + 1), ...
        num_splits: no effect.
        return_softmax_lse: also return lse (B, Hq, Lq).
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`, for the filled part of the cache.

    Returns:
        o (B, Lq, Hq, D), or (o, lse).

    Raises:
        ValueError: arguments that exclude or need each other.
        TypeError, ValueError: as in `fastattn.attention`.
    """
    ledger.took("flash_attn flash_attn_with_kvcache")
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx must be None where block_table says which pages are read")
    n_b, n_q = q.shape[:2]
    rows = k_cache.shape[1] if block_table is None else k_cache.shape[1] * block_table.shape[1]
    if cache_seqlens is None:
        cache_seqlens = rows - (0 if k is None else k.shape[1])
    before = torch.as_tensor(cache_seqlens, dtype=torch.int64, device=q.device)
    if before.dim() > 1 or (before.dim() == 1 and len(before) not in (1, n_b)):
        raise ValueError(f"cache_seqlens must be an int or have shape ({n_b},), got {tuple(before.shape)}")
    room = rows - (0 if k is None else k.shape[1])
    if readable(before) and not bool(((before >= 0) & (before <= room)).all()):
        raise ValueError(f"cache_seqlens must lie in [0, {room}], so that all rows have a place, got {cache_seqlens}")
    before = before.expand(n_b)
    with torch.no_grad():
        local = causal or window_size[0] >= 0 or window_size[1] >= 0
        if rotary_cos is not None and rotary_sin is not None:
            steps = torch.arange(n_q, device=q.device) if local else q.new_zeros(n_q, dtype=torch.int64)
            q = rotated(q, rotary_cos, rotary_sin, before[:, None] + steps, rotary_interleaved)
        filled = before
        if k is not None and v is not None:
            at = before[:, None] + torch.arange(k.shape[1], device=q.device)
            if rotary_cos is not None and rotary_sin is not None:
                k = rotated(k, rotary_cos, rotary_sin, at, rotary_interleaved)
            for cache, new in ((k_cache, k), (v_cache, v)):
                cache[_places(at, cache.shape[1], cache_batch_idx, block_table)] = new.to(cache.dtype)
            filled = before + k.shape[1]
        keys, values = (_gathered(x, cache_batch_idx, block_table) for x in (k_cache, v_cache))
        mask, row = _visible(filled, n_q, rows, causal, window_size, cache_leftpad)
        chain: list[Score] = [Softcap(softcap)] if softcap else []
        if alibi_slopes is not None:
            chain.append(ALiBi(alibi_slopes))
        out, lse = attention(
            *(x.transpose(1, 2) for x in (q, keys[:n_b], values[:n_b])), mask=mask, score=chain, scale=softmax_scale,
            return_lse=True, coords=Coordinates(q=row.int()) if alibi_slopes is not None else None,
        )  # fmt: skip
    return (out.transpose(1, 2), lse) if return_softmax_lse else out.transpose(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, interleaved: bool) -> Tensor:
    """x (B, L, H, D) with its first features turned by the angles of the positions at (B, L)."""
    half = cos.shape[1]
    c, s = (table[at][:, :, None].to(torch.float32) for table in (cos, sin))  # (B, L, 1, half)
    turned, rest = x[..., : 2 * half].to(torch.float32), x[..., 2 * half :]
    one, two = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = one * c - two * s, one * s + two * c
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def _places(at: Tensor, page: int, entries: Tensor | None, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where in a cache the rows at (B, L) of every sequence are: (entry or page, row in it)."""
    if table is not None:
        return table.long().gather(1, at // page), at % page
    entry = torch.arange(at.shape[0], device=at.device) if entries is None else entries.long()
    return entry[:, None].expand_as(at), at


def _gathered(cache: Tensor, entries: Tensor | None, table: Tensor | None) -> Tensor:
    """A cache as (B, L, H, D)."""
    if table is not None:
        return cache[table.long()].flatten(1, 2)
    return cache if entries is None else cache[entries.long()]


def _visible(
    filled: Tensor, n_q: int, n_k: int, causal: bool, window: tuple[int, int], leftpad: Tensor | None
) -> tuple[Spans, Tensor]:
    """The keys that every row sees, and the rows' positions (B, Lq): the last row stands at the last filled key."""
    row = filled[:, None] - n_q + torch.arange(n_q, device=filled.device)
    end = filled[:, None].expand_as(row)
    left, right = window[0], 0 if causal else window[1]
    stop = end if right < 0 else torch.minimum(row + right + 1, end)
    start = torch.zeros_like(row) if left < 0 else row - left
    if leftpad is not None:
        start = torch.maximum(start, leftpad[:, None].long())
    start = start.clamp(0, n_k)
    stop = torch.maximum(stop.clamp(0, n_k), start)
    return Spans(start[:, None, None].int(), stop[:, None, None].int()), row

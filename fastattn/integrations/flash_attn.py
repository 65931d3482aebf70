"""The functions of the package flash-attn, by its names, argument order and layout (B, L, H, D), on fastattn.

    from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, unpad_input

causal and window_size stand at the bottom right, as there: the last row sees the last key. Beyond the original: fp32 and
fp64, any head_dim up to 512, any device, a gradient through the log-sum-exp, two derivatives. A row that sees no key gives 0
and a log-sum-exp of -inf.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..coords import Coordinates
from ..functional import _run, attention, document_coords, problem, varlen_attention
from ..masks import Causal, Documents, Mask, SlidingWindow
from ..problem import Problem
from ..scores import Additive, ALiBi, Score, Softcap
from ..weights import dropped, weights
from . import ledger
from .bert_padding import index_first_axis, pad_input, unpad_input
from .flash_attn_cache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "pad_input",
    "unpad_input",
]

Window = tuple[int, int]
EVERYTHING: Window = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYTHING,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of a batch.

    Args:
        q: (B, Lq, Hq, D). k: (B, Lk, Hkv, D). v: (B, Lk, Hkv, Dv). Hq is a multiple of Hkv.
        dropout_p: in [0, 1); 0 for evaluation.
        softmax_scale: 1 / sqrt(D) by default.
        causal: row i sees the keys up to i + Lk - Lq.
        window_size: (left, right), how far a row sees from there to either side, both ends included; -1 for no limit.
        softcap: c of c tanh(s / c); 0 for none.
        alibi_slopes: (Hq,) or (B, Hq); -slope |i + Lk - Lq - j| is added to the scores.
        deterministic: True asks for bitwise repeatable gradients, which are the default here.
        return_attn_probs: also return the log-sum-exp and the weights, which takes (B, Hq, Lq, Lk) memory.

    Returns:
        o (B, Lq, Hq, Dv); with return_attn_probs (o, lse (B, Hq, Lq), weights): weights before dropout, negative where they
        were dropped.

    Raises:
        TypeError, ValueError: as in `fastattn.attention`.
    """
    ledger.took("flash_attn flash_attn_func")
    check_rank(4, q=q, k=k, v=v)
    n_q, n_k = q.shape[1], k.shape[1]
    chain, coords = scores(softcap, alibi_slopes), Coordinates(q=n_k - n_q) if alibi_slopes is not None else None
    arguments: dict[str, Any] = dict(
        mask=bottom_right(causal, window_size), score=chain, scale=softmax_scale, dropout_p=dropout_p, coords=coords,
        deterministic=deterministic or None,
    )  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not return_attn_probs:
        return attention(q, k, v, **arguments).transpose(1, 2)
    p = problem(q, k, v, sinks=None, backend=None, **arguments)
    out, lse = _run(p)
    return out.transpose(1, 2), lse, signed_weights(p)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYTHING,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (B, L, 3, H, D), whose gradient is one tensor. Arguments and result are those of it."""
    check_packed(5, 3, qkv=qkv)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYTHING,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of q (B, Lq, Hq, D) and kv (B, Lk, 2, Hkv, D). Arguments and result are those of it."""
    check_packed(5, 2, kv=kv)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYTHING,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention inside sequences that are packed one after another.

    Args:
        q: (total_q, Hq, D). k: (total_k, Hkv, D). v: (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: int32 (N + 1,): sequence n has the rows cu_seqlens[n] to cu_seqlens[n + 1].
        max_seqlen_q, max_seqlen_k: the longest sequences; only the shape of returned weights depends on them.
        block_table: of a paged cache; only None here.
        others: as in `flash_attn_func`, with each sequence's own lengths; alibi_slopes (Hq,) or (N, Hq).

    Returns:
        o (total_q, Hq, Dv); with return_attn_probs (o, lse (Hq, total_q), weights): weights (N, Hq, max_seqlen_q,
        max_seqlen_k) with dropout, computed for tests over all pairs of rows; None without.

    Raises:
        NotImplementedError: block_table is given.
        TypeError, ValueError: as in `fastattn.varlen_attention`.
    """
    if block_table is not None:
        raise NotImplementedError("block_table is not supported here; flash_attn_with_kvcache takes one")
    ledger.took("flash_attn flash_attn_varlen_func")
    mask = bottom_right(causal, window_size)
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 2:
        wanted = (len(cu_seqlens_q) - 1, q.shape[1])
        if alibi_slopes.shape != wanted:
            raise ValueError(f"alibi_slopes must have shape ({wanted[1]},) or {wanted}, got {tuple(alibi_slopes.shape)}")
    arguments: dict[str, Any] = dict(
        mask=mask, score=scores(softcap, alibi_slopes, packed=True), scale=softmax_scale, dropout_p=dropout_p,
        deterministic=deterministic or None,
    )  # fmt: skip
    if not (return_attn_probs and dropout_p):
        out, lse = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **arguments)
        return (out, lse, None) if return_attn_probs else out
    check_rank(3, q=q, k=k, v=v)
    arguments["mask"] = Documents(cu_seqlens=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, within=mask)
    coords = document_coords(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k, "bottom_right")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    p = problem(q, k, v, sinks=None, backend=None, coords=coords, **arguments)
    out, lse = _run(p)
    w = _by_sequence(signed_weights(p)[0], cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return out[0].transpose(0, 1), lse[0], w


class PackedALiBi(Additive):
    """s -> s - slopes[b, h] |q - k|, where b is a row's coordinate: the number of its sequence. slopes (N, Hq)"""

    def __init__(self, slopes: Tensor) -> None:
        self.params = (slopes.t()[None],)  # (1, Hq, N)

    def term(self, tile: Any) -> Tensor:
        sequence = tile.b.expand(-1, 1, tile.q.shape[2], 1)[0, 0, :, 0]  # (rows,)
        slopes = tile.heads(self.params[0]).to(tile.dtype)[:, :, sequence, None]  # (1, H, rows, 1)
        return -slopes * (tile.k - tile.q).abs().to(tile.dtype)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYTHING,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D). Arguments and result are those of it."""
    check_packed(4, 3, qkv=qkv)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYTHING,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of q (total_q, Hq, D) and kv (total_k, 2, Hkv, D). Arguments and result are those of it."""
    check_packed(4, 2, kv=kv)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def bottom_right(causal: bool, window_size: Any) -> Mask:
    """causal and window_size as a mask. Also without limits it says where rows stand."""
    if not hasattr(window_size, "__len__") or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size!r}")
    left, right = (None if n is None or int(n) < 0 else int(n) for n in window_size)
    if causal:
        right = 0
    if left is None and right == 0:
        return Causal("bottom_right")
    return SlidingWindow(left, right, "bottom_right")


def scores(softcap: float, alibi_slopes: Tensor | None, packed: bool = False) -> list[Score]:
    """softcap and alibi_slopes as a chain; `packed`: slopes of two dimensions are per sequence, not per batch entry."""
    chain: list[Score] = [Softcap(softcap)] if softcap else []
    if alibi_slopes is not None:
        chain.append(PackedALiBi(alibi_slopes) if packed and alibi_slopes.dim() == 2 else ALiBi(alibi_slopes))
    return chain


def check_rank(rank: int, **tensors: Any) -> None:
    """Raise unless every tensor has `rank` dimensions."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dim() != rank:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must have {rank} dimensions, got {got}")


def check_packed(rank: int, parts: int, **tensors: Any) -> None:
    """Raise unless every tensor has `rank` dimensions, `parts` of them before the heads."""
    check_rank(rank, **tensors)
    for name, x in tensors.items():
        if x.shape[-3] != parts:
            raise ValueError(f"{name} must have {parts} entries in dimension {rank - 3}, got shape {tuple(x.shape)}")


def signed_weights(p: Problem) -> Tensor:
    """Weights before dropout, negative where they are dropped. # (B, Hq, Lq, Lk) in q's dtype"""
    w = weights(p)
    return torch.where(dropped(p, torch.ones_like(w)) > 0, w, -w).to(p.q.dtype)


def _by_sequence(w: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Weights (Hq, total_q, total_k) as (N, Hq, max_q, max_k), padded with zeros."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    parts = [
        w[:, a_q:b_q, a_k:b_k]
        for a_q, b_q, a_k, b_k in zip(starts_q, starts_q[1:], starts_k, starts_k[1:])
    ]
    return torch.stack([F.pad(x, (0, max_k - x.shape[2], 0, max_q - x.shape[1])) for x in parts])

"""`torch.nn.functional.scaled_dot_product_attention` with its signature and its meaning, to the letter.

Where torch documents an error and does not raise one (a mask together with is_causal; key and value of different lengths)
this raises. Every rank and broadcast of torch's is brought to (B, H, L, D) without copies where views allow it.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import compat, dispatch, express
from .functional import DTYPES, FULL, _autocast, _run, autocasting, check_dense, checked_scale
from .masks import Causal, Dense, LoweredMask, Mask
from .nested import is_jagged, nested_attention
from .problem import IDENTITY, Problem
from .scores import Bias, Score

TOP_LEFT = Causal("top_left")
BOTTOM_RIGHT = Causal("bottom_right")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (..., Hq, L, E), any rank from 2. key: (..., H, S, E). value: (..., H, S, Ev). Leading dimensions broadcast.
        attn_mask: broadcastable to (..., Hq, L, S): bool (True takes part) or float (added to the scores; query's
            dtype, or float32 with half precision; may require a gradient), or torch's CausalBias.
        dropout_p: in [0, 1]; always applied.
        is_causal: row i sees keys 0 .. i, also where L != S (upper left). Not together with attn_mask.
        scale: 1 / sqrt(E) by default.
        enable_gqa: let Hq be a multiple of key's and of value's heads.

    Returns:
        (..., Hq, L, Ev) in query's dtype. A row that sees no key gives 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what came and what is accepted.
    """
    if type(dropout_p) in (float, int) and dropout_p == 0 and type(is_causal) is bool and type(enable_gqa) is bool:
        if attn_mask is None:
            short = express.attend(query, key, value, is_causal, scale, enable_gqa)
        else:
            short = None if is_causal else express.attend_tensor(query, key, value, attn_mask, scale, enable_gqa)
        if short is not None:
            return short
    align = compat.causal_bias_alignment(attn_mask)
    watched = align is None and has_torch_function((query, key, value, attn_mask))
    # while it is traced, a jagged tensor has no torch function
    if (watched or torch.compiler.is_compiling()) and is_jagged(query, key, value, attn_mask):
        if attn_mask is not None:
            raise ValueError("attn_mask must be None for jagged nested tensors; is_causal is accepted")
        return nested_attention(
            query, key, value, is_causal=is_causal, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
        )
    if watched:
        return handle_torch_function(
            scaled_dot_product_attention, (query, key, value, attn_mask), query, key, value,
            attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    if isinstance(dropout_p, Tensor) and dropout_p.dim() == 0:
        dropout_p = dropout_p.item()
    if not isinstance(dropout_p, numbers.Real) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1], got {dropout_p!r}")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None where is_causal is True; pass the mask that you mean alone")
    query, key, value = _autocast(query, key, value)
    q, k, v, leading = _four_dimensions(query, key, value, enable_gqa)
    n_b, n_h, n_q, head_dim = q.shape
    mask: Mask = TOP_LEFT if is_causal else FULL
    chain: tuple[Score, ...] = ()
    if align is not None:
        if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (n_q, k.shape[2]):  # type: ignore[union-attr]
            sizes = f"{attn_mask.seq_len_q} rows and {attn_mask.seq_len_kv} keys"  # type: ignore[union-attr]
            raise ValueError(f"attn_mask is a CausalBias for {sizes}, the call has {n_q} and {k.shape[2]}")
        mask = TOP_LEFT if align == "top_left" else BOTTOM_RIGHT
    elif attn_mask is not None:
        dense = _mask_tensor(attn_mask, q, k.shape[2], leading)
        if dense.dtype == torch.bool:
            mask = Dense(dense)
        else:
            chain = (Bias(dense).canonical(n_b, n_h),)
    lowered: LoweredMask = mask.lower(n_q, k.shape[2], q.device)
    rng = torch.randint(0, 1 << 32, (1, 2), dtype=torch.int64, device=q.device) if dropout_p > 0.0 else None
    p = Problem(
        q, k, v, lowered, chain, None, rng, IDENTITY, checked_scale(scale, head_dim), float(dropout_p),
        dispatch.choose(None, q.device), True,
    )  # fmt: skip
    out, _ = _run(dispatch.settled(p, None))
    if query.dim() == 4 and len(leading) == 1:
        return out
    heads = (n_h,) if max(query.dim(), key.dim(), value.dim()) > 2 else ()
    return out.reshape(*leading, *heads, *out.shape[2:])


def _four_dimensions(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool):
    """(q, k, v, leading): (B, H, L, D) tensors, and the broadcast leading dimensions that B stands for."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        check_dense(x, name, "one of layout torch.jagged is taken")
        if x.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(x.shape)}")
        if x.dtype != query.dtype or x.dtype not in DTYPES:
            raise TypeError(
                "query, key and value must have one dtype of float16, bfloat16, float32 and float64, got "
                f"{query.dtype}, {key.dtype} and {value.dtype}"
            )
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {x.device}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same last dimension, got {tuple(query.shape)} and {tuple(key.shape)}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key and value must have the same length, got {tuple(key.shape)} and {tuple(value.shape)}")
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query, key, value, query.shape[:1]
    return _broadcast(query, key, value, enable_gqa)


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool):
    rank = max(x.dim() for x in (query, key, value))
    if enable_gqa and min(x.dim() for x in (query, key, value)) < 3:
        raise ValueError("enable_gqa needs a head dimension: query, key and value of at least 3 dimensions")
    q, k, v = (x[(None,) * max(0, max(rank, 3) - x.dim())] for x in (query, key, value))
    try:
        leading = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        heads = q.shape[-3] if enable_gqa else torch.broadcast_shapes(*((x.shape[-3],) for x in (q, k, v)))[0]
    except RuntimeError:
        raise ValueError(
            "the leading dimensions of query, key and value must broadcast"
            + ("" if enable_gqa else " (query's heads may be a multiple of key's with enable_gqa=True)")
            + f", got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        ) from None
    for name, x in (("key", k), ("value", v)):
        if enable_gqa and (x.shape[-3] == 0 or heads % x.shape[-3] != 0) and heads != x.shape[-3]:
            raise ValueError(f"query's heads must be a multiple of {name}'s with enable_gqa, got {heads} and {x.shape[-3]}")
    if k.shape[-3] != v.shape[-3]:
        k, v = (x.repeat_interleave(heads // x.shape[-3], -3) if x.shape[-3] not in (0, heads) else x for x in (k, v))
    batch = math.prod(leading)
    q = q.expand(*leading, heads, *q.shape[-2:])
    q, k, v = (x.expand(*leading, *x.shape[-3:]).reshape(batch, *x.shape[-3:]) for x in (q, k, v))
    return q, k, v, tuple(leading) if rank > 3 else ()


def _mask_tensor(attn_mask: Any, q: Tensor, n_k: int, leading: tuple[int, ...]) -> Tensor:
    """attn_mask as (B|1, H|1, L|1, S|1)."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a Tensor or None, got {type(attn_mask).__name__}")
    check_dense(attn_mask, "attn_mask")
    half = q.dtype in (torch.float16, torch.bfloat16)
    accepted = (torch.bool, q.dtype, torch.float32) if half else (torch.bool, q.dtype)
    cast = autocasting(q.device) and attn_mask.is_floating_point()
    if attn_mask.dtype not in accepted and not cast:
        raise TypeError(
            f"attn_mask must be bool, query's dtype {q.dtype}{' or float32' if half else ''}, got {attn_mask.dtype}"
        )
    if attn_mask.device != q.device:
        raise ValueError(f"attn_mask must be on query's device {q.device}, got {attn_mask.device}")
    _, n_h, n_q, _ = q.shape
    full = (*leading, n_h, n_q, n_k)
    x = attn_mask
    fits = x.dim() <= len(full) and all(m in (1, n) for m, n in zip(reversed(x.shape), reversed(full), strict=False))
    if not fits:
        raise ValueError(f"attn_mask must broadcast to {full}, got shape {tuple(attn_mask.shape)}")
    x = x[(None,) * max(0, max(len(full), 4) - x.dim())]
    if x.dim() > 4 or (x.dim() == 4 and len(leading) > 1):
        batch = (1,) * len(leading) if all(n == 1 for n in x.shape[:-3]) else leading
        x = x.expand(*batch, *x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:])
    return x

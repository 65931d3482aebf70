"""MultiheadAttention on nested tensors: projections and attention of the packed rows, without padding."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import compat
from ..coords import Coordinates
from ..masks import Causal, Documents, Lengths, Mask, Spans
from ..masks.checks import readable
from ..problem import Problem
from .errors import RANK_OF_QUERY, ArgumentError

if TYPE_CHECKING:
    from .multihead import MultiheadAttention


class Packed(NamedTuple):
    """Sequences one after another: rows (total, E), of sequence n those from offsets[n] to offsets[n + 1]."""

    rows: Tensor
    offsets: Tensor


def ragged_forward(
    module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None,
    need_weights: bool, attn_mask: Tensor | None, average: bool, is_causal: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`MultiheadAttention.forward` where query, key and value are nested; the output has query's structure and layout."""
    for name, x in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if x is not None:
            raise ArgumentError(f"{name} must be None for nested tensors, whose lengths say what it would")
    of_q = _packed("query", query, module.embed_dim)
    of_k = of_q if key is query else _packed("key", key, module.kdim)
    of_v = of_k if value is key else _packed("value", value, module.vdim)
    _check_structures(of_q, of_k, of_v)
    q, k, v = module.projected(of_q.rows, of_k.rows, of_v.rows, None)  # (1, H, total, D)
    cu_q, cu_k = of_q.offsets, of_k.offsets
    extra = 0 if module.bias_k is None else 1
    if module.bias_k is not None and module.bias_v is not None:
        k, v = (_append(x, module.heads(bias), cu_k) for x, bias in ((k, module.bias_k), (v, module.bias_v)))
        cu_k = cu_k + torch.arange(cu_k.shape[0], device=cu_k.device)
    mask: Mask = Documents(cu_seqlens=cu_q, cu_seqlens_k=cu_k, within=Causal("top_left") if is_causal else None)
    if is_causal and extra:
        document = torch.searchsorted(cu_q[1:].contiguous(), torch.arange(q.shape[2], device=cu_q.device), right=True)
        stop = cu_k[1:][document]
        mask = mask | Spans(stop - 1, stop)
    p, out = module.attended(q, k, v, mask)
    result = _nested_like(query, module.out_proj(out[0].transpose(0, 1).flatten(1)), of_q.offsets)
    if not need_weights:
        return result, None
    padded, beyond = _padded(p, cu_q, cu_k, is_causal, extra)
    weights = module.shown(padded, average).to(p.q.dtype)
    return result, weights.masked_fill(beyond[:, :, None] if average else beyond[:, None, :, None], 0.0)


def _packed(name: str, x: Tensor, features: int) -> Packed:
    """A nested tensor (N, ragged, features) without its nesting.

    Raises:
        ArgumentError: x is dense, ragged elsewhere, has holes or other features.
    """
    if x.is_nested and x.dim() == 1:  # of no entries
        raise ArgumentError(f"{RANK_OF_QUERY} but received 1-D {name} tensor")
    if not x.is_nested or x.dim() != 3:
        raise ArgumentError(
            f"{name} must be nested of 3 dimensions (N, ragged length, features), as query, key and value all must if one "
            f"is; got {x.dim()}-D{'' if x.is_nested else ' dense'}"
        )
    if x.layout == torch.jagged:
        if x.size(2) != features:  # nor is a ragged length equal to any int
            raise ArgumentError(f"{name} must be (N, ragged length, {features} features), got shape {tuple(x.shape)}")
        if x.lengths() is not None:  # type: ignore[attr-defined]
            raise ArgumentError(f"{name} must be a jagged nested tensor without holes (made without lengths); copy it first")
        found = Packed(x.values(), x.offsets())  # type: ignore[attr-defined]
    else:
        parts = x.unbind()
        lengths = torch.tensor([0, *(part.shape[0] for part in parts)])
        found = Packed(torch.cat(parts), lengths.cumsum(0).to(x.device))
    if found.rows.shape[1] != features:
        raise ArgumentError(f"{name} must have {features} features, got {found.rows.shape[1]}")
    return found


def _check_structures(q: Packed, k: Packed, v: Packed) -> None:
    if q.offsets.shape != k.offsets.shape:
        raise ArgumentError(
            f"query and key must have one batch size, got {q.offsets.shape[0] - 1} and {k.offsets.shape[0] - 1}"
        )
    same = k.offsets.shape == v.offsets.shape and k.rows.shape[0] == v.rows.shape[0]
    if same and k.offsets is not v.offsets and readable(k.offsets) and readable(v.offsets):
        same = torch.equal(k.offsets, v.offsets)
    if not same:
        raise ArgumentError("key and value must have the same lengths")


def _append(x: Tensor, last: Tensor, offsets: Tensor) -> Tensor:
    """x (1, H, total, D) with a row `last` (1, H, 1, D) behind every sequence."""
    n, total = offsets.shape[0] - 1, x.shape[2]
    row = torch.arange(total, device=x.device)
    document = torch.cat((torch.searchsorted(offsets[1:].contiguous(), row, right=True), torch.arange(n, device=x.device)))
    return torch.cat((x, last.expand(-1, -1, n, -1).to(x.dtype)), 2).index_select(2, document.argsort(stable=True))


def _nested_like(x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """rows (total, E) with x's structure and layout."""
    if x.layout == torch.jagged:
        return compat.jagged(rows, offsets)
    return torch.nested.as_nested_tensor(list(rows.split(offsets.diff().tolist())))


def _padded(p: Problem, cu_q: Tensor, cu_k: Tensor, is_causal: bool, extra: int) -> tuple[Problem, Tensor]:
    """The problem of the sequences of a packed problem side by side, for their weights, and which of its rows (N, L) are
    beyond their sequences; coordinates, and with them the bits of dropout, stay those of the packed rows."""
    rows, n_q = _places(cu_q)
    keys, n_k = _places(cu_k)
    q, k = (x[0][:, at].transpose(0, 1) for x, at in ((p.q, rows), (p.k, keys)))  # (N, H, L, D)
    lens_q, lens_k = cu_q.diff(), cu_k.diff()
    mask: Mask = Lengths(lens_k, lens_q)
    if is_causal:
        seen: Mask = Causal("top_left")
        if extra:
            stop = lens_k[:, None, None, None].expand(-1, 1, 1, n_q)
            seen = seen | Spans(stop - 1, stop)
        mask = mask & seen
    beyond = torch.arange(n_q, device=rows.device) >= lens_q[:, None]  # (N, L)
    coords = Coordinates(torch.zeros_like(cu_q[1:, None]), 0, rows, keys)
    changes: dict[str, Any] = dict(q=q, k=k, v=k, mask=mask.lower(n_q, n_k, q.device), coords=coords)
    return dataclasses.replace(p, **changes), beyond


def _places(offsets: Tensor) -> tuple[Tensor, int]:
    """Where the rows of every sequence stand, padded to the longest. # int64 (N, longest)"""
    longest = int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
    at = offsets[:-1, None].long() + torch.arange(longest, device=offsets.device)
    return at.clamp(max=max(int(offsets[-1]) - 1, 0)), longest

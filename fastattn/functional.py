"""The front: check a call, describe it as a Problem, run it.

    o_i = sum_j dropout(softmax_j(chain(scale q_i . k_j) over the visible keys and the sink)) v_j
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import autograd, dispatch, express
from .backends import reference
from .coords import Coordinates
from .masks import Dense, DensePredicate, Documents, Full, LoweredMask, Mask
from .masks.checks import brief, moved, peek
from .masks.ragged import check_cumulative, check_within
from .problem import IDENTITY, Problem, acc_dtype
from .scores import Score

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FULL = Full()
INVARIANT = "batch_invariant"

MaskLike = Mask | LoweredMask | Tensor | None
ScoreLike = Score | Sequence[Score]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    deterministic: bool | str | None = None,
    coords: Coordinates | None = None,
) -> Any:
    """Scaled dot-product attention with any mask, any chain of score modifiers, sinks and dropout.

    Differentiable in q, k, v, sinks and the scores' parameters: reverse mode, forward mode, and both twice over.

    Args:
        q: (B, Hq, Lq, Dk), fp16, bf16, fp32 or fp64, any strides.
        k: (B, Hkv, Lk, Dk), Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
        v: (B, Hkv, Lk, Dv).
        mask: which keys a row may see: a Mask, a LoweredMask shared between calls, a bool tensor that broadcasts to
            (B, Hq, Lq, Lk) (True: visible), or None for all. A row that sees no key gives 0, never NaN.
        score: a Score or several, applied to scale * q . k in order.
        sinks: (Hq,) or (B, Hq): a logit per head that joins the softmax's denominator only.
        scale: finite; 1 / sqrt(Dk) by default.
        dropout_p: in [0, 1); applied to the weights whatever the module's mode. The seed comes from torch's generator.
        return_lse: also return the log of every row's denominator.
        backend: None (Triton kernels on cuda, tiles of torch operations elsewhere), "triton", "tiled", "reference", or
            "hopper": kernels for sm_90, which None takes where they were timed (`explain` says it).
        deterministic: None and True give bitwise repeatable results; False permits faster ones that are not.
            "batch_invariant": a row's result and gradients also have the same bits whatever stands beside its document:
            other batch entries, other documents, padding. Slower, and it waits for the device: docs/numerics.md.
        coords: where rows and keys stand for scores, custom masks and dropout; by default at their indices.

    Returns:
        o (B, Hq, Lq, Dv) in q's dtype; with `return_lse` also lse (B, Hq, Lq), natural log, float32 (float64 for
        float64): -inf for a row that sees neither key nor sink.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what came and what is accepted.
    """
    bare = isinstance(score, tuple) and len(score) == 0 and sinks is None and coords is None
    usual = not return_lse and backend is None and deterministic is None
    if bare and usual and type(dropout_p) in (float, int) and dropout_p == 0:
        short = _short(q, k, v, mask, scale)
        if short is not None:
            return short
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse must be True or False, got {return_lse!r}")
    p = problem(q, k, v, mask, score, sinks, scale, dropout_p, backend, deterministic, coords)
    out, lse = _run(p)
    return (out, lse) if return_lse else out


def _short(q: Tensor, k: Tensor, v: Tensor, mask: MaskLike, scale: float | None) -> Tensor | None:
    """A small call's output without a Problem, or None where it must have one."""
    if mask is None or type(mask) is Full:
        return express.attend(q, k, v, False, scale, True)
    if isinstance(mask, (Mask, LoweredMask)):
        return express.attend_masked(q, k, v, mask, scale)
    return express.attend_tensor(q, k, v, mask, scale, True) if getattr(mask, "dtype", None) == torch.bool else None


def _run(p: Problem) -> tuple[Tensor, Tensor]:
    if p.backend == "reference":
        return reference.attention(
            p.q, p.k, p.v, mask=p.mask, scores=p.scores, sinks=p.sinks, scale=p.scale,
            dropout_p=p.dropout_p, rng=p.rng, coords=p.coords,
        )  # fmt: skip
    return autograd.attention_op(p)


def problem(q, k, v, mask, score, sinks, scale, dropout_p, backend, deterministic, coords, draw=True) -> Problem:
    """The arguments of `attention`, checked, as a Problem; with `draw`, the dropout key is drawn."""
    q, k, v = _autocast(q, k, v)
    check_qkv(q, k, v)
    n_b, n_h, n_q, _ = q.shape
    n_k = k.shape[2]
    if not isinstance(dropout_p, numbers.Real) or not 0.0 <= float(dropout_p) < 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}")
    if deterministic is not None and not isinstance(deterministic, bool) and deterministic != INVARIANT:
        raise TypeError(f"deterministic must be None, True, False or {INVARIANT!r}, got {deterministic!r}")
    if deterministic == INVARIANT and backend == "reference":
        raise ValueError(f'deterministic={INVARIANT!r} needs backend None, "triton" or "tiled", got "reference"')
    if coords is not None:
        coords = checked_coords(coords, n_b, n_h, n_q, n_k, q.device)
    rng = None
    if float(dropout_p) > 0.0 and draw:  # two 32-bit words: the Philox key
        rng = torch.randint(0, 1 << 32, (1, 2), dtype=torch.int64, device=q.device)
    p = Problem(
        q, k, v,
        lowered_mask(mask, n_b, n_h, n_q, n_k, q.device),
        checked_scores(score, n_b, n_h, n_q, n_k, q, coords),
        checked_sinks(sinks, n_b, n_h, q),
        rng,
        IDENTITY if coords is None else coords,
        checked_scale(scale, q.shape[3]),
        float(dropout_p),
        dispatch.choose(backend, q.device),
        deterministic is not False,
        invariant=deterministic == INVARIANT,
    )  # fmt: skip
    return dispatch.settled(p, backend)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in autocast's dtype where autocast is on for their device."""
    if isinstance(q, Tensor) and autocasting(q.device):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if _is_cast(x) else x for x in (q, k, v))
    return q, k, v


# asked once: torch 2.11 cannot trace the question
_WITHOUT_AUTOCAST = frozenset(name for name in ("meta", "lazy", "vulkan") if not torch.amp.is_autocast_available(name))


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for a device; there are devices that it does not know."""
    return device.type not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device.type)


def _is_cast(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q, k, v are (B, Hq, Lq, Dk), (B, Hkv, Lk, Dk), (B, Hkv, Lk, Dv) of one dtype on one device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        check_dense(x, name, "varlen_attention and scaled_dot_product_attention take packed and jagged ones")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, head_dim), got shape {tuple(x.shape)}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch size {q.shape[0]}, got shape {tuple(x.shape)}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise ValueError(
            f"k and v must have the same heads and the same length, got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same head_dim, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    n_h, n_kv = q.shape[1], k.shape[1]
    if n_h != n_kv and (n_kv == 0 or n_h % n_kv != 0):
        raise ValueError(f"q's heads must be a multiple of k's, got {n_h} and {n_kv}")


def check_dense(x: Tensor, name: str, instead: str = "") -> None:
    """Raise for a nested or sparse tensor, which has no strides."""
    if x.is_nested:
        raise TypeError(f"{name} must be a dense Tensor, got a nested one of layout {x.layout}{instead and ': '}{instead}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense Tensor, got one of layout {x.layout}")


def checked_scale(scale: Any, head_dim: int) -> float:
    """`scale` as a float, 1 / sqrt(head_dim) for None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim > 0 else 1.0
    if isinstance(scale, Tensor):
        if scale.dim() != 0:
            raise TypeError(f"scale must be a number, got a tensor of shape {tuple(scale.shape)}")
        if scale.requires_grad:
            raise TypeError("scale must be a number; it gets no gradient here: multiply q by a learned scale instead")
        scale = scale.item()
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    try:
        scale = float(scale)
    except OverflowError:
        scale = math.inf
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale!r}")
    return scale


def lowered_mask(mask: MaskLike, n_b: int, n_h: int, n_q: int, n_k: int, device: torch.device) -> LoweredMask:
    """The mask of a call in its lowered form."""
    mask = lowered_for(mask, n_q, n_k, device)
    _check_mask_tensors(mask, n_b, n_h, device)
    return mask


def lowered_for(mask: MaskLike, n_q: int, n_k: int, device: torch.device) -> LoweredMask:
    """The mask in its lowered form for so many rows and keys.

    Raises:
        TypeError, ValueError: it is no mask, or was lowered for others.
    """
    if mask is None:
        mask = FULL
    elif isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be a bool tensor (True: visible), got {mask.dtype}; a float mask is a score: score=Bias(mask)"
            )
        mask = Dense(mask.reshape((1,) * (2 - mask.dim()) + mask.shape) if mask.dim() < 2 else mask)
    if isinstance(mask, Mask):
        return mask.lower(n_q, n_k, device)
    if not isinstance(mask, LoweredMask):
        raise TypeError(f"mask must be a Mask, a LoweredMask, a bool Tensor or None, got {brief(mask)}")
    if mask.n_q != n_q or mask.n_k != n_k:
        raise ValueError(f"mask was lowered for {mask.n_q} rows and {mask.n_k} keys, the call has {n_q} and {n_k}")
    return mask


def _check_mask_tensors(mask: LoweredMask, n_b: int, n_h: int, device: torch.device) -> None:
    tensors = list(mask.rows) if mask.rows is not None else []
    if mask.spans is not None:
        tensors = [bound.const for span in mask.spans for bound in span if isinstance(bound.const, Tensor)]
    tensors += [x.tensor for x in mask.predicates if isinstance(x, DensePredicate)]
    for x in tensors:
        if x.device != device:
            raise ValueError(f"mask must be on q's device {device}, got {x.device}")
        if x.shape[0] != 1 and x.shape[0] != n_b:
            raise ValueError(f"mask must have batch size 1 or {n_b}, got {x.shape[0]}")
        if x.dim() == 4 and x.shape[1] != 1 and x.shape[1] != n_h:
            raise ValueError(f"mask must have 1 or {n_h} heads, got {x.shape[1]}")


def checked_scores(score: ScoreLike, n_b: int, n_h: int, n_q: int, n_k: int, q: Tensor, coords) -> tuple[Score, ...]:
    """The chain with parameters in their explicit shapes."""
    if isinstance(score, Score):
        score = (score,)
    if not isinstance(score, (tuple, list)):
        raise TypeError(f"score must be a Score or a sequence of Scores, got {brief(score)}")
    chain = []
    for item in score:
        if not isinstance(item, Score):
            raise TypeError(f"score must be a Score or a sequence of Scores, got one of {brief(item)}")
        for x in item.params:
            check_dense(x, f"every tensor of {type(item).__name__}")
        item.validate(n_b, n_h, n_q, n_k, q.dtype, q.device)
        item.check_coords(coords, n_b, n_h, n_q, n_k)
        item = item.canonical(n_b, n_h)
        for x in item.params:
            if x.dim() < 2 or (x.shape[0] != 1 and x.shape[0] != n_b) or (x.shape[1] != 1 and x.shape[1] != n_h):
                raise ValueError(
                    f"canonical() of {item.name} must give its parameters leading dimensions ({n_b} or 1, {n_h} or 1), "
                    f"got shape {tuple(x.shape)}"
                )
        chain.append(item)
    return tuple(chain)


def checked_sinks(sinks: Tensor | None, n_b: int, n_h: int, q: Tensor) -> Tensor | None:
    """sinks as (B|1, Hq)."""
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a Tensor, got {type(sinks).__name__}")
    check_dense(sinks, "sinks")
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must be floating point, got {sinks.dtype}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on q's device {q.device}, got {sinks.device}")
    shaped = sinks[None] if sinks.dim() == 1 else sinks
    if shaped.dim() != 2 or shaped.shape[1] != n_h or (shaped.shape[0] != 1 and shaped.shape[0] != n_b):
        raise ValueError(f"sinks must have shape ({n_h},) or ({n_b}, {n_h}), got {tuple(sinks.shape)}")
    return shaped


def checked_coords(coords: Coordinates, n_b: int, n_h: int, n_q: int, n_k: int, device: torch.device) -> Coordinates:
    """coords with tensors in their explicit shapes."""
    if not isinstance(coords, Coordinates):
        raise TypeError(f"coords must be Coordinates or None, got {type(coords).__name__}")
    for name, x in zip("bhqk", coords.parts):
        if isinstance(x, Tensor) and x.device != device:
            raise ValueError(f"coords.{name} must be on q's device {device}, got {x.device}")
    return coords.canonical(n_b, n_h, n_q, n_k)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    mask: Mask | None = None,
    score: ScoreLike = (),
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    deterministic: bool | str | None = None,
) -> Any:
    """Attention inside each of several documents packed one after another, without padding and without host syncs.

    The same function as `attention` on each document alone: scores and dropout see a document's number and the
    positions inside it. With a mask aligned "bottom_right" a row's position counts from len_k - len_q, as a cache's newest
    rows do: there it is `attention(..., coords=Coordinates(q=len_k - len_q))` of the document.

    Args:
        q: (total_q, Hq, Dk). k: (total_k, Hkv, Dk). v: (total_k, Hkv, Dv).
        cu_seqlens_q: int32 or int64 (N + 1,): document n has rows cu_seqlens_q[n] to cu_seqlens_q[n + 1]. Rows past the
            last give 0.
        cu_seqlens_k: the same for keys; cu_seqlens_q by default.
        mask: applied inside every document with its own lengths: Full, Causal, SlidingWindow, Chunked or PrefixLM.
        others: as in `attention`.

    Returns:
        o (total_q, Hq, Dv); with `return_lse` also lse (Hq, total_q).

    Raises:
        TypeError, ValueError: as in `attention`; cu_seqlens are checked by value where they are on the CPU.
    """
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse must be True or False, got {return_lse!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must have 3 dimensions (total, heads, head_dim), got {got}")
    given = [("q", cu_seqlens_q, q)] + ([] if cu_seqlens_k is None else [("k", cu_seqlens_k, k)])
    for name, cu, x in given:
        check_cumulative(cu, f"cu_seqlens_{name}")
        if cu.device != q.device and not cu.is_cpu:
            raise ValueError(f"cu_seqlens_{name} must be on q's device {q.device} or the CPU, got {cu.device}")
        end = peek(cu[-1:])
        if end and end[0] > x.shape[0]:
            raise ValueError(f"cu_seqlens_{name} must not exceed {name}'s length {x.shape[0]}, got {end[0]} at its end")
    if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k must describe as many documents as cu_seqlens_q, got {cu_seqlens_k.shape[0] - 1} and "
            f"{cu_seqlens_q.shape[0] - 1}"
        )
    if mask is not None:
        check_within(mask, cu_seqlens_k is not None, "mask")
    if cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"cu_seqlens_k is needed where q and k differ in length, got {q.shape[0]} and {k.shape[0]}")
    cu_seqlens_q = moved(cu_seqlens_q, q.device)
    cu_seqlens_k = None if cu_seqlens_k is None else moved(cu_seqlens_k, q.device)
    documents = Documents(cu_seqlens=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, within=mask)
    coords = None
    if dropout_p or (score if isinstance(score, Sequence) else True):
        coords = document_coords(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k, getattr(mask, "align", None))
    result = attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        mask=documents, score=score, sinks=sinks, scale=scale, dropout_p=dropout_p, return_lse=True,
        backend=backend, deterministic=deterministic, coords=coords,
    )  # fmt: skip
    out, lse = result[0][0].transpose(0, 1), result[1][0]
    return (out, lse) if return_lse else out


def document_coords(n_q: int, n_k: int, cu_q: Tensor, cu_k: Tensor | None, align: str | None = None) -> Coordinates:
    """Coordinates of packed rows and keys: the document's number, and positions inside the document."""
    cu_k = cu_q if cu_k is None else cu_k
    n_documents = cu_q.shape[0] - 1

    def positions(n: int, cu: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.arange(n, device=cu.device)
        document = torch.searchsorted(cu.long()[1:].contiguous(), index, right=True).clamp(max=max(n_documents - 1, 0))
        place = index - cu.long()[document]
        return document, place.masked_fill(index >= cu.long()[-1], 0)  # what lies past the last document is at no place

    document, row = positions(n_q, cu_q)
    _, key = positions(n_k, cu_k)
    if align == "bottom_right" and n_documents > 0:
        row = row + (cu_k.diff() - cu_q.diff()).long()[document]
    return Coordinates(b=document[None].int(), h=0, q=row[None].int(), k=key[None].int())


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each.

        lse = log(e^lse1 + e^lse2)    o = e^(lse1 - lse) o1 + e^(lse2 - lse) o2

    Differentiable in all four. Sinks belong to one of the two sets only.

    Args:
        o1, o2: (..., Lq, Dv) of one shape. lse1, lse2: (..., Lq), -inf where a row saw nothing.

    Returns:
        o in o1's dtype and lse in lse1's dtype.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    for name, x in (("o1", o1), ("lse1", lse1), ("o2", o2), ("lse2", lse2)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating point Tensor, got {brief(x)}")
        if x.device != o1.device:
            raise ValueError(f"{name} must be on o1's device {o1.device}, got {x.device}")
    if o1.dtype != o2.dtype or lse1.dtype != lse2.dtype:
        raise TypeError(
            f"o1 and o2 must have one dtype, and lse1 and lse2, got {o1.dtype}, {o2.dtype}, {lse1.dtype} and {lse2.dtype}"
        )
    if o1.shape != o2.shape or lse1.shape != lse2.shape or lse1.shape != o1.shape[:-1]:
        raise ValueError(
            "o1 and o2 must have one shape (..., Lq, Dv) and lse1 and lse2 (..., Lq), got "
            f"{tuple(o1.shape)}, {tuple(lse1.shape)}, {tuple(o2.shape)}, {tuple(lse2.shape)}"
        )
    high = torch.maximum(lse1, lse2).detach()
    high = high.masked_fill(high == -torch.inf, 0.0)
    e1, e2 = torch.exp(lse1 - high), torch.exp(lse2 - high)
    total = e1 + e2
    empty = total == 0.0
    safe = total.masked_fill(empty, 1.0)
    wide = acc_dtype(o1.dtype)
    out = (e1 / safe)[..., None] * o1.to(wide) + (e2 / safe)[..., None] * o2.to(wide)
    lse = (high + torch.log(safe)).masked_fill(empty, -torch.inf)
    return out.to(o1.dtype), lse.to(lse1.dtype)


@dataclass(frozen=True)
class Explanation:
    """What a call would run: str() is a short report."""

    backend: str
    kernel: str
    reasons: tuple[tuple[str, str], ...]
    summary: str

    def __str__(self) -> str:
        lines = [self.summary, f"backend: {self.backend}", f"kernel:  {self.kernel}"]
        return "\n".join(lines + [f"not {what}: {why}" for what, why in self.reasons])


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    deterministic: bool | str | None = None,
    coords: Coordinates | None = None,
) -> Explanation:
    """Which backend and kernel `attention` would run for these arguments, and why not another. Runs nothing.

    Of the backward it tells where an argument requires a gradient.

    Args and raises are those of `attention`.
    """
    p = problem(q, k, v, mask, score, sinks, scale, dropout_p, backend, deterministic, coords, draw=False)
    params = any(x.requires_grad for item in p.scores for x in item.params)
    trained = params or any(x.requires_grad for x in (q, k, v)) or (sinks is not None and sinks.requires_grad)
    plan = dispatch.plan(dataclasses.replace(p, param_grads=params), trained, return_lse)
    parts = [
        f"q {tuple(q.shape)} k {tuple(k.shape)} v {tuple(v.shape)} {str(p.q.dtype)[6:]} on {q.device}",
        f"mask {_describe(p.mask)}",
    ]
    parts += [f"scores {', '.join(score.name for score in p.scores)}"] if p.scores else []
    parts += ["sinks"] if p.sinks is not None else []
    parts += [f"dropout {p.dropout_p}"] if p.dropout_p else []
    return Explanation(plan.backend, plan.kernel, plan.reasons, "; ".join(parts))


def warmup(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gradients: bool = True,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
    deterministic: bool | str | None = None,
    coords: Coordinates | None = None,
) -> float:
    """Compile the kernels that `attention` runs for such arguments, so that no later call waits for a compiler.

    Runs the call once and forgets the result; neither the tensors' gradients nor torch's generator change. Lengths beyond
    16 rows share their kernels, at most two of each: a length that is a multiple of 16 may have its own. Other dtypes, head
    dims, strides or numbers of heads may compile anew.

    Args:
        gradients: the backward as well.
        others: as in `attention`.

    Returns:
        The seconds that it took.

    Raises:
        TypeError, ValueError: as in `attention`.
    """
    start = time.perf_counter()
    check_qkv(q, k, v)
    if not isinstance(gradients, bool):
        raise TypeError(f"gradients must be True or False, got {gradients!r}")
    x = [y.detach().requires_grad_(gradients) for y in (q, k, v)]
    with torch.random.fork_rng([q.device] if q.is_cuda else []), torch.set_grad_enabled(gradients):
        out = attention(
            *x, mask=mask, score=score, sinks=sinks, scale=scale, dropout_p=dropout_p, backend=backend,
            deterministic=deterministic, coords=coords,
        )  # fmt: skip
        if gradients:
            chain = (score,) if isinstance(score, Score) else score
            params = [y for item in chain for y in item.params] + ([] if sinks is None else [sinks])
            torch.autograd.grad(out.sum(), x + [y for y in params if y.requires_grad])
    if q.is_cuda:
        torch.cuda.synchronize(q.device)
    return time.perf_counter() - start


def _describe(mask: LoweredMask) -> str:
    if mask.is_full:
        return "full"
    spans = f"{mask.n_spans} span(s) {'from the row index' if mask.spans is not None else 'from a tensor'}"
    return spans + (f" and {len(mask.predicates)} predicate(s)" if mask.predicates else "")

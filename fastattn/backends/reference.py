"""Attention in plain PyTorch over the whole score matrix: what every backend must compute, readable top to bottom.

Differentiated by autograd itself, to any order, in any dtype; float64 is the oracle of the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..coords import Coordinates
from ..dropout import keep_mask
from ..masks import LoweredMask
from ..problem import IDENTITY, Problem
from ..scores import Additive, General, Pointwise, Score
from .tile import Tile


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: LoweredMask,
    scores: tuple[Score, ...] = (),
    sinks: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    coords: Coordinates = IDENTITY,
) -> tuple[Tensor, Tensor]:
    """(o, lse): o (B, Hq, Lq, Dv) in q's dtype, lse (B, Hq, Lq) in the accumulation dtype.

    Arguments are those of `fastattn.problem.Problem`, scores and coords in their canonical form.
    """
    p = Problem(q, k, v, mask, scores, sinks, rng, coords, scale, dropout_p, "reference", True)
    n_b, n_h, n_q, n_k, acc = p.n_b, p.n_h, p.n_q, p.n_k, p.acc_dtype
    tile = Tile(p, slice(0, n_b), slice(0, n_h), slice(0, n_q), slice(0, n_k))

    # which keys a row sees; a key that no row sees may hold anything
    visible = mask.to_dense(coords, n_b, n_h, q.device).expand(n_b, n_h, n_q, n_k)
    group = n_h // max(p.n_kv, 1)
    seen = visible.reshape(n_b, p.n_kv, group * n_q, n_k).any(2)[..., None]  # (B, Hkv, Lk, 1)
    k, v = (torch.where(seen, x.to(acc), 0.0).repeat_interleave(group, 1) for x in (k, v))

    # logits
    s = scale * (q.to(acc) @ k.mT)
    for score in scores:
        if isinstance(score, Additive):
            s = s + score.term(tile)
        elif isinstance(score, Pointwise):
            s = score.value(s)
        else:
            assert isinstance(score, General)
            s = score.value(s, tile)

    # softmax over what is visible and the sink; the row maximum cancels and gets no gradient
    s = torch.where(visible, s, 0.0)
    row_max = s.detach().masked_fill(~visible, -torch.inf)
    row_max = row_max.amax(-1, keepdim=True) if n_k > 0 else s.new_full((n_b, n_h, n_q, 1), -torch.inf)
    if sinks is not None:
        sink = sinks.to(acc)[:, :, None, None]
        row_max = torch.maximum(row_max, sink.detach())
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    weights = torch.where(visible, torch.exp(s - row_max), 0.0)
    row_sum = weights.sum(-1, keepdim=True)
    if sinks is not None:
        row_sum = row_sum + torch.exp(sink - row_max)
    empty = row_sum == 0.0
    row_sum = torch.where(empty, 1.0, row_sum)
    lse = torch.where(empty, -torch.inf, row_max + torch.log(row_sum))

    # output; dropout does not touch the denominator
    if dropout_p > 0.0:
        assert rng is not None
        keep = keep_mask(rng, dropout_p, tile.b, tile.h, tile.q, tile.k, tile.b_slice, n_b)
        weights = weights * keep / (1.0 - dropout_p) if dropout_p < 1.0 else weights * 0.0
    o = (weights / row_sum) @ v
    return o.to(q.dtype), lse.squeeze(-1)

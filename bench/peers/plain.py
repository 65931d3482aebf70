"""Attention in a few lines of PyTorch over the whole score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..passes import PASSES, Attend
from ..workloads import Inputs, Workload, distances
from .base import Peer
from .ours import Ours


def bias(w: Workload, x: Inputs) -> Tensor | None:
    """What is added to the scores, over the whole matrix, (1, H, L, L)."""
    index = torch.arange(w.length, device=x.q.device)
    if w.bias:
        return x.params["bias"]
    if w.alibi:
        return -x.params["slopes"][..., None, None].to(x.q.dtype) * (index[None] - index[:, None]).abs()
    if w.relative:
        bucket = distances(w, x.q.device)[index[None] - index[:, None] + w.length - 1]  # (L, L)
        return x.params["table"][bucket].permute(2, 0, 1)[None].to(x.q.dtype)
    return None


class Plain(Peer):
    name = "plain"
    features = Ours.features
    passes = tuple(PASSES)

    def build(self, w: Workload, x: Inputs) -> Attend:
        hidden = ~x.mask.to_dense(w.length, w.length, x.q.device) if w.masked else None
        group = w.heads // w.kv_heads

        def attend(x: Inputs) -> Tensor:
            k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (x.k, x.v))
            s = (x.q @ k.mT) * w.logit_scale
            if w.softcap is not None:
                s = w.softcap * torch.tanh(s / w.softcap)
            added = bias(w, x)
            if added is not None:
                s = s + added
            if hidden is not None:
                s = s.masked_fill(hidden, -torch.inf)
            if w.sinks:
                sink = x.params["sinks"].to(s.dtype)[..., None, None].expand(*s.shape[:-1], 1)
                return torch.cat([s, sink], -1).softmax(-1)[..., :-1] @ v
            return s.softmax(-1) @ v

        return attend

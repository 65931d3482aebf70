"""Attention in six lines of PyTorch over the whole score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..workloads import Inputs, Workload, distances
from .base import Call, Peer


def bias(w: Workload, x: Inputs) -> Tensor:
    """T5's position bias over the whole matrix, (1, H, L, L)."""
    assert x.table is not None
    index = torch.arange(w.length, device=x.q.device)
    bucket = distances(w, x.q.device)[index[None] - index[:, None] + w.length - 1]  # (L, L)
    return x.table[bucket].permute(2, 0, 1)[None].to(x.q.dtype)


class Plain(Peer):
    name = "plain"

    def build(self, w: Workload, x: Inputs) -> Call:
        hidden = None
        if w.causal or w.window or w.documents or w.padding:
            hidden = ~x.mask.to_dense(w.length, w.length, x.q.device)
        group = w.heads // w.kv_heads

        def run() -> Tensor:
            k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (x.k, x.v))
            s = (x.q @ k.mT) * w.logit_scale
            if w.softcap is not None:
                s = w.softcap * torch.tanh(s / w.softcap)
            if w.relative:
                s = s + bias(w, x)
            if hidden is not None:
                s = s.masked_fill(hidden, -torch.inf)
            return s.softmax(-1) @ v

        return run

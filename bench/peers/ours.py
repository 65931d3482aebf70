"""fastattn."""

from __future__ import annotations

from torch import Tensor

from ... import attention
from ..passes import PASSES, Attend
from ..workloads import Inputs, Workload, scores
from .base import Peer


class Ours(Peer):
    name = "fastattn"
    features = frozenset(
        ["window", "documents", "padding", "prefix", "mask"]
        + ["softcap", "alibi", "bias", "relative bias", "sinks", "grouped heads"]
    )
    passes = tuple(PASSES)

    def build(self, w: Workload, x: Inputs) -> Attend:
        mask = x.mask.lower(w.length, w.length, x.q.device)

        def attend(x: Inputs) -> Tensor:
            sinks = x.params["sinks"][0] if w.sinks else None
            return attention(x.q, x.k, x.v, mask=mask, score=scores(w, x), sinks=sinks, scale=w.scale)

        return attend

"""What decides whether fused kernels can run a call: constants, so that torch.compile asks once and keeps the answer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..masks import CustomPredicate
from ..problem import Problem
from ..scores import Bias, Pointwise, Score


class Facts(NamedTuple):
    """Of a call."""

    device: torch.device
    dtype: torch.dtype
    dims: tuple[int, int]  # head_dim of q and k, and of v
    load: str  # "heavy" with dropout, predicates or batch invariance, "chain" with a nonlinear score or a dense bias, else ""
    scores: tuple[type[Score], ...]
    customs: tuple[tuple[str, bool], ...]  # key of every custom mask, and whether it has a Triton function


def facts(p: Problem) -> Facts:
    """The facts of p."""
    chain = any(isinstance(score, (Pointwise, Bias)) for score in p.scores)
    load = "heavy" if p.dropout_p > 0.0 or p.mask.predicates or p.invariant else "chain" if chain else ""
    customs = tuple((x.key, x.triton_fn is not None) for x in p.mask.predicates if isinstance(x, CustomPredicate))
    dims = len(range(p.q.shape[3])), len(range(p.v.shape[3]))  # in a graph of any shapes these become constants, int() does not
    return Facts(p.q.device, p.q.dtype, dims, load, tuple(type(score) for score in p.scores), customs)

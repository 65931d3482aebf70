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
    load: str  # what beside the products a kernel has to do: `load_of`
    scores: tuple[type[Score], ...]
    customs: tuple[tuple[str, bool], ...]  # key of every custom mask, and whether it has a Triton function


def facts(p: Problem) -> Facts:
    """The facts of p."""
    customs = tuple((x.key, x.triton_fn is not None) for x in p.mask.predicates if isinstance(x, CustomPredicate))
    dims = len(range(p.q.shape[3])), len(range(p.v.shape[3]))  # in a graph of any shapes these become constants, int() does not
    return Facts(p.q.device, p.q.dtype, dims, load_of(p), tuple(type(score) for score in p.scores), customs)


def load_of(p: Problem) -> str:
    """What p is to launch tables: "heavy" with dropout, custom masks or batch invariance, else "bias" with a dense bias, else
    "dense" with a bool mask, else "chain" with a nonlinear score, "additive" with others, and "" without any of it."""
    if p.dropout_p > 0.0 or p.invariant or any(isinstance(x, CustomPredicate) for x in p.mask.predicates):
        return "heavy"
    if any(isinstance(score, Bias) for score in p.scores):
        return "bias"
    if p.mask.predicates:
        return "dense"
    if any(isinstance(score, Pointwise) for score in p.scores):
        return "chain"
    return "additive" if p.scores else ""

"""How far a result lies from the exact one: relative L2 error against float64 on the same rounded inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import passes
from .peers import PLAIN
from .workloads import Inputs, Workload


def exact(w: Workload, x: Inputs, direction: str) -> tuple[Tensor, ...]:
    """What a pass yields in float64, from the textbook's formula."""
    return textbook(w, x.double(), direction)


def textbook(w: Workload, x: Inputs, direction: str) -> tuple[Tensor, ...]:
    """What a pass yields by the textbook's formula in x's own dtype, one key head at a time: the whole might not fit."""
    group = w.heads // w.kv_heads
    one = replace(w, heads=group, kv_heads=1)
    parts = []
    for index in range(w.kv_heads):
        part = x.head(index, group)
        parts.append(passes.results(PLAIN.build(one, part), part, direction))
    return tuple(torch.cat(values, 1) for values in zip(*parts))  # dimension 1 is heads, the parameters' too


def distance(value: Tensor, wanted: Tensor) -> float:
    """|value - wanted| / |wanted|, in L2 over the whole tensor; inf where value has a NaN."""
    error = torch.linalg.vector_norm(value.double() - wanted) / torch.linalg.vector_norm(wanted).clamp(min=1e-300)
    return float("inf") if error.isnan() else error.item()


def worst(values: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest distance over several tensors."""
    return max(distance(a, b) for a, b in zip(values, wanted, strict=True))

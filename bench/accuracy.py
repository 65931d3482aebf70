"""How far a result lies from the exact one: relative L2 error against float64 on the same rounded inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .peers import PLAIN
from .workloads import Inputs, Workload


def exact(w: Workload, x: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """out and the gradients of x's leaves in float64, from the textbook's formula."""
    wide, group = x.double(), w.heads // w.kv_heads
    one = replace(w, heads=group, kv_heads=1)
    parts = []
    for head in range(w.kv_heads):  # one key head at a time: the whole matrix in float64 might not fit
        mine = slice(head * group, (head + 1) * group)
        table = None if wide.table is None else wide.table[:, mine].detach().requires_grad_()
        q, do = (t[:, mine].detach() for t in (wide.q, wide.do))
        k, v = (t[:, head : head + 1].detach().requires_grad_() for t in (wide.k, wide.v))
        part = replace(wide, q=q.requires_grad_(), k=k, v=v, do=do, table=table)
        parts.append(results(PLAIN.build(one, part), part))
    outs, grads = zip(*parts)
    return torch.cat(outs, 1), tuple(torch.cat(g, 1) for g in zip(*grads))  # dimension 1 is heads, the table's too


def results(call: Callable[[], Tensor], x: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same from an implementation built on x."""
    out = call()
    return out.detach(), torch.autograd.grad(out, x.leaves, x.do)


def distance(value: Tensor, wanted: Tensor) -> float:
    """|value - wanted| / |wanted|, in L2 over the whole tensor; inf where value has a NaN."""
    error = torch.linalg.vector_norm(value.double() - wanted) / torch.linalg.vector_norm(wanted).clamp(min=1e-300)
    return float("inf") if error.isnan() else error.item()


def worst(values: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest distance over several tensors."""
    return max(distance(a, b) for a, b in zip(values, wanted, strict=True))

"""Which backend runs a call, and why not another."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from .backends import tiled
from .problem import Problem

BACKENDS: dict[str, ModuleType] = {"tiled": tiled}
NAMES = (*BACKENDS, "reference")


class Plan(NamedTuple):
    """The choice for one call: backend, what runs inside it, and (what, why not) pairs for what does not run."""

    backend: str
    kernel: str
    reasons: tuple[tuple[str, str], ...]


def choose(name: str | None, device: torch.device) -> str:
    """The backend's name for tensors on `device`: the caller's where one is given.

    Raises:
        ValueError: `name` is no backend.
    """
    if name is None:
        return "tiled"
    if name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


def verbs(name: str) -> ModuleType:
    """The backend module of that name."""
    return BACKENDS[name]


def plan(p: Problem) -> Plan:
    """What would run for p."""
    if p.backend == "reference":
        return Plan("reference", "plain PyTorch over the whole score matrix", ())
    kernel, why_not_fused = tiled.kernel(p)
    reasons = []
    if why_not_fused is not None:
        reasons.append(("fused CPU kernel", why_not_fused))
    if p.q.device.type == "cuda":
        reasons.append(("triton", "this release has no Triton kernels; the tiled backend runs torch operations on the GPU"))
    return Plan("tiled", kernel, tuple(reasons))

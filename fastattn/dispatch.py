"""Which backend runs a call, and why not another."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import compat
from .backends import pieces, tiled
from .backends.facts import facts
from .backends.hopper_fit import misfits, preferred
from .problem import Problem

BACKENDS = ("tiled", "triton", "hopper")
NAMES = (*BACKENDS, "reference")


class Plan(NamedTuple):
    """The choice for one call: backend, what runs inside it, and (what, why not) pairs for what does not run."""

    backend: str
    kernel: str
    reasons: tuple[tuple[str, str], ...]


def choose(name: str | None, device: torch.device) -> str:
    """The backend's name for tensors on `device`: the caller's where one is given. `settled` has the last word.

    Raises:
        ValueError: `name` is no backend.
    """
    if name is None:
        return "triton" if device.type == "cuda" else "tiled"
    if name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


def settled(p: Problem, name: str | None) -> Problem:
    """p with a backend that can run it, where `choose(name, ..)` gave p's.

    Raises:
        ImportError: the call is for the GPU, no backend was named, and Triton is missing.
        ValueError: the backend that was named cannot run p; the message has every reason.
    """
    if p.backend == "hopper":
        return _hopper(p)
    if p.backend != "triton":
        return p
    if name is None and not has_triton():
        raise ImportError(
            "attention on cuda tensors runs Triton kernels, and triton cannot be imported: pip install triton. "
            'backend="tiled" works without it, as torch operations'
        )
    if name is None and preferred(p) and not _misfits_of_hopper(p):
        return dataclasses.replace(p, backend="hopper")
    reasons = _against_triton(*facts(p))
    if not reasons:
        return p
    if name is not None:
        raise ValueError(f'backend="triton" cannot run this call: {"; ".join(reasons)}')
    return dataclasses.replace(p, backend="tiled")


def _hopper(p: Problem) -> Problem:
    """p, which asks for that backend by name."""
    if reasons := _misfits_of_hopper(p):
        raise ValueError(f'backend="hopper" cannot run this call: {"; ".join(reasons)}')
    return p


def _misfits_of_hopper(p: Problem) -> list[str]:
    return [*_against_hopper(*facts(p)), *misfits(p)]


@compat.constant_in_graphs
def _against_hopper(*facts: Any) -> tuple[str, ...]:
    return verbs("hopper").refusals(*facts)


@compat.constant_in_graphs
def _against_triton(*facts: Any) -> tuple[str, ...]:
    return verbs("triton").refusals(*facts)


@compat.constant_in_graphs
def has_triton() -> bool:
    """Whether Triton can be imported."""
    from .kernels import shim

    return shim.PRESENT


@functools.cache
def verbs(name: str) -> ModuleType:
    """The backend module of that name. Triton's is imported when it is first asked for: the CPU needs none of it."""
    return tiled if name == "tiled" else importlib.import_module(f".backends.{name}", __package__)


def working(p: Problem) -> Any:
    """What runs p: its backend's verbs, piece by piece where p is to be batch-invariant."""
    return _by_pieces(p.backend) if p.invariant else verbs(p.backend)


@functools.cache
def _by_pieces(name: str) -> pieces.ByPieces:
    return pieces.ByPieces(verbs(name))


def plan(p: Problem, trained: bool = False, dlse: bool = False) -> Plan:
    """What would run for p; trained: with its backward, which with `dlse` has a gradient of lse."""
    found = _plan(p, trained, dlse)
    return found._replace(kernel=f"{found.kernel}; every batch entry and document by itself") if p.invariant else found


def _plan(p: Problem, trained: bool, dlse: bool) -> Plan:
    if p.backend == "reference":
        return Plan("reference", "plain PyTorch over the whole score matrix", ())
    if p.backend in ("triton", "hopper"):
        backend = verbs(p.backend)
        others = verbs("hopper").instead(p) if p.backend == "triton" else []
        return Plan(p.backend, backend.description(p), (*backend.falls_back(p), *others))
    kernel, why_not_fused = tiled.kernel(p)
    reasons = []
    if why_not_fused is not None:
        reasons.append(("fused CPU kernel", why_not_fused))
    elif trained and (why_not := tiled.why_not_fused_backward(p, dlse)):
        reasons.append(("fused CPU kernel in the backward", why_not))
    if p.q.device.type == "cuda":
        refused = verbs("triton").supports(p)
        reasons.append(("triton", "another backend was asked for" if refused is None else refused))
    return Plan("tiled", kernel, tuple(reasons))

"""Where the time goes on a GPU, kernel by kernel: every workload's forward and backward once, under Triton's profiler (proton).

Proton sees every kernel that the driver runs, torch's own too. What is compiled or allocated first happens before it looks.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import sweeps
from .passes import PASSES
from .peers import OURS
from .workloads import Inputs, Workload, inputs

LONGEST = 56  # characters of a kernel's name that are printed


def require(device: str) -> Any:
    """Triton's profiler.

    Raises:
        ValueError: there is no GPU here, or the profiler is missing.
    """
    needs = "--profile needs a GPU and Triton's profiler (triton.profiler, in Triton's wheel)"
    if device != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"{needs}; there is no CUDA device here")
    try:
        return importlib.import_module("triton.profiler")
    except ImportError as error:
        raise ValueError(f"{needs}; {error}") from error


def chosen(suites: Sequence[str], only: Sequence[str], device: str) -> list[Workload]:
    """The workloads of some suites, or those of these names.

    Raises:
        ValueError: a suite has no workloads, or none of them has a workload of a name.
    """
    if unknown := [name for name in suites if name not in sweeps.SWEEPS]:
        raise ValueError(f"--profile takes the suites {', '.join(sweeps.SWEEPS)}; got {', '.join(unknown)}")
    found = dict.fromkeys(cell.workload for name in suites for cell in sweeps.SWEEPS[name](device))
    if unknown := sorted(set(only) - {w.name for w in found}):
        raise ValueError(f"no workload is named {', '.join(unknown)}; there are {', '.join(w.name for w in found)}")
    return [w for w in found if not only or w.name in only]


def run(workloads: list[Workload], device: str, out: Path, proton: Any) -> list[Path]:
    """Profile the workloads and write profile.hatchet, proton's own file, and profile.txt, the tree; returns both paths."""
    out.mkdir(parents=True, exist_ok=True)
    flops = {}
    for w in workloads:
        x = inputs(w, device)
        density = x.mask.density(w.length, w.length)
        flops[w.name] = {name: sweeps.flops(w, PASSES[name], density) for name in ("forward", "backward")}
        _passes(w, x)  # compiles
    session = proton.start(str(out / "profile"))
    try:
        for w in workloads:
            x = inputs(w, device)
            _synchronize(device)
            with proton.scope(w.name):
                _passes(w, x, proton)
                _synchronize(device)
    finally:
        proton.finalize(session)
    data, page = out / "profile.hatchet", out / "profile.txt"
    page.write_text("\n".join(tree(json.loads(data.read_text())[0], flops)) + "\n")
    return [data, page]


def _passes(w: Workload, x: Inputs, proton: Any = None) -> None:
    """Forward and backward; with proton each in a scope of its own."""
    attend = OURS.build(w, x)
    scope = _Nothing if proton is None else proton.scope
    with torch.autograd.set_multithreading_enabled(False):  # scopes belong to a thread: the backward stays in this one
        with scope("forward"):
            result = attend(x)
        with scope("backward"):
            torch.autograd.grad(result, x.leaves, x.do)


class _Nothing:
    """A scope of nobody."""

    def __init__(self, name: str) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def tree(root: dict[str, Any], flops: dict[str, dict[str, float | None]]) -> Iterator[str]:
    """Lines: workloads, their passes with TFLOP/s in the field's convention, and kernels, the longest first.

    Args:
        root: a node of proton's tree, with frame.name, metrics and children.
        flops: by workload and pass.
    """
    for node in root["children"]:
        own = flops.get(node["frame"]["name"], {})
        yield _line(node, 0)
        for part in node["children"]:
            work, seconds = own.get(part["frame"]["name"]), nanoseconds(part) * 1e-9
            yield _line(part, 1) + (f"  {work / seconds / 1e12:.1f} TFLOP/s" if work and seconds else "")
            for each in sorted(part["children"], key=nanoseconds, reverse=True):
                yield from _kernels(each, 2)


def _kernels(node: dict[str, Any], depth: int) -> Iterator[str]:
    count = int(node["metrics"].get("count", 0))
    yield _line(node, depth) + (f"  {count} launches" if count > 1 else "")
    for each in sorted(node["children"], key=nanoseconds, reverse=True):
        yield from _kernels(each, depth + 1)


def nanoseconds(node: dict[str, Any]) -> float:
    """The time of a node and all below it."""
    return float(node["metrics"].get("time (ns)", 0.0)) + sum(map(nanoseconds, node["children"]))


def _line(node: dict[str, Any], depth: int) -> str:
    name = "  " * depth + node["frame"]["name"]
    return f"{name[:LONGEST]:<{LONGEST}} {nanoseconds(node) / 1e3:>10.1f} us"

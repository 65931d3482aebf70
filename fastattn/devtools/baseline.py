"""What the default configurations came to when they were last looked at: baseline.json, and what may not get worse.

An entry holds a key over the kernels' source, its launch, its argument types and Triton's version. As long as the key is
the same, so is the binary, and nothing needs to be compiled to know that the entry still holds.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..kernels import launch as launch_tables
from . import offline
from .offline import Recorded, Report

PAGE = Path(__file__).with_name("baseline.json")
DEFAULTS = ("sm_80", "sm_90")  # with both head dims and every call of offline.calls; the others with one
CELLS = [(arch, dim) for arch in DEFAULTS for dim in (64, 128)]
CELLS += [(arch, 64) for arch in ("sm_86", "sm_89", "sm_100", "sm_120", "gfx942")]


def launches(arch: str, head_dim: int) -> Iterator[tuple[str, Recorded]]:
    """(name, launch) of a training step in bf16; launches that share a binary come once."""
    seen = set()
    for call, options in offline.calls().items():
        if call != "causal" and arch not in DEFAULTS:
            continue
        p = offline.example(head_dim, torch.bfloat16, **options)
        for launch in offline.recorded(p, arch) + offline.own_launches(p, arch):
            variant = offline.variant(launch, arch)
            if variant not in seen:
                seen.add(variant)
                yield f"{arch}, d {head_dim}, {call}: {launch.kernel.__name__}", launch


def key(launch: Recorded, arch: str) -> str:
    """What decides for the binary, as one short string."""
    import triton

    text = "\n".join((triton.__version__, arch, *offline.variant(launch, arch), _sources(launch.kernel.__module__)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _sources(module: str) -> str:
    """The code without its comments of the portable kernels, and for one of sm_90 that of its own file and what they share."""
    folder = Path(launch_tables.__file__).parent
    files = sorted(x for x in folder.glob("*.py") if x.name != "launch.py")  # the tables' values are in every launch
    if ".hopper." in module:
        others = {"forward.py", "backward.py"} - {f"{module.split('.')[-1]}.py"}
        files += sorted(x for x in (folder / "hopper").glob("*.py") if x.name not in others)
    return "\n".join(ast.dump(ast.parse(x.read_text())) for x in files)


def read() -> dict[str, dict[str, Any]]:
    """The committed entries by name."""
    return json.loads(PAGE.read_text())["kernels"]


def write(page: Path = PAGE) -> Iterator[tuple[str, Report]]:
    """Compile everything and write it down; (name, report) as they come."""
    offline.require_compiler()
    import triton

    entries = {}
    for arch, dim in CELLS:
        for name, launch in launches(arch, dim):
            found = offline.report(launch, arch)
            entries[name] = {"key": key(launch, arch), **{k: v for k, v in found._asdict().items() if k != "kernel"}}
            yield name, found
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    page.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{lines}\n }}\n}}\n')


def regressions(arch: str, head_dim: int) -> tuple[list[str], int]:
    """(what got worse than the baseline, how many kernels had to be compiled to know)."""
    known, found, compiled = read(), [], 0
    for name, launch in launches(arch, head_dim):
        entry = known.get(name, {})
        if entry.get("key") == key(launch, arch):
            report = Report(launch.kernel.__name__, **{k: v for k, v in entry.items() if k != "key"})
        else:
            report, compiled = offline.report(launch, arch), compiled + 1
        found += [f"{name}: {fault} ({report})" for fault in faults(report, arch, entry)]
    return found, compiled


def faults(report: Report, arch: str, entry: dict[str, Any]) -> list[str]:
    """Why a configuration may not stay as it is: the assembler's warning, or more of a resource than there is or was."""
    found = []
    if report.loop_spills > entry.get("loop_spills", 0):
        found.append(f"{report.loop_spills} accesses to local memory in loops, {entry.get('loop_spills', 0)} before")
    if report.shared > offline.SHARED[arch] * 1024:
        found.append(f"{report.shared} bytes of shared memory, and {arch} has {offline.SHARED[arch]} K")
    if report.warning:
        found.append(report.warning)
    if entry.get("products", 0) and not report.products:
        found.append("no matrix instructions any more")
    return found

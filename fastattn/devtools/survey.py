"""The kernels of many calls, compiled for many architectures: a line each, and a page per kernel."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from . import baseline, bound, offline
from .offline import Inspection


class Unit(NamedTuple):
    """What one process compiles at a time."""

    arch: str
    head_dim: int
    dtype: torch.dtype
    everything: bool  # the tangents and the calls of `offline.calls(everything=True)`


class Row(NamedTuple):
    """A call and what one of its kernels came to, or why it did not compile."""

    unit: Unit
    call: str
    found: Inspection | None
    error: str = ""
    changes: str | None = None  # against the baseline; None where it does not have the kernel
    by_name: bool = False  # whether it runs only where its backend is named

    @property
    def kernel(self) -> str:
        return self.found.report.kernel if self.found is not None else self.error.split(":")[0]

    @property
    def faults(self) -> list[str]:
        """What may not be."""
        if self.found is None:
            return [self.error]
        too_large = self.found.report.shared > offline.SHARED.get(self.unit.arch, 1 << 20) * 1024
        return [*(["TOO MUCH SHARED MEMORY"] if too_large else []), *(f"HAZARD {text}" for text in self.found.hazards)]

    def __str__(self) -> str:
        where = f"{self.unit.arch:<7} d {self.unit.head_dim:<3} {str(self.unit.dtype)[6:]:<8} {self.call:<19}"
        if self.found is None:
            return f"{where} {self.error}"
        return "  ".join([f"{where} {self.found.report}  {self.found.seconds:.1f} s", *self.faults])


def survey(units: list[Unit], jobs: int = 1) -> Iterator[Row]:
    """Compile the default configurations; launches that share a binary come once. With jobs, so many units side by side."""
    offline.require_compiler()
    if jobs == 1:
        for unit in units:
            yield from rows(unit)
    else:
        yield from side_by_side(_rows, units, jobs)


def side_by_side(work: Callable[[Unit], Iterable[Any]], units: list[Unit], jobs: int) -> Iterator[Any]:
    """What `work` finds for every unit, in the order of the units, by processes of their own."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(work, units):
            yield from found


def _rows(unit: Unit) -> list[Row]:
    torch.set_num_threads(1)
    return list(rows(unit))


def rows(unit: Unit) -> Iterator[Row]:
    """The kernels of a unit."""
    known, seen = _known(), set()
    for call, options in offline.calls(unit.everything).items():
        p = offline.example(unit.head_dim, unit.dtype, **options)
        chosen = offline.recorded(p, unit.arch, 2 if unit.everything else 1)
        for i, launch in enumerate(chosen + offline.own_launches(p, unit.arch)):
            variant = offline.variant(launch, unit.arch)
            if variant in seen:
                continue
            seen.add(variant)
            name = launch.kernel.__name__
            try:
                found = offline.inspect(launch, unit.arch)
            except Exception as error:  # whatever the compiler raises is the answer
                yield Row(unit, call, None, f"{name}: {type(error).__name__}: {str(error)[-200:]}", None, i >= len(chosen))
                continue
            entry = known.get(f"{unit.arch}, d {unit.head_dim}, {call}: {name}") if unit.dtype == torch.bfloat16 else None
            yield Row(unit, call, found, "", None if entry is None else changes(found, entry), i >= len(chosen))


def _known() -> dict[str, dict[str, Any]]:
    """The baseline's entries, where it was made with the Triton at hand."""
    import triton

    page = json.loads(baseline.PAGE.read_text())
    return page["kernels"] if page["triton"] == triton.__version__ else {}


def changes(found: Inspection, entry: dict[str, Any]) -> str:
    """What differs from a baseline's entry, in words; nothing where nothing does."""
    now = found.report._asdict()
    return ", ".join(f"{name} {entry[name]} -> {now[name]}" for name in now if name in entry and entry[name] != now[name])


def pages(found: Iterable[Row]) -> Iterator[str]:
    """A page per kernel: a table of what it came to everywhere, its loops, and what the compiler said."""
    by_kernel: dict[str, list[Row]] = {}
    for row in found:
        by_kernel.setdefault(row.kernel, []).append(row)
    for kernel, own in by_kernel.items():
        lines = [f"# {kernel}", "", *_table(own), ""]
        yield "\n".join([*lines, *(line for row in own for line in _loops(row))])


HEAD = (
    "", "d", "dtype", "call", "warps", "stages", "registers", "local B", "in loops", "shared K", "products", "clocks",
    "of peak", "baseline",
)  # fmt: skip


def _table(own: list[Row]) -> Iterator[str]:
    """Resources by architecture and call, the bound of the loop that takes longest, and what differs from the baseline."""
    cells = [HEAD, *map(_cells, own)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEAD))]
    for i, row in enumerate(cells):
        yield "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |"
        if i == 0:
            yield "| " + " | ".join("-" * width for width in widths) + " |"


def _cells(row: Row) -> tuple[str, ...]:
    where = (row.unit.arch, str(row.unit.head_dim), str(row.unit.dtype)[6:], row.call)
    if row.found is None:
        return (*where, *[""] * (len(HEAD) - len(where) - 1), "does not compile")
    report, limits = row.found.report, [loop.bound for loop in row.found.loops if loop.bound is not None]
    slowest = max(limits, key=lambda limit: limit.clocks, default=None)
    clocks = ("", "") if slowest is None else (f"{slowest.clocks:.0f}", f"{slowest.peak:.0%}")
    shared = f"{report.shared / 1024:.0f} of {offline.SHARED[row.unit.arch]}" if row.unit.arch in offline.SHARED else ""
    numbers = (report.num_warps, report.num_stages, report.registers, report.local, report.loop_spills)
    same = "" if row.changes is None else row.changes or "same"
    return (*where, *map(str, numbers), shared, str(report.products), *clocks, same)


def _loops(row: Row) -> Iterator[str]:
    """The loops of a row, or why there are none to show."""
    if row.found is None or row.faults:
        yield str(row)
    if row.found is None or not row.found.loops:
        return
    yield f"{row.unit.arch} d {row.unit.head_dim} {str(row.unit.dtype)[6:]}, {row.call}"
    yield from (f"  {loop}" for loop in row.found.loops)
    if any("wgmma" in loop.order for loop in row.found.loops) and not row.found.hazards:
        yield "  no register of a product in flight is touched"
    if any(loop.bound is None for loop in row.found.loops):
        yield f"  no bound: {bound.NONE.get(row.unit.arch, 'its warps run loops of their own')}"
    yield ""


NOTE = """\
The clocks are a bound from counts of instructions, not a measurement: latency, memory and occupancy come on top.
Seconds are those of compiling on one core without a cache: what a first call waits for, unless it was warmed up."""


def waits(found: Iterable[Row]) -> Iterator[str]:
    """How long a first training call waits for the compiler, by unit, from a survey."""
    by_unit: dict[Unit, list[Row]] = {}
    for row in found:
        by_unit.setdefault(row.unit, []).append(row)
    for unit, own in by_unit.items():
        parts = {
            row.kernel: row.found.seconds
            for row in own
            if row.found is not None and row.call == own[0].call and not ("_jvp" in row.kernel or row.by_name)
        }
        each = ", ".join(f"{kernel} {seconds:.1f}" for kernel, seconds in parts.items())
        name = f"{unit.arch} d {unit.head_dim} {str(unit.dtype)[6:]}, {own[0].call}"
        yield f"{name}: a first call with its backward waits {sum(parts.values()):.1f} s for the compiler: {each}"

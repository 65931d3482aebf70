"""Cells of the benchmark: one workload in one pass, by everyone who can: errors, times, ratios, peak memory, reasons.

All cells of a suite are checked first (checks.py), side by side; then each is timed while nothing else runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import checks, passes, roof, sweeps, timing
from .checks import Check
from .passes import PASSES
from .peers import OURS, PEERS
from .sweeps import Cell
from .workloads import Inputs, Workload, inputs


@dataclass
class Row:
    """One cell. Errors are relative L2 against float64; of several tensors, the worst one's.

    Attributes:
        flops: of the pass in the field's convention, None where it has none. roof: seconds that it takes at least.
        times: of a single call, by peer. reasons: why a peer has none. memory: peak bytes beyond the inputs.
    """

    suite: str
    workload: str
    model: str
    shape: str
    direction: str
    length: int
    head_dim: int
    error: float
    plain_error: float
    flops: float | None = None
    roof: float | None = None
    times: dict[str, timing.Times] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.workload} {self.direction}"

    def ratio(self, peer: str, wall: bool = False) -> timing.Ratio | None:
        """How much longer the peer took, or None where it has no time."""
        if peer not in self.times or OURS.name not in self.times:
            return None
        return timing.ratio(self.times[OURS.name], self.times[peer], wall)

    def best(self) -> tuple[str, timing.Ratio] | None:
        """The fastest peer that gives the right numbers, and how much longer it took than we."""
        found = {name: r for name in self.times if name != OURS.name and (r := self.ratio(name)) is not None}
        return min(found.items(), key=lambda item: item[1].value, default=None)

    def json(self) -> dict[str, Any]:
        """Everything measured, as plain values; seconds and bytes."""
        peers = {}
        for name, times in self.times.items():
            found = self.ratio(name)
            peers[name] = {
                "median": times.median,
                "spread": times.spread,
                "wall": times.wall_median,
                "rounds": [float(f"{s:.6g}") for s in times.seconds],
                "walls": [float(f"{s:.6g}") for s in times.wall],
                "ratio": None if found is None else [found.value, found.low, found.high],
                "memory": self.memory.get(name),
            }
        head = {name: getattr(self, name) for name in HEAD}
        return {**head, "peers": peers}

    @classmethod
    def read(cls, data: dict[str, Any]) -> Row:
        """A row from what `json` gave."""
        row = cls(**{name: data[name] for name in HEAD})
        for name, found in data["peers"].items():
            row.times[name] = timing.Times(tuple(found["rounds"]), tuple(found["walls"]))
            row.memory[name] = found["memory"]
        return row


HEAD = (
    "suite", "workload", "model", "shape", "direction", "length", "head_dim", "error", "plain_error", "flops", "roof",
    "reasons",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """How long a suite may take.

    Attributes:
        timing: seconds of timing over all cells; 0: the fewest rounds.
        begun, deadline: of time.monotonic, after which no further cell is checked, and timed; the first always is.
        compiled: with peers that compile first.
        workers: how many processes check cells side by side; 0: this one.
    """

    timing: float = 0.0
    begun: float = float("inf")
    deadline: float = float("inf")
    compiled: bool = True
    workers: int = 0


def check(suite: str, cells: list[Cell], device: str, limits: Limits) -> Iterator[tuple[Cell, Check]]:
    """The cells with what is known of them before they are timed, as they are ready."""
    for index, found in checks.run(suite, cells, device, limits.compiled, limits.workers, limits.begun):
        yield cells[index], found


def run(
    suite: str, known: list[tuple[Cell, Check]], device: str, limits: Limits, bound: roof.Roof | None = None
) -> Iterator[Row]:  # fmt: skip
    """Rows as they are ready, in the order of the checked cells, until the deadline."""
    share = limits.timing / max(1, len(known))
    made: tuple[Workload, Inputs] | None = None
    for i, (cell, found) in enumerate(known):
        if i and time.monotonic() > limits.deadline:
            return
        w = cell.workload
        if made is None or made[0] != w:
            made = w, inputs(w, device)
        yield _row(suite, cell, found, made[1], share, bound)


def first_call(w: Workload, device: str) -> str:
    """How long the first forward and backward of our call takes in this process, and how long the second."""
    x = inputs(w, device)
    call = passes.timed(OURS.build(w, x), x, "forward+backward")
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    first, second = seconds
    return f"the first forward and backward of {w.name} took {first:.2f} s, the second {1e3 * second:.2f} ms"


def _row(suite: str, cell: Cell, found: Check, x: Inputs, seconds: float, bound: roof.Roof | None) -> Row:
    w, direction, repeat = cell
    device = x.q.device.type
    work = None if repeat > 1 else sweeps.flops(w, PASSES[direction], x.mask.density(w.length, w.length))
    row = Row(suite, w.name, w.model, str(w), direction, w.length, w.head_dim, found.error, found.plain_error, work)
    row.reasons, row.memory = dict(found.reasons), dict(found.memory)
    if bound is not None and work is not None:
        row.roof = bound.seconds(str(w.dtype)[6:], work, roof.bytes_moved(w, direction))
    calls: timing.Calls = {}
    for peer in PEERS:
        if peer.name in row.reasons or OURS.name in row.reasons:
            continue
        try:
            call = checks.call(peer, w, x, direction)
            if peer.compiles:
                call()
        except Exception as raised:
            row.reasons[peer.name] = checks.failure(raised)
        else:
            calls[peer.name] = call
    if OURS.name in calls:
        row.times = timing.interleave(calls, seconds, device, repeat=repeat, known=found.seconds)
    return row

"""Cells of the benchmark: one workload in one pass, by everyone who can: errors, times, ratios, peak memory, reasons."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import accuracy, memory, passes, roof, sweeps, timing
from .passes import PASSES
from .peers import OURS, PEERS, Peer
from .sweeps import Cell
from .workloads import Inputs, Workload, inputs

UNMEASURED = ("flex", "flex flash")  # peak memory of what compiles first would be the compiler's


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
                "rounds": times.seconds,
                "walls": times.wall,
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
        deadline: of time.monotonic, after which no further cell begins; the first always does.
        compiled: with peers that compile first.
    """

    timing: float = 0.0
    deadline: float = float("inf")
    compiled: bool = True


def run(suite: str, cells: list[Cell], device: str, limits: Limits, bound: roof.Roof | None = None) -> Iterator[Row]:
    """Rows as they are ready, in the order of the cells, until the deadline."""
    share = limits.timing / max(1, len(cells))
    made: tuple[Workload, Inputs] | None = None
    for i, cell in enumerate(cells):
        if i and time.monotonic() > limits.deadline:
            return
        w = cell.workload
        if made is None or made[0] != w:
            made = w, inputs(w, device)
        yield _row(suite, cell, made[1], share, limits.compiled, bound)


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


def measure_memory(rows: list[Row], device: str) -> None:
    """Fill in peak memory for the rows' peers, in a process of its own."""
    if not memory.measurable(device):
        return
    places = [(row, name) for row in rows for name in row.times if name not in UNMEASURED and row.suite != "overhead"]
    todo = [("cell", row.suite, row.workload, row.direction, name, device) for row, name in places]
    for (row, name), cell in zip(places, memory.in_process("fastattn.bench.probe", todo)):
        row.memory[name] = None if cell is None else cell["bytes"]


def memory_call(suite: str, workload: str, direction: str, peer: str, device: str) -> Callable[[], Any]:
    """What `measure_memory` runs in its process."""
    w = sweeps.select(suite, [workload], device)[0].workload
    x = inputs(w, device)
    [chosen] = [p for p in PEERS if p.name == peer]
    return _timed(chosen, w, x, direction if direction != "backward" else "forward+backward")


def _row(suite: str, cell: Cell, x: Inputs, seconds: float, compiled: bool, bound: roof.Roof | None) -> Row:
    w, direction, repeat = cell
    device = x.q.device.type
    exact = accuracy.exact(w, x, direction)
    yardstick = accuracy.worst(accuracy.textbook(w, x, direction), exact)
    work = None if repeat > 1 else sweeps.flops(w, PASSES[direction], x.mask.density(w.length, w.length))
    row = Row(suite, w.name, w.model, str(w), direction, w.length, w.head_dim, float("nan"), yardstick, work)
    if bound is not None and work is not None:
        row.roof = bound.seconds(str(w.dtype)[6:], work, roof.bytes_moved(w, direction))
    calls: timing.Calls = {}
    for peer in PEERS:
        reason = peer.unavailable(device) or peer.cannot(w, device, direction)
        if reason is None and peer.compiles and not compiled:
            reason = "left out: it compiles first"
        if reason is None:
            try:
                attend = peer.build(w, x)
                error = accuracy.worst(peer.results(attend, x, direction), exact)
                calls[peer.name] = _timed(peer, w, x, direction, attend)
            except Exception as raised:  # a peer's failure is a cell of the table
                reason = f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:160]}"
            else:
                if peer is OURS:
                    row.error = error
                if error > 8 * yardstick + 4 * torch.finfo(w.dtype).eps:  # wrong numbers are not fast numbers
                    reason = f"wrong: error {error:.1e} where plain PyTorch's is {yardstick:.1e}"
                    del calls[peer.name]
        if reason is not None:
            row.reasons[peer.name] = reason
    if OURS.name in calls:
        row.times = timing.interleave(calls, seconds, device, repeat=repeat)
    return row


def _timed(peer: Peer, w: Workload, x: Inputs, direction: str, attend: passes.Attend | None = None) -> Callable[[], Any]:
    attend = peer.build(w, x) if attend is None else attend
    if direction in ("forward", "backward", "forward+backward"):
        return passes.timed(attend, x, direction)
    return lambda: peer.results(attend, x, direction)

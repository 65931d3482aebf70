"""What is known of a cell before it is timed: everyone's error against float64, who has no number and why, peak memory.

None of it needs a quiet machine, so cells are checked side by side, each in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import accuracy, memory, passes, sweeps, workers
from .passes import PASSES
from .peers import OURS, PEERS, PLAIN, Peer
from .sweeps import Cell
from .workloads import Inputs, Workload, inputs


@dataclass
class Check:
    """Of one cell. Errors are relative L2 against float64; of several tensors, the worst one's.

    Attributes:
        error, plain_error: ours, and that of the textbook's formula in the workload's dtype.
        reasons: why a peer has no number. memory: peak bytes beyond the inputs. seconds: about what a call takes.
    """

    error: float = float("nan")
    plain_error: float = float("nan")
    reasons: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return asdict(self)


def run(
    suite: str, cells: list[Cell], device: str, compiled: bool, n: int, until: float = float("inf")
) -> Iterator[tuple[int, Check]]:  # fmt: skip
    """(index of the cell, what is known of it) as they are ready, in n processes; in this one with n = 0, without peak memory.

    Args:
        compiled: with peers that compile first; what they compile stays in their caches on disk.
        until: of time.monotonic, after which no further cell is begun; the first always is.
    """
    if n == 0:
        for index, cell in enumerate(cells):
            if index and time.monotonic() > until:
                return
            yield index, check(cell, device, compiled, sized=False)
        return
    order = list(range(len(cells)))
    if until == float("inf"):  # the longest first, so that nobody is left alone with it
        order.sort(key=lambda index: -_work(cells[index]))
    todo = [("cell", suite, cells[i].workload.name, cells[i].direction, compiled, device) for i in order]
    for place, found in workers.answers("fastattn.bench.probe", todo, n, until):
        if isinstance(found, workers.Ended):
            yield order[place], Check(reasons={OURS.name: f"{LOST}: {found.last[:160]}" if found.last else LOST})
        else:
            yield order[place], Check(**found)


LOST = "the process that checked it ended without an answer"


def _work(cell: Cell) -> float:
    """Operations over the whole score matrix, which the textbook's formula holds."""
    return sweeps.flops(cell.workload, PASSES[cell.direction] or 3.5, 1.0) or 0.0


def named(suite: str, workload: str, direction: str, compiled: bool, device: str) -> Check:
    """What `run` asks of its processes."""
    [cell] = [c for c in sweeps.select(suite, [workload], device) if c.direction == direction]
    return check(cell, device, compiled, sized=memory.measurable(device) and suite != "overhead")


def check(cell: Cell, device: str, compiled: bool, sized: bool) -> Check:
    """Check one cell here; with peak memory if sized, which needs a process that called `memory.settle`."""
    w, direction, _ = cell
    x = inputs(w, device)
    exact = accuracy.exact(w, x, direction)
    found = Check(plain_error=accuracy.worst(accuracy.textbook(w, x, direction), exact))
    for peer in PEERS:
        reason = peer.unavailable(device) or peer.cannot(w, device, direction)
        if reason is None and peer.compiles and not compiled:
            reason = "left out: it compiles first"
        if reason is None:
            try:
                reason = _judge(peer, w, x, direction, exact, sized, found)
            except Exception as raised:  # a peer's failure is a cell of the table
                reason = failure(raised)
        if reason is not None:
            found.reasons[peer.name] = reason
    return found


def failure(raised: Exception) -> str:
    """An exception as a reason."""
    return f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:160]}"


def call(peer: Peer, w: Workload, x: Inputs, direction: str) -> Callable[[], Any]:
    """What is timed of a peer."""
    attend = peer.build(w, x)
    if direction in ("forward", "backward", "forward+backward"):
        return passes.timed(attend, x, direction)
    return lambda: peer.results(attend, x, direction)


def _judge(
    peer: Peer, w: Workload, x: Inputs, direction: str, exact: tuple[torch.Tensor, ...], sized: bool, found: Check
) -> str | None:  # fmt: skip
    """Why the peer's numbers do not count, or None; what there is to know of it goes into `found`."""
    known = peer is PLAIN and sized  # its error is the yardstick, and memory runs it
    error = found.plain_error if known else accuracy.worst(peer.results(peer.build(w, x), x, direction), exact)
    if peer is OURS:
        found.error = error
    if error > 8 * found.plain_error + 4 * torch.finfo(w.dtype).eps:  # wrong numbers are not fast numbers
        return f"wrong: error {error:.1e} where plain PyTorch's is {found.plain_error:.1e}"
    if sized and not peer.compiles:  # peak memory of what compiles first might be the compiler's
        once = call(peer, w, x, "forward+backward" if direction == "backward" else direction)
        start = time.perf_counter()
        found.memory[peer.name] = memory.peak(once, x.q.device.type, warm=True)
        found.seconds[peer.name] = time.perf_counter() - start
    return None

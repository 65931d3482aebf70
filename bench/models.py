"""Models' attention, forward and forward with backward: errors, times, ratios and peak memory, workload by workload."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import accuracy, memory, timing
from .peers import OURS, PEERS, PLAIN
from .workloads import CUDA_FACTOR, MODELS, Inputs, Workload, inputs

PASSES = ("forward", "forward+backward")


@dataclass
class Row:
    """One workload in one direction. Errors are relative L2 against float64; of the gradients, the worst one's."""

    workload: str
    model: str
    shape: str
    direction: str
    error: float
    plain_error: float
    times: dict[str, timing.Times] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)

    def ratio(self, peer: str, wall: bool = False) -> timing.Ratio | None:
        """How much longer the peer took, or None where it has no time."""
        if peer not in self.times:
            return None
        return timing.ratio(self.times[OURS.name], self.times[peer], wall)

    def json(self) -> dict[str, Any]:
        """Everything measured, as plain values; seconds and bytes."""
        peers = {}
        for name, times in self.times.items():
            found = self.ratio(name)
            assert found is not None
            peers[name] = {
                "median": times.median,
                "spread": times.spread,
                "wall": times.wall_median,
                "rounds": times.seconds,
                "ratio": [found.value, found.low, found.high],
                "memory": self.memory.get(name),
            }
        head = {k: getattr(self, k) for k in ("workload", "model", "shape", "direction", "error", "plain_error", "reasons")}
        return {**head, "peers": peers}


def select(names: list[str] | None, device: str) -> list[Workload]:
    """The workloads of these names, all by default, with CUDA's lengths and dtype there.

    Raises:
        ValueError: a name is unknown.
    """
    known = {w.name: w for w in MODELS}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"no workload is named {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in names or known]
    return [_on_cuda(w) for w in chosen] if device == "cuda" else chosen


def run(workloads: list[Workload], device: str, seconds: float, compiled: bool) -> Iterator[Row]:
    """Rows as they are ready, over about `seconds`; `compiled`: with peers that compile first."""
    share = seconds / (2 * len(workloads))
    for w in workloads:
        x = inputs(w, device)
        exact = accuracy.exact(w, x)
        plain = accuracy.results(PLAIN.build(w, x), x)
        yardsticks = accuracy.distance(plain[0], exact[0]), accuracy.worst(plain[1], exact[1])
        for direction, yardstick in zip(PASSES, yardsticks):
            yield _row(w, x, direction, exact, yardstick, share, compiled)


def first_call(w: Workload, device: str) -> str:
    """How long the first forward and backward of our call takes in this process, and how long the second."""
    x = inputs(w, device)
    call = _timed(OURS.build(w, x), x, True)
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
    cells = [("model", row.workload, row.direction, name, device) for row in rows for name in row.times if name != "flex"]
    found = iter(memory.in_process("fastattn.bench.probe", cells))
    for row in rows:
        for name in row.times:
            if name != "flex":
                cell = next(found)
                row.memory[name] = None if cell is None else cell["bytes"]


def memory_call(workload: str, direction: str, peer: str, device: str) -> Callable[[], Any]:
    """What `measure_memory` runs in its process."""
    [w] = select([workload], device)
    x = inputs(w, device)
    gradients = direction != PASSES[0]
    [chosen] = [p for p in PEERS if p.name == peer]
    return _timed(chosen.build(w, x if gradients else x.detached()), x, gradients)


def _on_cuda(w: Workload) -> Workload:
    window = None if w.window is None else w.window * CUDA_FACTOR
    length = w.length if w.name.startswith("vit") else w.length * CUDA_FACTOR
    return replace(w, length=length, window=window, dtype=torch.bfloat16)


def _row(w: Workload, x: Inputs, direction: str, exact: Any, yardstick: float, seconds: float, compiled: bool) -> Row:
    gradients = direction != PASSES[0]
    device = x.q.device.type
    row = Row(w.name, w.model, str(w), direction, float("nan"), yardstick)
    calls: timing.Calls = {}
    for peer in PEERS:
        reason = peer.unavailable(device) or peer.cannot(w, device, gradients)
        if reason is None and peer.name == "flex" and not compiled:
            reason = "left out: it compiles first"
        if reason is None:
            try:
                call = peer.build(w, x if gradients else x.detached())
                error = yardstick if peer is PLAIN else _error(call, x, gradients, exact)
            except Exception as raised:  # a peer's failure is a cell of the table
                reason = f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:160]}"
            else:
                calls[peer.name] = _timed(call, x, gradients)
                if peer is OURS:
                    row.error = error
                if error > 8 * yardstick + 4 * torch.finfo(w.dtype).eps:  # wrong numbers are not fast numbers
                    reason = f"wrong: error {error:.1e} where plain PyTorch's is {yardstick:.1e}"
                    del calls[peer.name]
        if reason is not None:
            row.reasons[peer.name] = reason
    if OURS.name in calls:
        row.times = timing.interleave(calls, seconds, device)
    return row


def _error(call: Callable[[], Tensor], x: Inputs, gradients: bool, exact: Any) -> float:
    if gradients:
        return accuracy.worst(accuracy.results(call, x)[1], exact[1])
    with torch.no_grad():
        return accuracy.distance(call(), exact[0])


def _timed(call: Callable[[], Tensor], x: Inputs, gradients: bool) -> Callable[[], Any]:
    if gradients:
        return lambda: torch.autograd.grad(call(), x.leaves, x.do)
    return torch.no_grad()(call)

"""Times that can be compared: the candidates take turns, round by round, and a ratio comes with its interval.

On a CPU the figure is the process's CPU time, which other programs on the machine hardly move; wall time stands beside it.
On CUDA it is the time between two events, after the L2 cache was overwritten.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

MIN_ROUNDS = 5
MAX_ROUNDS = 101
SLOW_ROUNDS = 3  # of a candidate that would use up the time by itself
LONG, LONG_ROUNDS = 0.5, 2  # seconds of a call that needs no warming up, and its rounds where it is far behind
L2_BYTES = 256 << 20
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Times:
    """Seconds of one candidate, a value a round; `wall` likewise."""

    seconds: tuple[float, ...]
    wall: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def wall_median(self) -> float:
        return statistics.median(self.wall)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Ratio:
    """How many times longer the peer took: the median over rounds, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the run can tell the two apart."""
        return self.low > 1.0 or self.high < 1.0

    def __str__(self) -> str:
        return f"{self.value:.2f}x" if self.clear else "same"


def ratio(ours: Times, peer: Times, wall: bool = False) -> Ratio:
    """Peer over ours from rounds in which both ran. The interval is that of order statistics: no distribution assumed."""
    pairs = zip(ours.wall, peer.wall) if wall else zip(ours.seconds, peer.seconds)  # the rounds that both took part in
    values = sorted(b / a for a, b in pairs)
    n = len(values)
    cut = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    return Ratio(statistics.median(values), values[cut], values[n - 1 - cut])


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """torch with n CPU threads inside; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if n is None else n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    calls: Calls, seconds: float, device: str = "cpu", rounds: int | None = None, repeat: int = 1,
    known: Mapping[str, float] | None = None,
) -> dict[str, Times]:  # fmt: skip
    """Every call's times, taken in turns, the first to go changing from round to round.

    Args:
        calls: by name, the most important first; each is run once before anything is timed.
        seconds: about how long to go on, MIN_ROUNDS rounds at least. A slow candidate stops after SLOW_ROUNDS, but
            never the first.
        known: about how long calls take, by name. One that takes LONG, a fifth of `seconds` and twice as long as the first is
            not run beforehand and stops after LONG_ROUNDS.
        rounds: a fixed number of rounds instead.
        repeat: with more than one, so many calls are timed together and the time of one is told; on CUDA it is then what
            the host spends on a call, the device being left to run behind.
    """
    calls = {name: _repeated(call, repeat) for name, call in calls.items()}
    clock = _cpu if device != "cuda" else _Cuda() if repeat == 1 else _host
    names = list(calls)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    turns = dict.fromkeys(names, MAX_ROUNDS if rounds is None else rounds)
    known = known or {}
    long = max(LONG, seconds / 5, 2 * known.get(names[0], float("inf")))
    for name, call in calls.items():
        if rounds is None and known.get(name, 0.0) > long:
            turns[name] = LONG_ROUNDS
            continue
        begin = time.perf_counter()
        call()
        if rounds is None and name != names[0] and (time.perf_counter() - begin) * MIN_ROUNDS * len(calls) > seconds:
            turns[name] = SLOW_ROUNDS
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns[names[0]]):
            if rounds is None and turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if turn < turns[name]:
                    taken[name].append(clock(calls[name]))
    finally:
        gc.enable()
    return {
        name: Times(tuple(a / repeat for a, _ in pairs), tuple(b / repeat for _, b in pairs)) for name, pairs in taken.items()
    }


def _repeated(call: Callable[[], Any], repeat: int) -> Callable[[], Any]:
    if repeat == 1:
        return call

    def run() -> None:
        for _ in range(repeat):
            call()

    return run


def _host(call: Callable[[], Any]) -> tuple[float, float]:
    """What it takes to launch: the device's queue is empty before, and not waited for."""
    torch.cuda.synchronize()
    wall = time.perf_counter()
    call()
    taken = time.perf_counter() - wall
    torch.cuda.synchronize()
    return taken, taken


def _cpu(call: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


class _Cuda:
    """CUDA events around a call on a cold L2 cache."""

    def __init__(self) -> None:
        self.flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], Any]) -> tuple[float, float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self.flush.zero_()
        wall = time.perf_counter()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, time.perf_counter() - wall

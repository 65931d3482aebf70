"""Launch configurations by measurement: kernel by kernel, from what the table has to what this card runs fastest.

A configuration [BLOCK_Q, BLOCK_K, num_warps, num_stages] changes one of its four numbers at a time, to half, to double or
by one stage, for as long as that makes the kernel faster by more than the noise. What does not compile or fit is passed
over; a winner must give the results of the configuration that it replaces.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ..backends import triton as backend
from ..backends import triton_call
from ..backends.facts import facts
from ..kernels import launch as launches
from ..kernels.launch import Launch
from ..masks import Causal, Dense
from ..problem import Problem, ThreeTangents
from ..scores import ALiBi, Bias
from . import offline

KERNEL = {
    "forward": "forward", "dkdv": "backward_dkdv", "dq": "backward_dq", "grads": "score_grads", "jvp": "forward_jvp",
    "jvp dq": "backward_dq_jvp", "jvp dkdv": "backward_dkdv_jvp", "jvp grads": "score_grads", "jvp2": "forward_jvp2",
}  # fmt: skip
LIMITS = ((16, triton_call.PAD), (16, triton_call.TALLEST), (1, 16), (1, 5))  # of the four numbers
GAIN = 0.98  # a candidate must take at most this share of the time
REPEATS = 7
LIKE = 2e-2  # other tiles sum in another order, in half precision


class Entry(NamedTuple):
    """What is tuned: one place of a table."""

    kernel: str
    load: str  # one of launch.LOADS
    bits: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.load}" if self.load else self.kernel


class Left(NamedTuple):
    """An entry that was not tuned, and why."""

    entry: Entry
    reason: str

    def __str__(self) -> str:
        return f"{self.entry.name:<16} d {self.entry.head_dim:<3} {self.entry.bits} bit  left out: {self.reason}"


class Found(NamedTuple):
    """What became of an entry; times in seconds, `tried` counts what was timed."""

    entry: Entry
    before: Launch
    after: Launch
    before_s: float
    after_s: float
    tried: int

    def __str__(self) -> str:
        change = f"{list(self.before)} -> {list(self.after)}" if self.after != self.before else f"{list(self.before)} stays"
        ratio = self.before_s / self.after_s
        e = self.entry
        times = f"{self.after_s * 1e6:.0f} us, {ratio:.2f}x ({self.tried} tried)"
        return f"{e.name:<16} d {e.head_dim:<3} {e.bits} bit  {change}  {times}"


def entries(dims: list[int], dtypes: list[torch.dtype]) -> Iterator[Entry]:
    """All of them, those that most calls use first."""
    for load in (x for x in launches.LOADS if x != "sums"):  # which takes a bias's gradient, beside dq alone
        for dtype in dtypes:
            for dim in dims:
                for kernel in ("forward", "dkdv", "dq"):
                    yield Entry(kernel, load, 8 * dtype.itemsize, dim)
    for kernel in ("grads", "jvp", "jvp dq", "jvp dkdv", "jvp grads", "jvp2"):
        for dtype in dtypes:
            for dim in dims:
                yield Entry(kernel, "", 8 * dtype.itemsize, dim)


def tune(
    dims: list[int], dtypes: list[torch.dtype], *, minutes: float, n: int = 4096, device: str = "cuda",
    only: tuple[str, ...] = (),
) -> Iterator[Found | Left]:  # fmt: skip
    """Tune entry after entry until the time is up; the tables in memory keep every winner.

    Args:
        dims, dtypes: which head dims and dtypes. n: rows and keys of the calls that are timed.
        minutes: no entry begins later, and none tries further configurations.
        only: names of kernels (`KERNEL`); all by default.
    """
    until = time.monotonic() + 60 * minutes
    for entry in entries(dims, dtypes):
        if time.monotonic() > until:
            return
        if only and entry.kernel not in only:
            continue
        p = _problem(entry, n, device)
        misfit = triton_call.misfit(*facts(p)[:4], (entry.kernel,))
        yield Left(entry, misfit) if misfit else _tune(entry, p, until)


def write(folder: Path, arch: str) -> Path:
    """Write the table of `arch` as it stands in memory, or the one that it uses; returns its path."""
    path = folder / f"{arch}.json"
    kernels = []
    tables = launches.tables()
    for name, by_bits in tables.get(arch, tables[launches.table_of(arch)]).items():
        rows = [f'    "{bits}": {json.dumps(by_dim)}' for bits, by_dim in by_bits.items() if by_dim]
        if rows:
            kernels.append(f'  "{name}": {{\n' + ",\n".join(rows) + "\n  }")
    path.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    return path


def _problem(entry: Entry, n: int, device: str) -> Problem:
    """A causal training call that launches the entry's kernel with its load."""
    dtype = {16: torch.bfloat16, 32: torch.float32}[entry.bits]
    params = entry.kernel in ("grads", "jvp grads")
    options = _options("additive" if params else entry.load, n, dtype, device)
    return offline.example(entry.head_dim, dtype, n=n, params=params, device=device, random=True, **options)


def _options(load: str, n: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What makes `offline.example` a call of a load."""
    if load == "additive":
        return {"score": [ALiBi(torch.full((4,), 0.01, device=device))]}
    if load == "bias":
        return {"score": [Bias(torch.zeros(4, n, n, dtype=dtype, device=device))]}
    if load == "dense":
        return {"mask": Dense(torch.rand(n, n, device=device) < 0.9) & Causal("top_left")}
    if load == "chain":
        return {"chain": True}
    return {"dropout": 0.1} if load == "heavy" else {}


def _tune(entry: Entry, p: Problem, until: float) -> Found:
    arch = triton_call.architecture(p.q.device)
    before = best = triton_call.config(p, entry.kernel)
    wanted = _run(entry, p, None)
    before_s = best_s = _time(entry, p)
    seen, tried, improved = {best}, 1, True
    while improved and time.monotonic() < until:
        improved = False
        for candidate in _neighbours(best):
            if candidate in seen or time.monotonic() > until:
                continue
            seen.add(candidate)
            with _table(arch, entry, candidate):
                seconds = _tried(entry, p, wanted)
            tried += seconds is not None
            if seconds is not None and seconds < GAIN * best_s:
                best, best_s, improved = candidate, seconds, True
    if best != before:
        _set(arch, entry, best)
    return Found(entry, before, best, before_s, best_s, tried)


def _neighbours(how: Launch) -> Iterator[Launch]:
    for i, (low, high) in enumerate(LIMITS):
        for value in (how[i] - 1, how[i] + 1) if i == 3 else (how[i] // 2, how[i] * 2):
            if low <= value <= high:
                yield how._replace(**{Launch._fields[i]: value})


def _tried(entry: Entry, p: Problem, wanted: list[Tensor]) -> float | None:
    """Seconds of a configuration; None where it does not run or gives other results."""
    try:
        found = _run(entry, p, None)
        same = all(torch.allclose(a.float(), b.float(), LIKE, LIKE) for a, b in zip(found, wanted, strict=True))
        return _time(entry, p) if same else None
    except Exception:  # the compiler's and the driver's refusals have no common class
        return None


def _run(entry: Entry, p: Problem, launched: Callable[..., None] | None) -> list[Tensor]:
    """The verbs of p up to the entry's kernel, every launch through `launched` where given; what they return."""
    with mock.patch.object(triton_call, "run", launched or triton_call.run):
        out, lse, out_lo = backend.forward(p, True)
        if entry.kernel == "forward":
            return [out, lse]
        if not entry.kernel.startswith("jvp"):
            grads = backend.backward(p, out, None, out, lse, out_lo)
            return [grads.q, grads.k, grads.v, *grads.params]
        t = offline.directions(p)
        if entry.kernel == "jvp":
            return list(backend.forward_jvp(p, t, out, lse, out_lo))
        if entry.kernel == "jvp2":
            return list(backend.forward_jvp2(p, ThreeTangents(t, t, t), out, lse, out_lo, lse, lse))
        grads = backend.backward_jvp(p, t, out, None, None, None, out, lse, out_lo, out, lse)
        return [grads.q, grads.k, grads.v, *grads.params]


def _time(entry: Entry, p: Problem) -> float:
    """The median time of the entry's kernel alone, over launches on warm caches."""
    taken: list[float] = []
    plain = triton_call.run

    def launched(kernel: Any, programs: int, how: Launch, *args: Any, **constants: Any) -> None:
        plain(kernel, programs, how, *args, **constants)
        if getattr(kernel, "__name__", "") == KERNEL[entry.kernel]:
            again = functools.partial(plain, kernel, programs, how, *args, **constants)
            taken.extend(_seconds(again, p.q.is_cuda) for _ in range(REPEATS))

    _run(entry, p, launched)
    return statistics.median(taken)


def _seconds(call: Callable[[], None], cuda: bool) -> float:
    if not cuda:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@contextmanager
def _table(arch: str, entry: Entry, how: Launch) -> Iterator[None]:
    """The tables with another configuration in an entry's place."""
    before = launches.tables()[launches.table_of(arch)].get(entry.name, {}).get(str(entry.bits), {}).get(_dim(entry))
    _set(arch, entry, how)
    try:
        yield
    finally:
        _set(arch, entry, before)


def _set(arch: str, entry: Entry, how: Any) -> None:
    """Put a configuration into the table of `arch`, which begins as a copy of the one that it used."""
    tables = launches.tables()
    if arch not in tables:
        tables[arch] = json.loads(json.dumps(tables[launches.table_of(arch)]))
    by_bits = tables[arch].setdefault(entry.name, {})
    by_dim = by_bits.setdefault(str(entry.bits), {})
    if how is None:
        del by_dim[_dim(entry)]
        if not by_dim:
            del by_bits[str(entry.bits)]
        if not by_bits:
            del tables[arch][entry.name]
    else:
        by_dim[_dim(entry)] = list(how) if len(how) == 4 or how[4] else list(how)[:4]
    launches.launch.cache_clear()


def _dim(entry: Entry) -> str:
    return str(launches.padded(entry.head_dim))

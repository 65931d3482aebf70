"""One run of the benchmark: which parts, for how long, and where the results go."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import environment
from . import (
    SUITES,
    cells,
    checks,
    features,
    hosts,
    memory,
    numerics,
    page,
    plot,
    roof,
    sweeps,
    table,
    targets,
    timing,
    training,
    workers,
)
from .progress import Progress
from .sweeps import SWEEPS

DEFAULT = ("models", "training")


# about how many minutes each suite takes by itself, which is also its part of a run of --minutes
MINUTES = {
    "models": 2.8, "training": 0.3, "targets": 6.0, "memory": 0.5, "accuracy": 0.4, "hosts": 1.5, "forward": 2.0,
    "backward": 3.0, "masks": 2.0, "bias": 2.0, "second-order": 1.5, "overhead": 0.7,
}  # fmt: skip
ON_CPU = ("targets", "hosts")  # have nothing to measure on another device
# of a suite's time: until when cells are checked (errors, compiling, peak memory), and what is meant for timing
CHECKED, TIMED = 0.45, 0.25


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        suites: of SUITES. only: names of workloads, all by default.
        minutes: about how long the whole run takes; what does not fit in any more is left out, and said. None: everything.
        quick: the fewest rounds, few workloads and few training steps: to see that it runs.
        threads: torch's CPU threads, but for targets.
        workers: processes in which cells are checked; None: as many as there are cores. 0: none, and no peak memory.
    """

    suites: tuple[str, ...] = DEFAULT
    only: tuple[str, ...] = ()
    minutes: float | None = None
    quick: bool = False
    compiled: bool = True
    threads: int = 1
    device: str = "cpu"
    workers: int | None = None

    def seconds(self, suite: str) -> float:
        """A suite's part of the time."""
        if self.quick:
            return 0.0
        if self.device != "cpu" and suite in ON_CPU:
            return 0.0
        whole = sum(MINUTES[name] for name in self.suites if self.device == "cpu" or name not in ON_CPU)
        return 60 * MINUTES[suite] * (1.0 if self.minutes is None else self.minutes / whole)

    def limits(self, suite: str) -> cells.Limits:
        seconds, now = self.seconds(suite), time.monotonic()
        free = self.minutes is None or self.quick
        begun, deadline = (float("inf") if free else now + part * seconds for part in (CHECKED, 0.95))
        n = workers.count(self.device) if self.workers is None else self.workers
        return cells.Limits(TIMED * seconds, begun, deadline, self.compiled and not self.quick, n)


@dataclass
class Results:
    """What was measured so far; a run that was interrupted, or that an error ended, keeps it."""

    environment: dict[str, Any]
    roof: roof.Roof | None = None
    cells: dict[str, list[cells.Row]] = field(default_factory=dict)
    training: training.Training | None = None
    targets: list[targets.Row] = field(default_factory=list)
    features: list[features.Row] = field(default_factory=list)
    accuracy: list[numerics.Row] = field(default_factory=list)
    hosts: list[hosts.Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: Exception | None = None

    def json(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "roof": None if self.roof is None else self.roof.json(),
            **{suite: [row.json() for row in self.cells.get(suite, [])] for suite in SWEEPS},
            "training": None if self.training is None else self.training.json(),
            "targets": [row.json() for row in self.targets],
            "memory": [row.json() for row in self.features],
            "accuracy": [row.json() for row in self.accuracy],
            "hosts": [row.json() for row in self.hosts],
            "notes": self.notes,
        }

    def sections(self) -> dict[str, str]:
        """The tables by suite, as Markdown."""
        found = {}
        for suite, rows in self.cells.items():
            if rows:
                key = table.KEY if suite == next(iter(self.cells)) else ""
                parts = [table.cells(rows), key, table.shapes(rows), table.reasons(rows)]
                found[suite] = "\n\n".join(part for part in parts if part)
        if self.training is not None and self.training.losses["torch"]:
            drift = f"The two loss curves differ by at most {self.training.drift:.1e}."
            found["training"] = f"{table.training(self.training)}\n\n{drift}"
        if self.targets:
            found["targets"] = table.targets(self.targets)
        if self.features:
            found["memory"] = table.features(self.features)
        if self.accuracy:
            found["accuracy"] = table.numerics(self.accuracy)
        if self.hosts:
            versions = [f"{name} {self.environment[name]}" for name in hosts.libraries() if self.environment.get(name)]
            found["hosts"] = "\n\n".join([table.hosts(self.hosts), HOSTS_KEY, f"Versions: {', '.join(versions)}."])
        return found


HOSTS_KEY = (
    "float32 on the CPU. output: the largest absolute difference of logits (of hidden states, for trained models) from the "
    "host's own attention. gradient: of a random projection of the output by every parameter, the largest difference over that "
    "gradient's largest entry. calls: how many attention calls of one pass fastattn computed. undo: whether taking fastattn "
    "back gives the host's first output again, bit for bit."
)


def run(options: Options) -> Results:
    """Run the suites, showing progress on stderr; Ctrl-C or an error ends the run and keeps what is there.

    Raises:
        ValueError: an unknown suite or workload.
    """
    unknown = sorted(set(options.suites) - set(SUITES))
    if unknown:
        raise ValueError(f"no suite is named {', '.join(unknown)}; there are {', '.join(SUITES)} and all")
    chosen = _chosen(options)
    results = Results({**environment.describe(), **_when(options)})
    try:
        with timing.threads(options.threads):
            _prepare(options, chosen, results)
            for suite in options.suites:
                if suite in chosen:
                    _cells(options, suite, chosen[suite], results)
                elif suite == "training":
                    _training(options, results)
                elif suite == "accuracy":
                    _accuracy(options, results)
        for suite in options.suites:
            if suite in OTHERS:
                OTHERS[suite](options, results)
    except KeyboardInterrupt:
        results.notes.append("interrupted: what was measured until then")
    except Exception as error:
        results.notes.append(f"interrupted by {checks.failure(error)}: what was measured until then")
        results.error = error
    return results


def write(results: Results, out: Path) -> list[Path]:
    """results.json, tables.md and, with matplotlib, bench.png and report.html in the folder `out`; returns what was written."""
    out.mkdir(parents=True, exist_ok=True)
    data, text, picture, whole = out / "results.json", out / "tables.md", out / "bench.png", out / "report.html"
    data.write_text(_text(results.json()))
    text.write_text("\n\n".join(f"## {name}\n\n{section}" for name, section in results.sections().items()) + "\n")
    written = [data, text]
    models = results.cells.get("models", [])
    try:
        if models or results.training is not None:
            plot.draw(models, results.training, picture)
            written.append(picture)
        whole.write_text(page.html(json.loads(data.read_text()), results.sections()))
        written.append(whole)
    except ImportError:
        results.notes.append("no pictures: matplotlib is not installed")
    return written


def _text(found: dict[str, Any]) -> str:
    """JSON with a line for every cell, so that two runs can be told apart line by line."""
    parts = []
    for name, value in found.items():
        if isinstance(value, list) and value:
            lines = ",\n".join(f"  {json.dumps(item)}" for item in value)
            parts.append(f'"{name}": [\n{lines}\n ]')
        else:
            parts.append(f'"{name}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def _chosen(options: Options) -> dict[str, list[sweeps.Cell]]:
    """The cells of every suite that has some.

    Raises:
        ValueError: none of them has a workload of a name in `only`.
    """
    suites = [suite for suite in options.suites if suite in SWEEPS]
    whole = {suite: SWEEPS[suite](options.device) for suite in suites}
    known = dict.fromkeys(cell.workload.name for found in whole.values() for cell in found)
    unknown = sorted(set(options.only) - set(known))
    if unknown:
        raise ValueError(f"no workload is named {', '.join(unknown)}; there are {', '.join(known) or 'none in these suites'}")
    if options.only:
        whole = {suite: [c for c in found if c.workload.name in options.only] for suite, found in whole.items()}
    if options.quick:
        whole = {suite: found if suite == "overhead" else _shortest(found) for suite, found in whole.items()}
    return {suite: found for suite, found in whole.items() if found}


def _shortest(found: list[sweeps.Cell]) -> list[sweeps.Cell]:
    """A few cells that take little time."""
    return sorted(found, key=lambda cell: cell.workload.length * cell.workload.head_dim)[:4]


def _prepare(options: Options, chosen: dict[str, list[sweeps.Cell]], results: Results) -> None:
    everything = [cell.workload for found in chosen.values() for cell in found]
    if not everything:
        return
    if options.device == "cuda":
        told = cells.first_call(everything[0], options.device)
        results.notes.append(f"{told}: kernels were compiled, or read from Triton's cache; fastattn.warmup does it ahead")
    results.roof = roof.measure(options.device, {w.dtype for w in everything})


def _cells(options: Options, suite: str, chosen: list[sweeps.Cell], results: Results) -> None:
    rows, limits = results.cells.setdefault(suite, []), options.limits(suite)
    known = {}
    with Progress(f"{suite}: errors and memory", len(chosen)) as bar:
        for cell, found in cells.check(suite, chosen, options.device, limits):
            known[cell] = found
            bar.advance(f"{cell.workload.name} {cell.direction}")
    checked = [(cell, known[cell]) for cell in chosen if cell in known]
    with Progress(suite, len(checked)) as bar:
        for row in cells.run(suite, checked, options.device, limits, results.roof):
            rows.append(row)
            bar.advance(row.name)
    done = {row.name for row in rows}
    left = [name for c in chosen if (name := f"{c.workload.name} {c.direction}") not in done]
    if suite in ("forward", "backward"):  # measured by what they tell, shown by what they are
        rows.sort(key=lambda row: (row.head_dim, row.model, row.length))
    if left:
        more = "" if len(left) <= 6 else f" and {len(left) - 6} more"
        results.notes.append(f"{suite}: {len(left)} of {len(chosen)} left out, the time was up: {', '.join(left[:6])}{more}")
    if not memory.measurable(options.device) and MEMORY_UNKNOWN not in results.notes:
        results.notes.append(MEMORY_UNKNOWN)


MEMORY_UNKNOWN = "peak memory is known on Linux and on CUDA only"


def _training(options: Options, results: Results) -> None:
    steps = 6 if options.quick else training.STEPS
    results.training = training.Training()
    try:
        with Progress("training", steps) as bar:
            for growing in training.run(options.device, steps, results.training):
                bar.advance(f"loss {growing.losses['fastattn'][-1]:.3f}")
    except RuntimeError as reason:
        results.training = None
        results.notes.append(f"training left out: {reason}")


def _targets(options: Options, results: Results) -> None:
    if options.device != "cpu":
        results.notes.append("the targets are the CPU backend's: left out on another device")
        return
    chosen = [t for t in targets.targets() if not options.quick or t.length <= 512]
    with Progress("targets", len(chosen)) as bar:
        for row in targets.run(chosen, 0.5 * options.seconds("targets")):
            results.targets.append(row)
            bar.advance(f"{row.target.name} {row.target.length}")


def _features(options: Options, results: Results) -> None:
    with Progress("memory", 1) as bar:
        try:
            results.features = features.run(options.device)
        except RuntimeError as reason:
            results.notes.append(f"memory left out: {reason}")
        bar.advance("")


def _accuracy(options: Options, results: Results) -> None:
    compiled = options.compiled and not options.quick
    with Progress("accuracy", len(numerics.DATA) * len(numerics.candidates(options.device, compiled))) as bar:
        for row in numerics.run(options.device, 128 if options.quick else numerics.LENGTH, compiled):
            results.accuracy.append(row)
            bar.advance(row.who)


def _hosts(options: Options, results: Results) -> None:
    if options.device != "cpu":
        results.notes.append("hosts are compared on the CPU only: left out on another device")
        return
    chosen = hosts.MODELS[:4] if options.quick else hosts.MODELS
    with Progress("hosts", len(chosen)) as bar:
        for row in hosts.run(chosen, results.notes):
            results.hosts.append(row)
            bar.advance(row.model)
    for row in results.hosts:
        results.notes += [f"{row.model}: {line}" for line in row.left]
    results.environment.update({name: environment.version(hosts.PACKAGES.get(name, name)) for name in hosts.libraries()})


OTHERS: dict[str, Callable[[Options, Results], None]] = {"targets": _targets, "memory": _features, "hosts": _hosts}


def _when(options: Options) -> dict[str, Any]:
    """What else a reader needs to repeat a run."""
    return {
        "command": f"python -m fastattn {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "device": options.device,
        "threads": options.threads,
        "torch threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "clean": _git("status", "--porcelain") == "",
        "machine": platform.machine(),
        **(_card() if options.device == "cuda" else {}),
    }


def _card() -> dict[str, Any]:
    """Driver and clocks, by the driver's own tool."""
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    values = found.stdout.splitlines()[0].split(", ")
    return dict(zip(("driver", "clock", "highest clock", "memory clock", "power limit", "temperature"), values))


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()

"""One run of the benchmark: which parts, for how long, and where the results go."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import environment
from . import SUITES, features, hosts, memory, models, numerics, plot, table, targets, timing, training
from .progress import Progress

DEFAULT = ("models", "training")


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        suites: of SUITES. only: names of workloads, all by default.
        minutes: about how long a suite takes; slow peers and compiling may take it further.
        quick: one round of everything and few training steps: to see that it runs.
        threads: torch's CPU threads while models are timed.
    """

    suites: tuple[str, ...] = DEFAULT
    only: tuple[str, ...] = ()
    minutes: float = 3.0
    quick: bool = False
    compiled: bool = True
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None


@dataclass
class Results:
    """What was measured so far; an interrupted run keeps it."""

    environment: dict[str, Any]
    models: list[models.Row] = field(default_factory=list)
    training: training.Training | None = None
    targets: list[targets.Row] = field(default_factory=list)
    features: list[features.Row] = field(default_factory=list)
    numerics: list[numerics.Row] = field(default_factory=list)
    hosts: list[hosts.Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "models": [row.json() for row in self.models],
            "training": None if self.training is None else self.training.json(),
            "targets": [row.json() for row in self.targets],
            "memory": [row.json() for row in self.features],
            "numerics": [row.json() for row in self.numerics],
            "hosts": [row.json() for row in self.hosts],
            "notes": self.notes,
        }

    def sections(self) -> dict[str, str]:
        """The tables by suite, as Markdown."""
        found = {}
        if self.models:
            parts = [table.models(self.models), MODELS_KEY, table.shapes(self.models), table.reasons(self.models)]
            found["models"] = "\n\n".join(part for part in parts if part)
        if self.training is not None and self.training.losses["torch"]:
            drift = f"The two loss curves differ by at most {self.training.drift:.1e}."
            found["training"] = f"{table.training(self.training)}\n\n{drift}"
        if self.targets:
            found["targets"] = table.targets(self.targets)
        if self.features:
            found["memory"] = table.features(self.features)
        if self.numerics:
            found["numerics"] = table.numerics(self.numerics)
        if self.hosts:
            versions = [f"{name} {self.environment[name]}" for name in hosts.libraries() if self.environment.get(name)]
            found["hosts"] = "\n\n".join([table.hosts(self.hosts), HOSTS_KEY, f"Versions: {', '.join(versions)}."])
        return found


MODELS_KEY = (
    "error, plain's: relative L2 against float64, of the output or of the worst gradient, ours and plain PyTorch's. "
    "ms: our median, with half the interquartile range. Under a peer's name: how many times longer it took; "
    '"same" where the run cannot tell; "-" where it has no number. MB: peak memory beyond the inputs.'
)


HOSTS_KEY = (
    "float32 on the CPU. output: the largest absolute difference of logits (of hidden states, for trained models) from the "
    "host's own attention. gradient: of a random projection of the output by every parameter, the largest difference over that "
    "gradient's largest entry. calls: how many attention calls of one pass fastattn computed. undo: whether taking fastattn "
    "back gives the host's first output again, bit for bit."
)


def run(options: Options) -> Results:
    """Run the suites, showing progress on stderr; Ctrl-C ends the run and keeps what is there.

    Raises:
        ValueError: an unknown suite or workload.
    """
    unknown = sorted(set(options.suites) - set(SUITES))
    if unknown:
        raise ValueError(f"no suite is named {', '.join(unknown)}; there are {', '.join(SUITES)} and all")
    chosen = models.select(list(options.only) or None, options.device)
    results = Results({**environment.describe(), **_when(options)})
    try:
        if options.device == "cuda":
            told = models.first_call(chosen[0], options.device)
            results.notes.append(f"{told}: kernels were compiled, or read from Triton's cache; fastattn.warmup does it ahead")
        with timing.threads(options.threads):
            if "models" in options.suites:
                _models(options, chosen, results)
            if "training" in options.suites:
                _training(options, results)
        if "targets" in options.suites:
            _targets(options, results)
        if "memory" in options.suites:
            _features(options, results)
        if "numerics" in options.suites:
            _numerics(options, results)
        if "hosts" in options.suites:
            _hosts(options, results)
    except KeyboardInterrupt:
        results.notes.append("interrupted: what was measured until then")
    return results


def write(results: Results, out: Path) -> list[Path]:
    """results.json, tables.md and, with matplotlib, bench.png in the folder `out`; returns what was written."""
    out.mkdir(parents=True, exist_ok=True)
    data, text, picture = out / "results.json", out / "tables.md", out / "bench.png"
    data.write_text(json.dumps(results.json(), indent=1) + "\n")
    text.write_text("\n\n".join(f"## {name}\n\n{section}" for name, section in results.sections().items()) + "\n")
    written = [data, text]
    if results.models or results.training is not None:
        try:
            plot.draw(results.models, results.training, picture)
            written.append(picture)
        except ImportError:
            results.notes.append("no picture: matplotlib is not installed")
    return written


def _models(options: Options, chosen: list[models.Workload], results: Results) -> None:
    share = 0.0 if options.quick else 60 * options.minutes * 0.35
    with Progress("models", 2 * len(chosen)) as bar:
        for row in models.run(chosen, options.device, share, options.compiled and not options.quick):
            results.models.append(row)
            bar.advance(f"{row.workload} {row.direction}")
    with Progress("peak memory", 1) as bar:
        models.measure_memory(results.models, options.device)
        bar.advance("")
    if not memory.measurable(options.device):
        results.notes.append("peak memory is known on Linux and on CUDA only")


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
        for row in targets.run(chosen, 0.0 if options.quick else 60 * options.minutes):
            results.targets.append(row)
            bar.advance(f"{row.target.name} {row.target.length}")


def _features(options: Options, results: Results) -> None:
    with Progress("memory", 1) as bar:
        try:
            results.features = features.run(options.device)
        except RuntimeError as reason:
            results.notes.append(f"memory left out: {reason}")
        bar.advance("")


def _numerics(options: Options, results: Results) -> None:
    with Progress("numerics", len(numerics.DATA) * len(numerics.candidates(options.device))) as bar:
        for row in numerics.run(options.device, 128 if options.quick else numerics.LENGTH):
            results.numerics.append(row)
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
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()

"""Everything that the owner of a GPU can do to judge fastattn and to help it, in one command.

A plan of steps, each a process of its own with a share of the time: the kernels' tests, a sample of them under the sanitizer,
the benchmark against every peer at hand, and tuning. What is absent is skipped with its reason. At most eight files are left:
logs, the benchmark's results, the card's table of launches, and summary.md, which says per claim whether it held. It is
written anew after every step, so that whatever ends the check leaves what is known until then.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .. import environment
from ..kernels import shim
from . import claims
from .claims import Evidence
from .gpu_summary import Outcome, summary

ROOT = Path(__file__).resolve().parents[2]
FIRST = ("sanitized/kernels", "interpreted/tutorial", "interpreted/features", "interpreted/tangents", "interpreted/invariance")
ON_GPU = (  # in files whose other tests need none
    "test_hopper_forward.py::test_on_the_gpu", "test_hopper_backward.py::test_on_the_gpu",
    "test_torch_flash.py::test_under_scaled_dot_product_attention",
)  # fmt: skip
OUTCOMES = "tests.jsonl"  # a line per test, by tests/conftest.py
SAMPLE = "causal or sinks_window or dense_documents or everything"
BENCH = ("results.json", "report.html", "tables.md", "bench.png")
FILES = "files: summary.md, a log per step, bench/results.json, bench/report.html, and the table of tuned launches"
GRACE = 45.0  # seconds to write results in, after a step was told that its time is up: pytest-xdist waits for its workers


class Machine(NamedTuple):
    """What is at hand."""

    gpu: str | None
    triton: bool
    tests: bool  # a checkout with its tests, and pytest
    xdist: bool
    sanitizer: str | None  # the path of compute-sanitizer
    cores: int


class Step(NamedTuple):
    """A part of the check."""

    name: str
    what: str
    command: list[str]
    share: float  # of the time
    absent: str | None  # why it cannot run here
    environment: dict[str, str]


def machine() -> Machine:
    """This one."""
    has = lambda name: importlib.util.find_spec(name) is not None
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{cuda}/bin")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    tests = has("pytest") and all((ROOT / "tests" / f"{name}.py").exists() for name in FIRST)
    return Machine(gpu, shim.PRESENT, tests, has("xdist"), sanitizer, os.cpu_count() or 1)


def suites() -> list[str]:
    """What pytest is told to run, as paths below the root: the kernels' suites, those that tell most by the minute first, and
    single tests that need a GPU."""
    found = sorted(f"interpreted/{path.stem}" for path in (ROOT / "tests" / "interpreted").glob("*.py"))
    return [*(f"tests/{name}.py" for name in dict.fromkeys((*FIRST, *found))), *(f"tests/{name}" for name in ON_GPU)]


def plan(here: Machine, minutes: float, out: Path, scratch: Path) -> list[Step]:
    """The steps, in order.

    Args:
        minutes: of all steps. out: where files stay. scratch: where they do not.
    """
    me = [sys.executable, "-m", "fastattn"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = suites()
    workers = min(here.cores, 16)
    parallel = ["-n", str(workers), "--dist", "worksteal"] if here.xdist and workers > 1 else []
    no_tests = None if here.tests else "needs a checkout with its tests, and pytest"
    no_sanitizer = None if here.sanitizer else "no compute-sanitizer on the PATH; it comes with the CUDA toolkit"
    compiled = {"TRITON_INTERPRET": "0"}
    return [
        Step("tests", "the kernels' suites on this GPU, against float64",
             [*pytest, *parallel, *files], 0.45, no_tests, {**compiled, "OUTCOMES": str(scratch / OUTCOMES)}),
        Step("sanitizer", "some of them with every memory access checked",
             [here.sanitizer or "compute-sanitizer", "--tool", "memcheck", *pytest, files[0], "-k", SAMPLE], 0.1,
             no_tests or no_sanitizer,
             {**compiled, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Step("bench", "errors, times and memory beside every peer that is installed",
             [*me, "bench", "all", "--device", "cuda", "--minutes", f"{0.27 * minutes:.2f}", "--out", str(out / "bench")], 0.3,
             None, compiled),
        Step("tune", "launch configurations that this card prefers",
             [*me, "tune", "--minutes", f"{0.14 * minutes:.2f}", "--dtype", "bfloat16", "--head-dim", "64", "--head-dim", "128",
              "--out", str(out)], 0.15, None, compiled),
    ]  # fmt: skip


def describe(here: Machine, steps: list[Step], minutes: float) -> str:
    """The plan in words."""
    lines = [f"on {here.gpu or 'no GPU: nothing would run'}, about {minutes:g} minutes"]
    for step in steps:
        lines += ["", f"{step.name}: {step.what}"]
        lines.append(f"    skipped: {step.absent}" if step.absent else f"    {60 * minutes * step.share:.0f} s: {_shown(step)}")
    return "\n".join([*lines, "", f"then summary.md: a verdict for each of {len(claims.CLAIMS)} claims", FILES])


def _shown(step: Step) -> str:
    return shlex.join(["python" if part == sys.executable else part for part in step.command])


def check(minutes: float, out: Path, say: Callable[[str], None] = print) -> int:
    """Run the plan and write the summary; returns 1 where a claim failed, else 0.

    Args:
        minutes: until the last step is told to end, from now on; then it has `GRACE` seconds.

    Raises:
        ValueError: there is no GPU, or Triton is missing.
    """
    here = machine()
    missing = [name for name, there in (("a CUDA device", here.gpu), ("triton", here.triton)) if not there]
    if missing:
        raise ValueError(f"gpu-check needs {' and '.join(missing)}, not found here; --dry-run prints what it would do")
    until = time.monotonic() + 60 * minutes
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        steps = plan(here, minutes, out, Path(folder))
        _clear(steps, out)
        names = collected(steps[0]) if steps[0].absent is None else []
        page, found = "", Evidence(names)
        for outcomes in _run_all(steps, until, out, say):
            found = evidence(names, Path(folder) / OUTCOMES, out)
            page = summary(environment.describe(), outcomes, found, out)
            (out / "summary.md").write_text(page)
    say(f"\n{page}")
    return int(any(verdict.verdict == claims.FAIL for _, verdict in claims.judge(found)))


def evidence(names: list[str], tests: Path, out: Path) -> Evidence:
    """What the steps have left until now: outcomes of tests in a file, and what stands in `out`."""
    log = out / "sanitizer.log"
    outcomes, reasons = outcomes_of(tests)
    return Evidence(names, outcomes, _bench(out / "bench"), log.read_text(errors="replace") if log.exists() else None, reasons)


def _clear(steps: list[Step], out: Path) -> None:
    """Take away what an earlier check left: it would be judged again."""
    for step in steps:
        (out / f"{step.name}.log").unlink(missing_ok=True)
    for name in BENCH:
        (out / "bench" / name).unlink(missing_ok=True)
    (out / "summary.md").unlink(missing_ok=True)


def _run_all(steps: list[Step], until: float, out: Path, say: Callable[[str], None]) -> Iterator[list[Outcome]]:
    """Run the steps, each with its share of the time that is left, and tell after each what became of all so far. Ctrl-C ends
    the check and keeps what is there.

    Args:
        until: of time.monotonic.
    """
    outcomes: list[Outcome] = []
    left = sum(step.share for step in steps if not step.absent)
    for step in steps:
        if step.absent:
            outcomes.append(Outcome(step.name, f"skipped: {step.absent}", 0.0))
            yield outcomes
            continue
        limit = (until - time.monotonic()) * step.share / left
        left -= step.share
        say(f"{step.name}: {step.what} (up to {limit:.0f} s)")
        try:
            outcomes.append(run(step, limit, out / f"{step.name}.log"))
        except KeyboardInterrupt:
            outcomes.append(Outcome(step.name, "interrupted", 0.0))
            yield outcomes
            return
        say(f"    {outcomes[-1].result}, {outcomes[-1].seconds:.0f} s")
        yield outcomes


def collected(step: Step) -> list[str]:
    """The names of the tests that a step would run."""
    command = [part for part in step.command if part.startswith(("tests/", sys.executable, "-m", "pytest"))]
    done = subprocess.run([*command, "--collect-only", "-q"], capture_output=True, text=True, cwd=ROOT, env=_surroundings(step),
                          check=False)  # fmt: skip
    return [line for line in done.stdout.splitlines() if "::" in line]


def run(step: Step, limit: float, log: Path) -> Outcome:
    """Run a step's command for at most `limit` seconds; then it is interrupted, which all of them answer by writing results."""
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(step.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=_surroundings(step),
                                   start_new_session=True, preexec_fn=_listening)  # fmt: skip
        try:
            code = process.wait(max(limit, 1.0))
            result = "done" if code == 0 else f"ended with status {code}: {log.name}"
        except subprocess.TimeoutExpired:
            result = "the time was up: " + _ended(process)
        except KeyboardInterrupt:
            _ended(process)
            raise
    return Outcome(step.name, result, time.monotonic() - start)


def _listening() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would what they start: nothing could tell it that its time is up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ended(process: subprocess.Popen[bytes]) -> str:
    """Ask a process to stop; where it does not, end it and what it started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
        return "it wrote what it had"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "it had to be killed"


def _surroundings(step: Step) -> dict[str, str]:
    """The variables of a step: this package in front of any that is installed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **step.environment}


def outcomes_of(report: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(outcomes, reasons of what failed) by test, from the lines that tests/conftest.py writes; none where it wrote none.

    A test has a line for its set-up, one for itself and one for what comes after; what is worst counts.
    """
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for line in report.read_text().splitlines() if report.exists() else ():
        if not line.endswith("}"):  # cut off
            continue
        found = json.loads(line)
        name, outcome = found["test"], found["outcome"]
        if outcome == "failed":
            reasons.setdefault(name, found["reason"])
        worst = ("passed", "skipped", "failed")
        outcomes[name] = max(outcomes.get(name, "passed"), outcome, key=worst.index)
    return outcomes, reasons


def _bench(folder: Path) -> dict | None:
    """results.json of the benchmark. Its tables stay in report.html; where there is none, as tables.md."""
    spare = ["bench.png", "tables.md"] if (folder / "report.html").exists() else ["bench.png"]
    for name in spare:
        (folder / name).unlink(missing_ok=True)
    results = folder / "results.json"
    return json.loads(results.read_text()) if results.exists() else None

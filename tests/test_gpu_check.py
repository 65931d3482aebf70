"""gpu-check: its plan, how it runs and ends steps, and its verdicts, with planted results: there is no GPU here."""

import json
import math
import os
import signal
import sys
import time

import pytest
import torch
from processes import TESTS, python
from test_triton import needs_triton

from fastattn import cli
from fastattn.bench import cells, features, numerics, timing
from fastattn.devtools import claims, gpu_check, gpu_summary
from fastattn.devtools.claims import FAIL, PASS, UNKNOWN, Evidence
from fastattn.devtools.gpu_check import Machine, Step

HERE = Machine("NVIDIA X", True, True, True, "/opt/bin/compute-sanitizer", 16)


def decide(text, found):
    (claim,) = [claim for claim in claims.CLAIMS if text in claim.text]
    return claim.decide(found)


# The plan


def test_the_plan(tmp_path):
    steps = {step.name: step for step in gpu_check.plan(HERE, 9.0, tmp_path, tmp_path / "scratch")}
    assert list(steps) == ["tests", "sanitizer", "bench", "tune"]
    assert sum(step.share for step in steps.values()) == pytest.approx(1.0)
    assert not any(step.absent for step in steps.values())
    assert steps["tests"].command[steps["tests"].command.index("-n") + 1] == "16"
    assert steps["tests"].environment["OUTCOMES"] == str(tmp_path / "scratch" / "tests.jsonl")
    assert steps["tests"].environment["TRITON_INTERPRET"] == "0"
    assert steps["sanitizer"].command[0] == "/opt/bin/compute-sanitizer"
    assert steps["bench"].command[-6:] == ["--device", "cuda", "--minutes", "2.43", "--out", str(tmp_path / "bench")]
    assert {f"interpreted/{path.name}" for path in (gpu_check.ROOT / "tests" / "interpreted").glob("*.py")} <= {
        part.removeprefix("tests/") for part in steps["tests"].command
    }
    assert all((gpu_check.ROOT / name.partition("::")[0]).exists() for name in gpu_check.suites())


def test_every_test_that_needs_a_gpu_is_in_the_plan():
    """But for those that run suites of the plan in processes of their own."""
    files = {path.name for path in TESTS.glob("*.py") if "@pytest.mark.gpu" in path.read_text()}
    planned = {name.removeprefix("tests/").partition("::")[0] for name in gpu_check.suites()}
    assert files - planned == {"test_gpu_check.py", "test_overlays.py", "test_triton.py"}


def test_what_is_absent_is_skipped_with_its_reason(tmp_path):
    steps = gpu_check.plan(HERE._replace(sanitizer=None, xdist=False), 9.0, tmp_path, tmp_path)
    assert [step.absent is None for step in steps] == [True, False, True, True]
    assert "compute-sanitizer" in steps[1].absent
    assert "-n" not in steps[0].command
    steps = gpu_check.plan(HERE._replace(tests=False), 9.0, tmp_path, tmp_path)
    assert [step.name for step in steps if step.absent] == ["tests", "sanitizer"]
    assert "needs a checkout" in steps[0].absent


def test_the_dry_run_prints_the_plan(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check, "machine", lambda: HERE._replace(gpu=None, sanitizer=None))
    assert cli.main(["gpu-check", "--dry-run", "--minutes", "4", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for part in ("no GPU: nothing would run", "tests:", "108 s: python -m pytest", "skipped: no compute-sanitizer", "bench all",
                 "--minutes 1.08", "tune", f"a verdict for each of {len(claims.CLAIMS)} claims"):  # fmt: skip
        assert part in out, part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("missing", "words"), [({"gpu": None}, "a CUDA device"), ({"triton": False}, "triton")])
def test_without_a_gpu_nothing_runs(missing, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check, "machine", lambda: HERE._replace(**missing))
    monkeypatch.setattr(gpu_check.subprocess, "Popen", None)
    assert cli.main(["gpu-check", "--out", str(tmp_path / "out")]) == 2
    assert f"gpu-check needs {words}, not found here; --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Running steps


def step(code, name="bench", share=0.5, environment=()):
    return Step(name, "something", [sys.executable, "-c", code], share, None, dict(environment))


def test_a_step_is_told_when_its_time_is_up(tmp_path):
    code = "import time\nprint('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    found = gpu_check.run(step(code), 1.0, tmp_path / "x.log")
    assert found.result == "the time was up: it wrote what it had"
    assert (tmp_path / "x.log").read_text() == "begun\nkept\n"


def test_a_step_listens_where_this_process_does_not(tmp_path):
    """A job in a shell's background ignores Ctrl-C, and what it starts inherits that."""
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert gpu_check.run(step(code), 1.0, tmp_path / "x.log").result == "the time was up: it wrote what it had"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_step_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.2)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    assert "had to be killed" in gpu_check.run(step(code), 1.0, tmp_path / "x.log").result


def test_a_step_that_fails_names_its_log(tmp_path):
    found = gpu_check.run(step("raise SystemExit(3)"), 9.0, tmp_path / "x.log")
    assert found.result == "ended with status 3: x.log"


def test_time_that_a_step_leaves_is_the_next_ones(tmp_path, monkeypatch):
    limits = []
    quick = lambda step, limit, log: limits.append(limit) or gpu_summary.Outcome(step.name, "done", 0.0)
    monkeypatch.setattr(gpu_check, "run", quick)
    steps = [step("", "a", 0.75), step("", "b", 0.1)._replace(absent="no b"), step("", "c", 0.25)]
    *_, found = gpu_check._run_all(steps, time.monotonic() + 600.0, tmp_path, lambda line: None)
    assert limits == pytest.approx([450.0, 600.0], abs=5.0)
    assert [x.result for x in found] == ["done", "skipped: no b", "done"]


def test_ctrl_c_ends_the_check_and_keeps_what_is_there(tmp_path, monkeypatch):
    def run(step, limit, log):
        if step.name == "b":
            raise KeyboardInterrupt
        return gpu_summary.Outcome(step.name, "done", 1.0)

    monkeypatch.setattr(gpu_check, "run", run)
    *_, found = gpu_check._run_all([step("", name, 0.3) for name in "abc"], time.monotonic() + 60, tmp_path, lambda line: None)
    assert [(x.name, x.result) for x in found] == [("a", "done"), ("b", "interrupted")]


@needs_triton
def test_tests_are_known_by_one_name_and_every_claim_has_some(tmp_path):
    """pytest's own collection and its report, on the real suites: each claim that tests decide finds tests of its own."""
    plan = gpu_check.plan(HERE._replace(xdist=False), 9.0, tmp_path, tmp_path)
    names = gpu_check.collected(plan[0])
    everything = Evidence(names, dict.fromkeys(names, "passed"))
    by_tests = [claim for claim in claims.CLAIMS if claim.decide.__qualname__.startswith("by_tests")]
    assert len(by_tests) >= 8
    assert [claim.text for claim in by_tests if claim.decide(everything).verdict != PASS] == []
    features = [part for part in plan[0].command if not part.startswith("tests/") or "features" in part]
    assert gpu_check.run(plan[0]._replace(command=[*features, "-k", "stripes_is"]), 60.0, tmp_path / "x.log").result == "done"
    [(name, outcome)] = gpu_check.outcomes_of(tmp_path / "tests.jsonl")[0].items()
    assert name in names
    assert outcome == "passed"


FAILS = """
import os, pytest

@pytest.fixture
def broken():
    raise OSError("no such thing")

def test_right(): pass

def test_wrong():
    assert 1 == 2, "what this test says\\nand more"

def test_without(broken): pass

def test_after(request):
    request.addfinalizer(lambda: 1 / 0)

@pytest.mark.skip
def test_not(): pass

def test_that_ends_its_process(): os._exit(3)

def test_that_ends_all(): os.killpg(0, 9)
"""


@pytest.mark.parametrize("parallel", [(), ("-n", "1")])
def test_outcomes_are_kept_whatever_ends_the_tests(parallel, tmp_path, monkeypatch):
    (tmp_path / "test_fails.py").write_text(FAILS)
    options = ["-q", *parallel, "-p", "conftest", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tmp_path}"]
    options += [] if parallel else ["--deselect", "test_fails.py::test_that_ends_its_process"]
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    run = Step("tests", "", command, 1.0, None, {"OUTCOMES": str(tmp_path / "x.jsonl")})
    assert "ended with status -9" in gpu_check.run(run, 120.0, tmp_path / "x.log").result
    outcomes, reasons = gpu_check.outcomes_of(tmp_path / "x.jsonl")
    assert {name.partition("::")[2]: outcome for name, outcome in outcomes.items()} == {
        "test_right": "passed", "test_wrong": "failed", "test_without": "failed", "test_after": "failed", "test_not": "skipped",
        **({"test_that_ends_its_process": "failed"} if parallel else {}),
    }  # fmt: skip
    assert reasons["test_fails.py::test_wrong"] == "AssertionError: what this test says"
    assert reasons["test_fails.py::test_without"] == "OSError: no such thing"
    assert reasons["test_fails.py::test_after"] == "ZeroDivisionError: division by zero"
    assert not parallel or "crashed while running" in reasons["test_fails.py::test_that_ends_its_process"]


def test_a_line_that_was_cut_off_is_none(tmp_path):
    (tmp_path / "x").write_text('{"test": "a", "outcome": "passed"}\n{"test": "b", "outc')
    assert gpu_check.outcomes_of(tmp_path / "x") == ({"a": "passed"}, {})
    assert gpu_check.outcomes_of(tmp_path / "y") == ({}, {})


BENCH = """
import pathlib
out = pathlib.Path({out!r})
out.mkdir()
for name in ("results.json", "report.html", "tables.md", "bench.png"):
    (out / name).write_text('{{"models": [], "memory": [{{"feature": "backward", "fastattn": 5, "torch": null}}]}}')
"""


def test_the_whole_check_leaves_eight_files_and_a_verdict(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    name = "test_repeats_bit_for_bit[x]"

    def plan(here, minutes, folder, scratch):
        (scratch / "tests.jsonl").write_text(json.dumps({"test": f"tests/interpreted/features.py::{name}", **outcome}) + "\n")
        return [
            step("print('1 passed')", "tests"),
            step("print('3 passed'); print('= ERROR SUMMARY: 0 errors')", "sanitizer"),
            step(BENCH.format(out=str(folder / "bench")), "bench"),
            step(f"import pathlib; pathlib.Path({str(folder / 'sm_90.json')!r}).write_text('x'); "
                 "print('forward  d 64  16 bit  [128, 64, 4, 3] -> [128, 64, 8, 3]  90 us, 1.10x (7 tried)')", "tune"),
        ]  # fmt: skip

    monkeypatch.setattr(gpu_check, "machine", lambda: HERE)
    monkeypatch.setattr(gpu_check, "plan", plan)
    monkeypatch.setattr(gpu_check, "collected", lambda step: [f"tests/interpreted/features.py::{name}"])
    outcome = {"outcome": "passed"}
    assert cli.main(["gpu-check", "--out", str(out), "--minutes", "0.5"]) == 0
    files = {str(x.relative_to(out)) for x in out.rglob("*") if x.is_file()}
    assert files == {"summary.md", "tests.log", "sanitizer.log", "bench.log", "tune.log", "sm_90.json", "bench/results.json",
                     "bench/report.html"}  # fmt: skip
    page = (out / "summary.md").read_text()
    assert "Claims: 3 pass, 0 fail, " in page
    assert "| equal inputs give equal bits | README, Exactness | pass | 1 tests |" in page
    assert "[128, 64, 4, 3] -> [128, 64, 8, 3]" in page
    assert page in capsys.readouterr().out
    outcome = {"outcome": "failed", "reason": "AssertionError: 3 of 5 bits"}
    (out / "bench" / "results.json").unlink()
    (out / "bench").rename(tmp_path / "old")
    assert cli.main(["gpu-check", "--out", str(out), "--minutes", "0.5"]) == 1
    assert f"- 1: `AssertionError: 3 of 5 bits` in tests/interpreted/features.py::{name}" in (out / "summary.md").read_text()


def test_what_is_known_is_written_after_every_step(tmp_path, monkeypatch):
    seen = []

    def run(step, limit, log):
        page = tmp_path / "summary.md"
        seen.append(page.read_text() if page.exists() else None)
        return gpu_summary.Outcome(step.name, "done", 1.0)

    monkeypatch.setattr(gpu_check, "machine", lambda: HERE)
    monkeypatch.setattr(gpu_check, "plan", lambda *args: [step("", "tests"), step("", "bench")])
    monkeypatch.setattr(gpu_check, "collected", lambda step: [])
    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.check(1.0, tmp_path, lambda line: None) == 0
    assert seen[0] is None
    assert "| tests | done | 1 |" in seen[1]
    assert "| bench | done" not in seen[1]
    assert "| bench | done | 1 |" in (tmp_path / "summary.md").read_text()


def test_failures_are_told_by_kind():
    reasons = {"a": "AssertionError: off by 1.5e-3", "b": "OSError: no", "c": "AssertionError: off by 2"}
    found = Evidence(tests=dict.fromkeys([*reasons, "d"], "failed"), reasons=reasons)
    assert gpu_summary.failures(found) == [
        "2: `AssertionError: off by 1.5e-3` in a, c", "1: `OSError: no` in b", "1: `no reason was given` in d",
    ]  # fmt: skip


def test_results_of_an_earlier_check_are_not_judged_again(tmp_path):
    for name in ("tests.log", "summary.md", "bench/results.json", "mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    gpu_check._clear([step("", "tests")], tmp_path)
    assert [x.name for x in tmp_path.rglob("*") if x.is_file()] == ["mine.txt"]


# Verdicts


def cell(workload="gpt2", direction="forward", error=1e-3, plain=1e-3, ratio=None, dtype="bfloat16", **reasons):
    """A cell as the benchmark writes it; `ratio`: how many times longer sdpa took."""
    row = cells.Row("models", workload, "", f"B1 H2 L64 D64 {dtype} causal", direction, 64, 64, error, plain, reasons=reasons)
    times = lambda seconds: timing.Times((seconds,) * 9, (seconds,) * 9)
    if ratio is not None:
        row.times = {"fastattn": times(1.0), "sdpa": times(ratio)}
    return row.json()


def bench(*rows, **more):
    return Evidence(bench={"environment": {}, "models": list(rows), "notes": [], "training": None, **more})


NAMES = [f"tests/interpreted/invariance.py::test_{c}" for c in "abc"]


@pytest.mark.parametrize(
    ("outcomes", "verdict", "words"),
    [
        (["passed", "passed", "passed"], PASS, "3 tests"),
        (["passed", "failed", "passed"], FAIL, "1 of 3 tests failed: tests/interpreted/invariance.py::test_b"),
        (["passed", "passed"], UNKNOWN, "2 of 3 tests ran, all passed"),
        (["passed", "skipped", "passed"], UNKNOWN, "2 of 3"),
        (["passed", "failed"], FAIL, "1 of 2"),
        ([], UNKNOWN, "no test of it ran"),
    ],
)
def test_a_claim_of_tests(outcomes, verdict, words):
    found = decide("batch_invariant", Evidence(NAMES, dict(zip(NAMES, outcomes))))
    assert found.verdict == verdict
    assert words in found.evidence


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (cell(error=2 * 4e-3 + 7e-3, plain=4e-3), PASS),
        (cell(error=2 * 4e-3 + 9e-3, plain=4e-3), FAIL),
        (cell(error=3 * 4e-3 + 7e-3, plain=4e-3, direction="forward+backward"), PASS),
        (cell(error=3e-6, plain=1e-6, dtype="float32"), FAIL),
        (cell(error=math.nan, fastattn="RuntimeError: no"), FAIL),
        (cell(error=1.0, direction="forward mode"), UNKNOWN),
    ],
)
def test_the_claim_of_exact_cells(row, verdict):
    found = decide("models' shapes", bench(row))
    assert found.verdict == verdict
    if "fastattn" in row["reasons"]:
        assert "RuntimeError: no" in found.evidence


def test_cells_that_the_time_did_not_reach_are_told():
    found = bench(cell())
    found.bench["notes"] = ["masks: 5 of 12 left out, the time was up: x", "forward: 30 of 36 left out, the time was up: y"]
    assert decide("models' shapes", found) == (PASS, "1 cells, 35 left out")
    found.bench["notes"] = ["interrupted: what was measured until then"]
    assert decide("models' shapes", found) == (PASS, "1 cells, interrupted")


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([cell("packed", ratio=7.5), cell("long-window", ratio=3.0), cell("gpt2", ratio=0.9)], PASS),
        ([cell("packed", ratio=7.5), cell("long-window", ratio=1.5)], FAIL),
        ([cell("packed"), cell("gpt2", ratio=9.0)], UNKNOWN),
    ],
)
def test_the_claim_of_empty_tiles(rows, verdict):
    found = decide("leaves empty", bench(*rows))
    assert found.verdict == verdict
    if verdict != UNKNOWN:
        assert "packed forward 7.5x" in found.evidence


@pytest.mark.parametrize(("off", "verdict"), [(4.9e-3, PASS), (5.1e-3, FAIL), (None, UNKNOWN)])
def test_the_claim_of_keys_with_a_mean(off, verdict):
    row = lambda data, who, dq: numerics.Row(data, who, {"dq": dq, "dk": 1.0, "dv": 1.0}).json()
    rows = [row("no mean", "fastattn triton", 2.5e-3), row("mean 3", "sdpa", 1e-1)]
    rows += [] if off is None else [row("mean 3", "fastattn triton", off), row("mean 1", "fastattn triton", 2.5e-3)]
    found = decide("have a mean", bench(accuracy=rows))
    assert found.verdict == verdict
    assert off is None or "with mean 3" in found.evidence


@pytest.mark.parametrize(("peak", "verdict"), [(60e6, PASS), (135e6, FAIL), (None, UNKNOWN)])
def test_the_claim_of_memory(peak, verdict):
    rows = [features.Row(name, {"fastattn": n, "torch": 9}).json() for name, n in (("backward", peak), ("dropout", None))]
    assert decide("L x L", bench(memory=rows)).verdict == verdict
    assert features.HEADS * features.LENGTH**2 * torch.float32.itemsize == claims.SCORES


@pytest.mark.parametrize(
    ("log", "verdict"),
    [
        ("12 passed in 9 s\n========= ERROR SUMMARY: 0 errors\n", PASS),
        ("12 passed in 9 s\n========= ERROR SUMMARY: 3 errors\n", FAIL),
        ("========= ERROR SUMMARY: 0 errors\n", UNKNOWN),
        ("12 passed", UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_the_claim_of_the_sanitizer(log, verdict):
    assert decide("out of bounds", Evidence(sanitizer=log)).verdict == verdict


def test_nothing_measured_is_no_pass():
    assert {verdict.verdict for _, verdict in claims.judge(Evidence())} == {UNKNOWN}


def test_speed_is_told_by_suite_and_not_judged():
    found = bench(cell(ratio=2.0), cell("packed", ratio=0.5), cell("t5", ratio=3.0), cell("x"))
    assert gpu_summary.speed(found) == ["models: 2.00x over 3 cells, 0.50x (sdpa) to 3.00x (sdpa)"]


LOSES = """
import pytest, torch

@pytest.mark.parametrize("i", range(3))
def test_it(i, state=[]):
    def synchronize():
        if state:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
    if i == 1:
        state.append(i)
    assert not state, "what this test says"
"""


def test_a_test_that_loses_the_gpu_is_named_and_takes_no_other_with_it(tmp_path):
    (tmp_path / "test_loses.py").write_text(LOSES)
    options = ("-q", "-n", "1", "-p", "conftest", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tmp_path}")
    done = python("-m", "pytest", *options, str(tmp_path), path=[TESTS], OUTCOMES=str(tmp_path / "x.jsonl"))
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    name, (outcomes, reasons) = "test_loses.py::test_it", gpu_check.outcomes_of(tmp_path / "x.jsonl")
    assert outcomes == {f"{name}[0]": "passed", f"{name}[1]": "failed", f"{name}[2]": "passed"}
    assert reasons[f"{name}[1]"].startswith("AssertionError: what this test says")
    assert "crashed while running 'test_loses.py::test_it[1]'" in done.stdout
    assert "what this test says" in done.stderr
    assert "test_it[1] lost the GPU: CUDA error: an illegal memory access" in done.stderr

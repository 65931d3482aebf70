"""What the README and docs/ promise of a GPU, and whether a machine's tests and benchmark bear it out.

A claim of tests passes where all of them ran and passed, fails where one failed, and is not measured otherwise: a test that the
time did not reach is no pass. A claim of the benchmark is judged by the cells that it has, and says how many there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PASS, FAIL, UNKNOWN = "pass", "fail", "not measured"
UNIT = {"float32": 2.0**-20, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # docs/numerics.md: one rounding unit
SKIPS = 2.0  # "several times faster than a dense mask" is at least this
SCORES = 2 * 4096**2 * 4  # bytes of the score matrix in float32 of the calls of `bench memory`


@dataclass
class Evidence:
    """What a run left.

    Attributes:
        collected: names of all tests, "tests/interpreted/features.py::test_x[y]"; tests: outcome of those that ran.
        bench: results.json, or None. sanitizer: its log, or None. reasons: of the tests that failed.
    """

    collected: list[str] = field(default_factory=list)
    tests: dict[str, str] = field(default_factory=dict)
    bench: dict[str, Any] | None = None
    sanitizer: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)


class Verdict(NamedTuple):
    """One claim's."""

    verdict: str
    evidence: str


class Claim(NamedTuple):
    """A promise, where it stands, and how it is decided."""

    text: str
    page: str
    decide: Callable[[Evidence], Verdict]


def by_tests(*patterns: str) -> Callable[[Evidence], Verdict]:
    """A claim that tests decide: those whose names match any of the patterns."""

    def decide(found: Evidence) -> Verdict:
        matches = lambda name: any(re.search(pattern, name) for pattern in patterns)
        ran = {name: outcome for name, outcome in found.tests.items() if matches(name)}
        failed = [name for name, outcome in ran.items() if outcome == "failed"]
        if failed:
            return Verdict(FAIL, f"{len(failed)} of {len(ran)} tests failed: {', '.join(failed[:3])}")
        wanted = {*filter(matches, found.collected), *ran}
        passed = sum(outcome == "passed" for outcome in ran.values())
        if not wanted or passed < len(wanted):
            return Verdict(UNKNOWN, f"{passed} of {len(wanted)} tests ran, all passed" if passed else "no test of it ran")
        return Verdict(PASS, f"{passed} tests")

    return decide


def cells(found: Evidence) -> Iterator[dict[str, Any]]:
    """The cells of every suite of the benchmark."""
    for rows in (found.bench or {}).values():
        if isinstance(rows, list):
            yield from (row for row in rows if isinstance(row, dict) and "plain_error" in row)


def errors(found: Evidence) -> Verdict:
    """Every cell's error against plain PyTorch's."""
    beyond, judged = [], 0
    for row in cells(found):
        unit = next((u for name, u in UNIT.items() if name in row["shape"].split()), None)
        if unit is None or row["direction"] in ("forward mode", "double backward"):
            continue
        judged += 1
        factor = 2 if row["direction"] == "forward" else 3
        if not row["error"] <= factor * row["plain_error"] + unit:  # NaN, where ours gave nothing, is beyond as well
            why = row["reasons"].get("fastattn") or f"{row['error']:.1e}, plain PyTorch {row['plain_error']:.1e}"
            beyond.append(f"{row['workload']} {row['direction']} ({why})")
    if beyond:
        return Verdict(FAIL, f"{len(beyond)} of {judged} cells: {'; '.join(beyond[:3])}")
    if not judged:
        return Verdict(UNKNOWN, "no cell was measured")
    notes = (found.bench or {}).get("notes", [])
    left = sum(int(n) for note in notes for n in re.findall(r"(\d+) of \d+ left out", note))
    cut = ", interrupted" if any(note.startswith("interrupted") for note in notes) else ""
    return Verdict(PASS, f"{judged} cells" + (f", {left} left out" if left else "") + cut)


def skipping(found: Evidence) -> Verdict:
    """Windows and documents beside torch's function with the same mask as a bool tensor."""
    ratios = {}
    for row in cells(found):
        if row["workload"] in ("packed", "long-window", "window", "documents"):
            ratio = row["peers"].get("sdpa", {}).get("ratio")
            if ratio is not None:
                ratios[f"{row['workload']} {row['direction']}"] = ratio
    if not ratios:
        return Verdict(UNKNOWN, "no window or document was timed beside sdpa")
    told = ", ".join(f"{name} {ratio[0]:.1f}x" for name, ratio in ratios.items())
    return Verdict(PASS if all(ratio[1] >= SKIPS for ratio in ratios.values()) else FAIL, f"sdpa's time by ours: {told}")


def means(found: Evidence) -> Verdict:
    """dq in bfloat16 of data with a mean, against that of data without."""
    rows = [row for row in (found.bench or {}).get("accuracy", []) if row["who"] == "fastattn triton"]
    plain = next((row["dq"] for row in rows if row["data"] == "no mean"), math.nan)
    others = {row["data"]: row["dq"] for row in rows if row["data"] != "no mean"}
    if not others or math.isnan(plain):
        return Verdict(UNKNOWN, "bench accuracy has no row of the kernels")
    worst = max(others, key=lambda name: others[name])
    told = f"dq is off by {plain:.1e} without a mean, by {others[worst]:.1e} with {worst}"
    return Verdict(PASS if others[worst] <= 2 * plain else FAIL, told)


def memory(found: Evidence) -> Verdict:
    """Peak memory at length 4096 against a score matrix."""
    peaks = {row["feature"]: row["fastattn"] for row in (found.bench or {}).get("memory", []) if row["fastattn"] is not None}
    if not peaks:
        return Verdict(UNKNOWN, "bench memory has no figures")
    told = ", ".join(f"{name} {n / 1e6:.0f} MB" for name, n in peaks.items())
    return Verdict(PASS if max(peaks.values()) < SCORES else FAIL, f"a score matrix takes {SCORES / 1e6:.0f} MB; {told}")


def sanitizer(found: Evidence) -> Verdict:
    """The sanitizer's count of errors."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error", found.sanitizer or "")
    if not counts:
        return Verdict(UNKNOWN, "the sanitizer did not run to its end")
    passed = re.search(r"(\d+) passed", found.sanitizer or "")
    if sum(map(int, counts)):
        return Verdict(FAIL, f"{sum(map(int, counts))} errors: sanitizer.log")
    return Verdict(PASS, f"0 errors in {passed[1]} tests") if passed else Verdict(UNKNOWN, "no test ran under the sanitizer")


CLAIMS = (
    Claim("every mask, score, sink, GQA and dropout combine, within the bars of exactness", "README, Exactness",
          by_tests("interpreted/covering.py", "sanitized/kernels.py::test_every")),
    Claim("the kernels for sm_90, forward and fused backward, are within the bars of exactness", "kernels/README.md",
          by_tests("test_hopper_forward.py::test_on_the_gpu", "test_hopper_backward.py::test_on_the_gpu")),
    Claim("models' shapes and the sweeps are within the bars of exactness", "README, Exactness", errors),
    Claim("forward mode, double backward and their mixtures", "README, Why",
          by_tests("interpreted/tangents.py", "::test_one_tangent", "::test_through_the_front", "::test_vmap")),
    Claim("a mask and a score of your own work on the GPU", "README, What works",
          by_tests("interpreted/tutorial.py", "::test_a_users_scores")),
    Claim("one graph under torch.compile", "README, What works", by_tests("::test_one_graph_under_compile")),
    Claim("a row that sees no key gives 0 and gradients of 0, never NaN", "README, Exactness",
          by_tests("::test_rows_that_see_nothing", "::test_no_rows", "::test_what_no_row_sees", "::test_a_bias_of_minus")),
    Claim("equal inputs give equal bits", "README, Exactness", by_tests("::test_repeats_bit_for_bit")),
    Claim("with batch_invariant a document's bits depend on nothing beside it", "README, Exactness",
          by_tests("interpreted/invariance.py")),
    Claim("dropout's bits are the CPU's", "docs/numerics.md, Dropout", by_tests("::test_dropout_bits", "::test_each_group")),
    Claim("any strides, any head_dim, coordinates, dense masks by tile", "README, What works",
          by_tests("::test_any_strides", "::test_wide_heads", "::test_coordinates", "dense_mask", "::test_long_enough")),
    Claim("gradients stay right in bf16 where keys and values have a mean", "README, Why", means),
    Claim("tiles that a mask leaves empty cost nothing", "README, Why", skipping),
    Claim("no derivative holds an L x L tensor", "README, Why", memory),
    Claim("no access out of bounds", "kernels/README.md", sanitizer),
)  # fmt: skip


def judge(found: Evidence) -> list[tuple[Claim, Verdict]]:
    """Every claim and its verdict."""
    return [(claim, claim.decide(found)) for claim in CLAIMS]

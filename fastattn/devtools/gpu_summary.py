"""The page that `gpu-check` leaves: verdicts, steps, speed beside peers, tiles that were faster, the machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from . import claims
from .claims import Evidence


class Outcome(NamedTuple):
    """What became of a step."""

    name: str
    result: str
    seconds: float


def summary(facts: dict[str, Any], outcomes: list[Outcome], found: Evidence, out: Path) -> str:
    """The page, as Markdown.

    Args:
        facts: of the machine. out: the folder that it will stand in, with the other files in place.
    """
    judged = claims.judge(found)
    kinds = (claims.PASS, claims.FAIL, claims.UNKNOWN)
    counts = ", ".join(f"{sum(v.verdict == kind for _, v in judged)} {kind}" for kind in kinds)
    lines = ["# fastattn on a GPU", "", f"Claims: {counts}.", "", *_table("claim", "where", "verdict", "evidence")]
    lines += [f"| {c.text} | {c.page} | {v.verdict} | {v.evidence.replace('|', '/')} |" for c, v in judged]
    if told := failures(found):
        lines += ["", "Tests that failed, by what they say (tests.log has the rest):", "", *(f"- {line}" for line in told)]
    lines += ["", *_table("step", "result", "seconds"), *(f"| {x.name} | {x.result} | {x.seconds:.0f} |" for x in outcomes)]
    if speeds := speed(found):
        lines += ["", "Speed, for which nothing is claimed: the fastest peer's time by ours, the median over cells.", ""]
        lines += [f"- {line}" for line in speeds]
    if better := tuned(out / "tune.log"):
        lines += ["", "Launch configurations that were faster than the table's:", "", "```text", *better, "```"]
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items() if value is not None)]
    files = sorted(str(x.relative_to(out)) for x in out.rglob("*") if x.is_file() and x.name != "summary.md")
    return "\n".join([*lines, "", f"Beside this page: {', '.join(files) or 'nothing'}."]) + "\n"


def _table(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "| " + " | ".join("---" for _ in names) + " |"]


def failures(found: Evidence) -> list[str]:
    """A line for each kind of failure, the most frequent first: how many tests, the first one's reason, and their names.

    Reasons are of a kind that differ in numbers alone.
    """
    kinds: dict[str, list[str]] = {}
    for name, outcome in found.tests.items():
        if outcome == "failed":
            kinds.setdefault(re.sub(r"[-+\d.e]*\d[-+\d.e]*", "#", found.reasons.get(name, "")), []).append(name)
    lines = []
    for names in sorted(kinds.values(), key=len, reverse=True)[:20]:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        reason = found.reasons.get(names[0]) or "no reason was given"
        lines.append(f"{len(names)}: `{reason}` in {', '.join(names[:8])}{more}")
    return lines


def speed(found: Evidence) -> list[str]:
    """A line per suite of the benchmark: the median over its cells of the fastest peer's time by ours."""
    by_suite: dict[str, list[tuple[float, str]]] = {}
    for row in claims.cells(found):
        others = [(x["ratio"][0], name) for name, x in row["peers"].items() if name != "fastattn" and x["ratio"] is not None]
        if others:
            by_suite.setdefault(row["suite"], []).append(min(others))
    lines = []
    for suite, ratios in by_suite.items():
        ratios.sort()
        (low, slowest), (high, fastest) = ratios[0], ratios[-1]
        middle = ratios[len(ratios) // 2][0]
        lines.append(f"{suite}: {middle:.2f}x over {len(ratios)} cells, {low:.2f}x ({slowest}) to {high:.2f}x ({fastest})")
    return lines


def tuned(log: Path) -> list[str]:
    """The lines of a tuning log that found something faster."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line for line in lines if re.search(r"\] -> \[.*\dx", line)]

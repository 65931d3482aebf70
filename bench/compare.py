"""Two runs of the same cells set side by side: what became slower or faster, and what only the machine did.

A cell's figure is our time over a peer's, both taken in turns in the same run, so that a slower machine moves neither. The
change of a cell is the quotient of the two runs' figures: the smallest one, where all peers agree on its direction. What the
peers' own figures changed by, one against the other, is noise: nobody touched them. A change counts where the two runs'
intervals lie apart and it is larger than that noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from . import timing
from .cells import Row
from .peers import OURS
from .sweeps import SWEEPS

LEAST = 0.03  # a smaller change is none, however sure
NOISES = 3.0  # of the peers' own


@dataclass(frozen=True)
class Change:
    """One cell in two runs.

    factor: how many times longer we take in the second, at least, measured against the same peers; 1 where they disagree.
    """

    cell: str
    before: float
    after: float
    factor: float
    apart: bool
    noise: float | None

    @property
    def verdict(self) -> str:
        """slower, faster, or nothing that the runs can tell."""
        if not self.apart or abs(math.log(self.factor)) <= max(math.log1p(LEAST), NOISES * (self.noise or 0.0)):
            return "same"
        return "slower" if self.factor > 1 else "faster"


def rows(data: dict[str, Any]) -> dict[tuple[str, str, str], Row]:
    """The cells of a results.json.

    Raises:
        ValueError: it has none with rounds in it.
    """
    found = {}
    for suite in SWEEPS:
        for cell in data.get(suite, []):
            try:
                row = Row.read(cell)
            except (KeyError, TypeError) as missing:
                raise ValueError(f"these results are of another version of the benchmark: {missing} is missing") from missing
            if OURS.name in row.times:
                found[suite, row.workload, row.direction] = row
    if not found:
        raise ValueError(f"these results have no cells of {', '.join(SWEEPS)}")
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every cell that both runs have.

    Raises:
        ValueError: they share none, or were made on different machines.
    """
    for name in ("cpu", "gpu", "device", "threads"):
        a, b = (data["environment"].get(name) for data in (before, after))
        if a != b:
            raise ValueError(f"the runs cannot be compared: {name} is {a!r} in the first and {b!r} in the second")
    first, second = rows(before), rows(after)
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError("the runs share no cell")
    noise = _noise([(first[key], second[key]) for key in shared])
    return [_change(" ".join(key), first[key], second[key], noise) for key in shared]


def _change(name: str, a: Row, b: Row, noise: float | None) -> Change:
    before, after = (row.times[OURS.name].median for row in (a, b))
    factors, apart = [], True
    for peer in _peers(a, b):
        one, two = (timing.ratio(row.times[peer], row.times[OURS.name]) for row in (a, b))  # ours over the peer's
        factors.append(two.value / one.value)
        apart = apart and (one.high < two.low or two.high < one.low)
    if not factors:  # nobody else could: the times themselves
        factors.append(after / before)
        mine = [sorted(row.times[OURS.name].seconds) for row in (a, b)]
        apart = mine[0][-1] < mine[1][0] or mine[1][-1] < mine[0][0]
    agreed = all(f > 1 for f in factors) or all(f < 1 for f in factors)
    return Change(name, before, after, min(factors, key=lambda f: abs(math.log(f))) if agreed else 1.0, apart, noise)


def _peers(a: Row, b: Row) -> list[str]:
    return [name for name in a.times if name != OURS.name and name in b.times]


def _noise(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """The usual size of the change of one peer's time against another's, as a logarithm; a normal law's deviation. None where
    there are no two peers."""
    changes = [abs(change) for a, b in pairs for change in _peer_changes(a, b)]
    return statistics.median(changes) / 0.6745 if changes else None


def _peer_changes(a: Row, b: Row) -> Iterator[float]:
    for one, two in combinations(_peers(a, b), 2):
        yield math.log(timing.ratio(b.times[one], b.times[two]).value / timing.ratio(a.times[one], a.times[two]).value)


def text(changes: Sequence[Change]) -> str:
    """A table of what changed, and a line on the rest."""
    from . import table

    moved = sorted((c for c in changes if c.verdict != "same"), key=lambda c: -c.factor)
    lines = [
        [c.cell, f"{c.before * 1e3:.3g}", f"{c.after * 1e3:.3g}", f"{c.factor:.2f}x", c.verdict] for c in moved
    ]
    shown = [table.markdown(["cell", "before ms", "after ms", "time, against the same peers", ""], lines)] if lines else []
    same = len(changes) - len(moved)
    size = changes[0].noise
    noise = "no peer to judge by" if size is None else f"the peers' own times moved by {size:.1%} against each other"
    shown.append(f"{same} of {len(changes)} cells show no change that these runs can tell ({noise}).")
    return "\n\n".join(shown)

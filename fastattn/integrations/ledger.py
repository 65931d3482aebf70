"""What the takeovers took over, and what they left to somebody else and why: counts that a report shows.

A call inside a compiled function counts once, when it is compiled.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from .. import compat

MOST = 200  # different reasons that are told apart

_lock = threading.Lock()
_taken: Counter[str] = Counter()
_left: Counter[str] = Counter()


@compat.constant_in_graphs
def took(route: str) -> None:
    """A call went through fastattn."""
    with _lock:
        _taken[route] += 1


@compat.constant_in_graphs
def leave(route: str, reason: str) -> None:
    """A call was left to what would have run without fastattn."""
    key = f"{route}: {reason}"
    with _lock:
        _left[key if key in _left or len(_left) < MOST else f"{route}: other reasons"] += 1


@dataclass(frozen=True)
class Report:
    """Calls since a point in time: str() is one line for each route and each reason.

    Attributes:
        taken: calls that fastattn computed, by their route.
        left: calls that stayed with the host, by route and reason.
    """

    taken: dict[str, int]
    left: dict[str, int]

    def __sub__(self, before: Report) -> Report:
        return Report(_minus(self.taken, before.taken), _minus(self.left, before.left))

    def __str__(self) -> str:
        lines = [f"{n:>8}  {route}" for route, n in sorted(self.taken.items())]
        lines += [f"{n:>8}  left to the host: {reason}" for reason, n in sorted(self.left.items())]
        return "\n".join(lines) or "no calls"


def report() -> Report:
    """The calls that fastattn has taken over in this process, and those it left to the host, with the reasons.

    Returns:
        A Report; the difference of two is what happened in between.
    """
    with _lock:
        return Report(dict(_taken), dict(_left))


def _minus(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {key: n - b.get(key, 0) for key, n in a.items() if n > b.get(key, 0)}

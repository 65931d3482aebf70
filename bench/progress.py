"""How far a run has come: tqdm's bar where it is installed, and otherwise a line per step; both say how long is left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """with Progress("models", 18) as bar: bar.advance("bert-base")"""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.done = name, total, 0
        self.bar = None
        self.begun = time.monotonic()

    def __enter__(self) -> Progress:
        if tqdm is not None:
            self.bar = tqdm(total=self.total, desc=self.name, file=sys.stderr, leave=True)
        return self

    def advance(self, what: str) -> None:
        """One step done."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(what)
            self.bar.update()
        else:
            left = (time.monotonic() - self.begun) / self.done * (self.total - self.done)
            print(f"{self.name} {self.done}/{self.total} {what}, about {left:.0f} s left", file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

"""What the benchmark asks of an implementation of attention."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from .. import passes
from ..passes import Attend
from ..workloads import Inputs, Workload


class Peer:
    """An implementation.

    Attributes:
        name: heads its column. package: what must be importable. cuda: whether it runs on CUDA alone.
        features: which of a workload's features it computes. dtypes: by torch's name, all by default.
        head_dims: the sizes it takes, all by default.
        passes: what it can do of them.
        compiles: whether its first call takes a compiler's time.
    """

    name = ""
    package: str | None = None
    cuda = False
    features: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] | None = None
    head_dims: range | tuple[int, ...] | None = None
    passes: tuple[str, ...] = ("forward", "backward", "forward+backward")
    compiles = False

    def unavailable(self, device: str) -> str | None:
        """Why this machine does not have it, or None."""
        if self.cuda and device != "cuda":
            return "CUDA only"
        if self.package is not None and not _importable(self.package):
            return f"{self.package} is not installed"
        return None

    def cannot(self, w: Workload, device: str, direction: str) -> str | None:
        """Why it does not compute this pass of w there, or None."""
        missing = sorted(w.features - self.features)
        if missing:
            return f"no {missing[0]}"
        if direction not in self.passes:
            return f"no {direction}"
        if self.dtypes is not None and str(w.dtype)[6:] not in self.dtypes:
            return f"{' and '.join(self.dtypes)} only"
        if self.head_dims is not None and w.head_dim not in self.head_dims:
            return "not this head_dim"
        return None

    def build(self, w: Workload, x: Inputs) -> Attend:
        """A function of inputs like x that computes (B, H, L, D); what a model does once for all layers is done here."""
        raise NotImplementedError

    def results(self, attend: Attend, x: Inputs, direction: str) -> tuple[Tensor, ...]:
        """What a pass yields by what `build` gave."""
        return passes.results(attend, x, direction)


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a package above it is missing, or half loaded
        return False


def by_length(t: Tensor) -> Tensor:
    """(B, H, L, D) as (B, L, H, D), without a copy where it is stored so."""
    return t.transpose(1, 2)


def packed(t: Tensor) -> Tensor:
    """(1, H, L, D) as (L, H, D)."""
    return t[0].transpose(0, 1)

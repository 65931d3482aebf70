"""What the benchmark asks of an implementation of attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..workloads import Inputs, Workload

Call = Callable[[], Tensor]


class Peer:
    """An implementation. `name` heads its column."""

    name = ""

    def unavailable(self, device: str) -> str | None:
        """Why this machine does not have it, or None."""
        return None

    def cannot(self, w: Workload, device: str, gradients: bool) -> str | None:
        """Why it does not compute w there, or None."""
        return None

    def build(self, w: Workload, x: Inputs) -> Call:
        """A call of no arguments that computes (B, H, L, D); what a model does once for all layers is done here."""
        raise NotImplementedError

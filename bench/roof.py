"""The roof over every pass on this machine: how fast it multiplies matrices, how fast it moves memory, both measured here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .workloads import Workload

MATRIX = {"cpu": 512, "cuda": 8192}  # sides of the square product
MEMORY = {"cpu": 64 << 20, "cuda": 1 << 30}  # bytes that are copied
ROUNDS, ENOUGH = 9, 0.5  # products or copies, and the seconds after which three are enough


@dataclass(frozen=True)
class Roof:
    """flops: of a large product per second, by dtype. bandwidth: bytes read and written per second by a copy."""

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, dtype: str, flops: float, moved: float) -> float:
        """The least time in which a pass could do this arithmetic and move these bytes.

        Half precision may be widened first: where a processor has no products for it, float32's are the roof.
        """
        wide = self.flops.get("float32", 0.0) if dtype in ("float16", "bfloat16") else 0.0
        return max(flops / max(self.flops[dtype], wide), moved / self.bandwidth)

    def json(self) -> dict[str, Any]:
        return {"flops": self.flops, "bandwidth": self.bandwidth}


def measure(device: str, dtypes: set[torch.dtype]) -> Roof:
    """Medians over a few products and copies, with the threads that torch has now; on a CPU in the process's time."""
    n = MATRIX[device]
    rates = {}
    for dtype in sorted(dtypes | {torch.float32}, key=str):
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        rates[str(dtype)[6:]] = 2 * n**3 / _median(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    source = torch.ones(MEMORY[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Roof(rates, 2 * source.numel() / _median(lambda: target.copy_(source), device))


def bytes_moved(w: Workload, direction: str) -> float:
    """What a pass has to read and write at least: q, k, v and o, in a backward also do and the three gradients."""
    item = torch.empty((), dtype=w.dtype).element_size()
    rows, keys = w.heads * w.head_dim, w.kv_heads * w.head_dim
    forward = 2 * rows + 2 * keys
    backward = 4 * rows + 4 * keys  # q k v o do in, dq dk dv out
    units = {"forward": forward, "backward": backward, "forward+backward": forward + backward}.get(direction, 0)
    return float(w.batch * w.length * units * item)


def _median(call: Callable[[], Any], device: str) -> float:
    call()
    taken: list[float] = []
    while len(taken) < ROUNDS and (len(taken) < 3 or sum(taken) < ENOUGH):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
    return statistics.median(taken)

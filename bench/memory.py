"""Peak memory of a call beyond what its inputs take, measured in a process of its own.

On Linux it is the resident set's high-water mark, reset before each call, so that workspaces of any library count; large
blocks are returned to the system as soon as they are free, or one call's leftovers would hide the next one's needs.
On CUDA it is the caching allocator's peak. Elsewhere it is not known.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def measurable(device: str) -> bool:
    """Whether peaks are known on this machine."""
    return device == "cuda" or CLEAR.exists()


def settle() -> None:
    """Make the C allocator give back what is freed, from now on: once, at the start of a measuring process."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 10)


def peak(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that the second of two calls needed at its worst moment beyond what was held before it."""
    call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    CLEAR.write_text("5")
    call()
    return max(0, _status("VmHWM") - before)


def in_process(module: str, cells: Iterable[Any], threads: int | None = None) -> list[Any]:
    """Run `python -m module` on a JSON list and read one JSON value per line; a cell that it did not reach is None.

    Args:
        module: reads the list from stdin, calls `settle`, and prints a line per cell.
    """
    todo = list(cells)
    run = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps([threads, todo]), capture_output=True, text=True, check=False
    )
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith(("[", "{"))]
    return found + [None] * (len(todo) - len(found))


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{STATUS} has no {field}")

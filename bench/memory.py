"""Peak memory of a call beyond what its inputs take, measured in a process of its own.

On Linux it is the resident set's high-water mark, reset before each call, so that workspaces of any library count; large
blocks are returned to the system as soon as they are free, or one call's leftovers would hide the next one's needs.
On CUDA it is the caching allocator's peak. Elsewhere it is not known.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
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


def peak(call: Callable[[], Any], device: str = "cpu", warm: bool = False) -> int:
    """Bytes that a call needs at its worst moment beyond what was held before it: the second one, the first being made here if
    not `warm`."""
    if not warm:
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


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{STATUS} has no {field}")

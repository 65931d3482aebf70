"""What this machine and this installation are, for `python -m fastattn info` and for the heads of results."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__, dispatch


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Versions, processor, GPU and threads, as plain values."""
    return {
        "fastattn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": _gpu(),
        "torch threads": torch.get_num_threads(),
    }


def lost_gpu() -> str | None:
    """What torch says of a CUDA context in which nothing works any more, since a kernel of it did what it must not; or None."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error)
    return None


def backends() -> dict[str, str]:
    """Every backend's name and what it is here."""
    lines = {
        "tiled": "available: torch operations in tiles, torch's fused kernel for plain tiles on CPU",
        "triton": _triton(),
        "hopper": _hopper(),
        "reference": "available: plain PyTorch over the whole score matrix, for tests",
    }
    return {name: lines[name] for name in dispatch.NAMES}


def _triton() -> str:
    if version("triton") is None:
        return "not available: triton is not installed (cuda tensors need it, or backend='tiled')"
    return "available: fused kernels, the default on cuda tensors" if torch.cuda.is_available() else "needs a GPU"


def _hopper() -> str:
    if version("triton") is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs triton and a GPU of architecture sm_90"
    return "available: a warp-specialised forward, the default of plain and causal calls with long sequences"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"

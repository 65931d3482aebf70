"""Argument checks that the masks share. Values inside tensors are read only where that is free."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

ALIGNMENTS = (None, "top_left", "bottom_right")
LARGE = 2**30  # no length comes near it, and int32 arithmetic on it cannot overflow


def check_align(align: Any, name: str) -> Any:
    """An alignment, an int cut off at a number that no length reaches."""
    if isinstance(align, int) and not isinstance(align, bool):
        return max(-LARGE // 2, min(align, LARGE // 2))  # what is added to it must not overflow either
    if not isinstance(align, str | None) or align not in ALIGNMENTS:
        raise ValueError(f"{name}: align must be 'top_left', 'bottom_right', an int or None, got {align!r}")
    return align


def check_count(value: Any, name: str, least: int = 0) -> Any:
    """An int argument of at least `least`, cut off at a number that no length reaches."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {brief(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return LARGE if isinstance(value, int) and value > LARGE else value


def check_lengths(n_q: Any, n_k: Any) -> None:
    """The arguments of `lower`: a tenth of a microsecond for ints."""
    if type(n_q) is int and type(n_k) is int and n_q >= 0 and n_k >= 0:
        return
    for name, n in (("n_q", n_q), ("n_k", n_k)):
        if isinstance(n, bool) or not isinstance(n, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {brief(n)}")
        if not isinstance(n, torch.SymInt) and int(n) < 0:
            raise ValueError(f"{name} must be at least 0, got {n}")


def check_int_tensor(value: Any, name: str, ranks: tuple[int, ...] = (1,)) -> Tensor:
    """An int32 or int64 tensor argument of one of the given ranks."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {brief(value)}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")
    if value.ndim not in ranks:
        accepted = " or ".join(str(n) for n in ranks)
        raise ValueError(f"{name} must have {accepted} dims, got shape {tuple(value.shape)}")
    return value


def moved(x: Tensor, device: Any, dtype: torch.dtype | None = None) -> Tensor:
    """x on `device`; a copy from the CPU is only enqueued.

    Raises:
        ValueError: x is on the meta device and the call is not: it holds nothing.
    """
    if x.is_meta and torch.device(device).type != "meta":
        raise ValueError(f"a mask's tensor must be on {device} or the CPU, got {brief(x)} on meta")
    return x.to(device, dtype, non_blocking=x.device.type == "cpu")


def readable(x: Tensor) -> bool:
    """Whether x's values may be looked at here: plain CPU tensors outside a compiler."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)


def peek(x: Tensor) -> list[Any] | None:
    """x's values where they can be read for free, else None."""
    if not readable(x):
        return None
    try:
        return x.tolist()
    except RuntimeError:  # inside torch.func transforms and under fake tensors
        return None


def brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    return getattr(value, "__qualname__", None) or repr(value)

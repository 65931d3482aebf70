"""What each sub-suite measures: cells of a workload and a pass, the most telling ones first.

`forward` and `backward` are in FlashAttention's terms: as many sequences as make the same number of tokens, heads such that the
hidden size is the same, full and causal. On CUDA 16k tokens of hidden size 2048 in bfloat16, lengths up to 16k; on a CPU an
eighth of the tokens and a quarter of the hidden size in float32, which it finishes in minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .workloads import CUDA_FACTOR, MODELS, Workload


class Cell(NamedTuple):
    """A workload in one pass; `calls` of it are timed together, and what one takes is shown."""

    workload: Workload
    direction: str
    calls: int = 1


class Size(NamedTuple):
    """Of the sweeps on one kind of device."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    lengths: tuple[int, ...]  # the most telling first


CPU = Size(2048, 512, torch.float32, (1024, 512, 2048, 256))
CUDA = Size(16384, 2048, torch.bfloat16, (8192, 4096, 2048, 16384, 1024, 512))


def size(device: str) -> Size:
    return CUDA if device == "cuda" else CPU


def models(device: str) -> list[Cell]:
    """Models' shapes, forward and forward with backward."""
    found = [_on_cuda(w) for w in MODELS] if device == "cuda" else list(MODELS)
    return [Cell(w, direction) for w in found for direction in ("forward", "forward+backward")]


def forward(device: str) -> list[Cell]:
    return [Cell(w, "forward") for w in _grid(device)]


def backward(device: str) -> list[Cell]:
    return [Cell(w, "backward") for w in _grid(device)]


def masks(device: str) -> list[Cell]:
    """Masks that leave something to skip, and a random one that does not."""
    base = _base(device, 64)
    n = base.length
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("window", "sliding window", dict(causal=True, window=n // 8)),
        ("documents", "packed documents", dict(batch=1, causal=True, documents=8)),
        ("padding", "padded batch", dict(batch=4, heads=base.heads // 2, kv_heads=base.heads // 2, padding=True)),
        ("prefix", "prefix-LM", dict(causal=True, prefix=n // 4)),
        ("random", "random bool mask", dict(dense=True)),
        ("sinks", "window with learned sinks, as in gpt-oss", dict(causal=True, window=n // 8, sinks=True)),
    ]
    return _both(base, kinds)


def bias(device: str) -> list[Cell]:
    """Biases with their gradients, and other changes to the scores."""
    base = _base(device, 64)
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("bias", "learned bias per head, row and key", dict(bias=True)),
        ("relative", "T5's relative bias", dict(relative=True)),
        ("alibi", "ALiBi", dict(causal=True, alibi=True)),
        ("softcap", "softcap", dict(causal=True, softcap=50.0)),
    ]
    return _both(base, kinds)


def second_order(device: str) -> list[Cell]:
    """Double backward and forward mode."""
    base = _base(device, 64)
    found = [replace(base, name="causal", model="causal", causal=True), replace(base, name="full", model="full")]
    return [Cell(w, direction) for w in found for direction in ("double backward", "forward mode")]


def overhead(device: str) -> list[Cell]:
    """Calls so small that what surrounds the kernel is all there is."""
    dtype = size(device).dtype
    found = [
        Workload("tiny", "the smallest call", 1, 8, 8, 8, 64, dtype),
        Workload("tiny causal", "the smallest causal call", 1, 8, 8, 8, 64, dtype, causal=True),
        Workload("tiny window", "the smallest call with a mask", 1, 8, 8, 16, 64, dtype, causal=True, window=4),
        Workload("many short", "a batch of short sequences", 64, 4, 4, 9, 16, dtype),
    ]
    return [Cell(w, direction, 50) for w in found for direction in ("forward", "forward+backward")]


SWEEPS: dict[str, Callable[[str], list[Cell]]] = {
    "models": models,
    "forward": forward,
    "backward": backward,
    "masks": masks,
    "bias": bias,
    "second-order": second_order,
    "overhead": overhead,
}


def select(suite: str, names: Sequence[str], device: str) -> list[Cell]:
    """The cells of a suite, or those of the workloads that are named.

    Raises:
        ValueError: a name is none of its workloads.
    """
    cells = SWEEPS[suite](device)
    known = dict.fromkeys(cell.workload.name for cell in cells)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no workload is named {', '.join(unknown)}; there are {', '.join(known)}")
    return [cell for cell in cells if not names or cell.workload.name in names]


def flops(w: Workload, direction_factor: float | None, density: float) -> float | None:
    """Floating point operations of a pass in the field's convention: 4 B H L^2 D forward, times the share of visible pairs."""
    if direction_factor is None:
        return None
    share = 0.5 if w.causal and w.plain else density  # half, as everyone counts it, where the mask is causal alone
    return 4.0 * w.batch * w.heads * w.length**2 * w.head_dim * share * direction_factor


def _grid(device: str) -> list[Workload]:
    s = size(device)
    found = []
    for n in s.lengths:
        for head_dim in (128, 64, 256):
            for causal in (True, False):
                kind = "causal" if causal else "full"
                heads = s.hidden // head_dim
                w = Workload(f"d{head_dim} {kind} L{n}", kind, s.tokens // n, heads, heads, n, head_dim, s.dtype, causal=causal)
                found.append(w)
    return found


def _base(device: str, head_dim: int) -> Workload:
    s = size(device)
    n, heads = s.lengths[0], s.hidden // head_dim
    return Workload("", "", 1, heads, heads, n, head_dim, s.dtype)


def _both(base: Workload, kinds: list[tuple[str, str, dict[str, Any]]]) -> list[Cell]:
    found = [replace(base, name=name, model=model, **changes) for name, model, changes in kinds]
    return [Cell(w, direction) for w in found for direction in ("forward", "forward+backward")]


def _on_cuda(w: Workload) -> Workload:
    window = None if w.window is None else w.window * CUDA_FACTOR
    length = w.length if w.name.startswith("vit") else w.length * CUDA_FACTOR
    return replace(w, length=length, window=window, dtype=torch.bfloat16)

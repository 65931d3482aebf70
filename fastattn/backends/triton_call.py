"""A Problem as the arguments that kernels take, and how a kernel is launched."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dropout import threshold
from ..kernels import masks, shim
from ..kernels.launch import Launch, launch, padded
from ..masks import DensePredicate
from ..problem import Problem
from ..scores import Pointwise, Score
from ..scores.base import plane_strides, wide_plane
from .facts import facts

REACH = 1 << 31  # elements that an offset inside a tile can span
TALLEST = 256  # rows or keys of the largest tile that tuning tries
PAD = 128  # rows of the backward's statistics are padded to a multiple of the largest query tile


def launches_on(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of a device."""
    return device.type == "cuda" or shim.INTERPRETED


def architecture(device: torch.device) -> str:
    """The name of a device's architecture, as launch tables have it."""
    if shim.INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def precision() -> str:
    """How kernels multiply float32: torch's own setting, each step at least as exact as torch's matrix product."""
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses where its newer setting of the same thing was used
        setting = "medium" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[setting]


def pairs(device: torch.device) -> bool:
    """Whether kernels for a device may round two values by one PTX instruction: cvt.rn.bf16x2.f32, since sm_80."""
    arch = architecture(device)
    return not shim.INTERPRETED and arch.startswith("sm_") and int(arch[3:]) >= 80


class Call(NamedTuple):
    """A Problem as the arguments that all kernels share."""

    data: tuple[Any, ...]  # of the mask, the coordinates, the scores and dropout
    flags: tuple[int, ...]  # what is static: kernels/masks.py
    predicates: tuple[Any, ...]
    chain: tuple[tuple[Any, ...], ...]
    ints: tuple[int, ...]  # n_q, n_k, start, stop, q_at, k_at
    spans: int
    dims: tuple[int, ...]
    precision: str
    operands: tuple[Tensor, Tensor, Tensor]
    strides: tuple[tuple[int, ...], ...]  # of q, k, v
    cells: Tensor | None  # the tile map, where there is a bool tensor

    @property
    def rows(self) -> bool:
        """Whether spans are tensors."""
        return bool(self.flags[0])


def prepare(p: Problem) -> Call:
    """The arguments that every kernel of p takes."""
    mask, span_flags, predicates, spans, start, stop = _mask_args(p)
    coords, coord_flags, q_at, k_at = _coord_args(p)
    chain = tuple((isinstance(score, Pointwise), *_functions(score, p)) for score in p.scores)
    dropout, dropout_flags = _dropout_args(p, coord_flags, k_at)
    operands = reachable(p.q), reachable(p.k), reachable(p.v)
    dims = (p.q.shape[3], padded(p.q.shape[3]), p.v_dim, padded(p.v_dim))
    return Call(
        (mask, coords, tuple(score.device_args() for score in p.scores), dropout),
        (*span_flags, *coord_flags, *dropout_flags, _map_flag(predicates), 0, 0, int(pairs(p.q.device))), predicates, chain,
        (p.n_q, p.n_k, start, stop, q_at, k_at),
        spans, dims, precision(), operands, tuple(x.stride() for x in operands), None,
    )  # fmt: skip


def _functions(score: Score, p: Problem) -> tuple[Any, ...]:
    q_at, k_at = p.coords.q, p.coords.k
    if isinstance(q_at, int) and isinstance(k_at, int):
        functions = score.device_functions_within(range(q_at, q_at + p.n_q), range(k_at, k_at + p.n_k))
    else:
        functions = score.device_functions()
    assert functions is not None
    return functions


def reachable(x: Tensor) -> Tensor:
    """x, or a copy where the offsets inside a tile would not fit 32 bits."""
    return x.contiguous() if TALLEST * x.stride(2) + x.shape[3] * x.stride(3) >= REACH else x


def _mask_args(p: Problem) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[Any, ...], int, int, int]:
    """(mask, flags, predicates, spans, start, stop): kernels/masks.py."""
    data: list[Any] = []
    functions: list[Any] = []
    for predicate in p.mask.predicates:
        if isinstance(predicate, DensePredicate):
            x = predicate.tensor
            data.append((x.view(torch.uint8), plane_strides(x), wide_plane(x)))
            functions.append(None)
        else:
            data.append(())
            functions.append(predicate.triton_fn)
    if p.invariant:
        data.append(())
        functions.append(masks.always)
    spans, rows = p.mask.spans, p.mask.rows
    if spans is None or len(spans) > 1:
        a, b = (x.contiguous() for x in (p.mask.rows_tensors(p.q.device) if rows is None else rows))
        n_b, n_h, n_spans, _ = a.shape
        apart = (n_h * n_spans if n_b > 1 else 0, n_spans if n_h > 1 else 0)
        return ((a, b, *apart), tuple(data), ()), (1, 0, 0), tuple(functions), n_spans, 0, 0
    ((start, stop),) = spans
    tensors = [x.const if isinstance(x.const, Tensor) else None for x in (start, stop)]
    strides = tuple(strides_of(x, 1)[0] for x in tensors)
    ints = [0 if isinstance(x.const, Tensor) else max(-REACH // 2, min(int(x.const), REACH // 2)) for x in (start, stop)]
    flags = (0, int(start.row), int(stop.row))
    return ((*tensors, *strides), tuple(data), ()), flags, tuple(functions), 1, ints[0], ints[1]


def _map_flag(predicates: tuple[Any, ...]) -> int:
    """Whether there is a bool tensor, whose tiles are classified: 2 where other predicates stand beside it."""
    return int(None in predicates) << int(any(x is not None for x in predicates))


def _coord_args(p: Problem) -> tuple[tuple[Any, ...], tuple[int, ...], int, int]:
    """(coords, flags, q_at, k_at): kernels/chain.py."""
    parts: list[Any] = []
    for x in p.coords.parts:
        if isinstance(x, Tensor):
            parts.append((x, *strides_of(x, 2)))
        else:
            parts.append(int(x))
    flags = tuple(int(isinstance(x, tuple)) for x in parts)
    q_at, k_at = (0 if tensor else x for x, tensor in zip(parts[2:], flags[2:], strict=True))
    parts[2] = parts[2] if flags[2] else 0
    return tuple(parts), flags, q_at, k_at


def _dropout_args(p: Problem, coord_flags: tuple[int, ...], k_at: int) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """(dropout, flags): kernels/dropout.py."""
    if p.dropout_p == 0.0:
        return (), (0, 0)
    assert p.rng is not None
    factor = 1.0 / (1.0 - p.dropout_p) if p.dropout_p < 1.0 else 0.0
    fours = not coord_flags[0] and not coord_flags[3] and k_at % 4 == 0
    word = min(threshold(p.dropout_p), (1 << 32) - 1)
    return (p.rng.contiguous(), p.n_b // p.rng.shape[0], word, factor), (1, int(fours))


def config(p: Problem, kernel: str, load: str | None = None) -> Launch:
    """The launch of a kernel for p, whose load may be another than p says by itself."""
    device, dtype, dims, own, _, _ = facts(p)
    load = own if load is None else load
    return launch(kernel, *dims, dtype.itemsize, architecture(device), load, 1 << 30 if "dkdv" in kernel else p.n_q)


def misfit(
    device: torch.device, dtype: torch.dtype, dims: tuple[int, int], load: str, kernels: tuple[str, ...]
) -> str | None:  # fmt: skip
    """Why one of the kernels cannot be launched for such a call (`facts`), or None."""
    try:
        for kernel in kernels:
            launch(kernel, *dims, dtype.itemsize, architecture(device), load)
    except ValueError as error:
        return str(error)
    return None


def strides_of(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """x's strides, 0 where one value serves all; zeros where there is no x."""
    return (0,) * dims if x is None else tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


def on_device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def run(kernel: Any, programs: int | tuple[int, int], how: Launch, *args: Any, **constants: Any) -> None:
    """Launch a grid of programs, or of programs by slices of the head_dim."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    if min(grid) > 0:
        kernel[grid](*args, **constants, num_warps=how.num_warps, num_stages=how.num_stages)


def row_grid(p: Problem, how: Launch, width: int) -> tuple[int, int]:
    """Programs of a pass over tiles of rows, by slices of its result's columns, of which there are `width`."""
    return cdiv(p.n_q, how.block_q) * p.n_b * p.n_h, how.slices(width)


def column_grid(p: Problem, how: Launch) -> tuple[int, int]:
    """Programs of a pass over tiles of keys, by slices of the columns of k and v."""
    return cdiv(p.n_k, how.block_k) * p.n_b * p.n_kv, how.slices(p.k.shape[3], p.v_dim)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)

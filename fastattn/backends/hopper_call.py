"""Descriptors and launches of the kernels for sm_90: what they need beside `triton_call`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..kernels.hopper import gluon, schedule
from ..kernels.launch import Launch, launch
from ..problem import Problem
from . import triton_call
from .facts import facts
from .hopper_fit import ALIGNED, unreachable
from .triton_call import Call, cdiv, on_device

ARCH = "sm_90"
ROWS = 64  # of a warp group's tile
CACHE = 32 << 20  # bytes of keys and values that are to stay in the L2 cache of 50 MB while a section of heads is computed


def width(dim: int) -> int:
    """head_dim as these kernels hold it: 64, 128 or 256."""
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


def config(p: Problem, kernel: str) -> Launch:
    """The launch of one of these kernels for p."""
    known = facts(p)
    return launch(kernel, *known.dims, known.dtype.itemsize, ARCH, known.load)


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; of an H100 where there is none to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def section(p: Problem) -> int:
    """Query heads whose keys and values fit the cache together, at least those of one key head."""
    bytes_of_head = p.n_k * (p.q.shape[3] + p.v_dim) * p.k.element_size()
    return max(1, CACHE // max(bytes_of_head, 1)) * (p.n_h // max(p.n_kv, 1))


def reachable(name: str, x: Tensor) -> Tensor:
    """x, or a copy that a descriptor can describe: of what does not begin at a multiple of 16 bytes, or comes out of vmap.

    Raises:
        ValueError: a copy would not help.
    """
    if unreachable(name, x) is None and x.data_ptr() % ALIGNED == 0:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    if reason := unreachable(name, x):
        raise ValueError(f'backend="hopper" cannot run this call: {reason}')
    return x


def row_pass(p: Problem, call: Call, how: Launch) -> tuple[Any, ...]:
    """call.data for a pass of tiles of rows over keys; where spans are tensors, with the walks of all tiles."""
    if not call.rows:
        return call.data
    mask = call.data[0]
    n_b, n_h, spans, n_q = mask[0][0].shape
    tiles = cdiv(n_q, how.block_q)
    walks = torch.empty(n_b, n_h, tiles, spans, 4, dtype=torch.int32, device=p.q.device)
    with on_device(p.q):
        triton_call.run(
            schedule.span_walks, walks.numel() // 4, Launch(0, 0, 4, 1), mask, walks, n_q, p.n_k, tiles, n_h, call.flags, spans,
            (how.block_q, how.block_k),
        )  # fmt: skip
    return (*mask[:2], (walks, n_h if n_b > 1 else 0, int(n_h > 1))), *call.data[1:]


@functools.lru_cache(maxsize=1024)
def _template(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, rows: int, columns: int, parts: int
) -> Any:
    """A checked descriptor of anything with these strides, of tiles of rows x columns; it has no base."""
    bits = 8 * dtype.itemsize
    swizzle = min(128, columns // parts * bits // 8)
    layout = gluon.gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=4)
    row = max(shape[3], ALIGNED * 8 // bits)
    legal = [s if n > 1 else row for n, s in zip(shape[:3], strides[:3])]
    return gluon.TensorDescriptor(
        torch.empty(0, dtype=dtype), list(shape), [*legal, 1], [1, 1, rows, columns], layout
    )


def descriptor(x: Tensor, rows: int, columns: int, parts: int = 1) -> Any:
    """x (B, H, L, D) in tiles of rows x columns. What can be checked is checked once for all tensors with these strides.

    parts: into how many slices a kernel cuts the columns; each then has whole rows of the swizzle for itself.
    """
    known = _template(tuple(x.shape), x.stride(), x.dtype, rows, columns, parts)
    found = object.__new__(type(known))
    found.__dict__.update(known.__dict__, base=x)
    return found


def run(kernel: Any, work: int, device: torch.device, how: Launch, *args: Any) -> None:
    """Launch programs that share `work` items among them, one a multiprocessor."""
    triton_call.run(kernel, min(work, processors(device)), how, *args)

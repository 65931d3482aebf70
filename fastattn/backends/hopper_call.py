"""Descriptors and launches of the kernels for sm_90: what they need beside `triton_call`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..kernels.hopper import gluon
from ..kernels.launch import Launch, launch
from ..problem import Problem
from . import triton_call
from .facts import facts

ARCH = "sm_90"
ROWS = 64  # of a warp group's tile
CACHE = 32 << 20  # bytes of keys and values that are to stay in the L2 cache of 50 MB while a section of heads is computed
ALIGNED = 16  # bytes to which a descriptor's base and strides are multiples


def width(dim: int) -> int:
    """head_dim as these kernels hold it: 64, 128 or 256."""
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


def config(p: Problem, kernel: str) -> Launch:
    """The launch of one of these kernels for p."""
    device, dtype, dims, load, _, _ = facts(p)
    return launch(kernel, *dims, dtype.itemsize, ARCH, load)


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; of an H100 where there is none to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def section(p: Problem) -> int:
    """Query heads whose keys and values fit the cache together, at least those of one key head."""
    bytes_of_head = p.n_k * (p.q.shape[3] + p.v_dim) * p.k.element_size()
    return max(1, CACHE // max(bytes_of_head, 1)) * (p.n_h // max(p.n_kv, 1))


def unreachable(name: str, x: Tensor) -> str | None:
    """Why a descriptor cannot describe x (B, H, L, D), or None."""
    size = x.element_size()
    if x.stride(3) != 1 and x.shape[3] != 1:
        return f"{name}'s last stride must be 1, not {x.stride(3)}"
    for dim, (n, stride) in enumerate(zip(x.shape[:3], x.stride()[:3])):
        if n > 1 and (stride <= 0 or stride * size % ALIGNED):
            return f"{name}'s stride {dim} must be a positive multiple of {ALIGNED // size} elements, not {stride}"
    return None


def misaligned(name: str, x: Tensor) -> str | None:
    """Why the address of x does not fit a descriptor, or None. It is data: unlike strides it changes from call to call."""
    return f"{name} must begin at a multiple of {ALIGNED} bytes" if x.data_ptr() % ALIGNED else None


@functools.lru_cache(maxsize=1024)
def _template(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, rows: int, columns: int) -> Any:
    """A checked descriptor of anything with these strides, of tiles of rows x columns; it has no base."""
    bits = 8 * dtype.itemsize
    layout = gluon.gl.NVMMASharedLayout(swizzle_byte_width=min(128, columns * bits // 8), element_bitwidth=bits, rank=4)
    row = max(shape[3], ALIGNED * 8 // bits)
    legal = [s if n > 1 else row for n, s in zip(shape[:3], strides[:3])]
    return gluon.TensorDescriptor(
        torch.empty(0, dtype=dtype), list(shape), [*legal, 1], [1, 1, rows, columns], layout
    )


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """x (B, H, L, D) in tiles of rows x columns. What can be checked is checked once for all tensors with these strides."""
    known = _template(tuple(x.shape), x.stride(), x.dtype, rows, columns)
    found = object.__new__(type(known))
    found.__dict__.update(known.__dict__, base=x)
    return found


def run(kernel: Any, work: int, device: torch.device, how: Launch, *args: Any) -> None:
    """Launch programs that share `work` items among them, one a multiprocessor."""
    triton_call.run(kernel, min(work, processors(device)), how, *args)

"""The portable kernels as they are compiled for a GPU, run without one: every instruction of their PTX, on CPU tensors.

    with emulate.on("sm_90"):
        out = fastattn.attention(q, k, v, backend="triton")  # tensors on the CPU

Closer to the GPU than Triton's interpreter: its tiles, layouts, shared memory, matrix instructions and roundings, and every
access held against the bounds of the tensors, its alignment, and what other blocks and threads write (machine.py).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from ..backends import triton_call
from .machine import Fault, Memory
from .offline import Recorded, compiled, flat_arguments, miscounted, require_compiler, variant
from .ptx import Program

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")


@contextlib.contextmanager
def on(arch: str) -> Iterator[None]:
    """Launches of the Triton backend are compiled for an architecture and executed here, one program after another.

    Raises:
        ValueError: Triton is missing or interprets, or the architecture is not one of ARCHITECTURES; later, from a launch:
            a tensor is not on the CPU.
        Fault: from a launch, what a GPU would not do or not always, or a product that Triton gets wrong.
    """
    require_compiler()
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    programs: dict[tuple[str, str], tuple[Program, int]] = {}

    def run(kernel: Any, grid: int | tuple[int, int], how: Any, *args: Any) -> None:
        sizes = grid if isinstance(grid, tuple) else (grid,)
        if min(sizes) == 0:
            return
        launch = Recorded(kernel, args, how.num_warps, how.num_stages)
        key = variant(launch, arch)
        if key not in programs:
            binary = compiled(launch, arch)
            if wrong := miscounted(binary.asm["ttgir"]):
                raise Fault(f"{launch.kernel.__name__}: {wrong}")
            programs[key] = Program(binary.asm["ptx"]), binary.metadata.shared
        program, shared_bytes = programs[key]
        scratch = [0, 0]  # the last two parameters, which no kernel of this project uses
        memory = Memory(_storages(args))
        words = [_word(kind, value) for kind, value in flat_arguments(launch, arch)]
        with np.errstate(all="ignore"):
            program.launch(sizes, words + scratch, shared_bytes, memory)

    with mock.patch.multiple(triton_call, run=run, architecture=lambda device: arch, launches_on=lambda device: True):
        yield


def _word(kind: str, value: Any) -> int:
    """The bits of a parameter of a type as Triton writes it: "*bf16", "i32", "fp32"."""
    if kind[0] == "*":
        return int(value.data_ptr())
    if kind == "fp32":
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    return int(value) & ((1 << int(kind[1:])) - 1)


def _storages(x: Any) -> dict[int, int]:
    """Address and bytes of every tensor's storage among nested arguments."""
    if isinstance(x, Tensor):
        if x.device.type != "cpu":
            raise ValueError(f"emulated kernels take tensors on the CPU, got one on {x.device}")
        storage = x.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    return {start: size for part in x for start, size in _storages(part).items()} if isinstance(x, tuple) else {}

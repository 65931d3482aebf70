"""A block of threads as PTX sees it, all of them in lockstep on the CPU: memories, lanes and matrix instructions.

A register is an array with an element per thread: uint16, uint32 or uint64, whatever it means, or bool. Every access is held
against the bounds of the tensors that the launch was given, against its alignment, and against what others do: in global
memory other blocks, and what other threads of this one wrote since the last barrier; in shared memory other warps, and what is
asynchronous (order.py). That is done at once, and whatever comes before its wait is a fault.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .order import LANES, Array, Fault, InFlight, Order

UINT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
GROUP = 128  # threads of a warp group


class Region:
    """One tensor's storage."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
        self.words = {width: memory[: size // width * width].view(dtype) for width, dtype in UINT.items()}
        self.written: Array | None = None  # by byte: the block, barriers and thread of its last write
        self.readers: Array | None = None  # by byte: the block that read it, -1 for several

    def read(self, block: int, offset: Array, size: int) -> None:
        if self.readers is None:
            self.readers = np.zeros(self.size, np.int32)
        for i in range(size):
            before = self.readers[offset + i]
            self.readers[offset + i] = np.where((before == 0) | (before == block), block, -1)

    def read_by_others(self, block: int, offset: Array, size: int) -> bool:
        readers = self.readers
        return readers is not None and any(not np.isin(readers[offset + i], (0, block)).all() for i in range(size))


class Memory:
    """Global memory: the storages that a launch knows, as (address, bytes)."""

    def __init__(self, storages: dict[int, int]) -> None:
        self.regions = [Region(start, size) for start, size in sorted(storages.items()) if size]
        self.starts = np.array([x.start for x in self.regions], np.uint64)
        self.ends = np.array([x.start + x.size for x in self.regions], np.uint64)

    def find(self, at: Array, size: int) -> list[tuple[Region, Array, Array]]:
        """(region, which of the addresses lie in it, their offsets there in bytes) of accesses to `size` bytes.

        Raises:
            Fault: one is out of bounds or not aligned.
        """
        if len(astray := at[at % np.uint64(size) != 0]):
            raise Fault(f"address {astray[0]:#x} is not aligned to the {size} bytes of the access")
        which = np.searchsorted(self.starts, at, "right") - 1
        bad = (which < 0) | (at + np.uint64(size) > self.ends[np.maximum(which, 0)])
        if bad.any():
            first, near = int(at[bad][0]), max(int(which[bad][0]), 0)
            beyond = f"{first - int(self.ends[near])} bytes behind the end of a tensor of {self.regions[near].size} bytes"
            raise Fault(f"{bad.sum()} threads access memory that is no tensor's, the first one {beyond}")
        found = []
        for i in np.unique(which):
            mine = which == i
            found.append((self.regions[i], mine, (at[mine] - self.starts[i]).astype(np.int64)))
        return found


class Block:
    """One block of a grid while it runs; cell: bytes of the smallest access to shared memory."""

    def __init__(self, number: int, threads: int, shared_bytes: int, cell: int, memory: Memory) -> None:
        self.number, self.threads, self.memory, self.shared_bytes = number + 1, threads, memory, shared_bytes
        shared = np.zeros(-(-shared_bytes // 16) * 16 + 16, np.uint8)
        self.shared = {width: shared.view(dtype) for width, dtype in UINT.items()}
        self.thread: Array = np.arange(threads)
        self.barriers = 0
        self.order = Order(shared_bytes, threads, cell)

    # Memory. `on`: for which threads an instruction is executed, None for all of them; at: addresses.

    def load(self, at: Array, width: int, count: int, on: Array | None) -> list[Array]:
        """`count` consecutive words of `width` bytes for every thread; 0 for those that do not load."""
        out = [np.zeros(self.threads, UINT[width]) for _ in range(count)]
        thread = self.thread if on is None else self.thread[on]
        for region, mine, offset in self.memory.find(at[thread], width * count) if len(thread) else ():
            self._ordered(region, offset, width * count, thread[mine], True)
            region.read(self.number, offset, width * count)
            for i, word in enumerate(out):
                word[thread[mine]] = region.words[width][offset // width + i]
        return out

    def store(self, at: Array, words: list[Array], width: int, on: Array | None) -> None:
        thread = self.thread if on is None else self.thread[on]
        for region, mine, offset in self.memory.find(at[thread], width * len(words)) if len(thread) else ():
            if region.written is None:
                region.written = np.zeros(region.size, np.int64)
            self._ordered(region, offset, width * len(words), thread[mine], False)
            if region.read_by_others(self.number, offset, width * len(words)):
                raise Fault("a store to what another block reads")
            for i, word in enumerate(words):
                region.words[width][offset // width + i] = word[thread[mine]]
            for i in range(width * len(words)):
                region.written[offset + i] = self.number << 40 | self.barriers << 16 | thread[mine]

    def _ordered(self, region: Region, offset: Array, size: int, thread: Array, read: bool) -> None:
        """Raise Fault where another block wrote what is accessed, or what is read was written by a thread not waited for."""
        if region.written is None:
            return
        for i in range(size):
            last = region.written[offset + i]
            if ((last != 0) & (last >> 40 != self.number)).any():
                raise Fault("an access to what another block writes")
            unseen = (last >> 40 == self.number) & (last >> 16 & 0xFFFFFF == self.barriers) & (last & 0xFFFF != thread)
            if read and unseen.any():
                raise Fault("another thread wrote what is read, and no barrier is between them")

    def load_shared(self, at: Array, width: int, count: int, on: Array | None) -> list[Array]:
        thread = self.thread if on is None else self.thread[on]
        offset = self._inside(at[thread], width * count)
        self.order.reads(thread // LANES, self.order.cells(offset, width * count))
        out = [np.zeros(self.threads, UINT[width]) for _ in range(count)]
        for i, word in enumerate(out):
            word[thread] = self.shared[width][offset // width + i]
        return out

    def store_shared(self, at: Array, words: list[Array], width: int, on: Array | None, copied: bool = False) -> None:
        thread = self.thread if on is None else self.thread[on]
        offset = self._inside(at[thread], width * len(words))
        where = [(offset // width + i, word[thread]) for i, word in enumerate(words)]
        differs = lambda: np.any([self.shared[width][i] != word for i, word in where], axis=0)
        changed = np.ones(len(thread), bool) if copied else differs()
        self.order.writes(thread // LANES, self.order.cells(offset, width * len(words)), changed, copied)
        for i, word in where:
            self.shared[width][i] = word
        if differs().any():
            raise Fault("two threads write different words to one place of shared memory")

    def copy(self, to: Array, at: Array, size: int, bytes_read: Array | None, on: Array | None) -> None:
        """cp.async of `size` bytes, of which none are read, and 0 written, where bytes_read says so."""
        on = np.ones(self.threads, bool) if on is None else on
        some = on if bytes_read is None else on & (bytes_read != 0)
        if bytes_read is not None and (some & (bytes_read != size)).any():
            raise Fault("cp.async that reads a part of its bytes is not known here")
        width = min(size, 8)
        words = self.load(at, width, size // width, some)
        self.store_shared(to, words, width, on, copied=True)

    def _inside(self, at: Array, size: int) -> Array:
        at = at.astype(np.int64)
        if len(astray := at[at % size != 0]):
            raise Fault(f"shared address {astray[0]} is not aligned to the {size} bytes of the access")
        if len(at) and at.max() + size > self.shared_bytes:
            raise Fault(f"an access to {size} bytes of shared memory at {at.max()}, of which there are {self.shared_bytes}")
        return at

    def wait(self) -> None:
        """A barrier of the block."""
        self.barriers += 1
        self.order.barrier()

    def all_or_none(self, on: Array) -> bool:
        """Whether all threads go another way, where it must be all or none."""
        if on.any() and not on.all():
            raise Fault("some threads branch and others do not")
        return bool(on.all())

    # Lanes of a warp

    def shuffle(self, kind: str, x: Array, by: Array) -> Array:
        lane, by = self.thread % LANES, by.astype(np.int64)
        source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by % LANES}[kind]
        source = np.where((source >= 0) & (source < LANES), source, lane)
        return x[self.thread // LANES * LANES + source]

    def reduce(self, kind: str, x: Array) -> Array:
        """One value for a warp, in all its lanes; x signed or not."""
        function = {"max": np.maximum, "min": np.minimum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or}[kind]
        return np.repeat(function.reduce(x.reshape(-1, LANES), axis=1, dtype=x.dtype), LANES).view(np.uint32)

    # Matrices: PTX ISA, "Warp Level Matrix Multiply-Accumulate" and "Asynchronous Warpgroup Level Matrix Instructions"

    def _rows(self, at: Array, warp: int, i: int) -> tuple[Array, Array, Array]:
        """(indices of the 8 x 8 elements of 2 bytes whose rows' addresses eight lanes of a warp hold, the warp, its cells)"""
        rows = self._inside(at[warp * LANES + 8 * i : warp * LANES + 8 * i + 8], 16)
        return rows[:, None] // 2 + np.arange(8), np.full(8, warp), self.order.cells(rows, 16)

    def load_matrices(self, at: Array, count: int, transposed: bool) -> list[Array]:
        out = [np.zeros(self.threads, np.uint32) for _ in range(count)]
        for warp in range(self.threads // LANES):
            for i, register in enumerate(out):
                where, warps, cells = self._rows(at, warp, i)
                self.order.reads(warps, cells)
                found = self.shared[2][where]
                found = np.ascontiguousarray(found.T if transposed else found)
                register[warp * LANES : (warp + 1) * LANES] = found.view(np.uint32).reshape(-1)
        return out

    def store_matrices(self, at: Array, registers: list[Array], transposed: bool) -> None:
        for warp in range(self.threads // LANES):
            for i, register in enumerate(registers):
                found = register[warp * LANES : (warp + 1) * LANES].copy().view(np.uint16).reshape(8, 8)
                found = found.T if transposed else found
                where, warps, cells = self._rows(at, warp, i)
                changed = (self.shared[2][where] != found).any(1)
                self.order.writes(warps, cells, changed)
                self.shared[2][where] = found

    def multiply(self, a: list[Array], b: list[Array], c: list[Array], dtype: str) -> list[Array]:
        """mma.m16n8k16: a (16, 16) times b (16, 8) plus c, for every warp."""
        warps = self.threads // LANES
        row, pair = np.arange(LANES) // 4, np.arange(LANES) % 4 * 2
        left, right = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
        for i, register in enumerate(a):
            x = halves(register, dtype).reshape(warps, LANES, 2)
            for j in range(2):
                left[:, row + i % 2 * 8, pair + i // 2 * 8 + j] = x[..., j]
        for i, register in enumerate(b):
            x = halves(register, dtype).reshape(warps, LANES, 2)
            for j in range(2):
                right[:, pair + i * 8 + j, row] = x[..., j]
        product = left @ right
        sums = [product[:, row + i // 2 * 8, pair + i % 2].reshape(-1) for i in range(4)]
        return [(x + old.view(np.float32)).astype(np.float32).view(np.uint32) for x, old in zip(sums, c, strict=True)]

    def multiply_group(
        self, n: int, dtype: str, d: list[Any], a: list[Array] | Array, b: Array, add: Array, signs: tuple[int, int],
        transposed: tuple[bool, bool],
    ) -> list[InFlight]:  # fmt: skip
        """wgmma.m64nNk16: a (64, 16), in registers or shared memory, times b (16, n), plus d where `add`; by warp groups."""
        local = np.arange(GROUP)
        row, pair = local // LANES * 16 + local % LANES // 4, local % 4 * 2
        d = [x.value if type(x) is InFlight else x for x in d]
        out = [x.copy() for x in d]
        for first in range(0, self.threads, GROUP):
            own = slice(first, first + GROUP)
            if isinstance(a, list):
                left = np.zeros((64, 16), np.float32)
                for i, register in enumerate(a):
                    x = halves(register[own], dtype).reshape(GROUP, 2)
                    for j in range(2):
                        left[row + i % 2 * 8, pair + i // 2 * 8 + j] = x[:, j]
            else:
                left = self._described(a[own], first, 64, dtype, transposed[0])
            product = left @ self._described(b[own], first, n, dtype, transposed[1]).T * (signs[0] * signs[1])
            for i, (new, old) in enumerate(zip(out, d, strict=True)):
                x = product[row + i // 2 % 2 * 8, i // 4 * 8 + pair + i % 2]
                new[own] = np.where(add[own], x + old[own].view(np.float32), x).astype(np.float32).view(np.uint32)
        return [InFlight(x, self.order.products[-1]) for x in out]

    def _described(self, descriptors: Array, first: int, rows: int, dtype: str, transposed: bool) -> Array:
        """The (rows, 16) elements that a matrix descriptor names, to the warp group from thread `first` on; transposed: rows
        are what is contiguous."""
        word = int(descriptors[0])
        if (descriptors != descriptors[0]).any():
            raise Fault("the threads of a warp group name different matrices")
        start, leading, stride = ((word >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        width = (16, 128, 64, 32)[word >> 62 & 3]  # bytes of a row of a swizzled atom
        m, k = np.arange(rows)[:, None], np.arange(16)[None]
        if width == 16:
            at = m // 8 * stride + k // 8 * leading
            at = at + (m % 8 * 2 + k % 8 * 16 if transposed else m % 8 * 16 + k % 8 * 2)
        elif transposed:
            at = m // (width // 2) * leading + m % (width // 2) * 2 + k // 8 * stride + k % 8 * width
        else:
            at = m // 8 * stride + m % 8 * width + k * 2
        at = at + start
        at = at ^ (at >> 7 & width // 16 - 1) << 4
        if at.max() + 2 > self.shared_bytes:
            raise Fault(f"a matrix reaches to {at.max()} in shared memory, of which there are {self.shared_bytes} bytes")
        self.order.multiplies(slice(first // LANES, (first + GROUP) // LANES), np.unique(at // self.order.cell))
        return halves(self.shared[2][at // 2], dtype)


def halves(x: Array, dtype: str) -> Array:
    """float16 or bfloat16, two to a register of 32 bits, as float32."""
    x = np.ascontiguousarray(x).view(np.uint16)
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else x.view(np.float16).astype(np.float32)

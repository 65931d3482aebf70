"""The order of what a block does in shared memory: by cell, who wrote and read it last, and what is still under way there.

A warp is taken to run in lockstep; warps meet at barriers only. What is asynchronous may happen at any time until it is waited
for. PTX ISA, "Asynchronous operations", "Memory consistency model" and "Async proxy" are the reference.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LANES = 32


class Fault(RuntimeError):
    """What a GPU would not do, or not always: an access out of bounds, one that is not aligned, a race, a branch in a warp."""


class InFlight:
    """A register of a product that nobody has waited for: it can be moved and accumulated to, nothing else."""

    __slots__ = ("group", "value")

    def __init__(self, value: Array, group: list[Any]) -> None:
        self.value, self.group = value, group

    def _used(self, *_: Any, **__: Any) -> NoReturn:
        raise Fault("a product's result is used before its wait")

    __array__ = __array_ufunc__ = __getattr__ = __and__ = __or__ = __xor__ = __invert__ = _used
    __eq__ = __ne__ = __add__ = __sub__ = __mul__ = __truediv__ = __lshift__ = __rshift__ = _used


class Order:
    """Of one block. Cells are numbered pieces of shared memory, as small as the smallest access."""

    def __init__(self, size: int, threads: int, cell: int) -> None:
        cells = -(-size // cell) + 16
        self.cell = cell
        self.now = 1  # barriers so far, counted from 1
        self.wrote, self.read = (np.zeros((threads // LANES, cells), np.int32) for _ in range(2))  # by warp: when, last
        self.last_write, self.last_read = (np.zeros(cells, np.int32) for _ in range(2))  # by whichever warp
        self.arriving = np.zeros(cells, bool)  # a copy writes it
        self.used = np.zeros(cells, np.int32)  # by so many products
        self.unfenced = np.zeros(cells, bool)  # ordinary stores that the asynchronous proxy need not see
        self.copies: list[list[tuple[Array, Array]]] = [[]]  # groups under way, the open one last
        self.products: list[list[Any]] = [[]]

    def cells(self, offset: Array, size: int) -> Array:
        """(accesses, cells of one) at offsets in bytes."""
        return (offset // self.cell)[..., None] + np.arange(max(size // self.cell, 1))

    def barrier(self) -> None:
        self.now += 1

    def fence(self) -> None:
        """What all threads wrote can be seen by the asynchronous proxy."""
        self.unfenced[:] = False

    def reads(self, warp: Array, cells: Array) -> None:
        """Warps (n,) read cells (n, m)."""
        if self.arriving[cells].any():
            raise Fault("shared memory is read while a copy writes it")
        warp = np.broadcast_to(warp[:, None], cells.shape)
        others = self._others(self.wrote, self.last_write, warp, cells)
        if others.any() and (others & (self.wrote[warp, cells] != self.now)).any():
            raise Fault("another warp wrote what is read in shared memory, and no barrier is between them")
        self.read[warp, cells] = self.last_read[cells] = self.now

    def writes(self, warp: Array, cells: Array, changed: Array, copied: bool = False) -> None:
        """Warps (n,) write cells (n, m); changed: which of them (n,) write something new. copied: by a copy that begins."""
        if self.arriving[cells].any():
            raise Fault("shared memory is written while a copy writes it")
        if self.used[cells].any():
            raise Fault("shared memory is written while a product reads it")
        warp = np.broadcast_to(warp[:, None], cells.shape)
        if self._others(self.read, self.last_read, warp, cells).any():
            raise Fault("shared memory is written that another warp has read, and no barrier is between them")
        if (self._others(self.wrote, self.last_write, warp, cells).any(1) & changed).any():
            raise Fault("another warp wrote something else there, and no barrier is between them")
        if copied:
            self.arriving[cells] = True
            self.copies[-1].append((warp, cells))
        else:
            self.wrote[warp, cells] = self.last_write[cells] = self.now
        self.unfenced[cells] = not copied

    def _others(self, when: Array, last: Array, warp: Array, cells: Array) -> Array:
        """Where a warp that is not the one at hand did something since the last barrier."""
        if not (last[cells] == self.now).any():
            return np.zeros(cells.shape, bool)
        count = (when[:, cells] == self.now).sum(0)
        return count > (when[warp, cells] == self.now)  # type: ignore[no-any-return]

    def commit_copies(self) -> None:
        self.copies.append([])

    def wait_copies(self, left: int) -> None:
        """Until all groups but so many have come; their writers see them, the others after a barrier."""
        done, self.copies = _split(self.copies, left)
        for group in done:
            for warp, cells in group:
                self.arriving[cells] = False
                self.wrote[warp, cells] = self.last_write[cells] = self.now

    def multiplies(self, warps: slice, cells: Array) -> None:
        """A warp group begins to read a matrix."""
        if self.arriving[cells].any():
            raise Fault("a product reads shared memory while a copy writes it")
        if (self.last_write[cells] == self.now).any():
            raise Fault("a product reads what was written in shared memory, and no barrier is between them")
        if self.unfenced[cells].any():
            raise Fault("a product reads what was stored in shared memory, and no fence of its proxy is between them")
        self.used[cells] += 1
        self.products[-1].append((warps, cells))

    def commit_products(self) -> None:
        self.products.append([])

    def wait_products(self, left: int) -> None:
        done, self.products = _split(self.products, left)
        for group in done:
            for warps, cells in group:
                self.used[cells] -= 1
                self.read[warps, cells] = self.last_read[cells] = self.now

    def landed(self, x: Any) -> Any:
        """A register's value once its product is waited for."""
        if type(x) is not InFlight or any(x.group is group for group in self.products):
            return x
        return x.value


def _split(groups: list[list[Any]], left: int) -> tuple[list[list[Any]], list[list[Any]]]:
    """(groups that are done where only `left` of the closed ones may be under way, the others)"""
    done = max(len(groups) - 1 - left, 0)
    return groups[:done], groups[done:]

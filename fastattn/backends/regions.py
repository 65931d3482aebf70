"""From row spans to regions: rectangles of work that together hold every visible (row, key) pair once per row.

A region says which rows look at which keys and what hides a key inside it: nothing, a band along a diagonal, or a bool
tile. Rows that see nothing are in no region. Every row of a (batch, head) is in at most one region, so a region's softmax
is the row's softmax and nothing has to be merged.

Runs of rows are found by their steps: over a run each span's start moves by a constant 0 or 1 a row and so does its stop.
Still start and stop: a rectangle. Still start, moving stop: a causal triangle. Both moving: a window.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import CustomPredicate, DensePredicate, LoweredMask, intersect
from ..problem import Problem
from .runs import row_runs
from .tile import Index, Tile, select, size_of

ROWS = 128  # rows of a masked tile; keys as well, where tiles may not depend on the sizes
MASK = 1 << 22  # elements of a masked tile, where neighbours are joined
WASTE = 1.15  # how much larger neighbours may get by being joined
ALIGN = 16  # keys of a band's tile are a multiple of this where the region reaches far enough: matrix kernels like it
SMALL = 32  # runs shorter than this are gathered into one masked tile
GATHER = 1 << 18  # score elements from which a key padding mask is worth a call per batch entry


class Band(NamedTuple):
    """Row i of a region sees its keys start + i * start_step up to stop + i * stop_step, counted within the region."""

    start: int
    stop: int
    start_step: int
    stop_step: int


CAUSAL = Band(0, 1, 0, 1)


@dataclass(frozen=True, eq=False)
class Region:
    """rows x keys of the batch entries b and heads h, and what hides keys inside: nothing, a band, or a bool tile."""

    b: slice
    h: slice
    rows: slice
    keys: Index
    hiding: Band | Tensor | None = None  # a tensor is bool (B|1, H|1, rows|1, keys), True = visible
    joint: bool = False  # whether keys that no row of their batch entry sees are among its keys

    @property
    def n_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def n_keys(self) -> int:
        return size_of(self.keys)

    @property
    def n_heads(self) -> int:
        """Pairs of batch entry and head."""
        return (self.b.stop - self.b.start) * (self.h.stop - self.h.start)

    def of(self, b: slice, h: slice) -> Region:
        """The region for these of its batch entries and heads, counted from its first."""
        hiding = self.hiding
        if isinstance(hiding, Tensor):
            hiding = select(select(hiding, 0, b), 1, h)
        b, h = (slice(x.start + own.start, x.stop + own.start) for x, own in ((b, self.b), (h, self.h)))
        return replace(self, b=b, h=h, hiding=hiding)

    def visible(self, rows: slice, keys: slice) -> Tensor | None:
        """The visible pairs of a part, given relative to the region; None where nothing is hidden."""
        if self.hiding is None:
            return None
        if isinstance(self.hiding, Tensor):
            return select(select(self.hiding, 2, rows), 3, keys)
        start, stop, start_step, stop_step = self.hiding
        start += rows.start * start_step - keys.start
        stop += rows.start * stop_step - keys.start
        n_rows, n_keys = size_of(rows), size_of(keys)
        if start + (n_rows - 1) * start_step <= 0 and stop >= n_keys:
            return None
        return band_tile(n_rows, n_keys, max(start, -n_rows), min(stop, n_keys), start_step, stop_step)

    def cut(self, first: int, last: int) -> Region | None:
        """Rows first to last of the region, without the keys that a band hides from all of them; None if that is all."""
        rows = slice(self.rows.start + first, self.rows.start + last)
        if not isinstance(self.hiding, Band):
            hiding = self.hiding if self.hiding is None else select(self.hiding, 2, slice(first, last))
            return replace(self, rows=rows, hiding=hiding)
        assert isinstance(self.keys, slice)
        start, stop, start_step, stop_step = self.hiding
        low = max(0, start + first * start_step)
        high = min(self.n_keys, stop + (last - 1) * stop_step)
        if high <= low:
            return None
        low = max(0, high - (high - low + ALIGN - 1) // ALIGN * ALIGN)
        band = Band(start + first * start_step - low, stop + first * stop_step - low, start_step, stop_step)
        hides = band.start + (last - first - 1) * start_step > 0 or band.stop < high - low
        keys = slice(self.keys.start + low, self.keys.start + high)
        return Region(self.b, self.h, rows, keys, band if hides else None)


@functools.lru_cache(maxsize=32)
def band_tile(n_rows: int, n_keys: int, start: int, stop: int, start_step: int, stop_step: int) -> Tensor:
    """(1, 1, n_rows, n_keys) bool: key j is visible to row i iff start + i * start_step <= j < stop + i * stop_step."""
    row, key = torch.arange(n_rows)[:, None], torch.arange(n_keys)
    return ((key >= start + row * start_step) & (key < stop + row * stop_step))[None, None]


Piece = tuple[slice, Index, Band | Tensor | None]  # rows, keys, hiding


def _band_pieces(first: int, last: int, start: int, stop: int, start_step: int, stop_step: int) -> Iterator[Piece]:
    """Rows [first, last) whose span [start, stop) moves by the given steps."""
    n = last - first
    if (start_step, stop_step) == (0, 0):
        if stop > start:
            yield slice(first, last), slice(start, stop), None
        return
    if (start_step, stop_step) == (0, 1) and stop == start:  # the first row sees nothing
        first, stop, n = first + 1, stop + 1, n - 1
    if (start_step, stop_step) == (1, 1) and stop == start:  # no row sees anything
        return
    if (start_step, stop_step) == (1, 0):  # the last rows see nothing
        n = min(n, stop - start)
    high = stop + (n - 1) * stop_step
    if n > 0 and high > start:
        yield slice(first, first + n), slice(start, high), Band(0, stop - start, start_step, stop_step)


class Masked(NamedTuple):
    """Rows, keys, and which of the keys each row sees: bool (B|1, H|1, rows|1, keys)."""

    rows: slice
    keys: Index
    visible: Tensor


def _mixed_pieces(first: int, last: int, start: Tensor, stop: Tensor) -> Iterator[Piece]:
    """Rows [first, last) of any spans (R, n): masked tiles over the keys that their rows see."""
    tiles = (_mixed_tile(row, min(row + ROWS, last), start, stop) for row in range(first, last, ROWS))
    for tile in _joined(tile for tile in tiles if tile is not None):
        yield from _tight(*tile)


def _mixed_tile(first: int, last: int, start: Tensor, stop: Tensor) -> Masked | None:
    """Rows [first, last) over the keys from the first to the last that one of a span's rows sees; None for no keys."""
    start, stop = start[:, first:last, None], stop[:, first:last, None]
    some = stop > start
    ranges: list[list[int]] = []  # one of each span, those that touch made one
    for low, high in sorted((int(a[m].min()), int(b[m].max())) for a, b, m in zip(start, stop, some) if bool(m.any())):
        if ranges and low <= ranges[-1][1]:
            ranges[-1][1] = max(ranges[-1][1], high)
        else:
            ranges.append([low, high])
    if not ranges:
        return None
    key = torch.cat([torch.arange(low, high, device=start.device) for low, high in ranges])
    visible = ((key >= start) & (key < stop)).any(0)[None, None]
    return Masked(slice(first, last), slice(*ranges[0]) if len(ranges) == 1 else key, visible)


def _joined(found: Iterable[Masked]) -> Iterator[Masked]:
    """Masked tiles, neighbours made one where they see nearly the same keys: kernels like many rows.

    A tile with keys in its midst that none of its rows sees stays alone; `_tight` can drop them.
    """
    group: list[Masked] = []
    low = high = area = 0  # the group's keys, and the elements of its tiles
    for rows, keys, visible in found:
        seen = any_row(visible).nonzero().squeeze(1)
        if len(seen) == 0:
            continue
        start, stop = int(seen[0]), int(seen[-1]) + 1
        if not isinstance(keys, slice) or stop - start > len(seen):
            yield from _one(group, low, high)
            group = []
            yield Masked(rows, keys, visible)
            continue
        tile = Masked(rows, slice(keys.start + start, keys.start + stop), visible[..., start:stop])
        own = size_of(rows) * (stop - start)
        if group and group[-1].rows.stop == rows.start:
            wide = min(low, keys.start + start), max(high, keys.start + stop)
            joint = (rows.stop - group[0].rows.start) * (wide[1] - wide[0])
            if joint * visible.shape[0] * visible.shape[1] <= MASK and joint <= WASTE * (area + own):
                group.append(tile)
                (low, high), area = wide, area + own
                continue
        yield from _one(group, low, high)
        group, low, high, area = [tile], keys.start + start, keys.start + stop, own
    yield from _one(group, low, high)


def _one(group: list[Masked], low: int, high: int) -> Iterator[Masked]:
    """The tiles of consecutive rows as one over the keys from low to high; nothing for none."""
    if len(group) <= 1:
        yield from group
        return
    rows = slice(group[0].rows.start, group[-1].rows.stop)
    joint = group[0].visible.new_zeros(*group[0].visible.shape[:2], size_of(rows), high - low)
    for part in group:
        assert isinstance(part.keys, slice)
        at = slice(part.rows.start - rows.start, part.rows.stop - rows.start)
        joint[:, :, at, part.keys.start - low : part.keys.stop - low] = part.visible
    yield Masked(rows, slice(low, high), joint)


def _tight(rows: slice, keys: Index, mask: Tensor) -> Iterator[Piece]:
    """A masked piece without the keys that none of its rows sees (they may hold anything, NaN included)."""
    seen = any_row(mask)
    n_seen = int(seen.sum())
    if n_seen == 0:
        return
    if n_seen < mask.shape[3]:
        index = seen.nonzero().squeeze(1)
        first, last = int(index[0]), int(index[-1]) + 1
        mask = mask[..., first:last] if last - first == n_seen else mask.index_select(3, index)
        if isinstance(keys, slice):
            keys = slice(keys.start + first, keys.start + last) if last - first == n_seen else index + keys.start
        else:
            keys = keys.index_select(0, index)
    yield rows, keys, None if _is_all(mask) else mask


def any_row(mask: Tensor) -> Tensor:
    """Which keys some row of a mask (B, H, rows, keys) sees. # bool (keys,)"""
    return mask.view(torch.uint8).amax(2).amax((0, 1)).bool()  # far faster than `any`, and than one reduction


def _is_all(mask: Tensor) -> bool:
    return bool(mask.view(torch.uint8).amin(2).amin())


def _run_ends(start: Tensor, stop: Tensor) -> list[tuple[int, int, int, int]]:
    """Maximal runs (first, last, start_step, stop_step) of rows of one span (n,); steps -1 where rows follow no rule."""
    n = start.shape[0]
    if n == 1:
        return [(0, 1, 0, 0)]
    start_step, stop_step = start.diff(), stop.diff()
    regular = (start_step >= 0) & (start_step <= 1) & (stop_step >= 0) & (stop_step <= 1)
    code = torch.where(regular, 2 * start_step + stop_step, -1)
    change = (code[1:] != code[:-1]).nonzero().squeeze(1) + 1
    edges = [0, *change.tolist(), n - 1]
    codes = code[torch.tensor(edges[:-1])].tolist()
    runs, row = [], 0
    for step, last in zip(codes, edges[1:], strict=True):  # steps [first, last) of code `step` join rows first .. last
        if step >= 0 and last > row:
            runs.append((row, last + 1, step // 2, step % 2))
            row = last + 1
        elif step < 0 and last > row:
            runs.append((row, last, -1, -1))
            row = last
    if row < n:  # the last row follows no rule
        runs.append((row, n, 0, 0))
    return runs


def _pieces(start: Tensor, stop: Tensor) -> list[Piece]:
    """The pieces of one (batch, head): start, stop (R, n_q) on the CPU, disjoint, clamped."""
    n = start.shape[1]
    if start.shape[0] > 1:
        if n > 1 and not bool(start.diff().any() | stop.diff().any()):
            return [
                (slice(0, n), keys, hiding) for _, keys, hiding in _mixed_pieces(0, 1, start[:, :1], stop[:, :1])
            ]
        return list(_mixed_pieces(0, n, start, stop))
    a, b = start[0], stop[0]
    pieces: list[Piece] = []
    runs = _run_ends(a, b)
    firsts = torch.tensor([run[0] for run in runs])
    a0, b0 = a[firsts].tolist(), b[firsts].tolist()
    pending = -1  # first row of a group of short runs
    for (first, last, start_step, stop_step), lo, hi in zip(runs, a0, b0, strict=True):
        short = start_step < 0 or (last - first < SMALL and n >= SMALL)
        if not short:
            if pending >= 0:
                pieces.extend(_mixed_pieces(pending, first, start, stop))
            pending = -1
            pieces.extend(_band_pieces(first, last, lo, hi, start_step, stop_step))
        elif pending < 0:
            pending = first
    if pending >= 0:
        pieces.extend(_mixed_pieces(pending, n, start, stop))
    return pieces


@functools.lru_cache(maxsize=32)
def _affine_pieces(spans: tuple, n_q: int, n_k: int) -> list[Piece]:
    """The pieces of affine spans with integer constants, kept: models call with the same few again and again."""
    return _pieces(*(x[0, 0] for x in LoweredMask(n_q, n_k, spans, None, ()).rows_tensors("cpu")))


def is_static(mask: LoweredMask) -> bool:
    return mask.spans is not None and not any(isinstance(bound.const, Tensor) for span in mask.spans for bound in span)


def _span_pieces(p: Problem) -> Iterator[tuple[slice, slice, list[Piece]]]:
    """(batch entries, heads, pieces): neighbours with equal spans share their pieces."""
    everything = slice(0, p.n_b), slice(0, p.n_h)
    if is_static(p.mask):
        yield (*everything, _affine_pieces(p.mask.spans, p.n_q, p.n_k))
        return
    start, stop = (x.cpu() for x in p.mask.rows_tensors(p.q.device))
    for b in _equal_runs(start, stop, 0, p.n_b):
        start_b, stop_b = start[b.start : b.start + 1], stop[b.start : b.start + 1]
        for h in _equal_runs(start_b, stop_b, 1, p.n_h):
            for heads in _whole_groups(h, p.n_h // p.n_kv):
                yield b, heads, _pieces(start_b[0, h.start % start.shape[1]], stop_b[0, h.start % start.shape[1]])


def _equal_runs(start: Tensor, stop: Tensor, dim: int, n: int) -> Iterator[slice]:
    """Maximal runs of equal slices along `dim`; one run of n where the dimension is broadcast."""
    if start.shape[dim] == 1:
        yield slice(0, n)
        return
    first = 0
    for i in range(1, n + 1):
        same = i < n and all(torch.equal(x.select(dim, i), x.select(dim, first)) for x in (start, stop))
        if not same:
            yield slice(first, i)
            first = i


def _whole_groups(h: slice, group: int) -> Iterator[slice]:
    """Heads cut so that each part covers whole key heads or a single query head."""
    if h.start % group == 0 and h.stop % group == 0:
        yield h
    else:
        yield from (slice(i, i + 1) for i in range(h.start, h.stop))


def regions(p: Problem) -> Iterator[Region]:
    """Every region of the call."""
    if p.n_b * p.n_h * p.n_q * p.n_k == 0:
        return
    p = replace(p, mask=_without_runs(p)) if p.mask.predicates else p
    for b, h, pieces in _span_pieces(p):
        for piece in pieces:
            region = Region(b, h, *_on(piece, p.q.device))
            if p.mask.predicates:
                yield from _refine(p, region)
            else:
                yield region


def _without_runs(p: Problem) -> LoweredMask:
    """p's mask with those dense predicates among its spans whose every row is one run of keys."""
    mask, rest = p.mask, []
    lowered = replace(mask, predicates=())
    for predicate in mask.predicates:
        found = _as_spans(p, predicate.tensor) if isinstance(predicate, DensePredicate) else None
        if found is None:
            rest.append(predicate)
        else:
            lowered = intersect(lowered, found, p.q.device)
    return replace(lowered, predicates=tuple(rest))


def _as_spans(p: Problem, dense: Tensor) -> LoweredMask | None:
    """A dense mask (B|1, H|1, n_q|1, n_k|1) as row spans; None where it is none, or where it is not worth a call per slice."""
    dense = dense[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in dense.stride())]  # what was expanded
    n_b, n_h, n_rows, n_keys = dense.shape
    if n_keys == 1 or p.n_b * p.n_h * p.n_q * p.n_k < GATHER * n_b * n_h:
        return None
    found = row_runs(dense)
    if found is None:
        return None
    start, stop = (x[:, :, None].expand(-1, -1, -1, p.n_q) if n_rows == 1 else x[:, :, None] for x in found)
    return LoweredMask(p.n_q, p.n_k, None, (start, stop))


def _on(piece: Piece, device: torch.device) -> Piece:
    if device.type == "cpu":
        return piece
    rows, keys, hiding = piece
    return (
        rows,
        keys.to(device) if isinstance(keys, Tensor) else keys,
        hiding.to(device) if isinstance(hiding, Tensor) else hiding,
    )


def fixed(p: Problem) -> Iterator[Region]:
    """Tiles of ROWS rows with everything that they hide, for calls of one batch entry: they depend on nothing but the mask.

    Keys come in whole blocks of ROWS, so that every row meets the same tiles of keys whatever the rows beside it see.
    """
    start, stop = p.mask.rows_tensors(p.q.device)
    whole = slice(0, 1), slice(0, p.n_h)
    for first in range(0, p.n_q, ROWS):
        rows = slice(first, min(first + ROWS, p.n_q))
        own = _mixed_tile_of(start[0, :, :, rows], stop[0, :, :, rows])
        if own is None:
            continue
        keys, visible = own
        region = Region(*whole, rows, keys, None)
        if p.mask.predicates:
            visible = visible & predicate_tile(p, region, rows)
        yield replace(region, hiding=visible)


def _mixed_tile_of(start: Tensor, stop: Tensor) -> tuple[slice, Tensor] | None:
    """(the keys that spans (H|1, R, rows) reach, bool (1, H|1, rows, keys)); None where they reach none."""
    some = stop > start
    if not bool(some.any()):
        return None
    keys = slice(int(start[some].min()) // ROWS * ROWS, -(-int(stop[some].max()) // ROWS) * ROWS)
    key = torch.arange(keys.start, keys.stop, device=start.device)
    return keys, ((key >= start[..., None]) & (key < stop[..., None])).any(1)[None]


def predicate_tile(p: Problem, region: Region, rows: slice) -> Tensor:
    """Where the predicates let `rows` of the region see its keys: bool (B|1, H|1, rows|1, keys)."""
    tile = Tile(p, region.b, region.h, rows, region.keys)
    visible = None
    for predicate in p.mask.predicates:
        if isinstance(predicate, DensePredicate):
            part = select(select(tile.heads(predicate.tensor), 2, rows), 3, region.keys)
        else:
            assert isinstance(predicate, CustomPredicate)
            part = predicate.visible(tile.b, tile.h, tile.q, tile.k)
        visible = part if visible is None else visible & part
    assert visible is not None
    if visible.shape[3] == 1:
        visible = visible.expand(*visible.shape[:3], region.n_keys)
    return visible


def _by_columns_only(p: Problem) -> bool:
    """Whether every predicate hides whole keys of a batch entry: key padding written as a dense mask."""
    return all(isinstance(x, DensePredicate) and x.tensor.shape[1:3] == (1, 1) for x in p.mask.predicates)


def _refine(p: Problem, region: Region) -> Iterator[Region]:
    """The region under the mask's predicates, without the keys that they hide from all of its rows."""
    if _by_columns_only(p) and region.hiding is None:
        visible = predicate_tile(p, region, region.rows)
        if visible.shape[0] > 1 and region.n_rows * region.n_keys * size_of(region.h) >= GATHER:
            for b in range(region.b.start, region.b.stop):
                part = replace(region, b=slice(b, b + 1))
                yield from _pieces_of(part, Masked(region.rows, region.keys, visible[b - region.b.start][None]))
        else:
            yield from _pieces_of(region, Masked(region.rows, region.keys, visible))
        return
    for tile in _joined(_masked_tiles(p, region)):
        yield from _pieces_of(region, tile)


def _masked_tiles(p: Problem, region: Region) -> Iterator[Masked]:
    """The region under the mask's predicates, a few rows at a time."""
    for first in range(0, region.n_rows, ROWS):
        within = slice(first, min(first + ROWS, region.n_rows))
        rows = slice(region.rows.start + within.start, region.rows.start + within.stop)
        visible = predicate_tile(p, region, rows)
        own = region.visible(within, slice(0, region.n_keys))
        yield Masked(rows, region.keys, visible if own is None else visible & own.to(visible.device))


def _pieces_of(region: Region, tile: Masked) -> Iterator[Region]:
    for piece in _tight(*tile):
        yield Region(region.b, region.h, *piece)

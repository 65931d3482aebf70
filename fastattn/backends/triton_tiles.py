"""Which tiles the passes of the Triton backend visit, as far as it takes a pre-pass: of bool masks and of columns.

The bits of a bool mask and the map of its tiles are made once for every verb (kernels/dense.py), and for every pass the lists
of the tiles that it visits; nothing waits for the device, and nothing is kept between calls.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..kernels import dense, masks
from ..kernels.launch import Launch
from ..masks import DensePredicate
from ..problem import Problem
from . import triton_call
from .triton_call import Call, cdiv, on_device

CELL, WORD = 16, 32  # kernels/dense.py, kernels/masks.py
PACK = Launch(16, 512, 4, 1)  # of the pass over a bool mask
TURN = Launch(256, 32, 4, 1)  # and of the one that turns its bits
MAP = Launch(64, 256, 4, 1)  # of the map's pass over the bits
CHUNK = 64  # tiles of a list that are looked up at once
CHUNK_WORDS = 16  # words of shown keys that are made at once


def prepare(p: Problem) -> Call:
    """The arguments that every kernel of p takes, with the tile map of its bool tensors."""
    call = triton_call.prepare(p)
    if not call.flags[9]:
        return call
    (spans, tensors, other), *rest = call.data
    call = call._replace(data=((spans, tuple(packed(*x) if x else x for x in tensors), other), *rest))
    cells, apart = cell_map(p, call)
    return call._replace(cells=cells, flags=(*call.flags[:10], *apart, *call.flags[12:]))


def packed(x: Tensor, strides: tuple[Any, ...], wide: int | None) -> tuple[Any, ...]:
    """(bits, strides, wide) of a bool tensor as uint8 (B|1, H|1, rows|1, keys|1), its plane_strides and wide_plane."""
    n_b, n_h, n_q, n_k = x.shape
    words = _words(x, x.shape)
    programs = n_b * n_h * cdiv(n_q, PACK.block_q) * cdiv(words.shape[3] * WORD, PACK.block_k)
    with on_device(x):
        triton_call.run(
            dense.pack_bits, programs, PACK, x, strides, wide, words, n_q, n_k, n_h, PACK.block_q, PACK.block_k
        )
    return _planes(words, n_k)


def turned(x: Tensor, bits: tuple[Any, ...]) -> tuple[Any, ...]:
    """(bits, strides, wide) of the transpose of a bool tensor from its own, for a pass of tiles of keys."""
    n_b, n_h, n_q, n_k = x.shape
    words = _words(x, (n_b, n_h, n_k, n_q))
    programs = n_b * n_h * cdiv(n_k, TURN.block_k) * cdiv(words.shape[3] * WORD, TURN.block_q)
    with on_device(x):
        triton_call.run(dense.turn_bits, programs, TURN, *bits, words, n_q, n_k, n_h, TURN.block_q, TURN.block_k)
    return _planes(words, n_q)


def _words(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for the bits of a tensor of that shape: `row_words`."""
    return x.new_empty(*shape[:3], cdiv(shape[3], 512) * 16, dtype=torch.int32)


def _planes(words: Tensor, n: int) -> tuple[Any, ...]:
    """What kernels take of words whose rows hold n bits."""
    leads = tuple(stride if size > 1 else 0 for size, stride in zip(words.shape[:3], words.stride()[:3], strict=True))
    reach = words.shape[2] * words.shape[3] >= 1 << 31
    return words, ((leads[0], 0), (leads[1], 0), leads[2], int(n > 1)), 1 if reach else None


def cell_map(p: Problem, call: Call) -> tuple[Tensor, tuple[int, int]]:
    """The classes of all cells, int8 (B|1, H|1, cells of rows|1, of keys|1), and whether they tell rows and keys apart."""
    shapes = [x.tensor.shape for x in p.mask.predicates if isinstance(x, DensePredicate)]
    n_b, n_h, n_q, n_k = torch.broadcast_shapes(*shapes)
    cells = torch.empty(n_b, n_h, cdiv(n_q, CELL), cdiv(n_k, CELL), dtype=torch.int8, device=p.q.device)
    programs = cdiv(n_q, MAP.block_q) * cdiv(n_k, MAP.block_k) * n_b * n_h
    with on_device(p.q):
        triton_call.run(
            dense.cell_map, programs, MAP, call.data[0][1], cells, n_q, n_k, n_h, call.predicates, MAP.block_q,
            MAP.block_k // WORD,
        )  # fmt: skip
    return cells, (int(n_q > 1), int(n_k > 1))


def row_pass(p: Problem, call: Call, how: Launch) -> tuple[Any, ...]:
    """call.data for a pass of tiles of rows over keys."""
    return call.data if call.cells is None else _with(call, _lists(p, call, how, call.data[0], False))


def column_pass(p: Problem, call: Call, how: Launch) -> tuple[Any, ...]:
    """call.data for a pass of tiles of keys over rows."""
    if not call.rows and call.cells is None:
        return call.data
    data = _with(call, key_bounds(p, call, how.block_k) if call.rows else ())
    if call.cells is None:
        return data
    (spans, bits, lists), *rest = _with(call, _lists(p, call, how, data[0], True))
    tensors = [x.tensor if isinstance(x, DensePredicate) else None for x in p.mask.predicates]
    columns = (known if x is None else turned(x, known) for x, known in itertools.zip_longest(tensors, bits))
    return (spans, tuple(columns), lists), *rest


def tile_pass(call: Call) -> tuple[Any, ...]:
    """call.data for a pass that looks tiles up one by one."""
    return call.data if call.cells is None else _with(call, _map_args(call.cells))


def _map_args(cells: Tensor) -> tuple[Any, ...]:
    n_b, n_h = cells.shape[:2]
    return cells, (n_h if n_b > 1 else 0), int(n_h > 1)


def _with(call: Call, tiles: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*call.data[0][:2], tiles), *call.data[1:]


def key_bounds(p: Problem, call: Call, block_k: int) -> tuple[Any, ...]:
    """(table, entry and head strides in spans) of the rows that each key tile needs, where spans are tensors."""
    start, stop = call.data[0][0][:2]
    n_b, n_h, spans, n_q = start.shape
    tiles = cdiv(p.n_k, block_k)
    bounds = torch.empty(n_b * n_h * spans, tiles, 4, dtype=torch.int32, device=start.device)
    how = Launch(0, block_k, 4, 1)
    programs = tiles * n_b * n_h * spans
    with on_device(start):
        triton_call.run(masks.span_bounds, programs, how, start, stop, bounds, n_q, p.n_k, tiles, block_k, 256)
    return bounds, (n_h * spans if n_b > 1 else 0), (spans if n_h > 1 else 0)


def _lists(p: Problem, call: Call, how: Launch, mask: tuple[Any, ...], columns: bool) -> tuple[Any, ...]:
    """The lists of a pass with tiles of how.block_q rows and how.block_k keys, with their strides: kernels/dense.py."""
    assert call.cells is not None
    n_b, n_h = _leading(call, p.n_b)
    q_tiles, k_tiles = cdiv(p.n_q, how.block_q), cdiv(p.n_k, how.block_k)
    own, others = (k_tiles, q_tiles) if columns else (q_tiles, k_tiles)
    lists = torch.empty(n_b, n_h, call.spans, own, 2 + others, dtype=torch.int32, device=p.q.device)
    with on_device(p.q):
        triton_call.run(
            dense.tile_lists, own * n_b * n_h * call.spans, Launch(0, 0, 4, 1), (mask[0], (), mask[2]),
            _map_args(call.cells), lists, *call.ints, n_h, call.flags, call.spans, (how.block_q, how.block_k), columns, CHUNK,
        )  # fmt: skip
    found = lists, (n_h * call.spans if n_b > 1 else 0), (call.spans if n_h > 1 else 0)
    if columns or call.flags[9] != 1:
        return found
    shown = torch.empty(n_b, n_h, call.spans, own, others, cdiv(how.block_k, WORD), dtype=torch.int32, device=p.q.device)
    with on_device(p.q):
        triton_call.run(
            dense.shown_keys, own * n_b * n_h * call.spans, Launch(0, 0, 4, 1), mask, found, shown, *call.ints, n_h, call.flags,
            call.predicates, call.spans, (how.block_q, how.block_k), CHUNK_WORDS,
        )  # fmt: skip
    return *found, shown


def _leading(call: Call, n_b: int) -> tuple[int, int]:
    """(entries, heads) that differ in what they see: 1 where all are alike."""
    assert call.cells is not None
    entries, heads = call.cells.shape[:2]
    spans = call.data[0][0]
    if call.rows:
        return max(entries, spans[0].shape[0]), max(heads, spans[0].shape[1])
    by_entry = any(x is not None and x.shape[0] > 1 for x in spans[:2])
    return (n_b if by_entry else entries), heads

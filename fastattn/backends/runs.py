"""Dense bool masks read as row spans: many a mask that arrives as a matrix shows each row one run of keys.

A mask's bytes are looked at eight at a time, as int64 words, so that the reading costs a small part of the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 8  # bytes
BYTE_SUM = 255  # words of ones that add up without a carry from byte to byte
CHUNK = 1 << 20  # bytes looked at in one go: they stay in the cache


def row_runs(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """The run of visible keys of every row of a bool mask (..., n_k), n_k >= 1; None where some row has two.

    Returns:
        start, stop: int32 (...), start == stop == 0 for a row that sees nothing.
    """
    n_k = mask.shape[-1]
    rows = mask.reshape(-1, n_k)
    found, first, size = [], 0, CHUNK // 32  # a mask that is no runs mostly shows it early
    while first < rows.shape[0]:
        last = first + max(1, size // n_k)
        part = _runs_of(rows[first:last])
        if part is None:
            return None
        found.append(part)
        first, size = last, CHUNK
    if not found:
        nothing = mask.new_zeros(mask.shape[:-1], dtype=torch.int32)
        return nothing, nothing
    start, stop = (torch.cat(x).view(mask.shape[:-1]) for x in zip(*found))
    return start, stop


def _runs_of(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """`row_runs` of a few rows (n, n_k)."""
    n, n_k = rows.shape
    padded = rows.new_zeros(2, n, -(-n_k // WORD) * WORD)
    seen, begins = padded
    seen[:, :n_k] = rows
    begins[:, 0] = rows[:, 0]
    torch.gt(rows[:, 1:], rows[:, :-1], out=begins[:, 1:n_k])  # where a run begins
    if bool((_count(begins) > 1).any()):
        return None
    words = begins.view(torch.int64)
    word = words.argmax(1, keepdim=True)  # the only one that is not zero, the first where all are
    start = word.squeeze(1) * WORD + words.gather(1, word).view(torch.uint8).argmax(1)
    return start.int(), (start + _count(seen)).int()


def _count(x: Tensor) -> Tensor:
    """How many are True in every row of x, bool (n, a multiple of 8)."""
    words = x.view(torch.int64)
    total = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    for first in range(0, words.shape[1], BYTE_SUM):
        bytewise = words[:, first : first + BYTE_SUM].sum(1, keepdim=True)
        total += bytewise.view(torch.uint8).sum(1)
    return total

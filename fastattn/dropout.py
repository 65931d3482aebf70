"""Dropout bits from a counter: the same (seed, b, h, q, k) gives the same bit on every backend, whatever the tiling.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the counter
(k, q, h, b) and a key of two words; the first output word decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
ROUNDS = 10


def _product(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of x * multiplier. int64 wraps, and its 64 bits are those of the unsigned product."""
    product = x * multiplier
    return (product >> 32) & _WORD, product & _WORD


def philox(key0: Tensor | int, key1: Tensor | int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """The first word of Philox4x32-10.

    Args:
        key0, key1, c0, c1, c2, c3: uint32 values held in int64, broadcastable to each other. What depends on few
            dimensions is computed on few: the rounds before the four words have met stay small.

    Returns:
        int64 tensor of uint32 values in the broadcast shape.
    """
    for i in range(ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        if i == ROUNDS - 1:  # of the last round only word 0 is wanted
            high1 = (c2 * _MULTIPLIERS[1] >> 32) & _WORD
            return high1 ^ c1 ^ key0
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    raise AssertionError


def threshold(p: float) -> int:
    """The word from which an element is kept: p * 2^32, rounded down."""
    return int(p * 4294967296.0)


def keep_mask(rng: Tensor, p: float, b: Tensor, h: Tensor, q: Tensor, k: Tensor, b_slice: slice, n_b: int) -> Tensor:
    """Which weights dropout keeps: word 0 of philox(key, (k, q, h, b)) >= p * 2^32.

    Args:
        rng: int64 (G, 2), one key for each group of n_b // G batch entries.
        b, h, q, k: int64 coordinates, broadcastable to (B, H, Lq, Lk).
        b_slice: the storage batch entries that the coordinates cover, of n_b.

    Returns:
        bool, (B|1, H, Lq, Lk).
    """
    key = rng & _WORD
    if rng.shape[0] == 1:
        key0, key1 = key[0, 0], key[0, 1]
    else:
        group = torch.arange(b_slice.start, b_slice.stop, device=rng.device) // (n_b // rng.shape[0])
        key0, key1 = key[group, 0][:, None, None, None], key[group, 1][:, None, None, None]
    return philox(key0, key1, k & _WORD, q & _WORD, h & _WORD, b & _WORD) >= threshold(p)

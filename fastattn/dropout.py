"""Dropout bits from a counter: the same (seed, b, h, q, k) gives the same bit on every backend, whatever the tiling.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the counter
(k // 4, q, h, b) and a key of two words. Its four output words decide for four keys in a row: word k % 4 for key k.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
ROUNDS = 10
_CHUNK = 1 << 15  # counters at a time: the words being mixed stay in the cache

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key0: Tensor | int, key1: Tensor | int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Words:
    """Philox4x32-10.

    Args:
        key0, key1, c0, c1, c2, c3: uint32 values held in int64, broadcastable to each other. What depends on few
            dimensions is computed on few: the first rounds, before the four words have met, stay small.

    Returns:
        Four words, int64 tensors of uint32 values, each in the broadcast shape.
    """
    for i in range(ROUNDS):
        # int64 wraps, and its 64 bits are those of the unsigned product; bits above a word are cleared after mixing
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ key0) & _WORD
        c2 = ((product0 >> 32) ^ c3 ^ key1) & _WORD
        c1, c3 = product1, product0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
        if i == ROUNDS - 1:
            return c0, c1 & _WORD, c2, c3 & _WORD
    raise AssertionError


def threshold(p: float) -> int:
    """The word from which an element is kept: p * 2^32, rounded down."""
    return int(p * 4294967296.0)


def keep_mask(rng: Tensor, p: float, b: Tensor, h: Tensor, q: Tensor, k: Tensor, b_slice: slice, n_b: int) -> Tensor:
    """Which weights dropout keeps: word k % 4 of philox(key, (k // 4, q, h, b)) >= p * 2^32.

    Args:
        rng: int64 (G, 2), one key for each group of n_b // G batch entries.
        b, h, q, k: int64 coordinates: (B|1, 1, Lq|1, 1), (B|1, H, 1, 1), (B|1, 1, Lq, 1) and (B|1, 1, 1, Lk).
        b_slice: the storage batch entries that the coordinates cover, of n_b.

    Returns:
        bool, (B|1, H, Lq, Lk).
    """
    key = rng & _WORD
    if rng.shape[0] > 1:
        key = key[torch.arange(b_slice.start, b_slice.stop, device=rng.device) // (n_b // rng.shape[0])]
    keys = key[:, 0, None, None, None], key[:, 1, None, None, None]
    if k.shape[0] == 1:
        return _keep(p, *keys, b, h, q, k)

    def entry(x: Tensor, i: int) -> Tensor:
        return x[i : i + 1] if x.shape[0] > 1 else x

    return torch.cat([_keep(p, *(entry(x, i) for x in (*keys, b, h, q, k))) for i in range(k.shape[0])])


def _keep(p: float, key0: Tensor, key1: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """`keep_mask` for one row of key coordinates."""
    k = (k & _WORD).flatten()
    fours, which = torch.unique_consecutive(k >> 2, return_inverse=True)
    n_q, n_b = q.shape[2], max(x.shape[0] for x in (key0, b, h, q))
    parts = []
    step = max(1, _CHUNK // max(1, n_b * h.shape[1] * len(fours)))
    counter0, counter2 = fours[None, None, None], h & _WORD
    for start in range(0, max(n_q, 1), step):
        rows = slice(start, start + step)
        counter3 = (b if b.shape[2] == 1 else b[:, :, rows]) & _WORD
        words = philox(key0, key1, counter0, q[:, :, rows] & _WORD, counter2, counter3)
        parts.append(torch.stack([word >= threshold(p) for word in words], -1))  # (B|1, H, rows, fours, 4)
    kept = torch.cat(parts, 2).flatten(3) if len(parts) > 1 else parts[0].flatten(3)
    index = which * 4 + (k & 3)
    if len(index) and torch.equal(index, torch.arange(len(index), device=index.device) + index[0]):
        return kept.narrow(3, int(index[0]), len(index))
    return kept.index_select(3, index)

"""Kernels against float64, forward and backward: a pairwise covering array over every feature, size and dtype, and every mask
with every score."""

import pytest
import torch
from device_cases import DEVICE, MASKS
from pairs import pairwise
from test_covering import FACTORS, SCORES, check, describe

ROWS = pairwise(
    {
        **FACTORS,
        "mask": list(MASKS),
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "n_q": [47, 1, 3, 33],
        "heads": [(2, 2), (2, 1), (3, 1)],
        "head_dim": [8, 16, 40, 59, 1],
    }
)


@pytest.mark.parametrize("i", range(len(ROWS)), ids=lambda i: describe(ROWS[i]))
def test_pairwise(i):
    row = dict(ROWS[i])
    n_q, keys, v_dim = row["n_q"], row.pop("keys"), row.pop("v_dim")
    n_k = {"equal": n_q, "fewer": max(1, n_q - n_q // 3), "more": n_q + 2 + n_q // 4}[keys]
    v_dim = row["head_dim"] if v_dim == "equal" else row["head_dim"] // 2 + 3
    n_b = 2 if n_q < 10 else 1
    check(**row, n_k=n_k, v_dim=v_dim, n_b=n_b, backend="triton", masks=MASKS, lse=(i % 2 == 0,), device=DEVICE)


SEEN = {(row["mask"], row["score"]) for row in ROWS if row["n_q"] > 3}
UNSEEN = [(mask, score) for mask in MASKS for score in SCORES if (mask, score) not in SEEN]


@pytest.mark.parametrize(("mask", "score"), UNSEEN)
def test_every_mask_with_every_score(mask, score):
    """At one odd size, where most passes have two tiles, the second ragged: the pairs that the array has at tiny sizes only."""
    check(
        mask, score, True, (2, 1), 0.0, torch.float32, 21, 37, 8, 8, False, n_b=1, backend="triton", masks=MASKS, lse=(True,),
        device=DEVICE,
    )  # fmt: skip

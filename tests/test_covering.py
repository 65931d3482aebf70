"""Against float64: a pairwise covering array over every feature and size, and every mask with every score."""

import itertools

import pytest
import torch
from bars import assert_within
from cases import MASKS, SCORES, leaf, tensors
from pairs import pairwise

import fastattn as fa

FACTORS = {
    "mask": list(MASKS),
    "score": list(SCORES),
    "sinks": [False, True],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "dropout": [0.0, 0.3],
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "n_q": [1, 3, 113, 127, 203, 1023, 1025],
    "keys": ["equal", "fewer", "more"],
    "head_dim": [1, 8, 40, 59, 80, 96, 111, 128, 192, 256, 512],
    "v_dim": ["equal", "other"],
    "strided": [False, True],
}

ROWS = pairwise(FACTORS)


def test_covering_array_covers():
    for a, b in itertools.combinations(FACTORS, 2):
        assert len({(str(row[a]), str(row[b])) for row in ROWS}) == len(FACTORS[a]) * len(FACTORS[b])


def check(
    mask, score, sinks, heads, dropout, dtype, n_q, n_k, head_dim, v_dim, strided, n_b=2, backend=None, masks=MASKS,
    lse=(False, True), device="cpu",
):  # fmt: skip
    n_h, n_kv = heads
    q, k, v = tensors(n_b, n_h, n_kv, n_q, n_k, head_dim, v_dim, dtype, strided)
    masking = masks[mask](n_b, n_h, n_q, n_k)
    chain = SCORES[score](n_b, n_h, n_q, n_k, dtype)
    sink = leaf(n_h, dtype=dtype) if sinks else None
    params = [x for item in chain for x in item.params]
    inputs = [q, k, v, *params, *([sink] if sinks else [])]
    inputs = inputs if device == "cpu" else [x.detach().to(device).requires_grad_() for x in inputs]
    g = torch.Generator().manual_seed(1)
    do = torch.randn(n_b, n_h, n_q, v_dim, generator=g, dtype=torch.float64).to(device)
    dlse = torch.randn(n_b, n_h, n_q, generator=g, dtype=torch.float64).to(device)

    def run(backend, dtype, with_lse):
        own = [x.detach().to(dtype).requires_grad_() for x in inputs] if backend == "reference" else inputs
        tail = iter(own[3:])
        scores = [item.with_params(tuple(next(tail) for _ in item.params)) for item in chain]
        torch.manual_seed(7)
        out, lse = fa.attention(
            *own[:3], mask=masking, score=scores, sinks=own[-1] if sinks else None, dropout_p=dropout,
            return_lse=True, backend=backend,
        )  # fmt: skip
        loss = (out.double() * do).sum()
        if with_lse:
            loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0).double() * dlse).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, own)]

    names = ["out", "lse", "dq", "dk", "dv", *(f"dparam{i}" for i in range(len(params))), "dsinks"]
    for with_lse in lse:
        ours = run(backend, dtype, with_lse)
        exact, naive = run("reference", torch.float64, with_lse), run("reference", dtype, with_lse)
        largest = max([x.abs().max().item() for x in exact[2:5] if x.numel()], default=0.0)
        terms = max(largest, 3 * v_dim**0.5)  # a parameter's gradient sums P (dP - delta), for slopes times a distance
        terms *= max(n_q, n_k) if score in ("alibi", "chain") else 1
        terms *= n_q**0.5 if score == "relative" else 1  # the table's ends sum whole rows, whose roundings are independent
        for name, x, y, z in zip(names, ours, exact, naive, strict=False):
            what = f"{name} {'with' if with_lse else 'without'} dlse"
            if name[0] == "d":
                assert_within(x, y, [z], 3, what, terms if name.startswith("dparam") else largest)
            else:
                assert_within(x, y, [z], 2, what)


def describe(row):
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in row.values())


@pytest.mark.parametrize("row", ROWS, ids=describe)
def test_pairwise(row):
    row = dict(row)
    n_q, keys, v_dim = row["n_q"], row.pop("keys"), row.pop("v_dim")
    n_k = {"equal": n_q, "fewer": max(1, n_q - n_q // 3), "more": n_q + 2 + n_q // 4}[keys]
    n_b = 1 if n_q > 1000 else 2
    check(**row, n_k=n_k, v_dim=row["head_dim"] if v_dim == "equal" else row["head_dim"] // 2 + 3, n_b=n_b)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_with_every_score(mask, score):
    check(mask, score, True, (4, 2), 0.0, torch.float64, 59, 59, 8, 8, False)

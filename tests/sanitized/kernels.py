"""The kernels at tiles that a GPU runs, small enough to be executed access by access: bounds and races are judged, by ttsem in
what the front end makes of them, by fastattn/devtools/emulate.py in what the compiler does.

The same file is an ordinary suite where there is a GPU. Sizes give two tiles of rows, several of keys, and ragged ends.
"""

import dataclasses
import os

import cases
import pytest
import torch
from bars import assert_within, errors
from device_cases import MASKS

import fastattn as fa
from fastattn import functional
from fastattn.backends import reference, tiled, triton
from fastattn.problem import Tangents

DEVICE = "cpu" if "EMULATE" in os.environ else "cuda"
GRADIENTS = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}  # relative L2


def problem(mask, score=(), dtype=torch.bfloat16, dropout=0.0, n_q=150, n_k=203, dims=(19, 8), coords=None, n_b=1):
    """Two query heads share a head of k and v; views of (B, L, H, D) storage; one sink's logit hides it."""
    torch.manual_seed(0)
    q, k, v = (x.detach().to(DEVICE) for x in cases.tensors(n_b, 2, 1, n_q, n_k, *dims, dtype, strided=True))
    scores = tuple(s.with_params(tuple(x.detach().to(DEVICE) * 0.3 for x in s.params)) for s in score)
    sinks = torch.tensor([0.5, -torch.inf], device=DEVICE)
    return functional.problem(q, k, v, mask, scores, sinks, None, dropout, "triton", None, coords)


def widened(p):
    scores = tuple(s.with_params(tuple(x.double() for x in s.params)) for s in p.scores)
    q, k, v, sinks = (x.double() for x in (p.q, p.k, p.v, p.sinks))
    return dataclasses.replace(p, q=q, k=k, v=v, scores=scores, sinks=sinks)


def random_like(x, seed):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x) * 0.5


def assert_near(ours, exact, dtype, factor=1.0):
    for i, (x, y) in enumerate(zip(ours, exact, strict=True)):
        if x is None and y is None:
            continue
        assert not x.isnan().any(), i
        largest, relative = errors(x, y)
        assert relative < GRADIENTS[dtype] * factor or largest < 1e-5, (i, relative, largest)


def check(p):
    """out and lse by the bar of the dtype; dq, dk, dv and the gradients of parameters and sinks."""
    dtype, wide = p.q.dtype, widened(p)
    out, lse, low = triton.forward(p, True)
    truth, true_lse = reference.attention(
        wide.q, wide.k, wide.v, mask=p.mask, scores=wide.scores, sinks=wide.sinks, scale=p.scale, dropout_p=p.dropout_p,
        rng=p.rng, coords=p.coords,
    )  # fmt: skip
    assert_within(out, truth, [truth.to(dtype)], 2, "out")
    assert_within(lse, true_lse, [true_lse.float()], 2, "lse")
    do, dlse = random_like(out, 1), random_like(lse, 2)
    saved = tiled.forward(wide, True)
    exact = tiled.backward(wide, do.double(), dlse.double(), *saved)
    ours = triton.backward(p, do, dlse, out, lse, low)
    assert_near((*ours[:3], *ours.params, ours.sinks), (*exact[:3], *exact.params, exact.sinks), dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask):
    check(problem(MASKS[mask](1, 2, 150, 203)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda x: str(x)[6:])
def test_everything_at_once(dtype):
    """A chain with four kinds of parameters, dropout over moved coordinates, and a mask that differs by row."""
    coords = fa.Coordinates(b=1, h=1, q=5, k=4)
    mask, score = MASKS["sinks_window"](1, 2, 70, 99), cases.SCORES["chain"](1, 2, 80, 110, dtype)
    check(problem(mask, score, dtype, 0.3, n_q=70, n_k=99, dims=(24, 19), coords=coords))


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_the_gradient_of_a_bias_that_entries_share(mask):
    """Each program adds up the tiles of both entries beside dq."""
    bias = fa.Bias(torch.randn(2, 70, 99, generator=torch.Generator().manual_seed(3)).bfloat16())
    check(problem(MASKS[mask](2, 2, 70, 99), (bias,), n_q=70, n_k=99, n_b=2))


@pytest.mark.parametrize("what", ["bias", "coordinates"])
def test_nothing_is_looked_up_beyond_the_last_key(what):
    """The rows are whole tiles, so that the last keys' tile, which is not, has rows that see all of it."""
    n_q, n_k = 128, 203
    score = fa.Bias(torch.ones(n_q, n_k).bfloat16()) if what == "bias" else fa.ALiBi(torch.full((2,), 0.1))
    coords = fa.Coordinates(k=torch.arange(n_k, device=DEVICE)[None].int() // 8) if what == "coordinates" else None
    check(problem(fa.Full(), (score,), n_q=n_q, n_k=n_k, coords=coords))


TANGENTS = {"window": (torch.bfloat16, 0.0), "dense": (torch.float16, 0.3)}


@pytest.mark.parametrize("mask", TANGENTS)
def test_one_tangent(mask):
    """Forward mode and the tangent of the backward. Bytes and dropout's words decide how the compiler lays out weights."""
    dtype, dropout = TANGENTS[mask]
    n_q, n_k, dims = (70, 99, (19, 8)) if mask == "window" else (13, 40, (40, 24))  # the second has tiles of 16
    score = cases.SCORES["softcap"](1, 2, n_q, n_k, None)
    p = problem(MASKS[mask](1, 2, n_q, n_k), score, dtype, dropout, n_q=n_q, n_k=n_k, dims=dims)
    t = Tangents(*(random_like(x, i) for i, x in enumerate((p.q, p.k, p.v))), [], None)
    wide, t64 = widened(p), Tangents(t.q.double(), t.k.double(), t.v.double(), [], None)
    saved, saved64 = triton.forward(p, True), tiled.forward(wide, True)
    do, tdo = random_like(saved[0], 5), random_like(saved[0], 6)
    way, way64 = triton.forward_jvp(p, t, *saved), tiled.forward_jvp(wide, t64, *saved64)
    ours = triton.backward_jvp(p, t, do, None, tdo, None, *saved, *way)
    exact = tiled.backward_jvp(wide, t64, do.double(), None, tdo.double(), None, *saved64, *way64)
    assert_near((*way, *ours[:3]), (*way64, *exact[:3]), p.q.dtype, 2.0)
    # the rows' shares in this one cancel, down to the rounding of tout: against float64 on the same tout
    same = tiled.backward_jvp(wide, t64, do.double(), None, tdo.double(), None, *saved64, *(x.double() for x in way))
    assert_near((ours.sinks,), (same.sinks,), p.q.dtype)

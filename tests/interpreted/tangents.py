"""Tangent kernels against float64: forward mode, and the tangent of the backward, with everything at once."""

import dataclasses

import cases
import pytest
import torch
from bars import errors
from device_cases import DEVICE, MASKS
from torch.testing import assert_close

import fastattn as fa
from fastattn import functional
from fastattn.backends import tiled, triton
from fastattn.problem import Tangents

LIMIT = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # relative L2


def problem(mask, score, dtype, dropout=0.0, n_q=33, n_k=47, heads=(4, 2), coords=None):
    n_h, n_kv = heads
    q, k, v = (x.detach().to(DEVICE) for x in cases.tensors(1, n_h, n_kv, n_q, n_k, 19, 24, dtype, strided=True))
    scores = cases.SCORES[score](1, n_h, n_q, n_k, dtype)
    scores = tuple(s.with_params(tuple(x.detach().to(DEVICE) * 0.3 for x in s.params)) for s in scores)
    sinks = cases.leaf(n_h, dtype=dtype).detach().to(DEVICE)
    return functional.problem(q, k, v, MASKS[mask](1, n_h, n_q, n_k), scores, sinks, None, dropout, "triton", None, coords)


def random_like(*tensors):
    g = torch.Generator().manual_seed(3)
    return [None if x is None else torch.randn(x.shape, generator=g).to(x) * 0.5 for x in tensors]


def widened(p):
    scores = tuple(s.with_params(tuple(x.double() for x in s.params)) for s in p.scores)
    q, k, v, sinks = (x.double() for x in (p.q, p.k, p.v, p.sinks))
    return dataclasses.replace(p, q=q, k=k, v=v, scores=scores, sinks=sinks)


def wide(t):
    q, k, v, sinks = (None if x is None else x.double() for x in (t.q, t.k, t.v, t.sinks))
    return Tangents(q, k, v, [None if x is None else x.double() for x in t.params], sinks)


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


def both(p, t, with_cotangent_tangents):
    """The kernels' results and float64's: tout, tlse, then the tangents of dq, dk, dv, parameters and sinks."""
    p64, t64 = widened(p), wide(t)
    saved, saved64 = triton.forward(p, True), tiled.forward(p64, True)
    do, dlse, tdo, tdlse = random_like(saved[0], saved[1], saved[0], saved[1])
    if not with_cotangent_tangents:
        tdo = tdlse = None
    way, way64 = triton.forward_jvp(p, t, *saved), tiled.forward_jvp(p64, t64, *saved64)
    ours = triton.backward_jvp(p, t, do, dlse, tdo, tdlse, *saved, *way)
    exact = tiled.backward_jvp(p64, t64, *double(do, dlse, tdo, tdlse), *saved64, *way64)
    flat = lambda w, g: [*w, g.q, g.k, g.v, *g.params, g.sinks]
    return flat(way, ours), flat(way64, exact)


CALLS = [
    ("causal", "none", torch.float32, 0.0),
    ("sinks_window", "chain", torch.float32, 0.0),
    ("documents", "softcap", torch.float32, 0.3),
    ("dense", "bias", torch.float32, 0.2),
    ("custom", "alibi", torch.float32, 0.0),
    ("lengths", "relative", torch.float32, 0.0),
    ("window", "chain", torch.float16, 0.2),
    ("two_sided", "softcap", torch.bfloat16, 0.0),
]


@pytest.mark.parametrize(("mask", "score", "dtype", "dropout"), CALLS, ids=lambda x: str(x).replace("torch.", ""))
@pytest.mark.parametrize("everything", [True, False], ids=["everything", "some"])
def test_tangents(mask, score, dtype, dropout, everything):
    p = problem(mask, score, dtype, dropout)
    directions = random_like(p.q, p.k, p.v, p.sinks, *p.params)
    t = Tangents(*directions[:3], directions[4:], directions[3])
    if not everything:  # only q and, where there is one, the last parameter move
        t = Tangents(t.q, None, None, [*[None] * (len(p.params) - 1), *directions[4:][-1:]], None)
    names = ["tout", "tlse", "tdq", "tdk", "tdv", *(f"tdparam{i}" for i in range(len(p.params))), "tdsinks"]
    for name, x, y in zip(names, *both(p, t, everything), strict=True):
        assert not x.isnan().any(), name
        largest, relative = errors(x, y)
        if "param" not in name or dtype == torch.float32:  # those come from torch operations, and cancel
            assert relative < LIMIT[dtype] * (10 if "s" in name else 1) or largest < 1e-5, (name, relative)


def test_second_order_through_autograd():
    q, k, v = (x.detach().to(DEVICE).requires_grad_() for x in cases.tensors(1, 2, 1, 9, 35, 8, 8, torch.float32))

    def grads(backend):
        out = fa.attention(q, k, v, mask=fa.Causal("bottom_right"), score=fa.Softcap(3.0), backend=backend)
        first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))

    for a, b in zip(grads("triton"), grads("tiled"), strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_forward_mode_through_functorch():
    q, k, v = (x.detach().to(DEVICE) for x in cases.tensors(1, 2, 1, 9, 35, 8, 8, torch.float32))

    def along(backend):
        f = lambda *x: fa.attention(*x, mask=fa.Causal("bottom_right"), return_lse=True, backend=backend)
        return torch.func.jvp(f, (q, k, v), tuple(random_like(q, k, v)))

    for a, b in zip(along("triton"), along("tiled"), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)

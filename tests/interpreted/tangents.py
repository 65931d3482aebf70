"""Tangent kernels against float64: forward mode, and the tangent of the backward, with everything at once."""

import dataclasses

import cases
import pytest
import torch
from bars import errors
from device_cases import DEVICE, MASKS
from pairs import pairwise
from test_covering import FACTORS, describe
from torch.testing import assert_close

import fastattn as fa
from fastattn import functional
from fastattn.backends import tiled, triton, triton_call, triton_tangents
from fastattn.problem import Tangents, ThreeTangents

LIMIT = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # relative L2


def problem(
    mask, score, dtype, dropout=0.0, n_q=33, n_k=47, heads=(4, 2), coords=None, dims=(19, 24), strided=True, sinks=True
):  # fmt: skip
    n_h, n_kv = heads
    q, k, v = (x.detach().to(DEVICE) for x in cases.tensors(1, n_h, n_kv, n_q, n_k, *dims, dtype, strided=strided))
    scores = cases.SCORES[score](1, n_h, n_q, n_k, dtype)
    scores = tuple(s.with_params(tuple(x.detach().to(DEVICE) * 0.3 for x in s.params)) for s in scores)
    sinks = cases.leaf(n_h, dtype=dtype).detach().to(DEVICE) if sinks else None
    return functional.problem(q, k, v, MASKS[mask](1, n_h, n_q, n_k), scores, sinks, None, dropout, "triton", None, coords)


def random_like(*tensors):
    g = torch.Generator().manual_seed(3)
    return [None if x is None else torch.randn(x.shape, generator=g).to(x) * 0.5 for x in tensors]


def widened(p):
    scores = tuple(s.with_params(tuple(x.double() for x in s.params)) for s in p.scores)
    q, k, v, sinks = double(p.q, p.k, p.v, p.sinks)
    return dataclasses.replace(p, q=q, k=k, v=v, scores=scores, sinks=sinks)


def wide(t):
    q, k, v, sinks = (None if x is None else x.double() for x in (t.q, t.k, t.v, t.sinks))
    return Tangents(q, k, v, [None if x is None else x.double() for x in t.params], sinks)


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


def both(p, t, with_cotangent_tangents):
    """The kernels' results and float64's: tout, tlse, then the tangents of dq, dk, dv, parameters and sinks.

    A parameter's sum may cancel, down to the rounding of the tout that the kernels were given: float64 has the same one there.
    """
    p64, t64 = widened(p), wide(t)
    saved, saved64 = triton.forward(p, True), tiled.forward(p64, True)
    do, dlse, tdo, tdlse = random_like(saved[0], saved[1], saved[0], saved[1])
    if not with_cotangent_tangents:
        tdo = tdlse = None
    way, way64 = triton.forward_jvp(p, t, *saved), tiled.forward_jvp(p64, t64, *saved64)
    ours = triton.backward_jvp(p, t, do, dlse, tdo, tdlse, *saved, *way)
    exact = tiled.backward_jvp(p64, t64, *double(do, dlse, tdo, tdlse), *saved64, *way64)
    same = tiled.backward_jvp(p64, t64, *double(do, dlse, tdo, tdlse), *saved64, *double(*way))
    flat = lambda w, g, sums: [*w, g.q, g.k, g.v, *sums.params, sums.sinks]
    return flat(way, ours, ours), flat(way64, exact, same)


CALLS = [
    ("causal", "none", torch.float32, 0.0),
    ("sinks_window", "chain", torch.float32, 0.0),
    ("documents", "softcap", torch.float32, 0.3),
    ("dense", "bias", torch.float32, 0.2),
    ("custom", "alibi", torch.float32, 0.0),
    ("bottom_right", "relative", torch.float32, 0.0),
    ("window", "chain", torch.float16, 0.2),
    ("two_sided", "softcap", torch.bfloat16, 0.0),
]
SOME = [call for call in CALLS if call[1] in ("bias", "relative", "chain") and call[2] == torch.float32]  # with parameters
each = pytest.mark.parametrize(
    ("everything", "mask", "score", "dtype", "dropout"),
    [(True, *call) for call in CALLS] + [(False, *call) for call in SOME],
    ids=lambda x: ("some", "everything")[x] if isinstance(x, bool) else str(x).replace("torch.", ""),
)


ROWS = pairwise(
    {
        **FACTORS,
        "mask": list(MASKS),
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "n_q": [3, 19, 1],
        "heads": [(2, 2), (2, 1), (3, 1)],
        "head_dim": [8, 16, 40, 1],
    }
)
HERE = range(0, len(ROWS), 1 if DEVICE == "cuda" else 19)


@pytest.mark.parametrize("i", HERE, ids=lambda i: describe(ROWS[i]))
def test_pairwise(i):
    """The second order over the array's pairs: all of them on a GPU, some in the interpreter."""
    row = dict(ROWS[i])
    n_q, keys, v_dim, head_dim = (row.pop(name) for name in ("n_q", "keys", "v_dim", "head_dim"))
    n_k = {"equal": n_q, "fewer": max(1, n_q - n_q // 3), "more": n_q + 2 + n_q // 4}[keys]
    p = problem(**row, n_q=n_q, n_k=n_k, dims=(head_dim, head_dim if v_dim == "equal" else head_dim // 2 + 3))
    q, k, v, sinks, *params = random_like(p.q, p.k, p.v, p.sinks, *p.params)
    assert_tangents(p, Tangents(q, k, v, params, sinks), True)


def assert_tangents(p, t, with_cotangent_tangents):
    dtype = p.q.dtype
    names = ["tout", "tlse", "tdq", "tdk", "tdv", *(f"tdparam{i}" for i in range(len(p.params))), "tdsinks"]
    for name, x, y in zip(names, *both(p, t, with_cotangent_tangents), strict=True):
        if x is None:
            continue
        assert not x.isnan().any(), name
        largest, relative = errors(x, y)
        assert relative < LIMIT[dtype] or largest < 1e-5, (name, relative)


@each
def test_tangents(mask, score, dtype, dropout, everything):
    p = problem(mask, score, dtype, dropout)
    directions = random_like(p.q, p.k, p.v, p.sinks, *p.params)
    t = Tangents(*directions[:3], directions[4:], directions[3])
    if not everything:  # only q and, where there is one, the last parameter move
        t = Tangents(t.q, None, None, [*[None] * (len(p.params) - 1), *directions[4:][-1:]], None)
    assert_tangents(p, t, everything)


def test_a_tables_tangent_at_scattered_coordinates():
    g = torch.Generator().manual_seed(2)
    rows, keys = (torch.randint(20, (n,), generator=g).to(DEVICE) for n in (9, 11))
    p = problem("bottom_right", "relative", torch.float32, n_q=9, n_k=11, coords=fa.Coordinates(q=rows, k=keys))
    assert not triton.falls_back(p)
    q, k, v, sinks, *params = random_like(p.q, p.k, p.v, p.sinks, *p.params)
    assert_tangents(p, Tangents(q, k, v, params, sinks), True)


@each
def test_tangents_of_tangents(mask, score, dtype, dropout, everything):
    """Along two directions and both; or q's and a parameter's along the first, k's and the sinks' along the second alone."""
    p = problem(mask, score, dtype, dropout)
    q, k, v, sinks, *params = random_like(*3 * (p.q, p.k, p.v, p.sinks, *p.params))
    n = 4 + len(p.params)
    flat = [q, k, v, sinks, *params]
    ways = [Tangents(*flat[i : i + 3], flat[i + 4 : i + n], flat[i + 3]) for i in (0, n, 2 * n)]
    if not everything:
        none = [None] * len(p.params)
        ways = [Tangents(q, None, None, [*none[:-1], *params[-1:]] if none else [], None), Tangents(None, k, None, none, sinks),
                Tangents(None, None, None, none, None)]  # fmt: skip
    t, p64 = ThreeTangents(*ways), widened(p)
    t64 = ThreeTangents(*map(wide, ways))
    saved, saved64 = triton.forward(p, True), tiled.forward(p64, True)
    along = [triton.forward_jvp(p, x, *saved)[1] for x in ways[:2]]
    along64 = [tiled.forward_jvp(p64, x, *saved64)[1] for x in t64[:2]]
    ours, exact = triton.forward_jvp2(p, t, *saved, *along), tiled.forward_jvp2(p64, t64, *saved64, *along64)
    for name, x, y in zip(("out", "lse"), ours, exact, strict=True):
        assert not x.isnan().any(), name
        largest, relative = errors(x, y)
        assert relative < LIMIT[dtype] * (10 if name == "lse" else 2) or largest < 1e-5, (name, relative)


@pytest.mark.parametrize("score", ["chain", "key_bias", "row_bias"])
def test_second_order_takes_no_torch_operations(score, monkeypatch):
    """Neither the tangent of the backward, its parameters included, nor the tangents of tangents."""
    p = problem("causal", score, torch.float32, n_q=9, n_k=11)

    def refuse(*args):
        raise AssertionError("torch operations were asked")

    for name in ("forward_jvp", "backward_jvp", "forward_jvp2"):
        monkeypatch.setattr(triton_tangents.tangents, name, refuse)
    t = Tangents(p.q, p.k, p.v, p.params, p.sinks)
    out, lse, low = triton.forward(p, True)
    assert not triton.falls_back(p)
    assert triton.forward_jvp2(p, ThreeTangents(t, t, t), out, lse, low, lse, lse)[0].shape == out.shape
    grads = triton.backward_jvp(p, t, out, lse, out, lse, out, lse, low, out, lse)
    assert [x.shape for x in grads.params] == [x.shape for x in p.params]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("cap", [False, True])
def test_keys_and_values_with_a_mean(cap, sinks):
    """Relative L2 errors in bf16: rounding is 1.7e-3 of each, and without the corrections tdq was 2e-2 and tout 9e-3."""
    q, k, v = (x.detach().to(DEVICE) for x in cases.tensors(1, 1, 1, 64, 64, 32, 32, torch.float32))
    direction = torch.ones(32, device=DEVICE)
    direction[::2] = -1
    q, k, v = (x.bfloat16() for x in (q, k + 3 * direction, v + 3))
    score, sink = ((fa.Softcap(20.0),) if cap else ()), (torch.ones(1, device=DEVICE) if sinks else None)
    p = functional.problem(q, k, v, fa.Causal("top_left"), score, sink, None, 0.0, "triton", None, None)
    p64 = dataclasses.replace(p, q=q.double(), k=k.double(), v=v.double(), sinks=None if sink is None else p.sinks.double())
    t = Tangents(*random_like(q, k, v), [], None if sink is None else torch.full((1, 1), 0.5, device=DEVICE))
    saved, saved64 = triton.forward(p, True), tiled.forward(p64, True)
    do, dlse, tdo, tdlse = random_like(saved[0], saved[1], saved[0], saved[1])
    way, way64 = triton.forward_jvp(p, t, *saved), tiled.forward_jvp(p64, wide(t), *saved64)
    ours = triton.backward_jvp(p, t, do, dlse, tdo, tdlse, *saved, *way)
    exact = tiled.backward_jvp(p64, wide(t), *double(do, dlse, tdo, tdlse), *saved64, *way64)
    twice = triton.forward_jvp2(p, ThreeTangents(t, t, t), *saved, way[1], way[1])
    twice64 = tiled.forward_jvp2(p64, ThreeTangents(*3 * (wide(t),)), *saved64, way64[1], way64[1])
    limits = {"tout": 3e-3, "tdq": 1e-2 if cap else 3e-3, "tdk": 3e-3, "tdv": 3e-3, "out12": 5e-3}
    found = (way[0], ours.q, ours.k, ours.v, twice[0])
    for (name, limit), x, y in zip(limits.items(), found, (way64[0], exact.q, exact.k, exact.v, twice64[0]), strict=True):
        assert errors(x, y)[1] < limit, (name, errors(x, y)[1])


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


def test_forward_over_forward_and_double_backward_through_functorch():
    """With a learned bias and slopes in front of and behind a softcap."""
    q, k, v = (x.detach().to(DEVICE) for x in cases.tensors(1, 2, 1, 9, 35, 8, 8, torch.float32))
    bias, slopes = (cases.leaf(*s, dtype=torch.float32, positive=True).detach().to(DEVICE) for s in ((9, 35), (2,)))
    inputs = (q, k, v, bias, slopes)
    one, two = tuple(random_like(*inputs)), tuple(reversed(random_like(*reversed(inputs))))

    def second(backend):
        def f(q, k, v, bias, slopes):
            score = (fa.Bias(bias), fa.Softcap(3.0), fa.ALiBi(slopes))
            return fa.attention(q, k, v, mask=fa.Causal("bottom_right"), score=score, backend=backend)

        twice = torch.func.jvp(lambda *x: torch.func.jvp(f, x, one)[1], inputs, two)[1]
        loss = lambda *x: f(*x).square().sum()
        first = torch.func.grad(loss, argnums=tuple(range(5)))
        return twice, *torch.func.grad(lambda *x: sum(g.square().sum() for g in first(*x)), argnums=tuple(range(5)))(*inputs)

    for a, b in zip(second("triton"), second("tiled"), strict=True):
        assert_close(a, b, atol=2e-4, rtol=2e-4)


WIDE = [
    ("sinks_window", "chain", torch.float32, 0.2, (300, 40)),
    ("dense", "none", torch.float32, 0.0, (40, 300)),
    ("causal", "softcap", torch.bfloat16, 0.0, (257, 270)),
]
split = pytest.mark.parametrize(("mask", "score", "dtype", "dropout", "dims"), WIDE, ids=lambda x: str(x).replace("torch.", ""))


@pytest.fixture
def always_split(monkeypatch):
    """Every kernel that can have slices has them, also where an architecture holds whole rows."""
    own = triton_call.launch

    def launch(kernel, *args):
        found = own(kernel, *args)
        return found if found.columns or kernel == "forward" else found._replace(block_q=16, block_k=16, columns=64)

    monkeypatch.setattr(triton_call, "launch", launch)


def split_call(mask, score, dtype, dropout, dims):
    """One of q and v has several slices of its head_dim, and the other as many or one."""
    p = problem(mask, score, dtype, dropout, n_q=19, n_k=37, heads=(2, 1), dims=dims)
    for kernel in ("dq", "dkdv", "grads", "jvp", "jvp dq", "jvp dkdv", "jvp grads", "jvp2"):
        assert 0 < triton_call.config(p, kernel).columns < max(dims)
    assert "does not fit" not in str(triton.falls_back(p))
    return p


@split
@pytest.mark.usefixtures("always_split")
def test_a_split_backward(mask, score, dtype, dropout, dims):
    p = split_call(mask, score, dtype, dropout, dims)
    saved, saved64 = triton.forward(p, True), tiled.forward(widened(p), True)
    do, dlse = random_like(*saved[:2])
    first = triton.backward(p, do, dlse, *saved)
    again = triton.backward(p, do, dlse, *saved) if dropout else first
    exact = tiled.backward(widened(p), *double(do, dlse), *saved64)
    flat = lambda g: [g.q, g.k, g.v, *g.params, g.sinks]
    for x, same, y in zip(flat(first), flat(again), flat(exact), strict=True):
        assert torch.equal(x, same)
        largest, relative = errors(x, y)
        assert relative < LIMIT[dtype] * (10 if x.ndim < 4 else 1) or largest < 1e-5, (x.shape, relative)


@split
@pytest.mark.usefixtures("always_split")
def test_split_tangents(mask, score, dtype, dropout, dims):
    p = split_call(mask, score, dtype, dropout, dims)
    q, k, v, sinks, *params = random_like(p.q, p.k, p.v, p.sinks, *p.params)
    assert_tangents(p, Tangents(q, k, v, params, sinks), True)


@split
@pytest.mark.usefixtures("always_split")
def test_split_tangents_of_tangents(mask, score, dtype, dropout, dims):
    p = split_call(mask, score, dtype, dropout, dims)
    q, k, v, sinks, *params = random_like(p.q, p.k, p.v, p.sinks, *p.params)
    one, two = Tangents(q, k, v, params, sinks), Tangents(-q, 2 * k, v, params, sinks)
    t = ThreeTangents(one, two, one)
    saved, saved64 = triton.forward(p, True), tiled.forward(widened(p), True)
    along = [triton.forward_jvp(p, x, *saved)[1] for x in t[:2]]
    along64 = [tiled.forward_jvp(widened(p), wide(x), *saved64)[1] for x in t[:2]]
    ours = triton.forward_jvp2(p, t, *saved, *along)
    again = triton.forward_jvp2(p, t, *saved, *along) if dropout else ours
    exact = tiled.forward_jvp2(widened(p), ThreeTangents(*map(wide, t)), *saved64, *along64)
    for name, x, same, y in zip(("out", "lse"), ours, again, exact, strict=True):
        assert torch.equal(x, same), name
        largest, relative = errors(x, y)
        assert relative < LIMIT[dtype] * (10 if name == "lse" else 2) or largest < 1e-5, (name, relative)

"""Single promises of the kernels: dropout's bits, coordinates, memory, repeatability, exactness."""

import dataclasses
import itertools
import json
import time

import cases
import numpy as np
import pytest
import torch
from bars import assert_within, errors
from device_cases import DEVICE, MASKS, Square, Tilt, checkerboard, documents, stripes
from torch.testing import assert_close

import fastattn as fa
from fastattn import cli, functional
from fastattn.backends import reference, tiled, triton, triton_call, triton_tiles
from fastattn.bench import numerics
from fastattn.devtools import tune
from fastattn.kernels import launch
from fastattn.scores.base import plane_strides, wide_plane


def qkv(n_b=1, n_h=2, n_kv=2, n_q=47, n_k=113, head_dim=16, v_dim=16, dtype=torch.float32, strided=False):
    return [x.detach().to(DEVICE) for x in cases.tensors(n_b, n_h, n_kv, n_q, n_k, head_dim, v_dim, dtype, strided)]


def problem(q, k, v, mask=None, score=(), sinks=None, dropout=0.0, coords=None, seed=0):
    torch.manual_seed(seed)
    return functional.problem(q, k, v, mask, score, sinks, None, dropout, "triton", None, coords)


def exact(p):
    """(out, lse) in float64."""
    wide = [x.double() for x in (p.q, p.k, p.v)]
    scores = tuple(s.with_params(tuple(x.double() for x in s.params)) for s in p.scores)
    sinks = None if p.sinks is None else p.sinks.double()
    return reference.attention(
        *wide, mask=p.mask, scores=scores, sinks=sinks, scale=p.scale, dropout_p=p.dropout_p, rng=p.rng, coords=p.coords
    )


def gradients(p, backend=triton, dlse=True, seed=1, do=None):
    g = torch.Generator().manual_seed(seed)
    out, lse, out_lo = triton.forward(p, True)
    if do is not None:
        return backend.backward(p, do, None, out, lse, out_lo)
    do = torch.randn(out.shape, generator=g).to(out)
    return backend.backward(p, do, torch.randn(lse.shape, generator=g).to(lse) if dlse else None, out, lse, out_lo)


def assert_grads(ours, theirs, **bar):
    for name, a, b in zip(("dq", "dk", "dv"), ours[:3], theirs[:3], strict=True):
        assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **bar)
    for a, b in zip(ours.params, theirs.params, strict=True):
        assert_close(a, b, **bar)
    if theirs.sinks is not None:
        assert_close(ours.sinks, theirs.sinks, **bar)


BAR = dict(atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_long_enough_for_every_kind_of_tile(mask):
    """Lead-in, full run, tail and the jump between them, in the row pass and in the column pass."""
    q, k, v = qkv(n_q=113, n_k=131, n_kv=1)
    p = problem(q, k, v, MASKS[mask](1, 2, 113, 131))
    out, lse, _ = triton.forward(p, False)
    assert_close((out, lse), tuple(x.float() for x in exact(p)), **BAR)
    assert_grads(gradients(p), gradients(p, tiled), **BAR)


DENSE = {
    "documents": lambda: fa.Dense(documents(113, 131)),
    "by head and entry": lambda: fa.Dense(checkerboard(2, 113, 131, 32) & cases.dense(2, 1, 113, 1)),
    "with spans": lambda: fa.Dense(documents(113, 131)) & (fa.SinkTokens(40) | fa.SlidingWindow(37, 0, "top_left")),
    "with lengths": lambda: fa.Dense(documents(113, 131)) & fa.Lengths(torch.tensor([131, 70])) & fa.Causal("bottom_right"),
    "two tensors": lambda: fa.Dense(documents(113, 131)) & fa.Dense(checkerboard(2, 113, 131)),
    "keys": lambda: fa.Dense((torch.arange(131) // 32 != 1)[None]),
    "rows": lambda: fa.Dense((torch.arange(113) // 32 != 1)[:, None]),
    "with a custom one": lambda: fa.Dense(documents(113, 131)) & fa.Custom(cases.everything_but_diagonal_stripes, stripes),
    "nothing": lambda: fa.Dense(torch.zeros(113, 131, dtype=torch.bool)),
    "scattered": lambda: (
        fa.Dense((torch.rand(113, 131) < 0.6) & (torch.arange(131) % 7 != 3)) & fa.SlidingWindow(70, 0, "top_left")
    ),
}


def tiles_of(pairs, block_q, block_k, beyond_q=False, beyond_k=False):
    """bool (.., n_q, n_k) as (.., tiles of rows, tiles of keys, pairs), with these values beyond the edges."""
    pairs = torch.nn.functional.pad(pairs.int(), (0, -pairs.shape[-1] % block_k), value=beyond_k)
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, -pairs.shape[-2] % block_q), value=beyond_q)
    return pairs.unflatten(-1, (-1, block_k)).unflatten(-3, (-1, block_q)).transpose(-2, -3).flatten(-2).bool()


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("block_q", "block_k"), [(32, 16), (64, 128)])
@pytest.mark.parametrize("name", DENSE)
def test_a_walk_over_a_dense_mask(name, block_q, block_k, columns):
    """Each tile with a visible pair is in its list once, among the first where all is visible, and no empty one is in it."""
    q, k, v = qkv(n_b=2, n_q=113, n_k=131)
    p = problem(q, k, v, DENSE[name]())
    bools = [x.tensor.cpu().expand(2, 2, 113, 131) for x in p.mask.predicates if isinstance(x, fa.masks.DensePredicate)]
    shown = torch.stack(bools).all(0)[:, :, None]  # (B, H, R, n_q, n_k)
    start, stop = (x[..., None].cpu() for x in p.mask.rows_tensors(DEVICE))
    seen = (torch.arange(131) >= start) & (torch.arange(131) < stop) & shown
    some = tiles_of(seen, block_q, block_k).any(-1)
    possible = tiles_of(shown, block_q, block_k).any(-1).expand_as(some)  # spans may hide what is left
    exact = torch.equal(seen, shown.expand_as(seen))
    full = tiles_of(seen, block_q, block_k, not columns).all(-1) & some  # rows beyond the edge are those of the last one
    full &= all(isinstance(x, fa.masks.DensePredicate) for x in p.mask.predicates)
    which = triton_tiles.column_pass if columns else triton_tiles.row_pass
    lists = which(p, triton_tiles.prepare(p), launch.Launch(block_q, block_k, 1, 1))[0][2][0].cpu().expand(2, 2, -1, -1, -1)
    some, possible, full = (x.transpose(3, 4) if columns else x for x in (some, possible, full))
    for at in np.ndindex(*lists.shape[:4]):
        n_full, n_mixed, *tiles = lists[at].tolist()
        first, last = tiles[:n_full], sorted(tiles[len(tiles) - n_mixed :])
        assert first == full[at].nonzero().flatten().tolist()
        wanted, allowed = (set(x[at].nonzero().flatten().tolist()) - set(first) for x in (some, possible))
        assert wanted == set(last) or (not exact and wanted <= set(last) <= allowed)
        assert len(set(last)) == n_mixed


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 19, 35), (1, 3, 1, 520), (2, 2, 3, 1), (1, 1, 1, 1)])
def test_a_bool_mask_as_bits(shape, turned):
    """Bit k % 32 of word k // 32, found by the strides that kernels get; whatever the tensor's own strides are."""
    shown = torch.rand(*shape[::-1], device=DEVICE).permute(3, 2, 1, 0) < 0.5
    x = shown.view(torch.uint8)
    found = triton_tiles.packed(x, plane_strides(x), wide_plane(x))
    if turned:
        shown, shape = shown.mT, (*shape[:2], shape[3], shape[2])
        found = triton_tiles.turned(x, found)
    words, strides, wide = found
    assert wide is None
    flat, key = words.flatten().cpu(), torch.arange(32 * words.shape[3])
    b, h, q = (torch.arange(n).view(-1, *[1] * (3 - i)) for i, n in enumerate(shape[:3]))
    at = b * sum(strides[0]) + h * sum(strides[1]) + q * strides[2] + key // 32 * strides[3]
    wanted = torch.zeros(*shape[:3], len(key), dtype=torch.bool)
    wanted[..., : shape[3] if shape[3] > 1 else None] = shown.cpu()  # one key stands for all
    assert torch.equal((flat[at] >> key % 32 & 1).bool(), wanted)


@pytest.mark.parametrize(
    ("block_q", "block_k", "name"), [(16, 16, "scattered"), (32, 64, "with lengths"), (16, 128, "scattered")]
)
def test_dense_masks_in_tiles_of_half_a_word_and_of_several(block_q, block_k, name, monkeypatch):
    monkeypatch.setattr(triton_call, "launch", lambda *_: launch.Launch(block_q, block_k, 4, 1))
    assert_dense(name)


@pytest.mark.parametrize("name", DENSE)
def test_block_structured_dense_masks(name):
    assert_dense(name)


def assert_dense(name):
    """Values and every gradient; what no row sees holds NaN."""
    n_b = 2 if name in ("by head and entry", "with lengths") else 1
    q, k, v = qkv(n_b=n_b, n_q=113, n_k=131, n_kv=1)
    p = problem(q, k, v, DENSE[name](), fa.ALiBi(cases.leaf(2, dtype=torch.float32, positive=True).detach().to(DEVICE)))
    truth, grads = exact(p), gradients(p, tiled)
    hidden = ~p.mask.to_dense(None, n_b, 2).any(2).any(1).to(DEVICE)  # (B, n_k)
    k, v = (x.masked_fill(hidden[:, None, :, None], torch.nan) for x in (k, v))
    p = dataclasses.replace(p, k=k, v=v)
    out, lse, _ = triton.forward(p, False)
    assert_close((out, lse), tuple(x.float() for x in truth), **BAR)
    assert_grads(gradients(p), grads, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("k_at", [0, 3, 4, "tensor"])
def test_dropout_bits_are_those_of_the_cpu(k_at):
    """A key's weight is dropped if and only if the CPU drops it: v is one-hot, so that out shows every weight."""
    q, k, _ = qkv(n_b=2, n_q=33, n_k=16)
    v = torch.eye(16, device=DEVICE).expand(2, 2, 16, 16)
    k_coord = torch.arange(16, device=DEVICE).flip(0)[None].int() * 3 if k_at == "tensor" else k_at
    p = problem(q, k, v, dropout=0.4, coords=fa.Coordinates(b=1, h=2, q=5, k=k_coord))
    assert torch.equal(triton.forward(p, False)[0] == 0, exact(p)[0] == 0)
    assert_grads(gradients(p), gradients(p, tiled), **BAR)


def test_each_group_has_its_own_dropout_key():
    q, k, v = qkv(n_b=4, n_k=16)
    p = problem(q, k, v, dropout=0.4)
    p = functional.Problem(**{**p.__dict__, "rng": torch.tensor([[1, 2], [3, 4]], device=DEVICE)})
    assert_close(triton.forward(p, False)[0], exact(p)[0].float(), **BAR)


COORDS = {
    "offsets": lambda b, h, q, k: fa.Coordinates(b=3, h=1, q=7, k=4),  # a multiple of 4: words in fours
    "rows": lambda b, h, q, k: fa.Coordinates(q=torch.arange(q)[None] * 2, k=torch.arange(k).flip(0)[None]),
    "entries": lambda b, h, q, k: fa.Coordinates(
        b=torch.arange(b * q).view(b, q) % 5, h=torch.arange(h).flip(0), q=torch.arange(b * q).view(b, q) % 40
    ),
}


@pytest.mark.parametrize("name", COORDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_coordinates(name, dropout):
    q, k, v = qkv(n_b=2, n_kv=1, n_q=19, n_k=35)
    given = COORDS[name](2, 2, 19, 35)
    coords = fa.Coordinates(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in given.parts))
    scores = (
        fa.Bias(cases.leaf(60, 60, dtype=torch.float32).detach().to(DEVICE)),
        fa.ALiBi(cases.leaf(2, dtype=torch.float32, positive=True).detach().to(DEVICE)),
        fa.RelativeBias(cases.leaf(2, 30, dtype=torch.float32).detach().to(DEVICE)),
    )
    p = problem(q, k, v, MASKS["custom"](2, 2, 19, 35), scores, dropout=dropout, coords=coords)
    assert_close(triton.forward(p, False)[0], exact(p)[0].float(), **BAR)
    assert_grads(gradients(p), gradients(p, tiled), atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("by_entry", [False, True])
def test_gradients_of_parameters_at_scattered_coordinates(by_entry):
    """Biases of every shape and slopes: kernels sum them, wherever rows and keys stand; repeated coordinates add up."""
    q, k, v = qkv(n_b=2, n_q=19, n_k=35)
    rows = torch.stack([torch.arange(19) * 2 % 31, torch.arange(19).flip(0)])[: 1 + by_entry].to(DEVICE)
    keys = torch.arange(35).flip(0)[None].to(DEVICE)
    shapes = ((2, 40, 40), (40, 1), (2, 1, 1, 40)) if not by_entry else ((2, 1, 40, 40), (2, 40, 1), (1, 40))
    scores = (*(fa.Bias(cases.leaf(*x, dtype=torch.float32).detach().to(DEVICE)) for x in shapes),
              fa.ALiBi(cases.leaf(2, dtype=torch.float32, positive=True).detach().to(DEVICE)))  # fmt: skip
    p = problem(q, k, v, fa.Causal("bottom_right"), scores, coords=fa.Coordinates(q=rows, k=keys))
    assert not triton.falls_back(p)
    assert_grads(gradients(p), gradients(p, tiled), atol=2e-4, rtol=2e-5)
    shared = fa.Bias(torch.zeros(40, 40, device=DEVICE))
    by_torch = triton.falls_back(problem(q, k, v, score=shared, coords=fa.Coordinates(q=rows.expand(2, -1).contiguous())))
    assert "bias is shared by all" in str(by_torch)


@pytest.mark.parametrize(("table", "n_q"), [((9,), 131), ((2, 2, 40), 17)], ids=["shared", "by entry"])
def test_the_gradient_of_a_table_at_scattered_coordinates(table, n_q):
    """Several programs to a table and to the rows; beyond both ends of it, and in a small one nearly everywhere."""
    n_b = len(table) - 1 or 1
    q, k, v = qkv(n_b=n_b, n_kv=1, n_q=n_q, n_k=5)
    rows, keys = (torch.randint(n, shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
                  for n, shape in ((40, (n_b, n_q)), (60, (5,))))  # fmt: skip
    scores = (fa.RelativeBias(cases.leaf(*table, dtype=torch.float32).detach().to(DEVICE)), fa.Softcap(3.0))
    p = problem(q, k, v, fa.Causal("bottom_right"), scores, coords=fa.Coordinates(q=rows, k=keys))
    assert not triton.falls_back(p)
    with tune._table(triton_call.architecture(p.q.device), tune.Entry("grads", "", 32, 16), launch.Launch(16, 16, 1, 1)):
        ours = gradients(p)
    assert_grads(ours, gradients(p, tiled), atol=1e-4, rtol=2e-5)


BESIDE = {  # mask, (batch entries of the call, of the bias), dropout, more modifiers, whether the pass over dq writes it
    "one entry": ("full", (1, 1), 0.3, (), True),
    "entries of their own": ("lengths", (2, 2), 0.0, ("alibi",), True),
    "shared": ("full", (3, 1), 0.3, (), True),
    "shared and causal": ("causal", (2, 1), 0.0, ("alibi",), True),
    "a bool tensor": ("dense", (2, 2), 0.0, (), True),
    "shared by a bool tensor": ("dense", (2, 1), 0.0, (), False),
    "two spans": ("sinks_window", (1, 1), 0.0, (), False),
    "a curve": ("full", (1, 1), 0.0, ("softcap",), False),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in BESIDE), ("one entry", torch.bfloat16), ("shared", torch.bfloat16)],
    ids=lambda x: str(x).replace("torch.", ""),
)
def test_the_gradient_of_a_bias_beside_dq(name, dtype, monkeypatch):
    """Written by the pass over dq where every tile is visited once; tiles that nobody visits are 0."""
    mask, (n_b, own), dropout, more, beside = BESIDE[name]
    q, k, v = qkv(n_b=n_b, n_kv=1, n_q=43, n_k=75, dtype=dtype)
    others = [score for key in more for score in cases.SCORES[key](n_b, 2, 43, 75, torch.float32)]
    others = [s.with_params(tuple(x.detach().to(DEVICE) for x in s.params)) for s in others]
    bias = fa.Bias(cases.leaf(own, 2, 43, 75, dtype=dtype).detach().to(DEVICE))
    p = problem(q, k, v, MASKS[mask](n_b, 2, 43, 75), (*others, bias), torch.tensor([0.1, 1.0], device=DEVICE), dropout)
    ran, real = [], triton_call.run
    monkeypatch.setattr(triton_call, "run", lambda kernel, *args: (ran.append(kernel.__name__), real(kernel, *args)))
    ours = gradients(p)
    assert ran.count("score_grads") == len(others) + (not beside) - ("softcap" in more)
    bar = dict(atol=2e-4, rtol=2e-5) if dtype == torch.float32 else dict(atol=3e-2, rtol=3e-2)
    assert_grads(ours, gradients(p, tiled), **bar)
    assert ours.params[-1].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(ours.params, gradients(p).params, strict=True))


def test_any_strides():
    """Storage (B, H, D, L): neighbours in a row are far apart. And an expanded batch, whose stride is 0."""
    q, k, v = (x.mT.contiguous().mT for x in qkv(n_q=19, n_k=35, head_dim=20, v_dim=24))
    assert q.stride(3) > 1
    p = problem(q, k, v.expand(1, 2, 35, 24), fa.Causal("bottom_right"))
    out, lse, _ = triton.forward(p, False)
    assert_close((out, lse), tuple(x.float() for x in exact(p)), **BAR)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE).mT.contiguous().mT
    saved = triton.forward(p, True)
    assert_grads(triton.backward(p, do, None, *saved), tiled.backward(p, do, None, *saved), **BAR)
    one = [x.expand(3, -1, -1, -1) for x in (q, k, v)]
    assert torch.equal(triton.forward(problem(*one), False)[0][2:], triton.forward(problem(q, k, v), False)[0])


def test_heads_that_are_far_apart():
    """2^30 elements: the third head begins where 32 bits end. The memory between them is never touched."""
    store, size = torch.empty(2 * 2**30 + 4096, dtype=torch.float16, device=DEVICE), (1, 3, 19, 16)
    far = [store.as_strided(size, (0, 2**30, 16, 1), i * 512) for i in range(3)]
    near = [x.detach().half().to(DEVICE) for x in cases.tensors(1, 3, 3, 19, 19, 16, 16, torch.float32)]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    p, same = problem(*far, fa.Causal()), problem(*near, fa.Causal())
    for a, b in zip(triton.forward(p, True), triton.forward(same, True), strict=True):
        assert torch.equal(a, b)
    ours = triton.backward(p, far[1], None, *triton.forward(p, True))
    theirs = triton.backward(same, near[1], None, *triton.forward(same, True))
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_cuda_graph_sees_new_values_and_lengths():
    """Captured on a stream of its own; lengths are data, so a replay takes what they hold by then."""
    q, k, v = (x.requires_grad_() for x in qkv(n_b=2, n_q=70, n_k=70, dtype=torch.float16))
    lengths = torch.tensor([70, 9], dtype=torch.int32, device=DEVICE)

    def step():
        out = fa.attention(q, k, v, mask=fa.Lengths(lengths) & fa.Causal())
        return out, *torch.autograd.grad(out, (q, k, v), out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.copy_(q.flip(2))
        lengths.copy_(torch.tensor([33, 70], dtype=torch.int32))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_rows_that_see_nothing():
    mask = fa.Spans(torch.zeros(47).int(), torch.where(torch.arange(47) % 3 == 0, 0, 60).int())
    q, k, v = qkv()
    for sinks in (None, torch.tensor([0.5, -torch.inf], device=DEVICE)):
        p = problem(q, k, v, mask, sinks=sinks)
        out, lse, _ = triton.forward(p, False)
        assert (out[:, :, ::3] == 0).all()
        assert (lse[:, 1, ::3] == -torch.inf).all()
        assert (lse[:, 0, ::3] == (-torch.inf if sinks is None else 0.5)).all()
        assert not any(x.isnan().any() for x in gradients(p)[:3])


def test_a_bias_of_minus_infinity_hides():
    bias = torch.zeros(47, 113, device=DEVICE).masked_fill(torch.rand(47, 113, device=DEVICE) < 0.3, -torch.inf)
    bias[5], bias[:, :70] = -torch.inf, -torch.inf
    q, k, v = qkv()
    p, same = problem(q, k, v, score=fa.Bias(bias)), problem(q, k, v, fa.Dense(bias == 0))
    assert_close(triton.forward(p, False)[0], triton.forward(same, False)[0], **BAR)
    assert_grads(gradients(p)._replace(params=[]), gradients(same), **BAR)


UNSEEN = {
    "lengths": fa.Lengths(torch.tensor([50])),
    "left padding": fa.Padding(torch.arange(113)[None] >= 61, "left"),
    "dense": fa.Dense((torch.arange(113) % 7 != 3)[None, :]),
    "causal": fa.Causal("top_left"),  # rows that a tile has and q has not would see more keys
}


@pytest.mark.parametrize("score", [(), fa.Softcap(3.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_row_sees_may_hold_anything(name, score):
    """NaN in one key and infinity in the next."""
    q, k, v = qkv()
    hidden = ~UNSEEN[name].to_dense(47, 113).any(2).view(-1)
    clean = problem(q, k, v, UNSEEN[name], score)
    k, v = k.clone(), v.clone()
    for at, bad in zip(hidden.nonzero().flatten().tolist(), itertools.cycle((torch.nan, torch.inf))):
        k[:, :, at] = v[:, :, at] = bad
    dirty = problem(q, k, v, UNSEEN[name], score)
    assert torch.equal(triton.forward(clean, False)[0], triton.forward(dirty, False)[0])
    for a, b in zip(gradients(clean)[:3], gradients(dirty)[:3], strict=True):  # the mean key may differ
        assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", ["key", "query", "sink"])
def test_what_is_not_finite_reaches_the_rows_that_see_it(bad):
    """Their lse too, which does not say that they see nothing, and every gradient that they are part of."""
    q, k, v = qkv(n_h=1, n_kv=1, n_q=19, n_k=19, head_dim=8)
    sinks = torch.full((1,), torch.nan if bad == "sink" else 1.0, device=DEVICE)
    if bad != "sink":
        {"key": k, "query": q}[bad][0, 0, 9] = torch.inf if bad == "key" else torch.nan
    p = problem(q, k, v, fa.SlidingWindow(3, 0, "top_left"), sinks=sinks)
    out, lse, low = triton.forward(p, True)
    assert_close((out, lse), tuple(x.float() for x in exact(p)), equal_nan=True, **BAR)
    rows = lse[0, 0].isnan().cpu()
    keys = fa.SlidingWindow(3, 0, "top_left").to_dense(19, 19)[0, 0][rows].any(0)
    grads = triton.backward(p, torch.ones_like(out), None, out, lse, low)
    assert rows.sum() == {"key": 4, "query": 1, "sink": 19}[bad]
    assert grads.q[0, 0][rows].isnan().all()
    assert grads.k[0, 0][keys].isnan().all()
    assert grads.v[0, 0][keys].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_repeats_bit_for_bit_and_writes_everything(dtype, monkeypatch):
    """Outputs start as NaN; what a first and a second run write is equal, gradients of parameters included."""

    def poisoned(*args, real=torch.empty, **kwargs):
        x = real(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
    q, k, v = qkv(n_b=2, n_h=2, n_q=21, n_k=35, head_dim=19, v_dim=7, dtype=dtype, strided=True)
    chain = cases.SCORES["chain"](2, 2, 21, 35, dtype)
    chain = tuple(s.with_params(tuple(x.detach().to(DEVICE) for x in s.params)) for s in chain)
    p = problem(q, k, v, MASKS["sinks_window"](2, 2, 21, 35), chain, torch.ones(2, device=DEVICE), 0.2)
    first, *again = (
        [*triton.forward(p, True), *(g := gradients(p))[:3], *g.params, g.sinks] for _ in range(250 if DEVICE == "cuda" else 2)
    )
    assert not any(x.isnan().any() for x in first)
    for each in again:
        assert all(torch.equal(a, b) for a, b in zip(first, each, strict=True))


def test_a_row_does_not_depend_on_its_batch():
    q, k, v = qkv(n_b=3, dtype=torch.float16)
    p = problem(q, k, v, fa.Causal("bottom_right"))
    alone = problem(q[1:2], k[1:2], v[1:2], fa.Causal("bottom_right"))
    assert torch.equal(triton.forward(p, False)[0][1:2], triton.forward(alone, False)[0])
    for a, b in zip(triton.backward(p, q, None, *triton.forward(p, True))[:3],
                    triton.backward(alone, q[1:2], None, *triton.forward(alone, True))[:3], strict=True):  # fmt: skip
        assert torch.equal(a[1:2], b)


def test_a_constant_v_comes_out_exact():
    """out is divided by the sum of the rounded weights."""
    q, k, _ = qkv(dtype=torch.bfloat16)
    out, _, low = triton.forward(problem(q, k, torch.full_like(k, 3.0)), True)
    assert_close(out.float() + low.float(), torch.full_like(out, 3.0).float(), atol=2e-6, rtol=0)


def test_keys_with_a_mean():
    """delta from both halves of out and the zero-sum correction: dq keeps its digits where keys and values have a mean."""
    q, k, v = qkv(n_q=64, n_k=64, head_dim=32, v_dim=32)
    q, k, v = (x.bfloat16() for x in (q, k + 3, v + 3))
    p = problem(q, k, v, fa.Causal("top_left"))
    g = torch.Generator().manual_seed(1)
    do = torch.randn(v.shape, generator=g).to(q)
    dq = triton.backward(p, do, None, *triton.forward(p, True)).q
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out, _ = reference.attention(*wide, mask=p.mask, scale=p.scale)
    (truth,) = torch.autograd.grad(out, wide[0], do.double())
    assert errors(dq, truth)[1] < 2.5e-3
    without_low = triton.backward(p, do, None, *triton.forward(p, True)[:2], q.new_empty(0)).q
    assert errors(without_low, truth)[1] < 1e-2  # the correction alone; without either about 1e-1


@pytest.mark.parametrize(("data", "limit"), [(2, 2e-3), (3, 6e-3)], ids=["constant mean", "drifting mean"])
def test_dq_before_it_is_rounded(data, limit):
    """In float32 results, relative L2: rounding them to bf16 would be 1.7e-3 by itself. Written, they are these, rounded."""
    *leaves, do = (x[:, :1].to(DEVICE) for x in numerics.inputs(numerics.DATA[data], 256))
    with numerics.tiles(numerics.KERNELS):
        sums, written = numerics.unrounded(leaves, do), gradients(problem(*leaves, fa.Causal()), do=do)
    wide = [x.double().requires_grad_() for x in leaves]
    out, _ = reference.attention(*wide, mask=fa.Causal().lower(256, 256), scale=64**-0.5)
    truth = torch.autograd.grad(out, wide, do.double())
    for x, rounded, exact, bar in zip(sums, written, truth, (limit, 2e-3, 2e-3), strict=False):
        assert torch.equal(x.to(rounded.dtype), rounded)
        assert errors(x, exact)[1] <= bar


def test_dv_alone_and_dlse_alone():
    q, k, v = qkv()
    p = problem(q, k, v, sinks=torch.zeros(2, device=DEVICE))
    out, lse, low = triton.forward(p, True)
    dlse = torch.ones_like(lse)
    assert_grads(triton.backward(p, None, dlse, out, lse, low), tiled.backward(p, None, dlse, out, lse, low), **BAR)


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (1, 1)])
def test_no_rows_or_no_keys(n_q, n_k):
    q, k, v = qkv(n_q=n_q, n_k=n_k)
    scores = (fa.Bias(torch.zeros(2, n_q, n_k, device=DEVICE)), fa.RelativeBias(torch.zeros(3, device=DEVICE)))
    p = problem(q, k, v, score=scores, sinks=torch.zeros(2, device=DEVICE))
    out, lse, _ = triton.forward(p, False)
    assert_close((out, lse), tuple(x.float() for x in exact(p)), **BAR)
    assert_grads(gradients(p), gradients(p, tiled), **BAR)


@pytest.mark.parametrize("head_dim", [96, 257])
def test_wide_heads(head_dim):
    q, k, v = qkv(n_q=33, n_k=21, head_dim=head_dim, v_dim=130, dtype=torch.bfloat16)
    p = problem(q, k, v)
    out, truth = triton.forward(p, False)[0], exact(p)[0]
    assert_within(out, truth, [truth.to(out.dtype)], 2, "out")
    assert_grads(gradients(p), gradients(p, tiled), atol=2e-2, rtol=2e-2)


def test_through_the_front_with_autograd_and_second_order():
    q, k, v = (x.requires_grad_() for x in qkv(n_q=9, n_k=11))
    cap = fa.Softcap(3.0)

    def grads(backend):
        out = fa.attention(q, k, v, mask=MASKS["custom"](1, 2, 9, 11), score=cap, backend=backend)
        first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        return out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))

    for a, b in zip(grads("triton"), grads("tiled"), strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)
    told = fa.explain(q, k, v, score=cap, backend="triton")
    assert told.backend == "triton"
    assert "tiles of" in told.kernel
    assert "torch operations" not in str(told)
    assert "a map of the bool mask" in fa.explain(q, k, v, mask=fa.Dense(documents(9, 11)), backend="triton").kernel


def test_a_users_scores():
    """Their Triton functions beside their operations; a parameter's gradient takes torch operations."""
    q, k, v = qkv(n_q=19, n_k=35)
    p = problem(q, k, v, fa.Causal("bottom_right"), (Square(0.1), Tilt(torch.tensor([0.02], device=DEVICE)), fa.Softcap(3.0)))
    assert_close(triton.forward(p, False)[0], exact(p)[0].float(), **BAR)
    assert_grads(gradients(p), gradients(p, tiled), atol=2e-4, rtol=2e-5)
    assert "device_gradient" in str(triton.falls_back(p))


def test_one_graph_under_compile():
    q, k, v = (x.requires_grad_() for x in qkv(n_q=5, n_k=9))
    slopes = torch.rand(2, device=DEVICE, requires_grad=True)

    def loss(q, k, v, slopes):
        score = (fa.Softcap(3.0), fa.ALiBi(slopes))
        return fa.attention(q, k, v, mask=fa.Causal("top_left"), score=score, backend="triton").sum()

    inputs = (q, k, v, slopes)
    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(ours, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        assert torch.equal(a, b)


def test_vmap_over_samples():
    q, k, v = (x[None].expand(3, *x.shape).clone() for x in qkv(n_q=5, n_k=9))
    mapped = lambda backend: torch.vmap(lambda *x: fa.attention(*x, mask=fa.Causal("top_left"), backend=backend))(q, k, v)
    assert_close(mapped("triton"), mapped("tiled"), **BAR)


def test_stripes_is_the_mask_it_claims_to_be():
    assert fa.Custom(cases.everything_but_diagonal_stripes, stripes).lower(3, 3).predicates[0].triton_fn is stripes


def test_tuning_finds_writes_and_changes_nothing_else(tmp_path, capsys):
    before, arch = json.dumps(launch.tables()), triton_call.architecture(torch.device(DEVICE))
    table = launch.table_of(arch)
    try:
        arguments = ["--head-dim", "16", "--dtype", "float32", "--only", "dq", "--length", "32", "--minutes", "1e-6"]
        assert cli.main(["tune", *arguments, "--out", str(tmp_path)]) == 0
        assert "dq" in capsys.readouterr().out
        written = json.loads((tmp_path / f"{arch}.json").read_text())
        assert written == launch.tables()[arch]
        old, new = json.loads(before)[table], dict(written)
        tuned = new.pop("dq")["32"].pop("16")
        assert len(tuned) == 4
        assert {name: new[name] for name in old if name != "dq"} == {name: old[name] for name in old if name != "dq"}
    finally:
        launch.tables.cache_clear()
        launch.launch.cache_clear()


def test_tuning_leaves_no_trace_of_what_was_not_faster():
    before, arch = json.dumps(launch.tables()), triton_call.architecture(torch.device(DEVICE))
    table = launch.table_of(arch)
    entry, how = tune.Entry("dq", "additive", 32, 16), launch.Launch(16, 16, 1, 1)
    assert "16" not in launch.tables()[table].get(entry.name, {}).get("32", {})
    try:
        with tune._table(arch, entry, how):
            assert launch.tables()[arch][entry.name]["32"]["16"] == list(how)[:4]
        assert launch.tables()[arch] == json.loads(before)[table]
    finally:
        launch.tables.cache_clear()
        launch.launch.cache_clear()


def test_tuning_takes_what_is_faster_and_right(monkeypatch):
    """By a clock of its own: half the query tile is said to be twice as fast."""
    entry = tune.Entry("forward", "", 32, 16)
    p = tune._problem(entry, 40, DEVICE)
    start = triton_call.config(p, "forward")
    monkeypatch.setattr(tune, "_time", lambda entry, p: float(triton_call.config(p, "forward").block_q))
    try:
        found = tune._tune(entry, p, time.monotonic() + 60)
        assert found.before == start
        assert found.after.block_q == 16
        assert triton_call.config(p, "forward") == found.after
    finally:
        launch.tables.cache_clear()
        launch.launch.cache_clear()


@pytest.mark.parametrize("kernel", ["jvp grads", "jvp2"])
def test_tuning_holds_other_tiles_to_the_same_results(kernel, monkeypatch):
    entry = tune.Entry(kernel, "", 32, 16)
    p = tune._problem(entry, 17, DEVICE)
    monkeypatch.setattr(tune, "_time", lambda entry, p: 1.0)
    wanted = tune._run(entry, p, None)
    try:
        with tune._table(triton_call.architecture(p.q.device), entry, launch.Launch(16, 16, 1, 1)):
            assert tune._tried(entry, p, wanted) == 1.0
            assert tune._tried(entry, p, [*wanted[:-1], 1.5 * wanted[-1] + 1.0]) is None
    finally:
        launch.tables.cache_clear()
        launch.launch.cache_clear()

"""Row spans and dense masks as rectangles of work: every visible pair in exactly one region, nothing else in any."""

from dataclasses import replace

import pytest
import torch
from cases import MASKS, generator
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn.backends import fused
from fastattn.backends import regions as module
from fastattn.backends.joint import joint
from fastattn.backends.regions import CAUSAL, regions
from fastattn.backends.runs import row_runs
from fastattn.problem import IDENTITY, Problem


def problem(mask, n_b=1, n_h=2, n_q=113, n_k=127, n_kv=None):
    q, k = torch.zeros(n_b, n_h, n_q, 4), torch.zeros(n_b, n_kv or n_h, n_k, 4)
    return Problem(q, k, k, mask.lower(n_q, n_k), (), None, None, IDENTITY, 0.5, 0.0, "tiled", True)


def cover(p):
    """How often the regions hold a pair (visible in them), and in how many of them a row is."""
    pairs = torch.zeros(p.n_b, p.n_h, p.n_q, p.n_k, dtype=torch.int64)
    rows = torch.zeros(p.n_b, p.n_h, p.n_q, dtype=torch.int64)
    for region in regions(p):
        n_b, n_h = region.b.stop - region.b.start, region.h.stop - region.h.start
        visible = region.visible(slice(0, region.n_rows), slice(0, region.n_keys))
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool) if visible is None else visible
        if not isinstance(region.hiding, torch.Tensor):  # the fused kernel says 0 for the lse of a row without keys
            assert bool(visible.any(-1).all())
        target = torch.zeros(n_b, n_h, region.n_rows, p.n_k, dtype=torch.int64)
        target[..., region.keys] = visible.expand(n_b, n_h, region.n_rows, region.n_keys).long()
        pairs[region.b, region.h, region.rows] += target
        rows[region.b, region.h, region.rows] += 1
    return pairs, rows


@pytest.fixture(params=["as they are", "small tiles"])
def limits(request, monkeypatch):
    """Also with limits that small masks reach: joined tiles split, dense masks read as runs."""
    if request.param == "small tiles":
        monkeypatch.setattr(module, "ROWS", 16)
        monkeypatch.setattr(module, "MASK", 1 << 12)
        monkeypatch.setattr(module, "GATHER", 1)


@pytest.mark.parametrize("sizes", [(113, 127), (127, 40), (5, 9), (1, 70)])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("limits")
def test_every_visible_pair_once(name, sizes):
    mask = MASKS[name](2, 4, *sizes)
    for given_mask in (mask, fa.Dense(mask.to_dense(*sizes))):
        p = problem(given_mask, 2, 4, *sizes, n_kv=2)
        pairs, rows = cover(p)
        wanted = p.mask.to_dense(None, 2, 4).expand_as(pairs)
        assert torch.equal(pairs, wanted.long())
        assert bool(((rows == 1) | ~wanted.any(-1)).all())
        assert int(rows.max()) <= 1


@pytest.mark.usefixtures("limits")
def test_jagged_spans():
    g = generator(5)
    start = torch.randint(0, 100, (2, 300), generator=g)
    mask = fa.Spans(start, start + torch.randint(-5, 60, start.shape, generator=g))
    pairs, rows = cover(problem(mask, 2, 2, 300, 140))
    wanted = mask.to_dense(300, 140).expand_as(pairs)
    assert torch.equal(pairs, wanted.long())
    assert int(rows.max()) == 1


def test_spans_far_apart_cost_their_own_keys():
    mask = (fa.SinkTokens(4) | fa.SlidingWindow(15, 0)) & fa.Causal()
    assert all(region.n_keys <= 4 + 15 + module.ROWS for region in regions(problem(mask, 1, 2, 1000, 1000)))


def test_a_dense_causal_mask_runs_as_causal():
    mask = fa.Dense(torch.ones(1, 1, 520, 520, dtype=torch.bool).tril().expand(1, 8, 520, 520))
    (region,) = regions(problem(mask, 1, 8, 520, 520))
    assert region.hiding == CAUSAL


def test_dense_documents_run_without_a_mask():
    dense = torch.block_diag(*[torch.ones(128, 128)] * 4).bool()
    found = list(regions(problem(fa.Dense(dense), 1, 8, 512, 512)))
    assert [(r.rows, r.keys, r.hiding) for r in found] == [
        (slice(i, i + 128), slice(i, i + 128), None) for i in range(0, 512, 128)
    ]


def test_a_random_dense_mask_is_one_region():
    dense = torch.rand(600, 600, generator=generator(3)) > 0.3
    found = list(regions(problem(fa.Dense(dense), 1, 8, 600, 600)))
    assert [r.rows for r in found] == [slice(0, 600)]


def test_joined_tiles_stay_below_their_limit(monkeypatch):
    monkeypatch.setattr(module, "MASK", 1 << 16)
    dense = torch.rand(1, 2, 600, 400, generator=generator(4)) > 0.3
    found = list(regions(problem(fa.Dense(dense), 1, 2, 600, 400)))
    assert len(found) > 1
    assert all(r.hiding.numel() <= max(1 << 16, 2 * module.ROWS * 400) for r in found)


def runs(lengths, n_k):
    """A mask whose rows show the keys from a up to b."""
    key = torch.arange(n_k)
    a, b = torch.tensor(lengths).unbind(1)
    return (key >= a[:, None]) & (key < b[:, None])


@given(st.data(), st.sampled_from([1, 2, 7, 8, 9, 64, 300, 2041, 4100]))
@settings(max_examples=60, deadline=None)
def test_row_runs(data, n_k):
    ends = st.tuples(st.integers(0, n_k), st.integers(0, n_k))
    mask = runs(data.draw(st.lists(ends, min_size=1, max_size=5)), n_k)
    start, stop = row_runs(mask)
    assert torch.equal(runs(torch.stack([start, stop], 1).tolist(), n_k), mask)
    assert bool((stop[~mask.any(1)] == 0).all())
    if n_k >= 3:
        two = mask.clone()
        two[-1] = True
        two[-1, data.draw(st.integers(1, n_k - 2))] = False
        assert row_runs(two) is None


def test_row_runs_of_views():
    mask = torch.ones(3, 2, 50, 70, dtype=torch.bool).tril(7)
    for view in (mask, mask[:, :, :, 3:], mask.transpose(2, 3), mask[..., ::2], mask[:1].expand(4, 2, 50, 70)):
        start, stop = row_runs(view)
        assert start.shape == view.shape[:-1]
        key = torch.arange(view.shape[-1])
        assert torch.equal((key >= start[..., None]) & (key < stop[..., None]), view)


def test_unseen_keys_never_leak():
    dense = torch.rand(1, 1, 300, 300, generator=generator(9)) > 0.5
    dense[..., 40:43] = dense[..., 290:] = False
    q, k, v = (torch.randn(1, 2, 300, 8, generator=generator(i)) for i in range(3))
    clean = fa.attention(q, k, v, mask=dense)
    k[:, :, 40:43], v[:, :, 290:] = float("nan"), float("inf")
    assert torch.equal(fa.attention(q, k, v, mask=dense), clean)


def results(p, do):
    out, lse, low = fused.forward(p, True)
    return (out, lse, *fused.backward(p, do, out, lse, low)[:3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_small_calls_in_one_region(monkeypatch, name, dtype):
    """The same numbers as in many regions, also where keys that nobody sees hold NaN."""
    g = generator(3)
    n_b, n_q, n_k = 2, 13, 17
    mask = MASKS[name](n_b, 4, n_q, n_k)
    q, do = (torch.randn(n_b, 4, n_q, 8, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(n_b, 2, n_k, 8, generator=g).to(dtype) for _ in range(2))
    lowered = mask.lower(n_q, n_k)
    unseen = ~lowered.to_dense(n_b=n_b, n_h=4).expand(n_b, 4, -1, -1).any(2).any(1)  # (B, n_k)
    p = Problem(q, k, v, lowered, (), None, None, IDENTITY, 0.5, 0.0, "tiled", True)
    region = joint(p)
    assert (region is None) == (name in ("full", "causal"))
    k, v = (x.masked_fill(unseen[:, None, :, None], torch.nan) for x in (k, v))
    whole = results(replace(p, k=k, v=v), do)
    monkeypatch.setattr(fused, "joint", lambda p: None)
    parts = results(p, do)
    bar = dict(atol=1e-12, rtol=1e-12) if dtype == torch.float64 else dict(atol=2e-2, rtol=2e-2)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, **bar)
    assert whole[0].isfinite().all()


def test_what_is_worth_one_region():
    """Many short sequences; not one long batch entry, nor what needs no mask."""
    lengths = torch.arange(1, 65) % 9 + 1
    assert joint(problem(fa.Lengths(lengths), n_b=64, n_q=9, n_k=9)).hiding.shape == (64, 1, 1, 9)
    assert joint(problem(fa.Lengths(lengths), n_b=64, n_q=300, n_k=300)) is None
    assert joint(problem(fa.SlidingWindow(2, 0), n_b=64, n_q=100, n_k=100)) is None
    assert joint(problem(fa.Causal(), n_q=9, n_k=9)) is None
    assert joint(problem(fa.SlidingWindow(2, 0), n_q=9, n_k=9)).hiding.shape == (1, 1, 9, 9)

"""What the front promises: packed documents, shards and caches are the same function; empty rows; NaN; exact gradients."""

import pytest
import torch
from bars import errors
from cases import generator
from torch.testing import assert_close

import fastattn as fa
from fastattn.backends import tiled

TOLERANCE = dict(rtol=1e-9, atol=1e-9)


def make(*lengths, n_h=4, n_kv=2, d=8, dtype=torch.float64):
    g = generator(*lengths)
    return [torch.randn(1, h, n, d, dtype=torch.float64, generator=g).to(dtype) for h, n in zip((n_h, n_kv, n_kv), lengths)]


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_varlen_is_attention_on_each_document(align):
    cu_q, cu_k = torch.tensor([0, 3, 3, 10, 14]), torch.tensor([0, 5, 7, 15, 16])
    q, k, v = (x[0].transpose(0, 1).requires_grad_() for x in make(14, 16, 16))
    table, slopes, sinks = torch.randn(4, 9).double(), torch.rand(4).double(), torch.randn(4).double()
    score = fa.RelativeBias(table), fa.ALiBi(slopes)
    mask = fa.Causal(align)
    out, lse = fa.varlen_attention(q, k, v, cu_q, cu_k, mask=mask, score=score, sinks=sinks, return_lse=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    parts = []
    for n in range(4):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        shift = (keys.stop - keys.start) - (rows.stop - rows.start) if align == "bottom_right" else 0
        one = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        parts.append(
            fa.attention(*one, mask=mask, score=score, sinks=sinks, return_lse=True, coords=fa.Coordinates(q=int(shift)))
        )
    expected = torch.cat([o[0].transpose(0, 1) for o, _ in parts])
    assert_close(out, expected, **TOLERANCE)
    assert_close(lse, torch.cat([x[0] for _, x in parts], 1), **TOLERANCE)
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        assert_close(a, b, **TOLERANCE)


def test_varlen_dropout_equals_a_padded_batch():
    lengths = torch.tensor([3, 7, 4])
    cu = torch.tensor([0, 3, 10, 14])
    q, k, v = (x[0].transpose(0, 1) for x in make(14, 14, 14))
    torch.manual_seed(0)
    packed = fa.varlen_attention(q, k, v, cu, dropout_p=0.5)

    def padded(x):
        out = x.new_zeros(3, 7, *x.shape[1:])
        for n in range(3):
            out[n, : lengths[n]] = x[cu[n] : cu[n + 1]]
        return out.transpose(1, 2)

    torch.manual_seed(0)
    whole = fa.attention(*(padded(x) for x in (q, k, v)), mask=fa.Lengths(lengths, lengths), dropout_p=0.5)
    for n in range(3):
        assert_close(packed[cu[n] : cu[n + 1]], whole[n, :, : lengths[n]].transpose(0, 1), **TOLERANCE)


def test_rows_past_the_last_document():
    q, k, v = (x[0].transpose(0, 1) for x in make(6, 6, 6))
    out, lse = fa.varlen_attention(q, k, v, torch.tensor([0, 4]), return_lse=True)
    assert torch.equal(out[4:], torch.zeros_like(out[4:]))
    assert bool((lse[:, 4:] == -torch.inf).all())


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_shards_are_the_whole(dropout_p):
    """Rows and heads computed apart, with the coordinates that they have in the whole, and keys merged by lse."""
    q, k, v = make(12, 12, 12)
    bias, slopes = torch.randn(4, 12, 12).double(), torch.rand(4).double()

    def run(rows, heads, keys):
        torch.manual_seed(1)
        kv_heads = slice(heads.start // 2, heads.stop // 2)
        return fa.attention(
            q[:, heads, rows], k[:, kv_heads, keys], v[:, kv_heads, keys],
            mask=fa.Causal(rows.start - keys.start),
            score=(fa.Bias(bias[heads]), fa.ALiBi(slopes[heads])), dropout_p=dropout_p, return_lse=True,
            coords=fa.Coordinates(h=heads.start, q=rows.start, k=keys.start),
        )  # fmt: skip

    whole, whole_lse = run(slice(0, 12), slice(0, 4), slice(0, 12))
    for rows in (slice(0, 5), slice(5, 12)):
        for heads in (slice(0, 2), slice(2, 4)):
            left, right = (run(rows, heads, keys) for keys in (slice(0, 7), slice(7, 12)))
            out, lse = fa.merge(*left, *right)
            assert_close(out, whole[:, heads, rows], **TOLERANCE)
            assert_close(lse, whole_lse[:, heads, rows], **TOLERANCE)


def test_coordinate_tensors_equal_offsets():
    q, k, v = make(6, 9, 9)
    bias, table = torch.randn(4, 9, 12).double().requires_grad_(), torch.randn(4, 7).double().requires_grad_()
    results = []
    for coords in (
        fa.Coordinates(b=2, h=1, q=3, k=1),
        fa.Coordinates(b=torch.tensor([2]), h=torch.arange(1, 5), q=torch.arange(3, 9), k=torch.arange(1, 10)),
        fa.Coordinates(b=torch.full((1, 6), 2), h=1, q=torch.arange(3, 9)[None], k=torch.arange(1, 10)[None]),
    ):
        torch.manual_seed(0)
        out = fa.attention(q, k, v, score=(fa.Bias(bias), fa.RelativeBias(table)), dropout_p=0.3, coords=coords)
        results.append((out, *torch.autograd.grad(out.square().sum(), (bias, table))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_close(a, b, **TOLERANCE)


def test_merge_is_differentiable_and_takes_empty_sides():
    q, k, v = (x.requires_grad_() for x in make(5, 8, 8))
    mask = fa.Dense(torch.tensor([True, True, False, True, True])[:, None] & (torch.arange(8) < 8))
    whole = fa.attention(q, k, v, mask=mask, return_lse=True)
    parts = [
        fa.attention(q, k[:, :, s], v[:, :, s], mask=fa.Dense(mask.tensor[:, s]), return_lse=True)
        for s in (slice(0, 3), slice(3, 8))
    ]
    merged = fa.merge(*parts[0], *parts[1])
    for a, b in zip(merged, whole, strict=True):
        assert_close(a, b, **TOLERANCE)
    loss = lambda o, l: o.square().sum() + l.masked_fill(l == -torch.inf, 0).sin().sum()
    for a, b in zip(
        torch.autograd.grad(loss(*merged), (q, k, v)), torch.autograd.grad(loss(*whole), (q, k, v)), strict=True
    ):
        assert_close(a, b, **TOLERANCE)
        assert a.isfinite().all()


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("score", [(), (fa.Softcap(3.0),)])
def test_rows_that_see_nothing(score, backend):
    q, k, v = (x.requires_grad_() for x in make(6, 7, 7))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = fa.Dense((torch.arange(6) % 2 == 0)[:, None].expand(6, 7))
    out, lse = fa.attention(q, k, v, mask=mask, score=score, return_lse=True, backend=backend)
    assert torch.equal(out[:, :, 1::2], torch.zeros_like(out[:, :, 1::2]))
    assert bool((lse[:, :, 1::2] == -torch.inf).all())
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads)
    assert bool((grads[0][:, :, 1::2] == 0).all())
    out, lse = fa.attention(q, k, v, mask=mask, score=score, sinks=sinks, return_lse=True, backend=backend)
    assert_close(lse[:, :, 1], sinks[None].expand(1, 4).detach().clone(), check_layout=False)
    (dsinks,) = torch.autograd.grad(lse[:, :, 1::2].sum(), sinks)
    assert_close(dsinks, torch.full_like(dsinks, 3.0))  # three rows, each of which is its sink alone


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_no_row_sees_may_hold_anything(value, backend):
    q, k, v = make(40, 60, 60)
    for mask, hidden in (
        (fa.Lengths(torch.tensor([50])), slice(50, 60)),
        (fa.Padding(torch.arange(60)[None] >= 20, "left") & fa.Causal("bottom_right"), slice(0, 20)),
        (fa.Dense((torch.arange(60) % 5 != 0).expand(40, 60)), slice(0, 60, 5)),
        (fa.Documents(cu_seqlens=torch.tensor([0, 20, 40]), cu_seqlens_k=torch.tensor([0, 25, 50])), slice(50, 60)),
    ):
        expected = fa.attention(q, k, v, mask=mask)
        spoiled_k, spoiled_v = k.clone(), v.clone()
        spoiled_k[:, :, hidden] = value
        spoiled_v[:, :, hidden] = value
        x = [q.requires_grad_(), spoiled_k.requires_grad_(), spoiled_v.requires_grad_()]
        out = fa.attention(*x, mask=mask, backend=backend)
        assert_close(out, expected, **TOLERANCE)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), x))


def test_nan_row_stays_nan_and_alone():
    q, k, v = make(9, 9, 9, dtype=torch.float32)
    q[0, 1, 4, 2] = float("nan")
    for kwargs in ({}, dict(score=fa.Softcap(2.0)), dict(mask=fa.SlidingWindow(3, 0))):
        out = fa.attention(q, k, v, **kwargs)
        assert out[0, 1, 4].isnan().all()
        out[0, 1, 4] = 0
        assert not out.isnan().any()


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4), (2, 2, 5, 0)])
def test_zero_sizes(shape):
    b, h, n, d = shape
    q = torch.randn(b, h, n, d, requires_grad=True)
    for n_k in (0, 3):
        k, v = torch.randn(b, h, n_k, d, requires_grad=True), torch.randn(b, h, n_k, 6, requires_grad=True)
        for kwargs in ({}, dict(mask=fa.SlidingWindow(1, 1, "top_left")), dict(score=fa.Softcap(2.0))):
            out, lse = fa.attention(q, k, v, return_lse=True, **kwargs)
            expected, expected_lse = fa.attention(q, k, v, return_lse=True, backend="reference", **kwargs)
            assert_close(out, expected)
            assert_close(lse, expected_lse)
            grads = torch.autograd.grad(out.sum(), (q, k, v))
            assert all(g.shape == x.shape for g, x in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize(("drift", "bar"), [(False, 2e-3), (True, 6e-3)])
@pytest.mark.parametrize("score", [(), (fa.Bias(torch.zeros(1, 1)),)])
def test_bf16_dq_where_keys_have_a_mean(drift, bar, score):
    """delta from both halves of O: kernels that take it from O rounded to bf16 lose 12 % of dq here."""
    g = torch.Generator().manual_seed(0)
    n, d = 1024, 64
    offset = 3 * torch.randn(1, 1, 1, d, generator=g) * (torch.linspace(-1, 1, n)[:, None] if drift else 1.0)
    q, k, v, do = (torch.randn(1, 2, n, d, generator=g) for _ in range(4))
    q, k, v, do = (x.bfloat16() for x in (q, k + offset, v + 3.0, do))
    score = [s.with_params((s.params[0].clone().requires_grad_(),)) for s in score]  # a gradient: the other kernel
    x = [y.requires_grad_() for y in (q, k, v)]
    ours = torch.autograd.grad(fa.attention(*x, mask=fa.Causal(), score=score), x, do)
    wide = [y.detach().double().requires_grad_() for y in x]
    exact = torch.autograd.grad(fa.attention(*wide, mask=fa.Causal(), backend="reference"), wide, do.double())
    assert errors(ours[0], exact[0])[1] <= bar
    assert errors(ours[1], exact[1])[1] <= bar


FAR = -float(1 << 17)  # of which float32 still holds 64ths


def far_call(n, dtype=torch.float32):
    """q, k, v, a bias whose second row is far from 0, and sinks beside it; logits are exact in float32."""
    make = lambda *shape: generator_ints(*shape).to(dtype).requires_grad_()
    bias = torch.zeros(n, n)
    bias[1] = FAR
    sinks = torch.tensor([0.5, FAR])
    return make(1, 2, n, 4), make(1, 2, n, 4), make(1, 2, n, 4), bias.requires_grad_(), sinks.requires_grad_()


def generator_ints(*shape):
    return torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(len(shape) + shape[2])) / 8


FAR_CALLS = {
    "as torch has it": lambda q, k, v, b, s: fa.scaled_dot_product_attention(q, k, v, b.detach(), scale=1.0),
    "bias": lambda q, k, v, b, s: fa.attention(q, k, v, score=fa.Bias(b), scale=1.0),
    "bias that is given": lambda q, k, v, b, s: fa.attention(q, k, v, score=fa.Bias(b.detach()), scale=1.0),
    "causal": lambda q, k, v, b, s: fa.attention(q, k, v, mask=fa.Causal(), score=fa.Bias(b), scale=1.0),
    "sinks": lambda q, k, v, b, s: fa.attention(q, k, v, score=fa.Bias(b), sinks=s, scale=1.0),
    "batch invariant": lambda q, k, v, b, s: fa.attention(
        q, k, v, score=fa.Bias(b), sinks=s, scale=1.0, deterministic="batch_invariant"
    ),
    "weights": lambda q, k, v, b, s: fa.attention_weights(q, k, score=fa.Bias(b), sinks=s, scale=1.0) @ v.to(b.dtype),
    "entropy": lambda q, k, v, b, s: fa.attention_weights(q, k, score=fa.Bias(b), scale=1.0, reduce="entropy"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [6, 140])
@pytest.mark.parametrize("name", FAR_CALLS)
def test_a_row_of_logits_far_from_0(name, n, dtype):
    """lse has lost the log of the sum there, on which derivatives go on: float32 holds no 64ths beside 2^17 and a logarithm."""
    attend = FAR_CALLS[name]
    leaves = far_call(n, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    tangents = [generator_ints(*(1,) * (3 - x.dim()), *x.shape).view(x.shape).to(x.dtype) for x in leaves]

    def derivatives(x):
        out = attend(*x)
        first = torch.autograd.grad(out.sin().sum(), x, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), x, allow_unused=True)
        forward = torch.func.jvp(attend, tuple(x), tuple(t.to(y.dtype) for t, y in zip(tangents, x)))[1]
        return out, *first, *second, forward

    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for found, truth in zip(derivatives(leaves), derivatives(wide), strict=True):
        assert (found is None) == (truth is None)
        if found is not None:
            assert_close(found.double(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


def test_explain_runs_nothing_and_tells():
    q, k, v = make(5, 5, 5)
    state = torch.get_rng_state()
    told = fa.explain(q, k, v, mask=fa.Causal(), score=fa.Softcap(1.0), dropout_p=0.1)
    assert torch.equal(state, torch.get_rng_state())
    assert told.backend == "tiled"
    assert "no dropout" in str(told)
    assert "softcap" in str(told)
    assert fa.explain(q, k, v).reasons == ()
    bias = fa.Bias(torch.zeros(5, 5))
    assert fa.explain(q, k, v, score=bias).reasons == ()
    (trained,) = fa.explain(q, k, v, score=fa.Bias(bias.params[0].requires_grad_())).reasons
    assert trained == ("fused CPU kernel in the backward", "torch's fused CPU kernel gives no gradient to bias")
    q.requires_grad_()
    assert fa.explain(q, k, v).reasons == ()
    assert "no gradient of lse" in str(fa.explain(q, k, v, return_lse=True))
    assert fa.explain(q, k, v, backend="reference").backend == "reference"


def test_lowered_mask_is_shared_and_unchanged():
    q, k, v = make(6, 6, 6)
    mask = (fa.SinkTokens(1) | fa.SlidingWindow(2, 0)) & fa.Causal()
    lowered = mask.lower(6, 6)
    before = [x.clone() for x in lowered.tensors()]
    for _ in range(2):
        assert_close(fa.attention(q, k, v, mask=lowered), fa.attention(q, k, v, mask=mask))
    assert all(torch.equal(a, b) for a, b in zip(before, lowered.tensors(), strict=True))


def test_rows_without_keys_under_a_moving_span():
    """A window that has moved past the keys: those rows' lse is -inf, or the sink's logit."""
    x = torch.randn(12, 2, 4, dtype=torch.float64, generator=generator(1))
    _, lse = fa.varlen_attention(x, x, x, torch.tensor([0, 3, 10]), mask=fa.SlidingWindow(1, 0), return_lse=True)
    assert bool((lse[:, 10:] == -torch.inf).all())
    keep = torch.arange(300)[None] < torch.tensor([[100], [300]])
    q = torch.randn(2, 2, 300, 4, dtype=torch.float64, generator=generator(2))
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    mask = fa.Padding(keep) & fa.SlidingWindow(20, 0)
    found = [fa.attention(q, q, q, mask=mask, sinks=sinks, return_lse=True, backend=b) for b in ("tiled", "reference")]
    for a, b in zip(*found, strict=True):
        assert_close(a, b, **TOLERANCE)
    grads = [torch.autograd.grad(lse.masked_fill(lse == -torch.inf, 0.0).sum(), sinks)[0] for _, lse in found]
    assert_close(*grads, **TOLERANCE)


@pytest.mark.parametrize("mask", [None, fa.SlidingWindow(2, 0)])
@pytest.mark.parametrize("n", [5, 40])
def test_rows_that_share_storage(n, mask):
    x = torch.randn(2, 4, n + 7, dtype=torch.float64, generator=generator(n)).unfold(2, 8, 1)  # (2, 4, n, 8)
    apart = x.contiguous()
    expected = fa.attention(apart, apart, apart, mask=mask)
    assert torch.equal(fa.attention(x, x, x, mask=mask), expected)
    assert torch.equal(fa.attention(x, apart, apart, mask=mask), expected)
    if mask is None:
        assert torch.equal(fa.scaled_dot_product_attention(x, x, x), expected)


@pytest.mark.parametrize("score", [(), fa.Softcap(3.0)])
def test_nan_sink_is_seen(score):
    x = torch.ones(1, 1, 3, 4)
    assert fa.attention(x, x, x, sinks=torch.tensor([float("nan")]), score=score).isnan().all()


@pytest.mark.parametrize("align", [2**31, 2**40, -(2**31) - 5, 2**31 - 1])
def test_alignments_beyond_every_length(align):
    q = torch.randn(1, 1, 6, 4, dtype=torch.float64, generator=generator(3))
    wanted = torch.full((6, 6), align > 0)
    for mask in (fa.Causal(align), fa.SlidingWindow(None, 2**40, align)):
        assert torch.equal(mask.to_dense(6, 6)[0, 0], wanted if isinstance(mask, fa.Causal) else torch.ones(6, 6).bool())
        expected = fa.attention(q, q, q, mask=mask.to_dense(6, 6))
        assert_close(fa.attention(q, q, q, mask=mask), expected, **TOLERANCE)


@pytest.mark.parametrize("align", [-3, -1, 0, 2])
def test_causal_at_a_position_of_its_own(align):
    q = torch.randn(1, 2, 6, 4, generator=generator(6))
    for mask in (fa.Causal(align), fa.Causal(align).lower(6, 6)):
        assert_close(fa.attention(q, q, q, mask=mask), fa.attention(q, q, q, mask=fa.Causal(align), backend="reference"))


def test_varlen_bias_of_the_longest_document():
    cu = torch.tensor([0, 2, 5])
    q, k, v = (x[0].transpose(0, 1) for x in make(6, 6, 6))
    bias = torch.randn(4, 3, 3, dtype=torch.float64, generator=generator(4))
    out = fa.varlen_attention(q, k, v, cu, score=fa.Bias(bias))
    for first, last in ((0, 2), (2, 5)):
        one = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
        n = last - first
        expected = fa.attention(*one, score=fa.Bias(bias[:, :n, :n]))
        assert_close(out[first:last], expected[0].transpose(0, 1), **TOLERANCE)
    assert not out[5:].any()


def test_varlen_without_documents():
    x = torch.ones(3, 2, 4)
    cu = torch.tensor([0])
    out = fa.varlen_attention(x, x, x, cu, cu, mask=fa.Causal("bottom_right"), score=fa.ALiBi(torch.ones(2)))
    assert torch.equal(out, torch.zeros_like(x))


@pytest.mark.parametrize("gradients", [True, False])
def test_warmup_leaves_nothing_behind(gradients, monkeypatch):
    q, k, v = (x.requires_grad_() for x in make(5, 6, 6))
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    state, done = torch.get_rng_state(), []
    for verb in ("forward", "backward"):
        real = getattr(tiled, verb)
        monkeypatch.setattr(tiled, verb, lambda *a, real=real, verb=verb: (done.append(verb), real(*a))[1])
    seconds = fa.warmup(q, k, v, score=fa.ALiBi(slopes), dropout_p=0.5, gradients=gradients)
    assert seconds > 0.0
    assert done == (["forward", "backward"] if gradients else ["forward"])
    assert torch.equal(torch.get_rng_state(), state)
    assert q.grad is None
    assert slopes.grad is None


@pytest.mark.parametrize(
    ("mask", "causal"), [(fa.Full(), False), (fa.Causal(), True), (fa.SlidingWindow(2, 0), False), (fa.Causal(1), False)],
)
def test_small_calls_share_a_lowered_mask(monkeypatch, mask, causal):
    """A mask lowered once for many layers takes the same short way as the mask itself, and only where it is the same."""
    from fastattn import express

    taken = []
    real = express._computed
    monkeypatch.setattr(express, "_computed", lambda *args: taken.append(args[4]) or real(*args))
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    lowered = mask.lower(5, 5)
    found = fa.attention(q, k, v, mask=lowered)
    assert taken == [causal]
    assert_close(found, fa.attention(q, k, v, mask=mask, backend="reference"))
    with pytest.raises(ValueError, match="mask"):
        fa.attention(q, torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8), mask=lowered)
    rectangle = fa.Causal("top_left").lower(5, 7)
    k, v = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    assert_close(fa.attention(q, k, v, mask=rectangle), fa.attention(q, k, v, mask=rectangle, backend="reference"))


@pytest.mark.parametrize(("head_dim", "v_dim"), [(0, 3), (3, 0), (0, 0)])
def test_head_dim_0_with_grouped_heads(head_dim, v_dim):
    """Without a head_dim every key has the same weight."""
    q, k = (torch.zeros(2, h, n, head_dim, dtype=torch.float64, requires_grad=True) for h, n in ((4, 3), (2, 5)))
    v = torch.randn(2, 2, 5, v_dim, dtype=torch.float64, requires_grad=True)
    out = fa.attention(q, k, v)
    assert_close(out, v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 3, v_dim))
    grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    assert_close(grads[2], 2 * 3 * 2 * v.mean(2, keepdim=True).expand_as(v) / 5)
    torch.autograd.grad(sum(g.sum() for g in grads), (q, k, v))


@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (5, 1)])
def test_bool_masks_of_any_rank(shape):
    """The same in a small call and in one that is not."""
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    expected = fa.attention(q, k, v, mask=mask.expand(5, 6), backend="reference")
    for backend in (None, "tiled"):
        assert_close(fa.attention(q, k, v, mask=mask, backend=backend), expected)

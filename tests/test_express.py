"""The short way of small masked calls: the long way's numbers, every derivative, and nothing that the long way refuses."""

import pytest
import torch
from bars import assert_within
from cases import MASKS, generator, tensors
from torch.testing import assert_close

import fastattn as fa
from fastattn import functional

LONG = "attention_op"  # what only the long way comes to
SIZES = {"tiny": (5, 7), "few keys of many": (1, 300), "many rows": (33, 33)}


@pytest.fixture
def short_only(monkeypatch):
    """The long way raises."""

    def refused(*args):
        raise AssertionError("went the long way")

    monkeypatch.setattr(functional.autograd, LONG, refused)


def long_way(q, k, v, mask, **kwargs):
    return fa.attention(q, k, v, mask=mask, backend="tiled", **kwargs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(set(MASKS) - {"full", "custom"}))
def test_masks(name, size):
    wanted = ("qkv", "q", "kv")[len(name + size) % 3]
    n_q, n_k = SIZES[size]
    q, k, v = (x.requires_grad_(n in wanted) for n, x in zip("qkv", map(torch.Tensor.detach, tensors(
        2, 4, 2, n_q, n_k, 48, 48, torch.float64, strided=True))))  # fmt: skip
    mask = MASKS[name](2, 4, n_q, n_k)
    short, long = fa.attention(q, k, v, mask=mask), long_way(q, k, v, mask)
    assert "_Fwd" not in type(short.grad_fn).__name__
    assert_close(short, long)
    x = [y for y in (q, k, v) if y.requires_grad]
    do = torch.randn(2, 4, 48, n_q, dtype=torch.float64, generator=generator(1)).mT
    for a, b in zip(*(torch.autograd.grad(o, x, do, retain_graph=True) for o in (short, long)), strict=True):
        assert_close(a, b)
    twice = [torch.autograd.grad(o, x, do, create_graph=True) for o in (short, long)]
    t = [torch.randn_like(y) for y in x]
    for a, b in zip(*(torch.autograd.grad(g, x, t, allow_unused=True, materialize_grads=True) for g in twice), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_derivatives_by_differences(kind):
    q, k, v = tensors(1, 2, 1, 3, 4, 2, 2, torch.float64)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    if kind == "float":
        mask = torch.randn(3, 4, dtype=torch.float64).masked_fill(~mask, -torch.inf)

    def call(*x):
        return fa.scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=True)

    assert "ToCopy" not in type(call(q, k, v).grad_fn).__name__
    assert torch.autograd.gradcheck(call, (q, k, v), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (q, k, v), check_fwd_over_rev=True)


@pytest.mark.usefixtures("short_only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_what_takes_the_short_way(trained, dtype):
    """Masks lowered or not, bool and float tensors, grouped heads, every dtype."""
    q, k, v = (x.detach().requires_grad_(trained) for x in tensors(2, 4, 2, 9, 9, 16, 16, dtype))
    lengths, keep = torch.tensor([4, 9]), torch.arange(9) < torch.tensor([[3], [9]])
    dense = torch.rand(2, 1, 9, 9, generator=generator(0)) > 0.5
    masks = fa.SlidingWindow(2, 0), fa.Causal(2), fa.Lengths(lengths), fa.Padding(keep), fa.Chunked(4), dense
    for mask in masks:
        mask = mask.lower(9, 9) if isinstance(mask, fa.Mask) else mask
        assert fa.attention(q, k, v, mask=mask).dtype == dtype
    fa.attention(q, k, v, mask=fa.Documents(cu_seqlens=torch.tensor([0, 4, 9])))
    for mask in (None, dense, dense[0, 0], keep[:, None, None], torch.randn(9, 9), torch.randn(4, 1, 9).to(dtype)):
        fa.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    fa.attention(q, k, v, mask=dense, dropout_p=0)
    fa.scaled_dot_product_attention(q, k, v, dense, 0, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["window", "bool", "float"])
def test_low_precision_against_float64(kind, dtype):
    """Also the gradient of q where keys have a mean, for which O must not be rounded."""
    n = 30
    q, k, v = (x.detach() for x in tensors(1, 2, 2, n, n, 32, 32, dtype))
    x = [y.requires_grad_() for y in (q, k + 3, v + 3)]
    mask = fa.SlidingWindow(8, 0).to_dense(n, n)
    mask = torch.randn(n, n, generator=generator(2)).masked_fill(~mask, -torch.inf) if kind == "float" else mask
    do = torch.randn(q.shape, generator=generator(3)).to(dtype)

    def run(call, x, do):
        out = call(*x)
        return out, *torch.autograd.grad(out, x, do)

    def ours(q, k, v):
        if kind == "window":
            return fa.attention(q, k, v, mask=fa.SlidingWindow(8, 0))
        return fa.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def plain(q, k, v):
        s = q @ k.mT / 32**0.5
        s = s + mask.to(s.dtype) if kind == "float" else s.masked_fill(~mask, -torch.inf)
        return s.softmax(-1) @ v

    wide = [y.detach().double().requires_grad_() for y in x]
    exact, naive, found = run(plain, wide, do.double()), run(plain, x, do), run(ours, x, do)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), found, exact, naive, strict=True):
        assert_within(a, b, [c], 2 if name == "out" else 3, name)
    assert (found[1].double() - exact[1]).norm() / exact[1].norm() < {torch.bfloat16: 3e-3}.get(dtype, 1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["lengths", "left_padding", "key_padding", "spans", "window"])
def test_keys_that_nobody_sees_may_hold_anything(name, trained, value):
    n_q, n_k = 4, 300
    q, k, v = (x.detach() for x in tensors(2, 4, 2, n_q, n_k, 8, 8, torch.float32))
    mask = MASKS[name](2, 4, n_q, n_k)
    unseen = ~mask.to_dense(n_q, n_k).expand(2, 4, -1, -1).any(2).any(1)[:, None, :, None]
    assert unseen.any()
    results = []
    alone = torch.zeros(2, 2, n_k, 8)
    b, _, key, _ = unseen.nonzero()[0].tolist()
    alone[b, 1, key, 0] = value
    for fill in (torch.tensor(0.0), alone if value == 3e38 else torch.tensor(value)):  # two of 3e38 add up to inf
        x = [y.clone().requires_grad_(trained) for y in (q, torch.where(unseen, fill, k), torch.where(unseen, fill, v))]
        for given in (mask, mask.to_dense(n_q, n_k)):
            out = fa.attention(*x, mask=given)
            results.append([out, *torch.autograd.grad(out.sum(), x)] if trained else [out])
    for a, b in zip(results[0] + results[1], results[2] + results[3], strict=True):
        assert b.isfinite().all()
        assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_visible_nan_reaches_its_rows(kind):
    q, k, v = (x.detach() for x in tensors(1, 2, 2, 4, 5, 8, 8, torch.float32))
    mask = torch.ones(4, 5).tril().bool()
    k[:, :, 2] = torch.nan
    given = mask if kind == "bool" else torch.zeros(4, 5).masked_fill(~mask, -torch.inf)
    out = fa.scaled_dot_product_attention(q, k, v, attn_mask=given)
    assert out[:, :, 2:].isnan().all()


def test_data_of_a_shared_mask_may_change():
    """A cache's lengths grow in place: nothing of what was computed from them is kept."""
    q, k, v = (x.detach() for x in tensors(1, 2, 2, 1, 12, 8, 8, torch.float32))
    lengths = torch.tensor([3], dtype=torch.int32)
    mask = fa.Lengths(lengths).lower(1, 12)
    for n in (3, 7, 12):
        lengths.fill_(n)
        assert_close(fa.attention(q, k, v, mask=mask), fa.attention(q, k[:, :, :n], v[:, :, :n]))


def test_a_mask_met_in_inference_mode_is_trained_with_later():
    q, k, v = tensors(1, 2, 2, 11, 11, 8, 8, torch.float32)
    mask = fa.SlidingWindow(7, 2)
    with torch.inference_mode():
        fa.attention(q, k, v, mask=mask)
    wanted = torch.autograd.grad(fa.attention(q, k, v, mask=mask, backend="reference").sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad(fa.attention(q, k, v, mask=mask).sum(), (q, k, v)), wanted, strict=True):
        assert_close(a, b)


def test_masks_of_any_strides_and_shapes():
    q, k, v = (x.detach() for x in tensors(2, 3, 3, 4, 6, 8, 8, torch.float64))
    wide = torch.randn(2, 3, 6, 8, dtype=torch.float64, generator=generator(4))
    views = [wide.mT[:, :, 2:6], wide[:1, :1, :4, ::2].expand(2, 3, 4, 4).repeat(1, 1, 1, 2)[..., 1:7], wide[0, 0, 0, :6]]
    views += [wide[:, :1, :1, :6].expand(2, 3, 4, 6), wide[0, 0, :4, :1], wide[0, 0, 0, 0], wide[:, :1, 1:2, 2:]]
    for view in views:
        for mask in (view, view > 0):
            before = mask.clone()
            found = fa.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            full = mask.expand(2, 3, 4, 6)
            s = q @ k.mT / 8**0.5
            s = s.masked_fill(~full, -torch.inf) if mask.dtype == torch.bool else s + full
            assert_close(found, s.softmax(-1).nan_to_num(0.0) @ v)
            assert torch.equal(mask, before)


def test_errors_are_those_of_the_long_way():
    q, k, v = tensors(2, 4, 2, 5, 6, 8, 8, torch.float32)
    attention, drop_in = fa.attention, fa.scaled_dot_product_attention
    for call, words in (
        (lambda: attention(q, k, v, mask=fa.Lengths(torch.tensor([1, 2, 3]))), "mask must have batch size 1 or 2, got 3"),
        (lambda: attention(q, k, v, mask=fa.SlidingWindow(1, 0)), "needs n_q == n_k"),
        (lambda: attention(q, k, v, mask=fa.Full().lower(5, 5)), "lowered for 5 rows and 5 keys"),
        (lambda: attention(q, k, v, mask=torch.ones(3, 1, 5, 6).bool()), "mask must have batch size 1 or 2, got 3"),
        (lambda: attention(q, k, v, mask=torch.ones(2, 3, 5, 6).bool()), "mask must have 1 or 4 heads, got 3"),
        (lambda: drop_in(q, k, v), "must broadcast"),
        (lambda: drop_in(q, k, v, torch.ones(5, 5).bool(), enable_gqa=True), "attn_mask must broadcast to"),
        (lambda: attention(q, k[:, :1].expand(-1, 3, -1, -1), v[:, :1].expand(-1, 3, -1, -1)), "must be a multiple of"),
        (lambda: attention(q, k, v, dropout_p=None), "dropout_p must be a number"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 17, 31])  # the kernel's vectors have 4 to 16 numbers, by processor and dtype
def test_a_nan_row_stays_nan_and_alone(n, dtype):
    q, k, v = (x.detach() for x in tensors(1, 4, 2, n, n, 8, 8, dtype))
    q[0, 1, n // 2, 2] = torch.nan
    for mask in (None, fa.Causal(), fa.SlidingWindow(n, 0), torch.ones(n, n, dtype=torch.bool)):
        out = fa.attention(q, k, v, mask=mask)
        assert out[0, 1, n // 2].isnan().all()
        out[0, 1, n // 2] = 0
        assert not out.isnan().any()

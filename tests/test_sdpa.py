"""The drop-in against torch's own function, in everything the OpInfo samples do not ask."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing import assert_close

import fastattn as fa


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def both(q, k, v, **kwargs):
    """Outputs and gradients (of a float mask too) of ours and torch's are equal."""
    inputs = [x for x in (q, k, v, kwargs.get("attn_mask")) if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for fn in (fa.scaled_dot_product_attention, F.scaled_dot_product_attention):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = fn(q, k, v, **kwargs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert_close(a, b)


RANKS = {
    "2-D": ((5, 4), (6, 4)),
    "3-D": ((3, 5, 4), (3, 6, 4)),
    "3-D broadcast": ((3, 5, 4), (1, 6, 4)),
    "4-D heads": ((2, 3, 5, 4), (2, 1, 6, 4)),
    "4-D batch": ((1, 3, 5, 4), (2, 3, 6, 4)),
    "4-D and 3-D": ((2, 3, 5, 4), (3, 6, 4)),
    "5-D": ((2, 2, 3, 5, 4), (2, 2, 3, 6, 4)),
    "6-D": ((1, 2, 2, 3, 5, 4), (2, 1, 1, 3, 6, 4)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", RANKS)
def test_ranks(name, causal):
    q_shape, k_shape = RANKS[name]
    both(make(*q_shape), make(*k_shape, seed=1), make(*k_shape, seed=2), is_causal=causal)


MASK_SHAPES = [(5, 6), (1, 6), (5, 1), (1, 1), (3, 5, 6), (1, 5, 6), (2, 1, 5, 6), (2, 3, 5, 6), (2, 1, 1, 6)]


@pytest.mark.parametrize("kind", ["bool", "float", "float with gradient"])
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masks(shape, kind):
    mask = make(*shape, seed=3).detach()
    mask = mask > -0.5 if kind == "bool" else mask.requires_grad_(kind == "float with gradient")
    both(make(2, 3, 5, 4), make(2, 3, 6, 4, seed=1), make(2, 3, 6, 4, seed=2), attn_mask=mask)


def test_masks_of_other_ranks():
    both(make(2, 2, 3, 5, 4), make(2, 2, 3, 6, 4), make(2, 2, 3, 6, 4), attn_mask=make(2, 1, 3, 5, 6))
    both(make(3, 5, 4), make(3, 6, 4), make(3, 6, 4), attn_mask=make(3, 5, 6))
    both(make(5, 4), make(6, 4), make(6, 4), attn_mask=make(5, 6))
    q, k = make(2, 3, 5, 4), make(2, 3, 6, 4)
    for small in (torch.tensor(True), torch.tensor([True, True, False, True, True, False])):
        whole = small.expand(5, 6)
        assert_close(
            fa.scaled_dot_product_attention(q, k, k, attn_mask=small), F.scaled_dot_product_attention(q, k, k, attn_mask=whole)
        )


@pytest.mark.parametrize("heads", [(8, 2, 2), (8, 2, 4), (6, 3, 1)])
def test_gqa(heads):
    q, k, v = (make(2, h, 5, 4, seed=h) for h in heads)
    both(q, k, v, enable_gqa=True)
    both(q[0], k[0], v[0], enable_gqa=True)


@pytest.mark.parametrize("lengths", [(5, 5), (4, 7), (7, 4)])
@pytest.mark.parametrize("make_bias", [causal_upper_left, causal_lower_right])
def test_causal_bias(make_bias, lengths):
    n_q, n_k = lengths
    q, k, v = make(2, 3, n_q, 4), make(2, 3, n_k, 4, seed=1), make(2, 3, n_k, 4, seed=2)
    offset = n_k - n_q if make_bias is causal_lower_right else 0
    dense = torch.ones(n_q, n_k, dtype=torch.bool).tril(offset)
    out = fa.scaled_dot_product_attention(q, k, v, attn_mask=make_bias(n_q, n_k))
    assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=dense))


@pytest.mark.parametrize("scale", [0.0, -0.7, 2, torch.tensor(0.3)])
def test_scales(scale):
    q, k, v = (make(2, 3, 5, 4, seed=i) for i in range(3))
    for causal in (False, True):
        out = fa.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one gives NaN at 0
            mask = torch.ones(5, 5, dtype=torch.bool).tril() if causal else None
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=float(scale))
        assert_close(out, expected)


def test_rows_of_minus_infinity():
    mask = torch.zeros(5, 6, dtype=torch.float64)
    mask[2] = -torch.inf
    q, k, v = make(1, 2, 5, 4), make(1, 2, 6, 4), make(1, 2, 6, 4)
    out = fa.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (q, k, v)))
    mask.requires_grad_()
    out = fa.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.autograd.grad(out.square().sum(), mask)[0].isfinite().all()


def test_dropout():
    q, k, v = (make(2, 3, 50, 4, seed=i) for i in range(3))
    assert torch.equal(fa.scaled_dot_product_attention(q, k, v, dropout_p=1.0), torch.zeros_like(q))
    torch.manual_seed(0)
    first = fa.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, fa.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    torch.manual_seed(0)
    assert torch.equal(first, fa.scaled_dot_product_attention(q, k, v, dropout_p=0.5))


class Tagged(torch.Tensor):
    """A subclass with the default protocol: results keep its type."""


class Counting(torch.Tensor):
    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_torch_function_subclasses():
    q, k, v = (make(2, 3, 5, 4, seed=i).detach() for i in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    out = fa.scaled_dot_product_attention(q.as_subclass(Tagged), k, v)
    assert type(out) is Tagged
    assert_close(out.as_subclass(torch.Tensor), expected)
    Counting.seen.clear()
    fa.scaled_dot_product_attention(q, k.as_subclass(Counting), v)
    assert fa.scaled_dot_product_attention in Counting.seen


@pytest.mark.parametrize("causal", [False, True])
def test_jagged(causal):
    lengths = (3, 5, 2)
    parts = [[make(n, 2, 4, seed=10 * i + n).detach() for n in lengths] for i in range(3)]
    q, k, v = (torch.nested.nested_tensor(p, layout=torch.jagged, requires_grad=True) for p in parts)
    out = fa.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    out.transpose(1, 2).values().square().sum().backward()
    for n in range(3):
        one = [p[n].transpose(0, 1)[None].requires_grad_() for p in parts]
        expected = F.scaled_dot_product_attention(*one, is_causal=causal)
        assert_close(out.unbind()[n], expected[0])
        for nested, x in zip((q, k, v), torch.autograd.grad(expected.square().sum(), one), strict=True):
            assert_close(nested.grad.unbind()[n], x[0].transpose(0, 1))


@pytest.mark.parametrize(
    "shapes", [((9, 8), (2, 4, 11, 8)), ((9, 8), (1, 1, 11, 8)), ((9, 8), (1, 11, 8)), ((4, 9, 8), (11, 8))]
)
def test_queries_of_lower_rank(shapes):
    q, k = make(*shapes[0]), make(*shapes[1], seed=1)
    v = make(*shapes[1], seed=2)
    expected = F.scaled_dot_product_attention(q, k, v)
    out = fa.scaled_dot_product_attention(q, k, v)
    assert out.shape == expected.shape
    assert_close(out, expected)


def test_numbers_of_other_types():
    np = pytest.importorskip("numpy")
    q, k, v = (make(2, 3, 5, 4, seed=i) for i in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.25)
    for scale in (np.float32(0.25), np.float64(0.25)):
        assert_close(fa.scaled_dot_product_attention(q, k, v, dropout_p=np.float32(0.0), scale=scale), expected)
    assert_close(fa.scaled_dot_product_attention(q, k, v, dropout_p=torch.tensor(0.0), scale=0.25), expected)


def test_meta_tensors():
    x = torch.empty(2, 3, 5, 4, device="meta")
    mask = torch.empty(5, 5, device="meta")
    for out in (fa.attention(x, x, x, mask=fa.Causal()), fa.scaled_dot_product_attention(x, x, x, attn_mask=mask)):
        assert out.shape == x.shape
        assert out.is_meta
    assert fa.explain(x, x, x).backend == "tiled"

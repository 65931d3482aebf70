"""Positional encodings against their formulas."""

import copy
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import fastattn as fa
from fastattn import nn

D = torch.float64


def turned(x, positions, base, rotary_dim, style):
    """RoPE by its definition: pairs as complex numbers, one at a time."""
    out = x.clone()
    for i in range(rotary_dim // 2):
        a, b = (i, i + rotary_dim // 2) if style == "half" else (2 * i, 2 * i + 1)
        angle = positions.to(D) * base ** (-2 * i / rotary_dim)
        z = torch.complex(x[..., a].to(D), x[..., b].to(D)) * torch.polar(torch.ones_like(angle), angle)
        out[..., a], out[..., b] = z.real.to(x.dtype), z.imag.to(x.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [None, 6])
def test_rotary(style, rotary_dim, dtype):
    rotary = nn.Rotary(10, base=100.0, rotary_dim=rotary_dim, style=style)
    x = torch.randn(2, 3, 7, 10, dtype=dtype)
    r = rotary_dim or 10
    tight = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    assert rotary(x).dtype == dtype
    assert_close(rotary(x), turned(x, torch.arange(7), 100.0, r, style), **tight)
    assert_close(rotary(x, offset=9000), turned(x, torch.arange(7) + 9000, 100.0, r, style), **tight)
    ids = torch.randint(0, 10**6, (2, 7))
    assert_close(rotary(x, ids), turned(x, ids[:, None], 100.0, r, style), **tight)
    offset = torch.tensor([3, 11], dtype=torch.int32)
    each = (torch.arange(7) + offset[:, None])[:, None]
    assert_close(rotary(x, offset=offset), turned(x, each, 100.0, r, style), **tight)


def test_rotary_products_depend_on_the_distance_alone():
    rotary = nn.Rotary(8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=D).unbind()
    products = [(rotary(q, offset=n + 5) * rotary(k, offset=n)).sum() for n in (0, 1, 100, 12345)]
    assert_close(torch.stack(products), products[0].expand(4))
    assert_close(rotary(q, offset=77).norm(), q.norm())


def test_rotary_scaling():
    x = torch.randn(1, 1, 9, 8, dtype=D)
    linear = nn.Rotary(8, scaling="linear", factor=4.0)
    assert_close(linear(x)[:, :, ::4], nn.Rotary(8)(x[:, :, ::4]))
    ntk = nn.Rotary(8, base=100.0, scaling="ntk", factor=4.0)
    assert_close(ntk(x), nn.Rotary(8, base=100.0 * 4.0 ** (8 / 6))(x))


def test_rotary_tables_are_kept_and_follow_the_input():
    rotary = nn.Rotary(8)
    x = torch.randn(1, 1, 5, 8)
    first = rotary.tables(x)[0]
    assert first.data_ptr() == rotary.tables(x)[0].data_ptr()
    assert first.dtype == torch.float32
    assert rotary.tables(x.double())[0].dtype == D
    exact = rotary(x.double(), offset=5000)
    assert_close(rotary(x, offset=5000), exact.float())  # longer than what was kept
    assert not rotary.state_dict()
    for other in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert torch.equal(other(x), rotary(x))
    with torch.inference_mode():
        fresh = nn.Rotary(8)
        fresh(x)
    assert_close(torch.autograd.grad(fresh(x.requires_grad_()).square().sum(), x)[0], 2 * x)


@pytest.mark.parametrize("offset", [-5, -3, -1])
def test_rotary_in_front_of_the_first(offset):
    """With a table at hand, whose end is not meant."""
    x = torch.randn(2, 1, 3, 4)
    rotary = nn.Rotary(4)
    rotary(x)
    assert_close(rotary(x, offset=offset), rotary(x, positions=torch.arange(offset, offset + 3)))


MODULES = [(nn.Rotary(4), (2, 1, 3, 4)), (nn.SinusoidalPositions(4), (2, 3, 4)), (nn.LearnedPositions(9, 4), (2, 3, 4))]


@pytest.mark.parametrize(("module", "shape"), MODULES)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(offset=1.5), TypeError, "offset must be an int or an integer Tensor, got 1.5"),
        (dict(offset=True), TypeError, "offset must be an int or an integer Tensor, got True"),
        (dict(offset=torch.ones(2)), TypeError, "offset must be an int or an integer Tensor, got torch.float32"),
        (dict(offset=torch.tensor(1)), ValueError, r"offset must be an int or have shape \(2,\), got \(\)"),
        (dict(offset=torch.tensor([1, 2, 3])), ValueError, r"offset must be an int or have shape \(2,\), got \(3,\)"),
        (dict(positions=torch.ones(3)), TypeError, "positions must be an integer Tensor, got torch.float32"),
        (dict(positions=[0, 1, 2]), TypeError, "positions must be an integer Tensor, got list"),
        (dict(positions=torch.arange(4)), ValueError, r"positions must have shape \(3,\) or \(2, 3\), got \(4,\)"),
        (dict(positions=torch.ones(3, 3).long()), ValueError, r"positions must have shape \(3,\) or \(2, 3\), got \(3, 3\)"),
    ],
)  # fmt: skip
def test_bad_positions(module, shape, options, error, message):
    with pytest.raises(error, match=message):
        module(torch.randn(*shape), **options)


def test_rotary_under_transforms():
    rotary = nn.Rotary(8)
    x = torch.randn(4, 2, 3, 5, 8)
    assert_close(torch.vmap(rotary)(x), torch.stack([rotary(y) for y in x]))
    assert_close(torch.func.grad(lambda y: rotary(y).square().sum())(x[0]), 2 * x[0])
    with FakeTensorMode():
        assert rotary(torch.empty(1, 1, 3000, 8)).shape == (1, 1, 3000, 8)
    assert_close(rotary(x[0]), nn.Rotary(8)(x[0]))  # nothing of the transform or the mode was kept


def test_sinusoidal():
    x = torch.zeros(2, 6, 8, dtype=D)
    out = nn.SinusoidalPositions(8, base=50.0)(x, offset=3)
    for position in range(6):
        for i in range(4):
            angle = (position + 3) / 50.0 ** (2 * i / 8)
            assert_close(out[0, position, 2 * i].item(), math.sin(angle))
            assert_close(out[1, position, 2 * i + 1].item(), math.cos(angle))
    ids = torch.tensor([[0, 5, 2, 2, 1, 9], [4, 4, 4, 0, 0, 1]])
    by_id = nn.SinusoidalPositions(8)(x, ids)
    assert_close(by_id[1, 0], nn.SinusoidalPositions(8)(x)[0, 4])


def test_learned():
    learned = nn.LearnedPositions(9, 4)
    x = torch.randn(2, 5, 4)
    assert_close(learned(x, offset=4), x + learned.weight[4:])
    ids = torch.randint(0, 9, (2, 5))
    assert_close(learned(x, ids), x + learned.weight[ids])
    assert_close(learned(x, offset=torch.tensor([0, 4]))[1], x[1] + learned.weight[4:])
    learned(x).sum().backward()
    assert learned.weight.grad[:5].eq(2).all()
    with pytest.raises(ValueError, match="offset 5 and length 5 must stay within max_length 9"):
        learned(x, offset=5)
    with pytest.raises(ValueError, match=r"x must have 3 features, got shape \(2, 5, 1\)"):  # which would broadcast
        nn.LearnedPositions(9, 3)(x[..., :1])


@pytest.mark.parametrize("learned", [False, True])
def test_alibi(learned):
    module = nn.ALiBiSlopes(4, learned=learned)
    assert len(list(module.parameters())) == learned
    assert not [name for name in module.state_dict() if not learned]
    q = torch.randn(1, 4, 6, 8, dtype=D)
    out = fa.attention(q, q, q, score=module())
    assert_close(out, fa.attention(q, q, q, score=fa.ALiBi(fa.alibi_slopes(4))))
    if learned:
        out.sum().backward()
        assert module.slopes.grad.abs().sum() > 0


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20)])
def test_t5_buckets_serve_every_length(bidirectional, num_buckets, max_distance):
    """One table of 2 * max_distance + 1 entries gives what a matrix of buckets gives at any length."""
    module = nn.T5Buckets(3, num_buckets, max_distance, bidirectional, dtype=D)
    n = 3 * max_distance
    q = torch.randn(1, 3, n, 8, dtype=D)
    index = torch.arange(n)
    buckets = fa.t5_bucket(index[None] - index[:, None], bidirectional, num_buckets, max_distance)
    matrix = module.weight[buckets].permute(2, 0, 1)
    out, expected = (fa.attention(q, q, q, score=s, scale=1.0) for s in (module(), fa.Bias(matrix)))
    assert_close(out, expected)
    do = torch.randn_like(out)
    grads = (torch.autograd.grad(o, module.weight, do, retain_graph=True)[0] for o in (out, expected))
    assert_close(*grads)


def test_relative_table():
    module = nn.RelativeTable(2, 3, dtype=D)
    torch.nn.init.normal_(module.weight)
    q = torch.randn(1, 2, 9, 8, dtype=D)
    index = torch.arange(9)
    matrix = module.weight[:, (index[None] - index[:, None]).clamp(-3, 3) + 3]
    assert_close(fa.attention(q, q, q, score=module()), fa.attention(q, q, q, score=fa.Bias(matrix)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Rotary(7), "head_dim must be an even int"),
        (lambda: nn.Rotary(8, rotary_dim=3), "rotary_dim must be an even int"),
        (lambda: nn.Rotary(8, rotary_dim=10), "rotary_dim must be at most head_dim 8, got 10"),
        (lambda: nn.Rotary(8, style="neox"), "style must be one of"),
        (lambda: nn.Rotary(8, scaling="yarn"), "scaling must be one of"),
        (lambda: nn.Rotary(8, factor=2.0), "factor must be positive, and needs scaling"),
        (lambda: nn.Rotary(2, scaling="ntk", factor=2.0), "needs a rotary_dim of at least 4"),
        (lambda: nn.Rotary(8)(torch.randn(1, 1, 4, 6)), r"x must have 8 features, got shape \(1, 1, 4, 6\)"),
        (lambda: nn.Rotary(8)(torch.randn(1, 1, 4, 8), torch.arange(5)), r"positions must have shape \(4,\) or \(1, 4\)"),
        (lambda: nn.SinusoidalPositions(5), "dim must be an even int"),
        (lambda: nn.SinusoidalPositions(6)(torch.randn(2, 4)), "x must have 6 features"),
        (lambda: nn.RelativeTable(2, -1), "reach must be an int of at least 0, got -1"),
        (lambda: nn.RelativeTable(0, 3), "n_heads must be at least 1, got 0"),
        (lambda: nn.T5Buckets(0), "n_heads must be at least 1, got 0"),
        (lambda: nn.T5Buckets(2, 2), "num_buckets must be at least 4"),
        (lambda: nn.ALiBiSlopes(2, distance="far"), "distance must be"),
        (lambda: nn.ALiBiSlopes(0), "n_heads must be at least 1"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_float_positions_are_refused():
    with pytest.raises(TypeError, match=r"positions must be an integer Tensor, got torch.float32"):
        nn.Rotary(8)(torch.randn(1, 1, 4, 8), torch.rand(4))

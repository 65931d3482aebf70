"""Scores: their formulas written out, gradients of every broadcast shape, and a user's own in a few lines."""

import math
import sys
import types

import pytest
import torch
from torch.testing import assert_close

import fastattn as fa
from fastattn.scores import base

B, H, N_Q, N_K, D = 2, 3, 7, 9, 4
F64 = torch.float64


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).requires_grad_()


def qkv():
    return make(B, H, N_Q, D), make(B, H, N_K, D, seed=1), make(B, H, N_K, D, seed=2)


def plain(q, k, v, score):
    """Attention with a function of the scaled scores, in three lines."""
    s = score(q @ k.mT / math.sqrt(q.shape[-1]))
    return s.softmax(-1) @ v


def assert_same(score, formula, params=(), mask=None):
    """Output and every gradient, the parameters' too, against the formula."""
    x = [*qkv(), *params]
    ours = fa.attention(*x[:3], score=score, mask=mask)
    wanted = plain(*x[:3], formula)
    assert_close(ours, wanted)
    do = make(*ours.shape, seed=5).detach()
    for a, b in zip(torch.autograd.grad(ours, x, do), torch.autograd.grad(wanted, x, do), strict=True):
        assert_close(a, b)


i, j = torch.arange(N_Q)[:, None], torch.arange(N_K)[None]


def test_softcap():
    assert_same(fa.Softcap(1.5), lambda s: 1.5 * torch.tanh(s / 1.5))


@pytest.mark.parametrize("shape", [(H,), (B, H)])
def test_alibi(shape):
    slopes = make(*shape, seed=3)
    wide = slopes[..., None, None]
    assert_same(fa.ALiBi(slopes), lambda s: s - wide * (i - j).abs(), [slopes])
    assert_same(fa.ALiBi(slopes, distance="rel"), lambda s: s + wide * (j - i), [slopes])


def test_alibi_slopes():
    """Press, Smith and Lewis: 2^(-8/n), 2^(-16/n), ...; for 12 heads the 8 of n = 8 and every second of n = 16."""
    assert_close(fa.alibi_slopes(8), torch.tensor([2.0**-x for x in range(1, 9)]))
    sixteen = [2 ** (-x / 2) for x in range(1, 17)]
    assert_close(fa.alibi_slopes(12), torch.tensor([2.0**-x for x in range(1, 9)] + sixteen[0::2][:4]))
    assert_close(fa.alibi_slopes(1), torch.tensor([2.0**-8]))
    with pytest.raises(ValueError, match="n_heads must be at least 1, got 0"):
        fa.alibi_slopes(0)


SHAPES = [
    (), (1,), (N_K,), (N_Q, 1), (N_Q, N_K), (1, N_K), (H, 1, 1), (H, N_Q, N_K), (1, N_Q, N_K),
    (B, 1, 1, 1), (B, 1, 1, N_K), (1, H, 1, N_K), (B, H, N_Q, 1), (B, 1, N_Q, N_K), (B, H, N_Q, N_K),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_of_every_broadcast(shape):
    bias = make(*shape, seed=3)
    assert_same(fa.Bias(bias), lambda s: s + bias, [bias])


def test_bias_with_minus_infinity():
    """A float mask as people pass it: -inf hides, and a row of nothing but -inf gives 0."""
    bias = torch.zeros(N_Q, N_K, dtype=F64).masked_fill(j > i, -torch.inf)
    bias[2] = -torch.inf
    q, k, v = qkv()
    out = fa.attention(q, k, v, score=fa.Bias(bias))
    wanted = fa.attention(q, k, v, mask=fa.Dense(bias == 0))
    assert_close(out, wanted)
    assert bool((out[:, :, 2] == 0).all())
    assert not any(g.isnan().any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("shape", [(5,), (H, 5), (B, H, 5)])
@pytest.mark.parametrize("offset", [None, 0, 4, -3, 9])
def test_relative(shape, offset):
    table = make(*shape, seed=3)
    at = (j - i + (2 if offset is None else offset)).clamp(0, 4)
    assert_same(fa.RelativeBias(table, offset), lambda s: s + table[..., at], [table])


@pytest.mark.parametrize("shape", [(20, 20), (H, 20, 1), (1, 20), (B, 1, 20, 20)])
def test_a_bias_at_coordinates_that_differ_by_batch_entry(shape):
    """Entries that share a bias read and move other places of it."""
    q, k, v = qkv()
    bias, rows = make(*shape, seed=3), torch.stack([torch.arange(N_Q) * 2, torch.arange(N_Q).flip(0)])

    def grads(backend):
        coords = fa.Coordinates(q=rows, k=torch.arange(N_K).flip(0)[None])
        out, lse = fa.attention(q, k, v, score=fa.Bias(bias), coords=coords, return_lse=True, backend=backend)
        return torch.autograd.grad((out * torch.arange(D)).sum() + (lse * torch.arange(N_Q)).sum(), (q, k, v, bias))

    for ours, exact in zip(grads("tiled"), grads("reference"), strict=True):
        assert_close(ours, exact)


def test_relative_with_gaps_in_the_coordinates():
    """The same entries where positions are tensors as where they are consecutive."""
    table, (q, k, v) = make(H, 5, seed=3), qkv()
    x = (q, k, v, table)
    grads = []
    for positions in (torch.arange(N_K), 0):
        out = fa.attention(q, k, v, score=fa.RelativeBias(table), coords=fa.Coordinates(k=positions))
        grads.append((out, *torch.autograd.grad(out.sin().sum(), x)))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


def t5(distance, bidirectional, buckets, furthest):
    """One distance, as the paper's reference code puts it."""
    bucket = 0
    n = -distance
    if bidirectional:
        buckets //= 2
        bucket = buckets if n < 0 else 0
        n = abs(n)
    n = max(n, 0)
    exact = buckets // 2
    if n < exact:
        return bucket + n
    far = exact + int(math.log(n / exact) / math.log(furthest / exact) * (buckets - exact))
    return bucket + min(far, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20)])
def test_t5_bucket(bidirectional, buckets, furthest):
    distance = torch.arange(-300, 301)
    wanted = torch.tensor([t5(d, bidirectional, buckets, furthest) for d in distance.tolist()])
    found = fa.t5_bucket(distance, bidirectional, buckets, furthest)
    assert (found - wanted).abs().max() <= 1  # where a logarithm lies within a rounding of an integer
    assert (found != wanted).double().mean() < 0.01


def test_order_of_the_chain():
    bias = make(N_Q, N_K, seed=3)
    assert_same([fa.Bias(bias), fa.Softcap(2.0)], lambda s: 2 * torch.tanh((s + bias) / 2), [bias])
    assert_same([fa.Softcap(2.0), fa.Bias(bias)], lambda s: 2 * torch.tanh(s / 2) + bias, [bias])


class Squash(fa.Pointwise):
    """A user's own, value only: s / (1 + |s|/c)."""

    def __init__(self, c):
        self.floats = (c,)

    def value(self, s):
        return s / (1 + s.abs() / self.floats[0])


class Double(fa.Pointwise):
    """Linear: its second derivative does not depend on s at all."""

    def value(self, s):
        return 2 * s


class Wave(fa.Additive):
    """A user's own with a parameter per head: amplitude * cos(q - k)."""

    def __init__(self, amplitude):
        self.params = (amplitude,)

    def canonical(self, n_b, n_h):
        return self.with_params((self.params[0].reshape(1, n_h, 1, 1),))

    def term(self, tile):
        return tile.heads(self.params[0]).to(tile.dtype) * torch.cos((tile.q - tile.k).to(tile.dtype))


class Temperature(fa.General):
    """A user's own that is neither: s * exp(t) where the key is even."""

    def __init__(self, t):
        self.params = (t,)

    def canonical(self, n_b, n_h):
        return self.with_params((self.params[0].reshape(1, 1),))

    def value(self, s, tile):
        return torch.where(tile.k % 2 == 0, s * torch.exp(self.params[0]), s)


def test_own_pointwise():
    assert_same(Squash(1.5), lambda s: s / (1 + s.abs() / 1.5))
    assert_same([Double(), Squash(1.5)], lambda s: 2 * s / (1 + 2 * s.abs() / 1.5))


def test_own_pointwise_twice():
    q, k, v = (x[:1, :1, :3, :2].detach().requires_grad_() for x in qkv())
    for score in (Squash(1.5), [Double(), Squash(2.0)]):
        call = lambda *x, score=score: fa.attention(*x, score=score, mask=fa.Causal())
        assert torch.autograd.gradcheck(call, (q, k, v), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, (q, k, v))


def test_own_additive():
    amplitude = make(H, seed=3)
    assert_same(Wave(amplitude), lambda s: s + amplitude[:, None, None] * torch.cos((i - j).double()), [amplitude])


def test_own_additive_twice():
    q, k, v = (x[:1, :2, :3, :2].detach().requires_grad_() for x in qkv())
    amplitude = make(2, seed=3)
    call = lambda *x: fa.attention(*x[:3], score=Wave(x[3]))
    assert torch.autograd.gradcheck(call, (q, k, v, amplitude), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (q, k, v, amplitude))


def test_own_general():
    t = make(seed=3)
    assert_same(Temperature(t), lambda s: torch.where(j % 2 == 0, s * t.exp(), s), [t])


def test_own_general_in_a_chain_with_dropout_and_mask():
    t, (q, k, v) = make(seed=3), qkv()
    x = (q, k, v, t)
    found = []
    for backend in ("tiled", "reference"):
        torch.manual_seed(0)
        out = fa.attention(
            q, k, v, score=[Temperature(t), fa.Softcap(2.0)], mask=fa.Causal("bottom_right"), dropout_p=0.3, backend=backend
        )
        found.append((out, *torch.autograd.grad(out.sin().sum(), x)))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_own_score_compiled():
    amplitude = make(H, seed=3)
    call = lambda q, k, v: fa.attention(q, k, v, score=[Wave(amplitude), Squash(2.0)])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = qkv()
    a, b = call(*x), compiled(*x)
    assert_close(a, b)
    for g, h in zip(torch.autograd.grad(a.sum(), (*x, amplitude)), torch.autograd.grad(b.sum(), (*x, amplitude)), strict=True):
        assert_close(g, h)


class Unfinished(fa.Additive):
    pass


def test_what_is_missing_is_named():
    with pytest.raises(NotImplementedError, match=r"Unfinished does not define term\(\)"):
        fa.attention(*qkv(), score=Unfinished())


@pytest.mark.parametrize(
    "make_score",
    [
        lambda: fa.Bias(make(H, N_Q, N_K, seed=3)),
        lambda: fa.RelativeBias(make(H, 5, seed=3)),
        lambda: fa.ALiBi(make(H, seed=3)),
        lambda: Wave(make(H, seed=3)),
    ],
)
def test_part_of_the_rows_is_the_same_function(make_score):
    """The rows from 3 on, told so by coordinates, see what they see in the whole."""
    score, (q, k, v) = make_score(), qkv()
    whole = fa.attention(q, k, v, score=score)
    part = fa.attention(q[:, :, 3:], k, v, score=score, coords=fa.Coordinates(q=3))
    assert_close(part, whole[:, :, 3:])


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: fa.Softcap(0.0), ValueError, "cap must be a positive finite number, got 0.0"),
        (lambda: fa.Softcap(float("nan")), ValueError, "got nan"),
        (lambda: fa.ALiBi([1.0]), TypeError, "slopes must be a floating point Tensor, got list"),
        (lambda: fa.ALiBi(torch.ones(3), "far"), ValueError, "distance must be \"abs\" or \"rel\", got 'far'"),
        (lambda: fa.ALiBi(torch.ones(1, 1, 3)), ValueError, "slopes must have shape"),
        (lambda: fa.Bias(torch.ones(3, dtype=torch.long)), TypeError, "bias must be a floating point Tensor, got torch.int64"),
        (lambda: fa.Bias(torch.ones(1, 1, 1, 1, 3)), ValueError, "at most 4 dimensions"),
        (lambda: fa.RelativeBias(torch.ones(0)), ValueError, "table must have shape"),
        (lambda: fa.RelativeBias(torch.ones(3), 1.5), TypeError, "offset must be an int or None, got float"),
    ],
)
def test_errors(build, error, words):
    with pytest.raises(error, match=words):
        build()


def run_in(module, code):
    """Run code in a module that has no source to read, as at a prompt."""
    exec(compile(code, "<prompt>", "exec"), module.__dict__)


def test_a_redefinition_without_source_is_seen():
    module = types.ModuleType("prompt_of_this_test")
    sys.modules[module.__name__] = module
    x = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    try:
        outs = []
        for number in (0, 9):
            run_in(
                module,
                "import fastattn as fa\n"
                f"class S(fa.Pointwise):\n    def value(self, s):\n        return s * {number}.0\n"
                f"def visible(b, h, q, k):\n    return (q - k).abs() <= {number}\n",
            )
            outs.append(fa.attention(x, x, x, score=module.S()))
            assert_close(outs[-1], fa.attention(x, x, x, score=module.S(), backend="reference"))
            mask = fa.Custom(module.visible)
            outs.append(fa.attention(x, x, x, mask=mask))
            assert_close(outs[-1], fa.attention(x, x, x, mask=mask, backend="reference"))
        assert not torch.equal(outs[0], outs[2])
        assert not torch.equal(outs[1], outs[3])
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_sums_in_order_are_the_same_sums(dim):
    """What adds up on CUDA, where index_add_ has no order: into a slice, at indices that repeat."""
    index, values = torch.tensor([3, 0, 3, 3, 1]), make(2, 3, 5).detach().movedim(2, dim)
    sums = [torch.ones(2, 3, 5, dtype=F64)[..., 1:].movedim(2, dim) for _ in range(2)]
    base.index_add(sums[0], dim, index, values)
    base.put_in_order(sums[1], dim, index, values)
    assert_close(sums[0], sums[1])
    assert_close(sums[0].movedim(dim, 2)[..., 2], torch.ones(2, 3, dtype=F64))
    assert_close(sums[0].movedim(dim, 2)[..., 0], 1 + values.movedim(dim, 2)[..., 1])

"""torch.compile(fullgraph=True), export and tracing: the same numbers, and one graph for many lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import fastattn as fa

pytestmark = pytest.mark.compile
SLOPES = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def make(n):
    return [torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]


def packed(x):
    return x[0].transpose(0, 1)


CALLS = {
    "full": (lambda q, k, v: fa.attention(q, k, v), None),
    "causal chain": (
        lambda q, k, v: fa.attention(q, k, v, mask=fa.Causal("bottom_right"), score=(fa.Softcap(3.0), fa.ALiBi(SLOPES))),
        None,
    ),
    "window": (lambda q, k, v: fa.attention(q, k, v, mask=fa.SlidingWindow(3, 0) & fa.Causal()), None),
    "documents": (
        lambda q, k, v, ids: fa.attention(q, k, v, mask=fa.Documents(ids=ids) & fa.Causal()),
        lambda n: torch.arange(n) // 4,
    ),
    "sdpa": (lambda q, k, v: fa.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), None),
    "sdpa mask": (
        lambda q, k, v, m: fa.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True),
        lambda n: torch.arange(n * n).view(n, n) % 3 != 0,
    ),
    "varlen": (
        lambda q, k, v, cu: fa.varlen_attention(
            packed(q), packed(k), packed(v), cu, mask=fa.Causal("top_left"), score=fa.ALiBi(SLOPES)
        ),
        lambda n: torch.tensor([0, 3, n]),
    ),
}


def run(fn, inputs, extra):
    out = fn(*inputs, *extra)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_eager(name, dynamic):
    fn, extra = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=counter)
    first = None
    for n in (7, 9, 12, 13) if dynamic else (7,):
        inputs, tail = make(n), () if extra is None else (extra(n),)
        for a, b in zip(run(compiled, inputs, tail), run(fn, inputs, tail), strict=True):
            assert_close(a, b)
        first = counter.frame_count if first is None else first
    assert counter.frame_count == first  # no length after the first compiled anything


SHAPES = {
    "slopes": lambda q, k, v: fa.attention(q, k, v, score=fa.ALiBi(SLOPES)),
    "bias": lambda q, k, v: fa.attention(q, k, v, score=fa.Bias(BIAS)),
    "table": lambda q, k, v: fa.attention(q, k, v, score=fa.RelativeBias(BIAS[:, 0].expand(4, 5))),
    "sinks": lambda q, k, v: fa.attention(q, k, v, sinks=SLOPES),
    "prefix": lambda q, k, v: fa.attention(q, k, v, mask=fa.PrefixLM(3)),
    "lengths": lambda q, k, v: fa.attention(q, k, v, mask=fa.Lengths(LENGTHS)),
    "coordinates": lambda q, k, v: fa.attention(q, k, v, score=fa.ALiBi(SLOPES), coords=fa.Coordinates(b=LENGTHS)),
    "scale": lambda q, k, v: fa.attention(q, k, v, scale=q.shape[3] ** -0.25),
}
BIAS = torch.rand(4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
LENGTHS = torch.tensor([4, 6])


@pytest.mark.parametrize("name", SHAPES)
def test_constants_beside_symbolic_shapes(name):
    compiled = torch.compile(SHAPES[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (7, 9):
        inputs = make(n)
        for a, b in zip(run(compiled, inputs, ()), run(SHAPES[name], inputs, ()), strict=True):
            assert_close(a, b)


def test_inductor():
    fn = CALLS["causal chain"][0]
    inputs = make(6)
    for a, b in zip(run(torch.compile(fn, fullgraph=True), inputs, ()), run(fn, inputs, ()), strict=True):
        assert_close(a, b)


def test_dropout_compiles():
    q, k, v = make(7)
    out = torch.compile(lambda *x: fa.attention(*x, dropout_p=0.3), fullgraph=True, backend="aot_eager")(q, k, v)
    out.sum().backward()
    assert q.grad.abs().max() > 0


def test_gradient_inside_compile_is_not_silently_zero():
    x = [y.detach() for y in make(6)]
    fn = lambda *y: torch.func.grad(lambda *z: CALLS["causal chain"][0](*z).square().sum(), argnums=(0, 1, 2))(*y)
    for a, b in zip(torch.compile(fn, fullgraph=True, backend="aot_eager")(*x), fn(*x), strict=True):
        assert_close(a, b)
        assert b.abs().max() > 1e-3


def test_forward_mode_inside_compile_is_not_silently_zero():
    x = [y.detach() for y in make(6)]
    fn = lambda *y: torch.func.jvp(CALLS["causal chain"][0], y, tuple(torch.ones_like(z) for z in y))[1]
    expected = fn(*x)
    assert expected.abs().max() > 1e-3
    assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager")(*x), expected)


class Windowed(torch.nn.Module):
    def forward(self, q, k, v):
        return fa.attention(q, k, v, mask=fa.SlidingWindow(3, 0, "top_left"))


def test_export():
    inputs = tuple(x.detach() for x in make(6))
    length = torch.export.Dim("length", min=2, max=512)
    exported = torch.export.export(Windowed(), inputs, dynamic_shapes={name: {2: length} for name in "qkv"})
    other = [x.detach() for x in make(11)]
    assert_close(exported.module()(*other), Windowed()(*other))


def test_make_fx_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = [x.detach() for x in make(6)]
    graph = make_fx(Windowed())(*inputs)
    assert "fastattn.fwd" in graph.code
    assert_close(graph(*inputs), Windowed()(*inputs))
    with FakeTensorMode() as mode:
        out = Windowed()(*(mode.from_tensor(x) for x in inputs))
    assert out.shape == (2, 4, 6, 8)

"""Every derivative and every transform, against the reference differentiated by autograd itself."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastattn as fa
from fastattn import autograd as ops
from fastattn.backends import tiled

ALL = tuple(range(7))
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


def make(n_q=5, n_k=6, dtype=torch.float64, seed=0):
    """(q, k, v, bias, slopes, table, sinks)"""
    g = torch.Generator().manual_seed(seed)
    shapes = (2, 4, n_q, 3), (2, 2, n_k, 3), (2, 2, n_k, 2), (1, 4, n_q, n_k), (4,), (4, 5), (4,)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)


def function(backend, dropout_p=0.0, mask=None):
    def fn(q, k, v, bias, slopes, table, sinks):
        score = fa.Softcap(2.0), fa.Bias(bias), fa.ALiBi(slopes), fa.RelativeBias(table)
        return fa.attention(
            q, k, v, mask=mask or fa.Causal("bottom_right"), score=score, sinks=sinks, dropout_p=dropout_p,
            return_lse=True, backend=backend,
        )  # fmt: skip

    return fn


def loss(backend, **kwargs):
    def fn(*inputs):
        out, lse = function(backend, **kwargs)(*inputs)
        return out.square().sum() + lse.sin().sum()

    return fn


TRANSFORMS = {
    "grad": lambda f, x, t: grad(loss(f), ALL)(*x),
    "vjp": lambda f, x, t: vjp(function(f), *x)[1]((torch.ones(2, 4, 5, 2).double(), torch.ones(2, 4, 5).double())),
    "jvp": lambda f, x, t: jvp(function(f), x, t),
    "jvp of one": lambda f, x, t: [jvp(lambda y, i=i: function(f)(*x[:i], y, *x[i + 1 :]), (x[i],), (t[i],)) for i in ALL],
    "jvp of grad": lambda f, x, t: jvp(grad(loss(f), ALL), x, t),
    "grad of grad": lambda f, x, t: grad(lambda *y: sum(z.sin().sum() for z in grad(loss(f), ALL)(*y)), ALL)(*x),
    "grad of jvp": lambda f, x, t: grad(lambda *y: sum(z.sin().sum() for z in jvp(function(f), y, t)[1]), ALL)(*x),
    "grad of jvp by tangents": lambda f, x, t: grad(lambda *s: sum(z.sin().sum() for z in jvp(function(f), x, s)[1]), ALL)(*t),
    "inner by q, outer by bias": lambda f, x, t: grad(
        lambda b: grad(lambda q: loss(f)(q, *x[1:3], b, *x[4:]))(x[0]).square().sum()
    )(x[3]),
    "jacrev": lambda f, x, t: jacrev(function(f), 0)(*x),
    "jacfwd": lambda f, x, t: jacfwd(function(f), (4, 6))(*x),
    "hessian": lambda f, x, t: hessian(loss(f), (4, 5, 6))(*x),
    "jacrev of jacrev": lambda f, x, t: jacrev(jacrev(loss(f), 4), 6)(*x),
    "jacrev of jacfwd": lambda f, x, t: jacrev(jacfwd(loss(f), 4), 5)(*x),
    "vmap q": lambda f, x, t: vmap(function(f), (0, *[None] * 6))(torch.stack([x[0], t[0]]), *x[1:]),
    "vmap bias": lambda f, x, t: vmap(function(f), (None,) * 3 + (0,) + (None,) * 3)(*x[:3], torch.stack([x[3], t[3]]), *x[4:]),
    "vmap inner dim": lambda f, x, t: vmap(function(f), (1, 2, 1) + (None,) * 4)(
        torch.stack([x[0], t[0]], 1), torch.stack([x[1], t[1]], 2), torch.stack([x[2], t[2]], 1), *x[3:]
    ),
    "per-sample gradients": lambda f, x, t: vmap(grad(loss(f), ALL), (0, *[None] * 6))(torch.stack([x[0], t[0]]), *x[1:]),
    "vmap of jvp": lambda f, x, t: vmap(lambda s: jvp(function(f), x, (s, *t[1:])))(torch.stack([x[0], t[0]])),
    "vmap of vmap": lambda f, x, t: vmap(vmap(function(f), (0, *[None] * 6)), (0, *[None] * 6))(
        torch.stack([x[0], t[0]])[:, None].expand(2, 3, -1, -1, -1, -1), *x[1:]
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name):
    x, t = make(), make(seed=1)
    ours, exact = (tree_leaves(TRANSFORMS[name](backend, x, t)) for backend in ("tiled", "reference"))
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact, strict=True):
        assert_close(a, b, **TOLERANCE)
    assert any(bool(x.abs().max() > 1e-3) for x in ours)  # not silently zero


MASKS = {
    "window": fa.SlidingWindow(2, 1, "top_left"),
    "two spans": fa.SinkTokens(1) | fa.SlidingWindow(1, 0, "bottom_right"),
    "empty rows": fa.Lengths(torch.tensor([3, 0])),
    "dense": fa.Dense(torch.arange(30).view(5, 6) % 4 != 1),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("mask", MASKS)
def test_gradcheck(mask, dropout_p):
    def fn(*inputs):
        torch.manual_seed(5)
        return [x.masked_fill(x == -torch.inf, 0.0) for x in function("tiled", dropout_p, MASKS[mask])(*inputs)]

    x = [y.requires_grad_() for y in make()]
    assert torch.autograd.gradcheck(fn, x, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, x, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("n_b_same", ["same", "different"])
def test_dropout_under_vmap(n_b_same):
    q, k, v = make()[:3]

    def run(backend):
        torch.manual_seed(0)
        return vmap(lambda x: fa.attention(x, k, v, dropout_p=0.4, backend=backend), randomness=n_b_same)(
            torch.stack([q, q])
        )

    out = run("tiled")
    assert_close(out, run("reference"), **TOLERANCE)
    assert torch.equal(out[0], out[1]) == (n_b_same == "same")


def test_dual_numbers_are_not_silently_zero():
    x, t = make(), make(seed=1)
    with forward_ad.dual_level():
        out, lse = function("tiled")(*(forward_ad.make_dual(a, b) for a, b in zip(x, t, strict=True)))
        tangents = [forward_ad.unpack_dual(y).tangent for y in (out, lse)]
    for ours, exact in zip(tangents, jvp(function("reference"), x, t)[1], strict=True):
        assert_close(ours, exact, **TOLERANCE)


def test_plain_call_in_forward_mode():
    """The short way for small calls has no forward mode: it must notice and step aside."""
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    with forward_ad.dual_level():
        out = fa.attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
        tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is not None
    assert tangent.abs().max() > 1e-3


@pytest.mark.parametrize("wanted", ["qkv", "q", "kv"])
@pytest.mark.parametrize("n", [7, 40])  # torch's own node with a hook, and a Function
@pytest.mark.parametrize("mask", [None, fa.Causal()])
def test_short_way_equals_long_way(mask, n, wanted):
    q, k, v = (torch.randn(2, 3, n, 60, dtype=torch.float64, requires_grad=name in wanted) for name in "qkv")
    x = [y for y in (q, k, v) if y.requires_grad]
    do = torch.randn(2, 3, 60, n, dtype=torch.float64).mT  # strided
    short, long = fa.attention(q, k, v, mask=mask), fa.attention(q, k, v, mask=mask, backend="tiled")
    assert ("_Attend" if n == 40 else "ScaledDotProduct") in type(short.grad_fn).__name__
    assert "_Fwd" in type(long.grad_fn).__name__
    assert_close(short, long)
    grads = [torch.autograd.grad(o, x, do, retain_graph=True) for o in (short, long)]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)
    batched = torch.autograd.grad(short, x, torch.stack([do, 2 * do]), retain_graph=True, is_grads_batched=True)
    for a, b in zip(batched, grads[1], strict=True):
        assert_close(a, torch.stack([b, 2 * b]))
    twice = [torch.autograd.grad(o, x, do, create_graph=True) for o in (short, long)]  # after a backward that kept the graph
    t = [torch.randn_like(y) for y in x]
    for a, b in zip(*(torch.autograd.grad(g, x, t, allow_unused=True, materialize_grads=True) for g in twice), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("n", [7, 40])
def test_short_way_frees_its_tensors_with_the_graph(n):
    gc.collect()
    gc.disable()
    try:
        x = [torch.randn(2, 3, n, 60, requires_grad=True) for _ in range(3)]
        middle = [y * 1 for y in x]
        seen = [weakref.ref(y) for y in middle]
        out = fa.attention(*middle)
        del middle
        out.sum().backward()
        del out
        assert all(r() is None for r in seen)
    finally:
        gc.enable()


def test_third_order_raises():
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    fn = lambda q: fa.attention(q, q, q, score=fa.Softcap(1.0)).square().sum()
    first = torch.autograd.grad(fn(x), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="up to the second order"):
        torch.autograd.grad(second.sum(), x)
    with pytest.raises(RuntimeError, match="up to the second order"):
        jacrev(jacrev(jacrev(fn)))(x.detach())
    with pytest.raises(RuntimeError, match="up to the second order"):
        jacfwd(jacfwd(jacfwd(fn)))(x.detach())


def test_kernel_calls(monkeypatch):
    """No verb runs twice, and none on zeros."""
    calls = []
    for name in ("forward", "backward", "forward_jvp", "backward_jvp"):
        original = getattr(tiled, name)
        monkeypatch.setattr(tiled, name, lambda *a, _n=name, _f=original: (calls.append(_n), _f(*a))[1])
    x = [y.requires_grad_() for y in make()]
    first = torch.autograd.grad(loss("tiled")(*x), x, create_graph=True)
    assert calls == ["forward", "backward"]
    calls.clear()
    torch.autograd.grad(sum(g.square().sum() for g in first), x)
    assert calls[:2] == ["forward_jvp", "backward_jvp"]
    assert len(calls) <= 3  # the gradient of dO reaches the loss through the forward once more
    calls.clear()
    d = [y.detach() for y in x]
    jvp(grad(loss("tiled"), ALL), tuple(d), tuple(d))
    assert sorted(calls) == ["backward", "backward_jvp", "forward", "forward_jvp"]


def test_gradient_of_a_parameter_is_made_only_where_wanted(monkeypatch):
    wanted = []
    original = tiled.backward
    monkeypatch.setattr(tiled, "backward", lambda p, *a: (wanted.append(p.param_grads), original(p, *a))[1])
    q, k, v, bias, *_ = make()
    q.requires_grad_()
    fa.attention(q, k, v, score=fa.Bias(bias)).sum().backward()
    bias.requires_grad_()
    fa.attention(q, k, v, score=fa.Bias(bias)).sum().backward()
    assert wanted == [False, True]


def op_arguments(dtype=torch.float64, train=False):
    q, k, v, bias, *_, sinks = make(dtype=dtype)
    start = torch.zeros(1, 1, 1, 5, dtype=torch.int32)
    spec = "m=rows|p=|c=0000|s=bias/1/0/0/|b=tiled|d=1|g=1"
    return (
        q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), k, v, [start, start + 4],
        [bias.requires_grad_()], sinks[None], None, spec, 0.5, 0.0, [], [], train,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["fwd", "bwd", "fwd_jvp", "bwd_jvp"])
def test_opcheck(name, dtype):
    *inputs, spec, scale, p, ints, floats, _ = op_arguments(dtype)
    statics = (spec, scale, p, ints, floats)
    outputs = [x.detach() for x in ops.FWD(*inputs, *statics, True)]
    plain = [[y.detach() for y in x] if isinstance(x, list) else None if x is None else x.detach() for x in inputs]
    do = torch.ones_like(outputs[0])
    tangents = (plain[0], None, plain[2], [plain[4][0]], None)
    t_outputs = ops.FWD_JVP(*plain, *outputs, *tangents, *statics)
    op, arguments = {
        "fwd": (ops.FWD, (*inputs, *statics, False)),
        "bwd": (ops.BWD, (do, None, *inputs, *outputs, *statics)),
        "fwd_jvp": (ops.FWD_JVP, (*inputs, *outputs, *tangents, *statics)),
        "bwd_jvp": (ops.BWD_JVP, (do, None, None, None, *plain, *outputs, *tangents, *t_outputs, *statics)),
    }[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_layouts(layout):
    q, k, v = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    if layout == "BLHD":
        q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    for mask in (None, fa.SlidingWindow(2, 0)):
        out = fa.attention(q, k, v, mask=mask)
        assert out.stride() == q.stride()
        for x in torch.autograd.grad(out.sum(), (q, k, v)):
            assert x.transpose(1, 2).is_contiguous()  # as torch's: nothing is copied into another layout


def test_only_lse_or_only_out():
    q, k, v = (x.requires_grad_() for x in make()[:3])
    for i in (0, 1):
        ours, exact = (
            torch.autograd.grad(fa.attention(q, k, v, return_lse=True, backend=b)[i].sin().sum(), (q, k, v), allow_unused=True)
            for b in ("tiled", "reference")
        )
        for a, b, x in zip(ours, exact, (q, k, v), strict=True):
            assert_close(torch.zeros_like(x) if a is None else a, torch.zeros_like(x) if b is None else b, **TOLERANCE)


def plain_loss(q, k, v):
    return fa.attention(q, k, v, mask=fa.SlidingWindow(2, 0, "bottom_right"), score=fa.Softcap(3.0)).square().sum()


def test_checkpointing():
    q, k, v = (x.requires_grad_() for x in make()[:3])
    exact = torch.autograd.grad(plain_loss(q, k, v), (q, k, v))
    policy = torch.utils.checkpoint.create_selective_checkpoint_contexts
    selective = lambda: policy([ops.FWD])
    for kwargs in ({}, {"context_fn": selective}):
        ours = torch.autograd.grad(checkpoint(plain_loss, q, k, v, use_reentrant=False, **kwargs), (q, k, v))
        for a, b in zip(ours, exact, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("n", [8, 1500])  # at 8 torch's own autograd node would be taken, and what it saved be read twice
@pytest.mark.parametrize("mask", [None, fa.Causal(), torch.ones(1, 1, dtype=torch.bool)])
def test_checkpointing_in_the_second_order(n, mask):
    q, k, v = (torch.randn(1, 2, n, 4, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    attend = lambda *x: fa.attention(*x, mask=mask)
    kept = lambda *x: checkpoint(attend, *x, use_reentrant=False)

    def penalty(attend, *x):
        grads = torch.autograd.grad(attend(*x).square().sum(), x, create_graph=True)
        return sum(grad.square().sum() for grad in grads)

    exact = torch.autograd.grad(penalty(attend, q, k, v), (q, k, v))
    for ours in (checkpoint(penalty, attend, q, k, v, use_reentrant=False), penalty(kept, q, k, v)):
        for a, b in zip(torch.autograd.grad(ours, (q, k, v)), exact, strict=True):
            assert_close(a, b)


def test_checkpointing_keeps_dropout_bits():
    q, k, v = (x.requires_grad_() for x in make()[:3])
    fn = lambda *x: fa.attention(*x, dropout_p=0.5).square().sum()
    torch.manual_seed(3)
    exact = torch.autograd.grad(fn(q, k, v), q)[0]
    torch.manual_seed(3)
    assert_close(torch.autograd.grad(checkpoint(fn, q, k, v, use_reentrant=False), q)[0], exact)


def test_saved_tensor_hooks():
    q, k, v = (x.requires_grad_() for x in make()[:3])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        value = plain_loss(q, k, v)
    assert_close(torch.autograd.grad(value, q)[0], torch.autograd.grad(plain_loss(q, k, v), q)[0])


@pytest.mark.parametrize("score", [(), (fa.Softcap(2.0),)])
def test_autocast(score):
    q, k, v = (x.float().requires_grad_() for x in make()[:3])
    with torch.autocast("cpu", torch.bfloat16):
        out = fa.attention(q, k, v, score=score)
        dq = torch.autograd.grad(out.float().sum(), q)[0]
    assert out.dtype == torch.bfloat16
    assert dq.dtype == torch.float32
    expected = fa.attention(*(x.bfloat16() for x in (q, k, v)), score=score)
    assert_close(out, expected, rtol=0, atol=0)


def test_autocast_does_not_reach_inside_a_kernel():
    """A float32 operator called under autocast computes in float32."""
    *inputs, spec, scale, p, ints, floats, train = op_arguments(torch.float32)
    expected = ops.FWD(*inputs, spec, scale, p, ints, floats, train)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(ops.FWD(*inputs, spec, scale, p, ints, floats, train)[0], expected, rtol=0, atol=0)


def test_inference_mode():
    with torch.inference_mode():
        out, lse = function("tiled")(*make())
    expected, expected_lse = function("reference")(*make())
    assert_close(out, expected, **TOLERANCE)
    assert_close(lse, expected_lse, **TOLERANCE)


def test_repeats_are_bitwise_equal():
    q, k, v = (torch.randn(2, 4, 300, 32, requires_grad=True) for _ in range(3))
    runs = []
    for _ in range(3):
        out = fa.attention(q, k, v, mask=fa.SlidingWindow(40, 3), score=fa.Softcap(5.0))
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_scores_travel():
    score = fa.ALiBi(torch.rand(4))
    for other in (copy.deepcopy(score), pickle.loads(pickle.dumps(score))):
        assert torch.equal(other.params[0], score.params[0])
        assert other.static == score.static
    moved = pickle.loads(pickle.dumps(fa.Coordinates(q=3)))
    assert moved.parts == (0, 0, 3, 0)


def everything(backend, dropout_p, scored):
    """(out, lse) of q, k, v, slopes, bias and sinks."""

    def call(q, k, v, slopes, bias, sinks):
        torch.manual_seed(3)
        score = (fa.Bias(bias), fa.Softcap(1.5), fa.ALiBi(slopes)) if scored else ()
        out, lse = fa.attention(
            q, k, v, mask=fa.Causal("bottom_right"), score=score, sinks=sinks, dropout_p=dropout_p, return_lse=True,
            backend=backend,
        )  # fmt: skip
        return out.sin(), lse.cos()

    return call


def points(*seeds):
    shapes = ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2), (4,), (4, 5, 6), (4,))
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        yield tuple(torch.randn(s, dtype=torch.float64, generator=g) for s in shapes)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("second", ["fixed", "of the point", "of few"])
def test_forward_over_forward(dropout_p, scored, second):
    """Along two directions; along a direction that itself moves with the point; with some tangents missing."""
    x, one, two = points(0, 1, 2)

    def along(backend):
        f = everything(backend, dropout_p, scored)
        if second == "of few":  # q's tangent first, k's and the sinks' second
            inner = lambda k, sinks: jvp(lambda q: f(q, k, *x[2:5], sinks), (x[0],), (one[0],))[1]
            return jvp(inner, (x[1], x[5]), (two[1], two[5]))[1]
        first = (lambda y: tuple(t.square() for t in y)) if second == "of the point" else (lambda y: one)
        return jvp(lambda *y: jvp(f, y, first(y))[1], x, two)[1]

    for ours, exact in zip(along("tiled"), along("reference"), strict=True):
        assert_close(ours, exact, **TOLERANCE)


@pytest.mark.parametrize("which", range(6))
def test_jacfwd_of_jacfwd(which):
    [x] = points(0)

    def second(backend):
        f = lambda t: sum(y.sum() for y in everything(backend, 0.0, True)(*x[:which], t, *x[which + 1 :]))
        return jacfwd(jacfwd(f))(x[which])

    assert_close(second("tiled"), second("reference"), **TOLERANCE)


def test_forward_three_times_raises():
    x, one = points(0, 1)

    def deeper(f):
        return lambda *y: jvp(f, y, one)[1]

    with pytest.raises(RuntimeError, match="a third was asked for"):
        deeper(deeper(deeper(everything("tiled", 0.0, False))))(*x)


@pytest.mark.parametrize("known", [True, False])
def test_the_tiniest_calls_differentiate_twice_wherever_torch_can_tell_the_node(monkeypatch, known):
    """Also after a backward that kept the graph, more than once, and where only the output's gradient was asked for."""
    from fastattn import compat

    if not known:
        monkeypatch.setattr(compat, "running_node", None)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, long = fa.attention(q, k, v), fa.attention(q, k, v, backend="reference")
    assert ("ScaledDotProduct" if known else "_Attend") in type(out.grad_fn).__name__
    do = torch.randn_like(out).requires_grad_()
    assert torch.equal(torch.autograd.grad(out, out, do, create_graph=True)[0], do)
    for _ in range(2):
        torch.autograd.grad(out, q, do, retain_graph=True)
        second = []
        for o in (out, long):
            grads = torch.autograd.grad(o, (q, k, v), do, create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v, do), retain_graph=True))
        for a, b in zip(*second, strict=True):
            assert_close(a, b)


def test_the_tiniest_calls_output_can_be_pickled(recwarn):
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    out = fa.attention(q, k, v)
    assert torch.equal(pickle.loads(pickle.dumps(out.detach())), out)
    handle = out.register_hook(lambda g: 2 * g)
    doubled = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
    handle.remove()
    assert_close(doubled, 2 * torch.autograd.grad(out.sum(), q)[0])
    assert not recwarn.list

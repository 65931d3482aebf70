"""fastattn under torch's own function: every way in, every way out, and what is left to torch."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as bound_early
from torch.testing import assert_close

import fastattn as fa
from fastattn.integrations import report, torch_sdpa


def make(*shape, n=3, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad) for _ in range(n)]


def plain(q, k, v, mask=None):
    s = q @ k.mT * q.shape[-1] ** -0.5
    return (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert torch_sdpa._users == 0
    assert torch_sdpa._back is None
    assert torch.backends.mha.get_fastpath_enabled()


def calls(seen):
    return sum(seen.report().taken.values())


CAUSAL = torch.ones(5, 7, dtype=torch.bool).tril()
WAYS = {
    "the attribute": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "a name bound before": lambda q, k, v: bound_early(q, k, v),
    "the operator": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v),
    "no_grad": torch.no_grad()(lambda q, k, v: bound_early(q, k, v)),
    "inference mode": torch.inference_mode()(lambda q, k, v: bound_early(q, k, v)),
    "a subclass": lambda q, k, v: bound_early(*(x.as_subclass(Tagged) for x in (q, k, v))).as_subclass(torch.Tensor),
    "vmap": lambda q, k, v: torch.vmap(bound_early)(q, k, v),
    "vmap of vmap": lambda q, k, v: torch.vmap(torch.vmap(bound_early))(q, k, v),
    "jvp": lambda q, k, v: torch.func.jvp(bound_early, (q, k, v), (q, k, v))[0],
    "vjp": lambda q, k, v: torch.func.vjp(bound_early, q, k, v)[0],
    "jit.trace": lambda q, k, v: torch.jit.trace(lambda *x: bound_early(*x), (q, k, v), check_trace=False)(q, k, v),
    "compiled": lambda q, k, v: torch.compile(lambda *x: bound_early(*x), backend="aot_eager", fullgraph=True)(q, k, v),
}


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*(jit.trace|is_fx_tracing|TracerWarning).*")
def test_every_way_in(way):
    q, k, v = make(2, 3, 5, 4, grad=way == "the attribute")
    with fa.use() as seen:
        out = WAYS[way](q, k, v)
    assert calls(seen) > 0
    assert not seen.report().left
    assert_close(out, plain(q, k, v))


def test_gradients_to_second_order():
    q, k, v = make(1, 2, 4, 3, grad=True)
    with fa.use():
        torch.autograd.gradcheck(bound_early, (q, k, v))
        torch.autograd.gradgradcheck(bound_early, (q, k, v))  # torch's own kernel has no second order


def test_a_backward_needs_no_block():
    q, k, v = make(2, 3, 5, 4, grad=True)
    with fa.use():
        out = bound_early(q, k, v, is_causal=True)
    ours = torch.autograd.grad(out.sum(), (q, k, v))
    square = torch.ones(5, 5, dtype=torch.bool).tril()
    for a, b in zip(ours, torch.autograd.grad(plain(q, k, v, square).sum(), (q, k, v)), strict=True):
        assert_close(a, b)


def test_arguments_reach_us():
    q, k, v = make(2, 4, 5, 8, dtype=torch.float32)
    k, v = (torch.randn(2, 2, 7, 8) for _ in range(2))
    with fa.use() as seen:
        out = bound_early(q, k, v, attn_mask=CAUSAL, scale=0.3, enable_gqa=True)
    wanted = plain(q * 0.3 * 8**0.5, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), CAUSAL)
    assert_close(out, wanted)
    assert calls(seen) == 1


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_causal_bias(bias):
    q, k, v = make(1, 2, 5, 4)[0], *make(1, 2, 7, 4, n=2)
    with fa.use() as seen:
        out = bound_early(q, k, v, attn_mask=bias(5, 7))
    assert calls(seen) == 1
    assert_close(out, plain(q, k, v, torch.ones(5, 7, dtype=torch.bool).tril(0 if bias is causal_upper_left else 2)))


def test_autocast():
    q, k, v = make(1, 2, 5, 8, dtype=torch.float32)
    with fa.use() as seen, torch.autocast("cpu", torch.bfloat16):
        out = bound_early(q, k, v)
    assert out.dtype == torch.bfloat16
    assert calls(seen) == 1
    assert_close(out.float(), plain(q, k, v), atol=2e-2, rtol=2e-2)


def test_jagged_and_causal():
    """torch's own jagged tensors have no causal attention on the CPU."""
    parts = [torch.randn(n, 2, 4, dtype=torch.float64) for n in (5, 3)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with fa.use() as seen:
        out = bound_early(x, x, x, is_causal=True)
    assert calls(seen) == 1
    for part, o in zip(parts, out.transpose(1, 2).unbind(), strict=True):
        y = part.transpose(0, 1)
        assert_close(o.transpose(0, 1), plain(y, y, y, torch.ones(len(part), len(part), dtype=torch.bool).tril()))
    with pytest.raises(RuntimeError):
        bound_early(x, x, x, is_causal=True)


def test_dropout_draws_from_torchs_generator():
    q, k, v = make(1, 2, 40, 8, dtype=torch.float32)
    with fa.use():
        torch.manual_seed(3)
        a = bound_early(q, k, v, dropout_p=0.5)
        b = bound_early(q, k, v, dropout_p=0.5)
        torch.manual_seed(3)
        again = bound_early(q, k, v, dropout_p=0.5)
    assert torch.equal(a, again)
    assert not torch.equal(a, b)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(2, 5, 8), torch.randn(2, 3, 8)])


def test_what_is_left_to_torch_and_why():
    q, k, v = make(1, 2, 5, 8, dtype=torch.float32)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    both = bound_early(q, k, v, attn_mask=mask, is_causal=True)  # torch documents an error and computes something
    x = nested()
    with fa.use() as seen:
        assert torch.equal(bound_early(q, k, v, attn_mask=mask, is_causal=True), both)
        assert bound_early(x, x, x).is_nested
        with pytest.raises(RuntimeError, match="same dtype"):  # torch's own error
            bound_early(q, k.double(), v)
    found = seen.report()
    assert not found.taken
    assert sum(found.left.values()) == 3
    assert any("is_causal" in reason for reason in found.left)
    assert any("not dense" in reason for reason in found.left)
    assert "left to the host" in str(found)


@pytest.mark.parametrize("way", ["the attribute", "no_grad", "vmap", "vmap of vmap", "jvp", "compiled"])
@pytest.mark.filterwarnings("ignore:.*batching rule.*")
def test_torchs_kernel_is_found_again_every_way(way, monkeypatch):
    def refuses(*args, **kwargs):
        raise ValueError("not today")

    q, k, v = make(2, 3, 5, 4)
    monkeypatch.setattr(torch_sdpa, "scaled_dot_product_attention", refuses)
    if way == "jvp":
        monkeypatch.setitem(WAYS, way, lambda q, k, v: torch.func.vjp(bound_early, q, k, v)[0])  # torch has no forward mode
    with fa.use() as seen:
        out = WAYS[way](q, k, v)
    assert_close(out, plain(q, k, v))
    assert set(seen.report().left) == {f"{torch_sdpa.ROUTE}: not today"}


def test_tensors_with_rules_of_their_own_stay_with_torch():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            assert "fastattn" not in str(func)
            bare = [x.inner if isinstance(x, cls) else x for x in args]
            return func(*bare, **(kwargs or {}))

    q, k, v = make(1, 2, 5, 8, dtype=torch.float32)
    with fa.use() as seen:
        out = bound_early(Wrapper(q), Wrapper(k), Wrapper(v))
    assert_close(out, plain(q, k, v))
    assert seen.report().left == {f"{torch_sdpa.ROUTE}: a tensor of class Wrapper": 1}


def taken_now():
    before = report()
    F.scaled_dot_product_attention(*make(1, 1, 3, 4))
    return sum((report() - before).taken.values()) == 1


def test_install_and_uninstall():
    bits = bound_early(*make(2, 3, 33, 16, dtype=torch.bfloat16))
    assert not taken_now()
    fa.install()
    fa.install()
    assert taken_now()
    with fa.use():
        fa.uninstall()
        assert taken_now()  # until the block ends
    assert not taken_now()
    fa.uninstall()
    assert not taken_now()
    assert torch.equal(bound_early(*make(2, 3, 33, 16, dtype=torch.bfloat16)), bits)


def fails(seen):
    with fa.use() as inner:
        seen.append(inner)
        assert taken_now()
        raise ZeroDivisionError


def test_blocks_nest_and_end_with_an_error():
    ended = []
    with fa.use() as outer:
        with pytest.raises(ZeroDivisionError):
            fails(ended)
        assert taken_now()
        fa.install()
    assert taken_now()
    fa.uninstall()
    assert not taken_now()
    assert calls(ended[0]) == 1
    assert calls(outer) == 2
    assert str(outer) == str(outer.report())


def test_threads_do_not_take_it_from_each_other():
    inside, leave, results = threading.Event(), threading.Event(), []

    def other():
        with fa.use():
            inside.set()
            leave.wait(30)
            results.append(taken_now())

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    with fa.use():
        assert taken_now()
    assert taken_now()
    leave.set()
    thread.join()
    assert results == [True]
    assert not taken_now()


def test_as_a_decorator():
    assert fa.use()(taken_now)()
    assert not taken_now()


def test_modules_of_torch():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    mha = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dtype=torch.float64), 2).eval()
    with torch.no_grad():
        wanted = mha(x, x, x, need_weights=False)[0], encoder(x)
        with fa.use() as seen:
            found = mha(x, x, x, need_weights=False)[0], encoder(x)  # the encoder's fused layers call no attention
    assert calls(seen) == 3
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)


def operators(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        call()
    return {event.key for event in found.key_averages()}


@pytest.mark.compile
def test_compiled_functions_change_with_it():
    q, k, v = make(1, 2, 5, 8, dtype=torch.float32)
    compiled = torch.compile(lambda *x: bound_early(*x, is_causal=True), backend="aot_eager", fullgraph=True)
    outs = []
    for taken in (False, True, False):
        if taken:
            fa.install()
        outs.append(compiled(q, k, v))
        assert ("fastattn::fwd" in operators(lambda: compiled(q, k, v))) == taken
        fa.uninstall()
    assert torch.equal(outs[0], outs[2])
    assert_close(outs[0], outs[1])


def test_graphs_on_disk_are_told_apart():
    """The compiler's caches know a graph by what was called, not by the kernel behind it; a tag is part of their keys."""
    import torch.compiler.config as config

    before = config.cache_key_tag
    with fa.use():
        inside = config.cache_key_tag
        with fa.use():
            assert config.cache_key_tag == inside
    assert inside != before
    assert config.cache_key_tag == before


@pytest.mark.compile
@pytest.mark.slow
def test_a_graph_on_disk_does_not_hide_us(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    q, k, v = make(1, 2, 9, 8, dtype=torch.float32)
    torch.compiler.reset()
    torch.compile(lambda *x: bound_early(*x, is_causal=True))(q, k, v)  # goes to disk
    with fa.use():
        compiled = torch.compile(lambda *x: bound_early(*x, is_causal=True))
        compiled(q, k, v)
        assert "fastattn::fwd" in operators(lambda: compiled(q, k, v))


def test_export():
    class Model(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = make(1, 2, 5, 8, dtype=torch.float32)
    with fa.use():
        program = torch.export.export(Model(), (q, k, v))
        decomposed = program.run_decompositions()
    assert_close(decomposed.module()(q, k, v), plain(q, k, v))


def test_checkpointing_inside_a_block():
    q, k, v = make(1, 2, 5, 4, grad=True)
    with fa.use():
        out = torch.utils.checkpoint.checkpoint(bound_early, q, k, v, use_reentrant=False)
        found = torch.autograd.grad(out.sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad(plain(q, k, v).sum(), (q, k, v)), strict=True):
        assert_close(a, b)


def test_without_get_kernel(monkeypatch):
    """Where torch cannot name the kernel that it had, its plain attention does what is left to torch."""
    from fastattn import compat

    monkeypatch.setattr(compat, "_get_kernel", None)
    q, k, v = make(1, 2, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with fa.use() as seen:
        out = bound_early(q, k, v, attn_mask=torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, -torch.inf))
        x = nested()
        assert bound_early(x, x, x).is_nested
    assert_close(out, plain(q, k, v, mask))
    assert sum(seen.report().left.values()) == 1


def test_reports_count_and_subtract(monkeypatch):
    from fastattn.integrations import ledger

    monkeypatch.setattr(ledger, "MOST", 1)
    monkeypatch.setattr(ledger, "_left", type(ledger._left)())
    before = report()
    assert str(report() - before) == "no calls"
    for reason in ("one", "one", "two", "three"):  # a message with sizes in it is another one every time
        ledger.leave("somewhere", reason)
    ledger.took("a route")
    found = report() - before
    assert found.left == {"somewhere: one": 2, "somewhere: other reasons": 2}
    assert found.taken == {"a route": 1}
    assert str(found).splitlines()[0].split() == ["1", "a", "route"]

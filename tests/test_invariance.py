"""deterministic="batch_invariant": the same function, and bits that know nothing of what stands beside a document."""

import dataclasses
import itertools

import pytest
import torch
from cases import MASKS, SCORES, generator, leaf, tensors
from torch.testing import assert_close

import fastattn as fa
from fastattn import functional, problem
from fastattn.backends import pieces

MODE = "batch_invariant"
HEADS, KEY_HEADS, DIM = 4, 2, 24
CAUSAL, WINDOW = fa.Causal("top_left"), fa.SlidingWindow(33, 20, "top_left")
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
CHAIN = (fa.Softcap(3.0), fa.ALiBi(SLOPES))


def make(n_b, n, dtype=torch.float32):
    """q, k, v and the cotangent of out."""
    g = generator(n_b, n)
    return [torch.randn(n_b, h, n, DIM, generator=g).to(dtype) for h in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]


def run(x, **options):
    """[out, lse, dq, dk, dv] with the cotangent x[3]."""
    leaves = [y.detach().clone().requires_grad_() for y in x[:3]]
    out, lse = fa.attention(*leaves, return_lse=True, deterministic=MODE, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out * x[3]).sum(), leaves)]


def assert_same(ours, theirs):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert torch.equal(a, b), f"{name}: {(a.double() - b.double()).abs().max():.1e}"


def part(x, entries, rows):
    return [y[entries, :, rows] for y in x]


DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = [{}, {"score": CHAIN, "sinks": torch.tensor([0.0, 1.0, -1.0, 0.5])}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", [None, CAUSAL, WINDOW, fa.PrefixLM(50, "top_left"), fa.SinkTokens(4) | WINDOW])
def test_batch_size_and_position_in_the_batch(mask, options, dtype):
    for n_b, n in ((5, 200), (33, 40)):
        x = make(n_b, n, dtype)
        whole = run(x, mask=mask, **options)
        assert_same(part(whole, slice(3, 4), slice(None)), run(part(x, slice(3, 4), slice(None)), mask=mask, **options))
        order = torch.tensor([3, 0, 2, 1])
        assert_same(part(whole, order, slice(None)), run(part(x, order, slice(None)), mask=mask, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [37, 163, 600])
@pytest.mark.parametrize(
    ("padded", "plain"),
    [
        (lambda n, more: CAUSAL, CAUSAL),  # rows see nothing of what is behind them
        (lambda n, more: CAUSAL & fa.Lengths(torch.full((3,), n)), CAUSAL),
        (lambda n, more: fa.Lengths(torch.full((3,), n)), None),
        (lambda n, more: fa.Padding(torch.arange(n + more).expand(3, -1) < n), None),
        (lambda n, more: fa.Dense((torch.arange(n + more) < n)[None].expand(3, 1, 1, -1)), None),
        (lambda n, more: WINDOW & fa.Lengths(torch.full((3,), n)), WINDOW),
        (lambda n, more: fa.Chunked(48, "top_left") & fa.Lengths(torch.full((3,), n)), fa.Chunked(48, "top_left")),
    ],
)
def test_padding_behind(padded, plain, n, dtype):
    """Whatever the rows of the padding hold and see; their cotangent is 0."""
    for more in (1, 37, 300):
        x = make(3, n + more, dtype)
        x[3][:, :, n:] = 0
        ours = part(run(x, mask=padded(n, more), score=CHAIN), slice(1, 2), slice(n))
        assert_same(ours, run(part(x, slice(1, 2), slice(n)), mask=plain, score=CHAIN))


@pytest.mark.parametrize("mask", [CAUSAL, fa.SlidingWindow(60, 0, "top_left")])
def test_padding_in_front(mask):
    """Rows in front of a document that see nothing, as with a causal mask, leave no trace."""
    for more in (1, 37, 300):
        x = make(3, 163 + more)
        keep = torch.arange(163 + more).expand(3, -1) >= more
        ours = run(x, mask=mask & fa.Padding(keep, "left"), score=CHAIN)
        document = slice(more, None)
        assert_same(part(ours, slice(1, 2), document), run(part(x, slice(1, 2), document), mask=mask, score=CHAIN))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, CAUSAL, fa.SlidingWindow(60, 0, "top_left")])
def test_packed_neighbours(mask, dtype):
    """A document's bits do not depend on where it stands among others, and are those of the document alone."""
    lengths = {"a": 50, "b": 130, "c": 600, "d": 7}
    documents = {name: make(1, n, dtype) for name, n in lengths.items()}
    alone = {name: run(x, mask=mask, score=CHAIN) for name, x in documents.items()}
    for order in ("abcd", "dcba", "bd", "ca"):
        packed = [torch.cat([documents[name][i] for name in order], 2)[0].transpose(0, 1) for i in range(4)]
        ends = [0, *itertools.accumulate(lengths[name] for name in order)]
        leaves = [y.detach().clone().requires_grad_() for y in packed[:3]]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        out, lse = fa.varlen_attention(*leaves, cu_seqlens, mask=mask, score=CHAIN, return_lse=True, deterministic=MODE)
        grads = torch.autograd.grad((out * packed[3]).sum(), leaves)
        for name, (first, last) in zip(order, itertools.pairwise(ends)):
            ours = [y[first:last].transpose(0, 1)[None] for y in (out.detach(), lse.transpose(0, 1).detach(), *grads)]
            assert_same(ours, alone[name])


def test_pieces_are_documents():
    x = make(2, 100)
    mask = fa.Documents(cu_seqlens=torch.tensor([0, 10, 10, 64, 90]))
    p = functional.problem(*x[:3], mask, (), None, None, 0.0, None, MODE, None)
    found = [(piece.entry, piece.rows, piece.keys) for piece in pieces.cut(p)]
    parts = [slice(0, 10), slice(10, 64), slice(64, 90)]
    assert found == [(entry, own, own) for entry in (0, 1) for own in parts]


# The same function


def everything(mask, score, deterministic, dtype=torch.float64, n_q=150, n_k=170, dropout=0.0):
    """out, lse and every gradient of a call with all features."""
    torch.manual_seed(0)
    q, k, v = tensors(2, 4, 2, n_q, n_k, 8, 5, dtype, strided=True)
    sinks = leaf(2, 4, dtype=dtype)
    scores = SCORES[score](2, 4, n_q, n_k, dtype)
    out, lse = fa.attention(
        q, k, v, mask=MASKS[mask](2, 4, n_q, n_k), score=scores, sinks=sinks, dropout_p=dropout, return_lse=True,
        deterministic=deterministic,
    )  # fmt: skip
    g = generator(n_q)
    do, dlse = (torch.randn(y.shape, generator=g, dtype=torch.float64).to(y) for y in (out, lse))
    wanted = [q, k, v, sinks, *(y for s in scores for y in s.params)]
    return [out, lse, *torch.autograd.grad((out * do).sum() + (lse * dlse).sum(), wanted)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_the_same_function(mask, score):
    for a, b in zip(everything(mask, score, MODE), everything(mask, score, None), strict=True):
        assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_dropout_drops_the_same():
    for a, b in zip(*(everything("documents", "bias", mode, dropout=0.3) for mode in (MODE, None)), strict=True):
        assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_exact_as_ever(dtype):
    exact = everything("documents", "chain", MODE)
    bar = {torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 2e-1}[dtype]
    for a, b in zip(everything("documents", "chain", MODE, dtype), exact, strict=True):
        assert_close(a.double(), b, atol=bar, rtol=bar)


def test_hidden_keys_may_hold_anything():
    x = make(1, 40)
    visible = torch.ones(40, 40, dtype=torch.bool)
    visible[:, 7] = visible[:, 30] = False
    clean = run(x, mask=fa.Dense(visible))
    x[1][:, :, 7], x[2][:, :, 30] = torch.nan, torch.inf
    for a, b in zip(run(x, mask=fa.Dense(visible)), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (1, 1)])
def test_no_rows_or_no_keys(n_q, n_k):
    q, k, v = tensors(2, 4, 2, n_q, n_k, 8, 8, torch.float64)
    sinks = torch.ones(4, dtype=torch.float64, requires_grad=True)
    found = []
    for mode in (MODE, None):
        out, lse = fa.attention(q, k, v, sinks=sinks, return_lse=True, deterministic=mode)
        found.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, sinks))])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


class ByRow(fa.Additive):
    """A table by row coordinate."""

    def __init__(self, table):
        self.params = (table,)

    def canonical(self, n_b, n_h):
        return self.with_params((self.params[0].reshape(1, 1, -1),))

    def term(self, tile):
        return self.params[0][0, 0][tile.q].to(tile.dtype)


def test_tables_are_not_read_beyond_their_end():
    """The rows that fill up a tile have the coordinate of the last."""
    x = [y.double() for y in make(1, 30)]
    for coords in (None, fa.Coordinates(q=torch.arange(30).flip(0), k=5)):
        table = torch.randn(30, dtype=torch.float64, generator=generator(30))
        ours, theirs = (
            fa.attention(*x[:3], mask=CAUSAL, score=(ByRow(table), fa.Softcap(2.0)), coords=coords, deterministic=mode)
            for mode in (MODE, None)
        )
        assert_close(ours, theirs)


# Around it


def test_tangents_and_the_second_order():
    q, k, v = (y.double() for y in make(2, 20)[:3])
    fn = lambda q: fa.attention(q, k, v, mask=CAUSAL, deterministic=MODE)
    plain = lambda q: fa.attention(q, k, v, mask=CAUSAL)
    assert_close(torch.func.jvp(fn, (q,), (q,)), torch.func.jvp(plain, (q,), (q,)))
    twice = [torch.func.jvp(torch.func.grad(lambda q, f=f: f(q).square().sum()), (q,), (q,)) for f in (fn, plain)]
    assert_close(*twice)
    assert_close(torch.func.vmap(fn)(torch.stack([q, 2 * q])), torch.stack([fn(q), fn(2 * q)]))


@pytest.mark.compile
def test_under_compile():
    x = make(2, 20)
    fn = lambda q, k, v: fa.attention(q, k, v, mask=CAUSAL, deterministic=MODE)
    assert torch.equal(torch.compile(fn, fullgraph=True, backend="aot_eager")(*x[:3]), fn(*x[:3]))


def test_what_is_said():
    q, k, v, _ = make(1, 8)
    explained = str(fa.explain(q, k, v, deterministic=MODE))
    assert "tiles of torch operations; every batch entry and document by itself" in explained
    assert "torch's fused CPU kernel chooses its tiles by the sizes" in explained  # which the usual call takes
    assert "fused CPU kernel" in fa.explain(q, k, v).kernel
    with pytest.raises(TypeError, match="deterministic must be None, True, False or 'batch_invariant', got 'often'"):
        fa.attention(q, k, v, deterministic="often")
    with pytest.raises(ValueError, match=r"needs backend None, .* got \"reference\""):
        fa.attention(q, k, v, deterministic=MODE, backend="reference")


def test_the_operators_know_it():
    x = make(1, 8)
    p = functional.problem(*x[:3], None, (), None, None, 0.0, None, MODE, None)
    packed = p.pack()
    again = problem.unpack(*x[:3], packed.mask, [], None, None, packed.spec, p.scale, 0.0, packed.ints, packed.floats)
    assert (again.invariant, again.deterministic) == (True, True)
    plain = dataclasses.replace(p, invariant=False).pack().spec
    assert problem.parse(plain).invariant is False

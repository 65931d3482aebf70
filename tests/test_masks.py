"""Every mask against its definition written out as index arithmetic, and the algebra against boolean logic."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn.masks import resolve

SIZES = [(7, 7), (5, 9), (9, 5), (1, 6), (6, 1), (0, 4), (4, 0), (0, 0)]
sizes = pytest.mark.parametrize(("n_q", "n_k"), SIZES)


def grid(n_q, n_k):
    """Column of rows, row of keys."""
    return torch.arange(n_q)[:, None], torch.arange(n_k)[None]


def position(i, n_q, n_k, align):
    """Where row i stands among the keys."""
    return i + {"top_left": 0, "bottom_right": n_k - n_q}.get(align, align)


def assert_shows(mask, wanted, n_q, n_k):
    """wanted: bool, broadcastable to (B, H, n_q, n_k)."""
    lowered = mask.lower(n_q, n_k)
    wanted = wanted.expand(*((1,) * (4 - wanted.dim())), *wanted.shape).expand(-1, -1, n_q, n_k)
    dense = mask.to_dense(n_q, n_k)
    assert dense.dtype == torch.bool
    assert torch.equal(dense.expand_as(wanted), wanted)
    assert mask.density(n_q, n_k) == pytest.approx(wanted.double().mean().item() if wanted.numel() else 0.0)
    start, stop = lowered.rows_tensors()
    assert start.dtype == stop.dtype == torch.int32
    assert bool(((start >= 0) & (start <= stop) & (stop <= n_k)).all())
    if not lowered.predicates:
        k = torch.arange(n_k)
        inside = (k >= start[..., None]) & (k < stop[..., None])  # (B, H, R, n_q, n_k)
        assert bool((inside.sum(2) <= 1).all())  # disjoint
        assert torch.equal(inside.any(2).expand_as(wanted), wanted)
        assert not lowered.is_full or bool(wanted.all())


@sizes
def test_full(n_q, n_k):
    assert_shows(fa.Full(), torch.ones(n_q, n_k, dtype=torch.bool), n_q, n_k)
    assert fa.Full().lower(n_q, n_k).is_full


ALIGN = pytest.mark.parametrize("align", ["top_left", "bottom_right", 3, -2])


@ALIGN
@sizes
def test_causal(n_q, n_k, align):
    i, j = grid(n_q, n_k)
    assert_shows(fa.Causal(align), j <= position(i, n_q, n_k, align), n_q, n_k)


@ALIGN
@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 0), (0, 3), (1, 2), (None, 1), (2, None), (None, None), (50, 50)])
@sizes
def test_sliding_window(n_q, n_k, align, left, right):
    i, j = grid(n_q, n_k)
    p = position(i, n_q, n_k, align)
    wanted = (j >= p - (1000 if left is None else left)) & (j <= p + (1000 if right is None else right))
    assert_shows(fa.SlidingWindow(left, right, align), wanted, n_q, n_k)


@ALIGN
@pytest.mark.parametrize("size", [1, 3, 100])
@sizes
def test_chunked(n_q, n_k, align, size):
    i, j = grid(n_q, n_k)
    wanted = torch.div(position(i, n_q, n_k, align), size, rounding_mode="floor") == torch.div(j, size, rounding_mode="floor")
    assert_shows(fa.Chunked(size, align), wanted, n_q, n_k)


@ALIGN
@sizes
def test_prefix(n_q, n_k, align):
    i, j = grid(n_q, n_k)
    causal = j <= position(i, n_q, n_k, align)
    assert_shows(fa.PrefixLM(3, align), causal | (j < 3), n_q, n_k)
    prefix = torch.tensor([0, 2, 50])
    assert_shows(fa.PrefixLM(prefix, align), causal | (j < prefix[:, None, None, None]), n_q, n_k)


@sizes
def test_sink_tokens(n_q, n_k):
    assert_shows(fa.SinkTokens(2), (grid(n_q, n_k)[1] < 2).expand(n_q, n_k), n_q, n_k)


def test_documents_by_ids():
    ids = torch.tensor([[4, 4, 4, 1, 1, 4, 0], [2, 2, 2, 2, 2, 2, 2]])  # a value that returns is another document
    run = torch.tensor([[0, 0, 0, 1, 1, 2, 3], [0] * 7])
    same = run[:, None, :, None] == run[:, None, None, :]
    i, j = grid(7, 7)
    assert_shows(fa.Documents(ids), same, 7, 7)
    assert_shows(fa.Documents(ids, within=fa.Causal()), same & (j <= i), 7, 7)
    assert_shows(fa.Documents(ids[0]), same[:1], 7, 7)


WITHIN = {
    "none": (None, lambda p, j, n_k: j >= 0),
    "causal": (fa.Causal("bottom_right"), lambda p, j, n_k: j <= p),
    "window": (fa.SlidingWindow(1, 0, "bottom_right"), lambda p, j, n_k: (j >= p - 1) & (j <= p)),
    "chunked": (fa.Chunked(2, "bottom_right"), lambda p, j, n_k: p // 2 == j // 2),
    "prefix": (fa.PrefixLM(2, "bottom_right"), lambda p, j, n_k: (j <= p) | (j < 2)),
    "and": (fa.Causal("bottom_right") & fa.SinkTokens(2), lambda p, j, n_k: (j <= p) & (j < 2)),
}


@pytest.mark.parametrize("name", WITHIN)
def test_documents_by_cuts(name):
    """Rows and keys cut differently; an empty document; rows and keys left over at the end."""
    cu_q, cu_k = [0, 3, 3, 4, 9], [0, 2, 6, 9, 12]
    within, rule = WITHIN[name]
    wanted = torch.zeros(11, 13, dtype=torch.bool)
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        i, j = grid(q1 - q0, k1 - k0)
        wanted[q0:q1, k0:k1] = rule(i + (k1 - k0) - (q1 - q0), j, k1 - k0).expand(q1 - q0, k1 - k0)
    for dtype in (torch.int32, torch.int64):
        mask = fa.Documents(
            cu_seqlens=torch.tensor(cu_q, dtype=dtype), cu_seqlens_k=torch.tensor(cu_k, dtype=dtype), within=within
        )
        assert_shows(mask, wanted, 11, 13)


def test_lengths():
    k_lens, q_lens = torch.tensor([0, 3, 6]), torch.tensor([5, 2, 0])
    i, j = grid(5, 6)
    wanted = j < k_lens[:, None, None, None]
    assert_shows(fa.Lengths(k_lens), wanted.expand(3, 1, 5, 6), 5, 6)
    assert_shows(fa.Lengths(k_lens, q_lens), wanted & (i < q_lens[:, None, None, None]), 5, 6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side):
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    keep = keep if side == "right" else keep.flip(1)
    assert_shows(fa.Padding(keep, side), keep[:, None, None].expand(3, 1, 4, 5), 4, 5)


def test_spans():
    start = torch.tensor([[0, 1, 4, 9], [2, 1, 0, -3]])  # overlapping, inverted, out of range
    stop = torch.tensor([[3, 2, 2, 20], [4, 5, 3, 2]])
    j = torch.arange(6)
    wanted = ((j >= start[..., None]) & (j < stop[..., None])).any(0)
    assert_shows(fa.Spans(start, stop), wanted, 4, 6)
    assert_shows(fa.Spans(start[0], stop[0]), ((j >= start[0][:, None]) & (j < stop[0][:, None])), 4, 6)
    shifted = torch.stack([start, start + 1])[:, None]  # (B, 1, R, n_q)
    wanted = ((j >= shifted[..., None]) & (j < stop[..., None])).any(2)
    assert_shows(fa.Spans(shifted, stop[None, None]), wanted, 4, 6)


@pytest.mark.parametrize("shape", [(5, 6), (1, 6), (5, 1), (3, 5, 6), (2, 1, 1, 6), (2, 3, 5, 6)])
def test_dense(shape):
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    assert_shows(fa.Dense(tensor), tensor, 5, 6)


def stripes(b, h, q_idx, k_idx):
    return (q_idx + 2 * k_idx + h + b) % 3 == 0


def test_custom():
    b, h = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None]
    i, j = grid(5, 6)
    mask = fa.Custom(stripes, bounds=fa.Causal("top_left"))
    dense = mask.lower(5, 6).to_dense(n_b=2, n_h=3)
    assert torch.equal(dense, ((i + 2 * j + h + b) % 3 == 0) & (j <= i))
    moved = mask.lower(5, 6).to_dense(fa.Coordinates(b=1, h=2, q=10, k=7), n_b=2, n_h=3)
    assert torch.equal(moved, ((i + 10 + 2 * (j + 7) + h + 2 + b + 1) % 3 == 0) & (j <= i))


def test_custom_is_named_by_its_source():
    [predicate] = fa.Custom(stripes).lower(3, 3).predicates
    assert predicate.key.startswith(f"{__name__}:stripes#")
    assert resolve(predicate.key) is stripes
    with pytest.raises(ValueError, match=r"the source of .* is not the one"):
        resolve(predicate.key.split("#")[0] + "#00000000")


def test_what_cannot_be_named_is_refused():
    shift = 2

    def closure(b, h, q_idx, k_idx):
        return q_idx > k_idx + shift

    for fn in (closure, lambda b, h, q_idx, k_idx: q_idx > k_idx):
        with pytest.raises(ValueError, match=r"must be importable by its name.*Move it to a module"):
            fa.Custom(fn)
    with pytest.raises(TypeError, match="must be a function"):
        fa.Custom(3)


# trees of masks against trees of bool tensors
def leaves(n):
    small = st.integers(0, n + 1)
    rows = st.lists(st.integers(-2, n + 2), min_size=n, max_size=n).map(torch.tensor)
    align = st.sampled_from(["top_left", "bottom_right"])
    i, j = grid(n, n)
    return st.one_of(
        st.just((fa.Full(), j >= 0)),
        align.map(lambda a: (fa.Causal(a), j <= i)),
        st.tuples(small, small).map(lambda w: (fa.SlidingWindow(*w), (j >= i - w[0]) & (j <= i + w[1]))),
        st.integers(1, n + 1).map(lambda s: (fa.Chunked(s), i // s == j // s)),
        small.map(lambda s: (fa.SinkTokens(s), (j < s).expand(n, n))),
        small.map(lambda s: (fa.PrefixLM(s), (j <= i) | (j < s))),
        st.tuples(rows, rows).map(lambda s: (fa.Spans(*s), (j >= s[0][:, None]) & (j < s[1][:, None]))),
        st.lists(st.integers(0, n), min_size=2, max_size=2).map(
            lambda s: (fa.Lengths(torch.tensor(s)), (j < torch.tensor(s)[:, None, None, None]).expand(2, 1, n, n))
        ),
    )


def trees(n):
    def joined(children):
        return st.tuples(children, st.sampled_from("&|"), children).map(
            lambda t: (t[0][0] & t[2][0], t[0][1] & t[2][1]) if t[1] == "&" else (t[0][0] | t[2][0], t[0][1] | t[2][1])
        )

    return st.recursive(leaves(n), joined, max_leaves=5)


def raised(call):
    """The message of the ValueError that a call raises, or None."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def most_spans(mask):
    """How many spans a row can have where no two of them are joined."""
    if type(mask).__name__ not in ("And", "Or"):
        return 1
    a, b = most_spans(mask.a), most_spans(mask.b)
    return a + b - 1 if type(mask).__name__ == "And" else a + b


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([1, 2, 5, 8]).flatmap(lambda n: st.tuples(st.just(n), trees(n))))
def test_algebra_is_boolean_logic(case):
    n, (mask, wanted) = case
    refusal = raised(lambda: mask.lower(n, n))
    if refusal is None:
        assert_shows(mask, wanted, n, n)
    else:
        assert "spans per row can need" in refusal
        assert most_spans(mask) > 4


def test_too_many_spans_is_a_static_error():
    one = fa.Spans(torch.zeros(3, 8).long(), torch.ones(3, 8).long())
    with pytest.raises(ValueError, match=r"`\|` of masks with 3 and 3 spans per row can need 6 spans; at most 4.*Dense\("):
        (one | one).lower(8, 8)


def test_union_with_a_predicate_names_the_way_out():
    for predicated in (fa.Dense(torch.ones(4, 4, dtype=torch.bool)), fa.Custom(stripes), fa.Custom(stripes) & fa.Causal()):
        for make in (lambda x: fa.Causal() | x, lambda x: x | fa.Causal()):
            with pytest.raises(ValueError, match=r"`\|` cannot take .*Dense\(a.to_dense\(n_q, n_k\) \| b.to_dense"):
                make(predicated)


def test_unaligned_needs_equal_lengths():
    for mask in (fa.Causal(), fa.SlidingWindow(2, 0), fa.Chunked(2), fa.PrefixLM(2)):
        mask.lower(4, 4)
        with pytest.raises(ValueError, match="needs n_q == n_k, got n_q=4 and n_k=5: say align='top_left'"):
            mask.lower(4, 5)


EVERY = [
    fa.Full(), fa.Causal("top_left"), fa.SlidingWindow(2, None), fa.Chunked(3), fa.PrefixLM(torch.tensor([1, 2])),
    fa.Documents(torch.tensor([0, 0, 1, 1])), fa.Lengths(torch.tensor([2, 4])), fa.SinkTokens(1),
    fa.Padding(torch.ones(2, 4, dtype=torch.bool)), fa.Spans(torch.zeros(4).long(), torch.arange(4)),
    fa.Dense(torch.eye(4, dtype=torch.bool)), fa.Custom(stripes),
    (fa.SinkTokens(1) | fa.SlidingWindow(1, 0)) & fa.Causal(),
]  # fmt: skip


@pytest.mark.parametrize("mask", EVERY, ids=repr)
def test_objects(mask):
    """Copies mean the same; identity decides equality; nothing can be changed; the text is short."""
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert torch.equal(other.to_dense(4, 4), mask.to_dense(4, 4))
        assert other != mask
        assert repr(other) == repr(mask)
    assert {mask: 1}[mask] == 1
    with pytest.raises(AttributeError, match="immutable"):
        mask.n = 3
    with pytest.raises(AttributeError, match="immutable"):
        del mask.align
    assert len(repr(mask)) < 90


def test_repr_is_code():
    for text in ("Causal('top_left')", "SlidingWindow(2, 0)", "(SinkTokens(4) | SlidingWindow(3, 0)) & Causal()"):
        scope = {name: getattr(fa, name) for name in ("Causal", "SlidingWindow", "SinkTokens")}
        assert torch.equal(eval(repr(eval(text, scope)), scope).to_dense(6, 6), eval(text, scope).to_dense(6, 6))


def test_picture():
    assert fa.Causal().show(3, 3) == "Causal()  3 x 3\n█··\n██·\n███\n█ visible  · hidden  66.7% visible"
    tiles = fa.Causal().show(8, 8, width=4).splitlines()
    assert tiles[1:5] == ["▒···", "█▒··", "██▒·", "███▒"]
    assert "(2 x 2 per character)" in tiles[5]
    assert fa.Lengths(torch.tensor([1, 2])).show(2, 2, b=1).splitlines()[1] == "██"
    assert "5 x 5" in fa.Dense(torch.eye(5, dtype=torch.bool)).show()
    with pytest.raises(ValueError, match="b=2 is outside the mask's 2"):
        fa.Lengths(torch.tensor([1, 2])).show(2, 2, b=2)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        fa.Causal().show(3, 3, width=0)


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = fa.Causal("top_left").plot(4, 5)
    assert ax.images[0].get_array().shape == (4, 5)
    assert ax.get_title() == "Causal(align='top_left')"


def test_lowering_takes_linear_memory():
    """At 300,000 rows a matrix would be 90 GB."""
    n = 300_000
    cuts = torch.tensor([0, 10, 100_000, n])
    for mask in (
        fa.Causal() & fa.SlidingWindow(100, 0),
        fa.SinkTokens(4) | fa.SlidingWindow(100, 0),
        fa.Documents(cu_seqlens=cuts, within=fa.Causal()) & fa.Chunked(7),
        fa.PrefixLM(torch.tensor([5, 6])),
    ):
        lowered = mask.lower(n, n)
        assert sum(x.numel() for x in lowered.tensors()) <= 16 * n
        assert 0 < mask.density(n, n) < 1


def test_shared_between_layers():
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    mask = fa.SinkTokens(1) | fa.SlidingWindow(2, 0)
    lowered = mask.lower(9, 9)
    for _ in range(2):
        assert torch.equal(fa.attention(q, k, v, mask=lowered), fa.attention(q, k, v, mask=mask))
    with pytest.raises(AttributeError):
        lowered.n_q = 3
    with pytest.raises(ValueError, match="mask"):
        fa.attention(q[:, :, :5], k, v, mask=lowered)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: fa.Causal("upper"), ValueError, "align.*'top_left'.*got 'upper'"),
        (lambda: fa.SlidingWindow(-1, 0), ValueError, "left must be at least 0, got -1"),
        (lambda: fa.SlidingWindow(1.5, 0), TypeError, "left must be an int"),
        (lambda: fa.Chunked(0), ValueError, "size must be at least 1, got 0"),
        (lambda: fa.SinkTokens(-2), ValueError, "n must be at least 0, got -2"),
        (lambda: fa.PrefixLM(torch.tensor([1, -1])), ValueError, "at least 0, got -1"),
        (lambda: fa.Documents(), ValueError, "exactly one of ids and cu_seqlens"),
        (lambda: fa.Documents(cu_seqlens=torch.tensor([1, 2])), ValueError, "must start with 0, got 1"),
        (lambda: fa.Documents(cu_seqlens=torch.tensor([0, 3, 2])), ValueError, "never decrease, got 3 then 2 at index 2"),
        (lambda: fa.Documents(cu_seqlens=torch.tensor([0.0, 3.0])), TypeError, "must be int32 or int64, got torch.float32"),
        (lambda: fa.Documents(torch.zeros(4).long(), within=fa.Dense(torch.ones(2, 2).bool())), ValueError, "within must be"),
        (lambda: fa.Lengths(torch.tensor([-1])), ValueError, "k_lens must be at least 0, got -1"),
        (lambda: fa.Lengths(torch.tensor([9])).lower(4, 4), ValueError, "k_lens must be at most n_k = 4, got 9"),
        (lambda: fa.Padding(torch.tensor([[True, False, True]])), ValueError, "batch entry 0 a real token"),
        (lambda: fa.Padding(torch.ones(2, 3)), TypeError, "keep must be a bool tensor"),
        (lambda: fa.Padding(torch.ones(2, 3).bool()).lower(4, 4), ValueError, "3 keys, but n_k is 4"),
        (lambda: fa.Spans(torch.zeros(5, 4).long(), torch.zeros(5, 4).long()), ValueError, "1 to 4 spans per row, got 5"),
        (lambda: fa.Spans(torch.zeros(4).long(), torch.zeros(4).long()).lower(5, 4), ValueError, "4 rows, but n_q is 5"),
        (lambda: fa.Dense(torch.ones(4, 4)), TypeError, "Dense takes a bool tensor.*Bias"),
        (lambda: fa.Dense(torch.ones(3, 4).bool()).lower(4, 4), ValueError, "does not broadcast"),
        (lambda: fa.Causal() & torch.ones(4, 4).bool(), TypeError, "takes two masks, got .*; wrap the tensor: Dense"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_nothing_waits_for_the_device(monkeypatch):
    """Reading a meta tensor raises where a GPU would be waited for: making, joining and lowering masks never tries."""
    q = torch.empty(10, 2, 8, device="meta")
    cu, ids = torch.empty(4, dtype=torch.int32, device="meta"), torch.empty(2, 10, dtype=torch.int64, device="meta")
    lengths, keep = ids[:, 0], torch.empty(2, 10, dtype=torch.bool, device="meta")
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("a value was read"))
    masks = [fa.Documents(ids), fa.Documents(cu_seqlens=cu, cu_seqlens_k=cu, within=fa.Causal("bottom_right"))]
    masks += [fa.PrefixLM(lengths), fa.Lengths(lengths, lengths), fa.Padding(keep, "left"), fa.Spans(ids[0], ids[1])]
    for mask in [*masks, fa.Dense(keep[:, None, None])]:
        (mask & fa.SlidingWindow(3, 0)).lower(10, 10, "meta").rows_tensors()
    (fa.Lengths(lengths) | fa.SinkTokens(2)).lower(10, 10, "meta")
    score = fa.ALiBi(torch.empty(2, device="meta")), fa.RelativeBias(torch.empty(5, device="meta"))
    out = fa.varlen_attention(q, q, q, cu, mask=fa.Causal(), score=score, dropout_p=0.1)
    assert out.is_meta
    assert out.shape == q.shape

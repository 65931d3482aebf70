"""Attention against its formula, with caches against without, and without copies."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from pairs import pairwise
from torch.testing import assert_close

import fastattn as fa
from fastattn import nn

D = torch.float64
N, L, DIM = 2, 11, 24
OPTIONS = {
    "heads": [(4, 4), (4, 2), (4, 1)],
    "head_dim": [None, 10],
    "causal": [False, True],
    "window": [None, 1, 4],
    "rotary": [None, "half", "interleaved"],
    "qk_norm": [False, True],
    "softcap": [None, 5.0],
    "score": [None, "alibi", "t5", "both"],
    "sinks": [False, True],
    "scale": [None, 0.5],
    "bias": [False, True],
    "mask": [None, "dense", "mask", "lowered"],
}
ROWS = pairwise(OPTIONS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def name_of(row):
    return "-".join(str(x).replace(" ", "") for x in row.values())


def make(row):
    n_heads, n_kv = row["heads"]
    head_dim = row["head_dim"] or DIM // n_heads
    scores = {
        None: (),
        "alibi": nn.ALiBiSlopes(n_heads, learned=True),
        "t5": nn.T5Buckets(n_heads, 8, 6, dtype=D),
        "both": [nn.T5Buckets(n_heads, 8, 6, dtype=D), fa.ALiBi(fa.alibi_slopes(n_heads))],
    }
    module = nn.Attention(
        DIM, n_heads, n_kv_heads=n_kv, head_dim=row["head_dim"], causal=row["causal"], window=row["window"],
        rotary=None if row["rotary"] is None else nn.Rotary(head_dim, base=50.0, style=row["rotary"]), qk_norm=row["qk_norm"],
        softcap=row["softcap"], score=scores[row["score"]], sinks=row["sinks"], scale=row["scale"], bias=row["bias"], dtype=D,
    )  # fmt: skip
    for x in module.parameters():
        if x.dim() < 2:
            torch.nn.init.normal_(x, mean=0.5)
    return module


def seen_by(row, n, given):
    """bool (B|1, 1, n, n)"""
    distance = torch.arange(n) - torch.arange(n)[:, None]  # k - q
    seen = torch.ones(n, n, dtype=torch.bool)
    if row["causal"]:
        seen &= distance <= 0
    if row["window"] is not None:
        seen &= distance.abs() < row["window"]
    return seen[None, None] & (given if given is not None else True)


def formula(m, row, x, given):
    """The block in plain PyTorch."""
    n_heads, n_kv, d = m.n_heads, m.n_kv_heads, m.head_dim
    q, k, v = (t.unflatten(2, (-1, d)).transpose(1, 2) for t in m.qkv(x).split([n_heads * d, n_kv * d, n_kv * d], 2))
    if row["qk_norm"]:
        q, k = (
            t * (t.square().mean(-1, keepdim=True) + torch.finfo(D).eps).rsqrt() * norm.weight
            for t, norm in ((q, m.q_norm), (k, m.k_norm))
        )
    if m.rotary is not None:
        q, k = m.rotary(q), m.rotary(k)
    k, v = (t.repeat_interleave(n_heads // n_kv, 1) for t in (k, v))
    s = q @ k.mT * (d**-0.5 if row["scale"] is None else row["scale"])
    if row["softcap"]:
        s = row["softcap"] * torch.tanh(s / row["softcap"])
    index = torch.arange(x.shape[1])
    distance = index - index[:, None]
    for item in m.score_modules:
        if isinstance(item, nn.ALiBiSlopes):
            s = s - item.slopes.to(D)[:, None, None] * distance.abs()
        else:
            s = s + item.weight[fa.t5_bucket(distance, True, 8, 6)].permute(2, 0, 1)
    if row["score"] == "both":
        s = s - fa.alibi_slopes(n_heads).to(D)[:, None, None] * distance.abs()
    s = s.masked_fill(~seen_by(row, x.shape[1], given), -torch.inf)
    if row["sinks"]:
        s = torch.cat((s, m.sinks[:, None, None].expand(x.shape[0], -1, x.shape[1], 1)), 3)
    w = torch.nan_to_num(s.softmax(-1))[..., : x.shape[1]]
    return m.out((w @ v).transpose(1, 2).flatten(2)), w


def mask_of(kind):
    if kind is None:
        return None, None
    if kind == "mask":
        return fa.PrefixLM(3), fa.PrefixLM(3).to_dense(L, L)
    seen = torch.rand(N, 1, L, L) > 0.3
    seen[..., 0] = True
    return (seen if kind == "dense" else fa.Dense(seen).lower(L, L)), seen


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_formula_and_gradients(row):
    m = make(row)
    mask, given = mask_of(row["mask"])
    x = torch.randn(N, L, DIM, dtype=D, requires_grad=True)
    out, (expected, w) = m(x, mask=mask), formula(m, row, x, given)
    assert_close(out, expected, rtol=1e-8, atol=1e-10)
    do = torch.randn_like(out)
    wrt = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(o, wrt, do) for o in (out, expected)), strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-9)
    rows = torch.tensor([L - 1, 2])
    assert_close(m.weights(x, rows=rows, mask=mask), w[:, :, rows], rtol=1e-8, atol=1e-10)
    entropy = -torch.special.xlogy(w, w).sum(-1)
    assert_close(m.weights(x, reduce="entropy", mask=mask), entropy, rtol=1e-8, atol=1e-10)


CACHED = [row for row in ROWS if row["mask"] is None]


@pytest.mark.parametrize("row", CACHED, ids=name_of)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_with_a_cache_equals_without(row, kind):
    """Token by token and in pieces, every row as if the whole had come at once."""
    row = {**row, "causal": True}
    m = make(row)
    x = torch.randn(N, L, DIM, dtype=D)
    with torch.no_grad():
        expected = m(x)
        for pieces in ([1] * L, [5, 1, 4, 1], [L]):
            cache = nn.DynamicCache() if kind == "dynamic" else nn.StaticCache(N, m.n_kv_heads, L + 3, m.head_dim, dtype=D)
            assert isinstance(cache, nn.Cache)
            got = torch.cat([m(part, cache=cache) for part in x.split(pieces, 1)], 1)
            assert_close(got, expected, rtol=1e-9, atol=1e-11)
            cache.reset()
            assert_close(torch.cat([m(part, cache=cache) for part in x.split(pieces, 1)], 1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_that_are_not_causal_see_what_is_cached_and_each_other(kind, window):
    m = nn.Attention(DIM, 4, n_kv_heads=2, window=window, dtype=D)
    x = torch.randn(N, L, DIM, dtype=D)
    with torch.no_grad():
        cache = nn.DynamicCache() if kind == "dynamic" else nn.StaticCache(N, 2, L + 3, 6, dtype=D)
        m(x[:, :7], cache=cache)
        assert_close(m(x[:, 7:], cache=cache), m(x)[:, 7:])


def test_sequences_of_different_lengths():
    """A prompt that is padded on the right: every sequence goes on behind its own last token."""
    row = dict(zip(OPTIONS, [(4, 2), None, True, 4, "half", True, None, "alibi", True, None, False, None], strict=True))
    m = make(row)
    lengths = torch.tensor([3, 6])
    prompt, new = torch.randn(N, 6, DIM, dtype=D), torch.randn(N, 4, DIM, dtype=D)
    with torch.no_grad():
        cache = nn.StaticCache(N, 2, 12, 6, dtype=D)
        m(prompt, cache=cache)
        cache.lengths.copy_(lengths)
        got = torch.cat([m(part, cache=cache) for part in new.split([1, 3], 1)], 1)
        for i, n in enumerate(lengths):
            alone = m(torch.cat((prompt[i : i + 1, :n], new[i : i + 1]), 1))
            assert_close(got[i], alone[0, n:], rtol=1e-9, atol=1e-11)
    assert cache.lengths.tolist() == [7, 10]


def test_left_padding_with_positions():
    """Padding on the left: positions for the rotation, a mask for the keys."""
    m = nn.Attention(DIM, 4, causal=True, rotary=nn.Rotary(6), dtype=D)
    x = torch.randn(N, L, DIM, dtype=D)
    pad = torch.tensor([4, 0])
    keep = torch.arange(L) >= pad[:, None]
    positions = (torch.arange(L) - pad[:, None]).clamp(min=0)
    got = m(x, mask=fa.Padding(keep, "left"), positions=positions)
    assert_close(got[0, 4:], m(x[:1, 4:])[0])
    assert_close(got[1], m(x[1:])[0])


def test_cross_attention_and_its_cache():
    m = nn.Attention(DIM, 4, n_kv_heads=2, context_dim=7, qk_norm=True, dtype=D)
    x, context = torch.randn(N, 3, DIM, dtype=D), torch.randn(N, 5, 7, dtype=D)
    q = F.rms_norm(m.q(x).unflatten(2, (4, 6)).transpose(1, 2), (6,))
    k, v = m.kv(context).unflatten(2, (2, 2, 6)).permute(2, 0, 3, 1, 4)
    k, v = F.rms_norm(k, (6,)).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert_close(m(x, context), expected)
    cache = nn.DynamicCache()
    assert_close(m(x, context, cache=cache), expected)
    assert_close(m(x[:, 1:], cache=cache), expected[:, 1:])
    assert cache.offset == 5
    keep = torch.tensor([[True, True, False, True, True], [True, False, False, False, False]])
    assert_close(m(x, context, mask=keep[:, None, None])[1], m(x[1:], context[1:, :1])[0])


def copies_in(fn, head_dim):
    """(operation, shape) of every copy of heads' features, also inside of operators."""
    with torch.profiler.profile(record_shapes=True) as profile:
        fn()
    copying = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::_to_copy", "aten::repeat")
    shaped = [(e.name, e.input_shapes[0]) for e in profile.events() if e.name in copying and e.input_shapes]
    return [(name, shape) for name, shape in shaped if len(shape) == 4 and shape[3] == head_dim]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [64, 700])  # below and above the sizes that go the short way
def test_the_projection_is_read_in_place(n, causal):
    m = nn.Attention(64, 4, n_kv_heads=2, causal=causal)
    x = torch.randn(2, n, 64)
    with torch.no_grad():
        m(x)
        copies = copies_in(lambda: m(x), 16)
    if causal and n == 700:  # the output is put together from pieces of rows, each written to its place once
        assert {name for name, _ in copies} == {"aten::copy_"}
        assert sum(shape[2] for _, shape in copies) == n
    else:
        assert not copies
    heads = m.qkv(x).unflatten(2, (-1, 16)).transpose(1, 2)
    q, k, v, _ = m._operands(x, None, None, (), None, None, None)
    assert q._base is not None
    assert [t.stride() for t in (q, k, v)] == [heads.stride()] * 3
    assert {t.untyped_storage().data_ptr() for t in (q, k, v)} == {q.untyped_storage().data_ptr()}
    assert k.storage_offset() - q.storage_offset() == 64


def test_the_count_sees_a_copy():
    x = torch.randn(2, 8, 4, 16)
    assert copies_in(lambda: x.transpose(1, 2).contiguous(), 16)
    m = nn.Attention(64, 4)
    with torch.no_grad():
        q, k, v = (t.contiguous() for t in m._operands(torch.randn(2, 64, 64), None, None, (), None, None, None)[:3])
        assert not copies_in(lambda: fa.attention(q, k, v), 16)
        assert copies_in(lambda: fa.attention(q[..., ::2], k[..., ::2], v), 8)  # no dense features: a kernel must copy


def test_training_copies_nothing_forwards():
    m = nn.Attention(64, 4)
    x = torch.randn(2, 700, 64, requires_grad=True)
    m(x)
    assert not copies_in(lambda: m(x), 16)


def test_dropout_only_while_training():
    m = nn.Attention(DIM, 4, dropout=0.5)
    x = torch.randn(N, L, DIM)
    torch.manual_seed(1)
    a = m(x)
    assert not torch.equal(a, m(x))
    torch.manual_seed(1)
    assert torch.equal(a, m(x))
    m.eval()
    assert torch.equal(m(x), m(x))


def test_dynamic_cache_has_gradients_and_static_refuses_them():
    m = nn.Attention(DIM, 4, causal=True, rotary=nn.Rotary(6), dtype=D)
    x = torch.randn(N, L, DIM, dtype=D, requires_grad=True)
    cache = nn.DynamicCache()
    got = torch.cat([m(part, cache=cache) for part in x.split([4, 7], 1)], 1)
    do = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(o, [x, *m.parameters()], do) for o in (got, m(x))), strict=True):
        assert_close(a, b)
    with pytest.raises(ValueError, match="StaticCache is for"):
        m(x, cache=nn.StaticCache(N, 4, L, 6, dtype=D))


def test_copies_and_state():
    row = dict(zip(OPTIONS, [(4, 2), None, True, 4, "half", True, 5.0, "both", True, None, True, None], strict=True))
    m = make(row)
    x = torch.randn(N, L, DIM, dtype=D)
    other = make(row)
    other.load_state_dict(m.state_dict())
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), other):
        assert torch.equal(twin(x), m(x))
    half = copy.deepcopy(m).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert_close(half(x.bfloat16()).double(), m(x), rtol=0.05, atol=0.05)


def test_autocast():
    m = nn.Attention(DIM, 4, causal=True, rotary=nn.Rotary(6), qk_norm=True, sinks=True, score=nn.ALiBiSlopes(4))
    x = torch.randn(N, L, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        out = m(x)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), m(x), rtol=0.05, atol=0.02)


def test_second_derivatives():
    m = nn.Attention(8, 2, n_kv_heads=1, causal=True, rotary=nn.Rotary(4), qk_norm=True, softcap=4.0, sinks=True, dtype=D)
    x = torch.randn(1, 3, 8, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(m, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(m, x)


@pytest.mark.compile
def test_compiles_whole_with_and_without_caches():
    torch._dynamo.reset()
    m = nn.Attention(DIM, 4, n_kv_heads=2, causal=True, window=5, rotary=nn.Rotary(6), sinks=True, score=nn.T5Buckets(4))
    m.eval()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    x = torch.randn(N, L, DIM)
    assert_close(compiled(x), m(x))
    with torch.no_grad():
        for cache in (nn.StaticCache(N, 2, L, 6), nn.DynamicCache()):
            got = torch.cat([compiled(part, cache=cache) for part in x.split([4] + [1] * 7, 1)], 1)
            assert_close(got, m(x))


@pytest.mark.compile
def test_one_graph_for_many_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    m = nn.Attention(DIM, 4, causal=True, window=5, rotary=nn.Rotary(6), score=nn.T5Buckets(4))
    mha = nn.MultiheadAttention(DIM, 4, batch_first=True)
    for module in (m, lambda x: mha(x, x, x)[0]):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
        compiled(torch.randn(N, 7, DIM))
        graphs = counter.frame_count
        for n in (9, 33, 70):
            x = torch.randn(N, n, DIM)
            assert_close(compiled(x), module(x))
        assert counter.frame_count == graphs


@pytest.mark.compile
def test_exports():
    m = nn.Attention(DIM, 4, causal=True, rotary=nn.Rotary(6)).eval()
    x = torch.randn(N, L, DIM)
    n = torch.export.Dim("n", min=2, max=100)
    program = torch.export.export(m, (x,), dynamic_shapes=({1: n},))
    y = torch.randn(N, 29, DIM)
    assert_close(program.module()(y), m(y))


def wrong_uses():
    x = torch.randn(2, 5, 8)

    def use(**made):
        return nn.Attention(8, 2, **made)

    return {
        "kv heads": (lambda: nn.Attention(8, 4, n_kv_heads=3), "n_heads must be a multiple of n_kv_heads, got 4 and 3"),
        "dim": (lambda: nn.Attention(9, 2), "dim must be divisible by n_heads where head_dim is not given, got 9 and 2"),
        "rotary": (lambda: use(rotary=nn.Rotary(6)), "rotary must be for head_dim 4, got 6"),
        "window": (lambda: use(window=0), "window must be at least 1, got 0"),
        "dropout": (lambda: use(dropout=1.0), r"dropout must be a number in \[0, 1\), got 1.0"),
        "cross causal": (lambda: use(context_dim=3, causal=True), "causal, window and rotary are for self-attention"),
        "dropout's kind": (lambda: use(dropout="a"), r"dropout must be a number in \[0, 1\), got 'a'"),
        "scale": (lambda: use(scale=float("inf")), "scale must be finite, got inf"),
        "context's kind": (lambda: use(context_dim=3)(x, [1]), r"context must have shape \(2, length, 3\), got list"),
        "positions": (
            lambda: use(rotary=nn.Rotary(4))(x, positions=torch.zeros(3, 5).long()),
            r"positions must have shape \(5,\) or \(2, 5\), got \(3, 5\)",
        ),
        "cache size": (lambda: nn.StaticCache(-1, 1, 1, 1), "batch must be at least 1, got -1"),
        "static lengths": (
            lambda: nn.StaticCache(2, 1, 4, 8).update(x[:, None, :2], x[:, None, :3]), "k and v must have the same length",
        ),
        "lengths": (lambda: nn.DynamicCache().update(x[:, None, :2], x[:, None, :3]), "k and v must have the same length"),
        "x": (lambda: use()(x[..., :3]), r"x must be a dense tensor of shape \(batch, length, 8\), got \(2, 5, 3\)"),
        "x is no tensor": (lambda: use()(None), "x must be a dense tensor of shape .*, got NoneType"),
        "head_dim": (lambda: use(head_dim=0), "head_dim must be at least 1, got 0"),
        "no rotary": (lambda: use()(x, positions=torch.arange(5)), "positions must be None without a rotary"),
        "context": (lambda: use()(x, x), "context must be None for self-attention"),
        "no context": (lambda: use(context_dim=3)(x), r"context must have shape \(2, length, 3\), got None"),
        "cross is_causal": (lambda: use(context_dim=8)(x, x, is_causal=True), "is_causal must be left out with context_dim"),
        "mask": (lambda: use(causal=True)(x, mask=fa.Full().lower(4, 4)), "mask was lowered for 4 rows and 4 keys"),
        "room": (
            lambda: use()(x.detach(), cache=nn.StaticCache(2, 2, 4, 4)), "the cache holds 4 tokens, of which up to 0 are used",
        ),
        "cache dtype": (lambda: use()(x, cache=nn.StaticCache(2, 2, 9, 4, dtype=D)), "k must fit the cache's torch.float64"),
        "cache batch": (lambda: use()(x, cache=nn.StaticCache(3, 2, 9, 4)), r"k must fit the cache's torch.float32 \(3, 2"),
    }  # fmt: skip


WRONG = wrong_uses()


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name):
    use, message = WRONG[name]
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        use()


def test_what_is_of_another_kind():
    with pytest.raises(TypeError, match="score must hold Scores or modules that give one, got str"):
        nn.Attention(8, 2, score=["alibi"])
    for made, message in (
        (dict(window=2.5), "window must be an int, got 2.5"),
        (dict(causal="yes"), "causal must be True or False, got 'yes'"),
        (dict(rotary=4), "rotary must be a Rotary or None, got int"),
        (dict(scale="a"), "scale must be a number or None, got 'a'"),
    ):
        with pytest.raises(TypeError, match=message):
            nn.Attention(8, 2, **made)
    m, x = nn.Attention(8, 2), torch.randn(2, 5, 8)
    with pytest.raises(TypeError, match="score must be a Score or several, got int"):
        m(x, score=3)
    with pytest.raises(TypeError, match="cache must be a Cache or None, got int"):
        m(x, cache=3)
    with pytest.raises(TypeError, match="cache must be a Cache or None, got the class DynamicCache"):
        m(x, cache=nn.DynamicCache)
    with pytest.raises(TypeError, match="is_causal must be True, False or None, got 3"):
        m(x, is_causal=3)
    m = nn.Attention(8, 2, context_dim=8)
    with pytest.raises(TypeError, match="cache must be a DynamicCache where there is a context, got StaticCache"):
        m(x, x, cache=nn.StaticCache(2, 2, 9, 4))

"""The names of flash-attn against the formula in float64: corners, windows, packing, caches."""

import inspect

import pytest
import torch
from torch.testing import assert_close

from fastattn.integrations import flash_attn as fa2
from fastattn.integrations.flash_attn_cache import rotated

G = torch.Generator()


def make(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=G.manual_seed(seed), dtype=dtype).requires_grad_(dtype == torch.float64)


def plain(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None, hide_left=0):
    """One sequence: q (Lq, Hq, D), k and v (Lk, Hkv, D). Returns o (Lq, Hq, D), lse (Hq, Lq) and weights (Hq, Lq, Lk)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    n_q, n_k = q.shape[0], k.shape[0]
    s = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    at = torch.arange(n_q)[:, None] + n_k - n_q
    j = torch.arange(n_k)
    if slopes is not None:
        s = s - slopes[:, None, None] * (at - j).abs()
    left, right = window[0], 0 if causal else window[1]
    seen = j >= hide_left
    seen = seen & (at - j <= left) if left >= 0 else seen.expand(n_q, n_k)
    seen = seen & (j - at <= right) if right >= 0 else seen
    lse = s.masked_fill(~seen, -torch.inf).logsumexp(-1)
    w = torch.where(seen, torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), 0.0)
    return torch.einsum("hij,jhd->ihd", w, v), lse, w


CASES = {
    "full": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "causal window": dict(causal=True, window_size=(3, -1)),
    "left only": dict(window_size=(-1, 2)),
    "softcap": dict(softcap=2.0, causal=True),
    "scale": dict(softmax_scale=0.1),
}


def translated(kwargs):
    names = {"window_size": "window", "softmax_scale": "scale"}
    return {names.get(key, key): x for key, x in kwargs.items()}


def equal(found, wanted, inputs):
    assert_close(found, wanted)
    g = torch.randn(found.shape, generator=G.manual_seed(9), dtype=found.dtype)
    for a, b in zip(torch.autograd.grad(found, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("alibi", [None, "heads", "batch"])
@pytest.mark.parametrize(("n_q", "n_k"), [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("name", CASES)
def test_batch(name, n_q, n_k, alibi):
    q, k, v = make(2, n_q, 4, 3), make(2, n_k, 2, 3, seed=1), make(2, n_k, 2, 5, seed=2)
    slopes = None if alibi is None else torch.rand((4,) if alibi == "heads" else (2, 4), generator=G, dtype=torch.float64)
    found, lse, weights = fa2.flash_attn_func(q, k, v, **CASES[name], alibi_slopes=slopes, return_attn_probs=True)
    per_batch = [None, None] if slopes is None else slopes.expand(2, 4)
    wanted = [plain(*x, slopes=s, **translated(CASES[name])) for *x, s in zip(q, k, v, per_batch)]
    equal(found, torch.stack([o for o, _, _ in wanted]), (q, k, v))
    assert_close(lse, torch.stack([x for _, x, _ in wanted]))
    assert_close(weights, torch.stack([w for _, _, w in wanted]))
    assert torch.equal(found, fa2.flash_attn_func(q, k, v, **CASES[name], alibi_slopes=slopes, deterministic=True))


@pytest.mark.parametrize("alibi", [None, "heads", "sequences"])
@pytest.mark.parametrize("name", CASES)
def test_packed_sequences(name, alibi):
    lens_q, lens_k = (3, 0, 5, 2), (4, 2, 3, 2)
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lens_q, lens_k))
    q, k, v = make(10, 4, 3), make(11, 2, 3, seed=1), make(11, 2, 3, seed=2)
    slopes = None if alibi is None else torch.rand((4,) if alibi == "heads" else (4, 4), generator=G, dtype=torch.float64)
    arguments = (q, k, v, cu_q, cu_k, 5, 4)
    found, lse, none = fa2.flash_attn_varlen_func(*arguments, **CASES[name], alibi_slopes=slopes, return_attn_probs=True)
    assert none is None
    per_sequence = [None] * 4 if slopes is None else slopes.expand(4, 4)
    parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), per_sequence)
    wanted = [plain(*x, slopes=s, **translated(CASES[name])) for *x, s in parts]
    equal(found, torch.cat([o for o, _, _ in wanted]), (q, k, v))
    assert_close(lse, torch.cat([x for _, x, _ in wanted], 1))


def test_learned_slopes_of_packed_sequences():
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    q, k, v = (make(7, 2, 3, seed=i) for i in range(3))
    slopes = torch.rand(2, 2, generator=G, dtype=torch.float64, requires_grad=True)
    found = fa2.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, alibi_slopes=slopes)
    wanted = torch.cat([plain(q[a:b], k[a:b], v[a:b], slopes=s)[0] for a, b, s in ((0, 3, slopes[0]), (3, 7, slopes[1]))])
    equal(found, wanted, (q, k, v, slopes))


def test_packed_tensors():
    qkv = make(2, 6, 3, 4, 8)
    equal(fa2.flash_attn_qkvpacked_func(qkv, causal=True), fa2.flash_attn_func(*qkv.unbind(2), causal=True), [qkv])
    q, kv = make(2, 6, 4, 8), make(2, 7, 2, 2, 8, seed=1)
    equal(fa2.flash_attn_kvpacked_func(q, kv, causal=True), fa2.flash_attn_func(q, *kv.unbind(2), causal=True), [q, kv])
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    qkv, q, kv = make(6, 3, 4, 8), make(6, 4, 8), make(6, 2, 2, 8, seed=1)
    found = fa2.flash_attn_varlen_qkvpacked_func(qkv, cu, 4, causal=True)
    equal(found, fa2.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 4, 4, causal=True), [qkv])
    found = fa2.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 4, 4, window_size=(1, 0))
    equal(found, fa2.flash_attn_varlen_func(q, *kv.unbind(1), cu, cu, 4, 4, window_size=(1, 0)), [q, kv])


def test_dropout_is_what_the_weights_say():
    q, k, v = make(2, 6, 4, 8), make(2, 9, 2, 8, seed=1), make(2, 9, 2, 8, seed=2)
    torch.manual_seed(0)
    out, _, w = fa2.flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
    kept = torch.where(w > 0, w, 0.0) / 0.6
    assert (w < 0).any()
    assert_close(out, torch.einsum("bhij,bjhd->bihd", kept, v.repeat_interleave(2, 2)))
    whole = fa2.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[2]
    assert_close(w.abs(), whole)
    torch.manual_seed(0)
    assert torch.equal(out, fa2.flash_attn_func(q, k, v, 0.4, causal=True))


def test_dropout_of_packed_sequences():
    cu_q, cu_k = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([0, 4, 6], dtype=torch.int32)
    q, k, v = make(8, 4, 3), make(6, 4, 3, seed=1), make(6, 4, 3, seed=2)
    torch.manual_seed(0)
    arguments = (q, k, v, cu_q, cu_k, 5, 4, 0.4, None, True)
    out, lse, w = fa2.flash_attn_varlen_func(*arguments, return_attn_probs=True)
    assert w.shape == (2, 4, 5, 4)
    assert lse.shape == (4, 8)
    kept = torch.where(w > 0, w, 0.0) / 0.6
    for n, (rows, keys) in enumerate(((slice(0, 3), slice(0, 4)), (slice(3, 8), slice(4, 6)))):
        wanted = torch.einsum("hij,jhd->ihd", kept[n, :, : rows.stop - rows.start, : keys.stop - keys.start], v[keys])
        assert_close(out[rows], wanted)
    torch.manual_seed(0)
    assert torch.equal(out, fa2.flash_attn_varlen_func(*arguments))


def test_padding_there_and_back():
    x, keep = make(3, 5, 2, 4), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    rows, indices, cu, longest, used = fa2.unpad_input(x, keep)
    assert_close(rows, x[keep.bool()])
    assert cu.tolist() == [0, 3, 6, 11]
    assert cu.dtype == used.dtype == torch.int32
    assert longest == 5
    back = fa2.pad_input(rows, indices, 3, 5)
    equal(back, x * keep[..., None, None], [x])
    room = torch.tensor([[0, 0, 0, 1, 0], [0] * 5, [0] * 5])
    rows, _, cu, longest, used = fa2.unpad_input(x, keep, room)
    assert cu.tolist() == [0, 4, 7, 12]
    assert used.tolist() == [3, 3, 5]
    assert_close(fa2.index_first_axis(x.flatten(0, 1), indices), x[keep.bool()])


WINDOWS = {"full": {}, "causal": dict(causal=True), "window": dict(causal=True, window_size=(2, -1))}


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("kind", WINDOWS)
def test_cache(kind, alibi):
    lens, n_new = [4, 7, 2], 2
    q, k, v = (make(3, n_new, h, 8, seed=i).detach() for i, h in enumerate((4, 2, 2)))
    caches = [make(3, 12, 2, 8, seed=i).detach() for i in (3, 4)]
    slopes = torch.rand(4, generator=G, dtype=torch.float64) if alibi else None
    before = [x.clone() for x in caches]
    out, lse = fa2.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=torch.tensor(lens, dtype=torch.int32), alibi_slopes=slopes,
        return_softmax_lse=True, **WINDOWS[kind],
    )  # fmt: skip
    for b, n in enumerate(lens):
        keys, values = (torch.cat((x[b, :n], new[b])) for x, new in zip(before, (k, v)))
        o, wanted_lse, _ = plain(q[b], keys, values, slopes=slopes, **translated(WINDOWS[kind]))
        assert_close(out[b], o)
        assert_close(lse[b], wanted_lse)
        assert torch.equal(caches[0][b, : n + n_new], keys)
        assert torch.equal(caches[0][b, n + n_new :], before[0][b, n + n_new :])


def test_cache_in_pages_and_by_index():
    lens = torch.tensor([5, 3], dtype=torch.int32)
    q, k, v = (make(2, 1, 2, 8, seed=i).detach() for i in range(3))
    dense = [make(2, 8, 2, 8, seed=i).detach() for i in (3, 4)]
    table = torch.tensor([[4, 1], [0, 3]], dtype=torch.int32)
    pages = [torch.zeros(5, 4, 2, 8, dtype=torch.float64) for _ in range(2)]
    for page, whole in zip(pages, dense):
        page[table.long()] = whole.unflatten(1, (2, 4))
    picked = [torch.zeros(4, 8, 2, 8, dtype=torch.float64) for _ in range(2)]
    index = torch.tensor([3, 1], dtype=torch.int32)
    for some, whole in zip(picked, dense):
        some[index.long()] = whole
    leftpad = torch.tensor([1, 0], dtype=torch.int32)
    kwargs = dict(cache_seqlens=lens, causal=True, cache_leftpad=leftpad)
    wanted = fa2.flash_attn_with_kvcache(q, *dense, k, v, **kwargs)
    assert_close(fa2.flash_attn_with_kvcache(q, *pages, k, v, block_table=table, **kwargs), wanted)
    assert_close(fa2.flash_attn_with_kvcache(q, *picked, k, v, cache_batch_idx=index, **kwargs), wanted)
    assert_close(wanted[0], plain(q[0], dense[0][0, :6], dense[1][0, :6], causal=True, hide_left=1)[0])


@pytest.mark.parametrize("interleaved", [True, False])
def test_cache_rotates_by_position(interleaved):
    """Rotation makes scores depend on distance alone: a shifted cache gives the same."""
    angle = torch.arange(20)[:, None] * torch.tensor([1.0, 0.3])
    cos, sin = angle.cos().double(), angle.sin().double()
    q, k, v = (make(1, 3, 2, 8, seed=i).detach() for i in range(3))
    outs = []
    for shift in (0, 5):
        caches = [torch.zeros(1, 12, 2, 8, dtype=torch.float64) for _ in range(2)]
        outs.append(fa2.flash_attn_with_kvcache(
            q, *caches, k, v, cos, sin, cache_seqlens=shift, causal=True, rotary_interleaved=interleaved,
            cache_leftpad=torch.tensor([shift], dtype=torch.int32),
        ))  # fmt: skip
    assert_close(outs[0], outs[1], atol=1e-6, rtol=1e-6)  # rotations are done in fp32
    x = make(1, 1, 1, 6).detach()
    turned = rotated(x, cos, sin, torch.tensor([[1]]), interleaved)[0, 0, 0]
    pair = (0, 1) if interleaved else (0, 2)
    assert_close(turned[pair[0]], x[0, 0, 0, pair[0]] * cos[1, 0] - x[0, 0, 0, pair[1]] * sin[1, 0], atol=1e-6, rtol=1e-6)
    assert torch.equal(turned[4:], x[0, 0, 0, 4:])


def test_half_precision_and_tensors_for_sizes():
    q, k, v = (make(2, 33, 4, 16, seed=i, dtype=torch.bfloat16) for i in range(3))
    found = fa2.flash_attn_func(q, k, v, window_size=torch.tensor([4, 4]))
    assert found.dtype == torch.bfloat16
    wanted = torch.stack([plain(*(x.double() for x in y), window=(4, 4))[0] for y in zip(q, k, v)])
    assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)


ORDER = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs"]


@pytest.mark.parametrize("name", [n for n in fa2.__all__ if n.startswith("flash_attn") and "cache" not in n])
def test_arguments_stand_in_their_order(name):
    names = list(inspect.signature(getattr(fa2, name)).parameters)
    first = names.index("dropout_p")
    assert names[first : first + len(ORDER)] == ORDER
    tensors = {"qkv": ["qkv"], "kv": ["q", "kv"]}.get(name.split("packed")[0].split("_")[-1], ["q", "k", "v"])
    sizes = [] if "varlen" not in name else (
        ["cu_seqlens", "max_seqlen"] if tensors == ["qkv"]
        else ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    )  # fmt: skip
    assert names[:first] == tensors + sizes


def test_errors():
    q = make(1, 3, 2, 4)
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        fa2.flash_attn_func(q[0], q, q)
    with pytest.raises(ValueError, match="window_size must be"):
        fa2.flash_attn_func(q, q, q, window_size=(1, 2, 3))
    with pytest.raises(ValueError, match="window_size must be"):
        fa2.flash_attn_func(q, q, q, window_size=3)
    with pytest.raises(ValueError, match=r"qkv must have 3 entries in dimension 2, got shape \(1, 3, 2, 2, 4\)"):
        fa2.flash_attn_qkvpacked_func(torch.stack((q, q), 2))
    for seqlens in (-1, 3, torch.tensor([4])):  # a new row would be written from behind, or past the end
        with pytest.raises(ValueError, match=r"cache_seqlens must lie in \[0, 2\]"):
            fa2.flash_attn_with_kvcache(q, q, q, k=q[:, :1], v=q[:, :1], cache_seqlens=seqlens)
    with pytest.raises(ValueError, match=r"cache_seqlens must be an int or have shape \(1,\), got \(2,\)"):
        fa2.flash_attn_with_kvcache(q, q, q, cache_seqlens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 3\), got \(1, 2\)"):
        fa2.unpad_input(q, torch.ones(1, 2))
    with pytest.raises(ValueError, match="k and v must be given together"):
        fa2.flash_attn_with_kvcache(q, q, q, k=q)
    with pytest.raises(ValueError, match="rotary_cos and rotary_sin"):
        fa2.flash_attn_with_kvcache(q, q, q, rotary_cos=q)
    with pytest.raises(ValueError, match="cache_batch_idx must be None"):
        fa2.flash_attn_with_kvcache(q, q, q, cache_batch_idx=q, block_table=q)
    cu = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"alibi_slopes must have shape \(2,\) or \(1, 2\), got \(3, 2\)"):
        fa2.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 3, 3, alibi_slopes=torch.rand(3, 2))
    with pytest.raises(NotImplementedError, match="block_table"):
        fa2.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 3, 3, block_table=cu)

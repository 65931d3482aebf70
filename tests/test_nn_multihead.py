"""MultiheadAttention against torch's: parameters bit by bit, outputs, weights and gradients over a grid of options."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from pairs import pairwise
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import fastattn as fa

D = torch.float64
L, S, N, E, H = 5, 7, 2, 12, 3
CONSTRUCTION = {
    "bias": [True, False],
    "add_bias_kv": [False, True],
    "add_zero_attn": [False, True],
    "kv_dims": [(None, None), (5, 7), (12, 4)],
    "batch_first": [False, True],
}
CALL = {
    "inputs": ["self", "key is value", "all differ", "unbatched"],
    "attn_mask": [None, "bool", "float", "bool 3-D", "float 3-D", "causal", "causal float"],
    "key_padding_mask": [None, "bool", "float", "-inf"],
    "is_causal": [False, True],
    "weights": [None, "averaged", "per head"],
}
ROWS = pairwise({**CONSTRUCTION, **CALL})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")  # torch's, for a bool and a float mask
        yield


def pair(**kwargs):
    """(torch's, ours) from one seed, and the generator's next draw after each."""
    made = []
    for cls in (nn.MultiheadAttention, fa.nn.MultiheadAttention):
        torch.manual_seed(1)
        made.append((cls(**kwargs), torch.randn(3)))
    (theirs, next_theirs), (ours, next_ours) = made
    assert torch.equal(next_theirs, next_ours)
    return theirs, ours


def causal(n, m):
    return torch.ones(n, m, dtype=torch.bool).triu(1)


def float_mask(hidden):
    return torch.zeros(hidden.shape, dtype=D).masked_fill(hidden, -torch.inf)


def attn_mask_of(kind, n_q, n_k, n_b):
    if kind is None:
        return None
    if "causal" in kind:
        return float_mask(causal(n_q, n_k)) if "float" in kind else causal(n_q, n_k)
    shape = (n_b * H, n_q, n_k) if "3-D" in kind else (n_q, n_k)
    if "float" in kind:
        return torch.randn(shape, dtype=D)
    hidden = torch.rand(shape) > 0.5
    hidden[..., 0] = False
    return hidden


def padding_of(kind, n_k, n_b):
    if kind is None:
        return None
    if kind == "float":
        return torch.randn(n_b, n_k, dtype=D)
    hidden = torch.rand(n_b, n_k) > 0.6
    hidden[:, 0] = False
    return float_mask(hidden) if kind == "-inf" else hidden


def sample(row):
    """(constructor arguments, inputs, call arguments) of a row of the grid, or None where they exclude each other."""
    kdim, vdim = row["kv_dims"]
    same = row["inputs"] in ("self", "key is value")
    if same and (kdim, vdim) != (None, None):
        kdim = vdim = 5 if row["inputs"] == "key is value" else None
    hint = row["is_causal"] and row["attn_mask"] is not None and "causal" in row["attn_mask"]
    n_q = S if row["inputs"] == "self" else L
    batch = row["inputs"] != "unbatched"

    def tensor(n, features):
        shape = (n, features) if not batch else (N, n, features) if row["batch_first"] else (n, N, features)
        return torch.randn(shape, dtype=D, requires_grad=True)

    query = tensor(n_q, E)
    if row["inputs"] == "self":
        inputs = (query, query, query)
    elif row["inputs"] == "key is value":
        key = tensor(S, kdim or E)
        inputs = (query, key, key)
    else:
        inputs = (query, tensor(S, kdim or E), tensor(S, vdim or E))
    n_b = N if batch else 1
    padding = padding_of(row["key_padding_mask"], S, n_b)
    made = {name: row[name] for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    call = dict(
        attn_mask=attn_mask_of(row["attn_mask"], n_q, S, n_b),
        key_padding_mask=padding if batch or padding is None else padding[0],
        need_weights=row["weights"] is not None,
        average_attn_weights=row["weights"] == "averaged",
        is_causal=hint,
    )
    return dict(embed_dim=E, num_heads=H, kdim=kdim, vdim=vdim, dtype=D, **made), inputs, call


def run(module, inputs, call):
    """Output, weights and the gradients of everything, the weights' own gradient included."""
    out, weights = module(*inputs, **call)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=D).view(out.shape)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(-2, 1, weights.numel(), dtype=D).view(weights.shape)).sum()
    wrt = [*dict.fromkeys(inputs), *module.parameters()]
    return [out, weights, *torch.autograd.grad(loss, wrt)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(x).replace(" ", "_") for x in row.values()))
def test_equals_torch(row):
    made, inputs, call = sample(row)
    theirs, ours = pair(**made)
    for ours_x, theirs_x in zip(run(ours, inputs, call), run(theirs, inputs, call), strict=True):
        if theirs_x is None:
            assert ours_x is None
            continue
        assert ours_x.shape == theirs_x.shape
        assert ours_x.dtype == theirs_x.dtype
        assert_close(ours_x, theirs_x, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("row", pairwise(CONSTRUCTION), ids=lambda row: "-".join(map(str, row.values())))
def test_parameters_and_state(row):
    kdim, vdim = row.pop("kv_dims")
    theirs, ours = pair(embed_dim=E, num_heads=H, kdim=kdim, vdim=vdim, **row)
    assert isinstance(ours, nn.MultiheadAttention)
    states = theirs.state_dict(), ours.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]
    for x in theirs.parameters():
        nn.init.normal_(x)
    ours.load_state_dict(theirs.state_dict())
    for x in ours.parameters():
        x.data.add_(1.0)
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    names = ("embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "num_heads", "dropout", "batch_first", "head_dim",
             "add_zero_attn")  # fmt: skip
    assert [getattr(theirs, name) for name in names] == [getattr(ours, name) for name in names]


def test_copies_and_pickles():
    ours = fa.nn.MultiheadAttention(E, H, add_bias_kv=True)
    x = torch.randn(L, N, E)
    expected = ours(x, x, x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert type(other) is fa.nn.MultiheadAttention
        assert all(torch.equal(a, b) for a, b in zip(other(x, x, x), expected, strict=True))
    state = ours.__getstate__().copy()
    del state["_qkv_same_embed_dim"]  # as checkpoints from before kdim
    old = fa.nn.MultiheadAttention.__new__(fa.nn.MultiheadAttention)
    old.__setstate__(state)
    assert old._qkv_same_embed_dim is True
    assert torch.equal(old(x, x, x)[0], expected[0])


def test_three_dimensional_mask_is_one_mask_an_entry():
    ours = fa.nn.MultiheadAttention(8, 4, dtype=D)
    query, key = torch.randn(2, 6, 8, dtype=D), torch.randn(3, 6, 8, dtype=D)
    mask = torch.randn(6, 2, 3, dtype=D)
    whole = ours(query, key, key, attn_mask=mask.repeat_interleave(4, 0))[0]
    for i in range(6):
        one = ours(query[:, i : i + 1], key[:, i : i + 1], key[:, i : i + 1], attn_mask=mask[i])[0]
        assert_close(whole[:, i : i + 1], one)


# What torch gets wrong, or does not do


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("where", ["key_padding_mask", "attn_mask"])
def test_rows_without_keys_are_zero(where, kind, need_weights):
    ours = fa.nn.MultiheadAttention(E, H, bias=False, batch_first=True, dtype=D)
    x = torch.randn(N, S, E, dtype=D, requires_grad=True)
    hidden = torch.zeros(N, S, dtype=torch.bool) if where == "key_padding_mask" else torch.zeros(S, S, dtype=torch.bool)
    hidden[1] = True
    mask = float_mask(hidden) if kind == "float" else hidden
    out, weights = ours(x, x, x, **{where: mask}, need_weights=need_weights, average_attn_weights=False)
    empty = (1,) if where == "key_padding_mask" else (slice(None), 1)
    assert not out[empty].any()
    loss = out.square().sum()
    if need_weights:
        assert not (weights[1] if where == "key_padding_mask" else weights[:, :, 1]).any()
        loss = loss + weights.square().sum()
    grads = torch.autograd.grad(loss, [x, *ours.parameters()], create_graph=True)
    assert all(g.isfinite().all() for g in grads)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.square().sum() for g in grads), x))


def test_weights_never_change_the_output():
    ours = fa.nn.MultiheadAttention(E, H, dropout=0.4)
    x = torch.randn(S, N, E)
    outs = []
    for need_weights in (False, True):
        torch.manual_seed(3)
        outs.append(ours(x, x, x, need_weights=need_weights)[0])
    assert torch.equal(*outs)


@pytest.mark.parametrize("add_zero_attn", [False, True])
def test_dropout(add_zero_attn):
    """The weights that are shown are those that are used; on average dropout changes nothing."""
    ours = fa.nn.MultiheadAttention(E, H, dropout=0.4, bias=False, add_zero_attn=add_zero_attn, dtype=D)
    x = torch.randn(S, N, E, dtype=D)
    out, weights = ours(x, x, x, average_attn_weights=False)
    weights = weights[..., :S]
    assert (weights == 0).any()
    v = F.linear(x, ours.in_proj_weight[2 * E :]).view(S, N, H, E // H).permute(1, 2, 0, 3)
    mixed = (weights @ v).permute(2, 0, 1, 3).reshape(S, N, E)
    assert_close(out, F.linear(mixed, ours.out_proj.weight))
    total = sum(ours(x, x, x, average_attn_weights=False)[1] for _ in range(400)) / 400
    ours.eval()
    assert_close(total, ours(x, x, x, average_attn_weights=False)[1], rtol=0, atol=0.1)


def test_dropout_of_everything():
    theirs, ours = pair(embed_dim=E, num_heads=H, dropout=1.0)
    x = torch.randn(S, N, E)
    for a, b in zip(theirs(x, x, x), ours(x, x, x), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("need_weights", [False, True])
def test_derivatives(need_weights):
    ours = fa.nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True, dtype=D)
    inputs = [torch.randn(n, 1, 4, dtype=D, requires_grad=True) for n in (2, 3, 3)]
    mask = torch.randn(2, 3, dtype=D, requires_grad=True)

    def fn(query, key, value, mask):
        out = ours(query, key, value, attn_mask=mask, need_weights=need_weights)
        return out if need_weights else out[0]

    assert gradcheck(fn, (*inputs, mask), check_forward_ad=True)
    assert gradgradcheck(fn, (*inputs, mask))


def test_wrong_hint_does_not_hide():
    """is_causal says what attn_mask holds; where it does not, the mask decides."""
    ours = fa.nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, S, E)
    window = causal(S, S) | causal(S, S).T.roll(-1, 0)
    for need_weights in (False, True):
        plain = ours(x, x, x, attn_mask=window, need_weights=need_weights)[0]
        assert torch.equal(ours(x, x, x, attn_mask=window, need_weights=need_weights, is_causal=True)[0], plain)


# Inside of other things


@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_torchs_layers(norm_first):
    kwargs = dict(d_model=E, nhead=H, dim_feedforward=16, dropout=0.0, norm_first=norm_first, batch_first=True, dtype=D)
    x, memory = torch.randn(N, S, E, dtype=D), torch.randn(N, L, E, dtype=D)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 4:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=D)
    encoder, decoder = nn.TransformerEncoderLayer(**kwargs), nn.TransformerDecoderLayer(**kwargs)
    expected = [
        encoder(x, src_mask=mask, is_causal=True),
        encoder(x, src_key_padding_mask=padding)[:, :4],
        decoder(x, memory, tgt_mask=mask, tgt_is_causal=True, tgt_key_padding_mask=float_mask(padding)),
    ]
    for layer in (encoder, decoder):
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                ours = fa.nn.MultiheadAttention(E, H, batch_first=True, dtype=D)
                ours.load_state_dict(getattr(layer, name).state_dict())
                setattr(layer, name, ours)
    got = [
        encoder(x, src_mask=mask, is_causal=True),
        encoder(x, src_key_padding_mask=padding)[:, :4],
        decoder(x, memory, tgt_mask=mask, tgt_is_causal=True, tgt_key_padding_mask=float_mask(padding)),
    ]
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("heads", [2, 3])
def test_inside_torchs_encoder_in_eval(heads):
    """torch's own path for eval may bypass the module; either way the numbers are the same, and nothing is missing."""
    layer = nn.TransformerEncoderLayer(E, heads, 16, batch_first=True, dtype=D)
    layer.self_attn = fa.nn.MultiheadAttention(E, heads, batch_first=True, dtype=D)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=heads == 2).eval()
    x = torch.randn(N, S, E, dtype=D)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 4:] = True
    expected = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=padding)
        layer.eval()
        layer.register_forward_pre_hook(lambda *_: None)  # torch's way off its fast path
        slow = layer(x, src_key_padding_mask=padding)
        assert_close(slow[~padding], nn.Module.__call__(layer, x, src_key_padding_mask=padding)[~padding])
    assert_close(got[~padding], expected[~padding])


def test_torchs_encoder_hands_nested_tensors_on():
    """Off its fast path by hooks, torch's encoder still unpads its input."""
    layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, dtype=D)
    layer.self_attn = fa.nn.MultiheadAttention(E, 2, batch_first=True, dtype=D)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(N, S, E, dtype=D)
    padding = torch.arange(S) >= torch.tensor([[S], [4]])
    expected, nested = encoder(x, src_key_padding_mask=padding), []
    for module in encoder.layers:
        module.self_attn.register_forward_pre_hook(lambda _, inputs: nested.append(inputs[0].is_nested))
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=padding)
    assert nested == [True, True]
    assert_close(got[~padding], expected[~padding])


def test_two_masks_in_eval_without_gradients():
    ours = fa.nn.MultiheadAttention(14, 7, batch_first=True).eval()
    x = torch.rand(8, 5, 14)
    mask, padding = torch.rand(5, 5) > 0.5, torch.rand(8, 5) > 0.5
    with torch.no_grad():
        fast = ours(x, x, x, attn_mask=mask, key_padding_mask=padding)[0]
    assert_close(fast, ours(x, x, x, attn_mask=mask, key_padding_mask=padding)[0])
    hidden = mask | padding[:, None]
    dense = ours(x, x, x, attn_mask=hidden.repeat_interleave(7, 0))[0]
    assert_close(fast, dense)
    merged, kind = ours.merge_masks(mask, padding, x)
    assert kind == 2
    assert torch.equal(merged.bool(), hidden[:, None].expand(-1, 7, -1, -1))
    assert ours.merge_masks(None, padding, x)[1] == 1
    assert ours.merge_masks(None, None, x) == (None, None)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrized_weights_are_read_on_each_call():
    from torch.nn.utils import parametrize

    ours = fa.nn.MultiheadAttention(E, H)
    x = torch.randn(S, N, E)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.in_proj_weight.mul_(2)
        twin.out_proj.weight.mul_(2)
    ours(x, x, x)
    parametrize.register_parametrization(ours, "in_proj_weight", Doubled())
    parametrize.register_parametrization(ours.out_proj, "weight", Doubled())
    for a, b in zip(ours(x, x, x), twin(x, x, x), strict=True):
        assert_close(a, b)
    with torch.no_grad():
        ours.parametrizations.in_proj_weight.original.zero_()
        ours.in_proj_bias.zero_()
    assert not ours(x, x, x)[0].sub(ours.out_proj.bias).any()


def test_functional_call_and_vmap():
    from torch.func import functional_call, grad, stack_module_state, vmap

    modules = [fa.nn.MultiheadAttention(E, H, dtype=D) for _ in range(3)]
    params, buffers = stack_module_state(modules)
    x = torch.randn(3, S, N, E, dtype=D)
    base = copy.deepcopy(modules[0]).to("meta")
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 3:] = True

    def loss(p, b, x):
        return functional_call(base, (p, b), (x, x, x), dict(key_padding_mask=padding))[0].square().sum()

    grads = vmap(grad(loss))(params, buffers, x)
    for i, module in enumerate(modules):
        wanted = torch.autograd.grad(module(x[i], x[i], x[i], key_padding_mask=padding)[0].square().sum(), module.parameters())
        for (name, _), g in zip(module.named_parameters(), wanted, strict=True):
            assert_close(grads[name][i], g)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_half_precision(dtype, need_weights):
    theirs, ours = pair(embed_dim=64, num_heads=4, batch_first=True)
    exact = copy.deepcopy(theirs).to(dtype).double()
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    x = torch.randn(N, 33, 64).to(dtype)
    mask = causal(33, 33)
    results = [m(y, y, y, attn_mask=mask, need_weights=need_weights) for m, y in ((ours, x), (theirs, x), (exact, x.double()))]
    for a, b, c in zip(*results, strict=True):
        if a is not None:
            assert a.dtype == dtype
            assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-6


def test_autocast():
    ours = fa.nn.MultiheadAttention(64, 4)
    x = torch.randn(33, N, 64)
    exact = ours(x, x, x, attn_mask=causal(33, 33))
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(x, x, x, attn_mask=causal(33, 33))
        theirs = nn.MultiheadAttention(64, 4)(x, x, x, attn_mask=causal(33, 33))
    assert (out.dtype, weights.dtype) == tuple(y.dtype for y in theirs) == (torch.bfloat16, torch.bfloat16)
    assert_close(out.float(), exact[0], rtol=0.05, atol=0.02)
    assert_close(weights.float(), exact[1], rtol=0.05, atol=0.02)


def test_dtypes_of_biases_may_differ():
    ours = fa.nn.MultiheadAttention(4, 4, batch_first=True, dtype=D)
    ours.in_proj_bias = nn.Parameter(ours.in_proj_bias.half())
    assert ours(*[torch.randn(4, 4, 4, dtype=D)] * 3)[0].dtype == D


def test_sizes_of_zero():
    theirs, ours = pair(embed_dim=E, num_heads=H)
    for n_q, n_k, n_b in ((0, 3, 2), (3, 0, 2), (3, 3, 0)):
        query, key = torch.randn(n_q, n_b, E), torch.randn(n_k, n_b, E)
        for need_weights in (True, False):
            for a, b in zip(*(m(query, key, key, need_weights=need_weights) for m in (ours, theirs)), strict=True):
                assert (a is None and b is None) or (a.shape == b.shape and not a.isnan().any())


def test_projections_are_not_copied():
    """One product for all three, which attention reads in place; one for the output."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    ours = fa.nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(2, 600, 64)
    with Watch(), torch.no_grad():
        ours(x, x, x, need_weights=False)
    assert calls.count("addmm") == 2
    assert not {"clone", "copy_", "contiguous", "_to_copy", "cat"} & set(calls)


# Nested tensors


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize(
    "made",
    [{}, dict(add_zero_attn=True), dict(add_bias_kv=True), dict(add_bias_kv=True, add_zero_attn=True), dict(kdim=5, vdim=7)],
    ids=lambda made: "-".join(made) or "plain",
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_nested(layout, made, is_causal, cross):
    ours = fa.nn.MultiheadAttention(E, H, dtype=D, batch_first=True, **made)
    lengths_q, lengths_k = (3, 0, 6, 1), (5, 2, 4, 7)
    kdim, vdim = made.get("kdim", E), made.get("vdim", E)
    cross = cross or kdim != E
    query = [torch.randn(n, E, dtype=D, requires_grad=True) for n in lengths_q]
    key = [torch.randn(n, kdim, dtype=D, requires_grad=True) for n in lengths_k] if cross else query
    value = [torch.randn(n, vdim, dtype=D, requires_grad=True) for n in lengths_k] if cross else query
    q = torch.nested.as_nested_tensor(query, layout=layout)
    k = torch.nested.as_nested_tensor(key, layout=layout) if cross else q
    v = torch.nested.as_nested_tensor(value, layout=layout) if cross else q
    out, weights = ours(q, k, v, is_causal=is_causal, average_attn_weights=False)
    assert out.is_nested
    assert out.layout == layout
    parts = out.unbind()
    longest = max(lengths_k if cross else lengths_q)
    assert weights.shape[:3] == (4, H, 6)
    loss, wanted_loss = 0.0, 0.0
    for i, (a, b, c) in enumerate(zip(query, key, value, strict=True)):
        mask = causal(len(a), len(b)) if is_causal else None
        wanted, wanted_weights = ours(a, b, c, attn_mask=mask, average_attn_weights=False)
        assert_close(parts[i], wanted)
        shown = weights[i, :, : len(a)]
        n_added = weights.shape[3] - longest
        assert n_added == len([x for x in made if x.startswith("add")])
        if "add_bias_kv" in made:  # the added key follows the sequence, that of zeros is last
            shown = torch.cat((shown[..., : len(b) + 1], shown[..., weights.shape[3] - n_added + 1 :]), -1)
        else:
            shown = torch.cat((shown[..., : len(b)], shown[..., longest:]), -1)
        assert_close(shown, wanted_weights)
        assert not weights[i, :, len(a) :].any()
        loss, wanted_loss = loss + parts[i].square().sum(), wanted_loss + wanted.square().sum()
    wrt = [*query, *(key if cross else ()), *ours.parameters()]
    for a, b in zip(torch.autograd.grad(loss, wrt), torch.autograd.grad(wanted_loss, wrt), strict=True):
        assert_close(a, b)


def test_nested_weights_are_those_used_under_dropout():
    ours = fa.nn.MultiheadAttention(E, H, dropout=0.4, bias=False, dtype=D, batch_first=True)
    parts = [torch.randn(n, E, dtype=D) for n in (3, 6)]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    out, weights = ours(x, x, x, average_attn_weights=False)
    for i, part in enumerate(parts):
        v = F.linear(part, ours.in_proj_weight[2 * E :]).view(-1, H, E // H).transpose(0, 1)
        mixed = (weights[i, :, : len(part), : len(part)] @ v).transpose(0, 1).flatten(1)
        assert_close(out.unbind()[i], F.linear(mixed, ours.out_proj.weight))


def test_nested_keeps_its_structure():
    ours = fa.nn.MultiheadAttention(E, H, batch_first=True)
    for layout in (torch.jagged, torch.strided):
        x = torch.nested.as_nested_tensor([torch.randn(n, E) for n in (3, 5)], layout=layout)
        for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            with context:
                y = x + ours(x, x, x)[0]
                assert y.is_nested


def test_devices_without_storage():
    ours = fa.nn.MultiheadAttention(E, H, batch_first=True, device="meta")
    x, padding = torch.randn(N, S, E, device="meta"), torch.zeros(N, S, dtype=torch.bool, device="meta")
    out, weights = ours(x, x, x, key_padding_mask=padding)
    assert out.shape == x.shape
    assert weights.shape == (N, S, S)


# Compilers


@pytest.mark.compile
@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_whole(need_weights):
    torch._dynamo.reset()
    ours = fa.nn.MultiheadAttention(E, H, batch_first=True, add_zero_attn=True, dtype=D)
    x = torch.randn(N, S, E, dtype=D, requires_grad=True)
    mask, padding = causal(S, S), torch.rand(N, S) > 0.7

    def fn(x, mask, padding):
        return ours(x, x, x, attn_mask=mask, key_padding_mask=padding, is_causal=True, need_weights=need_weights)

    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    got, expected = compiled(x, mask, padding), fn(x, mask, padding)
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            assert_close(a, b)
    wrt = [x, *ours.parameters()]
    grads = [torch.autograd.grad(out[0].square().sum(), wrt) for out in (got, expected)]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


@pytest.mark.compile
def test_nested_compiles_whole():
    torch._dynamo.reset()
    ours = fa.nn.MultiheadAttention(E, H, batch_first=True, add_bias_kv=True)
    compiled = torch.compile(lambda x: ours(x, x, x, need_weights=False)[0], backend="aot_eager", fullgraph=True)
    for lengths in ((3, 5), (4, 4, 2)):
        x = torch.nested.nested_tensor([torch.randn(n, E) for n in lengths], layout=torch.jagged)
        assert_close(compiled(x).values(), ours(x, x, x)[0].values())


@pytest.mark.compile
def test_exports():
    ours = fa.nn.MultiheadAttention(E, H, batch_first=True).eval()
    x, padding = torch.randn(N, S, E), torch.zeros(N, S, dtype=torch.bool)
    program = torch.export.export(ours, (x, x, x), dict(key_padding_mask=padding))
    padding[1, 2:] = True
    for a, b in zip(program.module()(x, x, x, key_padding_mask=padding), ours(x, x, x, padding), strict=True):
        assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*(jit.trace|is_fx_tracing|TracerWarning).*")
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_trace_is_refused(need_weights):
    ours = fa.nn.MultiheadAttention(E, H)
    x = torch.randn(S, N, E)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace cannot record .*; torch\.export\.export"):
        torch.jit.trace(lambda x: ours(x, x, x, need_weights=need_weights)[0], (x,))


@pytest.mark.compile
def test_torchs_encoder_compiles_with_padding():
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, dtype=D)
    layer.self_attn = fa.nn.MultiheadAttention(E, 2, batch_first=True, dtype=D)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(1, 9, E, dtype=D)
    padding = torch.rand(1, 9) > 0.5
    padding[:, 0] = False
    got = torch.compile(encoder, backend="aot_eager", fullgraph=True)(x, src_key_padding_mask=padding)
    assert_close(got[~padding], encoder(x, src_key_padding_mask=padding)[~padding])


# What does not fit


def wrong_calls():
    x, y = torch.randn(4, 4, 4), torch.randn(4, 4)
    hidden = torch.zeros(4, dtype=torch.bool)
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged)
    wide = torch.nested.nested_tensor([torch.randn(3, 5), torch.randn(2, 5)], layout=torch.jagged)
    strided = torch.nested.nested_tensor([torch.randn(3, 5), torch.randn(2, 5)])
    return {
        "key 2-D": ((x, y, x), {}, "expected `key` and `value` to be 3-D but found 2-D and 3-D tensors"),
        "value 2-D": ((x, x, y), {}, "expected `key` and `value` to be 3-D but found 3-D and 2-D tensors"),
        "key 3-D": ((y, x, y), {}, "expected `key` and `value` to be 2-D but found 3-D and 2-D tensors"),
        "query 1-D": ((y[0], y[0], y[0]), {}, "query should be unbatched 2D or batched 3D tensor but received 1-D"),
        "padding 1-D": ((x, x, x), dict(key_padding_mask=hidden), "`key_padding_mask` to be `None` or 2-D but found 1-D"),
        "padding 2-D": ((y, y, y), dict(key_padding_mask=hidden[None]), "`key_padding_mask` to be `None` or 1-D but found 2-D"),
        "padding shape": (
            (x, x, x), dict(key_padding_mask=hidden[None]), r"key_padding_mask must have shape \(4, 4\), got \(1, 4\)",
        ),
        "padding dtype": ((x, x, x), dict(key_padding_mask=hidden.int()[None].expand(4, 4)), "key_padding_mask must be a bool"),
        "mask 1-D": ((x, x, x), dict(attn_mask=hidden), "`attn_mask` to be `None`, 2-D or 3-D but found 1-D tensor"),
        "mask shape": ((x, x, x), dict(attn_mask=y[:3]), r"`attn_mask` shape to be \(16, 4, 4\) or \(4, 4\) but got \(3, 4\)"),
        "mask 3-D": ((y, y, y), dict(attn_mask=torch.randn(5, 4, 4)), r"`attn_mask` shape to be \(4, 4, 4\) or \(4, 4\)"),
        "mask dtype": ((x, x, x), dict(attn_mask=y.int()), "attn_mask must be a bool or floating point Tensor"),
        "causal alone": ((x, x, x), dict(is_causal=True), "attn_mask must be given where is_causal is True"),
        "features": ((x[..., :3], x, x), {}, r"query must have 4 features, got shape \(4, 4, 3\)"),
        "value features": ((x, x, x[..., :3]), {}, "value must have 4 features"),
        "lengths": ((x, x, x[:3]), {}, "key and value must have one length and batch"),
        "batch": ((x[:, :3], x, x), {}, "query and key must have one batch size"),
        "dtype": ((x, x.double(), x), {}, "key must have the parameters' dtype torch.float32, got torch.float64"),
        "nested and dense": ((nested, x, x), {}, "key must be nested"),
        "dense and nested": ((x, nested, nested), {}, "query must be nested"),
        "nested mask": ((nested, nested, nested), dict(attn_mask=y), "attn_mask must be None for nested tensors"),
        "nested features": ((wide, wide, wide), {}, r"query must be \(N, ragged length, 4 features\)"),
        "ragged features": ((nested.transpose(1, 2),) * 3, {}, r"query must be \(N, ragged length, 4 features\)"),
        "wide strided": ((strided,) * 3, {}, "query must have 4 features, got 5"),
        "empty nested": ((torch.nested.nested_tensor([]),) * 3, {}, "batched 3D tensor but received 1-D query tensor"),
    }  # fmt: skip


WRONG = wrong_calls()


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name):
    inputs, call, message = WRONG[name]
    ours = fa.nn.MultiheadAttention(4, 4)
    for error in (ValueError, AssertionError, RuntimeError):
        with pytest.raises(error, match=message):
            ours(*inputs, **call)


@pytest.mark.parametrize(
    "name", ["key 2-D", "value 2-D", "key 3-D", "query 1-D", "padding 1-D", "padding 2-D", "mask 1-D", "mask 3-D"]
)
def test_torchs_words_stand_in_the_error(name):
    """What code that matches torch's messages of ranks and masks looks for."""
    inputs, call, _ = WRONG[name]
    with pytest.raises(AssertionError) as theirs:
        nn.MultiheadAttention(4, 4)(*inputs, **call)
    with pytest.raises(AssertionError) as ours:
        fa.nn.MultiheadAttention(4, 4)(*inputs, **call)
    words = str(theirs.value).split("expected ")[-1].split(" but got ")[0]
    assert words in str(ours.value)


@pytest.mark.parametrize("i", range(3))
def test_what_is_no_tensor(i):
    inputs = [torch.randn(4, 4, 4)] * 3
    inputs[i] = None
    with pytest.raises(TypeError, match=f"{('query', 'key', 'value')[i]} must be a Tensor, got NoneType"):
        fa.nn.MultiheadAttention(4, 4)(*inputs)


def test_construction_that_does_not_fit():
    with pytest.raises(TypeError, match=r"embed_dim must be an int, got 8\.0"):
        fa.nn.MultiheadAttention(8.0, 2)
    for made, message in (
        (dict(embed_dim=5, num_heads=2), "embed_dim must be divisible by num_heads, got 5 and 2"),
        (dict(embed_dim=0, num_heads=2), "embed_dim must be greater than 0"),
        (dict(embed_dim=4, num_heads=-1), "num_heads must be greater than 0"),
        (dict(embed_dim=4, num_heads=2, kdim=0), "kdim must be greater than 0"),
        (dict(embed_dim=4, num_heads=2, dropout=1.5), "dropout must be a probability, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            fa.nn.MultiheadAttention(**made)

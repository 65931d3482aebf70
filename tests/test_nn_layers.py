"""Encoder and decoder layers against torch's with the same weights, and their caches, padding and stacks."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fastattn as fa
from fastattn import nn

D = torch.float64
N, L, M, E, H = 2, 9, 6, 12, 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def take(ours, theirs):
    """Give our layer the parameters of torch's."""
    pairs = [(ours.self_attention.qkv, theirs.self_attn), (ours.self_attention.out, theirs.self_attn.out_proj),
             (ours.feed_forward.up, theirs.linear1), (ours.feed_forward.down, theirs.linear2),
             (ours.attention_norm, theirs.norm1)]  # fmt: skip
    if hasattr(theirs, "multihead_attn"):
        cross = theirs.multihead_attn
        with torch.no_grad():
            ours.cross_attention.q.weight.copy_(cross.in_proj_weight[:E])
            ours.cross_attention.kv.weight.copy_(cross.in_proj_weight[E:])
            ours.cross_attention.q.bias.copy_(cross.in_proj_bias[:E])
            ours.cross_attention.kv.bias.copy_(cross.in_proj_bias[E:])
        pairs += [(ours.cross_attention.out, cross.out_proj), (ours.cross_norm, theirs.norm2),
                  (ours.feed_forward_norm, theirs.norm3)]  # fmt: skip
    else:
        pairs += [(ours.feed_forward_norm, theirs.norm2)]
    with torch.no_grad():
        for mine, other in pairs:
            mine.weight.copy_(other.weight if hasattr(other, "weight") else other.in_proj_weight)
            mine.bias.copy_(other.bias if hasattr(other, "bias") else other.in_proj_bias)


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def scrambled(layer):
    for x in layer.parameters():
        torch.nn.init.normal_(x, std=0.4)
    return layer


def gradients(out, *wrt):
    return torch.autograd.grad(out.square().sum(), wrt)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["plain", "causal", "padded", "causal and padded"])
def test_encoder_layer(norm_first, activation, kind):
    theirs = scrambled(torch.nn.TransformerEncoderLayer(E, H, 16, 0.0, activation, 1e-5, True, norm_first, dtype=D))
    ours = nn.EncoderLayer(E, H, 16, activation=activation, norm_first=norm_first, dtype=D)
    take(ours, theirs)
    x = torch.randn(N, L, E, dtype=D, requires_grad=True)
    keep = torch.arange(L) < torch.tensor([[L], [4]])
    padded, is_causal = "padded" in kind, "causal" in kind
    out = ours(x, keep=keep if padded else None, is_causal=is_causal)
    expected = theirs(x, causal(L) if is_causal else None, ~keep if padded else None, is_causal)
    real = keep if padded else torch.ones(N, L, dtype=torch.bool)
    assert_close(out[real], expected[real])
    for a, b in zip(*(gradients(o[real], x) for o in (out, expected)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_decoder_layer(norm_first, padded):
    theirs = scrambled(torch.nn.TransformerDecoderLayer(E, H, 16, 0.0, "gelu", 1e-5, True, norm_first, dtype=D))
    ours = nn.DecoderLayer(E, H, 16, memory_dim=E, norm_first=norm_first, dtype=D)
    take(ours, theirs)
    x = torch.randn(N, L, E, dtype=D, requires_grad=True)
    memory = torch.randn(N, M, E, dtype=D, requires_grad=True)
    keep, memory_keep = torch.arange(L) < torch.tensor([[L], [4]]), torch.arange(M) < torch.tensor([[2], [M]])
    if not padded:
        keep[:], memory_keep[:] = True, True
    out = ours(x, memory, keep=keep if padded else None, memory_keep=memory_keep if padded else None)
    expected = theirs(x, memory, causal(L), None, ~keep, ~memory_keep, tgt_is_causal=True)
    assert_close(out[keep], expected[keep])
    for a, b in zip(*(gradients(o[keep], x, memory) for o in (out, expected)), strict=True):
        assert_close(a, b)


def make_decoder(**kwargs):
    options = dict(n_kv_heads=1, rotary=nn.Rotary(E // H), qk_norm=True, norm="rms", activation="swiglu", bias=False)
    return nn.Decoder(2, E, H, **{**options, **kwargs}, dtype=D)


@pytest.mark.parametrize("memory_dim", [None, 5])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_decoding_equals_the_whole(memory_dim, norm_first, static):
    decoder = make_decoder(memory_dim=memory_dim, norm_first=norm_first, window=4)
    x = torch.randn(N, L, E, dtype=D)
    memory = None if memory_dim is None else torch.randn(N, M, memory_dim, dtype=D)
    memory_keep = None if memory is None else torch.arange(M) < torch.tensor([[2], [M]])
    with torch.no_grad():
        expected = decoder(x, memory, memory_keep=memory_keep)
        cache = decoder.new_cache(lambda: nn.StaticCache(N, 1, L, E // H, dtype=D)) if static else decoder.new_cache()
        parts = x.split([3, 1, 1, 4], 1)
        got = [decoder(parts[0], memory, memory_keep=memory_keep, cache=cache)]
        got += [decoder(part, memory_keep=memory_keep, cache=cache) for part in parts[1:]]
    assert_close(torch.cat(got, 1), expected)


def test_decoding_with_left_padding():
    """keep covers all keys; positions say where each row stands in its own sequence."""
    decoder = make_decoder()
    pad = torch.tensor([4, 0])
    keep, positions = torch.arange(L) >= pad[:, None], (torch.arange(L) - pad[:, None]).clamp(min=0)
    x = torch.randn(N, L, E, dtype=D)
    with torch.no_grad():
        cache, got, done = decoder.new_cache(), [], 0
        for part in x.split([6, 1, 2], 1):
            end = done + part.shape[1]
            got.append(decoder(part, keep=keep[:, :end], positions=positions[:, done:end], cache=cache))
            done = end
        alone = decoder(x[:1, 4:])
    assert_close(torch.cat(got, 1)[0, 4:], alone[0])


def test_encoder_stack():
    encoder = nn.Encoder(3, E, H, 16, window=3, dtype=D)
    assert not torch.equal(encoder.layers[0].self_attention.qkv.weight, encoder.layers[1].self_attention.qkv.weight)
    x = torch.randn(N, L, E, dtype=D)
    keep = torch.arange(L) < torch.tensor([[L], [4]])
    mask = torch.rand(N, H, L, L) > 0.3
    mask[..., 0] = True
    bias = nn.T5Buckets(H, 8, 6, dtype=D)
    y = x
    for layer in encoder.layers:
        y = layer(y, mask=mask & keep[:, None, None], score=bias())
    got = encoder(x, mask=mask, keep=keep, score=bias())
    assert_close(got, F.layer_norm(y, (E,)))
    assert_close(encoder(x, mask=fa.Dense(mask).lower(L, L), keep=keep, score=bias()), got)
    assert_close(encoder(x, mask=fa.Dense(mask), keep=keep, score=bias()), got)
    short = encoder(x[1:, :4])
    assert_close(encoder(x, keep=keep)[1, :4], short[0])
    assert isinstance(nn.Encoder(1, E, H, norm_first=False).norm, torch.nn.Identity)


def test_causal_mask_once_for_all_layers():
    encoder = nn.Encoder(2, E, H, dtype=D)
    x = torch.randn(N, L, E, dtype=D)
    assert_close(encoder(x, mask=fa.Causal()), encoder(x, is_causal=True))
    assert_close(encoder(x, is_causal=True)[:, :5], encoder(x[:, :5], is_causal=True))


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "silu", torch.tanh])
def test_feed_forward(activation):
    ff = nn.FeedForward(6, 10, activation, dtype=D)
    x = torch.randn(3, 6, dtype=D)
    up = F.linear(x, ff.up.weight, ff.up.bias)
    if isinstance(activation, str) and activation.endswith("glu"):
        gate = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}[activation]
        up = gate(up[:, :10]) * up[:, 10:]
    else:
        up = F.silu(up) if activation == "silu" else torch.tanh(up)
    assert_close(ff(x), F.linear(up, ff.down.weight, ff.down.bias))


def test_dropout_of_every_kind_stops_in_eval():
    layer = nn.DecoderLayer(E, H, memory_dim=E, dropout=0.3)
    x = torch.randn(N, L, E)
    assert not torch.equal(layer(x, x), layer(x, x))
    assert layer.self_attention.dropout == layer.cross_attention.dropout == layer.feed_forward.dropout.p == 0.3
    layer.eval()
    assert torch.equal(layer(x, x), layer(x, x))


def test_training_steps_and_copies():
    decoder = make_decoder(memory_dim=5)
    twin = copy.deepcopy(decoder)
    twin.load_state_dict(decoder.state_dict())
    x, memory = torch.randn(N, L, E, dtype=D), torch.randn(N, M, 5, dtype=D)
    optimizer = torch.optim.SGD(decoder.parameters(), 0.05)
    losses = []
    for _ in range(8):
        loss = (decoder(x, memory) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in decoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (twin(x, memory) - x).square().mean().item() == losses[0]


def test_second_derivatives():
    layer = nn.DecoderLayer(4, 2, 4, memory_dim=4, activation="swiglu", norm="rms", dtype=D)
    x, memory = (torch.randn(1, n, 4, dtype=D, requires_grad=True) for n in (2, 3))
    assert torch.autograd.gradgradcheck(layer, (x, memory))


@pytest.mark.compile
def test_compiles_whole():
    torch._dynamo.reset()
    decoder = make_decoder(memory_dim=5)
    x, memory = torch.randn(N, L, E, dtype=D, requires_grad=True), torch.randn(N, M, 5, dtype=D)
    keep = torch.arange(M) < torch.tensor([[2], [M]])
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    got, expected = compiled(x, memory, memory_keep=keep), decoder(x, memory, memory_keep=keep)
    assert_close(got, expected)
    for a, b in zip(gradients(got, x), gradients(expected, x), strict=True):
        assert_close(a, b)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler on the CPU")
def test_inductor():
    """torch.compile as users call it: one graph, with generated C++ around the attention, forward and backward."""
    torch._dynamo.reset()
    model = nn.Attention(16, 4, n_kv_heads=2, causal=True, rotary=nn.Rotary(4))
    x = torch.randn(N, L, 16, requires_grad=True)
    got, expected = torch.compile(model, fullgraph=True)(x), model(x)
    assert_close(got, expected)
    wrt = [x, *model.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), wrt) for out in (got, expected)), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def wrong_uses():
    x, seen = torch.randn(2, 5, 8), torch.ones(1, 3, 5, 5, dtype=torch.bool)
    layer, decoder = nn.EncoderLayer(8, 2), nn.Decoder(2, 8, 2)
    return {
        "activation": (lambda: nn.FeedForward(4, activation="tanh"), ValueError, "activation must be a function or one of"),
        "norm": (lambda: nn.EncoderLayer(8, 2, norm="batch"), ValueError, "norm must be one of"),
        "keep dtype": (lambda: layer(x, keep=torch.ones(2, 5)), TypeError, "keep must be a bool Tensor"),
        "keep shape": (lambda: layer(x, keep=seen[0, 0, :2, :4]), ValueError, r"keep must have shape \(2, 5\), got \(2, 4\)"),
        "mask": (lambda: nn.Encoder(1, 8, 2)(x, mask=fa.Full().lower(4, 4)), ValueError, "mask was lowered for 4 rows"),
        "mask's kind": (lambda: nn.Encoder(1, 8, 2)(x, mask="causal"), TypeError, "mask must be a Mask.*, got 'causal'"),
        "mask's dtype": (lambda: nn.Encoder(1, 8, 2)(x, mask=torch.ones(5, 5)), TypeError, "mask must be a bool tensor"),
        "one cache": (lambda: decoder(x, cache=nn.DynamicCache()), TypeError, "cache must be what new_cache"),
        "caches": (lambda: decoder(x, cache=[nn.DynamicCache()] * 2), TypeError, "cache must be a LayerCache or None"),
        "heads": (lambda: layer(x, mask=seen), ValueError, "mask must have 1 or 2 heads, got 3"),
        "memory": (lambda: decoder(x, x), ValueError, "the layer was built without memory_dim"),
        "cache": (lambda: decoder(x, cache=decoder.new_cache()[:1]), ValueError, "cache must hold one LayerCache"),
        "hidden": (lambda: nn.EncoderLayer(8, 2, 0), ValueError, "hidden must be at least 1, got 0"),
        "layers": (lambda: nn.Encoder(-1, 8, 2), ValueError, "n_layers must be at least 1, got -1"),
        "option": (lambda: nn.EncoderLayer(8, 2, windows=3), TypeError, "windows"),
    }  # fmt: skip


def test_a_stack_takes_the_masks_of_attention():
    encoder, x, shown = nn.Encoder(2, 8, 2), torch.randn(2, 5, 8), torch.tensor([True, True, True, False, False])
    assert_close(encoder(x, mask=shown), encoder(x, mask=shown.expand(5, 5)))


WRONG = wrong_uses()


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name):
    use, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        use()

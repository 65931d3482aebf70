"""convert on torch's own modules: what is replaced, what is left and why, and the way back. hosted/models.py has the rest."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import fastattn as fa
from fastattn.integrations import report


class Subclass(nn.MultiheadAttention):
    def forward(self, query, key, value, **kwargs):
        return super().forward(query, key, value, **kwargs)[0]


class Calls(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class OwnSoftmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(16, 16)

    def forward(self, x):
        return (self.to_q(x) @ x.mT).softmax(-1) @ x


class Told(Calls):
    """Calls torch's function unless it is told not to."""

    fused_attn = False


class Router(nn.Module):
    """A softmax that is no attention."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 3)

    def forward(self, x):
        return x * torch.softmax(self.gate(x), -1).amax(-1, keepdim=True)


class Five(nn.Module):
    """Five kinds of attention."""

    def __init__(self):
        super().__init__()
        self.plain = nn.MultiheadAttention(16, 2, batch_first=True)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.sub, self.calls, self.own, self.router = Subclass(16, 2, batch_first=True), Calls(), OwnSoftmax(), Router()

    def forward(self, x):
        x = self.layers(x + self.plain(x, x, x)[0])
        return self.router(self.own(self.calls(self.sub(x, x, x))))


def five():
    torch.manual_seed(0)
    return Five().eval(), torch.randn(2, 7, 16)


def test_five_kinds_are_reported_and_restored():
    model, x = five()
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        found = fa.convert(model)
        assert_close(model(x), before)
        again = fa.convert(model)  # nothing is left to do
        assert [e.why for e in again.taken] == ["it was fastattn's already"] * 3
        again.undo()
        assert isinstance(model.plain, fa.nn.MultiheadAttention)
        found.undo()
        assert torch.equal(model(x), before)
    assert {e.name: e.state for e in found.entries} == {
        "plain": "replaced", "layers.layers.0.self_attn": "replaced", "layers.layers.1.self_attn": "replaced",
        "sub": "left", "calls": "sdpa", "own": "left",
    }  # fmt: skip
    assert str(found).startswith("3 of 6 attention modules run on fastattn")
    assert "forward of its own" in str(found)
    assert "fastattn.install()" in str(found)
    assert list(model.state_dict()) == keys
    assert type(model.plain) is nn.MultiheadAttention
    assert not any(m._forward_pre_hooks for m in model.modules())
    found.undo()


def test_a_module_that_is_told_not_to_call_torchs_function():
    found = fa.convert(nn.Sequential(Told(), Calls()))
    assert [entry.state for entry in found.entries] == ["left", "sdpa"]
    assert "while its fused_attn is False" in found.entries[0].why


def test_the_fused_encoder_layer_is_not_taken():
    """In evaluation torch's layer reads the weights of its attention and computes by itself."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        wanted = layer(x)
        found = fa.convert(layer)
        before = report()
        assert_close(layer(x), wanted)
        assert (report() - before).taken == {"convert MultiheadAttention": 1}
        found.undo()
        assert torch.equal(layer(x), wanted)
        assert not (report() - before).taken.get("convert MultiheadAttention", 0) > 1


def test_an_encoder_that_packs_padded_batches():
    """torch's encoder makes nested tensors of padded batches for the layers that are now replaced."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, hidden = torch.randn(2, 7, 16), torch.zeros(2, 7, dtype=torch.bool)
    hidden[1, 4:] = True
    with torch.no_grad():
        wanted = encoder(x, src_key_padding_mask=hidden)
        found = fa.convert(encoder)
        assert_close(encoder(x, src_key_padding_mask=hidden)[~hidden], wanted[~hidden])
        found.undo()
        assert torch.equal(encoder(x, src_key_padding_mask=hidden), wanted)


def test_training_gives_the_same_gradients():
    model, x = five()
    grads = []
    for converted in (False, True):
        if converted:
            fa.convert(model)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([y.grad.clone() for y in model.parameters() if y.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_copies_and_files():
    model, x = five()
    fa.convert(model)
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    file = io.BytesIO()
    torch.save(model.plain, file)
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=False), fa.nn.MultiheadAttention)


def test_a_model_that_is_one_attention():
    module = nn.MultiheadAttention(16, 2)
    found = fa.convert(module)
    assert [e.name for e in found.entries] == [""]
    assert "(the model)" in str(found)
    assert isinstance(module, fa.nn.MultiheadAttention)


def test_no_attention_at_all():
    found = fa.convert(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1), Router()))
    assert found.entries == []
    assert str(found) == "0 of 0 attention modules run on fastattn"


def test_no_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        fa.convert("bert")


def test_own_hooks_stay():
    module, calls = nn.MultiheadAttention(16, 2), []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    found = fa.convert(module)
    x = torch.randn(5, 16)
    module(x, x, x)
    found.undo()
    module(x, x, x)
    assert len(calls) == 2
    assert len(module._forward_pre_hooks) == 1

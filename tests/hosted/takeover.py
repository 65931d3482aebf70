"""Libraries that call torch's attention on fastattn, by each way in; run by tests/test_hosts.py.

The host's own numbers come from torch's plain operations (SDPBackend.MATH), which no backend of fastattn's calls: nothing
is compared with itself.
"""

import importlib
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import fastattn as fa
from fastattn.bench import host_models, hosts
from fastattn.bench.host_models import Case, Model
from fastattn.integrations import report


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def timm_classes():
    """A ViT with its norms of queries and keys, and a class token."""
    vit = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    torch.manual_seed(0)
    model = vit(img_size=20, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5, qk_norm=True)
    return Case(host_models.noisy(model), {"x": noise(2, 3, 20, 20)})


def timm_pooling():
    """One query, learned, that attends to all patches: cross-attention."""
    vit = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    torch.manual_seed(0)
    sizes = dict(img_size=20, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    model = vit(**sizes, global_pool="map", class_token=False)
    return Case(host_models.noisy(model), {"x": noise(2, 3, 20, 20)})


def open_clip_tower(name, **settings):
    tower = getattr(importlib.import_module("open_clip.transformer"), name)
    torch.manual_seed(0)
    return host_models.noisy(tower(width=24, heads=3, layers=2, output_dim=8, **settings))


def open_clip_text(**settings):
    """Causal, with a mask of floats."""
    model = open_clip_tower("TextTransformer", context_length=13, vocab_size=host_models.WORDS, **settings)
    return Case(model, {"text": host_models.tokens()})


def open_clip_image():
    """Blocks and the attention that pools."""
    sizes = dict(image_size=20, patch_size=4, mlp_ratio=2.0, attentional_pool=True, attn_pooler_queries=7, attn_pooler_heads=2)
    return Case(open_clip_tower("VisionTransformer", **sizes), {"x": noise(2, 3, 20, 20)})


def diffusers_blocks():
    """Self- and cross-attention to a text that is padded."""
    model = importlib.import_module("diffusers").Transformer2DModel
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, in_channels=8, num_layers=2, norm_num_groups=4)
    text = dict(encoder_hidden_states=noise(2, 13, 16), encoder_attention_mask=host_models.keep("right"))
    inputs = dict(hidden_states=noise(2, 8, 5, 7), **text)
    return Case(host_models.noisy(model(**sizes, cross_attention_dim=16)), inputs, lambda found: found.sample)


VISION = ("timm", "torchvision"), ("open_clip", "torchvision")
OTHERS = (
    Model("timm's ViT", "timm", timm_classes, VISION[0]),
    Model("timm's pooling", "timm", timm_pooling, VISION[0]),
    Model("open_clip's image tower", "open_clip", open_clip_image, VISION[1]),
    Model("open_clip's text tower", "open_clip", open_clip_text, VISION[1]),
    Model("open_clip's own blocks", "open_clip", lambda: open_clip_text(block_type="custom", qk_norm=True), VISION[1]),
    Model("Transformer2DModel", "diffusers", diffusers_blocks),
)
MODELS = {m.name: m for m in (*(m for m in host_models.MODELS if m.library in ("diffusers", "x_transformers")), *OTHERS)}
CALLS = {  # attention calls of one pass, and how many of them are nn.MultiheadAttention's
    "decoder, rotary, GQA": (2, 0),
    "UNet2DConditionModel": (8, 0),
    "timm's ViT": (2, 0),
    "timm's pooling": (2, 0),
    "open_clip's image tower": (3, 3),
    "open_clip's text tower": (2, 2),
    "open_clip's own blocks": (2, 0),
    "Transformer2DModel": (4, 0),
}


def built(name):
    """The model in float64; skipped where the library is not here."""
    missing = MODELS[name].missing()
    if missing is not None:
        pytest.skip(missing)
    case = MODELS[name].build()
    case.model.double()
    case.inputs = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in case.inputs.items()}
    return case


@contextmanager
def installed(model):
    fa.install()
    try:
        yield
    finally:
        fa.uninstall()


@contextmanager
def used(model):
    with fa.use():
        yield


@contextmanager
def converted(model):
    found = fa.convert(model)
    try:
        yield
    finally:
        found.undo()


WAYS = {"install": installed, "use": used, "convert": converted}


def same(a, b):
    """Whether outputs and all gradients are the same bits."""
    return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][key], b[1][key]) for key in a[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_the_way_back(name, way):
    case = built(name)
    first = hosts.results(case)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = hosts.results(case)
    with WAYS[way](case.model):
        before = report()
        got = hosts.results(case)
        seen = report() - before
    assert sum(seen.taken.values()) == CALLS[name][way == "convert"]
    assert not seen.left
    assert_close(got[0], wanted[0], rtol=1e-9, atol=1e-11)
    assert got[1].keys() == wanted[1].keys()
    for key in wanted[1]:
        assert_close(got[1][key], wanted[1][key], rtol=1e-8, atol=1e-10)
    before = report()
    assert same(hosts.results(case), first)
    assert not (report() - before).taken


@pytest.mark.parametrize("name", MODELS)
def test_without_gradients(name):
    """Here torch's nn.MultiheadAttention calls no attention function by itself: meanwhile it does."""
    case = built(name)
    with torch.no_grad():
        first = case.run()
        with sdpa_kernel(SDPBackend.MATH):
            wanted = case.run()
        with fa.use() as seen:
            got = case.run()
        assert torch.equal(case.run(), first)
    assert sum(seen.report().taken.values()) == CALLS[name][0]
    assert not seen.report().left
    assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_what_convert_says(name):
    """Modules of nn.MultiheadAttention are replaced; those that call torch's function are named, and left as they are."""
    case = built(name)
    n_calls, n_modules = CALLS[name]
    found = fa.convert(case.model)
    states = [entry.state for entry in found.entries]
    assert states == ["replaced"] * n_modules + ["sdpa"] * (n_calls - n_modules)
    found.undo()


def test_a_softmax_of_timms_own_is_reported():
    """Told not to call torch's function, blocks compute their softmax themselves, which nothing takes over."""
    case = built("timm's ViT")
    blocks = [module for module in case.model.modules() if hasattr(module, "fused_attn")]
    for module in blocks:
        module.fused_attn = False
    found = fa.convert(case.model)
    assert len(found.left) == len(blocks) == 2
    assert all(entry.state == "left" and "fused_attn is False" in entry.why for entry in found.left)
    with fa.use() as seen:
        case.run()
    assert not seen.report().taken

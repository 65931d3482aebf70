"""Models of other libraries on fastattn beside their own attention; run by tests/test_transformers.py, once per version."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.testing import assert_close

import fastattn as fa
from fastattn.bench import host_models, hosts
from fastattn.integrations import report
from fastattn.integrations import transformers as hf
from fastattn.integrations.transformers_masks import all_real, is_all_real, structure

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
hf.register()

MODELS = {model.name: model for model in host_models.MODELS}


def built(name):
    return MODELS[name].build()


@pytest.fixture(scope="module", autouse=True)
def offline():
    transformers.logging.disable_progress_bar()


def attend_with(model, name):
    """Set the implementation of every model inside: setting it on the outer one does not reach all in every version."""
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.config._attn_implementation = name


def both(case, run):
    """run(model) with the host's attention and with ours."""
    found = []
    for name in ("eager", "fastattn"):
        attend_with(case.model, name)
        before = report()
        found.append(run(case.model))
        assert (sum((report() - before).taken.values()) > 0) == (name == "fastattn")
    return found


@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_the_way_back(name):
    missing = MODELS[name].missing()
    if missing is not None:
        pytest.skip(missing)
    row = hosts.compare(MODELS[name])
    assert row.calls > 0
    assert not row.left
    assert row.restored
    assert row.forward < (1.5e-5 if "trained" in name else 5e-6)
    assert row.gradient < 1e-4


def test_each_model_goes_its_way():
    assert hosts.compare(MODELS["BERT"]).routes == {"attention interface": 2}
    assert hosts.compare(MODELS["T5"]).routes == {"attention interface": 6}
    for name in ("XLNet", "MPNet", "DeBERTa-v2"):
        assert hosts.compare(MODELS[name]).routes == {"module replaced": 2}


class Seen:
    """Masks that reach the attention function, instead of what they mean."""

    def __init__(self, monkeypatch):
        self.masks = []

        def spy(given, *arguments):
            self.masks.append(None if given is None else (given.dtype, tuple(given.shape)))
            return structure(given, *arguments)

        monkeypatch.setattr(hf, "structure", spy)


MEMORY = {
    "BERT": (torch.bool, (2, 1, 1, 13)),
    "ModernBERT": (torch.uint8, (2, 13)),
    "GPT-2, padded": (torch.bool, (2, 13)),
    "GPT-2": (torch.bool, (2, 13)),
    "Llama, GQA, padded left": (torch.bool, (2, 13)),
    "Mistral, window": (torch.bool, (2, 13)),
    "ViT": (torch.bool, (2, 1, 1, 17)),
}


@pytest.mark.parametrize("name", MEMORY)
def test_masks_are_not_squares(name, monkeypatch):
    case, seen = built(name), Seen(monkeypatch)
    attend_with(case.model, "fastattn")
    case.run()
    assert MEMORY[name] in seen.masks
    assert not [m for m in seen.masks if m is not None and len(m[1]) == 4 and m[1][2] > 1]


@pytest.mark.parametrize("name", ["BERT", "GPT-2, padded", "Llama, GQA, padded left", "Mistral, window", "ModernBERT"])
@pytest.mark.parametrize("padding", ["right", "left", "holes", "one whole row"])
def test_padding_anywhere(name, padding):
    case = built(name)
    keep = host_models.keep("left" if padding == "left" else "right")
    if padding == "holes":
        keep[1, 2], keep[0, 5:7] = False, False
    if padding == "one whole row":
        keep[1] = False
    case.inputs["attention_mask"], case.keep = keep.long(), keep
    a, b = both(case, lambda model: case.run())
    assert_close(a, b, atol=5e-6, rtol=1e-5)
    assert b.isfinite().all()


def test_no_padding_takes_no_memory_and_no_mask():
    causal, windowed = (all_real(2, 13, "cpu", dtype) for dtype in (torch.bool, torch.uint8))
    wanted = (
        (causal, None, fa.Causal("bottom_right")),
        (causal, 4, fa.SlidingWindow(3, 0, "bottom_right")),
        (windowed, 4, fa.SlidingWindow(3, 3, "bottom_right")),
        (causal[:, None, None], 4, fa.Full()),
    )
    for given, window, mask in wanted:
        assert given.untyped_storage().nbytes() == 1
        assert is_all_real(given)
        for says in (True, False):
            found, bias = structure(given, says, window, 13, 13, None, None)
            assert repr(found) == repr(mask)
            assert bias is None
    assert is_all_real(causal[:, :9])
    assert not is_all_real(torch.zeros((1, 1), dtype=torch.bool).expand(2, 13))  # a caller's own, which hides everything


PATTERNS = {  # a module whose is_causal is missing or says something else than the mask that was asked for
    "full, and nothing said": host_models.hf("SplinterModel", "SplinterConfig", None, **host_models.SMALL),
    "causal, and False said": host_models.hf(
        "PegasusXForConditionalGeneration", "PegasusXConfig", None, 7, **host_models.SEQ2SEQ
    ),
    "a mask that the model takes apart": host_models.hf(
        "NllbMoeModel", "NllbMoeConfig", None, 7, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
        **host_models.SEQ2SEQ,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_the_mask_decides_what_is_causal(name):
    case = PATTERNS[name]()
    a, b = both(case, lambda model: case.run())
    assert_close(a, b, atol=5e-6, rtol=1e-5)


OWN_SOFTMAX = {
    "MegatronBert": host_models.hf("MegatronBertForMaskedLM", "MegatronBertConfig", **host_models.SMALL),
    "MPNet": host_models.hf("MPNetForMaskedLM", "MPNetConfig", **host_models.SMALL),
    "ImageGPT": host_models.hf("ImageGPTModel", "ImageGPTConfig", "left", **host_models.GPT),
    "BLIP's text": host_models.hf("BlipTextModel", "BlipTextConfig", "left", **host_models.SMALL),
    "Falcon": host_models.hf("FalconForCausalLM", "FalconConfig", "left", **host_models.SMALL),
}


@pytest.mark.parametrize("name", OWN_SOFTMAX)
def test_a_softmax_of_the_models_own_gets_eagers_mask(name):
    """Such a model does not ask for its attention, but it does ask for a mask, which it adds to its scores."""
    found = []
    for implementation in ("eager", "fastattn"):
        case = OWN_SOFTMAX[name]()
        attend_with(case.model, implementation)
        found.append(case.run())
    assert torch.equal(*found)


@pytest.mark.parametrize("argument", hf.UNKNOWN)
def test_arguments_that_are_not_known_are_refused(argument):
    """An indexer's choice of keys, say, which the mask holds for eager and sdpa alone."""
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match=f"does not know the argument '{argument}' that Module passes"):
        hf.attention(torch.nn.Module(), x, x, x, None, **{argument: torch.zeros(1, 2, 1)})
    hf.attention(torch.nn.Module(), x, x, x, None, **{argument: None})


PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize("name", ["Llama, GQA, padded left", "Mistral, window", "Gemma 2, softcap"])
def test_packed_sequences_by_positions(name, monkeypatch):
    case, seen = built(name), Seen(monkeypatch)
    case.inputs = dict(input_ids=host_models.tokens(), position_ids=PACKED, use_cache=False)
    case.keep = None
    a, b = both(case, lambda model: case.run())
    assert_close(a, b, atol=5e-6, rtol=1e-5)
    assert set(seen.masks) == {(torch.int32, (2, 13))}
    alone = case.model(input_ids=host_models.tokens()[:1, 5:8], use_cache=False).logits
    assert_close(b[:1, 5:8], alone, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", [True, False])
def test_packed_sequences_by_cumulative_lengths(positions):
    case = built("Mistral, window")
    attend_with(case.model, "fastattn")
    cu = torch.tensor([0, 5, 8, 13], dtype=torch.int32)
    inputs = dict(input_ids=host_models.tokens()[:1], use_cache=False)
    packed = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=5, max_length_k=5)
    if positions:
        packed["position_ids"] = PACKED[:1]
    else:
        inputs["position_ids"] = torch.arange(13)[None]  # positions alone would say one sequence
    out = case.model(**inputs, **packed).logits
    for a, b in ((0, 5), (5, 8), (8, 13)):
        at = torch.arange(b - a)[None] if positions else torch.arange(a, b)[None]
        alone = case.model(input_ids=inputs["input_ids"][:, a:b], position_ids=at, use_cache=False).logits
        assert_close(out[:, a:b], alone, atol=5e-6, rtol=1e-5)


LLMS = ["GPT-2, padded", "Llama, GQA, padded left", "Mistral, window", "Gemma 2, softcap", "gpt-oss, sinks"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*LLMS, "GPT-2", "T5", "Whisper"])
def test_generation(name, cache):
    case = built(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in case.model.parameters():  # so that the next token is not always the same
            x.add_(0.3 * torch.randn(x.shape, generator=generator))
    inputs = {key: x for key, x in case.inputs.items() if not key.startswith("decoder_")}
    if name == "GPT-2, padded":
        inputs["attention_mask"] = host_models.keep("left").long()
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, disable_compile=True, pad_token_id=0,
                   return_dict_in_generate=True, output_scores=True)  # fmt: skip
    options["cache_implementation"] = "static" if cache == "static" else None
    a, b = both(case, lambda model: model.generate(**inputs, **options))
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.scores, b.scores, strict=True):
        assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_more_rows_than_one_against_a_cache():
    case = built("Mistral, window")
    ids = host_models.tokens()

    def in_parts(model):
        first = model(input_ids=ids[:, :6], use_cache=True)
        return model(input_ids=ids[:, 6:], past_key_values=first.past_key_values).logits

    a, b = both(case, in_parts)
    assert_close(a, b, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["BERT", *LLMS, "BART", "T5", "Whisper"])
def test_weights_where_they_are_asked_for(name):
    case = built(name)
    a, b = both(case, lambda model: model(**case.inputs, output_attentions=True))
    names = [key for key in ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions") if a.get(key)]
    assert names
    for key in names:
        assert len(a[key]) == len(b[key]) > 0
        for x, y in zip(a[key], b[key]):
            rows = y.sum(-1) > 0  # of a row that sees nothing ours are 0
            assert_close(x[rows], y[rows], atol=1e-5, rtol=1e-4)


def test_weights_are_those_of_the_same_dropout():
    module = torch.nn.Module()
    module.is_causal = False
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    out, w = hf.attention(module, q, k, v, None, dropout=0.5, output_attentions=True)
    assert (w == 0).any()
    assert_close(out.transpose(1, 2), w @ v)
    assert hf.attention(module, q, k, v, None)[1] is None


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_the_callers_own(kind):
    case = built("Llama, GQA, padded left")
    mask = torch.rand((2, 1, 13, 13), generator=torch.Generator().manual_seed(0)) > 0.4
    mask |= torch.eye(13, dtype=torch.bool)
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    case.inputs["attention_mask"], case.keep = given, None
    wanted = {**case.inputs, "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)}
    attend_with(case.model, "eager")
    a = case.model(**wanted).logits
    attend_with(case.model, "fastattn")
    assert_close(case.run(), a, atol=5e-6, rtol=1e-5)


def test_a_pattern_that_nobody_foresaw():
    """A model's own mask function: the mask is built."""
    from transformers.masking_utils import causal_mask_function, or_masks

    def prefix(b, h, q, k):
        return k < 4

    ours = transformers.AttentionMaskInterface()["fastattn"]
    mask = ours(2, 13, 13, mask_function=or_masks(causal_mask_function, prefix), allow_is_causal_skip=False, use_vmap=True)
    wanted = torch.ones(13, 13, dtype=torch.bool).tril()
    wanted[:, :4] = True
    assert torch.equal(mask, wanted.expand(2, 1, 13, 13))


def test_chunks_are_built_only_where_they_matter():
    ours = transformers.AttentionMaskInterface()["fastattn"]
    from transformers.masking_utils import chunked_causal_mask_function

    config = transformers.LlamaConfig(attention_chunk_size=4)
    chunks = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    mask = ours(2, 13, 13, mask_function=chunks, local_size=4, config=config)
    assert mask.shape == (2, 1, 13, 13)
    assert not mask[0, 0, 5, 3]
    assert is_all_real(ours(2, 4, 4, mask_function=chunks, local_size=4, config=config))


def test_a_window_that_the_module_would_not_pass_on():
    """A model whose attention never names its window gets it in the mask."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    class Config(transformers.PretrainedConfig):
        pass

    ours = transformers.AttentionMaskInterface()["fastattn"]
    windowed = sliding_window_causal_mask_function(4)
    assert ours(1, 9, 9, mask_function=windowed, local_size=4, config=Config()).shape == (1, 1, 9, 9)
    assert is_all_real(ours(1, 9, 9, mask_function=windowed, local_size=4, config=transformers.MistralConfig()))


def test_training_with_dropout():
    settings = {**host_models.SMALL, "attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    case = host_models.hf("BertForMaskedLM", "BertConfig", **settings)()
    attend_with(case.model, "fastattn")
    quiet = case.run()
    case.model.train()
    torch.manual_seed(0)
    a = case.run()
    torch.manual_seed(0)
    b = case.run()
    assert torch.equal(a, b)
    assert not torch.equal(a, quiet)
    many = torch.stack([case.run().detach() for _ in range(40)]).mean(0)
    assert (many - quiet).abs().max() < (a - quiet).abs().max()
    a.sum().backward()
    assert all(x.grad is not None for name, x in case.model.named_parameters() if "query" in name)


def test_checkpointing():
    case = built("Llama, GQA, padded left")
    attend_with(case.model, "fastattn")
    grads = []
    for on in (False, True):
        if on:
            case.model.gradient_checkpointing_enable()
            case.model.train()
        case.model.zero_grad()
        case.model(**case.inputs, use_cache=False).logits.square().sum().backward()
        grads.append([x.grad.clone() for x in case.model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


def test_bfloat16():
    case = built("Gemma 2, softcap")
    case.model.bfloat16()
    a, b = both(case, lambda model: case.run())
    assert b.dtype == torch.bfloat16
    assert_close(a, b, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("name", ["BERT", "Mistral, window"])
def test_compiled_in_one_graph(name):
    case = built(name)
    attend_with(case.model, "fastattn")
    with torch.no_grad():
        wanted = case.run()
        case.model = torch.compile(case.model, backend="aot_eager", fullgraph=True)
        assert_close(case.run(), wanted, atol=5e-6, rtol=1e-5)


def test_a_model_that_does_not_ask_warns():
    config = transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=1, n_head=4, d_inner=64)
    with pytest.warns(UserWarning, match="XLNetModel does not ask for its attn_implementation"):
        model = transformers.XLNetModel._from_config(config, attn_implementation="fastattn")
    assert hf.ignores(model) == ["XLNetModel"]
    bert = transformers.BertConfig(**host_models.SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.BertModel._from_config(bert, attn_implementation="fastattn")
    assert hf.ignores(model) == []


def test_other_names():
    hf.register("other_attention")
    config = transformers.BertConfig(**host_models.SMALL)
    model = transformers.BertModel._from_config(config, attn_implementation="other_attention")
    before = report()
    model(host_models.tokens())
    assert sum((report() - before).taken.values()) == 2
    with pytest.raises(ValueError, match="flash"):
        hf.register("my_flash")


def test_a_paged_cache_is_refused():
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="paged cache"):
        hf.attention(torch.nn.Module(), x, x, x, None, cache=object())
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        hf.attention(torch.nn.Module(), x, x, x, torch.ones(1, 2, 2, dtype=torch.bool))


REPLACED = ["XLNet", "MPNet", "DeBERTa-v2"]


@pytest.mark.parametrize("name", REPLACED)
def test_weights_of_replaced_modules(name):
    case = built(name)
    a = case.model(**case.inputs, output_attentions=True)
    fa.convert(case.model)
    b = case.model(**case.inputs, output_attentions=True)
    assert len(b.attentions) == 2
    for x, y in zip(a.attentions, b.attentions, strict=True):
        rows = y.sum(-1) > 0  # rows that see nothing have no weights here; of XLNet's (Lq, Lk, B, H), pairs that are seen
        assert_close(x[rows], y[rows], atol=1e-5, rtol=1e-4)


def test_both_streams_and_memories_of_xlnet():
    case = built("XLNet")
    ids = host_models.tokens()
    order = torch.zeros(2, 13, 13)
    order[:, :, -1] = 1.0  # nobody sees the last token
    target = torch.zeros(2, 1, 13)
    target[:, 0, -1] = 1.0
    segments = torch.zeros_like(ids)
    segments[:, 6:] = 1
    memories = case.model(ids, use_mems=True).mems
    inputs = dict(input_ids=ids, perm_mask=order, target_mapping=target, token_type_ids=segments, mems=memories)
    case.model.config.mem_len = 13
    wanted = case.model(**inputs).logits
    found = fa.convert(case.model)
    assert_close(case.model(**inputs).logits, wanted, atol=5e-6, rtol=1e-5)
    found.undo()
    assert torch.equal(case.model(**inputs).logits, wanted)


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_modules_can_be_copied_and_stored(name):
    case = built(name)
    fa.convert(case.model)
    wanted = case.run()
    for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        case.model = twin
        before = report()
        assert torch.equal(case.run(), wanted)
        assert sum((report() - before).taken.values()) == 2


@pytest.mark.parametrize("name", REPLACED)
def test_training_of_replaced_modules(name):
    case = built(name)
    fa.convert(case.model)
    case.model.train()
    torch.manual_seed(0)
    a = case.run()
    torch.manual_seed(0)
    assert torch.equal(case.run(), a)
    assert not torch.equal(case.run(), a)


def test_a_model_with_five_kinds_of_attention():
    """All are reported as what they are, and undoing restores the bits."""

    class OwnSoftmax(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(32, 32)

        def forward(self, x):
            return (self.q_proj(x) @ x.mT).softmax(-1) @ x

    class Calls(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    class Five(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = transformers.BertModel(transformers.BertConfig(**host_models.SMALL))
            self.mpnet = transformers.MPNetModel(transformers.MPNetConfig(**host_models.SMALL))
            self.layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.own, self.calls = OwnSoftmax(), Calls()

        def forward(self, ids):
            x = self.bert(ids).last_hidden_state + self.mpnet(ids).last_hidden_state
            return self.calls(self.own(self.layer(x)))

    torch.manual_seed(0)
    model, ids = Five().eval(), host_models.tokens()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids)
        found = fa.convert(model)
        after = model(ids)
    states = {(entry.kind, entry.state) for entry in found.entries}
    assert states == {
        ("BertSelfAttention", "interface"), ("MPNetSelfAttention", "replaced"), ("MultiheadAttention", "replaced"),
        ("OwnSoftmax", "left"), ("Calls", "sdpa"),
    }  # fmt: skip
    assert len(found.taken) == 5
    assert [entry.name for entry in found.left] == ["own", "calls"]
    assert "5 of 7 attention modules run on fastattn" in str(found)
    assert_close(before, after, atol=5e-6, rtol=1e-5)
    found.undo()
    with torch.no_grad():
        assert torch.equal(model(ids), before)
    assert model.state_dict().keys() == state.keys()
    assert model.bert.config._attn_implementation != "fastattn"

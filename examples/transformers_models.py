"""RoBERTa, GPT-2 and XLNet of Hugging Face transformers, as they are and on fastattn: logits, gradients, and some training.

    pip install transformers
    python -m examples.transformers_models

RoBERTa and GPT-2 ask transformers' interface for their attention, so its name is all that changes. XLNet does not: its
positions are relative and it reads in two streams. `convert` replaces its attention modules.
"""

import copy
import os

import torch

from fastattn.integrations import convert, report
from fastattn.integrations import transformers as integration

from .common import command, need, train
from .real_weights import quiet

VOCABULARY, LENGTH, BATCH = 100, 48, 4


def roberta(hf):
    config = hf.RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=LENGTH + 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.RobertaForMaskedLM._from_config(config, attn_implementation="eager")


def gpt2(hf):
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel._from_config(config, attn_implementation="eager")


def xlnet(hf):
    config = hf.XLNetConfig(vocab_size=VOCABULARY, d_model=64, n_layer=2, n_head=4, d_inner=128, dropout=0.0)
    return hf.XLNetLMHeadModel(config)


def batches(model, steps):
    """Words that count upwards from a random one, and their padding, on the side where each model has it; what comes of a
    masked word, of the next one, or of the one that XLNet is asked for."""
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = (torch.randint(VOCABULARY, (BATCH, 1), generator=g) + torch.arange(LENGTH)) % (VOCABULARY - 5) + 5
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=g)
        left = model.config.model_type == "xlnet"
        keep = (torch.arange(LENGTH) >= LENGTH - lengths) if left else (torch.arange(LENGTH) < lengths)
        batch = {"input_ids": torch.where(keep, ids, 1), "attention_mask": keep.long()}
        if model.config.model_type == "roberta":
            hidden = keep & (torch.rand(ids.shape, generator=g) < 0.15)
            hidden[:, 1] = True  # one at least
            batch |= {"input_ids": batch["input_ids"].masked_fill(hidden, 3), "labels": ids.masked_fill(~hidden, -100)}
        elif left:  # guess the last word from all the others: the second stream does not see the word itself
            hide, ask = torch.zeros(BATCH, LENGTH, LENGTH), torch.zeros(BATCH, 1, LENGTH)
            hide[:, :, -1] = ask[:, :, -1] = 1.0
            batch |= {"perm_mask": hide, "target_mapping": ask, "labels": ids[:, -1:]}
        else:
            batch["labels"] = ids.masked_fill(~keep, -100)
        yield batch


def on_fastattn(model):
    """A copy of a model, with the same weights."""
    twin = copy.deepcopy(model)
    if integration.uses_interface(type(model)):
        integration.register()
        twin.set_attn_implementation("fastattn")
        return twin
    found = convert(twin)
    assert not found.left, str(found)
    return twin


def differences(models, batch):
    """The largest difference of the logits of real words, and of the gradients relative to the largest one."""
    logits, grads = [], []
    for model in models.values():
        out = model(**batch)
        out.loss.backward()
        keep = batch["attention_mask"].bool() if out.logits.shape[1] == LENGTH else ...
        logits.append(out.logits[keep].detach())
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
    scale = max(g.abs().max() for g in grads[0])
    d_grad = max((a - b).abs().max() for a, b in zip(*grads, strict=True)) / scale
    return (logits[0] - logits[1]).abs().max().item(), d_grad.item()


def main(steps=40):
    os.environ["HF_HUB_OFFLINE"] = "1"
    hf, found, before = need("transformers", "transformers"), {}, report()
    quiet()
    for make in (roberta, gpt2, xlnet):
        torch.manual_seed(0)
        model = make(hf).train()
        models = {"eager": model, "fastattn": on_fastattn(model)}
        found[make.__name__] = differences(models, next(batches(model, 1)))
        train(models, lambda m, batch: m(**batch).loss, batches(model, steps)).show(type(model).__name__, rows=3)
        print("logits differ by {:.1e}, gradients by {:.1e} of the largest".format(*found[make.__name__]))
    print(f"\ncalls that fastattn took\n{report() - before}")
    return found


if __name__ == "__main__":
    command(main)

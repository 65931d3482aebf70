"""fastattn as an attention implementation of Hugging Face transformers.

    from fastattn.integrations import transformers as hf

    hf.register()
    model = AutoModel.from_pretrained(path, attn_implementation="fastattn")

Padding, packed sequences, windows, softcap, sinks and T5's learned position bias go into one call; keys and values are not
repeated for grouped queries. Made for transformers 5.17 to 5.23.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from .. import compat
from ..scores import Bias, Score, Softcap
from . import ledger
from .modules import attend
from .transformers_masks import mask, structure

NAME = "fastattn"
UNKNOWN = ("indices", "block_indices", "sinks")  # keys chosen by an indexer; logits of sinks for every row


def register(name: str = NAME) -> None:
    """Make `attn_implementation="fastattn"` known to transformers.

    From then on a model whose code does not ask for the implementation warns when it is told to use it.

    Args:
        name: another name; none with "flash", "sdpa", "flex_attention", "eager", "/" or "|", which mean other things there.

    Raises:
        ImportError: transformers is not installed, or older than the interface.
        ValueError: a name that transformers would take for something else.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    if any(word in name for word in ("flash", "sdpa", "flex_attention", "eager", "/", "|")):
        raise ValueError(f"name must hold none of flash, sdpa, flex_attention, eager, / and |, got {name!r}")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    _warn_where_ignored(PreTrainedModel, name)


def ignores(model: Any) -> list[str]:
    """Classes inside a transformers model that take an attn_implementation and do not use it. `convert` replaces some.

    Args:
        model: a module with PreTrainedModels in it.

    Returns:
        Names of the classes of the models, without repeats.
    """
    from transformers import PreTrainedModel

    found = [m for m in model.modules() if isinstance(m, PreTrainedModel) and not uses_interface(type(m))]
    return list(dict.fromkeys(type(m).__name__ for m in found))


def uses_interface(cls: Any) -> bool:
    """Whether a PreTrainedModel's code asks transformers' interface for its attention."""
    ask = getattr(cls, "_can_set_attn_implementation", None)
    return True if ask is None else bool(ask())


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers' modules call.

    Args:
        module: the attention module; its `is_causal` counts where the argument is None.
        query: (B, Hq, Lq, D). key: (B, Hkv, Lk, D). value: (B, Hkv, Lk, Dv).
        attention_mask: what `mask` gave, or a caller's own bool or additive float tensor (B, 1|Hq, Lq, Lk).
        dropout: probability. scaling: of the scores, 1 / sqrt(D) by default.
        sliding_window: w, for |i - j| < w. softcap: c, for c tanh(s / c).
        s_aux: (Hq,) sink logits. position_bias: (1|B, Hq, Lq, Lk), added to the scores; gets a gradient.
        cu_seq_lens_q, cu_seq_lens_k: cumulative lengths of packed sequences.
        others: `output_attentions` returns the weights too; what else modules pass does not bear on the result.

    Returns:
        o (B, Lq, Hq, Dv), and the weights (B, Hq, Lq, Lk) after dropout where they were asked for, else None.

    Raises:
        NotImplementedError: a paged cache (continuous batching), or an argument of one model that bears on the result and is
            not known here: keys chosen by an indexer, sinks that differ by row.
        TypeError, ValueError: as in `fastattn.attention`.
    """
    if others.get("cache") is not None:
        raise NotImplementedError('attn_implementation="fastattn" has no paged cache; use another one for continuous batching')
    for argument in UNKNOWN:
        if others.get(argument) is not None:
            raise NotImplementedError(
                f'attn_implementation="fastattn" does not know the argument {argument!r} that {type(module).__name__} passes; '
                'use "eager" or "sdpa" for this model'
            )
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] < key.shape[2]:
        n = attention_mask.shape[1]
        key, value = key[:, :, :n], value[:, :, :n]
    n_q, n_k = query.shape[2], key.shape[2]
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    visible, bias = structure(attention_mask, bool(causal), sliding_window, n_q, n_k, cu_seq_lens_q, cu_seq_lens_k)
    chain: list[Score] = [] if softcap is None else [Softcap(float(softcap))]
    if position_bias is not None:
        chain.append(Bias(position_bias[..., :n_k]))
    if bias is not None:
        chain.append(Bias(bias))
    wanted = bool(others.get("output_attentions")) or _collects_weights()
    out, w = attend(
        query, key, value, mask=visible, score=chain, sinks=s_aux, scale=scaling, dropout_p=dropout, wanted=wanted
    )
    ledger.took(f"transformers {type(module).__name__}")
    return out.transpose(1, 2).contiguous(), w  # contiguous already where the query was a view of (B, L, H, D)


@compat.constant_in_graphs
def _collects_weights() -> bool:
    """Whether the model around this call collects weights from its modules: not every module passes the question on."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # pragma: no cover
        return False
    return any(name.endswith("attentions") for name in _active_collector.get() or ())


def _warn_where_ignored(base: Any, name: str) -> None:
    """Let transformers' check of an implementation's name warn where the model has no use for it.

    Models that do not use the interface otherwise take any name in silence, and run their own attention.
    """
    check = getattr(base, "_check_and_adjust_attn_implementation", None)
    if check is None:  # pragma: no cover
        return
    names = getattr(check, "fastattn_names", None)
    if names is not None:
        names.add(name)
        return

    def checked(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation in checked.fastattn_names and not uses_interface(type(self)):  # type: ignore[attr-defined]
            warnings.warn(
                f"{type(self).__name__} does not ask for its attn_implementation, so {attn_implementation!r} changes nothing "
                "there; fastattn.convert(model) replaces the modules that it knows and says which it does not",
                stacklevel=3,
            )
            ledger.leave(f"transformers {type(self).__name__}", "its code does not use the attention interface")
        return check(self, attn_implementation, *args, **kwargs)

    checked.fastattn_names = {name}  # type: ignore[attr-defined]
    base._check_and_adjust_attn_implementation = checked

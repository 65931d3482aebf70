"""What a model of transformers does with its masks, by the source of its files: nothing else tells."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

ATTENTION = re.compile(r"class \w*(?:Attention|Attn)\w*\((?:torch\.)?nn\.Module\b")
BLOCK = re.compile(r"^(?=class |def |@)", re.MULTILINE)
FOUR = re.compile(r"\b(?:attention_|causal_|padding_)?mask\[(?:(?! *None)[^\],]*,){3}(?! *None)[^\],]*\]")  # mask[:, :, i, :]
PADDED = re.compile(r"\bpad\((?:attention|causal)_mask\b")  # which is longer then than what it was made for
CONFIG = re.compile(r"\bconfig: \"?(\w+)")

_passes_window: dict[type, bool] = {}
_adds_masks: dict[type, bool] = {}


def passes_window(config: Any) -> bool:
    """Whether a model's attention gives its window to the attention function, by its source: eager needs no window."""
    kind = type(config)
    if kind not in _passes_window:
        _passes_window[kind] = "sliding_window=" in (_modeling(kind) or "")
    return _passes_window[kind]


def adds_masks(config: Any) -> bool:
    """Whether the model's file computes a softmax of its own from a mask or takes one apart, so that only eager's serves all.

    By the source of the module beside the config's; where there is none nobody knows, and the answer is True.
    """
    kind = type(config)
    if config is not None and kind not in _adds_masks:
        text = _modeling(kind)
        _adds_masks[kind] = (
            text is None
            or FOUR.search(text) is not None
            or PADDED.search(text) is not None
            or any(_own_softmax(block, kind.__name__) for block in BLOCK.split(text))
        )
    return config is not None and _adds_masks[kind]


def _own_softmax(block: str, config: str) -> bool:
    """Whether the source of a class is that of attention with its own softmax and a mask, built from such a config."""
    if not ATTENTION.match(block) or "ALL_ATTENTION_FUNCTIONS" in block:
        return False
    named = CONFIG.search(block)
    return "softmax" in block.lower() and "mask" in block and (named is None or named[1] == config)


def _modeling(kind: type) -> str | None:
    """The source of the models beside a config's class, as far as they are loaded; None where there are none."""
    package, _, name = kind.__module__.rpartition(".")
    if not name.startswith("configuration_"):
        return None
    loaded = [module for key, module in list(sys.modules.items()) if key.startswith(f"{package}.modeling_")]
    try:
        return "\n".join(map(inspect.getsource, loaded)) or None
    except (OSError, TypeError):
        return None

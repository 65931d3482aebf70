"""`convert`: put fastattn into the attention modules of a model, say what was done to each, and take it back.

An instance changes sides by its class: nn.MultiheadAttention becomes fastattn.nn.MultiheadAttention, a module that
transformers wrote becomes the subclass in `modules`, and one that asks transformers' interface is told to use fastattn.
Nothing else of a model is touched, so that taking it back restores the same bits.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn import MultiheadAttention
from . import ledger, modules

PRODUCT = re.compile(r"matmul|einsum|bmm|mm\(| @ |\.mT")
ATTENTIVE = re.compile(r"attention|attn", re.IGNORECASE)
PROJECTIONS = ("q", "k", "query", "key", "qkv", "to_q", "q_proj", "query_proj", "c_attn", "in_proj", "Wqkv", "in_proj_weight")
SDPA = ("scaled_dot_product_attention", "multi_head_attention_forward")
FLAG = "fused_attn"  # timm's: whether a module calls that function
_BASE_OF_HOST = re.compile(r"(transformers|diffusers)\.(?!models\.)")
REPLACED, INTERFACE, INSTALL, LEFT = "replaced", "interface", "sdpa", "left"


@dataclass(frozen=True)
class Entry:
    """One attention module. `state` is "replaced", "interface" (transformers' dispatch goes to fastattn), "sdpa" (it calls
    torch's function, which `fastattn.install()` takes over) or "left"; `why` says how or why not."""

    name: str
    kind: str
    state: str
    why: str

    def __str__(self) -> str:
        return f"{self.state:<9}  {self.name or '(the model)'} ({self.kind}): {self.why}"


@dataclass
class Conversion:
    """What `convert` did: str() is one line for each attention module."""

    entries: list[Entry]
    _back: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def taken(self) -> list[Entry]:
        """The modules that now run on fastattn."""
        return [entry for entry in self.entries if entry.state in (REPLACED, INTERFACE)]

    @property
    def left(self) -> list[Entry]:
        """The modules that do not; those of state "sdpa" do under `fastattn.install()`."""
        return [entry for entry in self.entries if entry.state in (INSTALL, LEFT)]

    def undo(self) -> None:
        """Put everything back as it was; a second time, nothing happens."""
        while self._back:
            self._back.pop()()

    def __str__(self) -> str:
        head = f"{len(self.taken)} of {len(self.entries)} attention modules run on fastattn"
        return "\n".join([head, *map(str, self.entries)])


def convert(model: nn.Module) -> Conversion:
    """Let a model's attention modules run on fastattn, in place.

    Replaced are torch.nn.MultiheadAttention wherever it stands (in a TransformerEncoderLayer too, whose fused path is then
    not taken), and the modules of transformers' MPNet, XLNet and DeBERTa-v2, which ask no interface. Models that ask it get
    attn_implementation="fastattn". Everything else that looks like attention is reported as left: "sdpa" if it calls torch's
    function, which `fastattn.install()` takes over. Looking like attention means a forward whose source has a softmax of
    products beside projections of queries and keys; attention outside of a module is not seen.

    Args:
        model: a module; its parameters, buffers, hooks, names and state_dict stay what they are.

    Returns:
        A Conversion: `entries`, `taken`, `left`, and `undo()`, after which outputs are those of before, bit for bit.

    Raises:
        TypeError: model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = Conversion([])
    _use_interface(model, found)
    for name, module in list(model.named_modules()):
        entry = _converted(name, module, found)
        if entry is not None:
            found.entries.append(entry)
            if entry.state == LEFT:
                ledger.leave(f"convert {entry.kind}", entry.why)
    return found


def _converted(name: str, module: nn.Module, found: Conversion) -> Entry | None:
    """The entry of one module, which is changed if that is known how; None if it is no attention."""
    cls = type(module)
    if cls is nn.MultiheadAttention:
        _swap(module, MultiheadAttention, found)
        found._back.append(module.register_forward_pre_hook(_count).remove)  # what has hooks is not fused away
        return Entry(name, cls.__name__, REPLACED, "by fastattn.nn.MultiheadAttention")
    if isinstance(module, MultiheadAttention) or cls.__module__ == modules.__name__:
        return Entry(name, cls.__name__, REPLACED, "it was fastattn's already")
    new = modules.replacement(cls)
    if new is not None:
        _swap(module, new, found)
        return Entry(name, cls.__name__, REPLACED, f"by {new.__name__}")
    text = source(cls)  # type: ignore[arg-type]
    if isinstance(module, nn.MultiheadAttention):
        own = cls.forward is not nn.MultiheadAttention.forward
        why = "a subclass of MultiheadAttention" + (" with a forward of its own" if own else "")
        return Entry(name, cls.__name__, LEFT, why)
    if "ALL_ATTENTION_FUNCTIONS" in text:
        given = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if given == "fastattn":
            return Entry(name, cls.__name__, INTERFACE, "through transformers' attention interface")
        return Entry(name, cls.__name__, LEFT, f"it asks transformers' interface for {given!r}, which could not be changed")
    if any(word in text for word in SDPA):
        if getattr(module, FLAG, None) is False:
            return Entry(name, cls.__name__, LEFT, f"it computes its own softmax while its {FLAG} is False")
        return Entry(name, cls.__name__, INSTALL, "it calls torch's scaled_dot_product_attention: fastattn.install()")
    if _looks_like_attention(module, text):
        return Entry(name, cls.__name__, LEFT, "it computes its own softmax, and there is no adapter for its class")
    return None


def _swap(module: nn.Module, cls: type, found: Conversion) -> None:
    before = type(module)
    module.__class__ = cls
    found._back.append(lambda: setattr(module, "__class__", before))


def _count(module: nn.Module, args: Any) -> None:
    """The hook of a replaced nn.MultiheadAttention."""
    ledger.took("convert MultiheadAttention")


def _use_interface(model: nn.Module, found: Conversion) -> None:
    """Set attn_implementation="fastattn" on every model of transformers inside that asks for it."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    from . import transformers as hf

    hosts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not hosts:
        return
    hf.register()
    hosts = [host for host in hosts if hf.uses_interface(type(host)) and host.config._attn_implementation != hf.NAME]
    for host in reversed(hosts):  # so that the outer ones are restored first
        _remember(host.config, found)
    for host in hosts:
        if host.config._attn_implementation != hf.NAME:  # setting it on a model may or may not reach those inside
            host.set_attn_implementation(hf.NAME)


def _remember(config: Any, found: Conversion) -> None:
    """Put a config's choice, and those of the configs inside it, back at the end: the inner ones last."""
    before = config._attn_implementation
    inside = [x for key in config.sub_configs if (x := getattr(config, key, None)) is not None]
    for part in inside:
        _remember(part, found)
    found._back.append(lambda: setattr(config, "_attn_implementation", before))


@functools.cache
def source(cls: Any) -> str:
    """The source of a module's class and of its parents, as far as there is one: not of torch's bases and of those that
    transformers and diffusers have beside their models."""
    text = []
    for part in cls.__mro__:
        if part is object or part.__module__.startswith("torch.") or _BASE_OF_HOST.match(part.__module__):
            continue
        try:
            text.append(inspect.getsource(part))
        except (OSError, TypeError):
            continue
    return "\n".join(text)


def _looks_like_attention(module: nn.Module, text: str) -> bool:
    if not ("softmax" in text and PRODUCT.search(text)):
        return False
    named = bool(ATTENTIVE.search(type(module).__name__))
    return named or any(isinstance(getattr(module, key, None), (nn.Module, torch.Tensor)) for key in PROJECTIONS)

"""fastattn under `torch.nn.functional.scaled_dot_product_attention`, for everything that calls it.

The operator itself gets another kernel, so that every caller is reached, however it came by the function. What
fastattn refuses goes to torch's own kernel, and `report()` says how often and why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..nested import nested_attention
from ..sdpa import scaled_dot_product_attention
from . import ledger

ROUTE = "torch scaled_dot_product_attention"
JAGGED = "torch scaled_dot_product_attention, jagged"
TAG = "+fastattn"
REFUSALS = (TypeError, ValueError, NotImplementedError, ImportError)

_lock = threading.RLock()
_users = 0
_installed = False
_back: Callable[[], None] | None = None


def install() -> None:
    """Run every `torch.nn.functional.scaled_dot_product_attention` of this process on fastattn, until `uninstall`.

    Reaches all callers: names imported earlier, `nn.MultiheadAttention` with need_weights=False, transformers' "sdpa",
    CausalBias, jagged tensors, autocast, torch.func, and functions compiled from now on; what was compiled before is
    compiled anew. torch's fused encoder layers, which call no attention function, are switched off meanwhile. A call that
    fastattn does not take runs on torch's own kernel; `report()` counts both. Installing twice is the same as once.
    """
    global _installed
    with _lock:
        if not _installed:
            _enter()
            _installed = True


def uninstall() -> None:
    """Give torch's attention back; where nothing is installed, nothing happens. Inside `use` it stays until its end."""
    global _installed
    with _lock:
        if _installed:
            _installed = False
            _leave()


class Use:
    """What an open or closed `use` block has seen."""

    def __init__(self) -> None:
        self._before = ledger.report()
        self._after: ledger.Report | None = None

    def report(self) -> ledger.Report:
        """The calls since the block was entered, up to its end."""
        return (self._after or ledger.report()) - self._before

    def _close(self) -> None:
        self._after = ledger.report()

    def __str__(self) -> str:
        return str(self.report())


@contextmanager
def use() -> Iterator[Use]:
    """`install` for a block: `with fastattn.use() as taken: ...; print(taken)`.

    Blocks may be nested, and may stand inside `install`. Like torch's own choice of kernels this is the process's, not the
    thread's: what another thread calls meanwhile is taken over too, and torch's attention comes back when the last block
    of the last thread ends. A backward needs no block, unless it recomputes (checkpointing). Around functions made by
    torch.compile prefer `install`: at either end of a block they are compiled anew.

    Yields:
        An object whose `report()` says what was taken and what was not, and why.
    """
    with _lock:
        _enter()
    seen = Use()
    try:
        yield seen
    finally:
        seen._close()
        with _lock:
            _leave()


def _enter() -> None:
    global _users, _back
    if _users == 0:
        _back = _put()
    _users += 1


def _leave() -> None:
    global _users, _back
    _users -= 1
    if _users == 0 and _back is not None:
        back, _back = _back, None
        back()


def _put() -> Callable[[], None]:
    """Take over; returns the way back."""
    import torch.compiler.config as compiler  # loads no compiler

    ways = [compat.override_sdpa(_attend), compat.replace_jagged_sdpa(_attend_jagged)]
    fused_layers = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    compiler.cache_key_tag += TAG  # graphs on disk that were traced with the other kernel do not serve
    compat.forget_compiled()

    def back() -> None:
        for way in ways:
            way()
        torch.backends.mha.set_fastpath_enabled(fused_layers)
        compiler.cache_key_tag = compiler.cache_key_tag.replace(TAG, "", 1)
        compat.forget_compiled()

    return back


def _attend(
    original: Callable[[], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The operator's kernel: fastattn's attention, or `original()` where that cannot be."""
    reason = next(filter(None, map(_foreign, (query, key, value, attn_mask))), None)
    if reason is None:
        try:
            out = scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        except REFUSALS as refusal:
            reason = _first_line(refusal)
        else:
            ledger.took(ROUTE)
            return out
    ledger.leave(ROUTE, reason)
    return original()


def _attend_jagged(
    original: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0,
    is_causal=False, scale=None, enable_gqa=False,
) -> Tensor:  # fmt: skip
    """The same for jagged nested tensors."""
    reason = None if attn_mask is None else "a mask with jagged tensors"
    if reason is None:
        try:
            out = nested_attention(
                query, key, value, is_causal=is_causal, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
            )
        except REFUSALS as refusal:
            reason = _first_line(refusal)
        else:
            ledger.took(JAGGED)
            return out
    ledger.leave(JAGGED, reason)
    return original()


def _foreign(x: Any) -> str | None:
    """Why a tensor is none of ours: its class has rules of its own for the operators it meets (DTensor and the like)."""
    if x is None:
        return None
    if hasattr(type(x), "__tensor_flatten__"):
        return f"a tensor of class {type(x).__name__}"
    return "a tensor that is not dense" if x.is_nested or x.layout != torch.strided else None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]

"""Every private torch name that the library uses, each with what happens where it is gone. Nothing else imports one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

_BASE = torch.autograd.Function

# Whether any functorch transform (vmap, grad, jvp) is active.
in_functorch: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)

# Lets an autograd.Function run inside an operator's Autograd kernel while functorch transforms are active.
try:
    from torch._functorch.autograd_function import enable_single_level_autograd_function as _single_level
except ImportError:  # pragma: no cover
    _single_level = contextlib.nullcontext  # type: ignore[assignment]

# Switches forward-mode tracking, which an enclosing transform may have turned off.
_set_forward_grad: Callable[[bool], Any] = getattr(
    torch.autograd.forward_ad, "_set_fwd_grad_enabled", lambda mode: contextlib.nullcontext()
)

# Skips the Autograd keys: torch.library uses the same guard for its own operators.
_below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd

# Skips a set of dispatch keys.
_exclude_keys: Callable[[Any], Any] = torch._C._ExcludeDispatchKeyGuard
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def apply(cls: type[torch.autograd.Function], *args: Any) -> Any:
    """cls.apply(*args), without binding the signature on every call (tens of microseconds for a setup_context Function)."""
    if in_functorch():
        with _single_level():
            return super(_BASE, cls).apply(*args)
    return super(_BASE, cls).apply(*args)


def redispatch(op: Any, *args: Any) -> Any:
    """Call an operator's kernel below the Autograd key: from inside a Function, or where nothing needs a gradient.

    Under functorch the operator may meet an enclosing level's tensors; without grad mode switched on for them the gradient
    of a gradient would silently be zero.
    """
    if in_functorch():
        with torch.enable_grad(), _set_forward_grad(True), _below_autograd():
            return op(*args)
    with _below_autograd():
        return op(*args)


def without_autocast(op: Any, *args: Any) -> Any:
    """Call an operator with autocast off, so that no product inside its kernel is silently rounded."""
    with _exclude_keys(_AUTOCAST):
        return op(*args)


def base_apply(cls: type[torch.autograd.Function], *args: Any) -> Any:
    """`apply` where no functorch transform is active."""
    return super(_BASE, cls).apply(*args)


_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def nothing_watches() -> bool:
    """Whether plain tensors are all there is: no transform, mode, compiler, autocast or forward-mode level."""
    return not (
        torch.compiler.is_compiling()
        or in_functorch()
        or _any_autocast()
        or _dispatch_modes()
        or _function_modes()
        or torch.autograd.forward_ad._current_level >= 0
    )

"""Conditions on top of the spans, and the names by which a custom function travels through an operator.

A predicate is a bool per (batch, head, query, key). Operators carry strings and tensors, so a custom function is named
`module:qualname#hash8` (the hash is of its source), and `resolve` imports it back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import compat, naming


class DensePredicate(NamedTuple):
    """True where visible."""

    tensor: Tensor  # bool (B|1, H|1, Lq|1, Lk|1)


class CustomPredicate(NamedTuple):
    """`fn(b, h, q_idx, k_idx) -> bool` on broadcastable int64 coordinate tensors, and the same for Triton if given."""

    fn: Callable[..., Tensor]
    triton_fn: Any | None = None

    @property
    def key(self) -> str:
        """`module:qualname#hash8` of fn, followed by `+` and that of triton_fn where there is one."""
        if self.triton_fn is None:
            return function_key(self.fn)
        return function_key(self.fn) + "+" + function_key(_plain(self.triton_fn))

    def visible(self, b: Tensor, h: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        """fn's answer.

        Raises:
            TypeError, ValueError: it is no bool tensor of 4 dimensions that broadcast.
        """
        found = self.fn(b, h, q_idx, k_idx)
        if not isinstance(found, Tensor) or found.dtype != torch.bool:
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"Custom torch_fn {self.fn.__qualname__} must return a bool tensor, got {got}")
        full = torch.broadcast_shapes(b.shape, h.shape, q_idx.shape, k_idx.shape)
        if found.dim() != 4 or any(n != 1 and n != m for n, m in zip(found.shape, full)):
            raise ValueError(
                f"Custom torch_fn {self.fn.__qualname__} must return a shape that broadcasts to {tuple(full)}, "
                f"got {tuple(found.shape)}"
            )
        return found

    @classmethod
    def from_key(cls, key: str) -> CustomPredicate:
        """The predicate that `key` names."""
        fn, _, triton_fn = key.partition("+")
        return cls(resolve(fn), resolve(triton_fn) if triton_fn else None)


Predicate = DensePredicate | CustomPredicate


@compat.constant_in_graphs
def function_key(fn: Any) -> str:
    """`module:qualname#hash8` of an importable function; the tracer of torch 2.11 takes no Triton function here."""
    return _function_key(fn)


@functools.lru_cache(maxsize=1024)
def _function_key(fn: Any) -> str:
    plain = _plain(fn)
    return f"{plain.__module__}:{plain.__qualname__}#{naming.source_hash(plain)}"


def _plain(fn: Any) -> Any:
    """The Python function inside a Triton function; a Python function itself."""
    return fn if inspect.isfunction(fn) else getattr(fn, "fn", fn)


@functools.lru_cache(maxsize=1024)
def resolve(key: str) -> Any:
    """The function that `key` names; of a key with a Triton function, the torch function.

    Raises:
        ValueError: nothing importable has this name, or its source differs from the one the key was made of.
    """
    key = key.partition("+")[0]
    name, _, digest = key.partition("#")
    module_name, _, qualname = name.partition(":")
    try:
        found = naming.find(module_name, qualname)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key!r} does not name an importable function: {error}") from error
    if digest and digest != naming.source_hash(_plain(found)):
        raise ValueError(f"the source of {name} is not the one that {key!r} was made of")
    return found


def check_condition(fn: Any, name: str) -> None:
    """Refuse what is no function of the coordinates or cannot be found by its name: lambdas, closures, methods, partials.

    Raises:
        TypeError: it is not a function at all, or none of four arguments.
        ValueError: it cannot be imported as `module:qualname`.
    """
    plain = _plain(fn)
    if not callable(plain) or not hasattr(plain, "__qualname__") or not hasattr(plain, "__module__"):
        raise TypeError(f"{name} must be a function defined in a module, got {fn!r}")
    if not naming.means(plain.__module__, plain.__qualname__, fn):
        raise ValueError(
            f"{name} must be importable by its name, as a function at the top level of a module; got "
            f"{plain.__module__}:{plain.__qualname__}, a lambda, closure, method or shadowed function. Move it to a module's "
            "top level; put data that it closed over into a Dense mask, Spans, or the coordinates"
        )
    _check_arguments(plain, name)


@functools.lru_cache(maxsize=1024)
def _check_arguments(plain: Any, name: str) -> None:
    if isinstance(plain, type) or plain.__module__ == "builtins":
        kind = "a class" if isinstance(plain, type) else "a built-in function"
        raise TypeError(f"{name} must be a function of (b, h, q_idx, k_idx), got {kind}, {plain.__qualname__}")
    try:
        signature = inspect.signature(plain, follow_wrapped=False)
    except (TypeError, ValueError):  # compiled ones need not say
        return
    try:
        signature.bind(None, None, None, None)
    except TypeError:
        raise TypeError(f"{name} must take (b, h, q_idx, k_idx), got {plain.__qualname__}{signature}") from None


def coordinate_grids(coords: Any, n_b: int, n_h: int, n_q: int, n_k: int, device: Any) -> tuple[Tensor, ...]:
    """int64 coordinates b, h, q, k that broadcast to (B, H, n_q, n_k); each of coords an int offset or a tensor."""
    given = (0, 0, 0, 0) if coords is None else (coords.b, coords.h, coords.q, coords.k)
    b, h, q, k = (
        x.to(device, torch.int64) if isinstance(x, Tensor) else torch.arange(n, device=device) + x
        for x, n in zip(given, (n_b, n_h, n_q, n_k))
    )
    b = b[:, None, None, None] if b.ndim == 1 else b[:, None, :, None]  # (B, 1, 1, 1) or (B|1, 1, n_q, 1)
    q = (q[None] if q.ndim == 1 else q)[:, None, :, None]  # (B|1, 1, n_q, 1)
    k = (k[None] if k.ndim == 1 else k)[:, None, None, :]  # (B|1, 1, 1, n_k)
    h = (h[None] if h.ndim == 1 else h)[:, :, None, None]  # (B|1, H, 1, 1)
    return b, h, q, k

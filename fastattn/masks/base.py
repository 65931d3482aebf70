"""Mask, the base of all masks, and its algebra: `a & b` shows what both show, `a | b` what either shows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .algebra import intersect, unite
from .checks import brief
from .spans import LoweredMask


class Mask:
    """Which keys each query row may see. Immutable; compared and hashed by identity.

    A subclass sets its attributes by `self._set(name=value)` and implements `lower`.
    One that treats every sequence alike also implements `span_of`, which makes it usable inside documents.
    """

    predicated = False  # whether lowering yields predicates beside the spans
    align: str | None = None  # where rows stand among the keys, for masks that depend on it
    aligned = True  # False where the mask needs n_q == n_k because no alignment was given

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        """The mask for n_q queries and n_k keys as row spans and predicates, its tensors on `device`.

        O(n_q) memory; never waits for a device.

        Raises:
            TypeError: a length is no int.
            ValueError: a length is negative, or the mask does not fit these lengths.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define lower()")

    def span_of(self, row: Any, n_q: Any, n_k: Any) -> tuple[Any, Any] | None:
        """The span (start, stop) of a row, unclamped, for ints or broadcastable int tensors; None if not of this form."""
        return None

    def to_dense(self, n_q: int, n_k: int, device: Any = "cpu") -> Tensor:
        """The mask as a bool tensor (B|1, H|1, n_q, n_k), True where visible. Custom masks see storage indices."""
        return self.lower(n_q, n_k, device).to_dense(device=device)

    def density(self, n_q: int, n_k: int) -> float:
        """The share of (query, key) pairs that is visible, over batch and heads; 0 where there are none."""
        if n_q == 0 or n_k == 0:
            return 0.0
        lowered = self.lower(n_q, n_k)
        if lowered.predicates:
            return lowered.to_dense().double().mean().item()
        start, stop = lowered.rows_tensors()  # (B|1, H|1, R, n_q)
        return (stop - start).sum(2).double().mean().item() / n_k

    def show(self, n_q: int | None = None, n_k: int | None = None, width: int = 64, b: int = 0, h: int = 0) -> str:
        """A text picture of one batch entry and head, one character per tile of keys.

        Args:
            n_q, n_k: lengths; by default those that the mask's tensors imply, else 24.
            width: the most characters per line; longer masks are drawn in tiles.
            b, h: which batch entry and head of the mask's tensors.
        """
        from . import picture

        n_q, n_k = self._picture_sizes(n_q, n_k)
        return f"{self!r}  {n_q} x {n_k}\n" + picture.text(self._plane(n_q, n_k, b, h), width)

    def plot(self, n_q: int | None = None, n_k: int | None = None, ax: Any = None, b: int = 0, h: int = 0) -> Any:
        """The picture of `show` on a matplotlib axis (a new one if ax is None), which is returned."""
        from . import picture

        n_q, n_k = self._picture_sizes(n_q, n_k)
        return picture.plot(self._plane(n_q, n_k, b, h), ax, title=repr(self))

    def sizes(self) -> tuple[int | None, int | None]:
        """(n_q, n_k) as far as the mask's own tensors imply them."""
        return None, None

    def _picture_sizes(self, n_q: int | None, n_k: int | None) -> tuple[int, int]:
        own_q, own_k = self.sizes()
        n_q = next((n for n in (n_q, own_q, n_k, own_k) if n is not None), 24)
        return n_q, next((n for n in (n_k, own_k) if n is not None), n_q)

    def _plane(self, n_q: int, n_k: int, b: int, h: int) -> Tensor:
        dense = self.to_dense(n_q, n_k)
        for name, index, size in (("b", b, dense.shape[0]), ("h", h, dense.shape[1])):
            if size > 1 and not 0 <= index < size:
                raise ValueError(f"{name}={index} is outside the mask's {size}")
        return dense[b if dense.shape[0] > 1 else 0, h if dense.shape[1] > 1 else 0]

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else _not_a_mask("&", other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else _not_a_mask("|", other)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable; make a new one instead of setting {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable; {name} cannot be deleted")

    def __repr__(self) -> str:
        parts = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if value is parameter.default or (isinstance(value, (int, str)) and value == parameter.default):
                continue
            positional = parameter.default is parameter.empty
            parts.append(brief(value) if positional else f"{name}={brief(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


class And(Mask):
    """Keys that both masks show; written `a & b`."""

    a: Mask
    b: Mask

    def __init__(self, a: Mask, b: Mask) -> None:
        self._set(a=a, b=b, predicated=a.predicated or b.predicated, aligned=a.aligned and b.aligned)
        self._set(align=b.align if a.align is None else a.align)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        return intersect(self.a.lower(n_q, n_k, device), self.b.lower(n_q, n_k, device), device)

    def span_of(self, row: Any, n_q: Any, n_k: Any) -> tuple[Any, Any] | None:
        a, b = self.a.span_of(row, n_q, n_k), self.b.span_of(row, n_q, n_k)
        return None if a is None or b is None else (largest(a[0], b[0]), smallest(a[1], b[1]))

    def sizes(self) -> tuple[int | None, int | None]:
        return _merged(self.a.sizes(), self.b.sizes())

    def __repr__(self) -> str:
        return f"{_operand(self.a)} & {_operand(self.b)}"


class Or(Mask):
    """Keys that either mask shows; written `a | b`."""

    a: Mask
    b: Mask

    def __init__(self, a: Mask, b: Mask) -> None:
        for mask in (a, b):
            if mask.predicated:
                raise ValueError(
                    f"`|` cannot take {mask!r}: a union with a Dense or Custom mask is not a set of row spans. "
                    "Unite them as bool tensors: Dense(a.to_dense(n_q, n_k) | b.to_dense(n_q, n_k))"
                )
        self._set(a=a, b=b, aligned=a.aligned and b.aligned)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        return unite(self.a.lower(n_q, n_k, device), self.b.lower(n_q, n_k, device), device)

    def sizes(self) -> tuple[int | None, int | None]:
        return _merged(self.a.sizes(), self.b.sizes())

    def __repr__(self) -> str:
        return f"{_operand(self.a)} | {_operand(self.b)}"


def largest(a: Any, b: Any) -> Any:
    """Elementwise maximum of two values, each an int or an int tensor."""
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def smallest(a: Any, b: Any) -> Any:
    """Elementwise minimum of two values, each an int or an int tensor."""
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def offset(mask: Any, n_q: Any, n_k: Any) -> Any:
    """What to add to a query's index to get its position among the keys, by the mask's alignment.

    Raises:
        ValueError: no alignment was given and n_q != n_k.
    """
    if mask.align == "bottom_right":
        return n_k - n_q
    if isinstance(mask.align, int):
        return mask.align
    if mask.align is None and not isinstance(n_q, Tensor) and n_q != n_k:
        raise ValueError(
            f"{mask!r} needs n_q == n_k, got n_q={n_q} and n_k={n_k}: say align='top_left' (row 0 stands at key 0) or "
            "align='bottom_right' (the last row stands at the last key) or an int (the key at which row 0 stands)"
        )
    return 0


def _merged(a: tuple[int | None, int | None], b: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    return (b[0] if a[0] is None else a[0]), (b[1] if a[1] is None else a[1])


def _operand(mask: Mask) -> str:
    return f"({mask!r})" if isinstance(mask, (And, Or)) else repr(mask)


def _not_a_mask(operator: str, value: Any) -> Any:
    hint = "; wrap the tensor: Dense(tensor)" if isinstance(value, Tensor) else ""
    raise TypeError(f"`{operator}` takes two masks, got {brief(value)}{hint}")

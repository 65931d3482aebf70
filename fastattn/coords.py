"""Where the rows and keys of a call stand, as scores, custom masks and dropout see them.

A KV cache, a shard of a longer sequence and a document of a packed batch are the same function as the whole once their
rows and keys carry the coordinates that they have in the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FARTHEST = 1 << 62  # of an int coordinate, so that indices can be added in 64 bits


class Coordinates:
    """The coordinates (b, h, q, k) of a call's batch entries, query heads, rows and keys. Immutable.

    Each is an int, which is added to the storage index, or an integer tensor that holds the coordinates themselves.

    Args:
        b: int, (B,) or (B|1, Lq).
        h: int or (Hq,).
        q: int, (Lq,) or (B|1, Lq).
        k: int, (Lk,) or (B|1, Lk).
    """

    __slots__ = ("b", "h", "k", "q")

    b: int | Tensor
    h: int | Tensor
    q: int | Tensor
    k: int | Tensor

    def __init__(self, b: int | Tensor = 0, h: int | Tensor = 0, q: int | Tensor = 0, k: int | Tensor = 0) -> None:
        for name, x in (("b", b), ("h", h), ("q", q), ("k", k)):
            object.__setattr__(self, name, x)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Coordinates is immutable; make a new one instead of setting {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Coordinates, self.parts

    @property
    def parts(self) -> tuple[int | Tensor, ...]:
        """(b, h, q, k)"""
        return self.b, self.h, self.q, self.k

    def __repr__(self) -> str:
        shown = (f"{n}={x if not isinstance(x, Tensor) else tuple(x.shape)}" for n, x in zip("bhqk", self.parts, strict=True))
        return f"Coordinates({', '.join(shown)})"

    def reach(self, name: str, n: int) -> tuple[int, int] | None:
        """The lowest and the highest coordinate of q or k over n rows or keys; None where there is none or it is not known
        without waiting for a device."""
        x = getattr(self, name)
        if not isinstance(x, Tensor):
            return (x, x + n - 1) if n > 0 else None
        if x.numel() == 0 or torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
            return None
        try:
            return int(x.min()), int(x.max())
        except RuntimeError:  # inside torch.func transforms and under fake tensors
            return None

    def canonical(self, n_b: int, n_h: int, n_q: int, n_k: int) -> Coordinates:
        """The same with tensors as b (B, 1) or (B|1, Lq), h (1, Hq), q (B|1, Lq), k (B|1, Lk).

        Raises:
            TypeError: a coordinate is neither an int nor an integer tensor.
            ValueError: a tensor's shape does not fit the call, or an int is out of range.
        """
        return Coordinates(
            _fitted("b", self.b, ((n_b,), (n_b, n_q), (1, n_q), (n_b, 1)), column=True),
            _fitted("h", self.h, ((n_h,), (1, n_h), (n_b, n_h))),
            _fitted("q", self.q, ((n_q,), (1, n_q), (n_b, n_q))),
            _fitted("k", self.k, ((n_k,), (1, n_k), (n_b, n_k))),
        )


def _fitted(name: str, x: Any, shapes: tuple[tuple[int, ...], ...], column: bool = False) -> int | Tensor:
    """x as it stands where it is an int; a tensor of one of `shapes` as 2-D."""
    if isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool):
        if isinstance(x, int) and abs(x) >= FARTHEST:
            raise ValueError(f"coords.{name} must lie within +-2^62, got {x}")
        return x  # type: ignore[return-value]
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"coords.{name} must be an int or an int32 or int64 tensor, got {got}")
    if not any(len(shape) == x.dim() and all(a == b for a, b in zip(x.shape, shape)) for shape in shapes):
        raise ValueError(f"coords.{name} must be an int or have one of the shapes {shapes}, got {tuple(x.shape)}")
    if x.dim() == 1:
        return x[:, None] if column else x[None]
    return x

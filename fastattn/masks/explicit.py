"""Masks given by their content: spans per row, a bool tensor, or a function of the coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .algebra import disjoint
from .base import Mask
from .checks import check_int_tensor, check_lengths, moved
from .predicates import CustomPredicate, DensePredicate, check_condition, function_key
from .spans import MAX_SPANS, START, Bound, LoweredMask, clamp_rows


class Spans(Mask):
    """A row sees the keys start <= k < stop of each of its R spans, in any order, overlapping or empty.

    Args:
        start, stop: int tensors (Lq,), (R, Lq) or (B|1, H|1, R, Lq), R at most 4; broadcast against each other.
    """

    start: Tensor
    stop: Tensor
    length: int

    def __init__(self, start: Tensor, stop: Tensor) -> None:
        for name, x in (("start", start), ("stop", stop)):
            check_int_tensor(x, f"Spans {name}", (1, 2, 4))
        try:
            shape = torch.broadcast_shapes(_four_dims(start).shape, _four_dims(stop).shape)
        except RuntimeError:
            raise ValueError(
                f"Spans start {tuple(start.shape)} and stop {tuple(stop.shape)} do not broadcast"
            ) from None
        if not 1 <= shape[2] <= MAX_SPANS:
            raise ValueError(f"Spans takes 1 to {MAX_SPANS} spans per row, got {shape[2]} (start {tuple(start.shape)})")
        self._set(start=start, stop=stop, length=shape[3])

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        if self.length != n_q:
            raise ValueError(f"Spans has {self.length} rows, but n_q is {n_q}")
        start, stop = clamp_rows(_four_dims(moved(self.start, device)), _four_dims(moved(self.stop, device)), n_k)
        return LoweredMask(n_q, n_k, None, disjoint(start, stop))

    def sizes(self) -> tuple[int | None, int | None]:
        return self.length, None


class Dense(Mask):
    """A bool tensor, True where visible.

    Args:
        tensor: bool, of 2 to 4 dims that broadcast to (B, H, Lq, Lk).
    """

    predicated = True
    tensor: Tensor

    def __init__(self, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Dense takes a bool tensor, got {type(tensor).__name__}")
        if tensor.dtype != torch.bool:
            raise TypeError(
                f"Dense takes a bool tensor (True = visible), got {tensor.dtype}. An additive float mask is a score: "
                "Bias(tensor); a 0/1 mask converts by .bool()"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"Dense takes a dense tensor, got one of layout {tensor.layout}; `.to_dense()` converts")
        if not 2 <= tensor.ndim <= 4:
            raise ValueError(f"Dense takes 2 to 4 dims (..., Lq, Lk), got shape {tuple(tensor.shape)}")
        self._set(tensor=tensor)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        rows, keys = self.tensor.shape[-2:]
        if (rows != 1 and rows != n_q) or (keys != 1 and keys != n_k):
            raise ValueError(
                f"Dense of shape {tuple(self.tensor.shape)} does not broadcast to (B, H, n_q, n_k) = (B, H, {n_q}, {n_k})"
            )
        predicate = DensePredicate(_four_dims(moved(self.tensor, device)))
        return LoweredMask(n_q, n_k, ((START, Bound(0, n_k)),), None, (predicate,))

    def sizes(self) -> tuple[int | None, int | None]:
        rows, keys = self.tensor.shape[-2:]
        return (None if rows == 1 else rows), (None if keys == 1 else keys)


class Custom(Mask):
    """A function of the coordinates: `torch_fn(b, h, q_idx, k_idx) -> bool`, FlexAttention's argument order.

    Args:
        torch_fn: takes int64 tensors that broadcast to (B, H, Lq, Lk) and returns a bool tensor that does. It must be
            importable by its name, so that an operator can name it: no lambda, no closure.
        triton_fn: the same as a `triton.jit` function on int tiles, or None.
        bounds: a mask outside of which nothing is visible; what its spans leave out is never computed.
    """

    predicated = True
    torch_fn: Callable[..., Tensor]
    triton_fn: Any
    bounds: Mask | None

    def __init__(self, torch_fn: Callable[..., Tensor], triton_fn: Any = None, bounds: Mask | None = None) -> None:
        if not torch.compiler.is_compiling():
            check_condition(torch_fn, "Custom torch_fn")
            if triton_fn is not None:
                check_condition(triton_fn, "Custom triton_fn")
            function_key(torch_fn)
        if bounds is not None and not isinstance(bounds, Mask):
            raise TypeError(f"Custom bounds must be a mask or None, got {type(bounds).__name__}")
        self._set(torch_fn=torch_fn, triton_fn=triton_fn, bounds=bounds, aligned=bounds is None or bounds.aligned)

    def lower(self, n_q: int, n_k: int, device: Any = "cpu") -> LoweredMask:
        check_lengths(n_q, n_k)
        predicate = CustomPredicate(self.torch_fn, self.triton_fn)
        if self.bounds is None:
            return LoweredMask(n_q, n_k, ((START, Bound(0, n_k)),), None, (predicate,))
        inside = self.bounds.lower(n_q, n_k, device)
        return LoweredMask(n_q, n_k, inside.spans, inside.rows, (*inside.predicates, predicate))

    def sizes(self) -> tuple[int | None, int | None]:
        return (None, None) if self.bounds is None else self.bounds.sizes()


def _four_dims(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.ndim)]

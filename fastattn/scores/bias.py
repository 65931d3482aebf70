"""Bias: any tensor that broadcasts to the scores, added; its gradient is summed over what was broadcast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..coords import Coordinates
from .base import Additive, DeviceGradient, apart, index_add, leading, plane_strides, wide_plane

if TYPE_CHECKING:
    from ..backends.tile import Tile


class Bias(Additive, built_in="bias"):
    """s -> s + bias[b, h, q, k].

    Rows and keys are looked up by coordinate, batch entry and head by storage index. -inf hides a key.

    Args:
        bias: floating point, broadcastable to (B, Hq, Lq, Lk), rank 0 to 4; may require a gradient. With coordinates its
            row and key dimensions are at least as long as the largest coordinate demands.

    Raises:
        TypeError, ValueError: bias is no such tensor.
    """

    def __init__(self, bias: Tensor) -> None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError(f"bias must be a floating point Tensor, got {getattr(bias, 'dtype', type(bias).__name__)}")
        if bias.dim() > 4:
            raise ValueError(f"bias must have at most 4 dimensions (batch, heads, rows, keys), got {tuple(bias.shape)}")
        self.params = (bias,)

    def validate(self, n_b: int, n_h: int, n_q: int, n_k: int, dtype: torch.dtype, device: torch.device) -> None:
        super().validate(n_b, n_h, n_q, n_k, dtype, device)
        b, h = self._four().shape[:2]
        if (b != 1 and b != n_b) or (h != 1 and h != n_h):
            raise self._unfit(f"broadcast to {(n_b, n_h, n_q, n_k)}")

    def check_coords(self, coords: Coordinates | None, n_b: int, n_h: int, n_q: int, n_k: int) -> None:
        rows, keys = self._four().shape[2:]
        if coords is None:
            if (rows != 1 and rows != n_q) or (keys != 1 and keys != n_k):
                raise self._unfit(f"broadcast to {(n_b, n_h, n_q, n_k)}")
            return
        for name, what, size, n in (("q", "rows", rows, n_q), ("k", "keys", keys, n_k)):
            reach = coords.reach(name, n)
            if size != 1 and reach is not None and not (reach[0] >= 0 and reach[1] < size):
                raise self._unfit(f"hold the {what} that coords.{name} names, {reach[0]} to {reach[1]}")

    def _unfit(self, demand: str) -> ValueError:
        return ValueError(f"bias must {demand}, got shape {tuple(self.params[0].shape)}")

    def _four(self) -> Tensor:
        bias = self.params[0]
        return bias[(None,) * (4 - bias.dim())]

    def canonical(self, n_b: int, n_h: int) -> Bias:
        return self.with_params((leading(self._four(), n_b, n_h, 2, "bias"),))

    def term(self, tile: Tile) -> Tensor:
        part = _along(_along(tile.heads(self.params[0]), 2, tile.q_range, tile.q, tile), 3, tile.k_range, tile.k, tile)
        return part.to(tile.dtype)

    def accumulate(self, grads: list[Tensor], g: Tensor, tile: Tile) -> None:
        target = tile.heads(grads[0])
        own_places = any(target.shape[d] > 1 and x.shape[0] > 1 for d, x in ((2, tile.q), (3, tile.k)))  # by batch entry
        dims = [d for d in range(int(own_places), 4) if target.shape[d] == 1 and g.shape[d] != 1]
        g = g.sum(dims, keepdim=True) if dims else g
        add_along(target, g, tile)

    def device_functions(self) -> tuple[Any, ...]:
        from ..kernels import scores

        return (scores.bias,)

    def device_functions_within(self, q: range, k: range) -> tuple[Any, ...]:
        from ..kernels import scores

        sizes = self.params[0].shape[2:]
        inside = all(n == 1 or 0 <= x.start <= x.stop <= n for n, x in zip(sizes, (q, k), strict=True))
        return (scores.bias_inside if inside else scores.bias,)

    def device_args(self) -> tuple[Any, ...]:
        bias = self.params[0]
        rows, keys = bias.shape[2:]
        return bias, plane_strides(bias), (apart(max(rows, 1)), apart(max(keys, 1))), wide_plane(bias)

    def device_gradient(self) -> DeviceGradient:
        from ..kernels import scores

        n_b, n_h, rows, keys = self.params[0].shape
        if rows > 1 and keys > 1:
            return DeviceGradient("tile", n_b > 1, n_h > 1, scores.ones, self._placed, anywhere=True, itself=True)
        shape = "keys" if keys > 1 else "rows"
        return DeviceGradient(shape, True, True, scores.ones, self._placed, anywhere=True)

    def _placed(self, sums: Tensor, q: int | Tensor, k: int | Tensor) -> Tensor:
        """The gradient from a kernel's sums of rows and keys at the coordinates q and k (of the first, or of all)."""
        _, _, rows, keys = shape = self.params[0].shape
        if sums.dim() == 3:
            sums = sums[:, :, None] if keys > 1 else sums[..., None]
        sums = _spread(sums, 2, rows, q)
        return _spread(sums, 3, keys, k).sum_to_size(shape)


def _spread(x: Tensor, dim: int, n: int, at: int | Tensor) -> Tensor:
    """x summed into n places along dim: from `at` on, or at the places `at` (B|1, size of x), clamped to those there are."""
    if n == 1:
        return x.sum(dim, keepdim=True)
    if isinstance(at, int) and at == 0 and n == x.shape[dim]:
        return x
    shape = list(x.shape)
    shape[dim] = n
    if not isinstance(at, Tensor):
        total = x.new_zeros(shape)
        total.narrow(dim, at, x.shape[dim]).copy_(x)
        return total
    lines, values = x.new_zeros(shape).movedim(dim, 1), x.movedim(dim, 1)  # (B|1, n, ..)
    entry = torch.arange(at.shape[0], device=x.device)[:, None]
    if at.shape[0] == 1:
        entry = torch.arange(x.shape[0], device=x.device)[:, None]
    return lines.index_put((entry, at.long().clamp(0, n - 1)), values, accumulate=True).movedim(1, dim)


def _along(x: Tensor, dim: int, part: slice | None, index: Tensor, tile: Tile) -> Tensor:
    """x at a tile's coordinates along its rows (dim 2) or keys (dim 3)."""
    if x.shape[dim] == 1:
        return x
    if part is not None:
        return x.narrow(dim, part.start, part.stop - part.start)
    flat = index.reshape(index.shape[0], -1).clamp(0, x.shape[dim] - 1)  # (B|1, n)
    if flat.shape[0] == 1:
        return x.index_select(dim, flat[0])
    shape = [flat.shape[0], x.shape[1], x.shape[2], x.shape[3]]
    at = flat[:, None, :, None] if dim == 2 else flat[:, None, None, :]
    shape[dim] = flat.shape[1]
    return x.expand(flat.shape[0], -1, -1, -1).gather(dim, at.expand(shape))


def add_along(target: Tensor, g: Tensor, tile: Tile) -> None:
    """target[.., tile's rows, tile's keys] += g; both (B|1, H|1, rows|1, keys|1)."""
    rows = slice(0, 1) if target.shape[2] == 1 else tile.q_range
    keys = slice(0, 1) if target.shape[3] == 1 else tile.k_range
    if rows is not None and keys is not None:
        target[:, :, rows, keys] += g
        return
    n_q, n_k = target.shape[2:]
    zero = torch.zeros((), dtype=torch.int64, device=target.device)
    q = (zero if n_q == 1 else tile.q.clamp(0, n_q - 1)) * n_k
    k = zero if n_k == 1 else tile.k.clamp(0, n_k - 1)
    at = (q + k).expand(-1, 1, *g.shape[2:]).flatten(1) if (q + k).dim() else (q + k).reshape(1, 1)  # (B|1, rows * keys)
    own = torch.zeros(target.shape, dtype=target.dtype, device=target.device).flatten(2)
    for b in range(g.shape[0]):
        index_add(own[b % own.shape[0]], 1, at[b % at.shape[0]], g[b].flatten(1))
    target += own.view(target.shape)

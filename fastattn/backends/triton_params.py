"""The gradients of the scores' parameters by the Triton backend, and the tangents of these gradients: kernels/grads.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import grads as kernels
from ..kernels.launch import Launch
from ..problem import Problem
from ..scores import Additive, Pointwise, Score
from ..scores.base import DeviceGradient
from ..scores.relative import diagonal_sums
from . import triton_call
from .facts import facts
from .triton_call import Call, cdiv, config, on_device
from .triton_tiles import tile_pass

PART = 8  # kernels/grads.py


class Moved(NamedTuple):
    """What the tangent of the gradients takes beside the gradients' own arguments."""

    operands: tuple[Tensor | None, ...]  # tangents of q, k, v and do
    strides: tuple[tuple[int, ...], ...]
    tlse: Tensor  # (B, H, n_pad)
    tdelta: Tensor
    scores: tuple[Any, ...]  # arguments of every modifier at its parameters' tangents


class Beside(NamedTuple):
    """The gradient of a bias that the pass over dq writes as it goes."""

    score: int  # index of the modifier
    grad: Tensor  # like its parameter
    partial: Tensor | None  # float32, where all batch entries share it and there are several; the gradient if that is float32

    def sums(self, n_b: int) -> tuple[Any, ...]:
        """The kernel's argument."""
        own = (self.grad, self.grad.stride(2))
        return own if self.partial is None else (*own, self.partial, n_b)


def params_by_torch(p: Problem) -> str | None:
    """Why the kernels do not sum the gradients of the scores' parameters, or None."""
    for score in p.scores:
        if len(score.params) > 1 or (score.params and score.device_gradient() is None):
            return f"score {score.name} does not say how kernels sum its gradient (device_gradient)"
    if misfit := triton_call.misfit(*facts(p)[:4], ("grads",)):
        return misfit
    return _scattered(p)


def _scattered(p: Problem) -> str | None:
    """Why coordinates of rows or keys that come from tensors are more than the kernels' sums can serve, or None."""
    given = _given(p)
    for score in p.scores if given else ():
        plan = _plan(p, score) if score.params else None
        if plan is not None and not plan.anywhere:
            return f"coordinates of rows or keys come from a tensor, and {score.name} sums along consecutive ones"
        if plan is not None and plan.shape == "tile" and not plan.keep_b and any(x.shape[0] > 1 for x in given):
            return f"coordinates differ by batch entry, and {score.name} is shared by all"
    return None


def _given(p: Problem) -> list[Tensor]:
    """The coordinates of rows and of keys that are tensors."""
    return [x for x in (p.coords.q, p.coords.k) if isinstance(x, Tensor)]


def _plan(p: Problem, score: Score) -> DeviceGradient | None:
    """How kernels sum the gradient of a score's parameter where p's rows and keys stand."""
    plan = score.device_gradient()
    return plan.elsewhere if plan is not None and plan.elsewhere is not None and _given(p) else plan


def beside_dq(p: Problem, call: Call) -> Beside | None:
    """What the pass over dq can write beside it, or None: the gradient of the first dense bias in a chain of Additives.

    Its elements are then those of the tiles that dq is summed from. Every tile has to be visited once, by one program: one
    span, no split head_dim; and with a sum over batch entries the same tiles in all of them.
    """
    if call.spans != 1 or any(isinstance(score, Pointwise) for score in p.scores) or not _at_zero(p, call):
        return None
    if min(p.n_q, p.n_k) == 0 or any(config(p, "dq", load).slices(call.dims[0]) > 1 for load in (None, "sums")):
        return None
    for i, score in enumerate(p.scores):
        plan = _plan(p, score) if score.params else None
        if plan is None or not plan.itself:
            continue
        param = score.params[0]
        shared = p.n_b > 1 and param.shape[0] == 1
        if tuple(param.shape[1:]) != (p.n_h, p.n_q, p.n_k) or (shared and not (p.mask.is_full or p.mask.is_causal)):
            continue
        make = torch.empty if p.mask.is_full else torch.zeros
        grad = make(param.shape, dtype=param.dtype, device=p.q.device)
        if not shared:
            return Beside(i, grad, None)
        return Beside(i, grad, grad if grad.dtype == torch.float32 else torch.empty_like(grad, dtype=torch.float32))
    return None


def _at_zero(p: Problem, call: Call) -> bool:
    """Whether rows and keys stand at their indices."""
    return not _given(p) and call.ints[4:] == (0, 0)


def param_grads(
    p: Problem, call: Call, do: Tensor, lse2: Tensor, delta: Tensor, moved: Moved | None = None, pushed: tuple[bool, ...] = (),
    beside: Beside | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradient of every Additive's parameter, but for what is there already, or its tangent along `moved`."""
    how = config(p, "grads" if moved is None else "jvp grads")
    found = []
    for i, score in enumerate(p.scores):
        if not score.params:
            continue
        if beside is not None and beside.score == i:
            found.append(beside.grad)
            continue
        assert isinstance(score, Additive)
        plan = _plan(p, score)
        assert plan is not None
        own = how
        if plan.shape == "diagonals":  # square tiles
            own = how._replace(block_q=min(how.block_q, how.block_k), block_k=min(how.block_q, how.block_k))
        n_table = score.params[0].shape[-1] if plan.shape == "table" else 1
        tiles, shape = _sums(p, plan, own, n_table)
        q_at, k_at = (x if isinstance(x, Tensor) else n for x, n in zip((p.coords.q, p.coords.k), call.ints[4:], strict=True))
        itself = plan.itself and _at_zero(p, call) and shape == list(score.params[0].shape)
        dtype = score.params[0].dtype if itself else torch.float32
        sums = torch.empty(shape, dtype=dtype, device=p.q.device)
        if sums.numel() == 0 or p.n_q == 0 or p.n_k == 0:
            found.append(torch.zeros_like(score.params[0]))
            continue
        with on_device(p.q):
            triton_call.run(
                kernels.score_grads, tiles * shape[0] * shape[1], own, *call.operands, do, lse2, delta, sums,
                tile_pass(call), score.device_args(), () if moved is None else tuple(moved), (*call.strides, do.stride()),
                p.scale, *call.ints, p.n_h, max(p.n_b_coords, 1), delta.shape[2], p.n_b, n_table, call.flags,
                call.predicates, call.chain, pushed, p.n_h // max(p.n_kv, 1), call.spans, own.dims(call.dims),
                (own.block_q, own.block_k), call.precision, i + 1, plan.weight, plan.entry, plan.shape, plan.keep_b,
                plan.keep_h,
            )  # fmt: skip
        if plan.shape == "diagonals":
            sums, q_at = _folded(sums, p.n_q, p.n_k), q_at + p.n_q - 1
        found.append(plan.finish(sums, q_at, k_at).to(score.params[0].dtype))
    return found


def _sums(p: Problem, plan: DeviceGradient, how: Launch, n_table: int) -> tuple[int, list[int]]:
    """(tiles of an entry and head, the shape of the kernel's sums)"""
    n_b, n_h = p.n_b if plan.keep_b else 1, p.n_h if plan.keep_h else 1
    q_tiles, k_tiles = cdiv(p.n_q, how.block_q), cdiv(p.n_k, how.block_k)
    if plan.shape == "tile":
        return q_tiles * k_tiles, [n_b, n_h, p.n_q, p.n_k]
    if plan.shape == "keys":
        return k_tiles, [n_b, n_h, p.n_k]
    if plan.shape == "rows":
        return q_tiles, [n_b, n_h, p.n_q]
    if plan.shape == "table":
        parts = cdiv(q_tiles, PART)
        return parts * cdiv(n_table, how.block_k), [n_b, n_h, parts, n_table]
    tiles = max(q_tiles + k_tiles - 1, 0)
    return tiles, [n_b, n_h, tiles, how.block_q, how.block_k]


def _folded(sums: Tensor, n_q: int, n_k: int) -> Tensor:
    """(.., tiles, n, n) -> (.., distances): sums by k - q, from 1 - n_q up, of tiles whose k - q grows by n."""
    n = sums.shape[-1]
    by_tile = torch.nn.functional.pad(diagonal_sums(sums.double()), (0, 1))  # (.., tiles, 2n): from 1 - n
    low, high = by_tile[..., :n], by_tile[..., n:]
    lines = torch.nn.functional.pad(low, (0, 0, 0, 1)) + torch.nn.functional.pad(high, (0, 0, 1, 0))
    return lines.flatten(-2).narrow(-1, cdiv(n_q, n) * n - n_q, n_q + n_k - 1)

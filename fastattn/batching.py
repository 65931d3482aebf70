"""vmap: a mapped dimension of any operator folds into the batch.

Every data tensor of an operator has an explicit leading batch dimension (B or 1), so mapping V samples is one call with a
batch of V * B. Where a gradient is made for a tensor, that tensor is given to every sample of its own first: gradients of
an unmapped parameter stay apart by sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import BWD, BWD_JVP, FWD, FWD_JVP, FWD_JVP2, LIB


def _batch_size(x: Tensor, dim: int | None) -> int:
    """The leading size of one sample of x."""
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


class _Folding:
    """Folds V samples of batch size n into one batch, and unfolds results."""

    def __init__(self, n_samples: int, n: int) -> None:
        self.n_samples, self.n = n_samples, n

    def full(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """x (B|1, ...) of every sample as (V * B, ...)."""
        if x is None:
            return None
        x = x.expand(self.n_samples, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.expand(self.n_samples, self.n, *x.shape[2:]).flatten(0, 1)

    def data(self, x: Tensor, dim: int | None) -> Tensor:
        """Like `full` for what gets no gradient: what is the same for all stays (1, ...)."""
        if dim is None and x.shape[0] == 1:
            return x
        folded = self.full(x, dim)
        assert folded is not None
        return folded

    def rng(self, rng: Tensor | None, dim: int | None, like: Tensor) -> Tensor:
        """(G, 2) keys as (V * G, 2); keys that nobody reads where there are none, for they also count the samples."""
        if rng is None:
            return torch.zeros((self.n_samples, 2), dtype=torch.int64, device=like.device)
        rng = rng.expand(self.n_samples, *rng.shape) if dim is None else rng.movedim(dim, 0)
        return rng.flatten(0, 1)

    def all(self, xs: Any, dims: Any) -> list[Tensor | None]:
        return [self.full(x, dim) for x, dim in zip(xs, _dims(xs, dims), strict=True)]

    def out(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.n_samples, self.n)) if x.numel() or x.dim() > 1 else x.expand(self.n_samples, 0)

    def grad(self, grad: Tensor, x: Tensor, dim: int | None) -> Tensor:
        """The gradient of x in every sample, summed over a batch dimension that x broadcast."""
        grad = self.out(grad)
        return grad.sum(1, keepdim=True) if _batch_size(x, dim) == 1 and self.n != 1 else grad

    def grads(self, result: Any, q, k, v, params, sinks, dims: tuple[Any, ...]) -> tuple[Any, Any]:
        """An operator's gradients and their out_dims, for inputs whose in_dims are (q, k, v, params, sinks)."""
        d_q, d_k, d_v, d_params, d_sinks = dims
        dq, dk, dv, dparams, dsinks = result
        with_params = zip(dparams, params, _dims(params, d_params), strict=True) if dparams else ()
        unfolded = (
            self.grad(dq, q, d_q),
            self.grad(dk, k, d_k),
            self.grad(dv, v, d_v),
            [self.grad(g, x, d) for g, x, d in with_params],
            [self.grad(g, sinks, d_sinks) for g in dsinks],
        )
        return unfolded, (0, 0, 0, [0] * len(dparams), [0] * len(dsinks))


def _dims(xs: Any, dims: Any) -> list[int | None]:
    return [None] * len(xs) if dims is None else list(dims)


def _fold_inputs(fold: _Folding, q, k, v, mask, params, sinks, rng, dims: Any) -> tuple[Any, ...]:
    d_q, d_k, d_v, d_mask, d_params, d_sinks, d_rng = dims
    return (
        fold.full(q, d_q), fold.full(k, d_k), fold.full(v, d_v),
        [fold.data(x, d) for x, d in zip(mask, _dims(mask, d_mask), strict=True)],
        fold.all(params, d_params), fold.full(sinks, d_sinks), fold.rng(rng, d_rng, q),
    )  # fmt: skip


def _fwd(info, dims, q, k, v, mask, params, sinks, rng, *statics):
    fold = _Folding(info.batch_size, _batch_size(q, dims[0]))
    result = FWD(*_fold_inputs(fold, q, k, v, mask, params, sinks, rng, dims[:7]), *statics)
    return tuple(fold.out(x) for x in result), (0, 0, 0)


def _outputs(fold: _Folding, out, lse, out_lo, dims: Any) -> tuple[Any, ...]:
    lo = fold.full(out_lo, dims[2]) if out_lo.dim() > 1 + (dims[2] is not None) else out_lo.new_empty(0)
    return fold.full(out, dims[0]), fold.full(lse, dims[1]), lo


def _bwd(info, dims, do, dlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo, *statics):
    fold = _Folding(info.batch_size, _batch_size(q, dims[2]))
    result = BWD(
        fold.full(do, dims[0]), fold.full(dlse, dims[1]),
        *_fold_inputs(fold, q, k, v, mask, params, sinks, rng, dims[2:9]),
        *_outputs(fold, out, lse, out_lo, dims[9:12]), *statics,
    )  # fmt: skip
    return fold.grads(result, q, k, v, params, sinks, (*dims[2:5], dims[6], dims[7]))


def _fold_tangents(fold: _Folding, tq, tk, tv, tparams, tsinks, dims: Any) -> tuple[Any, ...]:
    return (
        fold.full(tq, dims[0]), fold.full(tk, dims[1]), fold.full(tv, dims[2]),
        fold.all(tparams, dims[3]), fold.full(tsinks, dims[4]),
    )  # fmt: skip


def _fwd_jvp(
    info, dims, q, k, v, mask, params, sinks, rng, out, lse, out_lo, tq, tk, tv, tparams, tsinks, *statics
):  # fmt: skip
    fold = _Folding(info.batch_size, _batch_size(q, dims[0]))
    result = FWD_JVP(
        *_fold_inputs(fold, q, k, v, mask, params, sinks, rng, dims[:7]),
        *_outputs(fold, out, lse, out_lo, dims[7:10]),
        *_fold_tangents(fold, tq, tk, tv, tparams, tsinks, dims[10:15]), *statics,
    )  # fmt: skip
    return tuple(fold.out(x) for x in result), (0, 0)


def _bwd_jvp(
    info, dims, do, dlse, tdo, tdlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo,
    tq, tk, tv, tparams, tsinks, tout, tlse, *statics,
):  # fmt: skip
    fold = _Folding(info.batch_size, _batch_size(q, dims[4]))
    result = BWD_JVP(
        *(fold.full(x, d) for x, d in zip((do, dlse, tdo, tdlse), dims[:4], strict=True)),
        *_fold_inputs(fold, q, k, v, mask, params, sinks, rng, dims[4:11]),
        *_outputs(fold, out, lse, out_lo, dims[11:14]),
        *_fold_tangents(fold, tq, tk, tv, tparams, tsinks, dims[14:19]),
        fold.full(tout, dims[19]), fold.full(tlse, dims[20]), *statics,
    )  # fmt: skip
    return fold.grads(result, q, k, v, params, sinks, (*dims[4:7], dims[8], dims[9]))


def _fwd_jvp2(info, dims, q, k, v, mask, params, sinks, rng, out, lse, out_lo, *rest):
    fold = _Folding(info.batch_size, _batch_size(q, dims[0]))
    tangents, (tlse_one, tlse_two, *statics) = rest[:15], rest[15:]
    parts = [_fold_tangents(fold, *(*tangents[i : i + 5], dims[10 + i : 15 + i])) for i in (0, 5, 10)]
    result = FWD_JVP2(
        *_fold_inputs(fold, q, k, v, mask, params, sinks, rng, dims[:7]),
        *_outputs(fold, out, lse, out_lo, dims[7:10]), *(x for part in parts for x in part),
        fold.full(tlse_one, dims[25]), fold.full(tlse_two, dims[26]), *statics,
    )  # fmt: skip
    return tuple(fold.out(x) for x in result), (0, 0)


for _name, _rule in (
    ("fwd", _fwd), ("bwd", _bwd), ("fwd_jvp", _fwd_jvp), ("bwd_jvp", _bwd_jvp), ("fwd_jvp2", _fwd_jvp2),
):  # fmt: skip
    torch.library.register_vmap(f"fastattn::{_name}", _rule, lib=LIB)

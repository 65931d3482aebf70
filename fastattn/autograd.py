"""The verbs as operators, and how they differentiate each other.

    fwd        (out, lse) from the inputs                     torch.ops.fastattn.fwd
    bwd        gradients of the inputs                        .bwd
    fwd_jvp    tangents of (out, lse)                         .fwd_jvp
    bwd_jvp    tangents of bwd's gradients                    .bwd_jvp
    fwd_jvp2   tangents of fwd_jvp's tangents                 .fwd_jvp2

The Hessian of <w, (out, lse)> is symmetric, so the first four are closed under all of second order but the last:

    jvp of fwd            fwd_jvp
    vjp of bwd            fwd_jvp for its cotangents' gradient, bwd_jvp for the inputs'
    jvp of bwd            bwd_jvp, with the tangents of out and lse that are there already
    vjp of fwd_jvp        bwd_jvp for the inputs' gradient, bwd for the tangents'
    jvp of fwd_jvp        fwd_jvp2

and a third order raises. Each operator's Autograd kernel is an autograd.Function of our own: one node under
torch.compile, and every transform of torch.func passes. Functions track top-level tensors only, so lists are laid flat.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import compat, dispatch
from .problem import LOW, Problem, Tangents, ThreeTangents, empty_like_layout, empty_rows, parse, unpack, with_param_grads

LIB = torch.library.Library("fastattn", "DEF")
_STATICS = "str spec, float scale, float dropout_p, SymInt[] ints, float[] floats"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] mask, Tensor[] params, Tensor? sinks, Tensor? rng"
_OUTPUTS = "Tensor out, Tensor lse, Tensor out_lo"
_TANGENTS = "Tensor? tq, Tensor? tk, Tensor? tv, Tensor?[] tparams, Tensor? tsinks"
_MORE_TANGENTS = ", ".join(_TANGENTS.replace(" t", f" t{which}_") for which in ("two", "both"))
_GRADS = "(Tensor, Tensor, Tensor, Tensor[], Tensor[])"

for _schema in (
    f"fwd({_INPUTS}, {_STATICS}, bool train) -> (Tensor, Tensor, Tensor)",
    f"bwd(Tensor? do, Tensor? dlse, {_INPUTS}, {_OUTPUTS}, {_STATICS}) -> {_GRADS}",
    f"fwd_jvp({_INPUTS}, {_OUTPUTS}, {_TANGENTS}, {_STATICS}) -> (Tensor, Tensor)",
    f"bwd_jvp(Tensor? do, Tensor? dlse, Tensor? tdo, Tensor? tdlse, {_INPUTS}, {_OUTPUTS}, {_TANGENTS}, "
    f"Tensor? tout, Tensor? tlse, {_STATICS}) -> {_GRADS}",
    f"fwd_jvp2({_INPUTS}, {_OUTPUTS}, {_TANGENTS}, {_MORE_TANGENTS}, Tensor? tlse, Tensor? ttwo_lse, {_STATICS}) "
    "-> (Tensor, Tensor)",
):
    LIB.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

FWD = torch.ops.fastattn.fwd.default
BWD = torch.ops.fastattn.bwd.default
FWD_JVP = torch.ops.fastattn.fwd_jvp.default
BWD_JVP = torch.ops.fastattn.bwd_jvp.default
FWD_JVP2 = torch.ops.fastattn.fwd_jvp2.default


def attention_op(p: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem, differentiable."""
    packed = p.pack()
    plain = type(p.q) is Tensor and type(p.k) is Tensor and type(p.v) is Tensor and compat.nothing_watches()
    forward = _fwd_autograd if plain else FWD  # what FWD comes to, without one of its dispatches
    out, lse, _ = forward(
        p.q, p.k, p.v, packed.mask, packed.params, p.sinks, p.rng,
        packed.spec, p.scale, p.dropout_p, packed.ints, packed.floats, False,
    )  # fmt: skip
    return out, lse


# What runs on the device


def _grads_tuple(grads: Any) -> tuple[Any, ...]:
    return grads.q, grads.k, grads.v, list(grads.params), [] if grads.sinks is None else [grads.sinks]


def _fwd_device(q, k, v, mask, params, sinks, rng, spec, scale, dropout_p, ints, floats, train):
    p = unpack(q, k, v, mask, params, sinks, rng, spec, scale, dropout_p, ints, floats)
    return dispatch.working(p).forward(p, train)


def _bwd_device(do, dlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo, *statics):
    p = unpack(q, k, v, mask, params, sinks, rng, *statics)
    return _grads_tuple(dispatch.working(p).backward(p, do, dlse, out, lse, out_lo))


def _fwd_jvp_device(
    q, k, v, mask, params, sinks, rng, out, lse, out_lo, tq, tk, tv, tparams, tsinks, *statics
):  # fmt: skip
    p = unpack(q, k, v, mask, params, sinks, rng, *statics)
    return dispatch.working(p).forward_jvp(p, Tangents(tq, tk, tv, tparams, tsinks), out, lse, out_lo)


def _bwd_jvp_device(
    do, dlse, tdo, tdlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo,
    tq, tk, tv, tparams, tsinks, tout, tlse, *statics,
):  # fmt: skip
    p = unpack(q, k, v, mask, params, sinks, rng, *statics)
    t = Tangents(tq, tk, tv, tparams, tsinks)
    return _grads_tuple(
        dispatch.working(p).backward_jvp(p, t, do, dlse, tdo, tdlse, out, lse, out_lo, tout, tlse)
    )


def _fwd_jvp2_device(q, k, v, mask, params, sinks, rng, out, lse, out_lo, *rest):
    tangents, (tlse_one, tlse_two, *statics) = rest[:15], rest[15:]
    p = unpack(q, k, v, mask, params, sinks, rng, *statics)
    three = ThreeTangents(*(Tangents(*tangents[i : i + 5]) for i in (0, 5, 10)))
    return dispatch.working(p).forward_jvp2(p, three, out, lse, out_lo, tlse_one, tlse_two)


# What the shapes are


def _fwd_fake(q, k, v, mask, params, sinks, rng, spec, scale, dropout_p, ints, floats, train):
    shape = (q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    out = empty_like_layout(q, shape)
    lse = q.new_empty(shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return out, lse, empty_like_layout(q, shape) if train and q.dtype in LOW else q.new_empty(0)


def _grads_fake(q, k, v, params, sinks, spec):
    dparams = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in params] if parse(spec).param_grads else []
    dsinks = [] if sinks is None else [torch.empty(sinks.shape, dtype=sinks.dtype, device=sinks.device)]
    return (*(empty_rows(x, tuple(x.shape)) for x in (q, k, v)), dparams, dsinks)


def _bwd_fake(do, dlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo, spec, *statics):
    return _grads_fake(q, k, v, params, sinks, spec)


def _fwd_jvp_fake(q, k, v, mask, params, sinks, rng, out, lse, *rest):
    return empty_like_layout(q, tuple(out.shape)), lse.new_empty(lse.shape)


def _bwd_jvp_fake(do, dlse, tdo, tdlse, q, k, v, mask, params, sinks, rng, *rest):
    return _grads_fake(q, k, v, params, sinks, rest[-5])


# How they differentiate


class _Statics(NamedTuple):
    """What is no tensor, and how many of the flat tensors are the mask's and the parameters'."""

    n_mask: int
    n_params: int
    spec: str
    scale: float
    dropout_p: float
    ints: tuple[Any, ...]
    floats: tuple[float, ...]

    def tail(self, param_grads: bool = True) -> tuple[Any, ...]:
        """The operators' last arguments."""
        return with_param_grads(self.spec, param_grads), self.scale, self.dropout_p, list(self.ints), list(self.floats)

    def lists(self, flat: Any) -> tuple[list[Any], list[Any]]:
        """(mask, params) from [*mask, *params, ...]."""
        return list(flat[: self.n_mask]), list(flat[self.n_mask : self.n_mask + self.n_params])


def _statics(mask, params, spec, scale, dropout_p, ints, floats) -> _Statics:
    return _Statics(len(mask), len(params), spec, scale, dropout_p, tuple(ints), tuple(floats))


def _needs_function(tensors: Any) -> bool:
    """Whether a call must go through a Function: something needs a gradient, or a transform may be watching."""
    if compat.in_functorch() or compat.in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class _Fwd(torch.autograd.Function):
    @staticmethod
    def forward(s: _Statics, q, k, v, sinks, rng, *flat):
        mask, params = s.lists(flat)
        return compat.redispatch(FWD, q, k, v, mask, params, sinks, rng, *s.tail(), True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.s = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx, do, dlse, _):
        s = ctx.s
        if do is None and dlse is None:
            return (None,) * (6 + s.n_mask + s.n_params)
        q, k, v, sinks, rng, *flat, out, lse, out_lo = ctx.saved_tensors
        mask, params = s.lists(flat)
        wanted = s.n_params > 0 and any(ctx.needs_input_grad[6 + s.n_mask :])
        backward = _bwd_autograd if compat.nothing_watches() else BWD  # what BWD comes to, without one of its dispatches
        dq, dk, dv, dparams, dsinks = backward(
            do, dlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo, *s.tail(wanted)
        )
        dparams = dparams if wanted else [None] * s.n_params
        return (None, dq, dk, dv, dsinks[0] if dsinks else None, None, *[None] * s.n_mask, *dparams)

    @staticmethod
    def jvp(ctx, _, tq, tk, tv, tsinks, trng, *tflat):
        s = ctx.s
        # the tangents are arguments here: a tangent left on its primal as well would ask for a third order later
        q, k, v, sinks, rng, *flat, out, lse, out_lo = map(compat.primal, ctx.saved_tensors)
        mask, params = s.lists(flat)
        tparams = s.lists(tflat)[1]
        tout, tlse = FWD_JVP(
            q, k, v, mask, params, sinks, rng, out, lse, out_lo, tq, tk, tv, tparams, tsinks, *s.tail()
        )
        return tout, tlse, None


def _fwd_autograd(q, k, v, mask, params, sinks, rng, spec, scale, dropout_p, ints, floats, train):
    if not _needs_function((q, k, v, sinks, *params)):
        return compat.redispatch(FWD, q, k, v, mask, params, sinks, rng, spec, scale, dropout_p, ints, floats, train)
    s = _statics(mask, params, spec, scale, dropout_p, ints, floats)
    return compat.apply(_Fwd, s, q, k, v, sinks, rng, *mask, *params)


class _Bwd(torch.autograd.Function):
    """out, lse and out_lo are functions of the other inputs: the gradients here are total, and theirs None."""

    @staticmethod
    def forward(s: _Statics, do, dlse, q, k, v, sinks, rng, out, lse, out_lo, *flat):
        mask, params = s.lists(flat)
        dq, dk, dv, dparams, dsinks = compat.redispatch(
            BWD, do, dlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo, *s.tail(parse(s.spec).param_grads)
        )
        return (dq, dk, dv, *dparams, *dsinks)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.s = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, *cotangents):
        s = ctx.s
        if all(x is None for x in cotangents):
            return (None,) * (11 + s.n_mask + s.n_params)
        do, dlse, q, k, v, sinks, rng, out, lse, out_lo, *flat = ctx.saved_tensors
        mask, params = s.lists(flat)
        tq, tk, tv, tparams, tsinks = _structured(s, cotangents)
        inputs = (q, k, v, mask, params, sinks, rng, out, lse, out_lo)
        tangents = (tq, tk, tv, tparams, tsinks)
        tout, tlse = FWD_JVP(*inputs, *tangents, *s.tail())
        wanted = any(ctx.needs_input_grad[11 + s.n_mask :])
        if any(ctx.needs_input_grad[3:7]) or wanted:
            dq, dk, dv, dparams, dsinks = BWD_JVP(do, dlse, None, None, *inputs, *tangents, tout, tlse, *s.tail(wanted))
        else:
            dq = dk = dv = None
            dparams, dsinks = [], []
        dparams = dparams if wanted else [None] * s.n_params
        ddo, ddlse = (tout if do is not None else None), (tlse if dlse is not None else None)
        return (None, ddo, ddlse, dq, dk, dv, dsinks[0] if dsinks else None, *[None] * (4 + s.n_mask), *dparams)

    @staticmethod
    def jvp(ctx, _, tdo, tdlse, tq, tk, tv, tsinks, trng, tout, tlse, tout_lo, *tflat):
        s = ctx.s
        do, dlse, q, k, v, sinks, rng, out, lse, out_lo, *flat = ctx.saved_tensors
        mask, params = s.lists(flat)
        tparams = s.lists(tflat)[1]
        inputs = (q, k, v, mask, params, sinks, rng, out, lse, out_lo)
        tangents = (tq, tk, tv, tparams, tsinks)
        if (tout is None or tlse is None) and any(x is not None for x in (tq, tk, tv, tsinks, *tparams)):
            tout, tlse = FWD_JVP(*inputs, *tangents, *s.tail())
        wanted = parse(s.spec).param_grads
        grads = BWD_JVP(do, dlse, tdo, tdlse, *inputs, *tangents, tout, tlse, *s.tail(wanted))
        return (*grads[:3], *grads[3], *grads[4])


def _structured(s: _Statics, flat: Any) -> tuple[Any, Any, Any, list[Any], Any]:
    """bwd's flat results (or their cotangents) as (q, k, v, params, sinks), None where bwd gave none."""
    tq, tk, tv, *rest = flat
    if parse(s.spec).param_grads:
        tparams, rest = rest[: s.n_params], rest[s.n_params :]
    else:
        tparams = [None] * s.n_params
    return tq, tk, tv, list(tparams), rest[0] if rest else None


def _bwd_autograd(do, dlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo, *statics):
    if not _needs_function((do, dlse, q, k, v, sinks, *params)):
        return compat.redispatch(BWD, do, dlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo, *statics)
    s = _statics(mask, params, *statics)
    flat = compat.apply(_Bwd, s, do, dlse, q, k, v, sinks, rng, out, lse, out_lo, *mask, *params)
    n = s.n_params if parse(s.spec).param_grads else 0
    return flat[0], flat[1], flat[2], list(flat[3 : 3 + n]), list(flat[3 + n :])


class _FwdJvp(torch.autograd.Function):
    @staticmethod
    def forward(s: _Statics, q, k, v, sinks, rng, out, lse, out_lo, tq, tk, tv, tsinks, *flat):
        mask, params = s.lists(flat)
        tparams = list(flat[s.n_mask + s.n_params :])
        return compat.redispatch(
            FWD_JVP, q, k, v, mask, params, sinks, rng, out, lse, out_lo, tq, tk, tv, tparams, tsinks, *s.tail()
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.s = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx, do, dlse):
        s = ctx.s
        n_inputs = 13 + s.n_mask + 2 * s.n_params
        if do is None and dlse is None:
            return (None,) * n_inputs
        q, k, v, sinks, rng, out, lse, out_lo, tq, tk, tv, tsinks, *flat, tout, tlse = ctx.saved_tensors
        mask, params = s.lists(flat)
        tparams = list(flat[s.n_mask + s.n_params :])
        inputs = (q, k, v, mask, params, sinks, rng, out, lse, out_lo)
        grads: list[Any] = [None] * n_inputs
        first = 13 + s.n_mask  # of the parameters
        needs = ctx.needs_input_grad
        if any(needs[1:5]) or any(needs[first : first + s.n_params]):
            wanted = any(needs[first : first + s.n_params])
            dq, dk, dv, dparams, dsinks = BWD_JVP(
                do, dlse, None, None, *inputs, tq, tk, tv, tparams, tsinks, tout, tlse, *s.tail(wanted)
            )
            grads[1:5] = dq, dk, dv, dsinks[0] if dsinks else None
            if wanted:
                grads[first : first + s.n_params] = dparams
        last = first + s.n_params  # of the parameters' tangents
        if any(needs[9:13]) or any(needs[last:]):
            dq, dk, dv, dparams, dsinks = BWD(do, dlse, *inputs, *s.tail())
            grads[9:13] = dq, dk, dv, dsinks[0] if dsinks else None
            grads[last:] = dparams
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))

    @staticmethod
    def jvp(ctx, _, tq2, tk2, tv2, tsinks2, trng, tout2, tlse2, tout_lo, q12, k12, v12, sinks12, *tflat):
        s = ctx.s
        q, k, v, sinks, rng, out, lse, out_lo, tq, tk, tv, tsinks, *flat, _, tlse = map(compat.primal, ctx.saved_tensors)
        mask, params = s.lists(flat)
        n = s.n_mask + s.n_params
        inputs = (q, k, v, mask, params, sinks, rng, out, lse, out_lo)
        two = (tq2, tk2, tv2, s.lists(tflat)[1], tsinks2)
        if tlse2 is None and any(x is not None for x in (tq2, tk2, tv2, tsinks2, *two[3])):
            tlse2 = FWD_JVP(*inputs, *two, *s.tail())[1]
        both = (q12, k12, v12, list(tflat[n:]), sinks12)
        return FWD_JVP2(*inputs, tq, tk, tv, list(flat[n:]), tsinks, *two, *both, tlse, tlse2, *s.tail())


def _fwd_jvp_autograd(
    q, k, v, mask, params, sinks, rng, out, lse, out_lo, tq, tk, tv, tparams, tsinks, *statics
):  # fmt: skip
    if not _needs_function((q, k, v, sinks, *params, tq, tk, tv, tsinks, *tparams)):
        return compat.redispatch(
            FWD_JVP, q, k, v, mask, params, sinks, rng, out, lse, out_lo, tq, tk, tv, tparams, tsinks, *statics
        )
    s = _statics(mask, params, *statics)
    return compat.apply(
        _FwdJvp, s, q, k, v, sinks, rng, out, lse, out_lo, tq, tk, tv, tsinks, *mask, *params, *tparams
    )


_THIRD_ORDER = "attention has derivatives up to the second order; a third was asked for"


class _BwdJvp(torch.autograd.Function):
    @staticmethod
    def forward(
        s: _Statics, do, dlse, tdo, tdlse, q, k, v, sinks, rng, out, lse, out_lo, tq, tk, tv, tsinks, tout, tlse, *flat
    ):
        mask, params = s.lists(flat)
        tparams = list(flat[s.n_mask + s.n_params :])
        dq, dk, dv, dparams, dsinks = compat.redispatch(
            BWD_JVP, do, dlse, tdo, tdlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo,
            tq, tk, tv, tparams, tsinks, tout, tlse, *s.tail(parse(s.spec).param_grads),
        )  # fmt: skip
        return (dq, dk, dv, *dparams, *dsinks)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(_THIRD_ORDER)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_THIRD_ORDER)


def _bwd_jvp_autograd(
    do, dlse, tdo, tdlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo,
    tq, tk, tv, tparams, tsinks, tout, tlse, *statics,
):  # fmt: skip
    watched = (do, dlse, tdo, tdlse, q, k, v, sinks, *params, tq, tk, tv, tsinks, *tparams)
    if not _needs_function(watched):
        return compat.redispatch(
            BWD_JVP, do, dlse, tdo, tdlse, q, k, v, mask, params, sinks, rng, out, lse, out_lo,
            tq, tk, tv, tparams, tsinks, tout, tlse, *statics,
        )  # fmt: skip
    s = _statics(mask, params, *statics)
    flat = compat.apply(
        _BwdJvp, s, do, dlse, tdo, tdlse, q, k, v, sinks, rng, out, lse, out_lo,
        tq, tk, tv, tsinks, tout, tlse, *mask, *params, *tparams,
    )  # fmt: skip
    n = s.n_params if parse(s.spec).param_grads else 0
    return flat[0], flat[1], flat[2], list(flat[3 : 3 + n]), list(flat[3 + n :])


_LISTS = {3: "n_mask", 4: "n_params", 13: "n_params", 18: "n_params", 23: "n_params"}  # fwd_jvp2's arguments that are lists
_N_TENSORS = 27  # its arguments before the statics


def _nested(s: _Statics, flat: Any) -> list[Any]:
    """fwd_jvp2's arguments from their tensors in a row."""
    rest, arguments = iter(flat), []
    for i in range(_N_TENSORS):
        arguments.append([next(rest) for _ in range(getattr(s, _LISTS[i]))] if i in _LISTS else next(rest))
    return arguments


class _FwdJvp2(torch.autograd.Function):
    @staticmethod
    def forward(s: _Statics, *flat):
        return compat.redispatch(FWD_JVP2, *_nested(s, flat), *s.tail())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(_THIRD_ORDER)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_THIRD_ORDER)


def _fwd_jvp2_autograd(*args):
    tensors, statics = args[:_N_TENSORS], args[_N_TENSORS:]
    flat = [x for i, arg in enumerate(tensors) for x in (arg if i in _LISTS else [arg])]
    if not _needs_function(flat):
        return compat.redispatch(FWD_JVP2, *args)
    return compat.apply(_FwdJvp2, _statics(tensors[3], tensors[4], *statics), *flat)


# How much work they are: as torch counts its own attention, every key of every row, in the matrix products of one pass


def _flops(q_shape: Any, k_shape: Any, v_shape: Any, n_qk: int, n_v: int) -> int:
    """n_qk products over head_dim and n_v over v's, of q (B, Hq, Lq, Dk), k (B, Hkv, Lk, Dk), v (B, Hkv, Lk, Dv)."""
    n_b, n_h, n_q, head_dim = q_shape
    return 2 * n_b * n_h * n_q * k_shape[2] * (n_qk * head_dim + n_v * v_shape[3])


@register_flop_formula(torch.ops.fastattn.fwd)
def _fwd_flops(q, k, v, *args, **kwargs):
    return _flops(q, k, v, 1, 1)


@register_flop_formula(torch.ops.fastattn.bwd)
def _bwd_flops(do, dlse, q, k, v, *args, **kwargs):
    return _flops(q, k, v, 3, 2)


@register_flop_formula(torch.ops.fastattn.fwd_jvp)
def _fwd_jvp_flops(q, k, v, *args, **kwargs):
    return _flops(q, k, v, 3, 2)


@register_flop_formula(torch.ops.fastattn.bwd_jvp)
def _bwd_jvp_flops(do, dlse, tdo, tdlse, q, k, v, *args, **kwargs):
    return _flops(q, k, v, 7, 3 if tdo is None else 5)


@register_flop_formula(torch.ops.fastattn.fwd_jvp2)
def _fwd_jvp2_flops(q, k, v, *args, **kwargs):
    return _flops(q, k, v, 6, 4)


def _autocast(op: Any) -> Any:
    return lambda *args: compat.without_autocast(op, *args)


for _name, _op, _device, _fake, _autograd in (
    ("fwd", FWD, _fwd_device, _fwd_fake, _fwd_autograd),
    ("bwd", BWD, _bwd_device, _bwd_fake, _bwd_autograd),
    ("fwd_jvp", FWD_JVP, _fwd_jvp_device, _fwd_jvp_fake, _fwd_jvp_autograd),
    ("bwd_jvp", BWD_JVP, _bwd_jvp_device, _bwd_jvp_fake, _bwd_jvp_autograd),
    ("fwd_jvp2", FWD_JVP2, _fwd_jvp2_device, _fwd_jvp_fake, _fwd_jvp2_autograd),
):
    LIB.impl(_name, _device, "CompositeExplicitAutograd")
    LIB.impl(_name, _autograd, "Autograd")
    LIB.impl(_name, _autocast(_op), "AutocastCPU")
    LIB.impl(_name, _autocast(_op), "AutocastCUDA")
    if compat.HAS_BATCHED_GRADIENTS:
        LIB.impl(_name, functools.partial(compat.batched_gradients, _op), "Batched")
    torch.library.register_fake(f"fastattn::{_name}", _fake, lib=LIB)

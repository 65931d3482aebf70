"""The Triton backend: fused kernels (fastattn/kernels) for fp16, bf16 and fp32 on a GPU, or in Triton's interpreter.

What stands here is the host's part: a Problem as kernel arguments, launches, and the small sums that torch does as well.
Nothing waits for the device. Out and its statistics are those of every backend, so where a derivative has no kernel yet,
the tiled backend's torch operations take it up on the same device (`falls_back` says where and why).
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dropout import threshold
from ..kernels import backward as backward_kernels
from ..kernels import forward as forward_kernels
from ..kernels import grads as grad_kernels
from ..kernels import masks as mask_kernels
from ..kernels import shim
from ..kernels.launch import Launch, launch, padded, table_of
from ..masks import DensePredicate
from ..problem import LOW, Grads, Problem, Tangents, empty_like_layout, empty_rows
from ..scores import Additive, Pointwise, Score
from ..scores.base import on_device_too
from ..scores.relative import diagonal_sums
from . import blocked, tangents
from .operands import sink_weight, sum_rows_like

MAX_DIM = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
REACH = 1 << 31  # elements that an offset inside a tile can span
PAD = 128  # rows of the backward's statistics are padded to a multiple of the largest query tile


def supports(p: Problem) -> str | None:
    """Why this backend cannot run the call, or None."""
    reasons = refusals(p)
    return "; ".join(reasons) if reasons else None


def refusals(p: Problem) -> list[str]:
    """Every reason why this backend cannot run the call."""
    reasons = [] if shim.PRESENT else ["triton is not installed"]
    if p.q.device.type != "cuda" and not shim.INTERPRETED:
        reasons.append(f"the kernels run on cuda tensors, or with TRITON_INTERPRET=1 anywhere; these are on {p.q.device.type}")
    if p.q.dtype not in DTYPES:
        reasons.append(f"the kernels take float16, bfloat16 and float32, not {str(p.q.dtype)[6:]}")
    for name, dim in (("head_dim", p.q.shape[3]), ("v's head_dim", p.v_dim)):
        if not 1 <= dim <= MAX_DIM:
            reasons.append(f"the kernels take a {name} of 1 to {MAX_DIM}, not {dim}")
    for score in p.scores:
        if not on_device_too(type(score)):
            reasons.append(f"score {score.name} has no Triton functions (device_functions)")
    for predicate in p.mask.predicates:
        if not isinstance(predicate, DensePredicate) and predicate.triton_fn is None:
            reasons.append(f"the custom mask {predicate.key} has no triton_fn")
    return reasons


def falls_back(p: Problem) -> list[tuple[str, str]]:
    """(what, why) for the derivatives of p that torch operations compute."""
    found = [("tangent kernels", "forward mode and second order run as tiles of torch operations on the same device")]
    if p.scores and _params_by_torch(p):
        found.append(("gradient kernels for parameters", f"{_params_by_torch(p)}; torch operations sum them"))
    return found


def _params_by_torch(p: Problem) -> str | None:
    """Why the kernels do not sum the gradients of the scores' parameters, or None."""
    for score in p.scores:
        if score.params and score.device_gradient() is None:
            return f"score {score.name} does not say how kernels sum its gradient (device_gradient)"
    if isinstance(p.coords.q, Tensor) or isinstance(p.coords.k, Tensor):
        return "coordinates of rows or keys come from a tensor"
    return None


# Arguments


def architecture(device: torch.device) -> str:
    """The name of a device's architecture, as launch tables have it."""
    if shim.INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def precision() -> str:
    """How kernels multiply float32: torch's own setting, each step at least as exact as torch's matrix product."""
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses where its newer setting of the same thing was used
        setting = "medium" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[setting]


class Call(NamedTuple):
    """A Problem as the arguments that all kernels share."""

    data: tuple[Any, ...]  # of the mask, the coordinates, the scores and dropout
    flags: tuple[int, ...]  # what is static: of the spans (3), the coordinates (4) and dropout (2)
    predicates: tuple[Any, ...]
    chain: tuple[tuple[Any, ...], ...]
    ints: tuple[int, ...]  # n_q, n_k, start, stop, q_at, k_at
    spans: int
    dims: tuple[int, ...]
    precision: str
    operands: tuple[Tensor, Tensor, Tensor]
    strides: tuple[tuple[int, ...], ...]  # of q, k, v

    @property
    def rows(self) -> bool:
        return bool(self.flags[0])


def prepare(p: Problem) -> Call:
    """The arguments that every kernel of p takes."""
    mask, span_flags, predicates, spans, start, stop = _mask_args(p)
    coords, coord_flags, q_at, k_at = _coord_args(p)
    chain = tuple((isinstance(score, Pointwise), *_functions(score)) for score in p.scores)
    dropout, dropout_flags = _dropout_args(p, coord_flags, k_at)
    operands = reachable(p.q), reachable(p.k), reachable(p.v)
    dims = (p.q.shape[3], padded(p.q.shape[3]), p.v_dim, padded(p.v_dim))
    return Call(
        (mask, coords, tuple(score.device_args() for score in p.scores), dropout),
        (*span_flags, *coord_flags, *dropout_flags), predicates, chain,
        (p.n_q, p.n_k, start, stop, q_at, k_at),
        spans, dims, precision(), operands, tuple(x.stride() for x in operands),
    )  # fmt: skip


def _functions(score: Score) -> tuple[Any, ...]:
    functions = score.device_functions()
    assert functions is not None
    return functions


def reachable(x: Tensor) -> Tensor:
    """x, or a copy where the offsets inside a tile would not fit 32 bits."""
    return x.contiguous() if PAD * x.stride(2) + x.shape[3] * x.stride(3) >= REACH else x


def _mask_args(p: Problem) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[Any, ...], int, int, int]:
    """(mask, flags, predicates, spans, start, stop): kernels/masks.py."""
    data: list[Any] = []
    functions: list[Any] = []
    for predicate in p.mask.predicates:
        if isinstance(predicate, DensePredicate):
            x = predicate.tensor
            data.append((x.view(torch.uint8), _strides(x, 4)))
            functions.append(None)
        else:
            data.append(())
            functions.append(predicate.triton_fn)
    spans, rows = p.mask.spans, p.mask.rows
    if spans is None or len(spans) > 1:
        rows = p.mask.rows_tensors(p.q.device) if rows is None else rows
        a, b = (x if x.stride(3) == 1 else x.contiguous() for x in rows)
        b = b if b.stride() == a.stride() else b.contiguous()
        a = a if b.stride() == a.stride() else a.contiguous()
        strides = (*(a.stride(i) if a.shape[i] > 1 else 0 for i in (0, 1)), a.stride(2))
        return ((a, b, *strides), tuple(data)), (1, 0, 0), tuple(functions), a.shape[2], 0, 0
    ((start, stop),) = spans
    tensors = [x.const if isinstance(x.const, Tensor) else None for x in (start, stop)]
    strides = tuple(_strides(x, 1)[0] for x in tensors)
    ints = [0 if isinstance(x.const, Tensor) else max(-REACH // 2, min(int(x.const), REACH // 2)) for x in (start, stop)]
    flags = (0, int(start.row), int(stop.row))
    return ((*tensors, *strides), tuple(data)), flags, tuple(functions), 1, ints[0], ints[1]


def _coord_args(p: Problem) -> tuple[tuple[Any, ...], tuple[int, ...], int, int]:
    """(coords, flags, q_at, k_at): kernels/chain.py."""
    parts: list[Any] = []
    for x in p.coords.parts:
        if isinstance(x, Tensor):
            parts.append((x, *_strides(x, 2)))
        else:
            parts.append(int(x))
    flags = tuple(int(isinstance(x, tuple)) for x in parts)
    q_at, k_at = (0 if tensor else x for x, tensor in zip(parts[2:], flags[2:], strict=True))
    for i in (2, 3):
        parts[i] = parts[i] if flags[i] else 0
    return tuple(parts), flags, q_at, k_at


def _dropout_args(p: Problem, coord_flags: tuple[int, ...], k_at: int) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """(dropout, flags): kernels/dropout.py."""
    if p.dropout_p == 0.0:
        return (), (0, 0)
    assert p.rng is not None
    factor = 1.0 / (1.0 - p.dropout_p) if p.dropout_p < 1.0 else 0.0
    fours = not coord_flags[0] and not coord_flags[3] and k_at % 4 == 0
    word = min(threshold(p.dropout_p), (1 << 32) - 1)
    return (p.rng.contiguous(), p.n_b // p.rng.shape[0], word, factor), (1, int(fours))


def config(p: Problem, kernel: str) -> Launch:
    """The launch of a kernel for p."""
    chain = any(isinstance(score, Pointwise) for score in p.scores)
    arch = architecture(p.q.device)
    return launch(kernel, p.q.shape[3], p.v_dim, p.q.element_size(), arch, chain, p.n_q if kernel != "dkdv" else 1 << 30)


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """x's strides, 0 where one value serves all; zeros where there is no x."""
    return (0,) * dims if x is None else tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))


def on_device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def run(kernel: Any, programs: int, how: Launch, *args: Any, **constants: Any) -> None:
    """Launch a one-dimensional grid."""
    if programs > 0:
        kernel[(programs,)](*args, **constants, num_warps=how.num_warps, num_stages=how.num_stages)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def description(p: Problem) -> str:
    """The forward kernel and its tile, in words."""
    if not shim.PRESENT:
        return "fused Triton kernel"
    if shim.INTERPRETED:
        arch, note = "interpreter", "Triton's interpreter: for tests"
    else:
        arch = architecture(p.q.device)
        note = f"unmeasured on {arch}" + ("" if table_of(arch) == arch else f", with the tiles of {table_of(arch)}")
    how = config(p, "forward")
    tile = f"{how.block_q} x {how.block_k}, {how.num_warps} warps, {how.num_stages} stages"
    return f"fused Triton kernel, tiles of {tile} ({note})"


# Forward


def forward(p: Problem, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, out_lo): see `fastattn.backends`."""
    shape = (p.n_b, p.n_h, p.n_q, p.v_dim)
    out = empty_like_layout(p.q, shape)
    lse = p.q.new_empty(shape[:3], dtype=torch.float32)
    out_lo = empty_like_layout(p.q, shape) if train and p.q.dtype in LOW else None
    call, how = prepare(p), config(p, "forward")
    with on_device(p.q):
        run(
            forward_kernels.forward, cdiv(p.n_q, how.block_q) * p.n_b * p.n_h, how, *call.operands, out, out_lo, lse,
            p.sinks, call.data, (*call.strides, out.stride(), _strides(out_lo, 4), _strides(p.sinks, 2)), p.scale,
            *call.ints, p.n_h, max(p.n_b_coords, 1), call.flags, call.predicates, call.chain, p.n_h // max(p.n_kv, 1),
            call.spans, call.dims, (how.block_q, how.block_k), call.precision,
        )  # fmt: skip
    return out, lse, p.q.new_empty(0) if out_lo is None else out_lo


# Backward


class Statistics(NamedTuple):
    """What the backward's kernels know of rows beside their operands."""

    do: Tensor
    delta: Tensor  # (B, H, n_pad)
    lse2: Tensor
    dlse: Tensor | None


def statistics(p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor) -> Statistics:
    """delta and lse in base 2, by kernel."""
    do = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape) if do is None else reachable(do)
    n_pad = cdiv(p.n_q, PAD) * PAD
    delta, lse2 = (torch.empty(p.n_b, p.n_h, n_pad, dtype=torch.float32, device=out.device) for _ in range(2))
    low = out_lo if out_lo.numel() else None
    out = reachable(out)
    strides = (do.stride(), out.stride(), _strides(low, 4), _strides(dlse, 3))
    block = 16 if padded(p.v_dim) >= 256 else 64
    with on_device(p.q):
        run(
            backward_kernels.row_delta, n_pad // block * p.n_b * p.n_h, Launch(block, 0, 4, 1),
            do, out, low, lse, dlse, delta, lse2, strides, p.n_q, n_pad, p.n_h, p.v_dim, padded(p.v_dim), block,
        )  # fmt: skip
    return Statistics(do, delta, lse2, dlse)


def backward(p: Problem, do: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, out_lo: Tensor) -> Grads:
    """Gradients of q, k, v, the chain's parameters and the sinks."""
    dq, dk, dv = (empty_rows(x, tuple(x.shape)) for x in (p.q, p.k, p.v))
    call, rows = prepare(p), statistics(p, do, dlse, out, lse, out_lo)
    with on_device(p.q):
        _launch_dq(p, call, rows, dq)
        _launch_dkdv(p, call, rows, dk, dv)
    if not p.param_grads or not p.params:
        dparams = []
    elif _params_by_torch(p) is None:
        with on_device(p.q):
            dparams = _param_grads(p, call, rows)
    else:
        dparams = blocked.backward(p, do, dlse, out, lse, out_lo).params
    dsinks = None
    if p.sinks is not None:
        dsinks = sum_rows_like(-sink_weight(p, lse) * rows.delta[:, :, : p.n_q], p.sinks)
    return Grads(dq, dk, dv, dparams, dsinks)


def _launch_dq(p: Problem, call: Call, rows: Statistics, dq: Tensor) -> None:
    how = config(p, "dq")
    run(
        backward_kernels.backward_dq, cdiv(p.n_q, how.block_q) * p.n_b * p.n_h, how, *call.operands, rows.do, rows.lse2,
        rows.delta, rows.dlse, p.sinks, dq, call.data,
        (*call.strides, rows.do.stride(), dq.stride(), _strides(rows.dlse, 3), _strides(p.sinks, 2)), p.scale, *call.ints,
        p.n_h, max(p.n_b_coords, 1), rows.delta.shape[2], call.flags, call.predicates, call.chain, p.n_h // max(p.n_kv, 1),
        call.spans, call.dims, (how.block_q, how.block_k), call.precision,
        not any(isinstance(score, Pointwise) for score in p.scores),
    )  # fmt: skip


def _launch_dkdv(p: Problem, call: Call, rows: Statistics, dk: Tensor, dv: Tensor) -> None:
    how = config(p, "dkdv")
    run(
        backward_kernels.backward_dkdv, cdiv(p.n_k, how.block_k) * p.n_b * p.n_kv, how, *call.operands, rows.do, rows.lse2,
        rows.delta, dk, dv, call.data, _bounds(p, call, how.block_k),
        (*call.strides, rows.do.stride(), dk.stride(), dv.stride()), p.scale, *call.ints, p.n_kv, max(p.n_b_coords, 1),
        rows.delta.shape[2], call.flags, call.predicates, call.chain, p.n_h // max(p.n_kv, 1), call.spans, call.dims,
        (how.block_q, how.block_k), call.precision,
    )  # fmt: skip


def _bounds(p: Problem, call: Call, block_k: int) -> tuple[Any, ...]:
    """(table, entry and head strides in spans) of the rows that each key tile needs; empty for affine spans."""
    if not call.rows:
        return ()
    start, stop = call.data[0][0][:2]
    start, stop = start.contiguous(), stop.contiguous()
    n_b, n_h, spans, n_q = start.shape
    tiles = cdiv(p.n_k, block_k)
    bounds = torch.empty(n_b * n_h * spans, tiles, 4, dtype=torch.int32, device=start.device)
    how = Launch(0, block_k, 4, 1)
    run(mask_kernels.span_bounds, tiles * n_b * n_h * spans, how, start, stop, bounds, n_q, p.n_k, tiles, block_k, 256)
    return bounds, (n_h * spans if n_b > 1 else 0), (spans if n_h > 1 else 0)


def _param_grads(p: Problem, call: Call, rows: Statistics) -> list[Tensor]:
    """The gradient of every Additive's parameter."""
    how, found = config(p, "grads"), []
    for i, score in enumerate(p.scores):
        if not score.params:
            continue
        assert isinstance(score, Additive)
        plan = score.device_gradient()
        assert plan is not None
        q_tiles, k_tiles = cdiv(p.n_q, how.block_q), cdiv(p.n_k, how.block_k)
        block_k = how.block_q if plan.shape == "diagonals" else how.block_k
        n_b, n_h = p.n_b if plan.keep_b else 1, p.n_h if plan.keep_h else 1
        if plan.shape == "tile":
            tiles, shape = q_tiles * k_tiles, [n_b, n_h, p.n_q, p.n_k]
        elif plan.shape == "keys":
            tiles, shape = k_tiles, [n_b, n_h, p.n_k]
        elif plan.shape == "rows":
            tiles, shape = q_tiles, [n_b, n_h, p.n_q]
        else:
            tiles = max(q_tiles + cdiv(p.n_k, block_k) - 1, 0)
            shape = [n_b, n_h, tiles, how.block_q, block_k]
        sums = torch.empty(shape, dtype=torch.float32, device=p.q.device)
        if sums.numel() == 0 or p.n_q == 0 or p.n_k == 0:
            found.append(torch.zeros_like(score.params[0]))
            continue
        run(
            grad_kernels.score_grads, tiles * n_b * n_h, how, *call.operands, rows.do, rows.lse2, rows.delta, sums,
            call.data, score.device_args(), (*call.strides, rows.do.stride()), p.scale, *call.ints, p.n_h,
            max(p.n_b_coords, 1), rows.delta.shape[2], p.n_b, call.flags, call.predicates, call.chain,
            p.n_h // max(p.n_kv, 1), call.spans, call.dims, (how.block_q, block_k), call.precision, i + 1, plan.weight,
            plan.shape, plan.keep_b, plan.keep_h,
        )  # fmt: skip
        q_at, k_at = call.ints[4:]
        if plan.shape == "diagonals":
            sums, q_at = _folded(sums, p.n_q, p.n_k), q_at + p.n_q - 1
        found.append(plan.finish(sums, q_at, k_at).to(score.params[0].dtype))
    return found


def _folded(sums: Tensor, n_q: int, n_k: int) -> Tensor:
    """(.., tiles, n, n) -> (.., distances): sums by k - q, from 1 - n_q up, of tiles whose k - q grows by n."""
    n = sums.shape[-1]
    by_tile = torch.nn.functional.pad(diagonal_sums(sums.double()), (0, 1))  # (.., tiles, 2n): from 1 - n
    low, high = by_tile[..., :n], by_tile[..., n:]
    lines = torch.nn.functional.pad(low, (0, 0, 0, 1)) + torch.nn.functional.pad(high, (0, 0, 1, 0))
    return lines.flatten(-2).narrow(-1, cdiv(n_q, n) * n - n_q, n_q + n_k - 1)


# Second order and forward mode


def forward_jvp(p: Problem, t: Tangents, out: Tensor, lse: Tensor, out_lo: Tensor) -> tuple[Tensor, Tensor]:
    return tangents.forward_jvp(p, t, out, lse, out_lo)


forward_jvp2 = tangents.forward_jvp2
backward_jvp = tangents.backward_jvp

"""One attention call, described once: the same Problem reaches the front end, the operators and every backend.

The operators carry tensors, numbers and one string, never Python objects. `Problem.pack` turns the mask, the score chain
and the coordinates into those; `unpack` reads them back. Nothing else knows their order.

    spec = "m=<spans>|p=<predicates>|c=<coordinates>|s=<scores>|b=<backend>|d=<deterministic>|g=<param_grads>"

    deterministic 0, 1, or 2 where it is batch-invariant as well

    spans         "rows", or one "start-stop" per span; a bound is `i` (integer), `t` (a (B,) tensor), with `r` in front
                  when the row index is added
    predicates    "dense" or a custom function's key, separated by commas
    coordinates   one letter each for b, h, q, k: `0` (the storage index), `i` (plus an integer), `t` (a tensor)
    scores        key/#params/#ints/#floats/options, in the order in which they apply
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import scores
from .coords import Coordinates
from .masks import Bound, CustomPredicate, DensePredicate, LoweredMask
from .scores import Score

LOW = (torch.float16, torch.bfloat16)


class Tangents(NamedTuple):
    """Directions of the differentiable inputs; None stands for zero."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    params: list[Tensor | None]
    sinks: Tensor | None


class ThreeTangents(NamedTuple):
    """Tangents along a first direction, along a second, and of the first along the second."""

    one: Tangents
    two: Tangents
    both: Tangents


class Grads(NamedTuple):
    """Gradients of the differentiable inputs, or tangents of those gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    params: list[Tensor]
    sinks: Tensor | None


class Packed(NamedTuple):
    """What an operator is given beside q, k, v, sinks and rng."""

    mask: list[Tensor]
    params: list[Tensor]
    spec: str
    ints: list[int]
    floats: list[float]


@dataclass(frozen=True, eq=False)
class Problem:
    """A validated attention call.

    q (B, Hq, Lq, Dk), k (B, Hkv, Lk, Dk), v (B, Hkv, Lk, Dv); sinks (B|1, Hq) or None; rng int64 (G, 2) or None, where
    each of the G groups of B // G batch entries has its own dropout key (G > 1 only inside vmap).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: LoweredMask
    scores: tuple[Score, ...]
    sinks: Tensor | None
    rng: Tensor | None
    coords: Coordinates
    scale: float
    dropout_p: float
    backend: str
    deterministic: bool
    param_grads: bool = True  # whether a backward must give the gradients of the scores' parameters
    invariant: bool = False  # whether a row's bits may not depend on what stands beside its document: backends/pieces.py

    @property
    def n_b(self) -> int:
        return self.q.shape[0]

    @property
    def n_h(self) -> int:
        return self.q.shape[1]

    @property
    def n_kv(self) -> int:
        return self.k.shape[1]

    @property
    def n_q(self) -> int:
        return self.q.shape[2]

    @property
    def n_k(self) -> int:
        return self.k.shape[2]

    @property
    def v_dim(self) -> int:
        return self.v.shape[3]

    @property
    def acc_dtype(self) -> torch.dtype:
        return acc_dtype(self.q.dtype)

    @property
    def n_b_coords(self) -> int:
        """Batch entries that differ in their b coordinate: B, or B // G where vmap folded G samples into B."""
        return self.n_b if self.rng is None else self.n_b // self.rng.shape[0]

    @property
    def params(self) -> list[Tensor]:
        return [x for score in self.scores for x in score.params]

    def pack(self) -> Packed:
        """The call as operator arguments; see the module's docstring."""
        tensors: list[Tensor] = []
        ints: list[int] = []
        floats: list[float] = []
        spans = _pack_spans(self.mask, tensors, ints)
        predicates = _pack_predicates(self.mask, tensors)
        coords = "".join(_pack_index(x, tensors, ints) for x in self.coords.parts)
        chain = []
        for score in self.scores:
            ints.extend(score.ints)
            floats.extend(score.floats)
            chain.append(f"{score.spec_key()}/{len(score.params)}/{len(score.ints)}/{len(score.floats)}/{score.static}")
        repeats = 2 if self.invariant else int(self.deterministic)
        spec = f"m={spans}|p={predicates}|c={coords}|s={','.join(chain)}|b={self.backend}|d={repeats}|g=1"
        return Packed(tensors, self.params, spec, ints, floats)


def _pack_index(x: int | Tensor, tensors: list[Tensor], ints: list[int]) -> str:
    if isinstance(x, Tensor):
        tensors.append(x)
        return "t"
    if isinstance(x, int) and x == 0:
        return "0"
    ints.append(x)
    return "i"


def _pack_bound(bound: Bound, tensors: list[Tensor], ints: list[int]) -> str:
    kind = "r" if bound.row else ""
    if isinstance(bound.const, Tensor):
        tensors.append(bound.const)
        return kind + "t"
    ints.append(bound.const)
    return kind + "i"


def _pack_spans(mask: LoweredMask, tensors: list[Tensor], ints: list[int]) -> str:
    if mask.spans is None:
        assert mask.rows is not None
        tensors.extend(mask.rows)
        return "rows"
    return ",".join(_pack_bound(a, tensors, ints) + "-" + _pack_bound(b, tensors, ints) for a, b in mask.spans)


def _pack_predicates(mask: LoweredMask, tensors: list[Tensor]) -> str:
    keys = []
    for predicate in mask.predicates:
        if isinstance(predicate, DensePredicate):
            tensors.append(predicate.tensor)
            keys.append("dense")
        else:
            keys.append(predicate.key)
    return ",".join(keys)


class ScoreSpec(NamedTuple):
    key: str
    n_params: int
    n_ints: int
    n_floats: int
    static: str


class Spec(NamedTuple):
    """A spec string, parsed."""

    spans: tuple[tuple[str, str], ...] | None  # None: rows
    predicates: tuple[str, ...]
    coords: str
    scores: tuple[ScoreSpec, ...]
    backend: str
    deterministic: bool
    invariant: bool
    param_grads: bool


def with_param_grads(spec: str, wanted: bool) -> str:
    """The same call with or without gradients of the scores' parameters: without, `bwd` returns an empty list for them."""
    return spec[:-1] + ("1" if wanted else "0")


@functools.lru_cache(maxsize=1024)
def parse(spec: str) -> Spec:
    """Read a spec string. Pure, and the result holds strings and numbers only."""
    field = dict(part.split("=", 1) for part in spec.split("|"))
    spans = None if field["m"] == "rows" else tuple(tuple(s.split("-")) for s in field["m"].split(","))
    chain = []
    for item in filter(None, field["s"].split(",")):
        key, n_params, n_ints, n_floats, static = item.split("/")
        chain.append(ScoreSpec(key, int(n_params), int(n_ints), int(n_floats), static))
    predicates = tuple(filter(None, field["p"].split(",")))
    how = field["d"] != "0", field["d"] == "2", field["g"] == "1"
    return Spec(spans, predicates, field["c"], tuple(chain), field["b"], *how)  # type: ignore[arg-type]


def unpack(q, k, v, mask, params, sinks, rng, spec, scale, dropout_p, ints, floats) -> Problem:
    """The Problem behind an operator's arguments: the inverse of `Problem.pack`."""
    parsed = parse(spec)
    tensors, numbers = iter(mask), iter(ints)

    def bound(code: str) -> Bound:
        return Bound(int(code[0] == "r"), next(tensors) if code[-1] == "t" else next(numbers))

    def index(code: str) -> int | Tensor:
        return 0 if code == "0" else next(tensors) if code == "t" else next(numbers)

    if parsed.spans is None:
        spans, rows = None, (next(tensors), next(tensors))
    else:
        spans, rows = tuple((bound(a), bound(b)) for a, b in parsed.spans), None
    predicates = tuple(
        DensePredicate(next(tensors)) if key == "dense" else CustomPredicate.from_key(key)
        for key in parsed.predicates
    )
    lowered = LoweredMask(q.shape[2], k.shape[2], spans, rows, predicates)
    coords = Coordinates(*(index(code) for code in parsed.coords)) if parsed.coords != "0000" else IDENTITY
    chain, tail, reals = [], iter(params), iter(floats)
    for item in parsed.scores:
        chain.append(
            scores.resolve(item.key).bind(
                item.static,
                tuple(next(tail) for _ in range(item.n_params)),
                tuple(next(numbers) for _ in range(item.n_ints)),
                tuple(next(reals) for _ in range(item.n_floats)),
            )
        )
    return Problem(
        q, k, v, lowered, tuple(chain), sinks, rng, coords, scale, dropout_p,
        parsed.backend, parsed.deterministic, parsed.param_grads, parsed.invariant,
    )  # fmt: skip


IDENTITY = Coordinates()


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, statistics and sums for tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_like_layout(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, H, L, D) tensor on x's device in x's layout.

    (B, L, H, D) storage seen through a transpose where x's heads lie inside its rows, contiguous otherwise, so that a
    caller's `.transpose(1, 2).reshape(...)` after attention stays free of copies.
    """
    if _heads_inside(x, shape):
        return empty_rows(x, shape, dtype)
    return torch.empty(shape, dtype=x.dtype if dtype is None else dtype, device=x.device)


def empty_rows(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, H, L, D) tensor on x's device in (B, L, H, D) storage: the layout of every gradient, as of torch's."""
    b, h, n, d = shape
    return torch.empty((b, n, h, d), dtype=x.dtype if dtype is None else dtype, device=x.device).transpose(1, 2)


def rows_apart(x: Tensor) -> bool:
    """Whether no two rows of x (B, H, L, D) share a part: as views of `unfold` do, and kernels mistake."""
    dim, (b, h, n, _) = x.shape[3], x.stride()
    return (b >= dim and h >= dim and n >= dim) or all(s == 0 or s >= dim or m == 1 for s, m in zip((b, h, n), x.shape))


def has_layout(o: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether o is what `empty_like_layout(x, shape)` would be, told without making one."""
    _, h, n, d = shape
    wanted = (n * h * d, d, h * d, 1) if _heads_inside(x, shape) else (h * n * d, n * d, d, 1)
    return o.shape == shape and o.stride() == wanted


def _heads_inside(x: Tensor, shape: tuple[int, ...]) -> bool:
    return shape[1] > 1 and shape[2] > 1 and x.stride(1) < x.stride(2)

"""What a score modifier is: one step s -> s' on the way from scale * q . k to the logit.

    Pointwise   s -> f(s), with f' and f''
    Additive    s -> s + t(b, h, q, k; params), linear in its parameters
    General     s -> f(s; b, h, q, k, params) with its first derivative; no second order

A modifier is one class in one file. It sees coordinates, never storage indices, and a tile of scores at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import compat, naming
from ..coords import Coordinates

if TYPE_CHECKING:
    from ..backends.tile import Tile

S = TypeVar("S", bound="Score")
BUILT_IN: dict[str, type[Score]] = {}


class DeviceGradient(NamedTuple):
    """How kernels sum a parameter's gradient (kernels/grads.py has the shapes), and what torch makes of the sums."""

    shape: str  # "tile", "keys", "rows", "diagonals" or "table"
    keep_b: bool  # whether batch entries, and heads, get sums of their own
    keep_h: bool
    weight: Any  # Triton function of (at, args) that multiplies the gradient of the score
    # (sums, q, k) -> a tensor like the parameter; q and k are the coordinates of the sums' first row and key. Diagonals
    # come summed, as (B|1, H|1, distances), and the first is that of the last row q and the first key k. A table comes as
    # (B|1, H|1, parts, n), n the size of the parameter's last dimension.
    finish: Callable[[Tensor, Any, Any], Tensor]
    anywhere: bool = False  # whether q and k may be int tensors (B|1, n), the coordinates of all rows and of all keys
    entry: Any = None  # with "table", Triton function of (at, args): the entry, 0 to n - 1, that each pair adds to
    elsewhere: DeviceGradient | None = None  # what to do instead where q or k are tensors
    # whether sums of a tile's elements are the gradient itself where they have its shape and q and k are 0: weight is 1,
    # `finish` has nothing to do, and the sums are made in the parameter's dtype
    itself: bool = False


class Score:
    """A step of the score chain.

    A subclass sets in `__init__` what travels into the operators: `params` (tensors, which may require a gradient),
    `ints`, `floats`, and `static`, a short string of options without any of `,/|=`. Nothing else of an instance reaches a
    backend: it rebuilds the modifier with `bind`.
    """

    name: ClassVar[str] = ""
    order: ClassVar[int] = 2  # how many derivatives there are
    key: ClassVar[str] = ""
    params: tuple[Tensor, ...] = ()
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    static: str = ""

    def __init_subclass__(cls, built_in: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("name"):
            cls.name = cls.__name__
        if built_in is not None:
            cls.name = cls.key = built_in
            BUILT_IN[built_in] = cls
        else:
            cls.key = f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def bind(cls: type[S], static: str, params: tuple[Tensor, ...], ints: tuple[int, ...], floats: tuple[float, ...]) -> S:
        """The modifier with these contents, unchecked."""
        score = object.__new__(cls)
        score.static, score.params, score.ints, score.floats = static, params, ints, floats
        return score

    def with_params(self: S, params: tuple[Tensor, ...]) -> S:
        """The same modifier with other parameters of the same shapes."""
        return self.bind(self.static, params, self.ints, self.floats)

    def validate(self, n_b: int, n_h: int, n_q: int, n_k: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise where the modifier does not fit a call of these sizes."""
        if type(self).key not in BUILT_IN:
            require_importable(type(self))
            if not isinstance(self.static, str) or set(self.static) & set(",/|="):
                raise ValueError(f"static of {self.name} must be a string without any of , / | =, got {self.static!r}")
        for x in self.params:
            if not x.is_floating_point():
                raise TypeError(f"{self.name} takes floating point parameters, got {x.dtype}")
            if x.device != device:
                raise ValueError(f"the parameters of {self.name} must be on q's device {device}, got {x.device}")

    def check_coords(self, coords: Coordinates | None, n_b: int, n_h: int, n_q: int, n_k: int) -> None:
        """Raise where the parameters do not hold an entry for every coordinate; None is the storage indices."""

    def canonical(self: S, n_b: int, n_h: int) -> S:
        """The modifier with parameters that have explicit leading dimensions (B|1, H|1)."""
        return self

    @classmethod
    def spec_key(cls) -> str:
        """The name by which an operator finds the class again: a short one, or `module:qualname#hash`."""
        return cls.key if cls.key in BUILT_IN else _source_key(cls)

    def device_functions(self) -> tuple[Any, ...] | None:
        """The same modifier as Triton functions, or None where there are none.

        Of a Pointwise (value, first, second): f, f' and f'' as functions of (s, args). Of an Additive (term,): t as a
        function of (at, args), at = (b, h, q, k, entry, head): coordinates, then the storage indices of parameters.
        """
        return None

    def device_functions_within(self, q: range, k: range) -> tuple[Any, ...] | None:
        """`device_functions` of a call whose rows and keys have these coordinates; they may be faster."""
        return self.device_functions()

    def device_args(self) -> tuple[Any, ...]:
        """`args` of the Triton functions: tensors, ints and floats, in nested tuples."""
        return (*self.params, *self.ints, *self.floats)

    def device_gradient(self) -> DeviceGradient | None:
        """How kernels sum the gradient of the one parameter; None: it takes torch operations."""
        return None

    def __repr__(self) -> str:
        parts = [f"<{tuple(x.shape)}>" for x in self.params] + [str(x) for x in (*self.ints, *self.floats)]
        return f"{type(self).__name__}({', '.join(parts + ([self.static] if self.static else []))})"


class Pointwise(Score):
    """s -> f(s) for each element. A subclass gives `value`, and `derivs` where it knows better than autograd."""

    def value(self, s: Tensor) -> Tensor:
        """f(s), in torch operations."""
        raise NotImplementedError(f"{type(self).__name__} does not define value()")

    def derivs(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(f(s), f'(s), f''(s))"""
        with compat.autograd_inside_operators():
            s = s.detach().requires_grad_()
            f = self.value(s)
            (first,) = torch.autograd.grad(f.sum(), s, create_graph=True)
            second = torch.zeros_like(s)
            if first.requires_grad:
                (second,) = torch.autograd.grad(first.sum(), s, allow_unused=True, materialize_grads=True)
        return f.detach(), first.detach(), second


class Additive(Score):
    """s -> s + t. A subclass gives `term`, and `accumulate` where it knows better than autograd.

    t is linear in the parameters; what is not is a General.
    """

    def term(self, tile: Tile) -> Tensor:
        """t on a tile, in torch operations: broadcastable to (B, H, rows, keys), in tile.dtype. Uses self.params."""
        raise NotImplementedError(f"{type(self).__name__} does not define term()")

    def accumulate(self, grads: list[Tensor], g: Tensor, tile: Tile) -> None:
        """grads[i] += the gradient of sum(g * t) by params[i].

        Args:
            grads: zeros or earlier sums, shaped like params, in tile.dtype.
            g: (B, H, rows, keys)
        """
        with compat.autograd_inside_operators():
            params = _leaves(self.params, tile)
            term = self.with_params(params).term(tile)
            found = torch.autograd.grad(term, params, g.sum_to_size(term.shape), allow_unused=True)
        _add(grads, found)


class General(Score):
    """s -> f(s, tile), each element of its own. First order only. A subclass gives `value`, the rest where it knows better."""

    order = 1

    def value(self, s: Tensor, tile: Tile) -> Tensor:
        """f, in torch operations: of s's shape. Uses self.params."""
        raise NotImplementedError(f"{type(self).__name__} does not define value()")

    def derivs(self, s: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """(f, df/ds)"""
        with compat.autograd_inside_operators():
            s = s.detach().requires_grad_()
            f = self.value(s, tile)
            (first,) = torch.autograd.grad(f.sum(), s, allow_unused=True, materialize_grads=True)
        return f.detach(), first

    def accumulate(self, grads: list[Tensor], g: Tensor, s: Tensor, tile: Tile) -> None:
        """grads[i] += the gradient of sum(g * f(s, tile)) by params[i]."""
        with compat.autograd_inside_operators():
            params = _leaves(self.params, tile)
            f = self.with_params(params).value(s.detach(), tile)
            found = torch.autograd.grad(f, params, g, allow_unused=True)
        _add(grads, found)


def _leaves(params: tuple[Tensor, ...], tile: Tile) -> tuple[Tensor, ...]:
    return tuple(x.detach().to(tile.dtype).requires_grad_() for x in params)


def _add(grads: list[Tensor], found: tuple[Tensor | None, ...]) -> None:
    for total, part in zip(grads, found, strict=True):
        if part is not None:
            total += part


@compat.constant_in_graphs
def require_importable(cls: type[Score]) -> None:
    """Raise unless `cls` can be found again by its name: an operator carries the name, not the class.

    Raises:
        ValueError: the class was defined inside a function, or its name means something else.
    """
    if not naming.means(cls.__module__, cls.__qualname__, cls):
        raise ValueError(
            f"score class {cls.__module__}:{cls.__qualname__} cannot be imported by that name; define it at the top level "
            "of a module and pass what it closed over as params, ints, floats or static"
        )


@compat.constant_in_graphs
def _source_key(cls: type[Score]) -> str:
    """`module:qualname#hash` of a user's class, so that compiled graphs do not outlive an edit of its source."""
    return f"{cls.key}#{naming.source_hash(cls)}"  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def resolve(key: str) -> type[Score]:
    """The class behind a key: a built-in's short name, or `module:qualname` with or without `#hash`."""
    if key in BUILT_IN:
        return BUILT_IN[key]
    return naming.find(*key.split("#")[0].split(":"))


def leading(x: Tensor, n_b: int, n_h: int, rank: int, what: str) -> Tensor:
    """x (..., rank own dimensions) with leading (B|1, H|1) dimensions.

    Raises:
        ValueError: the leading dimensions do not fit n_b batch entries and n_h heads.
    """
    extra = x.dim() - rank
    shape = tuple(x.shape[: max(extra, 0)])
    full = (1,) * (2 - len(shape)) + shape
    if extra < 0 or extra > 2 or (full[0] != 1 and full[0] != n_b) or (full[1] != 1 and full[1] != n_h):
        own = ", ..." if rank else ""
        raise ValueError(
            f"{what} must have leading dimensions (batch, heads) of ({n_b} or 1, {n_h} or 1{own}), got {tuple(x.shape)}"
        )
    return x.reshape(*full, *x.shape[max(extra, 0) :])


@compat.constant_in_graphs
def on_device_too(cls: type[Score]) -> bool:
    """Whether a modifier's Triton functions say what its torch operations say.

    They do not where a subclass changes the operations only: there the functions are its parent's.
    """

    def definer(name: str) -> int:
        return next((i for i, c in enumerate(cls.__mro__) if name in c.__dict__), len(cls.__mro__))

    own = definer("device_functions")
    return own < cls.__mro__.index(Score) and all(own <= definer(name) for name in ("value", "derivs", "term"))


def wide_plane(x: Tensor) -> int | None:
    """1 where an offset inside one (rows, keys) plane of x needs 64 bits: kernels compile another address for it."""
    reach = sum((n - 1) * s for n, s in zip(x.shape[2:], x.stride()[2:], strict=True))
    return None if reach < 1 << 31 else 1


def apart(n: int) -> tuple[int, int]:
    """n as a sum of two that Triton takes for nothing special.

    It compiles anew for an integer that is 1 or begins to be a multiple of 16, and sizes do so all the time.
    """
    extra = 3 if n % 16 != 13 else 5
    return n + extra, -extra


def plane_strides(x: Tensor) -> tuple[Any, ...]:
    """The strides of x (B|1, H|1, rows|1, keys|1) for kernels: two pairs that add up, then two numbers.

    0 where one value serves all. That planes begin at a multiple of 16 is no secret where their rows do as well, and loads
    can be wide; elsewhere it depends on the sizes and helps nothing.
    """
    lead = lead_strides(x)
    row, key = (stride if n > 1 else 0 for n, stride in zip(x.shape[2:], x.stride()[2:], strict=True))
    wide = row % 16 == 0 and all(stride % 16 == 0 for stride in lead)
    return (*((stride, 0) if wide else apart(stride) for stride in lead), row, key)


def lead_strides(x: Tensor) -> tuple[int, int]:
    """Strides of the leading (B|1, H|1) dimensions, 0 where one value serves all."""
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def index_add(target: Tensor, dim: int, index: Tensor, values: Tensor) -> None:
    """target[.., index, ..] += values along dim, for indices that repeat: in one order, which CUDA's index_add_ has not."""
    if target.is_cuda:
        put_in_order(target, dim, index, values)
    else:
        target.index_add_(dim, index, values)


def put_in_order(target: Tensor, dim: int, index: Tensor, values: Tensor) -> None:
    """`index_add` by what sorts the indices on CUDA."""
    target.movedim(dim, 0).index_put_((index,), values.movedim(dim, 0), accumulate=True)

"""What is in registers, in the simulator of Gluon kernels: tiles, scalars and pointers."""

import operator
import types

import torch
from gluon_engine import Fault, line


class Tile:
    """A tensor in registers, or a scalar. What is computed is new, and integers divide towards zero, as in Triton."""

    def __init__(self, d):
        self.d = d

    shape = property(lambda self: list(self.d.shape))
    dtype = property(lambda self: self.d.dtype)
    type = property(lambda self: self)
    layout = property(lambda self: Layout())
    T = property(lambda self: Tile(self.d.T))

    def __bool__(self):
        return bool(self.d)

    def __index__(self):
        return int(self.d)

    def __neg__(self):
        return Tile(-self.d)

    def __invert__(self):
        return Tile(~torch.as_tensor(self.d))

    def __getitem__(self, index):
        return Tile(self.d[index])

    def __floordiv__(self, other):
        other = raw(other)
        if isinstance(self.d, int) and isinstance(other, int):
            return Tile(abs(self.d) // abs(other) * (1 if (self.d < 0) == (other < 0) else -1))
        return Tile(torch.div(self.d, other, rounding_mode="trunc"))

    def __mod__(self, other):
        return self - self // other * other

    def to(self, dtype, bitcast=False):
        if isinstance(self.d, torch.Tensor):
            return Tile(self.d.view(dtype) if bitcast else self.d.to(dtype))
        return Tile(float(self.d) if dtype.is_floating_point else int(self.d))

    def reshape(self, *shape):
        return Tile(self.d.reshape(*map(int, shape[0] if isinstance(shape[0], (list, tuple)) else shape)))

    def permute(self, *order):
        return Tile(self.d.permute(*(order[0] if isinstance(order[0], (list, tuple)) else order)))

    def split(self):
        return Tile(self.d[..., 0]), Tile(self.d[..., 1])


def _operator(name):
    function = getattr(operator, name if name not in ("and", "or") else name + "_")
    setattr(Tile, f"__{name}__", lambda a, b: NotImplemented if isinstance(b, Pointer) else Tile(function(a.d, raw(b))))
    setattr(Tile, f"__r{name}__", lambda a, b: Tile(function(raw(b), a.d)))


for _name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"):
    _operator(_name)
Tile.__hash__ = None


def raw(x):
    return x.d if isinstance(x, Tile) else x


def both(a, b):
    a, b = raw(a), raw(b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        like = a if isinstance(a, torch.Tensor) else b
        a, b = (x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=like.dtype) for x in (a, b))
    return a, b


def choose(number, tensor):
    def function(a, b):
        a, b = both(a, b)
        return Tile(tensor(a, b) if isinstance(a, torch.Tensor) else number(a, b))

    return function


def mathematical(function):
    return lambda x: Tile(function(torch.as_tensor(raw(x), dtype=torch.float32)))


def where(condition, a, b):
    condition = raw(condition)
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    return Tile(torch.where(condition, *both(a, b)))


def reduction(tensor):
    def function(x, axis=None, keep_dims=False):
        return Tile(tensor(x.d) if axis is None else tensor(x.d, dim=axis, keepdim=keep_dims))

    return function


class Layout:
    """Stands for every layout: the simulator has none."""

    def __init__(self, *_, **__):
        pass


class Pointer:
    """Into a tensor's storage."""

    def __init__(self, x, offset=None):
        self.x = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0) if offset is None else x
        self.offset = x.storage_offset() if offset is None else offset

    dtype = property(lambda self: types.SimpleNamespace(element_ty=self.x.dtype))

    def __add__(self, other):
        return Pointer(self.x, self.offset + raw(other))

    __radd__ = __add__

    def element_mask(self, mask):
        """(offsets, mask), with every offset under the mask inside the tensor."""
        at = torch.as_tensor(self.offset)
        mask = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(raw(mask)).broadcast_to(at.shape)
        used = at[mask]
        if used.numel() and (used.min() < 0 or used.max() >= self.x.numel()):
            raise Fault(f"a pointer leaves its tensor at {line()}")
        return at, mask


def load(pointer, mask=None, other=0):
    at, mask = pointer.element_mask(mask)
    found = typed(other, pointer.x.dtype).broadcast_to(at.shape).clone()
    found[mask] = pointer.x[at[mask]]
    return Tile(found if at.ndim else found.item())


def store(pointer, value, mask=None):
    at, mask = pointer.element_mask(mask)
    pointer.x[at[mask]] = typed(value, pointer.x.dtype).broadcast_to(at.shape)[mask]


def typed(x, dtype):
    return torch.as_tensor(raw(x)).to(dtype)

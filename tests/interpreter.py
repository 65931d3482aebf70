"""Triton's interpreter without work that leads nowhere: three quarters of a suite's time.

It replaces the functions of triton.language at the beginning of a launch, and once more at every device function inside, where
all of them are found replaced already; it makes a table of dtypes for every value; it adds up integers a second time to find an
overflow that it then does not report; and it checks, names and wraps a shape anew for every value that has it.
"""

import functools

from triton.runtime import interpreter


class Nothing:
    def restore(self):
        pass


class Remembered:
    """What one launch replaced; when it is restored, the next launch replaces it anew."""

    def __init__(self, scope, done, modules):
        self.scope, self.done, self.modules = scope, done, modules

    def restore(self):
        self.scope.restore()
        self.done -= self.modules


def install():
    """Make this process's interpreter work so, where it is one of those that this is written for."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    take_scalars_of_any_rank()
    patch, done, nothing = interpreter._patch_lang, set(), Nothing()

    @functools.cache
    def languages(fn):
        known = {id(interpreter.tl), id(interpreter.tl.core)}
        return frozenset(known & {id(value) for value in fn.__globals__.values()})

    def patch_once(fn):
        modules = languages(fn)
        if modules <= done:
            return nothing
        added = modules - done
        done.update(added)
        return Remembered(patch(fn), done, added)

    numpy_dtype = interpreter._get_np_dtype
    of_scalar = functools.cache(numpy_dtype)

    def remembered_dtype(dtype):
        scalar = dtype.scalar
        return numpy_dtype(scalar) if isinstance(scalar, interpreter.tl.pointer_type) else of_scalar(scalar)

    if not interpreter.interpreter_builder.options.debug:  # what it computes to find an overflow of integers goes nowhere then
        object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = remembered_dtype
    interpreter.TensorHandle.__post_init__ = lambda self: None  # what it checks is the interpreter's own work
    remember_shapes(interpreter.tl.core)
    skip_what_is_alike(interpreter.TritonSemantic)


def take_scalars_of_any_rank():
    """Triton 3.6 makes an index of an array of one element, which numpy since 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def skip_what_is_alike(semantic):
    """Spread operands over each other's shape only where they differ in it, and settle once what two types give."""
    broadcast, common = semantic.broadcast_impl_value, semantic.computation_type_impl
    types = {}

    def broadcast_unless_alike(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        alike = a.shape.values == b.shape.values if a.is_block() and b.is_block() else not (a.is_block() or b.is_block())
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    def remembered_type(self, *arguments):
        if arguments not in types:
            types[arguments] = common(self, *arguments)
        return types[arguments]

    semantic.broadcast_impl_value, semantic.computation_type_impl = broadcast_unless_alike, remembered_type


def remember_shapes(core):
    """Make what a block's type, a tensor and a tuple know of themselves once for every shape, or when somebody asks."""
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    types, tensors, attribute = {}, {}, core.tuple.__getattr__

    def block_type(self, element_ty, shape):
        key = (id(element_ty), *shape)
        known = types.get(key)
        if known is None:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)  # which keeps element_ty alive, and its id its own
        else:
            self.__dict__.update(known)

    def tensor(self, handle, type):
        key = type.shape if type.is_block() else None
        known = tensors.get(id(key))
        if known is None:
            make_tensor(self, handle, type)
            tensors[id(key)] = key, self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            _, self.shape, self.numel = known

    def values(self, args, type=None):
        self.values = list(args)
        if type is not None:
            self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)

    def type_of_values(self, name):
        if name != "type":
            return attribute(self, name)
        self.type = core._type_for_tuple_values(self.values)
        return self.type

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.tuple.__init__, core.tuple.__getattr__ = values, type_of_values

"""Triton's interpreter without work that leads nowhere: two thirds of a suite's time.

It replaces the functions of triton.language at the beginning of a launch, and once more at every device function inside, where
all of them are found replaced already; it makes a table of dtypes for every value; and it adds up integers a second time to
find an overflow that it then does not report.
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

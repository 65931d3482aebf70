"""How a user's function or class travels through an operator: by name, with a hash of what it does.

Operators carry strings, so a graph that was compiled, saved and loaded finds the code again by `module:qualname#hash`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
from types import CodeType
from typing import Any


def find(module: str, qualname: str) -> Any:
    """What `qualname` means in `module` now, imported where needed.

    Raises:
        ImportError, AttributeError: nothing.
    """
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def means(module: str, qualname: str, thing: Any) -> bool:
    """Whether that name means `thing`."""
    try:
        return find(module, qualname) is thing
    except (ImportError, AttributeError, ValueError):
        return False


@functools.lru_cache(maxsize=1024)
def source_hash(thing: Any) -> str:
    """Eight hex digits that change with the source of a function or class.

    Where there is none to read (a session at the prompt, `exec`), they change with its code and constants.
    """
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError):
        text = repr(_code(thing))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _code(thing: Any) -> Any:
    """Everything that decides what code does, as nested tuples that print the same in every process."""
    if isinstance(thing, CodeType):
        return thing.co_name, thing.co_code, thing.co_names, tuple(_code(x) for x in thing.co_consts)
    if inspect.isfunction(thing):
        return _code(thing.__code__), repr(thing.__defaults__), repr(thing.__kwdefaults__)
    if isinstance(thing, (classmethod, staticmethod)):
        return _code(thing.__func__)
    if isinstance(thing, type):
        own = sorted((name, x) for name, x in vars(thing).items() if not name.startswith("__") or inspect.isfunction(x))
        return thing.__qualname__, tuple((name, _code(x)) for name, x in own)
    return repr(thing) if isinstance(thing, (int, float, str, bytes, bool, type(None), tuple, frozenset)) else ""

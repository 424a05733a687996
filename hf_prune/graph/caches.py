"""Results that model code keeps in `functools.lru_cache`, such as position tables: emptied around a trace.

A hit would hide how the result follows from sizes, and fake tensors left in a cache would reach the next real forward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from inspect import getclosurevars
from types import FunctionType
from typing import Any

from torch import nn


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Empty the caches of all code that the modules of `model` are written in, before and after."""
    caches = list(_caches(model))
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


def _caches(model: nn.Module) -> Iterator[Any]:
    """Every cache among the methods of the classes of `model` and the functions of the files that define them."""
    kinds = dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__)
    files = dict.fromkeys(kind.__module__ for kind in kinds)
    values = [(kind.__module__, value) for kind in kinds for value in vars(kind).values()]
    values += [(file, value) for file in files for value in vars(sys.modules[file]).values()]
    for file, value in values:
        if getattr(value, "__module__", None) == file:  # not what the file only imports
            yield from _within(getattr(value, "__func__", value))  # a static method has its function inside


def _within(function: Any) -> Iterator[Any]:
    """`function` itself if it is a cache, else the caches that it closes over, as a wrapper of a cache does."""
    inner = getclosurevars(function).nonlocals.values() if isinstance(function, FunctionType) else ()
    yield from (each for each in (function, *inner) if isinstance(each, _lru_cache_wrapper))

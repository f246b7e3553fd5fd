"""A cache of results, bounded by their size in bytes."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from threading import Lock
from typing import Any, TypeVar

import numpy as np

_Function = TypeVar("_Function", bound=Callable[..., Any])

LIMIT = 2**23  # bytes that one cache may hold


def bounded_cache(function: _Function) -> _Function:
    """Keep the results of ``function`` for hashable arguments: the latest ones, up to ``LIMIT`` bytes.

    One result may be as large as a layer, so the bound counts bytes and not results. A single result above
    the limit is not kept. ``held()`` of the decorated function returns the bytes that it holds.
    """
    results: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
    lock = Lock()

    @wraps(function)
    def cached(*args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(kwargs.items()))
        with lock:
            if key in results:
                results.move_to_end(key)
                return results[key][0]
        result = function(*args, **kwargs)
        with lock:
            results[key] = result, size_of(result)
            while sum(size for _, size in results.values()) > LIMIT:
                results.popitem(last=False)
        return result

    cached.held = lambda: sum(size for _, size in results.values())  # type: ignore[attr-defined]
    return cached  # type: ignore[return-value]


def size_of(value: Any) -> int:
    """The bytes of a value and of all its parts."""
    size = sys.getsizeof(value)
    if isinstance(value, np.ndarray):
        return size + (value.base.nbytes if isinstance(value.base, np.ndarray) else 0)
    if is_dataclass(value):
        return size + sum(size_of(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, tuple | list):
        return size + sum(map(size_of, value))
    return size

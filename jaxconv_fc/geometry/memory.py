"""The budget for arrays, sizes in bytes, and the dtype of indices."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.geometry.arguments import as_int

_memory_limit = contextvars.ContextVar("jaxconv_fc_memory_limit", default=8 * 2**30)


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """A context in which builders make arrays with ``size * itemsize <= nbytes``. Outside, it is 8 GiB.

    Args:
      nbytes: the most bytes that one array may take.

    Returns:
      A context manager.

    Raises:
      TypeError: nbytes is not an int.
      ValueError: it is negative. In the context, a builder raises it for an array beyond the limit, before
        anything is allocated.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 8, 8), (1, 1, 3, 3), (1, 1), "SAME")
    >>> with fc.memory_limit(1000):
    ...     fc.as_matrix(spec, jnp.ones((1, 1, 3, 3), jnp.int8))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: as_matrix: 64 x 64 int8 = 4 KiB dense; 484 stored entries: use ...
    """
    if isinstance(nbytes, str | float):
        raise TypeError(f"nbytes must be an int, got {nbytes!r}. Write a number of bytes, such as 2 * 2**30.")
    token = _memory_limit.set(as_int("nbytes", nbytes, least=0))
    try:
        yield
    finally:
        _memory_limit.reset(token)


def check_array(
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    instead: str | Callable[[], str],
    stored: int | None = None,
) -> None:
    """ValueError if the array that ``name`` makes is beyond the memory limit. ``instead`` says what to use.

    An array with ``stored`` entries of M is made by index on a device: its places must be within the index
    range too.
    """
    entries, dtype = math.prod(shape), jnp.dtype(dtype)
    nbytes = entries * dtype.itemsize
    if not fits_in_memory(nbytes):
        need = f"{name}: {' x '.join(f'{n:,}' for n in shape)} {dtype.name} = {readable(nbytes)}"
        need = need if stored is None else f"{need} dense; {stored:,} stored entries"
        raise beyond_memory(need, nbytes, instead() if callable(instead) else instead)
    if stored is not None:
        index_dtype(entries, shape)


def check_stored(name: str, stored: int, nbytes: int, instead: str = "row_blocks or apply") -> None:
    """ValueError if the arrays of a sparse matrix are beyond the memory limit."""
    if not fits_in_memory(nbytes):
        raise beyond_memory(f"{name}: {stored:,} stored entries need {readable(nbytes)}", nbytes, instead)


def beyond_memory(need: str, nbytes: int, instead: str) -> ValueError:
    """The error for ``nbytes`` beyond the memory limit: what needs them, and what to do."""
    return ValueError(
        f"{need}: use {instead}, or raise the limit of {readable(_memory_limit.get())}: "
        f"`with jaxconv_fc.memory_limit({nbytes}):`."
    )


def fits_in_memory(nbytes: int) -> bool:
    """Whether an array of this many bytes is within the memory limit."""
    return nbytes <= _memory_limit.get()


def index_dtype(largest: int, shape: tuple[int, ...]) -> Any:
    """int32 where ``largest`` fits, else int64 with x64, else a ValueError with the shape of the matrix."""
    if largest <= np.iinfo(np.int32).max:
        return jnp.int32
    if largest <= np.iinfo(np.int64).max and jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return jnp.int64
    fix = "int32. Enable 64-bit indices with jax.config.update('jax_enable_x64', True)."
    if largest > np.iinfo(np.int64).max:
        fix = "int64. Use row_blocks or apply."
    sizes = " x ".join(f"{n:,}" for n in shape)
    raise ValueError(f"a matrix of {sizes} entries needs indices up to {largest:,}, beyond {fix}")


def readable(nbytes: int) -> str:
    """``1.3 GiB``: three digits at least."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.0f} {name}" if nbytes >= 100 * unit else f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} bytes"

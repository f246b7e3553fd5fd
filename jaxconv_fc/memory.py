"""The budget for arrays, sizes in bytes, and the dtype of indices."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.arguments import as_int

if TYPE_CHECKING:  # spec.py imports this file
    from jaxconv_fc.spec import ConvSpec


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


def check_dense(name: str, spec: ConvSpec, shape: tuple[int, ...], dtype: Any, instead: str) -> None:
    """ValueError if a dense array of this shape is beyond the memory limit or the index range."""
    entries, dtype = math.prod(shape), jnp.dtype(dtype)
    nbytes = entries * dtype.itemsize
    if not fits_in_memory(nbytes):
        sizes = " x ".join(f"{n:,}" for n in shape)
        need = f"{name}: {sizes} {dtype.name} = {readable(nbytes)} dense; {spec.nse:,} stored entries"
        raise _beyond_limit(need, nbytes, instead)
    if entries > np.iinfo(np.int32).max:
        index_dtype(entries, spec)


def check_array(name: str, shape: tuple[int, ...], dtype: Any, instead: str) -> None:
    """ValueError if an array of this shape is beyond the memory limit."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not fits_in_memory(nbytes):
        sizes = " x ".join(f"{n:,}" for n in shape)
        raise _beyond_limit(f"{name}: {sizes} {np.dtype(dtype)} = {readable(nbytes)}", nbytes, instead)


def check_stored(name: str, spec: ConvSpec, nbytes: int, instead: str = "row_blocks or apply") -> None:
    """ValueError if the arrays of a sparse matrix are beyond the memory limit."""
    if not fits_in_memory(nbytes):
        raise _beyond_limit(f"{name}: {spec.nse:,} stored entries need {readable(nbytes)}", nbytes, instead)


def _beyond_limit(need: str, nbytes: int, instead: str) -> ValueError:
    return ValueError(
        f"{need}: use {instead}, or raise the limit of {readable(_memory_limit.get())}: "
        f"`with jaxconv_fc.memory_limit({nbytes}):`."
    )


def fits_in_memory(nbytes: int) -> bool:
    """Whether an array of this many bytes is within the memory limit."""
    return nbytes <= _memory_limit.get()


def index_dtype(largest: int, spec: ConvSpec) -> Any:
    """int32 where ``largest`` fits, else int64 with x64, else a ValueError."""
    if largest <= np.iinfo(np.int32).max:
        return jnp.int32
    if largest > np.iinfo(np.int64).max:
        raise ValueError(
            f"a matrix of {spec.out_size:,} x {spec.in_size:,} entries needs positions up to {largest:,}, "
            "beyond 64 bits. Use smaller strides, dilations and pads."
        )
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return jnp.int64
    raise ValueError(
        f"a matrix of {spec.out_size:,} x {spec.in_size:,} entries needs indices up to {largest:,}, beyond "
        "int32. Enable 64-bit indices with jax.config.update('jax_enable_x64', True)."
    )


def readable(nbytes: int) -> str:
    """``1.3 GiB``: three digits at least."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.0f} {name}" if nbytes >= 100 * unit else f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} bytes"

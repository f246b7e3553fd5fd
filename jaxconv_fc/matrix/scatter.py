"""The builders as scatters and gathers: what CPU and GPU run.

M, its rows and its columns scatter the kernel to the places of their :mod:`jaxconv_fc.geometry.entries`; sums
over outputs, the transpose, gather from them. :mod:`jaxconv_fc.matrix.selects` does the same without indices,
for a TPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxconv_fc.geometry.axis import Ints
from jaxconv_fc.geometry.entries import Entries, all_entries, column_entries, row_entries
from jaxconv_fc.geometry.layout import by_group, from_out_first, out_first, split_column, split_row
from jaxconv_fc.geometry.memory import index_dtype
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.numerics import summed


def places(spec: ConvSpec, at: Entries, line: Ints, other: Ints, shape: tuple[int, int]) -> jax.Array:
    """(at.dims) of places of ``[line, other]`` in the ravel of ``shape``.

    One past the end where the tap reads padding: a scatter drops it (-1 would wrap).
    """
    size = math.prod(shape)
    dtype = index_dtype(size, spec.shape)
    place = line.astype(dtype) * shape[1] + other.astype(dtype)
    return jnp.broadcast_to(jnp.where(at.valid, place, size), at.dims)


def spread_kernel(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The values of :func:`all_entries`: [d, i, p] -> [d, i, 1, p]."""
    return jnp.expand_dims(out_first(spec, kernel), range(2, 2 + len(spec.axes)))


# -- M, its update and its transpose ---------------------------------------------------------------


def matrix(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """M, from a kernel of shape ``spec.rhs_shape``."""
    at = all_entries(spec)
    to = places(spec, at, at.row, at.column, spec.shape)
    return _put(
        spec, jnp.zeros(math.prod(spec.shape), kernel.dtype), to, spread_kernel(spec, kernel), spec.shape
    )


def updated(spec: ConvSpec, old: jax.Array, kernel: jax.Array) -> jax.Array:
    """M, with the values of ``old`` (spec.shape) in place of its structural zeros."""
    at, flat = all_entries(spec), old.ravel()
    to = places(spec, at, at.row, at.column, spec.shape)
    if spec.collides:  # values will be added
        flat = flat.at[to].set(jnp.zeros((), old.dtype), mode="drop")
    return _put(spec, flat, to, spread_kernel(spec, kernel), spec.shape)


def sums(spec: ConvSpec, of: Callable[..., jax.Array], matrix: jax.Array, *constants: jax.Array) -> jax.Array:
    """For every kernel entry, the sum of ``of(entry, *constants)`` over the entries of M that it fills.

    Loops run along diagonals of M: what one tap reads lies beside what the next one reads. So on a CPU most
    of it is still in the cache, and the inner loop adds vectors.
    """
    n = len(spec.axes)
    order = [0, 1, *(dim for a in range(n) for dim in (2 + n + a, 2 + a))]  # [d, i, p1, o1, p2, o2, ...]
    return _sums(spec, order, range(3, len(order), 2), of, matrix, *constants)


def sums_on_gpu(
    spec: ConvSpec, of: Callable[..., jax.Array], matrix: jax.Array, *constants: jax.Array
) -> jax.Array:
    """:func:`sums` in the order of memory: neighbouring threads read taps of one row, side by side."""
    n = len(spec.axes)
    return _sums(spec, range(2 + 2 * n), range(2, 2 + n), of, matrix, *constants)


def _sums(
    spec: ConvSpec,
    order: Sequence[int],
    positions: Sequence[int],
    of: Callable[..., jax.Array],
    matrix: jax.Array,
    *constants: jax.Array,
) -> jax.Array:
    """The sums over the dimensions ``positions`` of the entries [d, i, o, p] in this order of dimensions."""
    at = all_entries(spec)
    to = places(spec, at, at.row, at.column, spec.shape).transpose(order)
    # Where no taps meet, every entry is read once. Its transpose is then a scatter to unique places.
    entry = matrix.ravel().at[to].get(mode="fill", fill_value=0, unique_indices=not spec.collides)
    return from_out_first(spec, summed(of(entry, *constants), positions))  # [d, i, p]


def _put(
    spec: ConvSpec, flat: jax.Array, to: jax.Array, values: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """The matrix of this shape: every value at its place, zeros elsewhere. One past the end is dropped.

    Two taps meet in one entry in boundary modes only. There values are added, or or-ed if bool. Elsewhere
    they are set, which does not read the old ones first, at places declared unique: the scatter is then
    deterministic on GPU, and can be transposed everywhere.
    """
    values = jnp.broadcast_to(values, to.shape)
    if not spec.collides:
        return flat.at[to].set(values, mode="drop", unique_indices=True).reshape(shape)
    put = flat.at[to].max if values.dtype == jnp.bool_ else flat.at[to].add
    return put(values, mode="drop").reshape(shape)


# -- rows and columns ------------------------------------------------------------------------------


def rows(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """Rows ``index`` of M, (n, in_size)."""
    at = row_entries(spec, index)  # [n, i, p]
    values = out_first(spec, kernel)[split_row(spec, index)[1]]  # [d, i, p] -> [n, i, p]
    return _lines(spec, at, at.column, values, (len(index), spec.in_size))


def transposed_columns(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """Columns ``index`` of M, transposed: (n, out_size)."""
    at, c = column_entries(spec, index), split_column(spec, index)[1]  # [n, e, q, p]
    # [g, e, i, p] -> [n, e, p] -> [n, e, 1, p]
    values = by_group(spec, kernel)[c // spec.group_channels, :, c % spec.group_channels]
    values = jnp.expand_dims(values, range(2, 2 + len(spec.axes)))
    return _lines(spec, at, at.row, values, (len(index), spec.out_size))


def _lines(spec: ConvSpec, at: Entries, other: Ints, values: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The matrix of this shape in whose line n stand the entries [n, ...], at the places ``other``."""
    n = jnp.arange(shape[0], dtype=other.dtype).reshape(-1, *(1 for _ in at.dims[1:]))
    return _put(
        spec, jnp.zeros(math.prod(shape), values.dtype), places(spec, at, n, other, shape), values, shape
    )


# -- the kernel matrix -----------------------------------------------------------------------------


def kernel_matrix(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """X, from an input of shape ``spec.in_shape``."""
    at, shape = all_entries(spec), (spec.out_size, math.prod(spec.rhs_shape))  # [d, i, o, p]
    to = places(spec, at, at.row, at.tap, shape)  # X[(d, o), (d, i, p)]: never two at one place
    values = jnp.broadcast_to(x.ravel().at[at.column].get(mode="clip"), to.shape)
    flat = jnp.zeros(math.prod(shape), x.dtype).at[to].set(values, mode="drop", unique_indices=True)
    return flat.reshape(shape)

"""The builders as scatters and gathers: what CPU and GPU run.

An entry of M is a pair of an output and a kernel entry. :class:`Entries` lists such pairs and says where in
memory each stands. M, its rows and its columns scatter the kernel to these places; sums over outputs, the
transpose, gather from them. :mod:`jaxconv_fc.selects` does the same without indices, for a TPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.axis import Axis, Ints
from jaxconv_fc.layout import (
    by_group,
    column_of,
    from_out_first,
    grid,
    in_channel,
    out_first,
    row_of,
    split_column,
    split_row,
    tap_of,
)
from jaxconv_fc.layout import taps as kernel_taps
from jaxconv_fc.memory import index_dtype
from jaxconv_fc.numerics import summed
from jaxconv_fc.spec import ConvSpec


class Entries(NamedTuple):
    """A grid of entries of a matrix. The index arrays broadcast over ``dims``."""

    dims: tuple[int, ...]
    rows: Ints
    columns: Ints  # one past the end where the tap reads padding
    taps: Ints = None  # place of the kernel entry in ``kernel.ravel()``

    def places(self, spec: ConvSpec, shape: tuple[int, int] | None = None) -> jax.Array:
        """(dims,) of places in the ravel of ``shape``, M's own by default.

        One past the end where the row or the column is past its own. One index per entry is read and
        compared in half the time of two.
        """
        height, width = spec.shape if shape is None else shape
        dtype = index_dtype(height * width, (height, width))
        rows, columns = self.rows.astype(dtype), self.columns.astype(dtype)
        inside = (rows < height) & (columns < width)
        return jnp.broadcast_to(jnp.where(inside, rows * width + columns, height * width), self.dims)


def entries(spec: ConvSpec) -> Entries:
    """All pairs of an output and a kernel entry, [d, i, o, p]: out channel, channel of its group, output
    position and tap, the last two one dimension per spatial axis."""
    dims = (spec.out_channels, spec.group_channels, *(a.out_size for a in spec.axes), *kernel_taps(spec))
    d, i, *rest = grid(dims, spec.index_dtype)
    positions, taps = rest[: len(spec.axes)], rest[len(spec.axes) :]
    columns = columns_read(spec, d, i, positions, taps)
    return Entries(dims, row_of(spec, positions, d), columns, tap_of(spec, taps, i, d))


def spread_kernel(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The values of :func:`entries`: [d, i, p] -> [d, i, 1, p]."""
    return jnp.expand_dims(out_first(spec, kernel), range(2, 2 + len(spec.axes)))


def columns_read(spec: ConvSpec, d: Ints, i: Ints, positions: Sequence[Ints], taps: Sequence[Ints]) -> Ints:
    """The column that row ``(d, positions)`` reads through kernel entry ``(i, taps)``.

    ``in_size`` where the tap reads padding: a scatter drops what is one past the end (-1 would wrap).
    """
    read, valid = [], True
    for axis, o, p in zip(spec.axes, positions, taps, strict=True):
        t, reads = axis.input_of(o, p)
        read.append(t)
        valid = valid & reads
    return jnp.where(valid, column_of(spec, read, in_channel(spec, d, i)), spec.in_size)


# -- M, its update and its transpose ---------------------------------------------------------------


def matrix(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """M, from a kernel of shape ``spec.rhs_shape``."""
    return _scatter(spec, spec.shape, entries(spec).places(spec), spread_kernel(spec, kernel))


def updated(spec: ConvSpec, old: jax.Array, kernel: jax.Array) -> jax.Array:
    """M, with the values of ``old`` (spec.shape) in place of its structural zeros."""
    places, values = entries(spec).places(spec), spread_kernel(spec, kernel)
    flat, values = old.ravel(), jnp.broadcast_to(values, places.shape)
    if spec.collides:  # values will be added
        flat = flat.at[places].set(jnp.zeros((), old.dtype), mode="drop")
    return _put(spec, flat, places, values).reshape(spec.shape)


def sums(spec: ConvSpec, of: Callable[..., jax.Array], matrix: jax.Array, *constants: jax.Array) -> jax.Array:
    """For every kernel entry, the sum of ``of(entry, *constants)`` over the entries of M that it fills.

    Loops run along diagonals of M: what one tap reads lies beside what the next one reads. So on a CPU most
    of it is still in the cache, and the inner loop adds vectors.
    """
    n = len(spec.axes)
    order = [0, 1, *(dim for a in range(n) for dim in (2 + n + a, 2 + a))]
    places = entries(spec).places(spec).transpose(order)  # [d, i, o, p] -> [d, i, p1, o1, p2, o2, ...]
    return _sums_at(spec, places, range(3, len(order), 2), of, matrix, *constants)


def sums_on_gpu(
    spec: ConvSpec, of: Callable[..., jax.Array], matrix: jax.Array, *constants: jax.Array
) -> jax.Array:
    """:func:`sums` in the order of memory: neighbouring threads read taps of one row, side by side."""
    places = entries(spec).places(spec)  # [d, i, o, p]
    return _sums_at(spec, places, range(2, 2 + len(spec.axes)), of, matrix, *constants)


def _sums_at(
    spec: ConvSpec,
    places: jax.Array,
    positions: Sequence[int],
    of: Callable[..., jax.Array],
    matrix: jax.Array,
    *constants: jax.Array,
) -> jax.Array:
    """The sums over the dimensions ``positions`` of the entries at these places."""
    # Where no taps meet, every entry is read once. Its transpose is then a scatter to unique places.
    entry = matrix.ravel().at[places].get(mode="fill", fill_value=0, unique_indices=not spec.collides)
    return from_out_first(spec, summed(of(entry, *constants), positions))  # [d, i, p]


def _scatter(spec: ConvSpec, shape: tuple[int, int], places: jax.Array, values: jax.Array) -> jax.Array:
    """A matrix of zeros with every value at its place."""
    zeros = jnp.zeros(math.prod(shape), values.dtype)
    return _put(spec, zeros, places, jnp.broadcast_to(values, places.shape)).reshape(shape)


def _put(spec: ConvSpec, flat: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    """Every value at its place, among zeros. What is one past the end is dropped.

    Two taps meet in one entry in boundary modes only. There values are added, or or-ed if bool. Elsewhere
    they are set, which does not read the old ones first, at places declared unique: the scatter is then
    deterministic on GPU, and can be transposed everywhere.
    """
    if not spec.collides:
        return flat.at[places].set(values, mode="drop", unique_indices=True)
    put = flat.at[places].max if values.dtype == jnp.bool_ else flat.at[places].add
    return put(values, mode="drop")


# -- rows and columns ------------------------------------------------------------------------------


def rows(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """Rows ``index`` of M, (n, in_size)."""
    shape = (index.shape[0], spec.in_size)
    dims = (index.shape[0], spec.group_channels, *kernel_taps(spec))  # [n, i, p], n runs over the rows
    n, i, *taps = grid(dims, spec.index_dtype)
    positions, d = split_row(spec, jnp.expand_dims(index, range(1, len(dims))))
    values = out_first(spec, kernel)[d.reshape(-1)]  # [d, i, p] -> [n, i, p]
    places = Entries(dims, n, columns_read(spec, d, i, positions, taps)).places(spec, shape)
    return _scatter(spec, shape, places, values)


def transposed_columns(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """Columns ``index`` of M, transposed: (n, out_size)."""
    shape = (index.shape[0], spec.out_size)
    # An input position may be copied into the padding several times: `q` runs over its copies.
    block, q = spec.out_channels // spec.groups, [a.copies for a in spec.axes]
    dims = (index.shape[0], block, *q, *kernel_taps(spec))  # [n, e, q, p], n over columns, e over a group
    n, e, *rest = grid(dims, spec.index_dtype)
    copies, taps = rest[: len(spec.axes)], rest[len(spec.axes) :]
    positions, c = split_column(spec, jnp.expand_dims(index, range(1, len(dims))))
    group, i = c // spec.group_channels, c % spec.group_channels
    d = group * block + e
    read, valid = [], True
    for axis, t, q, p in zip(spec.axes, positions, copies, taps, strict=True):
        j, copied = _copy(axis, t, q)
        o, reads = axis.output_of(j, p)
        read.append(o)
        valid = valid & copied & reads
    rows = jnp.where(valid, row_of(spec, read, d), spec.out_size)
    values = by_group(spec, kernel)[group.reshape(-1), :, i.reshape(-1)]  # [g, e, i, p] -> [n, e, p]
    values = jnp.expand_dims(values, range(2, 2 + len(spec.axes)))  # [n, e, 1, p]
    return _scatter(spec, shape, Entries(dims, n, rows).places(spec, shape), values)


def _copy(axis: Axis, t: Ints, q: Ints) -> tuple[Ints, Ints]:
    """``(j, valid)``: the ``q``-th padded position that is a copy of input position ``t``.

    The positions sorted by source hold the copies of each input side by side.
    """
    if axis.pads_with_zeros:
        return t, True
    source = axis.source(lax.iota(t.dtype, axis.padded_size))
    order = jnp.argsort(source, stable=True).astype(t.dtype)
    at = jnp.searchsorted(source[order], t).astype(t.dtype) + q
    j = order[jnp.minimum(at, axis.padded_size - 1)]
    return j, (at < axis.padded_size) & (axis.source(j) == t)


# -- the kernel matrix -----------------------------------------------------------------------------


def kernel_matrix(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """X, from an input of shape ``spec.in_shape``."""
    at = entries(spec)  # [d, i, o, p]
    zeros = jnp.zeros((spec.out_size, math.prod(spec.rhs_shape)), x.dtype)
    values = x.ravel().at[at.columns].get(mode="fill", fill_value=0)
    rows, taps, values = (jnp.broadcast_to(v, at.dims) for v in (at.rows, at.taps, values))
    return zeros.at[rows, taps].set(values, unique_indices=True)  # X[(d, o), (d, i, p)]

"""The matrix of a convolution, whole or by rows or columns: kernel entries scattered to their places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc import selects
from jaxconv_fc.arguments import Array, as_array, brief, check_same_dtype, native
from jaxconv_fc.axis import Axis, Ints
from jaxconv_fc.layout import (
    by_group,
    column_of,
    grid,
    in_channel,
    out_first,
    row_of,
    split_column,
    split_row,
    tap_of,
)
from jaxconv_fc.layout import taps as kernel_taps
from jaxconv_fc.memory import check_dense, fits_in_memory, index_dtype
from jaxconv_fc.sharding import PlatformForms, by_platform, is_traced, platform_forms, program
from jaxconv_fc.spec import ConvSpec, as_operand, spec_first


@spec_first
def as_matrix(spec: ConvSpec, kernel: Array) -> jax.Array:
    """The dense matrix M of a convolution: ``M @ x.ravel() == conv(x, kernel).ravel()``.

    ``M[(d, o), (c, t)] = sum of kernel[d, i, p]`` over the taps ``p`` through which output position
    ``o`` reads input position ``t``, where ``c = (d // (O/G)) * (C/G) + i`` (docs/maths.md, section 1). At
    most one tap does in zeros mode; in the other padding modes several can, and they add.

    M is linear in the kernel. Structural zeros are 0 whatever the kernel holds: an Inf or NaN tap fills its
    own entries only. (A dense *product* with M multiplies these zeros, so there ``0 * Inf`` is NaN, unlike
    in a convolution or a sparse product.) A bool kernel gives a bool mask: taps that meet are or-ed.

    Args:
      spec: the geometry, from :func:`conv_spec`.
      kernel: array of shape ``spec.rhs_shape``, any dtype.

    Returns:
      Array of shape ``spec.shape`` and the kernel's dtype: rows are output neurons.

    Raises:
      TypeError: the kernel is not an array.
      ValueError: the kernel has another shape, or M is beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.as_matrix(spec, jnp.array([[[1, 2]]])))
    [[1 2 0 0]
     [0 1 2 0]
     [0 0 1 2]]
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    smaller = "as_bcsr" if fits_in_memory(spec.nbytes(kernel.dtype).bcsr) else "row_blocks"
    check_dense("as_matrix", spec, spec.shape, kernel.dtype, f"{smaller} or apply")
    return _matrix(spec, kernel)


@program
def _matrix(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    form = platform_forms(_scattered, selects.matrix, spec)
    return _zeros_or(spec, form, spec.shape, kernel)


def _scattered(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    return _scatter(spec, spec.shape, entries(spec).places(spec), spread_kernel(spec, kernel))


def _zeros_or(
    spec: ConvSpec, form: PlatformForms, shape: tuple[int, int], kernel: jax.Array, *fixed: jax.Array
) -> jax.Array:
    """The form of a matrix that is linear in the kernel; zeros if it has no entries."""
    if not spec.nse or not math.prod(shape):
        return jnp.zeros(shape, kernel.dtype)
    return by_platform(form, jax.ShapeDtypeStruct(shape, kernel.dtype), kernel, *fixed)


def update_matrix(spec: ConvSpec, matrix: Array, kernel: Array) -> jax.Array:
    """``as_matrix(spec, kernel)``, written over an earlier M of the same spec.

    Only the ``spec.nse`` stored entries are written, a small part of M. Structural zeros keep the values that
    they have in ``matrix``. M is copied first, unless its buffer is donated:
    ``jax.jit(partial(update_matrix, spec), donate_argnums=0)``.

    Args:
      spec: the geometry.
      matrix: an M of this geometry, as :func:`as_matrix` gave it; shape ``spec.shape``.
      kernel: array of shape ``spec.rhs_shape`` and the matrix's dtype.

    Returns:
      Array of shape ``spec.shape``.

    Raises:
      TypeError: an operand is not an array, or their dtypes differ.
      ValueError: a shape is wrong.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> from functools import partial
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> matrix = fc.as_matrix(spec, jnp.array([[[1, 2]]]))
    >>> update = jax.jit(partial(fc.update_matrix, spec), donate_argnums=0)
    >>> print(update(matrix, jnp.array([[[3, 4]]])))
    [[3 4 0 0]
     [0 3 4 0]
     [0 0 3 4]]
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    matrix = as_operand("matrix", matrix, spec, "shape")
    check_same_dtype("matrix", matrix, "kernel", kernel)
    return _updated(spec, matrix, kernel)


@program
def _updated(spec: ConvSpec, matrix: jax.Array, kernel: jax.Array) -> jax.Array:
    if not spec.nse:
        return matrix
    form = platform_forms(_rewritten, selects.updated, spec)
    return by_platform(form, matrix, matrix, kernel, linear=2)


def _rewritten(spec: ConvSpec, matrix: jax.Array, kernel: jax.Array) -> jax.Array:
    places, values = entries(spec).places(spec), spread_kernel(spec, kernel)
    flat, values = matrix.ravel(), jnp.broadcast_to(values, places.shape)
    if not spec.collides:
        return flat.at[places].set(values, mode="drop", unique_indices=True).reshape(spec.shape)
    cleared = flat.at[places].set(jnp.zeros((), matrix.dtype), mode="drop")
    return _put(spec, cleared, places, values).reshape(spec.shape)


def as_affine(spec: ConvSpec, kernel: Array, bias: Array) -> tuple[jax.Array, jax.Array]:
    """``(M, b)`` with ``conv(x, kernel) + bias == (M @ x.ravel() + b).reshape(spec.out_shape)``.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      bias: one entry per output channel, shape ``(out_channels,)``, or a map of ``spec.out_shape``.

    Returns:
      M as :func:`as_matrix` gives it, and b of shape ``(spec.out_size,)``.

    Raises:
      TypeError, ValueError: as :func:`as_matrix`, and for a bias of another shape or dtype.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 3), (2, 1, 2), (1,), "VALID")
    >>> matrix, vector = fc.as_affine(spec, jnp.ones((2, 1, 2)), jnp.array([0.5, -1.0]))
    >>> print(vector)
    [ 0.5  0.5 -1.  -1. ]
    """
    matrix = as_matrix(spec, kernel)
    bias = as_array("bias", bias)
    check_same_dtype("kernel", matrix, "bias", bias)
    if bias.shape not in (spec.out_shape, (spec.out_channels,)):
        raise ValueError(
            f"bias must have shape ({spec.out_channels},), one entry per output channel, or the output's "
            f"shape {spec.out_shape}, got {bias.shape}."
        )
    return matrix, _offset(spec, bias)


@program
def _offset(spec: ConvSpec, bias: jax.Array) -> jax.Array:
    """The bias of every output, (out_size,), from a map or from one entry per channel."""
    if bias.shape == spec.out_shape:
        return bias.ravel()
    others = [i for i in range(len(spec.out_shape)) if i != spec.out_order[-1]]
    return jnp.broadcast_to(jnp.expand_dims(bias, others), spec.out_shape).ravel()


def matrix_rows(spec: ConvSpec, kernel: Array, rows: Any) -> jax.Array:
    """Rows of M, ``as_matrix(spec, kernel)[rows]``, at the cost of the rows asked for.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      rows: 1-D integers, or 2-D with one index of an output neuron in ``spec.out_shape`` per row, such as
        ``[(0, 5, 7)]``. Static or traced; negative ones count from the end. A traced index out of range gives
        a row filled as by ``jnp.take``: NaN, the lowest signed or the largest unsigned integer.

    Returns:
      Array of shape ``(len(rows), spec.in_size)``.

    Raises:
      TypeError: rows are not integers.
      ValueError: their shape is another.
      IndexError: out of range.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.matrix_rows(spec, jnp.array([[[1, 2]]]), [-1, 0]))
    [[0 0 1 2]
     [1 2 0 0]]
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    index, inside = _index("rows", rows, spec.out_shape, spec)
    shape = (index.shape[0], spec.in_size)
    check_dense("matrix_rows", spec, shape, kernel.dtype, "fewer rows at a time")
    return _fill(_rows(spec, kernel, index), inside)


@program
def _rows(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    form = platform_forms(_scattered_rows, _selected_rows, spec)
    return _zeros_or(spec, form, (index.shape[0], spec.in_size), kernel, index)


def _scattered_rows(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    shape = (index.shape[0], spec.in_size)
    dims = (index.shape[0], spec.group_channels, *kernel_taps(spec))  # [n, i, p], n runs over the rows
    n, i, *taps = grid(dims, spec.index_dtype)
    positions, d = split_row(spec, jnp.expand_dims(index, range(1, len(dims))))
    values = out_first(spec, kernel)[d.reshape(-1)]  # [d, i, p] -> [n, i, p]
    places = Entries(dims, n, _columns(spec, d, i, positions, taps)).places(spec, shape)
    return _scatter(spec, shape, places, values)


def _selected_rows(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    dims = (index.shape[0], *kernel_taps(spec))  # [n, p]
    positions, d = split_row(spec, jnp.expand_dims(index, range(1, len(dims))))
    reads = _columns(spec, d, d * 0, positions, grid(dims, spec.index_dtype)[1:])
    return selects.rows(spec, kernel, d.reshape(-1), jnp.broadcast_to(reads, dims))


def matrix_columns(spec: ConvSpec, kernel: Array, columns: Any) -> jax.Array:
    """Columns of M, ``as_matrix(spec, kernel)[:, columns]``, at the cost of the columns asked for.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      columns: 1-D integers, or 2-D with one index in ``spec.in_shape`` per column, as for
        :func:`matrix_rows`.

    Returns:
      Array of shape ``(spec.out_size, len(columns))``.

    Raises:
      TypeError: columns are not integers.
      ValueError: their shape is another.
      IndexError: out of range.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.matrix_columns(spec, jnp.array([[[1, 2]]]), [1]))
    [[2]
     [1]
     [0]]
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    index, inside = _index("columns", columns, spec.in_shape, spec)
    shape = (index.shape[0], spec.out_size)
    check_dense("matrix_columns", spec, shape[::-1], kernel.dtype, "fewer columns at a time")
    return _fill(_transposed_columns(spec, kernel, index), inside).T


@program
def _transposed_columns(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    form = platform_forms(_scattered_columns, _selected_columns, spec)
    return _zeros_or(spec, form, (index.shape[0], spec.out_size), kernel, index)


def _selected_columns(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    at = entries(spec)  # [d, i, o, p]
    reads = jnp.broadcast_to(at.columns, at.dims)[:, 0]  # [d, o, p]
    return selects.transposed_columns(spec, kernel, index, reads)


def _scattered_columns(spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
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


# -- the scatter -------------------------------------------------------------------------------


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
        dtype = index_dtype(height * width, spec)
        rows, columns = self.rows.astype(dtype), self.columns.astype(dtype)
        inside = (rows < height) & (columns < width)
        return jnp.broadcast_to(jnp.where(inside, rows * width + columns, height * width), self.dims)


def entries(spec: ConvSpec) -> Entries:
    """All pairs of an output and a kernel entry, [d, i, o, p]: out channel, channel of its group, output
    position and tap, the last two one dimension per spatial axis."""
    dims = (spec.out_channels, spec.group_channels, *(a.out_size for a in spec.axes), *kernel_taps(spec))
    d, i, *rest = grid(dims, spec.index_dtype)
    positions, taps = rest[: len(spec.axes)], rest[len(spec.axes) :]
    columns = _columns(spec, d, i, positions, taps)
    return Entries(dims, row_of(spec, positions, d), columns, tap_of(spec, taps, i, d))


def spread_kernel(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The values of :func:`entries`: [d, i, p] -> [d, i, 1, p]."""
    return jnp.expand_dims(out_first(spec, kernel), range(2, 2 + len(spec.axes)))


def _columns(spec: ConvSpec, d: Ints, i: Ints, positions: Sequence[Ints], taps: Sequence[Ints]) -> Ints:
    """The column that row ``(d, positions)`` reads through kernel entry ``(i, taps)``.

    ``in_size`` where the tap reads padding: a scatter drops what is one past the end (-1 would wrap).
    """
    read, valid = [], True
    for axis, o, p in zip(spec.axes, positions, taps, strict=True):
        t, reads = axis.input_of(o, p)
        read.append(t)
        valid = valid & reads
    return jnp.where(valid, column_of(spec, read, in_channel(spec, d, i)), spec.in_size)


def _scatter(spec: ConvSpec, shape: tuple[int, int], places: jax.Array, values: jax.Array) -> jax.Array:
    """A matrix of zeros to which every value is added at its place."""
    zeros = jnp.zeros(math.prod(shape), values.dtype)
    return _put(spec, zeros, places, jnp.broadcast_to(values, places.shape)).reshape(shape)


def _put(spec: ConvSpec, flat: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    """Every value added at its place, or or-ed if bool. What is one past the end is dropped.

    Two taps meet in one entry in boundary modes only. Elsewhere the places are declared unique: the
    scatter is then fast and deterministic on GPU, and can be transposed everywhere.
    """
    if not spec.collides:
        return flat.at[places].set(values, mode="drop", unique_indices=True)
    put = flat.at[places].max if values.dtype == jnp.bool_ else flat.at[places].add
    return put(values, mode="drop")


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


def _index(name: str, values: Any, shape: tuple[int, ...], spec: ConvSpec) -> tuple[jax.Array, jax.Array]:
    """``(index, inside)``: places in the ravel of ``shape``, 0 where out of range.

    ``values`` are such places, [n], or indices in ``shape``, [n, len(shape)].
    """
    if is_traced(values):
        index = values
    else:
        index = native(np.asarray(values))
        index = index.astype(np.int64) if index.size == 0 else index  # [] is a float array to NumPy
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {index.dtype}: {brief(values)}.")
    if index.ndim == 1:
        return _in_range(name, index, math.prod(shape), spec)
    if index.ndim != 2 or index.shape[1] != len(shape):
        raise ValueError(
            f"{name} must be 1-D, or 2-D with an index in {shape} per row, got shape {index.shape}. Write "
            f"[5] for one of them, or [{(0,) * len(shape)}]."
        )
    places, inside = jnp.zeros(index.shape[0], spec.index_dtype), jnp.ones(index.shape[0], bool)
    for a, size in enumerate(shape):
        place, within = _in_range(f"{name}[:, {a}]", index[:, a], size, spec)
        places, inside = places * size + place, inside & within
    return places, inside


def _in_range(name: str, index: Any, size: int, spec: ConvSpec) -> tuple[jax.Array, jax.Array]:
    """``(index, inside)``: indices counted from the front, 0 where out of range."""
    if isinstance(index, np.ndarray) and index.size and (index.min() < -size or index.max() >= size):
        wrong = index[(index < -size) | (index >= size)][0]
        raise IndexError(f"{name} must lie in [{-size}, {size}), got {wrong}.")
    # The indices are compared in their own dtype, before any cast. It may not hold the bounds: clip them.
    least, most = jnp.iinfo(index.dtype).min, jnp.iinfo(index.dtype).max
    low, high = max(-size, int(least)), min(size - 1, int(most))
    inside = (index >= low) & (index <= high) if low <= high else jnp.zeros(index.shape, bool)
    index = jnp.where(inside, index, 0).astype(spec.index_dtype)
    return jnp.where(index < 0, index + size, index), jnp.asarray(inside)


@jax.jit  # jax_debug_nans checks only the results of a program, not the NaN in it
def _fill(matrix: jax.Array, inside: jax.Array) -> jax.Array:
    """Rows whose index was out of range, filled as ``jnp.take`` fills them."""
    if matrix.dtype == jnp.bool_:
        missing: Any = True
    elif jnp.issubdtype(matrix.dtype, jnp.inexact):
        missing = jnp.nan
    else:
        limits = jnp.iinfo(matrix.dtype)
        missing = limits.min or limits.max  # the lowest unsigned integer is 0, which would not show
    return jnp.where(inside[:, None], matrix, jnp.asarray(missing, matrix.dtype))

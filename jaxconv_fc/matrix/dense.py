"""The matrix of a convolution, whole, or by rows or columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.geometry.arguments import Array, as_array, brief, check_same_dtype, native
from jaxconv_fc.geometry.memory import check_array, fits_in_memory
from jaxconv_fc.geometry.spec import ConvSpec, as_operand, spec_first
from jaxconv_fc.matrix import scatter, selects
from jaxconv_fc.sharding import Bound, PlatformForms, by_platform, is_traced, platform_forms, program


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

    def instead() -> str:
        sparse_fits = fits_in_memory(spec.nbytes(kernel.dtype).bcsr)
        return f"{'as_bcsr' if sparse_fits else 'row_blocks'} or apply"

    check_array("as_matrix", spec.shape, kernel.dtype, instead, spec.nse)
    return _matrix(spec, kernel)


@program
def _matrix(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    if not spec.nse:
        return jnp.zeros(spec.shape, kernel.dtype)
    return by_platform(_matrix_forms(spec), jax.ShapeDtypeStruct(spec.shape, kernel.dtype), kernel)


def _matrix_forms(spec: ConvSpec) -> PlatformForms:
    return platform_forms(scatter.matrix, selects.matrix, spec, transposed=Bound(sum_forms, (spec,)))


def sum_forms(spec: ConvSpec, of: Callable[..., jax.Array] | None = None) -> PlatformForms:
    """The transpose of as_matrix: for every kernel entry, the sum of the entries of M that it fills.

    With ``of``, the sum of ``of(entry, *constants)``, a function that is linear in the entry.
    """
    back = Bound(_matrix_forms, (spec,)) if of is None else None
    given = (spec, of or _itself)
    return platform_forms(scatter.sums, _selected_sums, *given, gpu=scatter.sums_on_gpu, transposed=back)


def _itself(entry: jax.Array) -> jax.Array:
    return entry


def _selected_sums(
    spec: ConvSpec, of: Callable[..., jax.Array], matrix: jax.Array, *constants: jax.Array
) -> jax.Array:
    return selects.sums(spec, of(matrix, *constants))


def sums_over_outputs(
    spec: ConvSpec,
    matrix: jax.Array,
    of: Callable[..., jax.Array] | None = None,
    *constants: jax.Array,
) -> jax.Array:
    """For every kernel entry, the sum over the entries of M that it fills: of them, or of
    ``of(entry, *constants)``, which is linear in the entry."""
    if not spec.nse:
        return jnp.zeros(spec.rhs_shape, matrix.dtype)
    result = jax.ShapeDtypeStruct(spec.rhs_shape, matrix.dtype)
    return by_platform(sum_forms(spec, of), result, matrix, *constants)


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
    form = platform_forms(scatter.updated, selects.updated, spec)
    return by_platform(form, matrix, matrix, kernel, linear=2)


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
    check_bias(spec, bias)
    return matrix, _offset(spec, bias)


def check_bias(spec: ConvSpec, bias: Any) -> None:
    """ValueError unless there is one entry per output channel, or per output."""
    if bias.shape not in (spec.out_shape, (spec.out_channels,)):
        raise ValueError(
            f"bias must have shape ({spec.out_channels},), one entry per output channel, or the output's "
            f"shape {spec.out_shape}, got {bias.shape}."
        )


@program
def _offset(spec: ConvSpec, bias: jax.Array) -> jax.Array:
    return of_every_output(spec, bias, jnp)


def of_every_output(spec: ConvSpec, bias: Any, np_or_jnp: Any) -> Any:
    """The bias of every output, (out_size,), from a map or from one entry per channel."""
    if bias.shape == spec.out_shape:
        return bias.ravel()
    others = [i for i in range(len(spec.out_shape)) if i != spec.out_order[-1]]
    return np_or_jnp.broadcast_to(np_or_jnp.expand_dims(bias, others), spec.out_shape).ravel()


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
    check_array("matrix_rows", shape, kernel.dtype, "fewer rows at a time", spec.nse)
    return _fill(_lines(scatter.rows, shape, spec, kernel, index), inside)


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
    check_array("matrix_columns", shape[::-1], kernel.dtype, "fewer columns at a time", spec.nse)
    return _fill(_lines(scatter.transposed_columns, shape, spec, kernel, index), inside).T


@partial(program, static_argnums=(0, 1))
def _lines(of: Any, shape: tuple[int, int], spec: ConvSpec, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """``of(spec, kernel, index)``: lines of M, an array of this shape."""
    return of(spec, kernel, index) if spec.nse else jnp.zeros(shape, kernel.dtype)


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

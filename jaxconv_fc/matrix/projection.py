"""The convolution nearest to a matrix, for a known geometry or for one that is read off the matrix."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.lines import gram
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.matrix.dense import matrix_rows, sums_over_outputs
from jaxconv_fc.numerics import (
    inexact,
    largest_part,
    root,
    scale_exponent,
    squares,
    to_unit_scale,
)
from jaxconv_fc.sharding import program


def kernel_from_matrix(spec: ConvSpec, matrix: Array) -> jax.Array:
    """The kernel whose matrix is nearest to ``matrix`` in the Frobenius norm: ``(G^+ x ...) L^T(A)``.

    The orthogonal projection onto the convolutions of this geometry, through the Gram matrix
    ``G_a[p, p'] = #{o : t(o, p) = t(o, p')}`` of each axis (docs/maths.md, section 3). Exact on the matrix of
    a convolution. A tap that reads no input has no entry in M: it comes back as 0, the solution of least
    norm.

    Args:
      spec: the geometry.
      matrix: array of shape ``spec.shape``; integers are taken as floats.

    Returns:
      Array of shape ``spec.rhs_shape``.

    Raises:
      TypeError: the matrix is not an array.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.kernel_from_matrix(spec, fc.as_matrix(spec, jnp.array([[[1., 2.]]]))))
    [[[1. 2.]]]
    """
    matrix = as_operand("matrix", matrix, spec, "shape")
    return _nearest_kernel(spec, inexact(matrix, 16))


@program
def _nearest_kernel(spec: ConvSpec, matrix: jax.Array) -> jax.Array:
    return _divided_by_gram(spec, sums_over_outputs(spec, matrix))


def _divided_by_gram(spec: ConvSpec, sums: jax.Array) -> jax.Array:
    """``K* = (G_1^+ x ... x G_D^+) L^T(A)``, from the sums ``L^T(A)`` over the outputs."""
    for i, axis in zip(spec.dimension_numbers.rhs_spec[2:], spec.axes, strict=True):
        sums = _solve_gram(axis, sums, i)
    return sums


def _gram_inverse(axis: Axis) -> np.ndarray:
    """The pseudo-inverse of the Gram matrix of one axis."""
    return np.linalg.pinv(gram(axis).astype(float), rcond=1e-12, hermitian=True)


def solve_gram_on_host(axis: Axis, sums: np.ndarray, i: int) -> np.ndarray:
    """The pseudo-inverse of the Gram matrix of one axis, applied along axis ``i`` of a NumPy array."""
    if axis.collides:
        return np.moveaxis(np.tensordot(_gram_inverse(axis), sums, axes=(1, i)), 0, i)
    counts = np.expand_dims(np.asarray(axis.tap_counts), [j for j in range(sums.ndim) if j != i])
    return np.where(counts > 0, sums / np.maximum(counts, 1), 0)


def _solve_gram(axis: Axis, kernel: jax.Array, i: int) -> jax.Array:
    """The pseudo-inverse of the Gram matrix of one axis, applied along axis ``i`` of the kernel."""
    if not axis.collides:  # G is diagonal: no two taps share an entry of M
        counts = jnp.asarray(axis.tap_counts, kernel.real.dtype)
        counts = jnp.expand_dims(counts, [j for j in range(kernel.ndim) if j != i])
        return jnp.where(counts > 0, kernel / jnp.maximum(counts, 1).astype(kernel.dtype), 0)
    inverse = _gram_inverse(axis)
    # [p, q] x [..., q, ...] -> [p, ...]
    product = jnp.tensordot(jnp.asarray(inverse, kernel.dtype), kernel, axes=(1, i), precision="highest")
    return jnp.moveaxis(product, 0, i)


def conv_distance(spec: ConvSpec, matrix: Array) -> jax.Array:
    """``||A - L K*|| / ||A||`` (Frobenius): how far A is from the convolutions of this geometry.

    K* is :func:`kernel_from_matrix` (docs/maths.md, sections 3 and 14). The distance is 0 for a convolution
    (and for A = 0), 1 for a matrix orthogonal to all of them, NaN where A holds NaN or Inf, and independent
    of the scale of A. The difference is summed by blocks of rows, so no second matrix is made.

    Args:
      spec: the geometry.
      matrix: array of shape ``spec.shape``; integers are taken as floats.

    Returns:
      Real scalar.

    Raises:
      TypeError: the matrix is not an array.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> float(fc.conv_distance(spec, jnp.zeros((3, 4)).at[0, 3].set(1.)))
    1.0
    """
    matrix = inexact(as_operand("matrix", matrix, spec, "shape"), 16)
    if not matrix.size:
        return jnp.zeros((), matrix.real.dtype)
    return _conv_distance(spec, matrix)


_BLOCK = 2**20  # entries of M that are made at a time


@program
def _conv_distance(spec: ConvSpec, matrix: jax.Array) -> jax.Array:
    size = min(spec.out_size, max(1, _BLOCK // spec.in_size))
    firsts = lax.iota(spec.index_dtype, -(-spec.out_size // size)) * size

    def block(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(rows, entries)``: entries that an earlier block holds too are 0."""
        start = jnp.minimum(first, spec.out_size - size)
        rows = start + lax.iota(start.dtype, size)
        entries = lax.dynamic_slice_in_dim(matrix, start, size)
        return rows, jnp.where((rows >= first)[:, None], entries, jnp.zeros((), matrix.dtype))

    # At unit scale, so that no square of a difference vanishes (docs/maths.md, section 14).
    exponent = scale_exponent(lax.map(lambda first: largest_part(block(first)[1]), firsts))
    unit = partial(to_unit_scale, exponent=exponent)
    kernel = _divided_by_gram(spec, sums_over_outputs(spec, matrix, to_unit_scale, exponent))

    def sums(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, entries = block(first)
        entries, nearest = unit(entries), matrix_rows(spec, kernel, rows)
        difference = jnp.where((rows >= first)[:, None], entries - nearest, jnp.zeros((), matrix.dtype))
        return _sum_of_squares(difference), _sum_of_squares(entries)

    off, total = (s.sum() for s in lax.map(sums, firsts))
    # Only a matrix of zeros has norm 0. It is a convolution.
    return root(off / jnp.where(total == 0, jnp.ones_like(total), total)).astype(matrix.real.dtype)


def _sum_of_squares(values: jax.Array) -> jax.Array:
    """In float32 or wider, so that long sums do not overflow half precision."""
    return squares(values.astype(np.promote_types(values.dtype, np.float32))).sum()

"""Singular values of M and what follows from all of them: condition number, rank, determinant."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.numerics import homogeneous, nan_unless_finite, unit_scale
from jaxconv_fc.sharding import program
from jaxconv_fc.spectrum import svd
from jaxconv_fc.spectrum.blocks import Blocks
from jaxconv_fc.spectrum.causal import Causal, masked
from jaxconv_fc.spectrum.operands import as_inexact, check_square


def singular_values(spec: ConvSpec, kernel: Array) -> jax.Array:
    """All singular values of M, ``sigma_1 >= sigma_2 >= ...``, exact: ``min(M.shape)`` of them.

    They are those of ``B_w[i, j] = (s*l)**-0.5 * sum of H(f)`` over ``f == w + g*i (mod m)``,
    ``f == w + g*j (mod n)``, with ``H(f) = sum over p of K[p] exp(2 pi i f (p*r - lo) / N)``, on axes that
    wrap around (in circular mode ``lo*l`` stands for ``lo``): any stride ``s``, input dilation ``l`` and
    kernel dilation ``r``. Axes that do not wrap around enter with all their positions. If none does, this is
    the SVD of the dense matrix of each group. Of a real kernel half of the frequencies are computed.

    Differentiable: every symmetric function of the values is, and each single value where it is simple.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.

    Returns:
      Real array of shape ``(min(spec.shape),)``.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape, or the blocks are beyond the memory limit.

    Source: Sedghi, Gupta & Long, The singular values of convolutional layers (2019); Senderovich et al.
    (2022) for strides; docs/maths.md, sections 5 and 11, for dilations and several axes. Cost: ``g`` SVDs of
    blocks, far less than one of M. On CPU the threads of OpenBLAS may slow down blocks of some hundred rows:
    try OPENBLAS_NUM_THREADS=1.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), [(0, 1)], padding_mode="circular")
    >>> print(fc.spectrum.singular_values(spec, jnp.array([[[1., 1.]]])).round(4) + 0)
    [2.     1.4142 1.4142 0.    ]
    """
    return _singular_values(spec, _kernel_of_blocks("singular_values", spec, kernel))


@program
def _singular_values(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    return homogeneous(partial(unit_values, spec), (1,), kernel)


def unit_values(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The singular values of a kernel at unit scale."""
    if not min(spec.shape):
        return jnp.zeros(0, kernel.real.dtype)
    # Of the transposed blocks, whose entries are in the order that LAPACK reads.
    values = Blocks.of(spec).map(lambda b: svd.singular_values(b.swapaxes(-1, -2)), kernel)
    return _descending(values.ravel())


@jax.custom_jvp
def _descending(values: jax.Array) -> jax.Array:
    """The values in descending order, NaN first. None is negative.

    So the bits of the values, read as integers, have the same order. XLA on CPU sorts integers four times
    faster.
    """
    integers = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    bits = lax.sort(lax.bitcast_convert_type(values, integers), is_stable=False)
    return lax.bitcast_convert_type(bits[::-1], values.dtype)


@_descending.defjvp
def _descending_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (values,), (change,) = primals, tangents
    order = jnp.argsort(values, descending=True)
    return values[order], change[order]


def condition_number(spec: ConvSpec, kernel: Array, *, mask: Any = None) -> jax.Array:
    """``sigma_max / sigma_min`` of the ``min(M.shape)`` singular values; inf where the least is 0.

    The zero matrix has condition number inf, and so has a causal layer (:func:`log_abs_det`) whose block on
    the diagonal is singular up to rounding. Cost and exactness as for :func:`singular_values`.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.
      mask: NumPy array of bool, of the taps' or the kernel's shape: entries of the kernel that count, the
        others are 0. None for all.

    Returns:
      A real scalar.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape, M has no entries, or the blocks are beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 2, 5), (2, 2, 1), (1,), "VALID")
    >>> print(fc.spectrum.condition_number(spec, jnp.array([[[3.], [0.]], [[0.], [6.]]])).round(5))
    2.0
    """
    kernel, causal = masked(spec, _kernel_of_blocks("condition_number", spec, kernel), mask)
    if not min(spec.shape):
        raise ValueError(
            f"condition_number: M is {spec.out_size} x {spec.in_size}; give the spec an input and output."
        )
    return _condition_number(spec, kernel, causal)


@partial(program, static_argnums=2)
def _condition_number(spec: ConvSpec, kernel: jax.Array, causal: Causal | None) -> jax.Array:
    def ratio(kernel: jax.Array) -> jax.Array:
        values = unit_values(spec, kernel)
        most, least = values[0], values[-1]
        if causal:
            least = jnp.where(causal.nullity(kernel) > 0, jnp.zeros_like(least), least)
        return jnp.where(least == 0, jnp.inf, most / jnp.where(least == 0, jnp.ones_like(least), least))

    return homogeneous(ratio, (0,), kernel)


def rank(spec: ConvSpec, kernel: Array, *, rtol: float | None = None, mask: Any = None) -> jax.Array:
    """The number of singular values ``sigma_i > rtol * sigma_1``.

    Of a causal layer (:func:`log_abs_det`) it is at most the size less the singular values of the block on
    the diagonal that are 0 up to rounding. Cost as for :func:`singular_values`.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.
      rtol: None stands for ``max(M.shape) * eps``, as in ``numpy.linalg.matrix_rank``.
      mask: NumPy array of bool, of the taps' or the kernel's shape: entries of the kernel that count, the
        others are 0. None for all.

    Returns:
      An integer scalar; -1, which is the rank of no matrix, where M holds NaN or Inf.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape, or the blocks are beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 8), (1, 1, 3), (1,), "SAME", padding_mode="circular")
    >>> print(fc.spectrum.rank(spec, jnp.array([[[-1., 2., -1.]]])))  # M maps constants to 0
    7
    """
    return _rank(spec, *masked(spec, _kernel_of_blocks("rank", spec, kernel), mask), rtol)


@partial(program, static_argnums=(2, 3))
def _rank(spec: ConvSpec, kernel: jax.Array, causal: Causal | None, rtol: float | None) -> jax.Array:
    kernel = unit_scale(kernel)[0]
    values = unit_values(spec, kernel)
    cutoff = jnp.asarray(relative_cutoff(spec, values.dtype, rtol), values.dtype) * values.max(initial=0)
    count = jnp.sum(values > cutoff)
    if causal and values.size:
        count = jnp.minimum(count, values.size - causal.nullity(kernel))
    return jnp.where(jnp.isfinite(values).all(), count, -1)


def relative_cutoff(spec: ConvSpec, dtype: Any, rtol: float | None) -> float:
    """The part of the largest singular value up to which another one counts as 0."""
    return max(spec.shape) * float(jnp.finfo(dtype).eps) if rtol is None else float(rtol)


def log_abs_det(spec: ConvSpec, kernel: Array, *, mask: Any = None) -> jax.Array:
    """``log |det M|`` of a square M: ``sum over f of log |det H(f)|`` where M wraps around.

    What a normalising flow adds for an invertible convolution; -inf where M is singular. Differentiable,
    with gradient ``M^-H`` pulled back to the kernel.

    A *causal* layer has stride 1, as many inputs as outputs, and padding ``(taps - 1) * dilation`` on one
    side of every axis. Its M is block triangular, with the block D of one tap all along the diagonal: it is
    ``positions * log |det D|``, at any size of the image. A mask makes other layers causal: those of which
    all taps in use are before their output, or at it, in an order of the axes, slowest first, and of the
    positions of each. That is found from geometry and mask alone.

    Args:
      spec: a geometry with ``out_size == in_size``. A causal layer costs one LU decomposition of D, one that
        wraps around a decomposition per frequency, and any other one of M densely, per group.
      kernel: array of shape ``spec.rhs_shape``.
      mask: NumPy array of bool, of the taps' or the kernel's shape: entries of the kernel that count, the
        others are 0. None for all.

    Returns:
      A real scalar.

    Raises:
      TypeError, ValueError: as :func:`singular_values`; M is not square; the mask is traced, or has another
        dtype or shape.

    Source: Hoogeboom, van den Berg & Welling, Emerging convolutions for generative normalizing flows (2019);
    docs/maths.md, sections 5 and 15.

    >>> import numpy as np, jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 3), (1,), "SAME")  # tridiagonal: det = n + 1
    >>> print(jnp.exp(fc.spectrum.log_abs_det(spec, jnp.array([[[-1., 2., -1.]]]))).round(4))
    6.0
    >>> mask = np.array([True, True, False])  # bidiagonal: 2 on the diagonal
    >>> print(jnp.exp(fc.spectrum.log_abs_det(spec, jnp.array([[[-1., 2., -1.]]]), mask=mask)).round(4))
    32.0
    """
    kernel, causal = masked(spec, as_inexact(spec, kernel), mask)
    check_square("log_abs_det", spec, "sum log of singular_values")
    if not causal:
        Blocks.of(spec).check_memory("log_abs_det", kernel.dtype, "a circular or causal geometry")
    return _log_abs_det(spec, kernel, causal)


@partial(program, static_argnums=2)
def _log_abs_det(spec: ConvSpec, kernel: jax.Array, causal: Causal | None) -> jax.Array:
    if not spec.in_size:
        return jnp.zeros((), kernel.real.dtype)
    # det(2**e M) == 2**(n e) det(M)
    kernel, exponent = unit_scale(kernel)
    if causal:
        value = causal.log_abs_det(kernel)
    else:
        value = Blocks.of(spec).map(lambda blocks: jnp.linalg.slogdet(blocks)[1], kernel).sum()
    value = value + exponent.astype(value.dtype) * (spec.in_size * math.log(2))
    return nan_unless_finite(value, kernel)


def _kernel_of_blocks(name: str, spec: ConvSpec, kernel: Array) -> jax.Array:
    """The kernel as it is computed with, once its blocks are known to fit into memory."""
    kernel = as_inexact(spec, kernel)
    Blocks.of(spec).check_memory(name, kernel.dtype, "top_singular_values or spectral_norm")
    return kernel

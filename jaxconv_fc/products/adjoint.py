"""The transpose of a convolution, and gradients between inputs, kernels and matrices.

A convolution is one trilinear form T[output, input, kernel entry]. It has three views: the matrix M(k)
(outputs by inputs), the kernel matrix X(x) (outputs by kernel entries), and the linear map L from kernels
to matrices. This file has M^T, X and L^T.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.layout import from_canonical
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.matrix import scatter, selects
from jaxconv_fc.matrix.dense import sums_over_outputs
from jaxconv_fc.products.product import flipped_kernel
from jaxconv_fc.sharding import by_platform, platform_forms, program


def transpose(spec: ConvSpec, kernel: Array) -> tuple[ConvSpec, jax.Array]:
    """The convolution whose matrix is ``as_matrix(spec, kernel).T``.

    The kernel is flipped, ``K'[g*(C/G) + i, o', p] = K[g*(O/G) + o', i, k-1-p]``. On each axis, stride and
    input dilation change places, and the padding becomes ``k_d - 1 - lo`` low, ``k_d - 1 - hi + remainder``
    high (docs/maths.md, section 2). Its output has exactly ``spec.in_shape``, whatever a stride left unused.
    Transposing twice gives ``spec.canonical`` and the kernel. For M^H conjugate the new kernel.

    A batch group becomes a feature group whose channels are (batch entry, channel). That is a convolution
    where the input's layout has the batch directly before the channels.

    Args:
      spec: a zeros-mode geometry.
      kernel: array of shape ``spec.rhs_shape``.

    Returns:
      ``(spec, kernel)`` of the transposed convolution; its input has the layout of the output, and the
      other way round.

    Raises:
      ValueError: a boundary mode, or batch groups in another layout: M^T is not one convolution then,
        and :func:`apply_transpose` gives its products.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 2), (2,), "VALID")
    >>> adjoint, kernel = fc.transpose(spec, jnp.array([[[1, 2]]]))
    >>> adjoint.lhs_dilation, adjoint.padding
    ((2,), ((1, 2),))
    >>> bool((fc.as_matrix(adjoint, kernel) == fc.as_matrix(spec, jnp.array([[[1, 2]]])).T).all())
    True
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    if not spec.pads_with_zeros:
        raise ValueError(
            f"transpose: M^T of padding_mode={spec.padding_mode!r} adds copies to their sources and is not a "
            "convolution. Use apply_transpose, which is exact there, or as_matrix(...).T."
        )
    plain = spec.canonical
    if plain.batch_group_count > 1:
        raise ValueError(
            f"transpose: with batch_group_count={spec.batch_group_count} the input layout "
            f"lhs_spec={spec.dimension_numbers.lhs_spec} must have the batch directly before the channels. "
            "Use apply_transpose, which is exact in every layout."
        )
    axes = [a.transpose() for a in plain.axes]
    lhs_spec, rhs_spec, out_spec = plain.dimension_numbers
    taps = {i: a.taps for i, a in zip(rhs_spec[2:], axes, strict=True)}
    channels = {rhs_spec[0]: plain.in_channels, rhs_spec[1]: plain.out_channels // plain.groups}
    sizes = {out_spec[0]: plain.lhs_shape[lhs_spec[0]], out_spec[1]: plain.out_channels}
    sizes |= {i: a.size for i, a in zip(out_spec[2:], axes, strict=True)}
    transposed = replace(
        plain,
        lhs_shape=tuple(sizes[i] for i in range(len(sizes))),
        rhs_shape=tuple((taps | channels)[i] for i in range(len(rhs_spec))),
        window_strides=tuple(a.stride for a in axes),
        lhs_dilation=tuple(a.lhs_dilation for a in axes),
        padding=tuple((a.lo, a.hi) for a in axes),
        dimension_numbers=lax.ConvDimensionNumbers(out_spec, rhs_spec, lhs_spec),
    )
    return transposed, _transposed_kernel(spec, transposed, kernel)


@program
def _transposed_kernel(spec: ConvSpec, transposed: ConvSpec, kernel: jax.Array) -> jax.Array:
    return from_canonical(flipped_kernel(spec, kernel), transposed.kernel_order)


def kernel_matrix(spec: ConvSpec, x: Array) -> jax.Array:
    """The matrix X with ``X @ kernel.ravel() == as_matrix(spec, kernel) @ x.ravel()`` (im2col).

    X is the Jacobian of the output with respect to the kernel, ``X[(d, o), (d, i, p)] = x[c(d, i), t(o, p)]``
    (docs/maths.md, section 6). Linear in x.

    Args:
      spec: the geometry.
      x: array of shape ``spec.in_shape``.

    Returns:
      Array of shape ``(spec.out_size, kernel size)``; kernel entries in the row-major order of
      ``spec.rhs_shape``.

    Raises:
      TypeError: x is not an array.
      ValueError: another shape, or X is beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.kernel_matrix(spec, jnp.array([[1, 2, 3, 4]])))
    [[1 2]
     [2 3]
     [3 4]]
    """
    x = as_operand("x", x, spec, "in_shape")
    check_array("kernel_matrix", (spec.out_size, math.prod(spec.rhs_shape)), x.dtype, "kernel_vjp", spec.nse)
    return _kernel_matrix(spec, x)


@program
def _kernel_matrix(spec: ConvSpec, x: jax.Array) -> jax.Array:
    shape = (spec.out_size, math.prod(spec.rhs_shape))
    if not spec.nse:
        return jnp.zeros(shape, x.dtype)
    form = platform_forms(scatter.kernel_matrix, selects.kernel_matrix, spec)
    return by_platform(form, jax.ShapeDtypeStruct(shape, x.dtype), x)


def matrix_vjp(spec: ConvSpec, matrix_bar: Array) -> jax.Array:
    """``L^T``, the transpose of :func:`as_matrix`: a cotangent of M -> the cotangent of the kernel.

    ``kernel_bar[d, i, p] = sum_o matrix_bar[(d, o), (c(d, i), t(o, p))]``. Reads the stored entries only,
    and makes no second matrix. ``matrix_vjp(spec, outer(y_bar, x))`` is :func:`kernel_vjp` (docs/maths.md,
    section 6).

    Args:
      spec: the geometry.
      matrix_bar: array of shape ``spec.shape``.

    Returns:
      Array of shape ``spec.rhs_shape``.

    Raises:
      TypeError: not an array.
      ValueError: another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.matrix_vjp(spec, jnp.ones((3, 4))))
    [[[3. 3.]]]
    """
    return _matrix_vjp(spec, as_operand("matrix_bar", matrix_bar, spec, "shape"))


@program
def _matrix_vjp(spec: ConvSpec, matrix_bar: jax.Array) -> jax.Array:
    return sums_over_outputs(spec, matrix_bar)

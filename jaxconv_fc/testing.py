"""Assertions about a convolution and its transpose, for this test suite and for yours."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.modes import MODES
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.matrix.dense import as_matrix
from jaxconv_fc.products.adjoint import transpose
from jaxconv_fc.products.product import apply, apply_transpose

__all__ = ["assert_matches_lax", "assert_transpose", "dot_test"]


def dot_test(spec: ConvSpec, kernel: Array, *, key: jax.Array | None = None) -> float:
    """The relative error of ``<M x, y> == <x, M^T y>`` on random x and y.

    ``|<M x, y> - <x, M^T y>| / <|M| |x|, |y|>``. If :func:`apply_transpose` is the transpose of
    :func:`apply`, this is about the rounding of the dtype, and exactly 0 for integers. A complex kernel is
    tested twice, as M^T and as M^H (the transpose with the conjugate kernel), and the larger error returned.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      key: a ``jax.random.key`` for x and y.

    Returns:
      The error, a Python float.

    Raises:
      TypeError: the kernel is not an array, or is bool.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 2), (2,), "VALID")
    >>> fc.testing.dot_test(spec, jnp.array([[[1., 2.]]])) < 1e-6
    True
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    x_key, y_key = jax.random.split(jax.random.key(0) if key is None else key)
    x, y = (_random(k, s, kernel.dtype) for k, s in ((x_key, spec.in_shape), (y_key, spec.out_shape)))
    forward = _wide(apply(spec, kernel, x, precision="highest"))
    back = _wide(apply_transpose(spec, kernel, y, precision="highest"))
    x64, y64 = _wide(x), _wide(y)
    errors = [abs(complex(np.sum(forward * y64)) - complex(np.sum(x64 * back)))]
    if jnp.iscomplexobj(kernel):
        adjoint = _wide(apply_transpose(spec, kernel.conj(), y, precision="highest"))
        errors.append(abs(complex(np.vdot(y64, forward)) - complex(np.vdot(adjoint, x64))))
    size = float(np.sum(_magnitude(spec, kernel, x) * np.abs(y64)))
    return float(np.max(errors)) / size if size else float(np.max(errors))


def assert_transpose(spec: ConvSpec, kernel: Array, *, key: jax.Array | None = None) -> None:
    """Assert that every way to M^T agrees with ``as_matrix(spec, kernel).T @ y``.

    :func:`apply_transpose` and ``jax.linear_transpose`` of :func:`apply` must equal ``M.T @ y`` within the
    rounding of the dtype. Where M^T is a convolution (not in boundary modes),
    ``as_matrix(*transpose(spec, kernel))`` must equal ``as_matrix(spec, kernel).T`` entry for entry.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      key: a ``jax.random.key`` for y.

    Raises:
      TypeError: the kernel is not an array.
      ValueError: it has another shape.
      AssertionError: two of them differ; it names the pair and the largest difference.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 2, 6), (4, 1, 3), (2,), [(-1, 2)], feature_group_count=2)
    >>> fc.testing.assert_transpose(spec, jnp.arange(12.).reshape(4, 1, 3))
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    matrix = np.asarray(as_matrix(spec, kernel))
    y = _random(jax.random.key(0) if key is None else key, spec.out_shape, kernel.dtype)
    expected = _wide(matrix).T @ _wide(y).ravel()
    size = np.abs(_wide(matrix)).T @ np.abs(_wide(y)).ravel()  # |M|^T |y|
    bound = _gamma(spec, kernel.dtype, outputs=True) * size
    x_bar = apply_transpose(spec, kernel, y, precision="highest")
    _close(spec, "apply_transpose and M.T @ y", x_bar, expected, bound)
    if jnp.issubdtype(kernel.dtype, jnp.inexact):  # JAX gives integers no tangents
        like = jax.ShapeDtypeStruct(spec.in_shape, kernel.dtype)
        (x_bar,) = jax.linear_transpose(partial(apply, spec, kernel, precision="highest"), like)(y)
        _close(spec, "jax.linear_transpose(apply) and M.T @ y", x_bar, expected, bound)
    if spec.pads_with_zeros and spec.canonical.batch_group_count == 1:
        transposed = np.asarray(as_matrix(*transpose(spec, kernel)))
        zero = np.zeros(transposed.shape)
        _close(spec, "as_matrix(*transpose(...)) and M.T", transposed, _wide(matrix).T, zero)


def assert_matches_lax(
    spec: ConvSpec, kernel: Array, x: Array | None = None, *, key: jax.Array | None = None
) -> None:
    """Assert that ``M @ x`` and :func:`apply` equal ``lax.conv_general_dilated`` on one example.

    lax gets the input already dilated and padded (by ``lax.pad``, or ``jnp.pad`` for a boundary mode). By
    definition that is the same convolution. lax computes it on the CPU: a GPU refuses integers, complex
    numbers and more than 3 spatial dimensions. M and :func:`apply` are those of the default device. Exact for
    integers, otherwise within ``2 gamma_n |M| |x|``.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      x: array of shape ``spec.in_shape``; random if None.
      key: a ``jax.random.key`` for x.

    Raises:
      TypeError: kernel or x is not an array, or their dtypes differ.
      ValueError: a shape is not the spec's.
      AssertionError: two of them differ; it names the pair and the largest difference.
      RuntimeError: JAX may not use the CPU; write ``JAX_PLATFORMS=cuda,cpu`` in place of ``cuda``.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 2, 6), (4, 1, 3), (2,), "SAME", feature_group_count=2)
    >>> fc.testing.assert_matches_lax(spec, jnp.arange(12.).reshape(4, 1, 3))
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    if x is None:
        x = _random(jax.random.key(0) if key is None else key, spec.in_shape, kernel.dtype)
    x = as_operand("x", x, spec, "in_shape")
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = (jnp.asarray(np.asarray(array)) for array in (kernel, x))
        expected = _wide(_lax(spec, *on_cpu)).ravel()
    bound = 2 * _gamma(spec, kernel.dtype) * _magnitude(spec, kernel, x).ravel()
    product = _wide(as_matrix(spec, kernel)) @ _wide(x).ravel()
    _close(spec, "M @ x and lax", product, expected, bound)
    _close(spec, "apply and lax", apply(spec, kernel, x, precision="highest"), expected, bound)


def _lax(spec: ConvSpec, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """lax's convolution of one example that has been dilated and padded before."""
    batch, _, *spatial = spec.dimension_numbers.lhs_spec
    lhs = x if spec.batch_group_count > 1 else jnp.expand_dims(x, batch)
    zero = jnp.zeros((), x.dtype)
    holes, pads = [(0, 0, 0)] * lhs.ndim, [(0, 0)] * lhs.ndim
    for i, axis in zip(spatial, spec.axes, strict=True):
        interior = axis.lhs_dilation - 1
        holes[i] = (axis.on_padded.lo, axis.on_padded.hi, interior)
        pads[i] = axis.copied
    y = lax.conv_general_dilated(
        lax.pad(jnp.pad(lhs, pads, mode=MODES[spec.padding_mode].numpy_name), zero, holes),
        kernel,
        spec.window_strides,
        "VALID",
        rhs_dilation=spec.rhs_dilation,
        dimension_numbers=spec.dimension_numbers,
        feature_group_count=spec.feature_group_count,
        batch_group_count=spec.batch_group_count,
        precision="highest",
    )
    return jnp.squeeze(y, spec.dimension_numbers.out_spec[0])


def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.inexact):
        return jax.random.normal(key, shape, dtype)
    return jax.random.randint(key, shape, 0, 5).astype(dtype)


def _wide(array: Any) -> np.ndarray:
    """The same numbers in int64, float64 or complex128, where products and sums are nearly exact."""
    array = np.asarray(array)
    return array.astype(np.int64 if array.dtype.kind in "iub" else np.result_type(array.dtype, np.float64))


def _gamma(spec: ConvSpec, dtype: Any, *, outputs: bool = False) -> float:
    """The bound ``n u / (1 - n u)`` on the relative error of a sum of n products; 0 for integers.

    No entry of ``M x``, or with ``outputs`` of ``M^T y``, is the sum of more.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    channels = spec.out_channels // spec.groups if outputs else spec.group_channels
    terms = channels * math.prod(a.taps * (a.copies if outputs else 1) for a in spec.axes) + 2
    complexity = 4 if jnp.issubdtype(dtype, jnp.complexfloating) else 1  # products of complex numbers
    rounding = complexity * terms * float(jnp.finfo(dtype).eps) / 2
    return rounding / (1 - rounding) if rounding < 1 else math.inf


def _magnitude(spec: ConvSpec, kernel: jax.Array, x: jax.Array) -> np.ndarray:
    """``|M| |x|`` in float64. The rounding error of ``M x`` is proportional to it."""
    matrix = np.abs(_wide(as_matrix(spec, kernel)))
    return (matrix @ np.abs(_wide(x)).ravel()).reshape(spec.out_shape)


def _close(spec: ConvSpec, what: str, got: Any, expected: np.ndarray, bound: np.ndarray) -> None:
    difference = np.abs(_wide(got).reshape(expected.shape) - expected)
    if not (difference <= bound).all():
        worst = np.unravel_index(np.argmax(difference - bound), difference.shape)
        raise AssertionError(
            f"{what} differ by up to {difference.max():.3g} where {bound[worst]:.3g} is allowed, at "
            f"{tuple(map(int, worst))}, for {spec}."
        )


def __dir__() -> list[str]:
    return list(__all__)

"""Kernels and vectors as the functions of this room take them and return them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.geometry.arguments import Array, check_same_dtype
from jaxconv_fc.geometry.layout import from_canonical
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.numerics import inexact


def as_inexact(spec: ConvSpec, kernel: Array, terms: Callable[[ConvSpec], int] | None = None) -> jax.Array:
    """The kernel in a floating or complex dtype of at least 32 bits.

    With ``terms``, integers are cast to the default integer dtype instead, if it holds every sum of
    ``terms(spec)`` entries of the kernel's dtype.
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    if kernel.dtype == jnp.bool_:
        raise TypeError("kernel is bool, whose matrix has no norms: cast it with .astype(float).")
    kernel = without_unread_taps(spec, kernel)
    if terms is not None and jnp.issubdtype(kernel.dtype, jnp.integer):
        info, default = jnp.iinfo(kernel.dtype), jnp.result_type(int)
        if terms(spec) * max(-int(info.min), int(info.max)) <= int(jnp.iinfo(default).max):
            return kernel.astype(default)
    return inexact(kernel)


def as_system(spec: ConvSpec, kernel: Array, y: Array) -> tuple[jax.Array, jax.Array]:
    """Kernel and right side of ``M x = y``, of one dtype."""
    kernel, y = as_operand("kernel", kernel, spec, "rhs_shape"), as_operand("y", y, spec, "out_shape")
    check_same_dtype("kernel", kernel, "y", y)
    return kernel, y


def without_unread_taps(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The kernel with 0 for taps that read no input: they are not in M, and must not set its scale."""
    for i, axis in zip(spec.dimension_numbers.rhs_spec[2:], spec.axes, strict=True):
        reads = np.asarray(axis.tap_counts) > 0
        if not reads.all():
            shape = [axis.taps if j == i else 1 for j in range(kernel.ndim)]
            kernel = jnp.where(reads.reshape(shape), kernel, jnp.zeros((), kernel.dtype))
    return kernel


def widened(array: jax.Array) -> jax.Array:
    """The array in the default floating dtype, the only one that matfree and lineax's LSMR compute in."""
    default = jnp.result_type(float)
    return array.astype(np.result_type(default, np.complex64) if jnp.iscomplexobj(array) else default)


def as_image(spec: ConvSpec, value: jax.Array, *, output: bool) -> jax.Array:
    """``[positions..., group, channel]`` as an output of the convolution, or as an input, in their layout."""
    shape, order = (spec.out_shape, spec.out_order) if output else (spec.in_shape, spec.in_order)
    return from_canonical(value.reshape([shape[i] for i in order]), order)


def from_image(spec: ConvSpec, image: jax.Array) -> jax.Array:
    """An input of the convolution as ``[positions..., group, channel]``: the inverse of :func:`as_image`."""
    positions = (axis.size for axis in spec.axes)
    return jnp.transpose(image, spec.in_order).reshape(*positions, spec.groups, spec.group_channels)


def check_square(name: str, spec: ConvSpec, instead: str) -> None:
    if spec.out_size != spec.in_size:
        raise ValueError(
            f"{name} needs a square M, got {spec.out_size} x {spec.in_size} from in_shape {spec.in_shape} "
            f"and out_shape {spec.out_shape}. Use {instead}."
        )

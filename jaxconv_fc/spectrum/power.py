"""The power method one step at a time, for a training loop that keeps its vector."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.spec import ConvSpec, as_operand, check_spec
from jaxconv_fc.numerics import nan_unless_finite, times_power_of_two, unit_scale
from jaxconv_fc.products.product import apply, apply_transpose
from jaxconv_fc.sharding import program
from jaxconv_fc.spectrum.golub_kahan import normalised
from jaxconv_fc.spectrum.operands import as_inexact


class PowerStep(NamedTuple):
    """``sigma = ||M^H u||`` with ``u = M v / ||M v||``, at most the spectral norm; the vector to go on with.

    Attributes:
      sigma: a real scalar, differentiable in the kernel.
      v: of ``spec.in_shape`` and norm 1, without derivative.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 1), (1, 1, 1), (1,), "VALID")
    >>> v = fc.spectrum.start_vector(spec, jnp.float32, jax.random.key(0))
    >>> print(fc.spectrum.power_step(spec, jnp.array([[[-3.0]]], jnp.float32), v).sigma)
    3.0
    """

    sigma: jax.Array  # real scalar, differentiable in the kernel
    v: jax.Array  # spec.in_shape, of norm 1, without derivative


def power_step(spec: ConvSpec, kernel: Array, v: Array) -> PowerStep:
    """One step of the power method on ``M^H M``: ``u = M v / ||M v||``, then ``sigma v' = M^H u``.

    ``sigma = ||M^H u||`` is a lower bound of ``||M||_2`` and grows from step to step. In a training loop the
    kernel moves little from step to step, so one call per step keeps ``sigma`` near the norm. The error falls
    by the factor ``(sigma_2 / sigma_1)**4`` per step, where sigma_2 is the next smaller singular value.

    The derivative in the kernel is ``Re(u^H dM v')``, with both vectors held constant. At convergence it is
    that of :func:`spectral_norm`. Use ``jax.vmap`` for several vectors.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats, halves as float32.
      v: array of shape ``spec.in_shape`` and the kernel's dtype, from :func:`start_vector` or the step
        before. Its length does not matter.

    Returns:
      ``(sigma, v')``: a real scalar, and the next vector, of norm 1. Where ``M v`` is 0, sigma is 0 and
      ``v'`` is v. Both are NaN where the kernel or v is not finite.

    Raises:
      TypeError: kernel or v is not an array of numbers, or their dtypes differ.
      ValueError: a shape is not the spec's.

    Source: Miyato et al., Spectral normalization for generative adversarial networks (2018), with the true M
    in place of the reshaped kernel; docs/maths.md, section 5. Cost: two products, and one kernel gradient
    for the derivative.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 8), (1, 1, 2), (1,), [(0, 1)], padding_mode="circular")
    >>> v = fc.spectrum.start_vector(spec, jnp.float32, jax.random.key(0))
    >>> for _ in range(30):
    ...     sigma, v = fc.spectrum.power_step(spec, jnp.array([[[1.0, 1.0]]], jnp.float32), v)
    >>> print(sigma.round(2))
    2.0
    """
    kernel, v = as_inexact(spec, kernel), as_operand("v", v, spec, "in_shape")
    if v.dtype != kernel.dtype:
        raise TypeError(
            f"v is {v.dtype}, and the kernel counts as {kernel.dtype}: start_vector(spec, kernel.dtype, key) "
            "makes one that fits."
        )
    return PowerStep(*_power_step(spec, kernel, v))


def start_vector(spec: ConvSpec, dtype: Any, key: Any) -> jax.Array:
    """A random ``v`` of ``spec.in_shape`` with ``||v|| = 1``, from which :func:`power_step` starts.

    Args:
      spec: the geometry.
      dtype: that of the kernel; float32 for halves, the default float for integers.
      key: of ``jax.random``.

    Returns:
      Array of shape ``spec.in_shape``.

    Raises:
      TypeError: ``spec`` is not a ConvSpec, or the dtype is bool.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 3, 8, 8), (4, 3, 3, 3), (1, 1), "SAME")
    >>> fc.spectrum.start_vector(spec, jnp.float32, jax.random.key(0)).shape
    (3, 8, 8)
    """
    check_spec(spec)
    kernel = jax.eval_shape(lambda: as_inexact(spec, jnp.zeros(spec.rhs_shape, dtype)))
    return normalised(jax.random.normal(key, spec.in_shape, kernel.dtype))[0]


@program
def _power_step(spec: ConvSpec, kernel: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _step(spec, kernel, v)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _step(spec: ConvSpec, kernel: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _vectors(spec, kernel, v)[:2]


@_step.defjvp
def _step_jvp(spec: ConvSpec, primals: Any, tangents: Any) -> Any:
    """``d sigma = Re(u^H dM v')``."""
    sigma, right, left = _vectors(spec, *primals)
    change = jnp.sum(left.conj() * apply(spec, tangents[0], right, precision="highest")).real
    return (sigma, right), (change, jnp.zeros_like(right))


def _vectors(spec: ConvSpec, kernel: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(sigma, v', u)``, at unit scale."""
    unit, exponent = unit_scale(kernel)
    left, _ = normalised(apply(spec, unit, unit_scale(v)[0], precision="highest"))
    right, sigma = normalised(apply_transpose(spec, unit.conj(), left, precision="highest"))
    right = jnp.where(sigma > 0, right, v)
    return nan_unless_finite((times_power_of_two(sigma, exponent), right, left), kernel, v)

"""The power method one step at a time, for a training loop that keeps its vectors."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxconv_fc.geometry.arguments import Array, as_array, as_int
from jaxconv_fc.geometry.spec import ConvSpec, as_operand, check_spec
from jaxconv_fc.numerics import nan_unless_finite, times_power_of_two, unit_scale
from jaxconv_fc.products.product import apply, apply_transpose
from jaxconv_fc.sharding import program
from jaxconv_fc.spectrum import svd
from jaxconv_fc.spectrum.golub_kahan import normalised
from jaxconv_fc.spectrum.operands import as_inexact


class PowerStep(NamedTuple):
    """``sigma = ||M^H u||`` with ``u = M v / ||M v||``, at most the spectral norm; the vector to go on with.

    Attributes:
      sigma: a real scalar, differentiable in the kernel; of k vectors an array of shape ``(k,)``, descending.
      v: of ``spec.in_shape`` and norm 1, without derivative; of k vectors ``(k, *spec.in_shape)``,
        orthonormal.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 1), (1, 1, 1), (1,), "VALID")
    >>> v = fc.spectrum.start_vector(spec, jnp.float32, jax.random.key(0))
    >>> print(fc.spectrum.power_step(spec, jnp.array([[[-3.0]]], jnp.float32), v).sigma)
    3.0
    """

    sigma: jax.Array  # real scalar or (k,), differentiable in the kernel
    v: jax.Array  # spec.in_shape or (k, *spec.in_shape), of norm 1, without derivative


def power_step(spec: ConvSpec, kernel: Array, v: Array) -> PowerStep:
    """One step of the power method on ``M^H M``: ``u = M v / ||M v||``, then ``sigma v' = M^H u``.

    ``sigma = ||M^H u||`` is a lower bound of ``||M||_2`` and grows from step to step. In a training loop the
    kernel moves little from step to step, so one call per step keeps ``sigma`` near the norm. The error falls
    by the factor ``(sigma_2 / sigma_1)**4`` per step, where sigma_2 is the next smaller singular value.

    The derivative in the kernel is ``Re(u^H dM v')``, with both vectors held constant. At convergence it is
    that of :func:`spectral_norm`.

    One vector lags where the two largest values of M change places, as they do in training: it follows the
    old one for a while. A block of k vectors has the new one in it. With an orthonormal basis P of all
    ``M v``, its step is ``M^H P = V' S Q^H``: sigma is S, descending, with the orthonormal vectors V' and
    ``U = P Q``. The first value is at least that of a step of any single vector of the span, and value i
    converges to the i-th of M with the factor ``(sigma_(k+1) / sigma_i)**4``.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats, halves as float32.
      v: array of shape ``spec.in_shape``, or ``(k, *spec.in_shape)`` with k up to ``min(spec.shape)``, and
        the kernel's dtype, from :func:`start_vector` or the step before. Lengths and angles do not matter.

    Returns:
      ``(sigma, v')``: a real scalar, and the next vector, of norm 1; of a block real values ``(k,)``, and the
      next block. Where ``M v`` is 0, sigma is 0 and ``v'`` is v. Both are NaN where the kernel or v is not
      finite.

    Raises:
      TypeError: kernel or v is not an array of numbers, or their dtypes differ.
      ValueError: a shape is not the spec's, or a block has no vector or more than M has singular values.

    Source: Miyato et al., Spectral normalization for generative adversarial networks (2018), with the true M
    in place of the reshaped kernel; Rutishauser, Simultaneous iteration method for symmetric matrices (1970);
    docs/maths.md, section 5. Cost: two products per vector, and one kernel gradient each for the derivative;
    of a block two QR decompositions.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 8), (1, 1, 2), (1,), [(0, 1)], padding_mode="circular")
    >>> v = fc.spectrum.start_vector(spec, jnp.float32, jax.random.key(0))
    >>> for _ in range(30):
    ...     sigma, v = fc.spectrum.power_step(spec, jnp.array([[[1.0, 1.0]]], jnp.float32), v)
    >>> print(sigma.round(2))
    2.0
    """
    kernel, v = as_inexact(spec, kernel), as_array("v", v)
    if v.ndim == len(spec.in_shape) + 1 and v.shape[1:] == spec.in_shape:
        if not 1 <= v.shape[0] <= min(spec.shape):
            raise ValueError(
                f"v is a block of {v.shape[0]} vectors, and M has {min(spec.shape)} singular values: give "
                "between 1 and so many."
            )
    else:
        v = as_operand("v", v, spec, "in_shape")
    if v.dtype != kernel.dtype:
        raise TypeError(
            f"v is {v.dtype}, and the kernel counts as {kernel.dtype}: start_vector(spec, kernel.dtype, key) "
            "makes one that fits."
        )
    return PowerStep(*_power_step(spec, kernel, v))


def start_vector(spec: ConvSpec, dtype: Any, key: Any, *, k: int | None = None) -> jax.Array:
    """A random ``v`` of ``spec.in_shape`` with ``||v|| = 1``, from which :func:`power_step` starts.

    Args:
      spec: the geometry.
      dtype: that of the kernel; float32 for halves, the default float for integers.
      key: of ``jax.random``.
      k: how many vectors, as a block; at most ``min(spec.shape)`` are taken. None for one without a block.

    Returns:
      Array of shape ``spec.in_shape``, or ``(min(k, *spec.shape), *spec.in_shape)``.

    Raises:
      TypeError: ``spec`` is not a ConvSpec, the dtype is bool, or k is not an int.
      ValueError: k is below 1.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 3, 8, 8), (4, 3, 3, 3), (1, 1), "SAME")
    >>> fc.spectrum.start_vector(spec, jnp.float32, jax.random.key(0)).shape
    (3, 8, 8)
    """
    check_spec(spec)
    kernel = jax.eval_shape(lambda: as_inexact(spec, jnp.zeros(spec.rhs_shape, dtype)))
    if k is None:
        return normalised(jax.random.normal(key, spec.in_shape, kernel.dtype))[0]
    k = min(as_int("k", k, least=1), *spec.shape)
    return jax.vmap(lambda v: normalised(v)[0])(jax.random.normal(key, (k, *spec.in_shape), kernel.dtype))


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

    def along(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.sum(left.conj() * apply(spec, tangents[0], right, precision="highest")).real

    change = (jax.vmap(along) if sigma.ndim else along)(left, right)
    return (sigma, right), (change, jnp.zeros_like(right))


def _vectors(spec: ConvSpec, kernel: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(sigma, v', u)``, at unit scale."""
    unit, exponent = unit_scale(kernel)

    def times(v: jax.Array) -> jax.Array:
        return apply(spec, unit, unit_scale(v)[0], precision="highest")

    def back(u: jax.Array) -> jax.Array:
        return apply_transpose(spec, unit.conj(), u, precision="highest")

    if v.ndim == len(spec.in_shape):
        left, _ = normalised(times(v))
        right, sigma = normalised(back(left))
        right = jnp.where(sigma > 0, right, v)
    else:
        left = _orthonormal(jax.vmap(times)(v))[0]
        right, triangle = _orthonormal(jax.vmap(back)(left))  # M^H P = Z R, and R = X S Q^H
        turned, sigma, turns = svd.decomposed(triangle)
        right = jnp.where(sigma[0] > 0, _turned(right, turned), v)  # V' = Z X
        left = _turned(left, turns.conj().T)  # U = P Q
    return nan_unless_finite((times_power_of_two(sigma, exponent), right, left), kernel, v)


def _orthonormal(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(Q, R)``: the orthonormal vectors Q with the span of these, which are ``Q R`` as columns."""
    q, r = jnp.linalg.qr(vectors.reshape(len(vectors), -1).T)
    return q.T.reshape(vectors.shape), r


def _turned(vectors: jax.Array, by: jax.Array) -> jax.Array:
    """The columns of ``V by``, where the vectors are the columns of V: ``[j, ...] [j, i] -> [i, ...]``."""
    return jnp.tensordot(by, vectors, [[0], [0]], precision="highest")

"""Scales, extremes, roots and sums: what functions need that square, iterate or take a maximum.

*Scale.* In float32 the square of 1e-20 is 0 and that of 1e20 is infinite. So such a function is evaluated at
unit scale (docs/maths.md, section 14): its operands are multiplied by the power of two that brings the
largest magnitude into [1, 2), and its result is multiplied back. Both steps are exact.

*Extremes.* JAX differentiates a maximum by comparing every entry with the maximum. Under jit XLA may compute
the entries a second time, with other roundings, so that no entry equals the maximum. Here the derivative is
that of the entry at the place that ``argmax`` found.

*Roots.* The square root has an infinite derivative at 0. Here it has derivative 0, a subgradient of a norm.

*Sums.* They keep the dtype of their terms, and add narrow floats in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def summed(terms: jax.Array, axis: int | Sequence[int] | None = None) -> jax.Array:
    """The sum in the dtype of the terms.

    By default jnp widens small integers, and adds bfloat16 in float32. In bfloat16 XLA on CPU adds three
    times slower.
    """
    return terms.sum(axis, dtype=None if jnp.issubdtype(terms.dtype, jnp.inexact) else terms.dtype)


def inexact(array: jax.Array, least_bits: int = 32) -> jax.Array:
    """The array in a floating or complex dtype of at least so many bits, 16 or more; integers as floats.

    The bits of a number are read here of such dtypes only (:func:`_format`): narrower ones have biases and
    largest numbers of their own.
    """
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array.astype(jnp.result_type(float))
    return array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < least_bits else array


# -- scale ---------------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def homogeneous(of: Callable[..., Any], degrees: Sequence[int], *arrays: jax.Array) -> Any:
    """``of(*arrays)``, evaluated at unit scale, for ``of`` homogeneous of degree ``degrees[i]`` in array i.

    With ``a_i = 2**e_i u_i`` it is ``2**total * of(u_1, u_2, ...)``, where ``total`` is the sum of
    ``degrees[i] * e_i``. The derivative in array i is homogeneous too, of one degree less. So the tangent of
    array i is multiplied by ``2**(total - e_i)``, which is 1 for a norm of one array: derivatives neither
    overflow nor vanish unless the function does.
    """
    units, exponents = zip(*map(unit_scale, arrays), strict=True)
    total = sum(d * e for d, e in zip(degrees, exponents, strict=True))
    return jax.tree.map(lambda v: times_power_of_two(v, total), of(*units))


@homogeneous.defjvp
def _homogeneous_jvp(of: Any, degrees: Any, arrays: Any, changes: Any) -> tuple[Any, Any]:
    units, exponents = zip(*map(unit_scale, arrays), strict=True)
    # d of(a) [da_i] = 2**(total - e_i) d of(u) [da_i]
    total = sum(d * e for d, e in zip(degrees, exponents, strict=True))
    changes = tuple(times_power_of_two(c, total - e) for c, e in zip(changes, exponents, strict=True))
    values, slopes = jax.jvp(of, units, changes)
    return jax.tree.map(lambda v: times_power_of_two(v, total), values), slopes


def unit_scale(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(unit, e)`` with ``array == 2**e * unit`` exactly, the largest magnitude of ``unit`` in [1, 2).

    Real and imaginary parts count as entries of their own. Inf and NaN are left as they are; e is 0 if no
    finite entry differs from 0. Subnormal entries become normal numbers, also where the backend flushes them
    to 0. The exponent is an int32 scalar without derivative. It stays in the range where both ``2**e`` and
    ``2**-e`` are normal numbers. So the largest magnitude of ``unit`` may be in [2, 4) for the very largest
    arrays, and below 1 for subnormal ones.
    """
    exponent = scale_exponent(array)
    return to_unit_scale(array, exponent), exponent


def scale_exponent(array: jax.Array) -> jax.Array:
    """The exponent of :func:`unit_scale`, ``floor(log2(largest finite magnitude))``, read from the bits."""
    parts = [lax.stop_gradient(part) for part in _parts(array)]
    digits, bias, integers = _format(parts[0].dtype)
    bits = [_magnitude_bits(part) for part in parts]
    finite = [jnp.where(b >> digits <= 2 * bias, b, jnp.zeros_like(b)) for b in bits]
    most = jnp.stack([jnp.max(b, initial=0) for b in finite]).max()
    # Bits of normal numbers: (exponent + bias) * 2**digits + fraction.  Those of subnormal numbers count
    # multiples of the smallest number, 2**(1 - bias - digits).
    subnormal = jnp.asarray(jnp.iinfo(integers).bits - 1, integers) - lax.clz(most) + (1 - bias - digits)
    exponent = jnp.where(most >> digits > 0, (most >> digits) - bias, subnormal)
    exponent = jnp.where(most > 0, exponent, jnp.zeros_like(exponent)).astype(jnp.int32)
    return jnp.clip(exponent, 1 - bias, bias - 1)


def largest_part(array: jax.Array) -> jax.Array:
    """The largest finite magnitude of a real or imaginary part, without derivative: of the same exponent."""
    sizes = jnp.stack([jnp.abs(lax.stop_gradient(part)) for part in _parts(array)])
    return jnp.max(jnp.where(jnp.isfinite(sizes), sizes, jnp.zeros_like(sizes)), initial=0)


def to_unit_scale(array: jax.Array, exponent: jax.Array) -> jax.Array:
    """``array * 2**-exponent``, where the exponent is that of the array or of a larger one around it."""
    units = [_normal(part, exponent) for part in _parts(array)]
    return lax.complex(*units) if len(units) == 2 else units[0]


def _parts(array: Any) -> list[Any]:
    return [array.real, array.imag] if jnp.iscomplexobj(array) else [array]


def times_power_of_two(value: jax.Array, exponent: Any) -> jax.Array:
    """``value * 2**exponent``, exactly where the result is a normal number; any integer exponent."""
    if jnp.iscomplexobj(value):  # part by part: 0 * Inf in a product of complex numbers is NaN
        return lax.complex(times_power_of_two(value.real, exponent), times_power_of_two(value.imag, exponent))
    most = _format(value.dtype).bias - 1
    # XLA would multiply constant factors with each other, which may overflow where the result does not.
    exponent = lax.optimization_barrier(jnp.asarray(exponent, jnp.int32))
    # Three factors are enough: they lead from the smallest number to the largest.
    for _ in range(3):
        step = jnp.clip(exponent, -most, most)
        value = value * _power_of_two(step, value.dtype)
        exponent = exponent - step
    return value


def nan_unless_finite(result: Any, *operands: jax.Array) -> Any:
    """The result, or NaN everywhere if an operand holds NaN or Inf: for algorithms that may hide one."""
    finite = jnp.stack([jnp.isfinite(operand).all() for operand in operands]).all()
    return jax.tree.map(lambda v: jnp.where(finite, v, jnp.full_like(v, jnp.nan)), result)


def host_unit_scale(array: np.ndarray) -> tuple[np.ndarray, int]:
    """``(unit, e)`` of :func:`unit_scale`, for a NumPy array of finite numbers in double precision."""
    exponent = int(np.frexp(max(float(np.abs(part).max(initial=0)) for part in _parts(array)))[1]) - 1
    return host_times_power_of_two(array, -exponent), exponent


def host_times_power_of_two(array: np.ndarray, exponent: int) -> np.ndarray:
    """``array * 2**exponent`` of a NumPy array, exactly where the result is a normal number."""
    parts = [np.ldexp(part, exponent) for part in _parts(array)]
    return parts[0] + 1j * parts[1] if len(parts) == 2 else parts[0]


def _normal(part: jax.Array, exponent: jax.Array) -> jax.Array:
    """``part * 2**-exponent``. Subnormal entries are read from their bits: a product may flush them to 0."""
    digits, bias, _ = _format(part.dtype)
    product = part * _power_of_two(-exponent, part.dtype)
    fixed = lax.stop_gradient(part)
    bits = _magnitude_bits(fixed)
    # A subnormal number is bits * 2**(1 - bias - digits).
    small = bits.astype(part.dtype) * jnp.asarray(2.0**-digits, part.dtype)
    small = small * _power_of_two(jnp.maximum(1 - bias - exponent, 1 - bias), part.dtype)
    small = jnp.where(lax.bitcast_convert_type(fixed, bits.dtype) < 0, -small, small)
    subnormal = (bits > 0) & (bits >> digits == 0)
    return jnp.where(subnormal, product + (small - lax.stop_gradient(product)), product)


def _power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """``2**exponent``, made of its bits: exp2 and ldexp need not be exact."""
    digits, bias, integers = _format(dtype)
    return lax.bitcast_convert_type((exponent + bias).astype(integers) << digits, dtype)


def _magnitude_bits(part: jax.Array) -> jax.Array:
    """The bits of ``|part|`` as integers: larger for larger magnitudes."""
    integers = _format(part.dtype).integers
    all_but_sign = jnp.asarray(jnp.iinfo(integers).max, integers)
    return lax.bitcast_convert_type(part, integers) & all_but_sign


class _Format(NamedTuple):
    """How a real floating dtype of 16 bits or more stores a number: as IEEE 754 does."""

    digits: int  # binary digits of the fraction
    bias: int  # what is added to the exponent
    integers: Any  # the dtype of signed integers of the same width


def _format(dtype: Any) -> _Format:
    info = jnp.finfo(dtype)
    return _Format(info.nmant, int(info.maxexp) - 1, jnp.dtype(f"int{info.bits}"))


# -- extremes ------------------------------------------------------------------------------------


def largest(values: jax.Array) -> jax.Array:
    """The maximum of all entries (norms), 0 if there are none, NaN if one is NaN.

    Its derivative is that of one entry that attains it.
    """
    return _extreme(True, values.ravel()) if values.size else jnp.zeros((), values.dtype)


def least(values: jax.Array) -> jax.Array:
    """The minimum of all entries; NaN if one is NaN. Its derivative is that of one entry that attains it."""
    return _extreme(False, values.ravel())


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _extreme(most: bool, values: jax.Array) -> jax.Array:
    return jnp.max(values) if most else jnp.min(values)


@_extreme.defjvp
def _extreme_jvp(most: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (values,), (change,) = primals, tangents
    place = (jnp.argmax if most else jnp.argmin)(values)
    return _extreme(most, values), jnp.take(change, place, mode="clip")


# -- roots ---------------------------------------------------------------------------------------


def root(value: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0; NaN of NaN."""
    zero = value == 0
    root = jnp.sqrt(jnp.where(zero, jnp.ones_like(value), value))
    return jnp.where(zero, jnp.zeros_like(root), root)


def squares(value: jax.Array) -> jax.Array:
    """``|value|**2``."""
    return value.real**2 + value.imag**2 if jnp.iscomplexobj(value) else value * value


def lengths(vectors: jax.Array) -> jax.Array:
    """Euclidean norms along the last axis, each evaluated at its own unit scale."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    return jax.vmap(partial(homogeneous, _length, (1,)))(flat).reshape(vectors.shape[:-1])


def _length(vector: jax.Array) -> jax.Array:
    return root(squares(vector).sum())

"""A certificate around the spectral norm: a vector from below, a wrapped-around matrix from above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.axis import Axis
from jaxconv_fc.layout import by_group
from jaxconv_fc.numerics import homogeneous, largest, least, root, squares, times_power_of_two, unit_scale
from jaxconv_fc.sharding import program
from jaxconv_fc.spec import ConvSpec
from jaxconv_fc.spectrum.blocks import BlockAxis, block_axes, over_blocks
from jaxconv_fc.spectrum.krylov import Search, largest_triplet, one_group
from jaxconv_fc.spectrum.norms import as_inexact, inf_norm, one_norm, widened

_SQUARINGS = 7  # of the Gram iteration
_DENSE = 512  # rows or columns of a group's M up to which M itself is squared
_LENGTHS = 3  # how many circumferences are tried
_GRID = 32  # frequencies per span of the transfer function, where the axis is longer than that


def spectral_norm_bounds(spec: ConvSpec, kernel: Any) -> tuple[jax.Array, jax.Array]:
    """``(lower, upper)`` with ``lower <= ||M||_2 <= upper``, rounding included: a certificate.

    Lower: ``||M v|| / ||v||`` of the vector that Golub-Kahan finds, less the rounding of that product.

    Upper: the least of ``sqrt(||M||_1 ||M||_inf)`` and the norm of matrices that contain M and wrap around
    (zeros padding; docs/maths.md, section 5), for a few circumferences. Their blocks are bounded by Gram
    iteration, ``||B|| <= ||(B^H B)**(2**t)||_F ** 2**-(t+1)``, which is an upper bound at every step, with
    the rounding of each squaring added. On long axes the transfer function is taken on a grid of frequencies;
    as a trigonometric polynomial of degree d it exceeds its largest value on n points by 1/cos(pi d/n) at
    most. Small groups (up to 512 rows or columns) are squared themselves. A geometry that is circular already
    is its own cover: there the bound is tight. Other boundary modes cost the root of the number of copies
    of the most copied position per axis; there it may be far from tight on large images.

    The upper bound is differentiable (training may penalise it); the lower one has derivative 0.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.

    Returns:
      Two real scalars.

    Raises:
      As :func:`spectral_norm`.

    Source: Araujo et al., On Lipschitz regularization of convolutional layers (2021); Delattre et al.,
    Efficient bound of Lipschitz constant for convolutional layers by Gram iteration (2023); Ehlich & Zeller
    (1964) for the grid. Cost: 7 products of channels x channels per frequency, and about 30 of M.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 3), (1,), "SAME")
    >>> lower, upper = fc.spectrum.spectral_norm_bounds(spec, jnp.array([[[-1., 2., -1.]]]))
    >>> print(lower.round(2), upper.round(2), bool(lower <= 2 + 3**0.5) and bool(2 + 3**0.5 <= upper))
    3.73 3.73 True
    """
    return _bounds(spec, as_inexact(spec, kernel))


@program
def _bounds(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    result = kernel.real.dtype
    if not min(spec.shape):
        return jnp.zeros((), result), jnp.zeros((), result)
    outward = 2 * float(jnp.finfo(result).eps)  # of the cast back

    def upper(kernel: jax.Array) -> jax.Array:
        return (_upper(spec, widened(kernel)) * (1 + outward)).astype(result)

    unit, exponent = unit_scale(lax.stop_gradient(kernel))
    lower = (_lower(spec, widened(unit)) * (1 - outward)).astype(result)
    # Beyond the largest number and below the smallest normal one the certificate is rounded outward too.
    info = jnp.finfo(result)
    low, high = times_power_of_two(lower, exponent), homogeneous(upper, (1,), kernel)
    low = jnp.where(jnp.isfinite(lower), jnp.minimum(low, info.max), low)
    return low, jnp.where((high < info.tiny) & (unit != 0).any(), info.tiny.astype(result), high)


def _lower(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The norm of ``M v`` for a unit ``v``, less what rounding may have added."""
    unit = float(jnp.finfo(kernel.dtype).eps) / 2
    value = largest_triplet(Search(spec, 1e-4, 20), kernel).value
    lengths = sum(one_group(spec).out_shape) + sum(one_group(spec).in_shape) + 16
    product = 2 * (math.prod(a.taps for a in spec.axes) * spec.group_channels + 2)
    slack = product * unit * _hoelder(spec, jnp.abs(kernel))  # taps that meet may cancel, their rounding not
    return jnp.maximum(value * (1 - lengths * unit) - slack, jnp.zeros_like(value))


def _upper(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    bounds = [_hoelder(spec, kernel)]
    for axes, factor in _covers(spec):
        bounds.append(factor * _largest_block(spec, kernel, axes))
    return least(jnp.stack(bounds))


def _hoelder(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """``sqrt(||M||_1 ||M||_inf)``, rounded up: by the sums without cancellation, of absolute values."""
    terms = math.prod(a.taps * a.copies for a in spec.axes) * max(spec.rhs_shape) ** 2
    rounding, sizes = terms * float(jnp.finfo(kernel.dtype).eps), lax.stop_gradient(jnp.abs(kernel))
    one, most = (n(spec, kernel) + rounding * n(spec, sizes) for n in (one_norm, inf_norm))
    return root(one * most) * (1 + rounding)


# -- matrices that contain M -----------------------------------------------------------------------


def _covers(spec: ConvSpec) -> list[tuple[list[BlockAxis], float]]:
    """Matrices that contain M as a submatrix, as axes of blocks, and what their norms are to be times."""
    axes = block_axes(spec)
    group = one_group(spec)
    if all(a.wraps for a in axes) or min(group.shape) <= _DENSE >= max(group.shape) // 4:
        return [(axes, 1.0)]
    covers = []
    for length in range(_LENGTHS):
        cover, factor = [], 1.0
        for axis in axes:
            around, excess = (axis, 1.0) if axis.wraps else _around(axis.axis, length)
            cover.append(around)
            factor *= excess
        if cover not in [c for c, _ in covers]:
            covers.append((cover, factor))
    return covers


def _around(axis: Axis, length: int) -> tuple[BlockAxis, float]:
    """An axis that wraps around and contains this one, and the factor of its norm.

    Wrapping is harmless once ``o*s + p*r - lo - t*l`` is below the circumference for all o, p, t: then it is
    congruent to 0 only where it is 0. A boundary mode is such an axis after copying inputs into the
    padding, a map of norm ``sqrt(copies)``.
    """
    inner, factor = axis.on_padded, math.sqrt(axis.copies)
    s, l, r = inner.stride, inner.lhs_dilation, inner.rhs_dilation
    period, taps = math.lcm(s, l), (inner.taps - 1) * r
    reach = max(inner.lo + (inner.size - 1) * l, (inner.out_size - 1) * s + taps - inner.lo) + 1
    count = -(-max(reach, inner.size * l, inner.out_size * s) // period) + length
    # The symbol of a period is a trigonometric polynomial: on long axes a grid of frequencies tells enough.
    span = (2 * period - s - l + taps) // period  # twice the degree
    if count > _GRID * max(span, 1):
        count = _GRID * max(span, 1)
        factor /= math.cos(math.pi * span / (2 * count))
    around = count * period
    return BlockAxis(inner, around // l, around // s, inner.lo), factor * (1 + 1e-15)


# -- Gram iteration ----------------------------------------------------------------------------------


def _largest_block(spec: ConvSpec, kernel: jax.Array, axes: Sequence[BlockAxis]) -> jax.Array:
    """An upper bound of the norms of all blocks."""

    def bound(blocks: jax.Array) -> jax.Array:
        if blocks.shape[-1] > blocks.shape[-2]:
            blocks = jnp.swapaxes(blocks, -1, -2)
        return _gram_bound(blocks, _SQUARINGS)

    bounds = over_blocks(bound, spec, kernel, axes)
    unit, terms = float(jnp.finfo(kernel.dtype).eps), math.prod(a.taps for a in spec.axes)
    magnitude = jnp.abs(by_group(spec, kernel)).sum(range(3, 3 + len(spec.axes)))
    slack = (terms + 64) * unit * _frobenius(magnitude)[..., 0, 0]  # of the entries of the blocks
    return largest(bounds) + largest(slack)


def _gram_bound(matrix: jax.Array, squarings: int) -> jax.Array:
    """An upper bound of the spectral norm of every matrix (the last two axes), rounding included.

    ``||A||**2 = ||A^H A||``, with A of Frobenius norm 1 so that nothing overflows and the computed product
    is off by gamma_n at most. What cannot be squared further is bounded by the smaller of its Frobenius norm
    and, for a Hermitian matrix, its largest row sum.
    """
    unit, terms = float(jnp.finfo(matrix.dtype).eps), sum(matrix.shape[-2:])
    scale = _frobenius(matrix)
    if not squarings:
        return _least_bound(jnp.abs(matrix).sum(-1), scale[..., 0, 0]) * (1 + (terms + 8) * unit)
    matrix = matrix / jnp.where(scale > 0, scale, jnp.ones_like(scale)).astype(matrix.dtype)
    gram = jnp.matmul(jnp.swapaxes(matrix, -1, -2).conj(), matrix, precision="highest")
    square = _gram_bound(gram, squarings - 1) + (terms + 8) * unit
    return scale[..., 0, 0] * (1 + (terms + 8) * unit) * jnp.sqrt(square)


def _least_bound(rows: jax.Array, scale: jax.Array) -> jax.Array:
    """The smaller of the largest row sum and the Frobenius norm, for every matrix."""
    if scale.ndim:
        return jax.vmap(_least_bound)(rows, scale)
    return least(jnp.stack([largest(rows), scale]))


def _frobenius(matrix: jax.Array) -> jax.Array:
    """Frobenius norms over the last two axes, kept; derivative 0 at 0."""
    return root(squares(matrix).sum(-1, keepdims=True).sum(-2, keepdims=True))

"""Certified bounds of the spectral norm: from below by a vector, from above by a matrix that contains M."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.layout import by_group
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.numerics import homogeneous, largest, least, root, squares, times_power_of_two, unit_scale
from jaxconv_fc.sharding import program
from jaxconv_fc.spectrum.blocks import BlockAxis, Blocks
from jaxconv_fc.spectrum.golub_kahan import one_group
from jaxconv_fc.spectrum.krylov import Search
from jaxconv_fc.spectrum.largest import has_small_blocks, largest_triplet
from jaxconv_fc.spectrum.norms import inf_norm, one_norm
from jaxconv_fc.spectrum.operands import as_inexact, widened

_GRAM_STEPS = 7  # of the Gram iteration
_DENSE = 512  # rows or columns of a group's M up to which M needs no cover
_CIRCUMFERENCES = 3  # how many are tried
_GRID = 32  # frequencies per span, on axes that have more


def spectral_norm_bounds(spec: ConvSpec, kernel: Array) -> tuple[jax.Array, jax.Array]:
    """``(lower, upper)`` with ``lower <= ||M||_2 <= upper``, rounding included: a certificate.

    Lower: ``||M v|| / ||v||`` of the vector that Golub-Kahan finds, less the rounding of that product.

    Upper: the least of ``sqrt(||M||_1 ||M||_inf)`` and the norms of a few *covers*, matrices that contain M
    and wrap around (zeros padding; docs/maths.md, section 12). Their blocks are bounded by Gram iteration,
    ``||B|| <= ||(B^H B)**(2**t)||_F ** 2**-(t+1)``, which is an upper bound at every step, with the rounding
    of each step added. On long axes the blocks are taken on a grid of n frequencies; between them the norm is
    at most ``1 / cos(pi span / (2 n))`` times larger. Small groups (up to 512 rows or columns) need no cover.
    A geometry that is circular is its own cover: there the bound is tight. Other boundary modes multiply the
    bound, per axis, by the root of the number of copies of the most copied position; there it may be far from
    tight on large images.

    The upper bound is differentiable (training may penalise it); the lower one has derivative 0.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.

    Returns:
      Two real scalars.

    Raises:
      ImportError: matfree is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape.

    Source: Araujo et al., On Lipschitz regularization of convolutional layers (2021); Delattre et al.,
    Efficient bound of Lipschitz constant for convolutional layers by Gram iteration (2023); Ehlich & Zeller
    (1964) for the grid. Cost: about 30 products of M, and 7 Gram products of each block, together ``42 c**3``
    operations for c channels and stride 1. Of a real kernel, each of 3 covers has a block for half of the
    positions that it wraps around. So 512 channels at 8x8 take ``42 * 512**3 * 154 = 9 * 10**11`` operations,
    as fast as real matrix products are.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 3), (1,), "SAME")
    >>> lower, upper = fc.spectrum.spectral_norm_bounds(spec, jnp.array([[[-1., 2., -1.]]]))
    >>> print(lower.round(2), upper.round(2), bool(lower <= 2 + 3**0.5) and bool(2 + 3**0.5 <= upper))
    3.73 3.73 True
    """
    kernel = as_inexact(spec, kernel)
    return _bounds(spec, kernel, has_small_blocks(spec, kernel.dtype))


@partial(program, static_argnums=2)
def _bounds(spec: ConvSpec, kernel: jax.Array, direct: bool) -> tuple[jax.Array, jax.Array]:
    result = kernel.real.dtype
    if not min(spec.shape):
        return jnp.zeros((), result), jnp.zeros((), result)
    outward = 2 * float(jnp.finfo(result).eps)  # of the cast back

    def upper(kernel: jax.Array) -> jax.Array:
        return (_upper(spec, widened(kernel)) * (1 + outward)).astype(result)

    unit, exponent = unit_scale(lax.stop_gradient(kernel))
    lower = (_lower(spec, widened(unit), direct) * (1 - outward)).astype(result)
    # Beyond the largest number and below the smallest normal one the certificate is rounded outward too.
    info = jnp.finfo(result)
    low, high = times_power_of_two(lower, exponent), homogeneous(upper, (1,), kernel)
    low = jnp.where(jnp.isfinite(lower), jnp.minimum(low, info.max), low)
    return low, jnp.where((high < info.tiny) & (unit != 0).any(), info.tiny.astype(result), high)


def _lower(spec: ConvSpec, kernel: jax.Array, direct: bool) -> jax.Array:
    """The norm of ``M v`` for a unit ``v``, less what rounding may have added."""
    unit = float(jnp.finfo(kernel.dtype).eps) / 2
    value = largest_triplet(Search(spec, 1e-4, 20), direct, kernel).value
    lengths = sum(one_group(spec).out_shape) + sum(one_group(spec).in_shape) + 16
    product = 2 * (math.prod(a.taps for a in spec.axes) * spec.group_channels + 2)
    # Of absolute values, for taps that meet may cancel and their rounding does not.
    slack = product * unit * _hoelder(spec, jnp.abs(kernel))
    return jnp.maximum(value * (1 - lengths * unit) - slack, jnp.zeros_like(value))


def _upper(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    bounds = [factor * _largest_block(blocks, kernel) for blocks, factor in _covers(spec).items()]
    return least(jnp.stack([_hoelder(spec, kernel), *bounds]))


def _hoelder(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """``sqrt(||M||_1 ||M||_inf)``, rounded up: by the sums without cancellation, of absolute values."""
    terms = math.prod(a.taps * a.copies for a in spec.axes) * max(spec.rhs_shape) ** 2
    rounding, sizes = terms * float(jnp.finfo(kernel.dtype).eps), lax.stop_gradient(jnp.abs(kernel))
    one, most = (n(spec, kernel) + rounding * n(spec, sizes) for n in (one_norm, inf_norm))
    return root(one * most) * (1 + rounding)


# -- matrices that contain M -----------------------------------------------------------------------


def _covers(spec: ConvSpec) -> dict[Blocks, float]:
    """Blocks B, and factors with ``||M|| <= factor * max ||B||``.

    If M wraps around or is small, these are the blocks of M itself, and the factor is 1.
    """
    own, group = Blocks.of(spec), one_group(spec)
    if all(a.wraps for a in own.axes) or min(group.shape) <= _DENSE >= max(group.shape) // 4:
        return {own: 1.0}
    covers: dict[Blocks, float] = {}
    for further in range(_CIRCUMFERENCES):
        axes = [(a, 1.0) if a.wraps else _around(a.axis, further) for a in own.axes]
        cover = Blocks(spec, tuple(axis for axis, _ in axes))
        covers.setdefault(cover, math.prod(factor for _, factor in axes))
    return covers


def _around(axis: Axis, further: int) -> tuple[BlockAxis, float]:
    """An axis that wraps around and contains this one, and the factor of its norm.

    Around a circumference N, ``o*s + p*r - lo - t*l`` need be 0 modulo N only. That is the same as 0 once its
    absolute value is below N for all o, p and t: for the least such N, and for those ``further`` multiples of
    ``lcm(s, l)`` beyond. A boundary mode is such an axis on the padded input, after a map of norm
    ``sqrt(copies)`` that copies inputs into the padding.
    """
    inner, factor = axis.on_padded, math.sqrt(axis.copies)
    s, l, r = inner.stride, inner.lhs_dilation, inner.rhs_dilation
    period, taps = math.lcm(s, l), (inner.taps - 1) * r
    reach = max(inner.lo + (inner.size - 1) * l, (inner.out_size - 1) * s + taps - inner.lo) + 1
    count = -(-max(reach, inner.size * l, inner.out_size * s) // period) + further
    # Entries of the blocks are trigonometric polynomials in 2 pi w / count, of span + 1 consecutive
    # frequencies at most. On long axes a grid of fewer w will do (docs/maths.md, section 12).
    span = (2 * period - s - l + taps) // period
    if count > _GRID * max(span, 1):
        count = _GRID * max(span, 1)
        factor /= math.cos(math.pi * span / (2 * count))
    around = count * period
    return BlockAxis(inner, around // l, around // s, inner.lo), factor * (1 + 1e-15)


# -- Gram iteration ----------------------------------------------------------------------------------


def _largest_block(blocks: Blocks, kernel: jax.Array) -> jax.Array:
    """An upper bound of the norms of all blocks."""

    def bound(matrices: jax.Array) -> jax.Array:
        wide = matrices.shape[-1] > matrices.shape[-2]
        return _gram_bound(jnp.swapaxes(matrices, -1, -2) if wide else matrices, _GRAM_STEPS)

    bounds, spec = blocks.map(bound, kernel), blocks.spec
    unit, terms = float(jnp.finfo(kernel.dtype).eps), math.prod(a.taps for a in spec.axes)
    magnitude = jnp.abs(by_group(spec, kernel)).sum(range(3, 3 + len(spec.axes)))  # [g, d, i]
    slack = (terms + 64) * unit * _frobenius(magnitude)[..., 0, 0]  # rounding of the entries of the blocks
    return largest(bounds) + largest(slack)


def _gram_bound(matrix: jax.Array, steps: int) -> jax.Array:
    """An upper bound of the spectral norm of every matrix, rounding included: [..., row, column] -> [...].

    ``||A||**2 = ||A^H A||``, step by step. A is divided by its Frobenius norm first, so that nothing
    overflows and the product is off by gamma_n at most. After the last step A is Hermitian: its norm is at
    most its Frobenius norm, and at most its largest row sum.
    """
    unit, terms = float(jnp.finfo(matrix.dtype).eps), sum(matrix.shape[-2:])
    scale = _frobenius(matrix)  # [..., 1, 1]
    if not steps:
        return _least_bound(jnp.abs(matrix).sum(-1), scale[..., 0, 0]) * (1 + (terms + 8) * unit)
    matrix = matrix / jnp.where(scale > 0, scale, jnp.ones_like(scale)).astype(matrix.dtype)
    square = _gram_bound(_gram(matrix), steps - 1) + (terms + 8) * unit
    return scale[..., 0, 0] * (1 + (terms + 8) * unit) * jnp.sqrt(square)


def _gram(matrix: jax.Array) -> jax.Array:
    """``A^H A``. Of ``A = X + i Y`` it is ``X^T X + Y^T Y + i (Z - Z^T)`` with ``Z = X^T Y``: three real
    products, which take half the time of a complex one, or less. With m rows it is off by
    ``(m + 1) eps ||A||_F**2`` at most."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(jnp.swapaxes(a, -1, -2), b, precision="highest")

    if not jnp.iscomplexobj(matrix):
        return product(matrix, matrix)
    x, y = matrix.real, matrix.imag
    mixed = product(x, y)
    return lax.complex(product(x, x) + product(y, y), mixed - jnp.swapaxes(mixed, -1, -2))


def _least_bound(rows: jax.Array, scale: jax.Array) -> jax.Array:
    """The smaller of the largest row sum ``rows[..., row]`` and the Frobenius norm ``scale[...]``."""
    if scale.ndim:
        return jax.vmap(_least_bound)(rows, scale)
    return least(jnp.stack([largest(rows), scale]))


def _frobenius(matrix: jax.Array) -> jax.Array:
    """Frobenius norms over the last two axes, kept; derivative 0 at 0."""
    return root(squares(matrix).sum(-1, keepdims=True).sum(-2, keepdims=True))

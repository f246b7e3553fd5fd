"""The largest singular values of M: those of its blocks where these are small, else by a search."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.numerics import homogeneous, nan_unless_finite, unit_scale
from jaxconv_fc.products.product import apply
from jaxconv_fc.sharding import program
from jaxconv_fc.spectrum import krylov, svd
from jaxconv_fc.spectrum.blocks import Blocks
from jaxconv_fc.spectrum.golub_kahan import GroupMatrix, SingularTriplet
from jaxconv_fc.spectrum.krylov import Search
from jaxconv_fc.spectrum.operands import as_inexact
from jaxconv_fc.spectrum.values import unit_values

_SMALL = 2**24  # operations of one decomposition that take no time: an M of 256 rows and columns
_PER_ENTRY = 64  # operations of decompositions that take as long as a search, per entry of M


def spectral_norm(
    spec: ConvSpec,
    kernel: Array,
    *,
    tolerance: float | None = None,
    max_restarts: int = 100,
    start: Array | None = None,
) -> jax.Array:
    """``||M||_2``: the largest singular value of the true M, paddings as they are; the Lipschitz constant.

    It is the largest norm of the blocks of M (docs/maths.md, section 11), exact up to rounding, where M wraps
    around or is small. Else it is searched: Golub-Kahan bidiagonalisation from a random start, restarted
    until the residual ``||M^H u - sigma v||`` is at most ``tolerance * sigma``; of grouped convolutions the
    maximum over the groups. Guaranteed, up to rounding: the value is a lower bound of the norm, and a
    singular value lies within the residual of it (the error of a simple value is of the order of its square).
    That a random start misses a larger one is improbable, not impossible: :func:`spectral_norm_bounds` has a
    bound from above. :func:`singular_triplet` gives the residual.

    The gradient is ``u v^H`` pulled back to the kernel (implicit, not through the iterations): exact where
    the largest value is simple, a subgradient elsewhere. A search has first derivatives only.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.
      tolerance: of a search, the largest relative residual; None for 1e-10 in float64, 1e-5 in float32.
      max_restarts: of a search, the largest number of runs (the first of 24 steps, the others of 120).
      start: array of shape ``spec.in_shape`` to search from in place of a random one, without derivative: the
        right vector of a kernel near this one, from :func:`singular_triplet` or :func:`power_step`. Then the
        first run has 4 steps, and few are needed. Components that it lacks are not found.

    Returns:
      A real scalar; NaN, and so its gradient, where the tolerance was not reached.
      :func:`singular_triplet` then still gives the best value found, with its residual.

    Raises:
      ImportError: matfree is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape.

    Source: Golub & Kahan (1965), by matfree (Kraemer et al., 2024). Cost: one SVD of every block, if
    that is below ``2**24`` operations or 64 per entry of M (up to some 500 channels of a circular layer, an M
    of 256 rows and columns), within the memory limit, and without a ``start``. Else two products per step, 24
    to some hundred steps, and the memory of 120 images of input and output (fewer where they are large).

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 3), (1,), "SAME")  # 2 - 2 cos(k pi / 6)
    >>> print(fc.spectrum.spectral_norm(spec, jnp.array([[[-1., 2., -1.]]])).round(4))
    3.7321
    """
    return _spectral_norm(*_asked(spec, kernel, tolerance, max_restarts, start))


def singular_triplet(
    spec: ConvSpec,
    kernel: Array,
    *,
    tolerance: float | None = None,
    max_restarts: int = 100,
    start: Array | None = None,
) -> SingularTriplet:
    """The largest singular value with its vectors, as images: ``M right = value * left``.

    ``apply(spec, kernel, right) == value * left`` exactly (up to rounding), and
    ``residual = ||M^H left - value * right||``. The image ``right`` is the input of norm 1 that the
    convolution amplifies most. Cost as for :func:`spectral_norm`. The value has the derivative of
    :func:`spectral_norm`, the vectors have none.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.
      tolerance, max_restarts, start: as in :func:`spectral_norm`.

    Returns:
      ``(value, left, right, residual)``: scalars, and arrays of norm 1, of ``spec.out_shape`` and
      ``spec.in_shape``.

    Raises:
      ImportError: matfree is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 1), (1, 1, 1), (1,), "VALID")
    >>> value, left, right, residual = fc.spectrum.singular_triplet(spec, jnp.array([[[-3.]]]))
    >>> print(value, left.shape, right.shape, residual)
    3.0 (1, 1) (1, 1) 0.0
    """
    return largest_triplet(*_asked(spec, kernel, tolerance, max_restarts, start))


def _asked(
    spec: ConvSpec, kernel: Array, tolerance: float | None, max_restarts: int, start: Array | None
) -> tuple[Search, bool, jax.Array, jax.Array | None]:
    """The arguments of a search, checked, and whether blocks take its place."""
    kernel = as_inexact(spec, kernel)
    if start is not None:
        start = lax.stop_gradient(as_operand("start", start, spec, "in_shape"))
        if start.dtype != kernel.dtype:
            raise TypeError(
                f"start is {start.dtype}, and the kernel counts as {kernel.dtype}: cast it, "
                f"start.astype({kernel.dtype.name!r})."
            )
    direct = start is None and has_small_blocks(spec, kernel.dtype)
    return Search(spec, tolerance, max_restarts), direct, kernel, start


def top_singular_values(
    spec: ConvSpec, kernel: Array, k: int, *, tolerance: float | None = None, max_restarts: int = 100
) -> jax.Array:
    """The ``k`` largest singular values of M, ``sigma_1 >= ... >= sigma_k``, each as often as it occurs.

    They are values of the blocks of M where M wraps around or is small, as in :func:`spectral_norm`. Else
    they are searched. A Krylov space of one vector holds one copy of each value. So vectors that have
    converged are deflated and the search begins anew from a random vector, until the rest of M has no value
    above the k-th. Equal values are found one per round. That a random start misses a value is improbable.

    Args:
      spec, kernel: as in :func:`spectral_norm`.
      k: how many, at most ``min(spec.shape)``.
      tolerance: of a search, the largest residual relative to the largest value.
      max_restarts: of a search, the largest number of rounds.

    Returns:
      Real array of shape ``(k,)``. Of a search, values up to ``tolerance`` times the largest may come out as
      0, and all are NaN where the tolerance was not reached. Derivatives as for :func:`spectral_norm`.

    Raises:
      ImportError: matfree is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape, or k is out of range.

    Cost: as :func:`singular_values` where :func:`spectral_norm` takes the blocks, or where these have at most
    ``3k + 48`` rows or columns. Else a Krylov space of so many vectors per round, fully orthogonalised.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 3), (1,), "SAME", padding_mode="circular")
    >>> print(fc.spectrum.top_singular_values(spec, jnp.array([[[-1., 2., -1.]]]), 3).round(3))
    [4. 2. 2.]
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be a static int, got {k!r}.")
    if not 0 < k <= min(spec.shape):
        raise ValueError(f"k must be between 1 and min(M.shape) = {min(spec.shape)}, got {k}.")
    kernel = as_inexact(spec, kernel)
    direct = has_small_blocks(spec, kernel.dtype, k)
    return _top_singular_values(Search(spec, tolerance, max_restarts), direct, int(k), kernel)


# -- blocks or a search ----------------------------------------------------------------------------


def has_small_blocks(spec: ConvSpec, dtype: Any, k: int = 1) -> bool:
    """Whether the ``k`` largest values are those of blocks, all decomposed.

    They are if that takes less time than a search and the blocks are within the memory limit.
    """
    blocks = Blocks.of(spec)
    rows, columns = blocks.shape
    decompositions = spec.groups * blocks.count * rows * columns * min(rows, columns)
    enough = decompositions <= max(_SMALL, _PER_ENTRY * spec.nse) or min(rows, columns) <= krylov.steps(k)
    return enough and blocks.fits_in_memory(dtype)


@partial(program, static_argnums=1)
def _spectral_norm(search: Search, direct: bool, kernel: jax.Array, start: jax.Array | None) -> jax.Array:
    if not min(search.spec.shape):
        return jnp.zeros((), kernel.real.dtype)
    if direct:
        # The value has the derivative that it has in its block.
        return homogeneous(lambda unit: _values(_top_block(search.spec, unit).matrix)[0], (1,), kernel)
    return krylov.norm(search, kernel, start)


@partial(program, static_argnums=1)
def largest_triplet(
    search: Search, direct: bool, kernel: jax.Array, start: jax.Array | None = None
) -> SingularTriplet:
    spec = search.spec
    if not min(spec.shape):
        zero, left, right = (jnp.zeros(shape, kernel.dtype) for shape in ((), spec.out_shape, spec.in_shape))
        return SingularTriplet(zero.real, left, right, zero.real)
    return _triplet(search, direct, kernel, start)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _triplet(search: Search, direct: bool, kernel: jax.Array, start: jax.Array | None) -> SingularTriplet:
    return _triplet_of_blocks(search.spec, kernel) if direct else krylov.triplet(search, kernel, start)


@_triplet.defjvp
def _triplet_jvp(search: Search, direct: bool, primals: Any, tangents: Any) -> Any:
    """``d sigma = Re(u^H dM v)``; the vectors and the residual have none."""
    found = _triplet(search, direct, *primals)
    moved = apply(search.spec, tangents[0], found.right, precision="highest")
    slope = jnp.sum(found.left.conj() * moved).real
    return found, jax.tree.map(jnp.zeros_like, found)._replace(value=slope)


@partial(program, static_argnums=(1, 2))
def _top_singular_values(search: Search, direct: bool, k: int, kernel: jax.Array) -> jax.Array:
    if direct:
        return homogeneous(lambda unit: unit_values(search.spec, unit)[:k], (1,), kernel)
    return krylov.top_values(search, k, kernel)


# -- the block with the largest value --------------------------------------------------------------


class _Block(NamedTuple):
    matrix: jax.Array  # [row, column]
    group: jax.Array  # its number, an int32 scalar
    frequencies: list[jax.Array]  # of each axis, an array of shape (1,)


def _top_block(spec: ConvSpec, kernel: jax.Array) -> _Block:
    """The block with the largest singular value. The choice has no derivative."""
    blocks = Blocks.of(spec)
    place, order = jnp.zeros((), jnp.int32), blocks.order(kernel)
    if spec.groups * blocks.count > 1:
        norms = blocks.map(lambda b: _values(b)[..., 0], lax.stop_gradient(kernel))  # [group, block]
        place = jnp.argmax(norms).astype(jnp.int32)
    group, number = place // blocks.count, place % blocks.count
    frequencies = [jnp.asarray(f, jnp.int32)[number][None] for f in order]
    return _Block(blocks.at(kernel, frequencies)[group, 0], group, frequencies)


def _values(blocks: jax.Array) -> jax.Array:
    """Singular values, of the transposed blocks: their entries are in the order that LAPACK reads."""
    return svd.singular_values(blocks.swapaxes(-1, -2))


def _triplet_of_blocks(spec: ConvSpec, kernel: jax.Array) -> SingularTriplet:
    """The right vector of a block as an image, and the rest by products with M."""
    unit, exponent = unit_scale(kernel)
    block, blocks = _top_block(spec, unit), Blocks.of(spec)
    vector = svd.decomposed(block.matrix).right[0].conj()  # [column]
    counts = [axis.frequencies for axis in blocks.axes]
    number = jnp.ravel_multi_index([f[0] for f in block.frequencies], counts, mode="clip") if counts else 0
    columns = jnp.zeros((spec.groups, blocks.count, len(vector)), vector.dtype)
    image = blocks.to_input(columns.at[block.group, number].set(vector))
    if not jnp.iscomplexobj(kernel) and jnp.iscomplexobj(image):
        # Real and imaginary parts are vectors of the same value: M is real.
        real, imaginary = (jnp.sum(part * part) for part in (image.real, image.imag))
        image = jnp.where(real >= imaginary, image.real, image.imag)
    found = GroupMatrix(spec, unit).triplet(image)
    return nan_unless_finite(krylov.times_two_to(found, exponent), kernel)

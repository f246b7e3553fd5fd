"""The largest singular values of M without M: Golub-Kahan bidiagonalisation through products.

Groups are blocks of M, and each is searched by itself. Every result is checked by two more products, so
what is returned carries its own residual and does not rest on the iteration that found it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.dense import as_matrix
from jaxconv_fc.layout import by_group, from_canonical
from jaxconv_fc.numerics import largest, nan_unless_finite, times_power_of_two, unit_scale
from jaxconv_fc.products import apply, apply_transpose
from jaxconv_fc.sharding import program
from jaxconv_fc.spec import ConvSpec
from jaxconv_fc.spectrum.norms import as_inexact, widened

_BASIS = 24  # Krylov vectors before the first look at the residual, enough for a tolerance of 1e-4
_LATER = 120  # and before each further one: convergence per step grows with the length of a run
_BASIS_ENTRIES = 2**26  # of all of them, where images are large


class SingularTriplet(NamedTuple):
    """``M right == value * left`` and ``M^H left == value * right`` up to ``residual``."""

    value: jax.Array
    left: jax.Array
    right: jax.Array
    residual: jax.Array


def spectral_norm(
    spec: ConvSpec, kernel: Any, *, tolerance: float | None = None, max_restarts: int = 100
) -> jax.Array:
    """``||M||_2``: the largest singular value of the true M, paddings as they are; the Lipschitz constant.

    Golub-Kahan bidiagonalisation from a random start, restarted until the residual
    ``||M^H u - sigma v||`` is at most ``tolerance * sigma``; of grouped convolutions the maximum over
    the groups. Guaranteed, up to rounding: the value is a lower bound of the norm, and a singular value
    lies within the residual of it (in fact the error of a simple value is of the order of its square).
    That no larger one was missed is certain only up to the random start;
    :func:`spectral_norm_bounds` has a bound from above. :func:`singular_triplet` gives the residual.

    The gradient is ``u v^H`` pulled back to the kernel (implicit, not through the iterations): exact where
    the largest value is simple, a subgradient elsewhere. First derivatives only.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.
      tolerance: largest relative residual; None for 1e-10 in float64, 1e-5 in float32.
      max_restarts: give up after so many runs (the first of 24 steps, the others of 120).

    Returns:
      A real scalar; NaN, and so its gradient, where the tolerance was not reached.
      :func:`singular_triplet` then still gives the best value found, with its residual.

    Raises:
      ImportError: matfree is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: the kernel is not an array of numbers.  ValueError: it has another shape.

    Source: Golub & Kahan (1965), by matfree (Kraemer et al., 2024). Cost: two products per step, 24 to
    some hundred steps, and the memory of 120 images of input and output (fewer where they are large).

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 3), (1,), "SAME")  # 2 - 2 cos(k pi / 6)
    >>> print(fc.spectrum.spectral_norm(spec, jnp.array([[[-1., 2., -1.]]])).round(4))
    3.7321
    """
    search = Search(spec, tolerance, max_restarts)
    return _spectral_norm(search, as_inexact(spec, kernel))


def singular_triplet(
    spec: ConvSpec, kernel: Any, *, tolerance: float | None = None, max_restarts: int = 100
) -> SingularTriplet:
    """The largest singular value with its vectors, as images, and the residual that was reached.

    ``apply(spec, kernel, right) == value * left`` exactly (up to rounding), and
    ``residual = ||M^H left - value * right||``. The image ``right`` is the input of norm 1 that the
    convolution amplifies most. Arguments, errors and cost as in :func:`spectral_norm`; not differentiable
    (the value of :func:`spectral_norm` is).

    Returns:
      ``(value, left, right, residual)``: scalars, and arrays of norm 1, of ``spec.out_shape`` and
      ``spec.in_shape``.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 1), (1, 1, 1), (1,), "VALID")
    >>> value, left, right, residual = fc.spectrum.singular_triplet(spec, jnp.array([[[-3.]]]))
    >>> print(value, left.shape, right.shape, residual)
    3.0 (1, 1) (1, 1) 0.0
    """
    search = Search(spec, tolerance, max_restarts)
    return largest_triplet(search, as_inexact(spec, kernel))


def top_singular_values(
    spec: ConvSpec, kernel: Any, k: int, *, tolerance: float | None = None, max_restarts: int = 100
) -> jax.Array:
    """The ``k`` largest singular values of M, descending, each as often as it occurs.

    A Krylov space of one vector sees one copy of each value. So what has converged is deflated and the
    search begun anew from a random vector, until the rest of M holds nothing larger than the k-th value:
    multiplicities (circular geometries have them, and so do groups) are found one per round. What remains
    blind is what a random start is: certain only with probability one, and to ``tolerance``.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      k: how many, at most ``min(spec.shape)``.
      tolerance: largest residual relative to the largest value; as in :func:`spectral_norm`.
      max_restarts: give up after so many rounds.

    Returns:
      Real array of shape ``(k,)``, values up to ``tolerance`` times the largest as 0; NaN, all of it, where
      the tolerance was not reached. Derivatives as for :func:`spectral_norm`.

    Raises:
      As :func:`spectral_norm`; ValueError for a k out of range.

    Cost: a Krylov space of ``3k + 48`` vectors per round, fully orthogonalised; the SVD of a dense M that
    is no larger than that.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 3), (1,), "SAME", padding_mode="circular")
    >>> print(fc.spectrum.top_singular_values(spec, jnp.array([[[-1., 2., -1.]]]), 3).round(3))
    [4. 2. 2.]
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be a static int, got {k!r}.")
    if not 0 < k <= min(spec.shape):
        raise ValueError(f"k must be between 1 and min(M.shape) = {min(spec.shape)}, got {k}.")
    search = Search(spec, tolerance, max_restarts)
    return _top_singular_values(search, as_inexact(spec, kernel), int(k))


# -- what is searched, and how -------------------------------------------------------------------


@jax.tree_util.register_static
@dataclass(frozen=True)
class Search:
    """The static half of a search."""

    spec: ConvSpec
    tolerance: float | None
    max_restarts: int

    @property
    def group(self) -> ConvSpec:
        """One group of the geometry, channels last."""
        return one_group(self.spec)

    def relative(self, dtype: Any) -> float:
        if self.tolerance is not None:
            return float(self.tolerance)
        return 1e-10 if jnp.finfo(dtype).bits == 64 else 1e-5


def one_group(spec: ConvSpec) -> ConvSpec:
    """The convolution that every group performs: (positions..., channels), (taps..., in, out)."""
    dims = len(spec.axes)
    last = (0, dims + 1, *range(1, dims + 1))
    return replace(
        spec,
        lhs_shape=(1, *(a.size for a in spec.axes), spec.group_channels),
        rhs_shape=(*(a.taps for a in spec.axes), spec.group_channels, spec.out_channels // spec.groups),
        dimension_numbers=lax.ConvDimensionNumbers(last, (dims + 1, dims, *range(dims)), last),
        feature_group_count=1,
        batch_group_count=1,
    )


def group_kernels(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The kernel of every group, stacked, for :func:`one_group`."""
    return jnp.moveaxis(by_group(spec, kernel), (1, 2), (-1, -2))


def _each_group(search: Search, kernel: jax.Array, of: Callable[[jax.Array], Any]) -> Any:
    """``of`` of every group's kernel, stacked; a single group without the detour of a batch."""
    kernels = group_kernels(search.spec, kernel)
    if search.spec.groups == 1:
        return jax.tree.map(lambda v: v[None], of(kernels[0]))
    return jax.vmap(of)(kernels)


@program
def _spectral_norm(search: Search, kernel: jax.Array) -> jax.Array:
    if not min(search.spec.shape):
        return jnp.zeros((), kernel.real.dtype)
    return largest(_each_group(search, kernel, lambda k: _norms(search, 1, k)[0]))


@program
def largest_triplet(search: Search, kernel: jax.Array) -> SingularTriplet:
    spec = search.spec
    if not min(spec.shape):
        zero, left, right = (jnp.zeros(shape, kernel.dtype) for shape in ((), spec.out_shape, spec.in_shape))
        return SingularTriplet(zero.real, left, right, zero.real)
    values, lefts, rights, residuals = _each_group(search, kernel, partial(_scaled_triplet, search))
    best = jnp.argmax(values)

    def embedded(images: jax.Array, shape: tuple[int, ...], order: tuple[int, ...]) -> jax.Array:
        """The image of the best group, zero in all others."""
        image = jnp.zeros_like(images).at[best].set(images[best])
        image = jnp.moveaxis(image, 0, -2)
        return from_canonical(image.reshape([shape[i] for i in order]), order)

    left = embedded(lefts, spec.out_shape, spec.out_order)
    right = embedded(rights, spec.in_shape, spec.in_order)
    return SingularTriplet(values[best], left, right, residuals[best])


@partial(program, static_argnums=2)
def _top_singular_values(search: Search, kernel: jax.Array, k: int) -> jax.Array:
    of_group = min(k, *search.group.shape)
    values = _each_group(search, kernel, lambda g: _norms(search, of_group, g)).ravel()
    top = lax.top_k(values, k)[0]
    return jnp.where(jnp.isnan(values).any(), jnp.full_like(top, jnp.nan), top)


# -- values, with the derivative of singular values ----------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _norms(search: Search, k: int, kernel: jax.Array) -> jax.Array:
    """The ``k`` largest singular values of one group."""
    return _vectors(search, k, kernel)[0]


@_norms.defjvp
def _norms_jvp(search: Search, k: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """``d sigma = Re <u, dM v>``."""
    (kernel,), (change,) = primals, tangents
    values, lefts, rights = _vectors(search, k, kernel)

    def along(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.sum(left.conj() * _multiply(search.group, change, right)).real

    return values, jax.vmap(along)(lefts, rights)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _vectors(search: Search, k: int, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values and vectors of one group; NaN, all of them, where the search has not converged."""
    kernel, exponent = unit_scale(kernel)
    if k > 1 and min(search.group.shape) <= _steps(k):
        *found, converged = *_dense(search.group, k, kernel), True
    elif k > 1:
        *found, converged = _deflated(search, k, kernel)
    else:
        triplet = _triplet(search, kernel)
        *found, _ = jax.tree.map(lambda v: v[None], triplet)
        converged = triplet.residual <= search.relative(kernel.dtype) * triplet.value
    values, lefts, rights = (jnp.where(converged, v, jnp.full_like(v, jnp.nan)) for v in found)
    return times_power_of_two(values, exponent), lefts, rights


@_vectors.defjvp
def _vectors_jvp(search: Search, k: int, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "spectral_norm and top_singular_values have first derivatives only. Use singular_values for more."
    )


# -- the iterations ------------------------------------------------------------------------------


def _scaled_triplet(search: Search, kernel: jax.Array) -> SingularTriplet:
    """:func:`_triplet` of a kernel at any scale: value and residual have its, the vectors length 1."""
    unit, exponent = unit_scale(kernel)
    found = _triplet(search, unit)
    value, residual = (times_power_of_two(v, exponent) for v in (found.value, found.residual))
    return nan_unless_finite(SingularTriplet(value, found.left, found.right, residual), kernel)


def _triplet(search: Search, kernel: jax.Array) -> SingularTriplet:
    """Restarted bidiagonalisation of one group, its kernel at unit scale.

    Each restart begins with the best vector so far.
    """
    spec, dtype, kernel = search.group, kernel.dtype, widened(kernel)
    affordable = max(4, _BASIS_ENTRIES // max(spec.shape))
    product = _real_product(spec, kernel)
    tolerance = search.relative(dtype)

    def improve(state: Any, most: int = _LATER) -> Any:
        _, _, right, _, restarts = state
        steps = min(most, affordable, *_real_shape(spec, kernel))
        (_, basis), small, *_ = _bidiagonalisation(steps, "none")(product, _split(right))
        _, _, weights = _svd(small)
        right = _join(_combine(weights[:1], basis)[0], kernel)
        return (*_checked(spec, kernel, right), restarts + 1)

    def unfinished(state: Any) -> jax.Array:
        value, _, _, residual, restarts = state
        return (residual > tolerance * value) & (restarts < search.max_restarts)

    start = _start(spec, kernel, jax.random.key(0))
    # One round at least; its result decides about the next.
    first = improve((None, None, start, None, jnp.zeros((), jnp.int32)), _BASIS)
    value, left, right, residual, _ = lax.while_loop(unfinished, improve, first)
    real = jnp.finfo(dtype).dtype
    return SingularTriplet(value.astype(real), left.astype(dtype), right.astype(dtype), residual.astype(real))


def _steps(k: int) -> int:
    """Krylov vectors in which ``k`` values are looked for at once."""
    return 3 * k + 2 * _BASIS


def _dense(spec: ConvSpec, k: int, kernel: jax.Array) -> tuple[jax.Array, ...]:
    """The ``k`` largest triplets, by the SVD of an M that is no larger than the Krylov basis would be."""
    lefts, values, rights = jnp.linalg.svd(as_matrix(spec, kernel), full_matrices=False)
    lefts, rights = lefts.T[:k].reshape(k, *spec.out_shape), rights[:k].conj().reshape(k, *spec.in_shape)
    return values[:k], lefts, rights


def _deflated(search: Search, k: int, kernel: jax.Array) -> tuple[jax.Array, ...]:
    """The ``k`` largest triplets of one group, locked as they converge, and whether all have."""
    spec, dtype, kernel = search.group, kernel.dtype, widened(kernel)
    steps = min(_steps(k), *_real_shape(spec, kernel))
    decompose = _bidiagonalisation(steps, "full")
    product = _real_product(spec, kernel)
    tolerance = search.relative(dtype)
    kept = min(k, steps)
    finite = jnp.isfinite(kernel).all()  # of a kernel that is not, no round would converge

    def off(rights: jax.Array, v: jax.Array) -> jax.Array:
        """``v`` without its part in the locked vectors, twice, as rounding wants it."""
        for _ in range(2):
            inner = jnp.tensordot(rights.conj(), v, v.ndim, precision="highest")
            v = v - jnp.tensordot(inner, rights, 1, precision="highest")
        return v

    def new_directions(rights: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Each vector without its part in the locked ones and in those before it, and what is left of it.

        A complex kernel is searched in real numbers, where every vector v comes with i*v: the same direction.
        """

        def one(taken: jax.Array, place: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            (unit,), (length,) = _normalised(off(taken, off(rights, vectors[place]))[None])
            kept = jnp.where(length > 0.5, unit, jnp.zeros_like(unit))
            return taken.at[place].set(kept), (unit, length)

        return lax.scan(one, jnp.zeros_like(vectors), jnp.arange(len(vectors)))[1]

    def improve(state: Any) -> Any:
        values, rights, start, rounds, key, _ = state
        key, subkey = jax.random.split(key)

        def deflated(v: jax.Array) -> jax.Array:
            return product(_split(off(rights, _join(v, kernel))))

        (_, basis), small, *_ = decompose(deflated, _split(off(rights, start)))
        _, (rest, *_), weights = _svd(small)
        vectors = _combine(weights[:kept], basis)
        vectors, lengths = new_directions(rights, jax.vmap(lambda v: _join(v, kernel))(vectors))
        found, _, vectors, residuals = jax.vmap(partial(_checked, spec, kernel))(vectors)
        largest = jnp.maximum(values[0], found[0])
        # Locked are the leading values that have converged, none behind one that has not; those that point
        # nowhere new are passed over.
        new = lengths > 0.5
        settled = (residuals <= tolerance * largest) | ~new
        good = jnp.cumprod(settled.astype(jnp.int32)).astype(bool) & new
        candidates = jnp.where(good, found, -jnp.ones_like(found))
        merged, order = lax.top_k(jnp.concatenate([values, candidates]), k)
        rights = jnp.concatenate([rights, vectors])[order]
        locked = jnp.expand_dims(merged >= 0, range(1, rights.ndim))
        rights = jnp.where(locked, rights, jnp.zeros_like(rights))
        fresh = _start(spec, kernel, subkey)
        # Where nothing converged the best vector is taken further, else chance begins anew.
        start = jnp.where(good[0] | (lengths[0] < 0.5), fresh, vectors[0])
        # Done once the rest of M holds nothing above the smallest value kept, or nothing at all.
        done = good[0] & (candidates[0] <= values[-1] + tolerance * largest)
        done = done | (rest <= tolerance * largest)
        return merged, rights, start, rounds + 1, key, done

    def unfinished(state: Any) -> jax.Array:
        return ~state[-1] & (state[3] < search.max_restarts) & finite

    key, subkey = jax.random.split(jax.random.key(0))
    start = _start(spec, kernel, subkey)
    nothing = -jnp.ones(k, jnp.finfo(kernel.dtype).dtype)
    rights = jnp.zeros((k, *spec.in_shape), kernel.dtype)
    state = (nothing, rights, start, jnp.zeros((), jnp.int32), key, jnp.zeros((), bool))
    _, rights, *_, done = lax.while_loop(unfinished, improve, state)
    values, lefts, rights, _ = jax.vmap(partial(_checked, spec, kernel))(rights)
    order = jnp.argsort(-values)
    values, lefts, rights = (v[order] for v in (values, lefts, rights))
    return values.astype(jnp.finfo(dtype).dtype), lefts.astype(dtype), rights.astype(dtype), done


def _start(spec: ConvSpec, kernel: jax.Array, key: jax.Array) -> jax.Array:
    """A random vector out of M^H: its Krylov space is complete in ``min(M.shape)`` steps, wide M or not."""
    random = jax.random.normal(key, spec.out_shape, kernel.dtype)
    return _normalised(apply_transpose(spec, kernel.conj(), random, precision="highest")[None])[0][0]


def _checked(spec: ConvSpec, kernel: jax.Array, right: jax.Array) -> tuple[jax.Array, ...]:
    """``(value, left, right, residual)`` of a right vector, by one product with M and one with M^H."""
    (right,), _ = _normalised(right[None])
    (left,), (value,) = _normalised(_multiply(spec, kernel, right)[None])
    back = apply_transpose(spec, kernel.conj(), left, precision="highest")
    return value, left, right, _lengths((back - value.astype(right.dtype) * right)[None])[0]


def _bidiagonalisation(steps: int, reortho: str) -> Any:
    try:
        from matfree import decomp
    except ImportError as error:
        raise ImportError(
            "spectral_norm, singular_triplet, top_singular_values and spectral_norm_bounds need matfree: "
            "pip install 'jaxconv_fc[spectrum]'."
        ) from error
    return decomp.bidiag(steps, reortho=reortho)


def _svd(small: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """SVD of the bidiagonal matrix, up to where the Krylov space ended.

    There the next vector is rounding, or 0/0: what comes behind is cut off.
    """
    diagonal, above = jnp.diagonal(small), jnp.diagonal(small, 1)
    sizes = jnp.where(jnp.isfinite(small), jnp.abs(small), jnp.zeros_like(small))
    least = jnp.max(sizes) * jnp.asarray(16 * jnp.finfo(small.dtype).eps, small.dtype)
    goes_on = jnp.concatenate([jnp.ones(1, bool), (above > least) & (diagonal[:-1] > least)])
    alive = jnp.cumprod(goes_on.astype(jnp.int32)).astype(bool)
    small = jnp.where(alive[:, None] & alive[None] & jnp.isfinite(small), small, jnp.zeros_like(small))
    lefts, values, weights = jnp.linalg.svd(small)
    return lefts, values, weights


def _combine(weights: jax.Array, basis: jax.Array) -> jax.Array:
    finite = jnp.where(jnp.isfinite(basis), basis, jnp.zeros_like(basis))
    return jnp.tensordot(weights, finite, 1, precision="highest")


# -- real vectors for complex kernels, precision, lengths ----------------------------------------


def _real_product(spec: ConvSpec, kernel: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """``v -> M v`` on real arrays: a complex one is a pair, and each singular value occurs twice."""
    return lambda v: _split(_multiply(spec, kernel, _join(v, kernel)))


def _real_shape(spec: ConvSpec, kernel: jax.Array) -> tuple[int, int]:
    factor = 2 if jnp.iscomplexobj(kernel) else 1
    return factor * spec.out_size, factor * spec.in_size


def _split(v: jax.Array) -> jax.Array:
    return jnp.stack([v.real, v.imag]) if jnp.iscomplexobj(v) else v


def _join(v: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.complex(v[0], v[1]) if jnp.iscomplexobj(kernel) else v


def _multiply(spec: ConvSpec, kernel: jax.Array, v: jax.Array) -> jax.Array:
    return apply(spec, kernel, v, precision="highest")


def _lengths(vectors: jax.Array) -> jax.Array:
    """Euclidean lengths of a stack, summed axis by axis: rounding stays that of short sums."""
    squares = (vectors * vectors.conj()).real
    while squares.ndim > 1:
        squares = squares.sum(-1)
    return jnp.sqrt(squares)


def _normalised(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    lengths = _lengths(vectors)
    divisor = jnp.where(lengths > 0, lengths, jnp.ones_like(lengths))
    return vectors / jnp.expand_dims(divisor, range(1, vectors.ndim)).astype(vectors.dtype), lengths

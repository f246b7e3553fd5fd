"""The largest singular values of M without M: Golub-Kahan bidiagonalisation through products.

Groups are blocks of M, and each is searched by itself. Every result is checked by two more products: it has
a residual of its own, whatever the iteration that found it (docs/maths.md, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.geometry.layout import by_group
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.numerics import largest, nan_unless_finite, times_power_of_two, unit_scale
from jaxconv_fc.spectrum.golub_kahan import GroupMatrix, SingularTriplet, narrowed, normalised, one_group
from jaxconv_fc.spectrum.operands import as_image, from_image, widened

_BASIS = 24  # Krylov vectors of the first run, enough for a tolerance of 1e-4
_WARM = 4  # of the first run from a given start
_LATER = 120  # and of each further run: convergence per step grows with the length of a run
_BASIS_ENTRIES = 2**26  # of all Krylov vectors together, where images are large


# -- the search ----------------------------------------------------------------------------------


@jax.tree_util.register_static
@dataclass(frozen=True)
class Search:
    """The static arguments of a search."""

    spec: ConvSpec
    tolerance: float | None  # largest residual relative to the value; None for that of the dtype
    max_restarts: int

    @property
    def group(self) -> ConvSpec:
        return one_group(self.spec)

    def tolerance_in(self, dtype: Any) -> float:
        if self.tolerance is not None:
            return float(self.tolerance)
        return 1e-10 if jnp.finfo(dtype).bits == 64 else 1e-5


def _each_group(
    search: Search,
    kernel: jax.Array,
    start: jax.Array | None,
    of: Callable[[jax.Array, jax.Array | None], Any],
) -> Any:
    """``of`` kernel and start of every group, for :func:`one_group`, stacked; one group without a batch."""
    kernels = jnp.moveaxis(by_group(search.spec, kernel), (1, 2), (-1, -2))  # [g, p..., i, d]
    starts = None if start is None else jnp.moveaxis(from_image(search.spec, start), -2, 0)
    if search.spec.groups == 1:
        return jax.tree.map(lambda v: v[None], of(kernels[0], None if starts is None else starts[0]))
    return jax.vmap(of)(kernels, starts)


def norm(search: Search, kernel: jax.Array, start: jax.Array | None) -> jax.Array:
    """The largest singular value of M."""
    return largest(_each_group(search, kernel, start, partial(_values_of_group, search, 1)))


def triplet(search: Search, kernel: jax.Array, start: jax.Array | None) -> SingularTriplet:
    """The largest singular value of M with its vectors."""
    spec = search.spec
    found: SingularTriplet = _each_group(search, kernel, start, partial(_scaled_triplet, search))
    best = jnp.argmax(found.value)

    def embedded(images: jax.Array, output: bool) -> jax.Array:
        """``[g, positions..., channel]`` -> the image of the best group, zero in all others."""
        image = jnp.zeros_like(images).at[best].set(images[best])
        return as_image(spec, jnp.moveaxis(image, 0, -2), output=output)

    left, right = embedded(found.left, True), embedded(found.right, False)
    return SingularTriplet(found.value[best], left, right, found.residual[best])


def top_values(search: Search, k: int, kernel: jax.Array) -> jax.Array:
    """The ``k`` largest singular values of M."""
    of_group = min(k, *search.group.shape)
    values = _each_group(search, kernel, None, partial(_values_of_group, search, of_group)).ravel()
    top = lax.top_k(values, k)[0]
    return jnp.where(jnp.isnan(values).any(), jnp.full_like(top, jnp.nan), top)


# -- values, with the derivative of singular values ----------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _values_of_group(search: Search, k: int, kernel: jax.Array, start: jax.Array | None) -> jax.Array:
    """The ``k`` largest singular values of one group, descending."""
    return _triplets_of_group(search, k, kernel, start).value


@_values_of_group.defjvp
def _values_jvp(search: Search, k: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """``d sigma = Re <u, dM v>``."""
    (kernel, start), (change, _) = primals, tangents
    found = _triplets_of_group(search, k, kernel, start)

    def along(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.sum(left.conj() * GroupMatrix(search.group, change).times(right)).real

    return found.value, jax.vmap(along)(found.left, found.right)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _triplets_of_group(search: Search, k: int, kernel: jax.Array, start: jax.Array | None) -> SingularTriplet:
    """The ``k`` largest triplets of one group, stacked; NaN everywhere if the search has not converged."""
    kernel, exponent = unit_scale(kernel)
    if k > 1:
        found, converged = _deflated(search, k, kernel)
    else:
        found = jax.tree.map(lambda v: v[None], _triplet(search, kernel, start))
        converged = found.residual[0] <= search.tolerance_in(kernel.dtype) * found.value[0]
    found = jax.tree.map(lambda v: jnp.where(converged, v, jnp.full_like(v, jnp.nan)), found)
    return times_two_to(found, exponent)


@_triplets_of_group.defjvp
def _triplets_jvp(search: Search, k: int, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "spectral_norm and top_singular_values have first derivatives only. Use singular_values for more."
    )


# -- the largest value: restarts from the best vector ----------------------------------------------


class _Restarts(NamedTuple):
    found: SingularTriplet  # by the last run
    runs: jax.Array  # int32 scalar: how many there have been


def _scaled_triplet(search: Search, kernel: jax.Array, start: jax.Array | None) -> SingularTriplet:
    """:func:`_triplet` of a kernel at any scale."""
    unit, exponent = unit_scale(kernel)
    return nan_unless_finite(times_two_to(_triplet(search, unit, start), exponent), kernel)


def times_two_to(found: SingularTriplet, exponent: jax.Array) -> SingularTriplet:
    """The triplet of ``2**exponent M``: the vectors are the same."""
    value, residual = (times_power_of_two(v, exponent) for v in (found.value, found.residual))
    return found._replace(value=value, residual=residual)


def _triplet(search: Search, kernel: jax.Array, start: jax.Array | None) -> SingularTriplet:
    """The largest triplet of one group, at unit scale. Each run begins with the best vector so far."""
    matrix = GroupMatrix(search.group, widened(kernel))
    affordable = max(4, _BASIS_ENTRIES // max(matrix.spec.shape))
    tolerance = search.tolerance_in(kernel.dtype)

    def run(start: jax.Array, most: int) -> SingularTriplet:
        _, (right,) = matrix.ritz(matrix.times, start, min(most, affordable), "none", 1)
        return matrix.triplet(right)

    def again(state: _Restarts) -> _Restarts:
        return _Restarts(run(state.found.right, _LATER), state.runs + 1)

    random = matrix.start(jax.random.key(0))
    if start is None:
        found = run(random, _BASIS)
    else:
        start, length = normalised(widened(unit_scale(start)[0]))
        found = run(jnp.where(length > 0, start, random), _WARM)  # the start may lack a group

    def unfinished(state: _Restarts) -> jax.Array:
        too_far = state.found.residual > tolerance * state.found.value
        return too_far & (state.runs < search.max_restarts)

    first = _Restarts(found, jnp.ones((), jnp.int32))
    return narrowed(lax.while_loop(unfinished, again, first).found, kernel.dtype)


# -- the k largest values: deflation ---------------------------------------------------------------


class _Deflation(NamedTuple):
    """State of a search that locks vectors as they converge."""

    values: jax.Array  # (k,), descending: those locked; -1 where none is yet
    rights: jax.Array  # (k, *in_shape): their right vectors, orthonormal; 0 where none is yet
    start: jax.Array  # in_shape: where the next round begins
    rounds: jax.Array  # int32 scalar: how many there have been
    key: jax.Array  # for random starts
    done: jax.Array  # bool scalar: the rest of M holds nothing above the smallest value kept, or nothing


def steps(k: int) -> int:
    """Krylov vectors in which ``k`` values are looked for at once."""
    return 3 * k + 2 * _BASIS


def _deflated(search: Search, k: int, kernel: jax.Array) -> tuple[SingularTriplet, jax.Array]:
    """The ``k`` largest triplets of one group, and whether all have converged."""
    matrix = GroupMatrix(search.group, widened(kernel))
    tolerance = search.tolerance_in(kernel.dtype)
    finite = jnp.isfinite(kernel).all()  # otherwise no round would converge

    def improve(state: _Deflation) -> _Deflation:
        key, subkey = jax.random.split(state.key)
        rest, found, new = _round(matrix, state)
        negligible = tolerance * jnp.maximum(state.values[0], found.value[0])
        # The leading values that have converged are locked, none behind one that has not. Vectors that are
        # not new are passed over.
        settled = (found.residual <= negligible) | ~new
        good = jnp.cumprod(settled.astype(jnp.int32)).astype(bool) & new
        candidates = jnp.where(good, found.value, -jnp.ones_like(found.value))
        values, order = lax.top_k(jnp.concatenate([state.values, candidates]), k)
        rights = jnp.concatenate([state.rights, found.right])[order]
        locked = jnp.expand_dims(values >= 0, range(1, rights.ndim))
        rights = jnp.where(locked, rights, jnp.zeros_like(rights))
        # Where nothing converged the best vector is taken further, else the next start is random.
        start = jnp.where(good[0] | ~new[0], matrix.start(subkey), found.right[0])
        done = good[0] & (candidates[0] <= state.values[-1] + negligible) | (rest <= negligible)
        return _Deflation(values, rights, start, state.rounds + 1, key, done)

    def unfinished(state: _Deflation) -> jax.Array:
        return ~state.done & (state.rounds < search.max_restarts) & finite

    key, subkey = jax.random.split(jax.random.key(0))
    values = -jnp.ones(k, jnp.finfo(matrix.kernel.dtype).dtype)
    rights = jnp.zeros((k, *matrix.spec.in_shape), matrix.kernel.dtype)
    rounds, done = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    first = _Deflation(values, rights, matrix.start(subkey), rounds, key, done)
    last = lax.while_loop(unfinished, improve, first)
    found = jax.vmap(matrix.triplet)(last.rights)
    order = jnp.argsort(-found.value)
    return narrowed(jax.tree.map(lambda v: v[order], found), kernel.dtype), last.done


class _Round(NamedTuple):
    """The results of one round, which searches M without its locked part."""

    rest: jax.Array  # scalar: the largest singular value that is left
    found: SingularTriplet  # k triplets of M, stacked, of orthonormal right vectors
    new: jax.Array  # (k,), bool: whether the right vector is a new direction


def _round(matrix: GroupMatrix, state: _Deflation) -> _Round:
    def deflated(v: jax.Array) -> jax.Array:
        return matrix.times(_without(state.rights, v))

    start, k = _without(state.rights, state.start), len(state.rights)
    (rest, *_), vectors = matrix.ritz(deflated, start, steps(k), "full", k)
    vectors, lengths = _orthonormal(state.rights, vectors)
    return _Round(rest, jax.vmap(matrix.triplet)(vectors), lengths > 0.5)


def _without(rights: jax.Array, v: jax.Array) -> jax.Array:
    """``v - V V^H v``, with the locked vectors as the columns of V. Done twice, for rounding."""
    for _ in range(2):
        inner = jnp.tensordot(rights.conj(), v, v.ndim, precision="highest")
        v = v - jnp.tensordot(inner, rights, 1, precision="highest")
    return v


def _orthonormal(rights: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vectors, each without its part in the locked ones and in those before it, and the length that was
    left of each. (A complex kernel is searched in real numbers, where v and i*v are both found.)"""

    def one(taken: jax.Array, place: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        unit, length = normalised(_without(taken, _without(rights, vectors[place])))
        kept = jnp.where(length > 0.5, unit, jnp.zeros_like(unit))
        return taken.at[place].set(kept), (unit, length)

    return lax.scan(one, jnp.zeros_like(vectors), jnp.arange(len(vectors)))[1]

"""The matrix of one channel group, given by products with vectors, and its Golub-Kahan bidiagonalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.products.product import apply, apply_transpose
from jaxconv_fc.spectrum import svd


class SingularTriplet(NamedTuple):
    """``M right == value * left``, and ``M^H left == value * right`` up to ``residual``.

    Attributes:
      value: the singular value, a real scalar.
      left: of ``spec.out_shape`` and norm 1; may be 0 where the value is 0.
      right: of ``spec.in_shape`` and norm 1; may be 0 where the value is 0.
      residual: ``||M^H left - value * right||``, a real scalar.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 1), (1, 1, 1), (1,), "VALID")
    >>> print(fc.spectrum.singular_triplet(spec, jnp.array([[[-3.0]]])).value)
    3.0
    """

    value: jax.Array  # real scalar
    left: jax.Array  # spec.out_shape, of norm 1; may be 0 where value is 0
    right: jax.Array  # spec.in_shape, of norm 1; may be 0 where value is 0
    residual: jax.Array  # real scalar, ||M^H left - value * right||


def one_group(spec: ConvSpec) -> ConvSpec:
    """The convolution of one group, with vectors (positions..., channels) and kernel (taps..., in, out)."""
    dims = len(spec.axes)
    channels_last = (0, dims + 1, *range(1, dims + 1))
    return replace(
        spec,
        lhs_shape=(1, *(a.size for a in spec.axes), spec.group_channels),
        rhs_shape=(*(a.taps for a in spec.axes), spec.group_channels, spec.out_channels // spec.groups),
        dimension_numbers=lax.ConvDimensionNumbers(
            channels_last, (dims + 1, dims, *range(dims)), channels_last
        ),
        feature_group_count=1,
        batch_group_count=1,
    )


class GroupMatrix(NamedTuple):
    """M of one group. Right vectors are arrays of ``spec.in_shape``, left ones of ``spec.out_shape``."""

    spec: ConvSpec  # of one group
    kernel: jax.Array  # (taps..., in, out)

    def times(self, right: jax.Array) -> jax.Array:
        """``M v``."""
        return apply(self.spec, self.kernel, right, precision="highest")

    def adjoint_times(self, left: jax.Array) -> jax.Array:
        """``M^H u``."""
        return apply_transpose(self.spec, self.kernel.conj(), left, precision="highest")

    def start(self, key: jax.Array) -> jax.Array:
        """A random unit vector."""
        return normalised(jax.random.normal(key, self.spec.in_shape, self.kernel.dtype))[0]

    def triplet(self, right: jax.Array) -> SingularTriplet:
        """``sigma = ||M v||, u = M v / sigma, residual = ||M^H u - sigma v||``; v is normalised first."""
        right, _ = normalised(right)
        left, value = normalised(self.times(right))
        residual = _norm(self.adjoint_times(left) - value.astype(right.dtype) * right)
        return SingularTriplet(value, left, right, residual)

    def bidiagonal(
        self, start: jax.Array, steps: Any, most: int, within: Callable[..., jax.Array] | None, enough: float
    ) -> Bidiagonal:
        """``steps`` steps of Golub-Kahan from ``start``, at most ``most``; fewer if the start is enough.

        ``A v_j = a_j u_j + b_(j-1) u_(j-1)`` and ``A^H u_j = a_j v_j + b_j v_(j+1)``, with unit vectors. The
        first step gives the triplet of the start itself: a_0, with the residual b_0. If that is at most
        ``enough * a_0``, the first step is the last. With ``within``, a projection P of right vectors, A is
        ``A P``, and vectors are made orthogonal to all before.
        """
        real = jnp.finfo(self.kernel.dtype).dtype

        def step(state: Bidiagonal) -> Bidiagonal:
            j = state.steps
            rights = state.rights.at[j].set(state.right)
            moved = self.times(state.right) - state.left * state.above[j - 1].astype(state.left.dtype)
            if within:
                moved = without(state.lefts, moved)
            left, a = normalised(moved)
            back = self.adjoint_times(left) - a.astype(left.dtype) * state.right
            if within:
                back = without(rights, within(back))
            right, b = normalised(back)
            lefts = state.lefts.at[j].set(left) if within else jnp.where(j == 0, left[None], state.lefts)
            diagonal, above = state.diagonal.at[j].set(a), state.above.at[j].set(b)
            return Bidiagonal(diagonal, above, lefts, rights, left, right, j + 1)

        def unfinished(state: Bidiagonal) -> jax.Array:
            settled = (state.steps == 1) & (state.above[0] <= enough * state.diagonal[0])
            return (state.steps < steps) & ~settled

        return lax.while_loop(
            unfinished,
            step,
            Bidiagonal(
                jnp.zeros(most, real),
                jnp.zeros(most, real),
                jnp.zeros((most if within else 1, *self.spec.out_shape), self.kernel.dtype),
                jnp.zeros((most, *self.spec.in_shape), self.kernel.dtype),
                jnp.zeros(self.spec.out_shape, self.kernel.dtype),
                normalised(start)[0],
                jnp.zeros((), jnp.int32),
            ),
        )


class Bidiagonal(NamedTuple):
    """State of Golub-Kahan. What has not been reached is 0."""

    diagonal: jax.Array  # [step]: a_j
    above: jax.Array  # [step]: b_j
    lefts: jax.Array  # [step, *out_shape]; without reorthogonalisation the first alone
    rights: jax.Array  # [step, *in_shape]
    left: jax.Array  # out_shape: the last left vector
    right: jax.Array  # in_shape: the next right vector
    steps: jax.Array  # int32 scalar: how many there have been

    @property
    def first(self) -> SingularTriplet:
        """The triplet of the start."""
        return SingularTriplet(self.diagonal[0], self.lefts[0], self.rights[0], self.above[0])

    def ritz(self, count: int) -> tuple[jax.Array, jax.Array]:
        """Approximate singular values, descending, and the right vectors of the first ``count``.

        ``A V = U B`` with a bidiagonal ``B = X S W^H``. The values are S, the right vectors V W.
        """
        values, weights = _svd(jnp.diag(self.diagonal) + jnp.diag(self.above[:-1], 1))
        # (V W)^T = W^T V^T:  [value, step] [step, vector...] -> [value, vector...]
        weights = weights[:count].astype(self.rights.dtype)
        return values, jnp.tensordot(weights, self.rights, 1, precision="highest")


def without(basis: jax.Array, v: jax.Array) -> jax.Array:
    """``v - V V^H v``, with orthonormal columns or zeros in V. Done twice, for rounding."""
    for _ in range(2):
        inner = jnp.tensordot(basis.conj(), v, v.ndim, precision="highest")
        v = v - jnp.tensordot(inner, basis, 1, precision="highest")
    return v


def _svd(b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(S, W^H)`` of a bidiagonal ``B = X S W^H``, cut off where the Krylov space ends.

    The basis vectors past its end are rounding noise. Their rows and columns of B are set to 0.
    """
    diagonal, above = jnp.diagonal(b), jnp.diagonal(b, 1)
    sizes = jnp.where(jnp.isfinite(b), jnp.abs(b), jnp.zeros_like(b))
    noise = jnp.max(sizes) * jnp.asarray(16 * jnp.finfo(b.dtype).eps, b.dtype)
    # Step j is inside if B[i, i] and B[i, i + 1] are above the noise for all i < j.
    goes_on = jnp.concatenate([jnp.ones(1, bool), (above > noise) & (diagonal[:-1] > noise)])
    inside = jnp.cumprod(goes_on.astype(jnp.int32)).astype(bool)
    b = jnp.where(inside[:, None] & inside[None] & jnp.isfinite(b), b, jnp.zeros_like(b))
    _, values, weights = svd.decomposed(b)
    return values, weights


def _norm(vector: jax.Array) -> jax.Array:
    """Euclidean norm. Axes are summed one by one, so rounding errors are those of short sums."""
    squares = (vector * vector.conj()).real
    while squares.ndim:
        squares = squares.sum(-1)
    return jnp.sqrt(squares)


def normalised(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(v / ||v||, ||v||)``, where 0 stays 0."""
    norm = _norm(vector)
    return vector / jnp.where(norm > 0, norm, jnp.ones_like(norm)).astype(vector.dtype), norm


def narrowed(found: Any, dtype: Any) -> Any:
    """Values and vectors, found in a wider dtype, cast to that of the kernel (values to its real one)."""
    return jax.tree.map(lambda v: v.astype(dtype if jnp.iscomplexobj(v) else jnp.finfo(dtype).dtype), found)

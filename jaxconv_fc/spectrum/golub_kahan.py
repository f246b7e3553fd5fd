"""One group of M by its products, and Golub-Kahan bidiagonalisation of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.products import apply, apply_transpose
from jaxconv_fc.spec import ConvSpec


class SingularTriplet(NamedTuple):
    """``M right == value * left``, and ``M^H left == value * right`` up to ``residual``."""

    value: jax.Array  # real scalar
    left: jax.Array  # spec.out_shape, of norm 1
    right: jax.Array  # spec.in_shape, of norm 1
    residual: jax.Array  # real scalar, ||M^H left - value * right||


def one_group(spec: ConvSpec) -> ConvSpec:
    """The convolution of one group: images (positions..., channels), kernels (taps..., in, out)."""
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


class GroupMatrix(NamedTuple):
    """M of one group. Vectors are images."""

    spec: ConvSpec  # of one group
    kernel: jax.Array  # (taps..., in, out)

    def times(self, right: jax.Array) -> jax.Array:
        """``M v``."""
        return apply(self.spec, self.kernel, right, precision="highest")

    def adjoint_times(self, left: jax.Array) -> jax.Array:
        """``M^H u``."""
        return apply_transpose(self.spec, self.kernel.conj(), left, precision="highest")

    def start(self, key: jax.Array) -> jax.Array:
        """A random unit vector out of M^H: its Krylov space is complete in ``min(M.shape)`` steps."""
        random = jax.random.normal(key, self.spec.out_shape, self.kernel.dtype)
        return normalised(self.adjoint_times(random))[0]

    def triplet(self, right: jax.Array) -> SingularTriplet:
        """``sigma = ||M v||, u = M v / sigma, residual = ||M^H u - sigma v||``, for v of any length."""
        right, _ = normalised(right)
        left, value = normalised(self.times(right))
        residual = _length(self.adjoint_times(left) - value.astype(right.dtype) * right)
        return SingularTriplet(value, left, right, residual)

    def ritz(
        self, product: Callable[..., jax.Array], start: jax.Array, steps: int, reortho: str, count: int
    ) -> tuple[jax.Array, jax.Array]:
        """The singular values of ``A = product`` in the Krylov space of ``start``, descending, and the right
        vectors of the first ``count``.

        Golub-Kahan: ``A V = U B`` with orthonormal U and V and a bidiagonal ``B = X S W^H``. The values are
        S, the right vectors V W. A complex vector is a pair of real ones, and each value occurs twice.
        """
        pairs = jnp.iscomplexobj(self.kernel)

        def join(v: jax.Array) -> jax.Array:
            return lax.complex(v[0], v[1]) if pairs else v

        def split(v: jax.Array) -> jax.Array:
            return jnp.stack([v.real, v.imag]) if pairs else v

        steps = min(steps, *((2 if pairs else 1) * n for n in self.spec.shape))
        found = _bidiagonalisation(steps, reortho)(lambda v: split(product(join(v))), split(start))
        values, weights = _svd(found.J_small)  # [value], [value, step]
        basis = found.Q_tall[1]  # [step, real vector...]
        basis = jnp.where(jnp.isfinite(basis), basis, jnp.zeros_like(basis))
        vectors = jnp.tensordot(weights[:count], basis, 1, precision="highest")
        return values, jax.vmap(join)(vectors)


def _bidiagonalisation(steps: int, reortho: str) -> Any:
    try:
        from matfree import decomp
    except ImportError as error:
        raise ImportError("spectral norms need matfree: pip install 'jaxconv_fc[spectrum]'.") from error
    return decomp.bidiag(steps, reortho=reortho)


def _svd(small: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(S, W^H)`` of the bidiagonal matrix ``X S W^H``, cut off where the Krylov space ends.

    The first vector after its end is rounding, or 0/0. Rows and columns from there on are set to 0.
    """
    diagonal, above = jnp.diagonal(small), jnp.diagonal(small, 1)
    sizes = jnp.where(jnp.isfinite(small), jnp.abs(small), jnp.zeros_like(small))
    least = jnp.max(sizes) * jnp.asarray(16 * jnp.finfo(small.dtype).eps, small.dtype)
    goes_on = jnp.concatenate([jnp.ones(1, bool), (above > least) & (diagonal[:-1] > least)])
    alive = jnp.cumprod(goes_on.astype(jnp.int32)).astype(bool)
    small = jnp.where(alive[:, None] & alive[None] & jnp.isfinite(small), small, jnp.zeros_like(small))
    _, values, weights = jnp.linalg.svd(small)
    return values, weights


def _length(vector: jax.Array) -> jax.Array:
    """Euclidean length, summed axis by axis: rounding stays that of short sums."""
    squares = (vector * vector.conj()).real
    while squares.ndim:
        squares = squares.sum(-1)
    return jnp.sqrt(squares)


def normalised(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The vector divided by its length (0 stays 0), and this length."""
    length = _length(vector)
    return vector / jnp.where(length > 0, length, jnp.ones_like(length)).astype(vector.dtype), length


def narrowed(found: Any, dtype: Any) -> Any:
    """Values and vectors that were found in the default precision, in that of the kernel."""
    return jax.tree.map(lambda v: v.astype(dtype if jnp.iscomplexobj(v) else jnp.finfo(dtype).dtype), found)

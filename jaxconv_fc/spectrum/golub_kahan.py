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
        """A random unit vector in the range of M^H: its Krylov space ends within ``min(M.shape)`` steps."""
        random = jax.random.normal(key, self.spec.out_shape, self.kernel.dtype)
        return normalised(self.adjoint_times(random))[0]

    def triplet(self, right: jax.Array) -> SingularTriplet:
        """``sigma = ||M v||, u = M v / sigma, residual = ||M^H u - sigma v||``; v is normalised first."""
        right, _ = normalised(right)
        left, value = normalised(self.times(right))
        residual = _norm(self.adjoint_times(left) - value.astype(right.dtype) * right)
        return SingularTriplet(value, left, right, residual)

    def ritz(
        self, product: Callable[..., jax.Array], start: jax.Array, steps: int, reortho: str, count: int
    ) -> tuple[jax.Array, jax.Array]:
        """Approximate singular values of A, descending, and the right vectors of the first ``count``.

        ``product(v)`` is ``A v``. Golub-Kahan from ``start``: ``A V = U B`` with orthonormal U and V and a
        bidiagonal ``B = X S W^H``. The values are S, the right vectors V W. For a complex A, the real and
        imaginary parts of v are stacked: A becomes a real map with every value twice, for v and i*v.
        """
        pairs = jnp.iscomplexobj(self.kernel)

        def join(v: jax.Array) -> jax.Array:
            return lax.complex(v[0], v[1]) if pairs else v

        def split(v: jax.Array) -> jax.Array:
            return jnp.stack([v.real, v.imag]) if pairs else v

        steps = min(steps, *((2 if pairs else 1) * n for n in self.spec.shape))
        bidiagonal = _matfree_decomp().bidiag(steps, reortho=reortho)
        with jax.default_matmul_precision("highest"):  # matfree's products, which GPU and TPU would round
            found = bidiagonal(lambda v: split(product(join(v))), split(start))
        values, weights = _svd(found.J_small)  # S: [value], W^H: [value, step]
        basis = found.Q_tall[1]  # V^T: [step, vector...]
        basis = jnp.where(jnp.isfinite(basis), basis, jnp.zeros_like(basis))
        # (V W)^T = W^T V^T, all real:  [value, step] [step, vector...] -> [value, vector...]
        vectors = jnp.tensordot(weights[:count], basis, 1, precision="highest")
        return values, jax.vmap(join)(vectors)


def _matfree_decomp() -> Any:
    try:
        from matfree import decomp
    except ImportError as error:
        raise ImportError("spectral norms need matfree: pip install 'jaxconv_fc[spectrum]'.") from error
    return decomp


def _svd(b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(S, W^H)`` of a bidiagonal ``B = X S W^H``, cut off where the Krylov space ends.

    The basis vectors past its end are rounding noise, or 0/0. Their rows and columns of B are set to 0.
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

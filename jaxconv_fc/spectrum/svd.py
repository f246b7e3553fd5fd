"""Singular value decompositions of many small matrices, in the form that suits the platform.

On CPU that is LAPACK's SVD. Elsewhere it is the eigenvalues of the Hermitian matrix

    H = [[0, A], [A^H, 0]],    H [u; v] = sigma [u; v]  and  H [u; -v] = -sigma [u; -v],

for ``A v = sigma u``. H has the accuracy of the SVD, ``eps ||A||`` (that of ``A^H A`` is lost below
``sqrt(eps) ||A||``). A GPU has no SVD of a batch beyond 32 x 32, and a TPU makes its SVD of eigenvalues too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Decomposition(NamedTuple):
    """``A = U diag(s) V^H`` for every matrix of a batch, with ``k = min(rows, columns)``."""

    left: jax.Array  # U, [..., row, k]
    values: jax.Array  # s, [..., k], real and descending
    right: jax.Array  # V^H, [..., k, column]


@jax.custom_jvp
def singular_values(a: jax.Array) -> jax.Array:
    """The singular values of every matrix of a batch, ``[..., row, column] -> [..., k]``, descending.

    Those of a matrix with NaN or Inf are NaN.
    """
    return lax.platform_dependent(a, cpu=_values_by_lapack, default=lambda a: _by_eigenvalues(a).values)


@singular_values.defjvp
def _singular_values_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """``d sigma_i = Re(u_i^H dA v_i)``."""
    (a,), (change,) = primals, tangents
    left, values, right = decomposed(a)
    # [..., k, row] [..., row, column] -> [..., k, column]
    along = jnp.matmul(jnp.swapaxes(left, -1, -2).conj(), change, precision="highest")
    return values, jnp.sum(along * right.conj(), -1).real


@jax.custom_jvp
def decomposed(a: jax.Array) -> Decomposition:
    """The decomposition of every matrix of a batch ``[..., row, column]``; values NaN of one with NaN or Inf.

    Where a value is 0 up to rounding, its columns of U and V need not have norm 1 off the CPU.
    """
    return lax.platform_dependent(a, cpu=_by_lapack, default=_by_eigenvalues)


@decomposed.defjvp
def _decomposed_jvp(primals: Any, tangents: Any) -> tuple[Decomposition, Decomposition]:
    """JAX's own derivative of the SVD. It has vectors of its own, whose signs differ from those above."""
    return jax.jvp(_by_lapack, primals, tangents)


def _values_by_lapack(a: jax.Array) -> jax.Array:
    return jnp.linalg.svd(a, compute_uv=False)


def _by_lapack(a: jax.Array) -> Decomposition:
    return Decomposition(*jnp.linalg.svd(a, full_matrices=False))


def _by_eigenvalues(a: jax.Array) -> Decomposition:
    rows, columns = a.shape[-2:]
    k = min(rows, columns)
    finite = jnp.isfinite(a).all((-2, -1), keepdims=True)
    a = jnp.where(finite, a, jnp.zeros((), a.dtype))  # an eigenvalue solver need not stop at NaN
    above = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, columns), (rows, 0)])  # [[0, A], [0, 0]]
    embedded = above + jnp.swapaxes(above, -1, -2).conj()
    vectors, values = lax.linalg.eigh(embedded, symmetrize_input=False)  # values from -s_1 up to s_1
    vectors, values = vectors[..., : -k - 1 : -1], values[..., : -k - 1 : -1]
    values = jnp.where(values <= 0, jnp.zeros_like(values), values)  # what is below 0 is rounding
    # An eigenvector [u; v] of norm 1 has halves of norm 1/sqrt(2).
    vectors = vectors * jnp.asarray(2**0.5, vectors.dtype)
    left, right = vectors[..., :rows, :], jnp.swapaxes(vectors[..., rows:, :], -1, -2).conj()
    nan = jnp.asarray(jnp.nan, values.dtype)
    return Decomposition(
        jnp.where(finite, left, nan.astype(a.dtype)),
        jnp.where(finite[..., 0], values, nan),
        jnp.where(finite, right, nan.astype(a.dtype)),
    )

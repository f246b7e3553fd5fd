"""Singular value decompositions of many small matrices, in the form of each platform, and derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.forms import Decomposition
from jaxconv_fc.platforms import PLATFORMS, on_each
from jaxconv_fc.sharding import by_platform


@jax.custom_jvp
def singular_values(a: jax.Array) -> jax.Array:
    """The singular values of every matrix of a batch, ``[..., row, column] -> [..., k]``, descending.

    Those of a matrix with NaN or Inf are NaN.
    """
    return by_platform(on_each(lambda forms: forms.singular_values), _types(a).values, a, linear=0)


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
    return by_platform(on_each(lambda forms: forms.svd), _types(a), a, linear=0)


@decomposed.defjvp
def _decomposed_jvp(primals: Any, tangents: Any) -> tuple[Decomposition, Decomposition]:
    """JAX's own derivative of the SVD. It has vectors of its own, whose signs differ from those above."""
    return jax.jvp(PLATFORMS["cpu"].svd, primals, tangents)


def _types(a: jax.Array) -> Decomposition:
    *batch, rows, columns = a.shape
    k = min(rows, columns)
    real = jnp.finfo(a.dtype).dtype
    shapes = ((*batch, rows, k), a.dtype), ((*batch, k), real), ((*batch, k, columns), a.dtype)
    return Decomposition(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))

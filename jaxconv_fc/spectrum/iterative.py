"""Least squares with M as an operator: for geometries too large for blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.linear_operator import as_linear_operator, import_lineax
from jaxconv_fc.numerics import homogeneous, nan_unless_finite
from jaxconv_fc.sharding import program
from jaxconv_fc.spec import ConvSpec, as_operand
from jaxconv_fc.spectrum.norms import seen, widened


def lstsq(
    spec: ConvSpec, kernel: Any, y: Any, *, rtol: float | None = None, max_steps: int | None = None
) -> jax.Array:
    """``x`` of least norm among those that minimise ``||M x - y||_2``, matrix-free: deconvolution.

    LSMR of lineax on :func:`as_linear_operator`, for any geometry and a singular or non-square M; two
    products per step, and steps in proportion to the condition number (of what is not singular). Where M
    wraps around, :func:`solve` and :func:`pseudo_inverse` are direct. Differentiable in ``kernel`` and
    ``y`` (implicitly, by lineax).

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``, of a floating or complex dtype.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.
      rtol: stop once ``||M^H r||`` is at most ``rtol ||M|| ||r||``, or r small likewise; None for
        ``10 eps``.
      max_steps: at most so many steps, and whatever they give: fewer regularise the solution. None for
        ``10 * min(M.shape)`` steps that have to converge.

    Returns:
      Array of shape ``spec.in_shape``; NaN where ``max_steps`` is None and these did not converge (a large
      condition number, as of a blur).

    Raises:
      ImportError: lineax is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: an argument is not an array, or dtypes differ.  ValueError: an array has another shape.

    Source: Fong & Saunders, LSMR (2011).

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (2,), "VALID")  # means of two
    >>> print(fc.spectrum.lstsq(spec, jnp.array([[[.5, .5]]]), jnp.array([[3., 5.]])).round(4))
    [[3. 3. 5. 5.]]
    """
    dtype = as_linear_operator(spec, kernel).in_structure().dtype
    y = as_operand("y", y, spec, "out_shape")
    if y.dtype != dtype:
        raise TypeError(f"kernel is {dtype} and y {y.dtype}: cast one, e.g. y.astype(kernel.dtype).")
    if not min(spec.shape):
        return jnp.zeros(spec.in_shape, dtype)
    import_lineax("lstsq")
    return _lstsq(spec, seen(spec, jnp.asarray(kernel)), y, rtol, max_steps)


@partial(program, static_argnums=(3, 4))
def _lstsq(
    spec: ConvSpec, kernel: jax.Array, y: jax.Array, rtol: float | None, max_steps: int | None
) -> jax.Array:
    rtol = 10 * float(jnp.finfo(kernel.dtype).eps) if rtol is None else rtol
    x = homogeneous(partial(_unit_lstsq, spec, rtol, max_steps), (-1, 1), kernel, y)
    return nan_unless_finite(x, kernel, y)


def _unit_lstsq(
    spec: ConvSpec, rtol: float, max_steps: int | None, kernel: jax.Array, y: jax.Array
) -> jax.Array:
    """At unit scale, where ``atol`` means what ``rtol`` does."""
    lineax = import_lineax("lstsq")
    operator = as_linear_operator(spec, widened(kernel))
    # Singular directions never enter the iterates, so no condition number may stop them.
    solver = lineax.LSMR(rtol=rtol, atol=rtol, max_steps=max_steps, conlim=float("inf"))
    solution = lineax.linear_solve(operator, widened(y), solver, throw=False)
    value = solution.value.astype(kernel.dtype)
    if max_steps is not None:
        return value
    converged = solution.result == lineax.RESULTS.successful
    return jnp.where(converged, value, jnp.full_like(value, jnp.nan))

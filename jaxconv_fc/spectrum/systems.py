"""``M x = y`` solved: directly by the blocks of M, or by products with M where the blocks are too large."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.numerics import homogeneous, nan_unless_finite
from jaxconv_fc.products.linear_operator import as_linear_operator, import_lineax
from jaxconv_fc.sharding import program
from jaxconv_fc.spectrum import svd
from jaxconv_fc.spectrum.blocks import Blocks
from jaxconv_fc.spectrum.operands import as_inexact, as_system, check_square, widened
from jaxconv_fc.spectrum.values import relative_cutoff

_matmul = partial(jnp.matmul, precision="highest")


def solve(spec: ConvSpec, kernel: Array, y: Array) -> jax.Array:
    """``x`` with ``M x = y``, for a square and invertible M: one small system per frequency.

    Linear in ``y`` and differentiable in both (docs/maths.md, sections 5 and 11). Where M is singular the
    result is not finite or has no digit right: use :func:`pseudo_inverse`, or :func:`lstsq` for large
    geometries that do not wrap around.

    Args:
      spec: a geometry with ``out_size == in_size``; cost as in :func:`log_abs_det`, and two FFTs.
      kernel: array of shape ``spec.rhs_shape``.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.

    Returns:
      Array of shape ``spec.in_shape``.

    Raises:
      TypeError, ValueError: as :func:`log_abs_det`; y is not of the spec's shape and the kernel's dtype.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), [(1, 0)])  # differences; their inverse is a sum
    >>> print(fc.spectrum.solve(spec, jnp.array([[[-1., 1.]]]), jnp.array([[1., 2., 3., 4.]])))
    [[ 1.  3.  6. 10.]]
    """
    kernel, y = as_system(spec, kernel, y)
    kernel = as_inexact(spec, kernel)
    check_square("solve", spec, "pseudo_inverse or lstsq")
    Blocks.of(spec).check_memory("solve", kernel.dtype, "lstsq")
    return _solution(spec, kernel, y.astype(kernel.dtype), None)


def pseudo_inverse(spec: ConvSpec, kernel: Array, y: Array, *, rtol: float | None = None) -> jax.Array:
    """``M^+ y``, the least-squares solution of ``M x = y`` of least norm: per frequency, for any M.

    The matrix M^+ itself is ``vmap`` of this over unit vectors. Differentiable in both where the rank does
    not change (docs/maths.md, sections 5 and 11). Cost: as :func:`singular_values` with vectors.

    Args:
      spec: the geometry, any.
      kernel: array of shape ``spec.rhs_shape``.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.
      rtol: singular values up to ``rtol * sigma_1`` count as 0; None as in :func:`rank`.

    Returns:
      Array of shape ``spec.in_shape``.

    Raises:
      TypeError: an argument is not an array of numbers, or dtypes differ.
      ValueError: an array has another shape, or the blocks are beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (2,), "VALID")  # means of two
    >>> print(fc.spectrum.pseudo_inverse(spec, jnp.array([[[.5, .5]]]), jnp.array([[3., 5.]])).round(4))
    [[3. 3. 5. 5.]]
    """
    kernel, y = as_system(spec, kernel, y)
    kernel = as_inexact(spec, kernel)
    Blocks.of(spec).check_memory("pseudo_inverse", kernel.dtype, "lstsq")
    return _solution(spec, kernel, y.astype(kernel.dtype), relative_cutoff(spec, kernel.dtype, rtol))


@partial(program, static_argnums=3)
def _solution(spec: ConvSpec, kernel: jax.Array, y: jax.Array, rtol: float | None) -> jax.Array:
    """``M^-1 y`` if ``rtol`` is None, else ``M^+ y``: per block, of degree -1 in the kernel and 1 in y."""
    if not min(spec.shape):
        return jnp.zeros(spec.in_shape, y.dtype)

    def at_unit_scale(kernel: jax.Array, y: jax.Array) -> jax.Array:
        blocks = Blocks.of(spec)
        matrices = blocks.at(kernel, blocks.frequencies)  # [group, block, row, column]
        ys = blocks.from_output(y).astype(matrices.dtype)[..., None]  # [group, block, row, 1]
        xs = jnp.linalg.solve(matrices, ys) if rtol is None else _matmul(_pinv(rtol, matrices), ys)
        x = blocks.to_input(xs[..., 0])
        return x if jnp.iscomplexobj(kernel) else x.real

    return nan_unless_finite(homogeneous(at_unit_scale, (-1, 1), kernel, y), kernel, y)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pinv(rtol: float, blocks: jax.Array) -> jax.Array:
    """Pseudo-inverses; values up to ``rtol`` times the largest of all blocks (not of each) count as 0."""
    u, s, vh = svd.decomposed(blocks)
    keep = s > jnp.asarray(rtol, s.dtype) * s.max()
    inverse = jnp.where(keep, 1 / jnp.where(keep, s, jnp.ones((), s.dtype)), jnp.zeros((), s.dtype))
    return _matmul(_adjoint(vh) * inverse[..., None, :].astype(vh.dtype), _adjoint(u))  # V S^+ U^H


@_pinv.defjvp
def _pinv_jvp(rtol: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """``A^+ A^+H dA^H (I - A A^+) + (I - A^+ A) dA^H A^+H A^+ - A^+ dA A^+`` (Golub & Pereyra 1973).

    It holds while the rank is constant. The derivative of the SVD has poles where singular values repeat.
    """
    (blocks,), (change,) = primals, tangents
    inverse = _pinv(rtol, blocks)
    back = _adjoint(change)
    in_range = back - _matmul(back, _matmul(blocks, inverse))
    in_kernel = back - _matmul(_matmul(inverse, blocks), back)
    return inverse, (
        _matmul(_matmul(inverse, _adjoint(inverse)), in_range)
        + _matmul(in_kernel, _matmul(_adjoint(inverse), inverse))
        - _matmul(_matmul(inverse, change), inverse)
    )


def _adjoint(blocks: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(blocks, -1, -2))


def lstsq(
    spec: ConvSpec, kernel: Array, y: Array, *, rtol: float | None = None, max_steps: int | None = None
) -> jax.Array:
    """``x`` of least norm among those that minimise ``||M x - y||_2``, matrix-free: deconvolution.

    LSMR of lineax on :func:`as_linear_operator`, for any geometry and a singular or non-square M. Each step
    takes two products; the number of steps grows with the condition number (of M without what is singular).
    Where M wraps around, :func:`solve` and :func:`pseudo_inverse` are direct. Differentiable in ``kernel``
    and ``y`` (implicitly, by lineax).

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers and halves are taken as floats of 32 bits or more.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.
      rtol: stop once ``||M^H r||`` is at most ``rtol ||M|| ||r||``, or r small likewise; None for
        ``10 eps``.
      max_steps: stop after this many steps and return what they give: few steps regularise the solution.
        None for ``10 * min(M.shape)`` steps that have to converge.

    Returns:
      Array of shape ``spec.in_shape``; NaN where ``max_steps`` is None and these did not converge (a large
      condition number, as of a blur).

    Raises:
      ImportError: lineax is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: an argument is not an array, or dtypes differ.
      ValueError: an array has another shape.

    Source: Fong & Saunders, LSMR (2011).

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (2,), "VALID")  # means of two
    >>> print(fc.spectrum.lstsq(spec, jnp.array([[[.5, .5]]]), jnp.array([[3., 5.]])).round(4))
    [[3. 3. 5. 5.]]
    """
    kernel, y = as_system(spec, kernel, y)
    import_lineax("lstsq")
    kernel = as_inexact(spec, kernel)  # a tolerance of some narrow eps would stop at a solution far off
    return _lstsq(spec, kernel, y.astype(kernel.dtype), rtol, max_steps)


@partial(program, static_argnums=(3, 4))
def _lstsq(
    spec: ConvSpec, kernel: jax.Array, y: jax.Array, rtol: float | None, max_steps: int | None
) -> jax.Array:
    if not min(spec.shape):
        return jnp.zeros(spec.in_shape, y.dtype)
    lineax = import_lineax("lstsq")
    rtol = 10 * float(jnp.finfo(kernel.dtype).eps) if rtol is None else rtol
    # At unit scale the absolute tolerance atol means the same as rtol. Iterates have no part in singular
    # directions, so no condition number may stop them: conlim is inf.
    solver = lineax.LSMR(rtol=rtol, atol=rtol, max_steps=max_steps, conlim=float("inf"))

    def at_unit_scale(kernel: jax.Array, y: jax.Array) -> jax.Array:
        operator = as_linear_operator(spec, widened(kernel))
        solution = lineax.linear_solve(operator, widened(y), solver, throw=False)
        value = solution.value.astype(kernel.dtype)
        if max_steps is not None:
            return value
        converged = solution.result == lineax.RESULTS.successful
        return jnp.where(converged, value, jnp.full_like(value, jnp.nan))

    return nan_unless_finite(homogeneous(at_unit_scale, (-1, 1), kernel, y), kernel, y)

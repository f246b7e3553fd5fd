"""``M x = y`` solved: directly by the blocks of M, or by products with M where the blocks are too large."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.geometry.arguments import Array, as_array
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.numerics import homogeneous, nan_unless_finite
from jaxconv_fc.products.linear_operator import as_linear_operator, import_lineax
from jaxconv_fc.sharding import program
from jaxconv_fc.spectrum import svd
from jaxconv_fc.spectrum.blocks import Blocks
from jaxconv_fc.spectrum.causal import Causal, masked
from jaxconv_fc.spectrum.operands import as_inexact, as_system, check_square, widened
from jaxconv_fc.spectrum.values import relative_cutoff

_matmul = partial(jnp.matmul, precision="highest")


def solve(spec: ConvSpec, kernel: Array, y: Array, *, mask: Any = None) -> jax.Array:
    """``x`` with ``M x = y``, for a square and invertible M: one small system per frequency.

    Of a causal layer, as of :func:`log_abs_det`, positions are substituted one after the other, those of
    the slowest axis in one step of a scan each: ``x[o] = D^-1 (y[o] - sum over p of K[p] x[o + s(p)])``.

    Linear in ``y`` and differentiable in both (docs/maths.md, sections 5, 11 and 15). Where M is singular the
    result is not finite or has no digit right: use :func:`pseudo_inverse`, or :func:`lstsq` for large
    geometries that do not wrap around.

    Args:
      spec: a geometry with ``out_size == in_size``; cost as in :func:`log_abs_det`, and two FFTs.
      kernel: array of shape ``spec.rhs_shape``.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.
      mask: NumPy array of bool, of the taps' or the kernel's shape: entries of the kernel that count, the
        others are 0. None for all.

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
    kernel, causal = masked(spec, as_inexact(spec, kernel), mask)
    check_square("solve", spec, "pseudo_inverse or lstsq")
    if causal:
        return _substituted(causal, kernel, y.astype(kernel.dtype))
    Blocks.of(spec).check_memory("solve", kernel.dtype, "lstsq")
    return _solution(spec, kernel, y.astype(kernel.dtype), None)


@program
def _substituted(causal: Causal, kernel: jax.Array, y: jax.Array) -> jax.Array:
    if not causal.spec.in_size:
        return jnp.zeros(causal.spec.in_shape, y.dtype)
    return nan_unless_finite(homogeneous(causal.solution, (-1, 1), kernel, y), kernel, y)


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
    spec: ConvSpec,
    kernel: Array,
    y: Array,
    *,
    damping: Array | float | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
) -> jax.Array:
    """``x`` of least norm among those that minimise ``||M x - y||_2``, matrix-free: deconvolution.

    With ``damping = t`` it is Tikhonov's ``x``, which minimises ``||M x - y||**2 + t**2 ||x||**2``: the
    least-squares solution of ``[M; t I] x = [y; 0]``, whose condition number is about ``sigma_1 / t``.

    LSMR of lineax on :func:`as_linear_operator`, for any geometry and a singular or non-square M. Each step
    takes two products; the number of steps grows with the condition number (of M without what is singular).
    Where M wraps around, :func:`solve` and :func:`pseudo_inverse` are direct. Differentiable in ``kernel``,
    ``y`` and ``damping`` (implicitly, by lineax).

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers and halves are taken as floats of 32 bits or more.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.
      damping: a real number, traced or not, in units of the singular values of M; None for no damping.
      rtol: stop once ``||M^H r||`` is at most ``rtol ||M|| ||r||``, or r small likewise; None for
        ``10 eps``.
      max_steps: stop after this many steps and return what they give: few steps regularise the solution.
        None for ``10 * min(M.shape)`` steps that have to converge, ten times as many with damping.

    Returns:
      Array of shape ``spec.in_shape``; NaN where ``max_steps`` is None and these did not converge (a large
      condition number, as of a blur: give it a damping).

    Raises:
      ImportError: lineax is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: an argument is not an array, or dtypes differ; damping is not a real number.
      ValueError: an array has another shape.

    Source: Fong & Saunders, LSMR (2011).

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (2,), "VALID")  # means of two
    >>> print(fc.spectrum.lstsq(spec, jnp.array([[[.5, .5]]]), jnp.array([[3., 5.]])).round(4))
    [[3. 3. 5. 5.]]
    >>> y = jnp.array([[3., 5.]])  # M M^T = 1/2: damped, M^T (1/2 + 1/2)^-1 y
    >>> print(fc.spectrum.lstsq(spec, jnp.array([[[.5, .5]]]), y, damping=0.5**0.5).round(4))
    [[1.5 1.5 2.5 2.5]]
    """
    kernel, y = as_system(spec, kernel, y)
    import_lineax("lstsq")
    kernel = as_inexact(spec, kernel)  # with the eps of a narrow dtype as tolerance it would stop too early
    if damping is not None:
        array = jnp.asarray(damping) if isinstance(damping, int | float) else as_array("damping", damping)
        if array.ndim or not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "iu"):
            raise TypeError(f"damping must be a real number, got {array.dtype}{list(array.shape)}.")
        damping = array.astype(kernel.real.dtype)
    return _lstsq(spec, kernel, y.astype(kernel.dtype), damping, rtol, max_steps)


@partial(program, static_argnums=(4, 5))
def _lstsq(
    spec: ConvSpec,
    kernel: jax.Array,
    y: jax.Array,
    damping: jax.Array | None,
    rtol: float | None,
    max_steps: int | None,
) -> jax.Array:
    if not min(spec.shape):
        return jnp.zeros(spec.in_shape, y.dtype)
    lineax = import_lineax("lstsq")
    rtol = 10 * float(jnp.finfo(kernel.dtype).eps) if rtol is None else rtol
    # At unit scale the absolute tolerance atol means the same as rtol. Iterates have no part in singular
    # directions, so no condition number may stop them: conlim is inf.
    steps = 100 * min(spec.shape) if max_steps is None and damping is not None else max_steps
    solver = lineax.LSMR(rtol=rtol, atol=rtol, max_steps=steps, conlim=float("inf"))

    def at_unit_scale(matrix: jax.Array, y: jax.Array) -> jax.Array:
        operator = as_linear_operator(spec, widened(matrix[: kernel.size].reshape(kernel.shape)))
        right = widened(y)
        if damping is not None:
            operator = _damped(operator, widened(matrix[-1]))
            right = right, jnp.zeros(spec.in_shape, right.dtype)
        solution = lineax.linear_solve(operator, right, solver, throw=False)
        value = solution.value.astype(kernel.dtype)
        if max_steps is not None:
            return value
        converged = solution.result == lineax.RESULTS.successful
        return jnp.where(converged, value, jnp.full_like(value, jnp.nan))

    # Kernel and damping are of one scale: x is of degree -1 in both together.
    entries = [kernel.ravel()] if damping is None else [kernel.ravel(), damping.astype(kernel.dtype)[None]]
    matrix = jnp.concatenate(entries)
    return nan_unless_finite(homogeneous(at_unit_scale, (-1, 1), matrix, y), matrix, y)


def _damped(operator: Any, damping: jax.Array) -> Any:
    """``x -> (M x, t x)``."""
    lineax = import_lineax("lstsq")
    return lineax.FunctionLinearOperator(lambda x: (operator.mv(x), damping * x), operator.in_structure())

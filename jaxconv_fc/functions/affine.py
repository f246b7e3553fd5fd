"""The matrix of a whole function: affine ones exactly, piecewise linear ones at a point.

In two steps. The first goes through the jaxpr with pairs of a *tangent*, the linear part of a value as a
function of x, and the value at the point (0 for an affine function: the offset). It refuses what is not
affine, evaluates what does not depend on x, replaces every switch of a piecewise linear function by what
it is at the point, unrolls loops, and leaves a jaxpr that is linear. The second carries the columns of the
matrix through that jaxpr (``functions/columns.py``), or, where the output is smaller than the input,
through its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxconv_fc.functions.columns import Selection, propagate
from jaxconv_fc.functions.jaxprs import compiled, open_jaxpr, trace
from jaxconv_fc.functions.linearize import linearized
from jaxconv_fc.functions.rules import AFFINE, PIECEWISE_LINEAR
from jaxconv_fc.geometry.arguments import brief
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.numerics import least, nan_unless_finite
from jaxconv_fc.sharding import replicated

_LAYERS = ("dot_general", "conv_product")


class Local(NamedTuple):
    """The affine map that a function is around a point: ``fn(z).ravel() == matrix @ z.ravel() + offset``
    for every z closer to x than ``radius`` (in the 2-norm)."""

    matrix: jax.Array
    offset: jax.Array
    radius: jax.Array


def matrix_of(fn: Callable[[Any], Any], x: Any) -> tuple[jax.Array, jax.Array]:
    """``(A, b)`` with ``fn(x).ravel() == A @ x.ravel() + b`` for every x, of a function affine in x.

    Convolutions, padding, slicing, reshaping, transposition, concatenation, addition, scaling, sums,
    average pooling, dense layers, normalisation with fixed statistics: whatever is built of these, loops
    of known length and custom derivatives included, is one matrix. A is composed from the equations of
    the function (docs/maths.md, section 13) and never probed. It does not depend on the values of x. Matrix
    products are done with ``precision="highest"`` unless ``fn`` asks for another.

    Of integers, A and b hold modulo ``2**n`` for the n bits of the result, as integer arithmetic does. What
    may have wrapped around is not affine in a wider type or a float, and is refused: convert x first.

    Cost: that of ``fn`` for ``min(in size, out size)`` examples at once, the first layer free. A is dense.
    Outside of jit, ``fn`` is traced at every call, and what is compiled for it serves all functions that
    differ from it in the arrays and numbers they close over alone.

    Args:
      fn: a function from one array to one array.
      x: an array, or a ``jax.ShapeDtypeStruct``: only shape and dtype count.

    Returns:
      A of shape ``(out size, in size)`` and b of shape ``(out size,)``, in the dtype of the result.
      Differentiable with respect to arrays that ``fn`` closes over, and jittable.

    Raises:
      ValueError: ``fn`` is not affine in x; the message names the primitive that broke it, and where. Or A
        is beyond the memory limit.
      TypeError: x or the result is not a single array.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> def circular(x):  # pad, then VALID
    ...     return jnp.convolve(jnp.pad(x, 1, mode="wrap"), jnp.array([1., 2., 3.]), "valid") + 5
    >>> matrix, offset = fc.matrix_of(circular, jnp.zeros(4))
    >>> print(matrix)
    [[2. 1. 0. 3.]
     [3. 2. 1. 0.]
     [0. 3. 2. 1.]
     [1. 0. 3. 2.]]
    >>> print(offset)
    [5. 5. 5. 5.]
    """
    with jax.default_matmul_precision("highest"):
        jaxpr, x = _single(fn, x, "matrix_of")
        return compiled(_matrix_and_offset, linearized("matrix_of", AFFINE, jaxpr, x, None))


def _matrix_and_offset(linear: Any) -> tuple[jax.Array, jax.Array]:
    """Of the jaxpr from x to (tangent, offset)."""
    x, out = linear.in_avals[0], linear.out_avals[0]
    transposed = _transposed(linear, x, out) if _is_narrow(linear, x, out) else None
    if transposed is None:
        matrix, offset = propagate(linear, [_identity(x)], [_matrix(x, out), jnp.ravel])
        return matrix, offset
    (offset,) = propagate(linear, [None], [None, jnp.ravel])[1:]
    (matrix,) = propagate(transposed, [_identity(out)], [_matrix(out, x)])
    return matrix.T, offset


def _transposed(linear: Any, x: Any, out: Any) -> Any:
    """The jaxpr of the transpose; None where JAX has none (of a scatter that may write a place twice)."""

    def tangent(x: Any) -> Any:
        return propagate(linear, [x], [lambda y: y, None])[0]

    try:
        return jax.make_jaxpr(lambda y: jax.linear_transpose(tangent, x)(y)[0])(out)
    except NotImplementedError:
        return None


def local_affine(fn: Callable[[Any], Any], x: Any) -> Local:
    """``(A, b, radius)`` with ``fn(z).ravel() == A @ z.ravel() + b`` wherever ``||z - x|| < radius``.

    For piecewise linear networks: everything that :func:`matrix_of` takes, and ReLU, leaky ReLU, clipping,
    absolute values, maxima, max pooling. Each of these switches where some ``z_i`` crosses 0, so with all
    switches as at x the network is ``A = M_L D ... D_1 M_1``, and no switch turns nearer to x than
    ``radius = min over i of |z_i| / ||dz_i/dx||`` up to rounding (docs/maths.md, section 13).
    Further out it may, or may not matter.

    Cost: that of ``fn`` for ``in size`` examples at once, the first layer free.

    Args:
      fn: a function from one array to one array.
      x: the point, a real array.

    Returns:
      A named tuple ``(matrix, offset, radius)``: shapes ``(out size, in size)``, ``(out size,)``, ``()``.
      The radius is 0 where x lies on a boundary, and infinite for an affine function. All three are NaN
      where x or a value that decides a switch is. Jittable.

    Raises:
      ValueError: ``fn`` is not piecewise linear; the message names the primitive and where it is. Or A is
        beyond the memory limit.
      TypeError: x is not a single array of real floats, or the result not a single array.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> local = fc.local_affine(lambda x: jax.nn.relu(2 * x - 1), jnp.array([0.0, 3.0]))
    >>> print(local.matrix, local.offset, local.radius)
    [[0. 0.]
     [0. 2.]] [ 0. -1.] 0.5
    """
    with jax.default_matmul_precision("highest"):
        jaxpr, shape = _single(fn, x, "local_affine")
        if isinstance(x, jax.ShapeDtypeStruct) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"local_affine: x must be an array of real floats, got {brief(x)}. Cast it: x.astype(float)."
            )
        x = replicated(jnp.asarray(x))
        linear = linearized("local_affine", PIECEWISE_LINEAR, jaxpr, shape, x)
        return Local(*compiled(_around, linear, x))


def _around(linear: Any, point: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(matrix, offset, radius)`` of the jaxpr from x to (tangents, values)."""
    x, out = linear.in_avals[0], linear.out_avals[0]
    switches = len(linear.out_avals) // 2 - 1
    finish = [_matrix(x, out), *[lambda z: z.norms()] * switches, *[lambda value: value] * (1 + switches)]
    matrix, *norms = propagate(linear, [_identity(x)], finish)
    norms, (value, *differences) = norms[:switches], norms[switches:]
    product = jnp.matmul(matrix, point.ravel().astype(matrix.dtype))
    radii = [_nearest(z, n).astype(x.dtype) for z, n in zip(differences, norms, strict=True)]
    radius = least(jnp.stack(radii)) if radii else jnp.asarray(jnp.inf, x.dtype)
    # A switch at NaN has no side: its radius is NaN, and so is the map.
    unknown = jnp.isnan(radius)
    return nan_unless_finite(
        (matrix, value.ravel() - product, radius), point, jnp.where(unknown, radius, jnp.zeros_like(radius))
    )


def _nearest(values: Any, norms: Any) -> Any:
    """How far from x the first of these values crosses 0, given the norms of their gradients."""
    moving = norms != 0  # NaN too
    distance = abs(values) / jnp.where(moving, norms, jnp.ones((), norms.dtype))
    never = jnp.full(1, jnp.inf, distance.dtype)
    return least(jnp.append(jnp.where(moving, distance, never[0]).ravel(), never))


def _single(fn: Callable[[Any], Any], x: Any, name: str) -> tuple[Any, Any]:
    """The jaxpr of a function of one array, and shape and dtype of the argument."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(
            f"{name}: x must be one array, got {type(x).__name__}. Flatten a pytree with ravel_pytree."
        )
    if not isinstance(x, jax.ShapeDtypeStruct):
        x = jax.eval_shape(lambda: replicated(jnp.asarray(x)))  # with what its type says of devices
    jaxpr = trace(fn, (x,), {}).jaxpr
    outs = open_jaxpr(jaxpr)[0].outvars
    if len(outs) != 1:
        raise TypeError(
            f"{name}: fn must return one array, got {len(outs)}. Return one of them, or ravel_pytree(...)[0]."
        )
    out = jax.ShapeDtypeStruct(outs[0].aval.shape, outs[0].aval.dtype)
    shape = math.prod(out.shape), math.prod(x.shape)
    check_array(name, shape, out.dtype, "find_convs and as_bcoo layer by layer")
    return jaxpr, x


def _is_narrow(linear: Any, x: Any, out: Any) -> bool:
    """Whether the transpose has fewer columns to carry; the first layer costs nothing in either direction."""
    layers = sum(eqn.primitive.name in _LAYERS for eqn in open_jaxpr(linear)[0].eqns)
    small = math.prod(out.shape) < math.prod(x.shape)
    return small and layers > 1 and x.dtype == out.dtype and jnp.issubdtype(x.dtype, jnp.inexact)


def _identity(x: Any) -> Selection:
    return Selection(math.prod(x.shape), x.shape, x.dtype)


def _matrix(x: Any, out: Any) -> Callable[[Any], jax.Array]:
    """The matrix of a linear result; a constant one has the matrix 0."""
    shape = (math.prod(out.shape), math.prod(x.shape))

    def finish(result: Any) -> jax.Array:
        if not hasattr(result, "columns"):
            return jnp.zeros(shape, out.dtype)
        return result.columns().reshape(shape).astype(out.dtype)

    return finish

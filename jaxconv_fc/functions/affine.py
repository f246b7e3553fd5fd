"""The matrix of a whole function: affine ones exactly, piecewise linear ones at a point.

In two steps. The first goes through the jaxpr with pairs of a *tangent*, the linear part of a value as a
function of x, and the value at the point (0 for an affine function: the offset). It refuses what is not
affine, evaluates what does not depend on x, replaces every switch of a piecewise linear function by what
it is at the point, unrolls loops, and leaves a jaxpr that is linear. The second carries the columns of the
matrix through that jaxpr (``functions/columns.py``), or, where the output is smaller than the input,
through its transpose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.functions.columns import Selection, propagate
from jaxconv_fc.functions.jaxprs import compiled, open_jaxpr, unchanged
from jaxconv_fc.functions.linearize import linearized
from jaxconv_fc.functions.ravel import Ravelled, ravelled, sizes
from jaxconv_fc.functions.rules import AFFINE, PIECEWISE_LINEAR
from jaxconv_fc.geometry.arguments import brief
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.numerics import least, nan_unless_finite
from jaxconv_fc.sharding import replicated

_LAYERS = ("dot_general", "conv_product")


class AffineMap(NamedTuple):
    """``fn(x) == matrix @ x + offset``, of ravelled x and fn(x)."""

    matrix: jax.Array
    offset: jax.Array


class Local(NamedTuple):
    """The affine map that a function is around a point: ``fn(z).ravel() == matrix @ z.ravel() + offset``
    for every z closer to x than ``radius`` (in the 2-norm)."""

    matrix: jax.Array
    offset: jax.Array
    radius: jax.Array


def matrix_of(fn: Callable[[Any], Any], x: Any, *, rows: Any = None) -> AffineMap:
    """``(A, b)`` with ``fn(x).ravel() == A @ x.ravel() + b`` for every x, of a function affine in x.

    Convolutions, padding, slicing, reshaping, transposition, concatenation, addition, scaling, sums,
    average pooling, dense layers, normalisation with fixed statistics: whatever is built of these, loops
    of known length and custom derivatives included, is one matrix. A is composed from the equations of
    the function (docs/maths.md, section 13) and never probed. It does not depend on the values of x. Matrix
    products are done with ``precision="highest"`` unless ``fn`` asks for another.

    Of integers, A and b hold modulo ``2**n`` for the n bits of the result, as integer arithmetic does. What
    may have wrapped around is not affine in a wider type or a float, and is refused: convert x first.

    Cost: that of ``fn`` for ``min(in size, out size)`` examples at once, the first layer free. A is dense;
    :func:`sparse_matrix_of` is not. Outside of jit, ``fn`` is traced at every call, and what is compiled for
    it serves all functions that differ from it in the arrays and numbers they close over alone.

    Args:
      fn: a function from a pytree of arrays to a pytree of arrays. Bind parameters with
        ``functools.partial(apply, params)``.
      x: an array or a pytree of them, or of ``jax.ShapeDtypeStruct``: only shapes and dtypes count. Vectors
        are in the order of ``jax.flatten_util.ravel_pytree``.
      rows: these entries of the ravelled result alone, as for :func:`matrix_rows`, at the cost of ``fn`` for
        so many examples (where JAX can transpose ``fn``: not where it computes with integers).

    Returns:
      A named tuple ``(matrix, offset)``: A of shape ``(out size, in size)`` and b of shape ``(out size,)``,
      in the dtype of the result. Differentiable with respect to arrays that ``fn`` closes over, and jittable.

    Raises:
      ValueError: ``fn`` is not affine in x; the message names the primitive that broke it, and where. Or A
        is beyond the memory limit.
      TypeError: x or the result has a part that is no array; rows are not a list of integers.
      IndexError: rows out of range.

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
        traced = _checked("matrix_of", ravelled("matrix_of", fn, x, rows))
        linear = linearized("matrix_of", AFFINE, traced.jaxpr, traced.xs, None)
        return AffineMap(*compiled(_matrix_and_offset, linear))


def _matrix_and_offset(linear: Any) -> tuple[jax.Array, jax.Array]:
    """The matrix and offset of a function, from the jaxpr that takes x to (tangents, offsets)."""
    xs, outs = linear.in_avals, linear.out_avals[: len(linear.out_avals) // 2]
    tangents, offsets = [_rows_of(xs, out) for out in outs], [jnp.ravel] * len(outs)
    transposed = _transposed(linear, xs, outs) if _is_narrow(linear, xs, outs) else None
    if transposed is None:
        results = propagate(linear, _identity(xs), [*tangents, *offsets])
        return _joined(results[: len(outs)]), jnp.concatenate(results[len(outs) :])
    offset = propagate(linear, [None] * len(xs), [*[None] * len(outs), *offsets])[len(outs) :]
    columns = propagate(transposed, _identity(outs), [_rows_of(outs, x) for x in xs])
    return _joined(columns).T, jnp.concatenate(offset)


def _transposed(linear: Any, xs: Sequence[Any], outs: Sequence[Any]) -> Any:
    """The jaxpr of the transpose; None where JAX has none (of a scatter that may write a place twice)."""

    def tangents(*xs: Any) -> list[Any]:
        return propagate(linear, xs, [unchanged] * len(outs) + [None] * len(outs))[: len(outs)]

    try:
        return jax.make_jaxpr(lambda *ys: jax.linear_transpose(tangents, *xs)(list(ys)))(*outs)
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
      fn: a function from a pytree of arrays to a pytree of arrays. Bind parameters with
        ``functools.partial(apply, params)``.
      x: the point, an array of real floats or a pytree of them. Vectors are in the order of
        ``jax.flatten_util.ravel_pytree``.

    Returns:
      A named tuple ``(matrix, offset, radius)``: shapes ``(out size, in size)``, ``(out size,)``, ``()``.
      The radius is 0 where x lies on a boundary, and infinite for an affine function. All three are NaN
      where x or a value that decides a switch is. Jittable.

    Raises:
      ValueError: ``fn`` is not piecewise linear; the message names the primitive and where it is. Or A is
        beyond the memory limit.
      TypeError: x has a part that is no array of real floats, or the result one that is no array.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> local = fc.local_affine(lambda x: jax.nn.relu(2 * x - 1), jnp.array([0.0, 3.0]))
    >>> print(local.matrix, local.offset, local.radius)
    [[0. 0.]
     [0. 2.]] [ 0. -1.] 0.5
    """
    with jax.default_matmul_precision("highest"):
        traced = _checked("local_affine", ravelled("local_affine", fn, x))
        for point in traced.xs:
            if isinstance(point, jax.ShapeDtypeStruct) or not jnp.issubdtype(point.dtype, jnp.floating):
                raise TypeError(
                    f"local_affine: x must hold real floats, got {brief(point)}. Cast it: x.astype(float)."
                )
        points = list(map(replicated, traced.xs))
        linear = linearized("local_affine", PIECEWISE_LINEAR, traced.jaxpr, traced.xs, points)
        return Local(*compiled(_Around(len(traced.outs)), linear, points))


class _Around(NamedTuple):
    """``(matrix, offset, radius)`` of the jaxpr from x to (tangents, values): of the results, then of every
    switch."""

    results: int

    def __call__(self, linear: Any, points: Sequence[Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        results = self.results
        xs, outs = linear.in_avals, linear.out_avals[:results]
        switches = len(linear.out_avals) // 2 - results
        finish = [
            *(_rows_of(xs, out) for out in outs),
            *[lambda z: z.norms()] * switches,
            *[unchanged] * (results + switches),
        ]
        made = propagate(linear, _identity(xs), finish)
        matrix, norms = _joined(made[:results]), made[results : results + switches]
        values, differences = made[results + switches :][:results], made[results + switches :][results:]
        point = jnp.concatenate([p.ravel().astype(matrix.dtype) for p in points])
        product = jnp.matmul(matrix, point)
        dtype = jnp.result_type(*points)
        radii = [_nearest(z, n).astype(dtype) for z, n in zip(differences, norms, strict=True)]
        radius = least(jnp.stack(radii)) if radii else jnp.asarray(jnp.inf, dtype)
        # A switch at NaN has no side: its radius is NaN, and so is the map.
        unknown = jnp.isnan(radius)
        value = jnp.concatenate([v.ravel() for v in values])
        return nan_unless_finite(
            (matrix, value - product, radius), point, jnp.where(unknown, radius, jnp.zeros_like(radius))
        )


def _nearest(values: Any, norms: Any) -> Any:
    """How far from x the first of these values crosses 0, given the norms of their gradients."""
    moving = norms != 0  # NaN too
    distance = abs(values) / jnp.where(moving, norms, jnp.ones((), norms.dtype))
    never = jnp.full(1, jnp.inf, distance.dtype)
    return least(jnp.append(jnp.where(moving, distance, never[0]).ravel(), never))


def _checked(name: str, traced: Ravelled) -> Ravelled:
    """The traced function, if its matrix is within the memory limit."""
    if not traced.outs or not traced.xs:
        raise TypeError(
            f"{name}: {'fn returns' if traced.xs else 'x holds'} no array, so there is no matrix."
        )
    check_array(name, traced.shape, traced.dtype, "sparse_matrix_of, or rows= for some rows")
    return traced


def _is_narrow(linear: Any, xs: Sequence[Any], outs: Sequence[Any]) -> bool:
    """Whether the transpose has fewer columns to carry; the first layer costs nothing in either direction."""
    layers = sum(eqn.primitive.name in _LAYERS for eqn in open_jaxpr(linear)[0].eqns)
    small = sum(sizes(outs)) < sum(sizes(xs))
    dtypes = {v.dtype for v in (*xs, *outs)}
    return small and layers > 1 and len(dtypes) == 1 and jnp.issubdtype(dtypes.pop(), jnp.inexact)


def _identity(arrays: Sequence[Any]) -> list[Selection]:
    """Each of these arrays as a selection from the vector of all their entries."""
    if len(arrays) == 1:
        return [Selection(math.prod(a.shape), a.shape, a.dtype) for a in arrays]
    total, firsts = sum(sizes(arrays)), [*itertools.accumulate(sizes(arrays), initial=1)]
    labels = [
        lax.iota(jnp.int32, n).reshape(a.shape) + jnp.int32(first)
        for a, n, first in zip(arrays, sizes(arrays), firsts, strict=False)
    ]
    return [Selection(total, a.shape, a.dtype, n) for a, n in zip(arrays, labels, strict=True)]


def _rows_of(xs: Sequence[Any], out: Any) -> Callable[[Any], jax.Array]:
    """The rows of the matrix that make one result. A constant one has the matrix 0."""
    shape = (math.prod(out.shape), sum(sizes(xs)))

    def finish(result: Any) -> jax.Array:
        if not hasattr(result, "columns"):
            return jnp.zeros(shape, out.dtype)
        return result.columns().reshape(shape).astype(out.dtype)

    return finish


def _joined(parts: Sequence[Any]) -> jax.Array:
    """The rows of all results."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

"""The convolution nearest to a matrix: of a known geometry by projection, of an unknown one by detection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.adjoint import sums_over_outputs
from jaxconv_fc.arguments import as_array
from jaxconv_fc.axis import Axis
from jaxconv_fc.dense import matrix_rows
from jaxconv_fc.numerics import host_unit_scale, largest_part, root, scale_exponent, squares, to_unit_scale
from jaxconv_fc.sharding import is_traced, program
from jaxconv_fc.spec import ConvSpec, as_operand, conv_spec


def kernel_from_matrix(spec: ConvSpec, matrix: Any) -> jax.Array:
    """The kernel whose matrix is nearest to ``matrix`` in the Frobenius norm: ``(G^+ x ...) L^T(A)``.

    The orthogonal projection onto the convolutions of this geometry, through the Gram matrix
    ``G_a[p, p'] = #{o : t(o, p) = t(o, p')}`` of each axis (docs/maths.md, section 3). Exact on the matrix of
    a convolution. A tap that never reads an input cannot be seen in any matrix: it comes back as 0, the
    solution of least norm.

    Args:
      spec: the geometry.
      matrix: array of shape ``spec.shape``; integers are taken as floats.

    Returns:
      Array of shape ``spec.rhs_shape``.

    Raises:
      TypeError: not an array.  ValueError: another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.kernel_from_matrix(spec, fc.as_matrix(spec, jnp.array([[[1., 2.]]]))))
    [[[1. 2.]]]
    """
    matrix = as_operand("matrix", matrix, spec, "shape")
    return _nearest_kernel(spec, _inexact(matrix))


@program
def _nearest_kernel(spec: ConvSpec, matrix: jax.Array) -> jax.Array:
    return _projected(spec, sums_over_outputs(spec, matrix))


def _projected(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """``(G^+ x ...)`` of the sums over outputs."""
    for i, axis in zip(spec.dimension_numbers.rhs_spec[2:], spec.axes, strict=True):
        kernel = _solve_gram(axis, kernel, i)
    return kernel


def _inexact(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.inexact):
        return array
    return array.astype(jax.dtypes.canonicalize_dtype(np.float64))


def _solve_gram(axis: Axis, kernel: jax.Array, i: int) -> jax.Array:
    """The pseudo-inverse of the Gram matrix of one axis, applied along axis ``i`` of the kernel."""
    if not axis.collides:  # diagonal: every tap has entries of its own
        counts = jnp.asarray(axis.tap_counts, kernel.real.dtype)
        counts = jnp.expand_dims(counts, [j for j in range(kernel.ndim) if j != i])
        return jnp.where(counts > 0, kernel / jnp.maximum(counts, 1).astype(kernel.dtype), 0)
    inverse = np.linalg.pinv(axis.gram.astype(float), rcond=1e-12, hermitian=True)
    product = jnp.tensordot(jnp.asarray(inverse, kernel.dtype), kernel, axes=(1, i), precision="highest")
    return jnp.moveaxis(product, 0, i)


def conv_distance(spec: ConvSpec, matrix: Any) -> jax.Array:
    """``||A - L K*|| / ||A||`` (Frobenius): how far A is from the convolutions of this geometry.

    K* is :func:`kernel_from_matrix`. 0 for a convolution (and for A = 0), 1 for a matrix orthogonal to all
    of them, NaN where A holds NaN or Inf. Independent of the scale of A. The difference is summed row by
    row, so no second matrix is made.

    Args:
      spec: the geometry.
      matrix: array of shape ``spec.shape``; integers are taken as floats.

    Returns:
      Real scalar.

    Raises:
      TypeError: not an array.  ValueError: another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> float(fc.conv_distance(spec, jnp.zeros((3, 4)).at[0, 3].set(1.)))
    1.0
    """
    matrix = _inexact(as_operand("matrix", matrix, spec, "shape"))
    if not matrix.size:
        return jnp.zeros((), matrix.real.dtype)
    return _conv_distance(spec, matrix)


_BLOCK = 2**20  # entries of M that are made at a time


@program
def _conv_distance(spec: ConvSpec, matrix: jax.Array) -> jax.Array:
    size = min(spec.out_size, max(1, _BLOCK // spec.in_size))
    firsts = lax.iota(spec.index_dtype, -(-spec.out_size // size)) * size

    def block(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(rows, entries)``; the last block overlaps the one before it, with zeros."""
        start = jnp.minimum(first, spec.out_size - size)
        rows = start + lax.iota(start.dtype, size)
        entries = lax.dynamic_slice_in_dim(matrix, start, size)
        return rows, jnp.where((rows >= first)[:, None], entries, jnp.zeros((), matrix.dtype))

    # At unit scale, where not even the smallest difference has a square that vanishes.
    exponent = scale_exponent(lax.map(lambda first: largest_part(block(first)[1]), firsts))
    unit = partial(to_unit_scale, exponent=exponent)
    kernel = _projected(spec, sums_over_outputs(spec, matrix, unit))

    def sums(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, entries = block(first)
        entries, nearest = unit(entries), matrix_rows(spec, kernel, rows)
        difference = jnp.where((rows >= first)[:, None], entries - nearest, jnp.zeros((), matrix.dtype))
        return _sum_of_squares(difference), _sum_of_squares(entries)

    off, total = (s.sum() for s in lax.map(sums, firsts))
    # Only a matrix of zeros has no length, and is a convolution.
    return root(off / jnp.where(total == 0, jnp.ones_like(total), total)).astype(matrix.real.dtype)


def _sum_of_squares(values: jax.Array) -> jax.Array:
    """At least in float32, so that sums of many do not overflow half precision."""
    return squares(values.astype(np.promote_types(values.dtype, np.float32))).sum()


# -- the convolution in a matrix ---------------------------------------------------------------


def detect_conv(
    matrix: Any, in_shape: Sequence[int], out_shape: Sequence[int], *, tol: float | None = None
) -> tuple[ConvSpec, jax.Array] | None:
    """The zero-padded convolution that a matrix secretly is, or None.

    :func:`nearest_conv`, where its distance is at most ``tol``. That function says how far a matrix is from
    a convolution.

    Args:
      matrix: concrete array of shape ``(prod(out_shape), prod(in_shape))``.
      in_shape, out_shape: ``(channels, spatial...)`` of an input and an output.
      tol: largest relative distance, and largest relative difference of entries that count as equal;
        by default a small multiple of the rounding of the dtype.

    Returns:
      ``(spec, kernel)`` with ``as_matrix(spec, kernel)`` equal to the matrix within ``tol``, or None.

    Raises:
      TypeError: the matrix is not an array, or traced.
      ValueError: it has another shape, or holds NaN or Inf, which say nothing about a geometry.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> matrix = jnp.array([[1., 2., 0., 0.], [0., 0., 1., 2.]])
    >>> spec, kernel = fc.detect_conv(matrix, (1, 4), (1, 2))
    >>> print(spec.window_strides, kernel)
    (2,) [[[1. 2.]]]
    >>> fc.detect_conv(jnp.ones((3, 4)).at[0, 0].set(2.), (1, 4), (1, 3)) is None
    True
    """
    host, tol = _host_matrix(matrix, in_shape, out_shape, tol)
    views = _axis_views(host, in_shape, out_shape)
    axes = [_detect_axis(view, tol) for view in views]
    # What is not constant along one axis is no convolution, and need not be projected to see it.
    if any(_axis_distance(view, axis) > 2 * tol for view, axis in zip(views, axes, strict=True)):
        return None
    spec, kernel, distance = _nearest(host, in_shape, out_shape, axes, tol)
    return (spec, kernel) if distance <= tol else None


def nearest_conv(
    matrix: Any, in_shape: Sequence[int], out_shape: Sequence[int], *, tol: float | None = None
) -> tuple[ConvSpec, jax.Array, float]:
    """``(spec, kernel, distance)``: a geometry that suits a matrix, its nearest kernel, how far off it is.

    In zeros mode the entries of M depend, per axis, on ``q = t*l - o*s`` only. Of the pairs (s, l)
    without common factor for which that holds, the one with the fewest taps is kept (the one that
    violates it least, where it holds for none); the gaps between the values of q with nonzero entries
    give the dilation, their range padding and taps (docs/maths.md, section 3). Groups are the finest block
    diagonal.

    What the matrix cannot tell is chosen smallest: taps that are 0 at the border of the kernel or never
    meet an input are left off. A sparse matrix can be a convolution in which no two outputs share a tap (a
    diagonal one is, of stride n): the size of the kernel tells.

    Args, Raises:
      As :func:`detect_conv`. The matrix is inspected on the host: it cannot be traced.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec, kernel, distance = fc.nearest_conv(jnp.ones((3, 4)).at[0, 0].set(2.), (1, 4), (1, 3))
    >>> round(distance, 3)
    0.211
    """
    host, tol = _host_matrix(matrix, in_shape, out_shape, tol)
    axes = [_detect_axis(view, tol) for view in _axis_views(host, in_shape, out_shape)]
    return _nearest(host, in_shape, out_shape, axes, tol)


def _host_matrix(
    matrix: Any, in_shape: Sequence[int], out_shape: Sequence[int], tol: float | None
) -> tuple[np.ndarray, float]:
    if len(in_shape) != len(out_shape) or not in_shape:
        raise ValueError(
            f"in_shape and out_shape must be (channels, spatial...) of the same rank, got {tuple(in_shape)} "
            f"and {tuple(out_shape)}. Write a missing spatial axis as 1."
        )
    if is_traced(matrix):
        raise TypeError(
            "matrix must be concrete: its values decide the geometry. Call outside of jit and vmap."
        )
    array, sizes = _inexact(as_array("matrix", matrix)), (math.prod(out_shape), math.prod(in_shape))
    if array.shape != sizes:
        raise ValueError(
            f"matrix must have the shape {sizes}, the sizes of out_shape and in_shape, got {array.shape}."
        )
    finite = np.isfinite(np.asarray(array))
    if not finite.all():
        raise ValueError(
            f"matrix must hold finite numbers, got {finite.size - finite.sum()} NaN or Inf: they say nothing "
            "about the geometry. Replace them, e.g. by jnp.nan_to_num(matrix)."
        )
    return np.asarray(array), 64 * float(jnp.finfo(array.dtype).eps) if tol is None else tol


def _tensor(matrix: np.ndarray, in_shape: Sequence[int], out_shape: Sequence[int]) -> np.ndarray:
    wide = matrix.astype(np.complex128 if matrix.dtype.kind == "c" else np.float64)
    return host_unit_scale(wide).reshape(*out_shape, *in_shape)


def _axis_views(matrix: np.ndarray, in_shape: Sequence[int], out_shape: Sequence[int]) -> list[np.ndarray]:
    """Per spatial axis, M as (outputs, inputs, everything else)."""
    tensor, d = _tensor(matrix, in_shape, out_shape), len(in_shape) - 1
    return [np.moveaxis(tensor, (1 + a, 2 + d + a), (0, 1)) for a in range(d)]


def _nearest(
    matrix: np.ndarray, in_shape: Sequence[int], out_shape: Sequence[int], axes: Sequence[Axis], tol: float
) -> tuple[ConvSpec, jax.Array, float]:
    groups = _detect_groups(np.moveaxis(_tensor(matrix, in_shape, out_shape), len(in_shape), 1), tol)
    spec = conv_spec(
        (1, *in_shape),
        (out_shape[0], in_shape[0] // groups, *(a.taps for a in axes)),
        [a.stride for a in axes],
        [(a.lo, a.hi) for a in axes],
        [a.lhs_dilation for a in axes],
        [a.rhs_dilation for a in axes],
        feature_group_count=groups,
    )
    array = jnp.asarray(matrix)
    return spec, kernel_from_matrix(spec, array), float(conv_distance(spec, array))


def _detect_axis(tensor: np.ndarray, tol: float) -> Axis:
    """The relation of one axis from M as (outputs, inputs, everything else)."""
    m, n = tensor.shape[:2]
    weights = np.random.default_rng(0).standard_normal((math.prod(tensor.shape[2:]), 8))
    sketch = tensor.reshape(m, n, -1) @ weights  # equal entries have equal sketches, others surely not
    scale = np.abs(sketch).max(initial=0)
    used = np.abs(sketch).max(-1, initial=0) > tol * scale
    return _fitting(used, *_most_constant(sketch, 8 * tol * scale, *_step_pairs(used)))


def _step_pairs(used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(s, l)``: the pairs of steps that a matrix with these used entries may have: by the number of taps
    that they need, then by s + l, then by s.

    Taps are ``(max q - min q) / r + 1`` over the used ``q = t*l - o*s``. The corners of their convex hull
    tell the range. The differences of used positions are a lattice, of which two vectors tell r, the
    greatest common divisor of the differences of q.
    """
    m, n = used.shape
    s, l = (v.ravel() for v in np.meshgrid(np.arange(1, max(n, 1) + 1), np.arange(1, max(m, 1) + 1)))
    coprime = np.gcd(s, l) == 1
    s, l = s[coprime], l[coprime]
    corners, basis = _corners(used), _difference_basis(used)
    q = [t * l - o * s for o, t in corners] or [np.zeros_like(s)]
    low, high = reduce(np.minimum, q), reduce(np.maximum, q)
    r = reduce(np.gcd, [np.abs(t * l - o * s) for o, t in basis], np.zeros_like(s))
    taps = (high - low) // np.maximum(r, 1) + 1
    # Where no tap is shared, anything is a convolution: accept it only without an unused tap.
    shares = ((s < n) & (l < m)) | (min(m, n) <= 1) | ((taps <= used.sum()) & (used.sum() < used.size))
    s, l, taps = s[shares], l[shares], taps[shares]
    order = np.lexsort((s, s + l, taps))
    return s[order], l[order]


def _corners(used: np.ndarray) -> list[tuple[int, int]]:
    """Used positions (o, t) among which every linear function of o and t has its extremes.

    They are on the convex hull, so first or last of their row. Of those, a chain keeps the ones where it
    turns one way (Andrew 1979).
    """
    rows = np.flatnonzero(used.any(1)).tolist()
    corners = []
    for side, turn in ((used.argmax(1), 1), (used.shape[1] - 1 - used[:, ::-1].argmax(1), -1)):
        chain: list[tuple[int, int]] = []
        for o, t in zip(rows, side[rows].tolist(), strict=True):
            while len(chain) > 1 and turn * _turns(chain[-2], chain[-1], (o, t)) <= 0:
                chain.pop()
            chain.append((o, t))
        corners += chain
    return corners


def _turns(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> int:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _difference_basis(used: np.ndarray) -> list[tuple[int, int]]:
    """Two vectors (o, t) whose whole multiples add up to the differences of all used positions.

    The first has the greatest common divisor of all o, by Euclid's algorithm; what is left of every
    difference has o = 0.
    """
    o, t = (v - v[:1] for v in np.nonzero(used))
    divisor, along = 0, 0
    for step, move in np.unique(np.stack([o, t], 1)[np.searchsorted(o, np.unique(o))], axis=0).tolist():
        a, b = (divisor, along), (step, move)
        while b[0]:
            quotient = a[0] // b[0]
            a, b = b, (a[0] - quotient * b[0], a[1] - quotient * b[1])
        divisor, along = a
    rest = t - o // divisor * along if divisor else t
    return [(divisor, along), (0, int(np.gcd.reduce(rest, initial=0)))]


def _most_constant(sketch: np.ndarray, slack: float, s: np.ndarray, l: np.ndarray) -> tuple[int, int]:
    """The first of the pairs (s, l) for which entries differ least from those l outputs and s inputs on.

    Differences up to ``slack`` count as none. A pair is compared in full only when nothing known speaks
    against it more than against the others. The entry where it fails most is then compared for all pairs
    at once, which spares most of them the full comparison.
    """
    least = np.zeros(sketch.shape[:2])  # [l - 1, s - 1]: the error of a pair is this or more
    exact = np.zeros(sketch.shape[:2], bool)
    while True:
        best = int(np.argmin(np.maximum(least[l - 1, s - 1] - slack, 0)))
        step, dilation = int(s[best]), int(l[best])
        if exact[dilation - 1, step - 1]:
            return step, dilation
        there = sketch[dilation:, step:]
        here = sketch[: there.shape[0], : there.shape[1]]
        error = np.abs(there - here).max(-1, initial=0)
        exact[dilation - 1, step - 1] = True
        if error.size:
            least[dilation - 1, step - 1] = error.max()
            o, t = (int(v) for v in np.unravel_index(np.argmax(error), error.shape))
            size_here, size_there = (np.abs(v[o, t]).max() for v in (here, there))
            at = (o, t) if size_here >= size_there else (o + dilation, t + step)
            _compare(sketch, least, *at)


def _compare(sketch: np.ndarray, least: np.ndarray, o: int, t: int) -> None:
    """Raise ``least`` to how much one entry differs from those any l and s further on, and before it."""
    for there, here in ((sketch[o:, t:], sketch[o, t]), (sketch[o::-1, t::-1], sketch[o, t])):
        error = np.abs(there[1:, 1:] - here).max(-1, initial=0)
        part = least[: error.shape[0], : error.shape[1]]
        np.maximum(part, error, out=part)


def _axis_distance(tensor: np.ndarray, axis: Axis) -> float:
    """How far M as (outputs, inputs, everything else) is from depending on ``q = t*l - o*s`` alone, relative
    to its norm: no convolution with this axis is nearer."""
    m, n = tensor.shape[:2]
    o, t = np.indices((m, n)).reshape(2, -1)
    q = t * axis.lhs_dilation - o * axis.stride
    order = np.argsort(q, kind="stable")
    starts = np.flatnonzero(np.diff(q[order], prepend=q.min(initial=0) - 1))
    size = np.abs(tensor).max(initial=0)
    if not size:
        return 0.0
    values = tensor.reshape(m * n, -1)[order] / size
    counts = np.diff(np.append(starts, m * n))
    means = np.add.reduceat(values, starts, axis=0) / counts[:, None]
    return float(np.linalg.norm(values - np.repeat(means, counts, axis=0)) / np.linalg.norm(values))


def _fitting(used: np.ndarray, s: int, l: int) -> Axis:
    """The axis of stride s and input dilation l whose taps cover the used (output, input) pairs."""
    m, n = used.shape
    o, t = np.nonzero(used)
    q = np.unique(t * l - o * s)
    if not q.size:
        return Axis(n, 1, s, lhs_dilation=l).ending_at(m)
    r = max(1, int(np.gcd.reduce(np.diff(q), initial=0)))
    return Axis(n, int(q[-1] - q[0]) // r + 1, s, -int(q[0]), lhs_dilation=l, rhs_dilation=r).ending_at(m)


def _detect_groups(tensor: np.ndarray, tol: float) -> int:
    """The largest number of diagonal blocks of M as (out channels, in channels, ...)."""
    size = np.abs(tensor).max(tuple(range(2, tensor.ndim)), initial=0)
    used = size > tol * size.max(initial=0)
    outs, ins = (np.arange(n) for n in used.shape)
    common = math.gcd(*used.shape)
    for groups in (g for g in range(common, 1, -1) if common % g == 0):
        same = (outs // (outs.size // groups))[:, None] == ins // (ins.size // groups)
        if not (used & ~same).any():
            return groups
    return 1

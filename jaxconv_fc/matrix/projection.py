"""The convolution nearest to a matrix, for a known geometry or for one that is read off the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.arguments import Array, as_array, as_ints, resolve_layouts
from jaxconv_fc.geometry.axis import Axis, Ints
from jaxconv_fc.geometry.layout import inverse
from jaxconv_fc.geometry.lines import gram
from jaxconv_fc.geometry.spec import ConvSpec, as_operand, conv_spec
from jaxconv_fc.matrix.dense import matrix_rows, sums_over_outputs
from jaxconv_fc.numerics import (
    host_unit_scale,
    inexact,
    largest_part,
    root,
    scale_exponent,
    squares,
    to_unit_scale,
)
from jaxconv_fc.sharding import is_traced, program


def kernel_from_matrix(spec: ConvSpec, matrix: Array) -> jax.Array:
    """The kernel whose matrix is nearest to ``matrix`` in the Frobenius norm: ``(G^+ x ...) L^T(A)``.

    The orthogonal projection onto the convolutions of this geometry, through the Gram matrix
    ``G_a[p, p'] = #{o : t(o, p) = t(o, p')}`` of each axis (docs/maths.md, section 3). Exact on the matrix of
    a convolution. A tap that reads no input has no entry in M: it comes back as 0, the solution of least
    norm.

    Args:
      spec: the geometry.
      matrix: array of shape ``spec.shape``; integers are taken as floats.

    Returns:
      Array of shape ``spec.rhs_shape``.

    Raises:
      TypeError: the matrix is not an array.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.kernel_from_matrix(spec, fc.as_matrix(spec, jnp.array([[[1., 2.]]]))))
    [[[1. 2.]]]
    """
    matrix = as_operand("matrix", matrix, spec, "shape")
    return _nearest_kernel(spec, inexact(matrix, 16))


@program
def _nearest_kernel(spec: ConvSpec, matrix: jax.Array) -> jax.Array:
    return _divided_by_gram(spec, sums_over_outputs(spec, matrix))


def _divided_by_gram(spec: ConvSpec, sums: jax.Array) -> jax.Array:
    """``K* = (G_1^+ x ... x G_D^+) L^T(A)``, from the sums ``L^T(A)`` over the outputs."""
    for i, axis in zip(spec.dimension_numbers.rhs_spec[2:], spec.axes, strict=True):
        sums = _solve_gram(axis, sums, i)
    return sums


def _solve_gram(axis: Axis, kernel: jax.Array, i: int) -> jax.Array:
    """The pseudo-inverse of the Gram matrix of one axis, applied along axis ``i`` of the kernel."""
    if not axis.collides:  # G is diagonal: no two taps share an entry of M
        counts = jnp.asarray(axis.tap_counts, kernel.real.dtype)
        counts = jnp.expand_dims(counts, [j for j in range(kernel.ndim) if j != i])
        return jnp.where(counts > 0, kernel / jnp.maximum(counts, 1).astype(kernel.dtype), 0)
    inverse = np.linalg.pinv(gram(axis).astype(float), rcond=1e-12, hermitian=True)
    # [p, q] x [..., q, ...] -> [p, ...]
    product = jnp.tensordot(jnp.asarray(inverse, kernel.dtype), kernel, axes=(1, i), precision="highest")
    return jnp.moveaxis(product, 0, i)


def conv_distance(spec: ConvSpec, matrix: Array) -> jax.Array:
    """``||A - L K*|| / ||A||`` (Frobenius): how far A is from the convolutions of this geometry.

    K* is :func:`kernel_from_matrix` (docs/maths.md, sections 3 and 14). The distance is 0 for a convolution
    (and for A = 0), 1 for a matrix orthogonal to all of them, NaN where A holds NaN or Inf, and independent
    of the scale of A. The difference is summed by blocks of rows, so no second matrix is made.

    Args:
      spec: the geometry.
      matrix: array of shape ``spec.shape``; integers are taken as floats.

    Returns:
      Real scalar.

    Raises:
      TypeError: the matrix is not an array.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> float(fc.conv_distance(spec, jnp.zeros((3, 4)).at[0, 3].set(1.)))
    1.0
    """
    matrix = inexact(as_operand("matrix", matrix, spec, "shape"), 16)
    if not matrix.size:
        return jnp.zeros((), matrix.real.dtype)
    return _conv_distance(spec, matrix)


_BLOCK = 2**20  # entries of M that are made at a time


@program
def _conv_distance(spec: ConvSpec, matrix: jax.Array) -> jax.Array:
    size = min(spec.out_size, max(1, _BLOCK // spec.in_size))
    firsts = lax.iota(spec.index_dtype, -(-spec.out_size // size)) * size

    def block(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(rows, entries)``: entries that an earlier block holds too are 0."""
        start = jnp.minimum(first, spec.out_size - size)
        rows = start + lax.iota(start.dtype, size)
        entries = lax.dynamic_slice_in_dim(matrix, start, size)
        return rows, jnp.where((rows >= first)[:, None], entries, jnp.zeros((), matrix.dtype))

    # At unit scale, so that no square of a difference vanishes (docs/maths.md, section 14).
    exponent = scale_exponent(lax.map(lambda first: largest_part(block(first)[1]), firsts))
    unit = partial(to_unit_scale, exponent=exponent)
    kernel = _divided_by_gram(spec, sums_over_outputs(spec, matrix, to_unit_scale, exponent))

    def sums(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, entries = block(first)
        entries, nearest = unit(entries), matrix_rows(spec, kernel, rows)
        difference = jnp.where((rows >= first)[:, None], entries - nearest, jnp.zeros((), matrix.dtype))
        return _sum_of_squares(difference), _sum_of_squares(entries)

    off, total = (s.sum() for s in lax.map(sums, firsts))
    # Only a matrix of zeros has norm 0. It is a convolution.
    return root(off / jnp.where(total == 0, jnp.ones_like(total), total)).astype(matrix.real.dtype)


def _sum_of_squares(values: jax.Array) -> jax.Array:
    """In float32 or wider, so that long sums do not overflow half precision."""
    return squares(values.astype(np.promote_types(values.dtype, np.float32))).sum()


# -- the convolution in a matrix ---------------------------------------------------------------


def detect_conv(
    matrix: Array,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    dimension_numbers: Any = None,
    tol: float | None = None,
) -> tuple[ConvSpec, jax.Array] | None:
    """``(spec, kernel)`` with ``as_matrix(spec, kernel) == matrix``, zero-padded; None if there is none.

    It is what :func:`nearest_conv` finds, where the distance is at most ``tol`` (docs/maths.md, sections 3
    and 14).

    Args:
      matrix: concrete array of shape ``(prod(out_shape), prod(in_shape))``.
      in_shape, out_shape: shapes of an input and an output, without a batch: ``(channels, spatial...)``,
        unless ``dimension_numbers`` says otherwise.
      dimension_numbers: layouts with a batch, as in ``lax.conv_general_dilated``, such as
        ``("NHWC", "HWIO", "NHWC")``. The spec and the kernel that are returned have them.
      tol: largest relative distance, and largest relative difference of entries that count as equal;
        by default 64 times the rounding of the dtype, and 1/64 at most (bfloat16, float16).

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
    given = _on_host(matrix, in_shape, out_shape, dimension_numbers, tol)
    axes = _detect_axes(given)
    # Where no convolution fits along one axis, none fits at all: the matrix need not be projected.
    if any(_axis_distance(v, axis) > 2 * given.tol for v, axis in zip(given.views, axes, strict=True)):
        return None
    spec, kernel, distance = _nearest(given, axes)
    return (spec, kernel) if distance <= given.tol else None


def nearest_conv(
    matrix: Array,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    dimension_numbers: Any = None,
    tol: float | None = None,
) -> tuple[ConvSpec, jax.Array, float]:
    """``(spec, kernel, distance)`` with ``distance = ||A - as_matrix(spec, kernel)|| / ||A||``, read off A.

    In zeros mode the entries of M depend, per axis, on ``q = t*l - o*s`` only (docs/maths.md, section 3). A
    pair (s, l) without common factor fits if that holds. Of those that fit, the one with the fewest taps is
    kept; if none fits, the one with the smallest violation. The q with nonzero entries then give the
    kernel's dilation (their gcd), the padding (their least) and the number of taps (their range). The
    number of groups is the largest for which M is block diagonal.

    Where several geometries have the same matrix, the smallest is chosen: taps that are 0 at the border of
    the kernel, or that read no input, are left off. A sparse matrix can be a convolution in which no two
    outputs share a tap, such as a diagonal one with stride n. The size of its kernel shows this.

    Args:
      matrix: concrete array of shape ``(prod(out_shape), prod(in_shape))``. It is inspected on the host.
      in_shape, out_shape: shapes of an input and an output, as in :func:`detect_conv`.
      dimension_numbers: layouts with a batch, as in :func:`detect_conv`.
      tol: largest relative difference of entries that count as equal; by default as in
        :func:`detect_conv`.

    Returns:
      A :class:`ConvSpec`, a kernel of its ``rhs_shape``, and a Python float.

    Raises:
      TypeError: the matrix is not an array, or traced.
      ValueError: it has another shape, or holds NaN or Inf, which say nothing about a geometry.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec, kernel, distance = fc.nearest_conv(jnp.ones((3, 4)).at[0, 0].set(2.), (1, 4), (1, 3))
    >>> round(distance, 3)
    0.211
    """
    given = _on_host(matrix, in_shape, out_shape, dimension_numbers, tol)
    return _nearest(given, _detect_axes(given))


class _Given(NamedTuple):
    """A matrix whose geometry is asked for, on the host."""

    matrix: np.ndarray  # (prod(out_shape), prod(in_shape)), finite
    lhs_shape: tuple[int, ...]  # of a batch of one example
    numbers: lax.ConvDimensionNumbers  # the layouts
    tol: float  # relative to the largest entry, or to the norm
    views: list[np.ndarray]  # per spatial axis: M as (outputs, inputs, all other dimensions...)
    channels: np.ndarray  # M as (out channels, in channels, all other dimensions...)


def _on_host(
    matrix: Array, in_shape: Sequence[int], out_shape: Sequence[int], layouts: Any, tol: float | None
) -> _Given:
    in_shape, out_shape = as_ints("in_shape", in_shape, least=0), as_ints("out_shape", out_shape, least=0)
    if len(in_shape) != len(out_shape) or not in_shape:
        raise ValueError(
            f"in_shape and out_shape must be (channels, spatial...) of the same rank, got {in_shape} "
            f"and {out_shape}. Write a missing spatial axis as 1."
        )
    if is_traced(matrix):
        raise TypeError(
            "matrix must be concrete: its values decide the geometry. Call outside of jit and vmap."
        )
    array, sizes = inexact(as_array("matrix", matrix), 16), (math.prod(out_shape), math.prod(in_shape))
    if array.shape != sizes:
        raise ValueError(
            f"matrix must have the shape {sizes}, the sizes of out_shape and in_shape, got {array.shape}."
        )
    host = np.asarray(array)
    finite = np.isfinite(host)
    if not finite.all():
        raise ValueError(
            f"matrix must hold finite numbers, got {finite.size - finite.sum()} NaN or Inf: they say nothing "
            "about the geometry. Replace them, e.g. by jnp.nan_to_num(matrix)."
        )
    tol = min(64 * float(jnp.finfo(array.dtype).eps), 1 / 64) if tol is None else tol
    wide = host_unit_scale(host.astype(np.complex128 if host.dtype.kind == "c" else np.float64))
    tensor, rank = wide.reshape(*out_shape, *in_shape), len(in_shape)
    numbers = resolve_layouts(layouts, rank + 1)
    # Channels first, then each spatial axis: its place among the outputs, and among the inputs.
    pairs = zip(_unbatched(numbers.out_spec), _unbatched(numbers.lhs_spec), strict=True)
    views = [np.moveaxis(tensor, (o, rank + t), (0, 1)) for o, t in pairs]
    batch = numbers.lhs_spec[0]
    return _Given(host, (*in_shape[:batch], 1, *in_shape[batch:]), numbers, tol, views[1:], views[0])


def _unbatched(order: Sequence[int]) -> list[int]:
    """The places of (channels, spatial...) in an array without the batch."""
    batch, *others = order
    return [place - (place > batch) for place in others]


def _nearest(given: _Given, axes: Sequence[Axis]) -> tuple[ConvSpec, jax.Array, float]:
    groups = _detect_groups(given.channels, given.tol)
    outs, ins = given.channels.shape[:2]
    kernel = outs, ins // groups, *(a.taps for a in axes)
    spec = conv_spec(
        given.lhs_shape,
        [kernel[i] for i in inverse(given.numbers.rhs_spec)],
        [a.stride for a in axes],
        [(a.lo, a.hi) for a in axes],
        [a.lhs_dilation for a in axes],
        [a.rhs_dilation for a in axes],
        given.numbers,
        groups,
    )
    array = jnp.asarray(given.matrix)
    return spec, kernel_from_matrix(spec, array), float(conv_distance(spec, array))


def _detect_axes(given: _Given) -> list[Axis]:
    """The relation of each spatial axis."""
    axes = []
    for view in given.views:
        m, n = view.shape[:2]
        # Eight random sums over the other dimensions: where entries differ, so do their sums.
        weights = np.random.default_rng(0).standard_normal((math.prod(view.shape[2:]), 8))
        sketch = view.reshape(m, n, -1) @ weights  # (outputs, inputs, 8)
        size = np.abs(sketch).max(-1, initial=0)
        used = size > given.tol * size.max(initial=0)
        steps = _most_constant(sketch, 8 * given.tol * size.max(initial=0), *_candidates(used))
        axes.append(_fitted(used, *steps))
    return axes


class _Pair(NamedTuple):
    """An output and an input position, or the difference of two such pairs."""

    o: int
    t: int


def _q(o: Ints, t: Ints, s: Ints, l: Ints) -> Ints:
    return t * l - o * s


def _candidates(used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(s, l)``: the steps that a matrix with these used entries may have, sorted by the number of taps
    that they need, then by s + l, then by s.

    Taps are ``(max q - min q) / r + 1`` over the used pairs. The extremes of q are at corners of the convex
    hull of the used pairs. The dilation r is the gcd of the differences of q, so of those of two vectors that
    span the differences of the used pairs.
    """
    m, n = used.shape
    s, l = (v.ravel() for v in np.meshgrid(np.arange(1, max(n, 1) + 1), np.arange(1, max(m, 1) + 1)))
    coprime = np.gcd(s, l) == 1
    s, l = s[coprime], l[coprime]
    q = [_q(*pair, s, l) for pair in _corners(used)] or [np.zeros_like(s)]
    r = reduce(np.gcd, [np.abs(_q(*pair, s, l)) for pair in _difference_basis(used)])
    taps = (reduce(np.maximum, q) - reduce(np.minimum, q)) // np.maximum(r, 1) + 1
    # Steps beyond the matrix share no tap, so every matrix fits them: allowed only if all taps are used.
    shares = ((s < n) & (l < m)) | (min(m, n) <= 1) | ((taps <= used.sum()) & (used.sum() < used.size))
    order = np.lexsort((s[shares], (s + l)[shares], taps[shares]))
    return s[shares][order], l[shares][order]


def _corners(used: np.ndarray) -> list[_Pair]:
    """Used pairs among which every linear function of o and t has its extremes.

    They are on the convex hull, so first or last of their row. Of those, a chain keeps the ones where it
    turns one way (Andrew 1979).
    """
    rows = np.flatnonzero(used.any(1)).tolist()
    corners = []
    for side, turn in ((used.argmax(1), 1), (used.shape[1] - 1 - used[:, ::-1].argmax(1), -1)):
        chain: list[_Pair] = []
        for pair in map(_Pair, rows, side[rows].tolist()):
            while len(chain) > 1 and turn * _turn(chain[-2], chain[-1], pair) <= 0:
                chain.pop()
            chain.append(pair)
        corners += chain
    return corners


def _turn(a: _Pair, b: _Pair, c: _Pair) -> int:
    """Positive for a left turn at b on the way from a to c, negative for a right turn."""
    return (b.o - a.o) * (c.t - a.t) - (b.t - a.t) * (c.o - a.o)


def _difference_basis(used: np.ndarray) -> tuple[_Pair, _Pair]:
    """Two vectors whose whole multiples add up to the differences of all used pairs.

    The first has the gcd of all differences in o, by Euclid's algorithm. What it leaves of every difference
    has o = 0, and the second has the gcd of these rests.
    """
    o, t = (v - v[:1] for v in np.nonzero(used))  # differences from the first used pair
    first = _Pair(0, 0)
    for o2, t2 in np.unique(np.stack([o, t], 1)[np.searchsorted(o, np.unique(o))], axis=0).tolist():
        other = _Pair(o2, t2)
        while other.o:
            quotient = first.o // other.o
            first, other = other, _Pair(first.o - quotient * other.o, first.t - quotient * other.t)
    rest = t - o // first.o * first.t if first.o else t
    return first, _Pair(0, int(np.gcd.reduce(rest, initial=0)))


def _most_constant(sketch: np.ndarray, slack: float, s: np.ndarray, l: np.ndarray) -> tuple[int, int]:
    """The first of the steps (s, l) with the least difference of entries l outputs and s inputs apart.

    Differences up to ``slack`` count as 0. Each round compares one candidate in full: the first whose known
    differences are the least. The entry where it differs most is then compared at all steps at once, these
    included, which rules out most other candidates.
    """
    least = np.zeros(sketch.shape[:2])  # [l - 1, s - 1]: lower bounds on the differences
    exact = np.zeros(sketch.shape[:2], bool)  # [l - 1, s - 1]: whether a bound is the difference
    while True:
        best = int(np.argmin(np.maximum(least[l - 1, s - 1] - slack, 0)))
        stride, dilation = int(s[best]), int(l[best])
        if exact[dilation - 1, stride - 1]:
            return stride, dilation
        there = sketch[dilation:, stride:]
        here = sketch[: there.shape[0], : there.shape[1]]
        error = np.abs(there - here).max(-1, initial=0)
        exact[dilation - 1, stride - 1] = True
        if error.size:
            o, t = (int(v) for v in np.unravel_index(np.argmax(error), error.shape))
            size_here, size_there = (np.abs(v[o, t]).max() for v in (here, there))
            at = (o, t) if size_here >= size_there else (o + dilation, t + stride)
            _raise_bounds(sketch, least, *at)


def _raise_bounds(sketch: np.ndarray, least: np.ndarray, o: int, t: int) -> None:
    """Raise the bounds to the differences of entry (o, t) from those l outputs and s inputs away."""
    for there, here in ((sketch[o:, t:], sketch[o, t]), (sketch[o::-1, t::-1], sketch[o, t])):
        error = np.abs(there[1:, 1:] - here).max(-1, initial=0)
        part = least[: error.shape[0], : error.shape[1]]
        np.maximum(part, error, out=part)


def _axis_distance(view: np.ndarray, axis: Axis) -> float:
    """The relative distance of M as (outputs, inputs, all other dimensions...) from the matrices that depend
    on ``q = t*l - o*s`` alone: a lower bound on the distance from the convolutions with this axis."""
    m, n = view.shape[:2]
    o, t = np.indices((m, n)).reshape(2, -1)
    q = _q(o, t, axis.stride, axis.lhs_dilation)
    order = np.argsort(q, kind="stable")
    starts = np.flatnonzero(np.diff(q[order], prepend=q.min(initial=0) - 1))
    size = np.abs(view).max(initial=0)
    if not size:
        return 0.0
    values = view.reshape(m * n, -1)[order] / size
    counts = np.diff(np.append(starts, m * n))
    means = np.add.reduceat(values, starts, axis=0) / counts[:, None]  # one row per value of q
    return float(np.linalg.norm(values - np.repeat(means, counts, axis=0)) / np.linalg.norm(values))


def _fitted(used: np.ndarray, s: int, l: int) -> Axis:
    """The axis of stride s and input dilation l whose taps cover the used pairs: ``p*r - lo == q``."""
    m, n = used.shape
    o, t = np.nonzero(used)
    q = np.unique(_q(o, t, s, l))
    if not q.size:
        return Axis(n, 1, s, lhs_dilation=l).ending_at(m)
    r = max(1, int(np.gcd.reduce(np.diff(q), initial=0)))
    return Axis(n, int(q[-1] - q[0]) // r + 1, s, -int(q[0]), lhs_dilation=l, rhs_dilation=r).ending_at(m)


def _detect_groups(channels: np.ndarray, tol: float) -> int:
    """The largest number of diagonal blocks of M as (out channels, in channels, all other dimensions...)."""
    size = np.abs(channels).max(tuple(range(2, channels.ndim)), initial=0)
    used = size > tol * size.max(initial=0)
    outs, ins = (np.arange(n) for n in used.shape)
    common = math.gcd(*used.shape)
    for groups in (g for g in range(common, 1, -1) if common % g == 0):
        same = (outs // (outs.size // groups))[:, None] == ins // (ins.size // groups)
        if not (used & ~same).any():
            return groups
    return 1

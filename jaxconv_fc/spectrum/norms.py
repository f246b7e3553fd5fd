"""Norms, trace and distance from orthogonality of M, in closed form and exact: M is never built.

A *line* is a row or a column. Lines that use the same taps are of one *kind*, and an axis has few kinds. The
kernel is contracted with the kinds of lines, of entries or of pairs of lines on every axis (docs/maths.md,
section 10). Taps that meet in an entry of M (boundary modes) are added before absolute values are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.layout import by_group, grid, in_channel, out_first, split_column, split_row, taps
from jaxconv_fc.geometry.lines import input_lines, output_lines
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.numerics import homogeneous, largest, root, squares, summed, times_power_of_two, unit_scale
from jaxconv_fc.sharding import program
from jaxconv_fc.spectrum.kinds import Kinds, Ranges, line_kinds, pair_kinds
from jaxconv_fc.spectrum.operands import as_image, as_inexact

# Labels of einsum. Axis a has the labels TAP + a and OTHER_TAP + a.
GROUP, LINE, OTHER_LINE, SHARED = range(4)
TAP, OTHER_TAP = 10, 30


def frobenius_norm(spec: ConvSpec, kernel: Array) -> jax.Array:
    """``||M||_F = sqrt(sum of |M[i, j]|**2)``, the root of the sum of all squared singular values.

    In zeros mode ``sqrt(sum over p of count(p) * |kernel[..., p]|**2)``, where every kernel entry of tap
    ``p`` stands in M ``count(p)`` times. In the other modes the sum is over sets of taps that meet in an
    entry, with the sum of their kernel entries (docs/maths.md, section 3).

    Exact up to rounding, for every geometry; differentiable (with gradient 0 where M = 0).
    Cost: one pass over the kernel.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.

    Returns:
      A real scalar.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 2), (1,), "VALID")
    >>> print(fc.spectrum.frobenius_norm(spec, jnp.array([[[0., 2.]]])))  # 2 stands in M four times
    4.0
    """
    return _frobenius_norm(spec, as_inexact(spec, kernel))


@program
def _frobenius_norm(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    kinds = [line_kinds(axis, True).entries if axis.collides else None for axis in spec.axes]
    counts = [k.count if k else axis.tap_counts for k, axis in zip(kinds, spec.axes, strict=True)]

    def norm(kernel: jax.Array) -> jax.Array:
        entries = _contract(by_group(spec, kernel), kinds, 3)  # [g, d, i, taps or kinds of entries...]
        # Scaled a second time: where taps meet they may cancel, and M is much smaller than the kernel.
        return homogeneous(lambda values: root(_weighted_sum(squares(values), counts)), (1,), entries)

    return homogeneous(norm, (1,), kernel)


def one_norm(spec: ConvSpec, kernel: Array) -> jax.Array:
    """``||M||_1``: the largest column sum of ``|M|``, the operator norm of the 1-norm.

    Exact, for every geometry, and differentiable. Cost: the kernel and the kinds of columns, of which there
    are a handful, or as many as taps where the kernel is as long as the image (docs/maths.md, section 10).

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.

    Returns:
      A real scalar of at least 32 bits. For integers it has the default integer dtype, and is exact, if that
      holds every such sum of the kernel's dtype; else the default floating dtype.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.spectrum.one_norm(spec, jnp.array([[[1., -2.]]])))
    3.0
    """
    return _largest_sum(spec, as_inexact(spec, kernel, partial(_terms, rows=False)), False)


def inf_norm(spec: ConvSpec, kernel: Array) -> jax.Array:
    """``||M||_inf``: the largest row sum of ``|M|``, the operator norm of the maximum norm.

    It is how far an output can move if no input moves by more than 1. Exact, for every geometry, and
    differentiable. Cost: as :func:`one_norm`.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.

    Returns:
      A real scalar of at least 32 bits. For integers it has the default integer dtype, and is exact, if that
      holds every such sum of the kernel's dtype; else the default floating dtype.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 3), (2,), [(1, 1)], padding_mode="edge")
    >>> print(fc.spectrum.inf_norm(spec, jnp.array([[[1., -2., 1.]]])))  # |1-2| + |1|, |1| + |-2| + |1|
    4.0
    """
    return _largest_sum(spec, as_inexact(spec, kernel, partial(_terms, rows=True)), True)


@partial(program, static_argnums=2)
def _largest_sum(spec: ConvSpec, kernel: jax.Array, rows: bool) -> jax.Array:
    return _at_unit_scale(lambda k: largest(_line_sums(spec, k, 1, rows)), kernel)


def _at_unit_scale(of: Callable[[jax.Array], jax.Array], kernel: jax.Array) -> jax.Array:
    """``of(kernel)``, for ``of`` homogeneous of degree 1. Inexact kernels are scaled, so that no partial sum
    overflows; integers are not."""
    return homogeneous(of, (1,), kernel) if jnp.issubdtype(kernel.dtype, jnp.inexact) else of(kernel)


def row_norms(spec: ConvSpec, kernel: Array, *, ord: int = 2) -> jax.Array:
    """Norm of every row of M: ``sqrt(sum over j of |M[i, j]|**2)``, or ``sum over j of |M[i, j]|``.

    ``ord`` is 2 or 1. The norm of row i is the largest ``|(M x)[i]|`` over all x of Euclidean norm 1, or over
    all x with entries up to 1 in magnitude. Exact, for every geometry, differentiable. Cost: the kernel and
    the kinds of rows, then one lookup per row (docs/maths.md, section 10).

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      ord: 2 or 1.

    Returns:
      Real array of shape ``(spec.out_size,)``, in a floating dtype; with ``ord=1`` as :func:`inf_norm`.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape, or ord is not 1 or 2.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), [(0, 1)])
    >>> print(fc.spectrum.row_norms(spec, jnp.array([[[3., 4.]]])))
    [5. 5. 3.]
    """
    return _line_norms(spec, kernel, ord, True)


def column_norms(spec: ConvSpec, kernel: Array, *, ord: int = 2) -> jax.Array:
    """Norm of every column of M: ``sqrt(sum over i of |M[i, j]|**2)``, or ``sum over i of |M[i, j]|``.

    Each is the norm of the output when one input neuron is 1 and all others are 0. Cost: the kernel and the
    kinds of columns, then one lookup per column.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      ord: 2 or 1.

    Returns:
      Real array of shape ``(spec.in_size,)``, in a floating dtype; with ``ord=1`` as :func:`one_norm`.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape, or ord is not 1 or 2.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), "VALID")
    >>> print(fc.spectrum.column_norms(spec, jnp.array([[[3., 4.]]])))
    [3. 5. 4.]
    """
    return _line_norms(spec, kernel, ord, False)


def _line_norms(spec: ConvSpec, kernel: Array, ord: int, rows: bool) -> jax.Array:
    if ord not in (1, 2):
        raise ValueError(f"ord must be 1 (sum of absolute values) or 2 (Euclidean), got {ord!r}.")
    terms = partial(_terms, rows=rows) if ord == 1 else None
    return _every_line(spec, as_inexact(spec, kernel, terms), ord, rows)


@partial(program, static_argnums=(2, 3))
def _every_line(spec: ConvSpec, kernel: jax.Array, ord: int, rows: bool) -> jax.Array:
    if ord == 1:
        norms = _at_unit_scale(partial(_line_sums, spec, power=1, rows=rows), kernel)
    else:
        norms = homogeneous(lambda k: root(_line_sums(spec, k, 2, rows)), (1,), kernel)
    for a, axis in enumerate(spec.axes):  # [group, channel, samples...] -> [group, channel, positions...]
        lines = output_lines(axis) if rows else input_lines(axis)
        sample = lines.sample_of(lax.iota(spec.index_dtype, lines.size), jnp.where)
        norms = jnp.take(norms, sample, axis=2 + a, mode="clip")
    # [group, channel, positions...] -> [positions..., group, channel] -> out_shape or in_shape
    return as_image(spec, jnp.moveaxis(norms, (0, 1), (-2, -1)), output=rows).ravel()


def trace(spec: ConvSpec, kernel: Array) -> jax.Array:
    """``sum of M[i, i]`` over ``i < min(M.shape)``.

    Entry ``(i, i)`` relates output neuron ``i`` with input neuron ``i``, whatever the two layouts are.
    Exact, linear in the kernel. Cost: ``min(M.shape)``, in boundary modes times the number of taps.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.

    Returns:
      A scalar of at least 32 bits, for integers of the dtype that :func:`one_norm` has.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 3), (1,), "SAME")
    >>> print(fc.spectrum.trace(spec, jnp.array([[[1, 5, 2]]], jnp.int8)))
    20
    """
    return _trace(spec, as_inexact(spec, kernel, _terms_of_trace))


def _terms_of_trace(spec: ConvSpec) -> int:
    """A bound on the number of kernel entries that are added: in zeros mode one tap per entry of M."""
    return min(spec.shape) * math.prod(min(axis.taps, axis.copies) for axis in spec.axes)


@program
def _trace(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    return _at_unit_scale(partial(_sum_of_diagonal, spec), kernel)


def _sum_of_diagonal(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    if not min(spec.shape):
        return jnp.zeros((), kernel.dtype)
    # n: [neuron, 1, ...] and, per axis, p: [1, ..., tap, ..., 1]. Everything below broadcasts over both. In
    # zeros mode two positions have one tap at most.
    shape = (min(spec.shape), *(1 if axis.pads_with_zeros else axis.taps for axis in spec.axes))
    check_array("trace: pairs of a neuron and a tap", shape, spec.index_dtype, "a smaller kernel")
    n, *tap = grid(shape, spec.index_dtype)
    (outputs, d), (inputs, c) = split_row(spec, n), split_column(spec, n)
    i = c - in_channel(spec, d, 0)  # the input channel within the group of d
    meets = (i >= 0) & (i < spec.group_channels)
    for a, (axis, o, t) in enumerate(zip(spec.axes, outputs, inputs, strict=True)):
        if axis.pads_with_zeros:
            tap[a], valid = axis.tap_of(o, t)
        else:
            read, valid = axis.input_of(o, tap[a])
            valid &= read == t
        meets = meets & valid
    entries = out_first(spec, kernel).at[(d, i, *tap)].get(mode="clip")
    return summed(jnp.where(meets, entries, jnp.zeros((), kernel.dtype)))


def orthogonality_residual(spec: ConvSpec, kernel: Array) -> jax.Array:
    """``||M M^H - I||_F``, or ``||M^H M - I||_F`` where M has more rows than columns.

    It is 0 exactly where the rows, or the columns, of M are orthonormal.

    An entry of ``M M^H`` is a sum of ``R[d, d', p, p'] = sum_i K[d, i, p] conj(K[d', i, p'])`` over the
    pairs of taps (p, p') through which its two outputs read the same input. Only a few kinds of pairs of
    outputs exist on an axis, so R contracted with the kinds of every axis holds all entries. I is subtracted
    from them before they are squared: for an orthogonal M the result is about eps, not sqrt(eps).

    Exact for every geometry, boundaries included (the usual regularisers hold for interior rows only);
    differentiable, with gradient 0 where the residual is 0.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.

    Returns:
      A real scalar.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape.

    Source: Wang, Chen, Chakraborty & Yu, Orthogonal Convolutional Neural Networks (2020), made exact at
    the boundary; docs/maths.md, section 10. Cost: O(channels**3 * taps**2) operations, whatever the image
    size.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 8), (1, 1, 2), (2,), "VALID")  # M M^T = 4 I, for the 4 x 4 identity I
    >>> print(fc.spectrum.orthogonality_residual(spec, jnp.array([[[2., 0.]]])))
    6.0
    """
    return _orthogonality_residual(spec, as_inexact(spec, kernel))


@program
def _orthogonality_residual(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    rows = spec.out_size <= spec.in_size
    if not min(spec.shape):  # the Gram matrix of the short side is empty
        return jnp.zeros((), kernel.real.dtype)
    # For M = 2**e U it is 2**(2e) ||U U^H - 2**(-2e) I||. A kernel below 1 is not scaled up: beside I, the
    # squares of small entries may underflow.
    exponent = jnp.maximum(unit_scale(kernel)[1], 0)
    kinds = [pair_kinds(axis, rows) for axis in spec.axes]
    gram = _gram_entries(spec, times_power_of_two(kernel, -exponent), kinds, rows)
    # [d = d'] times [o_a = o_a'] of each axis: [d, d', kind_1, kind_2, ...]
    diagonals = (jnp.asarray(kind.diagonal, gram.dtype) for kind in kinds)
    identity = reduce(jnp.multiply.outer, diagonals, jnp.eye(gram.shape[1], dtype=gram.dtype))
    error = gram - times_power_of_two(identity, -2 * exponent)[None]
    counts = [kind.count for kind in kinds]
    norm = homogeneous(lambda values: root(_weighted_sum(squares(values), counts)), (1,), error)
    return times_power_of_two(norm, 2 * exponent)


def _gram_entries(spec: ConvSpec, kernel: jax.Array, kinds: Sequence[Kinds], rows: bool) -> jax.Array:
    """Entries of ``M M^H`` (rows) or of ``conj(M^H M)``, one per kind: ``[g, d, d', kind_1, ...]``."""
    value = by_group(spec, kernel)  # [g, d, i, p_1, ...]
    value = value if rows else jnp.swapaxes(value, 1, 2)  # of columns, i stands for d below, and d for i
    first, second = ([label + a for a in range(len(kinds))] for label in (TAP, OTHER_TAP))
    pairs = [label for both in zip(first, second, strict=True) for label in both]
    shape = (*value.shape[:2], value.shape[1], *(kind.codes for kind in kinds))
    check_array("orthogonality_residual: pairs of taps", shape, value.dtype, "a smaller kernel")
    # R: [g, d, i, p...] [g, d', i, p'...] -> [g, d, d', p_1, p_1', p_2, p_2', ...]
    gram = jnp.einsum(
        *(value, [GROUP, LINE, SHARED, *first], value.conj(), [GROUP, OTHER_LINE, SHARED, *second]),
        [GROUP, LINE, OTHER_LINE, *pairs],
        precision="highest",
    )
    # [g, d, d', (p_1, p_1'), ...] [kind_a, (p_a, p_a')] of each axis -> [g, d, d', kind_1, ...]
    return _contract(gram.reshape(*gram.shape[:3], *(kind.codes for kind in kinds)), kinds, 3)


# -- the kernel contracted with the kinds --------------------------------------------------------


def _line_sums(spec: ConvSpec, kernel: jax.Array, power: int, rows: bool) -> jax.Array:
    """Sums of ``|M|**power`` over the sampled rows or columns: ``[g, channel of the line, samples...]``."""
    kinds = [line_kinds(axis, rows) for axis in spec.axes]
    entries = _contract(by_group(spec, kernel), [k.entries for k in kinds], 3)
    value = jnp.abs(entries) if power == 1 else squares(entries)  # [g, d, i, taps or kinds of entries...]
    return _contract(summed(value, 2 if rows else 1), [k.lines for k in kinds], 2)


def _terms(spec: ConvSpec, rows: bool) -> int:
    """A bound on the number of kernel entries that a row or column sum has."""
    if rows:
        return spec.group_channels * math.prod(taps(spec))
    return spec.out_channels // spec.groups * math.prod(axis.taps * axis.copies for axis in spec.axes)


def _contract(value: jax.Array, kinds: Sequence[Kinds | Ranges | None], first: int) -> jax.Array:
    """``[..., code, ...] -> [..., kind, ...]`` on each axis from ``first`` on that has kinds."""
    for a, kind in enumerate(kinds, start=first):
        value = value if kind is None else kind.sums(value, a)
    return value


def _weighted_sum(value: jax.Array, counts: Sequence[np.ndarray]) -> jax.Array:
    """Sum of ``value[..., k_1, k_2, ...] * counts[0][k_1] * counts[1][k_2] * ...``: a kind counts as often as
    it occurs on its axis."""
    for count in reversed(counts):
        value = jnp.tensordot(value, jnp.asarray(count, value.dtype), 1, precision="highest")
    return value.sum()

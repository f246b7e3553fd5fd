"""Norms, trace and distance from orthogonality of M, in closed form and exact: M is never built.

On one axis only a few *kinds* of rows, columns and entries exist: two outputs whose windows see the
same taps are alike. A kind is a set of taps with the number of times that it occurs, listed on the host
from one line of each that repeat (:class:`Lines`); what holds for M is then one einsum of the kernel with
the kinds of every axis. Taps that meet in an entry of M (boundary modes) are added before absolute values
are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.axis import Axis
from jaxconv_fc.cache import bounded_cache
from jaxconv_fc.layout import by_group, from_canonical, group_of
from jaxconv_fc.lines import Lines, input_lines, output_lines
from jaxconv_fc.numerics import homogeneous, largest, root, squares, times_power_of_two, unit_scale
from jaxconv_fc.sharding import program
from jaxconv_fc.spec import ConvSpec, as_operand

_SMALL = 2**12  # entries of a matrix of kinds that a program may hold


def frobenius_norm(spec: ConvSpec, kernel: Any) -> jax.Array:
    """``||M||_F = sqrt(sum of |M[i, j]|**2)``, the root of the sum of all squared singular values.

    In zeros mode ``sqrt(sum over p of count(p) * |kernel[..., p]|**2)``, where tap ``p`` occurs
    ``count(p)`` times in M; in the other modes sets of taps that meet take the place of taps
    (docs/maths.md, section 3).

    Exact up to rounding, for every geometry; differentiable (with gradient 0 where M = 0).
    Cost: one pass over the kernel.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.

    Returns:
      A real scalar.

    Raises:
      TypeError: the kernel is not an array of numbers.  ValueError: it has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 2), (1,), "VALID")
    >>> print(fc.spectrum.frobenius_norm(spec, jnp.array([[[0., 2.]]])))  # 2 stands in M four times
    4.0
    """
    return _frobenius_norm(spec, as_inexact(spec, kernel))


@program
def _frobenius_norm(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    kinds = [_entries(axis) for axis in spec.axes]
    merged = [k if a.collides else None for k, a in zip(kinds, spec.axes, strict=True)]
    counts = [k.count for k in kinds]

    def norm(kernel: jax.Array) -> jax.Array:
        # Once more at the scale of the entries of M: taps that meet may cancel.
        entries = _merge(by_group(spec, kernel), merged)
        return homogeneous(lambda values: root(_weigh(squares(values), counts)), (1,), entries)

    return homogeneous(norm, (1,), kernel)


def one_norm(spec: ConvSpec, kernel: Any) -> jax.Array:
    """``||M||_1``: the largest column sum of ``|M|``, the gain in the sum of absolute values.

    Exact, for every geometry, and differentiable; integers stay integers. Arguments and errors as in
    :func:`frobenius_norm`. Cost: the kernel times the kinds of columns, of which there are a handful.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.spectrum.one_norm(spec, jnp.array([[[1, -2]]])))
    3
    """
    return _largest_sum(spec, _numbers(spec, kernel), False)


def inf_norm(spec: ConvSpec, kernel: Any) -> jax.Array:
    """``||M||_inf``: the largest row sum of ``|M|``, the gain in the largest absolute value.

    Exact, for every geometry, and differentiable; integers stay integers. Arguments, errors and cost as
    in :func:`one_norm`. The norm of a network under input noise of bounded size per pixel.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 3), (2,), [(1, 1)], padding_mode="edge")
    >>> print(fc.spectrum.inf_norm(spec, jnp.array([[[1, -2, 1]]])))  # rows 1-2, 1 and 1, -2, 1
    4
    """
    return _largest_sum(spec, _numbers(spec, kernel), True)


@partial(program, static_argnums=2)
def _largest_sum(spec: ConvSpec, kernel: jax.Array, rows: bool) -> jax.Array:
    return _linear_in_scale(lambda k: largest(_line_sums(spec, k, 1, rows)), kernel)


def _linear_in_scale(of: Callable[[jax.Array], jax.Array], kernel: jax.Array) -> jax.Array:
    """``of`` of degree 1 at unit scale, so that no partial sum overflows; integers as they are."""
    return homogeneous(of, (1,), kernel) if jnp.issubdtype(kernel.dtype, jnp.inexact) else of(kernel)


def row_norms(spec: ConvSpec, kernel: Any, *, ord: int = 2) -> jax.Array:
    """Norm of every row of M: ``sqrt(sum over j of |M[i, j]|**2)``, or ``sum over j of |M[i, j]|``.

    What an output neuron can answer to an input of norm 1. Exact, for every geometry, differentiable.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      ord: 2 for Euclidean norms, 1 for sums of absolute values.

    Returns:
      Array of shape ``(spec.out_size,)``.

    Raises:
      TypeError, ValueError: as :func:`frobenius_norm`, and for another ``ord``.

    Cost: the kernel times the kinds of rows, then one lookup per row.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), [(0, 1)])
    >>> print(fc.spectrum.row_norms(spec, jnp.array([[[3., 4.]]])))
    [5. 5. 3.]
    """
    return _line_norms(spec, kernel, ord, True)


def column_norms(spec: ConvSpec, kernel: Any, *, ord: int = 2) -> jax.Array:
    """Norm of every column of M: ``sqrt(sum over i of |M[i, j]|**2)``, or ``sum over i of |M[i, j]|``.

    What an input neuron can cause in the output. Arguments, errors and cost as in :func:`row_norms`.

    Returns:
      Array of shape ``(spec.in_size,)``.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), "VALID")
    >>> print(fc.spectrum.column_norms(spec, jnp.array([[[3., 4.]]])))
    [3. 5. 4.]
    """
    return _line_norms(spec, kernel, ord, False)


def _line_norms(spec: ConvSpec, kernel: Any, ord: int, rows: bool) -> jax.Array:
    if ord not in (1, 2):
        raise ValueError(f"ord must be 1 (sum of absolute values) or 2 (Euclidean), got {ord!r}.")
    kernel = _numbers(spec, kernel) if ord == 1 else as_inexact(spec, kernel)
    return _every_line(spec, kernel, ord, rows)


@partial(program, static_argnums=(2, 3))
def _every_line(spec: ConvSpec, kernel: jax.Array, ord: int, rows: bool) -> jax.Array:
    if ord == 1:
        sums = _linear_in_scale(partial(_line_sums, spec, power=1, rows=rows), kernel)
    else:
        sums = homogeneous(lambda k: root(_line_sums(spec, k, 2, rows)), (1,), kernel)
    for i, axis in enumerate(spec.axes):
        lines = output_lines(axis) if rows else input_lines(axis)
        sample = lines.sample_of(lax.iota(spec.index_dtype, lines.size), jnp.where)
        kind = jnp.take(jnp.asarray(_lines(axis, rows)[0].kind, sample.dtype), sample, mode="clip")
        sums = jnp.take(sums, kind, axis=2 + i, mode="clip")
    sums = jnp.moveaxis(sums, (0, 1), (-2, -1))  # (positions..., group, channel)
    if rows:
        return from_canonical(sums.reshape(*sums.shape[:-2], spec.out_channels), spec.out_order).ravel()
    canonical = sums.reshape([spec.in_shape[i] for i in spec.in_order])
    return from_canonical(canonical, spec.in_order).ravel()


def trace(spec: ConvSpec, kernel: Any) -> jax.Array:
    """``sum of M[i, i]`` over ``i < min(M.shape)``.

    Entry ``(i, i)`` relates output neuron ``i`` with input neuron ``i``, whatever the two layouts are.
    Exact, linear in the kernel; integers stay integers. Arguments and errors as in
    :func:`frobenius_norm`. Cost: ``min(M.shape)`` times the number of taps.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 3), (1,), "SAME")
    >>> print(fc.spectrum.trace(spec, jnp.array([[[1, 5, 2]]])))
    20
    """
    return _trace(spec, _numbers(spec, kernel))


@program
def _trace(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    return _linear_in_scale(partial(_sum_of_diagonal, spec), kernel)


def _sum_of_diagonal(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    size, dims = min(spec.shape), len(spec.axes)
    if not size:
        return jnp.zeros((), kernel.dtype)
    n = lax.iota(spec.index_dtype, size).reshape(size, *[1] * dims)
    (outputs, d), (inputs, c) = spec.split_row(n), spec.split_column(n)
    first = group_of(spec, d) * spec.group_channels
    i, meets, taps = c - first, True, []
    for a, (axis, o, t) in enumerate(zip(spec.axes, outputs, inputs, strict=True)):
        p = lax.broadcasted_iota(n.dtype, tuple(axis.taps if j == a else 1 for j in range(-1, dims)), a + 1)
        read, valid = axis.input_of(o, p)
        meets = meets & valid & (read == t)
        taps.append(p)
    meets = meets & (i >= 0) & (i < spec.group_channels)
    values = jnp.transpose(kernel, spec.dimension_numbers.rhs_spec)
    entries = values.at[(d, i, *taps)].get(mode="clip")
    return jnp.where(meets, entries, jnp.zeros((), kernel.dtype)).sum(dtype=kernel.dtype)


def orthogonality_residual(spec: ConvSpec, kernel: Any) -> jax.Array:
    """``||M M^H - I||_F``, or ``||M^H M - I||_F`` where M has more rows than columns: 0 iff M is
    an isometry (of its row space, or of its input).

    An entry of ``M M^H`` is a sum of ``R[d, d', p, p'] = sum_i K[d, i, p] conj(K[d', i, p'])`` over the
    pairs of taps that read one input from two outputs. Only a few kinds of pairs of outputs exist on an
    axis, so R contracted with the kinds of every axis holds all entries. No cancellation: the residual
    of an orthogonal kernel is of the size of rounding, not of its root.

    Exact for every geometry, boundaries included (the usual regularisers hold for interior rows only);
    differentiable, with gradient 0 where the residual is 0.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.

    Returns:
      A real scalar.

    Raises:
      TypeError, ValueError: as :func:`frobenius_norm`.

    Source: Wang, Chen, Chakraborty & Yu, Orthogonal Convolutional Neural Networks (2020), made exact at
    the boundary. Cost: O(channels**2) times the square of the number of taps; none with image size.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 8), (1, 1, 2), (2,), "VALID")  # M M^T is 4 times the unit matrix
    >>> print(fc.spectrum.orthogonality_residual(spec, jnp.array([[[2., 0.]]])))
    6.0
    """
    return _orthogonality_residual(spec, as_inexact(spec, kernel))


@program
def _orthogonality_residual(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    rows = spec.out_size <= spec.in_size
    if not min(spec.shape):  # the Gram matrix of the short side is empty
        return jnp.zeros((), kernel.real.dtype)
    # With k = 2**e u it is 2**2e ||u u^H - 2**-2e I||; a small k needs no scale, its squares may vanish.
    exponent = jnp.maximum(unit_scale(kernel)[1], 0)
    kernel = times_power_of_two(kernel, -exponent)
    value = by_group(spec, kernel)
    value = value if rows else jnp.swapaxes(value, 1, 2)
    dims = range(len(spec.axes))
    kinds = [_pairs(axis, rows) for axis in spec.axes]
    first, second = [10 + a for a in dims], [30 + a for a in dims]
    gram = jnp.einsum(
        *(value, [0, 1, 3, *first], value.conj(), [0, 2, 3, *second]),
        [0, 1, 2, *(i for a in dims for i in (first[a], second[a]))],
        precision="highest",
    )
    for axis, kind in zip(spec.axes, kinds, strict=True):
        gram = gram.reshape(*gram.shape[:3], axis.taps**2, *gram.shape[5:])
        gram = jnp.tensordot(gram, kind.matrix(gram.dtype), [[3], [1]], precision="highest")
    unit = jnp.eye(value.shape[1], dtype=gram.dtype)
    for kind in kinds:
        unit = unit[..., None] * jnp.asarray(kind.diagonal, gram.dtype).reshape([1] * unit.ndim + [-1])
    unit = times_power_of_two(unit, -2 * exponent)
    counts = [k.count for k in kinds]
    size = homogeneous(lambda values: root(_weigh(squares(values), counts)), (1,), gram - unit[None])
    return times_power_of_two(size, 2 * exponent)


# -- kinds of entries, rows, columns and pairs of an axis, on the host ---------------------------


@dataclass(frozen=True)
class _Kinds:
    """Distinct lists of codes (most often taps), each with how often it occurs and which members have it."""

    listed: np.ndarray  # [place]: the codes of all kinds, one kind after the other
    owner: np.ndarray  # [place]: the kind whose list it is in
    count: np.ndarray  # [kind]
    kind: np.ndarray  # [member]
    codes: int  # there are codes from 0 up to this
    diagonal: np.ndarray | None = None  # [kind]: whether members pair a position with itself

    def matrix(self, dtype: Any) -> jax.Array:
        """``[kind, code]``: how often the code stands in the list. A large one is made by the program, which
        holds the list alone; the barrier keeps XLA from making it while it compiles, which takes seconds."""
        shape, place = (len(self.count), self.codes), self.owner * self.codes + self.listed
        if math.prod(shape) <= _SMALL:
            return jnp.asarray(np.bincount(place, minlength=math.prod(shape)).reshape(shape), dtype)
        owner, listed = lax.optimization_barrier((jnp.asarray(self.owner), jnp.asarray(self.listed)))
        return jnp.zeros(shape, dtype).at[owner, listed].add(jnp.ones((), dtype))


@bounded_cache
def _entries(axis: Axis) -> _Kinds:
    """Kinds of entries (o, t) of one axis: the taps that meet there, added up in M."""
    taps = np.arange(axis.taps)
    if not axis.collides:
        return _Kinds(taps, taps, axis.tap_counts, taps, axis.taps)
    lines = output_lines(axis)
    o, t, p = axis.reads(lines.samples)
    entries, entry = np.unique(o * axis.size + t, return_inverse=True)
    return _kinds(entry, p, lines.counts[entries // axis.size], axis.taps)


@bounded_cache
def _lines(axis: Axis, rows: bool) -> tuple[_Kinds, _Kinds | None]:
    """Kinds of rows or columns of one axis; its members are the samples of the lines.

    Where taps collide, a line is a list of kinds of entries, which come second. Elsewhere it is one of taps.
    """
    lines = output_lines(axis) if rows else input_lines(axis)
    line, other, p = axis.reads(lines.samples) if rows else axis.readers(lines.samples)
    if not axis.collides:
        return _kinds(line, p, lines.counts, axis.taps), None
    width = int(other.max(initial=0)) + 1
    places, entry = np.unique(line * width + other, return_inverse=True)
    entries = _kinds(entry, p, np.ones(len(places), np.int64), axis.taps)
    return _kinds(places // width, entries.kind, lines.counts, len(entries.count)), entries


@bounded_cache
def _pairs(axis: Axis, rows: bool) -> _Kinds:
    """Kinds of entries of ``M M^T`` (rows) or ``M^T M`` of one axis, by their pairs of taps ``p*k + p'``.

    Entry (o, o') adds a pair of taps for each input that both read. Entries that add nothing are left
    out, save on the diagonal, where the unit matrix has its ones.
    """
    lines = _pair_lines(axis, rows)
    own = np.append(lines.samples, lines.size)  # one past the end: the lines without a relation
    line, shared, p = axis.reads(lines.samples) if rows else axis.readers(lines.samples)
    # All lines that have one of these shared positions, the samples among them.
    met, at = np.unique(shared, return_inverse=True)
    where, other, q = axis.readers(met) if rows else axis.reads(met)
    order = np.argsort(where, kind="stable")
    other, q = other[order], q[order]
    counts = np.bincount(where, minlength=len(met))
    # Every entry meets all entries with the same shared position: a run of `counts` of them.
    repeats = counts[at]
    starts = (np.cumsum(counts) - counts)[at]
    left = np.repeat(np.arange(line.size), repeats)
    within = np.arange(left.size) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    right = starts[left] + within
    lonely = np.setdiff1d(np.arange(len(lines.counts)), line)  # rows of zeros
    width = lines.size + 1
    key = np.concatenate([line[left] * width + other[right], lonely * width + own[lonely]])
    keys, member = np.unique(key, return_inverse=True)
    pair = p[left] * axis.taps + q[right]
    # On the diagonal a mark is added, so that no kind mixes it with other entries.
    marks = np.flatnonzero(own[keys // width] == keys % width)
    members = np.concatenate([member[: pair.size], marks])
    codes = np.concatenate([pair, np.full(marks.size, axis.taps**2)])
    kinds = _kinds(members, codes, lines.counts[keys // width], axis.taps**2 + 1)
    marked = kinds.listed == axis.taps**2
    diagonal = np.bincount(kinds.owner[marked], minlength=len(kinds.count))
    return replace(
        kinds, listed=kinds.listed[~marked], owner=kinds.owner[~marked], codes=axis.taps**2, diagonal=diagonal
    )


def _pair_lines(axis: Axis, rows: bool) -> Lines:
    """The lines of one axis by what they share with others: those repeat that meet repeating lines only."""
    s, l, z, reach = axis.stride, axis.lhs_dilation, axis.shift, axis.dilated_taps - 1
    if rows:  # output o reads from (o*s - z) / l to (o*s - z + reach) / l
        met = input_lines(axis).repeating
        part = range(((met.start - 1) * l + z) // s + 1, -(-(met.stop * l + z - reach) // s))
        return output_lines(axis).within(part)
    met = output_lines(axis).repeating  # input t is read from (t*l + z - reach) / s to (t*l + z) / s
    part = range(((met.start - 1) * s + reach - z) // l + 1, -(-(met.stop * s - z) // l))
    return input_lines(axis).within(part)


def _kinds(member: np.ndarray, code: np.ndarray, weights: np.ndarray, codes: int) -> _Kinds:
    """Members told apart by the codes that they hold; each stands for so many as its weight."""
    order = np.lexsort((code, member))
    code = code[order]
    ends = np.cumsum(np.bincount(member, minlength=len(weights)))
    numbers: dict[bytes, int] = {}
    held, begin = code.tobytes(), 0
    kind = np.empty(len(weights), np.int64)
    for i, end in enumerate((ends * code.itemsize).tolist()):
        kind[i] = numbers.setdefault(held[begin:end], len(numbers))
        begin = end
    lists = [np.frombuffer(key, code.dtype) for key in numbers]
    owner = np.repeat(np.arange(len(lists)), [len(v) for v in lists])
    count = np.zeros(len(lists), np.int64)
    np.add.at(count, kind, weights)
    return _Kinds(np.concatenate([code[:0], *lists]), owner, count, kind, codes)


# -- the kernel contracted with the kinds --------------------------------------------------------


def _line_sums(spec: ConvSpec, kernel: jax.Array, power: int, rows: bool) -> jax.Array:
    """Sums of ``|M|**power`` over each kind of row or column: (group, channel of the line, kinds...)."""
    lines, entries = zip(*(_lines(axis, rows) for axis in spec.axes), strict=True) if spec.axes else ((), ())
    value = _power(_merge(by_group(spec, kernel), entries), power)
    value = value.sum(2 if rows else 1, dtype=value.dtype)  # (group, channel, kinds of entries or taps...)
    return _contract(value, lines, 2)


def _merge(value: jax.Array, kinds: Sequence[_Kinds | None]) -> jax.Array:
    """The taps of every axis that has a list of kinds, added up per kind."""
    return _contract(value, kinds, 3)


def _contract(value: jax.Array, kinds: Sequence[_Kinds | None], first: int) -> jax.Array:
    """Sums over the list of each kind in place of the codes, on the axes from ``first`` on."""
    for a, kind in enumerate(kinds, start=first):
        if kind is not None:
            value = jnp.tensordot(value, kind.matrix(value.dtype), [[a], [1]], precision="highest")
            value = jnp.moveaxis(value, -1, a)
    return value


def _weigh(value: jax.Array, counts: Sequence[np.ndarray]) -> jax.Array:
    """Sum of everything, each of the last axes weighted with how often its kinds occur."""
    for count in reversed(counts):
        value = jnp.tensordot(value, jnp.asarray(count, value.dtype), 1, precision="highest")
    return value.sum()


def _power(value: jax.Array, power: int) -> jax.Array:
    return jnp.abs(value) if power == 1 else squares(value)


# -- operands ------------------------------------------------------------------------------------


def _numbers(spec: ConvSpec, kernel: Any) -> jax.Array:
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    if kernel.dtype == jnp.bool_:
        raise TypeError("kernel is bool, whose matrix has no norms: cast it with .astype(float).")
    return seen(spec, kernel)


def as_inexact(spec: ConvSpec, kernel: Any) -> jax.Array:
    """The kernel in a floating dtype of at least 32 bits: integers and halves are widened."""
    kernel = _numbers(spec, kernel)
    if not jnp.issubdtype(kernel.dtype, jnp.inexact):
        return kernel.astype(jnp.result_type(float))
    return kernel.astype(jnp.float32) if jnp.finfo(kernel.dtype).bits < 32 else kernel


def seen(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The kernel with 0 for taps that never read an input: M does not hold them, nor has their scale."""
    for i, axis in zip(spec.dimension_numbers.rhs_spec[2:], spec.axes, strict=True):
        reads = np.asarray(axis.tap_counts) > 0
        if not reads.all():
            shape = [axis.taps if j == i else 1 for j in range(kernel.ndim)]
            kernel = jnp.where(reads.reshape(shape), kernel, jnp.zeros((), kernel.dtype))
    return kernel


def widened(array: jax.Array) -> jax.Array:
    """In the default floating dtype, the only one that matfree and lineax's LSMR compute in."""
    default = jnp.result_type(float)
    return array.astype(np.result_type(default, np.complex64) if jnp.iscomplexobj(array) else default)

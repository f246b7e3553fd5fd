"""Where the entries of M stand: entry e is at (row, column), and holds tap p.

An entry is an output, a channel of the outputs' group, and a tap per spatial axis. :func:`entries` says where
it stands, for NumPy arrays and in a trace. All index arrays broadcast, so small ones per axis make the large
ones, inside the program that reads them. What builds, lists, gathers or draws M takes its entries from here:
all of them, those of some rows or columns, or those of one part.

Sparse formats list the entries by row, and within a row by column. The inputs that one row reads are the
Cartesian product of those that it reads on each axis. So the place of an entry in the list is a formula in
small tables, one per axis (docs/maths.md, section 9), and nothing is sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.axis import Axis, Ints
from jaxconv_fc.geometry.layout import (
    column_of,
    grid,
    group_of,
    in_channel,
    inverse,
    row_of,
    split_column,
    split_row,
    spread,
    tap_of,
)
from jaxconv_fc.geometry.layout import taps as kernel_taps
from jaxconv_fc.geometry.lines import output_runs
from jaxconv_fc.geometry.memory import index_dtype
from jaxconv_fc.geometry.spec import ConvSpec

_LISTED = 2**18  # entries that are listed together on the host
_SMALL = 2**9  # largest (outputs, taps) table that a program may hold as a constant


class Reads(NamedTuple):
    """Outputs and taps of one axis: which input they read, and where this pair (output, input) stands in the
    sorted list of all pairs of the axis. Arrays that broadcast."""

    t: Ints  # the input, where `valid`
    valid: Ints  # bool: False where the tap reads padding or a hole
    rank: Ints = 0  # how many inputs before t the output reads
    width: Ints = 0  # how many inputs the output reads
    start: Ints = 0  # how many pairs stand before those of the output
    total: int = 0  # pairs in all

    def each(self, change: Callable[[Any], Any]) -> Reads:
        t, valid, rank, width, start = map(change, self[:5])
        return Reads(t, valid, rank, width, start, self.total)


class Entries(NamedTuple):
    """A grid of entries, as arrays that broadcast over ``dims``: ``M[row, column]`` holds tap ``tap``."""

    dims: tuple[int, ...]
    row: Ints
    column: Ints
    tap: Ints  # index in ``kernel.ravel()``
    valid: Ints  # bool: False where the tap reads padding, which is no entry of M


def entries(
    spec: ConvSpec,
    dims: Sequence[int],
    positions: Sequence[Ints],
    d: Ints,
    i: Ints,
    taps: Sequence[Ints],
    reads: Sequence[Reads] | None = None,
) -> Entries:
    """The entries of outputs ``(d, positions)`` and kernel entries ``(d, i, taps)``; d's group has channel i.

    ``reads`` are what :meth:`Axis.input_of` says of each axis, where the caller has them already.
    """
    if reads is None:
        reads = [Reads(*axis.input_of(o, p)) for axis, o, p in zip(spec.axes, positions, taps, strict=True)]
    valid = True
    for read in reads:
        valid = valid & read.valid
    column = column_of(spec, [read.t for read in reads], in_channel(spec, d, i))
    return Entries(tuple(dims), row_of(spec, positions, d), column, tap_of(spec, taps, i, d), valid)


def reading(axis: Axis, o: Ints, p: Ints) -> jax.Array:
    """The input that output ``o`` of one axis reads through tap ``p``, in a trace; -1 for padding."""
    t, valid = axis.input_of(o, p)
    return jnp.where(valid, t, jnp.full_like(t, -1))


# -- all of them, by row, by column ----------------------------------------------------------------


def all_entries(spec: ConvSpec) -> Entries:
    """All entries in a trace, [d, i, o, p]: out channel, channel of its group, output position and tap, the
    last two one dimension per spatial axis."""
    dims = (spec.out_channels, spec.group_channels, *(a.out_size for a in spec.axes), *kernel_taps(spec))
    d, i, *rest = grid(dims, spec.index_dtype)
    return entries(spec, dims, rest[: len(spec.axes)], d, i, rest[len(spec.axes) :])


def row_entries(spec: ConvSpec, rows: Any) -> Entries:
    """The entries of these rows, [n, i, p]. ``rows`` is a NumPy array or in a trace."""
    dims = (len(rows), spec.group_channels, *kernel_taps(spec))
    _, i, *taps = grid(dims, rows.dtype, np if isinstance(rows, np.ndarray) else jnp)
    positions, d = split_row(spec, spread(rows, dims, 0))
    return entries(spec, dims, positions, d, i, taps)


def stored_entries(spec: ConvSpec, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``(n, column, tap)`` on the host, in blocks: kernel entry ``tap`` stands at ``M[rows[n], column]``."""
    step = max(1, _LISTED // max(1, spec.group_channels * math.prod(kernel_taps(spec))))
    for first in range(0, len(rows), step):
        at = row_entries(spec, rows[first : first + step])
        found = np.nonzero(np.broadcast_to(at.valid, at.dims))
        columns, taps = (np.broadcast_to(v, at.dims)[found] for v in (at.column, at.tap))
        yield first + found[0], columns, taps


def column_entries(spec: ConvSpec, columns: jax.Array) -> Entries:
    """The entries of these columns, in a trace: [n, e, q, p]. Out channel e of the column's group reads the
    q-th copy of its input position (the only one in zeros mode) through tap p."""
    n, block = len(spec.axes), spec.out_channels // spec.groups
    dims = (len(columns), block, *(a.copies for a in spec.axes), *kernel_taps(spec))
    _, e, *rest = grid(dims, spec.index_dtype)
    column = spread(columns, dims, 0)
    inputs, c = split_column(spec, column)
    d, i = c // spec.group_channels * block + e, c % spec.group_channels
    positions, valid = [], True
    for axis, t, q, p in zip(spec.axes, inputs, rest[:n], rest[n:], strict=True):
        j, copied = _copy(axis, t, q)
        o, reads = axis.output_of(j, p)
        positions.append(o)
        valid = valid & copied & reads
    return Entries(dims, row_of(spec, positions, d), column, tap_of(spec, rest[n:], i, d), valid)


def _copy(axis: Axis, t: Ints, q: Ints) -> tuple[Ints, Ints]:
    """``(j, valid)``: the ``q``-th padded position that is a copy of input position ``t``.

    The positions sorted by source hold the copies of each input side by side.
    """
    if axis.pads_with_zeros:
        return t, True
    source = axis.source(lax.iota(t.dtype, axis.padded_size))
    order = jnp.argsort(source, stable=True).astype(t.dtype)
    at = jnp.searchsorted(source[order], t).astype(t.dtype) + q
    j = order[jnp.minimum(at, axis.padded_size - 1)]
    return j, (at < axis.padded_size) & (axis.source(j) == t)


# -- in the order of a sparse format ---------------------------------------------------------------


def place(spec: ConvSpec, reads: Sequence[Reads], d: Ints, i: Ints) -> Ints:
    """How many entries stand before the entry of out channel ``d`` and channel ``i`` with these reads.

    Channels are one more axis, of width 1 and start d. With all axes in the order of ``out_shape``, there are
    before its row::

        sum over j of  C/G * width(a_1)*...*width(a_(j-1)) * start(a_j) * total(a_(j+1))*...

    Term j counts the entries of the rows that agree with this row on the axes before ``a_j``, and stand at a
    smaller position on ``a_j``. The entries of the row are a grid of ``width`` inputs per axis and ``C/G``
    channels, in the order of ``in_shape``. Before the entry in its row stands the row-major index, in this
    grid, of the ranks and ``i``.
    """
    widths, starts = [*(r.width for r in reads), 1], [*(r.start for r in reads), d]
    totals, order = [*(r.total for r in reads), spec.out_channels], inverse(spec.out_order)
    before, count, inside = 0, spec.group_channels, 0
    for n, a in enumerate(order):
        before = before + count * starts[a] * math.prod(totals[b] for b in order[n + 1 :])
        count = count * widths[a]
    for a in inverse(spec.in_order):
        if a < len(reads):
            inside = inside * widths[a] + reads[a].rank
        elif a == len(spec.in_order) - 1:  # channels. The batch axis is skipped: a row reads one batch group
            inside = inside * spec.group_channels + i
    return before + inside


class Listed(NamedTuple):
    """Some entries of M in order, as a list of ``size``."""

    at: Entries
    where: jax.Array  # (at.dims): index in the list; `size` where nothing is read
    size: int
    collides: bool

    def of(self, values: Ints) -> jax.Array:
        """The list of values, (size,), from an array that broadcasts over ``at.dims``.

        Taps that meet share a place. Their values must be equal.
        """
        values = jnp.broadcast_to(values, self.at.dims)
        zeros = jnp.zeros(self.size, values.dtype)
        return zeros.at[self.where].set(values, mode="drop", unique_indices=not self.collides)

    def data(self, kernel: jax.Array, tap: Ints) -> jax.Array:
        """The entries in all parts of M, (parts, size), from the kernel entries ``kernel[part, tap]``.

        Taps that meet are added (bool: or). If none meet, an entry of M is one kernel entry, and one list of
        indices in the kernel serves all parts.
        """
        if not self.collides:
            return jnp.take(kernel, self.of(tap), axis=1, mode="clip")
        tap = jnp.broadcast_to(tap, self.at.dims).reshape(-1)
        target = jnp.zeros((kernel.shape[0], self.size), kernel.dtype).at[:, self.where.reshape(-1)]
        add = target.max if kernel.dtype == jnp.bool_ else target.add
        return add(jnp.take(kernel, tap, axis=1, mode="clip"), mode="drop")


def listed(
    spec: ConvSpec,
    dims: tuple[int, ...],
    positions: Sequence[Ints],
    d: Ints,
    reads: Sequence[Reads],
    inside: Ints,
    first: Ints,
    size: int,
) -> Listed:
    """The entries of some rows in a trace, as a list of ``size`` that begins with entry ``first`` of M.

    The rows have these positions and out channels ``d``, which broadcast over ``dims``. So does ``inside``,
    which is False for a row past the end of M. The reads of axis a broadcast over (*dims, taps). The entries
    are [*dims, i, p].
    """
    n, shape = len(dims), (*dims, spec.group_channels, *kernel_taps(spec))
    i, *taps = grid(shape, entry_dtype(spec))[n:]
    d, inside, *positions = (spread(v, shape, *range(n)) for v in (d, inside, *positions))
    reads = [read.each(lambda v, a=a: spread(v, shape, *range(n), n + 1 + a)) for a, read in enumerate(reads)]
    at = entries(spec, shape, positions, d, i, taps, reads)
    where = jnp.where(at.valid & inside, place(spec, reads, d, i) - first, size)
    return Listed(at, jnp.broadcast_to(where, shape), size, spec.collides)


def row_pointers(spec: ConvSpec, reads: Sequence[Reads], d: Any) -> Any:
    """``indptr`` of CSR, (out_size + 1,): how many entries stand before every row, then ``nse``.

    ``width`` and ``start`` of the reads are arrays (outputs,), and ``d`` is arange(out channels): all of them
    of NumPy, or all of JAX.
    """
    xp: Any = np if isinstance(d, np.ndarray) else jnp
    n, dims = len(spec.axes), (*(a.out_size for a in spec.axes), spec.out_channels)
    rows = [
        Reads(0, True, 0, spread(r.width, dims, a), spread(r.start, dims, a), r.total)
        for a, r in enumerate(reads)
    ]
    starts = xp.broadcast_to(place(spec, rows, spread(d, dims, n), 0), dims)
    return xp.append(starts.transpose(inverse(spec.out_order)).reshape(-1), xp.asarray(spec.nse, d.dtype))


def sorted_reads(axis: Axis, dtype: Any) -> Reads:
    """The tables (outputs, taps) of an axis in a trace: small ones are made by NumPy. ``width`` and ``start``
    are (outputs, 1)."""
    xp: Any = np if axis.out_size * axis.taps <= _SMALL else jnp
    o, p = xp.arange(axis.out_size, dtype=dtype)[:, None], xp.arange(axis.taps, dtype=dtype)[None]
    return _ranked(axis, *axis.input_of(o, p), xp)._replace(total=axis.pair_count).each(jnp.asarray)


def row_reads(axis: Axis, dtype: Any) -> Reads:
    """``width`` and ``start`` of all outputs of an axis, (outputs,), in a trace."""
    if axis.out_size > _SMALL:
        return sorted_reads(axis, dtype).each(lambda v: v[:, 0])
    width = axis_widths(axis).astype(dtype)
    start = (width.cumsum() - width).astype(dtype)
    return Reads(0, True, 0, jnp.asarray(width), jnp.asarray(start), axis.pair_count)


def pairs(axis: Axis, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, Reads]:
    """``(o, p, reads)`` on the host, for all triples (o, t, p) of some outputs, by output: arrays (triples,).

    The sorted list is that of the pairs of these outputs alone, in their order.
    """
    table = axis.table(outputs)
    reads = _ranked(axis, table, table >= 0, np)
    o, p = np.nonzero(table >= 0)
    reads = reads._replace(total=int(reads.width.sum())).each(lambda v: np.broadcast_to(v, table.shape)[o, p])
    return outputs[o], p, reads


def _ranked(axis: Axis, t: Any, valid: Any, xp: Any) -> Reads:
    """The tables of outputs that read these inputs through each tap, [o, p]."""
    dtype = t.dtype
    if axis.pads_with_zeros:  # ascending taps read ascending inputs
        rank, width = xp.cumsum(valid, 1, dtype=dtype) - 1, xp.sum(valid, 1, dtype=dtype, keepdims=True)
    else:  # taps that read the same input have the same rank
        t = xp.where(valid, t, axis.size)  # sorted last
        order = xp.argsort(t, axis=1, stable=True)
        ordered = xp.take_along_axis(t, order, axis=1)
        new = xp.diff(ordered, axis=1, prepend=-1) > 0  # the first tap of each input
        rank = xp.take_along_axis(xp.cumsum(new, 1, dtype=dtype) - 1, xp.argsort(order, axis=1), axis=1)
        width = xp.sum(new & (ordered < axis.size), 1, dtype=dtype, keepdims=True)
    return Reads(t, valid, rank, width, xp.cumsum(width, 0, dtype=dtype) - width)


def axis_widths(axis: Axis) -> np.ndarray:
    """How many inputs each output of an axis reads: (outputs,)."""
    widths = np.zeros(axis.out_size, np.int64)
    for run in output_runs(axis):
        widths[run.outputs.start : run.outputs.stop : run.outputs.step] = run.width
    return widths


def entry_dtype(spec: ConvSpec) -> Any:
    """The narrowest integer dtype that holds every position and every index of an entry."""
    wide = index_dtype(spec.stored_reach, spec.shape)
    return wide if wide == jnp.int64 else spec.index_dtype


def group_column(spec: ConvSpec, d: Ints) -> Ints:
    """What is added to a column that group 0 reads, to get that of the group of out channel ``d``."""
    group = group_of(spec, d)
    return column_of(spec, [group * 0] * len(spec.axes), group * spec.group_channels)

"""Where an entry stands in the sorted list of all entries of M.

The inputs that one row of M reads are the Cartesian product of those that it reads on each axis. The place
of an entry is the number of entries in the rows before, plus the number before it in its own row. Both are
formulas in small tables, one per axis (docs/maths.md, section 9), so nothing is sorted. A traced program
scatters kernel entries to their places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.axis import Axis, Ints
from jaxconv_fc.layout import column_of, grid, group_of, in_channel, inverse, row_of, spread
from jaxconv_fc.layout import taps as kernel_taps
from jaxconv_fc.lines import output_runs
from jaxconv_fc.memory import index_dtype
from jaxconv_fc.spec import ConvSpec

_SMALL = 2**9  # largest (outputs, taps) table that a program may hold as a constant


class AxisReads(NamedTuple):
    """What output o of one axis reads through tap p, as arrays that broadcast over (outputs, taps)."""

    t: Ints  # the input position, where `valid`
    valid: Ints  # bool: False where the tap reads padding or a hole
    rank: Ints  # how many inputs before t the output reads, where `valid`
    width: Ints  # (outputs, 1): how many inputs the output reads
    start: Ints  # (outputs, 1): sum of the widths of the outputs before o


def row_starts(spec: ConvSpec, widths: Sequence[Ints], starts: Sequence[Ints], d: Ints) -> tuple[Ints, Ints]:
    """``(start, count)`` of a row: how many entries stand before it, and how many in it.

    ``widths`` and ``starts`` hold those of the row's position on each spatial axis, ``d`` is its out channel.
    Channels are one more axis, of width 1 and start d. With all axes in the order of ``out_shape``::

        start = sum over j of  C/G * width(a_1)*...*width(a_(j-1)) * start(a_j) * total(a_(j+1))*...

    Term j counts the entries of the rows that agree with this row on the axes before ``a_j``, and stand at a
    smaller position on ``a_j``.
    """
    widths, starts = [*widths, 1], [*starts, d]
    totals = [*(axis.pair_count for axis in spec.axes), spec.out_channels]
    order = inverse(spec.out_order)
    start, count = 0, spec.group_channels
    for n, a in enumerate(order):
        start = start + count * starts[a] * math.prod(totals[b] for b in order[n + 1 :])
        count = count * widths[a]
    return start, count


def offset_in_row(spec: ConvSpec, ranks: Sequence[Ints], widths: Sequence[Ints], i: Ints) -> Ints:
    """How many entries of a row stand before the entry of channel ``i`` with these ranks on the axes.

    The entries of a row are a grid of ``width`` inputs per axis and ``C/G`` channels, in the order of
    ``in_shape``. The result is the row-major index of the ranks and ``i`` in this grid.
    """
    offset = 0
    for a in inverse(spec.in_order):
        if a < len(ranks):
            offset = offset * widths[a] + ranks[a]
        elif a == len(spec.in_order) - 1:  # channels. The batch axis is skipped: a row reads one batch group
            offset = offset * spec.group_channels + i
    return offset


def axis_reads(axis: Axis, dtype: Any) -> AxisReads:
    """The tables of an axis: small ones are made by NumPy, large ones inside the trace."""
    xp: Any = np if axis.out_size * axis.taps <= _SMALL else jnp
    o, p = xp.arange(axis.out_size, dtype=dtype)[:, None], xp.arange(axis.taps, dtype=dtype)[None]
    t, valid = axis.input_of(o, p)
    if axis.pads_with_zeros:  # ascending taps read ascending inputs
        rank, width = xp.cumsum(valid, 1, dtype=dtype) - 1, xp.sum(valid, 1, dtype=dtype, keepdims=True)
    else:  # taps that read the same input have the same rank
        t = xp.where(valid, t, axis.size)  # sorted last
        order = xp.argsort(t, axis=1, stable=True)
        sorted_t = xp.take_along_axis(t, order, axis=1)
        new = xp.diff(sorted_t, axis=1, prepend=-1) > 0  # the first tap of each input
        rank = xp.take_along_axis(xp.cumsum(new, 1, dtype=dtype) - 1, xp.argsort(order, axis=1), axis=1)
        width = xp.sum(new & (sorted_t < axis.size), 1, dtype=dtype, keepdims=True)
    start = xp.cumsum(width, 0, dtype=dtype) - width
    return AxisReads(*map(jnp.asarray, (t, valid, rank, width, start)))


def row_pointers(spec: ConvSpec, widths: Sequence[Any], starts: Sequence[Any], d: Any) -> Any:
    """``indptr`` of CSR, (out_size + 1,): ``start`` of every row, then ``nse``.

    ``widths`` and ``starts`` hold an array (outputs,) per spatial axis. ``d`` is arange(out channels).
    Either all of them are NumPy arrays, or all are JAX arrays.
    """
    xp: Any = np if isinstance(d, np.ndarray) else jnp
    dims = (*(a.out_size for a in spec.axes), spec.out_channels)
    widths, starts = ([spread(v, dims, a) for a, v in enumerate(table)] for table in (widths, starts))
    start, _ = row_starts(spec, widths, starts, spread(d, dims, len(spec.axes)))
    start = xp.broadcast_to(start, dims).transpose(inverse(spec.out_order)).reshape(-1)
    return xp.append(start, xp.asarray(spec.nse, d.dtype))


# -- in a trace: by scatter --------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of M, as arrays that broadcast over ``dims``."""

    dims: tuple[int, ...]
    positions: Sequence[Ints]  # output position, per spatial axis
    d: Ints  # out channel
    reads: Sequence[AxisReads]  # what each row reads, per spatial axis; (*dims, taps)
    inside: Ints  # False for a row past the end of M, which has no entries


class Places(NamedTuple):
    """Where the entries of rows go in a list of entries, as arrays that broadcast over ``dims``."""

    dims: tuple[int, ...]  # those of Rows, then channels of a group, then taps of each axis
    size: int  # length of the list
    where: Ints  # index in the list; ``size`` where nothing is read
    row: Ints  # of M
    column: Ints  # of M
    tap: Ints  # index in the ravelled kernel (out channels, channels of a group, taps...)


def entry_places(spec: ConvSpec, rows: Rows, first: Ints, size: int) -> Places:
    """The places of all entries of these rows in a list of ``size`` that begins with entry ``first``."""
    n, dims = len(rows.dims), (*rows.dims, spec.group_channels, *kernel_taps(spec))
    i, *taps = grid(dims, entry_dtype(spec))[n:]
    # [rows...] -> [rows..., 1, 1, ...], and of axis a: [rows..., p_a] -> [rows..., 1, ..., p_a, ..., 1]
    d, valid, *o = (spread(v, dims, *range(n)) for v in (rows.d, rows.inside, *rows.positions))
    reads = [AxisReads(*(spread(v, dims, *range(n), n + 1 + a) for v in r)) for a, r in enumerate(rows.reads)]
    start, _ = row_starts(spec, [r.width for r in reads], [r.start for r in reads], d)
    for r in reads:
        valid = valid & r.valid
    offset = offset_in_row(spec, [r.rank for r in reads], [r.width for r in reads], i)
    where = jnp.where(valid, start + offset - first, size)
    tap = d * spec.group_channels + i
    for axis, p in zip(spec.axes, taps, strict=True):
        tap = tap * axis.taps + p
    column = column_of(spec, [r.t for r in reads], in_channel(spec, d, i))
    return Places(dims, size, where, row_of(spec, o, d), column, tap)


def listed(spec: ConvSpec, places: Places, values: Ints) -> jax.Array:
    """The list, (size,), with the values at their places. Taps that meet share a place: their values must
    be equal."""
    where, values = jnp.broadcast_to(places.where, places.dims), jnp.broadcast_to(values, places.dims)
    zeros = jnp.zeros(places.size, values.dtype)
    return zeros.at[where].set(values, mode="drop", unique_indices=not spec.collides)


def listed_entries(spec: ConvSpec, places: Places, kernel: jax.Array) -> jax.Array:
    """The values of the entries of all parts of M, (parts, size), from the kernel as (parts, kernel entries).

    If taps meet, their kernel entries are added (bool: or). If none meet, an entry of M is one kernel entry,
    and one list of indices in the kernel serves all parts.
    """
    if not spec.collides:
        return jnp.take(kernel, listed(spec, places, places.tap), axis=1, mode="clip")
    where, tap = (jnp.broadcast_to(v, places.dims).reshape(-1) for v in (places.where, places.tap))
    target = jnp.zeros((kernel.shape[0], places.size), kernel.dtype).at[:, where]
    add = target.max if kernel.dtype == jnp.bool_ else target.add
    return add(jnp.take(kernel, tap, axis=1, mode="clip"), mode="drop")


def group_column(spec: ConvSpec, d: Ints) -> Ints:
    """What is added to a column that group 0 reads, to get that of the group of out channel ``d``."""
    group = group_of(spec, d)
    return column_of(spec, [group * 0] * len(spec.axes), group * spec.group_channels)


def entry_dtype(spec: ConvSpec) -> Any:
    """The narrowest integer dtype that holds every position and every index of an entry."""
    wide = index_dtype(spec.stored_reach, spec.shape)
    return wide if wide == jnp.int64 else spec.index_dtype


def part_count(spec: ConvSpec) -> int:
    """How many blocks of rows M has that differ only in kernel values and in the channel group they read.

    One per out channel if channels come first in ``out_shape``. Else 1, the whole of M.
    """
    return spec.out_channels if spec.out_order[-1] == 0 and spec.nse else 1


def entry_order(spec: ConvSpec) -> list[int]:
    """Spatial axes (by number) and channels (the next number) as ``in_shape`` has them, no batch groups."""
    n = len(spec.axes)
    return [min(a, n) for a in inverse(spec.in_order) if a < n or a == len(spec.in_order) - 1]


def axis_widths(axis: Axis) -> np.ndarray:
    """How many inputs each output of an axis reads: (outputs,)."""
    widths = np.zeros(axis.out_size, np.int64)
    for run in output_runs(axis):
        widths[run.outputs.start : run.outputs.stop : run.outputs.step] = run.width
    return widths

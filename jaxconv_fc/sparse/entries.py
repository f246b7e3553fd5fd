"""Where an entry stands in the sorted list of all entries of M.

The entries of one row of M are the product of what its output position reads on each axis. Two formulas in
small tables per axis (docs/maths.md, section 9) give the place of an entry: how many entries stand before
its row, and how many before it in the row. Nothing is sorted. A traced program scatters kernel entries to
their places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.axis import Axis, Ints
from jaxconv_fc.layout import grid, group_of, in_channel, inverse, spread
from jaxconv_fc.layout import taps as kernel_taps
from jaxconv_fc.lines import output_runs
from jaxconv_fc.memory import index_dtype
from jaxconv_fc.spec import ConvSpec

_SMALL = 2**9  # entries of a table of one axis that a program may hold


class AxisReads(NamedTuple):
    """What the outputs of one axis read, as arrays that broadcast over (outputs, taps)."""

    t: Ints  # the input position
    valid: Ints  # whether the tap reads one at all
    rank: Ints  # how many inputs the output reads before it
    width: Ints  # how many inputs the output reads
    start: Ints  # how many inputs the outputs before it read


def row_starts(spec: ConvSpec, widths: Sequence[Ints], starts: Sequence[Ints], d: Ints) -> tuple[Ints, Ints]:
    """``(start, count)`` of a row: how many entries stand before it, and how many in it.

    ``widths`` and ``starts`` hold a value per spatial axis, ``d`` is the out channel. With the axes
    ``a_1, a_2, ...`` in the order of ``out_shape``, channels included::

        start = sum over j of  C/G * width(a_1)*...*width(a_(j-1)) * start(a_j) * total(a_(j+1))*...

    Term j counts the rows that are equal to the given one before ``a_j``, and smaller on ``a_j``.
    """
    widths, starts = [*widths, 1], [*starts, d]
    totals = [*(axis.pair_count for axis in spec.axes), spec.out_channels]
    order = inverse(spec.out_order)
    start, count = 0, spec.group_channels
    for n, a in enumerate(order):
        start = start + count * starts[a] * math.prod(totals[b] for b in order[n + 1 :])
        count = count * widths[a]
    return start, count


def offset_in_row(spec: ConvSpec, reads: Sequence[AxisReads], i: Ints) -> Ints:
    """How many entries of a row stand before that of channel ``i`` and the inputs read: the row-major index
    of ``i`` and the ranks in a grid of ``C/G`` and the widths, in the order of ``in_shape``."""
    ranks, widths = [r.rank for r in reads], [r.width for r in reads]
    offset = 0
    for a in inverse(spec.in_order):
        if a < len(reads):
            offset = offset * widths[a] + ranks[a]
        elif a == len(spec.in_order) - 1:  # channels; a row reads one batch entry only
            offset = offset * spec.group_channels + i
    return offset


def axis_reads(axis: Axis, dtype: Any) -> AxisReads:
    """The table of an axis, (outputs, taps): a small one is made by NumPy, a large one inside the trace."""
    xp: Any = np if axis.out_size * axis.taps <= _SMALL else jnp
    o, p = xp.arange(axis.out_size, dtype=dtype)[:, None], xp.arange(axis.taps, dtype=dtype)[None]
    t, valid = axis.input_of(o, p)
    if axis.pads_with_zeros:  # taps read in ascending order
        rank, width = xp.cumsum(valid, 1, dtype=dtype) - 1, xp.sum(valid, 1, dtype=dtype, keepdims=True)
    else:  # taps that read the same input have the same rank
        t = xp.where(valid, t, axis.size)
        order = xp.argsort(t, axis=1, stable=True)
        sorted_t = xp.take_along_axis(t, order, axis=1)
        new = xp.diff(sorted_t, axis=1, prepend=-1) > 0
        rank = xp.take_along_axis(xp.cumsum(new, 1, dtype=dtype) - 1, xp.argsort(order, axis=1), axis=1)
        width = xp.sum(new & (sorted_t < axis.size), 1, dtype=dtype, keepdims=True)
    start = xp.cumsum(width, 0, dtype=dtype) - width
    return AxisReads(*map(jnp.asarray, (t, valid, rank, width, start)))


def row_pointers(spec: ConvSpec, widths: Sequence[Any], starts: Sequence[Any], d: Any) -> Any:
    """``indptr`` of CSR, (out_size + 1,): ``start`` of every row, then ``nse``.

    ``widths`` and ``starts`` have an array (outputs,) per spatial axis, d are all out channels: all of them
    NumPy arrays, or all of them traced.
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
    reads: Sequence[AxisReads]  # what is read there, per spatial axis; its taps are one dimension more
    inside: Ints  # False for a row past the end of M, which has no entries


class Places(NamedTuple):
    """Where the entries of rows go in a list of entries, as arrays that broadcast over ``dims``."""

    dims: tuple[int, ...]  # those of the rows, then the channels of a group and the taps of each axis
    size: int  # length of the list
    where: Ints  # index in the list; ``size`` where nothing is read
    row: Ints
    column: Ints
    tap: Ints  # index in the kernel, ravelled with out channels first


def entry_places(spec: ConvSpec, rows: Rows, first: Ints, size: int) -> Places:
    """The places of all entries of these rows, in a list of ``size`` whose first is entry ``first`` of M."""
    n, dims = len(rows.dims), (*rows.dims, spec.group_channels, *kernel_taps(spec))
    i, *taps = grid(dims, entry_dtype(spec))[n:]
    d, valid, *o = (spread(v, dims, *range(n)) for v in (rows.d, rows.inside, *rows.positions))
    reads = [AxisReads(*(spread(v, dims, *range(n), n + 1 + a) for v in r)) for a, r in enumerate(rows.reads)]
    start, _ = row_starts(spec, [r.width for r in reads], [r.start for r in reads], d)
    for r in reads:
        valid = valid & r.valid
    where = jnp.where(valid, start + offset_in_row(spec, reads, i) - first, size)
    tap = d * spec.group_channels + i
    for axis, p in zip(spec.axes, taps, strict=True):
        tap = tap * axis.taps + p
    column = spec.column([r.t for r in reads], in_channel(spec, d, i))
    return Places(dims, size, where, spec.row(o, d), column, tap)


def listed(spec: ConvSpec, places: Places, values: Ints) -> jax.Array:
    """(size,) of values set at their places. Taps that meet have one place and equal values."""
    where, values = jnp.broadcast_to(places.where, places.dims), jnp.broadcast_to(values, places.dims)
    zeros = jnp.zeros(places.size, values.dtype)
    return zeros.at[where].set(values, mode="drop", unique_indices=not spec.collides)


def listed_entries(spec: ConvSpec, places: Places, kernel: jax.Array) -> jax.Array:
    """(parts, size) of the values of entries, from kernels (parts, kernel entries).

    Where taps meet, kernel entries are added. Elsewhere a stored entry is one kernel entry, so one list of
    taps serves all parts.
    """
    if not spec.collides:
        return jnp.take(kernel, listed(spec, places, places.tap), axis=1, mode="clip")
    where, tap = (jnp.broadcast_to(v, places.dims).reshape(-1) for v in (places.where, places.tap))
    zeros = jnp.zeros((kernel.shape[0], places.size), kernel.dtype).at[:, where]
    add = zeros.max if kernel.dtype == jnp.bool_ else zeros.add
    return add(jnp.take(kernel, tap, axis=1, mode="clip"), mode="drop")


def group_column(spec: ConvSpec, d: Ints) -> Ints:
    """What the group of out channel ``d`` adds to a column."""
    group = group_of(spec, d)
    return spec.column([group * 0] * len(spec.axes), group * spec.group_channels)


def entry_dtype(spec: ConvSpec) -> Any:
    """The narrowest integers that hold positions and the numbers of entries."""
    wide = index_dtype(spec.stored_reach, spec)
    return wide if wide == jnp.int64 else spec.index_dtype


def part_count(spec: ConvSpec) -> int:
    """How many equal blocks of rows M has: one per out channel if that comes first in ``out_shape``, else 1.

    The blocks differ only in kernel values and in the channel group that they read.
    """
    return spec.out_channels if spec.out_order[-1] == 0 and spec.nse else 1


def axis_widths(axis: Axis) -> np.ndarray:
    """How many inputs each output of an axis reads."""
    widths = np.zeros(axis.out_size, np.int64)
    for run in output_runs(axis):
        widths[run.outputs.start : run.outputs.stop : run.outputs.step] = run.width
    return widths

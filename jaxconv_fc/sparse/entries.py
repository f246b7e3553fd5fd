"""Where an entry stands in the sorted list of all entries of M.

The entries of one row of M are the product of what its output position reads on each axis. So where a row
begins in the list, and where in the row an entry stands, are formulas in small tables per axis
(docs/maths.md, section 9), and nothing is ever sorted. A traced program scatters kernel entries to those
places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.axis import Axis, Ints
from jaxconv_fc.layout import group_of, inverse
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
    """``(start, count)`` of a row: the entries before it, and its own.

    Rows are counted by the axes of ``out_shape`` in order. Those that differ first on one axis from the
    given row share the widths of the axes before it, and run over everything on the axes after.
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
    """The entries of a row before that of channel ``i`` and these inputs, columns in order."""
    ranks, widths = [r.rank for r in reads], [r.width for r in reads]
    offset = 0
    for a in inverse(spec.in_order):
        if a < len(reads):
            offset = offset * widths[a] + ranks[a]
        elif a == len(spec.in_order) - 1:  # channels; a row reads one batch entry only
            offset = offset * spec.group_channels + i
    return offset


def axis_reads(axis: Axis, dtype: Any) -> AxisReads:
    """The table of an axis, (outputs, taps): a small one made by NumPy, any other inside the trace."""
    xp: Any = np if axis.out_size * axis.taps <= _SMALL else jnp
    o, p = xp.arange(axis.out_size, dtype=dtype)[:, None], xp.arange(axis.taps, dtype=dtype)[None]
    t, valid = axis.input_of(o, p)
    if axis.mode == "zeros":  # taps read in ascending order
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


# -- in a trace: by scatter --------------------------------------------------------------------


class Places(NamedTuple):
    """Where kernel entries go, as arrays that broadcast over ``dims``."""

    dims: tuple[int, ...]
    where: Ints  # index among the stored entries; one past the end where nothing is read
    row: Ints
    column: Ints
    tap: Ints  # index in the kernel, ravelled with out channels first


def entry_places(
    spec: ConvSpec,
    dims: tuple[int, ...],
    reads: Sequence[AxisReads],
    o: Sequence[Ints],
    d: Ints,
    i: Ints,
    p: Sequence[Ints],
    valid: Ints,
    first: Ints,
    size: int,
) -> Places:
    """The places of the entries ``(i, *p)`` of kernel ``d`` for output positions ``o``, counted from the
    entry ``first``; one past the ``size`` that are kept where not valid."""
    start, _ = row_starts(spec, [r.width for r in reads], [r.start for r in reads], d)
    for r in reads:
        valid = valid & r.valid
    where = jnp.where(valid, start + offset_in_row(spec, reads, i) - first, size)
    tap = d * spec.group_channels + i
    for axis, q in zip(spec.axes, p, strict=True):
        tap = tap * axis.taps + q
    column = spec.column([r.t for r in reads], i) + group_column(spec, d)
    return Places(dims, where, spec.row(o, d), column, tap)


def put_at(places: Places, size: int, unique: bool, values: jax.Array) -> jax.Array:
    """(size,) of values set at their places; equal places get equal values."""
    where, values = jnp.broadcast_to(places.where, places.dims), jnp.broadcast_to(values, places.dims)
    return jnp.zeros(size, values.dtype).at[where].set(values, mode="drop", unique_indices=unique)


def entry_values(spec: ConvSpec, places: Places, kernel: jax.Array, size: int) -> jax.Array:
    """(parts, size) of the values of entries, from kernels (parts, entries).

    Where taps meet, kernel entries are added. Elsewhere a stored entry is one kernel entry, so that a
    table of which, made once, serves all parts.
    """
    if not spec.collides:
        return jnp.take(kernel, put_at(places, size, True, places.tap), axis=1, mode="clip")
    where, tap = (jnp.broadcast_to(v, places.dims).reshape(-1) for v in (places.where, places.tap))
    entries = jnp.zeros((kernel.shape[0], size), kernel.dtype).at[:, where]
    add = entries.max if kernel.dtype == jnp.bool_ else entries.add
    return add(jnp.take(kernel, tap, axis=1, mode="clip"), mode="drop")


def group_column(spec: ConvSpec, d: Ints) -> Ints:
    """What the group of out channel ``d`` adds to a column."""
    group = group_of(spec, d)
    return spec.column([group * 0] * len(spec.axes), group * spec.group_channels)


def entry_dtype(spec: ConvSpec) -> Any:
    """The narrowest integers that hold positions, and the numbers of entries."""
    wide = index_dtype(spec.stored_reach, spec)
    return wide if wide == jnp.int64 else spec.index_dtype


def part_count(spec: ConvSpec) -> int:
    """How many equal parts M is a stack of: the out channels, where they come first in ``out_shape``.

    The parts differ only in kernel values and in the channel group read.
    """
    return spec.out_channels if spec.out_order[-1] == 0 and spec.nse else 1


def axis_widths(axis: Axis) -> np.ndarray:
    """How many inputs each output of an axis reads."""
    widths = np.zeros(axis.out_size, np.int64)
    for run in output_runs(axis):
        widths[run.outputs.start : run.outputs.stop : run.outputs.step] = run.width
    return widths

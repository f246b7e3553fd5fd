"""The arrays of a sparse M in a program, as copies of few rows: what a CPU runs.

Away from the border, the outputs of one axis repeat (:func:`output_lines`). One output of each kind is a
*sample*. Of the outermost spatial axis of ``out_shape``, only the entries of samples are listed. Its other
outputs are copies of those that repeat, with columns and rows that move by a fixed step. So most of an array
is one broadcast, between what two borders hold, and XLA writes the concatenation of the three in one pass.

Nothing is scattered to make the list. The place of an entry (docs/maths.md, section 9) is solved for one axis
after the other: entry e belongs to pair ``e // unit`` of the axis, a pair tells its output, and what is left
of e is a place in the row. Tables of the samples say the rest: the tap, the column and the row of an entry
are sums of one term per axis. Out channels that come first, and channels that come last, share one list.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.axis import Axis, Ints
from jaxconv_fc.geometry.cache import bounded_cache
from jaxconv_fc.geometry.entries import entry_dtype, group_column, pairs
from jaxconv_fc.geometry.layout import column_of, inverse, row_of, spread, to_canonical
from jaxconv_fc.geometry.lines import output_lines
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.sharding import fenced

_SMALL = 2**11  # numbers in a table that a program may hold as a constant


class Samples(NamedTuple):
    """The pairs (output, input) of the samples of one axis, in order: tables (pairs,), and what repeats.

    Pairs ``first`` to ``first + cycle`` stand ``copies`` times in the list of all pairs of the axis. From one
    copy to the next, outputs move by ``period`` and inputs by ``advance``.
    """

    output: np.ndarray
    input: np.ndarray
    tap: np.ndarray  # through which it is read; where taps of the axis meet, the number of the pair itself
    start: np.ndarray  # how many pairs stand before those of the output
    width: np.ndarray  # how many inputs the output reads
    meeting: tuple[np.ndarray, np.ndarray] | None  # where taps meet: all taps of all pairs, and these pairs
    first: int
    cycle: int
    copies: int
    period: int
    advance: int

    @property
    def size(self) -> int:
        return len(self.output)


@bounded_cache
def _samples(axis: Axis) -> Samples:
    lines = output_lines(axis)
    outputs, taps, reads = pairs(axis, lines.samples)
    at, tables = reads.start + reads.rank, np.zeros((5, reads.total), np.int64)
    tables[:, at] = outputs, reads.t, taps, reads.start, reads.width
    if axis.collides:
        tables[2] = np.arange(reads.total)
    inside, period = lines.cycles, lines.period
    first, last = np.searchsorted(tables[0], [inside.start, inside.start + period]).tolist()
    return Samples(
        *tables,
        meeting=(taps, at) if axis.collides else None,
        first=first,
        cycle=last - first if inside else 0,
        copies=max(1, len(inside) // period),
        period=period,
        advance=period * axis.stride // axis.lhs_dilation,
    )


class Sum(NamedTuple):
    """A number that an entry has: one term per spatial axis, one of its out channel, one of its channel.

    The term of an axis is the sum of an output, an input and a tap, each times a weight.
    """

    output: Sequence[int]
    input: Sequence[int]
    tap: Sequence[int]
    out_channel: Callable[[jax.Array], Ints]
    channel: int  # a weight

    def of(self, samples: Samples, a: int) -> np.ndarray:
        """The terms of the pairs of the samples of axis ``a``."""
        return samples.output * self.output[a] + samples.input * self.input[a] + samples.tap * self.tap[a]

    def step(self, samples: Samples, a: int) -> int:
        """How far it moves from one copy on axis ``a`` to the next."""
        return self.output[a] * samples.period + self.input[a] * samples.advance


class Plan(NamedTuple):
    """The order of the list: rows, listed channels, then the inputs of a row; (channels, ...) share the list.

    A geometry without a plan has its channels between spatial axes.
    """

    spec: ConvSpec
    samples: tuple[Samples, ...]  # of each spatial axis
    rows: tuple[int, ...]  # the spatial axes of a row, outermost first
    inside: tuple[int, ...]  # the same within a row
    shared: tuple[int, int]  # how many out channels and channels share the list
    listed: tuple[int, int]  # how many are listed

    @property
    def copied(self) -> int:
        """The axis of which only the samples are listed."""
        return self.rows[0]

    @property
    def totals(self) -> list[int]:
        """Listed pairs of each axis."""
        totals = [axis.pair_count for axis in self.spec.axes]
        totals[self.copied] = self.samples[self.copied].size
        return totals


@bounded_cache
def plan_of(spec: ConvSpec) -> Plan | None:
    """How the entries are listed; None if this form has no list of them, or no small table of the samples."""
    n = len(spec.axes)
    rows = inverse(spec.out_order)
    batch = n if spec.batch_group_count > 1 else None  # a row reads one batch group
    inside = [a for a in inverse(spec.in_order) if a != batch]
    spatial = tuple(a for a in rows if a < n), tuple(a for a in inside if a < n)
    outer, inner = rows[0] == n, inside[-1] >= n
    between = rows[-1] == n or spec.out_channels == 1, inside[0] >= n or spec.group_channels == 1
    if not (n and (outer or between[0]) and (inner or between[1])):
        return None
    samples = tuple(map(_samples, spec.axes))
    if math.prod(one.size for one in samples) > _SMALL:
        return None
    d, i = spec.out_channels, spec.group_channels
    shared, listed = (d if outer else 1, i if inner else 1), (1 if outer else d, 1 if inner else i)
    return Plan(spec, samples, *spatial, shared, listed)


def _planned(spec: ConvSpec) -> Plan:
    plan = plan_of(spec)
    assert plan is not None  # the caller has asked
    return plan


# -- the arrays ------------------------------------------------------------------------------------


def list_of(spec: ConvSpec, count: int) -> jax.ShapeDtypeStruct:
    """The type of :func:`entries_of_samples`."""
    plan = plan_of(spec)
    size = 0 if plan is None else math.prod(plan.totals) * math.prod(plan.listed)
    return jax.ShapeDtypeStruct((size, count), entry_dtype(spec))


def entries_of_samples(spec: ConvSpec, count: int, _: jax.Array) -> jax.Array:
    """The list: (kernel entry, column) of the entries of the samples, or (kernel entry, row, column)."""
    sums = [_tap(spec), _row(spec), _column(spec)]
    return fenced(partial(_listed, _planned(spec), sums[:1] + sums[-count + 1 :]))


def data(spec: ConvSpec, kernel: jax.Array, listed: jax.Array) -> jax.Array:
    """The values of all entries, (nse,)."""
    plan, n = _planned(spec), len(spec.axes)
    values = to_canonical(kernel, spec.kernel_order)  # [p, i, d]
    for a, samples in enumerate(plan.samples):
        values = _met(samples, values, a)
    lead, tail = plan.shared
    order = (*([n + 1] if lead > 1 else []), *_listed_axes(plan), *([n] if tail > 1 else []))
    values = values.transpose(order).reshape(lead, -1, tail)
    return _copied(plan, fenced(_taken, values, listed[:, 0]), None).reshape(-1)


def columns(spec: ConvSpec, listed: jax.Array) -> jax.Array:
    """The columns of all entries, (nse,)."""
    return _numbers(spec, [_column(spec)], listed[:, 1:]).reshape(-1)


def indices(spec: ConvSpec, listed: jax.Array) -> jax.Array:
    """The rows and columns of all entries, (nse, 2)."""
    return _numbers(spec, [_row(spec), _column(spec)], listed[:, 1:]).reshape(-1, 2)


def _numbers(spec: ConvSpec, sums: Sequence[Sum], listed: jax.Array) -> jax.Array:
    plan = _planned(spec)
    lead, tail = plan.shared
    d, i = lax.iota(listed.dtype, lead)[:, None], lax.iota(listed.dtype, tail)[None]
    shared = [jnp.broadcast_to(one.out_channel(d) + i * one.channel, (lead, tail)) for one in sums]
    lines = listed[None, :, None] + jnp.stack(shared, -1)[:, None]  # [out channel, entry, channel, sum]
    steps = [one.step(plan.samples[plan.copied], plan.copied) for one in sums]
    return _copied(plan, lines, np.array(steps, listed.dtype))


def _listed_axes(plan: Plan) -> list[int]:
    """Axes of the kernel [p, i, d] that are listed, in the order in which the caller's kernel has them."""
    n, (lead, tail) = len(plan.samples), plan.shared
    listed = [*range(n), *([n] if tail == 1 else []), *([n + 1] if lead == 1 else [])]
    return sorted(listed, key=plan.spec.kernel_order.__getitem__)


def _tap(spec: ConvSpec) -> Sum:
    plan, n = _planned(spec), len(spec.axes)
    sizes = [axis.taps for axis in spec.axes] + [spec.group_channels, spec.out_channels]
    for a, samples in enumerate(plan.samples):
        sizes[a] = sizes[a] if samples.meeting is None else samples.size
    axes, weights = _listed_axes(plan), [0] * (n + 2)
    for k, a in enumerate(axes):
        weights[a] = math.prod(sizes[b] for b in axes[k + 1 :])
    return Sum([0] * n, [0] * n, weights[:n], lambda d: d * weights[n + 1], weights[n])


def _row(spec: ConvSpec) -> Sum:
    n = len(spec.axes)
    weights = [row_of(spec, _unit(n, a), int(a == n)) for a in range(n + 1)]
    return Sum(weights[:n], [0] * n, [0] * n, lambda d: d * weights[n], 0)


def _column(spec: ConvSpec) -> Sum:
    n = len(spec.axes)
    weights = [column_of(spec, _unit(n, a), 0) for a in range(n)]
    channel = column_of(spec, [0] * n, 1) if spec.group_channels > 1 else 0
    group = partial(group_column, spec) if spec.groups > 1 else lambda d: 0
    return Sum([0] * n, weights, [0] * n, group, channel)


def _unit(n: int, a: int) -> list[int]:
    return [int(b == a) for b in range(n)]


# -- the entries of the samples --------------------------------------------------------------------


def _met(samples: Samples, values: jax.Array, a: int) -> jax.Array:
    """The kernel with the pairs of axis ``a`` in place of its taps, if some of these meet: they are added."""
    if samples.meeting is None:
        return values
    taps, at = samples.meeting
    shape = (*values.shape[:a], samples.size, *values.shape[a + 1 :])
    target = jnp.zeros(shape, values.dtype).at[(slice(None),) * a + (at,)]
    return (target.max if values.dtype == jnp.bool_ else target.add)(jnp.take(values, taps, axis=a))


def _taken(values: jax.Array, index: jax.Array) -> jax.Array:
    """``values[:, index]``, [out channel, tap, channel] [entry] -> [out channel, entry, channel], in the
    order of the result: XLA would gather all out channels of an entry together, and transpose."""
    lead, count, tail = values.shape
    first = lax.iota(index.dtype, lead) * count
    rows = _gathered(values.reshape(-1, tail), (first[:, None] + index[None]).reshape(-1))
    return rows.reshape(lead, -1, tail)


def _listed(plan: Plan, sums: Sequence[Sum]) -> jax.Array:
    """These sums of all listed entries in order, (entries, sums)."""
    entries, channels = math.prod(plan.totals), math.prod(plan.listed)
    e = lax.iota(entry_dtype(plan.spec), entries * channels)
    moving = [
        k for k, one in enumerate(sums) if any(one.step(samples, a) for a, samples in enumerate(plan.samples))
    ]
    row = partial(_row_of_entry, plan, [sums[k] for k in moving])
    first, width, sample, *moved = _tabulated(row, entries, _quotient(e, channels))
    place = e - first * channels
    channel = _quotient(place, width) if channels > 1 else 0
    found = _looked_up(_tables(plan, sums), sample + place - channel * width)
    for k, term in zip(moving, moved, strict=False):  # nothing has moved where nothing is a copy
        found[k] = found[k] + term
    if channels > 1:
        terms = _tabulated(partial(_of_channel, plan, sums), channels, channel)
        found = [*map(operator.add, found, terms)]
    return jnp.stack(found, -1)


def _of_channel(plan: Plan, sums: Sequence[Sum], channel: Any) -> list[Any]:
    """The terms of an out channel and a channel, from the number of both together among those listed."""
    if plan.listed[0] == 1:
        return [channel * one.channel for one in sums]
    d = _quotient(channel, plan.listed[1])
    i = channel - _times(d, plan.listed[1])
    return [one.out_channel(d) + i * one.channel for one in sums]


def _row_of_entry(plan: Plan, sums: Sequence[Sum], e: Any) -> list[Any]:
    """Of the listed entries e of one channel: the first entry of its row, the width of the row, the first
    entry of the sample of the row among those of all samples, and what copies have moved each sum by."""
    totals, sizes = plan.totals, [one.size for one in plan.samples]
    place, sample, width = e, e, 1
    moved: list[Any] = []  # by copies: nothing, or each sum
    for k, a in enumerate(plan.rows):
        unit = _times(width, math.prod(totals[b] for b in plan.rows[k + 1 :]))
        steps = [one.step(plan.samples[a], a) for one in sums]
        output = partial(_output_of_pair, plan.samples[a], totals[a], steps if any(steps) else [])
        start, reads, at, *further = _tabulated(output, totals[a], _quotient(place, unit))
        place = place - _times(start, unit)
        before = _times(at, _times(width, math.prod(sizes[b] for b in plan.rows[k + 1 :])))
        sample = sample + before if k else before
        width = _times(reads, width)
        moved = [*map(operator.add, moved, further)] if moved and further else moved or further
    return [e - place, width, sample, *moved]


def _output_of_pair(samples: Samples, total: int, steps: Sequence[int], pair: Any) -> list[Any]:
    """Of a pair of the listed pairs of an axis, its output: how many pairs stand before it, its width, where
    its sample begins among those of the samples, and by how much its copy has moved, for each step."""
    if total == samples.size:  # the samples alone
        return _looked_up([samples.start, samples.width, samples.start], pair)
    # Pairs before all copies count as of the first one, those behind as of the last.
    copy = _quotient(pair - samples.first, samples.cycle)
    if isinstance(copy, np.ndarray):
        copy = copy.clip(0, samples.copies - 1)
    else:
        copy = lax.clamp(np.array(0, copy.dtype), copy, np.asarray(samples.copies - 1, copy.dtype))
    at, width = _looked_up([samples.start, samples.width], pair - copy * samples.cycle)
    return [at + copy * samples.cycle, width, at, *(copy * step for step in steps)]


def _tables(plan: Plan, sums: Sequence[Sum]) -> list[np.ndarray]:
    """Each sum, of all entries of one channel in the samples, in order."""
    grid = np.indices([one.size for one in plan.samples]).reshape(len(plan.samples), -1)
    outputs = [one.output[pair] for one, pair in zip(plan.samples, grid, strict=True)]
    keys = [*(outputs[a] for a in plan.rows), *(grid[a] for a in plan.inside)]
    grid = grid[:, np.lexsort(keys[::-1])]
    totals, found = plan.totals, [np.zeros(grid.shape[1], np.int64) for _ in sums]
    for a, (samples, pair) in enumerate(zip(plan.samples, grid, strict=True)):
        # Pairs behind all copies have moved with the last one. They keep their own positions.
        behind = (np.arange(samples.size) >= samples.first + samples.cycle) * (totals[a] > samples.size)
        for term, one in zip(found, sums, strict=True):
            term += (one.of(samples, a) - behind * (samples.copies - 1) * one.step(samples, a))[pair]
    return found


def _quotient(e: Any, size: Any) -> Any:
    """``e // size`` of numbers that are not negative. Of a negative one it may be 0."""
    if isinstance(e, np.ndarray):
        return e // size
    if isinstance(size, int):
        return e if size == 1 else lax.div(e, jnp.full_like(e, size))
    return lax.div(e, size)


def _times(e: Any, factor: Any) -> Any:
    return e if isinstance(factor, int) and factor == 1 else e * factor


def _tabulated(fn: Callable[[Any], list[Any]], size: int, index: Any) -> list[Any]:
    """``fn(index)``, of indices below ``size``: from a table, if that is small."""
    tables = [] if isinstance(index, np.ndarray) or size > _SMALL else fn(np.arange(size))
    return _looked_up(tables, index) if 0 < len(tables) * size <= _SMALL else fn(index)


_ROWS = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))


def _looked_up(tables: Sequence[np.ndarray], index: Any) -> list[Any]:
    """``[table[index] for table in tables]``, of indices that are within."""
    if isinstance(index, np.ndarray):
        return [table[index] for table in tables]
    rows = _gathered(np.stack(tables, -1).astype(index.dtype), index)
    return [rows[:, k] for k in range(len(tables))]


def _gathered(table: Any, index: jax.Array) -> jax.Array:
    """``table[index]``: rows of a table of two dimensions."""
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(table, index[:, None], _ROWS, (1, table.shape[1]), mode=mode)


# -- all entries -----------------------------------------------------------------------------------


def _copied(plan: Plan, lines: jax.Array, step: np.ndarray | None) -> jax.Array:
    """All entries from those of the samples, [out channel, entry, channel, ...]; copies move by ``step``."""
    samples, lead = plan.samples[plan.copied], lines.shape[0]
    lines = lines.reshape(
        lead, samples.size, -1, *lines.shape[3:]
    )  # [out channel, pair, entry of a pair, ...]
    if samples.copies == 1:
        return lines
    start, stop = samples.first, samples.first + samples.cycle
    shape = (lead, samples.copies, *lines[:, start:stop].shape[1:])
    copies = jnp.broadcast_to(lines[:, None, start:stop], shape)
    if step is not None:
        copy = lax.broadcasted_iota(lines.dtype, (1, samples.copies, *[1] * (len(shape) - 2)), 1)
        copies = copies + copy * spread(step, shape, len(shape) - 1)
    copies = copies.reshape(lead, -1, *shape[3:])
    return jnp.concatenate([lines[:, :start], copies, lines[:, stop:]], axis=1)

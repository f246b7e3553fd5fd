"""The arrays of a sparse M, written on the host by classes of outputs.

A class holds the outputs that read through the same taps (:func:`output_runs`). A product of classes, one per
axis, is one regular part of the arrays: a *block*. Within a block, the value of an entry depends only on the
out channel and on its place in the row. So the values of a block are one short row per out channel, repeated.
Where rows are short, whole *lines* of rows are repeated: NumPy copies few long runs faster than many short
ones. Where blocks are many and small, every entry is written to its place.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxconv_fc.axis import Axis
from jaxconv_fc.cache import bounded_cache
from jaxconv_fc.layout import column_of, inverse, spread
from jaxconv_fc.lines import Run, output_runs
from jaxconv_fc.sparse.entries import (
    axis_widths,
    entry_order,
    group_column,
    offset_in_row,
    part_count,
    row_pointers,
    row_starts,
)
from jaxconv_fc.spec import ConvSpec

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_SHARED = 2**18  # entries of a matrix that two threads fill
_PLANNED = 2**20  # values in the rows of all blocks of a matrix, whose plan is kept
_LISTED = 2**17  # entries of the first lines, whose taps are kept one by one
_KEPT_PART = 2**18  # entries of one part, whose columns are kept
_KEPT_LINES = 2**19  # entries of the first lines, whose columns are kept where those of a part are not
_SMALL_BLOCK = 2**13  # entries of a block: fewer take less time one by one than the block takes to make


def together(size: int, first: Callable[[], None], second: Callable[[], None]) -> None:
    """Do two jobs that fill arrays of this size: at once if these are large, else in turn."""
    if size < _SHARED:
        first()
        second()
        return
    done = _second_thread(os.getpid()).submit(second)
    first()
    if done.cancel():  # it has not begun: the thread is busy, or has no core
        second()
    else:
        done.result()


@lru_cache(1)
def _second_thread(process: int) -> ThreadPoolExecutor:
    """A thread that is kept: it starts a job in 20 us, a new thread takes 100.

    A forked process has no threads, so it makes its own. Jobs for a thread that is not there would pile up.
    """
    return ThreadPoolExecutor(1)


def fresh_arrays(*arrays: tuple[int, Any]) -> list[np.ndarray]:
    """1-D arrays of unset entries, from their sizes and dtypes. All are views of one block of memory.

    ``malloc`` gives a freed block again, with its pages in place, if it is the largest one of late (up to 32
    MB). Of two blocks of this size it hands one back to Linux, and writing to new pages takes six times as
    long. So call this in the thread of the caller as well: a new thread has no freed blocks.

    A large block lies in pages of ordinary size. ``np.empty`` asks Linux for huge pages. When Linux must
    first assemble them from pages that JAX has just freed, writing to them takes several times as long (up to
    ten times was measured).
    """
    nbytes = [size * np.dtype(dtype).itemsize for size, dtype in arrays]
    *starts, end = itertools.accumulate((-(-n // 64) for n in nbytes), initial=0)
    # In units of 64 bytes: SciPy copies an array that has less than half as many entries as its base.
    if end < 2**23 or sys.platform != "linux":
        block = np.empty(end, "V64")
    else:
        block = np.frombuffer(mmap.mmap(-1, 64 * end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), "V64")
    return [block[i:].view(dtype)[:size] for i, (size, dtype) in zip(starts, arrays, strict=True)]


# -- blocks ----------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A regular part of a list of entries.

    For a product of classes: (outputs as in ``out_shape``..., entries of a row).
    For a class of lines: (parts, lines, entries of a line).
    """

    start: int  # the first entry in the list
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in entries
    channel: int  # the dimension of the out channels, or parts

    def of(self, flat: np.ndarray) -> np.ndarray:
        """The view of these entries in a list."""
        size = flat.itemsize
        strides = [stride * size for stride in self.strides]
        return np.ndarray(self.shape, flat.dtype, flat, self.start * size, strides)  # type: ignore[arg-type]


def _classes(spec: ConvSpec) -> Iterator[tuple[Run, ...]]:
    """All products of classes of outputs; none where nothing is stored.

    The largest come first, so that memory pages are touched in sequence.
    """
    return itertools.product(*map(_ordered_runs, spec.axes)) if spec.nse else iter(())


def _ordered_runs(axis: Axis) -> list[Run]:
    return sorted(output_runs(axis), key=lambda run: -len(run.outputs))


def _block(spec: ConvSpec, runs: Sequence[Run], channels: int) -> Block:
    """The block of a product of classes in a list of the rows of the first out channels."""
    # The start of a row is linear in the starts of its axes. One call gives the start for those of the first
    # outputs, and then, for a step of one axis at a time, by how much it grows.
    first = [*(run.start for run in runs), 0]
    steps = np.diag([*(run.stride for run in runs), 1])  # [step of an axis or d, axes and d]
    *starts, d = np.vstack([first, steps]).T
    grown, size = row_starts(spec, [run.width for run in runs], starts, d)
    begin, *strides = np.asarray(grown).tolist()
    counts, order = [*(len(run.outputs) for run in runs), channels], inverse(spec.out_order)
    shape, strides = ([v[a] for a in order] for v in (counts, strides))
    return Block(begin, (*shape, size), (*strides, 1), spec.out_order[-1])


# -- lines -----------------------------------------------------------------------------------------


class Lines(NamedTuple):
    """The entries of M by lines, and the list of the first line of each class.

    A *line* holds the entries of one part of M and of one output of the outermost axis. In one part, all
    lines of a class have the same values. Their columns are those of the first line plus one number per line.
    """

    size: int  # entries of the list, for one part of M
    products: list[tuple[Run, ...]]  # the classes of outputs in the list: `start` is the place there
    blocks: tuple[tuple[Block, slice], ...]  # each class, (parts, lines, entries), and its place in the list
    moves: list[np.ndarray]  # of each class: what is added to the columns of the first line, (lines, 1)


def _part(spec: ConvSpec) -> Lines:
    """All entries of one part as one line."""
    parts = part_count(spec)
    size = spec.nse // parts
    whole = Block(0, (parts, 1, size), (size, size, 1), 0), slice(size)
    return Lines(size, list(_classes(spec)), (whole,), [np.zeros((1, 1), int)])


def _lines(spec: ConvSpec) -> Lines:
    """All entries, by lines. The largest classes come first."""
    if not spec.axes:
        return _part(spec)
    parts = part_count(spec)
    outer = next(a for a in inverse(spec.out_order) if a < len(spec.axes))
    unit = spec.nse // parts // spec.axes[outer].pair_count  # entries for each input that the output reads
    firsts, blocks, moves, used = [], [], [], 0
    for run in _ordered_runs(spec.axes[outer]):
        firsts.append(replace(run, outputs=run.outputs[:1], start=used))
        lines, size = len(run.outputs), run.width * unit
        block = Block(run.start * unit, (parts, lines, size), (spec.nse // parts, run.stride * unit, 1), 0)
        blocks.append((block, slice(used * unit, used * unit + size)))
        step = column_of(spec, [run.advance * (a == outer) for a in range(len(spec.axes))], 0)
        moves.append(step * np.arange(lines)[:, None])
        used += run.width
    runs = [firsts if a == outer else _ordered_runs(axis) for a, axis in enumerate(spec.axes)]
    return Lines(used * unit, list(itertools.product(*runs)), tuple(blocks), moves)


# -- values ----------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the values of some blocks come from the kernel. A row is a line in blocks of lines."""

    parts: int  # the kernel, with out channels first, is reshaped to (parts, kernel entries of a part)
    taps: np.ndarray  # (taps,): for the entries of one row of every block, the kernel entries in a part
    firsts: np.ndarray | None  # (row entries,): where in `taps` those of each begin; None if no taps meet
    blocks: tuple[tuple[Block, slice], ...]  # each block, and which row entries it repeats

    def rows(self, kernel: np.ndarray) -> np.ndarray:
        """The values of the row entries of all blocks: [part, row entry]."""
        # No tap is out of bounds. NumPy's mode "clip" is the fastest.
        values = kernel.reshape(self.parts, -1).take(self.taps, axis=1, mode="clip")
        if self.firsts is None:
            return values
        add = np.logical_or if kernel.dtype == bool else np.add
        return add.reduceat(values, self.firsts, axis=1, dtype=kernel.dtype)


def fill(
    spec: ConvSpec, tables: HostTables, kernel: np.ndarray, data: np.ndarray, columns: np.ndarray
) -> None:
    """Fill ``data``, from the kernel with out channels first, and ``columns``."""
    if tables.by_entry:
        fill_by_entry(spec, tables.groups, kernel, data, columns)
        return
    together(
        spec.nse,
        lambda: fill_values(spec, tables.plan, kernel, data),
        lambda: fill_columns(spec, tables, columns),
    )


def fill_values(spec: ConvSpec, plan: Plan | None, kernel: np.ndarray, data: np.ndarray) -> None:
    """Fill ``data`` with the entries, from the kernel with out channels first."""
    for part in [plan] if plan else (_plan(spec, [runs], spec.out_channels) for runs in _classes(spec)):
        _repeat(part, kernel, data)


def _repeat(plan: Plan, kernel: np.ndarray, data: np.ndarray) -> None:
    rows = plan.rows(kernel)
    for block, entries in plan.blocks:
        view = block.of(data)
        view[...] = spread(rows[:, entries], view.shape, block.channel, view.ndim - 1)


def _row_values(spec: ConvSpec) -> int:
    """How many values the rows of all blocks have together."""
    counts = [sum(len(run.taps) for run in output_runs(axis)) for axis in spec.axes]
    return spec.out_channels * spec.group_channels * math.prod(counts)


def _whole_plan(spec: ConvSpec) -> Plan:
    """The plan of all blocks."""
    lines = _lines(spec) if spec.nse and not spec.collides else None
    parts, products = part_count(spec), list(_classes(spec))
    # To gather an entry of the first lines takes about 1/20 of the time that a row of a block takes, and
    # 1/5000 of that of a block.
    if lines is None or lines.size > min(_LISTED, (5000 * len(products) + 20 * spec.out_size) // parts):
        return _plan(spec, products, spec.out_channels)
    # The values are the kernel entries of the list of the first lines, which is made as the values are.
    channels, taps = spec.out_channels // parts, np.empty(lines.size, np.intp)
    numbers = np.arange(math.prod(spec.rhs_shape) // parts)
    _repeat(_plan(spec, lines.products, channels), numbers, taps)
    return Plan(parts, taps, None, lines.blocks)


def _plan(spec: ConvSpec, products: Sequence[tuple[Run, ...]], channels: int) -> Plan:
    """The plan of the blocks of these products of classes, for the first out channels."""
    taps, firsts, blocks = [], [], []
    used, entries = 0, 0
    for runs in products:
        block = _block(spec, runs, channels)
        tap, place = _row_taps(spec, runs)
        taps.append(tap)
        firsts.append(used + np.flatnonzero(np.diff(place, prepend=-1)))
        size = block.shape[-1]
        blocks.append((block, slice(entries, entries + size)))
        used, entries = used + len(tap), entries + size
    none = [np.empty(0, np.intp)]
    meet = np.concatenate(firsts or none) if used > entries else None
    return Plan(channels, np.concatenate(taps or none), meet, tuple(blocks))


def _row_taps(spec: ConvSpec, runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """``(tap, place)`` of all kernel entries that a row reads, by place in the row.

    ``tap`` is the index among the kernel entries of one out channel.
    """
    dims = (*(len(run.taps) for run in runs), spec.group_channels)
    channel = spread(np.arange(spec.group_channels), dims, len(runs))
    taps = [spread(run.taps, dims, a) for a, run in enumerate(runs)]
    ranks = [np.repeat(np.arange(run.width), np.diff(run.firsts, append=len(run.taps))) for run in runs]
    ranks = [spread(rank, dims, a) for a, rank in enumerate(ranks)]
    tap = reduce(lambda index, a: index * spec.axes[a].taps + taps[a], range(len(runs)), channel)
    place = offset_in_row(spec, ranks, [run.width for run in runs], channel)
    tap, place = (np.broadcast_to(v, dims).ravel() for v in (tap, place))
    order = np.argsort(place, kind="stable")
    return tap[order], place[order]


# -- columns and row starts ------------------------------------------------------------------------


def fill_columns(spec: ConvSpec, tables: HostTables, columns: np.ndarray) -> None:
    """Fill ``columns``: all lines have the columns of the first ones, moved."""
    if tables.columns is None:  # the other parts have those of the first one, in their own channel group
        stack = columns.reshape(len(tables.groups), -1)  # [part, entry]
        _list_columns(spec, _classes(spec), stack[0])
        np.add(stack[0], tables.groups[1:], out=stack[1:])
        return
    for lines in tables.columns:
        np.add(lines.first, lines.moved, out=lines.block.of(columns))  # [entry] [part, line, 1]


def _list_columns(spec: ConvSpec, products: Iterable[tuple[Run, ...]], columns: np.ndarray) -> None:
    """The columns of some classes in one part: a term of the output plus a term of the place in the row."""
    n, dtype, channels = len(spec.axes), columns.dtype, spec.out_channels // part_count(spec)
    inputs = np.arange(spec.group_channels, dtype=dtype)
    for runs in products:
        block = _block(spec, runs, channels)
        widths = (*(run.width for run in runs), spec.group_channels)
        reads = [spread(run.reads.astype(dtype), widths, a) for a, run in enumerate(runs)]
        inside = np.broadcast_to(column_of(spec, reads, spread(inputs, widths, n)), widths)
        moved = [np.arange(len(run.outputs), dtype=dtype) * run.advance for run in runs]
        moved = [spread(v, block.shape, a) for a, v in zip(spec.out_order, moved, strict=False)]
        group = group_column(spec, np.arange(channels, dtype=dtype))
        outside = column_of(spec, moved, 0) + spread(group, block.shape, block.channel)
        np.add(outside, inside.transpose(entry_order(spec)).reshape(-1), out=block.of(columns))


# -- entry by entry ----------------------------------------------------------------------------------


def in_small_blocks(spec: ConvSpec) -> bool:
    """Whether blocks are many and small, as where the kernel is as large as the image, and no taps meet."""
    blocks = math.prod(len(output_runs(axis)) for axis in spec.axes)
    return spec.nse < _SMALL_BLOCK * blocks and not spec.collides


def fill_by_entry(
    spec: ConvSpec, groups: np.ndarray, kernel: np.ndarray, data: np.ndarray, columns: np.ndarray
) -> None:
    """Fill ``data``, from the kernel with out channels first, and ``columns``: each entry at its place.

    ``groups``: what is added in each part to the columns of the first part.
    """
    parts, n = len(groups), len(spec.axes)
    pairs = [_pairs(axis, groups.dtype) for axis in spec.axes]
    dims = (*(len(pair.t) for pair in pairs), spec.group_channels, spec.out_channels // parts)
    pairs = [Pairs(*(spread(v, dims, a) for v in pair)) for a, pair in enumerate(pairs)]
    rank, width = [pair.rank for pair in pairs], [pair.width for pair in pairs]
    i, d = (spread(np.arange(dims[a], dtype=groups.dtype), dims, a) for a in (n, n + 1))
    place = row_starts(spec, width, [pair.start for pair in pairs], d)[0]
    place = place + offset_in_row(spec, rank, width, i)
    place = np.broadcast_to(place, dims).ravel().astype(np.intp)
    tap = reduce(
        lambda index, a: index * spec.axes[a].taps + pairs[a].p, range(n), d * spec.group_channels + i
    )
    tap = np.broadcast_to(tap, dims).ravel().astype(np.intp)
    column = column_of(spec, [pair.t for pair in pairs], i) + group_column(spec, d)
    stack = columns.reshape(parts, -1)  # [part, entry]
    stack[0, place] = np.broadcast_to(column, dims).ravel()
    np.add(stack[0], groups[1:], out=stack[1:])
    for values, taps in zip(data.reshape(parts, -1), kernel.reshape(parts, -1), strict=True):
        values[place] = taps.take(tap, mode="clip")


class Pairs(NamedTuple):
    """All pairs of an output of an axis and an input that it reads, sorted: arrays (pairs,)."""

    t: np.ndarray  # the input
    p: np.ndarray  # the tap that reads it
    rank: np.ndarray  # how many inputs before t the output reads
    width: np.ndarray  # how many inputs the output reads
    start: np.ndarray  # how many pairs stand before those of the output


def _pairs(axis: Axis, dtype: Any) -> Pairs:
    o, t, p = axis.reads(np.arange(axis.out_size))
    order = np.argsort(o * axis.size + t, kind="stable")  # fast where they are in order, as in zeros mode
    o, t, p = (v[order] for v in (o, t, p))
    widths = np.bincount(o, minlength=axis.out_size)
    starts = (widths.cumsum() - widths)[o]
    return Pairs(*(v.astype(dtype) for v in (t, p, np.arange(len(o)) - starts, widths[o], starts)))


# -- what is kept of a geometry ----------------------------------------------------------------------


class LineColumns(NamedTuple):
    """The columns of one class of lines."""

    block: Block
    first: np.ndarray  # those of the first line in the first part of M: (entries of a line,)
    moved: np.ndarray  # what is added to them: (parts, lines, 1)


class HostTables(NamedTuple):
    """What depends on the geometry only. The arrays are shared: they must not be written to."""

    by_entry: bool  # instead of in blocks: then there is no plan, and no columns are kept
    plan: Plan | None  # None where it would be large
    columns: list[LineColumns] | None  # of each class of lines; None where they are large
    groups: np.ndarray  # (parts, 1): what is added in each part to the columns of the first part
    pointers: np.ndarray  # `indptr` of CSR, (out_size + 1,)
    empty: csr_array  # of this shape: a shallow copy takes less time than a new one


def _host_tables(spec: ConvSpec) -> HostTables:
    from scipy.sparse import csr_array

    parts, dtype = part_count(spec), np.int32 if spec.stored_reach <= np.iinfo(np.int32).max else np.int64
    widths = [axis_widths(axis).astype(dtype) for axis in spec.axes]
    starts = [w.cumsum(dtype=dtype) - w for w in widths]
    pointers = row_pointers(spec, widths, starts, np.arange(spec.out_channels, dtype=dtype))
    groups = group_column(spec, np.arange(parts, dtype=dtype))[:, None]
    empty = csr_array(spec.shape)
    empty.indptr = pointers  # not a second array of this size
    empty.has_canonical_format = True  # by construction; SciPy would check every entry
    planned = _row_values(spec) <= _PLANNED
    by_entry = not planned and in_small_blocks(spec)
    plan = _whole_plan(spec) if planned else None
    columns = None if by_entry else _kept_columns(spec, groups)
    return HostTables(by_entry, plan, columns, groups, pointers, empty)


def _kept_columns(spec: ConvSpec, groups: np.ndarray) -> list[LineColumns] | None:
    lines = _part(spec) if spec.nse <= _KEPT_PART * len(groups) else _lines(spec)
    if lines.size > _KEPT_LINES:
        return None
    columns = np.empty(lines.size, groups.dtype)
    _list_columns(spec, lines.products, columns)
    return [
        LineColumns(block, columns[entries].copy(), groups[:, None] + move.astype(groups.dtype))
        for (block, entries), move in zip(lines.blocks, lines.moves, strict=True)
    ]


host_tables = bounded_cache(_host_tables)

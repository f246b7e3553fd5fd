"""The arrays of a sparse M, written on the host by classes of outputs.

A class holds the outputs that read through the same taps (:func:`output_runs`). A product of classes, one per
axis, is one regular part of the arrays: a *block*. Within a block, the value of an entry depends only on the
out channel and on its place in the row. So the values of a block are one short row per out channel, repeated.
"""

from __future__ import annotations

import itertools
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

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

_LISTED = 2**16  # entries of a matrix whose taps are kept one by one: one gather is then faster than blocks
_PLANNED = 2**20  # values in the rows of all blocks of a matrix, whose plan is kept
_KEPT_COLUMNS = 2**20  # bytes of the columns of one part that are kept


def together(size: int, *jobs: Callable[[], Any]) -> None:
    """Do the jobs, which fill arrays of this size: large ones in a thread each, small ones in turn."""
    if size < 2**21:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(len(jobs)) as threads:
        for done in [threads.submit(job) for job in jobs]:
            done.result()


def fresh_memory(size: int, dtype: Any) -> np.ndarray:
    """An array of unset entries; a large one lies in pages of ordinary size.

    To be called in the thread of the caller: there ``malloc`` gives again the memory of earlier matrices, with
    its pages in place. A new thread has none. ``np.empty`` asks Linux for huge pages. When Linux must first
    assemble them from pages that JAX has just freed, writing to them takes several times as long (up to ten
    times was measured).
    """
    nbytes = size * np.dtype(dtype).itemsize
    if nbytes < 2**28 or sys.platform != "linux":
        return np.empty(size, dtype)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype)


# -- blocks ----------------------------------------------------------------------------------------


class Block(NamedTuple):
    """The entries of a product of classes in a list: (outputs as in ``out_shape``..., entries of a row)."""

    start: int  # the first entry in the list
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in entries
    channel: int  # the dimension of the out channels

    def of(self, flat: np.ndarray) -> np.ndarray:
        """The view of these entries in a list."""
        size = flat.itemsize
        strides = [stride * size for stride in self.strides]
        return np.ndarray(self.shape, flat.dtype, flat, self.start * size, strides)  # type: ignore[arg-type]


def _classes(spec: ConvSpec) -> Iterator[tuple[Run, ...]]:
    """All products of classes of outputs; none where nothing is stored.

    The largest come first, so that memory pages are touched in sequence.
    """
    ordered = [sorted(output_runs(axis), key=lambda run: -len(run.outputs)) for axis in spec.axes]
    return itertools.product(*ordered) if spec.nse else iter(())


def _block(spec: ConvSpec, runs: Sequence[Run], channels: int) -> Block:
    """The block of a product of classes in a list of the rows of the first out channels."""
    # The start of a row is linear in the starts of its axes. One call gives the start for those of the first
    # outputs, and then, for a step of one axis at a time, by how much it grows.
    first = [*(run.start for run in runs), 0]
    starts = [first, *np.diag([*(run.stride for run in runs), 1])]
    *starts, d = np.array(starts).T
    grown, size = row_starts(spec, [run.width for run in runs], starts, d)
    begin, *strides = np.asarray(grown).tolist()
    counts, order = [*(len(run.outputs) for run in runs), channels], inverse(spec.out_order)
    shape, strides = ([v[a] for a in order] for v in (counts, strides))
    return Block(begin, (*shape, size), (*strides, 1), spec.out_order[-1])


# -- values ----------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the values of some blocks come from the kernel."""

    parts: int  # the kernel, with out channels first, is taken as (parts, kernel entries of a part)
    taps: np.ndarray  # of the rows of all blocks, the kernel entries in a part, by row entry: (taps,)
    firsts: np.ndarray | None  # where in `taps` the sum of each row entry begins; None if no taps meet
    blocks: tuple[tuple[Block, slice], ...]  # with the row entries that each repeats

    def rows(self, kernel: np.ndarray) -> np.ndarray:
        """The values of the row entries of all blocks: [part, row entry]."""
        values = kernel.reshape(self.parts, -1).take(self.taps, axis=1)
        if self.firsts is None:
            return values
        add = np.logical_or if kernel.dtype == bool else np.add
        return add.reduceat(values, self.firsts, axis=1, dtype=kernel.dtype)


def fill_values(spec: ConvSpec, kernel: np.ndarray, data: np.ndarray) -> None:
    """Fill ``data`` with the entries, from the kernel with out channels first."""
    for plan in _plans(spec):
        _repeat(plan, kernel, data)


def _repeat(plan: Plan, kernel: np.ndarray, data: np.ndarray) -> None:
    rows = plan.rows(kernel)
    for block, entries in plan.blocks:
        view = block.of(data)
        view[...] = spread(rows[:, entries], view.shape, block.channel, view.ndim - 1)


def _plans(spec: ConvSpec) -> Iterator[Plan]:
    """One plan of all blocks, or one of each block where their rows together are large."""
    taps = [sum(len(run.taps) for run in output_runs(axis)) for axis in spec.axes]
    if spec.out_channels * spec.group_channels * math.prod(taps) <= _PLANNED:
        yield _whole_plan(spec)
    else:
        yield from (_plan(spec, [runs]) for runs in _classes(spec))


@bounded_cache
def _whole_plan(spec: ConvSpec) -> Plan:
    plan = _plan(spec, list(_classes(spec)))
    if spec.nse > _LISTED or plan.firsts is not None or not spec.nse:
        return plan
    # The values are the kernel entries of the list of all entries, which is made as the values are.
    parts = part_count(spec)
    taps, numbers = np.empty(spec.nse, np.intp), np.arange(math.prod(spec.rhs_shape))
    _repeat(plan, numbers, taps)
    size = spec.nse // parts
    return Plan(parts, taps[:size].copy(), None, ((Block(0, (parts, size), (size, 1), 0), slice(None)),))


def _plan(spec: ConvSpec, products: Sequence[tuple[Run, ...]]) -> Plan:
    taps, firsts, blocks = [], [], []
    used, entries = 0, 0
    for runs in products:
        block = _block(spec, runs, spec.out_channels)
        tap, place = _row_taps(spec, runs)
        taps.append(tap)
        firsts.append(used + np.flatnonzero(np.diff(place, prepend=-1)))
        size = block.shape[-1]
        blocks.append((block, slice(entries, entries + size)))
        used, entries = used + len(tap), entries + size
    none = [np.empty(0, np.intp)]
    meet = np.concatenate(firsts or none) if used > entries else None
    return Plan(spec.out_channels, np.concatenate(taps or none), meet, tuple(blocks))


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


def fill_columns(spec: ConvSpec, columns: np.ndarray) -> None:
    """Fill ``columns``: those of one part are listed, the other parts are that far from it."""
    parts = part_count(spec)
    stack = columns.reshape(parts, -1)
    if stack[0].nbytes <= _KEPT_COLUMNS:
        stack[0] = _kept_columns(spec, stack[0].size, columns.dtype)
    else:
        _list_columns(spec, stack[0])
    group = group_column(spec, np.arange(parts, dtype=columns.dtype)[1:, None])
    np.add(stack[0], group, out=stack[1:])


@bounded_cache
def _kept_columns(spec: ConvSpec, size: int, dtype: Any) -> np.ndarray:
    columns = np.empty(size, dtype)
    _list_columns(spec, columns)
    return columns


def _list_columns(spec: ConvSpec, columns: np.ndarray) -> None:
    """The columns of one part: one term depends on the output, the other on the place in the row."""
    n, dtype, channels = len(spec.axes), columns.dtype, spec.out_channels // part_count(spec)
    inputs = np.arange(spec.group_channels, dtype=dtype)
    for runs in _classes(spec):
        block = _block(spec, runs, channels)
        widths = (*(run.width for run in runs), spec.group_channels)
        reads = [spread(run.reads.astype(dtype), widths, a) for a, run in enumerate(runs)]
        inside = np.broadcast_to(column_of(spec, reads, spread(inputs, widths, n)), widths)
        moved = [np.arange(len(run.outputs), dtype=dtype) * run.advance for run in runs]
        moved = [spread(v, block.shape, a) for a, v in zip(spec.out_order, moved, strict=False)]
        group = group_column(spec, np.arange(channels, dtype=dtype))
        outside = column_of(spec, moved, 0) + spread(group, block.shape, block.channel)
        np.add(outside, inside.transpose(entry_order(spec)).reshape(-1), out=block.of(columns))


@bounded_cache
def host_row_pointers(spec: ConvSpec, dtype: Any) -> np.ndarray:
    """``indptr`` of CSR, (out_size + 1,)."""
    widths = [axis_widths(axis).astype(dtype) for axis in spec.axes]
    starts = [w.cumsum(dtype=dtype) - w for w in widths]
    return row_pointers(spec, widths, starts, np.arange(spec.out_channels, dtype=dtype))

"""The arrays of a sparse M, written on the host as copies of few templates.

Away from the border, the outputs of one axis repeat: they read through the same taps, in columns that move by
a fixed step (:func:`output_runs`). A *template* holds the entries of the first of such outputs. A *block* is
the part of the arrays that belongs to all of them. Its data are copies of the template's. Its columns are the
template's, plus one number per output.

The outputs of some outer axes vary in a block. With none, a whole part of M is one template: every value is
gathered from the kernel, and nothing is copied. With each further axis less is gathered, and more and shorter
runs are copied. :func:`host_plan` takes the cheapest.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxconv_fc.geometry.cache import bounded_cache
from jaxconv_fc.geometry.entries import (
    Reads,
    axis_widths,
    entries,
    group_column,
    pairs,
    place,
    row_pointers,
)
from jaxconv_fc.geometry.layout import column_of, inverse, part_count, spread, tap_in_part
from jaxconv_fc.geometry.lines import Run, output_runs
from jaxconv_fc.geometry.spec import ConvSpec

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_SHARED = 2**18  # entries of a matrix that two threads fill
_KEPT = 2**17  # entries of templates that are kept between calls
# What filling the arrays costs, in gathered entries: a run of copied entries, a block of them, an entry of a
# template that is not kept, and one of a template in which taps meet.
_RUN, _BLOCK, _UNKEPT, _ADDED = 120, 8000, 30, 10


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
    sizes = [(size, np.dtype(dtype)) for size, dtype in arrays]
    *starts, end = itertools.accumulate((-(-size * dtype.itemsize // 64) for size, dtype in sizes), initial=0)
    # In units of 64 bytes: SciPy copies an array that has less than half as many entries as its base.
    if end < 2**23 or sys.platform != "linux":
        block = np.empty(end, "V64")
    else:
        block = np.frombuffer(mmap.mmap(-1, 64 * end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), "V64")
    return [
        np.ndarray(size, dtype, block, 64 * start) for start, (size, dtype) in zip(starts, sizes, strict=True)
    ]


# -- templates -------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A regular part of the arrays, which repeats one template: (outputs of each varied axis, entries)."""

    start: int  # the first entry
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in entries
    template: slice  # its place in the list of all templates
    moved: np.ndarray  # what is added to its columns: (parts, outputs..., 1)

    def of(self, stack: np.ndarray) -> np.ndarray:
        """The view of this block in every row of [part, entry]."""
        size = stack.itemsize
        strides = [stack.strides[0], *[stride * size for stride in self.strides]]
        return np.ndarray((len(stack), *self.shape), stack.dtype, stack, self.start * size, strides)  # type: ignore


class Plan(NamedTuple):
    """How the arrays of a geometry are written. Its arrays are shared: they must not be written to.

    All parts of M (:func:`part_count`) have the same templates, each filled from its own kernel entries.
    """

    taps: np.ndarray  # (entries of all templates,): a kernel entry, by its number in the part
    # Where taps meet: the entries of several taps, all their taps, and where those of each entry begin.
    meeting: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    columns: np.ndarray  # those of the templates; of all entries of the first part if these are few
    blocks: tuple[Block, ...]
    groups: np.ndarray  # (parts, 1): what is added in each part to the columns of the first
    alike: bool  # that is 0 for all parts
    pointers: np.ndarray  # `indptr` of CSR, (out_size + 1,)
    empty: csr_array  # of this shape: a shallow copy takes less time than a new one

    def fill(self, kernel: np.ndarray, data: np.ndarray, columns: np.ndarray) -> None:
        """Fill ``data``, from the kernel as :func:`kernel_parts` has it, and ``columns``."""
        data, columns = (v.reshape(len(self.groups), -1) for v in (data, columns))
        together(data.size, lambda: self.fill_data(kernel, data), lambda: self.fill_columns(columns))

    def fill_data(self, kernel: np.ndarray, data: np.ndarray) -> None:
        whole = len(self.taps) == data.shape[1]  # a part is one template
        # No tap is out of bounds. NumPy's mode "clip" is the fastest.
        values = kernel.take(self.taps, axis=1, mode="clip", out=data if whole else None)
        if self.meeting is not None:
            entries, taps, firsts = self.meeting
            add = np.logical_or if kernel.dtype == bool else np.add
            values[:, entries] = add.reduceat(kernel.take(taps, axis=1), firsts, axis=1, dtype=kernel.dtype)
        for block in () if whole else self.blocks:
            view = block.of(data)
            view[...] = spread(values[:, block.template], view.shape, 0, view.ndim - 1)

    def fill_columns(self, columns: np.ndarray) -> None:
        if len(self.columns) == columns.shape[1]:
            if self.alike:  # a copy takes a third of the time of a sum
                columns[...] = self.columns
            else:
                np.add(self.columns, self.groups, out=columns)
            return
        for block in self.blocks:
            np.add(self.columns[block.template], block.moved, out=block.of(columns))


@bounded_cache
def host_plan(spec: ConvSpec) -> Plan:
    """The cheapest plan. It is kept between calls if it is small."""
    parts, classes, costs = part_count(spec), _classes(spec), []
    entries, lines, blocks = spec.nse // parts, parts, 1  # of the templates; copied runs; blocks
    for runs in [None, *classes.values()]:
        if runs is not None:
            entries //= sum(len(run.outputs) * run.width for run in runs)
            entries *= sum(run.width for run in runs)
            lines *= sum(len(run.outputs) for run in runs)
            blocks *= len(runs)
        copied = 0 if runs is None else spec.nse // 3 + _RUN * lines + _BLOCK * blocks
        gathered = parts * entries * (_ADDED if spec.collides else 1)
        built = entries * _UNKEPT if entries > _KEPT else 0
        costs.append(gathered + copied + built)
    return _plan(spec, costs.index(min(costs)))


def _classes(spec: ConvSpec) -> dict[int, list[Run]]:
    """The classes of outputs of the spatial axes that may vary in a block, by number, outermost first.

    They stand before the channels in ``out_shape``, or the channels before all. The largest classes come
    first, so that memory pages are touched in sequence.
    """
    order = inverse(spec.out_order)[spec.out_order[-1] == 0 :]
    outer = itertools.takewhile(lambda a: a < len(spec.axes), order) if spec.nse else ()
    return {a: sorted(output_runs(spec.axes[a]), key=lambda run: -len(run.outputs)) for a in outer}


def _plan(spec: ConvSpec, depth: int) -> Plan:
    """The plan in which the outputs of so many outer axes vary."""
    from scipy.sparse import csr_array

    n, parts = len(spec.axes), part_count(spec)
    dtype = np.int32 if spec.stored_reach <= np.iinfo(np.int32).max else np.int64
    varied = dict(itertools.islice(_classes(spec).items(), depth))
    # The entries of all templates, [a triple (o, t, p) of each axis, i, d].
    triples = [
        pairs(
            axis, np.array([run.outputs[0] for run in varied[a]]) if a in varied else np.arange(axis.out_size)
        )
        for a, axis in enumerate(spec.axes)
    ]
    dims = (*(len(p) for _, p, _ in triples), spec.group_channels, spec.out_channels // parts)
    i, d = (spread(np.arange(dims[a]), dims, a) for a in (n, n + 1))
    positions, taps = ([spread(triple[k], dims, a) for a, triple in enumerate(triples)] for k in (0, 1))
    reads = [triple[2].each(lambda v, a=a: spread(v, dims, a)) for a, triple in enumerate(triples)]
    at = entries(spec, dims, positions, d, i, taps, reads)
    where, tap = (
        np.broadcast_to(v, dims).ravel() for v in (place(spec, reads, d, i), tap_in_part(spec, at.tap))
    )
    size = math.prod((*(read.total for read in reads), *dims[n:]))
    columns = np.empty(size, dtype)
    columns[where] = np.broadcast_to(at.column, dims).ravel()
    values, meeting = np.empty(size, np.intp), None
    values[where] = tap
    if len(where) > size:  # some taps meet
        order = np.argsort(where, kind="stable")
        where, tap = where[order], tap[order]
        several = np.bincount(where) > 1
        shared = several[where]
        firsts = np.flatnonzero(np.diff(where[shared], prepend=-1))
        meeting = np.flatnonzero(several), tap[shared], firsts
    # What `indptr` needs of every axis, and a matrix with nothing to check.
    widths = [axis_widths(axis).astype(dtype) for axis in spec.axes]
    rows = [
        Reads(0, True, 0, width, width.cumsum(dtype=dtype) - width, axis.pair_count)
        for axis, width in zip(spec.axes, widths, strict=True)
    ]
    empty = csr_array(spec.shape)
    # Not a second array of this size.
    empty.indptr = row_pointers(spec, rows, np.arange(spec.out_channels, dtype=dtype))
    empty.has_canonical_format = True  # by construction; SciPy would check every entry
    groups = group_column(spec, np.arange(parts, dtype=dtype))[:, None]
    blocks = tuple(_blocks(spec, varied, size, groups))
    plan = Plan(values, meeting, columns, blocks, groups, not groups.any(), empty.indptr, empty)
    if size < (entries_of_part := spec.nse // parts) <= _KEPT:
        whole = np.empty((1, entries_of_part), dtype)
        for block in blocks:
            np.add(columns[block.template], block.moved[:1], out=block.of(whole))
        plan = plan._replace(columns=whole[0])
    return plan


def _blocks(spec: ConvSpec, varied: dict[int, list[Run]], size: int, groups: np.ndarray) -> Iterator[Block]:
    """All products of classes, one of each varied axis. The templates have ``size`` entries."""
    # Of each varied axis: the pairs in M, the pairs in the templates, and those before each class there.
    every = [spec.axes[a].pair_count for a in varied]
    firsts = [[*itertools.accumulate((run.width for run in runs), initial=0)] for runs in varied.values()]
    kept = [first.pop() for first in firsts]
    inner = size // math.prod(kept) if size else 0  # entries for one pair of each varied axis
    for chosen in itertools.product(*map(zip, varied.values(), firsts)):
        # As in `place`: the entries for one pair of the axis, times all pairs of those behind it.
        start, first, width, strides = 0, 0, inner, []
        for k, (run, before) in enumerate(chosen):
            unit = width * math.prod(every[k + 1 :])
            start, first = start + run.start * unit, first + before * width * math.prod(kept[k + 1 :])
            strides.append(run.stride * unit)
            width *= run.width
        shape = (*(len(run.outputs) for run, _ in chosen), width)
        moves: list[Any] = [0] * len(spec.axes)
        for k, (a, (run, _)) in enumerate(zip(varied, chosen, strict=True)):
            moves[a] = spread(run.advance * np.arange(len(run.outputs), dtype=groups.dtype), shape, k)
        moved = column_of(spec, moves, 0) + spread(groups[:, 0], (1, *shape), 0)
        yield Block(start, shape, (*strides, 1), slice(first, first + width), moved)

"""The arrays of a sparse M, written on the host by classes of outputs.

A class holds the outputs that read through the same taps (:func:`output_runs`). A product of classes, one per
axis, is one regular part of the arrays.
"""

from __future__ import annotations

import itertools
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxconv_fc.layout import column_of, inverse, spread
from jaxconv_fc.lines import Run, output_runs
from jaxconv_fc.sparse.entries import entry_order, group_column, part_count, row_starts
from jaxconv_fc.spec import ConvSpec


def together(size: int, *jobs: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """The arrays that the jobs make, of this size: large ones in a thread each, small ones in turn."""
    if size < 2**18:
        return [job() for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as threads:
        return [made.result() for made in [threads.submit(job) for job in jobs]]


def fresh_memory(size: int, dtype: Any) -> np.ndarray:
    """An array of unset entries; a large one lies in pages of ordinary size.

    ``np.empty`` asks Linux for huge pages. When Linux must first assemble them from pages that JAX has just
    freed, writing to them takes several times as long (up to ten times was measured).
    """
    nbytes = size * np.dtype(dtype).itemsize
    if nbytes < 2**28 or sys.platform != "linux":
        return np.empty(size, dtype)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype)


def fill_values(spec: ConvSpec, kernel: np.ndarray, data: np.ndarray) -> np.ndarray:
    """``data`` filled with the entries, from the kernel with out channels first.

    Within a product of classes, a value depends only on the out channel and on the place in the row.
    """
    order = entry_order(spec)
    for runs in _classes(spec):
        block = kernel  # [d, i, p]
        for a, run in enumerate(runs):
            block = _fold(block, 2 + a, run)  # at last [d, i, t]: inputs read in place of taps
        block = np.moveaxis(block, 1, -1).transpose(0, *(1 + a for a in order))
        part = _part(spec, runs, data)
        block = block.reshape(spec.out_channels, -1)  # [d, entry of the row]
        part[...] = spread(block, part.shape, spec.out_order[-1], part.ndim - 1)
    return data


def fill_columns(spec: ConvSpec, columns: np.ndarray) -> np.ndarray:
    """``columns`` filled: one term depends on the output, the other on the place in the row."""
    n, dtype, parts = len(spec.axes), columns.dtype, part_count(spec)
    channels = np.arange(spec.group_channels, dtype=dtype)
    group = group_column(spec, np.arange(spec.out_channels, dtype=dtype))
    for runs in _classes(spec):
        part = _part(spec, runs, columns)
        part = part[:1] if parts > 1 else part
        widths = (*(run.width for run in runs), spec.group_channels)
        reads = [spread(run.reads.astype(dtype), widths, a) for a, run in enumerate(runs)]
        inside = np.broadcast_to(column_of(spec, reads, spread(channels, widths, n)), widths)
        moved = [np.arange(len(run.outputs), dtype=dtype) * run.advance for run in runs]
        moved = [spread(v, part.shape, a) for a, v in zip(spec.out_order, moved, strict=False)]
        outside = column_of(spec, moved, 0)
        if parts == 1:
            outside = outside + spread(group, part.shape, spec.out_order[-1])
        np.add(outside, inside.transpose(entry_order(spec)).reshape(-1), out=part)
    if parts > 1:
        stack = columns.reshape(parts, -1)
        np.add(stack[0], group[1:, None], out=stack[1:])
    return columns


def _classes(spec: ConvSpec) -> Iterator[tuple[Run, ...]]:
    """All products of classes of outputs; none where nothing is stored.

    The largest come first, so that memory pages are touched in sequence.
    """
    ordered = [sorted(output_runs(axis), key=lambda run: -len(run.outputs)) for axis in spec.axes]
    return itertools.product(*ordered) if spec.nse else iter(())


def _part(spec: ConvSpec, runs: Sequence[Run], flat: np.ndarray) -> np.ndarray:
    """The entries of a product of classes: a view, (outputs as in ``out_shape``..., entries of a row)."""
    widths = [run.width for run in runs]
    counts = [*(len(run.outputs) for run in runs), spec.out_channels]
    first, size = row_starts(spec, widths, [run.start for run in runs], 0)
    steps, strides = [*(run.stride for run in runs), 1], []
    order = inverse(spec.out_order)
    for a in order:  # the start of a row is linear in the starts of its axes
        *unit, channel = (step if a == b else 0 for b, step in enumerate(steps))
        strides.append(row_starts(spec, widths, unit, channel)[0] * flat.itemsize)
    shape = (*(counts[a] for a in order), size)
    return np.lib.stride_tricks.as_strided(flat[first:], shape, (*strides, flat.itemsize))


def _fold(kernel: np.ndarray, axis: int, run: Run) -> np.ndarray:
    """The kernel with inputs read in place of taps along one axis; taps that read the same one are added."""
    kernel = kernel.take(run.taps, axis)
    if len(run.taps) == run.width:
        return kernel
    add = np.logical_or if kernel.dtype == bool else np.add
    return add.reduceat(kernel, run.firsts, axis, dtype=kernel.dtype)

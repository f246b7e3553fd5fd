"""How many entries of M are stored in each block of a grid, without looking at any of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from jaxconv_fc.axis import Axis
from jaxconv_fc.lines import Run, output_runs
from jaxconv_fc.spec import ConvSpec

_BLOCK = 2**20  # segments that are listed together

# Per dimension of a shape an interval of indices: (starts, stops), two arrays with one entry per edge.
Intervals = list[tuple[np.ndarray, np.ndarray]]
# (x, y) -> a matrix: the number of pairs (o, t) of a relation with o < x[i] and t < y[j].
Cumulative = Callable[[np.ndarray, np.ndarray], np.ndarray]


def stored_counts(spec: ConvSpec, row_edges: np.ndarray, column_edges: np.ndarray) -> np.ndarray:
    """``counts[i, j]``: how many entries ``M[row_edges[i]:row_edges[i+1], column_edges[j]:...]`` stores.

    Take the place of a neuron in the ravel and its index, one number per dimension. A place is smaller than x
    if its index agrees with that of x in the first j dimensions and is smaller in the next, for one level j.
    So for each level, the indices of smaller places are a product of intervals. M is a product of relations,
    one per axis, hence::

        #(row < x, column < y) = sum over levels j, k of  product over axes of  #(pairs in O_j x I_k)
    """
    counts = np.zeros((len(row_edges), len(column_edges)))
    if spec.nse:
        rows, columns = _levels(row_edges, spec.out_shape), _levels(column_edges, spec.in_shape)
        relations = [_between(rows, columns, *relation) for relation in _relations(spec)]
        for j in range(len(rows)):
            for k in range(len(columns)):
                counts += math.prod(pairs(j, k) for pairs in relations)
    return np.diff(np.diff(counts, axis=0), axis=1)


def _levels(edges: np.ndarray, shape: Sequence[int]) -> list[Intervals]:
    """The products of intervals whose union are the places below each edge, in the ravel of ``shape``."""
    digits = [edges // math.prod(shape[i + 1 :]) % (n if i else n + 1) for i, n in enumerate(shape)]
    zero = np.zeros_like(edges)
    return [
        [
            (x, x + 1) if i < level else (zero, x if i == level else zero + n)
            for i, (x, n) in enumerate(zip(digits, shape, strict=True))
        ]
        for level in range(len(shape))
    ]


def _relations(spec: ConvSpec) -> Iterator[tuple[int | None, int, Cumulative]]:
    """The factors of M: a dimension of ``out_shape``, one of ``in_shape``, and the pairs of their indices."""
    for out_dim, in_dim, axis in zip(spec.out_order, spec.in_order, spec.axes, strict=False):
        yield out_dim, in_dim, partial(_pairs_of_axis, axis)
    out_channels, (*batch, in_channels) = spec.out_order[-1], spec.in_order[len(spec.axes) :]
    block = spec.out_channels // spec.groups
    if batch:  # group g reads batch entry g, and all its channels
        yield out_channels, batch[0], partial(_pairs_of_groups, spec.groups, block, 1)
        yield None, in_channels, np.multiply.outer
    else:
        yield out_channels, in_channels, partial(_pairs_of_groups, spec.groups, block, spec.group_channels)


def _between(
    rows: list[Intervals], columns: list[Intervals], out_dim: int | None, in_dim: int, below: Cumulative
) -> Callable[[int, int], np.ndarray]:
    """``pairs(j, k)``: how many pairs of a relation lie in its intervals of level j and level k, a matrix."""
    whole = [(np.zeros(1, int), np.ones(1, int))]
    outputs = [level[out_dim] for level in rows] if out_dim is not None else whole * len(rows)
    inputs = [level[in_dim] for level in columns]
    x, y = (np.unique(np.concatenate([b for bounds in side for b in bounds])) for side in (outputs, inputs))
    table = below(x, y)

    def pairs(j: int, k: int) -> np.ndarray:
        o, t = (np.searchsorted(x, b) for b in outputs[j]), (np.searchsorted(y, b) for b in inputs[k])
        (first, last), (start, stop) = o, t
        strip = table[last] - table[first]  # (row edges, y)
        return strip[:, stop] - strip[:, start]  # (row edges, column edges)

    return pairs


def _pairs_of_axis(axis: Axis, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The pairs (o, t) of an axis, counted in the blocks between the bounds and summed up."""
    counts = np.zeros((len(x) + 1, len(y) + 1))
    for run in output_runs(axis):
        step = max(1, _BLOCK // (len(x) + len(y)))
        for first in range(0, run.width, step):
            o, t, pairs = _segments(run, run.reads[first : first + step, None], x, y)
            np.add.at(counts, (np.searchsorted(x, o, "right"), np.searchsorted(y, t, "right")), pairs)
    return counts.cumsum(0).cumsum(1)[:-1, :-1]


def _segments(run: Run, reads: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """``(o, t, pairs)``: the first pair and the number of pairs that follow one another within one block.

    The outputs ``o = start + q*step`` of the run read ``t = reads + q*advance``: one diagonal for each of the
    ``reads``. A diagonal enters another block where o or t reaches a bound.
    """
    last, step = len(run.outputs), run.outputs.step
    if last == 1:
        return np.broadcast_to(run.outputs.start, reads.shape), reads, np.ones(reads.shape)
    bounds = np.broadcast_to(-((run.outputs.start - x) // step), (len(reads), len(x)))
    bounds = np.concatenate([bounds, -((reads - y) // run.advance)], axis=1)  # ceil((y - reads) / advance)
    q = np.sort(np.clip(bounds, 0, last), axis=1)
    q = np.concatenate([np.zeros((len(reads), 1), int), q], axis=1)
    pairs = np.diff(q, axis=1, append=last)  # (reads, segments)
    return run.outputs.start + q * step, reads + q * run.advance, pairs


def _pairs_of_groups(groups: int, outs: int, ins: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The pairs (d, c) of channels of one group: #(d < x) times #(c < y), summed over the groups."""
    outputs, inputs = (
        np.clip(bounds[:, None] - np.arange(groups) * size, 0, size).astype(float)  # [bound, group]
        for bounds, size in ((x, outs), (y, ins))
    )
    return outputs @ inputs.T

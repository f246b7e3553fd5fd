"""How many entries of M are stored in each block of a grid, without looking at any of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.geometry.spec import ConvSpec

_BLOCK = 2**20  # pairs of an output and a tap that are listed together

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
    """The pairs (o, t) of an axis with ``o < x[i]`` and ``t < y[j]``: those of outputs that read no copies by
    a closed form, the others one by one."""
    if axis.pads_with_zeros and axis.stride < axis.lhs_dilation:  # fewer residues that way round
        return _pairs_of_axis(axis.transpose(), y, x).T
    direct, counts = axis.direct, np.zeros((len(x), len(y)))
    inside = np.clip(x, direct.start, direct.stop)[:, None]
    for c, phase in enumerate(axis.on_padded.polyphase()):  # outputs c, c + period, ...
        inner = phase.axis
        for sign, bound in ((1, inside), (-1, np.array([[direct.start]]))):
            outputs = np.maximum(0, -((c - bound) // axis.out_period))
            # Output q of them reads input  q*stride + p*dilation - lo - copied  through tap p.
            for of, edge in ((sign, y[None]), (-sign, np.zeros((1, 1), int))):
                edge = edge + inner.lo + axis.copied[0]
                counts += of * _windows_below(edge, inner.stride, outputs, inner.rhs_dilation, inner.taps)
    border = axis.border(direct)
    check_array("show.spy: pairs of an output and a tap", (len(border), axis.taps), np.int64, "zero padding")
    blocks = np.zeros((len(x) + 1, len(y) + 1))
    step = max(1, _BLOCK // axis.taps)
    for first in range(0, len(border), step):
        some = border[first : first + step]
        t = np.sort(axis.table(some), axis=1)
        i, p = np.nonzero((t >= 0) & (np.diff(t, axis=1, prepend=-1) > 0))  # each pair once
        place = np.searchsorted(x, some[i], "right") * blocks.shape[1] + np.searchsorted(y, t[i, p], "right")
        blocks += np.bincount(place, minlength=blocks.size).reshape(blocks.shape)
    return counts + blocks.cumsum(0).cumsum(1)[:-1, :-1]


def _windows_below(bound: np.ndarray, s: int, outputs: np.ndarray, r: int, taps: int) -> np.ndarray:
    """How many pairs ``0 <= q < outputs``, ``0 <= p < taps`` have ``q*s + p*r < bound``."""
    some = np.minimum(outputs, np.maximum(0, -(-bound // s)))  # outputs for which some tap is below
    every = np.minimum(some, np.maximum(0, -(((taps - 1) * r - bound) // s)))  # outputs for which all are
    # The outputs between have ceil((bound - q*s) / r) such taps each. The sum begins with the last of them.
    last = bound - (some - 1) * s
    return taps * every + _floor_sum(some - every, s, last + r - 1, r)


def _floor_sum(count: np.ndarray, a: int, b: np.ndarray, divisor: int) -> np.ndarray:
    """``sum of (a*x + b) // divisor`` over ``0 <= x < count``, for ``a, b >= 0``.

    The points below a line are counted as in Euclid's algorithm: take out whole multiples, exchange
    the two axes, repeat.
    """
    total = np.zeros((), int)
    while np.any(count > 0):
        total = total + a // divisor * (count * (count - 1) // 2) + b // divisor * count
        top = a % divisor * count + b % divisor
        count, b = top // divisor, top % divisor
        a, divisor = divisor, a % divisor
    return total


def _pairs_of_groups(groups: int, outs: int, ins: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The pairs (d, c) of channels of one group: #(d < x) times #(c < y), summed over the groups."""
    outputs, inputs = (
        np.clip(bounds[:, None] - np.arange(groups) * size, 0, size).astype(float)  # [bound, group]
        for bounds, size in ((x, outs), (y, ins))
    )
    return outputs @ inputs.T

"""The entries of M in order, as a concatenation of regular pieces: what a TPU runs in place of a scatter.

Neighbouring outputs of one axis that read equally many inputs are a *segment*. For one segment per axis, the
entries are a regular array (outputs and d as in out_shape, entries of a row). Its last dimension is one row
of M. The entry of rank j on an axis is what M would have at position j of a smaller axis, so the values are
those of :func:`jaxconv_fc.selects.selected` with ranks in place of input positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.axis import Axis
from jaxconv_fc.layout import column_of, in_channel, inverse, row_of, spread
from jaxconv_fc.lines import output_lines
from jaxconv_fc.selects import Columns, selected
from jaxconv_fc.sparse.entries import axis_reads, axis_widths, entry_dtype, entry_order
from jaxconv_fc.spec import ConvSpec

_MOST_PIECES = 256  # of which a program consists at most

# Of each spatial axis, its outputs in one piece.
Piece = dict[int, range]


def are_few(spec: ConvSpec) -> bool:
    """Whether the entries are few pieces. Otherwise (kernels as large as the image) they are scattered."""
    counts = [sum(map(len, segments(axis))) for axis in spec.axes]
    return math.prod(counts) <= _MOST_PIECES


def values(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The entries of M, (nse,)."""
    dtype = entry_dtype(spec)
    ranks = []
    for axis in spec.axes:
        reads = axis_reads(axis, dtype)
        ranks.append(jnp.where(reads.valid, reads.rank, jnp.full_like(reads.rank, -1)))

    def piece(outputs: Piece) -> jax.Array:
        tables = [rank[_slice(outputs[a])] for a, rank in enumerate(ranks)]
        return selected(spec, kernel, tables, _row(spec, outputs))

    return _in_order(spec, piece)


def rows(spec: ConvSpec) -> jax.Array:
    """The row of every entry of M, (nse,)."""

    def piece(outputs: Piece) -> jax.Array:
        dims, positions, d = _rows_of(spec, outputs)
        return jnp.broadcast_to(row_of(spec, positions, d), (*dims, _row(spec, outputs).size))

    return _in_order(spec, piece)


def columns(spec: ConvSpec) -> jax.Array:
    """The column of every entry of M, (nse,)."""
    dtype = entry_dtype(spec)
    reads = [axis_reads(axis, dtype) for axis in spec.axes]

    def piece(outputs: Piece) -> jax.Array:
        dims, _, d = _rows_of(spec, outputs)
        row = _row(spec, outputs)
        sources = []
        for a, (t, valid, rank, _, _) in enumerate(reads):
            t, valid, rank = (v[_slice(outputs[a])][..., None] for v in (t, valid, rank))  # [o, p, 1]
            here = valid & (rank == row.places[a][None, None])  # [o, p, e]
            source = jnp.where(here, t, jnp.full_like(t, -1)).max(1)  # [o, e]
            sources.append(spread(source, (*dims, row.size), spec.out_order[a], len(dims)))
        i = lax.iota(dtype, row.size) // row.step % spec.group_channels
        i = spread(i, (*dims, row.size), len(dims))
        return jnp.broadcast_to(column_of(spec, sources, in_channel(spec, d, i)), (*dims, row.size))

    return _in_order(spec, piece)


def segments(axis: Axis) -> list[list[range]]:
    """The outputs that read inputs, in order: segments, each as ranges of one length that take turns."""
    lines, widths = output_lines(axis), axis_widths(axis)
    period, inside = lines.period, lines.cycles
    if period == 1:
        return _equal(widths, 0, axis.out_size)
    turns = [[part for c in range(period) if widths[(part := inside[c::period]).start]]] if inside else []
    return [*_equal(widths, 0, inside.start), *turns, *_equal(widths, inside.stop, axis.out_size)]


def _equal(widths: np.ndarray, start: int, stop: int) -> list[list[range]]:
    """Outputs ``start`` to ``stop``, cut where the width changes."""
    cuts = start + 1 + np.flatnonzero(np.diff(widths[start:stop]))
    ends = [start, *cuts.tolist(), stop]
    return [[range(a, b)] for a, b in itertools.pairwise(ends) if a < b and widths[a]]


def _in_order(spec: ConvSpec, piece: Callable[[Piece], jax.Array]) -> jax.Array:
    """The pieces [outputs and d as in out_shape, e], each entry at its place in the list of all."""

    def listed(outputs: Piece, order: Sequence[int]) -> jax.Array:
        """[dimensions of out_shape already chosen, entries]."""
        if not order:
            return piece(outputs)
        a, *rest = order
        if a == len(spec.axes):
            return _merged([listed(outputs, rest)])
        merged = [
            _merged([listed({**outputs, a: part}, rest) for part in turns])
            for turns in segments(spec.axes[a])
            if turns
        ]
        return jnp.concatenate(merged, axis=-1)

    return listed({}, inverse(spec.out_order))


def _merged(parts: Sequence[jax.Array]) -> jax.Array:
    """[..., output, entries] of parts that take turns -> [..., entries]."""
    joined = jnp.concatenate(parts, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


def _slice(outputs: range) -> slice:
    return slice(outputs.start, outputs.stop, outputs.step)


def _rows_of(spec: ConvSpec, outputs: Piece) -> tuple[tuple[int, ...], list[jax.Array], jax.Array]:
    """``(dims, positions, d)`` of the rows of a piece; the arrays broadcast over (dims, e)."""
    n, dtype = len(spec.axes), entry_dtype(spec)
    counts = [*(len(outputs[a]) for a in range(n)), spec.out_channels]
    dims = tuple(counts[a] for a in inverse(spec.out_order))
    steps = [*((outputs[a].start, outputs[a].step) for a in range(n)), (0, 1)]
    *positions, d = (
        spread(lax.iota(dtype, count) * step + start, (*dims, 1), at)
        for count, (start, step), at in zip(counts, steps, spec.out_order, strict=True)
    )
    return dims, positions, d


def _row(spec: ConvSpec, outputs: Piece) -> Columns:
    """The entries of one row of a piece, by rank per axis and channel of the group."""
    n, dtype = len(spec.axes), entry_dtype(spec)
    sizes = [int(axis_widths(axis)[outputs[a].start]) for a, axis in enumerate(spec.axes)]
    sizes.append(spec.group_channels)
    steps, size = [0] * (n + 1), 1
    for a in reversed(entry_order(spec)):
        steps[a], size = size, size * sizes[a]
    e = lax.iota(dtype, size)
    places = [e // step % count for step, count in zip(steps[:n], sizes[:n], strict=True)]
    return Columns(size, places, sizes[:n], None, steps[n])

"""The builders as selects: what a TPU runs in place of scatter and gather.

A TPU compares whole arrays fast and moves single entries slowly. So here no entry is moved. Every entry of M
is compared with every tap that could fill it, and takes the value of the tap that does.

The *table* of an axis holds the input position that output o reads through tap p, and -1 where it reads
padding. Let column e of M stand for position ``t_a(e)`` on axis a and for channel ``i(e)`` of group ``g(e)``.
Then M comes from the kernel in one step per axis, in which outputs take the place of taps::

    A_0[p_1, p_2, d, e] = kernel[d, i(e), p_1, p_2]                                  if g(e) is the group of d
    A_1[o_1, p_2, d, e] = sum over p_1 of  A_0[p_1, p_2, d, e]  where  table_1[o_1, p_1] == t_1(e),  else of 0
    A_2[o_1, o_2, d, e] = sum over p_2 of  A_1[o_1, p_2, d, e]  where  table_2[o_2, p_2] == t_2(e),  else of 0

A_2 is M. Several axes with few taps together are one step: their outputs, taps and positions are pairs. A
step is linear, and JAX transposes it to a masked sum over outputs. Nothing is multiplied, so an Inf or NaN
tap fills its own entries only. Where taps meet in one entry they are added, and bools are or-ed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.geometry.entries import reading
from jaxconv_fc.geometry.layout import (
    column_of,
    grid,
    group_of,
    in_channel,
    inverse,
    split_column,
    split_tap,
    spread,
    to_canonical,
)
from jaxconv_fc.geometry.spec import ConvSpec

_MOST_TAPS = 32  # in one step of several axes, and in an update without a second M


class Relation(NamedTuple):
    """What one spatial axis, or several together, read."""

    table: jax.Array  # (outputs, taps): number of the position that is read; -1 where none is
    positions: int  # how many positions there are
    place: jax.Array  # (columns,): the position of each column

    def and_then(self, other: Relation) -> Relation:
        """Both together: outputs, taps and positions are pairs, in row-major order."""
        (m, k), (n, l) = self.table.shape, other.table.shape
        first, second = self.table[:, None, :, None], other.table[None, :, None, :]
        table = jnp.where((first < 0) | (second < 0), -1, first * other.positions + second)  # [o, o', p, p']
        place = self.place * other.positions + other.place
        return Relation(table.reshape(m * n, k * l), self.positions * other.positions, place)


# -- M, its update and its transpose ---------------------------------------------------------------


def matrix(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """M, from a kernel of shape ``spec.rhs_shape``."""
    return _selected(spec, kernel, None)


def updated(spec: ConvSpec, old: jax.Array, kernel: jax.Array) -> jax.Array:
    """M, with the values of ``old`` (spec.shape) in place of its structural zeros."""
    return _selected(spec, kernel, old)


def sums(spec: ConvSpec, cotangent: jax.Array) -> jax.Array:
    """The transpose of :func:`matrix`: for every kernel entry, the sum of the entries of M that it fills."""
    if cotangent.dtype == jnp.bool_:  # JAX does not transpose `or`
        return sums(spec, cotangent.astype(jnp.int32)) > 0
    kernel = jax.ShapeDtypeStruct(spec.rhs_shape, cotangent.dtype)
    return jax.linear_transpose(partial(matrix, spec), kernel)(cotangent)[0]


def _selected(spec: ConvSpec, kernel: jax.Array, old: jax.Array | None) -> jax.Array:
    """M. Entries that no tap fills are those of ``old``, or 0 without it."""
    places, channel = split_column(spec, lax.iota(spec.index_dtype, spec.in_size))  # of every column e
    groups = group_of(spec, lax.iota(channel.dtype, spec.out_channels))  # of every row channel d
    own = groups[:, None] == (channel // spec.group_channels)[None]  # [d, e]
    order = inverse(spec.out_order)  # dimensions of out_shape: spatial axes by number, and `d` after the last
    steps = _steps(spec, places, order)
    taps = [step.table.shape[1] for step in steps if step is not None]
    heights = [spec.out_channels if step is None else 1 for step in steps]
    values = _spread_kernel(spec, kernel, order)  # [taps of all axes, d, e]
    values = values.reshape(*taps, *heights, spec.in_size)  # of two steps: [p_1, p_2, 1, d, 1, e]
    for at, step in enumerate(steps):
        if step is None:
            continue
        lead = values.ndim - len(steps) - 1  # dimensions of taps: those of this step first
        place = jnp.where(own, step.place[None], jnp.full_like(step.place, -2)[None])  # -2: of another group
        # The comparison must depend on d. Else XLA stores its results, an array 1/O of the size of M per tap.
        place = spread(
            lax.optimization_barrier(place), values.shape, lead + steps.index(None), values.ndim - 1
        )
        table = spread(step.table.T, values.shape, 0, lead + at)
        if old is None or lead > 1:
            values = _chosen(table, place, values)
        else:
            values = _written(table, place, values, old, _read_before(steps, at))
    return values.reshape(spec.shape)


def _steps(spec: ConvSpec, places: Sequence[jax.Array], order: Sequence[int]) -> list[Relation | None]:
    """The dimensions of the rows: relations of neighbouring spatial axes, and None for the out channel."""
    steps: list[Relation | None] = []
    for a in order:
        relation = None
        if a < len(spec.axes):
            axis = spec.axes[a]
            o, p = grid((axis.out_size, axis.taps), spec.index_dtype)
            relation = Relation(reading(axis, o, p), axis.size, places[a])
            last = steps[-1] if steps else None
            if last is not None and last.table.shape[1] * relation.table.shape[1] <= _MOST_TAPS:
                steps.pop()
                relation = last.and_then(relation)
        steps.append(relation)
    if len(steps) == 1:  # no spatial axis: one output reads one position
        steps.append(Relation(jnp.zeros((1, 1), jnp.int32), 1, jnp.zeros(spec.in_size, jnp.int32)))
    return steps


def _spread_kernel(spec: ConvSpec, kernel: jax.Array, order: Sequence[int]) -> jax.Array:
    """``[p, d, e] = kernel[d, i(e), p]``, with the taps in this order of their axes."""
    n = len(spec.axes)
    values = to_canonical(kernel, spec.kernel_order)  # [p, i, d]
    values = values.transpose(*(a for a in order if a < n), n + 1, n)  # [p, d, i]
    step = (
        column_of(spec, [0] * n, 1) if spec.group_channels > 1 else 1
    )  # from one channel of a group to the next
    shape = *values.shape[:-1], spec.in_size // (spec.group_channels * step), spec.group_channels, step
    # [p, d, 1, i, 1] -> [p, d, outer, i, step] -> [p, d, e]
    return jnp.broadcast_to(values[..., None, :, None], shape).reshape(*values.shape[:-1], spec.in_size)


def _chosen(table: jax.Array, place: jax.Array, values: jax.Array) -> jax.Array:
    """The sum over the first dimension, the taps, of the values where ``table == place``; `or` of bools."""
    terms = jnp.where(table == place, values, jnp.zeros((), values.dtype))
    return terms.any(0) if terms.dtype == jnp.bool_ else terms.sum(0, dtype=terms.dtype)


def _written(
    table: jax.Array, place: jax.Array, values: jax.Array, old: jax.Array, inside: jax.Array
) -> jax.Array:
    """The last step, with ``old`` where no tap is. ``inside``: every step before has a tap there."""
    if len(values) > _MOST_TAPS:
        new, written = _chosen(table, place, values), (table == place).any(0)
    else:  # tap by tap: XLA writes a donated M in place only if no reduction is in the way
        zero = jnp.zeros((), values.dtype)
        hits = [row == place[0] for row in table]
        chosen = [jnp.where(hit, value, zero) for hit, value in zip(hits, values, strict=True)]
        add = operator.or_ if values.dtype == jnp.bool_ else operator.add
        new, written = reduce(add, chosen), reduce(operator.or_, hits)
    # The barrier keeps the comparison and the reshaped M in one loop.
    return jnp.where(written & inside, new, lax.optimization_barrier(old.reshape(new.shape)))


def _read_before(steps: Sequence[Relation | None], last: int) -> jax.Array:
    """[outputs of each step or 1, e]: whether all steps before the last one have a tap there."""
    dims = (1,) * (len(steps) + 1)
    inside = jnp.ones(dims, bool)
    for at, step in enumerate(steps[:last]):
        if step is not None:
            hit = (step.table[..., None] == step.place[None, None]).any(1)  # [o, e]
            inside = inside & spread(hit, dims, at, len(steps))
    return inside


# -- the kernel matrix -----------------------------------------------------------------------------


def kernel_matrix(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """X, from an input of shape ``spec.in_shape``.

    Column f of X stands for kernel entry ``(d(f), i(f), p_a(f))``. Per axis, outputs take the place of the
    input positions: ``A[o, f] = sum over t of A[t, f] where t is what o reads through p_a(f), else of 0``.
    """
    f = lax.iota(spec.index_dtype, math.prod(spec.rhs_shape))
    taps, i, d = split_tap(spec, f)
    channels = to_canonical(x, spec.in_order)
    channels = channels.reshape(*channels.shape[: len(spec.axes)], spec.in_channels)  # [t, c]
    values = jnp.moveaxis(channels, -1, 0)[..., None]  # [c, t, 1]
    c = spread(lax.iota(f.dtype, spec.in_channels), values.shape, 0)
    source = spread(in_channel(spec, d, i), values.shape, values.ndim - 1)
    values = _chosen(c, source, values)  # [t, f]
    values = values.transpose(*(a for a in inverse(spec.out_order) if a < len(spec.axes)), -1)
    for a in inverse(spec.out_order):
        if a == len(spec.axes):
            continue
        axis = spec.axes[a]
        source = reading(axis, lax.iota(f.dtype, axis.out_size)[:, None], taps[a][None])  # [o, f]
        values = values[..., None, :]  # [t_a, other t, earlier o, 1, f] -> [other t, earlier o, o_a, f]
        source = spread(source, values.shape, values.ndim - 2, values.ndim - 1)
        values = _chosen(spread(lax.iota(f.dtype, axis.size), values.shape, 0), source, values)
    inner = math.prod(spec.out_shape[spec.out_order[-1] + 1 :])
    values = values.reshape(-1, 1, inner, len(f))  # [outer, 1, inner, f], the rows of M around their channel
    own = lax.iota(f.dtype, spec.out_channels)[None, :, None, None] == d[None, None, None]  # [1, d, 1, f]
    return jnp.where(own, values, jnp.zeros((), x.dtype)).reshape(spec.out_size, len(f))

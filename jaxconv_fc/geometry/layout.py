"""The orders of dimensions and their inverses, grids of indices, the kernel and its groups.

The *canonical* order of an input is (spatial..., batch groups, channels), of an output (spatial...,
channels), of a kernel (taps..., channels of a group, out channels). ``ConvSpec.in_order``, ``out_order`` and
``kernel_order`` give the places of these dimensions in the caller's arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.axis import Ints
from jaxconv_fc.geometry.spec import ConvSpec

_Kernel = TypeVar("_Kernel", jax.Array, np.ndarray)


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(len(order)), key=order.__getitem__)


def to_canonical(value: jax.Array, order: Sequence[int]) -> jax.Array:
    """An array in the caller's layout, in canonical order. Leading batch axes stay in front."""
    lead = value.ndim - len(order)
    return jnp.transpose(value, (*range(lead), *(lead + i for i in order)))


def from_canonical(value: jax.Array, order: Sequence[int]) -> jax.Array:
    """The inverse of :func:`to_canonical`."""
    return to_canonical(value, inverse(order))


def grid(dims: Sequence[int], dtype: Any, xp: Any = jnp) -> list[Any]:
    """One index array per dimension, of size 1 along all others. Inside a trace they are no constants."""
    shapes = [tuple(n if a == i else 1 for a, n in enumerate(dims)) for i in range(len(dims))]
    if xp is np:
        return [np.arange(math.prod(shape), dtype=dtype).reshape(shape) for shape in shapes]
    return [lax.broadcasted_iota(dtype, shape, i) for i, shape in enumerate(shapes)]


def spread(table: Any, dims: Sequence[int], *axes: int) -> Any:
    """A table whose axes become the named ``axes`` of an array of this rank; all others have size 1."""
    shape = [1] * len(dims)
    for size, a in zip(table.shape, axes, strict=False):
        shape[a] = size
    return table.reshape(shape)


def taps(spec: ConvSpec) -> tuple[int, ...]:
    """The kernel size along each spatial axis."""
    return tuple(axis.taps for axis in spec.axes)


def out_first(spec: ConvSpec, kernel: _Kernel) -> _Kernel:
    """The kernel as (out channels, channels of a group, taps...)."""
    return kernel.transpose(spec.dimension_numbers.rhs_spec)


def from_out_first(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The inverse of :func:`out_first`."""
    return from_canonical(kernel, spec.dimension_numbers.rhs_spec)


def by_group(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The kernel as (group, out channel, in channel, taps...)."""
    kernel = out_first(spec, kernel)
    return kernel.reshape(spec.groups, kernel.shape[0] // spec.groups, *kernel.shape[1:])


def group_of(spec: ConvSpec, d: Ints) -> Ints:
    """The group of out channel ``d``."""
    return d // max(1, spec.out_channels // spec.groups) if spec.groups > 1 else d * 0


def in_channel(spec: ConvSpec, d: Ints, i: Ints) -> Ints:
    """The number, among all input channels, of channel ``i`` of the group of out channel ``d``."""
    return group_of(spec, d) * spec.group_channels + i if spec.groups > 1 else i


# M has parts that differ only in kernel values and in the channel group they read: one block of rows per out
# channel if channels come first in ``out_shape``. Else there is one part, the whole of M.


def part_count(spec: ConvSpec) -> int:
    return spec.out_channels if spec.out_order[-1] == 0 and spec.nse else 1


def kernel_parts(spec: ConvSpec, kernel: _Kernel) -> _Kernel:
    """The kernel as (parts, kernel entries of a part)."""
    parts, out = part_count(spec), spec.dimension_numbers.rhs_spec[0]
    others = [i for i in range(len(spec.rhs_shape)) if i != out]
    return (kernel if parts == 1 else kernel.transpose(out, *others)).reshape(parts, -1)


def tap_in_part(spec: ConvSpec, tap: Ints) -> Ints:
    """The number in its part of a kernel entry, from its index in ``kernel.ravel()``."""
    parts, inner = part_count(spec), math.prod(spec.rhs_shape[spec.dimension_numbers.rhs_spec[0] + 1 :])
    return tap if parts == 1 else tap // (parts * inner) * inner + tap % inner


# -- neurons and taps by number --------------------------------------------------------------------


def row_of(spec: ConvSpec, positions: Sequence[Ints], channel: Ints) -> Ints:
    """The row of M of these spatial positions of output channel ``channel``."""
    *spatial, feature = _strides(spec.out_shape, spec.out_order)
    return sum((o * s for o, s in zip(positions, spatial, strict=True)), channel * feature)


def split_row(spec: ConvSpec, row: Ints) -> tuple[list[Ints], Ints]:
    """``(positions, channel)`` of a row: the inverse of :func:`row_of`."""
    *spatial, feature = _strides(spec.out_shape, spec.out_order)
    positions = [row // s % a.out_size for s, a in zip(spatial, spec.axes, strict=True)]
    return positions, row // feature % spec.out_channels


def column_of(spec: ConvSpec, positions: Sequence[Ints], channel: Ints) -> Ints:
    """The column of M of these spatial positions of input channel ``channel``."""
    *spatial, batch, feature = _in_strides(spec)
    if spec.batch_group_count == 1:
        index = channel * feature
    else:
        channels = spec.in_channels // spec.batch_group_count
        index = channel // channels * batch + channel % channels * feature
    return sum((t * s for t, s in zip(positions, spatial, strict=True)), index)


def split_column(spec: ConvSpec, column: Ints) -> tuple[list[Ints], Ints]:
    """``(positions, channel)`` of a column: the inverse of :func:`column_of`."""
    *spatial, batch, feature = _in_strides(spec)
    channels = spec.in_channels // spec.batch_group_count
    positions = [column // s % a.size for s, a in zip(spatial, spec.axes, strict=True)]
    group = column // batch % spec.batch_group_count if batch else 0
    return positions, group * channels + column // feature % channels


def tap_of(spec: ConvSpec, taps: Sequence[Ints], channel: Ints, out_channel: Ints) -> Ints:
    """Index in ``kernel.ravel()`` of these taps, for channel ``channel`` of a group."""
    strides = _strides(spec.rhs_shape, spec.kernel_order)
    return sum((v * s for v, s in zip((*taps, channel, out_channel), strides, strict=True)), 0)


def split_tap(spec: ConvSpec, tap: Ints) -> tuple[list[Ints], Ints, Ints]:
    """``(taps, channel, out_channel)`` of an index in ``kernel.ravel()``: the inverse of :func:`tap_of`."""
    sizes = [spec.rhs_shape[i] for i in spec.kernel_order]
    strides = _strides(spec.rhs_shape, spec.kernel_order)
    *taps, channel, out_channel = (tap // s % n for s, n in zip(strides, sizes, strict=True))
    return taps, channel, out_channel


def _in_strides(spec: ConvSpec) -> list[int]:
    """Strides in columns of M: (spatial..., batch groups, channels), 0 if there are no batch groups."""
    strides = _strides(spec.in_shape, spec.in_order)
    return strides if spec.batch_group_count > 1 else [*strides[:-1], 0, strides[-1]]


def _strides(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """Row-major strides, in entries, of the axes in this order."""
    return [math.prod(shape[i + 1 :]) for i in order]

"""The orders of dimensions and their inverses, grids of indices, the kernel and its groups.

The *canonical* order of an input is (spatial..., batch groups, channels), of an output (spatial...,
channels), of a kernel (taps..., channels of a group, out channels). ``ConvSpec.in_order``, ``out_order`` and
``kernel_order`` give the places of these dimensions in the caller's arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.axis import Ints
from jaxconv_fc.spec import ConvSpec

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


def extent(dims: Sequence[int], axis: int) -> tuple[int, ...]:
    """``dims`` with every size 1 but that of one axis."""
    return tuple(n if i == axis else 1 for i, n in enumerate(dims))


def grid(dims: Sequence[int], dtype: Any) -> list[jax.Array]:
    """One index array per dimension, of size 1 along all others. Inside a trace they are no constants."""
    return [lax.broadcasted_iota(dtype, extent(dims, i), i) for i in range(len(dims))]


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
    return d // max(1, spec.out_channels // spec.groups)


def in_channel(spec: ConvSpec, d: Ints, i: Ints) -> Ints:
    """The number, among all input channels, of channel ``i`` of the group of out channel ``d``."""
    return group_of(spec, d) * spec.group_channels + i

"""What a platform says about itself, and what the forms of several platforms share.

A :class:`Forms` is the record of one platform: everything that depends on where a program runs. Each platform
has a file with its record: cpu.py, gpu.py, tpu.py. The table of all is in platforms.py.

Canonical arrays are x [n, t, g*i], y [n, o, g*e] and k [p, i, g*e]: example n, group g, its in channel i and
out channel e; input positions t, output positions o and taps p, each one dimension per spatial axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.spec import ConvSpec


class Call(NamedTuple):
    """What a product is told beside its axes and arrays."""

    groups: int
    precision: Any
    channels_first: bool  # in the caller's arrays channels stand before positions


class Decomposition(NamedTuple):
    """``A = U diag(s) V^H`` for every matrix of a batch, with ``k = min(rows, columns)``."""

    left: jax.Array  # U, [..., row, k]
    values: jax.Array  # s, [..., k], real and descending
    right: jax.Array  # V^H, [..., k, column]


class Forms(NamedTuple):
    """What one platform does. No array of a product is empty; its axes pad with zeros."""

    # (axes, x, k, call) -> y, [n, t, g*i] [p, i, g*e] -> [n, o, g*e]
    correlate: Callable[[Sequence[Axis], jax.Array, jax.Array, Call], jax.Array]
    # (axes, x, y, call) -> k, [n, t, g*i] [n, o, g*e] -> [p, i, g*e]; each axis has the taps as its outputs
    kernel_gradient: Callable[[Sequence[Axis], jax.Array, jax.Array, Call], jax.Array]
    # (axis, x, dim) -> x: the transpose of padding with copies; each copy is added to its source
    fold: Callable[[Axis, jax.Array, int], jax.Array]
    # [..., row, column] -> the decomposition of every matrix; NaN for one that is not finite
    svd: Callable[[jax.Array], Decomposition]
    singular_values: Callable[[jax.Array], jax.Array]  # [..., row, column] -> [..., k]: its values alone
    method: Callable[[ConvSpec, int, Any], str]  # (spec, examples, dtype) -> the way of batched_apply
    column_bytes: int | None  # that a matrix product may write in a convolution of many columns; None: all


# -- what is read ----------------------------------------------------------------------------------


def moved_by(
    axes: Sequence[Axis], tap: Sequence[int], value: jax.Array, first: int, fill: Any = 0
) -> jax.Array:
    """What each output reads through one tap, on the dimensions of ``value`` from ``first`` on.

    It is ``fill`` where the tap reads nothing.
    """
    pads = [(0, 0, 0)] * value.ndim
    starts, stops, steps = [0] * value.ndim, list(value.shape), [1] * value.ndim
    for i, (axis, p) in enumerate(zip(axes, tap, strict=True), start=first):
        # Output o reads position  start + o*stride  of the dilated axis.
        start, reach = p * axis.rhs_dilation - axis.lo, (axis.out_size - 1) * axis.stride + 1
        high = start + reach - axis.dilated_size
        pads[i] = (max(0, -start), max(0, high), axis.lhs_dilation - 1)
        starts[i], stops[i], steps[i] = max(0, start), max(0, start) + reach, axis.stride
    if any(map(any, pads)):
        value = lax.pad(value, jnp.asarray(fill, value.dtype), pads)
    return lax.slice(value, starts, stops, steps)


def windows(x: jax.Array, dim: int, axis: Axis) -> jax.Array:
    """[..., t, ...] -> [..., o, p, ...]: the input that output o reads through tap p, or 0."""
    o, p = lax.iota(jnp.int32, axis.out_size), lax.iota(jnp.int32, axis.taps)
    t, valid = axis.input_of(o[:, None], p[None])
    return jnp.take(x, jnp.where(valid, t, axis.size), axis=dim, mode="fill", fill_value=0)


# -- input dilation --------------------------------------------------------------------------------


def by_residues(
    axes: Sequence[Axis], batch: int, rhs: jax.Array, window: Callable[[Sequence[Axis], jax.Array], jax.Array]
) -> jax.Array:
    """[n, out..., d] of a batch of this size, by correlations without input dilation.

    ``window(inner, kernel)`` is such a correlation: it makes [n, q..., d*residues] with a kernel
    [fewer taps..., c, d*residues]. Outputs of one residue per axis form an ordinary convolution
    (docs/maths.md, section 8). Residues with the same relation differ only in their taps, so they are
    computed as more output channels.
    """
    if all(axis.lhs_dilation == 1 for axis in axes):
        return window([axis.ending_at(axis.out_size) for axis in axes], rhs)
    dims, features = len(axes), rhs.shape[-1]
    phases = [axis.polyphase() for axis in axes]
    families = [  # of each axis, lists of residues with equal relations
        [[c for c, phase in enumerate(found) if phase.axis == axis] for axis in {p.axis: None for p in found}]
        for found in phases
    ]

    def block(choice: Sequence[list[int]]) -> jax.Array:
        """[n, q..., d, residues...] of one family of residues per axis: output ``c + L*q`` for residue c."""
        inner = [phases[i][family[0]].axis for i, family in enumerate(choice)]
        result = (batch, *(a.out_size for a in inner), features, *map(len, choice))
        if not all(a.taps for a in inner):  # outputs that fall between all inputs
            return jnp.zeros(result, rhs.dtype)
        kernel = rhs
        for i, family in enumerate(choice):  # [taps..., c, d] -> [fewer taps..., c, d, residues...]
            read = [slice(taps.start, taps.stop, taps.step) for taps in (phases[i][c].taps for c in family)]
            kernel = jnp.stack([kernel[(slice(None),) * i + (taps,)] for taps in read], axis=-1)
        kernel = kernel.reshape(*kernel.shape[: dims + 1], -1)  # [taps..., c, d * residues]
        return window(inner, kernel).reshape(result)

    def assemble(choice: tuple[list[int], ...]) -> jax.Array:
        """[n, q..., d, residues...]: those of ``choice`` on the first axes, all in order on the others."""
        i = len(choice)
        if i == dims:
            return block(choice)
        parts = [assemble((*choice, family)) for family in families[i]]
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(list(itertools.chain.from_iterable(families[i])))
        return jnp.take(jnp.concatenate(parts, axis=2 + dims + i), order, axis=2 + dims + i)

    # [n, q1, q2, ..., d, c1, c2, ...] -> [n, q1, c1, q2, c2, ..., d] -> [n, out1, out2, ..., d]: o = q*L + c
    y = assemble(())
    beside = [axis for i in range(dims) for axis in (1 + i, 2 + dims + i)]
    y = jnp.transpose(y, (0, *beside, 1 + dims))
    y = y.reshape(batch, *(p[0].axis.out_size * len(p) for p in phases), features)
    return y[(slice(None), *(slice(a.out_size) for a in axes))]  # without the spare outputs


# -- copies ----------------------------------------------------------------------------------------


def fold(axis: Axis, x: jax.Array, dim: int) -> jax.Array:
    """The transpose of padding dimension ``dim`` with copies: each is added to its source, by a scatter."""
    count, own = partial(lax.iota, jnp.int32), axis.own
    copies = jnp.concatenate([count(own.start), own.stop + count(axis.padded_size - own.stop)])
    added = jnp.take(x, copies, axis=dim, mode="clip")
    return own_positions(axis, x, dim).at[(slice(None),) * dim + (axis.source(copies),)].add(added)


def own_positions(axis: Axis, x: jax.Array, dim: int) -> jax.Array:
    """``x`` without its copies. An input that a crop has left out is 0."""
    return among_zeros(axis, x, dim, axis.own, axis.own.start - axis.copied[0] if axis.own else 0)


def among_zeros(axis: Axis, x: jax.Array, dim: int, part: range, at: int) -> jax.Array:
    """An array of all inputs: the padded positions ``part`` stand from input ``at`` on, the rest is 0."""
    zeros = [(0, 0, 0)] * x.ndim
    zeros[dim] = (at, axis.size - at - len(part), 0)
    x = lax.slice_in_dim(x, part.start, part.stop, axis=dim)
    return lax.pad(x, jnp.zeros((), x.dtype), zeros)


# -- complex numbers -------------------------------------------------------------------------------


def complex_product(convolve: Callable[..., jax.Array], lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A complex convolution as three real ones (Gauss): GPUs have real convolutions only."""
    both = convolve(lhs.real + lhs.imag, rhs.real)
    real = both - convolve(lhs.imag, rhs.real + rhs.imag)
    return lax.complex(real, both + convolve(lhs.real, rhs.imag - rhs.real))

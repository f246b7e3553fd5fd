"""Layers whose M is block triangular: the order of their outputs, the block on the diagonal, substitution.

Output ``o`` reads input ``o + s`` through a tap with the *offset* ``s = p*r - lo``, where strides and input
dilations are 1. If no offset is behind 0 in some lexicographic order of the positions, M is lower triangular
in this order, with the block ``D = K[:, :, p0]`` of the tap with offset 0 at every position on the diagonal:

    det M = det(D)**positions,        x[o] = D^-1 (y[o] - sum over the other taps of K[:, :, p] x[o + s])

(docs/maths.md, section 15). Padding on one side of every axis has such an order, whatever the kernel is; a
mask may have one too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.layout import by_group, out_first, taps
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.products.product import apply
from jaxconv_fc.sharding import is_traced
from jaxconv_fc.spectrum import svd
from jaxconv_fc.spectrum.operands import as_image, from_image


@jax.tree_util.register_static
@dataclass(frozen=True)
class Causal:
    """An order of the positions in which M is block triangular: the static part of its closed forms."""

    spec: ConvSpec
    order: tuple[tuple[int, int], ...]  # axes, slowest first, with 1, or -1 where positions descend
    used: bytes  # of a bool array of the taps' shape: which taps may differ from 0

    @classmethod
    def of(cls, spec: ConvSpec, mask: np.ndarray | None = None) -> Causal | None:
        """The order of this geometry with a mask over its taps; None if there is none."""
        if spec.in_size != spec.out_size or not all(
            a.stride == a.lhs_dilation == 1
            and a.size == a.out_size
            and (a.pads_with_zeros or a.lo == a.hi == 0)
            for a in spec.axes
        ):
            return None
        used = np.ones(taps(spec), bool) if mask is None else mask
        offsets, read = _offsets(spec)
        left, order = offsets[used.ravel() & read], []
        while len(order) < len(spec.axes):
            # The first axis along which all taps point one way; those that stay in place are left.
            places = dict.fromkeys(range(len(spec.axes)))
            for axis, _ in order:
                del places[axis]
            for axis in places:
                if (left[:, axis] <= 0).all() or (left[:, axis] >= 0).all():
                    order.append((axis, -1 if (left[:, axis] > 0).any() else 1))
                    left = left[left[:, axis] == 0]
                    break
            else:
                return None
        return cls(spec, tuple(order), used.tobytes())

    @property
    def positions(self) -> int:
        return math.prod(axis.size for axis in self.spec.axes)

    @property
    def offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers ``[tap]`` of the taps in use, and offsets ``[tap, axis]`` in the order: none is above 0."""
        offsets, read = _offsets(self.spec)
        number = np.flatnonzero(np.frombuffer(self.used, bool) & read)
        axes, directions = ([pair[i] for pair in self.order] for i in (0, 1))
        return number, offsets[number][:, axes] * np.array(directions, np.int64)

    def diagonal(self, kernel: jax.Array) -> jax.Array:
        """The block on the diagonal, ``[group, d, i]``; 0 if no tap has offset 0: M is nilpotent."""
        blocks, offsets = self._blocks(kernel)
        return blocks[~offsets.any(1)].sum(0)

    def nullity(self, kernel: jax.Array) -> jax.Array:
        """How many singular values of the diagonal blocks are 0 up to rounding; so many has M at least."""
        values = svd.singular_values(self.diagonal(kernel))  # [group, value]
        cutoff = values.shape[-1] * jnp.finfo(values.dtype).eps * values.max(-1, keepdims=True)
        return jnp.sum(values <= cutoff)

    def log_abs_det(self, kernel: jax.Array) -> jax.Array:
        """``positions * log |det D|``, over all groups."""
        return self.positions * jnp.linalg.slogdet(self.diagonal(kernel))[1].sum()

    def solution(self, kernel: jax.Array, y: jax.Array) -> jax.Array:
        """``M^-1 y``. Its derivatives are solutions too, with M or M^T."""

        def times(x: jax.Array) -> jax.Array:
            return apply(self.spec, kernel, x.reshape(self.spec.in_shape), precision="highest").ravel()

        def solve(transposed: bool, _: Any, right: jax.Array) -> jax.Array:
            shape = self.spec.in_shape if transposed else self.spec.out_shape
            return self._substituted(lax.stop_gradient(kernel), right.reshape(shape), transposed).ravel()

        x = lax.custom_linear_solve(times, y.ravel(), partial(solve, False), partial(solve, True))
        return x.reshape(self.spec.in_shape)

    def _blocks(self, kernel: jax.Array) -> tuple[jax.Array, np.ndarray]:
        """``[tap, group, d, i]`` of the taps in use, and their offsets."""
        number, offsets = self.offsets
        value = by_group(self.spec, kernel)
        return jnp.moveaxis(value.reshape(*value.shape[:3], -1), -1, 0)[number], offsets

    def _substituted(self, kernel: jax.Array, right: jax.Array, transposed: bool) -> jax.Array:
        """``M^-1 y``, or ``M^-T x``: there offsets change their signs, so positions come in reverse."""
        spec = self.spec
        blocks, offsets = self._blocks(kernel)
        if transposed:
            blocks, value = jnp.swapaxes(blocks, -1, -2), from_image(spec, right)
        else:
            value = jnp.transpose(right, spec.out_order)  # [positions..., channel]
            value = value.reshape(*value.shape[:-1], spec.groups, -1)
        axes = [axis for axis, _ in self.order]
        turned = [a for a, (_, direction) in enumerate(self.order) if (direction < 0) != transposed]
        value = jnp.flip(jnp.transpose(value, (*axes, -2, -1)), turned)  # [positions..., g, d]
        off = offsets.any(1)
        value, blocks = _divided(blocks[~off].sum(0), value, blocks[off])
        value = jnp.flip(_substitute(offsets[off], blocks, value), turned)
        value = jnp.transpose(value, (*np.argsort(axes), -2, -1))
        return as_image(spec, value, output=transposed)


def _offsets(spec: ConvSpec) -> tuple[np.ndarray, np.ndarray]:
    """The offset ``[tap, axis]`` of every tap, in row-major order, and whether it reads an input at all."""
    along = [np.arange(a.taps) * a.rhs_dilation - a.lo for a in spec.axes]
    grid = np.meshgrid(*along, indexing="ij") if along else []
    offsets = np.stack([g.ravel() for g in grid], 1) if grid else np.zeros((1, 0), np.int64)
    sizes = np.array([a.size for a in spec.axes], np.int64)
    return offsets, np.asarray((abs(offsets) < sizes).all(1))


def _divided(diagonal: jax.Array, value: jax.Array, blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``D^-1`` times the vectors ``[..., g, d]`` and the blocks ``[tap, g, d, i]``.

    By the inverse: with a right side per position, LAPACK's threads take longer than all the rest.
    """
    inverse = jnp.linalg.inv(diagonal)
    vectors = jnp.einsum("gde,...ge->...gd", inverse, value, precision="highest")
    return vectors, jnp.einsum("gde,tgei->tgdi", inverse, blocks, precision="highest")


def _substitute(offsets: np.ndarray, blocks: jax.Array, value: jax.Array) -> jax.Array:
    """``x`` with ``x[o] + sum over taps of B x[o + s] = value[o]``, slice by slice of the first axis.

    A slice has an own system, of one axis less, with the taps that stay in it. Those that reach back read
    slices that are known.
    """
    if not len(offsets):
        return value
    here = offsets[:, 0] == 0
    inner = partial(_substitute, offsets[here, 1:], blocks[here])
    if here.all():
        return jax.vmap(inner)(value)
    back = -int(offsets[:, 0].min())
    places: dict[tuple[int, ...], list[int]] = {}  # offset within a slice -> its taps
    for tap in np.flatnonzero(~here):
        places.setdefault(tuple(offsets[tap, 1:].tolist()), []).append(int(tap))

    def step(known: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
        for offset, numbers in places.items():
            read = _shifted(known[back + offsets[numbers, 0]], offset)  # [tap, positions..., g, i]
            block = blocks[np.array(numbers)]
            right = right - jnp.einsum("t...gi,tgdi->...gd", read, block, precision="highest")
        x = inner(right)
        return jnp.concatenate([known[1:], x[None]]), x

    return lax.scan(step, jnp.zeros((back, *value.shape[1:]), value.dtype), value)[1]


def _shifted(slices: jax.Array, offset: Sequence[int]) -> jax.Array:
    """``slices[:, o + offset]``, 0 where that is outside."""
    edges = [(0, 0, 0), *((-s, s, 0) for s in offset), (0, 0, 0), (0, 0, 0)]
    return lax.pad(slices, jnp.zeros((), slices.dtype), edges)


def masked(spec: ConvSpec, kernel: jax.Array, mask: Any) -> tuple[jax.Array, Causal | None]:
    """The kernel with 0 where the mask is False, and the order that it then has."""
    if mask is None:
        return kernel, Causal.of(spec)
    if is_traced(mask):
        raise TypeError("mask must be static, got a traced array: give a NumPy array of bool.")
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask must be of bool, got {mask.dtype}. Write mask != 0.")
    if mask.shape not in (taps(spec), spec.rhs_shape):
        raise ValueError(
            f"mask must have the shape {taps(spec)} of the taps, or {spec.rhs_shape} of the kernel, got "
            f"{mask.shape}."
        )
    if mask.shape == spec.rhs_shape and len(spec.rhs_shape) > len(taps(spec)):
        used = out_first(spec, mask).any((0, 1))
    else:
        used = mask
        numbers = spec.dimension_numbers.rhs_spec
        shape = [1] * len(spec.rhs_shape)
        for axis, size in zip(numbers[2:], mask.shape, strict=True):
            shape[axis] = size
        order = np.argsort(numbers[2:])
        mask = mask.transpose(order).reshape(shape)
    return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), Causal.of(spec, used)

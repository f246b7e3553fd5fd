"""M as blocks: diagonal in frequency along the axes that wrap around, dense along the others.

On an axis of ``n`` inputs and ``m`` outputs that wraps around (``m*stride == n*lhs_dilation == N``), output
frequency ``f mod m`` meets input frequency ``f mod n`` only, for ``f`` in ``Z_N``. These two are equal modulo
``g = gcd(n, m)``. So every residue ``w`` modulo ``g`` has a block of ``m/g`` x ``n/g``: row ``a`` is output
frequency ``w + g*a``, column ``b`` is input frequency ``w + g*b``. An axis that does not wrap around is one
block of ``m`` x ``n``. Up to unitary maps, M is block diagonal with the blocks

    B_w[(d, a_1, ..., a_D), (i, b_1, ..., b_D)]
        = sum over p of  K[d, i, p] * E_1[w_1, a_1, b_1, p_1] * ... * E_D[w_D, a_D, b_D, p_D]

for every group and every ``w = (w_1, ..., w_D)``, where ``E_a`` is the :meth:`BlockAxis.table` of axis a
(docs/maths.md, sections 5 and 11). Singular values, determinants and inverses of M are those of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.layout import by_group
from jaxconv_fc.geometry.memory import check_array, fits_in_memory
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.spectrum.operands import as_image

ENTRIES_AT_ONCE = 2**19  # entries of blocks that are made at one time

# Labels of einsum; the last three have one per axis: TAP + a, ROW + a, COLUMN + a.
GROUP, OUT, IN, FREQUENCY = range(4)
TAP, ROW, COLUMN = 10, 30, 50

OfBlocks = Callable[[jax.Array], jax.Array]  # [group, block, row, column] -> [group, block, ...]


@dataclass(frozen=True)
class BlockAxis:
    """An axis as ``frequencies`` blocks, one per residue ``w``; one block if it does not wrap around."""

    axis: Axis  # the relation of taps; a cover has more inputs and outputs
    size: int  # inputs n
    out_size: int  # outputs m
    shift: int | None  # the low padding lo in dilated steps; None if the axis does not wrap around

    @classmethod
    def of(cls, axis: Axis) -> BlockAxis:
        """This axis. It wraps around if every tap reads what it would read on a circle of the inputs."""
        around, shift = axis.size * axis.lhs_dilation, None
        if axis.size and axis.out_size * axis.stride == around and axis.reach <= np.iinfo(np.int32).max:
            border, p = axis.border(axis.interior), np.arange(axis.taps)  # the interior meets no padding
            u = border[:, None] * axis.stride + p * axis.rhs_dilation - axis.shift
            wrapped = np.where(u % axis.lhs_dilation == 0, u // axis.lhs_dilation % axis.size, -1)
            shift = axis.shift if np.array_equal(wrapped, axis.table(border)) else None
        return cls(axis, axis.size, axis.out_size, shift)

    @property
    def wraps(self) -> bool:
        return self.shift is not None

    @property
    def frequencies(self) -> int:
        """``g``, the number of blocks."""
        return math.gcd(self.size, self.out_size) if self.wraps else 1

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that a block has of this axis: ``(m/g, n/g)``."""
        return self.out_size // self.frequencies, self.size // self.frequencies

    def table(self, dtype: Any) -> jax.Array:
        """What each tap adds to each block: ``E[w, a, b, p]``, shape ``(frequencies, *block, taps)``."""
        axis, g = self.axis, self.frequencies
        if self.shift is None:  # E[0, o, t, p] = [t(o, p) = t]
            o, p = lax.iota(jnp.int32, axis.out_size)[:, None], lax.iota(jnp.int32, axis.taps)[None]
            t, valid = axis.input_of(o, p)
            column = lax.iota(jnp.int32, axis.size)[None, :, None]
            return (valid[:, None] & (t[:, None] == column)).astype(dtype)[None]
        # H[f, p] = exp(2 pi i f (p*r - lo) / N) is the transform of a unit vector at place lo - p*r: exact
        # for any N. A tap that reads no input has no place: its frequencies would cancel up to rounding only.
        around = self.size * axis.lhs_dilation
        places = [(self.shift - p * axis.rhs_dilation) % around for p in range(axis.taps)]
        places = np.where(axis.tap_counts, places, -1).astype(np.int32)
        complex_dtype = np.result_type(dtype, np.complex64)
        f = lax.iota(jnp.int32, around)
        transfer = jnp.fft.fft((f[:, None] == places[None]).astype(complex_dtype), axis=0)
        # E[w, a, b] = (s*l)**-0.5 * sum of H[f] over f == w + g*a (mod m), f == w + g*b (mod n)
        blocks = jnp.zeros((g, *self.block, axis.taps), complex_dtype)
        blocks = blocks.at[f % g, f % self.out_size // g, f % self.size // g].add(transfer)
        return blocks / jnp.asarray((axis.stride * axis.lhs_dilation) ** 0.5, complex_dtype)


@dataclass(frozen=True)
class Blocks:
    """The blocks of M, or of a matrix that contains it: ``count`` blocks of one ``shape`` for each group."""

    spec: ConvSpec
    axes: tuple[BlockAxis, ...]

    @classmethod
    def of(cls, spec: ConvSpec) -> Blocks:
        return cls(spec, tuple(BlockAxis.of(a) for a in spec.axes))

    @property
    def count(self) -> int:
        """Blocks of one group."""
        return math.prod(a.frequencies for a in self.axes)

    @property
    def shape(self) -> tuple[int, int]:
        """``(O/G * product of m/g, C/G * product of n/g)``"""
        rows, columns = (math.prod(a.block[i] for a in self.axes) for i in (0, 1))
        return self.spec.out_channels // self.spec.groups * rows, self.spec.group_channels * columns

    def check_memory(self, name: str, dtype: Any, instead: str) -> None:
        """ValueError if the blocks of a kernel of this dtype are beyond the memory limit."""
        check_array(name, self._all, self._dtype(dtype), instead, self.spec.nse)

    def fits_in_memory(self, dtype: Any) -> bool:
        """Whether they are within the limit."""
        return fits_in_memory(math.prod(self._all) * self._dtype(dtype).itemsize)

    @property
    def _all(self) -> tuple[int, int, int]:
        return (self.spec.groups * self.count, *self.shape)

    def _dtype(self, dtype: Any) -> np.dtype:
        return np.result_type(dtype, np.complex64) if any(a.wraps for a in self.axes) else np.dtype(dtype)

    # -- frequencies ---------------------------------------------------------------------------

    @property
    def frequencies(self) -> list[np.ndarray]:
        """``w`` of every block: an array of shape ``(count,)`` per axis."""
        counts = [a.frequencies for a in self.axes]
        return list(np.unravel_index(np.arange(self.count), counts)) if counts else []

    @property
    def opposites(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The frequencies with ``-w == w``, and one of ``w`` and ``-w`` for all others."""
        flat = opposite = np.arange(self.count)
        if self.axes:
            counts = [a.frequencies for a in self.axes]
            negative = [-w % g for w, g in zip(self.frequencies, counts, strict=True)]
            opposite = np.ravel_multi_index(negative, counts)
        return [w[flat == opposite] for w in self.frequencies], [w[flat < opposite] for w in self.frequencies]

    # -- the blocks of a kernel ----------------------------------------------------------------

    def at(self, kernel: jax.Array, frequencies: Sequence[Any]) -> jax.Array:
        """The blocks at these frequencies, an array of them per axis: ``[group, block, row, column]``."""
        value, dims = by_group(self.spec, kernel), range(len(self.axes))  # [g, d, i, p_1, ...]
        labels, unrolled = [GROUP, OUT, IN, *(TAP + a for a in dims)], [GROUP, OUT, IN]
        dense, waves = [], []
        for a, axis in enumerate(self.axes):
            if axis.wraps:
                table = jnp.take(axis.table(value.dtype), frequencies[a], axis=0, mode="clip")
                waves += [table, [FREQUENCY, ROW + a, COLUMN + a, TAP + a]]
                unrolled += [TAP + a]
            else:
                dense += [axis.table(value.dtype)[0], [ROW + a, COLUMN + a, TAP + a]]
                unrolled += [ROW + a, COLUMN + a]
        if dense:  # first: [g, d, i, p...] [o, t, p] ... -> [g, d, i, (o, t or p)...]
            value = jnp.einsum(value, labels, *dense, unrolled, precision="highest")
        rows, columns = ([c, *(at + a for a in dims)] for c, at in ((OUT, ROW), (IN, COLUMN)))
        if waves:  # [g, d, i, (o, t or p)...] [w, a, b, p] ... -> [g, w, (d, rows...), (i, columns...)]
            value = _transfer(value, unrolled, waves, [GROUP, FREQUENCY, *rows, *columns])
        else:
            value = jnp.einsum(value, unrolled, [GROUP, *rows, *columns])[:, None]
        return value.reshape(*value.shape[:2], *self.shape)

    def map(self, of: OfBlocks, kernel: jax.Array) -> jax.Array:
        """``of`` every block, ``[group, block, ...]``, in the order of :meth:`order`.

        ``of`` must not depend on the order of rows or columns, nor on conjugation: of a real kernel the block
        at ``-w`` is the conjugate of that at ``w``, up to these orders, so only one of the two is made. Where
        ``-w == w``, a block of one position is real.
        """
        if jnp.iscomplexobj(kernel):
            return self._map_at(of, kernel, self.frequencies)
        alone, paired = self.opposites
        single = all(axis.block == (1, 1) for axis in self.axes if axis.wraps)
        parts = [self._map_at(lambda b: of(b.real if single else b), kernel, alone)]
        if paired and paired[0].size:
            parts += 2 * [self._map_at(of, kernel, paired)]
        return jnp.concatenate(parts, axis=1)

    def order(self, kernel: jax.Array) -> list[np.ndarray]:
        """The frequencies, by axis, of the blocks of :meth:`map`: of a real kernel ``w`` for ``-w`` too."""
        if jnp.iscomplexobj(kernel):
            return self.frequencies
        alone, paired = self.opposites
        return [np.concatenate([a, p, p]) for a, p in zip(alone, paired, strict=True)]

    def _map_at(self, of: OfBlocks, kernel: jax.Array, frequencies: Sequence[np.ndarray]) -> jax.Array:
        """``of`` the blocks at these frequencies, in their order.

        Derivatives make the blocks a second time, so that they too hold a part of them only.
        """
        most = ENTRIES_AT_ONCE // max(1, self.spec.groups * math.prod(self.shape))

        @jax.checkpoint
        def part(*chosen: jax.Array) -> jax.Array:  # [block, group, ...]
            return jnp.moveaxis(of(self.at(kernel, chosen)), 1, 0)

        chosen = [jnp.asarray(f, jnp.int32) for f in frequencies]
        return jnp.moveaxis(_in_parts(part, chosen, most) if chosen else part(), 0, 1)

    # -- vectors in the basis of the blocks ----------------------------------------------------

    def from_output(self, y: jax.Array) -> jax.Array:
        """An output as ``[group, block, row]``: ``F y`` along every axis that wraps around, F unitary."""
        y = jnp.transpose(y, self.spec.out_order)
        value = y.reshape(*y.shape[:-1], self.spec.groups, -1)  # [positions..., g, d]
        dims, shape = len(self.axes), value.shape
        if self._wrapping:
            value = jnp.fft.fftn(value, axes=self._wrapping, norm="ortho")
        # Frequency w + g*a of each axis is split into (a, w): [a_1, w_1, a_2, w_2, ..., g, d]
        split = [n for a in self.axes for n in (a.block[0], a.frequencies)]
        value = value.reshape(*split, *shape[dims:])
        within, frequency = range(0, 2 * dims, 2), range(1, 2 * dims, 2)
        value = jnp.transpose(value, (2 * dims, *frequency, 2 * dims + 1, *within))  # [g, w..., d, a...]
        return value.reshape(shape[dims], self.count, -1)

    def to_input(self, x: jax.Array) -> jax.Array:
        """The input, in its layout, that ``[group, block, column]`` stands for: the transform back."""
        dims = len(self.axes)
        columns = [a.block[1] for a in self.axes]
        value = x.reshape(x.shape[0], *(a.frequencies for a in self.axes), -1, *columns)  # [g, w..., i, b...]
        beside = [i for a in range(dims) for i in (2 + dims + a, 1 + a)]
        value = jnp.transpose(value, (*beside, 0, 1 + dims))  # [b_1, w_1, b_2, w_2, ..., g, i]
        value = value.reshape(*(a.size for a in self.axes), *value.shape[2 * dims :])
        value = jnp.fft.ifftn(value, axes=self._wrapping, norm="ortho") if self._wrapping else value
        return as_image(self.spec, value, output=False)

    @property
    def _wrapping(self) -> list[int]:
        return [i for i, axis in enumerate(self.axes) if axis.wraps]


def _transfer(value: jax.Array, labels: list[int], waves: list[Any], result: list[int]) -> jax.Array:
    """``einsum(value, labels, *waves, result)``: the product of all waves against the kernel.

    A real kernel is multiplied with real and imaginary parts: two real products.
    """
    taps = set(labels) - set(result)
    joint = sorted({label for names in waves[1::2] for label in names})
    contract = partial(jnp.einsum, precision="highest")
    phases = contract(*waves, joint)
    # The product has frequencies first. With any other order einsum swaps its operands and moves its result.
    product = [label for label in (*joint, *labels) if label not in taps]
    if jnp.iscomplexobj(value):
        value = contract(phases, joint, value, labels, product)
    else:
        parts = (contract(part, joint, value, labels, product) for part in (phases.real, phases.imag))
        value = lax.complex(*parts)
    return jnp.transpose(value, [product.index(label) for label in result])


def _in_parts(of: Callable[..., jax.Array], arrays: Sequence[jax.Array], most: int) -> jax.Array:
    """``of(*arrays)``, at most ``most`` entries of their first axes at a time.

    All parts are of one size. The last is filled up with first entries, whose results are dropped.
    """
    count = len(arrays[0])
    size = -(-count // -(-count // max(1, most)))
    parts = -(-count // size)
    if parts == 1:
        return of(*arrays)
    filled = [jnp.concatenate([a, a[: parts * size - count]]) for a in arrays]
    made = lax.map(lambda part: of(*part), [a.reshape(parts, size, *a.shape[1:]) for a in filled])
    return made.reshape(parts * size, *made.shape[2:])[:count]

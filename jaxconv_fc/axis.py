"""The relation of one axis, which every matrix of the library is a product of.

Output position ``o`` reads input position ``t`` through tap ``p`` when::

    o*stride + p*rhs_dilation - lo == t*lhs_dilation,   0 <= o < m,  0 <= p < taps,  0 <= t < size

A boundary mode first pads the axis to ``lo + size + hi`` positions, of which position ``j`` is a
copy of input position ``source(j)``, and then relates outputs to padded positions in the same way
with ``lo = hi = 0``.  Zeros mode is the case where the map ``source`` is the identity.

The relation is written once, as arithmetic that NumPy arrays, jnp arrays and tracers all understand:
the host gets small cached tables from it, a traced program gets its index arrays, and neither has to
carry a constant of the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

# Integer arrays of any kind: numpy.ndarray, jax.Array or a tracer.
Ints = Any

MODES = ("zeros", "circular", "reflect", "symmetric", "edge")


def dilated(size: int, dilation: int) -> int:
    """Length of an axis of ``size`` positions once ``dilation - 1`` holes stand between neighbours."""
    return dilation * (size - 1) + 1 if size else 0


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution: sizes, steps and padding, all Python ints."""

    size: int
    taps: int
    stride: int = 1
    lo: int = 0
    hi: int = 0
    lhs_dilation: int = 1
    rhs_dilation: int = 1
    mode: str = "zeros"

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def padded_size(self) -> int:
        """Positions that a boundary mode makes of the axis; the axis itself in zeros mode."""
        return self.size if self.mode == "zeros" else self.lo + self.size + self.hi

    @property
    def dilated_taps(self) -> int:
        return dilated(self.taps, self.rhs_dilation)

    @property
    def span(self) -> int:
        """Length of the dilated and padded axis that the window slides over."""
        zeros = self.lo + self.hi if self.mode == "zeros" else 0
        return dilated(self.padded_size, self.lhs_dilation) + zeros

    @property
    def out_size(self) -> int:
        slack = self.span - self.dilated_taps
        return slack // self.stride + 1 if slack >= 0 else 0

    # -- the law -------------------------------------------------------------------------------

    @property
    def inner(self) -> Axis:
        """The zeros-mode axis between the padded positions and the outputs."""
        if self.mode == "zeros":
            return self
        return replace(self, size=self.padded_size, lo=0, hi=0, mode="zeros")

    def source(self, j: Ints) -> Ints:
        """Input position that padded position ``j`` is a copy of (the names are numpy.pad's)."""
        n = self.size
        if self.mode == "zeros":
            return j
        i = j - self.lo
        if self.mode == "circular":
            return i % n
        if self.mode == "edge":
            return i.clip(0, n - 1)
        if self.mode == "symmetric":  # a triangle wave of period 2n whose corners are held twice
            return (2 * n - 1 - abs(2 * (i % (2 * n)) - (2 * n - 1))) // 2
        return n - 1 - abs(i % max(2 * n - 2, 1) - (n - 1))  # reflect: period 2n - 2

    def input_of(self, o: Ints, p: Ints) -> tuple[Ints, Ints]:
        """``(t, valid)``: the input position that output ``o`` reads through tap ``p``."""
        inner = self.inner
        u = o * self.stride + p * self.rhs_dilation - inner.lo
        j = u // self.lhs_dilation
        valid = (u % self.lhs_dilation == 0) & (j >= 0) & (j < inner.size)
        return self.source(j), valid

    def output_of(self, j: Ints, p: Ints) -> tuple[Ints, Ints]:
        """``(o, valid)``: the output that reads *padded* position ``j`` through tap ``p``."""
        v = j * self.lhs_dilation + self.inner.lo - p * self.rhs_dilation
        o = v // self.stride
        return o, (v % self.stride == 0) & (o >= 0) & (o < self.out_size)

    # -- tables and counts, on the host --------------------------------------------------------

    def input_table(self) -> np.ndarray:
        """``table[o, p]``: the input position read, or -1 where the tap reads padding or a hole."""
        return _input_table(self)

    @cached_property
    def copies(self) -> int:
        """How often the input position that is copied most often occurs among the padded ones."""
        if self.mode == "zeros" or not self.padded_size:
            return 1
        return int(np.bincount(self.source(np.arange(self.padded_size))).max())

    @cached_property
    def collides(self) -> bool:
        """Whether some output reads one input position through two taps."""
        return self.pair_count != sum(self.inner.tap_counts)

    @cached_property
    def tap_counts(self) -> tuple[int, ...]:
        """Of each tap, how many outputs it lets read an input; O(1) per tap (MATHS 3)."""
        inner = self.inner
        return tuple(_tap_count(inner, p) for p in range(self.taps))

    @cached_property
    def pair_count(self) -> int:
        """How many pairs (output, input) are related: the factor of this axis in nse."""
        if self.mode == "zeros":  # any two of (o, p, t) determine the third
            return sum(self.tap_counts)
        rows = np.sort(self.input_table(), axis=1)
        return int((rows[:, :1] >= 0).sum() + ((np.diff(rows, axis=1) > 0) & (rows[:, 1:] >= 0)).sum())

    # -- axis -> axis --------------------------------------------------------------------------

    def transpose(self) -> Axis:
        """The axis that relates the same pairs with inputs and outputs exchanged (zeros mode).

        Tap ``p`` of this axis is tap ``taps - 1 - p`` of the transposed one.
        """
        turned = Axis(
            size=self.out_size,
            taps=self.taps,
            stride=self.lhs_dilation,
            lo=self.dilated_taps - 1 - self.lo,
            lhs_dilation=self.stride,
            rhs_dilation=self.rhs_dilation,
        )
        return turned.ending_at(self.size)

    def kernel_gradient(self) -> Axis:
        """The axis that correlates inputs with output cotangents, its outputs being the taps."""
        return Axis(
            size=self.size,
            taps=self.out_size,
            stride=self.rhs_dilation,
            lo=self.lo,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.stride,
        ).ending_at(self.taps)

    def ending_at(self, out_size: int) -> Axis:
        """The same axis with the high padding that makes exactly ``out_size`` outputs, none unused."""
        span = (out_size - 1) * self.stride + self.dilated_taps if out_size else 0
        return replace(self, hi=span - dilated(self.size, self.lhs_dilation) - self.lo)

    def phases(self) -> list[Phase]:
        """Split a zeros-mode axis by output residue so that no ``lhs_dilation`` is left.

        Outputs ``o = c + L*q``, with ``L = l / gcd(s, l)``, reach inputs only through taps
        ``p = p0 + P*p'``, with ``P = l / gcd(r, l)``; between ``q``, ``p'`` and the input the
        relation is again an axis, of stride ``L*s/l`` and dilation ``P*r/l``.
        """
        s, l, r = self.stride, self.lhs_dilation, self.rhs_dilation
        count, step = l // math.gcd(s, l), l // math.gcd(r, l)
        out_size = -(-self.out_size // count)  # of every phase; the last ones may make a spare output
        phases = []
        for c in range(count):
            first = _solve(r, self.lo - c * s, l)
            taps = range(self.taps)[first::step] if first is not None else range(0)
            shift = (c * s + taps.start * r - self.lo) // l
            axis = Axis(self.size, len(taps), count * s // l, -shift, rhs_dilation=step * r // l)
            phases.append(Phase(taps, axis.ending_at(out_size)))
        return phases


@dataclass(frozen=True)
class Phase:
    """One residue class of the outputs of an axis: the taps it uses and its own relation."""

    taps: range
    axis: Axis


@lru_cache(maxsize=256)
def _input_table(axis: Axis) -> np.ndarray:
    t, valid = axis.input_of(np.arange(axis.out_size)[:, None], np.arange(axis.taps))
    table = np.where(valid, t, -1)
    table.setflags(write=False)
    return table


def _solve(a: int, b: int, modulus: int) -> int | None:
    """The smallest ``x >= 0`` with ``a*x == b`` modulo ``modulus``, if there is one."""
    g = math.gcd(a, modulus)
    if b % g:
        return None
    reduced = modulus // g
    return b // g * pow(a // g, -1, reduced) % reduced


def _tap_count(axis: Axis, p: int) -> int:
    """Number of outputs of a zeros-mode axis that read an input through tap ``p``."""
    s, l = axis.stride, axis.lhs_dilation
    b = p * axis.rhs_dilation - axis.lo
    residue = _solve(s, -b, l)
    if residue is None or not axis.size:
        return 0
    step = l // math.gcd(s, l)
    first = max(0, -(b // s))  # ceil(-b / s)
    last = min(axis.out_size - 1, (l * (axis.size - 1) - b) // s)
    return max(0, (last - residue) // step - (first - 1 - residue) // step)

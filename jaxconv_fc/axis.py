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
        return self.collisions > 0

    @cached_property
    def tap_counts(self) -> tuple[int, ...]:
        """Of each tap, how many outputs it lets read an input; O(1) per tap (MATHS 3)."""
        inner = self.inner
        return tuple(_tap_count(inner, p) for p in range(self.taps))

    @cached_property
    def pair_count(self) -> int:
        """How many pairs (output, input) are related: the factor of this axis in nse."""
        return sum(self.tap_counts) - self.collisions

    @cached_property
    def collisions(self) -> int:
        """Triples (output, input, tap) beyond the first of each pair; only border outputs have any."""
        if self.mode == "zeros":  # any two of (o, p, t) determine the third
            return 0
        t, valid = self.input_of(self.border(self.interior)[:, None], np.arange(self.taps))
        reads = np.sort(np.where(valid, t, -1), axis=1)
        return int(((reads[:, 1:] == reads[:, :-1]) & (reads[:, 1:] >= 0)).sum())

    @property
    def interior(self) -> range:
        """The outputs whose whole window lies on input positions, none of it on padding."""
        first = self.lo if self.mode == "zeros" else self.lo * self.lhs_dilation
        last = first + dilated(self.size, self.lhs_dilation) - self.dilated_taps
        start = min(max(0, -(-first // self.stride)), self.out_size)
        return range(start, max(start, min(self.out_size, last // self.stride + 1)))

    def border(self, interior: range) -> np.ndarray:
        """The outputs before and after a range of them."""
        return np.concatenate([np.arange(interior.start), np.arange(interior.stop, self.out_size)])

    @property
    def runs(self) -> tuple[Run, ...]:
        """The outputs by class: those that read through the same taps, at a regular step.

        One run for each residue of the interior (one residue unless there is ``lhs_dilation``) and
        one for each border output that reads anything, so few for an ordinary layer.
        """
        return _runs(self)

    @cached_property
    def gram(self) -> np.ndarray:
        """``gram[p, q]``: how many outputs read one and the same input through taps p and q."""
        table = self.input_table()
        pairs = [((table == table[:, p : p + 1]) & (table >= 0)).sum(0) for p in range(self.taps)]
        return np.array(pairs, int).reshape(self.taps, self.taps)

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

    def rows(self, start: int, stop: int) -> tuple[Axis, range]:
        """The axis that makes outputs ``start`` to ``stop`` alone, and the inputs that it reads (MATHS 7).

        A boundary mode keeps the inputs that its padding is copied from. What it pads beyond the
        block it crops again: its ``lo`` and ``hi`` may be negative. It can be cut at multiples of
        :attr:`grain` only: ValueError elsewhere.
        """
        s, l, n, count = self.stride, self.lhs_dilation, self.size, stop - start
        read = (count - 1) * s + self.dilated_taps  # dilated positions from the block's first on
        if self.mode == "zeros":
            first = start * s - self.lo
            t0, t1 = max(0, -(-first // l)), min(n, (first + read - 1) // l + 1)
            if t0 >= t1:  # nothing but padding
                return replace(self, size=0, lo=0).ending_at(count), range(0)
            return replace(self, size=t1 - t0, lo=l * t0 - first).ending_at(count), range(t0, t1)
        if start % self.grain or (stop % self.grain and stop != self.out_size):
            raise ValueError(
                f"rows {start} to {stop} of {self.out_size}: padding_mode={self.mode!r} with "
                f"lhs_dilation={l} pads before it dilates, and no smaller convolution makes these rows. "
                f"Cut at multiples of {self.grain}."
            )
        i0 = start * s // l - self.lo  # padded positions, counted from the first input
        i1 = i0 + -(-(read - 1) // l) + 1 if read > 0 else i0
        t0, t1 = self._sources(i0, i1)
        return replace(self, size=t1 - t0, lo=t0 - i0, hi=i1 - t1), range(t0, t1)

    @property
    def grain(self) -> int:
        """Outputs can be cut at multiples of it, each part made by a smaller axis (:meth:`rows`).

        1, save where a boundary mode pads before it dilates. A part then begins at a padded position,
        ``l | o s``, and must end there: a dilated size ``l(N-1)+1`` has to fall within the ``s`` sizes
        that make the right number of outputs.
        """
        s, l = self.stride, self.lhs_dilation
        if self.mode == "zeros" or l == 1:
            return 1
        return l // math.gcd(l, s) if (self.dilated_taps - 2) % l < s else max(1, self.out_size)

    def _sources(self, i0: int, i1: int) -> tuple[int, int]:
        """Inputs that make padded positions ``i0`` to ``i1``, folded as the whole axis folds them."""
        n, below, above = self.size, max(0, -i0), max(0, i1 - self.size)
        deepest = max(below, above)
        depth = {"edge": 1, "symmetric": deepest, "reflect": deepest + 1}.get(self.mode, n + 1)
        if not below and not above:
            return i0, i1
        if depth > n or (below and above):
            return 0, n
        return (0, min(n, max(i1, depth))) if below else (max(0, min(i0, n - depth)), n)

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


@dataclass(frozen=True, eq=False)
class Run:
    """Outputs of one class. Each reads ``width`` inputs, and together they make a regular part of the
    list of all pairs (output, input), sorted: those of ``outputs[q]`` start at ``start + q*stride``.
    """

    outputs: range
    reads: np.ndarray  # the inputs that the first output reads, ascending: shape (width,)
    advance: int  # how far they move from one output to the next
    taps: np.ndarray  # the taps that read them, in the same order; more than width where some meet
    firsts: np.ndarray  # where in `taps` each input's taps begin: shape (width,)
    start: int
    stride: int

    @property
    def width(self) -> int:
        return len(self.reads)


@lru_cache(maxsize=256)
def _runs(axis: Axis) -> tuple[Run, ...]:
    period = axis.lhs_dilation // math.gcd(axis.stride, axis.lhs_dilation)
    inside = axis.interior
    repeats = len(inside) // period
    inside = inside[: repeats * period]
    # One period stands for the interior; the outputs of the border stand for themselves.
    outputs = np.sort(np.concatenate([axis.border(inside), np.asarray(inside[:period], np.int64)]))
    t, valid = axis.input_of(outputs[:, None], np.arange(axis.taps))
    widths = np.diff(np.sort(np.where(valid, t, -1), axis=1), axis=1, prepend=-1)
    widths = (widths > 0).sum(axis=1)
    cycle = int(widths[(outputs >= inside.start) & (outputs < inside.stop)].sum())
    starts = np.cumsum(widths) - widths + np.where(outputs >= inside.stop, (repeats - 1) * cycle, 0)
    runs = []
    for i in np.flatnonzero(widths):
        taps = np.flatnonzero(valid[i])
        taps = taps[np.argsort(t[i, taps], kind="stable")]
        reads, firsts = np.unique(t[i, taps], return_index=True)
        o = int(outputs[i])
        same = range(o, inside.stop, period) if inside.start <= o < inside.stop else range(o, o + 1)
        advance = period * axis.stride // axis.lhs_dilation
        runs.append(Run(same, reads, advance, taps, firsts, int(starts[i]), cycle))
    return tuple(runs)


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

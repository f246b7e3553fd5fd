"""The relation of one axis, which every matrix of the library is a product of.

Output position ``o`` reads input position ``t`` through tap ``p`` when::

    o*stride + p*rhs_dilation - lo == t*lhs_dilation,   0 <= o < m,  0 <= p < taps,  0 <= t < size

The other boundary modes first pad the axis to ``lo + size + hi`` positions, of which position ``j`` is a
copy of input position ``source(j)``. They then relate outputs to padded positions in the same way with
``lo = hi = 0``. Zeros mode is the case where the map ``source`` is the identity.

The relation is written once, as arithmetic that NumPy arrays, jnp arrays and tracers all understand. The
host makes the small tables that it needs, and a traced program makes its index arrays inside the trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxconv_fc.geometry.modes import MODES, Ints


def dilated(size: int, dilation: int) -> int:
    """Length of an axis of ``size`` positions once ``dilation - 1`` holes stand between neighbours."""
    return dilation * (size - 1) + 1 if size else 0


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution: sizes, steps and padding, all Python ints.

    What follows from them is computed once.
    """

    size: int
    taps: int
    stride: int = 1
    lo: int = 0
    hi: int = 0
    lhs_dilation: int = 1
    rhs_dilation: int = 1
    mode: str = "zeros"

    # -- sizes ---------------------------------------------------------------------------------

    @cached_property
    def pads_with_zeros(self) -> bool:
        """Whether padding reads as 0, and is made after dilation: no output reads an input twice."""
        return self.mode == "zeros"

    @cached_property
    def copied(self) -> tuple[int, int]:
        """How many copies of inputs stand before and behind the axis; 0 in zeros mode; a crop if negative."""
        return (0, 0) if self.pads_with_zeros else (self.lo, self.hi)

    @cached_property
    def padded_size(self) -> int:
        """Positions of the axis with its copies, before it is dilated."""
        return self.size + sum(self.copied)

    @cached_property
    def own(self) -> range:
        """The padded positions that are inputs themselves. The others are copies."""
        low = self.copied[0]
        return range(self.padded_size)[max(0, low) : max(0, low + self.size)] or range(0)

    @cached_property
    def dilated_size(self) -> int:
        return dilated(self.size, self.lhs_dilation)

    @cached_property
    def dilated_taps(self) -> int:
        return dilated(self.taps, self.rhs_dilation)

    @cached_property
    def span(self) -> int:
        """Length of the dilated and padded axis that the window slides over."""
        zeros = self.lo + self.hi - sum(self.copied)
        return dilated(self.padded_size, self.lhs_dilation) + zeros

    @cached_property
    def shift(self) -> int:
        """The low padding in dilated steps. Outputs that read no copies (:attr:`direct`) have
        ``o*stride + p*rhs_dilation - shift == t*lhs_dilation`` in every mode."""
        return self.lo if self.pads_with_zeros else self.lo * self.lhs_dilation

    @cached_property
    def out_size(self) -> int:
        slack = self.span - self.dilated_taps
        return slack // self.stride + 1 if slack >= 0 else 0

    @cached_property
    def reach(self) -> int:
        """A bound on every number that the arithmetic of the relation meets."""
        folds = 0 if self.pads_with_zeros else 4 * self.size
        steps = self.stride * (self.out_size + 1) + self.dilated_taps + self.rhs_dilation + self.lhs_dilation
        return abs(self.lo) + abs(self.hi) + self.span + steps + folds

    # -- the law -------------------------------------------------------------------------------

    @property
    def on_padded(self) -> Axis:
        """The zeros-mode axis between the padded positions and the outputs."""
        if self.pads_with_zeros:
            return self
        return replace(self, size=self.padded_size, lo=0, hi=0, mode="zeros")

    def source(self, j: Ints) -> Ints:
        """Input position that padded position ``j`` is a copy of."""
        self._check_indices(j)
        return MODES[self.mode].source(j - self.copied[0], self.size)

    def input_of(self, o: Ints, p: Ints) -> tuple[Ints, Ints]:
        """``(t, valid)``: the input position that output ``o`` reads through tap ``p``."""
        self._check_indices(o, p)
        padded = self.on_padded
        u = o * self.stride + p * self.rhs_dilation - padded.lo
        if self.lhs_dilation == 1:  # a traced division is a dozen equations
            return self.source(u), (u >= 0) & (u < padded.size)
        j = u // self.lhs_dilation
        valid = (u % self.lhs_dilation == 0) & (j >= 0) & (j < padded.size)
        return self.source(j), valid

    def output_of(self, j: Ints, p: Ints) -> tuple[Ints, Ints]:
        """``(o, valid)``: the output that reads *padded* position ``j`` through tap ``p``."""
        self._check_indices(j, p)
        v = j * self.lhs_dilation + self.on_padded.lo - p * self.rhs_dilation
        o = v // self.stride
        return o, (v % self.stride == 0) & (o >= 0) & (o < self.out_size)

    def tap_of(self, o: Ints, j: Ints) -> tuple[Ints, Ints]:
        """``(p, valid)``: the tap through which output ``o`` reads *padded* position ``j``."""
        self._check_indices(o, j)
        v = j * self.lhs_dilation + self.on_padded.lo - o * self.stride
        p = v // self.rhs_dilation
        return p, (v % self.rhs_dilation == 0) & (p >= 0) & (p < self.taps)

    def check_held_by(self, dtype: Any) -> None:
        """ValueError if this dtype does not hold the positions of the axis: they would wrap."""
        if np.dtype(dtype).kind in "iu" and self.reach > np.iinfo(dtype).max:
            raise ValueError(
                f"a spatial axis with window stride {self.stride}, lhs_dilation {self.lhs_dilation}, "
                f"rhs_dilation {self.rhs_dilation} and padding {(self.lo, self.hi)} has positions up to "
                f"{self.reach:,}, beyond {np.dtype(dtype)}. Use smaller steps or pads, or as_scipy, which "
                "counts on the host."
            )

    def _check_indices(self, *indices: Ints) -> None:
        for index in indices:
            if hasattr(index, "dtype"):
                self.check_held_by(index.dtype)

    # -- tables and counts, on the host --------------------------------------------------------

    def table(self, outputs: np.ndarray) -> np.ndarray:
        """``table[i, p]``: the input that ``outputs[i]`` reads; -1 where the tap reads padding or a hole."""
        t, valid = self.input_of(outputs.astype(np.int64)[:, None], np.arange(self.taps))
        return np.where(valid, t, -1)

    def reads(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ``(i, t, p)``: ``outputs[i]`` reads input ``t`` through tap ``p``."""
        table = self.table(outputs)
        i, p = np.nonzero(table >= 0)
        return i, table[i, p], p

    def readers(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ``(i, o, p)``: output ``o`` reads ``inputs[i]`` through tap ``p``; inputs ascend."""
        # Direct outputs, by the law: o[i, p] reads inputs[i], which is its only copy, through tap p.
        j = inputs.astype(np.int64) + self.copied[0]
        o, valid = self.output_of(j[:, None], np.arange(self.taps))
        i, p = np.nonzero(valid & (o >= self.direct.start) & (o < self.direct.stop))
        # The others, by what they read: inputs[at] == t, where t is among the inputs.
        border = self.border(self.direct)
        which, t, tap = self.reads(border)
        at = np.searchsorted(inputs, t)
        met = inputs[np.minimum(at, len(inputs) - 1)] == t if len(inputs) else np.zeros(len(t), bool)
        found = (i, at[met]), (o[i, p], border[which[met]]), (p, tap[met])
        return tuple(map(np.concatenate, found))  # type: ignore[return-value]

    @property
    def copied_positions(self) -> np.ndarray:
        """The padded positions that are copies, ascending."""
        return np.concatenate([np.arange(self.own.start), np.arange(self.own.stop, self.padded_size)])

    def taps_of(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """``(first, count, step)``: each output reads through ``count`` taps ``first, first + step, ...``
        (zeros mode)."""
        s, l, r = self.stride, self.lhs_dilation, self.rhs_dilation
        g = math.gcd(r, l)
        b = self.lo - outputs.astype(np.int64) * s  # p*r == b modulo l,  b <= p*r <= b + l*(size - 1)
        step = l // g
        residue = b // g % step * pow(r // g, -1, step) % step
        low = np.maximum(0, -(-b // r))  # ceil(b / r)
        first = low + (residue - low) % step
        last = np.minimum(self.taps - 1, (b + l * (self.size - 1)) // r)
        count = np.maximum(0, (last - first) // step + 1)
        count = np.where(b % g == 0, count, 0)
        return np.where(count > 0, first, 0), count, step

    @cached_property
    def copies(self) -> int:
        """How often the input position that is copied most often occurs among the padded ones."""
        t, counts = np.unique(self.source(self.copied_positions), return_counts=True)
        itself = (t + self.copied[0] >= self.own.start) & (t + self.copied[0] < self.own.stop)
        return int((counts + itself).max(initial=1))

    @property
    def tap_counts(self) -> np.ndarray:
        """Of each tap, how many outputs read an input through it: shape (taps,), O(1) per tap
        (docs/maths.md, section 3)."""
        padded = self.on_padded
        s, l = self.stride, self.lhs_dilation
        b = np.arange(self.taps) * self.rhs_dilation - padded.lo  # o*s + b == t*l
        last = np.minimum(self.out_size - 1, (l * (padded.size - 1) - b) // s)
        return _count_multiples(l, s, b, np.maximum(0, -(b // s)), last)

    @cached_property
    def pair_count(self) -> int:
        """How many pairs (output, input) are related: the factor of this axis in nse."""
        return int(self.tap_counts.sum()) - self._meetings

    @property
    def collides(self) -> bool:
        """Whether some output reads one input through two taps: more triples (o, t, p) than pairs (o, t)."""
        return self._meetings > 0

    @cached_property
    def _meetings(self) -> int:
        """How many triples (o, t, p) there are such that o reads t through another tap before p too.

        Its cost is that of a list of the copies.
        """
        if self.pads_with_zeros:  # any two of (o, p, t) determine the third
            return 0
        # All positions j that output o reads are equal modulo `step`. If it reads j through tap p, it reads
        # j - gap through tap p - gap*l/r, unless that is negative. So count, for neighbours j - gap and j
        # among the copies of one input, itself included, the taps gap*l/r <= p < taps that read j.
        s, l, r, m = self.stride, self.lhs_dilation, self.rhs_dilation, self.out_size
        step, j = r // math.gcd(r, l), self.copied_positions
        inputs = self.source(j) + self.copied[0]
        j = np.concatenate([j, inputs[(inputs >= self.own.start) & (inputs < self.own.stop)]])
        t = self.source(j)
        order = np.lexsort((j, j % step, t))
        j, gap, further = j[order[1:]], np.diff(j[order]), np.diff(t[order])
        # An input is in the list once for each of its copies, which are neighbours with gap 0.
        met = (further == 0) & (gap % step == 0) & (gap > 0)
        j, gap = j[met], gap[met]
        # o*s == j*l - p*r  for  0 <= o < m
        first = np.maximum(gap * l // r, -(((m - 1) * s - j * l) // r))
        return int(_count_multiples(s, -r, j * l, first, np.minimum(self.taps - 1, j * l // r)).sum())

    @property
    def out_period(self) -> int:
        """Outputs at this distance read through the same taps (the ``L`` of docs/maths.md, section 8)."""
        return self.lhs_dilation // math.gcd(self.stride, self.lhs_dilation)

    @cached_property
    def interior(self) -> range:
        """The outputs whose whole window lies on input positions, none of it on padding."""
        first = self.shift
        last = first + self.dilated_size - self.dilated_taps
        start = min(max(0, -(-first // self.stride)), self.out_size)
        return range(start, max(start, min(self.out_size, last // self.stride + 1)))

    @cached_property
    def direct(self) -> range:
        """The outputs that read no copies: all of them in zeros mode, else those of the interior."""
        return range(self.out_size) if self.pads_with_zeros else self.interior

    def border(self, interior: range) -> np.ndarray:
        """The outputs before and after a range of them."""
        return np.concatenate([np.arange(interior.start), np.arange(interior.stop, self.out_size)])

    # -- axis -> axis --------------------------------------------------------------------------

    def transpose(self) -> Axis:
        """The axis that relates the same pairs with inputs and outputs exchanged (zeros mode).

        Tap ``p`` of this axis is tap ``p' = taps - 1 - p`` of the transposed one.
        """
        # o*s + p*r - lo == t*l    <=>    t*l + p'*r - lo' == o*s,    lo' = (taps - 1)*r - lo
        s, l, r = self.stride, self.lhs_dilation, self.rhs_dilation
        turned = Axis(self.out_size, self.taps, l, self.dilated_taps - 1 - self.lo, 0, s, r)
        return turned.ending_at(self.size)

    def with_taps_as_outputs(self) -> Axis:
        """The axis that correlates inputs with output cotangents: its outputs are the taps (zeros mode)."""
        # o*s + p*r - lo == t*l    <=>    p*r + o*s - lo == t*l,    p the output and o the tap
        s, l, r = self.stride, self.lhs_dilation, self.rhs_dilation
        return Axis(self.size, self.out_size, r, self.lo, 0, l, s).ending_at(self.taps)

    def ending_at(self, out_size: int) -> Axis:
        """The same axis with the high padding that makes exactly ``out_size`` outputs, none unused.

        A boundary mode pads by whole positions and does not crop, so it may make more.
        """
        span = (out_size - 1) * self.stride + self.dilated_taps if out_size else 0
        if self.pads_with_zeros:
            return replace(self, hi=span - self.dilated_size - self.lo)
        positions = -(-(span - 1) // self.lhs_dilation) + 1 if span else 0
        return replace(self, hi=max(0, positions - self.size - self.lo))

    def in_mode(self, mode: str) -> Axis | None:
        """The axis of another mode that pads alike; None if that mode pads otherwise."""
        m, n, copies = self.out_size, self.size, self.copied_positions - self.copied[0]
        if mode == "zeros":
            plain = replace(self, mode=mode, lo=self.shift).ending_at(m)
            return None if len(copies) and not self.pads_with_zeros else plain
        same = (MODES[self.mode].source(copies, n) == MODES[mode].source(copies, n)).all()
        return replace(self, mode=mode) if same and not self.pads_with_zeros else None

    @property
    def plain(self) -> Axis:
        """The axis that relates the same pairs through the same taps, with the least padding in its mode."""
        period = MODES[self.mode].period(self.size)
        lo = self.lo % period if period else self.lo
        return replace(self, lo=lo).ending_at(self.out_size)

    def rows(self, start: int, stop: int) -> tuple[Axis, range]:
        """The axis that makes outputs ``start`` to ``stop`` alone, and the inputs that it reads
        (docs/maths.md, section 7).

        A boundary mode keeps the inputs that its padding is copied from. Inputs kept for this alone are
        cropped again: its ``lo`` and ``hi`` may be negative. It can be cut at multiples of :attr:`grain`
        only: ValueError elsewhere.
        """
        s, l, n, count = self.stride, self.lhs_dilation, self.size, stop - start
        read = (count - 1) * s + self.dilated_taps  # dilated positions from the block's first on
        if self.pads_with_zeros:
            first = start * s - self.lo  # in dilated steps, counted from the first input
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

        1, save where a boundary mode pads before it dilates. A part then begins at a padded position, so
        ``l`` divides ``o*s``, and it must end at one: a dilated size ``l*(N - 1) + 1`` has to be among the
        ``s`` sizes that make the right number of outputs.
        """
        s, l = self.stride, self.lhs_dilation
        if self.pads_with_zeros or l == 1:
            return 1
        return l // math.gcd(l, s) if (self.dilated_taps - 2) % l < s else max(1, self.out_size)

    def _sources(self, i0: int, i1: int) -> tuple[int, int]:
        """``(t0, t1)``: positions ``i0`` to ``i1``, counted from the first input, are copies of the inputs
        ``t0`` to ``t1``, and of the same ones if the axis is cut to these."""
        n, source = self.size, MODES[self.mode].source
        if i0 >= 0 and i1 <= n:
            return i0, i1
        if i0 < 0 and i1 > n:
            return 0, n
        if i0 < 0:
            return 0, max(i1, int(source(np.arange(i0, 0), n).max()) + 1)
        return min(i0, int(source(np.arange(n, i1), n).min())), n

    def polyphase(self) -> list[Phase]:
        """Split a zeros-mode axis by output residue so that no ``lhs_dilation`` is left
        (docs/maths.md, section 8). Residues that no output has are left out, but for the first."""
        return [self._phase(c) for c in range(min(self.out_period, max(1, self.out_size)))]

    def _phase(self, c: int) -> Phase:
        """The outputs ``o = c + L*q``, with ``L = out_period``, as outputs ``q`` of an axis."""
        # Tap p is used if l divides  c*s + p*r - lo  (L*q*s is a multiple of l), that is, for p = p0 + P*p'
        # with P = l/gcd(r, l).  Divided by l, the relation of o = c + L*q, p and t is an axis again:
        #     q * (L*s/l) + p' * (P*r/l) - lo' == t,        lo' = -(c*s + p0*r - lo) / l
        s, l, r = self.stride, self.lhs_dilation, self.rhs_dilation
        period = self.out_period
        first, step, some = _multiples(l, r, c * s - self.lo)
        taps = range(self.taps)[first::step] if some else range(0)
        lo = -((c * s + taps.start * r - self.lo) // l)
        axis = Axis(self.size, len(taps), period * s // l, lo, rhs_dilation=step * r // l)
        outputs = -(-self.out_size // period)  # of every phase; the last ones may make a spare output
        return Phase(taps, axis.ending_at(outputs))


class Phase(NamedTuple):
    """One residue class of the outputs of an axis."""

    taps: range  # the taps that it reads through
    axis: Axis  # its own relation, without lhs_dilation; tap p' is taps[p']


def _multiples(l: int, a: int, b: Ints) -> tuple[Ints, int, Any]:
    """``(first, step, some)``: ``l`` divides ``a*x + b`` for the ``x = first + i*step``, if for ``some`` x at
    all; ``0 <= first < step``."""
    g = math.gcd(a, l)
    step = l // g
    return -(b // g) % step * pow(a // g, -1, step) % step, step, b % g == 0


def _count_multiples(l: int, a: int, b: np.ndarray, start: np.ndarray, last: np.ndarray) -> np.ndarray:
    """For how many ``start <= x <= last`` the number ``a*x + b`` is a multiple of ``l``."""
    first, step, some = _multiples(l, a, b)
    return np.where(some, np.maximum(0, (last - first) // step - (start - 1 - first) // step), 0)

"""The relation of one axis, which every matrix of the library is a product of.

Output position ``o`` reads input position ``t`` through tap ``p`` when::

    o*stride + p*rhs_dilation - lo == t*lhs_dilation,   0 <= o < m,  0 <= p < taps,  0 <= t < size

A boundary mode first pads the axis to ``lo + size + hi`` positions, of which position ``j`` is a
copy of input position ``source(j)``, and then relates outputs to padded positions in the same way
with ``lo = hi = 0``.  Zeros mode is the case where the map ``source`` is the identity.

The relation is written once, as arithmetic that NumPy arrays, jnp arrays and tracers all understand:
the host gets the small tables that it asks for, a traced program gets its index arrays, and neither has
to carry a constant of the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxconv_fc.cache import bounded_cache
from jaxconv_fc.lattice import count_below, small_steps, solve_congruence

# Integer arrays of any kind: numpy.ndarray, jax.Array or a tracer.
Ints = Any

MODES = ("zeros", "circular", "reflect", "symmetric", "edge")

_INT32, _INT64 = int(np.iinfo(np.int32).max), int(np.iinfo(np.int64).max)


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
    def shift(self) -> int:
        """The low padding in dilated steps: inside of it, ``o*stride + p*rhs_dilation - shift ==
        t*lhs_dilation`` in every mode."""
        return self.lo if self.mode == "zeros" else self.lo * self.lhs_dilation

    @property
    def out_size(self) -> int:
        slack = self.span - self.dilated_taps
        return slack // self.stride + 1 if slack >= 0 else 0

    @cached_property
    def reach(self) -> int:
        """No number on the way from one end of the relation to another is larger than this."""
        folds = 4 * self.size if self.mode != "zeros" else 0
        steps = self.stride * (self.out_size + 1) + self.dilated_taps + self.rhs_dilation + self.lhs_dilation
        return abs(self.lo) + abs(self.hi) + self.span + steps + folds

    # -- the law -------------------------------------------------------------------------------

    @property
    def on_padded(self) -> Axis:
        """The zeros-mode axis between the padded positions and the outputs."""
        if self.mode == "zeros":
            return self
        return replace(self, size=self.padded_size, lo=0, hi=0, mode="zeros")

    def source(self, j: Ints) -> Ints:
        """Input position that padded position ``j`` is a copy of (the names are numpy.pad's)."""
        n = self.size
        if self.mode == "zeros":
            return j
        self._check_indices(j)
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
        self._check_indices(o, p)
        padded = self.on_padded
        u = o * self.stride + p * self.rhs_dilation - padded.lo
        j = u // self.lhs_dilation
        valid = (u % self.lhs_dilation == 0) & (j >= 0) & (j < padded.size)
        return self.source(j), valid

    def output_of(self, j: Ints, p: Ints) -> tuple[Ints, Ints]:
        """``(o, valid)``: the output that reads *padded* position ``j`` through tap ``p``."""
        self._check_indices(j, p)
        v = j * self.lhs_dilation + self.on_padded.lo - p * self.rhs_dilation
        o = v // self.stride
        return o, (v % self.stride == 0) & (o >= 0) & (o < self.out_size)

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
        t, valid = self.input_of(self._exact(outputs)[:, None], self._exact(np.arange(self.taps)))
        return np.where(valid, t, -1).astype(np.int64)

    def reads(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ``(i, t, p)``: ``outputs[i]`` reads input ``t`` through tap ``p``."""
        table = self.table(outputs)
        i, p = np.nonzero(table >= 0)
        return i, table[i, p], p

    def readers(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ``(i, o, p)``: output ``o`` reads ``inputs[i]`` through tap ``p``; inputs ascend."""
        j = self._exact(inputs) + (self.lo if self.mode != "zeros" else 0)
        o, valid = self.output_of(j[:, None], self._exact(np.arange(self.taps)))
        valid = valid & (o >= self.direct.start) & (o < self.direct.stop)
        i, p = np.nonzero(valid)
        border = self.border(self.direct)
        at, t, tap = self.reads(border)
        where = np.searchsorted(inputs, t)
        met = inputs[np.minimum(where, len(inputs) - 1)] == t if len(inputs) else np.zeros(len(t), bool)
        found = (i, where[met]), (o[i, p].astype(np.int64), border[at[met]]), (p, tap[met])
        return tuple(map(np.concatenate, found))  # type: ignore[return-value]

    def _exact(self, positions: np.ndarray) -> np.ndarray:
        """Positions in 64 bits, or as Python ints where those would overflow."""
        return positions.astype(np.int64 if self.reach <= _INT64 else object)

    @cached_property
    def copies(self) -> int:
        """How often the input position that is copied most often occurs among the padded ones."""
        n, end = self.size, self.size + self.hi
        if self.mode == "zeros" or not self.padded_size:
            return 1
        if self.mode == "edge":
            return self.padded_size if n == 1 else 1 + max(self.lo, self.hi)
        if self.mode == "circular" or n == 1:
            return -(-self.padded_size // n)
        # Input t is copied to all positions i == t, and i == -1 - t (or -t), modulo a period.
        period, mirror = (2 * n, -1) if self.mode == "symmetric" else (2 * n - 2, 0)
        t = self._exact(np.arange(n))
        counts, others = ((end - 1 - v) // period - (-self.lo - 1 - v) // period for v in (t, mirror - t))
        return int(np.where((2 * t - mirror) % period == 0, counts, counts + others).max())

    @property
    def collides(self) -> bool:
        """Whether some output reads one input position through two taps."""
        return self.pair_count < self.triple_count

    @property
    def tap_counts(self) -> np.ndarray:
        """Of each tap, how many outputs it lets read an input; O(1) per tap (docs/maths.md, section 3)."""
        padded = self.on_padded
        s, l, m = padded.stride, padded.lhs_dilation, padded.out_size
        if not padded.size:
            return np.zeros(self.taps, np.int64)
        g = math.gcd(s, l)
        step = l // g
        b = self._exact(np.arange(self.taps)) * padded.rhs_dilation - padded.lo
        residue = -b // g % step * pow(s // g, -1, step) % step
        first = np.maximum(0, -(b // s))  # ceil(-b / s)
        last = np.minimum(m - 1, (l * (padded.size - 1) - b) // s)
        counts = np.maximum(0, (last - residue) // step - (first - 1 - residue) // step)
        return np.where(b % g == 0, counts, 0).astype(np.int64)

    @cached_property
    def pair_count(self) -> int:
        """How many pairs (output, input) are related: the factor of this axis in nse.

        In closed form per residue of the outputs, whatever the sizes; where reflect and symmetric padding
        fold, per output of the border.
        """
        if self.mode == "zeros" and self.stride < self.lhs_dilation:  # fewer residues that way round
            return self.transpose().pair_count
        lo = self.lo if self.mode != "zeros" else 0
        return sum(
            _distinct(self.mode, self.size, first - lo, axis.stride, outputs, axis.rhs_dilation, axis.taps)
            for outputs, first, axis in self._residues()
        )

    @cached_property
    def triple_count(self) -> int:
        """How many triples (output, input, tap) are related; beyond the pairs only where taps meet."""
        if self.mode == "zeros":  # any two of (o, p, t) determine the third
            return self.pair_count
        return sum(outputs * axis.taps for outputs, _, axis in self._residues())  # padding is made of inputs

    def _residues(self) -> Iterator[tuple[int, int, Axis]]:
        """``(outputs, first, axis)`` per residue of the outputs: how many there are, the position that the
        first of them reads through its first tap, and the relation from there."""
        count = self.lhs_dilation // math.gcd(self.stride, self.lhs_dilation)
        for c in range(min(count, self.out_size)):
            axis = self.on_padded._phase(c).axis
            if axis.taps:
                yield -(-(self.out_size - c) // count), -axis.lo, axis

    @property
    def interior(self) -> range:
        """The outputs whose whole window lies on input positions, none of it on padding."""
        first = self.shift
        last = first + dilated(self.size, self.lhs_dilation) - self.dilated_taps
        start = min(max(0, -(-first // self.stride)), self.out_size)
        return range(start, max(start, min(self.out_size, last // self.stride + 1)))

    @property
    def direct(self) -> range:
        """The outputs that read no copies: all of them in zeros mode, else those of the interior."""
        return range(self.out_size) if self.mode == "zeros" else self.interior

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

    @property
    def output_lines(self) -> Lines:
        """The outputs by what they read: the interior repeats."""
        period = self.lhs_dilation // math.gcd(self.stride, self.lhs_dilation)
        return Lines(self.out_size, self._reading, self.interior, period)

    @property
    def input_lines(self) -> Lines:
        """The inputs by what reads them: those repeat that every tap reaches, from direct outputs alone."""
        s, l, direct = self.stride, self.lhs_dilation, self.direct
        start = -(-(direct.start * s + self.dilated_taps - 1 - self.shift) // l)
        stop = (direct.stop * s - 1 - self.shift) // l + 1
        regular = range(self.size)[max(0, start) : max(0, start, stop)]
        if self.mode != "zeros":  # keep the longest part that no copy is made of
            _, copied, _ = self.reads(self.border(direct))
            copied = copied[(copied >= regular.start) & (copied < regular.stop)]
            ends = np.concatenate([[regular.start - 1], np.unique(copied), [regular.stop]])
            longest = int(np.argmax(np.diff(ends)))
            regular = range(int(ends[longest]) + 1, int(ends[longest + 1]))
        read = self.transpose()._reading if self.mode == "zeros" else range(self.size)
        return Lines(self.size, read, regular, s // math.gcd(s, l))

    @property
    def _reading(self) -> range:
        """The outputs between the first and the last that could read an input."""
        if self.mode != "zeros":
            return range(self.out_size)
        start = -(-(self.lo - self.dilated_taps + 1) // self.stride)
        stop = (dilated(self.size, self.lhs_dilation) - 1 + self.lo) // self.stride + 1
        return range(self.out_size)[max(0, start) : max(0, start, stop)] if self.size else range(0)

    @property
    def gram(self) -> np.ndarray:
        """``gram[p, q]``: how many outputs read one and the same input through taps p and q."""
        lines = self.output_lines
        table, counts = self.table(lines.samples), lines.counts[: len(lines.samples), None]
        pairs = [(((table == table[:, p : p + 1]) & (table >= 0)) * counts).sum(0) for p in range(self.taps)]
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
        """The axis that makes outputs ``start`` to ``stop`` alone, and the inputs that it reads
        (docs/maths.md, section 7).

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

    def polyphase(self) -> list[Phase]:
        """Split a zeros-mode axis by output residue so that no ``lhs_dilation`` is left.

        Outputs ``o = c + L*q``, with ``L = l / gcd(s, l)``, reach inputs only through taps
        ``p = p0 + P*p'``, with ``P = l / gcd(r, l)``; between ``q``, ``p'`` and the input the
        relation is again an axis, of stride ``L*s/l`` and dilation ``P*r/l``.
        """
        count = self.lhs_dilation // math.gcd(self.stride, self.lhs_dilation)
        return [self._phase(c) for c in range(count)]

    def _phase(self, c: int) -> Phase:
        s, l, r = self.stride, self.lhs_dilation, self.rhs_dilation
        count, step = l // math.gcd(s, l), l // math.gcd(r, l)
        first = solve_congruence(r, self.lo - c * s, l)
        taps = range(self.taps)[first::step] if first is not None else range(0)
        shift = (c * s + taps.start * r - self.lo) // l
        axis = Axis(self.size, len(taps), count * s // l, -shift, rhs_dilation=step * r // l)
        outputs = -(-self.out_size // count)  # of every phase; the last ones may make a spare output
        return Phase(taps, axis.ending_at(outputs))

    def within_int32(self) -> Axis:
        """The same relation in steps whose reach int32 holds; the axis itself where none is known.

        In zeros mode there is one whenever the sizes allow for it: of large steps only those count that
        relate points within the box. A boundary mode keeps its padding, and gives up what no two outputs,
        taps or positions tell apart.
        """
        if self.reach <= _INT32 or max(self.size, self.taps, self.out_size) > _INT32:
            return self
        shorter = self._in_small_steps() if self.mode == "zeros" else self._without_idle_steps()
        return shorter if shorter.reach <= _INT32 else self

    def _in_small_steps(self) -> Axis:
        sizes = (self.out_size, self.taps, self.size)
        steps = (self.stride, self.rhs_dilation, self.lhs_dilation)
        (s, r, l), point = small_steps(sizes, steps, self._points())
        # Without a related point, the window begins behind the last position.
        lo = point[0] * s + point[1] * r - point[2] * l if point else -dilated(self.size, l)
        return Axis(self.size, self.taps, s, lo, lhs_dilation=l, rhs_dilation=r).ending_at(self.out_size)

    def _points(self) -> Iterator[tuple[int, int, int]]:
        """The first two related points ``(o, p, t)`` of every tap, which span all related points."""
        s, l = self.stride, self.lhs_dilation
        step = l // math.gcd(s, l)
        for p in range(self.taps if self.size else 0):
            b = p * self.rhs_dilation - self.lo
            residue = solve_congruence(s, -b, l)
            if residue is not None:
                first = max(0, -(b // s))
                first += (residue - first) % step
                for o in (first, first + step):
                    if o < self.out_size and (o * s + b) // l < self.size:
                        yield o, p, (o * s + b) // l

    def _without_idle_steps(self) -> Axis:
        """One output takes no stride, one tap no dilation; a common factor of all steps is none of them."""
        l = self.lhs_dilation if self.padded_size > 1 else 1
        r = self.rhs_dilation if self.taps > 1 else 1
        slack = dilated(self.padded_size, l) - dilated(self.taps, r)
        g = math.gcd(l, r, self.stride) if self.out_size > 1 else math.gcd(l, r)
        s = self.stride // g if self.out_size > 1 else max(0, slack) // g + 1
        return replace(self, stride=s, lhs_dilation=l // g, rhs_dilation=r // g)


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


@dataclass(frozen=True)
class Lines:
    """The outputs (or inputs) of one axis: what line ``i`` of ``repeating`` is related with, line
    ``i + period`` is related with through the same taps, a fixed distance further.

    ``samples`` holds one line of each that are alike, ascending. Lines outside of ``related`` have no
    relation at all and no sample.
    """

    size: int
    related: range
    repeating: range
    period: int

    @property
    def cycles(self) -> range:
        """The part of ``repeating`` that is whole periods."""
        stop = max(self.repeating.start, min(self.repeating.stop, self.related.stop))
        start = min(max(self.repeating.start, self.related.start), stop)
        return range(start, start + (stop - start) // self.period * self.period)

    @property
    def samples(self) -> np.ndarray:
        inside = self.cycles
        if not inside:
            return np.arange(self.related.start, self.related.stop)
        before, after = (self.related.start, inside.start), (inside.stop, self.related.stop)
        one = inside.start, inside.start + self.period
        return np.concatenate([np.arange(*part) for part in (before, one, after)])

    @property
    def counts(self) -> np.ndarray:
        """How many lines each sample stands for; one more entry for those without a relation, if any."""
        inside, samples = self.cycles, self.samples
        each = max(1, len(inside) // self.period)
        counts = np.where((samples >= inside.start) & (samples < inside.stop), each, 1)
        idle = self.size - len(self.related)
        return np.append(counts, idle) if idle else counts

    def sample_of(self, line: Ints, where: Any = np.where) -> Ints:
        """Which sample stands for a line: arithmetic, for arrays on the host and in a trace."""
        inside = self.cycles
        skipped = max(0, len(inside) - self.period)
        repeated = (line - inside.start) % self.period + inside.start - self.related.start
        index = where(line < inside.start, line - self.related.start, line - self.related.start - skipped)
        index = where((line >= inside.start) & (line < inside.stop), repeated, index)
        idle = (line < self.related.start) | (line >= self.related.stop)
        return where(idle, len(self.related) - skipped, index)

    def within(self, part: range) -> Lines:
        """The same lines, of which only those of ``part`` are said to repeat."""
        start = max(self.repeating.start, part.start)
        return replace(self, repeating=range(start, max(start, min(self.repeating.stop, part.stop))))


@bounded_cache
def _runs(axis: Axis) -> tuple[Run, ...]:
    lines, period = axis.output_lines, axis.output_lines.period
    inside, outputs = lines.cycles, lines.samples
    repeats = len(inside) // period
    table = axis.table(outputs)
    valid = table >= 0
    widths = (np.diff(np.sort(table, axis=1), axis=1, prepend=-1) > 0).sum(axis=1)
    cycle = int(widths[(outputs >= inside.start) & (outputs < inside.stop)].sum())
    starts = np.cumsum(widths) - widths + np.where(outputs >= inside.stop, (repeats - 1) * cycle, 0)
    runs = []
    for i in np.flatnonzero(widths):
        taps = np.flatnonzero(valid[i])
        taps = taps[np.argsort(table[i, taps], kind="stable")]
        reads, firsts = np.unique(table[i, taps], return_index=True)
        o = int(outputs[i])
        same = range(o, inside.stop, period) if inside.start <= o < inside.stop else range(o, o + 1)
        advance = period * axis.stride // axis.lhs_dilation if len(same) > 1 else 0
        runs.append(Run(same, reads, advance, taps, firsts, int(starts[i]), cycle))
    return tuple(runs)


# -- how many inputs the outputs of one residue read -------------------------------------------------


def _distinct(mode: str, n: int, first: int, s: int, outputs: int, r: int, taps: int) -> int:
    """Pairs (output, input) where output ``q`` reads the inputs that positions
    ``first + q*s + p*r``, ``0 <= p < taps``, are copies of."""
    if mode == "zeros":
        below = [count_below(bound - first, s, outputs, r, taps) for bound in (0, n)]
        return below[1] - below[0]
    if n == 1:
        return outputs
    if mode == "circular":
        return outputs * min(taps, n // math.gcd(n, r))
    if mode == "edge":  # what lies strictly inside, and each end where something lies on it or beyond
        inside = [count_below(bound - first, s, outputs, r, taps) for bound in (1, n - 1)]
        left = count_below(1 - first, s, outputs, 1, 1)
        right = outputs - count_below(n - 1 - (taps - 1) * r - first, s, outputs, 1, 1)
        return inside[1] - inside[0] + left + right
    return _distinct_folded(mode, n, first, s, outputs, r, taps)


def _distinct_folded(mode: str, n: int, first: int, s: int, outputs: int, r: int, taps: int) -> int:
    """:func:`_distinct` where positions i and ``mirror - i`` are copies of one input, modulo a period."""
    period, mirror = (2 * n, -1) if mode == "symmetric" else (2 * n - 2, 0)
    # Taps p and p' of one output meet if p == p', or p + p' == meet, modulo `turn`.
    g = math.gcd(period, r)
    turn = period // g
    some = min(taps, turn)
    start = min(outputs, max(0, -(first // s)))  # outputs that no padding is in the way of
    stop = min(outputs, max(start, (n - 1 - (taps - 1) * r - first) // s + 1))
    repeat = period // math.gcd(period, s)
    if outputs - (stop - start) > repeat:  # rather one output of each position modulo the period
        start = stop = 0
        q, alike = np.arange(min(outputs, repeat)), repeat
    else:
        q, alike = np.concatenate([np.arange(start), np.arange(stop, outputs)]), outputs
    weight = (outputs - 1 - q) // alike + 1 if start == stop == 0 else 1
    at = (first % period + q % period * (s % period)) % period
    meet = (mirror - 2 * at) % period
    sums = meet // g * pow(r // g, -1, turn) % turn
    ordered = sum(np.maximum(0, np.minimum(total + 1, 2 * some - 1 - total)) for total in (sums, sums + turn))
    alone = sum(((total % 2 == 0) & (total // 2 < some)).astype(int) for total in (sums, sums + turn))
    merged = np.where(meet % g == 0, (ordered - alone) // 2, 0)
    return some * outputs - int((merged * weight).sum())

"""The lines of one axis, which repeat away from the border: few of them stand for all.

A *line* is an output or an input position of the axis, with all that it is related with: a row or a column
of the matrix of this axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.cache import bounded_cache
from jaxconv_fc.geometry.modes import Ints


@dataclass(frozen=True)
class Lines:
    """The outputs (or inputs) of one axis.

    Line ``i + period`` is related through the same taps as line ``i``, with positions that are a fixed
    distance further, if both are in ``repeating``. One line of each kind is a *sample*.
    """

    size: int  # how many lines there are
    related: range  # lines outside of it are related with nothing, and have no sample
    repeating: range
    period: int

    @property
    def cycles(self) -> range:
        """The part of ``repeating`` that is whole periods of related lines."""
        stop = max(self.repeating.start, min(self.repeating.stop, self.related.stop))
        start = min(max(self.repeating.start, self.related.start), stop)
        return range(start, start + (stop - start) // self.period * self.period)

    @property
    def samples(self) -> np.ndarray:
        """One line of each kind, ascending: shape (samples,)."""
        inside = self.cycles
        if not inside:
            return np.arange(self.related.start, self.related.stop)
        upto = np.arange(self.related.start, inside.start + self.period)
        return np.concatenate([upto, np.arange(inside.stop, self.related.stop)])

    @property
    def counts(self) -> np.ndarray:
        """How many lines each sample stands for, and one more entry for unrelated lines, if there are any."""
        inside, samples = self.cycles, self.samples
        each = max(1, len(inside) // self.period)
        counts = np.where((samples >= inside.start) & (samples < inside.stop), each, 1)
        idle = self.size - len(self.related)
        return np.append(counts, idle) if idle else counts

    def sample_of(self, line: Ints, where: Any = np.where) -> Ints:
        """The number of the sample that stands for a line; ``len(samples)`` if it is unrelated.

        ``where`` is ``jnp.where`` for arrays in a trace.
        """
        inside = self.cycles
        skipped = max(0, len(inside) - self.period)
        place = line - self.related.start
        repeated = (line - inside.start) % self.period + inside.start - self.related.start
        index = where(line < inside.start, place, where(line < inside.stop, repeated, place - skipped))
        idle = (line < self.related.start) | (line >= self.related.stop)
        return where(idle, len(self.related) - skipped, index)

    def within(self, part: range) -> Lines:
        """The same lines, of which only those of ``part`` are said to repeat."""
        start = max(self.repeating.start, part.start)
        return replace(self, repeating=range(start, max(start, min(self.repeating.stop, part.stop))))


def output_lines(axis: Axis) -> Lines:
    """The outputs of an axis, by what they read: the interior repeats."""
    return Lines(axis.out_size, _related_outputs(axis), axis.interior, axis.out_period)


def input_lines(axis: Axis) -> Lines:
    """The inputs of an axis, by what reads them: those repeat that are read by all taps of direct outputs."""
    # Output o reads t through p if  o*s == t*l + shift - p*r.  With the last tap this is at least the first
    # direct output, and with tap 0 at most the last:  start <= t < stop.
    s, l, direct = axis.stride, axis.lhs_dilation, axis.direct
    start = -(-(direct.start * s + axis.dilated_taps - 1 - axis.shift) // l)
    stop = (direct.stop * s - 1 - axis.shift) // l + 1
    regular = range(axis.size)[max(0, start) : max(0, start, stop)]
    if axis.pads_with_zeros:
        related = _related_outputs(axis.transpose())
    else:  # keep the longest part that no copy is made of
        related = range(axis.size)
        copied = np.unique(axis.source(axis.copied_positions))
        copied = copied[(copied >= regular.start) & (copied < regular.stop)]
        ends = np.concatenate([[regular.start - 1], copied, [regular.stop]])
        longest = int(np.argmax(np.diff(ends)))
        regular = range(int(ends[longest]) + 1, int(ends[longest + 1]))
    return Lines(axis.size, related, regular, s // math.gcd(s, l))


def _related_outputs(axis: Axis) -> range:
    """The outputs between the first and the last whose window meets an input."""
    if not axis.pads_with_zeros:
        return range(axis.out_size)
    start = -(-(axis.lo - axis.dilated_taps + 1) // axis.stride)
    stop = (axis.dilated_size - 1 + axis.lo) // axis.stride + 1
    return range(axis.out_size)[max(0, start) : max(0, start, stop)] if axis.size else range(0)


def gram(axis: Axis) -> np.ndarray:
    """``gram[p, q]``: how many outputs read one and the same input through taps p and q."""
    lines = output_lines(axis)
    table = axis.table(lines.samples)  # (samples, taps): the input that is read, or -1
    counts = lines.counts[: len(lines.samples), None]
    pairs = [(((table == table[:, p : p + 1]) & (table >= 0)) * counts).sum(0) for p in range(axis.taps)]
    return np.array(pairs, int).reshape(axis.taps, axis.taps)


@dataclass(frozen=True, eq=False)
class Run:
    """Outputs of one class: they read through the same taps, at a regular step.

    In the sorted list of all pairs (output, input), those of ``outputs[q]`` begin at ``start + q*stride``.
    """

    outputs: range
    reads: np.ndarray  # the inputs that the first output reads, ascending: shape (width,)
    advance: int  # how far they move from one output to the next
    start: int
    stride: int

    @property
    def width(self) -> int:
        return len(self.reads)


@bounded_cache
def output_runs(axis: Axis) -> tuple[Run, ...]:
    """The outputs of an axis by class, without those that read nothing.

    One class for each residue of the interior (one residue unless there is ``lhs_dilation``) and one for
    each output of the border, so few for an ordinary layer.
    """
    lines = output_lines(axis)
    inside, outputs = lines.cycles, lines.samples
    table = axis.table(outputs)  # (samples, taps): the input that is read, or -1
    widths = (np.diff(np.sort(table, axis=1), axis=1, prepend=-1) > 0).sum(axis=1)  # (samples,)
    repeated = (outputs >= inside.start) & (outputs < inside.stop)
    cycle = int(widths[repeated].sum())  # pairs of one period
    skipped = (len(inside) // lines.period - 1) * cycle  # pairs of those periods that no sample is of
    starts = np.cumsum(widths) - widths + np.where(outputs >= inside.stop, skipped, 0)
    runs = []
    for i in np.flatnonzero(widths):
        first = int(outputs[i])
        alike = range(first, inside.stop if repeated[i] else first + 1, lines.period)
        advance = lines.period * axis.stride // axis.lhs_dilation if len(alike) > 1 else 0
        runs.append(Run(alike, np.unique(table[i][table[i] >= 0]), advance, int(starts[i]), cycle))
    return tuple(runs)

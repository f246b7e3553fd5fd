"""What an axis is padded with: one entry of :data:`MODES` for each boundary mode.

Positions ``i`` count from the first of ``n`` inputs. Those below 0 and from ``n`` on are padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxconv_fc.lattice import count_below, least

# Integers of any kind: int, numpy.ndarray, jax.Array or a tracer.
Ints = Any


class Windows(NamedTuple):
    """What some outputs read: output ``q`` the positions ``first + q*stride + p*dilation``, one per tap."""

    first: int  # the position that output 0 reads through tap 0
    stride: int
    outputs: Ints  # 0 <= q < outputs
    dilation: int
    taps: int  # 0 <= p < taps

    def below(self, bound: Ints) -> Ints:
        """How many pairs (q, p) have a position less than ``bound``."""
        return count_below(bound - self.first, self.stride, self.outputs, self.dilation, self.taps)


@dataclass(frozen=True)
class BoundaryMode:
    """What an axis of ``n`` inputs is padded with. This one pads with zeros, which are copies of no input."""

    numpy_name: str  # the mode of numpy.pad
    aliases: tuple[str, ...] = ()  # other names that conv_spec takes

    def source(self, i: Ints, n: int) -> Ints:
        """The input that position ``i`` is a copy of."""
        return i

    def depth(self, pads: int, n: int) -> int:
        """How many inputs, from one end on, the ``pads`` positions beyond it are copies of."""
        return 0

    def copies(self, t: int, n: int, start: int, stop: int) -> int:
        """How many of the positions ``start <= i < stop`` are copies of input ``t``."""
        return int(start <= t < stop)

    def distinct(self, windows: Windows, n: int) -> int:
        """How many pairs (output, input) there are such that the output reads a copy of the input."""
        return windows.below(n) - windows.below(0)


class _Edge(BoundaryMode):
    """Padding repeats the first and the last input."""

    def source(self, i: Ints, n: int) -> Ints:
        return least((i + abs(i)) // 2, n - 1)  # max(i, 0), then min

    def depth(self, pads: int, n: int) -> int:
        return 1

    def copies(self, t: int, n: int, start: int, stop: int) -> int:
        return 1 - start * (t == 0) + (stop - n) * (t == n - 1)

    def distinct(self, windows: Windows, n: int) -> int:
        if n == 1:
            return windows.outputs
        # Strictly inside, positions are inputs. An output reads a copy of the first input if its first tap
        # reads at 0 or before, and a copy of the last input if its last tap reads at n - 1 or beyond.
        left = windows._replace(taps=1).below(1)
        last = windows.first + (windows.taps - 1) * windows.dilation
        right = windows.outputs - windows._replace(first=last, taps=1).below(n - 1)
        return windows.below(n - 1) - windows.below(1) + left + right


class _Circular(BoundaryMode):
    """Padding repeats the axis: ``i`` and ``i + period`` are copies of one input."""

    def period(self, n: int) -> int:
        return n

    def source(self, i: Ints, n: int) -> Ints:
        return i % self.period(n)

    def depth(self, pads: int, n: int) -> int:
        return n

    def copies(self, t: int, n: int, start: int, stop: int) -> int:
        return (stop - 1 - t) // self.period(n) - (start - 1 - t) // self.period(n)

    def distinct(self, windows: Windows, n: int) -> int:
        return windows.outputs * self.different(windows, n)

    def different(self, windows: Windows, n: int) -> int:
        """How many positions that differ modulo the period an output reads: those of its first taps."""
        return min(windows.taps, self.period(n) // math.gcd(self.period(n), windows.dilation))


@dataclass(frozen=True)
class _Mirrored(_Circular):
    """Padding repeats the axis and its mirror image: ``i`` and ``mirror - i`` are copies of one input."""

    mirror: int = 0  # 0: the mirror stands on the first input; -1: half a position before it

    def period(self, n: int) -> int:
        return max(1, 2 * (n - 1 - self.mirror))

    def source(self, i: Ints, n: int) -> Ints:
        within = super().source(i, n)
        return least(within, 2 * (n - 1) - self.mirror - within)

    def depth(self, pads: int, n: int) -> int:
        return pads + 1 + self.mirror

    def copies(self, t: int, n: int, start: int, stop: int) -> int:
        images = {t, (self.mirror - t) % self.period(n)}  # equal where the mirror stands on t
        return sum(_Circular.copies(self, i, n, start, stop) for i in images)

    def distinct(self, windows: Windows, n: int) -> int:
        q, weight = self._reading_padding(windows, n)
        return super().distinct(windows, n) - int((self._mirrored_taps(q, windows, n) * weight).sum())

    def _reading_padding(self, windows: Windows, n: int) -> tuple[np.ndarray, np.ndarray | int]:
        """``(q, weight)``: outputs that may read padding, and how many such outputs each stands for."""
        first, s, outputs, r, taps = windows
        start = min(outputs, max(0, -(first // s)))  # outputs start to stop read none
        stop = min(outputs, max(start, (n - 1 - (taps - 1) * r - first) // s + 1))
        repeat = self.period(n) // math.gcd(self.period(n), s)
        if outputs - (stop - start) <= repeat:
            return np.concatenate([np.arange(start), np.arange(stop, outputs)]), 1
        q = np.arange(min(outputs, repeat))  # one output of each position modulo the period
        return q, (outputs - 1 - q.astype(object)) // repeat + 1  # Python ints: outputs may exceed 64 bits

    def _mirrored_taps(self, q: np.ndarray, windows: Windows, n: int) -> np.ndarray:
        """How many pairs of taps ``p < p'`` of each output ``q`` read two different copies of one input."""
        # At position `at`, that is  (at + p*r) + (at + p'*r) == mirror  modulo the period, or, if g divides
        # mirror - 2*at,  p + p' == total  modulo  turn = period/g.  Of taps, only the different ones count.
        first, s, _, r, _ = windows
        period, some = self.period(n), self.different(windows, n)
        g = math.gcd(period, r)
        at = (first % period + q % period * (s % period)) % period
        turn, sums = period // g, (self.mirror - 2 * at) % period
        total = sums // g * pow(r // g, -1, turn) % turn
        totals = np.stack([total, total + turn])  # (2, outputs), as p + p' < 2*turn
        ordered = np.maximum(0, np.minimum(totals + 1, 2 * some - 1 - totals))  # pairs (p, p') of all orders
        alone = (totals % 2 == 0) & (totals // 2 < some)  # those with p == p'
        return np.where(sums % g == 0, (ordered - alone).sum(0) // 2, 0)


MODES: dict[str, BoundaryMode] = {
    "zeros": BoundaryMode("constant", ("constant",)),
    "circular": _Circular("wrap", ("wrap",)),
    "reflect": _Mirrored("reflect", mirror=0),
    "symmetric": _Mirrored("symmetric", mirror=-1),
    "edge": _Edge("edge", ("replicate",)),
}

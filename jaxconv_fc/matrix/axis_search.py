"""The relation of one axis, read off what a matrix shows of it.

A matrix shows an axis as :class:`View`: of each pair (output o, input t) a few random sums of the entries of
M that relate them. Where M is a convolution, ``values[o, t]`` is the sum of what stands for the taps through
which o reads t. So the search for the geometry of an axis is one search in one dimension, whatever the other
axes and the channels do.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, reduce
from typing import NamedTuple

import numpy as np

from jaxconv_fc.geometry.axis import Axis, Ints
from jaxconv_fc.geometry.modes import MODES
from jaxconv_fc.matrix.projection import solve_gram_on_host

_PAIRS = 2**10  # pairs (output, input) of an axis up to which all boundary geometries are compared
_ROWS = 8
_REGULAR = 0.2
_FEW = 4
_SMALL = 3
_WORK = 2**26
_NEVER = 2**40
_ROUNDING = 2.0**-48


class View:
    """What a matrix shows of one axis, and which differences count as none."""

    def __init__(
        self, values: np.ndarray, level: float, slack: float, *, noisy: bool = False, strict: bool = False
    ):
        self.values = values  # (outputs, inputs, sums)
        self.level = level  # values up to it are 0
        self.slack = slack  # values that differ by so much or less are equal
        self.strict = strict  # no geometry that is only one on paper
        # Where no two outputs share a tap, so many taps are allowed, each for one used pair.
        self.unshared = 0 if strict else int(self.used.sum())
        # Whether all steps are compared: of a large axis, or with noise, that would take long.
        self.small = not noisy and values.shape[0] * values.shape[1] <= _PAIRS

    @cached_property
    def used(self) -> np.ndarray:
        """(outputs, inputs): where an output reads an input."""
        return magnitude(self.values) > self.level

    @property
    def least_taps(self) -> int:
        """No geometry has fewer taps: an output reads its inputs through different ones."""
        return max(1, int(self._widths.max(initial=0)))

    def least_taps_of(self, l: int) -> int:
        """The same, with input dilation l: outputs of different residues read through different taps."""
        return sum(int(self._widths[c::l].max(initial=0)) for c in range(l))

    @cached_property
    def _widths(self) -> np.ndarray:
        return self.used.sum(1)

    @cached_property
    def dilations(self) -> list[int]:
        """The input dilations that a boundary mode may have: there, outputs at this distance read through the
        same taps, whatever inputs, so that their rows have the same sum."""
        m, n = self.used.shape
        sums, slack = self.values.sum(1), self.slack * math.sqrt(n)
        farthest = m if m <= _FEW else m - 1
        return [
            l for l in range(1, max(farthest, 1) + 1) if np.abs(sums[l:] - sums[:-l]).max(initial=0) <= slack
        ]

    def residual(self, axis: Axis) -> float:
        """The largest difference from the nearest values that this axis can have."""
        return float(np.abs(self.values - self._nearest(axis)).max(initial=0))

    def criterion(self, axis: Axis) -> float:
        """The Bayesian information criterion of this axis: less is better."""
        off, sums = self.values - self._nearest(axis), self.values.shape[-1]
        return bic(float((np.abs(off) ** 2).sum()), off.size, axis.taps * sums)

    def _nearest(self, axis: Axis) -> np.ndarray:
        """The nearest values that an axis can have."""
        reads = axis.reads(np.arange(axis.out_size))
        nearest, (o, t, p) = np.zeros_like(self.values), reads
        np.add.at(nearest, (o, t), self._taps(axis, reads)[p])
        return nearest

    def _taps(self, axis: Axis, reads: tuple[np.ndarray, ...] | None = None) -> np.ndarray:
        """What then stands for each tap, by least squares: (taps, sums). ``reads`` are of all outputs."""
        o, t, p = axis.reads(np.arange(axis.out_size)) if reads is None else reads
        sums = np.zeros((axis.taps, self.values.shape[-1]), self.values.dtype)
        np.add.at(sums, p, self.values[o, t])
        return solve_gram_on_host(axis, sums, 0)

    def is_plausible(self, axis: Axis) -> bool:
        """Whether the axis is more than one on paper: outputs share taps, the end taps of a boundary mode are
        not 0 (if one is, the axis would rather be cropped), and no steps go around it more than once."""
        if not self.strict:
            return True
        (m, n), s, l = self.used.shape, axis.stride, axis.lhs_dilation
        taps = magnitude(self._taps(axis)) > self.level
        shares = min(m, n) == 1 or self.used.sum() > taps.sum() or not taps.any()
        shares &= l == 1 or 2 * taps.sum() >= axis.taps  # most of the holes of a dilated input are filled
        small = s <= max(_SMALL, n // 2) and l <= max(_SMALL, m // 2)
        if axis.pads_with_zeros:
            return bool(shares and (small or min(s, l) == 1))
        return bool(shares and small and axis.rhs_dilation <= max(_SMALL, n // 2) and taps[0] and taps[-1])


def magnitude(values: np.ndarray) -> np.ndarray:
    """The root mean square over the sums."""
    return np.sqrt((np.abs(values) ** 2).mean(-1)) if values.shape[-1] else np.zeros(values.shape[:-1])


def bic(squares: float, size: int, parameters: int) -> float:
    """``N log(RSS / N) + P log N`` of a sum of squares over N numbers; P parameters are fitted.

    Infinite where P is more than half of N: as many parameters fit anything.
    """
    if 2 * parameters > size:
        return math.inf
    return size * math.log(max(squares / max(size, 1), _ROUNDING**2)) + parameters * math.log(max(size, 2))


# -- zeros -----------------------------------------------------------------------------------------


def zeros_axis(view: View) -> Axis:
    """The zeros-mode axis that fits best; of several, the one with the fewest taps."""
    s, l = _most_constant(view.values, view.slack, *_candidates(view.used, view.unshared))
    return _fitted(view, s, l)


def _q(o: Ints, t: Ints, s: Ints, l: Ints) -> Ints:
    return t * l - o * s


class _Pair(NamedTuple):
    """An output and an input position, or the difference of two such pairs."""

    o: int
    t: int


def _candidates(used: np.ndarray, unshared: int) -> tuple[np.ndarray, np.ndarray]:
    """``(s, l)``: the steps that a matrix with these used entries may have, sorted by the number of taps
    that they need, then by s + l, then by s.

    Taps are ``(max q - min q) / r + 1`` over the used pairs. The extremes of q are at corners of the convex
    hull of the used pairs. The dilation r is the gcd of the differences of q, so of those of two vectors that
    span the differences of the used pairs.
    """
    m, n = used.shape
    s, l = (v.ravel() for v in np.meshgrid(np.arange(1, max(n, 1) + 1), np.arange(1, max(m, 1) + 1)))
    coprime = np.gcd(s, l) == 1
    s, l = s[coprime], l[coprime]
    q = [_q(*pair, s, l) for pair in _corners(used)] or [np.zeros_like(s)]
    r = reduce(np.gcd, [np.abs(_q(*pair, s, l)) for pair in _difference_basis(used)])
    taps = (reduce(np.maximum, q) - reduce(np.minimum, q)) // np.maximum(r, 1) + 1
    # Steps beyond the matrix share no tap, so every matrix fits them: allowed only if all taps are used.
    shares = ((s < n) & (l < m)) | (min(m, n) <= 1) | ((taps <= unshared) & (unshared < used.size))
    order = np.lexsort((s[shares], (s + l)[shares], taps[shares]))
    return s[shares][order], l[shares][order]


def _corners(used: np.ndarray) -> list[_Pair]:
    """Used pairs among which every linear function of o and t has its extremes.

    They are on the convex hull, so first or last of their row. Of those, a chain keeps the ones where it
    turns one way (Andrew 1979).
    """
    rows = np.flatnonzero(used.any(1)).tolist()
    corners = []
    for side, turn in ((used.argmax(1), 1), (used.shape[1] - 1 - used[:, ::-1].argmax(1), -1)):
        chain: list[_Pair] = []
        for pair in map(_Pair, rows, side[rows].tolist()):
            while len(chain) > 1 and turn * _turn(chain[-2], chain[-1], pair) <= 0:
                chain.pop()
            chain.append(pair)
        corners += chain
    return corners


def _turn(a: _Pair, b: _Pair, c: _Pair) -> int:
    """Positive for a left turn at b on the way from a to c, negative for a right turn."""
    return (b.o - a.o) * (c.t - a.t) - (b.t - a.t) * (c.o - a.o)


def _difference_basis(used: np.ndarray) -> tuple[_Pair, _Pair]:
    """Two vectors whose whole multiples add up to the differences of all used pairs.

    The first has the gcd of all differences in o, by Euclid's algorithm. What it leaves of every difference
    has o = 0, and the second has the gcd of these rests.
    """
    o, t = (v - v[:1] for v in np.nonzero(used))  # differences from the first used pair
    first = _Pair(0, 0)
    for o2, t2 in np.unique(np.stack([o, t], 1)[np.searchsorted(o, np.unique(o))], axis=0).tolist():
        other = _Pair(o2, t2)
        while other.o:
            quotient = first.o // other.o
            first, other = other, _Pair(first.o - quotient * other.o, first.t - quotient * other.t)
    rest = t - o // first.o * first.t if first.o else t
    return first, _Pair(0, int(np.gcd.reduce(rest, initial=0)))


def _most_constant(sketch: np.ndarray, slack: float, s: np.ndarray, l: np.ndarray) -> tuple[int, int]:
    """The first of the steps (s, l) with the least difference of entries l outputs and s inputs apart.

    Differences up to ``slack`` count as 0. Each round compares one candidate in full: the first whose known
    differences are the least. The entry where it differs most is then compared at all steps at once, these
    included, which rules out most other candidates.
    """
    least = np.zeros(sketch.shape[:2])  # [l - 1, s - 1]: lower bounds on the differences
    exact = np.zeros(sketch.shape[:2], bool)  # [l - 1, s - 1]: whether a bound is the difference
    while True:
        best = int(np.argmin(np.maximum(least[l - 1, s - 1] - slack, 0)))
        stride, dilation = int(s[best]), int(l[best])
        if exact[dilation - 1, stride - 1]:
            return stride, dilation
        there = sketch[dilation:, stride:]
        here = sketch[: there.shape[0], : there.shape[1]]
        error = np.abs(there - here).max(-1, initial=0)
        exact[dilation - 1, stride - 1] = True
        if error.size:
            o, t = (int(v) for v in np.unravel_index(np.argmax(error), error.shape))
            size_here, size_there = (np.abs(v[o, t]).max() for v in (here, there))
            at = (o, t) if size_here >= size_there else (o + dilation, t + stride)
            _raise_bounds(sketch, least, *at)


def _raise_bounds(sketch: np.ndarray, least: np.ndarray, o: int, t: int) -> None:
    """Raise the bounds to the differences of entry (o, t) from those l outputs and s inputs away."""
    for there, here in ((sketch[o:, t:], sketch[o, t]), (sketch[o::-1, t::-1], sketch[o, t])):
        error = np.abs(there[1:, 1:] - here).max(-1, initial=0)
        part = least[: error.shape[0], : error.shape[1]]
        np.maximum(part, error, out=part)


def _steady(view: View, s: int, l: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """By ``q = t*l - o*s``, ascending: q, how many pairs have it, the mean of their values, and which part of
    their energy the mean explains."""
    m, n = view.used.shape
    o, t = np.indices((m, n)).reshape(2, -1)
    q, which, counts = np.unique(_q(o, t, s, l), return_inverse=True, return_counts=True)
    values = view.values.reshape(m * n, -1)
    means = np.stack([sums_by(which, column, len(q)) for column in values.T], 1) / counts[:, None]
    energy = np.bincount(which, (np.abs(values) ** 2).sum(1), len(q))
    explained = counts * (np.abs(means) ** 2).sum(1) / np.where(energy > 0, energy, 1)
    return q, counts, means, explained


def sums_by(which: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    if values.dtype.kind == "c":
        return sums_by(which, np.real(values), size) + 1j * sums_by(which, np.imag(values), size)
    return np.bincount(which, values, size)


def _fitted(view: View, s: int, l: int) -> Axis:
    """The axis of stride s and input dilation l whose taps cover what is used: ``p*r - lo == q``."""
    m, n = view.used.shape
    q, counts, means, _ = _steady(view, s, l)
    q = q[magnitude(means) > view.level / np.sqrt(counts)]  # a mean of noise is small
    if not q.size:
        return Axis(n, 1, s, lhs_dilation=l).ending_at(m)
    r = max(1, int(np.gcd.reduce(np.diff(q), initial=0)))
    return Axis(n, int(q[-1] - q[0]) // r + 1, s, -int(q[0]), lhs_dilation=l, rhs_dilation=r).ending_at(m)


# -- boundary modes --------------------------------------------------------------------------------


class BoundarySearch:
    """The search for the axis of a boundary mode that fits a view, with the fewest taps.

    Of several it is the one with the smallest steps, then with the most even padding. The search goes on from
    few taps to more, for with many of them there is much to try.
    """

    def __init__(self, view: View, mode: str) -> None:
        self.view, self.mode = view, mode
        self.axis: Axis | None = None
        self.searched = 0  # no axis of at most so many taps fits
        some = view.dilations if view.used.any() else []
        self._steps = [(s, l) for l in some for s in _strides(view, mode, l) if math.gcd(s, l) == 1]
        self._fits: dict[tuple[int, int], bool] = {}
        self._tried: set[Axis] = set()

    @property
    def least_taps(self) -> int:
        """No axis has fewer taps, as far as is known."""
        return self.axis.taps if self.axis else max(self.view.least_taps, self.searched + 1)

    def upto(self, most: int) -> Axis | None:
        """The axis, if it has at most so many taps."""
        if self.axis or most <= self.searched:
            return self.axis
        view, found = self.view, set()
        for s, l in self._steps:
            if view.least_taps_of(l) > most:
                continue
            if (s, l) not in self._fits:
                self._fits[s, l] = _fits_with_all_taps(view, self.mode, s, l)
            if self._fits[s, l]:
                found |= {*by_interior(view, self.mode, s, l), *_by_cover(view, self.mode, s, l, most)}
        found = {axis for axis in found if axis.taps <= most and _shares(view, axis)} - self._tried
        fitting = (
            axis
            for axis in sorted(found, key=plainness)
            if view.residual(axis) <= view.slack and view.is_plausible(axis)
        )
        self.axis = next(fitting, None)
        self._tried |= found
        self.searched = most
        return self.axis


def _shares(view: View, axis: Axis) -> bool:
    """Whether outputs share taps. If none do, every matrix fits: allowed only if all taps are used."""
    m, n = view.used.shape
    return axis.lhs_dilation < m or min(m, n) == 1 or axis.taps <= view.unshared < view.used.size


def _strides(view: View, mode: str, l: int) -> list[int]:
    """The strides that are tried with an input dilation: all that differ, or on a large axis those by which
    rows move and the smallest ones. Longer ones go around a small axis more than once."""
    m, n = view.used.shape
    if m <= l:
        return [1]
    if view.small:
        return [*range(1, max(n // 2, _SMALL) + 1)]
    first = np.where(view.used.any(1), view.used.argmax(1), -1)  # the first input that an output reads
    here, there = first[:-l], first[l:]
    steps = Counter((there - here)[(here >= 0) & (there > here)].tolist())
    return sorted({s for s, _ in steps.most_common(3)} | {*range(1, _SMALL + 1)})


def plainness(axis: Axis) -> tuple[int, ...]:
    """Fewest taps, smallest steps, most even padding."""
    s, l, r = axis.stride, axis.lhs_dilation, axis.rhs_dilation
    return axis.taps, s + l, s, r, abs(axis.lo - axis.hi), axis.lo


def _fits_with_all_taps(view: View, mode: str, s: int, l: int) -> bool:
    """Whether taps at all places would fit, for a few outputs that read the same taps."""
    n = view.used.shape[1]
    rows = view.values[::l][:_ROWS]  # output i of them begins s*i inputs behind the first
    period, moved = MODES[mode].period(n), s * np.arange(len(rows))
    start = 0 if period else -int(moved[-1]) - 1  # further out all is a copy of one input
    places = np.arange(start, period or n + 1)
    reads = MODES[mode].source(moved[:, None] + places, n)[:, None, :] == np.arange(n)[:, None]
    design, values = (v.reshape(len(rows) * n, -1) for v in (reads.astype(float), rows))
    off = values - design @ np.linalg.lstsq(design, values, rcond=1e-10)[0]
    return bool(np.abs(off).max(initial=0) <= view.slack)


def closed(axis: Axis, m: int) -> Iterator[Axis]:
    """The axis with the least padding that makes m outputs, if there is one."""
    axis = axis.ending_at(m)
    if m == 1:  # any stride that makes no second output
        axis = replace(axis, stride=max(axis.stride, axis.span - axis.dilated_taps + 1))
    if axis.out_size == m:
        yield axis


def neighbours(axis: Axis) -> Iterator[Axis]:
    """The axes with one tap more or less, at either end."""
    r, m = axis.rhs_dilation, axis.out_size
    for more in (1, -1):
        moved = axis.shift + more * r  # the low padding, in dilated steps
        for shift in (axis.shift, moved):
            lo, rest = divmod(shift, 1 if axis.pads_with_zeros else axis.lhs_dilation)
            if rest or axis.taps + more < 1 or (lo < 0 and not axis.pads_with_zeros):
                continue
            near = replace(axis, taps=axis.taps + more, lo=lo)
            yield from closed(near, m)


def by_interior(view: View, mode: str, s: int, l: int) -> Iterator[Axis]:
    """Axes whose interior explains the matrix: q has one value there, and others at the border."""
    m, n = view.used.shape
    q, counts, means, explained = _steady(view, s, l)
    large = (magnitude(means) > view.level / np.sqrt(counts)) & (explained > 0.5)
    most = counts[large].max(initial=0)
    for share in (0.5, 0.9):
        inner = q[large & (counts >= share * most)]
        if not inner.size or most < min(2, m, n):  # a corner explains itself
            continue
        r = max(1, int(np.gcd.reduce(np.diff(inner), initial=0)))
        start = int(inner[0])
        if mode != "zeros":  # it begins with whole copies: at a multiple of l, and not beyond the first input
            starts = (start - i * r for i in range(l + max(0, start) // r + 1))
            start = next((v for v in starts if v <= 0 and v % l == 0), None)
        if start is not None:
            taps, lo = (int(inner[-1]) - start) // r + 1, -start // (1 if mode == "zeros" else l)
            yield from closed(Axis(n, taps, s, lo, 0, l, r, mode), m)


def is_regular(view: View) -> bool:
    """Whether much of the matrix repeats along some small steps, as the interior of a convolution does."""
    m, n = view.used.shape
    total = (np.abs(view.values) ** 2).sum()
    for s, l in itertools.product(range(1, min(_SMALL, n - 1) + 1), range(1, min(_SMALL, m - 1) + 1)):
        _, counts, means, explained = _steady(view, s, l)
        energy = counts * (np.abs(means) ** 2).sum(1)
        if energy[(counts > 2) & (explained > 0.8)].sum() > _REGULAR * total:
            return True
    return min(m, n) == 1 or not total


def inner_axes(view: View, mode: str) -> Iterator[Axis]:
    """The axes with small steps that explain the interior, whether or not they fit at the border."""
    m, n = view.used.shape
    for s in range(1, min(_SMALL, max(n - 1, 1)) + 1):
        for l in range(1, min(_SMALL, max(m - 1, 1)) + 1):
            if math.gcd(s, l) == 1:
                yield from by_interior(view, mode, s, l)


def _by_cover(view: View, mode: str, s: int, l: int, most_taps: int) -> Iterator[Axis]:
    """Axes that read whatever is used, with as few taps as that needs."""
    m, n = view.used.shape
    period = MODES[mode].period(n)
    o, t = np.nonzero(view.used)
    sample = np.isin(o, (0, m // 2, m - 1))
    low = np.arange(period or ((m - 1) * s + n * l) // l + 1)
    most = min(most_taps, l * (period or len(low) + n))
    if len(low) * sample.sum() * most > _WORK:
        return
    for r in range(1, max(n, _SMALL) * l + 1 if view.small else _SMALL + 1):
        relation = Axis(n, most, s, 0, 0, l, r, mode)
        some = low[_cover(relation, o[sample], t[sample], low) <= most]
        for lo in some.tolist():
            (taps,) = _cover(relation, o, t, np.array([lo]))
            # A tap more where so few would make one output more: a boundary mode does not crop.
            longer = (
                replace(relation, taps=k, lo=lo) for k in range(int(taps), min(int(taps) + l, most + 1))
            )
            yield from itertools.islice((axis for near in longer for axis in closed(near, m)), 1)


def _cover(axis: Axis, o: np.ndarray, t: np.ndarray, lo: np.ndarray) -> np.ndarray:
    """How many taps each low padding needs, so that these outputs may read these inputs: (len(lo),)."""
    s, l, r = axis.stride, axis.lhs_dilation, axis.rhs_dilation
    j, rest = np.divmod((o * s)[:, None] + np.arange(axis.taps) * r, l)  # [pair, tap]
    farthest = int(lo[-1])
    inputs = MODES[axis.mode].source(np.arange(-farthest, int(j.max(initial=0)) + 1), axis.size)
    met = (inputs[j - lo[:, None, None] + farthest] == t[:, None]) & (rest == 0)  # [lo, pair, tap]
    first = np.where(met.any(-1), met.argmax(-1), _NEVER)
    return first.max(-1, initial=0) + 1

"""Kinds of entries, lines and pairs of lines of one axis, on the host (docs/maths.md, section 10).

A line is a row or a column. Two rows are alike if they read through the same taps. However long an axis is,
only a few *kinds* of rows exist on it. A kind is a list of taps with the number of times that it occurs. It
is read off one line of each that repeat (:class:`~jaxconv_fc.geometry.lines.Lines`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.cache import bounded_cache
from jaxconv_fc.geometry.lines import Lines, input_lines, output_lines
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.numerics import summed

_SMALL = 2**12  # entries of a table of kinds that a program may hold as a constant
_BYTES_PER_PAIR = 256  # that the host needs to sort pairs of a line and a tap into kinds


@dataclass(frozen=True)
class Kinds:
    """Members (entries, lines or pairs of lines) by kind: the members of a kind hold the same list of codes.

    A code is a tap, a kind of entries, or a pair of taps ``p*k + p'``.
    """

    listed: np.ndarray  # [place]: the codes of kind 0, then those of kind 1, ...
    owner: np.ndarray  # [place]: the kind in whose list the place is
    count: np.ndarray  # [kind]: how often the kind occurs on the axis
    codes: int  # codes are 0, 1, ..., codes - 1
    diagonal: np.ndarray | None = None  # [kind]: of pairs, 1 if they pair a line with itself, else 0

    def sums(self, value: jax.Array, a: int) -> jax.Array:
        """``[..., code, ...] -> [..., kind, ...]`` on axis ``a``: the sums over the codes of each kind."""
        value = jnp.tensordot(value, self.matrix(value.dtype), [[a], [1]], precision="highest")
        return jnp.moveaxis(value, -1, a)

    def matrix(self, dtype: Any) -> jax.Array:
        """``[kind, code]``: how often the code is in the list of the kind.

        A large one is made by the program, which then holds the list alone. The barrier keeps XLA from making
        it while it compiles, which takes seconds.
        """
        check_array("a table of kinds", (len(self.count), self.codes), dtype, "a smaller kernel")
        shape, place = (len(self.count), self.codes), self.owner * self.codes + self.listed
        if math.prod(shape) <= _SMALL:
            return jnp.asarray(np.bincount(place, minlength=math.prod(shape)).reshape(shape), dtype)
        owner, listed = lax.optimization_barrier((jnp.asarray(self.owner), jnp.asarray(self.listed)))
        return jnp.zeros(shape, dtype).at[owner, listed].add(jnp.ones((), dtype))


@dataclass(frozen=True, eq=False)
class Ranges:
    """Lines of one axis, each of which holds the taps ``first, first + step, ...`` of one or more ranges."""

    first: np.ndarray  # [range]: its first tap
    count: np.ndarray  # [range]: how many taps it has
    step: int
    owner: np.ndarray  # [range]: the line whose taps they are
    lines: int  # how many there are; those without a range hold no tap

    def sums(self, value: jax.Array, a: int) -> jax.Array:
        """``[..., tap, ...] -> [..., line, ...]`` on axis ``a``: the sums over the taps of each line.

        A range is a union of nodes of a binary tree over the taps, two per level at most: no difference is
        taken, so nothing cancels, and no entry outside of the range plays a part, be it Inf. Cost: the taps,
        and the logarithm of their number per line.
        """
        value, width = jnp.moveaxis(value, a, -1), -(-value.shape[a] // self.step)
        # The taps p in the order of (p % step, p // step), in which ranges have no gaps.
        value = _padded(value, width * self.step).reshape(*value.shape[:-1], width, self.step)
        value = jnp.swapaxes(value, -1, -2).reshape(*value.shape[:-2], width * self.step)
        depth = (width * self.step - 1).bit_length()
        levels = [_padded(value, 2**depth)]
        for _ in range(depth):  # node i of a level is the sum of the nodes 2i and 2i + 1 of the one before
            levels.append(levels[-1][..., ::2] + levels[-1][..., 1::2])
        tree = jnp.concatenate(levels, axis=-1)
        level = np.arange(depth + 1, dtype=np.int32)[:, None]
        offset = (2 ** (depth + 1) - 2 ** (depth + 1 - level)).astype(np.int32)
        # The barrier keeps XLA from computing with constants while it compiles.
        begin = (self.first % self.step * width + self.first // self.step).astype(np.int32)
        ends = jnp.asarray(begin), jnp.asarray(begin + self.count.astype(np.int32))
        begin, end = lax.optimization_barrier(ends)
        # [level, range]: the nodes within the range are start, ..., stop - 1.
        start, stop = (begin[None] + (2**level - 1)) >> level, end[None] >> level
        total = jnp.zeros((*value.shape[:-1], len(self.first)), value.dtype)
        for node, ends_here in ((start, start % 2 == 1), (stop - 1, stop % 2 == 1)):
            nodes = jnp.take(tree, node + offset, axis=-1, mode="clip")  # [..., level, range]
            total = total + summed(jnp.where(ends_here & (start < stop), nodes, jnp.zeros_like(nodes)), -2)
        if not np.array_equal(self.owner, np.arange(self.lines)):
            total = jnp.zeros((*total.shape[:-1], self.lines), total.dtype).at[..., self.owner].add(total)
        return jnp.moveaxis(total, -1, a)


def _padded(value: jax.Array, size: int) -> jax.Array:
    """The array with zeros behind its last axis, which then has this size."""
    more = size - value.shape[-1]
    return jnp.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, more)]) if more else value


class LineKinds(NamedTuple):
    """What the lines of one axis hold: rows by what they read, or columns by what reads them.

    Of lines that repeat one stands for all: the samples of :class:`~jaxconv_fc.geometry.lines.Lines`, and one
    more for lines without a relation, if there are any.
    """

    lines: Kinds | Ranges  # the entries of each line, which is a kind of its own; Ranges of many taps
    entries: Kinds | None  # the taps that meet in an entry, by kind; None where none meet: an entry is a tap


@bounded_cache
def line_kinds(axis: Axis, rows: bool) -> LineKinds:
    """Rows or columns of one axis.

    Where taps meet, all pairs (line, tap) are listed: ValueError if they are beyond the memory limit.
    """
    lines = output_lines(axis) if rows else input_lines(axis)
    pairs = len(lines.counts) * axis.taps
    if pairs > _SMALL and not axis.collides:
        return LineKinds(_ranges(axis, lines, rows), None)
    check_array("pairs of a line and a tap", (pairs, _BYTES_PER_PAIR), np.uint8, "a smaller kernel")
    line, other, p = axis.reads(lines.samples) if rows else axis.readers(lines.samples)
    if not axis.collides:
        return LineKinds(Kinds(p, line, lines.counts, axis.taps), None)
    width = int(other.max(initial=0)) + 1
    places, entry = np.unique(line * width + other, return_inverse=True)  # entries (line, other), sorted
    line = places // width
    entries, kind = _kinds(entry, p, lines.counts[line], axis.taps)
    return LineKinds(Kinds(kind, line, lines.counts, len(entries.count)), entries)


def _ranges(axis: Axis, lines: Lines, rows: bool) -> Ranges:
    """The taps of lines on an axis where no taps meet. A line is an output, or all copies of an input."""
    padded, samples, total = axis.on_padded, lines.samples, len(lines.counts)
    if rows:
        return Ranges(*padded.taps_of(samples), np.arange(len(samples)), total)
    copies = axis.copied_positions  # no input that has copies repeats: it is a sample
    owner = np.append(np.arange(len(samples)), lines.sample_of(axis.source(copies)))
    turned = padded.transpose()  # its outputs are the padded positions, and its taps are in reverse
    first, count, step = turned.taps_of(np.append(samples + axis.copied[0], copies))
    first = np.where(count > 0, axis.taps - 1 - (first + step * (count - 1)), 0)
    return Ranges(first, count, step, owner, total)


@bounded_cache
def pair_kinds(axis: Axis, rows: bool) -> Kinds:
    """Entries of ``M M^T`` (rows) or ``M^T M`` of one axis, by their pairs of taps ``p*k + p'``.

    Entry (o, o') has one pair of taps for each input that both read. Entries without a pair are left out,
    save those on the diagonal, where the unit matrix has its ones.
    """
    lines = _pair_lines(axis, rows)
    own = np.append(lines.samples, lines.size)  # one past the end stands for lines without a relation
    line, shared, p = axis.reads(lines.samples) if rows else axis.readers(lines.samples)
    # All lines (other, through tap q) that have one of these shared positions, the samples among them.
    met, at = np.unique(shared, return_inverse=True)
    where, other, q = axis.readers(met) if rows else axis.reads(met)
    order = np.argsort(where, kind="stable")
    other, q = other[order], q[order]
    counts = np.bincount(where, minlength=len(met))
    # Every relation (line, shared, p) is paired with all relations of the same shared position, which are a
    # run of `counts` of them: pair j is of relations left[j] and right[j].
    repeats = counts[at]
    starts = (np.cumsum(counts) - counts)[at]
    left = np.repeat(np.arange(line.size), repeats)
    within = np.arange(left.size) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    right = starts[left] + within
    idle = np.setdiff1d(np.arange(len(lines.counts)), line)  # rows of zeros
    width = lines.size + 1
    key = np.concatenate([line[left] * width + other[right], idle * width + own[idle]])
    keys, member = np.unique(key, return_inverse=True)
    pair = p[left] * axis.taps + q[right]
    # Entries on the diagonal get one more code, a mark, so that no other entry is of their kind.
    mark = axis.taps**2
    marks = np.flatnonzero(own[keys // width] == keys % width)
    members = np.concatenate([member[: pair.size], marks])
    codes = np.concatenate([pair, np.full(marks.size, mark)])
    kinds, _ = _kinds(members, codes, lines.counts[keys // width], mark + 1)
    marked = kinds.listed == mark
    diagonal = np.bincount(kinds.owner[marked], minlength=len(kinds.count))
    listed, owner = kinds.listed[~marked], kinds.owner[~marked]
    return replace(kinds, listed=listed, owner=owner, codes=mark, diagonal=diagonal)


def _pair_lines(axis: Axis, rows: bool) -> Lines:
    """The lines of one axis, of which those repeat that share positions with repeating lines only."""
    s, l, z, reach = axis.stride, axis.lhs_dilation, axis.shift, axis.dilated_taps - 1
    if rows:  # output o reads from (o*s - z) / l to (o*s - z + reach) / l
        met = input_lines(axis).repeating
        part = range(((met.start - 1) * l + z) // s + 1, -(-(met.stop * l + z - reach) // s))
        return output_lines(axis).within(part)
    met = output_lines(axis).repeating  # input t is read from (t*l + z - reach) / s to (t*l + z) / s
    part = range(((met.start - 1) * s + reach - z) // l + 1, -(-(met.stop * s - z) // l))
    return input_lines(axis).within(part)


def _kinds(member: np.ndarray, code: np.ndarray, weights: np.ndarray, codes: int) -> tuple[Kinds, np.ndarray]:
    """The kinds of members, and the kind of each. Relation j says that ``member[j]`` holds ``code[j]``;
    member i occurs ``weights[i]`` times on the axis."""
    order = np.lexsort((code, member))
    code = code[order]
    ends = np.cumsum(np.bincount(member, minlength=len(weights)))
    numbers: dict[bytes, int] = {}  # list of codes -> kind
    held, begin = code.tobytes(), 0
    kind = np.empty(len(weights), np.int64)
    for i, end in enumerate((ends * code.itemsize).tolist()):
        kind[i] = numbers.setdefault(held[begin:end], len(numbers))
        begin = end
    lists = [np.frombuffer(key, code.dtype) for key in numbers]
    owner = np.repeat(np.arange(len(lists)), [len(v) for v in lists])
    count = np.zeros(len(lists), np.int64)
    np.add.at(count, kind, weights)
    return Kinds(np.concatenate([code[:0], *lists]), owner, count, codes), kind

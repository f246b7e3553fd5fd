"""The matrix of a stack of convolutions and poolings, as windows on the input.

Entry ``i`` of such a value reads only a window of x, and the windows of neighbours are shifted copies of
the same frame. So the matrix is held as ``array[i, q]``, the weight with which entry ``i`` reads::

    x[i[tie.axis] * tie.stride + tie.start + q]        per axis of x, q < width of the window

A convolution widens the window by its dilated kernel and multiplies the strides; the work is that of the
window, not of the whole input. An axis of x that is tied to no axis of the value is read whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.axis import dilated
from jaxconv_fc.spec import ConvSpec

MOST_TAPS = 64  # a kernel with more is not worth unrolling


class Tie(NamedTuple):
    """How an axis of x is read: along this axis of the value (None: whole), from ``start``."""

    axis: int | None
    stride: int = 1
    start: int = 0


class Slide(NamedTuple):
    """What a window does on one axis of a value."""

    taps: int = 1
    stride: int = 1
    dilation: int = 1
    lo: int = 0
    hi: int = 0


@dataclass(frozen=True)
class Frame:
    """The static part: shape of the value, shape of x, and a tie for each axis of x."""

    shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    ties: tuple[Tie, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    def tied(self, axis: int) -> list[int]:
        """The axes of x that are read along an axis of the value."""
        return [j for j, tie in enumerate(self.ties) if tie.axis == axis]


def whole(shape: tuple[int, ...], array: Any) -> tuple[Frame, Any]:
    """x itself, with these weights: every axis tied to its own, windows of width 1."""
    frame = Frame(shape, shape, tuple(map(Tie, range(len(shape)))))
    return frame, array.reshape(*shape, *[1] * len(shape))


# -- frame -> frame ----------------------------------------------------------------------------


def slid(frame: Frame, widths: Sequence[int], slides: Sequence[Slide]) -> tuple[Frame, list[int]]:
    """The frame and the widths of the windows after a window has slid over every axis of the value."""
    shape, ties, wider = [], list(frame.ties), list(widths)
    for axis, (size, s) in enumerate(zip(frame.shape, slides, strict=True)):
        shape.append(max(0, (size + s.lo + s.hi - dilated(s.taps, s.dilation)) // s.stride + 1))
        for j in frame.tied(axis):
            _, stride, start = frame.ties[j]
            ties[j] = Tie(axis, stride * s.stride, start - s.lo * stride)
            wider[j] += (s.taps - 1) * s.dilation * stride
    return Frame(tuple(shape), frame.in_shape, tuple(ties)), wider


def over_taps(
    frame: Frame, array: Any, slides: Sequence[Slide], at_tap: Callable[[tuple[int, ...], Any], Any]
) -> tuple[Frame, Any]:
    """Sum over taps of ``at_tap(tap, entries read)``, each at its place in the wider window."""
    widths = array.shape[frame.rank :]
    after, wider = slid(frame, widths, slides)
    zero = jnp.zeros((), array.dtype)
    pads = [(s.lo, s.hi, 0) for s in slides] + [(0, 0, 0)] * len(widths)
    array = lax.pad(array, zero, pads)
    total: Any = None
    for tap in np.ndindex(*(s.taps for s in slides)):
        first = [p * s.dilation for p, s in zip(tap, slides, strict=True)]
        last = [a + (n - 1) * s.stride + 1 for a, n, s in zip(first, after.shape, slides, strict=True)]
        read = lax.slice(array, [*first, *[0] * len(widths)], [*last, *widths],
                         [*(s.stride for s in slides), *[1] * len(widths)])  # fmt: skip
        term = at_tap(tap, read)
        shift = [0] * len(widths)
        for axis, offset in enumerate(first):
            for j in frame.tied(axis):
                shift[j] = offset * frame.ties[j].stride
        room = [(a, w - v - a, 0) for a, v, w in zip(shift, widths, wider, strict=True)]
        if term.shape[frame.rank :] != tuple(widths):  # the convolution has opened the channel's window
            room = [(a, 0, 0) if n > v else r for a, v, n, r in
                    zip(shift, widths, term.shape[frame.rank :], room, strict=True)]  # fmt: skip
        term = lax.pad(term, zero, [(0, 0, 0)] * frame.rank + room)
        total = term if total is None else total + term
    return after, total


def pooled(frame: Frame, array: Any, slides: tuple[Slide, ...]) -> tuple[Frame, Any]:
    return slid(frame, array.shape[frame.rank :], slides)[0], _pool(frame, array, slides)


@partial(jax.jit, static_argnums=(0, 2))
def _pool(frame: Frame, array: Any, slides: tuple[Slide, ...]) -> Any:
    return over_taps(frame, array, slides, lambda tap, read: read)[1]


def convolved(frame: Frame, array: Any, spec: ConvSpec, kernel: Any) -> tuple[Frame, Any] | None:
    """The value convolved, or None where windows do not describe the result."""
    numbers = spec.dimension_numbers
    batch, feature, *spatial = numbers.lhs_spec
    depthwise = spec.group_channels == 1 and spec.out_channels == spec.groups
    channel = frame.tied(feature)
    untouched = all(array.shape[frame.rank + j] == 1 and frame.ties[j][1:] == (1, 0) for j in channel)
    if (
        max(spec.lhs_dilation, default=1) > 1
        or spec.batch_group_count > 1
        or (spec.groups > 1 and not depthwise)
        or math.prod(a.taps for a in spec.axes) > MOST_TAPS
        or len(channel) > 1
        or not (depthwise or untouched)
        or 0 in (*spec.lhs_shape, *spec.out_shape)
    ):
        return None
    slides = [Slide()] * frame.rank
    for axis, a in zip(spatial, spec.axes, strict=True):
        slides[axis] = Slide(a.taps, a.stride, a.rhs_dilation, a.lo, a.hi)
    after, _ = slid(frame, array.shape[frame.rank :], slides)
    moved = [0] * frame.rank  # where each axis of the input is in the output
    for before, behind in zip(numbers.lhs_spec, numbers.out_spec, strict=True):
        moved[before] = behind
    opened = not depthwise and bool(channel)
    ties = tuple(
        Tie(None) if opened and j in channel else t._replace(axis=None if t.axis is None else moved[t.axis])
        for j, t in enumerate(after.ties)
    )
    shape = [0] * frame.rank
    for axis, n in enumerate(after.shape):
        shape[moved[axis]] = spec.out_channels if axis == feature else n
    array = _convolve(frame, array, spec, kernel, tuple(slides), channel[0] if opened else None)
    return Frame(tuple(shape), frame.in_shape, ties), array


@partial(jax.jit, static_argnums=(0, 4, 5))
def _convolve(
    frame: Frame, array: Any, spec: ConvSpec, kernel: Any, slides: tuple[Slide, ...], opened: int | None
) -> Any:
    numbers = spec.dimension_numbers
    _, feature, *spatial = numbers.lhs_spec
    kernel = jnp.transpose(kernel, numbers.rhs_spec)  # (out, in, taps...)
    depthwise = spec.groups > 1

    def at_tap(tap: tuple[int, ...], read: Any) -> Any:
        weights = kernel[(slice(None), slice(None), *(tap[axis] for axis in spatial))]
        if depthwise:
            return read * jnp.expand_dims(weights[:, 0], [i for i in range(read.ndim) if i != feature])
        if opened is None:
            return jnp.moveaxis(jnp.tensordot(weights, read, ((1,), (feature,))), 0, feature)
        # The window of the channel axis, so far of width 1, becomes the channels themselves.
        read = jnp.swapaxes(read, feature, frame.rank + opened)
        shape = [1] * read.ndim
        shape[feature], shape[frame.rank + opened] = weights.shape
        return read * weights.reshape(shape)

    _, result = over_taps(frame, array, slides, at_tap)
    order = np.argsort(numbers.out_spec)
    value_axes = [numbers.lhs_spec[i] for i in order]
    return jnp.transpose(result, (*value_axes, *range(frame.rank, result.ndim)))


def padded(frame: Frame, array: Any, pads: Sequence[tuple[int, int, int]]) -> tuple[Frame, Any] | None:
    """Zeros around the value (or, of negative amounts, a crop)."""
    if any(inner and frame.tied(axis) for axis, (_, _, inner) in enumerate(pads)):
        return None
    ties = list(frame.ties)
    for axis, (lo, _, _) in enumerate(pads):
        for j in frame.tied(axis):
            ties[j] = ties[j]._replace(start=ties[j].start - lo * ties[j].stride)
    array = lax.pad(array, jnp.zeros((), array.dtype), [*pads, *[(0, 0, 0)] * len(ties)])
    return Frame(array.shape[: frame.rank], frame.in_shape, tuple(ties)), array


def sliced(frame: Frame, array: Any, start: Sequence[int], limit: Sequence[int], steps: Sequence[int]) -> tuple[Frame, Any]:
    ties = list(frame.ties)
    for axis, (first, step) in enumerate(zip(start, steps, strict=True)):
        for j in frame.tied(axis):
            stride = ties[j].stride
            ties[j] = Tie(axis, stride * step, ties[j].start + first * stride)
    index = tuple(slice(*part) for part in zip(start, limit, steps, strict=True))
    array = array[index]
    return Frame(array.shape[: frame.rank], frame.in_shape, tuple(ties)), array


def transposed(frame: Frame, array: Any, order: Sequence[int]) -> tuple[Frame, Any]:
    where = np.argsort(order)
    ties = tuple(t if t.axis is None else t._replace(axis=int(where[t.axis])) for t in frame.ties)
    array = jnp.transpose(array, (*order, *range(frame.rank, array.ndim)))
    return Frame(array.shape[: frame.rank], frame.in_shape, ties), array


def contracted(frame: Frame, array: Any, axes: tuple[int, ...], known: Any) -> tuple[Frame, Any]:
    """``sum over axes of known[r, axes] * value[axes, free]``: the value has axes ``(r, *free)`` after it."""
    free = [i for i in range(frame.rank) if i not in axes]
    ties = tuple(
        Tie(None) if t.axis in axes else t if t.axis is None else t._replace(axis=1 + free.index(t.axis))
        for t in frame.ties
    )
    array = _contract(frame, array, axes, known)
    return Frame((known.shape[0], *(frame.shape[i] for i in free)), frame.in_shape, ties), array


@partial(jax.jit, static_argnums=(0, 2))
def _contract(frame: Frame, array: Any, axes: tuple[int, ...], known: Any) -> Any:
    """One matrix product per position on the longest tied axis; the windows on all others are made whole."""
    tied = sorted((a for a in axes if frame.tied(a)), key=lambda a: -frame.shape[a])
    for axis in tied[1:]:
        (j,) = frame.tied(axis)
        array = _unfold(array, axis, frame.rank + j, frame.ties[j], frame.in_shape[j])
    rest = [a for a in axes if a not in tied[:1]]
    shape = tuple(frame.shape[a] for a in rest)
    if not tied:
        return jnp.tensordot(known, array, (range(1, known.ndim), rest))
    axis, (j,) = tied[0], frame.tied(tied[0])
    known = jnp.moveaxis(known, 1 + axes.index(axis), 0).reshape(frame.shape[axis], known.shape[0], -1)
    array = jnp.moveaxis(array, (axis, *rest, frame.rank + j), (0, *range(1, 1 + len(rest)), 1 + len(rest)))
    free = array.shape[2 + len(rest) :]
    array = array.reshape(frame.shape[axis], math.prod(shape), array.shape[1 + len(rest)] * math.prod(free))
    known, array = lax.optimization_barrier((known, array))  # else every product writes its operands anew
    terms = [(known[o] @ array[o]).reshape(known.shape[1], -1, math.prod(free)) for o in range(array.shape[0])]
    total = _fold(terms, frame.ties[j], frame.in_shape[j]).reshape(known.shape[1], -1, *free)
    return jnp.moveaxis(total, 1, total.ndim - len(frame.ties) + j)


def _unfold(array: Any, position: int, window: int, tie: Tie, size: int) -> Any:
    """The windows of every position on an axis, written out over the whole axis of x."""
    array = jnp.moveaxis(array, (position, window), (0, -1))
    zero, still = jnp.zeros((), array.dtype), [(0, 0, 0)] * (array.ndim - 2)
    rows = []
    for o in range(array.shape[0]):
        first = o * tie.stride + tie.start
        rows.append(lax.pad(array[o], zero, [*still, (first, size - first - array.shape[-1], 0)]))
    return jnp.moveaxis(jnp.stack(rows), (0, -1), (position, window))


def _fold(terms: Sequence[Any], tie: Tie, size: int) -> Any:
    """Add up the windows of all positions, on the middle axis, where they lie on an axis of x."""
    rows, width, others = terms[0].shape
    low = min(tie.start, 0)
    reach = max(size, tie.start + (len(terms) - 1) * tie.stride + width) - low
    total = jnp.zeros((rows, reach, others), terms[0].dtype)
    for o, term in enumerate(terms):
        first = o * tie.stride + tie.start - low
        total = total.at[:, first : first + width].add(term)
    return total[:, -low : size - low]


@partial(jax.jit, static_argnums=0)
def columns(frame: Frame, array: Any) -> Any:
    """The windows written out: ``(*shape, size of x)``."""
    size, rows = math.prod(frame.in_shape), math.prod(frame.shape)
    column, valid = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    axes = array.ndim
    for j, (tie, n) in enumerate(zip(frame.ties, frame.in_shape, strict=True)):
        index = _along(frame.rank + j, array.shape[frame.rank + j], axes) + jnp.int32(tie.start)
        if tie.axis is not None:
            index = index + _along(tie.axis, frame.shape[tie.axis], axes) * jnp.int32(tie.stride)
        column, valid = column * jnp.int32(n) + index, valid & (index >= 0) & (index < n)
    column = jnp.broadcast_to(jnp.where(valid, column, jnp.int32(size)), array.shape).reshape(rows, -1)
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    zeros = jnp.zeros((rows, size), array.dtype)
    result = zeros.at[row, column].set(array.reshape(rows, -1), mode="drop", unique_indices=True)
    return result.reshape(*frame.shape, size)


def _along(axis: int, size: int, rank: int) -> Any:
    return lax.broadcasted_iota(jnp.int32, tuple(size if i == axis else 1 for i in range(rank)), axis)


def with_shape(frame: Frame, shape: tuple[int, ...]) -> Frame | None:
    """The frame for a reshape that only adds or drops axes of size 1, None for any other."""
    kept = [i for i, n in enumerate(frame.shape) if n != 1]
    there = [i for i, n in enumerate(shape) if n != 1]
    if [frame.shape[i] for i in kept] != [shape[i] for i in there]:
        return None
    ties = []
    for tie in frame.ties:
        if tie.axis is None or tie.axis in kept:
            ties.append(tie if tie.axis is None else tie._replace(axis=there[kept.index(tie.axis)]))
        else:  # one position only: read from there
            ties.append(Tie(None, 1, tie.start))
    return replace(frame, shape=shape, ties=tuple(ties))

"""The padding in front of a convolution, and the bias behind it.

Libraries pad with slices and concatenations, gathers or ``lax.pad``, and then convolve. What these do to the
numbers of the entries of each axis is compared with what each padding mode would do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.functions.moves import (
    COMPUTED,
    CONSTANT,
    ZERO,
    Line,
    Variable,
    ancestry,
    padded,
    taken,
    view,
)
from jaxconv_fc.geometry.axis import dilated
from jaxconv_fc.geometry.modes import MODES
from jaxconv_fc.geometry.spec import ConvSpec

_ORDER = "zeros", "circular", "reflect", "edge", "symmetric"  # of modes that pad an axis alike, the first
_REASONS = {
    CONSTANT: "a pad with a constant that is not 0",
    COMPUTED: "a pad with computed values",
    ZERO: "a pad that is not one padding_mode",
}


def without_padding(spec: ConvSpec, value: Variable, spatial: Sequence[int]) -> tuple[ConvSpec, Any, str]:
    """``(spec, x, in_front)`` of the layer that pads ``x`` and then convolves what has become ``value``.

    ``spatial``: the spatial axes of the value. ``in_front`` says in words what of the padding is not in the
    spec, and is empty if nothing is.
    """
    if 0 in value.shape:
        return spec, value.array, ""
    values, necks = ancestry(value)
    for k in reversed(range(len(necks))):  # the first one is the value itself: no padding
        lines = view(values[necks[k] :: -1])
        fitted = None if lines is None else _fitted(spec, [lines[axis] for axis in spatial])
        if lines is not None and fitted is not None:
            break
    else:
        return spec, value.array, "" if len(values) == 1 else "moves along an axis too long to look at"
    along = [axis for i in spatial for axis, _, _ in lines[i].factors]
    to_base = slice(None, necks[k] - 1 if necks[k] else None, -1)
    behind = [values[: necks[j] + 1][to_base] for j in range(k + 1, len(necks))]
    last = values[necks[-1]]
    if last.eqn is not None:  # some of its entries are of no array that all of them come from
        largest = max(last.sources, key=lambda v: math.prod(v.shape))
        behind.append([largest, *values[: necks[-1] + 1][to_base]])
    in_front = next(filter(None, (_pad_in(chain, along) for chain in behind)), "")
    if in_front or fitted is spec:
        return spec, value.array, in_front
    pairs = zip(spatial, fitted.dimension_numbers.lhs_spec[2:], strict=True)
    sizes = {i: fitted.lhs_shape[axis] for i, axis in pairs}
    if not value.known:
        shape = [sizes.get(i, n) for i, n in enumerate(value.array.shape)]
        return fitted, jax.ShapeDtypeStruct(shape, value.array.dtype), ""
    unpadded = [line.at(np.arange(sizes[i])) if i in sizes else line for i, line in enumerate(lines)]
    return fitted, taken(tuple(unpadded), values[necks[k]].array, value.array.dtype), ""


def _fitted(spec: ConvSpec, lines: Sequence[Line]) -> ConvSpec | None:
    """The spec whose padding makes these spatial axes from whole ones, and then pads as ``spec`` does.

    None for mere crops: a slice of an array is the input of a layer, and no part of it.
    """
    if all(line.whole or (not line.factors and len(line.numbers) == 1) for line in lines):
        return spec
    if all((line.numbers >= 0).all() and len(line.numbers) <= line.size for line in lines):
        return None
    if not spec.pads_with_zeros and any(map(any, spec.padding)):
        return None
    options = []
    for line, (lo, hi), step in zip(lines, spec.padding, spec.lhs_dilation, strict=True):
        if not line.factors and np.count_nonzero(line.numbers >= 0) > 1:
            return None  # copies along an axis that is new are no padding
        options.append(_pads(padded(line.numbers, lo, hi, step, ZERO), line.size, step))
    mode = next((mode for mode in _ORDER if all(mode in found for found in options)), None)
    if mode is None:
        return None
    axes = []
    for axis, line, found in zip(spec.axes, lines, options, strict=True):
        lo, hi, step = found[mode]
        axes.append(replace(axis, size=line.size, lo=lo, hi=hi, lhs_dilation=step))
    return replace(spec.having(axes), padding_mode=mode)


def _pads(numbers: np.ndarray, n: int, step: int) -> dict[str, tuple[int, int, int]]:
    """``(lo, hi, lhs_dilation)`` by mode, for each that makes this axis from one of ``n`` entries.

    ``step``: the dilation if the axis does not show one.
    """
    found: dict[str, tuple[int, int, int]] = {}
    at = np.flatnonzero(numbers >= 0)
    if not len(at) or (numbers < ZERO).any():
        return found
    step = int(at[1] - at[0]) if len(at) > 1 else step
    lo = int(at[0] - step * numbers[at[0]])
    hi = len(numbers) - lo - dilated(n, step)
    if np.array_equal(padded(np.arange(n), lo, hi, step, ZERO), numbers):
        found["zeros"] = lo, hi, step
    copies = numbers[::step]  # a mode pads first and dilates then: holes stand between copies only
    start = _run(copies, n)
    if start is None or (copies < 0).any() or not np.array_equal(padded(copies, 0, 0, step, ZERO), numbers):
        return found
    for mode in _ORDER[1:]:
        if np.array_equal(MODES[mode].source(np.arange(len(copies)) - start, n), copies):
            found[mode] = start, len(copies) - n - start, step
    return found


def _run(numbers: np.ndarray, n: int) -> int | None:
    """Where all ``n`` entries stand in order. Of several places, the one nearest to the middle.

    All of them fit a periodic mode if one does, and "edge" has but one if n > 1.
    """
    if n > len(numbers):
        return None
    starts = np.flatnonzero(numbers[: len(numbers) - n + 1] == 0)
    starts = starts[numbers[starts + n - 1] == n - 1]
    starts = starts[numbers[starts + min(1, n - 1)] == min(1, n - 1)]
    for start in sorted(starts.tolist(), key=lambda s: abs(2 * s + n - len(numbers))):
        if np.array_equal(numbers[start : start + n], np.arange(n)):
            return start
    return None


def _pad_in(chain: Sequence[Variable], along: Sequence[int]) -> str:
    """The padding in the last value of a chain of moves, along some axes of the first, in words; or empty."""
    lines = view(chain)
    if lines is None:
        grown = math.prod(chain[-1].shape) > math.prod(chain[0].shape)
        return "entries copied to other places" if grown and not chain[0].fixed else ""
    for line in (lines[axis] for axis in along):
        held = line.numbers[line.numbers >= 0]
        beside = len(line.numbers) > (line.size if line.factors else len(held))
        if len(held) and beside and any(_run(v, line.size) is not None for v in (held, held[::-1])):
            return _REASONS[min(ZERO, int(line.numbers.min()))]
    return ""


# -- the bias --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A note on the result of a convolution, by which its bias is found."""

    site: int  # the number of the site
    channels: int  # the axis of the output channels
    read: int  # the number of the value that the input of the layer is moved from


def bias_of(result: Variable, added: Variable) -> tuple[int, Any] | None:
    """``(site, bias)`` if the result of a convolution is in ``result``, and ``added`` is a bias.

    That is an argument or a constant that varies along the output channels alone.
    """
    values, necks = ancestry(result)
    base, made = values[necks[-1]], values[necks[-1]].made_by
    if made is None:
        return None
    lines = view(values[necks[-1] :: -1])
    sources, source_necks = ancestry(added)
    source = sources[source_necks[-1]]
    parameter = source.eqn is None and (source.given or source.fixed) and source.number != made.read
    if lines is None or not parameter:
        return None
    if not all(line.whole or not line.factors for line in lines):
        return None
    terms = view(sources[source_necks[-1] :: -1])
    shape = (base.shape[made.channels],)
    if terms is None:
        return None
    if not added.shape:
        terms = (*(Line((), np.zeros(1, int)) for _ in result.shape), terms[-1])
    kept, order = [], []
    for line, term in zip(lines[:-1], terms[:-1], strict=True):
        axes = {axis for axis, _, size in line.factors if size > 1}
        if axes == {made.channels}:
            order += line.factors
            kept.append(term.at(np.broadcast_to(term.numbers, len(line.numbers))))
        elif (term.numbers == term.numbers[0]).all():
            kept.append(term.at(term.numbers[:1]))
        else:
            return None
    dtype = result.array.dtype
    bias = taken((*kept, terms[-1]), source.array, dtype)
    if isinstance(bias, jax.ShapeDtypeStruct):
        return made.site, jax.ShapeDtypeStruct(shape, dtype)
    steps = [step for _, step, _ in order]
    by_channel = jnp.asarray(bias).reshape([size for _, _, size in order])
    return made.site, by_channel.transpose(sorted(range(len(steps)), key=lambda i: -steps[i])).reshape(shape)

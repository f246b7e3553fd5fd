"""Which entries of an earlier array a value holds, where the equations between the two only move entries.

An entry of the array is known by its number. Most moves act on each axis alone. So a value is described by
one list of numbers per axis, a :class:`Line`, whatever the size of the array. ``jnp.pad`` in the mode "wrap"
of an axis of 3 positions is the line ``[2, 0, 1, 2, 0]``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.functions.jaxprs import CALLS, JaxprEqn, inner_jaxprs, open_jaxpr
from jaxconv_fc.geometry.axis import dilated
from jaxconv_fc.sharding import is_traced

ZERO, CONSTANT, COMPUTED = -1, -2, -3  # numbers of what is no entry: 0, another constant, any other value
_LONGEST = 2**24  # positions of the longest axis that is looked at


class Line(NamedTuple):
    """One axis of a value: position ``i`` holds entry ``numbers[i]`` along some axes of the base.

    ``factors`` are these axes, each as (axis of the base, step, size): a part of an axis has another step.
    The number counts in row-major order through them. An axis along which nothing changes has no factors.
    """

    factors: tuple[tuple[int, int, int], ...]
    numbers: np.ndarray

    @property
    def size(self) -> int:
        """How many entries of the base the line chooses from."""
        return math.prod(size for _, _, size in self.factors)

    @property
    def whole(self) -> bool:
        """Whether the line holds every entry once, in order."""
        return len(self.numbers) == self.size and bool((self.numbers == np.arange(self.size)).all())

    def at(self, numbers: Any) -> Line:
        return Line(self.factors, np.asarray(numbers))


# The axes of a value, and then one of length 1 for all axes that were dropped.
View = tuple[Line, ...]


@dataclass(eq=False)
class Variable:
    """What a variable of a jaxpr stands for, and the equation that made it if that only moves entries."""

    array: Any  # the array where it is known, a jax.ShapeDtypeStruct where only its shape is
    fixed: bool = False  # whether it depends on no argument of the function
    given: bool = False  # whether it is an argument of the function, or a slice of one
    eqn: JaxprEqn | None = None
    operands: Sequence[Variable] = ()
    index: int = 0  # which result of the equation it is
    made_by: Any = None  # what find_convs notes of the convolution whose result it is
    number: int = field(default_factory=itertools.count().__next__)  # in the order in which they are made

    @property
    def shape(self) -> tuple[int, ...]:
        """A symbolic batch counts as 1: its entries are all moved alike."""
        return tuple(map(_number, np.shape(self.array)))

    @property
    def known(self) -> bool:
        return not isinstance(self.array, jax.ShapeDtypeStruct)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the equation that made it."""
        return self.eqn.params if self.eqn is not None else {}

    @property
    def concrete(self) -> bool:
        """Whether its entries can be looked at."""
        return self.known and not is_traced(self.array)

    @property
    def sources(self) -> list[Variable]:
        """The operands whose entries it may hold, without those that only pad it with zeros."""
        operands = [v for v in _entries(self.eqn, self.operands) if 0 not in v.shape] if self.eqn else []
        return [v for v in operands if not all_zero(v)] or operands


def _number(size: Any) -> int:
    return size if isinstance(size, int) else 1


def result(eqn: JaxprEqn, operands: Sequence[Variable], index: int, array: Any) -> Variable:
    """The value of one result of an equation."""
    fixed = all(v.fixed for v in operands)
    name = eqn.primitive.name
    if name not in _MOVES:
        return Variable(array, fixed)
    entries = _entries(eqn, operands)
    if name != "pad" and not all(v.concrete for v in operands if v not in entries):
        return Variable(array, fixed)  # where the entries go is not known
    return Variable(array, fixed, eqn=eqn, operands=operands, index=index)


def pads(eqn: JaxprEqn) -> bool:
    """Whether a call ends with a pad or a concatenation, or does nothing but move entries."""
    name = eqn.primitive.name
    if name not in CALLS:
        return name in ("pad", "concatenate")
    inner = open_jaxpr(inner_jaxprs(eqn)[0])[0]
    return any(pads(last) for last in inner.eqns[-1:]) or all(map(_only_moves, inner.eqns))


def _only_moves(eqn: JaxprEqn) -> bool:
    """Whether an equation moves entries or computes where they go."""
    if eqn.primitive.name in CALLS:
        return all(map(_only_moves, open_jaxpr(inner_jaxprs(eqn)[0])[0].eqns))
    kinds = [getattr(v.aval, "dtype", None) for v in eqn.outvars]
    whole = (jnp.issubdtype(kind, np.integer) or kind == np.bool_ for kind in kinds if kind is not None)
    return eqn.primitive.name in _MOVES or all(whole)


def all_zero(value: Variable) -> bool:
    """Whether every entry is the constant 0."""
    if value.fixed and value.concrete:
        return not np.any(np.asarray(value.array))
    spread = value.eqn is not None and _MOVES[value.eqn.primitive.name] in (_same, _broadcast)
    return spread and all_zero(value.operands[0])


def ancestry(value: Variable) -> tuple[list[Variable], list[int]]:
    """``(values, necks)``: the value and what its entries come from, the latest first.

    Every entry of the value passes through each of ``values[i]`` for ``i`` in ``necks``. The walk ends at the
    first value that no move has made. Earlier values may hold a part of the entries alone.
    """
    front, values, necks = {value.number: value}, [], []
    while front:
        latest = front.pop(max(front))
        if not front:
            necks.append(len(values))
        values.append(latest)
        if latest.eqn is None:
            break
        front |= {v.number: v for v in latest.sources}
    return values, necks


def view(values: Sequence[Variable]) -> View | None:
    """The last of these values, as entries of the first. They are in the order in which they are made.

    None where its entries are not a product of one choice per axis.
    """
    base, *others = values
    if max(base.shape, default=0) > _LONGEST:
        return None
    whole = [Line(((i, 1, n),), np.arange(n)) for i, n in enumerate(base.shape)]
    views: dict[Variable, View | None] = {base: (*whole, _NOTHING)}
    for value in others:
        assert value.eqn is not None
        parts = [views.get(v) for v in _entries(value.eqn, value.operands)]
        if any(part is not None for part in parts):
            views[value] = _MOVES[value.eqn.primitive.name](value, parts)
    return views.get(values[-1])


def taken(lines: View, array: Any, dtype: Any) -> Any:
    """The array that a view describes, from its base. It is abstract if the base is."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(len(line.numbers) for line in lines[:-1]), dtype)
    order = [factor for line in lines for factor in line.factors]
    split = sorted(order, key=lambda factor: (factor[0], -factor[1]))
    array = jnp.asarray(array).reshape([size for _, _, size in split])
    array = array.transpose([split.index(factor) for factor in order]).reshape([line.size for line in lines])
    for axis, line in enumerate(lines):
        if not line.whole:
            array = jnp.take(array, np.maximum(line.numbers, 0), axis=axis)
            held = (line.numbers >= 0).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
            array = jnp.where(np.broadcast_to(held, array.shape), array, jnp.zeros_like(array))
    return array[..., 0].astype(dtype)


# -- lines -----------------------------------------------------------------------------------------


_NOTHING = Line((), np.zeros(1, int))


def padded(numbers: np.ndarray, lo: int, hi: int, step: int, fill: int) -> np.ndarray:
    """An axis with ``step - 1`` holes between its positions, then padded; negative amounts crop."""
    out = np.full(max(0, dilated(len(numbers), step) + lo + hi), fill)
    at = lo + step * np.arange(len(numbers))
    held = (at >= 0) & (at < len(out))
    out[at[held]] = numbers[held]
    return out


def _merged(lines: Sequence[Line]) -> Any:
    """Several axes as one :class:`Line`, in row-major order; None if that is too long to look at."""
    factors: list[tuple[int, int, int]] = []
    numbers = np.zeros(1, int)
    if math.prod(len(line.numbers) for line in lines) > _LONGEST:
        return None
    for line in lines:
        before, after = numbers[:, None], line.numbers[None]
        entry = (before >= 0) & (after >= 0)
        numbers = np.where(entry, before * line.size + after, np.minimum(before, after)).ravel()
        for axis, step, size in line.factors:
            if factors and factors[-1][:2] == (axis, step * size):
                size *= factors.pop()[2]
            factors.append((axis, step, size))
    return Line(tuple(factors), numbers)


def _split(line: Line, sizes: Sequence[int]) -> list[Line] | None:
    """One axis as several; None unless it is one whole axis of the base, or a part of one."""
    if len(line.factors) != 1 or not line.whole:
        return None
    ((axis, step, _),) = line.factors
    steps = [step * math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return [Line(((axis, s, n),), np.arange(n)) for s, n in zip(steps, sizes, strict=True)]


# -- the table: primitive -> the view of its result, from those of its operands -----------------------


def _same(value: Variable, parts: Sequence[Any]) -> View | None:
    return parts[value.index]


def _transpose(value: Variable, parts: Sequence[Any]) -> View | None:
    (lines,) = parts
    return (*(lines[i] for i in value.params["permutation"]), lines[-1])


def _reshape(value: Variable, parts: Sequence[Any]) -> View | None:
    """Axes that become one, or a whole axis that becomes several. An axis of length 1 stays where it can."""
    *lines, rest = parts[0]
    shape, found = list(value.shape), []
    while True:
        ones = [lines.pop(0) for _ in range(_leading_ones([len(line.numbers) for line in lines]))]
        ones = [line for line in ones if line.factors]
        for _ in range(_leading_ones(shape)):
            found.append(ones.pop(0) if ones else _NOTHING)
            del shape[0]
        if ones and lines and not lines[0].factors:
            lines[0] = _merged([*ones, lines[0]])  # copies of one entry
        else:
            rest = _merged([rest, *ones])
        if not lines or not shape:
            return (*found, rest)
        i = j = 1
        while (have := math.prod(len(a.numbers) for a in lines[:i])) != (want := math.prod(shape[:j])):
            i, j = i + (have < want), j + (have > want)
            if i > len(lines) or j > len(shape):
                return None
        made = [_merged(lines[:i])] if j == 1 else _split(lines[0], shape[:j]) if i == 1 else None
        if made is None or None in made:
            return None
        found, lines, shape = [*found, *made], lines[i:], shape[j:]


def _leading_ones(sizes: Sequence[int]) -> int:
    return len(list(itertools.takewhile(lambda n: n == 1, sizes)))


def _broadcast(value: Variable, parts: Sequence[Any]) -> View | None:
    *lines, rest = parts[0]
    out = [Line((), np.zeros(n, int)) for n in value.shape]
    for line, axis in zip(lines, value.params["broadcast_dimensions"], strict=True):
        out[axis] = line.at(np.broadcast_to(line.numbers, value.shape[axis]))
    return (*out, rest)


def _slice(value: Variable, parts: Sequence[Any]) -> View | None:
    *lines, rest = parts[0]
    params = value.params
    steps = params["strides"] or (1,) * len(lines)
    bounds = zip(params["start_indices"], map(_number, params["limit_indices"]), steps, strict=True)
    return (*(a.at(a.numbers[slice(*b)]) for a, b in zip(lines, bounds, strict=True)), rest)


def _piece(value: Variable, parts: Sequence[Any]) -> View | None:
    """One result of ``split``."""
    sizes, axis, lines = value.params["sizes"], value.params["axis"], list(parts[0])
    start = sum(sizes[: value.index])
    lines[axis] = lines[axis].at(lines[axis].numbers[start : start + sizes[value.index]])
    return tuple(lines)


def _reverse(value: Variable, parts: Sequence[Any]) -> View | None:
    turned = value.params["dimensions"]
    return tuple(a.at(a.numbers[::-1]) if i in turned else a for i, a in enumerate(parts[0]))


def _pad(value: Variable, parts: Sequence[Any]) -> View | None:
    *lines, rest = parts[0]
    fill, config = _content(value.operands[1]), value.params["padding_config"]
    pads = zip(lines, config, strict=True)
    return (*(a.at(padded(a.numbers, lo, hi, inner + 1, fill)) for a, (lo, hi, inner) in pads), rest)


def _tile(value: Variable, parts: Sequence[Any]) -> View | None:
    *lines, rest = parts[0]
    reps = value.params["reps"]
    return (*(a.at(np.tile(a.numbers, n)) for a, n in zip(lines, reps, strict=True)), rest)


def _concatenate(value: Variable, parts: Sequence[Any]) -> View | None:
    """A part that is not like the longest one on the other axes counts as computed."""
    axis = value.params["dimension"]
    model = max((p for p in parts if p), key=lambda p: len(p[axis].numbers))
    alike = [p is not None and _alike(p, model, axis) for p in parts]
    numbers = [
        p[axis].numbers if same else np.full(v.shape[axis], _content(v))
        for p, v, same in zip(parts, value.operands, alike, strict=True)
    ]
    return (*model[:axis], model[axis].at(np.concatenate(numbers)), *model[axis + 1 :])


def _alike(a: View, b: View, axis: int) -> bool:
    pairs = enumerate(zip(a, b, strict=True))
    return all(
        v.factors == w.factors and (i == axis or np.array_equal(v.numbers, w.numbers)) for i, (v, w) in pairs
    )


def _dynamic_slice(value: Variable, parts: Sequence[Any]) -> View | None:
    *lines, rest = parts[0]
    out = []
    for line, start, size in zip(lines, value.operands[1:], value.params["slice_sizes"], strict=True):
        size = _number(size)
        first = min(max(0, int(start.array)), len(line.numbers) - size)
        out.append(line.at(line.numbers[first : first + size]))
    return (*out, rest)


def _update(value: Variable, parts: Sequence[Any]) -> View | None:
    """An array that is written into another one, whose other entries stay: zeros, as a rule."""
    into, new = parts
    if into is not None or new is None:
        return None
    params, shape = value.params, value.shape
    if "update_jaxpr" in value.params:
        numbers, (given,) = params["dimension_numbers"], (v.array for v in value.operands[1:2])
        if np.ndim(given) != 1 or numbers.inserted_window_dims or numbers.operand_batching_dims:
            return None
        starts = [0] * len(shape)
        for axis, start in zip(numbers.scatter_dims_to_operand_dims, np.asarray(given), strict=True):
            starts[axis] = int(start)
    else:
        starts = [int(v.array) for v in value.operands[2:]]
    *lines, rest = new
    out, fill = [], _content(value.operands[0])
    for line, n, start in zip(lines, shape, starts, strict=True):
        start = min(max(0, start), n - len(line.numbers))
        out.append(line.at(padded(line.numbers, start, n - start - len(line.numbers), 1, fill)))
    return (*out, rest)


def _select(value: Variable, parts: Sequence[Any]) -> View | None:
    """One of the cases everywhere, or a case inside of a box and zeros elsewhere."""
    which = np.asarray(value.operands[0].array).astype(int)
    cases = np.unique(which)
    if len(cases) == 1:
        return parts[cases[0]]
    if len(parts) != 2 or which.shape != value.shape:
        return None
    case = 0 if parts[0] else 1
    lines, held, other = parts[case], which == case, value.operands[2 - case]
    if lines is None or not all_zero(other):
        return None
    axes = range(held.ndim)
    along = [held.any(axis=tuple(j for j in axes if j != i)) for i in axes]
    if not np.array_equal(held, functools.reduce(np.multiply, np.ix_(*(v.astype(int) for v in along)))):
        return None
    kept = [a.at(np.where(inside, a.numbers, ZERO)) for a, inside in zip(lines[:-1], along, strict=True)]
    return (*kept, lines[-1])


def _gather(value: Variable, parts: Sequence[Any]) -> View | None:
    """Indices along some axes, if those of an axis vary along one axis of the result alone."""
    *lines, rest = parts[0]
    params = value.params
    numbers, mode = params["dimension_numbers"], params["mode"]
    starts = np.asarray(value.operands[1].array)
    if numbers.operand_batching_dims or (not starts.size and starts.shape[-1]):
        return None
    by_index = [i for i in range(len(value.shape)) if i not in numbers.offset_dims]
    windows = iter(numbers.offset_dims)
    outside = ZERO if params["fill_value"] == 0 else CONSTANT
    out: list[Line | None] = [None] * len(value.shape)
    for axis, (line, size) in enumerate(zip(lines, map(_number, params["slice_sizes"]), strict=True)):
        start = np.zeros(starts.shape[:-1], int)
        if axis in numbers.start_index_map:
            start = starts[..., numbers.start_index_map.index(axis)].astype(int)
        varying = [i for i in range(start.ndim) if (start != start.take([0], axis=i)).any()]
        if len(varying) > 1:
            return None
        at = start[tuple(slice(None) if i in varying else 0 for i in range(start.ndim))].reshape(-1, 1)
        last = len(line.numbers) - size
        inside = (at >= 0) & (at <= last) | (mode != lax.GatherScatterMode.FILL_OR_DROP)
        chosen = line.numbers[np.clip(at, 0, last) + np.arange(size)] if len(line.numbers) else at
        picked = np.where(inside, chosen, outside)
        if axis not in numbers.collapsed_slice_dims:
            if varying:
                return None
            out[next(windows)] = line.at(picked[0])
        elif not varying:
            rest = _merged([rest, line.at(picked[0])])
        elif out[by_index[varying[0]]] is None:
            out[by_index[varying[0]]] = line.at(picked[:, 0])
        else:
            return None  # a diagonal
    shape = value.shape
    return (*(a or Line((), np.zeros(n, int)) for a, n in zip(out, shape, strict=True)), rest)


def _content(value: Variable) -> int:
    return ZERO if all_zero(value) else CONSTANT if value.fixed else COMPUTED


_POINTWISE = (
    "convert_element_type", "reduce_precision", "copy", "copy_p", "optimization_barrier", "stop_gradient",
    "name", "sharding_constraint", "layout_constraint", "device_put", "mesh_cast", "reshard", "pvary",
    "pcast",
)  # fmt: skip
_MOVES: dict[str, Callable[[Variable, Sequence[Any]], View | None]] = {
    **dict.fromkeys(_POINTWISE, _same),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _piece,
    "tile": _tile,
    "rev": _reverse,
    "pad": _pad,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _update,
    "scatter": _update,
    "select_n": _select,
    "gather": _gather,
}
_ENTRIES = {
    "pad": [0], "dynamic_slice": [0], "dynamic_update_slice": [0, 1], "scatter": [0, 2], "gather": [0],
}  # fmt: skip


def _entries(eqn: JaxprEqn, operands: Sequence[Variable]) -> Sequence[Variable]:
    """The operands whose entries an equation moves. The others say where to."""
    if eqn.primitive.name == "select_n":
        return operands[1:]
    chosen = _ENTRIES.get(eqn.primitive.name)
    return operands if chosen is None else [operands[i] for i in chosen]

"""The sparse matrix of one linear equation of a jaxpr: one table, primitive -> rule.

A rule is ``rule(eqn, values) -> results``. An operand that depends on x is an :class:`Operand`, any other a
known array. A result is a list of pairs ``(number of the operand, map)``: it is the sum of the maps of its
operands. An equation that is in no table is applied to the columns of the identity, some at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.functions.columns import MOVES
from jaxconv_fc.functions.jaxprs import JaxprEqn, eval_eqn, operand_avals, operand_numbers, result_avals
from jaxconv_fc.functions.linear_maps import (
    Map,
    RealLinear,
    Selection,
    csr,
    from_triples,
    selection,
)
from jaxconv_fc.functions.moves import padded
from jaxconv_fc.functions.tap_sums import window_axes
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.matrix.formats import as_scipy
from jaxconv_fc.products.product import OPERANDS, batch_sizes

_TOGETHER = 2**22  # entries of the columns that an equation without a rule is done with at once


class Operand(NamedTuple):
    """The type of an operand that depends on x."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def numbers(self) -> np.ndarray:
        return np.arange(self.size).reshape(self.shape)


Terms = list[tuple[int, Map]]


def maps_of(eqn: JaxprEqn, values: Sequence[Any], guard: Callable[[int, Any], None]) -> list[Terms]:
    """The terms of every result of an equation. ``guard(entries, dtype)`` refuses a map that is too large."""
    rule = _RULES.get(eqn.primitive.name, _by_columns)
    return rule(eqn, values, guard)


def _linear(values: Sequence[Any]) -> list[int]:
    return [i for i, v in enumerate(values) if isinstance(v, Operand)]


# -- entries that are moved ----------------------------------------------------------------------


def _moved(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """The equation, done with the numbers of entries. -1 stands for a known operand, which is 0."""
    name, data = eqn.primitive.name, operand_numbers(MOVES[eqn.primitive.name], len(values))
    linear = _linear(values)
    if name in ("reshape", "squeeze", "copy"):
        return [[(0, Selection(values[0].size))]]
    firsts = dict(zip(linear, itertools.accumulate([0, *(values[i].size for i in linear)]), strict=False))
    numbers = [
        v.numbers() + firsts[i] if i in firsts else np.full(np.shape(v), -1) if i in data else np.asarray(v)
        for i, v in enumerate(values)
    ]
    if name in _MOVED_BY:
        made = [_MOVED_BY[name](eqn.params, *numbers)]
    else:
        labels = [jnp.asarray(v + 1) if i in data else v for i, v in enumerate(numbers)]  # 0: none
        made = [np.asarray(v).astype(np.int64) - 1 for v in eval_eqn(eqn, labels)]
    results = []
    for result in made:
        terms = []
        for i in linear:
            own = result.ravel() - firsts[i]
            if len(linear) > 1:
                own = np.where((own >= 0) & (own < values[i].size), own, -1)
                if (own < 0).all() and own.size:
                    continue
            terms.append((i, selection(values[i].size, own)))
        results.append(terms)
    return results


def _taken(numbers: np.ndarray, axes: Sequence[np.ndarray]) -> np.ndarray:
    """Entry ``axes[a][i]`` along every axis a; -1 where one of these is -1."""
    for a, entries in enumerate(axes):
        if len(entries) == numbers.shape[a] and (entries == np.arange(len(entries))).all():
            continue
        if not numbers.shape[a]:
            numbers = np.full((*numbers.shape[:a], len(entries), *numbers.shape[a + 1 :]), -1)
            continue
        held = (entries >= 0).reshape([-1 if i == a else 1 for i in range(numbers.ndim)])
        numbers = np.where(held, np.take(numbers, np.maximum(entries, 0), a), -1)
    return numbers


def _pad(params: dict[str, Any], numbers: np.ndarray, fill: np.ndarray) -> np.ndarray:
    axes = [
        padded(np.arange(n), lo, hi, inner + 1, -1)
        for n, (lo, hi, inner) in zip(numbers.shape, params["padding_config"], strict=True)
    ]
    moved = _taken(numbers, axes)
    if int(fill) < 0:
        return moved
    inside = _taken(np.zeros(numbers.shape, int), axes) >= 0  # the padding is an entry of x
    return np.where(inside, moved, fill)


def _slice(params: dict[str, Any], numbers: np.ndarray) -> np.ndarray:
    steps = params["strides"] or (1,) * numbers.ndim
    return numbers[tuple(map(slice, params["start_indices"], params["limit_indices"], steps))]


def _broadcast(params: dict[str, Any], numbers: np.ndarray, *_: Any) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, n in zip(params["broadcast_dimensions"], numbers.shape, strict=True):
        shape[axis] = n
    return np.broadcast_to(numbers.reshape(shape), params["shape"])


def _select(params: dict[str, Any], which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    which = np.broadcast_to(which, cases[0].shape).astype(int)
    return (
        np.choose(which, cases) if len(cases) < 32 else np.take_along_axis(np.stack(cases), which[None], 0)[0]
    )


# What NumPy does faster than a compiled program. The others of MOVES are done by JAX.
_MOVED_BY: dict[str, Callable[..., np.ndarray]] = {
    "transpose": lambda params, v: v.transpose(params["permutation"]),
    "rev": lambda params, v: np.flip(v, params["dimensions"]),
    "concatenate": lambda params, *v: np.concatenate(v, params["dimension"]),
    "pad": _pad,
    "slice": _slice,
    "broadcast_in_dim": _broadcast,
    "select_n": _select,
}


# -- entries that are scaled -----------------------------------------------------------------------


def _same(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    return [[(i, Selection(values[i].size))] for i in _linear(values)]


def _spread(eqn: JaxprEqn, v: Operand) -> np.ndarray | None:
    """The entry of an operand that each entry of the result is made of; None where they are the same.

    Elementwise equations stretch axes of length 1, and scalars.
    """
    shape = result_avals(eqn)[0].shape
    return None if v.shape == shape else np.broadcast_to(v.numbers(), shape).ravel()


def _sum(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """Every operand that depends on x, by itself. A known one is part of the offset, and counts as 0."""
    minus, size = eqn.primitive.name == "sub", math.prod(result_avals(eqn)[0].shape)
    terms = []
    for i in _linear(values):
        weights = np.full(size, -1, values[i].dtype) if minus and i == 1 else None
        terms.append((i, Selection(values[i].size, _spread(eqn, values[i]), weights)))
    return [terms]


def _scaled(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """The weights are what the equation makes of ones."""
    (i,) = _linear(values)
    ones = jnp.ones(values[i].shape, values[i].dtype)
    (weights,) = eval_eqn(eqn, [ones if i == k else v for k, v in enumerate(values)])
    return [[(i, Selection(values[i].size, _spread(eqn, values[i]), np.ravel(np.asarray(weights))))]]


def _converted(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    to_real = values[0].dtype.kind == "c" and eqn.params["new_dtype"].kind != "c"
    return _real(eqn, values, guard) if to_real else _same(eqn, values, guard)


def _real(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    return [[(0, RealLinear(Selection(values[0].size), None))]]


def _imag(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    return [[(0, RealLinear(None, Selection(values[0].size)))]]


def _conj(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """The conjugate. A real operand is its own, as a complex array."""
    dtype, size = result_avals(eqn)[0].dtype, values[0].size
    if values[0].dtype.kind != "c":
        return _same(eqn, values, guard)
    return [[(0, RealLinear(Selection(size), _multiple(size, -1j, dtype)))]]


def _complex(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """``a + ib``"""
    units, dtype = (1, 1j), result_avals(eqn)[0].dtype
    return [[(i, _multiple(values[i].size, units[i], dtype)) for i in _linear(values)]]


def _multiple(size: int, factor: complex, dtype: Any) -> Selection:
    return Selection(size, None, np.full(size, factor, dtype))


# -- sums ------------------------------------------------------------------------------------------


def _ones(eqn: JaxprEqn, shape: tuple[int, int], columns: np.ndarray, widths: Any, guard: Any) -> list[Terms]:
    dtype = result_avals(eqn)[0].dtype
    return [[(0, csr(shape, np.ones(columns.size, dtype), columns, widths))]]


def _reduce_sum(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    (v,), axes = values, eqn.params["axes"]
    kept = [i for i in range(len(v.shape)) if i not in axes]
    summed = math.prod(v.shape[i] for i in axes)
    numbers = v.numbers().transpose([*kept, *axes])
    return _ones(eqn, (math.prod(v.shape[i] for i in kept), v.size), numbers, summed, guard)


def window_numbers(params: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """``[*out, taps]``: the entries that every window of a pooling holds, in order; -1 for padding."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    axes = window_axes(params, shape)
    for a, axis in enumerate(axes):
        if axis == Axis(axis.size, 1):
            numbers = np.expand_dims(numbers, len(shape) + a)
            continue
        t, valid = axis.input_of(np.arange(axis.out_size)[:, None], np.arange(axis.taps))
        reads = np.where(valid, t, -1)  # [out, tap]
        lines = _taken(
            numbers, [np.arange(n) if i != a else reads.ravel() for i, n in enumerate(numbers.shape)]
        )
        lines = lines.reshape(*numbers.shape[:a], *reads.shape, *numbers.shape[a + 1 :])
        numbers = np.moveaxis(lines, a + 1, len(shape) + a)
    return numbers.reshape(*numbers.shape[: len(shape)], -1)


def _window_sum(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    (v,) = values
    guard(math.prod(result_avals(eqn)[0].shape) * math.prod(eqn.params["window_dimensions"]), v.dtype)
    numbers = window_numbers(eqn.params, v.shape)
    held = numbers >= 0
    shape = (math.prod(numbers.shape[:-1]), v.size)
    return _ones(eqn, shape, numbers[held], held.sum(-1).ravel(), guard)


def _cumsum(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    (v,), axis = values, eqn.params["axis"]
    n = v.shape[axis]
    guard(v.size * (n + 1) // 2, v.dtype)
    reads = np.tri(n, dtype=bool)
    rows, columns = np.nonzero(reads.T if eqn.params["reverse"] else reads)
    lines = np.moveaxis(v.numbers(), axis, -1).reshape(-1, n)
    dtype = result_avals(eqn)[0].dtype
    ones = np.ones(1, dtype)
    return [[(0, from_triples((v.size, v.size), ones, lines[:, rows], lines[:, columns]))]]


def _scatter_add(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """Every update goes to one place at most. The transpose of the equation, applied to the numbers of the
    places, gives the place of each."""
    terms: Terms = [(0, Selection(values[0].size))] if isinstance(values[0], Operand) else []
    updates, operand = values[2], operand_avals(eqn)[0]
    if isinstance(updates, Operand):
        sign = -1 if eqn.primitive.name == "scatter-sub" else 1
        size, dtype = math.prod(operand.shape), result_avals(eqn)[0].dtype
        low, middle, high = (_places(eqn, values[1], digit) for digit in _digits(size))
        places = sign * (low + _BASE * middle + _BASE**2 * high) - 1
        columns = updates.numbers()
        made = from_triples((size, updates.size), np.full(1, sign, dtype), places, columns)
        terms.append((2, made))
    return [terms]


_BASE = 2**12  # float32 holds such digits exactly; the transpose of a subtraction negates them


def _digits(size: int) -> list[np.ndarray]:
    """The numbers 1, 2, ..., ``size`` of places, each as three digits."""
    numbers = np.arange(1, size + 1)
    return [numbers % _BASE, numbers // _BASE % _BASE, numbers // _BASE**2]


def _places(eqn: JaxprEqn, indices: Any, digit: np.ndarray) -> np.ndarray:
    operand, _, updates = operand_avals(eqn)
    zeros = jnp.zeros(operand.shape, jnp.float32)
    add = partial(eval_eqn, eqn)
    (transposed,) = jax.linear_transpose(
        lambda u: add([zeros, indices, u])[0], jax.ShapeDtypeStruct(updates.shape, jnp.float32)
    )(jnp.asarray(digit.reshape(operand.shape), jnp.float32))
    return np.asarray(transposed).astype(np.int64)


# -- layers ----------------------------------------------------------------------------------------


def _dense_layer(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """Output ``[b, f, g]`` is the sum over c of ``left[b, f, c] right[b, g, c]``, of which one is known."""
    (i,), out = _linear(values), result_avals(eqn)[0]
    contract, batch = ((pair[i], pair[1 - i]) for pair in eqn.params["dimension_numbers"])
    numbers = _batch_free_contract(values[i].numbers(), batch[0], contract[0])
    known = _batch_free_contract(np.asarray(values[1 - i]), batch[1], contract[1])
    guard(math.prod(out.shape) * known.shape[-1], out.dtype)
    if i == 0:
        numbers, known = numbers[:, :, None], known[:, None]
    else:
        numbers, known = numbers[:, None], known[:, :, None]
    dims = np.broadcast_shapes(numbers.shape, known.shape)
    columns = np.broadcast_to(numbers, dims)
    data = np.broadcast_to(known.astype(out.dtype), dims)
    return [[(i, csr((math.prod(out.shape), values[i].size), data, columns, dims[-1]))]]


def _batch_free_contract(v: np.ndarray, batch: Sequence[int], contract: Sequence[int]) -> np.ndarray:
    free = [i for i in range(v.ndim) if i not in (*batch, *contract)]
    sizes = [math.prod(v.shape[i] for i in axes) for axes in (batch, free, contract)]
    return np.transpose(v, (*batch, *free, *contract)).reshape(sizes)


def _product(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """``M x`` or ``M^T y`` with a known kernel: M once per example. Others are done by columns."""
    (kernel, operand), params = values, eqn.params
    out = params["out"]
    if out == "k" or isinstance(kernel, Operand):
        return _by_columns(eqn, values, guard)
    spec, batches, kernel = params["spec"], params["batches"], np.asarray(kernel)
    roles = OPERANDS[out]
    extents = batch_sizes(out, batches, kernel.shape, operand.shape)
    kernels = [n for n, label in enumerate(batches) if "k" in label]
    copies = math.prod(extents.values())
    dtype, result = result_avals(eqn)[0].dtype, result_avals(eqn)[0]
    guard(copies * spec.nse, dtype)
    if copies == 1:
        made = as_scipy(spec, kernel.reshape(spec.rhs_shape).astype(dtype, copy=False))
        return [[(1, made.T.tocsr() if out == "x" else made)]]
    place = {"y": spec.out_size, "x": spec.in_size}
    leads = {r: [n for n, label in enumerate(batches) if r in label] for r in (roles[1], out)}
    lead_numbers = {
        r: np.arange(math.prod(extents[n] for n in lead)).reshape([extents[n] for n in lead])
        for r, lead in leads.items()
    }
    parts = []
    for index in np.ndindex(*(extents[n] for n in kernels)):
        matrix = as_scipy(spec, kernel[index].astype(dtype, copy=False))
        matrix = (matrix.T.tocsr() if out == "x" else matrix).tocoo()
        at = dict(zip(kernels, index, strict=True))
        # The examples that share this kernel, as numbers of rows and columns of examples.
        others = [n for n in range(len(batches)) if n not in at]
        grid = np.ix_(*(np.arange(extents[n]) for n in others))
        where = at | dict(zip(others, grid, strict=True))
        rows, columns = (
            np.broadcast_to(lead_numbers[r][tuple(where[n] for n in leads[r])], [extents[n] for n in others])
            for r in (out, roles[1])
        )
        rows, columns = (v.reshape(-1, 1) for v in (rows, columns))
        parts.append(
            (
                np.broadcast_to(matrix.data, (len(rows), matrix.nnz)).ravel(),
                (rows * place[out] + matrix.row).ravel(),
                (columns * place[roles[1]] + matrix.col).ravel(),
            )
        )
    shape = (math.prod(result.shape), operand.size)
    return [[(1, from_triples(shape, *map(np.concatenate, zip(*parts, strict=True))))]]


# -- any other equation ----------------------------------------------------------------------------


def _by_columns(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """The equation, done with unit vectors. What is 0 is not stored."""
    outs = result_avals(eqn)
    results: list[Terms] = [[] for _ in outs]
    for i in _linear(values):
        maps = _columns(eqn, values, i, 1, guard)
        if values[i].dtype.kind == "c" and outs[0].dtype.kind != "c":
            pairs = zip(maps, _columns(eqn, values, i, 1j, guard), strict=True)
            maps = [RealLinear(real, imag) for real, imag in pairs]
        for terms, made in zip(results, maps, strict=True):
            terms.append((i, made))
    return results


def _columns(eqn: JaxprEqn, values: Sequence[Any], i: int, unit: complex, guard: Any) -> list[Map]:
    """The matrix of every result as a function of operand i, times ``unit``: some columns at a time."""
    outs, size = result_avals(eqn), values[i].size
    known = [np.zeros(v.shape, v.dtype) if isinstance(v, Operand) else v for v in values]
    step = max(1, min(size, _TOGETHER // max(1, size, sum(math.prod(out.shape) for out in outs))))

    @jax.jit
    def columns(units: Any, known: Any) -> Any:
        def column(vector: Any) -> list[Any]:
            return eval_eqn(eqn, [vector if k == i else v for k, v in enumerate(known)])

        return jax.vmap(column)(units.reshape(step, *values[i].shape))

    parts: list[list[Any]] = [[(np.empty(0, out.dtype), *np.empty((2, 0), int))] for out in outs]
    stored = 0
    for first in range(0, size, step):
        units = np.zeros((step, size), values[i].dtype)
        here = np.arange(first, min(first + step, size))
        units[here - first, here] = unit
        for part, array in zip(parts, columns(units, known), strict=True):
            array = np.asarray(array).reshape(step, -1)[: len(here)]
            column, row = np.nonzero(array)
            part.append((array[column, row], row, column + first))
            stored += len(row)
        guard(stored, values[i].dtype)
    return [
        from_triples((math.prod(out.shape), size), *map(np.concatenate, zip(*part, strict=True)))
        for part, out in zip(parts, outs, strict=True)
    ]


_RULES: dict[str, Callable[..., list[Terms]]] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(("device_put", "sharding_constraint", "layout_constraint"), _same),
    **dict.fromkeys(("neg", "mul", "div", "shift_left"), _scaled),
    "convert_element_type": _converted,
    "real": _real,
    "imag": _imag,
    "conj": _conj,
    "complex": _complex,
    **dict.fromkeys(("add", "add_any", "sub"), _sum),
    "reduce_sum": _reduce_sum,
    "reduce_window_sum": _window_sum,
    "cumsum": _cumsum,
    **dict.fromkeys(("scatter-add", "scatter-sub"), _scatter_add),
    "dot_general": _dense_layer,
    "conv_product": _product,
}

"""The matrix of a linear jaxpr: the columns of its matrix propagate through the equations, all at once.

What an equation makes of x is held in one of two forms. It is a :class:`Selection` as long as entries of x
are only moved, copied, dropped and scaled (padding, slicing, reshaping, concatenating, normalising): for
each entry the number of the entry of x that it is, and a weight. The first layer turns a selection into
:class:`Columns`, straight from its kernel, and all equations after it act on columns. Nothing is probed with
unit vectors, so an Inf or NaN stays in the entries that it belongs to.

A convolution acts on columns as a sum over taps, ``M = sum_p K_p (x) S_p``. K_p mixes channels: one matrix
product for all taps, columns and positions. S_p moves the input positions of tap p to the outputs that read
them: padding and slicing. On CPU this is several times faster than to convolve the columns, because XLA has
no fast 64-bit convolution.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.axis import Axis, dilated
from jaxconv_fc.dense import as_matrix, entries
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    Finish,
    JaxprEqn,
    eval_eqn,
    evaluate,
    inner_jaxprs,
    operand_numbers,
    result_avals,
    wanted,
)
from jaxconv_fc.numerics import lengths
from jaxconv_fc.spec import ConvSpec

# Equations that move entries, with the operands they take them from.
MOVES: dict[str, slice | tuple[int, ...]] = {
    "reshape": (0,), "squeeze": (0,), "transpose": (0,), "broadcast_in_dim": (0,), "slice": (0,), "rev": (0,),
    "copy": (0,), "tile": (0,), "pad": (0, 1), "gather": (0,), "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1), "split": (0,), "unstack": (0,), "scatter": (0, 2),
    "concatenate": slice(None), "stack": slice(None), "optimization_barrier": slice(None),
    "select_n": slice(1, None),
}  # fmt: skip
# Equations that JAX batches along the first axis only.
_BATCHED_FIRST = frozenset({
    "bcoo_todense", "bcoo_extract", "bcoo_transpose", "bcoo_sort_indices", "bcoo_sum_duplicates",
    "bcoo_dot_general", "bcoo_dot_general_sampled", "bcoo_spdot_general", "bcsr_todense", "bcsr_extract",
    "bcsr_dot_general",
})  # fmt: skip
CHUNK_BYTES = 2**22  # on CPU, what one matrix product may write: it is read again at once, from the cache


@dataclass(frozen=True)
class Selection:
    """``value[i] = weights[i] * x[labels[i] - 1]``, and 0 where the label is 0.

    ``labels`` None are those of the identity, up to a reshape; ``weights`` None are ones.
    """

    size: int  # of x
    shape: tuple[int, ...]  # of this value
    dtype: Any
    labels: Any = None  # integers of `shape`
    weights: Any = None  # of `shape`

    def numbered(self) -> Any:
        if self.labels is not None:
            return self.labels
        return (lax.iota(jnp.int32, self.size) + jnp.int32(1)).reshape(self.shape)

    def weighted(self) -> Any:
        return jnp.ones(self.shape, self.dtype) if self.weights is None else self.weights

    def columns(self) -> Any:
        shape = (*self.shape, self.size)
        rank = len(self.shape)
        reads = jnp.expand_dims(self.numbered(), -1) == lax.broadcasted_iota(
            jnp.int32, shape, rank
        ) + jnp.int32(1)
        weights = jnp.broadcast_to(jnp.expand_dims(self.weighted(), -1), shape)
        return jnp.where(reads, weights, jnp.zeros((), weights.dtype))

    def norms(self) -> Any:
        return jnp.where(self.numbered() > 0, abs(self.weighted()), jnp.zeros((), self.dtype))


@dataclass(frozen=True)
class Columns:
    """The matrix itself: ``array[..., j]`` is the value for the j-th unit vector."""

    array: Any  # [*shape, size of x]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[:-1]

    def columns(self) -> Any:
        return self.array

    def norms(self) -> Any:
        return lengths(self.array)


# -- jaxprs ------------------------------------------------------------------------------------


def propagate(jaxpr: Any, arguments: Sequence[Any], finish: Sequence[Finish | None]) -> list[Any]:
    """The results of a jaxpr that is linear in those arguments that are a Selection or Columns.

    ``finish`` as in :func:`evaluate`: what is not wanted is not computed, effects included.
    """
    return evaluate(jaxpr, arguments, _equation, finish=finish, keep=lambda eqn: False)


def _equation(eqn: JaxprEqn, values: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
    linear = [v for v in values if _is_linear(v)]
    name = eqn.primitive.name
    if not linear:
        return eval_eqn(eqn, values)
    if name in CALLS:
        return propagate(inner_jaxprs(eqn)[0], values, wanted(used))
    selected = all(isinstance(v, Selection) for v in linear)
    rule = _RULES.get(name) or (_OF_SELECTIONS.get(name) if selected else None)
    made = None if rule is None else rule(eqn, values)
    return _on_columns(eqn, values) if made is None else made


def _is_linear(value: Any) -> bool:
    return isinstance(value, Selection | Columns)


def _on_columns(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Any equation, on all columns at once."""
    at = 0 if eqn.primitive.name in _BATCHED_FIRST else -1
    arrays = [jnp.moveaxis(v.columns(), -1, at) if _is_linear(v) else v for v in values]
    axes = [at if _is_linear(v) else None for v in values]
    return list(map(Columns, jax.vmap(lambda *a: eval_eqn(eqn, a), axes, -1)(*arrays)))


# -- selections --------------------------------------------------------------------------------


def _moved(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """What moves entries moves their labels and weights."""
    size = next(v.size for v in values if _is_linear(v))
    outs = result_avals(eqn)
    if eqn.primitive.name in ("reshape", "squeeze") and values[0].labels is None:
        labels: list[Any] = [None]
    else:
        data = operand_numbers(MOVES[eqn.primitive.name], len(values))
        numbers = [
            v.numbered() if _is_linear(v) else jnp.zeros(jnp.shape(v), jnp.int32) if i in data else v
            for i, v in enumerate(values)
        ]
        labels = eval_eqn(eqn, numbers)
    weights: list[Any] = [None] * len(outs)
    if any(_is_linear(v) and v.weights is not None for v in values):
        weights = eval_eqn(eqn, [v.weighted() if _is_linear(v) else v for v in values])
    return [Selection(size, a.shape, a.dtype, n, w) for a, n, w in zip(outs, labels, weights, strict=True)]


def _scaled(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any] | None:
    """What scales entries acts on their weights."""
    (selection,), out = [v for v in values if _is_linear(v)], result_avals(eqn)[0]
    if selection.shape != out.shape:
        return None
    (weights,) = eval_eqn(eqn, [v.weighted() if _is_linear(v) else v for v in values])
    return [Selection(selection.size, out.shape, out.dtype, selection.labels, weights)]


def _converted(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any] | None:
    (selection,), out = values, result_avals(eqn)[0]
    if selection.weights is not None:
        return _scaled(eqn, values)
    return [Selection(selection.size, out.shape, out.dtype, selection.labels)]


def _dense_layer(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The columns of ``dot_general`` with a selection as one operand: rows of the other, where it reads."""
    i = 0 if isinstance(values[0], Selection) else 1
    selection, other, out = values[i], values[1 - i], result_avals(eqn)[0]
    contract, batch = ((pair[i], pair[1 - i]) for pair in eqn.params["dimension_numbers"])
    # [batch, free, contracted] each, and [batch, other free, contracted] of the other operand
    labels, free = _batch_free_contract(selection.numbered(), batch[0], contract[0])
    weights, _ = _batch_free_contract(selection.weighted(), batch[0], contract[0])
    known, other_free = _batch_free_contract(other, batch[1], contract[1])
    rows = jnp.swapaxes(known, 1, 2).astype(out.dtype)  # [batch, contracted, other free]
    in_order = list(contract[0]) == sorted(contract[0]) and labels.shape == (1, 1, selection.size)
    if selection.labels is None and selection.weights is None and in_order:  # x itself: the matrix is `other`
        array = rows[:, None]  # [1, 1, size, other free]
    else:
        array = _placed(labels, weights.astype(out.dtype), rows, size=selection.size)
    # [batch, free, size, other free] -> [batch, free of the first, free of the second, size]
    array = jnp.moveaxis(array, 3, 2) if i == 0 else jnp.transpose(array, (0, 3, 1, 2))
    frees = (free, other_free) if i == 0 else (other_free, free)
    shape = [*(selection.shape[a] for a in batch[0]), *frees[0], *frees[1], selection.size]
    return [Columns(array.reshape(shape))]


@partial(jax.jit, static_argnames="size")
def _placed(labels: Any, weights: Any, rows: Any, *, size: int) -> Any:
    """``[b, f, size, other]``: row ``labels[b, f, c] - 1`` sums ``weights[b, f, c] * rows[b, c]`` over c."""

    def one(labels: Any, weights: Any, rows: Any) -> Any:
        into = jnp.where(labels > 0, labels - 1, size)
        return jnp.zeros((size, rows.shape[1]), rows.dtype).at[into].add(weights[:, None] * rows, mode="drop")

    return jax.vmap(jax.vmap(one, (0, 0, None)))(labels, weights, rows)


def _batch_free_contract(v: Any, batch: Sequence[int], contract: Sequence[int]) -> tuple[Any, list[int]]:
    """(the operand with its axes put together by kind, the sizes of the free ones)"""
    free = [i for i in range(v.ndim) if i not in (*batch, *contract)]
    sizes = [math.prod(v.shape[i] for i in axes) for axes in (batch, free, contract)]
    return jnp.transpose(v, (*batch, *free, *contract)).reshape(sizes), [v.shape[i] for i in free]


# -- sums over taps ----------------------------------------------------------------------------


def _product(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any] | None:
    """``M x`` or ``M^T y`` of x or y as columns; None where the kernel has a batch, or depends on x."""
    (kernel, operand), params = values, eqn.params
    spec, transposed = params["spec"], params["out"] == "x"
    if _is_linear(kernel) or params["out"] == "k" or any("k" in label for label in params["batches"]):
        return None
    out = result_avals(eqn)[0].shape
    if not math.prod(out) or not kernel.size or not math.prod(operand.shape):
        return None
    shape = spec.out_shape if transposed else spec.in_shape
    if isinstance(operand, Selection):
        examples = math.prod(operand.shape) // math.prod(shape)
        array = _first_layer(spec, kernel, operand, examples, transposed)
        return [Columns(array.reshape(*out, operand.size))]
    if spec.padding_mode != "zeros" or not operand.array.size:
        return None
    stack = operand.array.reshape(-1, *shape, operand.array.shape[-1])
    made = _convolved(spec, kernel, stack, transposed=transposed, precision=params["precision"],
                      chunked=jax.default_backend() == "cpu")  # fmt: skip
    return [Columns(made.reshape(*out, made.shape[-1]))]


def _first_layer(
    spec: ConvSpec, kernel: Any, selection: Selection, examples: int, transposed: bool
) -> Any:
    """``[examples, outputs, size]``: M, its columns moved to the entries of x that they read."""
    if examples == 1 and selection.labels is None and selection.weights is None:
        matrix = as_matrix(spec, kernel)
        return matrix.T if transposed else matrix
    labels = selection.numbered().reshape(examples, -1)
    weights = None if selection.weights is None else selection.weights.reshape(examples, -1)
    return _scattered(spec, kernel, labels, weights, size=selection.size, transposed=transposed)


@partial(jax.jit, static_argnames=("size", "transposed"))
def _scattered(spec: ConvSpec, kernel: Any, labels: Any, weights: Any, *, size: int, transposed: bool) -> Any:
    dims, rows, columns, _ = entries(spec)
    outputs = spec.in_size if transposed else spec.out_size
    values = jnp.expand_dims(
        jnp.transpose(kernel, spec.dimension_numbers.rhs_spec), range(2, 2 + len(spec.axes))
    )
    rows, columns, values = (jnp.broadcast_to(v, dims).ravel() for v in (rows, columns, values))
    reads, makes = (rows, columns) if transposed else (columns, rows)
    inside = columns < spec.in_size
    makes, reads = jnp.where(inside, makes, outputs), jnp.where(inside, reads, 0)  # padding is dropped

    def example(labels: Any, weights: Any) -> Any:
        label = labels[reads]
        into = jnp.where(label > 0, label - 1, size)
        placed = values if weights is None else values * weights[reads]
        return jnp.zeros((outputs, size), kernel.dtype).at[makes, into].add(placed, mode="drop")

    return jax.vmap(example, (0, None if weights is None else 0))(labels, weights)


@partial(jax.jit, static_argnames=("transposed", "precision", "chunked"))
def _convolved(
    spec: ConvSpec, kernel: Any, stack: Any, *, transposed: bool, precision: Any, chunked: bool
) -> Any:
    """``sum_p K_p (x) S_p`` of a stack ``(examples, *in_shape, columns)``, or its transpose."""
    axes, groups, dims = spec.axes, spec.groups, len(spec.axes)
    before, after = (spec.out_order, spec.in_order) if transposed else (spec.in_order, spec.out_order)
    # (channels, examples, positions, columns): one matrix product mixes the channels of all the rest.
    order = (*(1 + i for i in before[dims:]), 0, *(1 + i for i in before[:dims]), stack.ndim - 1)
    stack = jnp.transpose(stack, order)
    stack = stack.reshape(groups, -1, *stack.shape[len(before) - dims :])
    weights = jnp.transpose(kernel, spec.dimension_numbers.rhs_spec)  # (out, in, taps...)
    weights = jnp.moveaxis(weights.reshape(groups, -1, *weights.shape[1:]), (1, 2), (-2, -1))
    if transposed:
        axes = [axis.transpose() for axis in axes]  # whose taps run backwards
        weights = jnp.flip(jnp.swapaxes(weights, -1, -2), range(1, 1 + dims))

    def product(columns: Any) -> Any:
        return _sum_over_taps(axes, weights, columns, precision)

    result = _by_chunks(product, stack, _chunk(axes, weights, stack)) if chunked else product(stack)
    shape = spec.in_shape if transposed else spec.out_shape
    result = result.reshape(*(shape[i] for i in after[dims:]), *result.shape[2:])
    channels = len(after) - dims  # the example is behind them
    places = {
        **{i: n for n, i in enumerate(after[dims:])},
        **{i: channels + 1 + n for n, i in enumerate(after[:dims])},
    }
    return jnp.transpose(result, (channels, *(places[i] for i in range(len(after))), result.ndim - 1))


def _sum_over_taps(axes: Sequence[Axis], weights: Any, stack: Any, precision: Any) -> Any:
    """``weights (groups, taps..., out, in)`` and ``stack (groups, in, examples, positions..., columns)``.

    The taps' copies of the positions are written out after the product or before it: where they are fewer.
    """
    dims = len(axes)
    groups, *taps, outputs, inputs = weights.shape
    rest = stack.shape[2:]
    if _after(axes, weights):
        flat = weights.reshape(groups, -1, inputs)
        value = jnp.matmul(flat, stack.reshape(groups, inputs, -1), precision=precision)
        value = value.reshape(groups, *taps, outputs, *rest)
        parts = {tap: value[(slice(None), *tap)] for tap in np.ndindex(*taps)}
        return _total([moved_by(axes, tap, part, part.ndim - 1 - dims) for tap, part in parts.items()])
    for i in reversed(range(dims)):
        at = stack.ndim - 1 - dims + i
        stack = jnp.stack([moved_by([axes[i]], (p,), stack, at) for p in range(axes[i].taps)], axis=1)
    flat = jnp.moveaxis(weights, -2, 1).reshape(groups, outputs, -1)
    value = jnp.matmul(flat, stack.reshape(groups, flat.shape[-1], -1), precision=precision)
    return value.reshape(groups, outputs, *stack.shape[dims + 2 :])


def _after(axes: Sequence[Axis], weights: Any) -> bool:
    outputs, inputs = weights.shape[-2:]
    before, behind = math.prod(a.size for a in axes), math.prod(a.out_size for a in axes)
    return outputs * before <= inputs * behind


def _chunk(axes: Sequence[Axis], weights: Any, stack: Any) -> int:
    """How many columns make a matrix product that stays in the cache."""
    groups, *taps, outputs, inputs = weights.shape
    before, behind = math.prod(a.size for a in axes), math.prod(a.out_size for a in axes)
    one = groups * math.prod(taps) * min(outputs * before, inputs * behind) * stack.shape[2]
    return max(16, CHUNK_BYTES // (one * stack.dtype.itemsize) // 16 * 16)


def _by_chunks(fn: Callable[[Any], Any], columns: Any, width: int) -> Any:
    """``fn(columns)``, so many columns at a time."""
    count = columns.shape[-1]
    if count <= width:
        return fn(columns)
    blocks = count // width
    head = columns[..., : blocks * width].reshape(*columns.shape[:-1], blocks, width)
    made = jnp.moveaxis(lax.map(fn, jnp.moveaxis(head, -2, 0)), 0, -2)
    made = made.reshape(*made.shape[:-2], blocks * width)
    if count == blocks * width:
        return made
    return jnp.concatenate([made, fn(columns[..., blocks * width :])], axis=-1)


def _total(values: Sequence[Any]) -> Any:
    return functools.reduce(operator.add, values)


def _window_sum(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Pooling is a sum over taps, an axis at a time."""
    value = values[0].columns()
    for i, axis in enumerate(window_axes(eqn.params, value.shape[:-1])):
        if axis != Axis(axis.size, 1):
            value = _total([moved_by([axis], (tap,), value, i) for tap in range(axis.taps)])
    return [Columns(value)]


def window_axes(params: dict[str, Any], shape: Sequence[int]) -> list[Axis]:
    """The axes of a pooling, by the parameters of its equation."""
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    axes = zip(shape, *(params[name] for name in names), strict=True)
    return [Axis(n, taps, s, lo, hi, l, r) for n, taps, s, (lo, hi), l, r in axes]


def moved_by(axes: Sequence[Axis], tap: Sequence[int], value: Any, first: int, fill: Any = 0) -> Any:
    """``S_p`` on the axes of ``value`` from ``first`` on: what each output reads through this tap.

    Padding (negative too) and a slice; ``fill`` where nothing is read.
    """
    pads, stops, steps = [(0, 0, 0)] * value.ndim, list(value.shape), [1] * value.ndim
    for i, (axis, p) in enumerate(zip(axes, tap, strict=True), start=first):
        low, reach = axis.lo - p * axis.rhs_dilation, (axis.out_size - 1) * axis.stride + 1
        pads[i] = (low, reach - low - dilated(axis.size, axis.lhs_dilation), axis.lhs_dilation - 1)
        stops[i], steps[i] = reach, axis.stride
    value = lax.pad(value, jnp.asarray(fill, value.dtype), pads)
    return lax.slice(value, [0] * value.ndim, stops, steps)


# -- the tables: primitive -> rule ---------------------------------------------------------------

# A rule returns None where it does not apply, and the equation is done on all columns.
_RULES: dict[str, Callable[[JaxprEqn, Sequence[Any]], list[Any] | None]] = {
    "conv_product": _product,
    "reduce_window_sum": _window_sum,
}
# Where all operands that depend on x are selections.
_OF_SELECTIONS: dict[str, Callable[[JaxprEqn, Sequence[Any]], list[Any] | None]] = {
    **dict.fromkeys(MOVES, _moved),
    "dot_general": _dense_layer,
    "convert_element_type": _converted,
    **dict.fromkeys(("neg", "mul", "div"), _scaled),
}

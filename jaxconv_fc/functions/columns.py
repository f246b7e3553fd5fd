"""The matrix of a linear jaxpr: the columns of its matrix propagate through the equations, all at once.

What an equation makes of x is held in one of two forms. As long as entries of x are only moved, copied,
dropped and scaled (padding, slicing, reshaping, concatenating, normalising) it is a *pick*: per entry the
number of the entry of x that it reads, and a weight. The first layer makes *columns* straight from its
kernel, and all equations after it act on these. Nothing is probed with unit vectors, so no Inf or NaN
spreads beyond the entries it belongs to.

A convolution acts on columns as a sum over taps, ``M = sum_p K_p (x) S_p``: K_p mixes channels, one
matrix product for all taps, columns and positions, and S_p moves tap p's input positions to the outputs
that read them, which is padding and slicing. That is several times faster on CPU than convolving the
columns: XLA has no fast 64-bit convolution.
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
from jaxconv_fc.functions.jaxprs import CALLS, Literal, eval_eqn, inner_jaxprs, open_jaxpr, operand_numbers
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

    size: int
    shape: tuple[int, ...]
    dtype: Any
    labels: Any = None
    weights: Any = None

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

    array: Any

    def columns(self) -> Any:
        return self.array

    def norms(self) -> Any:
        return lengths(self.array)


# -- jaxprs ------------------------------------------------------------------------------------


def propagate(
    jaxpr: Any, arguments: Sequence[Any], finish: Sequence[Callable[[Any], Any] | None]
) -> list[Any]:
    """The results of a jaxpr that is linear in those arguments that are a Selection or Columns.

    ``finish[i]`` is applied to result ``i`` as soon as it is there (None: it is not wanted, nor computed),
    and a value is dropped after its last use, so that no more columns are held than the function needs.
    """
    inner, constants = open_jaxpr(jaxpr)
    wanted = [(i, v, f) for i, (v, f) in enumerate(zip(inner.outvars, finish, strict=True)) if f is not None]
    equations, last = _needed(inner.eqns, [v for _, v, _ in wanted])
    env: dict[Any, Any] = {}
    results: list[Any] = [None] * len(inner.outvars)

    def write(variables: Sequence[Any], values: Sequence[Any]) -> None:
        for variable, value in zip(variables, values, strict=True):
            env[variable] = value
            for i, v, done in wanted:
                if v is variable:
                    results[i] = done(value)

    write(inner.constvars, constants)
    write(inner.invars, arguments)
    for step, eqn in enumerate(equations):
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        write(eqn.outvars, _equation(eqn, values))
        for v in (*eqn.invars, *eqn.outvars):
            if not isinstance(v, Literal) and last.get(v, step) <= step:
                env.pop(v, None)
    for i, v, done in wanted:
        if isinstance(v, Literal):
            results[i] = done(v.val)
    return results


def _needed(equations: Sequence[Any], wanted: Sequence[Any]) -> tuple[list[Any], dict[Any, int]]:
    """The equations that these variables need, and the last of them to use each variable."""
    needed = {v for v in wanted if not isinstance(v, Literal)}
    kept: list[Any] = []
    for eqn in reversed(equations):
        if needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
    kept.reverse()
    return kept, {v: i for i, eqn in enumerate(kept) for v in eqn.invars if not isinstance(v, Literal)}


def _equation(eqn: Any, values: Sequence[Any]) -> list[Any]:
    linear = [v for v in values if _is_linear(v)]
    name = eqn.primitive.name
    if not linear:
        return eval_eqn(eqn, values)
    if name in CALLS:
        (inner,) = inner_jaxprs(eqn)
        return propagate(inner, values, [lambda v: v] * len(eqn.outvars))
    if name == "conv_product":
        made = _product(eqn, *values)
    elif name == "reduce_window_sum":
        made = _window_sum(eqn, values[0])
    elif all(isinstance(v, Selection) for v in linear):
        made = _of_picks(eqn, values)
    else:
        made = None
    return _on_columns(eqn, values) if made is None else made


def _is_linear(value: Any) -> bool:
    return isinstance(value, Selection | Columns)


def _on_columns(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Any equation, on all columns at once."""
    at = 0 if eqn.primitive.name in _BATCHED_FIRST else -1
    arrays = [jnp.moveaxis(v.columns(), -1, at) if _is_linear(v) else v for v in values]
    axes = [at if _is_linear(v) else None for v in values]
    return list(map(Columns, jax.vmap(lambda *a: eval_eqn(eqn, a), axes, -1)(*arrays)))


# -- picks -------------------------------------------------------------------------------------


def _of_picks(eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """An equation that leaves picks picks, or the first dense layer; None for any other."""
    name, (out, *_) = eqn.primitive.name, [v.aval for v in eqn.outvars]
    if name in MOVES:
        return _moved(eqn, values)
    if name == "dot_general":
        return [_dense_layer(eqn, values)]
    i = next(i for i, v in enumerate(values) if _is_linear(v))
    pick = values[i]
    if name == "neg":
        return [Selection(pick.size, out.shape, out.dtype, pick.labels, -pick.weighted())]
    if name == "convert_element_type":
        weights = None if pick.weights is None else eval_eqn(eqn, [pick.weights])[0]
        return [Selection(pick.size, out.shape, out.dtype, pick.labels, weights)]
    if name in ("mul", "div") and pick.shape == out.shape:
        (weights,) = eval_eqn(eqn, [pick.weighted() if j == i else v for j, v in enumerate(values)])
        return [Selection(pick.size, out.shape, out.dtype, pick.labels, weights)]
    return None


def _moved(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """What moves entries moves their labels and weights."""
    size = next(v.size for v in values if _is_linear(v))
    outs = [v.aval for v in eqn.outvars]
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


def _dense_layer(eqn: Any, values: Sequence[Any]) -> Columns:
    """The columns of ``dot_general`` with a pick as one operand: rows of the other, put where it reads."""
    i = 0 if isinstance(values[0], Selection) else 1
    pick, other, out = values[i], values[1 - i], eqn.outvars[0].aval
    contract, batch = ((pair[i], pair[1 - i]) for pair in eqn.params["dimension_numbers"])
    labels, free = _batch_free_contract(pick.numbered(), batch[0], contract[0])
    weights, _ = _batch_free_contract(pick.weighted(), batch[0], contract[0])
    known, other_free = _batch_free_contract(other, batch[1], contract[1])
    rows = jnp.swapaxes(known, 1, 2).astype(out.dtype)
    in_order = list(contract[0]) == sorted(contract[0]) and labels.shape == (1, 1, pick.size)
    if pick.labels is None and pick.weights is None and in_order:  # x itself, whole: the layer is its matrix
        array = rows[:, None]
    else:
        array = _placed(labels, weights.astype(out.dtype), rows, size=pick.size)
    array = (
        jnp.moveaxis(array, 3, 2) if i == 0 else jnp.transpose(array, (0, 3, 1, 2))
    )  # (batch, free, free, size)
    parts = [pick.shape[a] for a in batch[0]], *((free, other_free) if i == 0 else (other_free, free))
    return Columns(array.reshape(*parts[0], *parts[1], *parts[2], pick.size))


@partial(jax.jit, static_argnames="size")
def _placed(labels: Any, weights: Any, rows: Any, *, size: int) -> Any:
    """``(b, f, size, other)``: row ``labels[b, f, c]`` sums ``weights[b, f, c] * rows[b, c]`` over c."""

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


def _product(eqn: Any, a: Any, b: Any) -> list[Any] | None:
    """``M x`` or ``M^T y`` of x or y as columns; None where the kernel has a batch, or is the operand."""
    params = eqn.params
    spec, transposed = params["spec"], params["out"] == "x"
    if _is_linear(a) or params["out"] == "k" or any("k" in label for label in params["batches"]):
        return None
    out = eqn.outvars[0].aval.shape
    if isinstance(b, Selection):
        lead = (
            math.prod(b.shape) // math.prod(spec.out_shape if transposed else spec.in_shape)
            if math.prod(b.shape)
            else 0
        )
        if not lead:
            return None
        array = _first_layer(spec, a, b, lead, transposed)
        return [Columns(array.reshape(*out, b.size))]
    if spec.padding_mode != "zeros" or not b.array.size or not math.prod(out) or not a.size:
        return None
    shape = spec.out_shape if transposed else spec.in_shape
    stack = b.array.reshape(-1, *shape, b.array.shape[-1])
    made = _convolved(spec, a, stack, transposed=transposed, precision=params["precision"],
                      chunked=jax.default_backend() == "cpu")  # fmt: skip
    return [Columns(made.reshape(*out, made.shape[-1]))]


def _first_layer(spec: ConvSpec, kernel: Any, pick: Selection, count: int, transposed: bool) -> Any:
    """``(examples, outputs, size)``: M, its columns moved to the entries of x that they read."""
    if count == 1 and pick.labels is None and pick.weights is None:
        matrix = as_matrix(spec, kernel)
        return matrix.T if transposed else matrix
    labels = pick.numbered().reshape(count, -1)
    weights = None if pick.weights is None else pick.weights.reshape(count, -1)
    return _scattered(spec, kernel, labels, weights, size=pick.size, transposed=transposed)


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


def _window_sum(eqn: Any, operand: Any) -> list[Any]:
    """Pooling is a sum over taps, an axis at a time."""
    value = operand.columns()
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

"""The matrix of a linear jaxpr: the columns of its matrix propagate through the equations, all at once.

What an equation makes of x is held in one of two forms. It is a :class:`Selection` as long as entries of x
are only moved, copied, dropped and scaled (padding, slicing, reshaping, concatenating, normalising): for
each entry the number of the entry of x that it is, and a weight. The first layer turns a selection into
:class:`Columns`, straight from its kernel, and all equations after it act on columns. Nothing is probed with
unit vectors, so an Inf or NaN stays in the entries that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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
from jaxconv_fc.functions.tap_sums import convolve_columns, window_sum
from jaxconv_fc.geometry.entries import all_entries
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.matrix.dense import as_matrix
from jaxconv_fc.matrix.scatter import spread_kernel
from jaxconv_fc.numerics import lengths

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
    """An equation that moves entries moves labels and weights alike."""
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
    """An equation that scales entries acts on the weights."""
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


# -- convolutions and pooling ------------------------------------------------------------------


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
    if not spec.pads_with_zeros or not operand.array.size:
        return None
    stack = operand.array.reshape(-1, *shape, operand.array.shape[-1])
    made = convolve_columns(spec, transposed, params["precision"], kernel, stack)
    return [Columns(made.reshape(*out, made.shape[-1]))]


def _first_layer(spec: ConvSpec, kernel: Any, selection: Selection, examples: int, transposed: bool) -> Any:
    """``[examples, outputs, size]``: M, its columns moved to the entries of x that they read."""
    if examples == 1 and selection.labels is None and selection.weights is None:
        matrix = as_matrix(spec, kernel)
        return matrix.T if transposed else matrix
    labels = selection.numbered().reshape(examples, -1)
    weights = None if selection.weights is None else selection.weights.reshape(examples, -1)
    return _scattered(spec, kernel, labels, weights, size=selection.size, transposed=transposed)


@partial(jax.jit, static_argnames=("size", "transposed"))
def _scattered(spec: ConvSpec, kernel: Any, labels: Any, weights: Any, *, size: int, transposed: bool) -> Any:
    """Every entry of M, added to the column of the entry of x that it reads."""
    at = all_entries(spec)
    outputs = spec.in_size if transposed else spec.out_size
    values = spread_kernel(spec, kernel)
    inside, rows, columns, values = (
        jnp.broadcast_to(v, at.dims).ravel() for v in (at.valid, at.row, at.column, values)
    )
    reads, makes = (rows, columns) if transposed else (columns, rows)
    makes, reads = jnp.where(inside, makes, outputs), jnp.where(inside, reads, 0)  # padding is dropped

    def example(labels: Any, weights: Any) -> Any:
        label = labels[reads]
        into = jnp.where(label > 0, label - 1, size)
        placed = values if weights is None else values * weights[reads]
        return jnp.zeros((outputs, size), kernel.dtype).at[makes, into].add(placed, mode="drop")

    return jax.vmap(example, (0, None if weights is None else 0))(labels, weights)


def _window_sum(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    return [Columns(window_sum(eqn.params, values[0].columns()))]


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

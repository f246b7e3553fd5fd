"""A function of pytrees as one from vector to vector, in the order of ``jax.flatten_util.ravel_pytree``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.functions.jaxprs import open_jaxpr, trace
from jaxconv_fc.geometry.arguments import brief
from jaxconv_fc.sharding import is_traced, replicated

Shape = jax.ShapeDtypeStruct


class Ravelled(NamedTuple):
    """``fn(x)``, traced."""

    jaxpr: Any
    xs: list[Any]  # the arrays of x, or their shapes where x gives no more
    outs: list[Shape]  # of the arrays of the result
    x_tree: Any
    out_tree: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(entries of the result, entries of x)"""
        return sum(sizes(self.outs)), sum(sizes(self.xs))

    @property
    def dtype(self) -> Any:
        """The dtype of the ravelled result."""
        return jnp.result_type(*self.outs) if self.outs else jnp.zeros(0).dtype


def sizes(arrays: Sequence[Any]) -> list[int]:
    return [math.prod(a.shape) for a in arrays]


def ravelled(name: str, fn: Callable[[Any], Any], x: Any, rows: Any = None) -> Ravelled:
    """``fn(x)``, traced. With ``rows``, only these entries of the ravelled result, as one vector.

    ``name`` is the public function, for messages.
    """
    leaves, tree = jax.tree.flatten(x)
    xs = [v if isinstance(v, Shape) else _as_array(f"{name}: x must be", v) for v in leaves]
    shapes = [v if isinstance(v, Shape) else jax.eval_shape(lambda v=v: replicated(v)) for v in xs]
    out_tree: Any = None

    def flat(*arrays: Any) -> list[Any]:
        nonlocal out_tree
        results, out_tree = jax.tree.flatten(fn(tree.unflatten(arrays)))
        results = [_as_array(f"{name}: fn must return", leaf) for leaf in results]
        return results if rows is None else [_rows(name, results, rows)]

    jaxpr = trace(flat, shapes, {}).jaxpr
    outs = [Shape(v.aval.shape, v.aval.dtype) for v in open_jaxpr(jaxpr)[0].outvars]
    return Ravelled(jaxpr, xs, outs, tree, out_tree)


def _as_array(must: str, leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        raise TypeError(
            f"{must} a pytree of arrays, got {brief(leaf)} in it. Bind what is no array with "
            "functools.partial."
        )
    return jnp.asarray(leaf)


def _rows(name: str, results: Sequence[Any], rows: Any) -> Any:
    """Entries ``rows`` of the ravelled results. What is static is checked."""
    if not is_traced(rows):
        rows = np.asarray(rows)
        rows = rows.astype(int) if rows.size == 0 else rows
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise TypeError(f"{name}: rows must be a list of integers, got {brief(rows)}. Write rows=[0, 5].")
    size = sum(sizes(results))
    if not is_traced(rows) and rows.size and not (-size <= rows.min() and rows.max() < size):
        raise IndexError(
            f"{name}: rows go from {rows.min()} to {rows.max()}, and the result has {size} entries. "
            f"Take rows of 0 to {size - 1}."
        )
    whole = jnp.concatenate([jnp.ravel(v).astype(jnp.result_type(*results)) for v in results])
    return whole.at[rows].get(mode="fill")  # a traced row out of range is no other row

"""Stacks of examples as the functions of this room take them, and sums over a stack part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.geometry.arguments import Array, as_array, check_summable
from jaxconv_fc.geometry.memory import fits_in_memory
from jaxconv_fc.geometry.spec import ConvSpec, check_spec
from jaxconv_fc.numerics import inexact

PART_BYTES = 2**26  # of what is made of the examples that are computed at once


def as_stack(spec: ConvSpec, name: str, value: Array, shape: str) -> jax.Array:
    """``(n, *getattr(spec, shape))``, in a floating or complex dtype of at least 32 bits."""
    check_spec(spec)
    stack, expected = as_array(name, value), getattr(spec, shape)
    if stack.ndim == 0 or stack.shape[1:] != expected:
        raise ValueError(
            f"{name} must have shape (n, *{expected}), a stack of examples, got {stack.shape}. Write "
            f"{name}[None] for one example."
        )
    if stack.dtype == jnp.bool_:
        raise TypeError(f"{name} is bool, which has no products: cast it with .astype(float).")
    return inexact(stack)


def as_stacks(spec: ConvSpec, xs: Array, y_bars: Array, names: tuple[str, str] = ("xs", "y_bars")) -> Any:
    """Inputs and output cotangents of the same examples, of one dtype."""
    check_spec(spec)
    check_summable(names[0], as_array(names[0], xs), names[1], as_array(names[1], y_bars))
    inputs = as_stack(spec, names[0], xs, "in_shape")
    cotangents = as_stack(spec, names[1], y_bars, "out_shape")
    if len(inputs) != len(cotangents):
        raise ValueError(
            f"{names[0]} and {names[1]} must have as many examples, got {len(inputs)} and {len(cotangents)}."
        )
    return inputs, cotangents


def check_real(function: str, name: str, stack: jax.Array) -> None:
    if jnp.iscomplexobj(stack):
        raise TypeError(
            f"{function}: {name} must be real, got dtype {stack.dtype}: X^T X and X^H X differ there. Use "
            "the real and imaginary parts, or kernel_matrix of every example."
        )


def part_size(count: int, nbytes: int) -> int:
    """How many of ``count`` examples are computed at once, where one makes arrays of so many bytes."""
    most = max(1, PART_BYTES // max(1, nbytes))
    while most > 1 and not fits_in_memory(most * nbytes):
        most //= 2
    return max(1, min(count, most))


def summed_over_parts(of: Callable[[jax.Array], jax.Array], size: int, stack: jax.Array) -> jax.Array:
    """``of(stack)``, where ``of`` is a sum over examples: the sum of its values for ``size`` of them each."""
    parts, rest = divmod(len(stack), size)
    if parts == 0 or (parts == 1 and not rest):
        return of(stack)
    whole = stack[: parts * size].reshape(parts, size, *stack.shape[1:])
    total = jax.lax.scan(lambda total, part: (total + of(part), None), _zeros_like(of, whole[0]), whole)[0]
    return total + of(stack[parts * size :]) if rest else total


def _zeros_like(of: Callable[[jax.Array], jax.Array], part: jax.Array) -> jax.Array:
    result = jax.eval_shape(of, part)
    return jnp.zeros(result.shape, result.dtype)


def each_example(of: Callable[..., jax.Array], size: int, *stacks: jax.Array) -> jax.Array:
    """``vmap(of)(*stacks)``, where ``size`` examples are computed at once."""
    if size >= len(stacks[0]):
        return jax.vmap(of)(*stacks)
    return jax.lax.map(lambda example: of(*example), stacks, batch_size=size)

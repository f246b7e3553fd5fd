"""A convolution of many columns as a sum over taps, ``M = sum_p K_p (x) S_p``.

K_p mixes channels: one matrix product for all taps, columns and positions. S_p moves the input positions of
tap p to the outputs that read them: padding and slicing. On CPU this is several times faster than to
convolve the columns, because XLA has no fast 64-bit convolution there. Pooling is the same sum without K_p.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.layout import by_group, from_canonical
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.products.forms import moved_by
from jaxconv_fc.products.platforms import on_each
from jaxconv_fc.sharding import Bound, by_platform, program


@partial(program, static_argnums=(1, 2))
def convolve_columns(spec: ConvSpec, transposed: bool, precision: Any, kernel: Any, stack: Any) -> jax.Array:
    """``M`` times a stack ``[examples, *in_shape, columns]``, or ``M^T`` times ``[examples, *out_shape,
    columns]``, in zeros mode."""
    shape = (stack.shape[0], *(spec.in_shape if transposed else spec.out_shape), stack.shape[-1])
    form = on_each(lambda forms: Bound(_convolved, (forms.column_bytes,)), spec, transposed, precision)
    return by_platform(form, jax.ShapeDtypeStruct(shape, stack.dtype), stack, kernel)


def _convolved(
    column_bytes: int | None, spec: ConvSpec, transposed: bool, precision: Any, stack: Any, kernel: Any
) -> jax.Array:
    axes, dims = spec.axes, len(spec.axes)
    weights = by_group(spec, kernel)  # [group, out, in, taps...]
    weights = jnp.moveaxis(weights, (1, 2), (-2, -1))  # [group, taps..., out, in]
    before, after, shape = spec.in_order, spec.out_order, spec.out_shape
    if transposed:  # in and out change places, and the taps run backwards
        axes = [axis.transpose() for axis in axes]
        weights = jnp.flip(jnp.swapaxes(weights, -1, -2), range(1, 1 + dims))
        before, after, shape = spec.out_order, spec.in_order, spec.in_shape
    stack = jnp.transpose(stack, _channels_first(before, dims))
    stack = stack.reshape(spec.groups, -1, *stack.shape[len(before) - dims :])  # [group, in, example, ...]

    product = partial(_product, axes, weights, precision)
    if column_bytes is None:
        result = product(stack)
    else:
        result = _by_chunks(product, stack, _chunk(axes, weights, stack, column_bytes))
    result = result.reshape(*(shape[i] for i in after[dims:]), *result.shape[2:])
    return from_canonical(result, _channels_first(after, dims))


def _channels_first(order: Sequence[int], dims: int) -> tuple[int, ...]:
    """The places of (channels..., example, positions..., columns) in ``[example, *shape, columns]``."""
    return (*(1 + i for i in order[dims:]), 0, *(1 + i for i in order[:dims]), 1 + len(order))


def _product(axes: Sequence[Axis], weights: Any, precision: Any, stack: Any) -> jax.Array:
    """``sum_p K_p (x) S_p`` of weights ``[group, taps..., out, in]`` and a stack
    ``[group, in, example, positions..., column]``.

    ``S_p`` makes a copy of the positions for every tap. It comes after the product with ``K_p`` or before
    it, wherever the copies are smaller.
    """
    dims = len(axes)
    groups, *taps, outputs, inputs = weights.shape
    if _after(axes, weights):
        # [g, taps*out, in] [g, in, rest] -> [g, taps*out, rest], then S_p and the sum over taps
        flat = weights.reshape(groups, -1, inputs)
        value = jnp.matmul(flat, stack.reshape(groups, inputs, -1), precision=precision)
        value = value.reshape(groups, *taps, outputs, *stack.shape[2:])
        parts = {tap: value[(slice(None), *tap)] for tap in np.ndindex(*taps)}
        return _total([moved_by(axes, tap, part, part.ndim - 1 - dims) for tap, part in parts.items()])
    # [g, in, ...] -> [g, taps..., in, ...], then [g, out, taps*in] [g, taps*in, rest] -> [g, out, rest]
    for i in reversed(range(dims)):
        at = stack.ndim - 1 - dims + i
        stack = jnp.stack([moved_by([axes[i]], (p,), stack, at) for p in range(axes[i].taps)], axis=1)
    flat = jnp.moveaxis(weights, -2, 1).reshape(groups, outputs, -1)
    value = jnp.matmul(flat, stack.reshape(groups, flat.shape[-1], -1), precision=precision)
    return value.reshape(groups, outputs, *stack.shape[dims + 2 :])


def _after(axes: Sequence[Axis], weights: Any) -> bool:
    outputs, inputs = weights.shape[-2:]
    return outputs * math.prod(a.size for a in axes) <= inputs * math.prod(a.out_size for a in axes)


def _chunk(axes: Sequence[Axis], weights: Any, stack: Any, nbytes: int) -> int:
    """How many columns make a matrix product that stays in the cache."""
    groups, *taps, outputs, inputs = weights.shape
    before, behind = math.prod(a.size for a in axes), math.prod(a.out_size for a in axes)
    one = groups * math.prod(taps) * min(outputs * before, inputs * behind) * stack.shape[2]
    return max(16, nbytes // (one * stack.dtype.itemsize) // 16 * 16)


def _by_chunks(fn: Callable[[Any], Any], columns: Any, width: int) -> jax.Array:
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


def window_sum(params: dict[str, Any], columns: Any) -> jax.Array:
    """The sum over every window of ``columns [*shape, column]``, an axis at a time."""
    for i, axis in enumerate(window_axes(params, columns.shape[:-1])):
        if axis != Axis(axis.size, 1):
            columns = _total([moved_by([axis], (tap,), columns, i) for tap in range(axis.taps)])
    return columns


def window_axes(params: dict[str, Any], shape: Sequence[int]) -> list[Axis]:
    """The axes of a pooling, by the parameters of its equation."""
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    axes = zip(shape, *(params[name] for name in names), strict=True)
    return [Axis(n, taps, s, lo, hi, l, r) for n, taps, s, (lo, hi), l, r in axes]


def _total(values: Sequence[Any]) -> Any:
    return functools.reduce(operator.add, values)

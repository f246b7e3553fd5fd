"""What a program does on a CPU.

``lax.conv_general_dilated`` is called in the one form that is right on every platform and fast on the CPU:
channels last, without input dilation (the outputs are split by residue) and without negative padding (the
input is cropped). A few groups are convolutions of their own. A convolution of few channels is written out as
a sum over taps, which XLA makes one loop: its convolutions are up to 30 times slower there. One of 64 bits
along one axis, or of few channels, is a product of matrices for each tap. Integers take these forms on every
platform: here they are multiplied by ``dot_general``.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.memory import fits_in_memory
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.products.forms import (
    Call,
    Decomposition,
    Forms,
    by_residues,
    complex_product,
    fold,
    moved_by,
    windows,
)
from jaxconv_fc.sharding import fenced

MOST_TERMS = 64  # of a sum that is written out, and sums in one loop
MOST_DOTS = 32  # products of matrices that are written out: each compiles in 20 ms
MOST_SLOW = 16  # channels of a convolution of 64 bits in XLA's slow form
MOST_CHANNELS = 4  # of a convolution without groups
MOST_PAIRS = 64  # of an input and an output channel of one group, whose products are summed in one loop
MOST_AXES = 2  # spatial axes of one convolution: XLA's own of three run at a tenth of the speed
ROW = 32  # positions of one axis that are summed in one loop
MOST_SPLIT = 8  # groups of a convolution that are convolutions of their own: XLA takes up to 5 times as long
MOST_PARTS = 32  # the same for groups of a kernel gradient


def correlate(axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, call: Call) -> jax.Array:
    """Zeros-mode correlation of any geometry: [n, t, g*i] [p, i, g*e] -> [n, o, g*e]."""
    return by_residues(axes, lhs.shape[0], rhs, lambda inner, rhs: _undilated(inner, lhs, rhs, call))


def _undilated(axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, call: Call) -> jax.Array:
    """Correlation without input dilation, by the fastest form: [n, t, g*i] [p, i, g*e] -> [n, o, g*e]."""
    if jnp.issubdtype(lhs.dtype, jnp.inexact):
        if is_narrow(axes, rhs.shape, call.groups):
            y = fenced(partial(_sum_over_taps, axes, call), _in_order(lhs, call), rhs)
            return _in_order(y, call, back=True)
        if call.groups == 1 and math.prod(rhs.shape[:-2]) <= most_dots(axes, lhs.dtype, *rhs.shape[-2:]):
            return _products_of_taps(axes, call, lhs, rhs)
        if len(axes) > MOST_AXES:
            return _unfolded(axes, lhs, rhs, call)
    return _convolution(axes, lhs, rhs, call)


def kernel_gradient(axes: Sequence[Axis], x: jax.Array, y: jax.Array, call: Call) -> jax.Array:
    """Correlation of inputs with cotangents: [n, t, g*i] [n, o, g*e] -> [p, i, g*e]."""
    inputs, rhs = x.shape[-1] // call.groups, jnp.moveaxis(y, 0, -2)  # [o, n, g*e]

    def window(inner: Sequence[Axis], rhs: jax.Array) -> jax.Array:
        kernel = _undilated_gradient(inner, x, jnp.moveaxis(rhs, -2, 0), call)
        return jnp.moveaxis(kernel, -2, 0)

    return jnp.moveaxis(by_residues(axes, inputs, rhs, window), 0, -2)  # [i, p, g*e] -> [p, i, g*e]


def _undilated_gradient(axes: Sequence[Axis], x: jax.Array, y: jax.Array, call: Call) -> jax.Array:
    """The same without input dilation, by the fastest form.

    In the last one the channels ``i`` of a group take the place of the batch, the examples ``n`` that of the
    channels, and groups are groups.
    """
    if jnp.issubdtype(x.dtype, jnp.inexact):
        if _is_short(axes, x, y, call.groups):
            return _sums_over_outputs(axes, call, x, y)
        if 1 < call.groups <= MOST_PARTS:  # examples take the place of channels in a dimension of their own
            one = call._replace(groups=1)
            xs, ys = jnp.split(x, call.groups, -1), jnp.split(y, call.groups, -1)
            parts = [_undilated_gradient(axes, *part, one) for part in zip(xs, ys, strict=True)]
            return jnp.concatenate(parts, -1)
        if len(axes) > MOST_AXES:
            axis, *others = axes
            taps = axis.with_taps_as_outputs()  # its outputs are those of y
            x = _taps_as_channels(taps, x, call.groups)
            kernel = _undilated_gradient(others, x, y.reshape(-1, *y.shape[2:]), call)  # [p..., p*i, g*e]
            kernel = kernel.reshape(*kernel.shape[:-2], taps.taps, -1, kernel.shape[-1])
            return jnp.moveaxis(kernel, -3, 0)
    x = x.reshape(*x.shape[:-1], call.groups, -1)  # [n, t, g, i]
    x = jnp.moveaxis(x, (0, -1), (-1, 0))  # [i, t, g, n]
    kernel = _convolution(axes, x.reshape(*x.shape[:-2], -1), jnp.moveaxis(y, 0, -2), call)  # [i, p, g*e]
    return jnp.moveaxis(kernel, 0, -2)


def most_dots(axes: Sequence[Axis], dtype: Any, inputs: int, outputs: int) -> int:
    """Up to how many taps a product of matrices for each is faster than a convolution without groups.

    One tap is one product. In 64 bits XLA's convolutions along one axis, and all of few channels, took 1.3 to
    33 times as long as products.
    """
    few = all(isinstance(v, int) and v <= MOST_SLOW for v in (inputs, outputs))  # a symbolic batch is large
    return MOST_DOTS if jnp.finfo(dtype).bits == 64 and (len(axes) == 1 or few) else 1


def _products_of_taps(axes: Sequence[Axis], call: Call, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Correlation without groups and input dilation, [n, t, i] [p, i, e] -> [n, o, e]: a product per tap."""

    def of_tap(p: tuple[int, ...], x: jax.Array, k: jax.Array) -> jax.Array:
        contracting = (((x.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(moved_by(axes, p, x, 1), k[p], contracting, call.precision)

    def added(x: jax.Array, k: jax.Array) -> jax.Array:
        return functools.reduce(operator.add, (of_tap(p, x, k) for p in np.ndindex(*k.shape[:-2])))

    return fenced(added, lhs, rhs) if math.prod(rhs.shape[:-2]) > 1 else added(lhs, rhs)


def _unfolded(axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, call: Call) -> jax.Array:
    """The same without the first axis: its taps become channels, its outputs become examples."""
    axis, *others = axes
    x = _taps_as_channels(axis, lhs, call.groups)  # [n*o, t..., g*p*i]
    k = jnp.moveaxis(rhs, 0, -3)  # [p..., p, i, g*e]
    y = _undilated(others, x, k.reshape(*k.shape[:-3], -1, k.shape[-1]), call)
    return y.reshape(-1, axis.out_size, *y.shape[1:])


def _taps_as_channels(axis: Axis, x: jax.Array, groups: int) -> jax.Array:
    """[n, t, t..., g*i] -> [n*o, t..., g*p*i]: what each output of the first axis reads."""
    x = x.reshape(*x.shape[:-1], groups, 1, -1)  # [n, t, t..., g, 1, i]
    x = jnp.concatenate([moved_by([axis], (p,), x, 1) for p in range(axis.taps)], -2)
    return x.reshape(-1, *x.shape[2:-3], x.shape[-3] * x.shape[-2] * x.shape[-1])


# -- convolutions of lax ---------------------------------------------------------------------------


def _convolution(axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, call: Call) -> jax.Array:
    """Correlation without input dilation, of any dtype: [n, t, g*i] [p, i, g*e] -> [n, o, g*e]."""
    groups = call.groups
    if jnp.issubdtype(lhs.dtype, jnp.integer):
        return _dot_of_windows(axes, lhs, rhs, groups)
    if 1 < groups <= MOST_SPLIT and lhs.dtype.itemsize <= 4:
        one, (xs, kernels) = call._replace(groups=1), (jnp.split(v, groups, -1) for v in (lhs, rhs))
        parts = [_convolution(axes, x, k, one) for x, k in zip(xs, kernels, strict=True)]
        return jnp.concatenate(parts, -1)
    if any(min(a.lo, a.hi) < 0 for a in axes):  # lax.pad crops exactly, the convolution may not
        axes, lhs = _padded(axes, lhs, 1)
    d = len(axes)
    last = (0, d + 1, *range(1, d + 1))  # channels last
    convolve = partial(
        lax.conv_general_dilated,
        window_strides=[a.stride for a in axes],
        padding=[(a.lo, a.hi) for a in axes],
        rhs_dilation=[a.rhs_dilation for a in axes],
        dimension_numbers=lax.ConvDimensionNumbers(last, (d + 1, d, *range(d)), last),
        feature_group_count=groups,
        precision=call.precision,
    )
    return complex_product(convolve, lhs, rhs) if jnp.iscomplexobj(lhs) else convolve(lhs, rhs)


def _padded(axes: Sequence[Axis], x: jax.Array, first: int) -> tuple[list[Axis], jax.Array]:
    """The padding made: axes without any, and ``x`` with zeros around its dimensions from ``first`` on."""
    pads = [(0, 0, 0)] * x.ndim
    pads[first : first + len(axes)] = [(a.lo, a.hi, 0) for a in axes]
    inner = [Axis(a.span, a.taps, a.stride, rhs_dilation=a.rhs_dilation) for a in axes]
    return inner, lax.pad(x, jnp.zeros((), x.dtype), pads)


def _dot_of_windows(axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, groups: int) -> jax.Array:
    """Correlation of integers: GPUs have products of them, and no convolutions."""
    d = len(axes)
    for i, axis in enumerate(axes):  # [n, in..., c] -> [n, out1, taps1, in..., c] -> ...
        lhs = windows(lhs, 1 + 2 * i, axis)
    lhs = lhs.reshape(*lhs.shape[:-1], groups, lhs.shape[-1] // groups)
    kernel = rhs.reshape(*rhs.shape[:-1], groups, rhs.shape[-1] // groups)
    # [n, out1, taps1, ..., g, c] x [taps..., c, g, d] -> [g, n, out..., d] -> [n, out..., g * d]
    contracting = ([*range(2, 2 * d + 2, 2), 2 * d + 2], [*range(d), d])
    y = lax.dot_general(lhs, kernel, (contracting, ([2 * d + 1], [d + 1])))
    return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], rhs.shape[-1])


# -- few channels: term by term ------------------------------------------------------------------


def is_narrow(axes: Sequence[Axis], rhs: tuple[int, ...], groups: int) -> bool:
    """Whether a sum over taps is faster than a convolution with a kernel of this shape, [p, i, g*e]."""
    *taps, inputs, outputs = rhs
    outputs //= groups
    few = groups > 1 or inputs <= min(MOST_CHANNELS, 3 * outputs)
    wide = groups == 1 and outputs > 16 and any(a.stride > 1 for a in axes)  # each output reads with gaps
    return few and not wide and inputs * math.prod(taps) <= MOST_TERMS


def _is_short(axes: Sequence[Axis], x: jax.Array, y: jax.Array, groups: int) -> bool:
    """Whether a sum over outputs for every tap is faster than a convolution with ``y`` as its kernel.

    A sum is faster for one example with groups: a convolution takes examples for channels, and so has one.
    (Under a ``vmap`` that keeps the gradient of each example, examples are groups.) It is also faster for few
    pairs of channels in a group: for the fewest without groups and with many examples. Without groups it is
    a product of matrices, of which :func:`most_dots` may be many.
    """
    one, taps = x.shape[0] == 1, math.prod(a.out_size for a in axes)
    pairs = (x.shape[-1] // groups) * (y.shape[-1] // groups)
    if pairs <= (MOST_PAIRS if one else MOST_PAIRS // 2 if groups > 1 else 2):
        return taps <= MOST_TERMS
    if groups > 1:
        return taps <= (MOST_DOTS if one else 1)
    return taps <= most_dots(axes, x.dtype, x.shape[0], y.shape[-1])  # examples take the place of inputs


def _in_order(x: jax.Array, call: Call, *, back: bool = False) -> jax.Array:
    """[n, t..., c] in the order of the caller's array: [n, c, t...] or [n, t..., c]; or ``back`` from it.

    What passes a fence has this order: it is written out, and another one would be a copy.
    """
    if not call.channels_first:
        return x
    return jnp.moveaxis(x, 1, -1) if back else jnp.moveaxis(x, -1, 1)


def _grouped(x: jax.Array, call: Call) -> tuple[jax.Array, int, int]:
    """:func:`_in_order` by group, [n, g, c, t...] or [n, t..., g, c], with narrow floats as float32.

    Also the dimension of c, and the first one of t.
    """
    at = 1 if call.channels_first else x.ndim - 1
    x = x.astype(jnp.float32 if x.dtype.itemsize < 4 else x.dtype)
    x = x.reshape(*x.shape[:at], call.groups, x.shape[at] // call.groups, *x.shape[at + 1 :])
    return x, at + 1, 3 if call.channels_first else 1


def _sum_over_taps(axes: Sequence[Axis], call: Call, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Correlation without input dilation, [n, t, g*i] [p, i, g*e] -> [n, o, g*e], of arrays in the order of
    the caller's. All terms are one loop."""
    x, at, first = _grouped(lhs, call)
    axes, x = _padded(axes, x, first)
    *taps, inputs, _ = rhs.shape
    weights = rhs.astype(x.dtype).reshape(*taps, inputs, call.groups, -1)  # [p, i, g, e]
    beside = (0, *range(3, x.ndim)) if call.channels_first else range(x.ndim - 2)  # all but [g, e]
    terms = []
    for p, i in itertools.product(np.ndindex(*taps), range(inputs)):
        window = moved_by(axes, p, lax.slice_in_dim(x, i, i + 1, axis=at), first)
        terms.append(window * jnp.expand_dims(weights[(*p, i)], beside))  # [n, g, 1, o] [1, g, e, 1]
    y = functools.reduce(operator.add, terms)
    return y.reshape(*y.shape[: at - 1], -1, *y.shape[at + 1 :]).astype(lhs.dtype)


def _sums_over_outputs(axes: Sequence[Axis], call: Call, x: jax.Array, y: jax.Array) -> jax.Array:
    """Kernel gradient without input dilation: [n, t, g*i] [n, o, g*e] -> [p, i, g*e], a sum for every tap."""
    pairs = (x.shape[-1] // call.groups) * (y.shape[-1] // call.groups)
    dtype, x, y = x.dtype, _in_order(x, call), _in_order(y, call)
    if axes and pairs <= MOST_PAIRS:  # [p, n, g, i, e] -> [p, g, i, e]
        sums = fenced(partial(_sums_of_examples, axes, call), x, y)
        sums = sums.sum(1)  # outside of the fence XLA unites the sums over devices
    else:
        products = partial(_products_of_outputs, axes, call)
        sums = fenced(products, x, y) if math.prod(a.out_size for a in axes) > 1 else products(x, y)
    kernel = jnp.moveaxis(sums, 1, 2)  # [p, g, i, e] -> [p, i, g, e]
    return kernel.reshape(*(a.out_size for a in axes), kernel.shape[1], -1).astype(dtype)


def _factors(
    axes: Sequence[Axis], call: Call, x: jax.Array, y: jax.Array
) -> tuple[list[jax.Array], jax.Array, int, tuple[int, ...]]:
    """What the outputs read through each tap, and their cotangents, both by group: of arrays in the order of
    the caller's.

    Also the dimension of the channels in a group, and those of the positions.
    """
    x, at, first = _grouped(x, call)
    y, *_ = _grouped(y, call)
    axes, x = _padded([a.with_taps_as_outputs() for a in axes], x, first)  # its taps are those of the kernel
    read = [moved_by(axes, p, x, first) for p in np.ndindex(*(a.taps for a in axes))]
    return read, y, at, tuple(range(first, first + len(axes)))


def _products_of_outputs(axes: Sequence[Axis], call: Call, x: jax.Array, y: jax.Array) -> jax.Array:
    """The gradient, [n, t, g*i] [n, o, g*e] -> [p, g, i, e], by a product of matrices for each tap, of arrays
    in the order of the caller's."""
    read, y, at, positions = _factors(axes, call, x, y)
    numbers = (((0, *positions), (0, *positions)), ((at - 1,), (at - 1,)))
    return jnp.stack([lax.dot_general(window, y, numbers, call.precision) for window in read])


def _sums_of_examples(axes: Sequence[Axis], call: Call, x: jax.Array, y: jax.Array) -> jax.Array:
    """The gradient of each example, [n, t, g*i] [n, o, g*e] -> [p, n, g, i, e], of arrays in the order of the
    caller's.

    The positions of all axes but the first are summed in one loop: no product is stored, and every factor is
    read once. A single axis is cut into rows. The rest is summed apart: one long chain of additions would
    round ten times as much, and devices that share the examples would gather them before a loop over them.
    """
    read, y, at, positions = _factors(axes, call, x, y)
    y = jnp.expand_dims(y, at)
    terms = [jnp.expand_dims(window, at + 1) * y for window in read]  # [n, g, i, 1, o] [n, g, 1, e, o]
    first, *others = (dim + (at < dim) for dim in positions)
    if not others:
        terms, others = [_in_rows(term, first) for term in terms], [first + 1]
    zeros = [jnp.zeros((), term.dtype) for term in terms]
    rows = lax.reduce(tuple(terms), tuple(zeros), lambda a, b: tuple(map(operator.add, a, b)), others)
    return jnp.stack([row.sum(first) for row in rows])


def _in_rows(x: jax.Array, dim: int) -> jax.Array:
    """[..., o, ...] -> [..., row, place, ...], with zeros behind the last position."""
    rows, pads = -(-x.shape[dim] // ROW), [(0, 0, 0)] * x.ndim
    pads[dim] = (0, rows * ROW - x.shape[dim], 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), pads)
    return x.reshape(*x.shape[:dim], rows, ROW, *x.shape[dim + 1 :])


# -- stacks of vectors, and matrices ---------------------------------------------------------------


def method(spec: ConvSpec, count: int, dtype: Any) -> str:
    """Which way :func:`batched_apply` takes for ``count`` examples.

    The convolution, except for 16 examples or more, if :func:`apply` does not write it out as a sum over
    taps, and if M is within the memory limit:

    - dense, if at least a quarter of M is nonzero (kernels as large as the image);
    - sparse, if an output channel reads at most 4 input channels, and a group has at most 4 outputs, in
      float32 or narrower, or 1 of several (depthwise) in any dtype;
    - sparse, for integers and at least 64 examples.

    Sparse only where all examples together take 10^5 products.

    Measured on 2 cores with jax 0.10.2 and 0.11.2 by ``python -m benchmarks batched random_layers``.
    """
    if count < 16 or not spec.nse:
        return "convolution"
    shape = (*(a.taps for a in spec.axes), spec.group_channels, spec.out_channels)
    dilated = any(a.lhs_dilation > 1 for a in spec.axes)  # is split into smaller convolutions first
    if jnp.issubdtype(dtype, jnp.inexact) and not dilated and is_narrow(spec.axes, shape, spec.groups):
        return "convolution"
    sizes = spec.nbytes(dtype)
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize <= 4
    if 4 * spec.nse >= spec.out_size * spec.in_size and fits_in_memory(sizes.dense):
        return "dense"
    few = spec.group_channels <= 4 and spec.out_channels <= 4 * spec.groups
    few = few and (narrow or (spec.groups > 1 and spec.group_channels == 1))
    small = count * spec.nse < 10**5  # products in all: less than it takes to build M
    whole = not jnp.issubdtype(dtype, jnp.inexact) and count >= 64
    if (few or whole) and not small and fits_in_memory(sizes.bcsr):
        return "sparse"
    return "convolution"


def svd(a: jax.Array) -> Decomposition:
    """By LAPACK."""
    return Decomposition(*jnp.linalg.svd(a, full_matrices=False))


CPU = Forms(
    correlate=correlate,
    kernel_gradient=kernel_gradient,
    fold=fold,
    svd=svd,
    singular_values=partial(jnp.linalg.svd, compute_uv=False),
    method=method,
    column_bytes=2**22,  # they are read again at once, from the cache
)

"""Norms and inner products of the gradients of single examples, by the cheaper of two ways.

The gradient of example n is ``X_n^T y_n``, a sum over outputs o of patches times cotangents. So

    <X_n^T y_n, X_m^T y_m> = sum over o, o' of  (X_n X_m^T)[o, o'] * (y_n y_m^T)[o, o'],

where the rows of X are those of one output channel. The left side needs gradients: of a few examples, or a
few out channels, at a time. The right side needs pairs of *positions*: ``X X^T`` is a sum over taps of
``(x x^T)[t(o, p), t(o', p)]``, taken one axis after the other. A dense layer has one output, and the norm of
its gradient is ``||x|| * ||y||``.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.curvature.stacks import as_stacks, check_real, each_example, part_size
from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.layout import taps, to_canonical
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.numerics import homogeneous, root, squares, times_power_of_two, unit_scale
from jaxconv_fc.products.forms import moved_by
from jaxconv_fc.products.product import kernel_vjp, padded_inputs
from jaxconv_fc.sharding import program

MOST_SHIFTS = 64  # taps of all axes, each of which is a term of a sum that is written out
# The gradients of single examples run at a fraction of the speed of a product of matrices.
COST_OF_GRADIENTS = 2.0


def gradient_norms(spec: ConvSpec, xs: Array, y_bars: Array) -> jax.Array:
    """``norms[n] = ||X_n^T y_n||``, the norm of the kernel gradient of every example of a batch.

    No more than a few gradients exist at a time, and none where outputs are few: there
    ``||X^T y||**2 = sum over o, o' of (X X^T)[o, o'] (y y^T)[o, o']``, which is ``||x||**2 ||y||**2`` for a
    dense layer (docs/maths.md, section 16). The sizes decide. The second way has the rounding errors of a
    square: where the terms of a gradient cancel to ``sqrt(eps)`` of their size, none of its digits is right.
    Every example is evaluated at its own scale. Differentiable, with gradient 0 at 0.

    Args:
      spec: the geometry.
      xs: array of shape ``(n, *spec.in_shape)``, the inputs.
      y_bars: array of shape ``(n, *spec.out_shape)`` and the dtype of xs, the cotangents of the outputs.

    Returns:
      Real array of shape ``(n,)``, in a floating dtype of 32 bits or more.

    Raises:
      TypeError: dtypes differ, or are bool.
      ValueError: a shape is not the spec's.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.curvature
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), "VALID")
    >>> xs, y_bars = jnp.array([[[1., 2., 0.]], [[0., 0., 3.]]]), jnp.array([[[3., 0.]], [[0., 2.]]])
    >>> print(fc.curvature.gradient_norms(spec, xs, y_bars).round(4))  # of [3, 6] and [0, 6]
    [6.7082 6.    ]
    """
    return norms(spec, *as_stacks(spec, xs, y_bars))


def gradient_gram(
    spec: ConvSpec, xs: Array, y_bars: Array, other: tuple[Array, Array] | None = None
) -> jax.Array:
    """``K[n, m] = <X_n^T y_n, X_m^T y_m>``, the inner products of the kernel gradients of all examples.

    With cotangents of a network's outputs it is what this kernel adds to the empirical neural tangent kernel.
    ``K[n, n]`` is the square of :func:`gradient_norms`. The sizes decide between two ways: the gradients of a
    few out channels at a time, or pairs of positions (docs/maths.md, section 16).

    Args:
      spec: the geometry.
      xs: array of shape ``(n, *spec.in_shape)``, the inputs.
      y_bars: array of shape ``(n, *spec.out_shape)`` and the dtype of xs, the cotangents of the outputs.
      other: a second pair (xs, y_bars), of m examples; by default the first one.

    Returns:
      Array of shape ``(n, m)``.

    Raises:
      TypeError: dtypes differ, or are bool or complex; ``other`` is not a pair.
      ValueError: a shape is not the spec's, or the result is beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.curvature
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), "VALID")
    >>> xs, y_bars = jnp.array([[[1., 2., 0.]], [[0., 0., 3.]]]), jnp.array([[[3., 0.]], [[0., 2.]]])
    >>> print(fc.curvature.gradient_gram(spec, xs, y_bars))  # of [3, 6] and [0, 6]
    [[45. 36.]
     [36. 36.]]
    """
    first = as_stacks(spec, xs, y_bars)
    if other is not None and (not isinstance(other, tuple | list) or len(other) != 2):
        raise TypeError(f"other must be a pair (xs, y_bars), got {type(other).__name__}.")
    second = first if other is None else as_stacks(spec, *other, ("other[0]", "other[1]"))
    check_real("gradient_gram", "xs", first[0])
    check_real("gradient_gram", "other[0]", second[0])
    if first[0].dtype != second[0].dtype:
        raise TypeError(
            f"gradient_gram: xs are {first[0].dtype} and other[0] {second[0].dtype}. Cast one of them."
        )
    shape = (len(first[0]), len(second[0]))
    check_array("gradient_gram", shape, first[0].dtype, "fewer examples at a time, by other=")
    return gram(spec, *first, *second)


# -- norms -------------------------------------------------------------------------------------------


@program
def norms(spec: ConvSpec, xs: jax.Array, ys: jax.Array) -> jax.Array:
    """:func:`gradient_norms` of stacks that are checked."""
    real = jnp.finfo(xs.dtype).dtype
    if not xs.size or not ys.size:
        return jnp.zeros(len(xs), real)
    by_positions = _positions_are_cheaper(spec, 1)
    of, entries = (
        (_by_positions, _pair_entries(spec)) if by_positions else (_by_gradient, _kernel_entries(spec))
    )
    each = partial(homogeneous, partial(of, spec), (1, 1))  # products of small numbers would be flushed to 0
    return each_example(each, part_size(len(xs), entries * xs.dtype.itemsize), xs, ys)


def _by_gradient(spec: ConvSpec, x: jax.Array, y: jax.Array) -> jax.Array:
    return root(squares(kernel_vjp(spec, x, y, precision=lax.Precision.HIGHEST)).sum())


def _by_positions(spec: ConvSpec, x: jax.Array, y: jax.Array) -> jax.Array:
    """A square that rounding makes negative is 0; NaN stays."""
    square = _common(spec, x.conj(), y.conj(), x, y)
    return root(jnp.where(square.real < 0, jnp.zeros_like(square.real), square.real))


def _common(spec: ConvSpec, x: jax.Array, y: jax.Array, other_x: jax.Array, other_y: jax.Array) -> jax.Array:
    """The inner product of two gradients, by positions: without conjugation."""
    d = len(spec.axes)
    x, other_x = (with_groups(spec, padded_inputs(spec, v[None])[0]) for v in (x, other_x))  # [t, g, i]
    y, other_y = (with_groups(spec, to_canonical(v, spec.out_order)) for v in (y, other_y))  # [o, g, e]
    numbers = (((d + 1,), (d + 1,)), ((d,), (d,)))
    inputs, outputs = (
        lax.dot_general(a, b, numbers, lax.Precision.HIGHEST) for a, b in ((x, other_x), (y, other_y))
    )  # [g, t, t'] and [g, o, o']
    for a, axis in enumerate(axis.on_padded for axis in spec.axes):
        # Dimension 1 + a has the positions of one example, 1 + d + a those of the other.
        pairs = jnp.moveaxis(inputs, 1 + d + a, 2 + a)
        shifts = (moved_by([axis, axis], (p, p), pairs, 1 + a) for p in range(axis.taps))
        inputs = jnp.moveaxis(functools.reduce(operator.add, shifts), 2 + a, 1 + d + a)
    return (inputs * outputs).sum()


def with_groups(spec: ConvSpec, value: jax.Array) -> jax.Array:
    """[..., g*c] -> [..., g, c]."""
    return value.reshape(*value.shape[:-1], spec.groups, value.shape[-1] // spec.groups)


# -- inner products ----------------------------------------------------------------------------------


@program
def gram(spec: ConvSpec, xs: jax.Array, ys: jax.Array, other_xs: jax.Array, other_ys: jax.Array) -> jax.Array:
    """:func:`gradient_gram` of stacks that are checked, each example at its own scale."""
    if not xs.size or not ys.size or not other_xs.size:
        return jnp.zeros((len(xs), len(other_xs)), xs.dtype)
    of = _gram_by_positions if _positions_are_cheaper(spec, len(other_xs)) else _gram_by_gradients
    units, exponents = zip(
        *(jax.vmap(unit_scale)(stack) for stack in (xs, ys, other_xs, other_ys)), strict=True
    )
    x, y, other_x, other_y = exponents
    return times_power_of_two(of(spec, *units), (x + y)[:, None] + (other_x + other_y)[None, :])


def _gram_by_positions(spec: ConvSpec, *stacks: jax.Array) -> jax.Array:
    xs, ys, *others = stacks
    of_one = jax.vmap(partial(_common, spec), (None, None, 0, 0))
    nbytes = len(others[0]) * _pair_entries(spec) * xs.dtype.itemsize
    return each_example(lambda x, y: of_one(x, y, *others), part_size(len(xs), nbytes), xs, ys)


def _gram_by_gradients(spec: ConvSpec, *stacks: jax.Array) -> jax.Array:
    """``sum over out channels d of G_d G_d^T``, where G_d has the gradients of all examples for channel d."""
    xs, ys, other_xs, other_ys = stacks
    block = spec.out_channels // spec.groups
    one_channel = (len(xs) + len(other_xs)) * _kernel_entries(spec) // max(1, block) * xs.dtype.itemsize
    count = part_size(block, one_channel)
    while block % count:  # all parts are of one size
        count -= 1
    shape = list(spec.rhs_shape)
    shape[spec.dimension_numbers.rhs_spec[0]] = count * spec.groups
    part = replace(spec, rhs_shape=tuple(shape))
    at = spec.out_order[-1] + 1  # the channels of a stack of outputs

    def channels(stack: jax.Array) -> jax.Array:
        """(n, ..., g*e, ...) -> (parts, n, ..., g*count, ...)."""
        split = stack.reshape(*stack.shape[:at], spec.groups, -1, count, *stack.shape[at + 1 :])
        split = jnp.moveaxis(split, at + 1, 0)
        return split.reshape(*split.shape[: at + 1], -1, *split.shape[at + 3 :])

    def products(ys: jax.Array, other_ys: jax.Array) -> jax.Array:
        gradients = jax.vmap(partial(kernel_vjp, part, precision=lax.Precision.HIGHEST))
        rows, columns = (gradients(a, b).reshape(len(a), -1) for a, b in ((xs, ys), (other_xs, other_ys)))
        return jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST)

    if count == block:
        return products(ys, other_ys)
    total = jnp.zeros((len(xs), len(other_xs)), xs.dtype)
    parts = channels(ys), channels(other_ys)
    return lax.scan(lambda total, part: (total + products(*part), None), total, parts)[0]


# -- the choice --------------------------------------------------------------------------------------


def _positions_are_cheaper(spec: ConvSpec, partners: int) -> bool:
    """Whether pairs of positions cost less than gradients, where each example meets so many others."""
    if sum(taps(spec)) > MOST_SHIFTS:
        return False
    inputs, outputs = _positions(spec)
    kernel = _kernel_entries(spec)
    of_gradient = COST_OF_GRADIENTS * kernel * outputs + kernel * partners
    of_pair = inputs**2 * spec.in_channels + outputs**2 * spec.out_channels
    shifted, shapes = 0, [axis.padded_size for axis in spec.axes]
    for a, axis in enumerate(spec.axes):
        shapes[a] = axis.out_size
        shifted += axis.taps * math.prod(shapes) ** 2 * spec.groups
    return partners * (of_pair + shifted) < of_gradient


def _positions(spec: ConvSpec) -> tuple[int, int]:
    """How many positions an input has with its padding by copies, and an output."""
    return math.prod(a.padded_size for a in spec.axes), math.prod(a.out_size for a in spec.axes)


def _kernel_entries(spec: ConvSpec) -> int:
    """What one gradient takes, in entries."""
    return math.prod(spec.rhs_shape)


def _pair_entries(spec: ConvSpec) -> int:
    """What the pairs of positions of two examples take, in entries."""
    inputs, outputs = _positions(spec)
    return 2 * spec.groups * (inputs**2 + outputs**2)

"""One convolution for two in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.axis import Axis
from jaxconv_fc.layout import from_canonical, grid
from jaxconv_fc.sharding import program
from jaxconv_fc.spec import ConvSpec, as_operand, conv_spec


def compose(second: tuple[ConvSpec, Any], first: tuple[ConvSpec, Any]) -> tuple[ConvSpec, jax.Array]:
    """One convolution for two in a row: the ``(spec, kernel)`` whose matrix is ``M2 @ M1``.

    Exists per axis where ``gcd(s1, l2) = 1``: with ``e1 = r1*l2``, ``e2 = r2*s1``, ``g = gcd(e1, e2)`` the
    stride is ``s1*s2``, the input dilation ``l1*l2``, the kernel dilation ``g``, the low padding
    ``s1*lo2 + l2*lo1``. Tap q is the sum of ``K2[p2] K1[p1]`` over all ``p1*e1 + p2*e2 = q*g``, and over
    the channels between (docs/maths.md, section 4). Exact if and only if every position between the two
    that the second reads in its padding is one where the first, continued, would see no input. This is
    tested. Two SAME layers in a row differ in a ring at the border and are refused.

    Args:
      second, first: ``(spec, kernel)`` each; the input of the second is the output of the first, in the
        same layout. The first may have a boundary mode if the second does not pad.

    Returns:
      ``(spec, kernel)``, differentiable in both kernels. Feature groups are kept as far as both have
      them: ``gcd(G1, G2)``.

    Raises:
      ValueError: the shapes or layouts do not chain, or no single convolution equals the product; it
        says which output rows would differ.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> first = fc.conv_spec((1, 1, 6), (1, 1, 2), (1,), "VALID")
    >>> second = fc.conv_spec((1, 1, 5), (1, 1, 2), (1,), "VALID")
    >>> spec, kernel = fc.compose((second, jnp.array([[[1, 10]]])), (first, jnp.array([[[1, 2]]])))
    >>> print(kernel)
    [[[ 1 12 20]]]
    """
    (spec2, kernel2), (spec1, kernel1) = second, first
    kernel1 = as_operand("first kernel", kernel1, spec1, "rhs_shape")
    kernel2 = as_operand("second kernel", kernel2, spec2, "rhs_shape")
    spec1, spec2 = _plain(spec1, "first"), _plain(spec2, "second")
    order = _chained(spec2, spec1)
    pairs = tuple((spec2.axes[j], a) for j, a in zip(order, spec1.axes, strict=True))
    axes = tuple(_compose_axes(i, *pair) for i, pair in enumerate(pairs))
    _check_exact(spec2, spec1, pairs)
    groups = math.gcd(spec1.groups, spec2.groups)
    channels = spec1.in_channels // groups, spec2.out_channels
    spec = _composed_spec(spec2, spec1, order, axes, groups, (*(a.taps for a in axes), *channels))
    return spec, _composed_kernel(spec, spec2, spec1, pairs, kernel2, kernel1)


@partial(program, static_argnums=3)
def _composed_kernel(
    spec: ConvSpec,
    spec2: ConvSpec,
    spec1: ConvSpec,
    pairs: Sequence[tuple[Axis, Axis]],
    kernel2: jax.Array,
    kernel1: jax.Array,
) -> jax.Array:
    order, groups = _chained(spec2, spec1), spec.groups
    taps2 = jnp.transpose(kernel2, (*(spec2.kernel_order[j] for j in order), *spec2.kernel_order[-2:]))
    taps1 = jnp.transpose(kernel1, spec1.kernel_order)
    taps2, taps1 = _regroup(taps2, spec2.groups, groups), _regroup(taps1, spec1.groups, groups)
    kernel = _compose_kernels(pairs, spec.axes, taps2, taps1, groups)
    return from_canonical(kernel, spec.kernel_order)


def _plain(spec: ConvSpec, name: str) -> ConvSpec:
    plain = spec.canonical
    if plain.batch_group_count > 1:
        raise ValueError(
            f"compose: the {name} convolution has batch_group_count={spec.batch_group_count} in a layout "
            "that does not have the batch directly before the channels. Use feature groups instead."
        )
    return plain


def _chained(spec2: ConvSpec, spec1: ConvSpec) -> list[int]:
    """For each spatial axis of the first, the axis of the second that continues it."""
    out, inp = spec1.out_order, spec2.in_order
    if spec1.out_shape != spec2.in_shape or out[-1] != inp[-1]:
        raise ValueError(
            f"compose: the first gives arrays of shape {spec1.out_shape} with channels on axis {out[-1]}, "
            f"the second takes {spec2.in_shape} with channels on axis {inp[-1]}. Make them the same."
        )
    return [inp.index(place) for place in out[:-1]]


def _compose_axes(i: int, second: Axis, first: Axis) -> Axis:
    """The composed relation of one axis; ValueError where there is none."""
    if second.mode != "zeros" or (first.mode != "zeros" and (second.lo or second.hi > 0)):
        raise ValueError(
            f"compose: on spatial axis {i}, padding_mode={first.mode!r} then {second.mode!r} with padding "
            f"{(second.lo, second.hi)}: only zeros mode may pad what another convolution made. Every row "
            "that reads this padding would differ."
        )
    inner = first.on_padded
    if math.gcd(inner.stride, second.lhs_dilation) != 1:
        raise ValueError(
            f"compose: on spatial axis {i} the first has stride {inner.stride} and the second lhs_dilation "
            f"{second.lhs_dilation}, which must have no common factor: the product is no convolution."
        )
    step1, step2, dilation = _tap_steps(second, inner)
    composed = Axis(
        size=inner.size,
        taps=(inner.taps - 1) * step1 + (second.taps - 1) * step2 + 1,
        stride=inner.stride * second.stride,
        lo=inner.stride * second.lo + second.lhs_dilation * inner.lo,
        lhs_dilation=inner.lhs_dilation * second.lhs_dilation,
        rhs_dilation=dilation,
    ).ending_at(second.out_size)
    if first.mode == "zeros":
        return composed
    padded = replace(composed, size=first.size, lo=first.lo, hi=first.hi, mode=first.mode)
    if padded.out_size != second.out_size:
        raise ValueError(
            f"compose: on spatial axis {i} one convolution in padding_mode={first.mode!r} would make "
            f"{padded.out_size} outputs, not {second.out_size}."
        )
    return padded


def _tap_steps(second: Axis, first: Axis) -> tuple[int, int, int]:
    """``(step1, step2, g)``: taps p1, p2 meet in tap ``p1*step1 + p2*step2`` of an axis of dilation g."""
    e1, e2 = first.rhs_dilation * second.lhs_dilation, second.rhs_dilation * first.stride
    g = math.gcd(e1, e2)
    return e1 // g, e2 // g, g


def _check_exact(spec2: ConvSpec, spec1: ConvSpec, pairs: Sequence[tuple[Axis, Axis]]) -> None:
    """Refuse if some row reads, through the padding between the two, an input that it must not see."""
    sees, errs = zip(*(_virtual_reads(*pair) for pair in pairs), strict=True) if pairs else ((), ())
    wrong = 0
    for i, err in enumerate(errs):
        rows = [err if j == i else see for j, see in enumerate(sees)]
        wrong = wrong | reduce(np.multiply.outer, rows)
    # Without channels the composed kernel has no entries, or is a sum of none.
    count = int(np.sum(wrong)) * bool(math.prod(spec1.rhs_shape) * math.prod(spec2.rhs_shape))
    if count:
        where = [np.flatnonzero(err).tolist() for err in errs]
        raise ValueError(
            f"compose: no single convolution equals the product. {count} of {np.size(wrong)} output "
            f"positions would differ, those at {where} (per spatial axis): there the second reads padding "
            "where one convolution would see the input. Pad once, before the first."
        )


def _virtual_reads(second: Axis, first: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Per output of the second: does it see any input, and does it see one through its own padding?"""
    for axis in (second, first):
        axis.check_held_by(np.int32)
    o, p = np.arange(second.out_size)[:, None], np.arange(second.taps)
    at = o * second.stride + p * second.rhs_dilation - second.lo
    u = at // second.lhs_dilation
    on_grid = at % second.lhs_dilation == 0
    j = u[..., None] * first.stride + np.arange(first.taps) * first.rhs_dilation - first.on_padded.lo
    t = j // first.lhs_dilation
    reads = ((j % first.lhs_dilation == 0) & (t >= 0) & (t < first.on_padded.size)).any(-1) & on_grid
    outside = (u < 0) | (u >= first.out_size)
    return reads.any(-1), (reads & outside).any(-1)


def _regroup(kernel: jax.Array, groups: int, fewer: int) -> jax.Array:
    """A canonical kernel of ``groups`` groups as one of ``fewer``: zeros between the merged groups."""
    taps, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    merged = groups // fewer
    blocks = kernel.reshape(*taps, 1, inputs, fewer, merged, outputs // groups)
    eye = jnp.eye(merged, dtype=kernel.dtype).reshape(merged, 1, 1, merged, 1)
    eye = jnp.expand_dims(eye, range(len(taps)))
    return jnp.where(eye != 0, blocks, jnp.zeros((), kernel.dtype)).reshape(*taps, merged * inputs, outputs)


def _compose_kernels(
    pairs: Sequence[tuple[Axis, Axis]],
    axes: Sequence[Axis],
    kernel2: jax.Array,
    kernel1: jax.Array,
    groups: int,
) -> jax.Array:
    """``K[q] = sum of K1[p1] K2[p2]`` over the taps that meet in q, for canonical kernels.

    A scatter-add of all products of taps, so that any dtype works.
    """
    d = len(pairs)
    kernel1 = kernel1.reshape(*kernel1.shape[:-1], groups, kernel1.shape[-1] // groups)
    kernel2 = kernel2.reshape(*kernel2.shape[:-1], groups, kernel2.shape[-1] // groups)
    between = (([d + 2], [d]), ([d + 1], [d + 1]))  # contract the channels between, group by group
    products = lax.dot_general(kernel1, kernel2, between, precision="highest")
    products = jnp.moveaxis(products, (1 + d, 0), (-3, -2))  # (taps1..., taps2..., in, groups, out)
    channels = products.shape[2 * d :]
    if d:
        iotas = grid(products.shape[: 2 * d], jnp.int32)
        steps = [_tap_steps(*pair)[:2] for pair in pairs]
        meet = tuple(iotas[a] * step1 + iotas[d + a] * step2 for a, (step1, step2) in enumerate(steps))
        products = jnp.zeros((*(a.taps for a in axes), *channels), products.dtype).at[meet].add(products)
    return products.reshape(*products.shape[:d], channels[0], channels[1] * channels[2])


def _composed_spec(
    spec2: ConvSpec,
    spec1: ConvSpec,
    order: Sequence[int],
    axes: Sequence[Axis],
    groups: int,
    kernel_shape: tuple[int, ...],
) -> ConvSpec:
    out = spec2.dimension_numbers.out_spec
    numbers = lax.ConvDimensionNumbers(
        spec1.dimension_numbers.lhs_spec,
        spec1.dimension_numbers.rhs_spec,
        (*out[:2], *(out[2 + j] for j in order)),
    )
    rhs = [0] * len(kernel_shape)
    for place, size in zip(spec1.kernel_order, kernel_shape, strict=True):
        rhs[place] = size
    return conv_spec(
        spec1.lhs_shape,
        rhs,
        [a.stride for a in axes],
        [(a.lo, a.hi) for a in axes],
        [a.lhs_dilation for a in axes],
        [a.rhs_dilation for a in axes],
        numbers,
        groups,
        padding_mode=spec1.padding_mode,
    )

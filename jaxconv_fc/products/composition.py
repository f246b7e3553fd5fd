"""One convolution for two in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.arguments import Array, check_steps, check_summable
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.layout import from_canonical, grid, inverse, to_canonical
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.sharding import program


def compose(second: tuple[ConvSpec, Array], first: tuple[ConvSpec, Array]) -> tuple[ConvSpec, jax.Array]:
    """One convolution for two in a row: the ``(spec, kernel)`` whose matrix is ``M2 @ M1``.

    Per axis, ``gcd(s1, l2)`` must be 1. With ``e1 = r1*l2``, ``e2 = r2*s1``, ``g = gcd(e1, e2)``, the result
    has stride ``s1*s2``, input dilation ``l1*l2``, kernel dilation ``g`` and low padding ``s1*lo2 + l2*lo1``.
    Tap q is the sum of ``K2[p2] K1[p1]`` over all ``p1*e1 + p2*e2 = q*g``, and over the channels between
    (docs/maths.md, section 4). Exact if and only if the first convolution, continued beyond its outputs,
    would read no input at the positions that the second pads. This is tested. Two SAME layers in a row
    differ in a ring at the border and are refused.

    Args:
      second, first: ``(spec, kernel)`` each. The input of the second is the output of the first, in the
        same layout. The first may have any padding mode if the second does not pad.

    Returns:
      ``(spec, kernel)``, differentiable in both kernels, with ``gcd(G1, G2)`` feature groups.

    Raises:
      ValueError: the shapes or layouts do not chain, or no single convolution equals the product. The
        message says which output positions would differ.

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
    if jnp.bool_ in (kernel1.dtype, kernel2.dtype):
        check_summable("first kernel", kernel1, "second kernel", kernel2)
    spec1, spec2 = _without_batch_groups(spec1, "first"), _without_batch_groups(spec2, "second")
    order = _next_axes(spec2, spec1)
    pairs = [(spec2.axes[j], a) for j, a in zip(order, spec1.axes, strict=True)]
    axes = [_composed_axis(i, *pair) for i, pair in enumerate(pairs)]
    _check_exact(spec2, spec1, pairs)
    out, groups = spec2.dimension_numbers.out_spec, math.gcd(spec1.groups, spec2.groups)
    kernel_shape = (*(a.taps for a in axes), spec1.in_channels // groups, spec2.out_channels)
    spec = replace(  # with the input layout of the first and the output layout of the second
        spec1.having(axes),
        rhs_shape=tuple(kernel_shape[i] for i in inverse(spec1.kernel_order)),
        dimension_numbers=spec1.dimension_numbers._replace(out_spec=(*out[:2], *(out[2 + j] for j in order))),
        feature_group_count=groups,
    )
    return spec, _composed_kernel(spec, spec2, spec1, kernel2, kernel1)


@program
def _composed_kernel(
    spec: ConvSpec, spec2: ConvSpec, spec1: ConvSpec, kernel2: jax.Array, kernel1: jax.Array
) -> jax.Array:
    """``K[q] = sum of K1[p1] K2[p2]`` over the taps that make tap q.

    A scatter-add of all products of taps, so that any dtype works.
    """
    d, groups, order = len(spec.axes), spec.groups, _next_axes(spec2, spec1)
    kernel2 = jnp.transpose(kernel2, (*(spec2.kernel_order[j] for j in order), *spec2.kernel_order[-2:]))
    kernel2 = _regroup(kernel2, spec2.groups, groups)  # [taps2..., between, group, out]
    kernel1 = _regroup(to_canonical(kernel1, spec1.kernel_order), spec1.groups, groups)
    # [taps1..., in, group, between] x [taps2..., between, group, out] -> [group, taps1..., in, taps2..., out]
    between = (([d + 2], [d]), ([d + 1], [d + 1]))
    products = lax.dot_general(kernel1, kernel2, between, precision="highest")
    products = jnp.moveaxis(products, (1 + d, 0), (-3, -2))  # [taps1..., taps2..., in, group, out]
    inputs, _, outputs = channels = products.shape[2 * d :]
    if d:  # [taps1..., taps2..., in, group, out] -> [taps..., in, group, out]
        p = grid(products.shape[: 2 * d], jnp.int32)
        steps = [_tap_steps(spec2.axes[j], a) for j, a in zip(order, spec1.axes, strict=True)]
        made = tuple(p[a] * first + p[d + a] * second for a, (first, second, _) in enumerate(steps))
        taps = (a.taps for a in spec.axes)
        products = jnp.zeros((*taps, *channels), products.dtype).at[made].add(products)
    products = products.reshape(*products.shape[:d], inputs, groups * outputs)
    return from_canonical(products, spec.kernel_order)


def _without_batch_groups(spec: ConvSpec, name: str) -> ConvSpec:
    plain = spec.canonical
    if plain.batch_group_count > 1:
        raise ValueError(
            f"compose: the {name} convolution has batch_group_count={spec.batch_group_count} in a layout "
            "that does not have the batch directly before the channels. Use feature groups instead."
        )
    return plain


def _next_axes(spec2: ConvSpec, spec1: ConvSpec) -> list[int]:
    """For each spatial axis of the first, the axis of the second that reads its outputs."""
    out, inp = spec1.out_order, spec2.in_order
    if spec1.out_shape != spec2.in_shape or out[-1] != inp[-1]:
        raise ValueError(
            f"compose: the first gives arrays of shape {spec1.out_shape} with channels on axis {out[-1]}, "
            f"the second takes {spec2.in_shape} with channels on axis {inp[-1]}. Make them the same."
        )
    return [inp.index(place) for place in out[:-1]]


def _composed_axis(i: int, second: Axis, first: Axis) -> Axis:
    """The composed relation of one axis; ValueError where there is none."""
    if not second.pads_with_zeros or (not first.pads_with_zeros and (second.lo or second.hi > 0)):
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
    # o*s2 + p2*r2 - lo2 == u*l2  times s1,  plus  u*s1 + p1*r1 - lo1 == t*l1  times l2,  is
    # o*(s1*s2) + (p1*e1 + p2*e2) - (s1*lo2 + l2*lo1) == t*(l1*l2)
    step1, step2, dilation = _tap_steps(second, inner)
    composed = Axis(
        size=inner.size,
        taps=(inner.taps - 1) * step1 + (second.taps - 1) * step2 + 1,
        stride=inner.stride * second.stride,
        lo=inner.stride * second.lo + second.lhs_dilation * inner.lo,
        lhs_dilation=inner.lhs_dilation * second.lhs_dilation,
        rhs_dilation=dilation,
    ).ending_at(second.out_size)
    check_steps(i, composed)
    if first.pads_with_zeros:
        return composed
    padded = replace(composed, size=first.size, lo=first.lo, hi=first.hi, mode=first.mode)
    if padded.out_size != second.out_size:
        raise ValueError(
            f"compose: on spatial axis {i} one convolution in padding_mode={first.mode!r} would make "
            f"{padded.out_size} outputs, not {second.out_size}."
        )
    return padded


def _tap_steps(second: Axis, first: Axis) -> tuple[int, int, int]:
    """``(e1/g, e2/g, g)``: taps p1 and p2 make tap ``p1*e1/g + p2*e2/g`` of kernel dilation g."""
    e1, e2 = first.rhs_dilation * second.lhs_dilation, second.rhs_dilation * first.stride
    g = math.gcd(e1, e2)
    return e1 // g, e2 // g, g


def _check_exact(spec2: ConvSpec, spec1: ConvSpec, pairs: Sequence[tuple[Axis, Axis]]) -> None:
    """ValueError if the composed convolution would read an input where the second reads its padding."""
    sees, errs = zip(*(_virtual_reads(*pair) for pair in pairs), strict=True) if pairs else ((), ())
    wrong = 0  # per output position: an error on one axis, where the output sees an input on all others
    for i, err in enumerate(errs):
        wrong = wrong | reduce(np.multiply.outer, [*sees[:i], err, *sees[i + 1 :]])
    # If a kernel is empty, both the product and the composed matrix are 0.
    count = int(np.sum(wrong)) * bool(math.prod(spec1.rhs_shape) * math.prod(spec2.rhs_shape))
    if count:
        where = [np.flatnonzero(err).tolist() for err in errs]
        raise ValueError(
            f"compose: no single convolution equals the product. {count} of {np.size(wrong)} output "
            f"positions would differ, those at {where} (per spatial axis): there the second reads padding "
            "where one convolution would see the input. Pad once, before the first."
        )


def _virtual_reads(second: Axis, first: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Per output of the second, if the first had outputs everywhere: whether it sees any input, and whether
    it sees one at a position ``u`` that the second pads. Both of shape (out_size,)."""
    for axis in (second, first):
        axis.check_held_by(np.int32)
    o, p = np.arange(second.out_size)[:, None], np.arange(second.taps)
    at = o * second.stride + p * second.rhs_dilation - second.lo  # (outputs, taps2)
    u = at // second.lhs_dilation
    on_grid = at % second.lhs_dilation == 0
    at = u[..., None] * first.stride + np.arange(first.taps) * first.rhs_dilation - first.on_padded.lo
    t = at // first.lhs_dilation  # (outputs, taps2, taps1)
    reads = ((at % first.lhs_dilation == 0) & (t >= 0) & (t < first.on_padded.size)).any(-1) & on_grid
    outside = (u < 0) | (u >= first.out_size)
    return reads.any(-1), (reads & outside).any(-1)


def _regroup(kernel: jax.Array, groups: int, fewer: int) -> jax.Array:
    """A canonical kernel of ``groups`` groups as [taps..., in, group, out] of ``fewer``, zeros between merged
    ones."""
    taps, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    merged = groups // fewer
    # (taps..., merged, in, fewer, merged, out): 0 off the diagonal of the two merged axes
    blocks = kernel.reshape(*taps, 1, inputs, fewer, merged, outputs // groups)
    eye = jnp.eye(merged, dtype=kernel.dtype).reshape(merged, 1, 1, merged, 1)
    eye = jnp.expand_dims(eye, range(len(taps)))
    blocks = jnp.where(eye != 0, blocks, jnp.zeros((), kernel.dtype))
    return blocks.reshape(*taps, merged * inputs, fewer, outputs // fewer)

"""The transpose of a convolution, and gradients between inputs, outputs, kernels and matrices.

One trilinear form T[output, input, kernel entry] carries a convolution. It has three matrix views: M(k)
(outputs by inputs), the kernel matrix X(x) (outputs by kernel entries), and the linear map L from
kernels to matrices. This file turns each of them around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxconv_fc.apply import kernel_product, turned_kernel
from jaxconv_fc.axis import Axis
from jaxconv_fc.dense import entries, flat_index, matrix_rows
from jaxconv_fc.numerics import host_unit_scale, largest_part, root, scale_exponent, squares, to_unit_scale
from jaxconv_fc.sharding import program
from jaxconv_fc.spec import ConvSpec, as_array, as_operand, check_dense, conv_spec


def transpose(spec: ConvSpec, kernel: Any) -> tuple[ConvSpec, jax.Array]:
    """The convolution whose matrix is ``as_matrix(spec, kernel).T``.

    Per axis, strides and input dilation change places and the padding becomes
    ``k_d - 1 - lo`` low, ``k_d - 1 - hi + remainder`` high; the kernel is turned around,
    ``K'[g*(C/G) + i, o', p] = K[g*(O/G) + o', i, k-1-p]`` (docs/maths.md, section 2). Sizes come back
    exactly, whatever a stride left unused. Transposing twice gives ``spec.canonical`` and the kernel. For M^H
    conjugate the new kernel.

    A batch group comes back as a feature group whose channels are (batch entry, channel), which is a
    convolution where the layout of the input keeps the batch directly before the channels.

    Args:
      spec: a zeros-mode geometry.
      kernel: array of shape ``spec.rhs_shape``.

    Returns:
      ``(spec, kernel)`` of the transposed convolution, in layouts exchanged accordingly.

    Raises:
      ValueError: a boundary mode, or batch groups in another layout: M^T is no single convolution then,
        and :func:`apply_transpose` gives its products.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 2), (2,), "VALID")
    >>> turned, kernel = fc.transpose(spec, jnp.array([[[1, 2]]]))
    >>> turned.lhs_dilation, turned.padding
    ((2,), ((1, 2),))
    >>> bool((fc.as_matrix(turned, kernel) == fc.as_matrix(spec, jnp.array([[[1, 2]]])).T).all())
    True
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    if spec.padding_mode != "zeros":
        raise ValueError(
            f"transpose: M^T of padding_mode={spec.padding_mode!r} folds copies of the input back and is no "
            "convolution. Use apply_transpose, which is exact there, or as_matrix(...).T."
        )
    plain = spec.canonical
    if plain.batch_group_count > 1:
        raise ValueError(
            f"transpose: with batch_group_count={spec.batch_group_count} the input layout "
            f"lhs_spec={spec.dimension_numbers.lhs_spec} must have the batch directly before the channels. "
            "Use apply_transpose, which is exact in every layout."
        )
    axes = [a.transpose() for a in plain.axes]
    lhs_spec, rhs_spec, out_spec = plain.dimension_numbers
    taps = {i: a.taps for i, a in zip(rhs_spec[2:], axes, strict=True)}
    channels = {rhs_spec[0]: plain.in_channels, rhs_spec[1]: plain.out_channels // plain.groups}
    sizes = {out_spec[0]: plain.lhs_shape[lhs_spec[0]], out_spec[1]: plain.out_channels}
    sizes |= {i: a.size for i, a in zip(out_spec[2:], axes, strict=True)}
    turned = replace(
        plain,
        lhs_shape=tuple(sizes[i] for i in range(len(sizes))),
        rhs_shape=tuple((taps | channels)[i] for i in range(len(rhs_spec))),
        window_strides=tuple(a.stride for a in axes),
        lhs_dilation=tuple(a.lhs_dilation for a in axes),
        padding=tuple((a.lo, a.hi) for a in axes),
        dimension_numbers=lax.ConvDimensionNumbers(out_spec, rhs_spec, lhs_spec),
    )
    return turned, _transposed_kernel(spec, turned, kernel)


@program
def _transposed_kernel(spec: ConvSpec, turned: ConvSpec, kernel: jax.Array) -> jax.Array:
    return jnp.transpose(turned_kernel(spec, kernel), np.argsort(turned.kernel_order).tolist())


def kernel_matrix(spec: ConvSpec, x: Any) -> jax.Array:
    """The matrix X of the convolution as a function of its kernel (im2col).

    ``X @ kernel.ravel() == as_matrix(spec, kernel) @ x.ravel()``: the Jacobian of the output with respect
    to the kernel, ``X[(d, o), (d, i, p)] = x[c(d, i), t(o, p)]``. Linear in x.

    Args:
      spec: the geometry.
      x: array of shape ``spec.in_shape``.

    Returns:
      Array of shape ``(spec.out_size, kernel size)``; kernel entries in the row-major order of
      ``spec.rhs_shape``.

    Raises:
      TypeError: x is not an array.  ValueError: another shape, or X is beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.kernel_matrix(spec, jnp.array([[1, 2, 3, 4]])))
    [[1 2]
     [2 3]
     [3 4]]
    """
    x = as_operand("x", x, spec, "in_shape")
    check_dense("kernel_matrix", spec, (spec.out_size, math.prod(spec.rhs_shape)), x.dtype, "kernel_vjp")
    return _kernel_matrix(spec, x)


@program
def _kernel_matrix(spec: ConvSpec, x: jax.Array) -> jax.Array:
    dims, rows, columns, taps = entries(spec)
    matrix = jnp.zeros((spec.out_size, math.prod(spec.rhs_shape)), x.dtype)
    if not matrix.size or not x.size:
        return matrix
    values = x.ravel().at[columns].get(mode="fill", fill_value=0)
    rows, taps, values = (jnp.broadcast_to(v, dims) for v in (rows, taps, values))
    return matrix.at[rows, taps].set(values, unique_indices=True)


def kernel_vjp(spec: ConvSpec, x: Any, y_bar: Any, *, precision: Any = None) -> jax.Array:
    """``X(x)^T y_bar``: the gradient with respect to the kernel, itself a convolution.

    ``kernel_bar[d, i, p] = sum_o y_bar[d, o] * x[c(d, i), t(o, p)]``. The plain transpose for complex
    numbers. Right where ``jax.vjp`` of lax on CPU is not, and not slowed down by groups. Per-example
    gradients by ``jax.vmap``.

    Args:
      spec: the geometry.
      x: array of shape ``spec.in_shape``.
      y_bar: array of shape ``spec.out_shape`` and the dtype of x.
      precision: as in :func:`apply`.

    Returns:
      Array of shape ``spec.rhs_shape``.

    Raises:
      TypeError: dtypes differ, or are bool.  ValueError: a shape is not the spec's.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.kernel_vjp(spec, jnp.array([[1, 2, 3, 4]]), jnp.array([[1, 0, 10]])))
    [[[31 42]]]
    """
    return kernel_product(spec, x, y_bar, precision)


def matrix_vjp(spec: ConvSpec, matrix_bar: Any) -> jax.Array:
    """``L^T``: the kernel cotangent of a cotangent of M, the adjoint of :func:`as_matrix`.

    ``kernel_bar[d, i, p] = sum_o matrix_bar[(d, o), (c(d, i), t(o, p))]``. Reads the stored entries only,
    and makes no second matrix. Of ``y_bar x^T`` it is :func:`kernel_vjp`.

    Args:
      spec: the geometry.
      matrix_bar: array of shape ``spec.shape``.

    Returns:
      Array of shape ``spec.rhs_shape``.

    Raises:
      TypeError: not an array.  ValueError: another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.matrix_vjp(spec, jnp.ones((3, 4))))
    [[[3. 3.]]]
    """
    return _matrix_vjp(spec, as_operand("matrix_bar", matrix_bar, spec, "shape"))


@program
def _matrix_vjp(spec: ConvSpec, matrix_bar: jax.Array) -> jax.Array:
    return _sums_over_outputs(spec, matrix_bar, lambda read: read)


def _sums_over_outputs(
    spec: ConvSpec, matrix_bar: jax.Array, of: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Per kernel entry the sum of ``of`` the entries of the matrix that it fills."""
    dims, rows, columns, _ = entries(spec)
    kernel_dims = (*dims[:2], *dims[2 + len(spec.axes) :])
    if not matrix_bar.size or 0 in dims:
        return jnp.zeros(spec.rhs_shape, matrix_bar.dtype)
    places = jnp.broadcast_to(flat_index(spec, spec.shape, rows, columns), dims)
    read = of(matrix_bar.ravel().at[places].get(mode="fill", fill_value=0))
    kernel = read.sum(tuple(range(2, 2 + len(spec.axes))), dtype=matrix_bar.dtype).reshape(kernel_dims)
    return jnp.transpose(kernel, np.argsort(spec.dimension_numbers.rhs_spec).tolist())


def kernel_from_matrix(spec: ConvSpec, matrix: Any) -> jax.Array:
    """The kernel whose matrix is nearest to ``matrix`` in the Frobenius norm: ``(G^+ x ...) L^T(A)``.

    The orthogonal projection onto the convolutions of this geometry, through the Gram matrix
    ``G_a[p, p'] = #{o : t(o, p) = t(o, p')}`` of each axis (docs/maths.md, section 3). Exact on the matrix of
    a convolution. A tap that never reads an input cannot be seen in any matrix: it comes back as 0, the
    solution of least norm.

    Args:
      spec: the geometry.
      matrix: array of shape ``spec.shape``; integers are taken as floats.

    Returns:
      Array of shape ``spec.rhs_shape``.

    Raises:
      TypeError: not an array.  ValueError: another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.kernel_from_matrix(spec, fc.as_matrix(spec, jnp.array([[[1., 2.]]]))))
    [[[1. 2.]]]
    """
    matrix = as_operand("matrix", matrix, spec, "shape")
    return _nearest_kernel(spec, _inexact(matrix))


@program
def _nearest_kernel(spec: ConvSpec, matrix: jax.Array) -> jax.Array:
    return _projected(spec, _matrix_vjp(spec, matrix))


def _projected(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """``(G^+ x ...)`` of the sums over outputs."""
    for i, axis in zip(spec.dimension_numbers.rhs_spec[2:], spec.axes, strict=True):
        kernel = _solve_gram(axis, kernel, i)
    return kernel


def _inexact(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.inexact):
        return array
    return array.astype(jax.dtypes.canonicalize_dtype(np.float64))


def _solve_gram(axis: Axis, kernel: jax.Array, i: int) -> jax.Array:
    """The pseudo-inverse of the Gram matrix of one axis, applied along axis ``i`` of the kernel."""
    if not axis.collides:  # diagonal: every tap has entries of its own
        counts = jnp.asarray(axis.tap_counts, kernel.real.dtype)
        counts = jnp.expand_dims(counts, [j for j in range(kernel.ndim) if j != i])
        return jnp.where(counts > 0, kernel / jnp.maximum(counts, 1).astype(kernel.dtype), 0)
    inverse = np.linalg.pinv(axis.gram.astype(float), rcond=1e-12, hermitian=True)
    product = jnp.tensordot(jnp.asarray(inverse, kernel.dtype), kernel, axes=(1, i), precision="highest")
    return jnp.moveaxis(product, 0, i)


def conv_distance(spec: ConvSpec, matrix: Any) -> jax.Array:
    """``||A - L K*|| / ||A||`` (Frobenius): how far A is from the convolutions of this geometry.

    K* is :func:`kernel_from_matrix`. 0 for a convolution (and for A = 0), 1 for a matrix orthogonal to all
    of them, NaN where A holds NaN or Inf. Independent of the scale of A. The difference is summed row by
    row, so no second matrix is made.

    Args:
      spec: the geometry.
      matrix: array of shape ``spec.shape``; integers are taken as floats.

    Returns:
      Real scalar.

    Raises:
      TypeError: not an array.  ValueError: another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> float(fc.conv_distance(spec, jnp.zeros((3, 4)).at[0, 3].set(1.)))
    1.0
    """
    matrix = _inexact(as_operand("matrix", matrix, spec, "shape"))
    if not matrix.size:
        return jnp.zeros((), matrix.real.dtype)
    return _conv_distance(spec, matrix)


_BLOCK = 2**20  # entries of M that are made at a time


@program
def _conv_distance(spec: ConvSpec, matrix: jax.Array) -> jax.Array:
    size = min(spec.out_size, max(1, _BLOCK // spec.in_size))
    firsts = lax.iota(spec.index_dtype, -(-spec.out_size // size)) * size

    def block(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(rows, entries)``; the last block overlaps the one before it, with zeros."""
        start = jnp.minimum(first, spec.out_size - size)
        rows = start + lax.iota(start.dtype, size)
        entries = lax.dynamic_slice_in_dim(matrix, start, size)
        return rows, jnp.where((rows >= first)[:, None], entries, jnp.zeros((), matrix.dtype))

    # At unit scale, where not even the smallest difference has a square that vanishes.
    exponent = scale_exponent(lax.map(lambda first: largest_part(block(first)[1]), firsts))
    unit = partial(to_unit_scale, exponent=exponent)
    kernel = _projected(spec, _sums_over_outputs(spec, matrix, unit))

    def sums(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, entries = block(first)
        entries, nearest = unit(entries), matrix_rows(spec, kernel, rows)
        difference = jnp.where((rows >= first)[:, None], entries - nearest, jnp.zeros((), matrix.dtype))
        return _sum_of_squares(difference), _sum_of_squares(entries)

    off, total = (s.sum() for s in lax.map(sums, firsts))
    # Only a matrix of zeros has no length, and is a convolution.
    return root(off / jnp.where(total == 0, jnp.ones_like(total), total)).astype(matrix.real.dtype)


def _sum_of_squares(values: jax.Array) -> jax.Array:
    """At least in float32, so that sums of many do not overflow half precision."""
    return squares(values.astype(np.promote_types(values.dtype, np.float32))).sum()


# -- one convolution for two -------------------------------------------------------------------


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
    return jnp.transpose(kernel, np.argsort(spec.kernel_order).tolist())


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
    inner = first.inner
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
    j = u[..., None] * first.stride + np.arange(first.taps) * first.rhs_dilation - first.inner.lo
    t = j // first.lhs_dilation
    reads = ((j % first.lhs_dilation == 0) & (t >= 0) & (t < first.inner.size)).any(-1) & on_grid
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
        iotas = [lax.broadcasted_iota(jnp.int32, _only(i, products.shape[: 2 * d]), i) for i in range(2 * d)]
        steps = [_tap_steps(*pair)[:2] for pair in pairs]
        meet = tuple(iotas[a] * step1 + iotas[d + a] * step2 for a, (step1, step2) in enumerate(steps))
        products = jnp.zeros((*(a.taps for a in axes), *channels), products.dtype).at[meet].add(products)
    return products.reshape(*products.shape[:d], channels[0], channels[1] * channels[2])


def _only(i: int, shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` with every other extent set to 1."""
    return tuple(n if j == i else 1 for j, n in enumerate(shape))


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


# -- the convolution in a matrix ---------------------------------------------------------------


def detect_conv(
    matrix: Any, in_shape: Sequence[int], out_shape: Sequence[int], *, tol: float | None = None
) -> tuple[ConvSpec, jax.Array] | None:
    """The zero-padded convolution that a matrix secretly is, or None.

    :func:`nearest_conv`, where its distance is at most ``tol``: use that function to learn how far a
    matrix that is none is from being one.

    Args:
      matrix: concrete array of shape ``(prod(out_shape), prod(in_shape))``.
      in_shape, out_shape: ``(channels, spatial...)`` of an input and an output.
      tol: largest relative distance, and largest relative difference of entries that count as equal;
        by default a small multiple of the rounding of the dtype.

    Returns:
      ``(spec, kernel)`` with ``as_matrix(spec, kernel)`` equal to the matrix within ``tol``, or None.

    Raises:
      TypeError: the matrix is not an array, or traced.
      ValueError: it has another shape, or holds NaN or Inf, which say nothing about a geometry.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> matrix = jnp.array([[1., 2., 0., 0.], [0., 0., 1., 2.]])
    >>> spec, kernel = fc.detect_conv(matrix, (1, 4), (1, 2))
    >>> print(spec.window_strides, kernel)
    (2,) [[[1. 2.]]]
    >>> fc.detect_conv(jnp.ones((3, 4)).at[0, 0].set(2.), (1, 4), (1, 3)) is None
    True
    """
    host, tol = _host_matrix(matrix, in_shape, out_shape, tol)
    views = _axis_views(host, in_shape, out_shape)
    axes = [_detect_axis(view, tol) for view in views]
    # What is not constant along one axis is no convolution, and need not be projected to see it.
    if any(_axis_distance(view, axis) > 2 * tol for view, axis in zip(views, axes, strict=True)):
        return None
    spec, kernel, distance = _nearest(host, in_shape, out_shape, axes, tol)
    return (spec, kernel) if distance <= tol else None


def nearest_conv(
    matrix: Any, in_shape: Sequence[int], out_shape: Sequence[int], *, tol: float | None = None
) -> tuple[ConvSpec, jax.Array, float]:
    """``(spec, kernel, distance)``: a geometry that suits a matrix, its nearest kernel, how far off it is.

    In zeros mode the entries of M depend, per axis, on ``q = t*l - o*s`` only. Of the pairs (s, l)
    without common factor for which that holds, the one with the fewest taps is kept (the one that
    violates it least, where it holds for none); the gaps between the values of q with nonzero entries
    give the dilation, their range padding and taps (docs/maths.md, section 3). Groups are the finest block
    diagonal.

    What the matrix cannot tell is chosen smallest: taps that are 0 at the border of the kernel or never
    meet an input are left off. A sparse matrix can be a convolution in which no two outputs share a tap (a
    diagonal one is, of stride n): the size of the kernel tells.

    Args, Raises:
      As :func:`detect_conv`. The matrix is inspected on the host: it cannot be traced.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec, kernel, distance = fc.nearest_conv(jnp.ones((3, 4)).at[0, 0].set(2.), (1, 4), (1, 3))
    >>> round(distance, 3)
    0.211
    """
    host, tol = _host_matrix(matrix, in_shape, out_shape, tol)
    axes = [_detect_axis(view, tol) for view in _axis_views(host, in_shape, out_shape)]
    return _nearest(host, in_shape, out_shape, axes, tol)


def _host_matrix(
    matrix: Any, in_shape: Sequence[int], out_shape: Sequence[int], tol: float | None
) -> tuple[np.ndarray, float]:
    if len(in_shape) != len(out_shape) or not in_shape:
        raise ValueError(
            f"in_shape and out_shape must be (channels, spatial...) of the same rank, got {tuple(in_shape)} "
            f"and {tuple(out_shape)}. Write a missing spatial axis as 1."
        )
    if isinstance(matrix, Tracer):
        raise TypeError(
            "matrix must be concrete: its values decide the geometry. Call outside of jit and vmap."
        )
    array, sizes = _inexact(as_array("matrix", matrix)), (math.prod(out_shape), math.prod(in_shape))
    if array.shape != sizes:
        raise ValueError(
            f"matrix must have the shape {sizes}, the sizes of out_shape and in_shape, got {array.shape}."
        )
    finite = np.isfinite(np.asarray(array))
    if not finite.all():
        raise ValueError(
            f"matrix must hold finite numbers, got {finite.size - finite.sum()} NaN or Inf: they say nothing "
            "about the geometry. Replace them, e.g. by jnp.nan_to_num(matrix)."
        )
    return np.asarray(array), 64 * float(jnp.finfo(array.dtype).eps) if tol is None else tol


def _tensor(matrix: np.ndarray, in_shape: Sequence[int], out_shape: Sequence[int]) -> np.ndarray:
    wide = matrix.astype(np.complex128 if matrix.dtype.kind == "c" else np.float64)
    return host_unit_scale(wide).reshape(*out_shape, *in_shape)


def _axis_views(matrix: np.ndarray, in_shape: Sequence[int], out_shape: Sequence[int]) -> list[np.ndarray]:
    """Per spatial axis, M as (outputs, inputs, everything else)."""
    tensor, d = _tensor(matrix, in_shape, out_shape), len(in_shape) - 1
    return [np.moveaxis(tensor, (1 + a, 2 + d + a), (0, 1)) for a in range(d)]


def _nearest(
    matrix: np.ndarray, in_shape: Sequence[int], out_shape: Sequence[int], axes: Sequence[Axis], tol: float
) -> tuple[ConvSpec, jax.Array, float]:
    groups = _detect_groups(np.moveaxis(_tensor(matrix, in_shape, out_shape), len(in_shape), 1), tol)
    spec = conv_spec(
        (1, *in_shape),
        (out_shape[0], in_shape[0] // groups, *(a.taps for a in axes)),
        [a.stride for a in axes],
        [(a.lo, a.hi) for a in axes],
        [a.lhs_dilation for a in axes],
        [a.rhs_dilation for a in axes],
        feature_group_count=groups,
    )
    array = jnp.asarray(matrix)
    return spec, kernel_from_matrix(spec, array), float(conv_distance(spec, array))


def _detect_axis(tensor: np.ndarray, tol: float) -> Axis:
    """The relation of one axis from M as (outputs, inputs, everything else)."""
    m, n = tensor.shape[:2]
    weights = np.random.default_rng(0).standard_normal((math.prod(tensor.shape[2:]), 8))
    sketch = tensor.reshape(m, n, -1) @ weights  # equal entries have equal sketches, others surely not
    scale = np.abs(sketch).max(initial=0)
    used = np.abs(sketch).max(-1, initial=0) > tol * scale
    return _fitting(used, *_most_constant(sketch, 8 * tol * scale, *_step_pairs(used)))


def _step_pairs(used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(s, l)``: the pairs of steps that a matrix with these used entries may have: by the number of taps
    that they need, then by s + l, then by s.

    Taps are ``(max q - min q) / r + 1`` over the used ``q = t*l - o*s``. The corners of their convex hull
    tell the range. The differences of used positions are a lattice, of which two vectors tell r, the
    greatest common divisor of the differences of q.
    """
    m, n = used.shape
    s, l = (v.ravel() for v in np.meshgrid(np.arange(1, max(n, 1) + 1), np.arange(1, max(m, 1) + 1)))
    coprime = np.gcd(s, l) == 1
    s, l = s[coprime], l[coprime]
    corners, basis = _corners(used), _difference_basis(used)
    q = [t * l - o * s for o, t in corners] or [np.zeros_like(s)]
    low, high = reduce(np.minimum, q), reduce(np.maximum, q)
    r = reduce(np.gcd, [np.abs(t * l - o * s) for o, t in basis], np.zeros_like(s))
    taps = (high - low) // np.maximum(r, 1) + 1
    # Where no tap is shared, anything is a convolution: accept it only without an unused tap.
    shares = ((s < n) & (l < m)) | (min(m, n) <= 1) | ((taps <= used.sum()) & (used.sum() < used.size))
    s, l, taps = s[shares], l[shares], taps[shares]
    order = np.lexsort((s, s + l, taps))
    return s[order], l[order]


def _corners(used: np.ndarray) -> list[tuple[int, int]]:
    """Used positions (o, t) among which every linear function of o and t has its extremes.

    They are on the convex hull, so first or last of their row. Of those, a chain keeps the ones where it
    turns one way (Andrew 1979).
    """
    rows = np.flatnonzero(used.any(1)).tolist()
    corners = []
    for side, turn in ((used.argmax(1), 1), (used.shape[1] - 1 - used[:, ::-1].argmax(1), -1)):
        chain: list[tuple[int, int]] = []
        for o, t in zip(rows, side[rows].tolist(), strict=True):
            while len(chain) > 1 and turn * _turns(chain[-2], chain[-1], (o, t)) <= 0:
                chain.pop()
            chain.append((o, t))
        corners += chain
    return corners


def _turns(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> int:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _difference_basis(used: np.ndarray) -> list[tuple[int, int]]:
    """Two vectors (o, t) whose whole multiples add up to the differences of all used positions.

    The first has the greatest common divisor of all o, by Euclid's algorithm; what is left of every
    difference has o = 0.
    """
    o, t = (v - v[:1] for v in np.nonzero(used))
    divisor, along = 0, 0
    for step, move in np.unique(np.stack([o, t], 1)[np.searchsorted(o, np.unique(o))], axis=0).tolist():
        a, b = (divisor, along), (step, move)
        while b[0]:
            quotient = a[0] // b[0]
            a, b = b, (a[0] - quotient * b[0], a[1] - quotient * b[1])
        divisor, along = a
    rest = t - o // divisor * along if divisor else t
    return [(divisor, along), (0, int(np.gcd.reduce(rest, initial=0)))]


def _most_constant(sketch: np.ndarray, slack: float, s: np.ndarray, l: np.ndarray) -> tuple[int, int]:
    """The first of the pairs (s, l) for which entries differ least from those l outputs and s inputs on.

    Differences up to ``slack`` count as none. A pair is compared in full only when nothing known speaks
    against it more than against the others. The entry where it fails most is then compared for all pairs
    at once, which spares most of them the full comparison.
    """
    least = np.zeros(sketch.shape[:2])  # [l - 1, s - 1]: the error of a pair is this or more
    exact = np.zeros(sketch.shape[:2], bool)
    while True:
        best = int(np.argmin(np.maximum(least[l - 1, s - 1] - slack, 0)))
        step, dilation = int(s[best]), int(l[best])
        if exact[dilation - 1, step - 1]:
            return step, dilation
        there = sketch[dilation:, step:]
        here = sketch[: there.shape[0], : there.shape[1]]
        error = np.abs(there - here).max(-1, initial=0)
        exact[dilation - 1, step - 1] = True
        if error.size:
            least[dilation - 1, step - 1] = error.max()
            o, t = (int(v) for v in np.unravel_index(np.argmax(error), error.shape))
            size_here, size_there = (np.abs(v[o, t]).max() for v in (here, there))
            at = (o, t) if size_here >= size_there else (o + dilation, t + step)
            _compare(sketch, least, *at)


def _compare(sketch: np.ndarray, least: np.ndarray, o: int, t: int) -> None:
    """Raise ``least`` to how much one entry differs from those any l and s further on, and before it."""
    for there, here in ((sketch[o:, t:], sketch[o, t]), (sketch[o::-1, t::-1], sketch[o, t])):
        error = np.abs(there[1:, 1:] - here).max(-1, initial=0)
        part = least[: error.shape[0], : error.shape[1]]
        np.maximum(part, error, out=part)


def _axis_distance(tensor: np.ndarray, axis: Axis) -> float:
    """How far M as (outputs, inputs, everything else) is from depending on ``q = t*l - o*s`` alone, relative
    to its norm: no convolution with this axis is nearer."""
    m, n = tensor.shape[:2]
    o, t = np.indices((m, n)).reshape(2, -1)
    q = t * axis.lhs_dilation - o * axis.stride
    order = np.argsort(q, kind="stable")
    starts = np.flatnonzero(np.diff(q[order], prepend=q.min(initial=0) - 1))
    size = np.abs(tensor).max(initial=0)
    if not size:
        return 0.0
    values = tensor.reshape(m * n, -1)[order] / size
    counts = np.diff(np.append(starts, m * n))
    means = np.add.reduceat(values, starts, axis=0) / counts[:, None]
    return float(np.linalg.norm(values - np.repeat(means, counts, axis=0)) / np.linalg.norm(values))


def _fitting(used: np.ndarray, s: int, l: int) -> Axis:
    """The axis of stride s and input dilation l whose taps cover the used (output, input) pairs."""
    m, n = used.shape
    o, t = np.nonzero(used)
    q = np.unique(t * l - o * s)
    if not q.size:
        return Axis(n, 1, s, lhs_dilation=l).ending_at(m)
    r = max(1, int(np.gcd.reduce(np.diff(q), initial=0)))
    return Axis(n, int(q[-1] - q[0]) // r + 1, s, -int(q[0]), lhs_dilation=l, rhs_dilation=r).ending_at(m)


def _detect_groups(tensor: np.ndarray, tol: float) -> int:
    """The largest number of diagonal blocks of M as (out channels, in channels, ...)."""
    size = np.abs(tensor).max(tuple(range(2, tensor.ndim)), initial=0)
    used = size > tol * size.max(initial=0)
    outs, ins = (np.arange(n) for n in used.shape)
    common = math.gcd(*used.shape)
    for groups in (g for g in range(common, 1, -1) if common % g == 0):
        same = (outs // (outs.size // groups))[:, None] == ins // (ins.size // groups)
        if not (used & ~same).any():
            return groups
    return 1

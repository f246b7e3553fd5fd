"""What GPU and TPU share: the convolutions that lax itself derives, and an SVD by eigenvalues.

These platforms have input dilation, window dilation and groups of their own, so the products leave them to
``lax.conv_general_dilated``. Five things are done around it. Negative padding is cropped. An axis that XLA
would take for one of groups gets one output more, which is dropped. Axes beyond the third are unfolded into
channels: cuDNN knows three. The kernel gradient of an input-dilated convolution is split by the residues of
the taps, and that of a dilated one by the residues of the outputs (docs/maths.md, section 8): lax is slow at
both on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.products import forms
from jaxconv_fc.products.forms import (
    Call,
    Decomposition,
    Forms,
    among_zeros,
    by_residues,
    complex_product,
    own_positions,
    windows,
)

MOST_AXES = 3  # spatial axes of one convolution on a GPU
MOST_COPIES = 8  # in the padding of an axis, that are added one by one, in one loop


class Form(NamedTuple):
    """Where the dimensions of a correlation stand. All that are not named are spatial, in order.

    With groups, one dimension of ``lhs`` is a product whose first factor is the group.
    """

    lhs: tuple[int, int]  # batch, contracted
    rhs: tuple[int, int]  # features, contracted
    out: tuple[int, int]  # batch, features


IMAGES = Form((0, -1), (-1, -2), (0, -1))  # [n, t, g*i] [p, i, g*e] -> [n, o, g*e]
KERNELS = Form((-1, 0), (-1, 0), (-2, -1))  # [n, t, g*i] [n, o, g*e] -> [p, i, g*e]


def fold(axis: Axis, x: jax.Array, dim: int) -> jax.Array:
    """The transpose of padding dimension ``dim`` with copies: each is added to its source.

    A few copies are added without a scatter. A scatter is slow on TPU, and has no fixed order on GPU.
    """
    if axis.padded_size - len(axis.own) > MOST_COPIES:
        return forms.fold(axis, x, dim)
    copies = [*range(axis.own.start), *range(axis.own.stop, axis.padded_size)]
    return sum(
        (among_zeros(axis, x, dim, range(j, j + 1), axis.source(j)) for j in copies),
        own_positions(axis, x, dim),
    )


def correlate(axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, call: Call) -> jax.Array:
    """Zeros-mode correlation of any geometry: [n, t, g*i] [p, i, g*e] -> [n, o, g*e]."""
    return _correlate(IMAGES, axes, lhs, rhs, call)


def kernel_gradient(axes: Sequence[Axis], x: jax.Array, y: jax.Array, call: Call) -> jax.Array:
    """Correlation of inputs with cotangents: [n, t, g*i] [n, o, g*e] -> [p, i, g*e].

    Input dilation is split by the residues of the taps, strides by those of the outputs.
    """

    def window(inner: Sequence[Axis], y: jax.Array) -> jax.Array:
        """[fewer outputs..., n, g*e] -> [i, q..., g*e] with tap ``p = c + L*q``."""
        y = jnp.moveaxis(y, -2, 0)  # [n, o, g*e]
        lhs, unstrided = x, list(inner)
        for a, axis in enumerate(inner):
            if axis.stride > 1:
                unstrided[a], lhs, y = _without_stride(a, axis, lhs, y)
        kernel = _correlate(KERNELS, unstrided, lhs, y, call)  # [q, i, g*e]
        return jnp.moveaxis(kernel, -2, 0)

    kernel = by_residues(axes, x.shape[-1] // call.groups, jnp.moveaxis(y, 0, -2), window)  # [i, p, g*e]
    return jnp.moveaxis(kernel, 0, -2)


def _without_stride(a: int, axis: Axis, x: jax.Array, y: jax.Array) -> tuple[Axis, jax.Array, jax.Array]:
    """The same kernel gradient with stride 1 on axis ``a``: the residues of its outputs become examples.

    The axis correlates ``x`` with ``y``, so its taps are the outputs of the convolution.
    """
    # Output o = e + L*q of the convolution reads input  r*v + e*s - lo  through tap p, where v = q*(s/g) + p
    # (docs/maths.md, section 8). Here its dilation is the stride, and its stride the dilation.
    r, s = axis.stride, axis.rhs_dilation
    g = math.gcd(r, s)
    residues = min(r // g, axis.taps)
    rounds = -(-axis.taps // residues)
    inner = Axis(axis.out_size + (rounds - 1) * (s // g), rounds, rhs_dilation=s // g)
    reads = Axis(axis.size, residues, r, axis.lo, rhs_dilation=s).ending_at(inner.size)
    x = _merged(windows(x, 1 + a, reads), 2 + a, 0)  # [n, t, ...] -> [n, v, e, ...] -> [n*e, v, ...]
    # Outputs that do not exist have cotangents of 0. They read inputs, so an Inf there makes 0 * Inf = NaN.
    spare = rounds * residues - axis.taps
    y = lax.pad(y, jnp.zeros((), y.dtype), [(0, spare * (i == 1 + a), 0) for i in range(y.ndim)])
    y = y.reshape(*y.shape[: 1 + a], rounds, residues, *y.shape[2 + a :])  # [n, o, ...] -> [n, q, e, ...]
    return inner, x, _merged(y, 2 + a, 0)  # [n*e, q, ...]


# -- one convolution of at most three axes --------------------------------------------------------


def _correlate(form: Form, axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, call: Call) -> jax.Array:
    """Correlation in one of the two forms. No array is empty."""
    cropped = [axis.rows(0, axis.out_size) for axis in axes]
    unread = [a for a, (_, inputs) in enumerate(cropped) if not inputs]
    if unread or len(axes) > MOST_AXES:
        a = unread[0] if unread else _cheapest_to_unfold(axes)
        return _unfolded(a, form, axes, lhs, rhs, call)
    inner = list(axes)
    for a, (axis, inputs) in enumerate(cropped):
        if min(axes[a].lo, axes[a].hi) < 0:
            inner[a] = axis
            lhs = lax.slice_in_dim(lhs, inputs.start, inputs.stop, axis=_places(form.lhs, lhs.ndim)[2 + a])
    convolve = partial(_convolution if axes else _matrix_product, form, inner, call)
    return complex_product(convolve, lhs, rhs) if jnp.iscomplexobj(lhs) else convolve(lhs, rhs)


def _convolution(form: Form, axes: Sequence[Axis], call: Call, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    spare = [_taken_for_groups(a) for a in axes]
    y = lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides=[a.stride for a in axes],
        padding=[(a.lo, a.hi + a.stride * more) for a, more in zip(axes, spare, strict=True)],
        lhs_dilation=[a.lhs_dilation for a in axes],
        rhs_dilation=[a.rhs_dilation for a in axes],
        dimension_numbers=lax.ConvDimensionNumbers(*(_places(two, lhs.ndim) for two in form)),
        feature_group_count=call.groups if form is IMAGES else 1,
        batch_group_count=call.groups if form is KERNELS else 1,
        precision=call.precision,
    )
    for dim, axis, more in zip(_places(form.out, y.ndim)[2:], axes, spare, strict=True):
        y = lax.slice_in_dim(y, 0, axis.out_size, axis=dim) if more else y
    # XLA on GPU takes a constant factor of a result into the convolution, and rounds it to float32.
    return lax.optimization_barrier(y) if y.dtype == jnp.float64 else y


def _taken_for_groups(axis: Axis) -> bool:
    """Whether XLA aborts on this axis, if another axis has more taps than inputs.

    XLA's algebraic simplifier then exchanges the kernel and the input. An axis without padding that is
    dilated like this looks to it like one of groups, and is left as it is. That is right only with as many
    inputs as taps; with others the shapes disagree, and the process ends.
    """
    groups = axis.lhs_dilation == axis.taps == axis.stride + 1 and axis.rhs_dilation == 1
    return groups and axis.lo == axis.hi == 0 and axis.size != axis.taps


def _matrix_product(form: Form, _: Sequence[Axis], call: Call, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Without spatial axes: [n, g*i] [i, g*e] -> [n, g*e], or [n, g*i] [n, g*e] -> [i, g*e]."""
    lhs, rhs = (v.reshape(v.shape[0], call.groups, -1) for v in (lhs, rhs))
    contracting = ([2 if form is IMAGES else 0], [0])
    y = lax.dot_general(lhs, rhs, (contracting, ([1], [1])), call.precision)  # [g, n, e] or [g, i, e]
    return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1)


def _unfolded(
    a: int, form: Form, axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, call: Call
) -> jax.Array:
    """The same correlation without axis ``a``: its taps become channels, its outputs become examples."""
    axis, others = axes[a], [*axes[:a], *axes[a + 1 :]]
    place = _places(form.lhs, lhs.ndim)[2 + a]
    lhs = _merged(windows(lhs, place, axis), place + 1, form.lhs[1])  # the taps
    lhs = _merged(lhs, place, form.lhs[0])  # the outputs
    rhs = _merged(rhs, _places(form.rhs, rhs.ndim)[2 + a], form.rhs[1])
    y = _correlate(form, others, lhs, rhs, call)
    batch = form.out[0] % y.ndim  # [..., n*o, ...] -> [..., n, o, ...]
    y = y.reshape(*y.shape[:batch], -1, axis.out_size, *y.shape[batch + 1 :])
    return jnp.moveaxis(y, batch + 1, _places(form.out, y.ndim)[2 + a])


def _cheapest_to_unfold(axes: Sequence[Axis]) -> int:
    """The axis that makes an array grow least."""
    growth = [axis.out_size * axis.taps / axis.size for axis in axes]
    return growth.index(min(growth))


# -- dimensions -----------------------------------------------------------------------------------


def _places(two: tuple[int, int], rank: int) -> tuple[int, ...]:
    """The two named dimensions of an array, then the spatial ones."""
    named = [i % rank for i in two]
    return (*named, *(i for i in range(rank) if i not in named))


def _merged(x: jax.Array, dim: int, into: int) -> jax.Array:
    """Dimension ``dim`` as the faster factor of dimension ``into``."""
    first = into % x.ndim - (dim < into % x.ndim)
    x = jnp.moveaxis(x, dim, first + 1)
    return x.reshape(*x.shape[:first], x.shape[first] * x.shape[first + 1], *x.shape[first + 2 :])


# -- singular values ------------------------------------------------------------------------------


def svd(a: jax.Array) -> Decomposition:
    """By the eigenvalues of a Hermitian matrix, for every matrix of a batch:

        H = [[0, A], [A^H, 0]],    H [u; v] = sigma [u; v]  and  H [u; -v] = -sigma [u; -v],

    where ``A v = sigma u``. H has the accuracy of the SVD, ``eps ||A||`` (that of ``A^H A`` is lost below
    ``sqrt(eps) ||A||``). A GPU has no SVD of a batch beyond 32 x 32, and a TPU makes its own of eigenvalues.
    """
    rows, columns = a.shape[-2:]
    k = min(rows, columns)
    finite = jnp.isfinite(a).all((-2, -1), keepdims=True)
    a = jnp.where(finite, a, jnp.zeros((), a.dtype))  # an eigenvalue solver need not stop at NaN
    above = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, columns), (rows, 0)])  # [[0, A], [0, 0]]
    embedded = above + jnp.swapaxes(above, -1, -2).conj()
    vectors, values = lax.linalg.eigh(embedded, symmetrize_input=False)  # values from -s_1 up to s_1
    vectors, values = vectors[..., : -k - 1 : -1], values[..., : -k - 1 : -1]
    values = jnp.where(values <= 0, jnp.zeros_like(values), values)  # what is below 0 is rounding
    # An eigenvector [u; v] of norm 1 has halves of norm 1/sqrt(2).
    vectors = vectors * jnp.asarray(2**0.5, vectors.dtype)
    left, right = vectors[..., :rows, :], jnp.swapaxes(vectors[..., rows:, :], -1, -2).conj()
    nan = jnp.asarray(jnp.nan, values.dtype)
    return Decomposition(
        jnp.where(finite, left, nan.astype(a.dtype)),
        jnp.where(finite[..., 0], values, nan),
        jnp.where(finite, right, nan.astype(a.dtype)),
    )


ACCELERATOR = Forms(
    correlate=correlate,
    kernel_gradient=kernel_gradient,
    fold=fold,
    svd=svd,
    singular_values=lambda a: svd(a).values,
    method=lambda spec, count, dtype: "convolution",
    column_bytes=None,
)

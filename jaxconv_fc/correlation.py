"""From axes to calls of lax on the CPU: correlation of any geometry, reduced to what lax does well there.

``lax.conv_general_dilated`` is called in the one form that is right on every platform and fast on the CPU:
channels last, without input dilation (the outputs are split by residue) and without negative padding (the
input is cropped). Integers take this way on every platform: it multiplies them by ``dot_general``.
:mod:`jaxconv_fc.native` has the forms for GPU and TPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.axis import Axis, Phase


def correlate(axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, groups: int, precision: Any) -> jax.Array:
    """Zeros-mode correlation of any geometry: [n, in..., c] x [taps..., c/groups, d] -> [n, out..., d]."""
    shape = (lhs.shape[0], *(a.out_size for a in axes), rhs.shape[-1])
    if not lhs.size or not rhs.size or 0 in shape:
        return jnp.zeros(shape, lhs.dtype)
    window = partial(_window, lhs=lhs, groups=groups, precision=precision)
    return by_residues(axes, lhs.shape[0], rhs, window)


def kernel_gradient(
    axes: Sequence[Axis], x: jax.Array, y: jax.Array, groups: int, precision: Any
) -> jax.Array:
    """Correlation of inputs with cotangents, groups as channels: [n, t, g*i] [n, o, g*e] -> [p, i, g*e].

    The channels ``i`` of a group take the place of the batch, and the examples ``n`` that of the channels.
    """
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)  # [n, t, g, i]
    x = jnp.moveaxis(x, (0, -1), (-1, 0))  # [i, t, g, n]
    x = x.reshape(*x.shape[:-2], -1)  # [i, t, g*n]
    y = jnp.moveaxis(y, 0, -2)  # [n, o, g*e] -> [o, n, g*e]
    kernel = correlate(axes, x, y, groups, precision)  # [i, t, g*n] [o, n, g*e] -> [i, p, g*e]
    return jnp.moveaxis(kernel, 0, -2)


def by_residues(
    axes: Sequence[Axis], batch: int, rhs: jax.Array, window: Callable[[Sequence[Axis], jax.Array], jax.Array]
) -> jax.Array:
    """[n, out..., d] of a batch of this size, by correlations without input dilation.

    ``window(inner, kernel)`` is such a correlation: it makes [n, q..., d*residues] with a kernel
    [fewer taps..., c, d*residues]. Outputs of one residue per axis form an ordinary convolution
    (docs/maths.md, section 8). Residues with the same relation differ only in their taps, so they are
    computed as more output channels.
    """
    dims, features = len(axes), rhs.shape[-1]
    phases = [axis.polyphase() for axis in axes]
    families = [_families(p) for p in phases]

    def block(choice: Sequence[list[int]]) -> jax.Array:
        """[n, q..., d, residues...] of one family of residues per axis: output ``c + L*q`` for residue c."""
        inner = [phases[i][family[0]].axis for i, family in enumerate(choice)]
        result = (batch, *(a.out_size for a in inner), features, *map(len, choice))
        if not all(a.taps for a in inner):  # outputs that fall between all inputs
            return jnp.zeros(result, rhs.dtype)
        kernel = rhs
        for i, family in enumerate(choice):  # [taps..., c, d] -> [fewer taps..., c, d, residues...]
            kernel = jnp.stack([_every(kernel, i, phases[i][c].taps) for c in family], axis=-1)
        kernel = kernel.reshape(*kernel.shape[: dims + 1], -1)  # [taps..., c, d * residues]
        return window(inner, kernel).reshape(result)

    def assemble(choice: tuple[list[int], ...]) -> jax.Array:
        """[n, q..., d, residues...]: those of ``choice`` on the first axes, all in order on the others."""
        if len(choice) == dims:
            return block(choice)
        i = len(choice)
        parts = [assemble((*choice, family)) for family in families[i]]
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(list(itertools.chain.from_iterable(families[i])))
        return jnp.take(jnp.concatenate(parts, axis=2 + dims + i), order, axis=2 + dims + i)

    # [n, q1, q2, ..., d, c1, c2, ...] -> [n, q1, c1, q2, c2, ..., d] -> [n, out1, out2, ..., d]: o = q*L + c
    y = assemble(())
    beside = [axis for i in range(dims) for axis in (1 + i, 2 + dims + i)]
    y = jnp.transpose(y, (0, *beside, 1 + dims))
    y = y.reshape(batch, *(p[0].axis.out_size * len(p) for p in phases), features)
    return y[(slice(None), *(slice(a.out_size) for a in axes))]  # without the spare outputs


def _families(phases: Sequence[Phase]) -> list[list[int]]:
    """Residues grouped by equal relation. Each family is ascending, and so are their first residues."""
    families: dict[Axis, list[int]] = {}
    for c, phase in enumerate(phases):
        families.setdefault(phase.axis, []).append(c)
    return list(families.values())


def _every(kernel: jax.Array, axis: int, taps: range) -> jax.Array:
    return kernel[(slice(None),) * axis + (slice(taps.start, taps.stop, taps.step),)]


def _window(
    axes: Sequence[Axis], rhs: jax.Array, *, lhs: jax.Array, groups: int, precision: Any
) -> jax.Array:
    """Correlation without input dilation, of any dtype: [n, in..., c] x [taps..., c, d] -> [n, out..., d]."""
    pads = [(a.lo, a.hi) for a in axes]
    integer = jnp.issubdtype(lhs.dtype, jnp.integer)
    if integer or any(min(pad) < 0 for pad in pads):  # lax.pad crops exactly, the convolution may not
        lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])
        pads = [(0, 0)] * len(axes)
    if integer:
        return _dot_of_windows(axes, lhs, rhs, groups)
    d = len(axes)
    last = (0, d + 1, *range(1, d + 1))  # channels last
    convolve = partial(
        lax.conv_general_dilated,
        window_strides=[a.stride for a in axes],
        padding=pads,
        rhs_dilation=[a.rhs_dilation for a in axes],
        dimension_numbers=lax.ConvDimensionNumbers(last, (d + 1, d, *range(d)), last),
        feature_group_count=groups,
        precision=precision,
    )
    return complex_product(convolve, lhs, rhs) if jnp.iscomplexobj(lhs) else convolve(lhs, rhs)


def _dot_of_windows(axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, groups: int) -> jax.Array:
    """Correlation of a padded integer array: GPUs have products of integers, and no convolutions."""
    d = len(axes)
    for i, axis in enumerate(axes):  # [n, in..., c] -> [n, out1, taps1, in..., c] -> ...
        reads = lax.iota(jnp.int32, axis.out_size)[:, None] * axis.stride
        reads = reads + lax.iota(jnp.int32, axis.taps)[None] * axis.rhs_dilation
        lhs = jnp.take(lhs, reads, axis=1 + 2 * i, mode="clip")
    windows = lhs.reshape(*lhs.shape[:-1], groups, lhs.shape[-1] // groups)
    kernel = rhs.reshape(*rhs.shape[:-1], groups, rhs.shape[-1] // groups)
    # [n, out1, taps1, ..., g, c] x [taps..., c, g, d] -> [g, n, out..., d] -> [n, out..., g * d]
    contracting = ([*range(2, 2 * d + 2, 2), 2 * d + 2], [*range(d), d])
    y = lax.dot_general(windows, kernel, (contracting, ([2 * d + 1], [d + 1])))
    return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], rhs.shape[-1])


def complex_product(convolve: Callable[..., jax.Array], lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A complex convolution as three real ones (Gauss): GPUs have real convolutions only."""
    both = convolve(lhs.real + lhs.imag, rhs.real)
    real = both - convolve(lhs.imag, rhs.real + rhs.imag)
    return lax.complex(real, both + convolve(lhs.real, rhs.imag - rhs.real))

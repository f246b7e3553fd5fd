"""From axes to calls of lax on the CPU: correlation of any geometry, reduced to what lax does well there.

``lax.conv_general_dilated`` is called in the one form that is right on every platform and fast on the CPU:
channels last, without input dilation (the outputs are split by residue) and without negative padding (the
input is cropped). A few groups are convolutions of their own. A convolution of few channels is written out as
a sum over taps, which XLA makes one loop: its convolutions are up to 30 times slower there. Integers take
this way on every platform: it multiplies them by ``dot_general``. :mod:`jaxconv_fc.native` has the forms for
GPU and TPU.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.axis import Axis, Phase


def correlate(
    axes: Sequence[Axis],
    lhs: jax.Array,
    rhs: jax.Array,
    groups: int,
    precision: Any,
    *,
    channels_first: bool = False,
) -> jax.Array:
    """Zeros-mode correlation of any geometry: [n, in..., c] x [taps..., c/groups, d] -> [n, out..., d].

    ``channels_first``: the arrays of the caller have channels before positions. A sum over taps keeps that
    order, so that nothing is transposed.
    """
    shape = (lhs.shape[0], *(a.out_size for a in axes), rhs.shape[-1])
    if not lhs.size or not rhs.size or 0 in shape:
        return jnp.zeros(shape, lhs.dtype)

    def window(inner: Sequence[Axis], rhs: jax.Array) -> jax.Array:
        if jnp.issubdtype(lhs.dtype, jnp.inexact) and is_narrow(inner, rhs.shape, groups):
            return _sum_over_taps(inner, lhs, rhs, groups, channels_first)
        return _window(inner, lhs, rhs, groups, precision)

    return by_residues(axes, lhs.shape[0], rhs, window)


def kernel_gradient(
    axes: Sequence[Axis],
    x: jax.Array,
    y: jax.Array,
    groups: int,
    precision: Any,
    *,
    channels_first: bool = False,
) -> jax.Array:
    """Correlation of inputs with cotangents: [n, t, g*i] [n, o, g*e] -> [p, i, g*e].

    If there are many examples, the channels ``i`` of a group take the place of the batch, the examples ``n``
    that of the channels, and groups are groups.
    """
    inputs, rhs = x.shape[-1] // groups, jnp.moveaxis(y, 0, -2)  # [o, n, g*e]
    if _is_short(axes, x, y, groups):

        def window(inner: Sequence[Axis], rhs: jax.Array) -> jax.Array:
            return _sums_over_outputs(inner, x, jnp.moveaxis(rhs, -2, 0), groups, precision, channels_first)

        kernel = by_residues(axes, inputs, rhs, window)  # [i, p, g*e]
    else:
        x = x.reshape(*x.shape[:-1], groups, inputs)  # [n, t, g, i]
        x = jnp.moveaxis(x, (0, -1), (-1, 0))  # [i, t, g, n]
        x = x.reshape(*x.shape[:-2], -1)  # [i, t, g*n]
        kernel = by_residues(axes, inputs, rhs, lambda inner, rhs: _window(inner, x, rhs, groups, precision))
    return jnp.moveaxis(kernel, 0, -2)


def fold(axis: Axis, x: jax.Array, dim: int) -> jax.Array:
    """The transpose of padding dimension ``dim`` with copies: each is added to its source."""
    count, own = partial(lax.iota, jnp.int32), axis.own
    copies = jnp.concatenate([count(own.start), own.stop + count(axis.padded_size - own.stop)])
    added = jnp.take(x, copies, axis=dim, mode="clip")
    return own_positions(axis, x, dim).at[(slice(None),) * dim + (axis.source(copies),)].add(added)


def own_positions(axis: Axis, x: jax.Array, dim: int) -> jax.Array:
    """The padded positions that are inputs themselves; zeros for inputs that a crop has left out."""
    own = axis.own
    return among_zeros(axis, x, dim, own, own.start - axis.copied[0] if own else 0)


def among_zeros(axis: Axis, x: jax.Array, dim: int, part: range, at: int) -> jax.Array:
    """Some padded positions, as inputs from number ``at`` on, among zeros for all other inputs."""
    zeros = [(0, 0, 0)] * x.ndim
    zeros[dim] = (at, axis.size - at - len(part), 0)
    x = lax.slice_in_dim(x, part.start, part.stop, axis=dim)
    return lax.pad(x, jnp.zeros((), x.dtype), zeros)


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


def _window(axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, groups: int, precision: Any) -> jax.Array:
    """Correlation without input dilation, of any dtype: [n, in..., c] x [taps..., c, d] -> [n, out..., d]."""
    pads = [(a.lo, a.hi) for a in axes]
    integer = jnp.issubdtype(lhs.dtype, jnp.integer)
    if 1 < groups <= MOST_SPLIT and not integer and lhs.dtype.itemsize <= 4:
        parts = zip(jnp.split(lhs, groups, -1), jnp.split(rhs, groups, -1), strict=True)
        return jnp.concatenate([_window(axes, *part, 1, precision) for part in parts], -1)
    if integer or any(min(pad) < 0 for pad in pads):  # lax.pad crops exactly, the convolution may not
        lhs = _padded(axes, lhs, 1)
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


def _padded(axes: Sequence[Axis], x: jax.Array, first: int) -> jax.Array:
    """Zeros around the spatial dimensions of ``x``, the first of which is ``first``. Negative ones crop."""
    pads = [(0, 0, 0)] * x.ndim
    pads[first : first + len(axes)] = [(a.lo, a.hi, 0) for a in axes]
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


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


# -- few channels: term by term ------------------------------------------------------------------

MOST_TERMS = 64  # of a sum that is written out, and sums in one loop
MOST_DOTS = 32  # products of matrices that are written out: each compiles in 20 ms
MOST_CHANNELS = 4  # of a convolution without groups
MOST_PAIRS = 64  # of an input and an output channel of one group, whose products are summed in one loop
MOST_SPLIT = 8  # groups of a convolution that are convolutions of their own: XLA takes up to 5 times as long


def is_narrow(axes: Sequence[Axis], rhs: tuple[int, ...], groups: int) -> bool:
    """Whether a sum over taps is faster than a convolution with a kernel of this shape, [p, i, g*e]."""
    *taps, inputs, outputs = rhs
    outputs //= groups
    few = groups > 1 or inputs <= min(MOST_CHANNELS, 3 * outputs)
    wide = groups == 1 and outputs > 16 and any(a.stride > 1 for a in axes)  # each output reads with gaps
    return few and not wide and inputs * math.prod(taps) <= MOST_TERMS


def _is_short(axes: Sequence[Axis], x: jax.Array, y: jax.Array, groups: int) -> bool:
    """Whether a sum for every tap is faster than a convolution with ``y`` as its kernel.

    It is for one example with groups. A ``vmap`` that keeps the gradient of each turns examples into groups.
    It is also for few pairs of channels in a group. Convolutions are fastest for many examples without
    groups, so there the pairs must be fewest.
    """
    one, taps = x.shape[0] == 1, math.prod(a.out_size for a in axes)
    pairs = (x.shape[-1] // groups) * (y.shape[-1] // groups)
    few = pairs <= (MOST_PAIRS if one else MOST_PAIRS // 2 if groups > 1 else 2)
    most = MOST_TERMS if few else MOST_DOTS if one and groups > 1 else 0
    return taps <= most and jnp.issubdtype(x.dtype, jnp.inexact)


class _Grouped(NamedTuple):
    """An array with channels by group, in the order of the caller's array."""

    array: jax.Array  # [n, g, c, t...] with channels first, else [n, t..., g, c]
    channels: int  # the dimension of c
    first: int  # the first spatial dimension


def _grouped(x: jax.Array, groups: int, channels_first: bool) -> _Grouped:
    """[n, t..., g*c], grouped. Narrow floats become float32."""
    at = 1 if channels_first else x.ndim - 1
    x = jnp.moveaxis(x, -1, at).astype(jnp.float32 if x.dtype.itemsize < 4 else x.dtype)
    x = x.reshape(*x.shape[:at], groups, x.shape[at] // groups, *x.shape[at + 1 :])
    return _Grouped(x, at + 1, 3 if channels_first else 1)


def _canonical(x: jax.Array, channels: int, dtype: Any) -> jax.Array:
    """[n, t..., g*c] of a grouped array."""
    x = x.reshape(*x.shape[: channels - 1], -1, *x.shape[channels + 1 :])
    return jnp.moveaxis(x, channels - 1, -1).astype(dtype)


def _sum_over_taps(
    axes: Sequence[Axis], lhs: jax.Array, rhs: jax.Array, groups: int, channels_first: bool
) -> jax.Array:
    """Correlation without input dilation: [n, t, g*i] [p, i, g*e] -> [n, o, g*e]. All terms are one loop."""
    x, at, first = _grouped(lhs, groups, channels_first)
    x = _padded(axes, x, first)
    *taps, inputs, _ = rhs.shape
    weights = rhs.astype(x.dtype).reshape(*taps, inputs, groups, -1)  # [p, i, g, e]
    beside = (0, *range(3, x.ndim)) if channels_first else range(x.ndim - 2)  # all but [g, e]
    counts, steps = [a.out_size for a in axes], [a.stride for a in axes]
    terms = []
    for p, i in itertools.product(np.ndindex(*taps), range(inputs)):
        starts = [tap * a.rhs_dilation for tap, a in zip(p, axes, strict=True)]
        window = _strided(lax.slice_in_dim(x, i, i + 1, axis=at), first, starts, counts, steps)
        terms.append(window * jnp.expand_dims(weights[(*p, i)], beside))  # [n, g, 1, o] [1, g, e, 1]
    return _canonical(functools.reduce(operator.add, terms), at, lhs.dtype)


def _sums_over_outputs(
    axes: Sequence[Axis], x: jax.Array, y: jax.Array, groups: int, precision: Any, channels_first: bool
) -> jax.Array:
    """Kernel gradient without input dilation: [n, t, g*i] [n, o, g*e] -> [i, p, g*e], a sum for every tap."""
    dtype = x.dtype
    x, at, first = _grouped(x, groups, channels_first)
    y, *_ = _grouped(y, groups, channels_first)
    x = _padded(axes, x, first)
    counts, steps = [a.taps for a in axes], [a.rhs_dilation for a in axes]
    positions = tuple(range(first, first + len(axes)))
    windows = [
        _strided(x, first, [tap * a.stride for tap, a in zip(p, axes, strict=True)], counts, steps)
        for p in np.ndindex(*(a.out_size for a in axes))
    ]
    if x.shape[at] * y.shape[at] <= MOST_PAIRS:  # [n, g, i, 1, o] [n, g, 1, e, o] -> [g, i, e]
        y = jnp.expand_dims(y, at)
        terms = [jnp.expand_dims(window, at + 1) * y for window in windows]
        sums = _sums_at_once(terms, 0, *(dim + (at < dim) for dim in positions))
    else:  # [n, g, i, o] [n, g, e, o] -> [g, i, e]
        numbers = (((0, *positions), (0, *positions)), ((at - 1,), (at - 1,)))
        sums = [lax.dot_general(window, y, numbers, precision) for window in windows]
    kernel = jnp.moveaxis(jnp.stack(sums), 2, 0)  # [p, g, i, e] -> [i, p, g, e]
    return kernel.reshape(kernel.shape[0], *(a.out_size for a in axes), -1).astype(dtype)


def _sums_at_once(terms: Sequence[jax.Array], *dims: int) -> list[jax.Array]:
    """The sum of each array over these dimensions. All but the last one are summed in one loop: no product is
    stored, and every factor is read once. The last is summed apart: one long chain of additions would round
    ten times as much."""
    *others, last = dims
    zeros = [jnp.zeros((), term.dtype) for term in terms]
    rows = lax.reduce(tuple(terms), tuple(zeros), lambda a, b: tuple(map(operator.add, a, b)), others)
    return [row.sum(last - sum(dim < last for dim in others)) for row in rows]


def _strided(
    x: jax.Array, first: int, starts: Sequence[int], counts: Sequence[int], steps: Sequence[int]
) -> jax.Array:
    """``counts`` entries from ``starts`` on, ``steps`` apart, of the dimensions from ``first`` on."""
    start, stop, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
    for d, (begin, count, by) in enumerate(zip(starts, counts, steps, strict=True), start=first):
        start[d], stop[d], step[d] = begin, begin + (count - 1) * by + 1, by
    return lax.slice(x, start, stop, step)

"""The second moment of patches, without the patches.

Tap p reads the inputs ``t in S(p)`` (outputs ``o`` with ``o*s + p*r - lo == t*l``), and taps p and q of one
output read inputs at the distance ``(q - p)*r/l``. So per axis

    A[(i, p), (j, q)] = sum over t in S(p) of  x[i, t] * x[j, t + (q - p)*r/l],

with 0 for an input that does not exist. The inputs of an axis fall into *cells*: all of one cell are read
through the same taps. Then every ``S(p)`` is a union of cells, and the sum over one cell depends on p and q
only through ``q - p``: it is the kernel gradient of a correlation of x with the cell, whose taps are the
distances. With stride 1 the cells are the interior and the lines at the border, with stride s there are s
interiors. A is symmetric, so one axis needs no negative distances. Where ``(q - p)*r/l`` is not a whole
number, one of the two taps reads a hole, and A is 0.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.curvature.stacks import as_stack, check_real, part_size, summed_over_parts
from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.layout import grid, taps
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.products.forms import windows
from jaxconv_fc.products.product import padded_inputs, summed_gradient
from jaxconv_fc.sharding import program

MOST_CELLS = 64  # products of cells: each is a convolution of its own, which compiles in 20 to 50 ms
MOST_PAIRS = 2**22  # of an input and a tap of one axis, that the host looks at
# What a sum over distances costs more than the same multiplications in a product of matrices: its kernels are
# images, it has few channels, and all cells are added up in A. Measured on 2 cores with jax 0.10.2.
COST_OF_LAGS, WIDE, COST_OF_ENTRY = 3.0, 16, 500


def patch_moment(spec: ConvSpec, xs: Array) -> jax.Array:
    """``A = sum_n X_n^T X_n``, where X_n is the kernel matrix of example n for one output channel.

    ``A[(i, p), (j, q)] = sum_n sum_o x_n[i, t(o, p)] * x_n[j, t(o, q)]``: the second moment of the patches
    that the outputs read, the input factor of KFAC (docs/maths.md, section 16). A is an autocorrelation of x:
    it depends on p and q through ``q - p``, and on the lines of the border that taps leave out. So no patches
    are made, but where they pay: then those of a few examples at a time.

    Args:
      spec: the geometry; strides, dilations, groups, boundary modes and layouts as they are.
      xs: array of shape ``(n, *spec.in_shape)``.

    Returns:
      Array of shape ``(k, k)``, with ``k`` = channels of a group * taps. Rows and columns are (channel,
      taps...), as in one output channel of an OIHW kernel. With several groups ``(groups, k, k)``.

    Raises:
      TypeError: xs is not an array of real numbers.
      ValueError: another shape, or A is beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.curvature
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.curvature.patch_moment(spec, jnp.array([[[1., 2., 3., 4.]]])))
    [[14. 20.]
     [20. 29.]]
    """
    stack = as_stack(spec, "xs", xs, "in_shape")
    check_real("patch_moment", "xs", stack)
    check_moment("patch_moment", spec, stack)
    return without_one_group(spec, moment(spec, stack))


def check_moment(function: str, spec: ConvSpec, stack: jax.Array) -> None:
    size = spec.group_channels * math.prod(taps(spec))
    advice = "fewer channels or taps, or more groups"
    check_array(function, (spec.groups, size, size), stack.dtype, advice)


def without_one_group(spec: ConvSpec, factors: jax.Array) -> jax.Array:
    return factors[0] if spec.groups == 1 else factors


@program
def moment(spec: ConvSpec, xs: jax.Array) -> jax.Array:
    """:func:`patch_moment` as ``(groups, k, k)``."""
    size = spec.group_channels * math.prod(taps(spec))
    if not xs.size or not size or not all(axis.pair_count for axis in spec.axes):
        return jnp.zeros((spec.groups, size, size), xs.dtype)
    x, axes = padded_inputs(spec, xs), [axis.on_padded for axis in spec.axes]  # [n, t, g*i]
    if all(axis.size * axis.taps <= MOST_PAIRS for axis in axes):
        half = max(range(len(axes)), key=lambda a: axes[a].taps, default=0)
        lags = [_Lags(axis, one_sided=a == half) for a, axis in enumerate(axes)]
        if math.prod(len(lag.cells) for lag in lags) <= MOST_CELLS and _lags_are_cheaper(
            lags, x, spec.groups
        ):
            return _by_lags(spec.groups, lags, half, x)
    return _by_patches(spec.groups, axes, x)


def _lags_are_cheaper(lags: Sequence[_Lags], x: jax.Array, groups: int) -> bool:
    """Both costs are multiplications per pair of channels of a group."""
    narrow = max(1.0, WIDE * groups / x.shape[-1])
    pairs = math.prod(lag.axis.taps**2 for lag in lags)
    cost = COST_OF_LAGS * narrow * len(x) * math.prod(lag.work for lag in lags) + COST_OF_ENTRY * pairs
    return cost <= len(x) * math.prod(lag.axis.out_size for lag in lags) * pairs


# -- distances ---------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """Inputs of one axis that are all read through the same taps, at equal distances."""

    inputs: range
    taps: tuple[int, ...]


def _cells(axis: Axis) -> list[Cell]:
    """The inputs that are read at all, in cells (zeros mode)."""
    _, read = axis.output_of(np.arange(axis.size)[:, None], np.arange(axis.taps))  # [t, p]
    sets: dict[bytes, list[int]] = {}
    for t in np.flatnonzero(read.any(1)):
        sets.setdefault(read[t].tobytes(), []).append(int(t))
    return [
        Cell(inputs, tuple(np.flatnonzero(read[inputs.start]).tolist()))
        for group in sets.values()
        for inputs in _progressions(group)
    ]


def _progressions(numbers: Sequence[int]) -> list[range]:
    """Ascending numbers as ranges, from the first one on as long as their steps are equal."""
    found, rest = [], list(numbers)
    while rest:
        step = rest[1] - rest[0] if len(rest) > 1 else 1
        length = next((i for i in range(1, len(rest)) if rest[i] - rest[i - 1] != step), len(rest))
        found.append(range(rest[0], rest[0] + length * step, step))
        rest = rest[length:]
    return found


class _Lags:
    """The distances between the inputs of one axis: ``distance`` inputs for every ``period`` taps.

    Taps p and q of one output read inputs at the distance ``(q - p)*r/l``, which is a whole number only if
    ``period = l/gcd(r, l)`` divides ``q - p``: else one of them reads a hole.
    """

    def __init__(self, axis: Axis, one_sided: bool):
        common = math.gcd(axis.rhs_dilation, axis.lhs_dilation)
        self.axis, self.cells, self.one_sided = axis, _cells(axis), one_sided
        self.period, self.distance = axis.lhs_dilation // common, axis.rhs_dilation // common

    def of(self, cell: Cell) -> range:
        """The distances, in steps, from what a tap of the cell reads to what any tap q reads."""
        steps = [(q - p) // self.period for p in cell.taps for q in self.partners(p)]
        return range(min(steps), max(steps) + 1)

    def partners(self, p: int) -> range:
        """The taps q whose products with tap p are wanted, and are not all 0."""
        return range(p if self.one_sided else p % self.period, self.axis.taps, self.period)

    def correlation(self, cell: Cell) -> Axis:
        """The axis whose outputs are the cell, and whose tap h reads the input ``of(cell)[h]`` steps on."""
        lags = self.of(cell)
        lo = -(cell.inputs.start + self.distance * lags.start)
        axis = Axis(self.axis.size, len(lags), cell.inputs.step, lo, rhs_dilation=self.distance)
        return axis.ending_at(len(cell.inputs))

    @property
    def work(self) -> int:
        return sum(len(cell.inputs) * len(self.of(cell)) for cell in self.cells)


def _by_lags(groups: int, lags: Sequence[_Lags], half: int, x: jax.Array) -> jax.Array:
    """[n, t, g*i] -> [g, (i, p), (j, q)]."""
    d = len(lags)

    def assemble(chosen: tuple[Cell, ...]) -> jax.Array:
        """[g*i, p of the others..., j, h of the chosen..., q of the others...]: sums over their cells."""
        a, dim = len(chosen), d + 1  # that of h on axis a
        if a == d:
            return _correlation(groups, lags, chosen, x)
        axis = lags[a]
        parts = {cell: assemble((*chosen, cell)) for cell in axis.cells}
        rows = []
        for p in range(axis.axis.taps):
            partners = axis.partners(p)
            read = []  # of every cell of p: its products with the partners q, which are q - p further
            for cell, part in parts.items():
                if p in cell.taps:
                    first = (partners.start - p) // axis.period - axis.of(cell).start
                    read.append(lax.slice_in_dim(part, first, first + len(partners), axis=dim))
            some = next(iter(parts.values()))
            shape = (*some.shape[:dim], len(partners), *some.shape[dim + 1 :])
            total = functools.reduce(operator.add, read, jnp.zeros(shape, x.dtype))
            pads = [(0, 0, 0)] * total.ndim
            pads[dim] = (partners.start, axis.axis.taps - 1 - partners[-1], axis.period - 1)
            rows.append(lax.pad(total, jnp.zeros((), x.dtype), pads))
        return jnp.stack(rows, 1)

    r = assemble(())  # [g*i, p..., j, q...]
    k = [lag.axis.taps for lag in lags]
    size = x.shape[-1] // groups * math.prod(k)
    r = r.reshape(groups, size, size)
    if not d:
        return r
    _, *tap = grid((size // math.prod(k), *k), jnp.int32)  # of every row or column: its taps
    p = jnp.broadcast_to(tap[half], (size // math.prod(k), *k)).reshape(-1)
    return jnp.where(p[:, None] <= p[None, :], r, r.swapaxes(1, 2))


def _correlation(groups: int, lags: Sequence[_Lags], cells: Sequence[Cell], x: jax.Array) -> jax.Array:
    """[g*i, j, h...] = sum over n, t in the cells of ``x[n, t, g*i] * x[n, t + distance*h, g*j]``."""
    d, channels = len(lags), x.shape[-1]
    axes = [lag.correlation(cell) for lag, cell in zip(lags, cells, strict=True)]
    last, first = (0, d + 1, *range(1, d + 1)), tuple(range(d + 2))  # channels last; out channels first
    spec = ConvSpec(
        (1, *x.shape[1:]),
        (channels, channels // groups, *(axis.taps for axis in axes)),
        (1,) * d, ((0, 0),) * d, (1,) * d, (1,) * d,
        lax.ConvDimensionNumbers(last, first, last), groups, 1, "zeros",
    ).having(axes)  # fmt: skip
    inside = x
    for dim, cell in enumerate(cells, start=1):
        start, step, count = cell.inputs.start, cell.inputs.step, len(cell.inputs)
        inside = lax.slice_in_dim(inside, start, start + (count - 1) * step + 1, step, axis=dim)
    return summed_gradient(spec, x, inside, lax.Precision.HIGHEST)


# -- patches -----------------------------------------------------------------------------------------


def _by_patches(groups: int, axes: Sequence[Axis], x: jax.Array) -> jax.Array:
    """[n, t, g*i] -> [g, (i, p), (j, q)], with the patches of a few examples at a time."""
    nbytes = math.prod(axis.out_size * axis.taps for axis in axes) * x.shape[-1] * x.dtype.itemsize
    return summed_over_parts(partial(_of_patches, groups, axes), part_size(len(x), nbytes), x)


def _of_patches(groups: int, axes: Sequence[Axis], x: jax.Array) -> jax.Array:
    d = len(axes)
    for a, axis in enumerate(axes):  # [n, (o, p)..., t..., g*i]
        x = windows(x, 1 + 2 * a, axis)
    x = x.reshape(*x.shape[:-1], groups, -1)
    order = (2 * d + 1, 0, *range(1, 2 * d, 2), 2 * d + 2, *range(2, 2 * d + 1, 2))
    rows = math.prod(x.shape[i] for i in (0, *range(1, 2 * d, 2)))
    x = x.transpose(order).reshape(groups, rows, -1)  # [g, (n, o), (i, p)]
    return lax.dot_general(x, x, (((1,), (1,)), ((0,), (0,))), lax.Precision.HIGHEST)

"""Geometries for the tests: one dataclass, and one recipe that draws random ones.

The recipe needs a single primitive, `integer(low, high)` (both ends included). A NumPy generator and
Hypothesis both provide it, so the replayable random runs and the shrinking ones cover the same ground.
Lists put the plain choice first: that is where Hypothesis shrinks to.
"""

import dataclasses
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from jax import lax

import jaxconv_fc as fc
from jaxconv_fc.geometry.axis import Axis

MODES = ("zeros", "circular", "reflect", "edge", "symmetric")
MIXED = ("zeros",) * len(MODES[1:]) + MODES[1:]  # half of all geometries pad with zeros
MAX_ENTRIES = 40_000
MAX_STEPS = 3_000
# by number of spatial axes: the largest input size and the largest kernel size
LARGEST = {0: (0, 0), 1: (14, 5), 2: (6, 4), 3: (4, 3), 4: (3, 2)}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The arguments of conv_spec, as a user would write them."""

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: Any
    lhs_dilation: tuple[int, ...] | None = None
    rhs_dilation: tuple[int, ...] | None = None
    dimension_numbers: Any = None
    feature_group_count: int = 1
    batch_group_count: int = 1
    padding_mode: str = "zeros"

    def arguments(self):
        """The positional arguments lax.conv_general_dilated takes after the two arrays."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[2:-1])

    def spec(self):
        return fc.conv_spec(self.lhs_shape, self.rhs_shape, *self.arguments(), padding_mode=self.padding_mode)

    def is_small(self):
        """Few entries of M, and few steps of the oracle's loop over output positions and taps."""
        taps = oracle.layouts(self)[1][2:]
        steps = math.prod(oracle.out_sizes(self)) * math.prod(self.rhs_shape[a] for a in taps)
        return math.prod(oracle.matrix_shape(self)) <= MAX_ENTRIES and steps <= MAX_STEPS


# fixed geometries ------------------------------------------------------------------------------------


CASES = {
    "plain": Geometry((1, 2, 4, 3), (3, 2, 2, 2), (1, 1), "SAME"),
    "strided, dilated, lopsided": Geometry((1, 2, 7), (2, 2, 3), (2,), [(-1, 3)], (3,), (2,)),
    "dilated input": Geometry((1, 1, 9, 4), (2, 1, 4, 2), (2, 1), [(2, 3), (1, 1)], (3, 2)),
    "grouped": Geometry((1, 4, 3, 3), (4, 2, 2, 2), (2, 1), [(1, 0), (0, 1)], feature_group_count=2),
    "batch groups": Geometry((4, 2, 4), (4, 2, 3), (1,), "SAME", batch_group_count=2),
    "colliding": Geometry((1, 2, 3), (2, 2, 4), (1,), [(4, 5)], padding_mode="circular"),
    "reflect": Geometry((1, 2, 5, 4), (2, 2, 3, 3), (1, 2), "SAME", padding_mode="reflect"),
    "padded, then dilated": Geometry(
        (1, 2, 9, 2), (2, 2, 2, 1), (1, 1), [(2, 1), (0, 0)], (2, 1), padding_mode="circular"
    ),
    "NHWC": Geometry((1, 4, 3, 4), (2, 2, 2, 4), (1, 2), "SAME", None, None, ("NHWC", "HWIO", "NHWC"), 2),
    "columns before rows": Geometry(
        (2, 5, 1, 4), (3, 2, 2, 2), (1, 1), "SAME", None, None, ("CWNH", "HOIW", "WNHC")
    ),
    "no rows": Geometry((1, 2, 3), (2, 2, 5), (1,), "VALID"),
    "no columns": Geometry((1, 2, 0), (2, 2, 2), (1,), [(2, 1)]),
    "no spatial axes": Geometry((1, 3), (2, 3), (), "VALID"),
}  # fmt: skip
every_case = pytest.mark.parametrize("geometry", CASES.values(), ids=CASES)


# random arrays ---------------------------------------------------------------------------------------


def integers(rng, shape, dtype=np.int64):
    """Small whole numbers (as floats, if dtype is one): every product and sum of them is exact."""
    low = 0 if np.dtype(dtype).kind in "ub" else -4
    values = rng.integers(low, 2 if np.dtype(dtype).kind == "b" else 5, shape)
    if np.dtype(dtype).kind == "c":
        values = values + 1j * rng.integers(-4, 5, shape)
    return np.asarray(values).astype(dtype)


def normals(rng, shape, dtype=np.float64):
    values = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        values = values + 1j * rng.standard_normal(shape)
    return np.asarray(values).astype(dtype)


def arrays(geometry, rng, dtype=np.int64, make=integers):
    """(kernel, one example x, one output y) for a geometry."""
    shapes = (geometry.rhs_shape, oracle.in_shape(geometry), oracle.out_shape(geometry))
    return tuple(make(rng, shape, dtype) for shape in shapes)


# random geometries -----------------------------------------------------------------------------------


class _Recipe:
    """Draws one geometry from `integer(low, high)`."""

    def __init__(self, integer, modes):
        self.integer, self.modes = integer, modes

    def pick(self, choices):
        return choices[self.integer(0, len(choices) - 1)]

    def shuffled(self, items):
        items = list(items)
        for i in range(len(items) - 1):
            j = self.integer(i, len(items) - 1)
            items[i], items[j] = items[j], items[i]
        return items

    def steps(self, rank, largest):
        """Strides or dilations: None-like ones half of the time, so that most axes stay readable."""
        if self.pick([False, True]):
            return tuple(self.integer(1, largest) for _ in range(rank))
        return (1,) * rank

    def channels(self):
        """(batch, C, O, I, feature groups, batch groups)."""
        kind = self.pick(["plain", "plain", "groups", "depthwise", "batch groups"])
        if kind == "plain":
            c, o = self.integer(1, 3), self.integer(1, 3)
            return self.integer(0, 3), c, o, c, 1, 1
        count, multiplier = self.integer(2, 3), self.integer(1, 2)
        if kind == "batch groups":
            c = self.integer(1, 2)
            return count * self.integer(0, 2), c, count * multiplier, c, 1, count
        i = 1 if kind == "depthwise" else self.integer(1, 2)
        return self.integer(0, 3), count * i, count * multiplier, i, count, 1

    def size(self, largest):
        return 0 if self.integer(0, 29) == 29 else self.integer(1, largest)

    def pair(self, n, l, mode):
        """(lo, hi): negative and lopsided in zeros mode, beyond the axis in the others."""
        if mode != "zeros":
            return (0, 0) if n == 0 else (self.integer(0, 2 * n + 2), self.integer(0, 2 * n + 2))
        lo, hi = self.integer(-3, 5), self.integer(-3, 5)
        dilated = l * (n - 1) + 1 if n else 0
        return lo, max(hi, -dilated - lo)  # nobody can crop more than there is

    def layout(self, rank, order):
        """None, three strings, or ConvDimensionNumbers, with the axes in any order."""
        if order == "default":
            return None
        letters = "HWDT"[:rank]
        lhs, rhs, out = ("".join(self.shuffled(first + letters)) for first in ("NC", "OI", "NC"))
        if order == "strings":
            return (lhs, rhs, out)
        return lax.ConvDimensionNumbers(
            tuple(lhs.index(a) for a in "NC" + letters),
            tuple(rhs.index(a) for a in "OI" + letters),
            tuple(out.index(a) for a in "NC" + letters),
        )

    def padding(self, mode, sizes, lhs_dilation):
        names = ["VALID", "SAME", "SAME_LOWER", "same"]
        pairs = [self.pair(n, l, mode) for n, l in zip(sizes, lhs_dilation, strict=True)]
        # outside zeros mode SAME may not meet an empty axis or lhs_dilation: both are refused
        refused = mode != "zeros" and (0 in sizes or max(lhs_dilation, default=1) > 1)
        return self.pick([pairs, self.pick(names[:1] if refused else names)])

    def geometry(self):
        rank = self.pick([2, 1, 2, 3, 0, 4])
        mode = self.pick(self.modes)
        n_max, k_max = LARGEST[rank]
        n = tuple(self.size(n_max) for _ in range(rank))
        k = tuple(self.integer(1, k_max) for _ in range(rank))
        strides, lhs_dilation, rhs_dilation = (self.steps(rank, 3) for _ in range(3))
        batch, c, o, i, feature_groups, batch_groups = self.channels()
        numbers = self.layout(rank, self.pick(["default", "strings", "numbers"]))
        lhs_shape, rhs_shape = (batch, c, *n), (o, i, *k)
        given = Geometry(
            lhs_shape,
            rhs_shape,
            strides,
            self.padding(mode, n, lhs_dilation),
            None if lhs_dilation == (1,) * rank else lhs_dilation,
            None if rhs_dilation == (1,) * rank else rhs_dilation,
            numbers,
            feature_groups,
            batch_groups,
            mode,
        )
        return in_layout(given)


def in_layout(geometry):
    """Shapes written as (N, C, spatial...) and (O, I, spatial...), moved into the geometry's layout."""
    lhs, rhs, _ = oracle.layouts(geometry)
    return dataclasses.replace(
        geometry,
        lhs_shape=oracle.place(geometry.lhs_shape, lhs),
        rhs_shape=oracle.place(geometry.rhs_shape, rhs),
    )


def random_axis(rng, mode):
    """One spatial axis, with an empty input, crops, and padding beyond the input among the choices."""
    pick = lambda *choices: int(rng.choice(choices))  # noqa: E731
    n, taps = pick(0, 1, 2, 3, 5, 8, 13), pick(1, 2, 3, 4, 7, 11)
    s, l, r = (pick(1, 1, 1, 2, 3, 4, 6) for _ in range(3))
    if mode == "zeros":
        lo = int(rng.integers(-4, 30))
        return Axis(n, taps, s, lo, max(int(rng.integers(-4, 30)), -lo - l * n), l, r)
    lo, hi = (int(v) for v in rng.integers(0, 2 * n + 3, 2)) if n else (0, 0)
    return Axis(n, taps, s, lo, hi, l, r, mode)


def random_geometry(rng, modes=MIXED):
    """One geometry from a NumPy generator; the same generator state gives the same geometry."""
    recipe = _Recipe(lambda low, high: int(rng.integers(low, high, endpoint=True)), modes)
    while True:
        geometry = recipe.geometry()
        if geometry.is_small():
            return geometry


@st.composite
def _drawn(draw, modes):
    return _Recipe(lambda low, high: draw(st.integers(low, high)), modes).geometry()


def geometries(modes=MIXED):
    """The same geometries as a Hypothesis strategy."""
    return _drawn(modes).filter(Geometry.is_small)


seeds = st.integers(0, 2**32 - 1)

"""Orders of dimensions, and the numbers of neurons and taps, held against NumPy's transposes and ravels."""

import math

import jax
import numpy as np
import pytest
from environment import count
from geometries import random_geometry

from jaxconv_fc.geometry import layout

COUNT = count("GEOMETRIES", 24)


def test_orders_and_their_inverses(rng):
    for rank in range(6):
        order = [int(i) for i in rng.permutation(rank)]
        value = rng.standard_normal(rng.integers(1, 4, rank + 2))
        there = layout.to_canonical(value, order)  # two batch axes stay in front
        np.testing.assert_array_equal(there, value.transpose(0, 1, *(2 + i for i in order)))
        np.testing.assert_array_equal(layout.from_canonical(there, order), value)
        assert [order[i] for i in layout.inverse(order)] == list(range(rank))


def test_a_grid_broadcasts_to_the_indices_of_numpy():
    dims = (2, 3, 4)
    grid = layout.grid(dims, np.int32)
    assert [g.shape for g in grid] == [(2, 1, 1), (1, 3, 1), (1, 1, 4)]
    np.testing.assert_array_equal(np.broadcast_arrays(*grid), np.indices(dims))
    assert layout.spread(np.zeros((3, 4)), dims, 1, 2).shape == (1, 3, 4)


@pytest.mark.parametrize("traced", [False, True], ids=["host", "traced"])
def test_rows_columns_and_taps_are_places_in_ravels(traced, run_seed):
    """Every number once, and back to positions and channel: of NumPy arrays and of tracers."""
    run = jax.jit if traced else lambda fn: fn
    for i in range(COUNT // (4 if traced else 1)):
        spec = random_geometry(np.random.default_rng([run_seed, i])).spec()
        name = f"JAXCONV_FC_SEED={run_seed}, number {i}: {spec}"
        outputs = (*(a.out_size for a in spec.axes), spec.out_channels)
        inputs = (*(a.size for a in spec.axes), spec.in_channels)
        for sizes, number, split in (
            (outputs, layout.row_of, layout.split_row),
            (inputs, layout.column_of, layout.split_column),
        ):
            *at, channel = np.indices(sizes).reshape(len(sizes), -1)
            numbers = np.asarray(run(number)(spec, at, channel))
            np.testing.assert_array_equal(np.sort(numbers), np.arange(math.prod(sizes)), err_msg=name)
            if numbers.size:
                back, channels = run(split)(spec, numbers)
                np.testing.assert_array_equal(channels, channel, err_msg=name)
                for a, b in zip(back, at, strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=name)
        out, inner, *taps = np.indices((spec.out_channels, spec.group_channels, *layout.taps(spec))).reshape(
            2 + len(spec.axes), -1
        )
        kernel = np.arange(np.prod(spec.rhs_shape)).reshape(spec.rhs_shape)
        want = kernel.transpose(spec.dimension_numbers.rhs_spec).ravel()
        np.testing.assert_array_equal(layout.tap_of(spec, taps, inner, out), want, err_msg=name)
        np.testing.assert_array_equal(layout.out_first(spec, kernel).ravel(), want, err_msg=name)

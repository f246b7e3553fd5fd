"""Fields, numbers of neurons and coverage, held against the nonzero pattern of the oracle's matrix."""


import numpy as np
import oracle
import pytest
from environment import count
from geometries import MODES, every_case, random_geometry

from jaxconv_fc import neurons

COUNT = count("GEOMETRIES", 40)


def assert_fields(spec, pattern, name=""):
    """Every receptive and projective field, and the coverage, against a boolean matrix."""
    first, last = (spec[0], spec[-1]) if isinstance(spec, list) else (spec, spec)
    for i in range(last.out_size):
        field = neurons.receptive_field(spec, i)
        np.testing.assert_array_equal(field.mask.ravel(), pattern[i], err_msg=f"row {i} of {name}")
        assert field.size == pattern[i].sum()
    for j in range(first.in_size):
        field = neurons.projective_field(spec, j)
        np.testing.assert_array_equal(field.mask.ravel(), pattern[:, j], err_msg=f"column {j} of {name}")
    covered = neurons.coverage(spec)
    assert covered.shape == first.in_shape
    np.testing.assert_array_equal(covered.ravel(), pattern.sum(0), err_msg=name)


@every_case
def test_fields_are_the_pattern_of_rows_and_columns(geometry):
    assert_fields(geometry.spec(), oracle.pattern(geometry))


@pytest.mark.parametrize("number", range(COUNT))
def test_fields_of_random_geometries(number, run_seed):
    geometry = random_geometry(np.random.default_rng([run_seed, number]), MODES)
    assert_fields(geometry.spec(), oracle.pattern(geometry), f"JAXCONV_FC_SEED={run_seed}, {geometry}")

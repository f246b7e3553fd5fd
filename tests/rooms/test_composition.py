"""Two convolutions in a row as one, against the product of their matrices."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count
from geometries import Geometry, integers, random_geometry
from jax.test_util import check_grads

import jaxconv_fc as fc

COUNT = count("GEOMETRIES", 20)
CHUNKS = max(4, COUNT // 50)  # so that the workers of pytest-xdist share the work


def random_pair(rng):
    """Two geometries in a row, in the default layout; the second often without padding."""
    while True:
        first = random_geometry(rng, modes=("zeros", "zeros", "circular"))
        spec = first.spec()
        rank = len(spec.axes)
        plain = first.batch_group_count == 1 and first.dimension_numbers is None
        if not plain or 0 in spec.out_shape or rank > 2:
            continue
        c = spec.out_channels
        groups = int(rng.choice([g for g in range(1, c + 1) if c % g == 0]))
        steps = [tuple(int(v) for v in rng.integers(1, 4, rank)) for _ in range(3)]
        pads = [tuple(int(v) for v in rng.integers(-2, 3, 2)) for _ in range(rank)]
        pads = [(0, 0)] * rank if rng.random() < 0.6 else pads
        taps = tuple(int(v) for v in rng.integers(1, 4, rank))
        rhs = (groups * int(rng.integers(1, 3)), c // groups, *taps)
        second = Geometry((1, *spec.out_shape), rhs, steps[0], pads, steps[1], steps[2], None, groups)
        try:
            second.spec()
        except ValueError:
            continue  # crops more than there is
        if second.is_small():
            return first, second


@pytest.mark.parametrize("chunk", range(CHUNKS // 2))  # enough in each that some can be composed
def test_compose_is_the_product_of_the_matrices_or_refuses(chunk, run_seed):
    composed = 0
    for i in range(chunk, max(24, COUNT // 2), CHUNKS // 2):
        rng = np.random.default_rng([run_seed, i, 4])
        first, second = random_pair(rng)
        kernel1, kernel2 = integers(rng, first.rhs_shape), integers(rng, second.rhs_shape)
        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {first} then {second}"
        product = oracle.matrix(kernel2, second) @ oracle.matrix(kernel1, first)
        try:
            spec, kernel = fc.compose((second.spec(), kernel2), (first.spec(), kernel1))
        except ValueError:
            continue
        composed += 1
        assert (np.asarray(fc.as_matrix(spec, kernel)) == product).all(), replay
    assert composed


def test_two_same_layers_differ_in_a_ring_and_the_error_says_where():
    spec = fc.conv_spec((1, 1, 5, 5), (1, 1, 3, 3), (1, 1), "SAME")
    with pytest.raises(ValueError, match=r"16 of 25 output positions would differ.*\[\[0, 4\], \[0, 4\]\]"):
        fc.compose((spec, jnp.ones((1, 1, 3, 3))), (spec, jnp.ones((1, 1, 3, 3))))


def test_composition_keeps_what_both_have_in_groups_and_layout(rng):
    numbers = ("NWHC", "IWHO", "NCHW")
    first = Geometry((1, 6, 5, 4), (1, 2, 2, 8), (1, 1), "VALID", None, None, numbers, 4)
    back = ("NCHW", "HWIO", "NHWC")
    second = Geometry((1, 8, 4, 5), (2, 2, 4, 6), (1, 2), "VALID", None, None, back, 2)
    kernel1, kernel2 = integers(rng, first.rhs_shape), integers(rng, second.rhs_shape)
    spec, kernel = fc.compose((second.spec(), kernel2), (first.spec(), kernel1))
    assert spec.feature_group_count == 2
    np.testing.assert_array_equal(
        fc.as_matrix(spec, kernel), oracle.matrix(kernel2, second) @ oracle.matrix(kernel1, first)
    )
    check_grads(
        lambda a, b: fc.compose((second.spec(), b), (first.spec(), a))[1],
        (kernel1.astype(float), kernel2.astype(float)),
        order=2,
    )


@pytest.mark.parametrize(
    ("second", "word"),
    [
        (Geometry((1, 3, 4), (1, 3, 2), (1,), "VALID"), r"shape \(2, 4\)"),
        (Geometry((1, 2, 4), (1, 2, 2), (1,), "VALID", lhs_dilation=(2,)), "no common factor"),
        (Geometry((1, 2, 4), (1, 2, 2), (1,), [(1, 1)], padding_mode="circular"), "only zeros mode may pad"),
    ],
)
def test_what_cannot_be_composed_is_refused_by_name(second, word):
    first = Geometry((1, 1, 8), (2, 1, 2), (2,), "VALID")
    with pytest.raises(ValueError, match=word):
        fc.compose((second.spec(), jnp.ones(second.rhs_shape)), (first.spec(), jnp.ones(first.rhs_shape)))


@pytest.mark.parametrize(
    ("pads", "word"),
    [
        ((-1, 0), "only zeros mode may pad"),
        ((1, 0), "only zeros mode may pad"),
        ((0, -1), "would make 4 outputs"),
    ],
)
def test_what_a_boundary_mode_made_is_neither_padded_nor_cropped(pads, word):
    first = fc.conv_spec((1, 1, 5), (1, 1, 2), (1,), [(1, 0)], padding_mode="circular")
    second = fc.conv_spec((1, 1, 5), (1, 1, 2), (1,), [pads])
    with pytest.raises(ValueError, match=word):
        fc.compose((second, jnp.ones((1, 1, 2))), (first, jnp.ones((1, 1, 2))))


def test_steps_whose_product_is_beyond_int32_are_refused():
    first = fc.conv_spec((1, 1, 5), (1, 1, 1), (2**16,), "VALID")
    second = fc.conv_spec((1, 1, 1), (1, 1, 1), (2**15,), "VALID")
    with pytest.raises(ValueError, match=r"window_strides\[0\] must be at most .*got 2147483648"):
        fc.compose((second, jnp.ones((1, 1, 1))), (first, jnp.ones((1, 1, 1))))


def test_groups_that_share_no_factor_become_one(rng):
    first = Geometry((1, 6, 4), (6, 3, 2), (1,), "VALID", feature_group_count=2)
    second = Geometry((1, 6, 3), (6, 2, 2), (1,), "VALID", feature_group_count=3)
    kernel1, kernel2 = integers(rng, first.rhs_shape), integers(rng, second.rhs_shape)
    spec, kernel = fc.compose((second.spec(), kernel2), (first.spec(), kernel1))
    assert spec.feature_group_count == 1
    product = oracle.matrix(kernel2, second) @ oracle.matrix(kernel1, first)
    np.testing.assert_array_equal(fc.as_matrix(spec, kernel), product)


def test_a_first_that_reads_nothing_is_not_read_beyond_its_end():
    """It is cropped away, so the product is 0; one convolution would see what is behind the crop."""
    first = fc.conv_spec((1, 1, 3), (1, 1, 1), (1,), [(-4, 5)])
    second = fc.conv_spec((1, 1, 4), (1, 1, 1), (1,), [(4, 0)])
    assert first.nse == 0
    with pytest.raises(ValueError, match="no single convolution equals the product"):
        fc.compose((second, jnp.ones((1, 1, 1))), (first, jnp.ones((1, 1, 1))))


@pytest.mark.parametrize("channels", [(0, 2, 2), (2, 0, 2), (2, 2, 0)])
def test_composition_without_channels(channels):
    """Two SAME layers, which are refused with channels: without, both are 0 or have no entries."""
    c, between, o = channels
    first = fc.conv_spec((1, c, 4), (between, c, 3), (1,), "SAME")
    second = fc.conv_spec((1, between, 4), (o, between, 3), (1,), "SAME")
    kernels = jnp.ones(second.rhs_shape), jnp.ones(first.rhs_shape)
    spec, kernel = fc.compose((second, kernels[0]), (first, kernels[1]))
    np.testing.assert_array_equal(fc.as_matrix(spec, kernel), np.zeros((4 * o, 4 * c)))


def test_composition_of_no_outputs():
    """The stride is larger than the window, which does not fit: there is nothing to crop for."""
    first = fc.conv_spec((1, 1, 2), (1, 1, 1), (1,), "VALID")
    second = fc.conv_spec((1, 1, 2), (1, 1, 3), (5,), "VALID")
    spec, _ = fc.compose((second, jnp.ones((1, 1, 3))), (first, jnp.ones((1, 1, 1))))
    assert spec.shape == (0, 2)

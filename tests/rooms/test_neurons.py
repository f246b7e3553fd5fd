"""Fields, numbers of neurons and coverage, held against the nonzero pattern of the oracle's matrix."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count
from geometries import MODES, Geometry, every_case, random_geometry
from jax import lax

import jaxconv_fc as fc
from jaxconv_fc import neurons

COUNT = count("GEOMETRIES", 30)
PLAIN = fc.conv_spec((1, 2, 5, 4), (3, 2, 2, 2), (1, 1), "VALID")  # in_shape (2, 5, 4), out_shape (3, 4, 3)


def assert_fields(spec, pattern, name=""):
    """Every receptive and projective field, and the coverage, against a boolean matrix."""
    first, last = (spec[0], spec[-1]) if isinstance(spec, list) else (spec, spec)
    for fields, lines, shape in (
        (neurons.receptive_field, pattern, first.in_shape),
        (neurons.projective_field, pattern.T, last.out_shape),
    ):
        for i, line in enumerate(lines):
            field = fields(spec, i)
            assert field.shape == shape
            assert [v.ndim for v in field.indices] == [1] * len(shape)
            np.testing.assert_array_equal(field.mask.ravel(), line, err_msg=f"{fields.__name__} {i}, {name}")
            assert field.size == line.sum()
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


# chains ------------------------------------------------------------------------------------------------


def continued(shape, rng):
    """A random geometry whose in_shape is this shape: any of its dimensions may hold the channels."""
    dims = [int(i) for i in rng.permutation(len(shape))]
    groups, batch_groups = 1, 1
    if len(dims) > 1 and shape[dims[1]] > 1 and rng.random() < 0.4:  # one dimension is the batch
        feature, batch, *spatial = dims
        lhs_shape, batch_groups = shape, shape[batch]
    else:  # a batch of 1 is put somewhere
        batch = int(rng.integers(len(shape) + 1))
        feature, *spatial = (i + (i >= batch) for i in dims)
        lhs_shape = (*shape[:batch], 1, *shape[batch:])
        groups = int(rng.choice([g for g in range(1, 4) if lhs_shape[feature] % g == 0]))
    mode = MODES[rng.integers(len(MODES))]
    taps = tuple(int(rng.integers(1, 4)) for _ in spatial)
    low = 0 if mode != "zeros" else -1
    return Geometry(
        lhs_shape,
        (groups * batch_groups * int(rng.integers(1, 3)), lhs_shape[feature] // groups, *taps),
        *([tuple(int(v) for v in rng.integers(1, 3, len(spatial)))]),
        [(max(low, int(rng.integers(-1, 3))), int(rng.integers(0, 3))) for _ in spatial],
        tuple(int(v) for v in rng.integers(1, 3, len(spatial))),
        tuple(int(v) for v in rng.integers(1, 3, len(spatial))),
        lax.ConvDimensionNumbers(
            (batch, feature, *spatial),
            tuple(range(len(taps) + 2)),
            tuple(int(i) for i in rng.permutation(len(taps) + 2)),
        ),
        groups,
        batch_groups,
        mode,
    )


def random_chain(rng, length):
    while True:
        geometries = [random_geometry(rng, MODES)]
        while len(geometries) < length and 0 not in oracle.out_shape(geometries[-1]):
            following = continued(oracle.out_shape(geometries[-1]), rng)
            if not following.is_small():
                break
            geometries.append(following)
        if len(geometries) == length:
            return geometries


@pytest.mark.parametrize("number", range(COUNT))
def test_fields_through_a_chain_are_the_pattern_of_the_product(number, run_seed):
    """Two or three convolutions in a row, with batch groups, layouts and boundary modes of their own."""
    geometries = random_chain(np.random.default_rng([run_seed, number, 1]), 2 + number % 2)
    pattern = oracle.pattern(geometries[0])
    for geometry in geometries[1:]:
        pattern = oracle.pattern(geometry) @ pattern  # of booleans: or over and
    name = f"JAXCONV_FC_SEED={run_seed}, {geometries}"
    assert_fields([geometry.spec() for geometry in geometries], pattern, name)


def test_an_input_that_nobody_reads_has_no_field_behind_batch_groups():
    """Channels become batch entries of the second convolution, and positions its channels."""
    first = fc.conv_spec((1, 1, 6), (4, 1, 1), (2,), "VALID")  # reads every other input
    second = fc.conv_spec((4, 3), (4, 3), (), "VALID", batch_group_count=4)
    assert [neurons.projective_field([first, second], i).size for i in range(6)] == [4, 0] * 3
    np.testing.assert_array_equal(neurons.coverage([first, second]), [[4, 0] * 3])


def test_the_window_of_a_network_grows_as_the_textbook_says():
    """Three layers of 3x3, strides 2, 1, 2: 3 + 2*2 + 2*2 = 11 positions, at a distance of 4."""
    sites = fc.find_convs(network, jnp.zeros((1, 3, 64, 64)), [jnp.zeros((3, 3, 3, 3))] * 3)
    chain = [site.spec for site in sites]
    assert [v.tolist() for v in neurons.receptive_field(chain, (0, 5, 6)).indices] == [
        [0, 1, 2], list(range(20, 31)), list(range(24, 35)),
    ]  # fmt: skip


def network(x, kernels):
    for kernel, stride in zip(kernels, (2, 1, 2), strict=True):
        x = jax.nn.relu(lax.conv_general_dilated(x, kernel, (stride, stride), "VALID"))
    return x


def test_coverage_shows_the_checkerboard():
    """A transposed convolution of stride 2 with 3 taps: M's rows are read once, twice or four times."""
    spec = fc.conv_spec((1, 1, 5, 5), (1, 1, 3, 3), (2, 2), "VALID")
    once = np.array([1, 1, 2, 1, 1])
    np.testing.assert_array_equal(neurons.coverage(spec)[0], np.outer(once, once))


# numbers -----------------------------------------------------------------------------------------------


@every_case
def test_numbers_of_neurons_are_places_in_ravels(geometry):
    spec = geometry.spec()
    for size, shape, number, index in (
        (spec.out_size, spec.out_shape, neurons.row, neurons.position),
        (spec.in_size, spec.in_shape, neurons.column, neurons.input_position),
    ):
        for i in range(size):
            at = index(spec, i)
            assert at == tuple(int(v) for v in np.unravel_index(i, shape))
            assert number(spec, at) == number(spec, i) == number(spec, i - size) == i
            assert index(spec, i - size) == at
            assert type(number(spec, at)) is int
            assert all(type(v) is int for v in at)


@pytest.mark.parametrize("index", [[2, -1, 0], (np.int8(2), 3, jnp.int32(0)), np.array([2, 3, 0])])
def test_an_index_may_be_of_any_integers(index):
    assert neurons.row(PLAIN, index) == 2 * 12 + 3 * 3
    assert neurons.receptive_field(PLAIN, index).size == 8
    assert neurons.row(PLAIN, np.int64(5)) == neurons.row(PLAIN, jnp.array(5)) == 5


def test_numbers_beyond_64_bits():
    spec = fc.conv_spec((1, 1, 2**40, 2**40), (1, 1, 1, 1), (1, 1), "VALID")
    assert neurons.row(spec, (0, 2**40 - 1, 3)) == (2**40 - 1) * 2**40 + 3
    assert neurons.input_position(spec, -1) == (0, 2**40 - 1, 2**40 - 1)


# bad input, and memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: neurons.row(PLAIN, 36), IndexError, r"out_index must lie in \[-36, 36\), got 36"),
        (lambda: neurons.position(PLAIN, -37), IndexError, r"row must lie in \[-36, 36\), got -37"),
        (lambda: neurons.column(PLAIN, (0, 5, 0)), IndexError, r"in_index\[1\] must lie in \[-5, 5\), got 5"),
        (lambda: neurons.row(PLAIN, (0, 0)), ValueError, r"one number per dimension of \(3, 4, 3\), got 2"),
        (lambda: neurons.row(PLAIN, 1.0), TypeError, "out_index must be an int, got 1.0"),
        (lambda: neurons.row(PLAIN, (0, 1.5, 0)), TypeError, r"out_index\[1\] must be an int"),
        (lambda: neurons.row(PLAIN, True), TypeError, "out_index must be an int"),
        (lambda: neurons.position(PLAIN, (0, 0, 0)), TypeError, "row must be an int"),
        (lambda: jax.jit(lambda i: neurons.row(PLAIN, i))(3), TypeError, "out_index must be static"),
        (lambda: neurons.row([PLAIN], 0), TypeError, "spec must be a ConvSpec, got list"),
        (lambda: neurons.receptive_field((5, 4), 0), TypeError, "spec must be a ConvSpec, got int"),
        (lambda: neurons.receptive_field("conv", 0), TypeError, "spec must be a ConvSpec, got str"),
        (lambda: neurons.coverage([]), ValueError, "got an empty list"),
        (
            lambda: neurons.projective_field([PLAIN, PLAIN], 0),
            ValueError,
            r"spec\[0\] has out_shape \(3, 4, 3\) and spec\[1\] in_shape \(2, 5, 4\)",
        ),
        (lambda: neurons.receptive_field(PLAIN, (3, 0, 0)), IndexError, r"out_index\[0\]"),
        (lambda: neurons.projective_field(PLAIN, 40), IndexError, "in_index"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_there_is_no_neuron_of_an_empty_output():
    spec = fc.conv_spec((1, 1, 2), (1, 1, 3), (1,), "VALID")
    with pytest.raises(IndexError, match="There is nothing to count"):
        neurons.receptive_field(spec, 0)
    assert neurons.projective_field(spec, 0).size == 0


def test_a_large_layer_has_fields_and_no_mask():
    spec = fc.conv_spec((1, 1, 10**12), (1, 1, 3), (1,), "SAME", padding_mode="circular")
    start = time.perf_counter()
    field = neurons.receptive_field([spec] * 3, (0, -1))
    assert field.indices[1].tolist() == [0, 1, 2, *range(10**12 - 4, 10**12)]
    assert neurons.projective_field([spec] * 3, (0, 0)).size == 7
    assert time.perf_counter() - start < 2
    with pytest.raises(ValueError, match=r"mask: 1 x 1,000,000,000,000 bool = 931 GiB: use \.indices"):
        field.mask  # noqa: B018
    with pytest.raises(ValueError, match=r"coverage: .* use projective_field"):
        neurons.coverage(spec)


def test_coverage_through_a_chain_is_checked_before_it_is_counted():
    spec = fc.conv_spec((1, 1, 3000), (1, 1, 301), (1,), "SAME")
    with fc.memory_limit(2**24), pytest.raises(ValueError, match="coverage: 9,000,000 int64"):
        neurons.coverage([spec] * 12)
    assert math.prod(neurons.coverage(spec).shape) == 3000

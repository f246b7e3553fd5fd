"""The convolution in a matrix whose geometry is not known."""

import math
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import numbers
from geometries import MODES, integers, normals, random_axis, random_geometry
from scipy.sparse import coo_array, csr_array

import jaxconv_fc as fc
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.matrix.axis_search import View, zeros_axis


def some_geometry(rng, mode):
    """A geometry that detection can see: with rows and columns, and without batch groups."""
    while True:
        geometry = random_geometry(rng, modes=(mode,))
        if geometry.batch_group_count == 1 and 0 not in geometry.spec().shape:
            return geometry


@pytest.mark.parametrize("number", numbers(2, 28))
def test_detection_recovers_convolutions(number, run_seed):
    """In all modes, dense and sparse: the matrix itself, with no more taps, in a canonical geometry."""
    for i in range(10 * number, 10 * number + 10):
        rng = np.random.default_rng([run_seed, i, 5])
        geometry = some_geometry(rng, MODES[i % len(MODES)])
        spec, kernel = geometry.spec(), normals(rng, geometry.rhs_shape)
        matrix = oracle.matrix(kernel, geometry)
        given = csr_array(matrix) if i % 2 else matrix
        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {geometry}"
        found = fc.detect_conv(
            given, spec.in_shape, spec.out_shape, dimension_numbers=geometry.dimension_numbers
        )
        assert found is not None, replay
        got = fc.as_scipy(found[0], np.asarray(found[1])).toarray()
        np.testing.assert_allclose(got, matrix, atol=1e-11, err_msg=replay)
        assert math.prod(found[0].rhs_shape) <= math.prod(spec.rhs_shape), replay
        assert found[0].canonical == found[0], replay


LAYERS = [
    (((1, 2, 8, 8), (3, 2, 3, 3), (2, 2), [(1, 1), (1, 1)]), {"padding_mode": "circular"}),
    (((1, 2, 8, 7), (3, 2, 3, 3), (1, 1), [(1, 1), (1, 1)]), {"padding_mode": "reflect"}),
    (((1, 1, 9), (2, 1, 5), (2,), [(2, 2)]), {"padding_mode": "edge"}),
    (((1, 1, 9), (2, 1, 5), (1,), [(2, 2)]), {"padding_mode": "symmetric"}),
    (
        ((1, 4, 9), (4, 1, 3), (1,), [(2, 2)], None, (2,)),
        {"padding_mode": "circular", "feature_group_count": 4},
    ),
    (((1, 1, 60), (2, 1, 5), (3,), [(4, 4)], None, (2,)), {"padding_mode": "reflect"}),
    (((1, 1, 5), (1, 1, 4), (1,), [(2, 3)], (3,)), {"padding_mode": "edge"}),
]  # fmt: skip


def test_a_layer_is_found_in_its_own_mode(rng):
    """A circular 3 x 3 kernel of stride 2 came back zero-padded, with 16 x 9 taps."""
    for args, options in LAYERS:
        spec = fc.conv_spec(*args, **options)
        kernel = normals(rng, spec.rhs_shape)
        found, got, distance = fc.nearest_conv(fc.as_scipy(spec, kernel), spec.in_shape, spec.out_shape)
        assert found == spec.canonical
        np.testing.assert_allclose(got, kernel, atol=1e-12)
        assert distance < 1e-14


@pytest.mark.parametrize("mode", ["zeros", "circular", "edge"])
def test_a_layer_is_found_under_noise(mode):
    spec = fc.conv_spec((1, 2, 12), (2, 2, 3), (2,), [(1, 1)], padding_mode=mode)
    rng = np.random.default_rng(0)
    kernel = normals(rng, spec.rhs_shape)
    for noise in (0.001, 0.01, 0.1):
        matrix = fc.as_scipy(spec, kernel).toarray() + noise * normals(rng, spec.shape)
        found, got, distance = fc.nearest_conv(matrix, spec.in_shape, spec.out_shape)
        assert found == spec.canonical
        np.testing.assert_allclose(got, kernel, atol=4 * noise)
        assert 0 < distance < 4 * noise


def test_one_pad_of_a_copy_is_the_edge():
    """Symmetric and edge padding by one are alike. Edge is what layers have."""
    for mode in ("edge", "symmetric"):
        spec = fc.conv_spec((1, 1, 7), (1, 1, 3), (1,), "SAME", padding_mode=mode)
        assert spec.canonical.padding_mode == "edge"
        found, _ = fc.detect_conv(fc.as_matrix(spec, jnp.array([[[1.0, 2, 4]]])), (1, 7), (1, 7))
        assert found == spec.canonical


def test_a_canonical_geometry_has_the_same_matrix(run_seed):
    for i in range(30):
        rng = np.random.default_rng([run_seed, i, 8])
        geometry = random_geometry(rng, modes=(MODES[i % len(MODES)],))
        kernel = integers(rng, geometry.rhs_shape)
        spec = geometry.spec()
        if geometry.batch_group_count == 1:
            got = fc.as_scipy(spec.canonical, kernel).toarray()
            np.testing.assert_array_equal(got, fc.as_scipy(spec, kernel).toarray())
        assert spec.canonical.canonical == spec.canonical


def test_shapes_that_are_not_given(rng):
    for args, options in (LAYERS[2], (((1, 2, 5, 6), (4, 2, 3, 2), (1, 1), "SAME"), {})):
        spec = fc.conv_spec(*args, **options)
        matrix = fc.as_scipy(spec, normals(rng, spec.rhs_shape))
        for shapes in ((spec.in_shape, None), (None, spec.out_shape)):
            assert fc.detect_conv(matrix, *shapes)[0] == spec.canonical
    assert fc.detect_conv(rng.standard_normal((6, 6)), None, None) is None
    with pytest.raises(ValueError, match="Give both"):
        fc.nearest_conv(rng.standard_normal((6, 6)), None, None)
    with pytest.raises(ValueError, match="possible pairs"):
        fc.detect_conv(csr_array((2**12 * 3**5, 2**12 * 3**5)), None, None)


def test_a_sparse_matrix_is_not_changed_and_not_made_dense():
    spec = fc.conv_spec((1, 3, 40, 40), (3, 3, 3, 3), (1, 1), "SAME", padding_mode="circular")
    kernel = np.arange(1.0, 82).reshape(spec.rhs_shape)
    matrix = fc.as_scipy(spec, kernel).tocoo()
    twice = coo_array(
        (np.tile(matrix.data / 2, 2), tuple(np.tile(v, 2) for v in matrix.coords)), matrix.shape
    ).tocsr()  # whose entries are stored in two halves
    before = twice.copy()
    tracemalloc.start()
    found, got = fc.detect_conv(twice, spec.in_shape, spec.out_shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == spec.canonical
    np.testing.assert_allclose(got, kernel)
    assert peak < math.prod(spec.shape) * 8 / 2
    np.testing.assert_array_equal(before.data, twice.data)


def test_detection_in_other_layouts(rng):
    """The spec and the kernel come back in the layouts that were asked for."""
    layouts = [("NHWC", "HWIO", "NHWC"), ("NHWC", "OIHW", "NCHW"), ("CWNH", "IWOH", "HNCW")]
    for i, layout in enumerate(layouts):
        lhs = [{"N": 1, "C": 4, "H": 5, "W": 6}[c] for c in layout[0]]
        rhs = [{"O": 2, "I": 2, "H": 3, "W": 2}[c] for c in layout[1]]
        spec = fc.conv_spec(lhs, rhs, (1, 2), [(1, 0), (0, 1)], None, None, layout, 2)
        kernel = jnp.asarray(rng.standard_normal(spec.rhs_shape))
        matrix = fc.as_matrix(spec, kernel)
        found = fc.detect_conv(matrix, spec.in_shape, spec.out_shape, dimension_numbers=layout)
        assert found is not None, i
        assert found[0].dimension_numbers == spec.dimension_numbers
        assert (found[0].lhs_shape, found[0].feature_group_count) == (spec.lhs_shape, 2)
        np.testing.assert_allclose(fc.as_matrix(*found), matrix, atol=1e-12)
        if found[0].rhs_shape == spec.rhs_shape:
            np.testing.assert_allclose(found[1], kernel, atol=1e-12)
        assert fc.nearest_conv(matrix, spec.in_shape, spec.out_shape, dimension_numbers=layout)[2] < 1e-12
    with pytest.raises(ValueError, match="dimension_numbers"):
        fc.detect_conv(matrix, spec.in_shape, spec.out_shape, dimension_numbers=("NHWC", "HWIO"))


@pytest.mark.parametrize("chunk", range(2))
def test_detection_says_no_to_other_matrices(chunk, run_seed):
    for i in range(chunk, 4, 2):
        rng = np.random.default_rng([run_seed, i, 6])
        rank = int(rng.integers(1, 3))
        in_shape, out_shape = (
            (int(rng.integers(1, 3)), *map(int, rng.integers(2, 6, rank))) for _ in range(2)
        )
        matrix = rng.standard_normal((math.prod(out_shape), math.prod(in_shape)))
        assert fc.detect_conv(matrix, in_shape, out_shape) is None, (run_seed, i, in_shape, out_shape)
        assert fc.nearest_conv(matrix, in_shape, out_shape)[2] > 1e-6  # 2 x 2 ones are near by chance


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (((1, 2, 9, 8), (4, 2, 3, 2), (2, 1), [(1, 1), (0, 1)]), {}),
        (((1, 2, 9), (2, 2, 3), (1,), [(2, 2)], (1,), (2,)), {}),
        (((1, 2, 7), (2, 2, 4), (1,), [(2, 2)], (2,)), {}),
        (((1, 4, 7), (6, 2, 3), (3,), [(1, 0)]), {"feature_group_count": 2}),
    ],
)
def test_a_geometry_without_ambiguity_is_found_exactly(args, options, rng):
    spec = fc.conv_spec(*args, **options)
    kernel = jnp.asarray(normals(rng, spec.rhs_shape))
    found, found_kernel = fc.detect_conv(fc.as_matrix(spec, kernel), spec.in_shape, spec.out_shape)
    assert found == spec.canonical
    np.testing.assert_allclose(found_kernel, kernel, rtol=1e-12)


def test_detection_forgives_noise_up_to_tol(rng):
    spec = fc.conv_spec((1, 1, 8), (1, 1, 3), (1,), "SAME")
    noisy = fc.as_matrix(spec, jnp.array([[[1.0, -2.0, 3.0]]])) + 1e-4 * normals(rng, spec.shape)
    assert fc.detect_conv(noisy, spec.in_shape, spec.out_shape) is None
    found = fc.detect_conv(noisy, spec.in_shape, spec.out_shape, tol=1e-2)
    assert found is not None
    assert found[0] == spec


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_detection_in_half_precision_keeps_entries_a_twentieth_of_the_largest(dtype):
    """64 roundings of bfloat16 are a half: smaller entries counted as 0, and two channels as two groups."""
    spec = fc.conv_spec((1, 2, 4), (2, 2, 3), (1,), "SAME")
    kernel = jnp.array([[[1, 20, 3], [4, 1, 1]], [[2, 3, 1], [1, 20, 2]]], dtype)
    found, got = fc.detect_conv(fc.as_matrix(spec, kernel), spec.in_shape, spec.out_shape)
    assert found == spec
    np.testing.assert_array_equal(got, kernel)


# errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fc.detect_conv(jnp.ones((3, 4)), (1, 4), (1, 3, 1)), ValueError, "same rank"),
        (lambda: fc.detect_conv(jnp.ones((3, 4)), (1, 5), (1, 3)), ValueError, r"\(3, 5\)"),
        (lambda: fc.detect_conv(csr_array((3, 4)), (1, 5), (1, 3)), ValueError, r"\(3, 5\)"),
        (lambda: fc.detect_conv(csr_array(np.diag([1, np.nan])), (1, 2), (1, 2)), ValueError, "1 NaN or Inf"),
        (lambda: fc.detect_conv([[1.0]], (1, 1), (1, 1)), TypeError, "matrix must be"),
        (
            lambda: jax.jit(lambda m: fc.detect_conv(m, (1, 4), (1, 3)))(jnp.ones((3, 4))),
            TypeError,
            "concrete",
        ),
    ],
)
def test_bad_inputs_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", ["conv", "noise", "sparse", "whole numbers", "zeros"])
def test_detection_keeps_the_pair_of_steps_that_a_full_search_keeps(kind, run_seed):
    """Held against every pair of steps, compared in full, in the order that the docstring gives."""
    rng = np.random.default_rng([run_seed, len(kind)])
    for _ in range(5):
        m, n = (int(v) for v in rng.integers(1, 11, 2))
        matrix = {
            "noise": rng.standard_normal((m, n)),
            "sparse": rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.15),
            "whole numbers": rng.integers(-1, 2, (m, n)).astype(float),
            "zeros": np.zeros((m, n)),
        }.get(kind)
        if matrix is None:
            axis = random_axis(rng, "zeros")
            axis = replace(axis, size=n, lo=axis.lo % 7).ending_at(m)
            matrix, values = np.zeros((m, n)), rng.standard_normal(axis.taps)
            for o, t, p in oracle.related(axis):
                matrix[o, t] = values[p]
        level = 1e-13 * np.abs(matrix).max()
        axis = zeros_axis(View(matrix[:, :, None], level, 8 * level))
        assert axis == full_search(matrix, 1e-13), (kind, matrix)


def test_detection_prefers_the_smaller_sum_of_steps():
    """(2, 1) and (1, 3) fit one entry alike, and both need one tap."""
    matrix = np.zeros((4, 3))
    matrix[2, 1] = 1
    spec, _ = fc.detect_conv(matrix, (1, 3), (1, 4))
    assert (spec.window_strides, spec.lhs_dilation, spec.rhs_shape) == ((2,), (1,), (1, 1, 1))
    assert spec.axes == (full_search(matrix, 1e-13),)


def full_search(matrix, tol):
    """The axis of the steps (s, l) that fit best; of several, of those with the fewest taps."""
    (m, n), size = matrix.shape, np.abs(matrix).max()
    used = np.argwhere(np.abs(matrix) > tol * size)
    found = []
    for s, l in ((s, l) for s in range(1, n + 1) for l in range(1, m + 1) if math.gcd(s, l) == 1):
        error = np.abs(matrix[l:, s:] - matrix[: max(m - l, 0), : max(n - s, 0)]).max(initial=0)
        q = sorted({int(t) * l - int(o) * s for o, t in used}) or [0]
        r = math.gcd(*(v - q[0] for v in q)) or 1
        axis = Axis(n, (q[-1] - q[0]) // r + 1, s, -q[0], 0, l, r).ending_at(m)
        shares = (s < n and l < m) or min(m, n) <= 1 or axis.taps <= len(used) < matrix.size
        found.append((not shares, max(error - 8 * tol * size, 0), axis.taps, s + l, s, axis))
    return min(found, key=lambda entry: entry[:-1])[-1]

"""The nearest convolution of a known geometry, and detection of an unknown one."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count
from geometries import Geometry, geometries, normals, random_axis, random_geometry, seeds
from hypothesis import example, given

import jaxconv_fc as fc
from jaxconv_fc.geometry.axis import Axis

COUNT = count("GEOMETRIES", 20)
CHUNKS = max(4, COUNT // 50)  # so that the workers of pytest-xdist share the work


# projection ------------------------------------------------------------------------------------------


# All taps read the one input there is: one singular value, and three that are 0 but for rounding.
ALIASED = Geometry((1, 1, 1), (1, 1, 4), (1,), [(155, 155)], padding_mode="edge")


@partial(jax.jit, static_argnums=0)
def projected(spec, matrix):
    return fc.kernel_from_matrix(spec, matrix), fc.conv_distance(spec, matrix)


# Padded, then dilated: taps meet, and others read only what lies between two inputs.
HOLES = Geometry((1, 1, 6), (1, 1, 3), (1,), [(4, 10)], (2,), (2,), padding_mode="edge")


@given(geometries(), seeds)
@example(ALIASED, 0)
@example(HOLES, 0)
def test_the_nearest_kernel_is_the_least_squares_solution(geometry, seed):
    rng = np.random.default_rng(seed)
    spec = geometry.spec()
    if math.prod(geometry.rhs_shape) > 60 or math.prod(spec.shape) > 3000:
        return
    target = normals(rng, spec.shape)
    units = np.eye(math.prod(geometry.rhs_shape)).reshape(-1, *geometry.rhs_shape)
    span = np.stack([oracle.matrix(unit, geometry).ravel() for unit in units], axis=1)
    want = oracle.pseudo_inverse(span) @ target.ravel()
    kernel, distance = projected(spec, target)
    np.testing.assert_allclose(kernel.ravel(), want, atol=1e-10)
    if target.size:
        off = np.linalg.norm(target.ravel() - span @ want) / np.linalg.norm(target)
        np.testing.assert_allclose(distance, off, atol=1e-7)


@given(geometries(), seeds)
def test_a_convolution_is_its_own_nearest_one(geometry, seed):
    kernel = normals(np.random.default_rng(seed), geometry.rhs_shape)
    spec, matrix = geometry.spec(), oracle.matrix(kernel, geometry)
    found, distance = map(np.asarray, projected(spec, matrix))
    np.testing.assert_allclose(oracle.matrix(found, geometry), matrix, atol=1e-12)
    assert distance < 1e-13


def test_a_tap_that_never_meets_an_input_comes_back_as_zero():
    spec = fc.conv_spec((1, 1, 1), (1, 1, 3), (1,), "SAME")
    kernel = fc.kernel_from_matrix(spec, fc.as_matrix(spec, jnp.array([[[1.0, 2.0, 3.0]]])))
    np.testing.assert_array_equal(kernel, [[[0, 2, 0]]])


def test_distances_of_zero_and_of_nothing():
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    assert fc.conv_distance(spec, jnp.zeros(spec.shape)) == 0
    assert fc.conv_distance(spec, jnp.ones(spec.shape, jnp.int32)) > 0.5
    assert (jax.grad(partial(fc.conv_distance, spec))(jnp.zeros(spec.shape)) == 0).all()
    empty = fc.conv_spec((1, 1, 1), (1, 1, 2), (1,), "VALID")
    assert fc.conv_distance(empty, jnp.zeros(empty.shape)) == 0


def test_the_distance_of_a_matrix_summed_in_several_blocks(rng):
    """Rows are made 2**20 entries at a time; the last block overlaps the one before it."""
    spec = fc.conv_spec((1, 1, 1300), (1, 1, 3), (1,), "SAME")
    matrix = normals(rng, spec.shape)
    kernel = np.array([np.trace(matrix, k) / (1300 - abs(k)) for k in (-1, 0, 1)])
    nearest = sum(np.diag(np.full(1300 - abs(k), v), k) for k, v in zip((-1, 0, 1), kernel, strict=True))
    np.testing.assert_allclose(np.ravel(fc.kernel_from_matrix(spec, matrix)), kernel, rtol=1e-9)
    want = np.linalg.norm(matrix - nearest) / np.linalg.norm(matrix)
    np.testing.assert_allclose(fc.conv_distance(spec, matrix), want, rtol=1e-12)
    # nearly all of the difference in rows that two blocks have in common
    corner = np.zeros(spec.shape)
    corner[600:700, 0] = 1
    np.testing.assert_allclose(fc.conv_distance(spec, corner), 1, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_distances_in_half_precision_do_not_overflow(dtype):
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    matrix = jnp.zeros(spec.shape, dtype).at[0, 3].set(300)  # whose square float16 does not hold
    assert fc.conv_distance(spec, matrix) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_detection_in_half_precision_keeps_entries_a_twentieth_of_the_largest(dtype):
    """64 roundings of bfloat16 are a half: smaller entries counted as 0, and two channels as two groups."""
    spec = fc.conv_spec((1, 2, 4), (2, 2, 3), (1,), "SAME")
    kernel = jnp.array([[[1, 20, 3], [4, 1, 1]], [[2, 3, 1], [1, 20, 2]]], dtype)
    found, got = fc.detect_conv(fc.as_matrix(spec, kernel), spec.in_shape, spec.out_shape)
    assert found == spec
    np.testing.assert_array_equal(got, kernel)


def test_neither_projection_nor_distance_makes_a_second_matrix():
    spec = fc.conv_spec((1, 4, 40, 40), (4, 4, 3, 3), (1, 1), "SAME")
    like = jax.ShapeDtypeStruct(spec.shape, jnp.float32)
    for function in (fc.matrix_vjp, fc.kernel_from_matrix, fc.conv_distance):
        memory = jax.jit(function).lower(spec, like).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.3 * math.prod(spec.shape) * 4, function.__name__


# detection -------------------------------------------------------------------------------------------


def random_plain(rng):
    """A zeros-mode geometry in (channels, spatial...) order, with rows and columns."""
    while True:
        geometry = random_geometry(rng, modes=("zeros",))
        spec = geometry.spec()
        if geometry.dimension_numbers is None and geometry.batch_group_count == 1 and 0 not in spec.shape:
            return geometry


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_detection_recovers_convolutions(chunk, run_seed):
    for i in range(chunk, COUNT // 5, CHUNKS):
        rng = np.random.default_rng([run_seed, i, 5])
        geometry = random_plain(rng)
        spec, kernel = geometry.spec(), normals(rng, geometry.rhs_shape)
        matrix = oracle.matrix(kernel, geometry)
        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {geometry}"
        found = fc.detect_conv(matrix, spec.in_shape, spec.out_shape)
        assert found is not None, replay
        np.testing.assert_allclose(fc.as_matrix(*found), matrix, atol=1e-12, err_msg=replay)
        assert math.prod(found[0].rhs_shape) <= math.prod(spec.rhs_shape), replay


def test_detection_in_other_layouts(rng):
    """The spec and the kernel come back in the layouts that were asked for."""
    layouts = [("NHWC", "HWIO", "NHWC"), ("NHWC", "OIHW", "NCHW"), ("CWNH", "IWOH", "HNCW")]
    for i, numbers in enumerate(layouts):
        lhs = [{"N": 1, "C": 4, "H": 5, "W": 6}[c] for c in numbers[0]]
        rhs = [{"O": 2, "I": 2, "H": 3, "W": 2}[c] for c in numbers[1]]
        spec = fc.conv_spec(lhs, rhs, (1, 2), [(1, 0), (0, 1)], None, None, numbers, 2)
        kernel = jnp.asarray(rng.standard_normal(spec.rhs_shape))
        matrix = fc.as_matrix(spec, kernel)
        found = fc.detect_conv(matrix, spec.in_shape, spec.out_shape, dimension_numbers=numbers)
        assert found is not None, i
        assert found[0].dimension_numbers == spec.dimension_numbers
        assert (found[0].lhs_shape, found[0].feature_group_count) == (spec.lhs_shape, 2)
        np.testing.assert_allclose(fc.as_matrix(*found), matrix, atol=1e-12)
        if found[0].rhs_shape == spec.rhs_shape:
            np.testing.assert_allclose(found[1], kernel, atol=1e-12)
        assert fc.nearest_conv(matrix, spec.in_shape, spec.out_shape, dimension_numbers=numbers)[2] < 1e-12
    with pytest.raises(ValueError, match="dimension_numbers"):
        fc.detect_conv(matrix, spec.in_shape, spec.out_shape, dimension_numbers=("NHWC", "HWIO"))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_detection_says_no_to_other_matrices(chunk, run_seed):
    for i in range(chunk, COUNT // 5, CHUNKS):
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


# errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: fc.kernel_from_matrix(s, jnp.ones((4, 4))), ValueError, r"matrix must have .*\(3, 4\)"),
        (lambda s: fc.conv_distance(s, None), TypeError, "matrix must be a jax or NumPy array"),
        (lambda s: fc.detect_conv(jnp.ones((3, 4)), (1, 4), (1, 3, 1)), ValueError, "same rank"),
        (lambda s: fc.detect_conv(jnp.ones((3, 4)), (1, 5), (1, 3)), ValueError, r"\(3, 5\)"),
        (
            lambda s: jax.jit(lambda m: fc.detect_conv(m, (1, 4), (1, 3)))(jnp.ones((3, 4))),
            TypeError,
            "concrete",
        ),
    ],
)
def test_bad_inputs_are_named(call, error, message):
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    with pytest.raises(error, match=message):
        call(spec)


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
        spec, _, _ = fc.nearest_conv(matrix, (1, n), (1, m), tol=1e-13)
        assert spec.axes == (full_search(matrix, 1e-13),), (kind, matrix)


def test_detection_prefers_the_smaller_sum_of_steps():
    """(2, 1) and (1, 3) fit one entry alike, and both need one tap."""
    matrix = np.zeros((4, 3))
    matrix[2, 1] = 1
    spec, _, _ = fc.nearest_conv(matrix, (1, 3), (1, 4))
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

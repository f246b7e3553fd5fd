"""The nearest convolution of a known geometry, and detection of an unknown one."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count
from geometries import Geometry, geometries, normals, seeds
from hypothesis import example, given

import jaxconv_fc as fc

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


def test_neither_projection_nor_distance_makes_a_second_matrix():
    spec = fc.conv_spec((1, 4, 40, 40), (4, 4, 3, 3), (1, 1), "SAME")
    like = jax.ShapeDtypeStruct(spec.shape, jnp.float32)
    for function in (fc.matrix_vjp, fc.kernel_from_matrix, fc.conv_distance):
        memory = jax.jit(function).lower(spec, like).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.3 * math.prod(spec.shape) * 4, function.__name__


# errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: fc.kernel_from_matrix(s, jnp.ones((4, 4))), ValueError, r"matrix must have .*\(3, 4\)"),
        (lambda s: fc.conv_distance(s, None), TypeError, "matrix must be a jax or NumPy array"),
    ],
)
def test_bad_inputs_are_named(call, error, message):
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    with pytest.raises(error, match=message):
        call(spec)

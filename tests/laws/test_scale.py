"""The law of scale: ``f(2**e * a) == 2**(degree*e) * f(a)``, bit for bit, if the result is representable.

Other files compare the functions with NumPy at scale 1. Here other scales are compared with scale 1.
"""

import math
from functools import partial

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count, numbers

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum

NUMBERS = numbers(count("GEOMETRIES", 1), 5)  # float32 and float64 in turn, and from run to run
SPREAD = {"float32": (-120, -63, 1, 62, 120), "float64": (-1000, -520, 1, 515, 1000)}


def norms(spec, kernel, y, matrix):
    """Of degree 1 in the kernel."""
    return {
        "frobenius_norm": spectrum.frobenius_norm(spec, kernel),
        "one_norm": spectrum.one_norm(spec, kernel),
        "inf_norm": spectrum.inf_norm(spec, kernel),
        "row_norms": spectrum.row_norms(spec, kernel),
        "column_norms": spectrum.column_norms(spec, kernel),
        "row_norms 1": spectrum.row_norms(spec, kernel, ord=1),
        "column_norms 1": spectrum.column_norms(spec, kernel, ord=1),
        "trace": spectrum.trace(spec, kernel),
    }


def searches(spec, kernel, y, matrix):
    """Of degree 1 in the kernel."""
    triplet = spectrum.singular_triplet(spec, kernel)
    start = spectrum.start_vector(spec, kernel.dtype, jax.random.key(0))
    return {
        "power_step": spectrum.power_step(spec, kernel, start).sigma,
        "spectral_norm": spectrum.spectral_norm(spec, kernel),
        "spectral_norm_bounds": spectrum.spectral_norm_bounds(spec, kernel),
        "top_singular_values": spectrum.top_singular_values(spec, kernel, min(2, *spec.shape)),
        "singular_values": spectrum.singular_values(spec, kernel),
        "singular_triplet": (triplet.value, triplet.residual),
    }


def ratios(spec, kernel, y, matrix):
    """Of degree 0 in the kernel, and in the matrix."""
    triplet = spectrum.singular_triplet(spec, kernel)
    return {
        "condition_number": spectrum.condition_number(spec, kernel),
        "rank": spectrum.rank(spec, kernel),
        "vectors": (triplet.left, triplet.right),
        "conv_distance": fc.conv_distance(spec, matrix),
    }


def solutions(spec, kernel, y, matrix):
    """Of degree -1 in the kernel and 1 in y."""
    found = {
        "pseudo_inverse": spectrum.pseudo_inverse(spec, kernel, y),
        "lstsq": spectrum.lstsq(spec, kernel, y, max_steps=8),
    }
    if spec.in_size == spec.out_size:
        found["solve"] = spectrum.solve(spec, kernel, y)
    return found


def gradients(spec, kernel, y, matrix):
    """Of degree 1 in the input, which is a row of the matrix, and 1 in y."""
    x = matrix[:1].reshape(1, *spec.in_shape)
    return {"gradient_norms": fc.curvature.gradient_norms(spec, x, y[None])}


LAWS = {gradients: (1, 1), norms: (1, 0), searches: (1, 0), ratios: (0, 0), solutions: (-1, 1)}


def assert_scaled(got, want, exponent, name):
    """``got == 2**exponent * want`` where that is a normal number, and infinite where it is too large."""
    got, want = np.asarray(got), np.asarray(want)
    with np.errstate(over="ignore", under="ignore"):
        want = np.ldexp(want, exponent) if exponent else want
    info = np.finfo(want.dtype) if want.dtype.kind == "f" else None
    normal = np.abs(want) >= info.tiny if info else np.ones(want.shape, bool)
    if "bounds" in name:  # rounded to the largest number, not to infinity
        normal &= np.isfinite(want)
    np.testing.assert_array_equal(got[normal], want[normal], err_msg=name)
    if info:
        assert (np.abs(got[~normal & (np.abs(want) < 1)]) <= info.tiny).all(), name


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("number", NUMBERS)
def test_the_law_of_scale(run_seed, number, law):
    """float32 without x64, where nothing is widened on the way."""
    dtype = ("float32", "float64")[(number + run_seed) % 2]
    with jax.enable_x64(dtype == "float64"):
        check_law(run_seed, number, law, dtype)


def check_law(run_seed, number, law, dtype):
    rng = np.random.default_rng([run_seed, number, 11])
    geometry = geometries.random_geometry(rng)
    while 0 in geometry.spec().shape or max(geometry.spec().shape) > 150:
        geometry = geometries.random_geometry(rng)
    spec = geometry.spec()
    shapes = geometry.rhs_shape, spec.out_shape, spec.shape

    def values(shape):  # normal numbers at every scale
        return (rng.choice([-1.0, 1.0], shape) * rng.uniform(1, 32, shape) / 16).astype(dtype)

    kernel, y, matrix = map(values, shapes)
    program = jax.jit(law)
    base = program(spec, kernel, y, matrix)
    of_kernel, of_y = LAWS[law]
    for e in SPREAD[dtype]:
        f = -e // 2 if of_y else 0
        scaled = program(spec, np.ldexp(kernel, e), np.ldexp(y, f), np.ldexp(matrix, e))
        for name, want in base.items():
            replay = f"{name}, e = {e}, JAXCONV_FC_SEED={run_seed}, number {number}: {geometry}"
            for a, b in zip(jax.tree.leaves(scaled[name]), jax.tree.leaves(want), strict=True):
                assert_scaled(a, b, of_kernel * e + of_y * f, replay)


SPEC = fc.conv_spec((1, 2, 4, 4), (2, 2, 3, 3), (1, 1), "SAME")


def kernels(dtype="float32"):
    rng = np.random.default_rng(5)
    return rng.uniform(0.5, 2, SPEC.rhs_shape).astype(dtype), rng.normal(size=SPEC.out_shape).astype(dtype)


@pytest.mark.parametrize("scale", [1e-20, 1e18, 1e-37])
def test_norms_of_small_and_large_kernels_are_right(scale):
    """The norms were 0, and the bounds (0, 0) or (0, inf)."""
    kernel = (kernels()[0] * np.float32(scale)).astype(np.float32)
    exact = np.linalg.norm(oracle.matrix(kernel.astype(float), SPEC), 2)
    with jax.enable_x64(False):
        np.testing.assert_allclose(spectrum.spectral_norm(SPEC, kernel), exact, rtol=1e-5)
        np.testing.assert_allclose(spectrum.top_singular_values(SPEC, kernel, 2)[0], exact, rtol=1e-5)
        lower, upper = map(float, spectrum.spectral_norm_bounds(SPEC, kernel))
    assert 0.9 * exact < lower <= exact <= upper < 1.1 * exact


def test_bounds_at_the_ends_of_the_range_are_rounded_outward():
    tiny, huge = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    for kernel in (np.full(SPEC.rhs_shape, tiny / 8, np.float32), np.full(SPEC.rhs_shape, huge, np.float32)):
        exact = np.linalg.norm(oracle.matrix(kernel.astype(float), SPEC), 2)
        lower, upper = map(float, spectrum.spectral_norm_bounds(SPEC, kernel))
        assert lower <= exact <= upper


def test_a_tap_that_reads_no_input_does_not_set_the_scale():
    spec = fc.conv_spec((1, 1, 1), (1, 1, 3), (1,), "SAME")
    kernel = jnp.array([[[1e30, 1e-5, jnp.nan]]], jnp.float32)
    for function in (spectrum.frobenius_norm, spectrum.spectral_norm, spectrum.one_norm):
        np.testing.assert_allclose(function(spec, kernel), 1e-5, rtol=1e-6)
    np.testing.assert_allclose(spectrum.spectral_norm_bounds(spec, kernel), 1e-5, rtol=1e-4)


@pytest.mark.parametrize("exponent", [-600, 600])
def test_the_logarithm_of_a_determinant_at_any_scale(exponent):
    spec = fc.conv_spec((1, 1, 5), (1, 1, 3), (1,), "SAME")
    kernel = np.ldexp(np.array([[[-1.0, 2, -1]]]), exponent)
    want = math.log(6) + 5 * exponent * math.log(2)
    np.testing.assert_allclose(spectrum.log_abs_det(spec, kernel), want, rtol=1e-14)
    slope = jax.grad(lambda k: spectrum.log_abs_det(spec, k))(jnp.asarray(kernel))
    near = jax.grad(lambda k: spectrum.log_abs_det(spec, k))(jnp.array([[[-1.0, 2, -1]]]))
    np.testing.assert_allclose(slope, np.ldexp(near, -exponent), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3e9, 1e18])
def test_the_residual_of_orthogonality_is_right_or_infinite(scale):
    """At 1e20 it was 0."""
    kernel = (kernels()[0] * scale).astype(np.float32)
    matrix = oracle.matrix(kernel.astype(float), SPEC)
    want = np.linalg.norm(matrix @ matrix.T - np.eye(len(matrix)))
    np.testing.assert_allclose(spectrum.orthogonality_residual(SPEC, kernel), want, rtol=1e-5)
    beyond = (kernels()[0] * 1e20).astype(np.float32)
    assert spectrum.orthogonality_residual(SPEC, beyond) == np.inf


def test_least_squares_do_not_stop_early_for_a_small_right_side():
    """The tolerance was absolute: 20 % off for y * 1e-6."""
    kernel, y = kernels()
    near = spectrum.lstsq(SPEC, kernel, y, max_steps=60)
    for exponent in (-100, -20, 100):
        far = spectrum.lstsq(SPEC, kernel, np.ldexp(y, exponent), max_steps=60)
        np.testing.assert_array_equal(far, np.ldexp(np.asarray(near), exponent))


@pytest.mark.parametrize("scale", [1e-21, 1e-30, 1e20, 1e37])
def test_noise_is_no_convolution_at_any_scale(scale):
    """Where squares vanished the distance was 0."""
    noise = (np.random.default_rng(0).standard_normal((6, 8)) * scale).astype(np.float32)
    assert fc.detect_conv(noise, (1, 8), (1, 6)) is None
    spec = fc.conv_spec((1, 1, 8), (1, 1, 3), (1,), "VALID")
    assert fc.conv_distance(spec, noise) > 0.1
    matrix = fc.as_matrix(spec, jnp.asarray(np.array([[[1, 2, 3]]]) * scale, jnp.float32))
    found = fc.detect_conv(matrix, (1, 8), (1, 6))
    assert found is not None
    np.testing.assert_allclose(fc.as_matrix(*found), matrix, rtol=1e-6)


def test_detection_in_double_precision_at_the_ends_of_the_range():
    for scale in (1e-307, 1e307):
        noise = np.random.default_rng(0).standard_normal((6, 8)) * scale
        assert fc.detect_conv(noise, (1, 8), (1, 6)) is None
        spec = fc.conv_spec((1, 1, 8), (1, 1, 3), (1,), "VALID")
        matrix = fc.as_matrix(spec, jnp.array([[[1.0, 2, 3]]]) * scale)
        assert fc.detect_conv(matrix, (1, 8), (1, 6)) is not None


@pytest.mark.parametrize("exponent", [-90, -63, 63, 90])
def test_the_radius_at_any_scale(exponent):
    """Of degree 1 in x and the bias together, and of degree 0 in a layer."""
    rng = np.random.default_rng(3)
    weights, bias, x = (jnp.asarray(rng.uniform(1, 2, s), jnp.float32) for s in ((5, 4), (5,), (4,)))
    factor = jnp.asarray(2.0**exponent, jnp.float32)

    def radius(weights, bias, x):
        return fc.local_affine(lambda x: jax.nn.relu(weights @ x - 3 * bias), x).radius

    near = radius(weights, bias, x)
    assert 0 < near < np.inf
    np.testing.assert_allclose(radius(weights, bias * factor, x * factor), near * factor, rtol=1e-6)
    np.testing.assert_allclose(radius(weights * factor, bias * factor, x), near, rtol=1e-6)


def test_gradients_of_norms_do_not_depend_on_the_scale():
    functions = (
        spectrum.frobenius_norm, spectrum.inf_norm, spectrum.spectral_norm,
        lambda s, k: spectrum.row_norms(s, k).sum(), lambda s, k: spectrum.spectral_norm_bounds(s, k)[1],
    )  # fmt: skip
    slopes = jax.jit(lambda k: [jax.grad(partial(f, SPEC))(k) for f in functions])
    near = slopes(kernels()[0])
    for exponent in (-120, 115):
        for got, want in zip(slopes(np.ldexp(kernels()[0], exponent)), near, strict=True):
            np.testing.assert_array_equal(got, want)

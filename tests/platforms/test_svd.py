"""Singular values by LAPACK and by eigenvalues: both forms run here, on the CPU, against NumPy."""

from functools import partial

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum
from jaxconv_fc.products.platforms import PLATFORMS
from jaxconv_fc.spectrum import svd

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]
SHAPES = [(1, 1), (1, 4), (5, 1), (3, 3), (6, 4), (4, 7)]


@pytest.fixture
def by_eigenvalues(monkeypatch):
    """The form of GPU and TPU, forced on the CPU."""
    gpu = PLATFORMS["gpu"]
    forms = PLATFORMS["cpu"]._replace(svd=gpu.svd, singular_values=gpu.singular_values)
    monkeypatch.setitem(PLATFORMS, "cpu", forms)
    jax.clear_caches()
    yield
    jax.clear_caches()


def batch(rng, shape, dtype):
    """Three matrices: of full rank, of rank 1 (if it is not full), and 0."""
    full = geometries.normals(rng, shape, dtype)
    left, right = (geometries.normals(rng, (n, 1), dtype) for n in shape)
    return np.stack([full, left @ right.T, np.zeros_like(full)])


@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_against_numpy(shape, rng):
    stacks = [batch(rng, shape, dtype) for dtype in DTYPES]
    forms = PLATFORMS["cpu"].svd, PLATFORMS["gpu"].svd
    made = jax.jit(lambda stacks: [[form(matrices) for form in forms] for matrices in stacks])(stacks)
    for matrices, of_both in zip(stacks, made, strict=True):
        check_decompositions(matrices, of_both)


def check_decompositions(matrices, decompositions):
    dtype = matrices.dtype
    want = np.linalg.svd(oracle.wide(matrices), compute_uv=False)
    eps = 20 * np.finfo(dtype).eps * want.max()
    for made in decompositions:
        left, values, right = map(np.asarray, made)
        assert (left.dtype, right.dtype, values.dtype) == (dtype, dtype, np.finfo(dtype).dtype)
        np.testing.assert_allclose(values, want, rtol=0, atol=eps)
        assert (np.diff(values) <= 0).all()
        np.testing.assert_allclose((left * values[:, None]) @ right, matrices, rtol=0, atol=eps)
        for u in (left[0], right[0].conj().T):  # orthonormal where all values are far from 0
            np.testing.assert_allclose(u.conj().T @ u, np.eye(u.shape[1]), rtol=0, atol=eps / want[0].min())


def test_a_matrix_that_is_not_finite_gives_nan_and_the_others_do_not(rng):
    for bad in (np.nan, np.inf):
        matrices = batch(rng, (3, 2), np.float64)
        matrices[1, 2, 0] = bad
        for form in (PLATFORMS["cpu"].svd, PLATFORMS["gpu"].svd):
            nan = np.isnan(form(jnp.asarray(matrices)).values)
            np.testing.assert_array_equal(nan, [[False] * 2, [True] * 2, [False] * 2])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 3), complex), ((5, 1), complex), ((4, 7), complex), ((6, 4), float)]
)
def test_derivatives_are_those_of_jax(shape, dtype, rng, by_eigenvalues):
    a, change = (jnp.asarray(geometries.normals(rng, shape, dtype)) for _ in range(2))
    plain = partial(jnp.linalg.svd, compute_uv=False)

    def derivatives(of, a, change):
        gradient = jax.grad(lambda a: jnp.sum(of(a) ** 3 * jnp.arange(1.0, min(shape) + 1)))
        return *jax.jvp(of, (a,), (change,)), gradient(a)

    of_both = jax.jit(lambda *given: [derivatives(of, *given) for of in (svd.singular_values, plain)])
    for got, want in zip(*of_both(a, change), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_second_derivatives(rng):
    """On the CPU, where jax.hessian of jnp.linalg.svd has them too."""
    a = jnp.asarray(geometries.normals(rng, (2, 3), np.float64))
    of, plain = (
        jax.jit(jax.hessian(lambda a, f=f: jnp.sum(f(a) ** 3)))(a)
        for f in (svd.singular_values, partial(jnp.linalg.svd, compute_uv=False))
    )
    np.testing.assert_allclose(of, plain, rtol=1e-8, atol=1e-8)


def test_values_that_are_equal_have_the_derivative_of_their_sum(by_eigenvalues):
    slope = jax.grad(lambda a: svd.singular_values(a).sum())(jnp.eye(4) * 3)
    np.testing.assert_allclose(slope, np.eye(4), atol=1e-12)


def test_a_derivative_at_zero_is_a_subgradient(rng, by_eigenvalues):
    """Of the sum of the values, at a matrix of rank 1: u v^T, and a rest of norm 1 at most."""
    u, v = (np.linalg.qr(rng.standard_normal((4, 4)))[0][:, :1] for _ in range(2))
    slope = np.asarray(jax.grad(lambda a: svd.singular_values(a).sum())(jnp.asarray(2 * u @ v.T)))
    np.testing.assert_allclose(slope @ v, u, atol=1e-12)
    assert np.linalg.norm(slope, 2) < 1 + 1e-12


# through the public functions ------------------------------------------------------------------------

LAYERS = {
    "circular": ((1, 3, 4, 6), (2, 3, 3, 3), (1, 1), "circular", 1),
    "stride 2": ((1, 2, 8), (4, 2, 3), (2,), "circular", 1),
    "groups": ((1, 4, 5), (4, 2, 3), (1,), "zeros", 2),
    "dense": ((1, 2, 3, 4), (3, 2, 2, 2), (1, 1), "edge", 1),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("circular", "float32"),
        ("dense", "complex64"),
        pytest.param("stride 2", "complex128", marks=pytest.mark.long),
        pytest.param("groups", "float64", marks=pytest.mark.long),
    ],
)
def test_the_public_functions(name, dtype, rng, by_eigenvalues):
    lhs_shape, rhs_shape, strides, mode, groups = LAYERS[name]
    spec = fc.conv_spec(lhs_shape, rhs_shape, strides, "SAME", padding_mode=mode, feature_group_count=groups)
    kernel = jnp.asarray(geometries.normals(rng, rhs_shape, dtype))
    y = jnp.asarray(geometries.normals(rng, spec.out_shape, dtype))
    matrix = oracle.wide(oracle.matrix(np.asarray(kernel), spec))
    want = np.linalg.svd(matrix, compute_uv=False)
    eps = 100 * float(np.finfo(dtype).eps) * want[0]
    close = partial(np.testing.assert_allclose, rtol=0, atol=eps)

    @jax.jit
    def results(kernel, y):
        return {
            "values": spectrum.singular_values(spec, kernel),
            "largest": spectrum.top_singular_values(spec, kernel, 3),
            "norm": spectrum.spectral_norm(spec, kernel, tolerance=1e-4),
            "rank": spectrum.rank(spec, kernel),
            "condition": spectrum.condition_number(spec, kernel),
            "solution": spectrum.pseudo_inverse(spec, kernel, y),
            "slope": jax.grad(lambda k: jnp.sum(spectrum.singular_values(spec, k) ** 2))(kernel),
            "slope of all": jax.grad(lambda k: spectrum.frobenius_norm(spec, k) ** 2)(kernel),
        }

    got = results(kernel, y)
    close(got["values"], want)
    close(got["largest"], want[:3])
    close(got["norm"], want[0], atol=1e-6 * want[0])
    assert got["rank"] == np.linalg.matrix_rank(matrix)
    assert abs(float(got["condition"]) * want[-1] / want[0] - 1) < eps / want[-1]
    inverse = np.linalg.pinv(matrix) @ oracle.wide(y).ravel()
    close(np.ravel(got["solution"]), inverse, atol=10 * eps * np.abs(inverse).max() / want[-1])
    small = results(kernel * jnp.asarray(2.0**-100, dtype), y)["values"]
    np.testing.assert_array_equal(small, got["values"] * 2.0**-100)
    close(got["slope"], got["slope of all"], atol=10 * eps * want[0])
    assert np.isnan(results(kernel * jnp.asarray(np.nan, dtype), y)["values"]).all()


def test_a_matrix_with_many_values_of_zero(by_eigenvalues):
    spec = fc.conv_spec((1, 3, 40), (3, 3, 1), (1,), "VALID")
    kernel = jnp.asarray(np.outer([1.0, 2, 2], [2.0, 1, 2])[..., None])
    np.testing.assert_allclose(spectrum.singular_values(spec, kernel), [9] * 40 + [0] * 80, atol=1e-12)
    np.testing.assert_allclose(spectrum.top_singular_values(spec, kernel, 2), [9, 9], rtol=1e-12)
    assert not spectrum.top_singular_values(spec, jnp.zeros_like(kernel), 2).any()
    assert spectrum.spectral_norm(spec, jnp.zeros_like(kernel)) == 0


BLOCKS = fc.conv_spec((1, 40, 8), (40, 40, 3), (1,), "SAME", padding_mode="circular")
EXPORTED = {
    "singular_values": lambda k, y: spectrum.singular_values(BLOCKS, k),
    "their gradient": lambda k, y: jax.grad(lambda k: spectrum.singular_values(BLOCKS, k).sum())(k),
    "condition_number": lambda k, y: spectrum.condition_number(BLOCKS, k),
    "rank": lambda k, y: spectrum.rank(BLOCKS, k),
    "pseudo_inverse": lambda k, y: spectrum.pseudo_inverse(BLOCKS, k, y),
    "spectral_norm": lambda k, y: spectrum.spectral_norm(BLOCKS, k),
    "top_singular_values": lambda k, y: spectrum.top_singular_values(BLOCKS, k, 2),
}


@pytest.mark.parametrize("of", EXPORTED.values(), ids=EXPORTED)
def test_no_svd_in_the_program_of_a_gpu(of):
    """cuSOLVER has no SVD of a batch beyond 32 x 32, and the TPU compiler takes long for one."""
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (BLOCKS.rhs_shape, BLOCKS.out_shape)]
    traced = jax.jit(of).trace(*like)
    for platform, solver in (("cuda", "syevd"), ("rocm", "syevd"), ("tpu", "Eigh"), ("cpu", "gesdd")):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert solver in program
        assert platform == "cpu" or "gesv" not in program
        assert platform == "cpu" or "gesdd" not in program

"""The power method one step at a time, against NumPy's prediction of every step."""

from functools import partial

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import rarely
from spectra import conv, drawn, every_number, layer

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum

STEPS = 60


@every_number
def test_every_step_is_as_predicted(run_seed, number):
    """With ``v = sum c_i v_i`` of the singular vectors, ``u`` of step k is ``sum c_i sigma_i**(2k - 1) u_i``.

    So ``sigma**2`` is the mean of the sigma_i**2 with the weights ``|c_i|**2 sigma_i**(4k - 2)``.
    """
    spec, kernel, _, matrix, name = drawn(run_seed, number)
    v = spectrum.start_vector(spec, kernel.dtype, jax.random.key(number))
    np.testing.assert_allclose(np.linalg.norm(v), float(spec.in_size > 0), rtol=1e-12, err_msg=name)
    step = jax.jit(partial(spectrum.power_step, spec, kernel))
    if not matrix.any():
        sigma, after = step(v)
        assert sigma == 0, name
        np.testing.assert_array_equal(after, v, err_msg=name)
        return
    _, values, rights = np.linalg.svd(matrix, full_matrices=False)
    shares = np.abs(rights @ np.ravel(v)) ** 2
    relative = values / values[0]
    for k in range(1, STEPS + 1):
        sigma, v = step(v)
        weights = shares * relative ** (4 * k - 2)
        want = values[0] * np.sqrt((weights * relative**2).sum() / weights.sum())
        np.testing.assert_allclose(sigma, want, rtol=1e-9, err_msg=f"{name}, step {k}")
    assert sigma <= values[0] * (1 + 1e-12), name
    others = relative[relative < 1 - 1e-9]
    gap_allows_it = (shares[1:].sum() / shares[0]) * max(others, default=0) ** (4 * STEPS - 2) < 1e-3
    assert not gap_allows_it or sigma >= values[0] * (1 - 1e-3), name


@pytest.mark.parametrize(("mode", "groups"), [rarely("zeros", 1), ("reflect", 2)])
def test_the_gradient_is_that_of_the_norm_at_convergence(mode, groups):
    spec, kernel = layer(mode, groups)
    v = spectrum.start_vector(spec, kernel.dtype, jax.random.key(0))
    v = jax.lax.fori_loop(0, 3000, lambda _, v: spectrum.power_step(spec, kernel, v).v, v)
    sigma, slope = jax.value_and_grad(lambda k: spectrum.power_step(spec, k, v).sigma)(kernel)
    want, want_slope = jax.value_and_grad(partial(spectrum.spectral_norm, spec))(kernel)
    np.testing.assert_allclose(sigma, want, rtol=1e-10)
    np.testing.assert_allclose(slope, want_slope, atol=1e-5)


@pytest.mark.parametrize("dtype", [rarely(float), complex])
def test_the_derivative_holds_the_vectors_constant(dtype):
    """``d sigma = Re(u^H dM v')`` with the vectors of the step, forward and reverse; none in v, nor of v'."""
    spec, _ = layer()
    rng = np.random.default_rng(0)
    kernel, change = (jnp.asarray(geometries.normals(rng, spec.rhs_shape, dtype)) for _ in range(2))
    v = spectrum.start_vector(spec, dtype, jax.random.key(1))
    matrix, moved = (np.asarray(fc.as_matrix(spec, k)) for k in (kernel, change))
    left = matrix @ np.ravel(v)
    left /= np.linalg.norm(left)
    right = matrix.conj().T @ left
    right /= np.linalg.norm(right)
    want = (left.conj() @ moved @ right).real
    (sigma, after), (slope, none) = jax.jvp(
        lambda k, v: spectrum.power_step(spec, k, v), (kernel, v), (change, jnp.ones_like(v))
    )
    np.testing.assert_allclose(sigma, np.linalg.norm(matrix.conj().T @ left), rtol=1e-12)
    np.testing.assert_allclose(np.ravel(after), right, atol=1e-12)
    np.testing.assert_allclose(slope, want, rtol=1e-12)
    assert not none.any()
    back = jax.grad(lambda k: spectrum.power_step(spec, k, v).sigma)(kernel)
    np.testing.assert_allclose(jnp.sum(back * change).real, want, rtol=1e-12)


def test_many_vectors_and_kernels_by_vmap():
    spec, kernel = layer()
    vs = jnp.stack([spectrum.start_vector(spec, kernel.dtype, jax.random.key(i)) for i in range(3)])
    kernels = jnp.stack([kernel, 2 * kernel, -kernel])
    many = jax.jit(jax.vmap(partial(spectrum.power_step, spec)))(kernels, vs)
    for i in range(3):
        for a, b in zip(many, spectrum.power_step(spec, kernels[i], vs[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [rarely(float), complex])
def test_a_block_is_turned_into_singular_vectors(dtype):
    """sigma: the singular values of M^H P, for an orthonormal basis P of all M v. No vector does better."""
    rng = np.random.default_rng(4)
    spec = fc.conv_spec((1, 2, 5, 4), (3, 2, 3, 3), (1, 1), "SAME")
    kernel, change = (jnp.asarray(geometries.normals(rng, spec.rhs_shape, dtype)) for _ in range(2))
    matrix, moved = (np.asarray(fc.as_matrix(spec, k)) for k in (kernel, change))
    start = np.asarray(spectrum.start_vector(spec, dtype, jax.random.key(0), k=4))
    block = jnp.asarray(start * np.logspace(-200, 99, 4).reshape(4, 1, 1, 1))
    step = jax.jit(partial(spectrum.power_step, spec))
    (sigma, after), (slope, none) = jax.jvp(lambda k: step(k, block), (kernel,), (change,))
    basis = np.linalg.qr(matrix @ np.reshape(start, (4, -1)).T)[0]
    left, want, _ = np.linalg.svd(basis.conj().T @ matrix, full_matrices=False)
    np.testing.assert_allclose(sigma, want, rtol=1e-12)
    right = np.asarray(after).reshape(4, -1).T
    np.testing.assert_allclose(right.conj().T @ right, np.eye(4), atol=1e-13)
    left = basis @ left
    phases = np.sum(left.conj() * (matrix @ right), 0)
    left *= phases / abs(phases)
    np.testing.assert_allclose(matrix.conj().T @ left, want * right, atol=1e-11)
    np.testing.assert_allclose(slope, np.sum(left.conj() * (moved @ right), 0).real, rtol=1e-9)
    assert not none.any()
    assert sigma[0] >= max(spectrum.power_step(spec, kernel, v).sigma for v in block) * (1 - 1e-12)
    for _ in range(100):
        sigma, after = step(kernel, after)
    np.testing.assert_allclose(sigma[:2], np.linalg.svd(matrix, compute_uv=False)[:2], rtol=1e-9)
    zero, kept = step(jnp.zeros_like(kernel), after)
    assert not zero.any()
    np.testing.assert_array_equal(kept, after)
    for k, message in ((0, "a block of 0"), (41, "M has 40 singular values")):
        with pytest.raises(ValueError, match=message):
            spectrum.power_step(spec, kernel, jnp.ones((k, *spec.in_shape), dtype))
    assert spectrum.start_vector(spec, dtype, jax.random.key(0), k=99).shape == (40, 2, 5, 4)


def test_a_block_follows_the_norm_where_singular_values_change_places():
    """From one kernel to another in 120 steps: one vector lags by more than 5 percent, 16 by less than 1."""
    spec = fc.conv_spec((1, 4, 6, 6), (6, 4, 3, 3), (1, 1), "SAME")
    ends = np.random.default_rng(0).standard_normal((2, *spec.rhs_shape))
    block, worst = spectrum.start_vector(spec, ends.dtype, jax.random.key(0), k=16), np.zeros(2)
    one, step = block[0], jax.jit(partial(spectrum.power_step, spec))
    for number in range(140):  # the first 20 stand still
        t = max(0, number - 20) / 120
        kernel = (1 - t) * ends[0] + t * ends[1]
        (many, block), (alone, one) = step(kernel, block), step(kernel, one)
        if number % 5 == 0 and number >= 20:
            norm = np.linalg.norm(fc.as_matrix(spec, kernel), 2)
            worst = np.maximum(worst, 1 - np.array([many[0], alone]) / norm)
    assert worst[0] < 0.01 < 0.05 < worst[1], worst


def test_the_length_of_v_does_not_matter_and_halves_are_widened():
    spec, kernel = layer()
    v = spectrum.start_vector(spec, kernel.dtype, jax.random.key(0))
    want = spectrum.power_step(spec, kernel, v)
    for scale in (1e-200, 1e200):
        got = spectrum.power_step(spec, kernel, scale * v)
        np.testing.assert_allclose(got.sigma, want.sigma, rtol=1e-12)
        np.testing.assert_allclose(got.v, want.v, atol=1e-12)
    assert spectrum.start_vector(spec, jnp.bfloat16, jax.random.key(0)).dtype == jnp.float32
    half = spectrum.power_step(spec, kernel.astype(jnp.bfloat16), v.astype(jnp.float32))
    assert half.sigma.dtype == jnp.float32


def test_errors():
    spec, kernel = layer()
    v = spectrum.start_vector(spec, kernel.dtype, jax.random.key(0))
    with pytest.raises(TypeError, match="v is float32, and the kernel counts as float64: start_vector"):
        spectrum.power_step(spec, kernel, v.astype(jnp.float32))
    with pytest.raises(ValueError, match="v must have the spec's shape"):
        spectrum.power_step(spec, kernel, v.ravel())
    with pytest.raises(TypeError, match="start is float32, and the kernel counts as float64: cast it"):
        spectrum.spectral_norm(spec, kernel, start=v.astype(jnp.float32))


@pytest.mark.parametrize("groups", [rarely(1), 2])
def test_a_warm_start_finds_the_norm_of_a_kernel_nearby(groups):
    """In one run of 4 steps. A group in which the start is 0 begins with a random vector, and takes more."""
    spec, kernel = layer(groups=groups)
    near = kernel + 1e-3 * jnp.asarray(np.random.default_rng(0).standard_normal(kernel.shape))
    start = spectrum.singular_triplet(spec, kernel).right
    want = np.linalg.norm(np.asarray(fc.as_matrix(spec, near)), 2)
    once = {"tolerance": 1e-4} | ({"max_restarts": 1} if groups == 1 else {})
    warm = jax.jit(jax.value_and_grad(lambda k, v: spectrum.spectral_norm(spec, k, start=v, **once)))
    exact = jax.grad(partial(spectrum.spectral_norm, spec))(near)
    for v in (start, 1e-30 * start):
        got, slope = warm(near, v)
        np.testing.assert_allclose(got, want, rtol=1e-7)
        np.testing.assert_allclose(slope, exact, atol=2e-3)
    found = spectrum.singular_triplet(spec, near, start=jnp.zeros_like(start))
    np.testing.assert_allclose(found.value, want, rtol=1e-9)
    if groups == 1:
        np.testing.assert_allclose(spectrum.spectral_norm(spec, near, start=start), want, rtol=1e-10)


def test_a_cold_run_of_the_same_length_does_not():
    spec, kernel = conv((300,), [-1, 2, -1], [(1, 1)])
    right = spectrum.singular_triplet(spec, kernel).right
    once = {"tolerance": 1e-4, "max_restarts": 1}
    warm = spectrum.singular_triplet(spec, kernel, start=right, **once)
    cold = spectrum.singular_triplet(spec, kernel, start=jnp.ones_like(right) + right, **once)
    assert warm.residual <= 1e-6 * warm.value < cold.residual


def test_a_step_on_zero_keeps_the_vector():
    """M v = 0 has no direction."""
    spec, kernel = layer()
    v = spectrum.start_vector(spec, kernel.dtype, jax.random.key(0))
    sigma, after = spectrum.power_step(spec, jnp.zeros_like(kernel), v)
    assert sigma == 0
    np.testing.assert_array_equal(after, v)

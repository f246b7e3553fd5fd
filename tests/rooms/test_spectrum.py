"""What holds across the rooms of spectrum: derivatives, jit and vmap, isometries, errors."""

from functools import partial

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import rarely
from handwritten import slopes
from spectra import conv, layer

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum


@pytest.mark.parametrize(
    ("function", "mode", "order"),
    [
        (spectrum.spectral_norm, "zeros", 1),
        rarely(spectrum.spectral_norm, "reflect", 1),
        (spectrum.frobenius_norm, "symmetric", 2),
        (spectrum.orthogonality_residual, "zeros", 2),
        (spectrum.orthogonality_residual, "edge", 1),
        (spectrum.log_abs_det, "circular", 1),
        (lambda s, k: spectrum.spectral_norm_bounds(s, k)[1], "zeros", 1),
        rarely(lambda s, k: spectrum.spectral_norm_bounds(s, k)[1], "circular", 1),
        (lambda s, k: spectrum.top_singular_values(s, k, 2).sum(), "zeros", 1),
        (spectrum.one_norm, "edge", 1),
        (spectrum.row_norms, "zeros", 1),
        (spectrum.trace, "zeros", 1),
    ],
)
def test_gradients(function, mode, order):
    spec, kernel = layer(mode)
    change = jnp.asarray(np.random.default_rng(2).standard_normal(kernel.shape))
    of = partial(slopes, partial(function, spec), order=order)
    for got, want in zip(*jax.jit(lambda k, d: of((k,), (d,)))(kernel, change), strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize(
    "function",
    [
        spectrum.spectral_norm,
        spectrum.frobenius_norm,
        spectrum.orthogonality_residual,
        spectrum.log_abs_det,
        rarely(lambda s, k: spectrum.singular_values(s, k)[:3]),
        lambda s, k: spectrum.top_singular_values(s, k, 2),
        lambda s, k: spectrum.spectral_norm_bounds(s, k)[1],
    ],
)
def test_derivatives_along_complex_kernels(function):
    spec, _ = layer("circular" if function is spectrum.log_abs_det else "zeros")
    rng = np.random.default_rng(7)
    kernel, change = (jnp.asarray(geometries.normals(rng, spec.rhs_shape, complex)) for _ in range(2))

    @jax.jit
    def along(t):
        return jax.jvp(lambda t: function(spec, kernel + t * change), (t,), (1.0,))

    (ahead, _), (behind, _), (_, slope) = (along(t) for t in (1e-5, -1e-5, 0.0))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-7)


def test_gradients_vanish_at_the_zero_kernel():
    spec, kernel = layer()
    functions = spectrum.frobenius_norm, lambda s, k: spectrum.spectral_norm_bounds(s, k)[1]
    slopes = jax.jit(lambda kernel: [jax.grad(partial(f, spec))(kernel) for f in functions])
    assert not np.any(slopes(jnp.zeros_like(kernel)))


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.long), 2])
def test_jit_and_vmap(groups):
    spec, kernel = layer(groups=groups)
    kernels = jnp.stack([kernel, 2 * kernel])
    functions = (
        spectrum.spectral_norm, spectrum.one_norm, spectrum.singular_values, spectrum.spectral_norm_bounds,
        spectrum.orthogonality_residual, spectrum.trace, spectrum.column_norms, spectrum.log_abs_det,
    )  # fmt: skip
    of_all = lambda kernel: [function(spec, kernel) for function in functions]  # noqa: E731
    one, many = jax.jit(of_all), jax.jit(jax.vmap(of_all))(kernels)
    want = jax.tree.map(lambda *v: np.stack(v), *map(one, kernels))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), many, want)


def test_an_orthogonal_kernel_is_an_isometry():
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
    kernel = np.zeros((4, 4, 3, 3))
    kernel[:, :, 1, 1] = turn
    for mode in ("zeros", "circular"):
        spec = fc.conv_spec((1, 4, 5, 6), kernel.shape, (1, 1), "SAME", padding_mode=mode)
        functions = (
            spectrum.orthogonality_residual, spectrum.singular_values, spectrum.spectral_norm_bounds,
            spectrum.spectral_norm,
        )  # fmt: skip
        made = jax.jit(lambda k, spec=spec, functions=functions: [f(spec, k) for f in functions])(kernel)
        assert made[0] < 1e-13  # not the root of rounding
        np.testing.assert_allclose(made[1], 1, atol=1e-12)
        np.testing.assert_allclose(made[2], 1, rtol=1e-3)
        np.testing.assert_allclose(made[3], 1, rtol=1e-12)


def test_errors():
    spec, kernel = layer()
    wide, _ = conv((4,), [1, 1], [(0, 0)])
    with pytest.raises(TypeError, match="kernel is bool"):
        spectrum.one_norm(spec, kernel > 0)
    with pytest.raises(ValueError, match=r"kernel must have the spec's shape"):
        spectrum.spectral_norm(spec, kernel[0])
    with pytest.raises(ValueError, match="ord must be 1"):
        spectrum.row_norms(spec, kernel, ord=3)
    with pytest.raises(ValueError, match="k must be between 1 and"):
        spectrum.top_singular_values(spec, kernel, 10**6)
    with pytest.raises(TypeError, match="k must be a static int"):
        spectrum.top_singular_values(spec, kernel, 2.0)
    with pytest.raises(ValueError, match="log_abs_det needs a square M, got 3 x 4"):
        spectrum.log_abs_det(wide, jnp.ones((1, 1, 2)))
    with pytest.raises(ValueError, match="solve needs a square M"):
        spectrum.solve(wide, jnp.ones((1, 1, 2)), jnp.ones((1, 3)))
    with pytest.raises(TypeError, match=r"y.astype"):
        spectrum.solve(spec, kernel, jnp.ones(spec.out_shape, jnp.float32))
    with fc.memory_limit(1000), pytest.raises(ValueError, match="use top_singular_values"):
        spectrum.singular_values(spec, kernel)

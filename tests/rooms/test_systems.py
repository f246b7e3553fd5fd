"""solve, pseudo_inverse and lstsq, against NumPy on the oracle's matrix."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads
from spectra import drawn, every_number, layer, svd

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum


@every_number
def test_inverses(run_seed, number):
    spec, kernel, y, matrix, name = drawn(run_seed, number)
    values = svd(matrix)
    top = values.max(initial=0)
    rank = oracle.rank(values) if matrix.size else None
    if not rank or top > 1e5 * values[rank - 1]:
        return  # no certain rank, or ill-conditioned: NumPy has no more digits
    x = (oracle.pseudo_inverse(matrix) @ y.ravel()).reshape(spec.in_shape)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 * np.abs(x).max(), err_msg=name)
    close(spectrum.pseudo_inverse(spec, kernel, y, rtol=oracle.CUTOFF), x)
    if spec.in_size == spec.out_size == rank:
        close(spectrum.solve(spec, kernel, y), x)
    if top <= 1e2 * values[rank - 1]:  # beyond, LSMR is slow and less accurate
        close(spectrum.lstsq(spec, kernel, y), x)


def test_gradients_of_solutions():
    spec, kernel = layer("circular")
    y = jnp.asarray(np.random.default_rng(2).standard_normal(spec.out_shape))
    for function in (spectrum.solve, spectrum.pseudo_inverse, partial(spectrum.lstsq, max_steps=200)):
        check_grads(partial(function, spec), (kernel, y), order=1, modes=["rev"], rtol=1e-4, atol=1e-4)


def test_least_squares(run_seed):
    rng = np.random.default_rng(run_seed)
    for options in ({"window_strides": (2,)}, {"window_strides": (1,), "lhs_dilation": (2,)}):
        spec = fc.conv_spec((1, 2, 9), (3, 2, 3), padding=[(1, 2)], **options)
        kernel, y = rng.standard_normal(spec.rhs_shape), rng.standard_normal(spec.out_shape)
        want = np.linalg.lstsq(np.asarray(fc.as_matrix(spec, kernel)), y.ravel(), rcond=None)[0]
        got = np.ravel(spectrum.lstsq(spec, kernel, y))
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7 * np.abs(want).max())


def test_least_squares_that_do_not_converge_are_nan():
    spec = fc.conv_spec((1, 1, 80), (1, 1, 11), (1,), "SAME")
    blur = jnp.exp(-(jnp.arange(-5.0, 6) ** 2) / 4)[None, None]
    y = jnp.asarray(np.random.default_rng(0).standard_normal(spec.out_shape))
    assert jnp.isnan(spectrum.lstsq(spec, blur, y)).all()
    assert jnp.isfinite(spectrum.lstsq(spec, blur, y, max_steps=20)).all()  # asked for


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_least_squares_in_single_precision(dtype):
    spec, kernel = layer()
    y = jnp.asarray(np.random.default_rng(2).standard_normal(spec.out_shape))
    want = spectrum.lstsq(spec, kernel, y)
    got = spectrum.lstsq(spec, kernel.astype(dtype), y.astype(dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * float(jnp.abs(want).max()))

"""solve, pseudo_inverse and lstsq, against NumPy on the oracle's matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from handwritten import difference, reverse
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
    functions = [partial(spectrum.pseudo_inverse, rtol=oracle.CUTOFF)]
    if spec.in_size == spec.out_size == rank:
        functions.append(spectrum.solve)
    if top <= 1e2 * values[rank - 1]:  # beyond, LSMR is slow and less accurate
        functions.append(spectrum.lstsq)
    for got in jax.jit(lambda kernel, y: [function(spec, kernel, y) for function in functions])(kernel, y):
        np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9 * np.abs(x).max(), err_msg=name)


def test_gradients_of_solutions():
    spec, kernel = layer("circular")
    rng = np.random.default_rng(2)
    y, *along = (
        jnp.asarray(rng.standard_normal(s)) for s in (spec.out_shape, spec.rhs_shape, spec.out_shape)
    )
    weights = jnp.asarray(rng.standard_normal(spec.in_shape))

    def of(function, at):
        loss = lambda kernel, y: jnp.sum(function(spec, kernel, y) * weights)  # noqa: E731
        return reverse(loss, at, along), difference(loss, at, along)

    functions = spectrum.solve, spectrum.pseudo_inverse, partial(spectrum.lstsq, max_steps=200)
    for got, want in jax.jit(lambda at: [of(function, at) for function in functions])((kernel, y)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


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

"""solve, pseudo_inverse and lstsq, against NumPy on the oracle's matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import rarely
from geometries import normals
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


def test_gradients_of_solutions(run_seed):
    """Of the pseudo-inverse also where M has more rows than columns, or fewer."""
    square, other = (
        fc.conv_spec((1, c, 4), (o, c, 3), (1,), "SAME", padding_mode="circular")
        for o, c in ((2, 2), ((2, 3), (3, 2))[run_seed % 2])
    )
    rng = np.random.default_rng(2)

    def given(spec):
        return [jnp.asarray(rng.standard_normal(s)) for s in (spec.rhs_shape, spec.out_shape)]

    def of(function, spec, at, along, weights):
        loss = lambda kernel, y: jnp.sum(function(spec, kernel, y) * weights)  # noqa: E731
        return reverse(loss, at, along), difference(loss, at, along)

    calls = (
        (spectrum.solve, square), (spectrum.pseudo_inverse, other),
        (partial(spectrum.lstsq, max_steps=200), square),
    )  # fmt: skip
    operands = [(given(s), given(s), jnp.asarray(rng.standard_normal(s.in_shape))) for _, s in calls]
    made = jax.jit(lambda all: [of(*call, *one) for call, one in zip(calls, all, strict=True)])(operands)
    for (_, spec), (got, want) in zip(calls, made, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=str(spec))


def test_least_squares(run_seed):
    rng = np.random.default_rng(run_seed)
    for options in ({"window_strides": (2,)}, {"window_strides": (1,), "lhs_dilation": (2,)}):
        spec = fc.conv_spec((1, 2, 9), (3, 2, 3), padding=[(1, 2)], **options)
        kernel, y = rng.standard_normal(spec.rhs_shape), rng.standard_normal(spec.out_shape)
        want = np.linalg.lstsq(np.asarray(fc.as_matrix(spec, kernel)), y.ravel(), rcond=None)[0]
        got = np.ravel(spectrum.lstsq(spec, kernel, y))
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [float, rarely(complex)])
def test_damped_least_squares(dtype):
    """``(M^H M + t^2 I) x = M^H y``, and its gradients in kernel, y and t."""
    rng = np.random.default_rng(5)
    spec = fc.conv_spec((1, 2, 5), (3, 2, 3), (1,), "SAME")
    kernel, y = (jnp.asarray(normals(rng, shape, dtype)) for shape in (spec.rhs_shape, spec.out_shape))

    def exactly(kernel, y, t):
        matrix = fc.as_matrix(spec, kernel)
        gram = matrix.conj().T @ matrix + jnp.asarray(t**2, dtype) * jnp.eye(spec.in_size, dtype=dtype)
        return jnp.linalg.solve(gram, matrix.conj().T @ y.ravel()).reshape(spec.in_shape)

    def size(solution, *args):
        return jnp.sum(jnp.abs(solution(*args)) ** 2)

    damped = jax.jit(lambda kernel, y, t: spectrum.lstsq(spec, kernel, y, damping=t))
    exact = jax.jit(exactly)
    for t, scale in ((0.3, 1), (0.3, 1e-200), (40.0, 1e100)):
        got, want = damped(scale * kernel, y, scale * t), np.asarray(exact(kernel, y, t)) / scale
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
    slopes, wanted = (
        jax.jit(jax.grad(partial(size, f), (0, 1, 2)))(kernel, y, 0.3) for f in (damped, exactly)
    )
    for slope, want in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(slope, want, rtol=1e-7, atol=1e-7)
    with pytest.raises(TypeError, match="damping must be a real number"):
        spectrum.lstsq(spec, kernel, y, damping=jnp.asarray(1j))


def test_a_blur_in_double_precision_is_undone_with_damping():
    spec = fc.conv_spec((1, 1, 24, 24), (1, 1, 5, 5), (1, 1), "SAME", padding_mode="symmetric")
    line = np.array([1, 4, 6, 4, 1]) / 16
    blur, rng = jnp.asarray(np.outer(line, line)[None, None]), np.random.default_rng(0)
    y = fc.apply(spec, blur, jnp.asarray(rng.random(spec.in_shape))) + 0.01 * rng.standard_normal(
        spec.out_shape
    )
    assert np.isnan(spectrum.lstsq(spec, blur, y)).all()
    matrix = np.asarray(fc.as_matrix(spec, blur))
    want = np.linalg.solve(matrix.T @ matrix + 1e-4 * np.eye(spec.in_size), matrix.T @ np.ravel(y))
    got = spectrum.lstsq(spec, blur, y, damping=1e-2)
    np.testing.assert_allclose(np.ravel(got), want, rtol=1e-8, atol=1e-8)


def test_least_squares_that_do_not_converge_are_nan():
    spec = fc.conv_spec((1, 1, 80), (1, 1, 11), (1,), "SAME")
    blur = jnp.exp(-(jnp.arange(-5.0, 6) ** 2) / 4)[None, None]
    y = jnp.asarray(np.random.default_rng(0).standard_normal(spec.out_shape))
    assert jnp.isnan(spectrum.lstsq(spec, blur, y)).all()
    assert jnp.isfinite(spectrum.lstsq(spec, blur, y, max_steps=20)).all()  # asked for


@pytest.mark.parametrize("dtype", [rarely("float32"), "complex64"])
def test_least_squares_in_single_precision(dtype):
    spec, kernel = layer()
    y = jnp.asarray(np.random.default_rng(2).standard_normal(spec.out_shape))
    want = spectrum.lstsq(spec, kernel, y)
    got = spectrum.lstsq(spec, kernel.astype(dtype), y.astype(dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * float(jnp.abs(want).max()))

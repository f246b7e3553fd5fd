"""Scales by powers of two, extremes and roots."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import rarely

from jaxconv_fc import numerics

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_power_of_two_is_exact(dtype):
    info = jnp.finfo(dtype)
    exponents = np.arange(info.minexp, info.maxexp)
    got = jax.jit(numerics.times_power_of_two)(jnp.ones(len(exponents), dtype), exponents)
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.ldexp(1.0, exponents))


@pytest.mark.parametrize(
    ("dtype", "jit"), [*((dtype, True) for dtype in DTYPES), ("complex64", False), rarely("float16", False)]
)
def test_unit_scale_is_an_exact_split(dtype, jit, rng):
    """``array == 2**e * unit``, at every scale, under jit and vmap, with Inf and NaN left alone."""
    info = jnp.finfo(dtype)
    low, high = int(info.minexp) + 4, int(info.maxexp) - 4
    scales = np.unique(np.linspace(low, high, 60).astype(int))
    values = np.asarray(jnp.asarray(rng.uniform(1, 8, 5), info.dtype).astype(float)) / 8
    stack = np.ldexp(values, scales[:, None])
    stack = stack - 1j * stack[:, ::-1] if "complex" in dtype else stack
    stack = jnp.asarray(stack).astype(dtype)

    def split(stack):
        units, exponents = jax.vmap(numerics.unit_scale)(stack)
        return units, exponents, jax.vmap(numerics.times_power_of_two)(units, exponents)

    units, exponents, back = (jax.jit(split) if jit else split)(stack)
    assert units.dtype == stack.dtype
    want = np.floor(np.log2(values.max())) + scales
    np.testing.assert_array_equal(exponents, np.clip(want, info.minexp, -info.minexp))
    np.testing.assert_array_equal(np.asarray(back, complex), np.asarray(stack, complex))
    odd = np.asarray(stack[0]).copy()
    odd[1:3] = np.nan, np.inf
    unit, exponent = jax.jit(numerics.unit_scale)(odd)
    assert exponent < low + 2  # of the finite entries
    assert np.isnan(unit[1]) and np.isinf(unit[2]) and np.isfinite(unit[3])  # noqa: PT018


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zero_nothing_and_subnormal_numbers(dtype):
    arrays = jnp.zeros(3, dtype), jnp.zeros(0, dtype), jnp.full(2, jnp.nan, dtype)
    for _, exponent in jax.jit(lambda arrays: [numerics.unit_scale(array) for array in arrays])(arrays):
        assert exponent == 0
    info = np.finfo(dtype)
    tiny = np.array([info.smallest_subnormal * 5, -info.smallest_subnormal, info.tiny / 4, 0], dtype)
    for scaled in (tiny, np.append(tiny, info.tiny).astype(dtype)):
        unit, exponent = jax.jit(numerics.unit_scale)(scaled)
        wide = np.asarray(unit, np.longdouble) * np.longdouble(2) ** int(exponent)
        np.testing.assert_array_equal(wide, scaled.astype(np.longdouble))


def test_products_with_any_power_of_two_do_not_pass_the_range():
    """Also where all factors are constants of the program, which XLA may multiply in another order."""
    times = numerics.times_power_of_two
    for value, exponent in ((2.0**-120, 240), (2.0**120, -240), (2.0**-126, 253), (1.0, 300), (1.0, -300)):
        with np.errstate(over="ignore", under="ignore"):
            want = np.float32(np.ldexp(value, exponent))
        assert times(jnp.float32(value), exponent) == want
        assert jax.jit(times)(jnp.float32(value), exponent) == want
        assert jax.jit(lambda v=value, e=exponent: times(jnp.float32(v), jnp.int32(e)))() == want
        assert jax.jit(lambda v, e=exponent: times(v, jnp.int32(e)))(jnp.float32(value)) == want


def cosine(a, b):
    """Of degree 0 in a and 2 in b."""
    return jnp.sum(a * b) * numerics.lengths(b) / numerics.lengths(a)


def test_derivatives_of_a_homogeneous_function_are_homogeneous():
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(1, 2, 4).astype(np.float32) for _ in range(2))
    fn = jax.jit(partial(numerics.homogeneous, cosine, (0, 2)))
    slopes = jax.jit(jax.grad(fn, (0, 1)))
    for exponent in (-125, 0, 120):
        far = np.ldexp(a, exponent)
        assert fn(far, b) == fn(a, b)
        for got, near, degree in zip(slopes(far, b), slopes(a, b), (-1, 0), strict=True):
            np.testing.assert_array_equal(got, np.ldexp(np.asarray(near), degree * exponent))
    want = jax.jit(jax.hessian(cosine))(a.astype(float), b.astype(float))
    np.testing.assert_allclose(jax.jit(jax.hessian(fn))(a, b), want, rtol=1e-4, atol=1e-5)


def test_roots_and_extremes_of_zero_nan_and_inf():
    values = jnp.array([0.0, 4.0, jnp.nan, jnp.inf])
    np.testing.assert_array_equal(numerics.root(values), [0, 2, np.nan, np.inf])
    assert jax.grad(numerics.root)(0.0) == 0
    for extreme in (numerics.largest, numerics.least):
        assert jnp.isnan(extreme(values))
    assert numerics.largest(values[:2]) == 4
    assert numerics.least(values[:2]) == 0
    np.testing.assert_array_equal(jax.grad(numerics.largest)(jnp.array([1.0, 3, 3])), [0, 1, 0])

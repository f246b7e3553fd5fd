"""sparse_matrix_of: which entries it stores, what it refuses, and how maps compose."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from handwritten import close, conv, normal
from jax import lax
from jax.flatten_util import ravel_pytree

import jaxconv_fc as fc
from jaxconv_fc.functions.linear_maps import RealLinear, Selection, as_csr, product, total

RNG = np.random.default_rng(6)
K = normal(RNG, 3, 3, 3, 3)


def _no_guard(entries, dtype):
    pass


# what is stored -----------------------------------------------------------------------------------


def test_one_layer_is_as_scipy():
    spec = fc.conv_spec((1, 3, 9, 8), K.shape, (2, 1), "SAME", rhs_dilation=(1, 2))
    got = fc.sparse_matrix_of(partial(fc.apply, spec, K), jax.ShapeDtypeStruct(spec.in_shape, K.dtype))
    want = fc.as_scipy(spec, K)
    for a, b in ((got.matrix.data, want.data), (got.matrix.indices, want.indices)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(got.matrix.indptr, want.indptr)


def _cancels(x):
    pair = jnp.array([[[[1.0, -1.0]]]])
    return conv(conv(x, jnp.ones((1, 3, 1, 2)), padding="VALID"), pair, padding="VALID")


# 4 x 4 positions and three channels: through a 3 x 3 kernel, 10 x 10 pairs of an output and an input.
STORED = {
    "conv - conv": (lambda x: conv(x, K) - conv(x, K), 3 * 3 * 10 * 10),
    "kernel of zeros": (lambda x: conv(x, 0 * K), 3 * 3 * 10 * 10),
    "chain that cancels": (_cancels, 3 * 4 * 2 * 3),
    "times zero": (lambda x: x * 0.0, 48),
    "masked": (lambda x: jnp.where(jnp.arange(4) > 1, x, 0.0), 24),
    "padded": (lambda x: jnp.pad(x, 1)[1:-1, 1:-1, 1:-1, 1:-1], 48),
    "difference of itself": (lambda x: x - x, 48),
    "constant": (lambda x: jnp.ones(5), 0),
}


@pytest.mark.parametrize("name", STORED)
def test_every_structural_entry_is_stored(name):
    """Whatever its value."""
    fn, stored = STORED[name]
    x = jax.ShapeDtypeStruct((1, 3, 4, 4), jnp.float64)
    matrix, _ = fc.sparse_matrix_of(fn, x)
    assert matrix.nnz == stored
    assert matrix.has_canonical_format
    close(matrix.toarray(), fc.matrix_of(fn, x).matrix)


def test_an_infinite_tap_fills_its_own_entries_only():
    kernel = K.at[0, 0, 1, 1].set(jnp.inf)
    matrix, _ = fc.sparse_matrix_of(lambda x: conv(conv(x, kernel), K), jnp.zeros((1, 3, 5, 5)))
    assert 0 < np.isfinite(matrix.data).sum() < matrix.nnz
    finite, _ = fc.sparse_matrix_of(lambda x: conv(conv(x, K), K), jnp.zeros((1, 3, 5, 5)))
    np.testing.assert_array_equal(matrix.indices, finite.indices)


def test_pytrees_and_mixed_dtypes():
    x = {"a": jnp.ones((2, 3)), "n": jnp.arange(4), "b": jnp.float32(2.0)}

    def fn(v):
        return v["a"].astype(jnp.float32).sum(0) - v["b"], (v["n"][::-1] * 2).reshape(2, 2)

    with jax.numpy_dtype_promotion("standard"):
        got, want = fc.sparse_matrix_of(fn, x), fc.matrix_of(fn, x)
        flat, value = ravel_pytree(x)[0], ravel_pytree(fn(x))[0]
    np.testing.assert_array_equal(got.matrix.toarray(), want.matrix)
    np.testing.assert_array_equal(got.offset, want.offset)
    np.testing.assert_array_equal(got.matrix @ np.asarray(flat), value)


def test_integers_wrap_around_as_integers_do():
    x = jnp.zeros(3, jnp.int8)
    matrix, offset = fc.sparse_matrix_of(lambda x: (x * jnp.int8(100)) * jnp.int8(3) + jnp.int8(7), x)
    assert matrix.dtype == offset.dtype == np.int8
    np.testing.assert_array_equal(matrix.toarray(), 44 * np.eye(3, dtype=np.int8))


# rows and refusals --------------------------------------------------------------------------------


def test_rows_of_a_network_whose_matrix_is_beyond_the_limit():
    def net(x):
        y = x
        for _ in range(5):
            y = conv(y, jnp.ones((8, y.shape[1], 3, 3)) / 8)
        return y

    x = jax.ShapeDtypeStruct((1, 2, 24, 24), jnp.float64)
    rows = [5, 3000]
    with fc.memory_limit(6_000_000):
        with pytest.raises(ValueError, match=r"sparse_matrix_of: after 'conv_product' at handwritten.py"):
            fc.sparse_matrix_of(net, x)
        some = fc.sparse_matrix_of(net, x, rows=rows)
    _, pull = jax.vjp(net, jnp.zeros(x.shape))
    for row, got in zip(rows, some.matrix.toarray(), strict=True):
        unit = jnp.zeros(8 * 24 * 24).at[row].set(1.0).reshape(1, 8, 24, 24)
        close(got, np.ravel(pull(unit)[0]))


def test_what_is_traced_or_not_affine_is_refused():
    x = jnp.ones(3)
    with pytest.raises(TypeError, match="use matrix_of under jit"):
        jax.jit(lambda w: fc.sparse_matrix_of(lambda x: w * x, x).offset)(x)
    with pytest.raises(TypeError, match="use matrix_of under jit"):
        jax.jit(lambda x: fc.sparse_matrix_of(lambda x: 2 * x, x).offset)(x)
    with pytest.raises(ValueError, match="sparse_matrix_of: fn is not affine in x: primitive 'exp'"):
        fc.sparse_matrix_of(jnp.exp, x)
    for dtype in (jnp.bfloat16, jnp.float16):
        with pytest.raises(TypeError, match=f"fn computes in {jnp.dtype(dtype).name}, which SciPy cannot"):
            fc.sparse_matrix_of(lambda x, d=dtype: 2 * x.astype(d), x)


# products and sums of maps ------------------------------------------------------------------------


def _random_map(rng, rows, columns, kind):
    if kind == "csr":
        return sp.random_array((rows, columns), density=0.3, rng=rng, format="csr")
    numbers = None if kind == "scaling" else rng.integers(-1, columns, rows)
    weights = None if kind == "rows" else rng.standard_normal(rows)
    return Selection(columns, numbers, weights)


@pytest.mark.parametrize("a", ["csr", "rows", "weighted rows", "scaling"])
@pytest.mark.parametrize("b", ["csr", "rows", "weighted rows", "scaling"])
def test_products_and_sums_of_maps(a, b):
    rng = np.random.default_rng()
    for m, n, k in ((5, 4, 6), (0, 3, 2), (3, 0, 2), (4, 4, 0), (7, 7, 7)):
        m, k = (n if a == "scaling" else m), (n if b == "scaling" else k)
        if (a != "csr" and n == 0) or (b != "csr" and k == 0):
            continue
        first, second = _random_map(rng, m, n, a), _random_map(rng, n, k, b)
        dense = [as_csr(v, np.float64).toarray() for v in (first, second)]
        got = as_csr(product(first, second, np.float64, _no_guard), np.float64)
        close(got.toarray(), dense[0] @ dense[1])
        assert got.has_canonical_format
        same = _random_map(rng, m, n, a)
        added = as_csr(total([first, same, first], np.float64, _no_guard), np.float64)
        close(added.toarray(), 2 * dense[0] + as_csr(same, np.float64).toarray())


def test_maps_that_are_linear_over_the_real_numbers():
    rng = np.random.default_rng()
    z = as_csr(_random_map(rng, 4, 5, "csr"), complex)
    z.data = z.data + 1j * rng.standard_normal(z.nnz)
    real, imag = (_random_map(rng, 3, 4, "csr") for _ in range(2))
    got = product(RealLinear(real, imag), z, np.float64, _no_guard)
    dense = z.toarray()
    close(as_csr(got, np.float64).toarray(), real.toarray() @ dense.real + imag.toarray() @ dense.imag)


def test_a_pool_of_few_rows_and_a_batch_of_kernels():
    """Examples that share a kernel or have one each, in a batch of a batch."""
    spec = fc.conv_spec((1, 2, 5), (3, 2, 2), (1,), "VALID")
    kernels, xs = normal(RNG, 2, 3, 2, 2), jax.ShapeDtypeStruct((2, 3, 2, 5), jnp.float64)

    def fn(xs):
        each = jax.vmap(lambda k, x: jax.vmap(partial(fc.apply, spec, k))(x))(kernels, xs)
        return lax.reduce_window(each, 0.0, lax.add, (1, 1, 1, 2), (1, 1, 1, 2), "VALID")

    got, want = fc.sparse_matrix_of(fn, xs), fc.matrix_of(fn, xs)
    close(got.matrix.toarray(), want.matrix)

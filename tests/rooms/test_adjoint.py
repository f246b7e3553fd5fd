"""The transpose, the kernel matrix and the gradient with respect to M."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count, numbers
from geometries import Geometry, arrays, geometries, integers, normals, random_geometry, seeds
from handwritten import slopes
from hypothesis import given
from jax import lax

import jaxconv_fc as fc
from jaxconv_fc.matrix import scatter

COUNT = count("GEOMETRIES", 12)  # of every chunk a quarter
CHUNKS = numbers(4, 8)

PLAIN = Geometry((1, 2, 5, 6), (4, 2, 3, 2), (2, 1), [(1, 0), (-1, 2)], rhs_dilation=(1, 2))
GROUPED = Geometry((1, 4, 5), (6, 2, 3), (2,), [(3, 1)], lhs_dilation=(2,), feature_group_count=2)
FOLDED = Geometry((1, 2, 4), (2, 2, 3), (1,), [(3, 5)], padding_mode="reflect")
BATCHED = Geometry((2, 2, 5), (4, 2, 3), (2,), "SAME", batch_group_count=2)
ALL = pytest.mark.parametrize("geometry", [PLAIN, GROUPED, FOLDED, BATCHED])


def has_transpose(spec):
    return spec.padding_mode == "zeros" and spec.canonical.batch_group_count == 1


@jax.jit
def views(spec, kernel, x, y):
    """One program per geometry: compiling is what the random test spends its time on."""
    cotangent = y.ravel()[:, None] * x.ravel()[None]
    back = fc.as_matrix(*fc.transpose(spec, kernel)).T if has_transpose(spec) else fc.as_matrix(spec, kernel)
    return fc.kernel_matrix(spec, x), fc.kernel_vjp(spec, x, y), fc.matrix_vjp(spec, cotangent), back


@pytest.mark.parametrize("chunk", CHUNKS)
def test_random_geometries_against_the_oracle(chunk, run_seed):
    """Laws 3, 4 and 5 on whole numbers: equal, not close."""
    for i in range(COUNT * chunk // 4, COUNT * (chunk + 1) // 4):
        rng = np.random.default_rng([run_seed, i, 3])
        geometry = random_geometry(rng)
        kernel, x, y = arrays(geometry, rng, (np.float64, np.int64)[i % 2])
        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {geometry}"
        patches, gradient, adjoint, back = map(np.asarray, views(geometry.spec(), kernel, x, y))
        assert (back == oracle.matrix(kernel, geometry)).all(), replay
        assert (patches @ kernel.ravel() == oracle.product(x, kernel, geometry).ravel()).all(), replay
        want = oracle.kernel_gradient(x, y, geometry)
        assert (patches.T @ y.ravel() == want.ravel()).all(), replay
        assert (gradient == want).all(), replay
        assert (adjoint == want).all(), replay


# the transpose ---------------------------------------------------------------------------------------


@given(geometries(modes=("zeros",)), seeds)
def test_transposing_twice_is_the_canonical_original(geometry, seed):
    spec = geometry.spec()
    if not has_transpose(spec):
        return
    kernel = integers(np.random.default_rng(seed), geometry.rhs_shape)
    transposed, flipped_kernel = fc.transpose(spec, kernel)
    assert (transposed.in_shape, transposed.out_size) == (spec.out_shape, spec.in_size)
    again, again_kernel = fc.transpose(transposed, flipped_kernel)
    assert again == spec.canonical
    assert (np.asarray(again_kernel) == kernel).all()


def test_complex_gives_the_plain_transpose_and_a_conjugate_kernel_the_hermitian_one(rng):
    kernel, x, y = arrays(PLAIN, rng, np.complex128, normals)
    spec, matrix = PLAIN.spec(), oracle.matrix(kernel, PLAIN)
    transposed, flipped_kernel = fc.transpose(spec, kernel)
    np.testing.assert_array_equal(fc.as_matrix(transposed, flipped_kernel), matrix.T)
    np.testing.assert_array_equal(fc.as_matrix(transposed, flipped_kernel.conj()), matrix.conj().T)
    hermitian = np.asarray(fc.apply_transpose(spec, kernel.conj(), y)).ravel()
    np.testing.assert_allclose(hermitian, matrix.conj().T @ y.ravel(), rtol=1e-12)
    (plain,) = jax.vjp(partial(fc.apply, spec, kernel), x)[1](y)
    np.testing.assert_allclose(plain.ravel(), matrix.T @ y.ravel(), rtol=1e-12)


@pytest.mark.parametrize(
    ("geometry", "word"),
    [
        (FOLDED, "padding_mode='reflect'"),
        (
            Geometry((2, 5, 2), (3, 2, 4), (1,), "SAME", None, None, ("NHC", "HIO", "NHC"), 1, 2),
            "directly before",
        ),
    ],
)
def test_where_the_transpose_is_no_convolution_the_error_names_the_way_out(geometry, word):
    with pytest.raises(ValueError, match=word) as error:
        fc.transpose(geometry.spec(), jnp.zeros(geometry.rhs_shape))
    assert "apply_transpose" in str(error.value)


# the three spaces, under the transforms of JAX -------------------------------------------------------


@ALL
def test_every_view_under_jit_vmap_and_grad(geometry, rng, run_seed):
    spec = geometry.spec()
    kernels, xs, ys = (
        np.stack(v) for v in zip(*(arrays(geometry, rng, np.float64, normals) for _ in range(3)), strict=True)
    )
    matrices = np.stack([oracle.matrix(k, geometry) for k in kernels])
    functions = [fc.kernel_matrix, fc.kernel_vjp, fc.matrix_vjp, fc.kernel_from_matrix, fc.conv_distance]
    noisy = matrices + normals(rng, matrices.shape)
    stacks = [(xs,), (xs, ys), (matrices,), (matrices,), (noisy,)]

    def of_all(stacks):
        return [function(spec, *args) for function, args in zip(functions, stacks, strict=True)]

    one, along = (jax.tree.map(lambda v, i=i: v[i], stacks) for i in range(2))
    looped = [jax.jit(of_all)(jax.tree.map(lambda v, i=i: v[i], stacks)) for i in range(3)]
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    jax.tree.map(close, jax.jit(jax.vmap(of_all))(stacks), jax.tree.map(lambda *v: np.stack(v), *looped))
    if geometry is (GROUPED, FOLDED)[run_seed % 2]:
        weights = [normals(rng, v.shape) for v in looped[0]]

        @jax.jit
        def derivatives(*given):
            return [slopes(partial(f, spec), *v) for f, *v in zip(functions, *given, strict=True)]

        for got, want in derivatives(one, along, weights):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


@ALL
def test_matrix_vjp_is_the_vjp_of_as_matrix(geometry, rng):
    spec = geometry.spec()
    kernel = normals(rng, geometry.rhs_shape)
    cotangent = normals(rng, spec.shape)

    @jax.jit
    def both(kernel, cotangent):
        return jax.vjp(partial(fc.as_matrix, spec), kernel)[1](cotangent)[0], fc.matrix_vjp(spec, cotangent)

    for got in both(kernel, cotangent):
        np.testing.assert_allclose(got, oracle.matrix_gradient(cotangent, geometry), rtol=1e-12)


@ALL
def test_sums_in_both_orders(geometry, rng):
    """The order of a CPU and that of a GPU."""
    spec = geometry.spec()
    matrix = integers(rng, spec.shape)
    forms = scatter.sums, scatter.sums_on_gpu
    for got in jax.jit(lambda m: [form(spec, lambda entry: entry, m) for form in forms])(matrix):
        np.testing.assert_array_equal(got, oracle.matrix_gradient(matrix, geometry))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_sums_of_narrow_types_are_not_rounded_on_the_way(dtype):
    """1,000 ones: bfloat16 has no 257, so it would stay at 256. Integers wrap around, as they should."""
    spec = fc.conv_spec((1, 1, 1000), (1, 1, 1), (1,), "VALID")
    ones = jnp.ones(spec.in_shape, dtype)
    want = np.sum(np.ones(1000, dtype), dtype=dtype if dtype == "int8" else np.float32).astype(dtype)
    assert fc.matrix_vjp(spec, jnp.ones(spec.shape, dtype)).item() == want
    assert fc.kernel_vjp(spec, ones, ones).item() == want
    one = fc.conv_spec((1, 1, 1), (1, 1, 1), (1,), "VALID")
    batch = ones.reshape(1000, 1, 1)
    of_batch = jax.vmap(partial(fc.apply, one), (None, 0))
    kernel = jax.ShapeDtypeStruct(one.rhs_shape, dtype)
    assert jax.linear_transpose(lambda kernel: of_batch(kernel, batch), kernel)(batch)[0].item() == want


def test_per_example_gradients_by_vmap_add_up_to_the_gradient_of_the_batch(rng):
    spec = GROUPED.spec()
    xs, ys = normals(rng, (5, *spec.in_shape)), normals(rng, (5, *spec.out_shape))
    each = jax.vmap(partial(fc.kernel_vjp, spec))(xs, ys)
    kernel = normals(rng, GROUPED.rhs_shape)
    batch = jax.vmap(partial(fc.apply, spec), (None, 0))
    (total,) = jax.vjp(lambda k: batch(k, xs), jnp.asarray(kernel))[1](jnp.asarray(ys))
    np.testing.assert_allclose(each.sum(0), total, rtol=1e-10)


# errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: fc.kernel_matrix(s, jnp.ones((1, 5))), ValueError, r"x must have .*\(1, 4\)"),
        (lambda s: fc.kernel_matrix(s, [1.0]), TypeError, "x must be a jax or NumPy array"),
        (lambda s: fc.matrix_vjp(s, jnp.ones((4, 4))), ValueError, r"matrix_bar must have .*\(3, 4\)"),
        (lambda s: fc.transpose(s, jnp.ones((1, 1, 3))), ValueError, r"kernel must have .*\(1, 1, 2\)"),
    ],
)
def test_bad_inputs_are_named(call, error, message):
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    with pytest.raises(error, match=message):
        call(spec)


# what other libraries call a transposed convolution --------------------------------------------------


def test_lax_conv_transpose_is_the_transpose_only_with_transpose_kernel_and_no_remainder(rng):
    kernel = jnp.asarray(normals(rng, (3, 2, 4)))  # taps, in, out
    for n, same in ((8, True), (7, False)):  # VALID, k = 3, stride 2: 8 leaves one position unused
        spec = fc.conv_spec((1, n, 2), (3, 2, 4), (2,), "SAME", None, None, ("NHC", "HIO", "NHC"))
        y = jnp.asarray(normals(rng, spec.out_shape))
        theirs = lax.conv_transpose(
            y[None], kernel, (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), transpose_kernel=True
        )[0]
        ours = fc.apply_transpose(spec, kernel, y)
        assert (theirs.shape == ours.shape) == same

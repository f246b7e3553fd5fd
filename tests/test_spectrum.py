"""Norms and spectrum, against NumPy on the oracle's matrix and against closed forms."""

import json
from functools import partial

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import CASES, count
from jax.test_util import check_grads

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum
from jaxconv_fc.spectrum import blocks

COUNT = count("GEOMETRIES", 4)


def conv(n, kernel, padding, mode="zeros", stride=1, **options):
    """A convolution of images of shape n, one channel: (spec, kernel)."""
    kernel = np.asarray(kernel, float)
    spec = fc.conv_spec(
        (1, 1, *n), (1, 1, *kernel.shape), (stride,) * len(n), padding, padding_mode=mode, **options
    )
    return spec, jnp.asarray(kernel[None, None])


def closed_forms():
    """(name, spec, kernel, singular values), each from its formula."""
    tri, box = [-1, 2, -1], [1, 1, 1]
    for n in (3, 8, 17):
        j, k = np.arange(n), np.arange(1, n + 1)
        yield f"tridiagonal {n}", *conv((n,), tri, [(1, 1)]), 2 - 2 * np.cos(k * np.pi / (n + 1))
        yield f"periodic {n}", *conv((n,), tri, [(1, 1)], "circular"), 2 - 2 * np.cos(2 * np.pi * j / n)
        yield f"Neumann {n}", *conv((n,), tri, [(1, 1)], "edge"), 2 - 2 * np.cos(np.pi * j / n)
        yield f"box {n}", *conv((n,), box, [(1, 1)]), abs(1 + 2 * np.cos(k * np.pi / (n + 1)))
        yield f"differences {n}", *conv((n,), [-1, 1], [(0, 0)]), 2 * np.sin(k[:-1] * np.pi / (2 * n))
        yield f"full {n}", *conv((n,), [-1, 1], [(1, 1)]), 2 * np.sin(k * np.pi / (2 * n + 2))
        causal = 2 * np.sin((2 * k - 1) * np.pi / (4 * n + 2))
        yield f"causal {n}", *conv((n,), [-1, 1], [(1, 0)]), causal
        yield f"upsampling {n}", *conv((n,), [1, 1], [(1, 1)], lhs_dilation=(2,)), np.full(n, 2**0.5)
        line = 2 - 2 * np.cos(k * np.pi / (n + 1))
        laplacian = [[0, -1, 0], [-1, 4, -1], [0, -1, 0]]
        yield f"Laplacian {n}", *conv((n, n), laplacian, "SAME"), (line[:, None] + line).ravel()
        ring = 2 - 2 * np.cos(2 * np.pi * j / n)
        yield f"torus {n}", *conv((n, n), laplacian, "SAME", "circular"), (ring[:, None] + ring).ravel()
        sobel = np.outer(2 + 2 * np.cos(k * np.pi / (n + 1)), abs(2 * np.cos(k * np.pi / (n + 1))))
        yield f"Sobel {n}", *conv((n, n), np.outer([1, 2, 1], [-1, 0, 1]), "SAME"), sobel.ravel()
    haar = np.array([[[1, 1]], [[1, -1]]]) / 2**0.5
    yield "Haar", fc.conv_spec((1, 1, 8), haar.shape, (2,), "VALID"), jnp.asarray(haar), np.ones(8)
    mean = fc.conv_spec((1, 3, 4, 6), (3, 1, 2, 2), (2, 2), "VALID", feature_group_count=3)
    yield "average pooling", mean, jnp.full((3, 1, 2, 2), 0.25), np.full(18, 0.5)
    mix = np.array([[3.0, 0], [4, 5]])[..., None]
    values = np.repeat([45**0.5, 5**0.5], 3)
    yield "1x1", fc.conv_spec((1, 2, 3), (2, 2, 1), (1,), "VALID"), jnp.asarray(mix), values


@pytest.mark.parametrize("form", list(closed_forms()), ids=lambda form: form[0])
def test_closed_forms(form):
    _, spec, kernel, values = form
    values = np.sort(values)[::-1]
    np.testing.assert_allclose(spectrum.singular_values(spec, kernel), values, rtol=0, atol=1e-10)


def test_closed_forms_of_the_largest_value_and_the_determinant():
    for n in (4, 9):
        spec, kernel = conv((n,), [-1, 2, -1], [(1, 1)])
        top = 2 - 2 * np.cos(np.arange(n, 0, -1) * np.pi / (n + 1))
        np.testing.assert_allclose(spectrum.spectral_norm(spec, kernel), top[0], rtol=1e-12)
        np.testing.assert_allclose(spectrum.top_singular_values(spec, kernel, 3), top[:3], rtol=1e-10)
        np.testing.assert_allclose(spectrum.log_abs_det(spec, kernel), np.log(n + 1), rtol=1e-12)
        np.testing.assert_allclose(spectrum.condition_number(spec, kernel), top[0] / top[-1], rtol=1e-10)
    spec, kernel = conv((6,), [-1, 2, -1], [(1, 1)], "circular")
    assert spectrum.rank(spec, kernel) == 5
    # Values of multiplicity two, each counted twice.
    np.testing.assert_allclose(spectrum.top_singular_values(spec, kernel, 4), [4, 3, 3, 1], atol=1e-9)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, None])
def test_a_long_search_goes_on_until_the_residual_is_what_was_asked_for(tolerance):
    """The two largest values are 3e-4 apart: eight runs to 1e-10."""
    spec, kernel = conv((300,), [-1, 2, -1], [(1, 1)])
    want = 2 - 2 * np.cos(300 * np.pi / 301)
    found = spectrum.singular_triplet(spec, kernel, tolerance=tolerance)
    assert found.residual <= (tolerance or 1e-10) * found.value
    assert abs(found.value - want) <= found.residual
    np.testing.assert_allclose(
        spectrum.spectral_norm(spec, kernel, tolerance=tolerance), found.value, rtol=1e-13
    )


@pytest.mark.skipif(CASES is None, reason="JAXCONV_FC_CASES names no folder")
def test_closed_forms_of_a_file():
    cases = json.loads((CASES / "closed_forms.json").read_text())["cases"]
    names = ("strides", "padding", "lhs_dilation", "rhs_dilation")
    for case in cases:
        counts = (case["feature_group_count"], case["batch_group_count"])
        spec = fc.conv_spec(
            case["lhs_shape"], case["kernel_shape"], *(case[n] for n in names), None, *counts,
            padding_mode=case["pad_mode"],
        )  # fmt: skip
        kernel = jnp.asarray(case["kernel"], float)
        values = np.asarray(spectrum.singular_values(spec, kernel))
        if case["singular_values"] is not None:
            batch = case["lhs_shape"][0] // case["batch_group_count"]  # the file lists those of every example
            want = np.sort(case["singular_values"])[::-1][::batch]
            np.testing.assert_allclose(values, want, rtol=0, atol=1e-10, err_msg=case["name"])
            np.testing.assert_allclose(
                spectrum.spectral_norm(spec, kernel), values[0], rtol=1e-9, err_msg=case["name"]
            )
            lower, upper = spectrum.spectral_norm_bounds(spec, kernel)
            assert lower * (1 - 1e-14) <= values[0] <= upper * (1 + 1e-14), case["name"]
        if case["rank"] is not None:
            assert spectrum.rank(spec, kernel) == case["rank"], case["name"]
        if case["det"] is not None:
            logarithm = spectrum.log_abs_det(spec, kernel)
            np.testing.assert_allclose(np.exp(logarithm), abs(case["det"]), rtol=1e-9)


# random geometries against NumPy ---------------------------------------------------------------------


def drawn(run_seed, number):
    rng = np.random.default_rng([run_seed, number])
    geometry = geometries.random_geometry(rng)
    dtype = np.complex128 if number % 4 == 3 else np.float64
    kernel, _, y = geometries.arrays(geometry, rng, dtype, geometries.normals)
    name = f"seed {run_seed}, number {number}: {geometry}"
    return geometry.spec(), kernel, y, oracle.matrix(kernel, geometry), name


def svd(matrix):
    return np.linalg.svd(matrix, compute_uv=False) if matrix.size else np.zeros(0)


@pytest.mark.parametrize("number", range(COUNT))
def test_norms(run_seed, number):
    spec, kernel, _, matrix, name = drawn(run_seed, number)
    sizes, scale = np.abs(matrix), np.linalg.norm(matrix)
    short = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.conj().T if short else matrix.conj().T @ matrix
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 * scale, err_msg=name)
    close(spectrum.frobenius_norm(spec, kernel), scale)
    close(spectrum.one_norm(spec, kernel), sizes.sum(0).max(initial=0))
    close(spectrum.inf_norm(spec, kernel), sizes.sum(1).max(initial=0))
    close(spectrum.row_norms(spec, kernel), np.linalg.norm(matrix, axis=1))
    close(spectrum.column_norms(spec, kernel), np.linalg.norm(matrix, axis=0))
    close(spectrum.row_norms(spec, kernel, ord=1), sizes.sum(1))
    close(spectrum.column_norms(spec, kernel, ord=1), sizes.sum(0))
    close(spectrum.trace(spec, kernel), np.trace(matrix))
    close(spectrum.orthogonality_residual(spec, kernel), np.linalg.norm(gram - np.eye(len(gram))))
    whole = np.trunc(kernel.real * 4).astype(np.int64)
    matrix = np.asarray(fc.as_matrix(spec, whole))  # integers stay integers, and exact
    assert spectrum.one_norm(spec, whole) == np.abs(matrix).sum(0).max(initial=0), name
    assert spectrum.inf_norm(spec, whole) == np.abs(matrix).sum(1).max(initial=0), name
    assert spectrum.trace(spec, whole) == np.trace(matrix), name


@pytest.mark.parametrize("number", range(COUNT))
def test_values_and_inverses(run_seed, number):
    spec, kernel, y, matrix, name = drawn(run_seed, number)
    values = svd(matrix)
    top = values.max(initial=0)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 * top, err_msg=name)
    close(spectrum.singular_values(spec, kernel), values)
    if not matrix.size:
        return
    rank = oracle.rank(values)
    if rank is None:
        return  # not certain, whoever counts
    assert spectrum.rank(spec, kernel, rtol=oracle.CUTOFF) == rank, name
    if not rank or top > 1e5 * values[rank - 1]:
        return  # inverses of no accuracy, in NumPy too
    x = (oracle.pseudo_inverse(matrix) @ y.ravel()).reshape(spec.in_shape)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 * np.abs(x).max(), err_msg=name)
    close(spectrum.pseudo_inverse(spec, kernel, y, rtol=oracle.CUTOFF), x)
    if spec.in_size == spec.out_size == rank:
        close(spectrum.solve(spec, kernel, y), x)
        want = np.linalg.slogdet(matrix)[1]
        np.testing.assert_allclose(spectrum.log_abs_det(spec, kernel), want, rtol=1e-9, atol=1e-9)
    if rank == min(spec.shape):
        close(spectrum.condition_number(spec, kernel), top / values[-1], atol=0)
    if top <= 1e2 * values[rank - 1]:  # LSMR is slow, and less accurate, beyond
        close(spectrum.lstsq(spec, kernel, y), x)


@pytest.mark.parametrize("number", range(COUNT))
def test_spectral_norm_and_bounds(run_seed, number, record_property):
    spec, kernel, _, matrix, name = drawn(run_seed, number)
    values = svd(matrix)
    top = values.max(initial=0)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 * top, err_msg=name)
    value, left, right, residual = spectrum.singular_triplet(spec, kernel)
    close(value, top)
    assert residual <= 1e-10 * top, name
    close(matrix @ np.ravel(right), float(value) * np.ravel(left))
    close(spectrum.spectral_norm(spec, kernel), top)
    for dtype in (np.complex64, np.complex128) if np.iscomplexobj(kernel) else (np.float32, np.float64):
        narrow = kernel.astype(dtype)
        exact = svd(np.asarray(fc.as_matrix(spec, narrow), kernel.dtype)).max(initial=0)
        lower, upper = (float(v) for v in spectrum.spectral_norm_bounds(spec, narrow))
        assert lower * (1 - 1e-14) <= exact <= upper * (1 + 1e-14), name  # NumPy's own rounding
    if exact:
        record_property("gap", upper / lower - 1)
    if top and number % 3 == 0:
        k = min(len(values), 1 + number % 5)
        close(spectrum.top_singular_values(spec, kernel, k), values[:k])


def test_values_of_a_complex_kernel_are_counted_once():
    """It is searched in real numbers, where every value occurs twice, with the vectors v and i*v."""
    rng = np.random.default_rng(1)
    for shapes, mode in (
        (((1, 2, 6, 7), (3, 2, 2, 3)), "zeros"),
        (((1, 2, 6, 6), (2, 2, 3, 3)), "circular"),
    ):
        spec = fc.conv_spec(*shapes, (1, 1), "SAME", padding_mode=mode)
        kernel = geometries.normals(rng, spec.rhs_shape, complex)
        values = svd(oracle.matrix(kernel, spec))
        got = spectrum.top_singular_values(spec, kernel, 4)
        np.testing.assert_allclose(got, values[:4], rtol=1e-9)


@pytest.mark.parametrize(
    ("n", "taps", "stride", "padding", "options"),
    [
        ((6,), (3,), (1,), [(2, 0)], {}),
        ((6,), (2,), (2,), [(1, 0)], {}),
        ((6,), (3,), (3,), [(1, 0)], {"lhs_dilation": (2,)}),
        ((4, 6), (3, 2), (1, 2), [(2, 0), (2, 0)], {"rhs_dilation": (1, 2)}),
    ],
)
def test_inverses_where_the_matrix_wraps_around(n, taps, stride, padding, options):
    """Signs and phases of the frequencies, which singular values do not tell: complex, lopsided kernels."""
    rng = np.random.default_rng(5)
    shapes = (1, 2, *n), (2, 2, *taps)
    spec = fc.conv_spec(*shapes, stride, padding, padding_mode="circular", **options)
    assert all(axis.wraps for axis in blocks.block_axes(spec))
    kernel, y = (geometries.normals(rng, shape, complex) for shape in (spec.rhs_shape, spec.out_shape))
    for k, v in ((kernel, y), (kernel.real, y.real)):
        matrix = np.asarray(fc.as_matrix(spec, k))
        want = oracle.pseudo_inverse(matrix) @ v.ravel()
        close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
        close(np.ravel(spectrum.pseudo_inverse(spec, k, v)), want)
        if spec.out_size == spec.in_size:
            close(np.ravel(spectrum.solve(spec, k, v)), want)
            close(spectrum.log_abs_det(spec, k), np.linalg.slogdet(matrix)[1])


@pytest.mark.parametrize("most", [1, 2**7])
def test_blocks_in_parts_are_the_blocks(most, monkeypatch):
    """Many frequencies are gone through some at a time, and the last part is filled up."""
    monkeypatch.setattr(blocks, "_HELD", most)
    jax.clear_caches()
    rng = np.random.default_rng(7)
    for groups, dtype in ((1, float), (2, float), (1, complex)):
        shapes = (1, 4, 5, 6), (4, 4 // groups, 3, 2)
        spec = fc.conv_spec(
            *shapes, (1, 1), "SAME", padding_mode="circular", feature_group_count=groups
        )  # fmt: skip
        kernel = jnp.asarray(geometries.normals(rng, spec.rhs_shape, dtype))
        matrix = oracle.matrix(kernel, spec)
        values = svd(matrix)
        np.testing.assert_allclose(spectrum.singular_values(spec, kernel), values, rtol=0, atol=1e-12)
        want = np.linalg.slogdet(matrix)[1]
        np.testing.assert_allclose(spectrum.log_abs_det(spec, kernel), want, rtol=1e-11)
        lower, upper = spectrum.spectral_norm_bounds(spec, kernel)
        assert lower <= values[0] * (1 + 1e-14)
        assert values[0] * (1 - 1e-14) <= upper < values[0] * 1.05
        slope = jax.grad(lambda k, s=spec: spectrum.log_abs_det(s, k))(kernel.real)
        inverse = jnp.linalg.inv(fc.as_matrix(spec, kernel.real))
        np.testing.assert_allclose(slope, fc.matrix_vjp(spec, inverse.T), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("n", "taps", "stride", "padding", "options", "block"),
    [
        ((6,), (3,), (1,), "SAME", {}, (1, 1)),
        ((4, 6), (3, 3), (1, 1), "SAME", {}, (1, 1)),
        ((5, 8), (2, 3), (1, 1), "SAME", {"rhs_dilation": (2, 1)}, (1, 1)),
        ((6,), (3,), (3,), [(1, 0)], {"lhs_dilation": (3,)}, (1, 1)),
        ((8,), (3,), (2,), "SAME", {}, (1, 2)),
        ((4, 8), (3, 5), (1, 4), "SAME", {}, (1, 4)),
        ((4,), (2,), (1,), [(1, 0)], {"lhs_dilation": (2,)}, (2, 1)),
        ((12,), (4,), (3,), [(1, 0)], {"lhs_dilation": (2,)}, (2, 3)),
    ],
)
def test_real_blocks_where_a_frequency_is_its_own_opposite(n, taps, stride, padding, options, block):
    """They are real if they have one position; otherwise only up to the order of rows and columns."""
    shapes = (1, 2, *n), (3, 2, *taps)
    spec = fc.conv_spec(*shapes, stride, padding, padding_mode="circular", **options)
    axes = blocks.block_axes(spec)
    assert all(axis.wraps for axis in axes)
    assert np.prod([axis.block for axis in axes], axis=0).tolist() == [*block]
    alone, paired = blocks.self_opposite_frequencies(axes)
    assert len(alone[0]) > 1
    assert len(alone[0]) + 2 * len(paired[0]) == blocks.block_count(axes)
    kernel = geometries.normals(np.random.default_rng(3), spec.rhs_shape, float)
    want = svd(oracle.matrix(kernel, spec))
    np.testing.assert_allclose(spectrum.singular_values(spec, kernel), want, rtol=0, atol=1e-12)
    lower, upper = spectrum.spectral_norm_bounds(spec, kernel)
    assert lower * (1 - 1e-14) <= want[0] <= upper * (1 + 1e-14)
    assert upper < want[0] * 1.05


def test_values_come_in_descending_order_and_carry_their_derivatives():
    values = jnp.array([0.0, 3.0, 1e-300, jnp.inf, 3.0, 2.0])
    got, slopes = jax.jvp(blocks._descending, (values,), (jnp.arange(6.0),))
    np.testing.assert_array_equal(got, [np.inf, 3, 3, 2, 1e-300, 0])
    np.testing.assert_array_equal(slopes, [3, 1, 4, 5, 2, 0])
    for dtype in (jnp.float32, jnp.float64):
        got = blocks._descending(jnp.array([1, jnp.nan, 2], dtype))
        np.testing.assert_array_equal(got, np.array([np.nan, 2, 1], dtype))
    spec = fc.conv_spec((1, 2, 9), (2, 2, 3), (1,), "SAME", padding_mode="circular")
    assert np.isnan(spectrum.singular_values(spec, jnp.full((2, 2, 3), jnp.nan))).all()


def test_what_is_zero_up_to_rounding_counts_as_zero():
    """Relative to the largest value of M, not of a block: one frequency of these may hold rounding only."""
    rng = np.random.default_rng(6)
    for mode in ("circular", "zeros"):
        spec = fc.conv_spec((1, 3, 7), (3, 3, 3), (1,), "SAME", padding_mode=mode)
        line = rng.standard_normal(3)
        mix = rng.standard_normal((3, 1)) * rng.standard_normal(3)  # of rank 1
        kernel = mix[..., None] * (line - line.mean())  # constants are mapped to 0
        matrix = np.asarray(fc.as_matrix(spec, kernel))
        assert spectrum.rank(spec, kernel) == np.linalg.matrix_rank(matrix) == 7 - (mode == "circular")
        y = rng.standard_normal(spec.out_shape)
        want = oracle.pseudo_inverse(matrix) @ y.ravel()
        got = np.ravel(spectrum.pseudo_inverse(spec, kernel, y))
        np.testing.assert_allclose(got, want, atol=1e-9 * np.abs(want).max())


# derivatives, transformations, errors ------------------------------------------------------------------


def layer(mode="zeros", groups=1):
    options = {"padding_mode": mode, "feature_group_count": groups}
    spec = fc.conv_spec((1, 2, 4, 4), (2, 2 // groups, 3, 3), (1, 1), "SAME", **options)
    return spec, jnp.asarray(np.random.default_rng(1).standard_normal(spec.rhs_shape))


@pytest.mark.parametrize(
    ("function", "mode", "order"),
    [
        (spectrum.spectral_norm, "zeros", 1),
        (spectrum.spectral_norm, "reflect", 1),
        (spectrum.frobenius_norm, "symmetric", 2),
        (spectrum.orthogonality_residual, "zeros", 2),
        (spectrum.orthogonality_residual, "edge", 1),
        (spectrum.log_abs_det, "circular", 1),
        (lambda s, k: spectrum.spectral_norm_bounds(s, k)[1], "zeros", 1),
        (lambda s, k: spectrum.spectral_norm_bounds(s, k)[1], "circular", 1),
        (lambda s, k: spectrum.top_singular_values(s, k, 2).sum(), "zeros", 1),
        (spectrum.one_norm, "edge", 1),
        (spectrum.row_norms, "zeros", 1),
        (spectrum.trace, "zeros", 1),
    ],
)
def test_gradients(function, mode, order):
    spec, kernel = layer(mode)
    check_grads(partial(function, spec), (kernel,), order=order, rtol=1e-5, atol=1e-5)


def test_gradients_of_solutions():
    spec, kernel = layer("circular")
    y = jnp.asarray(np.random.default_rng(2).standard_normal(spec.out_shape))
    for function in (spectrum.solve, spectrum.pseudo_inverse, partial(spectrum.lstsq, max_steps=200)):
        check_grads(partial(function, spec), (kernel, y), order=1, modes=["rev"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        spectrum.spectral_norm,
        spectrum.frobenius_norm,
        spectrum.orthogonality_residual,
        spectrum.log_abs_det,
        lambda s, k: spectrum.singular_values(s, k)[:3],
        lambda s, k: spectrum.top_singular_values(s, k, 2),
        lambda s, k: spectrum.spectral_norm_bounds(s, k)[1],
    ],
)
def test_derivatives_along_complex_kernels(function):
    spec, _ = layer("circular" if function is spectrum.log_abs_det else "zeros")
    rng = np.random.default_rng(7)
    kernel, change = (jnp.asarray(geometries.normals(rng, spec.rhs_shape, complex)) for _ in range(2))

    def along(t):
        return function(spec, kernel + t * change)

    slope = jax.jvp(along, (0.0,), (1.0,))[1]
    np.testing.assert_allclose(slope, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-7)


def test_a_second_derivative_of_the_spectral_norm_is_refused():
    spec, kernel = layer()
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.hessian(partial(spectrum.spectral_norm, spec))(kernel)


def test_gradients_vanish_at_the_zero_kernel():
    spec, kernel = layer()
    for function in (spectrum.frobenius_norm, lambda s, k: spectrum.spectral_norm_bounds(s, k)[1]):
        assert not jax.grad(partial(function, spec))(jnp.zeros_like(kernel)).any()


@pytest.mark.parametrize("groups", [1, 2])
def test_jit_and_vmap(groups):
    spec, kernel = layer(groups=groups)
    kernels = jnp.stack([kernel, 2 * kernel])
    for function in (
        spectrum.spectral_norm, spectrum.one_norm, spectrum.singular_values, spectrum.spectral_norm_bounds,
        spectrum.orthogonality_residual, spectrum.trace, spectrum.column_norms, spectrum.log_abs_det,
    ):  # fmt: skip
        one = [np.asarray(function(spec, k)) for k in kernels]
        many = jax.jit(jax.vmap(partial(function, spec)))(kernels)
        want = np.stack(one, axis=1 if isinstance(many, tuple) else 0)
        np.testing.assert_allclose(np.asarray(many), want, rtol=1e-9)


def test_values_that_occur_more_than_once_are_all_found():
    """A Krylov space sees one copy of each: M is too large here for its dense SVD to be taken."""
    spec = fc.conv_spec((1, 1, 150), (1, 1, 3), (1,), "SAME", padding_mode="circular")
    kernel = jnp.array([[[-1.0, 2.0, -1.0]]])
    want = np.asarray(spectrum.singular_values(spec, kernel))[:5]
    assert want[1] - want[2] < 1e-12
    np.testing.assert_allclose(spectrum.top_singular_values(spec, kernel, 5), want, rtol=1e-10)


def test_where_the_iteration_stops_short_there_is_no_number():
    spec = fc.conv_spec((1, 1, 300), (1, 1, 3), (1,), "SAME")
    kernel = jnp.array([[[-1.0, 2.0, -1.0]]])
    norm = partial(spectrum.spectral_norm, spec, max_restarts=1)
    assert jnp.isnan(norm(kernel))
    assert jnp.isnan(jax.grad(norm)(kernel)).all()
    assert jnp.isnan(spectrum.top_singular_values(spec, kernel, 3, max_restarts=1)).all()
    assert spectrum.singular_triplet(spec, kernel, max_restarts=1).residual > 1e-10


def test_a_matrix_without_entries_is_exactly_zero():
    """Every tap falls between the inputs, on an axis that could wrap around: no rounding may be left over."""
    spec = fc.conv_spec((1, 2, 5), (2, 2, 1), (3,), [(1, 1)], lhs_dilation=(3,))
    assert spec.nse == 0
    assert spec.shape == (10, 10)
    kernel, y = jnp.ones(spec.rhs_shape), jnp.ones(spec.out_shape)
    assert not spectrum.singular_values(spec, kernel).any()
    assert not spectrum.pseudo_inverse(spec, kernel, y).any()
    assert spectrum.rank(spec, kernel) == 0
    assert spectrum.log_abs_det(spec, kernel) == -jnp.inf


def test_an_orthogonal_kernel_is_an_isometry():
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
    kernel = np.zeros((4, 4, 3, 3))
    kernel[:, :, 1, 1] = turn
    for mode in ("zeros", "circular", "edge"):
        spec = fc.conv_spec((1, 4, 5, 6), kernel.shape, (1, 1), "SAME", padding_mode=mode)
        assert spectrum.orthogonality_residual(spec, kernel) < 1e-13  # not the root of rounding
        np.testing.assert_allclose(spectrum.singular_values(spec, kernel), 1, atol=1e-12)
        np.testing.assert_allclose(spectrum.spectral_norm_bounds(spec, kernel), 1, rtol=1e-3)
        np.testing.assert_allclose(spectrum.spectral_norm(spec, kernel), 1, rtol=1e-12)


def test_rows_of_zeros_are_counted_where_the_unit_matrix_has_ones():
    """The first output reads padding only: its row is 0, and the residual of the others 0."""
    spec = fc.conv_spec((1, 1, 6), (1, 1, 1), (2,), [(1, 0)])
    assert spec.shape == (4, 6)
    assert spectrum.orthogonality_residual(spec, jnp.ones((1, 1, 1))) == 1


def test_the_trace_of_groups_that_the_diagonal_leaves():
    """Two outputs per input channel: entry (3, 3) belongs to no group, and is 0."""
    spec = fc.conv_spec((1, 2, 3), (4, 1, 1), (1,), "VALID", feature_group_count=2)
    kernel = jnp.arange(1, 5).reshape(4, 1, 1)
    assert spectrum.trace(spec, kernel) == np.trace(fc.as_matrix(spec, kernel)) == 3


def test_norms_of_half_precision_are_those_of_single():
    """Summed in float16, squares of 200 would be infinite."""
    spec = fc.conv_spec((1, 1, 9), (1, 1, 2), (1,), "VALID")
    kernel = jnp.full((1, 1, 2), 200, jnp.float16)
    for got, want in (
        (spectrum.frobenius_norm(spec, kernel), 800),
        (spectrum.row_norms(spec, kernel), 200 * 2**0.5),
        (spectrum.column_norms(spec, kernel)[0], 200),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("times", [9, 12, 14, 16, 20])
def test_the_default_cut_off_is_the_longer_side_of_the_matrix_times_eps(times):
    """As in numpy.linalg.matrix_rank: of 10 x 15, a value of 12 eps is none, one of 16 eps is."""
    spec = fc.conv_spec((1, 3, 5), (2, 3, 1), (1,), "VALID")
    kernel = np.zeros((2, 3, 1))
    kernel[0, 0], kernel[1, 1] = 1, times * np.finfo(float).eps
    counts = times > 15
    assert spectrum.rank(spec, kernel) == 5 * (1 + counts)
    solution = spectrum.pseudo_inverse(spec, kernel, jnp.ones(spec.out_shape))
    np.testing.assert_allclose(solution[1], counts / kernel[1, 1, 0])


def test_more_values_than_one_group_has():
    spec = fc.conv_spec((1, 2, 3), (2, 1, 1), (1,), "VALID", feature_group_count=2)
    values = spectrum.top_singular_values(spec, jnp.array([[[3.0]], [[5.0]]]), 5)
    np.testing.assert_allclose(values, [5, 5, 5, 3, 3], rtol=1e-12)


def test_a_cover_one_short_would_wrap_into_the_matrix():
    """Its peak half way between two of 24 frequencies is below the norm of M, which is one of 25."""
    line = np.exp(1j * np.pi / 24 * np.arange(3))
    spec = fc.conv_spec((1, 1, 24, 24), (1, 1, 3, 3), (1, 1), "SAME")
    exact = (1 + 2 * np.cos(np.pi / 25)) ** 2
    lower, upper = spectrum.spectral_norm_bounds(spec, jnp.asarray(np.outer(line, line)[None, None]))
    assert exact * (1 - 1e-6) <= lower <= exact * (1 + 1e-14)
    assert exact * (1 - 1e-14) <= upper < exact * 1.01


@pytest.mark.parametrize("n", [3, 5, 7])
def test_a_stride_that_goes_further_than_once_around(n):
    """The last outputs begin behind the end: in circular mode they read inputs, but no frequencies."""
    spec = fc.conv_spec((1, 2, n), (3, 2, 2), (2,), [(0, 3)], padding_mode="circular")
    assert 2 * spec.axes[0].out_size > n
    kernel = geometries.normals(np.random.default_rng(n), spec.rhs_shape, float)
    want = svd(oracle.matrix(kernel, spec))
    np.testing.assert_allclose(spectrum.singular_values(spec, kernel), want, rtol=0, atol=1e-12)


def test_least_squares(run_seed):
    rng = np.random.default_rng(run_seed)
    for options in ({"window_strides": (2,)}, {"window_strides": (1,), "lhs_dilation": (2,)}):
        spec = fc.conv_spec((1, 2, 9), (3, 2, 3), padding=[(1, 2)], **options)
        kernel, y = rng.standard_normal(spec.rhs_shape), rng.standard_normal(spec.out_shape)
        want = np.linalg.lstsq(np.asarray(fc.as_matrix(spec, kernel)), y.ravel(), rcond=None)[0]
        got = np.ravel(spectrum.lstsq(spec, kernel, y))
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7 * np.abs(want).max())


def test_least_squares_that_do_not_converge_are_no_numbers():
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


def test_bounds_on_an_image_beyond_the_dense_size():
    """The covering circulants and the grid of frequencies, against the true value."""
    rng = np.random.default_rng(4)
    for n, c in (((12, 12), 4), ((300,), 2), ((1100,), 1)):
        for stride in (1, 2):
            shape = (c, c, *[3] * len(n))
            spec = fc.conv_spec((1, c, *n), shape, (stride,) * len(n), "SAME")
            kernel = rng.standard_normal(shape)
            top = svd(np.asarray(fc.as_matrix(spec, kernel)))[0]
            lower, upper = spectrum.spectral_norm_bounds(spec, kernel)
            assert lower <= top <= upper < 1.06 * lower, (n, c, stride)


@pytest.mark.parametrize("phase", np.linspace(0, np.pi / 16, 5))
def test_bounds_reach_between_the_frequencies_of_a_grid(phase):
    """A long axis has 32 frequencies per degree: ``|1 + exp(i (phase + f))|`` peaks anywhere between two."""
    spec = fc.conv_spec((1, 1, 700), (1, 1, 2), (1,), "VALID")
    exact = 2 * np.cos(np.pi / 1400)
    lower, upper = spectrum.spectral_norm_bounds(spec, jnp.array([[[1, np.exp(1j * phase)]]]))
    assert lower <= exact <= upper <= 2 * (1 + 1e-10)


@pytest.mark.parametrize(("mode", "copies"), [("edge", 6), ("reflect", 2), ("symmetric", 2)])
def test_bounds_count_the_copies_of_a_boundary_mode(mode, copies):
    """One tap of weight 1: M copies an input so often, and the wrapped matrix inside has norm 1."""
    spec = fc.conv_spec((1, 1, 600), (1, 1, 1), (1,), [(5, 0)], padding_mode=mode)
    lower, upper = spectrum.spectral_norm_bounds(spec, jnp.ones((1, 1, 1)))
    assert copies**0.5 * (1 - 1e-8) <= lower <= copies**0.5 * (1 + 1e-14) <= upper * (1 + 2e-14)
    assert upper <= copies**0.5 * (1 + 1e-8)


@pytest.mark.parametrize(("padding", "mode"), [("SAME", "circular"), ("VALID", "zeros"), ("SAME", "edge")])
def test_bounds_hold_where_all_is_computed_in_single_precision(padding, mode):
    rng = np.random.default_rng(11)
    for _ in range(8):
        kernel = rng.random((3, 3, 3, 3)).astype(np.float32)
        with jax.enable_x64(False):
            spec = fc.conv_spec((1, 3, 6, 8), kernel.shape, (1, 1), padding, padding_mode=mode)
            exact = svd(oracle.matrix(kernel, spec).astype(np.float64))[0]
            lower, upper = spectrum.spectral_norm_bounds(spec, kernel)
            assert lower.dtype == upper.dtype == np.float32
        assert exact * 0.99 < float(lower) <= exact <= float(upper) < exact * 1.01


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

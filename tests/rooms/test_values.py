"""Singular values, condition number, rank and determinant, against NumPy and against closed forms."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import CASES
from spectra import conv, drawn, every_number, svd

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum


def of_length(n):
    """(name, spec, kernel, singular values), each from its formula."""
    tri, box = [-1, 2, -1], [1, 1, 1]
    j, k = np.arange(n), np.arange(1, n + 1)
    yield "tridiagonal", *conv((n,), tri, [(1, 1)]), 2 - 2 * np.cos(k * np.pi / (n + 1))
    yield "periodic", *conv((n,), tri, [(1, 1)], "circular"), 2 - 2 * np.cos(2 * np.pi * j / n)
    yield "Neumann", *conv((n,), tri, [(1, 1)], "edge"), 2 - 2 * np.cos(np.pi * j / n)
    yield "box", *conv((n,), box, [(1, 1)]), abs(1 + 2 * np.cos(k * np.pi / (n + 1)))
    yield "differences", *conv((n,), [-1, 1], [(0, 0)]), 2 * np.sin(k[:-1] * np.pi / (2 * n))
    yield "full", *conv((n,), [-1, 1], [(1, 1)]), 2 * np.sin(k * np.pi / (2 * n + 2))
    causal = 2 * np.sin((2 * k - 1) * np.pi / (4 * n + 2))
    yield "causal", *conv((n,), [-1, 1], [(1, 0)]), causal
    yield "upsampling", *conv((n,), [1, 1], [(1, 1)], lhs_dilation=(2,)), np.full(n, 2**0.5)
    line = 2 - 2 * np.cos(k * np.pi / (n + 1))
    laplacian = [[0, -1, 0], [-1, 4, -1], [0, -1, 0]]
    yield "Laplacian", *conv((n, n), laplacian, "SAME"), (line[:, None] + line).ravel()
    ring = 2 - 2 * np.cos(2 * np.pi * j / n)
    yield "torus", *conv((n, n), laplacian, "SAME", "circular"), (ring[:, None] + ring).ravel()
    sobel = np.outer(2 + 2 * np.cos(k * np.pi / (n + 1)), abs(2 * np.cos(k * np.pi / (n + 1))))
    yield "Sobel", *conv((n, n), np.outer([1, 2, 1], [-1, 0, 1]), "SAME"), sobel.ravel()


def of_any_layer():
    haar = np.array([[[1, 1]], [[1, -1]]]) / 2**0.5
    yield "Haar", fc.conv_spec((1, 1, 8), haar.shape, (2,), "VALID"), jnp.asarray(haar), np.ones(8)
    mean = fc.conv_spec((1, 3, 4, 6), (3, 1, 2, 2), (2, 2), "VALID", feature_group_count=3)
    yield "average pooling", mean, jnp.full((3, 1, 2, 2), 0.25), np.full(18, 0.5)
    mix = np.array([[3.0, 0], [4, 5]])[..., None]
    values = np.repeat([45**0.5, 5**0.5], 3)
    yield "1x1", fc.conv_spec((1, 2, 3), (2, 2, 1), (1,), "VALID"), jnp.asarray(mix), values


@pytest.mark.parametrize("n", [3, 8, pytest.param(17, marks=pytest.mark.long), None])
def test_closed_forms(n):
    """All of one length in one program."""
    names, specs, kernels, wanted = zip(*(of_length(n) if n else of_any_layer()), strict=True)
    of_all = jax.jit(lambda kernels: list(map(spectrum.singular_values, specs, kernels)))
    for name, got, want in zip(names, of_all(kernels), wanted, strict=True):
        np.testing.assert_allclose(got, np.sort(want)[::-1], rtol=0, atol=1e-10, err_msg=name)


def test_closed_forms_of_the_largest_value_and_the_determinant():
    for n in (4, 9):
        spec, kernel = conv((n,), [-1, 2, -1], [(1, 1)])
        top = 2 - 2 * np.cos(np.arange(n, 0, -1) * np.pi / (n + 1))
        norm, largest, logarithm, condition = jax.jit(
            lambda k, spec=spec: (
                spectrum.spectral_norm(spec, k), spectrum.top_singular_values(spec, k, 3),
                spectrum.log_abs_det(spec, k), spectrum.condition_number(spec, k),
            )
        )(kernel)  # fmt: skip
        np.testing.assert_allclose(norm, top[0], rtol=1e-12)
        np.testing.assert_allclose(largest, top[:3], rtol=1e-10)
        np.testing.assert_allclose(logarithm, np.log(n + 1), rtol=1e-12)
        np.testing.assert_allclose(condition, top[0] / top[-1], rtol=1e-10)
    spec, kernel = conv((6,), [-1, 2, -1], [(1, 1)], "circular")
    assert spectrum.rank(spec, kernel) == 5
    # Values of multiplicity two, each counted twice.
    np.testing.assert_allclose(spectrum.top_singular_values(spec, kernel, 4), [4, 3, 3, 1], atol=1e-9)


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


@every_number
def test_values(run_seed, number):
    spec, kernel, _, matrix, name = drawn(run_seed, number)
    values = svd(matrix)
    top = values.max(initial=0)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 * top, err_msg=name)
    square = spec.in_size == spec.out_size
    found, counted, condition, logarithm = jax.jit(
        lambda k: (
            spectrum.singular_values(spec, k),
            spectrum.rank(spec, k, rtol=oracle.CUTOFF),
            spectrum.condition_number(spec, k) if matrix.size else None,
            spectrum.log_abs_det(spec, k) if square else None,
        )
    )(kernel)
    close(found, values)
    rank = oracle.rank(values) if matrix.size else None
    if rank is None:
        return  # a value is close to the cut-off: no rank is certain
    assert counted == rank, name
    if rank < min(spec.shape) or top > 1e5 * values[-1]:
        return  # ill-conditioned: NumPy has no more digits
    close(condition, top / values[-1], atol=0)
    if square:
        np.testing.assert_allclose(logarithm, np.linalg.slogdet(matrix)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_come_in_descending_order_and_carry_their_derivatives(dtype):
    """A kernel of one tap and one channel per group: the values are the absolute values of its entries."""
    spec = fc.conv_spec((1, 6, 1), (6, 1, 1), (1,), "VALID", feature_group_count=6)
    kernel = jnp.array([0.5, -3, 1e-30, 7, 3, 2], dtype).reshape(6, 1, 1)
    change = jnp.arange(6.0, dtype=dtype).reshape(6, 1, 1)
    values, slopes = jax.jvp(partial(spectrum.singular_values, spec), (kernel,), (change,))
    np.testing.assert_allclose(values, [7, 3, 3, 2, 0.5, 1e-30], rtol=1e-6)
    np.testing.assert_allclose(slopes, [3, -1, 4, 5, 0, 2], atol=1e-6)
    values = spectrum.singular_values(spec, kernel.at[1].set(jnp.nan))
    np.testing.assert_allclose(values, [np.nan, 7, 3, 2, 0.5, 1e-30], rtol=1e-6)


def test_nan_in_every_value():
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


@pytest.mark.parametrize("times", [9, 12, 14, 16, 20])
def test_the_default_cut_off_is_the_longer_side_of_the_matrix_times_eps(times):
    """As in numpy.linalg.matrix_rank: for 10 x 15, 14 eps counts as 0 and 16 eps does not."""
    spec = fc.conv_spec((1, 3, 5), (2, 3, 1), (1,), "VALID")
    kernel = np.zeros((2, 3, 1))
    kernel[0, 0], kernel[1, 1] = 1, times * np.finfo(float).eps
    counts = times > 15
    assert spectrum.rank(spec, kernel) == 5 * (1 + counts)
    solution = spectrum.pseudo_inverse(spec, kernel, jnp.ones(spec.out_shape))
    np.testing.assert_allclose(solution[1], counts / kernel[1, 1, 0])

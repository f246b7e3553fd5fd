"""M as blocks, seen through what is made of them: values, inverses, determinants and bounds."""

from functools import partial

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from spectra import svd

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum
from jaxconv_fc.spectrum import blocks
from jaxconv_fc.spectrum.blocks import Blocks


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
    assert all(axis.wraps for axis in Blocks.of(spec).axes)
    kernel, y = (geometries.normals(rng, shape, complex) for shape in (spec.rhs_shape, spec.out_shape))
    for k, v in ((kernel, y), (kernel.real, y.real)):
        matrix = oracle.matrix(k, spec)
        want = oracle.pseudo_inverse(matrix) @ v.ravel()
        close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
        square = spec.out_size == spec.in_size
        functions = [spectrum.pseudo_inverse, spectrum.solve] if square else [spectrum.pseudo_inverse]
        made, logarithm = jax.jit(
            lambda k, v, functions=functions, square=square: (
                [of(spec, k, v) for of in functions], spectrum.log_abs_det(spec, k) if square else None
            )
        )(k, v)  # fmt: skip
        for got in made:
            close(np.ravel(got), want)
        if square:
            close(logarithm, np.linalg.slogdet(matrix)[1])


@pytest.mark.parametrize(("most", "groups", "dtype"), [(1, 1, complex), (2**7, 2, float)])
def test_blocks_in_parts_are_the_blocks(most, groups, dtype, monkeypatch):
    """Many frequencies are made part by part, and the last part is filled up."""
    monkeypatch.setattr(blocks, "ENTRIES_AT_ONCE", most)
    jax.clear_caches()
    rng = np.random.default_rng(7)
    shapes = (1, 4, 5, 6), (4, 4 // groups, 3, 2)
    options = {"padding_mode": "circular", "feature_group_count": groups}
    spec = fc.conv_spec(*shapes, (1, 1), "SAME", **options)
    kernel = jnp.asarray(geometries.normals(rng, spec.rhs_shape, dtype))
    matrix = oracle.matrix(kernel, spec)
    values = svd(matrix)
    found, logarithm, slope, bounds = jax.jit(
        lambda kernel: (
            spectrum.singular_values(spec, kernel),
            spectrum.log_abs_det(spec, kernel),
            jax.grad(lambda k: spectrum.log_abs_det(spec, k))(kernel.real),
            spectrum.spectral_norm_bounds(spec, kernel) if most > 1 else None,  # the same parts
        )
    )(kernel)
    np.testing.assert_allclose(found, values, rtol=0, atol=1e-12)
    np.testing.assert_allclose(logarithm, np.linalg.slogdet(matrix)[1], rtol=1e-11)
    if bounds:
        lower, upper = bounds
        assert lower <= values[0] * (1 + 1e-14)
        assert values[0] * (1 - 1e-14) <= upper < values[0] * 1.05
    inverse = np.linalg.inv(oracle.matrix(np.asarray(kernel.real), spec))
    np.testing.assert_allclose(slope, oracle.matrix_gradient(inverse.T, spec), rtol=1e-9, atol=1e-10)


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
    made = Blocks.of(spec)
    assert all(axis.wraps for axis in made.axes)
    assert made.shape == (3 * block[0], 2 * block[1])
    alone, paired = made.opposites
    assert len(alone[0]) > 1
    assert len(alone[0]) + 2 * len(paired[0]) == made.count
    kernel = geometries.normals(np.random.default_rng(3), spec.rhs_shape, float)
    want = svd(oracle.matrix(kernel, spec))
    np.testing.assert_allclose(spectrum.singular_values(spec, kernel), want, rtol=0, atol=1e-12)
    if n in ((4, 6), (12,)):  # one of blocks of one position, one of longer ones
        lower, upper = spectrum.spectral_norm_bounds(spec, kernel)
        assert lower * (1 - 1e-14) <= want[0] <= upper * (1 + 1e-14)
        assert upper < want[0] * 1.05


def test_a_matrix_without_entries_is_exactly_zero():
    """Every tap falls between the inputs, on an axis that wraps around: the frequencies cancel exactly."""
    spec = fc.conv_spec((1, 2, 5), (2, 2, 1), (3,), [(1, 1)], lhs_dilation=(3,))
    assert spec.nse == 0
    assert spec.shape == (10, 10)
    kernel, y = jnp.ones(spec.rhs_shape), jnp.ones(spec.out_shape)

    @jax.jit
    def results(kernel, y):
        return (
            spectrum.singular_values(spec, kernel), spectrum.pseudo_inverse(spec, kernel, y),
            spectrum.rank(spec, kernel), spectrum.log_abs_det(spec, kernel),
        )  # fmt: skip

    values, solution, rank, logarithm = map(np.asarray, results(kernel, y))
    assert not values.any()
    assert not solution.any()
    assert rank == 0
    assert logarithm == -np.inf


@pytest.mark.parametrize("n", [3, 5, 7])
def test_a_stride_that_goes_further_than_once_around(n):
    """The last outputs begin behind the end: they read inputs, but the axis does not wrap around."""
    spec = fc.conv_spec((1, 2, n), (3, 2, 2), (2,), [(0, 3)], padding_mode="circular")
    assert 2 * spec.axes[0].out_size > n
    kernel = geometries.normals(np.random.default_rng(n), spec.rhs_shape, float)
    want = svd(oracle.matrix(kernel, spec))
    np.testing.assert_allclose(spectrum.singular_values(spec, kernel), want, rtol=0, atol=1e-12)

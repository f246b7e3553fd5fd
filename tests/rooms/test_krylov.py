"""The largest singular values by products with M, against NumPy and against closed forms."""

from functools import partial

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import rarely
from spectra import conv, drawn, every_number, layer, svd

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum


@every_number
def test_largest_values(run_seed, number):
    """By blocks, and by a search where these are beyond the memory limit."""
    spec, kernel, _, matrix, name = drawn(run_seed, number)
    values = svd(matrix)
    top = values.max(initial=0)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 * top, err_msg=name)
    k = min(len(values), 1 + (run_seed + number) % 5) if top and number % 2 == 0 else 0

    def largest(kernel):
        return (
            spectrum.singular_triplet(spec, kernel),
            spectrum.spectral_norm(spec, kernel),
            spectrum.top_singular_values(spec, kernel, k) if k else None,
        )

    @jax.jit
    def both(kernel):
        with fc.memory_limit(0):
            searched = largest(kernel)
        return searched, largest(kernel)

    for (value, left, right, residual), norm, several in both(kernel):
        close(value, top)
        assert residual <= 1e-10 * top, name
        close(matrix @ np.ravel(right), float(value) * np.ravel(left))
        close(matrix.conj().T @ np.ravel(left), float(value) * np.ravel(right), atol=1e-9 * top + 1e-12)
        close(norm, top)
        if k:
            close(several, values[:k])


SEVERAL_TIMES = [  # layers in which values occur several times
    (((1, 2, 6, 5), (3, 2, 2, 3)), (2, 1), complex, {"rhs_dilation": (2, 1)}),
    (((1, 4, 6, 8), (4, 2, 3, 2)), (1, 2), float, {"feature_group_count": 2}),
    (((1, 2, 4, 3), (2, 2, 3, 3)), (1, 1), float, {"lhs_dilation": (2, 1)}),
]


@pytest.mark.parametrize("layer", [SEVERAL_TIMES[0], SEVERAL_TIMES[1], rarely(SEVERAL_TIMES[2])])
def test_the_norm_of_blocks_has_the_derivative_of_a_search(layer, rng):
    """With strides, dilations and groups; the value of a triplet too."""
    shapes, strides, dtype, options = layer
    lo = [r * (k - 1) for k, r in zip(shapes[1][2:], options.get("rhs_dilation", (1, 1)), strict=True)]
    pads = [(n // 2, n - n // 2) for n in lo]
    spec = fc.conv_spec(*shapes, strides, pads, padding_mode="circular", **options)
    kernel, change = (geometries.normals(rng, spec.rhs_shape, dtype) for _ in range(2))
    kernel[-1] *= 3  # the last group has the largest value
    norms = [np.linalg.norm(oracle.matrix(kernel + t * change, spec), 2) for t in (0, 1e-6, -1e-6)]
    want = norms[0], (norms[1] - norms[2]) / 2e-6

    @jax.jit
    def slopes(kernel, change):
        norm = partial(spectrum.spectral_norm, spec)
        of_triplet = jax.grad(lambda kernel: spectrum.singular_triplet(spec, kernel).value)(kernel)
        with fc.memory_limit(0):
            search = jax.jvp(norm, (kernel,), (change,))
        return jax.jvp(norm, (kernel,), (change,)), search, jnp.sum(of_triplet * change).real

    along, search, of_triplet = slopes(kernel, change)
    np.testing.assert_allclose(along, want, rtol=1e-6)
    np.testing.assert_allclose(of_triplet, along[1], rtol=1e-9)
    np.testing.assert_allclose(search, along, rtol=1e-6)


@pytest.mark.parametrize("tolerance", [rarely(1e-5), None])
def test_a_long_search_goes_on_until_the_residual_is_what_was_asked_for(tolerance):
    """The two largest values are 3e-4 apart: eight runs to 1e-10."""
    spec, kernel = conv((300,), [-1, 2, -1], [(1, 1)])
    want = 2 - 2 * np.cos(300 * np.pi / 301)
    found, norm = jax.jit(
        lambda kernel: (
            spectrum.singular_triplet(spec, kernel, tolerance=tolerance),
            spectrum.spectral_norm(spec, kernel, tolerance=tolerance),
        )
    )(kernel)
    assert found.residual <= (tolerance or 1e-10) * found.value
    assert abs(found.value - want) <= found.residual
    np.testing.assert_allclose(norm, found.value, rtol=1e-13)


@pytest.mark.parametrize("mode", ["circular", rarely("zeros")])
def test_values_of_a_complex_kernel_are_counted_once(mode):
    spec = fc.conv_spec((1, 2, 6, 5), (3, 2, 3, 3), (1, 1), "SAME", padding_mode=mode)
    kernel = geometries.normals(np.random.default_rng(1), spec.rhs_shape, complex)
    with fc.memory_limit(0):
        got = spectrum.top_singular_values(spec, kernel, 4)
    np.testing.assert_allclose(got, svd(oracle.matrix(kernel, spec))[:4], rtol=1e-9)


def test_values_that_occur_more_than_once_are_all_found():
    """A Krylov space sees one copy of each."""
    spec = fc.conv_spec((1, 1, 150), (1, 1, 3), (1,), "SAME", padding_mode="circular")
    kernel = jnp.array([[[-1.0, 2.0, -1.0]]])
    want = np.asarray(spectrum.singular_values(spec, kernel))[:5]
    assert want[1] - want[2] < 1e-12
    with fc.memory_limit(0):
        np.testing.assert_allclose(spectrum.top_singular_values(spec, kernel, 5), want, rtol=1e-10)


def test_more_values_than_one_group_has():
    spec = fc.conv_spec((1, 2, 3), (2, 1, 1), (1,), "VALID", feature_group_count=2)
    values = spectrum.top_singular_values(spec, jnp.array([[[3.0]], [[5.0]]]), 5)
    np.testing.assert_allclose(values, [5, 5, 5, 3, 3], rtol=1e-12)
    with fc.memory_limit(0):  # the vectors of a search are those of the largest group alone
        found = spectrum.singular_triplet(spec, jnp.array([[[3.0]], [[5.0]]]))
    np.testing.assert_allclose(found.value, 5, rtol=1e-12)
    assert not found.left[0].any() and not found.right[0].any()  # noqa: PT018


def test_a_search_that_does_not_converge_gives_nan():
    spec = fc.conv_spec((1, 1, 300), (1, 1, 3), (1,), "SAME")
    kernel = jnp.array([[[-1.0, 2.0, -1.0]]])
    norm = partial(spectrum.spectral_norm, spec, max_restarts=1)
    made, triplet = jax.jit(
        lambda kernel: (
            (
                *jax.value_and_grad(norm)(kernel),
                spectrum.top_singular_values(spec, kernel, 3, max_restarts=1),
            ),
            spectrum.singular_triplet(spec, kernel, max_restarts=1),
        )
    )(kernel)
    assert all(np.isnan(v).all() for v in made)
    assert triplet.residual > 1e-10


def test_a_second_derivative_of_a_search_is_refused():
    spec, kernel = layer()
    with fc.memory_limit(0), pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.hessian(partial(spectrum.spectral_norm, spec))(kernel)

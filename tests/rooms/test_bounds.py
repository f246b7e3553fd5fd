"""Bounds of the spectral norm: they hold for the oracle's matrix, rounding included, and are tight."""

import math

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import rarely
from spectra import drawn, every_number, svd

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum
from jaxconv_fc.spectrum import bounds


@every_number
def test_bounds(run_seed, number, record_property):
    spec, kernel, _, _, name = drawn(run_seed, number)
    # Each precision for itself, in turn: a program takes as long to compile as all else here together.
    single = np.complex64 if np.iscomplexobj(kernel) else np.float32
    narrow = kernel.astype(kernel.dtype if number % 2 else single)
    exact = svd(oracle.matrix(oracle.wide(narrow), spec)).max(initial=0)
    lower, upper = (float(v) for v in spectrum.spectral_norm_bounds(spec, narrow))
    assert lower * (1 - 1e-14) <= exact <= upper * (1 + 1e-14), name  # NumPy's own rounding
    if exact:
        record_property("gap", upper / lower - 1)


def adversaries(rng, shape):
    """Rank one, equal top values, one huge tap, cancelling taps."""
    line = [rng.standard_normal((n, *[1] * (len(shape) - i - 1))) for i, n in enumerate(shape)]
    yield math.prod(line[1:], start=line[0])
    equal = np.zeros(shape)
    equal[(*[np.arange(min(shape[:2]))] * 2, *(n // 2 for n in shape[2:]))] = rng.uniform(1, 2)
    yield equal
    huge = rng.standard_normal(shape)
    huge.flat[rng.integers(huge.size)] = 10.0 ** rng.integers(3, 9)
    yield huge
    cancelling = rng.standard_normal(shape)
    axes = tuple(range(2, len(shape)))
    yield cancelling - cancelling.mean(axes, keepdims=True)
    yield np.where(rng.random(shape) < 0.5, 1.0, -1.0) * 10.0 ** rng.integers(-6, 6, shape)


@every_number
def test_bounds_of_adversarial_kernels(run_seed, number):
    rng = np.random.default_rng([run_seed, number, 12])
    geometry = geometries.random_geometry(rng)
    while 0 in geometry.spec().shape or max(geometry.spec().shape) > 200:
        geometry = geometries.random_geometry(rng)
    spec, dtype = geometry.spec(), ("float32", "float64")[number % 2]
    for i, kernel in enumerate(adversaries(rng, geometry.rhs_shape)):
        kernel = np.ldexp(kernel, int(rng.integers(-60, 60))).astype(dtype)
        exact = np.linalg.norm(oracle.matrix(kernel.astype(float), geometry), 2)
        with jax.enable_x64(dtype == "float64"):
            lower, upper = map(float, spectrum.spectral_norm_bounds(spec, kernel))
        name = f"adversary {i}, JAXCONV_FC_SEED={run_seed}, number {number}: {geometry}"
        assert lower * (1 - 1e-14) <= exact <= upper * (1 + 1e-14), name


def test_bounds_where_taps_that_meet_cancel():
    """The rounding of a product is that of the taps, not that of their sum: the lower bound was too high."""
    shapes = (2, 1, 1, 1, 4), (1, 2, 3, 1, 2), (1, 3, 3), [(0, 1), (4, 3), (4, 2)]
    numbers = ("HCDWN", "HOWID", "NDHCW")
    spec = fc.conv_spec(*shapes, None, (1, 3, 3), numbers, 1, 2, padding_mode="edge")
    for seed in range(4):
        kernel = np.random.default_rng(seed).standard_normal(spec.rhs_shape)
        kernel = (kernel - kernel.mean((2, 3, 4), keepdims=True)).astype(np.float32)
        exact = np.linalg.norm(oracle.matrix(kernel.astype(float), spec), 2)
        with jax.enable_x64(False):
            lower, upper = map(float, spectrum.spectral_norm_bounds(spec, kernel))
        assert lower <= exact <= upper


def test_a_cover_one_short_would_wrap_into_the_matrix():
    """The norm of M is above every value at 24 frequencies, half way between two of which its peak is."""
    line = np.exp(1j * np.pi / 24 * np.arange(3))
    spec = fc.conv_spec((1, 1, 24, 24), (1, 1, 3, 3), (1, 1), "SAME")
    exact = (1 + 2 * np.cos(np.pi / 25)) ** 2
    lower, upper = spectrum.spectral_norm_bounds(spec, jnp.asarray(np.outer(line, line)[None, None]))
    assert exact * (1 - 1e-6) <= lower <= exact * (1 + 1e-14)
    assert exact * (1 - 1e-14) <= upper < exact * 1.01


@pytest.mark.long
def test_bounds_on_an_image_beyond_the_dense_size():
    """The covering circulants and the grid of frequencies, against the true value."""
    rng = np.random.default_rng(4)
    for n, c, stride in (((12, 12), 4, 1), ((300,), 2, 1), ((1100,), 1, 2)):
        shape = (c, c, *[3] * len(n))
        spec = fc.conv_spec((1, c, *n), shape, (stride,) * len(n), "SAME")
        kernel = rng.standard_normal(shape)
        gram = (matrix := oracle.matrix(kernel, spec)) @ matrix.T
        top = np.linalg.eigvalsh(gram)[-1] ** 0.5
        lower, upper = spectrum.spectral_norm_bounds(spec, kernel)
        assert lower <= top * (1 + 1e-12) <= upper * (1 + 2e-12) < 1.06 * lower, (n, c, stride)


def test_gram_iteration_of_complex_matrices(rng):
    """At most rank**(2**-8) above the norm after 7 steps, and never below it."""
    for shape in ((8, 6, 4), (8, 4, 4)):
        matrix = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
        top = np.linalg.norm(matrix, 2, axis=(-2, -1))
        bound = np.asarray(jax.jit(lambda m: bounds._gram_bound(m, 7))(matrix))
        assert (top <= bound).all()
        assert (bound <= top * 4 ** (2**-8) * (1 + 1e-12)).all()


@pytest.mark.parametrize("phase", np.linspace(0, np.pi / 16, 3))
def test_bounds_reach_between_the_frequencies_of_a_grid(phase):
    """A long axis has 32 frequencies per span: the peak of ``|1 + exp(i (phase + f))|`` is between two."""
    spec = fc.conv_spec((1, 1, 700), (1, 1, 2), (1,), "VALID")
    exact = 2 * np.cos(np.pi / 1400)
    lower, upper = spectrum.spectral_norm_bounds(spec, jnp.array([[[1, np.exp(1j * phase)]]]))
    assert lower <= exact <= upper <= 2 * (1 + 1e-10)


@pytest.mark.parametrize(("mode", "copies"), [("edge", 6), rarely("reflect", 2)])
def test_bounds_count_the_copies_of_a_boundary_mode(mode, copies):
    """One tap of weight 1: M copies an input this often, and the matrix that wraps around has norm 1."""
    spec = fc.conv_spec((1, 1, 600), (1, 1, 1), (1,), [(5, 0)], padding_mode=mode)
    lower, upper = spectrum.spectral_norm_bounds(spec, jnp.ones((1, 1, 1)))
    assert copies**0.5 * (1 - 1e-8) <= lower <= copies**0.5 * (1 + 1e-14) <= upper * (1 + 2e-14)
    assert upper <= copies**0.5 * (1 + 1e-8)


@pytest.mark.parametrize(
    ("padding", "mode"),
    [("SAME", "circular"), rarely("VALID", "zeros"), rarely("SAME", "edge")],
)
def test_bounds_hold_where_all_is_computed_in_single_precision(padding, mode):
    rng = np.random.default_rng(11)
    for _ in range(4):
        kernel = rng.random((3, 3, 3, 3)).astype(np.float32)
        with jax.enable_x64(False):
            spec = fc.conv_spec((1, 3, 6, 8), kernel.shape, (1, 1), padding, padding_mode=mode)
            exact = svd(oracle.matrix(kernel, spec).astype(np.float64))[0]
            lower, upper = spectrum.spectral_norm_bounds(spec, kernel)
            assert lower.dtype == upper.dtype == np.float32
        assert exact * 0.99 < float(lower) <= exact <= float(upper) < exact * 1.01

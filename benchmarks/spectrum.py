"""Spectra against the recipes in use: NumPy's FFT recipe, power iteration, scipy's svds.

    python benchmarks/spectrum.py [--quick] [--rounds N]

Every figure is a ratio of times taken side by side in one run (see _timing.py). --quick takes small arrays,
to see that everything runs: its figures mean nothing.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from _timing import environment, interleaved

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum

jax.config.update("jax_enable_x64", True)

# The aims: all circular values at least ... times faster than NumPy, the largest at least ... times faster
# than power iteration and no slower than svds.
RECIPE_RATIO, POWER_RATIO, SVDS_RATIO = 2.0, 3.0, 1.0
TOLERANCE = 1e-4
LAYOUT = ("NHWC", "HWIO", "NHWC")


def geometry(n, channels, mode):
    shapes = (1, n, n, channels), (3, 3, channels, channels)
    return fc.conv_spec(*shapes, (1, 1), "SAME", dimension_numbers=LAYOUT, padding_mode=mode)


def all_values(n, channels, rounds):
    spec = geometry(n, channels, "circular")
    kernel = np.random.default_rng(0).standard_normal(spec.rhs_shape)

    def ours():
        return spectrum.singular_values(spec, kernel)

    def recipe():  # Sedghi, Gupta & Long (2019), as published
        return np.linalg.svd(np.fft.fft2(kernel, (n, n), axes=(0, 1)), compute_uv=False)

    timings = interleaved({"ours": ours, "recipe": recipe}, rounds)
    difference = np.abs(np.sort(recipe().ravel())[::-1] - ours()).max() / np.max(ours())
    ratio = timings.ratio("recipe", "ours")
    print(
        f"all values, circular 3x3, {n}x{n}, {channels} channels: {1000 * timings.median('ours'):.0f} ms, "
        f"NumPy recipe {1000 * timings.median('recipe'):.0f} ms: x {ratio:.2f} (aim {RECIPE_RATIO}), "
        f"apart by {difference:.0e}"
    )


@partial(jax.jit, static_argnums=2)
def power_iteration(spec, kernel, steps):
    """The usual estimate: ||M v|| after `steps` rounds of v -> M^T M v."""

    def step(_, v):
        v = fc.apply_transpose(spec, kernel, fc.apply(spec, kernel, v))
        return v / jnp.linalg.norm(v)

    v = jax.lax.fori_loop(0, steps, step, jax.random.normal(jax.random.key(1), spec.in_shape, kernel.dtype))
    return jnp.linalg.norm(fc.apply(spec, kernel, v)) / jnp.linalg.norm(v)


def largest_value(n, channels, rounds):
    spec = geometry(n, channels, "zeros")
    kernel = jax.random.normal(jax.random.key(0), spec.rhs_shape, jnp.float64)
    exact = spectrum.spectral_norm(spec, kernel, tolerance=1e-10)
    ours = partial(spectrum.spectral_norm, spec, kernel, tolerance=TOLERANCE)
    found = spectrum.singular_triplet(spec, kernel, tolerance=TOLERANCE)
    error = max(float(abs(found.value / exact - 1)), 1e-15)
    # How long power iteration takes to that error, or to the one that was asked for.
    steps = {}
    for name, aim in (("power, our error", error), ("power, tolerance", TOLERANCE)):
        steps[name] = 8
        while abs(power_iteration(spec, kernel, steps[name]) / exact - 1) > aim and steps[name] < 4096:
            steps[name] *= 2
    product = jax.jit(lambda v: fc.apply(spec, kernel, v.reshape(spec.in_shape)).ravel())
    adjoint = jax.jit(lambda v: fc.apply_transpose(spec, kernel, v.reshape(spec.out_shape)).ravel())
    operator = scipy.sparse.linalg.LinearOperator(
        spec.shape, lambda v: np.asarray(product(v)), lambda v: np.asarray(adjoint(v)), dtype=np.float64
    )
    contestants = {name: partial(power_iteration, spec, kernel, count) for name, count in steps.items()}
    contestants |= {
        "ours": ours,
        "svds": lambda: scipy.sparse.linalg.svds(operator, 1, tol=TOLERANCE, return_singular_vectors=False),
    }
    timings = interleaved(contestants, rounds)
    print(
        f"largest value, zeros 3x3, {n}x{n}, {channels} channels, to {TOLERANCE}: "
        f"{1000 * timings.median('ours'):.0f} ms, residual {float(found.residual / found.value):.0e}, "
        f"error {error:.0e}"
    )
    for name, count in steps.items():
        print(f"  {name} ({count} steps): x {timings.ratio(name, 'ours'):.2f} (aim {POWER_RATIO})")
    print(f"  svds to the same tolerance: x {timings.ratio('svds', 'ours'):.2f} (aim {SVDS_RATIO})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(environment())
    for n, channels in [(8, 4)] if arguments.quick else [(32, 32), (32, 64), (8, 128)]:
        all_values(n, channels, arguments.rounds)
    largest_value(*((8, 4) if arguments.quick else (32, 32)), arguments.rounds)


if __name__ == "__main__":
    main()

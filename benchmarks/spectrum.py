"""Singular values against the recipes in use."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg

import jaxconv_fc as fc
from benchmarks.layers import NHWC
from benchmarks.rows import Cannot, Row, Table
from jaxconv_fc import spectrum

TOLERANCE = 1e-4
ESTIMATE = "orthogonium (estimate)"
STEPS = 3  # of its estimate: each one doubles the kernel, whose square it holds in memory


def geometry(n, channels, mode):
    shapes = (1, n, n, channels), (3, 3, channels, channels)
    return fc.conv_spec(*shapes, (1, 1), "SAME", dimension_numbers=NHWC, padding_mode=mode)


def _all_values(quick):
    with jax.enable_x64(True):
        for n, channels in [(6, 4)] if quick else [(32, 32), (32, 64), (8, 128)]:
            spec = geometry(n, channels, "circular")
            kernel = np.random.default_rng(0).standard_normal(spec.rhs_shape)
            others = {
                "NumPy recipe": partial(_recipe, kernel, n),
                "dense SVD of M": partial(_dense, spec, kernel),
            }
            yield Row(
                f"{n}x{n}, {channels} channels",
                partial(_ours, spec, kernel),
                others,
                size=f"{spec.in_size:,} values",
                value=np.sort,
            )


def _ours(spec, kernel):
    return lambda: spectrum.singular_values(spec, kernel)


def _recipe(kernel, n):
    """Sedghi, Gupta & Long (2019), as published."""
    return lambda: np.linalg.svd(np.fft.fft2(kernel, (n, n), axes=(0, 1)), compute_uv=False).ravel()


def _dense(spec, kernel):
    if spec.in_size > 2000:
        raise Cannot("takes minutes")
    matrix = np.asarray(fc.as_matrix(spec, kernel))
    return lambda: np.linalg.svd(matrix, compute_uv=False)


@partial(jax.jit, static_argnums=(0, 2))
def power_iteration(spec, kernel, steps):
    """The usual estimate: ||M v|| after `steps` rounds of v -> M^T M v."""

    def step(_, v):
        v = fc.apply_transpose(spec, kernel, fc.apply(spec, kernel, v))
        return v / jnp.linalg.norm(v)

    v = jax.lax.fori_loop(0, steps, step, jax.random.normal(jax.random.key(1), spec.in_shape, kernel.dtype))
    return jnp.linalg.norm(fc.apply(spec, kernel, v)) / jnp.linalg.norm(v)


def _largest(quick):
    with jax.enable_x64(True):
        n, channels = (6, 4) if quick else (32, 32)
        for mode in ("zeros", "circular"):
            spec = geometry(n, channels, mode)
            kernel = jax.random.normal(jax.random.key(0), spec.rhs_shape, jnp.float64)
            exact = float(spectrum.spectral_norm(spec, kernel, tolerance=1e-10))
            others = {
                "power iteration": partial(_power, spec, kernel, exact),
                "svds": partial(_svds, spec, kernel),
                "matfree": partial(_matfree, spec, kernel, exact),
                ESTIMATE: partial(_orthogonium, spec, kernel),
            }
            size = f"norm {exact:.4f}"
            with contextlib.suppress(ImportError):
                size += f", orthogonium {_orthogonium(spec, kernel)():.4f}"
            name = f"{mode}, {n}x{n}, {channels} channels"
            yield Row(name, partial(_norm, spec, kernel), others, size=size, value=_value)


def _value(norm):
    return np.atleast_1d(np.asarray(norm, np.float64))


def _norm(spec, kernel):
    return lambda: spectrum.spectral_norm(spec, kernel, tolerance=TOLERANCE)


def _power(spec, kernel, exact):
    """As many steps as reach the tolerance: somebody who does not know the norm takes more."""
    steps = 8
    while abs(power_iteration(spec, kernel, steps) / exact - 1) > TOLERANCE and steps < 4096:
        steps *= 2
    return lambda: power_iteration(spec, kernel, steps)


def _svds(spec, kernel):
    product = jax.jit(lambda v: fc.apply(spec, kernel, v.reshape(spec.in_shape)).ravel())
    adjoint = jax.jit(lambda v: fc.apply_transpose(spec, kernel, v.reshape(spec.out_shape)).ravel())
    operator = scipy.sparse.linalg.LinearOperator(
        spec.shape, lambda v: np.asarray(product(v)), lambda v: np.asarray(adjoint(v)), dtype=np.float64
    )
    return lambda: scipy.sparse.linalg.svds(operator, 1, tol=TOLERANCE, return_singular_vectors=False)


def _matfree(spec, kernel, exact):
    """Its bidiagonalisation with re-orthogonalisation, deep enough for the tolerance."""
    from matfree import decomp

    start = jax.random.normal(jax.random.key(1), (spec.in_size,), jnp.float64)

    def product(v):
        return fc.apply(spec, kernel, v.reshape(spec.in_shape)).ravel()

    def largest(depth):
        bidiagonal = decomp.bidiag(depth, materialize=True)
        return jax.jit(lambda v: jnp.linalg.svd(bidiagonal(product, v).J_small, compute_uv=False)[0])

    depth = 8
    while abs(largest(depth)(start) / exact - 1) > TOLERANCE and depth < 512:
        depth *= 2
    compiled = largest(depth)
    return lambda: compiled(start)


def _orthogonium(spec, kernel):
    import torch
    from orthogonium.layers.conv.singular_values.get_sv import get_conv_sv

    layer = torch.nn.Conv2d(*spec.rhs_shape[2:], 3, padding=1, padding_mode=spec.padding_mode, bias=False)
    layer.weight.data = torch.from_numpy(np.array(kernel)).permute(3, 2, 0, 1).contiguous()

    def estimate():
        with torch.no_grad():
            return float(get_conv_sv(layer, n_iter=STEPS, return_stab_rank=False, imsize=spec.in_shape[0]))

    return estimate


TABLES = (
    Table(
        "singular_values",
        "All singular values of a circular layer, float64: `spectrum.singular_values`",
        "",
        _all_values,
    ),
    Table(
        "spectral_norm",
        "The largest singular value to 1e-4, float64: `spectrum.spectral_norm`",
        "",
        _largest,
        "Power iteration and matfree take as many steps as reach the tolerance, which are found before.",
    ),
)

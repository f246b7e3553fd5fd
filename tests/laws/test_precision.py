"""What is promised in float32 is computed in it on GPU and TPU too, without the setting of conftest.py."""

import re

import jax
import jax.numpy as jnp
import pytest

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum

SPEC = fc.conv_spec((1, 2, 4, 5), (2, 2, 3, 3), (1, 1), "SAME", padding_mode="circular")
PLAIN = fc.conv_spec((1, 2, 4, 5), (2, 2, 3, 3), (1, 1), "SAME")
POINTWISE = fc.conv_spec((1, 2, 4, 5), (2, 2, 1, 1), (1, 1), "VALID")


def slope(function, *rest):
    return lambda spec, k, x: jax.grad(lambda k: jnp.sum(function(spec, k, *rest)))(k)


FUNCTIONS = {
    "singular_values": lambda spec, k, x: spectrum.singular_values(spec, k),
    "their gradient": slope(spectrum.singular_values),
    "log_abs_det": slope(spectrum.log_abs_det),
    "solve": lambda spec, k, x: jax.grad(lambda k: jnp.sum(spectrum.solve(spec, k, x)))(k),
    "pseudo_inverse": lambda spec, k, x: jax.grad(lambda k: jnp.sum(spectrum.pseudo_inverse(spec, k, x)))(k),
    "lstsq": lambda spec, k, x: spectrum.lstsq(spec, k, x, max_steps=3),
    "spectral_norm": slope(spectrum.spectral_norm),
    "spectral_norm_bounds": slope(lambda spec, k: spectrum.spectral_norm_bounds(spec, k)[1]),
    "top_singular_values": slope(spectrum.top_singular_values, 2),
    "power_step": lambda spec, k, x: jax.grad(lambda k: spectrum.power_step(spec, k, x).sigma)(k),
    "frobenius_norm": slope(spectrum.frobenius_norm),
    "row_norms": slope(spectrum.row_norms),
    "orthogonality_residual": slope(spectrum.orthogonality_residual),
    "trace": slope(spectrum.trace),
    "compose": lambda spec, k, x: fc.compose((POINTWISE, k[..., :1, :1]), (PLAIN, k))[1],
    "gradients of a batch": lambda spec, k, x: (
        fc.curvature.gradient_norms(spec, x[None], x[None]),
        fc.curvature.gradient_gram(spec, x[None], x[None]),
        fc.curvature.kfac_factors(spec, x[None], x[None], bias=True),
    ),
    "kernel_from_matrix": lambda spec, k, x: fc.kernel_from_matrix(spec, fc.as_matrix(spec, k)),
}
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*->.*x(?:f32|complex<f32>)>")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_product_asks_for_the_highest_precision(name):
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (SPEC.rhs_shape, SPEC.in_shape)]
    with jax.default_matmul_precision("default"), jax.enable_x64(False):
        traced = jax.jit(lambda *given: [FUNCTIONS[name](s, *given) for s in (SPEC, PLAIN)]).trace(*like)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    rounded = [line for line in program.splitlines() if PRODUCT.search(line) and "HIGHEST" not in line]
    assert not rounded, "\n".join(rounded)


def test_a_product_of_lower_precision_would_be_seen():
    like = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    with jax.default_matmul_precision("default"):
        program = jax.jit(lambda a: a @ a).trace(like).lower(lowering_platforms=("cuda",)).as_text()
    assert any(PRODUCT.search(line) and "HIGHEST" not in line for line in program.splitlines())

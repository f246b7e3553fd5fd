"""jit changes no gradient: every differentiable public function, in programs that XLA has optimised.

The rest of the suite compiles without the optimiser, where a value that is computed twice comes out equal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import SEED, count
from jax import lax

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum

COUNT = count("KERNELS", 1)
DTYPES = ["float32", "float64"] if COUNT >= 10 else ["float32"]
OPTIMISED = {"xla_backend_optimization_level": 3}
SPEC = fc.conv_spec((1, 2, 4, 4), (2, 2, 3, 3), (1, 1), "SAME")
GROUPED = fc.conv_spec((1, 4, 5), (4, 2, 3), (1,), "SAME", feature_group_count=2)
ROUND = fc.conv_spec((1, 2, 6), (2, 2, 3), (1,), "SAME", padding_mode="circular")
X = np.random.default_rng(0).standard_normal((2, 4, 4))


def x(kernel):
    return jnp.asarray(X, kernel.dtype)


def network(kernel):
    return lambda z: lax.conv_general_dilated(jax.nn.relu(z)[None], kernel, (1, 1), "SAME")[0]


def radius(kernel):
    return fc.local_affine(lambda z: jax.nn.relu(network(kernel)(z)), x(kernel)).radius


# spec and function of the kernel
FUNCTIONS = {
    "upper bound": (SPEC, lambda k: spectrum.spectral_norm_bounds(SPEC, k)[1]),
    "upper bound of groups": (GROUPED, lambda k: spectrum.spectral_norm_bounds(GROUPED, k)[1]),
    "upper bound, circular": (ROUND, lambda k: spectrum.spectral_norm_bounds(ROUND, k)[1]),
    "spectral_norm": (GROUPED, lambda k: spectrum.spectral_norm(GROUPED, k)),
    "power_step": (SPEC, lambda k: spectrum.power_step(SPEC, k, x(k)).sigma),
    "top_singular_values": (GROUPED, lambda k: spectrum.top_singular_values(GROUPED, k, 3)),
    "singular_values": (ROUND, lambda k: spectrum.singular_values(ROUND, k)[:1]),
    "condition_number": (GROUPED, lambda k: spectrum.condition_number(GROUPED, k)),
    "one_norm": (SPEC, lambda k: spectrum.one_norm(SPEC, k)),
    "inf_norm": (SPEC, lambda k: spectrum.inf_norm(SPEC, k)),
    "frobenius_norm": (SPEC, lambda k: spectrum.frobenius_norm(SPEC, k)),
    "row_norms": (SPEC, lambda k: spectrum.row_norms(SPEC, k)),
    "column_norms": (SPEC, lambda k: spectrum.column_norms(SPEC, k, ord=1)),
    "trace": (SPEC, lambda k: spectrum.trace(SPEC, k)),
    "orthogonality_residual": (SPEC, lambda k: spectrum.orthogonality_residual(SPEC, k)),
    "log_abs_det": (ROUND, lambda k: spectrum.log_abs_det(ROUND, k)),
    "solve": (ROUND, lambda k: spectrum.solve(ROUND, k, jnp.ones(ROUND.out_shape, k.dtype))),
    "pseudo_inverse": (
        ROUND,
        lambda k: spectrum.pseudo_inverse(ROUND, k, jnp.ones(ROUND.out_shape, k.dtype)),
    ),
    "lstsq": (ROUND, lambda k: spectrum.lstsq(ROUND, k, jnp.ones(ROUND.out_shape, k.dtype), max_steps=40)),
    "as_matrix": (SPEC, lambda k: fc.as_matrix(SPEC, k)),
    "matrix_rows": (SPEC, lambda k: fc.matrix_rows(SPEC, k, [0, 3])),
    "as_bcoo": (SPEC, lambda k: fc.as_bcoo(SPEC, k).data),
    "as_bcsr": (SPEC, lambda k: fc.as_bcsr(SPEC, k).data),
    "apply": (SPEC, lambda k: fc.apply(SPEC, k, x(k))),
    "apply_transpose": (SPEC, lambda k: fc.apply_transpose(SPEC, k, x(k))),
    "batched_apply": (SPEC, lambda k: fc.batched_apply(SPEC, k, x(k)[None])),
    "transpose": (SPEC, lambda k: fc.transpose(SPEC, k)[1]),
    "conv_distance": (SPEC, lambda k: fc.conv_distance(SPEC, fc.as_matrix(SPEC, k) + x(k)[0, 0, 0])),
    "kernel_from_matrix": (SPEC, lambda k: fc.kernel_from_matrix(SPEC, fc.as_matrix(SPEC, k))),
    "fully_connected": (SPEC, lambda k: fc.fully_connected(network(k))(x(k))),
    "matrix_of": (SPEC, lambda k: fc.matrix_of(lambda z: fc.apply(SPEC, k, z), x(k))[0]),
    "radius": (SPEC, radius),
}


COSTLY = {"upper bound", "upper bound of groups", "upper bound, circular", "lstsq"} if COUNT < 10 else set()


def drawn():
    """A quarter of the functions in every run, and with ``-m long`` all."""
    names = [name for name in FUNCTIONS if name not in COSTLY]
    chosen = set(np.random.default_rng(SEED).permutation(names)[: -(-len(names) // 4)].tolist())
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", drawn())
def test_jit_changes_no_gradient(name, dtype):
    """Under jit the gradient of the upper bound was about 0 for a third of all kernels."""
    spec, function = FUNCTIONS[name]

    def loss(kernel):
        values = function(kernel)
        return jnp.sum(values * jnp.cos(jnp.arange(values.size, dtype=values.dtype)).reshape(values.shape))

    traced = jax.jit(jax.value_and_grad(loss)).lower(jax.ShapeDtypeStruct(spec.rhs_shape, dtype))
    plain, optimised = traced.compile(), traced.compile(OPTIMISED)
    for number in range(COUNT):
        kernel = np.random.default_rng([number, 21]).standard_normal(spec.rhs_shape)
        # Away from singular and from equal values, where a derivative is ill-conditioned.
        kernel = jnp.asarray(kernel + 3 * (np.indices(kernel.shape).sum(0) == 1), dtype)
        want, slope = plain(kernel)
        close = np.abs(slope).max() * (2e-3 if dtype == "float32" else 1e-7)
        value, got = optimised(kernel)
        np.testing.assert_allclose(got, slope, rtol=0, atol=close, err_msg=f"kernel {number}")
        np.testing.assert_allclose(value, want, rtol=1e-4, atol=close)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-3), pytest.param("float64", 1e-9, marks=pytest.mark.long)]
)
def test_jit_keeps_the_gradient_of_the_upper_bound(dtype, tolerance):
    """Under jit it was lost for a third of these kernels, in both precisions."""
    function = FUNCTIONS["upper bound"][1]
    kernels = np.random.default_rng(3).standard_normal((20, *SPEC.rhs_shape))
    traced = jax.jit(jax.grad(function)).lower(jax.ShapeDtypeStruct(SPEC.rhs_shape, dtype))
    plain, optimised = traced.compile(), traced.compile(OPTIMISED)
    for kernel in kernels.astype(dtype):
        np.testing.assert_allclose(optimised(kernel), plain(kernel), rtol=0, atol=tolerance)

"""NaN and Inf through every public function, and jax_debug_nans on numbers that are finite.

The law: a finite output does not depend on an entry that is NaN or Inf. So wherever a function of an array
with such an entry gives a number, it gives the same number for any other value of that entry.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum

SPEC = fc.conv_spec((1, 2, 4), (2, 2, 3), (1,), "SAME", padding_mode="circular")
PLAIN = fc.conv_spec((1, 2, 4), (2, 2, 3), (1,), "SAME")


def network(kernel):
    return lambda x: (
        jax.nn.relu(lax.conv_general_dilated(x[None], kernel, (1,), "SAME")[0]) @ jnp.ones(4, kernel.dtype)
    )


def linear(kernel):
    return lambda x: lax.conv_general_dilated(x[None], kernel, (1,), "SAME")[0]


def mesh():
    return jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


# functions of (kernel, x, y, matrix), each of which uses some of them
FUNCTIONS = {
    "as_matrix": lambda k, x, y, m: fc.as_matrix(SPEC, k),
    "as_affine": lambda k, x, y, m: fc.as_affine(SPEC, k, y),
    "matrix_rows": lambda k, x, y, m: fc.matrix_rows(SPEC, k, [0, 5]),
    "matrix_columns": lambda k, x, y, m: fc.matrix_columns(SPEC, k, [0, 5]),
    "traced rows": lambda k, x, y, m: jax.vmap(lambda i: fc.matrix_rows(SPEC, k, i[None]))(jnp.arange(3)),
    "update_matrix": lambda k, x, y, m: fc.update_matrix(SPEC, m, k),
    "as_bcoo": lambda k, x, y, m: fc.as_bcoo(SPEC, k).todense(),
    "as_bcsr": lambda k, x, y, m: fc.as_bcsr(SPEC, k).todense(),
    "as_scipy": lambda k, x, y, m: fc.as_scipy(SPEC, k).toarray(),
    "diagonals": lambda k, x, y, m: fc.diagonals(SPEC, k),
    "row_blocks": lambda k, x, y, m: [b.matrix.toarray() for b in fc.row_blocks(SPEC, k)],
    "shard_matrix": lambda k, x, y, m: fc.shard_matrix(SPEC, k, mesh()),
    "shard_bcoo": lambda k, x, y, m: fc.shard_bcoo(SPEC, k, mesh()).todense(),
    "apply": lambda k, x, y, m: fc.apply(SPEC, k, x),
    "apply_transpose": lambda k, x, y, m: fc.apply_transpose(SPEC, k, y),
    "kernel_vjp": lambda k, x, y, m: fc.kernel_vjp(SPEC, x, y),
    "batched_apply": lambda k, x, y, m: fc.batched_apply(SPEC, k, x[None]),
    "transpose": lambda k, x, y, m: fc.transpose(PLAIN, k)[1],
    "kernel_matrix": lambda k, x, y, m: fc.kernel_matrix(SPEC, x),
    "matrix_vjp": lambda k, x, y, m: fc.matrix_vjp(SPEC, m),
    "kernel_from_matrix": lambda k, x, y, m: fc.kernel_from_matrix(SPEC, m),
    "conv_distance": lambda k, x, y, m: fc.conv_distance(SPEC, m),
    "detect_conv": lambda k, x, y, m: (fc.detect_conv(m, SPEC.in_shape, SPEC.out_shape) or (0, 0.0))[1],
    "nearest_conv": lambda k, x, y, m: fc.nearest_conv(m, SPEC.in_shape, SPEC.out_shape)[2],
    "compose": lambda k, x, y, m: fc.compose(
        (fc.conv_spec((1, 2, 4), (2, 2, 1), (1,), "VALID"), k[..., :1]), (PLAIN, k)
    )[1],
    "frobenius_norm": lambda k, x, y, m: spectrum.frobenius_norm(SPEC, k),
    "one_norm": lambda k, x, y, m: spectrum.one_norm(SPEC, k),
    "inf_norm": lambda k, x, y, m: spectrum.inf_norm(SPEC, k),
    "row_norms": lambda k, x, y, m: [spectrum.row_norms(SPEC, k, ord=ord) for ord in (1, 2)],
    "column_norms": lambda k, x, y, m: [spectrum.column_norms(SPEC, k, ord=ord) for ord in (1, 2)],
    "trace": lambda k, x, y, m: spectrum.trace(SPEC, k),
    "rank": lambda k, x, y, m: spectrum.rank(SPEC, k),
    "condition_number": lambda k, x, y, m: spectrum.condition_number(SPEC, k),
    "spectral_norm": lambda k, x, y, m: spectrum.spectral_norm(SPEC, k),
    "spectral_norm_bounds": lambda k, x, y, m: spectrum.spectral_norm_bounds(SPEC, k),
    "power_step": lambda k, x, y, m: spectrum.power_step(SPEC, k, x),
    "singular_triplet": lambda k, x, y, m: spectrum.singular_triplet(SPEC, k),
    "singular_values": lambda k, x, y, m: [spectrum.singular_values(s, k) for s in (SPEC, PLAIN)],
    "top_singular_values": lambda k, x, y, m: spectrum.top_singular_values(SPEC, k, 2),
    "log_abs_det": lambda k, x, y, m: [spectrum.log_abs_det(s, k) for s in (SPEC, PLAIN)],
    "solve": lambda k, x, y, m: [spectrum.solve(s, k, y) for s in (SPEC, PLAIN)],
    "pseudo_inverse": lambda k, x, y, m: [spectrum.pseudo_inverse(s, k, y) for s in (SPEC, PLAIN)],
    "lstsq": lambda k, x, y, m: [spectrum.lstsq(SPEC, k, y, max_steps=n) for n in (None, 3)],
    "orthogonality_residual": lambda k, x, y, m: spectrum.orthogonality_residual(SPEC, k),
    "gradient_norms": lambda k, x, y, m: fc.curvature.gradient_norms(SPEC, x[None], y[None]),
    "gradient_gram": lambda k, x, y, m: fc.curvature.gradient_gram(SPEC, x[None], y[None]),
    "patch_moment": lambda k, x, y, m: [fc.curvature.patch_moment(s, x[None]) for s in (SPEC, PLAIN)],
    "kfac_factors": lambda k, x, y, m: fc.curvature.kfac_factors(PLAIN, x[None], y[None], approx="reduce"),
    "fully_connected": lambda k, x, y, m: fc.fully_connected(network(k))(x),
    "matrix_of": lambda k, x, y, m: fc.matrix_of(linear(k), x),
    "local_affine": lambda k, x, y, m: fc.local_affine(network(k), jnp.asarray(x)),
    "as_linear_operator": lambda k, x, y, m: fc.as_linear_operator(SPEC, k).mv(x),
    "dot_test": lambda k, x, y, m: fc.testing.dot_test(SPEC, k),
    "assert_transpose": lambda k, x, y, m: fc.testing.assert_transpose(SPEC, k),
    "assert_matches_lax": lambda k, x, y, m: fc.testing.assert_matches_lax(SPEC, k, x),
}  # fmt: skip
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def operands():
    rng = np.random.default_rng(2)
    shapes = SPEC.rhs_shape, SPEC.in_shape, SPEC.out_shape
    kernel, x, y = (jnp.asarray(rng.standard_normal(s)) for s in shapes)
    return kernel, x, y, fc.as_matrix(SPEC, kernel)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of NaN in testing
@every_function
def test_what_is_finite_does_not_depend_on_what_is_not(name):
    """And jax_debug_nans raises on no number: matrix_rows, matrix_columns and lstsq made a NaN that no result
    used."""
    function, given = FUNCTIONS[name], operands()
    with jax.debug_nans(True):
        function(*given)
    for i, operand in enumerate(given):

        def at(value, i=i, operand=operand):
            changed = operand.at[(0,) * operand.ndim].set(value)
            outs = function(*given[:i], changed, *given[i + 1 :])
            return [np.asarray(leaf) for leaf in jax.tree.leaves(outs)]

        first, second = at(0.75), at(-3.0)
        for value in (np.nan, np.inf):
            try:
                got = at(value)
            except (ValueError, AssertionError):
                continue  # refused
            for a, b, c in zip(got, first, second, strict=True):
                finite = np.isfinite(a) & (a != -1 if name == "rank" else True)
                np.testing.assert_allclose(a[finite], b[finite], rtol=1e-6, atol=1e-9, err_msg=f"operand {i}")
                np.testing.assert_allclose(a[finite], c[finite], rtol=1e-6, atol=1e-9, err_msg=f"operand {i}")


def test_every_norm_of_nan_is_nan():
    """frobenius_norm, row_norms, orthogonality_residual and conv_distance were 0."""
    kernel = jnp.full(SPEC.rhs_shape, jnp.nan)
    functions = (
        spectrum.frobenius_norm, spectrum.row_norms, spectrum.column_norms, spectrum.orthogonality_residual,
        spectrum.one_norm, spectrum.spectral_norm, spectrum.spectral_norm_bounds, spectrum.condition_number,
    )  # fmt: skip
    made = jax.jit(lambda kernel: [function(SPEC, kernel) for function in functions])(kernel)
    for function, norms in zip(functions, made, strict=True):
        assert np.isnan(np.asarray(norms)).all(), function.__name__
    assert np.isnan(fc.conv_distance(SPEC, jnp.full(SPEC.shape, jnp.nan)))
    assert spectrum.rank(SPEC, kernel) == -1
    assert np.isnan(fc.local_affine(network(kernel), jnp.ones((2, 4))).radius)
    with pytest.raises(ValueError, match="must hold finite numbers, got 1 NaN or Inf"):
        fc.detect_conv(jnp.eye(4).at[0, 0].set(jnp.nan), (1, 4), (1, 4))
    assert "nan" in fc.format_matrix(SPEC, kernel)


def test_the_condition_number_of_zero_is_infinite():
    zero = jnp.zeros(SPEC.rhs_shape)
    assert spectrum.condition_number(SPEC, zero) == np.inf
    assert not np.isnan(jax.grad(lambda k: spectrum.condition_number(SPEC, k))(operands()[0])).any()

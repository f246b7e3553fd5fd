"""M as a lineax operator."""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

import jaxconv_fc as fc
from jaxconv_fc.products.linear_operator import as_linear_operator


def layer(dtype=jnp.float64):
    spec = fc.conv_spec((1, 2, 5, 4), (3, 2, 3, 2), (2, 1), [(1, 0), (1, 1)])
    rng = np.random.default_rng(0)
    shapes = (spec.rhs_shape, spec.in_shape, spec.out_shape)
    return spec, *(jnp.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.complex128])
def test_products_and_matrix(dtype):
    spec, kernel, x, y = layer(dtype)
    operator, matrix = as_linear_operator(spec, kernel), fc.as_matrix(spec, kernel)
    np.testing.assert_array_equal(operator.mv(x), fc.apply(spec, kernel, x))
    np.testing.assert_array_equal(operator.T.mv(y), fc.apply_transpose(spec, kernel, y))
    np.testing.assert_array_equal(operator.as_matrix(), matrix)
    np.testing.assert_array_equal(operator.T.as_matrix(), matrix.T)
    assert (operator.out_size(), operator.in_size()) == spec.shape


def test_jit_grad_and_composition():
    spec, kernel, x, y = layer()

    @jax.jit
    def residual(operator):
        return (operator.mv(x) - y).ravel()

    operator, matrix = as_linear_operator(spec, kernel), fc.as_matrix(spec, kernel)
    np.testing.assert_allclose(residual(operator), matrix @ x.ravel() - y.ravel(), atol=1e-12)
    gram = operator.T @ operator
    np.testing.assert_allclose(gram.as_matrix(), matrix.T @ matrix, atol=1e-12)
    regularised = gram + lineax.IdentityLinearOperator(gram.in_structure())
    solver = lineax.AutoLinearSolver(well_posed=True)
    solution = lineax.linear_solve(regularised, x, solver).value.ravel()
    np.testing.assert_allclose(matrix.T @ (matrix @ solution) + solution, x.ravel(), atol=1e-10)


def test_an_operator_carries_derivatives_to_its_kernel():
    spec, kernel, x, y = layer()
    gradient = jax.grad(lambda kernel: jnp.sum(as_linear_operator(spec, kernel).mv(x) * y))(kernel)
    np.testing.assert_allclose(gradient, fc.kernel_vjp(spec, x, y), rtol=1e-12)
    assert [leaf.shape for leaf in jax.tree.leaves(as_linear_operator(spec, kernel))] == [kernel.shape]


def test_errors():
    spec, kernel, *_ = layer()
    with pytest.raises(TypeError, match="lineax takes floating dtypes"):
        as_linear_operator(spec, kernel.astype(int))
    with pytest.raises(ValueError, match="kernel must have the spec's shape"):
        as_linear_operator(spec, kernel[0])

"""M as an operator of lineax: for its solvers, and to be composed with its operators."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.apply import apply
from jaxconv_fc.spec import ConvSpec, as_operand


def as_linear_operator(spec: ConvSpec, kernel: Any) -> Any:
    """M as a ``lineax.FunctionLinearOperator``: ``operator.mv(x) == apply(spec, kernel, x)``.

    Inputs and outputs are images, of ``spec.in_shape`` and ``spec.out_shape``; ``as_matrix()`` is M of
    shape ``spec.shape``, ``operator.T`` its transpose. The operator is a pytree whose leaf is the kernel,
    so it passes through jit, and what is solved with it is differentiable in the kernel.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``, of a floating or complex dtype.

    Returns:
      A ``lineax.FunctionLinearOperator``.

    Raises:
      ImportError: lineax is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: the kernel is not an array, or not of a floating or complex dtype.
      ValueError: the kernel has another shape.

    Cost: none; a product costs one convolution.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> from jaxconv_fc.operator import as_linear_operator
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> operator = as_linear_operator(spec, jnp.array([[[1., 2.]]]))
    >>> print(operator.mv(jnp.array([[1., 0., 0., 3.]])), operator.out_size(), operator.in_size())
    [[1. 0. 6.]] 3 4
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    if not jnp.issubdtype(kernel.dtype, jnp.inexact):
        raise TypeError(f"kernel is {kernel.dtype}, lineax takes floating dtypes: use .astype(float).")
    lineax = import_lineax("as_linear_operator")
    structure = jax.ShapeDtypeStruct(spec.in_shape, kernel.dtype)
    # A Partial is a pytree already: closure conversion would bake the kernel into a program.
    product = jax.tree_util.Partial(apply, spec, kernel)
    return lineax.FunctionLinearOperator(product, structure, closure_convert=False)


def import_lineax(needed_by: str) -> Any:
    try:
        import lineax
    except ImportError as error:
        raise ImportError(f"{needed_by} needs lineax: pip install 'jaxconv_fc[spectrum]'.") from error
    return lineax

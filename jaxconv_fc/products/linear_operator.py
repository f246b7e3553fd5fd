"""M as an operator of lineax, for its solvers and for sums and products with its other operators."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.matrix.dense import as_matrix
from jaxconv_fc.products.product import apply, apply_transpose
from jaxconv_fc.sharding import result_sharding, zeros


def as_linear_operator(spec: ConvSpec, kernel: Array) -> Any:
    """M as an operator of lineax: ``operator.mv(x) == apply(spec, kernel, x)``.

    Inputs have ``spec.in_shape`` and outputs ``spec.out_shape``. ``operator.T.mv`` is
    :func:`apply_transpose`, and ``operator.as_matrix()`` is :func:`as_matrix`, with its memory limit. The
    operator is a pytree whose only leaf is the kernel, so it passes through jit. Solutions are
    differentiable in the kernel. A product costs one convolution, at ``precision='highest'``.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``, of a floating or complex dtype.

    Returns:
      A subclass of ``lineax.FunctionLinearOperator``.

    Raises:
      ImportError: lineax is missing (``pip install 'jaxconv_fc[spectrum]'``).
      TypeError: the kernel is not an array, or not of a floating or complex dtype.
      ValueError: the kernel has another shape.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> operator = fc.as_linear_operator(spec, jnp.array([[[1., 2.]]]))
    >>> print(operator.mv(jnp.array([[1., 0., 0., 3.]])), operator.out_size(), operator.in_size())
    [[1. 0. 6.]] 3 4
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    if not jnp.issubdtype(kernel.dtype, jnp.inexact):
        raise TypeError(f"kernel is {kernel.dtype}, lineax takes floating dtypes: use .astype(float).")
    import_lineax("as_linear_operator")
    return _operator_type()(_times, spec, kernel)


# Solvers iterate: in the default precision of a GPU or TPU they would stall at a residual of 1e-3.
def _times(spec: ConvSpec, kernel: jax.Array, x: jax.Array) -> jax.Array:
    return apply(spec, kernel, x, precision="highest")


def _transpose_times(spec: ConvSpec, kernel: jax.Array, y: jax.Array) -> jax.Array:
    return apply_transpose(spec, kernel, y, precision="highest")


@functools.cache
def _operator_type() -> Any:
    """The class of the operators. Its base class is in lineax, which may be missing: made at first use."""
    import lineax

    class ConvolutionOperator(lineax.FunctionLinearOperator):
        """M for ``product=_times``, M^T for ``product=_transpose_times``.

        It has a transpose of its own, because lineax's does not follow varying axes.
        """

        def __init__(self, product: Any, spec: ConvSpec, kernel: jax.Array):
            shape = spec.in_shape if product is _times else spec.out_shape
            # A Partial is a pytree, so the kernel stays a leaf. Closure conversion would make it a constant.
            fn = jax.tree_util.Partial(product, spec, kernel)
            super().__init__(fn, _structure(shape, kernel), closure_convert=False)

        @property
        def bound(self) -> Any:
            return self.fn  # func is the product, args are (spec, kernel)

        def out_structure(self) -> jax.ShapeDtypeStruct:
            spec, kernel = self.bound.args
            return _structure(spec.out_shape if self.bound.func is _times else spec.in_shape, kernel)

        def transpose(self) -> ConvolutionOperator:
            other = _transpose_times if self.bound.func is _times else _times
            return ConvolutionOperator(other, *self.bound.args)

        def as_matrix(self) -> jax.Array:
            matrix = as_matrix(*self.bound.args)
            return matrix if self.bound.func is _times else matrix.T

    @lineax.conj.register(ConvolutionOperator)
    def _(operator: Any) -> Any:
        spec, kernel = operator.bound.args
        return ConvolutionOperator(operator.bound.func, spec, kernel.conj())

    return ConvolutionOperator


def _structure(shape: tuple[int, ...], kernel: jax.Array) -> jax.ShapeDtypeStruct:
    """``jax.eval_shape`` of an array of the kernel's dtype on its mesh: what lineax compares with vectors."""
    aval = jax.typeof(kernel)
    replicated = result_sharding(range(len(shape)), shape, [((), aval)])
    return jax.eval_shape(lambda: zeros(aval.update(shape=shape, sharding=replicated)))


def import_lineax(needed_by: str) -> Any:
    try:
        import lineax
    except ImportError as error:
        raise ImportError(f"{needed_by} needs lineax: pip install 'jaxconv_fc[spectrum]'.") from error
    return lineax

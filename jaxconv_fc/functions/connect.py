"""A function with its convolutions replaced by products with their matrices: a fully connected network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.functions.convolutions import batched_output, examples
from jaxconv_fc.functions.find import CONVOLUTIONS, spec_of
from jaxconv_fc.functions.jaxprs import JaxprEqn, result_avals
from jaxconv_fc.functions.rewrite import Replacement
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.matrix.dense import as_matrix
from jaxconv_fc.products.adjoint import kernel_matrix
from jaxconv_fc.products.product import OPERANDS, vmap_or_sum
from jaxconv_fc.sharding import on_one_device

Builder = Callable[[ConvSpec, Any], Any]


def fully_connected(fn: Callable[..., Any], *, builder: Builder = as_matrix) -> Callable[..., Any]:
    """``fn`` with every convolution computed as ``M @ x``, where each example of a batch is a column of x.

    Composes with jit, vmap and grad on either side. Gradients with respect to kernels flow through the
    matrices. A custom derivative rule in ``fn`` is kept, and the convolutions in it are replaced too.
    So are the products of this library, :func:`apply` and its derivatives.

    Each matrix is built anew from its kernel whenever the result is called, so put ``jax.jit`` around it.

    Args:
      fn: any function of JAX arrays, such as a flax, equinox, haiku or keras model.
      builder: ``builder(spec, kernel)`` returns what stands for M: anything with ``@`` and ``.T``. Dense by
        default. :func:`as_bcsr` and :func:`as_bcoo` are sparse, and several times faster where M is a thin
        band: few channels on a long signal or a large image. JAX's products with them lose the varying axes
        inside ``jax.shard_map``, so they are not the default.

    Returns:
      A function of the same arguments and results.

    Raises:
      ValueError: from the builder when a dense M is beyond the memory limit.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> layer = lambda x: jax.nn.relu(jax.lax.conv(x, jnp.ones((1, 1, 2)), (1,), "VALID") - 3)
    >>> x = jnp.arange(5.0).reshape(1, 1, 5)
    >>> print(layer(x), fc.fully_connected(layer)(x))
    [[[0. 0. 2. 4.]]] [[[0. 0. 2. 4.]]]
    >>> fc.find_convs(fc.fully_connected(layer), x)
    no convolutions
    """

    return Replacement(CONVOLUTIONS, _by_matrix, (builder,)).of(fn)


def _by_matrix(scope: str, eqn: JaxprEqn, values: Sequence[Any], builder: Builder) -> list[Any]:
    """A convolution of lax, or a product of this library."""
    return (_convolution if eqn.primitive.name == "conv_general_dilated" else _product)(builder, eqn, values)


def _convolution(builder: Builder, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    spec, precision = spec_of(eqn), eqn.params["precision"]
    result = result_avals(eqn)[0]

    def compute(x: Any, kernel: Any) -> Any:
        matrix = builder(spec, kernel.astype(result.dtype))
        stack = examples(spec, x.astype(result.dtype))  # [examples, *in_shape]
        columns = stack.reshape(stack.shape[0], spec.in_size).T
        # [out_size, in_size] [in_size, examples] -> [out_size, examples]
        y = _matmul(matrix, columns, precision)
        return batched_output(spec, y.T.reshape(stack.shape[0], *spec.out_shape))

    return [on_one_device(compute, *values, result=result)]


def _product(builder: Builder, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A product of this library. A batch axis is mapped over, and summed where the result lacks it."""
    spec, out, precision = eqn.params["spec"], eqn.params["out"], eqn.params["precision"]

    def compute(a: Any, b: Any) -> Any:
        if out == "k":  # X^T y, where X is the matrix of the linear map from kernel to y: M x = X k
            return _matmul(kernel_matrix(spec, a).T, b.ravel(), precision).reshape(spec.rhs_shape)
        matrix = builder(spec, a)
        if out == "x":  # M^T y
            return _matmul(matrix.T, b.ravel(), precision).reshape(spec.in_shape)
        return _matmul(matrix, b.ravel(), precision).reshape(spec.out_shape)

    for label in reversed(eqn.params["batches"]):
        axes = [0 if role in label else None for role in OPERANDS[out]]
        compute = vmap_or_sum(compute, axes, out in label)
    return [on_one_device(compute, *values, result=result_avals(eqn)[0])]


def _matmul(matrix: Any, columns: Any, precision: Any) -> Any:
    if isinstance(matrix, jax.Array):
        return jnp.matmul(matrix, columns, precision=precision)
    return matrix @ columns

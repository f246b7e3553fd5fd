"""Products of M with a stack of vectors, by the fastest of three: convolution, sparse M or dense M."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.geometry.arguments import Array, as_array, check_summable
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.matrix.dense import as_matrix
from jaxconv_fc.matrix.formats import as_bcsr
from jaxconv_fc.products.platforms import PLATFORMS
from jaxconv_fc.products.product import apply
from jaxconv_fc.sharding import explicit_mesh, program

METHODS = ("convolution", "sparse", "dense")


def batched_apply(
    spec: ConvSpec, kernel: Array, xs: Array, *, method: str | None = None, precision: Any = None
) -> jax.Array:
    """``ys[n] = M xs[n]`` for a stack of examples: the convolution of each, by the fastest of three ways.

    All three give the same sums, up to rounding, and are differentiable in both arguments:

    - ``"convolution"``: :func:`apply` under ``vmap``;
    - ``"sparse"``: ``as_bcsr(spec, kernel)`` times all examples at once;
    - ``"dense"``: ``as_matrix(spec, kernel)`` times all examples at once.

    By default it takes the convolution on GPU and TPU, and where the count is symbolic (``jax.export``). On
    CPU it takes M for 16 examples or more, if the kernel is as large as the image, or if channels are few and
    taps many, and for 64 examples or more of integers.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      xs: array of shape ``(count, *spec.in_shape)`` and the kernel's dtype.
      method: one of the three, in place of the default.
      precision: as in :func:`apply`. The convolution and the dense product use it.

    Returns:
      Array of shape ``(count, *spec.out_shape)``.

    Raises:
      TypeError: an operand is not an array, dtypes differ, or are bool.
      ValueError: a shape or the method is wrong, or M is beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.batched_apply(spec, jnp.array([[[1., 2.]]]), jnp.eye(4)[:, None]))
    [[[1. 0. 0.]]
    <BLANKLINE>
     [[2. 1. 0.]]
    <BLANKLINE>
     [[0. 2. 1.]]
    <BLANKLINE>
     [[0. 0. 2.]]]
    """
    kernel, stack = as_operand("kernel", kernel, spec, "rhs_shape"), as_array("xs", xs)
    if stack.ndim == 0 or stack.shape[1:] != spec.in_shape:
        raise ValueError(
            f"xs must have shape (count, *{spec.in_shape}), a stack of examples, got {stack.shape}. Write "
            "xs[None] for one example."
        )
    check_summable("kernel", kernel, "xs", stack)
    count = stack.shape[0]
    if method is None and isinstance(count, int) and explicit_mesh((kernel, stack)) is None:
        forms = PLATFORMS.get(jax.default_backend(), PLATFORMS["cpu"])
        method = forms.method(spec, count, kernel.dtype)
    elif method is None:  # it suits every symbolic count, and alone keeps the stack partitioned
        method = "convolution"
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, or None to choose, got {method!r}.")
    if method == "convolution":
        return jax.vmap(lambda x: apply(spec, kernel, x, precision=precision))(stack)
    precision = tuple(precision) if isinstance(precision, list) else precision
    return _matrix_product(spec, kernel, stack, method, precision)


@partial(program, static_argnums=(3, 4))
def _matrix_product(
    spec: ConvSpec, kernel: jax.Array, stack: jax.Array, method: str, precision: Any
) -> jax.Array:
    columns = stack.reshape(stack.shape[0], spec.in_size).T
    if method == "sparse":
        ys = as_bcsr(spec, kernel) @ columns
    else:
        ys = jnp.matmul(as_matrix(spec, kernel), columns, precision=precision)
    return ys.T.reshape(stack.shape[0], *spec.out_shape)

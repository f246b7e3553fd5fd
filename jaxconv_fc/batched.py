"""Products of M with a stack of vectors, by the fastest of three: convolution, sparse M or dense M."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.arguments import Array, as_array, check_summable
from jaxconv_fc.correlation import is_narrow
from jaxconv_fc.matrix.dense import as_matrix
from jaxconv_fc.matrix.formats import as_bcsr
from jaxconv_fc.memory import fits_in_memory
from jaxconv_fc.products import apply
from jaxconv_fc.sharding import explicit_mesh, program
from jaxconv_fc.spec import ConvSpec, as_operand

METHODS = ("convolution", "sparse", "dense")


def batched_apply(
    spec: ConvSpec, kernel: Array, xs: Array, *, method: str | None = None, precision: Any = None
) -> jax.Array:
    """``ys[n] = M xs[n]`` for a stack of examples: the convolution of each, by the fastest of three ways.

    All three give the same sums, up to rounding, and are differentiable in both arguments:

    - ``"convolution"``: :func:`apply` under ``vmap``;
    - ``"sparse"``: ``as_bcsr(spec, kernel)`` times all examples at once;
    - ``"dense"``: ``as_matrix(spec, kernel)`` times all examples at once.

    By default it takes the convolution on GPU and TPU. On CPU it takes M for 16 examples or more, if the
    kernel is as large as the image, if channels are few and taps many, or if entries have 64 bits.

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
    if method is None and explicit_mesh((kernel, stack)) is not None:
        method = "convolution"  # the only one that keeps the stack partitioned
    if method is None:
        method = fastest_method(spec, stack.shape[0], kernel.dtype, jax.default_backend())
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


def fastest_method(spec: ConvSpec, count: int, dtype: Any, backend: str) -> str:
    """Which of :data:`METHODS` :func:`batched_apply` takes for ``count`` examples.

    The convolution, except on CPU for 16 examples or more, if :func:`apply` does not write it out as a sum
    over taps, and if M is within the memory limit:

    - dense, if at least a quarter of M is nonzero (kernels as large as the image), in float32 or narrower for
      64 examples or more;
    - sparse, if an output channel reads at most 4 input channels, and a group has at most 4 outputs, in
      float32 or narrower, or 1 of several (depthwise) in any dtype;
    - sparse, for 64-bit and integer dtypes and at least 64 examples.

    Sparse only where all examples together take 10^5 products.

    Measured on 2 cores with jax 0.10.2 and 0.11.2 by ``python -m benchmarks batched random_layers``.
    """
    if backend != "cpu" or count < 16 or not spec.nse:
        return "convolution"
    shape = (*(a.taps for a in spec.axes), spec.group_channels, spec.out_channels)
    dilated = any(a.lhs_dilation > 1 for a in spec.axes)  # is split into smaller convolutions first
    if jnp.issubdtype(dtype, jnp.inexact) and not dilated and is_narrow(spec.axes, shape, spec.groups):
        return "convolution"
    sizes = spec.nbytes(dtype)
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize <= 4
    full = 4 * spec.nse >= spec.out_size * spec.in_size and count >= (64 if narrow else 16)
    if full and fits_in_memory(sizes.dense):
        return "dense"
    few = spec.group_channels <= 4 and spec.out_channels <= 4 * spec.groups
    few = few and (narrow or (spec.groups > 1 and spec.group_channels == 1))
    small = count * spec.nse < 10**5  # products in all: less than it takes to build M
    if (few or (not narrow and count >= 64)) and not small and fits_in_memory(sizes.bcsr):
        return "sparse"
    return "convolution"

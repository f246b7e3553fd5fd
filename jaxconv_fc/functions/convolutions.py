"""Convolutions of lax, in a function or in its place: computed as products of this library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.functions.find import lax_site, spec_of
from jaxconv_fc.functions.jaxprs import JaxprEqn, eval_as, eval_eqn, result_avals
from jaxconv_fc.functions.names import ArrayPaths, place_of
from jaxconv_fc.functions.rewrite import Replacement
from jaxconv_fc.functions.sites import ConvSite
from jaxconv_fc.geometry.arguments import Array, as_array, check_summable
from jaxconv_fc.geometry.spec import ConvSpec, conv_spec
from jaxconv_fc.products.product import product_p, stacked_product
from jaxconv_fc.sharding import explicit_mesh, vary_alike


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    padding_mode: str = "zeros",
) -> jax.Array:
    """``y[n] = M x[n]`` for every example of a batch: ``lax.conv_general_dilated`` by this library's product.

    The arguments, their order and their meaning are those of lax, with ``padding_mode`` as the one addition.
    Values and derivatives of any order are right where lax is not (docs/where-jax-is-wrong.md), and on CPU
    they are faster. flax takes it as the argument ``conv_general_dilated`` of its Conv.
    :func:`with_products` puts it in the place of every convolution of a function.

    Args:
      lhs: the input, with a batch.
      rhs: the kernel, of the input's dtype.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers: as in :func:`conv_spec`.
      feature_group_count, batch_group_count: as in :func:`conv_spec`.
      precision: as in lax.
      preferred_element_type: the dtype of the result. Operands are converted to it first.
      out_sharding: as in lax, of a mesh with explicit axes.
      padding_mode: as in :func:`conv_spec`.

    Returns:
      The output, with the batch of ``lhs``.

    Raises:
      TypeError: an argument is of the wrong kind, or dtypes differ, or are bool.
      ValueError: an argument has a wrong value.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> x, kernel = jnp.array([[[1., 2., 3.]]]), jnp.array([[[1., 10.]]])
    >>> print(fc.conv_general_dilated(x, kernel, (1,), [(0, 1)], padding_mode="circular"))
    [[[21. 32. 13.]]]
    """
    lhs, rhs = as_array("lhs", lhs), as_array("rhs", rhs)
    check_summable("lhs", lhs, "rhs", rhs)
    spec = conv_spec(
        lhs.shape, rhs.shape, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
        feature_group_count, batch_group_count, padding_mode=padding_mode,
    )  # fmt: skip
    if preferred_element_type is not None:
        lhs, rhs = (v.astype(preferred_element_type) for v in (lhs, rhs))
    y = batched_output(spec, stacked_product(spec, rhs, examples(spec, lhs), precision))
    return y if out_sharding is None else jax.reshard(y, out_sharding)


def with_products(
    fn: Callable[..., Any], *, where: Callable[[ConvSite], bool] | None = None
) -> Callable[..., Any]:
    """``with_products(fn)(*args) == fn(*args)``, with every convolution of lax as this library's ``M x``.

    Values, dtypes, shardings and the names of layers stay. Its
    derivatives of any order are right where those of lax are not (docs/where-jax-is-wrong.md), and on CPU a
    training step of a convolutional network is faster, by a little or many times (docs/networks.md).
    Composes with jit, vmap, grad, jvp, scan, while, cond, remat and shard_map, inside and outside, and with
    export. A custom derivative or batching rule in ``fn`` is kept, and the convolutions in it are replaced.

    ``fn`` is traced anew at every call, so put ``jax.jit`` around the result: then nothing is left of this
    at run time.

    Args:
      fn: any function of JAX arrays and pytrees of them, such as the loss of a flax, equinox, haiku or keras
        model. Whatever is not an array is static.
      where: which convolutions are replaced, a function of a :class:`ConvSite`, as :func:`find_convs` with
        ``raw=True`` lists them. By default all of them. ``lambda site: site.lax_fault`` replaces only those
        that lax is known to get wrong.

    Returns:
      A function of the same arguments and results.

    Raises:
      TypeError: ``where`` is not a function.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> def loss(kernel, x):
    ...     return (jax.lax.conv(x, kernel, (1,), "VALID") ** 2).sum()
    >>> kernel, x = jnp.array([[[1., 2.]]]), jnp.array([[[1., 0., 3.]]])
    >>> print(jax.jit(jax.grad(fc.with_products(loss)))(kernel, x))
    [[[ 2. 36.]]]
    """

    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of a ConvSite, got {type(where).__name__}.")

    @functools.wraps(fn, updated=())
    def replaced(*args: Any, **kwargs: Any) -> Any:
        given = () if where is None else (where, ArrayPaths(fn, args, kwargs))
        return Replacement(_OF_LAX, _by_product, given).of(fn)(*args, **kwargs)

    return replaced


_OF_LAX = frozenset({"conv_general_dilated"})


def _by_product(
    scope: str, eqn: JaxprEqn, values: Sequence[Any], where: Any = None, paths: Any = None
) -> list[Any]:
    x, kernel = values
    if where is not None and not where(lax_site(eqn, x, kernel, place_of(eqn, scope, paths[kernel]))):
        return eval_eqn(eqn, values)
    return product_of(eqn, values)


def product_of(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A ``conv_general_dilated`` equation by this library's product, under its name."""
    spec, result = spec_of(eqn), result_avals(eqn)[0]
    x, kernel = (v.astype(result.dtype) for v in values)
    params = {"out": "y", "spec": spec, "batches": ("xy",), "precision": eqn.params["precision"]}
    operands = vary_alike((kernel, examples(spec, x)))
    (stack,) = eval_as(eqn, product_p, params | {"sharding": None}, operands)
    y = batched_output(spec, stack)
    return [y if explicit_mesh(y) is None else jax.reshard(y, result.sharding)]


# -- batches as stacks of examples ---------------------------------------------------------------


def examples(spec: ConvSpec, x: Any) -> Any:
    """A batch of ``lhs_shape`` as a stack ``(examples, *in_shape)``."""
    axis = spec.dimension_numbers.lhs_spec[0]
    groups = spec.batch_group_count
    count = x.shape[axis] // groups
    if count != 1:  # [..., groups * count, ...] -> [..., groups, count, ...] -> [count, ..., groups, ...]
        x = x.reshape(*x.shape[:axis], groups, count, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis + 1, 0)
    return x.reshape(count, *spec.in_shape)


def batched_output(spec: ConvSpec, y: Any) -> Any:
    """A stack ``(examples, *out_shape)`` with the examples as the batch axis of the convolution's output."""
    return jnp.moveaxis(y, 0, spec.dimension_numbers.out_spec[0])

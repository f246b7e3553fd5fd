"""The two Kronecker factors of a layer's curvature."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.curvature.moments import check_moment, moment, without_one_group
from jaxconv_fc.curvature.norms import with_groups
from jaxconv_fc.curvature.stacks import as_stacks, check_real
from jaxconv_fc.geometry.arguments import Array, brief
from jaxconv_fc.geometry.layout import out_first, taps, to_canonical
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.products.product import kernel_vjp, summed_gradient
from jaxconv_fc.sharding import program

APPROXIMATIONS = ("expand", "reduce")


def kfac_factors(
    spec: ConvSpec, xs: Array, y_bars: Array, *, approx: str = "expand", bias: bool = False
) -> tuple[jax.Array, jax.Array]:
    """``(A, G)``: ``sum_n g_n g_n^T`` is about ``(G (x) A) / count``, g_n the gradient of example n as OIHW.

    Of the patches ``a[n, o]`` that the outputs read and the cotangents ``y[n, o]``, over N examples with T
    output positions each:

    - ``"expand"``: ``A = sum_n sum_o a a^T``, :func:`patch_moment`, and ``G = sum_n sum_o y y^T``, with count
      N*T (Grosse & Martens 2016). Exact where every position is an example of its own.
    - ``"reduce"``: ``A = sum_n abar abar^T`` of the means ``abar`` over o, and ``G = sum_n ysum ysum^T`` of
      the sums over o, with count N (Eschenhagen et al. 2023). Exact where outputs are averaged at once.

    Both are sums over examples, without damping or averages over time (docs/maths.md, section 16).

    Args:
      spec: the geometry.
      xs: array of shape ``(n, *spec.in_shape)``, the inputs.
      y_bars: array of shape ``(n, *spec.out_shape)`` and the dtype of xs, the cotangents of the outputs.
      approx: ``"expand"`` or ``"reduce"``.
      bias: whether every patch ends in a 1, whose weight is the bias.

    Returns:
      A of shape ``(k, k)``, rows as those of :func:`patch_moment`, then the bias if there is one, and G of
      shape ``(d, d)``, d the out channels of a group. With several groups both have them as first axis.

    Raises:
      TypeError: dtypes differ, or are bool or complex; bias is not a bool.
      ValueError: a shape is not the spec's, approx is another word, or a factor is beyond the memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.curvature
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), "VALID")
    >>> xs, y_bars = jnp.array([[[1., 2., 0.]]]), jnp.array([[[3., 1.]]])
    >>> A, G = fc.curvature.kfac_factors(spec, xs, y_bars, bias=True)
    >>> print(A, G)
    [[5. 2. 3.]
     [2. 4. 2.]
     [3. 2. 2.]] [[10.]]
    """
    stacks = as_stacks(spec, xs, y_bars)
    if approx not in APPROXIMATIONS:
        raise ValueError(f"approx must be one of {APPROXIMATIONS}, got {brief(approx)}.")
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False, got {brief(bias)}.")
    check_real("kfac_factors", "xs", stacks[0])
    check_moment("kfac_factors", spec, stacks[0])
    size = spec.out_channels // spec.groups
    check_array("kfac_factors", (spec.groups, size, size), stacks[1].dtype, "fewer channels, or more groups")
    factors = _expanded(spec, bias, *stacks) if approx == "expand" else _reduced(spec, bias, *stacks)
    return without_one_group(spec, factors[0]), without_one_group(spec, factors[1])


@partial(program, static_argnums=1)
def _expanded(spec: ConvSpec, bias: bool, xs: jax.Array, ys: jax.Array) -> tuple[jax.Array, jax.Array]:
    positions = math.prod(axis.out_size for axis in spec.axes)
    a = moment(spec, xs)
    if bias:
        sums, ones = _of_ones(spec, ys)
        total = _patches(sums, summed_gradient(sums, xs, ones, lax.Precision.HIGHEST))
        count = jnp.full((spec.groups, 1), len(xs) * positions, a.dtype)
        last = jnp.concatenate([total, count], 1)  # [g, (i, p, 1)]
        a = jnp.concatenate([jnp.concatenate([a, last[:, None, :-1]], 1), last[:, :, None]], 2)
    y = with_groups(spec, to_canonical(ys, spec.out_order))  # [n, o, g, e]
    return a, _second_moment(y.reshape(-1, *y.shape[-2:]))


@partial(program, static_argnums=1)
def _reduced(spec: ConvSpec, bias: bool, xs: jax.Array, ys: jax.Array) -> tuple[jax.Array, jax.Array]:
    positions = math.prod(axis.out_size for axis in spec.axes)
    sums, ones = _of_ones(spec, ys)
    of_one = partial(kernel_vjp, sums, precision=lax.Precision.HIGHEST)
    mean = jax.vmap(lambda x, y: _patches(sums, of_one(x, y)))(xs, ones) / max(1, positions)
    if bias:
        mean = jnp.concatenate([mean, jnp.full((*mean.shape[:2], 1), 1, mean.dtype)], 2)
    y = with_groups(spec, to_canonical(ys, spec.out_order))  # [n, o, g, e]
    return _second_moment(mean), _second_moment(y.sum(range(1, y.ndim - 2)))


def _of_ones(spec: ConvSpec, ys: jax.Array) -> tuple[ConvSpec, jax.Array]:
    """The geometry with one out channel per group, and outputs of 1: their gradients are sums of patches."""
    shape = list(spec.rhs_shape)
    shape[spec.dimension_numbers.rhs_spec[0]] = spec.groups
    sums = replace(spec, rhs_shape=tuple(shape))
    return sums, jnp.ones((len(ys), *sums.out_shape), ys.dtype)


def _patches(sums: ConvSpec, kernel: jax.Array) -> jax.Array:
    """[g, (i, p)] of a kernel with one out channel per group."""
    return out_first(sums, kernel).reshape(sums.groups, sums.group_channels * math.prod(taps(sums)))


def _second_moment(vectors: jax.Array) -> jax.Array:
    """[n, g, c] -> [g, c, c]."""
    return lax.dot_general(vectors, vectors, (((0,), (0,)), ((1,), (1,))), lax.Precision.HIGHEST)

"""Products with M that never build M: one trilinear form, three products, each a convolution.

A convolution is a trilinear form in kernel, input and output cotangent. Two of the three give the third:

    y = M(k) x        "y" from (k, x)
    x = M(k)^T y      "x" from (k, y)
    k = X(x)^T y      "k" from (x, y)

The derivative or transpose of one product is another one. One JAX primitive holds all three, so
derivatives of any order run through this file, and none through JAX's own rules for convolutions.

Each platform has its own form of the products, in its own file; forms.py says what it must have. On the CPU,
the convolutions that JAX derives read out of bounds or abort when a padding turns negative, and are slow
where a stride becomes an input dilation. So the CPU has others. On GPU and TPU they are what the hardware
does best, once negative padding is cropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.jet import jet_rules
from jax.export import is_symbolic_dim
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla
from jax.sharding import NamedSharding

from jaxconv_fc.geometry.arguments import Array, check_summable
from jaxconv_fc.geometry.layout import from_canonical, to_canonical
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.numerics import summed
from jaxconv_fc.products.forms import Call, Forms
from jaxconv_fc.products.platforms import PLATFORMS
from jaxconv_fc.sharding import (
    explicit_mesh,
    lower_by_platform,
    on_automatic_axes,
    result_sharding,
    vary_alike,
)


def apply(spec: ConvSpec, kernel: Array, x: Array, *, precision: Any = None) -> jax.Array:
    """``M x``: the convolution of one example, ``as_matrix(spec, kernel) @ x.ravel()``, reshaped.

    Linear in ``kernel`` and in ``x``, and differentiable in both to any order, forward and reverse. Its
    transpose with respect to ``x`` is :func:`apply_transpose`. Values and gradients are also right for the
    geometries where ``lax.conv_general_dilated`` on CPU is wrong (docs/maths.md, section 8). ``jax.vmap``
    over examples makes them the batch of one convolution.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      x: array of shape ``spec.in_shape`` and the kernel's dtype.
      precision: as in ``lax.conv_general_dilated``; on GPU and TPU ``"highest"`` for full float32.

    Returns:
      Array of shape ``spec.out_shape``.

    Raises:
      TypeError: dtypes differ, or are bool.
      ValueError: a shape is not the spec's.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.apply(spec, jnp.array([[[1., 2.]]]), jnp.array([[1., 0., 0., 3.]])))
    [[1. 0. 6.]]
    """
    return _product("y", spec, precision, kernel=kernel, x=x)


def apply_transpose(spec: ConvSpec, kernel: Array, y: Array, *, precision: Any = None) -> jax.Array:
    """``M^T y``: ``as_matrix(spec, kernel).T @ y.ravel()``, reshaped. For M^H conjugate the kernel.

    The transpose of the convolution, for every geometry: remainders of strides, negative padding, groups,
    and boundary modes (each copy in the padding is added to its source; docs/maths.md, section 2).
    ``jax.linear_transpose`` of :func:`apply` computes the same. Integers work, where JAX's own adjoint is a
    silent ``float0``.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.
      precision: as in :func:`apply`.

    Returns:
      Array of shape ``spec.in_shape``.

    Raises:
      TypeError: dtypes differ, or are bool.
      ValueError: a shape is not the spec's.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.apply_transpose(spec, jnp.array([[[1., 2.]]]), jnp.array([[1., 0., 3.]])))
    [[1. 2. 3. 6.]]
    """
    return _product("x", spec, precision, kernel=kernel, y=y)


def kernel_vjp(spec: ConvSpec, x: Array, y_bar: Array, *, precision: Any = None) -> jax.Array:
    """``X(x)^T y_bar``: the gradient with respect to the kernel, itself a convolution.

    ``kernel_bar[d, i, p] = sum_o y_bar[d, o] * x[c(d, i), t(o, p)]`` (docs/maths.md, sections 2 and 6).
    Complex numbers are not conjugated. Right where ``jax.vjp`` of lax on CPU is wrong, and fast with groups.
    ``jax.vmap`` gives one gradient per example. For their sum differentiate :func:`apply` of the whole batch:
    one convolution, up to 6 times faster than a sum of the gradients.

    Args:
      spec: the geometry.
      x: array of shape ``spec.in_shape``.
      y_bar: array of shape ``spec.out_shape`` and the dtype of x.
      precision: as in :func:`apply`.

    Returns:
      Array of shape ``spec.rhs_shape``.

    Raises:
      TypeError: dtypes differ, or are bool.
      ValueError: a shape is not the spec's.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.kernel_vjp(spec, jnp.array([[1, 2, 3, 4]]), jnp.array([[1, 0, 10]])))
    [[[31 42]]]
    >>> import jax
    >>> xs, ys = jnp.ones((5, 1, 4)), jnp.ones((5, 1, 3))
    >>> def batch(kernel):
    ...     return jax.vmap(lambda x: fc.apply(spec, kernel, x))(xs)
    >>> pull = jax.vjp(batch, jnp.zeros((1, 1, 2)))[1]
    >>> print(pull(ys)[0])  # the sum over the batch
    [[[15. 15.]]]
    """
    return _product("k", spec, precision, x=x, y_bar=y_bar)


def stacked_product(spec: ConvSpec, kernel: jax.Array, xs: jax.Array, precision: Any) -> jax.Array:
    """``M x`` for every x of a stack, as ``vmap`` of :func:`apply` computes it."""
    return _bind(kernel, xs, out="y", spec=spec, batches=("xy",), precision=precision, sharding=None)


def summed_gradient(spec: ConvSpec, xs: jax.Array, y_bars: jax.Array, precision: Any) -> jax.Array:
    """``sum_n X(x_n)^T y_bar_n`` over two stacks, as the gradient of :func:`stacked_product` computes it."""
    return _bind(xs, y_bars, out="k", spec=spec, batches=("xy",), precision=precision, sharding=None)


def _product(out: str, spec: ConvSpec, precision: Any, **operands: Array) -> jax.Array:
    """The product of two operands by name. The first letter of a name is its role, which has a shape."""
    (a_name, a), (b_name, b) = [
        (name, as_operand(name, value, spec, _SHAPES[name[0]])) for name, value in operands.items()
    ]
    check_summable(a_name, a, b_name, b)
    precision = tuple(precision) if isinstance(precision, list) else precision  # parameters are hashed
    return _bind(a, b, out=out, spec=spec, batches=(), precision=precision, sharding=None)


# -- the primitive -----------------------------------------------------------------------------
#
# The role of an operand is "k" (kernel), "x" (input) or "y" (output). The product makes the role `out` of
# the other two.
#
# Operands may have leading batch axes. `batches` holds, for each batch axis in order, the roles that have
# it: "xy" is an ordinary batch, "kxy" one kernel per example, "ky" many kernels on one input. A batch axis
# that the result does not have is summed over. So a transpose exchanges roles and keeps `batches`, and a
# vmap puts one more entry in front.
#
# The type of the result follows from those of the operands. It varies over the mesh axes over which they
# do, and a dimension is partitioned as theirs of the same name is. `sharding` overrides the partition: a
# cotangent has that of its operand.
OPERANDS = {"y": "kx", "x": "ky", "k": "xy"}
_SHAPES = {"k": "rhs_shape", "x": "in_shape", "y": "out_shape"}
product_p = Primitive("conv_product")


def _bind(a: jax.Array, b: jax.Array, **params: Any) -> jax.Array:
    return product_p.bind(*vary_alike((a, b)), **params)


def _abstract(
    a: Any, b: Any, *, out: str, spec: ConvSpec, batches: tuple[str, ...], precision: Any, sharding: Any
) -> Any:
    sizes = batch_sizes(out, batches, a.shape, b.shape)
    shape = (*(sizes[i] for i in _lead(batches, out)), *getattr(spec, _SHAPES[out]))
    if sharding is None and not (a.sharding.mesh.empty and b.sharding.mesh.empty):
        operands = [(_labels(spec, batches, r), v) for r, v in zip(OPERANDS[out], (a, b), strict=True)]
        sharding = result_sharding(_labels(spec, batches, out), shape, operands)
    return a.update(shape=shape, weak_type=False, sharding=sharding)


def _labels(spec: ConvSpec, batches: tuple[str, ...], role: str) -> list[Any]:
    """A name for every dimension of an operand. Dimensions of one name have one meaning and one size."""
    dims = range(len(spec.axes))
    inputs = "in" if spec.groups == 1 else "in, of a group"
    batch_group = ["batch group"] if spec.batch_group_count > 1 else []
    order, names = {
        "k": (spec.kernel_order, [*(f"tap {a}" for a in dims), inputs, "out"]),
        "x": (spec.in_order, [*(f"position {a}" for a in dims), *batch_group, "in"]),
        "y": (spec.out_order, [*(f"position {a}" for a in dims), "out"]),
    }[role]
    named = dict(zip(order, names, strict=True))
    return [*_lead(batches, role), *(named[i] for i in range(len(named)))]


def _lead(batches: tuple[str, ...], role: str) -> list[int]:
    """The batch axes of an operand of this role, in order."""
    return [i for i, label in enumerate(batches) if role in label]


def batch_sizes(out: str, batches: tuple[str, ...], *shapes: tuple[int, ...]) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for role, shape in zip(OPERANDS[out], shapes, strict=True):
        sizes |= dict(zip(_lead(batches, role), shape, strict=False))
    return sizes


def _cotangent(
    operand: int, ct: jax.Array, a: Any, b: Any, *, out: str, sharding: Any, **params: Any
) -> jax.Array:
    """The cotangent of one operand: the product whose result has the role of this operand."""
    roles = OPERANDS[out]
    given = {out: ct, roles[1 - operand]: (a, b)[1 - operand]}
    wanted, aval = roles[operand], (a, b)[operand].aval
    sharding = None if aval.sharding.mesh.empty else aval.sharding
    return _bind(*(given[role] for role in OPERANDS[wanted]), out=wanted, sharding=sharding, **params)


def _batched(
    args: Any, dims: Any, *, out: str, batches: tuple[str, ...], sharding: Any, **params: Any
) -> Any:
    fronted = [v if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(args, dims, strict=True)]
    roles = {out, *(role for role, d in zip(OPERANDS[out], dims, strict=True) if d is not None)}
    label = "".join(role for role in "kxy" if role in roles)
    if sharding is not None:  # the new axis keeps the partition that it has
        fronts = [jax.typeof(v).sharding.spec[0] for v, d in zip(fronted, dims, strict=True) if d is not None]
        front = next((part for part in fronts if part is not None), None)
        sharding = NamedSharding(sharding.mesh, jax.P(front, *sharding.spec))
    return _bind(*fronted, out=out, batches=(label, *batches), sharding=sharding, **params), 0


def _taylor(primals: Any, series: Any, **params: Any) -> tuple[jax.Array, list[jax.Array]]:
    """``c[n] = sum_i a[i] * b[n-i]`` of the terms of two Taylor series, for ``jax.experimental.jet``."""
    a, b = ([value, *terms] for value, terms in zip(primals, series, strict=True))
    value, *terms = (sum(_bind(a[i], b[n - i], **params) for i in range(n + 1)) for n in range(len(a)))
    return value, terms  # type: ignore[return-value]


def _lowered(
    platform: str,
    a: jax.Array,
    b: jax.Array,
    *,
    out: str,
    spec: ConvSpec,
    batches: tuple[str, ...],
    precision: Any,
    sharding: Any,
) -> jax.Array:
    """The product inside a program: the batch axes of the kernel by vmap, all others as one batch."""
    params = {"out": out, "spec": spec, "batches": batches, "precision": precision, "sharding": sharding}
    if explicit_mesh((a, b)) is not None:  # its axes are made automatic around the product
        result = _abstract(jax.typeof(a), jax.typeof(b), **params)
        return on_automatic_axes(partial(_lowered, platform, **params), result.sharding)(a, b)
    for axis in spec.axes:  # XLA would make the padding, and read copies through indices of 32 bits
        axis.check_held_by(np.int32)
    sizes = batch_sizes(out, batches, a.shape, b.shape)
    shape = (*(sizes[i] for i in _lead(batches, out)), *getattr(spec, _SHAPES[out]))
    if not a.size or not b.size or not math.prod(shape):
        return jnp.zeros(shape, a.dtype)
    kernels = _lead(batches, "k")
    others = [i for i in range(len(batches)) if i not in kernels]
    examples = math.prod(sizes[i] for i in others)
    # The batch axes of each role, those of the kernel first.
    order = {r: [i for i in kernels if r in batches[i]] + (others if r != "k" else []) for r in "kxy"}

    operands = []  # [kernel batches..., role] of a kernel, else [kernel batches..., n, role]
    for role, value in zip(OPERANDS[out], (a, b), strict=True):
        lead = sorted(order[role])
        value = jnp.moveaxis(value, [lead.index(i) for i in order[role]], range(len(lead)))
        kept = [sizes[i] for i in order[role] if i in kernels]
        operands.append(value.reshape(*kept, *[examples] * (role != "k"), *getattr(spec, _SHAPES[role])))

    integer = jnp.issubdtype(a.dtype, jnp.integer)  # no other platform has convolutions of integers
    call = Call(spec.groups, precision, channels_first=spec.in_order[-1] == 0)
    compute = partial(_PRODUCTS[out], PLATFORMS["cpu" if integer else platform], spec, call)
    for i in reversed(kernels):
        in_axes = [0 if role in batches[i] else None for role in OPERANDS[out]]
        each = _loop if is_symbolic_dim(sizes[i]) else jax.vmap  # a convolution has a fixed number of groups
        compute = vmap_or_sum(compute, in_axes, out in batches[i], each)
    result = compute(*operands).reshape(*(sizes[i] for i in order[out]), *getattr(spec, _SHAPES[out]))
    return jnp.moveaxis(result, range(len(order[out])), [sorted(order[out]).index(i) for i in order[out]])


def vmap_or_sum(
    compute: Callable[..., jax.Array], in_axes: Sequence[int | None], kept: bool, each: Any = jax.vmap
) -> Callable[..., jax.Array]:
    """``compute`` over a batch axis of some operands; the sum over this axis unless the result keeps it."""
    mapped = each(compute, tuple(in_axes))
    return mapped if kept else lambda *operands: summed(mapped(*operands), 0)


def _loop(compute: Callable[..., jax.Array], in_axes: Sequence[int | None]) -> Callable[..., jax.Array]:
    """``jax.vmap(compute, in_axes)`` as a loop."""

    def mapped(*operands: jax.Array) -> jax.Array:
        pairs = list(zip(operands, in_axes, strict=True))
        count = next(v.shape[0] for v, d in pairs if d is not None)
        return lax.map(lambda i: compute(*(v if d is None else v[i] for v, d in pairs)), jnp.arange(count))

    return mapped


product_p.def_impl(partial(xla.apply_primitive, product_p))  # a program of its own, under disable_jit too
product_p.def_abstract_eval(_abstract)
ad.defbilinear(product_p, partial(_cotangent, 0), partial(_cotangent, 1))
batching.primitive_batchers[product_p] = _batched
jet_rules[product_p] = _taylor
lower_by_platform(product_p, lambda platform: partial(_lowered, platform))


# -- the three products, on a batch ------------------------------------------------------------
#
# Their arrays are canonical, as forms.py says. A batch group is a feature group whose channels lie
# in another batch entry, so there is one kind of group.


def _to_outputs(forms: Forms, spec: ConvSpec, call: Call, kernel: jax.Array, x: jax.Array) -> jax.Array:
    axes = [a.on_padded for a in spec.axes]
    x, kernel = padded_inputs(spec, x), to_canonical(kernel, spec.kernel_order)
    y = forms.correlate(axes, x, kernel, call)  # [n, t, g*i] [p, i, g*e] -> [n, o, g*e]
    return from_canonical(y, spec.out_order)


def _to_inputs(forms: Forms, spec: ConvSpec, call: Call, kernel: jax.Array, y: jax.Array) -> jax.Array:
    """Correlation with the flipped kernel; then every copy in the padding is added to its source."""
    axes = [a.on_padded.transpose() for a in spec.axes]
    y, kernel = to_canonical(y, spec.out_order), flipped_kernel(spec, kernel)
    x = forms.correlate(axes, y, kernel, call)  # [n, o, g*e] [p, e, g*i] -> [n, t, g*i]
    for dim, axis in enumerate(spec.axes, start=1):
        x = forms.fold(axis, x, dim) if any(axis.copied) else x
    return from_canonical(x.reshape(-1, *(spec.in_shape[i] for i in spec.in_order)), spec.in_order)


def _to_kernel(forms: Forms, spec: ConvSpec, call: Call, x: jax.Array, y: jax.Array) -> jax.Array:
    """Correlation of inputs with cotangents: its outputs are the taps (docs/maths.md, section 2)."""
    axes = [a.on_padded.with_taps_as_outputs() for a in spec.axes]
    x, y = padded_inputs(spec, x), to_canonical(y, spec.out_order)
    kernel = forms.kernel_gradient(axes, x, y, call)  # [n, t, g*i] [n, o, g*e] -> [p, i, g*e]
    return from_canonical(kernel, spec.kernel_order)


_PRODUCTS = {"y": _to_outputs, "x": _to_inputs, "k": _to_kernel}


def padded_inputs(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """The canonical input, padded by a boundary mode: position ``j`` is a copy of ``source(j)``."""
    x = to_canonical(x, spec.in_order)  # [n, t, i], or with batch groups [n, t, g, i]
    x = x.reshape(*x.shape[: 1 + len(spec.axes)], -1)  # [n, t, g*i]
    for dim, axis in enumerate(spec.axes, start=1):
        if any(axis.copied):
            x = jnp.take(x, axis.source(lax.iota(jnp.int32, axis.padded_size)), axis=dim, mode="clip")
    return x


def flipped_kernel(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The canonical kernel of the transpose: taps reversed, channels exchanged within each group."""
    kernel = lax.rev(to_canonical(kernel, spec.kernel_order), range(len(spec.axes)))  # [p, i, g*e]
    taps, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    kernel = kernel.reshape(*taps, inputs, spec.groups, outputs // spec.groups)  # [p, i, g, e]
    kernel = jnp.swapaxes(kernel, -1, -3)  # [p, e, g, i]
    return kernel.reshape(*taps, outputs // spec.groups, spec.groups * inputs)  # [p, e, g*i]

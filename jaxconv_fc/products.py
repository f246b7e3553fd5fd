"""Products with M that never build M: one bilinear map, its three products, each a convolution.

A convolution is a trilinear form in kernel, input and output cotangent. Fixing two of the three gives

    y = M(k) x        "y" from (k, x)
    x = M(k)^T y      "x" from (k, y)
    k = X(x)^T y      "k" from (x, y)

and each of these products, differentiated or transposed, is another of them. One JAX primitive holds
all three, so every derivative of any order runs through the code of this file, and none through the
convolutions that JAX would derive: those read out of bounds or abort on CPU when a padding turns
negative, and are slow where a stride becomes an input dilation.
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
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding

from jaxconv_fc.correlation import correlate
from jaxconv_fc.layout import inverse
from jaxconv_fc.sharding import explicit_mesh, on_automatic_axes, result_sharding, vary_alike
from jaxconv_fc.spec import ConvSpec, as_operand


def apply(spec: ConvSpec, kernel: Any, x: Any, *, precision: Any = None) -> jax.Array:
    """``M x``: the convolution of one example, ``as_matrix(spec, kernel) @ x.ravel()``, reshaped.

    Linear in ``kernel`` and in ``x``, differentiable in both to any order, forward and reverse; its
    transpose with respect to ``x`` is :func:`apply_transpose`. Right, gradients included, also for the
    geometries where ``lax.conv_general_dilated`` on CPU is not. Use ``jax.vmap`` for a batch: it becomes
    the batch of one convolution.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      x: array of shape ``spec.in_shape`` and the kernel's dtype.
      precision: as in ``lax.conv_general_dilated``; on GPU and TPU ``"highest"`` for full float32.

    Returns:
      Array of shape ``spec.out_shape``.

    Raises:
      TypeError: dtypes differ, or are bool.  ValueError: a shape is not the spec's.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.apply(spec, jnp.array([[[1., 2.]]]), jnp.array([[1., 0., 0., 3.]])))
    [[1. 0. 6.]]
    """
    return _product("y", spec, *_operands(spec, "kernel", kernel, "x", x), precision=precision)


def apply_transpose(spec: ConvSpec, kernel: Any, y: Any, *, precision: Any = None) -> jax.Array:
    """``M^T y``: ``as_matrix(spec, kernel).T @ y.ravel()``, reshaped. For M^H conjugate the kernel.

    The transpose of the convolution, for every geometry: remainders of strides, negative padding,
    groups, and boundary modes (where it folds the copies in the padding back). It is what
    ``jax.linear_transpose`` of :func:`apply` computes. Integers work, where JAX's own adjoint is a
    silent ``float0``.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.
      precision: as in :func:`apply`.

    Returns:
      Array of shape ``spec.in_shape``.

    Raises:
      As :func:`apply`.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.apply_transpose(spec, jnp.array([[[1., 2.]]]), jnp.array([[1., 0., 3.]])))
    [[1. 2. 3. 6.]]
    """
    return _product("x", spec, *_operands(spec, "kernel", kernel, "y", y), precision=precision)


def kernel_vjp(spec: ConvSpec, x: Any, y_bar: Any, *, precision: Any = None) -> jax.Array:
    """``X(x)^T y_bar``: the gradient with respect to the kernel, itself a convolution.

    ``kernel_bar[d, i, p] = sum_o y_bar[d, o] * x[c(d, i), t(o, p)]``. The plain transpose for complex
    numbers. Right where ``jax.vjp`` of lax on CPU is not, and not slowed down by groups. Per-example
    gradients by ``jax.vmap``.

    Args:
      spec: the geometry.
      x: array of shape ``spec.in_shape``.
      y_bar: array of shape ``spec.out_shape`` and the dtype of x.
      precision: as in :func:`apply`.

    Returns:
      Array of shape ``spec.rhs_shape``.

    Raises:
      TypeError: dtypes differ, or are bool.  ValueError: a shape is not the spec's.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    >>> print(fc.kernel_vjp(spec, jnp.array([[1, 2, 3, 4]]), jnp.array([[1, 0, 10]])))
    [[[31 42]]]
    """
    return _product("k", spec, *_operands(spec, "x", x, "y_bar", y_bar), precision=precision)


def stacked_product(spec: ConvSpec, kernel: jax.Array, xs: jax.Array, precision: Any) -> jax.Array:
    """``M x`` of every x of a stack: what ``vmap`` makes of :func:`apply`."""
    return _product("y", spec, kernel, xs, precision=precision, batches=("xy",))


def _operands(spec: ConvSpec, a_name: str, a: Any, b_name: str, b: Any) -> tuple[jax.Array, jax.Array]:
    """Both operands as arrays of the spec's shapes and one dtype."""
    a = as_operand(a_name, a, spec, _SHAPES[a_name[0]])
    b = as_operand(b_name, b, spec, _SHAPES[b_name[0]])
    if a.dtype != b.dtype:
        raise TypeError(
            f"{a_name} is {a.dtype} and {b_name} {b.dtype}: cast one, e.g. {b_name}.astype({a_name}.dtype)."
        )
    if a.dtype == jnp.bool_:
        raise TypeError(
            f"{a_name} and {b_name} are bool, which have no sums: cast both with .astype(jnp.int32)."
        )
    return a, b


# -- the primitive -----------------------------------------------------------------------------
#
# Operands may carry leading batch axes. `batches` names, for each of them in order, the roles that
# have it: "xy" is an ordinary batch, "kxy" one kernel per example, "ky" many kernels on one input.
# A batch axis that the result does not have is summed over. So a transpose permutes roles and keeps
# `batches`, and a vmap puts one more entry in front.
#
# The type of the result follows from those of the operands: it varies over the mesh axes over which they
# do, and a dimension is partitioned as theirs of the same name is. `sharding` overrules the partition: a
# cotangent has that of its operand.
OPERANDS = {"y": "kx", "x": "ky", "k": "xy"}
_SHAPES = {"k": "rhs_shape", "x": "in_shape", "y": "out_shape"}
product_p = Primitive("conv_product")


def _product(
    out: str, spec: ConvSpec, a: jax.Array, b: jax.Array, *, precision: Any, batches: tuple[str, ...] = ()
) -> jax.Array:
    precision = tuple(precision) if isinstance(precision, list) else precision  # parameters are hashed
    return _bind(a, b, out=out, spec=spec, batches=batches, precision=precision, sharding=None)


def _bind(a: jax.Array, b: jax.Array, **params: Any) -> jax.Array:
    return product_p.bind(*vary_alike((a, b)), **params)


def _abstract(
    a: Any, b: Any, *, out: str, spec: ConvSpec, batches: tuple[str, ...], precision: Any, sharding: Any
) -> Any:
    sizes = _batch_sizes(out, batches, a.shape, b.shape)
    shape = (*(sizes[i] for i in _lead(batches, out)), *_role_shape(spec, out))
    if sharding is None:
        operands = [(_labels(spec, batches, r), v) for r, v in zip(OPERANDS[out], (a, b), strict=True)]
        sharding = result_sharding(_labels(spec, batches, out), shape, operands)
    return a.update(shape=shape, weak_type=False, sharding=sharding)


def _labels(spec: ConvSpec, batches: tuple[str, ...], role: str) -> list[Any]:
    """A name for every dimension of an operand: dimensions of one name have one meaning and one size."""
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
    """The batch axes that an operand of this role carries, in order."""
    return [i for i, label in enumerate(batches) if role in label]


def _batch_sizes(out: str, batches: tuple[str, ...], *shapes: tuple[int, ...]) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for role, shape in zip(OPERANDS[out], shapes, strict=True):
        sizes |= dict(zip(_lead(batches, role), shape, strict=False))
    return sizes


def _role_shape(spec: ConvSpec, role: str) -> tuple[int, ...]:
    return getattr(spec, _SHAPES[role])


def _cotangent(
    operand: int, ct: jax.Array, a: Any, b: Any, *, out: str, sharding: Any, **params: Any
) -> jax.Array:
    """The cotangent of one operand: the product that has this operand's role as its result."""
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


def _lowered(a: jax.Array, b: jax.Array, *, sharding: Any, **params: Any) -> jax.Array:
    """The product inside of a program; explicit axes of a mesh become automatic ones for it."""
    evaluate = partial(_evaluate, **params)
    if explicit_mesh((a, b)) is None:
        return evaluate(a, b)
    result = _abstract(jax.typeof(a), jax.typeof(b), sharding=sharding, **params)
    return on_automatic_axes(evaluate, result.sharding)(a, b)


def _evaluate(
    a: jax.Array, b: jax.Array, *, out: str, spec: ConvSpec, batches: tuple[str, ...], precision: Any
) -> jax.Array:
    """The product with all its batch axes: those of the kernel by vmap, the others as one batch."""
    for axis in spec.axes:
        if axis.mode != "zeros":  # what it pads is an array, read through indices of 32 bits
            axis.check_held_by(np.int32)
    roles = OPERANDS[out]
    sizes = _batch_sizes(out, batches, a.shape, b.shape)
    stacked = _lead(batches, "k")
    shared = [i for i in range(len(batches)) if i not in stacked]
    examples = math.prod(sizes[i] for i in shared)

    def order(role: str) -> list[int]:
        return [i for i in stacked if role in batches[i]] + shared * (role != "k")

    def fold(role: str, value: jax.Array) -> jax.Array:
        lead = _lead(batches, role)
        value = jnp.moveaxis(value, [lead.index(i) for i in order(role)], range(len(lead)))
        kept = [sizes[i] for i in order(role) if i in stacked]
        return value.reshape(*kept, *[examples] * (role != "k"), *_role_shape(spec, role))

    compute = partial(_PRODUCTS[out], spec, precision)
    for i in reversed(stacked):
        compute = vmap_or_sum(
            compute, [0 if role in batches[i] else None for role in roles], out in batches[i]
        )
    result = compute(*(fold(role, value) for role, value in zip(roles, (a, b), strict=True)))
    result = result.reshape(*(sizes[i] for i in order(out)), *_role_shape(spec, out))
    lead = _lead(batches, out)
    return jnp.moveaxis(result, range(len(lead)), [lead.index(i) for i in order(out)])


def vmap_or_sum(
    compute: Callable[..., jax.Array], in_axes: Sequence[int | None], kept: bool
) -> Callable[..., jax.Array]:
    """``compute`` over a batch axis of some operands, summed over where the result does not keep it."""
    mapped = jax.vmap(compute, tuple(in_axes))
    # A sum of small integers is wide by default.
    return mapped if kept else lambda *operands: mapped(*operands).sum(0, dtype=operands[0].dtype)


@partial(jax.jit, static_argnames=("out", "spec", "batches", "precision", "sharding"))
def _compiled(a: jax.Array, b: jax.Array, **params: Any) -> jax.Array:
    """The product as a program of its own."""
    return product_p.bind(a, b, **params)


product_p.def_impl(_compiled)
product_p.def_abstract_eval(_abstract)
mlir.register_lowering(product_p, mlir.lower_fun(_lowered, multiple_results=False))
ad.defbilinear(product_p, partial(_cotangent, 0), partial(_cotangent, 1))
batching.primitive_batchers[product_p] = _batched


# -- the three products, on a batch ------------------------------------------------------------
#
# Canonical arrays: inputs (batch, spatial..., in channels), outputs (batch, spatial..., out channels),
# kernels (taps..., in channels of a group, out channels). A batch group is a feature group whose
# channels lie in another batch entry, so there is one kind of group.


def _forward(spec: ConvSpec, precision: Any, kernel: jax.Array, x: jax.Array) -> jax.Array:
    axes = [a.on_padded for a in spec.axes]
    kernel = jnp.transpose(kernel, spec.kernel_order)
    y = correlate(axes, _read(spec, x), kernel, spec.groups, precision)
    return _from_canonical(y, spec.out_order)


def _transposed(spec: ConvSpec, precision: Any, kernel: jax.Array, y: jax.Array) -> jax.Array:
    """Correlation with the kernel turned around, the copies in the padding folded back."""
    axes = [a.on_padded.transpose() for a in spec.axes]
    y = _to_canonical(y, spec.out_order)
    return _unread(spec, correlate(axes, y, flipped_kernel(spec, kernel), spec.groups, precision))


def flipped_kernel(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The canonical kernel of the transpose: taps reversed, channels exchanged within each group."""
    kernel = lax.rev(jnp.transpose(kernel, spec.kernel_order), range(len(spec.axes)))
    taps, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    kernel = kernel.reshape(*taps, inputs, spec.groups, outputs // spec.groups)
    return jnp.swapaxes(kernel, -1, -3).reshape(*taps, outputs // spec.groups, spec.groups * inputs)


def _kernel_gradient(spec: ConvSpec, precision: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Correlation of inputs with cotangents, whose outputs are the taps (docs/maths.md, section 2).

    The channels of a group are the batch, and each group has the examples as its channels.
    """
    if not x.size or not y.size:
        return jnp.zeros(spec.rhs_shape, x.dtype)
    x, axes = _read(spec, x), [a.on_padded.kernel_gradient() for a in spec.axes]
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], spec.groups, spec.group_channels), (0, -1), (-1, 0))
    x = x.reshape(*x.shape[:-2], -1)
    y = jnp.moveaxis(_to_canonical(y, spec.out_order), 0, -2)
    kernel = correlate(axes, x, y, spec.groups, precision)
    return jnp.transpose(jnp.moveaxis(kernel, 0, -2), inverse(spec.kernel_order))


_PRODUCTS = {"y": _forward, "x": _transposed, "k": _kernel_gradient}


def _to_canonical(value: jax.Array, order: Sequence[int]) -> jax.Array:
    return jnp.transpose(value, (0, *(1 + i for i in order)))


def _from_canonical(value: jax.Array, order: Sequence[int]) -> jax.Array:
    return jnp.transpose(value, (0, *(1 + i for i in inverse(order))))


def _read(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """Canonical input, padded by a boundary mode: position ``j`` is a copy of ``source(j)``."""
    x = _to_canonical(x, spec.in_order)
    x = x.reshape(*x.shape[: 1 + len(spec.axes)], spec.in_channels)
    for i, axis in enumerate(spec.axes, start=1):
        if axis.mode != "zeros" and (axis.lo or axis.hi):
            source = axis.source(lax.iota(jnp.int32, axis.padded_size))
            x = jnp.take(x, source, axis=i, mode="clip")
    return x


def _unread(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """The transpose of :func:`_read`: every copy is added to the position it was made from."""
    for i, axis in enumerate(spec.axes, start=1):
        if axis.mode != "zeros" and (axis.lo or axis.hi):
            source = axis.source(lax.iota(jnp.int32, axis.padded_size))
            folded = jnp.zeros((*x.shape[:i], axis.size, *x.shape[i + 1 :]), x.dtype)
            x = folded.at[(slice(None),) * i + (source,)].add(x)
    canonical = [spec.in_shape[i] for i in spec.in_order]
    return _from_canonical(x.reshape(x.shape[0], *canonical), spec.in_order)

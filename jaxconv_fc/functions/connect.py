"""A function with every convolution exchanged for a product with its matrix: a fully connected network.

Equations that hold other jaxprs (loops, branches, calls) are exchanged for the same equation around
rewritten jaxprs. A custom derivative or batching rule is kept by one trick: transform the *original*
call, which obeys its rule, and rewrite what that transformation computes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxconv_fc.adjoint import kernel_matrix
from jaxconv_fc.dense import as_matrix
from jaxconv_fc.functions.find import holds_conv, spec_of
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    ClosedJaxpr,
    Environment,
    Jaxpr,
    JaxprEqn,
    alone,
    compiled,
    conv_general_dilated_p,
    eval_eqn,
    inner_jaxprs,
    open_jaxpr,
    trace,
)
from jaxconv_fc.products import OPERANDS, product_p, vmap_or_sum
from jaxconv_fc.sharding import as_on_one_device
from jaxconv_fc.spec import ConvSpec


def fully_connected(
    fn: Callable[..., Any], *, builder: Callable[[ConvSpec, Any], Any] = as_matrix
) -> Callable[..., Any]:
    """The same function with every convolution done as a product ``M @ x``, the batch as columns.

    Composes with jit, vmap and grad on either side. Gradients with respect to kernels flow through the
    matrices. A custom derivative rule in ``fn`` is kept, and the convolutions in it are exchanged too.
    Also exchanged are the products of this library, :func:`apply` and its derivatives.

    Each matrix is built anew from its kernel whenever the function runs, so put ``jax.jit`` around it.

    Args:
      fn: any function of JAX arrays; models of flax, equinox, haiku or keras among them.
      builder: ``builder(spec, kernel)`` returns what stands for M: anything with ``@`` and ``.T``. Dense
        by default; :func:`as_bcoo` for a sparse one.

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

    @functools.wraps(fn, updated=())
    def connected(*args: Any, **kwargs: Any) -> Any:
        traced = trace(fn, args, kwargs)
        return traced.rebuild(MatrixEvaluator(builder)(traced.jaxpr, traced.arguments))

    return connected


@dataclass(frozen=True)
class MatrixEvaluator:
    """Evaluates a jaxpr with every convolution exchanged for a product with the builder's matrix."""

    builder: Callable[[ConvSpec, Any], Any]

    def __call__(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        env = Environment(jaxpr, arguments)
        for eqn in env.equations:
            values = env.read(eqn.invars)
            if eqn.primitive is conv_general_dilated_p:
                results = [self.convolution(eqn, *values)]
            elif eqn.primitive is product_p:
                results = [self.product(eqn, *values)]
            elif holds_conv(eqn):
                results = self.call(eqn, values)
            else:
                results = eval_eqn(eqn, values)
            env.write(eqn.outvars, results)
        return env.read(env.outvars)

    def transformed(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fully_connected(fn, builder=self.builder)

    # -- products ------------------------------------------------------------------------------

    def convolution(self, eqn: JaxprEqn, x: Any, kernel: Any) -> Any:
        spec, precision = spec_of(eqn), eqn.params["precision"]
        result: Any = eqn.outvars[0].aval

        def compute(x: Any, kernel: Any) -> Any:
            matrix = self.builder(spec, kernel.astype(result.dtype))
            stack = examples(spec, x.astype(result.dtype))
            y = _matmul(matrix, stack.reshape(stack.shape[0], spec.in_size).T, precision)
            return batched_output(spec, y.T.reshape(stack.shape[0], *spec.out_shape))

        return as_on_one_device(compute, result)(x, kernel)

    def product(self, eqn: JaxprEqn, a: Any, b: Any) -> Any:
        """A product of this library: its batch axes mapped over, and summed where the result has none."""
        spec, out, precision = eqn.params["spec"], eqn.params["out"], eqn.params["precision"]

        def compute(a: Any, b: Any) -> Any:
            if out == "k":  # linear in the kernel: the matrix of that map is X
                return _matmul(kernel_matrix(spec, a).T, b.ravel(), precision).reshape(spec.rhs_shape)
            matrix = self.builder(spec, a)
            if out == "x":
                return _matmul(matrix.T, b.ravel(), precision).reshape(spec.in_shape)
            return _matmul(matrix, b.ravel(), precision).reshape(spec.out_shape)

        for label in reversed(eqn.params["batches"]):
            axes = [0 if role in label else None for role in OPERANDS[out]]
            compute = vmap_or_sum(compute, axes, out in label)
        return as_on_one_device(compute, eqn.outvars[0].aval)(a, b)

    # -- calls that hold convolutions ----------------------------------------------------------

    def call(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in ("custom_jvp_call", "custom_vjp_call", "custom_vmap_call"):
            return getattr(self, name)(eqn, values)
        if name in ("remat2", "checkpoint"):
            keep = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
            return jax.checkpoint(lambda *a: self(inner_jaxprs(eqn)[0], a), **keep)(*values)
        if name in CALLS:  # a boundary of compilation is none of evaluation
            return self(inner_jaxprs(eqn)[0], values)
        if name == "shard_map":
            return self.shard_map(eqn, values)
        if not _is_closed(self.builder):
            return self.around(eqn, values)
        # JAX compiles a loop, and knows it again only by the identity of its jaxpr, which is new here.
        return compiled(_Around(self), alone(eqn), *values)

    def around(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """The same equation around rewritten jaxprs."""
        return eval_eqn(eqn, values, {key: self.rewritten(value) for key, value in eqn.params.items()})

    def rewritten(self, value: Any) -> Any:
        """A parameter of an equation with the convolutions exchanged in every jaxpr it consists of."""
        if isinstance(value, tuple | list) and any(isinstance(v, ClosedJaxpr | Jaxpr) for v in value):
            parts = map(self.rewritten, value)
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if not isinstance(value, ClosedJaxpr | Jaxpr):
            return value
        operands = [v.aval for v in open_jaxpr(value)[0].invars]
        return jax.make_jaxpr(lambda *a: self(value, a))(*operands)

    def custom_jvp_call(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        call, original, operands = self.primal(eqn, values)
        call = jax.custom_jvp(call)
        call.defjvp(self.transformed(lambda primals, tangents: jax.jvp(original, primals, tangents)))
        return call(*operands)

    def custom_vjp_call(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        call, original, operands = self.primal(eqn, values)
        call = jax.custom_vjp(call)
        # The pullback is a pytree: its arrays are the residuals.
        forward = self.transformed(lambda *a: jax.vjp(original, *a))
        backward = self.transformed(lambda pullback, cotangents: pullback(cotangents))
        call.defvjp(forward, backward)
        return call(*operands)

    def custom_vmap_call(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        call, original, operands = self.primal(eqn, values)
        call = jax.custom_batching.custom_vmap(call)

        def rule(size: int, batched: Sequence[bool], *operands: Any) -> tuple[list[Any], list[bool]]:
            axes = [0 if b else None for b in batched]
            results = self.transformed(jax.vmap(original, axes, axis_size=size))(*operands)
            return results, [True] * len(results)

        call.def_vmap(rule)
        return call(*operands)

    def primal(self, eqn: JaxprEqn, values: Sequence[Any]) -> tuple[Any, Any, Sequence[Any]]:
        """(the function rewritten, the original with its rule, operands) of a call with a custom rule."""
        count = eqn.params.get("num_consts", 0)  # the rule has no say over these
        constants, operands = values[:count], values[count:]
        return (
            lambda *a: self(inner_jaxprs(eqn)[0], [*constants, *a]),
            lambda *a: eval_eqn(eqn, [*constants, *a]),
            operands,
        )

    def shard_map(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        mapped = jax.shard_map(
            lambda *a: tuple(self(inner_jaxprs(eqn)[0], a)),
            mesh=eqn.params["mesh"],
            in_specs=tuple(eqn.params["in_specs"]),
            out_specs=tuple(eqn.params["out_specs"]),
            axis_names=set(eqn.params["newly_manual_axes"]),
            check_vma=eqn.params["check_vma"],
        )
        return list(mapped(*values))


def _is_closed(builder: Any) -> bool:
    """Whether a function closes over nothing: what is compiled for it may be kept, and keeps no tracer."""
    return inspect.isfunction(builder) and not builder.__closure__ and not builder.__defaults__


@dataclass(frozen=True)
class _Around:
    """The one equation of a jaxpr, around rewritten jaxprs."""

    exchange: MatrixEvaluator

    def __call__(self, jaxpr: Any, *values: Any) -> list[Any]:
        return self.exchange.around(open_jaxpr(jaxpr)[0].eqns[0], values)


def _matmul(matrix: Any, columns: Any, precision: Any) -> Any:
    if isinstance(matrix, jax.Array):
        return jnp.matmul(matrix, columns, precision=precision)
    return matrix @ columns


def examples(spec: ConvSpec, x: Any) -> Any:
    """A batch of ``lhs_shape`` as a stack ``(examples, *in_shape)``; batch groups lie group-major."""
    axis = spec.dimension_numbers.lhs_spec[0]
    groups = spec.batch_group_count
    count = x.shape[axis] // groups
    if count != 1:
        x = x.reshape(*x.shape[:axis], groups, count, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis + 1, 0)
    return x.reshape(count, *spec.in_shape)


def batched_output(spec: ConvSpec, y: Any) -> Any:
    """A stack ``(examples, *out_shape)`` with the batch where the convolution puts it."""
    return jnp.moveaxis(y, 0, spec.dimension_numbers.out_spec[0])

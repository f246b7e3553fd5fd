"""A function with its convolutions replaced by products with their matrices: a fully connected network.

The jaxpr of a plain call (jit) is evaluated in place. Any other equation that holds jaxprs (a loop, a branch,
a call with a custom rule) becomes the same equation around rewritten jaxprs. A custom derivative or batching
rule is kept: the *original* call, which obeys its rule, is differentiated or batched, and then rewritten.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.adjoint import kernel_matrix
from jaxconv_fc.functions.find import performs_conv, spec_of
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    alone,
    compiled,
    eval_eqn,
    evaluate,
    inner_jaxprs,
    open_jaxpr,
    result_avals,
    scan_counts,
    trace,
)
from jaxconv_fc.matrix.dense import as_matrix
from jaxconv_fc.products import OPERANDS, vmap_or_sum
from jaxconv_fc.sharding import as_on_one_device
from jaxconv_fc.spec import ConvSpec


def fully_connected(
    fn: Callable[..., Any], *, builder: Callable[[ConvSpec, Any], Any] = as_matrix
) -> Callable[..., Any]:
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

    @functools.wraps(fn, updated=())
    def connected(*args: Any, **kwargs: Any) -> Any:
        traced = trace(fn, args, kwargs)
        return traced.rebuild(MatrixEvaluator(builder)(traced.jaxpr, traced.arguments))

    return connected


@dataclass(frozen=True)
class MatrixEvaluator:
    """Evaluates a jaxpr with every convolution replaced by a product with the builder's matrix."""

    builder: Callable[[ConvSpec, Any], Any]

    def __call__(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        return evaluate(jaxpr, arguments, self.equation)

    def equation(self, eqn: JaxprEqn, values: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        if not performs_conv(eqn):
            return eval_eqn(eqn, values)
        return _RULES.get(eqn.primitive.name, _compiled)(self, eqn, values)

    def connected(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fully_connected(fn, builder=self.builder)


# -- products ------------------------------------------------------------------------------


def _convolution(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    spec, precision = spec_of(eqn), eqn.params["precision"]
    result = result_avals(eqn)[0]

    def compute(x: Any, kernel: Any) -> Any:
        matrix = evaluator.builder(spec, kernel.astype(result.dtype))
        stack = examples(spec, x.astype(result.dtype))  # [examples, *in_shape]
        columns = stack.reshape(stack.shape[0], spec.in_size).T
        # [out_size, in_size] [in_size, examples] -> [out_size, examples]
        y = _matmul(matrix, columns, precision)
        return batched_output(spec, y.T.reshape(stack.shape[0], *spec.out_shape))

    return [as_on_one_device(compute, result)(*values)]


def _product(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A product of this library. A batch axis is mapped over, and summed where the result lacks it."""
    spec, out, precision = eqn.params["spec"], eqn.params["out"], eqn.params["precision"]

    def compute(a: Any, b: Any) -> Any:
        if out == "k":  # X^T y, where X is the matrix of the linear map from kernel to y: M x = X k
            return _matmul(kernel_matrix(spec, a).T, b.ravel(), precision).reshape(spec.rhs_shape)
        matrix = evaluator.builder(spec, a)
        if out == "x":  # M^T y
            return _matmul(matrix.T, b.ravel(), precision).reshape(spec.in_shape)
        return _matmul(matrix, b.ravel(), precision).reshape(spec.out_shape)

    for label in reversed(eqn.params["batches"]):
        axes = [0 if role in label else None for role in OPERANDS[out]]
        compute = vmap_or_sum(compute, axes, out in label)
    return [as_on_one_device(compute, result_avals(eqn)[0])(*values)]


def _matmul(matrix: Any, columns: Any, precision: Any) -> Any:
    if isinstance(matrix, jax.Array):
        return jnp.matmul(matrix, columns, precision=precision)
    return matrix @ columns


# -- calls that hold convolutions ----------------------------------------------------------


def _inline(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A call that does nothing but evaluate its jaxpr, such as jit: evaluated in place."""
    return evaluator(inner_jaxprs(eqn)[0], values)


def _checkpoint(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    keep = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *a: evaluator(inner_jaxprs(eqn)[0], a), **keep)(*values)


def _custom_jvp(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    rewritten, original, operands = _with_rule(evaluator, eqn, values)
    call = jax.custom_jvp(rewritten)
    call.defjvp(evaluator.connected(lambda primals, tangents: jax.jvp(original, primals, tangents)))
    return call(*operands)


def _custom_vjp(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    rewritten, original, operands = _with_rule(evaluator, eqn, values)
    call = jax.custom_vjp(rewritten)
    # The pullback is a pytree: its arrays are the residuals.
    forward = evaluator.connected(lambda *a: jax.vjp(original, *a))
    backward = evaluator.connected(lambda pullback, cotangents: pullback(cotangents))
    call.defvjp(forward, backward)
    return call(*operands)


def _custom_vmap(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    rewritten, original, operands = _with_rule(evaluator, eqn, values)
    call = jax.custom_batching.custom_vmap(rewritten)

    def rule(size: int, batched: Sequence[bool], *operands: Any) -> tuple[list[Any], list[bool]]:
        axes = [0 if b else None for b in batched]
        results = evaluator.connected(jax.vmap(original, axes, axis_size=size))(*operands)
        return results, [True] * len(results)

    call.def_vmap(rule)
    return call(*operands)


class _WithRule(NamedTuple):
    """A call with a custom rule."""

    rewritten: Callable[..., Any]  # the jaxpr of the call, with the convolutions replaced
    original: Callable[..., Any]  # the call itself, which obeys its rule
    operands: Sequence[Any]  # without the constants, which the rule does not take


def _with_rule(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> _WithRule:
    count = eqn.params.get("num_consts", 0)  # the first operands are constants of the call
    constants = values[:count]
    return _WithRule(
        lambda *a: evaluator(inner_jaxprs(eqn)[0], [*constants, *a]),
        lambda *a: eval_eqn(eqn, [*constants, *a]),
        values[count:],
    )


def _shard_map(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    mapped = jax.shard_map(
        lambda *a: tuple(evaluator(inner_jaxprs(eqn)[0], a)),
        mesh=eqn.params["mesh"],
        in_specs=tuple(eqn.params["in_specs"]),
        out_specs=tuple(eqn.params["out_specs"]),
        axis_names=set(eqn.params["newly_manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )
    return list(mapped(*values))


# -- loops and branches ------------------------------------------------------------------------


def _compiled(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A loop, a branch, or another equation that holds jaxprs: compiled once.

    Outside of jit, JAX caches a compiled loop by the identity of its jaxpr. A rewritten jaxpr is new at every
    call, so JAX would compile it at every call. ``compiled`` compares the original jaxprs instead.
    """
    if not _holds_no_arrays(evaluator.builder):
        return _LOOPS.get(eqn.primitive.name, _around)(evaluator, eqn, values)
    return compiled(_Loop(evaluator), alone(eqn), *values)


@dataclass(frozen=True)
class _Loop:
    """Evaluates a jaxpr of one equation, a loop or a branch. Loops with equal evaluators are equal."""

    evaluator: MatrixEvaluator

    def __call__(self, jaxpr: Any, *values: Any) -> list[Any]:
        (eqn,) = open_jaxpr(jaxpr)[0].eqns
        return _LOOPS.get(eqn.primitive.name, _around)(self.evaluator, eqn, values)


def _scan(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    (body,) = inner_jaxprs(eqn)
    fixed, carried = scan_counts(eqn, body)

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = evaluator(body, [*values[:fixed], *carry, *xs])
        return results[:carried], results[carried:]

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(
        step, list(values[fixed : fixed + carried]), list(values[fixed + carried :]), **options
    )
    return [*carry, *ys]


def _while(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A vmap may leave one condition per example. The loop then runs while any of them holds, and changes
    only the examples whose condition holds."""
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    split = eqn.params["cond_nconsts"]
    start = split + eqn.params["body_nconsts"]

    def going(carry: list[Any]) -> Any:
        return evaluator(cond, [*values[:split], *carry])[0]

    def step(carry: list[Any]) -> list[Any]:
        new, holds = evaluator(body, [*values[split:start], *carry]), going(carry)
        if not holds.ndim:
            return new
        masks = [jnp.expand_dims(holds, range(holds.ndim, v.ndim)) for v in new]
        return [jnp.where(mask, v, old) for mask, v, old in zip(masks, new, carry, strict=True)]

    return lax.while_loop(lambda carry: jnp.any(going(carry)), step, list(values[start:]))


def _cond(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    if eqn.params.get("branches_platforms") is not None:  # each platform compiles its own branch alone
        return _around(evaluator, eqn, values)
    branches = [lambda *a, branch=branch: evaluator(branch, a) for branch in inner_jaxprs(eqn)]
    return lax.switch(values[0], branches, *values[1:])


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


def _around(evaluator: MatrixEvaluator, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The same equation around rewritten jaxprs."""
    return eval_eqn(eqn, values, {key: _rewritten(evaluator, value) for key, value in eqn.params.items()})


def _rewritten(evaluator: MatrixEvaluator, value: Any) -> Any:
    """A parameter of an equation, with the convolutions replaced if it is a jaxpr or a tuple of them."""
    if isinstance(value, tuple | list) and any(isinstance(v, ClosedJaxpr | Jaxpr) for v in value):
        parts = [_rewritten(evaluator, v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not isinstance(value, ClosedJaxpr | Jaxpr):
        return value
    operands = [v.aval for v in open_jaxpr(value)[0].invars]
    return jax.make_jaxpr(lambda *a: evaluator(value, a))(*operands)


def _holds_no_arrays(builder: Any) -> bool:
    """Whether it is a function without defaults that closes over nothing but such functions.

    A program that is cached for it keeps no tracer alive.
    """
    if not inspect.isfunction(builder) or builder.__defaults__:
        return False
    return all(_holds_no_arrays(cell.cell_contents) for cell in builder.__closure__ or ())


# -- the table: primitive -> rule ----------------------------------------------------------------

# Rules for equations that are a convolution or hold one. The entries below override those of CALLS. Loops and
# branches are in _LOOPS. Any other equation goes to _around.
_RULES: dict[str, Callable[[MatrixEvaluator, JaxprEqn, Sequence[Any]], list[Any]]] = {
    **dict.fromkeys(CALLS, _inline),
    "conv_general_dilated": _convolution,
    "conv_product": _product,
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "custom_vmap_call": _custom_vmap,
    "shard_map": _shard_map,
}


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

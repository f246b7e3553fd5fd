"""A function with its convolutions replaced: by products with matrices, or by this library's products.

The jaxpr of a plain call (jit) is evaluated in place. Any other equation that holds jaxprs (a loop, a branch,
a call with a custom rule) becomes the same equation around rewritten jaxprs. A custom derivative or batching
rule is kept: the *original* call, which obeys its rule, is differentiated or batched, and then rewritten.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.functions.jaxprs import (
    CALLS,
    JaxprEqn,
    alone,
    compiled,
    eval_eqn,
    evaluate,
    holds,
    inner_jaxprs,
    inside,
    open_jaxpr,
    open_scan,
    open_while,
    result_avals,
    trace,
    with_jaxprs,
)
from jaxconv_fc.functions.names import nested
from jaxconv_fc.products.product import product_p


class Replacement(NamedTuple):
    """The substitute for some equations: ``rule(scope, eqn, values, *given)`` gives the results of one.

    Replacements with equal rules are equal, and so are the programs that are compiled for them.
    """

    names: frozenset[str]  # of the primitives whose equations are replaced
    rule: Callable[..., Sequence[Any]]
    given: tuple[Any, ...] = ()  # hashable

    def of(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` with every equation of these primitives replaced."""

        @functools.wraps(fn, updated=())
        def replaced(*args: Any, **kwargs: Any) -> Any:
            traced = trace(fn, args, kwargs)
            return traced.rebuild(Rewriter(self)(traced.jaxpr, traced.arguments))

        return replaced


@dataclass(frozen=True)
class Rewriter:
    """Evaluates a jaxpr with equations replaced."""

    replacement: Replacement
    scope: str = ""  # the name stacks of the calls around the jaxpr, joined

    def __call__(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        return evaluate(jaxpr, arguments, self.equation)

    def equation(self, eqn: JaxprEqn, values: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        names, rule, given = self.replacement
        if eqn.primitive.name in names:
            return list(map(_weak_as, result_avals(eqn), rule(self.scope, eqn, values, *given)))
        if not holds(eqn, names):
            return eval_eqn(eqn, values)
        rewriter = replace(self, scope=nested(self.scope, eqn))
        with inside(eqn):
            return _RULES.get(eqn.primitive.name, _compiled)(rewriter, eqn, values)


def _weak_as(aval: Any, value: Any) -> Any:
    """The value, weakly typed if ``aval`` is: a convolution is where its operands are, a product never is."""
    if not aval.weak_type or jax.typeof(value).weak_type:
        return value
    return lax.convert_element_type_p.bind(value, new_dtype=value.dtype, weak_type=True, sharding=None)


# -- calls that hold convolutions ----------------------------------------------------------


def _inline(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A call that does nothing but evaluate its jaxpr, such as jit: evaluated in place."""
    return rewriter(inner_jaxprs(eqn)[0], values)


def _checkpoint(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A product is saved where the policy would save the convolution that it stands for."""
    given, keep = eqn.params["policy"], {"prevent_cse": eqn.params["prevent_cse"]}

    def policy(primitive: Any, *avals: Any, **params: Any) -> Any:
        return given(lax.conv_general_dilated_p if primitive is product_p else primitive, *avals, **params)

    rewritten = jax.checkpoint(lambda *a: rewriter(inner_jaxprs(eqn)[0], a), policy=given and policy, **keep)
    return rewritten(*values)


def _custom_jvp(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    rewritten, original, operands = _with_rule(rewriter, eqn, values)
    call = jax.custom_jvp(rewritten)
    call.defjvp(rewriter.replacement.of(lambda primals, tangents: jax.jvp(original, primals, tangents)))
    return call(*operands)


def _custom_vjp(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    rewritten, original, operands = _with_rule(rewriter, eqn, values)
    call = jax.custom_vjp(rewritten)
    # The pullback is a pytree: its arrays are the residuals.
    forward = rewriter.replacement.of(lambda *a: jax.vjp(original, *a))
    backward = rewriter.replacement.of(lambda pullback, cotangents: pullback(cotangents))
    call.defvjp(forward, backward)
    return call(*operands)


def _custom_vmap(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    rewritten, original, operands = _with_rule(rewriter, eqn, values)
    call = jax.custom_batching.custom_vmap(rewritten)

    def rule(size: int, batched: Sequence[bool], *operands: Any) -> tuple[list[Any], list[bool]]:
        axes = [0 if b else None for b in batched]
        results = rewriter.replacement.of(jax.vmap(original, axes, axis_size=size))(*operands)
        return results, [True] * len(results)

    call.def_vmap(rule)
    return call(*operands)


class _WithRule(NamedTuple):
    """A call with a custom rule."""

    rewritten: Callable[..., Any]  # the jaxpr of the call, rewritten
    original: Callable[..., Any]  # the call itself, which obeys its rule
    operands: Sequence[Any]  # without the constants, which the rule does not take


def _with_rule(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> _WithRule:
    count = eqn.params.get("num_consts", 0)  # the first operands are constants of the call
    constants = values[:count]
    return _WithRule(
        lambda *a: rewriter(inner_jaxprs(eqn)[0], [*constants, *a]),
        lambda *a: eval_eqn(eqn, [*constants, *a]),
        values[count:],
    )


def _shard_map(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    mapped = jax.shard_map(
        lambda *a: tuple(rewriter(inner_jaxprs(eqn)[0], a)),
        mesh=eqn.params["mesh"],
        in_specs=tuple(eqn.params["in_specs"]),
        out_specs=tuple(eqn.params["out_specs"]),
        axis_names=set(eqn.params["newly_manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )
    return list(mapped(*values))


# -- loops and branches ------------------------------------------------------------------------


def _compiled(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A loop, a branch, or another equation that holds jaxprs: compiled once.

    Outside of jit, JAX caches a compiled loop by the identity of its jaxpr. A rewritten jaxpr is new at every
    call, so JAX would compile it at every call. ``compiled`` compares the original jaxprs instead.
    """
    if not all(map(_holds_no_arrays, rewriter.replacement.given)):
        return _LOOPS.get(eqn.primitive.name, _around)(rewriter, eqn, values)
    return compiled(_Loop(rewriter), alone(eqn), *values)


@dataclass(frozen=True)
class _Loop:
    """Evaluates a jaxpr of one equation, a loop or a branch. Loops with equal rewriters are equal."""

    rewriter: Rewriter

    def __call__(self, jaxpr: Any, *values: Any) -> list[Any]:
        (eqn,) = open_jaxpr(jaxpr)[0].eqns
        return _LOOPS.get(eqn.primitive.name, _around)(self.rewriter, eqn, values)

    def opens(self, eqn: JaxprEqn) -> bool:
        """Whether the rewriter evaluates the jaxprs of an equation, and does not hand them to JAX."""
        rule = _RULES.get(eqn.primitive.name) or _LOOPS.get(eqn.primitive.name)
        opening = rule in (_inline, _checkpoint, *_LOOPS.values()) and not _is_by_platform(eqn)
        return opening and holds(eqn, self.rewriter.replacement.names)


def _scan(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    scan = open_scan(eqn, values)

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = rewriter(scan.body, [*scan.constants, *carry, *xs])
        return results[: len(carry)], results[len(carry) :]

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, list(scan.carry), list(scan.xs), **options)
    return [*carry, *ys]


def _while(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A vmap may leave one condition per example. The loop then runs while any of them holds, and changes
    only the examples whose condition holds."""
    loop = open_while(eqn, values)

    def going(carry: list[Any]) -> Any:
        return rewriter(loop.cond, [*loop.cond_constants, *carry])[0]

    def step(carry: list[Any]) -> list[Any]:
        new, on = rewriter(loop.body, [*loop.body_constants, *carry]), going(carry)
        if not on.ndim:
            return new
        masks = [jnp.expand_dims(on, range(on.ndim, v.ndim)) for v in new]
        return [jnp.where(mask, v, old) for mask, v, old in zip(masks, new, carry, strict=True)]

    return lax.while_loop(lambda carry: jnp.any(going(carry)), step, list(loop.carry))


def _cond(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    if _is_by_platform(eqn):
        return _around(rewriter, eqn, values)
    branches = [lambda *a, branch=branch: rewriter(branch, a) for branch in inner_jaxprs(eqn)]
    return lax.switch(values[0], branches, *values[1:])


def _is_by_platform(eqn: JaxprEqn) -> bool:
    """Whether each platform compiles a branch of its own alone."""
    return eqn.params.get("branches_platforms") is not None


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


def _around(rewriter: Rewriter, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The same equation around rewritten jaxprs."""

    def rewritten(jaxpr: Any) -> Any:
        operands = [v.aval for v in open_jaxpr(jaxpr)[0].invars]
        return jax.make_jaxpr(lambda *a: rewriter(jaxpr, a))(*operands)

    return eval_eqn(eqn, values, with_jaxprs(eqn, rewritten))


def _holds_no_arrays(builder: Any) -> bool:
    """Whether it is a function without defaults that closes over nothing but such functions.

    A program that is cached for it keeps no tracer alive.
    """
    if not inspect.isfunction(builder) or builder.__defaults__:
        return False
    return all(_holds_no_arrays(cell.cell_contents) for cell in builder.__closure__ or ())


# -- the table: primitive -> rule ----------------------------------------------------------------

# Rules for equations that hold one to be replaced. The entries below override those of CALLS. Loops and
# branches are in _LOOPS. Any other equation goes to _around.
_RULES: dict[str, Callable[[Rewriter, JaxprEqn, Sequence[Any]], list[Any]]] = {
    **dict.fromkeys(CALLS, _inline),
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "custom_vmap_call": _custom_vmap,
    "shard_map": _shard_map,
}

"""The value of a function at a point, and its tangent there as a linear function of a change of x.

:class:`Linearizer` evaluates a jaxpr. A value that depends on x is a pair ``(tangent, value)``, any other is
an array. What a primitive makes of them is its rule in the tables of ``functions/rules.py``. Loops are
unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.functions.jaxprs import JaxprEqn, eval_eqn, evaluate, open_jaxpr, operand_avals, result_avals
from jaxconv_fc.functions.names import place_of
from jaxconv_fc.functions.ranges import (
    UNKNOWN,
    Range,
    hull,
    is_integer,
    range_of_constant,
    range_of_dtype,
    range_of_result,
    widens,
    wraps,
)
from jaxconv_fc.sharding import RELABELS, broadcast, is_traced, zeros

# -- values --------------------------------------------------------------------------------------


class Value(NamedTuple):
    """A value that depends on x: ``value + tangent(dx)`` at ``x = point + dx``."""

    tangent: Any  # linear in dx; traced
    value: Any  # at the point. None is a symbolic zero, so `0 * inf` never arises
    range: Range = UNKNOWN  # of an integer, for every x: see functions/ranges.py
    mark: Any = None  # what a rule notes for the next one: see functions/layers.py


class NotAffine(NamedTuple):
    """A value that no rule linearizes. This does no harm unless the result depends on it."""

    reason: str
    condition: Any = None  # where it says whether a number is above 0: see functions/layers.py


def tangent_of(value: Any, aval: Any) -> Any:
    """The tangent of ``value``, whose type is ``aval``; zeros if the value does not depend on x."""
    return value.tangent if isinstance(value, Value) else zeros(aval)


def at_point(value: Any, aval: Any = None) -> Any:
    """``value`` at the point; a symbolic zero becomes zeros of type ``aval``."""
    if not isinstance(value, Value):
        return value
    return zeros(aval) if value.value is None else value.value


def operands_at_point(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    return [at_point(v, aval) for v, aval in zip(values, operand_avals(eqn), strict=True)]


def is_zero(value: Any) -> bool:
    """Whether a value is known to be 0 at the point. Arrays are not searched: only a scalar is compared."""
    if isinstance(value, Value):
        return value.value is None
    return is_concrete(value) and np.ndim(value) == 0 and not value


def is_concrete(value: Any) -> bool:
    """Whether a value can be read now: it neither depends on x nor is traced."""
    return not isinstance(value, Value | NotAffine) and not is_traced(value)


def not_affine(values: Iterable[Any]) -> NotAffine | None:
    """The first value that no rule linearizes, if there is one, with its reason alone. A condition that it
    says is not that of a result computed from it."""
    return next((NotAffine(v.reason) for v in values if isinstance(v, NotAffine)), None)


def difference(eqn: JaxprEqn, values: Sequence[Any]) -> Value:
    """``a - b`` for an equation that compares a and b, of which one at least depends on x."""
    (a, b), out = values, result_avals(eqn)[0]
    first, second = (broadcast(at_point(v), out) for v in (a, b))
    if isinstance(a, Value) != isinstance(b, Value):  # only da, or only -db
        tangent = a.tangent if isinstance(a, Value) else -b.tangent
        return Value(broadcast(tangent, out), first - second)
    return Value(broadcast(a.tangent, out) - broadcast(b.tangent, out), first - second)


def entry(value: Any, i: int) -> Any:
    """Slice ``i`` of an operand that a loop scans over."""
    if isinstance(value, Value):
        return Value(value.tangent[i], None if value.value is None else value.value[i], value.range)
    return NotAffine(value.reason) if isinstance(value, NotAffine) else value[i]


def stacked(values: Sequence[Any], aval: Any) -> Any:
    """Slices that a loop has made, each of type ``aval``, stacked along a new first axis."""
    broken = not_affine(values)
    if broken is not None:
        return broken
    primal = jnp.stack([jnp.asarray(at_point(v, aval), aval.dtype) for v in values])
    if not any(isinstance(v, Value) for v in values):
        return primal
    tangent = jnp.stack([tangent_of(v, aval) for v in values])
    bounds = hull([range_of(v, aval.dtype) for v in values])
    return Value(tangent, None if all(map(is_zero, values)) else primal, bounds)


def range_of(value: Any, dtype: Any) -> Range:
    return value.range if isinstance(value, Value) else range_of_constant(value, dtype)


def compute_now(compute: Callable[..., list[Any]], eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """``compute(eqn, values)``, as concrete arrays if no value is traced: a branch may have to read them."""
    if eqn.primitive.name in RELABELS:  # they name mesh axes, which have no meaning outside of the trace
        return compute(eqn, values)
    with jax.ensure_compile_time_eval():
        return compute(eqn, values)


# -- the evaluator -------------------------------------------------------------------------------


class Rules(NamedTuple):
    """The rules for functions of one kind, affine or piecewise linear, by the name of a primitive."""

    kind: str  # "affine" or "piecewise linear", for messages
    control: Mapping[str, Callable[..., Any]]  # rules that take any operands, NotAffine too
    rules: Mapping[str, Callable[..., Any]]  # rules that take arrays and at least one Value, no NotAffine
    refused: Mapping[str, str]  # primitive that may be of this kind -> why it has no rule
    advice: Mapping[str, str]  # primitive that is not of this kind -> what to do


class Linearizer:
    """Evaluates a jaxpr with values that depend on x, and values that do not."""

    def __init__(self, name: str, rules: Rules, *, real: bool):
        self.name = name  # of the public function, for messages
        self.rules = rules
        self.real = real  # whether x is real
        self.switches: list[Value] = []  # where one of these crosses 0, a piecewise linear fn may bend
        self.calls: list[JaxprEqn] = []  # the calls around the current equation, outermost first

    def run(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        return evaluate(jaxpr, arguments, self.equation)

    def inside(self, eqn: JaxprEqn, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr that an equation holds."""
        self.calls.append(eqn)
        results = self.run(jaxpr, values)
        self.calls.pop()
        return results

    def equation(self, eqn: JaxprEqn, values: Sequence[Any], used: Sequence[bool] = ()) -> Sequence[Any]:
        name = eqn.primitive.name
        if not any(isinstance(v, Value | NotAffine) for v in values):
            return compute_now(eval_eqn, eqn, values)
        if name in self.rules.control:
            return self.rules.control[name](self, eqn, values)
        broken = not_affine(values)
        if broken is not None:
            return [broken] * len(eqn.outvars)
        if name not in self.rules.rules:
            return self.broken(eqn)
        befores, afters = ([a.dtype for a in avals] for avals in (operand_avals(eqn), result_avals(eqn)))
        for value, before in zip(values, befores, strict=True):
            after = next((a for a in afters if widens(before, a)), None)
            if after is not None and isinstance(value, Value) and wraps(value.range, before):
                because = f" to {after} of {before} values that may have wrapped around"
                return self.broken(eqn, because, f" Convert x first: x.astype(jnp.{after}).")
        results = self.rules.rules[name](self, eqn, values)
        if not any(map(is_integer, afters)):
            return results
        bounds = range_of_result(eqn, list(map(range_of, values, befores)))
        return [r._replace(range=bounds) if isinstance(r, Value) else r for r in results]

    def broken(self, eqn: JaxprEqn, because: str = "", advice: str = "") -> list[Any]:
        """The results of an equation that no rule linearizes."""
        return [NotAffine(self.reason(eqn, because, advice))] * len(eqn.outvars)

    def reason(self, eqn: JaxprEqn, because: str = "", advice: str = "") -> str:
        name, kind = eqn.primitive.name, self.rules.kind
        place = next(filter(None, map(place_of, [eqn, *reversed(self.calls)])), "an unknown line")
        refused = self.rules.refused.get(name)
        if refused and not because:
            return (
                f"{self.name}: cannot tell whether fn is {kind} in x: "
                f"primitive {name!r} {refused}, at {place}."
            )
        advice = advice or self.rules.advice.get(name, "")
        return f"{self.name}: fn is not {kind} in x: primitive {name!r}{because} at {place}.{advice}"


def linearized(name: str, rules: Rules, jaxpr: Any, xs: Sequence[Any], points: Sequence[Any] | None) -> Any:
    """The jaxpr from changes of the arrays xs to ``(tangents, values)``: of results, then of switches.

    ``xs`` give shapes and dtypes only. Values are taken at ``points``, or at 0 where that is None.
    """
    avals = [variable.aval for variable in open_jaxpr(jaxpr)[0].outvars]
    real = not any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in xs)
    bounds = [range_of_dtype(x.dtype) if is_integer(x.dtype) else UNKNOWN for x in xs]

    def traced(*tangents: Any) -> tuple[list[Any], list[Any]]:
        linearizer = Linearizer(name, rules, real=real)
        inputs = map(Value, tangents, points or [None] * len(xs), bounds)
        results = linearizer.run(jaxpr, list(inputs))
        broken = not_affine(results)
        if broken is not None:
            raise ValueError(broken.reason)
        pairs = [*map(_pair, results, avals), *linearizer.switches]
        return [p.tangent for p in pairs], [p.value for p in pairs]

    return jax.make_jaxpr(traced)(*xs)


def _pair(result: Any, aval: Any) -> Value:
    # An offset of zeros is a known array, as any other offset is: so they share one compiled program.
    with jax.ensure_compile_time_eval() if aval.sharding.mesh.empty else nullcontext():
        value = at_point(result, aval)
    return Value(tangent_of(result, aval), value)

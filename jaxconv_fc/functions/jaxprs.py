"""Jaxprs: tracing a function to one, evaluating it by rules, comparing two of them.

The only file that knows JAX's classes of jaxprs. :func:`evaluate` is the one evaluator of this library.
:func:`find_convs`, :func:`fully_connected`, :func:`matrix_of` and :func:`local_affine` differ in the rule
that they give it for an equation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import ShapedArray, eval_jaxpr
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Primitive, Var

from jaxconv_fc.sharding import PlatformForms, is_traced

# A primitive is matched by its name, here and in every table of rules.
# Calls that do nothing but evaluate the one jaxpr they hold on their own operands.
CALLS = frozenset({
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint",
    "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "program_order",
})  # fmt: skip

# Equations that write to a mutable array (``jax.new_ref``), and so change what later equations read of it.
WRITES = frozenset({"swap", "addupdate", "masked_swap", "accum_grad_in_ref"})


@dataclass(frozen=True)
class Traced:
    """A call of a function, traced."""

    jaxpr: Any
    arguments: list[Any]  # the arrays that it was given
    others: list[Any]  # the results that are not arrays
    rebuild: Callable[[Sequence[Any]], Any]  # what it returns, from the results that are arrays


def trace(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
    """The jaxpr of ``fn(*args, **kwargs)``: arrays are traced, everything else stays what it is."""
    leaves, tree = jax.tree.flatten((tuple(args), kwargs))
    where = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    result: Any = None

    def on_arrays(*arrays: Any) -> list[Any]:
        nonlocal result
        filled = list(leaves)
        for i, array in zip(where, arrays, strict=True):
            filled[i] = array
        inner_args, inner_kwargs = tree.unflatten(filled)
        results, out_tree = jax.tree.flatten(fn(*inner_args, **inner_kwargs))
        traced = [is_array(leaf) for leaf in results]
        result = out_tree, traced, [None if t else leaf for t, leaf in zip(traced, results, strict=True)]
        return [leaf for t, leaf in zip(traced, results, strict=True) if t]

    arguments = [leaves[i] for i in where]
    jaxpr = jax.make_jaxpr(on_arrays)(*arguments)

    def rebuild(arrays: Sequence[Any]) -> Any:
        out_tree, traced, others = result
        remaining = iter(arrays)
        return out_tree.unflatten([next(remaining) if t else v for t, v in zip(traced, others, strict=True)])

    others = [value for is_traced, value in zip(*result[1:], strict=True) if not is_traced]
    return Traced(jaxpr, arguments, others, rebuild)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a pytree is traced, and not static."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


# -- the evaluator -------------------------------------------------------------------------------

# (equation, its operands, which of its results are used) -> its results. A result that is not used may
# be None.
Rule = Callable[[JaxprEqn, Sequence[Any], Sequence[bool]], Sequence[Any]]
Finish = Callable[[Any], Any]


def evaluate(
    jaxpr: Any,
    arguments: Sequence[Any],
    rule: Rule,
    *,
    finish: Sequence[Finish | None] | None = None,
    keep: Callable[[JaxprEqn], bool] = lambda eqn: bool(eqn.effects),
) -> list[Any]:
    """The results of a jaxpr, where ``rule`` says what an equation makes of its operands.

    Only those equations are evaluated that a wanted result depends on, or that ``keep`` names: those with
    effects, unless it is given. A value is dropped after its last use, so that no more values are held
    than the equations to come read.

    ``finish`` has one entry per result. A function is applied to the result as soon as it is made, and what
    the function returns is kept. None says that the result is not wanted: it is None in the list. Without
    ``finish`` all results are kept as they are.
    """
    inner, constants = open_jaxpr(jaxpr)
    finish = [unchanged] * len(inner.outvars) if finish is None else finish
    places: dict[Any, list[int]] = {}  # a variable -> the numbers of the results that it is
    results: list[Any] = [None] * len(inner.outvars)
    for i, (variable, done) in enumerate(zip(inner.outvars, finish, strict=True)):
        if done is not None and isinstance(variable, Literal):
            results[i] = done(variable.val)
        elif done is not None:
            places.setdefault(variable, []).append(i)
    steps, read = _plan(inner.eqns, places, keep)
    values: dict[Any, Any] = {}

    def write(variables: Sequence[Any], new: Sequence[Any]) -> None:
        for variable, value in zip(variables, new, strict=True):
            if variable in read:
                values[variable] = value
            for i in places.get(variable, ()):
                results[i] = finish[i](value)  # type: ignore[misc]

    write(inner.constvars, constants)
    write(inner.invars, arguments)
    for eqn, used, last in steps:
        operands = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        for variable in last:
            del values[variable]
        write(eqn.outvars, rule(eqn, operands, used))
    return results


class _Step(NamedTuple):
    """One equation that is evaluated."""

    eqn: JaxprEqn
    used: list[bool]  # of each result: whether a wanted result or a kept equation depends on it
    last: set[Any]  # the operands that no later equation reads


def _plan(
    equations: Sequence[JaxprEqn], wanted: Iterable[Any], keep: Callable[[JaxprEqn], bool]
) -> tuple[list[_Step], set[Any]]:
    """The equations to evaluate, in order, and all variables that they read."""
    needed, read = set(wanted), set()
    steps: list[_Step] = []
    for eqn in reversed(equations):
        used = [v in needed for v in eqn.outvars]
        if any(used) or keep(eqn):
            operands = {v for v in eqn.invars if isinstance(v, Var)}
            steps.append(_Step(eqn, used, operands - read))
            read |= operands
            needed |= operands
    return steps[::-1], read


def unchanged(value: Any) -> Any:
    """Finishes a result that is wanted as it is."""
    return value


def wanted(used: Sequence[bool]) -> list[Finish | None]:
    """How the results of an inner jaxpr are finished, of which these are used."""
    return [unchanged if u else None for u in used]


# -- equations -----------------------------------------------------------------------------------


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """``(jaxpr, constants)`` of a ClosedJaxpr, or of a Jaxpr (which has none, or is both in one)."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def eval_eqn(eqn: JaxprEqn, values: Sequence[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """The results of an equation for these operands, in the context (name, mesh, ...) it was traced in."""
    return list(eval_jaxpr(alone(eqn, params), (), *values))


def eval_as(eqn: JaxprEqn, primitive: Any, params: dict[str, Any], values: Sequence[Any]) -> list[Any]:
    """The results of another primitive for as many operands, in the context (name, mesh) of an equation."""
    return eval_eqn(eqn.replace(primitive=primitive), values, params)


@contextlib.contextmanager
def inside(eqn: JaxprEqn) -> Iterator[None]:
    """Code in this context is traced with the name stack and the mesh of an equation."""
    stack = str(eqn.source_info.name_stack)
    with eqn.ctx.manager, jax.named_scope(stack) if stack else contextlib.nullcontext():
        yield


def alone(eqn: JaxprEqn, params: dict[str, Any] | None = None) -> Jaxpr:
    """The jaxpr of one equation: its operands in, its results out."""
    operands: list[Any] = [Var(v.aval) for v in eqn.invars]
    results: list[Any] = [Var(v.aval) for v in eqn.outvars]
    eqn = eqn.replace(invars=operands, outvars=results, params=eqn.params if params is None else params)
    return Jaxpr([], operands, results, [eqn], eqn.effects, _debug_info(eqn.primitive.name))


def _debug_info(name: str) -> DebugInfo:
    return DebugInfo("jaxconv_fc", name, None, None)


def operand_avals(eqn: JaxprEqn) -> list[Any]:
    """The types of the operands: shape, dtype, and what they say of devices."""
    return [v.aval for v in eqn.invars]


def result_avals(eqn: JaxprEqn) -> list[Any]:
    """The types of the results."""
    return [v.aval for v in eqn.outvars]


def operand_numbers(data: slice | tuple[int, ...], count: int) -> tuple[int, ...]:
    """The numbers of some of ``count`` operands, given as numbers or as a slice."""
    return tuple(range(count)[data]) if isinstance(data, slice) else data


def inner_jaxprs(eqn: JaxprEqn) -> list[Any]:
    """The jaxprs that an equation holds, in the order of its parameters."""
    found = []
    for value in eqn.params.values():
        parts = value if isinstance(value, tuple | list) else (value,)
        found += [part for part in parts if isinstance(part, ClosedJaxpr | Jaxpr)]
    return found


def holds(eqn: JaxprEqn, names: Container[str]) -> bool:
    """Whether an equation of one of these primitives stands somewhere inside an equation."""
    return any(
        inner.primitive.name in names or holds(inner, names)
        for jaxpr in inner_jaxprs(eqn)
        for inner in open_jaxpr(jaxpr)[0].eqns
    )


def is_mutable(eqn: JaxprEqn) -> bool:
    """Whether an equation makes, reads or writes a mutable array, whose value depends on what ran before."""
    return not all(isinstance(v.aval, ShapedArray) for v in (*eqn.invars, *eqn.outvars))


class Scan(NamedTuple):
    """A loop of known length: ``body`` takes constants, carry, slices of xs, and returns carry, slices."""

    body: Any
    constants: Sequence[Any]
    carry: Sequence[Any]
    xs: Sequence[Any]


def open_scan(eqn: JaxprEqn, values: Sequence[Any]) -> Scan:
    (body,) = inner_jaxprs(eqn)
    fixed, carried = scan_counts(eqn, body)
    return Scan(body, values[:fixed], values[fixed : fixed + carried], values[fixed + carried :])


def scan_counts(eqn: JaxprEqn, body: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried from step to step.

    An array that is scanned over has one more axis outside of the body than inside. That tells it apart.
    """
    inner = open_jaxpr(body)[0]
    operands, results = (
        sum(_rank(v) == _rank(w) for v, w in zip(outside, inside, strict=True))
        for outside, inside in ((eqn.invars, inner.invars), (eqn.outvars, inner.outvars))
    )
    return operands - results, results


def _rank(variable: Any) -> int:
    return len(variable.aval.shape)


class While(NamedTuple):
    """A loop: ``cond`` and ``body`` take constants of their own, then the carry."""

    cond: Any
    cond_constants: Sequence[Any]
    body: Any
    body_constants: Sequence[Any]
    carry: Sequence[Any]


def open_while(eqn: JaxprEqn, values: Sequence[Any]) -> While:
    split = eqn.params["cond_nconsts"]
    start = split + eqn.params["body_nconsts"]
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    return While(cond, values[:split], body, values[split:start], values[start:])


def with_jaxprs(eqn: JaxprEqn, change: Callable[[Any], Any]) -> dict[str, Any]:
    """The parameters of an equation, with ``change(jaxpr)`` in place of every jaxpr that it holds."""

    def changed(value: Any) -> Any:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            return change(value)
        if not (isinstance(value, tuple | list) and any(isinstance(v, ClosedJaxpr | Jaxpr) for v in value)):
            return value
        parts = list(map(changed, value))
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)

    return {key: changed(value) for key, value in eqn.params.items()}


def opaque(name: str) -> Primitive:
    """A primitive that says what stands at a place of a jaxpr, and computes nothing: ``bind(*operands,
    shape=..., **params)`` has this shape, and the dtype of the first operand."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda v, *_, shape, **__: ShapedArray(shape, v.dtype))
    return primitive


# -- programs ----------------------------------------------------------------------------------

# Parameters that say how a call is differentiated, by the name of its primitive.
DERIVATIVES = {
    "custom_jvp_call": {"jvp_jaxpr_fun"},
    "custom_vjp_call": {"fwd_jaxpr_thunk", "bwd", "out_trees"},
}


PROGRAMS = 128  # how many compiled programs are kept, of 2 to 4 MB each: those that were used last


def compiled(of: Callable[..., Any], jaxpr: Any, *arrays: Any) -> Any:
    """``of(jaxpr, *arrays)`` as one compiled program, shared by jaxprs that differ in their constants alone.

    Numbers written into the jaxpr are constants too. So one function traced twice, with other weights and
    other numbers, compiles once. ``of.opens(eqn)``, where ``of`` has it, says whether ``of`` evaluates the
    jaxprs in an equation by itself: then the numbers in them are constants as well. JAX takes no operands
    there.

    A jaxpr that cannot be compared with others is evaluated equation by equation: one with a parameter that
    is not hashable, or a function.
    """
    constants: list[list[Any]] = []
    bare = _bare(jaxpr, _opens(of), constants)
    plain = not any(map(is_traced, jax.tree.leaves((constants, arrays))))
    try:
        hash(of)
        text = _comparable(bare, DERIVATIVES if plain else {})  # what is not traced is not differentiated
    except (_Incomparable, TypeError):
        return of(jaxpr, *arrays)
    return _compiled(of, _Program(bare, text))(constants, *arrays)


def computes_the_same(a: Any, b: Any) -> bool:
    """Whether two jaxprs have the same equations, on arrays of the same types. How they are differentiated
    does not count. False where that cannot be told."""
    try:
        texts = [(_comparable(open_jaxpr(j)[0], DERIVATIVES), len(open_jaxpr(j)[1])) for j in (a, b)]
    except (_Incomparable, TypeError):
        return False
    return texts[0] == texts[1] and not texts[0][1]


@lru_cache(PROGRAMS)
def _compiled(of: Callable[..., Any], program: _Program) -> Any:
    def run(constants: list[list[Any]], *arrays: Any) -> Any:
        return of(_closed(program.jaxpr, _opens(of), iter(constants)), *arrays)

    return jax.jit(run)


def _opens(of: Any) -> Callable[[JaxprEqn], bool]:
    return getattr(of, "opens", lambda eqn: False)


def _bare(jaxpr: Any, opens: Callable[[JaxprEqn], bool], constants: list[list[Any]]) -> Jaxpr:
    """The jaxpr with its constants and numbers as its first inputs; a list of them is added to ``constants``.

    So are those of the jaxprs in the equations that are opened, a list for each.
    """
    inner, values = open_jaxpr(jaxpr)
    variables, own = list(inner.constvars), list(values)
    constants.append(own)

    def variable(v: Any) -> Any:
        if not isinstance(v, Literal):
            return v
        variables.append(Var(v.aval))
        own.append(v.val)
        return variables[-1]

    equations = [eqn.replace(invars=list(map(variable, eqn.invars))) for eqn in inner.eqns]
    results = list(map(variable, inner.outvars))
    equations = _opened(equations, opens, lambda jaxpr: _bare(jaxpr, opens, constants))
    return Jaxpr([], [*variables, *inner.invars], results, equations, inner.effects, _debug_info("bare"))


def _closed(bare: Jaxpr, opens: Callable[[JaxprEqn], bool], constants: Iterator[list[Any]]) -> ClosedJaxpr:
    """The inverse of :func:`_bare`."""
    own = next(constants)
    variables, inputs = bare.invars[: len(own)], bare.invars[len(own) :]
    equations = _opened(bare.eqns, opens, lambda jaxpr: _closed(jaxpr, opens, constants))
    jaxpr = Jaxpr(variables, inputs, bare.outvars, equations, bare.effects, _debug_info("closed"))
    return ClosedJaxpr(jaxpr, own)


def _opened(
    equations: Sequence[JaxprEqn], opens: Callable[[JaxprEqn], bool], change: Callable[[Any], Any]
) -> list[JaxprEqn]:
    return [eqn.replace(params=with_jaxprs(eqn, change)) if opens(eqn) else eqn for eqn in equations]


@dataclass(frozen=True)
class _Program:
    """A jaxpr with variables for its constants, equal to every other that computes the same from them."""

    jaxpr: Jaxpr = field(compare=False)
    text: Any


class _Incomparable(Exception):
    """A parameter of an equation that says too little by its value."""


def _comparable(jaxpr: Jaxpr, without: Mapping[str, set[str]]) -> Any:
    """All that a jaxpr computes with, variables by number, as something hashable.

    ``without``: parameters that do not matter, by the name of the primitive.
    """
    numbers: dict[Any, int] = {}

    def named(v: Any) -> Any:
        if isinstance(v, Literal):
            return v.aval, np.asarray(v.val).tobytes()
        return numbers.setdefault(v, len(numbers)), v.aval

    inputs = [named(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
    equations = []
    for eqn in jaxpr.eqns:
        left_out = without.get(eqn.primitive.name, ())
        params = tuple((k, _value(v, without)) for k, v in sorted(eqn.params.items()) if k not in left_out)
        equations.append(
            (eqn.primitive, params, tuple(map(named, eqn.invars)), tuple(map(named, eqn.outvars)))
        )
    return len(jaxpr.constvars), tuple(inputs), tuple(equations), tuple(map(named, jaxpr.outvars))


def _value(value: Any, without: Mapping[str, set[str]]) -> Any:
    """A parameter of an equation."""
    if isinstance(value, ClosedJaxpr | Jaxpr):
        inner, constants = open_jaxpr(value)
        if constants:
            raise _Incomparable
        return _comparable(inner, without)
    if isinstance(value, tuple | list) and not isinstance(value, PlatformForms):
        return tuple(_value(v, without) for v in value)
    if callable(value) and not isinstance(value, type | jax.sharding.Mesh):  # a mesh is callable by accident
        raise _Incomparable
    try:
        hash(value)
    except TypeError as error:
        raise _Incomparable from error
    return type(value), value

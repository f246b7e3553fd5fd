"""Whether a loss treats the examples of a batch independently, read from its jaxprs.

The loss is traced for two sizes of the batch. What differs between the two traces is what counts examples: a
dimension of 2k entries in one and 3k in the other is one of examples. So no layout has to be known. Every
value then has a :class:`Fact`. A sum over examples may be scaled and added to, and nothing else; an operation
along the examples, or of one example with another, is refused by name.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax

from jaxconv_fc.functions.jaxprs import (
    CALLS,
    JaxprEqn,
    evaluate,
    inner_jaxprs,
    is_array,
    open_jaxpr,
    operand_avals,
    result_avals,
    scan_counts,
    trace,
)
from jaxconv_fc.functions.names import nested, place_of

SIZES = 2, 3


class Fact(enum.IntEnum):
    """What a value depends on."""

    FIXED = 0  # no example; equal for all examples
    NUMBER = 1  # the number of an example in the batch (an iota)
    PLACE = 2  # an index of which one part is a NUMBER
    DRAWN = 3  # no example, and yet another value for each: random numbers of a batch
    EACH = 4  # entries of a dimension of examples depend on one example each
    SUM = 5  # a sum over examples


# A value that is a sum over examples may go through these, together with values that are FIXED.
LINEAR = frozenset({
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "div",
    "dot_general", "dynamic_slice", "expand_dims", "mul", "neg", "optimization_barrier", "pad", "pvary",
    "reduce_sum", "reshape", "select_n", "sharding_constraint", "slice", "squeeze", "sub", "transpose",
})  # fmt: skip
SUMS = frozenset({"reduce_sum", "dot_general"})  # the ways to add examples up
# Parameters that name the dimensions along which a primitive works.
ALONG = "axis", "axes", "dimension", "dimensions"
ELSEWHERE = frozenset({"squeeze", "broadcast_in_dim", "expand_dims"})  # whose dimensions only move
LAST_TWO = frozenset({
    "cholesky", "eig", "eigh", "fft", "geqrf", "householder_product", "lu", "qr", "schur", "svd", "top_k",
    "triangular_solve", "tridiagonal_solve",
})  # fmt: skip
# They hold jaxprs of single entries, and are judged by their dimensions as other equations are.
JUDGED = frozenset({
    "reduce", "reduce_window", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul",
    "scatter_add", "scatter_max", "scatter_min", "scatter_mul", "sort",
})  # fmt: skip
RANDOM = ("random_", "threefry", "rng_")


def check_independent(function: str, loss: Callable[..., Any], params: Any, batch: Any) -> None:
    """ValueError if ``loss(params, batch)`` is not a sum, or an average, of terms of one example each."""
    first, second = (_traced(function, loss, params, batch, size) for size in SIZES)
    leaves = [leaf for leaf in jax.tree.leaves(params) if is_array(leaf)]
    facts = [Fact.FIXED] * len(leaves)
    facts += [Fact.EACH] * (len(open_jaxpr(first)[0].invars) - len(leaves))
    (result,) = _Check(function).visit(first, second, facts)
    if result not in (Fact.SUM, Fact.FIXED):
        raise ValueError(
            f"{function}: loss must be a sum over examples, and is computed from random numbers, or from "
            "numbers of examples, alone. Put random keys into batch, one for each example."
        )


def resized(batch: Any, size: int) -> Any:
    """The batch with so many examples, by its shapes alone."""
    shaped = lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
    return jax.tree.map(shaped, batch)


def _traced(function: str, loss: Callable[..., Any], params: Any, batch: Any, size: int) -> Any:
    try:
        return trace(loss, (params, resized(batch, size)), {}).jaxpr
    except Exception as error:
        raise ValueError(
            f"{function}: loss must take a batch of any size, and does not take one of {size}: "
            f"{type(error).__name__} (above). Put everything that belongs to an example into batch."
        ) from error


@dataclass(frozen=True)
class _Check:
    function: str
    scope: str = ""

    def refuse(self, eqn: JaxprEqn, why: str) -> NoReturn:
        place = place_of(eqn, self.scope)
        raise ValueError(
            f"{self.function}: the gradients of single examples are not defined, for loss mixes examples: "
            f"{eqn.primitive.name} in {place or 'the loss'} {why}. Use fixed statistics in place of those of "
            "the batch, and put random keys into batch, one for each example."
        )

    def visit(self, first: Any, second: Any, facts: Sequence[Fact]) -> list[Fact]:
        """The facts of the results of a jaxpr, which was traced with both sizes."""
        equations = open_jaxpr(first)[0].eqns, open_jaxpr(second)[0].eqns
        names = [[eqn.primitive.name for eqn in each] for each in equations]
        if names[0] != names[1]:
            raise ValueError(
                f"{self.function}: loss performs other operations for a batch of {SIZES[0]} than for one "
                f"of {SIZES[1]}, so its examples cannot be told apart. Let it not depend on that size."
            )
        twin = {id(eqn): other for eqn, other in zip(*equations, strict=True)}

        def rule(eqn: JaxprEqn, operands: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
            known = [v if isinstance(v, Fact) else Fact.FIXED for v in operands]
            return self.equation(eqn, twin[id(eqn)], known)

        found = evaluate(first, list(facts), rule)
        return [v if isinstance(v, Fact) else Fact.FIXED for v in found]

    def equation(self, eqn: JaxprEqn, other: JaxprEqn, facts: Sequence[Fact]) -> list[Fact]:
        name, inner = eqn.primitive.name, list(zip(inner_jaxprs(eqn), inner_jaxprs(other), strict=True))
        inside = replace(self, scope=nested(self.scope, eqn))
        if name in CALLS and inner:
            return inside.visit(*inner[0], facts)
        if name == "scan":
            return inside.loop(eqn, other, *inner[0], facts)
        if name == "cond":
            if facts[0] != Fact.FIXED:
                self.refuse(eqn, "chooses a branch by the examples of the batch")
            found = [inside.visit(*branches, facts[1:]) for branches in inner]
            return [_joined(each) for each in zip(*found, strict=True)]
        if inner and name not in JUDGED and max(facts, default=Fact.FIXED) > Fact.FIXED:
            self.refuse(eqn, "is an operation whose examples cannot be followed")
        outs = [_example_dims(a, b) for a, b in zip(result_avals(eqn), result_avals(other), strict=True)]
        return [self.result(eqn, other, facts, dims) for dims in outs]

    def loop(
        self, eqn: JaxprEqn, other: JaxprEqn, first: Any, second: Any, facts: Sequence[Fact]
    ) -> list[Fact]:
        """A scan: the facts of its carry are found by going round until they stay."""
        if eqn.params["length"] != other.params["length"]:
            if max(facts) == Fact.FIXED:
                return [Fact.DRAWN] * len(eqn.outvars)
            self.refuse(eqn, "is a loop over the examples")
        fixed, carried = scan_counts(eqn, first)
        carry = list(facts[fixed : fixed + carried])
        while True:
            found = self.visit(first, second, [*facts[:fixed], *carry, *facts[fixed + carried :]])
            joined = [_joined(pair) for pair in zip(carry, found[:carried], strict=True)]
            if joined == carry:
                return [*carry, *found[carried:]]
            carry = joined

    def result(self, eqn: JaxprEqn, other: JaxprEqn, facts: Sequence[Fact], out: tuple[int, ...]) -> Fact:
        """The fact of one result, whose dimensions ``out`` are of examples."""
        name = eqn.primitive.name
        dims = [_example_dims(a, b) for a, b in zip(operand_avals(eqn), operand_avals(other), strict=True)]
        most = max(facts, default=Fact.FIXED)
        if Fact.SUM in facts:
            linear = name in LINEAR and not out and all(f in (Fact.SUM, Fact.FIXED) for f in facts)
            products = name in ("mul", "dot_general") and facts.count(Fact.SUM) > 1
            if (
                not linear
                or products
                or (name == "div" and facts[1] == Fact.SUM)
                or (name == "select_n" and facts[0] == Fact.SUM)
            ):
                self.refuse(eqn, "computes with a sum over examples")
            return Fact.SUM
        if Fact.EACH not in facts:
            return self.without_examples(eqn, other, facts, dims, out)
        if Fact.DRAWN in facts:
            self.refuse(eqn, "takes random numbers that are drawn for a whole batch")
        if Fact.NUMBER in facts and name not in ("concatenate", "gather") and not name.startswith("scatter"):
            self.refuse(eqn, "computes with the number of an example in the batch")
        if Fact.NUMBER in facts and name == "concatenate":
            return Fact.PLACE
        if name in SUMS and not out:
            return Fact.SUM
        if not out or _works_along(eqn, other, facts, dims):
            self.refuse(eqn, "works along the examples")
        if len(out) > 1:
            self.refuse(eqn, "pairs every example with every other")
        return most if most == Fact.PLACE else Fact.EACH

    def without_examples(
        self, eqn: JaxprEqn, other: JaxprEqn, facts: Sequence[Fact], dims: Any, out: tuple[int, ...]
    ) -> Fact:
        name, most = eqn.primitive.name, max(facts, default=Fact.FIXED)
        if name == "iota":
            return Fact.NUMBER if eqn.params["dimension"] in out else Fact.FIXED
        if most == Fact.FIXED and out and name != "broadcast_in_dim":
            made = not any(dims)  # from nothing that counts examples
            if made or name.startswith(RANDOM) or _works_along(eqn, other, facts, dims):
                return Fact.DRAWN
        return most


def _works_along(eqn: JaxprEqn, other: JaxprEqn, facts: Sequence[Fact], dims: Any) -> bool:
    """Whether an equation mixes, or moves, the entries along a dimension of examples of an operand.

    Where several dimensions are merged, that of the examples is the slowest.
    """
    name, params = eqn.primitive.name, eqn.params
    shapes, found = [v.shape for v in operand_avals(eqn)], {d for each in dims for d in each}
    results = [(a.shape, b.shape) for a, b in zip(result_avals(eqn), result_avals(other), strict=True)]
    if any(a * SIZES[1] != b * SIZES[0] for pair in results for a, b in zip(*pair, strict=True) if a != b):
        return True  # such as all examples but one
    if name == "conv_general_dilated":
        _, feature, *spatial = params["dimension_numbers"].lhs_spec
        counts = "feature_group_count", "batch_group_count"
        by_group = [params[count] * SIZES[1] == other.params[count] * SIZES[0] for count in counts]
        kernel = params["dimension_numbers"].rhs_spec[0]
        return (
            any(d in spatial or (d == feature and not by_group[0]) for d in dims[0])
            or any(d != kernel for d in dims[1])
            or (params["batch_group_count"] > 1 and not by_group[1])
        )
    if name == "gather":
        numbers = params["dimension_numbers"]
        indexed = set(dims[0]) & set(numbers.start_index_map)
        whole = all(params["slice_sizes"][d] == shapes[0][d] for d in indexed)
        return bool(indexed) and not whole and facts[1] not in (Fact.NUMBER, Fact.PLACE)
    if name.startswith("scatter"):
        scattered = set(params["dimension_numbers"].scatter_dims_to_operand_dims) & set(dims[0])
        return bool(scattered) and facts[1] not in (Fact.NUMBER, Fact.PLACE)
    if name == "reshape":
        before, after = (
            math.prod(s[: d[0]]) for s, d in ((shapes[0], dims[0]), (results[0][0], _grown(*results[0])))
        )
        return before != after
    if name == "pad":
        return any(params["padding_config"][d] != (0, 0, 0) for d in dims[0])
    if name in ("slice", "dynamic_slice", "dynamic_update_slice"):
        part = shapes[1] if name == "dynamic_update_slice" else results[0][0]
        return any(part[d] != shapes[0][d] for d in dims[0])
    if "window_dimensions" in params:
        return any(params["window_dimensions"][d] != 1 for d in found)
    if name in LAST_TWO:
        return any(d >= len(shape) - 2 for each, shape in zip(dims, shapes, strict=True) for d in each)
    if name in ELSEWHERE or name in SUMS:
        return False
    return any(d in _along(eqn) for d in found)


def _joined(facts: Sequence[Fact]) -> Fact:
    """What holds for a value that is one of several. Of different kinds, what is refused beside examples."""
    kinds = set(facts) - {Fact.FIXED}
    return kinds.pop() if len(kinds) == 1 else Fact.DRAWN if kinds else Fact.FIXED


def _along(eqn: JaxprEqn) -> set[int]:
    """The dimensions that the parameters of an equation name."""
    named: set[int] = set()
    for key in ALONG:
        value = eqn.params.get(key, ())
        named |= set(value) if isinstance(value, tuple | list) else {value}
    return named


def _example_dims(first: Any, second: Any) -> tuple[int, ...]:
    """The dimensions that grow with the batch."""
    return _grown(getattr(first, "shape", ()), getattr(second, "shape", ()))


def _grown(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    return tuple(d for d, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)

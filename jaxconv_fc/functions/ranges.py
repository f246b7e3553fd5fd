"""Between which integers a value lies, and whether it may have wrapped around.

The arithmetic of n-bit integers is modulo 2**n, and so is a matrix of such integers. What widens a value, to
more bits or to a float, is affine only where the value has not wrapped. Every integer that depends on x
carries the range of what it would be in unbounded arithmetic, for every x of its dtype. It cannot have
wrapped where its dtype holds that range. A range includes 0, and so holds for the linear part too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.functions.columns import MOVES
from jaxconv_fc.functions.jaxprs import JaxprEqn, operand_avals, operand_numbers, result_avals
from jaxconv_fc.sharding import RELABELS, is_traced

Range = tuple[float, float]  # (least, largest), Python integers or infinite

UNKNOWN: Range = (-math.inf, math.inf)
_LARGEST = 2**64  # beyond any dtype: a range that goes further is unknown


def is_integer(dtype: Any) -> bool:
    """Whether arithmetic of this dtype wraps around; bool counts, as an integer of one bit."""
    return dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)


def range_of_dtype(dtype: Any) -> Range:
    return (0, 1) if dtype == jnp.bool_ else (int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max))


def range_of_constant(value: Any, dtype: Any) -> Range:
    """The range of an array that does not depend on x, and of 0. A traced one has the range of its dtype."""
    if not is_integer(dtype):
        return UNKNOWN
    if is_traced(value) or not getattr(value, "is_fully_addressable", True):
        return range_of_dtype(dtype)
    known = np.asarray(value)
    return (min(0, int(known.min())), max(0, int(known.max()))) if known.size else (0, 0)


def widens(before: Any, after: Any) -> bool:
    """Whether a conversion tells integers apart that are equal modulo 2**n, for the n bits of ``before``."""
    if not is_integer(before) or before == after:
        return False
    bits = 1 if before == jnp.bool_ else jnp.iinfo(before).bits
    return not jnp.issubdtype(after, jnp.integer) or jnp.iinfo(after).bits > bits


def wraps(bounds: Range, dtype: Any) -> bool:
    """Whether a value of this range may have wrapped around in this dtype."""
    low, high = range_of_dtype(dtype)
    return not low <= bounds[0] <= bounds[1] <= high


def range_of_result(eqn: JaxprEqn, ranges: Sequence[Range]) -> Range:
    """The range of the results of an equation, from those of its operands."""
    rule = _RANGES.get(eqn.primitive.name)
    low, high = UNKNOWN if rule is None else rule(eqn, ranges)
    return (low, high) if low >= -_LARGEST and high <= _LARGEST else UNKNOWN


# -- the table: primitive -> range ---------------------------------------------------------------


def _first(eqn: JaxprEqn, ranges: Sequence[Range]) -> Range:
    return ranges[0]


def hull(ranges: Sequence[Range]) -> Range:
    """The least range that holds all of these."""
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _moved(eqn: JaxprEqn, ranges: Sequence[Range]) -> Range:
    data = operand_numbers(MOVES[eqn.primitive.name], len(ranges))
    return hull([ranges[i] for i in data])


def _gathered(eqn: JaxprEqn, ranges: Sequence[Range]) -> Range:
    """Where an index is out of range stands the given value, or the least or largest integer without one."""
    fill, filled = eqn.params["fill_value"], range_of_dtype(result_avals(eqn)[0].dtype)
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return ranges[0]
    return hull([ranges[0], filled if fill is None else (int(fill), int(fill))])


def _negative(of: Range) -> Range:
    return -of[1], -of[0]


def _plus(a: Range, b: Range) -> Range:
    return a[0] + b[0], a[1] + b[1]


def _times(factors: Sequence[Range], terms: int = 1) -> Range:
    """The range of a sum of so many products of two factors."""
    a, b = factors
    corners = [x * y * terms if x and y and terms else 0 for x in a for y in b]
    return min(corners), max(corners)


def _sum_of(terms: Callable[[JaxprEqn], int]) -> Callable[[JaxprEqn, Sequence[Range]], Range]:
    """Every result is a sum of at most ``terms(eqn)`` entries of the operand."""
    return lambda eqn, ranges: _times((ranges[0], (0, 1)), terms(eqn))


def _reduced(eqn: JaxprEqn) -> int:
    return math.prod(operand_avals(eqn)[0].shape[axis] for axis in eqn.params["axes"])


def _dot(eqn: JaxprEqn, ranges: Sequence[Range]) -> Range:
    ((contracted, _), _), shape = eqn.params["dimension_numbers"], operand_avals(eqn)[0].shape
    return _times(ranges, math.prod(shape[axis] for axis in contracted))


def _convolution(eqn: JaxprEqn, ranges: Sequence[Range]) -> Range:
    shape, outputs = operand_avals(eqn)[1].shape, eqn.params["dimension_numbers"].rhs_spec[0]
    return _times(ranges, math.prod(shape[:outputs] + shape[outputs + 1 :]))


def _product(eqn: JaxprEqn, ranges: Sequence[Range]) -> Range:
    """An output of ``M x`` reads every tap once. How often taps meet in the other products is not counted."""
    spec, batches = eqn.params["spec"], eqn.params["batches"]
    if eqn.params["out"] != "y" or not all("y" in label for label in batches):
        return UNKNOWN
    outputs = spec.rhs_shape[spec.dimension_numbers.rhs_spec[0]]
    return _times(ranges, math.prod(spec.rhs_shape) // max(1, outputs))


def _added_in_place(eqn: JaxprEqn, ranges: Sequence[Range]) -> Range:
    operand, _, updates = ranges
    updates = updates if eqn.primitive.name == "scatter-add" else _negative(updates)
    return _plus(operand, _times((updates, (0, 1)), math.prod(operand_avals(eqn)[2].shape)))


def _shifted(eqn: JaxprEqn, ranges: Sequence[Range]) -> Range:
    operand, (least, most) = ranges
    return _times((operand, (0, 2 ** int(most)))) if least >= 0 and most <= 64 else UNKNOWN


_RANGES: dict[str, Callable[[JaxprEqn, Sequence[Range]], Range]] = {
    **dict.fromkeys(MOVES, _moved),
    "gather": _gathered,
    "sort": lambda eqn, ranges: hull(ranges[eqn.params["num_keys"] :]),
    **dict.fromkeys(
        ("convert_element_type", "bitcast_convert_type", "stop_gradient", "name", "xla_metadata_value",
         "device_put", "sharding_constraint", "layout_constraint", *RELABELS, "integer_pow", "pow"),
        _first,
    ),
    **dict.fromkeys(("add", "add_any"), lambda eqn, ranges: _plus(*ranges)),
    "sub": lambda eqn, ranges: _plus(ranges[0], _negative(ranges[1])),
    "neg": lambda eqn, ranges: _negative(ranges[0]),
    "not": lambda eqn, ranges: _plus(_negative(ranges[0]), (-1, 0)),
    "mul": lambda eqn, ranges: _times(ranges),
    "shift_left": _shifted,
    "reduce_sum": _sum_of(_reduced),
    "cumsum": _sum_of(lambda eqn: operand_avals(eqn)[0].shape[eqn.params["axis"]]),
    "reduce_window_sum": _sum_of(lambda eqn: math.prod(eqn.params["window_dimensions"])),
    **dict.fromkeys(("scatter-add", "scatter-sub"), _added_in_place),
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "conv_product": _product,
}  # fmt: skip

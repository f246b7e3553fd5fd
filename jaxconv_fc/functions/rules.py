"""What a primitive makes of values that depend on x: its rule, in one table.

A rule is ``rule(linearizer, eqn, values) -> results``. A linear equation acts on tangents as on values. A
*switch* is a value at whose sign changes a piecewise linear function bends or jumps. Its equation becomes the
linear piece that holds at the point, and the switch is appended to ``linearizer.switches``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.functions.columns import MOVES
from jaxconv_fc.functions.convolutions import product_of
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    WRITES,
    JaxprEqn,
    eval_eqn,
    inner_jaxprs,
    open_jaxpr,
    open_scan,
    open_while,
    operand_avals,
    operand_numbers,
    result_avals,
)
from jaxconv_fc.functions.linearize import (
    Linearizer,
    NotAffine,
    Rules,
    Value,
    at_point,
    compute_now,
    difference,
    entry,
    is_concrete,
    is_zero,
    operands_at_point,
    stacked,
    tangent_of,
)
from jaxconv_fc.functions.tap_sums import window_axes
from jaxconv_fc.products.forms import moved_by
from jaxconv_fc.sharding import RELABELS, broadcast, zeros

Rule = Callable[[Linearizer, JaxprEqn, Sequence[Any]], list[Any]]

# -- linear equations ----------------------------------------------------------------------------


class Linear(NamedTuple):
    """Jointly linear in the operands ``data``, provided that no other operand depends on x."""

    data: slice | tuple[int, ...]
    results: int | None = None  # the first `results` results depend on the data; None: all do

    def __call__(self, linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        data = operand_numbers(self.data, len(values))
        if any(isinstance(v, Value) for i, v in enumerate(values) if i not in data):
            return linearizer.broken(eqn, " with an index, a condition or a factor that depends on x")
        operands = [
            tangent_of(v, aval) if i in data else v
            for i, (v, aval) in enumerate(zip(values, operand_avals(eqn), strict=True))
        ]
        return _paired(eval_eqn, eqn, values, data, eval_eqn(eqn, operands), self.results)


class Bilinear(NamedTuple):
    """Linear in either of two operands, provided that no other operand depends on x."""

    factors: tuple[int, int] = (0, 1)
    results: int | None = None  # as in Linear
    compute: Callable[..., list[Any]] = eval_eqn

    def __call__(self, linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        depends = [i for i, v in enumerate(values) if isinstance(v, Value)]
        if not set(depends) <= set(self.factors):
            return linearizer.broken(eqn, " with an index that depends on x")
        if len(depends) > 1:
            return linearizer.broken(eqn, " of two values that depend on x")
        if result_avals(eqn)[0].dtype == jnp.bool_:
            return linearizer.broken(eqn, " of booleans")
        tangents = self.compute(eqn, [v.tangent if i in depends else v for i, v in enumerate(values)])
        return _paired(self.compute, eqn, values, depends, tangents, self.results)


def _paired(
    compute: Callable[..., list[Any]],
    eqn: JaxprEqn,
    values: Sequence[Any],
    data: Sequence[int],
    tangents: Sequence[Any],
    results: int | None = None,
) -> list[Any]:
    """Every result as the pair of its tangent and its value at the point, a symbolic zero if all operands
    ``data`` are 0 there. Results from number ``results`` on do not depend on x and are no pairs."""
    zero = all(is_zero(values[i]) for i in data)
    if zero and results is None:
        return [Value(t, None) for t in tangents]
    primals = compute_now(compute, eqn, operands_at_point(eqn, values))
    pairs = [Value(t, None if zero else p) for t, p in zip(tangents, primals, strict=True)]
    return pairs if results is None else [*pairs[:results], *primals[results:]]


def _by_platform(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    return Linear(slice(eqn.params["linear"]))(linearizer, eqn, values)


_IN_ALL = Linear(slice(None))
_IN_FIRST = Linear((0,))


def _sum(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The tangent of ``a + b`` is that of ``a`` if ``b`` does not depend on x, unless a is broadcast."""
    depends = [i for i, v in enumerate(values) if isinstance(v, Value)]
    i = depends[0]
    if len(depends) > 1 or operand_avals(eqn)[i].shape != result_avals(eqn)[0].shape:
        return _IN_ALL(linearizer, eqn, values)
    subtracted = i == 1 and eqn.primitive.name == "sub"
    tangent = -values[i].tangent if subtracted else values[i].tangent
    return _paired(eval_eqn, eqn, values, (0, 1), [tangent])


def _quotient(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    if isinstance(values[1], Value):
        return linearizer.broken(eqn, " by a value that depends on x")
    if not jnp.issubdtype(result_avals(eqn)[0].dtype, jnp.inexact):
        return linearizer.broken(eqn, " of integers")
    return _IN_FIRST(linearizer, eqn, values)


def _power(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """``x**1`` is x and ``x**0`` is 1; any other power is not affine."""
    x, *exponents = values
    exponent = eqn.params["y"] if "y" in eqn.params else exponents[0]
    if isinstance(x, Value) and is_concrete(exponent):
        if np.all(np.asarray(exponent) == 1) and operand_avals(eqn)[0].shape == result_avals(eqn)[0].shape:
            return [x]
        if np.all(np.asarray(exponent) == 0):
            aval = result_avals(eqn)[0]
            return compute_now(lambda *_: [jnp.ones(aval.shape, aval.dtype)], eqn, ())
    return linearizer.broken(eqn)


def _gather(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Linear in the operand. The value filled in where an index is out of range is an offset."""
    linear = eqn.replace(params=eqn.params | {"fill_value": 0})
    (result,) = _IN_FIRST(linearizer, linear, values)
    if isinstance(result, NotAffine) or eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return [result]
    if result.value is not None:
        return [Value(result.tangent, *compute_now(eval_eqn, eqn, list(map(at_point, values))))]
    (offset,) = compute_now(_gather_of_zeros, eqn, values)
    no_offset = is_concrete(offset) and not np.any(np.asarray(offset))
    return [Value(result.tangent, None if no_offset else offset)]


def _gather_of_zeros(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The fill value where an index is out of range, 0 elsewhere."""
    return eval_eqn(eqn, [zeros(operand_avals(eqn)[0]), values[1]])


def _fft(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """All kinds of FFT are linear over the real numbers, and all but IRFFT over the complex ones.

    (RFFT takes real operands. Those never depend on a complex x, whose real parts are refused.)
    """
    if eqn.params["fft_type"] == lax.FftType.IRFFT and not linearizer.real:
        return linearizer.broken(eqn, " of kind IRFFT, which takes real parts,")
    return _IN_FIRST(linearizer, eqn, values)


def _parts(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Real parts, imaginary parts and conjugates are linear over the real numbers, not over the complex."""
    return _IN_ALL(linearizer, eqn, values) if linearizer.real else linearizer.broken(eqn)


def _conversion(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    before, after = operand_avals(eqn)[0].dtype, result_avals(eqn)[0].dtype
    takes_real_part = jnp.issubdtype(before, jnp.complexfloating) and not jnp.issubdtype(
        after, jnp.complexfloating
    )
    to_integer = not jnp.issubdtype(after, jnp.inexact) and (
        jnp.issubdtype(before, jnp.inexact) or after == jnp.bool_
    )
    if (takes_real_part and not linearizer.real) or to_integer:
        return linearizer.broken(eqn, f" to {after}")
    return _IN_FIRST(linearizer, eqn, values)


def _bits(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The bits of an integer as an integer with another sign, which is equal to it modulo 2**n."""
    before, after = operand_avals(eqn)[0], result_avals(eqn)[0]
    if before.shape == after.shape and all(jnp.issubdtype(a.dtype, jnp.integer) for a in (before, after)):
        return _IN_FIRST(linearizer, eqn, values)
    return linearizer.broken(eqn, f" from {before.dtype} to {after.dtype}")


def _not(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """``~x`` is ``-1 - x`` for integers."""
    if result_avals(eqn)[0].dtype == jnp.bool_:
        return linearizer.broken(eqn, " of booleans")
    return [Value(-values[0].tangent, *compute_now(eval_eqn, eqn, operands_at_point(eqn, values)))]


def _sort(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The operands after the keys are permuted, in the order that the keys have."""
    keys, axis, stable = (eqn.params[name] for name in ("num_keys", "dimension", "is_stable"))
    if any(isinstance(v, Value) for v in values[:keys]):
        return linearizer.broken(eqn)
    inputs = [*values[:keys], lax.broadcasted_iota(jnp.int32, operand_avals(eqn)[0].shape, axis)]
    order = compute_now(lambda _, operands: [*lax.sort(operands, axis, stable, keys)], eqn, inputs)[-1]
    results = compute_now(eval_eqn, eqn, operands_at_point(eqn, values))
    for i, v in enumerate(values):
        if isinstance(v, Value):
            tangent = jnp.take_along_axis(v.tangent, order, axis, mode="promise_in_bounds")
            results[i] = Value(tangent, None if is_zero(v) else results[i])
    return results


def _psum(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A ``psum`` over axes of its operands, such as vmap leaves, is a sum. One over devices is refused."""
    if not all(isinstance(a, int) for a in eqn.params["axes"]):
        return linearizer.broken(eqn)
    return _IN_ALL(linearizer, eqn, values)


def _same(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The identity. So is ``stop_gradient``: the matrix is that of the values, not of their derivatives."""
    return list(values)


# -- calls and control flow ----------------------------------------------------------------------


def _call(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    return linearizer.inside(eqn, inner_jaxprs(eqn)[0], values)


def _linear_solve(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The operands are constants of matvec, vecmat, solve and transpose_solve, then b. The jaxpr ``solve``
    takes its own constants and b."""
    lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    first, total = lengths.matvec + lengths.vecmat, sum(lengths)
    return linearizer.inside(eqn, jaxprs.solve, [*values[first : first + lengths.solve], *values[total:]])


def _write(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Refused at once: a later read of the mutable array would not know of it."""
    raise ValueError(linearizer.reason(eqn))


def _scan(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A loop of known length, unrolled."""
    body, constants, carry, xs = open_scan(eqn, values)
    carried, steps = len(carry), range(eqn.params["length"])
    ys: list[Any] = [None] * len(steps)  # [step][result]
    for i in reversed(steps) if eqn.params["reverse"] else steps:
        results = linearizer.run(body, [*constants, *carry, *(entry(v, i) for v in xs)])
        carry, ys[i] = results[:carried], results[carried:]
    if not ys:
        return [*carry, *map(zeros, result_avals(eqn)[carried:])]
    outs = [v.aval for v in open_jaxpr(body)[0].outvars[carried:]]
    by_result = zip(*ys, strict=True)
    return [*carry, *(stacked(slices, aval) for slices, aval in zip(by_result, outs, strict=True))]


def _cond(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    index, branches = values[0], inner_jaxprs(eqn)
    if not is_concrete(index):
        return linearizer.broken(eqn, " whose branch depends on x or on a traced value")
    return linearizer.run(branches[min(max(int(index), 0), len(branches) - 1)], values[1:])


def _while(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    loop = open_while(eqn, values)
    carry = list(loop.carry)
    while True:
        (going,) = linearizer.run(loop.cond, [*loop.cond_constants, *carry])
        if not is_concrete(going):
            return linearizer.broken(eqn, " whose length depends on x or on a traced value")
        if not going:
            return carry
        carry = linearizer.run(loop.body, [*loop.body_constants, *carry])


# -- switches of piecewise linear functions: there is a point, so no value is a symbolic zero --------


def _of_real(rule: Rule) -> Rule:
    """The rule, refused for complex operands: they have no sign."""

    def of_real(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        if any(jnp.issubdtype(aval.dtype, jnp.complexfloating) for aval in operand_avals(eqn)):
            return linearizer.broken(eqn, " of complex values")
        return rule(linearizer, eqn, values)

    return of_real


def _comparison(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    linearizer.switches.append(difference(eqn, values))
    return compute_now(eval_eqn, eqn, list(map(at_point, values)))


def _sign(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    linearizer.switches.append(values[0])
    return compute_now(eval_eqn, eqn, [values[0].value])


def _abs(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    (result,) = _sign(linearizer, eqn, values)
    (x,) = values  # |x| = x or -x, whichever holds at the point
    return [Value(lax.select(x.value >= 0, x.tangent, -x.tangent), result)]


def _larger_or_smaller(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    gap = difference(eqn, values)
    linearizer.switches.append(gap)
    first = gap.value >= 0 if eqn.primitive.name == "max" else gap.value <= 0
    out = result_avals(eqn)[0]
    pairs = zip(values, operand_avals(eqn), strict=True)
    a, b = (broadcast(tangent_of(v, aval), out) for v, aval in pairs)
    return [Value(lax.select(first, a, b), *compute_now(eval_eqn, eqn, list(map(at_point, values))))]


def _clamp(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    low, x, high = values
    if not isinstance(x, Value) or isinstance(low, Value) or isinstance(high, Value):
        return linearizer.broken(eqn, " with bounds that depend on x")
    linearizer.switches += [Value(x.tangent, x.value - low), Value(x.tangent, x.value - high)]
    inside = (x.value >= low) & (x.value <= high)
    tangent = lax.select(inside, x.tangent, jnp.zeros_like(x.tangent))
    return [Value(tangent, *compute_now(eval_eqn, eqn, [low, x.value, high]))]


def _extreme(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A maximum or minimum. Its switches are the chosen candidate minus every other one."""
    (x,), name = values, eqn.primitive.name
    largest = name.endswith("max")
    candidates = _candidates(eqn, x.value, -jnp.inf if largest else jnp.inf)  # [*result, candidate]
    index = jnp.expand_dims((jnp.argmax if largest else jnp.argmin)(candidates, axis=-1), -1)
    tangents = _candidates(eqn, x.tangent, 0)

    def chosen_and_gaps(v: Any) -> tuple[Any, Any]:
        """([*result] the chosen candidate, [*result, candidate] chosen minus each: 0 for itself)"""
        chosen = jnp.take_along_axis(v, index, axis=-1, mode="clip")
        return chosen[..., 0], jnp.broadcast_to(chosen, v.shape) - v

    (tangent, gap_tangents), (_, gaps) = chosen_and_gaps(tangents), chosen_and_gaps(candidates)
    linearizer.switches.append(Value(gap_tangents, gaps))
    result = compute_now(eval_eqn, eqn, [x.value])
    return result if name.startswith("arg") else [Value(tangent, *result)]


def _candidates(eqn: JaxprEqn, v: Any, fill: float) -> Any:
    """The entries of ``v`` that each result of a maximum is chosen from: [*result, candidate]."""
    if eqn.primitive.name.startswith("reduce_window"):
        axes = window_axes(eqn.params, v.shape)
        taps = np.ndindex(*(axis.taps for axis in axes))
        return jnp.stack([moved_by(axes, tap, v, 0, fill) for tap in taps], axis=-1)
    axes = eqn.params["axes"]
    kept = [i for i in range(v.ndim) if i not in axes]
    return jnp.transpose(v, (*kept, *axes)).reshape(*(v.shape[i] for i in kept), -1)


# -- the tables: primitive -> rule -----------------------------------------------------------------

# These rules take NotAffine operands too: the results may not depend on such an operand.
_CONTROL: dict[str, Rule] = {
    **dict.fromkeys((*CALLS, "linear_call", "composite", "xla_metadata_call"), _call),
    "custom_linear_solve": _linear_solve,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(WRITES, _write),
}
_LINEAR: dict[str, Rule] = {
    **{name: Linear(data) for name, data in MOVES.items()},
    "gather": _gather,
    "sort": _sort,
    **dict.fromkeys(("stop_gradient", "name", "xla_metadata_value"), _same),
    # sums (x << k is 2**k * x)
    **dict.fromkeys(("add", "sub"), _sum),
    "add_any": _IN_ALL,
    **dict.fromkeys(("neg", "reduce_sum", "reduce_window_sum", "cumsum", "shift_left"), _IN_FIRST),
    "not": _not,
    **dict.fromkeys(("scatter-add", "scatter-sub"), Linear((0, 2))),
    "select_and_scatter_add": _IN_FIRST,
    "select_and_gather_add": _IN_FIRST,
    "psum": _psum,
    # where an array lies
    **dict.fromkeys(("device_put", "sharding_constraint", "layout_constraint"), _IN_ALL),
    **dict.fromkeys(RELABELS, _IN_FIRST),
    # dtypes and complex numbers
    "convert_element_type": _conversion,
    "bitcast_convert_type": _bits,
    **dict.fromkeys(("real", "imag", "conj", "complex"), _parts),
    "fft": _fft,
    # products
    "mul": Bilinear(),
    "div": _quotient,
    "integer_pow": _power,
    "pow": _power,
    "polynomial": Linear(slice(1, None)),  # in its coefficients
    "scatter-mul": _IN_FIRST,
    "dot_general": Bilinear(),
    "conv_general_dilated": Bilinear(compute=product_of),
    "conv_product": Bilinear(),
    "by_platform": _by_platform,
    # systems of equations
    "triangular_solve": Linear((1,)),
    "tridiagonal_solve": Linear((3,)),
    "ormqr": Linear((2,)),
    # sparse matrices: (data, indices, ...)
    **dict.fromkeys(("bcoo_todense", "bcsr_todense"), _IN_FIRST),
    **dict.fromkeys(("bcoo_transpose", "bcoo_sort_indices", "bcoo_sum_duplicates"), Linear((0,), results=1)),
    "bcoo_extract": Linear((1,)),
    "bcsr_extract": Linear((2,)),
    "bcoo_dot_general": Bilinear((0, 2)),
    "bcsr_dot_general": Bilinear((0, 3)),
    "bcoo_dot_general_sampled": Bilinear((0, 1)),
    "bcoo_spdot_general": Bilinear((0, 2), results=1),
}
_SWITCHES: dict[str, Rule] = {
    name: _of_real(rule)
    for name, rule in {
        **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), _comparison),
        **dict.fromkeys(("max", "min"), _larger_or_smaller),
        "abs": _abs,
        "sign": _sign,
        "clamp": _clamp,
        **dict.fromkeys(
            ("reduce_max", "reduce_min", "argmax", "argmin", "reduce_window_max", "reduce_window_min"),
            _extreme,
        ),
    }.items()
}

# Primitives that may be affine (or piecewise linear), by the reason why they have no rule here.
_REFUSED: dict[str, str] = {
    name: reason
    for reason, names in {
        "works across devices, and the matrix would have to as well": """
            all_gather all_gather_done all_gather_invariant all_gather_reduced all_gather_reduced_start
            all_gather_start all_to_all all_to_all_done all_to_all_start pbroadcast pbroadcast_done
            pbroadcast_dynamic pbroadcast_start ppermute ppermute_done ppermute_start precv preduced psend
            psum psum_done psum_invariant psum_invariant_start psum_start ragged_all_to_all
            reduce_scatter reduce_scatter_done reduce_scatter_start reduced_vary_cast reduced_vary_cast_p
            shard_map unreduced_pmax unreduced_pmin unreduced_psum unreduced_psum_start
            unreduced_reduce_scatter unreduced_reduce_scatter_start vary_unreduced_cast
            vary_unreduced_cast_p""",
        "is bound to devices or their memories": "compute_on relayout reshard with_memory_space_constraint",
        "runs code that no jaxpr shows": """
            buffer_callback call_exported call_hi_primitive call_hi_primitive_linearized core_map cudnn_fusion
            custom_partitioning ffi_call io_callback mpmd_map pallas_call pure_callback""",
        "combines values by a function of its own": "reduce reduce_window select_and_scatter",
        "reads or writes a mutable array (jax.new_ref)": f"""
            new_ref get run_state freeze pin unpin {" ".join(WRITES)}""",
        "cannot be batched by JAX (products with BCOO and BCSR can)": """
            coo_matvec coo_matmat coo_todense csr_matvec csr_matmat csr_todense spsolve
            ragged_dot_general""",
        "is affine in one operand and quadratic in the other": "symmetric_product",
    }.items()
    for name in names.split()
}
_BENDS: dict[str, str] = dict.fromkeys(
    ("sort", "top_k", "approx_top_k", "cummax", "cummin", "scatter-max", "scatter-min", "round", "floor",
     "ceil", "rem", "lt_to", "le_to", "eq_to", "is_finite", "pmax", "pmin"),
    "is piecewise linear, and its pieces have no rule here",
)  # fmt: skip

AFFINE = Rules(
    kind="affine",
    control=_CONTROL,
    rules=_LINEAR,
    refused=_REFUSED,
    advice=dict.fromkeys(_SWITCHES, " For a piecewise linear network use local_affine."),
)
PIECEWISE_LINEAR = Rules(
    kind="piecewise linear",
    control=_CONTROL,
    rules=_LINEAR | _SWITCHES,
    refused=_REFUSED | _BENDS,
    advice={},
)

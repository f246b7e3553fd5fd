"""The linear jaxpr of a function: its tangent as a function of x, beside its value at a point.

Each primitive has its rule in one table: what it makes of values that depend on x. A switch of a piecewise
linear function becomes what it is at the point. Loops are unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.functions.columns import MOVES, moved_by, window_axes
from jaxconv_fc.functions.connect import batched_output, examples
from jaxconv_fc.functions.find import place_of, spec_of
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    WRITES,
    Environment,
    eval_eqn,
    inner_jaxprs,
    open_jaxpr,
    operand_numbers,
    scan_counts,
)
from jaxconv_fc.products import stacked_product
from jaxconv_fc.sharding import broadcast, is_traced, zeros

_RELABELS = ("pvary", "relabel_varying_axes")  # the same value, said to vary over other devices


class Value(NamedTuple):
    """A value that depends on x: its linear part as a function of x, traced, and what it is at the point.

    The value None is a symbolic zero, so that ``0 * inf`` never arises: a kernel may hold Inf.
    """

    tangent: Any
    value: Any


class NotAffine(NamedTuple):
    """A value that is not affine in x, and why; of no consequence unless the result needs it."""

    reason: str


def linearized(name: str, jaxpr: Any, x: Any, point: Any) -> Any:
    """The jaxpr from x to (tangents, values): those of the result, then those of the switches.

    ``point`` None: the function must be affine, and the values are those at 0.
    """
    aval = open_jaxpr(jaxpr)[0].outvars[0].aval

    def staged(tangent: Any) -> tuple[list[Any], list[Any]]:
        walk = Linearizer(name, x, local=point is not None)
        (result,) = walk.run(jaxpr, [Value(tangent, point)])
        if isinstance(result, NotAffine):
            raise ValueError(result.reason)
        if not isinstance(result, Value):
            result = Value(zeros(aval), result)
        elif result.value is None:
            result = Value(result.tangent, zeros(aval))
        pairs = [result, *walk.switches]
        return [p.tangent for p in pairs], [p.value for p in pairs]

    return jax.make_jaxpr(staged)(x)


class Linearizer:
    """Goes through a jaxpr with values that depend on x, and values that do not."""

    def __init__(self, name: str, x: Any, *, local: bool):
        self.name, self.local = name, local
        self.rules = _AFFINE | _SWITCHES if local else _AFFINE
        self.real = not jnp.issubdtype(x.dtype, jnp.complexfloating)
        self.switches: list[Value] = []  # what changes sign where a piecewise linear function bends
        self.calls: list[Any] = []  # that the equation at hand lies in

    def run(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        env = Environment(jaxpr, arguments)
        for eqn in env.equations:
            env.write(eqn.outvars, self.equation(eqn, env.read(eqn.invars)))
        return env.read(env.outvars)

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        name = eqn.primitive.name
        if not any(isinstance(v, Value | NotAffine) for v in values):
            return _known(eval_eqn, eqn, values)
        if name in _STATEMENTS:
            return _STATEMENTS[name](self, eqn, values)
        broken = next((v for v in values if isinstance(v, NotAffine)), None)
        if broken is not None:
            return [broken] * len(eqn.outvars)
        rule = self.rules.get(name, Linearizer.broken)
        return rule(self, eqn, values)

    def broken(self, eqn: Any, values: Sequence[Any] = (), because: str = "") -> list[Any]:
        return [NotAffine(self.reason(eqn, because))] * len(eqn.outvars)

    def reason(self, eqn: Any, because: str = "") -> str:
        name, kind = eqn.primitive.name, "piecewise linear" if self.local else "affine"
        place = next(filter(None, map(place_of, [eqn, *reversed(self.calls)])), "an unknown line")
        refused = (_REFUSED | _BENDS if self.local else _REFUSED).get(name)
        if refused and not because:
            return (
                f"{self.name}: cannot tell whether fn is {kind} in x: "
                f"primitive {name!r} {refused}, at {place}."
            )
        reason = f"{self.name}: fn is not {kind} in x: primitive {name!r}{because} at {place}."
        if not self.local and name in _SWITCHES:
            reason += " For a piecewise linear network use local_affine."
        return reason

    # -- linear equations ----------------------------------------------------------------------

    def linear(self, eqn: Any, values: Sequence[Any], rule: Linear) -> list[Any]:
        """An equation linear in the operands ``data`` together, provided that the others are known."""
        data = operand_numbers(rule.data, len(values))
        if any(isinstance(v, Value) for i, v in enumerate(values) if i not in data):
            return self.broken(eqn, because=" with an index, a condition or a factor that depends on x")
        tangent = self.unchanged(eqn, values)
        if tangent is None:
            operands = [_tangent(v, a.aval) if i in data else v for i, (v, a) in _numbered(values, eqn)]
            tangents = eval_eqn(eqn, operands)
        else:
            tangents = [tangent]
        return self.paired(eval_eqn, eqn, values, data, tangents, rule.results)

    def paired(
        self, compute: Callable[..., Any], eqn: Any, values: Sequence[Any], data: Sequence[int],
        tangents: Sequence[Any], results: int | None,
    ) -> list[Any]:  # fmt: skip
        """The tangents with what the results are at the point; results from ``results`` on are known."""
        zero = all(_is_zero(values[i]) for i in data)
        if zero and results is None:
            return [Value(t, None) for t in tangents]
        known = _known(compute, eqn, [_at_point(v, a.aval) for _, (v, a) in _numbered(values, eqn)])
        pairs = [Value(t, None if zero else k) for t, k in zip(tangents, known, strict=True)]
        return pairs if results is None else [*pairs[:results], *known[results:]]

    def unchanged(self, eqn: Any, values: Sequence[Any]) -> Any:
        """The tangent of a sum with something known, if that is the tangent of the other operand."""
        if eqn.primitive.name not in ("add", "sub") or all(isinstance(v, Value) for v in values):
            return None
        i = int(isinstance(values[1], Value))
        if eqn.invars[i].aval.shape != eqn.outvars[0].aval.shape:
            return None
        return -values[i].tangent if i and eqn.primitive.name == "sub" else values[i].tangent

    def bilinear(self, eqn: Any, values: Sequence[Any], rule: Bilinear) -> list[Any]:
        """A product, linear in the one factor that depends on x."""
        depends = [i for i, v in enumerate(values) if isinstance(v, Value)]
        if not set(depends) <= set(rule.factors):
            return self.broken(eqn, because=" with an index that depends on x")
        if len(depends) > 1:
            return self.broken(eqn, because=" of two values that depend on x")
        if eqn.outvars[0].aval.dtype == jnp.bool_:
            return self.broken(eqn, because=" of booleans")
        tangents = rule.compute(eqn, [v.tangent if i in depends else v for i, v in enumerate(values)])
        return self.paired(rule.compute, eqn, values, depends, tangents, rule.results)

    def divided(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        if isinstance(values[1], Value):
            return self.broken(eqn, because=" by a value that depends on x")
        if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
            return self.broken(eqn, because=" of integers")
        return self.linear(eqn, values, Linear((0,)))

    def power(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """``x**1`` is x and ``x**0`` is 1; any other power is not affine."""
        x, *exponents = values
        exponent = eqn.params["y"] if "y" in eqn.params else exponents[0]
        if isinstance(x, Value) and _is_concrete(exponent):
            if np.all(np.asarray(exponent) == 1) and eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape:
                return [x]
            if np.all(np.asarray(exponent) == 0):
                aval = eqn.outvars[0].aval
                return _known(lambda *_: [jnp.ones(aval.shape, aval.dtype)], eqn, ())
        return self.broken(eqn)

    def gathered(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Linear in the operand; what is filled in for an index out of range is an offset."""
        without = eqn.replace(params=eqn.params | {"fill_value": 0})
        (result,) = self.linear(without, values, Linear((0,)))
        if isinstance(result, NotAffine) or eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
            return [result]
        if result.value is not None:
            return [Value(result.tangent, *_known(eval_eqn, eqn, list(map(_at_point, values))))]
        (filled,) = _known(_filled, eqn, values)
        nothing = _is_concrete(filled) and not np.any(np.asarray(filled))
        return [Value(result.tangent, None if nothing else filled)]

    def transformed(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """All kinds of FFT are linear over the real numbers, and all but IRFFT over the complex ones.

        (RFFT takes real operands, and none of them depends on a complex x.)
        """
        if eqn.params["fft_type"] == jax.lax.FftType.IRFFT and not self.real:
            return self.broken(eqn, because=" of kind IRFFT, which takes real parts,")
        return self.linear(eqn, values, Linear((0,)))

    def of_parts(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Real and imaginary parts and conjugates are linear over the real numbers alone."""
        return self.linear(eqn, values, Linear(slice(None))) if self.real else self.broken(eqn)

    def converted(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        takes_part = jnp.issubdtype(before, jnp.complexfloating) and not jnp.issubdtype(
            after, jnp.complexfloating
        )
        to_integer = not jnp.issubdtype(after, jnp.inexact) and (
            jnp.issubdtype(before, jnp.inexact) or after == jnp.bool_
        )
        if (takes_part and not self.real) or to_integer:
            return self.broken(eqn, because=f" to {after}")
        return self.linear(eqn, values, Linear((0,)))

    def summed_over_positions(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """``psum`` over axes of the operands, which a vmap leaves, is a sum; over devices it is refused."""
        if not all(isinstance(a, int) for a in eqn.params["axes"]):
            return self.broken(eqn)
        return self.linear(eqn, values, Linear(slice(None)))

    # -- calls -----------------------------------------------------------------------------------

    def call(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        return self.inside(eqn, inner_jaxprs(eqn)[0], values)

    def inside(self, eqn: Any, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        self.calls.append(eqn)
        results = self.run(jaxpr, values)
        self.calls.pop()
        return results

    def solve(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Operands are constants of four jaxprs, then b: the one that solves is run on its own and b."""
        lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
        first, total = lengths.matvec + lengths.vecmat, sum(lengths)
        return self.inside(eqn, jaxprs.solve, [*values[first : first + lengths.solve], *values[total:]])

    def write(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Refused at once: a later read of the mutable array would not know of it."""
        raise ValueError(self.reason(eqn))

    # -- control flow --------------------------------------------------------------------------

    def scan(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """A loop of known length, unrolled."""
        (body,) = inner_jaxprs(eqn)
        fixed, propagate = scan_counts(eqn, body)
        carry, xs = list(values[fixed : fixed + propagate]), values[fixed + propagate :]
        outs = [v.aval for v in open_jaxpr(body)[0].outvars[propagate:]]
        steps = range(eqn.params["length"])
        rows: list[Any] = [None] * len(steps)
        for i in reversed(steps) if eqn.params["reverse"] else steps:
            results = self.run(body, [*values[:fixed], *carry, *(_entry(v, i) for v in xs)])
            carry, rows[i] = results[:propagate], results[propagate:]
        if not rows:
            return [*carry, *(zeros(v.aval) for v in eqn.outvars[propagate:])]
        return [
            *carry,
            *(_stacked(column, aval) for column, aval in zip(zip(*rows, strict=True), outs, strict=True)),
        ]

    def cond(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        index, branches = values[0], inner_jaxprs(eqn)
        if not _is_concrete(index):
            return self.broken(eqn, because=" whose branch depends on x or on a traced value")
        return self.run(branches[min(max(int(index), 0), len(branches) - 1)], values[1:])

    def while_loop(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        split, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = list(values[split + fixed :])
        while True:
            (going,) = self.run(cond, [*values[:split], *carry])
            if not _is_concrete(going):
                return self.broken(eqn, because=" whose length depends on x or on a traced value")
            if not going:
                return carry
            carry = self.run(body, [*values[split : split + fixed], *carry])

    # -- switches of piecewise linear functions --------------------------------------------------
    # An equation that bends or jumps where a value crosses 0: what it is on this side.

    def compared(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        self.switches.append(_difference(eqn, values))
        return _known(eval_eqn, eqn, list(map(_at_point, values)))

    def signed(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        self.switches.append(values[0])
        return _known(eval_eqn, eqn, [values[0].value])

    def absolute(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        (result,) = self.signed(eqn, values)
        (x,) = values
        return [Value(lax.select(x.value >= 0, x.tangent, -x.tangent), result)]

    def larger(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        difference = _difference(eqn, values)
        self.switches.append(difference)
        first = difference.value >= 0 if eqn.primitive.name == "max" else difference.value <= 0
        out = eqn.outvars[0].aval
        a, b = (broadcast(_tangent(v, u.aval), out) for _, (v, u) in _numbered(values, eqn))
        return [Value(lax.select(first, a, b), *_known(eval_eqn, eqn, list(map(_at_point, values))))]

    def clamped(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        low, x, high = values
        if not isinstance(x, Value) or isinstance(low, Value) or isinstance(high, Value):
            return self.broken(eqn, because=" with bounds that depend on x")
        self.switches += [Value(x.tangent, x.value - low), Value(x.tangent, x.value - high)]
        inside = (x.value >= low) & (x.value <= high)
        tangent = lax.select(inside, x.tangent, jnp.zeros_like(x.tangent))
        return [Value(tangent, *_known(eval_eqn, eqn, [low, x.value, high]))]

    def extreme(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The largest or smallest of the candidates of every result; each other one is a switch."""
        (x,), name = values, eqn.primitive.name
        largest = name.endswith("max")
        candidates = _candidates(eqn, x.value, -jnp.inf if largest else jnp.inf)
        index = jnp.expand_dims((jnp.argmax if largest else jnp.argmin)(candidates, axis=-1), -1)
        tangents = _candidates(eqn, x.tangent, 0)

        def behind(v: Any) -> tuple[Any, Any]:
            chosen = jnp.take_along_axis(v, index, axis=-1, mode="clip")
            return chosen[..., 0], jnp.broadcast_to(chosen, v.shape) - v

        (tangent, rates), (_, gaps) = behind(tangents), behind(candidates)
        self.switches.append(Value(rates, gaps))
        result = _known(eval_eqn, eqn, [x.value])
        return result if name.startswith("arg") else [Value(tangent, *result)]


def _candidates(eqn: Any, v: Any, fill: float) -> Any:
    """The entries that every result of a maximum is taken from, on a new last axis."""
    if eqn.primitive.name.startswith("reduce_window"):
        axes = window_axes(eqn.params, v.shape)
        taps = np.ndindex(*(axis.taps for axis in axes))
        return jnp.stack([moved_by(axes, tap, v, 0, fill) for tap in taps], axis=-1)
    axes = eqn.params["axes"]
    kept = [i for i in range(v.ndim) if i not in axes]
    return jnp.transpose(v, (*kept, *axes)).reshape(*(v.shape[i] for i in kept), -1)


# -- the table: primitive -> rule --------------------------------------------------------------


class Linear(NamedTuple):
    """Linear in the operands ``data`` together, where the others are known."""

    data: slice | tuple[int, ...]
    results: int | None = None  # so many results depend on them, the rest is known; None: all

    def __call__(self, walk: Linearizer, eqn: Any, values: Sequence[Any]) -> list[Any]:
        return walk.linear(eqn, values, self)


class Bilinear(NamedTuple):
    """Linear in either of two operands, where all others are known."""

    factors: tuple[int, int] = (0, 1)
    results: int | None = None
    compute: Callable[..., list[Any]] = eval_eqn

    def __call__(self, walk: Linearizer, eqn: Any, values: Sequence[Any]) -> list[Any]:
        return walk.bilinear(eqn, values, self)


def _convolve(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """A convolution of lax by our own product, which is right where lax is not."""
    spec, dtype = spec_of(eqn), eqn.outvars[0].aval.dtype
    x, kernel = (v.astype(dtype) for v in values)
    stack = stacked_product(spec, kernel, examples(spec, x), eqn.params["precision"])
    return [batched_output(spec, stack)]


def _same(walk: Linearizer, eqn: Any, values: Sequence[Any]) -> list[Any]:
    return list(values)


def _of_real(rule: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A switch turns where a *real* value crosses 0."""

    def of_real(walk: Linearizer, eqn: Any, values: Sequence[Any]) -> list[Any]:
        if any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in eqn.invars):
            return walk.broken(eqn, because=" of complex values")
        return rule(walk, eqn, values)

    return of_real


# Rules that take whatever operands there are, refused ones too: inside, these may be of no consequence.
_STATEMENTS: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys((*CALLS, "linear_call", "composite", "xla_metadata_call"), Linearizer.call),
    "custom_linear_solve": Linearizer.solve,
    "scan": Linearizer.scan,
    "while": Linearizer.while_loop,
    "cond": Linearizer.cond,
    **dict.fromkeys(WRITES, Linearizer.write),
}
_AFFINE: dict[str, Callable[..., list[Any]]] = {
    **{name: Linear(data) for name, data in MOVES.items()},
    "gather": Linearizer.gathered,
    # The matrix is that of the values, whatever their derivative.
    **dict.fromkeys(("stop_gradient", "name", "xla_metadata_value"), _same),
    # sums
    **dict.fromkeys(("add", "sub", "add_any"), Linear(slice(None))),
    **dict.fromkeys(("neg", "reduce_sum", "reduce_window_sum", "cumsum", "shift_left"), Linear((0,))),
    **dict.fromkeys(("scatter-add", "scatter-sub"), Linear((0, 2))),
    "select_and_scatter_add": Linear((0,)),
    "select_and_gather_add": Linear((0,)),
    "psum": Linearizer.summed_over_positions,
    # where an array lies
    **dict.fromkeys(("device_put", "sharding_constraint", "layout_constraint"), Linear(slice(None))),
    # dtypes and complex numbers
    "convert_element_type": Linearizer.converted,
    **dict.fromkeys(("real", "imag", "conj", "complex"), Linearizer.of_parts),
    "fft": Linearizer.transformed,
    # products
    "mul": Bilinear(),
    "div": Linearizer.divided,
    "integer_pow": Linearizer.power,
    "pow": Linearizer.power,
    "polynomial": Linear(slice(1, None)),  # in its coefficients
    "scatter-mul": Linear((0,)),
    "dot_general": Bilinear(),
    "conv_general_dilated": Bilinear(compute=_convolve),
    "conv_product": Bilinear(),
    # systems of equations
    "triangular_solve": Linear((1,)),
    "tridiagonal_solve": Linear((3,)),
    "ormqr": Linear((2,)),
    **dict.fromkeys(_RELABELS, Linear((0,))),
    # sparse matrices: (data, indices, ...)
    **dict.fromkeys(("bcoo_todense", "bcsr_todense"), Linear((0,))),
    **dict.fromkeys(("bcoo_transpose", "bcoo_sort_indices", "bcoo_sum_duplicates"), Linear((0,), results=1)),
    "bcoo_extract": Linear((1,)),
    "bcsr_extract": Linear((2,)),
    "bcoo_dot_general": Bilinear((0, 2)),
    "bcsr_dot_general": Bilinear((0, 3)),
    "bcoo_dot_general_sampled": Bilinear((0, 1)),
    "bcoo_spdot_general": Bilinear((0, 2), results=1),
}
_SWITCHES: dict[str, Callable[..., list[Any]]] = {
    name: _of_real(rule)
    for name, rule in {
        **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), Linearizer.compared),
        **dict.fromkeys(("max", "min"), Linearizer.larger),
        "abs": Linearizer.absolute,
        "sign": Linearizer.signed,
        "clamp": Linearizer.clamped,
        **dict.fromkeys(
            ("reduce_max", "reduce_min", "argmax", "argmin", "reduce_window_max", "reduce_window_min"),
            Linearizer.extreme,
        ),
    }.items()
}

# Primitives that may be affine (or piecewise linear) and have no rule here: why.
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
        "cannot be batched in JAX over any axis (matrices as BCOO and BCSR can)": """
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


# -- operands ----------------------------------------------------------------------------------


def _known(compute: Callable[..., list[Any]], eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Computed at once, where nothing in it is traced: a branch may hang on it."""
    if eqn.primitive.name in _RELABELS:  # the mesh axes that they name have no meaning outside of the trace
        return compute(eqn, values)
    with jax.ensure_compile_time_eval():
        return compute(eqn, values)


def _filled(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """What a gather makes of zeros: 0, and what it fills in."""
    return eval_eqn(eqn, [zeros(eqn.invars[0].aval), values[1]])


def _difference(eqn: Any, values: Sequence[Any]) -> Value:
    """``a - b`` of an equation that compares the two."""
    (a, b), out = values, eqn.outvars[0].aval
    first, second = (broadcast(_at_point(v), out) for v in (a, b))
    if isinstance(a, Value) != isinstance(b, Value):
        tangent = a.tangent if isinstance(a, Value) else -b.tangent
        return Value(broadcast(tangent, out), first - second)
    return Value(broadcast(a.tangent, out) - broadcast(b.tangent, out), first - second)


def _entry(v: Any, i: int) -> Any:
    """One slice of what a loop runs over."""
    if isinstance(v, Value):
        return Value(v.tangent[i], None if v.value is None else v.value[i])
    return v if isinstance(v, NotAffine) else v[i]


def _stacked(values: Sequence[Any], aval: Any) -> Any:
    """The slices that a loop has made, put together."""
    broken = next((v for v in values if isinstance(v, NotAffine)), None)
    if broken is not None:
        return broken
    known = None if all(map(_is_zero, values)) else jnp.stack([_at_point(v, aval) for v in values])
    if not any(isinstance(v, Value) for v in values):
        return known
    return Value(jnp.stack([_tangent(v, aval) for v in values]), known)


def _numbered(values: Sequence[Any], eqn: Any) -> list[tuple[int, tuple[Any, Any]]]:
    return list(enumerate(zip(values, eqn.invars, strict=True)))


def _tangent(value: Any, aval: Any) -> Any:
    return value.tangent if isinstance(value, Value) else zeros(aval)


def _at_point(value: Any, aval: Any = None) -> Any:
    if not isinstance(value, Value):
        return value
    return zeros(aval) if value.value is None else value.value


def _is_zero(value: Any) -> bool:
    """Whether an operand is known to be 0 at the point: not by its entries, unless it is a plain scalar."""
    if isinstance(value, Value):
        return value.value is None
    return _is_concrete(value) and np.ndim(value) == 0 and not value


def _is_concrete(value: Any) -> bool:
    return not isinstance(value, Value | NotAffine) and not is_traced(value)

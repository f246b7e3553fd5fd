"""The matrix of a whole function: affine ones exactly, piecewise linear ones at a point.

In two steps. The first goes through the jaxpr with pairs of a *tangent*, the linear part of a value as a
function of x, and the value at the point (0 for an affine function: the offset). It refuses what is not
affine, evaluates what does not depend on x, replaces every switch of a piecewise linear function by what
it is at the point, unrolls loops, and leaves a jaxpr that is linear. The second carries the columns of the
matrix through that jaxpr (:mod:`jaxconv_fc.columns`), or, where the output is smaller than the input,
through its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxconv_fc.apply import stacked_product
from jaxconv_fc.columns import MOVES, Pick, carried, moved_by, window_axes
from jaxconv_fc.jaxprs import (
    CALLS,
    WRITES,
    Environment,
    bind,
    compiled,
    inner_jaxprs,
    opened,
    operand_numbers,
    scan_counts,
    trace,
)
from jaxconv_fc.numerics import least, nan_unless_finite
from jaxconv_fc.sharding import broadcast, replicated, zeros
from jaxconv_fc.spec import fits_in_memory
from jaxconv_fc.tracing import batched_output, examples, place_of, spec_of

_LAYERS = ("dot_general", "conv_product")
_RELABELS = ("pvary", "relabel_varying_axes")  # the same value, said to vary over other devices


class Local(NamedTuple):
    """The affine map that a function is around a point: ``fn(z).ravel() == matrix @ z.ravel() + offset``
    for every z closer to x than ``radius`` (in the 2-norm)."""

    matrix: jax.Array
    offset: jax.Array
    radius: jax.Array


def matrix_of(fn: Callable[[Any], Any], x: Any) -> tuple[jax.Array, jax.Array]:
    """``(A, b)`` with ``fn(x).ravel() == A @ x.ravel() + b`` for every x, of a function affine in x.

    Convolutions, padding, slicing, reshaping, transposition, concatenation, addition, scaling, sums,
    average pooling, dense layers, normalisation with fixed statistics: whatever is built of these, loops
    of known length and custom derivatives included, is one matrix. A is composed from the equations of
    the function and never probed, and does not depend on the values of x. Matrix products are done with
    ``precision="highest"`` unless ``fn`` asks for another.

    Cost: that of ``fn`` for ``min(in size, out size)`` examples at once, the first layer free. A is dense.
    Outside of jit, ``fn`` is traced at every call, and what is compiled for it serves all functions that
    differ from it in the arrays they close over alone.

    Args:
      fn: a function from one array to one array.
      x: an array, or a ``jax.ShapeDtypeStruct``: only shape and dtype count.

    Returns:
      A of shape ``(out size, in size)`` and b of shape ``(out size,)``, in the dtype of the result.
      Differentiable with respect to arrays that ``fn`` closes over, and jittable.

    Raises:
      ValueError: ``fn`` is not affine in x; the message names the primitive that broke it, and where. Or A
        is beyond the memory limit.
      TypeError: x or the result is not a single array.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> def circular(x):  # pad, then VALID
    ...     return jnp.convolve(jnp.pad(x, 1, mode="wrap"), jnp.array([1., 2., 3.]), "valid") + 5
    >>> matrix, offset = fc.matrix_of(circular, jnp.zeros(4))
    >>> print(matrix)
    [[2. 1. 0. 3.]
     [3. 2. 1. 0.]
     [0. 3. 2. 1.]
     [1. 0. 3. 2.]]
    >>> print(offset)
    [5. 5. 5. 5.]
    """
    with jax.default_matmul_precision("highest"):
        jaxpr, x = _single(fn, x, "matrix_of")
        return compiled(_matrix_and_offset, _linearized("matrix_of", jaxpr, x, None))


def _matrix_and_offset(linear: Any) -> tuple[jax.Array, jax.Array]:
    """Of the jaxpr from x to (tangent, offset)."""
    x, out = linear.in_avals[0], linear.out_avals[0]
    transposed = _transposed(linear, x, out) if _is_narrow(linear, x, out) else None
    if transposed is None:
        matrix, offset = carried(linear, [_identity(x)], [_matrix(x, out), jnp.ravel])
        return matrix, offset
    (offset,) = carried(linear, [None], [None, jnp.ravel])[1:]
    (matrix,) = carried(transposed, [_identity(out)], [_matrix(out, x)])
    return matrix.T, offset


def _transposed(linear: Any, x: Any, out: Any) -> Any:
    """The jaxpr of the transpose; None where JAX has none (of a scatter that may write a place twice)."""

    def tangent(x: Any) -> Any:
        return carried(linear, [x], [lambda y: y, None])[0]

    try:
        return jax.make_jaxpr(lambda y: jax.linear_transpose(tangent, x)(y)[0])(out)
    except NotImplementedError:
        return None


def local_affine(fn: Callable[[Any], Any], x: Any) -> Local:
    """``(A, b, radius)`` with ``fn(z).ravel() == A @ z.ravel() + b`` wherever ``||z - x|| < radius``.

    For piecewise linear networks: everything that :func:`matrix_of` takes, and ReLU, leaky ReLU, clipping,
    absolute values, maxima, max pooling. Each of these switches where some ``z_i`` crosses 0, so with all
    switches as at x the network is ``A = M_L D ... D_1 M_1``, and no switch turns nearer to x than
    ``radius = min over i of |z_i| / ||dz_i/dx||`` up to rounding (docs/maths.md, section 13).
    Further out it may, or may not matter.

    Cost: that of ``fn`` for ``in size`` examples at once, the first layer free.

    Args:
      fn: a function from one array to one array.
      x: the point, a real array.

    Returns:
      A named tuple ``(matrix, offset, radius)``: shapes ``(out size, in size)``, ``(out size,)``, ``()``.
      The radius is 0 where x lies on a boundary, and infinite for an affine function. All three are NaN
      where x or a value that decides a switch is. Jittable.

    Raises:
      ValueError: ``fn`` is not piecewise linear; the message names the primitive and where it is. Or A is
        beyond the memory limit.
      TypeError: x is not a single array of real floats, or the result not a single array.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> local = fc.local_affine(lambda x: jax.nn.relu(2 * x - 1), jnp.array([0.0, 3.0]))
    >>> print(local.matrix, local.offset, local.radius)
    [[0. 0.]
     [0. 2.]] [ 0. -1.] 0.5
    """
    with jax.default_matmul_precision("highest"):
        jaxpr, shape = _single(fn, x, "local_affine")
        if isinstance(x, jax.ShapeDtypeStruct) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"local_affine: x must be an array of real floats, got {x!r}. Cast it: x.astype(float)."
            )
        x = replicated(jnp.asarray(x))
        linear = _linearized("local_affine", jaxpr, shape, x)
        return Local(*compiled(_around, linear, x))


def _around(linear: Any, point: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(matrix, offset, radius)`` of the jaxpr from x to (tangents, values)."""
    x, out = linear.in_avals[0], linear.out_avals[0]
    switches = len(linear.out_avals) // 2 - 1
    finish = [_matrix(x, out), *[lambda z: z.norms()] * switches, *[lambda value: value] * (1 + switches)]
    matrix, *norms = carried(linear, [_identity(x)], finish)
    norms, (value, *differences) = norms[:switches], norms[switches:]
    product = jnp.matmul(matrix, point.ravel().astype(matrix.dtype))
    radii = [_nearest(z, n).astype(x.dtype) for z, n in zip(differences, norms, strict=True)]
    radius = least(jnp.stack(radii)) if radii else jnp.asarray(jnp.inf, x.dtype)
    # A switch at NaN has no side: its radius is NaN, and the map is none.
    unknown = jnp.isnan(radius)
    return nan_unless_finite(
        (matrix, value.ravel() - product, radius), point, jnp.where(unknown, radius, jnp.zeros_like(radius))
    )


def _nearest(values: Any, norms: Any) -> Any:
    """How far from x the first of these values crosses 0, given the norms of their gradients."""
    moving = norms != 0  # NaN too
    distance = abs(values) / jnp.where(moving, norms, jnp.ones((), norms.dtype))
    never = jnp.full(1, jnp.inf, distance.dtype)
    return least(jnp.append(jnp.where(moving, distance, never[0]).ravel(), never))


def _single(fn: Callable[[Any], Any], x: Any, name: str) -> tuple[Any, Any]:
    """The jaxpr of a function of one array, and shape and dtype of the argument."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(
            f"{name}: x must be one array, got {type(x).__name__}. Flatten a pytree with ravel_pytree."
        )
    if not isinstance(x, jax.ShapeDtypeStruct):
        x = jax.eval_shape(lambda: replicated(jnp.asarray(x)))  # with what its type says of devices
    jaxpr = trace(fn, (x,), {}).jaxpr
    outs = opened(jaxpr)[0].outvars
    if len(outs) != 1:
        raise TypeError(
            f"{name}: fn must return one array, got {len(outs)}. Return one of them, or ravel_pytree(...)[0]."
        )
    out = jax.ShapeDtypeStruct(outs[0].aval.shape, outs[0].aval.dtype)
    sizes = math.prod(out.shape), math.prod(x.shape)
    nbytes = math.prod(sizes) * out.dtype.itemsize
    if not fits_in_memory(nbytes):
        raise ValueError(
            f"{name}: the matrix is {sizes[0]:,} x {sizes[1]:,} {out.dtype} = {nbytes:,} bytes dense. "
            f"Use find_convs and as_bcoo layer by layer, or jaxconv_fc.memory_limit({nbytes})."
        )
    return jaxpr, x


def _is_narrow(linear: Any, x: Any, out: Any) -> bool:
    """Whether the transpose has fewer columns to carry; the first layer costs nothing in either direction."""
    layers = sum(eqn.primitive.name in _LAYERS for eqn in opened(linear)[0].eqns)
    small = math.prod(out.shape) < math.prod(x.shape)
    return small and layers > 1 and x.dtype == out.dtype and jnp.issubdtype(x.dtype, jnp.inexact)


def _identity(x: Any) -> Pick:
    return Pick(math.prod(x.shape), x.shape, x.dtype)


def _matrix(x: Any, out: Any) -> Callable[[Any], jax.Array]:
    """The matrix of a linear result; a constant one has the matrix 0."""
    shape = (math.prod(out.shape), math.prod(x.shape))

    def finish(result: Any) -> jax.Array:
        if not hasattr(result, "columns"):
            return jnp.zeros(shape, out.dtype)
        return result.columns().reshape(shape).astype(out.dtype)

    return finish


# -- the linear jaxpr --------------------------------------------------------------------------


class Value(NamedTuple):
    """A value that depends on x: its linear part as a function of x, traced, and what it is at the point.

    The value None is a symbolic zero, so that ``0 * inf`` never arises: a kernel may hold Inf.
    """

    tangent: Any
    value: Any


class Broken(NamedTuple):
    """A value that is not affine in x, and why; of no consequence unless the result needs it."""

    reason: str


def _linearized(name: str, jaxpr: Any, x: Any, point: Any) -> Any:
    """The jaxpr from x to (tangents, values): those of the result, then those of the switches.

    ``point`` None: the function must be affine, and the values are those at 0.
    """
    aval = opened(jaxpr)[0].outvars[0].aval

    def staged(tangent: Any) -> tuple[list[Any], list[Any]]:
        walk = _Walk(name, x, local=point is not None)
        (result,) = walk.run(jaxpr, [Value(tangent, point)])
        if isinstance(result, Broken):
            raise ValueError(result.reason)
        if not isinstance(result, Value):
            result = Value(zeros(aval), result)
        elif result.value is None:
            result = Value(result.tangent, zeros(aval))
        pairs = [result, *walk.switches]
        return [p.tangent for p in pairs], [p.value for p in pairs]

    return jax.make_jaxpr(staged)(x)


class _Walk:
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
        if not any(isinstance(v, Value | Broken) for v in values):
            return _known(bind, eqn, values)
        if name in _STATEMENTS:
            return _STATEMENTS[name](self, eqn, values)
        broken = next((v for v in values if isinstance(v, Broken)), None)
        if broken is not None:
            return [broken] * len(eqn.outvars)
        rule = self.rules.get(name, _Walk.broken)
        return rule(self, eqn, values)

    def broken(self, eqn: Any, values: Sequence[Any] = (), because: str = "") -> list[Any]:
        return [Broken(self.reason(eqn, because))] * len(eqn.outvars)

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
            tangents = bind(eqn, operands)
        else:
            tangents = [tangent]
        return self.paired(bind, eqn, values, data, tangents, rule.results)

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
        if isinstance(result, Broken) or eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
            return [result]
        if result.value is not None:
            return [Value(result.tangent, *_known(bind, eqn, list(map(_at_point, values))))]
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
        fixed, carried = scan_counts(eqn, body)
        carry, xs = list(values[fixed : fixed + carried]), values[fixed + carried :]
        outs = [v.aval for v in opened(body)[0].outvars[carried:]]
        steps = range(eqn.params["length"])
        rows: list[Any] = [None] * len(steps)
        for i in reversed(steps) if eqn.params["reverse"] else steps:
            results = self.run(body, [*values[:fixed], *carry, *(_entry(v, i) for v in xs)])
            carry, rows[i] = results[:carried], results[carried:]
        if not rows:
            return [*carry, *(zeros(v.aval) for v in eqn.outvars[carried:])]
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
        return _known(bind, eqn, list(map(_at_point, values)))

    def signed(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        self.switches.append(values[0])
        return _known(bind, eqn, [values[0].value])

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
        return [Value(lax.select(first, a, b), *_known(bind, eqn, list(map(_at_point, values))))]

    def clamped(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        low, x, high = values
        if not isinstance(x, Value) or isinstance(low, Value) or isinstance(high, Value):
            return self.broken(eqn, because=" with bounds that depend on x")
        self.switches += [Value(x.tangent, x.value - low), Value(x.tangent, x.value - high)]
        inside = (x.value >= low) & (x.value <= high)
        tangent = lax.select(inside, x.tangent, jnp.zeros_like(x.tangent))
        return [Value(tangent, *_known(bind, eqn, [low, x.value, high]))]

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
        result = _known(bind, eqn, [x.value])
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

    def __call__(self, walk: _Walk, eqn: Any, values: Sequence[Any]) -> list[Any]:
        return walk.linear(eqn, values, self)


class Bilinear(NamedTuple):
    """Linear in either of two operands, where all others are known."""

    factors: tuple[int, int] = (0, 1)
    results: int | None = None
    compute: Callable[..., list[Any]] = bind

    def __call__(self, walk: _Walk, eqn: Any, values: Sequence[Any]) -> list[Any]:
        return walk.bilinear(eqn, values, self)


def _convolve(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """A convolution of lax by our own product, which is right where lax is not."""
    spec, dtype = spec_of(eqn), eqn.outvars[0].aval.dtype
    x, kernel = (v.astype(dtype) for v in values)
    stack = stacked_product(spec, kernel, examples(spec, x), eqn.params["precision"])
    return [batched_output(spec, stack)]


def _same(walk: _Walk, eqn: Any, values: Sequence[Any]) -> list[Any]:
    return list(values)


def _of_real(rule: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A switch turns where a *real* value crosses 0."""

    def of_real(walk: _Walk, eqn: Any, values: Sequence[Any]) -> list[Any]:
        if any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in eqn.invars):
            return walk.broken(eqn, because=" of complex values")
        return rule(walk, eqn, values)

    return of_real


# Rules that take whatever operands there are, refused ones too: inside, these may be of no consequence.
_STATEMENTS: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys((*CALLS, "linear_call", "composite", "xla_metadata_call"), _Walk.call),
    "custom_linear_solve": _Walk.solve,
    "scan": _Walk.scan,
    "while": _Walk.while_loop,
    "cond": _Walk.cond,
    **dict.fromkeys(WRITES, _Walk.write),
}

_AFFINE: dict[str, Callable[..., list[Any]]] = {
    **{name: Linear(data) for name, data in MOVES.items()},
    "gather": _Walk.gathered,
    # The matrix is that of the values, whatever their derivative.
    **dict.fromkeys(("stop_gradient", "name", "xla_metadata_value"), _same),
    # sums
    **dict.fromkeys(("add", "sub", "add_any"), Linear(slice(None))),
    **dict.fromkeys(("neg", "reduce_sum", "reduce_window_sum", "cumsum", "shift_left"), Linear((0,))),
    **dict.fromkeys(("scatter-add", "scatter-sub"), Linear((0, 2))),
    "select_and_scatter_add": Linear((0,)),
    "select_and_gather_add": Linear((0,)),
    "psum": _Walk.summed_over_positions,
    # where an array lies
    **dict.fromkeys(("device_put", "sharding_constraint", "layout_constraint"), Linear(slice(None))),
    # dtypes and complex numbers
    "convert_element_type": _Walk.converted,
    **dict.fromkeys(("real", "imag", "conj", "complex"), _Walk.of_parts),
    "fft": _Walk.transformed,
    # products
    "mul": Bilinear(),
    "div": _Walk.divided,
    "integer_pow": _Walk.power,
    "pow": _Walk.power,
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
        **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), _Walk.compared),
        **dict.fromkeys(("max", "min"), _Walk.larger),
        "abs": _Walk.absolute,
        "sign": _Walk.signed,
        "clamp": _Walk.clamped,
        **dict.fromkeys(
            ("reduce_max", "reduce_min", "argmax", "argmin", "reduce_window_max", "reduce_window_min"),
            _Walk.extreme,
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
    return bind(eqn, [zeros(eqn.invars[0].aval), values[1]])


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
    return v if isinstance(v, Broken) else v[i]


def _stacked(values: Sequence[Any], aval: Any) -> Any:
    """The slices that a loop has made, put together."""
    broken = next((v for v in values if isinstance(v, Broken)), None)
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
    return not isinstance(value, Value | Broken | Tracer)

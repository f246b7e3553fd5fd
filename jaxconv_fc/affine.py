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
from jaxconv_fc.columns import MOVES, Pick, carried, compiled, moved_by, window_axes
from jaxconv_fc.numerics import least, nan_unless_finite
from jaxconv_fc.spec import fits_in_memory
from jaxconv_fc.tracing import (
    CALLS,
    Environment,
    batched_output,
    bind,
    examples,
    inner_jaxprs,
    opened,
    place_of,
    scan_counts,
    spec_of,
    trace,
)  # fmt: skip

# Which operands of an equation may depend on x, all at once, for its result to be linear in them (None: all).
_LINEAR: dict[str, tuple[int, ...] | None] = MOVES | {
    "neg": (0,), "add": None, "sub": None, "add_any": None, "reduce_sum": (0,), "reduce_window_sum": (0,),
    "cumsum": (0,), "scatter-add": (0, 2), "fft": (0,), "select_and_scatter_add": (0,),
    "triangular_solve": (1,), "device_put": None, "sharding_constraint": (0,),
}  # fmt: skip
_REAL_LINEAR = {"real": (0,), "imag": (0,), "conj": (0,), "complex": (0, 1)}  # linear where x is real
_BILINEAR = ("mul", "div", "dot_general", "conv_general_dilated", "conv_product")
_LAYERS = ("dot_general", "conv_product")
_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
_SWITCHES = (
    *_COMPARISONS, "max", "min", "abs", "sign", "clamp", "reduce_max", "reduce_min", "argmax", "argmin",
    "reduce_window_max", "reduce_window_min",
)  # fmt: skip


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
        return compiled(_matrix_and_offset, _linearized(_Walk("matrix_of", x), jaxpr, x, None))


def _matrix_and_offset(linear: Any) -> tuple[jax.Array, jax.Array]:
    """Of the jaxpr from x to (tangent, offset)."""
    x, out = linear.in_avals[0], linear.out_avals[0]
    if not _is_narrow(linear, x, out):
        matrix, offset = carried(linear, [_identity(x)], [_matrix(x, out), jnp.ravel])
        return matrix, offset
    (offset,) = carried(linear, [None], [None, jnp.ravel])[1:]

    def tangent(x: Any) -> Any:
        return carried(linear, [x], [lambda y: y, None])[0]

    transposed = jax.make_jaxpr(lambda y: jax.linear_transpose(tangent, x)(y)[0])(out)
    (matrix,) = carried(transposed, [_identity(out)], [_matrix(out, x)])
    return matrix.T, offset


def local_affine(fn: Callable[[Any], Any], x: Any) -> Local:
    """``(A, b, radius)`` with ``fn(z).ravel() == A @ z.ravel() + b`` wherever ``||z - x|| < radius``.

    For piecewise linear networks: everything that :func:`matrix_of` takes, and ReLU, leaky ReLU, clipping,
    absolute values, maxima, max pooling. Each of these switches where some ``z_i`` crosses 0, so with all
    switches as at x the network is ``A = M_L D ... D_1 M_1``, and no switch turns nearer to x than
    ``radius = min over i of |z_i| / ||dz_i/dx||`` (the boundary of ``z_i`` is a plane within that region).
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
        x = jnp.asarray(x)
        linear = _linearized(_Walk("local_affine", x, local=True), jaxpr, shape, x)
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
    x = jax.ShapeDtypeStruct(x.shape, x.dtype)
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

    The value None is a 0 that is never computed with, so that a kernel may hold Inf.
    """

    tangent: Any
    value: Any


class Broken(NamedTuple):
    """A value that is not affine in x, and why; of no consequence unless the result needs it."""

    reason: str


def _linearized(walk: _Walk, jaxpr: Any, x: Any, point: Any) -> Any:
    """The jaxpr from x to (tangents, values): those of the result, then those of the switches."""
    aval = opened(jaxpr)[0].outvars[0].aval

    def staged(tangent: Any) -> tuple[list[Any], list[Any]]:
        (result,) = walk.run(jaxpr, [Value(tangent, point)])
        if isinstance(result, Broken):
            raise ValueError(result.reason)
        if not isinstance(result, Value):
            result = Value(_zeros(aval), result)
        elif result.value is None:
            result = Value(result.tangent, _zeros(aval))
        pairs = [result, *walk.switches]
        return [p.tangent for p in pairs], [p.value for p in pairs]

    return jax.make_jaxpr(staged)(x)


class _Walk:
    """Goes through a jaxpr with values that depend on x, and values that do not."""

    def __init__(self, name: str, x: Any, *, local: bool = False):
        self.name, self.local = name, local
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
        if name in CALLS:
            self.calls.append(eqn)
            results = self.run(inner_jaxprs(eqn)[0], values)
            self.calls.pop()
            return results
        if name in ("scan", "while", "cond"):
            return getattr(self, f"_{name}")(eqn, values)
        broken = next((v for v in values if isinstance(v, Broken)), None)
        if broken is not None:
            return [broken] * len(eqn.outvars)
        if name in _LINEAR:
            return self.linear(eqn, values, _LINEAR[name])
        if name in _REAL_LINEAR and self.real:
            return self.linear(eqn, values, _REAL_LINEAR[name])
        if name in _BILINEAR:
            return self.bilinear(eqn, values)
        if name == "convert_element_type":
            return self.convert(eqn, values)
        if self.local and name in _SWITCHES:
            return self.switched(eqn, values)
        return self.broken(eqn)

    def broken(self, eqn: Any, because: str = "") -> list[Any]:
        kind = "piecewise linear" if self.local else "affine"
        place = next(filter(None, map(place_of, [eqn, *reversed(self.calls)])), "an unknown line")
        reason = f"{self.name}: fn is not {kind} in x: primitive {eqn.primitive.name!r}{because} at {place}."
        if not self.local and eqn.primitive.name in _SWITCHES:
            reason += " For a piecewise linear network use local_affine."
        return [Broken(reason)] * len(eqn.outvars)

    # -- linear equations ----------------------------------------------------------------------

    def linear(self, eqn: Any, values: Sequence[Any], data: tuple[int, ...] | None) -> list[Any]:
        """An equation linear in the operands ``data`` together, provided that the others are known."""
        data = data or tuple(range(eqn.primitive.name == "select_n", len(values)))
        if any(isinstance(v, Value) for i, v in enumerate(values) if i not in data):
            return self.broken(eqn, " with an index or a condition that depends on x")
        tangent = self.unchanged(eqn, values)
        if tangent is None:
            # What a gather fills in for an index out of range is known.
            params = eqn.params | {"fill_value": 0} if eqn.primitive.name == "gather" else None
            operands = [_tangent(v, a.aval) if i in data else v for i, (v, a) in _numbered(values, eqn)]
            tangents = bind(eqn, operands, params)
        else:
            tangents = [tangent]
        return list(map(Value, tangents, self.at_point(bind, eqn, values, data)))

    def unchanged(self, eqn: Any, values: Sequence[Any]) -> Any:
        """The tangent of a sum with something known, if that is the tangent of the other operand."""
        if eqn.primitive.name not in ("add", "sub") or all(isinstance(v, Value) for v in values):
            return None
        i = int(isinstance(values[1], Value))
        if eqn.invars[i].aval.shape != eqn.outvars[0].aval.shape:
            return None
        return -values[i].tangent if i and eqn.primitive.name == "sub" else values[i].tangent

    def at_point(
        self, compute: Callable[..., Any], eqn: Any, values: Sequence[Any], data: Sequence[int]
    ) -> Any:
        """What the results are at the point; None, for 0, if everything that is linear is 0 there."""
        if all(_is_zero(values[i]) for i in data):
            return [None] * len(eqn.outvars)
        return _known(compute, eqn, [_at_point(v, a.aval) for _, (v, a) in _numbered(values, eqn)])

    def bilinear(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """A product, linear in the one factor that depends on x."""
        name, factors = eqn.primitive.name, [i for i, v in enumerate(values) if isinstance(v, Value)]
        if len(factors) > 1:
            return self.broken(eqn, " of two values that depend on x")
        if name == "div" and factors == [1]:
            return self.broken(eqn, " by a value that depends on x")
        if name == "div" and not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
            return self.broken(eqn, " of integers")
        (i,) = factors
        compute = _convolve if name == "conv_general_dilated" else bind
        tangents = compute(eqn, [v.tangent if j == i else v for j, v in enumerate(values)])
        return list(map(Value, tangents, self.at_point(compute, eqn, values, (i,))))

    def convert(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        takes_part = jnp.issubdtype(before, jnp.complexfloating) and not jnp.issubdtype(
            after, jnp.complexfloating
        )
        to_integer = not jnp.issubdtype(after, jnp.inexact) and (
            jnp.issubdtype(before, jnp.inexact) or after == jnp.bool_
        )
        if (takes_part and not self.real) or to_integer:
            return self.broken(eqn, f" to {after}")
        return self.linear(eqn, values, (0,))

    # -- control flow --------------------------------------------------------------------------

    def _scan(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
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
            return [*carry, *(_zeros(v.aval) for v in eqn.outvars[carried:])]
        return [
            *carry,
            *(_stacked(column, aval) for column, aval in zip(zip(*rows, strict=True), outs, strict=True)),
        ]

    def _cond(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        index, branches = values[0], inner_jaxprs(eqn)
        if not _is_concrete(index):
            return self.broken(eqn, " whose branch depends on x or on a traced value")
        return self.run(branches[min(max(int(index), 0), len(branches) - 1)], values[1:])

    def _while(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        split, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = list(values[split + fixed :])
        while True:
            (going,) = self.run(cond, [*values[:split], *carry])
            if not _is_concrete(going):
                return self.broken(eqn, " whose length depends on x or on a traced value")
            if not going:
                return carry
            carry = self.run(body, [*values[split : split + fixed], *carry])

    # -- switches of piecewise linear functions --------------------------------------------------

    def switched(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """An equation that bends or jumps where a value crosses 0: what it is on this side."""
        name = eqn.primitive.name
        if name in _COMPARISONS:
            self.switches.append(_difference(eqn, values))
            return _known(bind, eqn, list(map(_at_point, values)))
        if name in ("max", "min"):
            return self.larger(eqn, values)
        if name == "clamp":
            return self.clamped(eqn, values)
        if name not in ("abs", "sign"):
            return self.extreme(eqn, values[0])
        (x,) = values
        self.switches.append(x)
        result = _known(bind, eqn, [x.value])
        if name == "sign":
            return result
        return [Value(lax.select(x.value >= 0, x.tangent, -x.tangent), *result)]

    def larger(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        shape = eqn.outvars[0].aval.shape
        difference = _difference(eqn, values)
        self.switches.append(difference)
        first = difference.value >= 0 if eqn.primitive.name == "max" else difference.value <= 0
        a, b = (jnp.broadcast_to(_tangent(v, u.aval), shape) for _, (v, u) in _numbered(values, eqn))
        return [Value(lax.select(first, a, b), *_known(bind, eqn, list(map(_at_point, values))))]

    def clamped(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        low, x, high = values
        if not isinstance(x, Value) or isinstance(low, Value) or isinstance(high, Value):
            return self.broken(eqn, " with bounds that depend on x")
        self.switches += [Value(x.tangent, x.value - low), Value(x.tangent, x.value - high)]
        inside = (x.value >= low) & (x.value <= high)
        tangent = lax.select(inside, x.tangent, jnp.zeros_like(x.tangent))
        return [Value(tangent, *_known(bind, eqn, [low, x.value, high]))]

    def extreme(self, eqn: Any, x: Value) -> list[Any]:
        """The largest or smallest of the candidates of every result; each other one is a switch."""
        name = eqn.primitive.name
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


# -- operands ----------------------------------------------------------------------------------


def _known(compute: Callable[..., list[Any]], eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Computed at once, where nothing in it is traced: a branch may hang on it."""
    with jax.ensure_compile_time_eval():
        return compute(eqn, values)


def _convolve(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """A convolution of lax by our own product, which is right where lax is not."""
    spec, dtype = spec_of(eqn), eqn.outvars[0].aval.dtype
    x, kernel = (v.astype(dtype) for v in values)
    stack = stacked_product(spec, kernel, examples(spec, x), eqn.params["precision"])
    return [batched_output(spec, stack)]


def _difference(eqn: Any, values: Sequence[Any]) -> Value:
    """``a - b`` of an equation that compares the two."""
    (a, b), aval = values, jnp.broadcast_shapes(*(v.aval.shape for v in eqn.invars))
    first, second = (jnp.broadcast_to(_at_point(v), aval) for v in (a, b))
    if isinstance(a, Value) != isinstance(b, Value):
        tangent = a.tangent if isinstance(a, Value) else -b.tangent
        return Value(jnp.broadcast_to(tangent, aval), first - second)
    return Value(jnp.broadcast_to(a.tangent, aval) - jnp.broadcast_to(b.tangent, aval), first - second)


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
    return value.tangent if isinstance(value, Value) else _zeros(aval)


def _at_point(value: Any, aval: Any = None) -> Any:
    if not isinstance(value, Value):
        return value
    return _zeros(aval) if value.value is None else value.value


def _is_zero(value: Any) -> bool:
    """Whether an operand is known to be 0 at the point: not by its entries, unless it is a plain scalar."""
    if isinstance(value, Value):
        return value.value is None
    return _is_concrete(value) and np.ndim(value) == 0 and not value


def _is_concrete(value: Any) -> bool:
    return not isinstance(value, Value | Broken | Tracer)


def _zeros(aval: Any) -> jax.Array:
    return jnp.zeros(aval.shape, aval.dtype)

"""The matrix of a whole function: affine ones exactly, piecewise linear ones at a point.

Every value that depends on x is carried through the jaxpr as ``A x + b``: the part ``b`` as an ordinary
array, the part A in the cheapest form that can hold it. As long as entries of x are only moved, copied,
dropped and scaled (padding, slicing, reshaping, concatenating, normalising), A is a *pick*: per entry the
number of the entry of x that it reads, and a weight. The first convolution or dense layer then makes the
columns of A straight from its kernel, and linear equations after it act on all columns at once. Nothing
is probed with unit vectors, so no Inf or NaN spreads beyond the entries it belongs to.

Where the output is smaller than the input the same is done with the transposed function, from the output
back: A^T has the fewer columns then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from jaxconv_fc import windows
from jaxconv_fc.apply import apply
from jaxconv_fc.dense import _columns, _grid, _kernel_out_first, _taps, as_matrix
from jaxconv_fc.spec import ConvSpec, check_dense
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

# Which operands of an equation may depend on x, all at once, for its result to be linear in them.
# Entries are moved, copied or dropped:
_MOVES = {
    "transpose": (0,), "broadcast_in_dim": (0,), "slice": (0,), "rev": (0,), "copy": (0,), "copy_p": (0,),
    "pad": (0, 1), "gather": (0,), "dynamic_slice": (0,), "dynamic_update_slice": (0, 1), "split": (0,), "unstack": (0,),
    "stop_gradient": (0,), "concatenate": None, "select_n": None, "optimization_barrier": None,
}  # fmt: skip
# Entries are added:
_SUMS = {
    "reduce_sum": (0,), "reduce_window_sum": (0,), "cumsum": (0,), "add_any": None, "scatter": (0, 2),
    "scatter-add": (0, 2), "fft": (0,), "reduce_precision": (0,), "sharding_constraint": (0,),
    "select_and_scatter_add": (0,), "triangular_solve": (1,),
}  # fmt: skip
_WINDOWED = ("reduce_window_sum", "pad", "slice", "transpose", "reduce_sum")
_RESHAPES = ("reshape", "squeeze", "expand_dims")
_REAL_LINEAR = ("real", "imag", "conj")  # linear in x where x is real
_LAYERS = ("dot_general", "conv_general_dilated", "conv_product")
_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")


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
    the function and never probed, and does not depend on the values of x.

    Args:
      fn: a function from one array to one array.
      x: an array, or a ``jax.ShapeDtypeStruct``: only shape and dtype count.

    Returns:
      A of shape ``(out size, in size)`` and b of shape ``(out size,)``, in the dtype of the result.
      Differentiable with respect to arrays that ``fn`` closes over, and jittable.

    Raises:
      ValueError: ``fn`` is not affine in x; the message names the primitive that broke it, and where.
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
    jaxpr, x = _single(fn, x, "matrix_of")
    run = _Run("matrix_of", x.dtype)
    out = opened(jaxpr)[0].outvars[0].aval
    size, out_size = math.prod(x.shape), math.prod(out.shape)
    # Windows stay small through a few layers; a deep network has every output read all of x.
    narrow = out_size < size and jnp.issubdtype(x.dtype, jnp.inexact) and _layers(jaxpr) > 3
    if not narrow:
        (result,) = run(jaxpr, [Value(Pick(size, x.dtype, x.shape), None)])
        return _columns_of(result, size, out), _offset_of(result, out)
    (result,) = run(jaxpr, [Value(Nothing(), None)])
    offset = _offset_of(result, out)
    if not isinstance(result, Value):
        return jnp.zeros((out_size, size), out.dtype), offset

    def linear(x: Any) -> Any:
        (result,) = _Run("matrix_of", x.dtype, offsets=False)(jaxpr, [Value(Direct(x), None)])
        return result.linear.array

    backward = jax.make_jaxpr(lambda y: jax.linear_transpose(linear, x)(y)[0])(
        jax.ShapeDtypeStruct(out.shape, out.dtype)
    )
    (result,) = run(backward, [Value(Pick(out_size, out.dtype, out.shape), None)])
    return _columns_of(result, out_size, x).T.astype(out.dtype), offset


def local_affine(fn: Callable[[Any], Any], x: Any) -> Local:
    """``(A, b, radius)`` with ``fn(z).ravel() == A @ z.ravel() + b`` wherever ``||z - x|| < radius``.

    For piecewise linear networks: everything that :func:`matrix_of` takes, and ReLU, leaky ReLU, clipping,
    absolute values, maxima, max pooling. Each of these switches where some ``z_i`` crosses 0, so with all
    switches as at x the network is ``A = M_L D ... D_1 M_1``, and no switch turns nearer to x than
    ``radius = min over i of |z_i| / ||dz_i/dx||`` (MATHS 6). Further out it may, or may not matter.

    Args:
      fn: a function from one array to one array.
      x: the point, a real array.

    Returns:
      A named tuple ``(matrix, offset, radius)``: shapes ``(out size, in size)``, ``(out size,)``, ``()``.
      The radius is 0 where x lies on a boundary, and infinite for an affine function.

    Raises:
      ValueError: ``fn`` is not piecewise linear; the message names the primitive and where it is.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> local = fc.local_affine(lambda x: jax.nn.relu(2 * x - 1), jnp.array([0.0, 3.0]))
    >>> print(local.matrix, local.offset, local.radius)
    [[0. 0.]
     [0. 2.]] [-0. -1.] 0.5
    """
    jaxpr, shape = _single(fn, x, "local_affine")
    if isinstance(x, jax.ShapeDtypeStruct) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"local_affine: x must be an array of real floats, got {x!r}.")
    x = jnp.asarray(x)
    run = _Run("local_affine", x.dtype, local=True)
    (result,) = run(jaxpr, [Value(Pick(x.size, x.dtype, x.shape), x)])
    out = opened(jaxpr)[0].outvars[0].aval
    matrix = _columns_of(result, x.size, out)
    value = result.value if isinstance(result, Value) else result
    product = jnp.matmul(matrix, x.ravel().astype(matrix.dtype), precision="highest")
    radius = jnp.min(jnp.stack(run.radii)) if run.radii else jnp.asarray(jnp.inf, x.dtype)
    return Local(matrix, value.ravel() - product, radius)


def _single(fn: Callable[[Any], Any], x: Any, name: str) -> tuple[Any, Any]:
    """The jaxpr of a function of one array, and the array's shape and dtype."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"{name}: x must be one array, got {type(x).__name__}. Flatten a pytree with ravel_pytree.")
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    jaxpr = trace(fn, (shape,), {}).jaxpr
    outs = opened(jaxpr)[0].outvars
    if len(outs) != 1:
        raise TypeError(f"{name}: fn must return one array, got {len(outs)}. Return one of them, or ravel_pytree(...)[0].")
    return jaxpr, shape


def _layers(jaxpr: Any) -> int:
    """How many convolutions and dense layers there are, those inside of calls and loops included."""
    count = 0
    for eqn in opened(jaxpr)[0].eqns:
        count += eqn.primitive.name in _LAYERS
        count += sum(map(_layers, inner_jaxprs(eqn))) * eqn.params.get("length", 1)
    return count


def _columns_of(result: Any, size: int, out: Any) -> jax.Array:
    if not isinstance(result, Value):
        return jnp.zeros((math.prod(out.shape), size), out.dtype)
    return result.linear.columns().reshape(math.prod(out.shape), size).astype(out.dtype)


def _offset_of(result: Any, out: Any) -> jax.Array:
    value = result.value if isinstance(result, Value) else result
    return (jnp.zeros(out.shape, out.dtype) if value is None else jnp.asarray(value)).ravel()


# -- the linear part of a value ----------------------------------------------------------------
#
# Four carriers of a linear map x -> value. `then` pushes a linear function of several of them through
# (`moved`: one that only moves entries); operands without a linear part are given as zeros.


@dataclass(frozen=True)
class Nothing:
    """No map at all: for a run that is only after the offset."""

    def then(self, fn: Callable[..., Any], operands: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
        return [self] * len(avals)

    moved = then

    def scaled(self, op: Any, factor: Any, aval: Any) -> Nothing:
        return self

    def reshaped(self, shape: tuple[int, ...]) -> Nothing:
        return self

    def cast(self, dtype: Any) -> Nothing:
        return self


@dataclass(frozen=True)
class Direct:
    """The value of the map itself, for x given as an array or tracer."""

    array: Any

    def then(self, fn: Callable[..., Any], operands: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
        return [Direct(v) for v in fn(*(o.array if isinstance(o, Direct) else o for o in operands))]

    moved = then

    def scaled(self, op: Any, factor: Any, aval: Any) -> Direct:
        return Direct(op(self.array, factor))

    def reshaped(self, shape: tuple[int, ...]) -> Direct:
        return Direct(self.array.reshape(shape))

    def cast(self, dtype: Any) -> Direct:
        return Direct(self.array.astype(dtype))


@dataclass(frozen=True)
class Columns:
    """The matrix: ``array[..., j]`` is the value for the j-th unit vector."""

    array: Any

    def then(self, fn: Callable[..., Any], operands: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
        return _on_columns(fn, operands)

    moved = then

    def scaled(self, op: Any, factor: Any, aval: Any) -> Columns:
        rank, size = len(aval.shape), self.array.shape[-1]
        array = self.array if self.array.ndim == rank + 1 else self.array.reshape(*[1] * rank, size)
        array = op(array, jnp.expand_dims(factor, -1) if jnp.ndim(factor) else factor)
        return Columns(jnp.broadcast_to(array, (*aval.shape, size)))

    def reshaped(self, shape: tuple[int, ...]) -> Columns:
        return Columns(self.array.reshape(*shape, self.array.shape[-1]))

    def cast(self, dtype: Any) -> Columns:
        return Columns(self.array.astype(dtype))

    def columns(self) -> Any:
        return self.array

    def norms(self) -> Any:
        return jnp.sqrt(jnp.sum(self.array * self.array, axis=-1))


@dataclass(frozen=True)
class Pick:
    """``value[i] = weights[i] * x[labels[i] - 1]``, and 0 where the label is 0.

    ``labels`` None is the identity (up to a reshape), ``weights`` None are ones.
    """

    size: int
    dtype: Any
    shape: tuple[int, ...]
    labels: Any = None
    weights: Any = None

    def then(self, fn: Callable[..., Any], operands: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
        return _on_columns(fn, operands)

    def moved(self, fn: Callable[..., Any], operands: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
        """What moves entries moves their labels and weights."""
        if any(isinstance(o, Columns | Windows) for o in operands):
            return self.then(fn, operands, avals)
        labels = fn(*(o.numbered() if isinstance(o, Pick) else jnp.zeros(o.shape, jnp.int32) for o in operands))
        weights: Any = [None] * len(avals)
        if any(isinstance(o, Pick) and o.weights is not None for o in operands):
            weights = fn(*(o.weighted() if isinstance(o, Pick) else o for o in operands))
        parts = zip(avals, labels, weights, strict=True)
        return [Pick(self.size, self.dtype, a.shape, label, weight) for a, label, weight in parts]

    def scaled(self, op: Any, factor: Any, aval: Any) -> Pick:
        labels, weights = self.labels, self.weighted()
        if self.shape != aval.shape:
            labels, weights = (jnp.broadcast_to(v, aval.shape) for v in (self.numbered(), weights))
        return Pick(self.size, self.dtype, aval.shape, labels, op(weights, factor))

    def reshaped(self, shape: tuple[int, ...]) -> Pick:
        labels, weights = (v if v is None else v.reshape(shape) for v in (self.labels, self.weights))
        return Pick(self.size, self.dtype, shape, labels, weights)

    def cast(self, dtype: Any) -> Pick:
        weights = None if self.weights is None else self.weights.astype(dtype)
        return Pick(self.size, dtype, self.shape, self.labels, weights)

    @property
    def is_identity(self) -> bool:
        return self.labels is None and self.weights is None

    def numbered(self) -> Any:
        if self.labels is not None:
            return self.labels
        return lax.iota(jnp.int32, self.size).reshape(self.shape) + jnp.int32(1)

    def weighted(self) -> Any:
        return jnp.ones(self.shape, self.dtype) if self.weights is None else self.weights

    def columns(self) -> Any:
        shape = (*self.shape, self.size)
        reads = jnp.expand_dims(self.numbered(), -1) == lax.broadcasted_iota(jnp.int32, shape, len(self.shape)) + 1
        weights = jnp.broadcast_to(jnp.expand_dims(self.weighted(), -1), shape)
        return jnp.where(reads, weights, jnp.zeros((), weights.dtype))

    def norms(self) -> Any:
        return jnp.where(self.numbered() > 0, abs(self.weighted()), jnp.zeros((), self.dtype))


@dataclass(frozen=True)
class Windows:
    """A matrix whose rows read windows of x (see :mod:`jaxconv_fc.windows`), of a value of any ``shape``
    with as many entries: flattening is put off."""

    frame: windows.Frame
    array: Any
    shape: tuple[int, ...]

    def then(self, fn: Callable[..., Any], operands: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
        return _on_columns(fn, operands)

    moved = then

    def scaled(self, op: Any, factor: Any, aval: Any) -> Any:
        if aval.shape != self.shape:
            return Columns(self.columns()).scaled(op, factor, aval)
        if jnp.ndim(factor):
            axes = range(self.frame.rank, self.array.ndim)
            factor = jnp.expand_dims(jnp.broadcast_to(factor, aval.shape).reshape(self.frame.shape), axes)
        return replace(self, array=op(self.array, factor))

    def reshaped(self, shape: tuple[int, ...]) -> Windows:
        frame = windows.with_shape(self.frame, shape)
        if frame is None:
            return replace(self, shape=shape)
        return Windows(frame, self.array.reshape(*shape, *self.array.shape[self.frame.rank :]), shape)

    def cast(self, dtype: Any) -> Windows:
        return replace(self, array=self.array.astype(dtype))

    def columns(self) -> Any:
        result = windows.columns(self.frame, self.array)
        return result.reshape(*self.shape, result.shape[-1])

    def norms(self) -> Any:
        squares = jnp.sum(self.array * self.array, axis=range(self.frame.rank, self.array.ndim))
        return jnp.sqrt(squares).reshape(self.shape)

    @property
    def is_open(self) -> bool:
        """Whether the axes of the value are those of the frame."""
        return self.shape == self.frame.shape


def _windows(linear: Any) -> Windows | None:
    """A linear part as windows, where it is one or can start as one."""
    if isinstance(linear, Pick) and linear.labels is None and linear.size:
        return Windows(*windows.whole(linear.shape, linear.weighted()), linear.shape)
    return linear if isinstance(linear, Windows) and linear.is_open else None


def _opened(result: tuple[windows.Frame, Any] | None) -> Any:
    """Windows, or columns as soon as windows have grown to the size of x."""
    if result is None:
        return None
    made = Windows(*result, result[0].shape)
    wide = math.prod(made.array.shape[made.frame.rank :]) >= 2 * math.prod(made.frame.in_shape)
    return Columns(made.columns()) if wide else made


def _on_columns(fn: Callable[..., Any], operands: Sequence[Any]) -> list[Any]:
    """A linear function on all columns at once; zeros are the same for all of them."""
    carried = [isinstance(o, Columns | Pick | Windows) for o in operands]
    arrays = [o.columns() if c else o for c, o in zip(carried, operands, strict=True)]
    return [Columns(v) for v in jax.vmap(fn, [-1 if c else None for c in carried], -1)(*arrays)]


# -- values and equations ----------------------------------------------------------------------


class Value(NamedTuple):
    """A value that depends on x: its linear part, and what it is at the point (None: 0).

    The point is 0 for :func:`matrix_of`, where the value is the offset, and x for :func:`local_affine`.
    """

    linear: Any
    value: Any


@dataclass(frozen=True)
class Broken:
    """A value that is not affine in x, and why; of no consequence unless the result needs it."""

    reason: str


class _Run:
    """Carries values through a jaxpr, equation by equation."""

    def __init__(self, name: str, dtype: Any, *, local: bool = False, offsets: bool = True):
        self.name, self.dtype, self.local, self.offsets = name, dtype, local, offsets
        self.radii: list[Any] = []  # of every switch, how far from x it turns
        self.calls: list[JaxprEqn] = []  # that the equation at hand lies in

    def __call__(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        results = self.run(jaxpr, arguments)
        for result in results:
            if isinstance(result, Broken):
                raise ValueError(result.reason)
        return results

    def run(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        env = Environment(jaxpr, arguments)
        for eqn in env.equations:
            values = env.read(eqn.invars)
            env.write(eqn.outvars, self.equation(eqn, values))
        return env.read(env.outvars)

    def equation(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        name = eqn.primitive.name
        if not any(isinstance(v, Value | Broken) for v in values):
            return bind(eqn, values)
        if name in CALLS:
            self.calls.append(eqn)
            results = self.run(inner_jaxprs(eqn)[0], values)
            self.calls.pop()
            return results
        if name in ("scan", "while", "cond"):
            return getattr(self, f"_{name}")(eqn, values)
        for value in values:
            if isinstance(value, Broken):
                return [value] * len(eqn.outvars)
        if name in _WINDOWED and (linear := self.windowed(eqn, values)) is not None:
            return [Value(linear, self.offset(eqn, values, (0, 1)[: len(values)])[0])]
        if name in _RESHAPES or (name == "broadcast_in_dim" and _adds_only_ones(eqn)):
            shape = eqn.outvars[0].aval.shape
            return [Value(values[0].linear.reshaped(shape), self.offset(eqn, values)[0])]
        if name in _MOVES or name in _SUMS:
            return self.linear(eqn, values)
        if name in _REAL_LINEAR and not jnp.issubdtype(self.dtype, jnp.complexfloating):
            return self.linear(eqn, values)
        if self.local and name in _COMPARISONS:
            self.switch(self.difference(eqn, values))
            return bind(eqn, list(map(_at_point, values)))
        rule = getattr(self, f"_{name}", None)
        if rule is None or (name in _LOCAL and not self.local):
            return self.broken(eqn)
        return rule(eqn, values)

    def broken(self, eqn: JaxprEqn, because: str = "") -> list[Any]:
        kind = "piecewise linear" if self.local else "affine"
        place = next(filter(None, map(place_of, [eqn, *reversed(self.calls)])), "an unknown line")
        reason = f"{self.name}: fn is not {kind} in x: primitive {eqn.primitive.name!r}{because} at {place}."
        if not self.local and eqn.primitive.name in (*_LOCAL, *_COMPARISONS):
            reason += " For a piecewise linear network use local_affine."
        return [Broken(reason)] * len(eqn.outvars)

    # -- linear equations ----------------------------------------------------------------------

    def linear(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """An equation linear in the operands its table lists, provided that the others are known."""
        name = eqn.primitive.name
        data = _MOVES.get(name, _SUMS.get(name, (0,)))
        data = range(name == "select_n", len(values)) if data is None else data
        if any(isinstance(v, Value) for i, v in enumerate(values) if i not in data):
            return self.broken(eqn, " with an index or a condition that depends on x")

        def on_data(*operands: Any) -> list[Any]:
            filled = list(values)
            for i, operand in zip(data, operands, strict=True):
                filled[i] = operand
            return bind(eqn, filled)

        return self.pushed(eqn, on_data, [values[i] for i in data], values, data, moves=name in _MOVES)

    def pushed(
        self, eqn: JaxprEqn, fn: Callable[..., Any], operands: Sequence[Any], values: Sequence[Any],
        data: Sequence[int], moves: bool = False,
    ) -> list[Any]:  # fmt: skip
        """The results of an equation whose linear part is ``fn`` of these operands."""
        avals = [v.aval for v in eqn.outvars]
        linears = _through(fn, operands, avals, moves)
        return list(map(Value, linears, self.offset(eqn, values, data)))

    def offset(self, eqn: JaxprEqn, values: Sequence[Any], data: Sequence[int] = (0,)) -> list[Any]:
        """What the results are at the point; None, for 0, if everything that is added is 0 there."""
        if not self.offsets or all(_is_zero(values[i]) for i in data):
            return [None] * len(eqn.outvars)
        return bind(eqn, [_at_point(v, a.aval) for v, a in zip(values, eqn.invars, strict=True)])

    def _add(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        (out,) = eqn.outvars
        carried = [v for v in values if isinstance(v, Value)]
        (offset,) = self.offset(eqn, values, (0, 1))
        shapes = [u.aval.shape for u, v in zip(eqn.invars, values, strict=True) if isinstance(v, Value)]
        if shapes == [out.aval.shape]:
            linear = carried[0].linear
            negative = eqn.primitive.name == "sub" and isinstance(values[1], Value)
            return [Value(_negative(linear, out.aval) if negative else linear, offset)]
        return [Value(self.combined(eqn, values), offset)]

    _sub = _add

    def combined(self, eqn: JaxprEqn, values: Sequence[Any]) -> Any:
        """The linear part of a sum or difference, scalars broadcast."""
        shape = np.broadcast_shapes(*(v.aval.shape for v in eqn.invars))
        op = lax.sub if eqn.primitive.name != "add" else lax.add

        def on_data(*operands: Any) -> list[Any]:
            return [op(*(jnp.broadcast_to(v, shape) for v in operands))]

        aval = jax.ShapeDtypeStruct(shape, eqn.invars[0].aval.dtype)
        operands = [v if isinstance(v, Value) else _zeros(a.aval) for v, a in zip(values, eqn.invars, strict=True)]
        return _through(on_data, operands, [aval], False)[0]

    def _neg(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        return [Value(_negative(values[0].linear, eqn.outvars[0].aval), self.offset(eqn, values)[0])]

    def _mul(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        if all(isinstance(v, Value) for v in values):
            return self.broken(eqn, " of two values that depend on x")
        i = int(isinstance(values[1], Value))
        op = lax.div if eqn.primitive.name == "div" else lax.mul
        if op is lax.div and (i == 1 or not jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact)):
            return self.broken(eqn, " by a value that depends on x" if i else " of integers")
        factor = jnp.asarray(values[1 - i], eqn.invars[1 - i].aval.dtype)
        op = jnp.divide if op is lax.div else jnp.multiply
        linear = values[i].linear.scaled(op, factor, eqn.outvars[0].aval)
        return [Value(linear, self.offset(eqn, values, (i,))[0])]

    _div = _mul

    def _convert_element_type(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        if not jnp.issubdtype(after, jnp.inexact) and (jnp.issubdtype(before, jnp.inexact) or after == bool):
            return self.broken(eqn, f" to {after}")
        return [Value(values[0].linear.cast(after), self.offset(eqn, values)[0])]

    def windowed(self, eqn: JaxprEqn, values: Sequence[Any]) -> Any:
        """The linear part by windows, where there are windows and they can tell it."""
        name, params = eqn.primitive.name, eqn.params
        linear = values[0].linear if isinstance(values[0], Value) else None
        if any(isinstance(v, Value) for v in values[1:]):
            return None
        if name == "reduce_window_sum":
            linear = _windows(linear)
            names = ("window_dimensions", "window_strides", "window_dilation", "padding", "base_dilation")
            slides = [windows.Slide(k, s, r, *pad) for k, s, r, pad, _ in zip(*map(params.get, names), strict=True)]
            taps = math.prod(params["window_dimensions"])
            if linear is None or max(params["base_dilation"]) > 1 or taps > windows.MOST_TAPS:
                return None
            return _opened(windows.pooled(linear.frame, linear.array, tuple(slides)))
        if not isinstance(linear, Windows) or not linear.is_open:
            return None
        frame, array = linear.frame, linear.array
        if name == "pad":
            return _opened(windows.padded(frame, array, params["padding_config"]))
        if name == "transpose":
            return _opened(windows.transposed(frame, array, params["permutation"]))
        if name == "reduce_sum":
            axes = tuple(params["axes"])
            ones = jnp.ones((1, *(frame.shape[a] for a in axes)), array.dtype)
            return self.contracted(linear, axes, ones).reshaped(eqn.outvars[0].aval.shape)
        steps = params["strides"] or (1,) * frame.rank
        return _opened(windows.sliced(frame, array, params["start_indices"], params["limit_indices"], steps))

    def contracted(self, linear: Windows, axes: tuple[int, ...], known: Any) -> Any:
        if any(len(linear.frame.tied(a)) > 1 for a in axes):
            return None
        return _opened(windows.contracted(linear.frame, linear.array, axes, known))

    # -- layers --------------------------------------------------------------------------------

    def _dot_general(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        i = self.only(values)
        if i is None:
            return self.broken(eqn, " of two values that depend on x")
        if isinstance(values[i].linear, Windows):
            linear = self.flat_layer(eqn, values[i].linear, values[1 - i], i)
            if linear is not None:
                return [Value(linear, self.offset(eqn, values, (i,))[0])]
        if isinstance(values[i].linear, Pick):
            out = eqn.outvars[0].aval
            array = _dense_layer(values[i].linear, values[1 - i], eqn.params["dimension_numbers"], i)
            return [Value(Columns(array.astype(out.dtype)), self.offset(eqn, values, (i,))[0])]
        return self.pushed(eqn, self.one(eqn, values, i), [values[i]], values, (i,))

    def flat_layer(self, eqn: JaxprEqn, linear: Windows, known: Any, i: int) -> Any:
        """A dense layer on windows, flattened or not: contracted axes must be whole groups of the frame's."""
        (contract, batch) = ((pair[i], pair[1 - i]) for pair in eqn.params["dimension_numbers"])
        groups = _groups(linear.shape, linear.frame.shape)
        if batch[0] or groups is None:
            return None
        axes = [a for c in contract[0] for a in groups[c]]
        free = [a for c in range(len(linear.shape)) if c not in contract[0] for a in groups[c]]
        if free != sorted(free):
            return None
        kept = [n for j, n in enumerate(known.shape) if j not in contract[1]]
        order = [*(j for j in range(known.ndim) if j not in contract[1]), *contract[1]]
        matrix = jnp.transpose(known, order).reshape(-1, *(linear.frame.shape[a] for a in axes))
        result = self.contracted(linear, tuple(axes), matrix)
        out = eqn.outvars[0].aval
        if result is None:
            return None
        if i == 0 and free and kept:  # the free axes of the left operand come first
            columns = result.columns()
            columns = columns.reshape(matrix.shape[0], -1, columns.shape[-1])
            result = Columns(jnp.swapaxes(columns, 0, 1))
        return result.reshaped(out.shape).cast(out.dtype)

    def _conv_product(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        i = self.only(values)
        if i is None:
            return self.broken(eqn, " of two values that depend on x")
        spec, out, batches = eqn.params["spec"], eqn.params["out"], eqn.params["batches"]
        linear = values[i].linear
        if i == 0 or out == "k" or any("k" in label for label in batches) or not isinstance(linear, Pick):
            return self.pushed(eqn, self.one(eqn, values, i), [values[i]], values, (i,))
        stack = linear.reshaped((-1, spec.in_size if out == "y" else spec.out_size))
        array = _convolution(self.name, spec, values[0], stack, transposed=out == "x")
        array = array.reshape(*eqn.outvars[0].aval.shape, linear.size)
        return [Value(Columns(array), self.offset(eqn, values, (i,))[0])]

    def _conv_general_dilated(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        i = self.only(values)
        if i is None:
            return self.broken(eqn, " of two values that depend on x")
        spec, out = spec_of(eqn), eqn.outvars[0].aval

        def convolve(x: Any, kernel: Any) -> Any:  # right where lax is not
            x, kernel = x.astype(out.dtype), kernel.astype(out.dtype)
            product = partial(apply, spec, kernel, precision=eqn.params["precision"])
            return batched_output(spec, jax.vmap(product)(examples(spec, x)))

        def one(operand: Any) -> list[Any]:
            return [convolve(operand, values[1]) if i == 0 else convolve(values[0], operand)]

        operand = values[i]
        offset = None if operand.value is None or not self.offsets else one(operand.value)[0]
        made = self.convolved(operand.linear, spec, values[1], out) if i == 0 else None
        if made is not None:
            return [Value(made, offset)]
        if i == 1 or not isinstance(operand.linear, Pick):
            return [Value(_through(one, [operand], [out], False)[0], offset)]
        (stack,) = operand.linear.moved(
            lambda x: [examples(spec, x).reshape(-1, spec.in_size)], [operand.linear],
            [jax.ShapeDtypeStruct((math.prod(operand.linear.shape) // max(1, spec.in_size), spec.in_size), out.dtype)],
        ) if spec.lhs_shape[spec.dimension_numbers.lhs_spec[0]] != spec.batch_group_count else [
            operand.linear.reshaped((1, spec.in_size))
        ]  # fmt: skip
        array = _convolution(self.name, spec, values[1].astype(out.dtype), stack.cast(out.dtype), transposed=False)
        array = batched_output(spec, array.reshape(-1, *spec.out_shape, stack.size))
        return [Value(Columns(array), offset)]

    def convolved(self, linear: Any, spec: ConvSpec, kernel: Any, out: Any) -> Any:
        linear = _windows(linear)
        if linear is None:
            return None
        return _opened(windows.convolved(linear.frame, linear.cast(out.dtype).array, spec, kernel.astype(out.dtype)))

    def only(self, values: Sequence[Any]) -> int | None:
        carried = [i for i, v in enumerate(values) if isinstance(v, Value)]
        return carried[0] if len(carried) == 1 else None

    def one(self, eqn: JaxprEqn, values: Sequence[Any], i: int) -> Callable[[Any], list[Any]]:
        return lambda operand: bind(eqn, [operand if j == i else v for j, v in enumerate(values)])

    # -- control flow --------------------------------------------------------------------------

    def _scan(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """A loop of known length, unrolled."""
        (body,) = inner_jaxprs(eqn)
        fixed, carried = scan_counts(eqn, body)
        carry, xs = list(values[fixed : fixed + carried]), values[fixed + carried :]
        arrays = [v.aval for v in eqn.invars[fixed + carried :]]
        slices = [v.aval for v in opened(body)[0].outvars[carried:]]
        length, stacks = eqn.params["length"], []
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            parts = [_mapped(partial(_entry, i), [x], [a]) for x, a in zip(xs, arrays, strict=True)]
            results = self.run(body, [*values[:fixed], *carry, *parts])
            carry, ys = results[:carried], results[carried:]
            stacks.append(ys)
        if not length:
            return [*carry, *(_zeros(v.aval) for v in eqn.outvars[carried:])]
        stacks = stacks[::-1] if eqn.params["reverse"] else stacks
        ys = zip(zip(*stacks, strict=True), slices, strict=True)
        return [*carry, *(_mapped(_stack, y, [a] * length) for y, a in ys)]

    def _cond(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        index, branches = values[0], inner_jaxprs(eqn)
        if isinstance(index, Value | Broken | jax.core.Tracer):
            return self.broken(eqn, " whose branch depends on x or on a traced value")
        return self.run(branches[min(max(int(index), 0), len(branches) - 1)], values[1:])

    def _while(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        split, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = list(values[split + fixed :])
        while True:
            (going,) = self.run(cond, [*values[:split], *carry])
            if isinstance(going, Value | Broken | jax.core.Tracer):
                return self.broken(eqn, " whose length depends on x or on a traced value")
            if not going:
                return carry
            carry = self.run(body, [*values[split : split + fixed], *carry])

    # -- switches of piecewise linear functions --------------------------------------------------

    def switch(self, difference: Value) -> None:
        """Note how far from x the first of these values crosses 0."""
        norms = difference.linear.norms()
        safe = jnp.where(norms > 0, norms, jnp.ones((), norms.dtype))
        distance = jnp.where(norms > 0, abs(difference.value) / safe, jnp.asarray(jnp.inf, norms.dtype))
        self.radii.append(jnp.min(distance, initial=jnp.inf).astype(self.dtype))

    def difference(self, eqn: JaxprEqn, values: Sequence[Any]) -> Value:
        a, b = (jnp.asarray(_at_point(v), u.aval.dtype) for v, u in zip(values, eqn.invars, strict=True))
        return Value(self.combined(eqn, values), a - b)

    def chosen(self, eqn: JaxprEqn, fn: Callable[..., Any], operands: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """The results of an equation that, with its switches as they are, moves entries by ``fn``."""
        linear = _through(fn, operands, [eqn.outvars[0].aval], True)[0]
        return [Value(linear, bind(eqn, list(map(_at_point, values)))[0])]

    def _max(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        difference = self.difference(eqn, values)
        self.switch(difference)
        first = difference.value >= 0 if eqn.primitive.name == "max" else difference.value <= 0
        shape = eqn.outvars[0].aval.shape

        def choose(a: Any, b: Any) -> list[Any]:
            return [lax.select_n(first, jnp.broadcast_to(b, shape), jnp.broadcast_to(a, shape))]

        operands = [v if isinstance(v, Value) else _zeros(u.aval) for v, u in zip(values, eqn.invars, strict=True)]
        return self.chosen(eqn, choose, operands, values)

    _min = _max

    def _abs(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        (x,), (out,) = values, eqn.outvars
        self.switch(x)
        return [Value(x.linear.scaled(jnp.multiply, jnp.sign(x.value), out.aval), abs(x.value))]

    def _sign(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        self.switch(values[0])
        return bind(eqn, [values[0].value])

    def _clamp(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        low, x, high = values
        if not isinstance(x, Value) or isinstance(low, Value) or isinstance(high, Value):
            return self.broken(eqn, " with bounds that depend on x")
        for bound in (low, high):
            self.switch(Value(x.linear, x.value - bound))
        inside = ((x.value >= low) & (x.value <= high)).astype(x.value.dtype)
        linear = x.linear.scaled(jnp.multiply, inside, eqn.outvars[0].aval)
        return [Value(linear, bind(eqn, [low, x.value, high])[0])]

    def _reduce_max(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        axes = eqn.params["axes"]
        kept = [i for i in range(len(eqn.invars[0].aval.shape)) if i not in axes]

        def gathered(v: Any, fill: Any) -> Any:
            v = jnp.transpose(v, (*kept, *axes))
            return v.reshape(*v.shape[: len(kept)], -1)

        return self.extreme(eqn, values[0], gathered)

    _reduce_min = _argmax = _argmin = _reduce_max

    def _reduce_window_max(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        return self.extreme(eqn, values[0], lambda v, fill: _window_entries(eqn.params, v, fill))

    _reduce_window_min = _reduce_window_max

    def extreme(self, eqn: JaxprEqn, x: Value, gathered: Callable[[Any, Any], Any]) -> list[Any]:
        """The largest or smallest of the candidates that ``gathered`` puts on the last axis."""
        name = eqn.primitive.name
        largest = name.endswith("max")
        candidates = gathered(x.value, jnp.asarray(-jnp.inf if largest else jnp.inf, x.value.dtype))
        index = jnp.expand_dims((jnp.argmax if largest else jnp.argmin)(candidates, axis=-1), -1)

        def chosen(v: Any) -> Any:
            return jnp.take_along_axis(gathered(v, jnp.zeros((), v.dtype)), index, axis=-1)

        def behind(v: Any) -> list[Any]:
            candidates = gathered(v, jnp.zeros((), v.dtype))
            return [jnp.broadcast_to(chosen(v), candidates.shape) - candidates]

        (linear,) = _through(behind, [x], [candidates], False)
        best = jnp.take_along_axis(candidates, index, axis=-1)
        self.switch(Value(linear, jnp.broadcast_to(best, candidates.shape) - candidates))
        if name.startswith("arg"):
            return bind(eqn, [x.value])
        return self.chosen(eqn, lambda v: [chosen(v)[..., 0]], [x], [x])


_LOCAL = (
    "max", "min", "abs", "sign", "clamp", "reduce_max", "reduce_min", "argmax", "argmin",
    "reduce_window_max", "reduce_window_min",
)  # fmt: skip


def _window_entries(params: dict[str, Any], v: Any, fill: Any) -> Any:
    """The entries of every pooling window, on a new last axis."""
    size, step, dilation = params["window_dimensions"], params["window_strides"], params["window_dilation"]
    pads = [(lo, hi, base - 1) for (lo, hi), base in zip(params["padding"], params["base_dilation"], strict=True)]
    v = lax.pad(v, fill, pads)
    counts = [(n - (k - 1) * r - 1) // s + 1 for n, k, s, r in zip(v.shape, size, step, dilation, strict=True)]
    taps = []
    for tap in np.ndindex(*size):
        start = [p * r for p, r in zip(tap, dilation, strict=True)]
        stop = [a + (m - 1) * s + 1 for a, m, s in zip(start, counts, step, strict=True)]
        taps.append(lax.slice(v, start, stop, step))
    return jnp.stack(taps, axis=-1)


# -- operands ----------------------------------------------------------------------------------


def _through(fn: Callable[..., Any], operands: Sequence[Any], avals: Sequence[Any], moves: bool) -> list[Any]:
    """The linear parts of ``fn`` of these operands; known ones have none, so they count as zeros."""
    linears = [v.linear if isinstance(v, Value) else jnp.zeros_like(v) for v in operands]
    lead = next(v.linear for v in operands if isinstance(v, Value))
    return (lead.moved if moves else lead.then)(fn, linears, avals)


def _entry(i: int, v: Any) -> list[Any]:
    return [v[i]]


def _stack(*values: Any) -> list[Any]:
    return [jnp.stack(values)]


def _mapped(fn: Callable[..., Any], operands: Sequence[Any], avals: Sequence[Any]) -> Any:
    """The one result of ``fn``, which moves entries, of operands that may or may not depend on x."""
    for operand in operands:
        if isinstance(operand, Broken):
            return operand
    if not any(isinstance(v, Value) for v in operands):
        return fn(*operands)[0]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    (linear,) = _through(fn, [v if isinstance(v, Value) else _zeros(a) for v, a in zip(operands, avals, strict=True)],
                         jax.eval_shape(fn, *shapes), moves=True)  # fmt: skip
    if all(map(_is_zero, operands)):
        return Value(linear, None)
    return Value(linear, fn(*map(_at_point, operands, avals))[0])


def _at_point(value: Any, aval: Any = None) -> Any:
    if not isinstance(value, Value):
        return value
    return _zeros(aval) if value.value is None else value.value


def _is_zero(value: Any) -> bool:
    """Whether an operand is known to be 0 at the point: not by its entries, unless it is a plain scalar."""
    if isinstance(value, Value):
        return value.value is None
    return not isinstance(value, jax.core.Tracer) and np.ndim(value) == 0 and not value


def _zeros(aval: Any) -> jax.Array:
    return jnp.zeros(aval.shape, aval.dtype)


def _negative(linear: Any, aval: Any) -> Any:
    return linear.scaled(jnp.multiply, jnp.asarray(-1, aval.dtype), aval)


def _adds_only_ones(eqn: JaxprEqn) -> bool:
    before, after = (v.aval.shape for v in (eqn.invars[0], eqn.outvars[0]))
    return math.prod(before) == math.prod(after)


def _groups(shape: Sequence[int], parts: Sequence[int]) -> list[list[int]] | None:
    """Per axis of ``shape`` the consecutive axes of ``parts`` that were flattened into it."""
    groups, i = [], 0
    for n in shape:
        group, product = [], 1
        while i < len(parts) and (product < n or (product == n == 1 and not group) or (parts[i] == 1 and product == n)):
            group.append(i)
            product *= parts[i]
            i += 1
        if product != n:
            return None
        groups.append(group)
    return groups if i == len(parts) else None


# -- the columns that a layer makes of a pick --------------------------------------------------


def _convolution(name: str, spec: ConvSpec, kernel: Any, stack: Pick, transposed: bool) -> Any:
    """``(examples, outputs, size)``: M (or M^T), its columns moved to the entries of x that they read."""
    count, outputs = stack.shape[0], spec.in_size if transposed else spec.out_size
    check_dense(name, spec, (count * outputs, stack.size), kernel.dtype, "find_convs, and as_bcoo for each")
    if stack.is_identity and count == 1 and stack.size == stack.shape[1]:
        matrix = as_matrix(spec, kernel)
        return (matrix.T if transposed else matrix)[None]
    weights = None if stack.weights is None else stack.weights
    return _scattered(spec, kernel, stack.numbered(), weights, size=stack.size, transposed=transposed)


@partial(jax.jit, static_argnames=("size", "transposed"))
def _scattered(spec: ConvSpec, kernel: Any, labels: Any, weights: Any, *, size: int, transposed: bool) -> Any:
    outputs = spec.in_size if transposed else spec.out_size
    dims = (spec.out_channels, spec.group_channels, *(a.out_size for a in spec.axes), *_taps(spec))
    if 0 in (*dims, size, *labels.shape):
        return jnp.zeros((labels.shape[0], outputs, size), kernel.dtype)
    grid, rank = _grid(dims, spec.index_dtype), len(spec.axes)
    d, i, positions, taps = grid[0], grid[1], grid[2 : 2 + rank], grid[2 + rank :]
    rows, columns = spec.row(positions, d), _columns(spec, d, i, positions, taps)
    values = jnp.expand_dims(_kernel_out_first(spec, kernel), range(2, 2 + rank))
    rows, columns, values = (jnp.broadcast_to(v, dims).ravel() for v in (rows, columns, values))
    reads, makes = (rows, columns) if transposed else (columns, rows)
    makes = jnp.where(columns < spec.in_size, makes, outputs)  # what reads padding is dropped
    reads = jnp.where(columns < spec.in_size, reads, 0)

    def example(labels: Any, weights: Any) -> Any:
        label = labels[reads]
        entries = values if weights is None else values * weights[reads]
        into = jnp.where(label > 0, label - 1, size)
        return jnp.zeros((outputs, size), kernel.dtype).at[makes, into].add(entries, mode="drop")

    return jax.vmap(example, (0, None if weights is None else 0))(labels, weights)


def _dense_layer(pick: Pick, other: Any, dimension_numbers: Any, i: int) -> Any:
    """The columns of ``dot_general`` with the pick as operand ``i``."""
    contract, batch = ((pair[i], pair[1 - i]) for pair in dimension_numbers)
    labels = _batch_free_contract(pick.numbered(), batch[0], contract[0])
    weights = _batch_free_contract(pick.weighted(), batch[0], contract[0])
    known = _batch_free_contract(other, batch[1], contract[1])
    array = _dense_entries(labels, weights, known, size=pick.size)  # (batch, free, other free, size)
    array = array if i == 0 else jnp.swapaxes(array, 1, 2)
    shapes = [_split(v.shape, b, c) for v, b, c in zip((pick, other), batch, contract, strict=True)]
    free = [s[1] for s in shapes][:: 1 if i == 0 else -1]
    return array.reshape(*shapes[0][0], *free[0], *free[1], pick.size)


def _split(shape: Sequence[int], batch: Sequence[int], contract: Sequence[int]) -> tuple[list[int], list[int]]:
    free = [n for i, n in enumerate(shape) if i not in (*batch, *contract)]
    return [shape[i] for i in batch], free


def _batch_free_contract(v: Any, batch: Sequence[int], contract: Sequence[int]) -> Any:
    free = [i for i in range(v.ndim) if i not in (*batch, *contract)]
    sizes = [math.prod(v.shape[i] for i in axes) for axes in (batch, free, contract)]
    return jnp.transpose(v, (*batch, *free, *contract)).reshape(sizes)


@partial(jax.jit, static_argnames="size")
def _dense_entries(labels: Any, weights: Any, known: Any, *, size: int) -> Any:
    into = jnp.where(labels > 0, labels - 1, size)

    def one(into: Any, weights: Any, known: Any) -> Any:
        zeros = jnp.zeros((known.shape[0], size), known.dtype)
        return zeros.at[:, into].add(known * weights[None], mode="drop")

    return jax.vmap(jax.vmap(one, (0, 0, None)))(into, weights, known)

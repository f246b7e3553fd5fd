"""A network as affine maps joined by activations.

In two steps. :func:`linearized`, with the rules of this file, leaves a jaxpr in which the activations are
equations of their own, ``activation`` of a tangent and an offset, and all others are linear. That jaxpr
becomes a graph of sparse matrices (``functions/sparse.py``). An affine layer is the matrix between an
activation and the activations before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.functions.equations import Operand, window_numbers
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    JaxprEqn,
    computes_the_same,
    inner_jaxprs,
    opaque,
    open_jaxpr,
    operand_avals,
    result_avals,
)
from jaxconv_fc.functions.linear_maps import as_csr
from jaxconv_fc.functions.linearize import (
    Linearizer,
    NotAffine,
    Rules,
    Value,
    at_point,
    is_concrete,
    not_affine,
    tangent_of,
)
from jaxconv_fc.functions.names import place_of
from jaxconv_fc.functions.network import AffineLayer, AffineLayers
from jaxconv_fc.functions.ravel import ravelled
from jaxconv_fc.functions.rules import AFFINE
from jaxconv_fc.functions.simplify import simplest
from jaxconv_fc.functions.sparse import Graph, Node


def affine_layers(fn: Callable[[Any], Any], x: Any) -> AffineLayers:
    """A network as affine layers joined by activations: ``z = sum_i matrices[i] @ h[inputs[i]] + offset``,
    ``h = activation(z)``.

    Every maximal affine part of ``fn`` between two activations is one layer, whatever it is made of:
    convolutions, padding, pooling, normalisation with fixed statistics, dense layers, skips, concatenations.
    Its matrices are SciPy CSR, as :func:`sparse_matrix_of` gives them. The result is a directed acyclic
    graph: ``inputs`` are numbers of earlier layers, and -1 is x.

    Activations, by name: ``relu``, ``leaky_relu``, ``clip`` (one-sided too), ``abs``, ``tanh``, ``sigmoid``,
    ``silu``, ``gelu``, ``elu``, ``softplus``, ``exp``, ``log``, ``sqrt``, ``square``, ``power`` and others of
    one number; ``max`` over windows or groups, ``mul`` of two values, ``where`` of a comparison with 0 and
    two values. The last three act on the last axis of z. A softmax, an attention or a gate is made of these.
    The numbers of an activation, such as its slope, are in ``parameters``.

    Args:
      fn: a function from a pytree of arrays to a pytree of arrays, such as a flax, equinox, haiku or keras
        model for inference. Bind parameters with ``functools.partial(apply, params)``.
      x: an input, or its shape (``jax.ShapeDtypeStruct``); a pytree of them. Values do not count.

    Returns:
      The layers, a sequence of :class:`AffineLayer`. The last one has no activation.
      ``layers.evaluate(x)`` is ``fn(x)`` in NumPy and SciPy, ``layers.bounds(low, high)`` are intervals of
      every z, and ``layers.to_lp(path, low, high)`` writes a mixed-integer program.

    Raises:
      ValueError: ``fn`` has another nonlinear function in it; the message names the primitive, and where it
        is. Or a matrix is beyond the memory limit.
      TypeError: x, or an array that ``fn`` closes over, is traced; x or the result has a part that is no
        array; ``fn`` computes in a dtype that SciPy cannot multiply.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> def net(x):
    ...     with jax.named_scope("edges"):
    ...         y = jax.nn.relu(jax.lax.conv(x, jnp.array([[[1., -1.]]]), (1,), "VALID"))
    ...     return y.sum() + x[0, 0, :1]
    >>> layers = fc.affine_layers(net, jnp.zeros((1, 1, 3)))
    >>> layers
       inputs  z  stored  activation  h      name
    0  x       2  4       relu        1x1x2  edges
    1  x, 0    1  3                   1
    >>> print(layers.evaluate(jnp.array([[[3., 1., 5.]]])))
    [5.]
    >>> low, high = layers.bounds(-1.0, 1.0)[-1]
    >>> print(low.round(3), high.round(3))
    [-1.] [5.]
    """
    graph = _LayerGraph("affine_layers")
    traced = ravelled(graph.name, fn, x)
    root, result, offset = graph.of(traced, _LAYERS, instead="local_affine")
    shape = traced.outs[0].shape if len(traced.outs) == 1 else traced.shape[:1]
    last = _Cut(result, offset, None, {}, shape, "")
    return AffineLayers(
        tuple(graph.layers([*graph.cuts, last], root)),
        in_shapes=tuple((tuple(v.shape), np.dtype(v.dtype)) for v in traced.xs),
        out_shapes=tuple((tuple(v.shape), np.dtype(v.dtype)) for v in traced.outs),
        in_tree=traced.x_tree,
        out_tree=traced.out_tree,
    )


# -- activations as equations ------------------------------------------------------------------------

_activation_p = opaque("activation")


class _Condition(NamedTuple):
    """Whether ``gap > 0`` (strict), or ``gap >= 0``."""

    gap: Value
    strict: bool


class _Clipped(NamedTuple):
    """The value is ``clip(z, low, high)``. Its maximum or minimum with a number is a clip of z too."""

    z: Value
    low: float
    high: float


def _activate(
    linearizer: Linearizer, eqn: JaxprEqn, name: str, z: Value, shape: Sequence[int], **parameters: Any
) -> Value:
    """The result of an activation: a new value that depends on x, 0 at the point."""
    aval = z.tangent
    offset = z.value if z.value is not None else jnp.zeros(aval.shape, aval.dtype)
    place = next(filter(None, map(place_of, [eqn, *reversed(linearizer.calls)])), "")
    tangent = _activation_p.bind(
        aval, offset, name=name, parameters=tuple(parameters.items()), place=place, shape=tuple(shape)
    )
    return Value(tangent, None)


def _real(rule: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Activations are of real floats."""

    def of_real(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in operand_avals(eqn) if a.dtype != jnp.bool_):
            return linearizer.broken(eqn, " of values that are no real floats")
        return rule(linearizer, eqn, values)

    return of_real


def _unless_affine(name: str, operands: tuple[int, ...], rule: Callable[..., list[Any]]) -> Any:
    """The rule, where all of these operands depend on x and are floats; else that of affine functions."""

    def chosen(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        depend = all(isinstance(values[i], Value) for i in operands)
        if depend and jnp.issubdtype(result_avals(eqn)[0].dtype, jnp.floating):
            return rule(linearizer, eqn, values)
        return AFFINE.rules[name](linearizer, eqn, values)

    return chosen


def _named(name: str, **parameters: Any) -> Callable[..., list[Any]]:
    """An equation that is an activation."""

    def rule(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        return [_activate(linearizer, eqn, name, values[0], result_avals(eqn)[0].shape, **parameters)]

    return rule


def _integer_power(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    exponent = eqn.params["y"]
    if exponent in (0, 1):
        return AFFINE.rules["integer_pow"](linearizer, eqn, values)
    if exponent == 2:
        return _named("square")(linearizer, eqn, values)
    return _named("power", exponent=float(exponent))(linearizer, eqn, values)


def _power(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    exponent = None if isinstance(values[1], Value) else _uniform(values[1])
    if exponent is None:
        return linearizer.broken(eqn, " with exponents that differ or depend on x")
    if exponent in (0, 1):
        return AFFINE.rules["pow"](linearizer, eqn, values)
    return _named("power", exponent=exponent)(linearizer, eqn, values)


def _uniform(value: Any) -> float | None:
    """The number that every entry of a known array is; None if they differ, or if the array is traced."""
    if not is_concrete(value) or not np.size(value):
        return None
    entries = np.asarray(value).ravel()
    return float(entries[0]) if (entries == entries[0]).all() else None


def _stacked(eqn: JaxprEqn, values: Sequence[Any], shape: Sequence[int]) -> Value:
    """Operands side by side along a new last axis."""
    pairs = list(zip(values, operand_avals(eqn), strict=True))
    out = jax.ShapeDtypeStruct(tuple(shape), result_avals(eqn)[0].dtype)
    return _side_by_side(
        [(jnp.broadcast_to(tangent_of(v, a), out.shape), _known(v, a, out)) for v, a in pairs]
    )


def _side_by_side(pairs: Sequence[tuple[Any, Any]]) -> Value:
    """Tangents and values, each along a new last axis."""
    tangents, offsets = zip(*pairs, strict=True)
    return Value(jnp.stack(tangents, -1), jnp.stack(offsets, -1))


def _known(v: Any, aval: Any, out: Any) -> Any:
    """The value at 0, of the shape of the result."""
    return jnp.broadcast_to(at_point(v, aval), out.shape).astype(out.dtype)


def _larger_or_smaller(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A maximum with 0 is a relu. A maximum and a minimum with numbers are one clip."""
    out, largest = result_avals(eqn)[0], eqn.primitive.name == "max"
    i = 0 if isinstance(values[0], Value) else 1
    bound = None if isinstance(values[1 - i], Value) else _uniform(values[1 - i])
    if bound is not None and operand_avals(eqn)[i].shape == out.shape:
        low, high, z = (bound, math.inf, values[i]) if largest else (-math.inf, bound, values[i])
        clipped = z.mark if isinstance(z.mark, _Clipped) else _Clipped(z, -math.inf, math.inf)
        if low <= clipped.low and high >= clipped.high:
            return [z]
        if clipped.low <= bound <= clipped.high:  # else the result is the bound
            z, low, high = clipped.z, max(low, clipped.low), min(high, clipped.high)
        if (low, high) == (0, math.inf):
            result = _activate(linearizer, eqn, "relu", z, out.shape)
        else:
            result = _activate(linearizer, eqn, "clip", z, out.shape, low=low, high=high)
        return [result._replace(mark=_Clipped(z, low, high))]
    return [_largest(linearizer, eqn, _stacked(eqn, values, out.shape), largest)]


def _largest(linearizer: Linearizer, eqn: JaxprEqn, z: Value, largest: bool) -> Value:
    """The maximum over the last axis, or the minimum: ``-max(-z)``."""
    shape = result_avals(eqn)[0].shape
    if largest:
        return _activate(linearizer, eqn, "max", z, shape)
    negative = Value(-z.tangent, None if z.value is None else -z.value)
    return Value(-_activate(linearizer, eqn, "max", negative, shape).tangent, None)


def _extreme(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The maximum or minimum over windows or axes. Padding in a window counts as another of its entries."""
    (x,), name = values, eqn.primitive.name
    shape = operand_avals(eqn)[0].shape
    if name.startswith("reduce_window"):
        numbers = window_numbers(eqn.params, shape)
        numbers = np.where(numbers < 0, numbers.max(-1, keepdims=True), numbers)
    else:
        axes = eqn.params["axes"]
        kept = [i for i in range(len(shape)) if i not in axes]
        numbers = np.arange(math.prod(shape)).reshape(shape).transpose((*kept, *axes))
        numbers = numbers.reshape(*(shape[i] for i in kept), -1)
    if not numbers.size or numbers.min() < 0:
        return linearizer.broken(eqn, " of windows that hold no entry")
    tangent = jnp.ravel(x.tangent)[numbers]
    value = None if x.value is None else jnp.ravel(x.value)[numbers]
    return [_largest(linearizer, eqn, Value(tangent, value), name.endswith("max"))]


def _clamp(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    low, x, high = values
    bounds = [None if isinstance(v, Value) else _uniform(v) for v in (low, high)]
    if None in bounds or not isinstance(x, Value):
        return linearizer.broken(eqn, " with bounds that differ or depend on x")
    parameters = dict(zip(("low", "high"), bounds, strict=True))
    return [_activate(linearizer, eqn, "clip", x, result_avals(eqn)[0].shape, **parameters)]


def _product(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    out = result_avals(eqn)[0]
    if values[0].tangent is values[1].tangent and values[0].value is values[1].value:
        return [_activate(linearizer, eqn, "square", values[0], out.shape)]
    return [_activate(linearizer, eqn, "mul", _stacked(eqn, values, out.shape), out.shape)]


def _quotient(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    out, avals = result_avals(eqn)[0], operand_avals(eqn)
    inverse = _activate(linearizer, eqn, "power", values[1], avals[1].shape, exponent=-1.0)
    if isinstance(values[0], Value):
        return [_activate(linearizer, eqn, "mul", _stacked(eqn, [values[0], inverse], out.shape), out.shape)]
    return [Value(jnp.asarray(values[0]) * inverse.tangent, None)]


def _dense(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """``[b, f, g] = sum_c left[b, f, c] right[b, g, c]`` of two values: all products, then their sums."""
    out = result_avals(eqn)[0]
    contract, batch = eqn.params["dimension_numbers"]
    parts = []
    for i, (v, aval) in enumerate(zip(values, operand_avals(eqn), strict=True)):
        free = [a for a in range(len(aval.shape)) if a not in (*batch[i], *contract[i])]
        sizes = [math.prod(aval.shape[a] for a in axes) for axes in (batch[i], free, contract[i])]
        order = (*batch[i], *free, *contract[i])
        pair = v.tangent, _known(v, aval, aval)
        parts.append([jnp.transpose(a, order).reshape(sizes) for a in pair])
    (left, left_value), (right, right_value) = parts
    dims = (*left.shape[:2], right.shape[1], left.shape[2])
    pairs = [
        (jnp.broadcast_to(t, dims), jnp.broadcast_to(o, dims))
        for t, o in ((left[:, :, None], left_value[:, :, None]), (right[:, None], right_value[:, None]))
    ]
    products = _activate(linearizer, eqn, "mul", _side_by_side(pairs), dims)
    return [Value(products.tangent.sum(-1).reshape(out.shape), None)]


def _comparison(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A condition, by which :func:`_select` chooses. It is no number of a layer."""
    (refused,) = linearizer.broken(eqn)
    name, shape = eqn.primitive.name, result_avals(eqn)[0].shape
    out = jax.ShapeDtypeStruct(shape, operand_avals(eqn)[0].dtype)
    a, b = (
        (jnp.broadcast_to(tangent_of(v, aval), out.shape), _known(v, aval, out))
        for v, aval in zip(values, operand_avals(eqn), strict=True)
    )
    first, second = (a, b) if name[0] == "g" else (b, a)  # gt, ge: a - b is above 0; lt, le: b - a
    gap = Value(first[0] - second[0], first[1] - second[1])
    return [NotAffine(refused.reason, _Condition(gap, strict=name.endswith("t")))]


def _select(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    which, *cases = values
    broken = not_affine(values)
    if broken is None:
        return AFFINE.rules["select_n"](linearizer, eqn, values)
    condition = which.condition if isinstance(which, NotAffine) else None
    out, (_, *avals) = result_avals(eqn)[0], operand_avals(eqn)
    if (
        condition is None
        or not_affine(cases) is not None
        or not jnp.issubdtype(out.dtype, jnp.floating)
        or condition.gap.tangent.shape != out.shape
    ):
        return [broken]
    no, yes = (
        (jnp.broadcast_to(tangent_of(v, a), out.shape), _known(v, a, out))
        for v, a in zip(cases, avals, strict=True)
    )
    gap = condition.gap.tangent.astype(out.dtype), condition.gap.value.astype(out.dtype)
    z = _side_by_side([gap, yes, no])
    return [_activate(linearizer, eqn, "where", z, out.shape, strict=condition.strict)]


# -- activations that JAX writes as calls --------------------------------------------------------------

# Name of the call -> (name of the activation, the function, the names of its other operands, parameters).
_CALLED: dict[str, list[tuple[str, Callable[..., Any], tuple[str, ...], dict[str, Any]]]] = {
    "silu": [("silu", jax.nn.silu, (), {})],
    "softplus": [("softplus", jax.nn.softplus, (), {})],
    "hard_tanh": [("clip", jax.nn.hard_tanh, (), {"low": -1.0, "high": 1.0})],
    "elu": [("elu", jax.nn.elu, ("alpha",), {}), ("elu", jax.nn.elu, (), {"alpha": 1.0})],
}


def _call(linearizer: Linearizer, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """A call of a function of ``jax.nn`` is an activation if it computes what that computes."""
    if values and isinstance(values[0], Value):
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in operand_avals(eqn)]
        for name, function, others, parameters in _CALLED.get(eqn.params.get("name", ""), ()):
            numbers = [_uniform(v) for v in values[1:] if not isinstance(v, Value | NotAffine)]
            if len(others) != len(values) - 1 or len(numbers) != len(others) or None in numbers:
                continue
            known = _traced_call(function, tuple(avals))
            if known is not None and computes_the_same(known, inner_jaxprs(eqn)[0]):
                given = parameters | dict(zip(others, numbers, strict=True))
                return _real(_named(name, **given))(linearizer, eqn, values)
    return AFFINE.control[eqn.primitive.name](linearizer, eqn, values)


@lru_cache(128)
def _traced_call(function: Callable[..., Any], avals: tuple[Any, ...]) -> Any:
    """The jaxpr inside of the one call that a function of these arguments is."""
    equations = open_jaxpr(jax.make_jaxpr(function)(*avals))[0].eqns
    return inner_jaxprs(equations[0])[0] if len(equations) == 1 and inner_jaxprs(equations[0]) else None


_SAME_NAME = """
    tanh exp exp2 expm1 log log1p sqrt cbrt erf erfc sin cos sinh cosh asinh atan abs sign square floor
    ceil"""
_ELEMENTWISE = {name: name for name in _SAME_NAME.split()} | {"logistic": "sigmoid"}

_LAYERS = Rules(
    kind="made of affine maps and known activations",
    control={
        **AFFINE.control,
        **dict.fromkeys([n for n in AFFINE.control if n in CALLS], _call),
        "select_n": _select,
    },
    rules={
        **AFFINE.rules,
        **{name: _real(_named(activation)) for name, activation in _ELEMENTWISE.items()},
        **{
            name: _real(rule)
            for name, rule in {
                "rsqrt": _named("power", exponent=-0.5),
                "reciprocal": _named("power", exponent=-1.0),
                **dict.fromkeys(("max", "min"), _larger_or_smaller),
                **dict.fromkeys(
                    ("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"), _extreme
                ),
                "clamp": _clamp,
                **dict.fromkeys(("gt", "ge", "lt", "le"), _comparison),
            }.items()
        },
        "mul": _unless_affine("mul", (0, 1), _product),
        "div": _unless_affine("div", (1,), _quotient),
        "dot_general": _unless_affine("dot_general", (0, 1), _dense),
        "integer_pow": _integer_power,
        "pow": _power,
    },
    refused=AFFINE.refused,
    advice={},
)


# -- from the graph to layers --------------------------------------------------------------------------


class _Cut(NamedTuple):
    """Where a layer ends."""

    z: Node
    offset: np.ndarray
    activation: str | None
    parameters: dict[str, Any]
    shape: tuple[int, ...]
    place: str
    h: Node | None = None


class _LayerGraph(Graph):
    """A graph of sparse matrices that is cut at the activations."""

    def __init__(self, name: str):
        super().__init__(name)
        self.cuts: list[_Cut] = []

    def equation(self, eqn: JaxprEqn, values: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        if eqn.primitive.name != _activation_p.name:
            return super().equation(eqn, values, used)
        z, offset = values
        aval, params = result_avals(eqn)[0], eqn.params
        if not isinstance(z, Node):  # its tangent is 0
            z = Node(Operand(np.shape(z), np.dtype(aval.dtype)))
        h = Node(Operand(aval.shape, self.usable(eqn, aval.dtype)))
        parameters = dict(params["parameters"])
        self.cuts.append(
            _Cut(z, np.ravel(offset), params["name"], parameters, aval.shape, params["place"], h)
        )
        return [h]

    def layers(self, cuts: Sequence[_Cut], root: Node) -> list[AffineLayer]:
        """The layers that the last one depends on, in order."""
        numbers = {root: -1} | {cut.h: i for i, cut in enumerate(cuts) if cut.h is not None}

        @cache
        def layer(i: int) -> AffineLayer:
            cut = cuts[i]
            dtype = cut.z.operand.dtype
            maps = self.between(cut.z, numbers.keys())
            terms = sorted(
                ((numbers[n], as_csr(m, dtype)) for n, m in maps.items()), key=lambda term: term[0]
            )
            inputs, matrices = zip(*terms, strict=True) if terms else ((), ())
            offset = np.asarray(cut.offset, dtype)
            made = AffineLayer(inputs, matrices, offset, cut.activation, cut.shape, cut.place, cut.parameters)
            return simplest(made, layer)

        needed, front = {len(cuts) - 1}, [len(cuts) - 1]
        while front:
            before = set(layer(front.pop()).inputs) - {-1} - needed
            needed |= before
            front += before
        order = {-1: -1} | {i: place for place, i in enumerate(sorted(needed))}
        return [layer(i)._replace(inputs=tuple(order[n] for n in layer(i).inputs)) for i in sorted(needed)]

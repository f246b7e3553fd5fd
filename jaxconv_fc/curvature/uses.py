"""Where a function uses its parameters, and what each use contributes to the gradient of every example.

The function is traced for one example, and evaluated for a stack of them: a value that depends on examples
has one more axis in front, and an equation of such values is mapped over it. A *use* is an equation where a
parameter meets values of examples:

- a *layer* is a convolution or a product of matrices whose kernel is a parameter, moved and cast at most. Its
  per-example gradient is ``X_n^T y_n``. It is never made: a *meter* reads what is wanted of it (norms, inner
  products, factors) from the inputs and cotangents of the layer. The meter is an operand of the layer that
  changes nothing, and its cotangent is the reading.
- of any other use every example gets a copy of the parameter, ``parameter + 0``, and the cotangents of the
  zeros are the gradients. A parameter with several uses is of this kind too: its gradients are added.

So one backward pass reads all meters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxconv_fc.functions.convolutions import examples, product_of
from jaxconv_fc.functions.find import spec_of
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    JaxprEqn,
    eval_eqn,
    evaluate,
    holds,
    inner_jaxprs,
    operand_avals,
    result_avals,
)
from jaxconv_fc.functions.names import nested, place_of
from jaxconv_fc.geometry.spec import ConvSpec, conv_spec
from jaxconv_fc.products.product import kernel_vjp

# Moves of entries: the norm of a gradient is that of the gradient of what is moved.
MOVES = frozenset({"convert_element_type", "copy", "expand_dims", "reshape", "rev", "squeeze", "transpose"})
LAYERS = frozenset({"conv_general_dilated", "conv_product", "dot_general"})
Meter = Callable[..., Any]  # of a layer, its kernel, xs and y_bars

OPENED = CALLS - {"custom_jvp_call", "custom_vjp_call", "custom_vmap_call"}  # those with rules of their own


class Layer(NamedTuple):
    """A layer as a convolution: the stacks, per example, that its equation reads and makes."""

    spec: ConvSpec
    which: int  # the operand that is the kernel
    inputs: Callable[[jax.Array], jax.Array]  # the other operand of one example -> x
    outputs: Callable[[jax.Array], jax.Array]  # the result of one example -> y
    kernel: Callable[[jax.Array], jax.Array]  # the kernel, as the spec has it
    types: tuple[Any, Any]  # of the kernel; of inputs and cotangents

    def blank(self, meter: Meter, count: int) -> Any:
        """Zeros like what a meter reads of so many examples."""
        kernel, dtype = self.types
        stacks = (jax.ShapeDtypeStruct((count, *s), dtype) for s in (self.spec.in_shape, self.spec.out_shape))
        read = jax.eval_shape(partial(meter, self), kernel, *stacks)
        return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), read)


def layer_of(eqn: JaxprEqn, which: int) -> Layer | None:
    """The layer that an equation of one example is, with operand ``which`` as its kernel, or None."""
    x, y = operand_avals(eqn)[1 - which], result_avals(eqn)[0]
    narrow = not jnp.issubdtype(x.dtype, jnp.inexact) or y.dtype.itemsize > x.dtype.itemsize
    kernel = operand_avals(eqn)[which]
    types = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype), y.dtype if narrow else x.dtype
    if eqn.primitive.name == "dot_general":
        return _dense(eqn, which, types)
    if which != (1 if eqn.primitive.name == "conv_general_dilated" else 0):
        return None
    if eqn.primitive.name == "conv_product":
        spec, batches = eqn.params["spec"], eqn.params["batches"]
        if eqn.params["out"] != "y" or any(batch != "xy" for batch in batches):
            return None
        stacked = lambda v, shape: v.reshape(-1, *shape)  # noqa: E731
        count = math.prod(operand_avals(eqn)[1].shape[: len(batches)])
        inputs, outputs = partial(stacked, shape=spec.in_shape), partial(stacked, shape=spec.out_shape)
    else:
        spec = spec_of(eqn)
        batch = spec.dimension_numbers.out_spec[0]
        count = result_avals(eqn)[0].shape[batch]
        inputs, outputs = partial(examples, spec), lambda y: jnp.moveaxis(y, batch, 0)
    if count == 1:
        return Layer(spec, which, lambda x: inputs(x)[0], lambda y: outputs(y)[0], lambda k: k, types)
    if spec.batch_group_count > 1:
        return None
    return Layer(_with_axis(spec, count), which, inputs, outputs, lambda k: k[None], types)


def _with_axis(spec: ConvSpec, count: int) -> ConvSpec:
    """The geometry of several inputs of one example: one more spatial axis in front, with one tap."""

    def behind(order: Sequence[int]) -> tuple[int, ...]:  # the batch is first then, and the axis second
        batch, feature, *spatial = order
        return (0, *(i + 2 - (i > batch) for i in (feature,)), 1, *(i + 2 - (i > batch) for i in spatial))

    numbers = spec.dimension_numbers
    feature, channel, *taps = (i + 1 for i in numbers.rhs_spec)
    return replace(
        spec,
        lhs_shape=(1, count, *spec.in_shape),
        rhs_shape=(1, *spec.rhs_shape),
        window_strides=(1, *spec.window_strides),
        padding=((0, 0), *spec.padding),
        lhs_dilation=(1, *spec.lhs_dilation),
        rhs_dilation=(1, *spec.rhs_dilation),
        dimension_numbers=lax.ConvDimensionNumbers(
            behind(numbers.lhs_spec), (feature, channel, 0, *taps), behind(numbers.out_spec)
        ),
    )


def _dense(eqn: JaxprEqn, which: int, types: tuple[Any, Any]) -> Layer | None:
    """A product of matrices as a convolution without spatial axes, or with one of as many positions."""
    contracting, batch = eqn.params["dimension_numbers"]
    if batch[0] or batch[1]:
        return None
    shapes = [v.shape for v in operand_avals(eqn)]
    free = [[i for i in range(len(s)) if i not in c] for s, c in zip(shapes, contracting, strict=True)]
    other = 1 - which
    positions = math.prod(shapes[other][i] for i in free[other])
    channels = math.prod(shapes[which][i] for i in contracting[which])
    features = math.prod(shapes[which][i] for i in free[which])
    spatial = (positions,) if positions != 1 else ()
    spec = conv_spec(
        (1, *spatial, channels),
        (*[1] * len(spatial), channels, features),
        (1,) * len(spatial),
        "VALID",
        dimension_numbers=("NWC", "WIO", "NWC") if spatial else ("NC", "IO", "NC"),
    )

    def inputs(x: jax.Array) -> jax.Array:
        return x.transpose(*free[other], *contracting[other]).reshape(spec.in_shape)

    def outputs(y: jax.Array) -> jax.Array:
        count = len(free[0])  # the result has the free dimensions of the first operand, then of the second
        parts = [range(count), range(count, y.ndim)]
        return y.transpose(*parts[other], *parts[which]).reshape(spec.out_shape)

    def kernel(k: jax.Array) -> jax.Array:
        return k.transpose(*contracting[which], *free[which]).reshape(spec.rhs_shape)

    return Layer(spec, which, inputs, outputs, kernel, types)


# -- what is found ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uses:
    """The uses of every parameter, found without computing anything."""

    layers: list[tuple[int, Layer, str]] = field(default_factory=list)  # parameter, layer, name; in order
    others: dict[int, str] = field(default_factory=dict)  # parameter -> what else it is used by
    hidden: dict[int, str] = field(default_factory=dict)  # parameter -> an equation with layers inside

    def metered(self) -> set[int]:
        """The parameters of which one layer is the only use."""
        counts = [leaf for leaf, *_ in self.layers]
        return {leaf for leaf in counts if counts.count(leaf) == 1 and leaf not in self.others}

    def copied(self) -> list[int]:
        """The parameters of which every example gets a copy."""
        return sorted({leaf for leaf, *_ in self.layers} - self.metered() | self.others.keys())


class _Fact(NamedTuple):
    """What is known of a value: the parameters that it is computed from, if not from examples too."""

    each: bool = False
    leaves: frozenset[int] = frozenset()
    moved: int | None = None  # the parameter whose entries it has


def find_uses(jaxpr: Any, parameters: Sequence[bool], count: int) -> Uses:
    """The uses of the first inputs of a jaxpr, as far as they are parameters. The others are of examples."""
    uses = Uses()
    facts = [_Fact(False, frozenset([i]), i) if yes else _Fact() for i, yes in enumerate(parameters)]
    _find(uses, "", jaxpr, [*facts, *[_Fact(True)] * count])
    return uses


def _find(uses: Uses, scope: str, jaxpr: Any, facts: Sequence[_Fact]) -> list[_Fact]:
    def rule(eqn: JaxprEqn, operands: Sequence[Any], used: Sequence[bool]) -> Sequence[_Fact]:
        known = [v if isinstance(v, _Fact) else _Fact() for v in operands]
        if _opens(eqn, [v.moved is not None for v in known]):
            return _find(uses, nested(scope, eqn), inner_jaxprs(eqn)[0], known)
        each = any(v.each for v in known)
        leaves = frozenset[int]().union(*(v.leaves for v in known))
        if not each:
            moved = known[0].moved if _moves(eqn) else None
            return [_Fact(False, leaves, moved)] * len(eqn.outvars)
        found = _layer_at(eqn, [v.moved is not None for v in known], [v.each for v in known])
        if found is not None:
            moved = known[found.which].moved
            assert moved is not None
            uses.layers.append((moved, found, place_of(eqn, scope)))
        else:
            for leaf in leaves:
                uses.others.setdefault(leaf, f"{eqn.primitive.name} in {place_of(eqn, scope) or 'the loss'}")
                if holds(eqn, LAYERS) or (eqn.primitive.name in LAYERS):
                    uses.hidden.setdefault(leaf, uses.others[leaf])
        return [_Fact(True)] * len(eqn.outvars)

    found = evaluate(jaxpr, list(facts), rule)
    return [v if isinstance(v, _Fact) else _Fact() for v in found]


def _opens(eqn: JaxprEqn, moved: Sequence[bool]) -> bool:
    """Whether a call is evaluated equation by equation: one that takes a parameter."""
    return eqn.primitive.name in OPENED and any(moved)


def _moves(eqn: JaxprEqn) -> bool:
    real = all(jnp.issubdtype(v.dtype, jnp.floating) for v in (*operand_avals(eqn), *result_avals(eqn)))
    return eqn.primitive.name in MOVES and real


def _layer_at(eqn: JaxprEqn, moved: Sequence[bool], each: Sequence[bool]) -> Layer | None:
    if eqn.primitive.name not in LAYERS or not any(each):
        return None
    return next((layer_of(eqn, i) for i in range(2) if moved[i] and each[1 - i]), None)


# -- the evaluation ---------------------------------------------------------------------------------


class Each(NamedTuple):
    """A value of every example."""

    stack: Any


class Parameter(NamedTuple):
    """A parameter, moved and cast; ``change`` has 0 for every example, moved alike, if it gets copies."""

    value: Any
    leaf: int
    change: Any = None


@dataclass
class Evaluation:
    """Evaluates the jaxpr of one example for all of them."""

    meter: Meter
    readings: list[Any]  # of each layer in order: the operand whose cotangent is what its meter reads
    count: int = 0  # the layers passed

    def __call__(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        return evaluate(jaxpr, arguments, self.equation)

    def equation(self, eqn: JaxprEqn, operands: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        moved = [isinstance(v, Parameter) for v in operands]
        each = [isinstance(v, Each) for v in operands]
        if _opens(eqn, moved):
            return self(inner_jaxprs(eqn)[0], operands)
        layer = _layer_at(eqn, moved, each)
        if layer is not None:
            reading = self.readings[self.count]
            self.count += 1
            x, parameter = operands[1 - layer.which].stack, operands[layer.which]
            return [Each(_metered(self.meter, eqn, layer, x, parameter.value, reading, parameter.change))]
        if moved and moved[0] and _moves(eqn):
            value, leaf, change = operands[0]
            moving = partial(_evaluated, eqn)
            change = None if change is None else jax.vmap(lambda c: moving(c)[0])(change)
            return [Parameter(moving(value)[0], leaf, change)]
        values, mapped = zip(*map(_stacked, operands), strict=True) if operands else ((), ())
        if not any(mapped):
            return _evaluated(eqn, *values)
        results = jax.vmap(partial(_evaluated, eqn), [0 if m else None for m in mapped])(*values)
        return [Each(v) for v in results]


def _stacked(value: Any) -> tuple[Any, bool]:
    """A value, and whether it is one of every example."""
    if isinstance(value, Each):
        return value.stack, True
    if not isinstance(value, Parameter):
        return value, False
    return (value.value, False) if value.change is None else (value.value[None] + value.change, True)


def _evaluated(eqn: JaxprEqn, *values: Any) -> list[Any]:
    return product_of(eqn, values) if eqn.primitive.name == "conv_general_dilated" else eval_eqn(eqn, values)


def _metered(
    meter: Meter, eqn: JaxprEqn, layer: Layer, x: Any, kernel: Any, reading: Any, change: Any
) -> jax.Array:
    """The outputs of a layer for every example. Its reading and its change change nothing."""

    def of(x: Any, kernel: Any) -> Any:
        order = (kernel, x) if layer.which == 0 else (x, kernel)
        in_axes = [None if i == layer.which else 0 for i in range(2)]
        return jax.vmap(partial(_evaluated, eqn), in_axes)(*order)[0]

    @jax.custom_vjp
    def outputs(x: Any, kernel: Any, reading: Any, change: Any) -> Any:
        return of(x, kernel)

    def forward(x: Any, kernel: Any, reading: Any, change: Any) -> Any:
        y, pull = jax.vjp(lambda x: of(x, kernel), x)
        return y, (pull, x, kernel)

    def backward(kept: Any, y_bar: Any) -> Any:
        pull, x, kernel = kept
        xs, ys = jax.vmap(layer.inputs)(x), jax.vmap(layer.outputs)(y_bar)
        xs, ys = (v.astype(layer.types[1]) for v in (xs, ys))
        gradients = None
        if change is not None:
            back = jax.linear_transpose(layer.kernel, jax.ShapeDtypeStruct(kernel.shape, xs.dtype))
            one = lambda x, y: back(kernel_vjp(layer.spec, x, y, precision=lax.Precision.HIGHEST))[0]  # noqa: E731
            gradients = jax.vmap(one)(xs, ys).astype(change.dtype)
        read = None if reading is None else meter(layer, kernel, xs, ys)
        return pull(y_bar)[0], jnp.zeros_like(kernel), read, gradients

    outputs.defvjp(forward, backward)
    return outputs(x, kernel, reading, change)

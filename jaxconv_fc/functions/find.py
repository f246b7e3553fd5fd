"""The convolutions that a function performs.

A function is traced to a jaxpr, whose equations name every convolution with its full geometry, whatever
library wrote the layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax

from jaxconv_fc.functions.faults import lax_fault
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    JaxprEqn,
    eval_eqn,
    evaluate,
    holds,
    inner_jaxprs,
    is_mutable,
    open_jaxpr,
    open_scan,
    open_while,
    operand_avals,
    trace,
    wanted,
)
from jaxconv_fc.functions.moves import Variable, ancestry, pads, result
from jaxconv_fc.functions.names import ArrayPaths, nested, place_of
from jaxconv_fc.functions.padding import Made, bias_of, without_padding
from jaxconv_fc.functions.sites import ConvSite, ConvSites, Origin
from jaxconv_fc.geometry.spec import ConvSpec, conv_spec
from jaxconv_fc.products.product import batch_sizes


def find_convs(fn: Callable[..., Any], *args: Any, raw: bool = False, **kwargs: Any) -> ConvSites:
    """Every convolution ``y = M x`` that ``fn(*args, **kwargs)`` performs, in order of execution.

    Traces ``fn``, and looks inside jit, custom derivatives, remat, scan, while, cond (all branches),
    vmap and shard_map. Finds lax's convolutions as well as this library's matrix-free products. So
    ``find_convs(jax.grad(loss), ...)`` lists forward, transposed and kernel-gradient convolutions.

    Padding that stands in front of a convolution is part of its layer, whatever library wrote it: the spec
    has its pads and its ``padding_mode``, and M takes the input that is not padded yet. So are zeros between
    the entries and crops of what is padded (``lax.pad``), while a slice alone is not: M then takes the slice.
    They are recognised by where the entries go. A pad that no spec
    holds (modes that differ by axis, constants other than 0, means) is not in M: ``in_front`` and the table
    say so, and a warning does.

    Args:
      fn: any function of JAX arrays, such as a flax, equinox or haiku model.
      args: its arguments. ``jax.ShapeDtypeStruct`` may stand for arrays: then nothing that depends on them
        is computed. From arrays, whatever the convolutions depend on is computed once, so that their kernels
        and inputs are known. Python numbers stay static, as in a plain call.
      raw: True for the convolutions alone, as lax performs them, without the padding in front. An argument
        of ``fn`` with this name is bound before: ``find_convs(functools.partial(fn, raw=...), ...)``.
      kwargs: further arguments of ``fn``.

    Returns:
      A list of :class:`ConvSite`. Printed, it is a table: layer, layout, geometry, shape of M, stored
      entries, density, bytes of M dense and as BCSR, times executed, and multiply-adds of one execution
      (their total: of all). Where lax is known to go wrong on this platform, a last column says how. In the
      body of a loop, kernel and input are known where no iteration changes them.

    Raises:
      TypeError: ``fn`` returns something, but no JAX array; ``raw`` is not a bool.

    Warns:
      UserWarning: the padding in front of some convolution is not in its M.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> def layer(x, kernel):
    ...     with jax.named_scope("layer"):
    ...         return jax.nn.relu(jax.lax.conv(x, kernel, (1,), "VALID"))
    >>> x, kernel = jnp.ones((10, 3, 8), "float32"), jnp.ones((4, 3, 3), "float32")
    >>> print(fc.find_convs(jax.jit(layer), x, kernel))
       layer  layout   geometry                      M  stored  density     dense    sparse  times  mult-adds
    0  layer  NCW OIW  3x8 -> 4x6, kernel 4x3x3  24x24     216   37.50%  2.25 KiB  1.79 KiB      1      2,160
    """
    if not isinstance(raw, bool):
        raise TypeError(
            f"find_convs: raw must be True or False, got {type(raw).__name__}. For an argument of fn "
            "with this name, pass functools.partial(fn, raw=...)."
        )
    traced = trace(fn, args, kwargs)
    if traced.others and not open_jaxpr(traced.jaxpr)[0].outvars:
        raise TypeError(
            f"find_convs: fn returned {type(traced.others[0]).__name__}, and no JAX array. Only what is "
            "computed with JAX arrays can be traced: pass a function of JAX arrays."
        )
    sites = ConvSites()
    arguments = [Variable(v, given=True) for v in traced.arguments]
    finder = ConvFinder(sites, ArrayPaths(fn, args, kwargs), raw)
    finder.visit(traced.jaxpr, arguments)
    with_bias = replace(finder, sites=[], raw=True, evaluable=False, biases=True)
    with_bias.visit(traced.jaxpr, arguments)
    for i, (site, same) in enumerate(zip(sites, with_bias.sites, strict=True)):
        sites[i] = replace(site, bias=same.bias, origin=Origin(traced.jaxpr, i, len(sites)))
    unlike = [f"{site.name} ({site.in_front})" for site in sites if site.in_front]
    if unlike:
        warnings.warn(
            "find_convs: M is that of the convolution alone, of an input that is padded already, in "
            f"{', '.join(unlike)}. Norms and neurons of its spec are not those of the layer: use "
            "matrix_of for that. raw=True takes convolutions alone, and does not warn.",
            stacklevel=2,
        )
    return sites


@dataclass(frozen=True)
class ConvFinder:
    """Records the convolutions of a jaxpr, in order. Only what a later convolution depends on is computed.

    A second walk looks for biases. It passes all equations and computes nothing.
    """

    sites: list[ConvSite]  # the convolutions found so far
    paths: ArrayPaths
    raw: bool = False  # whether the padding in front of a convolution stays outside of it
    constants: dict[int, Variable] = field(default_factory=dict)  # arrays of the jaxprs, by id
    scope: str = ""  # the name stacks of the calls around this jaxpr, joined
    times: int | None = 1  # how often the jaxpr runs; None where only the run can tell
    evaluable: bool = True  # whether its equations can be evaluated here
    biases: bool = False  # whether all equations are passed, for what is added to convolutions

    def visit(
        self, jaxpr: Any, arguments: Sequence[Variable], used: Sequence[bool] | None = None
    ) -> list[Any]:
        """The results of the jaxpr, None for each that is not used (by default all of them)."""
        finish = [None] * len(open_jaxpr(jaxpr)[0].outvars) if used is None else wanted(used)
        keep = (lambda eqn: True) if self.biases else _performs_conv
        results = evaluate(jaxpr, arguments, self.equation, finish=finish, keep=keep)
        return [None if v is None else self.value(v) for v in results]

    def value(self, value: Any) -> Variable:
        """An operand of an equation, which may be a constant."""
        if isinstance(value, Variable):
            return value
        return self.constants.setdefault(id(value), Variable(value, fixed=True))

    def equation(self, eqn: JaxprEqn, operands: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        name, values = eqn.primitive.name, list(map(self.value, operands))
        inside = replace(self, scope=nested(self.scope, eqn))
        if name in CALLS and (holds(eqn, CONVOLUTIONS) or pads(eqn)):
            return inside.visit(inner_jaxprs(eqn)[0], values, used)
        made = None
        if name in _SITES:
            made = self.record(eqn, values)
        elif holds(eqn, CONVOLUTIONS):
            for body in _BODIES.get(name, _other_bodies)(eqn, values):
                inside.visit_body(body)
        elif name == "add" and self.biases:
            for y, term in (values, values[::-1]):
                site, bias = bias_of(y, term) or (None, None)
                if site is not None and self.sites[site].bias is None:
                    self.sites[site] = replace(self.sites[site], bias=bias)
        known = self.evaluable and any(used) and all(v.known for v in values) and not is_mutable(eqn)
        arrays = eval_eqn(eqn, [v.array for v in values]) if known else list(map(_abstract, eqn.outvars))
        if name == "convert_element_type":  # a kernel that is cast still belongs to its layer
            self.paths.hand_on(values[0].array, arrays[0])
        results = [result(eqn, values, i, array) for i, array in enumerate(arrays)]
        if made:
            results[0].made_by = made
        return results

    def record(self, eqn: JaxprEqn, values: Sequence[Variable]) -> Made | None:
        """Adds the convolution that an equation performs. The note on its result serves to find the bias."""
        site, x, lead = _SITES[eqn.primitive.name](eqn, values)
        place = place_of(eqn, self.scope, self.paths[site.kernel])
        site = replace(site, name=place, times=self.times)
        spec, made = site.spec, None
        if x is not None:
            base = ancestry(x)[0][-1]
            channels = spec.dimension_numbers.out_spec[1] if lead is None else lead + spec.out_order[-1]
            made = Made(len(self.sites), channels, base.number)
            if not self.raw:
                order = spec.dimension_numbers.lhs_spec[2:]
                spatial = order if lead is None else [lead + i for i in spec.in_order[: len(order)]]
                spec, array, in_front = without_padding(spec, x, spatial)
                site = replace(site, spec=spec, x=array, in_front=in_front)
        self.sites.append(site)
        return made

    def visit_body(self, body: _Body) -> None:
        times = None if self.times is None or body.times is None else self.times * body.times
        finder = replace(self, times=times, evaluable=self.evaluable and body.evaluable)
        finder.visit(body.jaxpr, body.operands)


# -- the table: primitive -> the convolution that it is ----------------------------------------------


# The site, the value that it convolves (None if it does not), and how many batch axes stand before the
# ``in_shape`` of the spec; None if the value has the whole ``lhs_shape``.
_Found = tuple[ConvSite, Variable | None, int | None]


def lax_site(eqn: JaxprEqn, x: Any, kernel: Any, name: str = "") -> ConvSite:
    """A ``conv_general_dilated`` equation as lax performs it on the default platform."""
    spec = spec_of(eqn)
    batch = spec.lhs_shape[spec.dimension_numbers.lhs_spec[0]]
    fault = lax_fault(spec, _abstract(eqn.invars[0]).dtype, jax.default_backend())
    return ConvSite(spec, kernel, x, name, examples=batch // spec.batch_group_count, lax_fault=fault)


def _lax_site(eqn: JaxprEqn, values: Sequence[Variable]) -> _Found:
    x, kernel = values
    return lax_site(eqn, x.array, kernel.array), x, None


def _product_site(eqn: JaxprEqn, values: Sequence[Variable]) -> _Found:
    spec, out = eqn.params["spec"], eqn.params["out"]
    a, b = (v.array for v in values)  # (kernel, x), (kernel, y) or (x, y)
    examples = math.prod(batch_sizes(out, eqn.params["batches"], a.shape, b.shape).values())
    if out == "y":
        lead = len(values[1].shape) - len(spec.in_shape)
        return ConvSite(spec, a, b, "", examples=examples), values[1], lead
    if out == "x":
        return ConvSite(spec, a, None, "", product="M^T y", y=b, examples=examples), None, None
    return ConvSite(spec, None, a, "", product="X^T y", y=b, examples=examples), None, None


_SITES: dict[str, Callable[[JaxprEqn, Sequence[Variable]], _Found]] = {
    "conv_general_dilated": _lax_site,
    "conv_product": _product_site,
}
CONVOLUTIONS = frozenset(_SITES)


def _performs_conv(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in CONVOLUTIONS or holds(eqn, CONVOLUTIONS)


# -- the table: primitive -> the jaxprs that it runs ------------------------------------------------


class _Body(NamedTuple):
    """A jaxpr that an equation runs: the body of a loop, a branch of a condition."""

    jaxpr: Any
    operands: Sequence[Variable]
    times: int | None = 1  # runs per run of the equation (a branch: 1 at most); None if only the run can tell
    evaluable: bool = True  # whether its equations can be evaluated outside of the equation


def _scan_bodies(eqn: JaxprEqn, values: Sequence[Variable]) -> list[_Body]:
    """Constants are what they are outside. For the carry see :func:`_carry`. Slices of xs are unknown."""
    scan = open_scan(eqn, values)
    carry = _carry(scan.body, scan.constants, scan.carry)
    inputs = open_jaxpr(scan.body)[0].invars[-len(scan.xs) :] if scan.xs else []
    slices = [Variable(_abstract(v), given=xs.given) for v, xs in zip(inputs, scan.xs, strict=True)]
    return [_Body(scan.body, [*scan.constants, *carry, *slices], eqn.params["length"])]


def _while_bodies(eqn: JaxprEqn, values: Sequence[Variable]) -> list[_Body]:
    loop = open_while(eqn, values)
    carry = _carry(loop.body, loop.body_constants, loop.carry)
    return [
        _Body(loop.cond, [*loop.cond_constants, *carry], None),
        _Body(loop.body, [*loop.body_constants, *carry], None),
    ]


def _branches(eqn: JaxprEqn, values: Sequence[Variable]) -> list[_Body]:
    return [_Body(branch, values[1:]) for branch in inner_jaxprs(eqn)]


def _solve_bodies(eqn: JaxprEqn, values: Sequence[Variable]) -> list[_Body]:
    """Only ``solve`` runs. The other three jaxprs of the equation are there for its derivatives."""
    return _other_bodies(eqn, values, [eqn.params["jaxprs"].solve])


def _other_bodies(
    eqn: JaxprEqn, values: Sequence[Variable], jaxprs: Sequence[Any] | None = None
) -> list[_Body]:
    """The jaxprs of shard_map, and of any primitive that is not in the table below.

    An operand may be a shard of the equation's: its value is known only if it has the same shape. Equations
    may name mesh axes, which have no meaning outside, so none is evaluated.
    """
    bodies = []
    for body in inner_jaxprs(eqn) if jaxprs is None else jaxprs:
        operands = [Variable(_abstract(v)) for v in open_jaxpr(body)[0].invars]
        if len(operands) == len(values):
            for i, v in enumerate(values):
                share = replace(operands[i], given=v.given)
                operands[i] = v if v.shape == share.shape else share
        bodies.append(_Body(body, operands, evaluable=False))
    return bodies


def _carry(body: Any, constants: Sequence[Variable], values: Sequence[Variable]) -> list[Variable]:
    """The carry of a loop, known where the body returns it unchanged. It follows the constants."""
    inner = open_jaxpr(body)[0]
    carry = zip(inner.invars[len(constants) :], inner.outvars, values, strict=False)
    return [value if before is after else Variable(_abstract(before)) for before, after, value in carry]


_BODIES: dict[str, Callable[[JaxprEqn, Sequence[Any]], list[_Body]]] = {
    "scan": _scan_bodies,
    "while": _while_bodies,
    "cond": _branches,
    "custom_linear_solve": _solve_bodies,
}


def _abstract(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def spec_of(eqn: JaxprEqn) -> ConvSpec:
    """The geometry of a ``conv_general_dilated`` equation."""
    lhs, rhs = (aval.shape for aval in operand_avals(eqn))
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
             "feature_group_count", "batch_group_count")  # fmt: skip
    return conv_spec(lhs, rhs, *(eqn.params[name] for name in names))

"""The convolutions that a function performs.

A function is traced to a jaxpr, whose equations name every convolution with its full geometry, whatever
library wrote the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxconv_fc.functions.jaxprs import (
    CALLS,
    JaxprEqn,
    eval_eqn,
    evaluate,
    holds,
    inner_jaxprs,
    is_mutable,
    open_jaxpr,
    scan_counts,
    trace,
    wanted,
)
from jaxconv_fc.functions.names import ArrayPaths, nested, place_of
from jaxconv_fc.functions.sites import ConvSite, ConvSites
from jaxconv_fc.spec import ConvSpec, conv_spec


def find_convs(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> ConvSites:
    """Every convolution ``y = M x`` that ``fn(*args, **kwargs)`` performs, in order of execution.

    Traces ``fn``, and looks inside jit, custom derivatives, remat, scan, while, cond (all branches),
    vmap and shard_map. Finds lax's convolutions as well as this library's matrix-free products. So
    ``find_convs(jax.grad(loss), ...)`` lists forward, transposed and kernel-gradient convolutions.

    Args:
      fn: any function of JAX arrays, such as a flax, equinox or haiku model.
      args, kwargs: its arguments. ``jax.ShapeDtypeStruct`` may stand for arrays: then nothing that
        depends on them is computed. From arrays, whatever the convolutions depend on is computed once, so
        that their kernels and inputs are known. Python numbers stay static, as in a plain call.

    Returns:
      A list of :class:`ConvSite`. Printed, it is a table: layer, layout, geometry, shape of M, stored
      entries, density, bytes of M dense and as BCSR, and times executed. In the body of a loop, kernel and
      input are known where no iteration changes them.

    Raises:
      TypeError: ``fn`` returns something, but no JAX array.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> def layer(x, kernel):
    ...     with jax.named_scope("layer"):
    ...         return jax.nn.relu(jax.lax.conv(x, kernel, (1, 1), "VALID"))
    >>> print(fc.find_convs(jax.jit(layer), jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))))
       layer  layout     geometry                              M  stored  density    dense    sparse  times
    0  layer  NCHW OIHW  3x8x8 -> 4x6x6, kernel 4x3x3x3  144x192   3,888   14.06%  216 KiB  46.1 KiB      1
    """
    traced = trace(fn, args, kwargs)
    if traced.others and not open_jaxpr(traced.jaxpr)[0].outvars:
        raise TypeError(
            f"find_convs: fn returned {type(traced.others[0]).__name__}, and no JAX array. Only what is "
            "computed with JAX arrays can be traced: pass a function of JAX arrays."
        )
    sites = ConvSites()
    ConvFinder(sites, ArrayPaths(fn, args, kwargs)).visit(traced.jaxpr, traced.arguments)
    return sites


@dataclass(frozen=True)
class ConvFinder:
    """Records the convolutions of a jaxpr, in order.

    A value is an array where it is known, and a ``jax.ShapeDtypeStruct`` where it is not. Only what a later
    convolution depends on is computed.
    """

    sites: list[ConvSite]  # the convolutions found so far
    paths: ArrayPaths
    scope: str = ""  # the name stacks of the calls around this jaxpr, joined
    times: int | None = 1  # how often the jaxpr runs; None where only the run can tell
    evaluable: bool = True  # whether its equations can be evaluated here

    def visit(self, jaxpr: Any, arguments: Sequence[Any], used: Sequence[bool] | None = None) -> list[Any]:
        """The results of the jaxpr, None for each that is not used (by default all of them)."""
        finish = [None] * len(open_jaxpr(jaxpr)[0].outvars) if used is None else wanted(used)
        return evaluate(jaxpr, arguments, self.equation, finish=finish, keep=_performs_conv)

    def equation(self, eqn: JaxprEqn, values: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        name = eqn.primitive.name
        inside = replace(self, scope=nested(self.scope, eqn))
        if name in CALLS and holds(eqn, CONVOLUTIONS):
            return inside.visit(inner_jaxprs(eqn)[0], values, used)
        if name in _SITES:
            site = _SITES[name](eqn, *values)
            place = place_of(eqn, self.scope, self.paths[site.kernel])
            self.sites.append(replace(site, name=place, times=self.times))
        elif holds(eqn, CONVOLUTIONS):
            for body in _BODIES.get(name, _other_bodies)(eqn, values):
                inside.visit_body(body)
        known = self.evaluable and any(used) and all(map(_is_known, values)) and not is_mutable(eqn)
        results = eval_eqn(eqn, values) if known else list(map(_abstract, eqn.outvars))
        if name == "convert_element_type":  # a kernel that is cast still belongs to its layer
            self.paths.hand_on(values[0], results[0])
        return results

    def visit_body(self, body: _Body) -> None:
        times = None if self.times is None or body.times is None else self.times * body.times
        finder = replace(self, times=times, evaluable=self.evaluable and body.evaluable)
        finder.visit(body.jaxpr, body.operands)


# -- the table: primitive -> the convolution that it is ----------------------------------------------


def _lax_site(eqn: JaxprEqn, x: Any, kernel: Any) -> ConvSite:
    return ConvSite(spec_of(eqn), kernel, x, "")


def _product_site(eqn: JaxprEqn, a: Any, b: Any) -> ConvSite:
    spec, out = eqn.params["spec"], eqn.params["out"]  # (a, b): (kernel, x), (kernel, y) or (x, y)
    if out == "y":
        return ConvSite(spec, a, b, "")
    if out == "x":
        return ConvSite(spec, a, None, "", product="M^T y", y=b)
    return ConvSite(spec, None, a, "", product="X^T y", y=b)


_SITES: dict[str, Callable[..., ConvSite]] = {
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
    operands: Sequence[Any]  # arrays where known, jax.ShapeDtypeStruct elsewhere
    times: int | None = 1  # runs per run of the equation (a branch: 1 at most); None if only the run can tell
    evaluable: bool = True  # whether its equations can be evaluated outside of the equation


def _scan_bodies(eqn: JaxprEqn, values: Sequence[Any]) -> list[_Body]:
    """Constants are what they are outside. For the carry see :func:`_carry`. Slices of xs are unknown."""
    (body,) = inner_jaxprs(eqn)
    fixed, carried = scan_counts(eqn, body)
    carry = _carry(body, values[: fixed + carried], fixed)
    slices = map(_abstract, open_jaxpr(body)[0].invars[fixed + carried :])
    return [_Body(body, [*values[:fixed], *carry, *slices], eqn.params["length"])]


def _while_bodies(eqn: JaxprEqn, values: Sequence[Any]) -> list[_Body]:
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    split, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = _carry(body, values[split:], fixed)
    return [
        _Body(cond, [*values[:split], *carry], None),
        _Body(body, [*values[split : split + fixed], *carry], None),
    ]


def _branches(eqn: JaxprEqn, values: Sequence[Any]) -> list[_Body]:
    return [_Body(branch, values[1:]) for branch in inner_jaxprs(eqn)]


def _solve_bodies(eqn: JaxprEqn, values: Sequence[Any]) -> list[_Body]:
    """Only ``solve`` runs. The other three jaxprs of the equation are there for its derivatives."""
    return _other_bodies(eqn, values, [eqn.params["jaxprs"].solve])


def _other_bodies(
    eqn: JaxprEqn, values: Sequence[Any], jaxprs: Sequence[Any] | None = None
) -> list[_Body]:
    """The jaxprs of shard_map, and of any primitive that is not in the table below.

    An operand may be a shard of the equation's: its value is known only if it has the same shape. Equations
    may name mesh axes, which have no meaning outside, so none is evaluated.
    """
    bodies = []
    for body in inner_jaxprs(eqn) if jaxprs is None else jaxprs:
        operands = [_abstract(v) for v in open_jaxpr(body)[0].invars]
        if len(operands) == len(values):
            pairs = zip(values, operands, strict=True)
            operands = [v if np.shape(v) == shape.shape else shape for v, shape in pairs]
        bodies.append(_Body(body, operands, evaluable=False))
    return bodies


def _carry(body: Any, values: Sequence[Any], fixed: int) -> list[Any]:
    """The carry of a loop, known where the body returns it unchanged. It follows ``fixed`` constants."""
    inner = open_jaxpr(body)[0]
    carry = zip(inner.invars[fixed:], inner.outvars, values[fixed:], strict=False)
    return [value if before is after else _abstract(before) for before, after, value in carry]


_BODIES: dict[str, Callable[[JaxprEqn, Sequence[Any]], list[_Body]]] = {
    "scan": _scan_bodies,
    "while": _while_bodies,
    "cond": _branches,
    "custom_linear_solve": _solve_bodies,
}


def _is_known(value: Any) -> bool:
    return not isinstance(value, jax.ShapeDtypeStruct)


def _abstract(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def spec_of(eqn: JaxprEqn) -> ConvSpec:
    """The geometry of a ``conv_general_dilated`` equation."""
    lhs, rhs = (_abstract(v).shape for v in eqn.invars)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
             "feature_group_count", "batch_group_count")  # fmt: skip
    return conv_spec(lhs, rhs, *(eqn.params[name] for name in names))

"""The convolutions that a function performs.

A function is traced to a jaxpr, whose equations name every convolution with its full geometry, whatever
library wrote the layer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxconv_fc.functions.jaxprs import (
    CALLS,
    Environment,
    JaxprEqn,
    Var,
    conv_general_dilated_p,
    eval_eqn,
    inner_jaxprs,
    is_mutable,
    open_jaxpr,
    scan_counts,
    trace,
)
from jaxconv_fc.memory import readable
from jaxconv_fc.products import product_p
from jaxconv_fc.spec import ConvSpec, conv_spec

_CONVOLUTIONS = (conv_general_dilated_p, product_p)


@dataclass(frozen=True, eq=False)
class ConvSite:
    """One convolution that a function performs: ``y = M x`` with the M of ``spec`` and ``kernel``.

    Of ``kernel``, ``x`` and ``y`` the two that the product takes are given, the third, its result, is
    None. A convolution of lax is always ``"M x"``; the products of this library can also be ``"M^T y"``
    (:func:`apply_transpose`) and ``"X^T y"`` (the gradient with respect to the kernel).

    Attributes:
      spec: the geometry; its ``lhs_shape`` holds the batch.
      kernel, x, y: arrays where the value is known, ``jax.ShapeDtypeStruct`` where only its shape is.
      name: the name stack (flax and haiku put their module names there), else the line of the source.
      times: how often it is executed, the lengths of the scans around it multiplied; None in a while
        loop, where only the run can tell.
      product: ``"M x"``, ``"M^T y"`` or ``"X^T y"``.
    """

    spec: ConvSpec
    kernel: Any
    x: Any
    name: str
    times: int | None = 1
    product: str = "M x"
    y: Any = None

    @property
    def dtype(self) -> Any:
        """The dtype of M."""
        return np.dtype((self.x if self.kernel is None else self.kernel).dtype)

    def __repr__(self) -> str:
        return repr(ConvSites([self]))


class ConvSites(list[ConvSite]):
    """A list of :class:`ConvSite`, printed as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no convolutions"
        head = ("", "layer", "geometry", "M", "stored", "density", "dense", "sparse", "times")
        rows = [head, *(_row(i, site) for i, site in enumerate(self))]
        if len(self) > 1:
            sizes = [_bytes_of(site) for site in self]
            stored = f"{sum(site.spec.nse for site in self):,}"
            totals = [readable(sum(column)) for column in zip(*sizes, strict=True)]
            rows.append(("", "total", "", "", stored, "", *totals, ""))
        columns = []
        for i, column in enumerate(zip(*rows, strict=True)):
            align = str.ljust if i in (1, 2) else str.rjust  # words to the left, numbers to the right
            columns.append([align(cell, max(map(len, column))) for cell in column])
        return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def find_convs(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> ConvSites:
    """Every convolution that ``fn(*args, **kwargs)`` performs, in order of execution.

    Traces ``fn``, and looks inside jit, custom derivatives, remat, scan, while, cond (all branches),
    vmap and shard_map, at lax's convolutions as well as at this library's matrix-free products. So
    ``find_convs(jax.grad(loss), ...)`` lists forward, transposed and kernel-gradient convolutions.

    Args:
      fn: any function of JAX arrays, a flax, equinox or haiku model among them.
      *args, **kwargs: its arguments. ``jax.ShapeDtypeStruct`` may stand for arrays: then nothing that
        depends on them is computed. With arrays, what the convolutions depend on is, once, so that kernels
        and inputs are known. Python numbers stay static, as in a plain call.

    Returns:
      A list of :class:`ConvSite`. Printed, it is a table: layer, geometry, shape of M, stored entries,
      density, bytes of M dense and as BCSR, and times executed. In the body of a loop, kernel and input
      are known where no iteration changes them.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> def layer(x, kernel):
    ...     with jax.named_scope("layer"):
    ...         return jax.nn.relu(jax.lax.conv(x, kernel, (1, 1), "VALID"))
    >>> print(fc.find_convs(jax.jit(layer), jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))))
       layer  geometry                              M  stored  density    dense    sparse  times
    0  layer  3x8x8 -> 4x6x6, kernel 4x3x3x3  144x192   3,888   14.06%  216 KiB  46.1 KiB      1
    """
    traced = trace(fn, args, kwargs)
    sites = ConvSites()
    ConvFinder(sites)(
        traced.jaxpr, traced.arguments, "", 1, [False] * len(open_jaxpr(traced.jaxpr)[0].outvars)
    )
    return sites


class ConvFinder:
    """Goes through a jaxpr in order, with the values that are known, and notes the convolutions.

    Evaluates only what a later convolution needs.
    """

    def __init__(self, sites: list[ConvSite], evaluate: bool = True):
        self.sites, self.evaluate = sites, evaluate

    def __call__(
        self, jaxpr: Any, arguments: Sequence[Any], scope: str, times: int | None, wanted: Sequence[bool]
    ) -> list[Any]:
        env = Environment(jaxpr, arguments)
        needed = _needed(env, wanted)
        for eqn in env.equations:
            values = env.read(eqn.invars)
            use = [v in needed for v in eqn.outvars]
            if eqn.primitive.name in CALLS and holds_conv(eqn):
                results = self(inner_jaxprs(eqn)[0], values, _nested(scope, eqn), times, use)
            else:
                if eqn.primitive in _CONVOLUTIONS:
                    self.sites.append(_site(eqn, values, place_of(eqn, scope), times))
                elif holds_conv(eqn):
                    self.inside(eqn, values, _nested(scope, eqn), times)
                known = self.evaluate and any(use) and all(map(_is_known, values)) and not is_mutable(eqn)
                results = eval_eqn(eqn, values) if known else list(map(_abstract, eqn.outvars))
            env.write(eqn.outvars, results)
        return env.read(env.outvars)

    def inside(self, eqn: JaxprEqn, values: Sequence[Any], scope: str, times: int | None) -> None:
        """The bodies of a loop, the branches of a condition."""
        for body, operands, count, evaluate in _bodies(eqn, values):
            walk = self if evaluate else ConvFinder(self.sites, evaluate=False)
            repeated = None if times is None or count is None else times * count
            walk(body, operands, scope, repeated, [False] * len(open_jaxpr(body)[0].outvars))


def _needed(env: Environment, wanted: Sequence[bool]) -> set[Any]:
    """The variables that a convolution, or a result that is wanted, depends on."""
    needed = {v for v, w in zip(env.outvars, wanted, strict=True) if w and isinstance(v, Var)}
    for eqn in reversed(env.equations):
        if eqn.primitive in _CONVOLUTIONS or holds_conv(eqn) or not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if isinstance(v, Var))
    return needed


def _bodies(eqn: JaxprEqn, values: Sequence[Any]) -> Iterator[tuple[Any, list[Any], int | None, bool]]:
    """(jaxpr, what is known of its operands, times it runs, whether it can be evaluated outside)."""
    inner = inner_jaxprs(eqn)
    name = eqn.primitive.name
    if name == "scan":
        (body,) = inner
        yield body, _scan_operands(eqn, body, values), eqn.params["length"], True
    elif name == "while":
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        split, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = _unchanged(body, values[split:], fixed)
        yield cond, [*values[:split], *carry], None, True
        yield body, [*values[split : split + fixed], *carry], None, True
    elif name == "cond":
        for branch in inner:
            yield branch, list(values[1:]), 1, True
    else:  # shard_map and others: operands may be shards, and axis names have no meaning outside
        if name == "custom_linear_solve":  # the other jaxprs are there for its derivatives
            inner = [eqn.params["jaxprs"].solve]
        for body in inner:
            operands = [_abstract(v) for v in open_jaxpr(body)[0].invars]
            if len(operands) == len(values):
                pairs = zip(values, operands, strict=True)
                operands = [v if np.shape(v) == shape.shape else shape for v, shape in pairs]
            yield body, operands, 1, False


def _scan_operands(eqn: JaxprEqn, body: Any, values: Sequence[Any]) -> list[Any]:
    """Constants are known, a carry where the body hands it on, a slice of xs never."""
    fixed, propagate = scan_counts(eqn, body)
    carry = _unchanged(body, values[: fixed + propagate], fixed)
    return [*values[:fixed], *carry, *map(_abstract, open_jaxpr(body)[0].invars[fixed + propagate :])]


def _unchanged(body: Any, values: Sequence[Any], fixed: int) -> list[Any]:
    """The carry of a loop after ``fixed`` constants, known where the body returns what it was given."""
    inner = open_jaxpr(body)[0]
    carry = zip(inner.invars[fixed:], inner.outvars, values[fixed:], strict=False)
    return [value if before is after else _abstract(before) for before, after, value in carry]


def _site(eqn: JaxprEqn, values: Sequence[Any], name: str, times: int | None) -> ConvSite:
    if eqn.primitive is conv_general_dilated_p:
        x, kernel = values
        return ConvSite(spec_of(eqn), kernel, x, name, times)
    a, b = values
    spec, out = eqn.params["spec"], eqn.params["out"]
    if out == "y":
        return ConvSite(spec, a, b, name, times)
    if out == "x":
        return ConvSite(spec, a, None, name, times, "M^T y", b)
    return ConvSite(spec, None, a, name, times, "X^T y", b)


def _is_known(value: Any) -> bool:
    return not isinstance(value, jax.ShapeDtypeStruct)


def _abstract(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


# -- the table ---------------------------------------------------------------------------------


def _row(index: int, site: ConvSite) -> tuple[str, ...]:
    spec = site.spec
    density = spec.nse / max(1, spec.out_size * spec.in_size)
    dense, sparse = map(readable, _bytes_of(site))
    shape = _by(spec.shape) + {"M x": "", "M^T y": " ^T", "X^T y": " (X)"}[site.product]
    times = "?" if site.times is None else f"{site.times:,}"
    stored = f"{spec.nse:,}"
    return str(index), site.name, _geometry(spec), shape, stored, f"{density:.2%}", dense, sparse, times


def _geometry(spec: ConvSpec) -> str:
    """The kind of convolution in one line: only the options that are not the default."""
    words = [f"{_by(spec.in_shape)} -> {_by(spec.out_shape)}", f"kernel {_by(spec.rhs_shape)}"]
    for word, steps in (
        ("stride", spec.window_strides),
        ("lhs dilation", spec.lhs_dilation),
        ("dilation", spec.rhs_dilation),
    ):
        if any(s != 1 for s in steps):
            words.append(f"{word} {_by(steps)}")
    if any(lo or hi for lo, hi in spec.padding):
        mode = "pad" if spec.padding_mode == "zeros" else spec.padding_mode
        words.append(f"{mode} " + " ".join(f"({lo},{hi})" for lo, hi in spec.padding))
    for word, count in (("groups", spec.feature_group_count), ("batch groups", spec.batch_group_count)):
        if count != 1:
            words.append(f"{count} {word}")
    return ", ".join(words)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _bytes_of(site: ConvSite) -> tuple[int, int]:
    """Bytes of M dense, and as BCSR."""
    sizes = site.spec.nbytes(site.dtype)
    return sizes.dense, sizes.bcsr


# -- batches as examples -----------------------------------------------------------------------


def spec_of(eqn: JaxprEqn) -> ConvSpec:
    """The geometry of a ``conv_general_dilated`` equation."""
    lhs, rhs = (_abstract(v).shape for v in eqn.invars)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
             "feature_group_count", "batch_group_count")  # fmt: skip
    return conv_spec(lhs, rhs, *(eqn.params[name] for name in names))


# -- where an equation is ---------------------------------------------------------------------


def holds_conv(eqn: JaxprEqn) -> bool:
    """Whether a convolution is performed somewhere inside an equation."""
    return any(
        inner.primitive in _CONVOLUTIONS or holds_conv(inner)
        for jaxpr in inner_jaxprs(eqn)
        for inner in open_jaxpr(jaxpr)[0].eqns
    )


def place_of(eqn: JaxprEqn, outer: str = "") -> str:
    """Where an equation comes from: its name stack, as far as it has names, else the line of the source.

    Stacks of transformations alone, ``transpose(jvp())``, get the line put inside.
    """
    stack = _nested(outer, eqn)
    if re.sub(r"\w+\(|[()/]", "", stack):
        return stack
    line = _source_line(eqn)
    return stack.replace("()", f"({line})") if stack and line else line


def _nested(outer: str, eqn: JaxprEqn) -> str:
    """The name stack inside of a call begins anew: put the stack of the call in front."""
    return "/".join(filter(None, (outer, str(eqn.source_info.name_stack))))


def _source_line(eqn: JaxprEqn) -> str:
    """``file.py:line`` of the user's call: the innermost one outside of JAX and of installed libraries.

    Empty where JAX has kept none (the jaxpr of a jitted library function was traced for another call).
    """
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback else []
    ours = tuple(os.path.dirname(str(file)) for file in (jax.__file__, __file__))
    frames = [f for f in frames if not f.file_name.startswith(ours)]
    frame = next((f for f in frames if "site-packages" not in f.file_name), next(iter(frames), None))
    return f"{os.path.basename(frame.file_name)}:{frame.line_num}" if frame else ""

"""Any JAX function: the convolutions it performs, and the same function run fully connected.

A function is traced to a jaxpr, whose equations name every convolution with its full geometry, whatever
library wrote the layer. Reading the equations lists the convolutions (:func:`find_convs`); evaluating
them with each convolution exchanged for a product with its matrix runs the network as a fully connected
one (:func:`fully_connected`).

Equations that hold other jaxprs (loops, branches, calls) are exchanged for the same equation around
rewritten jaxprs. A custom derivative or batching rule is kept by one trick: transform the *original*
call, which obeys its rule, and rewrite what that transformation computes.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.extend.core.primitives import conv_general_dilated_p

from jaxconv_fc.adjoint import kernel_matrix
from jaxconv_fc.apply import product_p
from jaxconv_fc.dense import as_matrix
from jaxconv_fc.jaxprs import (
    CALLS,
    Environment,
    alone,
    bind,
    compiled,
    inner_jaxprs,
    opened,
    scan_counts,
    trace,
)
from jaxconv_fc.sharding import as_on_one_device
from jaxconv_fc.spec import ConvSpec, conv_spec, readable

_CONVOLUTIONS = (conv_general_dilated_p, product_p)


# -- the convolutions of a function ------------------------------------------------------------


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
    _Walk(sites)(traced.jaxpr, traced.arguments, "", 1, [False] * len(opened(traced.jaxpr)[0].outvars))
    return sites


class _Walk:
    """Goes through a jaxpr in order, with the values that are known, and notes the convolutions.

    Computed is what a later convolution depends on, and nothing else.
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
                known = self.evaluate and any(use) and all(map(_is_known, values)) and not _is_mutable(eqn)
                results = bind(eqn, values) if known else list(map(_abstract, eqn.outvars))
            env.write(eqn.outvars, results)
        return env.read(env.outvars)

    def inside(self, eqn: JaxprEqn, values: Sequence[Any], scope: str, times: int | None) -> None:
        """The bodies of a loop, the branches of a condition."""
        for body, operands, count, evaluate in _bodies(eqn, values):
            walk = self if evaluate else _Walk(self.sites, evaluate=False)
            repeated = None if times is None or count is None else times * count
            walk(body, operands, scope, repeated, [False] * len(opened(body)[0].outvars))


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
            operands = [_abstract(v) for v in opened(body)[0].invars]
            if len(operands) == len(values):
                pairs = zip(values, operands, strict=True)
                operands = [v if np.shape(v) == shape.shape else shape for v, shape in pairs]
            yield body, operands, 1, False


def _scan_operands(eqn: JaxprEqn, body: Any, values: Sequence[Any]) -> list[Any]:
    """Constants are known, a carry where the body hands it on, a slice of xs never."""
    fixed, carried = scan_counts(eqn, body)
    carry = _unchanged(body, values[: fixed + carried], fixed)
    return [*values[:fixed], *carry, *map(_abstract, opened(body)[0].invars[fixed + carried :])]


def _unchanged(body: Any, values: Sequence[Any], fixed: int) -> list[Any]:
    """The carry of a loop after ``fixed`` constants, known where the body returns what it was given."""
    inner = opened(body)[0]
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


def _is_mutable(eqn: JaxprEqn) -> bool:
    """Whether an equation makes, reads or writes a mutable array, whose value depends on what ran before."""
    return not all(isinstance(v.aval, ShapedArray) for v in (*eqn.invars, *eqn.outvars))


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


# -- the same function, fully connected --------------------------------------------------------


def fully_connected(
    fn: Callable[..., Any], *, builder: Callable[[ConvSpec, Any], Any] = as_matrix
) -> Callable[..., Any]:
    """The same function with every convolution done as a product ``M @ x``, the batch as columns.

    Composes with jit, vmap and grad on either side. Gradients with respect to kernels flow through the
    matrices. A custom derivative rule in ``fn`` is kept, and the convolutions in it are exchanged too.
    Also exchanged are the products of this library, :func:`apply` and its derivatives.

    Each matrix is built anew from its kernel whenever the function runs, so put ``jax.jit`` around it.

    Args:
      fn: any function of JAX arrays; models of flax, equinox, haiku or keras among them.
      builder: ``builder(spec, kernel)`` returns what stands for M: anything with ``@`` and ``.T``. Dense
        by default; :func:`as_bcoo` for a sparse one.

    Returns:
      A function of the same arguments and results.

    Raises:
      ValueError: from the builder when a dense M is beyond the memory limit.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> layer = lambda x: jax.nn.relu(jax.lax.conv(x, jnp.ones((1, 1, 2)), (1,), "VALID") - 3)
    >>> x = jnp.arange(5.0).reshape(1, 1, 5)
    >>> print(layer(x), fc.fully_connected(layer)(x))
    [[[0. 0. 2. 4.]]] [[[0. 0. 2. 4.]]]
    >>> fc.find_convs(fc.fully_connected(layer), x)
    no convolutions
    """

    @functools.wraps(fn, updated=())
    def connected(*args: Any, **kwargs: Any) -> Any:
        traced = trace(fn, args, kwargs)
        return traced.rebuild(_Exchange(builder)(traced.jaxpr, traced.arguments))

    return connected


@dataclass(frozen=True)
class _Exchange:
    """Evaluates a jaxpr with every convolution exchanged for a product with the builder's matrix."""

    builder: Callable[[ConvSpec, Any], Any]

    def __call__(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        env = Environment(jaxpr, arguments)
        for eqn in env.equations:
            values = env.read(eqn.invars)
            if eqn.primitive is conv_general_dilated_p:
                results = [self.convolution(eqn, *values)]
            elif eqn.primitive is product_p:
                results = [self.product(eqn, *values)]
            elif holds_conv(eqn):
                results = self.call(eqn, values)
            else:
                results = bind(eqn, values)
            env.write(eqn.outvars, results)
        return env.read(env.outvars)

    def transformed(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fully_connected(fn, builder=self.builder)

    # -- products ------------------------------------------------------------------------------

    def convolution(self, eqn: JaxprEqn, x: Any, kernel: Any) -> Any:
        spec, precision = spec_of(eqn), eqn.params["precision"]
        result: Any = eqn.outvars[0].aval

        def compute(x: Any, kernel: Any) -> Any:
            matrix = self.builder(spec, kernel.astype(result.dtype))
            stack = examples(spec, x.astype(result.dtype))
            y = _matmul(matrix, stack.reshape(stack.shape[0], spec.in_size).T, precision)
            return batched_output(spec, y.T.reshape(stack.shape[0], *spec.out_shape))

        return as_on_one_device(compute, result)(x, kernel)

    def product(self, eqn: JaxprEqn, a: Any, b: Any) -> Any:
        """A product of this library: its batch axes mapped over, and summed where the result has none."""
        spec, out, precision = eqn.params["spec"], eqn.params["out"], eqn.params["precision"]

        def compute(a: Any, b: Any) -> Any:
            if out == "k":  # linear in the kernel: the matrix of that map is X
                return _matmul(kernel_matrix(spec, a).T, b.ravel(), precision).reshape(spec.rhs_shape)
            matrix = self.builder(spec, a)
            if out == "x":
                return _matmul(matrix.T, b.ravel(), precision).reshape(spec.in_shape)
            return _matmul(matrix, b.ravel(), precision).reshape(spec.out_shape)

        for label in reversed(eqn.params["batches"]):
            axes = tuple(0 if role in label else None for role in {"y": "kx", "x": "ky", "k": "xy"}[out])
            compute = _mapped(compute, axes, summed=out not in label)
        return as_on_one_device(compute, eqn.outvars[0].aval)(a, b)

    # -- calls that hold convolutions ----------------------------------------------------------

    def call(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in ("custom_jvp_call", "custom_vjp_call", "custom_vmap_call"):
            return getattr(self, name)(eqn, values)
        if name in ("remat2", "checkpoint"):
            keep = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
            return jax.checkpoint(lambda *a: self(inner_jaxprs(eqn)[0], a), **keep)(*values)
        if name in CALLS:  # a boundary of compilation is none of evaluation
            return self(inner_jaxprs(eqn)[0], values)
        if name == "shard_map":
            return self.shard_map(eqn, values)
        if not _is_closed(self.builder):
            return self.around(eqn, values)
        # JAX compiles a loop, and knows it again only by the identity of its jaxpr, which is new here.
        return compiled(_Around(self), alone(eqn), *values)

    def around(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """The same equation around rewritten jaxprs."""
        return bind(eqn, values, {key: self.rewritten(value) for key, value in eqn.params.items()})

    def rewritten(self, value: Any) -> Any:
        """A parameter of an equation with the convolutions exchanged in every jaxpr it consists of."""
        if isinstance(value, tuple | list) and any(isinstance(v, ClosedJaxpr | Jaxpr) for v in value):
            parts = map(self.rewritten, value)
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if not isinstance(value, ClosedJaxpr | Jaxpr):
            return value
        operands = [v.aval for v in opened(value)[0].invars]
        return jax.make_jaxpr(lambda *a: self(value, a))(*operands)

    def custom_jvp_call(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        call, original, operands = self.primal(eqn, values)
        call = jax.custom_jvp(call)
        call.defjvp(self.transformed(lambda primals, tangents: jax.jvp(original, primals, tangents)))
        return call(*operands)

    def custom_vjp_call(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        call, original, operands = self.primal(eqn, values)
        call = jax.custom_vjp(call)
        # The pullback is a pytree: its arrays are the residuals.
        forward = self.transformed(lambda *a: jax.vjp(original, *a))
        backward = self.transformed(lambda pullback, cotangents: pullback(cotangents))
        call.defvjp(forward, backward)
        return call(*operands)

    def custom_vmap_call(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        call, original, operands = self.primal(eqn, values)
        call = jax.custom_batching.custom_vmap(call)

        def rule(size: int, batched: Sequence[bool], *operands: Any) -> tuple[list[Any], list[bool]]:
            axes = [0 if b else None for b in batched]
            results = self.transformed(jax.vmap(original, axes, axis_size=size))(*operands)
            return results, [True] * len(results)

        call.def_vmap(rule)
        return call(*operands)

    def primal(self, eqn: JaxprEqn, values: Sequence[Any]) -> tuple[Any, Any, Sequence[Any]]:
        """(the function rewritten, the original with its rule, operands) of a call with a custom rule."""
        count = eqn.params.get("num_consts", 0)  # the rule has no say over these
        constants, operands = values[:count], values[count:]
        return (
            lambda *a: self(inner_jaxprs(eqn)[0], [*constants, *a]),
            lambda *a: bind(eqn, [*constants, *a]),
            operands,
        )

    def shard_map(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        mapped = jax.shard_map(
            lambda *a: tuple(self(inner_jaxprs(eqn)[0], a)),
            mesh=eqn.params["mesh"],
            in_specs=tuple(eqn.params["in_specs"]),
            out_specs=tuple(eqn.params["out_specs"]),
            axis_names=set(eqn.params["newly_manual_axes"]),
            check_vma=eqn.params["check_vma"],
        )
        return list(mapped(*values))


def _is_closed(builder: Any) -> bool:
    """Whether a function closes over nothing: what is compiled for it may be kept, and keeps no tracer."""
    return inspect.isfunction(builder) and not builder.__closure__ and not builder.__defaults__


@dataclass(frozen=True)
class _Around:
    """The one equation of a jaxpr, around rewritten jaxprs."""

    exchange: _Exchange

    def __call__(self, jaxpr: Any, *values: Any) -> list[Any]:
        return self.exchange.around(opened(jaxpr)[0].eqns[0], values)


def _matmul(matrix: Any, columns: Any, precision: Any) -> Any:
    if isinstance(matrix, jax.Array):
        return jnp.matmul(matrix, columns, precision=precision)
    return matrix @ columns


def _mapped(compute: Callable[..., Any], axes: tuple[int | None, ...], summed: bool) -> Callable[..., Any]:
    mapped = jax.vmap(compute, axes)
    return (lambda *operands: mapped(*operands).sum(0, dtype=operands[0].dtype)) if summed else mapped


# -- batches as examples -----------------------------------------------------------------------


def spec_of(eqn: JaxprEqn) -> ConvSpec:
    """The geometry of a ``conv_general_dilated`` equation."""
    lhs, rhs = (_abstract(v).shape for v in eqn.invars)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
             "feature_group_count", "batch_group_count")  # fmt: skip
    return conv_spec(lhs, rhs, *(eqn.params[name] for name in names))


def examples(spec: ConvSpec, x: Any) -> Any:
    """A batch of ``lhs_shape`` as a stack ``(examples, *in_shape)``; batch groups lie group-major."""
    axis = spec.dimension_numbers.lhs_spec[0]
    groups = spec.batch_group_count
    count = x.shape[axis] // groups
    if count != 1:
        x = x.reshape(*x.shape[:axis], groups, count, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis + 1, 0)
    return x.reshape(count, *spec.in_shape)


def batched_output(spec: ConvSpec, y: Any) -> Any:
    """A stack ``(examples, *out_shape)`` with the batch where the convolution puts it."""
    return jnp.moveaxis(y, 0, spec.dimension_numbers.out_spec[0])


# -- where an equation is ---------------------------------------------------------------------


def holds_conv(eqn: JaxprEqn) -> bool:
    """Whether a convolution is performed somewhere inside an equation."""
    return any(
        inner.primitive in _CONVOLUTIONS or holds_conv(inner)
        for jaxpr in inner_jaxprs(eqn)
        for inner in opened(jaxpr)[0].eqns
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

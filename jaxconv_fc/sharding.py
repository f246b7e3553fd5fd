"""Array types on several devices: over which mesh axes a value varies, and how it is partitioned; platforms.

Inside ``jax.shard_map`` a type names the mesh axes over which the value *varies*: devices along such an
axis hold different values. Where a varying and an unvarying operand meet, the unvarying one must be made
to vary first (``lax.pcast``). The transpose of that cast is the sum over devices that the gradient of a
replicated operand needs. JAX's own primitives cast their operands; ours must do it too.

On a mesh with explicit axes a type names the mesh axis that each dimension is partitioned over, and JAX
asks for the partition of the result of a reshape or a scatter.

The products follow these types. Everything else is a :func:`program`, in which types are those of one
device. So its loops and reshapes, and the libraries that it calls, work unchanged.

A program runs in the form of its platform: :func:`by_platform` chooses when the program is lowered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.experimental.jet import jet_rules
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AbstractMesh, AxisType, ManualAxisType, NamedSharding, PartitionSpec


def is_traced(value: Any) -> bool:
    """Whether a value is a tracer: inside a JAX transformation it has a type, and no numbers yet."""
    return isinstance(value, Tracer)


# -- varying axes --------------------------------------------------------------------------------


def varying_axes(array: Any) -> frozenset[str]:
    """The mesh axes over which an array varies; none outside ``shard_map`` or with ``check_vma=False``."""
    return jax.typeof(array).manual_axis_type.varying


def vary_alike(tree: Any, *others: Any) -> Any:
    """``tree``, every array of which varies over all mesh axes of all arrays in ``tree`` and ``others``.

    The operands of a primitive must vary over the same axes; so must the state of a loop at every step.
    """
    leaves = jax.tree.leaves((tree, others))
    axes = frozenset[str]().union(*map(varying_axes, leaves))
    return jax.tree.map(lambda leaf: _varying(leaf, axes), tree) if axes else tree


def _varying(array: Any, axes: frozenset[str]) -> Any:
    missing = axes - varying_axes(array)
    return lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


# Gives a value a type that varies over exactly `axes`. `lax.pcast` can only add axes; this can remove them.
# The transpose gives the cotangent the old axes and sums over no devices. So devices must not communicate
# between the removal of axes and their return.
relabel_p = Primitive("relabel_varying_axes")
RELABELS = ("pvary", relabel_p.name)  # primitives whose result is their operand, said to vary elsewhere
relabel_p.def_impl(lambda x, *, axes: x)
relabel_p.def_abstract_eval(lambda x, *, axes: x.update(manual_axis_type=ManualAxisType(varying=axes)))
mlir.register_lowering(relabel_p, lambda _, x, *, axes: [x])
ad.deflinear2(relabel_p, lambda ct, x, *, axes: [relabel_p.bind(ct, axes=x.aval.manual_axis_type.varying)])
batching.defvectorized(relabel_p)


def _relabelled(tree: Any, axes: frozenset[str]) -> Any:
    return jax.tree.map(lambda leaf: relabel_p.bind(leaf, axes=axes), tree)


# -- explicit partitions ---------------------------------------------------------------------------


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh of the types in ``tree`` if one of its axes is explicit, else None."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def on_automatic_axes(fn: Callable[..., Any], out_sharding: NamedSharding) -> Callable[..., Any]:
    """``fn`` with the explicit axes of the mesh made automatic inside; its results get ``out_sharding``."""
    mesh = out_sharding.mesh
    axes = tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=out_sharding)


def result_sharding(
    labels: Sequence[Hashable], shape: Sequence[int], operands: Sequence[tuple[Sequence[Hashable], Any]]
) -> NamedSharding | None:
    """The sharding in the type of a result whose dimensions have the names ``labels``; None without a mesh.

    The operands are pairs ``(labels, type)``. A dimension of the result is partitioned like the operands'
    dimension of the same name. It is not partitioned if they have none, if its size is not divisible, or if
    an earlier dimension uses the same mesh axis.
    """
    meshes = [aval.sharding.mesh for _, aval in operands if not aval.sharding.mesh.empty]
    if not meshes:
        return None
    known: dict[Hashable, tuple[str, ...]] = {}
    for names, aval in operands:
        for name, part in zip(names, aval.sharding.spec, strict=False):  # a spec may be shorter
            known[name] = known.get(name) or _axis_names(part)
    used: set[str] = set()
    partition = []
    for label, size in zip(labels, shape, strict=True):
        axes = known.get(label, ())
        whole = not used.isdisjoint(axes) or size % math.prod(meshes[0].shape[axis] for axis in axes)
        partition.append(() if whole else axes)
        used.update(partition[-1])
    return NamedSharding(meshes[0], PartitionSpec(*(axes or None for axes in partition)))


def _axis_names(part: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return part if isinstance(part, tuple) else () if part is None else (part,)


# -- programs --------------------------------------------------------------------------------------


def program(fn: Callable[..., Any], *, static_argnums: int | Sequence[int] = ()) -> Callable[..., Any]:
    """``jax.jit(fn)`` of a function without communication, which sees types as on one device.

    Inside ``shard_map`` its results vary over all mesh axes over which an operand varies. On explicit axes
    its results are replicated.
    """
    static = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)

    @partial(jax.jit, static_argnums=static)
    @wraps(fn)
    def run(*args: Any) -> Any:
        arrays = {i: arg for i, arg in enumerate(args) if i not in static}
        return on_one_device(lambda given: fn(*(given.get(i, arg) for i, arg in enumerate(args))), arrays)

    return run


def on_one_device(fn: Callable[..., Any], *args: Any, result: Any = None) -> Any:
    """``fn(*args)``, where the arrays have types as on one device; see :func:`program`.

    On explicit axes the result is partitioned as the type ``result`` is, or replicated without one.
    """
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(args)))
    if axes:
        return _relabelled(fn(*_relabelled(vary_alike(args), frozenset())), axes)
    mesh = explicit_mesh(args)
    if mesh is None:
        return fn(*args)
    sharding = NamedSharding(mesh, PartitionSpec()) if result is None else result.sharding
    return on_automatic_axes(fn, sharding)(*args)


def replicated(array: jax.Array) -> jax.Array:
    """The array, replicated if its mesh has explicit axes."""
    mesh = explicit_mesh(array)
    return array if mesh is None else jax.reshard(array, NamedSharding(mesh, PartitionSpec()))


def fenced(form: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """``form(*operands)`` as a call that XLA does not inline.

    XLA would fuse what stands before a sum over taps into it, and compute it once per tap. It would fuse the
    sum into a reduction behind it, and lose vectors and threads.

    Dimensions of size 1 stay outside: their order in memory is open, so XLA may choose another one on the
    other side of the fence, and copy the array.
    """
    sizes: list[tuple[int, ...]] = []  # of the operands, then of the result

    def squeezed(array: jax.Array) -> jax.Array:
        sizes.append(array.shape)
        return lax.squeeze(array, [i for i, size in enumerate(array.shape) if size == 1])

    def expanded(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return lax.expand_dims(array, [i for i, size in enumerate(shape) if size == 1])

    def inside(*arrays: jax.Array) -> jax.Array:
        return squeezed(form(*map(expanded, arrays, sizes)))

    arrays = list(map(squeezed, operands))
    with set_xla_metadata(inlineable="false"):
        result = jax.jit(inside)(*arrays)  # `inside` is new, so it is traced now
    return expanded(result, sizes[-1])


# -- one form per kind of platform ---------------------------------------------------------------------


class Bound(NamedTuple):
    """``functools.partial(fn, *given)``. Two are equal if ``fn`` and ``given`` are.

    So it can be a parameter of a primitive: JAX compiles a program once for equal parameters.
    """

    fn: Callable[..., Any]
    given: tuple[Any, ...]  # hashable

    def __call__(self, *operands: Any) -> Any:
        return self.fn(*self.given, *operands)


class PlatformForms(NamedTuple):
    """One function in a form per platform, with equal results. A program traces the one form that it runs."""

    cpu: Bound  # also for a platform that is not named here
    gpu: Bound
    tpu: Bound
    transposed: Bound | None = None  # () -> the forms of its transpose; None: JAX transposes each form

    def each(self, change: Callable[..., Any], *given: Any) -> PlatformForms:
        """Every form changed: ``change(form, *given, *operands)``."""
        return PlatformForms(*(Bound(change, (form, *given)) for form in self[:3]))


def platform_forms(
    default: Callable[..., Any],
    tpu: Callable[..., Any],
    *given: Any,
    gpu: Callable[..., Any] | None = None,
    transposed: Bound | None = None,
) -> PlatformForms:
    """The forms ``default(*given, *operands)``, and alike for GPU (the default if None) and TPU."""
    return PlatformForms(*(Bound(fn, given) for fn in (default, gpu or default, tpu)), transposed=transposed)


def lower_by_platform(primitive: Primitive, form_of: Callable[[str], Callable[..., Any]]) -> None:
    """On the platform ``name`` the primitive is ``form_of(name)(*operands, **params)``."""
    for name in PlatformForms._fields[:3]:
        rule = mlir.lower_fun(form_of(name), multiple_results=primitive.multiple_results)
        mlir.register_lowering(primitive, rule, platform=None if name == "cpu" else name)


def by_platform(form: PlatformForms, result: Any, *operands: jax.Array, linear: int = 1) -> Any:
    """``form(*operands)`` inside a :func:`program`: arrays with the shapes and dtypes of those in ``result``.

    The function is linear in its first ``linear`` operands together.
    """
    leaves, tree = jax.tree.flatten(result)
    types = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return jax.tree.unflatten(tree, platform_p.bind(*operands, form=form, types=types, linear=linear))


def _form(name: str, *operands: jax.Array, form: PlatformForms, **_: Any) -> list[jax.Array]:
    return jax.tree.leaves(getattr(form, name)(*operands))


platform_p = Primitive("by_platform")
platform_p.multiple_results = True
platform_p.def_impl(partial(xla.apply_primitive, platform_p))  # met under disable_jit only


def _platform_type(*operands: Any, types: Sequence[tuple[tuple[int, ...], Any]], **_: Any) -> list[Any]:
    """Arrays on the mesh of the operands, whole on every device."""
    known = [((), operand) for operand in operands]
    shardings = [result_sharding(range(len(shape)), shape, known) for shape, _ in types]
    return [
        operands[0].update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)
        for (shape, dtype), sharding in zip(types, shardings, strict=True)
    ]


platform_p.def_abstract_eval(_platform_type)
lower_by_platform(platform_p, lambda name: partial(_form, name))


def _platform_jvp(primals: Any, tangents: Any, *, form: PlatformForms, linear: int, **params: Any) -> Any:
    values = platform_p.bind(*primals, form=form, linear=linear, **params)
    moving = tuple(i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero))
    if not moving:
        return values, [ad.Zero(jax.typeof(value).to_tangent_aval()) for value in values]
    if moving[-1] < linear:
        changes = map(ad.instantiate_zeros, tangents[:linear])
        return values, platform_p.bind(*changes, *primals[linear:], form=form, linear=linear, **params)
    form, changes = form.each(_pushed, moving), [tangents[i] for i in moving]
    return values, platform_p.bind(*changes, *primals, form=form, linear=len(moving), **params)


def _pushed(form: Bound, moving: tuple[int, ...], *operands: jax.Array) -> list[jax.Array]:
    """The derivative of a form along changes of the operands ``moving``, which stand before all operands."""
    changes, point = operands[: len(moving)], operands[len(moving) :]

    def along(*moved: jax.Array) -> list[jax.Array]:
        by_place = dict(zip(moving, moved, strict=True))
        return jax.tree.leaves(form(*(by_place.get(i, operand) for i, operand in enumerate(point))))

    return jax.jvp(along, tuple(point[i] for i in moving), changes)[1]


def _platform_transpose(cts: Any, *operands: Any, form: PlatformForms, linear: int, **_: Any) -> list[Any]:
    """The cotangent of every linear operand that is asked for, by the transpose of each form."""
    avals = [v.aval if ad.is_undefined_primal(v) else jax.typeof(v) for v in operands[:linear]]
    given = (*map(ad.instantiate_zeros, cts), *operands[linear:])
    cotangents: list[Any] = [None] * len(operands)
    for i, aval in enumerate(avals):
        if ad.is_undefined_primal(operands[i]) and not all(isinstance(ct, ad.Zero) for ct in cts):
            pulled = form.transposed() if form.transposed else form.each(_pulled, tuple(avals), i, len(cts))
            cotangents[i] = by_platform(pulled, aval, *given, linear=len(cts))
    return cotangents


def _pulled(form: Bound, avals: Sequence[Any], i: int, results: int, *given: jax.Array) -> jax.Array:
    """The transpose of a form with respect to operand ``i``, the other linear ones being 0."""
    zeros = [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
    cts, constants = list(given[:results]), given[results:]

    def of_one(value: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(form(*zeros[:i], value, *zeros[i + 1 :], *constants))

    if jnp.issubdtype(avals[i].dtype, jnp.inexact):
        return jax.vjp(of_one, zeros[i])[1](cts)[0]
    return jax.linear_transpose(of_one, zeros[i])(cts)[0]  # integers have no derivative


def _platform_taylor(primals: Any, series: Any, *, linear: int, **params: Any) -> tuple[Any, Any]:
    """Every term of a Taylor series by itself, for ``jax.experimental.jet``."""
    values, *terms = (
        platform_p.bind(*moving, *primals[linear:], linear=linear, **params)
        for moving in (primals[:linear], *zip(*series[:linear], strict=True))
    )
    return values, [list(of_one) for of_one in zip(*terms, strict=True)]


def _mapped(form: Bound, dims: tuple[int | None, ...], *operands: jax.Array) -> Any:
    return jax.vmap(form, dims)(*operands)


def _platform_batched(args: Any, dims: Any, *, form: PlatformForms, types: Any, **params: Any) -> Any:
    size = next(v.shape[d] for v, d in zip(args, dims, strict=True) if d is not None)
    types = tuple(((size, *shape), dtype) for shape, dtype in types)
    results = platform_p.bind(*args, form=form.each(_mapped, tuple(dims)), types=types, **params)
    return results, [0] * len(results)


ad.primitive_jvps[platform_p] = _platform_jvp
ad.primitive_transposes[platform_p] = _platform_transpose
batching.primitive_batchers[platform_p] = _platform_batched
jet_rules[platform_p] = _platform_taylor


# -- arrays of a given type ------------------------------------------------------------------------


def zeros(aval: Any) -> jax.Array:
    """Zeros of this type: its shape, dtype, partition and varying axes."""
    array = lax.full(aval.shape, 0, aval.dtype, sharding=_explicit_sharding(aval))
    return _varying(array, aval.manual_axis_type.varying)


def broadcast(value: Any, aval: Any) -> jax.Array:
    """A value broadcast to this type: its shape, partition and varying axes."""
    array = jnp.broadcast_to(value, aval.shape, out_sharding=_explicit_sharding(aval))
    return _varying(array, aval.manual_axis_type.varying)


def _explicit_sharding(aval: Any) -> NamedSharding | None:
    return aval.sharding if AxisType.Explicit in aval.sharding.mesh.axis_types else None

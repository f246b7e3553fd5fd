"""What the type of an array says beside shape and dtype: where it varies, and how it is partitioned.

Inside ``jax.shard_map`` a type names the mesh axes over which the value *varies*: devices along such an
axis hold different values. Where a varying and an unvarying operand meet, the unvarying one must be made
to vary first (``lax.pcast``). The transpose of that cast is the sum over devices that the gradient of a
replicated operand needs. JAX's own primitives cast by themselves; ours must do it too.

On a mesh with explicit axes a type names the mesh axis that each dimension is partitioned over. Most of
our programs reshape and scatter, for which JAX wants to be told the partition of every result. They run
with those axes automatic instead (``jax.sharding.auto_axes``), and only their results get a partition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def varying_axes(array: Any) -> frozenset[str]:
    """The mesh axes over which an array varies; none outside ``shard_map`` and under ``check_vma=False``."""
    return jax.typeof(array).manual_axis_type.varying


def vary_alike(tree: Any, *others: Any) -> Any:
    """``tree`` with every array varying over all mesh axes over which one of its own or ``others`` does.

    The operands of a primitive must agree in this, and so must the state of a loop before and after a step.
    """
    leaves = jax.tree.leaves((tree, others))
    axes = frozenset[str]().union(*map(varying_axes, leaves))
    return jax.tree.map(lambda leaf: _varying(leaf, axes), tree) if axes else tree


def _varying(array: Any, axes: frozenset[str]) -> Any:
    missing = axes - varying_axes(array)
    return lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh of the types in ``tree``, if one of its axes is explicit."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def on_automatic_axes(fn: Callable[..., Any], out_sharding: NamedSharding) -> Callable[..., Any]:
    """``fn`` run with the explicit axes of a mesh made automatic; its results get ``out_sharding``."""
    mesh = out_sharding.mesh
    axes = tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=out_sharding)


def program(fn: Callable[..., Any], *, static_argnums: int | Sequence[int] = ()) -> Callable[..., Any]:
    """``jax.jit(fn)`` that also takes arrays with explicit partitions; its results are then replicated."""
    static = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)

    @functools.partial(jax.jit, static_argnums=static)
    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        arrays = [i for i in range(len(args)) if i not in static]
        mesh = explicit_mesh([args[i] for i in arrays])
        if mesh is None:
            return fn(*args)

        def of_arrays(*values: Any) -> Any:
            filled = dict(zip(arrays, values, strict=True))
            return fn(*(filled.get(i, arg) for i, arg in enumerate(args)))

        replicated = NamedSharding(mesh, PartitionSpec())
        return on_automatic_axes(of_arrays, replicated)(*(args[i] for i in arrays))

    return run


def result_sharding(
    labels: Sequence[Hashable], shape: Sequence[int], operands: Sequence[tuple[Sequence[Hashable], Any]]
) -> NamedSharding | None:
    """The sharding in the type of a result whose dimensions are called ``labels``; None without a mesh.

    Each dimension is partitioned as the operands' dimension of the same name is, given as pairs
    ``(labels, type)``. It is whole where they have none of this name, where its size does not divide, and
    where an earlier dimension has the mesh axis already.
    """
    meshes = [aval.sharding.mesh for _, aval in operands if not aval.sharding.mesh.empty]
    if not meshes:
        return None
    known: dict[Hashable, tuple[str, ...]] = {}
    for names, aval in operands:
        for name, part in zip(names, aval.sharding.spec, strict=False):  # a spec may be shorter
            known.setdefault(name, _axis_names(part))
            known[name] = known[name] or _axis_names(part)
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

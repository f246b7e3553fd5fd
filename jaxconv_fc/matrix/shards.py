"""M with its rows distributed over the devices of a mesh, dense and sparse."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.axis import Ints
from jaxconv_fc.geometry.entries import Reads, axis_widths, entry_dtype, listed, place, sorted_reads
from jaxconv_fc.geometry.layout import split_row
from jaxconv_fc.geometry.memory import check_array, check_stored
from jaxconv_fc.geometry.spec import ConvSpec, as_operand
from jaxconv_fc.matrix.dense import matrix_rows
from jaxconv_fc.sharding import is_traced

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO


def shard_matrix(spec: ConvSpec, kernel: Array, mesh: Mesh, axis_name: str | None = None) -> jax.Array:
    """M by rows over a mesh: ``shard_matrix(spec, kernel, mesh)[:out_size] == as_matrix(spec, kernel)``.

    Every device builds its own rows only. Of ``D`` devices along ``axis_name``, device ``n`` holds the rows
    ``[n*R, (n+1)*R)`` with ``R = ceil(out_size / D)``. JAX needs equal shares, so up to ``D - 1`` rows of
    zeros stand at the end. One program (``jax.shard_map``) builds M without communication, also over many
    processes and under jit and grad. The products are JAX's own::

        y = (M @ x)[:spec.out_size]                    # every device makes its part of y
        x = M.T @ jnp.pad(y, (0, len(M) - len(y)))     # the devices' parts are added

    The axes of the mesh count as automatic, unless ``jax.set_mesh`` has made them explicit.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; every device gets it.
      mesh: the devices.
      axis_name: the mesh axis to distribute rows over, the first by default; other axes hold copies.

    Returns:
      Array of shape ``(D*R, in_size)``, sharded as ``PartitionSpec(axis_name, None)``.

    Raises:
      TypeError: the kernel is not an array, or the mesh not a Mesh.
      ValueError: a wrong shape or axis name, or one share is beyond the memory limit.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "SAME")
    >>> mesh = jax.make_mesh((1,), ("rows",))  # all your devices, in real life
    >>> print(fc.shard_matrix(spec, jnp.array([[[1, 2]]]), mesh))
    [[1 2 0 0]
     [0 1 2 0]
     [0 0 1 2]
     [0 0 0 1]]
    """
    kernel, mesh, axis_name = _on_mesh(spec, kernel, mesh, axis_name)
    share = -(-spec.out_size // mesh.shape[axis_name]), spec.in_size
    check_array(
        "shard_matrix, per device", share, kernel.dtype, "more devices, shard_bcoo or apply", spec.nse
    )
    return _dense_shards(spec, kernel, mesh=mesh, axis_name=axis_name)


def shard_bcoo(spec: ConvSpec, kernel: Array, mesh: Mesh, axis_name: str | None = None) -> BCOO:
    """M as BCOO by rows over a mesh: ``shard_bcoo(spec, kernel, mesh).todense() == as_matrix(spec, kernel)``.

    The rows are distributed as in :func:`shard_matrix`. Every device builds the entries of its own rows only.
    A share with fewer entries than the largest is padded, as JAX pads its own, with entries of value 0 one
    past the end, ``indices == spec.shape``. The flags ``indices_sorted`` and ``unique_indices`` are set if no
    share is padded.

    Under jit, ``M @ x`` and ``M.T @ y`` add up the devices' parts, and M is not moved. Where ``jax.set_mesh``
    has made the axes explicit, JAX refuses these products: put ``jax.sharding.auto_axes`` around them.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; every device gets it.
      mesh: the devices.
      axis_name: the mesh axis to distribute rows over, the first by default; other axes hold copies.

    Returns:
      BCOO of shape ``spec.shape``, its entries sharded as ``PartitionSpec(axis_name)``.

    Raises:
      TypeError, ValueError: as :func:`shard_matrix`.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "SAME")
    >>> matrix = fc.shard_bcoo(spec, jnp.array([[[1, 2]]]), jax.make_mesh((1,), ("rows",)))
    >>> print(jax.jit(lambda m, x: m @ x)(matrix, jnp.array([1, 10, 100, 1000])))
    [  21  210 2100 1000]
    """
    kernel, mesh, axis_name = _on_mesh(spec, kernel, mesh, axis_name)
    counts = np.diff(_shard_starts(spec, mesh.shape[axis_name]))
    nbytes = int(counts.max()) * (kernel.dtype.itemsize + 2 * jnp.dtype(entry_dtype(spec)).itemsize)
    check_stored("shard_bcoo", spec.nse, nbytes, "more devices, or apply")
    full = bool((counts == counts.max()).all())
    arrays = _sparse_shards(spec, kernel, mesh=mesh, axis_name=axis_name)
    from jax.experimental.sparse import BCOO

    return BCOO(arrays, shape=spec.shape, indices_sorted=full, unique_indices=full)


def _on_mesh(spec: ConvSpec, kernel: Array, mesh: Any, axis_name: str | None) -> tuple[jax.Array, Mesh, str]:
    array = as_operand("kernel", kernel, spec, "rhs_shape")
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a Mesh, got {mesh!r}. Write jax.make_mesh((8,), ('rows',)).")
    axis_name = str(mesh.axis_names[0]) if axis_name is None else axis_name
    if axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name must be one of the mesh's {mesh.axis_names}, got {axis_name!r}.")
    # Explicit axes (of jax.make_mesh) put the sharding into types, which the products of BCOO refuse. So axes
    # count as automatic, unless `jax.set_mesh` has made them explicit for the whole program.
    context = jax.sharding.get_abstract_mesh()
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=None if context.empty else context.axis_types)
    if not is_traced(array):
        array = jax.device_put(array, NamedSharding(mesh, PartitionSpec()))
    return array, mesh, axis_name


def _shard_rows(spec: ConvSpec, mesh: Mesh, axis_name: str) -> tuple[Ints, Ints]:
    """``(row, inside)`` of one device: its rows, and whether they are rows of M; the last row if not."""
    share = -(-spec.out_size // mesh.shape[axis_name])
    dtype = entry_dtype(spec)
    row = lax.axis_index(axis_name).astype(dtype) * share + lax.iota(dtype, share)
    return jnp.minimum(row, spec.out_size - 1), row < spec.out_size


@partial(jax.jit, static_argnames=("mesh", "axis_name"))
def _dense_shards(spec: ConvSpec, kernel: jax.Array, *, mesh: Mesh, axis_name: str) -> jax.Array:
    def build(kernel: jax.Array) -> jax.Array:
        row, inside = _shard_rows(spec, mesh, axis_name)
        return jnp.where(inside[:, None], matrix_rows(spec, kernel, row), jnp.zeros((), kernel.dtype))

    rows = PartitionSpec(axis_name, None)
    return jax.shard_map(build, mesh=mesh, in_specs=PartitionSpec(), out_specs=rows)(kernel)


@partial(jax.jit, static_argnames=("mesh", "axis_name"))
def _sparse_shards(
    spec: ConvSpec, kernel: jax.Array, *, mesh: Mesh, axis_name: str
) -> tuple[jax.Array, jax.Array]:
    """``(data, indices)``, as BCOO takes them."""
    dtype, bounds = entry_dtype(spec), _shard_starts(spec, mesh.shape[axis_name])
    size = int(np.diff(bounds).max())

    def build(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        row, inside = _shard_rows(spec, mesh, axis_name)
        first, last = (jnp.asarray(b, dtype)[lax.axis_index(axis_name)] for b in (bounds[:-1], bounds[1:]))
        positions, d = split_row(spec, row)
        tables = [sorted_reads(axis, dtype) for axis in spec.axes]
        reads = [table.each(lambda v, o=o: v[o]) for table, o in zip(tables, positions, strict=True)]
        part = listed(spec, row.shape, positions, d, reads, inside, first, size)
        stored = lax.iota(dtype, size) < last - first
        data = part.data(kernel.reshape(1, -1), part.at.tap)[0]
        indices = jnp.stack([part.of(part.at.row), part.of(part.at.column)], axis=-1)
        data = jnp.where(stored, data, jnp.zeros((), data.dtype))
        return data, jnp.where(stored[:, None], indices, jnp.asarray([spec.shape], dtype))

    specs = PartitionSpec(axis_name), PartitionSpec(axis_name, None)
    return jax.shard_map(build, mesh=mesh, in_specs=PartitionSpec(), out_specs=specs)(kernel)


def _shard_starts(spec: ConvSpec, shards: int) -> np.ndarray:
    """How many entries stand before each of equal shares of the rows, and ``nse`` at the end."""
    share = -(-spec.out_size // shards)
    tables = [(w, w.cumsum() - w) for w in map(axis_widths, spec.axes)]
    starts = [spec.nse] * (shards + 1)
    for n in range(-(-spec.out_size // max(1, share))):
        positions, d = split_row(spec, n * share)
        reads = [
            Reads(0, True, 0, int(width[o]), int(start[o]), axis.pair_count)
            for axis, (width, start), o in zip(spec.axes, tables, positions, strict=True)
        ]
        starts[n] = place(spec, reads, d, 0)
    return np.asarray(starts)

"""M without its zeros: as BCOO and BCSR of JAX, as CSR of SciPy, and by generalized diagonals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.sparse import BCOO, BCSR
from scipy.sparse import csr_array

from jaxconv_fc.arguments import native
from jaxconv_fc.axis import Axis
from jaxconv_fc.layout import grid, inverse, out_first, spread
from jaxconv_fc.layout import taps as kernel_taps
from jaxconv_fc.lines import output_runs
from jaxconv_fc.memory import check_stored
from jaxconv_fc.sharding import is_traced, program
from jaxconv_fc.sparse.entries import (
    AxisReads,
    axis_reads,
    axis_widths,
    entry_dtype,
    entry_places,
    entry_values,
    group_column,
    part_count,
    put_at,
    row_starts,
)
from jaxconv_fc.sparse.host import fill_columns, fill_values, fresh_memory, row_pointers, together
from jaxconv_fc.spec import ConvSpec, as_operand


def as_bcoo(spec: ConvSpec, kernel: Any) -> BCOO:
    """M as a BCOO matrix: ``spec.nse`` entries ``M[row, column]``, sorted by row, then by column.

    Exactly the entries that are not structurally zero are stored, each once and with no padding; taps
    that meet in one entry (padding modes) are added first. A stored entry is 0 where the kernel is.
    Linear in the kernel, differentiable, and ``jax.vmap`` over kernels gives a batch of matrices.

    JAX's products of BCOO and BCSR matrices lose the varying axes inside ``jax.shard_map``, so gradients
    through them are wrong there. Use :func:`apply`, or :func:`shard_bcoo` outside of ``shard_map``.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``, any dtype.

    Returns:
      BCOO of shape ``spec.shape``; ``data`` (nse,), ``indices`` (nse, 2), int32 where they fit.

    Raises:
      TypeError: the kernel is not an array.
      ValueError: it has another shape; the arrays are beyond the memory limit, or need indices beyond
        int32 without ``jax_enable_x64``.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), [(1, 0)])
    >>> matrix = fc.as_bcoo(spec, jnp.array([[[1, 2]]]))
    >>> print(matrix.data, matrix.indices.tolist())
    [2 1 2 1 2] [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    check_stored("as_bcoo", spec, spec.nbytes(kernel.dtype).bcoo, "row_blocks or apply")
    data, indices = _coo(spec, kernel)
    return BCOO((data, indices), shape=spec.shape, indices_sorted=True, unique_indices=True)


def as_bcsr(spec: ConvSpec, kernel: Any) -> BCSR:
    """M as a BCSR matrix: the entries of :func:`as_bcoo` with ``indptr`` in place of row numbers.

    Row ``i`` has the columns ``indices[indptr[i]:indptr[i + 1]]``, ascending, and the values ``data`` there.
    Two thirds of the bytes of BCOO, and the faster product on CPU. Inside ``jax.shard_map`` the product is
    wrong, as that of :func:`as_bcoo` is.

    Args, Raises: as :func:`as_bcoo`.

    Returns:
      BCSR of shape ``spec.shape``; ``data`` and ``indices`` (nse,), ``indptr`` (out_size + 1,).

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), [(1, 0)])
    >>> matrix = fc.as_bcsr(spec, jnp.array([[[1, 2]]]))
    >>> print(matrix.data, matrix.indices, matrix.indptr)
    [2 1 2 1 2] [0 0 1 1 2] [0 1 3 5]
    >>> print(matrix @ jnp.array([1, 10, 100]))
    [  2  21 210]
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    check_stored("as_bcsr", spec, spec.nbytes(kernel.dtype).bcsr, "row_blocks or apply")
    return BCSR(_csr(spec, kernel), shape=spec.shape, indices_sorted=True, unique_indices=True)


def as_scipy(spec: ConvSpec, kernel: Any) -> csr_array:
    """M as a SciPy ``csr_array`` in canonical form, built on the host: ``spec.nse`` entries, no zeros stored.

    Entries as in :func:`as_bcsr`. Takes NumPy and JAX kernels and keeps their dtype, float64 without
    ``jax_enable_x64`` included. Runs at the speed of writing the arrays, and needs little memory beside
    them. SciPy has no other formats to pay for: ``.tocsc()``, ``.tobsr()`` convert.

    Raises:
      TypeError: the kernel is not an array, is traced, or has a dtype that SciPy cannot multiply.
      ValueError: it has another shape, or the arrays are beyond the memory limit.

    >>> import numpy as np, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), [(1, 0)])
    >>> print(fc.as_scipy(spec, np.array([[[1.0, 2.0]]])).toarray())
    [[2. 0. 0.]
     [1. 2. 0.]
     [0. 1. 2.]]
    """
    values = host_kernel("as_scipy", spec, kernel)
    check_stored("as_scipy", spec, spec.nbytes(values.dtype).bcsr, "row_blocks or apply")
    index = np.int32 if spec.stored_reach <= np.iinfo(np.int32).max else np.int64
    data, columns = together(
        spec.nse,
        lambda: fill_values(spec, out_first(spec, values), fresh_memory(spec.nse, values.dtype)),
        lambda: fill_columns(spec, fresh_memory(spec.nse, index)),
    )
    matrix = csr_array((data, columns, row_pointers(spec, index)), shape=spec.shape)
    matrix.has_canonical_format = True  # by construction; SciPy would go through all entries to see it
    return matrix


def host_kernel(name: str, spec: ConvSpec, kernel: Any) -> np.ndarray:
    if is_traced(kernel):
        raise TypeError(f"kernel is traced, {kernel}, and {name} makes NumPy arrays: use as_bcsr under jit.")
    as_operand("kernel", kernel, spec, "rhs_shape")
    values = native(np.asarray(kernel))
    if values.dtype.kind not in "biufc" or values.dtype == np.float16:
        raise TypeError(f"kernel is {values.dtype}, which SciPy cannot multiply: kernel.astype(np.float32).")
    return values


@program
def _csr(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(data, columns, indptr)``."""
    data, _, columns = _stored(spec, kernel)
    dtype = columns.dtype
    dims = (*(a.out_size for a in spec.axes), spec.out_channels)
    tables = [axis_reads(axis, dtype) for axis in spec.axes]
    widths = [spread(table.width, dims, a) for a, table in enumerate(tables)]
    starts = [spread(table.start, dims, a) for a, table in enumerate(tables)]
    channel = spread(lax.iota(dtype, spec.out_channels), dims, len(spec.axes))
    start, _ = row_starts(spec, widths, starts, channel)
    starts = jnp.transpose(jnp.broadcast_to(start, dims), inverse(spec.out_order)).reshape(-1)
    return data, columns.reshape(-1), jnp.append(starts, jnp.asarray(spec.nse, dtype))


@program
def _coo(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(data, indices)``."""
    data, rows, columns = _stored(spec, kernel)
    rows, columns = jnp.broadcast_arrays(rows(), columns)
    return data, jnp.stack([rows, columns], axis=-1).reshape(spec.nse, 2)


def _stored(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, Callable[[], jax.Array], jax.Array]:
    """``(data, rows, columns)`` of all entries in order; rows on demand.

    A table of places, those of one part, serves all parts.
    """
    dtype, n, parts = entry_dtype(spec), len(spec.axes), part_count(spec)
    dims = (
        *(a.out_size for a in spec.axes),
        spec.out_channels // parts,
        spec.group_channels,
        *kernel_taps(spec),
    )
    indices = grid(dims, dtype)
    tables = [axis_reads(axis, dtype) for axis in spec.axes]
    reads = [AxisReads(*(spread(v, dims, a, n + 2 + a) for v in table)) for a, table in enumerate(tables)]
    size = spec.nse // parts
    always = jnp.ones((1,) * len(dims), bool)
    places = entry_places(
        spec, dims, reads, indices[:n], indices[n], indices[n + 1], indices[n + 2 :], always, 0, size
    )
    put = partial(put_at, places, size, not spec.collides)
    data = entry_values(spec, places, out_first(spec, kernel).reshape(parts, -1), size).reshape(-1)
    part = lax.broadcasted_iota(dtype, (parts, 1), 0)
    columns = jnp.broadcast_to(put(places.column)[None] + group_column(spec, part), (parts, size))
    zeros = [part * 0] * n
    return data, lambda: put(places.row)[None] + spec.row(zeros, part), columns


# -- diagonals ---------------------------------------------------------------------------------


def diagonals(spec: ConvSpec, kernel: Any) -> dict[int, jax.Array]:
    """The generalized diagonals of M that are not structurally zero: ``{offset: diagonal}``, ascending.

    ``diagonals[k][i] = M[i, (i + k) % in_size]``, for ``0 <= k < in_size``, of length ``out_size``. So::

        (M @ x)[i] = sum over k of diagonals[k][i] * x[(i + k) % in_size]

    which is how a matrix is packed for homomorphic encryption (Halevi and Shoup 2014): one rotation of
    the vector and one elementwise product per diagonal. A convolution has few: the offsets of its axes
    add up, so they are found without looking at entries. Linear in the kernel, differentiable.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.

    Returns:
      A dict from offset to an array of shape ``(out_size,)``.

    Raises:
      TypeError, ValueError: as :func:`as_bcoo`.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), [(1, 0)])
    >>> for offset, diagonal in fc.diagonals(spec, jnp.array([[[1, 2]]])).items():
    ...     print(offset, diagonal)
    0 [2 2 2 2]
    3 [0 1 1 1]
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    check_stored("diagonals", spec, spec.nbytes(kernel.dtype).bcoo, "row_blocks or apply")  # all are visited
    offsets = _offsets(spec)
    nbytes = len(offsets) * spec.out_size * kernel.dtype.itemsize
    check_stored("diagonals", spec, nbytes, "row_blocks or apply")
    return dict(zip(offsets.tolist(), _diagonals(spec, kernel), strict=True))  # one row each


def _offsets(spec: ConvSpec) -> np.ndarray:
    """Every ``(column - row) % in_size`` of an entry: sums of one term per axis, in all combinations."""
    if not spec.nse:
        return np.empty(0, np.int64)
    o = [np.repeat(np.arange(a.out_size), axis_widths(a)) for a in spec.axes]
    t = [_pairs(a) for a in spec.axes]
    zeros = [0] * len(spec.axes)
    d, i = np.arange(spec.out_channels)[:, None], np.arange(spec.group_channels)
    sums = np.unique(spec.column(zeros, i) + group_column(spec, d) - spec.row(zeros, d))
    for a in range(len(spec.axes)):
        at, to = ([v[b] if a == b else 0 for b in range(len(v))] for v in (o, t))
        terms = np.unique(spec.column(to, 0) - spec.row(at, 0))
        sums = np.unique((sums[:, None] + terms) % spec.in_size)
    return np.unique(sums % spec.in_size)


def _pairs(axis: Axis) -> np.ndarray:
    """The input of every pair (output, input) of an axis, sorted by output, then by input."""
    t = np.empty(axis.pair_count, np.int64)
    for run in output_runs(axis):
        q = np.arange(len(run.outputs))[:, None]
        t[run.start + q * run.stride + np.arange(run.width)] = run.reads + q * run.advance
    return t


@program
def _diagonals(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    offsets = _offsets(spec)
    stacked = jnp.zeros((len(offsets), spec.out_size), kernel.dtype)
    if not len(offsets):
        return stacked
    data, indices = _coo(spec, kernel)
    row, column = indices[:, 0], indices[:, 1]
    which = jnp.searchsorted(jnp.asarray(offsets, row.dtype), (column - row) % spec.in_size)
    return stacked.at[which, row].set(data, unique_indices=True)

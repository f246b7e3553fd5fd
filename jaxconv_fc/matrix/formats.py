"""M without its zeros: as JAX's BCOO and BCSR, as SciPy's CSR, and by generalized diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.entries import (
    Listed,
    Reads,
    entry_dtype,
    group_column,
    listed,
    pairs,
    row_pointers,
    sorted_reads,
)
from jaxconv_fc.geometry.arguments import Array, as_array, check_same_dtype, native
from jaxconv_fc.geometry.layout import column_of, grid, kernel_parts, part_count, row_of, spread, tap_in_part
from jaxconv_fc.geometry.memory import check_stored
from jaxconv_fc.geometry.spec import ConvSpec, as_operand, spec_first
from jaxconv_fc.matrix.dense import check_bias, of_every_output
from jaxconv_fc.matrix.host import fresh_arrays, host_plan
from jaxconv_fc.sharding import is_traced, program

if TYPE_CHECKING:  # takes long to load: the builders load what they need
    from jax.experimental.sparse import BCOO, BCSR
    from scipy.sparse import csr_array


@spec_first
def as_bcoo(spec: ConvSpec, kernel: Array) -> BCOO:
    """M as a BCOO matrix, ``as_bcoo(spec, kernel).todense() == as_matrix(spec, kernel)``.

    It holds ``spec.nse`` entries, sorted by row, then by column (docs/maths.md, section 9).

    Every entry that is not structurally zero is stored once, with no padding. Taps that meet in one entry
    (boundary modes) are added. A stored entry is 0 where the kernel is. Linear in the kernel, differentiable,
    and ``jax.vmap`` over kernels gives a batch of matrices.

    JAX's products of BCOO and BCSR matrices lose the varying axes inside ``jax.shard_map``, so gradients
    through them are wrong there. Use :func:`apply`, or :func:`shard_bcoo` outside ``shard_map``.

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
    check_stored("as_bcoo", spec.nse, spec.nbytes(kernel.dtype).bcoo)
    from jax.experimental.sparse import BCOO

    return BCOO(_coo(spec, kernel), shape=spec.shape, indices_sorted=True, unique_indices=True)


@spec_first
def as_bcsr(spec: ConvSpec, kernel: Array) -> BCSR:
    """M as a BCSR matrix, ``as_bcsr(spec, kernel).todense() == as_matrix(spec, kernel)``.

    It has the entries of :func:`as_bcoo`, and ``indptr`` in place of row numbers (docs/maths.md, section 9).
    Row ``i`` has the columns ``indices[indptr[i]:indptr[i + 1]]``, ascending, and the values ``data`` there.
    Two thirds of the bytes of BCOO, and a faster product on CPU. Inside ``jax.shard_map`` gradients through
    the product are wrong, as for :func:`as_bcoo`.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``, any dtype.

    Returns:
      BCSR of shape ``spec.shape``; ``data`` and ``indices`` (nse,), ``indptr`` (out_size + 1,).

    Raises:
      TypeError, ValueError: as :func:`as_bcoo`.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), [(1, 0)])
    >>> matrix = fc.as_bcsr(spec, jnp.array([[[1, 2]]]))
    >>> print(matrix.data, matrix.indices, matrix.indptr)
    [2 1 2 1 2] [0 0 1 1 2] [0 1 3 5]
    >>> print(matrix @ jnp.array([1, 10, 100]))
    [  2  21 210]
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    check_stored("as_bcsr", spec.nse, spec.nbytes(kernel.dtype).bcsr)
    from jax.experimental.sparse import BCSR

    return BCSR(_csr(spec, kernel), shape=spec.shape, indices_sorted=True, unique_indices=True)


@spec_first
def as_scipy(spec: ConvSpec, kernel: Array) -> csr_array:
    """M as a SciPy ``csr_array``, ``as_scipy(spec, kernel).toarray() == as_matrix(spec, kernel)``.

    It is in canonical form and built on the host: the entries of :func:`as_bcsr` (docs/maths.md, section 9).
    NumPy and JAX kernels keep their dtype, also float64 without ``jax_enable_x64``. The time is about that of
    writing the arrays, and little memory is needed beside them. Its three arrays are views of one block of
    memory, which is freed when none of them is left. ``.tocsc()``, ``.tobsr()`` and the like convert to other
    formats.

    Args:
      spec: the geometry.
      kernel: concrete array of shape ``spec.rhs_shape``.

    Returns:
      ``csr_array`` of shape ``spec.shape``.

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
    values = kernel_parts(spec, host_kernel("as_scipy", spec, kernel))
    check_stored("as_scipy", spec.nse, spec.nbytes(values.dtype).bcsr)
    plan = host_plan(spec)
    index, rows = plan.pointers.dtype, len(plan.pointers)
    data, columns, indptr = fresh_arrays((spec.nse, values.dtype), (spec.nse, index), (rows, index))
    indptr[:] = plan.pointers
    plan.fill(values, data, columns)
    matrix = copy(plan.empty)
    matrix.data, matrix.indices, matrix.indptr = data, columns, indptr
    return matrix


@spec_first
def as_scipy_affine(spec: ConvSpec, kernel: Array, bias: Array) -> tuple[csr_array, np.ndarray]:
    """``(M, b)`` with ``conv(x, kernel) + bias == (M @ x.ravel() + b).reshape(spec.out_shape)``, M sparse.

    The sibling of :func:`as_affine` for solvers and files outside of JAX. :func:`sparse_matrix_of` has the
    same of whole functions.

    Args:
      spec: the geometry.
      kernel: concrete array of shape ``spec.rhs_shape``.
      bias: concrete, one entry per output channel, shape ``(out_channels,)``, or a map of ``spec.out_shape``.

    Returns:
      M as :func:`as_scipy` gives it, and b, a NumPy array of shape ``(spec.out_size,)``.

    Raises:
      TypeError: as :func:`as_scipy`, and for a bias that is traced or of another dtype.
      ValueError: as :func:`as_scipy`, and for a bias of another shape.

    >>> import numpy as np, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 3), (2, 1, 2), (1,), "VALID")
    >>> matrix, vector = fc.as_scipy_affine(spec, np.ones((2, 1, 2)), np.array([0.5, -1.0]))
    >>> print(matrix.nnz, vector)
    8 [ 0.5  0.5 -1.  -1. ]
    """
    if is_traced(bias):
        raise TypeError(f"bias is traced, {bias}, and as_scipy_affine makes NumPy arrays: use as_affine.")
    matrix = as_scipy(spec, kernel)
    if not isinstance(bias, np.ndarray | jax.Array):
        as_array("bias", bias)  # slow: only to say what is wrong
    bias = native(np.asarray(bias))
    check_same_dtype("kernel", matrix, "bias", bias)
    check_bias(spec, bias)
    return matrix, of_every_output(spec, bias, np).copy()


def host_kernel(name: str, spec: ConvSpec, kernel: Array) -> np.ndarray:
    """The kernel as a NumPy array of its own dtype, for a builder that runs on the host."""
    if is_traced(kernel):
        raise TypeError(f"kernel is traced, {kernel}, and {name} makes NumPy arrays: use as_bcsr under jit.")
    usable = isinstance(kernel, np.ndarray | jax.Array) and getattr(kernel.dtype, "kind", "O") in "biufc"
    if not usable or kernel.shape != getattr(spec, "rhs_shape", None):
        as_operand("kernel", kernel, spec, "rhs_shape")  # slow: only to say what is wrong
    values = native(np.asarray(kernel))
    if values.dtype.num >= np.dtype(np.float16).num:  # dtypes that are not NumPy's own have larger numbers
        raise TypeError(f"kernel is {values.dtype}, which SciPy cannot multiply: kernel.astype(np.float32).")
    return values


@program
def _csr(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(data, columns, indptr)``, as BCSR takes them."""
    if not spec.nse:
        dtype = entry_dtype(spec)
        return jnp.zeros(0, kernel.dtype), jnp.zeros(0, dtype), jnp.zeros(spec.out_size + 1, dtype)
    tables = _tables(spec)
    part, d = _part(spec, tables), lax.iota(entry_dtype(spec), spec.out_channels)
    indptr = row_pointers(spec, [table.each(lambda v: v[:, 0]) for table in tables], d)
    return _data(spec, kernel, part), _columns(spec, part), indptr


@program
def _coo(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(data, indices)``, as BCOO takes them."""
    if not spec.nse:
        return jnp.zeros(0, kernel.dtype), jnp.zeros((0, 2), entry_dtype(spec))
    part = _part(spec, _tables(spec))
    return _data(spec, kernel, part), jnp.stack([_rows(spec, part), _columns(spec, part)], axis=-1)


# One of the equal parts of M is listed, and repeated for the others. The results are (nse,).


def _tables(spec: ConvSpec) -> list[Reads]:
    return [sorted_reads(axis, entry_dtype(spec)) for axis in spec.axes]


def _part(spec: ConvSpec, tables: Sequence[Reads]) -> Listed:
    """The entries of one part of M, [o, d, i, p], from the tables (outputs, taps) of every axis."""
    dtype, parts = entry_dtype(spec), part_count(spec)
    dims = (*(axis.out_size for axis in spec.axes), spec.out_channels // parts)
    *positions, d = grid(dims, dtype)
    reads = [
        table.each(lambda v, a=a: spread(v, (*dims, v.shape[1]), a, len(dims)))
        for a, table in enumerate(tables)
    ]
    inside = jnp.ones((1,) * len(dims), bool)
    return listed(spec, dims, positions, d, reads, inside, 0, spec.nse // parts)


def _data(spec: ConvSpec, kernel: jax.Array, part: Listed) -> jax.Array:
    return part.data(kernel_parts(spec, kernel), tap_in_part(spec, part.at.tap)).reshape(-1)  # [part, entry]


def _rows(spec: ConvSpec, part: Listed) -> jax.Array:
    first = row_of(spec, [0] * len(spec.axes), _parts(spec))
    return (part.of(part.at.row)[None] + first).reshape(-1)  # [1, entry] [part, 1]


def _columns(spec: ConvSpec, part: Listed) -> jax.Array:
    first = group_column(spec, _parts(spec))
    return (part.of(part.at.column)[None] + first).reshape(-1)  # [1, entry] [part, 1]


def _parts(spec: ConvSpec) -> jax.Array:
    return lax.broadcasted_iota(entry_dtype(spec), (part_count(spec), 1), 0)


# -- diagonals ---------------------------------------------------------------------------------


def diagonals(spec: ConvSpec, kernel: Array) -> dict[int, jax.Array]:
    """The generalized diagonals of M: ``diagonals[k][i] = M[i, (i + k) % in_size]``.

    A dict ``{offset: diagonal}`` of those that are not structurally zero, with ``0 <= offset < in_size``
    ascending and diagonals of length ``out_size`` (docs/maths.md, section 9). So::

        (M @ x)[i] = sum over k of diagonals[k][i] * x[(i + k) % in_size]

    Homomorphic encryption packs a matrix so (Halevi and Shoup 2014): a product with a vector is one rotation
    of the vector and one elementwise product per diagonal. A convolution has few diagonals. Their offsets
    are sums of one offset per axis. Linear in the kernel, differentiable.

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
    check_stored("diagonals", spec.nse, spec.nbytes(kernel.dtype).bcoo)  # the entries are made first
    offsets = _offsets(spec)
    nbytes = len(offsets) * spec.out_size * kernel.dtype.itemsize
    check_stored("diagonals", spec.nse, nbytes)
    return dict(zip(offsets.tolist(), _diagonals(spec, kernel), strict=True))  # one row each


def _offsets(spec: ConvSpec) -> np.ndarray:
    """Every ``(column - row) % in_size`` of an entry: all sums of one term per axis."""
    if not spec.nse:
        return np.empty(0, np.int64)
    zeros = [0] * len(spec.axes)
    d, i = np.arange(spec.out_channels)[:, None], np.arange(spec.group_channels)
    sums = np.unique(column_of(spec, zeros, i) + group_column(spec, d) - row_of(spec, zeros, d))
    for a, axis in enumerate(spec.axes):
        o, _, reads = pairs(axis, np.arange(axis.out_size))
        of_axis = [*zeros[:a], 1, *zeros[a + 1 :]]
        terms = np.unique(reads.t * column_of(spec, of_axis, 0) - o * row_of(spec, of_axis, 0))
        sums = np.unique((sums[:, None] + terms) % spec.in_size)
    return np.unique(sums % spec.in_size)


@program
def _diagonals(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    offsets = _offsets(spec)
    stacked = jnp.zeros((len(offsets), spec.out_size), kernel.dtype)
    if not len(offsets):
        return stacked
    part = _part(spec, _tables(spec))
    data, row, column = _data(spec, kernel, part), _rows(spec, part), _columns(spec, part)
    which = jnp.searchsorted(jnp.asarray(offsets, row.dtype), (column - row) % spec.in_size)
    return stacked.at[which, row].set(data, unique_indices=True)

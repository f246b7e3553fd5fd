"""M without its zeros: as JAX's BCOO and BCSR, as SciPy's CSR, and by generalized diagonals."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.arguments import Array, native
from jaxconv_fc.axis import Axis
from jaxconv_fc.layout import column_of, grid, out_first, row_of, spread
from jaxconv_fc.lines import output_runs
from jaxconv_fc.memory import check_stored
from jaxconv_fc.sharding import Bound, PlatformForms, by_platform, is_traced, program
from jaxconv_fc.sparse import pieces
from jaxconv_fc.sparse.entries import (
    AxisReads,
    Places,
    Rows,
    axis_reads,
    axis_widths,
    entry_dtype,
    entry_places,
    group_column,
    listed,
    listed_entries,
    part_count,
    row_pointers,
)
from jaxconv_fc.sparse.host import fill, fresh_arrays, host_tables
from jaxconv_fc.spec import ConvSpec, as_operand, spec_first

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
    values = out_first(spec, host_kernel("as_scipy", spec, kernel))
    check_stored("as_scipy", spec.nse, spec.nbytes(values.dtype).bcsr)
    tables = host_tables(spec)
    index, rows = tables.pointers.dtype, len(tables.pointers)
    data, columns, indptr = fresh_arrays((spec.nse, values.dtype), (spec.nse, index), (rows, index))
    indptr[:] = tables.pointers
    fill(spec, tables, values, data, columns)
    matrix = copy(tables.empty)
    matrix.data, matrix.indices, matrix.indptr = data, columns, indptr
    return matrix


def host_kernel(name: str, spec: ConvSpec, kernel: Array) -> np.ndarray:
    """The kernel as a NumPy array of its own dtype, for a builder that runs on the host."""
    if is_traced(kernel):
        raise TypeError(f"kernel is traced, {kernel}, and {name} makes NumPy arrays: use as_bcsr under jit.")
    usable = isinstance(kernel, np.ndarray | jax.Array) and getattr(kernel.dtype, "kind", "O") in "biufc"
    if not usable or kernel.shape != getattr(spec, "rhs_shape", None):
        as_operand("kernel", kernel, spec, "rhs_shape")  # slow: only to say what is wrong
    values = native(np.asarray(kernel))
    if values.dtype.isbuiltin != 1 or values.dtype == np.float16:  # bfloat16, int4, ... are not NumPy's own
        raise TypeError(f"kernel is {values.dtype}, which SciPy cannot multiply: kernel.astype(np.float32).")
    return values


@program
def _csr(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(data, columns, indptr)``, as BCSR takes them."""
    dtype = entry_dtype(spec)
    tables = [axis_reads(axis, dtype) for axis in spec.axes]
    widths, starts = [t.width[:, 0] for t in tables], [t.start[:, 0] for t in tables]
    indptr = row_pointers(spec, widths, starts, lax.iota(dtype, spec.out_channels))
    places = _places(spec)
    return _data(spec, kernel, places), _columns(spec, places), indptr


@program
def _coo(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(data, indices)``, as BCOO takes them."""
    places = _places(spec)
    return _data(spec, kernel, places), jnp.stack([_rows(spec, places), _columns(spec, places)], axis=-1)


# The entries of M in order, each (nse,). By scatter one of the equal parts of M is listed, and repeated for
# the others.


def _data(spec: ConvSpec, kernel: jax.Array, places: Places) -> jax.Array:
    return _listed(spec, _scattered_data, pieces.values, kernel.dtype, places, kernel)


def _scattered_data(spec: ConvSpec, places: Places, kernel: jax.Array) -> jax.Array:
    parts = out_first(spec, kernel).reshape(part_count(spec), -1)
    return listed_entries(spec, places, parts).reshape(-1)  # [part, entry]


def _rows(spec: ConvSpec, places: Places) -> jax.Array:
    return _listed(spec, _scattered_rows, pieces.rows, entry_dtype(spec), places)


def _scattered_rows(spec: ConvSpec, places: Places) -> jax.Array:
    part = _parts(spec)
    first = row_of(spec, [part * 0] * len(spec.axes), part)
    return (listed(spec, places, places.row)[None] + first).reshape(-1)  # [1, entry] [part, 1]


def _columns(spec: ConvSpec, places: Places) -> jax.Array:
    return _listed(spec, _scattered_columns, pieces.columns, entry_dtype(spec), places)


def _scattered_columns(spec: ConvSpec, places: Places) -> jax.Array:
    first = group_column(spec, _parts(spec))
    return (listed(spec, places, places.column)[None] + first).reshape(-1)  # [1, entry] [part, 1]


def _listed(
    spec: ConvSpec,
    scattered: Callable[..., jax.Array],
    in_pieces: Callable[..., jax.Array],
    dtype: Any,
    places: Places,
    *kernel: jax.Array,
) -> jax.Array:
    """A list of all entries, by ``scattered(spec, places, *kernel)``; on TPU in pieces, if these are few."""
    if not spec.nse:
        return jnp.zeros(0, dtype)
    dims, size, *indices = places
    default = Bound(_from_indices, (spec, scattered, dims, size, len(kernel)))
    form = PlatformForms(default, default, Bound(_in_pieces, (spec, in_pieces, default, len(kernel))))
    result = jax.ShapeDtypeStruct((spec.nse,), dtype)
    return by_platform(form, result, *kernel, *indices, linear=len(kernel))


def _from_indices(
    spec: ConvSpec,
    scattered: Callable[..., jax.Array],
    dims: tuple[int, ...],
    size: int,
    given: int,
    *operands: jax.Array,
) -> jax.Array:
    return scattered(spec, Places(dims, size, *operands[given:]), *operands[:given])


def _in_pieces(
    spec: ConvSpec, in_pieces: Callable[..., jax.Array], default: Bound, given: int, *operands: jax.Array
) -> jax.Array:
    return in_pieces(spec, *operands[:given]) if pieces.are_few(spec) else default(*operands)


def _parts(spec: ConvSpec) -> jax.Array:
    return lax.broadcasted_iota(entry_dtype(spec), (part_count(spec), 1), 0)


def _places(spec: ConvSpec) -> Places:
    """Where the entries of one part go."""
    dtype, parts = entry_dtype(spec), part_count(spec)
    dims = (*(a.out_size for a in spec.axes), spec.out_channels // parts)
    *positions, d = grid(dims, dtype)
    reads = [
        AxisReads(*(spread(v, (*dims, axis.taps), a, len(dims)) for v in axis_reads(axis, dtype)))
        for a, axis in enumerate(spec.axes)
    ]
    rows = Rows(dims, positions, d, reads, jnp.ones((1,) * len(dims), bool))
    return entry_places(spec, rows, 0, spec.nse // parts)


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
    o = [np.repeat(np.arange(a.out_size), axis_widths(a)) for a in spec.axes]
    t = [_inputs_read(a) for a in spec.axes]
    zeros = [0] * len(spec.axes)
    d, i = np.arange(spec.out_channels)[:, None], np.arange(spec.group_channels)
    sums = np.unique(column_of(spec, zeros, i) + group_column(spec, d) - row_of(spec, zeros, d))
    for a in range(len(spec.axes)):
        at, to = ([v[b] if a == b else 0 for b in range(len(v))] for v in (o, t))
        terms = np.unique(column_of(spec, to, 0) - row_of(spec, at, 0))
        sums = np.unique((sums[:, None] + terms) % spec.in_size)
    return np.unique(sums % spec.in_size)


def _inputs_read(axis: Axis) -> np.ndarray:
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
    places = _places(spec)
    data, row, column = _data(spec, kernel, places), _rows(spec, places), _columns(spec, places)
    which = jnp.searchsorted(jnp.asarray(offsets, row.dtype), (column - row) % spec.in_size)
    return stacked.at[which, row].set(data, unique_indices=True)

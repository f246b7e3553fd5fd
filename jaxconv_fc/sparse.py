"""The matrix of a convolution without its zeros: formats of JAX and SciPy, diagonals, row blocks, shards.

The entries of one row of M are the product of what its output position reads on each axis. So where a
row begins in the sorted list of all entries, and where in the row an entry stands, are formulas in small
tables per axis (:func:`_starts`, :func:`_offsets`), and nothing is ever sorted. A traced program scatters
kernel entries to those places. The host, which can write into arrays, does it by classes of outputs
(:attr:`Axis.runs`): a product of classes is one regular part of the arrays.

The only file that imports ``jax.experimental.sparse``.
"""

from __future__ import annotations

import itertools
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental.sparse import BCOO, BCSR
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.sparse import csr_array

from jaxconv_fc.axis import Axis, Ints, Run
from jaxconv_fc.dense import matrix_rows
from jaxconv_fc.sharding import program
from jaxconv_fc.spec import ConvSpec, as_int, as_operand, check_spec, check_stored, index_dtype, native

_SMALL = 2**9  # entries of a table of one axis that a program may hold


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
    values = _host_kernel("as_scipy", spec, kernel)
    check_stored("as_scipy", spec, spec.nbytes(values.dtype).bcsr, "row_blocks or apply")
    index = np.int32 if spec.stored_reach <= np.iinfo(np.int32).max else np.int64
    data, columns = _together(
        spec.nse,
        lambda: _host_data(spec, _out_first(spec, values), _fresh(spec.nse, values.dtype)),
        lambda: _host_columns(spec, _fresh(spec.nse, index)),
    )
    matrix = csr_array((data, columns, _indptr(spec, index)), shape=spec.shape)
    matrix.has_canonical_format = True  # by construction; SciPy would go through all entries to see it
    return matrix


def _together(size: int, *jobs: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """Arrays of this size made on a core each; one after the other if a thread takes longer to start."""
    if size < 2**18:
        return [job() for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as threads:
        return [made.result() for made in [threads.submit(job) for job in jobs]]


def _fresh(size: int, dtype: Any) -> np.ndarray:
    """Memory to be written, in ordinary pages where there is much of it.

    ``np.empty`` asks Linux for huge pages. Where those must first be put together from pages that JAX has
    just freed, writing to them has been seen to take several times as long, and ten times at worst.
    """
    nbytes = size * np.dtype(dtype).itemsize
    if nbytes < 2**28 or sys.platform != "linux":
        return np.empty(size, dtype)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype)


def _host_kernel(name: str, spec: ConvSpec, kernel: Any) -> np.ndarray:
    if isinstance(kernel, Tracer):
        raise TypeError(f"kernel is traced, {kernel}, and {name} makes NumPy arrays: use as_bcsr under jit.")
    as_operand("kernel", kernel, spec, "rhs_shape")
    values = native(np.asarray(kernel))
    if values.dtype.kind not in "biufc" or values.dtype == np.float16:
        raise TypeError(f"kernel is {values.dtype}, which SciPy cannot multiply: kernel.astype(np.float32).")
    return values


# -- where an entry stands ---------------------------------------------------------------------


class _Reads(NamedTuple):
    """What the outputs of one axis read, as arrays that broadcast over (outputs, taps)."""

    t: Ints  # the input position
    valid: Ints  # whether the tap reads one at all
    rank: Ints  # how many inputs the output reads before it
    width: Ints  # how many inputs the output reads
    start: Ints  # how many inputs the outputs before it read


def _starts(spec: ConvSpec, widths: Sequence[Ints], starts: Sequence[Ints], d: Ints) -> tuple[Ints, Ints]:
    """``(start, count)`` of a row: the entries before it, and its own.

    Rows are counted by the axes of ``out_shape`` in order. Those that differ first on one axis from the
    given row share the widths of the axes before it, and run over everything on the axes after.
    """
    widths, starts = [*widths, 1], [*starts, d]
    totals = [*(axis.pair_count for axis in spec.axes), spec.out_channels]
    order = _inverse(spec.out_order)
    start, count = 0, spec.group_channels
    for n, a in enumerate(order):
        start = start + count * starts[a] * math.prod(totals[b] for b in order[n + 1 :])
        count = count * widths[a]
    return start, count


def _offset(spec: ConvSpec, reads: Sequence[_Reads], i: Ints) -> Ints:
    """The entries of a row before that of channel ``i`` and these inputs, columns in order."""
    ranks, widths = [r.rank for r in reads], [r.width for r in reads]
    offset = 0
    for a in _inverse(spec.in_order):
        if a < len(reads):
            offset = offset * widths[a] + ranks[a]
        elif a == len(spec.in_order) - 1:  # channels; a row reads one batch entry only
            offset = offset * spec.group_channels + i
    return offset


def _reads(axis: Axis, dtype: Any) -> _Reads:
    """The table of an axis, (outputs, taps): a small one made by NumPy, any other inside the trace."""
    xp: Any = np if axis.out_size * axis.taps <= _SMALL else jnp
    o, p = xp.arange(axis.out_size, dtype=dtype)[:, None], xp.arange(axis.taps, dtype=dtype)[None]
    t, valid = axis.input_of(o, p)
    if axis.mode == "zeros":  # taps read in ascending order
        rank, width = xp.cumsum(valid, 1, dtype=dtype) - 1, xp.sum(valid, 1, dtype=dtype, keepdims=True)
    else:  # taps that read the same input have the same rank
        t = xp.where(valid, t, axis.size)
        order = xp.argsort(t, axis=1, stable=True)
        sorted_t = xp.take_along_axis(t, order, axis=1)
        new = xp.diff(sorted_t, axis=1, prepend=-1) > 0
        rank = xp.take_along_axis(xp.cumsum(new, 1, dtype=dtype) - 1, xp.argsort(order, axis=1), axis=1)
        width = xp.sum(new & (sorted_t < axis.size), 1, dtype=dtype, keepdims=True)
    start = xp.cumsum(width, 0, dtype=dtype) - width
    return _Reads(*map(jnp.asarray, (t, valid, rank, width, start)))


# -- in a trace: by scatter --------------------------------------------------------------------


class _Places(NamedTuple):
    """Where kernel entries go, as arrays that broadcast over ``dims``."""

    dims: tuple[int, ...]
    where: Ints  # index among the stored entries; one past the end where nothing is read
    row: Ints
    column: Ints
    tap: Ints  # index in the kernel, ravelled with out channels first


@program
def _csr(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(data, columns, indptr)``."""
    data, _, columns = _stored(spec, kernel)
    dtype = columns.dtype
    dims = (*(a.out_size for a in spec.axes), spec.out_channels)
    tables = [_reads(axis, dtype) for axis in spec.axes]
    widths = [_spread(table.width, dims, a) for a, table in enumerate(tables)]
    starts = [_spread(table.start, dims, a) for a, table in enumerate(tables)]
    channel = _spread(lax.iota(dtype, spec.out_channels), dims, len(spec.axes))
    start, _ = _starts(spec, widths, starts, channel)
    starts = jnp.transpose(jnp.broadcast_to(start, dims), _inverse(spec.out_order)).reshape(-1)
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
    dtype, n, parts = _index_dtype(spec), len(spec.axes), _parts(spec)
    dims = (*(a.out_size for a in spec.axes), spec.out_channels // parts, spec.group_channels, *_taps(spec))
    grid = [lax.broadcasted_iota(dtype, _only(dims, a), a) for a in range(len(dims))]
    tables = [_reads(axis, dtype) for axis in spec.axes]
    reads = [_Reads(*(_spread(v, dims, a, n + 2 + a) for v in table)) for a, table in enumerate(tables)]
    size = spec.nse // parts
    always = jnp.ones((1,) * len(dims), bool)
    places = _places(spec, dims, reads, grid[:n], grid[n], grid[n + 1], grid[n + 2 :], always, 0, size)
    put = partial(_put, places, size, not spec.collides)
    data = _data(spec, places, _out_first(spec, kernel).reshape(parts, -1), size).reshape(-1)
    part = lax.broadcasted_iota(dtype, (parts, 1), 0)
    columns = jnp.broadcast_to(put(places.column)[None] + _group_column(spec, part), (parts, size))
    zeros = [part * 0] * n
    return data, lambda: put(places.row)[None] + spec.row(zeros, part), columns


def _places(
    spec: ConvSpec,
    dims: tuple[int, ...],
    reads: Sequence[_Reads],
    o: Sequence[Ints],
    d: Ints,
    i: Ints,
    p: Sequence[Ints],
    valid: Ints,
    first: Ints,
    size: int,
) -> _Places:
    """The places of the entries ``(i, *p)`` of kernel ``d`` for output positions ``o``, counted from the
    entry ``first``; one past the ``size`` that are kept where not valid."""
    start, _ = _starts(spec, [r.width for r in reads], [r.start for r in reads], d)
    for r in reads:
        valid = valid & r.valid
    where = jnp.where(valid, start + _offset(spec, reads, i) - first, size)
    tap = d * spec.group_channels + i
    for axis, q in zip(spec.axes, p, strict=True):
        tap = tap * axis.taps + q
    column = spec.column([r.t for r in reads], i) + _group_column(spec, d)
    return _Places(dims, where, spec.row(o, d), column, tap)


def _put(places: _Places, size: int, unique: bool, values: jax.Array) -> jax.Array:
    """(size,) of values set at their places; equal places get equal values."""
    where, values = jnp.broadcast_to(places.where, places.dims), jnp.broadcast_to(values, places.dims)
    return jnp.zeros(size, values.dtype).at[where].set(values, mode="drop", unique_indices=unique)


def _data(spec: ConvSpec, places: _Places, kernel: jax.Array, size: int) -> jax.Array:
    """(parts, size) of the values of entries, from kernels (parts, entries).

    Where taps meet, kernel entries are added. Elsewhere a stored entry is one kernel entry, so that a
    table of which, made once, serves all parts.
    """
    if not spec.collides:
        return jnp.take(kernel, _put(places, size, True, places.tap), axis=1, mode="clip")
    where, tap = (jnp.broadcast_to(v, places.dims).reshape(-1) for v in (places.where, places.tap))
    entries = jnp.zeros((kernel.shape[0], size), kernel.dtype).at[:, where]
    add = entries.max if kernel.dtype == jnp.bool_ else entries.add
    return add(jnp.take(kernel, tap, axis=1, mode="clip"), mode="drop")


def _group_column(spec: ConvSpec, d: Ints) -> Ints:
    """What the group of out channel ``d`` adds to a column."""
    group = d // max(1, spec.out_channels // spec.groups)
    return spec.column([group * 0] * len(spec.axes), group * spec.group_channels)


def _out_first(spec: ConvSpec, kernel: Any) -> Any:
    """The kernel as (out channels, in channels, taps...)."""
    return kernel.transpose(spec.dimension_numbers.rhs_spec)


def _taps(spec: ConvSpec) -> tuple[int, ...]:
    return tuple(axis.taps for axis in spec.axes)


def _index_dtype(spec: ConvSpec) -> Any:
    """The narrowest integers that hold positions, and the numbers of entries."""
    wide = index_dtype(spec.stored_reach, spec)
    return wide if wide == jnp.int64 else spec.index_dtype


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _only(dims: Sequence[int], a: int) -> tuple[int, ...]:
    """``dims`` with every extent 1 but that of ``a``."""
    return tuple(n if i == a else 1 for i, n in enumerate(dims))


def _spread(table: Any, dims: Sequence[int], *axes: int) -> Any:
    """A table whose axes become those of ``dims`` that are named, all others being 1."""
    shape = [1] * len(dims)
    for extent, a in zip(table.shape, axes, strict=False):
        shape[a] = extent
    return table.reshape(shape)


# -- on the host: by classes of outputs --------------------------------------------------------


def _host_data(spec: ConvSpec, kernel: np.ndarray, data: np.ndarray) -> np.ndarray:
    """``data`` filled with the entries, given the kernel with out channels first.

    In one product of classes a value depends on the out channel and on the entry of the row.
    """
    order = _entry_order(spec)
    for runs in _classes(spec):
        block = kernel
        for a, run in enumerate(runs):
            block = _fold(block, 2 + a, run)
        block = np.moveaxis(block, 1, -1).transpose(0, *(1 + a for a in order))
        part = _part(spec, runs, data)
        block = block.reshape(spec.out_channels, -1)
        part[...] = _spread(block, part.shape, spec.out_order[-1], part.ndim - 1)
    return data


def _host_columns(spec: ConvSpec, columns: np.ndarray) -> np.ndarray:
    """``columns`` filled: what depends on the output plus what depends on the entry of the row."""
    n, dtype, parts = len(spec.axes), columns.dtype, _parts(spec)
    channels = np.arange(spec.group_channels, dtype=dtype)
    group = _group_column(spec, np.arange(spec.out_channels, dtype=dtype))
    for runs in _classes(spec):
        part = _part(spec, runs, columns)
        part = part[:1] if parts > 1 else part
        widths = (*(run.width for run in runs), spec.group_channels)
        reads = [_spread(run.reads.astype(dtype), widths, a) for a, run in enumerate(runs)]
        inside = np.broadcast_to(spec.column(reads, _spread(channels, widths, n)), widths)
        moved = [np.arange(len(run.outputs), dtype=dtype) * run.advance for run in runs]
        moved = [_spread(v, part.shape, a) for a, v in zip(spec.out_order, moved, strict=False)]
        outside = spec.column(moved, 0)
        if parts == 1:
            outside = outside + _spread(group, part.shape, spec.out_order[-1])
        np.add(outside, inside.transpose(_entry_order(spec)).reshape(-1), out=part)
    if parts > 1:
        stack = columns.reshape(parts, -1)
        np.add(stack[0], group[1:, None], out=stack[1:])
    return columns


def _parts(spec: ConvSpec) -> int:
    """How many equal parts M is a stack of: the out channels, where they come first in ``out_shape``.

    The parts differ only in kernel values and in the channel group read.
    """
    return spec.out_channels if spec.out_order[-1] == 0 and spec.nse else 1


def _classes(spec: ConvSpec) -> Iterator[tuple[Run, ...]]:
    """All products of classes of outputs, the largest first; none where nothing is stored.

    The largest go through the arrays page after page, and the others find the pages there.
    """
    ordered = [sorted(axis.runs, key=lambda run: -len(run.outputs)) for axis in spec.axes]
    return itertools.product(*ordered) if spec.nse else iter(())


def _entry_order(spec: ConvSpec) -> list[int]:
    """Spatial axes (by number) and channels (the next number) as ``in_shape`` has them, no batch groups."""
    n = len(spec.axes)
    return [min(a, n) for a in _inverse(spec.in_order) if a < n or a == len(spec.in_order) - 1]


def _part(spec: ConvSpec, runs: Sequence[Run], flat: np.ndarray) -> np.ndarray:
    """The entries of a product of classes: a view, (outputs as in ``out_shape``..., entries of a row)."""
    widths = [run.width for run in runs]
    counts = [*(len(run.outputs) for run in runs), spec.out_channels]
    first, size = _starts(spec, widths, [run.start for run in runs], 0)
    steps, strides = [*(run.stride for run in runs), 1], []
    order = _inverse(spec.out_order)
    for a in order:  # the start of a row is linear in the starts of its axes
        *unit, channel = (step if a == b else 0 for b, step in enumerate(steps))
        strides.append(_starts(spec, widths, unit, channel)[0] * flat.itemsize)
    shape = (*(counts[a] for a in order), size)
    return np.lib.stride_tricks.as_strided(flat[first:], shape, (*strides, flat.itemsize))


def _fold(kernel: np.ndarray, axis: int, run: Run) -> np.ndarray:
    """The kernel with an entry per input read in place of taps; taps that read the same one are added."""
    kernel = kernel.take(run.taps, axis)
    if len(run.taps) == run.width:
        return kernel
    add = np.logical_or if kernel.dtype == bool else np.add
    return add.reduceat(kernel, run.firsts, axis, dtype=kernel.dtype)


def _indptr(spec: ConvSpec, dtype: Any) -> np.ndarray:
    dims = (*(a.out_size for a in spec.axes), spec.out_channels)
    widths = [_spread(_widths(axis).astype(dtype), dims, a) for a, axis in enumerate(spec.axes)]
    starts = [v.cumsum(a, dtype=dtype) - v for a, v in enumerate(widths)]
    channels = np.arange(spec.out_channels, dtype=dtype)
    start, _ = _starts(spec, widths, starts, _spread(channels, dims, len(spec.axes)))
    indptr = np.full(spec.out_size + 1, spec.nse, dtype)
    indptr[:-1] = np.transpose(np.broadcast_to(start, dims), _inverse(spec.out_order)).ravel()
    return indptr


def _widths(axis: Axis) -> np.ndarray:
    """How many inputs each output of an axis reads."""
    widths = np.zeros(axis.out_size, np.int64)
    for run in axis.runs:
        widths[run.outputs.start : run.outputs.stop : run.outputs.step] = run.width
    return widths


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
    o = [np.repeat(np.arange(a.out_size), _widths(a)) for a in spec.axes]
    t = [_pairs(a) for a in spec.axes]
    zeros = [0] * len(spec.axes)
    d, i = np.arange(spec.out_channels)[:, None], np.arange(spec.group_channels)
    sums = np.unique(spec.column(zeros, i) + _group_column(spec, d) - spec.row(zeros, d))
    for a in range(len(spec.axes)):
        at, to = ([v[b] if a == b else 0 for b in range(len(v))] for v in (o, t))
        terms = np.unique(spec.column(to, 0) - spec.row(at, 0))
        sums = np.unique((sums[:, None] + terms) % spec.in_size)
    return np.unique(sums % spec.in_size)


def _pairs(axis: Axis) -> np.ndarray:
    """The input of every pair (output, input) of an axis, sorted by output, then by input."""
    t = np.empty(axis.pair_count, np.int64)
    for run in axis.runs:
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


# -- blocks of rows ----------------------------------------------------------------------------


def row_block(spec: ConvSpec, start: int, stop: int) -> tuple[ConvSpec, tuple[slice, ...], tuple[slice, ...]]:
    """``(block, in_slice, out_slice)``: outputs ``start`` to ``stop`` of the first spatial axis, as a
    smaller convolution with the same kernel.

    With M as an array of shape ``(*out_shape, *in_shape)``::

        as_matrix(block, kernel) == M[out_slice][..., in_slice]      and      M[out_slice] is 0 elsewhere
        y[out_slice] = apply(block, kernel, x[in_slice])

    The slices select one range on one axis each: the rows that the block makes, and the inputs that it
    reads, its halo included. Exact for strides, dilations, groups, layouts, and padding of any sign. In a
    boundary mode the first and last block keep what their padding is copied from (all of a circular
    axis), and ``block.padding`` may be negative, which crops after padding.

    Args:
      spec: the geometry, with at least one spatial axis (the first in ``window_strides``).
      start, stop: ``0 <= start < stop <= spec.axes[0].out_size``.

    Raises:
      TypeError: start or stop is not an int.
      ValueError: the range is empty or outside; or where a boundary mode meets ``lhs_dilation`` on this
        axis, no smaller convolution makes those rows (the message says at which multiples one does).

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 3, 8, 8), (4, 3, 3, 3), (1, 1), "SAME")
    >>> block, in_slice, out_slice = fc.row_block(spec, 4, 6)
    >>> block.in_shape, block.padding[0], in_slice[1], out_slice[1]
    ((3, 4, 8), (0, 0), slice(3, 7, None), slice(4, 6, None))
    """
    check_spec(spec)
    start, stop = as_int("start", start), as_int("stop", stop)
    if not spec.axes:
        raise ValueError("row_block cuts the first spatial axis, and this spec has none: use all of M.")
    if not 0 <= start < stop <= spec.axes[0].out_size:
        raise ValueError(
            f"start and stop must satisfy 0 <= start < stop <= {spec.axes[0].out_size}, the outputs of the "
            f"first spatial axis, got {start} and {stop}."
        )
    axis, reads = spec.axes[0].rows(start, stop)
    block = spec.having([axis, *spec.axes[1:]])
    in_slice = [slice(None)] * len(spec.in_shape)
    out_slice = [slice(None)] * len(spec.out_shape)
    in_slice[spec.in_order[0]] = slice(reads.start, reads.stop)
    out_slice[spec.out_order[0]] = slice(start, stop)
    return block, tuple(in_slice), tuple(out_slice)


class RowBlock(NamedTuple):
    """Some rows of M: ``y[out_slice] = (matrix @ x[in_slice].ravel()).reshape(spec.out_shape)``."""

    spec: ConvSpec
    in_slice: tuple[slice, ...]
    out_slice: tuple[slice, ...]
    matrix: csr_array


def row_blocks(
    spec: ConvSpec, kernel: Any, nbytes: int = 2**28, *, progress: Callable[[int, int], Any] | None = None
) -> Iterator[RowBlock]:
    """M in blocks of rows, each a SciPy CSR matrix of at most ``nbytes`` bytes: a matrix too large for
    memory, streamed through it.

    The blocks are those of :func:`row_block` along the first spatial axis, in order; their columns count
    the inputs that the block reads, ``x[in_slice].ravel()``. Keep no block, and no more than one is held.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      nbytes: the most that the arrays of one block may take.
      progress: called as ``progress(outputs done, outputs in all)`` after every block.

    Raises:
      TypeError, ValueError: as :func:`as_scipy`; and where a single output of the axis needs more than
        ``nbytes``, with the least that does.

    >>> import numpy as np, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 6, 6), (1, 1, 3, 3), (1, 1), "SAME")
    >>> x, y = np.ones(spec.in_shape), np.empty(spec.out_shape)
    >>> for block in fc.row_blocks(spec, np.ones((1, 1, 3, 3)), 2000):
    ...     y[block.out_slice] = (block.matrix @ x[block.in_slice].ravel()).reshape(block.spec.out_shape)
    ...     print(block.out_slice[1].start, block.out_slice[1].stop, block.matrix.shape)
    0 3 (18, 24)
    3 6 (18, 24)
    >>> print(y[0, 0])
    [4. 6. 6. 6. 6. 4.]
    """
    itemsize = _host_kernel("row_blocks", spec, kernel).dtype.itemsize
    cuts = _cuts(spec, as_int("nbytes", nbytes, least=1), itemsize)
    return _stream(spec, kernel, cuts, progress)


def _stream(spec: ConvSpec, kernel: Any, cuts: Sequence[int], progress: Any) -> Iterator[RowBlock]:
    for start, stop in itertools.pairwise(cuts):
        if spec.axes:
            block, in_slice, out_slice = row_block(spec, start, stop)
        else:
            block, in_slice, out_slice = spec, (slice(None),), (slice(None),)
        yield RowBlock(block, in_slice, out_slice, as_scipy(block, kernel))
        if progress is not None:
            progress(stop, cuts[-1])


def _cuts(spec: ConvSpec, nbytes: int, itemsize: int) -> list[int]:
    """Where to cut the first spatial axis so that no block takes more than ``nbytes``, greedily."""
    index = 4 if max(spec.in_size, spec.out_size, nbytes) <= np.iinfo(np.int32).max else 8
    first = spec.axes[0] if spec.axes else Axis(size=1, taps=1)
    if not spec.out_size:
        return [0]
    grains = range(0, first.out_size, first.grain)
    widths = _widths(first)
    entries = np.add.reduceat(widths, grains) * (spec.nse // max(1, int(widths.sum())))
    outputs = np.diff([*grains, first.out_size])
    costs = (entries * (itemsize + index) + outputs * (spec.out_size // first.out_size) * index).tolist()
    if max(costs) + index > nbytes:
        raise ValueError(
            f"nbytes={nbytes} holds no block: {outputs.max()} output(s) of the first spatial axis need "
            f"{max(costs) + index}. Write nbytes={max(costs) + index} or more."
        )
    cuts, used = [0], index
    for start, cost in zip(grains, costs, strict=True):
        if used + cost > nbytes:
            cuts.append(start)
            used = index
        used += cost
    return [*cuts, first.out_size]


# -- shards of rows ----------------------------------------------------------------------------


def shard_matrix(spec: ConvSpec, kernel: Any, mesh: Mesh, axis_name: str | None = None) -> jax.Array:
    """The dense M, its rows dealt out over a mesh: every device builds its own rows, and no others.

    Of ``D`` devices along ``axis_name``, device ``n`` holds the rows ``[n*R, (n+1)*R)`` with
    ``R = ceil(out_size / D)``. JAX wants equal shares, so up to ``D - 1`` rows of zeros stand at the end.
    One program (``jax.shard_map``) builds it, with no communication, also over many processes and under
    jit and grad; the products are JAX's own::

        y = (M @ x)[:spec.out_size]                    # every device makes its part of y
        x = M.T @ jnp.pad(y, (0, len(M) - len(y)))     # parts added over the devices

    The axes of the mesh count as automatic, unless ``jax.set_mesh`` has made them explicit.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; every device gets it.
      mesh: the devices.
      axis_name: the mesh axis to deal rows over, the first by default; other axes hold copies.

    Returns:
      Array of shape ``(D*R, in_size)``, sharded as ``PartitionSpec(axis_name, None)``.

    Raises:
      TypeError: the kernel is not an array, or mesh not a Mesh.
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
    return _dense_shards(spec, kernel, mesh=mesh, axis_name=axis_name)


def shard_bcoo(spec: ConvSpec, kernel: Any, mesh: Mesh, axis_name: str | None = None) -> BCOO:
    """M as a BCOO matrix whose entries are dealt out over a mesh by rows, as those of :func:`shard_matrix`.

    Every device builds the entries of its rows and no others. A share with fewer entries than the
    largest is filled up with entries of value 0 that lie one past the end, ``indices == spec.shape``, as
    JAX fills its own; only where there are none do the flags say sorted and unique. An ordinary BCOO of
    shape ``spec.shape``: ``M @ x`` and ``M.T @ y`` under jit add up what the devices make, M stays put.
    Where ``jax.set_mesh`` has made the axes explicit, JAX refuses these products: put
    ``jax.sharding.auto_axes`` around them.

    Args, Raises: as :func:`shard_matrix`.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "SAME")
    >>> matrix = fc.shard_bcoo(spec, jnp.array([[[1, 2]]]), jax.make_mesh((1,), ("rows",)))
    >>> print(jax.jit(lambda m, x: m @ x)(matrix, jnp.array([1, 10, 100, 1000])))
    [  21  210 2100 1000]
    """
    kernel, mesh, axis_name = _on_mesh(spec, kernel, mesh, axis_name)
    counts = np.diff(_shard_starts(spec, mesh.shape[axis_name]))
    nbytes = int(counts.max()) * (kernel.dtype.itemsize + 2 * jnp.dtype(_index_dtype(spec)).itemsize)
    check_stored("shard_bcoo", spec, nbytes, "more devices, or apply")
    full = bool((counts == counts.max()).all())
    arrays = _sparse_shards(spec, kernel, mesh=mesh, axis_name=axis_name)
    return BCOO(arrays, shape=spec.shape, indices_sorted=full, unique_indices=full)


def _on_mesh(spec: ConvSpec, kernel: Any, mesh: Any, axis_name: str | None) -> tuple[jax.Array, Mesh, str]:
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a Mesh, got {mesh!r}. Write jax.make_mesh((8,), ('rows',)).")
    axis_name = str(mesh.axis_names[0]) if axis_name is None else axis_name
    if axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name must be one of the mesh's {mesh.axis_names}, got {axis_name!r}.")
    # Explicit axes (jax.make_mesh) would put the sharding into types, which BCOO's products refuse: they are
    # taken as automatic, unless `jax.set_mesh` has made them explicit for all of the program.
    context = jax.sharding.get_abstract_mesh()
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=None if context.empty else context.axis_types)
    if not isinstance(kernel, Tracer):
        kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
    return kernel, mesh, axis_name


def _shard_rows(spec: ConvSpec, mesh: Mesh, axis_name: str) -> tuple[Ints, Ints]:
    """``(row, inside)`` of one device: its rows, those past the end moved onto the last."""
    share = -(-spec.out_size // mesh.shape[axis_name])
    dtype = _index_dtype(spec)
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
    n, dtype = len(spec.axes), _index_dtype(spec)
    bounds = _shard_starts(spec, mesh.shape[axis_name])
    size = int(np.diff(bounds).max())

    def build(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        row, inside = _shard_rows(spec, mesh, axis_name)
        dims = (row.shape[0], spec.group_channels, *_taps(spec))
        positions, d = spec.split_row(row)
        reads = [
            _Reads(*(_spread(v[o], dims, 0, 2 + a) for v in _reads(axis, dtype)))
            for a, (axis, o) in enumerate(zip(spec.axes, positions, strict=True))
        ]
        row, inside, d, *positions = (_spread(v, dims, 0) for v in (row, inside, d, *positions))
        i, *p = (lax.broadcasted_iota(dtype, _only(dims, a), a) for a in range(1, n + 2))
        first, last = (jnp.asarray(b, dtype)[lax.axis_index(axis_name)] for b in (bounds[:-1], bounds[1:]))
        places = _places(spec, dims, reads, positions, d, i, p, inside, first, size)
        put = partial(_put, places, size, not spec.collides)
        stored = lax.iota(dtype, size) < last - first
        data = _data(spec, places, _out_first(spec, kernel).reshape(1, -1), size)[0]
        indices = jnp.stack([put(places.row), put(places.column)], axis=-1)
        data = jnp.where(stored, data, jnp.zeros((), data.dtype))
        return data, jnp.where(stored[:, None], indices, jnp.asarray([spec.shape], dtype))

    specs = PartitionSpec(axis_name), PartitionSpec(axis_name, None)
    return jax.shard_map(build, mesh=mesh, in_specs=PartitionSpec(), out_specs=specs)(kernel)


def _shard_starts(spec: ConvSpec, shards: int) -> np.ndarray:
    """The entries before each of equal shares of the rows, and all of them at the end."""
    share = -(-spec.out_size // shards)
    tables = [(w, w.cumsum() - w) for w in map(_widths, spec.axes)]
    starts = []
    for row in (min(n * share, spec.out_size) for n in range(shards + 1)):
        if row == spec.out_size:
            starts.append(spec.nse)
            continue
        positions, d = spec.split_row(row)
        pairs = [(int(w[o]), int(s[o])) for (w, s), o in zip(tables, positions, strict=True)]
        starts.append(_starts(spec, [w for w, _ in pairs], [s for _, s in pairs], d)[0])
    return np.asarray(starts)

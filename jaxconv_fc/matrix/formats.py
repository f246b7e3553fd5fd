"""M without its zeros: as JAX's BCOO and BCSR, as SciPy's CSR, and by generalized diagonals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.arguments import Array, as_array, brief, check_same_dtype, native
from jaxconv_fc.geometry.entries import (
    Listed,
    entries,
    entry_dtype,
    group_column,
    listed,
    row_pointers,
    row_reads,
    sorted_reads,
)
from jaxconv_fc.geometry.layout import (
    column_of,
    grid,
    kernel_parts,
    part_count,
    row_of,
    split_row,
    spread,
    tap_in_part,
)
from jaxconv_fc.geometry.layout import taps as kernel_taps
from jaxconv_fc.geometry.memory import check_stored
from jaxconv_fc.geometry.spec import ConvSpec, as_operand, check_spec, spec_first
from jaxconv_fc.matrix import repeats
from jaxconv_fc.matrix.dense import check_bias, of_every_output
from jaxconv_fc.matrix.host import fresh_arrays, host_plan
from jaxconv_fc.sharding import Bound, PlatformForms, by_platform, is_traced, program

if TYPE_CHECKING:  # takes long to load: the builders load what they need
    from jax.experimental.sparse import BCOO, BCSR
    from scipy.sparse import csr_array

_TOGETHER = 2**20  # entries whose diagonals are found at once


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
    d, shared = lax.iota(entry_dtype(spec), spec.out_channels), _shared(spec, 2)
    indptr = row_pointers(spec, [row_reads(axis, d.dtype) for axis in spec.axes], d)
    forms = _forms(spec, repeats.columns, _listed_columns)
    columns = by_platform(forms, jax.ShapeDtypeStruct((spec.nse,), d.dtype), shared, linear=0)
    return _data(spec, kernel, shared), columns, indptr


@program
def _coo(spec: ConvSpec, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(data, indices)``, as BCOO takes them."""
    if not spec.nse:
        return jnp.zeros(0, kernel.dtype), jnp.zeros((0, 2), entry_dtype(spec))
    shared = _shared(spec, 3)
    forms = _forms(spec, repeats.indices, _listed_indices)
    indices = by_platform(forms, jax.ShapeDtypeStruct((spec.nse, 2), shared.dtype), shared, linear=0)
    return _data(spec, kernel, shared), indices


def _data(spec: ConvSpec, kernel: jax.Array, shared: jax.Array) -> jax.Array:
    forms = _forms(spec, repeats.data, _listed_data)
    return by_platform(forms, jax.ShapeDtypeStruct((spec.nse,), kernel.dtype), kernel, shared)


# On a CPU the arrays are copies of the entries of few outputs. They share one list of these, if the geometry
# has a plan for it. In other programs entries are scattered, and the list is not read.


def _shared(spec: ConvSpec, count: int) -> jax.Array:
    result = repeats.list_of(spec, count)
    forms = _forms(spec, repeats.entries_of_samples, _no_entries, count)
    return by_platform(forms, result, jnp.zeros((), result.dtype), linear=0)


def _no_entries(spec: ConvSpec, count: int, zero: jax.Array) -> jax.Array:
    return jnp.broadcast_to(zero, repeats.list_of(spec, count).shape)


def _forms(
    spec: ConvSpec, cpu: Callable[..., jax.Array], other: Callable[..., jax.Array], *given: int
) -> PlatformForms:
    scattered = Bound(other, (spec, *given))
    copied = scattered if repeats.plan_of(spec) is None else Bound(cpu, (spec, *given))
    return PlatformForms(copied, scattered, scattered)


# Entries scattered to their places: one of the equal parts of M is listed, and repeated for the others.


def _part(spec: ConvSpec) -> Listed:
    """The entries of one part of M, [o, d, i, p], from the tables (outputs, taps) of every axis."""
    dtype, parts = entry_dtype(spec), part_count(spec)
    dims = (*(axis.out_size for axis in spec.axes), spec.out_channels // parts)
    *positions, d = grid(dims, dtype)
    reads = [
        sorted_reads(axis, dtype).each(lambda v, a=a: spread(v, (*dims, v.shape[1]), a, len(dims)))
        for a, axis in enumerate(spec.axes)
    ]
    inside = jnp.ones((1,) * len(dims), bool)
    return listed(spec, dims, positions, d, reads, inside, 0, spec.nse // parts)


def _listed_data(spec: ConvSpec, kernel: jax.Array, _: jax.Array) -> jax.Array:
    part = _part(spec)
    return part.data(kernel_parts(spec, kernel), tap_in_part(spec, part.at.tap)).reshape(-1)  # [part, entry]


def _listed_columns(spec: ConvSpec, _: jax.Array) -> jax.Array:
    part, first = _part(spec), group_column(spec, _parts(spec))
    return (part.of(part.at.column)[None] + first).reshape(-1)  # [1, entry] [part, 1]


def _listed_indices(spec: ConvSpec, shared: jax.Array) -> jax.Array:
    part, first = _part(spec), row_of(spec, [0] * len(spec.axes), _parts(spec))
    rows = (part.of(part.at.row)[None] + first).reshape(-1)  # [1, entry] [part, 1]
    return jnp.stack([rows, _listed_columns(spec, shared)], axis=-1)


def _parts(spec: ConvSpec) -> jax.Array:
    return lax.broadcasted_iota(entry_dtype(spec), (part_count(spec), 1), 0)


# -- diagonals ---------------------------------------------------------------------------------


def diagonals(spec: ConvSpec, kernel: Array, *, rows: Sequence[int] | None = None) -> dict[int, jax.Array]:
    """The generalized diagonals of M: ``diagonals[k][i] = M[rows[i], (i + k) % in_size]``.

    A dict ``{offset: diagonal}`` of those that are not structurally zero, with ``0 <= offset < in_size``
    ascending and diagonals of length ``out_size`` (docs/maths.md, section 9). So::

        (M @ x)[rows[i]] = sum over k of diagonals[k][i] * x[(i + k) % in_size]

    Homomorphic encryption packs a matrix so (Halevi and Shoup 2014): a product with a vector is one rotation
    of the vector and one elementwise product per diagonal. :func:`diagonal_offsets` says how many there are,
    without M. Few, if ``column - i`` is the same at every position: with stride 1, channels first and as many
    outputs as inputs along each axis, ``in channels * prod(taps)`` at most. With a larger stride they are
    nearly all, up to ``in_size``, unless the rows are ordered as :func:`interleaved_rows` orders them.
    Linear in the kernel, differentiable.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      rows: an order of the rows of M, static integers: a permutation of ``range(out_size)``. By default the
        order that they have.

    Returns:
      A dict from offset to an array of shape ``(out_size,)``.

    Raises:
      TypeError: the kernel is not an array, or ``rows`` is traced or not made of integers.
      ValueError: the kernel has another shape, ``rows`` is not a permutation, or the arrays are beyond the
        memory limit.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), [(1, 0)])
    >>> for offset, diagonal in fc.diagonals(spec, jnp.array([[[1, 2]]])).items():
    ...     print(offset, diagonal)
    0 [2 2 2 2]
    3 [0 1 1 1]
    """
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    order = _row_order("diagonals", spec, rows)
    check_stored("diagonals", spec.nse, spec.nbytes(kernel.dtype).bcoo)  # the entries are made first
    places = _inverse(order)
    offsets = _offsets(spec, places)
    nbytes = len(offsets) * spec.out_size * kernel.dtype.itemsize
    check_stored("diagonals", spec.nse, nbytes)
    if not len(offsets):
        return {}
    stacked = _diagonals(
        spec, kernel, *(None if v is None else v.astype(entry_dtype(spec)) for v in (offsets, places))
    )
    return dict(zip(offsets.tolist(), stacked, strict=True))  # one row each


def diagonal_offsets(spec: ConvSpec, *, rows: Sequence[int] | None = None) -> np.ndarray:
    """The offsets of :func:`diagonals`: every ``(column - i) % in_size`` of a stored ``M[rows[i], column]``.

    ``len(diagonal_offsets(spec))`` is the number of diagonals. These are the rotations for which homomorphic
    encryption needs a key. M is not made: it takes one step per output and tap.

    Args:
      spec: the geometry.
      rows: an order of the rows, as :func:`diagonals` takes it.

    Returns:
      A NumPy array of integers, ascending.

    Raises:
      TypeError: ``spec`` is not a ConvSpec, or ``rows`` is traced or not made of integers.
      ValueError: ``rows`` is not a permutation of ``range(out_size)``.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 16, 32, 32), (32, 16, 3, 3), (2, 2), "SAME")
    >>> len(fc.diagonal_offsets(spec)), len(fc.diagonal_offsets(spec, rows=fc.interleaved_rows(spec)))
    (16384, 256)
    """
    check_spec(spec)
    return _offsets(spec, _inverse(_row_order("diagonal_offsets", spec, rows)))


def interleaved_rows(spec: ConvSpec) -> np.ndarray:
    """The rows of M in the order of a pixel shuffle: ``y.ravel()[rows] == pixel_shuffle(y).ravel()``.

    A strided layer has few :func:`diagonals` in this order.

    With ``s = window_strides``, ``prod(s)`` out channels are put side by side, as the phases of one channel
    with ``out_size * s`` positions along each axis. Along two axes, channel ``d`` at ``(y, x)`` goes to
    channel ``d // (s0*s1)`` at ``(y*s0 + d//s1 % s0, x*s1 + d % s1)``. That is PyTorch's ``PixelShuffle``.
    The rows are listed in this order, with the dimensions ordered as in ``in_shape``.

    So output and input positions run alike, and the diagonals depend on the taps alone: without dilations,
    ``in channels * prod(taps + s - 1)`` of them at most. This holds with channels first, one group, zeros in
    the padding, out channels that ``prod(s)`` divides, and ``output size * s == input size`` along each axis.
    Any other layer has an order too, with more diagonals: :func:`diagonal_offsets` counts them.

    Args:
      spec: the geometry.

    Returns:
      A permutation of ``range(out_size)``, a NumPy array.

    Raises:
      TypeError: ``spec`` is not a ConvSpec.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 6), (2, 1, 2), (2,), "VALID")  # two channels of three outputs
    >>> print(fc.interleaved_rows(spec))
    [0 3 1 4 2 5]
    >>> print(fc.diagonal_offsets(spec), fc.diagonal_offsets(spec, rows=fc.interleaved_rows(spec)))
    [0 1 2 3 4 5] [0 1 5]
    """
    check_spec(spec)
    steps = [axis.stride for axis in spec.axes]
    dims = (*(axis.out_size for axis in spec.axes), spec.out_channels)
    *positions, d = grid(dims, np.int64, np)
    fine, phase = [], d
    for o, step in zip(reversed(positions), reversed(steps), strict=True):
        fine.append(o * step + phase % step)
        phase = phase // step
    channels = max(1, spec.in_channels)
    block, channel = phase // channels, phase % channels
    values = [*reversed(fine), channel]
    sizes = [*(n * step for n, step in zip(dims, steps, strict=False)), channels]
    place = block
    for a in sorted(range(len(values)), key=[*spec.in_order[: len(steps)], spec.in_order[-1]].__getitem__):
        place = place * sizes[a] + values[a]
    row = np.broadcast_to(row_of(spec, positions, d), dims)
    return row.ravel()[np.argsort(np.broadcast_to(place, dims).ravel(), kind="stable")]


def _row_order(name: str, spec: ConvSpec, rows: Any) -> np.ndarray | None:
    """The order of the rows as an array, None for the order that they have."""
    if rows is None:
        return None
    if is_traced(rows) or any(map(is_traced, jax.tree.leaves(rows))):
        raise TypeError(f"{name}: rows must be static integers, got a traced {rows}. Use a NumPy array.")
    order = np.asarray(rows)
    order = order.astype(int) if not order.size else order
    if order.dtype.kind not in "iu":
        raise TypeError(f"{name}: rows must be integers, got {brief(rows)}. Write interleaved_rows(spec).")
    if order.shape != (spec.out_size,) or not np.array_equal(np.sort(order), np.arange(spec.out_size)):
        raise ValueError(
            f"{name}: rows must be a permutation of range({spec.out_size}), each row of M once, got "
            f"{brief(rows)} of shape {order.shape}. Write interleaved_rows(spec), or leave it out."
        )
    return order.astype(np.int64)


def _inverse(order: np.ndarray | None) -> np.ndarray | None:
    """At which place each row stands."""
    if order is None:
        return None
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places


def _offsets(spec: ConvSpec, places: np.ndarray | None) -> np.ndarray:
    """Every ``(column - place of the row) % in_size`` of an entry."""
    if not spec.nse:
        return np.empty(0, np.int64)
    first, size = np.zeros(spec.in_size, bool), kernel_taps(spec)  # of the first channel of every group
    step = max(1, _TOGETHER // math.prod(size))
    for start in range(0, spec.out_size, step):
        row = np.arange(start, min(start + step, spec.out_size))
        dims = (len(row), *size)
        _, *taps = grid(dims, np.int64, np)
        positions, d = split_row(spec, spread(row, dims, 0))
        at = entries(spec, dims, positions, d, 0, taps)
        place = spread(row if places is None else places[row], dims, 0)
        offset, read = np.broadcast_arrays((at.column - place) % spec.in_size, at.valid)
        first[offset[read]] = True
    found, offsets = np.zeros_like(first), np.flatnonzero(first)
    for channel in column_of(spec, [0] * len(spec.axes), np.arange(spec.group_channels)):
        found[(offsets + channel) % spec.in_size] = True
    return np.flatnonzero(found)


@program
def _diagonals(spec: ConvSpec, kernel: jax.Array, offsets: jax.Array, places: jax.Array | None) -> jax.Array:
    stacked = jnp.zeros((len(offsets), spec.out_size), kernel.dtype)
    data, indices = _coo(spec, kernel)
    row, column = indices.T
    place = row if places is None else places[row]
    which = jnp.searchsorted(offsets, (column - place) % spec.in_size)
    return stacked.at[which, place].set(data, unique_indices=True)

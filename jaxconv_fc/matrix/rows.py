"""Blocks of rows of M: as smaller convolutions, and as matrices made one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxconv_fc.geometry.arguments import Array, as_int
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.entries import axis_widths
from jaxconv_fc.geometry.spec import ConvSpec, check_spec
from jaxconv_fc.matrix.formats import as_scipy, host_kernel

if TYPE_CHECKING:
    from scipy.sparse import csr_array


def row_block(spec: ConvSpec, start: int, stop: int) -> tuple[ConvSpec, tuple[slice, ...], tuple[slice, ...]]:
    """``(block, in_slice, out_slice)`` with ``y[out_slice] = apply(block, kernel, x[in_slice])``.

    The block makes the outputs ``start`` to ``stop`` of the first spatial axis. It is a smaller convolution
    with the same kernel (docs/maths.md, section 7). With M as an array of shape
    ``(*out_shape, *in_shape)``::

        as_matrix(block, kernel) == M[out_slice][..., in_slice]      and      M[out_slice] is 0 elsewhere
        y[out_slice] = apply(block, kernel, x[in_slice])

    Each slice selects one range on one axis: the rows that the block makes, or the inputs that it reads, its
    halo included. Exact for strides, dilations, groups, layouts, and padding of any sign. In a boundary mode
    the first and last block include the inputs that their padding is copied from (the whole axis if
    circular), and ``block.padding`` may be negative, which crops after padding.

    Args:
      spec: the geometry, with at least one spatial axis (the first in ``window_strides``).
      start, stop: ``0 <= start < stop <= outputs on this axis``.

    Returns:
      A :class:`ConvSpec`, and a tuple of slices for each of ``spec.in_shape`` and ``spec.out_shape``.

    Raises:
      TypeError: start or stop is not an int.
      ValueError: the range is empty or out of bounds. Also, with a boundary mode and ``lhs_dilation`` on this
        axis, if no smaller convolution makes those rows; the message says at which multiples one does.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 3, 8, 8), (4, 3, 3, 3), (1, 1), "SAME")
    >>> block, in_slice, out_slice = fc.row_block(spec, 4, 6)
    >>> block.in_shape, block.padding[0], in_slice[1], out_slice[1]
    ((3, 4, 8), (0, 0), slice(3, 7, None), slice(4, 6, None))
    """
    check_spec(spec)
    start, stop = as_int("start", start), as_int("stop", stop)
    if not spec.axes:
        raise ValueError("row_block cuts the first spatial axis, and this spec has none: use the whole M.")
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

    spec: ConvSpec  # the block as a smaller convolution
    in_slice: tuple[slice, ...]  # of an input of the whole convolution
    out_slice: tuple[slice, ...]  # of its output
    matrix: csr_array  # of shape ``spec.shape``


def row_blocks(
    spec: ConvSpec, kernel: Array, nbytes: int = 2**28, *, progress: Callable[[int, int], Any] | None = None
) -> Iterator[RowBlock]:
    """M in blocks of rows, for an M larger than memory: ``y[out_slice] = matrix @ x[in_slice]``, ravelled.

    Each matrix is a SciPy CSR matrix of at most ``nbytes`` bytes. The blocks are those of :func:`row_block`
    along the first spatial axis, in order (docs/maths.md, section 7). Their columns stand for
    the inputs that the block reads, ``x[in_slice].ravel()``. A block is made when the loop reaches it, so
    memory holds one at a time unless the caller keeps them.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      nbytes: the most that the arrays of one block may take.
      progress: called as ``progress(outputs done, outputs in all)`` after every block.

    Returns:
      An iterator of named tuples ``(spec, in_slice, out_slice, matrix)``: those of :func:`row_block`, and a
      ``csr_array`` of shape ``spec.shape``.

    Raises:
      TypeError, ValueError: as :func:`as_scipy`. Also if one output of the axis needs more than ``nbytes``;
        the message says how many are enough.

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
    itemsize = host_kernel("row_blocks", spec, kernel).dtype.itemsize
    cuts = _cuts(spec, as_int("nbytes", nbytes, least=1), itemsize)
    return _stream(spec, kernel, cuts, progress)


def _stream(spec: ConvSpec, kernel: Array, cuts: Sequence[int], progress: Any) -> Iterator[RowBlock]:
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
    widths = axis_widths(first)
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

"""A matrix whose geometry is asked for, on the host, and what it shows of each axis.

The matrix is NumPy or SciPy, and a sparse one is never made dense. What it shows of an axis are random sums
over everything else: over the channels, of which few mixtures are kept, and over the other axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.geometry.arguments import as_array, as_ints, resolve_layouts
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.numerics import host_unit_scale, inexact
from jaxconv_fc.sharding import is_traced

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_MIXTURES = 4  # of the channels of one side
_SUMS, _NOISY_SUMS = 8, 24  # at least so many of each pair (output, input) of an axis; more against noise


@dataclass(frozen=True, eq=False)
class Given:
    """A matrix whose geometry is asked for, at unit scale and in double precision."""

    matrix: Any  # NumPy array or canonical csr_array: (prod(out_shape), prod(in_shape)), finite
    exponent: int  # the given one is 2**exponent times as large
    dtype: Any  # of the kernel
    integer: bool  # whether the given one holds integers
    in_shape: tuple[int, ...]  # without a batch, in the layout of the arrays
    out_shape: tuple[int, ...]
    numbers: lax.ConvDimensionNumbers
    tol: float  # relative to the largest entry, or to the norm

    @property
    def lhs_shape(self) -> tuple[int, ...]:
        """Of a batch of one example."""
        batch = self.numbers.lhs_spec[0]
        return (*self.in_shape[:batch], 1, *self.in_shape[batch:])

    @property
    def places(self) -> tuple[list[int], list[int]]:
        """Of outputs and inputs: which axes are (channels, spatial...)."""
        return unbatched(self.numbers.out_spec), unbatched(self.numbers.lhs_spec)

    @property
    def channels(self) -> tuple[int, int]:
        """Out channels and in channels."""
        (out, *_), (into, *_) = self.places
        return self.out_shape[out], self.in_shape[into]

    @cached_property
    def squares(self) -> float:
        """The sum of the squares of the entries."""
        return sum_of_squares(self.matrix)

    @property
    def stored(self) -> int:
        """How many entries are not 0."""
        return int(np.count_nonzero(self.matrix if isinstance(self.matrix, np.ndarray) else self.matrix.data))


def sum_of_squares(matrix: Any) -> float:
    values = matrix if isinstance(matrix, np.ndarray) else matrix.data
    return float((np.abs(values) ** 2).sum())


def unbatched(order: Sequence[int]) -> list[int]:
    """The places of (channels, spatial...) in an array without the batch."""
    batch, *others = order
    return [place - (place > batch) for place in others]


def on_host(matrix: Any, in_shape: Sequence[int], out_shape: Sequence[int], layouts: Any, tol: Any) -> Given:
    """Check the arguments of :func:`detect_conv`, and bring the matrix to unit scale."""
    from scipy.sparse import csr_array, issparse

    in_shape, out_shape = as_ints("in_shape", in_shape, least=0), as_ints("out_shape", out_shape, least=0)
    if len(in_shape) != len(out_shape) or not in_shape:
        raise ValueError(
            f"in_shape and out_shape must be (channels, spatial...) of the same rank, got {in_shape} "
            f"and {out_shape}. Write a missing spatial axis as 1."
        )
    if is_traced(matrix):
        raise TypeError(
            "matrix must be concrete: its values decide the geometry. Call outside of jit and vmap."
        )
    sizes = (math.prod(out_shape), math.prod(in_shape))
    stored: Any = matrix if issparse(matrix) else as_array("matrix", matrix)
    if stored.shape != sizes:
        raise ValueError(
            f"matrix must have the shape {sizes}, the sizes of out_shape and in_shape, got {stored.shape}."
        )
    integer = stored.dtype.kind in "biu"
    if issparse(matrix):
        stored = _canonical(matrix)
        values = stored.data
        dtype = inexact(jnp.zeros((), jax.dtypes.canonicalize_dtype(values.dtype)), 16).dtype
    else:
        stored = inexact(stored, 16)
        values, dtype = np.asarray(stored), stored.dtype
    values = values.astype(np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(
            f"matrix must hold finite numbers, got {finite.size - finite.sum()} NaN or Inf: they say nothing "
            "about the geometry. Replace them, e.g. by jnp.nan_to_num(matrix)."
        )
    tol = min(64 * float(jnp.finfo(dtype).eps), 1 / 64) if tol is None else tol
    values, exponent = host_unit_scale(values)
    if issparse(matrix):
        values = csr_array((values, stored.indices, stored.indptr), sizes)
    numbers = resolve_layouts(layouts, len(in_shape) + 1)
    return Given(values, exponent, dtype, integer, in_shape, out_shape, numbers, tol)


def _canonical(matrix: Any) -> csr_array:
    """As a canonical CSR: rows ascend, and no entry is stored twice. The given one is not changed."""
    from scipy.sparse import csr_array

    found = csr_array(matrix)
    if not found.has_canonical_format:
        found = found.copy()
        found.sum_duplicates()
    return found


# -- what it shows of each axis ---------------------------------------------------------------------


def axis_sums(given: Given, *, noisy: bool = False) -> list[np.ndarray]:
    """Per spatial axis a few random sums of the entries: (outputs, inputs, sums)."""
    rng = np.random.default_rng(0)
    mixed, outs, ins = _mixed(given, rng)
    draws = _draws(outs, ins, _NOISY_SUMS if noisy else _SUMS)
    return [_view(mixed, outs, ins, axis, draws, rng) for axis in range(1, len(outs))]


def _mixed(given: Given, rng: np.random.Generator) -> tuple[Any, list[int], list[int]]:
    """M with few mixtures of the channels, [e o, g t], and the sizes (mixtures, spatial...) of both sides."""
    left, outs = _mixture(given.out_shape, given.places[0], rng)
    right, ins = _mixture(given.in_shape, given.places[1], rng)
    return (right @ (left @ given.matrix).T).T, outs, ins


def _mixture(shape: Sequence[int], places: Sequence[int], rng: np.random.Generator) -> tuple[Any, list[int]]:
    """The matrix of sums over the channels, from an array to (mixtures, spatial...); the sizes of that."""
    from scipy.sparse import csr_array

    sizes = [shape[i] for i in places]
    number = np.transpose(np.arange(math.prod(shape)).reshape(shape), places).reshape(sizes[0], -1)  # [c, o]
    few = min(sizes[0], _MIXTURES)
    weights = np.eye(few) if few == sizes[0] else rng.standard_normal((few, sizes[0]))  # [e, c]
    spatial = number.shape[1]
    row = np.arange(few)[:, None, None] * spatial + np.arange(spatial)  # [e, c, o]
    row, column, value = np.broadcast_arrays(row, number, weights[:, :, None])
    kept = value != 0
    matrix = csr_array((value[kept], (row[kept], column[kept])), (few * spatial, math.prod(shape)))
    return matrix, [few, *sizes[1:]]


def _view(
    mixed: Any, outs: Sequence[int], ins: Sequence[int], axis: int, draws: int, rng: np.random.Generator
) -> np.ndarray:
    alone = math.prod(outs[1:]) * math.prod(ins[1:]) == outs[axis] * ins[axis]
    found = []
    for _ in range(1 if alone else draws):
        left, right = (_along(sizes, axis, rng) for sizes in (outs, ins))
        sums = right @ (left @ mixed).T  # [g t, e o]
        sums = sums if isinstance(sums, np.ndarray) else sums.toarray()
        sums = sums.reshape(ins[0], ins[axis], outs[0], outs[axis])
        found.append(sums.transpose(3, 1, 0, 2).reshape(outs[axis], ins[axis], -1))
    return np.concatenate(found, -1)


def _draws(outs: Sequence[int], ins: Sequence[int], sums: int) -> int:
    """How many random sums there are of each mixture."""
    return -(-sums // max(1, outs[0] * ins[0]))


def _along(sizes: Sequence[int], axis: int, rng: np.random.Generator) -> Any:
    """The matrix that sums over all axes but the first and this one, with random weights."""
    from scipy.sparse import csr_array

    factors = [np.ones(n) if a in (0, axis) else rng.standard_normal(n) for a, n in enumerate(sizes)]
    weights = reduce(np.multiply.outer, factors)
    index = np.indices(sizes)
    row = (index[0] * sizes[axis] + index[axis]).ravel()
    return csr_array((weights.ravel(), (row, np.arange(row.size))), (sizes[0] * sizes[axis], row.size))


def sharper_sums(given: Given, axes: Sequence[Axis]) -> list[np.ndarray]:
    """The sums of :func:`axis_sums`, less noisy: with random weights of the taps of the other axes, which are
    almost known, in place of their positions."""
    rng, n = np.random.default_rng(1), len(axes)
    mixed, outs, ins = _mixed(given, rng)
    mixed = (mixed if isinstance(mixed, np.ndarray) else mixed.toarray()).reshape(*outs, *ins)
    found = []
    for a in range(n):
        draws = []
        for _ in range(_draws(outs, ins, _NOISY_SUMS) if n > 1 else 1):
            sums = mixed  # [e, o..., g, t...]
            for b in reversed(range(n)):
                if b != a:
                    at = sums.ndim // 2
                    sums = np.tensordot(sums, _tap_weights(axes[b], rng), axes=((1 + b, at + 1 + b), (0, 1)))
            draws.append(sums.transpose(1, 3, 0, 2).reshape(outs[1 + a], ins[1 + a], -1))
        found.append(np.concatenate(draws, -1))
    return found


def _tap_weights(axis: Axis, rng: np.random.Generator) -> np.ndarray:
    """Random weights of the taps, at the places that read through them: (outputs, inputs)."""
    o, t, p = axis.reads(np.arange(axis.out_size))
    weights = rng.standard_normal(axis.taps) / np.sqrt(np.maximum(axis.tap_counts, 1))
    table = np.zeros((axis.out_size, axis.size))
    np.add.at(table, (o, t), weights[p])
    return table

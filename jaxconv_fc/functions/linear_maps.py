"""Sparse matrices of linear maps on the host: their products and sums, with every structural entry kept.

A map that moves and scales entries is held as a :class:`Selection` of rows, any other as a SciPy CSR. SciPy's
own products and sums drop an entry that happens to be exactly 0. These keep it: the pattern of a product does
not depend on the numbers in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxconv_fc.geometry.memory import fits_in_memory

_BLOCK = 2**22  # entries of a product that are counted at once


@dataclass(frozen=True)
class Selection:
    """Row ``i`` holds ``weights[i]`` at column ``numbers[i]``, and nothing where that is -1.

    ``numbers`` None are those of the identity, ``weights`` None are ones.
    """

    columns: int
    numbers: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return self.columns if self.numbers is None else len(self.numbers)

    @property
    def nse(self) -> int:
        return self.columns if self.numbers is None else int(np.count_nonzero(self.numbers >= 0))


@dataclass(frozen=True)
class RealLinear:
    """``of_real @ z.real + of_imag @ z.imag``: linear in a complex z over the real numbers alone.

    None is a map to 0. It has no matrix of its own. After ``z = A @ x`` of a real x it has one,
    ``of_real @ A.real + of_imag @ A.imag``.
    """

    of_real: Map | None
    of_imag: Map | None


Csr = Any  # scipy.sparse.csr_array: its type says too little
Map = Any  # Selection | RealLinear | csr_array
Guard = Callable[[int, Any], None]  # (entries, dtype) of a matrix to be made; refuses too many


def selection(columns: int, numbers: np.ndarray) -> Selection:
    """The :class:`Selection` of these rows; the identity if they are all rows in order."""
    numbers = np.ravel(numbers)
    if len(numbers) == columns and (numbers == np.arange(columns)).all():
        return Selection(columns)
    return Selection(columns, numbers)


def is_identity(map: Map) -> bool:
    return isinstance(map, Selection) and map.numbers is None and map.weights is None


def count(map: Map) -> int:
    """The entries that are stored."""
    return map.nse if isinstance(map, Selection) else map.nnz


def csr(shape: tuple[int, int], data: np.ndarray, columns: np.ndarray, widths: np.ndarray | int) -> Csr:
    """A CSR of rows of these widths, one after the other. Columns may repeat in a row, in any order."""
    from scipy.sparse import csr_array

    index = np.int32 if max(*shape, data.size) <= np.iinfo(np.int32).max else np.int64
    indptr = np.zeros(shape[0] + 1, index)
    np.cumsum(np.broadcast_to(widths, shape[0]), out=indptr[1:])
    # Not in place where the arrays are somebody else's.
    matrix = csr_array((data.flatten(), columns.ravel().astype(index), indptr), shape)
    matrix.sum_duplicates()  # and sorts
    return matrix


def from_triples(shape: tuple[int, int], data: Any, rows: np.ndarray, columns: np.ndarray) -> Csr:
    """The sum of entries ``data`` at ``(rows, columns)``. A row or column of -1 is dropped."""
    data, rows, columns = (np.ravel(v) for v in np.broadcast_arrays(data, rows, columns))
    held = (rows >= 0) & (columns >= 0)
    if not held.all():
        data, rows, columns = data[held], rows[held], columns[held]
    order = np.argsort(rows, kind="stable")
    return csr(shape, data[order], columns[order], np.bincount(rows, minlength=shape[0]))


def as_csr(map: Map, dtype: Any) -> Csr:
    """A map as a canonical CSR of this dtype."""
    if not isinstance(map, Selection):
        return map.astype(dtype, copy=False)
    rows = map.rows
    numbers = np.arange(rows) if map.numbers is None else map.numbers
    weights = np.ones(rows, dtype) if map.weights is None else map.weights.astype(dtype)
    held = numbers >= 0
    return csr((rows, map.columns), weights[held], numbers[held], held)


def product(a: Map, b: Map, dtype: Any, guard: Guard) -> Map:
    """``a @ b`` of this dtype."""
    if isinstance(a, RealLinear):
        parts = ((a.of_real, np.real), (a.of_imag, np.imag))
        return total([product(m, _part(b, p), dtype, guard) for m, p in parts if m is not None], dtype, guard)
    if is_identity(a):
        return _of_dtype(b, dtype)
    if is_identity(b):
        return _of_dtype(a, dtype)
    if isinstance(a, Selection):
        return _selected(a, b, dtype, guard)
    if isinstance(b, Selection):
        return _relabelled(a, b, dtype)
    return _multiplied(a.astype(dtype, copy=False), b.astype(dtype, copy=False), guard)


def _part(map: Map, part: Callable[[np.ndarray], np.ndarray]) -> Map:
    """The real or imaginary parts of the entries."""
    if isinstance(map, Selection):
        weights = np.ones(map.rows) if map.weights is None else map.weights
        return Selection(map.columns, map.numbers, part(weights))
    made = map.copy()
    made.data = part(map.data)
    return made


def _of_dtype(map: Map, dtype: Any) -> Map:
    if isinstance(map, Selection):
        weights = None if map.weights is None else map.weights.astype(dtype, copy=False)
        return Selection(map.columns, map.numbers, weights)
    return map.astype(dtype, copy=False)


def _selected(a: Selection, b: Map, dtype: Any, guard: Guard) -> Map:
    """Rows of b."""
    numbers = np.arange(a.rows) if a.numbers is None else a.numbers
    held, rows = numbers >= 0, np.maximum(numbers, 0)
    if isinstance(b, Selection):
        moved = rows if b.numbers is None else b.numbers[rows] if b.rows else rows
        weights = a.weights
        if b.weights is not None:
            there = b.weights[rows] if b.rows else np.zeros(len(rows), dtype)
            weights = there if weights is None else weights.astype(dtype) * there.astype(dtype)
        return Selection(b.columns, np.where(held, moved, -1), weights)
    if a.numbers is None:
        widths, data, columns = np.diff(b.indptr), b.data, b.indices
    else:
        widths = np.where(held, np.diff(b.indptr)[rows], 0) if b.shape[0] else np.zeros(len(rows), int)
        total = int(widths.sum())
        guard(total, dtype)
        starts = b.indptr[rows] - (np.cumsum(widths) - widths) if len(rows) else rows
        where = np.repeat(starts, widths) + np.arange(total)
        data, columns = b.data[where], b.indices[where]
    if a.weights is not None:
        data = data.astype(dtype) * np.repeat(a.weights.astype(dtype), widths)
    return _sorted((a.rows, b.shape[1]), data.astype(dtype, copy=False), columns, widths)


def _sorted(shape: tuple[int, int], data: np.ndarray, columns: np.ndarray, widths: np.ndarray) -> Csr:
    """A CSR of rows that are in canonical form already."""
    from scipy.sparse import csr_array

    index = columns.dtype if data.size <= np.iinfo(np.int32).max else np.int64
    indptr = np.zeros(shape[0] + 1, index)
    np.cumsum(widths, out=indptr[1:])
    matrix = csr_array(shape, dtype=data.dtype)
    matrix.data, matrix.indices, matrix.indptr = data, columns, indptr
    matrix.has_canonical_format = True
    return matrix


def _relabelled(a: Csr, b: Selection, dtype: Any) -> Csr:
    """The columns of a, moved to where b reads them."""
    rows, widths = a.shape[0], np.diff(a.indptr)
    data = a.data.astype(dtype, copy=False)
    if b.weights is not None:
        data = data * b.weights.astype(dtype)[a.indices]
    if b.numbers is None:
        return _sorted((rows, b.columns), data, a.indices, widths)
    columns = b.numbers[a.indices] if len(b.numbers) else a.indices
    held = columns >= 0
    if not held.all():
        widths = np.add.reduceat(np.append(held, False).astype(np.int64), a.indptr[:-1]) if rows else widths
        widths = np.where(np.diff(a.indptr) > 0, widths, 0)
        data, columns = data[held], columns[held]
    return csr((rows, b.columns), data, columns, widths)


def _multiplied(a: Csr, b: Csr, guard: Guard) -> Csr:
    """``a @ b``. The pattern is that of booleans, of which no sum vanishes."""
    bound = int(np.diff(b.indptr)[a.indices].sum(dtype=np.int64)) if b.shape[0] else 0
    most = min(bound, math.prod((a.shape[0], b.shape[1])))
    if not fits_in_memory(most * (a.dtype.itemsize + a.indices.itemsize)):
        guard(int(_widths_of_product(a, b, bound).sum()), a.dtype)
    made = a @ b
    made.sort_indices()
    if made.nnz == _widths_of_product(a, b, bound).sum():
        made.has_canonical_format = True
        return made
    pattern = _pattern(a) @ _pattern(b)
    pattern.sort_indices()
    every, held = (_places(m) for m in (pattern, made))
    data = np.zeros(pattern.nnz, made.dtype)
    data[np.searchsorted(every, held)] = made.data
    return _sorted(made.shape, data, pattern.indices, np.diff(pattern.indptr))


def _pattern(m: Csr) -> Csr:
    from scipy.sparse import csr_array

    return csr_array((np.ones(m.nnz, bool), m.indices, m.indptr), m.shape)


def _widths_of_product(a: Csr, b: Csr, bound: int) -> np.ndarray:
    """How many entries every row of ``a @ b`` stores, some rows at a time.

    Rows that read the same columns, such as those of all channels at one position, count once.
    """
    a, b = _pattern(a), _pattern(b)
    first, same = _distinct_rows(a)
    a = a[first]
    step = max(1, a.shape[0] * _BLOCK // max(bound, 1))
    widths = [np.diff((a[i : i + step] @ b).indptr) for i in range(0, a.shape[0], step)]
    return np.concatenate([np.empty(0, int), *widths])[same]


def _distinct_rows(m: Csr) -> tuple[np.ndarray, np.ndarray]:
    """One row for each set of columns, and for every row the number of its set."""
    keys = np.random.default_rng(0).integers(0, 2**63, m.shape[1], np.uint64)  # sums of them tell sets apart
    sums = np.append(np.uint64(0), np.cumsum(keys[m.indices], dtype=np.uint64))
    of_rows = sums[m.indptr[1:]] - sums[m.indptr[:-1]]
    _, first, same = np.unique(of_rows, return_index=True, return_inverse=True)
    return first, same


def _places(m: Csr) -> np.ndarray:
    """``row * columns + column`` of every entry."""
    rows = np.repeat(np.arange(m.shape[0], dtype=np.int64), np.diff(m.indptr))
    return rows * m.shape[1] + m.indices


def total(maps: Sequence[Map], dtype: Any, guard: Guard) -> Map:
    """The sum of maps of one shape."""
    if len(maps) == 1:
        return _of_dtype(maps[0], dtype)
    guard(sum(map(count, maps)), dtype)  # at most
    parts = [as_csr(m, dtype) for m in maps]
    widths = sum(np.diff(m.indptr) for m in parts)
    # Entries of one row stand together: first those of the first map, and so on.
    starts = np.cumsum(widths) - widths
    data = np.empty(sum(m.nnz for m in parts), dtype)
    columns = np.empty(len(data), np.result_type(*(m.indices for m in parts)))
    for m in parts:
        width = np.diff(m.indptr)
        where = np.repeat(starts - m.indptr[:-1], width) + np.arange(m.nnz)
        data[where], columns[where] = m.data, m.indices
        starts = starts + width
    return csr(parts[0].shape, data, columns, widths)

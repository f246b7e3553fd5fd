"""Neurons by number and by index, and which of them read which: receptive and projective fields.

One neuron reads the Cartesian product of what it reads along each dimension. So does a product of sets of
neurons. A field is therefore one index array per dimension, and a chain of convolutions takes field to field.
In other functions a field need not be such a product. It is then a mask (``functions/reads.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, overload

import jax
import numpy as np
import scipy  # scipy.sparse is loaded at its first use

from jaxconv_fc.functions.ravel import sizes
from jaxconv_fc.functions.reads import Place, check_adjacent, function_reads, places_of, reached_by, reads_of
from jaxconv_fc.functions.sites import ConvSite
from jaxconv_fc.functions.sparse import Node
from jaxconv_fc.geometry.arguments import as_int
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.memory import check_array
from jaxconv_fc.geometry.spec import ConvSpec, check_spec

__all__ = [
    "Field",
    "column",
    "coverage",
    "input_position",
    "position",
    "projective_field",
    "receptive_field",
    "row",
]

# An index in an array, one int per dimension, or its place in the ravel of that array.
Index = int | Sequence[int]
Chain = ConvSpec | Sequence[ConvSpec]
Sites = ConvSite | Sequence[ConvSite]  # as find_convs gives them
_Relation = Any  # a scipy.sparse.csr_array of bool, whose stubs do not know the type of a product


@dataclass(frozen=True, eq=False)
class Field:
    """A set of neurons: in an array ``x``, ``x[np.ix_(*field.indices)].ravel() == x[field.mask]``.

    Of convolutions it is the Cartesian product of one set of indices per dimension. Of any other function it
    may be less than the product (``size < prod(map(len, indices))``): then ``mask`` tells.

    Attributes:
      shape: the shape of the array that the neurons are entries of.
      indices: one ascending array of indices per dimension of ``shape``. If one of them is empty, so is the
        field.
      held: the mask, where the field is not known to be the product.

    >>> import jaxconv_fc as fc
    >>> field = fc.neurons.receptive_field(fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID"), (0, 1))
    >>> field.indices, field.size, field.mask
    ((array([0]), array([1, 2])), 2, array([[False,  True,  True, False]]))
    """

    shape: tuple[int, ...]
    indices: tuple[np.ndarray, ...]
    held: np.ndarray | None = None

    @property
    def size(self) -> int:
        """The number of neurons in the field. Of a product it is that of the lengths of ``indices``."""
        return math.prod(map(len, self.indices)) if self.held is None else int(self.held.sum())

    @property
    def mask(self) -> np.ndarray:
        """A boolean array of ``shape``, True on the field.

        It is made at each access. ValueError if it is larger than the memory limit.
        """
        if self.held is not None:
            return self.held.copy()
        check_array("mask", self.shape, np.bool_, ".indices")
        mask = np.zeros(self.shape, bool)
        mask[np.ix_(*self.indices)] = True
        return mask


@overload
def receptive_field(spec: Chain | Sites, out_index: Index) -> Field: ...
@overload
def receptive_field(fn: Callable[[Any], Any], x: Any, index: Index, /) -> Any: ...
def receptive_field(spec: Any, out_index: Any, index: Any = None) -> Any:
    """The inputs that an output reads: ``{column : M[row(spec, out_index), column] is stored}``.

    Stored are the entries that are not 0 for every kernel. Along each spatial axis the output reads the
    inputs ``t`` with ``o*stride + p*rhs_dilation - lo == t*lhs_dilation`` for some tap ``p`` (docs/maths.md,
    section 1). In a boundary mode it also reads the inputs that padding under its window is copied from. Of
    the channels, it reads those of its group.

    ``receptive_field(fn, x, index)`` says what entry ``index`` of ``fn(x)`` reads of x, for any function.
    Every equation is taken for what it may read, whatever the numbers are: an elementwise one reads the same
    entry, a sum, a softmax or a dense layer all along its axes, a pooling its window. What only moves entries
    moves the field. A loop of known length is unrolled. Of several branches, all count. An equation that is
    not known here (a Cholesky factor, a slice whose place depends on x) is taken to read all entries of its
    operands. So the field may be too large, never too small.

    Args:
      spec: the geometry, or a list of them, the first applied first. The ``out_shape`` of each must be the
        ``in_shape`` of the next. The field of a chain is that of the product of their matrices. Or what
        :func:`find_convs` gives, or some of it: pooling, padding and all else between the convolutions then
        counts, and the field is that of the last one in the input of the first one. Or a function ``fn`` of a
        pytree of arrays.
      out_index: an index in the ``out_shape`` (of the last spec), or a row number. Negative numbers count
        from the end. Of a function it is ``x``, the pytree: ``jax.ShapeDtypeStruct`` may stand for arrays.
      index: of a function, an index in ``fn(x)``, or a number in its ravel (of several results: of all).

    Returns:
      A :class:`Field` in the ``in_shape`` (of the first spec); of a function, a pytree as x of them.

    Raises:
      TypeError: ``spec`` is not a ConvSpec or a list of them, or ``out_index`` not static integers.
      ValueError: the shapes do not chain, or the index has another length; sites stand in a loop, or side
        by side; a function uses mutable arrays.
      IndexError: it is out of range.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 2, 5, 5), (4, 2, 3, 3), (2, 2), "SAME")
    >>> field = fc.neurons.receptive_field(spec, (3, 0, 1))
    >>> field.indices
    (array([0, 1]), array([0, 1]), array([1, 2, 3]))
    >>> field.mask.shape, field.size
    ((2, 5, 5), 12)
    >>> import jax, jax.numpy as jnp
    >>> pooled = lambda x: jnp.tanh(x).reshape(4, 2).max(1)
    >>> fc.neurons.receptive_field(pooled, jnp.zeros(8), 1).indices
    (array([2, 3]),)
    """
    if callable(spec):
        return _of_function("receptive_field", spec, out_index, index, backward=True)
    return fields(spec, out_index)[0]


def fields(spec: Chain | Sites, out_index: Index) -> list[Field]:
    """What an output reads of the input of every layer of a chain, and the output itself."""
    sites = _as_sites(spec)
    if sites:
        places = places_of("receptive_field", sites)
        last, outs = places[-1]
        number = outs[_as_index("out_index", out_index, outs.shape)]
        masks = reads_of(last, _only(last, number))
        return [_field_at(place, masks) for place in places]
    specs = _chain(spec)
    last = specs[-1].out_shape
    sets = [[np.array([i]) for i in _as_index("out_index", out_index, last)]]
    for each in reversed(specs):
        sets.append(_read_by(sets[-1], each))
    shapes = [*(each.in_shape for each in specs), last]
    return [Field(shape, tuple(found)) for shape, found in zip(shapes, reversed(sets), strict=True)]


@overload
def projective_field(spec: Chain | Sites, in_index: Index) -> Field: ...
@overload
def projective_field(fn: Callable[[Any], Any], x: Any, index: Index, /) -> Any: ...
def projective_field(spec: Any, in_index: Any, index: Any = None) -> Any:
    """The outputs that read an input: ``{row : M[row, column(spec, in_index)] is stored}``.

    The counterpart of :func:`receptive_field`, and the receptive field of the transpose.
    ``projective_field(fn, x, index)`` says what of ``fn(x)`` reads entry ``index`` of x.

    Args:
      spec: the geometry, a chain or a function, as :func:`receptive_field` takes them.
      in_index: an index in the ``in_shape`` (of the first spec), or a column number. Negative numbers count
        from the end. Of a function it is ``x``.
      index: of a function, an index in x, or a number in its ravel (of several arrays: of all of them).

    Returns:
      A :class:`Field` in the ``out_shape`` (of the last spec); of a function, a pytree as ``fn(x)`` of them.

    Raises:
      TypeError, ValueError, IndexError: as :func:`receptive_field`.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 5), (2, 1, 3), (1,), "SAME", padding_mode="circular")
    >>> fc.neurons.projective_field(spec, (0, 0)).indices
    (array([0, 1]), array([0, 1, 4]))
    """
    if callable(spec):
        return _of_function("projective_field", spec, in_index, index, backward=False)
    sites = _as_sites(spec)
    if sites:
        (first, ins), *_, last = places_of("projective_field", sites)
        number = ins[_as_index("in_index", in_index, ins.shape)]
        return _field_at(last, reached_by([last.node], first, _only(first, number)))
    specs = _chain(spec)
    in_index = _as_index("in_index", in_index, specs[0].in_shape)
    sets = reduce(_readers_of, specs, [np.array([i]) for i in in_index])
    return Field(specs[-1].out_shape, tuple(sets))


def coverage(spec: Chain | Sites) -> np.ndarray:
    """How many outputs read each input: ``coverage[t] = projective_field(spec, t).size``.

    A stride that does not divide the kernel size shows as a checkerboard. An input with 0 is never read.

    Args:
      spec: the geometry, or a list of them, the first applied first. Or sites of :func:`find_convs`, if
        nothing but elementwise functions stands between them.

    Returns:
      Integers of the ``in_shape`` (of the first spec).

    Raises:
      TypeError: ``spec`` is not a ConvSpec or a list of them.
      ValueError: the shapes do not chain, something stands between two sites, or the counts exceed the
        memory limit.

    >>> import jaxconv_fc as fc
    >>> print(fc.neurons.coverage(fc.conv_spec((1, 1, 7), (1, 1, 3), (2,), "VALID")))
    [[1 1 2 1 2 1 1]]
    """
    sites = _as_sites(spec)
    if sites:
        check_adjacent("coverage", sites)
    specs = _chain([site.spec for site in sites] or spec)
    check_array("coverage", specs[0].in_shape, np.int64, "projective_field")
    counts = [np.diff(reached.indptr).astype(np.int64) for reached in _reach(specs)]
    return reduce(np.multiply, np.ix_(*counts))


# -- numbers ------------------------------------------------------------------------------------


def row(spec: ConvSpec, out_index: Index) -> int:
    """The row of M that is an output neuron: ``np.ravel_multi_index(out_index, spec.out_shape)``.

    Args:
      spec: the geometry.
      out_index: an index in ``spec.out_shape``, or a row number. Negative numbers count from the end.

    Returns:
      A row number, a Python int.

    Raises:
      TypeError: the index is not made of static integers.
      ValueError: it has another length.
      IndexError: it is out of range.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 3, 3), (2, 1, 2, 2), (1, 1), "VALID")
    >>> fc.neurons.row(spec, (1, 0, 1)), fc.neurons.row(spec, -1)
    (5, 7)
    """
    check_spec(spec)
    return _place(_as_index("out_index", out_index, spec.out_shape), spec.out_shape)


def position(spec: ConvSpec, row: int) -> tuple[int, ...]:
    """The output neuron of a row of M: ``np.unravel_index(row, spec.out_shape)``, the inverse of :func:`row`.

    Args:
      spec: the geometry.
      row: a row number. Negative ones count from the end.

    Returns:
      An index in ``spec.out_shape``: channel and position in the caller's layout.

    Raises:
      TypeError, ValueError, IndexError: as :func:`row`.

    >>> import jaxconv_fc as fc
    >>> fc.neurons.position(fc.conv_spec((1, 1, 3, 3), (2, 1, 2, 2), (1, 1), "VALID"), 5)
    (1, 0, 1)
    """
    check_spec(spec)
    return _as_index("row", as_int("row", row), spec.out_shape)


def column(spec: ConvSpec, in_index: Index) -> int:
    """The column of M that is an input: ``np.ravel_multi_index(in_index, spec.in_shape)``.

    Args:
      spec: the geometry.
      in_index: an index in ``spec.in_shape``, or a column number. Negative numbers count from the end.

    Returns:
      A column number, a Python int.

    Raises:
      TypeError, ValueError, IndexError: as :func:`row`.

    >>> import jaxconv_fc as fc
    >>> fc.neurons.column(fc.conv_spec((1, 2, 3, 3), (2, 2, 2, 2), (1, 1), "VALID"), (1, 0, 2))
    11
    """
    check_spec(spec)
    return _place(_as_index("in_index", in_index, spec.in_shape), spec.in_shape)


def input_position(spec: ConvSpec, column: int) -> tuple[int, ...]:
    """The input of a column of M: ``np.unravel_index(column, spec.in_shape)``, the inverse of :func:`column`.

    Args:
      spec: the geometry.
      column: a column number. Negative ones count from the end.

    Returns:
      An index in ``spec.in_shape``: batch group (if there are any), channel and position in the caller's
      layout.

    Raises:
      TypeError, ValueError, IndexError: as :func:`row`.

    >>> import jaxconv_fc as fc
    >>> fc.neurons.input_position(fc.conv_spec((1, 2, 3, 3), (2, 2, 2, 2), (1, 1), "VALID"), 11)
    (1, 0, 2)
    """
    check_spec(spec)
    return _as_index("column", as_int("column", column), spec.in_shape)


def _as_index(name: str, index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    """An index in ``shape`` with no negative numbers, from such an index or from a place in the ravel."""
    if not isinstance(index, Sequence | np.ndarray) or (isinstance(index, np.ndarray) and not index.ndim):
        place = _from_front(name, as_int(name, index), math.prod(shape))
        return tuple(place // math.prod(shape[i + 1 :]) % n for i, n in enumerate(shape))
    numbers = [as_int(f"{name}[{i}]", v) for i, v in enumerate(index)]
    if len(numbers) != len(shape):
        raise ValueError(
            f"{name} must have one number per dimension of {shape}, got {len(numbers)}: {numbers}. Write an "
            f"index such as {(0,) * len(shape)}, or its place in the ravel such as 0."
        )
    pairs = zip(numbers, shape, strict=True)
    return tuple(_from_front(f"{name}[{i}]", *pair) for i, pair in enumerate(pairs))


def _from_front(name: str, number: int, size: int) -> int:
    if not -size <= number < size:
        advice = f"Count from 0, or from {-size} at the end." if size else "There is nothing to count."
        raise IndexError(f"{name} must lie in [{-size}, {size}), got {number}. {advice}")
    return number % size


def _place(index: Sequence[int], shape: Sequence[int]) -> int:
    """The place of an index in the ravel of an array of this shape."""
    return reduce(lambda place, step: place * step[1] + step[0], zip(index, shape, strict=True), 0)


# -- masks: of any function, and of convolutions with something between them --------------------------


def _of_function(name: str, fn: Callable[[Any], Any], x: Any, index: Any, *, backward: bool) -> Any:
    if index is None:
        raise TypeError(f"{name} of a function takes three arguments: {name}(fn, x, index).")
    function = function_reads(name, fn, x)
    traced = function.traced
    asked, other = (traced.outs, traced.xs) if backward else (traced.xs, traced.outs)
    tree = traced.x_tree if backward else traced.out_tree
    if len(asked) == 1:
        which, place = 0, _place(_as_index("index", index, asked[0].shape), asked[0].shape)
    else:
        place = _from_front("index", as_int("index", index), sum(sizes(asked)))
        ends = np.cumsum(sizes(asked))
        which = int(np.searchsorted(ends, place, side="right"))
        place -= int(ends[which]) - math.prod(asked[which].shape)
    node = (function.results if backward else function.arguments)[which]
    masks = {}
    if backward and isinstance(node, Node):
        masks = reads_of(node, _only(node, place))
    elif not backward:
        nodes = [v for v in function.results if isinstance(v, Node)]
        masks = reached_by(nodes, node, _only(node, place))
    others = function.arguments if backward else function.results
    read = [masks.get(held) if isinstance(held, Node) else None for held in others]
    return jax.tree.unflatten(tree, map(_field, read, [array.shape for array in other]))


def _only(node: Node, number: int) -> np.ndarray:
    mask = np.zeros(node.operand.size, bool)
    mask[number] = True
    return mask


def _field(mask: np.ndarray | None, shape: tuple[int, ...]) -> Field:
    """The field of a mask; an empty one of None. Its indices are those that occur along each dimension."""
    held, axes = np.zeros(shape, bool) if mask is None else mask.reshape(shape), range(len(shape))
    occur = [np.flatnonzero(held.any(axis=tuple(b for b in axes if b != a))) for a in axes]
    return Field(held.shape, tuple(occur), held)


def _field_at(place: Place, masks: dict[Node, np.ndarray]) -> Field:
    """The field that the entries of a place have, from masks of all entries by node."""
    mask = masks.get(place.node)
    return _field(None if mask is None else mask[place.numbers], place.numbers.shape)


def _as_sites(spec: Any) -> list[ConvSite]:
    """The sites of a chain of them; empty where it is none."""
    sites = [spec] if isinstance(spec, ConvSite) else spec if isinstance(spec, Sequence) else []
    return list(sites) if all(isinstance(site, ConvSite) for site in sites) else []


# -- sets: one array of indices per dimension, in the caller's layout -------------------------------


def _chain(spec: Any) -> list[ConvSpec]:
    """The specs of a chain, the first applied first."""
    specs = [spec] if isinstance(spec, ConvSpec) or not isinstance(spec, Sequence) else list(spec)
    if not specs:
        raise ValueError("spec must be a ConvSpec or a list of at least one, got an empty list.")
    for each in specs:
        check_spec(each)
    for i, (first, second) in enumerate(pairwise(specs)):
        if first.out_shape != second.in_shape:
            raise ValueError(
                f"spec[{i}] has out_shape {first.out_shape} and spec[{i + 1}] in_shape {second.in_shape}, "
                "which must be equal. List the specs in the order in which they are applied. If something "
                f"stands between them that takes {first.out_shape} to {second.in_shape} (a pooling, a "
                "padding, a reshape), use receptive_field(find_convs(fn, x), out_index) or "
                "receptive_field(fn, x, index), which go through it."
            )
    return specs


def _relations(spec: ConvSpec) -> Iterator[tuple[Axis, int, int | None, int]]:
    """``(axis, i, o, block)``: dimensions i of the input and o of the output, related as by the axis.

    A block of outputs reads what one output of the axis reads: the out channels of a group, one position.
    """
    *spatial, channel = spec.out_order
    *ins, last = spec.in_order
    for axis, i, o in zip(spec.axes, ins, spatial, strict=False):
        yield axis, i, o, 1
    block, size = max(1, spec.out_channels // spec.groups), spec.group_channels
    if spec.batch_group_count > 1:  # group g reads all channels of batch entry g
        yield Axis(spec.groups, 1), ins[-1], channel, block
        yield Axis(size, size), last, None, 1
    else:  # group g reads the channels g*C/G + i
        yield Axis(spec.in_channels, size, max(1, size)), last, channel, block


def _read_by(outputs: Sequence[np.ndarray], spec: ConvSpec) -> list[np.ndarray]:
    """The inputs that some of the outputs read."""
    sets = {}
    for axis, i, o, block in _relations(spec):
        positions = np.unique(outputs[o] // block) if o is not None else np.arange(1)
        sets[i] = _union(axis.reads, axis, positions)
    return [sets[i] for i in range(len(sets))]


def _readers_of(inputs: Sequence[np.ndarray], spec: ConvSpec) -> list[np.ndarray]:
    """The outputs that read some of the inputs."""
    sets = {}
    for axis, i, o, block in _relations(spec):
        if o is not None:
            readers = _union(axis.readers, axis, inputs[i])
            sets[o] = (readers[:, None] * block + np.arange(block)).ravel()
    return [sets[o] if all(map(len, inputs)) else np.arange(0) for o in range(len(sets))]


def _union(related: Callable[[np.ndarray], Any], axis: Axis, positions: np.ndarray) -> np.ndarray:
    """All positions that are related with some of the given ones, ascending; a million pairs at a time."""
    step = max(1, 2**20 // max(1, axis.taps))
    starts = range(0, max(1, len(positions)), step)
    return np.unique(np.concatenate([np.unique(related(positions[k : k + step])[1]) for k in starts]))


def _reach(specs: Sequence[ConvSpec]) -> list[_Relation]:
    """Per dimension of the first ``in_shape``, a matrix (indices, final outputs): True where one is reached.

    The numbers of True in the rows, multiplied over the dimensions, are the sizes of projective fields.
    """
    reach = [scipy.sparse.eye_array(n, dtype=bool, format="csr") for n in specs[-1].out_shape]
    for spec in reversed(specs):
        sets = {}
        for axis, i, o, block in _relations(spec):
            check_array("coverage", (axis.out_size, axis.taps), np.int64, "projective_field")
            outputs = reach[o] if o is not None else scipy.sparse.eye_array(1, dtype=bool, format="csr")
            if block > 1:
                d = np.arange(outputs.shape[0])
                outputs = _chained(d // block, d, len(d) // block, outputs)
            q, t, _ = axis.reads(np.arange(min(axis.out_size, outputs.shape[0])))
            sets[i] = _chained(t, q, axis.size, outputs)
        reach = [sets[i] for i in range(len(sets))]
    return reach


def _chained(index: np.ndarray, related: np.ndarray, size: int, second: _Relation) -> _Relation:
    """The boolean product of the relation of these pairs, with indices below ``size``, and a second one."""
    shape = size, second.shape[0]
    first = scipy.sparse.csr_array((np.ones(len(index), bool), (index, related)), shape=shape)
    most = min(int(np.diff(second.indptr)[first.indices].sum()), size * second.shape[1])
    check_array("coverage", (most,), np.int64, "projective_field")
    return scipy.sparse.csr_array(first @ second)


def __dir__() -> list[str]:
    return list(__all__)

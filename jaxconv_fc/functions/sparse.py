"""The sparse matrix of an affine function, on the host.

Three steps. :func:`linearized` leaves a jaxpr that is linear in x. Each of its equations becomes a sparse
matrix (``functions/equations.py``), so the jaxpr becomes a graph of such matrices. The matrix from one node
to another is the sum over all paths of the products along them. It is taken from x forward, or from the
result backward, wherever there are fewer rows to carry.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxconv_fc.functions.equations import Operand, maps_of
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    JaxprEqn,
    eval_eqn,
    evaluate,
    inner_jaxprs,
    open_jaxpr,
    result_avals,
)
from jaxconv_fc.functions.linear_maps import Guard, Map, RealLinear, Selection, as_csr, product, total
from jaxconv_fc.functions.linearize import Rules, linearized
from jaxconv_fc.functions.names import place_of
from jaxconv_fc.functions.ravel import Ravelled, ravelled, sizes
from jaxconv_fc.functions.rules import AFFINE
from jaxconv_fc.geometry.memory import check_stored
from jaxconv_fc.sharding import is_traced

if TYPE_CHECKING:
    from scipy.sparse import csr_array


class SparseMap(NamedTuple):
    """``fn(x) == matrix @ x + offset``, of ravelled x and fn(x)."""

    matrix: csr_array
    offset: np.ndarray


def sparse_matrix_of(fn: Callable[[Any], Any], x: Any, *, rows: Any = None) -> SparseMap:
    """``(A, b)`` with ``fn(x).ravel() == A @ x.ravel() + b`` for every x, of a function affine in x.

    A is sparse. What :func:`matrix_of` takes, this takes, with the same errors. Every equation of the
    function is a sparse matrix: what moves entries is a selection of rows, a convolution is :func:`as_scipy`.
    A is the sum over all paths from x to the result of their products (docs/maths.md, section 13). No dense
    matrix is made and nothing is probed, but for equations whose structure is not known here (an FFT, a
    triangular solve): those are done with unit vectors. An entry is stored if some path leads to it, whatever
    its value.

    It runs on the host, in NumPy and SciPy, at the cost of the products of sparse matrices.

    Args:
      fn: a function from a pytree of arrays to a pytree of arrays. Bind parameters with
        ``functools.partial(apply, params)``.
      x: an array or a pytree of them, or of ``jax.ShapeDtypeStruct``: only shapes and dtypes count. Vectors
        are in the order of ``jax.flatten_util.ravel_pytree``.
      rows: these entries of the ravelled result alone, at their cost.

    Returns:
      A named tuple ``(matrix, offset)``: a SciPy ``csr_array`` of shape ``(out size, in size)`` in canonical
      form, and a NumPy array of shape ``(out size,)``, in the dtype of the result.

    Raises:
      ValueError: ``fn`` is not affine in x; the message names the primitive that broke it, and where. Or A
        is beyond the memory limit; the message names the equation after which it is.
      TypeError: x, or an array that ``fn`` closes over, is traced; x or the result has a part that is no
        array; the function computes in a dtype that SciPy cannot multiply.
      IndexError: rows out of range.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> def circular(x):  # pad, then VALID
    ...     return jnp.convolve(jnp.pad(x, 1, mode="wrap"), jnp.array([1., 0., 3.]), "valid") + 5
    >>> matrix, offset = fc.sparse_matrix_of(circular, jnp.zeros(4))
    >>> print(matrix.toarray(), matrix.nnz)
    [[0. 1. 0. 3.]
     [3. 0. 1. 0.]
     [0. 3. 0. 1.]
     [1. 0. 3. 0.]] 12
    >>> print(offset)
    [5. 5. 5. 5.]
    """
    graph = Graph("sparse_matrix_of")
    traced = ravelled(graph.name, fn, x, rows)
    root, result, offset = graph.of(traced, AFFINE, instead="matrix_of")
    matrix = graph.between(result, [root]).get(root)
    if matrix is None:  # nothing depends on x
        matrix = Selection(root.operand.size, np.full(traced.shape[0], -1))
    return SparseMap(as_csr(matrix, offset.dtype), offset)


def check_host(name: str, instead: str, arrays: Any) -> None:
    """TypeError for a traced array: the function ``name`` makes NumPy arrays."""
    traced = next(filter(is_traced, jax.tree.leaves(arrays)), None)
    if traced is not None:
        raise TypeError(f"{name} makes NumPy arrays, and {traced} is traced: use {instead} under jit.")


# -- the graph -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """An array that depends on x: the sum of maps of other nodes."""

    operand: Operand
    terms: list[tuple[Node, Map]] = field(default_factory=list)
    eqn: JaxprEqn | None = None
    number: int = field(default_factory=itertools.count().__next__)  # in the order in which they are made


class Graph:
    """The equations of a linear jaxpr as sparse matrices."""

    def __init__(self, name: str):
        self.name = name  # of the public function, for messages

    def of(self, traced: Ravelled, rules: Rules, *, instead: str) -> tuple[Node, Node, np.ndarray]:
        """The vectors of all entries of x and of the result as nodes, and the result's offset.

        ``instead`` is the function for traced arrays.
        """
        check_host(self.name, instead, (traced.xs, open_jaxpr(traced.jaxpr)[1]))
        with jax.default_matmul_precision("highest"):
            linear = linearized(self.name, rules, traced.jaxpr, traced.xs, None)
            root, leaves = self.split(traced.xs)
            results = self.run(linear, leaves)
        tangents, offsets = results[: len(traced.outs)], results[len(traced.outs) :]
        dtype = np.dtype(traced.dtype)
        offset = np.concatenate([np.empty(0, dtype), *(np.ravel(np.asarray(v)) for v in offsets)])
        return root, self.join(tangents, traced), offset.astype(dtype)

    def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr: a node where it depends on a node, else an array."""
        return evaluate(jaxpr, values, self.equation, keep=lambda eqn: False)

    def equation(self, eqn: JaxprEqn, values: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        if not any(isinstance(v, Node) for v in values):
            return eval_eqn(eqn, values)
        if eqn.primitive.name in CALLS:
            return self.run(inner_jaxprs(eqn)[0], values)
        operands = [v.operand if isinstance(v, Node) else v for v in values]
        outs = [Operand(a.shape, self.usable(eqn, a.dtype)) for a in result_avals(eqn)]
        results = maps_of(eqn, operands, self.guard(eqn))
        return [
            Node(out, [(values[i], made) for i, made in terms], eqn)
            for out, terms in zip(outs, results, strict=True)
        ]

    def usable(self, eqn: JaxprEqn, dtype: Any) -> np.dtype:
        """The dtype, if SciPy multiplies it."""
        dtype = np.dtype(dtype)
        if dtype.num >= np.dtype(np.float16).num:  # that, and dtypes that are not NumPy's own
            raise TypeError(
                f"{self.name}: fn computes in {dtype}, which SciPy cannot multiply, at {place_of(eqn)}. "
                "Compute in float32: x.astype(jnp.float32), and the parameters likewise."
            )
        return dtype

    def guard(self, eqn: JaxprEqn | None) -> Guard:
        """Refuses matrices beyond the memory limit, and says after which equation."""

        def check(entries: int, dtype: Any) -> None:
            if eqn is None:
                name = self.name
            else:
                name = f"{self.name}: after {eqn.primitive.name!r} at {place_of(eqn) or 'an unknown line'}"
            check_stored(name, entries, entries * (np.dtype(dtype).itemsize + 4), "rows= for some rows")

        return check

    def split(self, arrays: Sequence[Any]) -> tuple[Node, list[Node]]:
        """The vector of all entries of some arrays, and each array as a part of it."""
        size, firsts = sum(sizes(arrays)), [*itertools.accumulate(sizes(arrays), initial=0)]
        root = Node(Operand((size,), np.dtype(bool)))  # its map is the identity, in any dtype
        leaves = []
        for a, first, n in zip(arrays, firsts, sizes(arrays), strict=False):
            part = Selection(size) if n == size else Selection(size, np.arange(first, first + n))
            leaves.append(Node(Operand(a.shape, np.dtype(a.dtype)), [(root, part)]))
        return root, leaves

    def join(self, results: Sequence[Any], traced: Ravelled) -> Node:
        """The vector of all results. Known ones are 0 in it."""
        node = Node(Operand((traced.shape[0],), np.dtype(traced.dtype)))
        first = 0
        for result, out in zip(results, traced.outs, strict=True):
            n = math.prod(out.shape)
            if isinstance(result, Node):
                numbers = np.full(traced.shape[0], -1)
                numbers[first : first + n] = np.arange(n)
                node.terms.append((result, Selection(n) if n == traced.shape[0] else Selection(n, numbers)))
            first += n
        return node

    def between(self, node: Node, sources: Collection[Node]) -> dict[Node, Map]:
        """The matrix of ``node`` as a function of each of the sources that it depends on."""
        nodes = _between(node, sources)
        forward = any(isinstance(m, RealLinear) for n in nodes if n not in sources for _, m in n.terms)
        reached = [n for n in nodes if n in sources]
        if forward or sum(n.operand.size for n in reached) < node.operand.size:
            return self._forward(node, nodes, sources)
        return self._backward(node, nodes, sources)

    def _forward(self, node: Node, nodes: list[Node], sources: Collection[Node]) -> dict[Node, Map]:
        readers = dict.fromkeys(nodes, 0)
        for n in nodes:
            for source, _ in () if n in sources else n.terms:
                readers[source] += 1
        made: dict[Node, dict[Node, Map]] = {}
        for n in nodes:
            if n in sources:
                made[n] = {n: Selection(n.operand.size)}
                continue
            parts: dict[Node, list[Map]] = {}
            for before, step in n.terms:
                for source, matrix in made[before].items():
                    grown = product(step, matrix, n.operand.dtype, self.guard(n.eqn))
                    parts.setdefault(source, []).append(grown)
                readers[before] -= 1
                if not readers[before]:
                    del made[before]
            made[n] = {s: total(ms, n.operand.dtype, self.guard(n.eqn)) for s, ms in parts.items()}
        return made[node]

    def _backward(self, node: Node, nodes: list[Node], sources: Collection[Node]) -> dict[Node, Map]:
        dtype = node.operand.dtype
        parts: dict[Node, list[Map]] = {node: [Selection(node.operand.size)]}
        results: dict[Node, Map] = {}
        for n in reversed(nodes):
            behind = total(parts.pop(n), dtype, self.guard(n.eqn))
            if n in sources:
                results[n] = behind
                continue
            for before, step in n.terms:
                parts.setdefault(before, []).append(product(behind, step, dtype, self.guard(n.eqn)))
        return results


def _between(node: Node, sources: Collection[Node]) -> list[Node]:
    """``node`` and the nodes that it depends on, up to the sources, in the order in which they were made."""
    found, front = {node}, [node]
    while front:
        n = front.pop()
        for before, _ in () if n in sources else n.terms:
            if before not in found:
                found.add(before)
                front.append(before)
    return sorted(found, key=lambda n: n.number)

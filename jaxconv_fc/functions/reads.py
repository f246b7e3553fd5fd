"""Which entries of its arguments an entry of a result reads, for any function.

The equations of a jaxpr become a graph, as for :func:`sparse_matrix_of`, of the relations of
``functions/relations.py``. Sets of entries, as masks, go through it from a result to what it reads, or the
other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxconv_fc.functions.equations import Operand
from jaxconv_fc.functions.find import CONVOLUTIONS, spec_of
from jaxconv_fc.functions.jaxprs import (
    CALLS,
    JaxprEqn,
    eval_eqn,
    evaluate,
    holds,
    inner_jaxprs,
    is_mutable,
    open_jaxpr,
    open_scan,
    open_while,
    result_avals,
)
from jaxconv_fc.functions.linear_maps import Selection
from jaxconv_fc.functions.names import place_of
from jaxconv_fc.functions.ravel import Ravelled, ravelled
from jaxconv_fc.functions.relations import every, is_same, operand_roles, read_by, readers_of, terms_of
from jaxconv_fc.functions.sites import ConvSite
from jaxconv_fc.functions.sparse import Graph, Node, check_host

# -- the graph ---------------------------------------------------------------------------------------


class Convolution(NamedTuple):
    """A convolution of the function. x and result are nodes, or arrays where they do not depend on what is
    asked for."""

    eqn: JaxprEqn
    x: Any
    result: Any


class ReadsGraph(Graph):
    """Evaluates any jaxpr to a graph of relations between arrays. Nodes stand for what is asked for."""

    def __init__(self, name: str):
        super().__init__(name)
        self.convolutions: list[Convolution] = []  # in order of execution

    def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        return evaluate(jaxpr, values, self.equation, keep=self.convolves)

    @staticmethod
    def convolves(eqn: JaxprEqn) -> bool:
        return eqn.primitive.name in CONVOLUTIONS or holds(eqn, CONVOLUTIONS)

    def equation(self, eqn: JaxprEqn, values: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        name = eqn.primitive.name
        if is_mutable(eqn):
            raise ValueError(
                f"{self.name}: primitive {name!r} at {place_of(eqn) or 'an unknown line'} reads or writes a "
                "mutable array, whose entries depend on what ran before. Use arrays that do not change."
            )
        if any(isinstance(v, Node) for v in values) or (name in CALLS and self.convolves(eqn)):
            results = self._control.get(name, ReadsGraph.related)(self, eqn, values)
        else:
            results = eval_eqn(eqn, values)
        if name in CONVOLUTIONS:
            by_role = dict(zip(operand_roles(eqn), values, strict=True))
            self.convolutions.append(Convolution(eqn, by_role.get("x"), results[0]))
        return results

    def related(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Node]:
        """The results of an equation, related with its operands by the table."""
        operands = [v.operand if isinstance(v, Node) else v for v in values]
        results = terms_of(eqn, operands, self.guard(eqn))
        return [
            Node(_operand(out), [(values[i], relation) for i, relation in terms], eqn)
            for out, terms in zip(result_avals(eqn), results, strict=True)
        ]

    def call(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        return self.run(inner_jaxprs(eqn)[0], values)

    def scan(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """A loop of known length, unrolled."""
        body, constants, carry, xs = open_scan(eqn, values)
        carried, steps = len(carry), range(eqn.params["length"])
        made: list[Any] = [None] * len(steps)
        for i in reversed(steps) if eqn.params["reverse"] else steps:
            results = self.run(body, [*constants, *carry, *(_slice(v, i) for v in xs)])
            carry, made[i] = results[:carried], results[carried:]
        outs = result_avals(eqn)[carried:]
        return [*carry, *(_stacked([step[k] for step in made], out) for k, out in enumerate(outs))]

    def loop(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """A while loop, run as long as its condition is known."""
        loop = open_while(eqn, values)
        carry = list(loop.carry)
        while True:
            (going,) = self.run(loop.cond, [*loop.cond_constants, *carry])
            if isinstance(going, Node):
                return self.related(eqn, values)
            if not going:
                return carry
            carry = self.run(loop.body, [*loop.body_constants, *carry])

    def branches(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """The branch that runs if the index is known; else all of them, and the results read the index."""
        index, bodies = values[0], inner_jaxprs(eqn)
        if not isinstance(index, Node):
            return self.run(bodies[min(max(int(index), 0), len(bodies) - 1)], values[1:])
        results = []
        for out, *made in zip(result_avals(eqn), *(self.run(b, values[1:]) for b in bodies), strict=True):
            node = _node(out)
            same = Selection(node.operand.size)
            chosen = every(index.operand.shape, tuple(out.shape))
            node.terms = [(index, chosen), *((v, same) for v in made if isinstance(v, Node))]
            results.append(node)
        return results

    _control: dict[str, Callable[..., list[Any]]] = {  # noqa: RUF012
        **dict.fromkeys((*CALLS, "linear_call", "composite", "xla_metadata_call"), call),
        "scan": scan,
        "while": loop,
        "cond": branches,
    }


def _operand(aval: Any) -> Operand:
    return Operand(tuple(aval.shape), np.dtype(bool))


def _node(aval: Any) -> Node:
    return Node(_operand(aval))


def _slice(value: Any, i: int) -> Any:
    """Slice ``i`` of an operand that a loop scans over."""
    if not isinstance(value, Node):
        return value[i]
    _, *shape = value.operand.shape
    n = math.prod(shape)
    part = Selection(value.operand.size, np.arange(i * n, (i + 1) * n))
    return Node(Operand(tuple(shape), np.dtype(bool)), [(value, part)])


def _stacked(values: Sequence[Any], aval: Any) -> Node:
    """Slices that a loop has made, along a new first axis."""
    node = _node(aval)
    n = math.prod(aval.shape[1:])
    for i, value in enumerate(values):
        if isinstance(value, Node):
            numbers = np.full(node.operand.size, -1)
            numbers[i * n : (i + 1) * n] = np.arange(n)
            node.terms.append((value, Selection(n, numbers)))
    return node


def reads_of(result: Node, mask: np.ndarray) -> dict[Node, np.ndarray]:
    """What these entries of a node read, of every node that it depends on."""
    masks = {result: mask}
    for node in reversed(depends_on(result)):
        if node in masks:
            for before, relation in node.terms:
                read = read_by(relation, masks[node])
                masks[before] = masks[before] | read if before in masks else read
    return masks


def reached_by(results: Sequence[Node], source: Node, mask: np.ndarray) -> dict[Node, np.ndarray]:
    """What reads these entries of a node, of every node that a result depends on and that depends on it."""
    masks = {source: mask}
    for node in depends_on(*results):
        if node is source:
            continue
        for before, relation in node.terms:
            if before in masks:
                readers = readers_of(relation, masks[before])
                masks[node] = masks[node] | readers if node in masks else readers
    return masks


def depends_on(*nodes: Node) -> list[Node]:
    """These nodes and all that they depend on, in the order in which they were made."""
    found, front = set(nodes), [*nodes]
    while front:
        for before, _ in front.pop().terms:
            if before not in found:
                found.add(before)
                front.append(before)
    return sorted(found, key=lambda n: n.number)


class Function(NamedTuple):
    """A function of pytrees as a graph."""

    traced: Ravelled
    arguments: list[Node]
    results: list[Any]  # nodes; arrays where they do not depend on x


def function_reads(name: str, fn: Callable[[Any], Any], x: Any) -> Function:
    traced = ravelled(name, fn, x)
    check_host(name, "concrete arrays", (traced.xs, open_jaxpr(traced.jaxpr)[1]))
    arguments = list(map(_node, traced.xs))
    return Function(traced, arguments, ReadsGraph(name).run(traced.jaxpr, arguments))


class Place(NamedTuple):
    """The input or output of a convolution, and the numbers that the entries of one example have there."""

    node: Node
    numbers: np.ndarray  # of the ``in_shape`` or ``out_shape``


def places_of(name: str, sites: Sequence[ConvSite]) -> list[Place]:
    """The input of each site of a chain, and the output of the last. The graph has what stands between."""
    met = _met(name, sites)
    for i, site in enumerate(sites):
        if site.examples == 0:
            raise ValueError(
                f"{name}: site {i}, {site.name}, was found with a batch of no examples. Take one."
            )
    places = []
    for site, each in zip(sites, met, strict=True):
        start = _before_padding(name, site, each)
        places.append(Place(start, _first_example(site, each, start, "x")))
    last = met[-1].result
    return [*places, Place(last, _first_example(sites[-1], met[-1], last, "y"))]


def check_adjacent(name: str, sites: Sequence[ConvSite]) -> None:
    """ValueError that names what stands between two sites, but for elementwise functions."""
    met = _met(name, sites)
    starts = [_before_padding(name, site, each) for site, each in zip(sites, met, strict=True)]
    for i in range(len(sites) - 1):
        nodes = depends_on(starts[i + 1])
        behind, beside = _reaching(nodes, met[i].result), _reaching(nodes, starts[i])
        for node in nodes:
            for before, relation in node.terms if node in behind and node is not met[i].result else ():
                if before in beside and (before not in behind or not is_same(relation)):
                    what = repr(node.eqn.primitive.name) if node.eqn else "a loop"
                    raise ValueError(
                        f"{name}: {what} stands between site {i}, {sites[i].name}, and site {i + 1}, "
                        f"{sites[i + 1].name}. {name} takes convolutions that follow each other: "
                        "use neurons.receptive_field and neurons.projective_field, which go through it."
                    )


def _reaching(nodes: Sequence[Node], source: Node) -> set[Node]:
    """The source and those of the nodes that depend on it, in the order in which they were made."""
    found = {source}
    for node in nodes:
        if any(before in found for before, _ in node.terms):
            found.add(node)
    return found


def _met(name: str, sites: Sequence[ConvSite]) -> list[Convolution]:
    """The convolutions that are these sites, in the graph of the one function that they were found in."""
    known = [site.origin for site in sites if site.origin is not None]
    if len(known) < len(sites) or any(o.jaxpr is not known[0].jaxpr for o in known):
        raise ValueError(
            f"{name}: the sites are not all from one call of find_convs, so what stands between them is not "
            "known. Pass sites of one call, or their specs: [site.spec for site in sites]."
        )
    graph = ReadsGraph(name)
    jaxpr = known[0].jaxpr
    graph.run(jaxpr, [_node(v.aval) for v in open_jaxpr(jaxpr)[0].invars])
    if len(graph.convolutions) != known[0].among:
        raise ValueError(
            f"{name}: some convolution of the function stands in a loop or a branch, and is met "
            f"{len(graph.convolutions)} times in all, not {known[0].among}. Pass the function: "
            f"neurons.{name}(fn, x, index)."
        )
    met = [graph.convolutions[o.number] for o in known]
    for i, (site, each) in enumerate(zip(sites, met, strict=True)):
        if site.product != "M x" or not isinstance(each.x, Node) or not isinstance(each.result, Node):
            raise ValueError(f"{name}: site {i}, {site.name}, is no product M x of an argument of fn.")
        if i and met[i - 1].result not in depends_on(each.x):
            raise ValueError(
                f"{name}: site {i}, {site.name}, does not depend on site {i - 1}, {sites[i - 1].name}: "
                "they stand side by side. Pass sites that stand one behind the other."
            )
    return met


def _before_padding(name: str, site: ConvSite, met: Convolution) -> Node:
    """The input of the M of a site: that of the convolution, before the padding that the spec makes."""
    own = met.eqn.params["spec"] if "spec" in met.eqn.params else spec_of(met.eqn)
    if own == site.spec:
        return met.x
    front = {before for before, _ in met.x.terms}
    while front:
        node = max(front, key=lambda n: n.number)
        front.remove(node)
        if not front and node.operand.shape == tuple(site.x.shape):
            return node
        front |= {before for before, _ in node.terms}
    raise ValueError(
        f"{name}: what the M of site {site.name} takes was not found in the function. Pass "
        "find_convs(..., raw=True), or the function."
    )


def _first_example(site: ConvSite, met: Convolution, node: Node, role: str) -> np.ndarray:
    """The numbers of the entries that one example has, of the shape that it has in the spec."""
    spec, numbers = site.spec, node.operand.numbers()
    shape = spec.in_shape if role == "x" else spec.out_shape
    if met.eqn.primitive.name == "conv_product":
        return numbers.reshape(-1, *shape)[0]
    orders = spec.dimension_numbers
    batch = (orders.lhs_spec if role == "x" else orders.out_spec)[0]
    if role == "x" and spec.batch_group_count > 1:  # [group, example]
        return numbers.take(range(0, numbers.shape[batch], numbers.shape[batch] // shape[batch]), batch)
    return numbers.take(0, batch)

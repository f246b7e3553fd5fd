"""Which entries of its operands every entry of a result of an equation may read: one table by primitive.

An equation need not be linear. A relation between two arrays is a product of one relation per axis,
:class:`Along`, or a selection of entries. A primitive
that is in no table is taken to read all entries of its operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxconv_fc.functions.columns import MOVES
from jaxconv_fc.functions.equations import Operand, maps_of
from jaxconv_fc.functions.find import CONVOLUTIONS, spec_of
from jaxconv_fc.functions.jaxprs import JaxprEqn, operand_avals, operand_numbers, result_avals
from jaxconv_fc.functions.linear_maps import Selection
from jaxconv_fc.functions.tap_sums import window_axes
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.layout import inverse
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.products.product import OPERANDS, batch_sizes
from jaxconv_fc.sharding import RELABELS

Label = Any
Dims = tuple[tuple[Label, int], ...]  # a name and a size per axis
Terms = list[tuple[int, Any]]

# -- relations ---------------------------------------------------------------------------------------


class Along(NamedTuple):
    """An entry of the result reads an entry of the operand if their indices are related on every axis that
    both arrays have. Axes are known by name.

    Two indices are related if they are equal, or by the matrix that ``matrices`` has for this name. So an
    entry reads all along an axis of the operand whose name the result lacks. Axes may be split:
    ``before`` and ``after`` are the axes of the operand and the result after a reshape.
    """

    before: Dims
    after: Dims
    matrices: dict[Label, Any] = {}  # noqa: RUF012  # name -> bool CSR (size in the result, size in the operand)


def is_same(relation: Any) -> bool:
    """Whether every entry reads the entry of the same number, and no other."""
    if isinstance(relation, Along):
        return relation.before == relation.after and not relation.matrices
    return isinstance(relation, Selection) and relation.numbers is None


def read_by(relation: Any, mask: np.ndarray) -> np.ndarray:
    """The entries of the operand that some entry of the result in the mask reads."""
    if isinstance(relation, Along):
        transposed = {name: matrix.T.tocsr() for name, matrix in relation.matrices.items()}
        return _related(mask, relation.after, relation.before, transposed)
    found = np.zeros(_columns(relation), bool)
    if isinstance(relation, Selection):
        read = np.flatnonzero(mask) if relation.numbers is None else relation.numbers[mask]
        found[read[read >= 0]] = True
    else:
        found[relation[np.flatnonzero(mask)].indices] = True
    return found


def readers_of(relation: Any, mask: np.ndarray) -> np.ndarray:
    """The entries of the result that read some entry of the operand in the mask."""
    if isinstance(relation, Along):
        return _related(mask, relation.before, relation.after, relation.matrices)
    if isinstance(relation, Selection):
        if relation.numbers is None:
            return mask
        return np.append(mask, False)[relation.numbers]  # -1 reads nothing
    return relation.astype(bool) @ mask


def _columns(relation: Any) -> int:
    return relation.columns if isinstance(relation, Selection) else relation.shape[1]


def _related(mask: Any, first: Dims, second: Dims, matrices: dict[Label, Any]) -> np.ndarray:
    """A mask over the second axes, of the entries that are related with some entry of ``mask``.

    ``mask`` is over the first axes. Axes of one name are related by the matrix of this name, or by equality.
    """
    names = [name for name, _ in second]
    mask = mask.reshape([n for _, n in first])
    mask = mask.any(axis=tuple(i for i, (name, _) in enumerate(first) if name not in names))
    kept = [name for name, _ in first if name in names]
    shared = [name for name in names if name in kept]
    mask = mask.transpose([kept.index(name) for name in shared])
    for i, name in enumerate(shared):
        if name in matrices:
            lines = np.moveaxis(mask, i, 0)
            found = matrices[name] @ lines.reshape(lines.shape[0], math.prod(lines.shape[1:]))
            mask = np.moveaxis(found.reshape(-1, *lines.shape[1:]), 0, i)
    mask = mask.reshape([n if name in shared else 1 for name, n in second])
    return np.broadcast_to(mask, [n for _, n in second]).ravel()


def _pairs(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> Any:
    """The relation of these pairs, as a boolean matrix."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(rows), bool), (rows, columns)), shape=shape)


# -- the table: primitive -> what an entry of the result reads -------------------------------------------


def terms_of(eqn: JaxprEqn, values: Sequence[Any], guard: Any) -> list[Terms]:
    """The terms of every result. What stands in no table reads all entries of its operands."""
    name = eqn.primitive.name
    depends = [i for i, v in enumerate(values) if isinstance(v, Operand)]
    if name in _MOVED and set(depends) <= set(operand_numbers(_MOVED[name], len(values))):
        if name == "gather":  # what is filled in is no entry
            eqn = eqn.replace(params=eqn.params | {"fill_value": 0})
        return maps_of(eqn, values, guard)
    rules = {i: _DIMS.get(name, _unknown) if values[i].shape else _unknown for i in depends}
    return [
        [(i, rule(eqn, i, values[i].shape, tuple(out.shape))) for i, rule in rules.items()]
        for out in result_avals(eqn)
    ]


# A rule is ``rule(equation, number of the operand, its shape, shape of the result) -> relation``.


def _axes(shape: Sequence[int], role: str, names: Sequence[Label] | None = None) -> Dims:
    """Axes with names, by default names that no other array has."""
    return tuple(zip(names or [(role, i) for i in range(len(shape))], shape, strict=True))


def every(operand: Sequence[int], result: Sequence[int]) -> Along:
    """Every entry of a result of this shape reads every entry of an operand of that shape."""
    return Along(_axes(operand, "operand"), _axes(result, "result"))


def _unknown(eqn: JaxprEqn, i: int, before: Sequence[int], after: Sequence[int]) -> Along:
    return every(before, after)


def _elementwise(eqn: JaxprEqn, i: int, before: Sequence[int], after: Sequence[int]) -> Along:
    """Axes of length 1, and scalars, are stretched."""
    names = [a if before[a : a + 1] == after[a : a + 1] else ("stretched", a) for a in range(len(before))]
    return Along(_axes(before, "", names), _axes(after, "", range(len(after))))


def _reduced(eqn: JaxprEqn, i: int, before: Sequence[int], after: Sequence[int]) -> Along:
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    kept = [a for a in range(len(before)) if a not in axes]
    return Along(_axes(before, "", range(len(before))), _axes(after, "", kept))


def _mixed(axes_of: Callable[[JaxprEqn, int], Sequence[int]]) -> Callable[..., Along]:
    """An entry reads all along the axes that the equation mixes, and its own index on the others."""

    def rule(eqn: JaxprEqn, i: int, before: Sequence[int], after: Sequence[int]) -> Along:
        axes = [a % len(before) for a in axes_of(eqn, len(before))]
        names = [("mixed", a) if a in axes else a for a in range(len(before))]
        return Along(_axes(before, "", names), _axes(after, "", range(len(after))))

    return rule


def _cumulative(eqn: JaxprEqn, i: int, before: Sequence[int], after: Sequence[int]) -> Along:
    axis = eqn.params["axis"]
    reads = np.tri(before[axis], dtype=bool)
    pairs = np.nonzero(reads.T if eqn.params["reverse"] else reads)
    names = range(len(before))
    return Along(_axes(before, "", names), _axes(after, "", names), {axis: _pairs(*pairs, shape=reads.shape)})


def _windows(eqn: JaxprEqn, i: int, before: Sequence[int], after: Sequence[int]) -> Along:
    matrices = {a: _of_axis(axis)["x", "y"] for a, axis in enumerate(window_axes(eqn.params, before))}
    names = range(len(before))
    return Along(_axes(before, "", names), _axes(after, "", names), matrices)


def _dense_layer(eqn: JaxprEqn, i: int, before: Sequence[int], after: Sequence[int]) -> Along:
    """The result has the batch axes, then the other axes of the left operand, then those of the right."""
    contract, batch = eqn.params["dimension_numbers"]
    names = []
    for k, aval in enumerate(operand_avals(eqn)):
        own: list[Label] = [(k, a) for a in range(len(aval.shape))]
        for n, a in enumerate(batch[k]):
            own[a] = ("batch", n)
        for n, a in enumerate(contract[k]):
            own[a] = ("contracted", n)
        names.append(own)
    out = [("batch", n) for n in range(len(batch[0]))]
    out += [name for k in (0, 1) for name in names[k] if name[0] not in ("batch", "contracted")]
    return Along(_axes(before, "", names[i]), _axes(after, "", out))


def _gather(eqn: JaxprEqn, i: int, before: Sequence[int], after: Sequence[int]) -> Along:
    """With indices that depend on x: an entry reads its index, and any entry of the operand."""
    if i == 0:
        return _unknown(eqn, i, before, after)
    offsets = eqn.params["dimension_numbers"].offset_dims
    batch = [a for a in range(len(after)) if a not in offsets]
    return Along(_axes(before, "", [*batch, "index"]), _axes(after, "", range(len(after))))


def _of_axis(axis: Axis) -> dict[tuple[str, str], Any]:
    """The relations of x, result y and kernel k of a convolution along one axis: the matrix of any two roles,
    ``(operand, result)``."""
    o, t, p = axis.reads(np.arange(axis.out_size))
    of = {"y": (o, axis.out_size), "x": (t, axis.size), "k": (p, axis.taps)}
    return {(a, b): _pairs(of[b][0], of[a][0], (of[b][1], of[a][1])) for a in "xyk" for b in "xyk" if a != b}


def _roles(spec: ConvSpec) -> dict[str, list[list[tuple[Label, int]]]]:
    """The axes of x, kernel and result: of each dimension the axes that it is split into."""
    spatial, groups = range(len(spec.axes)), spec.groups
    block, within = spec.out_channels // max(1, groups), spec.group_channels
    of_group, out = [("g", groups), ("i", within)], [("g", groups), ("e", block)]
    x = [[(a, axis.size)] for a, axis in zip(spatial, spec.axes, strict=True)]
    x += [[of_group[0]], [of_group[1]]] if spec.batch_group_count > 1 else [of_group]
    y = [*([(a, axis.out_size)] for a, axis in zip(spatial, spec.axes, strict=True)), out]
    k = [*([(a, axis.taps)] for a, axis in zip(spatial, spec.axes, strict=True)), [("i", within)], out]
    orders = {"x": spec.in_order, "y": spec.out_order, "k": spec.kernel_order}
    return {role: [dims[i] for i in inverse(orders[role])] for role, dims in (("x", x), ("y", y), ("k", k))}


def operand_roles(eqn: JaxprEqn) -> str:
    """Which of x, result and kernel the operands of a convolution are."""
    return OPERANDS[eqn.params["out"]] if "out" in eqn.params else "xk"


def _convolution(eqn: JaxprEqn, i: int, before: Sequence[int], after: Sequence[int]) -> Along:
    roles = operand_roles(eqn)
    if eqn.primitive.name == "conv_product":
        spec, out, batches = (eqn.params[name] for name in ("spec", "out", "batches"))
        dims = _roles(spec)
        sizes = batch_sizes(out, batches, *(aval.shape for aval in operand_avals(eqn)))
        for role in "xyk":
            dims[role][:0] = [[(("batch", n), sizes[n])] for n, has in enumerate(batches) if role in has]
    else:
        spec, out = spec_of(eqn), "y"
        dims, numbers = _roles(spec), spec.dimension_numbers
        examples = [("batch", result_avals(eqn)[0].shape[numbers.out_spec[0]])]
        if spec.batch_group_count > 1:
            dims["x"][numbers.lhs_spec[0]] += examples
        else:
            dims["x"].insert(numbers.lhs_spec[0], examples)
        dims["y"].insert(numbers.out_spec[0], examples)
    flat = {role: tuple(axis for parts in dims[role] for axis in parts) for role in dims}
    matrices = {a: _of_axis(axis)[roles[i], out] for a, axis in enumerate(spec.axes)}
    return Along(flat[roles[i]], flat[out], matrices)


_MOVED = {**MOVES, **dict.fromkeys(("scatter-add", "scatter-sub"), (0, 2))}
_ELEMENTWISE = frozenset({
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex", "conj",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "device_put", "digamma", "div", "eq", "eq_to",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a",
    "igammac", "imag", "integer_pow", "is_finite", "layout_constraint", "le", "le_to", "lgamma", "log",
    "log1p", "logistic", "lt", "lt_to", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not", "or",
    "polygamma", "population_count", "pow", "random_gamma_grad", "real", "reduce_precision",
    "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "sharding_constraint", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xla_metadata_value", "xor", "zeta",
})  # fmt: skip
_REDUCED = frozenset({
    "argmax", "argmin", "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
    "reduce_sum", "reduce_xor",
})  # fmt: skip
_WINDOWS = frozenset({
    "reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum", "select_and_gather_add",
})  # fmt: skip
_DIMS: dict[str, Callable[..., Along]] = {
    **dict.fromkeys((*_ELEMENTWISE, *RELABELS), _elementwise),
    **dict.fromkeys(_REDUCED, _reduced),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _cumulative),
    **dict.fromkeys(_WINDOWS, _windows),
    "sort": _mixed(lambda eqn, rank: [eqn.params["dimension"]]),
    "top_k": _mixed(lambda eqn, rank: [eqn.params.get("axis", -1)]),
    "fft": _mixed(lambda eqn, rank: range(rank - len(eqn.params["fft_lengths"]), rank)),
    "dot_general": _dense_layer,
    "gather": _gather,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
}

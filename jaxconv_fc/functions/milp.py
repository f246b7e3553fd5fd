"""Affine layers with piecewise linear activations as a mixed-integer linear program."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # scipy.sparse is loaded at its first use

from jaxconv_fc.functions.activations import ACTIVATIONS


class _Program:
    """Variables with bounds and names, and rows ``low <= sum of coefficients * variables <= high``."""

    def __init__(self) -> None:
        self.lows: list[np.ndarray] = []
        self.highs: list[np.ndarray] = []
        self.names: list[str] = []
        self.binary: list[np.ndarray] = []
        self.rows: list[tuple[Any, np.ndarray, np.ndarray]] = []  # (coefficients by variable, low, high)

    def variables(self, name: str, low: Any, high: Any, *, binary: bool = False) -> np.ndarray:
        """Numbers of new variables, one for each bound."""
        low, high = np.broadcast_arrays(np.asarray(low, float), np.asarray(high, float))
        first = len(self.names)
        self.lows.append(low)
        self.highs.append(high)
        self.names += [f"{name}{i}" for i in range(low.size)]
        self.binary.append(np.full(low.size, binary))
        return np.arange(first, first + low.size)

    def at_least(self, *terms: tuple[np.ndarray, Any], bound: Any) -> None:
        """``sum of coefficient * variable >= bound``, entry by entry."""
        count = len(terms[0][0])
        rows = np.concatenate([np.arange(count) for _ in terms])
        columns = np.concatenate([numbers for numbers, _ in terms])
        data = np.concatenate([np.broadcast_to(np.asarray(c, float), count) for _, c in terms])
        self.rows.append(
            (
                scipy.sparse.csr_array((data, (rows, columns)), (count, len(self.names))),
                np.broadcast_to(np.asarray(bound, float), count),
                np.full(count, np.inf),
            )
        )

    def same(self, numbers: np.ndarray, others: np.ndarray, factor: float, shift: float) -> None:
        """``variable == factor * other + shift``, entry by entry."""
        one = scipy.sparse.eye_array(len(numbers), format="csr")
        self.equal([(one, numbers), (-factor * one, others)], np.full(len(numbers), shift))

    def equal(self, matrices: Sequence[tuple[Any, np.ndarray]], bound: np.ndarray) -> None:
        """``sum of matrix @ variables == bound``"""
        parts = [matrix.tocoo() for matrix, _ in matrices]
        data = np.concatenate([part.data.astype(float) for part in parts])
        rows = np.concatenate([part.row for part in parts])
        pairs = zip(parts, matrices, strict=True)
        columns = np.concatenate([numbers[part.col] for part, (_, numbers) in pairs])
        total = scipy.sparse.csr_array((data, (rows, columns)), (len(bound), len(self.names)))
        self.rows.append((total, bound.astype(float), bound.astype(float)))

    def matrix(self) -> Any:
        count = len(self.names)
        blocks = [
            scipy.sparse.csr_array((m.data, m.indices, m.indptr), (m.shape[0], count))
            for m, _, _ in self.rows
        ]
        return scipy.sparse.vstack(blocks, format="csr") if blocks else scipy.sparse.csr_array((0, count))


class _Z(NamedTuple):
    """Some variables: their numbers, and bounds."""

    numbers: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def where(self, mask: np.ndarray) -> _Z:
        return _Z(self.numbers[mask], self.low[mask], self.high[mask])


def write(
    layers: Sequence[Any],
    path: Any,
    ends: Sequence[np.ndarray],
    intervals: Sequence[tuple[np.ndarray, np.ndarray]],
    objective: Any,
    maximize: bool,
) -> None:
    """``AffineLayers.to_lp`` of these layers, for inputs between two ends, with the interval of every z."""
    if not str(path).endswith((".lp", ".mps")):
        raise ValueError(f"path must end in .lp or .mps, got {os.fspath(path)!r}.")
    for number, layer in enumerate(layers):
        if layer.activation is not None and layer.activation not in _PIECES:
            raise ValueError(
                f"to_lp: layer {number} has the activation {layer.activation!r} ({layer.name}), and linear "
                f"constraints are known for {', '.join(_PIECES)} alone."
            )
    size = len(layers[-1].offset)
    costs = np.zeros(size) if objective is None else np.ravel(np.asarray(objective, float))
    if len(costs) != size:
        raise ValueError(f"objective must have {size} entries, one per result, got {len(costs)}.")
    if not all(np.isfinite(v).all() for interval in [ends, *intervals] for v in interval):
        raise ValueError("to_lp needs finite low and high: a big-M constraint is made of the bounds of z.")
    program = _Program()
    outputs = {-1: program.variables("x", *ends)}
    for number, (layer, interval) in enumerate(zip(layers, intervals, strict=True)):
        z = _Z(program.variables(f"z{number}_" if layer.activation else "y", *interval), *interval)
        terms = [(-m, outputs[n]) for n, m in zip(layer.inputs, layer.matrices, strict=True)]
        identity = scipy.sparse.eye_array(len(layer.offset), format="csr")
        program.equal([(identity, z.numbers), *terms], layer.offset)
        h = _PIECES[layer.activation](program, number, layer, z) if layer.activation else z
        outputs[number] = h.numbers
    cost = np.zeros(len(program.names))
    cost[outputs[len(layers) - 1]] = costs
    _by_highs(program, cost, maximize, os.fspath(path))


def _by_highs(program: _Program, cost: np.ndarray, maximize: bool, path: str) -> None:
    import highspy

    matrix, lp = program.matrix(), highspy.HighsLp()
    lp.num_row_, lp.num_col_ = matrix.shape
    lp.col_cost_ = cost
    lp.sense_ = highspy.ObjSense.kMaximize if maximize else highspy.ObjSense.kMinimize
    lp.col_lower_, lp.col_upper_ = np.concatenate(program.lows), np.concatenate(program.highs)
    lp.row_lower_ = np.concatenate([low for _, low, _ in program.rows])
    lp.row_upper_ = np.concatenate([high for _, _, high in program.rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
    lp.integrality_ = [kinds[int(b)] for b in np.concatenate(program.binary)]
    lp.col_names_ = program.names
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    for status in (solver.passModel(lp), solver.writeModel(path)):
        if status == highspy.HighsStatus.kError:
            raise ValueError(f"HiGHS could not write {path}.")


# -- activations -----------------------------------------------------------------------------------
#
# Each h is a maximum of linear functions of z. It is at least all of them, and at most the one that a binary
# variable a names.


def _two_slopes(program: _Program, name: str, z: _Z, slope: float) -> _Z:
    """``h = max(z, slope * z)`` for a slope of at most 1. Bounds of one sign need no binary."""
    ends = ACTIVATIONS["leaky_relu"].interval(z.low, z.high, slope=slope)
    h = _Z(program.variables(name, *ends), *ends)
    straddles = (z.low < 0) & (z.high > 0)
    for settled, factor in ((z.low >= 0, 1.0), ((z.high <= 0) & (z.low < 0), slope)):
        program.same(h.numbers[settled], z.numbers[settled], factor, 0.0)
    on, z = h.numbers[straddles], z.where(straddles)
    a = program.variables(f"a_{name}", np.zeros(len(on)), np.ones(len(on)), binary=True)
    program.at_least((on, 1), (z.numbers, -1), bound=0)
    program.at_least((on, 1), (z.numbers, -slope), bound=0)
    gap = 1 - slope  # h <= z - gap * low * (1 - a), and h <= slope * z + gap * high * a
    program.at_least((on, -1), (z.numbers, 1), (a, gap * z.low), bound=gap * z.low)
    program.at_least((on, -1), (z.numbers, slope), (a, gap * z.high), bound=0)
    return h


def _moved(program: _Program, name: str, z: _Z, factor: float, shift: float) -> _Z:
    """``factor * z + shift``"""
    ends = factor * z.low + shift, factor * z.high + shift
    low, high = ends if factor >= 0 else ends[::-1]
    w = _Z(program.variables(name, low, high), low, high)
    program.same(w.numbers, z.numbers, factor, shift)
    return w


def _leaky(program: _Program, number: int, layer: Any, z: _Z) -> _Z:
    slope = float(layer.parameters["slope"])
    if slope <= 1:
        return _two_slopes(program, f"h{number}_", z, slope)
    # min(z, slope * z) = -max(w, w / slope) for w = -slope * z
    w = _moved(program, f"w{number}_", z, -slope, 0.0)
    return _moved(program, f"h{number}_", _two_slopes(program, f"m{number}_", w, 1 / slope), -1.0, 0.0)


def _clip(program: _Program, number: int, layer: Any, z: _Z) -> _Z:
    """``low + relu(z - low)``, and from above ``high - relu(high - that)``."""
    for end, sign in (("low", 1.0), ("high", -1.0)):
        bound = float(layer.parameters[end])
        if np.isfinite(bound):
            w = _moved(program, f"{end}{number}_", z, sign, -sign * bound)
            h = _two_slopes(program, f"r{end}{number}_", w, 0.0)
            z = _moved(program, f"h{end}{number}_", h, sign, bound)
    return z


def _max(program: _Program, number: int, layer: Any, z: _Z) -> _Z:
    """``h >= z_j``, and ``h <= z_j + (high - low_j) (1 - a_j)`` for the one j whose a_j is 1."""
    numbers, low, high = (layer.grouped(v) for v in z)
    most = high.max(-1)
    largest = _Z(program.variables(f"h{number}_", low.max(-1), most), low.max(-1), most)
    h = largest.numbers
    a = program.variables(f"a{number}_", np.zeros(numbers.size), np.ones(numbers.size), binary=True)
    a = a.reshape(numbers.shape)
    for j in range(numbers.shape[1]):
        gap = most - low[:, j]
        program.at_least((h, 1), (numbers[:, j], -1), bound=0)
        program.at_least((h, -1), (numbers[:, j], 1), (a[:, j], -gap), bound=-gap)
    program.at_least(*((a[:, j], 1) for j in range(numbers.shape[1])), bound=1)
    return largest


_PIECES: dict[str, Callable[[_Program, int, Any, _Z], _Z]] = {
    "relu": lambda program, number, layer, z: _two_slopes(program, f"h{number}_", z, 0.0),
    "leaky_relu": _leaky,
    "abs": lambda program, number, layer, z: _two_slopes(program, f"h{number}_", z, -1.0),
    "clip": _clip,
    "max": _max,
}

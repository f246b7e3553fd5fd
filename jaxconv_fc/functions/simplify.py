"""Activations recognised in layers that are written with simpler ones.

``where(z > 0, z, slope * z)`` is a leaky relu, and ``z * sigmoid(z)`` a silu. What a function computes is
known here by its matrices: two values are multiples of each other if their rows are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxconv_fc.functions.network import AffineLayer

_CUBIC, _TANH = 0.044715, math.sqrt(2 / math.pi)  # gelu is about z / 2 (1 + tanh(_TANH (z + _CUBIC z^3)))


def simplest(layer: AffineLayer, before: Callable[[int], AffineLayer]) -> AffineLayer:
    """The same layer, with an activation of one number if it can be written so. ``before(n)`` is layer n."""
    if layer.activation not in ("where", "max", "mul"):
        return layer
    count = len(layer.offset) // max(1, math.prod(layer.shape))
    parts = [_every(layer, i, count) for i in range(count)]
    if layer.activation == "where":
        return _of_where(*parts) or layer
    if layer.activation == "max":
        ratio = _ratio(parts[1], parts[0]) if count == 2 else None
        return layer if ratio is None or ratio > 1 else _leaky(parts[0], ratio)
    if _ratio(parts[1], parts[0]) == 1:
        return parts[0]._replace(activation="square", parameters={})
    return _gate(parts[0], parts[1], before) or _gate(parts[1], parts[0], before) or layer


def _every(layer: AffineLayer, first: int, step: int) -> AffineLayer:
    """The layer of every ``step``-th entry of z: one of the numbers that each activation takes. Inputs that
    it does not depend on are left out."""
    terms = [(n, m[first::step]) for n, m in zip(layer.inputs, layer.matrices, strict=True)]
    terms = [(n, m) for n, m in terms if m.nnz]
    return layer._replace(
        inputs=tuple(n for n, _ in terms),
        matrices=tuple(m for _, m in terms),
        offset=layer.offset[first::step],
    )


def _of_where(gap: AffineLayer, yes: AffineLayer, no: AffineLayer) -> AffineLayer | None:
    """A choice by the sign of ``gap`` between two multiples of it."""
    t, f = _ratio(yes, gap), _ratio(no, gap)
    if t is None or f is None:
        return None
    return _leaky(yes, f / t) if t > 0 else _leaky(no, t / f) if f < 0 else None


def _leaky(layer: AffineLayer, slope: float) -> AffineLayer:
    name, parameters = {0.0: ("relu", {}), -1.0: ("abs", {})}.get(slope, ("leaky_relu", {"slope": slope}))
    return layer._replace(activation=name, parameters=parameters)


def _gate(z: AffineLayer, gate: AffineLayer, before: Callable[[int], AffineLayer]) -> AffineLayer | None:
    """``z * gate(z)``, which is a silu or a gelu."""
    inner = _multiple_of_one(gate)
    if inner is None:
        return None
    source = before(inner.number)
    if source.activation == "sigmoid":
        is_silu = (inner.factor, inner.offset) == (1, 0) and _ratio(source, z) == 1
        return z._replace(activation="silu", parameters={}) if is_silu else None
    for scale in (1, 2):  # half of it may be in either factor: x = scale * z
        if _is_gelu(z, source, inner, scale, before):
            scaled = z._replace(matrices=tuple(scale * m for m in z.matrices), offset=scale * z.offset)
            return scaled._replace(activation="gelu", parameters={"approximate": source.activation == "tanh"})
    return None


def _is_gelu(
    z: AffineLayer, source: AffineLayer, inner: _Multiple, scale: int, before: Callable[[int], AffineLayer]
) -> bool:
    """Whether ``z * (factor * activation(source) + offset)`` is the gelu of ``x = scale * z``."""
    half = scale / 2
    if source.activation == "erfc":  # z erfc(-x / sqrt 2) / 2
        ratio = _ratio(source, z)
        return ratio is not None and _near(
            (inner.factor, inner.offset, ratio), (half, 0, -scale / math.sqrt(2))
        )
    if not _near((inner.factor, inner.offset), (half, half)):
        return False
    if source.activation == "erf":
        ratio = _ratio(source, z)
        return ratio is not None and _near((ratio,), (scale / math.sqrt(2),))
    cubes = [n for n in source.inputs if n >= 0 and before(n).parameters.get("exponent") == 3]
    if source.activation != "tanh" or len(cubes) != 1:
        return False
    terms = dict(zip(source.inputs, source.matrices, strict=True))
    cube, cubed = before(cubes[0]), terms.pop(cubes[0])
    rest = source._replace(inputs=tuple(terms), matrices=tuple(terms.values()))
    factor = _multiple_of_one(
        source._replace(inputs=(cubes[0],), matrices=(cubed,), offset=0 * source.offset)
    )
    ratios = _ratio(rest, z), _ratio(cube, z)
    if factor is None or None in ratios:
        return False
    got = ratios[0], factor.factor * ratios[1] ** 3  # type: ignore[operator]
    return _near(got, (scale * _TANH, scale**3 * _TANH * _CUBIC))  # type: ignore[arg-type]


def _near(got: tuple[float, ...], want: tuple[float, ...]) -> bool:
    return np.allclose(got, want, rtol=1e-6, atol=0)


class _Multiple(NamedTuple):
    """``factor * h[number] + offset``, entry by entry."""

    number: int
    factor: float
    offset: float


def _multiple_of_one(layer: AffineLayer) -> _Multiple | None:
    """A layer whose z is the result of one layer, times a number, plus a number."""
    if len(layer.inputs) != 1 or layer.inputs[0] < 0 or not len(layer.offset):
        return None
    (matrix,), rows = layer.matrices, len(layer.offset)
    diagonal = (
        matrix.shape == (rows, rows) and matrix.nnz == rows and (matrix.indices == np.arange(rows)).all()
    )
    if not diagonal or np.ptp(matrix.data) or np.ptp(layer.offset) or (np.diff(matrix.indptr) != 1).any():
        return None
    return _Multiple(layer.inputs[0], float(matrix.data[0]), float(layer.offset[0]))


def _ratio(a: AffineLayer, b: AffineLayer) -> float | None:
    """The number s with ``a.z == s * b.z`` up to rounding, if there is one. No row of b is 0."""
    if not b.matrices or not np.all(sum(abs(m).sum(1) for m in b.matrices) > 0):
        return None
    if not a.matrices and not a.offset.any():
        return 0.0
    if a.inputs != b.inputs:
        return None
    for m, n in zip(a.matrices, b.matrices, strict=True):
        if m.nnz != n.nnz or (m.indices != n.indices).any() or (m.indptr != n.indptr).any():
            return None
    ours, theirs = (np.concatenate([*(m.data for m in v.matrices), v.offset]) for v in (a, b))
    largest = np.argmax(np.abs(theirs))
    ratio = ours[largest] / theirs[largest]
    same = np.abs(ours - ratio * theirs) <= 4 * np.finfo(theirs.dtype).eps * np.abs(ours)
    return float(ratio) if same.all() else None

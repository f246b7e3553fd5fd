"""The nonlinear functions that join the affine layers of a network: their values and intervals, by name.

An activation is a function of one number, or one that takes the last axis of an array to one number
(``"max"``, ``"mul"``, ``"where"``). Everything here is NumPy and SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy  # scipy.special is loaded at its first use

Interval = tuple[np.ndarray, np.ndarray]


class Activation(NamedTuple):
    """``values(z, **parameters)``, and the ``interval(low, high, **parameters)`` of it for z in between."""

    values: Callable[..., np.ndarray]
    interval: Callable[..., Interval]
    takes_axis: bool = False  # whether it takes the last axis to one number
    rounding: int = 8  # rounding units that a value may be off by
    cancels: bool = False  # whether these are units of z too: of ``z * (1 + tanh(...))`` near -1


def _rising(values: Callable[..., np.ndarray], least: float = -np.inf) -> Activation:
    """A function that rises from ``least`` on. It is NaN below."""

    def interval(low: np.ndarray, high: np.ndarray, /, **p: Any) -> Interval:
        return values(np.maximum(low, least), **p), values(high, **p)

    return Activation(values, interval)


def _falling(values: Callable[[np.ndarray], np.ndarray]) -> Activation:
    return Activation(values, lambda low, high: (values(high), values(low)))


def _turning(values: Callable[..., np.ndarray], at: float) -> Activation:
    """A function that falls until ``at`` and rises from there."""

    def interval(low: np.ndarray, high: np.ndarray, **p: Any) -> Interval:
        ends = values(low, **p), values(high, **p)
        least = np.where((low <= at) & (at <= high), values(np.full_like(low, at), **p), np.minimum(*ends))
        return least, np.maximum(*ends)

    return Activation(values, interval)


def _waving(values: Callable[[np.ndarray], np.ndarray], top: float) -> Activation:
    """A function of period ``2 pi`` that is 1 at ``top`` and -1 half a period later."""

    def reaches(low: np.ndarray, high: np.ndarray, at: float) -> np.ndarray:
        first = np.ceil((low - at) / (2 * math.pi)) * 2 * math.pi + at
        return ~(first > high)  # an interval that is not finite holds every such number

    def interval(low: np.ndarray, high: np.ndarray) -> Interval:
        with np.errstate(invalid="ignore"):
            ends = values(low), values(high)
            least = np.where(reaches(low, high, top + math.pi), -1, np.minimum(*ends))
            return least, np.where(reaches(low, high, top), 1, np.maximum(*ends))

    return Activation(values, interval)


def _leaky_relu(z: np.ndarray, slope: float) -> np.ndarray:
    return np.where(z >= 0, z, z * z.dtype.type(slope))


def _leaky_interval(low: np.ndarray, high: np.ndarray, slope: float) -> Interval:
    ends = _leaky_relu(low, slope), _leaky_relu(high, slope)
    straddles = (low <= 0) & (high >= 0)  # with a negative slope it turns at 0
    return np.where(straddles, np.minimum(0, np.minimum(*ends)), np.minimum(*ends)), np.maximum(*ends)


def _power(z: np.ndarray, exponent: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.power(z, z.dtype.type(exponent))


def _power_interval(low: np.ndarray, high: np.ndarray, exponent: float) -> Interval:
    """Monotone on either side of 0. An exponent that is no integer is NaN below 0."""
    if exponent != int(exponent):
        low = np.maximum(low, 0)
    ends = _power(low, exponent), _power(high, exponent)
    straddles = (low < 0) & (high >= 0)
    if exponent >= 0:
        return np.where(straddles, np.minimum(0, np.minimum(*ends)), np.minimum(*ends)), np.maximum(*ends)
    least, most = np.minimum(*ends), np.maximum(*ends)
    even = exponent % 2 == 0
    return np.where(straddles, least if even else -np.inf, least), np.where(straddles, np.inf, most)


def _where(z: np.ndarray, strict: bool) -> np.ndarray:
    switch, on_true, on_false = np.moveaxis(z, -1, 0)
    return np.where(switch > 0 if strict else switch >= 0, on_true, on_false)


def _where_interval(low: np.ndarray, high: np.ndarray, strict: bool) -> Interval:
    may, must = (s[..., 0] > 0 if strict else s[..., 0] >= 0 for s in (high, low))
    least, most = np.minimum(low[..., 1], low[..., 2]), np.maximum(high[..., 1], high[..., 2])
    return (
        np.where(must, low[..., 1], np.where(may, least, low[..., 2])),
        np.where(must, high[..., 1], np.where(may, most, high[..., 2])),
    )


def _mul_interval(low: np.ndarray, high: np.ndarray) -> Interval:
    """The product of two numbers. ``0 * inf`` is 0: an infinite bound is one of finite numbers."""
    firsts, seconds = ([v[..., i] for v in (low, high)] for i in (0, 1))
    with np.errstate(invalid="ignore"):
        products = np.stack([np.where((a == 0) | (b == 0), 0, a * b) for a in firsts for b in seconds])
    return products.min(0), products.max(0)


def _gelu(z: np.ndarray, approximate: bool) -> np.ndarray:
    if approximate:
        return z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z * scipy.special.ndtr(z)


_SILU, _GELU, _GELU_TANH = -1.2784645427610738, -0.7517915246935645, -0.7524614237510407  # where they turn


def _at_zero(values: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """``z * s(z)`` is 0 at -inf, and not NaN."""

    def held(z: np.ndarray, **p: Any) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            return np.where(z == -np.inf, 0, values(z, **p)).astype(z.dtype)

    return held


def _quiet(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The function without NumPy's warnings: it is infinite and NaN where JAX's is."""

    def values(z: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return function(z)

    return values


def _gelu_interval(low: np.ndarray, high: np.ndarray, approximate: bool) -> Interval:
    turning = _turning(_at_zero(_gelu), _GELU_TANH if approximate else _GELU)
    return turning.interval(low, high, approximate=approximate)


_ACTIVATIONS: dict[str, Activation] = {
    "relu": _rising(lambda z: np.maximum(z, 0)),
    "leaky_relu": Activation(_leaky_relu, _leaky_interval),
    "clip": _rising(lambda z, low, high: np.clip(z, z.dtype.type(low), z.dtype.type(high))),
    "elu": _rising(lambda z, alpha: np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0)))),
    "abs": _turning(np.abs, 0.0),
    "square": _turning(np.square, 0.0),
    "cosh": _turning(_quiet(np.cosh), 0.0),
    "silu": _turning(_at_zero(lambda z: z * scipy.special.expit(z)), _SILU),
    "gelu": Activation(_at_zero(_gelu), _gelu_interval, cancels=True),
    "softplus": _rising(lambda z: np.logaddexp(z, 0).astype(z.dtype)),
    "sigmoid": _rising(lambda z: scipy.special.expit(z)),
    "power": Activation(_power, _power_interval),
    "sin": _waving(_quiet(np.sin), math.pi / 2),
    "cos": _waving(_quiet(np.cos), 0.0),
    "erf": _rising(lambda z: scipy.special.erf(z)),
    "erfc": _falling(lambda z: scipy.special.erfc(z)),
    **{
        name: _rising(_quiet(function))
        for name, function in {
            "tanh": np.tanh, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "cbrt": np.cbrt,
            "atan": np.arctan, "asinh": np.arcsinh, "sinh": np.sinh, "sign": np.sign, "floor": np.floor,
            "ceil": np.ceil,
        }.items()
    },
    "sqrt": _rising(_quiet(np.sqrt), 0.0),
    "log": _rising(_quiet(np.log), 0.0),
    "log1p": _rising(_quiet(np.log1p), -1.0),
    "max": Activation(lambda z: z.max(-1), lambda low, high: (low.max(-1), high.max(-1)), takes_axis=True),
    "mul": Activation(lambda z: z.prod(-1), _mul_interval, takes_axis=True),
    "where": Activation(_where, _where_interval, takes_axis=True),
}  # fmt: skip
_EXACT = ("relu", "abs", "max", "clip", "where", "sign", "floor", "ceil")
ACTIVATIONS: Mapping[str, Activation] = {
    name: activation._replace(rounding=0) if name in _EXACT else activation
    for name, activation in _ACTIVATIONS.items()
}

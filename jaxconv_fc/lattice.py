"""Integer points on a plane ``o*s + p*r == t*l + lo`` within a box: their number, and smaller steps.

All arithmetic is of Python ints, exact for numbers of any size; points are also counted for arrays of bounds.
A point or vector is a triple ``(o, p, t)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

Triple = tuple[int, int, int]


def solve_congruence(a: int, b: int, modulus: int) -> int | None:
    """The smallest ``x >= 0`` with ``a*x == b`` modulo ``modulus``, if there is one."""
    g = math.gcd(a, modulus)
    if b % g:
        return None
    reduced = modulus // g
    return b // g * pow(a // g, -1, reduced) % reduced


def floor_sum(count: Any, a: int, b: Any, divisor: int) -> Any:
    """``sum of (a*x + b) // divisor`` over ``0 <= x < count``, for ``a, b >= 0``. Arrays give arrays.

    The points below a line are counted as in Euclid's algorithm: take out whole multiples, exchange
    the two axes, repeat.
    """
    total = 0
    while np.any(count > 0):
        total = total + a // divisor * (count * (count - 1) // 2) + b // divisor * count
        top = a % divisor * count + b % divisor
        count, b = top // divisor, top % divisor
        a, divisor = divisor, a % divisor
    return total


def count_below(bound: Any, s: int, outputs: Any, r: int, taps: int) -> Any:
    """How many pairs ``0 <= q < outputs``, ``0 <= p < taps`` have ``q*s + p*r < bound``."""
    some = least(outputs, -least(0, -bound // s))  # outputs for which some tap is below
    every = least(some, -least(0, ((taps - 1) * r - bound) // s))  # outputs for which all taps are
    # The outputs between have ceil((bound - q*s) / r) such taps each. The sum begins with the last of them.
    last = bound - (some - 1) * s
    return taps * every + floor_sum(some - every, s, last + r - 1, r)


def least(a: Any, b: Any) -> Any:
    """The smaller one, in arithmetic that ints, arrays and tracers share."""
    return (a + b - abs(a - b)) // 2


def small_steps(sizes: Triple, steps: Triple, points: Iterable[Triple]) -> tuple[Triple, Triple | None]:
    """``((s, r, l), point)``: small steps that relate the same points of the box, and one of these points.

    ``sizes`` are those of the box. ``points`` are related points whose differences span those of all related
    points. Where there are none, ``point`` is None: any steps will do, with a shift that relates nothing.

    Two points are on one plane if and only if their difference d has ``s*d_o + r*d_p == l*d_t``. So the small
    steps must have this for the same differences within the box as the given steps. These span a space of
    dimension

    - 2: the steps are its normal, unique up to a factor;
    - 1: they are multiples of one vector v. The steps are orthogonal to v, and differ so much in size that
      no other difference within the box is orthogonal to them;
    - 0: the steps are the place values of a number with one digit per axis.
    """
    m, k, _ = sizes
    first: Triple | None = None
    v: Triple | None = None
    for point in points:
        if first is None:
            first = point
            continue
        d = _minus(point, first)
        if v is None:
            v = d
        elif any(_cross(v, d)):
            return _primitive(steps), first
    if v is None:
        return (k, 1, m * k), first
    return _primitive(_orthogonal(sizes, _primitive(v))), first


def _orthogonal(sizes: Triple, v: Triple) -> Triple:
    """Steps with ``s*x + r*y == l*z`` for multiples of ``v = (x, y, z)``, and for no others in the box."""
    m, k, n = sizes
    x, y, z = v if v[2] >= 0 else _minus((0, 0, 0), v)
    if y == 0:  # s*x == l*z. Both are multiples of k, which p*1 cannot make up for: p is fixed.
        return k * abs(z), 1, k * abs(x)
    if x == 0:
        return 1, m * abs(z), m * abs(y)
    if z == 0:
        return n * abs(y), n * abs(x), 1
    # z*(g*o + p) == (g*x + y)*t splits into z*o == x*t and z*p == y*t if g exceeds every abs(z*p - y*t).
    if x > 0:
        g = z * k + abs(y) * (n + 1)
        return z * g, z, g * x + y
    g = z * m + abs(x) * (n + 1)
    return z, z * g, g * y + x


def _minus(a: Triple, b: Triple) -> Triple:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _cross(a: Triple, b: Triple) -> Triple:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _primitive(v: Triple) -> Triple:
    g = math.gcd(*v)
    return v[0] // g, v[1] // g, v[2] // g

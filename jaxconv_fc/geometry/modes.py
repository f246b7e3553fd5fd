"""What an axis is padded with: one entry of :data:`MODES` for each boundary mode.

Positions ``i`` count from the first of ``n`` inputs. Those below 0 and from ``n`` on are padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

# Integers of any kind: int, numpy.ndarray, jax.Array or a tracer.
Ints = Any


class BoundaryMode(NamedTuple):
    """What an axis of ``n`` inputs is padded with."""

    source: Callable[[Ints, int], Ints]  # (i, n) -> the input that position i is a copy of
    period: Callable[[int], int]  # of n: at this distance the copies repeat; 0 if they never do
    numpy_name: Any  # what numpy.pad takes as this mode: its name, or a function
    aliases: tuple[str, ...] = ()  # other names that conv_spec takes


def _itself(i: Ints, n: int) -> Ints:
    """Zeros are copies of no input: an output that reads one reads no input there."""
    return i


def _circular(i: Ints, n: int) -> Ints:
    return i % n


def _reflect(i: Ints, n: int) -> Ints:
    within = i % max(1, 2 * n - 2)
    return _least(within, 2 * n - 2 - within)


def _symmetric(i: Ints, n: int) -> Ints:
    within = i % (2 * n)
    return _least(within, 2 * n - 1 - within)


def _edge(i: Ints, n: int) -> Ints:
    return _least((i + abs(i)) // 2, n - 1)  # max(i, 0), then min


def _least(a: Ints, b: Ints) -> Ints:
    """The smaller one, in arithmetic that ints, arrays and tracers share."""
    return (a + b - abs(a - b)) // 2


# The plainest first: of modes that pad alike, detect_conv takes the first.
MODES = {
    "zeros": BoundaryMode(_itself, lambda n: 0, "constant", ("constant",)),
    "circular": BoundaryMode(_circular, lambda n: n, "wrap", ("wrap",)),
    "reflect": BoundaryMode(_reflect, lambda n: max(1, 2 * n - 2), "reflect"),
    "edge": BoundaryMode(_edge, lambda n: 0, "edge", ("replicate",)),
    "symmetric": BoundaryMode(_symmetric, lambda n: 2 * n, "symmetric"),
}

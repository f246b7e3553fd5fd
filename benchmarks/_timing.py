"""Timing several ways to do one job, side by side in one process, on a machine that is not quiet."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

PAUSE = 0.1  # seconds before each contestant


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each contestant, one entry for each round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over the rounds of time(name) / time(to).

        Both times of a round were taken next to each other, so whatever slows the machine down for longer
        than that slows both, and leaves their ratio alone.
        """
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleaved(
    contestants: dict[str, Callable[[], Any]], rounds: int, least_seconds: float = 0.02
) -> Timings:
    """Call every contestant once a round, in an order that moves on by one each round.

    A call that takes less than `least_seconds` is repeated until the clock has that much to measure.
    Results are waited for, and dropped before the next call, so that nothing is timed with another's
    memory still held; and each contestant finds the cores idle: the threads of a BLAS or of XLA keep
    spinning for a while after their last call.
    """
    repeats = {}
    for name, contestant in contestants.items():
        _seconds(contestant, 1)  # compiles
        repeats[name] = max(1, math.ceil(least_seconds / max(_seconds(contestant, 1), 1e-6)))
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            seconds[name].append(_seconds(contestants[name], repeats[name]))
    return Timings(seconds)


def _seconds(contestant: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(contestant())
    return (time.perf_counter() - start) / repeats


def environment() -> str:
    """One line to print above the figures."""
    device = jax.devices()[0]
    return f"jax {jax.__version__}, {device.platform} ({device.device_kind})"

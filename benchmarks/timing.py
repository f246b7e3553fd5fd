"""Timing several ways to do one job, side by side in one process, on a machine that is not quiet."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

PAUSE = 0.06  # seconds before each contestant: the threads of a BLAS or of XLA spin on after their last call
LEAST = 0.02  # seconds that the clock has to measure: shorter calls are repeated
SLOW = 0.3  # a contestant that takes so many seconds runs in the first rounds only
FEW = 3

Seconds = dict[str, list[float]]  # of each contestant, per call, one entry for each round


def interleaved(contestants: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Call every contestant once a round, in an order that moves on by one each round.

    Results are waited for, and dropped before the next call, so that nothing is timed with another's memory
    still held.
    """
    repeats, turns = {}, {}
    for name, contestant in contestants.items():
        once = _seconds(contestant, 1)  # compiles
        if once < SLOW:  # the next few calls can still take ten times as long as all later ones
            once = min(_seconds(contestant, 1) for _ in range(5))
        repeats[name] = max(1, math.ceil(LEAST / max(once, 1e-6)))
        turns[name] = rounds if once < SLOW else min(rounds, FEW)
    names = list(contestants)
    seconds: Seconds = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            if i < turns[name]:
                time.sleep(PAUSE if jax.default_backend() == "cpu" else 0)
                seconds[name].append(_seconds(contestants[name], repeats[name]))
    return seconds


def ratio(seconds: Seconds, name: str, to: str) -> float:
    """Median over the rounds of time(name) / time(to).

    Both times of a round were taken next to each other, so whatever slows the machine down for longer than
    that slows both, and leaves their ratio alone.
    """
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=False))


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _seconds(contestant: Callable[[], Any], repeats: int) -> float:
    # A GPU runs calls one after the other, and the host runs ahead of it: only the last is waited for.
    ahead = jax.default_backend() != "cpu"
    start = time.perf_counter()
    for _ in range(repeats):
        result = contestant()
        if not ahead:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats

"""What a table is: rows, each a job that several contestants do."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from benchmarks.timing import interleaved, ratio

Call = Callable[[], Any]
Maker = Callable[[], Call]  # prepares a contestant: that is not timed


class Cannot(Exception):
    """A contestant cannot do the job of a row; the message says why, and stands in the table."""


@dataclass(frozen=True)
class Row:
    name: str
    ours: Maker
    peers: dict[str, Maker]
    limit: Maker | None = None  # what the machine needs at least: it does not do the job
    size: str = ""
    value: Callable[[Any], np.ndarray] = np.asarray  # of a result, to compare the contestants


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    limit: str  # what the limit of its rows is; "" if they have none
    rows: Callable[[bool], Iterable[Row]]  # given whether the arrays are to be small
    note: str = ""
    times: int = 1  # as many rounds as that of those of a run: calls of microseconds need more


@dataclass
class Measured:
    """One row of a table, as it is written to JSON."""

    name: str
    size: str
    seconds: dict[str, list[float]] = field(default_factory=dict)  # "ours", "limit" and the peers
    ratios: dict[str, float] = field(default_factory=dict)  # limit: ours over it; peers: theirs over ours
    cannot: dict[str, str] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)  # seconds that a peer took before the first call
    about: dict[str, str] = field(default_factory=dict)  # what a contestant says of its call


def measure(row: Row, rounds: int, compare: bool) -> Measured:
    """Times of all contestants of a row."""
    found = Measured(row.name, row.size)
    calls = {"ours": row.ours()}
    if row.limit:
        calls["limit"] = row.limit()
    for name, maker in row.peers.items():
        _prepare(name, maker, calls, found, compare)
    if compare:
        _compare(row, {name: call for name, call in calls.items() if name != "limit"})
    found.about = {name: call.about for name, call in calls.items() if hasattr(call, "about")}
    found.seconds = interleaved(calls, rounds)
    for name in calls:
        if name == "limit":
            found.ratios[name] = ratio(found.seconds, "ours", to="limit")
        elif name != "ours":
            found.ratios[name] = ratio(found.seconds, name, to="ours")
    return found


def _prepare(name: str, maker: Maker, calls: dict[str, Call], found: Measured, strict: bool) -> None:
    """The call of a peer, if it is installed and knows the geometry; one that fails is named, or raises."""
    start = time.perf_counter()
    try:
        call = maker()
        prepared = time.perf_counter() - start
        jax.block_until_ready(call())
    except (Cannot, ImportError) as reason:
        found.cannot[name] = str(reason)
    except Exception as error:
        if strict:
            raise
        found.cannot[name] = f"fails: {str(error).splitlines()[0][:80]}"
    else:
        calls[name] = call
        if prepared > 1:
            found.prepared[name] = prepared


def _compare(row: Row, calls: dict[str, Call]) -> None:
    want = row.value(calls["ours"]())
    for name, call in calls.items():
        if name.endswith("(estimate)"):
            continue
        got = row.value(call())
        scale = float(np.max(np.abs(want.astype(np.float64)), initial=1e-30))
        error = float(np.max(np.abs(got.astype(np.float64) - want.astype(np.float64)), initial=0)) / scale
        if got.shape != want.shape or not error < 2e-2:  # of bfloat16
            raise AssertionError(f"{row.name}: {name} has another result, off by {error:.1e}")


def jitted(fn: Callable[..., Any], *arguments: Any) -> Call:
    """A call of a compiled function on these arguments."""
    compiled = jax.jit(fn)
    return lambda: compiled(*arguments)


def text(nbytes: float) -> str:
    """A size as people write it."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"

"""Time over the number of entries, from 10^3 to 10^8."""

import statistics
from functools import partial

import numpy as np

import jaxconv_fc as fc
from benchmarks.dense import full as full_matrix
from benchmarks.layers import kernel_of
from benchmarks.rows import Row, Table, jitted
from benchmarks.sparse import full as full_arrays

HOST = ("as_scipy",)


def _spec(n):
    return fc.conv_spec((1, 16, n, n), (16, 16, 3, 3), (1, 1), "SAME")


def _rows(verb, quick):
    builder = getattr(fc, verb)
    sizes = (1, 2) if quick else (1, 2, 4, 6, 12, 20, 34) if verb == "as_matrix" else (1, 2, 6, 20, 64, 200)
    for n in sizes:
        spec = _spec(n)
        kernel = kernel_of(spec)
        if verb in HOST:
            ours = partial(_call, builder, spec, np.asarray(kernel))
        else:
            ours = partial(jitted, partial(builder, spec), kernel)
        limit = full_matrix(spec, "float32") if verb == "as_matrix" else full_arrays(spec)
        entries = spec.out_size * spec.in_size if verb == "as_matrix" else spec.nse
        yield Row(f"{entries:,}", ours, {}, limit, value=lambda result: np.zeros(1))


def _call(builder, *arguments):
    return lambda: builder(*arguments)


def slope(rows, least=1e4):
    """Of log(seconds) over log(entries), by least squares, from `least` on; None without two points."""
    points = [(int(r["name"].replace(",", "")), statistics.median(r["seconds"]["ours"])) for r in rows]
    points = np.array([point for point in points if point[0] >= least])
    return float(np.polyfit(*np.log(points).T, deg=1)[0]) if len(points) > 1 else None


TABLES = tuple(
    Table(
        f"growth_{verb}",
        f"Growth of `{verb}`: 16 channels, 3x3, float32",
        "`jnp.full` of the result",
        partial(_rows, verb),
    )
    for verb in ("as_matrix", "as_bcsr", "as_scipy")
)

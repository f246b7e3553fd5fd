"""The stored entries of some rows of M, as arrays on the host."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxconv_fc.layout import column_of, in_channel, split_row, tap_of
from jaxconv_fc.layout import taps as kernel_taps
from jaxconv_fc.spec import ConvSpec

_BLOCK = 2**18  # entries that are listed together


def stored_entries(spec: ConvSpec, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``(i, column, tap)``, in blocks of rows: ``M[rows[i], column]`` receives ``kernel.ravel()[tap]``."""
    dims = (spec.group_channels, *kernel_taps(spec))
    step = max(1, _BLOCK // max(1, int(np.prod(dims))))
    channel, *taps = np.ogrid[tuple(slice(n) for n in dims)]  # [i, p...]
    for first in range(0, len(rows), step):
        positions, d = split_row(spec, rows[first : first + step])
        n = len(d)
        d = d.reshape(n, *(1 for _ in dims))  # [n, 1, 1...]
        reads = [
            axis.table(o)[:, p.ravel()].reshape(n, *p.shape)
            for axis, o, p in zip(spec.axes, positions, taps, strict=True)
        ]
        found = np.ones((n, *dims), bool)
        for t in reads:
            found &= t >= 0
        places = np.arange(first, first + n).reshape(d.shape)
        columns, tap = column_of(spec, reads, in_channel(spec, d, channel)), tap_of(spec, taps, channel, d)
        yield tuple(np.broadcast_to(v, found.shape)[found] for v in (places, columns, tap))  # type: ignore

"""Kinds of lines and of pairs of lines of one axis, held against the whole relation."""

import numpy as np
import oracle
from geometries import MODES, integers, random_axis

from jaxconv_fc.spectrum import kinds


def test_norms_of_random_geometries_read_samples_only(run_seed):
    """Both Gram matrices, one axis at a time, from the kinds of pairs: as from the whole relation."""
    rng = np.random.default_rng(run_seed)
    for _ in range(60):
        axis = random_axis(rng, MODES[int(rng.integers(len(MODES)))])
        values = integers(rng, (axis.taps,), np.int64)
        matrix = np.zeros((axis.out_size, axis.size), np.int64)
        for o, t, p in oracle.related(axis):
            matrix[o, t] += values[p]
        products = np.outer(values, values).ravel()
        for rows, gram in ((True, matrix @ matrix.T), (False, matrix.T @ matrix)):
            pairs = kinds.pair_kinds(axis, rows)
            held = np.zeros(len(pairs.count), np.int64)
            np.add.at(held, pairs.owner, products[pairs.listed])
            # ||G - 1||**2, its ones on the diagonal being those of the marked kinds
            want = ((gram - np.eye(len(gram), dtype=int)) ** 2).sum()
            assert (pairs.count * (held - pairs.diagonal) ** 2).sum() == want, (axis, rows)

"""Norms, trace and distance from orthogonality, against NumPy on the oracle's matrix."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from spectra import drawn, every_number

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum


@every_number
def test_norms(run_seed, number):
    spec, kernel, _, matrix, name = drawn(run_seed, number)
    sizes, scale = np.abs(matrix), np.linalg.norm(matrix)
    short = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.conj().T if short else matrix.conj().T @ matrix
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 * scale, err_msg=name)
    close(spectrum.frobenius_norm(spec, kernel), scale)
    close(spectrum.one_norm(spec, kernel), sizes.sum(0).max(initial=0))
    close(spectrum.inf_norm(spec, kernel), sizes.sum(1).max(initial=0))
    close(spectrum.row_norms(spec, kernel), np.linalg.norm(matrix, axis=1))
    close(spectrum.column_norms(spec, kernel), np.linalg.norm(matrix, axis=0))
    close(spectrum.row_norms(spec, kernel, ord=1), sizes.sum(1))
    close(spectrum.column_norms(spec, kernel, ord=1), sizes.sum(0))
    close(spectrum.trace(spec, kernel), np.trace(matrix))
    close(spectrum.orthogonality_residual(spec, kernel), np.linalg.norm(gram - np.eye(len(gram))))
    whole = np.trunc(kernel.real * 4).astype(np.int64)
    matrix = np.asarray(fc.as_matrix(spec, whole))  # integers stay integers, and exact
    assert spectrum.one_norm(spec, whole) == np.abs(matrix).sum(0).max(initial=0), name
    assert spectrum.inf_norm(spec, whole) == np.abs(matrix).sum(1).max(initial=0), name
    assert spectrum.trace(spec, whole) == np.trace(matrix), name


def test_rows_of_zeros_are_counted_where_the_unit_matrix_has_ones():
    """The first output reads padding only: its row is 0, and the residual of the others 0."""
    spec = fc.conv_spec((1, 1, 6), (1, 1, 1), (2,), [(1, 0)])
    assert spec.shape == (4, 6)
    assert spectrum.orthogonality_residual(spec, jnp.ones((1, 1, 1))) == 1


def test_the_trace_of_groups_that_the_diagonal_leaves():
    """Two outputs per input channel: entry (3, 3) belongs to no group, and is 0."""
    spec = fc.conv_spec((1, 2, 3), (4, 1, 1), (1,), "VALID", feature_group_count=2)
    kernel = jnp.arange(1, 5).reshape(4, 1, 1)
    assert spectrum.trace(spec, kernel) == np.trace(fc.as_matrix(spec, kernel)) == 3


def test_norms_of_half_precision_are_those_of_single():
    """Summed in float16, squares of 200 would be infinite."""
    spec = fc.conv_spec((1, 1, 9), (1, 1, 2), (1,), "VALID")
    kernel = jnp.full((1, 1, 2), 200, jnp.float16)
    for got, want in (
        (spectrum.frobenius_norm(spec, kernel), 800),
        (spectrum.row_norms(spec, kernel), 200 * 2**0.5),
        (spectrum.column_norms(spec, kernel)[0], 200),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-6)

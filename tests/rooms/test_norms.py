"""Norms, trace and distance from orthogonality, against NumPy on the oracle's matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import MODES, random_axis
from spectra import drawn, every_number

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.lines import input_lines, output_lines
from jaxconv_fc.spectrum import kinds


def norms(spec, kernel):
    return {
        "frobenius": spectrum.frobenius_norm(spec, kernel),
        "one": spectrum.one_norm(spec, kernel),
        "inf": spectrum.inf_norm(spec, kernel),
        "rows": spectrum.row_norms(spec, kernel),
        "columns": spectrum.column_norms(spec, kernel),
        "rows 1": spectrum.row_norms(spec, kernel, ord=1),
        "columns 1": spectrum.column_norms(spec, kernel, ord=1),
        "trace": spectrum.trace(spec, kernel),
        "residual": spectrum.orthogonality_residual(spec, kernel),
    }


def of_integers(spec, kernel):
    made = spectrum.one_norm(spec, kernel), spectrum.inf_norm(spec, kernel), spectrum.trace(spec, kernel)
    return fc.as_matrix(spec, kernel), made


@every_number
def test_norms(run_seed, number):
    """Of complex kernels: a conjugate that is forgotten shows. Integers are real."""
    spec, kernel, _, _, name = drawn(run_seed, number)
    kernel = kernel + 1j * kernel[::-1]
    matrix = oracle.matrix(kernel, spec)
    sizes, scale = np.abs(matrix), np.linalg.norm(matrix)
    short = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.conj().T if short else matrix.conj().T @ matrix
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9 * scale)
    whole = np.trunc(kernel.real * 4).astype(np.int32)
    got, (matrix_of_whole, exact) = jax.jit(lambda k, w: (norms(spec, k), of_integers(spec, w)))(
        kernel, whole
    )
    want = {
        "frobenius": scale,
        "one": sizes.sum(0).max(initial=0),
        "inf": sizes.sum(1).max(initial=0),
        "rows": np.linalg.norm(matrix, axis=1),
        "columns": np.linalg.norm(matrix, axis=0),
        "rows 1": sizes.sum(1),
        "columns 1": sizes.sum(0),
        "trace": np.trace(matrix),
        "residual": np.linalg.norm(gram - np.eye(len(gram))),
    }
    for norm in want:
        close(got[norm], want[norm], err_msg=f"{norm}, {name}")
    matrix = np.asarray(matrix_of_whole)  # integers stay integers, and exact
    sizes = np.abs(matrix)
    wanted = sizes.sum(0).max(initial=0), sizes.sum(1).max(initial=0), np.trace(matrix)
    np.testing.assert_array_equal(exact, wanted, err_msg=name)


def test_rows_of_zeros_are_counted_where_the_unit_matrix_has_ones():
    """The first output reads padding only: its row is 0, and the residual of the others 0."""
    spec = fc.conv_spec((1, 1, 6), (1, 1, 1), (2,), [(1, 0)])
    assert spec.shape == (4, 6)
    assert spectrum.orthogonality_residual(spec, jnp.ones((1, 1, 1))) == 1


def test_the_trace_of_groups_that_the_diagonal_leaves():
    """Two outputs per input channel: entry (3, 3) belongs to no group, and is 0."""
    spec = fc.conv_spec((1, 2, 3), (4, 1, 1), (1,), "VALID", feature_group_count=2)
    kernel = jnp.arange(1, 5, dtype=jnp.int32).reshape(4, 1, 1)
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


def test_sums_over_ranges_of_taps_as_over_the_whole_relation(run_seed, monkeypatch):
    """Long kernels: a line holds a few ranges of taps, and Inf plays no part outside of them."""
    monkeypatch.setattr(kinds, "_SMALL", 0)
    rng = np.random.default_rng(run_seed)
    drawn = [random_axis(rng, MODES[int(rng.integers(len(MODES)))]) for _ in range(12)]
    # The first two have ranges with steps, of rows and of columns.
    axes = [Axis(5, 9, lo=4, hi=4, lhs_dilation=3), Axis(14, 9, stride=3, lo=4), *drawn]
    for axis in [axis for axis in axes if not axis.collides][:6]:
        values = rng.uniform(1, 2, axis.taps) * 10.0 ** rng.integers(-200, 200, axis.taps)
        values[rng.integers(axis.taps)] = np.inf
        matrix = np.zeros((axis.out_size, axis.size))
        for o, t, p in oracle.related(axis):
            matrix[o, t] += values[p]
        for rows, lines in ((True, output_lines(axis)), (False, input_lines(axis))):
            held = kinds.line_kinds.__wrapped__(axis, rows).lines
            sums = np.append(jax.jit(lambda v, held=held: held.sums(v, 0))(values), 0)
            got = sums[lines.sample_of(np.arange(lines.size))]
            np.testing.assert_allclose(got, matrix.sum(int(rows)), rtol=1e-14, err_msg=f"{axis}")


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_kernels_as_long_as_the_image(mode):
    """Integers, by a sum over positions; 10**6 taps died with a MemoryError of 7 TB."""
    n = 3000
    spec = fc.conv_spec((1, 1, n), (1, 1, n), (1,), "SAME", padding_mode=mode)
    kernel = np.random.default_rng(0).integers(-99, 100, n).astype(np.int32)
    first = -spec.padding[0][0] + np.arange(n)  # output o reads o - lo + p through tap p
    reads = first[:, None] + np.arange(n)
    whole = np.ones(reads.shape, bool) if mode == "circular" else (reads >= 0) & (reads < n)
    sizes = np.where(whole, np.abs(kernel), 0)
    np.testing.assert_array_equal(spectrum.row_norms(spec, kernel[None, None], ord=1), sizes.sum(1))
    columns = np.bincount(reads[whole] % n, sizes[whole], minlength=n)
    np.testing.assert_array_equal(spectrum.column_norms(spec, kernel[None, None], ord=1), columns)
    assert int(spectrum.trace(spec, kernel[None, None])) == n * int(kernel[spec.padding[0][0]])


def test_what_is_not_linear_is_refused_before_it_is_made():
    spec = fc.conv_spec((1, 1, 10**6), (1, 1, 10**6), (1,), "SAME", padding_mode="reflect")
    kernel = np.ones(spec.rhs_shape, np.float32)
    for function in (spectrum.one_norm, spectrum.frobenius_norm, spectrum.trace, fc.show.spy):
        with pytest.raises(ValueError, match="memory_limit"):
            function(spec, kernel) if function is not fc.show.spy else function(spec)

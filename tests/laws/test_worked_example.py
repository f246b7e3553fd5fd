"""The worked example that started the project, entry by entry, and the formula that is often quoted."""

import itertools

import jax
import numpy as np
import pytest

import jaxconv_fc as fc

SPEC_ARGUMENTS = ((1, 1, 3, 3), (2, 1, 2, 2), (1, 1), "VALID")
PRINTED = """\
[a b 0|c d 0|0 0 0]
[0 a b|0 c d|0 0 0]
[0 0 0|a b 0|c d 0]
[0 0 0|0 a b|0 c d]
[e f 0|g h 0|0 0 0]
[0 e f|0 g h|0 0 0]
[0 0 0|e f 0|g h 0]
[0 0 0|0 e f|0 g h]"""
SHARPEN = np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]], np.int32)
X = np.arange(1, 10, dtype=np.int32).reshape(1, 3, 3)


def read(text, values):
    """The matrix a printed picture stands for, letters replaced by `values`."""
    rows = [line.strip("[]").replace("|", " ").split() for line in text.splitlines()]
    return np.array([[values.get(token, 0) for token in row] for row in rows])


@pytest.fixture
def spec():
    return fc.conv_spec(*SPEC_ARGUMENTS)


@pytest.fixture
def kernel():
    return np.array([3, -1, 4, 1, -5, 9, 2, 6], np.int32).reshape(2, 1, 2, 2)


def test_printed_by_name(spec):
    assert fc.format_matrix(spec) == PRINTED


def test_the_matrix_is_the_printed_one(spec, kernel):
    values = dict(zip("abcdefgh", kernel.ravel().tolist(), strict=True))
    np.testing.assert_array_equal(fc.as_matrix(spec, kernel), read(PRINTED, values))


def test_sizes(spec):
    assert (spec.shape, spec.in_shape, spec.out_shape, spec.nse) == ((8, 9), (1, 3, 3), (2, 2, 2), 32)


def test_matrix_times_vector_is_the_convolution(spec, kernel):
    matrix = np.asarray(fc.as_matrix(spec, kernel))
    y = (matrix @ X.ravel()).reshape(spec.out_shape)
    a, b, c, d, *_ = kernel.ravel().tolist()
    assert y.shape == (2, 2, 2)
    assert y[0, 0, 0] == 1 * a + 2 * b + 4 * c + 5 * d  # one neuron: one row of M
    np.testing.assert_array_equal(y, fc.apply(spec, kernel, X))
    np.testing.assert_array_equal(
        y, jax.lax.conv_general_dilated(X[None].astype(float), kernel.astype(float), (1, 1), "VALID")[0]
    )


def formula(kernel, sign):
    """M[(u,v,w),(i,j,k)] = K[u, i, sign*(j-v), sign*(k-w)] where both lie in the kernel."""
    matrix = np.zeros((2, 2, 2, 1, 3, 3), kernel.dtype)
    for u, v, w, i, j, k in itertools.product(*map(range, matrix.shape)):
        p, q = sign * (j - v), sign * (k - w)
        if 0 <= p < kernel.shape[2] and 0 <= q < kernel.shape[3]:
            matrix[u, v, w, i, j, k] = kernel[u, i, p, q]
    return matrix.reshape(8, 9)


def test_the_formula_with_its_signs_right(spec, kernel):
    np.testing.assert_array_equal(fc.as_matrix(spec, kernel), formula(kernel, +1))


def test_the_often_quoted_formula_is_reversed(spec, kernel):
    """K[s, i, v-j, w-k], coded as written, is another matrix, and does not convolve."""
    wrong = formula(kernel, -1)
    assert (wrong != np.asarray(fc.as_matrix(spec, kernel))).any()
    assert (wrong @ X.ravel() != np.asarray(fc.apply(spec, kernel, X)).ravel()).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_three_identical_sharpen_kernels(channels):
    """The three output channels repeat the same rows; one block of columns per input channel."""
    size = 4
    kernel = np.broadcast_to(SHARPEN, (3, channels, 3, 3))
    spec = fc.conv_spec((1, channels, size, size), kernel.shape, (1, 1), "VALID")
    first = [0, -1, 0, 0, -1, 5, -1, 0, 0, -1, 0, 0, 0, 0, 0, 0]
    second = [0, *first[:-1]]  # the neighbour of a neuron sees the same, one pixel on
    matrix = np.asarray(fc.as_matrix(spec, kernel))
    np.testing.assert_array_equal(matrix[0], first * channels)
    np.testing.assert_array_equal(matrix[1], second * channels)
    np.testing.assert_array_equal(matrix[:4], matrix[4:8])
    np.testing.assert_array_equal(matrix[:4], matrix[8:])


def test_sharpen_rows_as_text():
    spec = fc.conv_spec((1, 1, 4, 4), (3, 1, 3, 3), (1, 1), "VALID")
    lines = fc.format_matrix(spec, np.broadcast_to(SHARPEN, (3, 1, 3, 3))).splitlines()
    assert lines[:2] == [
        "[ 0 -1  0  0|-1  5 -1  0| 0 -1  0  0| 0  0  0  0]",
        "[ 0  0 -1  0| 0 -1  5 -1| 0  0 -1  0| 0  0  0  0]",
    ]
    assert lines[:4] == lines[4:8] == lines[8:]


def test_rgb_has_three_column_blocks():
    spec = fc.conv_spec((1, 3, 2, 2), (1, 3, 2, 2), (1, 1), "VALID")
    assert fc.format_matrix(spec) == "[a b|c d||e f|g h||i j|k l]"
    spec = fc.conv_spec((1, 3, 2, 3), (1, 3, 1, 2), (1, 1), "VALID")
    assert fc.format_matrix(spec).splitlines()[1] == "[0 a b|0 0 0||0 c d|0 0 0||0 e f|0 0 0]"

"""Positions, steps and counts that do not fit a machine's integers: exact, or a ValueError, never a wrap.

And the cost of large geometries: what is asked for is counted, not listed.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometries import Geometry, arrays, integers

import jaxconv_fc as fc
from jaxconv_fc import spectrum
from jaxconv_fc.geometry import cache
from jaxconv_fc.spectrum import kinds

BIG = 10**12


# positions beyond int32 ------------------------------------------------------------------------------------

STEP = 2**31 - 1  # the largest that conv_spec takes
# For each, a small geometry with the same M.
FAR = {
    "stride": (
        Geometry((1, 1, 5), (1, 1, 2), (STEP,), [(0, STEP)]),
        Geometry((1, 1, 5), (1, 1, 2), (50,), [(0, 50)]),
    ),
    "stride and low pad": (
        Geometry((1, 1, 5), (1, 1, 3), (STEP,), [(STEP, STEP)]),
        Geometry((1, 1, 5), (1, 1, 3), (50,), [(50, 50)]),
    ),
    "lhs_dilation": (
        Geometry((1, 1, 3), (1, 1, 2), (STEP,), [(1, 3)], (STEP,)),
        Geometry((1, 1, 3), (1, 1, 2), (50,), [(1, 3)], (50,)),
    ),
    "rhs_dilation": (
        Geometry((1, 1, 5), (1, 1, 3), (1,), [(STEP, STEP)], None, (STEP,)),
        Geometry((1, 1, 5), (1, 1, 3), (1,), [(50, 50)], None, (50,)),
    ),
    "stride of one circular output": (
        Geometry((1, 1, 5), (1, 1, 3), (STEP,), "SAME", padding_mode="circular"),
        Geometry((1, 1, 5), (1, 1, 3), (50,), "SAME", padding_mode="circular"),
    ),
}


def on_square(function):
    return lambda s, k, x, y, m: function(s, k) if s.out_size == s.in_size else np.zeros(0)


def every_function():
    """Of every public function that takes a geometry: what it makes, as one array."""

    def composed(s, k, x, y, m):
        shape = (1, s.out_channels, *(a.out_size for a in s.axes))
        ones = (1,) * len(s.axes)
        after = fc.conv_spec(shape, (1, s.out_channels, *ones), ones, "VALID")
        return fc.as_matrix(*fc.compose((after, jnp.ones(after.rhs_shape, k.dtype)), (s, k)))

    def first_rows(s, k, x, y, m):
        """The rows of the block among all columns of M; which inputs it spans may differ."""
        block, read, _ = fc.row_block(s, 0, 1)
        rows = np.zeros((block.out_size, *s.in_shape))
        shape = (block.out_size, *block.in_shape)
        rows[(slice(None), *read)] = np.asarray(fc.as_matrix(block, k)).reshape(shape)
        return rows

    mesh = jax.make_mesh((1,), ("rows",))
    table = {
        "as_matrix": lambda s, k, x, y, m: fc.as_matrix(s, k),
        "as_affine": lambda s, k, x, y, m: fc.as_affine(s, k, jnp.ones(s.out_channels, k.dtype))[0],
        "matrix_rows": lambda s, k, x, y, m: fc.matrix_rows(s, k, [-1, 0]),
        "matrix_columns": lambda s, k, x, y, m: fc.matrix_columns(s, k, [-1, 0]),
        "update_matrix": lambda s, k, x, y, m: fc.update_matrix(s, m, k),
        "as_bcoo": lambda s, k, x, y, m: fc.as_bcoo(s, k).todense(),
        "as_bcsr": lambda s, k, x, y, m: fc.as_bcsr(s, k).todense(),
        "as_scipy": lambda s, k, x, y, m: fc.as_scipy(s, k).toarray(),
        "diagonals": lambda s, k, x, y, m: np.concatenate([[o, *d] for o, d in fc.diagonals(s, k).items()]),
        "row_block": first_rows,
        "row_blocks": lambda s, k, x, y, m: np.concatenate([b.matrix.sum(1) for b in fc.row_blocks(s, k)]),
        "shard_matrix": lambda s, k, x, y, m: fc.shard_matrix(s, k, mesh),
        "shard_bcoo": lambda s, k, x, y, m: fc.shard_bcoo(s, k, mesh).todense(),
        "apply": lambda s, k, x, y, m: fc.apply(s, k, x),
        "apply integers": lambda s, k, x, y, m: fc.apply(s, k.astype(int), x.astype(int)),
        "apply_transpose": lambda s, k, x, y, m: fc.apply_transpose(s, k, y),
        "kernel_vjp": lambda s, k, x, y, m: fc.kernel_vjp(s, x, y),
        "batched_apply": lambda s, k, x, y, m: fc.batched_apply(s, k, x[None]),
        "grad of apply": lambda s, k, x, y, m: jax.grad(lambda v: (fc.apply(s, v, x) * y).sum())(k),
        "transpose": lambda s, k, x, y, m: fc.as_matrix(*fc.transpose(s, k)),
        "canonical": lambda s, k, x, y, m: fc.as_matrix(s.canonical, k),
        "compose": composed,
        "kernel_matrix": lambda s, k, x, y, m: fc.kernel_matrix(s, x),
        "matrix_vjp": lambda s, k, x, y, m: fc.matrix_vjp(s, m),
        "kernel_from_matrix": lambda s, k, x, y, m: fc.kernel_from_matrix(s, m),
        "conv_distance": lambda s, k, x, y, m: fc.conv_distance(s, m + 1),
        "format_matrix": lambda s, k, x, y, m: fc.format_matrix(s) + fc.format_matrix(s, k),
        "as_linear_operator": lambda s, k, x, y, m: fc.as_linear_operator(s, k).mv(x),
        "nse": lambda s, k, x, y, m: np.array(s.nse),
        "nbytes": lambda s, k, x, y, m: np.array(s.nbytes()),
        "log_abs_det": on_square(spectrum.log_abs_det),
        "spectral_norm_bounds": lambda s, k, x, y, m: jnp.stack(spectrum.spectral_norm_bounds(s, k)),
        "singular_triplet": lambda s, k, x, y, m: spectrum.singular_triplet(s, k)[1],
        "top_singular_values": lambda s, k, x, y, m: spectrum.top_singular_values(s, k, 1),
        "pseudo_inverse": lambda s, k, x, y, m: spectrum.pseudo_inverse(s, k, y),
    }  # fmt: skip
    plain = (
        "frobenius_norm one_norm inf_norm row_norms column_norms trace rank condition_number spectral_norm "
        "singular_values orthogonality_residual"
    )
    for name in plain.split():
        table[name] = lambda s, k, x, y, m, name=name: getattr(spectrum, name)(s, k)
    return table


FUNCTIONS = every_function()


@pytest.mark.parametrize("name", FAR)
def test_positions_beyond_int32_are_exact_or_refused(name):
    """On the host and in indices of 64 bits they are exact. Indices of 32 bits, and lax, do not get them."""
    far, small = (geometry.spec() for geometry in FAR[name])
    assert (far.shape, far.nse) == (small.shape, small.nse)
    kernel, x, y = (jnp.asarray(v) for v in arrays(FAR[name][1], np.random.default_rng(1), np.float64))
    kernel = jnp.where(kernel == 0, 1.0, kernel)
    want = fc.as_matrix(small, kernel)
    every = ("as_matrix", "as_scipy", "as_bcsr", "matrix_rows", "matrix_columns", "kernel_matrix")
    refused = ("apply", "apply_transpose", "kernel_vjp", "compose", "spectral_norm")
    some = slice(None if name == "stride and low pad" else 2)  # each compiles a program
    for function in every[some]:
        got, near = (FUNCTIONS[function](spec, kernel, x, y, want) for spec in (far, small))
        np.testing.assert_array_equal(got, near, function)
    for function in refused[some]:
        assert "ValueError" in str(outcome(function, far, kernel, x, y, want)), function
    with jax.enable_x64(False):
        kernel, x, y = (jnp.asarray(np.asarray(v), np.float32) for v in (kernel, x, y))
        for function in ("as_matrix", "as_bcoo", *refused)[some]:
            assert "ValueError" in str(outcome(function, far, kernel, x, y, want)), function


def outcome(function, *arguments):
    """The array that a public function makes, its text, or the beginning of its ValueError."""
    try:
        made = FUNCTIONS[function](*arguments)
    except ValueError as error:
        return f"ValueError: {str(error)[:12]}"
    return made if isinstance(made, str) else np.asarray(made)


def test_ten_to_the_twelve_outputs_are_refused_or_counted():
    """Before anything is allocated: no MemoryError, and no index that wraps."""
    spec = fc.conv_spec((1, 1, BIG), (1, 1, 3), (1,), "SAME")
    kernel = jnp.asarray([[[1.0, -2.0, 4.0]]], np.float32)
    refused = "as_matrix matrix_rows matrix_columns as_bcoo as_bcsr as_scipy diagonals row_norms column_norms"
    with jax.enable_x64(False):
        for name in [*refused.split(), "singular_values", "trace", "update_matrix"]:
            made = outcome(name, spec, kernel, None, None, jnp.ones((1, 1), np.float32))
            assert made.startswith("ValueError"), name
        assert spec.nse == 3 * BIG - 2
        assert float(spectrum.one_norm(spec, kernel)) == float(spectrum.inf_norm(spec, kernel)) == 7
        np.testing.assert_allclose(spectrum.frobenius_norm(spec, kernel), (21 * BIG) ** 0.5, rtol=1e-5)


# traced indices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("take", [fc.matrix_rows, fc.matrix_columns])
@pytest.mark.parametrize(
    ("dtype", "indices"),
    [
        ("uint32", [2**32 - 1, 0, 2**31, 299]),
        ("uint64", [2**64 - 1, 2**32, 2**32 + 1, 5]),
        ("int64", [2**32, -(2**32), -(2**63), 7]),
        ("int8", [127, -128, -1, 3]),
        ("uint8", [255, 0, 17, 200]),
        ("int32", [300, -301, -300, 299]),
    ],
)
def test_traced_indices_are_compared_before_they_are_cast(take, dtype, indices, rng):
    spec = fc.conv_spec((1, 1, 300), (1, 1, 3), (1,), "SAME")
    kernel = jnp.asarray(integers(rng, (1, 1, 3), np.float32))
    got = np.asarray(jax.jit(lambda i: take(spec, kernel, i))(jnp.asarray(np.array(indices, dtype))))
    matrix = np.asarray(fc.as_matrix(spec, kernel))
    matrix = matrix if take is fc.matrix_rows else matrix.T
    got = got if take is fc.matrix_rows else got.T
    for line, index in zip(got, indices, strict=True):
        if -300 <= index < 300:
            np.testing.assert_array_equal(line, matrix[index])
        else:
            assert np.isnan(line).all(), index


# arrays of the other byte order ----------------------------------------------------------------------------


def test_big_endian_arrays_are_the_numbers_that_they_hold(rng):
    spec = fc.conv_spec((1, 1, 6), (2, 1, 3), (1,), "SAME")
    for code in ("f4", "f8", "i4", "i2", "c16"):
        kernel, x = (integers(rng, shape, code) for shape in (spec.rhs_shape, spec.in_shape))
        swapped = [v.astype(v.dtype.newbyteorder(">")) for v in (kernel, x)]
        matrix = fc.as_matrix(spec, swapped[0])
        assert matrix.dtype == kernel.dtype
        np.testing.assert_array_equal(matrix, fc.as_matrix(spec, kernel))
        np.testing.assert_array_equal(fc.apply(spec, *swapped), fc.apply(spec, kernel, x))
        scipy = fc.as_scipy(spec, swapped[0])
        assert scipy.dtype.isnative
        np.testing.assert_array_equal(scipy.toarray(), matrix)
    np.testing.assert_array_equal(
        fc.matrix_rows(spec, kernel, np.array([3, -1], ">i4")), fc.matrix_rows(spec, kernel, [3, -1])
    )
    wide = np.asarray(fc.as_matrix(spec, np.ones(spec.rhs_shape))).astype(">f8")
    assert fc.detect_conv(wide, spec.in_shape, spec.out_shape) is not None


# cost ------------------------------------------------------------------------------------------------------


def seconds(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


@pytest.mark.parametrize("mode", ["zeros", "circular", "edge"])
def test_a_kernel_of_a_million_taps_is_counted_at_once(mode):
    """In closed form per tap: 10**12 pairs are neither listed nor looped over."""
    size = 10**6

    def count():
        spec = fc.conv_spec((1, 1, size), (1, 1, size), (1,), [(size // 2, size // 2)], padding_mode=mode)
        return repr(spec), spec.nse

    took, (text, nse) = seconds(count)
    assert took < 5
    assert "1000000" in text
    m, half = size + 1, size // 2
    # In zeros mode output o reads size - |o - half| inputs; an edge adds the input at the end that it covers.
    zeros = m * size - half * (half + 1)
    assert nse == {"zeros": zeros, "circular": m * size, "edge": zeros}[mode]


def test_norms_of_a_long_layer_cost_their_kinds_of_lines():
    """200,000 inputs by 256 taps: 51 million pairs, of which 511 lines are different."""
    spec = fc.conv_spec((1, 1, 200_000), (1, 1, 256), (1,), "SAME")
    kernel = integers(np.random.default_rng(0), (1, 1, 256), np.int64)
    took, value = seconds(lambda: spectrum.one_norm(spec, kernel).block_until_ready())
    assert took < 10
    assert float(value) == float(spectrum.inf_norm(spec, kernel)) == np.abs(kernel).sum()
    assert cache.size_of(kinds.line_kinds(spec.axes[0], False)) < 4 * 2**20
    columns = np.asarray(spectrum.column_norms(spec, kernel, ord=1))
    padded = np.convolve(np.ones(200_000, np.int64), np.abs(kernel[0, 0])[::-1])
    rows = np.asarray(spectrum.row_norms(spec, kernel, ord=1))
    lo = spec.padding[0][0]
    np.testing.assert_array_equal(rows, padded[255 - lo : 255 - lo + 200_000])
    back = np.convolve(np.ones(200_000, np.int64), np.abs(kernel[0, 0]))
    np.testing.assert_array_equal(columns, back[lo : lo + 200_000])


def test_a_layer_of_10_to_the_12_outputs_prints():
    spec = fc.conv_spec((1, 1, BIG), (1, 1, 3), (1,), "SAME")
    took, text = seconds(lambda: fc.format_matrix(spec, max_rows=4, max_columns=6))
    assert took < 2
    assert text.splitlines() == [
        "[b c 0 ... 0 0 0]",
        "[a b c ... 0 0 0]",
        "...",
        "[0 0 0 ... a b c]",
        "[0 0 0 ... 0 a b]",
    ]
    assert fc.format_matrix(spec).count("\n") == 40


def test_detection_finds_the_steps_from_the_support(rng):
    """n = 300 took 32 s when all pairs of steps were compared in full; noise too is told apart at once."""
    n = 300
    spec = fc.conv_spec((1, 1, n), (1, 1, 4), (2,), [(1, 1)], (3,), (2,))
    kernel = jnp.asarray([[[1.0, -2.0, 3.0, 0.5]]])
    matrix = np.asarray(fc.as_matrix(spec, kernel))
    took, found = seconds(lambda: fc.detect_conv(matrix, spec.in_shape, spec.out_shape))
    assert took < 10
    assert found is not None
    assert found[0] == spec.canonical
    np.testing.assert_allclose(found[1], kernel)
    took, found = seconds(lambda: fc.detect_conv(rng.standard_normal((n, n)), (1, n), (1, n)))
    assert took < 10
    assert found is None

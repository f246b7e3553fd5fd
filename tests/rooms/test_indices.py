"""Positions, steps and counts that do not fit a machine's integers: exact, or a ValueError, never a wrap.

And the cost of large geometries: what is asked for is counted, not listed.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import Geometry, arrays, integers

import jaxconv_fc as fc
from jaxconv_fc import cache, spectrum
from jaxconv_fc.spectrum import kinds

BIG = 10**12


# geometries beyond int32 -----------------------------------------------------------------------------------

# For each, a small geometry with the same M (None: there is none with positive pads, so M is the oracle's).
HUGE = {
    "stride": (
        Geometry((1, 1, 5), (1, 1, 2), (BIG,), [(0, 2 * BIG)]),
        Geometry((1, 1, 5), (1, 1, 2), (50,), [(0, 100)]),
    ),
    "stride and low pad": (
        Geometry((1, 1, 5), (1, 1, 3), (BIG,), [(BIG, BIG)]),
        Geometry((1, 1, 5), (1, 1, 3), (50,), [(50, 50)]),
    ),
    "lhs_dilation": (
        Geometry((1, 1, 3), (1, 1, 2), (BIG,), [(1, 3)], (BIG,)),
        Geometry((1, 1, 3), (1, 1, 2), (50,), [(1, 3)], (50,)),
    ),
    "rhs_dilation": (
        Geometry((1, 1, 5), (1, 1, 3), (1,), [(BIG, BIG)], None, (BIG,)),
        Geometry((1, 1, 5), (1, 1, 3), (1,), [(50, 50)], None, (50,)),
    ),
    "all of them": (
        Geometry((1, 1, 4), (1, 1, 3), (2 * BIG,), [(BIG, BIG)], (BIG,), (BIG,)),
        Geometry((1, 1, 4), (1, 1, 3), (2,), [(1, 1)], (1,), (1,)),
    ),
    "beyond 64 bits": (
        Geometry((1, 1, 5), (1, 1, 2), (10**30,), [(0, 2 * 10**30)]),
        Geometry((1, 1, 5), (1, 1, 2), (50,), [(0, 100)]),
    ),
    "stride over an image of two axes": (
        Geometry((1, 2, 3, 3), (2, 2, 3, 2), (BIG, 1), "SAME"),
        Geometry((1, 2, 3, 3), (2, 2, 3, 2), (50, 1), "SAME"),
    ),
    "stride of one circular output": (
        Geometry((1, 1, 5), (1, 1, 3), (BIG,), "SAME", padding_mode="circular"),
        Geometry((1, 1, 5), (1, 1, 3), (50,), "SAME", padding_mode="circular"),
    ),
}
# These have no smaller form that is known: the host counts with them, a traced program refuses them.
REFUSED = {
    "circular pads": Geometry((1, 1, 5), (1, 1, 3), (BIG,), [(BIG, BIG)], padding_mode="circular"),
    "edge pads": Geometry((1, 1, 5), (1, 1, 3), (BIG,), [(BIG, BIG)], padding_mode="edge"),
    "reflect pads beyond 64 bits": Geometry(
        (1, 1, 5), (1, 1, 3), (10**30,), [(10**30, 10**30)], padding_mode="reflect"
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
FEW = ("as_scipy", "as_bcsr", "matrix_columns", "apply", "apply_transpose", "kernel_vjp", "row_block", "nse")


@pytest.mark.parametrize("name", HUGE)
def test_huge_steps_have_the_matrix_of_small_ones(name):
    """Every public function gives for strides, dilations and pads of 10**12 what it gives for 50; for one of
    the geometries, since each compiles a program, and a few functions for the others."""
    huge, small = (geometry.spec() for geometry in HUGE[name])
    assert huge.shape == small.shape
    kernel, x, y = arrays(HUGE[name][1], np.random.default_rng(1), np.float64)
    kernel, x, y = (jnp.asarray(v) for v in (kernel, x, y))
    kernel = jnp.where(kernel == 0, 1.0, kernel)
    np.testing.assert_array_equal(fc.as_matrix(huge, kernel), oracle.matrix(kernel, HUGE[name][1]))
    matrix = fc.as_matrix(huge, kernel)
    for function in FUNCTIONS if name == "stride and low pad" else FEW:
        got, want = (outcome(function, spec, kernel, x, y, matrix) for spec in (huge, small))
        if isinstance(want, str):
            assert isinstance(got, str), function
            assert got == want, function
        else:
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9, err_msg=function)


def outcome(function, *arguments):
    """The array that a public function makes, its text, or the beginning of its ValueError."""
    try:
        made = FUNCTIONS[function](*arguments)
    except ValueError as error:
        return f"ValueError: {str(error)[:12]}"
    return made if isinstance(made, str) else np.asarray(made)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_small_form_is_refused_by_name(name):
    """A ValueError of ours or an exact result: no OverflowError, no wrap, no allocation of 10**12 entries."""
    geometry = REFUSED[name]
    spec = geometry.spec()
    kernel = jnp.asarray([[[1.0, 2.0, 4.0]]])
    with jax.enable_x64(False):
        x, y, matrix = (jnp.ones(shape, np.float32) for shape in (spec.in_shape, spec.out_shape, spec.shape))
        made = {f: outcome(f, spec, kernel.astype(np.float32), x, y, matrix) for f in FUNCTIONS}
    want = exact_matrix(geometry, kernel)
    np.testing.assert_array_equal(made["as_scipy"], want)
    assert made["nse"] == (want != 0).sum()
    np.testing.assert_allclose(made["inf_norm"], np.abs(want).sum(1).max())
    np.testing.assert_allclose(made["one_norm"], np.abs(want).sum(0).max())
    np.testing.assert_allclose(made["frobenius_norm"], np.linalg.norm(want), rtol=1e-6)
    for function in ("as_matrix", "as_bcoo", "apply", "apply_transpose", "kernel_vjp", "spectral_norm"):
        assert str(made[function]).startswith("ValueError"), function


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


def exact_matrix(geometry, kernel):
    """M of one spatial axis by the formulas of the boundary modes in Python ints."""
    axis = geometry.spec().axes[0]  # in the steps given: these have no smaller form
    matrix = np.zeros((axis.out_size, axis.size))
    for o in range(axis.out_size):
        for p in range(axis.taps):
            i, n = o * axis.stride + p - axis.lo, axis.size
            folds = {"circular": i % n, "edge": min(max(i, 0), n - 1)}
            w = i % (2 * n - 2)
            matrix[o, folds.get(axis.mode, min(w, 2 * n - 2 - w))] += float(kernel[0, 0, p])
    return matrix


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
def test_a_kernel_of_ten_million_taps_is_counted_at_once(mode):
    """In closed form: 10**14 pairs are neither listed nor looped over. (A loop over the taps takes 10 s.)"""
    size = 10**7

    def count():
        spec = fc.conv_spec((1, 1, size), (1, 1, size), (1,), [(size // 2, size // 2)], padding_mode=mode)
        return repr(spec), spec.nse

    took, (text, nse) = seconds(count)
    assert took < 0.5
    assert "10000000" in text
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
    assert value == spectrum.inf_norm(spec, kernel) == np.abs(kernel).sum()
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

"""Every public function that takes arrays, by dtype: right or refused, as the table of docs/start.md says.

The reference is the same function of the same numbers in float64 or complex128; integers are held exactly.
"""

import functools
import re
from pathlib import Path

import functions
import geometries
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from environment import count

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum
from jaxconv_fc.geometry.arguments import DTYPES

KINDS = {
    "bool": ["bool"],
    "int4": ["int4", "uint4"],
    "integers": [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)],
    "halves": ["float16", "bfloat16"],
    "floats": ["float32", "float64"],
    "complex": ["complex64", "complex128"],
    "float8": [str(d) for d in sorted(DTYPES, key=str) if "float8" in str(d)],
}
MOST = count("NORMS", 4)  # random geometries whose norms are compared, in all dtypes in turn
EVERY = count("DTYPES", 0)  # dtypes of each kind, for every function; 0: one, for a function of each row
# Of functions of JAX the function decides. The others take no array of numbers, or only compare and draw.
NO_ARRAYS = {
    *(name for name in functions.TABLE if name.startswith(("neurons.", "testing.", "show."))),
    "conv_spec", "row_block", "format_matrix", "find_convs", "fully_connected", "with_products", "matrix_of",
    "local_affine", "sparse_matrix_of", "affine_layers", "as_conv", "diagonal_offsets", "interleaved_rows",
    "spectrum.start_vector",
    *(name for name in functions.TABLE if name.startswith("curvature.model_")),
}  # fmt: skip


def table():
    """The table of the page, row by row: the functions, and kind of dtype -> cell."""
    text = (Path(__file__).parents[2] / "docs" / "start.md").read_text()
    lines = text.split("<!-- dtypes -->")[1].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    kinds = [re.sub(r" \(.*", "", cell) for cell in cells[0][1:]]
    return [(re.findall(r"`([\w.]+)`", row[0]), dict(zip(kinds, row[1:], strict=True))) for row in cells[2:]]


def distance(spec, kernel, x, y):
    return fc.conv_distance(spec, fc.as_matrix(spec, kernel).at[0, -1].set(jnp.ones((), kernel.dtype)))


def one_block(spec, kernel, x, y):
    return [block.matrix.toarray() for block in fc.row_blocks(spec, kernel)]


CALLS = {name: row.call for name, row in functions.TABLE.items()}
CALLS |= {"conv_distance": distance, "row_blocks": one_block}  # for any dtype: no sums, no limit in bytes


def called(name, dtype, widened=None):
    """The leaves of what the function returns, for the numbers that dtype holds, in a wider one if asked."""
    arrays = (v.astype(dtype) for v in functions.samples())
    arrays = [v.astype(widened or dtype) for v in arrays]
    result = CALLS[name](functions.SPEC, *map(jnp.asarray, arrays))
    return [np.asarray(v) for v in jax.tree.leaves(result) if not isinstance(v, str)]


@functools.cache
def reference(name, dtype):
    """By NumPy's name of the numbers, which several dtypes share."""
    return called(name, dtype, "complex128" if "complex" in dtype else "float64")


def held(value, dtype):
    """The numbers of an array in a dtype that wraps, or that is wide enough."""
    return np.asarray(value).real.astype(np.int64).astype(dtype).astype(np.int64)


def check(name, dtype, cell):
    if cell == "refused":
        with pytest.raises(TypeError, match=r"dtype|bool|cast|Cast|SciPy|lineax"):
            called(name, dtype)
        return "refused"
    got, want = called(name, dtype), reference(name, dtype)
    assert len(got) == len(want), (name, dtype)
    for a, b in zip(got, want, strict=True):
        if cell == "or":
            np.testing.assert_array_equal(a, b != 0 if a.dtype == bool else b, err_msg=f"{name} {dtype}")
        elif cell == "own" and "int" in dtype:
            assert a.dtype.kind not in "fc", (name, dtype)
            np.testing.assert_array_equal(held(a, dtype), held(b, dtype), err_msg=f"{name} {dtype}")
        elif cell == "exact":
            assert a.dtype.kind in "iu" or "64" in dtype, (name, dtype)
            np.testing.assert_array_equal(a, b, err_msg=f"{name} {dtype}")
        else:
            eps = 32 * 1.2e-7 if cell == "float" else float(ml_dtypes.finfo(np.dtype(dtype)).eps)
            eps *= 1 if "float8" in dtype or cell == "float" else 32
            a = a.astype(b.dtype)
            if "float8" in dtype and cell == "own":  # a sum beyond the range is no number
                beyond = np.abs(b) > float(ml_dtypes.finfo(np.dtype(dtype)).max)
                assert (
                    not np.isfinite(a[beyond]).any()
                    or (np.abs(a[beyond]) > np.abs(b[beyond]) * (1 - eps)).all()
                )
                a, b = a[~beyond], b[~beyond]
            np.testing.assert_allclose(
                a, b, rtol=eps, atol=eps * np.abs(b).max(initial=0) / 4, err_msg=f"{name} {dtype}"
            )
    return "right"


def names():
    return [name for name in functions.TABLE if name not in NO_ARRAYS]


def test_the_table_of_dtypes_has_every_function_once():
    assert sorted(name for row, _ in table() for name in row) == sorted(names())


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_dtypes_holds(kind, run_seed):
    """The functions are drawn alike for all kinds, which share the programs of the references."""
    rng = np.random.default_rng(run_seed)
    drawn = [(row if EVERY else [str(rng.choice(row))], cells[kind]) for row, cells in table()]
    for dtype in rng.permutation(KINDS[kind])[: EVERY or 1]:
        for row, cell in drawn:
            for name in row:
                check(name, str(dtype), cell)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8", "int16"])
def test_sums_of_integers_do_not_wrap(dtype):
    """126 for 2,536, and 0 for a kernel full of -128: the sums had the dtype of the kernel."""
    info, spec = jnp.iinfo(dtype), fc.conv_spec((1, 8, 6, 6), (8, 8, 3, 3), (1, 1), "SAME")

    @jax.jit
    def sums(kernel):
        one, inf, rows, columns, trace = every_norm(spec, kernel)
        return one, inf, rows.max(), columns.min(), trace

    for extreme in (int(info.min), int(info.max)):
        kernel, size = np.full(spec.rhs_shape, extreme).astype(dtype), abs(extreme)
        for x64 in (False, True):
            with jax.enable_x64(x64):
                for got, want in zip(
                    sums(kernel), [72 * size] * 3 + [32 * size, 8 * 36 * extreme], strict=True
                ):
                    assert got.dtype == jnp.result_type(int)
                    assert int(got) == want


def test_sums_that_no_integer_holds_are_floats():
    spec = fc.conv_spec((1, 1, 4), (1, 1, 3), (1,), "SAME")
    for dtype, x64, want in (
        ("int32", False, np.float32),
        ("uint32", True, np.int64),
        ("uint64", True, np.float64),
    ):
        with jax.enable_x64(x64):
            got = spectrum.one_norm(spec, np.full(spec.rhs_shape, np.iinfo(dtype).max, dtype))
            assert got.dtype == want
            np.testing.assert_allclose(float(got), 3.0 * np.iinfo(dtype).max, rtol=1e-6)


def test_norms_of_random_geometries_in_every_dtype(run_seed):
    dtypes = [
        *("int4", "uint4", "int8", "uint8", "int16", "int32", "float16", "bfloat16", "float32", "complex64"),
        *("float8_e4m3fn", "float8_e5m2fnuz"),
    ]
    for number in range(MOST):
        rng, dtype = np.random.default_rng([run_seed, number, 17]), dtypes[(run_seed + number) % len(dtypes)]
        geometry = geometries.random_geometry(rng)
        low, high = (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max) if "int" in dtype else (-4, 4)
        kernel = rng.integers(max(low, -30_000), min(high, 30_000), geometry.rhs_shape, endpoint=True).astype(
            dtype
        )
        spec, exact = geometry.spec(), dtype in ("int4", "uint4", "int8", "uint8", "int16")
        matrix = oracle.matrix(kernel.astype(np.complex128 if "complex" in dtype else np.float64), geometry)
        sizes, name = np.abs(matrix), f"{dtype}, JAXCONV_FC_SEED={run_seed}, number {number}: {geometry}"
        close = (
            np.testing.assert_array_equal
            if exact
            else functools.partial(np.testing.assert_allclose, rtol=1e-5)
        )
        *norms, trace = map(np.asarray, jax.jit(every_norm, static_argnums=0)(spec, kernel))
        wanted = sizes.sum(0).max(initial=0), sizes.sum(1).max(initial=0), sizes.sum(1), sizes.sum(0)
        for got, want in zip(norms, wanted, strict=True):
            close(got, want, err_msg=name)
        atol = 0 if exact else 1e-5 * sizes.sum()
        np.testing.assert_allclose(trace, np.trace(matrix), atol=atol, err_msg=name)


def every_norm(spec, kernel):
    return (
        spectrum.one_norm(spec, kernel),
        spectrum.inf_norm(spec, kernel),
        spectrum.row_norms(spec, kernel, ord=1),
        spectrum.column_norms(spec, kernel, ord=1),
        spectrum.trace(spec, kernel),
    )


@pytest.mark.parametrize("dtype", ["int2", "uint2", "float4_e2m1fn", "float8_e8m0fnu", "float0", "key"])
def test_dtypes_that_no_function_takes_are_named(dtype):
    spec = functions.SPEC
    arrays = [v.astype(jax.dtypes.float0 if dtype == "float0" else "int8") for v in functions.samples()]
    if dtype == "key":
        arrays = [jax.random.split(jax.random.key(0), v.shape) for v in arrays]
    elif dtype != "float0":
        arrays = [v.astype(dtype) for v in arrays]
    # The rest make a matrix or a stack of these arrays first.
    made = {
        "conv_distance",
        "kernel_from_matrix",
        "matrix_vjp",
        "detect_conv",
        "nearest_conv",
        "update_matrix",
        "batched_apply",
    }
    for name in set(names()) - made - {"compose"}:
        with pytest.raises(TypeError, match=r"must hold numbers, got dtype|SciPy cannot multiply"):
            CALLS[name](spec, *arrays)

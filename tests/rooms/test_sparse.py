"""The sparse formats, diagonals and row blocks: every entry in its place, against the oracle and lax."""

import os
import runpy
import signal
import threading
import time
import warnings
import weakref
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count, drawn, rarely
from geometries import CASES, Geometry, every_case, integers, random_geometry

import jaxconv_fc as fc
from jaxconv_fc.geometry.layout import kernel_parts
from jaxconv_fc.matrix import host

COUNT = count("GEOMETRIES", 6)
EXAMPLES = Path(__file__).parents[2] / "examples"


def triple(matrix):
    """(data, columns, indptr) of a BCSR or SciPy matrix, as NumPy."""
    return tuple(map(np.asarray, (matrix.data, matrix.indices, matrix.indptr)))


def expected(geometry, kernel):
    """(data, rows, columns) by the oracle: its pattern, which says which entries are stored, in order."""
    rows, columns = np.nonzero(oracle.pattern(geometry))
    return oracle.matrix(kernel, geometry)[rows, columns], rows, columns


def check_host(geometry, kernel):
    spec = geometry.spec()
    data, rows, columns = expected(geometry, kernel)
    matrix = fc.as_scipy(spec, kernel)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=spec.out_size))])
    assert spec.nse == matrix.nnz == len(data)
    assert matrix.shape == spec.shape
    for got, want in zip(triple(matrix), (data, columns, indptr), strict=True):
        np.testing.assert_array_equal(got, want)


def check_device(geometry, *kernels):
    """In one program."""
    spec = geometry.spec()
    both = jax.jit(lambda kernels: [(fc.as_bcoo(spec, k), fc.as_bcsr(spec, k)) for k in kernels])
    for kernel, (bcoo, bcsr) in zip(kernels, both(kernels), strict=True):
        check_formats(geometry, kernel, bcoo, bcsr)


def check_formats(geometry, kernel, bcoo, bcsr):
    """BCSR and BCOO hold what SciPy holds, and their flags are true."""
    spec = geometry.spec()
    data, rows, columns = expected(geometry, kernel)
    for matrix in (bcoo, bcsr):
        assert matrix.shape == spec.shape
        assert matrix.nse == spec.nse
        assert matrix.data.dtype == kernel.dtype
        assert matrix.indices.dtype == jnp.int32
        assert matrix.indices_sorted
        assert matrix.unique_indices
    np.testing.assert_array_equal(bcoo.indices, np.stack([rows, columns], axis=1))
    np.testing.assert_array_equal(bcoo.data, data)
    for got, want in zip(triple(bcsr), triple(fc.as_scipy(spec, kernel)), strict=True):
        np.testing.assert_array_equal(got, want)


# entries ---------------------------------------------------------------------------------------------


@every_case
def test_every_entry_in_its_place(geometry, rng):
    """The formats, the diagonals, and the derivatives of the formats in the kernel: one program."""
    spec = geometry.spec()
    kernel, tangent = (integers(rng, geometry.rhs_shape, np.float64) for _ in range(2))
    (values, rows, columns), (moved, *_) = expected(geometry, kernel), expected(geometry, tangent)
    weights, cotangent = np.zeros(spec.shape), integers(rng, rows.shape, np.float64)
    weights[rows, columns] = cotangent
    order = [None, rng.permutation(spec.out_size).tolist(), fc.interleaved_rows(spec)][rng.integers(3)]

    def derivatives(build, kernel, tangent, cotangent):
        data = lambda kernel: build(spec, kernel).data  # noqa: E731
        return *jax.jvp(data, (kernel,), (tangent,)), *jax.vjp(data, kernel)[1](cotangent)

    @jax.jit
    def made(kernel, *given):
        builders = fc.as_bcoo, fc.as_bcsr
        derived = [derivatives(build, kernel, *given) for build in builders]
        return [build(spec, kernel) for build in builders], fc.diagonals(spec, kernel, rows=order), derived

    formats, diagonals, of_both = made(kernel, tangent, cotangent)
    check_host(geometry, kernel)
    check_formats(geometry, kernel, *formats)
    check_diagonals(geometry, kernel, order, diagonals)
    for got in of_both:
        want = values, moved, oracle.matrix_gradient(weights, geometry)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", ["circular", "reflect", "symmetric", "edge"])
def test_taps_that_meet_beside_holes(mode, rng):
    """Padded, then dilated: the padding is lo * lhs_dilation long for the windows, not lo."""
    geometry = Geometry((1, 1, 6), (1, 1, 3), (1,), [(4, 10)], (2,), (2,), padding_mode=mode)
    kernel = integers(rng, geometry.rhs_shape)
    check_host(geometry, kernel)
    check_device(geometry, kernel)


def test_random_geometries_on_the_host(run_seed):
    for n in range(10 * COUNT):
        rng = np.random.default_rng([run_seed, n])
        geometry = random_geometry(rng)
        try:
            check_host(geometry, integers(rng, geometry.rhs_shape))
        except AssertionError as error:
            raise AssertionError(f"JAXCONV_FC_SEED={run_seed}, geometry {n}: {geometry}\n{error}") from error


def test_random_geometries_on_the_device(run_seed):
    for n in range(COUNT):
        rng = np.random.default_rng([run_seed, n])
        geometry = random_geometry(rng)
        try:
            check_device(geometry, integers(rng, geometry.rhs_shape))
        except AssertionError as error:
            raise AssertionError(f"JAXCONV_FC_SEED={run_seed}, geometry {n}: {geometry}\n{error}") from error


@pytest.mark.parametrize("name", ["dilated input", "colliding"])
def test_every_dtype(name, rng):
    geometry, dtypes = CASES[name], ["bool", "int8", "uint16", "int64", "float32", "complex64"]
    kernels = [integers(rng, geometry.rhs_shape, dtype) for dtype in dtypes]
    check_device(geometry, *kernels)
    for kernel in kernels:
        check_host(geometry, kernel)
        assert fc.as_scipy(geometry.spec(), kernel).dtype == kernel.dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_has_no_scipy(dtype, rng):
    geometry = CASES["plain"]
    kernel = jnp.asarray(integers(rng, geometry.rhs_shape, np.float32)).astype(dtype)
    assert fc.as_bcsr(geometry.spec(), kernel).dtype == kernel.dtype
    with pytest.raises(TypeError, match=r"SciPy cannot multiply: kernel\.astype"):
        fc.as_scipy(geometry.spec(), kernel)


def test_scipy_keeps_float64_where_jax_does_not():
    kernel = np.full((1, 1, 2), 1 + 2.0**-40)
    with jax.enable_x64(False):
        matrix = fc.as_scipy(fc.conv_spec((1, 1, 3), (1, 1, 2), (1,), "VALID"), kernel)
    assert matrix.dtype == np.float64
    assert (matrix.data == kernel.ravel()[0]).all()


def test_scipy_matrix_is_canonical_and_writable(rng):
    geometry = CASES["reflect"]
    matrix = fc.as_scipy(geometry.spec(), integers(rng, geometry.rhs_shape, np.float64))
    assert matrix.has_canonical_format
    twice = matrix.copy()
    twice.data *= 2
    np.testing.assert_array_equal(twice.toarray(), 2 * matrix.toarray())


@pytest.mark.parametrize("layout", [None, ("NHWC", "HWIO", "NHWC")])
def test_large_matrices_are_filled_on_two_cores(layout, rng):
    shapes = ((1, 8, 64, 60), (8, 4, 3, 3)) if layout is None else ((1, 64, 60, 8), (3, 3, 4, 8))
    spec = fc.conv_spec(*shapes, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=2)
    kernel = jnp.asarray(rng.standard_normal(spec.rhs_shape))
    csr, bcsr = fc.as_scipy(spec, kernel), fc.as_bcsr(spec, kernel)
    assert csr.nnz == spec.nse > 2**20
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(csr, name), getattr(bcsr, name))


@pytest.mark.parametrize(("taps", "mode"), [(3, "zeros"), (3, "symmetric"), (70, "zeros"), (70, "circular")])
def test_axes_with_small_and_with_large_tables(taps, mode, rng):
    """Tables of an axis are made by NumPy or in the trace."""
    spec = fc.conv_spec((1, 1, 90), (2, 1, taps), (1,), "SAME", padding_mode=mode)
    assert (spec.axes[0].out_size * taps > 2**9) == (taps == 70)
    kernel = rng.integers(-4, 5, spec.rhs_shape).astype(float)
    both = jax.jit(lambda k: (fc.as_bcsr(spec, k).todense(), fc.as_bcoo(spec, k).todense()))
    for got in both(kernel):
        np.testing.assert_array_equal(got, oracle.matrix(kernel, spec))


def test_every_depth_of_the_templates(rng):
    """One plan is taken for each geometry. All of them write the same arrays."""
    for geometry in CASES.values():
        spec, kernel = geometry.spec(), integers(rng, geometry.rhs_shape)
        data, rows, columns = expected(geometry, kernel)
        indptr = np.searchsorted(rows, np.arange(spec.out_size + 1))
        for depth in range(len(host._classes(spec)) + 1):
            plan = host._plan(spec, depth)
            got = np.zeros_like(data), np.zeros(len(columns), plan.columns.dtype)
            plan.fill(kernel_parts(spec, kernel), *got)
            for a, b in zip((*got, plan.pointers), (data, columns, indptr), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"depth {depth}: {geometry}")


def test_plans_whose_columns_are_not_kept(monkeypatch, rng):
    monkeypatch.setattr(host, "_KEPT", 0)
    test_every_depth_of_the_templates(rng)


def test_a_matrix_shares_nothing_with_the_next(rng):
    spec = CASES["NHWC"].spec()
    kernel = integers(rng, spec.rhs_shape, np.float64)
    first, want = fc.as_scipy(spec, kernel), fc.as_scipy(spec, kernel).toarray()
    assert first.data.base is first.indices.base is first.indptr.base  # one block, which SciPy did not copy
    for array in triple(first):
        array[:] = 1
    first.has_canonical_format = False
    second = fc.as_scipy(spec, kernel)
    assert second.has_canonical_format
    np.testing.assert_array_equal(second.toarray(), want)


LARGE = fc.conv_spec((1, 8, 24, 24), (8, 8, 3, 3), (1, 1), "SAME")  # two threads fill its arrays


def test_arrays_are_filled_while_the_second_thread_is_busy(rng):
    kernel, release = integers(rng, LARGE.rhs_shape, np.float64), threading.Event()
    want = fc.as_scipy(LARGE, kernel)
    assert LARGE.nse >= host._SHARED
    busy = host._second_thread(os.getpid()).submit(release.wait, 60)
    got = fc.as_scipy(LARGE, kernel)
    assert not busy.done()
    release.set()
    for a, b in zip(triple(got), triple(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_fills_arrays(rng):
    """It has none of the threads of its parent."""
    kernel = integers(rng, LARGE.rhs_shape, np.float64)
    want = fc.as_scipy(LARGE, kernel).data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX and Python warn of locks that other threads hold
        child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)  # ends a process that waits for ever
        equal = False
        try:
            matrix = fc.as_scipy(LARGE, kernel)
            equal, block = np.array_equal(matrix.data, want), weakref.ref(matrix.data.base)
            del matrix
            while block() is not None:  # a job that no thread takes would hold it
                time.sleep(0.01)
        finally:
            os._exit(not equal)
    assert os.waitpid(child, 0)[1] == 0


def test_an_error_in_the_second_job_is_raised():
    def fail():
        raise MemoryError

    for size in (1, host._SHARED):
        with pytest.raises(MemoryError):
            host.together(size, lambda: None, fail)


def test_one_infinite_tap_stays_in_its_own_entries(rng):
    geometry = CASES["reflect"]
    kernel = np.ones(geometry.rhs_shape, np.float32)
    kernel[0, 1, 2, 0] = np.inf
    check_host(geometry, kernel)
    check_device(geometry, kernel)


def test_nse_of_axes_too_long_to_enumerate():
    """Circular 5 taps on n positions: n * 5 pairs; reflected ones meet at both ends."""
    n = 10**12
    spec = fc.conv_spec((1, 1, n), (1, 1, 5), (1,), "SAME")
    assert spec.nse == 5 * n - 6
    assert fc.conv_spec((1, 1, n), (1, 1, 5), (1,), "SAME", padding_mode="circular").nse == 5 * n
    assert fc.conv_spec((1, 1, n), (1, 1, 5), (1,), "SAME", padding_mode="reflect").nse == 5 * n - 6
    assert fc.conv_spec((1, 1, n), (1, 1, 5), (1,), "SAME", padding_mode="edge").nse == 5 * n - 6


# transforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NHWC", "reflect"])
def test_products_under_vmap_and_their_gradients(name, rng):
    geometry = CASES[name]
    spec = geometry.spec()
    kernels = integers(rng, (3, *geometry.rhs_shape), np.float64)
    x, y = (integers(rng, shape, np.float64) for shape in (spec.in_shape, spec.out_shape))

    def products(build, kernels, x, y):
        stacked = jax.vmap(partial(build, spec))(kernels)
        return (
            jax.vmap(lambda kernel: build(spec, kernel) @ x.ravel())(kernels),
            jax.vmap(lambda matrix: matrix @ x.ravel())(stacked),
            jax.grad(lambda k: (build(spec, k) @ x.ravel() * y.ravel()).sum())(kernels[0]),
        )

    made = jax.jit(lambda *given: [products(build, *given) for build in (fc.as_bcoo, fc.as_bcsr)])
    want = [oracle.matrix(kernel, geometry) @ x.ravel() for kernel in kernels]
    for inside, outside, gradient in made(kernels, x, y):
        np.testing.assert_array_equal(inside, want)
        np.testing.assert_array_equal(outside, want)
        np.testing.assert_array_equal(gradient, oracle.kernel_gradient(x, y, geometry))


def test_no_table_of_entries_in_the_program():
    """The program of a large matrix holds no constant: its index arrays are arithmetic."""
    spec = fc.conv_spec((1, 3, 64, 64), (8, 3, 7, 7), (2, 2), "SAME")
    jaxpr = jax.make_jaxpr(partial(fc.as_bcsr, spec))(jnp.zeros(spec.rhs_shape))
    assert sum(np.size(c) for c in jaxpr.consts) < 100
    text = jax.jit(partial(fc.as_bcsr, spec)).lower(jnp.zeros(spec.rhs_shape)).as_text()
    assert len(text) < 50_000


# sizes and errors ------------------------------------------------------------------------------------


def test_nbytes_are_those_of_the_arrays(rng):
    geometry = CASES["NHWC"]
    spec, kernel = geometry.spec(), integers(rng, geometry.rhs_shape, np.float32)
    sizes, bcoo, bcsr = spec.nbytes("float32"), fc.as_bcoo(spec, kernel), fc.as_bcsr(spec, kernel)
    assert sizes.dense == fc.as_matrix(spec, kernel).nbytes
    assert sizes.bcoo == bcoo.data.nbytes + bcoo.indices.nbytes
    for matrix in (bcsr, fc.as_scipy(spec, kernel)):
        assert sizes.bcsr == sum(v.nbytes for v in triple(matrix))
    assert fc.conv_spec((1, 64, 4096, 4096), (64, 64, 3, 3), (1, 1), "SAME").nbytes().bcsr > 12 * 2**38


@pytest.mark.parametrize("verb", [fc.as_bcoo, fc.as_bcsr, fc.as_scipy, fc.diagonals, fc.row_blocks])
def test_bad_kernels(verb):
    spec = CASES["plain"].spec()
    with pytest.raises(ValueError, match=r"kernel must have the spec's shape .*got \(3, 2, 2\)"):
        verb(spec, np.ones((3, 2, 2)))
    with pytest.raises(TypeError, match="kernel must be a jax or NumPy array, got list"):
        verb(spec, [1.0])


def test_scipy_under_a_trace():
    spec = CASES["plain"].spec()
    with pytest.raises(TypeError, match="as_scipy makes NumPy arrays: use as_bcsr"):
        jax.jit(lambda kernel: fc.as_scipy(spec, kernel).data)(np.ones(spec.rhs_shape))


# diagonals -------------------------------------------------------------------------------------------


def check_diagonals(geometry, kernel, rows, found):
    spec = geometry.spec()
    matrix, pattern = oracle.matrix(kernel, geometry), oracle.pattern(geometry)
    order = np.arange(spec.out_size) if rows is None else np.array(rows, int)
    places = np.arange(spec.out_size)
    assert sorted(order) == places.tolist()
    offsets = [k for k in range(spec.in_size) if pattern[order, (places + k) % spec.in_size].any()]
    assert list(found) == offsets == fc.diagonal_offsets(spec, rows=rows).tolist()
    for k, diagonal in found.items():
        np.testing.assert_array_equal(diagonal, matrix[order, (places + k) % spec.in_size])


def test_diagonals_are_few_and_differentiable(rng):
    spec = CASES["reflect"].spec()
    kernel = integers(rng, spec.rhs_shape, np.float64)
    same = fc.conv_spec((1, 1, 32, 32), (1, 1, 3, 3), (1, 1), "SAME")
    assert len(fc.diagonals(same, np.ones((1, 1, 3, 3)))) == 9

    @jax.jit
    def gradients(kernel):
        of_diagonals = jax.grad(lambda k: sum((v**2).sum() for v in fc.diagonals(spec, k).values()))
        return of_diagonals(kernel), jax.grad(lambda k: (fc.as_matrix(spec, k) ** 2).sum())(kernel)

    np.testing.assert_array_equal(*gradients(kernel))


# in_shape, rhs_shape, strides, padding, groups; diagonals in the order of M, and interleaved
STRIDED = [
    ((16, 32, 32), (32, 16, 3, 3), (2, 2), "SAME", 1, 16384, 256),
    rarely((64, 16, 16), (128, 64, 1, 1), (2, 2), "VALID", 1, 16384, 256),
    rarely((3, 32, 32), (16, 3, 7, 7), (2, 2), [(3, 3), (3, 3)], 1, 3072, 192),
    ((3, 16, 16), (48, 3, 4, 4), (4, 4), "VALID", 1, 768, 147),
    ((32, 16, 16), (32, 1, 3, 3), (2, 2), [(1, 1), (1, 1)], 32, 5921, 260),
]


@pytest.mark.parametrize(("in_shape", "kernel", "strides", "padding", "groups", "before", "after"), STRIDED)
def test_diagonals_of_strided_layers(in_shape, kernel, strides, padding, groups, before, after, rng):
    spec = fc.conv_spec((1, *in_shape), kernel, strides, padding, feature_group_count=groups)
    rows = fc.interleaved_rows(spec)
    assert len(fc.diagonal_offsets(spec)) == before
    assert len(fc.diagonal_offsets(spec, rows=rows)) == after
    if groups == 1:
        assert after == in_shape[0] * np.prod(np.add(kernel[2:], strides) - 1)
    d, h, w = spec.out_shape
    s, t = strides
    numbers = np.arange(spec.out_size).reshape(d // (s * t), s, t, h, w)
    np.testing.assert_array_equal(rows, numbers.transpose(0, 3, 1, 4, 2).ravel())  # PixelShuffle
    kernel, x = integers(rng, spec.rhs_shape), integers(rng, (spec.in_size,))
    y, places = np.zeros(spec.out_size, x.dtype), np.arange(spec.out_size)
    for offset, diagonal in fc.diagonals(spec, kernel, rows=rows).items():
        y[rows] += np.asarray(diagonal) * x[(places + offset) % spec.in_size]
    np.testing.assert_array_equal(y, fc.as_scipy(spec, kernel) @ x)


def test_orders_of_rows_that_are_none():
    spec = CASES["plain"].spec()
    kernel, n = np.ones(spec.rhs_shape), spec.out_size
    for rows in (range(n - 1), [0] * n, np.arange(1, n + 1), np.arange(n)[None]):
        with pytest.raises(ValueError, match=rf"rows must be a permutation of range\({n}\)"):
            fc.diagonals(spec, kernel, rows=rows)
    with pytest.raises(TypeError, match=r"diagonal_offsets: rows must be integers.*Write interleaved_rows"):
        fc.diagonal_offsets(spec, rows=np.arange(n) / 2)
    with pytest.raises(TypeError, match="rows must be static integers, got a traced"):
        jax.jit(lambda rows: fc.diagonals(spec, kernel, rows=rows))(np.arange(n))
    for call in (fc.diagonal_offsets, fc.interleaved_rows):
        with pytest.raises(TypeError, match="spec must be a ConvSpec"):
            call((1, 2))


# row blocks ------------------------------------------------------------------------------------------


def check_block(geometry, start, stop, kernel):
    spec = geometry.spec()
    block, in_slice, out_slice = fc.row_block(spec, start, stop)
    whole = oracle.matrix(kernel, geometry).reshape(*spec.out_shape, *spec.in_shape)
    rows, rest = whole[out_slice], whole[out_slice].copy()
    read = (slice(None),) * len(spec.out_shape) + in_slice
    rest[read] = 0
    assert not rest.any(), "the block does not read all of its rows' inputs"
    assert block.out_shape == rows.shape[: len(spec.out_shape)]
    np.testing.assert_array_equal(fc.as_scipy(block, kernel).toarray(), rows[read].reshape(block.shape))


def test_row_blocks_of_random_geometries(run_seed):
    cut = 0
    for n in range(10 * COUNT):
        rng = np.random.default_rng([run_seed, n])
        geometry = random_geometry(rng)
        spec, kernel = geometry.spec(), integers(rng, geometry.rhs_shape)
        if not spec.axes or not spec.axes[0].out_size:
            continue
        start, stop = sorted(rng.choice(spec.axes[0].out_size + 1, 2, replace=False).tolist())
        end, grain = spec.axes[0].out_size, spec.axes[0].grain
        if start % grain or (stop % grain and stop != end):
            assert spec.padding_mode != "zeros"
            assert spec.lhs_dilation[0] > 1
            with pytest.raises(ValueError, match=f"pads before it dilates.*multiples of {grain}"):
                fc.row_block(spec, start, stop)
            start, stop = start // grain * grain, min(end, -(-stop // grain) * grain)
        check_block(geometry, start, stop, kernel)
        cut += 1
    assert cut > COUNT


@pytest.mark.parametrize("mode", drawn(["circular", "reflect", "symmetric", "edge"], 2))
def test_a_block_of_a_boundary_mode_is_right_in_every_room(mode, rng):
    """Its padding may be negative, which crops after padding: dense, the products and BCSR agree on it."""
    geometry = Geometry((1, 2, 9, 3), (2, 2, 4, 2), (1, 1), [(3, 4), (1, 1)], padding_mode=mode)
    spec, kernel = geometry.spec(), integers(rng, geometry.rhs_shape, np.float64)
    x = integers(rng, spec.in_shape, np.float64)
    y = oracle.product(x, kernel, geometry)
    blocks = [fc.row_block(spec, *rows) for rows in ((0, 4), (3, 6), (5, spec.axes[0].out_size))]

    @jax.jit
    def rooms(kernel, x, y):
        return [
            (fc.as_matrix(block, kernel), fc.as_bcsr(block, kernel).todense(),
             fc.apply(block, kernel, x[in_slice]), fc.apply_transpose(block, kernel, y[out_slice]))
            for block, in_slice, out_slice in blocks
        ]  # fmt: skip

    for (block, _, out_slice), (dense, sparse, ahead, back) in zip(blocks, rooms(kernel, x, y), strict=True):
        matrix = fc.as_scipy(block, kernel).toarray()
        np.testing.assert_array_equal(dense, matrix)
        np.testing.assert_array_equal(sparse, matrix)
        np.testing.assert_array_equal(ahead, y[out_slice])
        np.testing.assert_array_equal(back.ravel(), matrix.T @ y[out_slice].ravel())


@pytest.mark.parametrize("mode", ["circular", "reflect", "symmetric", "edge"])
def test_blocks_that_end_between_two_inputs(mode, rng):
    """Stride 2 over inputs 3 apart: the last window of a block ends in a hole, short of the next input."""
    geometry = Geometry((1, 1, 7), (1, 1, 2), (2,), [(2, 3)], (3,), padding_mode=mode)
    spec, kernel = geometry.spec(), integers(rng, geometry.rhs_shape)
    assert spec.axes[0].grain == 3
    for start, stop in ((0, 3), (3, 6), (6, 15), (0, spec.axes[0].out_size), (9, spec.axes[0].out_size)):
        check_block(geometry, start, stop, kernel)


@every_case
def test_streaming(geometry, rng):
    spec, kernel = geometry.spec(), integers(rng, geometry.rhs_shape)
    x, y = integers(rng, spec.in_shape), np.full(spec.out_shape, -99)
    done = []
    limit = max(1200, spec.nbytes(kernel.dtype).bcsr // 2)
    for block in fc.row_blocks(spec, kernel, limit, progress=lambda *at: done.append(at)):
        assert sum(v.nbytes for v in triple(block.matrix)) <= limit
        y[block.out_slice] = (block.matrix @ x[block.in_slice].ravel()).reshape(block.spec.out_shape)
    np.testing.assert_array_equal(y, oracle.product(x, kernel, geometry))
    if spec.out_size:
        assert done[-1][0] == done[-1][1]
        assert [at for at, _ in done] == sorted({at for at, _ in done})


def test_bad_blocks():
    spec = CASES["plain"].spec()
    for start, stop in ((2, 2), (-1, 2), (0, 5), (3, 1)):
        with pytest.raises(ValueError, match="0 <= start < stop <= 4"):
            fc.row_block(spec, start, stop)
    with pytest.raises(TypeError, match="start must be an int"):
        fc.row_block(spec, 0.0, 2)
    with pytest.raises(ValueError, match="has none"):
        fc.row_block(CASES["no spatial axes"].spec(), 0, 1)
    with pytest.raises(ValueError, match=r"nbytes=100 holds no block.*Write nbytes=\d+ or more"):
        fc.row_blocks(spec, np.ones(spec.rhs_shape), 100)


@pytest.mark.parametrize("name", ["plain", "reflect", "NHWC", "padded, then dilated"])
def test_the_least_block_that_is_named_is_the_least(name, rng):
    geometry = CASES[name]
    spec, kernel = geometry.spec(), integers(rng, geometry.rhs_shape)
    with pytest.raises(ValueError, match=r"Write nbytes=\d+ or more") as caught:
        fc.row_blocks(spec, kernel, 1)
    least = int(str(caught.value).split("Write nbytes=")[1].split()[0])
    with pytest.raises(ValueError, match=f"Write nbytes={least} or more"):
        fc.row_blocks(spec, kernel, least - 1)
    sizes = [sum(v.nbytes for v in triple(block.matrix)) for block in fc.row_blocks(spec, kernel, least)]
    assert max(sizes) == least


# examples --------------------------------------------------------------------------------------------


def test_matrix_market_example(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["matrix_market.py", str(tmp_path / "conv.mtx")])
    runpy.run_path(str(EXAMPLES / "matrix_market.py"), run_name="__main__")
    assert "read back equal" in capsys.readouterr().out


def test_streaming_example(monkeypatch, capsys):
    arguments = ["--size", "16", "--channels", "4", "--megabytes", "0.05"]
    monkeypatch.setattr("sys.argv", ["streaming.py", *arguments])
    runpy.run_path(str(EXAMPLES / "streaming.py"), run_name="__main__")
    assert "equal to the convolution" in capsys.readouterr().out

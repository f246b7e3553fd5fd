"""The dense matrix, its rows and columns: every dtype and every transform."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import CASES, Geometry, arrays, geometries, integers, normals, seeds
from hypothesis import given

import jaxconv_fc as fc

FLOATS = ("float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

PLAIN = CASES["plain"]
every_name = pytest.mark.parametrize("name", CASES)
SOME = {name: CASES[name] for name in ("strided, dilated, lopsided", "batch groups", "colliding", "no rows")}
some_cases = pytest.mark.parametrize("geometry", SOME.values(), ids=SOME)


def test_no_case_is_empty_by_accident():
    """Strides and dilations can agree in such a way that every tap falls between the inputs."""
    assert {name for name, geometry in CASES.items() if not geometry.spec().nse} == {"no rows", "no columns"}


@cache
def verbs(name):
    """All that is tested of a case with random arrays, as one program, which the tests share."""
    spec = CASES[name].spec()
    build = partial(fc.as_matrix, spec)

    def of(kernel, tangent, cotangent, bias, rows, columns):
        matrix, pushed = jax.jvp(build, (kernel,), (tangent,))
        (pulled,) = jax.linear_transpose(build, kernel)(cotangent)
        return {
            "matrix": matrix,
            "jvp": pushed,
            "transpose": pulled,
            "grad": jax.grad(lambda k: (build(k) * cotangent).sum())(kernel),
            "affine": fc.as_affine(spec, kernel, bias),
            "every row": fc.matrix_rows(spec, kernel, np.arange(spec.out_size)),
            "every column": fc.matrix_columns(spec, kernel, np.arange(spec.in_size)),
            "rows": fc.matrix_rows(spec, kernel, rows),
            "columns": fc.matrix_columns(spec, kernel, columns),
            "update": fc.update_matrix(spec, build(tangent), kernel),
        }

    return jax.jit(of)


def given_to(name, rng):
    """Whole numbers for the program above: kernel, tangent, cotangent, a bias per channel, and indices, some
    of them negative."""
    geometry = CASES[name]
    spec, out_channels = geometry.spec(), geometry.rhs_shape[oracle.layouts(geometry)[1][0]]
    shapes = geometry.rhs_shape, geometry.rhs_shape, spec.shape, (out_channels,)
    indices = (rng.integers(-size, size, 4) if size else np.array([], int) for size in spec.shape)
    return [*(integers(rng, shape, np.float64) for shape in shapes), *indices]


# values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [[*FLOATS, *COMPLEX], [*INTEGERS, "bool"]], ids=["inexact", "exact"])
@pytest.mark.parametrize("name", ["strided, dilated, lopsided", "colliding"])
def test_every_dtype(name, dtypes, rng):
    """M, two rows and two columns: one program for several dtypes."""
    geometry = CASES[name]
    kernels = [integers(rng, geometry.rhs_shape, dtype) for dtype in dtypes]

    @jax.jit
    def build(kernels):
        spec = geometry.spec()
        return [(fc.as_matrix(spec, k), *(f(spec, k, [1, 0]) for f in TAKE)) for k in kernels]

    for kernel, made in zip(kernels, build(kernels), strict=True):
        assert {v.dtype for v in made} == {kernel.dtype}
        matrix = oracle.matrix(kernel, geometry)
        for got, want in zip(made, (matrix, matrix[[1, 0]], matrix[:, [1, 0]]), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_colliding_integers_wrap_as_in_numpy(dtype):
    geometry = Geometry((1, 1, 1), (1, 1, 2), (1,), [(0, 1)], padding_mode="edge")
    kernel = np.full((1, 1, 2), 100, dtype)
    with np.errstate(over="ignore"):
        want = (kernel[..., 0] + kernel[..., 1]).reshape(1, 1)
    np.testing.assert_array_equal(fc.as_matrix(geometry.spec(), kernel), want)


def test_colliding_bools_are_ored():
    """A bool kernel marks the taps that may be other than 0, and its matrix the entries that may be."""
    geometry = CASES["colliding"]
    kernel = np.random.default_rng(3).integers(0, 2, geometry.rhs_shape).astype(bool)
    matrix = np.asarray(fc.as_matrix(geometry.spec(), kernel))
    assert matrix.dtype == bool
    np.testing.assert_array_equal(matrix, oracle.matrix(kernel, geometry))


@given(geometries(), seeds)
def test_random_geometries(geometry, seed):
    kernel, _, _ = arrays(geometry, np.random.default_rng(seed))
    np.testing.assert_array_equal(fc.as_matrix(geometry.spec(), kernel), oracle.matrix(kernel, geometry))


@pytest.mark.parametrize("value", [np.inf, np.nan])
@every_name
def test_a_tap_that_is_not_finite_leaves_structural_zeros_alone(name, value, rng):
    geometry, (kernel, *rest) = CASES[name], given_to(name, rng)
    kernel.ravel()[0] = value
    matrix = np.asarray(verbs(name)(kernel, *rest)["matrix"])
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(matrix, oracle.matrix(kernel, geometry))
    assert (matrix[~oracle.pattern(geometry)] == 0).all()


def test_a_negative_zero_nowhere():
    """Structural zeros are +0, so that 1/M and printing show no signs."""
    matrix = np.asarray(fc.as_matrix(PLAIN.spec(), np.full(PLAIN.rhs_shape, -1.0)))
    assert not np.signbit(matrix[~oracle.pattern(PLAIN)]).any()


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_numpy_and_jax_kernels(kind, rng):
    kernel = integers(rng, PLAIN.rhs_shape, np.float32)
    matrix = fc.as_matrix(PLAIN.spec(), kind(kernel))
    assert isinstance(matrix, jax.Array)
    np.testing.assert_array_equal(matrix, oracle.matrix(kernel, PLAIN))


# linear in the kernel --------------------------------------------------------------------------------


@every_name
def test_linear_in_the_kernel(name, rng):
    """jvp, grad and linear_transpose with respect to the kernel, against the oracle's adjoint."""
    geometry, given = CASES[name], given_to(name, rng)
    kernel, tangent, cotangent = given[:3]
    made, gradient = verbs(name)(*given), oracle.matrix_gradient(cotangent, geometry)
    np.testing.assert_array_equal(made["matrix"], oracle.matrix(kernel, geometry))
    np.testing.assert_array_equal(made["jvp"], oracle.matrix(tangent, geometry))
    np.testing.assert_array_equal(made["transpose"], gradient)
    np.testing.assert_array_equal(made["grad"], gradient)


def test_second_derivative_of_a_quadratic(rng):
    """d^2 ||M||_F^2 is twice the number of entries each tap fills, on the diagonal."""
    kernel = jnp.asarray(normals(rng, (1, 1, 3)))
    spec = fc.conv_spec((1, 1, 5), (1, 1, 3), (1,), "SAME")
    hessian = jax.jit(jax.hessian(lambda k: (fc.as_matrix(spec, k) ** 2).sum()))(kernel)
    np.testing.assert_array_equal(hessian.reshape(3, 3), 2 * np.diag([4.0, 5.0, 4.0]))


@pytest.mark.parametrize("dtype", COMPLEX)
def test_the_complex_adjoint_is_the_plain_transpose(dtype, rng):
    build = partial(fc.as_matrix, PLAIN.spec())
    kernel = integers(rng, PLAIN.rhs_shape, dtype)
    cotangent = integers(rng, oracle.matrix_shape(PLAIN), dtype)
    (pulled,) = jax.linear_transpose(build, kernel)(cotangent)
    np.testing.assert_array_equal(pulled, oracle.matrix_gradient(cotangent, PLAIN))


@some_cases
def test_vmap_over_kernels_and_jit(geometry, rng):
    """A stack of matrices; jit, vmap, jit of vmap and vmap of jit all agree exactly."""
    spec = geometry.spec()
    kernels = integers(rng, (3, *geometry.rhs_shape), np.float32)
    want = np.stack([oracle.matrix(kernel, geometry) for kernel in kernels])
    stacked = jax.vmap(fc.as_matrix, (None, 0))
    np.testing.assert_array_equal(stacked(spec, kernels), want)
    np.testing.assert_array_equal(jax.jit(stacked)(spec, kernels), want)
    np.testing.assert_array_equal(jax.vmap(partial(jax.jit(fc.as_matrix), spec))(kernels), want)
    np.testing.assert_array_equal(jax.jit(fc.as_matrix)(spec, kernels[0]), want[0])


def test_vmap_over_another_axis(rng):
    kernels = integers(rng, (*PLAIN.rhs_shape, 2), np.float32)
    stacked = jax.vmap(partial(fc.as_matrix, PLAIN.spec()), in_axes=-1, out_axes=1)(kernels)
    assert stacked.shape == (PLAIN.spec().out_size, 2, PLAIN.spec().in_size)
    np.testing.assert_array_equal(stacked[:, 1], oracle.matrix(kernels[..., 1], PLAIN))


# as_affine -------------------------------------------------------------------------------------------


@every_name
def test_affine_with_a_bias_per_channel(name, rng):
    geometry, given = CASES[name], given_to(name, rng)
    spec, kernel, bias, out = geometry.spec(), given[0], given[3], oracle.layouts(geometry)[2]
    x = integers(rng, spec.in_shape, np.float64)
    channel_axis = out[1] - (out[0] < out[1])
    per_entry = np.expand_dims(bias, [a for a in range(len(spec.out_shape)) if a != channel_axis])
    matrix, vector = map(np.asarray, verbs(name)(*given)["affine"])
    assert vector.shape == (spec.out_size,)
    np.testing.assert_array_equal(matrix, oracle.matrix(kernel, geometry))
    want = oracle.product(x, kernel, geometry) + per_entry
    np.testing.assert_array_equal((matrix @ x.ravel() + vector).reshape(spec.out_shape), want)


@some_cases
def test_affine_with_a_bias_map(geometry, rng):
    kernel, _, bias = arrays(geometry, rng, np.float32)
    _, vector = fc.as_affine(geometry.spec(), kernel, bias)
    np.testing.assert_array_equal(vector, bias.ravel())
    assert vector.dtype == np.float32


def test_affine_under_jit_vmap_and_grad(rng):
    spec = PLAIN.spec()
    kernels, biases = normals(rng, (2, *PLAIN.rhs_shape)), normals(rng, (2, 3))
    matrices, vectors = jax.jit(jax.vmap(fc.as_affine, (None, 0, 0)))(spec, kernels, biases)
    for i in range(2):
        matrix, vector = fc.as_affine(spec, kernels[i], biases[i])
        np.testing.assert_array_equal(matrices[i], matrix)
        np.testing.assert_array_equal(vectors[i], vector)
    slope = jax.grad(lambda bias: fc.as_affine(spec, kernels[0], bias)[1].sum())(jnp.asarray(biases[0]))
    np.testing.assert_array_equal(slope, np.full(3, spec.out_size / 3))


# rows and columns ------------------------------------------------------------------------------------

PARTS = {"rows": (fc.matrix_rows, 0), "columns": (fc.matrix_columns, 1)}
TAKE = (fc.matrix_rows, fc.matrix_columns)
both_parts = pytest.mark.parametrize("part", PARTS)


@every_name
def test_all_rows_and_all_columns_and_traced_indices(name, rng):
    """Static indices, and traced ones of which some are negative."""
    given = given_to(name, rng)
    kernel, rows, columns = given[0], *given[-2:]
    made, matrix = verbs(name)(*given), oracle.matrix(kernel, CASES[name])
    parts = {"every row": matrix, "every column": matrix, "rows": matrix[rows], "columns": matrix[:, columns]}
    for part, want in parts.items():
        assert made[part].dtype == kernel.dtype
        np.testing.assert_array_equal(made[part], want, err_msg=part)


INDICES = {
    "list": [5, 0, 5],
    "tuple": (3,),
    "numpy": np.array([2, 2, 7]),
    "unsigned": np.array([2, 7], np.uint8),
    "int32": np.array([1, 0], np.int32),
    "jax": jnp.array([4, 1]),
    "range": range(1, 6, 2),
    "negative": [-1, -2, 0],
    "empty": [],
    "empty array": np.array([], np.int32),
}


@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
@both_parts
def test_kinds_of_indices(part, indices, rng):
    take, axis = PARTS[part]
    kernel = integers(rng, PLAIN.rhs_shape)
    want = np.take(oracle.matrix(kernel, PLAIN), np.asarray(indices, np.int64), axis=axis)
    got = take(PLAIN.spec(), kernel, indices)
    assert got.shape == want.shape
    np.testing.assert_array_equal(got, want)


@both_parts
def test_parts_under_vmap(part, rng):
    take, axis = PARTS[part]
    kernels, indices = integers(rng, (2, *PLAIN.rhs_shape)), np.array([[0, 3], [-1, 5]])
    want = [np.take(oracle.matrix(k, PLAIN), i, axis=axis) for k, i in zip(kernels, indices, strict=True)]
    np.testing.assert_array_equal(jax.vmap(take, (None, 0, 0))(PLAIN.spec(), kernels, indices), want)
    one = jax.vmap(take, (None, 0, None))(PLAIN.spec(), kernels, indices[0])
    np.testing.assert_array_equal(one[0], want[0])


@some_cases
@both_parts
def test_parts_are_linear_in_the_kernel(part, geometry, rng):
    take, axis = PARTS[part]
    kernel = integers(rng, geometry.rhs_shape, np.float64)
    size = oracle.matrix_shape(geometry)[axis]
    indices = np.arange(min(3, size))
    whole = np.zeros(oracle.matrix_shape(geometry))
    part_of_whole = np.moveaxis(whole, axis, 0)[: len(indices)]  # a view
    part_of_whole[:] = integers(rng, part_of_whole.shape, np.float64)
    cotangent = np.moveaxis(part_of_whole, 0, axis)
    want = oracle.matrix_gradient(whole, geometry)

    def build(kernel):
        return take(geometry.spec(), kernel, indices)

    @jax.jit
    def both(kernel, cotangent):
        (pulled,) = jax.linear_transpose(build, kernel)(cotangent)
        return pulled, jax.grad(lambda k: (build(k) * cotangent).sum())(kernel)

    for got in both(kernel, cotangent):
        np.testing.assert_array_equal(got, want)


@both_parts
def test_parts_keep_structural_zeros(part):
    take, axis = PARTS[part]
    kernel = np.full(PLAIN.rhs_shape, np.inf, np.float32)
    want = np.take(oracle.matrix(kernel, PLAIN), [0, 4], axis=axis)
    np.testing.assert_array_equal(take(PLAIN.spec(), kernel, [0, 4]), want)


@pytest.mark.parametrize("index", [10**9, -(10**9), "size", "-size-1"])
@both_parts
def test_a_concrete_index_out_of_range_raises(part, index):
    take, axis = PARTS[part]
    size = PLAIN.spec().shape[axis]
    index = {"size": size, "-size-1": -size - 1}.get(index, index)
    with pytest.raises(IndexError, match=part) as caught:
        take(PLAIN.spec(), np.ones(PLAIN.rhs_shape), [0, index])
    assert str(index) in str(caught.value)
    assert str(size) in str(caught.value)


@pytest.mark.parametrize("indices", [[0.5], np.array([1.0]), "ab", None, [[0, 1]]])
@both_parts
def test_indices_of_a_wrong_kind_raise(part, indices):
    with pytest.raises((TypeError, ValueError), match=part):
        PARTS[part][0](PLAIN.spec(), np.ones(PLAIN.rhs_shape), indices)


@pytest.mark.parametrize("dtype", ["float32", "complex64", "int16", "uint8", "bool"])
@both_parts
def test_a_traced_index_out_of_range_is_filled_as_take_fills_it(part, dtype):
    take, axis = PARTS[part]
    spec, kernel = PLAIN.spec(), np.ones(PLAIN.rhs_shape).astype(dtype)
    size = spec.shape[axis]
    indices = np.array([0, size, -1, -size, -size - 1, 10**6, -(10**6)])
    want = jnp.take(jnp.asarray(oracle.matrix(kernel, PLAIN)), indices, axis=axis)
    np.testing.assert_array_equal(jax.jit(take)(spec, kernel, indices), want)


@pytest.mark.parametrize("mode", ["edge", "reflect", "symmetric", "circular"])
def test_columns_where_some_inputs_have_more_copies_than_others(mode, rng):
    geometry = Geometry((1, 2, 3), (2, 2, 2), (1,), [(2, 1)], padding_mode=mode)
    kernel = integers(rng, geometry.rhs_shape)
    got = fc.matrix_columns(geometry.spec(), kernel, range(6))
    np.testing.assert_array_equal(got, oracle.matrix(kernel, geometry))


LAYER = Geometry((1, 64, 56, 56), (64, 64, 3, 3), (1, 1), "SAME")  # M of it would take 161 GB


@both_parts
def test_the_cost_is_that_of_the_part(part, rng):
    """Two rows of a matrix of 4e10 entries: right, and with working memory like the result's."""
    take, _ = PARTS[part]
    spec, kernel = LAYER.spec(), normals(rng, LAYER.rhs_shape, np.float32)
    indices = np.array([3, 32 * 56 * 56 + 29 * 56 + 29])  # a corner, and one that no border cuts
    program = jax.jit(take).lower(spec, kernel, indices).compile()
    result = program(spec, kernel, indices)
    assert result.size == 2 * spec.in_size
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * result.nbytes + 4 * kernel.nbytes
    assert program.as_text().count("while(") <= 2  # a loop over all of M would show
    probe = np.asarray(result) if part == "rows" else np.asarray(result).T
    assert np.count_nonzero(probe[1]) == 64 * 9


def test_big_rows_are_the_kernel_laid_out(rng):
    spec, kernel = LAYER.spec(), normals(rng, LAYER.rhs_shape, np.float32)
    row = fc.matrix_rows(spec, kernel, [7 * 56 * 56 + 10 * 56 + 20])[0].reshape(64, 56, 56)
    want = np.zeros((64, 56, 56), np.float32)
    want[:, 9:12, 19:22] = kernel[7]
    np.testing.assert_array_equal(row, want)
    column = fc.matrix_columns(spec, kernel, [7 * 56 * 56 + 10 * 56 + 20])[:, 0].reshape(64, 56, 56)
    want = np.zeros((64, 56, 56), np.float32)
    want[:, 9:12, 19:22] = kernel[:, 7, ::-1, ::-1]
    np.testing.assert_array_equal(column, want)


# rewriting the entries of an earlier M ---------------------------------------------------------------


@every_name
def test_update_matrix(name, rng):
    given = given_to(name, rng)
    np.testing.assert_array_equal(verbs(name)(*given)["update"], oracle.matrix(given[0], CASES[name]))


@pytest.mark.parametrize("name", ["plain", "colliding"])
def test_update_matrix_uses_the_donated_buffer(name, rng):
    spec = CASES[name].spec()
    first, second = (integers(rng, spec.rhs_shape, np.float32) for _ in range(2))
    matrix = fc.as_matrix(spec, first)
    update = jax.jit(partial(fc.update_matrix, spec), donate_argnums=0).lower(matrix, second).compile()
    assert update.memory_analysis().alias_size_in_bytes == matrix.nbytes
    np.testing.assert_array_equal(update(matrix, second), oracle.matrix(second, CASES[name]))


def test_update_matrix_with_bad_operands():
    spec = CASES["plain"].spec()
    kernel = np.ones(spec.rhs_shape, np.float32)
    matrix = fc.as_matrix(spec, kernel)
    with pytest.raises(TypeError, match=r"kernel\.astype\(matrix\.dtype\)"):
        fc.update_matrix(spec, matrix, kernel.astype(np.float64))
    with pytest.raises(ValueError, match="matrix must have the spec's shape"):
        fc.update_matrix(spec, matrix[1:], kernel)


# programs and memory ---------------------------------------------------------------------------------


def test_no_index_array_is_baked_into_the_program():
    """The indices of 4e10 entries come from tables of a few hundred, broadcast inside the trace."""
    kernel = jax.ShapeDtypeStruct(LAYER.rhs_shape, np.float32)
    with fc.memory_limit(2**40):
        text = jax.jit(fc.as_matrix).lower(LAYER.spec(), kernel).as_text()
    assert len(text) < 50_000
    assert "scatter" in text


@pytest.mark.parametrize("name", ["plain", "colliding"])
def test_indices_are_called_unique_where_they_are(name):
    """True is fast on a GPU. Where taps add up it must be false, or a GPU may lose some of them."""
    spec = CASES[name].spec()
    text = jax.jit(fc.as_matrix).lower(spec, jax.ShapeDtypeStruct(spec.rhs_shape, np.float32)).as_text()
    said = re.findall(r"unique_indices = (true|false)", text)
    assert set(said) == {"false" if name == "colliding" else "true"}


def test_the_text_does_not_grow_with_the_geometry():
    def size(n):
        spec = fc.conv_spec((1, 8, n, n), (8, 8, 3, 3), (1, 1), "SAME")
        kernel = jax.ShapeDtypeStruct(spec.rhs_shape, np.float32)
        return len(jax.jit(fc.as_matrix).lower(spec, kernel).as_text())

    assert size(48) < size(12) + 2_000


@pytest.mark.parametrize("numbers", [None, ("NHWC", "HWIO", "NHWC")])
def test_rows_and_columns_by_the_indices_of_their_neurons(numbers, rng):
    shapes = ((1, 3, 4, 5), (2, 3, 2, 2)) if numbers is None else ((1, 4, 5, 3), (2, 2, 3, 2))
    spec = fc.conv_spec(*shapes, (1, 2), "SAME", dimension_numbers=numbers)
    kernel = jnp.asarray(integers(rng, spec.rhs_shape))
    matrix = np.asarray(fc.as_matrix(spec, kernel))
    for part, shape in ((fc.matrix_rows, spec.out_shape), (fc.matrix_columns, spec.in_shape)):
        whole = matrix if part is fc.matrix_rows else matrix.T
        at = [(0, 1, 0), (1, -1, 1), tuple(n - 1 for n in shape)]
        want = whole[[np.ravel_multi_index(np.mod(index, shape), shape) for index in at]]
        for got in (part(spec, kernel, at), jax.jit(partial(part, spec, kernel))(jnp.asarray(at))):
            np.testing.assert_array_equal(got if part is fc.matrix_rows else got.T, want)
        with pytest.raises(IndexError, match=r"\[:, 1\] must lie in"):
            part(spec, kernel, [(0, shape[1], 0)])
        outside = jax.jit(partial(part, spec, kernel.astype(float)))(jnp.array([[0, shape[1], 0]]))
        assert np.isnan(outside).all()
        assert part(spec, kernel, np.zeros((0, 3), int)).size == 0


@both_parts
def test_too_many_rows_are_refused(part):
    spec, indices = LAYER.spec(), np.zeros(50_000, int)
    with pytest.raises(ValueError, match="float32"):
        jax.eval_shape(partial(PARTS[part][0], spec), np.ones(spec.rhs_shape, np.float32), indices)


def test_with_x64_off(rng):
    """The ordinary setting of a user: the same matrix, in float32."""
    kernel = integers(rng, PLAIN.rhs_shape, np.float32)
    with jax.enable_x64(False):
        matrix = fc.as_matrix(PLAIN.spec(), kernel)
        rows = fc.matrix_rows(PLAIN.spec(), kernel, [0, -1])
        columns = fc.matrix_columns(PLAIN.spec(), kernel, np.array([1, 2]))
    want = oracle.matrix(kernel, PLAIN)
    np.testing.assert_array_equal(matrix, want)
    np.testing.assert_array_equal(rows, want[[0, -1]])
    np.testing.assert_array_equal(columns, want[:, [1, 2]])

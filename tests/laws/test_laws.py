"""Laws that hold across the library, and thousands of random geometries compared with the oracle.

All products agree, apply_transpose is the adjoint, M has the structure of its geometry, and the transforms
of JAX change nothing. test_pitfalls.py shows that M is right where JAX is wrong.
"""

import dataclasses
import itertools
from functools import partial

import jax
import numpy as np
import oracle
import pytest
from environment import count, numbers
from geometries import MODES, Geometry, arrays, geometries, integers, normals, random_geometry, seeds
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxconv_fc as fc

# 1. the products agree -------------------------------------------------------------------------------

COUNT = count("GEOMETRIES", 16)  # of every chunk an eighth
CHUNKS = numbers(8, 24)


@jax.jit
def everything(spec, kernel, x, y):
    """One program per geometry: compiling is what the random test spends its time on."""
    return (
        fc.as_matrix(spec, kernel),
        fc.apply(spec, kernel, x),
        fc.apply_transpose(spec, kernel, y),
    )


@pytest.mark.parametrize("chunk", CHUNKS)
def test_random_geometries_against_the_oracle(chunk, run_seed):
    """as_matrix, M x, apply and apply_transpose on whole numbers: equal, not close."""
    for i in range(COUNT * chunk // 8, COUNT * (chunk + 1) // 8):
        if i % 50 == 49:  # thousands of programs would fill the memory
            jax.clear_caches()
        rng = np.random.default_rng([run_seed, i])
        geometry = random_geometry(rng)
        kernel, x, y = arrays(geometry, rng, (np.int32, np.float32, np.int64)[i % 3])
        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {geometry}"
        matrix, ahead, back = map(np.asarray, everything(geometry.spec(), kernel, x, y))
        want = oracle.matrix(kernel, geometry)
        assert (matrix.dtype, matrix.shape) == (want.dtype, want.shape), replay
        assert (matrix == want).all(), replay
        assert ahead.shape == oracle.out_shape(geometry), replay
        assert back.shape == oracle.in_shape(geometry), replay
        # the oracle's convolution uses no matrix, so this compares M x with the definition too
        assert (oracle.product(x, kernel, geometry).ravel() == matrix @ x.ravel()).all(), replay
        assert (ahead.ravel() == matrix @ x.ravel()).all(), replay
        assert (back.ravel() == matrix.T @ y.ravel()).all(), replay


@given(geometries(), seeds, st.sampled_from(["float32", "float64", "complex64"]))
def test_rounding_of_random_geometries(geometry, seed, dtype):
    spec = geometry.spec()
    kernel, x, y = arrays(geometry, np.random.default_rng(seed), dtype, normals)
    matrix, ahead, back = everything(spec, kernel, x, y)
    oracle.assert_matrix(matrix, kernel, geometry)
    oracle.assert_product(ahead, kernel, x, geometry)
    oracle.assert_transpose_product(back, kernel, y, geometry)


# lhs_dilation stays out: some such geometries abort the process inside lax (test_pitfalls.py has one)
@given(geometries(modes=("zeros",)).filter(lambda g: g.lhs_dilation is None), seeds)
def test_lax_in_float64_agrees(geometry, seed):
    """A whole batch through lax; each of its examples through M and through apply."""
    rng = np.random.default_rng(seed)
    spec, out = geometry.spec(), oracle.layouts(geometry)[2]
    kernel = integers(rng, geometry.rhs_shape, np.float64)
    xs = integers(rng, geometry.lhs_shape, np.float64)
    with jax.default_device(jax.devices("cpu")[0]):  # a GPU has no more than 3 spatial dimensions
        ys = lax.conv_general_dilated(xs, kernel, *geometry.arguments())
    matrix, examples = oracle.matrix(kernel, geometry), oracle.examples(xs, geometry)
    built, ahead = jax.jit(
        lambda k, examples: (fc.as_matrix(spec, k), [fc.apply(spec, k, x) for x in examples])
    )(kernel, examples)
    np.testing.assert_array_equal(built, matrix)
    for j, (x, got) in enumerate(zip(examples, ahead, strict=True)):
        y = np.take(np.asarray(ys), j, axis=out[0])
        np.testing.assert_array_equal(matrix @ x.ravel(), y.ravel())
        np.testing.assert_array_equal(got, y)


# 3. the adjoint --------------------------------------------------------------------------------------


@given(geometries(), seeds, st.sampled_from([np.float64, np.complex128]))
def test_the_adjoint_four_ways(geometry, seed, dtype):
    """apply_transpose, M^T y, linear_transpose(apply), and <M x, y> == <x, M^T y>, all exactly."""
    spec = geometry.spec()
    kernel, x, y = arrays(geometry, np.random.default_rng(seed), dtype)

    @jax.jit
    def ways(kernel, x, y):
        transposed = jax.linear_transpose(partial(fc.apply, spec, kernel), x)(y)[0]
        return *everything(spec, kernel, x, y), transposed, fc.apply_transpose(spec, kernel, y.conj())

    matrix, ahead, back, transposed, hermitian = map(np.asarray, ways(kernel, x, y))
    np.testing.assert_array_equal(back.ravel(), matrix.T @ y.ravel())
    np.testing.assert_array_equal(back, transposed)
    assert (ahead * y).sum() == (x * back).sum()
    # the inner product of complex spaces conjugates, so its adjoint is M^H y = conj(M^T conj(y))
    assert np.vdot(ahead, y) == np.vdot(x, hermitian.conj())


# 6. the structure of M -------------------------------------------------------------------------------


def block_diagonal(blocks):
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    result = np.zeros((rows, columns), blocks[0].dtype)
    row = column = 0
    for block in blocks:
        result[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["feature", "batch"])
def test_groups_are_a_block_diagonal(kind, mode, rng):
    """In NC... and OI... layouts; a batch group is a feature group whose channels lie in the batch."""
    groups, c, o, rest = 3, 2, 2, ((2,), [(1, 2)], None, (2,))
    kernel = integers(rng, (groups * o, c, 3))
    single = fc.conv_spec((1, c, 5), (o, c, 3), *rest, padding_mode=mode)
    if kind == "feature":
        whole = fc.conv_spec((1, groups * c, 5), kernel.shape, *rest, None, groups, padding_mode=mode)
    else:
        whole = fc.conv_spec((groups, c, 5), kernel.shape, *rest, None, 1, groups, padding_mode=mode)
    parts = np.split(kernel, groups)
    got, blocks = jax.jit(
        lambda k, parts: (fc.as_matrix(whole, k), [fc.as_matrix(single, p) for p in parts])
    )(kernel, parts)
    np.testing.assert_array_equal(got, block_diagonal(list(map(np.asarray, blocks))))
    assert whole.nse == groups * single.nse


@pytest.mark.parametrize("n", [(4,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("rhs_dilation", [1, 2])
def test_circular_matrices_commute_with_shifts(n, rhs_dilation, rng):
    """M shifted along every row and column axis alike is M, channels kept."""
    k = (2,) * len(n)
    pad = [(rhs_dilation, 0)] * len(n)
    spec = fc.conv_spec(
        (1, 2, *n), (3, 2, *k), (1,) * len(n), pad, None, (rhs_dilation,) * len(n), padding_mode="circular"
    )
    assert spec.out_shape == (3, *n)
    matrix = np.asarray(fc.as_matrix(spec, integers(rng, spec.rhs_shape))).reshape(3, *n, 2, *n)
    for shift in itertools.product(*map(range, n)):
        axes = [1 + a for a in range(len(n))], [2 + len(n) + a for a in range(len(n))]
        np.testing.assert_array_equal(np.roll(np.roll(matrix, shift, axes[0]), shift, axes[1]), matrix)


@given(geometries().filter(lambda g: g.dimension_numbers is not None), seeds)
def test_a_layout_permutes_rows_and_columns(geometry, seed):
    """The same convolution in the default layout, its rows and columns renumbered, is the same M."""
    lhs, rhs, out = oracle.layouts(geometry)
    plain = dataclasses.replace(
        geometry,
        lhs_shape=tuple(geometry.lhs_shape[a] for a in lhs),
        rhs_shape=tuple(geometry.rhs_shape[a] for a in rhs),
        dimension_numbers=None,
    )
    kernel = integers(np.random.default_rng(seed), geometry.rhs_shape)
    rows = renumbered(oracle.out_shape(geometry), out, 1)
    columns = renumbered(oracle.in_shape(geometry), lhs, geometry.batch_group_count)
    both = jax.jit(lambda *kernels: list(map(fc.as_matrix, (geometry.spec(), plain.spec()), kernels)))
    moved, want = map(np.asarray, both(kernel, np.transpose(kernel, rhs)))
    np.testing.assert_array_equal(moved[rows][:, columns], want)


def renumbered(shape, axes, batch):
    """For each entry in default layout, its number in an array of `shape` laid out by `axes`."""
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    if batch == 1:
        numbers = np.expand_dims(numbers, axes[0])
    return np.transpose(numbers, axes).ravel()


@pytest.mark.parametrize("mode", MODES)
def test_separable_kernels_are_kronecker_products(mode, rng):
    """Rank-1 in channels and both axes: M = K_c (x) M(a) (x) M(b), any padding and dilation."""
    channels, a, b = (integers(rng, shape) for shape in ((3, 2), (3,), (2,)))
    first = ((2,), [(2, 1)], (2,), (1,))
    second = ((1,), [(0, 3)], (1,), (2,))
    both = [(*one, *two) for one, two in zip(first, second, strict=True)]
    kernel = channels[:, :, None, None] * a[:, None] * b
    whole = fc.conv_spec((1, 2, 4, 3), kernel.shape, *both, padding_mode=mode)
    along_a = fc.conv_spec((1, 1, 4), (1, 1, 3), *first, padding_mode=mode)
    along_b = fc.conv_spec((1, 1, 3), (1, 1, 2), *second, padding_mode=mode)
    of_all = jax.jit(lambda *kernels: list(map(fc.as_matrix, (whole, along_a, along_b), kernels)))
    got, *parts = of_all(kernel, a[None, None], b[None, None])
    np.testing.assert_array_equal(got, np.kron(channels, np.kron(*parts)))


def test_a_kernel_of_one_tap_is_a_selection():
    """1x1 with the identity across channels, stride 1: M is the identity."""
    spec = fc.conv_spec((1, 3, 2, 2), (3, 3, 1, 1), (1, 1), "VALID")
    kernel = np.eye(3, dtype=np.int32)[:, :, None, None]
    np.testing.assert_array_equal(fc.as_matrix(spec, kernel), np.eye(12, dtype=np.int32))


def test_toeplitz_in_one_dimension(rng):
    """The matrix everybody knows: scipy's toeplitz for a 1-D correlation."""
    linalg = pytest.importorskip("scipy.linalg")
    kernel = integers(rng, (3,))
    spec = fc.conv_spec((1, 1, 6), (1, 1, 3), (1,), "VALID")
    first_row = np.r_[kernel, np.zeros(3, int)]
    first_column = np.r_[kernel[0], np.zeros(3, int)]
    np.testing.assert_array_equal(
        fc.as_matrix(spec, kernel[None, None]), linalg.toeplitz(first_column, first_row)
    )


# 7. the transforms of JAX change nothing -------------------------------------------------------------

GEOMETRY = Geometry((1, 2, 4, 3), (2, 2, 2, 2), (2, 1), [(1, 0), (-1, 2)], (1, 2))
VERBS = {
    "as_matrix": lambda spec, kernel, x, y: fc.as_matrix(spec, kernel),
    "as_affine": lambda spec, kernel, x, y: fc.as_affine(spec, kernel, y),
    "matrix_rows": lambda spec, kernel, x, y: fc.matrix_rows(spec, kernel, [0, -1]),
    "matrix_columns": lambda spec, kernel, x, y: fc.matrix_columns(spec, kernel, [2, 0]),
    "apply": lambda spec, kernel, x, y: fc.apply(spec, kernel, x),
    "apply_transpose": lambda spec, kernel, x, y: fc.apply_transpose(spec, kernel, y),
}


def of_all(spec, *inputs):
    """Every verb, so that one program has them all."""
    return {name: verb(spec, *inputs) for name, verb in VERBS.items()}


def test_jit_equals_eager(rng):
    spec, inputs = GEOMETRY.spec(), arrays(GEOMETRY, rng, np.float64)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(of_all)(spec, *inputs), of_all(spec, *inputs))


def test_vmap_equals_a_loop(rng):
    spec, one = GEOMETRY.spec(), jax.jit(of_all)
    batches = [np.stack(a) for a in zip(*(arrays(GEOMETRY, rng, np.float64) for _ in range(3)), strict=True)]
    stacked = jax.jit(jax.vmap(partial(of_all, spec)))(*batches)
    for i in range(3):
        want = one(spec, *(batch[i] for batch in batches))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda s, i=i: s[i], stacked), want)


def test_grad_equals_finite_differences(rng):
    """All verbs are polynomials of degree 2 at most, so a central difference has no truncation error."""
    spec = GEOMETRY.spec()
    inputs, step = arrays(GEOMETRY, rng, np.float64), arrays(GEOMETRY, rng, np.float64)
    weights = jax.tree.map(
        lambda out: integers(rng, out.shape, np.float64), jax.eval_shape(of_all, spec, *inputs)
    )

    def losses(*inputs):
        sums = jax.tree.map(lambda out, w: (out * w).sum(), of_all(spec, *inputs), weights)
        return {name: sum(jax.tree.leaves(of_one)) for name, of_one in sums.items()}

    @jax.jit
    def both(inputs, step):
        ahead, behind = (
            losses(*(a + sign * s for a, s in zip(inputs, step, strict=True))) for sign in (1, -1)
        )
        gradients = jax.jacrev(losses, argnums=(0, 1, 2))(*inputs)
        slopes = {
            name: sum((g * s).sum() for g, s in zip(of_one, step, strict=True))
            for name, of_one in gradients.items()
        }
        return slopes, {name: (ahead[name] - behind[name]) / 2 for name in ahead}

    slopes, differences = both(inputs, step)
    assert slopes == differences


def test_no_tracer_leaks_through_a_cached_table(rng):
    """Cached tables are NumPy: used first inside a trace, they must not leak its tracers."""
    inputs = arrays(GEOMETRY, rng, np.float64)
    jax.clear_caches()
    spec = dataclasses.replace(GEOMETRY).spec()
    with jax.checking_leaks():
        first = jax.jit(of_all)(spec, *inputs)
    jax.tree.map(np.testing.assert_array_equal, of_all(spec, *inputs), first)

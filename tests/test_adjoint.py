"""The transpose, kernel gradients, projection, composition and detection."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count
from geometries import Geometry, arrays, geometries, integers, normals, random_geometry
from hypothesis import example, given
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

import jaxconv_fc as fc

seeds = st.integers(0, 2**32 - 1)
COUNT = count("GEOMETRIES", 20)
CHUNKS = max(4, COUNT // 50)  # so that the workers of pytest-xdist share the work

PLAIN = Geometry((1, 2, 5, 6), (4, 2, 3, 2), (2, 1), [(1, 0), (-1, 2)], rhs_dilation=(1, 2))
GROUPED = Geometry((1, 4, 5), (6, 2, 3), (2,), [(3, 1)], lhs_dilation=(2,), feature_group_count=2)
FOLDED = Geometry((1, 2, 4), (2, 2, 3), (1,), [(3, 5)], padding_mode="reflect")
BATCHED = Geometry((2, 2, 5), (4, 2, 3), (2,), "SAME", batch_group_count=2)
ALL = pytest.mark.parametrize("geometry", [PLAIN, GROUPED, FOLDED, BATCHED])


def is_turnable(spec):
    return spec.padding_mode == "zeros" and spec.canonical.batch_group_count == 1


@jax.jit
def views(spec, kernel, x, y):
    """One program per geometry: compiling is what the random test spends its time on."""
    cotangent = y.ravel()[:, None] * x.ravel()[None]
    turned = fc.as_matrix(*fc.transpose(spec, kernel)).T if is_turnable(spec) else fc.as_matrix(spec, kernel)
    return fc.kernel_matrix(spec, x), fc.kernel_vjp(spec, x, y), fc.matrix_vjp(spec, cotangent), turned


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_geometries_against_the_oracle(chunk, run_seed):
    """Laws 3, 4 and 5 on whole numbers: equal, not close."""
    for i in range(chunk, COUNT, CHUNKS):
        rng = np.random.default_rng([run_seed, i, 3])
        geometry = random_geometry(rng)
        kernel, x, y = arrays(geometry, rng, (np.float64, np.int64)[i % 2])
        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {geometry}"
        patches, gradient, adjoint, turned = map(np.asarray, views(geometry.spec(), kernel, x, y))
        assert (turned == oracle.matrix(kernel, geometry)).all(), replay
        assert (patches @ kernel.ravel() == oracle.product(x, kernel, geometry).ravel()).all(), replay
        want = oracle.kernel_gradient(x, y, geometry)
        assert (patches.T @ y.ravel() == want.ravel()).all(), replay
        assert (gradient == want).all(), replay
        assert (adjoint == want).all(), replay


# the transpose ---------------------------------------------------------------------------------------


@given(geometries(modes=("zeros",)), seeds)
def test_transposing_twice_is_the_canonical_original(geometry, seed):
    spec = geometry.spec()
    if not is_turnable(spec):
        return
    kernel = integers(np.random.default_rng(seed), geometry.rhs_shape)
    turned, flipped_kernel = fc.transpose(spec, kernel)
    assert (turned.in_shape, turned.out_size) == (spec.out_shape, spec.in_size)
    again, again_kernel = fc.transpose(turned, flipped_kernel)
    assert again == spec.canonical
    assert (np.asarray(again_kernel) == kernel).all()


def test_complex_gives_the_plain_transpose_and_a_conjugate_kernel_the_hermitian_one(rng):
    kernel, x, y = arrays(PLAIN, rng, np.complex128, normals)
    spec, matrix = PLAIN.spec(), oracle.matrix(kernel, PLAIN)
    turned, flipped_kernel = fc.transpose(spec, kernel)
    np.testing.assert_array_equal(fc.as_matrix(turned, flipped_kernel), matrix.T)
    np.testing.assert_array_equal(fc.as_matrix(turned, flipped_kernel.conj()), matrix.conj().T)
    hermitian = np.asarray(fc.apply_transpose(spec, kernel.conj(), y)).ravel()
    np.testing.assert_allclose(hermitian, matrix.conj().T @ y.ravel(), rtol=1e-12)
    (plain,) = jax.vjp(partial(fc.apply, spec, kernel), x)[1](y)
    np.testing.assert_allclose(plain.ravel(), matrix.T @ y.ravel(), rtol=1e-12)


@pytest.mark.parametrize(
    ("geometry", "word"),
    [
        (FOLDED, "padding_mode='reflect'"),
        (
            Geometry((2, 5, 2), (3, 2, 4), (1,), "SAME", None, None, ("NHC", "HIO", "NHC"), 1, 2),
            "directly before",
        ),
    ],
)
def test_where_the_transpose_is_no_convolution_the_error_names_the_way_out(geometry, word):
    with pytest.raises(ValueError, match=word) as error:
        fc.transpose(geometry.spec(), jnp.zeros(geometry.rhs_shape))
    assert "apply_transpose" in str(error.value)


# the three spaces, under the transforms of JAX -------------------------------------------------------


@ALL
def test_every_view_under_jit_vmap_and_grad(geometry, rng):
    spec = geometry.spec()
    kernels, xs, ys = (
        np.stack(v) for v in zip(*(arrays(geometry, rng, np.float64, normals) for _ in range(3)), strict=True)
    )
    matrices = np.stack([oracle.matrix(k, geometry) for k in kernels])
    functions = [
        (partial(fc.kernel_matrix, spec), (xs,)),
        (partial(fc.kernel_vjp, spec), (xs, ys)),
        (partial(fc.matrix_vjp, spec), (matrices,)),
        (partial(fc.kernel_from_matrix, spec), (matrices,)),
        (partial(fc.conv_distance, spec), (matrices + normals(rng, matrices.shape),)),
    ]
    for function, stacks in functions:
        looped = np.stack([function(*args) for args in zip(*stacks, strict=True)])
        np.testing.assert_allclose(jax.vmap(function)(*stacks), looped, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(jax.jit(jax.vmap(function))(*stacks), looped, rtol=1e-12, atol=1e-12)
        bilinear = len(stacks) == 2
        check_grads(function, tuple(v[0] for v in stacks), order=1 + bilinear, rtol=1e-5)


@ALL
def test_matrix_vjp_is_the_vjp_of_as_matrix(geometry, rng):
    spec = geometry.spec()
    kernel = normals(rng, geometry.rhs_shape)
    cotangent = normals(rng, spec.shape)
    matrix, pull = jax.vjp(partial(fc.as_matrix, spec), kernel)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], fc.matrix_vjp(spec, cotangent), rtol=1e-12)
    np.testing.assert_allclose(
        fc.matrix_vjp(spec, cotangent), oracle.matrix_gradient(cotangent, geometry), rtol=1e-12
    )
    assert matrix.shape == spec.shape


def test_per_example_gradients_by_vmap_add_up_to_the_gradient_of_the_batch(rng):
    spec = GROUPED.spec()
    xs, ys = normals(rng, (5, *spec.in_shape)), normals(rng, (5, *spec.out_shape))
    each = jax.vmap(partial(fc.kernel_vjp, spec))(xs, ys)
    kernel = normals(rng, GROUPED.rhs_shape)
    batch = jax.vmap(partial(fc.apply, spec), (None, 0))
    (total,) = jax.vjp(lambda k: batch(k, xs), jnp.asarray(kernel))[1](jnp.asarray(ys))
    np.testing.assert_allclose(each.sum(0), total, rtol=1e-10)


# the projection --------------------------------------------------------------------------------------


# All taps read the one input there is: one singular value, and three that are 0 but for rounding.
ALIASED = Geometry((1, 1, 1), (1, 1, 4), (1,), [(155, 155)], padding_mode="edge")


# Padded, then dilated: taps meet, and others read only what lies between two inputs.
HOLES = Geometry((1, 1, 6), (1, 1, 3), (1,), [(4, 10)], (2,), (2,), padding_mode="edge")


@given(geometries(), seeds)
@example(ALIASED, 0)
@example(HOLES, 0)
def test_the_nearest_kernel_is_the_least_squares_solution(geometry, seed):
    rng = np.random.default_rng(seed)
    spec = geometry.spec()
    if math.prod(geometry.rhs_shape) > 60 or math.prod(spec.shape) > 3000:
        return
    target = normals(rng, spec.shape)
    units = np.eye(math.prod(geometry.rhs_shape)).reshape(-1, *geometry.rhs_shape)
    span = np.stack([oracle.matrix(unit, geometry).ravel() for unit in units], axis=1)
    want = oracle.pseudo_inverse(span) @ target.ravel()
    np.testing.assert_allclose(fc.kernel_from_matrix(spec, target).ravel(), want, atol=1e-10)
    if target.size:
        off = np.linalg.norm(target.ravel() - span @ want) / np.linalg.norm(target)
        np.testing.assert_allclose(fc.conv_distance(spec, target), off, atol=1e-7)


@given(geometries(), seeds)
def test_a_convolution_is_its_own_nearest_one(geometry, seed):
    kernel = normals(np.random.default_rng(seed), geometry.rhs_shape)
    spec, matrix = geometry.spec(), oracle.matrix(kernel, geometry)
    found = np.asarray(fc.kernel_from_matrix(spec, matrix))
    np.testing.assert_allclose(oracle.matrix(found, geometry), matrix, atol=1e-12)
    assert fc.conv_distance(spec, matrix) < 1e-13


def test_a_tap_that_never_meets_an_input_comes_back_as_zero():
    spec = fc.conv_spec((1, 1, 1), (1, 1, 3), (1,), "SAME")
    kernel = fc.kernel_from_matrix(spec, fc.as_matrix(spec, jnp.array([[[1.0, 2.0, 3.0]]])))
    np.testing.assert_array_equal(kernel, [[[0, 2, 0]]])


def test_distances_of_zero_and_of_nothing():
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    assert fc.conv_distance(spec, jnp.zeros(spec.shape)) == 0
    assert fc.conv_distance(spec, jnp.ones(spec.shape, jnp.int32)) > 0.5
    assert (jax.grad(partial(fc.conv_distance, spec))(jnp.zeros(spec.shape)) == 0).all()
    empty = fc.conv_spec((1, 1, 1), (1, 1, 2), (1,), "VALID")
    assert fc.conv_distance(empty, jnp.zeros(empty.shape)) == 0


def test_neither_projection_nor_distance_makes_a_second_matrix():
    spec = fc.conv_spec((1, 4, 40, 40), (4, 4, 3, 3), (1, 1), "SAME")
    like = jax.ShapeDtypeStruct(spec.shape, jnp.float32)
    for function in (fc.matrix_vjp, fc.kernel_from_matrix, fc.conv_distance):
        memory = jax.jit(function).lower(spec, like).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.3 * math.prod(spec.shape) * 4, function.__name__


def test_the_distance_of_a_matrix_summed_in_several_blocks(rng):
    """Rows are made 2**20 entries at a time; the last block overlaps the one before it."""
    spec = fc.conv_spec((1, 1, 1300), (1, 1, 3), (1,), "SAME")
    matrix = normals(rng, spec.shape)
    kernel = np.array([np.trace(matrix, k) / (1300 - abs(k)) for k in (-1, 0, 1)])
    nearest = sum(np.diag(np.full(1300 - abs(k), v), k) for k, v in zip((-1, 0, 1), kernel, strict=True))
    np.testing.assert_allclose(np.ravel(fc.kernel_from_matrix(spec, matrix)), kernel, rtol=1e-9)
    want = np.linalg.norm(matrix - nearest) / np.linalg.norm(matrix)
    np.testing.assert_allclose(fc.conv_distance(spec, matrix), want, rtol=1e-12)
    # nearly all of the difference in rows that two blocks have in common
    corner = np.zeros(spec.shape)
    corner[600:700, 0] = 1
    np.testing.assert_allclose(fc.conv_distance(spec, corner), 1, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_distances_in_half_precision_do_not_overflow(dtype):
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    matrix = jnp.zeros(spec.shape, dtype).at[0, 3].set(300)  # whose square float16 does not hold
    assert fc.conv_distance(spec, matrix) == 1


# composition -----------------------------------------------------------------------------------------


def random_pair(rng):
    """Two geometries in a row, in the default layout; the second often without padding."""
    while True:
        first = random_geometry(rng, modes=("zeros", "zeros", "circular"))
        spec = first.spec()
        rank = len(spec.axes)
        plain = first.batch_group_count == 1 and first.dimension_numbers is None
        if not plain or 0 in spec.out_shape or rank > 2:
            continue
        c = spec.out_channels
        groups = int(rng.choice([g for g in range(1, c + 1) if c % g == 0]))
        steps = [tuple(int(v) for v in rng.integers(1, 4, rank)) for _ in range(3)]
        pads = [tuple(int(v) for v in rng.integers(-2, 3, 2)) for _ in range(rank)]
        pads = [(0, 0)] * rank if rng.random() < 0.6 else pads
        taps = tuple(int(v) for v in rng.integers(1, 4, rank))
        rhs = (groups * int(rng.integers(1, 3)), c // groups, *taps)
        second = Geometry((1, *spec.out_shape), rhs, steps[0], pads, steps[1], steps[2], None, groups)
        try:
            second.spec()
        except ValueError:
            continue  # crops more than there is
        if second.is_small():
            return first, second


@pytest.mark.parametrize("chunk", range(CHUNKS // 2))  # enough in each that some can be composed
def test_compose_is_the_product_of_the_matrices_or_refuses(chunk, run_seed):
    composed = 0
    for i in range(chunk, max(24, COUNT // 2), CHUNKS // 2):
        rng = np.random.default_rng([run_seed, i, 4])
        first, second = random_pair(rng)
        kernel1, kernel2 = integers(rng, first.rhs_shape), integers(rng, second.rhs_shape)
        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {first} then {second}"
        product = oracle.matrix(kernel2, second) @ oracle.matrix(kernel1, first)
        try:
            spec, kernel = fc.compose((second.spec(), kernel2), (first.spec(), kernel1))
        except ValueError:
            continue
        composed += 1
        assert (np.asarray(fc.as_matrix(spec, kernel)) == product).all(), replay
    assert composed


def test_two_same_layers_differ_in_a_ring_and_the_error_says_where():
    spec = fc.conv_spec((1, 1, 5, 5), (1, 1, 3, 3), (1, 1), "SAME")
    with pytest.raises(ValueError, match=r"16 of 25 output positions would differ.*\[\[0, 4\], \[0, 4\]\]"):
        fc.compose((spec, jnp.ones((1, 1, 3, 3))), (spec, jnp.ones((1, 1, 3, 3))))


def test_composition_keeps_what_both_have_in_groups_and_layout(rng):
    numbers = ("NWHC", "IWHO", "NCHW")
    first = Geometry((1, 6, 5, 4), (1, 2, 2, 8), (1, 1), "VALID", None, None, numbers, 4)
    back = ("NCHW", "HWIO", "NHWC")
    second = Geometry((1, 8, 4, 5), (2, 2, 4, 6), (1, 2), "VALID", None, None, back, 2)
    kernel1, kernel2 = integers(rng, first.rhs_shape), integers(rng, second.rhs_shape)
    spec, kernel = fc.compose((second.spec(), kernel2), (first.spec(), kernel1))
    assert spec.feature_group_count == 2
    np.testing.assert_array_equal(
        fc.as_matrix(spec, kernel), oracle.matrix(kernel2, second) @ oracle.matrix(kernel1, first)
    )
    check_grads(
        lambda a, b: fc.compose((second.spec(), b), (first.spec(), a))[1],
        (kernel1.astype(float), kernel2.astype(float)),
        order=2,
    )


@pytest.mark.parametrize(
    ("second", "word"),
    [
        (Geometry((1, 3, 4), (1, 3, 2), (1,), "VALID"), r"shape \(2, 4\)"),
        (Geometry((1, 2, 4), (1, 2, 2), (1,), "VALID", lhs_dilation=(2,)), "no common factor"),
        (Geometry((1, 2, 4), (1, 2, 2), (1,), [(1, 1)], padding_mode="circular"), "only zeros mode may pad"),
    ],
)
def test_what_cannot_be_composed_is_refused_by_name(second, word):
    first = Geometry((1, 1, 8), (2, 1, 2), (2,), "VALID")
    with pytest.raises(ValueError, match=word):
        fc.compose((second.spec(), jnp.ones(second.rhs_shape)), (first.spec(), jnp.ones(first.rhs_shape)))


@pytest.mark.parametrize(
    ("pads", "word"),
    [
        ((-1, 0), "only zeros mode may pad"),
        ((1, 0), "only zeros mode may pad"),
        ((0, -1), "would make 4 outputs"),
    ],
)
def test_what_a_boundary_mode_made_is_neither_padded_nor_cropped(pads, word):
    first = fc.conv_spec((1, 1, 5), (1, 1, 2), (1,), [(1, 0)], padding_mode="circular")
    second = fc.conv_spec((1, 1, 5), (1, 1, 2), (1,), [pads])
    with pytest.raises(ValueError, match=word):
        fc.compose((second, jnp.ones((1, 1, 2))), (first, jnp.ones((1, 1, 2))))


def test_groups_that_share_no_factor_become_one(rng):
    first = Geometry((1, 6, 4), (6, 3, 2), (1,), "VALID", feature_group_count=2)
    second = Geometry((1, 6, 3), (6, 2, 2), (1,), "VALID", feature_group_count=3)
    kernel1, kernel2 = integers(rng, first.rhs_shape), integers(rng, second.rhs_shape)
    spec, kernel = fc.compose((second.spec(), kernel2), (first.spec(), kernel1))
    assert spec.feature_group_count == 1
    product = oracle.matrix(kernel2, second) @ oracle.matrix(kernel1, first)
    np.testing.assert_array_equal(fc.as_matrix(spec, kernel), product)


def test_a_first_that_reads_nothing_is_not_read_beyond_its_end():
    """It is cropped away, so the product is 0; one convolution would see what is behind the crop."""
    first = fc.conv_spec((1, 1, 3), (1, 1, 1), (1,), [(-4, 5)])
    second = fc.conv_spec((1, 1, 4), (1, 1, 1), (1,), [(4, 0)])
    assert first.nse == 0
    with pytest.raises(ValueError, match="no single convolution equals the product"):
        fc.compose((second, jnp.ones((1, 1, 1))), (first, jnp.ones((1, 1, 1))))


@pytest.mark.parametrize("channels", [(0, 2, 2), (2, 0, 2), (2, 2, 0)])
def test_composition_without_channels(channels):
    """Two SAME layers, which are refused with channels: without, both are 0 or have no entries."""
    c, between, o = channels
    first = fc.conv_spec((1, c, 4), (between, c, 3), (1,), "SAME")
    second = fc.conv_spec((1, between, 4), (o, between, 3), (1,), "SAME")
    kernels = jnp.ones(second.rhs_shape), jnp.ones(first.rhs_shape)
    spec, kernel = fc.compose((second, kernels[0]), (first, kernels[1]))
    np.testing.assert_array_equal(fc.as_matrix(spec, kernel), np.zeros((4 * o, 4 * c)))


def test_composition_of_no_outputs():
    """The stride is larger than the window, which does not fit: there is nothing to crop for."""
    first = fc.conv_spec((1, 1, 2), (1, 1, 1), (1,), "VALID")
    second = fc.conv_spec((1, 1, 2), (1, 1, 3), (5,), "VALID")
    spec, _ = fc.compose((second, jnp.ones((1, 1, 3))), (first, jnp.ones((1, 1, 1))))
    assert spec.shape == (0, 2)


# detection -------------------------------------------------------------------------------------------


def random_plain(rng):
    """A zeros-mode geometry in (channels, spatial...) order, with rows and columns."""
    while True:
        geometry = random_geometry(rng, modes=("zeros",))
        spec = geometry.spec()
        if geometry.dimension_numbers is None and geometry.batch_group_count == 1 and 0 not in spec.shape:
            return geometry


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_detection_recovers_convolutions(chunk, run_seed):
    for i in range(chunk, COUNT // 5, CHUNKS):
        rng = np.random.default_rng([run_seed, i, 5])
        geometry = random_plain(rng)
        spec, kernel = geometry.spec(), normals(rng, geometry.rhs_shape)
        matrix = oracle.matrix(kernel, geometry)
        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {geometry}"
        found = fc.detect_conv(matrix, spec.in_shape, spec.out_shape)
        assert found is not None, replay
        np.testing.assert_allclose(fc.as_matrix(*found), matrix, atol=1e-12, err_msg=replay)
        assert math.prod(found[0].rhs_shape) <= math.prod(spec.rhs_shape), replay


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_detection_says_no_to_other_matrices(chunk, run_seed):
    for i in range(chunk, COUNT // 5, CHUNKS):
        rng = np.random.default_rng([run_seed, i, 6])
        rank = int(rng.integers(1, 3))
        in_shape, out_shape = (
            (int(rng.integers(1, 3)), *map(int, rng.integers(2, 6, rank))) for _ in range(2)
        )
        matrix = rng.standard_normal((math.prod(out_shape), math.prod(in_shape)))
        assert fc.detect_conv(matrix, in_shape, out_shape) is None, (run_seed, i, in_shape, out_shape)
        assert fc.nearest_conv(matrix, in_shape, out_shape)[2] > 1e-6  # 2 x 2 ones are near by chance


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (((1, 2, 9, 8), (4, 2, 3, 2), (2, 1), [(1, 1), (0, 1)]), {}),
        (((1, 2, 9), (2, 2, 3), (1,), [(2, 2)], (1,), (2,)), {}),
        (((1, 2, 7), (2, 2, 4), (1,), [(2, 2)], (2,)), {}),
        (((1, 4, 7), (6, 2, 3), (3,), [(1, 0)]), {"feature_group_count": 2}),
    ],
)
def test_a_geometry_without_ambiguity_is_found_exactly(args, options, rng):
    spec = fc.conv_spec(*args, **options)
    kernel = jnp.asarray(normals(rng, spec.rhs_shape))
    found, found_kernel = fc.detect_conv(fc.as_matrix(spec, kernel), spec.in_shape, spec.out_shape)
    assert found == spec.canonical
    np.testing.assert_allclose(found_kernel, kernel, rtol=1e-12)


def test_detection_forgives_noise_up_to_tol(rng):
    spec = fc.conv_spec((1, 1, 8), (1, 1, 3), (1,), "SAME")
    noisy = fc.as_matrix(spec, jnp.array([[[1.0, -2.0, 3.0]]])) + 1e-4 * normals(rng, spec.shape)
    assert fc.detect_conv(noisy, spec.in_shape, spec.out_shape) is None
    found = fc.detect_conv(noisy, spec.in_shape, spec.out_shape, tol=1e-2)
    assert found is not None
    assert found[0] == spec


# errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda s: fc.kernel_matrix(s, jnp.ones((1, 5))),
            ValueError,
            r"x must have the spec's shape \(1, 4\)",
        ),
        (lambda s: fc.kernel_matrix(s, [1.0]), TypeError, "x must be a jax or NumPy array"),
        (
            lambda s: fc.kernel_vjp(s, jnp.ones((1, 4)), jnp.ones((1, 4))),
            ValueError,
            r"y_bar must .*\(1, 3\)",
        ),
        (lambda s: fc.kernel_vjp(s, jnp.ones((1, 4)), jnp.ones((1, 3), int)), TypeError, "y_bar.astype"),
        (lambda s: fc.kernel_vjp(s, jnp.ones((1, 4), bool), jnp.ones((1, 3), bool)), TypeError, "bool"),
        (lambda s: fc.matrix_vjp(s, jnp.ones((4, 4))), ValueError, r"matrix_bar must have .*\(3, 4\)"),
        (lambda s: fc.kernel_from_matrix(s, jnp.ones((4, 4))), ValueError, r"matrix must have .*\(3, 4\)"),
        (lambda s: fc.conv_distance(s, None), TypeError, "matrix must be a jax or NumPy array"),
        (lambda s: fc.transpose(s, jnp.ones((1, 1, 3))), ValueError, r"kernel must have .*\(1, 1, 2\)"),
        (lambda s: fc.detect_conv(jnp.ones((3, 4)), (1, 4), (1, 3, 1)), ValueError, "same rank"),
        (lambda s: fc.detect_conv(jnp.ones((3, 4)), (1, 5), (1, 3)), ValueError, r"\(3, 5\)"),
        (
            lambda s: jax.jit(lambda m: fc.detect_conv(m, (1, 4), (1, 3)))(jnp.ones((3, 4))),
            TypeError,
            "concrete",
        ),
    ],
)
def test_bad_inputs_are_named(call, error, message):
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    with pytest.raises(error, match=message):
        call(spec)


def test_a_kernel_matrix_beyond_the_memory_limit_says_what_to_use():
    spec = fc.conv_spec((1, 64, 56, 56), (64, 64, 3, 3), (1, 1), "SAME")
    with pytest.raises(ValueError, match=r"GiB dense.*kernel_vjp"):
        fc.kernel_matrix(spec, jnp.ones(spec.in_shape, jnp.float32))


# what other libraries call a transposed convolution --------------------------------------------------


def test_lax_conv_transpose_is_the_transpose_only_with_transpose_kernel_and_no_remainder(rng):
    kernel = jnp.asarray(normals(rng, (3, 2, 4)))  # taps, in, out
    for n, same in ((8, True), (7, False)):  # VALID, k = 3, stride 2: 8 leaves one position unused
        spec = fc.conv_spec((1, n, 2), (3, 2, 4), (2,), "SAME", None, None, ("NHC", "HIO", "NHC"))
        y = jnp.asarray(normals(rng, spec.out_shape))
        theirs = lax.conv_transpose(
            y[None], kernel, (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), transpose_kernel=True
        )[0]
        ours = fc.apply_transpose(spec, kernel, y)
        assert (theirs.shape == ours.shape) == same

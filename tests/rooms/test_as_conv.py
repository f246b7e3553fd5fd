"""The one convolution that an affine function is."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import numbers
from geometries import MODES, integers, normals, random_geometry
from jax import lax

import jaxconv_fc as fc

WIDE = {"dtype": jnp.float64}
X = jnp.zeros((1, 4, 6, 7), **WIDE)


def conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def batch_norm(x, rng):
    """With fixed statistics, as in evaluation, and what it multiplies and adds per channel."""
    mean, scale, shift = (normals(rng, x.shape[1]) for _ in range(3))
    variance = rng.uniform(0.5, 2, x.shape[1])
    factor = scale / np.sqrt(variance + 1e-5)
    each = (None, slice(None), None, None)
    return (
        (x - mean[each]) / np.sqrt(variance + 1e-5)[each] * scale[each] + shift[each],
        factor,
        shift - mean * factor,
    )


def check(fn, x, found, atol=1e-11):
    """as_affine of what was found is matrix and offset of the function."""
    spec, kernel, bias = found
    matrix, offset = fc.matrix_of(fn, x)
    got, vector = fc.as_affine(spec, kernel, bias)
    np.testing.assert_allclose(got, matrix, atol=atol)
    np.testing.assert_allclose(vector, offset, atol=atol)


def test_convolution_and_batch_norm(rng):
    """As torch.nn.utils.fusion.fuse_conv_bn_eval has it: kernel and bias times the factor, plus the shift."""
    kernel, bias = normals(rng, (6, 2, 3, 3)), normals(rng, 6)
    seed = int(rng.integers(1000))

    def block(x):
        y = conv(x, kernel, (2, 1), feature_group_count=2) + bias[None, :, None, None]
        return batch_norm(y, np.random.default_rng(seed))

    _, factor, shift = block(X)
    spec, got, got_bias = fc.as_conv(lambda x: block(x)[0], X)
    assert spec == fc.conv_spec(X.shape, kernel.shape, (2, 1), "SAME", feature_group_count=2).canonical
    np.testing.assert_allclose(got, kernel * factor[:, None, None, None], atol=1e-12)
    np.testing.assert_allclose(got_bias, bias * factor + shift, atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_block_of_branches(dilation, rng):
    """RepVGG: 3x3, 1x1 and the identity, each with its batch norm. Dilated, as in diverse branch blocks."""
    wide, narrow = normals(rng, (4, 4, 3, 3)), normals(rng, (4, 4, 1, 1))
    seeds = rng.integers(1000, size=3)
    of = lambda i, x: batch_norm(x, np.random.default_rng(seeds[i]))  # noqa: E731
    rhs = (dilation, dilation)
    branches = lambda x: [of(0, conv(x, wide, rhs_dilation=rhs)), of(1, conv(x, narrow)), of(2, x)]  # noqa: E731
    _, factors, shifts = zip(*branches(X), strict=True)
    want = wide * factors[0][:, None, None, None]
    want[:, :, 1, 1] += narrow[:, :, 0, 0] * factors[1][:, None] + np.diag(factors[2])
    spec, kernel, bias = fc.as_conv(lambda x: sum(branch[0] for branch in branches(x)), X)
    assert (spec.rhs_dilation, spec.padding, spec.padding_mode) == (rhs, ((dilation, dilation),) * 2, "zeros")
    np.testing.assert_allclose(kernel, want, atol=1e-12)
    np.testing.assert_allclose(bias, sum(shifts), atol=1e-12)


@pytest.mark.parametrize("mode", ["wrap", "reflect", "edge", "symmetric", "constant"])
def test_padding_and_valid(mode, rng):
    """What layers of flax, equinox and keras do that pad by themselves."""
    kernel = normals(rng, (3, 4, 5, 3))
    fn = lambda x: conv(jnp.pad(x, ((0, 0), (0, 0), (2, 2), (1, 1)), mode), kernel, (1, 2), "VALID")  # noqa: E731
    spec, got, bias = fc.as_conv(fn, X)
    want = fc.conv_spec(X.shape, kernel.shape, (1, 2), [(2, 2), (1, 1)], padding_mode=mode)
    assert spec == want.canonical
    np.testing.assert_allclose(got, kernel, atol=1e-12)
    np.testing.assert_array_equal(bias, np.zeros(3))


def test_causal_and_average_pooling(rng):
    x = jnp.zeros((1, 4, 9), **WIDE)
    kernel = normals(rng, (2, 4, 3))

    def causal(x):
        padded = jnp.pad(x, ((0, 0), (0, 0), (4, 0)))
        return lax.conv_general_dilated(padded, kernel, (1,), "VALID", None, (2,))

    assert fc.as_conv(causal, x)[0] == fc.conv_spec(x.shape, kernel.shape, (1,), [(4, 0)], None, (2,))
    pool = lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 1, 3, 2), (1, 1, 2, 2), "VALID") / 6  # noqa: E731
    spec, got, _ = fc.as_conv(pool, X)
    assert (spec.feature_group_count, spec.window_strides) == (4, (2, 2))
    np.testing.assert_allclose(got, np.full((4, 1, 3, 2), 1 / 6), rtol=1e-12)


def test_a_convolution_of_a_convolution_is_what_compose_gives(rng):
    specs = [
        ((1, 2, 12), (3, 2, 3), (2,), [(2, 2)]),
        ((1, 3, 7), (4, 3, 3), (1,), [(0, 0)], None, (2,)),
    ]
    first, second = (fc.conv_spec(*args) for args in specs)
    kernels = [normals(rng, spec.rhs_shape) for spec in (first, second)]
    spec, kernel = fc.compose((second, kernels[1]), (first, kernels[0]))
    both = lambda x: fc.apply(second, kernels[1], fc.apply(first, kernels[0], x))  # noqa: E731
    found = fc.as_conv(both, jnp.zeros((2, 12), **WIDE))
    np.testing.assert_allclose(fc.as_matrix(*found[:2]), fc.as_matrix(spec, kernel), atol=1e-12)
    assert math.prod(found[0].rhs_shape) <= math.prod(spec.rhs_shape)


def test_a_dense_layer_that_is_a_convolution(rng):
    want = fc.conv_spec((1, 2, 5, 5), (3, 2, 3, 3), (1, 1), "SAME", padding_mode="circular")
    kernel = normals(rng, want.rhs_shape)
    matrix = jnp.asarray(fc.as_matrix(want, kernel))
    spec, got, _ = fc.as_conv(
        lambda x: (matrix @ x.ravel()).reshape(1, 3, 5, 5), jnp.zeros((1, 2, 5, 5), **WIDE)
    )
    assert spec == want.canonical
    np.testing.assert_allclose(got, kernel, atol=1e-12)


def test_a_bias_that_varies_is_a_map(rng):
    """Batch norm in front of zero padding: its shift does not reach the padding."""
    kernel = normals(rng, (3, 4, 3, 3))
    fn = lambda x: conv(2 * x + 1, kernel)  # noqa: E731
    spec, got, bias = fc.as_conv(fn, X)
    assert bias.shape == spec.out_shape
    check(fn, X, (spec, got, bias))


def test_layouts_and_batches(rng):
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = normals(rng, (3, 2, 2, 5))
    fn = partial(conv, kernel=kernel, strides=(1, 2), dimension_numbers=numbers)
    for batch in (1, 3):
        x = jnp.zeros((batch, 6, 5, 2), **WIDE)
        spec, got, bias = fc.as_conv(lambda x: fn(x) + 1, x, dimension_numbers=numbers)
        assert spec.lhs_shape == x.shape
        assert spec == fc.conv_spec(x.shape, kernel.shape, (1, 2), "SAME", None, None, numbers).canonical
        np.testing.assert_allclose(got, kernel, atol=1e-12)
        np.testing.assert_array_equal(bias, np.ones(5))
    alone = lambda x: fn(x[None])[0]  # noqa: E731  # without a batch
    _, got, _ = fc.as_conv(alone, jnp.zeros((6, 5, 2), **WIDE), dimension_numbers=numbers)
    np.testing.assert_allclose(got, kernel, atol=1e-12)
    image = jnp.zeros((1, 6, 6), **WIDE)  # one channel, or a batch of one
    small = normals(rng, (2, 1, 3, 3))
    assert fc.as_conv(lambda x: conv(x[None], small)[0], image)[0].rhs_shape == (2, 1, 3, 3)


def test_integers_are_exact(rng):
    kernel = integers(rng, (2, 4, 3, 3), np.int32)
    _, got, bias = fc.as_conv(lambda x: conv(x, kernel) + 7, X.astype(jnp.int32))
    assert got.dtype == bias.dtype == jnp.int32
    np.testing.assert_array_equal(got, kernel)
    np.testing.assert_array_equal(bias, [7, 7])


@pytest.mark.parametrize("number", numbers(1, 59))
def test_random_geometries_are_recovered(number, run_seed):
    for i in range(5 * number, 5 * number + 5):
        rng = np.random.default_rng([run_seed, i, 9])
        while True:
            geometry = random_geometry(rng, modes=(MODES[i % len(MODES)],))
            spec = geometry.spec()
            plain = geometry.dimension_numbers is None and geometry.batch_group_count == 1
            # Layers: a kernel of more than one tap, and outputs that share its taps.
            shared = all(min(a.out_size, a.size) > 3 and a.taps > 1 for a in spec.axes)
            if plain and spec.axes and shared:
                break
        kernel = normals(rng, geometry.rhs_shape)
        x = jnp.zeros((1, *spec.in_shape), **WIDE)
        found = fc.as_conv(lambda x, s=spec, k=kernel: fc.apply(s, k, x[0])[None] + 1, x)
        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {geometry}"
        got = fc.as_scipy(found[0], np.asarray(found[1])).toarray()
        np.testing.assert_allclose(got, oracle.matrix(kernel, geometry), atol=1e-11, err_msg=replay)
        assert math.prod(found[0].rhs_shape) <= math.prod(spec.rhs_shape), replay
        np.testing.assert_array_equal(found[2], np.ones(spec.out_channels), err_msg=replay)


def not_one(kind, rng):
    """A function that is affine and no convolution, and its argument."""
    rank = int(rng.integers(1, 3))
    # Two channels at least: a permutation of five entries may be a circular convolution.
    x = jnp.zeros((1, int(rng.integers(2, 4)), *(int(v) for v in rng.integers(5, 8, rank))), **WIDE)
    kernel, size = normals(rng, (x.shape[1],) * 2 + (3,) * rank), x.size
    layer = lambda x: lax.conv_general_dilated(x, kernel, (1,) * rank, "SAME")  # noqa: E731
    some, dense, order = normals(rng, x.shape), normals(rng, (size, size)), rng.permutation(size)
    corner, inner = (0, 0) + (0,) * rank, (0, 0) + (2,) * rank
    return {
        "dense": lambda x: (dense @ x.ravel()).reshape(x.shape),
        "scaled by place": lambda x: x * some,
        "permuted": lambda x: x.ravel()[order].reshape(x.shape),
        "reversed": lambda x: x[..., ::-1],
        "scaled behind": lambda x: layer(x) * some,
        "scaled in front": lambda x: layer(x * some),
        "same after same": lambda x: layer(layer(x)),
        "one entry": lambda x: layer(x).at[inner].add(x[corner]),
    }[kind], x


KINDS = [
    "dense",
    "scaled by place",
    "permuted",
    "reversed",
    "scaled behind",
    "scaled in front",
    "same after same",
]


@pytest.mark.parametrize("number", numbers(1, 24))
def test_other_functions_are_refused(number, run_seed):
    for kind in [*KINDS, "one entry"]:
        rng = np.random.default_rng([run_seed, number, len(kind)])
        fn, x = not_one(kind, rng)
        with pytest.raises(ValueError, match="not one convolution"):
            print(kind, x.shape, fc.as_conv(fn, x))


def test_the_refusal_names_outputs_and_the_distance(rng):
    kernel = normals(rng, (1, 1, 3, 3))
    with pytest.raises(
        ValueError, match=r"Outputs \(0, 2, 3\) of 42 differ .* distance of .*kernel \(1, 1, 3, 3\)"
    ):
        fc.as_conv(lambda x: conv(x, kernel).at[0, 0, 2, 3].add(x[0, 0, 0, 0]), X[:, :1])


@pytest.mark.parametrize(
    ("fn", "x", "error", "message"),
    [
        (lambda x: x["a"], {"a": X}, TypeError, "x must be one array"),
        (lambda x: (x, x), X, TypeError, "must return one array"),
        (lambda x: x.sum(-1), X, ValueError, "keeps the number of axes"),
        (lambda x: x**2, X, ValueError, "not affine"),
    ],
)
def test_bad_inputs_are_named(fn, x, error, message):
    with pytest.raises(error, match=message):
        fc.as_conv(fn, x)


def test_examples_that_mix_are_refused():
    for fn in (lambda x: x[::-1], lambda x: x.at[0].multiply(2)):
        with pytest.raises(ValueError, match="every example"):
            fc.as_conv(fn, jnp.zeros((3, 2, 4)), dimension_numbers=("NCH", "OIH", "NCH"))


def test_under_a_trace_it_says_so():
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda w: fc.as_conv(lambda x: x * w, X))(2.0)

"""Fields of any function, held against the nonzero pattern of its Jacobian at random points."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import random_geometry
from jax import lax

import jaxconv_fc as fc
from jaxconv_fc import neurons

X = jax.ShapeDtypeStruct((2, 3, 4), jnp.float64)
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)) + 3, jnp.float64)
KERNEL = jnp.ones((4, 3, 2), jnp.float64)


def check(name, fn, exact, wanted, rng):
    """Some receptive and projective fields against where the Jacobian is not 0."""
    out = jax.eval_shape(fn, X)
    wanted = wanted.reshape(out.size, X.size)
    for i in rng.permutation(out.size)[:5]:
        field = neurons.receptive_field(fn, X, int(i))
        assert field.shape == X.shape
        assert field.size == field.mask.sum()
        agree(field.mask.ravel(), wanted[i], exact, f"{name}, row {i}")
    for j in rng.permutation(X.size)[:5]:
        field = neurons.projective_field(fn, X, np.unravel_index(j, X.shape))
        assert field.shape == out.shape
        agree(field.mask.ravel(), wanted[:, j], exact, f"{name}, column {j}")


def agree(found, wanted, exact, message):
    if exact:
        np.testing.assert_array_equal(found, wanted, err_msg=message)
    else:
        assert found[wanted].all(), message


@pytest.fixture(scope="module")
def patterns():
    """Of every function, where the Jacobian is not 0 at some of four points: one program for all."""

    def jacobians(x):
        return {name: jax.jacfwd(fn)(x) for name, fn in {**EXACT, **AT_LEAST}.items()}

    points = jax.random.normal(jax.random.key(0), (4, *X.shape), X.dtype)
    found = jax.jit(jax.vmap(jacobians))(points)
    return {name: (np.asarray(jacobian) != 0).any(0) for name, jacobian in found.items()}


def pooled(x, reduce, init):
    return lax.reduce_window(x, init, reduce, (1, 2, 3), (1, 1, 2), [(0, 0), (1, 0), (1, 1)])


def dilated(x):
    return lax.conv_general_dilated(
        x, KERNEL, (2,), [(1, 2)], lhs_dilation=(2,), rhs_dilation=(2,), feature_group_count=1
    )


def unrolled(x):
    def step(carry, row):
        carry = jnp.tanh(jnp.roll(carry, 1) + row)
        return carry, carry[:2] * row[0]

    return jnp.concatenate([v.ravel() for v in lax.scan(step, x[0, 0], x[1], reverse=True)])


def counted(x):
    return lax.while_loop(lambda v: v[0] < 3, lambda v: (v[0] + 1, jnp.sin(v[1])[:, ::-1]), (0, x))[1]


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -9, 9)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), 2 * tangents[0]))

EXACT = {
    "elementwise": lambda x: jnp.tanh(x) * jax.nn.silu(x) + 2**x,
    "stretched": lambda x: x[:, :1] * x + x[0, 0, 0],
    "softmax": lambda x: jax.nn.softmax(x, 1),
    "layer norm": lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1),
    "moves": lambda x: jnp.pad(jnp.flip(x.transpose(2, 0, 1), 1)[1:], ((0, 0), (1, 1), (0, 2)), mode="wrap"),
    "reshape": lambda x: x.reshape(6, 4)[::2].reshape(2, -1).sum(0),
    "concatenate": lambda x: jnp.concatenate([x[0], 2 * x[1, ::-1]], axis=1),
    "gather": lambda x: x[:, jnp.array([2, 0]), :][..., jnp.array([1, 1, 3])],
    "gather outside": lambda x: jnp.take(x.ravel(), jnp.array([3, 99]), mode="fill", fill_value=7),
    "scatter": lambda x: x.at[:, 1].set(x[:, 0] ** 2).at[0, 0].add(x[1, 1]),
    "known choice": lambda x: jnp.where(jnp.arange(4) % 2 == 0, x, x[:, ::-1]),
    "dense": lambda x: jax.nn.relu(x + 9) @ WEIGHTS,
    "attention": lambda x: jnp.einsum("bij,bkj->bik", x, x),
    "cumulative": lambda x: jnp.cumsum(x, 1) + lax.cumprod(x, 2, reverse=True),
    "average pooling": lambda x: pooled(x, lax.add, 0.0),
    "convolution": dilated,
    "groups": lambda x: lax.conv_general_dilated(x, jnp.ones((3, 1, 2)), (1,), "SAME", feature_group_count=3),
    "batch groups": lambda x: lax.conv_general_dilated(
        x, jnp.ones((4, 3, 2)), (1,), "VALID", batch_group_count=2
    ),
    "kernel": lambda x: lax.conv_general_dilated(jnp.ones((1, 3, 6)), x, (2,), [(1, 0)]),
    "both": lambda x: lax.conv_general_dilated(x[:1], x, (1,), [(1, 1)]),
    "product": lambda x: jax.vmap(lambda v: fc.apply(fc.conv_spec((1, 3, 4), (4, 3, 2), (1,), "SAME",
        padding_mode="circular"), KERNEL, v))(x),
    "product of kernels": lambda x: fc.kernel_vjp(fc.conv_spec((1, 3, 4), (2, 3, 2), (1,), [(0, 1)]), x[0],
        x[1, :2]),
    "scan": unrolled,
    "while": counted,
    "custom rule": lambda x: jax.jit(clipped)(x) * jax.checkpoint(jnp.sin)(x),
    "fft": lambda x: jnp.abs(jnp.fft.rfft(x)),
    "branches": lambda x: lax.cond(x[0, 0, 0] * 0 < 1, lambda v: v[0], lambda v: v[0] * 2, x) * 1.0,
}  # fmt: skip
# What may be read, though the derivative does not show it, or what is taken to be all.
AT_LEAST = {
    "max pooling": lambda x: pooled(x, lax.max, -jnp.inf),
    "relu": jax.nn.relu,
    "maximum": lambda x: x.max((0, 2)),
    "sorted": lambda x: jnp.sort(x, 1),
    "top": lambda x: lax.top_k(x, 2)[0],
    "choice": lambda x: jnp.where(x > 0, x[:, ::-1], 1.0),
    "index of x": lambda x: lax.dynamic_slice(x[0], ((x[1, 1, 1] > 0).astype(int), 0), (2, 3)),
    "unknown": lambda x: jnp.linalg.cholesky(x[0, :, :3] @ x[0, :, :3].T + 99 * jnp.eye(3)),
}


@pytest.mark.parametrize("name", EXACT)
def test_fields_are_where_the_jacobian_is_not_zero(name, patterns, rng):
    wanted = patterns[name].reshape(-1, X.size)
    if name == "branches":
        wanted = wanted | np.eye(1, X.size, dtype=bool)  # the condition
    check(name, EXACT[name], True, wanted, rng)


@pytest.mark.parametrize("name", AT_LEAST)
def test_fields_are_never_too_small(name, patterns, rng):
    check(name, AT_LEAST[name], False, patterns[name], rng)
    size = neurons.receptive_field(AT_LEAST[name], X, 0).size
    assert size == {"index of x": 12 + 1, "unknown": 9}.get(name, size) < X.size


def test_windows_of_a_pooling_are_those_of_a_sum():
    def mean(x):
        return pooled(x, lax.add, 0.0)

    for fn in (AT_LEAST["max pooling"], lambda x: pooled(x, lax.mul, 1.0)):
        for i in range(0, jax.eval_shape(fn, X).size, 5):
            a, b = (neurons.receptive_field(f, X, i).mask for f in (fn, mean))
            np.testing.assert_array_equal(a, b)


def test_pytrees():
    def fn(tree):
        return {"sum": tree["a"].sum(), "moved": tree["b"][::-1] + 1, "constant": jnp.zeros(2)}

    x = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}  # the ravel: constant, moved, sum
    fields = [neurons.receptive_field(fn, x, i) for i in (0, 2, -1)]
    assert [(f["a"].size, f["b"].mask.tolist()) for f in fields] == [
        (0, [False] * 3), (0, [False, False, True]), (4, [False] * 3),
    ]  # fmt: skip
    back = neurons.projective_field(fn, x, 4)
    assert (back["moved"].mask.tolist(), back["sum"].size, back["constant"].size) == (
        [False, False, True],
        0,
        0,
    )
    assert neurons.receptive_field(lambda v: v.sum(), jnp.zeros((0, 2)), ()).size == 0


# chains ------------------------------------------------------------------------------------------------


def network(x, kernels):
    """Two convolutions with a max pooling and circular padding in between."""
    x = jax.nn.relu(lax.conv_general_dilated(x, kernels[0], (1, 1), "SAME"))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap")
    return lax.conv_general_dilated(x, kernels[1], (1, 1), "VALID").mean(1)


ARGUMENTS = (
    jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32),
    [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 3, 3, 3), (5, 4, 3, 3))],
)


@pytest.mark.parametrize("raw", [False, True])
def test_sites_are_a_chain_with_what_stands_between(raw):
    sites = fc.find_convs(network, *ARGUMENTS, raw=raw)
    field = neurons.receptive_field(sites, (4, 0, 0))
    assert field.shape == sites[0].spec.in_shape == (3, 8, 8)
    rows = [t for o in (-1, 0, 1) for p in (0, 1) for t in range(2 * (o % 4) + p - 1, 2 * (o % 4) + p + 2)]
    rows = sorted({t for t in rows if 0 <= t < 8})
    assert [v.tolist() for v in field.indices] == [[0, 1, 2], rows, rows]
    assert field.size == 3 * len(rows) ** 2
    back = neurons.projective_field(sites, (2, 7, 7))
    assert back.shape == sites[-1].spec.out_shape
    assert back.mask[4, 0, 0]
    assert neurons.receptive_field(sites[1:], (4, 0, 0)).size == sites[1].spec.group_channels * 9


def test_sites_with_batch_groups_products_and_layouts(run_seed):
    for n in range(6):
        geometry = random_geometry(np.random.default_rng([run_seed, n]))
        spec = geometry.spec()
        if 0 in (spec.in_size, spec.out_size):
            continue
        pattern = oracle.pattern(geometry)
        kernel = jnp.ones(spec.rhs_shape)

        def by_product(x, spec=spec, kernel=kernel):
            return jnp.tanh(jax.vmap(lambda v: fc.apply(spec, kernel, v))(x))

        sites = fc.find_convs(by_product, jnp.ones((2, *spec.in_shape)))
        i, j = spec.out_size // 2, spec.in_size // 2
        np.testing.assert_array_equal(neurons.receptive_field(sites, i).mask.ravel(), pattern[i])
        np.testing.assert_array_equal(neurons.projective_field(sites, j).mask.ravel(), pattern[:, j])
        if spec.pads_with_zeros and min(spec.padding, default=(0, 0))[0] >= 0:

            def by_lax(x, spec=spec, kernel=kernel):
                return lax.conv_general_dilated(
                    x, kernel, spec.window_strides, spec.padding, spec.lhs_dilation, spec.rhs_dilation,
                    spec.dimension_numbers, spec.feature_group_count, spec.batch_group_count,
                )  # fmt: skip

            sites = fc.find_convs(by_lax, jnp.ones(geometry.lhs_shape))
            if not sites[0].examples:
                with pytest.raises(ValueError, match="a batch of no examples"):
                    neurons.receptive_field(sites, i)
                continue
            np.testing.assert_array_equal(neurons.receptive_field(sites, i).mask.ravel(), pattern[i])
            np.testing.assert_array_equal(neurons.projective_field(sites, j).mask.ravel(), pattern[:, j])


def test_what_stands_between_specs_is_named():
    sites = fc.find_convs(network, *ARGUMENTS)
    with pytest.raises(ValueError, match=r"that takes \(4, 8, 8\) to \(4, 4, 4\).*find_convs"):
        neurons.receptive_field([site.spec for site in sites], 0)
    with pytest.raises(ValueError, match=r"coverage: 'reduce_window_max' stands between site 0"):
        neurons.coverage(sites)

    def skipping(x, skip):
        y = jax.nn.gelu(lax.conv(x, jnp.ones((3, 3, 3)), (1,), "SAME"))
        return lax.conv(y + x if skip else y, jnp.ones((2, 3, 2)), (1,), "VALID")

    with pytest.raises(ValueError, match=r"coverage: 'add' stands between site 0"):
        neurons.coverage(fc.find_convs(skipping, X, True))
    sites = fc.find_convs(skipping, X, False)
    np.testing.assert_array_equal(neurons.coverage(sites), neurons.coverage([site.spec for site in sites]))
    side = fc.find_convs(lambda x: (lax.conv(x, KERNEL, (1,), "SAME"), lax.conv(x, KERNEL, (1,), "SAME")), X)
    with pytest.raises(ValueError, match=r"site 1, .*does not depend on site 0"):
        neurons.receptive_field(side, 0)
    with pytest.raises(ValueError, match="not all from one call of find_convs"):
        neurons.receptive_field([*sites, *side], 0)

    def looping(x):
        return lax.scan(lambda c, _: (lax.conv(c, jnp.ones((3, 3, 3)), (1,), "SAME"), None), x, None, 4)[0]

    looped = fc.find_convs(looping, X)
    with pytest.raises(ValueError, match=r"in a loop or a branch.*neurons.receptive_field\(fn, x, index\)"):
        neurons.receptive_field(looped, 0)


def test_arguments_that_are_wrong():
    with pytest.raises(TypeError, match="takes three arguments"):
        neurons.receptive_field(jnp.sin, X)
    with pytest.raises(IndexError, match="index"):
        neurons.projective_field(jnp.sin, X, 24)
    with pytest.raises(TypeError, match="is traced"):
        jax.jit(lambda x: neurons.receptive_field(jnp.sin, x, 0).mask)(jnp.ones(3))

    def written(x):
        ref = jax.new_ref(x)
        ref[0] = x[1]
        return ref[...]

    with pytest.raises(ValueError, match="mutable array"):
        neurons.receptive_field(written, jnp.ones(3), 0)

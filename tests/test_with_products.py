"""with_products: any function with its convolutions by this library's products; and conv_general_dilated."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count
from geometries import integers, normals, random_geometry
from handwritten import close, conv
from jax import lax
from test_connect import DEEP, SHAPES, K, X, jit
from test_networks import NETWORKS

import jaxconv_fc as fc

COUNT = count("GEOMETRIES", 12)


def convolutions_of_lax(fn, *args):
    """How many equations of a function's jaxpr are convolutions of lax."""
    return len(re.findall(r"= conv_general_dilated\[", str(jax.make_jaxpr(fn)(*args))))


# in the place of lax's ----------------------------------------------------------------------------


def test_random_geometries_of_a_batch_in_every_mode(run_seed):
    """Whole numbers, in the layouts and with the batch groups as they come: equal to the oracle."""
    for i in range(COUNT):
        rng = np.random.default_rng([run_seed, i])
        geometry = random_geometry(rng)
        x, kernel = (integers(rng, s, np.int32) for s in (geometry.lhs_shape, geometry.rhs_shape))
        spec = geometry.spec()  # its padding as numbers
        ours = partial(
            fc.conv_general_dilated, window_strides=spec.window_strides, padding=spec.padding,
            lhs_dilation=spec.lhs_dilation, rhs_dilation=spec.rhs_dilation,
            dimension_numbers=spec.dimension_numbers, feature_group_count=spec.feature_group_count,
            batch_group_count=spec.batch_group_count, padding_mode=spec.padding_mode,
        )  # fmt: skip
        got = jit(ours)(x, kernel)
        want = oracle.conv(x, kernel, geometry)
        assert got.shape == want.shape, (run_seed, i, geometry)
        assert (np.asarray(got) == want).all(), (run_seed, i, geometry)


def test_it_takes_what_lax_takes_and_gives_its_dtypes():
    x, kernel = X.astype(jnp.bfloat16), K.astype(jnp.bfloat16)
    options = {"precision": "highest", "preferred_element_type": jnp.float32}
    got = fc.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)
    close(got, conv(x, kernel, preferred_element_type=jnp.float32), 6)
    assert got.dtype == jnp.float32
    with pytest.raises(TypeError, match="one dtype"):
        fc.conv_general_dilated(x, K, (1, 1), "SAME")
    with pytest.raises(TypeError, match="lhs must be"):
        fc.conv_general_dilated(None, K, (1, 1), "SAME")


def test_flax_takes_it_in_its_conv():
    nnx = pytest.importorskip("flax.nnx")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 6, 4)), jnp.float32)
    layers = [
        nnx.Conv(4, 8, (3, 3), 2, feature_group_count=2, rngs=nnx.Rngs(0), conv_general_dilated=way)
        for way in (lax.conv_general_dilated, fc.conv_general_dilated)
    ]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want, got = (layer(x) for layer in layers)
        assert convolutions_of_lax(layers[1], x) == 0
    close(got, want, 6)


# functions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEEP)
def test_every_convolution_is_replaced_wherever_it_is(name):
    fn, _ = DEEP[name]
    replaced = fc.with_products(fn)
    assert convolutions_of_lax(replaced, X, K) == 0
    close(jit(replaced)(X, K), jit(fn)(X, K))
    assert jax.eval_shape(replaced, X, K) == jax.eval_shape(fn, X, K)


@pytest.mark.parametrize(
    "name", [n for n in DEEP if n not in ("while", "custom_vmap", "custom_jvp closing over")]
)
def test_gradients_keep_custom_rules_on_either_side(name):
    def gradient(fn):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(fn(x, k))), (0, 1))

    fn, _ = DEEP[name]
    want = jit(gradient(fn))(X, K)
    for got_fn in (gradient(fc.with_products(fn)), fc.with_products(gradient(fn))):
        assert convolutions_of_lax(got_fn, X, K) == 0
        for got, expected in zip(jit(got_fn)(X, K), want, strict=True):
            close(got, expected, 11)


def test_derivatives_of_any_order_and_vmap_on_either_side():
    fn = lambda x: jnp.sum(jnp.tanh(conv(x, K, (2, 1))) ** 2)  # noqa: E731
    tangent = jnp.cos(X)
    for of in (
        lambda f: jax.jvp(f, (X,), (tangent,))[1],
        lambda f: jax.jvp(jax.grad(f), (X,), (tangent,))[1],
        lambda f: jax.vmap(f)(jnp.stack([X, 2 * X])),
    ):
        want = jit(lambda of=of: of(fn))()
        close(jit(lambda of=of: of(fc.with_products(fn)))(), want)
        close(jit(lambda of=of: fc.with_products(of)(fn))(), want)


def test_a_function_is_traced_once_and_nothing_is_left_of_it_under_jit():
    traces = []

    def fn(x):
        traces.append(x)
        return {"y": conv(jnp.sin(x), K), "note": "kept"}

    replaced = fc.with_products(fn)
    assert replaced(X)["note"] == "kept"
    assert len(traces) == 1
    compiled = jax.jit(lambda x: replaced(x)["y"])
    compiled(X), compiled(X)
    assert len(traces) == 2


def test_names_of_layers_and_lines_stay():
    def layer(x, kernel):
        with jax.named_scope("block"):
            return jax.jit(lambda x: jax.nn.relu(conv(x, kernel)))(x)

    (before,) = fc.find_convs(layer, *SHAPES)
    (after,) = fc.find_convs(fc.with_products(layer), *SHAPES)
    assert before.name == after.name == "block"
    assert before.spec == after.spec
    (before,), (after,) = (fc.find_convs(f, *SHAPES) for f in (conv, fc.with_products(conv)))
    assert before.name == after.name  # the line that calls lax


def test_where_chooses_by_site():
    def net(params, x):
        with jax.named_scope("first"):
            x = conv(x, params["a"])
        return jax.jit(lambda x: conv(x, params["b"], (2, 2)))(x)

    params, seen = {"a": K, "b": K}, []

    def where(site):
        seen.append(site.name)
        return site.spec.window_strides == (2, 2)

    some = fc.with_products(net, where=where)
    assert convolutions_of_lax(some, params, X) == 1
    assert seen == ["first/a", "b"]
    close(some(params, X), net(params, X))


@pytest.mark.parametrize("narrow", [np.int8, jnp.bfloat16])
def test_sums_are_as_wide_as_the_convolution_says(narrow, rng):
    x, kernel = (jnp.asarray(integers(rng, v.shape, np.int32) * 31, narrow) for v in (X, K))
    wide = {"int8": jnp.int32, "bfloat16": jnp.float32}[jnp.dtype(narrow).name]
    got = fc.with_products(partial(conv, preferred_element_type=wide))(x, kernel)
    assert got.dtype == wide
    np.testing.assert_array_equal(got, conv(x.astype(jnp.float64), kernel.astype(jnp.float64)))


def test_exported_for_every_platform():
    fn = jax.jit(fc.with_products(jax.grad(lambda x, k: conv(x, k).sum(), (0, 1))))
    exported = jax.export.export(fn, platforms=["cpu", "cuda", "tpu"])(X, K)
    again = jax.export.deserialize(exported.serialize())
    for got, want in zip(again.call(X, K), fn(X, K), strict=True):
        close(got, want)


# where JAX is wrong -------------------------------------------------------------------------------

# (input, kernel, padding, groups) of docs/where-jax-is-wrong.md: lax or its gradient reads out of bounds
WRONG = {
    "3x3, (-1, 1)": ((1, 3, 8, 8), (4, 3, 3, 3), (-1, 1), 1),
    "2x2, (2, 0)": ((1, 3, 8, 8), (4, 3, 2, 2), (2, 0), 1),
    "3x3, (3, 1)": ((1, 3, 8, 8), (4, 3, 3, 3), (3, 1), 1),
    "3x3 depthwise, (4, 0)": ((1, 4, 8, 8), (4, 1, 3, 3), (4, 0), 4),
    "3, (5, 0)": ((1, 4, 24), (4, 4, 3), (5, 0), 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_gradients_are_right_where_those_of_lax_are_not(name):
    lhs, rhs, pad, groups = WRONG[name]
    rng = np.random.default_rng(0)
    x, kernel = (normals(rng, shape, np.float32) for shape in (lhs, rhs))
    dims = len(lhs) - 2

    def loss(x, kernel):
        y = lax.conv_general_dilated(x, kernel, (1,) * dims, [pad] * dims, feature_group_count=groups)
        return (y * y).sum()

    got = jit(jax.grad(fc.with_products(loss), (0, 1)))(x, kernel)
    wide = (jnp.asarray(v, jnp.float64) for v in (x, kernel))
    want = jit(jax.grad(loss, (0, 1)))(*wide)  # float64 is right there
    for a, b in zip(got, want, strict=True):
        close(a, b, 4)


# whole networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_the_same(name, rng):
    """Value and gradients against float64 of the unchanged function, within ten times what lax is off."""
    x = jnp.asarray(rng.standard_normal((2, 32, 32, 3)), jnp.float32)
    apply, variables, _ = NETWORKS[name](name, x)

    def loss(variables, x):
        return jnp.mean(apply(variables, x) ** 2)

    step = jax.value_and_grad(loss)
    assert convolutions_of_lax(fc.with_products(step), variables, x) == 0
    want, theirs, ours = (
        jax.tree.map(np.asarray, jit(fn)(*jax.tree.map(lambda v, d=dtype: v.astype(d), (variables, x))))
        for fn, dtype in ((step, jnp.float64), (step, jnp.float32), (fc.with_products(step), jnp.float32))
    )
    for exact, a, b in zip(*map(jax.tree.leaves, (want, theirs, ours)), strict=True):
        scale = abs(exact).max()
        assert abs(b - exact).max() <= 10 * abs(a - exact).max() + 1e-6 * scale

"""with_products: any function with its convolutions by this library's products; and conv_general_dilated."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count, drawn, of_devices
from geometries import integers, normals, random_geometry
from handwritten import close, compilations, conv
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from test_connect import DEEP, SHAPES, K, X, jit
from test_networks import NETWORKS, equinox_layer, image, variables_of

import jaxconv_fc as fc

COUNT = count("GEOMETRIES", 8)


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
    with pytest.raises(TypeError, match="cast one"):
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


def agree(functions, *args, digits=12):
    """The first and each of the others, as one program."""
    want, *made = jit(lambda *args: [fn(*args) for fn in functions])(*args)
    for got in made:
        jax.tree.map(partial(close, digits=digits), got, want)


@pytest.mark.parametrize("name", DEEP)
def test_every_convolution_is_replaced_wherever_it_is(name):
    fn, _ = DEEP[name]
    replaced = fc.with_products(fn)
    assert convolutions_of_lax(replaced, X, K) == 0
    close(*jit(lambda *args: (replaced(*args), fn(*args)))(X, K))
    assert jax.eval_shape(replaced, X, K) == jax.eval_shape(fn, X, K)


@pytest.mark.parametrize(
    "name", [n for n in DEEP if n not in ("while", "custom_vmap", "custom_jvp closing over")]
)
def test_gradients_keep_custom_rules_on_either_side(name):
    def gradient(fn):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(fn(x, k))), (0, 1))

    fn, _ = DEEP[name]
    ways = gradient(fc.with_products(fn)), fc.with_products(gradient(fn))
    for way in ways:
        assert convolutions_of_lax(way, X, K) == 0
    agree((gradient(fn), *ways), X, K, digits=11)


def test_derivatives_of_any_order_and_vmap_on_either_side():
    fn = lambda x: jnp.sum(jnp.tanh(conv(x, K, (2, 1))) ** 2)  # noqa: E731
    tangent = jnp.cos(X)
    for of in (
        lambda f: jax.jvp(f, (X,), (tangent,))[1],
        lambda f: jax.jvp(jax.grad(f), (X,), (tangent,))[1],
        lambda f: jax.vmap(f)(jnp.stack([X, 2 * X])),
    ):
        ways = [
            lambda of=of: of(fn),
            lambda of=of: of(fc.with_products(fn)),
            lambda of=of: fc.with_products(of)(fn),
        ]
        agree(ways)


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

    wide = [jnp.asarray(v, jnp.float64) for v in (x, kernel)]
    ours, laxs = jax.grad(fc.with_products(loss), (0, 1)), jax.grad(loss, (0, 1))
    got, want = jit(lambda given, wide: (ours(*given), laxs(*wide)))(
        (x, kernel), wide
    )  # float64 is right there
    for a, b in zip(got, want, strict=True):
        close(a, b, 4)


# whole networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["MobileNet", *(pytest.param(name, marks=pytest.mark.long) for name in ("ResNet18", "UNet"))]
)
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


# what a program is made of ------------------------------------------------------------------------


def products(fn, *args):
    """How many convolutions a function's jaxpr has, of lax or of this library."""
    return len(re.findall(r"= conv_(?:product|general_dilated)\[", str(jax.make_jaxpr(fn)(*args))))


@pytest.mark.parametrize("policy", ["dots_saveable", "save_only_these_names", "nothing_saveable"])
def test_a_checkpoint_saves_what_it_saved(policy):
    """As many convolutions as before: none is computed anew that the policy keeps, and none kept beside."""
    chosen = getattr(jax.checkpoint_policies, policy)
    chosen = chosen("y") if policy == "save_only_these_names" else chosen

    @partial(jax.checkpoint, policy=chosen)
    def fn(x, k):
        y = checkpoint_name(conv(jnp.sin(conv(x, k)), k), "y")
        return jnp.sum(jnp.sin(y))

    gradient = partial(jax.value_and_grad, argnums=(0, 1))
    ways = gradient(fc.with_products(fn)), fc.with_products(gradient(fn))
    for ours in ways:
        assert convolutions_of_lax(ours, X, K) == 0
        assert products(ours, X, K) == products(gradient(fn), X, K)
    agree((gradient(fn), *ways), X, K)


def test_a_rule_of_custom_vmap_is_obeyed():
    fn, _ = DEEP["custom_vmap"]
    xs = jnp.stack([X, 2 * X])
    mapped = jax.vmap(fn, (0, None))
    ways = jax.vmap(fc.with_products(fn), (0, None)), fc.with_products(mapped)
    for ours in ways:
        assert convolutions_of_lax(ours, xs, K) == 0
    agree((mapped, *ways), xs, K)


def test_arguments_may_be_donated_and_leaves_static():
    def fn(x, params, *, activation):
        return {"y": activation(conv(x, params["kernel"][0])), "stride": params["stride"], "none": None}

    params = {"kernel": [K], "stride": 1}
    got = fc.with_products(fn)(X, params, activation=jnp.tanh)
    assert got["stride"] == 1
    assert got["none"] is None
    close(got["y"], jnp.tanh(conv(X, K)))
    given = X + 0
    ours = jax.jit(fc.with_products(lambda x: conv(x, K)), donate_argnums=0)
    close(ours(given), conv(X, K))
    assert given.is_deleted()
    inner = fc.with_products(jax.jit(lambda x: conv(x, K), donate_argnums=0))
    close(inner(X), conv(X, K))


@pytest.mark.parametrize("weak", [(True, True), (True, False), (False, False)])
def test_a_result_is_as_weakly_typed_as_that_of_lax(weak):
    shapes = [
        jax.ShapeDtypeStruct(v.shape, jnp.float32, weak_type=w) for v, w in zip((X, K), weak, strict=True)
    ]
    want = jax.eval_shape(conv, *shapes)
    for replaced in (fc.with_products(conv), fc.fully_connected(conv)):
        got = jax.eval_shape(replaced, *shapes)
        assert (got.shape, got.dtype, got.weak_type) == (want.shape, want.dtype, want.weak_type)


def test_complex_numbers():
    x, k = lax.complex(X, jnp.cos(X)), lax.complex(K, -jnp.sin(K))

    def gradients(fn):
        return jit(jax.value_and_grad(lambda x, k: jnp.sum(abs(fn(x, k)) ** 2), (0, 1)))(x, k)

    jax.tree.map(close, gradients(fc.with_products(conv)), gradients(conv))


def test_a_loop_is_compiled_once_without_jit():
    def fn(x):
        return lax.scan(lambda c, _: (conv(c, K), None), jax.jit(jnp.sin)(x), None, length=3)[0]

    ours = fc.with_products(fn)
    close(ours(X), fn(X))
    with compilations() as programs:
        for _ in range(100):
            ours(X)
    assert not programs


# libraries ----------------------------------------------------------------------------------------


def nnx_model():
    nnx = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), padding="CIRCULAR", rngs=rngs), nnx.gelu,
        nnx.ConvTranspose(4, 3, (3, 3), (2, 2), rngs=rngs),
    )  # fmt: skip
    definition, params = nnx.split(model)
    return lambda params, x: nnx.merge(definition, params)(x), params


def linen_model():
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Conv(4, (3, 3), 2, feature_group_count=2), nn.gelu, nn.Conv(2, (1, 1))])
    return model.apply, variables_of(model, image(2))


def equinox_model():
    pytest.importorskip("equinox")
    import equinox as eqx

    layer = equinox_layer(eqx.nn.Conv2d, 2, 4, 3, 2, 1, groups=2, padding_mode="REFLECT")
    params, static = eqx.partition(layer, eqx.is_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(jnp.moveaxis(x, -1, 1))

    return apply, params


def haiku_model():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Conv2D(3, 3, rate=2)(hk.Conv2D(4, 3)(x))))
    return net.apply, variables_of(net, image(2))


def keras_model():
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend here")
    layers = keras.layers
    model = keras.Sequential([
        layers.Input((5, 4, 2)), layers.DepthwiseConv2D(3, depth_multiplier=2, dtype="float64"),
        layers.Conv2DTranspose(3, 2, 2, activation="gelu", dtype="float64"),
    ])  # fmt: skip
    params = [jnp.asarray(v.value) for v in model.trainable_variables]
    return lambda params, x: model.stateless_call(params, [], x)[0], params


@pytest.mark.parametrize("make", drawn([nnx_model, linen_model, equinox_model, haiku_model, keras_model], 3))
def test_a_model_of_any_library_has_the_gradients_that_it_had(make):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        apply, params = make()
        params, x = jax.tree.map(lambda v: v.astype(jnp.float64), (params, image(2)))

        def step(apply):
            return jax.value_and_grad(lambda params, x: jnp.mean(apply(params, x) ** 2), (0, 1))

        ways = step(fc.with_products(apply)), fc.with_products(step(apply))
        for ours in ways:
            assert convolutions_of_lax(ours, params, x) == 0
        agree((step(apply), *ways), params, x)


# devices ------------------------------------------------------------------------------------------


def check_devices():
    """Values, types and shardings of a loss and its gradients on 4 devices: as lax has them."""
    x, k = jnp.concatenate([X, 2 * X, jnp.cos(X), X - 1]), K

    def fn(x, k):
        return jnp.tanh(conv(x, k, (2, 1)))

    def compare(loss, step, *args):
        """``loss(fn)`` is the loss, with the products inside, around it, and around its gradients."""
        around = fc.with_products
        ways = step(loss(around(fn))), step(around(loss(fn))), around(step(loss(fn)))
        for ours in ways:
            assert convolutions_of_lax(ours, *args) == 0
        want, *made = jax.jit(lambda *args: [of(*args) for of in (step(loss(fn)), *ways)])(*args)
        for got in made:
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                close(np.asarray(a), np.asarray(b))
                assert jax.typeof(a) == jax.typeof(b), (jax.typeof(a), jax.typeof(b))
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)

    step = partial(jax.value_and_grad, argnums=(0, 1))
    types = jax.sharding.AxisType
    mesh = jax.make_mesh((4,), ("d",), axis_types=(types.Auto,))
    for check_vma in (True, False):
        mapped = partial(
            jax.shard_map, mesh=mesh, in_specs=(jax.P("d"), jax.P()), out_specs=jax.P(), check_vma=check_vma
        )

        def loss(fn, mapped=mapped):
            return mapped(lambda x, k: lax.psum(jnp.sum(fn(x, k) ** 2), "d"))

        compare(loss, step, x, k)
    with jax.set_mesh(jax.make_mesh((4,), ("d",), axis_types=(types.Explicit,))):
        args = jax.device_put(x, jax.P("d")), jax.device_put(k, jax.P())
        compare(lambda fn: fn, lambda fn: fn, *args)  # the type of the result itself
        compare(lambda fn: lambda x, k: jnp.sum(fn(x, k) ** 2), step, *args)
    print("done")


def test_on_four_devices():
    code = "import conftest, test_with_products; test_with_products.check_devices()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300,
        env=of_devices(4), check=False,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr[-4000:]

"""Gradients of single examples of whole models, against ``jax.vmap(jax.grad)``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxconv_fc as fc
from jaxconv_fc.curvature.model import _Model

curvature = fc.curvature
N = 3


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def arrays(rng, **shapes):
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def cross_entropy(scores, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], 1).sum()


def reference(loss, params, batch):
    """[n, entries of all parameters]."""
    of_one = jax.grad(lambda params, example: loss(params, jax.tree.map(lambda v: v[None], example)))
    gradients = jax.jit(jax.vmap(of_one, (None, 0)))(params, batch)
    return np.concatenate([np.asarray(g).reshape(N, -1) for g in jax.tree.leaves(gradients)], 1)


def images(rng):
    """Strides, groups, boundary modes, a kernel used twice, one that is normalised, biases and scales."""
    shapes = {"first": (4, 2, 3, 3), "scale": (4,), "grouped": (4, 2, 2, 2), "twice": (4, 4, 1, 1)}
    params = arrays(rng, **shapes, padded=(2, 4, 2, 3), normal=(2, 2, 2, 2), dense=(6, 5), bias=(5,))

    def loss(params, batch):
        x = lax.conv_general_dilated(batch["x"], params["first"], (2, 1), [(1, 1), (1, 0)])
        x = jnp.tanh(x * params["scale"][:, None, None])
        x = lax.conv_general_dilated(x, params["grouped"], (1, 1), "SAME", feature_group_count=2)
        for _ in range(2):
            x = jnp.tanh(jax.checkpoint(lambda k, x: lax.conv(x, k, (1, 1), "SAME"))(params["twice"], x))
        x = fc.conv_general_dilated(x, params["padded"], (1, 1), [(1, 0), (1, 1)], padding_mode="circular")
        kernel = params["normal"] / jnp.sqrt((params["normal"] ** 2).sum())
        x = jax.nn.relu(lax.conv(x, kernel, (1, 2), "VALID"))
        x = x.reshape(len(x), -1)[:, :6]
        return cross_entropy(x @ params["dense"] + params["bias"], batch["y"])

    batch = {"x": jnp.asarray(rng.standard_normal((N, 2, 6, 5))), "y": jnp.arange(N)}
    return loss, params, batch, {"first", "grouped", "padded", "dense"}


def sequences(rng):
    """An embedding that is tied, heads, a normalisation, a loop in which kernels are shared."""
    shapes = {"table": (7, 4), "query": (4, 4), "heads": (2, 4, 2), "scale": (4,)}
    params = arrays(rng, **shapes, state=(4, 4), step=(4, 4))

    def loss(params, tokens):
        x = params["table"][tokens]
        x = x * params["scale"] / jnp.sqrt(1 + (x**2).mean(-1, keepdims=True))
        weights = jax.nn.softmax(jnp.einsum("ntd,nsd->nts", x @ params["query"], x))
        x = x + (weights @ jnp.einsum("ntd,hde->nthe", x, params["heads"]).reshape(x.shape))

        def step(state, x):
            return jnp.tanh(state @ params["state"] + x @ params["step"]), None

        state, _ = lax.scan(step, jnp.zeros_like(x[:, 0]), x.transpose(1, 0, 2))
        return (-jax.nn.log_softmax(state @ params["table"].T)[jnp.arange(len(tokens)), tokens[:, 0]]).sum()

    return loss, params, jnp.asarray(rng.integers(0, 7, (N, 3))), {"query", "heads"}


def frames(rng):
    """Several inputs of one layer in every example, by vmap."""
    params = arrays(rng, kernel=(3, 3, 2, 2), left=(4, 24))

    def of_one(params, video):
        y = lax.conv_general_dilated(
            video, params["kernel"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (jnp.tanh(params["left"] @ y.reshape(len(video), -1).T) ** 2).mean()

    def loss(params, videos):
        return jax.vmap(of_one, (None, 0))(params, videos).sum()

    return loss, params, jnp.asarray(rng.standard_normal((N, 2, 6, 4, 2))), {"kernel", "left"}


@pytest.mark.parametrize("model", [images, sequences, frames])
def test_models(model, rng):
    loss, params, batch, metered = model(rng)
    gradients = reference(loss, params, batch)
    found = _Model("test", loss, params, batch)
    assert {found.names[i] for i in found.uses.metered()} == metered

    norms = jax.jit(lambda p, b: curvature.model_gradient_norms(loss, p, b))(params, batch)
    np.testing.assert_allclose(norms, np.linalg.norm(gradients, axis=1), rtol=1e-7)
    if model is not images:
        gram = jax.jit(lambda p, b: curvature.model_gram(loss, p, b))(params, batch)
        np.testing.assert_allclose(gram, gradients @ gradients.T, rtol=1e-9, atol=1e-9 * np.abs(gram).max())


def test_layers_and_factors(rng):
    whole, params, batch, _ = images(rng)
    normal = {"normal": params.pop("normal")}  # a kernel that is computed from a parameter
    loss, layers = lambda params, batch: whole(params | normal, batch), []

    @jax.jit
    def every(params, batch):
        layers[:] = curvature.model_layers(loss, params, batch)
        gradients = [
            jax.vmap(fc.kernel_vjp, (None, 0, 0))(v.spec, v.xs, v.y_bars).sum(0).reshape(params[v.name].shape)
            for v in layers
        ]
        pairs = [curvature.kfac_factors(v.spec, v.xs, v.y_bars, approx="reduce") for v in layers]
        factors = curvature.model_kfac(loss, params, batch, approx="reduce")
        return gradients, pairs, factors, jax.grad(loss)(params, batch), layers[-1].kernel

    gradients, pairs, factors, want, kernel = every(params, batch)
    assert [layer.name for layer in layers] == ["first", "grouped", "twice", "twice", "padded", "dense"]
    assert sorted(factors) == ["dense", "first", "grouped", "padded", "twice"]
    for name in factors:
        uses = [i for i, layer in enumerate(layers) if layer.name == name]
        np.testing.assert_allclose(sum(gradients[i] for i in uses), want[name], rtol=1e-9, atol=1e-9)
        for got, *parts in zip(factors[name], *(pairs[i] for i in uses), strict=True):
            np.testing.assert_allclose(got, sum(parts), rtol=1e-9, atol=1e-12)
    assert layers[-1].spec.axes == ()
    np.testing.assert_array_equal(kernel, params["dense"])
    with pytest.raises(ValueError, match="cannot see the layer that uses normal: conv_general_dilated"):
        curvature.model_layers(whole, params | normal, batch)


W = {"w": jnp.ones((4, 3))}


def features(params, x):
    return jnp.tanh(x @ params["w"])


def normalised(params, x):
    y = features(params, x)
    return (((y - y.mean(0)) / (1 + y.std(0))) ** 2).sum()


def drawn(x):
    return jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)


MIXED = {
    "batch normalisation": (normalised, "computes with a sum over examples"),
    "one with another": (lambda p, x: (features(p, x) @ features(p, x).T).sum(), "pairs every example"),
    "log of a mean": (lambda p, x: jnp.log((features(p, x) ** 2).mean()), "log in .* computes with a sum"),
    "square of a sum": (lambda p, x: features(p, x).sum() ** 2, "computes with a sum over examples"),
    "maximum": (lambda p, x: features(p, x).max(), "reduce_max in .* works along the examples"),
    "reversed": (lambda p, x: (features(p, x) * x[::-1, :3]).sum(), "rev in .* works along"),
    "rolled": (lambda p, x: (features(p, x) * jnp.roll(x, 1, 0)[:, :3]).sum(), "works along the examples"),
    "shifted": (lambda p, x: (features(p, x) * lax.pad(x, 0.0, [(1, -1, 0), (0, -1, 0)])).sum(), "pad in"),
    "differences": (lambda p, x: ((features(p, x)[1:] - features(p, x)[:-1]) ** 2).sum(), "slice in"),
    "a window": (
        lambda p, x: features(p, lax.dynamic_slice_in_dim(jnp.tile(x, (2, 1)), 1, len(x))).sum(),
        "along",
    ),
    "two batches": (lambda p, x: features(p, jnp.concatenate([x, -x])).sum(), "concatenate in"),
    "counted": (lambda p, x: (features(p, x).sum(1) * jnp.cumsum(jnp.ones(len(x)))).sum(), "whole batch"),
    "repeated": (lambda p, x: (features(p, x).ravel() * jnp.repeat(jnp.arange(3), len(x))).sum(), "batch"),
    "cumulative": (lambda p, x: jnp.tanh(jnp.cumsum(features(p, x), 0)).sum(), "cumsum in .* works along"),
    "softmax": (lambda p, x: (jax.nn.softmax(features(p, x), 0) ** 2).sum(), "works along the examples"),
    "sorted": (lambda p, x: (jnp.sort(features(p, x), 0) ** 2).sum(), "sort in .* works along"),
    "reshaped": (lambda p, x: (x.reshape(4, -1).T @ p["w"]).sum(), "reshape in .* works along"),
    "the first one": (lambda p, x: features(p, x)[0].sum(), "works along the examples"),
    "random numbers": (lambda p, x: (features(p, x * drawn(x))).sum(), "drawn for a whole batch"),
    "noise alone": (lambda p, x: (features(p, 1.0 * drawn(x))).sum(), "random numbers"),
    "permuted": (lambda p, x: features(p, x[jnp.argsort(drawn(x)[:, 0])]).sum(), "whole batch"),
    "numbered": (lambda p, x: (features(p, x).sum(1) * jnp.arange(len(x))).sum(), "number of an example"),
    "a loop": (lambda p, x: lax.map(lambda row: features(p, row), x).sum(), "loop over the examples"),
    "in a branch": (lambda p, x: lax.cond(True, normalised, normalised, p, x), "a sum over examples"),
    "by size": (lambda p, x: features(p, x).sum() if len(x) > 2 else x.sum(), "other operations"),
    "of one size": (lambda p, x: (features(p, x) * jnp.ones((N, 1))).sum(), "a batch of any size"),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_loss_that_mixes_examples_is_refused(name):
    loss, says = MIXED[name]
    with pytest.raises(ValueError, match=says):
        curvature.model_gradient_norms(loss, W, jnp.ones((N, 4)))


def test_what_else_is_refused():
    x, loss = jnp.ones((N, 4)), lambda p, x: features(p, x).sum()
    for function in (curvature.model_gradient_norms, curvature.model_gram, curvature.model_kfac):
        for other in (
            lambda p, x: features(p, x),
            lambda p, x: (loss(p, x), 1),
            lambda p, x: (p["w"] > 0).sum(),
        ):
            with pytest.raises(TypeError, match="loss must return"):
                function(other, W, x)
        with pytest.raises(TypeError, match="params must hold a real floating array"):
            function(loss, {"w": jnp.ones((4, 3), int)}, x)
        with pytest.raises(TypeError, match="w is complex128"):
            function(loss, {"w": jnp.ones((4, 3), complex), "b": jnp.ones(1)}, x)
        with pytest.raises(TypeError, match="batch must hold arrays"):
            function(loss, W, 1.0)
        with pytest.raises(ValueError, match=r"as many examples, got \[2, 3\]"):
            function(lambda p, b: loss(p, b[0]), W, (x, x[:2]))
    with pytest.raises(ValueError, match="approx must be one of"):
        curvature.model_kfac(loss, W, x, approx="sum")

    def twice(params, x):
        return features(params, features(params, x) @ params["w"].T).sum()

    with (
        fc.memory_limit(100),
        pytest.raises(
            ValueError, match=r"w is used by several layers, .* each of 3 examples, 288 bytes: use"
        ),
    ):
        curvature.model_gradient_norms(twice, W, x)

    def loop(params, x):
        return lax.fori_loop(0, 2, lambda i, y: features(params, y) @ params["w"].T, x).sum()

    for function in (curvature.model_kfac, curvature.model_layers):
        with pytest.raises(ValueError, match="cannot see the layer that uses w: scan"):
            function(loop, W, x)


def test_transformations():
    """vmap over parameters, a gradient of the norms, an average, and shard_map with a sharded batch."""
    rng = np.random.default_rng(1)
    params, x = {"w": rng.standard_normal((4, 3)), "b": rng.standard_normal(3)}, rng.standard_normal((N, 4))

    def loss(params, x):
        return (jnp.tanh(x @ params["w"] + params["b"]) ** 2).sum()

    def norms(params, x):
        return curvature.model_gradient_norms(loss, params, x)

    def direct(params, x):
        of_one = jax.vmap(jax.grad(lambda p, row: loss(p, row[None])), (None, 0))(params, x)
        return jnp.sqrt((of_one["w"] ** 2).sum((1, 2)) + (of_one["b"] ** 2).sum(1))

    def average(params, x):
        return loss(params, x) / len(x)

    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    def every(params, x):
        want = direct(params, x)
        many = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), params)
        shared = [
            jax.shard_map(
                norms, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P("d"), check_vma=vma
            )
            for vma in (True, False)
        ]
        slopes = [jax.grad(lambda p, f=f: f(p, x).sum())(params) for f in (norms, direct)]
        got = jax.vmap(norms, (0, None))(many, x)[0], curvature.model_gradient_norms(average, params, x)
        return (*got, *(f(params, x) for f in shared)), want, slopes

    got, want, slopes = every(params, x)
    for found in got:
        np.testing.assert_allclose(found, want, rtol=1e-12)
    np.testing.assert_allclose(slopes[0]["w"], slopes[1]["w"], rtol=1e-9)


def filled(rng, shapes):
    """Arrays of these shapes: nothing of a library is compiled to initialise them."""
    return jax.tree.map(lambda v: jnp.asarray(rng.uniform(-0.2, 0.4, v.shape), v.dtype), shapes)


def linen(rng, x):
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        train: bool = False

        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=not self.train)(nn.Conv(4, (3, 3), padding="CIRCULAR")(x))
            return nn.Dense(3)(nn.LayerNorm()(nn.relu(x).reshape(len(x), -1)))

    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)
    stats = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), shapes["batch_stats"])
    params = filled(rng, shapes["params"])

    def loss(params, x, train=False):
        y, _ = Net(train).apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return (y**2).sum()

    with pytest.raises(ValueError, match=r"in Net/BatchNorm_0 computes with a sum over examples"):
        curvature.model_gradient_norms(lambda p, x: loss(p, x, True), params, x)
    return loss, params, {"Conv_0/kernel", "Dense_0/kernel"}


def nnx(rng, x):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), feature_group_count=2, rngs=rngs)
            self.dense = nnx.Linear(64, 3, rngs=rngs)

    graph, shapes = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)

    def loss(params, x):
        net = nnx.merge(graph, params)
        return (net.dense(jax.nn.gelu(net.conv(x)).reshape(len(x), -1)) ** 2).sum()

    return loss, filled(rng, shapes), {"conv/kernel", "dense/kernel"}


def equinox(rng, x):
    eqx = pytest.importorskip("equinox")

    def net(keys):
        return eqx.nn.Sequential([
            eqx.nn.Conv2d(2, 4, 3, padding=1, key=keys[0]), eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(64, 3, key=keys[1]),
        ])  # fmt: skip

    shapes = eqx.filter_eval_shape(net, jax.random.split(jax.random.key(0)))
    params, static = eqx.partition(shapes, lambda v: isinstance(v, jax.ShapeDtypeStruct))

    def loss(params, x):
        return (jax.vmap(eqx.combine(params, static))(x.transpose(0, 3, 1, 2)) ** 2).sum()

    floats = jax.tree.map(lambda v: v.astype(x.dtype), filled(rng, params))
    return loss, floats, {"layers/0/weight", "layers/3/weight"}


def haiku(rng, x):
    hk = pytest.importorskip("haiku")

    def forward(x):
        return hk.nets.MLP([5, 3])(jax.nn.relu(hk.Conv2D(4, 3)(x)).reshape(len(x), -1))

    net = hk.without_apply_rng(hk.transform(forward))
    kernels = {"conv2_d/w", "mlp/~/linear_0/w", "mlp/~/linear_1/w"}
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    return lambda p, x: (net.apply(p, x) ** 2).sum(), filled(rng, shapes), kernels


@pytest.mark.parametrize("values", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("library", [linen, nnx, equinox, haiku])
def test_libraries(library, values, rng):
    """Which kernels are found, and with ``-m long`` the norms."""
    x = jnp.asarray(rng.standard_normal((N, 4, 4, 2)), jnp.float32)
    loss, params, kernels = library(rng, x)
    found = _Model("test", loss, params, x)
    assert {found.names[i] for i in found.uses.metered()} == kernels
    if values:
        norms = jax.jit(lambda p, x: curvature.model_gradient_norms(loss, p, x))(params, x)
        want = np.linalg.norm(reference(loss, params, x), axis=1)
        np.testing.assert_allclose(norms, want, rtol=1e-4)

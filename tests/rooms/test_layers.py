"""affine_layers: the network is its layers, its intervals hold, and its program has its optimum."""

import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handwritten import close, conv, normal
from jax import lax, nn

import jaxconv_fc as fc

RNG = np.random.default_rng(8)
FIRST, MIDDLE, LAST = normal(RNG, 6, 3), normal(RNG, 6, 6), normal(RNG, 2, 6)
SLOPE = np.float64(0.3)


def between(activation):
    """Two layers of activations between affine maps of vectors."""
    return lambda x: LAST @ activation(MIDDLE @ activation(FIRST @ x + 0.1) - 0.2)


def _norm(z):
    return (z - z.mean()) / jnp.sqrt(z.var() + 1e-3)


def _attention(z):
    rows = z.reshape(3, 2)
    return (nn.softmax(rows @ rows.T) @ rows).ravel()


SOFTMAX = "max exp power mul"
# function -> the names of the activations that it becomes
ACTIVATIONS = {
    "relu": (nn.relu, "relu"),
    "relu of a where": (lambda z: jnp.where(z > 0, z, 0.0), "relu"),
    "leaky relu": (nn.leaky_relu, "leaky_relu"),
    "leaky relu, below 0 first": (lambda z: jnp.where(z < 0, SLOPE * z, z), "leaky_relu"),
    "leaky relu, steep": (lambda z: jnp.where(z >= 0, z, 2.5 * z), "leaky_relu"),
    "maximum of multiples": (lambda z: jnp.maximum(z, SLOPE * z), "leaky_relu"),
    "minimum of multiples": (lambda z: jnp.minimum(z, 2 * z), "max"),
    "abs": (jnp.abs, "abs"),
    "abs of a where": (lambda z: jnp.where(z > 0, z, -z), "abs"),
    "relu6": (nn.relu6, "clip"),
    "clip": (lambda z: jnp.clip(z, -0.5, 0.7), "clip"),
    "clip of a clip": (lambda z: jnp.clip(jnp.clip(z, -1, 1), -0.5, 2), "clip"),
    "clamp": (lambda z: lax.clamp(-0.5, z, 0.25), "clip"),
    "minimum with a number": (lambda z: jnp.minimum(z, 0.3), "clip"),
    "maximum with numbers": (lambda z: jnp.maximum(z, jnp.arange(6.0) / 6), "max"),
    "hard tanh": (nn.hard_tanh, "clip"),
    "hard silu": (nn.hard_silu, "clip mul"),
    "silu": (nn.silu, "silu"),
    "silu by hand": (lambda z: z * nn.sigmoid(z), "silu"),
    "gelu": (nn.gelu, "gelu"),
    "gelu exact": (lambda z: nn.gelu(z, approximate=False), "gelu"),
    "gelu by hand": (lambda z: 0.5 * z * (1 + lax.erf(z / np.sqrt(2))), "gelu"),
    "nearly a gelu": (lambda z: 0.5 * z * (1 + lax.erf(z / 1.4)), "erf mul"),
    "softplus": (nn.softplus, "softplus"),
    "elu": (nn.elu, "elu"),
    "elu of another slope": (lambda z: nn.elu(z, 0.5), "elu"),
    "mish": (nn.mish, "softplus tanh mul"),
    "tanh": (jnp.tanh, "tanh"),
    "sigmoid": (nn.sigmoid, "sigmoid"),
    "softmax": (nn.softmax, SOFTMAX),
    "log softmax": (nn.log_softmax, "max exp log"),
    "square": (lambda z: z**2, "square"),
    "z times z": (lambda z: z * z, "square"),
    "z times its copy": (lambda z: z * (2 * z - z), "square"),
    "cube": (lambda z: z**3, "power"),
    "power": (lambda z: (jnp.abs(z) + 0.01) ** 1.5, "abs power"),
    "rsqrt": (lambda z: lax.rsqrt(jnp.abs(z) + 0.1), "abs power"),
    "sqrt": (lambda z: jnp.sqrt(jnp.abs(z) + 0.1), "abs sqrt"),
    "log1p": (lambda z: jnp.log1p(jnp.abs(z)), "abs log1p"),
    "sin": (jnp.sin, "sin"),
    "cos": (jnp.cos, "cos"),
    "erfc": (lax.erfc, "erfc"),
    "sign": (jnp.sign, "sign"),
    "layer norm": (_norm, "square sqrt power mul"),
    "quotient": (lambda z: z / (1 + z[::-1] ** 2), "square power mul"),
    "inverse": (lambda z: 2 / (1 + z**2), "square power"),
    "gate": (lambda z: jnp.tile(nn.glu(z), 2), "sigmoid mul"),
    "where": (lambda z: jnp.where(z > SLOPE, z**2, jnp.tanh(z)), "square tanh where"),
    "a jump": (lambda z: jnp.where(z <= 0, z, z + 1), "where"),
    "attention": (_attention, f"mul {SOFTMAX} mul"),
    "max of pairs": (lambda z: jnp.repeat(jnp.maximum(z[::2], z[1::2]), 2), "max"),
    "max pool": (
        lambda z: lax.reduce_window(z, -jnp.inf, lax.max, (3,), (1,), [(1, 1)]), "max"),
    "min": (lambda z: z - z.reshape(2, 3).min(1).repeat(3), "max"),
}  # fmt: skip
POINTS = np.random.default_rng().uniform(-1, 1, (2000, 3))


@pytest.fixture(scope="module")
def values():
    """All networks at all points, as one program."""
    nets = [between(activation) for activation, _ in ACTIVATIONS.values()]
    results = jax.jit(lambda xs: [jax.vmap(net)(xs) for net in nets])(jnp.asarray(POINTS))
    return dict(zip(ACTIVATIONS, map(np.asarray, results), strict=True))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation(name, values):
    """By name, exact at points, within the intervals, and once more where nothing but rounding is left."""
    activation, names = ACTIVATIONS[name]
    layers = fc.affine_layers(between(activation), jax.ShapeDtypeStruct((3,), jnp.float64))
    assert [layer.activation for layer in layers] == [*names.split(), *names.split(), None]
    got = np.stack([layers.evaluate(x) for x in POINTS[:20]])
    np.testing.assert_allclose(got, values[name][:20], rtol=1e-9, atol=1e-9)
    low, high = layers.bounds(-1.0, 1.0)[-1]
    assert (low <= values[name]).all()
    assert (values[name] <= high).all()
    for point, value in zip(POINTS[:3], values[name], strict=False):
        low, high = layers.bounds(point, point)[-1]
        assert (low <= value).all()
        assert (value <= high).all()
        assert (high - low < 1e-6 * (1 + abs(value))).all() or name in ("a jump", "sign")


def _unet(x):
    """A skip, a pool, a shared layer, a gate, and a result that is a pytree."""
    kernel, down = jnp.asarray(K), jnp.asarray(DOWN)
    a = nn.relu(conv(x, UP) + 0.1)
    b = lax.reduce_window(a, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    b = nn.relu(conv(nn.relu(conv(b, kernel)), kernel))
    b = jnp.repeat(jnp.repeat(b, 2, 2), 2, 3)
    both = conv(jnp.concatenate([a, b], 1), down)
    return {"map": both, "score": (nn.sigmoid(both.mean((2, 3))) * x.mean((2, 3))[:, :1]).sum()}


UP, K, DOWN = normal(RNG, 4, 2, 3, 3), normal(RNG, 4, 4, 3, 3), normal(RNG, 2, 8, 1, 1)


def test_a_network_with_skips():
    shape = (1, 2, 6, 6)
    layers = fc.affine_layers(_unet, jax.ShapeDtypeStruct(shape, jnp.float64))
    assert [layer.activation for layer in layers] == ["relu", "max", "relu", "relu", "sigmoid", "mul", None]
    assert [layer.inputs for layer in layers] == [(-1,), (0,), (1,), (2,), (0, 3), (-1, 4), (0, 3, 5)]
    xs = RNG.uniform(-1, 1, (200, *shape))
    want = jax.jit(jax.vmap(_unet))(jnp.asarray(xs))
    for i in range(10):
        got = layers.evaluate(xs[i])
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(lambda a, b, i=i: close(a, b[i]), got, want)
    bounds = layers.bounds(-1.0, 1.0)
    assert [len(low) for low, _ in bounds] == [len(layer.offset) for layer in layers]
    flat = np.concatenate([np.asarray(v).reshape(200, -1) for v in jax.tree.leaves(want)], 1)
    assert (bounds[-1][0] <= flat).all()
    assert (flat <= bounds[-1][1]).all()
    for (low, high), layer in zip(bounds, layers, strict=True):
        h = {-1: xs[0].ravel()}
        z = layer.offset + sum(m @ h[n] for n, m in zip(layer.inputs, layer.matrices, strict=True) if n in h)
        if set(layer.inputs) == {-1}:
            assert ((low <= z) & (z <= high)).all()


def test_dtypes_and_rounding():
    """Bounds of a point, in float32, hold what float32 makes of it."""
    weights = [jnp.asarray(w, jnp.float32) for w in (FIRST, MIDDLE, LAST)]

    def net(x):
        return weights[2] @ nn.gelu(weights[1] @ jnp.exp(weights[0] @ x))

    layers = fc.affine_layers(net, jax.ShapeDtypeStruct((3,), jnp.float32))
    assert layers[0].matrices[0].dtype == layers[0].offset.dtype == np.float32
    many = jnp.asarray(POINTS[:200], jnp.float32)
    for x, y in zip(many, jax.jit(jax.vmap(net))(many), strict=True):
        assert layers.evaluate(x).dtype == np.float32
        low, high = layers.bounds(x, x)[-1]
        assert ((low <= np.asarray(y)) & (np.asarray(y) <= high)).all()


def test_pytrees_of_inputs():
    def net(v):
        return nn.relu(v["a"] @ FIRST[:, 0]) + v["b"]

    x = {"a": normal(RNG, 6), "b": np.float64(2.0)}
    layers = fc.affine_layers(net, x)
    close(layers.evaluate(x), net(x))
    low, high = layers.bounds({"a": x["a"] - 0.1, "b": 1.0}, {"a": x["a"] + 0.1, "b": 3.0})[-1]
    assert low <= net(x) <= high
    with pytest.raises(ValueError, match="x must have the shape that the layers were made for"):
        layers.evaluate(x["a"])


MASK = np.array([True, False, True])


def _by_stacked_conditions(x):
    _, conditions = lax.scan(lambda c, sign: (c, sign * x > 0), 0, jnp.array([1.0, -1.0]))
    return lax.scan(lambda c, which: (c + jnp.where(which, x, 0.0), None), 0 * x, conditions)[0]


def test_what_is_unknown_is_refused_by_name():
    for fn, message in (
        (jnp.sort, "primitive 'sort' at test_layers.py"),
        (lambda x: jnp.cumprod(x), "primitive 'cumprod' at test_layers.py"),
        (lambda x: jnp.where((x > 0) & (x < 1), x, 0.0), "primitive 'gt' at test_layers.py"),
        # a condition that is chosen, or stacked and taken apart, is not the first of them
        (lambda x: jnp.where(jnp.where(MASK, x > 0, x < 0), x, 0.0), "primitive 'lt' at test_layers.py"),
        (_by_stacked_conditions, "primitive 'gt' at test_layers.py"),
        (lambda x: x.astype(jnp.int32), "to int32 at test_layers.py"),
        (lambda x: jnp.clip(x, -x, 1.0 * x), None),
    ):
        if message is None:
            fc.affine_layers(fn, jnp.ones(3))
            continue
        with pytest.raises(ValueError, match=f"affine_layers: .*{message}"):
            fc.affine_layers(lambda x, fn=fn: 2 * fn(3 * x), jnp.ones(3))
    with pytest.raises(TypeError, match="use local_affine under jit"):
        jax.jit(lambda w: fc.affine_layers(lambda x: nn.relu(w * x), jnp.ones(3))[0].offset)(jnp.ones(3))
    with pytest.raises(TypeError, match="computes in bfloat16, which SciPy cannot multiply"):
        fc.affine_layers(lambda x: nn.relu(x) * 2, jnp.ones(3, jnp.bfloat16))
    with pytest.raises(ValueError, match="low must be at most high"):
        fc.affine_layers(nn.relu, jnp.ones(3)).bounds(1.0, 0.0)


def test_the_table():
    layers = fc.affine_layers(lambda x: jnp.clip(2 * x, -1, 0.5).sum() + x[:1], jnp.ones(3))
    lines = repr(layers).splitlines()
    assert re.fullmatch(r"0 +x +3 +3 +clip \(low -1, high 0.5\) +3 +test_layers.py:\d+", lines[1])
    assert lines[2].split() == ["1", "x,", "0", "1", "4", "1"]
    assert layers._repr_html_().count("<tr>") == 3


# programs for solvers -----------------------------------------------------------------------------

PIECEWISE = ["relu", "leaky relu", "leaky relu, below 0 first", "leaky relu, steep", "maximum of multiples",
             "minimum of multiples", "abs", "relu6", "clip", "minimum with a number", "maximum with numbers",
             "max of pairs", "max pool", "min"]  # fmt: skip


@pytest.mark.parametrize("name", PIECEWISE)
def test_the_optimum_of_the_program(name, values):
    """Attained by the network, and not exceeded at any point."""
    highspy = pytest.importorskip("highspy")
    net = between(ACTIVATIONS[name][0])
    layers = fc.affine_layers(net, jnp.zeros(3))
    costs, sign = np.array([1.0, -1.0]), {"max": 1, "min": -1}
    for end, ending in (("max", "lp"), ("min", "mps")):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, f"net.{ending}")
            layers.to_lp(path, -1.0, 1.0, objective=costs, maximize=end == "max")
            solver = highspy.Highs()
            solver.setOptionValue("output_flag", False)
            solver.readModel(path)
        solver.run()
        assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
        optimum, solution = solver.getObjectiveValue(), solver.getSolution().col_value
        x = np.array([solution[solver.getColByName(f"x{i}")[1]] for i in range(3)])
        np.testing.assert_allclose(costs @ layers.evaluate(x), optimum, rtol=1e-5, atol=1e-5)
        assert (sign[end] * (values[name] @ costs) <= sign[end] * optimum + 1e-5).all()


def test_what_no_program_expresses_is_refused(tmp_path):
    pytest.importorskip("highspy")
    with pytest.raises(ValueError, match="layer 0 has the activation 'tanh'"):
        fc.affine_layers(jnp.tanh, jnp.ones(3)).to_lp(tmp_path / "a.lp", -1.0, 1.0)
    layers = fc.affine_layers(nn.relu, jnp.ones(3))
    with pytest.raises(ValueError, match=r"must end in .lp or .mps"):
        layers.to_lp(tmp_path / "a.txt", -1.0, 1.0)
    with pytest.raises(ValueError, match="objective must have 3 entries"):
        layers.to_lp(tmp_path / "a.lp", -1.0, 1.0, objective=[1.0])
    with pytest.raises(ValueError, match="finite low and high"):
        layers.to_lp(tmp_path / "a.lp", -jnp.inf, 1.0)

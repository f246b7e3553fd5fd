"""Layers and networks of flax, equinox, haiku and keras: found, and run fully connected.

Each library is skipped where it is not installed. Weights are random; biases are set away from 0.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxconv_fc as fc

os.environ.setdefault("KERAS_BACKEND", "jax")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("lenient")]
SIZES = {1: (9,), 2: (6, 5), 3: (4, 3, 3)}


@pytest.fixture
def lenient():
    """The layers of other libraries promote dtypes and ranks implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def image(rank, channels=2, last=True, batch=True):
    shape = (*SIZES[rank], channels) if last else (channels, *SIZES[rank])
    shape = (1, *shape) if batch else shape
    return jnp.asarray(np.random.default_rng(rank).standard_normal(shape), jnp.float32)


def check(layer, x):
    """find_convs sees one convolution; matrix_of and fully_connected are the layer."""
    assert len(fc.find_convs(layer, x)) == 1
    y = layer(x)
    matrix, offset = fc.matrix_of(layer, x)
    scale = 1 + float(jnp.max(jnp.abs(matrix) @ jnp.abs(x.ravel())))
    np.testing.assert_allclose(matrix @ x.ravel() + offset, y.ravel(), rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(fc.fully_connected(layer)(x), y, rtol=0, atol=1e-5 * scale)
    assert len(fc.find_convs(fc.fully_connected(layer), x)) == 0


FLAX = ["SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", "explicit"]


def flax_padding(name, rank):
    return ((1, 2),) * rank if name == "explicit" else name


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", FLAX)
def test_linen_conv(padding, rank):
    nn = pytest.importorskip("flax.linen")
    if padding == "CAUSAL" and rank > 1:
        pytest.skip("flax has CAUSAL in 1-D only")
    layer = nn.Conv(3, (3,) * rank, strides=(2,) * rank, padding=flax_padding(padding, rank),
                    bias_init=nn.initializers.normal(1.0))  # fmt: skip
    x = image(rank)
    params = layer.init(jax.random.key(0), x)
    check(lambda x: layer.apply(params, x), x)
    assert "Conv" in fc.find_convs(lambda x: layer.apply(params, x), x)[0].name


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
def test_linen_conv_transpose(padding, rank):
    nn = pytest.importorskip("flax.linen")
    layer = nn.ConvTranspose(3, (3,) * rank, strides=(2,) * rank, padding=padding)
    x = image(rank)
    params = layer.init(jax.random.key(0), x)
    check(lambda x: layer.apply(params, x), x)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", FLAX)
def test_nnx_conv(padding, rank):
    nnx = pytest.importorskip("flax.nnx")
    if padding == "CAUSAL" and rank > 1:
        pytest.skip("flax has CAUSAL in 1-D only")
    layer = nnx.Conv(2, 4, (3,) * rank, padding=flax_padding(padding, rank), kernel_dilation=(2,) * rank,
                     feature_group_count=2, rngs=nnx.Rngs(0))  # fmt: skip
    check(layer, image(rank))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
def test_nnx_conv_transpose(padding, rank):
    nnx = pytest.importorskip("flax.nnx")
    check(nnx.ConvTranspose(2, 3, (3,) * rank, strides=(2,) * rank, padding=padding, rngs=nnx.Rngs(0)), image(rank))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["ZEROS", "REFLECT", "REPLICATE", "CIRCULAR"])
@pytest.mark.parametrize("transposed", [False, True])
def test_equinox(rank, mode, transposed):
    eqx = pytest.importorskip("equinox")
    if transposed and mode in ("REFLECT", "REPLICATE"):
        pytest.skip("equinox has ZEROS and CIRCULAR only for ConvTranspose")
    make = eqx.nn.ConvTranspose if transposed else eqx.nn.Conv
    stride = 1 if transposed and mode == "CIRCULAR" else 2
    layer = make(rank, 2, 4, 3, stride, padding=1, padding_mode=mode, key=jax.random.key(0), dtype=jnp.float32)
    check(layer, image(rank, last=False, batch=False))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "FULL", "CAUSAL"])
@pytest.mark.parametrize("transposed", [False, True])
def test_haiku(rank, padding, transposed):
    hk = pytest.importorskip("haiku")
    if transposed and padding in ("FULL", "CAUSAL"):
        pytest.skip("haiku has SAME and VALID only for ConvTranspose")
    pad = {"FULL": hk.pad.full, "CAUSAL": hk.pad.causal}.get(padding, padding)
    make = hk.ConvNDTranspose if transposed else hk.ConvND
    net = hk.without_apply_rng(hk.transform(lambda x: make(rank, 3, 3, stride=2, padding=pad)(x)))
    x = image(rank)
    params = net.init(jax.random.key(0), x)
    check(lambda x: net.apply(params, x), x)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid", "causal"])
@pytest.mark.parametrize("transposed", [False, True])
def test_keras(rank, padding, transposed):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend here")
    if padding == "causal" and (transposed or rank > 1):
        pytest.skip("keras has causal padding in Conv1D only")
    make = getattr(keras.layers, f"Conv{rank}D" + "Transpose" * transposed)
    layer = make(3, 3, strides=2, padding=padding, bias_initializer="random_normal", dtype="float32")
    x = image(rank)
    layer.build(x.shape)
    check(lambda x: layer(x), x)


# whole networks ---------------------------------------------------------------------------------


def networks():
    nn = pytest.importorskip("flax.linen")

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x)

    class Residual(nn.Module):
        width: int
        stride: int

        @nn.compact
        def __call__(self, x):
            y = nn.relu(Norm()(nn.Conv(self.width, (3, 3), (self.stride,) * 2, use_bias=False)(x)))
            y = Norm()(nn.Conv(self.width, (3, 3), use_bias=False)(y))
            if x.shape != y.shape:
                x = Norm()(nn.Conv(self.width, (1, 1), (self.stride,) * 2, use_bias=False)(x))
            return nn.relu(x + y)

    class ResNet18(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(Norm()(nn.Conv(2, (3, 3))(x)))
            for width, stride in ((2, 1), (4, 2), (8, 2), (16, 2)):
                x = Residual(width, 1)(Residual(width, stride)(x))
            return nn.Dense(10)(x.mean((1, 2)))

    class MobileNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu6(nn.Conv(4, (3, 3), (2, 2))(x))
            for width, stride in ((4, 1), (8, 2), (8, 1)):
                y = nn.relu6(Norm()(nn.Conv(2 * x.shape[-1], (1, 1))(x)))
                y = nn.relu6(Norm()(nn.Conv(y.shape[-1], (3, 3), (stride,) * 2, feature_group_count=y.shape[-1])(y)))
                y = Norm()(nn.Conv(width, (1, 1))(y))
                x = x + y if x.shape == y.shape else y
            return nn.Dense(10)(x.mean((1, 2)))

    class UNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            a = nn.relu(nn.Conv(2, (3, 3))(x))
            b = nn.relu(nn.Conv(4, (3, 3))(nn.max_pool(a, (2, 2), (2, 2))))
            up = nn.ConvTranspose(2, (2, 2), (2, 2))(b)
            return nn.Conv(1, (3, 3))(jnp.concatenate([a, up], -1))

    return {"ResNet18": (ResNet18(), 20), "MobileNet": (MobileNet(), 10), "UNet": (UNet(), 4)}


@pytest.mark.parametrize("name", ["ResNet18", "MobileNet", "UNet"])
def test_a_network_runs_fully_connected(name):
    model, count = networks()[name]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    sites = fc.find_convs(model.apply, variables, x)
    assert len(sites) == count
    table = repr(sites).splitlines()
    assert len(table) == count + 2 and all("Conv" in line for line in table[1:-1])
    fc_model = jax.jit(fc.fully_connected(model.apply))
    want = jax.jit(model.apply)(variables, x)
    # every layer loses at most a few units in the last place of its own sums
    np.testing.assert_allclose(fc_model(variables, x), want, rtol=0, atol=2e-5 * (1 + float(jnp.abs(want).max())))

    def gradient(apply):
        return jax.jit(jax.grad(lambda v: jnp.mean(apply(v, x) ** 2)))(variables)["params"]

    want, got = jax.tree.leaves(gradient(model.apply)), jax.tree.leaves(gradient(fc.fully_connected(model.apply)))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * (1e-3 + float(jnp.abs(a).max())))


def test_a_sparse_builder():
    model, _ = networks()["UNet"]
    x = jnp.ones((2, 16, 16, 3))
    variables = model.init(jax.random.key(0), x)
    sparse = fc.fully_connected(model.apply, builder=fc.as_bcoo)
    np.testing.assert_allclose(sparse(variables, x), model.apply(variables, x), rtol=0, atol=1e-5)

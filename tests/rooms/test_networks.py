"""Layers and networks of flax (linen, nnx), equinox, haiku and keras: found, one matrix, fully connected.

Each library is skipped where it is not installed. Weights are random, biases and statistics too.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxconv_fc as fc

os.environ.setdefault("KERAS_BACKEND", "jax")
# Each program runs once, on small arrays: compiling it is what takes the time.
jit = partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)
SIZES = {1: (6,), 2: (5, 4), 3: (4, 3, 3)}
RANKS = pytest.mark.parametrize(
    "rank", [2, *(pytest.param(rank, marks=pytest.mark.long) for rank in (1, 3))]
)  # how libraries pad one axis is below


def foreign(fn):
    """Code of other libraries promotes dtypes and ranks: allowed while it runs, and only then."""

    def lenient(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fn(*args)

    return lenient


def image(rank, channels=2, last=True, batch=True):
    shape = (*SIZES[rank], channels) if last else (channels, *SIZES[rank])
    shape = (1, *shape) if batch else shape
    return jnp.asarray(np.random.default_rng(rank).standard_normal(shape), jnp.float32)


def numbers(shape, name=""):
    """Random entries that keep a signal about its size; near 1 for what has to be positive."""
    rng = np.random.default_rng(len(shape))
    values = rng.standard_normal(shape) * (np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.3)
    positive = any(word in name for word in ("scale", "var"))
    return jnp.asarray(abs(1 + values) if positive else values, jnp.float32)


def randomized(shapes):
    """Arrays for the shapes of a tree: no bias is 0, and no statistic 0 or 1."""
    return jax.tree_util.tree_map_with_path(lambda path, v: numbers(v.shape, str(path[-1:])), shapes)


def variables_of(module, x):
    return randomized(jax.eval_shape(foreign(module.init), jax.random.key(0), x))


def initializer(key, shape, *_):
    return numbers(shape)


def check(layer, x, folded=False, name=""):
    """The layer is one convolution, and matrix_of is the layer within the rounding of its sums.

    A is M of the site as the oracle builds it, entry for entry, and the offset repeats the bias of the site:
    save where the layer adds up (folds) what it has convolved.
    """
    layer = foreign(layer)
    (site,) = fc.find_convs(layer, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert name in site.name
    assert not site.in_front
    y, matrix, offset = map(np.asarray, jit(lambda x: (layer(x), *fc.matrix_of(layer, x)))(x))
    assert np.any(offset != 0), "a bias of 0 shows nothing"
    assert folded == (site.spec.shape != matrix.shape)
    if not folded:
        exact = np.testing.assert_array_equal if site.spec.pads_with_zeros else within_rounding
        exact(matrix, oracle.matrix(np.asarray(site.kernel), site.spec))
        batch, channel, *_ = site.spec.dimension_numbers.out_spec
        shape = [-1 if i == channel else 1 for i in range(len(site.spec.lhs_shape)) if i != batch]
        channels = np.asarray(site.bias).reshape(shape)
        np.testing.assert_array_equal(offset, np.broadcast_to(channels, site.spec.out_shape).ravel())
    a, b, x = (np.asarray(v, np.float64) for v in (matrix, offset, x))
    magnitude = (abs(a) @ abs(x.ravel()) + abs(b)).reshape(y.shape)
    terms = site.kernel.size // site.spec.out_channels + 1
    oracle.assert_within(y, (a @ x.ravel() + b).reshape(y.shape), magnitude, terms)


def within_rounding(a, b):
    """Where an input is read through several taps, their order is not given."""
    np.testing.assert_allclose(a, b, rtol=0, atol=4 * np.finfo(np.float32).eps * abs(b).max())


# flax -------------------------------------------------------------------------------------------

FLAX = ["SAME", "SAME_LOWER", "VALID", "explicit", "CIRCULAR", "REFLECT"]
FLAX_1D = [*FLAX, "CAUSAL"]
FLAX_TRANSPOSE = ["SAME", "VALID", "explicit", "CIRCULAR"]  # CIRCULAR convolves with zeros, and folds then


def pads(name, rank):
    return ((1, 2),) * rank if name == "explicit" else name


@RANKS
def test_linen_conv(rank):
    nn = pytest.importorskip("flax.linen")
    for padding in FLAX_1D if rank == 1 else FLAX:
        layer = nn.Conv(3, (3,) * rank, strides=(2,) * rank, padding=pads(padding, rank))
        x = image(rank)
        params = variables_of(layer, x)
        check(lambda x, layer=layer, params=params: layer.apply(params, x), x, name="Conv")


@RANKS
def test_linen_conv_transpose(rank):
    nn = pytest.importorskip("flax.linen")
    for padding in FLAX_TRANSPOSE:
        layer = nn.ConvTranspose(3, (3,) * rank, (2,) * rank, padding=pads(padding, rank))
        x = image(rank)
        params = variables_of(layer, x)
        folded = padding == "CIRCULAR"
        check(lambda x, layer=layer, params=params: layer.apply(params, x), x, folded, "ConvTranspose")


@RANKS
def test_nnx_conv(rank):
    nnx = pytest.importorskip("flax.nnx")
    for padding in FLAX_1D if rank == 1 else FLAX:
        layer = nnx.Conv(
            2, 4, (2,) * rank, padding=pads(padding, rank), kernel_dilation=(2,) * rank,
            feature_group_count=2, kernel_init=initializer, bias_init=initializer, rngs=nnx.Rngs(0),
        )  # fmt: skip
        check(layer, image(rank))


@RANKS
def test_nnx_conv_transpose(rank):
    nnx = pytest.importorskip("flax.nnx")
    for padding in FLAX_TRANSPOSE:
        layer = nnx.ConvTranspose(
            2, 3, (3,) * rank, strides=(2,) * rank, padding=pads(padding, rank), transpose_kernel=True,
            kernel_init=initializer, bias_init=initializer, rngs=nnx.Rngs(0),
        )  # fmt: skip
        check(layer, image(rank), padding == "CIRCULAR")


# equinox ----------------------------------------------------------------------------------------


def equinox_layer(make, *args, **options):
    eqx = pytest.importorskip("equinox")
    key = jax.random.key(0)
    return randomized(eqx.filter_eval_shape(lambda: make(*args, **options, key=key, dtype=jnp.float32)))


@RANKS
def test_equinox_conv(rank):
    eqx = pytest.importorskip("equinox")
    cases = [("ZEROS", padding) for padding in (1, ((2, 0),) * rank, "SAME", "SAME_LOWER", "VALID")]
    for mode, padding in (*cases, ("REFLECT", 1), ("REPLICATE", "SAME"), ("CIRCULAR", ((1, 2),) * rank)):
        layer = equinox_layer(eqx.nn.Conv, rank, 2, 4, 3, 2, padding, groups=2, padding_mode=mode)
        check(layer, image(rank, last=False, batch=False))


@RANKS
def test_equinox_conv_transpose(rank):
    eqx = pytest.importorskip("equinox")
    x = image(rank, last=False, batch=False)
    for padding in (1, ((2, 0),) * rank, "SAME", "SAME_LOWER", "VALID"):
        check(equinox_layer(eqx.nn.ConvTranspose, rank, 2, 3, 3, 2, padding, int(padding == 1)), x)
    for padding in ("SAME", "SAME_LOWER"):  # copies, then a hole at one end: no padding of a spec
        layer = equinox_layer(eqx.nn.ConvTranspose, rank, 2, 3, 3, 2, padding, padding_mode="CIRCULAR")
        with pytest.warns(UserWarning, match="a pad that is not one padding_mode"):
            assert fc.find_convs(layer, x)[0].in_front


# haiku ------------------------------------------------------------------------------------------


def haiku_layer(hk, make, x):
    net = hk.without_apply_rng(hk.transform(lambda x: make()(x)))
    params = variables_of(net, x)
    return lambda x: net.apply(params, x)


@RANKS
def test_haiku_conv(rank):
    hk = pytest.importorskip("haiku")
    x = image(rank)
    named = [hk.pad.same, hk.pad.valid, hk.pad.full, hk.pad.causal, hk.pad.reverse_causal]
    for padding in ("SAME", "VALID", ((1, 2),) * rank, *named):
        layer = haiku_layer(hk, lambda p=padding: hk.ConvND(rank, 3, 3, stride=2, rate=1, padding=p), x)
        check(layer, x, name="conv")


@RANKS
def test_haiku_conv_transpose(rank):
    hk = pytest.importorskip("haiku")
    x = image(rank)
    for padding in ("SAME", "VALID", ((1, 2),) * rank):
        layer = haiku_layer(hk, lambda p=padding: hk.ConvNDTranspose(rank, 3, 3, stride=2, padding=p), x)
        check(layer, x, name="conv")


# keras ------------------------------------------------------------------------------------------


def keras_layers(keras, rank):
    layers, init = keras.layers, {"dtype": "float32"}
    conv = getattr(layers, f"Conv{rank}D")
    transposed = getattr(layers, f"Conv{rank}DTranspose")
    for padding in ("same", "valid"):
        yield conv(3, 3, strides=2, padding=padding, **init)
        yield transposed(3, 3, strides=2, padding=padding, **init)
    yield transposed(3, 3, strides=2, padding="same", output_padding=0, **init)
    yield conv(4, 2, dilation_rate=2, groups=2, **init)
    if rank == 1:
        yield conv(3, 3, padding="causal", **init)
    if rank < 3:
        yield getattr(layers, f"DepthwiseConv{rank}D")(3, padding="same", depth_multiplier=2, **init)


@RANKS
def test_keras(rank):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend here")
    x = image(rank)
    for layer in keras_layers(keras, rank):
        layer.kernel_initializer = layer.depthwise_initializer = "zeros"
        layer.build(x.shape)
        layer.set_weights([np.asarray(numbers(w.shape)) for w in layer.weights])
        check(layer, x)


# how libraries pad, written for conv_spec: the table of docs/coming-from.md --------------------------------

PADDED = [(2, 2, 1), (3, 1, 2), (3, 2, 1), (4, 3, 2)]  # taps, stride, dilation


def same_matrices(x, cases):
    """Of ``(layer, spec, kernel)``: the layer of one image without a bias, and M of the spec. One program."""
    layers, specs, kernels = zip(*cases, strict=True)
    matrices = jit(lambda x: [fc.matrix_of(lambda v, of=of: of(v), x)[0] for of in layers])(x)
    for matrix, spec, kernel in zip(matrices, specs, kernels, strict=True):
        want = oracle.matrix(np.asarray(kernel), spec)
        np.testing.assert_allclose(matrix, want, atol=1e-6, err_msg=str(spec))


def centred(taps, dilation):
    reach = (taps - 1) * dilation + 1
    return ((reach - 1) // 2, reach // 2)


@pytest.mark.parametrize(("taps", "stride", "dilation"), PADDED)
def test_how_flax_pads(taps, stride, dilation):
    nn, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")
    x = numbers((1, 9, 2))
    pads = {
        "CIRCULAR": ([centred(taps, dilation)], "circular"),
        "REFLECT": ([centred(taps, dilation)], "reflect"),
        "CAUSAL": ([((taps - 1) * dilation, 0)], "zeros"),
        "SAME": ("SAME", "zeros"),
    }
    options = {"strides": stride, "kernel_dilation": dilation, "use_bias": False}
    cases = []
    for name, (padding, mode) in pads.items():
        linen = nn.Conv(3, (taps,), padding=name, **options)
        variables = variables_of(linen, x)
        kernel = variables["params"]["kernel"]
        layouts = ("NHC", "HIO", "NHC")
        spec = fc.conv_spec(
            x.shape, kernel.shape, (stride,), padding, None, (dilation,), layouts, padding_mode=mode
        )
        cases.append((lambda v, m=linen, p=variables: m.apply(p, v), spec, kernel))
        module = nnx.Conv(2, 3, (taps,), padding=name, rngs=nnx.Rngs(0), **options)
        cases.append((module, spec, module.kernel[...]))
    same_matrices(x, cases)


@pytest.mark.parametrize(("taps", "stride", "dilation"), PADDED)
def test_how_equinox_pads(taps, stride, dilation):
    eqx = pytest.importorskip("equinox")
    x = numbers((2, 9))
    modes = {"ZEROS": "zeros", "REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "circular"}
    cases = []
    for name, mode in modes.items():
        pairs = (((0, 3),), [(0, 3)]) if taps % 2 else (2, [(2, 2)])
        for given, padding in (pairs, ("SAME", "SAME")):
            layer = equinox_layer(
                eqx.nn.Conv, 1, 2, 3, taps, stride, given, dilation, use_bias=False, padding_mode=name
            )
            spec = fc.conv_spec(
                (1, *x.shape), layer.weight.shape, (stride,), padding, None, (dilation,), padding_mode=mode
            )
            cases.append((layer, spec, layer.weight))
    same_matrices(x, cases)


@pytest.mark.parametrize(("taps", "stride", "dilation"), PADDED)
def test_how_keras_pads(taps, stride, dilation):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend here")
    if stride > 1 and dilation > 1:
        return  # refused by keras
    x, cases = numbers((1, 9, 2)), []
    for name, padding in (("same", "SAME"), ("valid", "VALID"), ("causal", [((taps - 1) * dilation, 0)])):
        layer = keras.layers.Conv1D(
            3, taps, strides=stride, padding=name, dilation_rate=dilation, use_bias=False, dtype="float32"
        )
        layer.build(x.shape)
        kernel = jnp.asarray(layer.kernel.value)
        numbers_of = ("NHC", "HIO", "NHC")
        spec = fc.conv_spec(x.shape, kernel.shape, (stride,), padding, None, (dilation,), numbers_of)
        cases.append((layer, spec, kernel))
    same_matrices(x, cases)


@pytest.mark.parametrize(("taps", "stride", "dilation"), PADDED)
def test_how_torch_pads(taps, stride, dilation):
    torch = pytest.importorskip("torch")
    x = np.eye(18, dtype=np.float32).reshape(18, 2, 9)
    for mode in ("zeros", "reflect", "replicate", "circular"):
        for given, padding in ((2, [(2, 2)]), ("same", "SAME")):
            if given == "same" and stride > 1:
                continue  # refused by torch
            layer = torch.nn.Conv1d(
                2, 3, taps, stride, given, dilation, bias=False, padding_mode=mode, dtype=torch.float32
            )
            kernel = layer.weight.detach().numpy()
            shapes = (1, 2, 9), kernel.shape
            spec = fc.conv_spec(*shapes, (stride,), padding, None, (dilation,), padding_mode=mode)
            columns = layer(torch.from_numpy(x)).detach().numpy().reshape(18, -1)
            np.testing.assert_allclose(columns.T, oracle.matrix(kernel, spec), atol=1e-6, err_msg=str(spec))


# a chain of layers is one matrix ------------------------------------------------------------------


def test_convolution_bias_and_batch_norm_are_one_matrix():
    nn = pytest.importorskip("flax.linen")
    block = nn.Sequential([
        nn.Conv(3, (3, 3), padding="CIRCULAR"),
        nn.BatchNorm(use_running_average=True),
        nn.Conv(2, (3, 3), (2, 2)),
        lambda x: nn.avg_pool(x, (2, 2), (1, 1)),
        lambda x: x.reshape(len(x), -1),
        nn.Dense(5),
    ])  # fmt: skip
    x = image(2)
    variables = variables_of(block, x)
    layer = foreign(lambda x: block.apply(variables, x))
    matrix, offset = jit(lambda: fc.matrix_of(layer, x))()
    want = jit(jax.jacobian(layer))(x).reshape(5, x.size)
    np.testing.assert_allclose(matrix, want, rtol=0, atol=1e-6 * float(abs(want).max()))
    np.testing.assert_allclose(matrix @ x.ravel() + offset, layer(x)[0], rtol=0, atol=1e-5)


# whole networks ---------------------------------------------------------------------------------


def linen_networks():
    nn = pytest.importorskip("flax.linen")

    class ConvNorm(nn.Module):
        width: int
        size: int = 3
        stride: int = 1
        groups: int = 1

        @nn.compact
        def __call__(self, x):
            kernel, strides = (self.size,) * 2, (self.stride,) * 2
            x = nn.Conv(self.width, kernel, strides, feature_group_count=self.groups, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

    class ResNet18(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(ConvNorm(2)(x))
            for width, stride in ((2, 1), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1)):
                y = ConvNorm(width)(nn.relu(ConvNorm(width, stride=stride)(x)))
                shortcut = x if x.shape == y.shape else ConvNorm(width, 1, stride)(x)
                x = nn.relu(y + shortcut)
            return nn.Dense(10)(x.mean((1, 2)))

    class MobileNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu6(ConvNorm(4, stride=2)(x))
            for width, stride in ((4, 1), (8, 2), (8, 1)):
                y = nn.relu6(ConvNorm(2 * x.shape[-1], 1)(x))
                y = nn.relu6(ConvNorm(y.shape[-1], 3, stride, groups=y.shape[-1])(y))
                y = ConvNorm(width, 1)(y)
                x = x + y if x.shape == y.shape else y
            return nn.Dense(10)(x.mean((1, 2)))

    return {"ResNet18": (ResNet18(), 20), "MobileNet": (MobileNet(), 10)}


def linen_network(name, x):
    model, count = linen_networks()[name]
    return foreign(model.apply), variables_of(model, x), count


def unet(name, x):
    """U-Net of equinox: two levels, transposed convolutions on the way up, skips on all of them."""
    eqx = pytest.importorskip("equinox")
    conv = lambda i, o, size=3: equinox_layer(eqx.nn.Conv2d, i, o, size, padding="SAME")  # noqa: E731
    up = lambda i, o: equinox_layer(eqx.nn.ConvTranspose2d, i, o, 2, 2)  # noqa: E731
    layers = {
        "in": conv(3, 2), "down": conv(2, 4), "bottom": conv(4, 6), "up": up(6, 4), "join": conv(8, 4),
        "top": up(4, 2), "last": conv(4, 2), "out": conv(2, 1, 1),
    }  # fmt: skip
    pool = eqx.nn.MaxPool2d(2, 2)

    def one(layers, x):
        a = jax.nn.relu(layers["in"](x))
        b = jax.nn.relu(layers["down"](pool(a)))
        c = layers["up"](jax.nn.relu(layers["bottom"](pool(b))))
        d = layers["top"](jax.nn.relu(layers["join"](jnp.concatenate([b, c]))))
        return layers["out"](jax.nn.relu(layers["last"](jnp.concatenate([a, d]))))

    params, static = eqx.partition(layers, eqx.is_array)

    def apply(params, x):
        layers = eqx.combine(params, static)
        return jax.vmap(lambda x: one(layers, x))(jnp.moveaxis(x, -1, 1))

    return foreign(apply), params, 8


NETWORKS = {"ResNet18": linen_network, "MobileNet": linen_network, "UNet": unet}


@pytest.mark.parametrize(
    "name", ["UNet", *(pytest.param(name, marks=pytest.mark.long) for name in ("ResNet18", "MobileNet"))]
)
def test_a_network_runs_fully_connected(name, rng, capsys):
    """Value and gradients, at 32x32, differ by no more than rounding along the longest path of sums."""
    x = jnp.asarray(rng.standard_normal((2, 32, 32, 3)), jnp.float32)
    apply, variables, count = NETWORKS[name](name, x)
    sites = fc.find_convs(apply, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert len(sites) == count
    print(sites)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == count + 2
    assert all("kernel" in line and ("KiB" in line or "MiB" in line) for line in table[1:-1])

    def outcome(apply):
        def loss(variables, x):
            y = apply(variables, x)
            return jnp.mean(y**2), y

        return jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, x)

    assert not fc.find_convs(fc.fully_connected(apply), variables, x)
    (_, want), want_gradients = outcome(apply)
    (_, got), gradients = outcome(fc.fully_connected(apply))
    terms = sum(site.spec.group_channels * 9 + 2 for site in sites)

    def agree(a, b, terms):
        scale = float(abs(b).max())
        assert scale > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * oracle.gamma(terms, np.float32) * scale)

    agree(got, want, terms)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        agree(a, b, 2 * terms + x.size)

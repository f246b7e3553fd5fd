"""Gradients of a whole batch: the layers of a ResNet-18, and a small residual network."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

import jaxconv_fc as fc
import jaxconv_fc.curvature
from benchmarks.layers import conv_one, random
from benchmarks.rows import Row, Table, jitted

# in channels, out channels, image, taps, stride
LAYERS = {
    "64, 56x56": (64, 64, 56, 3, 1),
    "128, 28x28": (128, 128, 28, 3, 1),
    "256, 14x14": (256, 256, 14, 3, 1),
    "512, 7x7": (512, 512, 7, 3, 1),
    "64 to 128, stride 2": (64, 128, 56, 3, 2),
    "64 to 128, 1x1, stride 2": (64, 128, 56, 1, 2),
    "16, 5x5, 56x56": (16, 16, 56, 5, 1),
}
EXAMPLES = 16


def _layers(quick):
    for name, (inputs, outputs, size, taps, stride) in LAYERS.items():
        if quick:
            inputs, outputs, size = 2, 3, 6
        spec = fc.conv_spec((1, inputs, size, size), (outputs, inputs, taps, taps), (stride, stride), "SAME")
        xs, ys = (random((EXAMPLES, *shape)) for shape in (spec.in_shape, spec.out_shape))
        yield name, spec, xs, ys


def _norms(quick):
    for name, spec, xs, ys in _layers(quick):

        def by_gradients(xs, ys, spec=spec):
            gradients = jax.vmap(partial(fc.kernel_vjp, spec))(xs, ys)
            return jnp.sqrt((gradients.reshape(len(xs), -1) ** 2).sum(1))

        def by_lax(xs, ys, spec=spec):
            kernel = jnp.zeros(spec.rhs_shape, xs.dtype)
            of = lambda x, y: jax.vjp(lambda k: conv_one(spec, k, x), kernel)[1](y)[0]  # noqa: E731
            return jnp.sqrt((jax.vmap(of)(xs, ys).reshape(len(xs), -1) ** 2).sum(1))

        ways = {"vmap(kernel_vjp)": by_gradients, "vmap(vjp of lax)": by_lax}
        ours = partial(jitted, partial(fc.curvature.gradient_norms, spec), xs, ys)
        peers = {way: partial(jitted, fn, xs, ys) for way, fn in ways.items()}
        yield Row(name, ours, peers, size=f"{EXAMPLES} examples")


def _moments(quick):
    for name, spec, xs, _ in _layers(quick):

        def im2col(xs, spec=spec):
            taps, strides = spec.rhs_shape[2:], spec.window_strides
            patches = lax.conv_general_dilated_patches(xs, taps, strides, spec.padding)
            rows = jnp.moveaxis(patches, 1, 0).reshape(patches.shape[1], -1)  # [(channel, tap), rest]
            return rows @ rows.T

        ours = partial(jitted, partial(fc.curvature.patch_moment, spec), xs)
        yield Row(name, ours, {"im2col": partial(jitted, im2col, xs)}, size=f"{EXAMPLES} examples")


def _residual(params, batch):
    """A stem, two residual blocks, a dense layer; cross entropies, added up."""
    images, labels = batch
    conv = partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    y = jax.nn.relu(lax.conv_general_dilated(images, params["stem"], (2, 2), "SAME"))
    for first, second in params["blocks"]:
        y = jax.nn.relu(y + conv(jax.nn.relu(conv(y, first)), second))
    logits = y.mean((2, 3)) @ params["head"] + params["bias"]
    return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 10)).sum()


def _model(quick):
    channels, size, count = (4, 8, 3) if quick else (128, 16, 32)
    block = (channels, channels, 3, 3)
    params = {
        "stem": random((channels, 3, 3, 3)) / 5,
        "blocks": [(random(block, seed=i) / 40, random(block, seed=i + 5) / 40) for i in range(2)],
        "head": random((channels, 10)),
        "bias": jnp.zeros(10),
    }
    batch = random((count, 3, size, size)), jnp.arange(count) % 10

    def by_gradients(params, batch):
        one = lambda p, x, t: _residual(p, (x[None], t[None]))  # noqa: E731
        gradients = jax.vmap(jax.grad(one), (None, 0, 0))(params, *batch)
        return jnp.sqrt(sum((g.reshape(count, -1) ** 2).sum(1) for g in jax.tree.leaves(gradients)))

    ours = partial(jitted, partial(fc.curvature.model_gradient_norms, _residual), params, batch)
    peers = {"vmap(grad)": partial(jitted, by_gradients, params, batch)}
    yield Row(f"residual network, {channels} channels", ours, peers, size=f"{count} examples")


TABLES = (
    Table("gradient_norms", "The norm of every example's kernel gradient, `gradient_norms`", "", _norms),
    Table("patch_moment", "The second moment of patches, `patch_moment`", "", _moments),
    Table("model_gradient_norms", "The norm of every example's gradient of a model", "", _model),
)

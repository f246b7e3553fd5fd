"""A trained convolutional network, rewritten as fully connected layers.

A small CNN learns scikit-learn's handwritten digits (8x8 images, 10 classes).  Every convolution in it is
then replaced by its matrix: flattened image in, matrix products and ReLUs only, class scores out.  Both
networks see all 1,797 images.  Every layer has to agree to within float32 rounding, and both networks have
to name the same digits; otherwise the exit status is 1.

    python examples/digits.py [digits.png]

The argument is where the picture of the matrices is written.
"""

import sys
import time

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # draws to a file; needs no display
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from sklearn.datasets import load_digits

import jaxconv_fc as fc

# On GPU and TPU the default precision of float32 products is lower than float32; on CPU this changes nothing.
jax.config.update("jax_default_matmul_precision", "highest")

# name: (kernel shape as out channels, in channels, height, width; options of lax.conv_general_dilated)
LAYERS = {
    "padded": ((8, 1, 3, 3), {"window_strides": (1, 1), "padding": "SAME"}),
    "strided": ((16, 8, 3, 3), {"window_strides": (2, 2), "padding": "SAME"}),
    "grouped": (
        (16, 4, 3, 3),
        {"window_strides": (1, 1), "padding": [(1, 1), (1, 1)], "feature_group_count": 4},
    ),
    "dilated": ((16, 16, 2, 2), {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 2)}),
    # A window as large as its input: the one convolution that everybody calls fully connected.
    "head": ((10, 16, 2, 2), {"window_strides": (1, 1), "padding": "VALID"}),
}
HELD_OUT = 360  # images at the end of the data set that training never sees
EPOCHS, BATCH_SIZE, LEARNING_RATE, MOMENTUM = 12, 64, 0.1, 0.9


# The network: affine map, ReLU, affine map, ... ------------------------------------------------------------


def run_network(affine_maps, x):
    """The outputs of every affine map, before its ReLU; the last ones are the class scores."""
    outputs = []
    for affine_map in affine_maps:
        outputs.append(affine_map(x))
        x = jax.nn.relu(outputs[-1])
    return outputs


def convolution_layers(params):
    """The network as one usually writes it: images in, each layer a convolution and a bias per channel."""

    def layer(name):
        _, options = LAYERS[name]
        kernel, bias = params[name]
        return lambda x: lax.conv_general_dilated(x, kernel, **options) + bias[:, None, None]

    return [layer(name) for name in LAYERS]


def fully_connected_layers(matrices):
    """The same network without a convolution: flat vectors in, each layer a matrix and a vector."""
    return [lambda x, m=matrix, b=offset: x @ m.T + b for matrix, offset in matrices.values()]


def all_specs(image_shape):
    """The geometry of each layer.  conv_spec takes what lax takes, with shapes in place of arrays."""
    specs = {}
    for name, (kernel_shape, options) in LAYERS.items():
        specs[name] = fc.conv_spec((1, *image_shape), kernel_shape, **options)
        image_shape = specs[name].out_shape
    return specs


# Training, in plain JAX ------------------------------------------------------------------------------------


def initial_params(key):
    """He initialisation: the variance of the signal survives the ReLUs."""
    params = {}
    for name, (shape, _) in LAYERS.items():
        key, subkey = jax.random.split(key)
        scale = (2 / np.prod(shape[1:])) ** 0.5
        params[name] = (scale * jax.random.normal(subkey, shape), jnp.zeros(shape[0]))
    return params


def class_scores(params, images):
    return run_network(convolution_layers(params), images)[-1].reshape(len(images), -1)


@jax.jit
def accuracy(params, images, labels):
    return jnp.mean(class_scores(params, images).argmax(1) == labels)


@jax.jit
def train_step(params, velocity, images, labels, learning_rate):
    """One step of gradient descent with momentum on the cross entropy."""

    def loss_of(params):
        log_probs = jax.nn.log_softmax(class_scores(params, images))
        return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))

    loss, grads = jax.value_and_grad(loss_of)(params)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v - learning_rate * g, velocity, grads)
    return jax.tree.map(jnp.add, params, velocity), velocity, loss


def train(images, labels):
    params = initial_params(jax.random.key(0))
    velocity = jax.tree.map(jnp.zeros_like, params)
    train_images, train_labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    held_out = images[-HELD_OUT:], labels[-HELD_OUT:]
    rng = np.random.default_rng(0)
    for epoch in range(1, EPOCHS + 1):
        # Falling to zero along a cosine: no schedule to tune.
        learning_rate = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * epoch / EPOCHS))
        # Batches of one size only, so that the step is compiled once; the remainder waits for its next turn.
        order = rng.permutation(len(train_images))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            params, velocity, loss = train_step(
                params, velocity, train_images[batch], train_labels[batch], learning_rate
            )
        if epoch % 3 == 0:
            print(
                f"  epoch {epoch:2d} of {EPOCHS}: loss {loss:.4f}, "
                f"held-out accuracy {accuracy(params, *held_out):.1%}",
                flush=True,
            )
    return params


# Comparing the two networks --------------------------------------------------------------------------------


def rounding_bound(spec, matrix, offset, x):
    """How far apart rounding alone can drive two ways to compute M x + b in float32.

    A sum of n products, in any order, is within gamma_n |M| |x| of its exact value; each of the two ways is
    allowed that much.
    """
    n = np.prod(spec.rhs_shape[1:]) + 2  # the products of one output, the bias, and one to spare
    unit = np.finfo(np.float32).eps / 2
    gamma = n * unit / (1 - n * unit)
    matrix, offset, x = (np.abs(np.asarray(v, np.float64)) for v in (matrix, offset, x))
    return 2 * gamma * (x @ matrix.T + offset)


def compare_layers(specs, matrices, images, conv_outputs):
    """Every layer as a matrix, on the inputs it has in the convolutional network.

    Returns per layer the differences of its outputs from the convolution's, and their bounds.
    """
    inputs = [images, *map(jax.nn.relu, conv_outputs[:-1])]
    differences, bounds = [], []
    layers = zip(specs.values(), matrices.values(), inputs, conv_outputs, strict=True)
    for spec, (matrix, offset), x, y in layers:
        differences.append(np.abs(x @ matrix.T + offset - y))
        bounds.append(rounding_bound(spec, matrix, offset, x))
    return differences, bounds


# Reporting -------------------------------------------------------------------------------------------------


def by(shape):
    return "x".join(map(str, shape))


def geometry(spec):
    """One line that says what kind of convolution this is; only the options that are not the default."""
    words = [f"{by(spec.in_shape)} -> {by(spec.out_shape)}, kernel {by(spec.rhs_shape)}"]
    if any(s != 1 for s in spec.window_strides):
        words.append(f"stride {by(spec.window_strides)}")
    if any(lo or hi for lo, hi in spec.padding):
        words.append("pad " + " ".join(f"({lo},{hi})" for lo, hi in spec.padding))
    if any(r != 1 for r in spec.rhs_dilation):
        words.append(f"dilation {by(spec.rhs_dilation)}")
    if spec.feature_group_count != 1:
        words.append(f"{spec.feature_group_count} groups")
    return ", ".join(words)


def print_table(specs, differences, bounds):
    widths = "{:8} {:66} {:>10} {:>7} {:>8} {:>12} {:>9}"
    print(widths.format("layer", "geometry", "M", "stored", "density", "largest diff", "allowed"))
    for (name, spec), difference, bound in zip(specs.items(), differences, bounds, strict=True):
        worst = difference.argmax()
        print(
            widths.format(
                name,
                geometry(spec),
                by(spec.shape),
                f"{spec.nse:,}",
                f"{spec.nse / (spec.out_size * spec.in_size):.1%}",
                f"{difference.flat[worst]:.1e}",
                f"{bound.flat[worst]:.1e}",
            )
        )


def kernel_picture(kernel):
    """All filters side by side: a row for each input channel, a column for each output channel."""
    out_channels, in_channels, height, width = kernel.shape
    framed = np.full((out_channels, in_channels, height + 1, width + 1), np.nan)
    framed[:, :, :height, :width] = kernel
    return framed.transpose(1, 2, 0, 3).reshape(in_channels * (height + 1), -1)[:-1, :-1]


def draw(params, specs, matrices, path):
    """One row of pictures for each layer: the kernel, and the matrix that it becomes."""
    # Heights follow the matrices, within reason, so that an entry is at least a pixel wide and high.
    heights = [min(max(spec.out_size / 100, 1.8), 5.2) for spec in specs.values()]
    fig, axes = plt.subplots(
        len(specs),
        2,
        figsize=(14, 1.1 * sum(heights)),
        width_ratios=(1, 2),
        height_ratios=heights,
        layout="constrained",
    )
    for (name, spec), (left, right) in zip(specs.items(), axes, strict=True):
        kernel, (matrix, _) = np.asarray(params[name][0]), matrices[name]
        # White is zero.  The largest few weights saturate, or the rest would be too pale to see.
        most = np.quantile(np.abs(kernel), 0.95)
        colours = {"cmap": "seismic_r", "vmin": -most, "vmax": most, "interpolation": "nearest"}
        left.imshow(kernel_picture(kernel), **colours)
        left.set_title(f"{name}: kernel {by(spec.rhs_shape)}, {kernel.size:,} numbers")
        left.set_axis_off()
        image = right.imshow(np.asarray(matrix), aspect="auto", **colours)
        right.set_title(f"its matrix M, {by(spec.shape)}, {spec.nse:,} stored entries")
        right.set_xlabel(f"input neurons ({by(spec.in_shape)})")
        right.set_ylabel(f"output neurons ({by(spec.out_shape)})")
        fig.colorbar(image, ax=right, extend="both")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(picture_path="digits.png"):
    start = time.perf_counter()
    data = load_digits()
    images = jnp.asarray(data.images[:, None] / 16, jnp.float32)  # (1797, 1, 8, 8), values in [0, 1]
    labels = jnp.asarray(data.target)

    print(f"training on {len(images) - HELD_OUT:,} images, {HELD_OUT} held out")
    params = train(images, labels)

    print("turning each convolution into its matrix")
    specs = all_specs(images.shape[1:])
    # (M, b): the bias of a channel becomes one number for each of its output neurons.
    matrices = {name: fc.as_affine(spec, *params[name]) for name, spec in specs.items()}

    print(f"running {len(images):,} images through both networks\n")
    flat_images = images.reshape(len(images), -1)
    conv_outputs = jax.jit(lambda x: run_network(convolution_layers(params), x))(images)
    conv_outputs = [y.reshape(len(images), -1) for y in conv_outputs]
    fc_outputs = jax.jit(lambda x: run_network(fully_connected_layers(matrices), x))(flat_images)

    differences, bounds = compare_layers(specs, matrices, flat_images, conv_outputs)
    print_table(specs, differences, bounds)

    conv_scores, fc_scores = conv_outputs[-1], fc_outputs[-1]
    within = all((d <= b).all() for d, b in zip(differences, bounds, strict=True))
    equal = int((conv_scores.argmax(1) == fc_scores.argmax(1)).sum())
    held_out_accuracy = (fc_scores.argmax(1) == labels)[-HELD_OUT:].mean()
    print(f"\nall layers agree within the rounding bound: {'yes' if within else 'NO'}")
    print(f"largest difference in a class score, end to end: {abs(conv_scores - fc_scores).max():.1e}")
    print(f"equal predictions: {equal:,} of {len(images):,}")
    print(f"accuracy on held-out images: {held_out_accuracy:.1%}")

    draw(params, specs, matrices, picture_path)
    print(f"wrote {picture_path} ({time.perf_counter() - start:.0f} s in all)")
    return 0 if within and equal == len(images) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

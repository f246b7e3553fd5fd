"""A trained convolutional network, run as a fully connected one.

A small CNN learns scikit-learn's handwritten digits (8x8 images, 10 classes).  fc.find_convs then lists the
convolutions it performs, and fc.fully_connected turns it into a function that has none: matrix products,
biases and ReLUs only.  Both networks see all 1,797 images.  Every layer has to agree with its matrix to
within float32 rounding, and both networks have to name the same digits; otherwise the exit status is 1.

    python examples/digits.py [digits.png]

The argument is where the picture of the matrices is written.
"""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv_fc as fc

try:
    import matplotlib

    matplotlib.use("Agg")  # draws to a file; needs no display
    import matplotlib.pyplot as plt
    from matplotlib.patches import ConnectionPatch
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install 'jaxconv_fc[examples]'")

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


# The network, as one usually writes it ---------------------------------------------------------------------


def class_scores(params, images):
    """Five times convolution, bias and ReLU, without the last ReLU.  Scopes give the layers their names."""
    x = images
    for name, (_, options) in LAYERS.items():
        kernel, bias = params[name]
        with jax.named_scope(name):
            x = lax.conv_general_dilated(x, kernel, **options) + bias[:, None, None]
        if name != "head":
            x = jax.nn.relu(x)
    return x.reshape(len(images), -1)


def all_specs(image_shape):
    """The geometry of each layer, read off the network; with shapes for arrays nothing is computed."""
    params = jax.eval_shape(initial_params, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return {site.name: site.spec for site in fc.find_convs(class_scores, params, images)}


# Training, in plain JAX ------------------------------------------------------------------------------------


def initial_params(key):
    """He initialisation: the variance of the signal survives the ReLUs."""
    params = {}
    for name, (shape, _) in LAYERS.items():
        key, subkey = jax.random.split(key)
        scale = (2 / np.prod(shape[1:])) ** 0.5
        params[name] = (scale * jax.random.normal(subkey, shape), jnp.zeros(shape[0]))
    return params


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


def rounding_bound(spec, matrix, x):
    """How far apart rounding alone can drive two ways to compute M x in float32.

    A sum of n products, in any order, is within gamma_n |M| |x| of its exact value; each of the two ways is
    allowed that much.
    """
    n = np.prod(spec.rhs_shape[1:]) + 1  # the products of one output, and one to spare
    unit = np.finfo(np.float32).eps / 2
    gamma = n * unit / (1 - n * unit)
    matrix, x = (np.abs(np.asarray(v, np.float64)) for v in (matrix, x))
    return 2 * gamma * (x @ matrix.T)


def compare_layer(site, matrix):
    """A layer as matrix and as convolution, on its inputs in the network: differences, and their bounds."""
    _, options = LAYERS[site.name]
    y = lax.conv_general_dilated(site.x, site.kernel, **options)
    x = site.x.reshape(len(site.x), -1)
    difference = np.abs(x @ matrix.T - y.reshape(len(y), -1))
    return difference, rounding_bound(site.spec, matrix, x)


# Reporting -------------------------------------------------------------------------------------------------


def by(shape):
    return "x".join(map(str, shape))


def print_agreement(comparisons):
    print(f"{'layer':8} {'largest diff':>12} {'allowed':>9}")
    for name, (difference, bound) in comparisons.items():
        worst = difference.argmax()
        print(f"{name:8} {difference.flat[worst]:12.1e} {bound.flat[worst]:9.1e}")


SHOWN = 8, 4  # filters of a layer, and input channels of a filter, that are drawn at most
NEURON = (3, 3, 4)  # channel, row and column of the output neuron of the first layer that is explained
HIGHLIGHT = "tab:orange"


def draw(sites, matrices, image, path):
    """What one neuron computes, and below it a row for each layer: filters, and the matrix they become."""
    # Heights follow the matrices, within reason, so that an entry is at least a pixel wide and high.
    heights = [min(max(site.spec.out_size / 100, 2.2), 5.2) for site in sites]
    fig = plt.figure(figsize=(15, 4.2 + 1.1 * sum(heights)), layout="constrained")
    top, below = fig.subfigures(2, 1, height_ratios=(4.2, 1.1 * sum(heights)))
    folded = explain_neuron(top, sites[0], matrices[0], image)
    axes = below.subplots(len(sites), 2, width_ratios=(1, 2), height_ratios=heights)
    for site, matrix, (left, right) in zip(sites, matrices, axes, strict=True):
        colours = colours_of(site.kernel)
        draw_filters(left, site, colours)
        image = right.imshow(np.asarray(matrix), aspect="auto", **colours)
        right.set_title(f"its matrix M, {by(site.spec.shape)}, {site.spec.nse:,} stored entries")
        right.set_xlabel(f"input neurons ({by(site.spec.in_shape)})")
        right.set_ylabel(f"output neurons ({by(site.spec.out_shape)})")
        below.colorbar(image, ax=right, extend="both", label="weight (white: 0)")
    mark_row(fig, axes[0, 1], folded, row_number(sites[0].spec))
    fig.savefig(path, dpi=110)
    plt.close(fig)


def row_number(spec):
    """The row of M that belongs to the neuron: neurons are numbered as the entries of an array are."""
    return np.ravel_multi_index(NEURON, spec.out_shape)


def colours_of(kernel):
    """Blue is positive, red negative, white zero. The largest weights saturate, or the rest would be pale."""
    most = np.quantile(np.abs(kernel), 0.95)
    return {"cmap": "RdBu", "vmin": -most, "vmax": most, "interpolation": "nearest"}


def explain_neuron(figure, site, matrix, image):
    """One neuron three times: what it reads, its filter, its row of M. Returns the axes of the row."""
    channel, row, column = NEURON
    weights = np.asarray(site.kernel[channel, 0])
    line = np.asarray(matrix[row_number(site.spec)])
    patch = np.asarray(image[row - 1 : row + 2, column - 1 : column + 2])
    figure.suptitle(f"One neuron of the first layer: channel {channel}, row {row}, column {column}")
    left, middle, right = figure.subplots(1, 3)

    left.imshow(image, cmap="gray_r")
    left.set_title("It reads 3x3 pixels of the image x:\nits receptive field")
    middle.imshow(weights, **colours_of(site.kernel))
    for (i, j), weight in np.ndenumerate(weights):
        shade = "white" if abs(weight) > abs(weights).max() / 2 else "black"
        middle.text(j, i, f"{weight:+.2f}", ha="center", va="center", fontsize=13, color=shade)
    middle.set_title(f"It weighs them with filter {channel} and adds up:\n{(weights * patch).sum():+.3f}")
    right.imshow(line.reshape(image.shape), **colours_of(site.kernel))
    right.set_title(f"Its row of M, 64 weights laid out like x.\nRow times x: {line @ image.ravel():+.3f}")
    corner = (column - 1.5, row - 1.5)
    for axes in (left, right):
        axes.add_patch(plt.Rectangle(corner, 3, 3, fill=False, color=HIGHLIGHT, lw=3))
    for axes in (left, middle, right):
        axes.set_xticks([])
        axes.set_yticks([])
    for spine in middle.spines.values():
        spine.set(color=HIGHLIGHT, lw=4)
    # The filter is joined to the window on both sides.
    for axes, side, edge in ((left, 3, 0), (right, 0, 1)):
        for i in (0, 3):
            join(figure, axes, (corner[0] + side, corner[1] + i), middle, (edge, 1 - i / 3))
    return right


def join(figure, first, point, second, fraction):
    """A line from a point of the data of one picture to a point of the frame of another."""
    figure.add_artist(
        ConnectionPatch(
            point, fraction, coordsA=first.transData, coordsB=second.transAxes, color=HIGHLIGHT, lw=1.5
        )
    )


def mark_row(figure, axes, folded, row):
    """The row of M that was explained, joined to the picture of it above."""
    axes.annotate(
        f"row {row}", (63.5, row), (66, row), color=HIGHLIGHT, va="center", fontweight="bold",
        annotation_clip=False, arrowprops={"arrowstyle": "-", "color": HIGHLIGHT, "lw": 2},
    )  # fmt: skip
    axes.add_patch(plt.Rectangle((-0.5, row - 1.5), 64, 3, fill=False, color=HIGHLIGHT, lw=1))
    join(figure, axes, (48, row - 1.5), folded, (0.5, 0))


def draw_filters(axes, site, colours):
    """The first filters side by side: a row for each input channel, a column for each output channel."""
    outs, ins = map(min, site.kernel.shape, SHOWN)
    height, width = (n + 1 for n in site.kernel.shape[2:])  # a pixel between two filters
    framed = np.full((ins, height, outs, width), np.nan)
    framed[:, :-1, :, :-1] = np.asarray(site.kernel[:outs, :ins]).transpose(1, 2, 0, 3)
    axes.imshow(framed.reshape(ins * height, outs * width)[:-1, :-1], **colours)
    axes.set_xticks(np.arange(outs) * width + (width - 2) / 2, range(outs))
    axes.set_yticks(np.arange(ins) * height + (height - 2) / 2, range(ins))
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_xlabel("filter (output channel)")
    axes.set_ylabel("input channel")
    title = f"{site.name}: kernel {by(site.spec.rhs_shape)}, {site.kernel.size:,} numbers"
    if site.kernel.shape[:2] != (outs, ins):
        title += f"\n(the first {outs} filters, {ins} input channels)"
    axes.set_title(title)


def main(picture_path="digits.png"):
    start = time.perf_counter()
    data = load_digits()
    images = jnp.asarray(data.images[:, None] / 16, jnp.float32)  # (1797, 1, 8, 8), values in [0, 1]
    labels = jnp.asarray(data.target)

    print(f"training on {len(images) - HELD_OUT:,} images, {HELD_OUT} held out")
    model = partial(class_scores, train(images, labels))

    print("\nthe convolutions of the trained network")
    sites = fc.find_convs(model, images)
    print(sites)

    print(f"\nrunning {len(images):,} images through both networks")
    fc_model = fc.fully_connected(model)
    print(f"find_convs says of the second one: {fc.find_convs(fc_model, images)}\n")
    conv_scores, fc_scores = jax.jit(model)(images), jax.jit(fc_model)(images)

    matrices = [fc.as_matrix(site.spec, site.kernel) for site in sites]
    comparisons = {site.name: compare_layer(site, m) for site, m in zip(sites, matrices, strict=True)}
    print_agreement(comparisons)

    within = all((difference <= bound).all() for difference, bound in comparisons.values())
    equal = int((conv_scores.argmax(1) == fc_scores.argmax(1)).sum())
    held_out_accuracy = (fc_scores.argmax(1) == labels)[-HELD_OUT:].mean()
    print(f"\nall layers agree within the rounding bound: {'yes' if within else 'NO'}")
    print(f"largest difference in a class score, end to end: {abs(conv_scores - fc_scores).max():.1e}")
    print(f"equal predictions: {equal:,} of {len(images):,}")
    print(f"accuracy on held-out images: {held_out_accuracy:.1%}")

    draw(sites, matrices, images[0, 0], picture_path)
    print(f"wrote {picture_path} ({time.perf_counter() - start:.0f} s in all)")
    return 0 if within and equal == len(images) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

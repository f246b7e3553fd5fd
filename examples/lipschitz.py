"""Train a classifier whose layers cannot amplify: the spectral norm of every layer held at a bound.

Two small networks on scikit-learn's handwritten digits, one written in flax.nnx, one in equinox. Each is
trained twice with optax: as usual, and with one `fc.spectrum.power_step` after every update. The second keeps
a block of vectors per layer from step to step, which estimate the norm of its matrix, and scales the kernel
down where that exceeds the bound.

One vector is not enough: where the two largest singular values of a layer change places, it follows the old
one for a while. A block has the new one in it. The learning rate is warmed up, so that
a direction which is not in the block grows slowly. The largest error of an estimate is printed.

The product of the norms bounds how much the scores change per change of the image. So an image whose
margin is larger than sqrt(2) times bound times eps keeps its class whatever is added to it within eps in the
2-norm: that is the certified accuracy. The attained slope is the largest norm of a Jacobian at an image.
Between accuracy under attack and certified accuracy lies the truth.

    python examples/lipschitz.py [lipschitz.png]
"""

import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum

try:
    import equinox as eqx
    import matplotlib

    matplotlib.use("Agg")  # draws to a file; needs no display
    import matplotlib.pyplot as plt
    import optax
    from flax import nnx
    from sklearn.datasets import load_digits
    from threadpoolctl import threadpool_limits  # comes with scikit-learn
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install 'jaxconv_fc[examples,networks]'")

BOUND = 1.0  # of the spectral norm of each layer
SHARPNESS = 10.0  # of the loss: scores that may not grow would never look certain to it
HELD_OUT, BATCH_SIZE, STEPS = 360, 128, 400
WARM_UP = 200  # steps in which the learning rate grows
CHECKED = slice(0, 200, 4)  # steps whose estimates are checked
BLOCK = 16  # vectors per layer
EPSILONS = np.linspace(0, 1, 11)
SHAPES = [(16, 1, 3, 3), (16, 16, 3, 3), (10, 16, 4, 4)]  # out channels, in channels, height, width
STRIDES, PADDINGS = [1, 2, 1], ["SAME", "SAME", "VALID"]


def network(layers, x):
    """Scores by three layers."""
    for layer in layers[:-1]:
        x = jax.nn.relu(layer(x))
    return layers[-1](x)


def network_bound(norms):
    """How much the scores of :func:`network` change per change of the image, at most.

    Maps that follow each other multiply their norms, and the norm of relu is 1. (Maps that are added, as at a
    skip, add theirs.)
    """
    return np.prod(norms)


# The two libraries: a model, its scores for a batch of images (n, 8, 8), its kernels -----------------------


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(
            [
                nnx.Conv(i, o, (h, w), s, padding=p, rngs=rngs)
                for (o, i, h, w), s, p in zip(SHAPES, STRIDES, PADDINGS, strict=True)
            ]
        )

    def __call__(self, images):
        return network(self.layers, images[..., None]).reshape(len(images), -1)


class EquinoxNetwork(eqx.Module):
    layers: list

    def __init__(self, key):
        self.layers = [
            eqx.nn.Conv2d(i, o, (h, w), s, p, key=k)
            for (o, i, h, w), s, p, k in zip(
                SHAPES, STRIDES, PADDINGS, jax.random.split(key, len(SHAPES)), strict=True
            )
        ]

    def __call__(self, images):
        return jax.vmap(lambda image: network(self.layers, image[None]).ravel())(images)


def nnx_model():
    """(parameters as a pytree, scores of (parameters, images), kernels of parameters, with other kernels)."""
    graph, state = nnx.split(NnxNetwork(nnx.Rngs(0)))

    def kernels(state):
        return [state["layers"][i]["kernel"][...] for i in range(len(SHAPES))]

    def with_kernels(state, new):
        model = nnx.merge(graph, state)
        for layer, kernel in zip(model.layers, new, strict=True):
            layer.kernel[...] = kernel
        return nnx.split(model)[1]

    return state, lambda state, images: nnx.merge(graph, state)(images), kernels, with_kernels


def equinox_model():
    model = EquinoxNetwork(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def kernels(params):
        return [layer.weight for layer in params.layers]

    def with_kernels(params, new):
        return eqx.tree_at(kernels, params, new)

    return params, lambda params, images: eqx.combine(params, static)(images), kernels, with_kernels


# Training --------------------------------------------------------------------------------------------------


def hold(specs, kernels, blocks):
    """Kernels whose matrix has a norm of BOUND at most, the blocks for the next step, and the estimates."""
    values, blocks = zip(*map(spectrum.power_step, specs, kernels, blocks), strict=True)
    sigmas = jnp.stack([of_layer[0] for of_layer in values])
    return [k * jnp.minimum(1, BOUND / s) for k, s in zip(kernels, sigmas, strict=True)], blocks, sigmas


def train(model, images, labels, held):
    """(trained parameters, seconds per step, specs, largest relative error of an estimate)."""
    params, scores, kernels, with_kernels = model
    specs = [site.spec for site in fc.find_convs(scores, params, images[:1])]
    keys = jax.random.split(jax.random.key(1), len(specs))
    blocks = tuple(
        spectrum.start_vector(s, jnp.float32, k, k=BLOCK) for s, k in zip(specs, keys, strict=True)
    )
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 2e-3, WARM_UP, STEPS))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, blocks, images, labels):
        def loss(params):
            sharp = SHARPNESS * scores(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(sharp, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
        if not held:
            return params, state, blocks, None
        updated = kernels(params)
        scaled, blocks, sigmas = hold(specs, updated, blocks)
        return with_kernels(params, scaled), state, blocks, (updated, sigmas)

    for _ in range(30):  # the blocks find the norms of the initial kernels; what else changes is dropped
        _, _, blocks, _ = step(params, state, blocks, images[:BATCH_SIZE], labels[:BATCH_SIZE])
    rng = np.random.default_rng(0)
    seconds, estimates = [], []
    for _ in range(STEPS):
        batch = rng.permutation(len(images) - HELD_OUT)[:BATCH_SIZE]
        start = time.perf_counter()
        params, state, blocks, estimate = step(params, state, blocks, images[batch], labels[batch])
        jax.block_until_ready(params)
        seconds.append(time.perf_counter() - start)
        estimates.append(estimate)
    error = max(largest_error(specs, *e) for e in estimates[CHECKED]) if held else None
    return params, float(np.median(seconds)), specs, error


def largest_error(specs, kernels, sigmas):
    """Of the estimates of all layers at one step, relative to the norms of the dense matrices."""
    norms = np.array([matrix_norm(*layer) for layer in zip(specs, kernels, strict=True)])
    return float(np.abs(sigmas / norms - 1).max())


@partial(jax.jit, static_argnums=0)
def matrix_norm(spec, kernel):
    """The norm of M, from its dense Gram matrix of the shorter side: exact, and not carried along."""
    matrix = fc.as_matrix(spec, kernel)
    matrix = matrix if spec.out_size <= spec.in_size else matrix.T
    gram = jnp.matmul(matrix, matrix.T, precision="highest")
    return jnp.sqrt(jnp.linalg.eigvalsh(gram)[-1])


# What was gained -------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def attacked(scores, params, images, labels, epsilon):
    """Which images keep their class under 10 steps of gradient ascent within a ball of the 2-norm."""

    def loss(change):
        sharp = SHARPNESS * scores(params, images + change)
        return optax.softmax_cross_entropy_with_integer_labels(sharp, labels).sum()

    def ascend(change, _):
        slope = jax.grad(loss)(change)
        length = jnp.linalg.norm(slope, axis=(1, 2), keepdims=True)
        change = change + epsilon / 5 * slope / jnp.maximum(length, 1e-12)
        length = jnp.linalg.norm(change, axis=(1, 2), keepdims=True)
        return change * jnp.minimum(1, epsilon / jnp.maximum(length, 1e-12)), None

    change, _ = jax.lax.scan(ascend, jnp.zeros_like(images), None, length=10)
    return scores(params, images + change).argmax(1) == labels


def evaluate(model, params, specs, images, labels):
    """(norms of the layers, largest slope at an image, certified and attacked accuracy per epsilon)."""
    _, scores, kernels, _ = model
    norms = [float(matrix_norm(*layer)) for layer in zip(specs, kernels(params), strict=True)]
    jacobians = jax.jit(jax.vmap(jax.jacrev(lambda image: scores(params, image[None])[0])))(images)
    slope = float(jnp.linalg.norm(jacobians.reshape(len(images), 10, -1), 2, axis=(1, 2)).max())
    top = jax.lax.top_k(scores(params, images), 2)[0]
    margin = jnp.where(scores(params, images).argmax(1) == labels, top[:, 0] - top[:, 1], 0)
    certified = [float((margin > np.sqrt(2) * network_bound(norms) * e).mean()) for e in EPSILONS]
    kept = [float(attacked(scores, params, images, labels, e).mean()) for e in EPSILONS]
    return norms, slope, certified, kept


def main(picture_path="lipschitz.png"):
    start = time.perf_counter()
    threadpool_limits(1)  # OpenBLAS decomposes matrices as small as these faster in one thread
    data = load_digits()
    images, labels = jnp.asarray(data.images / 16, jnp.float32), jnp.asarray(data.target)
    test = images[-HELD_OUT:], labels[-HELD_OUT:]
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    fine = True
    for ax, library, make in zip(axes, ("flax.nnx", "equinox"), (nnx_model, equinox_model), strict=True):
        print(f"{library}: {len(SHAPES)} layers, {STEPS} steps, each held at a spectral norm of {BOUND}")
        print(f"{'':9} {'step':>8} {'accuracy':>8} {'norms of the layers':>26} {'bound':>8} attained")
        for held, colour in ((False, "tab:red"), (True, "tab:blue")):
            model = make()
            params, seconds, specs, error = train(model, images, labels, held)
            norms, slope, certified, kept = evaluate(model, params, specs, *test)
            name = "held" if held else "as usual"
            listed = "  ".join(f"{n:.2f}" for n in norms)
            bound = network_bound(norms)
            figures = f"{1e3 * seconds:5.1f} ms {kept[0]:8.1%} {listed:>26} {bound:8.1f} {slope:8.2f}"
            print(f"{name:9} {figures}", flush=True)
            fine &= slope <= bound and all(c <= k for c, k in zip(certified, kept, strict=True))
            if held:
                print(f"{'':9} largest error of an estimate in the first {CHECKED.stop} steps: {error:.1%}")
                fine &= error <= 0.01 and max(norms) <= 1.02 * BOUND
            ax.plot(EPSILONS, kept, color=colour, label=f"{name}: under attack")
            ax.plot(EPSILONS, certified, color=colour, ls="--", label=f"{name}: certified")
            ax.fill_between(EPSILONS, certified, kept, color=colour, alpha=0.1)
        ax.set_title(library)
        ax.set_xlabel("size of the change, 2-norm of an image with values in [0, 1]")
    axes[0].set_ylabel("accuracy on held-out images")
    axes[0].legend(loc="upper right")
    fig.savefig(picture_path, dpi=110)
    print(f"\nslope below bound, certified below attacked, norms at the bound: {'yes' if fine else 'NO'}")
    print(f"wrote {picture_path} ({time.perf_counter() - start:.0f} s in all)")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

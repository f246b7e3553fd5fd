"""A MobileNetV2 trained twice: with the convolutions of lax, and by this library's. One line differs.

The network is written in flax.nnx as its authors describe it: blocks that widen, filter every channel by
itself, and narrow again, with batch norm and ReLU6. It learns scikit-learn's handwritten digits, enlarged to
24x24. Both trainings take the same steps from the same weights, in turns.

    step = jax.jit(training_step(loss))
    step = jax.jit(training_step(fc.with_products(loss)))

The loss curves lie on top of each other. What differs is the time of a step: on a CPU, lax spends most of it
in gradients of depthwise and 1x1 convolutions.

    python examples/mobilenet.py [mobilenet.png]
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxconv_fc as fc

try:
    import matplotlib

    matplotlib.use("Agg")  # draws to a file; needs no display
    import matplotlib.pyplot as plt
    import optax
    from flax import nnx
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install 'jaxconv_fc[examples,networks]'")

# Per stage: how much wider a block is inside, its output channels, its blocks, the stride of the first.
STAGES = [(1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 2, 2), (4, 64, 1, 2)]
SIZE, HELD_OUT, BATCH_SIZE, STEPS = 24, 360, 24, 60


class ConvNorm(nnx.Module):
    def __init__(self, inputs, outputs, size, stride, rngs, groups=1):
        self.conv = nnx.Conv(
            inputs, outputs, (size, size), stride, feature_group_count=groups, use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class InvertedResidual(nnx.Module):
    def __init__(self, inputs, outputs, stride, expansion, rngs):
        wide = inputs * expansion
        self.expand = ConvNorm(inputs, wide, 1, 1, rngs)
        self.depthwise = ConvNorm(wide, wide, 3, stride, rngs, groups=wide)
        self.project = ConvNorm(wide, outputs, 1, 1, rngs)
        self.has_skip = stride == 1 and inputs == outputs

    def __call__(self, x):
        y = self.project(nnx.relu6(self.depthwise(nnx.relu6(self.expand(x)))))
        return x + y if self.has_skip else y


class MobileNetV2(nnx.Module):
    def __init__(self, rngs):
        self.stem = ConvNorm(1, 16, 3, 1, rngs)
        blocks, channels = [], 16
        for expansion, outputs, count, stride in STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(channels, outputs, stride if i == 0 else 1, expansion, rngs))
                channels = outputs
        self.blocks = nnx.List(blocks)
        self.head = ConvNorm(channels, 128, 1, 1, rngs)
        self.classify = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu6(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.classify(nnx.relu6(self.head(x)).mean((1, 2)))


# Training ----------------------------------------------------------------------------------------------


def data():
    digits = load_digits()
    images = jnp.asarray(digits.images[..., None], jnp.float32) / 16
    return jax.image.resize(images, (len(images), SIZE, SIZE, 1), "linear"), jnp.asarray(digits.target)


def main(path):
    images, labels = data()
    model = MobileNetV2(nnx.Rngs(0))
    definition, params, statistics = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(2e-3)

    def forward(params, statistics, x):
        model = nnx.merge(definition, params, statistics, copy=True)
        return model(x), nnx.split(model, nnx.Param, ...)[2]

    def loss(params, statistics, x, y):
        scores, statistics = forward(params, statistics, x)
        value = optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()
        return value, statistics

    def training_step(loss):
        def step(params, statistics, state, x, y):
            gradient = jax.value_and_grad(loss, has_aux=True)
            (value, statistics), change = gradient(params, statistics, x, y)
            change, state = optimizer.update(change, state)
            return optax.apply_updates(params, change), statistics, state, value

        return jax.jit(step)

    print(fc.find_convs(forward, params, statistics, images[:1]))
    steps = {"lax": training_step(loss), "with_products": training_step(fc.with_products(loss))}
    states = {name: (params, statistics, optimizer.init(params)) for name in steps}
    losses, seconds = {name: [] for name in steps}, {name: [] for name in steps}
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = rng.integers(0, len(images) - HELD_OUT, BATCH_SIZE)
        for name, step in steps.items():
            start = time.perf_counter()
            *state, value = jax.block_until_ready(step(*states[name], images[batch], labels[batch]))
            seconds[name].append(time.perf_counter() - start)
            states[name], losses[name] = state, [*losses[name], float(value)]

    apart = np.abs(np.subtract(*losses.values()))
    medians = {name: np.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:13}  first step {seconds[name][0]:5.1f} s, then {1e3 * median:6.1f} ms per step")
    print(f"a step of lax takes {medians['lax'] / medians['with_products']:.1f} times as long")
    print(f"losses differ by at most {apart[:10].max():.1e} in the first ten steps, {apart.max():.1e} in all")
    accuracy = held_out_accuracy(definition, states["with_products"], images, labels)
    print(f"accuracy on {HELD_OUT} digits held out, after {STEPS} steps: {accuracy:.1%}")
    draw(path, losses, seconds)


def held_out_accuracy(definition, state, images, labels):
    model = nnx.merge(definition, *state[:2])
    model.eval()
    scores = jax.jit(fc.with_products(lambda x: model(x)))(images[-HELD_OUT:])
    return float((scores.argmax(1) == labels[-HELD_OUT:]).mean())


def draw(path, losses, seconds):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for (name, values), style in zip(losses.items(), ({"linewidth": 5, "alpha": 0.35}, {}), strict=True):
        left.plot(values, label=name, **style)
    left.set(xlabel="step", ylabel="loss", title="the same training")
    left.legend(frameon=False)
    medians = [1e3 * np.median(times[1:]) for times in seconds.values()]
    bars = right.barh(list(seconds), medians, color=["C0", "C1"], height=0.5)
    right.bar_label(bars, fmt="%.0f ms", padding=4)
    right.set(xlabel="milliseconds per step", title=f"a step of {BATCH_SIZE} images")
    right.set_xlim(0, 1.2 * max(medians))
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "mobilenet.png")

"""A network that no small change of an image can mislead: proved, not tested.

A small CNN learns scikit-learn's handwritten digits (8x8 images, grey values 0 to 1).  fc.affine_layers turns
it into affine layers joined by ReLUs, and layers.to_lp writes them as a mixed-integer program.  HiGHS then
finds, over every change of an image by at most RADIUS per pixel, by how much the score of another class can
exceed that of the right one.  Below 0, no such change misleads the network.

Beside it stands the attack that a few lines of projected gradient ascent find.  It is one such change, so the
optimum is never below it; otherwise the exit status is 1.

    python examples/verify.py
"""

import os
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv_fc as fc

try:
    import highspy
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install 'jaxconv_fc[examples,verify]'")

RADIUS, IMAGES, HELD_OUT = 0.05, 4, 360
EPOCHS, BATCH_SIZE, LEARNING_RATE, MOMENTUM = 40, 64, 0.05, 0.9
SHAPES = {"first": (6, 1, 3, 3), "second": (8, 6, 3, 3), "head": (10, 32)}


def scores(params, image):
    """Of one image (8, 8): two strided convolutions, ReLUs, a dense layer."""
    x = image[None, None]
    for name in ("first", "second"):
        kernel, bias = params[name]
        with jax.named_scope(name):
            x = lax.conv_general_dilated(x, kernel, (2, 2), "SAME") + bias[:, None, None]
            x = jax.nn.relu(x)
    weights, bias = params["head"]
    return weights @ x.ravel() + bias


def loss(params, images, labels):
    logits = jax.vmap(scores, (None, 0))(params, images)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


@jax.jit
def step(params, velocity, images, labels):
    slopes = jax.grad(loss)(params, images, labels)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v - LEARNING_RATE * g, velocity, slopes)
    return jax.tree.map(jnp.add, params, velocity), velocity


def train(images, labels, rng):
    params = {name: (rng.standard_normal(s) * (2 / np.prod(s[1:])) ** 0.5, np.zeros(s[0]))
              for name, s in SHAPES.items()}  # fmt: skip
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
    velocity = jax.tree.map(jnp.zeros_like, params)
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))[: len(images) // BATCH_SIZE * BATCH_SIZE]
        for batch in order.reshape(-1, BATCH_SIZE):
            params, velocity = step(params, velocity, images[batch], labels[batch])
    return params


def excess(params, image, label, other):
    """By how much another class is ahead of the right one."""
    logits = scores(params, image)
    return logits[other] - logits[label]


@jax.jit
def attack(params, image, label, low, high):
    """The most that projected gradient ascent finds for any class, in 60 steps from the image."""

    def towards(other):
        def ascend(x, _):
            slope = jax.grad(excess, 1)(params, x, label, other)
            x = jnp.clip(x + RADIUS / 8 * jnp.sign(slope), low, high)
            return x, excess(params, x, label, other)

        return lax.scan(ascend, image, length=60)[1].max()

    classes = jnp.arange(10)
    return jnp.where(classes == label, -jnp.inf, jax.vmap(towards)(classes)).max()


def optimum(layers, low, high, label):
    """The largest excess of any class over all images between low and high: a program for each class."""
    best = -np.inf
    ends = layers.bounds(low, high)[-1]
    for other in np.argsort(-(ends[1] - ends[0][label])):
        if other == label:
            continue
        if ends[1][other] - ends[0][label] <= best:  # the bounds settle it
            break
        costs = np.zeros(10)
        costs[other], costs[label] = 1, -1
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "net.mps")
            layers.to_lp(path, low, high, objective=costs, maximize=True)
            solver = highspy.Highs()
            solver.setOptionValue("output_flag", False)
            solver.readModel(path)
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            sys.exit(f"HiGHS: {solver.modelStatusToString(solver.getModelStatus())}")
        best = max(best, solver.getInfo().mip_dual_bound)  # no change does better than this
    return best


def main():
    digits = load_digits()
    images, labels = jnp.asarray(digits.images / 16, jnp.float32), jnp.asarray(digits.target)
    params = train(images[:-HELD_OUT], labels[:-HELD_OUT], np.random.default_rng(0))
    named = jax.jit(jax.vmap(scores, (None, 0)))(params, images[-HELD_OUT:]).argmax(1)
    right = np.asarray(named == labels[-HELD_OUT:])
    print(f"{right.mean():.1%} of {HELD_OUT} held-out images are named right")

    layers = fc.affine_layers(lambda x: scores(params, x), images[0])
    print(layers)
    print(f"\nchanges of up to {RADIUS} per pixel: the largest score of a wrong class minus the right one's")
    print("image  digit  optimum   attack  seconds")
    proved = misled = 0
    chosen = [len(images) - HELD_OUT + i for i, good in enumerate(right) if good][:IMAGES]
    for i in chosen:
        start = time.perf_counter()
        low, high = (np.clip(images[i] + sign * RADIUS, 0, 1) for sign in (-1, 1))
        found = float(attack(params, images[i], labels[i], low, high))
        best = optimum(layers, low, high, int(labels[i]))
        seconds = time.perf_counter() - start
        print(f"{i:5}  {int(labels[i]):5}  {best:7.3f}  {found:7.3f}  {seconds:7.1f}", flush=True)
        if best < found - 1e-4:
            sys.exit("the attack is better than the optimum")
        proved, misled = proved + (best < 0), misled + (found > 0)
    print(f"{proved} of {len(chosen)} images are proved safe, {misled} are misled by the attack")


if __name__ == "__main__":
    main()

"""Differentially private training by two passes: the norm of every example's gradient, then a weighted loss.

DP-SGD (Abadi et al. 2016) clips the gradient of every example to norm C, adds up, and adds noise.  The usual
way makes all gradients by jax.vmap(jax.grad).  Here fc.curvature.model_gradient_norms reads their norms in
one backward pass, and the gradient of the loss weighted by min(1, C / norm) is the sum of the clipped
gradients.  No example's gradient is made.  A small CNN learns scikit-learn's handwritten digits in both ways;
the steps have to agree to within float32 rounding, otherwise the exit status is 1.

    python examples/private.py
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv_fc as fc

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install 'jaxconv_fc[examples]'")

# On GPU and TPU the default precision of float32 products is lower than float32; on CPU this changes nothing.
jax.config.update("jax_default_matmul_precision", "highest")

HELD_OUT, BATCH_SIZE, STEPS, LEARNING_RATE = 360, 256, 60, 0.5
CLIP, NOISE = 1.0, 1.0  # C, and the standard deviation of the noise over C


def initial_params(key):
    shapes = {"conv1": (32, 1, 3, 3), "conv2": (64, 32, 3, 3), "dense": (1024, 128), "head": (128, 10)}
    params = {}
    for name, shape in shapes.items():
        key, subkey = jax.random.split(key)
        inputs = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
        outputs = shape[0] if len(shape) == 4 else shape[1]
        params[name] = ((2 / inputs) ** 0.5 * jax.random.normal(subkey, shape), jnp.zeros(outputs))
    return params


def scores(params, images):
    x = images
    for name, stride in (("conv1", 1), ("conv2", 2)):
        kernel, bias = params[name]
        x = jax.nn.relu(lax.conv_general_dilated(x, kernel, (stride, stride), "SAME") + bias[:, None, None])
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["dense"][0] + params["dense"][1])
    return x @ params["head"][0] + params["head"][1]


def loss(params, batch):
    """The weighted sum of the cross entropies of a batch."""
    log_probs = jax.nn.log_softmax(scores(params, batch["image"]))
    return -(batch["weight"] * jnp.take_along_axis(log_probs, batch["label"][:, None], 1)[:, 0]).sum()


def by_two_passes(params, batch):
    """The sum of the clipped gradients: the gradient of the loss, weighted."""
    norms = fc.curvature.model_gradient_norms(loss, params, batch)
    return jax.grad(loss)(params, batch | {"weight": batch["weight"] * jnp.minimum(1, CLIP / norms)})


def by_all_gradients(params, batch):
    """The same sum, of gradients that are made one by one, all at once in memory."""

    def of_one(example):
        gradient = jax.grad(loss)(params, jax.tree.map(lambda v: v[None], example))
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
        return jax.tree.map(lambda leaf: leaf * jnp.minimum(1, CLIP / norm), gradient)

    return jax.tree.map(lambda leaf: leaf.sum(0), jax.vmap(of_one)(batch))


def main():
    data = load_digits()
    images = (data.images[:, None] / 16).astype(np.float32)
    labels = data.target.astype(np.int32)
    train, held_out = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    key = jax.random.key(0)
    params = initial_params(key)
    ones = np.ones(BATCH_SIZE, np.float32)

    def batch_of(indices):
        return {"image": images[train][indices], "label": labels[train][indices], "weight": ones}

    # both ways, side by side
    first, programs, steps = batch_of(np.arange(BATCH_SIZE)), {}, {}
    for way in (by_two_passes, by_all_gradients):
        programs[way] = jax.jit(way).lower(params, first).compile()
        steps[way] = jax.block_until_ready(programs[way](params, first))
    times = {way: [] for way in programs}
    for _ in range(5):
        for way, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params, first))
            times[way].append(time.perf_counter() - start)
    entries = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{entries:,} parameters, {BATCH_SIZE} examples: the sum of clipped gradients")
    for way, program in programs.items():
        memory = program.memory_analysis().temp_size_in_bytes / 2**20
        print(
            f"  {way.__name__:<16} {np.median(times[way]) * 1e3:6.0f} ms {memory:6.0f} MiB beside the result"
        )
    ours, theirs = (jnp.concatenate([v.ravel() for v in jax.tree.leaves(steps[way])]) for way in programs)
    difference = float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
    print(f"  they differ by {difference:.0e}")
    if not difference < 1e-4:
        sys.exit("the two ways do not agree")

    # training
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        gradient = programs[by_two_passes](params, batch_of(rng.choice(len(images) - HELD_OUT, BATCH_SIZE)))
        leaves, tree = jax.tree.flatten(gradient)
        key, *keys = jax.random.split(key, len(leaves) + 1)
        noisy = [
            (leaf + CLIP * NOISE * jax.random.normal(k, leaf.shape)) / BATCH_SIZE
            for leaf, k in zip(leaves, keys, strict=True)
        ]
        params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, tree.unflatten(noisy))
    found = float(jnp.mean(scores(params, images[held_out]).argmax(1) == labels[held_out]))
    print(f"after {STEPS} private steps: {found:.1%} of {HELD_OUT} held-out digits are right")
    if found < 0.6:
        sys.exit("training has failed")


if __name__ == "__main__":
    main()

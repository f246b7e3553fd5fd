"""Sharpen a blurred photograph: solve M x = y, where M is the matrix of the blur.

A photograph that ships with scikit-learn is put out of focus and given some noise. Beyond its border lies
either the opposite side (padding_mode="circular") or its mirror image ("symmetric"). Both are restored in
three ways:

- LSMR on M, as an operator of lineax. It is stopped early, before it fits the noise;
- conjugate gradients on the normal equations with Tikhonov's term, (M^T M + t I) x = M^T y;
- a division per frequency. It solves the same equations at once, but only where M wraps around. The mirrored
  photograph is restored as if it did too, which leaves ripples.

The second and the third way have to agree where M wraps around, and ways that know the border have to sharpen
the photograph. Otherwise the exit status is 1.

    python examples/deblur.py [deblur.png]
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxconv_fc as fc

try:
    import lineax
    import matplotlib

    matplotlib.use("Agg")  # draws to a file; needs no display
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_sample_image
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install 'jaxconv_fc[examples,spectrum]'")

# The conjugate gradients of lineax give NaN in float32 when there are many unknowns.
jax.config.update("jax_enable_x64", True)

RADIUS = 3  # of the disc that a point is spread over, in pixels
NOISE = 0.005  # standard deviation, of values between 0 and 1
TIKHONOV = 3e-3  # t: the larger, the smoother is the result
LSMR_STEPS = 20


def disc():
    """The kernel: a point becomes a disc, of total weight 1."""
    down, across = np.indices((2 * RADIUS + 1,) * 2) - RADIUS
    weights = np.clip(RADIUS + 0.5 - np.hypot(down, across), 0, 1)
    return jnp.asarray(weights / weights.sum())[None, None]


def geometry(image, kernel, padding_mode):
    """The blur of one colour, (1, height, width). Colours are a batch."""
    pads = [(RADIUS, RADIUS)] * 2
    return fc.conv_spec((1, 1, *image.shape[-2:]), kernel.shape, (1, 1), pads, padding_mode=padding_mode)


# Three ways to solve M x = y, for one colour ---------------------------------------------------------------


def by_lsmr(spec, kernel, y):
    solver = lineax.LSMR(rtol=1e-6, atol=1e-6, max_steps=LSMR_STEPS)
    return lineax.linear_solve(fc.as_linear_operator(spec, kernel), y, solver, throw=False).value


def by_conjugate_gradients(spec, kernel, y):
    operator = fc.as_linear_operator(spec, kernel)
    normal = operator.T @ operator + TIKHONOV * lineax.IdentityLinearOperator(operator.in_structure())
    normal = lineax.TaggedLinearOperator(normal, lineax.positive_semidefinite_tag)
    return lineax.linear_solve(normal, operator.T.mv(y), lineax.CG(rtol=1e-4, atol=1e-4)).value


def by_frequency(spec, kernel, y):
    """A matrix that wraps around multiplies each frequency by a number: the transform of its first column."""
    response = jnp.fft.fft2(fc.matrix_columns(spec, kernel, [0]).reshape(spec.out_shape))
    restored = jnp.conj(response) * jnp.fft.fft2(y) / (jnp.abs(response) ** 2 + TIKHONOV)
    return jnp.fft.ifft2(restored).real


WAYS = {
    f"LSMR, {LSMR_STEPS} steps": by_lsmr,
    "CG, Tikhonov": by_conjugate_gradients,
    "per frequency, Tikhonov": by_frequency,
}


# What was gained -------------------------------------------------------------------------------------------


def psnr(image, other):
    """Peak signal to noise ratio in dB, of values between 0 and 1: 10 log10(1 / mean squared error)."""
    return float(-10 * jnp.log10(jnp.mean((image - other) ** 2)))


def restore(way, spec, kernel, blurred):
    """(restored, seconds), compilation not counted."""
    solve = jax.jit(jax.vmap(way, (None, None, 0))).lower(spec, kernel, blurred).compile()
    start = time.perf_counter()
    result = jax.block_until_ready(solve(spec, kernel, blurred))
    return result, time.perf_counter() - start


def show(ax, image, title):
    ax.imshow(np.clip(np.moveaxis(np.asarray(image)[:, 0], 0, -1), 0, 1))
    ax.set_title(title)
    ax.set_axis_off()


def sharpen(axes, mode, image, kernel, noise):
    """{way: (restored, dB gained)} for one boundary mode, printed and drawn."""
    spec, circular = geometry(image, kernel, mode), geometry(image, kernel, "circular")
    blurred = jax.vmap(fc.apply, (None, None, 0))(spec, kernel, image) + noise
    before = psnr(image, blurred)
    size = f"{spec.out_size:,} x {spec.in_size:,}, {spec.nse:,} stored"
    print(f"{mode}: M is {size}; the blurred photograph has {before:.1f} dB")
    show(axes[0], image, "the photograph")
    show(axes[1], blurred, f"blurred, {mode} border: {before:.1f} dB")
    results = {}
    for ax, (name, way) in zip(axes[2:], WAYS.items(), strict=True):
        restored, seconds = restore(way, circular if way is by_frequency else spec, kernel, blurred)
        after = psnr(image, restored)
        results[way] = restored, after - before
        print(f"  {name:24} {after:5.1f} dB  {1e3 * seconds:7.1f} ms", flush=True)
        show(ax, restored, f"{name}: {after:.1f} dB, {1e3 * seconds:.0f} ms")
    return results


def main(picture_path="deblur.png"):
    start = time.perf_counter()
    photo = load_sample_image("china.jpg")[80:260, 200:440] / 255.0  # (height, width, colours)
    image = jnp.asarray(np.moveaxis(photo, -1, 0)[:, None])  # (colours, 1, height, width)
    noise = NOISE * jax.random.normal(jax.random.key(0), image.shape)
    fig, axes = plt.subplots(2, 5, figsize=(18, 5.6), layout="constrained")
    circular, symmetric = (
        sharpen(row, mode, image, disc(), noise)
        for row, mode in zip(axes, ("circular", "symmetric"), strict=True)
    )
    fig.savefig(picture_path, dpi=110)
    difference = float(abs(circular[by_conjugate_gradients][0] - circular[by_frequency][0]).max())
    agree = difference < 0.01
    del symmetric[by_frequency]  # it does not know the border
    sharper = min(gained for _, gained in [*circular.values(), *symmetric.values()]) > 2
    print(f"CG and frequencies agree where M wraps around: {'yes' if agree else 'NO'}, to {difference:.0e}")
    print(f"at least 2 dB are gained where the border is known: {'yes' if sharper else 'NO'}")
    print(f"wrote {picture_path} ({time.perf_counter() - start:.0f} s in all)")
    return 0 if agree and sharper else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

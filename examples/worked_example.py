"""The matrix of a convolution, small enough to check by eye.

    python examples/worked_example.py [worked_example.png]

With a file name it also draws one neuron: its window on the image, and its row of M.
"""

import sys

import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv_fc as fc


def two_filters_on_one_channel():
    """A 1x3x3 image, two 2x2 filters: M has 8 rows (output neurons) and 9 columns (pixels)."""
    image = jnp.arange(1, 10).reshape(1, 3, 3)
    kernel = jnp.array([[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]])  # a..h, as (out, in, height, width)
    spec = fc.conv_spec((1, 1, 3, 3), kernel.shape, (1, 1), "VALID")

    print(f"image {spec.in_shape}, kernel {spec.rhs_shape}, output {spec.out_shape}, M {spec.shape}")
    print("\nM with the kernel entries as names, | between the rows of the image:\n")
    print(fc.format_matrix(spec))
    print("\nand as numbers, for a..h = 1..8:\n")
    print(fc.format_matrix(spec, kernel))

    matrix = fc.as_matrix(spec, kernel)
    y = matrix @ image.ravel()
    print(f"\ny' = M x' = {y}")
    print(f"reshaped to {spec.out_shape}:\n{y.reshape(spec.out_shape)}")

    # In floats: GPUs have no integer convolution (the matrix does not mind).
    x, k = image[None].astype(jnp.float32), kernel.astype(jnp.float32)
    convolved = lax.conv_general_dilated(x, k, (1, 1), "VALID")[0]
    np.testing.assert_array_equal(y.reshape(spec.out_shape), convolved)
    print("which is lax.conv_general_dilated(x, kernel, (1, 1), 'VALID')[0]")

    # A neuron of the output is one entry of y', and its weights are one row of M.
    row = fc.matrix_rows(spec, kernel, [5])[0]
    print("\nneuron 5 is channel 1, position (0, 1); its weights, as an image:")
    print(row.reshape(spec.in_shape))
    np.testing.assert_array_equal(row, matrix[5])


def entries_by_formula():
    """M[(u, v, w), (i, j, k)] = K[u, i, j-v, k-w] where that index exists, else 0 (stride 1, no padding)."""
    kernel = np.arange(1, 9).reshape(2, 1, 2, 2)
    spec = fc.conv_spec((1, 1, 3, 3), kernel.shape, (1, 1), "VALID")
    (outs, rows, cols), (ins, height, width) = spec.out_shape, spec.in_shape
    matrix = np.zeros((*spec.out_shape, *spec.in_shape), int)
    for u, v, w, i, j, k in np.ndindex(outs, rows, cols, ins, height, width):
        if 0 <= j - v < 2 and 0 <= k - w < 2:  # not K[u, i, v-j, w-k], as one often reads
            matrix[u, v, w, i, j, k] = kernel[u, i, j - v, k - w]
    np.testing.assert_array_equal(matrix.reshape(spec.shape), fc.as_matrix(spec, kernel))
    print("M[(u, v, w), (i, j, k)] == K[u, i, j-v, k-w] in all", matrix.size, "entries")


def three_sharpening_filters():
    """Two neighbouring neurons: the second row is the first one, moved by one pixel."""
    sharpen = jnp.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]])
    kernel = jnp.stack([sharpen] * 3)[:, None]
    spec = fc.conv_spec((1, 1, 5, 5), kernel.shape, (1, 1), "SAME")
    lines = fc.format_matrix(spec, kernel, max_rows=spec.out_size).splitlines()
    center = 2 * 5 + 2  # row-major position of the pixel in the middle
    print(f"M {spec.shape}, rows {center} and {center + 1} (the middle pixel, and the one right of it):\n")
    print("\n".join(lines[center : center + 2]))
    # Equal filters give equal blocks of rows, one for each output channel.
    assert lines[:25] == lines[25:50] == lines[50:]


def one_filter_on_rgb():
    """An input channel is a block of columns: red, green and blue stand side by side, || between them."""
    spec = fc.conv_spec((1, 3, 3, 3), (1, 3, 2, 2), (1, 1), "VALID")
    print(f"image {spec.in_shape}, kernel {spec.rhs_shape}, M {spec.shape}:\n")
    print(fc.format_matrix(spec))


def draw_a_neuron(path):
    """Neuron 5 of the first example: channel 1, position (0, 1)."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # draws to a file; needs no display
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as missing:
        sys.exit(f"{missing.name} is not installed: pip install 'jaxconv_fc[examples]'")
    spec = fc.conv_spec((1, 1, 3, 3), (2, 1, 2, 2), (1, 1), "VALID")
    figure, (image, window, matrix) = plt.subplots(
        1, 3, figsize=(11, 4.2), layout="constrained", width_ratios=[1, 1, 2]
    )
    for ax, neuron in ((image, 0), (window, 5)):
        fc.show.receptive_field(spec, neuron, ax=ax)
        ax.set_title(f"what neuron {neuron} reads")
    fc.show.spy(spec, ax=matrix)
    for neuron in (0, 5):
        around = (neuron - 0.5, neuron + 0.5)
        matrix.axhspan(*around, facecolor="none", edgecolor="tab:red", linewidth=2.5, zorder=5)
    matrix.set_title("their weights: rows of M")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main():
    examples = [two_filters_on_one_channel, entries_by_formula, three_sharpening_filters, one_filter_on_rgb]
    for example in examples:
        print(f"=== {example.__name__.replace('_', ' ')} ===\n")
        example()
        print()
    if len(sys.argv) > 1:
        draw_a_neuron(sys.argv[1])


if __name__ == "__main__":
    main()

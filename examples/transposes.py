"""What libraries call a transposed convolution, held against M^T of the convolution it is named after.

    python examples/transposes.py

For the forward convolution of each row (kernel 3, one stride and padding), every layer is given y and the
same kernel, and its result is compared with `fc.apply_transpose`, the true M^T y. A layer whose library
is not installed is left out.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv_fc as fc

N = ("NHC", "HIO", "NHC")
IN, OUT, TAPS = 2, 3, 3


def lax_default(y, kernel, spec, padding):
    """Takes a kernel with inputs and outputs exchanged and does not turn it around."""
    exchanged = jnp.swapaxes(kernel, 1, 2)
    return lax.conv_transpose(y[None], exchanged, spec.window_strides, padding, dimension_numbers=N)[0]


def lax_transpose_kernel(y, kernel, spec, padding):
    return lax.conv_transpose(
        y[None], kernel, spec.window_strides, padding, dimension_numbers=N, transpose_kernel=True
    )[0]


def flax_layer(y, kernel, spec, padding):
    from flax import linen

    strides = spec.window_strides
    layer = linen.ConvTranspose(IN, (TAPS,), strides, padding, transpose_kernel=True, use_bias=False)
    return layer.apply({"params": {"kernel": kernel}}, y)


def equinox_layer(y, kernel, spec, padding):
    import equinox

    pads = [tuple(p) for p in spec.padding]
    layer = equinox.nn.ConvTranspose1d(
        OUT, IN, TAPS, spec.window_strides[0], padding=pads, use_bias=False, key=jax.random.key(0)
    )
    turned = jnp.transpose(kernel[::-1], (1, 2, 0))  # its weight is that of a convolution: in, out, taps
    return equinox.tree_at(lambda it: it.weight, layer, turned)(y.T).T


def torch_layer(y, kernel, spec, padding):
    import torch

    ((lo, hi),) = spec.padding
    if lo != hi:
        raise ValueError("torch pads both sides alike")
    weight = torch.from_numpy(np.array(jnp.transpose(kernel, (2, 1, 0))))
    result = torch.nn.functional.conv_transpose1d(
        torch.from_numpy(np.array(y.T)), weight, stride=spec.window_strides[0], padding=lo
    )
    return jnp.asarray(result.numpy()).T


LAYERS = {
    "lax.conv_transpose": lax_default,
    "  with transpose_kernel": lax_transpose_kernel,
    "flax ConvTranspose": flax_layer,
    "equinox ConvTranspose": equinox_layer,
    "torch conv_transpose": torch_layer,
}
NEEDS = {flax_layer: "flax", equinox_layer: "equinox", torch_layer: "torch"}
GEOMETRIES = [  # (input size, stride, padding) of the forward convolution
    *((6, 1, padding) for padding in ("VALID", "SAME")),
    *((n, 2, padding) for padding in ("VALID", "SAME") for n in (7, 8)),
]


def verdict(layer, n, stride, padding):
    spec = fc.conv_spec((1, n, IN), (TAPS, IN, OUT), (stride,), padding, dimension_numbers=N)
    kernel = jax.random.normal(jax.random.key(1), spec.rhs_shape)
    y = jax.random.normal(jax.random.key(2), spec.out_shape)
    true = fc.apply_transpose(spec, kernel, y)
    try:
        got = layer(y, kernel, spec, padding)
    except ValueError:
        return "refused"
    if got.shape != true.shape:
        return f"size {got.shape[0]}, not {true.shape[0]}"
    return "M^T" if np.allclose(got, true, atol=1e-5) else "other values"


def main():
    names = [f"n={n} s={s} {p}" for n, s, p in GEOMETRIES]
    print(f"{'':24}" + "".join(f"{name:17}" for name in names))
    for title, layer in LAYERS.items():
        if layer in NEEDS and importlib.util.find_spec(NEEDS[layer]) is None:
            continue
        print(f"{title:24}" + "".join(f"{verdict(layer, *geometry):17}" for geometry in GEOMETRIES))


if __name__ == "__main__":
    main()

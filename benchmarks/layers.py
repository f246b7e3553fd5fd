"""The layers of the tables, and what a user of JAX would write by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NHWC = ("NHWC", "HWIO", "NHWC")


def kernel_of(spec, dtype=np.float32):
    """Random taps, small enough for M^T M to be applied many times."""
    scale = (
        2 * spec.rhs_shape[spec.dimension_numbers.rhs_spec[0]] * np.prod([a.taps for a in spec.axes])
    ) ** 0.5
    taps = np.random.default_rng(0).standard_normal(spec.rhs_shape, np.float32) / np.float32(scale)
    return jnp.asarray(taps, dtype)


def random(shape, dtype=np.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def conv(spec, kernel, xs):
    """lax on a batch of examples, with the padding of boundary modes as a user would add it."""
    numbers, padding = spec.dimension_numbers, spec.padding
    if spec.padding_mode != "zeros":
        pads = [(0, 0)] * xs.ndim
        for dim, pad in zip(numbers.lhs_spec[2:], padding, strict=True):
            pads[dim] = pad
        xs, padding = (
            jnp.pad(xs, pads, {"circular": "wrap"}.get(spec.padding_mode, spec.padding_mode)),
            "VALID",
        )
    return lax.conv_general_dilated(
        xs,
        kernel,
        spec.window_strides,
        padding,
        spec.lhs_dilation,
        spec.rhs_dilation,
        numbers,
        spec.feature_group_count,
    )


def conv_one(spec, kernel, x):
    """lax on one example."""
    batch_in, batch_out = spec.dimension_numbers.lhs_spec[0], spec.dimension_numbers.out_spec[0]
    return jnp.squeeze(conv(spec, kernel, jnp.expand_dims(x, batch_in)), batch_out)


def conv_transpose_one(spec, kernel, y):
    """What JAX derives from lax."""
    x = jax.ShapeDtypeStruct(spec.in_shape, kernel.dtype)
    return jax.linear_transpose(partial(conv_one, spec, kernel), x)(y)[0]


def kernel_gradient_one(spec, x, y):
    kernel = jax.ShapeDtypeStruct(spec.rhs_shape, x.dtype)
    return jax.linear_transpose(lambda kernel: conv_one(spec, kernel, x), kernel)(y)[0]

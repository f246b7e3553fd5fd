"""What the tests of traced functions write their functions with."""

import jax.numpy as jnp
import numpy as np
from jax import lax


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def close(a, b, digits=12):
    """Equal up to so many digits of the largest entry."""
    scale = max(1.0, float(np.max(np.abs(b), initial=0)))
    np.testing.assert_allclose(a, b, rtol=0, atol=scale * 10.0**-digits)

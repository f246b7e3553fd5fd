"""What the tests of traced functions write their functions with."""

from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
from jax import lax, monitoring


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def close(a, b, digits=12):
    """Equal up to so many digits of the largest entry."""
    scale = max(1.0, float(np.max(np.abs(b), initial=0)))
    np.testing.assert_allclose(a, b, rtol=0, atol=scale * 10.0**-digits)


@contextmanager
def compilations():
    """The list of the programs that are compiled inside of the block, which they are appended to."""
    programs = []

    def note(event, duration, **_):
        programs.extend([event] * ("backend_compile" in event))

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield programs
    finally:
        monitoring.clear_event_listeners()

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


COMPILED: list[str] = []  # an entry for every program that this process has compiled


def _note(event, duration, **_):
    COMPILED.extend([event] * ("backend_compile" in event))


monitoring.register_event_duration_secs_listener(_note)


@contextmanager
def compilations():
    """The list of the programs that are compiled inside of the block; it is filled at its end."""
    programs, before = [], len(COMPILED)
    yield programs
    programs += COMPILED[before:]

"""What the tests of traced functions write their functions with."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, monitoring


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def close(a, b, digits=12, name=""):
    """Equal up to so many digits of the largest entry."""
    scale = max(1.0, float(np.max(np.abs(b), initial=0)))
    np.testing.assert_allclose(a, b, rtol=0, atol=scale * 10.0**-digits, err_msg=name)


def difference(function, at, along, step=1e-4):
    """The central difference along a direction. One body for both ends, which compiles once."""
    ends = [jnp.stack([a + step * t, a - step * t]) for a, t in zip(at, along, strict=True)]
    return jax.tree.map(lambda v: (v[0] - v[1]) / (2 * step), lax.map(lambda args: function(*args), ends))


def reverse(loss, at, along):
    """The derivative of a scalar along a direction, by its gradient."""
    gradients = jax.grad(loss, tuple(range(len(at))))(*at)
    return sum(jnp.sum(g * t) for g, t in zip(gradients, along, strict=True))


def slopes(function, at, along, weights=1, order=2):
    """Forward, reverse and second derivatives along a direction, and central differences: two lists alike."""

    def loss(*args):
        return jnp.sum(function(*args) * weights)

    derivatives = [jax.jvp(function, at, along)[1], reverse(loss, at, along)]
    functions = [function, loss]
    if order == 2:
        functions.append(jax.grad(loss, tuple(range(len(at)))))
        derivatives.append(jax.jvp(functions[-1], at, along)[1])
    return derivatives, [difference(f, at, along) for f in functions]


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

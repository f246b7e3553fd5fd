"""matrix_of against JAX's own Jacobians, on linear networks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv_fc as fc
from benchmarks.layers import random
from benchmarks.rows import Cannot, Row, Table, jitted

# channels of the image, of the first and of the second layer; image; outputs
NETWORKS = {
    "1-4-8, 10 outputs": ((1, 4, 8), 32, 10),
    "3-8-16, 10 outputs": ((3, 8, 16), 32, 10),
    "3-16-32, 10 outputs": ((3, 16, 32), 32, 10),
    "3-8-16, 100 outputs": ((3, 8, 16), 32, 100),
    "1-4-8, 8x8 image": ((1, 4, 8), 8, 10),
    "1-4-8, 8x8 image, 100 outputs": ((1, 4, 8), 8, 100),
}


def network(weights, x):
    """conv, pad, average pool, conv, flatten, dense."""
    first, second, dense = weights
    y = lax.conv_general_dilated(x, first, (1, 1), "SAME")
    y = jnp.pad(y, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = lax.reduce_window(y, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
    y = lax.conv_general_dilated(y, second, (1, 1), "VALID")
    return (y.reshape(1, -1) @ dense).ravel()


def _rows(compiled, quick):
    with jax.enable_x64(True):
        for name, ((a, b, c), size, outputs) in NETWORKS.items():
            size = 8 if quick else size
            shapes = [(b, a, 3, 3), (c, b, 3, 3), (c * (size // 2 - 1) ** 2, outputs)]
            weights = [random(shape, np.float64, seed) for seed, shape in enumerate(shapes)]
            x = random((1, a, size, size), np.float64, seed=9)
            ways = {
                "ours": lambda w, x: fc.matrix_of(partial(network, w), x)[0],
                "jacrev": lambda w, x: jax.jacrev(partial(network, w))(x).reshape(-1, x.size),
                "jacfwd": lambda w, x: jax.jacfwd(partial(network, w))(x).reshape(-1, x.size),
            }
            if compiled:
                calls = {way: partial(jitted, fn, weights, x) for way, fn in ways.items()}
            else:
                calls = {way: partial(_as_written, fn, weights, x) for way, fn in ways.items()}
            ours = calls.pop("ours")
            if compiled:
                calls["asdex"] = partial(_asdex, weights, x)
            yield Row(name, ours, calls, size=f"{x.size:,} inputs, {outputs} outputs", value=_value)


def _as_written(fn, *arguments):
    return lambda: fn(*arguments)


def _asdex(weights, x):
    import asdex

    if x.size > 2000:
        raise Cannot("detection and colouring of a matrix without zeros take minutes")
    try:
        coloring = asdex.jacobian_coloring(partial(network, weights), x)
    except NotImplementedError as error:  # of its average pool, in 0.5.2
        raise Cannot(str(error).split(".")[0]) from error
    return jitted(
        lambda w, x: asdex.jacobian_from_coloring(partial(network, w), coloring, output_format="dense")(x),
        weights,
        x,
    )


def _value(result):
    return np.asarray(result).reshape(result.shape[0], -1)


TABLES = (
    Table("matrix_of", "The matrix of a linear network, jitted: `matrix_of`", "", partial(_rows, True)),
    Table("matrix_of_eager", "The same outside of jit, traced at every call", "", partial(_rows, False)),
)

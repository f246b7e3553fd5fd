"""Dense M: the whole matrix, and only its nonzeros."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxconv_fc as fc
from benchmarks import peers
from benchmarks.layers import NHWC, kernel_of
from benchmarks.rows import Row, Table, jitted, text


def geometries(quick):
    """name -> (spec, dtype); larger where a GPU writes 3 TB/s"""
    gpu = jax.default_backend() != "cpu"
    n, line, cube, one = (6, 20, 3, 12) if quick else (32, 1024, 12, 128) if gpu else (20, 400, 9, 80)
    square, kernel = (1, 16, n, n), (16, 16, 3, 3)
    specs = {
        "3x3 SAME": fc.conv_spec(square, kernel, (1, 1), "SAME"),
        "stride 2": fc.conv_spec((1, 16, n + 4, n + 4), (32, 16, 3, 3), (2, 2), [(1, 1), (1, 1)]),
        "dilation 2": fc.conv_spec(square, kernel, (1, 1), [(2, 2), (2, 2)], rhs_dilation=(2, 2)),
        "4 groups": fc.conv_spec(square, (16, 4, 3, 3), (1, 1), "SAME", feature_group_count=4),
        "depthwise": fc.conv_spec(square, (16, 1, 3, 3), (1, 1), "SAME", feature_group_count=16),
        "input dilation 2": fc.conv_spec(
            (1, 16, n - 6, n - 6) if not quick else square, kernel, (1, 1), [(1, 1), (1, 1)], (2, 2)
        ),
        "1-D, 5 taps": fc.conv_spec((1, 16, line), (16, 16, 5), (1,), "SAME"),
        "3-D, 8 channels": fc.conv_spec((1, 8, *[cube] * 3), (8, 8, 3, 3, 3), (1, 1, 1), "SAME"),
        "circular": fc.conv_spec(square, kernel, (1, 1), "SAME", padding_mode="circular"),
        "edge": fc.conv_spec(square, kernel, (1, 1), "SAME", padding_mode="edge"),
    }
    same = specs["3x3 SAME"]
    last = fc.conv_spec((1, n, n, 16), (3, 3, 16, 16), (1, 1), "SAME", dimension_numbers=NHWC)
    single = fc.conv_spec((1, 1, one, one), (1, 1, 5, 5), (1, 1), "SAME")
    return {name: (spec, "float32") for name, spec in specs.items()} | {
        "bfloat16": (same, "bfloat16"),
        "float64": (same, "float64"),
        "NHWC": (last, "float32"),
        "one channel, 5x5": (single, "float32"),
    }


def full(spec, dtype):
    # The value is an argument: a constant could be folded, and would not be written at every call.
    return lambda: jitted(lambda value: jnp.full(spec.shape, value), jnp.asarray(0.5, dtype))


def _size(spec, dtype):
    rows, columns = spec.shape
    return f"{rows:,} x {columns:,}, {text(spec.nbytes(dtype).dense)}"


def _rows(quick):
    for name, (spec, dtype) in geometries(quick).items():
        with jax.enable_x64(dtype == "float64"):
            kernel = kernel_of(spec, dtype)
            others = {
                "vmap(conv)(eye)": partial(peers.vmap_eye, spec, kernel),
                "jacfwd": partial(peers.jacobian, jax.jacfwd, spec, kernel),
                "jacrev": partial(peers.jacobian, jax.jacrev, spec, kernel),
                "asdex": partial(peers.asdex, spec, kernel),
                "einconv": partial(peers.einconv, spec, kernel),
                "SciPy kron": partial(peers.scipy_kron, spec, kernel, dense=True),
                "PyLops": partial(peers.pylops, spec, kernel, dense=True),
            }
            ours = partial(jitted, partial(fc.as_matrix, spec), kernel)
            value = partial(_value, spec)
            yield Row(name, ours, others, full(spec, dtype), _size(spec, dtype), value)


def _value(spec, result):
    """M, of whatever shape and kind: probing gives its transpose."""
    result = result.cpu().float().numpy() if hasattr(result, "cpu") else np.asarray(result, np.float64)
    transposed = result.ndim > 2 and result.shape == (spec.in_size, *spec.out_shape)
    return result.reshape(spec.in_size, -1).T if transposed else result.reshape(spec.shape)


def _updates(quick):
    for name, (spec, dtype) in geometries(quick).items():
        if name in ("3x3 SAME", "stride 2", "depthwise", "1-D, 5 taps", "float64"):
            with jax.enable_x64(dtype == "float64"):
                kernel = kernel_of(spec, dtype)
                new = partial(jitted, partial(fc.as_matrix, spec), kernel)
                ours = partial(_update, spec, kernel)
                yield Row(name, ours, {"as_matrix": new}, full(spec, dtype), _size(spec, dtype))


def _update(spec, kernel):
    """Rewrites the nonzeros of a matrix that is donated, and so is in place of the old one."""
    update = jax.jit(partial(fc.update_matrix, spec), donate_argnums=0)
    held = [jax.jit(partial(fc.as_matrix, spec))(kernel)]

    def call():
        held[0] = update(held[0], kernel)
        return held[0]

    return call


TABLES = (
    Table("dense", "Dense M: `as_matrix`", "`jnp.full` of the same array", _rows),
    Table("update", "A new kernel in an old M: `update_matrix`", "`jnp.full` of the same array", _updates),
)

"""Sparse M, on the host and in JAX."""

from functools import partial

import jax.numpy as jnp
import numpy as np

import jaxconv_fc as fc
from benchmarks import peers
from benchmarks.layers import NHWC, kernel_of
from benchmarks.rows import Row, Table, jitted, text


def geometries(quick):
    def square(channels, n, taps=3, **options):
        shape, kernel = (1, channels, n, n), (channels, channels, taps, taps)
        return fc.conv_spec(shape, kernel, (1, 1), "SAME", **options)

    specs = {"16 channels, 4x4": square(16, 4), "one channel, 5x5": square(1, 28, 5)}
    if quick:
        return specs
    deep = {"feature_group_count": 64}
    return specs | {
        "16 channels, 8x8": square(16, 8),
        "16 channels, 16x16": square(16, 16),
        "NHWC, 16 channels, 16x16": fc.conv_spec(
            (1, 16, 16, 16), (3, 3, 16, 16), (1, 1), "SAME", dimension_numbers=NHWC
        ),
        "circular": square(16, 16, padding_mode="circular"),
        "depthwise 7x7": fc.conv_spec((1, 64, 28, 28), (64, 1, 7, 7), (1, 1), "SAME", **deep),
        "32 channels, 32x32": square(32, 32),
        "ResNet-50, first": fc.conv_spec((1, 3, 224, 224), (64, 3, 7, 7), (2, 2), [(3, 3), (3, 3)]),
    }


def full(spec, xp=jnp):
    """Data, columns and row starts of the right sizes: three numbers that XLA cannot know."""
    sizes = (spec.nse, spec.nse, spec.out_size + 1)
    if xp is np:
        kinds = (np.float32, np.int32, np.int32)
        return lambda: lambda: [np.full(n, 1, kind) for n, kind in zip(sizes, kinds, strict=True)]
    write = partial(jitted, lambda a, i: [jnp.full(n, v) for n, v in zip(sizes, (a, i, i), strict=True)])
    return partial(write, jnp.float32(1), jnp.int32(1))


def _value(spec):
    def value(result):
        if hasattr(result, "_dt"):  # sparse-convolution: mode "full", cropped in its product
            raise_rows = result._dt.toarray().reshape(*result._so, -1)
            crop = tuple(
                slice((full - a.size) // 2, (full - a.size) // 2 + a.size)
                for full, a in zip(result._so, spec.axes, strict=True)
            )
            return raise_rows[crop].reshape(spec.shape)
        dense = result.todense() if hasattr(result, "todense") else result
        return np.asarray(dense).reshape(spec.shape)

    return value


def _host(quick):
    for name, spec in geometries(quick).items():
        kernel = np.asarray(kernel_of(spec))
        others = {
            "COO to CSR, sorted": partial(peers.scipy_triples, spec, kernel, shuffled=False),
            "COO to CSR, shuffled": partial(peers.scipy_triples, spec, kernel, shuffled=True),
            "SciPy kron": partial(peers.scipy_kron, spec, kernel, dense=False),
            "PyLops": partial(peers.pylops, spec, kernel, dense=False),
            "sparse-convolution": partial(peers.sparse_convolution, spec, kernel),
        }
        if not quick:
            others = {"np.full": full(spec, np)} | others
        ours = partial(_as_scipy, spec, kernel)
        yield Row(name, ours, others, full(spec), _size(spec), _value(spec))


def _as_scipy(spec, kernel):
    return lambda: fc.as_scipy(spec, kernel)


def _size(spec):
    return f"{spec.nse:,} entries, {text(8 * spec.nse)}"


def _device(builder, quick):
    for name, spec in geometries(quick).items():
        kernel = kernel_of(spec)
        others = {"asdex": partial(peers.asdex, spec, kernel, output_format="bcoo")}
        ours = partial(jitted, partial(builder, spec), kernel)
        yield Row(name, ours, others, full(spec), _size(spec), _value(spec))


TABLES = (
    Table(
        "as_scipy",
        "Sparse M on the host: `as_scipy`",
        "XLA writing three arrays of these sizes",
        _host,
        "COO to CSR starts from triples that somebody else has made. sparse-convolution makes the matrix of "
        "mode full.",
        times=2,
    ),
    Table(
        "as_bcsr",
        "Sparse M in JAX, jitted: `as_bcsr`",
        "XLA writing three arrays of these sizes",
        partial(_device, fc.as_bcsr),
    ),
    Table(
        "as_bcoo",
        "Sparse M in JAX, jitted: `as_bcoo`",
        "XLA writing the arrays of BCSR",
        partial(_device, fc.as_bcoo),
    ),
)

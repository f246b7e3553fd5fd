"""matrix_of against JAX's own Jacobians, on linear networks; sparse ones and layers of others."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
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


# -- sparse ----------------------------------------------------------------------------------------

# name: (channels of every layer, image)
CHAINS = {
    "one layer, 16 to 32": ((16, 32), 32),
    "5 layers of 3 to 8": ((3, 8, 8, 8, 8, 3), 64),
    "3 layers of 3 to 8": ((3, 8, 8, 3), 16),
}


def _chain(weights, size, x):
    y = x.reshape(1, -1, size, size)
    for kernel in weights:
        y = lax.conv_general_dilated(y, kernel, (1, 1), "SAME") + 0.5
    return y.ravel()


def _unet(weights, size, x):
    """Two levels, joined by a skip, without activations."""
    first, down, middle, up, last = weights
    a = lax.conv_general_dilated(x.reshape(1, -1, size, size), first, (1, 1), "SAME")
    b = lax.conv_general_dilated(a, down, (2, 2), "SAME")
    b = lax.conv_general_dilated(b, middle, (1, 1), "SAME")
    b = lax.conv_transpose(b, up, (2, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return lax.conv_general_dilated(jnp.concatenate([a, b], 1), last, (1, 1), "SAME").ravel()


def _sparse_rows(quick):
    for name, (channels, size) in CHAINS.items():
        size = 8 if quick else size
        shapes = [(b, a, 3, 3) for a, b in itertools.pairwise(channels)]
        yield _sparse_row(name, _chain, shapes, channels[0], size)
    size = 16 if quick else 128
    shapes = [(4, 3, 3, 3), (8, 4, 3, 3), (8, 8, 3, 3), (4, 8, 2, 2), (3, 8, 1, 1)]
    yield _sparse_row("U-Net, 3 to 8", _unet, shapes, 3, size)


def _sparse_row(name, network, shapes, channels, size):
    weights = [random(shape, np.float32, seed) for seed, shape in enumerate(shapes)]
    x = random((channels * size * size,), np.float32, seed=9)
    fn = partial(network, weights, size)
    peers = {"asdex": partial(_asdex_sparse, fn, x), "matrix_of (dense)": partial(_dense, fn, x)}
    specs = [fc.conv_spec((1, k.shape[1], size, size), k.shape, (1, 1), "SAME") for k in weights]
    layers = lambda: [fc.as_scipy(spec, k) for spec, k in zip(specs, weights, strict=True)]  # noqa: E731
    ours = partial(fc.sparse_matrix_of, fn, x)
    size = f"{x.size:,} inputs"
    return Row(name, lambda: lambda: ours().matrix, peers, lambda: layers, size, _unsparse)


def _asdex_sparse(fn, x):
    """Detection, colouring and evaluation together: the function is new, as for ours."""
    import asdex

    if x.size > 20_000:
        raise Cannot("detection and colouring take minutes")
    return lambda: asdex.jacobian(fn, x, output_format="scipy_csr")(x)


def _dense(fn, x):
    if x.size > 4000:
        raise Cannot("a dense matrix of gigabytes")
    return lambda: fc.matrix_of(fn, x).matrix


def _unsparse(matrix):
    return matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)


# -- layers ----------------------------------------------------------------------------------------


def _residual(weights, x):
    """A strided stem, residual blocks, and a dense layer."""
    stem, *blocks, dense = weights
    y = jax.nn.relu(lax.conv_general_dilated(x, stem, (2, 2), "SAME"))
    for first, second in zip(blocks[::2], blocks[1::2], strict=True):
        inner = jax.nn.relu(lax.conv_general_dilated(y, first, (1, 1), "SAME"))
        y = jax.nn.relu(y + lax.conv_general_dilated(inner, second, (1, 1), "SAME"))
    return y.reshape(-1) @ dense


def _layer_rows(quick):
    for channels, size in ((8, 16), (16, 32)):
        size = 8 if quick else size
        shapes = [(channels, 3, 3, 3), *[(channels, channels, 3, 3)] * 4, (channels * (size // 2) ** 2, 10)]
        weights = [random(shape, np.float32, seed) for seed, shape in enumerate(shapes)]
        x = random((1, 3, size, size), np.float32, seed=9)
        fn = partial(_residual, weights)
        yield Row(
            f"residual network, {channels} channels",
            lambda fn=fn, x=x: lambda: fc.affine_layers(fn, x),
            {"a gradient per output": partial(_gradients, weights, x)},
            size=f"{x.size:,} inputs",
            value=lambda _: np.zeros(0),  # layers join what stands between two activations
        )


def _gradients(weights, x):
    """The matrix of every layer by its Jacobian, a row at a time, as verifiers in JAX do; then as CSR."""
    stem, *blocks, dense = weights
    y = jax.ShapeDtypeStruct((1, stem.shape[0], x.shape[2] // 2, x.shape[3] // 2), x.dtype)
    parts = [(lambda x: lax.conv_general_dilated(x, stem, (2, 2), "SAME"), x)]
    parts += [(lambda y, k=k: lax.conv_general_dilated(y, k, (1, 1), "SAME"), y) for k in blocks]
    parts += [(lambda y: y.reshape(-1) @ dense, y)]

    def matrices():
        for fn, shape in parts:
            point = jnp.zeros(shape.shape, shape.dtype)
            jacobian = jax.jit(jax.jacrev(fn))(point)
            yield scipy.sparse.csr_array(np.asarray(jacobian).reshape(-1, point.size))

    return lambda: list(matrices())


def _value(result):
    return np.asarray(result).reshape(result.shape[0], -1)


TABLES = (
    Table("matrix_of", "The matrix of a linear network, jitted: `matrix_of`", "", partial(_rows, True)),
    Table("matrix_of_eager", "The same outside of jit, traced at every call", "", partial(_rows, False)),
    Table("sparse_matrix_of", "The sparse matrix of a new linear network", "`as_scipy` of it", _sparse_rows),
    Table("affine_layers", "The matrices of all layers of a new network", "", _layer_rows),
)

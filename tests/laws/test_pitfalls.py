"""Right where JAX is wrong: float32 convolutions that read out of bounds, and ones that abort.

XLA on CPU (openxla/xla#48713) reads uninitialised memory when a spatial axis is cropped at its low end
and padded by no more than that at its high end, and no other axis is padded beyond it. float64 and
int32 were right. Ordinary forward geometries meet it in their gradient, once the padding is larger than
the window. Some geometries with lhs_dilation, and vmap of the transpose of a grouped convolution with
negative padding, end the whole process.

So every product here is compared with the oracle (float64, NumPy), after poisoning the memory that a
fresh allocation is likely to get, with whole numbers, which float32 represents exactly.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import rarely
from geometries import Geometry, arrays

import jaxconv_fc as fc
from jaxconv_fc.products import cpu

# the rows of the table, each in several sizes and channel counts; float32, which is where JAX fails
TABLE = {
    "k3, pad (-1,1), 2-D": [
        Geometry((1, c, h, w), (o, c, 3, 3), (1, 1), [(-1, 1), (-1, 1)])
        for c, o, h, w in ((1, 1, 6, 6), (3, 2, 5, 7), (4, 4, 8, 8))
    ],
    "k3, pad (-1,1), one axis": [
        Geometry((1, 2, 6, 6), (3, 2, 3, 3), (1, 1), [(-1, 1), (0, 0)]),
        Geometry((1, 2, 6, 6), (3, 2, 3, 3), (1, 1), [(0, 0), (-2, 1)]),
    ],
    "k2, pad (2,0), 2-D": [
        Geometry((1, c, h, w), (o, c, 2, 2), (1, 1), [(2, 0), (2, 0)])
        for c, o, h, w in ((1, 1, 4, 4), (3, 2, 5, 6), (4, 8, 6, 6))
    ],
    "k3, pad (3,1), 2-D": [
        Geometry((1, c, h, w), (o, c, 3, 3), (1, 1), [(3, 1), (3, 1)])
        for c, o, h, w in ((1, 1, 4, 4), (3, 2, 5, 6), (4, 8, 6, 6))
    ],
    "k3, pad (4,0), depthwise": [
        Geometry((1, c, h, w), (m * c, 1, 3, 3), (1, 1), [(4, 0), (4, 0)], feature_group_count=c)
        for c, m, h, w in ((4, 1, 6, 6), (3, 2, 5, 4))
    ],
    "1-D, k3, pad (5,0)": [
        Geometry((1, c, n), (o, c, 3), (1,), [(5, 0)]) for c, o, n in ((1, 1, 8), (2, 3, 12), (4, 4, 16))
    ],
    "strided and dilated": [
        Geometry((1, 2, 7, 6), (2, 2, 3, 2), (2, 1), [(-1, 1), (-2, 2)], None, (1, 2)),
        Geometry((1, 2, 5, 4), (2, 2, 2, 2), (1, 2), [(-1, 1), (3, -1)], (2, 1)),
    ],
    "NHWC": [
        Geometry(
            (1, 6, 6, 3), (3, 3, 3, 2), (1, 1), [(-1, 1), (-1, 1)], None, None, ("NHWC", "HWIO", "NHWC")
        ),
    ],
    "batch groups": [Geometry((2, 2, 6), (4, 2, 3), (1,), [(-2, 1)], batch_group_count=2)],
}
ROWS = [(name, geometry) for name, found in TABLE.items() for geometry in found]
every_row = pytest.mark.parametrize(
    "geometry", [g for _, g in ROWS], ids=[f"{name} #{i}" for i, (name, _) in enumerate(ROWS)]
)


def poison():
    """Leave NaN behind in freed buffers of many sizes: an out-of-bounds read then shows."""
    kept = [np.full(2**i, np.nan, np.float32) for i in range(4, 18) for _ in range(4)]
    jax.block_until_ready(jax.device_put(kept, may_alias=False))


def products(spec, kernel, x, y):
    """M, both products, the kernel gradient and all four gradients of the products, as one program."""
    ahead, pull_ahead = jax.vjp(partial(fc.apply, spec), kernel, x)
    back, pull_back = jax.vjp(partial(fc.apply_transpose, spec), kernel, y)
    return {
        "M": fc.as_matrix(spec, kernel),
        "apply": ahead,
        "grad of apply": pull_ahead(jnp.asarray(y)),
        "apply_transpose": back,
        "grad of apply_transpose": pull_back(jnp.asarray(x)),
        "kernel_vjp": fc.kernel_vjp(spec, x, y),
    }


def truth(geometry, kernel, x, y):
    """The same by the oracle, in float64."""
    wide = [oracle.wide(a) for a in (kernel, x, y)]
    matrix = oracle.matrix(wide[0], geometry)
    ahead = (matrix @ wide[1].ravel()).reshape(oracle.out_shape(geometry))
    back = (matrix.T @ wide[2].ravel()).reshape(oracle.in_shape(geometry))
    kernel_bar = oracle.kernel_gradient(wide[1], wide[2], geometry)
    return {
        "M": matrix,
        "apply": ahead,
        "grad of apply": (kernel_bar, back),
        "apply_transpose": back,
        "grad of apply_transpose": (kernel_bar, ahead),
        "kernel_vjp": kernel_bar,
    }


# The forms that read out of bounds are convolutions; test_products.py has the other ones.
in_convolutions = pytest.mark.parametrize(
    "cpu_form", ["convolutions", rarely("sums over taps")], indirect=True
)


@in_convolutions
@every_row
def test_equal_to_the_float64_truth(geometry, cpu_form, rng):
    check_against_truth(geometry, [np.float32], rng)


@in_convolutions
@pytest.mark.parametrize("name", TABLE)
def test_equal_in_the_other_dtypes_that_fail(name, cpu_form, rng):
    check_against_truth(TABLE[name][0], ["float16", "complex64"], rng)


def check_against_truth(geometry, dtypes, rng):
    """In these dtypes, as one program."""
    spec = geometry.spec()
    given = [arrays(geometry, rng, dtype) for dtype in dtypes]
    want = [truth(geometry, *one) for one in given]
    program = jax.jit(lambda given: [products(spec, *one) for one in given])
    for _ in range(3):
        poison()
        jax.tree.map(np.testing.assert_array_equal, program(given), want)


@in_convolutions
@pytest.mark.parametrize("name", TABLE)
def test_stacks_too(name, cpu_form, rng):
    """vmap over vectors and over kernels turns them into batched and grouped convolutions."""
    geometry = TABLE[name][-1]
    spec = geometry.spec()
    sets = [arrays(geometry, rng, np.float32) for _ in range(2)]
    wants = [truth(geometry, *one) for one in sets]
    poison()
    got = jax.jit(jax.vmap(partial(products, spec)))(*(np.stack(a) for a in zip(*sets, strict=True)))
    want = jax.tree.map(lambda *parts: np.stack(parts), *wants)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_matrix_transposed_is_the_transposed_product(cpu_form, rng):
    """M^T built column by column from apply_transpose, where the gradient of lax would be garbage."""
    geometry = TABLE["k3, pad (3,1), 2-D"][0]
    spec = geometry.spec()
    kernel, _, _ = arrays(geometry, rng, np.float32)
    basis = np.eye(spec.out_size, dtype=np.float32).reshape(spec.out_size, *spec.out_shape)
    poison()
    columns = jax.vmap(partial(fc.apply_transpose, spec, kernel))(basis)
    np.testing.assert_array_equal(
        columns.reshape(spec.out_size, spec.in_size), oracle.matrix(kernel, geometry)
    )


# geometries that end the process ---------------------------------------------------------------------

# The first four end jaxlib 0.10.2 by themselves: the convolution of lax, or (the second) its transpose.
ABORTING = {
    "lhs_dilation beside padding": Geometry((1, 1, 2, 5), (1, 1, 4, 2), (1, 1), [(1, 1), (0, 0)], (1, 2)),
    "its transpose": Geometry((1, 1, 1, 8), (1, 1, 4, 2), (1, 2), [(2, 2), (1, 1)]),
    "3-D": Geometry((1, 1, 2, 5, 1), (1, 1, 4, 2, 1), (1, 1, 1), [(1, 1), (0, 0), (0, 0)], (1, 2, 1)),
    "batch groups": Geometry((2, 1, 2, 5), (2, 1, 4, 2), (1, 1), [(1, 1), (0, 0)], (1, 2), None, None, 1, 2),
    "grouped": Geometry((1, 2, 2, 5), (2, 1, 4, 2), (1, 1), [(1, 1), (0, 0)], (1, 2), None, None, 2),
    "grouped, negative padding": Geometry(
        (1, 4, 5, 6), (4, 2, 2, 3), (1, 1), [(-1, 2), (-2, 0)], feature_group_count=2
    ),
    "depthwise, negative padding": Geometry(
        (1, 3, 9), (6, 1, 3), (2,), [(-2, -1)], None, (2,), feature_group_count=3
    ),
    "grouped, both dilated": Geometry(
        (1, 4, 4, 3), (2, 2, 2, 2), (1, 2), [(-1, 1), (-1, -1)], (2, 3), (2, 1), None, 2
    ),
}


def check_every_transform(name, eager):
    """All products of one geometry: jit, vmap, vmap of the transpose, jacrev, and outside of jit."""
    geometry = ABORTING[name]
    spec = geometry.spec()
    program = partial(products, spec)
    sets = [arrays(geometry, np.random.default_rng(seed), np.float32) for seed in range(2)]
    wants = [truth(geometry, *one) for one in sets]
    stacks = [np.stack(parts) for parts in zip(*sets, strict=True)]
    want, apply = wants[0], partial(fc.apply, spec, sets[0][0])

    @jax.jit
    def everything(kernel, x, y, stacks):
        pull = jax.vmap(lambda y: jax.linear_transpose(apply, x)(y)[0])
        return (
            program(kernel, x, y),
            jax.vmap(program)(*stacks),
            pull(stacks[2])[0],
            jax.jacrev(apply)(x).reshape(spec.shape),
        )

    stacked = jax.tree.map(lambda *parts: np.stack(parts), *wants)
    wanted = want, stacked, want["apply_transpose"], want["M"]
    jax.tree.map(np.testing.assert_array_equal, everything(*sets[0], stacks), wanted)
    if eager:
        jax.tree.map(np.testing.assert_array_equal, program(*sets[0]), want)


# With at most so many terms, products are written out as sums over taps, which do not call lax; else they are
# convolutions.
TERMS = (-1, rarely(64))


def check_all(most):
    cpu.MOST_TERMS = cpu.MOST_DOTS = most
    for name in ABORTING:
        check_every_transform(name, eager=most < 0)
        print(name, flush=True)


@pytest.mark.parametrize("most", TERMS)
def test_geometries_that_abort_jax_return(most):
    """In a process of their own, where an abort is a failed test and not a dead runner. The names of those
    that came back are its output."""
    code = f"import conftest, test_pitfalls; test_pitfalls.check_all({most})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # this process holds most of the memory of a GPU
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.splitlines() == list(ABORTING), done.stderr[-3000:]
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"

"""Programs that are exported once, with a symbolic batch, and called with batches of several sizes."""

from functools import partial

import functions
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count
from functions import TABLE
from geometries import CASES, integers
from jax import export, lax

import jaxconv_fc as fc

PLATFORMS = ("cpu", "cuda", "tpu")
SIZES = 1, 3, 16
OPTIONS = ["window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"]


def convolution(spec, kernel, x):
    """A batch through lax."""
    groups = spec.feature_group_count, spec.batch_group_count
    return lax.conv_general_dilated(x, kernel, *(getattr(spec, name) for name in OPTIONS), *groups)


def stack(spec, kernel, xs):
    return jax.vmap(partial(fc.apply, spec, kernel))(xs)


def kernel_gradient(spec, kernel, xs):
    return jax.grad(lambda k: jnp.sum(stack(spec, k, xs) ** 2))(kernel)


# Functions of (spec, kernel, a stack of inputs)
OF_A_STACK = {
    "batched_apply": fc.batched_apply,
    "batched_apply, dense": partial(fc.batched_apply, method="dense"),
    "apply": stack,
    "apply_transpose": lambda s, k, xs: jax.vmap(partial(fc.apply_transpose, s, k))(stack(s, k, xs)),
    "kernel_vjp": lambda s, k, xs: jax.vmap(partial(fc.kernel_vjp, s))(xs, stack(s, k, xs)),
    "the kernel's gradient": kernel_gradient,
    "the inputs' gradient": lambda s, k, xs: jax.grad(lambda v: jnp.sum(stack(s, k, v) ** 2))(xs),
    "fully_connected of products": lambda s, k, xs: fc.fully_connected(partial(stack, s))(k, xs),
}


@pytest.fixture
def round_trip():
    """A function exported with a symbolic first axis of its last argument, written and read back."""

    def of(fn, kernel, xs):
        (n,) = export.symbolic_shape("n")
        shapes = kernel.shape, (n, *xs.shape[1:])
        program = export.export(jax.jit(fn), platforms=PLATFORMS)(
            *(jax.ShapeDtypeStruct(shape, xs.dtype) for shape in shapes)
        )
        return export.deserialize(program.serialize()).call

    return of


def reference(geometry, kernel, xs):
    """What the functions of a stack return, from the oracle's matrix."""
    matrix = oracle.matrix(kernel, geometry)
    ys = (xs.reshape(len(xs), -1) @ matrix.T).reshape(-1, *oracle.out_shape(geometry))
    back = (ys.reshape(len(xs), -1) @ matrix).reshape(xs.shape)
    each = np.stack([oracle.kernel_gradient(x, y, geometry) for x, y in zip(xs, ys, strict=True)])
    special = {"apply_transpose": back, "kernel_vjp": each}
    special |= {"the kernel's gradient": 2 * each.sum(0), "the inputs' gradient": 2 * back}
    return dict.fromkeys(OF_A_STACK, ys) | special


def check_stack(geometry, round_trip, rng):
    spec = geometry.spec()
    kernel, xs = integers(rng, spec.rhs_shape, np.float64), integers(rng, (16, *spec.in_shape), np.float64)
    program = round_trip(lambda *v: {name: fn(spec, *v) for name, fn in OF_A_STACK.items()}, kernel, xs)
    for size in SIZES:
        got, want = program(kernel, xs[:size]), reference(geometry, kernel, xs[:size])
        for name in OF_A_STACK:
            np.testing.assert_array_equal(got[name], want[name], err_msg=f"{name}, {size} examples")


@pytest.mark.parametrize("name", ["dilated input", "reflect", "batch groups"])
def test_a_stack(name, round_trip, rng):
    check_stack(CASES[name], round_trip, rng)


def test_a_stack_in_both_forms(round_trip, cpu_form, rng):
    check_stack(CASES["NHWC"], round_trip, rng)


def test_fully_connected(round_trip, rng):
    """The batch of lax's own convolution is symbolic."""
    spec = CASES["NHWC"].spec()
    kernel, xs = integers(rng, spec.rhs_shape, np.float64), integers(rng, (16, *spec.in_shape), np.float64)
    model = partial(convolution, spec)
    program = round_trip(fc.fully_connected(model), kernel, xs)
    for size in SIZES:
        np.testing.assert_array_equal(program(kernel, xs[:size]), model(kernel, xs[:size]))


def test_find_convs():
    spec, (n,) = functions.SPEC, export.symbolic_shape("n")
    kernel = jnp.ones(spec.rhs_shape)
    batch = jax.ShapeDtypeStruct((n, *spec.in_shape), kernel.dtype)
    (site,) = fc.find_convs(partial(convolution, spec), kernel, batch)
    assert site.spec == spec
    assert site.spec.lhs_shape == (n, *spec.in_shape)
    assert "2x4 -> 2x4" in repr(site)


# All of them take minutes.
MAPPED = [name for name, row in TABLE.items() if row.jit] if count("MODES", 0) else ["spectrum.power_step"]


@pytest.mark.parametrize("name", MAPPED)
def test_a_vmap_of_every_function(name, round_trip):
    """Over a stack of kernels, inputs and outputs."""
    kernel, x, y = functions.samples()

    def of(_, scales):
        results = jax.vmap(lambda t: TABLE[name].call(functions.SPEC, kernel * t, x, y * t))(scales)
        return jax.tree.leaves(results)  # JAX cannot write sparse matrices to a file

    scales = np.linspace(1, 2, 16, dtype=np.float32)
    program = round_trip(of, kernel, scales)
    for size in SIZES[:2]:
        for ours, theirs in zip(program(kernel, scales[:size]), of(kernel, scales[:size]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)

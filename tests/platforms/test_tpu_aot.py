"""What a TPU v5e would run, compiled ahead of time without one: memory, traffic and precision.

    pytest -m tpu_aot

needs libtpu (jax[tpu]). Compiled programs do not run here, so this says nothing about values; tests/
test_selects.py does. The bounds are of XLA's own counts of bytes.
"""

import importlib.util
import math
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jaxconv_fc as fc

TOPOLOGY = "v5e:2x2"
# libtpu asks the cloud for these if they are not set.
SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
ABSENT = importlib.util.find_spec("libtpu") is None
pytestmark = [pytest.mark.tpu_aot, pytest.mark.skipif(ABSENT, reason="needs libtpu: pip install jax[tpu]")]

SPECS = {
    "plain": fc.conv_spec((1, 16, 32, 32), (16, 16, 3, 3), (1, 1), "SAME"),
    "stride 2": fc.conv_spec((1, 16, 32, 32), (32, 16, 3, 3), (2, 2), "SAME"),
    "depthwise": fc.conv_spec((1, 32, 28, 28), (32, 1, 3, 3), (1, 1), "SAME", feature_group_count=32),
    "circular": fc.conv_spec((1, 16, 16, 16), (16, 16, 3, 3), (1, 1), "SAME", padding_mode="circular"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(scope="module")
def device():
    """A device of the topology, which compiles and runs nothing."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]
    except Exception as error:
        pytest.skip(f"libtpu makes no topology {TOPOLOGY}: {error}")


@pytest.fixture
def compiled(device):
    """The program of a function of float32 arrays of these shapes, under the settings of a user."""

    def of(fn, *shapes, **options):
        sharding = SingleDeviceSharding(device)
        given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
        with jax.enable_x64(False):
            return jax.jit(fn, **options).trace(*given).lower(lowering_platforms=("tpu",)).compile()

    return of


def accessed(program):
    return program.cost_analysis()["bytes accessed"]


def nbytes(shape):
    return 4 * math.prod(shape)


@every_spec
def test_the_matrix_is_little_more_than_written(spec, compiled):
    program = compiled(partial(fc.as_matrix, spec), spec.rhs_shape)
    assert accessed(program) <= 1.7 * nbytes(spec.shape)
    assert program.memory_analysis().temp_size_in_bytes <= 0.25 * nbytes(spec.shape)


@every_spec
def test_its_transpose_is_little_more_than_reading_it(spec, compiled):
    program = compiled(partial(fc.matrix_vjp, spec), spec.shape)
    assert accessed(program) <= 5 * nbytes(spec.shape)
    assert program.memory_analysis().temp_size_in_bytes <= 0.25 * nbytes(spec.shape)


@every_spec
def test_an_update_reads_and_writes_it_once(spec, compiled):
    program = compiled(partial(fc.update_matrix, spec), spec.shape, spec.rhs_shape, donate_argnums=0)
    assert accessed(program) <= 2.5 * nbytes(spec.shape)
    assert program.memory_analysis().temp_size_in_bytes <= 0.25 * nbytes(spec.shape)
    assert program.memory_analysis().alias_size_in_bytes >= nbytes(spec.shape)


@every_spec
def test_the_kernel_matrix(spec, compiled):
    program = compiled(partial(fc.kernel_matrix, spec), spec.in_shape)
    assert accessed(program) <= 4 * nbytes((spec.out_size, math.prod(spec.rhs_shape)))


# products ---------------------------------------------------------------------------------------------


def convolution(spec, precision, kernel, x):
    """lax's own, padded first in a boundary mode."""
    pads = spec.padding
    if spec.padding_mode != "zeros":
        x, pads = jnp.pad(x, [(0, 0), *pads], mode="wrap"), "VALID"
    convolve = partial(lax.conv_general_dilated, feature_group_count=spec.groups, precision=precision)
    return convolve(x[None], kernel, spec.window_strides, pads)[0]


PRODUCTS = {  # ours, the roles of its operands, and lax's own
    "apply": (fc.apply, "kx", lambda conv, k, x, y: conv(k, x)),
    "apply_transpose": (
        fc.apply_transpose,
        "ky",
        lambda conv, k, x, y: jax.vjp(lambda x: conv(k, x), x)[1](y)[0],
    ),
    "kernel_vjp": (fc.kernel_vjp, "xy", lambda conv, k, x, y: jax.vjp(lambda k: conv(k, x), k)[1](y)[0]),
}


@pytest.mark.parametrize("product", PRODUCTS)
@every_spec
def test_products_access_no_more_than_laxs_and_keep_their_precision(spec, product, compiled):
    ours, roles, theirs = PRODUCTS[product]
    shapes = {"k": spec.rhs_shape, "x": spec.in_shape, "y": spec.out_shape}
    given = [shapes[role] for role in roles]

    def reference(a, b):
        zeros = {role: jnp.zeros(shape) for role, shape in shapes.items()}
        conv = partial(convolution, spec, "highest")
        return theirs(conv, **(zeros | dict(zip(roles, (a, b), strict=True))))

    program = compiled(partial(ours, spec, precision="highest"), *given)
    assert accessed(program) <= 1.2 * accessed(compiled(reference, *given))
    # What "highest" asks for: every convolution computes float32, and none has an operand in bfloat16.
    convolutions = re.findall(r"^.* convolution\(.*$", program.as_text(), re.MULTILINE)
    assert convolutions
    assert all("operand_precision={highest,highest}" in line for line in convolutions)
    assert "bf16" not in program.as_text()

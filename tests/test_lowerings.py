"""The products in the forms for GPU and TPU, and the programs that other platforms get.

No GPU is needed. The forms are executed on the CPU: there the tests register the very rule that lowers the
products for CUDA. The programs for CUDA, ROCm and TPU are exported, and their StableHLO is read.

XLA on CPU ends the process for some convolutions with input dilation, of which the library makes none there
(see test_pitfalls.py). Its algebraic simplifier does it, when it exchanges a kernel and a smaller input. So
the tests compile such a program without that pass. (Without it, XLA on CPU crashes for some programs in
bfloat16: these run in float16.)
"""

import json
import math
import re
from functools import partial
from typing import NamedTuple

import environment
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import Geometry, arrays, integers, normals, random_geometry
from jax import export, lax
from jax.interpreters import mlir
from jax.test_util import check_grads

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum
from jaxconv_fc import products

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
EXECUTED = environment.count("GEOMETRIES", 12)
EXPORTED = environment.count("GEOMETRIES", 6)

CASES = {
    "plain": Geometry((1, 2, 4, 3), (3, 2, 2, 2), (1, 1), "SAME"),
    "strided": Geometry((1, 1, 5, 6), (2, 1, 3, 2), (2, 3), [(1, 0), (0, 2)]),
    "dilated input": Geometry((1, 2, 4), (2, 2, 3), (2,), [(2, 1)], (3,)),
    "dilated": Geometry((1, 2, 9, 7), (2, 2, 3, 2), (1, 2), [(2, 1), (0, 0)], None, (2, 3)),
    "dilated both ways": Geometry((1, 2, 7), (2, 2, 3), (3,), [(2, 5)], (2,), (4,)),
    "cropped": Geometry((1, 2, 6, 5), (2, 2, 2, 2), (1, 2), [(-1, 1), (2, -1)], (2, 1)),
    "grouped": Geometry((1, 4, 3, 3), (6, 2, 2, 2), (1, 2), [(1, 1), (-1, 2)], None, (2, 1), None, 2),
    "batch groups": Geometry((4, 2, 4), (4, 2, 3), (1,), [(2, 0)], (2,), batch_group_count=2),
    "NHWC": Geometry((1, 4, 3, 2), (2, 2, 2, 3), (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    "circular": Geometry((1, 2, 3, 4), (2, 2, 3, 2), (1, 2), [(1, 4), (9, 0)], padding_mode="circular"),
    "reflect": Geometry((1, 2, 4), (2, 2, 3), (1,), [(9, 2)], None, (2,), padding_mode="reflect"),
    "4-D": Geometry((1, 4, 2, 3, 2, 3), (2, 2, 2, 2, 1, 2), (1, 1, 2, 1), "SAME", feature_group_count=2),
    "5-D": Geometry((1, 1, 2, 2, 3, 2, 3), (2, 1, 2, 1, 2, 2, 2), (1,) * 5, [(1, 0)] * 5, (1, 1, 1, 2, 1)),
    "no spatial axes": Geometry((1, 4), (6, 2), (), "VALID", feature_group_count=2),
    "only padding": Geometry((1, 1, 3), (2, 1, 2), (1,), [(-4, 5)]),
    "between the inputs": Geometry((1, 1, 3), (1, 1, 2), (2,), [(1, 2)], (2,), (2,)),
    "no rows": Geometry((1, 2, 3), (2, 2, 5), (1,), "VALID"),
    "no columns": Geometry((1, 2, 0), (2, 2, 2), (1,), [(2, 1)]),
}  # fmt: skip
every_case = pytest.mark.parametrize("geometry", CASES.values(), ids=CASES)
some_cases = pytest.mark.parametrize("geometry", [CASES[n] for n in ("dilated both ways", "grouped", "4-D")])


# the forms, executed on the CPU ----------------------------------------------------------------------


@pytest.fixture
def native_forms():
    """The CPU lowers the products as CUDA does."""
    jax.clear_caches()
    mlir.register_lowering(products.product_p, products.lowering(products.NATIVE), platform="cpu")
    yield
    mlir.register_lowering(products.product_p, products.lowering(products.PORTABLE), platform="cpu")
    jax.clear_caches()


def check_products(geometry, dtype, rng):
    """Whole numbers, whose products are exact unless the dtype is short; then rounding within its bound."""
    spec = geometry.spec()
    aborts = any(map(may_abort, ([a.on_padded for a in spec.axes], [a.on_padded.transpose() for a in spec.axes])))
    jit = partial(jax.jit, compiler_options={"xla_disable_hlo_passes": "algsimp"} if aborts else {})
    dtype = "float16" if aborts and dtype == "bfloat16" else dtype
    ahead, back, gradient = (jit(partial(f, spec)) for f in (fc.apply, fc.apply_transpose, fc.kernel_vjp))
    kernel, x, y = arrays(geometry, rng, dtype)
    if dtype not in ("float16", "bfloat16"):
        wide = [oracle.wide(v) for v in (kernel, x, y)]
        same_numbers(ahead(kernel, x), oracle.product(wide[1], wide[0], geometry))
        same_numbers(back(kernel, y), oracle.transpose_product(wide[2], wide[0], geometry))
        same_numbers(gradient(x, y), oracle.kernel_gradient(wide[1], wide[2], geometry))
    if dtype in FLOATS:
        kernel, x, y = arrays(geometry, rng, dtype, normals)
        oracle.assert_product(ahead(kernel, x), kernel, x, geometry)
        oracle.assert_transpose_product(back(kernel, y), kernel, y, geometry)
        oracle.assert_kernel_gradient(gradient(x, y), x, y, geometry)


def may_abort(axes):
    """Whether XLA on CPU may end the process: a dilated input, smaller than the kernel."""
    read = math.prod(len(axis.rows(0, axis.out_size)[1]) for axis in axes)
    return math.prod(axis.taps for axis in axes) > read and any(axis.lhs_dilation > 1 for axis in axes)


def same_numbers(got, want):
    """Equal, modulo 2**bits for integers."""
    np.testing.assert_array_equal(got, want.astype(got.dtype))


@every_case
def test_native_products_are_the_oracles(geometry, native_forms, rng):
    check_products(geometry, "float32", rng)


@pytest.mark.parametrize("dtype", [*FLOATS, "int8", "uint64"])
@some_cases
def test_native_products_of_every_dtype(geometry, dtype, native_forms, rng):
    check_products(geometry, dtype, rng)


@pytest.mark.parametrize("number", range(EXECUTED))
def test_native_products_of_random_geometries(number, native_forms, run_seed):
    rng = np.random.default_rng([run_seed, number])
    check_products(random_geometry(rng), (*FLOATS, *INTEGERS)[number % 14], rng)


@pytest.mark.parametrize("batched", ["k", "x", "y", "kx", "ky", "xy", "kxy"])
@some_cases
def test_native_products_batched(geometry, batched, native_forms, rng):
    """Every combination of batched operands: the kernel, the input and the output, alone and together."""
    spec, count = geometry.spec(), 3
    one = dict(zip("kxy", arrays(geometry, rng, np.float32), strict=True))
    many = {role: np.stack([arrays(geometry, rng, np.float32)[i] for _ in range(count)])
            for i, role in enumerate("kxy")}  # fmt: skip
    given = {role: many[role] if role in batched else one[role] for role in "kxy"}
    for fn, roles, truth in (
        (fc.apply, "kx", lambda k, x: oracle.product(x, k, geometry)),
        (fc.apply_transpose, "ky", lambda k, y: oracle.transpose_product(y, k, geometry)),
        (fc.kernel_vjp, "xy", lambda x, y: oracle.kernel_gradient(x, y, geometry)),
    ):
        if not set(roles) & set(batched):
            continue
        axes = tuple(0 if role in batched else None for role in roles)
        got = jax.jit(jax.vmap(partial(fn, spec), axes))(*(given[role] for role in roles))
        want = [truth(*(given[r][j] if r in batched else given[r] for r in roles)) for j in range(count)]
        np.testing.assert_array_equal(got, want)


@some_cases
def test_native_products_differentiate_twice(geometry, native_forms, rng):
    spec = geometry.spec()
    kernel, x, y = arrays(geometry, rng, float, normals)
    for fn, operands in ((fc.apply, (kernel, x)), (fc.apply_transpose, (kernel, y)), (fc.kernel_vjp, (x, y))):
        check_grads(jax.jit(partial(fn, spec)), operands, order=2, modes=["fwd", "rev"])


@some_cases
def test_the_gradient_of_an_operand_that_a_batch_shares(geometry, native_forms, rng):
    """Its batch axis is summed over: many kernels on one input, and one kernel on many inputs."""
    spec = geometry.spec()
    kernels, xs, ys = (np.stack(v) for v in zip(*(arrays(geometry, rng, float) for _ in range(3)), strict=True))

    def of_x(x):
        return (jax.vmap(lambda kernel: fc.apply(spec, kernel, x))(kernels) * ys).sum()

    def of_kernel(kernel):
        return (jax.vmap(lambda x: fc.apply(spec, kernel, x))(xs) * ys).sum()

    want = sum(oracle.transpose_product(y, kernel, geometry) for kernel, y in zip(kernels, ys, strict=True))
    np.testing.assert_array_equal(jax.jit(jax.grad(of_x))(xs[0]), want)
    want = sum(oracle.kernel_gradient(x, y, geometry) for x, y in zip(xs, ys, strict=True))
    np.testing.assert_array_equal(jax.jit(jax.grad(of_kernel))(kernels[0]), want)


# programs --------------------------------------------------------------------------------------------


class Convolution(NamedTuple):
    """One convolution of a StableHLO program, without its dimension numbers."""

    stride: tuple  # per spatial axis, as the four fields that follow
    pad: tuple  # (low, high)
    lhs_dilate: tuple
    rhs_dilate: tuple
    reverse: tuple
    feature_groups: int
    batch_groups: int
    dtype: str


_CONVOLUTION = re.compile(
    r"stablehlo\.convolution\(.*window = \{(.*?)\} \{batch_group_count = (\d+) : i64, "
    r"feature_group_count = (\d+) : i64.* : \(tensor<(?:\d+x)*([^>]*?)>?>,"
)


def convolutions(text):
    """Every convolution, in the order of the text."""
    found = [_convolution(*match.groups()) for match in _CONVOLUTION.finditer(text)]
    assert len(found) == text.count("stablehlo.convolution")
    return found


def _convolution(window, batch_groups, feature_groups, dtype):
    fields = json.loads("{" + re.sub(r"(\w+) = ", r'"\1": ', window) + "}")
    listed = [_tuples(fields.get(name, ())) for name in Convolution._fields[:5]]
    return Convolution(*listed, int(feature_groups), int(batch_groups), dtype)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def program(fn, operands, platforms=("cuda",)):
    return export.export(jax.jit(fn), platforms=platforms)(*operands).mlir_module()


@pytest.mark.parametrize("fn", [fc.apply, fc.apply_transpose, fc.kernel_vjp])
@every_case
def test_what_the_cpu_executes_above_is_what_cuda_gets(geometry, fn, native_forms, rng):
    """The same program, not only the same numbers."""
    kernel, x, y = arrays(geometry, rng, np.float32)
    operands = {"apply": (kernel, x), "apply_transpose": (kernel, y), "kernel_vjp": (x, y)}[fn.__name__]
    here, cuda = (program(partial(fn, geometry.spec()), operands, (name,)) for name in ("cpu", "cuda"))
    assert here.replace("cpu", "cuda") == cuda

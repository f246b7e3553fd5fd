"""The products in the forms for GPU and TPU, and the programs that other platforms get.

No GPU is needed. The forms are executed on the CPU, which gets the GPU's entry in the table of platforms. The
programs for CUDA, ROCm and TPU are exported, and their StableHLO is read.
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

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum
from jaxconv_fc.products.platforms import PLATFORMS

NAMES = ("cpu", "cuda", "rocm", "tpu")
FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
EXECUTED = environment.numbers(environment.count("GEOMETRIES", 4), 24)
EXPORTED = environment.numbers(environment.count("GEOMETRIES", 1), 8)

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
    "taken for groups": Geometry((1, 1, 2, 5), (1, 1, 4, 2), (1, 1), [(1, 1), (0, 0)], (1, 2)),
    "its transpose": Geometry((1, 1, 1, 8), (1, 1, 4, 2), (1, 2), [(2, 2), (1, 1)]),
    "no rows": Geometry((1, 2, 3), (2, 2, 5), (1,), "VALID"),
    "no columns": Geometry((1, 2, 0), (2, 2, 2), (1,), [(2, 1)]),
}  # fmt: skip
every_case = pytest.mark.parametrize("geometry", CASES.values(), ids=CASES)
SOME = {name: CASES[name] for name in ("grouped", "4-D")}
some_cases = pytest.mark.parametrize("geometry", SOME.values(), ids=SOME)


# the forms, executed on the CPU ----------------------------------------------------------------------


@pytest.fixture
def gpu_forms(monkeypatch):
    """The CPU does what a GPU does."""
    jax.clear_caches()
    monkeypatch.setitem(PLATFORMS, "cpu", PLATFORMS["gpu"])
    with jax.default_device(jax.devices("cpu")[0]):
        yield
    jax.clear_caches()


def check_products(geometry, dtypes, rng):
    """Whole numbers, whose products are exact unless the dtype is short; then rounding within its bound."""
    spec = geometry.spec()
    products = jax.jit(lambda given: [three_products(spec, *one) for one in given])
    given = [arrays(geometry, rng, dtype) for dtype in dtypes]
    for (kernel, x, y), (ahead, back, gradient), dtype in zip(given, products(given), dtypes, strict=True):
        if dtype not in ("float16", "bfloat16"):
            wide = [oracle.wide(v) for v in (kernel, x, y)]
            same_numbers(ahead, oracle.product(wide[1], wide[0], geometry))
            same_numbers(back, oracle.transpose_product(wide[2], wide[0], geometry))
            same_numbers(gradient, oracle.kernel_gradient(wide[1], wide[2], geometry))
    given = [arrays(geometry, rng, dtype, normals if dtype in FLOATS else integers) for dtype in dtypes]
    for (kernel, x, y), (ahead, back, gradient), dtype in zip(given, products(given), dtypes, strict=True):
        if dtype in FLOATS:
            oracle.assert_product(ahead, kernel, x, geometry)
            oracle.assert_transpose_product(back, kernel, y, geometry)
            oracle.assert_kernel_gradient(gradient, x, y, geometry)


def same_numbers(got, want):
    """Equal, modulo 2**bits for integers."""
    np.testing.assert_array_equal(got, want.astype(got.dtype))


@every_case
def test_gpu_products_are_the_oracles(geometry, gpu_forms, rng):
    check_products(geometry, ["float32"], rng)


def test_gpu_products_of_every_dtype(gpu_forms, rng):
    check_products(CASES["dilated both ways"], [*FLOATS, "int8", "uint64"], rng)


@pytest.mark.parametrize("number", EXECUTED)
def test_gpu_products_of_random_geometries(number, gpu_forms, run_seed):
    rng = np.random.default_rng([run_seed, number])
    check_products(random_geometry(rng), [(*FLOATS, *INTEGERS)[number % 14]], rng)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_product_in_double_precision_is_kept_apart_from_a_factor(dtype):
    """XLA on a GPU would take the factor into the convolution, and round it to float32."""
    spec = CASES["plain"].spec()
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (spec.rhs_shape, spec.in_shape)]
    text = program(partial(fc.apply, spec), shapes)
    assert ("optimization_barrier" in text) == (dtype == "float64")


def test_gpu_products_batched(gpu_forms, rng):
    """Either operand of a product is batched, or both."""
    geometry, count = CASES["grouped"], 3
    spec = geometry.spec()
    one = dict(zip("kxy", arrays(geometry, rng, np.float32), strict=True))
    many = {role: np.stack([arrays(geometry, rng, np.float32)[i] for _ in range(count)])
            for i, role in enumerate("kxy")}  # fmt: skip
    products = {
        "kx": (fc.apply, lambda k, x: oracle.product(x, k, geometry)),
        "ky": (fc.apply_transpose, lambda k, y: oracle.transpose_product(y, k, geometry)),
        "xy": (fc.kernel_vjp, lambda x, y: oracle.kernel_gradient(x, y, geometry)),
    }
    choices = [(roles, axes) for roles in products for axes in ((0, None), (None, 0), (0, 0))]

    @jax.jit
    def mapped(one, many):
        def operands(roles, axes):
            return [(one if axis is None else many)[role] for role, axis in zip(roles, axes, strict=True)]

        return [jax.vmap(partial(products[r][0], spec), axes)(*operands(r, axes)) for r, axes in choices]

    for (roles, axes), got in zip(choices, mapped(one, many), strict=True):
        want = [
            products[roles][1](
                *(one[r] if a is None else many[r][j] for r, a in zip(roles, axes, strict=True))
            )
            for j in range(count)
        ]
        np.testing.assert_array_equal(got, want, err_msg=f"{roles} {axes}")


@some_cases
def test_gpu_products_differentiate_twice(geometry, gpu_forms, rng):
    """The derivatives of <y, M(K) x> by any two operands are products of the third with their directions."""
    spec = geometry.spec()
    kernel, x, y = arrays(geometry, rng, float)
    d_kernel, d_x, d_y = arrays(geometry, rng, float)

    def slope(kernel, x, y):
        bars = jax.grad(lambda *k_x_y: (fc.apply(spec, *k_x_y[:2]) * k_x_y[2]).sum(), (0, 1, 2))(kernel, x, y)
        return sum((bar * d).sum() for bar, d in zip(bars, (d_kernel, d_x, d_y), strict=True))

    got = jax.jit(jax.grad(slope, (0, 1, 2)))(kernel, x, y)
    gradient, back, ahead = oracle.kernel_gradient, oracle.transpose_product, oracle.product
    want = (
        gradient(d_x, y, geometry) + gradient(x, d_y, geometry),
        back(y, d_kernel, geometry) + back(d_y, kernel, geometry),
        ahead(x, d_kernel, geometry) + ahead(d_x, kernel, geometry),
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


@some_cases
def test_the_gradient_of_an_operand_that_a_batch_shares(geometry, gpu_forms, rng):
    """Its batch axis is summed over: many kernels on one input, and one kernel on many inputs."""
    spec = geometry.spec()
    kernels, xs, ys = (
        np.stack(v) for v in zip(*(arrays(geometry, rng, float) for _ in range(3)), strict=True)
    )

    def of_x(x):
        return (jax.vmap(lambda kernel: fc.apply(spec, kernel, x))(kernels) * ys).sum()

    def of_kernel(kernel):
        return (jax.vmap(lambda x: fc.apply(spec, kernel, x))(xs) * ys).sum()

    want = sum(oracle.transpose_product(y, kernel, geometry) for kernel, y in zip(kernels, ys, strict=True))
    to_x, to_kernel = jax.jit(lambda x, kernel: (jax.grad(of_x)(x), jax.grad(of_kernel)(kernel)))(
        xs[0], kernels[0]
    )
    np.testing.assert_array_equal(to_x, want)
    want = sum(oracle.kernel_gradient(x, y, geometry) for x, y in zip(xs, ys, strict=True))
    np.testing.assert_array_equal(to_kernel, want)


@pytest.mark.parametrize("name", ["dilated", "4-D"])
def test_gpu_products_inside_shard_map(name, gpu_forms, rng):
    """Arrays of indices and zeros, which the forms make, vary over no device; the operands do."""
    geometry = CASES[name]
    kernel, x, y = arrays(geometry, rng, float)

    def gradients(kernel, xs, ys):
        loss = lambda kernel, xs: (jax.vmap(partial(fc.apply, geometry.spec(), kernel))(xs) * ys).sum()  # noqa: E731
        return jax.grad(loss, (0, 1))(kernel, xs)

    mesh = jax.make_mesh(
        (1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:1]
    )
    dealt = jax.P("d")
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=(jax.P(), dealt, dealt), out_specs=(jax.P(), dealt))
    of_kernel, of_xs = jax.jit(mapped)(kernel, x[None], y[None])
    np.testing.assert_array_equal(of_kernel, oracle.kernel_gradient(x, y, geometry))
    np.testing.assert_array_equal(of_xs[0], oracle.transpose_product(y, kernel, geometry))


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
    r"feature_group_count = (\d+) : i64.* : \(tensor<((?:\d+x)*)(.*?)>,"
)


def convolutions(text):
    """Every convolution, in the order of the text."""
    found = [_convolution(*match.groups()) for match in _CONVOLUTION.finditer(text)]
    assert len(found) == text.count("stablehlo.convolution(")
    return found


def _convolution(window, batch_groups, feature_groups, sizes, dtype):
    """The text leaves out what is usual: steps of 1, and no padding."""
    given = json.loads("{" + re.sub(r"(\w+) = ", r'"\1": ', window) + "}")
    rank = sizes.count("x") - 2
    usual = dict.fromkeys(("stride", "lhs_dilate", "rhs_dilate"), [1] * rank)
    usual |= {"pad": [(0, 0)] * rank, "reverse": [False] * rank}
    listed = [_tuples((usual | given)[name]) for name in Convolution._fields[:5]]
    return Convolution(*listed, int(feature_groups), int(batch_groups), dtype)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def program(fn, operands, platform="cuda"):
    return jax.jit(fn).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def three_products(spec, kernel, x, y):
    return fc.apply(spec, kernel, x), fc.apply_transpose(spec, kernel, y), fc.kernel_vjp(spec, x, y)


@some_cases
def test_what_the_cpu_executes_above_is_what_cuda_gets(geometry, gpu_forms, rng):
    """The same program, not only the same numbers."""
    fn, operands = partial(three_products, geometry.spec()), arrays(geometry, rng, np.float32)
    here, cuda = (_without_names(program(fn, operands, name)) for name in ("cpu", "cuda"))
    assert here == cuda


def _without_names(text):
    """A program without the places in the source and without the name of the platform."""
    return re.sub(r"#loc.*|loc\(.*|_platforms = .*", "", text)


def of_lax(fn, kernel, x):
    """The gradients that JAX derives from lax's convolution."""

    def pulled(kernel, x, y):
        return jax.vjp(fn, kernel, x)[1](y)

    y = np.zeros(jax.eval_shape(fn, kernel, x).shape, kernel.dtype)
    to_kernel = program(lambda x, y: pulled(kernel, x, y)[0], (x, y))
    to_x = program(lambda kernel, y: pulled(kernel, x, y)[1], (kernel, y))
    return convolutions(program(fn, (kernel, x))), convolutions(to_x), convolutions(to_kernel)


LIKE_LAX = {  # with the products that lax makes as well as anybody: "y" M x, "x" M^T y, "k" X^T y
    "stride 2": ("yxk", Geometry((1, 4, 8, 8), (6, 4, 3, 3), (2, 2), "SAME")),
    "stride 2, 7x7": ("yxk", Geometry((1, 3, 16, 16), (4, 3, 7, 7), (2, 2), [(3, 3), (3, 3)])),
    "depthwise": ("yxk", Geometry((1, 8, 6, 6), (8, 1, 3, 3), (1, 1), "SAME", None, None, None, 8)),
    "32 groups": ("yxk", Geometry((1, 64, 6, 6), (64, 2, 3, 3), (1, 1), "SAME", None, None, None, 32)),
    "strided groups": ("yxk", Geometry((1, 8, 8), (16, 2, 3), (2,), "SAME", None, None, None, 4)),
    "dilated input": ("yx", Geometry((1, 4, 6, 6), (4, 4, 3, 3), (1, 1), [(2, 2), (1, 2)], (2, 2))),
    "dilated": ("yx", Geometry((1, 4, 8, 8), (4, 4, 3, 3), (1, 1), "SAME", None, (2, 2))),
    "3-D": ("yxk", Geometry((1, 2, 4, 4, 4), (2, 2, 3, 3, 3), (2, 1, 1), "SAME")),
}


@pytest.mark.parametrize(("roles", "geometry"), LIKE_LAX.values(), ids=LIKE_LAX)
def test_cuda_gets_the_convolutions_that_lax_derives(roles, geometry, rng):
    """Strides, padding, dilations and groups; only the numbers of the dimensions may differ."""
    spec = geometry.spec()
    kernel, x, y = arrays(geometry, rng, np.float32)
    arguments = [geometry.window_strides, oracle.pads(geometry), *geometry.arguments()[2:4], None]

    def convolve(kernel, batch):
        return lax.conv_general_dilated(batch, kernel, *arguments, geometry.feature_group_count)

    ours = {
        "y": program(partial(fc.apply, spec), (kernel, x)),
        "x": program(partial(fc.apply_transpose, spec), (kernel, y)),
        "k": program(partial(fc.kernel_vjp, spec), (x, y)),
    }
    laxs = dict(zip("yxk", of_lax(convolve, kernel, x[None]), strict=True))
    for role in roles:
        assert len(laxs[role]) == 1
        assert convolutions(ours[role]) == laxs[role]


def test_split_kernel_gradients_are_plain_convolutions(rng):
    """Of a dilated convolution and of an input-dilated one: no stride and no input dilation are left."""
    for geometry in (LIKE_LAX["dilated"][1], LIKE_LAX["dilated input"][1], CASES["dilated both ways"]):
        _, x, y = arrays(geometry, rng, np.float32)
        found = convolutions(program(partial(fc.kernel_vjp, geometry.spec()), (x, y)))
        assert found
        assert all({*c.stride, *c.lhs_dilate} == {1} for c in found)


@pytest.mark.parametrize("verb", ["apply_transpose", "kernel_vjp"])
def test_a_program_for_several_platforms_has_the_branch_of_each(verb, rng):
    """Its first `case` gives each platform the number of a branch; the second `case` has the branches."""
    geometry = CASES["dilated both ways"]
    kernel, x, y = arrays(geometry, rng, np.float32)
    fn, operands = partial(getattr(fc, verb), geometry.spec()), (x if verb == "kernel_vjp" else kernel, y)
    alone = {platform: convolutions(program(fn, operands, platform)) for platform in NAMES}
    assert alone["cuda"] == alone["rocm"] == alone["tpu"] != alone["cpu"]

    text = export.export(jax.jit(fn), platforms=NAMES)(*operands).mlir_module()
    constants, *cases = text.split('"stablehlo.case"')
    number_of = dict(re.findall(r"(%\w+) = stablehlo.constant dense<(\d+)> : tensor<i32>", constants))
    numbers, branches = (case.split("}, {") for case in cases)
    for platform, number in zip(NAMES, numbers, strict=True):
        branch = branches[int(number_of[re.search(r"return (%\w+)", number).group(1)])]
        assert convolutions(branch) == alone[platform]


# every public function, as CUDA gets it --------------------------------------------------------------

ROWS = np.array([0, -1])
# Functions of (spec, kernel, x, y, matrix). The second table is for floats and complex numbers.
FUNCTIONS = {
    "apply": lambda s, k, x, y, m: fc.apply(s, k, x),
    "apply_transpose": lambda s, k, x, y, m: fc.apply_transpose(s, k, y),
    "kernel_vjp": lambda s, k, x, y, m: fc.kernel_vjp(s, x, y),
    "batched_apply": lambda s, k, x, y, m: fc.batched_apply(s, k, jnp.stack([x, x])),
    "as_matrix": lambda s, k, x, y, m: fc.as_matrix(s, k),
    "as_affine": lambda s, k, x, y, m: fc.as_affine(s, k, y),
    "matrix_rows": lambda s, k, x, y, m: fc.matrix_rows(s, k, ROWS),
    "matrix_columns": lambda s, k, x, y, m: fc.matrix_columns(s, k, ROWS),
    "update_matrix": lambda s, k, x, y, m: fc.update_matrix(s, m, k),
    "kernel_matrix": lambda s, k, x, y, m: fc.kernel_matrix(s, x),
    "matrix_vjp": lambda s, k, x, y, m: fc.matrix_vjp(s, m),
    "as_bcoo": lambda s, k, x, y, m: fc.as_bcoo(s, k).data,
    "as_bcsr": lambda s, k, x, y, m: fc.as_bcsr(s, k).data,
    "diagonals": lambda s, k, x, y, m: fc.diagonals(s, k),
    "trace": lambda s, k, x, y, m: spectrum.trace(s, k),
    "one_norm": lambda s, k, x, y, m: spectrum.one_norm(s, k),
    "inf_norm": lambda s, k, x, y, m: spectrum.inf_norm(s, k),
}
OF_FLOATS = {
    "kernel_from_matrix": lambda s, k, x, y, m: fc.kernel_from_matrix(s, m),
    "conv_distance": lambda s, k, x, y, m: fc.conv_distance(s, m),
    "frobenius_norm": lambda s, k, x, y, m: spectrum.frobenius_norm(s, k),
    "row_norms": lambda s, k, x, y, m: spectrum.row_norms(s, k),
    "column_norms": lambda s, k, x, y, m: spectrum.column_norms(s, k),
    "orthogonality_residual": lambda s, k, x, y, m: spectrum.orthogonality_residual(s, k),
    "power_step": lambda s, k, x, y, m: spectrum.power_step(
        s, k, spectrum.start_vector(s, k.dtype, jax.random.key(0))
    ),
    "singular_values": lambda s, k, x, y, m: spectrum.singular_values(s, k),
    "condition_number": lambda s, k, x, y, m: spectrum.condition_number(s, k),
    "top_singular_values": lambda s, k, x, y, m: spectrum.top_singular_values(s, k, 1),
    "singular_triplet": lambda s, k, x, y, m: spectrum.singular_triplet(s, k),
    "pseudo_inverse": lambda s, k, x, y, m: spectrum.pseudo_inverse(s, k, y),
    "lstsq": lambda s, k, x, y, m: spectrum.lstsq(s, k, y),
    "spectral_norm": lambda s, k, x, y, m: spectrum.spectral_norm(s, k),
    "spectral_norm_bounds": lambda s, k, x, y, m: spectrum.spectral_norm_bounds(s, k),
}

# singular_triplet has no reverse derivative; that of lstsq is lowered for this machine only (lineax).
WITHOUT_VJP = {"singular_triplet", "lstsq"}


def vjp_of(fn):
    """All gradients of a function, cotangents all ones."""

    def pulled(spec, *operands):
        value, pull = jax.vjp(partial(fn, spec), *operands)
        return pull(jax.tree.map(jnp.ones_like, value))

    return pulled


_SCATTER = re.compile(
    r'"stablehlo\.scatter"[^\n]*?<\{(.*?)\}> \(\{.*?\}\) : \(tensor<\S*>, tensor<\S*>, tensor<(\S*)>\)',
    re.DOTALL,
)


def faults(text, unique):
    """What a GPU cannot run, and what it runs badly."""
    found = []
    for c in convolutions(text):
        if len(c.stride) > 3:
            found.append(f"more than 3 spatial axes: {c}")
        if not re.fullmatch(r"f\d+|bf16", c.dtype):
            found.append(f"a convolution of {c.dtype}")
        if any(amount < 0 for pair in c.pad for amount in pair):
            found.append(f"negative padding: {c}")
    scatters = _SCATTER.findall(text)
    assert len(scatters) == text.count('"stablehlo.scatter"')
    for attributes, updates in scatters:
        entries = (
            "update_window_dims = [" not in attributes
            and math.prod(map(int, re.findall(r"\d+(?=x)", updates))) > 1
        )
        if unique and entries and "unique_indices = true" not in attributes:
            found.append(f"a scatter of entries without unique_indices: {attributes}")
    return found


@every_case
def test_cuda_can_run_the_products(geometry, rng):
    spec, operands = geometry.spec(), [arrays(geometry, rng, dtype) for dtype in ("complex64", "int32")]

    def of_both(*operands):
        return [three_products(spec, *three) for three in operands]

    assert not faults(program(of_both, operands), spec.pads_with_zeros)


@pytest.mark.parametrize("number", EXPORTED)
def test_cuda_can_run_every_public_function(number, run_seed):
    """Every function on every third geometry, and in every run a third of the functions."""
    rng, number = np.random.default_rng([run_seed, number]), number + run_seed
    geometry = random_geometry(rng)
    while not all(geometry.spec().shape):
        geometry = random_geometry(rng)
    dtype = (*FLOATS, *INTEGERS)[number % 14]
    spec = geometry.spec()
    operands = (*arrays(geometry, rng, dtype), integers(rng, spec.shape, dtype))
    functions = dict(FUNCTIONS)
    if dtype in FLOATS:
        functions |= OF_FLOATS
        functions |= {f"vjp of {n}": vjp_of(functions[n]) for n in functions.keys() - WITHOUT_VJP}
    for name, fn in sorted(functions.items())[number % 3 :: 3]:
        unique = spec.pads_with_zeros and name in FUNCTIONS | OF_FLOATS  # the vjp of a gather may add up
        assert not faults(program(partial(fn, spec), operands), unique), name

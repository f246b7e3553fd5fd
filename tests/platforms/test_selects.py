"""The forms that a TPU runs, executed here: equal to those of other platforms, and without scatter."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import count, numbers, rarely
from geometries import CASES, Geometry, integers, random_geometry
from jax import export
from jax.sharding import AxisType, PartitionSpec

import jaxconv_fc as fc
from jaxconv_fc.matrix import dense, scatter, selects
from jaxconv_fc.products import adjoint
from jaxconv_fc.sharding import Bound, PlatformForms, by_platform, platform_forms, program

NUMBERS = numbers(count("GEOMETRIES", 5), 19)
DTYPES = ("float32", "int64", "bool", "complex64", "bfloat16", "uint8", "float64", "int16")
MANY_TAPS = Geometry((1, 1, 4, 5), (2, 1, 3, 11), (1, 1), "SAME")  # two steps


def forms(spec):
    """By name: the form of a TPU, and that of other platforms."""
    return {
        "matrix": (partial(selects.matrix, spec), partial(scatter.matrix, spec)),
        "update": (partial(selects.updated, spec), partial(scatter.updated, spec)),
        "sums": (partial(selects.sums, spec), partial(scatter.sums, spec, dense._itself)),
        "patches": (partial(selects.kernel_matrix, spec), partial(scatter.kernel_matrix, spec)),
    }


def operands(geometry, rng, dtype, name):
    """Whole numbers."""
    spec = geometry.spec()
    kernel = integers(rng, spec.rhs_shape, dtype)
    if name == "patches":
        return (integers(rng, spec.in_shape, dtype),)
    matrix = integers(rng, spec.shape, dtype)
    return {"update": (matrix, kernel), "sums": (matrix,)}.get(name, (kernel,))


def differentiated(form, args):
    """The value, and the cotangents of operands that have derivatives, unless their sums are rounded."""
    if args[0].dtype == jnp.bfloat16 or not jnp.issubdtype(args[0].dtype, jnp.inexact):
        return form(*args), ()
    value, pull = jax.vjp(form, *args)
    return value, pull(value)


def check(geometry, rng, dtype, replay, change=lambda v: v):
    """Both forms and their transposes, all in one program."""
    spec = geometry.spec()
    if not spec.nse:
        return
    pairs = forms(spec)
    if dtype == "bfloat16":
        del pairs["sums"]  # which holds whole numbers up to 256
    args = {name: tuple(map(change, operands(geometry, rng, dtype, name))) for name in pairs}

    @jax.jit
    def both(args):
        return {name: [differentiated(form, args[name]) for form in pair] for name, pair in pairs.items()}

    for name, (got, want) in both(args).items():
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), (name, replay)
            np.testing.assert_array_equal(a, b, err_msg=f"{name}: {replay}")


@pytest.mark.parametrize("number", NUMBERS)
def test_random_geometries(number, run_seed):
    """Every dtype in turn: equal, not close."""
    rng = np.random.default_rng([run_seed, number, 16])
    geometry, dtype = random_geometry(rng), DTYPES[(run_seed + number) % len(DTYPES)]
    check(geometry, rng, dtype, f"JAXCONV_FC_SEED={run_seed}, number {number}, {dtype}: {geometry}")


@pytest.mark.parametrize("name", ["strided, dilated, lopsided", "grouped", "colliding"])
def test_values_that_are_not_finite(name, rng):
    """They fill their own entries only; where taps meet, Inf - Inf is NaN in both forms."""

    def spoiled(v):
        if v.dtype.kind == "f":
            v.ravel()[rng.integers(0, v.size, 3)] = np.inf, np.nan, -np.inf
        return v

    check(CASES[name], rng, "float32", name, spoiled)


def test_many_taps(rng):
    """More than one step takes, or an update tap by tap."""
    assert np.prod(MANY_TAPS.rhs_shape) > selects._MOST_TAPS
    check(MANY_TAPS, rng, "float32", "two axes")
    check(Geometry((1, 1, 9), (1, 1, 35), (1,), "SAME", padding_mode="circular"), rng, "int64", "one axis")


# the choice between them ------------------------------------------------------------------------------

FORM = platform_forms(lambda v, w: v + v * w, lambda v, w: v * (1 + w))


@program
def scaled(v, w):
    return by_platform(FORM, v, v, w)


def by_tpu_form(monkeypatch):
    """Every platform runs the form of a TPU."""

    def by_tpu(form, *operands, **options):
        return by_platform(PlatformForms(*[form.tpu] * 3), *operands, **options)

    for module in (dense, adjoint):
        monkeypatch.setattr(module, "by_platform", by_tpu)
    jax.clear_caches()


@pytest.mark.parametrize("name", ["reflect", rarely("no spatial axes")])
def test_transformations_of_the_form_of_a_tpu(name, rng, monkeypatch):
    """jit, vmap, both modes of differentiation, their product, and linear_transpose."""
    spec = CASES[name].spec()
    kernels = jnp.asarray(integers(rng, (2, *spec.rhs_shape), np.float64))
    matrices = jnp.asarray(integers(rng, (2, *spec.shape), np.float64))

    def square(kernel):
        return (fc.update_matrix(spec, matrices[0], kernel) ** 2).sum()

    def results():
        return [
            jax.jit(jax.vmap(partial(fc.update_matrix, spec)))(matrices, kernels),
            jax.jvp(jax.grad(square), (kernels[0],), (kernels[1],)),
            jax.linear_transpose(partial(fc.as_matrix, spec), kernels[0])(matrices[0]),
        ]

    want = jax.tree.leaves(results())
    by_tpu_form(monkeypatch)
    for a, b in zip(jax.tree.leaves(results()), want, strict=True):
        np.testing.assert_array_equal(a, b)
    jax.clear_caches()


@pytest.mark.parametrize("check_vma", [True, rarely(False)])
def test_inside_shard_map(check_vma, rng):
    """The kernel varies over the mesh, the matrix does not."""
    mesh, spec = jax.make_mesh((1,), ("d",), (AxisType.Auto,)), CASES["plain"].spec()
    kernels = jnp.asarray(integers(rng, (1, *spec.rhs_shape), np.float32))
    matrix = jnp.asarray(integers(rng, spec.shape, np.float32))

    def gradients(kernels, matrix):
        def loss(kernel, matrix):
            built, updated = fc.as_matrix(spec, kernel), fc.update_matrix(spec, matrix, kernel)
            return (built**3).sum() + (updated**2).sum()

        of_kernel, of_matrix = jax.grad(loss, (0, 1))(kernels[0], matrix)
        return of_kernel[None], of_matrix[None]

    specs = PartitionSpec("d"), PartitionSpec()
    everywhere = jax.shard_map(
        gradients, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("d"), check_vma=check_vma
    )
    for got, want in zip(everywhere(kernels, matrix), gradients(kernels, matrix), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_platform_lowers_its_own_form_only():
    v, w = jnp.float32(3), jnp.float32(2)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        text = jax.jit(scaled).trace(v, w).lower(lowering_platforms=(platform,)).as_text()
        product_first = text.index("stablehlo.multiply") < text.index("stablehlo.add")
        assert product_first == (platform != "tpu")
    assert float(scaled(v, w)) == 9
    assert jax.grad(scaled)(v, w) == 3
    assert jax.grad(scaled, 1)(v, w) == 3
    assert float(export.export(jax.jit(scaled), platforms=("cpu", "cuda", "tpu"))(v, w).call(v, w)) == 9


def test_a_form_with_two_results_is_differentiated_in_every_operand():
    """It is linear in v and not in w. To second order, forward over reverse, under vmap."""

    def plain(v, w):
        return v * w**2, jnp.sin(w) * v

    form = platform_forms(plain, plain)
    both = program(lambda v, w: by_platform(form, (v, v), v, w))
    for fn in (lambda f: f, jax.jacrev, lambda f: jax.jacfwd(jax.jacrev(f, (0, 1)), (0, 1))):
        got, want = (jax.vmap(fn(of))(jnp.arange(3.0), jnp.ones(3)) for of in (both, plain))
        jax.tree.map(np.testing.assert_allclose, got, want)


@pytest.mark.parametrize(("platform", "factor"), [("cpu", 2), ("cuda", 5), ("rocm", 5), ("tpu", 3)])
def test_each_platform_has_its_form(platform, factor):
    """And a transpose of its own, where one is given."""
    back = Bound(platform_forms, (lambda y: y * 7, lambda y: y * 7))
    form = platform_forms(lambda v: v * 2, lambda v: v * 3, gpu=lambda v: v * 5, transposed=back)
    scale = program(lambda v: by_platform(form, v, v))
    v = jax.ShapeDtypeStruct((2,), np.float32)

    def factors(fn):
        text = export.export(jax.jit(fn), platforms=[platform])(v).mlir_module()
        return {f for f in (2, 3, 5, 7) if f"dense<{f:.6e}>" in text}

    assert factors(scale) == {factor}
    assert factors(lambda y: jax.linear_transpose(scale, v)(y)[0]) == {7}


# what a TPU gets -------------------------------------------------------------------------------------

BUILDERS = {
    "as_matrix": lambda spec, kernel, x, matrix: fc.as_matrix(spec, kernel),
    "update_matrix": lambda spec, kernel, x, matrix: fc.update_matrix(spec, matrix, kernel),
    "matrix_vjp": lambda spec, kernel, x, matrix: fc.matrix_vjp(spec, matrix),
    "kernel_matrix": lambda spec, kernel, x, matrix: fc.kernel_matrix(spec, x),
}


def gradient(builder):
    """Of the sum of squares of the result."""

    def pulled(spec, *operands):
        return jax.grad(lambda operands: (builder(spec, *operands) ** 2).sum())(operands)

    return pulled


@pytest.mark.parametrize("name", ["strided, dilated, lopsided", "grouped", "reflect", "NHWC"])
def test_the_program_for_a_tpu_moves_no_single_entries(name):
    """Nor do the programs of its builders' gradients: all of them in one."""
    spec = CASES[name].spec()
    given = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (spec.rhs_shape, spec.in_shape, spec.shape)]

    @jax.jit
    def build(*operands):
        return [
            (builder(spec, *operands), gradient(builder)(spec, *operands)) for builder in BUILDERS.values()
        ]

    traced = build.trace(*given)
    text = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text()  # noqa: E731
    moves = re.compile(r'"stablehlo\.(?:dynamic_)?(?:gather|scatter)"')
    assert name != "grouped" or moves.search(text("cpu"))  # what is looked for has this name
    assert not moves.search(text("tpu"))

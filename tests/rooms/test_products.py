"""The matrix-free pair: M x and M^T y without M, through every transform of JAX."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import drawn
from geometries import Geometry, arrays, geometries, integers, normals, seeds
from hypothesis import given
from jax import lax

import jaxconv_fc as fc
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.products import cpu
from jaxconv_fc.products.platforms import PLATFORMS

CASES = {
    "plain": Geometry((1, 2, 4, 3), (3, 2, 2, 2), (1, 1), "SAME"),
    "strided": Geometry((1, 1, 5, 6), (2, 1, 3, 2), (2, 3), [(1, 0), (0, 2)]),
    "dilated both ways": Geometry((1, 2, 4), (2, 2, 3), (2,), [(2, 1)], (3,), (2,)),
    "cropped": Geometry((1, 2, 6, 5), (2, 2, 2, 2), (1, 2), [(-1, 1), (2, -1)]),
    "pad beyond the window": Geometry((1, 2, 4), (2, 2, 2), (1,), [(4, 0)]),
    "grouped": Geometry((1, 4, 3, 3), (6, 2, 2, 2), (1, 2), [(1, 1), (-1, 2)], feature_group_count=2),
    "depthwise": Geometry((1, 3, 5), (6, 1, 3), (1,), "SAME", feature_group_count=3),
    "batch groups": Geometry((4, 2, 4), (4, 2, 3), (1,), [(2, 0)], (2,), batch_group_count=2),
    "NHWC": Geometry((1, 4, 3, 2), (2, 2, 2, 3), (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    "CWNH": Geometry(
        (2, 4, 1, 3), (2, 3, 2, 2), (2, 1), "SAME_LOWER", dimension_numbers=("CWNH", "HOWI", "WHNC")
    ),
    "batch groups, N inside": Geometry(
        (3, 4, 2), (2, 4, 2), (1,), "SAME", None, None, ("WNC", "WOI", "CNW"), batch_group_count=2
    ),
    "circular": Geometry((1, 2, 3, 4), (2, 2, 3, 2), (1, 2), [(0, 5), (9, 0)], padding_mode="circular"),
    "reflect": Geometry((1, 2, 4), (2, 2, 3), (1,), [(9, 2)], None, (2,), padding_mode="reflect"),
    "symmetric": Geometry((1, 2, 3), (2, 1, 2), (2,), [(7, 1)], (2,), None, None, 2, 1, "symmetric"),
    "edge": Geometry((2, 1, 3), (2, 1, 4), (1,), [(5, 3)], None, None, None, 1, 2, "edge"),
    "no spatial axes": Geometry((1, 3), (2, 3), (), "VALID"),
    "3-D": Geometry((1, 2, 2, 3, 2), (2, 2, 2, 2, 1), (1, 2, 1), [(1, 0), (1, 1), (0, 2)]),
    "4-D": Geometry((1, 1, 2, 2, 2, 3), (2, 1, 2, 1, 2, 2), (1, 1, 2, 1), "SAME"),
    "no rows": Geometry((1, 2, 3), (2, 2, 5), (1,), "VALID"),
    "no columns": Geometry((1, 2, 0), (2, 2, 2), (1,), [(2, 1)]),
    "only padding": Geometry((1, 1, 3), (2, 1, 2), (1,), [(-4, 5)]),
    "empty beside padding": Geometry((1, 2, 0, 3), (2, 2, 2, 2), (1, 1), [(2, 1), (1, 2)], (1, 2)),
}
SOME = {
    name: CASES[name]
    for name in ("cropped", "dilated both ways", "grouped", "batch groups", "NHWC", "reflect", "no columns")
}
every_case = pytest.mark.parametrize("geometry", CASES.values(), ids=CASES)
some_cases = pytest.mark.parametrize("geometry", SOME.values(), ids=SOME)


EMPTY = {"no rows", "no columns", "only padding", "empty beside padding"}


def test_no_case_is_empty_by_accident():
    """Strides and dilations can agree in such a way that every tap falls between the inputs."""
    assert {name for name, geometry in CASES.items() if not geometry.spec().nse} == EMPTY


# values ----------------------------------------------------------------------------------------------


def in_every_dtype(geometry, given, **options):
    """Both products of every ``(kernel, x, y)``, as one program."""
    spec = geometry.spec()

    def products(given):
        return [
            (fc.apply(spec, kernel, x, **options), fc.apply_transpose(spec, kernel, y, **options))
            for kernel, x, y in given
        ]

    made = jax.jit(products)(given)
    for (kernel, _, _), (ahead, back) in zip(given, made, strict=True):
        assert ahead.dtype == back.dtype == kernel.dtype
        assert ahead.shape == spec.out_shape
        assert back.shape == spec.in_shape
    return made


@every_case
def test_products_are_the_oracles(geometry, cpu_form, rng):
    """Whole numbers, so both are exact in every dtype. Integers have one form only, and the derivatives below
    are those of complex numbers in the other one."""
    dtypes = ("float32", *["complex128", "int32"] * (cpu_form == "convolutions"))
    given = [arrays(geometry, rng, dtype) for dtype in dtypes]
    for (kernel, x, y), (ahead, back) in zip(given, in_every_dtype(geometry, given), strict=True):
        np.testing.assert_array_equal(ahead, oracle.product(x, kernel, geometry))
        np.testing.assert_array_equal(back, oracle.transpose_product(y, kernel, geometry))


@pytest.mark.parametrize("most", [0, 10**6], ids=["products of matrices", "one loop"])
@pytest.mark.parametrize("name", ["grouped", "depthwise", "batch groups", "NHWC", "CWNH", "symmetric"])
def test_both_sums_over_outputs(name, most, monkeypatch, rng):
    """The kernel gradient of one example with groups, or with few channels, on a CPU."""
    jax.clear_caches()
    monkeypatch.setattr(cpu, "MOST_PAIRS", most)
    geometry = CASES[name]
    _, x, y = arrays(geometry, rng, "float32")
    got = fc.kernel_vjp(geometry.spec(), x, y)
    np.testing.assert_array_equal(got, oracle.kernel_gradient(x, y, geometry))
    jax.clear_caches()


@pytest.mark.parametrize("parts", [1, 5], ids=["XLA's groups", "a convolution for each"])
def test_groups_of_several_channels(parts, monkeypatch, rng):
    jax.clear_caches()
    for name, value in {"MOST_SPLIT": parts, "MOST_PARTS": parts, "MOST_TERMS": 0}.items():
        monkeypatch.setattr(cpu, name, value)
    geometry = Geometry((1, 10, 4, 3), (15, 2, 2, 2), (2, 1), [(1, 0), (0, 1)], feature_group_count=5)
    given = arrays(geometry, rng, "float32")
    ((ahead, back),) = in_every_dtype(geometry, [given])
    kernel, x, y = given
    np.testing.assert_array_equal(ahead, oracle.product(x, kernel, geometry))
    np.testing.assert_array_equal(back, oracle.transpose_product(y, kernel, geometry))
    jax.clear_caches()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("mode", ["circular", "reflect", "symmetric", "edge"])
def test_copies_are_added_to_their_sources(platform, mode, rng):
    """Few and many, and where a block of rows crops the inputs: the forms of a CPU and of GPU and TPU."""
    pads = (2, 1), (9, 4), (0, -2), (-3, 2), (-9, 12), (0, 0)
    axes = [Axis(size=5, taps=1, mode=mode, lo=low, hi=high) for low, high in pads]
    stacks = [integers(rng, (2, axis.padded_size, 3), np.float64) for axis in axes]
    fold = PLATFORMS[platform].fold
    folded = jax.jit(lambda stacks: [fold(axis, x, 1) for axis, x in zip(axes, stacks, strict=True)])(stacks)
    for axis, x, got in zip(axes, stacks, folded, strict=True):
        want = np.zeros((2, 5, 3))
        np.add.at(want, (slice(None), axis.source(np.arange(axis.padded_size))), x)
        np.testing.assert_array_equal(got, want, str(axis))


FLOATS = ("float16", "bfloat16", "float32", "complex64")


@pytest.mark.parametrize("geometry", drawn(SOME.values(), 4), ids=SOME)
def test_rounding_stays_within_its_bound(geometry, cpu_form, rng):
    given = [arrays(geometry, rng, dtype, normals) for dtype in FLOATS]
    made = in_every_dtype(geometry, given, precision="highest")
    for (kernel, x, y), (ahead, back) in zip(given, made, strict=True):
        oracle.assert_product(ahead, kernel, x, geometry)
        oracle.assert_transpose_product(back, kernel, y, geometry)


@given(geometries(), seeds)
def test_random_geometries(geometry, seed):
    kernel, x, y = arrays(geometry, np.random.default_rng(seed), np.float32)
    matrix, ((ahead, back),) = oracle.matrix(kernel, geometry), in_every_dtype(geometry, [(kernel, x, y)])
    np.testing.assert_array_equal(ahead.ravel(), matrix @ x.ravel())
    np.testing.assert_array_equal(back.ravel(), matrix.T @ y.ravel())


def test_no_matrix_is_built(rng):
    """A layer whose matrix would take 161 GB."""
    geometry = Geometry((1, 64, 56, 56), (64, 64, 3, 3), (1, 1), "SAME")
    spec = geometry.spec()
    kernel, x, _ = arrays(geometry, rng, np.float32)
    want = lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", precision="highest")[0]
    np.testing.assert_array_equal(fc.apply(spec, kernel, x), want)
    assert fc.apply_transpose(spec, kernel, want).shape == spec.in_shape


# derivatives -----------------------------------------------------------------------------------------


def pair(geometry):
    """The two products, each with its oracle: (function of (kernel, vector), truth, truth's adjoint)."""
    spec = geometry.spec()
    return {
        "apply": (partial(fc.apply, spec), oracle.product, oracle.transpose_product),
        "apply_transpose": (partial(fc.apply_transpose, spec), oracle.transpose_product, oracle.product),
    }


NAMES = ("apply", "apply_transpose")
both = pytest.mark.parametrize("name", NAMES)


def setting(geometry, name, rng, dtype=np.float64, make=integers):
    """(function, kernel, vector, cotangent) and the kernel gradient's arguments in order (x, y)."""
    kernel, x, y = arrays(geometry, rng, dtype, make)
    vector, cotangent = (x, y) if name == "apply" else (y, x)
    return pair(geometry)[name][0], kernel, vector, cotangent, oracle.kernel_gradient(x, y, geometry)


@every_case
def test_derivatives(geometry, cpu_form, rng):
    """Each product pulls back to the other one and to the kernel gradient, by vjp and linear_transpose."""
    spec = geometry.spec()
    kernel, x, y = arrays(geometry, rng, np.float64 if cpu_form == "convolutions" else np.complex128)

    def derivatives(function, kernel, vector, cotangent):
        to_kernel, to_vector = jax.vjp(function, kernel, vector)[1](cotangent)
        (transposed,) = jax.linear_transpose(partial(function, kernel), vector)(cotangent)
        (gradient,) = jax.linear_transpose(lambda k: function(k, vector), kernel)(cotangent)
        return to_kernel, to_vector, transposed, gradient

    @jax.jit
    def of_both(kernel, x, y):
        ahead = derivatives(partial(fc.apply, spec), kernel, x, y)
        return ahead, derivatives(partial(fc.apply_transpose, spec), kernel, y, x)

    kernel_bar = oracle.kernel_gradient(x, y, geometry)
    x_bar = oracle.transpose_product(y, kernel, geometry)
    y_bar = oracle.product(x, kernel, geometry)
    want = (kernel_bar, x_bar, x_bar, kernel_bar), (kernel_bar, y_bar, y_bar, kernel_bar)
    jax.tree.map(np.testing.assert_array_equal, of_both(kernel, x, y), want)


def as_one_program(functions, operands):
    """What each of the functions, by name, makes of its operands."""
    return jax.jit(lambda given: {name: f(*given[name]) for name, f in functions.items()})(operands)


@some_cases
def test_jvp(geometry, rng):
    """The product rule: d(M x) = M(dK) x + M(K) dx."""
    primals = {name: setting(geometry, name, rng)[1:3] for name in NAMES}
    tangents = {name: setting(geometry, name, rng)[1:3] for name in NAMES}
    pushes = {name: partial(jax.jvp, function) for name, (function, *_) in pair(geometry).items()}
    made = as_one_program(pushes, {name: (primals[name], tangents[name]) for name in NAMES})
    for name, (value, pushed) in made.items():
        truth, (kernel, vector), (d_kernel, d_vector) = pair(geometry)[name][1], primals[name], tangents[name]
        np.testing.assert_array_equal(value, truth(vector, kernel, geometry))
        want = truth(vector, d_kernel, geometry) + truth(d_vector, kernel, geometry)
        np.testing.assert_array_equal(pushed, want)


@some_cases
def test_second_order(geometry, rng):
    """By any two operands, for both products; forward over reverse and reverse over reverse."""
    spec = geometry.spec()
    kernel, x, y = arrays(geometry, rng, float)
    directions = arrays(geometry, rng, float)

    def slopes(kernel, x, y):
        ways = (
            lambda kernel, x, y: (fc.apply(spec, kernel, x) * y).sum(),
            lambda kernel, x, y: (fc.apply_transpose(spec, kernel, y) * x).sum(),
        )
        return [jax.grad(way, (0, 1, 2))(kernel, x, y) for way in ways]

    def along(*operands):
        return [
            sum((bar * d).sum() for bar, d in zip(bars, directions, strict=True))
            for bars in slopes(*operands)
        ]

    @jax.jit
    def twice(*operands):
        forward = jax.jvp(slopes, operands, directions)[1]
        backward = [jax.grad(lambda *v, i=i: along(*v)[i], (0, 1, 2))(*operands) for i in range(2)]
        return [*forward, *backward]

    d_kernel, d_x, d_y = directions
    gradient, back, ahead = oracle.kernel_gradient, oracle.transpose_product, oracle.product
    want = (
        gradient(d_x, y, geometry) + gradient(x, d_y, geometry),
        back(y, d_kernel, geometry) + back(d_y, kernel, geometry),
        ahead(x, d_kernel, geometry) + ahead(d_x, kernel, geometry),
    )
    for got in twice(kernel, x, y):
        jax.tree.map(np.testing.assert_array_equal, tuple(got), want)


@both
def test_the_transpose_of_the_transpose(name, rng):
    """linear_transpose twice is the function itself, also for the map from the kernel."""
    geometry = CASES["cropped"]
    function, kernel, vector, cotangent, _ = setting(geometry, name, rng)
    truth = pair(geometry)[name][1]

    def once(c):
        return jax.linear_transpose(partial(function, kernel), vector)(c)[0]

    (twice,) = jax.linear_transpose(once, cotangent)(vector)
    np.testing.assert_array_equal(twice, truth(vector, kernel, geometry))

    def once_kernel(c):
        return jax.linear_transpose(lambda k: function(k, vector), kernel)(c)[0]

    (twice,) = jax.linear_transpose(once_kernel, cotangent)(kernel)
    np.testing.assert_array_equal(twice, truth(vector, kernel, geometry))


@both
def test_mixed_second_derivative(name, rng):
    """d/dK of d/dx of <c, M(K) x> applied to v is the kernel gradient at v: grad through a grad."""
    geometry = CASES["grouped"]
    function, kernel, vector, cotangent, _ = setting(geometry, name, rng)
    direction = integers(rng, vector.shape, float)

    def slope(k):
        to_vector = jax.grad(lambda v: (function(k, v) * cotangent).sum())(jnp.asarray(vector))
        return (to_vector * direction).sum()

    x, y = (direction, cotangent) if name == "apply" else (cotangent, direction)
    np.testing.assert_array_equal(
        jax.grad(slope)(jnp.asarray(kernel)), oracle.kernel_gradient(x, y, geometry)
    )


# vmap ------------------------------------------------------------------------------------------------


@both
@some_cases
def test_vmap_over_vectors_kernels_and_both(geometry, name, rng):
    function, truth, _ = pair(geometry)[name]
    sets = [setting(geometry, name, rng, np.float32)[1:3] for _ in range(3)]
    kernels, vectors = (np.stack(a) for a in zip(*sets, strict=True))
    axes = ((None, 0), (0, None), (0, 0))

    @jax.jit
    def mapped(kernels, vectors):
        first = kernels[0], vectors[0]
        given = [[v if a == 0 else one for v, a, one in zip((kernels, vectors), in_axes, first, strict=True)]
                 for in_axes in axes]  # fmt: skip
        return [jax.vmap(function, in_axes)(*two) for in_axes, two in zip(axes, given, strict=True)]

    for in_axes, got in zip(axes, mapped(kernels, vectors), strict=True):
        want = [
            truth(vectors[i if in_axes[1] == 0 else 0], kernels[i if in_axes[0] == 0 else 0], geometry)
            for i in range(3)
        ]
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(jax.vmap(function)(kernels, vectors), want)  # and without jit


@some_cases
def test_nested_vmap(geometry, rng):
    """Every kernel against every vector, batched along trailing axes on the way."""
    sets = {name: [setting(geometry, name, rng, np.float32)[1:3] for _ in range(2)] for name in NAMES}
    stacks = {name: [np.stack(a, axis=-1) for a in zip(*two, strict=True)] for name, two in sets.items()}
    tables = {
        name: jax.vmap(jax.vmap(function, (None, -1)), (-1, None))
        for name, (function, *_) in pair(geometry).items()
    }
    for name, table in as_one_program(tables, stacks).items():
        truth = pair(geometry)[name][1]
        want = [[truth(v, k, geometry) for _, v in sets[name]] for k, _ in sets[name]]
        np.testing.assert_array_equal(table, want)


@both
@some_cases
def test_grad_of_vmap_and_vmap_of_grad(geometry, name, rng):
    function, _, adjoint = pair(geometry)[name]
    sets = [setting(geometry, name, rng) for _ in range(3)]
    kernel, vectors = sets[0][1], np.stack([s[2] for s in sets])
    cotangents = np.stack([s[3] for s in sets])

    def loss(k, v, c):
        return (function(k, v) * c).sum()

    def total(k, vs):
        return jax.vmap(loss, (None, 0, 0))(k, vs, cotangents).sum()

    def truth(v, c):
        x, y = (v, c) if name == "apply" else (c, v)
        return oracle.kernel_gradient(x, y, geometry)

    each = [truth(v, c) for v, c in zip(vectors, cotangents, strict=True)]
    back = [adjoint(c, kernel, geometry) for c in cotangents]
    # One vector under many kernels, or one kernel on many vectors: the examples' gradients add up.
    kernels = np.stack([s[1] for s in sets])

    def of_vector(v):
        return (jax.vmap(function, (0, None))(kernels, v) * cotangents).sum()

    @jax.jit
    def gradients(kernel, vectors):
        per_example = jax.vmap(jax.grad(loss, (0, 1)), (None, 0, 0))(kernel, vectors, cotangents)
        return jax.grad(total, (0, 1))(kernel, vectors), per_example, jax.grad(of_vector)(vectors[0])

    (of_kernel, of_vectors), per_example, shared_vector = gradients(kernel, vectors)
    np.testing.assert_array_equal(of_kernel, sum(each))
    np.testing.assert_array_equal(of_vectors, back)
    np.testing.assert_array_equal(per_example[0], each)
    np.testing.assert_array_equal(per_example[1], back)
    want = sum(adjoint(c, k, geometry) for k, c in zip(kernels, cotangents, strict=True))
    np.testing.assert_array_equal(shared_vector, want)


def test_vmap_over_an_empty_batch():
    geometry = CASES["plain"]
    xs = np.zeros((0, *geometry.spec().in_shape), np.float32)
    out = jax.vmap(partial(fc.apply, geometry.spec(), np.ones(geometry.rhs_shape, np.float32)))(xs)
    assert out.shape == (0, *geometry.spec().out_shape)


# loops -----------------------------------------------------------------------------------------------


@some_cases
def test_inside_scan_fori_loop_and_while_loop(geometry, rng):
    """Three steps x -> M^T M x modulo a small prime, so that whole numbers stay whole and small."""
    spec = geometry.spec()
    kernel, x, _ = arrays(geometry, rng)
    want = x
    for _ in range(3):
        want = oracle.transpose_product(oracle.product(want, kernel, geometry), kernel, geometry) % 7

    def step(x):
        return fc.apply_transpose(spec, kernel, fc.apply(spec, kernel, x)) % 7

    @jax.jit
    def loops(x):
        scanned, _ = lax.scan(lambda carry, _: (step(carry), None), x, None, length=3)
        counted = lax.fori_loop(0, 3, lambda _, carry: step(carry), x)
        return scanned, counted, lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, step(c[1])), (0, x))

    scanned, counted, (count, looped) = loops(x)
    for got in (scanned, counted, looped):
        np.testing.assert_array_equal(got, want)
    assert count == 3


@both
def test_grad_through_scan(name, rng):
    """One kernel used at every step: its gradient is the sum of the steps' kernel gradients."""
    geometry = CASES["grouped"]
    function, kernel, _, cotangent, _ = setting(geometry, name, rng)
    vectors = np.stack([setting(geometry, name, rng)[2] for _ in range(3)])

    def total(k):
        return lax.scan(lambda acc, v: (acc + (function(k, v) * cotangent).sum(), None), 0.0, vectors)[0]

    pairs = [(v, cotangent) if name == "apply" else (cotangent, v) for v in vectors]
    want = sum(oracle.kernel_gradient(x, y, geometry) for x, y in pairs)
    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(kernel)), want)


@both
def test_under_checkpoint_and_cond(name, rng):
    geometry = CASES["reflect"]
    function, kernel, vector, cotangent, kernel_bar = setting(geometry, name, rng)

    def loss(k):
        return (lax.cond(True, function, lambda k, v: 2 * function(k, v), k, vector) * cotangent).sum()

    np.testing.assert_array_equal(jax.grad(jax.checkpoint(loss))(jnp.asarray(kernel)), kernel_bar)


# integers, complex numbers, precision ----------------------------------------------------------------

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@pytest.mark.parametrize("name", SOME)
def test_integers_are_exact_and_wrap(name, rng, run_seed):
    """Arithmetic modulo 2**bits, as NumPy's: large entries, so that narrow types wrap. Two dtypes in turn."""
    geometry, first = SOME[name], run_seed + 2 * list(SOME).index(name)
    limits = [np.iinfo(INTEGERS[(first + i) % len(INTEGERS)]) for i in range(2)]
    shapes = [a.shape for a in arrays(geometry, rng)]
    given = [[rng.integers(i.min, i.max, shape, i.dtype, True) for shape in shapes] for i in limits]
    for operands, (ahead, back) in zip(given, in_every_dtype(geometry, given), strict=True):
        kernel, x, y = (v.astype(np.uint64) for v in operands)  # modulo 2**64
        np.testing.assert_array_equal(ahead, oracle.product(x, kernel, geometry).astype(ahead.dtype))
        want = oracle.transpose_product(y, kernel, geometry)
        np.testing.assert_array_equal(back, want.astype(back.dtype))


@both
@some_cases
def test_the_adjoint_of_integers_and_of_complex_numbers(geometry, name, rng):
    """A number, where JAX's own convolution would silently return float0; and no conjugate anywhere: M^T and
    the kernel gradient are bilinear, not sesquilinear."""
    function, _, adjoint = pair(geometry)[name]
    settings = [setting(geometry, name, rng, dtype)[1:] for dtype in (np.int32, np.complex64)]

    @jax.jit
    def pulled(whole, numbers):
        kernel, vector, cotangent = whole
        to_kernel = jax.linear_transpose(lambda k: function(k, vector), kernel)
        to_vector = jax.linear_transpose(partial(function, kernel), vector)
        transposed = (*to_kernel(cotangent), *to_vector(cotangent))
        return transposed, jax.vjp(function, *numbers[:2])[1](numbers[2])

    made = pulled(*(one[:3] for one in settings))
    for (got_kernel, got_vector), (kernel, _, cotangent, kernel_bar) in zip(made, settings, strict=True):
        assert got_kernel.dtype == got_vector.dtype == kernel.dtype
        np.testing.assert_array_equal(got_vector, adjoint(cotangent, kernel, geometry))
        np.testing.assert_array_equal(got_kernel, kernel_bar)


def test_the_conjugate_transpose(rng):
    """M^H y is conj(M^T conj(y)): <M x, y> == <x, M^H y>."""
    geometry = CASES["dilated both ways"]
    spec = geometry.spec()
    kernel, x, y = arrays(geometry, rng, np.complex128)
    back = fc.apply_transpose(spec, kernel, y.conj()).conj()
    assert np.vdot(np.asarray(fc.apply(spec, kernel, x)), y) == np.vdot(x, np.asarray(back))


@pytest.mark.parametrize(
    ("case", "precision"),
    [("dilated both ways", "highest"), ("grouped", None), ("grouped", "highest"),
     ("reflect", lax.Precision.HIGHEST)],
)  # fmt: skip
@both
def test_precision_is_passed_on(case, name, precision, rng):
    """The numbers are the same on CPU, and the program names the precision, forward and in both gradients."""
    geometry = CASES[case]
    function, kernel, vector, cotangent, _ = setting(geometry, name, rng, np.float32)
    truth = pair(geometry)[name][1]
    function = partial(function, precision=precision)
    if case == "grouped":
        np.testing.assert_array_equal(function(kernel, vector), truth(vector, kernel, geometry))

    def both_ways(kernel, vector):
        value, pull = jax.vjp(function, kernel, vector)
        return value, pull(jnp.asarray(cotangent))

    with jax.default_matmul_precision(None):  # conftest.py asks for "highest"
        # On CPU few channels are written out as sums, which have no precision.
        text = jax.jit(both_ways).trace(kernel, vector).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", text)
    assert products or not (vector.size and cotangent.size)
    highest = precision in ("highest", lax.Precision.HIGHEST)
    assert all(("HIGHEST" in line) == highest for line in products)


def test_the_default_matmul_precision_is_heard(rng):
    geometry = CASES["plain"]
    kernel, x, _ = arrays(geometry, rng, np.float32)
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(fc.apply).trace(geometry.spec(), kernel, x)
    assert "HIGHEST" in traced.lower(lowering_platforms=("cuda",)).as_text()


# x64 off, layouts, refusals --------------------------------------------------------------------------


@both
@pytest.mark.parametrize("geometry", [CASES["dilated both ways"], CASES["NHWC"]])
def test_with_x64_off(geometry, name, rng):
    function, kernel, vector, cotangent, kernel_bar = setting(geometry, name, rng, np.float32)
    _, truth, adjoint = pair(geometry)[name]
    with jax.enable_x64(False):
        value, pull = jax.vjp(function, kernel, vector)
        got_kernel, got_vector = pull(jnp.asarray(cotangent))
    np.testing.assert_array_equal(value, truth(vector, kernel, geometry))
    np.testing.assert_array_equal(got_vector, adjoint(cotangent, kernel, geometry))
    np.testing.assert_array_equal(got_kernel, kernel_bar)


@both
def test_a_vector_must_have_exactly_its_shape(name):
    """Neither a batch nor a ravel is accepted: vmap is for stacks."""
    geometry = CASES["plain"]
    function, spec = pair(geometry)[name][0], geometry.spec()
    kernel = np.ones(geometry.rhs_shape, np.float32)
    expected = spec.in_shape if name == "apply" else spec.out_shape
    for shape in ((1, *expected), (int(np.prod(expected)),), expected[:-1], (*expected[:-1], 7)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at below
            function(kernel, np.ones(shape, np.float32))
        assert str(expected) in str(caught.value)
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float32", "int32"), ("complex64", "float32")])
@both
def test_dtypes_must_match(name, dtypes):
    """As in lax; the message suggests the cast."""
    geometry = CASES["plain"]
    function, spec = pair(geometry)[name][0], geometry.spec()
    kernel = np.ones(geometry.rhs_shape, dtypes[0])
    vector = np.ones(spec.in_shape if name == "apply" else spec.out_shape, dtypes[1])
    with pytest.raises(TypeError, match="astype") as caught:
        function(kernel, vector)
    assert dtypes[0] in str(caught.value)
    assert dtypes[1] in str(caught.value)


@both
def test_bool_is_refused(name):
    """A bool kernel is a mask; `or` has no adjoint."""
    geometry = CASES["plain"]
    function, spec = pair(geometry)[name][0], geometry.spec()
    vector = np.ones(spec.in_shape if name == "apply" else spec.out_shape, bool)
    with pytest.raises(TypeError, match="bool"):
        function(np.ones(geometry.rhs_shape, bool), vector)


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_the_transpose_of_many_integer_kernels_keeps_its_dtype(dtype, rng):
    """A batch axis that the result does not have is summed over; JAX would widen the sum."""
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    kernels = rng.integers(-3, 4, (3, *spec.rhs_shape)).astype(dtype)
    x, ys = np.zeros(spec.in_shape, dtype), rng.integers(-3, 4, (3, *spec.out_shape)).astype(dtype)

    def products(x):
        return jax.vmap(lambda kernel: fc.apply(spec, kernel, x))(jnp.asarray(kernels))

    want = sum(fc.as_matrix(spec, k).T @ y.ravel() for k, y in zip(kernels, ys, strict=True))
    for transpose in (jax.linear_transpose(products, x), jax.jit(jax.linear_transpose(products, x))):
        (got,) = transpose(jnp.asarray(ys))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.ravel(), want)


def test_precision_may_be_a_list(rng):
    spec = fc.conv_spec((1, 2, 6), (3, 2, 3), (1,), "SAME")
    kernel, x = (jnp.asarray(rng.standard_normal(s)) for s in (spec.rhs_shape, spec.in_shape))
    both = ["highest", "highest"]
    np.testing.assert_array_equal(fc.apply(spec, kernel, x, precision=both), fc.apply(spec, kernel, x))
    for method in ("convolution", "dense", "sparse"):
        got = fc.batched_apply(spec, kernel, x[None], method=method, precision=both)
        np.testing.assert_allclose(got[0], fc.apply(spec, kernel, x), rtol=1e-12)


@pytest.mark.parametrize(
    ("x", "y_bar", "error", "message"),
    [
        (jnp.ones((1, 4)), jnp.ones((1, 4)), ValueError, r"y_bar must .*\(1, 3\)"),
        (jnp.ones((1, 4)), jnp.ones((1, 3), int), TypeError, "y_bar.astype"),
        (jnp.ones((1, 4), bool), jnp.ones((1, 3), bool), TypeError, "bool"),
    ],
)
def test_bad_operands_of_kernel_vjp(x, y_bar, error, message):
    spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), "VALID")
    with pytest.raises(error, match=message):
        fc.kernel_vjp(spec, x, y_bar)


# forms of 64 bits, and the order of arrays on a CPU ---------------------------------------------------


def test_convolutions_of_64_bits_that_are_slow_are_products_of_matrices(rng):
    """Along one axis, or of 16 channels at most; the gradient takes examples for channels."""
    line, narrow = ((1, 20, 9), (20, 20, 2)), ((1, 8, 6, 6), (16, 8, 2, 2))
    wide = (1, 8, 6, 6), (17, 8, 2, 2)
    for lhs, rhs in (line, narrow, wide):
        geometry = Geometry(lhs, rhs, (1,) * (len(lhs) - 2), "SAME")
        spec = geometry.spec()
        for dtype in (np.float64, np.complex128, np.float32):
            kernel, x, y = (
                integers(rng, shape, dtype) for shape in (rhs, (3, *spec.in_shape), (3, *spec.out_shape))
            )

            def both(kernel, x, y, spec=spec):
                value, back = jax.vjp(lambda k: jax.vmap(lambda v: fc.apply(spec, k, v))(x), kernel)
                return value, back(y)[0]

            with jax.default_device(jax.devices("cpu")[0]):
                program = jax.jit(both).lower(kernel, x, y)
                value, gradient = program.compile()(kernel, x, y)
            convolutions = program.as_text().count("stablehlo.convolution")
            assert (convolutions > 0) == ((lhs, rhs) == wide or dtype == np.float32), (rhs, dtype)
            matrix = oracle.matrix(kernel, geometry)
            np.testing.assert_array_equal(value.reshape(3, -1), x.reshape(3, -1) @ matrix.T)
            want = sum(oracle.kernel_gradient(a, b, geometry) for a, b in zip(x, y, strict=True))
            np.testing.assert_array_equal(gradient, want)


def test_no_array_is_laid_out_anew_at_a_fence():
    """Channels first, the calls around a sum over taps read and write the caller's arrays."""
    spec = fc.conv_spec((1, 4, 9, 9), (4, 1, 3, 3), (1, 1), "SAME", feature_group_count=4)
    kernel, x = jnp.ones(spec.rhs_shape, jnp.float32), jnp.ones(spec.in_shape, jnp.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        for call in (partial(fc.apply, spec), lambda k, x: fc.kernel_vjp(spec, x, x)):
            program = jax.jit(call).lower(kernel, x).compile({"xla_backend_optimization_level": 3})
            entry = program.as_text().split("ENTRY")[1]
            assert not re.search(r"f32\[[\d,]*9,9[\d,]*\]\S* (copy|transpose|fusion)\(", entry), entry


# the fence on a CPU ----------------------------------------------------------------------------------

FENCED = {
    "jit": lambda f: f,
    "grad": lambda f: jax.grad(f, argnums=(0, 1)),
    "vmap": lambda f: lambda k, x: jax.vmap(f, (None, 0))(k, jnp.stack([x, x])),
    "scan": lambda f: lambda k, x: lax.scan(lambda c, _: (c + f(k, x + c), None), 0.0, length=3)[0],
    "export": lambda f: (
        lambda k, x: jax.export.deserialize(
            jax.export.export(jax.jit(f), platforms=["cpu"])(k, x).serialize()
        ).call(k, x)
    ),
}


def test_a_sum_over_taps_is_a_loop_of_its_own():
    """XLA would compute what stands before it once per tap, and fuse it into what reads it."""
    spec = fc.conv_spec((1, 9, 9, 4), (3, 3, 1, 4), (1, 1), "SAME", None, None, ("NHWC", "HWIO", "NHWC"), 4)

    def network(k, xs):
        layer = jax.vmap(lambda x: fc.apply(spec, k, x))
        return jnp.tanh(layer(jnp.tanh(layer(jnp.tanh(xs))))).mean()

    k, xs = jnp.ones((3, 3, 1, 4), jnp.float32), jnp.ones((2, 9, 9, 4), jnp.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        for name, transform in FENCED.items():
            program = jax.jit(transform(network)).lower(k, xs).compile({"xla_backend_optimization_level": 3})
            parts = program.as_text().split("\n\n")
            assert sum(part.count(" tanh(") for part in parts) == 3, name
            loops = [part for part in parts if part.count(" slice(") >= 9]
            assert loops, name
            assert not any("tanh(" in part for part in loops), name
    for platform in ("cuda", "tpu"):
        program = jax.export.export(jax.jit(jax.grad(network)), platforms=[platform])(k, xs)
        assert "inlineable" not in program.mlir_module()

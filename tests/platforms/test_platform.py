"""The same numbers on every backend that is present, and programs for all that are not.

    pytest -m platform

compares with lax.conv_general_dilated on this machine's CPU and, where there is one, GPU or TPU.
"""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from absl.testing import parameterized
from environment import SEED, count, drawn
from geometries import MODES, Geometry, arrays, integers, normals
from jax import export, lax

import jaxconv_fc as fc


def devices():
    """One device of every platform present: the default backend's, and the CPU."""
    found = {device.platform: device for device in (jax.devices("cpu")[0], jax.devices()[0])}
    return found.values()


# 2-D: every combination of these, with the channels and layouts below in turn
STRIDES = [(1, 1), (2, 1), (3, 2)]
PADDINGS = ["VALID", "SAME", "SAME_LOWER", [(1, 0), (0, 2)]]
DILATIONS = [(None, None), (None, (2, 1)), ((1, 2), None), ((2, 2), (1, 3))]
CHANNELS = {  # (batch, C, O, I, feature groups, batch groups)
    "one": (1, 1, 1, 1, 1, 1),
    "many": (2, 3, 4, 3, 1, 1),
    "grouped": (2, 4, 6, 2, 2, 1),
    "depthwise": (2, 3, 6, 1, 3, 1),
    "batch groups": (4, 2, 4, 2, 1, 2),
}
LAYOUTS = [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("CWNH", "WOHI", "HNWC")]


def laid_out(shape, letters, plain):
    return tuple(dict(zip(plain, shape, strict=True))[letter] for letter in letters)


def grid():
    """Every stride x padding x dilation; channels and layouts advance with each, so all of them meet."""
    combinations = itertools.product(STRIDES, PADDINGS, DILATIONS)
    kinds, layouts = itertools.cycle(CHANNELS), itertools.cycle(LAYOUTS)
    for strides, padding, (lhs_dilation, rhs_dilation) in combinations:
        kind, (lhs, rhs, out) = next(kinds), next(layouts)
        n, c, o, i, groups, batch_groups = CHANNELS[kind]
        yield Geometry(
            laid_out((n, c, 5, 6), lhs, "NCHW"),
            laid_out((o, i, 3, 2), rhs, "OIHW"),
            strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            (lhs, rhs, out),
            groups,
            batch_groups,
        )
    yield Geometry((2, 3), (4, 3), (), "VALID")
    yield Geometry((2, 3, 9), (4, 3, 3), (2,), "SAME", None, (2,))
    yield Geometry((1, 2, 3, 4, 3), (2, 2, 2, 1, 3), (1, 2, 1), "SAME", (2, 1, 1))


GRID = list(grid())
# Some of them in every run, all of them where many geometries are asked for.
_ORDER = [GRID[i] for i in np.random.default_rng(SEED).permutation(len(GRID))]
DRAWN, REST = _ORDER[: count("GEOMETRIES", 5)], _ORDER[count("GEOMETRIES", 5) :]
PADDED = [  # the boundary modes, which lax does not have: compared with the oracle
    Geometry((1, 2, 4, 3), (2, 2, 3, 2), (1, 2), [(1, 4), (5, 0)], (2, 1), padding_mode=mode)
    for mode in MODES
]
# What a CPU makes of them, test_products.py and test_dense.py show too.
SHOWN = PADDED if len(devices()) > 1 else PADDED[SEED % 3 :: 3]
number = itertools.count()


def identity(geometry):
    return f"{next(number)}-{geometry.padding if isinstance(geometry.padding, str) else 'pairs'}"


def named(geometries):
    return {identity(geometry): geometry for geometry in geometries}


def products(geometry, kernel, xs, ys):
    """apply on every example of a batch and its vjp, in lax's batched layout."""
    spec = geometry.spec()
    axis = oracle.layouts(geometry)[2][0]

    def batched(kernel, xs):
        examples = [lax.index_in_dim(xs, j, 0, keepdims=False) for j in range(xs.shape[0])]
        return jnp.stack([fc.apply(spec, kernel, x, precision="highest") for x in examples], axis)

    ahead, pull = jax.vjp(batched, kernel, xs)
    return ahead, pull(ys)


def reference(geometry, kernel, batch, ys):
    """lax's forward product and gradients, string padding with lhs_dilation resolved for it."""
    arguments = list(geometry.arguments())
    arguments[1] = oracle.pads(geometry)
    convolve = partial(lax.conv_general_dilated, precision="highest")
    ahead, pull = jax.vjp(lambda kernel, batch: convolve(batch, kernel, *arguments), kernel, batch)
    return ahead, pull(ys)


def gradient_bounds(geometry, kernel, xs, ys, axis):
    """2 gamma_n times the sums of the magnitudes that make up each gradient."""
    sizes = [oracle.size_of(np.take(ys, j, axis)) for j in range(len(xs))]
    kernel_sum = sum(
        oracle.kernel_gradient(oracle.size_of(x), s, geometry) for x, s in zip(xs, sizes, strict=True)
    )
    back = [oracle.transpose_product(s, oracle.size_of(kernel), geometry) for s in sizes]
    count = max(oracle.triples(geometry).shape[1], 1) * len(xs)
    factor = 2 * oracle.gamma(count + 2, np.float32)
    return factor * np.max(kernel_sum, initial=0), factor * np.max(back, initial=0)


PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
EXPORTED = {
    "plain": Geometry((1, 2, 5, 4), (4, 2, 3, 2), (1, 1), "SAME"),
    "grouped": Geometry((1, 4, 5), (4, 2, 3), (2,), [(-1, 3)], (3,), (2,), None, 2),
    "batch groups": Geometry((2, 2, 5), (4, 2, 3), (1,), "SAME", batch_group_count=2),
    "reflect": Geometry((1, 2, 4), (2, 2, 3), (1,), [(2, 5)], padding_mode="reflect"),
}
ROWS = np.array([0, 2])
VERBS = {
    "as_matrix": lambda spec, kernel, x, y: fc.as_matrix(spec, kernel),
    "as_affine": lambda spec, kernel, x, y: fc.as_affine(spec, kernel, y),
    "matrix_rows": lambda spec, kernel, x, y: fc.matrix_rows(spec, kernel, ROWS),
    "matrix_columns": lambda spec, kernel, x, y: fc.matrix_columns(spec, kernel, ROWS),
    "apply": lambda spec, kernel, x, y: fc.apply(spec, kernel, x),
    "apply_transpose": lambda spec, kernel, x, y: fc.apply_transpose(spec, kernel, y),
}


def on_every_device(**parts):
    """Decorator: the test once for each device and each choice of the parts, which have names."""
    cases = []
    for device, *choice in itertools.product(devices(), *(part.items() for part in parts.values())):
        names, values = zip(*choice, strict=True)
        cases.append(("_".join(("", device.platform, *names)), device, *values))
    return parameterized.named_parameters(cases)


class Checked(chex.TestCase):
    """What is checked of one function on one device."""

    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng(0)

    def check_gradients(self, device, geometry):
        """float32 at precision 'highest': values and both gradients, a whole batch at once."""
        axis = oracle.layouts(geometry)[2][0]
        kernel = normals(self.rng, geometry.rhs_shape, np.float32)
        batch = normals(self.rng, geometry.lhs_shape, np.float32)
        ys = normals(self.rng, oracle.batched_out_shape(geometry), np.float32)
        xs = np.stack(oracle.examples(batch, geometry))
        with jax.default_device(device):
            ahead, (of_kernel, of_xs) = self.variant(partial(products, geometry))(kernel, xs, ys)
            want, (want_kernel, want_batch) = jax.jit(partial(reference, geometry))(kernel, batch, ys)
        want_xs = np.stack(oracle.examples(np.asarray(want_batch), geometry))
        chex.assert_trees_all_equal_shapes_and_dtypes(
            (ahead, of_kernel, of_xs), (want, want_kernel, jnp.asarray(want_xs))
        )
        for x, y in zip(xs, np.moveaxis(np.asarray(ahead), axis, 0), strict=True):
            oracle.assert_product(y, kernel, x, geometry)
        kernel_bound, x_bound = gradient_bounds(geometry, kernel, xs, ys, axis)
        chex.assert_trees_all_close(of_kernel, want_kernel, rtol=0, atol=kernel_bound)
        chex.assert_trees_all_close(of_xs, jnp.asarray(want_xs), rtol=0, atol=x_bound)


@pytest.mark.platform
@pytest.mark.long
class RestOfTheGrid(Checked):
    """The geometries that :class:`OnEveryDevice` has not drawn in this run."""

    @chex.variants(with_jit=True)
    @on_every_device(geometry=named(REST or DRAWN[:1]))
    def test_apply_and_its_gradients_are_laxs(self, device, geometry):
        self.check_gradients(device, geometry)


@pytest.mark.platform
class OnEveryDevice(Checked):
    """Functions as they are called: jitted or not, with arrays on the device or of NumPy."""

    @chex.variants(with_jit=True)
    @on_every_device(geometry=named(DRAWN))
    def test_apply_and_its_gradients_are_laxs(self, device, geometry):
        self.check_gradients(device, geometry)

    @chex.variants(without_jit=True, with_device=True, without_device=True)
    @on_every_device(geometry=named(GRID[::26]))
    def test_apply_and_its_gradients_are_laxs_without_jit(self, device, geometry):
        self.check_gradients(device, geometry)

    @chex.variants(with_jit=True)
    @on_every_device(geometry=named([*GRID[SEED % 16 :: 16], *SHOWN]))
    def test_the_matrix_and_its_parts(self, device, geometry):
        """Scatters must give the same entries everywhere, float and integer."""
        self.check_matrix(device, geometry)

    @chex.variants(without_jit=True, with_device=True, without_device=True)
    @on_every_device(geometry=named(GRID[::26]))
    def test_the_matrix_and_its_parts_without_jit(self, device, geometry):
        self.check_matrix(device, geometry)

    def check_matrix(self, device, geometry):
        spec = geometry.spec()

        def build(kernels):
            return [
                (fc.as_matrix(spec, k), fc.matrix_rows(spec, k, [1, -1]), fc.matrix_columns(spec, k, [1, -1]))
                for k in kernels
            ]

        kernels = [integers(self.rng, geometry.rhs_shape, dtype) for dtype in (np.float32, np.int32)]
        with jax.default_device(device):
            made = self.variant(build)(kernels)
        for kernel, got in zip(kernels, made, strict=True):
            want = oracle.matrix(kernel, geometry)
            chex.assert_trees_all_close(got, (want, want[[1, -1]], want[:, [1, -1]]), rtol=0, atol=0)

    @chex.variants(with_jit=True, without_jit=True)
    @on_every_device(geometry=named(GRID[:2]))
    def test_a_factor_of_a_product_in_double_precision(self, device, geometry):
        """XLA on a GPU takes it into the convolution, where it is rounded to float32."""
        spec = geometry.spec()
        kernel, x, _ = arrays(geometry, self.rng, np.float64, normals)
        with jax.default_device(device):
            got = self.variant(lambda kernel, x: 0.01 * fc.apply(spec, kernel, x))(kernel, x)
        want = 0.01 * oracle.product(x, kernel, geometry)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)

    @chex.variants(with_jit=True)
    @on_every_device(geometry=named([*GRID[SEED % 17 :: 17], *SHOWN]))
    def test_products_against_the_oracle(self, device, geometry):
        spec = geometry.spec()
        ahead_of, back_of = (partial(f, spec, precision="highest") for f in (fc.apply, fc.apply_transpose))
        given = [arrays(geometry, self.rng, dtype, normals) for dtype in ("float32", "bfloat16")]
        with jax.default_device(device):
            made = self.variant(lambda given: [(ahead_of(k, x), back_of(k, y)) for k, x, y in given])(given)
        for (kernel, x, y), (ahead, back) in zip(given, made, strict=True):
            chex.assert_shape((ahead, back), (spec.out_shape, spec.in_shape))
            oracle.assert_product(ahead, kernel, x, geometry)
            oracle.assert_transpose_product(back, kernel, y, geometry)

    @chex.variants(without_jit=True, with_device=True, without_device=True)
    @on_every_device(layer={name: name for name in ("plain", "reflect")})
    def test_every_verb(self, device, layer):
        """Whole numbers: values must be those of the oracle's matrix."""
        geometry = EXPORTED[layer]
        kernel, x, y = arrays(geometry, self.rng, np.float32)
        matrix = oracle.matrix(kernel, geometry)
        want = {
            "as_matrix": matrix,
            "as_affine": (matrix, y.ravel()),
            "matrix_rows": matrix[ROWS],
            "matrix_columns": matrix[:, ROWS],
            "apply": (matrix @ x.ravel()).reshape(y.shape),
            "apply_transpose": (matrix.T @ y.ravel()).reshape(x.shape),
        }
        with jax.default_device(device):
            got = self.variant(partial(of_all(VERBS), geometry.spec()))(kernel, x, y)
        chex.assert_trees_all_close(got, want, rtol=0, atol=0)


@pytest.mark.platform
@pytest.mark.parametrize("geometry", GRID[::3], ids=identity)
def test_the_oracle_itself_against_lax(geometry, rng):
    """float64 on CPU, whole numbers: the yardstick of all other tests is lax's own convolution."""
    kernel = integers(rng, geometry.rhs_shape, np.float64)
    batch = integers(rng, geometry.lhs_shape, np.float64)
    arguments = list(geometry.arguments())
    arguments[1] = oracle.pads(geometry)
    with jax.default_device(jax.devices("cpu")[0]):
        want = lax.conv_general_dilated(batch, kernel, *arguments)
    chex.assert_trees_all_close(np.asarray(want), oracle.conv(batch, kernel, geometry), rtol=0, atol=0)


def test_no_geometry_here_is_empty():
    """Strides and dilations can agree in such a way that every tap falls between the inputs."""
    assert all(geometry.spec().nse for geometry in (*GRID, *PADDED, *EXPORTED.values()))


# programs for platforms that are not here ------------------------------------------------------------


def gradients(verb):
    """The vjp of a verb with respect to the kernel, cotangent all ones."""

    def pulled(spec, kernel, x, y):
        value, pull = jax.vjp(lambda kernel: verb(spec, kernel, x, y), kernel)
        return pull(jax.tree.map(jnp.ones_like, value))

    return pulled


def exported(verb, geometry, inputs):
    """The program for all platforms at once."""
    program = export.export(jax.jit(partial(verb, geometry.spec())), platforms=PLATFORMS)(*inputs)
    assert program.platforms == PLATFORMS
    return program


def of_all(verbs):
    """All of them as one program."""
    return lambda *operands: {name: verb(*operands) for name, verb in verbs.items()}


@pytest.mark.parametrize("geometry", drawn(EXPORTED.values(), 2), ids=EXPORTED)
def test_every_verb_and_its_gradient_export_for_all_platforms(geometry, rng):
    """float32, whose program also runs here, and the verbs of int32."""
    inputs = arrays(geometry, rng, np.float32)
    both = of_all(VERBS | {f"gradient of {name}": gradients(verb) for name, verb in VERBS.items()})
    here = jax.jit(both)(geometry.spec(), *inputs)
    chex.assert_trees_all_close(exported(both, geometry, inputs).call(*inputs), here, rtol=0, atol=0)
    exported(of_all(VERBS), geometry, arrays(geometry, rng, np.int32))

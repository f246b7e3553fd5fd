"""Norms, inner products and second moments of gradients, against the kernel matrices of single examples."""

import geometries
import jax
import numpy as np
import oracle
import pytest
from environment import count

import jaxconv_fc as fc
from jaxconv_fc.curvature import moments, norms, stacks

curvature = fc.curvature
WAYS = {
    "as chosen": {},
    "distances, gradients, in parts": {
        "_lags_are_cheaper": True,
        "_positions_are_cheaper": False,
        "PART_BYTES": 1,
    },
    "patches, positions": {"_lags_are_cheaper": False, "_positions_are_cheaper": True, "PART_BYTES": 300},
}


@pytest.fixture
def way(request, monkeypatch):
    """One of the ways that every function has, in parts or at once."""
    for module in (moments, norms, stacks):
        for name, value in WAYS[request.param].items():
            if hasattr(module, name):
                fixed = value if name == "PART_BYTES" else lambda *a, value=value: value
                monkeypatch.setattr(module, name, fixed)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def kernel_matrices(geometry, xs):
    """[n, outputs, kernel entries]; and [n, g, o, (i, p)], that of one out channel of every group."""
    spec, n = geometry.spec(), len(xs)
    rows, columns, taps = oracle.triples(geometry)
    whole = np.zeros((n, spec.out_size, int(np.prod(spec.rhs_shape))), xs.dtype)
    np.add.at(whole, (slice(None), rows, taps), xs.reshape(n, -1)[:, columns])
    each = whole.reshape(n, *spec.out_shape, *spec.rhs_shape)
    each = np.moveaxis(each, 1 + spec.out_order[-1], 1)
    outputs = int(np.prod([a.out_size for a in spec.axes]))
    each = each.reshape(n, spec.out_channels, outputs, *spec.rhs_shape)
    each = each.transpose(0, 1, 2, *(3 + i for i in spec.dimension_numbers.rhs_spec))
    size = spec.group_channels * int(np.prod([a.taps for a in spec.axes]))
    each = each.reshape(n, spec.out_channels, outputs, spec.out_channels, size)
    first = range(0, spec.out_channels, spec.out_channels // spec.groups)
    return whole, np.stack([each[:, d, :, d] for d in first], 1)


def close(got, want, what):
    assert got.shape == want.shape, what
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * (1 + np.abs(want).max(initial=0)), err_msg=what)


def bordered(vectors):
    return np.concatenate([vectors, np.ones((*vectors.shape[:-1], 1))], -1)


def check(geometry, rng, what):
    """All four functions, of three examples, with and without a bias."""
    spec = geometry.spec()
    xs, ys = (geometries.normals(rng, (3, *shape)) for shape in (spec.in_shape, spec.out_shape))
    whole, patch = kernel_matrices(geometry, xs)
    gradients = np.einsum("nor,no->nr", whole, ys.reshape(3, -1))
    pair = (xs[1:], ys[1:])
    turned = (xs + 1j * xs[::-1], ys - 2j * ys[::-1]) if spec.padding_mode == "reflect" else None
    approximations = ("expand", True), ("reduce", spec.groups == 1)

    @jax.jit
    def every(xs, ys, pair):
        factors = [
            curvature.kfac_factors(spec, xs, ys, approx=approx, bias=bias) for approx, bias in approximations
        ]
        gram = curvature.gradient_gram(spec, xs, ys), curvature.gradient_gram(spec, xs, ys, pair)
        norms = [curvature.gradient_norms(spec, *two) for two in ((xs, ys), turned) if two is not None]
        return curvature.patch_moment(spec, xs), norms, gram, factors

    moment, (length, *of_complex), (gram, with_other), factors = every(xs, ys, pair)
    outputs = patch.shape[2]
    y = np.moveaxis(ys, 1 + spec.out_order[-1], 1).reshape(
        3, spec.groups, spec.out_channels // spec.groups, outputs
    )
    y = y.swapaxes(2, 3)  # [n, g, o, e]

    def second(vectors):
        found = np.einsum("nga,ngb->gab", vectors, vectors)
        return found[0] if spec.groups == 1 else found

    def flat(v):  # [n, g, o, c] -> [n*o, g, c]
        return v.swapaxes(1, 2).reshape(3 * outputs, v.shape[1], v.shape[3])

    close(moment, second(flat(patch)), what)
    # By positions the square is rounded.
    lost = np.abs(length - np.linalg.norm(gradients, axis=1)).max()
    assert lost <= 1e-7 * (1 + np.linalg.norm(whole) * np.linalg.norm(ys)), what
    for got in of_complex:
        matrices = kernel_matrices(geometry, turned[0])[0]
        want = np.linalg.norm(np.einsum("nor,no->nr", matrices, turned[1].reshape(3, -1)), axis=1)
        np.testing.assert_allclose(got, want, rtol=1e-7, err_msg=what)
    close(gram, gradients @ gradients.T, what)
    close(with_other, gradients @ gradients[1:].T, what)
    mean = patch.sum(2) / max(1, outputs)
    stacks = {"expand": (flat(patch), flat(y)), "reduce": (mean, y.sum(2))}
    for (a, g), (approx, bias) in zip(factors, approximations, strict=True):
        v, c = stacks[approx]
        close(a, second(bordered(v) if bias else v), what)
        close(g, second(c), what)


NAMED = {
    "strided": geometries.Geometry((1, 2, 9, 8), (3, 2, 3, 4), (2, 3), [(1, 2), (0, 1)]),
    "holes": geometries.Geometry((1, 2, 7), (2, 2, 5), (2,), [(2, 3)], (4,), (6,)),
}


CHOSEN, DISTANCES, POSITIONS = WAYS


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("strided", DISTANCES), ("holes", DISTANCES), ("grouped", DISTANCES),
        ("reflect", POSITIONS), ("batch groups", POSITIONS), ("NHWC", POSITIONS),
        ("no rows", CHOSEN), ("no spatial axes", CHOSEN),
    ],
    indirect=["way"],
)  # fmt: skip
def test_one_layer(name, way, rng):
    check((NAMED | geometries.CASES)[name], rng, name)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_random_layers(way, run_seed):
    for number in range(count("GEOMETRIES", 100)):
        rng = np.random.default_rng([run_seed, number, 23])
        geometry = geometries.random_geometry(rng)
        check(geometry, rng, f"JAXCONV_FC_SEED={run_seed}, number {number}: {geometry}")
        if number % 20 == 19:
            jax.clear_caches()


def test_norms_of_products_below_the_smallest_number(rng):
    """Gradients are within range where no product of an input and a cotangent is, by either way."""
    with jax.enable_x64(False):
        for channels, size in ((16, 2), (4, 28)):  # by pairs of positions, and by gradients
            spec = fc.conv_spec((1, channels, size, size), (channels, channels, 3, 3), (1, 1), "SAME")
            assert norms._positions_are_cheaper(spec, 1) == (size == 2)
            shapes = (1, *spec.in_shape), (1, *spec.out_shape)
            x, y = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
            tiny = np.float32(2.0**-64)

            def value(x, y, spec=spec):
                return curvature.gradient_norms(spec, x, y)[0]

            both = jax.jit(jax.value_and_grad(value))
            (one, slope), (small, small_slope) = both(x, y), both(x * tiny, y * tiny)
            np.testing.assert_allclose(small / tiny / tiny, one, rtol=1e-4)
            np.testing.assert_allclose(small_slope / tiny, slope, rtol=1e-4, atol=1e-4 * np.abs(slope).max())

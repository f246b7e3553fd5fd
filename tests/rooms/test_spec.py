"""ConvSpec: what it resolves, that it is a value (frozen, hashable, static), and its sizes."""

import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import geometries, random_geometry
from hypothesis import given
from jax import lax
from jax.export import symbolic_shape

import jaxconv_fc as fc

LAX_ORDER = [
    "lhs_shape",
    "rhs_shape",
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
]
PLAIN = ((2, 3, 8, 9), (4, 3, 3, 2), (1, 2), "SAME")


@pytest.fixture
def spec():
    return fc.conv_spec(*PLAIN)


# the arguments ---------------------------------------------------------------------------------------


def test_arguments_stand_in_the_order_of_lax():
    ours = list(inspect.signature(fc.conv_spec).parameters.values())
    theirs = list(inspect.signature(lax.conv_general_dilated).parameters)
    assert [p.name for p in ours] == [*LAX_ORDER, "padding_mode"]
    assert [p.name for p in ours[2:-1]] == theirs[2:9]
    assert ours[-1].kind is inspect.Parameter.KEYWORD_ONLY


def test_a_spec_carries_the_arguments_resolved(spec):
    assert spec.lhs_shape == (2, 3, 8, 9)
    assert spec.rhs_shape == (4, 3, 3, 2)
    assert spec.window_strides == (1, 2)
    assert spec.padding == ((1, 1), (0, 1))
    assert spec.lhs_dilation == spec.rhs_dilation == (1, 1)
    assert spec.dimension_numbers == lax.conv_dimension_numbers(*PLAIN[:2], None)
    assert (spec.feature_group_count, spec.batch_group_count, spec.padding_mode) == (1, 1, "zeros")


def test_numbers_are_python_ints():
    """A NumPy integer would make sizes overflow, and two equal specs print differently."""
    spec = fc.conv_spec(
        np.array([1, 2, 5]), np.array([2, 1, 3]), np.array([2]), np.array([[1, 1]]),
        np.array([1]), np.array([2]), None, np.int64(2),
    )  # fmt: skip
    numbers = [
        *spec.lhs_shape, *spec.rhs_shape, *spec.window_strides, *spec.padding[0], *spec.lhs_dilation,
        *spec.rhs_dilation, spec.feature_group_count, spec.nse, *spec.shape, *spec.in_shape, *spec.out_shape,
    ]  # fmt: skip
    assert {type(number) for number in numbers} == {int}
    assert hash(spec) == hash(fc.conv_spec((1, 2, 5), (2, 1, 3), (2,), [(1, 1)], None, (2,), None, 2))


SAME_MEANING = {
    "string padding": (PLAIN, {"padding": [(1, 1), (0, 1)]}),
    "lists": (PLAIN, {"window_strides": [1, 2]}),
    "ones": (PLAIN, {"lhs_dilation": (1, 1), "rhs_dilation": [1, 1]}),
    "strings": (PLAIN, {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    "numbers": (PLAIN, {"dimension_numbers": lax.ConvDimensionNumbers(*[(0, 1, 2, 3)] * 3)}),
    "lower case": (PLAIN, {"padding": "same"}),
    "numpy's name": (PLAIN, {"padding_mode": "constant"}),
}


@pytest.mark.parametrize("name", SAME_MEANING)
def test_equal_meaning_equal_spec(name):
    arguments, changed = SAME_MEANING[name]
    plain = fc.conv_spec(*arguments)
    other = fc.conv_spec(**(dict(zip(LAX_ORDER, arguments, strict=False)) | changed))
    assert other == plain
    assert hash(other) == hash(plain)


@pytest.mark.parametrize(("alias", "mode"), [("wrap", "circular"), ("replicate", "edge")])
def test_mode_aliases(alias, mode):
    one, other = (fc.conv_spec(*PLAIN, padding_mode=m) for m in (alias, mode))
    assert one == other
    assert one.padding_mode == mode


DIFFERENT = [
    {"window_strides": (2, 2)},
    {"padding": "VALID"},
    {"padding": "SAME_LOWER"},
    {"lhs_dilation": (1, 2), "padding": [(1, 1), (0, 1)]},
    {"rhs_dilation": (2, 1), "padding": [(1, 1), (0, 1)]},
    {"dimension_numbers": ("NCHW", "OIHW", "NHWC")},
    {"padding_mode": "edge"},
    {"rhs_shape": (5, 3, 3, 2)},
]


@pytest.mark.parametrize("changed", DIFFERENT)
def test_another_meaning_another_spec(changed, spec):
    assert fc.conv_spec(**(dict(zip(LAX_ORDER, PLAIN, strict=False)) | changed)) != spec


def test_the_batch_is_not_part_of_the_identity():
    """Three batches, one program; lhs_shape keeps what was given."""
    (n,) = symbolic_shape("n")
    specs = [fc.conv_spec((batch, *PLAIN[0][1:]), *PLAIN[1:]) for batch in (2, 0, 32, n)]
    assert len(set(specs)) == 1
    assert all(spec == specs[0] for spec in specs)
    assert [spec.lhs_shape[0] for spec in specs] == [2, 0, 32, n]
    traces = []
    traced = jax.jit(lambda spec, x: traces.append(spec) or x.reshape(spec.in_shape))
    for spec in specs:
        traced(spec, jnp.ones(spec.in_size))
    assert len(traces) == 1


def test_the_batch_groups_are_part_of_the_identity():
    def spec(batch, groups):
        return fc.conv_spec((batch, 3, 8), (4, 3, 3), (1,), "SAME", batch_group_count=groups)

    (n,) = symbolic_shape("n")
    assert spec(4, 2) == spec(8, 2) == spec(2 * n, 2)
    assert spec(4, 2) != spec(4, 4)
    assert spec(4, 2) != spec(4, 1)


def test_only_the_batch_may_be_symbolic():
    n, w = symbolic_shape("n, w")
    with pytest.raises(TypeError, match=r"lhs_shape\[2\] .* symbolic size w.* Only the batch"):
        fc.conv_spec((n, 3, w), (4, 3, 3), (1,), "SAME")
    with pytest.raises(TypeError, match=r"lhs_shape\[1\] .* symbolic size w"):
        fc.conv_spec((1, w, 8), (4, 3, 3), (1,), "SAME")
    with pytest.raises(TypeError, match=r"lhs_shape\[0\] .* symbolic size w"):
        fc.conv_spec((w, 8, n, 3), (3, 3, 3, 4), (1, 1), "SAME", None, None, ("HWNC", "HWIO", "HWNC"))
    with pytest.raises(TypeError, match=r"rhs_shape\[2\] must be an int, got w"):
        fc.conv_spec((n, 3, 8), (4, 3, w), (1,), "SAME")
    with pytest.raises(TypeError, match=r"window_strides\[0\] must be an int, got w"):
        fc.conv_spec((n, 3, 8), (4, 3, 3), (w,), "SAME")
    with pytest.raises(ValueError, match=r"batch_group_count=2 must divide the batch \(n,"):
        fc.conv_spec((n, 3, 8), (4, 3, 3), (1,), "SAME", batch_group_count=2)


def test_a_spec_is_not_another_type(spec):
    assert spec != PLAIN
    assert spec is not None


def test_frozen(spec):
    with pytest.raises(AttributeError):
        spec.padding = ((0, 0), (0, 0))
    with pytest.raises(AttributeError):
        del spec.padding


def test_repr_names_every_argument(spec):
    text = repr(spec)
    assert "\n" not in text
    for name, value in (("lhs_shape", "(2, 3, 8, 9)"), ("padding", "((1, 1), (0, 1))")):
        assert f"{name}={value}" in text


# static in pytrees -----------------------------------------------------------------------------------


def test_no_leaves_and_round_trip(spec):
    leaves, tree = jax.tree.flatten(spec)
    assert leaves == []
    assert jax.tree.unflatten(tree, leaves) == spec
    assert tree == jax.tree.structure(fc.conv_spec(*PLAIN))


def test_passes_through_jit_as_an_argument(spec):
    """Without static_argnames; an equal spec does not trace again, another one does."""
    traced = []

    @jax.jit
    def sizes(spec, x):
        traced.append(spec)
        return x * spec.out_size, spec

    value, same = sizes(spec, jnp.asarray(1))
    assert (int(value), same) == (spec.out_size, spec)
    sizes(fc.conv_spec(*PLAIN), jnp.asarray(2))
    assert len(traced) == 1
    other = fc.conv_spec(*PLAIN[:3], "VALID")
    assert int(sizes(other, jnp.asarray(1))[0]) == other.out_size
    assert len(traced) == 2


def test_passes_through_vmap_grad_and_scan(spec):
    def size(spec, x):
        return x * spec.in_size

    xs = jnp.arange(3.0)
    np.testing.assert_array_equal(jax.vmap(size, (None, 0))(spec, xs), xs * spec.in_size)
    np.testing.assert_array_equal(jax.vmap(lambda x: size(spec, x))(xs), xs * spec.in_size)
    assert jax.grad(size, argnums=1)(spec, 2.0) == spec.in_size
    (carried, _), _ = lax.scan(lambda carry, _: (carry, None), (spec, 0.0), None, length=2)
    assert carried == spec


def test_a_dict_key_and_set_member(spec):
    assert {spec: 1}[fc.conv_spec(*PLAIN)] == 1
    assert len({spec, fc.conv_spec(*PLAIN)}) == 1


# sizes -----------------------------------------------------------------------------------------------


@given(geometries())
def test_shapes_and_nse_are_the_oracles(geometry):
    spec = geometry.spec()
    assert tuple(spec.in_shape) == oracle.in_shape(geometry)
    assert tuple(spec.out_shape) == oracle.out_shape(geometry)
    assert tuple(spec.shape) == oracle.matrix_shape(geometry) == (spec.out_size, spec.in_size)
    assert spec.padding == oracle.pads(geometry)
    assert spec.nse == int(oracle.pattern(geometry).sum())


@pytest.mark.parametrize("padding", ["VALID", "SAME", "SAME_LOWER", "same"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("rhs_dilation", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_string_padding_is_laxs(padding, stride, rhs_dilation, k):
    for n in range(9):
        window = rhs_dilation * (k - 1) + 1
        want = lax.padtype_to_pads((n,), (window,), (stride,), padding.upper())
        spec = fc.conv_spec((1, 1, n), (1, 1, k), (stride,), padding, None, (rhs_dilation,))
        assert spec.padding == tuple(map(tuple, want))


@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("lhs_dilation", [2, 3])
def test_same_with_lhs_dilation_keeps_the_dilated_size(padding, stride, lhs_dilation):
    """lax refuses it; the meaning is SAME of the dilated input."""
    for n in range(1, 5):
        size = lhs_dilation * (n - 1) + 1
        spec = fc.conv_spec((1, 1, n), (1, 1, 3), (stride,), padding, (lhs_dilation,))
        assert spec.padding == tuple(map(tuple, lax.padtype_to_pads((size,), (3,), (stride,), padding)))
        assert spec.out_shape == (1, -(-size // stride))


def test_spatial_order_is_the_kernels():
    """Strides and padding follow the spatial letters of the kernel, as in lax."""
    numbers = ("WNHC", "IWOH", "HCWN")
    arguments = ((6, 2, 5, 3), (3, 3, 4, 2), (2, 1), [(2, 1), (1, 0)], None, None, numbers)
    spec = fc.conv_spec(*arguments)
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in arguments[:2]]
    batched = jax.eval_shape(lambda x, k: lax.conv_general_dilated(x, k, *arguments[2:]), *shapes)
    assert spec.in_shape == (6, 5, 3)
    assert spec.out_shape == batched.shape[:-1]


@pytest.mark.parametrize(
    ("groups", "in_shape"),
    [({}, (3, 5)), ({"feature_group_count": 3}, (3, 5)), ({"batch_group_count": 2}, (2, 3, 5))],
)
def test_an_example_is_one_batch_entry_of_each_batch_group(groups, in_shape):
    channels = 1 if "feature_group_count" in groups else 3
    spec = fc.conv_spec((4, 3, 5), (6, channels, 2), (1,), "VALID", **groups)
    assert spec.in_shape == in_shape
    assert spec.out_shape == (6, 4)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_the_batch_plays_no_part(batch):
    spec = fc.conv_spec((batch, 2, 5), (3, 2, 2), (1,), "VALID")
    assert (spec.shape, spec.in_shape, spec.nse) == ((12, 10), (2, 5), 3 * 2 * 2 * 4)


HUGE = [
    # 64 -> 64 channels, 3x3 SAME on 224x224: 3n - 2 pairs per axis
    (((1, 64, 224, 224), (64, 64, 3, 3), (1, 1), "SAME"), 64 * 64 * (3 * 224 - 2) ** 2),
    (((1, 3, 224, 224), (64, 3, 3, 3), (1, 1), "SAME"), 86_188_800),
    (((1, 10**4, *[10**5] * 3), (10**4, 10**4, 3, 3, 3), (1,) * 3, "SAME"), 10**8 * (3 * 10**5 - 2) ** 3),
    (((1, 1, 10**6), (1, 1, 2), (2,), "VALID"), 10**6),
    (((1, 64, 224, 224, 224), (64, 64, 3, 3, 3), (1, 1, 1), "SAME"), 64 * 64 * (3 * 224 - 2) ** 3),
    (((1, 1, 10**6), (1, 1, 10**3), (1,), "SAME"), 10**9 - 500 * 501 // 2 - 499 * 500 // 2),
]


@pytest.mark.parametrize(("arguments", "nse"), HUGE)
def test_huge_sizes_are_exact_python_ints_at_once(arguments, nse):
    start = time.perf_counter()
    spec = fc.conv_spec(*arguments)
    assert spec.nse == nse
    assert type(spec.nse) is int
    assert spec.shape == (spec.out_size, spec.in_size)
    assert type(spec.out_size) is type(spec.in_size) is int
    assert time.perf_counter() - start < 2


def test_nse_of_many_random_geometries(run_seed):
    """Steps that do not divide the padding, where a tap begins to read at a quotient rounded up."""
    for i in range(300):
        geometry = random_geometry(np.random.default_rng([run_seed, i, 8]))
        counted = len(np.unique(oracle.triples(geometry)[:2], axis=1).T)
        assert geometry.spec().nse == counted, f"JAXCONV_FC_SEED={run_seed}, number {i}: {geometry}"


def test_an_input_beyond_int32_with_few_entries():
    """Three entries stand in columns up to 2**31: it is the width that decides, not their number."""
    spec = fc.conv_spec((1, 1, 2**31 + 8), (1, 1, 1), (2**30,), "VALID")
    assert (spec.out_size, spec.nse) == (3, 3)
    assert spec.nbytes("float32").bcsr == 3 * (4 + 8) + 4 * 8
    matrix = fc.as_scipy(spec, np.array([[[5.0]]]))
    np.testing.assert_array_equal(matrix.indices, [0, 2**30, 2**31])
    assert fc.as_bcsr(spec, np.array([[[5.0]]])).indices.tolist() == [0, 2**30, 2**31]
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        fc.as_bcsr(spec, np.ones((1, 1, 1), np.float32))


def test_sizes_are_printed_in_the_largest_unit_that_is_not_beyond_them():
    sizes = fc.conv_spec((1, 1, 16), (1, 1, 1), (1,), "VALID").nbytes("float32")
    lines = str(sizes).splitlines()
    assert lines[0].split() == ["dense", "1,024", "bytes", "1", "KiB"]
    assert lines[1].split() == ["bcoo", "192", "bytes", "192", "bytes"]


def test_a_window_that_does_not_fit_gives_no_rows():
    spec = fc.conv_spec((1, 2, 3), (4, 2, 5), (1,), "VALID")
    assert (spec.shape, spec.out_shape, spec.nse) == ((0, 6), (4, 0), 0)

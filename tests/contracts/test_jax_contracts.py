"""Every assumption of the library about JAX, one per test: a release that changes one fails a test here.

None of these tests calls the library.
"""

import dataclasses
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.jet import jet, jet_rules
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

ZEROS = np.zeros(3)


# scatter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "want"),
    [(3, [0, 0, 0]), (100, [0, 0, 0]), (-4, [0, 0, 0]), (-1, [0, 0, 5]), (1, [0, 5, 0])],
)
def test_drop_drops_one_past_the_end_but_wraps_minus_one(index, want):
    """So the sentinel of a tap that reads padding must be one past the end."""
    got = jnp.asarray(ZEROS).at[jnp.array([index])].add(5.0, mode="drop")
    np.testing.assert_array_equal(got, want)


def test_drop_drops_a_pair_if_either_index_is_outside():
    """Column one past the end: the entry is dropped, and does not run on into the next row."""
    got = jnp.zeros((2, 2)).at[jnp.array([0, 1]), jnp.array([2, 0])].add(jnp.array([7.0, 8.0]), mode="drop")
    np.testing.assert_array_equal(got, [[0, 0], [8, 0]])


def test_add_adds_where_indices_collide():
    got = jnp.zeros(2, np.int8).at[jnp.array([1, 1])].add(jnp.array([100, 100], np.int8))
    np.testing.assert_array_equal(got, [0, -56])


def test_max_of_bools_is_or():
    got = (
        jnp.zeros(3, bool).at[jnp.array([0, 0, 1, 3])].max(jnp.array([True, False, False, True]), mode="drop")
    )
    np.testing.assert_array_equal(got, [True, False, False])


@pytest.mark.parametrize("unique", [False, True])
def test_scatter_add_has_a_linear_transpose(unique):
    """The transpose gathers; a dropped value gets the cotangent 0."""

    def scatter(values):
        return jnp.asarray(ZEROS).at[jnp.array([2, 3, 0])].add(values, mode="drop", unique_indices=unique)

    (got,) = jax.linear_transpose(scatter, np.ones(3))(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(got, [3, 0, 1])


def test_scatter_set_has_one_only_if_indices_are_unique():
    def scatter(values, unique):
        return jnp.asarray(ZEROS).at[jnp.array([2, 0])].set(values, unique_indices=unique)

    values, cotangent = np.ones(2), np.array([1.0, 2.0, 3.0])
    with pytest.raises(NotImplementedError, match="unique_indices"):
        jax.linear_transpose(partial(scatter, unique=False), values)(cotangent)
    (got,) = jax.linear_transpose(partial(scatter, unique=True), values)(cotangent)
    np.testing.assert_array_equal(got, [3, 1])


# linear transposition --------------------------------------------------------------------------------


def correlate(kernel, x):
    return lax.conv_general_dilated(x, kernel, (1,), "VALID")


def test_the_integer_adjoint_of_a_convolution_is_silently_float0():
    kernel, x = np.array([[[1, 2]]], np.int32), np.ones((1, 1, 3), np.int32)
    with jax.default_device(jax.devices("cpu")[0]):  # a GPU has no integer convolutions
        (got,) = jax.linear_transpose(partial(correlate, kernel), x)(np.ones((1, 1, 2), np.int32))
    assert got.dtype == jax.dtypes.float0


def test_other_integer_adjoints_are_numbers():
    """Scatter-add and products of integers transpose as they should: integers are not refused as such."""
    values = np.array([1, 2], np.int32)

    def scatter(v):
        return jnp.zeros(3, np.int32).at[jnp.array([0, 2])].add(3 * v)

    (got,) = jax.linear_transpose(scatter, values)(np.array([1, 2, 5], np.int32))
    np.testing.assert_array_equal(got, [3, 15])


def test_an_affine_function_is_silently_accepted():
    """linear_transpose does not check linearity, so it cannot stand in for a test of it."""
    (got,) = jax.linear_transpose(lambda v: 3 * v + 1, np.float32(2))(np.float32(5))
    assert got == 15


@pytest.mark.parametrize("way", ["vjp", "linear_transpose"])
def test_the_complex_transpose_is_plain(way):
    """No conjugate: M^T, not M^H."""
    kernel, x = np.array([[[1 + 2j, 3j]]]), np.ones((1, 1, 2), complex)
    apply = partial(correlate, kernel)
    pull = jax.vjp(apply, x)[1] if way == "vjp" else jax.linear_transpose(apply, x)
    (got,) = pull(jnp.array([[[1j]]]))
    np.testing.assert_array_equal(got, kernel * 1j)


# lax.pad and lax.conv_general_dilated ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("lo", "hi", "interior", "want"),
    [
        (-1, -2, 0, [2]),
        (-1, 1, 0, [2, 3, 4, 0]),
        (-6, 8, 0, [0, 0, 0, 0, 0, 0]),
        (-2, 1, 1, [2, 0, 3, 0, 4, 0]),
        (-2, -2, 0, []),
    ],
)
def test_pad_crops_by_negative_amounts(lo, hi, interior, want):
    """After the interior padding; high padding fills up what a low crop took beyond the axis."""
    x = np.arange(1.0, 5.0, dtype=np.float32)
    np.testing.assert_array_equal(lax.pad(x, np.float32(0), [(lo, hi, interior)]), want)
    (back,) = jax.linear_transpose(lambda v: lax.pad(v, np.float32(0), [(lo, hi, interior)]), x)(
        np.ones(len(want), np.float32)
    )
    np.testing.assert_array_equal(back, np.isin(x, want))


def test_same_is_refused_with_lhs_dilation():
    with pytest.raises(ValueError, match="padding"):
        lax.conv_general_dilated(np.ones((1, 1, 4)), np.ones((1, 1, 3)), (1,), "SAME", (2,))


def test_a_window_that_does_not_fit_gives_size_zero():
    got = lax.conv_general_dilated(np.ones((1, 1, 2)), np.ones((1, 1, 5)), (1,), "VALID")
    assert got.shape == (1, 1, 0)


def test_spatial_axes_stand_in_the_order_of_the_kernels_letters():
    numbers = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "WIHO", "HWCN"))
    assert numbers == lax.ConvDimensionNumbers((0, 3, 2, 1), (3, 1, 0, 2), (3, 2, 1, 0))


def test_the_batch_is_group_major():
    """With two batch groups, example j holds the entries j and N' + j; out channel d reads group d."""
    x = np.array([1.0, 10, 100, 1000]).reshape(4, 1, 1)
    got = lax.conv_general_dilated(x, np.ones((2, 1, 1)), (1,), "VALID", batch_group_count=2)
    np.testing.assert_array_equal(got[..., 0], [[1, 100], [10, 1000]])


def test_feature_groups_are_blocks_of_channels():
    x = np.array([1.0, 10, 100, 1000]).reshape(1, 4, 1)
    got = lax.conv_general_dilated(x, np.ones((2, 2, 1)), (1,), "VALID", feature_group_count=2)
    np.testing.assert_array_equal(got[0, :, 0], [11, 1100])


# a bilinear primitive --------------------------------------------------------------------------------
# The matrix-free pair is one: its own derivatives, its own batching, lowered by an ordinary function.

outer_p = Primitive("test_outer")


def _outer(a, b, *, spec):
    return jnp.einsum(spec, a, b)


def _transposed(operand, ct, a, b, *, spec):
    """The derivative of c_ij = a_i b_j in one operand, itself an einsum of the same primitive."""
    left, right = spec.split("->")[0].split(",")
    out = spec.split("->")[1]
    other, letters, wanted = (b, right, left) if operand == 0 else (a, left, right)
    return outer_p.bind(ct, other, spec=f"{out},{letters}->{wanted}")


def _batched(arguments, axes, *, spec):
    terms, out = spec.split("->")
    moved = [v if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(arguments, axes, strict=True)]
    letter = next(c for c in "xyz" if c not in spec)
    marked = [t if d is None else letter + t for t, d in zip(terms.split(","), axes, strict=True)]
    return outer_p.bind(*moved, spec=f"{','.join(marked)}->{letter}{out}"), 0


outer_p.def_impl(jax.jit(_outer, static_argnames="spec"))
outer_p.def_abstract_eval(lambda a, b, *, spec: jax.core.ShapedArray(
    tuple(dict(zip("".join(spec.split("->")[0].split(",")), a.shape + b.shape, strict=True))[c]
          for c in spec.split("->")[1]), a.dtype))  # fmt: skip
mlir.register_lowering(outer_p, mlir.lower_fun(_outer, multiple_results=False))
ad.defbilinear(outer_p, partial(_transposed, 0), partial(_transposed, 1))
batching.primitive_batchers[outer_p] = _batched


def outer(a, b):
    return outer_p.bind(a, b, spec="i,j->ij")


A, B = np.arange(1.0, 3.0), np.arange(3.0, 6.0)
C = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_a_bilinear_primitive_evaluates_and_lowers(transform):
    np.testing.assert_array_equal(transform(outer)(A, B), np.outer(A, B))


def test_a_bilinear_primitive_differentiates():
    """jvp by the product rule, both vjps, and a second derivative through the transpose rule."""
    value, pushed = jax.jvp(outer, (A, B), (A + 1, B - 1))
    np.testing.assert_array_equal(value, np.outer(A, B))
    np.testing.assert_array_equal(pushed, np.outer(A + 1, B) + np.outer(A, B - 1))
    of_a, of_b = jax.vjp(outer, A, B)[1](jnp.asarray(C))
    np.testing.assert_array_equal(of_a, C @ B)
    np.testing.assert_array_equal(of_b, A @ C)
    mixed = jax.jacfwd(jax.grad(lambda a, b: (outer(a, b) * C).sum()), argnums=1)(A, B)
    np.testing.assert_array_equal(mixed, C)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.complex64])
def test_a_bilinear_primitive_transposes_in_any_dtype(dtype):
    """Integers too: the rule is ours, so no float0; and complex numbers are not conjugated."""
    scale = dtype(1j) if dtype is np.complex64 else dtype(1)
    a, b, c = ((v * scale).astype(dtype) for v in (A, B, C))
    (got,) = jax.linear_transpose(lambda v: outer(v, b), a)(c)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, c @ b)


def test_a_bilinear_primitive_batches():
    """One operand, both, nested, and the gradient of a batch."""
    stack = np.stack([A, 2 * A])
    np.testing.assert_array_equal(jax.vmap(outer, (0, None))(stack, B), [np.outer(a, B) for a in stack])
    both = jax.vmap(outer)(stack, np.stack([B, B + 1]))
    np.testing.assert_array_equal(both[1], np.outer(2 * A, B + 1))
    nested = jax.vmap(jax.vmap(outer, (None, 0)), (1, None))(stack.T, np.stack([B, B + 1]))
    np.testing.assert_array_equal(nested[1, 1], np.outer(2 * A, B + 1))
    weights = np.stack([C, C])
    total = jax.grad(lambda b: (jax.vmap(outer, (0, None))(stack, b) * weights).sum())(jnp.asarray(B))
    np.testing.assert_array_equal(total, 3 * (A @ C))


def test_a_bilinear_primitive_runs_in_loops():
    looped = lax.fori_loop(0, 3, lambda _, b: outer(A, b).sum(0), jnp.asarray(B))
    np.testing.assert_array_equal(looped, 27 * B)


def test_a_symbolic_zero_cotangent_stays_out():
    """A result nobody uses asks for no derivative."""
    gradient = jax.grad(lambda a: a.sum() + 0 * outer(a, B).shape[0])(jnp.asarray(A))
    np.testing.assert_array_equal(gradient, np.ones(2))


def test_a_primitive_evaluated_as_those_of_lax_obeys_disable_jit():
    """A rule that calls ``jax.jit`` of its own bind would call itself for ever."""
    twice_p = Primitive("test_twice")
    twice_p.def_impl(partial(xla.apply_primitive, twice_p))
    twice_p.def_abstract_eval(lambda x, *, times: x)
    mlir.register_lowering(twice_p, mlir.lower_fun(lambda x, *, times: x * times, multiple_results=False))
    with jax.disable_jit():
        assert twice_p.bind(jnp.float32(3), times=2) == 6
    assert twice_p.bind(jnp.float32(3), times=2) == 6


def test_jet_gives_its_rules_coefficients_without_factorials():
    """A rule gets and returns the terms ``f / n!`` of the series, every zero as an array."""
    seen = []
    probe_p = Primitive("test_probe")
    probe_p.def_impl(lambda x: x)
    probe_p.def_abstract_eval(lambda x: x)
    jet_rules[probe_p] = lambda primals, series: seen.append(series) or (primals[0], series[0])
    jet(lambda t: probe_p.bind(t * t), (3.0,), ((1.0, 0.0, 0.0),))
    np.testing.assert_allclose(seen, [[[6.0, 1.0, 0.0]]], rtol=1e-12)  # (3 + t)**2 = 9 + 6 t + t**2


# static pytrees, settings, programs ------------------------------------------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    size: int

    @cached_property
    def double(self):
        return 2 * self.size


def test_register_static_makes_a_value_without_leaves():
    """Equal values are one cache entry of jit, whatever they have cached themselves."""
    traced = []

    @jax.jit
    def scale(static, x):
        traced.append(static)
        return static.double * x, static

    first, second = Static(3), Static(3)
    assert first.double == 6
    assert jax.tree.leaves(first) == []
    value, returned = scale(first, 2)
    assert (int(value), returned) == (12, second)
    scale(second, 5)
    assert len(traced) == 1
    assert int(scale(Static(4), 1)[0]) == 8


def test_x64_can_be_switched_in_a_block():
    with jax.enable_x64(False):
        assert jnp.zeros(1).dtype == np.float32
        assert not jax.config.jax_enable_x64
        assert jnp.asarray(np.arange(2)).dtype == np.int32
    assert jnp.zeros(1).dtype == np.float64


def test_a_tracer_is_known_by_its_type():
    seen = []
    jax.jit(lambda v: seen.append(isinstance(v, jax.core.Tracer)))(1)
    assert seen == [True]
    assert not isinstance(jnp.asarray(1), jax.core.Tracer)


def test_a_compiled_program_tells_its_memory():
    memory = jax.jit(lambda v: v + 1).lower(np.ones(1000, np.float32)).compile().memory_analysis()
    assert memory.output_size_in_bytes >= 4000
    assert memory.temp_size_in_bytes >= 0


def test_a_large_constant_shows_in_the_text_and_an_iota_does_not():
    """What the test of 'no index array is baked in' relies on."""
    baked = jax.jit(lambda: jnp.asarray(np.arange(5000) ** 2)).lower().as_text()
    derived = jax.jit(lambda: lax.iota(np.int64, 5000) ** 2).lower().as_text()
    assert len(baked) > 50_000
    assert len(derived) < 2_000


# types of arrays: varying axes and partitions ----------------------------------------------------------


def one_device(explicit=False):
    """One device is enough: types do not depend on how many there are."""
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    return jax.make_mesh((1,), ("d",), axis_types=(kind,))


def in_shard_map(fn, *specs):
    mapped = jax.shard_map(fn, mesh=one_device(), in_specs=specs, out_specs=jax.P("d"))
    return mapped(*(jnp.ones((1, 2)) for _ in specs))


def test_a_type_names_its_varying_axes_and_update_changes_them():
    def check(x, y):
        dealt, shared = jax.typeof(x), jax.typeof(y)
        assert dealt.manual_axis_type.varying == frozenset({"d"})
        assert shared.manual_axis_type.varying == frozenset()
        assert dealt.update(shape=(3,), sharding=None if dealt.sharding.mesh.empty else jax.NamedSharding(
            dealt.sharding.mesh, jax.P(None))).manual_axis_type.varying == frozenset({"d"})  # fmt: skip
        none = jax.sharding.ManualAxisType(varying=frozenset())
        assert dealt.update(manual_axis_type=none) == shared
        return x

    in_shard_map(check, jax.P("d"), jax.P())
    assert jax.typeof(jnp.ones(2)).manual_axis_type.varying == frozenset()


def test_pcast_makes_a_value_vary_and_refuses_one_that_does():
    def check(x, y):
        assert jax.typeof(lax.pcast(y, ("d",), to="varying")) == jax.typeof(x)
        with pytest.raises(ValueError, match="pcast"):
            lax.pcast(x, ("d",), to="varying")
        return x

    in_shard_map(check, jax.P("d"), jax.P())


def test_the_transpose_of_pcast_is_a_sum_over_devices():
    def loss(y):
        return lax.psum(lax.pcast(y, ("d",), to="varying").sum(), "d")

    mapped = jax.shard_map(jax.grad(loss), mesh=one_device(), in_specs=jax.P(), out_specs=jax.P())
    assert "psum" in str(jax.make_jaxpr(mapped)(jnp.ones(2)))


def test_a_primitive_gets_the_types_of_its_operands_as_they_are():
    """bind casts nothing: a rule sees one operand varying and the other not."""
    seen = []
    probe = Primitive("probe")
    probe.def_abstract_eval(lambda a, b: seen.append((a, b)) or a)
    mlir.register_lowering(probe, lambda ctx, a, b: [a])

    def check(x, y):
        return probe.bind(x, y)

    jax.eval_shape(lambda *a: in_shard_map(check, jax.P("d"), jax.P()))
    assert [v.manual_axis_type.varying for v in seen[0]] == [frozenset({"d"}), frozenset()]


def test_products_of_sparse_matrices_lose_the_varying_axes():
    """A bug of JAX. as_bcoo, as_bcsr and docs/sparse.md warn of it. Remove the warnings if JAX is mended."""
    from jax.experimental import sparse

    def check(x):
        matrix = sparse.BCOO.fromdense(jnp.eye(2), nse=2)
        lost.append(jax.typeof(matrix @ x[0]).manual_axis_type.varying)
        return x

    lost = []
    in_shard_map(check, jax.P("d"))
    assert lost == [frozenset()]


def test_explicit_axes_stand_in_the_type_and_auto_axes_hides_them():
    mesh = one_device(explicit=True)
    inside = []

    def check(x):
        inside.append(jax.typeof(x).sharding.spec)
        return x.reshape(-1)

    x = jax.device_put(jnp.ones((2, 3)), jax.NamedSharding(mesh, jax.P("d")))
    assert jax.typeof(x).sharding.spec == jax.P("d", None)
    assert jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
    whole = jax.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        y = jax.jit(jax.sharding.auto_axes(check, axes=("d",), out_sharding=whole))(x)
    assert inside[-1] == jax.P(None, None)
    assert jax.typeof(y).sharding.spec == jax.P(None)


def test_without_a_mesh_a_type_has_an_empty_one():
    assert jax.typeof(jnp.ones(2)).sharding.mesh.empty
    assert jax.sharding.get_abstract_mesh().empty


# gradients of extremes -------------------------------------------------------------------------------


def bound_and_double(extreme):
    """A maximum of one entry, itself one of two values of which the smaller counts."""

    def length(m):
        square = (m * m).sum(-1, keepdims=True).sum(-2, keepdims=True)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

    def smaller(m):
        scale = length(m)
        unit = m / scale
        gram = jnp.swapaxes(unit, -1, -2) @ unit
        size = jnp.sqrt(length(gram) * (1 + 1e-5) + 1e-5)
        rows = jnp.abs(m).sum(-1, keepdims=True)
        bound = extreme((scale * (1 + 1e-5) * size)[..., 0, 0]) + 1e-6 * extreme(length(rows)[..., 0, 0])
        return jnp.min(jnp.stack([bound, 2 * bound]))

    return smaller


def test_the_jitted_gradient_of_a_maximum_can_be_that_of_none_of_its_entries():
    """``jnp.max`` is differentiated by asking which entries equal the maximum, and how many do. XLA computes
    the entries again where it asks, with other roundings than where it counts: ``0 / 1`` in place of
    ``1 / 1``. With the place of ``argmax`` the gradient is right. Should this turn red, ``largest`` and
    ``least`` of the library may become ``jnp.max`` and ``jnp.min``.
    """
    optimised = {"xla_backend_optimization_level": 3}
    kernels = np.random.default_rng(0).standard_normal((40, 1, 1, 8, 8)).astype(np.float32)

    def lost(extreme):
        slope = jax.jit(jax.grad(bound_and_double(extreme)), compiler_options=optimised)
        return sum(float(jnp.abs(slope(m)).max()) < 1e-2 for m in kernels)

    assert lost(lambda v: v.ravel()[jnp.argmax(v)]) == 0
    if jax.default_backend() == "cpu":
        assert lost(jnp.max) > 0


def test_a_barrier_keeps_constant_factors_apart():
    """XLA of jax 0.10 multiplies constants first, so that ``(x * 2**127) * 2**100`` overflows."""
    first, second = (jnp.float32(2.0**e) for e in (127, 100))
    x = jnp.float32(2.0**-120)
    keep = lax.optimization_barrier
    assert jax.jit(lambda x: (x * keep(first)) * keep(second))(x) == 2.0**107

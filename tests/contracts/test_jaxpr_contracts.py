"""What the rooms of functions/ take for granted about jaxprs, one assumption per test.

Red here means that JAX has changed, not that the mathematics is wrong.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core.primitives import conv_general_dilated_p

from jaxconv_fc.functions.jaxprs import (
    CALLS,
    DERIVATIVES,
    WRITES,
    eval_eqn,
    inner_jaxprs,
    open_jaxpr,
    scan_counts,
)

V = jnp.arange(3.0)
IMAGE = jnp.ones((1, 1, 4, 4))


def equations(fn, *args):
    return open_jaxpr(jax.make_jaxpr(fn)(*args))[0].eqns


def test_a_convolution_is_one_equation_with_its_geometry():
    (eqn,) = equations(lambda x, k: lax.conv(x, k, (1, 1), "SAME"), IMAGE, jnp.ones((1, 1, 3, 3)))
    assert eqn.primitive is conv_general_dilated_p
    assert {
        "window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision",
        "feature_group_count", "batch_group_count", "preferred_element_type",
    } <= set(eqn.params)  # fmt: skip
    assert eqn.params["padding"] == ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (jax.jit(jnp.sin), "jit"),
        (jax.checkpoint(jnp.sin), "remat2"),
        (jax.nn.relu, "custom_jvp_call"),
    ],
)
def test_calls_hold_one_jaxpr_on_their_own_operands(fn, name):
    (eqn,) = equations(fn, V)
    assert eqn.primitive.name in (name, "checkpoint", "pjit")
    assert eqn.primitive.name in CALLS
    (inner,) = inner_jaxprs(eqn)
    assert len(open_jaxpr(inner)[0].invars) == len(eqn.invars)
    np.testing.assert_array_equal(eval_eqn(eqn, [V])[0], fn(V))


def test_remat_has_its_options():
    policy = jax.checkpoint_policies.dots_saveable
    (eqn,) = equations(jax.checkpoint(jnp.sin, prevent_cse=False, policy=policy), V)
    assert eqn.params["prevent_cse"] is False
    assert eqn.params["policy"] is policy


def test_policies_are_asked_about_a_primitive_and_save_convolutions():
    policy = jax.checkpoint_policies.dots_saveable
    assert policy(lax.conv_general_dilated_p)
    assert not policy(lax.sin_p)


def test_a_result_can_be_made_weakly_typed():
    weak = lax.convert_element_type_p.bind(V, new_dtype=V.dtype, weak_type=True, sharding=None)
    assert (weak.dtype, weak.weak_type) == (V.dtype, True)


def test_one_equation_is_evaluated_alone():
    """With other operands, a literal among them, with other parameters, in the context of its trace."""
    scale, slope = equations(lambda x: lax.slice(x * 2.0, (1,), (3,)), V)
    assert [type(v) is Literal for v in scale.invars] == [False, True]
    assert scale.invars[1].val == 2
    np.testing.assert_array_equal(eval_eqn(scale, [V, jnp.full((), 5.0)])[0], 5 * V)
    np.testing.assert_array_equal(eval_eqn(slope, [V], slope.params | {"start_indices": (0,)})[0], V)
    with jax.named_scope("then"):
        (then,) = equations(jax.named_scope("inner")(jnp.negative), V)
    (again,) = equations(lambda x: eval_eqn(then, [x])[0], V)
    assert str(again.source_info.name_stack) == "inner"
    lines = [[(f.file_name, f.line_num) for f in e.source_info.traceback.frames] for e in (then, again)]
    assert lines[0] == lines[1]


def test_constants_are_kept_beside_the_equations():
    large = jnp.arange(100.0)
    closed = jax.make_jaxpr(lambda x: x + large)(large)
    inner, constants = open_jaxpr(closed)
    assert (len(inner.constvars), len(inner.invars), len(constants)) == (1, 1, 1)
    assert constants[0] is large


def test_results_that_nobody_reads_have_variables_too():
    (eqn,) = equations(jax.jit(lambda x: lax.top_k(x, 1)[0]), V)
    (inner,) = inner_jaxprs(eqn)
    top = next(e for e in open_jaxpr(inner)[0].eqns if e.primitive.name == "top_k")
    assert len(top.outvars) == len(eval_eqn(top, [V])) >= 2


def test_a_linear_solve_names_the_jaxpr_that_solves():
    eqn = equations(lambda x: jax.scipy.sparse.linalg.cg(lambda v: 2 * v, x)[0], V)[-1]
    while eqn.primitive.name in CALLS:
        eqn = open_jaxpr(inner_jaxprs(eqn)[0])[0].eqns[-1]
    assert eqn.primitive.name == "custom_linear_solve"
    assert eqn.params["jaxprs"].solve in inner_jaxprs(eqn)
    assert hasattr(eqn.params["jaxprs"], "_fields")


def test_custom_vjp_calls_bind_with_their_rule():
    f = jax.custom_vjp(jnp.sin)
    f.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (100 * g,))
    (eqn,) = equations(f, V)
    assert eqn.primitive.name == "custom_vjp_call"
    assert eqn.params["num_consts"] == 0
    np.testing.assert_array_equal(jax.vjp(lambda x: eval_eqn(eqn, [x])[0], V)[1](V)[0], 100 * V)


def test_a_pullback_is_a_pytree_that_leaves_a_trace():
    residuals = jax.jit(lambda x: jax.vjp(jnp.sin, x)[1])(V)
    np.testing.assert_allclose(residuals(jnp.ones(3))[0], jnp.cos(V))


def test_rules_for_derivatives_are_parameters_of_their_own():
    """What else a call says is compared, when one program is looked for again."""
    with_jvp, with_vjp = jax.custom_jvp(jnp.sin), jax.custom_vjp(jnp.sin)
    with_jvp.defjvps(lambda t, out, x: t)
    with_vjp.defvjp(lambda x: (x, None), lambda _, g: (g,))
    for fn in (with_jvp, with_vjp):
        (eqn,) = equations(fn, V)
        rules = {name for name, value in eqn.params.items() if callable(value)}
        assert rules <= DERIVATIVES[eqn.primitive.name] <= {*eqn.params}


def test_constants_of_a_jaxpr_can_become_inputs_and_constants_again():
    """Other constants. Newer versions of JAX keep the constants in the jaxpr itself."""
    closed = jax.make_jaxpr(lambda x: x + jnp.array([1.0, 2.0, 3.0]) * 2.0)(V)
    inner, constants = open_jaxpr(closed)
    inputs = [*inner.constvars, *inner.invars]
    bare = Jaxpr([], inputs, inner.outvars, inner.eqns, inner.effects, inner.debug_info)
    assert not open_jaxpr(bare)[1]
    assert list(bare.invars) == inputs
    count = len(constants)
    jaxpr = Jaxpr(inputs[:count], inputs[count:], bare.outvars, bare.eqns, bare.effects, inner.debug_info)
    again, others = open_jaxpr(ClosedJaxpr(jaxpr, [2 * c for c in constants]))
    assert list(again.constvars) == inputs[:count]
    (got,) = jax.core.eval_jaxpr(again, others, V)
    np.testing.assert_array_equal(got, V + jnp.array([2.0, 4.0, 6.0]) * (1 + bool(count)))


def test_a_mesh_is_callable_and_compares_by_its_identity():
    """Parameters of jit hold one; functions among the parameters cannot be compared, a mesh can."""
    eqn = equations(jax.jit(jnp.sin), V)[0]
    assert [type(v) for v in eqn.params.values() if callable(v)] == [jax.sharding.Mesh]
    again = equations(jax.jit(jnp.cos), V)[0]
    assert eqn.params["ctx_mesh"] == again.params["ctx_mesh"]


def test_writes_to_mutable_arrays():
    def fn(x):
        state = jax.new_ref(jnp.zeros(3))
        state[...] = x
        jax.ref.addupdate(state, ..., x)
        return state[...]

    eqns = equations(fn, V)
    names = [e.primitive.name for e in eqns]
    assert {"swap", "addupdate"} <= set(names) & WRITES
    assert set(names) <= {"broadcast_in_dim", "new_ref", "get", *WRITES}
    (made,) = next(e.outvars for e in eqns if e.primitive.name == "new_ref")
    assert not isinstance(made.aval, jax.core.ShapedArray)  # so that find_convs knows them apart


def test_sums_over_mapped_positions_name_axes_by_number():
    eqn = equations(jax.vmap(lambda a: jax.lax.psum(a, "i"), axis_name="i"), V)[0]
    assert eqn.primitive.name == "psum"
    assert eqn.params["axes"] == (0,)


def test_custom_vmap_calls_have_that_name():
    f = jax.custom_batching.custom_vmap(jnp.sin)
    f.def_vmap(lambda n, b, x: (jnp.sin(x), True))
    assert equations(f, V)[0].primitive.name in CALLS


def test_loops_and_branches():
    xs = jnp.ones((4, 3))
    (scan,) = equations(lambda c, w, xs: lax.scan(lambda c, x: (c * w + x, c.sum()), c, xs), V, V, xs)
    (body,) = inner_jaxprs(scan)
    assert (scan.primitive.name, scan.params["length"], scan.params["reverse"]) == ("scan", 4, False)
    assert scan_counts(scan, body) == (1, 1)
    loop = equations(lambda x: lax.while_loop(lambda s: s.sum() < 9, lambda s: s * V, x), V)[-1]
    assert loop.primitive.name == "while"
    assert {"cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"} <= set(loop.params)
    cond = equations(lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), V)[-1]
    assert cond.primitive.name == "cond"
    assert len(inner_jaxprs(cond)) == 2


def test_a_scan_takes_a_rewritten_jaxpr():
    (eqn,) = equations(lambda x: lax.scan(lambda c, _: (c * 2, None), x, None, length=3)[0], V)
    (body,) = inner_jaxprs(eqn)
    tripled = jax.make_jaxpr(lambda c: c * 3)(open_jaxpr(body)[0].invars[0].aval)
    assert isinstance(tripled, ClosedJaxpr | Jaxpr)
    (key,) = [k for k, v in eqn.params.items() if isinstance(v, ClosedJaxpr | Jaxpr)]
    np.testing.assert_array_equal(eval_eqn(eqn, [V], eqn.params | {key: tripled})[0], 27 * V)


def test_shard_map_parameters():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    eqn = equations(jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec), V)[-1]
    assert eqn.primitive.name == "shard_map"
    assert {"mesh", "in_specs", "out_specs", "newly_manual_axes", "check_vma", "jaxpr"} <= set(eqn.params)


def test_equations_know_where_they_come_from():
    with jax.named_scope("layer"):
        (eqn,) = equations(lambda x: x + x, V)
    files = {os.path.basename(frame.file_name) for frame in eqn.source_info.traceback.frames}
    assert "test_jaxpr_contracts.py" in files
    (eqn,) = equations(jax.named_scope("layer")(lambda x: x + x), V)
    assert str(eqn.source_info.name_stack) == "layer"


def pooled(reduce, start):
    return lax.reduce_window(IMAGE, start, reduce, (1, 1, 2, 2), (1, 1, 1, 1), "VALID")


NAMES = {
    "select_n": lambda: jnp.where(jnp.array([True, False, True]), V, V + 1),
    "concatenate": lambda: jnp.concatenate([V, V]),
    "gather": lambda: V[jnp.array([0, 1])],
    "dynamic_slice": lambda: lax.dynamic_slice(V, (1,), (2,)),
    "dynamic_update_slice": lambda: lax.dynamic_update_slice(V, V[:1], (1,)),
    "broadcast_in_dim": lambda: jnp.broadcast_to(V, (2, 3)),
    "rev": lambda: V[::-1],
    "pad": lambda: lax.pad(V, jnp.zeros(()), [(1, 1, 0)]),
    "split": lambda: lax.split(V, (1, 2)),
    "reduce_sum": lambda: V.sum(),
    "cumsum": lambda: jnp.cumsum(V),
    "fft": lambda: jnp.fft.fft(V),
    "scatter-add": lambda: V.at[jnp.array([0])].add(1.0),
    "reduce_window_sum": lambda: pooled(lax.add, 0.0),
    "reduce_window_max": lambda: pooled(lax.max, -jnp.inf),
    "max": lambda: jnp.maximum(V, 1.0),
    "clamp": lambda: lax.clamp(0.0, V, 1.0),
    "reduce_max": lambda: V.max(),
    "abs": lambda: abs(V),
    "sign": lambda: jnp.sign(V),
}


def every_equation(jaxpr):
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from every_equation(inner)


@pytest.mark.parametrize("name", NAMES)
def test_primitives_have_the_names_that_affine_reads(name):
    assert name in {eqn.primitive.name for eqn in every_equation(jax.make_jaxpr(NAMES[name])())}


MOVES = {  # primitive: (a call, what moves.py reads of its parameters, how many operands it has)
    "transpose": (lambda: IMAGE.transpose(1, 0, 3, 2), {"permutation": (1, 0, 3, 2)}, 1),
    "broadcast_in_dim": (lambda: jnp.broadcast_to(V, (2, 3)), {"broadcast_dimensions": (1,)}, 1),
    "slice": (
        lambda: lax.slice(V, (1,), (3,)), {"start_indices": (1,), "limit_indices": (3,), "strides": None}, 1,
    ),
    "split": (lambda: lax.split(V, (1, 2)), {"sizes": (1, 2), "axis": 0}, 1),
    "rev": (lambda: lax.rev(V, (0,)), {"dimensions": (0,)}, 1),
    "pad": (lambda: lax.pad(V, 0.0, [(1, -1, 2)]), {"padding_config": ((1, -1, 2),)}, 2),
    "concatenate": (lambda: lax.concatenate([V, V], 0), {"dimension": 0}, 2),
    "dynamic_slice": (lambda: lax.dynamic_slice(V, (1,), (2,)), {"slice_sizes": (2,)}, 2),
    "dynamic_update_slice": (lambda: lax.dynamic_update_slice(V, V[:1], (1,)), {}, 3),
    "select_n": (lambda: lax.select(V > 0, V, -V), {}, 3),
    "scatter": (lambda: V.at[1:].set(V[:2]), {"update_jaxpr": None}, 3),
    "gather": (
        lambda: V.at[jnp.array([0, 5])].get(mode="fill", fill_value=0.0),
        {"slice_sizes": (1,), "mode": lax.GatherScatterMode.FILL_OR_DROP, "fill_value": 0.0}, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_moves_have_the_parameters_that_padding_is_read_from(name):
    call, params, operands = MOVES[name]
    (eqn, *_) = [e for e in every_equation(jax.make_jaxpr(call)()) if e.primitive.name == name]
    assert {key: eqn.params[key] for key in params} == params
    assert len(eqn.invars) == operands
    if name in ("gather", "scatter"):
        of_both = {"operand_batching_dims"}
        of_one = {
            "gather": {"offset_dims", "collapsed_slice_dims", "start_index_map"},
            "scatter": {"inserted_window_dims", "scatter_dims_to_operand_dims"},
        }
        assert of_both | of_one[name] <= set(dir(eqn.params["dimension_numbers"]))

"""Every primitive of JAX, and what matrix_of and local_affine make of it.

A primitive is *handled* (its function is affine in the stated operands: an example is executed and held
against jax.jacobian in float64), *refused* (it may be affine, and the message says why there is no rule),
*not affine*, or found *elsewhere*: with no operand that could depend on x, or inside of kernels and
lowerings alone. The test fails when JAX has gained a primitive that is in none of these lists.
"""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import sparse
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.scheduling_groups import xla_metadata_call
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive

import jaxconv_fc as fc
from jaxconv_fc.functions.jaxprs import inner_jaxprs, open_jaxpr

RNG = np.random.default_rng(11)
X = jnp.asarray(RNG.standard_normal(4))
V = jnp.arange(1.0, 5.0)
A = jnp.asarray(RNG.standard_normal((4, 4))) + 4 * jnp.eye(4)
S = sparse.BCOO.fromdense(jnp.array([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 4.0], [0.0, 0.0, 5.0, 0.0]]))
R = sparse.BCSR.from_bcoo(S)
I2 = jnp.array([0, 2])
KERNEL = jnp.array([[[1.0, 2.0, 3.0]]])
SPEC = fc.conv_spec((1, 1, 4), KERNEL.shape, (1,), "SAME", padding_mode="circular")
POOL = {"window_dimensions": (2,), "window_strides": (1,), "padding": "VALID"}


def _square(x):
    return x.reshape(2, 2)


def _with_rule():
    f = jax.custom_vjp(lambda x: 2 * x)
    f.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
    return f


def _with_jvp():
    f = jax.custom_jvp(lambda x: 2 * x)
    f.defjvps(lambda t, out, x: 2 * t)
    return f


def _with_vmap():
    f = jax.custom_batching.custom_vmap(lambda x: 2 * x)
    f.def_vmap(lambda n, batched, x: (2 * x, batched[0]))
    return f


def _sparse(x):
    """The matrix S with data that depend on x."""
    return sparse.BCOO((jnp.concatenate([x, x[:1]]), S.indices), shape=S.shape)


def _in_order(fn):
    """With its equations run in the order of the program, which JAX can ask for from 0.11 on."""
    try:
        from jax.experimental.overlap import program_order
    except ImportError:
        return fn
    return program_order(fn, enforce=False)


def _of_slices(x):
    """What JAX makes of the derivative of a maximum over windows."""
    return jax.jvp(lambda v: lax.reduce_window(v, -jnp.inf, lax.max, **{"padding": "VALID",
                   "window_dimensions": (2,), "window_strides": (2,)}), (V,), (x,))[1]  # fmt: skip


RAW = jnp.linalg.qr(A, mode="raw")

NEWER = {  # primitive -> whether this version of JAX has it
    "polynomial": hasattr(lax, "polynomial"),
    "program_order": importlib.util.find_spec("jax.experimental.overlap") is not None,
}

# primitive -> a function of four numbers that is affine by it; or (that function, the same without it)
HANDLED = {
    "add": lambda x: x + V,
    "sub": lambda x: V - x,
    "add_any": lambda x: jax.vjp(lambda v: (v, v), V)[1]((x, 2 * x))[0],
    "neg": lambda x: -x,
    "mul": lambda x: V * x,
    "div": lambda x: x / V,
    "integer_pow": lambda x: x**1,
    "pow": lambda x: lax.pow(x, jnp.ones(4)),
    "polynomial": lambda x: jnp.polyval(jnp.stack([x[0], x[1], V[0]]), V),
    "dot_general": lambda x: A @ x,
    "conv_general_dilated": lambda x: lax.conv(x.reshape(1, 1, 4), KERNEL, (1,), "SAME"),
    "conv_product": lambda x: fc.apply(SPEC, KERNEL, x.reshape(1, 4)),
    "reduce_sum": lambda x: x.sum(),
    "cumsum": lambda x: lax.cumsum(x, reverse=True),
    "reduce_window_sum": lambda x: lax.reduce_window(x, 0.0, lax.add, **POOL),
    "select_and_scatter_add": lambda x: jax.vjp(lambda v: lax.reduce_window(v, -jnp.inf, lax.max, **POOL), V)[
        1
    ](x[:3])[0],
    "select_and_gather_add": _of_slices,
    "reshape": lambda x: x.reshape(2, 2),
    "squeeze": lambda x: lax.squeeze(x.reshape(4, 1), (1,)),
    "transpose": lambda x: _square(x).T,
    "broadcast_in_dim": lambda x: jnp.broadcast_to(x, (3, 4)),
    "slice": lambda x: x[1:3],
    "rev": lambda x: x[::-1],
    "copy": lambda x: jnp.copy(x),
    "tile": lambda x: jnp.tile(x, 3),
    "stack": lambda x: jnp.stack([x, V, 2 * x]),
    "unstack": lambda x: jnp.unstack(_square(x))[1],
    "split": lambda x: jnp.split(x, [1])[1],
    "concatenate": lambda x: jnp.concatenate([x, V, x]),
    "pad": lambda x: lax.pad(x, x[0], [(1, -1, 1)]),
    "sort": lambda x: lax.sort((jnp.array([3, 1, 3, 0]), x, 2 * x), num_keys=1)[2],
    "gather": lambda x: x.at[jnp.array([0, 9])].get(mode="fill", fill_value=7.0),
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (2,), (2,)),
    "dynamic_update_slice": lambda x: lax.dynamic_update_slice(V, x[:2], (1,)),
    "scatter": lambda x: V.at[I2].set(x[:2]),
    "scatter-add": lambda x: x.at[I2].add(x[2:]),
    "scatter-sub": lambda x: x.at[I2].subtract(x[2:]),
    "scatter-mul": lambda x: x.at[I2].multiply(3.0),
    "select_n": lambda x: jnp.where(V > 2, x, 1.0),
    "optimization_barrier": lambda x: lax.optimization_barrier(x) + 1,
    "stop_gradient": (lambda x: lax.stop_gradient(x) * 2, lambda x: x * 2),
    "device_put": lambda x: jax.device_put(x, jax.devices()[0]),
    "sharding_constraint": lambda x: lax.with_sharding_constraint(
        x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "psum": lambda x: jax.vmap(lambda a: a + lax.psum(a, "i"), axis_name="i")(x),
    "convert_element_type": lambda x: x.astype(jnp.complex128) * 2,
    "real": lambda x: lax.complex(x, V).real * 2,
    "imag": lambda x: lax.complex(V, x).imag * 2,
    "conj": lambda x: jnp.conj(lax.complex(x, 2 * x)),
    "complex": lambda x: lax.complex(x, 2 * x),
    "fft": lambda x: jnp.fft.irfft(jnp.fft.rfft(x)[:2] * 1j, 3),
    "triangular_solve": lambda x: jax.scipy.linalg.solve_triangular(A, x),
    "tridiagonal_solve": lambda x: lax.linalg.tridiagonal_solve(V / 9, V + 4, V / 9, x[:, None]),
    "custom_linear_solve": lambda x: jnp.linalg.solve(A, x),
    "ormqr": (
        lambda x: lax.linalg.ormqr(RAW[0].T, RAW[1], x[:, None]),
        lambda x: jnp.linalg.qr(A)[0] @ x[:, None],
    ),
    "bcoo_dot_general": lambda x: jnp.concatenate([S @ x, _sparse(x) @ V]),
    "bcoo_todense": lambda x: _sparse(x).todense(),
    "bcoo_extract": lambda x: sparse.bcoo_extract(S, jnp.outer(V[:3], x)).data,
    "bcoo_transpose": lambda x: _sparse(x).T.todense(),
    "bcoo_sort_indices": lambda x: _sparse(x).T.sort_indices().todense(),
    "bcoo_sum_duplicates": lambda x: _sparse(x).sum_duplicates(nse=5, remove_zeros=False).data,
    "bcoo_dot_general_sampled": lambda x: sparse.bcoo_dot_general_sampled(
        V[:3, None], x[None], S.indices, dimension_numbers=(((1,), (0,)), ((), ()))
    ),
    "bcoo_spdot_general": (
        lambda x: (_sparse(x) @ S.T).todense(),
        lambda x: _sparse(x).todense() @ S.T.todense(),
    ),
    "bcsr_dot_general": lambda x: R @ x,
    "bcsr_todense": lambda x: sparse.BCSR(
        (jnp.concatenate([x, x[:1]]), R.indices, R.indptr), shape=R.shape
    ).todense(),
    "bcsr_extract": lambda x: sparse.bcsr_extract(R.indices, R.indptr, jnp.outer(V[:3], x)),
    "jit": lambda x: jax.jit(lambda x: 2 * x)(x),
    "remat2": jax.checkpoint(lambda x: 2 * x),
    "custom_jvp_call": _with_jvp(),
    "custom_vjp_call": _with_rule(),
    "custom_vmap_call": (_with_vmap(), lambda x: 2 * x),
    "program_order": _in_order(lambda x: 2 * x),
    "linear_call": (
        lambda x: jax.custom_derivatives.linear_call(lambda r, x: r * x, lambda r, y: r * y, 3.0, x),
        lambda x: 3 * x,
    ),
    "composite": (lambda x: lax.composite(lambda x: 2 * x, "two.x")(x), lambda x: 2 * x),
    "scan": lambda x: lax.scan(lambda c, v: (2 * c + v, c), x[0], x)[1],
    "while": (
        lambda x: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, A @ s[1] + 1), (0, x))[1],
        lambda x: A @ (A @ (A @ x + 1) + 1) + 1,
    ),
    "cond": lambda x: lax.cond(V[0] > 0, lambda x: 2 * x, jnp.sin, x),
}  # fmt: skip
HANDLED |= {
    "name": lambda x: checkpoint_name(x, "a") * 2,
    "layout_constraint": lambda x: with_layout_constraint(x, Layout(major_to_minor=(0,))) * 2,
    "xla_metadata_value": lambda x: set_xla_metadata(x, a=1) * 2,
    "xla_metadata_call": lambda x: xla_metadata_call(lambda x: 2 * x, a="1")(x),
}
ON_INTEGERS = {
    "shift_left": (lambda x: x << 2, lambda x: 4 * x),
    "not": (lambda x: ~x, lambda x: -1 - x),
    "bitcast_convert_type": (
        lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint64), jnp.int64),
        lambda x: x,
    ),
}
# Handled as any call, though no public function makes one; and as the identity, inside of shard_map, where
# test_sharded_operands.py has it.
UNREACHED = {"closed_call", "pvary"}

REFUSED = {
    "works across devices": """
        all_gather all_gather_done all_gather_invariant all_gather_reduced all_gather_reduced_start
        all_gather_start all_to_all all_to_all_done all_to_all_start pbroadcast pbroadcast_done
        pbroadcast_dynamic pbroadcast_start ppermute ppermute_done ppermute_start precv preduced psend
        psum_done psum_invariant psum_invariant_start psum_start ragged_all_to_all reduce_scatter
        reduce_scatter_done reduce_scatter_start reduced_vary_cast reduced_vary_cast_p shard_map
        unreduced_pmax unreduced_pmin unreduced_psum unreduced_psum_start unreduced_reduce_scatter
        unreduced_reduce_scatter_start vary_unreduced_cast vary_unreduced_cast_p""",
    "bound to devices": "compute_on relayout reshard with_memory_space_constraint",
    "no jaxpr shows": """
        buffer_callback call_exported call_hi_primitive call_hi_primitive_linearized core_map cudnn_fusion
        custom_partitioning ffi_call io_callback mpmd_map pallas_call pure_callback""",
    "function of its own": "reduce reduce_window select_and_scatter",
    "mutable array": "new_ref get run_state freeze pin unpin swap addupdate masked_swap accum_grad_in_ref",
    "cannot be batched": """
        coo_matvec coo_matmat coo_todense csr_matvec csr_matmat csr_todense spsolve ragged_dot_general""",
    "quadratic": "symmetric_product",
}
SWITCHES = """
    gt ge lt le eq ne max min abs sign clamp reduce_max reduce_min argmax argmin reduce_window_max
    reduce_window_min"""
BENDS = """
    top_k approx_top_k cummax cummin scatter-max scatter-min round floor ceil rem lt_to le_to eq_to
    is_finite pmax pmin"""
NOT_AFFINE = """
    acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cholesky
    cholesky_update clz cos cosh cumlogsumexp cumprod digamma eig eigh erf erf_inv erfc exp exp2 expm1 geqp3
    geqrf hessenberg householder_product igamma igamma_grad_a igammac lgamma log log1p log2 logistic lu
    lu_pivots_to_permutation mulhi nextafter one_minus_square or polygamma population_count qr
    random_gamma random_bits random_clone random_fold_in random_seed random_split random_unwrap random_wrap
    reciprocal reduce_and reduce_or reduce_precision reduce_prod reduce_xor regularized_incomplete_beta
    rng_bit_generator rng_uniform rsqrt schur shift_right_arithmetic shift_right_logical sin sinh sqrt square
    svd tan tanh threefry2x32 threefry4x32 philox2x32 philox4x32 tridiagonal xor zeta
    bcoo_fromdense bcsr_fromdense coo_fromdense csr_fromdense to_edtype from_edtype
    dot_product_attention_bwd dot_product_attention_bwd_wrapper dot_product_attention_fp8_bwd
    dot_product_attention_fp8_bwd_wrapper dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
    dot_product_attention_fwd dot_product_attention_fwd_wrapper rnn_bwd rnn_fwd scaled_dot scaled_matmul
    scaled_matmul_wrapper"""

# No operand that could depend on x, or found inside of kernels, derivatives and lowerings alone.
ELSEWHERE = """
    after_all axis_index create_token create_linear dim_as_value dimension_size empty empty2 empty_ref
    free_ref get_global iota iota_2x32_shape num_programs platform_index program_id zeros_like unreachable
    debug_callback debug_print check dce_sink shape_assertion inspect_sharding
    box_get box_set new_box log_extend log_read new_log call jaxpr_call eval_jaxpr custom_jvp_call_jaxpr
    custom_lin fused_call remat_opt todense tie stage
    global_array_to_host_local_array host_local_array_to_global_array coo_spmm coo_spmv csr_spmm csr_spmv
    broadcast_to delay masked_load multiple_of run_scoped semaphore_read semaphore_signal semaphore_wait"""

REFUSED = {reason: names.split() for reason, names in REFUSED.items()}
SWITCHES, BENDS, NOT_AFFINE, ELSEWHERE = (v.split() for v in (SWITCHES, BENDS, NOT_AFFINE, ELSEWHERE))

LIST = """
import gc, importlib
for name in '''
    numpy nn random image lax lax.linalg ops debug export ffi dlpack ref scipy.fft scipy.linalg scipy.ndimage
    scipy.optimize scipy.signal scipy.sparse.linalg scipy.special scipy.stats ad_checkpoint custom_batching
    custom_derivatives experimental.buffer_callback experimental.checkify experimental.compute_on
    experimental.fused experimental.hijax experimental.layout experimental.multihost_utils experimental.ode
    experimental.overlap experimental.pallas experimental.rnn experimental.scheduling_groups
    experimental.sparse experimental.sparse.linalg experimental.xla_metadata extend.core.primitives
    extend.random '''.split():
    try:
        importlib.import_module("jax." + name)
    except ImportError:
        pass
from jax.extend.core import Primitive
print(*{p.name for p in gc.get_objects() if isinstance(p, Primitive)})
"""


def test_every_primitive_of_jax_is_in_the_table():
    """In a process of its own: the libraries of other tests bring primitives too."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", LIST], capture_output=True, text=True,
                         env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)  # fmt: skip
    names = set(run.stdout.split())
    assert len(names) > 300
    refused = [name for names in REFUSED.values() for name in names]
    table = [*HANDLED, *ON_INTEGERS, *UNREACHED, *refused, *SWITCHES, *BENDS, *NOT_AFFINE, *ELSEWHERE]
    assert len(table) == len(set(table)), "a primitive in two lists"
    assert names - set(table) == set()


def _primitives(jaxpr):
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        yield eqn.primitive.name
        for inner in inner_jaxprs(eqn):
            yield from _primitives(inner)


def _pair(example):
    return example if isinstance(example, tuple) else (example, example)


def _real(y):
    return jnp.stack([y.real, y.imag]) if jnp.iscomplexobj(y) else y


def _pairs(name, x):
    """``(matrix_of, pairs)``: what must be equal to jax.jacobian's of the function written plainly, and to
    its value. Of the primitive alone, and between matrices that make the output the smaller side, where its
    transpose is propagated."""
    fn, plain = _pair(HANDLED[name])
    y, jacobian = plain(x), jax.jacobian(lambda x: _real(plain(x)))(x)
    first, last = (jnp.asarray(np.random.default_rng(1).standard_normal(s)) for s in ((4, 6), (2, y.size)))

    def joined(y):
        return (y.real + y.imag if jnp.iscomplexobj(y) else y).ravel()

    long = first.T @ x
    whole, local = fc.matrix_of(fn, x), fc.local_affine(fn, 3 * x)
    narrow = fc.matrix_of(lambda x: last @ joined(fn(first @ x)), long)
    pairs = [
        (narrow.matrix, last @ jacobian.reshape(-1, y.size, x.size).sum(0) @ first),
        (narrow.matrix @ long + narrow.offset, last @ joined(plain(first @ long))),
        (local.radius, jnp.inf),
    ]
    for matrix, offset, *_ in (whole, local):
        pairs.append((_real(matrix.reshape(*y.shape, x.size)), jacobian))
        pairs.append((matrix @ x.astype(matrix.dtype) + offset, y.ravel()))
    return whole, pairs


@pytest.mark.filterwarnings("ignore:Using reduced precision for gradient of reduce-window")
@pytest.mark.parametrize("names", [list(HANDLED)[i::10] for i in range(10)], ids=", ".join)
def test_handled_primitives_are_their_jacobians(names):
    """Several in one program."""
    functions = {name: _pair(HANDLED[name])[0] for name in names}
    for name, fn in functions.items():
        if NEWER.get(name, True):
            assert name in set(_primitives(jax.make_jaxpr(fn)(X)))

    @jax.jit
    def made(x):
        return [_pairs(name, x) for name in names]

    for name, (want, pairs) in zip(names, made(X), strict=True):
        sparse = fc.sparse_matrix_of(functions[name], X)
        assert (sparse.matrix.dtype, sparse.offset.dtype) == (want.matrix.dtype, want.offset.dtype)
        np.testing.assert_allclose(sparse.matrix.toarray(), want.matrix, rtol=1e-11, atol=1e-11, err_msg=name)
        np.testing.assert_allclose(sparse.offset, want.offset, rtol=1e-11, atol=1e-11, err_msg=name)
        # On a GPU, JAX warns that it packs a maximum and its derivative into one number: half the digits.
        halved = jax.default_backend() != "cpu" and name.startswith("select_and")
        for got, wanted in pairs:
            np.testing.assert_allclose(got, wanted, rtol=1e-5 if halved else 1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("name", ON_INTEGERS)
def test_a_handled_primitive_of_integers(name):
    fn, plain = ON_INTEGERS[name]
    x = jnp.array([3, -1, 5, 2])
    matrix, offset = fc.matrix_of(fn, x)
    np.testing.assert_array_equal(matrix @ x + offset, fn(x))
    np.testing.assert_array_equal(fc.sparse_matrix_of(fn, x).matrix.toarray(), matrix)
    np.testing.assert_array_equal(matrix, jax.jacobian(plain)(X))


def _of_that_name(name):
    """A function of one equation, of a primitive of this name: the rules know no more of it."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x: x)
    return lambda x: primitive.bind(x)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_rule_is_refused_with_the_reason(reason):
    for name in REFUSED[reason]:
        for tool, kind in ((fc.matrix_of, "affine"), (fc.local_affine, "piecewise linear")):
            with pytest.raises(
                ValueError, match=f"cannot tell whether fn is {kind} in x: primitive '{name}' .*{reason}"
            ):
                tool(_of_that_name(name), X)


@pytest.mark.parametrize(
    "names", [SWITCHES, BENDS, NOT_AFFINE, ELSEWHERE], ids=["switch", "bend", "not", "else"]
)
def test_what_is_not_affine_is_refused_by_name(names):
    for name in names:
        with pytest.raises(ValueError, match=f"not affine in x: primitive '{name}'"):
            fc.matrix_of(_of_that_name(name), X)
        if names is BENDS:
            with pytest.raises(ValueError, match=f"cannot tell .*'{name}' is piecewise linear, and"):
                fc.local_affine(_of_that_name(name), X)
        elif names is not SWITCHES:
            with pytest.raises(ValueError, match=f"not piecewise linear in x: primitive '{name}'"):
                fc.local_affine(_of_that_name(name), X)


def test_an_order_that_depends_on_x_bends():
    with pytest.raises(ValueError, match="not affine in x: primitive 'sort'"):
        fc.matrix_of(jnp.sort, X)
    with pytest.raises(ValueError, match=r"cannot tell .*'sort' is piecewise linear, and"):
        fc.local_affine(jnp.sort, X)


REFUSED_BITS = {
    "'not' of booleans": (lambda x: ~x, X > 0),
    "'bitcast_convert_type' from float64 to int64": (lambda x: lax.bitcast_convert_type(x, jnp.int64), X),
    "'bitcast_convert_type' from int64 to int32": (
        lambda x: lax.bitcast_convert_type(x, jnp.int32),
        jnp.arange(4),
    ),
}


@pytest.mark.parametrize("said", REFUSED_BITS)
def test_bits_of_anything_but_integers_of_one_width_are_refused(said):
    with pytest.raises(ValueError, match=f"not affine in x: primitive {said}"):
        fc.matrix_of(*REFUSED_BITS[said])

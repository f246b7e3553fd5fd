"""fully_connected on hand-written functions; test_networks.py has those of other libraries."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import CASES, count
from geometries import integers, random_geometry
from handwritten import close, conv, normal
from jax import lax
from jax.extend.core import Primitive

import jaxconv_fc as fc

# Each program runs once, on small arrays: compiling it is what takes the time.
jit = partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)
COUNT = count("GEOMETRIES", 10)


RNG = np.random.default_rng(5)
X, K = normal(RNG, 2, 3, 4, 4), normal(RNG, 3, 3, 3, 3)
K2 = normal(RNG, 4, 3, 2, 2)
SHAPES = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (X, K)]


# convolutions of every kind --------------------------------------------------------------------


def test_random_convolutions_are_found_and_replaced(run_seed):
    """Whole numbers, held against the oracle, which knows neither lax nor M: equal, not close."""
    for i in range(COUNT):
        if i % 100 == 99:  # thousands of programs would fill the memory
            jax.clear_caches()
        rng = np.random.default_rng([run_seed, i])
        geometry = random_geometry(rng, modes=("zeros",))
        spec = geometry.spec()  # lax refuses "SAME" with lhs_dilation: hand it numbers
        _, _, *options = geometry.arguments()
        x, kernel = (integers(rng, s, np.int32) for s in (geometry.lhs_shape, geometry.rhs_shape))

        def fn(x, kernel, spec=spec, options=options):
            return lax.conv_general_dilated(x, kernel, spec.window_strides, spec.padding, *options)

        replay = f"JAXCONV_FC_SEED={run_seed}, number {i}: {geometry}"
        (site,) = fc.find_convs(fn, x, kernel)  # the last convolution is never computed: lax may abort
        assert site.spec == spec, replay
        got = np.asarray(jit(fc.fully_connected(fn))(x, kernel))
        want = oracle.conv(x, kernel, geometry)
        assert got.shape == want.shape, replay
        assert (got == want).all(), replay


@pytest.mark.parametrize("narrow", [np.int8, jnp.bfloat16])
def test_sums_are_wider_where_the_convolution_says_so(narrow, rng):
    x, kernel = (jnp.asarray(integers(rng, v.shape, np.int32) * 31, narrow) for v in (X, K))
    wide = {"int8": jnp.int32, "bfloat16": jnp.float32}[jnp.dtype(narrow).name]
    got = fc.fully_connected(partial(conv, preferred_element_type=wide))(x, kernel)
    assert got.dtype == wide
    # In float64, which is exact here: a GPU has no integer convolutions.
    np.testing.assert_array_equal(got, conv(x.astype(jnp.float64), kernel.astype(jnp.float64)))


@pytest.mark.parametrize("builder", [fc.as_bcoo, fc.as_bcsr, lambda *a: fc.as_bcoo(*a).todense()])
def test_any_builder_will_do(builder):
    connected = fc.fully_connected(lambda x, k: conv(x, k, (2, 1)), builder=builder)
    close(connected(X, K), conv(X, K, (2, 1)))
    close(connected(X[:1], K), conv(X[:1], K, (2, 1)))


def test_the_builder_is_asked_for_every_convolution():
    seen = []

    def builder(spec, kernel):
        seen.append(spec)
        return fc.as_matrix(spec, kernel)

    fc.fully_connected(lambda x, k: conv(conv(x, k), K2), builder=builder)(X, K)
    assert seen == [s.spec for s in fc.find_convs(lambda x, k: conv(conv(x, k), K2), *SHAPES)]


def test_pytrees_static_arguments_and_results_go_through():
    def fn(params, x, *, padding, scale=2.0):
        return {"y": conv(x, params["kernel"], padding=padding) * scale, "note": padding, "none": None}

    got = fc.fully_connected(fn)({"kernel": K}, X, padding="VALID")
    assert got["note"] == "VALID"
    assert got["none"] is None
    close(got["y"], 2 * conv(X, K, padding="VALID"))
    assert fc.fully_connected(fn).__name__ == "fn"


def test_a_matrix_beyond_the_limit_is_refused_before_it_is_made():
    with fc.memory_limit(1000), pytest.raises(ValueError, match="48 x 48"):
        fc.fully_connected(conv)(X, K)


@pytest.mark.parametrize("loop", ["scan", "while", "cond"])
def test_a_builder_may_close_over_traced_arrays(loop):
    """Also around a loop. Twice M in two steps is four times the result, and the derivative in 2 is 4."""
    functions = {
        "scan": lambda x: lax.scan(lambda c, _: (conv(c, K), None), x, None, length=2)[0],
        "while": lambda x: lax.fori_loop(0, jnp.asarray(2), lambda i, c: conv(c, K), x),
        "cond": lambda x: lax.cond(x.sum() < 1e9, lambda x: conv(conv(x, K), K), lambda x: x, x),
    }

    def scaled(scale):
        builder = lambda spec, kernel: scale * fc.as_matrix(spec, kernel)  # noqa: E731
        return fc.fully_connected(functions[loop], builder=builder)(X)

    want = functions[loop](X)
    two = jnp.asarray(2.0)
    close(jit(scaled)(two), 4 * want)
    close(jit(lambda s: jax.jvp(scaled, (s,), (jnp.ones_like(s),))[1])(two), 4 * want)


def test_a_branch_of_another_platform_is_not_compiled_here():
    nowhere = Primitive("nowhere")  # has no lowering
    nowhere.def_abstract_eval(lambda x: x)

    def elsewhere(x):
        branches = {"tpu": lambda x: nowhere.bind(conv(x, K)), "default": lambda x: conv(x, K)}
        return lax.platform_dependent(x, **branches)

    connected = fc.fully_connected(elsewhere)
    assert not fc.find_convs(connected, X)
    close(connected(X), conv(X, K))


# functions whose convolutions sit deep inside --------------------------------------------------


@jax.custom_vjp
def _looped(x, kernel):
    def repeated(x, kernel):
        return lax.scan(lambda c, _: (jnp.tanh(conv(c, kernel)), c.sum()), x, None, length=3)[0]

    return lax.cond(x.sum() > 1e9, lambda x, kernel: x, repeated, x, kernel)


def _looped_backward(saved, g):  # deliberately not the derivative: the rule has to be kept
    _, kernel = saved
    return conv(g, kernel) * 2, jnp.ones_like(kernel) * g.sum()


_looped.defvjp(lambda x, kernel: (_looped(x, kernel), (x, kernel)), _looped_backward)


@jax.custom_jvp
def _ruled(x, kernel):
    return conv(x, kernel)


@_ruled.defjvp
def _(primals, tangents):
    (x, kernel), (dx, dk) = primals, tangents
    return _ruled(x, kernel), 3 * (conv(dx, kernel) + conv(x, dk))


@jax.custom_vjp
def _chosen(x, kernel, which):  # an integer operand: its cotangent is a float0
    return conv(x, kernel) * which.astype(x.dtype)


def _chosen_backward(saved, g):
    return conv(g, saved), jnp.zeros_like(saved), np.zeros((), jax.dtypes.float0)


_chosen.defvjp(lambda x, kernel, which: (_chosen(x, kernel, which), kernel), _chosen_backward)


def _closed_over(x, kernel):
    """A rule whose function closes over traced arrays: they become operands of their own, unlike ones."""
    scale = kernel.sum()

    @jax.custom_jvp
    def ruled(x, times):
        return conv(x, kernel) * scale * times.astype(x.dtype)

    @ruled.defjvp
    def _(primals, tangents):
        x, times = primals
        return ruled(x, times), 3 * conv(tangents[0], kernel) * scale

    return ruled(x, jnp.asarray(2))


@jax.custom_batching.custom_vmap
def _batched(x, kernel):
    return conv(x, kernel)


@_batched.def_vmap
def _(size, batched, x, kernel):
    axes = [0 if b else None for b in batched]
    return jax.vmap(lambda x, kernel: 3 * conv(x, kernel), axes)(x, kernel), True


def _sharded(x, kernel):
    def body(x, kernel):
        return lax.psum(lax.scan(lambda c, _: (conv(c, kernel), None), x, None, length=2)[0], "d")

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(body, mesh=mesh, in_specs=(spec("d"), spec()), out_specs=spec())(x, kernel)


def _solved(x, kernel):
    # 1/64 is exact in float32: on a GPU, XLA rounds the factor of a float64 convolution to it.
    return jax.scipy.sparse.linalg.cg(lambda v: v + conv(v, kernel) / 64, x, maxiter=3)[0]


def _applied(x, kernel):
    spec = fc.conv_spec(x.shape, kernel.shape, (1, 1), "SAME", padding_mode="circular")
    y = jax.vmap(partial(fc.apply, spec, kernel))(x)
    return jax.vmap(partial(fc.apply_transpose, spec, kernel))(y)


def _while(x, kernel):
    state = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, conv(s[1], kernel)), (0, x))
    return state[1]


DEEP = {
    "jit(custom_vjp(cond(scan)))": (lambda x, k: jax.jit(_looped)(x, k), 1),
    "custom_jvp": (_ruled, 1),
    "custom_jvp closing over": (_closed_over, 1),
    "custom_vjp": (lambda x, k: _chosen(x, k, jnp.asarray(3)), 1),
    "remat": (jax.checkpoint(lambda x, k: conv(jnp.sin(conv(x, k)), k)), 2),
    "fori_loop": (lambda x, k: lax.fori_loop(0, 3, lambda i, c: conv(c, k), x), 1),
    "map": (lambda x, k: lax.map(lambda a: conv(a[None], k)[0], x), 1),
    "vmap": (lambda x, k: jax.vmap(conv, (None, 0))(x, jnp.stack([k, 2 * k])), 1),
    "custom_linear_solve": (_solved, 2),
    "apply": (_applied, 2),
    "shard_map": (_sharded, 1),
    "custom_vmap": (_batched, 1),
    "while": (_while, 1),
}


@pytest.mark.parametrize("name", DEEP)
def test_found_and_replaced_wherever_they_are(name):
    fn, count = DEEP[name]
    assert len(fc.find_convs(fn, *SHAPES)) == count
    connected = fc.fully_connected(fn)
    assert not fc.find_convs(connected, *SHAPES)
    close(*jit(lambda x, k: (connected(x, k), fn(x, k)))(X, K))


@pytest.mark.parametrize("name", ["jit(custom_vjp(cond(scan)))", "custom_jvp", "apply"])
def test_nothing_changes_without_jit(name):
    fn, _ = DEEP[name]
    close(fc.fully_connected(fn)(X, K), jit(fn)(X, K))


# a while loop has no reverse derivative, nor has custom_vmap, nor a custom_jvp in what it closes over
@pytest.mark.parametrize(
    "name", [n for n in DEEP if n not in ("while", "custom_vmap", "custom_jvp closing over")]
)
def test_gradients_flow_through_the_matrices_and_keep_custom_rules(name):
    fn, _ = DEEP[name]

    def gradient(fn):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(fn(x, k))), (0, 1))

    assert fc.find_convs(gradient(fn), *SHAPES)
    ways = gradient(fc.fully_connected(fn)), fc.fully_connected(gradient(fn))
    for way in ways:
        assert not fc.find_convs(way, *SHAPES)
    want, *made = jit(lambda *a: [of(*a) for of in (gradient(fn), *ways)])(X, K)
    for both in made:
        for got, expected in zip(both, want, strict=True):
            close(got, expected, 11)


def test_forward_and_second_derivatives():
    def fn(x):
        return jnp.sum(jnp.tanh(conv(x, K)) ** 2)

    tangent = jnp.cos(X)
    for of in (
        lambda f: jax.jvp(f, (X,), (tangent,))[1],
        lambda f: jax.jvp(jax.grad(f), (X,), (tangent,))[1],
    ):
        close(jit(lambda of=of: of(fc.fully_connected(fn)))(), jit(lambda of=of: of(fn))())


@pytest.mark.parametrize("name", [n for n in DEEP if n != "shard_map"])
def test_vmap_on_either_side(name):
    fn, _ = DEEP[name]
    xs = jnp.stack([X, 2 * X])
    mapped = jax.vmap(fn, (0, None))
    ways = jax.vmap(fc.fully_connected(fn), (0, None)), fc.fully_connected(mapped)
    for way in ways:
        assert not fc.find_convs(way, jax.ShapeDtypeStruct(xs.shape, xs.dtype), SHAPES[1])
    want, *made = jit(lambda *a: [of(*a) for of in (mapped, *ways)])(xs, K)
    for got in made:
        close(got, want, 11)


# a trained network ------------------------------------------------------------------------------


def _real_layers():
    for path in sorted(CASES.glob("realnet_*.json")):
        arrays = np.load(path.with_suffix(".npz"))
        for case in json.loads(path.read_text())["cases"]:
            assert case["kind"] == "conv"
            yield case, {name: jnp.asarray(arrays[f"{case['id']}/{name}"]) for name in case["arrays"]}


@pytest.mark.skipif(CASES is None, reason="JAXCONV_FC_CASES names no folder of cases")
def test_a_trained_network_runs_fully_connected():
    ran = {"as_matrix": 0, "as_bcsr": 0}
    for case, arrays in _real_layers():
        numbers = lax.ConvDimensionNumbers(*map(tuple, case["dimension_numbers"]))
        x, w, y = (arrays[n] for n in "xwy")
        bias = jnp.zeros((), y.dtype)
        if case.get("has_bias"):
            bias = jnp.expand_dims(arrays["b"], [i for i in range(y.ndim) if i != numbers.out_spec[1]])

        def layer(x, w, b, case=case, numbers=numbers):
            pads = [tuple(p) for p in case["padding"]]
            y = lax.conv_general_dilated(
                x, w, case["window_strides"], pads, case["lhs_dilation"], case["rhs_dilation"], numbers,
                case["feature_group_count"], case["batch_group_count"],
            )  # fmt: skip
            return y + jnp.broadcast_to(b, y.shape)

        (site,) = fc.find_convs(layer, x, w, bias)
        builder = fc.as_matrix if site.spec.nbytes().dense <= 80_000_000 else fc.as_bcsr
        got = jax.jit(fc.fully_connected(layer, builder=builder))(x, w, bias)
        terms = int(np.prod([w.shape[i] for i in numbers.rhs_spec[1:]])) + 1
        wide = (jnp.asarray(abs(v), jnp.float64) for v in (x, w, bias))
        oracle.assert_within(got, oracle.wide(y), np.asarray(layer(*wide)), terms)
        ran[builder.__name__] += 1
    assert sum(ran.values()), "the folder holds no layer of a network"
    print(f"layers run: {ran}")

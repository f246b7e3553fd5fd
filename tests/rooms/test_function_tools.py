"""What all function tools share: how often they trace and compile, and that no tracer leaves its trace."""

import gc
import weakref
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handwritten import close, compilations, conv, normal
from jax import lax

import jaxconv_fc as fc

RNG = np.random.default_rng(5)
X, K = normal(RNG, 2, 3, 4, 4), normal(RNG, 3, 3, 3, 3)
CIRCULAR = fc.conv_spec((1, 3, 4, 4), K.shape, (1, 1), "SAME", padding_mode="circular")

TOOLS = {
    "find_convs": fc.find_convs,
    "fully_connected": lambda fn, x: fc.fully_connected(fn)(x),
    "matrix_of": fc.matrix_of,
    "local_affine": fc.local_affine,
}


@jax.custom_vjp
def _doubled(x):
    return conv(2 * x, K)


_doubled.defvjp(lambda x: (_doubled(x), None), lambda _, g: (2 * g,))

FUNCTIONS = {
    "pad": lambda x: conv(jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap"), K, padding="VALID"),
    "scan": lambda x: lax.scan(lambda c, _: (conv(c, K), None), x, None, length=2)[0],
    "remat": jax.checkpoint(lambda x: conv(x, K)),
    "apply": lambda x: jax.vmap(partial(fc.apply, CIRCULAR, K))(x),
    "custom_vjp": _doubled,
    "branch": lambda x: lax.cond(K[0, 0, 0, 0] > 0, lambda x: conv(x, K), lambda x: x, x),
    "fill": lambda x: conv(x.at[jnp.array([0, 5])].get(mode="fill", fill_value=1.0), K),
    "relu": lambda x: jax.nn.relu(conv(x, K)),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("tool", TOOLS)
def test_no_tracer_leaves_its_trace(tool, jitted, run_seed):
    with jax.checking_leaks():
        few = slice(run_seed % 3, None, 3)  # without jit, each compiles
        for name, fn in list(FUNCTIONS.items())[slice(None) if jitted else few]:
            if (tool, name) != ("matrix_of", "relu"):
                run = partial(TOOLS[tool], fn)
                (jax.jit(lambda x, run=run: jax.tree.leaves(run(x))[:0]) if jitted else run)(X)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_function_is_traced_once_a_call(tool):
    """Its loops and rules included; and the second call traces once more, for closures may have changed."""
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(FUNCTIONS["scan"], 2)
    for _ in range(2):
        TOOLS[tool](counted, X)
    with pytest.raises(AssertionError, match="is traced > 2 times"):
        TOOLS[tool](counted, X)


def _loop(body):
    """A loop around a new function at every call, as users write it."""
    return lambda x, kernel: lax.scan(lambda c, _: (body(c, kernel), None), x, None, length=2)[0]


LOOPS = {
    "scan": _loop(conv),
    "scan of relu": _loop(lambda x, k: jax.nn.relu(conv(x, k))),
    "scan of a rule": _loop(lambda x, k: _doubled(conv(x, k))),
    "while": lambda x, k: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, conv(s[1], k)), (0, x))[1],
    "cond": lambda x, k: lax.cond(x.sum() > 0, lambda x: conv(x, k), lambda x: -x, x),
    "remat": jax.checkpoint(lambda x, k: conv(jnp.sin(conv(x, k)), k)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_an_eager_fully_connected_compiles_once(name):
    """Other kernels are no reason to compile again, and give other values."""
    kernels = (K, 2 * K)
    fc.fully_connected(LOOPS[name])(X, K)
    with compilations() as programs:
        got = jax.block_until_ready([fc.fully_connected(LOOPS[name])(X, k) for k in kernels])
    assert not programs
    for y, k in zip(got, kernels, strict=True):
        close(y, LOOPS[name](X, k))


NUMBERS = {  # functions of x with a Python number in them, and the tool
    "matrix_of": lambda n: fc.matrix_of(lambda x: conv(x, K) + n, X),
    "matrix_of, twice": lambda n: fc.matrix_of(lambda x: conv(conv(x, K) * n, K)[:, ::2] * 0.5 - n, X),
    "local_affine": lambda n: fc.local_affine(lambda x: jax.nn.relu(conv(x, K) * n + 0.5) - n, X),
    "scan": lambda n: fc.fully_connected(
        lambda x: lax.scan(lambda c, _: (conv(c, K) * n, c.sum() * n), x, None, length=2)
    )(X),
    "while": lambda n: fc.fully_connected(
        lambda x: lax.while_loop(
            lambda s: s[0] < n, lambda s: (s[0] + n, jax.jit(lambda v: conv(v, K) - n)(s[1])), (0.0, x)
        )[1]
    )(X),
    "cond": lambda n: fc.fully_connected(
        lambda x: lax.cond(x.sum() > n, lambda x: conv(x, K) * n, lambda x: x - n, x)
    )(X),
    "remat in a scan": lambda n: fc.fully_connected(
        lambda x: lax.scan(lambda c, _: (jax.checkpoint(lambda v: n * conv(v, K))(c), n), x, None, length=2)
    )(X),
}


@pytest.mark.parametrize("tool", NUMBERS)
def test_a_new_number_compiles_nothing(tool):
    """Numbers in a function are operands of its program, 0 too."""
    run = NUMBERS[tool]
    for n in (0.0, 1.5):
        run(n)
    with compilations() as programs:
        got = jax.block_until_ready([run(float(n)) for n in range(3, 8)])
    assert not programs
    jax.clear_caches()
    jax.tree.map(np.testing.assert_array_equal, got[-1], run(7.0))


def test_numbers_that_jax_must_read_are_left_where_they_are():
    """Those in a call that JAX differentiates by its rule, and in equations that hold no convolution."""

    def fn(x, n):
        def body(c, _):
            pooled = lax.fori_loop(0, 2, lambda i, v: v * n + i, c)
            return jax.nn.relu(_doubled(pooled) - n) ** 2, n

        return lax.scan(body, x, None, length=2)[0]

    for n in (0.25, 0.5):
        close(fc.fully_connected(partial(fn, n=n))(X), fn(X, n), 11)


def test_nothing_is_kept_for_a_builder_that_closes_over_arrays():
    """What is compiled for a function without a closure is kept; a closure may hold tracers."""
    kept = []
    for scale in (1.0, 3.0):
        builder = lambda spec, kernel, s=scale: s * fc.as_matrix(spec, kernel)  # noqa: E731
        close(fc.fully_connected(LOOPS["scan"], builder=builder)(X, K), LOOPS["scan"](X, scale * K))
        kept.append(weakref.ref(builder))
    del builder
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_loops_that_differ_are_not_taken_for_one_another():
    for length in (1, 2, 1):
        fn = lambda x, n=length: lax.scan(lambda c, _: (conv(c, K), None), x, None, length=n)[0]  # noqa: E731
        close(fc.fully_connected(fn)(X), fn(X))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_an_eager_fully_connected_keeps_no_activation(jitted):
    """A value is dropped after its last use: what is held at a time does not grow with the depth."""
    x = jnp.ones((64, 3, 4, 4))

    def held(depth):
        def network(x):
            for _ in range(depth):
                x = jax.nn.relu(conv(x, K)) - 0.5
            return x

        most = []
        others = {id(a) for a in jax.live_arrays()}

        def builder(spec, kernel):
            most.append(sum(a.nbytes for a in jax.live_arrays() if id(a) not in others))
            return fc.as_matrix(spec, kernel)

        fn = jax.jit(network) if jitted else network
        close(fc.fully_connected(fn, builder=builder)(x), network(x))
        return max(most)

    assert held(20) <= held(3) <= 3 * x.nbytes

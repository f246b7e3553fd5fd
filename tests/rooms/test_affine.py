"""matrix_of and local_affine on hand-written functions.

Matrices are held against jax.jacobian, which shares nothing with them; networks against themselves.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handwritten import close, compilations, conv, normal
from jax import lax
from jax.flatten_util import ravel_pytree

import jaxconv_fc as fc

RNG = np.random.default_rng(5)
X, K = normal(RNG, 2, 3, 6, 6), normal(RNG, 3, 3, 3, 3)
K2, DENSE = normal(RNG, 4, 3, 2, 2), normal(RNG, 7, 36)


# matrices of whole functions --------------------------------------------------------------------


def _five_layers(x):
    y = jnp.pad(conv(x, K) + 1.0, ((0, 0), (0, 0), (1, 0), (0, 1)))
    y = lax.reduce_window(y, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
    return conv(y, K2).reshape(2, -1) @ DENSE.T


@jax.custom_vjp
def _double(x):
    return 2 * x


_double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@jax.custom_jvp
def _tripled(x):
    return 3 * x


_tripled.defjvps(lambda t, out, x: 3 * t)
LEFT, RIGHT, WHOLE = normal(RNG, 6, 2), normal(RNG, 4, 2, 6), normal(RNG, 5, 2, 3, 6, 6)
CIRCULAR = fc.conv_spec((1, 3, 6, 6), K.shape, (1, 1), "SAME", padding_mode="circular")

AFFINE = {
    "identity": lambda x: x,
    "constant": lambda x: jnp.ones(3),
    "x + mean": lambda x: x + x.mean(),
    "dead code": lambda x: (jnp.exp(x), x * 2)[1],
    "conv": lambda x: conv(x, K),
    "circular": lambda x: conv(jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap"), K, (2, 1), "VALID"),
    "reflect": lambda x: conv(
        jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect"), K, padding="VALID"
    ),
    "five layers": _five_layers,
    "batch norm": lambda x: (
        (conv(x, K) - jnp.ones((1, 3, 1, 1))) / jnp.arange(1.0, 4).reshape(1, 3, 1, 1) + 0.5
    ),
    "scan": lambda x: lax.scan(
        lambda c, w: (conv(c, w) + 1, c[:, 0]), x, jnp.stack([K, 2 * K]), reverse=True
    ),
    "custom_vjp": lambda x: jax.jit(_double)(conv(x / 255 - 0.5, K, (2, 2))),
    "layouts": lambda x: conv(x, LEFT.reshape(2, 6, 1, 1), dimension_numbers=("NHWC", "OIHW", "NHWC"))[
        :, ::-1, 1:4
    ],
    "batch groups": lambda x: conv(x, normal(np.random.default_rng(1), 4, 3, 2, 2), batch_group_count=2),
    "depthwise chain": lambda x: conv(
        conv(x, K[:, :1], feature_group_count=3), K[:, 1:2], feature_group_count=3
    ),
    "transposed": lambda x: conv(x, K, padding=[(2, 2), (1, 3)], lhs_dilation=(2, 2)),
    "residual": lambda x: conv(conv(x, K) + x, K2) * 3 - 1,
    "strided chain": lambda x: conv(
        conv(conv(x, K, (2, 2)), K, padding=[(-1, 3), (2, 0)]), K2, rhs_dilation=(2, 1)
    ),
    "dilated chain": lambda x: conv(
        conv(conv(x, K), K, (1, 2), [(1, 2), (2, -1)], rhs_dilation=(2, 1), lhs_dilation=(1, 2)), K
    ),
    "dilated pooling": lambda x: lax.reduce_window(
        conv(x, K),
        0.0,
        lax.add,
        (1, 1, 2, 3),
        (1, 1, 2, 1),
        [(0, 0), (0, 0), (1, 2), (0, 1)],
        (1, 1, 2, 1),
        (1, 1, 3, 2),
    ),
    "in the kernel": lambda x: conv(jnp.ones((2, 3, 9, 9)), x, padding="VALID"),
    "concatenate": lambda x: jnp.concatenate([x, jnp.ones((2, 1, 6, 6)), -x], 1)[:, ::2],
    "where": lambda x: jnp.where(jnp.arange(6)[None, None, None] > 2, x, 3.0),
    "remat": jax.checkpoint(lambda x: conv(conv(x, K), K2)),
    "fft": lambda x: jnp.fft.fft(x).real,
    "take and set": lambda x: (x[:, jnp.array([0, 2, 0])] * 2).at[:, 1].set(0.0).at[0].add(1.0),
    "deep and narrow": lambda x: conv(conv(conv(conv(x, K), K), K), K2).mean((2, 3)),
    "map": lambda x: lax.map(lambda a: a @ LEFT, x),
    "apply": lambda x: jax.vmap(partial(fc.apply, CIRCULAR, K))(x),
    "apply_transpose": lambda x: jax.vmap(partial(fc.apply_transpose, CIRCULAR, K))(x),
    "dense left": lambda x: jnp.einsum("bchw,hk->kbcw", x, LEFT),
    "dense right": lambda x: jnp.einsum("kbh,bchw->bkcw", RIGHT, x),
    "dense whole": lambda x: WHOLE.reshape(5, -1) @ x.ravel(),
    "dense whole, left": lambda x: lax.dot_general(x, WHOLE, (((0, 1, 2, 3), (1, 2, 3, 4)), ((), ()))),
    "dense permuted": lambda x: lax.dot_general(x, WHOLE, (((3, 1, 0, 2), (3, 2, 1, 4)), ((), ()))),
    "conv then dense": lambda x: jnp.einsum("bchw,hk->kbcw", conv(x, K), LEFT),
    "cumsum": lambda x: jnp.cumsum(x, 2),
    "constant branch": lambda x: lax.cond(jnp.sum(jnp.ones(3)) > 2, lambda x: conv(x, K), jnp.sin, x),
    "subtracted": lambda x: 2.0 - conv(x, K),
    "custom_jvp": lambda x: _tripled(conv(x, K)),
    "relu of a constant": lambda x: x * jax.nn.relu(K[0, 0, 0, 0]),
}
AFFINE["scan"] = lambda x, scan=AFFINE["scan"]: scan(x)[0] + scan(x)[1].sum(0)[:, None]


@pytest.mark.parametrize("names", [list(AFFINE)[i::6] for i in range(6)], ids=", ".join)
def test_matrix_of_is_the_jacobian_and_the_offset(names):
    """Several functions in one program."""
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)

    def both(fn, x):
        return fc.matrix_of(fn, shape), jax.jacobian(fn)(x), fn(x)

    made = jax.jit(lambda x: [both(AFFINE[name], x) for name in names])(X)
    for name, one in zip(names, made, strict=True):
        (matrix, offset), jacobian, value = jax.tree.map(np.asarray, one)
        close(matrix, jacobian.reshape(-1, X.size), name=name)
        close(matrix @ np.ravel(X) + offset, value.ravel(), name=name)
        sparse, rows = fc.sparse_matrix_of(AFFINE[name], shape), np.array([-1, 0, 1, 0])
        assert sparse.matrix.has_canonical_format
        assert sparse.matrix.dtype == matrix.dtype == sparse.offset.dtype
        close(sparse.matrix.toarray(), matrix, name=name)
        close(sparse.offset, offset, name=name)
        some = fc.sparse_matrix_of(AFFINE[name], shape, rows=rows)
        close(some.matrix.toarray(), matrix[rows], name=name)
        close(some.offset, offset[rows], name=name)


def _of_a_tree(v):
    """Of two arrays and a number, into a dictionary of arrays."""
    x, (scale, w) = v["x"], v["rest"]
    return {"y": conv(x, K) + 2 * scale, "z": (w[::-1] - x[0, 0, 0, :4] + 1.0, x.sum() - scale)}


def test_pytrees_are_in_the_order_of_ravel_pytree():
    x = {"x": X, "rest": (np.float64(2.0), normal(RNG, 4))}
    flat, unravel = ravel_pytree(x)
    jacobian = jax.jit(jax.jacobian(lambda v: ravel_pytree(_of_a_tree(unravel(v)))[0]))(flat)
    rows = [-1, 5, 0, 5]
    for got, want in (
        (fc.matrix_of(_of_a_tree, x), jacobian),
        (fc.matrix_of(_of_a_tree, x, rows=rows), jacobian[np.array(rows)]),
        (fc.local_affine(lambda v: jax.tree.map(jax.nn.relu, _of_a_tree(v)), x), None),
    ):
        value = ravel_pytree(_of_a_tree(x))[0]
        if want is None:
            want, value = jnp.where((value > 0)[:, None], jacobian, 0.0), jax.nn.relu(value)
        close(got.matrix, want)
        close(got.matrix @ flat + got.offset, value if len(want) == len(value) else value[np.array(rows)])


def test_rows_cost_what_they_are():
    """Of a function whose whole matrix is beyond the limit."""
    deep = AFFINE["deep and narrow"]
    with fc.memory_limit(3 * X.nbytes):
        with pytest.raises(ValueError, match="sparse_matrix_of"):
            fc.matrix_of(deep, X)
        some = fc.matrix_of(deep, X, rows=[1, 2])
    close(some.matrix, fc.matrix_of(deep, X).matrix[1:3])
    traced = jax.jit(lambda i: fc.matrix_of(deep, X, rows=i))(jnp.array([1, 2, 1000]))
    close(traced.matrix[:2], some.matrix)
    assert np.isfinite(traced.offset[:2]).all()
    assert np.isnan(traced.offset[2])


@pytest.mark.parametrize("name", ["constant", "circular", "batch norm", "deep and narrow"])
def test_matrix_of_outside_of_jit(name):
    want = jax.jit(lambda: fc.matrix_of(AFFINE[name], X))()
    for got, expected in zip(fc.matrix_of(AFFINE[name], X), want, strict=True):
        close(got, expected)


# Functions outside of jit share one program where they differ in their constants, and in nothing else.
ALIKE = {
    "weights": lambda x, i: conv(x, [K, 2 * K][i]) + [1.0, K[0, 0, 0, 0]][i],
    "scalars": lambda x, i: conv(x, K) * [2.0, 3.0][i],
    "signs": lambda x, i: x[:, :, :, ::-1][:, :, ::-1] if i else x[:, :, ::-1],
    "strides": lambda x, i: conv(conv(x, K), K, padding=[(1, 1), [(2, 0), (0, 2)][i]]),
    "wiring": lambda x, i: (lambda a, b: conv((a, b)[i], K) - (b, a)[i])(conv(x, K), x * 2.0),
    "order": lambda x, i: conv(x, K) - K[0, 0, 0, 0] if i else K[0, 0, 0, 0] - conv(x, K),
    "loops": lambda x, i: lax.fori_loop(0, 1 + i, lambda _, y: conv(y, K), x),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_compiled_for_one_function_is_not_taken_for_another(name):
    x, values = np.ravel(X), jax.jit(lambda x: [jnp.ravel(ALIKE[name](x, i=i)) for i in range(2)])(X)
    for _ in range(2):
        for i, value in enumerate(values):
            fn = partial(ALIKE[name], i=i)
            matrix, offset = fc.matrix_of(fn, X)
            close(np.asarray(matrix) @ x + offset, value)
            local = fc.local_affine(lambda x, fn=fn: jax.nn.relu(fn(x)), X)
            close(np.asarray(local.matrix) @ x + local.offset, np.maximum(value, 0))


def test_functions_that_differ_in_their_weights_are_compiled_once():
    def run(i):
        kernel = normal(np.random.default_rng(i), 3, 3, 3, 3)
        return jax.block_until_ready(fc.matrix_of(lambda x: conv(conv(x, kernel), kernel) + kernel.sum(), X))

    run(0)
    with compilations() as programs:
        run(1)
        run(2)
    assert not programs


def test_an_infinite_tap_fills_its_own_entries_only():
    kernel = jnp.array([[[jnp.inf, 2.0, jnp.nan]]])
    matrix, offset = fc.matrix_of(
        lambda x: conv(jnp.pad(x, ((0, 0), (0, 0), (1, 1)), mode="wrap"), kernel, (1,), "VALID"), X[:1, :1, 0]
    )
    want = np.zeros((6, 6))
    for o in range(6):
        want[o, [(o - 1) % 6, o, (o + 1) % 6]] = kernel.ravel()
    np.testing.assert_array_equal(matrix, want)
    np.testing.assert_array_equal(offset, np.zeros(6))


def test_matrix_of_an_integer_function():
    x, kernel = (
        jnp.arange(36, dtype=jnp.int32).reshape(1, 1, 6, 6),
        jnp.arange(4, dtype=jnp.int32).reshape(1, 1, 2, 2),
    )
    fn = lambda x, kernel: conv(conv(x, kernel) + jnp.ones((), x.dtype), kernel)  # noqa: E731
    matrix, offset = fc.matrix_of(partial(fn, kernel=kernel), x)
    assert matrix.dtype == jnp.int32
    want = fn(x.astype(jnp.float64), kernel.astype(jnp.float64)).ravel()  # a GPU has no integer convolutions
    np.testing.assert_array_equal(matrix @ x.ravel() + offset, want)


def test_a_matrix_beyond_the_memory_limit_is_refused():
    with (
        fc.memory_limit(10_000),
        pytest.raises(ValueError, match=r"216 x 216 float64 = 364 KiB: .*`with jaxconv_fc.memory_limit"),
    ):
        fc.matrix_of(AFFINE["conv"], X)


@pytest.mark.parametrize("name", ["conv", "circular", "strided chain", "concatenate", "dense left"])
def test_matrix_of_integers_is_exact(name):
    rng = np.random.default_rng(2)
    kernels = {
        "K": rng.integers(-3, 4, K.shape),
        "K2": rng.integers(-3, 4, K2.shape),
        "LEFT": rng.integers(-3, 4, (6, 2)),
    }
    x = jnp.asarray(rng.integers(-3, 4, X.shape)).astype(float)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in kernels.items():
            patch.setitem(globals(), key, jnp.asarray(value).astype(float))
        matrix, offset = fc.matrix_of(AFFINE[name], x)
        np.testing.assert_array_equal(matrix @ x.ravel() + offset, AFFINE[name](x).ravel())


def test_matrix_of_is_differentiable():
    weights = jnp.cos(jnp.arange(108.0 * 108)).reshape(108, 108)
    x = X[:1]

    def ours(k):
        return jnp.sum(weights * fc.matrix_of(lambda x: conv(conv(x, k), K), x)[0])

    def jacobian(k):
        return jnp.sum(weights * jax.jacobian(lambda x: conv(conv(x, k), K))(x).reshape(108, 108))

    close(jax.jit(jax.grad(ours))(K), jax.jit(jax.grad(jacobian))(K), 10)


BROKEN = {
    "max": lambda x: jax.nn.relu(conv(x, K)),
    "mul": lambda x: x * x,
    "div": lambda x: 1 / x,
    "cond": lambda x: lax.cond(x.sum() > 0, lambda x: x, lambda x: -x, x),
    "reduce_max": lambda x: x.max(),
    "round": lambda x: jnp.round(x) * 2,
    "exp": lambda x: conv(jnp.exp(x), K),
    "convert_element_type": lambda x: x.astype(int),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_function_that_is_not_affine_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"not affine in x: primitive '{name}'.* at test_affine.py:"):
        fc.matrix_of(BROKEN[name], X)


def test_what_a_gather_fills_in_is_an_offset():
    """And stays a symbolic zero where all indices are inside: an infinite tap after it is no NaN."""
    x, index = jnp.arange(3.0), jnp.array([0, 9])
    for fill in (7.0, None):  # None: NaN for floats
        fn = lambda x, fill=fill: 2 * x.at[index].get(mode="fill", fill_value=fill)  # noqa: E731
        for matrix, offset in (fc.matrix_of(fn, x), jax.jit(lambda fn=fn: fc.matrix_of(fn, x))()):
            np.testing.assert_array_equal(matrix, [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
            np.testing.assert_array_equal(offset, [0.0, 14.0 if fill else np.nan])
        np.testing.assert_array_equal(fc.local_affine(fn, x).offset, [0.0, 14.0 if fill else np.nan])
    integers = fc.matrix_of(lambda x: x.at[index].get(mode="fill"), jnp.arange(3, dtype=jnp.int32))
    np.testing.assert_array_equal(integers[1], [0, np.iinfo(np.int32).min])
    inside = lambda x: x.at[jnp.array([2, 0])].get(mode="fill") * jnp.inf  # noqa: E731
    np.testing.assert_array_equal(fc.matrix_of(inside, x)[1], [0.0, 0.0])
    traced = jax.jit(lambda i: fc.matrix_of(lambda x: x.at[i].get(mode="fill", fill_value=7.0), x))(index)
    np.testing.assert_array_equal(traced[1], [0.0, 7.0])


COMPLEX = jnp.array([1 + 1j, 2 - 1j, 0.5j, 3.0])
OF_COMPLEX_X = {
    "fft": jnp.fft.fft,
    "fft, normalised": lambda x: jnp.fft.fft2(x.reshape(2, 2), norm="ortho"),
    "ifft": lambda x: jnp.fft.ifft(x * (1 + 2j)),
    "solve": lambda x: jnp.linalg.solve(jnp.diag(COMPLEX), x),
    "of a constant": lambda x: x * jnp.fft.irfft(jnp.array([1.0, 2.0 + 0j, 1.0]), 4).astype(x.dtype),
}


@pytest.mark.parametrize("name", OF_COMPLEX_X)
def test_functions_linear_over_the_complex_numbers(name):
    fn = OF_COMPLEX_X[name]
    (matrix, offset), jacobian, value = jax.jit(
        lambda x: (fc.matrix_of(fn, x), jax.jacobian(fn, holomorphic=True)(x), fn(1j * x))
    )(COMPLEX)
    close(matrix, jacobian.reshape(-1, 4))
    close(np.asarray(matrix) @ (1j * np.asarray(COMPLEX)) + offset, value.ravel())


NOT_COMPLEX = {
    "fft": lambda x: jnp.fft.irfft(x),
    "real": lambda x: x.real,
    "conj": lambda x: x.conj() * 2,
    "imag": lambda x: jnp.fft.rfft(x.imag),
    "abs": abs,
}


@pytest.mark.parametrize("name", NOT_COMPLEX)
def test_what_takes_real_parts_is_not_linear_over_the_complex_numbers(name):
    with pytest.raises(ValueError, match=f"not affine in x: primitive '{name}'"):
        fc.matrix_of(NOT_COMPLEX[name], COMPLEX)


@pytest.mark.parametrize("shape", [(6,), (2, 5)])
def test_a_real_fft_and_back_is_linear(shape):
    def fn(x):
        spectrum = jnp.fft.rfftn(x)
        return jnp.fft.irfftn(spectrum * (2 - 1j), shape)

    x = jnp.arange(float(np.prod(shape))).reshape(shape)
    matrix, jacobian = jax.jit(lambda x: (fc.matrix_of(fn, x)[0], jax.jacobian(fn)(x)))(x)
    close(matrix, jacobian.reshape(x.size, x.size))


COMPLEX_SWITCHES = {
    "abs": lambda z: abs(z),
    "sign": lambda z: jnp.sign(z).real,
    "eq": lambda z: jnp.where(z == 1, 0.0, z.real),
    "ne": lambda z: jnp.where(z != 1, 0.0, z.real),
    "max": lambda z: lax.max(z, jnp.ones_like(z)).real,
    "min": lambda z: lax.min(z, jnp.ones_like(z)).imag,
    "reduce_max": lambda z: z.max().real,
}


@pytest.mark.parametrize("name", COMPLEX_SWITCHES)
def test_switches_of_complex_values_are_refused(name):
    """``|z|`` is a cone, and no plane separates where two complex numbers differ."""
    fn = COMPLEX_SWITCHES[name]
    names = [e.primitive.name for e in jax.make_jaxpr(fn)(COMPLEX).eqns]
    said = (
        f"not piecewise linear in x: primitive '{name}' of complex values" if name in names else "not piece"
    )
    with pytest.raises(ValueError, match=said):
        fc.local_affine(lambda x: fn(lax.complex(x, 2 * x)), jnp.arange(3.0))


def _rewritten(x):
    state = jax.new_ref(jnp.zeros(4))
    state[...] = 2 * x
    return state[...]


def _added(x):
    state = jax.new_ref(jnp.zeros(4))
    state[1] += x[0]
    return state[...]


def _of_x(x):
    return jax.new_ref(x)[...] * 2


@pytest.mark.parametrize("fn", [_rewritten, _added, _of_x])
def test_mutable_arrays_are_refused(fn):
    """What was written to one was lost: the matrix was 0."""
    for tool in (fc.matrix_of, fc.local_affine):
        with pytest.raises(ValueError, match="reads or writes a mutable array"):
            tool(fn, jnp.arange(4.0))


def test_mutable_arrays_that_do_not_depend_on_x_are_known():
    def fn(x):
        state = jax.new_ref(jnp.zeros(4))
        state[...] = jnp.arange(4.0)
        return x + state[...]

    np.testing.assert_array_equal(fc.matrix_of(fn, jnp.ones(4))[1], jnp.arange(4.0))


@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_a_loop_may_make_constants_beside_what_depends_on_x(constant):
    """A scalar 0 of every step is a known array of zeros, not a symbolic zero."""
    x = jnp.arange(3.0)

    def fn(x):
        total, ys = lax.scan(lambda c, v: (c + v, jnp.full((), constant)), jnp.zeros(()), x)
        return x * jnp.cos(ys) + total

    matrix, offset = fc.matrix_of(fn, x)
    np.testing.assert_allclose(matrix, np.eye(3) * np.cos(constant) + 1, rtol=1e-15)
    assert not offset.any()


def test_what_jax_cannot_transpose_is_carried_forward():
    """A scatter that may write a place twice has no transpose in JAX; the output is the smaller side."""
    first, last = normal(RNG, 4, 6), normal(RNG, 2, 4)
    fn = lambda x: last @ jnp.zeros(4).at[jnp.array([0, 2])].set((first @ x)[:2])  # noqa: E731
    x = jnp.arange(6.0)
    close(fc.matrix_of(fn, x)[0], last[:, jnp.array([0, 2])] @ first[:2])


def test_products_of_booleans_are_refused():
    with pytest.raises(ValueError, match="'dot_general' of booleans"):
        fc.matrix_of(lambda x: jnp.ones((2, 3), bool) @ x, jnp.ones(3, bool))


def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match="x must be a pytree of arrays, got 'no'"):
        fc.matrix_of(lambda x: x[0], [1.0, "no"])
    with pytest.raises(TypeError, match="return a pytree of arrays, got 'no'"):
        fc.matrix_of(lambda x: (x, "no"), X)
    with pytest.raises(TypeError, match="fn returns no array"):
        fc.matrix_of(lambda x: (), X)
    with pytest.raises(TypeError, match="rows must be a list of integers"):
        fc.matrix_of(lambda x: x, X, rows=[0.5])
    with pytest.raises(IndexError, match="rows go from 0 to 216"):
        fc.matrix_of(lambda x: x, X, rows=[0, X.size])
    with pytest.raises(TypeError, match="real floats"):
        fc.local_affine(lambda x: x, jnp.arange(3))
    with pytest.raises(ValueError, match="not piecewise linear in x: primitive 'exp'"):
        fc.local_affine(jnp.exp, X)


# piecewise linear networks ----------------------------------------------------------------------

K5, TOP = normal(RNG, 5, 3, 3, 3), normal(RNG, 4, 20)


def _pooled(x):
    y = jax.nn.leaky_relu(conv(x, K5) + 0.1)
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), "SAME")
    y = jax.nn.relu(conv(y, normal(np.random.default_rng(1), 5, 5, 2, 2), (2, 2)))
    y = jnp.abs(jnp.clip(y, -1.0, 2.0) - 0.3)
    return jnp.maximum(y.reshape(2, -1) @ TOP.T, 0.1).max(1)


def test_local_affine_is_exact_at_x_and_inside_the_radius():
    local, pooled = jax.jit(partial(fc.local_affine, _pooled))(X), jax.jit(_pooled)
    close(local.matrix, jax.jit(jax.jacobian(_pooled))(X).reshape(-1, X.size))
    rng = np.random.default_rng(0)
    assert 0 < local.radius < np.inf
    for _ in range(10):
        step = rng.standard_normal(X.shape)
        z = X + 0.999 * local.radius * step / np.linalg.norm(step)
        close(local.matrix @ z.ravel() + local.offset, pooled(z))


def test_the_radius_is_the_distance_to_the_nearest_switch():
    rng = np.random.default_rng(3)
    kernel, x = normal(rng, 2, 1, 3, 3), normal(rng, 1, 1, 5, 5)
    local = jax.jit(partial(fc.local_affine, lambda x: jax.nn.relu(conv(x, kernel))))(x)
    matrix = np.asarray(fc.matrix_of(lambda x: conv(x, kernel), x)[0])
    z = matrix @ x.ravel()
    distances = np.abs(z) / np.linalg.norm(matrix, axis=1)
    np.testing.assert_allclose(local.radius, distances.min(), rtol=1e-12)
    i = distances.argmin()  # straight across the nearest boundary, just beyond it, the map is another one
    across = x.ravel() - 1.01 * z[i] / (matrix[i] @ matrix[i]) * matrix[i]
    assert np.abs(local.matrix @ across + local.offset - jax.nn.relu(matrix @ across)).max() > 1e-6
    assert fc.local_affine(lambda x: conv(x, kernel), x).radius == np.inf
    assert fc.local_affine(jax.nn.relu, jnp.zeros(2)).radius == 0
    assert fc.local_affine(lambda x: jax.nn.relu(-2 * x - 1), jnp.array([0.0, 3.0])).radius == 0.5


def test_the_radius_is_that_of_the_nearest_layer_of_switches():
    """Three layers, of which the nearest boundary lies in the first, the second, the third."""
    for at in range(3):
        distances = [1.0 if i == at else 5.0 for i in range(3)]

        def fn(x, distances=distances):
            for i, distance in enumerate(distances):  # each layer sees a coordinate of its own
                y = x[i] - 10.0 + distance
                x = x.at[i].set(jnp.where(y > 0, y, 0.1 * y) + 10.0 - distance)
            return x

        x = jnp.array([10.0, 10.0, 10.0])
        np.testing.assert_allclose(fc.local_affine(fn, x).radius, 1.0, rtol=1e-14)
        across = x.at[at].add(-1.01)
        local = fc.local_affine(fn, x)
        assert np.max(abs(local.matrix @ across + local.offset - fn(across))) > 1e-3


def test_every_loser_of_a_maximum_is_a_switch():
    x = jnp.array([0.0, 3.0, 1.0])
    pooled = partial(lax.reduce_window, init_value=-jnp.inf, computation=lax.max, window_dimensions=(3,),
                     window_strides=(1,), padding="VALID")  # fmt: skip
    for largest in (jnp.max, pooled):
        local = fc.local_affine(largest, x)
        np.testing.assert_array_equal(local.matrix, [[0.0, 1.0, 0.0]])
        np.testing.assert_allclose(local.radius, 2**0.5, rtol=1e-15)  # (3 - 1) / |(1, -1)|


@pytest.mark.parametrize("clip", [lambda x: jnp.clip(x, -1.0, 2.0), lambda x: lax.clamp(-1.0, x, 2.0)])
def test_both_bounds_of_a_clip_are_switches(clip):
    for value, radius in ((1.5, 0.5), (-0.75, 0.25), (0.5, 1.5), (3.0, 1.0), (-3.0, 2.0)):
        local = fc.local_affine(clip, jnp.array([value]))
        np.testing.assert_array_equal(local.radius, radius)
        np.testing.assert_array_equal(local.matrix, [[float(-1 < value < 2)]])


def test_the_radius_is_the_least_of_all_layers():
    """The nearest switch in the first, the second, the last of three layers."""
    for offsets, radius in (((1.0, 5.0, 9.0), 1.0), ((5.0, -4.0, 9.0), 1.0), ((5.0, 4.0, -8.5), 0.5)):

        def network(x, offsets=offsets):
            for offset in offsets:
                x = jax.nn.relu(x + offset)
            return x

        np.testing.assert_allclose(fc.local_affine(network, jnp.zeros(1)).radius, radius, rtol=1e-12)


def test_columns_that_are_made_in_several_parts_are_all_there():
    """648 of them, more than fit the cache at once, and no multiple of how many do."""
    rng = np.random.default_rng(4)
    kernels = [jnp.asarray(rng.integers(-3, 4, (8, 8, 3, 3))).astype(float) for _ in range(2)]
    x = jax.ShapeDtypeStruct((1, 8, 9, 9), float)
    matrix, _ = fc.matrix_of(lambda x: conv(conv(x, kernels[0]), kernels[1]), x)
    spec = fc.conv_spec(x.shape, (8, 8, 3, 3), (1, 1), "SAME")
    first, second = (np.asarray(fc.as_matrix(spec, kernel)) for kernel in kernels)
    np.testing.assert_array_equal(matrix, second @ first)

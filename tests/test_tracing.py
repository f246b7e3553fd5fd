"""find_convs, fully_connected, matrix_of and local_affine on hand-written functions.

Matrices are held against jax.jacobian, which shares nothing with them; networks against themselves.
"""

import json
import os
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxconv_fc as fc


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


RNG = np.random.default_rng(5)
X, K = normal(RNG, 2, 3, 6, 6), normal(RNG, 3, 3, 3, 3)
K2, DENSE = normal(RNG, 4, 3, 2, 2), normal(RNG, 7, 36)


def conv(x, kernel, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def close(a, b, digits=12):
    scale = max(1.0, float(jnp.max(jnp.abs(b), initial=0)))
    np.testing.assert_allclose(a, b, rtol=0, atol=scale * 10.0**-digits)


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


@jax.custom_batching.custom_vmap
def _batched(x, kernel):
    return conv(x, kernel)


@_batched.def_vmap
def _(size, batched, x, kernel):
    axes = [0 if b else None for b in batched]
    return jax.vmap(lambda x, kernel: 3 * conv(x, kernel), axes)(x, kernel), True


def _sharded(x, kernel):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = jax.sharding.PartitionSpec
    body = lambda x, k: lax.psum(lax.scan(lambda c, _: (conv(c, k), None), x, None, length=2)[0], "d")  # noqa: E731
    return jax.shard_map(body, mesh=mesh, in_specs=(spec("d"), spec()), out_specs=spec())(x, kernel)


def _solved(x, kernel):
    return jax.scipy.sparse.linalg.cg(lambda v: v + 0.01 * conv(v, kernel), x, maxiter=3)[0]


def _applied(x, kernel):
    spec = fc.conv_spec(x.shape, kernel.shape, (1, 1), "SAME", padding_mode="circular")
    y = jax.vmap(partial(fc.apply, spec, kernel))(x)
    return jax.vmap(partial(fc.apply_transpose, spec, kernel))(y)


DEEP = {
    "jit(custom_vjp(cond(scan)))": (lambda x, k: jax.jit(_looped)(x, k), 1),
    "custom_jvp": (_ruled, 1),
    "remat": (jax.checkpoint(lambda x, k: conv(jnp.sin(conv(x, k)), k)), 2),
    "fori_loop": (lambda x, k: lax.fori_loop(0, 3, lambda i, c: conv(c, k), x), 1),
    "map": (lambda x, k: lax.map(lambda a: conv(a[None], k)[0], x), 1),
    "vmap": (lambda x, k: jax.vmap(conv, (None, 0))(x, jnp.stack([k, 2 * k])), 1),
    "custom_linear_solve": (_solved, None),
    "apply": (_applied, 2),
    "shard_map": (_sharded, 1),
    "custom_vmap": (_batched, 1),
    "while": (lambda x, k: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, conv(s[1], k)), (0, x))[1], 1),
}


@pytest.mark.parametrize("name", DEEP)
def test_found_and_replaced_wherever_they_are(name):
    fn, count = DEEP[name]
    sites = fc.find_convs(fn, X, K)
    assert len(sites) == count if count else sites
    connected = fc.fully_connected(fn)
    assert not fc.find_convs(connected, X, K)
    close(connected(X, K), fn(X, K))
    close(jax.jit(connected)(X, K), fn(X, K))


@pytest.mark.parametrize("name", [n for n in DEEP if n not in ("while", "custom_vmap")])
def test_gradients_flow_through_the_matrices_and_keep_custom_rules(name):
    fn, _ = DEEP[name]

    def loss(fn):
        return lambda x, k: jnp.sum(jnp.sin(fn(x, k)))

    want = jax.grad(loss(fn), (0, 1))(X, K)
    for got_fn in (jax.grad(loss(fc.fully_connected(fn)), (0, 1)), fc.fully_connected(jax.grad(loss(fn), (0, 1)))):
        assert fc.find_convs(jax.grad(loss(fn), (0, 1)), X, K)
        assert not fc.find_convs(got_fn, X, K)
        for got, expected in zip(jax.jit(got_fn)(X, K), want, strict=True):
            close(got, expected, 11)


@pytest.mark.parametrize("name", [n for n in DEEP if n != "shard_map"])
def test_vmap_on_either_side(name):
    fn, _ = DEEP[name]
    xs = jnp.stack([X, 2 * X])
    want = jax.vmap(fn, (0, None))(xs, K)
    for mapped in (jax.vmap(fc.fully_connected(fn), (0, None)), fc.fully_connected(jax.vmap(fn, (0, None)))):
        assert not fc.find_convs(mapped, xs, K)
        close(mapped(xs, K), want, 11)


def test_a_site_knows_its_spec_kernel_and_input():
    def network(x, k):
        y = conv(x, k, (2, 1), [(1, 0), (-1, 2)], rhs_dilation=(1, 2))
        return conv(jnp.tanh(y), K2, lhs_dilation=(2, 2), padding=[(0, 1), (1, 1)])

    first, second = fc.find_convs(network, X, K)
    assert first.spec == fc.conv_spec(X.shape, K.shape, (2, 1), [(1, 0), (-1, 2)], rhs_dilation=(1, 2))
    np.testing.assert_array_equal(first.kernel, K)
    np.testing.assert_array_equal(first.x, X)
    np.testing.assert_array_equal(second.x, jnp.tanh(conv(X, K, (2, 1), [(1, 0), (-1, 2)], rhs_dilation=(1, 2))))
    assert first.name.startswith("test_tracing.py:")
    shapes = fc.find_convs(network, jax.ShapeDtypeStruct(X.shape, X.dtype), K)
    assert isinstance(shapes[0].x, jax.ShapeDtypeStruct) and isinstance(shapes[1].x, jax.ShapeDtypeStruct)
    np.testing.assert_array_equal(shapes[1].kernel, K2)
    assert [s.spec for s in shapes] == [first.spec, second.spec]


def test_times_and_loop_invariant_kernels():
    (site,) = fc.find_convs(lambda x: lax.fori_loop(0, 3, lambda i, c: conv(c, K), x), X)
    assert site.times == 3
    np.testing.assert_array_equal(site.kernel, K)
    assert isinstance(site.x, jax.ShapeDtypeStruct)
    (site,) = fc.find_convs(DEEP["while"][0], X, K)
    assert site.times is None


def test_the_table():
    @jax.named_scope("first")
    def layer(x):
        return conv(x, K)

    sites = fc.find_convs(lambda x: conv(layer(x), K2, (2, 2)), X)
    lines = repr(sites).splitlines()
    assert lines[0].split() == ["layer", "geometry", "M", "stored", "density", "dense", "sparse", "times"]
    assert "first" in lines[1] and "108x108" in lines[1] and "2,304" in lines[1] and "stride 2x2" in lines[2]
    assert lines[3].split()[:2] == ["total", f"{sum(s.spec.nse for s in sites):,}"]
    assert repr(fc.find_convs(jnp.sin, X)) == "no convolutions"


@pytest.mark.parametrize("options", [{}, {"strides": (2, 1)}, {"rhs_dilation": (1, 2)}, {"padding": [(2, 0), (0, 1)]}])
def test_gradients_perform_the_transposed_convolution(options):
    def loss(x, k):
        return jnp.sum(conv(x, k, **options) ** 2)

    (forward,) = fc.find_convs(lambda x, k: conv(x, k, **options), X, K)
    sites = fc.find_convs(jax.grad(loss, (0, 1)), X, K)
    assert len(sites) == 3
    want = fc.as_matrix(forward.spec, forward.kernel).T
    np.testing.assert_array_equal(fc.as_matrix(*fc.transpose(forward.spec, forward.kernel)), want)
    backward = [s for s in sites if s.spec.shape == want.shape and "transpose" in s.name]
    assert any(np.array_equal(fc.as_matrix(s.spec, s.kernel), want) for s in backward)


# matrices of whole functions --------------------------------------------------------------------


def _five_layers(x):
    y = jnp.pad(conv(x, K) + 1.0, ((0, 0), (0, 0), (1, 0), (0, 1)))
    y = lax.reduce_window(y, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
    return conv(y, K2).reshape(2, -1) @ DENSE.T


@jax.custom_vjp
def _double(x):
    return 2 * x


_double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
LEFT, RIGHT = normal(RNG, 6, 2), normal(RNG, 4, 2, 6)
CIRCULAR = fc.conv_spec((1, 3, 6, 6), K.shape, (1, 1), "SAME", padding_mode="circular")

AFFINE = {
    "identity": lambda x: x,
    "constant": lambda x: jnp.ones(3),
    "x + mean": lambda x: x + x.mean(),
    "dead code": lambda x: (jnp.exp(x), x * 2)[1],
    "conv": lambda x: conv(x, K),
    "circular": lambda x: conv(jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap"), K, (2, 1), "VALID"),
    "reflect": lambda x: conv(jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect"), K, padding="VALID"),
    "five layers": _five_layers,
    "batch norm": lambda x: (conv(x, K) - jnp.ones((1, 3, 1, 1))) / jnp.arange(1.0, 4).reshape(1, 3, 1, 1) + 0.5,
    "scan": lambda x: lax.scan(lambda c, w: (conv(c, w) + 1, c[:, 0]), x, jnp.stack([K, 2 * K]), reverse=True),
    "custom_vjp": lambda x: jax.jit(_double)(conv(x / 255 - 0.5, K, (2, 2))),
    "layouts": lambda x: conv(x, LEFT.reshape(2, 6, 1, 1), dimension_numbers=("NHWC", "OIHW", "NHWC"))[:, ::-1, 1:4],
    "batch groups": lambda x: conv(x, normal(np.random.default_rng(1), 4, 3, 2, 2), batch_group_count=2),
    "depthwise chain": lambda x: conv(conv(x, K[:, :1], feature_group_count=3), K[:, 1:2], feature_group_count=3),
    "transposed": lambda x: conv(x, K, padding=[(2, 2), (1, 3)], lhs_dilation=(2, 2)),
    "residual": lambda x: conv(conv(x, K) + x, K2) * 3 - 1,
    "strided chain": lambda x: conv(conv(conv(x, K, (2, 2)), K, padding=[(-1, 3), (2, 0)]), K2, rhs_dilation=(2, 1)),
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
    "conv then dense": lambda x: jnp.einsum("bchw,hk->kbcw", conv(x, K), LEFT),
    "cumsum": lambda x: jnp.cumsum(x, 2),
}
AFFINE["scan"] = lambda x, scan=AFFINE["scan"]: scan(x)[0] + scan(x)[1].sum(0)[:, None]


@pytest.mark.parametrize("name", AFFINE)
def test_matrix_of_is_the_jacobian_and_the_offset(name):
    fn = AFFINE[name]
    matrix, offset = fc.matrix_of(fn, jax.ShapeDtypeStruct(X.shape, X.dtype))
    close(matrix, jax.jacobian(fn)(X).reshape(-1, X.size))
    close(matrix @ X.ravel() + offset, fn(X).ravel())
    for got, want in zip(jax.jit(lambda: fc.matrix_of(fn, X))(), (matrix, offset), strict=True):
        close(got, want)


@pytest.mark.parametrize("name", ["conv", "circular", "strided chain", "concatenate", "dense left"])
def test_matrix_of_integers_is_exact(name):
    rng = np.random.default_rng(2)
    kernels = {"K": rng.integers(-3, 4, K.shape), "K2": rng.integers(-3, 4, K2.shape), "LEFT": rng.integers(-3, 4, (6, 2))}
    x = jnp.asarray(rng.integers(-3, 4, X.shape)).astype(float)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in kernels.items():
            patch.setitem(globals(), key, jnp.asarray(value).astype(float))
        matrix, offset = fc.matrix_of(AFFINE[name], x)
        np.testing.assert_array_equal(matrix @ x.ravel() + offset, AFFINE[name](x).ravel())


def test_matrix_of_is_differentiable():
    weights = jnp.cos(jnp.arange(108.0 * 108)).reshape(108, 108)
    x = X[:1]
    got = jax.grad(lambda k: jnp.sum(weights * fc.matrix_of(lambda x: conv(conv(x, k), K), x)[0]))(K)
    want = jax.grad(lambda k: jnp.sum(weights * jax.jacobian(lambda x: conv(conv(x, k), K))(x).reshape(108, 108)))(K)
    close(got, want, 10)


BROKEN = {
    "max": lambda x: jax.nn.relu(conv(x, K)),
    "mul": lambda x: x * x,
    "div": lambda x: 1 / x,
    "cond": lambda x: lax.cond(x.sum() > 0, lambda x: x, lambda x: -x, x),
    "reduce_max": lambda x: x.max(),
    "round": jnp.round,
    "exp": lambda x: conv(jnp.exp(x), K),
    "convert_element_type": lambda x: x.astype(int),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_function_that_is_not_affine_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"not affine in x: primitive '{name}'.* at test_tracing.py:"):
        fc.matrix_of(BROKEN[name], X)


def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match="one array"):
        fc.matrix_of(lambda x: x, [1.0, 2.0])
    with pytest.raises(TypeError, match="return one array, got 2"):
        fc.matrix_of(lambda x: (x, x), X)
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
    local = fc.local_affine(_pooled, X)
    close(local.matrix, jax.jacobian(_pooled)(X).reshape(-1, X.size))
    rng = np.random.default_rng(0)
    assert 0 < local.radius < np.inf
    for _ in range(10):
        step = rng.standard_normal(X.shape)
        z = X + 0.999 * local.radius * step / np.linalg.norm(step)
        close(local.matrix @ z.ravel() + local.offset, _pooled(z))


def test_the_radius_is_the_distance_to_the_nearest_switch():
    rng = np.random.default_rng(3)
    kernel, x = normal(rng, 2, 1, 3, 3), normal(rng, 1, 1, 5, 5)
    local = fc.local_affine(lambda x: jax.nn.relu(conv(x, kernel)), x)
    matrix = np.asarray(fc.matrix_of(lambda x: conv(x, kernel), x)[0])
    z = matrix @ x.ravel()
    distances = np.abs(z) / np.linalg.norm(matrix, axis=1)
    np.testing.assert_allclose(local.radius, distances.min(), rtol=1e-12)
    i = distances.argmin()  # straight across the nearest boundary, just beyond it, the map is another one
    across = x.ravel() - 1.01 * z[i] / (matrix[i] @ matrix[i]) * matrix[i]
    assert np.abs(local.matrix @ across + local.offset - jax.nn.relu(matrix @ across)).max() > 1e-6
    assert fc.local_affine(lambda x: conv(x, kernel), x).radius == np.inf
    assert fc.local_affine(jax.nn.relu, jnp.zeros(2)).radius == 0


# a trained network ------------------------------------------------------------------------------


def _real_cases():
    folder = os.environ.get("JAXCONV_FC_CASES")
    for path in sorted(pathlib.Path(folder).glob("realnet_*.json")) if folder else []:
        arrays = np.load(path.with_suffix(".npz"))
        for case in json.loads(path.read_text())["cases"]:
            yield case, {name: arrays[f"{case['id']}/{name}"] for name in case["arrays"]}


@pytest.mark.skipif("JAXCONV_FC_CASES" not in os.environ, reason="JAXCONV_FC_CASES names no folder of cases")
def test_a_trained_network_runs_fully_connected():
    ran = skipped = 0
    for case, arrays in _real_cases():
        numbers = lax.ConvDimensionNumbers(*map(tuple, case["dimension_numbers"]))
        x, w, y = (jnp.asarray(arrays[n]) for n in "xwy")

        def layer(x, w, case=case, numbers=numbers):
            pads = [tuple(p) for p in case["padding"]]
            return lax.conv_general_dilated(
                x, w, case["window_strides"], pads, case["lhs_dilation"], case["rhs_dilation"], numbers,
                case["feature_group_count"], case["batch_group_count"],
            )  # fmt: skip

        (site,) = fc.find_convs(layer, x, w)
        if case["kind"] != "conv" or site.spec.out_size * site.spec.in_size > 20_000_000:
            skipped += 1
            continue
        got = fc.fully_connected(layer)(x, w)
        bias = jnp.zeros((), y.dtype)
        if case.get("has_bias"):
            axes = [i for i in range(y.ndim) if i != numbers.out_spec[1]]
            bias = jnp.expand_dims(jnp.asarray(arrays["b"]), axes)
        terms = np.prod([w.shape[i] for i in numbers.rhs_spec[1:]]) + 2
        bound = 4 * terms * np.finfo(y.dtype).eps / 2 * (layer(abs(x), abs(w)) + abs(bias))
        assert jnp.all(jnp.abs(got + bias - y) <= bound), case["id"]
        ran += 1
    assert ran, "the folder holds no case small enough"
    print(f"{ran} layers run, {skipped} too large")

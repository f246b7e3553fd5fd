"""find_convs on hand-written functions: what a site tells, and where convolutions are looked for.

test_connect.py looks for the convolutions that sit deep inside; test_networks.py has other libraries.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handwritten import close, conv, normal
from jax import lax

import jaxconv_fc as fc

RNG = np.random.default_rng(5)
X, K = normal(RNG, 2, 3, 4, 4), normal(RNG, 3, 3, 3, 3)
K2 = normal(RNG, 4, 3, 2, 2)
SHAPES = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (X, K)]


# what a site tells -----------------------------------------------------------------------------


def test_a_site_knows_its_spec_kernel_and_input():
    first_options = {"strides": (2, 1), "padding": [(1, 0), (-1, 2)], "rhs_dilation": (1, 2)}

    def network(x, k):
        y = jax.jit(lambda x: jnp.tanh(conv(x, k, **first_options)))(x)
        return conv(y, K2, lhs_dilation=(2, 2), padding=[(0, 1), (1, 1)])

    first, second = fc.find_convs(network, X, K)
    assert first.spec == fc.conv_spec(X.shape, K.shape, (2, 1), [(1, 0), (-1, 2)], rhs_dilation=(1, 2))
    np.testing.assert_array_equal(first.kernel, K)
    np.testing.assert_array_equal(first.x, X)
    np.testing.assert_array_equal(second.x, jnp.tanh(conv(X, K, **first_options)))
    assert first.name.startswith("handwritten.py:")
    assert repr(first).splitlines()[1].startswith("0  handwritten.py:")
    shapes = fc.find_convs(network, SHAPES[0], K)
    assert isinstance(shapes[0].x, jax.ShapeDtypeStruct)
    assert isinstance(shapes[1].x, jax.ShapeDtypeStruct)
    np.testing.assert_array_equal(shapes[1].kernel, K2)
    assert [s.spec for s in shapes] == [first.spec, second.spec]


def test_only_what_a_convolution_depends_on_is_computed():
    ran = []

    def noted(x, name):
        jax.debug.callback(lambda _: ran.append(name), x[0, 0, 0, 0])
        return jax.pure_callback(lambda v: (ran.append(name), v)[1], SHAPES[0], x)

    def fn(x):
        y = jax.jit(lambda x: (conv(noted(x, "before"), K), noted(x, "beside")))(x)[0]
        return noted(y, "after")

    (site,) = fc.find_convs(fn, X)
    np.testing.assert_array_equal(site.x, X)
    assert set(ran) == {"before"}


def test_names_are_the_scopes_around_a_convolution():
    @jax.jit
    @jax.named_scope("inner")
    def block(x):
        return lax.scan(lambda c, _: (jax.named_scope("body")(conv)(c, K), None), x, None, length=2)[0]

    (site,) = fc.find_convs(jax.named_scope("outer")(block), *SHAPES[:1])
    assert site.name.split("/")[0] == "outer"
    assert [part for part in site.name.split("/") if part in ("inner", "body")] == ["inner", "body"]


def _while(x, kernel):
    state = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, conv(s[1], kernel)), (0, x))
    return state[1]


def test_times_and_loop_invariant_kernels():
    def twice_in_three(x):
        body = lambda i, c: lax.fori_loop(0, 2, lambda j, c: conv(c, K), c)  # noqa: E731
        return lax.fori_loop(0, 3, body, x)

    (site,) = fc.find_convs(twice_in_three, X)
    assert site.times == 6
    np.testing.assert_array_equal(site.kernel, K)
    assert isinstance(site.x, jax.ShapeDtypeStruct)
    (site,) = fc.find_convs(_while, X, K)
    assert site.times is None
    np.testing.assert_array_equal(site.kernel, K)
    (site,) = fc.find_convs(lambda x, ks: lax.scan(lambda c, k: (conv(c, k), None), x, ks)[0], X, K[None])
    assert isinstance(site.kernel, jax.ShapeDtypeStruct)  # another one in each step


def test_the_condition_of_a_while_loop_runs_no_one_knows_how_often():
    def shrunk(x, kernel):
        return lax.while_loop(lambda x: conv(x, kernel).sum() > 1, lambda x: x / 2, x)

    (site,) = fc.find_convs(shrunk, *SHAPES)
    assert site.times is None


def test_a_convolution_without_outputs_is_listed_too():
    (site,) = fc.find_convs(partial(conv, padding="VALID"), jnp.ones((1, 3, 2, 2)), K)
    assert site.spec.shape == (0, 12)
    assert "0x12       0    0.00%" in repr(site)


def test_every_branch_is_looked_at():
    branches = [lambda x: conv(x, K), lambda x: conv(x, K[::-1])]
    sites = fc.find_convs(lambda i, x: lax.switch(i, branches, x), jnp.asarray(0), X)
    for site, kernel in zip(sites, (K, K[::-1]), strict=True):
        np.testing.assert_array_equal(site.kernel, kernel)
        np.testing.assert_array_equal(site.x, X)


def test_the_products_of_this_library_are_sites_too():
    spec = fc.conv_spec(X.shape, K.shape, (1, 1), "SAME", padding_mode="circular")
    sites = fc.find_convs(jax.grad(lambda x, k: jnp.sum(fc.apply(spec, k, x) ** 2), (0, 1)), X[0], K)
    assert [s.product for s in sites] == ["M x", "M^T y", "X^T y"]
    y = 2 * fc.apply(spec, K, X[0])
    for site, (k, x, out) in zip(sites, [(K, X[0], None), (K, None, y), (None, X[0], y)], strict=True):
        assert site.spec == spec
        for got, want in ((site.kernel, k), (site.x, x), (site.y, out)):
            assert (got is None) == (want is None)
            if got is not None:
                close(got, want)
    lines = repr(sites).splitlines()
    assert "48x48 ^T" in lines[2]
    assert "48x48 (X)" in lines[3]
    assert "circular (1,1) (1,1)" in lines[1]


def test_the_table():
    k, k2 = K.astype(jnp.float32), K2.astype(jnp.float32)

    @jax.named_scope("first")
    def layer(x):
        return conv(x, k)

    def network(x):
        y = conv(layer(x), k[:, :1], (2, 1), feature_group_count=3)
        y = conv(y, k2, padding="VALID", rhs_dilation=(1, 2))
        return lax.while_loop(lambda c: False, lambda c: conv(c, k[:1, :1]), y[:, :1])

    sites = fc.find_convs(network, X.astype(jnp.float32))
    lines = repr(sites).splitlines()
    assert lines[0].split() == [
        "layer", "layout", "geometry", "M", "stored", "density", "dense", "sparse", "times",
        "mult-adds",
    ]  # fmt: skip
    assert lines[1].split() == [
        "0", "first", "NCHW", "OIHW", "3x4x4", "->", "3x4x4,", "kernel", "3x3x3x3,", "pad", "(1,1)", "(1,1)",
        "48x48", "900", "39.06%", "9", "KiB", "7.22", "KiB", "1", "1,800",
    ]  # fmt: skip
    for text in ("stride 2x1", "pad (0,1) (1,1)", "3 groups"):
        assert text in lines[2]
    assert "dilation 1x2" in lines[3]
    assert lines[4].split()[-2:] == ["?", f"{sites[3].multiply_adds:,}"]
    assert lines[-1].endswith("  ?")
    assert len({len(line) for line in lines[1:-1]}) == 1
    dense, stored = sum(s.spec.nbytes().dense for s in sites), sum(s.spec.nse for s in sites)
    assert lines[-1].split()[:4] == ["total", f"{stored:,}", f"{dense / 1024:.3g}", "KiB"]
    assert repr(fc.find_convs(jnp.sin, X)) == "no convolutions"


@pytest.mark.parametrize(
    ("numbers", "layout"),
    [
        (("NHWC", "HWIO", "NHWC"), "NHWC HWIO "),
        (("NHWC", "HWIO", "NCHW"), "NHWC HWIO NCHW "),
        (("CNHW", "IOHW", "CNHW"), "CNHW IOHW "),
    ],
)
def test_the_layout_of_a_convolution(numbers, layout):
    x, k = jnp.ones([{"N": 1, "C": 3, "H": 4, "W": 4}[c] for c in numbers[0]]), jnp.ones
    k = jnp.ones([{"O": 2, "I": 3, "H": 2, "W": 2}[c] for c in numbers[1]])
    sites = fc.find_convs(lambda x: conv(x, k, dimension_numbers=numbers), x)
    assert f" {layout} " in repr(sites)


def test_a_layer_is_called_by_the_path_of_its_kernel():
    """Given or closed over, cast, inside of calls and derivatives. Without a path it is the source line."""
    params = {"encoder": [{"kernel": K}, {"kernel": 2 * K}], "head": 3 * K}

    def network(params, x):
        for layer in params["encoder"]:
            x = jax.jit(conv)(x, layer["kernel"])
        return conv(x.astype(jnp.float32), params["head"].astype(jnp.float32))

    names = ["encoder/0", "encoder/1", "head"]
    shapes = jax.tree.map(lambda k: jax.ShapeDtypeStruct(k.shape, k.dtype), params)
    for sites in (
        fc.find_convs(network, params, X),
        fc.find_convs(network, shapes, SHAPES[0]),
        fc.find_convs(lambda x: network(params, x), X),
        fc.find_convs(partial(network, params), X),
        fc.find_convs(jax.jit(network), params=params, x=X),
    ):
        assert [site.name for site in sites] == names
    forward, backward = fc.find_convs(jax.grad(lambda x: conv(x, params["head"]).sum()), X)
    assert "head" in forward.name
    assert "transpose" in backward.name
    scoped = jax.named_scope("scope")(lambda x: conv(x, params["encoder"][0]["kernel"]))
    assert fc.find_convs(scoped, X)[0].name == "scope/encoder/0"
    assert fc.find_convs(lambda x: conv(x, K), X)[0].name.startswith("handwritten.py:")


UNSORTED = {1: "keys that have no order", "a": 2}  # JAX cannot flatten it


def test_a_closure_that_is_no_pytree_has_no_names():
    (site,) = fc.find_convs(lambda x: conv(x, K) if UNSORTED else x, X)
    assert site.name.startswith("handwritten.py:")


def test_modules_of_flax_and_equinox_are_called_by_their_attributes():
    nnx, eqx = pytest.importorskip("flax.nnx"), pytest.importorskip("equinox")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = (nnx.Conv(3, 3, (3, 3), rngs=rngs) for _ in range(2))

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs), Block(rngs)])

        def __call__(self, x):
            return self.blocks[1](self.blocks[0](x))

    network, x = Network(nnx.Rngs(0)), jnp.ones((1, 5, 5, 3), jnp.float32)
    want = [f"blocks/{i}/{name}" for i in range(2) for name in ("first", "second")]
    for sites in (
        fc.find_convs(network, x),
        fc.find_convs(lambda x: network(x), x),
        fc.find_convs(nnx.jit(lambda m, x: m(x)), network, x),
    ):
        assert [site.name for site in sites] == want
    layers = [eqx.nn.Conv2d(3, 3, 3, key=jax.random.key(i), dtype=jnp.float32) for i in range(2)]
    sites = fc.find_convs(lambda layers, x: layers[1](layers[0](x)), layers, jnp.ones((3, 8, 8), jnp.float32))
    assert [site.name for site in sites] == ["eqx.nn.Conv/0", "eqx.nn.Conv/1"]


def test_a_function_without_jax_arrays_is_refused():
    class Tensor:
        """Of another library."""

    with pytest.raises(TypeError, match="fn returned Tensor, and no JAX array"):
        fc.find_convs(lambda x: Tensor(), X)
    assert not fc.find_convs(lambda x: None, X)
    assert not fc.find_convs(lambda x: (Tensor(), x), X)


def test_find_convs_does_not_take_a_mutable_array_for_known():
    def fn(x):
        kernel = jax.new_ref(0 * K)
        kernel[...] = K
        return conv(x, kernel[...])

    (site,) = fc.find_convs(fn, X)
    assert isinstance(site.kernel, jax.ShapeDtypeStruct)
    close(fc.fully_connected(fn)(X), conv(X, K))


# gradients are convolutions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"strides": (2, 1)}, {"rhs_dilation": (1, 2)}, {"padding": [(2, 0), (0, 1)]}]
)
def test_gradients_perform_the_transposed_convolution(options):
    """JAX's own M^T, entry for entry, is that of transpose, and the third is the kernel gradient."""

    def loss(x, k):
        return jnp.sum(conv(x, k, **options) ** 2)

    forward, *backward = fc.find_convs(jax.grad(loss, (0, 1)), X, K)
    assert len(backward) == 2
    assert forward.spec == fc.conv_spec(X.shape, K.shape, **{"window_strides": (1, 1), "padding": "SAME"} | {
        "window_strides" if name == "strides" else name: value for name, value in options.items()
    })  # fmt: skip
    y_bar = 2 * conv(X, K, **options)
    transposed = fc.as_matrix(*fc.transpose(forward.spec, forward.kernel))
    np.testing.assert_array_equal(transposed, fc.as_matrix(forward.spec, forward.kernel).T)
    (to_input,) = [s for s in backward if s.spec.shape == transposed.shape]
    np.testing.assert_array_equal(fc.as_matrix(to_input.spec, to_input.kernel), transposed)
    close(to_input.x, y_bar)
    (to_kernel,) = [s for s in backward if s is not to_input]
    np.testing.assert_array_equal(to_kernel.x, X)
    close(to_kernel.kernel, y_bar)
    assert all("transpose" in s.name for s in backward)
    want = sum(fc.kernel_vjp(forward.spec, x, y) for x, y in zip(X, y_bar, strict=True))
    close(jax.grad(loss, 1)(X, K), want)

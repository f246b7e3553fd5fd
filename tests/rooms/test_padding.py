"""Padding in front of a convolution is in the spec of its site, or the site says that it is not.

A site is right if M of its spec and kernel takes its x to what the function returns. test_networks.py has the
layers of other libraries.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import drawn
from handwritten import close, conv, normal
from jax import lax

import jaxconv_fc as fc
from jaxconv_fc import spectrum

RNG = np.random.default_rng(11)
X, K = normal(RNG, 1, 2, 5, 4), normal(RNG, 3, 2, 2, 3)
valid = partial(conv, kernel=K, padding="VALID")
PADS = ((0, 0), (0, 0), (1, 2), (2, 1))
ROWS, COLUMNS = ((0, 0), (0, 0), (1, 1), (0, 0)), ((0, 0), (0, 0), (0, 0), (1, 1))
MODES = {
    "constant": "zeros",
    "wrap": "circular",
    "reflect": "reflect",
    "symmetric": "symmetric",
    "edge": "edge",
}


def site_of(fn, x=X):
    """The only convolution. What it says does not depend on whether x is known, and M x is the result."""
    (site,), (shape,) = fc.find_convs(fn, x), fc.find_convs(fn, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert (site.spec, site.in_front) == (shape.spec, shape.in_front)
    assert (site.x.shape, site.x.dtype) == (shape.x.shape, shape.x.dtype)
    y = (
        np.asarray(site.x).reshape(-1, site.spec.in_size)
        @ oracle.matrix(np.asarray(site.kernel), site.spec).T
    )
    close(y, jax.jit(fn)(x).reshape(y.shape), digits=12 if site.dtype == np.float64 else 5)
    return site


def by_index(x, mode, pads=PADS):
    for axis, pad in enumerate(pads):
        x = jnp.take(x, np.pad(np.arange(x.shape[axis]), pad, mode=mode), axis=axis)
    return x


def by_grid(x, mode):
    i, j = (np.pad(np.arange(n), pad, mode=mode) for n, pad in zip(x.shape[2:], PADS[2:], strict=True))
    return x[:, :, i[:, None], j[None]]


@pytest.mark.parametrize("mode", drawn(MODES, 3, always=["constant", "reflect"]))
def test_every_mode_of_pad_however_it_is_written(mode):
    pad = partial(jnp.pad, pad_width=PADS, mode=mode)
    ways = {
        "plain": lambda x: valid(pad(x)),
        "jit": lambda x: jax.jit(valid)(jax.jit(pad)(x)),
        "remat": jax.checkpoint(lambda x: valid(pad(x))),
        "cast": lambda x: conv(pad(x).astype(jnp.float32), K.astype(jnp.float32), padding="VALID"),
        "layout": lambda x: valid(jnp.pad(x.transpose(0, 2, 3, 1), (PADS[0], *PADS[2:], PADS[1]), mode=mode)
                                  .transpose(0, 3, 1, 2)),
        "vmap": jax.vmap(lambda x: valid(jnp.pad(x, PADS[1:], mode=mode)[None])[0]),
        "product": lambda x: fc.apply(fc.conv_spec((1, 2, 8, 7), K.shape, (1, 1), "VALID"), K, pad(x)[0]),
    }  # fmt: skip
    if mode != "constant":
        ways |= {"take": lambda x: valid(by_index(x, mode)), "grid": lambda x: valid(by_grid(x, mode))}
    want = fc.conv_spec(X.shape, K.shape, (1, 1), PADS[2:], padding_mode=mode)
    for name, fn in ways.items():
        x = jnp.concatenate([X, 1 + X]) if name == "vmap" else X
        site = site_of(fn, x)
        assert site.spec.axes == want.axes, name
        assert site.x.shape[-3:] == X.shape[1:], name
        assert not site.in_front
        assert fc.find_convs(fn, x, raw=True)[0].spec.in_shape == (2, 8, 7)
    deep = site_of(
        lambda x: conv(jnp.pad(x, ((0, 0), (0, 0), (7, 6), (9, 0)), mode=mode), K, (2, 3), "VALID")
    )
    assert deep.spec.padding_mode == MODES[mode]
    dilated = site_of(lambda x: valid(pad(x), lhs_dilation=(2, 3), padding=[(0, 0)] * 2))
    assert dilated.spec.padding_mode == MODES[mode]
    if mode != "constant":
        assert dilated.spec.lhs_dilation == (2, 3)


def lax_pad(x, rows=(0, 0, 0), columns=(0, 0, 0), value=0.0):
    return lax.pad(x, value, ((0, 0, 0), (0, 0, 0), rows, columns))


OTHER_WAYS = {  # name: (the function, padding, padding_mode)
    "zeros twice": (lambda x: conv(jnp.pad(x, PADS), K, padding=[(1, 0), (0, 2)]), ((2, 2), (2, 3)), "zeros"),
    "crop": (lambda x: valid(lax_pad(x, (-1, 1, 0), (2, -1, 0))), ((-1, 1), (2, -1)), "zeros"),
    "shift": (lambda x: valid(jnp.pad(x, ROWS)[:, :, :-2]), ((1, -1), (0, 0)), "zeros"),
    "holes": (lambda x: valid(lax_pad(x, (1, 0, 1), (0, 2, 2))), ((1, 0), (0, 2)), "zeros"),
    "into zeros": (lambda x: valid(jnp.zeros((1, 2, 7, 4)).at[:, :, 1:6].set(x)), ((1, 1), (0, 0)), "zeros"),
    "update": (
        lambda x: valid(lax.dynamic_update_slice(jnp.zeros((1, 2, 7, 4)), x, (0, 0, 2, 0))),
        ((2, 0), (0, 0)), "zeros",
    ),
    "concatenate": (
        lambda x: valid(jnp.concatenate([jnp.zeros((1, 2, 2, 4)), x], 2)), ((2, 0), (0, 0)), "zeros",
    ),
    "wrapped by slices": (
        lambda x: valid(jnp.concatenate([x[:, :, -2:], x, x[:, :, :1]], 2)), ((2, 1), (0, 0)), "circular",
    ),
    "tile": (lambda x: valid(jnp.tile(x, (1, 1, 3, 1))), ((5, 5), (0, 0)), "circular"),
    "where": (
        lambda x: valid(jnp.where(jnp.arange(7)[:, None] % 6 > 0, jnp.pad(x, ROWS, mode="edge"), 0.0)),
        ((1, 1), (0, 0)), "zeros",
    ),
    "cropped copies": (
        lambda x: conv(jnp.pad(x, PADS, mode="wrap"), K, padding=[(-1, 0), (-1, -1)]),
        ((0, 2), (1, 0)), "circular",
    ),
    "mode, then holes": (
        lambda x: valid(lax_pad(jnp.pad(x, PADS, mode="edge"), (0, 0, 1))), PADS[2:], "edge",
    ),
    "after a flip": (lambda x: valid(jnp.pad(x[:, :, ::-1], ROWS, mode="wrap")), ROWS[2:], "circular"),
    "before a shuffle": (lambda x: valid(jnp.pad(x, ROWS, mode="wrap")[:, ::-1]), ROWS[2:], "circular"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_padding_by_other_means(name):
    fn, padding, mode = OTHER_WAYS[name]
    site = site_of(fn)
    assert (site.spec.padding, site.spec.padding_mode, site.in_front) == (padding, mode, "")


MARKED = {
    "constant": lambda x: valid(jnp.pad(x, PADS, constant_values=1.0)),
    "constant holes": lambda x: valid(lax_pad(x, (0, 0, 1), value=1.0)),
    "odd": lambda x: valid(jnp.pad(x, PADS, mode="reflect", reflect_type="odd")),
    "mean": lambda x: valid(jnp.pad(x, PADS, mode="mean")),
    "ramp": lambda x: valid(jnp.pad(x, PADS, mode="linear_ramp")),
    "two modes": lambda x: valid(jnp.pad(jnp.pad(x, ROWS, mode="wrap"), COLUMNS, mode="reflect")),
    "a mode, and zeros": lambda x: valid(jnp.pad(jnp.pad(x, ROWS, mode="wrap"), COLUMNS)),
    "a mode, then zeros": lambda x: conv(jnp.pad(x, PADS, mode="wrap"), K, padding="SAME"),
    "holes, then a mode": lambda x: valid(jnp.pad(lax_pad(x, (0, 0, 1)), PADS, mode="wrap")),
    "a mode, then a flip": lambda x: valid(jnp.pad(x, PADS, mode="wrap")[:, :, ::-1]),
    "a state": lambda x: valid(jnp.concatenate([jnp.sin(x[:, :, :2]), x], 2)),
    "poles": lambda x: valid(jnp.concatenate([jnp.roll(x[:, :, :1], 2, axis=3), x], 2)),
}


@pytest.mark.parametrize("name", MARKED)
def test_a_pad_that_no_spec_holds_is_said(name):
    fn = MARKED[name]
    with pytest.warns(UserWarning, match="Norms and neurons of its spec are not those of the layer"):
        site = site_of(fn)
    assert site.in_front
    for text in (repr(site), site._repr_html_()):
        assert f"NOT IN M: {site.in_front}" in text
    (raw,) = fc.find_convs(fn, X, raw=True)
    assert (raw.spec, raw.in_front) == (site.spec, "")
    np.testing.assert_array_equal(raw.x, site.x)


UNMARKED = {
    "relu": lambda x: valid(jax.nn.relu(jnp.pad(x, PADS, mode="wrap"))),
    "flip": lambda x: valid(x[:, :, ::-1]),
    "transposed": lambda x: valid(x.transpose(0, 1, 3, 2)),
    "subsampled": lambda x: valid(x[:, :, ::2]),
    "sliced": lambda x: valid(x[:, :, 1:4]),
    "cropped on both axes": lambda x: valid(lax_pad(x, (-1, -1, 0), (-1, 0, 0))),
    "upsampled": lambda x: valid(jnp.repeat(x, 2, axis=2)),
    "resized": lambda x: valid(jax.image.resize(x, (1, 2, 10, 8), "nearest")),
    "channels joined": lambda x: valid(jnp.concatenate([jnp.sin(x[:, :1]), x[:, 1:]], 1)),
    "space to depth": lambda x: valid(
        x.reshape(1, 1, 2, 5, 2, 2).transpose(0, 2, 1, 3, 4, 5).reshape(1, 2, 5, 4)
    ),
    "mask": lambda x: valid(jnp.where(np.eye(5, 4) > 0, x, 0.0)),
}


@pytest.mark.parametrize("name", UNMARKED)
def test_what_is_no_padding_is_left_alone(name):
    site = site_of(UNMARKED[name])
    assert not site.in_front
    assert site.spec.padding == ((0, 0), (0, 0))
    assert site.spec == fc.find_convs(UNMARKED[name], X, raw=True)[0].spec


def test_a_slice_is_the_input_of_a_layer_that_pads_by_itself():
    for fn in (
        lambda x: conv(x[:, :, :4], K, padding=PADS[2:]),
        lambda x: valid(jnp.pad(x[:, :, :4], PADS)),
        lambda x: valid(jnp.pad(x[:, :, :4], PADS, mode="edge")),
    ):
        site = site_of(fn)
        assert (site.spec.in_shape, site.spec.padding) == ((2, 4, 4), PADS[2:])
        np.testing.assert_array_equal(site.x, X[:, :, :4])


def test_padding_in_the_body_of_a_scan_and_of_fixed_arrays():
    def body(c, _):
        return conv(jnp.pad(c, COLUMNS, mode="reflect"), K[:2, :, :1], padding="VALID"), None

    (site,) = fc.find_convs(lambda x: lax.scan(body, x, None, length=3)[0], X)
    assert (site.spec.padding_mode, site.spec.in_shape, site.times) == ("reflect", (2, 5, 4), 3)
    (site,) = fc.find_convs(lambda k: conv(jnp.pad(X, PADS, mode="edge"), k, padding="VALID"), K)
    np.testing.assert_array_equal(site.x, X)


def test_the_norm_of_a_layer_that_reflects():
    """The bounds hold the norm of the layer, which is not that of the convolution of its padded input."""
    nnx = pytest.importorskip("flax.nnx")
    x = jnp.ones((1, 6, 6, 1), jnp.float32)
    layer = nnx.Conv(1, 1, (5, 5), padding="REFLECT", use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.full((5, 5, 1, 1), 1 / 25, jnp.float32)
    (site,) = fc.find_convs(layer, x)
    assert (site.spec.shape, site.spec.padding_mode) == ((36, 36), "reflect")
    norm = np.linalg.norm(fc.matrix_of(lambda x: layer(x), x)[0], 2)
    bounds = spectrum.spectral_norm_bounds(site.spec, site.kernel)
    assert bounds[0] <= norm * (1 + 1e-6)
    assert norm <= bounds[1] * (1 + 1e-6)
    (raw,) = fc.find_convs(layer, x, raw=True)
    assert spectrum.spectral_norm_bounds(raw.spec, raw.kernel)[1] < norm


def test_raw_is_an_argument_of_find_convs():
    def fn(x, raw):
        return valid(x) if raw == "yes" else x

    with pytest.raises(TypeError, match=r"raw must be True or False, got str.*functools.partial"):
        fc.find_convs(fn, X, raw="yes")
    assert len(fc.find_convs(partial(fn, raw="yes"), X)) == 1


# biases --------------------------------------------------------------------------------------------

B = normal(RNG, 3)
BIASES = {
    "array": lambda x, b: valid(x) + b[None, :, None, None],
    "before": lambda x, b: b.reshape(1, 3, 1, 1) + valid(x),
    "cast": lambda x, b: valid(x) + b.astype(jnp.float32).astype(jnp.float64)[:, None, None],
    "behind a layout": lambda x, b: valid(x).transpose(0, 2, 3, 1) + b,
    "vmap": jax.vmap(lambda x, b: valid(x[None])[0] + b[:, None, None], in_axes=(0, None)),
    "groups of channels": lambda x, b: valid(x).reshape(1, 3, -1) + b[:, None],
    "in jit": lambda x, b: jax.jit(valid)(x) + jnp.broadcast_to(b[None, :, None, None], (1, 3, 4, 2)),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_site_knows_its_bias(name):
    fn = BIASES[name]
    with jax.numpy_rank_promotion("allow"):
        (site,) = fc.find_convs(fn, X, B)
        (shape,) = fc.find_convs(fn, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (X, B)))
        (held,) = fc.find_convs(lambda x: fn(x, B), X)
    close(site.bias, B, digits=6 if name == "cast" else 15)
    close(held.bias, B, digits=6 if name == "cast" else 15)
    assert (shape.bias.shape, shape.bias.dtype) == (B.shape, B.dtype)


def test_what_is_added_and_no_bias():
    nothing = {
        "none": lambda x, b: valid(x),
        "a map": lambda x, b: valid(x) + b[:, None, None].repeat(4, 1) * np.ones((3, 4, 2)),
        "computed": lambda x, b: valid(x) + jnp.sin(b)[None, :, None, None],
        "scaled before": lambda x, b: 2 * valid(x) + b[None, :, None, None],
        "a branch": lambda x, b: valid(x) + valid(2 * x),
        "the input": lambda x, b: (
            conv(b[None, :, None, None], jnp.ones((3, 3, 1, 1))) + b[None, :, None, None]
        ),
    }
    with jax.numpy_rank_promotion("allow"):
        for name, fn in nothing.items():
            assert all(site.bias is None for site in fc.find_convs(fn, X, B)), name
    (site,) = fc.find_convs(lambda x: valid(x) + 0.5, X)
    np.testing.assert_array_equal(site.bias, np.full(3, 0.5))

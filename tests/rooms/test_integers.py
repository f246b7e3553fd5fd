"""Integer arithmetic wraps: matrix_of of integer functions is right modulo 2**n, or right, or refused.

The reference is the function itself, at the least and the largest integers and at random ones.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxconv_fc as fc

SPEC = fc.conv_spec((1, 1, 6), (1, 1, 3), (1,), "SAME")
ONES = jnp.ones((1, 1, 3), jnp.int8)
TAPS = jnp.array([[[100, -7, 5]]], jnp.int8)


def convolved(x, **options):
    return lax.conv_general_dilated(x.reshape(1, 1, -1), TAPS, (1,), "SAME", **options).ravel()


def points(dtype, size=6):
    """Four integer arrays: the extremes, and random ones."""
    low, high = (0, 1) if dtype is bool else (int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max))
    rng = np.random.default_rng(0)
    values = [rng.integers(low, high, size, endpoint=True) for _ in range(2)]
    return [jnp.asarray(np.asarray(v).astype(dtype)) for v in ([low] * size, [high] * size, *values)]


def check(name, xs, matrix, offset, values):
    """``fn(x) == A x + b`` at every point, modulo 2**n where the result is an integer."""
    for x, want in zip(xs, values, strict=True):
        assert matrix.dtype == offset.dtype == want.dtype
        whole = jnp.issubdtype(want.dtype, jnp.integer)
        wide = np.int64 if whole else want.dtype
        x, a, b = (np.asarray(v).astype(wide) for v in (x, matrix, offset))
        if whole:
            np.testing.assert_array_equal((a @ x + b).astype(want.dtype), want.ravel(), err_msg=name)
        else:
            atol = 8 * np.finfo(wide).eps * np.max(abs(a) @ abs(x) + abs(b))
            np.testing.assert_allclose(a @ x + b, want.ravel(), rtol=0, atol=atol, err_msg=name)


def scanned(x):
    return lax.scan(lambda c, v: (c + v, c), x[0], x)[1]


def looped(x):
    return lax.fori_loop(0, 3, lambda _, v: v * 2, x)


F32, I32, I16, I8, U8 = jnp.float32, jnp.int32, jnp.int16, jnp.int8, jnp.uint8
WRAPS = {  # what may have wrapped before it is widened
    "uint8 - 128": (U8, lambda x: (x - 128).astype(F32)),
    "-uint8": (U8, lambda x: (-x).astype(F32)),
    "-int8": (I8, lambda x: (-x).astype(I32)),
    "255 - uint8": (U8, lambda x: (255 - x).astype(I32)),
    "int32 as uint8": (I32, lambda x: x.astype(U8).astype(I32)),
    "int8 as uint8": (I8, lambda x: x.astype(U8).astype(I32)),
    "uint8 as int8": (U8, lambda x: x.astype(I8).astype(I16)),
    "int8 doubled": (I8, lambda x: (x * 2).astype(F32)),
    "int8 shifted": (I8, lambda x: (x << 4).astype(I32)),
    "sum of int16": (I16, lambda x: x.sum(dtype=I16).astype(I32)),
    "sum to complex": (I16, lambda x: x.sum(dtype=I16).astype(jnp.complex128)),
    "convolution": (I8, lambda x: convolved(x).astype(F32)),
    "convolution with ones": (I8, lambda x: lax.conv(x.reshape(1, 1, -1), ONES, (1,), "SAME").astype(F32)),
    "dot with ones": (I8, lambda x: lax.dot(x, ONES[0, 0].repeat(2)).astype(F32)),
    "convolution of a wrapped value": (I8, lambda x: convolved(3 * x, preferred_element_type=I32)),
    "dot of a wrapped value": (U8, lambda x: lax.dot(x + x, jnp.ones(6, U8), preferred_element_type=I32)),
    "apply": (I8, lambda x: fc.apply(SPEC, TAPS, x[None]).astype(I32)),
    "scan": (I8, lambda x: scanned(x).astype(I32)),
    "loop": (I8, lambda x: looped(x).astype(I32)),
    "branch": (I8, lambda x: lax.cond(jnp.array(True), lambda v: v + 1, lambda v: v, x).astype(I32)),
    "joined": (I8, lambda x: jnp.concatenate([x, -x]).astype(F32)),
    "chosen": (U8, lambda x: jnp.where(jnp.arange(6) > 2, x, x + 1).astype(F32)),
    "written": (U8, lambda x: x.at[2].set(x[0] * 3).astype(F32)),
    "padded": (U8, lambda x: lax.pad(x, x[0] + x[1], [(1, 1, 0)]).astype(F32)),
    "added in place": (U8, lambda x: x.at[2].add(x[0]).astype(F32)),
    "cumulative": (I16, lambda x: jnp.cumsum(x, dtype=I16).astype(F32)),
    "pooled": (I16, lambda x: lax.reduce_window(x, np.int16(0), lax.add, (2,), (1,), "VALID").astype(F32)),
    "inside a rule": (U8, lambda x: _converted(x + 1)),
    "int32 tripled": (I32, lambda x: (3 * x).astype(jnp.int64)),
    "int4": (jnp.int4, lambda x: (x + x).astype(I8)),
    "bits": (I32, lambda x: (~lax.bitcast_convert_type(x, jnp.uint32)).astype(jnp.int64)),
    "two steps": (U8, lambda x: (x.astype(I16) * 200).astype(I32)),
    "a large factor": (I8, lambda x: (x.astype(I32) * 2**25).astype(F32)),
}  # fmt: skip


@jax.custom_jvp
def _converted(x):
    return x.astype(F32)


_converted.defjvps(lambda t, out, x: t)
EXACT = {  # what cannot have wrapped, and what stays modulo 2**n
    "widened": (U8, lambda x: x.astype(F32) - 128),
    "widened to integers": (I8, lambda x: 3 * x.astype(I32) - 7),
    "twice": (U8, lambda x: x.astype(I16).astype(F32)),
    "int32 to float32": (I32, lambda x: x.astype(F32)),
    "moved": (I8, lambda x: jnp.pad(x[::-1].reshape(2, 3).T, 1, constant_values=5).astype(F32)),
    "joined with constants": (U8, lambda x: jnp.concatenate([x, U8(200) + jnp.zeros(2, U8)]).astype(I32)),
    "filled": (I8, lambda x: x.at[jnp.array([0, 9])].get(mode="fill").astype(I32)),
    "chosen": (U8, lambda x: jnp.where(jnp.arange(6) > 2, x, U8(9)).astype(F32)),
    "quantised": (I8, lambda x: (convolved(x, preferred_element_type=I32) - 5).astype(F32) * 0.1),
    "quantised dense": (U8, lambda x: (x.astype(I32) - 128) @ jnp.arange(6).astype(I32) / 7),
    "sum in a wider type": (I8, lambda x: x.sum(dtype=I32).astype(F32)),
    "narrowed": (I32, lambda x: (3 * x).astype(I8)),
    "narrowed twice": (jnp.int64, lambda x: (3 * x).astype(I16).astype(U8) + U8(3)),
    "wraps in its type": (U8, lambda x: (x - 128) * 3),
    "sign and back": (U8, lambda x: (3 * x).astype(I8).astype(U8)),
    "convolution": (I8, convolved),
    "shifted": (I8, lambda x: x << 4),
    "negated bits": (U8, lambda x: ~x),
    "bits": (I8, lambda x: lax.bitcast_convert_type(3 * x, U8)),
    "summed": (I16, lambda x: x.sum(dtype=I16)),
    "back in range": (U8, lambda x: (x.astype(I16) - 300).astype(F32)),
    "bool": (bool, lambda x: x.astype(F32) * 3 - 1),
    "moved bool": (bool, lambda x: jnp.where(jnp.arange(6) > 2, x, True).astype(I8) * 100),
    "int4": (jnp.int4, lambda x: x.astype(I8) * 9),
    "uint4": (jnp.uint4, lambda x: (x.astype(U8) + x[::-1].astype(U8)).astype(F32)),
    "uint32": (jnp.uint32, lambda x: x.astype(jnp.float64)),
    "scan": (I8, lambda x: scanned(x.astype(I32)).astype(F32)),
    "loop": (I8, lambda x: looped(x.astype(I16)).astype(F32)),
    "permuted": (I8, lambda x: jax.random.permutation(jax.random.key(1), x).astype(F32)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPS)
def test_what_may_have_wrapped_is_not_widened(name):
    dtype, fn = WRAPS[name]
    with pytest.raises(
        ValueError, match=r"may have wrapped.*at test_integers.py.*Convert x first: x\.astype"
    ):
        fc.matrix_of(fn, jax.ShapeDtypeStruct((6,), dtype))


@pytest.mark.parametrize("names", [list(EXACT)[i::4] for i in range(4)], ids=", ".join)
def test_what_cannot_have_wrapped_is_right(names):
    """Several functions in one program."""

    @jax.jit
    def made(given):
        return {name: (*fc.matrix_of(EXACT[name][1], xs[0]), list(map(EXACT[name][1], xs)))
                for name, xs in given.items()}  # fmt: skip

    given = {name: points(EXACT[name][0]) for name in names}
    for name, results in made(given).items():
        check(name, given[name], *results)


@pytest.mark.parametrize("wider", [None, I32])
def test_fully_connected_and_apply_wrap_as_lax_does(wider):
    layer = partial(convolved, preferred_element_type=wider)
    for x in points(I8):
        want = layer(x)
        got = fc.fully_connected(layer)(x)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
        if wider is None:
            np.testing.assert_array_equal(fc.apply(SPEC, TAPS, x[None]).ravel(), want)

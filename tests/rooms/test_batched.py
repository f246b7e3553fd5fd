"""Products with a stack of vectors, in each of the three ways, and the rule that chooses one."""

from functools import partial

import jax
import numpy as np
import oracle
import pytest
from geometries import CASES, integers

import jaxconv_fc as fc
from jaxconv_fc.products.batched import METHODS
from jaxconv_fc.products.platforms import PLATFORMS


@pytest.mark.parametrize("name", ["plain", "reflect", "NHWC", "batch groups", "no rows", "no columns"])
def test_batched_apply(name, rng):
    """Every way, and the way that the rule chooses."""
    geometry = CASES[name]
    spec, kernel = geometry.spec(), integers(rng, geometry.rhs_shape, np.float64)
    xs = integers(rng, (20, *spec.in_shape), np.float64)
    want = np.stack([oracle.product(x, kernel, geometry) for x in xs])
    ways = {method: partial(fc.batched_apply, spec, method=method) for method in (*METHODS, None)}
    ys = integers(rng, want.shape, np.float64)

    @jax.jit
    def both(kernel, xs):
        def of(way):
            return way(kernel, xs), jax.grad(lambda k: (way(k, xs) * ys).sum())(kernel)

        return list(map(of, ways.values()))

    each = [oracle.kernel_gradient(x, y, geometry) for x, y in zip(xs, ys, strict=True)]
    for method, (got, gradient) in zip(ways, both(kernel, xs), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=str(method))
        np.testing.assert_array_equal(gradient, np.sum(each, axis=0), err_msg=str(method))
        if name == "plain":  # and without jit
            np.testing.assert_array_equal(ways[method](kernel, xs), want, err_msg=str(method))


def test_the_rule_for_stacks():
    def of(lhs, rhs, count, dtype, backend="cpu", groups=1):
        spec = fc.conv_spec(lhs, rhs, (1,) * (len(lhs) - 2), "SAME", feature_group_count=groups)
        return PLATFORMS[backend].method(spec, count, np.dtype(dtype))

    small = ((1, 32, 28, 28), (32, 1, 3, 3))  # a sum over 9 taps
    assert of(*small, 64, "float32", groups=32) == "convolution"
    depthwise = ((1, 32, 28, 28), (32, 1, 9, 9))
    assert of(*depthwise, 64, "float32", groups=32) == "sparse"
    for backend in ("gpu", "tpu"):
        assert of(*depthwise, 64, "float32", backend, groups=32) == "convolution"
    assert of(*depthwise, 1, "float32", groups=32) == "convolution"
    assert of((1, 32, 28, 28), (32, 32, 3, 3), 128, "float32") == "convolution"
    assert of((1, 32, 28, 28), (32, 32, 3, 3), 128, "float64") == "convolution"
    assert of((1, 32, 28, 28), (32, 32, 3, 3), 128, "int32") == "sparse"
    assert of((1, 4, 8, 8), (4, 4, 8, 8), 64, "float64") == "dense"
    with fc.memory_limit(1000):
        assert of(*depthwise, 64, "float32", groups=32) == "convolution"
        assert of((1, 4, 8, 8), (4, 4, 8, 8), 64, "float64") == "convolution"


def test_the_rule_for_stacks_begins_where_its_text_says():
    """From 16 examples on, from 64 of integers; 4 channels at most."""

    def of(channels, count, dtype, groups=1):
        spec = fc.conv_spec(
            (1, channels * groups, 28, 28),
            (groups * 4, channels, 9, 9),
            (1, 1),
            "SAME",
            feature_group_count=groups,
        )
        return PLATFORMS["cpu"].method(spec, count, np.dtype(dtype))

    assert [of(1, count, "float32", 32) for count in (15, 16)] == ["convolution", "sparse"]
    assert [of(channels, 16, "float32") for channels in (4, 5)] == ["sparse", "convolution"]
    assert [of(32, count, "int64") for count in (63, 64)] == ["convolution", "sparse"]


def test_a_small_stack_stays_a_convolution():
    """M takes longer to build than fewer than 10^5 products in all."""
    spec = fc.conv_spec((1, 4, 6, 6, 6), (1, 4, 2, 2, 2), (2, 2, 2), "SAME")
    assert [PLATFORMS["cpu"].method(spec, count, np.dtype("float32")) for count in (115, 116)] == [
        "convolution",
        "sparse",
    ]


def test_batched_apply_with_bad_operands():
    spec = CASES["plain"].spec()
    kernel = np.ones(spec.rhs_shape, np.float32)
    with pytest.raises(ValueError, match=r"xs must have shape \(count, .*xs\[None\]"):
        fc.batched_apply(spec, kernel, np.ones(spec.in_shape, np.float32))
    with pytest.raises(TypeError, match=r"xs\.astype\(kernel\.dtype\)"):
        fc.batched_apply(spec, kernel, np.ones((2, *spec.in_shape)))
    with pytest.raises(TypeError, match="bool"):
        fc.batched_apply(spec, kernel.astype(bool), np.ones((2, *spec.in_shape), bool))
    with pytest.raises(ValueError, match="method must be one of"):
        fc.batched_apply(spec, kernel, np.ones((2, *spec.in_shape), np.float32), method="fft")

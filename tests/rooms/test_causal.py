"""Causal layers, whose M is block triangular, against dense linear algebra on the oracle's matrix."""

from functools import partial

import geometries
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import numbers

import jaxconv_fc as fc
import jaxconv_fc.spectrum as spectrum
from jaxconv_fc.spectrum.causal import Causal

SPEC = fc.conv_spec((1, 3, 5, 4), (3, 3, 3, 3), (1, 1), "SAME")
BEFORE = np.arange(9).reshape(3, 3) <= 4  # the rows above, and what is on the left in the same row


def random_causal(rng, dtype):
    """(spec, kernel, mask or None): padding on one side of every axis, or taps on one side of the middle."""
    dims, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    channels = groups * int(rng.integers(1, 3))
    sizes, taps, dilations = (rng.integers(1, n, dims).tolist() for n in (6, 4, 4))
    taps, mask = (taps, None) if rng.random() < 0.5 else ([k | 1 for k in taps], True)
    reach = [(k - 1) * r for k, r in zip(taps, dilations, strict=True)]
    if mask is None:
        pads = [(n, 0) if rng.random() < 0.5 else (0, n) for n in reach]
    else:  # in a random order of the axes, and of the taps of each
        pads, axes = [(n // 2, n // 2) for n in reach], rng.permutation(dims)
        mask = np.arange(np.prod(taps)) <= np.prod(taps) // 2
        mask = mask.reshape([taps[a] for a in axes]).transpose(np.argsort(axes))
        mask = np.flip(mask, [a for a in range(dims) if rng.random() < 0.5])
    by = ("feature_group_count", "batch_group_count")[int(rng.integers(2))]
    batch = groups if by == "batch_group_count" else 1
    lhs, rhs = [batch, channels // batch, *sizes], [channels, channels // groups, *taps]
    numbers = None
    if rng.random() < 0.5:  # another layout of each array
        letters = "DHW"[:dims]
        numbers = (f"N{letters}C", f"{letters}IO", f"NC{letters}")
        lhs, rhs = [lhs[0], *lhs[2:], lhs[1]], [*rhs[2:], rhs[1], rhs[0]]
    spec = fc.conv_spec(lhs, rhs, (1,) * dims, pads, None, dilations, numbers, **{by: groups})
    kernel = np.zeros((channels, channels // groups, *taps), dtype)
    kernel[...] = geometries.normals(rng, kernel.shape, dtype) / kernel[0].size
    here = tuple(lo // r for (lo, _), r in zip(pads, dilations, strict=True))  # the tap with offset 0
    kernel[(np.arange(channels), np.arange(channels) % (channels // groups), *here)] += 1
    return spec, kernel if numbers is None else np.moveaxis(kernel, (0, 1), (-1, -2)), mask


def where(spec, mask, kernel):
    """The kernel with 0 where a mask of the taps is False."""
    if mask is None:
        return kernel
    order = spec.dimension_numbers.rhs_spec
    shape = [1] * kernel.ndim
    for i, n in zip(order[2:], mask.shape, strict=True):
        shape[i] = n
    return np.where(mask.reshape(shape), kernel, 0)


@pytest.mark.parametrize("number", numbers(3, 97))
def test_causal_layers(run_seed, number):
    """det, solution and their gradients, against dense float64."""
    rng = np.random.default_rng([run_seed, number, 30])
    dtype = (np.float64, np.complex128)[number % 2]
    spec, kernel, mask = random_causal(rng, dtype)
    name = f"seed {run_seed}, number {number}: {spec}, mask {mask}"
    taps = np.ones([a.taps for a in spec.axes], bool) if mask is None else mask
    assert Causal.of(spec, taps) is not None, name
    y = geometries.normals(rng, spec.out_shape, dtype)
    matrix = oracle.matrix(where(spec, mask, kernel), spec)
    value, slope = jax.value_and_grad(partial(spectrum.log_abs_det, spec, mask=mask))(kernel)
    np.testing.assert_allclose(value, np.linalg.slogdet(matrix)[1], rtol=1e-10, atol=1e-10, err_msg=name)
    inverse = np.linalg.inv(matrix)
    x, pull = jax.vjp(partial(spectrum.solve, spec, mask=mask), kernel, y)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9, err_msg=name)
    close(np.ravel(x), inverse @ y.ravel())
    # d log|det M| = Re tr(M^-1 dM),  x_bar . dx = x_bar . M^-1 (dy - dM x)
    x_bar = geometries.normals(rng, spec.in_shape, dtype)
    moved, back = inverse.T @ x_bar.ravel(), pull(jnp.asarray(x_bar))
    close(np.ravel(back[1]), moved)
    close(back[0], where(spec, mask, oracle.matrix_gradient(-np.outer(moved, x), spec)))
    close(slope, where(spec, mask, oracle.matrix_gradient(inverse.T, spec)))


@pytest.mark.parametrize("dtype", ["float32", "complex64", "bfloat16", "float16", "int8"])
def test_every_dtype_jit_and_vmap(dtype):
    rng = np.random.default_rng(1)
    kernel = rng.integers(-2, 3, SPEC.rhs_shape)
    kernel[..., 1, 1] = 4 * np.eye(3)
    y = rng.integers(-3, 4, SPEC.out_shape)
    matrix = oracle.matrix(where(SPEC, BEFORE, kernel), SPEC).astype(float)
    got = spectrum.log_abs_det(SPEC, jnp.asarray(kernel, dtype), mask=BEFORE)
    np.testing.assert_allclose(got, 60 * np.log(4), rtol=1e-6)
    kernels = jnp.stack([jnp.asarray(kernel, dtype)] * 2)
    solve = jax.jit(jax.vmap(partial(spectrum.solve, SPEC, mask=BEFORE)))
    x = solve(kernels, jnp.stack([jnp.asarray(y, dtype), jnp.asarray(-y, dtype)]))
    want = np.linalg.solve(matrix, y.ravel()).reshape(SPEC.in_shape)
    np.testing.assert_allclose(x, np.stack([want, -want]), rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_masks_of_the_kernel_and_what_has_no_order():
    """A mask of single entries; taps on both sides; a mask under which no tap has offset 0."""
    rng = np.random.default_rng(2)
    kernel = rng.standard_normal(SPEC.rhs_shape)
    kernel[..., 1, 1] += 9 * np.eye(3)
    entries = np.broadcast_to(BEFORE, SPEC.rhs_shape).copy()
    entries[..., 1, 1] = np.tri(3)  # channels in order too
    matrix = oracle.matrix(np.where(entries, kernel, 0), SPEC)
    got = spectrum.log_abs_det(SPEC, kernel, mask=entries)
    np.testing.assert_allclose(got, np.linalg.slogdet(matrix)[1], rtol=1e-12)
    assert Causal.of(SPEC) is None
    both = np.array([[False, True, True], [False, True, False], [False, False, True]])
    assert Causal.of(SPEC, both) is not None  # columns first, from the right
    both = both | both[::-1, ::-1]
    assert Causal.of(SPEC, both) is None
    matrix = oracle.matrix(where(SPEC, both, kernel), SPEC)
    np.testing.assert_allclose(spectrum.log_abs_det(SPEC, kernel, mask=both), np.linalg.slogdet(matrix)[1])
    strict = BEFORE & (np.arange(9).reshape(3, 3) != 4)
    assert spectrum.log_abs_det(SPEC, kernel, mask=strict) == -np.inf
    assert spectrum.condition_number(SPEC, kernel, mask=strict) == np.inf
    assert not np.isfinite(spectrum.solve(SPEC, kernel, np.ones(SPEC.out_shape), mask=strict)).any()


def test_rank_and_condition_number_know_a_singular_diagonal():
    """Up to rounding: no singular value of M is exactly 0."""
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal(SPEC.rhs_shape)
    assert np.isfinite(spectrum.condition_number(SPEC, kernel, mask=BEFORE))
    kernel[..., 1, 1] = rng.standard_normal((3, 2)) @ rng.standard_normal((2, 3))
    matrix = oracle.matrix(where(SPEC, BEFORE, kernel), SPEC)
    assert np.linalg.cond(matrix) < np.inf
    assert spectrum.condition_number(SPEC, kernel, mask=BEFORE) == np.inf
    assert spectrum.rank(SPEC, kernel, rtol=0.0, mask=BEFORE) == 59
    assert spectrum.rank(SPEC, kernel, mask=BEFORE) == np.linalg.matrix_rank(matrix)


def test_a_causal_layer_beyond_the_memory_limit():
    spec = fc.conv_spec((1, 3, 64, 64), (3, 3, 3, 3), (1, 1), [(2, 0), (2, 0)])
    kernel = np.random.default_rng(4).standard_normal(spec.rhs_shape) / 30
    kernel[..., 2, 2] += np.eye(3)
    x = np.random.default_rng(5).standard_normal(spec.in_shape)
    with fc.memory_limit(10**6):
        solved = spectrum.solve(spec, kernel, fc.apply(spec, kernel, x))
        np.testing.assert_allclose(solved, x, rtol=1e-9, atol=1e-9)
        value = spectrum.log_abs_det(spec, kernel)
    np.testing.assert_allclose(value, 4096 * np.linalg.slogdet(kernel[..., 2, 2])[1], rtol=1e-12)


def test_errors():
    kernel = jnp.ones(SPEC.rhs_shape)
    with pytest.raises(TypeError, match="mask must be of bool, got int64"):
        spectrum.log_abs_det(SPEC, kernel, mask=np.ones((3, 3), int))
    with pytest.raises(ValueError, match=r"mask must have the shape \(3, 3\) of the taps, or \(3, 3, 3, 3\)"):
        spectrum.solve(SPEC, kernel, jnp.ones(SPEC.out_shape), mask=np.ones((2, 3), bool))
    with pytest.raises(TypeError, match="mask must be static"):
        jax.jit(lambda m: spectrum.rank(SPEC, kernel, mask=m))(np.ones((3, 3), bool))

"""The same matrices by other means, each by its own documented way.

A function prepares one contestant and returns the call that is timed. It raises `Cannot` where the library
does not know the geometry, and ImportError where it is not installed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

import jaxconv_fc as fc
from benchmarks.layers import conv_one
from benchmarks.rows import Call, Cannot, jitted

Kernel = Any

# JAX by itself ---------------------------------------------------------------------------------------------


def vmap_eye(spec: fc.ConvSpec, kernel: Kernel) -> Call:
    """M^T: that is what comes out first, and the transpose would cost extra."""

    def probe(kernel):
        eye = jnp.eye(spec.in_size, dtype=kernel.dtype).reshape(-1, *spec.in_shape)
        return jax.vmap(partial(conv_one, spec, kernel))(eye)

    return jitted(probe, kernel)


def jacobian(transform: Callable, spec: fc.ConvSpec, kernel: Kernel) -> Call:
    x = jnp.ones(spec.in_shape, kernel.dtype)
    return jitted(lambda kernel, x: transform(partial(conv_one, spec, kernel))(x), kernel, x)


# asdex -----------------------------------------------------------------------------------------------------


def asdex(spec: fc.ConvSpec, kernel: Kernel, output_format: str = "dense") -> Call:
    """The pattern is detected and coloured before: that is what asdex advises."""
    import asdex

    if spec.nse > 5e6:
        raise Cannot("detection takes minutes")
    x = jnp.ones(spec.in_shape, kernel.dtype)
    coloring = asdex.jacobian_coloring(partial(conv_one, spec, kernel), x)

    def matrix(kernel, x):
        fn = partial(conv_one, spec, kernel)
        return asdex.jacobian_from_coloring(fn, coloring, output_format=output_format)(x)

    return jitted(matrix, kernel, x)


# einconv ---------------------------------------------------------------------------------------------------


def einconv(spec: fc.ConvSpec, kernel: Kernel) -> Call:
    import einconv
    import torch

    same = all(lo == hi for lo, hi in spec.padding)
    if spec.padding_mode != "zeros" or set(spec.lhs_dilation) - {1} or not same:
        raise Cannot("zeros of one width on both sides alone, no input dilation")
    if spec.dimension_numbers != _plain(spec):
        raise Cannot("channels first alone")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    weight = torch.from_numpy(np.array(kernel, np.float32)).to(device, _torch_dtype(kernel))
    groups, n = spec.feature_group_count, len(spec.axes)
    weight = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])  # [g, o, i, p...]
    patterns = [
        einconv.index_pattern(
            a.size, a.taps, a.stride, lo, a.rhs_dilation, device=torch.device(device), dtype=weight.dtype
        )
        for a, (lo, _) in zip(spec.axes, spec.padding, strict=True)
    ]  # [p, o, t] for each axis
    taps, outs, ins = "pqr"[:n], "xyz"[:n], "uvw"[:n]
    same_group = torch.eye(groups, dtype=weight.dtype, device=device)
    terms = [f"ga{'i'}{taps}", "gh", *(p + o + t for p, o, t in zip(taps, outs, ins, strict=True))]
    equation = ",".join(terms) + f"->ga{outs}hi{ins}"

    def matrix():
        result = torch.einsum(equation, weight, same_group, *patterns).reshape(spec.shape)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return matrix


def _plain(spec: fc.ConvSpec) -> Any:
    return fc.conv_spec(spec.lhs_shape, spec.lhs_shape, (1,) * len(spec.axes), "VALID").dimension_numbers


def _torch_dtype(kernel: Kernel) -> Any:
    import torch

    return getattr(torch, kernel.dtype.name)


# SciPy -----------------------------------------------------------------------------------------------------


def scipy_kron(spec: fc.ConvSpec, kernel: Kernel, dense: bool) -> Call:
    """The sum over the taps of kron(kernel of the tap, its selection of inputs on each axis)."""
    if spec.dimension_numbers != _plain(spec):
        raise Cannot("rows and columns would have to be permuted")
    if spec.nse > 2e7:
        raise Cannot("takes minutes")
    if kernel.dtype == jnp.bfloat16:
        raise Cannot("no bfloat16")
    kernel, groups = np.asarray(kernel), spec.feature_group_count
    mode = {"zeros": "constant", "circular": "wrap"}.get(spec.padding_mode, spec.padding_mode)

    def selections(axis, pads):  # for each tap, the 0/1 matrix (outputs, inputs) as CSR
        dilated = np.zeros(((axis.size - 1) * axis.lhs_dilation + 1, axis.size), kernel.dtype)
        dilated[:: axis.lhs_dilation] = np.eye(axis.size)
        padded = np.pad(dilated, (pads, (0, 0)), mode)
        reach = (axis.out_size - 1) * axis.stride + 1
        starts = [tap * axis.rhs_dilation for tap in range(axis.taps)]
        return [scipy.sparse.csr_array(padded[s : s + reach : axis.stride]) for s in starts]

    def matrix():
        found = [selections(axis, pads) for axis, pads in zip(spec.axes, spec.padding, strict=True)]
        total = 0
        for tap in np.ndindex(*(axis.taps for axis in spec.axes)):
            channels = np.split(kernel[(slice(None), slice(None), *tap)], groups)
            term = scipy.sparse.block_diag(channels, format="csr")
            for one, p in zip(found, tap, strict=True):
                term = scipy.sparse.kron(term, one[p], format="csr")
            total = total + term
        return total.toarray() if dense else total

    return matrix


def scipy_triples(spec: fc.ConvSpec, kernel: Kernel, shuffled: bool) -> Call:
    """SciPy's COO -> CSR, from triples that somebody else has made."""
    if shuffled and spec.nse > 2e7:
        raise Cannot("takes minutes")
    coo = fc.as_scipy(spec, np.asarray(kernel)).tocoo()
    order = np.random.default_rng(0).permutation(coo.nnz) if shuffled else slice(None)
    data, rows, columns = coo.data[order].copy(), coo.row[order].copy(), coo.col[order].copy()
    return lambda: scipy.sparse.coo_array((data, (rows, columns)), shape=spec.shape).tocsr()


# one channel -----------------------------------------------------------------------------------------------


def _one_channel(spec: fc.ConvSpec) -> None:
    axes = spec.axes
    plain = all(a.stride == a.lhs_dilation == a.rhs_dilation == 1 and a.out_size == a.size for a in axes)
    if spec.out_channels != 1 or spec.rhs_shape[1] != 1 or len(axes) != 2 or not plain:
        raise Cannot("one channel, stride 1, output as large as input alone")
    if spec.padding_mode != "zeros":
        raise Cannot("zeros alone")


def pylops(spec: fc.ConvSpec, kernel: Kernel, dense: bool) -> Call:
    from pylops.signalprocessing import Convolve2D

    _one_channel(spec)
    if spec.in_size > 7000:
        raise Cannot("products with the identity take minutes")
    dims = tuple(a.size for a in spec.axes)
    flipped = np.asarray(kernel)[0, 0, ::-1, ::-1]  # PyLops convolves, a layer correlates
    operator = Convolve2D(dims, flipped, offset=[k // 2 for k in flipped.shape], dtype=flipped.dtype)
    return lambda: operator.todense() if dense else operator.tosparse()


def sparse_convolution(spec: fc.ConvSpec, kernel: Kernel) -> Call:
    import sparse_convolution as sc

    _one_channel(spec)
    dims, flipped = tuple(a.size for a in spec.axes), np.asarray(kernel)[0, 0, ::-1, ::-1]
    # The matrix of mode "full": it is cropped after the product.
    return lambda: sc.Toeplitz_convolution2d(
        dims, flipped, mode="same", method="precomputed", backend="numpy"
    )


# products --------------------------------------------------------------------------------------------------


def scipy_product(spec: fc.ConvSpec, kernel: Kernel, v: Any, transpose: bool) -> Call:
    """The product with a CSR matrix that was built before."""
    matrix = fc.as_scipy(spec, np.asarray(kernel))
    matrix = matrix.T.tocsr() if transpose else matrix
    v = np.asarray(v).ravel()
    return lambda: matrix @ v


def torch_product(spec: fc.ConvSpec, kernel: Kernel, x: Any, y: Any, which: str) -> Call:
    """torch's convolution of one example, or what autograd derives from it."""
    import torch
    from torch.nn import grad

    if spec.padding_mode != "zeros" or set(spec.lhs_dilation) - {1}:
        raise Cannot("zeros alone, no input dilation")
    if spec.dimension_numbers != _plain(spec) or len(spec.axes) != 2:
        raise Cannot("2-D and channels first in this table")
    if any(lo != hi for lo, hi in spec.padding):
        raise Cannot("padding of one width on both sides alone")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    weight, x, y = (torch.from_numpy(np.array(v)).to(device) for v in (kernel, x, y))
    x, y = x[None], y[None]
    options = {
        "stride": spec.window_strides,
        "padding": [lo for lo, _ in spec.padding],
        "dilation": spec.rhs_dilation,
        "groups": spec.feature_group_count,
    }
    calls = {
        "apply": lambda: torch.nn.functional.conv2d(x, weight, **options),
        "apply_transpose": lambda: grad.conv2d_input(x.shape, weight, y, **options),
        "kernel_vjp": lambda: grad.conv2d_weight(x, weight.shape, y, **options),
    }

    def product():
        with torch.no_grad():
            result = calls[which]()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return product

"""The one convolution that an affine function is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.functions.sparse import sparse_matrix_of
from jaxconv_fc.geometry.arguments import brief, resolve_layouts
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.matrix.detect import (
    Fit,
    Given,
    axis_sums,
    difference,
    equal_fit,
    kernel_of,
    near_fit,
    on_host,
)
from jaxconv_fc.matrix.formats import as_scipy

_NAMED = 4  # outputs that a message names


def as_conv(
    fn: Callable[[Any], Any], x: Any, *, dimension_numbers: Any = None
) -> tuple[ConvSpec, jax.Array, jax.Array]:
    """``(spec, kernel, bias)`` with ``fn(x) == conv(x, kernel) + bias`` for every x: the function as one
    convolution.

    A convolution and the batch norm behind it, the branches of a RepVGG or diverse branch block, padding in
    front of a VALID convolution, average pooling, a convolution of a convolution, a dense layer that is one:
    whatever is affine in x. ``as_affine(spec, kernel, bias)`` is then the matrix and offset of the function.
    The geometry is read off :func:`sparse_matrix_of`, as :func:`detect_conv` does: strides, dilations,
    padding, groups and boundary modes, with the fewest taps, then the plainest mode (docs/maths.md,
    section 3). A geometry that is a convolution on paper alone is refused: one in which hardly any two
    outputs share a tap, such as a product with a number per place, or a reversal.

    *How equal.* Every entry of the matrix of fn is compared with that of the convolution. They may differ by
    64 roundings of the dtype, relative to the largest entry; integers must be equal. A part of fn that is
    smaller than this is not seen. fn itself may round in another order than the convolution
    does.

    Args:
      fn: a function from one array to one array of the same rank.
      x: an array or a ``jax.ShapeDtypeStruct``: only shape and dtype count. With a batch, in the layout of
        ``dimension_numbers``: (N, C, spatial...) by default. If N > 1, fn must do the same with every
        example, and mix none. Or without one, as equinox has it: (C, spatial...), the layout without its N.
      dimension_numbers: the layouts, as in ``lax.conv_general_dilated``, such as
        ``("NHWC", "HWIO", "NHWC")``. The spec and the kernel have them. Their rank says whether x has a
        batch. With None, x is read as (N, C, spatial...) first, then as (C, spatial...). If it has three
        axes, both are tried and the smaller kernel counts.

    Returns:
      A :class:`ConvSpec`; a kernel of its ``rhs_shape``; a bias of shape ``(out channels,)``, or
      ``spec.out_shape`` where it varies within a channel, as after a batch norm in front of padding. All in
      the dtype of the result.

    Raises:
      ValueError: fn is not affine in x, or not one convolution. The message then names the first outputs that
        differ from the nearest convolution found, and how far it is.
      TypeError: x or the result is not one array, or something is traced.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> def block(x):  # circular padding, a difference, twice the identity beside it
    ...     padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1)), mode="wrap")
    ...     return padded[:, :, 2:] - padded[:, :, :-2] + 2 * x + 5
    >>> spec, kernel, bias = fc.as_conv(block, jnp.zeros((1, 1, 6)))
    >>> print(spec.padding_mode, kernel, bias)
    circular [[[-1.  2.  1.]]] [5.]
    """
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(
            f"as_conv: x must be one array, got {brief(x)}. Bind other arguments with functools.partial."
        )
    out = jax.eval_shape(fn, x)
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(
            f"as_conv: fn must return one array, got {jax.tree.structure(out)}. Return one of them."
        )
    if len(out.shape) != len(x.shape):
        raise ValueError(
            f"as_conv: fn takes an array of shape {x.shape} and returns one of shape {out.shape}. A "
            "convolution keeps the number of axes. Reshape the result, or matrix_of gives the matrix."
        )
    matrix, offset = sparse_matrix_of(fn, x)
    readings = [
        reading
        for numbers, batched in _layouts(len(x.shape), dimension_numbers)
        if (reading := _one_example(matrix, offset, x.shape, out.shape, numbers, batched)) is not None
    ]
    if not readings:
        raise ValueError(
            f"as_conv: fn takes a batch, of shape {x.shape}, but does not do the same with every example, or "
            "mixes them. dimension_numbers says which axes are batch and channels."
        )
    found: list[tuple[_Reading, Fit]] = []
    for reading in readings:
        fit = equal_fit(reading.given, axis_sums(reading.given), strict=True)
        if fit is not None and not len(_differing(reading.given, fit)):
            found.append((reading, fit))
            if len(x.shape) != 3:  # (N, C, W), or (C, H, W)?
                break
    if not found:
        raise ValueError(_refusal(readings[0].given))
    reading, fit = min(found, key=lambda pair: pair[1].kernel.size)
    spec = replace(fit.spec, lhs_shape=x.shape) if reading.batched else fit.spec
    return spec, kernel_of(reading.given, fit, out.dtype), _bias(reading, spec, out.dtype)


class _Reading(NamedTuple):
    """One example of a function, with its layout."""

    given: Given
    offset: np.ndarray  # in double precision: (out_size,)
    batched: bool  # whether x has a batch


def _layouts(rank: int, numbers: Any) -> list[tuple[lax.ConvDimensionNumbers, bool]]:
    """The layouts that arrays of so many axes may have, and whether these include a batch."""
    if numbers is None:
        with_batch = [(resolve_layouts(None, rank), True)] if rank > 1 else []
        return [*with_batch, (resolve_layouts(None, rank + 1), False)]
    lhs = getattr(numbers, "lhs_spec", None) or (
        numbers[0] if isinstance(numbers, tuple | list) and numbers else ()
    )
    batched = len(lhs) != rank + 1
    return [(resolve_layouts(numbers, rank if batched else rank + 1), batched)]


def _one_example(
    matrix: Any,
    offset: np.ndarray,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    numbers: lax.ConvDimensionNumbers,
    batched: bool,
) -> _Reading | None:
    """The part of the matrix that belongs to one example; None if the examples are not alike."""
    if batched:
        sides = (out_shape, numbers.out_spec[0]), (in_shape, numbers.lhs_spec[0])
        counts = {shape[axis] for shape, axis in sides}
        if len(counts) != 1 or 0 in counts:
            return None
        rows, columns = (
            np.moveaxis(np.arange(math.prod(shape)).reshape(shape), axis, 0).reshape(shape[axis], -1)
            for shape, axis in sides
        )
        matrix, offsets = matrix, offset[rows]  # [example, output]
        blocks = [matrix[r][:, c] for r, c in zip(rows, columns, strict=True)] if len(rows) > 1 else [matrix]
        mixed = matrix.count_nonzero() != sum(block.count_nonzero() for block in blocks)
        if mixed or any((block != blocks[0]).nnz for block in blocks[1:]) or (offsets != offsets[0]).any():
            return None
        matrix, offset = blocks[0], offsets[0]
        in_shape, out_shape = (
            [n for i, n in enumerate(shape) if i != axis] for shape, axis in reversed(sides)
        )
    wide = np.complex128 if offset.dtype.kind == "c" else np.float64
    given = on_host(matrix, in_shape, out_shape, numbers, None)
    return _Reading(given, offset.astype(wide), batched)


def _differing(given: Given, fit: Fit) -> np.ndarray:
    """The outputs whose rows differ from those of the convolution."""
    exact = given.integer
    off = difference(given, as_scipy(fit.spec, fit.kernel)).tocoo()
    return np.unique(off.coords[0][np.abs(off.data) > (0 if exact else given.tol)])


def _refusal(given: Given) -> str:
    """The message for a function that is not one convolution."""
    fit = near_fit(given, axis_sums(given))
    spec, rows = fit.spec, _differing(given, fit)
    named = ", ".join(str(tuple(map(int, np.unravel_index(row, spec.out_shape)))) for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    differ = f"Outputs {named}{more} of {spec.out_size} differ from the nearest one found, which is"
    if not len(rows):
        differ = "Its matrix is that of a convolution on paper, in which hardly any two outputs share a tap,"
    return (
        f"as_conv: fn is affine, but not one convolution. {differ} at a distance of {fit.distance:.2g} of "
        f"the norm: kernel {spec.rhs_shape}, window_strides={spec.window_strides}, padding={spec.padding}, "
        f"lhs_dilation={spec.lhs_dilation}, rhs_dilation={spec.rhs_dilation}, "
        f"feature_group_count={spec.feature_group_count}, padding_mode={spec.padding_mode!r}. "
        "sparse_matrix_of gives the matrix, find_convs the convolutions inside."
    )


def _bias(reading: _Reading, spec: ConvSpec, dtype: Any) -> jax.Array:
    """One entry per output channel, or a map where they vary within a channel."""
    offset = reading.offset.reshape(spec.out_shape)
    channels = np.moveaxis(offset, spec.out_order[-1], 0).reshape(spec.out_channels, -1)
    if not channels.size:
        return jnp.zeros(spec.out_channels, dtype)
    spread = np.abs(channels - channels[:, :1])
    small = 0 if reading.given.integer else reading.given.tol * np.abs(channels).max()
    return jnp.asarray(channels[:, 0] if spread.max() <= small else offset, dtype)

"""M as blocks: what wraps around is diagonal in frequency, what does not stays as it is.

On an axis of ``n`` inputs and ``m`` outputs that wraps around (``m*stride == n*lhs_dilation == N``), M
relates output frequency ``f mod m`` with input frequency ``f mod n`` only, for ``f`` in ``Z_N``. With
``g = gcd(n, m)`` these fall into ``g`` blocks of ``m/g`` x ``n/g`` (docs/maths.md, section 5). An axis that
does not wrap around is one block of ``m`` x ``n``. M is, up to unitary maps, the block diagonal of the
products over the axes, for each group: singular values, determinants and inverses are those of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv_fc.axis import Axis
from jaxconv_fc.layout import by_group, from_canonical
from jaxconv_fc.memory import check_dense
from jaxconv_fc.numerics import homogeneous, nan_unless_finite, unit_scale
from jaxconv_fc.sharding import program
from jaxconv_fc.spec import ConvSpec, as_operand
from jaxconv_fc.spectrum.norms import as_inexact

_HELD = 2**19  # entries of blocks that are made at one time


def singular_values(spec: ConvSpec, kernel: Any) -> jax.Array:
    """All ``min(M.shape)`` singular values of M, descending; exact.

    They are those of ``B_w[i, j] = (s*l)**-0.5 * sum of H(f)`` over ``f == w + g*i (mod m)``,
    ``f == w + g*j (mod n)``, with ``H(f) = sum over p of K[p] exp(2 pi i f (p*r - lo) / N)``, on axes that
    wrap around (in circular mode ``lo*l`` stands for ``lo``): any stride ``s``, input dilation ``l`` and
    kernel dilation ``r``. Axes that do not wrap enter with all their positions, so without any that does
    this is the SVD of the dense matrix of each group. Of a real kernel half of the frequencies are computed.

    Differentiable: every symmetric function of the values is, and each single value where it is simple.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``; integers are taken as floats.

    Returns:
      Real array of shape ``(min(spec.shape),)``.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: it has another shape, or the blocks are beyond the memory limit.

    Source: Sedghi, Gupta & Long, The singular values of convolutional layers (2019); Senderovich et al.
    (2022) for strides; docs/maths.md, section 5, for dilations. Cost: ``g`` SVDs of blocks, by far less than
    of M. On CPU the threads of OpenBLAS rather slow down blocks of some hundred rows: OPENBLAS_NUM_THREADS=1
    may be worth it.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), [(0, 1)], padding_mode="circular")
    >>> print(fc.spectrum.singular_values(spec, jnp.array([[[1., 1.]]])).round(4) + 0)
    [2.     1.4142 1.4142 0.    ]
    """
    return _singular_values(spec, _for_blocks("singular_values", spec, kernel))


@program
def _singular_values(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    return homogeneous(partial(_unit_values, spec), (1,), kernel)


def _unit_values(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    """The singular values of a kernel at unit scale."""
    if not min(spec.shape):
        return jnp.zeros(0, kernel.real.dtype)
    return _descending(over_blocks(_block_values, spec, kernel, block_axes(spec)).ravel())


def _block_values(blocks: jax.Array) -> jax.Array:
    """Singular values of every block (the last two axes): of its transpose, in the order LAPACK reads."""
    return jnp.linalg.svd(jnp.swapaxes(blocks, -1, -2), compute_uv=False)


@jax.custom_jvp
def _descending(values: jax.Array) -> jax.Array:
    """Values from 0 up, largest first, NaN before all: in this order floats are, and their bits as integers,
    which XLA on CPU sorts four times faster."""
    integers = jnp.dtype(f"int{8 * values.dtype.itemsize}")
    bits = lax.sort(lax.bitcast_convert_type(values, integers), is_stable=False)
    return lax.bitcast_convert_type(bits[::-1], values.dtype)


@_descending.defjvp
def _descending_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (values,), (change,) = primals, tangents
    order = jnp.argsort(values, descending=True)
    return values[order], change[order]


def condition_number(spec: ConvSpec, kernel: Any) -> jax.Array:
    """``sigma_max / sigma_min`` of the ``min(M.shape)`` singular values; inf where the least is 0.

    The zero matrix has condition number inf. Arguments, errors, cost and exactness as in
    :func:`singular_values`; a matrix without entries has no condition number and gives a ValueError.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 2, 5), (2, 2, 1), (1,), "VALID")
    >>> print(fc.spectrum.condition_number(spec, jnp.array([[[3.], [0.]], [[0.], [6.]]])))
    2.0
    """
    _check_entries("condition_number", spec)
    return _condition_number(spec, _for_blocks("condition_number", spec, kernel))


@program
def _condition_number(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    def ratio(kernel: jax.Array) -> jax.Array:
        values = _unit_values(spec, kernel)
        most, least = values[0], values[-1]
        return jnp.where(least == 0, jnp.inf, most / jnp.where(least == 0, jnp.ones_like(least), least))

    return homogeneous(ratio, (0,), kernel)


def rank(spec: ConvSpec, kernel: Any, *, rtol: float | None = None) -> jax.Array:
    """The number of singular values beyond ``rtol * sigma_max``.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      rtol: relative to the largest singular value; ``max(M.shape) * eps`` when None, as in
        ``numpy.linalg.matrix_rank``.

    Returns:
      An integer scalar; -1, which is the rank of no matrix, where M holds NaN or Inf.  Errors and cost as
      in :func:`singular_values`.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 8), (1, 1, 3), (1,), "SAME", padding_mode="circular")
    >>> print(fc.spectrum.rank(spec, jnp.array([[[-1., 2., -1.]]])))  # constants are its kernel
    7
    """
    return _rank(spec, _for_blocks("rank", spec, kernel), rtol)


@partial(program, static_argnums=2)
def _rank(spec: ConvSpec, kernel: jax.Array, rtol: float | None) -> jax.Array:
    values = _unit_values(spec, unit_scale(kernel)[0])
    cutoff = jnp.asarray(_relative(spec, values.dtype, rtol), values.dtype) * values.max(initial=0)
    return jnp.where(jnp.isfinite(values).all(), jnp.sum(values > cutoff), -1)


def log_abs_det(spec: ConvSpec, kernel: Any) -> jax.Array:
    """``log |det M|`` of a square M: ``sum over f of log |det H(f)|`` where M wraps around.

    What a normalising flow adds for an invertible convolution; -inf where M is singular. Differentiable,
    with gradient ``M^-H`` pulled back to the kernel.

    Args:
      spec: a geometry with ``out_size == in_size``. In circular mode the cost is that of one LU
        decomposition per frequency, otherwise of M densely, per group.
      kernel: array of shape ``spec.rhs_shape``.

    Returns:
      A real scalar.

    Raises:
      TypeError: the kernel is not an array of numbers.
      ValueError: M is not square, the kernel has another shape, or the blocks are beyond the memory limit.

    Source: Hoogeboom, van den Berg & Welling, Emerging convolutions for generative normalizing flows (2019).

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 5), (1, 1, 3), (1,), "SAME")  # tridiagonal: det = n + 1
    >>> print(jnp.exp(fc.spectrum.log_abs_det(spec, jnp.array([[[-1., 2., -1.]]]))).round(4))
    6.0
    """
    kernel = as_inexact(spec, kernel)
    _check_square("log_abs_det", spec, "sum log of singular_values")
    _check_blocks("log_abs_det", spec, kernel, "a circular geometry")
    return _log_abs_det(spec, kernel)


@program
def _log_abs_det(spec: ConvSpec, kernel: jax.Array) -> jax.Array:
    if not spec.in_size:
        return jnp.zeros((), kernel.real.dtype)
    # det(2**e M) == 2**(n e) det(M)
    kernel, exponent = unit_scale(kernel)
    logarithms = over_blocks(lambda blocks: jnp.linalg.slogdet(blocks)[1], spec, kernel, block_axes(spec))
    value = logarithms.sum() + exponent.astype(logarithms.dtype) * (spec.in_size * math.log(2))
    return nan_unless_finite(value, kernel)


def solve(spec: ConvSpec, kernel: Any, y: Any) -> jax.Array:
    """``x`` with ``M x = y``, for a square and invertible M: one small system per frequency.

    Linear in ``y`` and differentiable in both. Not finite, or of no use, where M is singular:
    :func:`pseudo_inverse` then, or :func:`lstsq` for large geometries that do not wrap around.

    Args:
      spec: a geometry with ``out_size == in_size``; cost as in :func:`log_abs_det`, and two FFTs.
      kernel: array of shape ``spec.rhs_shape``.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.

    Returns:
      Array of shape ``spec.in_shape``.

    Raises:
      TypeError, ValueError: as :func:`log_abs_det`; y is not of the spec's shape and the kernel's dtype.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (1,), [(1, 0)])  # differences; their inverse is a sum
    >>> print(fc.spectrum.solve(spec, jnp.array([[[-1., 1.]]]), jnp.array([[1., 2., 3., 4.]])))
    [[ 1.  3.  6. 10.]]
    """
    kernel, y = _system(spec, kernel, y)
    _check_square("solve", spec, "pseudo_inverse or lstsq")
    _check_blocks("solve", spec, kernel, "lstsq")
    return _solve(spec, kernel, y)


@program
def _solve(spec: ConvSpec, kernel: jax.Array, y: jax.Array) -> jax.Array:
    return _through_blocks(spec, kernel, y, jnp.linalg.solve)


def pseudo_inverse(spec: ConvSpec, kernel: Any, y: Any, *, rtol: float | None = None) -> jax.Array:
    """``M^+ y``, the least-squares solution of ``M x = y`` of least norm: per frequency, for any M.

    The matrix M^+ itself is ``vmap`` of this over unit vectors. Differentiable in both where the rank does
    not change.

    Args:
      spec: the geometry; cost as in :func:`singular_values` with vectors, and two FFTs.
      kernel: array of shape ``spec.rhs_shape``.
      y: array of shape ``spec.out_shape`` and the kernel's dtype.
      rtol: singular values up to ``rtol * sigma_max`` count as 0; ``max(M.shape) * eps`` when None.

    Returns:
      Array of shape ``spec.in_shape``.

    Raises:
      TypeError, ValueError: as :func:`singular_values`; y is not of the spec's shape and kernel's dtype.

    >>> import jax.numpy as jnp, jaxconv_fc as fc, jaxconv_fc.spectrum
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 2), (2,), "VALID")  # means of two
    >>> print(fc.spectrum.pseudo_inverse(spec, jnp.array([[[.5, .5]]]), jnp.array([[3., 5.]])).round(4))
    [[3. 3. 5. 5.]]
    """
    kernel, y = _system(spec, kernel, y)
    _check_blocks("pseudo_inverse", spec, kernel, "lstsq")
    return _pseudo_inverse(spec, kernel, y, rtol)


@partial(program, static_argnums=3)
def _pseudo_inverse(spec: ConvSpec, kernel: jax.Array, y: jax.Array, rtol: float | None) -> jax.Array:
    def invert(blocks: jax.Array, ys: jax.Array) -> jax.Array:
        return _matmul(_pinv(_relative(spec, blocks.dtype, rtol), blocks), ys)

    return _through_blocks(spec, kernel, y, invert)


_matmul = partial(jnp.matmul, precision="highest")


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pinv(rtol: float, blocks: jax.Array) -> jax.Array:
    """Pseudo-inverses; values up to ``rtol`` times the largest of all blocks (not of each) count as 0."""
    u, s, vh = jnp.linalg.svd(blocks, full_matrices=False)
    keep = s > jnp.asarray(rtol, s.dtype) * s.max()
    inverse = jnp.where(keep, 1 / jnp.where(keep, s, jnp.ones((), s.dtype)), jnp.zeros((), s.dtype))
    return _matmul(_adjoint(vh) * inverse[..., None, :].astype(vh.dtype), _adjoint(u))


@_pinv.defjvp
def _pinv_jvp(rtol: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Of constant rank (Golub, Pereyra 1973): that of the SVD has poles where singular values repeat."""
    (blocks,), (change,) = primals, tangents
    inverse = _pinv(rtol, blocks)
    back = _adjoint(change)
    in_range = back - _matmul(back, _matmul(blocks, inverse))  # (I - A A^+) from the right
    in_kernel = back - _matmul(_matmul(inverse, blocks), back)
    return inverse, (
        _matmul(_matmul(inverse, _adjoint(inverse)), in_range)
        + _matmul(in_kernel, _matmul(_adjoint(inverse), inverse))
        - _matmul(_matmul(inverse, change), inverse)
    )


def _adjoint(blocks: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(blocks, -1, -2))


def _relative(spec: ConvSpec, dtype: Any, rtol: float | None) -> float:
    """What part of the largest singular value counts as 0."""
    return max(spec.shape) * float(jnp.finfo(dtype).eps) if rtol is None else float(rtol)


# -- the blocks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockAxis:
    """An axis as ``frequencies`` (``g``) blocks: wrapped around, or all in one where ``shift`` is None."""

    axis: Axis
    size: int
    out_size: int
    shift: int | None  # lo, in dilated steps

    @classmethod
    def of(cls, axis: Axis) -> BlockAxis:
        """Wrapped around if that describes the axis: if no tap ever meets padding (or what it copies)."""
        around, shift = axis.size * axis.lhs_dilation, None
        if axis.size and axis.out_size * axis.stride == around and axis.reach <= np.iinfo(np.int32).max:
            border, p = axis.border(axis.interior), np.arange(axis.taps)  # the interior meets no padding
            u = border[:, None] * axis.stride + p * axis.rhs_dilation - axis.shift
            wrapped = np.where(u % axis.lhs_dilation == 0, u // axis.lhs_dilation % axis.size, -1)
            shift = axis.shift if np.array_equal(wrapped, axis.table(border)) else None
        return cls(axis, axis.size, axis.out_size, shift)

    @property
    def wraps(self) -> bool:
        return self.shift is not None

    @property
    def frequencies(self) -> int:
        return math.gcd(self.size, self.out_size) if self.wraps else 1

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that a block has of this axis."""
        return self.out_size // self.frequencies, self.size // self.frequencies

    def entries(self, dtype: Any) -> jax.Array:
        """What each tap adds to each block: ``[frequency, row, column, tap]``."""
        a, g = self.axis, self.frequencies
        if self.shift is None:
            t, valid = a.input_of(lax.iota(jnp.int32, a.out_size)[:, None], lax.iota(jnp.int32, a.taps)[None])
            column = lax.iota(jnp.int32, a.size)[None, :, None]
            return (valid[:, None] & (t[:, None] == column)).astype(dtype)[None]
        around = self.size * a.lhs_dilation
        # The transfer function of one tap is the transform of a unit vector: exact for any length. A tap
        # that meets no input has none: its frequencies cancel in a block, but not to the last digit.
        places = [(self.shift - p * a.rhs_dilation) % around for p in range(a.taps)]
        places = np.where(a.tap_counts, places, -1).astype(np.int32)
        complex_dtype = np.result_type(dtype, np.complex64)
        f = lax.iota(jnp.int32, around)
        transfer = jnp.fft.fft((f[:, None] == places[None]).astype(complex_dtype), axis=0)
        blocks = jnp.zeros((g, *self.block, a.taps), complex_dtype)
        blocks = blocks.at[f % g, f % self.out_size // g, f % self.size // g].add(transfer)
        return blocks / jnp.asarray((a.stride * a.lhs_dilation) ** 0.5, complex_dtype)


def block_axes(spec: ConvSpec) -> list[BlockAxis]:
    return [BlockAxis.of(a) for a in spec.axes]


def frequency_blocks(
    spec: ConvSpec, kernel: jax.Array, axes: Sequence[BlockAxis], frequencies: Sequence[Any]
) -> jax.Array:
    """``[group, block, row, column]``: the blocks at these frequencies (per axis, an array of them)."""
    value, operands = by_group(spec, kernel), []
    # Axes that do not wrap are unrolled first; frequencies, one product over all wrapping axes, last.
    labels, result = [0, 1, 2, *(10 + a for a in range(len(axes)))], [0, 1, 2]
    for a, axis in enumerate(axes):
        if axis.wraps:
            result.append(10 + a)
            continue
        operands += [axis.entries(value.dtype)[0], [30 + a, 50 + a, 10 + a]]
        result += [30 + a, 50 + a]
    if operands:
        value = jnp.einsum(value, labels, *operands, result, precision="highest")
    labels, operands = result, []
    for a, axis in enumerate(axes):
        if axis.wraps:
            entries = jnp.take(axis.entries(value.dtype), frequencies[a], axis=0, mode="clip")
            operands += [entries, [3, 30 + a, 50 + a, 10 + a]]
    rows, columns = ([first, *(at + a for a in range(len(axes)))] for first, at in ((1, 30), (2, 50)))
    if operands:
        value = _transfer(value, labels, operands, [0, 3, *rows, *columns])
    else:
        value = jnp.einsum(value, labels, [0, *rows, *columns])[:, None]
    return value.reshape(*value.shape[:2], *block_shape(spec, axes))


def over_blocks(
    of: Callable[[jax.Array], jax.Array], spec: ConvSpec, kernel: jax.Array, axes: Sequence[BlockAxis]
) -> jax.Array:
    """``of`` every block, ``[group, block, ...]``.

    The result must not depend on the order of blocks. ``of`` must not depend on the order of rows or columns,
    nor on conjugation.

    Of a real kernel the blocks at opposite frequencies are conjugate but for the order of rows and columns,
    so one of the two is made; where a frequency is its own opposite, a block of one position is real.
    """
    if jnp.iscomplexobj(kernel):
        return _over_frequencies(of, spec, kernel, axes, block_frequencies(axes))
    alone, paired = self_opposite_frequencies(axes)
    single = all(axis.block == (1, 1) for axis in axes if axis.wraps)
    parts = [_over_frequencies(lambda b: of(b.real if single else b), spec, kernel, axes, alone)]
    if paired and paired[0].size:
        parts += 2 * [_over_frequencies(of, spec, kernel, axes, paired)]
    return jnp.concatenate(parts, axis=1)


def _over_frequencies(
    of: Callable[[jax.Array], jax.Array],
    spec: ConvSpec,
    kernel: jax.Array,
    axes: Sequence[BlockAxis],
    frequencies: Sequence[np.ndarray],
) -> jax.Array:
    """:func:`over_blocks` for the blocks at these frequencies, in their order.

    Derivatives make the blocks once more, so that they do not hold all of them either.
    """
    most = _HELD // max(1, spec.groups * math.prod(block_shape(spec, axes)))

    @jax.checkpoint
    def part(*chosen: jax.Array) -> jax.Array:
        return jnp.moveaxis(of(frequency_blocks(spec, kernel, axes, chosen)), 1, 0)

    chosen = [jnp.asarray(f, jnp.int32) for f in frequencies]
    return jnp.moveaxis(_in_parts(part, chosen, most) if chosen else part(), 0, 1)


def _in_parts(of: Callable[..., jax.Array], arrays: Sequence[jax.Array], most: int) -> jax.Array:
    """``of(*arrays)``, so many entries of their first axes at a time.

    The parts are of one size; the last is filled up with entries that have been met.
    """
    count = len(arrays[0])
    size = -(-count // -(-count // max(1, most)))
    parts = -(-count // size)
    if parts == 1:
        return of(*arrays)
    filled = [jnp.concatenate([a, a[: parts * size - count]]) for a in arrays]
    made = lax.map(lambda part: of(*part), [a.reshape(parts, size, *a.shape[1:]) for a in filled])
    return made.reshape(parts * size, *made.shape[2:])[:count]


def _transfer(value: jax.Array, labels: list[int], operands: list[Any], result: list[int]) -> jax.Array:
    """The phases of all axes, multiplied, against the kernel; a real kernel keeps its products real."""
    taps = set(labels) - set(result)
    joint = sorted({label for names in operands[1::2] for label in names})
    phases = jnp.einsum(*operands, joint)
    # Frequencies first, as they are wanted: in any other order einsum swaps the two and moves what comes out.
    product = [label for label in (*joint, *labels) if label not in taps]
    contract = partial(jnp.einsum, precision="highest")
    if jnp.iscomplexobj(value):
        value = contract(phases, joint, value, labels, product)
    else:
        parts = (contract(part, joint, value, labels, product) for part in (phases.real, phases.imag))
        value = lax.complex(*parts)
    return jnp.transpose(value, [product.index(label) for label in result])


def block_frequencies(axes: Sequence[BlockAxis]) -> list[np.ndarray]:
    """The frequencies of all blocks, an array per axis."""
    counts = [a.frequencies for a in axes]
    return list(np.unravel_index(np.arange(block_count(axes)), counts)) if counts else []


def self_opposite_frequencies(axes: Sequence[BlockAxis]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The frequencies that equal their opposite, and of all others one of each two that are opposite."""
    frequencies = block_frequencies(axes)
    flat = opposite = np.arange(block_count(axes))
    if axes:
        counts = [a.frequencies for a in axes]
        opposite = np.ravel_multi_index([-w % g for w, g in zip(frequencies, counts, strict=True)], counts)
    return [w[flat == opposite] for w in frequencies], [w[flat < opposite] for w in frequencies]


def block_shape(spec: ConvSpec, axes: Sequence[BlockAxis]) -> tuple[int, int]:
    rows, columns = (math.prod(a.block[i] for a in axes) for i in (0, 1))
    return spec.out_channels // spec.groups * rows, spec.group_channels * columns


def block_count(axes: Sequence[BlockAxis]) -> int:
    return math.prod(a.frequencies for a in axes)


# -- vectors in the basis of the blocks ----------------------------------------------------------


def _through_blocks(spec: ConvSpec, kernel: jax.Array, y: jax.Array, invert: Any) -> jax.Array:
    """``x`` of every block's ``x = invert(block, y)``, of degree -1 in the kernel and 1 in y."""
    if not min(spec.shape):
        return jnp.zeros(spec.in_shape, y.dtype)
    x = homogeneous(partial(_through_unit_blocks, spec, invert), (-1, 1), kernel, y)
    return nan_unless_finite(x, kernel, y)


def _through_unit_blocks(spec: ConvSpec, invert: Any, kernel: jax.Array, y: jax.Array) -> jax.Array:
    axes = block_axes(spec)
    blocks = frequency_blocks(spec, kernel, axes, block_frequencies(axes))
    y = jnp.transpose(y, spec.out_order)
    y = _to_blocks(axes, y.reshape(*y.shape[:-1], spec.groups, -1))
    x = invert(blocks, y.astype(blocks.dtype)[..., None])[..., 0]
    x = _from_blocks(axes, x)
    x = x if jnp.iscomplexobj(kernel) else x.real
    return from_canonical(x.reshape([spec.in_shape[i] for i in spec.in_order]), spec.in_order)


def _to_blocks(axes: Sequence[BlockAxis], value: jax.Array) -> jax.Array:
    """(positions..., group, channel) -> (group, block, channel and positions within the block)."""
    dims, shape = len(axes), value.shape
    wrapping = [i for i, a in enumerate(axes) if a.wraps]
    if wrapping:
        value = jnp.fft.fftn(value, axes=wrapping, norm="ortho")
    split = [n for a, size in zip(axes, shape, strict=False) for n in (size // a.frequencies, a.frequencies)]
    value = value.reshape(*split, *shape[dims:])
    within, frequency = range(0, 2 * dims, 2), range(1, 2 * dims, 2)
    value = jnp.transpose(value, (2 * dims, *frequency, 2 * dims + 1, *within))
    return value.reshape(shape[dims], block_count(axes), -1)


def _from_blocks(axes: Sequence[BlockAxis], value: jax.Array) -> jax.Array:
    """The inverse of :func:`_to_blocks`, for inputs."""
    dims, counts = len(axes), [a.frequencies for a in axes]
    within = [a.block[1] for a in axes]
    value = value.reshape(value.shape[0], *counts, -1, *within)
    beside = [i for a in range(dims) for i in (2 + dims + a, 1 + a)]
    value = jnp.transpose(value, (*beside, 0, 1 + dims))
    value = value.reshape(*(a.size for a in axes), *value.shape[2 * dims :])
    wrapping = [i for i, a in enumerate(axes) if a.wraps]
    return jnp.fft.ifftn(value, axes=wrapping, norm="ortho") if wrapping else value


# -- checks --------------------------------------------------------------------------------------


def _system(spec: ConvSpec, kernel: Any, y: Any) -> tuple[jax.Array, jax.Array]:
    kernel = as_operand("kernel", kernel, spec, "rhs_shape")
    y = as_operand("y", y, spec, "out_shape")
    if kernel.dtype != y.dtype:
        raise TypeError(f"kernel is {kernel.dtype} and y {y.dtype}: cast one, e.g. y.astype(kernel.dtype).")
    kernel = as_inexact(spec, kernel)
    return kernel, y.astype(kernel.dtype)


def _for_blocks(name: str, spec: ConvSpec, kernel: Any) -> jax.Array:
    kernel = as_inexact(spec, kernel)
    _check_blocks(name, spec, kernel, "top_singular_values or spectral_norm")
    return kernel


def _check_blocks(name: str, spec: ConvSpec, kernel: jax.Array, instead: str) -> None:
    axes = block_axes(spec)
    dtype = np.result_type(kernel.dtype, np.complex64) if any(a.wraps for a in axes) else kernel.dtype
    check_dense(name, spec, (spec.groups * block_count(axes), *block_shape(spec, axes)), dtype, instead)


def _check_square(name: str, spec: ConvSpec, instead: str) -> None:
    if spec.out_size != spec.in_size:
        raise ValueError(
            f"{name} needs a square M, got {spec.out_size} x {spec.in_size} from in_shape {spec.in_shape} "
            f"and out_shape {spec.out_shape}. Use {instead}."
        )


def _check_entries(name: str, spec: ConvSpec) -> None:
    if not min(spec.shape):
        raise ValueError(f"{name}: M is {spec.out_size} x {spec.in_size}; give the spec an input and output.")

"""The convolution in a matrix whose geometry is not known.

Every axis is searched for itself (``matrix/axis_search.py``), in each mode. Then the kernel is read off the
whole matrix, and compared with all of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv_fc.geometry.arguments import resolve_layouts
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.entries import stored_entries
from jaxconv_fc.geometry.layout import inverse
from jaxconv_fc.geometry.lines import gram
from jaxconv_fc.geometry.modes import MODES
from jaxconv_fc.geometry.spec import ConvSpec, conv_spec
from jaxconv_fc.matrix.axis_search import (
    BoundarySearch,
    View,
    bic,
    inner_axes,
    is_regular,
    magnitude,
    neighbours,
    sums_by,
    zeros_axis,
)
from jaxconv_fc.matrix.formats import as_scipy
from jaxconv_fc.matrix.projection import solve_gram_on_host
from jaxconv_fc.matrix.sketch import Given, axis_sums, on_host, sharper_sums, sum_of_squares, unbatched
from jaxconv_fc.numerics import host_times_power_of_two

_MOST = 16  # times as many taps as an output reads inputs
_LEVELS = 3  # of noise that are tried
_ROUNDS = 4
_SHAPES = 1000  # pairs of shapes that are tried where they are not given
_CHANNELS = 4  # at most, where shapes are not given
_ASPECT = 4  # of two spatial axes: one is less than so many times as long as the other


class Fit(NamedTuple):
    """A convolution beside the matrix that it is read from."""

    spec: ConvSpec
    kernel: np.ndarray  # at the scale of the matrix
    distance: float  # ||A - M|| / ||A||
    criterion: float  # of Bayes; less is better


def detect_conv(
    matrix: Any,
    in_shape: Sequence[int] | None,
    out_shape: Sequence[int] | None,
    *,
    dimension_numbers: Any = None,
    tol: float | None = None,
) -> tuple[ConvSpec, jax.Array] | None:
    """``(spec, kernel)`` with ``as_matrix(spec, kernel) == matrix``; None if there is none.

    Every mode of padding is tried, every stride, dilation and number of groups. Of the geometries with this
    matrix it is the one with the fewest taps, then in the plainest mode: zeros, circular, reflect, edge,
    symmetric (docs/maths.md, sections 3 and 14). It is canonical (:attr:`ConvSpec.canonical`). Taps that are
    0 at the border of the kernel, or that read no input, are left off. A sparse matrix can be a convolution
    in which no two outputs share a tap, such as a diagonal one with stride n. The size of its kernel shows
    this.

    What is searched: in zeros mode all steps. In the other modes, on an axis of up to 1024 pairs (output,
    input), strides up to half the axis and all dilations and pads; on a larger axis small steps, and those
    by which the rows move. So a geometry is missed that goes around its axis again and again.

    Args:
      matrix: concrete array or SciPy sparse matrix of shape ``(prod(out_shape), prod(in_shape))``. A sparse
        one is never made dense.
      in_shape, out_shape: shapes of an input and an output, without a batch: ``(channels, spatial...)``,
        unless ``dimension_numbers`` says otherwise. None where they are not known: then one and two spatial
        axes with up to 4 channels are tried, two axes of similar sizes, and the smallest kernel is kept.
      dimension_numbers: layouts with a batch, as in ``lax.conv_general_dilated``, such as
        ``("NHWC", "HWIO", "NHWC")``. The spec and the kernel that are returned have them.
      tol: largest relative distance, and largest relative difference of entries that count as equal;
        by default 64 times the rounding of the dtype, and 1/64 at most (bfloat16, float16). If it is given,
        and nothing is equal up to it, what :func:`nearest_conv` finds counts where it is that near.

    Returns:
      ``(spec, kernel)`` with ``as_matrix(spec, kernel)`` equal to the matrix within ``tol``, or None.

    Raises:
      TypeError: the matrix is not an array, or traced.
      ValueError: it has another shape, or holds NaN or Inf, which say nothing about a geometry. Or shapes
        are None where there are too many.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> matrix = jnp.array([[1., 2., 0., 0.], [0., 0., 1., 2.]])
    >>> spec, kernel = fc.detect_conv(matrix, (1, 4), (1, 2))
    >>> print(spec.window_strides, kernel)
    (2,) [[[1. 2.]]]
    >>> circular = jnp.array([[2., 3., 0., 1.], [1., 2., 3., 0.], [0., 1., 2., 3.], [3., 0., 1., 2.]])
    >>> spec, kernel = fc.detect_conv(circular, None, None)
    >>> print(spec.padding_mode, spec.padding, kernel)
    circular ((1, 1),) [[[1. 2. 3.]]]
    >>> fc.detect_conv(jnp.ones((3, 4)).at[0, 0].set(2.), (1, 4), (1, 3)) is None
    True
    """
    if in_shape is None or out_shape is None:
        found = _of_some_shape(matrix, in_shape, out_shape, dimension_numbers, tol)
    else:
        given = on_host(matrix, in_shape, out_shape, dimension_numbers, tol)
        found = given, equal_fit(given, axis_sums(given))
        if found[1] is None and tol is not None:
            found = given, likely_fit(given)
    given, fit = found
    return (fit.spec, kernel_of(given, fit)) if fit is not None and fit.distance <= given.tol else None


def nearest_conv(
    matrix: Any,
    in_shape: Sequence[int] | None,
    out_shape: Sequence[int] | None,
    *,
    dimension_numbers: Any = None,
    tol: float | None = None,
) -> tuple[ConvSpec, jax.Array, float]:
    """``(spec, kernel, distance)`` with ``distance = ||A - as_matrix(spec, kernel)|| / ||A||``, read off A.

    If some convolution equals A up to ``tol``, it is the one that :func:`detect_conv` finds. If none does, A
    is taken for a convolution and noise. The noise is taken to end at a gap between the sizes of what each
    axis shows. Of what then fits in each mode, with steps up to 3 outside of zeros mode, the Bayesian
    information criterion ``N log(RSS / N) + P log N`` keeps one: N entries, P kernel entries. It weighs
    groups and single taps in the same way.

    Of 200 random layers of 1 and 2 axes (6 to 9 inputs, kernels of 1 to 5, strides, dilations, groups, pads
    of all five modes) it found 194, 192 and 189 again as they were, with noise on every entry of 0.001, 0.01
    and 0.1 of the kernel's standard deviation.

    A matrix can be a convolution on paper, in which hardly any two outputs share a tap, such as a diagonal
    one with stride n. Only :func:`detect_conv` returns those.

    Args:
      matrix: concrete array or SciPy sparse matrix of shape ``(prod(out_shape), prod(in_shape))``. It is
        inspected on the host.
      in_shape, out_shape: shapes of an input and an output, as in :func:`detect_conv`. None only where some
        convolution equals the matrix.
      dimension_numbers: layouts with a batch, as in :func:`detect_conv`.
      tol: largest relative difference of entries that count as equal; by default as in
        :func:`detect_conv`.

    Returns:
      A :class:`ConvSpec`, a kernel of its ``rhs_shape``, and a Python float.

    Raises:
      TypeError: the matrix is not an array, or traced.
      ValueError: it has another shape, or holds NaN or Inf, which say nothing about a geometry. Or a shape is
        None and no convolution equals the matrix.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> layer = fc.conv_spec((1, 1, 9), (1, 1, 3), (1,), "SAME", padding_mode="circular")
    >>> noise = jnp.cos(jnp.arange(81.) ** 2).reshape(9, 9) / 50
    >>> near = fc.as_matrix(layer, jnp.array([[[1., 2., 3.]]])) + noise
    >>> spec, kernel, distance = fc.nearest_conv(near, (1, 9), (1, 9))
    >>> print(spec == layer.canonical, kernel.round(1), round(distance, 3))
    True [[[1. 2. 3.]]] 0.011
    """
    if in_shape is None or out_shape is None:
        given, fit = _of_some_shape(matrix, in_shape, out_shape, dimension_numbers, tol)
        if fit is None:
            raise ValueError(
                f"in_shape={in_shape} and out_shape={out_shape}: no convolution of few channels equals the "
                "matrix. Give both shapes, (channels, spatial...)."
            )
    else:
        given = on_host(matrix, in_shape, out_shape, dimension_numbers, tol)
        fit = equal_fit(given, axis_sums(given), strict=True) or likely_fit(given)
    return fit.spec, kernel_of(given, fit), fit.distance


def kernel_of(given: Given, fit: Fit, dtype: Any = None) -> jax.Array:
    """The kernel at its own scale, in this dtype or in that of the matrix."""
    kernel = host_times_power_of_two(fit.kernel, given.exponent)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        kernel = np.round(kernel)
    return jnp.asarray(kernel, given.dtype if dtype is None else dtype)


def _of_some_shape(
    matrix: Any, in_shape: Any, out_shape: Any, layouts: Any, tol: Any
) -> tuple[Given, Fit | None]:
    """The smallest kernel of those that equal the matrix for some shapes."""
    if np.ndim(matrix) != 2:
        raise ValueError(f"matrix must have two axes, (outputs, inputs), got the shape {np.shape(matrix)}.")
    pairs = []
    for rank in (1, 2):
        try:
            numbers = resolve_layouts(layouts, rank + 2)
        except ValueError:  # the layouts are of another rank
            continue
        sides = zip(
            (in_shape, out_shape), matrix.shape[::-1], (numbers.lhs_spec, numbers.out_spec), strict=True
        )
        choices = [[tuple(s)] if s is not None else _shapes(size, rank, order) for s, size, order in sides]
        pairs += [(i, o) for i, o in itertools.product(*choices) if len(i) == len(o) == rank + 1]
    if not 0 < len(pairs) <= _SHAPES:
        raise ValueError(
            f"in_shape={in_shape} and out_shape={out_shape} leave {len(pairs)} possible pairs of shapes with "
            f"one or two spatial axes and up to {_CHANNELS} channels, more than {_SHAPES} or none. Give both."
        )
    fitting = []
    for in_shape, out_shape in pairs:
        given = on_host(matrix, in_shape, out_shape, layouts, tol)
        sums = axis_sums(given)
        if all(map(is_regular, exact_views(given, sums))):
            fit = equal_fit(given, sums, strict=True)
            # A kernel with half as many entries as the matrix is no explanation of it.
            if fit is not None and 2 * fit.kernel.size <= given.stored:
                fitting.append((given, fit))
    return min(
        fitting,
        key=lambda pair: pair[1].kernel.size,
        default=(on_host(matrix, pairs[0][0], pairs[0][1], layouts, tol), None),
    )


def _shapes(size: int, rank: int, order: Sequence[int]) -> list[tuple[int, ...]]:
    """The shapes with so many entries: few channels, spatial axes of 2 and more, in this layout."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    found = []
    for channels in (n for n in divisors if n <= min(_CHANNELS, size // 2)):
        rest = size // channels
        pairs = [(n, rest // n) for n in divisors if 1 < n < rest and rest % n == 0]
        similar = [(n, k) for n, k in pairs if n < _ASPECT * k and k < _ASPECT * n]
        found += [(channels, *sizes) for sizes in ([(rest,)] if rank == 1 else similar)]
    places = unbatched(order)
    return [tuple(shape[places.index(i)] for i in range(rank + 1)) for shape in found]


# -- fits ------------------------------------------------------------------------------------------


def exact_views(given: Given, sums: Sequence[np.ndarray], *, strict: bool = False) -> list[View]:
    """What is equal up to ``tol`` counts as equal."""
    tops = [np.abs(v).max(initial=0) for v in sums]
    levels = [given.tol * top for top in tops]
    return [View(v, level, 8 * level, strict=strict) for v, level in zip(sums, levels, strict=True)]


def equal_fit(given: Given, sums: Sequence[np.ndarray], *, strict: bool = False) -> Fit | None:
    """The convolution that equals the matrix up to ``tol``, with the fewest taps; None if there is none.

    ``strict`` refuses geometries that are plausible on paper alone (:meth:`View.is_plausible`).
    """
    views = exact_views(given, sums, strict=strict)
    plain = [zeros_axis(view) for view in views]
    fits = (view.residual(axis) <= view.slack for view, axis in zip(views, plain, strict=True))
    plausible = (view.is_plausible(axis) for view, axis in zip(views, plain, strict=True))
    zeros = plain if all(fits) and all(plausible) else None
    best = _fewest_taps(views, zeros)
    found = (_projected(given, axes, _groups(given)) for axes in (best, zeros) if axes is not None)
    return next((fit for fit in found if fit.distance <= given.tol), None)


def likely_fit(given: Given) -> Fit:
    """The convolution that the Bayesian information criterion prefers, of those that fit at some level of
    noise."""
    sums = axis_sums(given, noisy=True)
    best = _projected(
        given, [zeros_axis(view) for view in exact_views(given, sums, strict=True)], _groups(given)
    )
    for _ in range(_ROUNDS):
        found = min(_at_levels(given, sums), key=lambda fit: fit.criterion, default=best)
        if found.criterion >= best.criterion:
            break
        best, sums = found, sharper_sums(given, found.spec.axes)
    return best


def near_fit(given: Given, sums: Sequence[np.ndarray]) -> Fit:
    """The convolution that comes nearest, of those that explain the interior of every axis; else any."""
    views = exact_views(given, sums)
    groups, found = _groups(given), []
    for mode in MODES:
        inner = (min(inner_axes(view, mode), key=view.criterion, default=None) for view in views)
        axes = [axis for axis in inner if axis is not None]
        if len(axes) == len(views) and (axes or mode == "zeros"):
            found.append(_projected(given, axes, groups))
    if not found:
        found.append(_projected(given, [zeros_axis(view) for view in views], groups))
    return min(found, key=lambda fit: fit.distance)


def _at_levels(given: Given, sums: Sequence[np.ndarray]) -> Iterator[Fit]:
    """Of each mode the convolution whose axes, each for itself, the criterion prefers."""
    for mode in MODES:
        axes = [axis for values in sums if (axis := _likely_axis(values, mode)) is not None]
        if len(axes) == len(sums):
            yield _in_groups(given, _projected(given, axes, 1))


def _likely_axis(values: np.ndarray, mode: str) -> Axis | None:
    """The axis of a mode that the criterion prefers, of those that fit at some level of noise and of those
    with a tap more or less at their ends."""
    views = [View(values, *level, noisy=True, strict=True) for level in _levels(values)]
    found = [(view, zeros_axis(view) if mode == "zeros" else _few_taps(view, mode)) for view in views]
    found += [(view, axis) for view in views for axis in inner_axes(view, mode)]
    scores = {axis: view.criterion(axis) for view, axis in found if axis is not None}
    best = min(scores, key=scores.__getitem__, default=None)
    while best is not None:
        for axis in neighbours(best):
            if axis not in scores:
                scores[axis] = views[0].criterion(axis)
        before, best = best, min(scores, key=scores.__getitem__)
        if best == before:
            break
    return best


def _few_taps(view: View, mode: str) -> Axis | None:
    """The axis of a mode that fits, if it has not many more taps than an output reads inputs."""
    search = BoundarySearch(view, mode)
    tries = (search.upto(math.floor(factor * view.least_taps)) for factor in (1, 1.5, 2.25))
    return next((axis for axis in tries if axis is not None), None)


def _levels(values: np.ndarray) -> list[tuple[float, float]]:
    """Some pairs of (values up to it are 0, such differences are none): the noise is taken to end where
    sorted magnitudes have a gap."""
    size = np.sort(magnitude(values).ravel())
    size = size[size > 0]
    gaps = np.diff(np.log(size))
    found = []
    for i in np.argsort(-gaps, kind="stable")[:_LEVELS]:
        noise = math.sqrt((size[: i + 1] ** 2).mean())
        if 2 * noise < np.median(size[i + 1 :]):  # else most of the matrix would be noise
            found.append((min(3 * noise, math.sqrt(size[i] * size[i + 1])), 7 * noise))
    return found


def _in_groups(given: Given, fit: Fit) -> Fit:
    """The same with as many groups as the criterion prefers; ``fit`` has one."""
    spec, size = fit.spec, math.prod(fit.spec.shape)
    order = spec.dimension_numbers.rhs_spec
    kernel = np.transpose(fit.kernel, order)  # [d, c, p]
    weighed = kernel
    for i, axis in enumerate(spec.axes):
        weighed = np.moveaxis(np.tensordot(gram(axis).astype(float), weighed, axes=(1, i + 2)), 0, i + 2)
    energy = (
        np.real(np.conj(kernel) * weighed).reshape(*kernel.shape[:2], -1).sum(-1)
    )  # [d, c]: of that part of M
    best, squares, (outs, ins) = fit, fit.distance**2 * given.squares, energy.shape
    for groups in (g for g in range(2, math.gcd(outs, ins) + 1) if math.gcd(outs, ins) % g == 0):
        same = _blocks(energy.shape, groups)
        left = squares + float(energy[~same].sum())
        criterion = bic(left, size, kernel.size // groups)
        if criterion < best.criterion:
            blocks = kernel[same].reshape(outs, ins // groups, *kernel.shape[2:])
            shape = [blocks.shape[i] for i in inverse(order)]
            grouped = replace(spec, rhs_shape=tuple(shape), feature_group_count=groups)
            distance = math.sqrt(left / given.squares) if given.squares else 0.0
            best = Fit(grouped, np.transpose(blocks, inverse(order)), distance, criterion)
    return best


def _fewest_taps(views: Sequence[View], plain: list[Axis] | None) -> list[Axis] | None:
    """The axes that fit with the fewest taps, in the plainest mode; ``plain`` are those of zeros mode."""
    ranks = {mode: i for i, mode in enumerate(MODES)}
    searches = {
        mode: [BoundarySearch(view, mode) for view in views] for mode in MODES if mode != "zeros" and views
    }
    best, factor = plain, 1.0
    while searches and factor < _MOST:
        for mode, parts in [*searches.items()]:
            cost = math.prod(a.taps for a in best) if best else math.inf
            for part in parts:
                # Strictly fewer taps than a plainer mode has, or as many as another one.
                if (math.prod(p.least_taps for p in parts), ranks[mode]) >= (
                    cost,
                    ranks[best[0].mode] if best else 0,
                ):
                    del searches[mode]
                    break
                part.upto(math.floor(factor * part.view.least_taps))
            else:
                axes = [part.axis for part in parts if part.axis is not None]
                if len(axes) == len(parts):
                    best = axes
                    del searches[mode]
        factor *= 1.5
    return best


def _groups(given: Given) -> int:
    """The largest number of diagonal blocks of M as (out channels, in channels)."""
    squares = (
        abs(given.matrix).power(2) if not isinstance(given.matrix, np.ndarray) else abs(given.matrix) ** 2
    )
    left, right = (
        _channel_sums(shape, places[0])
        for shape, places in zip((given.out_shape, given.in_shape), given.places, strict=True)
    )
    energy = (right @ (left @ squares).T).T
    energy = energy if isinstance(energy, np.ndarray) else energy.toarray()  # [d, c]
    used = energy > given.tol**2 * energy.max(initial=0)
    common = math.gcd(*used.shape)
    return next(
        g for g in range(common, 0, -1) if common % g == 0 and not (used & ~_blocks(used.shape, g)).any()
    )


def _blocks(shape: tuple[int, int], groups: int) -> np.ndarray:
    """[d, c]: whether the out channel and the channel are in the same group."""
    d, c = (np.arange(n) * groups // max(n, 1) for n in shape)
    return d[:, None] == c


def _channel_sums(shape: Sequence[int], place: int) -> Any:
    from scipy.sparse import csr_array

    channel = np.arange(math.prod(shape)) // math.prod(shape[place + 1 :]) % max(1, shape[place])
    size = len(channel)
    return csr_array((np.ones(size), (channel, np.arange(size))), (shape[place], size))


def _projected(given: Given, axes: Sequence[Axis], groups: int) -> Fit:
    """The nearest convolution with these axes."""
    kernel = given.channels[0], given.channels[1] // groups, *(a.taps for a in axes)
    spec = conv_spec(
        given.lhs_shape,
        [kernel[i] for i in inverse(given.numbers.rhs_spec)],
        [a.stride for a in axes],
        [(a.lo, a.hi) for a in axes],
        [a.lhs_dilation for a in axes],
        [a.rhs_dilation for a in axes],
        given.numbers,
        groups,
        padding_mode=next((a.mode for a in axes), "zeros"),
    ).canonical
    nearest, off = np.zeros(spec.rhs_shape, given.matrix.dtype), given.matrix
    for _ in range(2):  # the second time for what long sums have rounded away
        nearest = nearest + _nearest_kernel(given, off, spec)
        off = difference(given, as_scipy(spec, nearest))
    squares = sum_of_squares(off)
    distance = math.sqrt(squares / given.squares) if given.squares else 0.0
    return Fit(spec, nearest, distance, bic(squares, math.prod(spec.shape), nearest.size))


def _lookup(matrix: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The function from (rows, columns) to these entries of a NumPy array or a canonical CSR."""
    if isinstance(matrix, np.ndarray):
        return lambda rows, columns: matrix[rows, columns]
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    keys = np.append(rows * matrix.shape[1] + matrix.indices, np.iinfo(np.int64).max)  # ascending
    data = np.append(matrix.data, 0)

    def entries(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        wanted = rows * np.int64(matrix.shape[1]) + columns
        at = np.searchsorted(keys, wanted)
        return np.where(keys[at] == wanted, data[at], 0)

    return entries


def _nearest_kernel(given: Given, matrix: Any, spec: ConvSpec) -> np.ndarray:
    """``G^+ L^T(A)`` (docs/maths.md, section 3), from the entries of A where M has entries."""
    size = math.prod(spec.rhs_shape)
    sums, entries = np.zeros(size, matrix.dtype), _lookup(matrix)
    for n, columns, taps in stored_entries(spec, np.arange(spec.out_size)):
        values = entries(n, columns)
        sums += sums_by(taps, values, size)
    sums = sums.reshape(spec.rhs_shape)
    for i, axis in zip(spec.dimension_numbers.rhs_spec[2:], spec.axes, strict=True):
        sums = solve_gram_on_host(axis, sums, i)
    return sums


def difference(given: Given, nearest: Any) -> Any:
    if not isinstance(given.matrix, np.ndarray):
        return given.matrix - nearest
    off = given.matrix.copy()
    rows = np.repeat(np.arange(nearest.shape[0]), np.diff(nearest.indptr))
    off[rows, nearest.indices] -= nearest.data
    return off

"""An independent convolution: NumPy and loops, straight from the definition.

Nothing here is shared with the library: no import of jaxconv_fc, no lax, no index table. The input
is padded with `numpy.pad` (zeros mode: dilated first, then padded or cropped; the other modes:
padded first, then dilated), and then read at `o*stride + p*rhs_dilation` for every output position
`o` and every kernel tap `p`. A geometry is anything with the arguments of `conv_spec` as attributes.

`conv` does that with values. `triples` does it with *labels* (the positions 0, 1, 2, ... of the
ravelled input), which lists every (row, column, tap) that meet; M, M^T y and the kernel gradient are
sums over that list. Integers stay integers of their type, so those results are exact modulo 2**bits.
"""

import itertools
import math

import ml_dtypes  # what JAX calls bfloat16; also its finfo
import numpy as np

NUMPY_PAD_MODES = {"circular": "wrap", "reflect": "reflect", "symmetric": "symmetric", "edge": "edge"}


# layouts and sizes -----------------------------------------------------------------------------------


def layouts(geometry):
    """Three tuples of axes: lhs as (N, C, spatial...), rhs as (O, I, spatial...), out as (N, O, ...)."""
    rank = len(geometry.lhs_shape)
    numbers = geometry.dimension_numbers
    if numbers is None:
        return (tuple(range(rank)),) * 3
    lhs, rhs, out = numbers
    if not isinstance(lhs, str):
        return tuple(lhs), tuple(rhs), tuple(out)
    spatial = [letter for letter in rhs if letter not in "OI"]  # the kernel's letters give the order
    return tuple(
        tuple(text.index(letter) for letter in [*first_two, *spatial])
        for text, first_two in ((lhs, "NC"), (rhs, "OI"), (out, "NC"))
    )


def _take(shape, axes):
    return tuple(shape[a] for a in axes)


def _spatial(shape, axes):
    return _take(shape, axes[2:])


def _dilated(size, dilation):
    return dilation * (size - 1) + 1 if size else 0


def strides_and_dilations(geometry):
    """(window_strides, lhs_dilation, rhs_dilation), with ones for None."""
    ones = (1,) * (len(geometry.lhs_shape) - 2)
    return geometry.window_strides, geometry.lhs_dilation or ones, geometry.rhs_dilation or ones


def pads(geometry):
    """The (lo, hi) pairs, with the three string paddings resolved by what they promise."""
    if not isinstance(geometry.padding, str):
        return tuple(tuple(pair) for pair in geometry.padding)
    lhs, rhs, _ = layouts(geometry)
    name = geometry.padding.upper()
    result = []
    for n, k, s, l, r in zip(
        _spatial(geometry.lhs_shape, lhs),
        _spatial(geometry.rhs_shape, rhs),
        *strides_and_dilations(geometry),
        strict=True,
    ):
        if name == "VALID":
            result.append((0, 0))
            continue
        size, window = _dilated(n, l), _dilated(k, r)
        wanted = -(-size // s)  # SAME: as many outputs as strides start inside the input
        total = max((wanted - 1) * s + window - size, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if name == "SAME" else (large, small))
    return tuple(result)


def out_sizes(geometry):
    """The spatial output sizes; 0 where the window does not fit."""
    lhs, rhs, _ = layouts(geometry)
    result = []
    for n, k, s, l, r, (lo, hi) in zip(
        _spatial(geometry.lhs_shape, lhs),
        _spatial(geometry.rhs_shape, rhs),
        *strides_and_dilations(geometry),
        pads(geometry),
        strict=True,
    ):
        zeros = geometry.padding_mode == "zeros"
        size = _dilated(n, l) + lo + hi if zeros else _dilated(n + lo + hi, l)
        result.append(max((size - _dilated(k, r)) // s + 1, 0))
    return tuple(result)


def place(values, axes):
    """The tuple whose entry axes[j] is values[j]: canonical order back to the caller's layout."""
    placed = [0] * len(axes)
    for axis, value in zip(axes, values, strict=True):
        placed[axis] = value
    return tuple(placed)


def batched_out_shape(geometry):
    """What lax.conv_general_dilated would return, batch included."""
    lhs, rhs, out = layouts(geometry)
    batch = geometry.lhs_shape[lhs[0]] // geometry.batch_group_count
    return place((batch, geometry.rhs_shape[rhs[0]], *out_sizes(geometry)), out)


def in_shape(geometry):
    """One example: lhs_shape without its batch entry, or with it equal to batch_group_count > 1."""
    batch_axis = layouts(geometry)[0][0]
    shape = list(geometry.lhs_shape)
    if geometry.batch_group_count == 1:
        del shape[batch_axis]
    else:
        shape[batch_axis] = geometry.batch_group_count
    return tuple(shape)


def out_shape(geometry):
    """One output: the batched output shape without its batch entry."""
    shape = list(batched_out_shape(geometry))
    del shape[layouts(geometry)[2][0]]
    return tuple(shape)


def matrix_shape(geometry):
    return math.prod(out_shape(geometry)), math.prod(in_shape(geometry))


# the definition --------------------------------------------------------------------------------------


def _dilate(array, dilations, fill):
    """Put dilation - 1 holes of `fill` between neighbours along each spatial axis."""
    shape = tuple(_dilated(n, l) for n, l in zip(array.shape[2:], dilations, strict=True))
    holes = np.full(array.shape[:2] + shape, fill, array.dtype)
    holes[(slice(None), slice(None), *(slice(None, None, l) for l in dilations))] = array
    return holes


def _extend(array, geometry, fill):
    """(N, C, spatial...) padded and dilated: what the window slides over."""
    _, lhs_dilation, _ = strides_and_dilations(geometry)
    amounts = pads(geometry)
    if geometry.padding_mode != "zeros":
        mode = NUMPY_PAD_MODES[geometry.padding_mode]
        return _dilate(np.pad(array, [(0, 0), (0, 0), *amounts], mode=mode), lhs_dilation, fill)
    grow = [(max(lo, 0), max(hi, 0)) for lo, hi in amounts]
    crop = [(max(-lo, 0), max(-hi, 0)) for lo, hi in amounts]
    grown = np.pad(
        _dilate(array, lhs_dilation, fill), [(0, 0), (0, 0), *grow], mode="constant", constant_values=fill
    )
    kept = [slice(lo, max(size - hi, lo)) for (lo, hi), size in zip(crop, grown.shape[2:], strict=True)]
    return grown[(slice(None), slice(None), *kept)]


def _windows(geometry):
    """Every (output position o, tap p, position read o*stride + p*rhs_dilation)."""
    _, rhs, _ = layouts(geometry)
    strides, _, rhs_dilation = strides_and_dilations(geometry)
    for o in itertools.product(*map(range, out_sizes(geometry))):
        for p in itertools.product(*map(range, _spatial(geometry.rhs_shape, rhs))):
            yield o, p, tuple(a * s + b * r for a, s, b, r in zip(o, strides, p, rhs_dilation, strict=True))


def _channels(geometry):
    """Which batch group (O, 1) and which input channel (O, I) meet out channel d, kernel channel i."""
    lhs, rhs, _ = layouts(geometry)
    out_channels, kernel_channels = _take(geometry.rhs_shape, rhs[:2])
    d = np.arange(out_channels)[:, None]
    i = np.arange(kernel_channels)[None, :]
    group = d // (out_channels // geometry.feature_group_count)
    in_channel = group * (geometry.lhs_shape[lhs[1]] // geometry.feature_group_count) + i
    return d // (out_channels // geometry.batch_group_count), in_channel


def related(axis):
    """Every (output, input, tap) of one spatial axis that meet, by the definition alone."""
    lo, padded = axis.lo, list(range(axis.size))
    if axis.mode != "zeros" and axis.size:
        lo, mode = 0, NUMPY_PAD_MODES[axis.mode]
        padded = np.pad(padded, (axis.lo, axis.hi), mode=mode).tolist()
    found = set()
    for o, p in itertools.product(range(axis.out_size), range(axis.taps)):
        j, hole = divmod(o * axis.stride + p * axis.rhs_dilation - lo, axis.lhs_dilation)
        if not hole and 0 <= j < len(padded):
            found.add((o, padded[j], p))
    return found


def conv(x, kernel, geometry):
    """The whole batch: what lax.conv_general_dilated(x, kernel, ...) means, by its definition."""
    lhs, rhs, out = layouts(geometry)
    x, kernel = np.asarray(x), np.asarray(kernel)
    image = _extend(np.transpose(x, lhs), geometry, x.dtype.type(0))
    groups = geometry.batch_group_count
    image = image.reshape(groups, image.shape[0] // groups, *image.shape[1:])  # batch is group-major
    weights = np.transpose(kernel, rhs)
    batch_group, in_channel = _channels(geometry)
    result = np.zeros(_take(batched_out_shape(geometry), out), np.result_type(x, kernel))
    for o, p, position in _windows(geometry):
        seen = image[(..., *position)][batch_group, :, in_channel]  # (O, I, N)
        products = weights[(slice(None), slice(None), *p)][:, :, None] * seen
        result[(slice(None), slice(None), *o)] += products.sum(axis=1, dtype=result.dtype).T
    return np.transpose(result, np.argsort(out))


def triples(geometry):
    """Three integer arrays (rows, columns, taps): M[row, column] receives kernel.ravel()[tap]."""
    lhs, rhs, out = layouts(geometry)
    rows_of = np.arange(math.prod(out_shape(geometry))).reshape(out_shape(geometry))
    rows_of = np.transpose(np.expand_dims(rows_of, out[0]), out)[0]  # (O, spatial...)
    columns_of = np.arange(math.prod(in_shape(geometry))).reshape(in_shape(geometry))
    if geometry.batch_group_count == 1:
        columns_of = np.expand_dims(columns_of, lhs[0])
    columns_of = _extend(np.transpose(columns_of, lhs), geometry, -1)  # (B, C, spatial...), -1: padding
    taps_of = np.arange(math.prod(geometry.rhs_shape)).reshape(geometry.rhs_shape)
    taps_of = np.transpose(taps_of, rhs)
    batch_group, in_channel = _channels(geometry)
    found = [np.empty((3, 0), int)]
    for o, p, position in _windows(geometry):
        columns = columns_of[(batch_group, in_channel, *position)]  # (O, I)
        rows = np.broadcast_to(rows_of[(slice(None), *o)][:, None], columns.shape)
        taps = taps_of[(slice(None), slice(None), *p)]
        found.append(np.stack([rows, columns, taps])[:, columns >= 0])
    return np.concatenate(found, axis=1)


def _collect(shape, where, values):
    """zeros(shape) with values added at `where`; taps that collide add up (of bools: are or-ed)."""
    values = np.asarray(values)
    result = np.zeros(shape, values.dtype)
    (np.logical_or if values.dtype == bool else np.add).at(result, where, values)
    return result


def matrix(kernel, geometry):
    """M of one example, (out_size, in_size)."""
    rows, columns, taps = triples(geometry)
    return _collect(matrix_shape(geometry), (rows, columns), np.asarray(kernel).ravel()[taps])


def pattern(geometry):
    """Where M may be other than 0: True where at least one tap meets the entry."""
    return matrix(np.ones(geometry.rhs_shape, bool), geometry)


def product(x, kernel, geometry):
    """M x of one example, x in in_shape, by the convolution itself (no M)."""
    lhs, _, out = layouts(geometry)
    x = np.asarray(x)
    if geometry.batch_group_count == 1:
        x = np.expand_dims(x, lhs[0])
    return np.squeeze(conv(x, kernel, _one_example(geometry)), axis=out[0])


def transpose_product(y, kernel, geometry):
    """M^T y of one output, y in out_shape."""
    rows, columns, taps = triples(geometry)
    products = np.asarray(kernel).ravel()[taps] * np.asarray(y).ravel()[rows]
    return _collect(math.prod(in_shape(geometry)), columns, products).reshape(in_shape(geometry))


def kernel_gradient(x, y, geometry):
    """d <y, M(kernel) x> / d kernel, without conjugation."""
    rows, columns, taps = triples(geometry)
    products = np.asarray(y).ravel()[rows] * np.asarray(x).ravel()[columns]
    return _collect(math.prod(geometry.rhs_shape), taps, products).reshape(geometry.rhs_shape)


def matrix_gradient(cotangent, geometry):
    """d <cotangent, M(kernel)> / d kernel: the adjoint of the map from kernel to matrix."""
    rows, columns, taps = triples(geometry)
    entries = np.asarray(cotangent)[rows, columns]
    return _collect(math.prod(geometry.rhs_shape), taps, entries).reshape(geometry.rhs_shape)


def examples(x, geometry):
    """The examples of a batch, each in in_shape: example j is the entries g*N' + j of all groups g."""
    axis = layouts(geometry)[0][0]
    groups = geometry.batch_group_count
    count = x.shape[axis] // groups
    picks = [j if groups == 1 else [g * count + j for g in range(groups)] for j in range(count)]
    return [np.take(x, pick, axis=axis) for pick in picks]


class _one_example:
    """The geometry with a batch of one example."""

    def __init__(self, geometry):
        self._geometry = geometry
        shape = list(geometry.lhs_shape)
        shape[layouts(geometry)[0][0]] = geometry.batch_group_count
        self.lhs_shape = tuple(shape)

    def __getattr__(self, name):
        return getattr(self._geometry, name)


# ranks -----------------------------------------------------------------------------------------------

CUTOFF = 1e-8  # of the largest singular value: what is smaller is 0


def rank(values):
    """How many of these singular values are not 0; None where small ones cannot be told from rounding.

    A singular value that is 0 comes out as some 1e-15 of the largest. NumPy's own cut-offs lie just
    there, so that now and then they count it, and its inverse of 1e15 is then taken for a result.
    A cut-off is honest if nothing lies near it.
    """
    largest = values.max(initial=0)
    near = (values > 1e-13 * largest) & (values <= CUTOFF * largest)
    return None if near.any() else int((values > CUTOFF * largest).sum())


def pseudo_inverse(matrix):
    """M^+ of a matrix whose rank is certain."""
    if not matrix.size:
        return np.zeros(matrix.shape[::-1], matrix.dtype)
    assert rank(np.linalg.svd(matrix, compute_uv=False)) is not None, "no reference: the rank is uncertain"
    return np.linalg.pinv(matrix, rcond=CUTOFF)


# comparing -------------------------------------------------------------------------------------------


def wide(array):
    """The same numbers in a type whose own rounding does not count here."""
    array = np.asarray(array)
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def size_of(array):
    """|re| + |im|: the modulus of a real number, and for a complex one what bounds each part."""
    array = wide(array)
    return np.abs(array.real) + np.abs(array.imag)


def gamma(terms, dtype):
    """n u / (1 - n u), the rounding factor of a sum of n products in `dtype` (unit roundoff u).

    At most 1: so it is for a random sum of 128 terms and more in bfloat16, whose products add in float32.
    """
    u = float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2
    return terms * u / (1 - terms * u) if terms * u < 0.5 else 1.0


def assert_within(got, want, magnitude, terms):
    """|got - want| <= 2 gamma_n magnitude entry by entry; integers must be equal.

    `want` is the truth in a wide type, `magnitude` the same sum with every product made positive,
    n = terms + 2, and the dtype of `got` is the one it was computed in. `magnitude` is not |want|:
    taps that collide in one entry of M, or cancel in a sum, still leave their rounding behind.
    """
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    if got.dtype.kind in "iu":
        np.testing.assert_array_equal(got, want.astype(got.dtype))
        return
    allowed = 2 * gamma(terms + 2, got.dtype) * magnitude
    error = np.abs(wide(got) - want)
    bad = ~(error <= allowed)  # and not error > allowed: NaN must fail
    assert not bad.any(), f"off by {error[bad][:5]} where {allowed[bad][:5]} is allowed ({bad.sum()} entries)"


def assert_matrix(got, kernel, geometry):
    """got is M, up to the rounding of taps that add up in one entry."""
    rows, columns, _ = triples(geometry)
    most = _most(rows * matrix_shape(geometry)[1] + columns)
    assert_within(got, matrix(wide(kernel), geometry), matrix(size_of(kernel), geometry), most)


def assert_product(got, kernel, x, geometry):
    """got is M x; a sum of (channels read) * (taps) products."""
    _, rhs, _ = layouts(geometry)
    want = product(wide(x), wide(kernel), geometry)
    magnitude = product(size_of(x), size_of(kernel), geometry)
    assert_within(got, want, magnitude, math.prod(_take(geometry.rhs_shape, rhs[1:])))


def assert_transpose_product(got, kernel, y, geometry):
    """got is M^T y; outside zeros mode an input may be read from several padded places."""
    _, columns, _ = triples(geometry)
    want = transpose_product(wide(y), wide(kernel), geometry)
    magnitude = transpose_product(size_of(y), size_of(kernel), geometry)
    assert_within(got, want, magnitude, _most(columns))


def assert_kernel_gradient(got, x, y, geometry):
    """got is d <y, M(kernel) x> / d kernel."""
    _, _, taps = triples(geometry)
    want = kernel_gradient(wide(x), wide(y), geometry)
    assert_within(got, want, kernel_gradient(size_of(x), size_of(y), geometry), _most(taps))


def _most(places):
    """How many terms the fullest place receives."""
    return int(np.unique_counts(places).counts.max(initial=0))

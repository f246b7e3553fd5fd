"""The geometry of a convolution: what ``lax.conv_general_dilated`` takes, resolved and validated."""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxconv_fc.axis import MODES, Axis, Ints, dilated

# The names that numpy.pad and torch give to the same modes.
_MODE_ALIASES = {"constant": "zeros", "wrap": "circular", "replicate": "edge"}
_PADDINGS = ("VALID", "SAME", "SAME_LOWER")


class Nbytes(NamedTuple):
    """Bytes of one matrix in each format: numbers for a program, a table for a reader."""

    dense: int
    bcoo: int
    bcsr: int

    def __str__(self) -> str:
        numbers = {name: f"{n:,} bytes" for name, n in self._asdict().items()}
        wide = max(map(len, numbers.values()))
        sizes = {name: readable(n) for name, n in self._asdict().items()}
        return "\n".join(f"{name:5}  {text:>{wide}}  {sizes[name]:>8}" for name, text in numbers.items())


@jax.tree_util.register_static
@dataclass(frozen=True)
class ConvSpec:
    """The geometry of one convolution: resolved arguments of ``lax.conv_general_dilated``.

    Made by :func:`conv_spec`. Frozen, hashable and static in pytrees, so it passes through
    ``jax.jit`` without ``static_argnames``. The matrix M that it describes belongs to one example:
    the batch entry of ``lhs_shape`` plays no part, save where ``batch_group_count`` > 1.

    Vectors are ravels, in row-major order, of arrays of ``in_shape`` and ``out_shape`` in the
    caller's own layout. Row ``i`` of M is output neuron ``i`` of ``out_shape``; column ``j`` is
    entry ``j`` of ``in_shape``.
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    batch_group_count: int
    padding_mode: str

    # -- sizes ---------------------------------------------------------------------------------

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The relation of each spatial axis, in the order of ``window_strides``: in steps that int32 holds,
        where there are any, even if those of the arguments are larger."""
        return tuple(axis.within_int32() for axis in self._given_axes)

    @property
    def _given_axes(self) -> tuple[Axis, ...]:
        """The spatial axes as the arguments have them."""
        n = _pick(self.lhs_shape, self.dimension_numbers.lhs_spec[2:])
        k = _pick(self.rhs_shape, self.dimension_numbers.rhs_spec[2:])
        pads = self.padding
        steps = (self.window_strides, [lo for lo, _ in pads], [hi for _, hi in pads])
        return tuple(
            Axis(*args, mode=self.padding_mode)
            for args in zip(n, k, *steps, self.lhs_dilation, self.rhs_dilation, strict=True)
        )

    @property
    def groups(self) -> int:
        """Blocks of M: a batch group is a feature group whose channels lie in another batch entry."""
        return self.feature_group_count * self.batch_group_count

    @property
    def out_channels(self) -> int:
        return self.rhs_shape[self.dimension_numbers.rhs_spec[0]]

    @property
    def group_channels(self) -> int:
        """Input channels that one output channel reads."""
        return self.rhs_shape[self.dimension_numbers.rhs_spec[1]]

    @property
    def in_channels(self) -> int:
        """Input channels of one example, the batch entries of its batch groups counted in."""
        return self.groups * self.group_channels

    @cached_property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one example: ``lhs_shape`` without its batch entry (with it, as
        ``batch_group_count``, when that is > 1)."""
        return _one_example(self.lhs_shape, self.dimension_numbers.lhs_spec[0], self.batch_group_count)

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output of one example, in the caller's layout."""
        batch, feature, *spatial = self.dimension_numbers.out_spec
        shape = {batch: 1, feature: self.out_channels}
        shape |= {i: axis.out_size for i, axis in zip(spatial, self.axes, strict=True)}
        return _one_example([shape[i] for i in range(len(shape))], batch, 1)

    @cached_property
    def in_size(self) -> int:
        return math.prod(self.in_shape)

    @cached_property
    def out_size(self) -> int:
        return math.prod(self.out_shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of M."""
        return self.out_size, self.in_size

    @cached_property
    def nse(self) -> int:
        """Number of entries of M that are not structurally zero: a product over the axes."""
        return self.out_channels * self.group_channels * math.prod(a.pair_count for a in self.axes)

    def nbytes(self, dtype: Any = np.float32) -> Nbytes:
        """Bytes of M with entries of this dtype, by format; as text, a table.

        Formulas, with ``e`` bytes per entry and ``i`` per index (4, or 8 beyond int32): dense
        ``out_size*in_size*e``, BCOO ``nse*(e + 2*i)``, BCSR and SciPy's CSR ``nse*(e + i) + (out_size+1)*i``.

        >>> import jaxconv_fc as fc
        >>> print(fc.conv_spec((1, 64, 56, 56), (64, 64, 3, 3), (1, 1), "SAME").nbytes("float32"))
        dense  161,128,382,464 bytes   150 GiB
        bcoo     1,354,432,512 bytes  1.26 GiB
        bcsr       903,757,828 bytes   862 MiB
        """
        entry, index = np.dtype(dtype).itemsize, 4 if self.stored_reach <= np.iinfo(np.int32).max else 8
        return Nbytes(
            dense=self.out_size * self.in_size * entry,
            bcoo=self.nse * (entry + 2 * index),
            bcsr=self.nse * (entry + index) + (self.out_size + 1) * index,
        )

    @property
    def stored_reach(self) -> int:
        """The largest index that a sparse format of M holds."""
        return max(self.nse, self.in_size, self.out_size)

    @cached_property
    def collides(self) -> bool:
        """Whether two taps can meet in one entry of M, where they add (boundary modes only)."""
        return self.padding_mode != "zeros" and self.nse > 0 and any(a.collides for a in self.axes)

    @cached_property
    def canonical(self) -> ConvSpec:
        """The geometry of the same M that equal maps share (zeros mode; docs/maths.md, section 2).

        No position of the padded input is left unused, and batch groups are feature groups where the
        layout allows, that is, where the batch stands directly before the channels.
        """
        if self.padding_mode != "zeros":
            return self
        spec = self.having([a.ending_at(a.out_size) for a in self.axes])
        batch, feature, *_ = self.dimension_numbers.lhs_spec
        groups = self.batch_group_count
        if groups == 1 or feature != batch + 1:
            return spec
        lhs = list(self.lhs_shape)
        lhs[batch], lhs[feature] = lhs[batch] // groups, lhs[feature] * groups
        return replace(spec, lhs_shape=tuple(lhs), feature_group_count=groups, batch_group_count=1)

    def having(self, axes: Sequence[Axis]) -> ConvSpec:
        """The same geometry with other spatial axes, all but the number of their taps."""
        lhs = list(self.lhs_shape)
        for i, axis in zip(self.dimension_numbers.lhs_spec[2:], axes, strict=True):
            lhs[i] = axis.size
        return replace(
            self,
            lhs_shape=tuple(lhs),
            window_strides=tuple(a.stride for a in axes),
            padding=tuple((a.lo, a.hi) for a in axes),
            lhs_dilation=tuple(a.lhs_dilation for a in axes),
            rhs_dilation=tuple(a.rhs_dilation for a in axes),
        )

    # -- positions -----------------------------------------------------------------------------

    @property
    def in_order(self) -> tuple[int, ...]:
        """Axes of ``in_shape`` in canonical order: spatial, then batch groups (if any), then channels."""
        batch, feature, *spatial = self.dimension_numbers.lhs_spec
        if self.batch_group_count > 1:
            return (*spatial, batch, feature)
        return tuple(i - (i > batch) for i in (*spatial, feature))

    @property
    def out_order(self) -> tuple[int, ...]:
        """Axes of ``out_shape`` in canonical order: spatial, then channels."""
        batch, feature, *spatial = self.dimension_numbers.out_spec
        return tuple(i - (i > batch) for i in (*spatial, feature))

    @property
    def kernel_order(self) -> tuple[int, ...]:
        """Axes of the kernel in canonical order: spatial, then input channels, then output channels."""
        feature, channel, *spatial = self.dimension_numbers.rhs_spec
        return (*spatial, channel, feature)

    def column(self, positions: Sequence[Ints], channel: Ints) -> Ints:
        """Column of M that stands for these spatial positions of input channel ``channel``."""
        *spatial, batch, feature = self._in_strides
        channels = self.in_channels // self.batch_group_count
        index = channel // channels * batch + channel % channels * feature
        return sum((t * s for t, s in zip(positions, spatial, strict=True)), index)

    def row(self, positions: Sequence[Ints], channel: Ints) -> Ints:
        """Row of M that stands for these spatial positions of output channel ``channel``."""
        *spatial, feature = _pick(_strides(self.out_shape), self.out_order)
        return sum((o * s for o, s in zip(positions, spatial, strict=True)), channel * feature)

    def tap(self, taps: Sequence[Ints], channel: Ints, out_channel: Ints) -> Ints:
        """Index in ``kernel.ravel()`` of these taps of one kernel, for channel ``channel`` of its group."""
        strides = _pick(_strides(self.rhs_shape), self.kernel_order)
        return sum((v * s for v, s in zip((*taps, channel, out_channel), strides, strict=True)), 0)

    def split_column(self, column: Ints) -> tuple[list[Ints], Ints]:
        """``(positions, channel)`` of a column: the inverse of :meth:`column`."""
        *spatial, batch, feature = self._in_strides
        channels = self.in_channels // self.batch_group_count
        positions = [column // s % a.size for s, a in zip(spatial, self.axes, strict=True)]
        group = column // batch % self.batch_group_count if batch else 0
        return positions, group * channels + column // feature % channels

    def split_row(self, row: Ints) -> tuple[list[Ints], Ints]:
        """``(positions, channel)`` of a row: the inverse of :meth:`row`."""
        *spatial, feature = _pick(_strides(self.out_shape), self.out_order)
        positions = [row // s % a.out_size for s, a in zip(spatial, self.axes, strict=True)]
        return positions, row // feature % self.out_channels

    @cached_property
    def _in_strides(self) -> tuple[int, ...]:
        strides = _pick(_strides(self.in_shape), self.in_order)
        return strides if self.batch_group_count > 1 else (*strides[:-1], 0, strides[-1])

    @property
    def index_dtype(self) -> Any:
        """The narrowest integer dtype that holds every position; ValueError if JAX has none now."""
        return index_dtype(max(self.in_size, self.out_size, *(a.reach for a in self.axes), 0), self)


def conv_spec(
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    *,
    padding_mode: str = "zeros",
) -> ConvSpec:
    """The geometry of ``lax.conv_general_dilated``, with shapes in place of arrays.

    Per spatial axis, output ``o`` reads input ``t`` through tap ``p`` when
    ``o*stride + p*rhs_dilation - lo == t*lhs_dilation``.

    Args:
      lhs_shape: shape of the input, batch included.
      rhs_shape: shape of the kernel.
      window_strides: stride per spatial axis.
      padding: ``"VALID"``, ``"SAME"``, ``"SAME_LOWER"``, or ``[(lo, hi), ...]``; negative amounts
        crop. Strings work with ``lhs_dilation`` too (there lax refuses ``"SAME"``): the output then
        has ``ceil(dilated size / stride)`` positions.
      lhs_dilation: dilation of the input per spatial axis (transposed convolution).
      rhs_dilation: dilation of the kernel per spatial axis (atrous convolution).
      dimension_numbers: layouts, as lax takes them: ``None``, three strings such as
        ``("NHWC", "HWIO", "NHWC")``, or ``lax.ConvDimensionNumbers``.
      feature_group_count: number of feature groups.
      batch_group_count: number of batch groups.
      padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"``, ``"symmetric"`` or ``"edge"`` (or
        NumPy's ``"constant"``, ``"wrap"``, torch's ``"replicate"``). For all but zeros the input is
        padded first and dilated then.

    A window that does not fit into the padded input gives an output of size 0 and a matrix with no
    rows, as in lax.

    Raises:
      TypeError: an argument is of the wrong kind, or traced: all of them must be static.
      ValueError: an argument has a wrong value.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((8, 3, 32, 32), (16, 3, 3, 3), (2, 2), "SAME")
    >>> spec.padding, spec.in_shape, spec.out_shape, spec.shape, spec.nse
    (((0, 1), (0, 1)), (3, 32, 32), (16, 16, 16), (4096, 3072), 106032)
    """
    lhs = _ints("lhs_shape", lhs_shape, least=0)
    rhs = _ints("rhs_shape", rhs_shape, least=0)
    _check_ranks(lhs, rhs)
    dims = len(lhs) - 2
    numbers = _resolve_layouts(dimension_numbers, len(lhs))
    groups = as_int("feature_group_count", feature_group_count, least=1)
    batch_groups = as_int("batch_group_count", batch_group_count, least=1)
    _check_channels(lhs, rhs, numbers, groups, batch_groups)
    strides = _ints("window_strides", window_strides, length=dims)
    lhs_dil = (1,) * dims if lhs_dilation is None else _ints("lhs_dilation", lhs_dilation, length=dims)
    rhs_dil = (1,) * dims if rhs_dilation is None else _ints("rhs_dilation", rhs_dilation, length=dims)
    mode = _resolve_mode(padding_mode)
    unpadded = [
        Axis(n, k, s, lhs_dilation=l, rhs_dilation=r, mode=mode)
        for n, k, s, l, r in zip(
            _pick(lhs, numbers.lhs_spec[2:]), _pick(rhs, numbers.rhs_spec[2:]), strides, lhs_dil, rhs_dil,
            strict=True,
        )
    ]  # fmt: skip
    pads = _resolve_padding(padding, unpadded)
    spec = ConvSpec(lhs, rhs, strides, pads, lhs_dil, rhs_dil, numbers, groups, batch_groups, mode)
    for i, axis in enumerate(spec._given_axes):
        _check_axis(i, axis, rhs)
    return spec


# -- resolving and validating ------------------------------------------------------------------


def _reject_traced(name: str, value: Any) -> None:
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} must be static, got the traced value {value}. Sizes shape the program: close over "
            "it, or name it in static_argnames of jax.jit."
        )


def as_int(name: str, value: Any, least: int | None = None) -> int:
    _reject_traced(name, value)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}. Write a whole number such as 1.") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def _ints(name: str, values: Any, *, length: int | None = None, least: int = 1) -> tuple[int, ...]:
    _reject_traced(name, values)
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        hint = " Pass the array's .shape." if hasattr(values, "shape") else ""
        raise TypeError(f"{name} must be a sequence of ints such as (1, 1), got {values!r}.{hint}")
    numbers = tuple(as_int(f"{name}[{i}]", v, least=None) for i, v in enumerate(values))
    if length is not None and len(numbers) != length:
        raise ValueError(
            f"{name} must have {length} entries, one per spatial axis, got {len(numbers)}: {numbers}."
        )
    if any(v < least for v in numbers):
        raise ValueError(f"{name} must be at least {least} in every entry, got {numbers}.")
    return numbers


def _check_ranks(lhs: tuple[int, ...], rhs: tuple[int, ...]) -> None:
    if min(len(lhs), len(rhs)) < 2:
        raise ValueError(
            "lhs_shape and rhs_shape need at least 2 dimensions (batch and channels; out and in "
            f"channels), got {lhs} and {rhs}. Add the missing ones, e.g. x[None, None]."
        )
    if len(lhs) != len(rhs):
        raise ValueError(
            f"lhs_shape and rhs_shape must have the same number of dimensions, got {lhs} ({len(lhs)}) "
            f"and {rhs} ({len(rhs)}). A single image needs a batch dimension: x[None]."
        )


def _resolve_layouts(numbers: Any, rank: int) -> lax.ConvDimensionNumbers:
    _reject_traced("dimension_numbers", numbers)
    if numbers is None:
        plain = tuple(range(rank))
        return lax.ConvDimensionNumbers(plain, plain, plain)
    if isinstance(numbers, str) or not isinstance(numbers, tuple | list) or len(numbers) != 3:
        raise (ValueError if isinstance(numbers, str | tuple | list) else TypeError)(
            "dimension_numbers must be None, lax.ConvDimensionNumbers or three layouts such as "
            f"('NHWC', 'HWIO', 'NHWC'), got {numbers!r}."
        )
    if all(isinstance(layout, str) for layout in numbers):
        return _resolve_letters(tuple(numbers), rank)
    names = ("lhs_spec", "rhs_spec", "out_spec")
    specs = [_ints(f"dimension_numbers.{n}", v, least=0) for n, v in zip(names, numbers, strict=True)]
    for name, spec in zip(names, specs, strict=True):
        if sorted(spec) != list(range(rank)):
            raise ValueError(
                f"dimension_numbers.{name} must be a permutation of 0..{rank - 1} for {rank}-dimensional "
                f"arrays, got {spec}."
            )
    return lax.ConvDimensionNumbers(*specs)


def _resolve_letters(layouts: tuple[str, str, str], rank: int) -> lax.ConvDimensionNumbers:
    """Spatial axes are matched by letter and ordered as in the kernel's layout, as lax does."""
    for layout, pair, role in zip(layouts, ("NC", "OI", "NC"), ("lhs", "rhs", "out"), strict=True):
        if len(layout) != rank:
            raise ValueError(
                f"dimension_numbers: the {role} layout {layout!r} has {len(layout)} letters for "
                f"{rank}-dimensional arrays; write one letter per dimension."
            )
        if len(set(layout)) != rank or not set(pair) <= set(layout):
            raise ValueError(
                f"dimension_numbers: the {role} layout {layout!r} must hold each of {pair[0]!r} and "
                f"{pair[1]!r} once and every spatial letter once."
            )
    spatial = [c for c in layouts[1] if c not in "OI"]
    if any(set(layout) - set("NC") != set(spatial) for layout in layouts[::2]):
        raise ValueError(
            f"dimension_numbers: the layouts {layouts} must share their spatial letters; the rhs layout "
            f"has {spatial}."
        )
    pairs = ("NC", "OI", "NC")
    specs = (tuple(map(v.index, (*pair, *spatial))) for v, pair in zip(layouts, pairs, strict=True))
    return lax.ConvDimensionNumbers(*specs)


def _check_channels(
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    numbers: lax.ConvDimensionNumbers,
    groups: int,
    batch_groups: int,
) -> None:
    batch, channels = lhs[numbers.lhs_spec[0]], lhs[numbers.lhs_spec[1]]
    features, group_channels = rhs[numbers.rhs_spec[0]], rhs[numbers.rhs_spec[1]]
    if groups > 1 and batch_groups > 1:
        raise ValueError(
            f"feature_group_count and batch_group_count cannot both exceed 1, got {groups} and "
            f"{batch_groups}. Set one of them to 1."
        )
    if channels % groups or features % groups:
        raise ValueError(
            f"feature_group_count={groups} must divide the input channels ({channels}, axis "
            f"{numbers.lhs_spec[1]} of lhs_shape {lhs}) and the output channels ({features}, axis "
            f"{numbers.rhs_spec[0]} of rhs_shape {rhs})."
        )
    if batch % batch_groups or features % batch_groups:
        raise ValueError(
            f"batch_group_count={batch_groups} must divide the batch ({batch}, axis "
            f"{numbers.lhs_spec[0]} of lhs_shape {lhs}) and the output channels ({features}, axis "
            f"{numbers.rhs_spec[0]} of rhs_shape {rhs})."
        )
    if channels != groups * group_channels:
        raise ValueError(
            f"channels do not match: lhs_shape {lhs} has {channels} (axis {numbers.lhs_spec[1]}), "
            f"rhs_shape {rhs} has {group_channels} (axis {numbers.rhs_spec[1]}) times "
            f"feature_group_count={groups}. Give the kernel {channels // groups} input channels, or check "
            "dimension_numbers."
        )


def _resolve_mode(mode: Any) -> str:
    _reject_traced("padding_mode", mode)
    if not isinstance(mode, str):
        raise TypeError(f"padding_mode must be a string, one of {MODES}, got {mode!r}.")
    name = _MODE_ALIASES.get(mode.lower(), mode.lower())
    if name not in MODES:
        raise ValueError(f"padding_mode must be one of {MODES} or {tuple(_MODE_ALIASES)}, got {mode!r}.")
    return name


def _resolve_padding(padding: Any, axes: list[Axis]) -> tuple[tuple[int, int], ...]:
    _reject_traced("padding", padding)
    if isinstance(padding, str):
        return _named_padding(padding, axes)
    example = f"Write [(lo, hi), ...], a pair per spatial axis, such as {[(1, 1)] * len(axes)}, or 'SAME'."
    if isinstance(padding, float) or not isinstance(padding, int | np.integer | Sequence | np.ndarray):
        raise TypeError(f"padding must be a string or a list of pairs of ints, got {padding!r}. {example}")
    if isinstance(padding, int | np.integer):
        raise ValueError(f"padding must be a string or a list of pairs of ints, got {padding!r}. {example}")
    if len(padding) != len(axes):
        raise ValueError(
            f"padding must have {len(axes)} pairs, one per spatial axis, got {len(padding)}: "
            f"{padding!r}. {example}"
        )
    pads = []
    for i, pair in enumerate(padding):
        _reject_traced(f"padding[{i}]", pair)
        if isinstance(pair, str) or not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
            raise ValueError(f"padding[{i}] must be a pair (lo, hi), got {pair!r}. {example}")
        lo, hi = (as_int(f"padding[{i}][{j}]", v, least=None) for j, v in enumerate(pair))
        pads.append((lo, hi))
    return tuple(pads)


def _named_padding(padding: str, axes: list[Axis]) -> tuple[tuple[int, int], ...]:
    name = padding.upper()
    full = [(a.dilated_taps - 1, a.dilated_taps - 1) for a in axes]
    instead = {
        "FULL": f"padding={full}",
        "CAUSAL": f"padding={[(lo, 0) for lo, _ in full]}",
        "CIRCULAR": "padding='SAME', padding_mode='circular'",
        "REFLECT": "padding='SAME', padding_mode='reflect'",
    }
    if name in instead:
        raise ValueError(f"padding={padding!r} is not a name that lax knows: write {instead[name]}.")
    if name not in _PADDINGS:
        close = difflib.get_close_matches(name, _PADDINGS, n=1, cutoff=0.4)
        hint = f"Did you mean {close[0]!r}?" if close else "Or write [(lo, hi), ...]."
        raise ValueError(f"padding must be one of {_PADDINGS} or a list of pairs, got {padding!r}. {hint}")
    if name == "VALID":
        return ((0, 0),) * len(axes)
    pads = []
    for axis in axes:
        if axis.mode != "zeros" and axis.lhs_dilation > 1:
            raise ValueError(
                f"padding={padding!r} has no meaning with padding_mode={axis.mode!r} and "
                f"lhs_dilation={axis.lhs_dilation}, where the input is padded before it is dilated. "
                "Write [(lo, hi), ...]."
            )
        total = max(0, (-(-axis.span // axis.stride) - 1) * axis.stride + axis.dilated_taps - axis.span)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if name == "SAME" else (large, small))
    return tuple(pads)


def _check_axis(i: int, axis: Axis, rhs: tuple[int, ...]) -> None:
    pads = (axis.lo, axis.hi)
    if axis.taps == 0:
        raise ValueError(f"rhs_shape {rhs} must have at least 1 tap on spatial axis {i}, got 0.")
    if axis.mode == "zeros":
        if axis.span < 0:
            size = dilated(axis.size, axis.lhs_dilation)
            raise ValueError(
                f"padding[{i}]={pads} crops more than the {size} positions of the (dilated) spatial axis "
                f"{i}. Crop at most {size} in total."
            )
        return
    if min(pads) < 0:
        raise ValueError(
            f"padding[{i}]={pads} is negative, which has no meaning with padding_mode={axis.mode!r}. "
            "Slice the input instead, or use padding_mode='zeros'."
        )
    if axis.size == 0 and max(pads) > 0:
        raise ValueError(
            f"padding[{i}]={pads} with padding_mode={axis.mode!r} has nothing to copy from: spatial axis "
            f"{i} is empty. Use padding_mode='zeros'."
        )


# -- operands ----------------------------------------------------------------------------------


def as_array(name: str, value: Any) -> jax.Array:
    """``value`` as a jax.Array; TypeError for what is none (a list would hide a copy)."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(
            f"{name} must be a jax or NumPy array, got {type(value).__name__}: {value!r}. "
            "Write jnp.asarray(...)."
        )
    if isinstance(value, np.ndarray) and value.dtype.kind in "OSUMm":
        raise TypeError(f"{name} must hold numbers, got dtype {value.dtype}. Cast it: {name}.astype(float).")
    return jnp.asarray(native(value))


def native(value: Any) -> Any:
    """A NumPy array whose bytes stand in the other order, in the order of this machine: the same numbers."""
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value


def check_spec(spec: Any) -> None:
    if not isinstance(spec, ConvSpec):
        raise TypeError(
            f"spec must be a ConvSpec, got {type(spec).__name__}: make one with "
            "conv_spec(lhs_shape, rhs_shape, window_strides, padding), and pass it first."
        )


def as_operand(name: str, value: Any, spec: ConvSpec, shape: str) -> jax.Array:
    """``value`` as an array of exactly this shape of the spec."""
    check_spec(spec)
    array, expected = as_array(name, value), getattr(spec, shape)
    if array.shape != expected:
        raise ValueError(
            f"{name} must have the spec's shape {expected}, got {array.shape}. Use jax.vmap for a stack, or "
            "make a spec for this shape."
        )
    return array


# -- sizes and memory --------------------------------------------------------------------------

_memory_limit = contextvars.ContextVar("jaxconv_fc_memory_limit", default=8 * 2**30)


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """Within it, a builder may make arrays of up to ``nbytes`` bytes (8 GiB outside of any).

    A matrix beyond the limit raises a ValueError before anything is allocated.

    >>> import jax.numpy as jnp, jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 8, 8), (1, 1, 3, 3), (1, 1), "SAME")
    >>> with fc.memory_limit(1000):
    ...     fc.as_matrix(spec, jnp.ones((1, 1, 3, 3), jnp.int8))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: as_matrix: 64 x 64 int8 = 4 KiB dense; 484 stored entries: use ...
    """
    token = _memory_limit.set(as_int("nbytes", nbytes, least=0))
    try:
        yield
    finally:
        _memory_limit.reset(token)


def check_dense(name: str, spec: ConvSpec, shape: tuple[int, ...], dtype: Any, instead: str) -> None:
    """ValueError if a dense array of this shape is beyond the memory limit or the index range."""
    entries, limit = math.prod(shape), _memory_limit.get()
    nbytes = entries * jnp.dtype(dtype).itemsize
    sizes = " x ".join(f"{n:,}" for n in shape)
    if nbytes > limit:
        raise ValueError(
            f"{name}: {sizes} {jnp.dtype(dtype).name} = {readable(nbytes)} dense; {spec.nse:,} stored "
            f"entries: use {instead}, or raise the limit of {readable(limit)} with "
            f"jaxconv_fc.memory_limit({nbytes})."
        )
    if entries > np.iinfo(np.int32).max:
        index_dtype(entries, spec)


def check_stored(name: str, spec: ConvSpec, nbytes: int, instead: str) -> None:
    """ValueError if the arrays of a sparse matrix are beyond the memory limit."""
    limit = _memory_limit.get()
    if nbytes > limit:
        raise ValueError(
            f"{name}: {spec.nse:,} stored entries need {readable(nbytes)}, beyond the limit of "
            f"{readable(limit)}: use {instead}, or raise the limit with jaxconv_fc.memory_limit({nbytes})."
        )


def fits_in_memory(nbytes: int) -> bool:
    """Whether an array of this many bytes is within the memory limit."""
    return nbytes <= _memory_limit.get()


def index_dtype(largest: int, spec: ConvSpec) -> Any:
    """int32 where ``largest`` fits, else int64 with x64, else a ValueError."""
    if largest <= np.iinfo(np.int32).max:
        return jnp.int32
    if largest > np.iinfo(np.int64).max:
        raise ValueError(
            f"a matrix of {spec.out_size:,} x {spec.in_size:,} entries needs positions up to {largest:,}, "
            "beyond 64 bits. Use smaller strides, dilations and pads."
        )
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return jnp.int64
    raise ValueError(
        f"a matrix of {spec.out_size:,} x {spec.in_size:,} entries needs indices up to {largest:,}, beyond "
        "int32. Enable 64-bit indices with jax.config.update('jax_enable_x64', True)."
    )


def readable(nbytes: int) -> str:
    """``1.3 GiB``: three digits at least."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.0f} {name}" if nbytes >= 100 * unit else f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} bytes"


def _pick(values: Sequence[int], indices: Sequence[int]) -> tuple[int, ...]:
    return tuple(values[i] for i in indices)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in entries."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _one_example(shape: Sequence[int], batch: int, entries: int) -> tuple[int, ...]:
    kept = (entries,) if entries > 1 else ()
    return (*shape[:batch], *kept, *shape[batch + 1 :])

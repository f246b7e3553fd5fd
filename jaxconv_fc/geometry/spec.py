"""The geometry of a convolution: what ``lax.conv_general_dilated`` takes, resolved and validated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, wraps
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np
from jax import lax

from jaxconv_fc.geometry.arguments import (
    DTYPES,
    as_array,
    as_int,
    as_ints,
    check_axis,
    check_channels,
    check_ranks,
    names_of_lax,
    resolve_layouts,
    resolve_mode,
    resolve_padding,
)
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.memory import index_dtype, readable
from jaxconv_fc.geometry.modes import MODES


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
@dataclass(frozen=True, eq=False)
class ConvSpec:
    """The geometry of one convolution, whose matrix M has ``M @ x.ravel() == conv(x, kernel).ravel()``.

    Made by :func:`conv_spec`. It holds the arguments of ``lax.conv_general_dilated``, resolved. Frozen,
    hashable and static in pytrees, so it passes through ``jax.jit`` without ``static_argnames``. The matrix M
    belongs to one example, so the batch entry of ``lhs_shape`` plays no part: specs that differ in it alone
    are equal, and share compiled programs. It may be symbolic (``jax.export.symbolic_shape``).

    Vectors are ravels, in row-major order, of arrays of ``in_shape`` and ``out_shape`` in the
    caller's own layout. Row ``i`` of M is output neuron ``i`` of ``out_shape``; column ``j`` is
    entry ``j`` of ``in_shape``.

    Attributes:
      lhs_shape, rhs_shape: shapes of the input, batch included, and of the kernel.
      window_strides, lhs_dilation, rhs_dilation: one int per spatial axis.
      padding: ``(lo, hi)`` per spatial axis; negative amounts crop.
      dimension_numbers: the layouts, as ``lax.ConvDimensionNumbers``.
      feature_group_count, batch_group_count: at most one of them is larger than 1.
      padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"``, ``"symmetric"`` or ``"edge"``.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 3, 8, 8), (4, 3, 3, 3), (2, 2), "SAME")
    >>> spec.padding, spec.in_shape, spec.out_shape, spec.shape, spec.nse
    (((0, 1), (0, 1)), (3, 8, 8), (4, 4, 4), (64, 192), 1452)
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
    _repr_html_: ClassVar[Callable[[ConvSpec], str]]  # show/text.py sets it: a table for notebooks

    # -- identity ------------------------------------------------------------------------------

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        """Every argument, with the shape of one example in place of ``lhs_shape``."""
        return self.in_shape, *(getattr(self, field.name) for field in fields(self)[1:])

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, ConvSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    # -- sizes ---------------------------------------------------------------------------------

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The relation of each spatial axis, in the order of ``window_strides``."""
        sizes = [self.lhs_shape[i] for i in self.dimension_numbers.lhs_spec[2:]]
        taps = [self.rhs_shape[i] for i in self.dimension_numbers.rhs_spec[2:]]
        steps = (self.window_strides, self.padding, self.lhs_dilation, self.rhs_dilation)
        return tuple(
            Axis(n, k, s, lo, hi, l, r, self.padding_mode)
            for n, k, s, (lo, hi), l, r in zip(sizes, taps, *steps, strict=True)
        )

    @cached_property
    def pads_with_zeros(self) -> bool:
        """Whether padding reads as 0, not as copies of inputs."""
        return self.padding_mode == "zeros"

    @cached_property
    def groups(self) -> int:
        """Blocks of M: a batch group is a feature group whose channels lie in another batch entry."""
        return self.feature_group_count * self.batch_group_count

    @cached_property
    def out_channels(self) -> int:
        return self.rhs_shape[self.dimension_numbers.rhs_spec[0]]

    @cached_property
    def group_channels(self) -> int:
        """Input channels that one output channel reads."""
        return self.rhs_shape[self.dimension_numbers.rhs_spec[1]]

    @cached_property
    def in_channels(self) -> int:
        """Input channels of one example, those of all its batch entries together."""
        return self.groups * self.group_channels

    @cached_property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one example, which is ``lhs_shape`` without the batch.

        If ``batch_group_count`` > 1, it stands in the place of the batch.
        """
        return _one_example(self.lhs_shape, self.dimension_numbers.lhs_spec[0], self.batch_group_count)

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output of one example, in the caller's layout."""
        batch, feature, *spatial = self.dimension_numbers.out_spec
        shape = {batch: 1, feature: self.out_channels}
        shape |= {i: axis.out_size for i, axis in zip(spatial, self.axes, strict=True)}
        return _one_example([shape[i] for i in range(len(shape))], batch, 1)

    @cached_property
    def in_size(self) -> int:
        """The number of inputs, which is the number of columns of M."""
        return math.prod(self.in_shape)

    @cached_property
    def out_size(self) -> int:
        """The number of outputs, which is the number of rows of M."""
        return math.prod(self.out_shape)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """The shape of M, ``(out_size, in_size)``."""
        return self.out_size, self.in_size

    @cached_property
    def nse(self) -> int:
        """The number of entries of M that are not structurally zero. It is a product over the axes."""
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

    @cached_property
    def stored_reach(self) -> int:
        """The largest index that a sparse format of M holds."""
        return max(self.nse, self.in_size, self.out_size)

    @cached_property
    def collides(self) -> bool:
        """Whether some entry of M is the sum of two taps (boundary modes only)."""
        return not self.pads_with_zeros and self.nse > 0 and any(a.collides for a in self.axes)

    @cached_property
    def canonical(self) -> ConvSpec:
        """The geometry that stands for others with the same M (docs/maths.md, section 2).

        Every window position of the padded input is used, and batch groups become feature groups where the
        layout has the batch directly before the channels. A boundary mode pads as little as it can, and
        gives way to a plainer one that pads alike: to zeros where nothing is padded.
        """
        plain = [axis.plain for axis in self.axes]
        modes = ([alike for axis in plain if (alike := axis.in_mode(mode))] for mode in MODES)
        axes = next(alike for alike in modes if len(alike) == len(plain))
        mode = axes[0].mode if axes else "zeros"
        spec = replace(self.having([axis.plain for axis in axes]), padding_mode=mode)
        batch, feature, *_ = self.dimension_numbers.lhs_spec
        groups = self.batch_group_count
        if groups == 1 or feature != batch + 1:
            return spec
        lhs = list(self.lhs_shape)
        lhs[batch], lhs[feature] = lhs[batch] // groups, lhs[feature] * groups
        return replace(spec, lhs_shape=tuple(lhs), feature_group_count=groups, batch_group_count=1)

    def having(self, axes: Sequence[Axis]) -> ConvSpec:
        """The same geometry with the sizes, steps and padding of other spatial axes."""
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

    @cached_property
    def in_order(self) -> tuple[int, ...]:
        """Axes of ``in_shape`` in canonical order: spatial, then batch groups (if any), then channels."""
        batch, feature, *spatial = self.dimension_numbers.lhs_spec
        if self.batch_group_count > 1:
            return (*spatial, batch, feature)
        return tuple(i - (i > batch) for i in (*spatial, feature))

    @cached_property
    def out_order(self) -> tuple[int, ...]:
        """Axes of ``out_shape`` in canonical order: spatial, then channels."""
        batch, feature, *spatial = self.dimension_numbers.out_spec
        return tuple(i - (i > batch) for i in (*spatial, feature))

    @cached_property
    def kernel_order(self) -> tuple[int, ...]:
        """Axes of the kernel in canonical order: spatial, then input channels, then output channels."""
        feature, channel, *spatial = self.dimension_numbers.rhs_spec
        return (*spatial, channel, feature)

    @property
    def index_dtype(self) -> Any:
        """The narrowest integer dtype that holds every position; ValueError if JAX has none now."""
        return index_dtype(max(self.in_size, self.out_size, *(a.reach for a in self.axes), 0), self.shape)


@names_of_lax
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
    ``o*stride + p*rhs_dilation - lo == t*lhs_dilation`` (docs/maths.md, section 1).

    A window that does not fit into the padded input gives an output of size 0 and a matrix with no
    rows, as in lax.

    Args:
      lhs_shape: shape of the input, batch included, which may be symbolic.
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

    Returns:
      A :class:`ConvSpec`.

    Raises:
      TypeError: an argument is of the wrong kind, traced, or symbolic. All but the batch must be static.
      ValueError: an argument has a wrong value, such as a stride, dilation or pad beyond ``2**31 - 1``.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((8, 3, 32, 32), (16, 3, 3, 3), (2, 2), "SAME")
    >>> spec.padding, spec.in_shape, spec.out_shape, spec.shape, spec.nse
    (((0, 1), (0, 1)), (3, 32, 32), (16, 16, 16), (4096, 3072), 106032)
    """
    lhs = as_ints("lhs_shape", lhs_shape, least=0, symbolic=True)
    rhs = as_ints("rhs_shape", rhs_shape, least=0)
    check_ranks(lhs, rhs)
    dims = len(lhs) - 2
    numbers = resolve_layouts(dimension_numbers, len(lhs))
    groups = as_int("feature_group_count", feature_group_count, least=1)
    batch_groups = as_int("batch_group_count", batch_group_count, least=1)
    check_channels(lhs, rhs, numbers, groups, batch_groups)
    strides = as_ints("window_strides", window_strides, length=dims)
    lhs_dil = (1,) * dims if lhs_dilation is None else as_ints("lhs_dilation", lhs_dilation, length=dims)
    rhs_dil = (1,) * dims if rhs_dilation is None else as_ints("rhs_dilation", rhs_dilation, length=dims)
    mode = resolve_mode(padding_mode)
    unpadded = ((0, 0),) * dims
    spec = ConvSpec(lhs, rhs, strides, unpadded, lhs_dil, rhs_dil, numbers, groups, batch_groups, mode)
    spec = replace(spec, padding=resolve_padding(padding, spec.axes))
    for i, axis in enumerate(spec.axes):
        check_axis(i, axis, rhs)
    return spec


def check_spec(spec: Any) -> None:
    """TypeError if ``spec`` is not a ConvSpec."""
    if not isinstance(spec, ConvSpec):
        raise TypeError(
            f"spec must be a ConvSpec, got {type(spec).__name__}: make one with "
            "conv_spec(lhs_shape, rhs_shape, window_strides, padding), and pass it first."
        )


_Builder = TypeVar("_Builder", bound=Callable[..., Any])


def spec_first(builder: _Builder) -> _Builder:
    """``builder(spec, kernel)``, where ``builder(kernel)`` raises that ``spec`` is missing.

    Python takes the only argument for ``spec``, and would raise that ``kernel`` is missing.
    """

    @wraps(builder)
    def checked(*args: Any, **options: Any) -> Any:
        if len(args) == 1 and not options:
            check_spec(args[0])
        return builder(*args, **options)

    return checked  # type: ignore[return-value]


def as_operand(name: str, value: Any, spec: ConvSpec, shape: str) -> jax.Array:
    """``value`` as a jax.Array whose shape is ``getattr(spec, shape)``."""
    check_spec(spec)
    checked = isinstance(value, jax.Array) and value.dtype in DTYPES
    array, expected = value if checked else as_array(name, value), getattr(spec, shape)
    if array.shape != expected:
        transposed = _transposition(array.shape, spec) if shape == "rhs_shape" else ""
        advice = "Use jax.vmap for a stack, or make a spec for this shape."
        if transposed:
            advice = f"Transpose it: {name}{transposed}."
        raise ValueError(f"{name} must have the spec's shape {expected}, got {array.shape}. {advice}")
    return array


def _transposition(shape: tuple[int, ...], spec: ConvSpec) -> str:
    """``.transpose(2, 3, 1, 0)`` if that makes a kernel of this shape the spec's; empty if nothing does.

    A kernel with out channels first, as torch has it, is taken for one.
    """
    expected, rank = spec.rhs_shape, len(spec.rhs_shape)
    if len(shape) != rank or rank > 6:
        return ""
    torch = tuple(spec.dimension_numbers.rhs_spec.index(i) for i in range(rank))
    for order in (torch, *itertools.permutations(range(rank))):
        if tuple(shape[i] for i in order) == expected:
            return f".transpose{order}"
    return ""


def _one_example(shape: Sequence[int], batch: int, entries: int) -> tuple[int, ...]:
    kept = (entries,) if entries > 1 else ()
    return (*shape[:batch], *kept, *shape[batch + 1 :])

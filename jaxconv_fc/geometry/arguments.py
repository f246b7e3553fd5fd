"""What a user passed, checked and resolved: ints, layouts, padding, channels and arrays."""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.modes import MODES
from jaxconv_fc.sharding import is_traced

# What a user may pass as a kernel, an input or a matrix.
Array = jax.Array | np.ndarray

_MODE_OF_ALIAS = {alias: name for name, mode in MODES.items() for alias in mode.aliases}
_PADDINGS = ("VALID", "SAME", "SAME_LOWER")
_INT32 = 2**31 - 1
_MOST_COPIES = 2**24  # of inputs in the padding of one axis: counts list them


def _reject_traced(name: str, value: Any) -> None:
    if is_traced(value):
        raise TypeError(
            f"{name} must be static, got the traced value {value}. Sizes shape the program: close over "
            "it, or name it in static_argnames of jax.jit."
        )


def brief(value: Any) -> str:
    """A value for a message: its repr, or what stands for it where that is long."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and np.ndim(value):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]} ... ({type(value).__name__}, shortened)"


def as_int(name: str, value: Any, least: int | None = None) -> int:
    if type(value) is not int:
        _reject_traced(name, value)
        try:
            if isinstance(value, bool | np.bool_) or is_symbolic_dim(value):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            got = brief(value)
            raise TypeError(f"{name} must be an int, got {got}. Write a whole number such as 1.") from None
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return value


def as_ints(
    name: str, values: Any, *, length: int | None = None, least: int = 1, symbolic: bool = False
) -> tuple[int, ...]:
    """The values as ints. Those that are a symbolic size stay what they are if ``symbolic``."""
    array = isinstance(values, np.ndarray) and values.ndim > 1
    if array or isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        _reject_traced(name, values)
        hint = " Pass the array's .shape." if hasattr(values, "shape") else ""
        raise TypeError(f"{name} must be a sequence of ints such as (1, 1), got {brief(values)}.{hint}")
    kept = [symbolic and is_symbolic_dim(v) for v in values]
    numbers = tuple(v if kept[i] else as_int(f"{name}[{i}]", v, least=None) for i, v in enumerate(values))
    if length is not None and len(numbers) != length:
        raise ValueError(
            f"{name} must have {length} entries, one per spatial axis, got {len(numbers)}: {numbers}."
        )
    if any(v < least for v, any_size in zip(numbers, kept, strict=True) if not any_size):
        raise ValueError(f"{name} must be at least {least} in every entry, got {numbers}.")
    return numbers


def check_ranks(lhs: tuple[int, ...], rhs: tuple[int, ...]) -> None:
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


def resolve_layouts(numbers: Any, rank: int) -> lax.ConvDimensionNumbers:
    if numbers is None:
        plain = tuple(range(rank))
        return lax.ConvDimensionNumbers(plain, plain, plain)
    if isinstance(numbers, str) or not isinstance(numbers, tuple | list) or len(numbers) != 3:
        _reject_traced("dimension_numbers", numbers)
        raise (ValueError if isinstance(numbers, str | tuple | list) else TypeError)(
            "dimension_numbers must be None, lax.ConvDimensionNumbers or three layouts such as "
            f"('NHWC', 'HWIO', 'NHWC'), got {brief(numbers)}."
        )
    if all(isinstance(layout, str) for layout in numbers):
        return _resolve_letters(tuple(numbers), rank)
    specs = []
    for name, axes in zip(("lhs_spec", "rhs_spec", "out_spec"), numbers, strict=True):
        specs.append(as_ints(f"dimension_numbers.{name}", axes, least=0))
        if sorted(specs[-1]) != list(range(rank)):
            raise ValueError(
                f"dimension_numbers.{name} must be a permutation of 0..{rank - 1} for {rank}-dimensional "
                f"arrays, got {specs[-1]}."
            )
    return lax.ConvDimensionNumbers(*specs)


def _resolve_letters(layouts: tuple[str, str, str], rank: int) -> lax.ConvDimensionNumbers:
    """Spatial axes are matched by letter and ordered as in the kernel's layout, as lax does."""
    pairs = ("NC", "OI", "NC")
    for layout, pair, role in zip(layouts, pairs, ("lhs", "rhs", "out"), strict=True):
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
    specs = (tuple(map(v.index, (*pair, *spatial))) for v, pair in zip(layouts, pairs, strict=True))
    return lax.ConvDimensionNumbers(*specs)


def check_channels(
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    numbers: lax.ConvDimensionNumbers,
    groups: int,
    batch_groups: int,
) -> None:
    for i in numbers.lhs_spec[1:]:
        if is_symbolic_dim(lhs[i]):
            raise TypeError(
                f"lhs_shape[{i}] must be an int, got the symbolic size {lhs[i]}: it sets the shape of M. "
                "Only the batch may be symbolic. Export one program for each size."
            )
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


def resolve_mode(mode: Any) -> str:
    if not isinstance(mode, str):
        _reject_traced("padding_mode", mode)
        raise TypeError(f"padding_mode must be a string, one of {tuple(MODES)}, got {brief(mode)}.")
    name = _MODE_OF_ALIAS.get(mode.lower(), mode.lower())
    if name not in MODES:
        known = f"{tuple(MODES)} or {tuple(_MODE_OF_ALIAS)}"
        raise ValueError(f"padding_mode must be one of {known}, got {brief(mode)}.")
    return name


def resolve_padding(padding: Any, axes: Sequence[Axis]) -> tuple[tuple[int, int], ...]:
    """``((lo, hi), ...)`` for axes that are not padded yet."""
    if isinstance(padding, str):
        return _named_padding(padding, axes)
    example = f"Write [(lo, hi), ...], a pair per spatial axis, such as {[(1, 1)] * len(axes)}, or 'SAME'."
    if not isinstance(padding, Sequence | np.ndarray):
        _reject_traced("padding", padding)
        kind = ValueError if isinstance(padding, int | np.integer) else TypeError
        raise kind(f"padding must be a string or a list of pairs of ints, got {brief(padding)}. {example}")
    if len(padding) != len(axes):
        raise ValueError(
            f"padding must have {len(axes)} pairs, one per spatial axis, got {len(padding)}: "
            f"{brief(padding)}. {example}"
        )
    pads = []
    for i, pair in enumerate(padding):
        if isinstance(pair, str) or not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
            _reject_traced(f"padding[{i}]", pair)
            raise ValueError(f"padding[{i}] must be a pair (lo, hi), got {brief(pair)}. {example}")
        lo, hi = (as_int(f"padding[{i}][{j}]", v, least=None) for j, v in enumerate(pair))
        pads.append((lo, hi))
    return tuple(pads)


def _named_padding(padding: str, axes: Sequence[Axis]) -> tuple[tuple[int, int], ...]:
    name = padding.upper()
    full = [(a.dilated_taps - 1, a.dilated_taps - 1) for a in axes]
    # As flax pads in these modes, whatever the stride. SAME depends on it.
    centred = [((a.dilated_taps - 1) // 2, a.dilated_taps // 2) for a in axes]
    instead = {
        "FULL": f"padding={full}",
        "CAUSAL": f"padding={[(lo, 0) for lo, _ in full]}",
        **{name: f"padding={centred}, padding_mode={name.lower()!r}" for name in ("CIRCULAR", "REFLECT")},
    }
    if name in instead:
        raise ValueError(f"padding={brief(padding)} is not a name that lax knows: write {instead[name]}.")
    if name not in _PADDINGS:
        close = difflib.get_close_matches(name, _PADDINGS, n=1, cutoff=0.4)
        hint = f"Did you mean {close[0]!r}?" if close else "Or write [(lo, hi), ...]."
        got = brief(padding)
        raise ValueError(f"padding must be one of {_PADDINGS} or a list of pairs, got {got}. {hint}")
    if name == "VALID":
        return ((0, 0),) * len(axes)
    pads = []
    for axis in axes:
        if not axis.pads_with_zeros and axis.lhs_dilation > 1:
            raise ValueError(
                f"padding={brief(padding)} has no meaning with padding_mode={axis.mode!r} and "
                f"lhs_dilation={axis.lhs_dilation}, where the input is padded before it is dilated. "
                "Write [(lo, hi), ...]."
            )
        outputs = -(-axis.span // axis.stride)  # SAME: as many as there are strides on the dilated axis
        total = max(0, (outputs - 1) * axis.stride + axis.dilated_taps - axis.span)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if name == "SAME" else (large, small))
    return tuple(pads)


def check_axis(i: int, axis: Axis, rhs: tuple[int, ...]) -> None:
    """ValueError if spatial axis ``i`` has no taps, too large steps, or a padding without meaning."""
    pads = (axis.lo, axis.hi)
    if axis.taps == 0:
        raise ValueError(f"rhs_shape {rhs} must have at least 1 tap on spatial axis {i}, got 0.")
    check_steps(i, axis)
    if axis.pads_with_zeros:
        if axis.span < 0:
            raise ValueError(
                f"padding[{i}]={pads} crops more than the {axis.dilated_size} positions of the (dilated) "
                f"spatial axis {i}. Crop at most {axis.dilated_size} in total."
            )
        return
    if min(pads) < 0:
        raise ValueError(
            f"padding[{i}]={pads} is negative, which has no meaning with padding_mode={axis.mode!r}. "
            "Slice the input instead, or use padding_mode='zeros'."
        )
    if sum(pads) > _MOST_COPIES:
        raise ValueError(
            f"padding[{i}]={pads} with padding_mode={axis.mode!r} must make at most {_MOST_COPIES} copies, "
            f"got {sum(pads)}. Use smaller pads, or padding_mode='zeros'."
        )
    if axis.size == 0 and max(pads) > 0:
        raise ValueError(
            f"padding[{i}]={pads} with padding_mode={axis.mode!r} has nothing to copy from: spatial axis "
            f"{i} is empty. Use padding_mode='zeros'."
        )


def check_steps(i: int, axis: Axis) -> None:
    """ValueError if int32 does not hold the steps and pads of spatial axis ``i``, or int64 its counts."""
    names = "window_strides", "lhs_dilation", "rhs_dilation", "padding", "padding"
    steps = axis.stride, axis.lhs_dilation, axis.rhs_dilation, axis.lo, axis.hi
    for name, step in zip(names, steps, strict=True):
        if abs(step) > _INT32:
            limit = f"at most 2**31 - 1 = {_INT32}"
            raise ValueError(f"{name}[{i}] must be {limit}, got {step}. Use a smaller one.")
    if axis.reach * axis.taps > 2**62:
        raise ValueError(
            f"spatial axis {i} must have at most 2**62 pairs of a position and a tap, got {axis.reach:,} "
            f"positions and {axis.taps:,} taps. Use smaller sizes, steps or pads."
        )


# What arrays may hold. float8_e8m0fnu has no zero. In float4 and float6, which have neither Inf nor NaN, a
# sum that is too large is a number. JAX has no products of int2.
_FLOAT8 = "e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"
DTYPES = frozenset(
    jnp.dtype(name)
    for name in (*"?bhilqBHILQefdFD", "int4", "uint4", "bfloat16", *(f"float8_{kind}" for kind in _FLOAT8))
)


# -- operands ----------------------------------------------------------------------------------


def as_array(name: str, value: Any) -> jax.Array:
    """``value`` as a jax.Array. TypeError if it is not an array: to convert a list would hide a copy."""
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{name} must be an array, got {value}, which has no entries. Use jax.eval_shape to trace a "
            "function with shapes alone."
        )
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(
            f"{name} must be a jax or NumPy array, got {type(value).__name__}: {brief(value)}. "
            "Write jnp.asarray(...)."
        )
    value = native(value)
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must hold numbers, got dtype {value.dtype}, which has no sums or products here. "
            f"Cast it: {name}.astype(jnp.float32)."
        )
    return jnp.asarray(value)


def native(value: Any) -> Any:
    """The same numbers in the byte order of this machine, for NumPy arrays that have the other one."""
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value


def check_same_dtype(a_name: str, a: Any, b_name: str, b: Any) -> None:
    if a.dtype != b.dtype:
        raise TypeError(
            f"{a_name} is {a.dtype} and {b_name} {b.dtype}: cast one, e.g. {b_name}.astype({a_name}.dtype)."
        )


def check_summable(a_name: str, a: jax.Array, b_name: str, b: jax.Array) -> None:
    """TypeError unless the products of two operands can be added: they have one dtype, and not bool."""
    check_same_dtype(a_name, a, b_name, b)
    if a.dtype == jnp.bool_:
        raise TypeError(
            f"{a_name} and {b_name} are bool, which have no sums: cast both with .astype(jnp.int32)."
        )


# What other libraries call the arguments of lax.conv_general_dilated.
_OTHER_NAMES = {
    "stride": "window_strides", "strides": "window_strides", "pad": "padding", "pads": "padding",
    "dilation": "rhs_dilation", "dilations": "rhs_dilation", "kernel_dilation": "rhs_dilation",
    "input_dilation": "lhs_dilation", "groups": "feature_group_count", "mode": "padding_mode",
    "layout": "dimension_numbers", "input_shape": "lhs_shape", "kernel_shape": "rhs_shape",
}  # fmt: skip
_P = ParamSpec("_P")
_R = TypeVar("_R")


def names_of_lax(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """``fn``, with a TypeError that says how lax calls an argument passed by another library's name."""

    @functools.wraps(fn)
    def named(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name in _OTHER_NAMES:
                raise TypeError(f"{name}= is called {_OTHER_NAMES[name]}= here, and in the arguments of lax.")
        return fn(*args, **kwargs)

    return named

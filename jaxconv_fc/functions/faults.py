"""Where lax is known to go wrong, by geometry, dtype and platform, as docs/where-jax-is-wrong.md has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxconv_fc.geometry.spec import ConvSpec

WRONG, ABORTS, REFUSED = "wrong values", "ends the process", "refused"


def lax_fault(spec: ConvSpec, dtype: Any, platform: str) -> str:
    """The known fault of lax in this convolution on a platform, in words; empty if there is none."""
    found = (words for condition, words in _FAULTS.get(platform, ()) if condition(spec, np.dtype(dtype)))
    return next(found, "")


def _reads_outside(spec: ConvSpec, dtype: Any) -> bool:
    """Eigen takes a convolution for one without padding if no axis is padded in front, and if the last window
    of no axis would end behind the input, had nothing been cropped. Then the high padding is read as well."""
    if dtype not in (jnp.float32, jnp.float16, jnp.bfloat16, jnp.complex64) or len(spec.axes) > 2:
        return False
    if any(a.lhs_dilation > 1 or a.rhs_dilation > 1 for a in spec.axes) or not spec.out_size:
        return False
    last = [(a.out_size - 1) * a.stride + a.taps - 1 for a in spec.axes]  # positions of the padded input
    taken = all(a.lo <= 0 and end < a.size for a, end in zip(spec.axes, last, strict=True))
    return taken and any(end - a.lo >= a.size for a, end in zip(spec.axes, last, strict=True))


def _cannot_be_swapped(spec: ConvSpec, dtype: Any) -> bool:
    """Where the kernel has more taps than the input has positions, XLA exchanges the two. It leaves out axes
    whose lhs_dilation is the number of taps, at one step less, but their sizes have changed places too."""
    taps, positions, left_out = [1], [1], False
    for a in spec.axes:
        plain = a.lo == a.hi == 0 and a.rhs_dilation == 1
        repeats = plain and a.lhs_dilation == a.taps == a.stride + 1
        contracts = plain and a.lhs_dilation == a.stride == 1 and a.taps == a.size
        if repeats or contracts:
            left_out |= a.taps != a.size
            continue
        spread = a.size == a.stride == a.rhs_dilation == 1 and a.lo == a.hi == a.taps - 1
        taps.append(a.taps)
        positions.append(a.taps if spread else a.size)
    return spec.feature_group_count == 1 and left_out and math.prod(taps) > math.prod(positions)


def _has_four_axes(spec: ConvSpec, dtype: Any) -> bool:
    return len(spec.axes) > 3


def _is_of_integers(spec: ConvSpec, dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)


_FAULTS: dict[str, list[tuple[Callable[[ConvSpec, Any], bool], str]]] = {
    "cpu": [(_cannot_be_swapped, ABORTS), (_reads_outside, WRONG)],
    "gpu": [(_cannot_be_swapped, ABORTS), (_is_of_integers, REFUSED), (_has_four_axes, ABORTS)],
}

"""A convolution that a function performs, and the table that a list of them prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxconv_fc.geometry.memory import readable
from jaxconv_fc.geometry.spec import ConvSpec
from jaxconv_fc.show.html import table

_WORDS = 1, 2, 3, 11  # columns of the table that hold words, aligned to the left; the others hold numbers


class Origin(NamedTuple):
    """Where a site was found: the jaxpr that :func:`find_convs` traced, and the place in its list."""

    jaxpr: Any
    number: int
    among: int


@dataclass(frozen=True, eq=False)
class ConvSite:
    """One convolution that a function performs: ``y = M x`` with the M of ``spec`` and ``kernel``.

    Of ``kernel``, ``x`` and ``y`` the two that the product takes are given, the third, its result, is
    None. A convolution of lax is always ``"M x"``; the products of this library can also be ``"M^T y"``
    (:func:`apply_transpose`) and ``"X^T y"`` (the gradient with respect to the kernel).

    Attributes:
      spec: the geometry. That of a convolution of lax has the shape of x as its ``lhs_shape``.
      kernel, x, y: arrays where the value is known, ``jax.ShapeDtypeStruct`` where only its shape is.
      name: the name stack (flax.linen and haiku put their module names there), with the path of the module
        that holds the kernel (flax.nnx, equinox, nested dictionaries), else the line of the source.
      times: how often it is executed, the lengths of the scans around it multiplied; None in a while
        loop, where only the run can tell.
      product: ``"M x"``, ``"M^T y"`` or ``"X^T y"``.
      bias: what is added to ``M x``, of shape ``(out channels,)``: an argument of the function or a constant
        that is broadcast from the channels, known or not as kernels are. None where there is none, where it
        also varies over positions or examples, and where it is computed from arguments other than by casts
        and moves of entries.
      in_front: the padding in front that is not in M, in words; empty if M is that of the whole layer.
      examples: how many examples it multiplies by M at once.
      lax_fault: what is known to happen where lax performs this convolution on this platform: ``"wrong
        values"``, ``"ends the process"`` or ``"refused"`` (docs/where-jax-is-wrong.md). Empty if nothing is
        known, and for a product of this library.
      origin: where it stands in what :func:`find_convs` has traced. :func:`neurons.receptive_field` takes a
        list of sites as a chain, and finds by it what stands between them.

    >>> import jax, jax.numpy as jnp, jaxconv_fc as fc
    >>> layer = lambda x: jax.lax.conv(x, jnp.ones((4, 3, 3, 3)), (1, 1), "VALID")
    >>> site = fc.find_convs(layer, jnp.ones((2, 3, 8, 8)))[0]
    >>> site.spec.shape, site.kernel.shape, site.x.shape, site.times, site.product
    ((144, 192), (4, 3, 3, 3), (2, 3, 8, 8), 1, 'M x')
    """

    spec: ConvSpec
    kernel: Any
    x: Any
    name: str
    times: int | None = 1
    product: str = "M x"
    y: Any = None
    bias: Any = None
    in_front: str = ""
    examples: Any = 1
    lax_fault: str = ""
    origin: Origin | None = None

    @property
    def multiply_adds(self) -> Any:
        """``spec.nse * examples``: one for each stored entry of M and each example, whatever the product.

        Padding is not counted, so it is exact at borders. One execution; see ``times``.
        """
        return self.spec.nse * self.examples

    @property
    def dtype(self) -> Any:
        """The dtype of M."""
        return np.dtype((self.x if self.kernel is None else self.kernel).dtype)

    def __repr__(self) -> str:
        return repr(ConvSites([self]))

    def _repr_html_(self) -> str:
        return ConvSites([self])._repr_html_()


class ConvSites(list[ConvSite]):
    """A list of :class:`ConvSite`, printed as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no convolutions"
        columns = []
        for i, column in enumerate(zip(*self._cells(), strict=True)):
            align = str.ljust if i in _WORDS else str.rjust
            columns.append([align(cell, max(map(len, column))) for cell in column])
        return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))

    def _repr_html_(self) -> str:
        return table(self._cells(), _WORDS) if self else repr(self)

    def _cells(self) -> list[tuple[str, ...]]:
        """The table: a head, a row per convolution, and the totals if there are several."""
        head = ("", "layer", "layout", "geometry", "M", "stored", "density", "dense", "sparse", "times",
                "mult-adds", "lax")  # fmt: skip
        rows = [head, *(_row(i, site) for i, site in enumerate(self))]
        if len(self) > 1:
            sizes = [_bytes_of(site) for site in self]
            stored = f"{sum(site.spec.nse for site in self):,}"
            totals = [readable(sum(column)) for column in zip(*sizes, strict=True)]
            work = [site.times * site.multiply_adds for site in self if site.times is not None]
            executed = _number(sum(work)) if len(work) == len(self) else "?"
            rows.append(("", "total", "", "", "", stored, "", *totals, "", executed, ""))
        return rows if any(site.lax_fault for site in self) else [row[:-1] for row in rows]


def _row(index: int, site: ConvSite) -> tuple[str, ...]:
    spec = site.spec
    density = spec.nse / max(1, spec.out_size * spec.in_size)
    dense, sparse = map(readable, _bytes_of(site))
    shape = _by(spec.shape) + {"M x": "", "M^T y": " ^T", "X^T y": " (X)"}[site.product]
    times = "?" if site.times is None else f"{site.times:,}"
    stored = f"{spec.nse:,}"
    missing = f", NOT IN M: {site.in_front}" if site.in_front else ""
    words = str(index), site.name, _layout(spec), _geometry(spec) + missing
    work = _number(site.multiply_adds)
    return *words, shape, stored, f"{density:.2%}", dense, sparse, times, work, site.lax_fault


def _number(count: Any) -> str:
    return f"{count:,}" if isinstance(count, int) else str(count)  # of a symbolic batch it is symbolic


def _layout(spec: ConvSpec) -> str:
    """``NHWC HWIO``, and the layout of the output where it is another than that of the input."""
    numbers = spec.dimension_numbers
    spatial = {1: "W", 2: "HW", 3: "DHW"}.get(len(spec.axes), "0123456789"[: len(spec.axes)])
    layouts = []
    for order, channels in zip(numbers, ("NC", "OI", "NC"), strict=True):
        letters = dict(zip(order, channels + spatial, strict=True))
        layouts.append("".join(letters[i] for i in range(len(order))))
    return " ".join(layouts[:2] if layouts[0] == layouts[2] else layouts)


def _geometry(spec: ConvSpec) -> str:
    """The kind of convolution in one line: only the options that are not the default."""
    words = [f"{_by(spec.in_shape)} -> {_by(spec.out_shape)}", f"kernel {_by(spec.rhs_shape)}"]
    for word, steps in (
        ("stride", spec.window_strides),
        ("lhs dilation", spec.lhs_dilation),
        ("dilation", spec.rhs_dilation),
    ):
        if any(s != 1 for s in steps):
            words.append(f"{word} {_by(steps)}")
    if any(lo or hi for lo, hi in spec.padding):
        mode = "pad" if spec.pads_with_zeros else spec.padding_mode
        words.append(f"{mode} " + " ".join(f"({lo},{hi})" for lo, hi in spec.padding))
    for word, count in (("groups", spec.feature_group_count), ("batch groups", spec.batch_group_count)):
        if count != 1:
            words.append(f"{count} {word}")
    return ", ".join(words)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _bytes_of(site: ConvSite) -> tuple[int, int]:
    """Bytes of M dense, and as BCSR."""
    sizes = site.spec.nbytes(site.dtype)
    return sizes.dense, sizes.bcsr

"""A picture of M, drawn from the relation of its rows and columns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.entries import stored_entries
from jaxconv_fc.geometry.spec import ConvSpec, as_operand, check_spec
from jaxconv_fc.show.canvas import (
    BLOCK_LINE,
    BORDER,
    cell_pixels,
    density_colours,
    density_norm,
    entry_colours,
    entry_norm,
    new_axes,
    text_colour,
    text_sizes,
    value_colours,
    value_norm,
)
from jaxconv_fc.show.counts import stored_counts
from jaxconv_fc.show.text import blocks, entries_of_row, entry_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_CELLS = 1000  # of a picture, along each side
_MOST_NAMED = 1000  # entries that are written into their cells
_LINE_DISTANCE, _BORDER_DISTANCE = 5, 10  # pixels between lines that are drawn
_SATURATED = 0.98  # a part of the means that the colours tell apart: few of them are large
_SAMPLE = 2**22  # entries that a picture of values looks at
_MOST_LISTED = (
    2**24
)  # and no more than so many, with one row per row of cells: fewer cells where rows are longer


def spy(spec: ConvSpec, kernel: Array | None = None, ax: Axes | None = None) -> Axes:
    """A picture of M, with ``M[row, column]`` at (column, row), as in :func:`format_matrix`.

    An entry is drawn in the colour of the kernel entry that stands there, or of its value when a
    kernel is given, and named where the cell is large enough. Entries that are not stored are white. Black is
    an entry where several kernel entries meet (boundary modes), or a value that is not finite. Lines stand
    between the rows of an image and, thicker, between channels.

    If M has more rows or columns than the picture has cells (1,000 at most, fewer on small axes), a cell
    stands for a block of M. It shows the fraction of the block that is stored, counted exactly. With a kernel
    it shows the mean of the stored entries; if there are more than 4 million, that of a sample of the rows.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``. Of complex entries the absolute value is shown.
      ax: matplotlib axes to draw on. By default a new figure is made.

    Returns:
      The axes. Their data coordinates are (column, row).

    Raises:
      ImportError: matplotlib is missing (``pip install 'jaxconv_fc[examples]'``).
      TypeError, ValueError: the kernel is not an array of shape ``spec.rhs_shape``.

    The cost depends on the size of the picture and on the axes, not on the size of M.

    >>> import jaxconv_fc as fc
    >>> ax = fc.show.spy(fc.conv_spec((1, 1, 3, 3), (2, 1, 2, 2), (1, 1), "VALID"))
    >>> [text.get_text() for text in ax.texts][:4]
    ['a', 'b', 'c', 'd']
    """
    check_spec(spec)
    values = None if kernel is None else np.asarray(as_operand("kernel", kernel, spec, "rhs_shape"))
    rows, columns = spec.shape
    ax = new_axes("show.spy", *_figure_size(spec)) if ax is None else ax
    if spec.nse:
        cells = _cells(spec, values, *_resolution(ax))
        image = _draw(ax, spec, cells)
        named = _write_entries(ax, spec, values, image)
        if cells.label and not (named and values is None):
            ax.figure.colorbar(image, cax=ax.inset_axes((1.03, 0, 0.04, 1)), label=cells.label)
    ax.set(xlim=(-0.5, max(1, columns) - 0.5), ylim=(max(1, rows) - 0.5, -0.5))
    ax.locator_params(integer=True)
    ax.set(xlabel=f"inputs, in_shape {spec.in_shape}", ylabel=f"outputs, out_shape {spec.out_shape}")
    _draw_lines(ax, spec)
    return ax


def _figure_size(spec: ConvSpec) -> tuple[float, float]:
    """Inches: 0.45 per entry, within sensible bounds, and room for labels."""
    if not _has_square_entries(spec):
        return 6.5, 6.0
    rows, columns = (max(1, n) for n in spec.shape)
    inch = min(0.45, 8 / max(rows, columns))
    return max(3.0, columns * inch) + 1, max(2.5, rows * inch) + 0.8


def _has_square_entries(spec: ConvSpec) -> bool:
    return max(spec.shape) <= 4 * min(spec.shape)


def _resolution(ax: Axes) -> tuple[int, int]:
    """``(rows, columns)``: the most cells that a picture on these axes has, one per pixel."""
    box = ax.get_window_extent()
    return tuple(int(np.clip(n, 100, _MOST_CELLS)) for n in (box.height, box.width))  # type: ignore


# -- cells: blocks of M that are drawn in one colour ----------------------------------------------


class _Cells(NamedTuple):
    """What a picture shows."""

    values: np.ndarray  # (cell rows, cell columns): a number that has a colour; NaN where nothing is stored
    colours: Any
    norm: Any
    label: str  # of the colour bar


def _cells(spec: ConvSpec, kernel: np.ndarray | None, most_rows: int, most_columns: int) -> _Cells:
    rows, columns = min(spec.out_size, most_rows), min(spec.in_size, most_columns)
    if kernel is not None:
        rows = min(rows, max(1, _MOST_LISTED // _per_row(spec)))
        values, exact = _means(spec, kernel, rows, columns), (rows, columns) == spec.shape
        norm = value_norm(values, 1 if exact else _SATURATED)
        return _Cells(values, value_colours(), norm, "entry" if exact else "mean of the stored entries")
    if (rows, columns) != spec.shape:
        counts = stored_counts(spec, _edges(spec.out_size, rows), _edges(spec.in_size, columns))
        areas = np.diff(_edges(spec.out_size, rows))[:, None] * np.diff(_edges(spec.in_size, columns))
        values = np.where(counts > 0, counts / areas, np.nan)
        return _Cells(values, density_colours(), density_norm(values), "fraction of entries that are stored")
    count = math.prod(spec.rhs_shape)
    return _Cells(_taps(spec), entry_colours(count), entry_norm(count), "place in kernel.ravel()")


def _edges(size: int, cells: int) -> np.ndarray:
    """The bounds of so many blocks of almost equal size."""
    return np.arange(cells + 1) * size // cells


def _taps(spec: ConvSpec) -> np.ndarray:
    """Of each entry of M the place of its kernel entry in the ravel; inf where several meet."""
    taps = np.full(spec.shape, np.nan)
    for rows, columns, tap in stored_entries(spec, np.arange(spec.out_size)):
        places, first, times = np.unique(rows * spec.in_size + columns, return_index=True, return_counts=True)
        taps.ravel()[places] = np.where(times > 1, np.inf, tap[first])
    return taps


def _means(spec: ConvSpec, kernel: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The mean of the entries that are stored in each cell, or of those in a sample of its rows."""
    sums, counts = np.zeros(rows * columns), np.zeros(rows * columns)
    sampled = _sampled_rows(spec, rows)
    flat = kernel.ravel()
    for i, column, tap in stored_entries(spec, sampled):
        places, which = np.unique(i * spec.in_size + column, return_inverse=True)
        entries = np.zeros(len(places), flat.dtype)
        np.add.at(entries, which, flat[tap])  # taps that meet are added in their own dtype, as in M
        shown = np.abs(entries) if np.iscomplexobj(entries) else entries.astype(float)
        shown = np.where(np.isfinite(shown), shown, np.inf)  # NaN stands for "not stored"
        i, column = sampled[places // spec.in_size], places % spec.in_size
        cell = _cell_of(i, spec.out_size, rows) * columns + _cell_of(column, spec.in_size, columns)
        sums += np.bincount(cell, shown, minlength=rows * columns)
        counts += np.bincount(cell, minlength=rows * columns)
    with np.errstate(invalid="ignore"):
        return (sums / counts).reshape(rows, columns)


def _sampled_rows(spec: ConvSpec, cell_rows: int) -> np.ndarray:
    """All rows, or as many as a picture may look at: one at random in each of equal parts of M."""
    parts = cell_rows * max(1, _SAMPLE // (_per_row(spec) * cell_rows))
    if parts >= spec.out_size:
        return np.arange(spec.out_size)
    starts = _edges(spec.out_size, parts)
    return starts[:-1] + (np.random.default_rng(0).random(parts) * np.diff(starts)).astype(int)


def _per_row(spec: ConvSpec) -> int:
    """How many kernel entries a row reads at most."""
    return max(1, math.prod(spec.rhs_shape) // max(1, spec.out_channels))


def _cell_of(places: np.ndarray, size: int, cells: int) -> np.ndarray:
    """The cell that each place lies in: the inverse of :func:`_edges`."""
    return ((places + 1) * cells - 1) // size


# -- drawing ----------------------------------------------------------------------------------------


def _draw(ax: Axes, spec: ConvSpec, cells: _Cells) -> Any:
    rows, columns = spec.shape
    values = np.where(np.isinf(cells.values), 2 * abs(cells.norm.vmax) + 1, cells.values)  # imshow hides inf
    return ax.imshow(
        np.ma.masked_invalid(values),
        cells.colours,
        cells.norm,
        aspect="equal" if _has_square_entries(spec) else "auto",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        interpolation="antialiased",
        interpolation_stage="rgba",
    )


def _write_entries(ax: Axes, spec: ConvSpec, kernel: np.ndarray | None, image: Any) -> bool:
    """Write each stored entry into its cell. False if the cells are too many or too small for some."""
    rows, columns = spec.shape
    if spec.nse > _MOST_NAMED or image.get_array().shape != spec.shape:
        return False
    text = entry_text(spec, kernel)
    entries = {
        (row, column): text(taps)
        for row in range(rows)
        for column, taps in entries_of_row(spec, row, range(columns)).items()
        if taps
    }
    sizes = text_sizes(ax, cell_pixels(ax, columns, rows), [*entries.values()])
    for ((row, column), entry), size in zip(entries.items(), sizes, strict=True):
        if size:
            colour = text_colour(image.cmap(image.norm(image.get_array()[row, column])))
            ax.text(column, row, entry, ha="center", va="center", fontsize=size, color=colour)
    return all(sizes)


def _draw_lines(ax: Axes, spec: ConvSpec) -> None:
    """The delimiters of the text view, between columns and between rows; also the borders of large cells."""
    across, down = cell_pixels(ax, spec.in_size, spec.out_size)
    for draw, shape, pixels, span in (
        (ax.vlines, spec.in_shape, across, spec.out_size),
        (ax.hlines, spec.out_shape, down, spec.in_size),
    ):
        for level, block in enumerate([1, *blocks(shape)]):
            distance = block * pixels
            if distance >= (_LINE_DISTANCE if level else _BORDER_DISTANCE):
                at = np.arange(block, math.prod(shape), max(1, block)) - 0.5
                width = min(0.5 + 0.6 * level, distance / 40)
                draw(at, -0.5, span - 0.5, BLOCK_LINE if level else BORDER, linewidth=width)

"""What the pictures share: matplotlib, its axes, colours of kernel entries, and text that fits its cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BORDER, BLOCK_LINE = "0.75", "0.2"  # of a cell, and between blocks of cells
_SMALLEST, _LARGEST = 5, 14  # points of text in a cell


def pyplot(needed_by: str) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(f"{needed_by} needs matplotlib: pip install 'jaxconv_fc[examples]'.") from error
    return plt


def new_axes(needed_by: str, width: float, height: float) -> Axes:
    """Axes of this size in inches, in a figure of their own."""
    return pyplot(needed_by).subplots(figsize=(width, height), layout="constrained")[1]


def entry_colours(count: int) -> Any:
    """A map from the flat index of a kernel entry to its colour; black where several entries meet.

    Viridis without its palest end: its order shows without colours too, and to the colour-blind.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.93, max(2, min(count, 256)))))
    return colours.with_extremes(over="black", bad=(1, 1, 1, 0))


def entry_norm(count: int) -> Any:
    """The scale that belongs to :func:`entry_colours`."""
    from matplotlib.colors import Normalize

    return Normalize(-0.5, max(2, count) - 0.5)


def value_colours() -> Any:
    """A map for values around 0: red below, blue above; black where a value is not finite."""
    from matplotlib import colormaps

    return colormaps["RdBu"].with_extremes(over="black", bad=(1, 1, 1, 0))


def value_norm(values: np.ndarray, part: float = 1) -> Any:
    """The scale that belongs to :func:`value_colours`: symmetric, so that 0 is white.

    It ends at the largest value, or at the one that this part of the values stays below.
    """
    from matplotlib.colors import Normalize

    finite = np.abs(values[np.isfinite(values)])
    most = (np.quantile(finite, part) if finite.size else 0) or 1
    return Normalize(-most, most)


def density_colours() -> Any:
    """A map for fractions above 0: the larger, the darker."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis_r"](np.linspace(0.2, 1, 256))).with_extremes(bad=(1, 1, 1, 0))


def density_norm(fractions: np.ndarray) -> Any:
    """The scale that belongs to :func:`density_colours`: from 0 to the largest."""
    from matplotlib.colors import Normalize

    return Normalize(0, np.nanmax(fractions))


def text_colour(background: Any) -> str:
    """Black on a light colour, white on a dark one."""
    red, green, blue = background[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def cell_pixels(ax: Axes, across: float, down: float) -> tuple[float, float]:
    """Width and height of a cell of axes that are divided into so many."""
    box = ax.get_window_extent()
    width, height = box.width / max(1, across), box.height / max(1, down)
    if ax.get_aspect() != "auto":
        width = height = min(width, height)
    return width, height


def text_sizes(ax: Axes, cell: tuple[float, float], texts: Sequence[str]) -> list[float]:
    """Points of each text in a cell of this size in pixels; 0 where it is empty or would be unreadable.

    All are equal, save that sums of names, which are longer, may be smaller.
    """
    fitting = [_text_size(ax, cell, text) if text else 0.0 for text in texts]
    plain = [size for size, text in zip(fitting, texts, strict=True) if text and "+" not in text]
    sizes = [min(size, *plain) for size in fitting] if plain else fitting
    return [size if size >= _SMALLEST else 0 for size in sizes]


def _text_size(ax: Axes, cell: tuple[float, float], text: str) -> float:
    """The most points that fit: a letter is about 0.6 as wide as high, and a line 1.2 times as high."""
    width, height = (72 / ax.figure.dpi * pixels for pixels in cell)
    lines = text.split("\n")
    return min(_LARGEST, 0.75 * height / (1.2 * len(lines)), 0.85 * width / (0.6 * max(map(len, lines))))

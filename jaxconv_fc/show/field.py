"""Pictures of a window on the input: what one neuron reads, and how the window slides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxconv_fc import neurons
from jaxconv_fc.functions.sites import ConvSite
from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.axis import Axis
from jaxconv_fc.geometry.layout import column_of, in_channel, out_first, split_row, tap_of
from jaxconv_fc.geometry.spec import ConvSpec, as_operand, check_spec
from jaxconv_fc.show.canvas import (
    BORDER,
    cell_pixels,
    density_colours,
    entry_colours,
    entry_norm,
    new_axes,
    pyplot,
    text_colour,
    text_sizes,
    value_colours,
    value_norm,
)
from jaxconv_fc.show.matrix import spy
from jaxconv_fc.show.text import entries_of_row, entry_text

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.axes import Axes

_WHOLE = 24  # positions of an axis that are all drawn; of longer axes those about the window are
_MARGIN, _MOST_POSITIONS = 4, 64
_MOST_CHANNELS, _MOST_SLICES = 8, 6
_GAP = 1.6  # cells between two panels
_TITLE = 20  # pixels that the title of a panel takes up
_MOST_COLOURS = 256  # that can be told apart
_MOST_FRAMES = 100
_MOST_STAGES, _BETWEEN = 8, 0.35  # images of a chain; the room between two, in heights
_HIGHLIGHT = "#d55e00"  # vermilion, told apart from the other colours by everybody


class _Line(NamedTuple):
    """One spatial axis as it is drawn: dilated positions u, of which ``t*lhs_dilation`` is input t."""

    shown: range  # the positions that are drawn
    inputs: dict[int, int]  # {u: t}, of those shown
    window: dict[int, int]  # {u: p}: the position that each tap reads
    sources: dict[int, int]  # {u: t}: the input that is read there, itself or as a copy; none if it is a 0


def _line(axis: Axis, o: int) -> _Line:
    step, size = axis.lhs_dilation, axis.dilated_size
    first = o * axis.stride - axis.shift
    window = {first + p * axis.rhs_dilation: p for p in range(axis.taps)}
    start, stop = min(0, -axis.shift), max(size, axis.span - axis.shift)
    if stop - start > _WHOLE:
        start = max(start, first - _MARGIN)
        stop = min(stop, first + axis.dilated_taps + _MARGIN, start + _MOST_POSITIONS)
    shown = range(start, stop)
    inputs = {u: u // step for u in shown if u % step == 0 and 0 <= u < size}
    table = axis.table(np.array([o]))[0].tolist()
    return _Line(shown, inputs, window, {u: table[p] for u, p in window.items() if table[p] >= 0})


def receptive_field(
    spec: neurons.Chain | neurons.Sites,
    out_index: neurons.Index,
    ax: Axes | None = None,
    *,
    kernel: Array | None = None,
) -> Axes:
    """A picture of the inputs that an output reads, with ``M[row, column]`` written at each of them.

    Squares are inputs, a panel per channel. Coloured ones are read: together they are the row of M, with the
    names and colours of :func:`spy`. Dashed squares are what the window covers beside the inputs: padding,
    and the zeros that ``lhs_dilation`` puts between inputs. In a boundary mode a dashed square also names the
    position that it is a copy of. The entry of that input then holds the names of all taps that read it.

    The last two spatial axes are drawn as images, one axis as a strip. With more than two, there is a row of
    panels per slice that the window covers. Of many channels or slices the first are drawn, of a large image
    the part around the window.

    Of a chain of layers, an image per layer shows what the output reads of its input: from the input of the
    first layer on the left to the output on the right. The darker, the larger the part of the channels (and
    slices) that is read.

    Args:
      spec: the geometry, or a chain: what :func:`neurons.receptive_field` takes.
      out_index: an index in ``spec.out_shape`` (of the last spec), or a row number. Negative numbers count
        from the end.
      ax: matplotlib axes to draw on. By default a new figure is made.
      kernel: array of shape ``spec.rhs_shape``, to write values in place of names. Not of a chain.

    Returns:
      The axes.

    Raises:
      ImportError: matplotlib is missing (``pip install 'jaxconv_fc[examples]'``).
      TypeError, ValueError, IndexError: as :func:`neurons.receptive_field`.
      TypeError, ValueError: the kernel is not an array of shape ``spec.rhs_shape``, or there is a chain.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 4), (1, 1, 3), (1,), "SAME", padding_mode="circular")
    >>> ax = fc.show.receptive_field(spec, (0, 0))
    >>> [text.get_text() for text in ax.texts]
    ['a\\n= 3', 'b', 'c', 'a']
    """
    if isinstance(spec, Sequence | ConvSite):
        return _draw_chain(spec, out_index, ax, kernel)
    check_spec(spec)
    values = None if kernel is None else np.asarray(as_operand("kernel", kernel, spec, "rhs_shape"))
    scene = _scene(spec, neurons.row(spec, out_index))
    if ax is None:
        inch = min(0.6, 9 / max(scene.across, scene.down))
        ax = new_axes("show.receptive_field", max(2.5, scene.across * inch) + 0.8, scene.down * inch + 0.8)
    ax.set(aspect="equal", frame_on=False)
    pixels, _ = cell_pixels(ax, scene.across, scene.down)
    room = 0.6 + any(panel.title for panel in scene.panels) * _TITLE / pixels
    ax.set(xlim=(-0.6, scene.across - 0.4), ylim=(scene.down - 0.4, -room))
    _draw_cells(ax, scene, values, pixels)
    _draw_labels(ax, scene, pixels)
    return ax


# -- what is drawn ----------------------------------------------------------------------------------


class _Panel(NamedTuple):
    """An image of one channel, and of one slice if there are more than two spatial axes."""

    left: float
    top: float
    title: str
    slice: tuple[int, ...]  # positions on the axes before the last two
    channel: int  # among all input channels


class _Cell(NamedTuple):
    """One square of a panel."""

    x: float
    y: float
    taps: Sequence[int]  # flat indices of the kernel entries that are written there
    is_input: bool  # else a zero or a copy that stands beside or between the inputs
    source: Sequence[Any] = ()  # of a copy: the spatial position of the input


class _Scene(NamedTuple):
    """All that a picture of one neuron shows."""

    spec: ConvSpec
    row: int
    channels: range  # those that the neuron reads
    lines: Sequence[_Line]  # one per spatial axis; before a strip, another of one position
    panels: Sequence[_Panel]
    across: float  # cells
    down: float


def _scene(spec: ConvSpec, row: int) -> _Scene:
    positions, d = split_row(spec, row)
    missing = max(0, 2 - len(spec.axes))
    lines = [*map(_line, [Axis(1, 1)] * missing, [0] * missing), *map(_line, spec.axes, positions)]
    first = in_channel(spec, d, 0)
    read = range(first, first + spec.group_channels)
    channels = range(spec.in_channels) if spec.in_channels <= _MOST_CHANNELS else read[:_MOST_CHANNELS]
    slices = [*islice(product(*(line.window for line in lines[:-2])), _MOST_SLICES)]
    height, width = (len(line.shown) + _GAP for line in lines[-2:])
    panels = [
        _Panel(i * width, j * height, _title(spec, lines, part, channel), part, channel)
        for j, part in enumerate(slices)
        for i, channel in enumerate(channels)
    ]
    across, down = len(channels) * width - _GAP, len(slices) * height - _GAP
    return _Scene(spec, row, read, lines, panels, max(1, across), max(1, down))


def _title(spec: ConvSpec, lines: Sequence[_Line], part: Sequence[int], channel: int) -> str:
    """``channel 0`` if there are several, ``slice 2`` if there are more than two spatial axes."""
    per_entry = spec.in_channels // spec.batch_group_count
    at = [line.inputs.get(u, "padding") for line, u in zip(lines, part, strict=False)]
    words = [
        f"batch {channel // per_entry}" if spec.batch_group_count > 1 else "",
        f"channel {channel % per_entry}" if per_entry > 1 else "",
        f"slice {', '.join(map(str, at))}" if at else "",
    ]
    return ", ".join(filter(None, words))


def _cells(scene: _Scene, panel: _Panel) -> Iterator[_Cell]:
    """The inputs of a panel, and what the window covers beside them."""
    spec, lines = scene.spec, scene.lines
    *_, vertical, horizontal = lines
    columns = {}
    for at in product(*([u] for u in panel.slice), vertical.shown, horizontal.shown):
        x, y = panel.left + at[-1] - horizontal.shown.start, panel.top + at[-2] - vertical.shown.start
        spots = [*zip(lines, at, strict=True)][len(lines) - len(spec.axes) :]
        inputs = [line.inputs.get(u) for line, u in spots]
        taps = [line.window.get(u) for line, u in spots]
        if None not in inputs:
            columns[column_of(spec, inputs, panel.channel)] = x, y
        elif None not in taps and panel.channel in scene.channels:
            sources = [line.sources.get(u) for line, u in spots]
            tap = tap_of(spec, taps, panel.channel - scene.channels.start, split_row(spec, scene.row)[1])
            yield _Cell(x, y, [tap], False, () if None in sources else sources)
    entries = entries_of_row(spec, scene.row, list(columns))
    for column, (x, y) in columns.items():
        yield _Cell(x, y, entries.get(column, []), True)


# -- drawing ----------------------------------------------------------------------------------------


def _draw_cells(ax: Axes, scene: _Scene, kernel: np.ndarray | None, pixels: float) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    text, colour = entry_text(scene.spec, kernel), _colour(scene, kernel)
    written = [(cell, _writing(cell, text)) for panel in scene.panels for cell in _cells(scene, panel)]
    sizes = text_sizes(ax, (pixels, pixels), [writing for _, writing in written])
    squares: dict[bool, list[Rectangle]] = {True: [], False: []}  # inputs, and what stands beside them
    for (cell, writing), size in zip(written, sizes, strict=True):
        fill = colour(cell.taps) if cell.is_input and cell.taps else "none"
        squares[cell.is_input].append(Rectangle((cell.x - 0.5, cell.y - 0.5), 1, 1, facecolor=fill))
        if size:
            ink = "0.3" if fill == "none" else text_colour(fill)
            ax.text(cell.x, cell.y, writing, ha="center", va="center", fontsize=size, color=ink)
    for is_input, edge, style in ((True, BORDER, "solid"), (False, "0.4", "dashed")):
        collection = PatchCollection(squares[is_input], match_original=True)
        collection.set(edgecolor=edge, linestyle=style)
        ax.add_collection(collection)


def _writing(cell: _Cell, text: Callable[[Sequence[int]], str]) -> str:
    """The names in lines of two, or the value, and the source of a copy."""
    if not cell.taps:
        return ""
    names = text(cell.taps).replace("+", "\n+").split("\n") if len(cell.taps) > 2 else [text(cell.taps)]
    lines = ["".join(names[i : i + 2]) for i in range(0, len(names), 2)]
    return "\n".join(lines + ["= " + ",".join(map(str, cell.source))] * bool(cell.source))


def _colour(scene: _Scene, kernel: np.ndarray | None) -> Callable[[Sequence[int]], Any]:
    """The function from the flat indices of kernel entries to the colour of their sum, as in :func:`spy`.

    Of a large kernel, whose colours would be all alike in one filter, they span the filter of this neuron.
    """
    if kernel is None:
        shape = scene.spec.rhs_shape
        places = np.arange(math.prod(shape))
        if len(places) > _MOST_COLOURS:
            d = split_row(scene.spec, scene.row)[1]
            places = out_first(scene.spec, places.reshape(shape))[d].ravel()
        colours, norm = entry_colours(len(places)), entry_norm(len(places))
        return lambda taps: colours(norm(np.searchsorted(places, taps[0])) if len(taps) == 1 else 2.0)
    flat = np.abs(kernel.ravel()) if np.iscomplexobj(kernel) else kernel.ravel().astype(float)
    colours, norm = value_colours(), value_norm(flat)
    return lambda taps: colours(norm(flat[taps].sum()))


def _draw_labels(ax: Axes, scene: _Scene, pixels: float) -> None:
    """The output, the titles of the panels, and input positions along the borders."""
    *_, vertical, horizontal = scene.lines
    lefts = sorted({panel.left for panel in scene.panels})
    tops = sorted({panel.top for panel in scene.panels}) if len(scene.spec.axes) > 1 else []
    ax.set_xticks(*_ticks(horizontal, lefts, 26 / pixels))
    ax.set_yticks(*_ticks(vertical, tops, 13 / pixels))
    ax.tick_params(length=0, labelsize="small")
    room = pixels * (len(horizontal.shown) + _GAP), _TITLE
    for panel, size in zip(scene.panels, text_sizes(ax, room, [p.title for p in scene.panels]), strict=True):
        if size:
            middle = panel.left + (len(horizontal.shown) - 1) / 2
            ax.text(middle, panel.top - 0.7, panel.title, ha="center", va="bottom", fontsize=min(9, size))
    shown = {panel.channel for panel in scene.panels}
    some = f" ({len(shown)} of {len(scene.channels)} channels)" if len(shown) < len(scene.channels) else ""
    ax.set_title(f"output {neurons.position(scene.spec, scene.row)}{some}", fontsize="medium")


def _ticks(line: _Line, starts: Sequence[float], room: float) -> tuple[list[float], list[str]]:
    """``(places, labels)`` of the inputs of a line that is drawn once from each start.

    Labels are at least ``room`` cells apart.
    """
    step = min(np.diff([*line.inputs]), default=1)
    every = max(1, math.ceil(room / step))
    kept = [(u - line.shown.start, str(t)) for u, t in line.inputs.items() if t % every == 0]
    return [start + x for start in starts for x, _ in kept], [t for _ in starts for _, t in kept]


# -- a chain ----------------------------------------------------------------------------------------


def _draw_chain(
    chain: neurons.Chain | neurons.Sites, out_index: neurons.Index, ax: Axes | None, kernel: Any
) -> Axes:
    """Images of one height, side by side."""
    if kernel is not None:
        raise TypeError(
            "kernel belongs to one spec, and spec is a chain: leave kernel out, or draw one layer."
        )
    layers = [chain] if isinstance(chain, ConvSpec | ConvSite) else list(chain)
    fields = neurons.fields(chain, out_index)
    specs = [layer.spec if isinstance(layer, ConvSite) else layer for layer in layers]
    names = [layer.name if isinstance(layer, ConvSite) else f"layer {i}" for i, layer in enumerate(layers)]
    stages = [
        (f"input of {name}", field, spec.in_order[: len(spec.axes)])
        for name, field, spec in zip(names, fields, specs, strict=False)
    ]
    stages.append(("output", fields[-1], specs[-1].out_order[: len(specs[-1].axes)]))
    if len(stages) > _MOST_STAGES:
        stages = [stages[round(i)] for i in np.linspace(0, len(stages) - 1, _MOST_STAGES)]
    images = [_image(field, spatial) for _, field, spatial in stages]
    widths = [min(4.0, max(0.25, image.shape[1] / max(1, image.shape[0]))) for image in images]
    across = sum(widths) + _BETWEEN * (len(stages) - 1)
    if ax is None:
        ax = new_axes("show.receptive_field", 2.2 * across + 0.4, 3.0)
    ax.set(frame_on=False, xticks=[], yticks=[])
    left = 0.0
    for (name, field, _), image, width in zip(stages, images, widths, strict=True):
        extent = left, left + width, 1.0, 0.0
        ax.imshow(
            np.where(image > 0, image, np.nan),
            density_colours(),
            vmin=0,
            vmax=1,
            extent=extent,
            aspect="auto",
        )
        ax.plot([left, left + width, left + width, left, left], [0, 0, 1, 1, 0], color=BORDER, linewidth=1)
        said = f"{name}\n{field.size:,} of {'x'.join(map(str, field.shape))}"
        ax.text(left + width / 2, -0.05, said, ha="center", va="bottom", fontsize="x-small")
        left += width + _BETWEEN
    ax.set(xlim=(-0.05, across + 0.05), ylim=(1.05, -0.35), aspect="equal")
    ax.set_title(f"output {tuple(int(v[0]) for v in fields[-1].indices)}", fontsize="medium")
    return ax


def _image(field: neurons.Field, spatial: Sequence[int]) -> np.ndarray:
    """The part that is read at each position of the last two spatial axes."""
    mask = field.mask
    image = mask.mean(axis=tuple(i for i in range(mask.ndim) if i not in spatial[-2:]))
    image = image if list(spatial[-2:]) == sorted(spatial[-2:]) else image.T
    return image.reshape((1,) * (2 - image.ndim) + image.shape)


# -- the window slides ------------------------------------------------------------------------------


def animate(
    spec: ConvSpec, kernel: Array | None = None, *, rows: Sequence[int] | None = None, interval: int = 400
) -> FuncAnimation:
    """An animation of ``y[i] = M[i] @ x``: the window slides over the input, and row ``i`` of M lights up.

    Each frame shows one output: :func:`receptive_field` on the left, its row in :func:`spy` on the right.
    ``animation.save("slide.gif", writer="pillow")`` writes a GIF, ``animation.to_jshtml()`` is for notebooks.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``, to show values in place of names.
      rows: the rows of M to show, in this order. By default all, or 100 of them at equal distances.
      interval: milliseconds per frame.

    Returns:
      A ``matplotlib.animation.FuncAnimation``. Keep it in a variable as long as it should run.

    Raises:
      ImportError: matplotlib is missing (``pip install 'jaxconv_fc[examples]'``).
      TypeError, ValueError: the kernel is not an array of shape ``spec.rhs_shape``.
      IndexError: a row is out of range.
      ValueError: there are no rows.

    >>> import jaxconv_fc as fc
    >>> spec = fc.conv_spec((1, 1, 3, 3), (2, 1, 2, 2), (1, 1), "VALID")
    >>> animation = fc.show.animate(spec, rows=[0, 1])
    >>> "<img" in animation.to_jshtml()
    True
    """
    check_spec(spec)
    plt = pyplot("show.animate")
    from matplotlib.animation import FuncAnimation

    step = max(1, -(-spec.out_size // _MOST_FRAMES))
    given = range(0, spec.out_size, step) if rows is None else rows
    frames = [neurons.row(spec, neurons.position(spec, row)) for row in given]
    if not frames:
        raise ValueError(f"there are no rows to show: M is {spec.out_size} x {spec.in_size}, rows={rows}.")
    figure, (window, matrix) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    spy(spec, kernel, matrix)
    show_window = partial(receptive_field, spec, ax=window, kernel=kernel)
    show_window(frames[0])
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout of the first frame serves all
    veils = [matrix.axhspan(0, 0, facecolor="white", alpha=0.7, zorder=4) for _ in range(2)]
    marked = matrix.axhspan(0, 0, facecolor="none", edgecolor=_HIGHLIGHT, linewidth=2, zorder=5)

    def show(row: int) -> list[Any]:
        window.clear()
        show_window(row)
        bounds = [0, row, row + 1, spec.out_size]
        for span, (top, bottom) in zip((veils[0], marked, veils[1]), pairwise(bounds), strict=True):
            span.set(y=top - 0.5, height=bottom - top)
        return [*window.patches, *window.texts, *veils, marked]

    return FuncAnimation(figure, show, frames, interval=interval, init_func=lambda: show(frames[0]))

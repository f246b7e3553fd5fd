"""Pictures, read back from their artists: names in cells, colours, lines, and blocks of large matrices."""

import re
import sys
import time
import tracemalloc
from itertools import pairwise

import matplotlib
import numpy as np
import oracle
import pytest
from environment import count
from geometries import CASES, MODES, Geometry, arrays, every_case, random_geometry
from jax import lax
from PIL import Image

import jaxconv_fc as fc
from jaxconv_fc.show.counts import stored_counts

matplotlib.use("Agg")  # draws to memory; needs no display
import matplotlib.pyplot as plt

COUNT = count("GEOMETRIES", 24)
WORKED = Geometry((1, 1, 3, 3), (2, 1, 2, 2), (1, 1), "VALID")
WRAPPED = Geometry((1, 1, 4, 4), (1, 1, 3, 3), (1, 1), "SAME", padding_mode="circular")
RESNET = fc.conv_spec((1, 3, 224, 224), (64, 3, 7, 7), (2, 2), [(3, 3)] * 2)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def names_in_cells(ax):
    """{(x, y): text} of a picture; a name that does not stand on a whole number is a title."""
    return {text.get_position(): text.get_text() for text in ax.texts}


def rows_of_text(spec, *kernel):
    """{(column, row): entry} of the text view, without zeros."""
    lines = fc.format_matrix(spec, *kernel, max_rows=1000, max_columns=1000).splitlines()
    cells = [re.split(r"[ |]+", line[1:-1].strip()) for line in lines]
    return {(j, i): v for i, row in enumerate(cells) for j, v in enumerate(row) if v != "0"}


# spy: every entry ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [WORKED, WRAPPED, CASES["grouped"], CASES["NHWC"]])
def test_spy_names_each_entry_in_its_cell(geometry):
    _, ax = plt.subplots(figsize=(20, 20))
    assert fc.show.spy(geometry.spec(), ax=ax) is ax
    assert names_in_cells(ax) == rows_of_text(geometry.spec())


def test_the_worked_example_is_readable_in_a_figure_of_its_own():
    ax = fc.show.spy(WORKED.spec())
    assert names_in_cells(ax) == rows_of_text(WORKED.spec())
    assert min(text.get_fontsize() for text in ax.texts) >= 10
    backgrounds = ax.images[0].to_rgba(ax.images[0].get_array())
    for text in ax.texts:  # black or white, whichever stands out more
        column, row = text.get_position()
        light = backgrounds[row, column, :3] @ [0.299, 0.587, 0.114]
        assert text.get_color() == ("black" if light > 0.5 else "white")
    assert ax.get_xlabel() == "inputs, in_shape (1, 3, 3)"
    assert ax.get_ylabel() == "outputs, out_shape (2, 2, 2)"


def test_spy_writes_values():
    kernel = np.arange(8.0).reshape(2, 1, 2, 2) - 3
    ax = fc.show.spy(WORKED.spec(), kernel)
    written = names_in_cells(ax)
    assert {k: v for k, v in written.items() if v != "0"} == rows_of_text(WORKED.spec(), kernel)
    assert sum(v == "0" for v in written.values()) == 4  # the kernel entry that is 0 is stored
    image = ax.images[0]
    assert image.norm.vmin == -image.norm.vmax == -4
    assert image.colorbar is not None


@every_case
def test_spy_has_the_colour_of_each_kernel_entry(geometry):
    """The image against the oracle: the place in the kernel's ravel, nothing, or black where several meet."""
    spec = geometry.spec()
    ax = fc.show.spy(spec)
    rows, columns, taps = oracle.triples(geometry)
    if not len(rows):
        assert not ax.images
        return
    (image,) = ax.images
    drawn = image.get_array()
    assert drawn.shape == spec.shape
    np.testing.assert_array_equal(~np.ma.getmaskarray(drawn), oracle.pattern(geometry))
    times = oracle.matrix(np.ones(spec.rhs_shape, int), geometry)
    alone = times[rows, columns] == 1
    np.testing.assert_array_equal(drawn[rows, columns][alone], taps[alone])
    assert (image.cmap(image.norm(drawn.data[times > 1])) == [0, 0, 0, 1]).all()
    colours = image.cmap(image.norm(np.arange(np.prod(spec.rhs_shape))))
    assert len(np.unique(colours, axis=0)) == min(256, len(colours))


@every_case
def test_spy_has_the_values_of_the_matrix(geometry, rng):
    kernel, _, _ = arrays(geometry, rng)
    ax = fc.show.spy(geometry.spec(), kernel)
    if ax.images:
        drawn = ax.images[0].get_array()
        np.testing.assert_array_equal(~np.ma.getmaskarray(drawn), oracle.pattern(geometry))
        np.testing.assert_array_equal(drawn.filled(0), oracle.matrix(kernel, geometry))


def test_values_that_are_not_finite_are_black_and_complex_ones_absolute():
    spec = fc.conv_spec((1, 1, 3), (1, 1, 3), (1,), "VALID")
    image = fc.show.spy(spec, np.array([[[np.nan, -np.inf, 2.0]]])).images[0]
    colours = image.to_rgba(image.get_array())[0]
    np.testing.assert_array_equal(colours[:2], [[0, 0, 0, 1]] * 2)
    np.testing.assert_array_equal(colours[2], image.cmap(1.0))
    image = fc.show.spy(spec, np.array([[[3 + 4j, 0, -1]]])).images[0]
    np.testing.assert_array_equal(image.get_array(), [[5, 0, 1]])


def test_lines_stand_where_the_text_has_bars():
    spec = CASES["plain"].spec()  # in_shape (2, 4, 3), out_shape (3, 4, 3)
    _, ax = plt.subplots(figsize=(12, 12))
    fc.show.spy(spec, ax=ax)
    found = {}
    for lines in ax.collections:
        for (x, y), (x_end, _) in lines.get_segments():
            key = ("column", x) if x == x_end else ("row", y)
            found[key] = max(found.get(key, 0), lines.get_linewidth()[0])
    for name, size in (("column", 24), ("row", 36)):
        widths = [found[name, i - 0.5] for i in range(1, size)]
        bars = [2 if i % 12 == 0 else 1 if i % 3 == 0 else 0 for i in range(1, size)]
        np.testing.assert_array_equal(np.unique(widths, return_inverse=True)[1], bars)


# spy: blocks of a large matrix ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(COUNT))
def test_blocks_are_counted_exactly(number, run_seed):
    rng = np.random.default_rng([run_seed, number])
    geometry = random_geometry(rng, MODES)
    pattern = oracle.pattern(geometry)
    edges = [np.unique([0, n, *rng.integers(0, n + 1, 4)]) for n in pattern.shape]
    want = [[pattern[a:b, c:d].sum() for c, d in zip(edges[1], edges[1][1:], strict=False)]
            for a, b in zip(edges[0], edges[0][1:], strict=False)]  # fmt: skip
    counts = stored_counts(geometry.spec(), *edges)
    name = f"JAXCONV_FC_SEED={run_seed}, {geometry}"
    np.testing.assert_array_equal(counts, np.reshape(want, counts.shape), err_msg=name)


BLOCKED = [
    Geometry((1, 1, 18, 17), (1, 1, 3, 3), (1, 1), "SAME", padding_mode="reflect"),
    Geometry((1, 9, 9, 4), (2, 3, 2, 4), (1, 2), "SAME", None, None, ("NHWC", "HWIO", "NHWC"), 2),
    Geometry((4, 2, 40), (4, 2, 5), (1,), [(2, 3)], (3,), (2,), batch_group_count=2),
]  # fmt: skip


@pytest.mark.parametrize("geometry", BLOCKED)
def test_a_cell_of_a_small_picture_is_a_block_of_the_matrix(geometry, rng):
    """At most 100 cells a side on small axes: fractions and means, against the dense matrix."""
    spec = geometry.spec()
    rows, columns = (min(n, 100) for n in spec.shape)
    assert (rows, columns) != spec.shape
    row_edges, column_edges = (
        np.arange(m + 1) * n // m for m, n in zip((rows, columns), spec.shape, strict=True)
    )

    def blocks(matrix):
        return np.add.reduceat(np.add.reduceat(matrix, row_edges[:-1], 0), column_edges[:-1], 1)

    kernel, _, _ = arrays(geometry, rng, np.float64)
    stored, sums = blocks(oracle.pattern(geometry).astype(int)), blocks(oracle.matrix(kernel, geometry))
    _, (left, right) = plt.subplots(1, 2, figsize=(1.5, 0.8))
    fraction = fc.show.spy(spec, ax=left).images[0].get_array()
    mean = fc.show.spy(spec, kernel, ax=right).images[0].get_array()
    areas = np.outer(np.diff(row_edges), np.diff(column_edges))
    np.testing.assert_allclose(fraction.filled(0), stored / areas, rtol=1e-12)
    np.testing.assert_allclose(mean.filled(0), sums / np.maximum(stored, 1), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(np.ma.getmaskarray(mean), stored == 0)


def test_the_first_layer_of_resnet_50():
    """116 million entries of 121 billion; measured 0.13 s without a kernel and 0.6 s with one."""
    kernel = np.random.default_rng(0).standard_normal(RESNET.rhs_shape).astype(np.float32)
    fc.show.spy(WORKED.spec()).figure.canvas.draw()  # matplotlib loads its fonts once
    for operands in ((), (kernel,)):
        tracemalloc.start()
        start = time.perf_counter()
        ax = fc.show.spy(RESNET, *operands)
        ax.figure.canvas.draw()
        took, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert took < 10
        assert peak < 250 * 2**20
        drawn = ax.images[0].get_array()
        assert max(drawn.shape) <= 1000
        assert 0.1 < 1 - np.ma.getmaskarray(drawn).mean() < 0.6


def test_a_matrix_of_a_million_rows_and_columns():
    spec = fc.conv_spec((1, 1, 10**6), (1, 1, 101), (1,), "SAME", padding_mode="circular")
    start = time.perf_counter()
    drawn = fc.show.spy(spec).images[0].get_array()
    assert time.perf_counter() - start < 5
    rows, columns = drawn.shape
    assert np.isclose(drawn.filled(0).mean(), spec.nse / 10**12, rtol=0.01)
    assert {(0, columns - 1), (rows - 1, 0)} <= set(zip(*np.nonzero(~drawn.mask), strict=True))  # it wraps
    assert drawn.mask.mean() > 0.9


@pytest.mark.parametrize("geometry", [CASES["no rows"], CASES["no columns"]])
def test_an_empty_matrix_has_an_empty_picture(geometry):
    ax = fc.show.spy(geometry.spec())
    assert not ax.images
    ax.figure.canvas.draw()


# one neuron ------------------------------------------------------------------------------------------------


def row_drawn(ax, spec):
    """{column: name} of what is written on inputs. Their positions are read off the ticks."""
    lefts = np.cumsum([label.get_text() == "0" for label in ax.get_xticklabels()]) - 1  # panel of each tick
    xs, ys = (
        {label.get_position()[i]: int(label.get_text()) for label in labels}
        for i, labels in enumerate((ax.get_xticklabels(), ax.get_yticklabels()))
    )
    panels = dict(zip(xs, lefts, strict=True))
    per_entry = spec.in_channels // spec.batch_group_count
    row = {}
    for text in ax.texts:
        x, y = text.get_position()
        if text.get_color() == GREY or x not in xs or (ys and y not in ys):
            continue
        channel, canonical = panels[x], [ys[y], xs[x]] if ys else [xs[x]]
        canonical += [channel // per_entry] * (spec.batch_group_count > 1) + [channel % per_entry]
        index = [canonical[spec.in_order.index(i)] for i in range(len(spec.in_shape))]
        row[np.ravel_multi_index(index, spec.in_shape)] = text.get_text().replace("\n", "")
    return row


def beside(ax):
    """What is written beside the inputs: on padding, on holes and on copies."""
    return [text.get_text() for text in ax.texts if text.get_color() == GREY]


GREY = "0.3"
WITH_AXES = {name: g for name, g in CASES.items() if name not in ("no rows", "no columns", "no spatial axes")}


@pytest.mark.parametrize("geometry", WITH_AXES.values(), ids=WITH_AXES)
def test_the_coloured_inputs_are_the_row_of_the_matrix(geometry):
    spec = geometry.spec()
    text = rows_of_text(spec)
    for row in {0, spec.out_size // 2, spec.out_size - 1}:
        want = {column: name for (column, i), name in text.items() if i == row}
        ax = fc.show.receptive_field(spec, row)
        assert row_drawn(ax, spec) == want
        assert ax.get_title() == f"output {fc.neurons.position(spec, row)}"
        plt.close(ax.figure)


def test_padding_and_holes_are_dashed_and_copies_name_their_source():
    padded = fc.conv_spec((1, 1, 4), (1, 1, 3), (1,), "SAME")
    ax = fc.show.receptive_field(padded, (0, 0))
    assert (row_drawn(ax, padded), beside(ax)) == ({0: "b", 1: "c"}, ["a"])
    inputs, others = ax.collections
    assert len(inputs.get_paths()) == 4
    assert len(others.get_paths()) == 1
    assert others.get_linestyle()[0][1] is not None  # dashes
    assert inputs.get_linestyle()[0][1] is None

    holes = fc.conv_spec((1, 1, 3), (1, 1, 3), (1,), "VALID", (2,))
    assert beside(fc.show.receptive_field(holes, (0, 0))) == ["b"]
    assert beside(fc.show.receptive_field(holes, (0, 1))) == ["a", "c"]

    both = fc.conv_spec((1, 1, 3), (1, 1, 3), (1,), [(1, 1)], (2,), padding_mode="circular")
    ax = fc.show.receptive_field(both, (0, 0))  # padded first, then dilated
    assert (row_drawn(ax, both), beside(ax)) == ({0: "c", 2: "a"}, ["a\n= 2", "b"])

    ax = fc.show.receptive_field(WRAPPED.spec(), (0, 0, 0))
    assert beside(ax) == ["a\n= 3,3", "b\n= 3,0", "c\n= 3,1", "d\n= 0,3", "g\n= 1,3"]
    folded = fc.conv_spec((1, 1, 4), (1, 1, 3), (1,), "SAME", padding_mode="edge")
    ax = fc.show.receptive_field(folded, (0, 0))
    assert row_drawn(ax, folded) == {0: "a+b", 1: "c"}
    assert beside(ax) == ["a\n= 0"]


def test_a_neuron_has_the_colours_of_its_row():
    spec = WRAPPED.spec()
    matrix = fc.show.spy(spec).images[0]
    row = matrix.to_rgba(matrix.get_array())[5]
    colours = fc.show.receptive_field(spec, 5).collections[0].get_facecolors()
    row, colours = (np.unique(v[v[:, 3] > 0], axis=0) for v in (row, colours))
    np.testing.assert_array_equal(colours, row)
    assert len(row) == 9


def test_values_and_no_spatial_axes():
    kernel = np.array([[1.5, 0, -2], [3, 4, 5]])
    ax = fc.show.receptive_field(fc.conv_spec((1, 3), (2, 3), (), "VALID"), (0,), kernel=kernel)
    written = [text.get_text() for text in ax.texts]
    assert written == ["1.5", "0", "-2", "channel 0", "channel 1", "channel 2"]


def test_slices_of_three_dimensions():
    spec = fc.conv_spec((1, 1, 3, 3, 3), (1, 1, 3, 1, 1), (1, 1, 1), "SAME")
    ax = fc.show.receptive_field(spec, (0, 0, 1, 2))
    names = [text.get_text() for text in ax.texts]
    assert names == ["a", "b", "c", "slice padding", "slice 0", "slice 1"]


def test_of_many_channels_and_a_large_image_a_part_is_drawn():
    spec = fc.conv_spec((1, 64, 200, 200), (64, 64, 3, 3), (1, 1), "SAME")
    start = time.perf_counter()
    ax = fc.show.receptive_field(spec, (1, 100, 0))
    ax.figure.canvas.draw()
    assert time.perf_counter() - start < 10
    assert ax.get_title() == "output (1, 100, 0) (8 of 64 channels)"
    labels = [int(label.get_text()) for label in ax.get_yticklabels()]
    assert 95 <= min(labels) < 99
    assert 101 < max(labels) <= 105


def test_labels_do_not_overlap():
    spec = fc.conv_spec((1, 64, 14, 14), (64, 64, 3, 3), (1, 1), "SAME")
    for ax in (
        fc.show.receptive_field(spec, (1, 2, 4)),
        fc.show.receptive_field(CASES["batch groups"].spec(), 3),
        fc.show.spy(RESNET),
    ):
        ax.figure.canvas.draw()
        titles = [t for t in ax.texts if "channel" in t.get_text()]
        labels = [*titles, ax.title, *ax.get_xticklabels(), *ax.get_yticklabels()]
        labels += [ax.xaxis.label, ax.yaxis.label]
        boxes = [v.get_window_extent() for v in labels if v.get_text() and v.get_visible()]
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


# the window slides -----------------------------------------------------------------------------------------


def test_an_animation_is_saved_as_a_gif(tmp_path):
    animation = fc.show.animate(WORKED.spec(), rows=[0, 5, 7])
    window, matrix = animation._fig.axes[:2]
    animation.save(tmp_path / "slide.gif", writer="pillow", dpi=40)
    with Image.open(tmp_path / "slide.gif") as image:
        assert image.n_frames == 3
        frames = []
        for i in range(3):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB"), int))
    assert all(abs(a - b).sum() > 0 for a, b in pairwise(frames))
    assert row_drawn(window, WORKED.spec()) == {4: "e", 5: "f", 7: "g", 8: "h"}  # the last frame
    *veils, marked = [patch for patch in matrix.patches if patch.get_zorder() >= 4]
    assert (marked.get_y(), marked.get_height()) == (6.5, 1)
    assert [(v.get_y(), v.get_height()) for v in veils] == [(-0.5, 7), (7.5, 0)]


def test_a_large_animation_has_100_frames_at_most():
    spec = fc.conv_spec((1, 1, 1000), (1, 1, 3), (1,), "SAME")
    animation = fc.show.animate(spec)
    assert list(animation.new_frame_seq()) == list(range(0, 1000, 10))
    animation._draw_was_started = True  # matplotlib warns of an animation that nobody looked at


# bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fc.show.spy("conv"), TypeError, "spec must be a ConvSpec"),
        (lambda: fc.show.spy(WORKED.spec(), np.ones((2, 2))), ValueError, "kernel must have the spec's"),
        (lambda: fc.show.spy(WORKED.spec(), [1]), TypeError, "kernel must be a jax or NumPy array"),
        (lambda: fc.show.receptive_field(WORKED.spec(), (0, 2, 0)), IndexError, r"out_index\[1\]"),
        (lambda: fc.show.receptive_field(WORKED.spec(), 0, kernel=np.ones(3)), ValueError, "kernel must"),
        (lambda: fc.show.animate(WORKED.spec(), rows=[8]), IndexError, r"row must lie in \[-8, 8\), got 8"),
        (lambda: fc.show.animate(WORKED.spec(), rows=["a"]), TypeError, "row must be an int"),
        (lambda: fc.show.animate(CASES["no rows"].spec()), ValueError, "there are no rows to show"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not plt.get_fignums()


def test_a_chain_has_an_image_per_layer():
    def two(x):
        x = lax.conv(x, np.ones((3, 2, 3, 3), np.float32), (1, 1), "SAME")
        return lax.conv(x[:, :, ::2], np.ones((1, 3, 1, 1), np.float32), (1, 1), "VALID")

    sites = fc.find_convs(two, np.ones((1, 2, 6, 5), np.float32))
    ax = fc.show.receptive_field(sites, (0, 1, 0))
    first, second, output = (image.get_array().filled(0) for image in ax.images)
    assert (first.shape, second.shape, output.shape) == ((6, 5), (3, 5), (3, 5))
    assert np.argwhere(first).tolist() == [[t, u] for t in (1, 2, 3) for u in (0, 1)]
    assert np.argwhere(second).tolist() == np.argwhere(output).tolist() == [[1, 0]]
    said = [text.get_text().split("\n") for text in ax.texts]
    assert [line[1] for line in said] == ["12 of 2x6x5", "3 of 3x3x5", "1 of 1x3x5"]
    assert ax.get_title() == "output (0, 1, 0)"
    line = fc.conv_spec((1, 4, 1), (2, 1, 1), (1,), "SAME", dimension_numbers=("NWC", "WOI", "NWC"))
    image = fc.show.receptive_field([line] * 9, -1).images
    assert len(image) == 8
    assert image[0].get_array().shape == (1, 4)
    with pytest.raises(TypeError, match="kernel belongs to one spec, and spec is a chain"):
        fc.show.receptive_field(sites, 0, kernel=np.ones((3, 2, 3, 3)))


@pytest.mark.parametrize(
    "call", [fc.show.spy, fc.show.animate, lambda spec: fc.show.receptive_field(spec, 0)]
)
def test_without_matplotlib_the_extra_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'jaxconv_fc\[examples\]'"):
        call(WORKED.spec())

"""The teaching view: names without a kernel, values with one, and never more text than can be read."""

import html
import pickle
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import Geometry, arrays
from jax import lax

import jaxconv_fc as fc


def text_of(spec, *kernel):
    return fc.format_matrix(spec, *kernel).splitlines()


def tokens(line):
    """The entries of one printed row."""
    assert line.startswith("[")
    assert line.endswith("]")
    return re.split(r"[ |]+", line[1:-1].strip())


def conv_1d(n, k, padding="VALID", mode="zeros", channels=(1, 1)):
    o, c = channels
    return fc.conv_spec((1, c, n), (o, c, k), (1,), padding, padding_mode=mode)


def test_letters_then_numbered_names():
    """Letters for up to 26 taps; for more every tap is numbered, so that all names are of one kind."""
    assert tokens(text_of(conv_1d(26, 26))[0]) == list("abcdefghijklmnopqrstuvwxyz")
    assert tokens(text_of(conv_1d(27, 27))[0]) == [f"k{i}" for i in range(27)]


def test_names_follow_the_ravelled_kernel():
    numbers = ("NHWC", "HWIO", "NHWC")
    spec = fc.conv_spec((1, 3, 3, 2), (2, 2, 2, 1), (1, 1), "VALID", dimension_numbers=numbers)
    assert text_of(spec)[0] == "[a b|c d|0 0||e f|g h|0 0||0 0|0 0|0 0]"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([1, 2], "[1 2 0]"),
        ([-1, 20], "[-1 20  0]"),
        ([-100, 2], "[-100    2    0]"),
        ([1234567, -9], "[1234567      -9       0]"),
    ],
)
def test_values_share_one_width(values, line):
    assert text_of(conv_1d(3, 2), np.array(values, np.int32).reshape(1, 1, 2))[0] == line


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_floats_read_back(dtype):
    values = np.array([0.5, -0.25], dtype).reshape(1, 1, 2)
    lines = text_of(conv_1d(3, 2), values)
    assert [[float(t) for t in tokens(line)] for line in lines] == [[0.5, -0.25, 0], [0, 0.5, -0.25]]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("dtype", ["bool", "uint8", "complex64"])
def test_other_dtypes_print(dtype):
    line = text_of(conv_1d(3, 2), np.ones((1, 1, 2), dtype))[0]
    assert len(tokens(line)) == 3
    assert line.count("1") >= 2 or line.count("True") == 2


def test_nan_and_inf_print():
    line = text_of(conv_1d(3, 2), np.array([np.nan, -np.inf], np.float32).reshape(1, 1, 2))[0]
    assert tokens(line)[:2] == ["nan", "-inf"]


def test_colliding_taps_print_as_sums():
    """Circular, with a kernel twice as wide as the axis: two taps meet in every entry."""
    spec = conv_1d(2, 3, [(1, 1)], "circular")
    assert [tokens(line) for line in text_of(spec)] == [["b", "a+c"], ["a+c", "b"]]
    kernel = np.array([1, 10, 100], np.int32).reshape(1, 1, 3)
    assert [tokens(line) for line in text_of(spec, kernel)] == [["10", "101"], ["101", "10"]]


def test_bars_nest_with_the_axes_of_in_shape():
    spec = fc.conv_spec((1, 2, 2, 2, 2), (1, 2, 2, 2, 2), (1, 1, 1), "VALID")
    assert fc.format_matrix(spec) == "[a b|c d||e f|g h|||i j|k l||m n|o p]"


def test_no_spatial_axes():
    assert text_of(fc.conv_spec((1, 2), (2, 2), (), "VALID")) == ["[a b]", "[c d]"]


GEOMETRIES = [
    Geometry((1, 2, 3), (2, 2, 2), (1,), [(1, 0)]),
    Geometry((1, 1, 4), (1, 1, 2), (2,), [(1, 2)], (2,), (3,)),
    Geometry((2, 2, 3), (2, 1, 2), (1,), "SAME", feature_group_count=2),
    Geometry((2, 1, 3), (2, 1, 2), (1,), "SAME", batch_group_count=2),
    Geometry((1, 3, 2, 1), (2, 2, 1, 1), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    Geometry((1, 1, 3), (1, 1, 3), (1,), [(4, 3)], padding_mode="reflect"),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_are_the_matrix(geometry, rng):
    kernel, _, _ = arrays(geometry, rng)
    printed = [[int(t) for t in tokens(line)] for line in text_of(geometry.spec(), kernel)]
    np.testing.assert_array_equal(printed, oracle.matrix(kernel, geometry))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_names_are_the_matrix(geometry, rng):
    """Every name evaluated (a sum, where taps collide) gives back the matrix of values."""
    kernel, _, _ = arrays(geometry, rng)
    names = dict(zip("abcdefghijklmnopqrstuvwxyz", kernel.ravel().tolist(), strict=False)) | {"0": 0}
    evaluated = [
        [sum(names[name] for name in token.split("+")) for token in tokens(line)]
        for line in text_of(geometry.spec())
    ]
    np.testing.assert_array_equal(evaluated, oracle.matrix(kernel, geometry))


@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize("size", [20, 224])
def test_beyond_a_sensible_size_an_ellipsis(size, with_values):
    """A matrix nobody could read is shortened, and not built: 224x224 would take terabytes."""
    spec = fc.conv_spec((1, 64, size, size), (64, 64, 3, 3), (1, 1), "SAME")
    kernel = (np.ones((64, 64, 3, 3), np.float32),) if with_values else ()
    start = time.perf_counter()
    text = fc.format_matrix(spec, *kernel)
    assert time.perf_counter() - start < 20
    assert "..." in text or "…" in text
    assert len(text) < 40_000
    assert max(map(len, text.splitlines())) < 800


def test_what_is_left_out_is_the_middle():
    """As many rows and columns as asked for; an odd number has one more at the start than at the end."""
    spec = conv_1d(7, 2)
    whole = text_of(spec)
    assert fc.format_matrix(spec, max_rows=6, max_columns=7).splitlines() == whole
    for most, first, last in ((5, 3, 2), (4, 2, 2), (1, 1, 0)):
        lines = fc.format_matrix(spec, max_rows=most).splitlines()
        assert lines == [*whole[:first], "...", *whole[len(whole) - last :]]
        (line,) = fc.format_matrix(spec, max_rows=1, max_columns=most).splitlines()[:1]
        row = tokens(whole[0])
        assert tokens(line) == [*row[:first], "...", *row[len(row) - last :]]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8"])
def test_colliding_taps_add_as_in_the_matrix(dtype):
    """In their own dtype: a bool is or-ed, and a small integer wraps."""
    spec = fc.conv_spec((1, 1, 1), (1, 1, 2), (1,), [(0, 1)], padding_mode="edge")
    kernel = np.full((1, 1, 2), 100).astype(dtype)
    (matrix,) = np.asarray(fc.as_matrix(spec, kernel)).ravel().astype(int)
    assert text_of(spec, kernel) == [f"[{matrix}]"]


def test_axes_of_one_position_have_no_bars():
    spec = fc.conv_spec((1, 2, 3, 1), (1, 2, 1, 1), (1, 1), "VALID", None, None, ("NHWC", "HWIO", "NHWC"))
    assert text_of(spec)[:2] == ["[a b 0|0 0 0]", "[0 a b|0 0 0]"]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_matrices_print(shape):
    rows, columns = shape
    spec = conv_1d(4, 5) if rows == 0 else fc.conv_spec((1, 1, 0), (1, 1, 1), (1,), [(2, 2)])
    assert spec.shape == (rows, columns)
    assert isinstance(fc.format_matrix(spec), str)


@pytest.mark.parametrize(
    ("kernel", "error"), [(np.ones((1, 1, 3)), ValueError), ([[[1, 2]]], TypeError), ("ab", TypeError)]
)
def test_a_wrong_kernel_is_refused(kernel, error):
    with pytest.raises(error, match="kernel"):
        fc.format_matrix(conv_1d(3, 2), kernel)


# tables of notebooks ---------------------------------------------------------------------------------


def table_cells(text):
    """The texts of all cells of the HTML tables, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[html.unescape(c) for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_text_of_a_matrix_is_a_table_in_a_notebook(geometry, rng):
    kernel, _, _ = arrays(geometry, rng)
    for operands in ((), (kernel,)):
        text = fc.format_matrix(geometry.spec(), *operands)
        assert table_cells(text._repr_html_()) == [tokens(line) for line in text.splitlines()]


def test_bars_of_the_text_are_borders_of_the_table():
    text = fc.format_matrix(fc.conv_spec((1, 2, 2, 2), (1, 2, 1, 1), (1, 1), "VALID"))
    first = text._repr_html_().split("</tr>")[0].split("<td")[1:]
    assert text.splitlines()[0] == "[a 0|0 0||b 0|0 0]"
    widths = [re.findall(r"border-left:(\d)px", cell) for cell in first]
    assert widths == [[], [], ["1"], [], ["2"], [], ["1"], []]
    assert ["opacity" in cell for cell in first] == [entry == "0" for entry in tokens(text.splitlines()[0])]


def test_the_text_stays_a_str():
    text = fc.format_matrix(conv_1d(3, 2))
    assert text == "[a b 0]\n[0 a b]"
    assert pickle.loads(pickle.dumps(text)) == text
    shortened = fc.format_matrix(conv_1d(9, 2), max_rows=2, max_columns=2)._repr_html_()
    assert table_cells(shortened) == [["a", "...", "0"], ["..."], ["0", "...", "b"]]


def test_a_geometry_shows_its_arguments_and_its_matrix_if_small():
    table = table_cells(conv_1d(4, 2)._repr_html_())
    assert ["lhs_shape", "(1, 1, 4)"] in table
    assert ["in_shape → out_shape", "(1, 4) → (1, 3)"] in table
    assert ["M", "3 × 4, 6 stored (50.00%)"] in table
    assert table[-3:] == [["a", "b", "0", "0"], ["0", "a", "b", "0"], ["0", "0", "a", "b"]]
    names = [name for name, *_ in table]
    assert not {"lhs_dilation", "feature_group_count", "padding_mode", "dimension_numbers"} & set(names)
    numbers = ("NHWC", "HWIO", "NHWC")
    large = fc.conv_spec((1, 64, 64, 4), (3, 3, 2, 8), (2, 2), "SAME", None, (2, 2), numbers, 2)
    rest = dict(table_cells(large._repr_html_()))
    assert rest["feature_group_count"] == "2"
    assert rest["rhs_dilation"] == "(2, 2)"
    assert "lhs_spec=(0, 3, 1, 2)" in rest["dimension_numbers"]
    assert list(rest)[-1] == "float32"  # and no matrix


def test_the_convolutions_of_a_function_are_a_table():
    def network(x, k):
        with jax.named_scope("a<b"):
            x = lax.conv_general_dilated(x, k, (1, 1), "SAME")
        return lax.conv_general_dilated(x, k, (2, 2), "SAME")

    sites = fc.find_convs(network, np.ones((1, 2, 8, 8), np.float32), np.ones((2, 2, 3, 3), np.float32))
    rows = table_cells(sites._repr_html_())
    assert len(rows) == 4
    assert rows[1][1] == "a<b"
    assert "a&lt;b" in sites._repr_html_()  # a name makes no tags
    printed = repr(sites).splitlines()
    assert [" ".join(row).split() for row in rows] == [line.split() for line in printed]
    assert table_cells(sites[0]._repr_html_())[1] == rows[1]
    assert fc.find_convs(jnp.sin, np.float32(1))._repr_html_() == "no convolutions"

"""Bad inputs, all in one table: what is called, what is raised, and what the message must say.

TypeError for a wrong kind of thing, ValueError for a wrong value, before anything is computed. Each
message names the argument, the value received and the fix; the fragments below are parts of it.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import Geometry, arrays, integers

import jaxconv_fc as fc

SPEC = {"lhs_shape": (1, 4, 8, 8), "rhs_shape": (6, 4, 3, 3), "window_strides": (1, 1), "padding": "VALID"}
PLAIN = Geometry(**SPEC)
KERNEL, X, Y = arrays(PLAIN, np.random.default_rng(0), np.float32)


def spec(**changed):
    return fc.conv_spec(**(SPEC | changed))


def grouped(c, o, groups, i=None):
    """A call with feature groups: C input channels, O output channels."""
    return partial(spec, lhs_shape=(1, c, 8, 8), rhs_shape=(o, i or c, 3, 3), feature_group_count=groups)


def batched(n, o, groups, **changed):
    return partial(spec, lhs_shape=(n, 4, 8, 8), rhs_shape=(o, 4, 3, 3), batch_group_count=groups, **changed)


def layout(*names):
    return partial(spec, dimension_numbers=names)


def traced(argument, value):
    """The argument computed inside jit."""
    return lambda: jax.jit(lambda v: spec(**{argument: v if argument[-5:] == "count" else (v, v)}).nse)(value)


def traced_pad():
    return jax.jit(lambda v: spec(padding=[(v, v), (0, 0)]).nse)(1)


def verb(name, *arguments):
    return lambda: getattr(fc, name)(PLAIN.spec(), *arguments)


def imagenet():
    """3x224x224 -> 64 channels, dense: 1.8 TB."""
    stem = fc.conv_spec((1, 3, 224, 224), (64, 3, 3, 3), (1, 1), "SAME")
    return jax.eval_shape(partial(fc.as_matrix, stem), np.ones(stem.rhs_shape, np.float32))


def int32_overflow():
    """2**32 entries, whose flat index would wrap; asked of the trace, so nothing is allocated."""
    wide = fc.conv_spec((1, 1, 2**16), (1, 1, 1), (1,), "VALID")
    kernel = jax.ShapeDtypeStruct((1, 1, 1), np.int8)
    with jax.enable_x64(False), fc.memory_limit(2**40):
        return jax.eval_shape(partial(fc.as_matrix, wide), kernel)


BEYOND = "at most 2**31 - 1 = 2147483647", str(2**31)
AT_LEAST_1 = "must be at least 1"
STATIC = ("must be static", "static_argnames")
EMPTY_AXIS = {"lhs_shape": (1, 4, 0, 8), "padding": [(1, 1), (0, 0)]}
BOOLS = KERNEL > 0, X > 0, Y > 0

# row of the table of bad inputs, the call, the exception, fragments of the message
TABLE = [
    ("1", partial(spec, lhs_shape=(1, 5, 8, 8)), ValueError, ["(1, 5, 8, 8)", "(6, 4, 3, 3)", "axis 1"]),
    ("2", grouped(5, 6, 2, 2), ValueError, ["feature_group_count", "2", "5"]),
    ("3", grouped(4, 5, 2, 2), ValueError, ["feature_group_count", "2", "5"]),
    ("4: 0", grouped(4, 6, 0), ValueError, ["feature_group_count", AT_LEAST_1, "0"]),
    ("4: -1", grouped(4, 6, -1), ValueError, ["feature_group_count", AT_LEAST_1, "-1"]),
    ("4: batch 0", batched(4, 6, 0), ValueError, ["batch_group_count", AT_LEAST_1, "0"]),
    ("4: 2.0", grouped(4, 6, 2.0, 2), TypeError, ["feature_group_count", "2.0"]),
    ("5", batched(3, 6, 2), ValueError, ["batch_group_count", "2", "3"]),
    ("6", batched(4, 5, 2), ValueError, ["batch_group_count", "2", "5"]),
    (
        "7",
        batched(4, 6, 2, feature_group_count=2),
        ValueError,
        ["feature_group_count", "batch_group_count", "2"],
    ),
    ("8", partial(spec, rhs_shape=(6, 4, 3)), ValueError, ["(1, 4, 8, 8)", "(6, 4, 3)"]),
    (
        "9",
        partial(fc.conv_spec, (4,), (3,), (), "VALID"),
        ValueError,
        ["need at least 2 dimensions", "lhs_shape", "(4,)"],
    ),
    ("10: 0", partial(spec, window_strides=(0, 1)), ValueError, ["window_strides", AT_LEAST_1, "0"]),
    ("10: -1", partial(spec, window_strides=(1, -1)), ValueError, ["window_strides", AT_LEAST_1, "-1"]),
    ("11", partial(spec, window_strides=(2.0, 1)), TypeError, ["window_strides", "2.0"]),
    ("11: str", partial(spec, window_strides="11"), TypeError, ["window_strides", "11"]),
    ("11: int", partial(spec, window_strides=2), (TypeError, ValueError), ["window_strides", "2"]),
    ("12", partial(spec, window_strides=(1,)), ValueError, ["window_strides", "(1,)", "2"]),
    ("13", partial(spec, lhs_dilation=(0, 1)), ValueError, ["lhs_dilation", AT_LEAST_1, "0"]),
    ("14", partial(spec, rhs_dilation=(1, 0)), ValueError, ["rhs_dilation", AT_LEAST_1, "0"]),
    ("14: wrong number", partial(spec, rhs_dilation=(1,)), ValueError, ["rhs_dilation", "(1,)", "2"]),
    ("15", partial(spec, padding="SMAE"), ValueError, ["padding", "SMAE", "SAME"]),
    ("16: FULL", partial(spec, padding="FULL"), ValueError, ["padding", "FULL", "(2, 2)"]),
    (
        "16: CIRCULAR",
        partial(spec, padding="CIRCULAR"),
        ValueError,
        ["padding", "CIRCULAR", "[(1, 1), (1, 1)], padding_mode='circular'"],  # as flax, whatever the stride
    ),
    ("18: 1", partial(spec, padding=1), ValueError, ["padding", "1", "[(lo, hi), ...]"]),
    ("18: (1, 1)", partial(spec, padding=(1, 1)), ValueError, ["padding", "(1, 1)", "[(lo, hi), ...]"]),
    ("18: None", partial(spec, padding=None), (TypeError, ValueError), ["padding", "None"]),
    ("19", partial(spec, padding=[(1, 1)]), ValueError, ["padding", "[(1, 1)]", "2"]),
    ("19: triple", partial(spec, padding=[(1, 1, 1), (0, 0)]), ValueError, ["padding", "(1, 1, 1)"]),
    ("20", partial(spec, padding=[(1.5, 1), (0, 0)]), TypeError, ["padding", "1.5"]),
    (
        "21: outside zeros mode",
        partial(spec, padding="SAME", lhs_dilation=(2, 1), padding_mode="edge"),
        ValueError,
        ["padding", "SAME", "lhs_dilation", "edge"],
    ),
    ("22", partial(spec, padding=[(-5, -4), (0, 0)]), ValueError, ["padding", "(-5, -4)", "8"]),
    ("24", partial(spec, rhs_shape=(6, 4, 0, 3)), ValueError, ["rhs_shape", "(6, 4, 0, 3)", "0"]),
    ("24: negative", partial(spec, lhs_shape=(1, 4, -8, 8)), ValueError, ["lhs_shape", "-8"]),
    ("25: NNHW", layout("NNHW", "OIHW", "NCHW"), ValueError, ["dimension_numbers", "NNHW"]),
    ("25: OIHX", layout("NCHW", "OIHX", "NCHW"), ValueError, ["dimension_numbers", "OIHX"]),
    ("25: length", layout("NCH", "OIHW", "NCHW"), ValueError, ["dimension_numbers", "NCH"]),
    ("25: two", layout("NCHW", "OIHW"), (TypeError, ValueError), ["dimension_numbers"]),
    ("25: no batch", layout("CHWD", "OIHW", "NCHW"), ValueError, ["dimension_numbers", "CHWD"]),
    (
        "25: numbers",
        partial(
            spec, dimension_numbers=jax.lax.ConvDimensionNumbers((0, 1, 2, 2), (0, 1, 2, 3), (0, 1, 2, 3))
        ),
        ValueError,
        ["dimension_numbers", "(0, 1, 2, 2)"],
    ),
    ("26: strides", traced("window_strides", 1), TypeError, ["window_strides", *STATIC]),
    ("26: dilation", traced("rhs_dilation", 1), TypeError, ["rhs_dilation", *STATIC]),
    ("26: groups", traced("feature_group_count", 1), TypeError, ["feature_group_count", *STATIC]),
    ("26: batch groups", traced("batch_group_count", 1), TypeError, ["batch_group_count", *STATIC]),
    ("27", traced_pad, TypeError, ["padding", *STATIC]),
    ("28: list", verb("as_matrix", KERNEL.tolist()), TypeError, ["kernel", "list"]),
    ("28: None", verb("as_matrix", None), TypeError, ["kernel", "None"]),
    ("28: None to apply", verb("apply", None, X), TypeError, ["kernel", "None"]),
    ("28: list x", verb("apply", KERNEL, X.tolist()), TypeError, ["x", "list"]),
    ("28: None y", verb("apply_transpose", KERNEL, None), TypeError, ["y", "None"]),
    ("28: strings", verb("as_matrix", KERNEL.astype(str)), TypeError, ["kernel", "U"]),
    ("28: objects", verb("as_matrix", KERNEL.astype(object)), TypeError, ["kernel", "object"]),
    ("28: dates", verb("as_matrix", np.zeros(KERNEL.shape, "M8[s]")), TypeError, ["kernel", "datetime64"]),
    ("28: spans", verb("apply", KERNEL, np.zeros(X.shape, "m8[s]")), TypeError, ["x", "timedelta64"]),
    ("28: order", partial(fc.apply, PLAIN.spec(), X, KERNEL), ValueError, ["kernel", "(6, 4, 3, 3)"]),
    ("28: arrays for shapes", partial(spec, lhs_shape=X), (TypeError, ValueError), ["lhs_shape"]),
    (
        "29",
        verb("apply", KERNEL, X.astype(np.float64)),
        TypeError,
        ["kernel", "x", "float32", "float64", "astype"],
    ),
    ("29: int x", verb("apply", KERNEL, X.astype(np.int32)), TypeError, ["int32", "float32", "astype"]),
    (
        "29: transpose",
        verb("apply_transpose", KERNEL, Y.astype(np.float64)),
        TypeError,
        ["y", "float32", "float64", "astype"],
    ),
    (
        "29: bias",
        verb("as_affine", KERNEL, np.ones(6, np.int32)),
        TypeError,
        ["bias", "int32", "float32", "astype"],
    ),
    (
        "29: wider bias",
        verb("as_affine", KERNEL, np.ones(6, np.float64)),
        TypeError,
        ["bias", "float64", "float32", "astype"],
    ),
    ("30", verb("as_matrix", KERNEL[:5]), ValueError, ["kernel", "(6, 4, 3, 3)", "(5, 4, 3, 3)"]),
    ("30: rows", verb("matrix_rows", KERNEL[:, :3], [0]), ValueError, ["kernel", "(6, 3, 3, 3)"]),
    ("30: columns", verb("matrix_columns", KERNEL[..., 0], [0]), ValueError, ["kernel", "(6, 4, 3)"]),
    ("30: apply", verb("apply", KERNEL[None], X), ValueError, ["kernel", "(1, 6, 4, 3, 3)"]),
    ("30: transpose", verb("apply_transpose", KERNEL.T, Y), ValueError, ["kernel", "(3, 3, 4, 6)"]),
    ("32: apply", verb("apply", BOOLS[0], BOOLS[1]), TypeError, ["bool", "astype"]),
    ("32: transpose", verb("apply_transpose", BOOLS[0], BOOLS[2]), TypeError, ["bool", "astype"]),
    *(
        (f"35: {mode}", partial(spec, **EMPTY_AXIS, padding_mode=mode), ValueError, [mode, "0"])
        for mode in ("circular", "reflect", "symmetric", "edge")
    ),
    *(
        (
            f"36: {mode}",
            partial(spec, padding=[(-1, 1), (0, 0)], padding_mode=mode),
            ValueError,
            ["padding", mode, "-1"],
        )
        for mode in ("circular", "reflect", "symmetric", "edge")
    ),
    (
        "37",
        partial(spec, padding_mode="periodic"),
        ValueError,
        ["padding_mode", "periodic", "zeros", "circular", "reflect", "symmetric", "edge"],
    ),
    ("37: None", partial(spec, padding_mode=None), (TypeError, ValueError), ["padding_mode", "None"]),
    (
        "40",
        imagenet,
        ValueError,
        ["3,211,264 x 150,528 float32 = 1,801 GiB dense; 86,188,800 stored entries", "apply"],
    ),
    ("41", int32_overflow, ValueError, ["65,536 x 65,536", "x64"]),
    ("41: stride", partial(spec, window_strides=(1, 2**31)), ValueError, ["window_strides[1]", *BEYOND]),
    ("41: lhs_dilation", partial(spec, lhs_dilation=(2**31, 1)), ValueError, ["lhs_dilation[0]", *BEYOND]),
    ("41: rhs_dilation", partial(spec, rhs_dilation=(1, 2**31)), ValueError, ["rhs_dilation[1]", *BEYOND]),
    ("41: pad", partial(spec, padding=[(1, 1), (0, 2**31)]), ValueError, ["padding[1]", *BEYOND]),
    ("41: crop", partial(spec, padding=[(2**31, -(2**31)), (0, 0)]), ValueError, ["padding[0]", *BEYOND]),
    (
        "41: copies",
        partial(spec, padding=[(2**24, 1), (0, 0)], padding_mode="circular"),
        ValueError,
        ["padding[0]", "circular", "at most 16777216 copies", "16777217"],
    ),
    (
        "41: named padding",
        partial(spec, rhs_shape=(6, 4, 7, 7), rhs_dilation=(2**30, 1), padding="SAME"),
        ValueError,
        ["padding[0]", "2147483647", str(3 * 2**30)],
    ),
    (
        "41: beyond 64 bits",
        partial(spec, lhs_shape=(1, 4, 2**40, 8), lhs_dilation=(2**30, 1)),
        ValueError,
        ["spatial axis 0", "2**62", "3 taps"],
    ),
    ("42: x", verb("apply", KERNEL, X[None]), ValueError, ["x", "(4, 8, 8)", "(1, 4, 8, 8)", "vmap"]),
    ("42: ravel", verb("apply", KERNEL, X.ravel()), ValueError, ["x", "(4, 8, 8)", "(256,)"]),
    ("42: y", verb("apply_transpose", KERNEL, Y[1:]), ValueError, ["y", "(6, 6, 6)", "(5, 6, 6)"]),
    ("42: bias", verb("as_affine", KERNEL, np.ones(5, np.float32)), ValueError, ["bias", "(6,)", "(5,)"]),
    ("42: memory limit", partial(fc.memory_limit, -1), ValueError, ["nbytes", "-1"]),
]


@pytest.mark.parametrize(
    ("call", "error", "fragments"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_bad_input(call, error, fragments):
    with pytest.raises(error) as caught:
        entered(call())
    message = str(caught.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in the message: {message}"
    # chosen by us, not passed on from the depths of jax or numpy
    assert type(caught.value).__module__ == "builtins", type(caught.value)


def entered(value):
    """A context manager may check its argument only when it is entered."""
    if hasattr(value, "__enter__"):
        with value:
            pass


@pytest.mark.parametrize(
    ("call", "error"),
    [row[1:3] for row in TABLE if row[0][:2] in {"29", "30", "42"} and row[0] != "42: memory limit"],
)
def test_the_same_under_jit(call, error):
    """Shapes and dtypes are known while tracing: the error comes then."""
    with pytest.raises(error):
        jax.jit(call)()


# rows that are legal, and what they mean -------------------------------------------------------------


def test_17_lower_case_padding():
    assert spec(padding="same") == spec(padding="SAME")


def test_21_same_with_lhs_dilation_works():
    assert spec(padding="SAME", lhs_dilation=(2, 1)).out_shape == (6, 15, 8)


def test_23_a_kernel_larger_than_the_padded_input():
    """No rows, as lax has it: a (0, n) matrix."""
    small = spec(lhs_shape=(1, 4, 2, 8))
    assert fc.as_matrix(small, KERNEL).shape == (0, 64)
    x = np.ones(small.in_shape, np.float32)
    assert fc.apply(small, KERNEL, x).shape == small.out_shape == (6, 0, 6)
    back = fc.apply_transpose(small, KERNEL, np.ones(small.out_shape, np.float32))
    np.testing.assert_array_equal(back, np.zeros(small.in_shape))


def test_22_a_crop_of_everything_is_not_too_much():
    """A crop of all positions leaves size 0. A larger one is legal if the other side pads: all is padding."""
    assert spec(padding=[(-4, -4), (0, 0)]).out_shape == (6, 0, 6)
    padding_only = spec(padding=[(-9, 9), (0, 0)])
    assert padding_only.out_shape == (6, 6, 6)
    assert padding_only.nse == 0
    np.testing.assert_array_equal(fc.apply(padding_only, KERNEL, X), np.zeros((6, 6, 6)))


def test_31_the_integer_adjoint():
    kernel, _, y = arrays(PLAIN, np.random.default_rng(1), np.int32)
    got = fc.apply_transpose(PLAIN.spec(), kernel, y)
    np.testing.assert_array_equal(got, oracle.transpose_product(y, kernel, PLAIN))


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "circular", "edge"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_33_padding_beyond_the_axis_is_numpys(n, mode, rng):
    """Padding longer than the axis repeats it. An axis of one position is a case of its own."""
    x = integers(rng, (1, n))
    extended = np.pad(x, [(0, 0), (11, 8)], mode=oracle.NUMPY_PAD_MODES[mode])
    identity = fc.conv_spec((1, 1, n), (1, 1, 1), (1,), [(11, 8)], padding_mode=mode)
    copies = fc.as_matrix(identity, np.ones((1, 1, 1), int))
    np.testing.assert_array_equal(copies @ x.ravel(), extended.ravel())
    np.testing.assert_array_equal(fc.apply(identity, np.ones((1, 1, 1), int), x), extended)


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "circular", "edge"])
def test_35_an_axis_beside_an_empty_one_may_be_padded(mode):
    fine = spec(lhs_shape=(1, 4, 8, 0), padding=[(1, 1), (0, 0)], padding_mode=mode)
    assert fine.out_shape == (6, 8, 0)


def test_38_a_circular_kernel_larger_than_the_axis(rng):
    """Taps that meet in one entry add; each entry is stored once."""
    wrapped = fc.conv_spec((1, 1, 2), (1, 1, 5), (1,), [(2, 2)], padding_mode="circular")
    a, b, c, d, e = kernel = integers(rng, (5,))
    matrix = fc.as_matrix(wrapped, kernel[None, None])
    np.testing.assert_array_equal(matrix, [[a + c + e, b + d], [b + d, a + c + e]])
    assert wrapped.nse == 4


def test_39_inf_and_nan_leave_structural_zeros_alone():
    kernel = np.full(KERNEL.shape, np.nan, np.float32)
    matrix = np.asarray(fc.as_matrix(PLAIN.spec(), kernel))
    np.testing.assert_array_equal(np.isnan(matrix), oracle.pattern(PLAIN))
    assert (matrix[~oracle.pattern(PLAIN)] == 0).all()


NHWC = fc.conv_spec((1, 8, 9, 3), (3, 3, 3, 5), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
LARGE = fc.conv_spec((1, 64, 224, 224), (64, 64, 3, 3), (1, 1), "SAME")
# What new users tried, and what the message has to say.
TRIED = {
    "a kernel as torch has it": (
        lambda: fc.as_matrix(NHWC, jnp.ones((5, 3, 3, 3))), ValueError, r"kernel.transpose(2, 3, 1, 0)"),
    "a kernel as flax has it": (
        lambda: fc.as_matrix(PLAIN.spec(), KERNEL.transpose(2, 3, 1, 0)), ValueError,
        "Transpose it: kernel.transpose(3, 2, 0, 1)"),
    "shapes for a kernel": (
        lambda: fc.as_matrix(NHWC, jax.ShapeDtypeStruct((3, 3, 3, 5), float)), TypeError, "jax.eval_shape"),
    "a kernel without a spec": (lambda: fc.as_matrix(KERNEL, KERNEL), TypeError, "conv_spec(lhs_shape"),
    "a kernel alone": (lambda: fc.as_matrix(KERNEL), TypeError, "and pass it first"),
    "a kernel alone, sparse": (lambda: fc.as_bcsr(KERNEL), TypeError, "conv_spec(lhs_shape"),
    "an empty kernel": (
        lambda: fc.as_matrix(NHWC, jnp.array([])), ValueError, "the spec's shape (3, 3, 3, 5), got (0,)"),
    "strides": (partial(spec, strides=(1, 1)), TypeError, "strides= is called window_strides= here"),
    "groups": (partial(spec, groups=2), TypeError, "groups= is called feature_group_count= here"),
    "booleans": (
        partial(spec, window_strides=(True, 1)), TypeError, "window_strides[0] must be an int, got True"),
    "an array for its shape": (
        partial(spec, lhs_shape=np.ones((1, 4, 8, 8))), TypeError, "Pass the array's .shape"),
    "a list for a shape": (partial(spec, rhs_shape=[[1.0] * 50] * 50), TypeError, "(list, shortened)"),
    "a list for a kernel": (
        lambda: fc.as_matrix(NHWC, [[1.0] * 50] * 50), TypeError, "must be a jax or NumPy array, got list"),
    "units of memory": (lambda: entered(fc.memory_limit("2GB")), TypeError, "such as 2 * 2**30"),
    "a matrix whose sparse form does not fit either": (
        lambda: fc.as_matrix(LARGE, jnp.ones(LARGE.rhs_shape)), ValueError, "use row_blocks or apply"),
    "the operator's matrix": (
        lambda: fc.as_linear_operator(LARGE, jnp.ones(LARGE.rhs_shape)).as_matrix(), ValueError,
        "use row_blocks or apply"),
    "rows of three indices": (
        lambda: fc.matrix_rows(NHWC, jnp.ones(NHWC.rhs_shape), [[[5]]]), ValueError, "or [(0, 0, 0)]"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIED)
def test_what_new_users_tried(name):
    call, error, says = TRIED[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert says in message
    assert len(message) < 400


def test_every_row_of_the_table_has_a_test():
    """Rows 1 to 42 (34 does not exist), here in the table or in a test named after its number."""
    rows = {name.split(":")[0] for name, *_ in TABLE}
    rows |= {name.split("_")[1] for name in globals() if name.startswith("test_") and name[5].isdigit()}
    assert rows == {str(i) for i in range(1, 43)} - {"34"}


def test_something_else_as_spec_is_named():
    """In every public function that takes one: most often kernel and spec have changed places."""
    names = set()
    for module in (fc, fc.curvature, fc.spectrum, fc.testing):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            parameters = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
            if name.startswith("_") or not parameters or parameters[0].name != "spec":
                continue
            names.add(name)
            others = [PLAIN.spec(), *[1] * (len(parameters) - 2)][: len(parameters) - 1]
            call = partial(function, KERNEL, *others)
            with pytest.raises(TypeError, match=r"spec must be a ConvSpec, got ndarray: make one"):
                list(call()) if name == "row_blocks" else call()  # a generator checks when it begins
    assert names > {"as_matrix", "apply", "transpose", "row_blocks", "spectral_norm", "dot_test"}

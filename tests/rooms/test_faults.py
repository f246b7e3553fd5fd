"""What find_convs says of a site beside its geometry: what it costs, and what lax is known to make of it."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import Geometry
from handwritten import conv
from jax import lax
from test_connect import K, X
from test_pitfalls import ABORTING
from test_with_products import WRONG

import jaxconv_fc as fc
from jaxconv_fc.functions.faults import lax_fault

PAGE = (Path(__file__).parents[2] / "docs" / "where-jax-is-wrong.md").read_text()


def three(lhs, rhs, pad, groups, dtype=np.float32):
    """The convolution, its gradient in x and its gradient in the kernel, as sites of lax."""
    x, k = jax.ShapeDtypeStruct(lhs, dtype), jax.ShapeDtypeStruct(rhs, dtype)
    dims = len(lhs) - 2
    fn = partial(
        lax.conv_general_dilated, window_strides=(1,) * dims, padding=[pad] * dims, feature_group_count=groups
    )
    y = jax.eval_shape(fn, x, k)
    found = [
        fc.find_convs(fn, x, k, raw=True),
        fc.find_convs(lambda y, k: jax.linear_transpose(lambda x: fn(x, k), x)(y), y, k, raw=True),
        fc.find_convs(lambda y, x: jax.linear_transpose(lambda k: fn(x, k), k)(y), y, x, raw=True),
    ]
    return [site for (site,) in found]


@pytest.mark.parametrize("name", WRONG)
def test_the_table_of_the_page(name):
    """What was seen to be wrong is marked, and nothing else of the row is. float64 is right."""
    row = re.search(rf"^\| {re.escape(name)} \| [\dx]+ \|(.*)\| 0 \|$", PAGE, re.MULTILINE)
    seen = [cell.strip() != "0" for cell in row[1].split("|")]
    sites = three(*WRONG[name])
    for platform, dtype, marked in (
        ("cpu", jnp.float32, seen),
        ("cpu", jnp.bfloat16, seen),
        ("cpu", np.complex64, seen),
        ("cpu", np.float64, [False] * 3),
        ("cpu", np.int32, [False] * 3),
        ("gpu", np.float32, [False] * 3),
        ("tpu", np.float32, [False] * 3),
    ):
        assert [bool(lax_fault(site.spec, dtype, platform)) for site in sites] == marked, (platform, dtype)
    if jax.default_backend() == "cpu":
        assert [site.lax_fault for site in sites] == ["wrong values" if wrong else "" for wrong in seen]


def test_what_ends_the_process_is_marked():
    """The first four geometries of test_pitfalls.py, and of the second the transpose; not the others."""
    found = {}
    for name, geometry in ABORTING.items():
        spec = geometry.spec()
        transposed = fc.transpose(spec, np.ones(spec.rhs_shape, np.float32))[0]
        found[name] = [lax_fault(s, np.float32, "cpu") == "ends the process" for s in (spec, transposed)]
    assert [name for name, marks in found.items() if any(marks)] == list(ABORTING)[:4]
    assert found["its transpose"] == [False, True]
    spec = ABORTING["3-D"].spec()
    assert [lax_fault(spec, np.float64, p) for p in ("cpu", "gpu", "tpu")] == ["ends the process"] * 2 + [""]


def test_what_a_gpu_refuses_is_marked():
    plain = fc.conv_spec((1, 2, 4), (2, 2, 3), (1,), "SAME")
    four = fc.conv_spec((1, 1, 3, 3, 3, 3), (1, 1, 2, 2, 2, 2), (1,) * 4, "SAME")
    cases = (plain, "int32"), (four, "float32"), (plain, "float32")
    got = [lax_fault(spec, dtype, "gpu") for spec, dtype in cases]
    assert got == ["refused", "ends the process", ""]
    assert not lax_fault(four, "float32", "cpu")


def test_the_mark_is_a_column_where_there_is_one_and_with_products_mends_it():
    lhs, rhs, pad, _ = WRONG["2x2, (2, 0)"]
    x, k = jnp.ones(lhs, jnp.float32), jnp.ones(rhs, jnp.float32)

    def loss(x, k):
        return jnp.sum(lax.conv_general_dilated(x, k, (1, 1), [pad, pad]) ** 2)

    step = jax.grad(loss, (0, 1))
    mended = fc.with_products(step, where=lambda site: site.lax_fault)
    if jax.default_backend() == "cpu":
        lines = repr(fc.find_convs(step, x, k)).splitlines()
        assert lines[0].split()[-1] == "lax"
        assert sum(line.endswith("wrong values") for line in lines) == 1
        assert str(jax.make_jaxpr(mended)(x, k)).count("= conv_product[") == 1
    for sites in (fc.find_convs(fc.with_products(step), x, k), fc.find_convs(mended, x, k)):
        assert not any(site.lax_fault for site in sites)
        assert repr(sites).splitlines()[0].split()[-1] == "mult-adds"


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((4, 4, 6, 5), (6, 2, 3, 2), (2, 1), [(2, 0), (-1, 1)], None, (1, 2), None, 2),
        Geometry((4, 2, 5), (4, 2, 3), (1,), [(1, 2)], (2,), batch_group_count=2),
    ],
)
def test_a_convolution_and_its_gradients_cost_the_same(geometry):
    """Nonzeros of M, as the oracle builds it, times examples: of lax, of this library, and under vmap."""
    spec, dtype = geometry.spec(), np.float64
    _, _, *options = geometry.arguments()

    def loss(x, k):
        y = lax.conv_general_dilated(x, k, spec.window_strides, spec.padding, *options)
        return jnp.sum(y**2)

    x, k = (jax.ShapeDtypeStruct(s, dtype) for s in (geometry.lhs_shape, geometry.rhs_shape))
    stored = np.count_nonzero(oracle.matrix(np.ones(geometry.rhs_shape), geometry))
    examples = geometry.lhs_shape[0] // geometry.batch_group_count
    step = jax.grad(loss, (0, 1))
    for fn in (step, fc.with_products(step), jax.grad(fc.with_products(loss), (0, 1))):
        sites = fc.find_convs(fn, x, k, raw=True)
        assert [site.multiply_adds for site in sites] == [stored * examples] * 3
    kernels = jax.ShapeDtypeStruct((3, *k.shape), dtype)
    mapped = fc.find_convs(jax.vmap(fc.with_products(step), (None, 0)), x, kernels)
    assert [site.multiply_adds for site in mapped] == [3 * stored * examples] * 3


def test_the_total_counts_what_loops_execute():
    def fn(x, kernel):
        return lax.scan(lambda c, _: (conv(c, kernel), None), conv(x, kernel), None, length=10)[0]

    sites = fc.find_convs(fn, X, K)
    each = 2 * sites[0].spec.nse
    assert [site.multiply_adds for site in sites] == [each, each]
    assert repr(sites).splitlines()[-1].endswith(f" {11 * each:,}")

"""Sparse arrays as copies of few rows (CPU), and as scattered entries: all in their places."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count
from geometries import CASES, Geometry, integers, random_geometry

import jaxconv_fc as fc
from jaxconv_fc.matrix import formats, repeats

LAST = ("NHWC", "HWIO", "NHWC")
LONG = {  # axes whose outputs repeat
    "channels first": Geometry((1, 2, 9, 8), (3, 2, 3, 3), (1, 1), "SAME"),
    "channels last, grouped": Geometry((1, 7, 9, 4), (3, 2, 2, 6), (1, 1), "SAME", None, None, LAST, 2),
    "channels last of the output": Geometry(
        (1, 2, 7, 9), (3, 2, 3, 2), (1, 2), "SAME", None, (1, 2), ("NCHW", "OIHW", "NHWC")
    ),
    "input dilation": Geometry((1, 2, 11, 9), (2, 2, 4, 3), (2, 1), "SAME", (3, 2)),
    "circular": Geometry((1, 1, 12, 7), (2, 1, 3, 4), (1, 1), "SAME", padding_mode="circular"),
    "taps that meet": Geometry((1, 2, 9, 8), (2, 2, 4, 3), (1, 1), "SAME", padding_mode="reflect"),
    "batch groups": Geometry((4, 2, 12), (4, 2, 3), (1,), "SAME", batch_group_count=2),
    "one axis, strided": Geometry((1, 2, 40), (2, 2, 5), (2,), [(3, 1)], rhs_dilation=(2,)),
    "three axes": Geometry((1, 1, 5, 4, 6), (1, 1, 2, 3, 3), (1, 1, 1), "SAME"),
}


def scattered(spec, kernel):
    """(data, columns, indices)"""
    forms = formats._listed_data, formats._listed_columns, formats._listed_indices
    return [form(spec, *given, None) for form, given in zip(forms, ([kernel], [], []), strict=True)]


def copied(spec, kernel):
    """(data, columns, indices)"""
    two, three = (repeats.entries_of_samples(spec, k, None) for k in (2, 3))
    return repeats.data(spec, kernel, two), repeats.columns(spec, two), repeats.indices(spec, three)


def check(geometries, rng, *forms):
    """In one program."""
    kernels = [integers(rng, geometry.rhs_shape, np.float64) for geometry in geometries]
    specs = [geometry.spec() for geometry in geometries]
    made = jax.jit(lambda kernels: [[f(s, k) for f in forms] for s, k in zip(specs, kernels, strict=True)])
    for geometry, kernel, found in zip(geometries, kernels, made(kernels), strict=True):
        rows, columns = np.nonzero(oracle.pattern(geometry))
        values = oracle.matrix(kernel, geometry)[rows, columns]
        for got in found:
            for a, b in zip(got, (values, columns, np.stack([rows, columns], 1)), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=str(geometry))


@pytest.mark.parametrize("names", [[*LONG][::2], [*LONG][1::2]])
def test_both_forms(names, rng):
    assert all(repeats.plan_of(LONG[name].spec()) for name in names)
    check([LONG[name] for name in names], rng, scattered, copied)


def test_without_tables_of_rows(monkeypatch, rng):
    """Long axes have none: which copy a pair is of is then computed."""
    monkeypatch.setattr(repeats, "_tabulated", lambda fn, size, index: fn(index))
    names = "channels last, grouped", "input dilation", "taps that meet", "three axes"
    check([LONG[name] for name in names], rng, copied)


def test_geometries_without_a_plan(rng):
    """Channels between spatial axes, no spatial axis, samples that fill a large table."""
    between = Geometry((1, 4, 2, 4), (2, 2, 3, 2), (1, 1), "SAME", None, None, ("NHCW", "OIHW", "NHCW"))
    many = Geometry((1, 1, 60), (1, 1, 59), (1,), "SAME", padding_mode="circular")
    few = [between, CASES["no spatial axes"], many]
    assert [repeats.plan_of(geometry.spec()) for geometry in few] == [None] * 3
    check(few, rng, scattered)


def test_a_chain_of_copies_is_no_scatter():
    """Of a usual layer nothing is scattered on a CPU, forwards; backwards one list is."""
    spec = fc.conv_spec((1, 16, 24, 24), (16, 16, 3, 3), (1, 1), "SAME")
    kernel = jnp.ones(spec.rhs_shape)
    text = jax.jit(lambda k: fc.as_bcsr(spec, k)).lower(kernel).as_text()
    assert "scatter" not in text
    assert "concatenate" in text


@pytest.mark.long
def test_random_geometries(run_seed):
    for n in range(count("GEOMETRIES", 6) * 10):
        rng = np.random.default_rng([run_seed, n])
        geometry = random_geometry(rng)
        if geometry.spec().nse and repeats.plan_of(geometry.spec()):
            check([geometry], rng, copied)

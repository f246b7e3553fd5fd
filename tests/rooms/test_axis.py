"""The relation of one axis, its counts and its lines: held against loops over the definition.

`oracle.related` lists every (output, input, tap) by `numpy.pad` and two loops.
"""

import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from geometries import MODES, random_axis

from jaxconv_fc.geometry import lines, modes
from jaxconv_fc.geometry.axis import Axis

COPYING = MODES[1:]  # all modes but zeros
BIG = 10**12


def axes(seed, mode, count):
    """Random axes of one mode, the same for equal seeds."""
    rng = np.random.default_rng([seed, MODES.index(mode)])
    return [random_axis(rng, mode) for _ in range(count)]


def as_set(*columns):
    return set(zip(*(np.asarray(column).tolist() for column in columns), strict=True))


# the law ---------------------------------------------------------------------------------------------------


def test_the_table_has_the_modes_that_the_tests_know():
    assert tuple(modes.MODES) == MODES


@pytest.mark.parametrize("mode", COPYING)
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_sources_are_numpys(mode, n):
    """Padded again and again; for ints, NumPy arrays of both kinds and tracers alike."""
    assert oracle.NUMPY_PAD_MODES[mode] == modes.MODES[mode].numpy_name
    axis = Axis(n, 1, lo=3 * n + 2, hi=4 * n + 1, mode=mode)
    want = np.pad(np.arange(n), (axis.lo, axis.hi), mode=oracle.NUMPY_PAD_MODES[mode])
    assert axis.padded_size == len(want)
    j = np.arange(len(want))
    np.testing.assert_array_equal(axis.source(j), want)
    np.testing.assert_array_equal(axis.source(j.astype(object)), want)
    np.testing.assert_array_equal(jax.jit(axis.source)(j), want)
    assert [axis.source(int(v)) for v in j] == want.tolist()


@pytest.mark.parametrize("low", [-9, -6, -2, 0, 3])
@pytest.mark.parametrize("high", [-2, 0, 1, 7, 12])
def test_padded_positions_that_are_inputs_themselves(low, high):
    """Where a block of rows crops the padded axis too, maybe all its inputs."""
    if 6 + low + high < 0:
        return
    axis = Axis(size=6, taps=1, mode="circular", lo=low, hi=high)
    want = [j for j in range(6 + low + high) if 0 <= j - low < 6]
    assert list(axis.own) == want
    assert [int(axis.source(np.int64(j))) for j in want] == [j - low for j in want]
    occur = np.bincount(axis.source(np.arange(axis.padded_size)), minlength=1)
    assert axis.copies == max(1, occur.max())


@pytest.mark.parametrize("mode", MODES)
def test_tables_and_both_directions_of_the_law(mode, run_seed):
    for axis in axes(run_seed, mode, 60):
        found = oracle.related(axis)
        outputs, p = np.arange(axis.out_size), np.arange(axis.taps)
        table = axis.table(outputs)
        assert table.shape == (axis.out_size, axis.taps)
        o, tap = np.nonzero(table >= 0)
        assert as_set(o, table[o, tap], tap) == found, axis
        assert as_set(*axis.reads(outputs)) == found, axis
        t, valid = axis.input_of(outputs[:, None], p)
        assert as_set(*np.nonzero(valid), t[valid]) == {(o, p, t) for o, t, p in found}, axis
        j, tap = (v.ravel() for v in np.meshgrid(np.arange(axis.padded_size), p))
        o, valid = axis.output_of(j, tap)
        assert as_set(o[valid], axis.source(j)[valid], tap[valid]) == found, axis
        o, j = (v.ravel() for v in np.meshgrid(outputs, np.arange(axis.padded_size)))
        p, valid = axis.tap_of(o, j)
        assert as_set(o[valid], axis.source(j)[valid], p[valid]) == found, axis
        i, o, tap = axis.readers(np.arange(axis.size))
        assert as_set(o, i, tap) == found, axis
        assert len(i) == len(found), axis


@pytest.mark.parametrize("mode", MODES)
def test_readers_of_some_inputs(mode, run_seed):
    """The first of the three results counts the inputs asked for, not those of the axis."""
    for axis in axes(run_seed, mode, 30):
        some = np.arange(axis.size)[1::3]
        i, o, p = axis.readers(some)
        assert as_set(o, some[i], p) == {(o, t, p) for o, t, p in oracle.related(axis) if t % 3 == 1}, axis


@pytest.mark.parametrize("mode", MODES)
def test_traced_indices_give_what_the_host_gives(mode, run_seed):
    for axis in axes(run_seed, mode, 5):
        o, p = np.arange(axis.out_size, dtype=np.int32)[:, None], np.arange(axis.taps, dtype=np.int32)[None]
        for got, want in zip(jax.jit(axis.input_of)(o, p), axis.input_of(o, p), strict=True):
            np.testing.assert_array_equal(got, want, str(axis))


def test_indices_that_would_wrap_are_refused():
    axis = Axis(5, 2, BIG, 0, 2 * BIG)
    axis.check_held_by(np.int64)
    axis.check_held_by(np.float32)  # only integers wrap
    with pytest.raises(ValueError, match=r"window stride 1000000000000.*beyond int32.*as_scipy"):
        axis.check_held_by(np.int32)
    with pytest.raises(ValueError, match="beyond int32"):
        axis.input_of(jnp.arange(2, dtype=np.int32), np.int32(0))
    assert axis.input_of(2, 0) == (2 * BIG, False)
    assert axis.input_of(0, 1) == (1, True)


@pytest.mark.parametrize("mode", MODES)
def test_sizes_and_classes_of_outputs(mode, run_seed):
    """`interior` reads no padding, `direct` no copies; what they leave out is the border."""
    for axis in axes(run_seed, mode, 60):
        n, l = axis.size, axis.lhs_dilation
        if mode == "zeros":
            low, length = axis.lo, axis.lo + axis.hi + (l * (n - 1) + 1 if n else 0)
        else:
            low, length = l * axis.lo, l * (n + axis.lo + axis.hi - 1) + 1 if n else 0
        first = np.arange(600) * axis.stride - low  # of the window, in dilated steps from the first input on
        last = first + (axis.taps - 1) * axis.rhs_dilation
        fits = last < length - low
        assert axis.out_size == fits.sum(), axis
        inside = fits & (first >= 0) & (last <= l * (n - 1))
        assert list(axis.interior) == np.flatnonzero(inside).tolist(), axis
        assert axis.direct == (range(axis.out_size) if mode == "zeros" else axis.interior)
        border = set(range(axis.out_size)) - set(axis.direct)
        assert axis.border(axis.direct).tolist() == sorted(border)


# axis -> axis ----------------------------------------------------------------------------------------------


def test_the_transposed_axis_exchanges_inputs_and_outputs(run_seed):
    for axis in axes(run_seed, "zeros", 60):
        turned = axis.transpose()
        assert (turned.size, turned.out_size) == (axis.out_size, axis.size)
        want = {(t, o, axis.taps - 1 - p) for o, t, p in oracle.related(axis)}
        assert oracle.related(turned) == want, axis
        assert oracle.related(turned.transpose()) == oracle.related(axis)


def test_the_axis_of_the_kernel_gradient_exchanges_outputs_and_taps(run_seed):
    for axis in axes(run_seed, "zeros", 60):
        exchanged = {(p, t, o) for o, t, p in oracle.related(axis)}
        assert oracle.related(axis.with_taps_as_outputs()) == exchanged, axis


def test_phases_have_no_input_dilation_and_are_the_axis_together(run_seed):
    for axis in axes(run_seed, "zeros", 60):
        found = set()
        phases = axis.polyphase()
        assert len(phases) == min(axis.out_period, max(1, axis.out_size))
        for c, phase in enumerate(phases):
            assert phase.axis.lhs_dilation == 1
            for q, t, p in oracle.related(phase.axis):
                if c + q * len(phases) < axis.out_size:  # else a spare output
                    found.add((c + q * len(phases), t, phase.taps[p]))
        assert found == oracle.related(axis), axis


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_an_axis_over_the_inputs_that_they_read(mode, run_seed):
    rng = np.random.default_rng(run_seed)
    for axis in axes(run_seed, mode, 80):
        cuts = [*range(0, axis.out_size, axis.grain), axis.out_size]
        if len(cuts) < 2:
            continue
        start, stop = sorted(int(v) for v in rng.choice(cuts, 2, replace=False))
        part, inputs = axis.rows(start, stop)
        assert (part.out_size, part.size) == (stop - start, len(inputs))
        i, t, p = part.reads(np.arange(part.out_size))
        want = {(o - start, t, p) for o, t, p in oracle.related(axis) if start <= o < stop}
        assert as_set(i, t + inputs.start, p) == want, axis
        if mode == "zeros":  # no input beyond the windows is kept
            first, last = (o * axis.stride - axis.lo for o in (start, stop - 1))
            last += axis.dilated_taps
            assert all(first <= t * axis.lhs_dilation < last for t in inputs), axis


# counting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_counts_of_random_axes(mode, run_seed):
    for axis in axes(run_seed, mode, 120):
        found = oracle.related(axis)
        assert axis.pair_count == len({(o, t) for o, t, _ in found}), axis
        assert axis.collides == (axis.pair_count < len(found)), axis
        taps = np.bincount([p for _, _, p in found], minlength=axis.taps)
        np.testing.assert_array_equal(axis.tap_counts, taps, str(axis))
        copies = 1
        if axis.padded_size and mode != "zeros":
            padded = np.pad(np.arange(axis.size), (axis.lo, axis.hi), mode=oracle.NUMPY_PAD_MODES[mode])
            copies = np.bincount(padded).max()
        assert axis.copies == copies, axis
        meeting = {(o, t): [] for o, t, _ in found}
        for o, t, p in found:
            meeting[o, t].append(p)
        gram = np.zeros((axis.taps, axis.taps), int)
        for taps in meeting.values():
            gram[np.ix_(taps, taps)] += 1
        np.testing.assert_array_equal(lines.gram(axis), gram, str(axis))


def test_a_long_dilation_has_the_phases_of_its_outputs():
    far = Axis(3, 2, 1, 1, 3, 2**31 - 1).ending_at(4)
    assert [list(phase.taps) for phase in far.polyphase()] == [[1], [0], [], []]


@pytest.mark.parametrize("mode", COPYING)
def test_counts_of_a_wide_window_take_little_memory(mode):
    """10**10 pairs (output, tap) at each end. Copies from within a window add no input to those it has."""
    taps = 10**5 + 1
    axis = Axis(10**6, taps, 1, taps // 2, taps // 2, mode=mode)
    tracemalloc.start()
    within = Axis(axis.size, taps, 1, axis.lo, axis.hi).pair_count
    assert axis.pair_count == (axis.size * taps if mode == "circular" else within)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_counts_of_long_axes_are_closed_forms():
    same = Axis(BIG, 3, 1, 1, 1)
    assert (same.out_size, same.pair_count) == (BIG, 3 * BIG - 2)
    assert same.tap_counts.tolist() == [BIG - 1, BIG, BIG - 1]
    assert Axis(BIG, 3, 1, 1, 1, mode="reflect").pair_count == 3 * BIG - 2
    assert Axis(BIG, 3, 1, 1, 1, mode="symmetric").pair_count == 3 * BIG - 2
    assert Axis(BIG, 3, 1, 1, 1, mode="circular").pair_count == 3 * BIG
    assert Axis(BIG, 2, 1, 0, 0, 2).pair_count == 2 * (BIG - 1)  # an input per tap, between two of its kind


# lines and runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_samples_stand_for_all_lines(mode, run_seed):
    for axis in axes(run_seed, mode, 120):
        found = oracle.related(axis)
        check_lines(axis, lines.output_lines(axis), found, axis.stride)
        check_lines(axis, lines.input_lines(axis), {(t, o, p) for o, t, p in found}, axis.lhs_dilation)


def check_lines(axis, kinds, found, step):
    """Every line is related as its sample is, moved by whole steps; counts are those of the samples."""
    of = {line: {(q, p) for at, q, p in found if at == line} for line in range(kinds.size)}
    sample = kinds.sample_of(np.arange(kinds.size))
    traced = jax.jit(lambda i: kinds.sample_of(i, jnp.where)) if kinds.size == 8 else kinds.sample_of
    np.testing.assert_array_equal(sample, traced(np.arange(kinds.size)))
    np.testing.assert_array_equal(kinds.counts, np.bincount(sample, minlength=len(kinds.counts)), str(axis))
    for line, number in enumerate(sample.tolist()):
        if number == len(kinds.samples):
            assert not of[line], (axis, line)
            continue
        stand_in = int(kinds.samples[number])
        moved = (line - stand_in) // kinds.period * step // math.gcd(axis.stride, axis.lhs_dilation)
        assert of[line] == {(q + moved, p) for q, p in of[stand_in]}, (axis, line)


def test_few_samples_of_a_long_axis():
    for mode in MODES:
        axis = Axis(10**6, 5, 1, 2, 2, mode=mode)
        for kinds in (lines.output_lines(axis), lines.input_lines(axis)):
            assert len(kinds.samples) < 12
            assert kinds.counts.sum() == 10**6


@pytest.mark.parametrize("mode", MODES)
def test_runs_list_the_sorted_pairs(mode, run_seed):
    """Each run is a regular part of the list; together they are all of it."""
    for axis in axes(run_seed, mode, 60):
        pairs = sorted({(o, t) for o, t, _ in oracle.related(axis)})
        listed = [None] * len(pairs)
        for run in lines.output_runs(axis):
            for q, o in enumerate(run.outputs):
                reads = (run.reads + q * run.advance).tolist()
                at = run.start + q * run.stride
                listed[at : at + run.width] = [(o, t) for t in reads]
        assert listed == pairs, axis

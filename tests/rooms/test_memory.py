"""The memory limit and the range of indices: checked before anything is allocated."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometries import CASES, Geometry, integers

import jaxconv_fc as fc

# dense -----------------------------------------------------------------------------------------------


ADVICE = r"`with jaxconv_fc\.memory_limit\(\d+\):`\.$"
IMAGENET = Geometry((1, 3, 224, 224), (64, 3, 3, 3), (1, 1), "SAME")


def test_too_large_a_matrix_is_refused_with_its_size():
    """Asked of the trace: without the check the eager call would take the whole process down."""
    message = r"3,211,264 x 150,528 float32 = 1,801 GiB dense; 86,188,800 stored entries: use .*apply"
    kernel, bias = np.ones(IMAGENET.rhs_shape, np.float32), np.ones(64, np.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(fc.as_matrix, IMAGENET.spec()), kernel)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(fc.as_affine, IMAGENET.spec()), kernel, bias)


def test_the_default_budget_is_eight_gib():
    """One entry less fits, one more does not; asked of the trace, so that nothing is allocated."""
    kernel = jax.ShapeDtypeStruct((1, 1, 1), np.float32)
    fits = fc.conv_spec((1, 1, 2**15), (1, 1, 1), (1,), [(0, 2**15)])
    assert fits.shape == (2**16, 2**15)
    assert jax.eval_shape(partial(fc.as_matrix, fits), kernel).shape == fits.shape
    beyond = fc.conv_spec((1, 1, 2**15), (1, 1, 1), (1,), [(0, 2**15 + 1)])
    with pytest.raises(ValueError, match="8 GiB"):
        jax.eval_shape(partial(fc.as_matrix, beyond), kernel)


def test_the_budget_can_be_changed_and_comes_back(rng):
    spec = CASES["plain"].spec()
    kernel = integers(rng, spec.rhs_shape, np.float32)
    needed = 4 * spec.out_size * spec.in_size
    with fc.memory_limit(needed):
        fc.as_matrix(spec, kernel)
        with fc.memory_limit(needed - 1), pytest.raises(ValueError, match=ADVICE):
            fc.as_matrix(spec, kernel)
        fc.as_matrix(spec, kernel)
    with pytest.raises(RuntimeError, match="inside"), fc.memory_limit(1):
        raise RuntimeError("inside")
    fc.as_matrix(spec, kernel)


def test_the_budget_counts_bytes_of_the_dtype():
    spec = CASES["plain"].spec()
    with fc.memory_limit(4 * spec.out_size * spec.in_size):
        fc.as_matrix(spec, np.ones(spec.rhs_shape, np.float32))
        with pytest.raises(ValueError, match="float64"):
            fc.as_matrix(spec, np.ones(spec.rhs_shape, np.float64))


def test_indices_that_would_overflow_int32_are_refused():
    """With x64 off an index is an int32: row*columns + column would wrap without a word."""
    spec = fc.conv_spec((1, 1, 2**16), (1, 1, 1), (1,), "VALID")
    kernel = jax.ShapeDtypeStruct((1, 1, 1), np.int8)
    build = partial(fc.as_matrix, spec)
    with fc.memory_limit(2**40):
        assert jax.eval_shape(build, kernel).shape == spec.shape
        with jax.enable_x64(False), pytest.raises(ValueError, match=r"65,536 x 65,536.*x64"):
            jax.eval_shape(build, kernel)


def test_a_kernel_matrix_beyond_the_memory_limit_says_what_to_use():
    spec = fc.conv_spec((1, 64, 56, 56), (64, 64, 3, 3), (1, 1), "SAME")
    with pytest.raises(ValueError, match=r"GiB dense.*kernel_vjp"):
        fc.kernel_matrix(spec, jnp.ones(spec.in_shape, jnp.float32))


# sparse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [fc.as_bcoo, fc.as_bcsr, fc.as_scipy])
def test_guard_before_allocating(build):
    spec = fc.conv_spec((1, 64, 224, 224), (64, 64, 3, 3), (1, 1), "SAME")
    kernel = np.zeros(spec.rhs_shape, np.float32)
    with pytest.raises(ValueError, match=r"1,838,694,400 stored entries need .* GiB.*use row_blocks"):
        build(spec, kernel)


FORMATS = [(fc.as_bcoo, "bcoo"), (fc.as_bcsr, "bcsr"), (fc.as_scipy, "bcsr")]


@pytest.mark.parametrize(("build", "size"), FORMATS)
def test_the_limit_is_that_of_the_format(build, size):
    spec = CASES["plain"].spec()
    kernel = np.ones(spec.rhs_shape, np.float32)
    needed = getattr(spec.nbytes("float32"), size)
    with fc.memory_limit(needed):
        build(spec, kernel)
    with fc.memory_limit(needed - 1), pytest.raises(ValueError, match="stored entries need"):
        build(spec, kernel)


def test_the_limit_of_diagonals_counts_all_of_them():
    spec = CASES["plain"].spec()
    kernel = np.ones(spec.rhs_shape, np.float32)
    held = sum(v.nbytes for v in fc.diagonals(spec, kernel).values())
    needed = max(held, spec.nbytes(kernel.dtype).bcoo)  # whose entries are put there
    with fc.memory_limit(needed):
        fc.diagonals(spec, kernel)
    with fc.memory_limit(needed - 1), pytest.raises(ValueError, match=r"diagonals: .* stored entries need"):
        fc.diagonals(spec, kernel)


def test_indices_beyond_int32():
    spec = fc.conv_spec((1, 64, 512, 512), (64, 64, 3, 3), (1, 1), "SAME")
    kernel = np.zeros(spec.rhs_shape, np.float32)
    with (
        jax.enable_x64(False),
        fc.memory_limit(2**50),
        pytest.raises(ValueError, match="jax_enable_x64"),
    ):
        jax.eval_shape(partial(fc.as_bcsr, spec), kernel)
    with fc.memory_limit(2**50):
        assert jax.eval_shape(partial(fc.as_bcsr, spec), kernel).indices.dtype == jnp.int64

"""The assertions for users pass where they should, and fail where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import numbers
from geometries import MODES, Geometry, integers, normals, random_geometry
from jax import lax

import jaxconv_fc as fc
from jaxconv_fc import testing


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.int32, np.float64])
@pytest.mark.parametrize("number", numbers(1, 3))
def test_they_pass_on_any_geometry(number, dtype, run_seed):
    rng = np.random.default_rng([run_seed, number, np.dtype(dtype).num])
    geometry = random_geometry(rng)
    kernel = (normals if np.dtype(dtype).kind in "fc" else integers)(rng, geometry.rhs_shape, dtype)
    spec = geometry.spec()
    testing.assert_transpose(spec, kernel)
    testing.assert_matches_lax(spec, kernel)
    error = testing.dot_test(spec, kernel, key=jax.random.key(number))
    assert isinstance(error, float)
    assert error <= (0 if np.dtype(dtype).kind == "i" else 16 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("mode", MODES)
def test_lax_agrees_in_every_mode(mode, rng):
    geometry = Geometry((1, 4, 4), (4, 2, 3), (2,), [(2, 3)], (2,), (1,), None, 2, padding_mode=mode)
    testing.assert_matches_lax(geometry.spec(), jnp.asarray(normals(rng, geometry.rhs_shape)))


@pytest.fixture
def spec():
    return fc.conv_spec((1, 1, 5), (1, 1, 2), (2,), [(1, 0)])


KERNEL = jnp.array([[[1.0, 2.0]]])


def test_a_wrong_adjoint_is_caught(spec, monkeypatch):
    right = fc.apply_transpose
    monkeypatch.setattr(testing, "apply_transpose", lambda *args, **kw: right(*args, **kw).at[0, 1].add(1))
    assert testing.dot_test(spec, KERNEL) > 1e-3
    with pytest.raises(AssertionError, match=r"apply_transpose and M\.T @ y differ by up to 1 .*\(1,\)"):
        testing.assert_transpose(spec, KERNEL)


def test_a_wrong_transposed_kernel_is_caught(spec, monkeypatch):
    right = fc.transpose
    monkeypatch.setattr(testing, "transpose", lambda s, k: right(s, k[..., ::-1]))
    with pytest.raises(AssertionError, match=r"as_matrix.*M\.T differ"):
        testing.assert_transpose(spec, KERNEL)


def test_a_wrong_matrix_is_caught(spec, monkeypatch):
    right = fc.as_matrix
    monkeypatch.setattr(testing, "as_matrix", lambda s, k: right(s, -k))
    with pytest.raises(AssertionError, match="M @ x and lax differ"):
        testing.assert_matches_lax(spec, KERNEL)


def test_a_hermitian_error_is_caught(spec, monkeypatch):
    right = fc.apply_transpose
    unconjugated = lambda s, k, y, **kw: right(s, k.real.astype(k.dtype), y, **kw)  # noqa: E731
    monkeypatch.setattr(testing, "apply_transpose", unconjugated)
    assert testing.dot_test(spec, lax.complex(KERNEL, KERNEL)) > 1e-3


def test_an_error_beyond_rounding_is_caught(spec, monkeypatch):
    """The bound is that of the few terms there are, not a generous one."""
    right = fc.as_matrix
    monkeypatch.setattr(testing, "as_matrix", lambda s, k: right(s, k * (1 + 1e-14)))
    kernel = KERNEL.astype(jnp.float64)
    with pytest.raises(AssertionError, match="M @ x and lax differ"):
        testing.assert_matches_lax(spec, kernel)
    with pytest.raises(AssertionError, match=r"apply_transpose and M\.T @ y differ"):
        testing.assert_transpose(spec, kernel)


def test_nan_is_caught(spec, monkeypatch):
    """NaN is neither larger nor smaller than a bound."""
    monkeypatch.setattr(testing, "apply", lambda s, k, x, **kw: jnp.full(s.out_shape, jnp.nan))
    with pytest.raises(AssertionError, match="apply and lax differ"):
        testing.assert_matches_lax(spec, KERNEL)


def test_a_wrong_product_is_caught(spec, monkeypatch):
    right = fc.apply
    monkeypatch.setattr(testing, "apply", lambda s, k, x, **kw: right(s, 2 * k, x, **kw))
    with pytest.raises(AssertionError, match="apply and lax differ"):
        testing.assert_matches_lax(spec, KERNEL)
    with pytest.raises(AssertionError, match=r"jax\.linear_transpose\(apply\) and M\.T @ y differ"):
        testing.assert_transpose(spec, KERNEL)


def test_an_error_of_the_hermitian_transpose_alone_is_caught(spec, monkeypatch):
    """The plain transpose is right where the imaginary part is positive, as that of this kernel is."""
    right = fc.apply_transpose
    one_sided = lambda s, k, y, **kw: right(s, lax.complex(k.real, abs(k.imag)), y, **kw)  # noqa: E731
    monkeypatch.setattr(testing, "apply_transpose", one_sided)
    assert testing.dot_test(spec, lax.complex(KERNEL, KERNEL)) > 1e-3

"""What the tests of spectrum share: geometries with their matrices, and the number of random ones."""

import geometries
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count, numbers

import jaxconv_fc as fc

every_number = pytest.mark.parametrize("number", numbers(count("GEOMETRIES", 2), 10))


def conv(n, kernel, padding, mode="zeros", stride=1, **options):
    """A convolution of images of shape n, one channel: (spec, kernel)."""
    kernel = np.asarray(kernel, float)
    spec = fc.conv_spec(
        (1, 1, *n), (1, 1, *kernel.shape), (stride,) * len(n), padding, padding_mode=mode, **options
    )
    return spec, jnp.asarray(kernel[None, None])


def layer(mode="zeros", groups=1):
    """A square layer of two channels: (spec, kernel)."""
    options = {"padding_mode": mode, "feature_group_count": groups}
    spec = fc.conv_spec((1, 2, 4, 4), (2, 2 // groups, 3, 3), (1, 1), "SAME", **options)
    return spec, jnp.asarray(np.random.default_rng(1).standard_normal(spec.rhs_shape))


def drawn(run_seed, number):
    """A random geometry: (spec, kernel, y, the oracle's matrix, a name that replays it)."""
    rng = np.random.default_rng([run_seed, number])
    geometry = geometries.random_geometry(rng)
    dtype = np.complex128 if (number + run_seed) % 2 else np.float64
    kernel, _, y = geometries.arrays(geometry, rng, dtype, geometries.normals)
    name = f"seed {run_seed}, number {number}: {geometry}"
    return geometry.spec(), kernel, y, oracle.matrix(kernel, geometry), name


def svd(matrix):
    """The singular values of a matrix, which may be empty."""
    return np.linalg.svd(matrix, compute_uv=False) if matrix.size else np.zeros(0)

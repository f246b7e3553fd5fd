"""The select forms, which a TPU runs, executed here: they equal the scatter forms exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from environment import count
from geometries import CASES, Geometry, every_case, integers, random_geometry
from jax import export

import jaxconv_fc as fc
from jaxconv_fc import adjoint, dense, selects

COUNT = count("GEOMETRIES", 16)
CHUNKS = max(4, COUNT // 50)
DTYPES = ("float32", "int32", "bool", "complex64", "bfloat16", "uint8", "float64", "int8", "float16")
LARGE = Geometry((1, 1, 5, 7), (2, 1, 5, 7), (1, 1), "SAME", padding_mode="circular")  # 35 taps: two steps


def forms(spec):
    """By name: the form of a TPU, and that of other platforms."""
    return {
        "matrix": (partial(selects.matrix, spec), partial(dense._scattered, spec)),
        "update": (partial(selects.updated, spec), partial(dense._rewritten, spec)),
        "sums": (partial(selects.sums, spec), partial(adjoint._gathered_sums, spec, lambda entry: entry)),
        "patches": (partial(selects.kernel_matrix, spec), partial(adjoint._gathered_kernel_matrix, spec)),
        "rows": (partial(dense._selected_rows, spec), partial(dense._scattered_rows, spec)),
        "columns": (partial(dense._selected_columns, spec), partial(dense._scattered_columns, spec)),
    }


def operands(geometry, rng, dtype):
    """By name of the form."""
    spec = geometry.spec()
    kernel, matrix = integers(rng, spec.rhs_shape, dtype), integers(rng, spec.shape, dtype)
    rows, columns = (np.asarray(rng.integers(0, n, 5), np.int32) for n in spec.shape)
    return {
        "matrix": (kernel,),
        "update": (matrix, kernel),
        "sums": (matrix,),
        "patches": (integers(rng, spec.in_shape, dtype),),
        "rows": (kernel, rows),
        "columns": (kernel, columns),
    }


@partial(jax.jit, static_argnums=(0, 1))
def evaluated(spec, which, given):
    """Every form on its operands, and the transpose of each that is linear: one program per geometry."""
    values = {name: forms(spec)[name][which](*args) for name, args in given.items()}
    return values, {name: pulled(forms(spec)[name][which], args, values[name]) for name, args in given.items()}


def pulled(form, args, cotangent):
    """The cotangents of the operands that are not indices."""
    if cotangent.dtype == bool:
        return ()
    linear = [v for v in args if v.dtype == cotangent.dtype]
    fixed = args[len(linear) :] if len(linear) < len(args) else ()
    return jax.linear_transpose(lambda *v: form(*v, *fixed), *linear)(cotangent)


def with_special_values(given, rng):
    """The same floats with a few that are not finite."""
    def spoiled(v):
        if v.dtype.kind != "f" or not v.size:
            return v
        v = v.copy()
        v.ravel()[rng.integers(0, v.size, 2)] = rng.choice([np.inf, -np.inf, np.nan], 2)
        return v

    return {name: tuple(map(spoiled, args)) for name, args in given.items()}


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_geometries(chunk, run_seed):
    """Whole numbers, every dtype in turn: values and transposes are equal, not close."""
    for i in range(chunk, COUNT, CHUNKS):
        rng = np.random.default_rng([run_seed, i, 16])
        geometry, dtype = random_geometry(rng), DTYPES[i % len(DTYPES)]
        check(geometry, operands(geometry, rng, dtype), f"JAXCONV_FC_SEED={run_seed}, number {i}, {dtype}")

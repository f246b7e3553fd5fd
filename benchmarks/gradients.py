"""Between matrices and kernels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxconv_fc as fc
from benchmarks.dense import geometries
from benchmarks.layers import conv_one, kernel_of, random
from benchmarks.rows import Cannot, Row, Table, jitted, text


def _specs(quick):
    names = (
        "3x3 SAME",
        "stride 2",
        "dilation 2",
        "4 groups",
        "depthwise",
        "1-D, 5 taps",
        "circular",
        "float64",
    )
    return {name: found for name, found in geometries(quick).items() if name in names}


def _probe(spec, kernel):
    """M^T by probing, whose derivative in the kernel JAX knows."""
    eye = jnp.eye(spec.in_size, dtype=kernel.dtype).reshape(-1, *spec.in_shape)
    return jax.vmap(partial(conv_one, spec, kernel))(eye)


def _probing(fn, spec, *arguments):
    if spec.feature_group_count > 1 and jax.default_backend() == "cpu":
        raise Cannot("takes minutes")
    return jitted(fn, *arguments)


def _matrix_vjp(quick):
    for name, (spec, dtype) in _specs(quick).items():
        with jax.enable_x64(dtype == "float64"):
            matrix, kernel = random(spec.shape, dtype), kernel_of(spec, dtype)
            turned = matrix.T.reshape(spec.in_size, *spec.out_shape)

            def probing(bar, kernel, spec=spec):
                return jax.vjp(partial(_probe, spec), kernel)[1](bar)[0]

            others = {"vjp of vmap(conv)(eye)": partial(_probing, probing, spec, turned, kernel)}
            ours, read = (
                partial(jitted, partial(fc.matrix_vjp, spec), matrix),
                partial(jitted, jnp.sum, matrix),
            )
            yield Row(name, ours, others, read, text(spec.nbytes(dtype).dense), _values)


def _projection(quick):
    for name, (spec, dtype) in _specs(quick).items():
        with jax.enable_x64(dtype == "float64"):
            matrix = random(spec.shape, dtype)
            ours = partial(jitted, partial(fc.kernel_from_matrix, spec), matrix)
            yield Row(
                name, ours, {}, partial(jitted, jnp.sum, matrix), text(spec.nbytes(dtype).dense), _values
            )


def _per_example(quick):
    """Kernel gradients of every example, and their sum: by its own function, and as a caller may write it."""
    channels, n, count = (2, 5, 3) if quick else (32, 28, 64)
    for name, groups in (("3x3", 1), ("depthwise", channels)):
        shapes = (1, channels, n, n), (channels, channels // groups, 3, 3)
        spec = fc.conv_spec(*shapes, (1, 1), "SAME", feature_group_count=groups)
        xs, ys, kernel = (
            random((count, *spec.in_shape)),
            random((count, *spec.out_shape), seed=2),
            kernel_of(spec),
        )

        def pulled(apply, kernel, xs, ys):
            return jax.vjp(lambda k: jax.vmap(partial(apply, k))(xs), kernel)[1](ys)[0]

        def of_each(apply, kernel, xs, ys):
            return jax.vmap(lambda x, y: jax.vjp(lambda k: apply(k, x), kernel)[1](y)[0])(xs, ys)

        mine, theirs = partial(fc.apply, spec), partial(conv_one, spec)
        each = jax.vmap(partial(fc.kernel_vjp, spec))
        yield Row(
            f"{name}, each",
            partial(jitted, each, xs, ys),
            {"lax": partial(jitted, partial(of_each, theirs), kernel, xs, ys)},
            value=_values,
        )
        yield Row(
            f"{name}, their sum",
            partial(jitted, partial(pulled, mine), kernel, xs, ys),
            {
                "lax": partial(jitted, partial(pulled, theirs), kernel, xs, ys),
                "vmap(kernel_vjp), then sum": partial(
                    jitted, lambda xs, ys, each=each: each(xs, ys).sum(0), xs, ys
                ),
            },
            value=_values,
        )


def _values(result):
    return np.asarray(result, np.float64).ravel()


TABLES = (
    Table(
        "matrix_vjp",
        "A cotangent of M to the kernel: `matrix_vjp`",
        "one read of the cotangent",
        _matrix_vjp,
        times=2,
    ),
    Table(
        "projection",
        "The nearest convolution to a matrix: `kernel_from_matrix`",
        "one read of the matrix",
        _projection,
    ),
    Table("per_example", "Kernel gradients of 64 examples", "", _per_example),
)

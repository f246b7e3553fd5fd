"""Every public function by its full name, called on sample arguments: the rows of every table of the tests.

A row is a function of ``(spec, kernel, x, y)``, so a test may call it with arrays of another dtype, or inside
a transformation of JAX. What is no array is returned as text or as NumPy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax

import jaxconv_fc as fc
from jaxconv_fc import curvature, neurons, show, spectrum, testing

MODULES = {"": fc, "curvature.": curvature, "spectrum.": spectrum, "neurons.": neurons, "show.": show}
MODULES |= {"testing.": testing}
PUBLIC = {prefix + name for prefix, module in MODULES.items() for name in module.__all__}
CLASSES = {
    "ConvSpec",
    "ConvSite",
    "AffineLayer",
    "AffineLayers",
    "curvature.ModelLayer",
    "spectrum.PowerStep",
    "spectrum.SingularTriplet",
    "neurons.Field",
}

SPEC = fc.conv_spec((1, 2, 4), (2, 2, 3), (1,), "SAME")  # a square M
POINTWISE = fc.conv_spec((1, 2, 4), (2, 2, 1), (1,), "VALID")


def samples(dtype=np.float32, spec=SPEC):
    """Kernel, x and y: small whole numbers, with an M that is far from singular."""
    shapes = spec.rhs_shape, spec.in_shape, spec.out_shape
    kernel, x, y = (np.arange(1, 1 + np.prod(shape)).reshape(shape) % 5 for shape in shapes)
    kernel[np.arange(2), np.arange(2), 1] = 9  # the diagonal of M
    return kernel.astype(dtype), x.astype(dtype), y.astype(dtype)


class Row(NamedTuple):
    call: Callable[..., Any]  # of (spec, kernel, x, y)
    jit: bool  # kernel, x and y may be traced, and a vmap may map over them
    grad: bool  # the result is differentiable in the kernel or x


def traced(call):
    return Row(call, True, False)


def smooth(call):
    return Row(call, True, True)


def host(call):
    return Row(call, False, False)


def layer(spec, kernel):
    """The convolution as lax has it, with an activation, of one example."""
    options = (spec.window_strides, spec.padding, spec.lhs_dilation, spec.rhs_dilation)
    return lambda x: lax.conv_general_dilated(jax.nn.relu(x)[None], kernel, *options)[0]


def of_layer(kernel, xs):
    """A loss that is a sum over examples."""
    return (lax.conv(xs, kernel, (1,), "SAME") ** 2).sum()


def linear(spec, kernel):
    return lambda x: fc.apply(spec, kernel, x)


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("i",))


def limited(spec, kernel, x, y):
    with fc.memory_limit(10**6):
        return fc.as_matrix(spec, kernel)


def of_artist(axes):
    """What a picture says, and how much it draws."""
    words = axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), len(axes.get_children())
    plt.close("all")
    return str(words)


def animated(spec, kernel):
    animation = show.animate(spec, kernel, rows=[0, 1])
    animation._draw_was_started = True  # it is not shown
    plt.close("all")
    return type(animation).__name__


def pictures(call):
    return host(lambda s, k, x, y: of_artist(call(s, k)))


def blocks(spec, kernel):
    return [(str(block.out_slice), block.matrix.toarray()) for block in fc.row_blocks(spec, kernel, 400)]


TABLE = {
    # the geometry
    "conv_spec": host(lambda s, k, x, y: str(fc.conv_spec((1, *x.shape), k.shape, (1,), "SAME"))),
    "row_block": host(lambda s, k, x, y: str(fc.row_block(s, 1, 3))),
    # M, dense
    "as_matrix": smooth(lambda s, k, x, y: fc.as_matrix(s, k)),
    "as_affine": smooth(lambda s, k, x, y: fc.as_affine(s, k, y)),
    "matrix_rows": smooth(lambda s, k, x, y: fc.matrix_rows(s, k, [0, 3])),
    "matrix_columns": smooth(lambda s, k, x, y: fc.matrix_columns(s, k, [0, 3])),
    "update_matrix": smooth(lambda s, k, x, y: fc.update_matrix(s, jnp.zeros(s.shape, k.dtype), k)),
    "memory_limit": smooth(limited),
    # M, sparse and distributed
    "as_bcoo": smooth(lambda s, k, x, y: fc.as_bcoo(s, k)),
    "as_bcsr": smooth(lambda s, k, x, y: fc.as_bcsr(s, k)),
    "as_scipy": host(lambda s, k, x, y: fc.as_scipy(s, k).toarray()),
    "as_scipy_affine": host(lambda s, k, x, y: fc.as_scipy_affine(s, k, y)[1]),
    "diagonals": smooth(lambda s, k, x, y: fc.diagonals(s, k, rows=fc.interleaved_rows(s))),
    "diagonal_offsets": host(lambda s, k, x, y: fc.diagonal_offsets(s)),
    "interleaved_rows": host(lambda s, k, x, y: fc.interleaved_rows(s)),
    "row_blocks": host(lambda s, k, x, y: blocks(s, k)),
    "shard_matrix": traced(lambda s, k, x, y: fc.shard_matrix(s, k, mesh())),
    "shard_bcoo": traced(lambda s, k, x, y: fc.shard_bcoo(s, k, mesh())),
    # products without M
    "apply": smooth(lambda s, k, x, y: fc.apply(s, k, x)),
    "apply_transpose": smooth(lambda s, k, x, y: fc.apply_transpose(s, k, y)),
    "kernel_vjp": smooth(lambda s, k, x, y: fc.kernel_vjp(s, x, y)),
    "batched_apply": smooth(lambda s, k, x, y: fc.batched_apply(s, k, jnp.stack([x, -x]))),
    "conv_general_dilated": smooth(lambda s, k, x, y: fc.conv_general_dilated(x[None], k, (1,), "SAME")),
    "as_linear_operator": smooth(lambda s, k, x, y: fc.as_linear_operator(s, k).mv(x)),
    # transpose and gradients
    "transpose": smooth(lambda s, k, x, y: fc.transpose(s, k)[1]),
    "kernel_matrix": smooth(lambda s, k, x, y: fc.kernel_matrix(s, x)),
    "matrix_vjp": smooth(lambda s, k, x, y: fc.matrix_vjp(s, fc.as_matrix(s, k))),
    "kernel_from_matrix": smooth(lambda s, k, x, y: fc.kernel_from_matrix(s, fc.as_matrix(s, k))),
    "conv_distance": smooth(lambda s, k, x, y: fc.conv_distance(s, fc.as_matrix(s, k) + x[0, 0])),
    "detect_conv": host(lambda s, k, x, y: fc.detect_conv(fc.as_matrix(s, k), s.in_shape, s.out_shape)),
    "nearest_conv": host(lambda s, k, x, y: fc.nearest_conv(fc.as_matrix(s, k), s.in_shape, s.out_shape)),
    "compose": smooth(lambda s, k, x, y: fc.compose((POINTWISE, k[..., :1]), (s, k))[1]),
    # gradients of a batch
    "curvature.patch_moment": smooth(lambda s, k, x, y: curvature.patch_moment(s, x[None])),
    "curvature.kfac_factors": smooth(
        lambda s, k, x, y: curvature.kfac_factors(s, x[None], y[None], bias=True)
    ),
    "curvature.gradient_norms": smooth(lambda s, k, x, y: curvature.gradient_norms(s, x[None], y[None])),
    "curvature.gradient_gram": smooth(lambda s, k, x, y: curvature.gradient_gram(s, x[None], y[None])),
    "curvature.model_gradient_norms": smooth(
        lambda s, k, x, y: curvature.model_gradient_norms(of_layer, k, x[None])
    ),
    "curvature.model_gram": smooth(lambda s, k, x, y: curvature.model_gram(of_layer, k, x[None])),
    "curvature.model_kfac": smooth(lambda s, k, x, y: curvature.model_kfac(of_layer, k, x[None])),
    "curvature.model_layers": host(lambda s, k, x, y: curvature.model_layers(of_layer, k, x[None])[0].y_bars),
    # any function of JAX
    "find_convs": host(lambda s, k, x, y: str([(c.spec, c.times) for c in fc.find_convs(layer(s, k), x)])),
    "fully_connected": smooth(lambda s, k, x, y: fc.fully_connected(layer(s, k))(x)),
    "with_products": smooth(lambda s, k, x, y: fc.with_products(layer(s, k))(x)),
    "matrix_of": smooth(lambda s, k, x, y: fc.matrix_of(linear(s, k), x)),
    "sparse_matrix_of": host(lambda s, k, x, y: fc.sparse_matrix_of(linear(s, k), x).matrix.toarray()),
    "affine_layers": host(lambda s, k, x, y: fc.affine_layers(layer(s, k), x).evaluate(x)),
    "as_conv": host(lambda s, k, x, y: fc.as_conv(linear(s, k), x)[1:]),
    "local_affine": smooth(lambda s, k, x, y: tuple(fc.local_affine(layer(s, k), x))),
    # to see
    "format_matrix": host(lambda s, k, x, y: str(fc.format_matrix(s, k))),
    "show.format_matrix": host(lambda s, k, x, y: str(show.format_matrix(s, k))),
    "show.spy": pictures(lambda s, k: show.spy(s, k)),
    "show.receptive_field": pictures(lambda s, k: show.receptive_field(s, 3, kernel=k)),
    "show.animate": host(lambda s, k, x, y: animated(s, k)),
    # neurons
    "neurons.column": host(lambda s, k, x, y: neurons.column(s, (1, 2))),
    "neurons.coverage": host(lambda s, k, x, y: neurons.coverage(s)),
    "neurons.input_position": host(lambda s, k, x, y: neurons.input_position(s, 3)),
    "neurons.position": host(lambda s, k, x, y: neurons.position(s, 3)),
    "neurons.projective_field": host(lambda s, k, x, y: neurons.projective_field(s, 3).mask),
    "neurons.receptive_field": host(
        lambda s, k, x, y: (
            neurons.receptive_field(s, 3).mask,
            neurons.receptive_field(layer(s, k), x, 3).mask,
        )
    ),
    "neurons.row": host(lambda s, k, x, y: neurons.row(s, (1, 2))),
    # assertions
    "testing.assert_matches_lax": host(lambda s, k, x, y: testing.assert_matches_lax(s, k, x)),
    "testing.assert_transpose": host(lambda s, k, x, y: testing.assert_transpose(s, k)),
    "testing.dot_test": host(lambda s, k, x, y: testing.dot_test(s, k) < 1e-5),
    # norms and spectrum
    "spectrum.column_norms": smooth(lambda s, k, x, y: spectrum.column_norms(s, k)),
    "spectrum.row_norms": smooth(lambda s, k, x, y: spectrum.row_norms(s, k, ord=1)),
    "spectrum.one_norm": smooth(lambda s, k, x, y: spectrum.one_norm(s, k)),
    "spectrum.inf_norm": smooth(lambda s, k, x, y: spectrum.inf_norm(s, k)),
    "spectrum.frobenius_norm": smooth(lambda s, k, x, y: spectrum.frobenius_norm(s, k)),
    "spectrum.orthogonality_residual": smooth(lambda s, k, x, y: spectrum.orthogonality_residual(s, k)),
    "spectrum.trace": smooth(lambda s, k, x, y: spectrum.trace(s, k)),
    "spectrum.rank": traced(lambda s, k, x, y: spectrum.rank(s, k)),
    "spectrum.condition_number": smooth(lambda s, k, x, y: spectrum.condition_number(s, k)),
    "spectrum.log_abs_det": smooth(lambda s, k, x, y: spectrum.log_abs_det(s, k)),
    "spectrum.singular_values": smooth(lambda s, k, x, y: spectrum.singular_values(s, k)),
    "spectrum.spectral_norm": smooth(lambda s, k, x, y: spectrum.spectral_norm(s, k)),
    "spectrum.spectral_norm_bounds": smooth(lambda s, k, x, y: spectrum.spectral_norm_bounds(s, k)),
    "spectrum.singular_triplet": smooth(lambda s, k, x, y: tuple(spectrum.singular_triplet(s, k)[:3])),
    "spectrum.top_singular_values": smooth(lambda s, k, x, y: spectrum.top_singular_values(s, k, 2)),
    "spectrum.power_step": smooth(lambda s, k, x, y: spectrum.power_step(s, k, x)),
    "spectrum.start_vector": traced(lambda s, k, x, y: spectrum.start_vector(s, k.dtype, jax.random.key(0))),
    "spectrum.solve": smooth(lambda s, k, x, y: spectrum.solve(s, k, y)),
    "spectrum.lstsq": smooth(lambda s, k, x, y: spectrum.lstsq(s, k, y)),
    "spectrum.pseudo_inverse": smooth(lambda s, k, x, y: spectrum.pseudo_inverse(s, k, y)),
}


def call(name, dtype=np.float32, spec=SPEC):
    """The function of this name on the sample arguments."""
    return TABLE[name].call(spec, *samples(dtype, spec))

"""jit, vmap, grad and transposes: M is an ordinary JAX array, linear in the kernel.

python examples/gradients.py
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv_fc as fc

# On GPU and TPU the default precision of float32 products is lower than float32; on CPU this changes nothing.
jax.config.update("jax_default_matmul_precision", "highest")

# 3 channels of 8x8 pixels, 4 filters of 3x3, every second pixel: M is 64 x 192.
SPEC = fc.conv_spec((1, 3, 8, 8), (4, 3, 3, 3), (2, 2), "SAME")


def check(what, got, want):
    """Equal up to float32 rounding, of sums with at most a few hundred terms."""
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    print(f"{what}: max difference {np.abs(np.subtract(got, want)).max():.1e}")


def compiled(kernel, x):
    """A spec is hashable and static, so it passes through jit like any array."""
    matrix = jax.jit(fc.as_matrix)(SPEC, kernel)
    y = lax.conv_general_dilated(x[None], kernel, SPEC.window_strides, "SAME")[0]
    check("jit(as_matrix) @ x is the convolution", matrix @ x.ravel(), y.ravel())


def many_kernels(kernel, x):
    """vmap over kernels gives a stack of matrices."""
    kernels = jnp.stack([kernel, 2 * kernel, -kernel])
    matrices = jax.vmap(partial(fc.as_matrix, SPEC))(kernels)
    print("vmap over 3 kernels:", matrices.shape)
    check("the second is twice the first", matrices[1], 2 * matrices[0])


def gradient_through_the_matrix(kernel, x):
    """Any function of M can be differentiated to the kernel.

    For f = |M x|^2 / 2 that gradient is the one of the convolution itself.
    """

    def with_matrix(kernel):
        return jnp.sum((fc.as_matrix(SPEC, kernel) @ x.ravel()) ** 2) / 2

    def with_convolution(kernel):
        return jnp.sum(lax.conv_general_dilated(x[None], kernel, SPEC.window_strides, "SAME") ** 2) / 2

    got, want = jax.grad(with_matrix)(kernel), jax.grad(with_convolution)(kernel)
    check("grad through M is grad through lax", got, want)

    def orthogonality_penalty(kernel):  # what only the matrix gives: how far its rows are from orthonormal
        matrix = fc.as_matrix(SPEC, kernel)
        return jnp.sum((matrix @ matrix.T - jnp.eye(SPEC.out_size)) ** 2)

    step = 1e-3 * jax.grad(orthogonality_penalty)(kernel)
    before, after = orthogonality_penalty(kernel), orthogonality_penalty(kernel - step)
    assert after < before
    print(f"a gradient step on |M M^T - I|^2: {before:.1f} -> {after:.1f}")


def products_without_the_matrix(kernel, x):
    """apply is M x and apply_transpose is M^T y; neither builds M, so size is no obstacle."""
    matrix = fc.as_matrix(SPEC, kernel)
    y = fc.apply(SPEC, kernel, x)
    back = fc.apply_transpose(SPEC, kernel, y)
    check("apply is M x", y.ravel(), matrix @ x.ravel())
    check("apply_transpose is M^T y", back.ravel(), matrix.T @ y.ravel())
    check("<M x, y> = <x, M^T y>", jnp.vdot(y, y), jnp.vdot(x, back))

    (transposed,) = jax.linear_transpose(partial(fc.apply, SPEC, kernel), x)(y)
    check("jax.linear_transpose(apply) is apply_transpose", transposed, back)

    batch = jnp.stack([x, -x, 2 * x])  # M belongs to one example; vmap makes it a batch
    batched = jax.vmap(partial(fc.apply, SPEC, kernel))(batch)
    check("vmap(apply) is the batched convolution", batched, jnp.stack([y, -y, 2 * y]))


def main():
    key_k, key_x = jax.random.split(jax.random.key(0))
    kernel = 0.2 * jax.random.normal(key_k, SPEC.rhs_shape)
    x = jax.random.normal(key_x, SPEC.in_shape)
    for example in (compiled, many_kernels, gradient_through_the_matrix, products_without_the_matrix):
        example(kernel, x)


if __name__ == "__main__":
    main()

"""M x, M^T y and the kernel gradient without M; a solver's loop; and M in place of a convolution."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxconv_fc as fc
from benchmarks import peers
from benchmarks.layers import NHWC, conv, conv_one, conv_transpose_one, kernel_gradient_one, kernel_of, random
from benchmarks.rows import Row, Table, jitted

VERBS = ("apply", "apply_transpose", "kernel_vjp")


def geometries(quick):
    """name -> (spec, dtype)"""
    channels, n = (4, 9) if quick else (64, 56)
    square, kernel = (1, channels, n, n), (channels, channels, 3, 3)
    layer = partial(fc.conv_spec, square)
    ones = [(1, 1), (1, 1)]
    stride = layer(kernel, (2, 2), ones)
    last = fc.conv_spec((1, n, n, channels), (3, 3, channels, channels), (1, 1), ones, dimension_numbers=NHWC)
    specs = {
        "3x3": layer(kernel, (1, 1), ones),
        "NHWC": last,
        "stride 2": stride,
        "dilation 2": layer(kernel, (1, 1), [(2, 2), (2, 2)], rhs_dilation=(2, 2)),
        "4 groups": layer((channels, channels // 4, 3, 3), (1, 1), ones, feature_group_count=4),
        "depthwise": layer((channels, 1, 3, 3), (1, 1), ones, feature_group_count=channels),
        "input dilation 2": layer(kernel, (1, 1), ones, (2, 2)),
        "circular": layer(kernel, (1, 1), ones, padding_mode="circular"),
    }
    return {name: (spec, "float32") for name, spec in specs.items()} | {
        "stride 2, float64": (stride, "float64"),
        "3x3, float64": (specs["3x3"], "float64"),
    }


def _products(verb, count, quick):
    """One example, or a stack of them through vmap."""
    for name, (spec, dtype) in geometries(quick).items():
        with jax.enable_x64(dtype == "float64"):
            kernel, stack = kernel_of(spec, dtype), (count,) if count > 1 else ()
            x, y = random((*stack, *spec.in_shape), dtype), random((*stack, *spec.out_shape), dtype, seed=2)
            ours, theirs = {
                "apply": (partial(fc.apply, spec, kernel), partial(conv_one, spec, kernel)),
                "apply_transpose": (
                    partial(fc.apply_transpose, spec, kernel),
                    partial(conv_transpose_one, spec, kernel),
                ),
                "kernel_vjp": (partial(fc.kernel_vjp, spec), partial(kernel_gradient_one, spec)),
            }[verb]
            operands = {"apply": (x,), "apply_transpose": (y,), "kernel_vjp": (x, y)}[verb]
            if count > 1:
                ours, theirs = _stacked(verb, ours, theirs, spec, kernel)
            others = {"lax": partial(jitted, theirs, *operands)}
            if count == 1:
                others["torch"] = partial(peers.torch_product, spec, kernel, x, y, verb)
                if verb != "kernel_vjp" and not quick:
                    transpose = verb == "apply_transpose"
                    v = y if transpose else x
                    others["SciPy CSR"] = partial(peers.scipy_product, spec, kernel, v, transpose)
            copy = partial(jitted, lambda *vs: [v + 1 for v in vs], x, y)
            size = f"{spec.in_size:,} to {spec.out_size:,}" + (f", batch {count}" if count > 1 else "")
            yield Row(name, partial(jitted, ours, *operands), others, copy, size, _values)


def _stacked(verb, ours, theirs, spec, kernel):
    """A batch as each would take it: ours through vmap, lax's whole; a kernel gradient is summed over it."""
    batch_in, batch_out = spec.dimension_numbers.lhs_spec[0], spec.dimension_numbers.out_spec[0]

    def whole(kernel, xs):
        return jnp.moveaxis(conv(spec, kernel, jnp.moveaxis(xs, 0, batch_in)), batch_out, 0)

    def shaped(shape, v):
        return jax.ShapeDtypeStruct((v.shape[0], *shape), v.dtype)

    if verb == "apply":
        return jax.vmap(ours), partial(whole, kernel)
    if verb == "apply_transpose":
        return jax.vmap(ours), lambda ys: jax.linear_transpose(
            partial(whole, kernel), shaped(spec.in_shape, ys)
        )(ys)[0]

    def gradient(fn, xs, ys):
        return jax.linear_transpose(lambda k: fn(k, xs), kernel)(ys)[0]

    return partial(gradient, jax.vmap(partial(fc.apply, spec), (None, 0))), partial(gradient, whole)


def _values(result):
    return np.asarray(result.cpu() if hasattr(result, "cpu") else result, np.float64).ravel()


# a solver's loop -------------------------------------------------------------------------------------------

STEPS = 100
TINY = 1e-30  # a residual may become 0


def _conjugate_gradients(forward, backward, x):
    """100 steps for (M^T M + I) v = x, in a loop."""

    def normal(v):
        return backward(forward(v)) + v

    def step(_, state):
        v, r, p, rr = state
        q = normal(p)
        alpha = rr / (jnp.vdot(p, q) + TINY)
        v, r = v + alpha * p, r - alpha * q
        new = jnp.vdot(r, r)
        return v, r, r + new / (rr + TINY) * p, new

    return lax.fori_loop(0, STEPS, step, (jnp.zeros_like(x), x, x, jnp.vdot(x, x)))[0]


def _loops(quick):
    channels, n = (3, 6) if quick else (32, 28)
    for name, dtype in (("float32", "float32"), ("float64", "float64")):
        with jax.enable_x64(dtype == "float64"):
            spec = fc.conv_spec((1, channels, n, n), (channels, channels, 3, 3), (1, 1), "SAME")
            kernel = kernel_of(spec, dtype) / 2
            x = random(spec.in_shape, dtype)

            def ours(kernel, x, spec=spec):
                return _conjugate_gradients(
                    partial(fc.apply, spec, kernel), partial(fc.apply_transpose, spec, kernel), x
                )

            def obvious(kernel, x, spec=spec):
                return _conjugate_gradients(
                    partial(conv_one, spec, kernel), partial(conv_transpose_one, spec, kernel), x
                )

            yield Row(
                f"{STEPS} steps, {name}",
                partial(jitted, ours, kernel, x),
                {"lax and linear_transpose": partial(jitted, obvious, kernel, x)},
                size=f"{channels} channels, {n}x{n}, NCHW",
                value=_values,
            )


# a matrix in place of a convolution ------------------------------------------------------------------------


def stacks(quick):
    n = 6 if quick else 28
    return {
        "depthwise 3x3, 32 channels": fc.conv_spec(
            (1, 32, n, n), (32, 1, 3, 3), (1, 1), "SAME", feature_group_count=32
        ),
        "one channel 5x5": fc.conv_spec((1, 1, n, n), (1, 1, 5, 5), (1, 1), "SAME"),
        "kernel as large as the image": fc.conv_spec((1, 4, 8, 8), (4, 4, 8, 8), (1, 1), "SAME"),
        "3-D, 2 channels": fc.conv_spec((1, 2, 8, 8, 8), (2, 2, 3, 3, 3), (1, 1, 1), "SAME"),
        "16 channels, 3x3": fc.conv_spec((1, 16, 16, 16), (16, 16, 3, 3), (1, 1), "SAME"),
        "1-D, 2 channels": fc.conv_spec((1, 2, 20 * n), (2, 2, 5), (1,), "SAME"),
    }


def _batches(quick):
    for name, spec in stacks(quick).items():
        for dtype in ("float32", "float64"):
            for count in (4,) if quick else (16, 128, 1024):
                with jax.enable_x64(dtype == "float64"):
                    yield _batch(name, spec, dtype, count)


def _batch(name, spec, dtype, count):
    kernel, xs = kernel_of(spec, dtype), random((count, *spec.in_shape), dtype)
    ways = {
        method: partial(jitted, partial(fc.batched_apply, spec, method=method), kernel, xs)
        for method in ("sparse", "dense")
    }
    if 8 * spec.out_size * spec.in_size > 2e8:
        ways.pop("dense")
    lax_way = partial(jitted, jax.vmap(partial(conv_one, spec), (None, 0)), kernel, xs)
    ours = partial(jitted, partial(fc.batched_apply, spec), kernel, xs)
    copy = partial(jitted, lambda xs: xs + 1, xs)
    return Row(f"{name}, {dtype}, batch {count}", ours, {"lax": lax_way} | ways, copy, value=_values)


def _random_layers(quick):
    """30 layers as they come: is the way that batched_apply takes ever a bad one?"""
    rng = np.random.default_rng(30)
    for number in range(2 if quick else 30):
        n = int(rng.integers(1, 4))
        channels, outs = (int(2 ** rng.integers(0, 7 - n)) for _ in range(2))
        size, taps = int(rng.integers(4, (200, 40, 12)[n - 1])), int(rng.integers(1, 6))
        groups = channels if rng.random() < 0.3 else 1
        outs = outs if groups == 1 else channels * int(rng.integers(1, 3))
        count, dtype = int(2 ** rng.integers(0, 8)), ("float32", "float64")[number % 2]
        stride = int(rng.integers(1, 3))
        shapes = (1, channels, *[size] * n), (outs, channels // groups, *[taps] * n)
        with jax.enable_x64(dtype == "float64"):
            spec = fc.conv_spec(*shapes, (stride,) * n, "SAME", feature_group_count=groups)
            row = _batch("", spec, dtype, count)
            name = f"{n}-D, {channels} to {outs}, size {size}, {taps} taps, stride {stride}, {groups} groups"
            yield Row(
                f"{name}, {dtype}, batch {count}",
                row.ours,
                {"lax": row.peers["lax"]},
                row.limit,
                value=_values,
            )


COPY = "one read and one write of x and y"
TABLES = (
    *(Table(verb, f"One example: `{verb}`", COPY, partial(_products, verb, 1), times=3) for verb in VERBS),
    *(
        Table(
            f"{verb}_batch",
            f"A batch of 32: `{verb}`",
            COPY,
            partial(_products, verb, 32),
            "Ours through `jax.vmap`; lax gets the whole batch."
            + (" The gradient is summed over the batch." if verb == "kernel_vjp" else ""),
        )
        for verb in VERBS
    ),
    Table("loop", "Conjugate gradients in `fori_loop`: `apply` and `apply_transpose`", "", _loops),
    Table(
        "batched",
        "A matrix in place of a convolution: `batched_apply`",
        "one read and one write of x",
        _batches,
    ),
    Table(
        "random_layers",
        "`batched_apply` on 30 random layers",
        "one read and one write of x",
        _random_layers,
        times=4,
    ),
)

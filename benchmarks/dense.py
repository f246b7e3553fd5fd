"""Dense M, and the products without it, against what JAX itself needs.

    python benchmarks/dense.py [--quick] [--rounds N]

Every figure is a ratio of times taken side by side in one run (see _timing.py).  --quick takes small arrays,
to see that everything runs: its figures mean nothing.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
from _timing import environment, interleaved
from jax import lax

import jaxconv_fc as fc

# The aims: (as_matrix at most ... times full, extra memory below,
# vmap(conv)(eye) at least ... times as_matrix).
FULL_RATIO, EXTRA_MEMORY, PEER_RATIO = 1.2, 0.05, 6.0


def conv(spec, kernel, x):
    """lax on one example."""
    y = lax.conv_general_dilated(
        jnp.expand_dims(x, spec.dimension_numbers.lhs_spec[0]),
        kernel,
        spec.window_strides,
        spec.padding,
        spec.lhs_dilation,
        spec.rhs_dilation,
        spec.dimension_numbers,
        spec.feature_group_count,
    )
    return jnp.squeeze(y, spec.dimension_numbers.out_spec[0])


def conv_transpose(spec, kernel, y):
    """What JAX derives from lax."""
    x = jax.ShapeDtypeStruct(spec.in_shape, kernel.dtype)
    (x,) = jax.linear_transpose(partial(conv, spec, kernel), x)(y)
    return x


def random_kernel(spec, dtype=jnp.float32):
    """Small enough for M^T M to be applied ten times without an overflow."""
    kernel = jax.random.normal(jax.random.key(0), spec.rhs_shape, dtype)
    return kernel / (2 * spec.rhs_shape[0] * spec.axes[0].taps ** len(spec.axes)) ** 0.5


# Dense M ---------------------------------------------------------------------------------------------------


def dense_geometries(quick):
    n, line, cube = (12, 128, 6) if quick else (32, 1024, 12)
    square = (1, 16, n, n)
    return {
        "16->16, 3x3 SAME": fc.conv_spec(square, (16, 16, 3, 3), (1, 1), "SAME"),
        "16->32, 3x3 stride 2": fc.conv_spec(square, (32, 16, 3, 3), (2, 2), "SAME"),
        "16->16, 3x3 dilation 2": fc.conv_spec(square, (16, 16, 3, 3), (1, 1), "VALID", rhs_dilation=(2, 2)),
        "depthwise 16, 3x3 SAME": fc.conv_spec(square, (16, 1, 3, 3), (1, 1), "SAME", feature_group_count=16),
        "1-D 16->16, 5 SAME": fc.conv_spec((1, 16, line), (16, 16, 5), (1,), "SAME"),
        "3-D 8->8, 3x3x3 SAME": fc.conv_spec((1, 8, *[cube] * 3), (8, 8, 3, 3, 3), (1, 1, 1), "SAME"),
    }


def measure_dense(spec, rounds):
    """(milliseconds of full, as_matrix / full, extra memory, vmap(conv)(eye) / as_matrix)."""
    kernel = random_kernel(spec)
    as_matrix = jax.jit(fc.as_matrix)
    # The value is an argument: a constant could be folded, and would not be written at every call.
    full = jax.jit(lambda value: jnp.full(spec.shape, value))

    @jax.jit
    def by_probing(kernel):  # M^T: that is what comes out first, and the transpose would cost extra
        eye = jnp.eye(spec.in_size, dtype=kernel.dtype).reshape(-1, *spec.in_shape)
        return jax.vmap(partial(conv, spec, kernel))(eye)

    value = jnp.float32(0.5)
    timings = interleaved(
        {
            "full": lambda: full(value),
            "as_matrix": lambda: as_matrix(spec, kernel),
            "probing": lambda: by_probing(kernel),
        },
        rounds,
    )
    memory = as_matrix.lower(spec, kernel).compile().memory_analysis()
    return (
        1e3 * timings.median("full"),
        timings.ratio("as_matrix", to="full"),
        memory.temp_size_in_bytes / memory.output_size_in_bytes,
        timings.ratio("probing", to="as_matrix"),
    )


def dense_table(quick, rounds):
    print("\nDense M, float32.  x full: time over jnp.full of the same array.  probing: jax.vmap(conv)(eye).")
    columns = "{:24} {:>15} {:>9} {:>9} {:>8} {:>13} {:>18}  {}"
    print(columns.format("geometry", "M", "MB", "full", "x full", "extra memory", "probing/as_matrix", ""))
    aims = (f"<= {FULL_RATIO}", f"< {EXTRA_MEMORY:.0%}", f">= {PEER_RATIO:.0f}")
    print(columns.format("aim", "", "", "", *aims, ""))
    for name, spec in dense_geometries(quick).items():
        milliseconds, ratio, extra, peer = measure_dense(spec, rounds)
        met = ratio <= FULL_RATIO and extra < EXTRA_MEMORY and peer >= PEER_RATIO
        print(
            columns.format(
                name,
                f"{spec.out_size}x{spec.in_size}",
                f"{4 * spec.out_size * spec.in_size / 1e6:.0f}",
                f"{milliseconds:.0f} ms",
                f"{ratio:.2f}",
                f"{extra:.1%}",
                f"{peer:.1f}",
                "" if met or quick else "missed",
            ),
            flush=True,
        )


# Products without M ----------------------------------------------------------------------------------------


def product_geometries(quick):
    channels, n = (8, 10) if quick else (64, 56)
    nchw, nhwc = ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC")
    same = fc.conv_spec((1, channels, n, n), (channels, channels, 3, 3), (1, 1), "SAME", None, None, nchw)
    strided = fc.conv_spec((1, channels, n, n), (channels, channels, 3, 3), (2, 2), "SAME", None, None, nchw)
    last = fc.conv_spec((1, n, n, channels), (3, 3, channels, channels), (1, 1), "SAME", None, None, nhwc)
    return {
        "3x3 SAME NCHW float32": (same, "float32"),
        "3x3 SAME NHWC float32": (last, "float32"),
        "3x3 stride 2 NCHW float32": (strided, "float32"),
        "3x3 stride 2 NCHW float64": (strided, "float64"),
    }


def there_and_back(forward, backward, spec, iterations):
    """(M^T M)^iterations x, in a loop."""
    return jax.jit(
        lambda kernel, x: lax.fori_loop(
            0, iterations, lambda _, x: backward(spec, kernel, forward(spec, kernel, x)), x
        )
    )


def measure_products(spec, dtype, rounds, iterations=10):
    """Times over lax's: M x, M^T y, and M^T M x inside a loop (ours, and lax's own)."""
    kernel = random_kernel(spec, dtype)
    x = jax.random.normal(jax.random.key(1), spec.in_shape, dtype)
    y = jax.random.normal(jax.random.key(2), spec.out_shape, dtype)
    calls = {
        "apply": (jax.jit(fc.apply), x),
        "lax": (jax.jit(conv), x),
        "apply_transpose": (jax.jit(fc.apply_transpose), y),
        "lax transpose": (jax.jit(conv_transpose), y),
    }
    contestants = {name: partial(f, spec, kernel, v) for name, (f, v) in calls.items()}
    loop = there_and_back(fc.apply, fc.apply_transpose, spec, iterations)
    lax_loop = there_and_back(conv, conv_transpose, spec, iterations)
    contestants |= {"loop": partial(loop, kernel, x), "lax loop": partial(lax_loop, kernel, x)}

    timings = interleaved(contestants, rounds)
    once = [sum(pair) for pair in zip(*(timings.seconds[k] for k in ("lax", "lax transpose")), strict=True)]
    timings.seconds["lax, no loop"] = [iterations * t for t in once]
    return (
        1e3 * timings.median("lax"),
        timings.ratio("apply", to="lax"),
        timings.ratio("apply_transpose", to="lax transpose"),
        timings.ratio("loop", to="lax, no loop"),
        timings.ratio("lax loop", to="lax, no loop"),
    )


def product_table(quick, rounds):
    print("\nProducts without M, one example, as ratios to lax outside a loop (lax: milliseconds of M x).")
    print("in fori_loop: M^T M x per iteration, over the time of lax's M x and M^T y called on their own.")
    columns = "{:28} {:>8} {:>8} {:>16} {:>13} {:>21}"
    print(
        columns.format(
            "geometry", "lax", "apply", "apply_transpose", "in fori_loop", "lax's own in fori_loop"
        )
    )
    print(columns.format("aim", "", "about 1", "about 1", "about 1", ""))
    for name, (spec, dtype) in product_geometries(quick).items():
        with jax.enable_x64(dtype == "float64"):
            milliseconds, *ratios = measure_products(spec, dtype, rounds)
        print(columns.format(name, f"{milliseconds:.1f} ms", *(f"{r:.2f}" for r in ratios)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small arrays, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(environment())
    dense_table(args.quick, args.rounds)
    product_table(args.quick, 2 * args.rounds + 1)


if __name__ == "__main__":
    main()

"""matrix_of of a five-layer linear network against what JAX's own Jacobians need.

    python benchmarks/affine.py [--quick] [--rounds N]

conv, pad, average pool, conv, flatten, dense on a 32x32 image in float64, once with everything jitted and
compiled before, once as written, outside of jit. Every figure is a ratio of times taken side by side in one
run (see _timing.py). --quick takes a small image, to see that everything runs: its figures mean nothing.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
from _timing import environment, interleaved
from jax import lax

import jaxconv_fc as fc

AIM = 5.0  # jax.jacobian takes at least so many times as long


def network(weights, x):
    first, second, dense = weights
    y = lax.conv_general_dilated(x, first, (1, 1), "SAME")
    y = jnp.pad(y, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = lax.reduce_window(y, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
    y = lax.conv_general_dilated(y, second, (1, 1), "VALID")
    return y.reshape(1, -1) @ dense


def weights_of(channels, size, outputs):
    a, b, c = channels
    shapes = [(b, a, 3, 3), (c, b, 3, 3), (c * (size // 2 - 1) ** 2, outputs)]
    return [jax.random.normal(jax.random.key(i), shape, jnp.float64) for i, shape in enumerate(shapes)]


def measure(channels, size, outputs, rounds):
    """(milliseconds of matrix_of, of jacobian and jacfwd over it, jacobian over it outside of jit, error)."""
    weights = weights_of(channels, size, outputs)
    x = jnp.ones((1, channels[0], size, size))
    ways = {
        "matrix_of": jax.jit(lambda w, x: fc.matrix_of(partial(network, w), x)[0]),
        "jacobian": jax.jit(lambda w, x: jax.jacobian(partial(network, w))(x).reshape(outputs, -1)),
        "jacfwd": jax.jit(lambda w, x: jax.jacfwd(partial(network, w))(x).reshape(outputs, -1)),
    }
    fn = partial(network, weights)
    eager = {"written": lambda: fc.matrix_of(fn, x)[0], "jacobian as written": lambda: jax.jacobian(fn)(x)}
    ours, theirs = ways["matrix_of"](weights, x), ways["jacobian"](weights, x)
    error = float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs)))
    timings = interleaved({name: partial(way, weights, x) for name, way in ways.items()} | eager, rounds)
    ratios = [timings.ratio(name, to="matrix_of") for name in ("jacobian", "jacfwd")]
    ratios.append(timings.ratio("jacobian as written", to="written"))
    return 1e3 * timings.median("matrix_of"), *ratios, error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small image, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    print(environment())
    print("jax.jacobian is jax.jacrev: one figure for both.")
    columns = "{:>12} {:>8} {:>12} {:>9} {:>8} {:>16} {:>8}  {}"
    print("Times over that of matrix_of.")
    print(
        columns.format(
            "channels", "outputs", "matrix_of", "jacobian", "jacfwd", "jacobian, no jit", "error", ""
        )
    )
    print(columns.format("aim", "", "", f">= {AIM:.0f}", "", "", "1e-12", ""))
    for channels, outputs in (((1, 4, 8), 10), ((3, 8, 16), 10), ((3, 16, 32), 10), ((3, 8, 16), 100)):
        time, rev, fwd, eager, error = measure(channels, 8 if args.quick else 32, outputs, args.rounds)
        met = "" if args.quick or rev >= AIM else "missed"
        layers = "-".join(map(str, channels))
        row = (
            layers,
            outputs,
            f"{time:.2f} ms",
            f"{rev:.2f}",
            f"{fwd:.1f}",
            f"{eager:.2f}",
            f"{error:.0e}",
            met,
        )
        print(columns.format(*row), flush=True)


if __name__ == "__main__":
    main()

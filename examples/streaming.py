"""Multiply by a matrix that does not fit into memory, built and dropped in blocks of rows.

python examples/streaming.py [--size 224] [--channels 64] [--megabytes 256]
"""

import argparse
import resource
import sys

import jax
import numpy as np
from jax import lax

import jaxconv_fc as fc


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--megabytes", type=float, default=256)
    args = parser.parse_args()
    c, n = args.channels, args.size
    spec = fc.conv_spec((1, c, n, n), (c, c, 3, 3), (1, 1), "SAME")
    print(f"M is {spec.out_size:,} x {spec.in_size:,} with {spec.nse:,} entries:")
    print(spec.nbytes("float32"))

    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(spec.rhs_shape, np.float32)
    x, y = rng.standard_normal(spec.in_shape, np.float32), np.empty(spec.out_shape, np.float32)
    blocks = fc.row_blocks(spec, kernel, int(args.megabytes * 2**20), progress=show)
    for block in blocks:
        y[block.out_slice] = (block.matrix @ x[block.in_slice].ravel()).reshape(block.spec.out_shape)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\npeak memory of this process: {peak / 2**20:,.0f} MiB")

    # Every output is a sum of 9 c products: 2 gamma_n |M||x| bounds what rounding may do to two of them.
    convolve = jax.jit(lambda x, k: lax.conv(x[None], k, (1, 1), "SAME")[0])
    rounding = (9 * c + 2) * 2.0**-24
    bound = 2 * rounding / (1 - rounding) * np.asarray(convolve(abs(x), abs(kernel)))
    assert (abs(y - np.asarray(convolve(x, kernel))) <= bound).all()
    print("y is equal to the convolution, within the rounding of float32")


def show(done: int, total: int) -> None:
    """One line that is written over again; where output is not a terminal, the end of it alone."""
    if sys.stdout.isatty():
        print(f"\r{done} of {total} output rows", end="", flush=True)
    elif done == total:
        print(f"{done} of {total} output rows", end="")


if __name__ == "__main__":
    main()

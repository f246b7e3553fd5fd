"""Sparse M against the two arrays written by XLA, against SciPy's COO -> CSR, and M against the convolution.

python benchmarks/sparse.py [--rounds 5] [--small] [--products]

Every figure is a ratio, measured in turns within this process. "x full" is time over `jnp.full` of
arrays of the same sizes: what JAX needs just to write them.
"""

import argparse
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from _timing import interleaved

import jaxconv_fc as fc
from jaxconv_fc.batched import METHODS, fastest_method

CONV = (1, 1)
LAYERS = {
    "32 channels, 32x32, 3x3": ((1, 32, 32, 32), (32, 32, 3, 3), CONV, "SAME", 1),
    "depthwise 7x7, 64 channels, 56x56": ((1, 64, 56, 56), (64, 1, 7, 7), CONV, "SAME", 64),
    "ResNet-50 first": ((1, 3, 224, 224), (64, 3, 7, 7), (2, 2), [(3, 3), (3, 3)], 1),
}
STACKS = {
    "depthwise 3x3, 28x28, 32 channels": ((1, 32, 28, 28), (32, 1, 3, 3), 32),
    "single channel 5x5, 28x28": ((1, 1, 28, 28), (1, 1, 5, 5), 1),
    "full-size, 4 channels, 8x8": ((1, 4, 8, 8), (4, 4, 8, 8), 1),
    "3-D 3x3x3, 2 channels, 8x8x8": ((1, 2, 8, 8, 8), (2, 2, 3, 3, 3), 1),
    "16 channels, 16x16, 3x3": ((1, 16, 16, 16), (16, 16, 3, 3), 1),
}


def layer(lhs, rhs, strides, padding, groups):
    spec = fc.conv_spec(lhs, rhs, strides, padding, feature_group_count=groups)
    return spec, jnp.asarray(np.random.default_rng(0).standard_normal(rhs, np.float32))


def full(spec):
    """Write data, columns and row starts of the right sizes: three numbers that XLA cannot know."""
    sizes = (spec.nse, spec.nse, spec.out_size + 1)
    write = jax.jit(lambda a, i: [jnp.full(n, v) for n, v in zip(sizes, (a, i, i), strict=True)])
    return partial(write, jnp.float32(1), jnp.int32(1))


def from_triples(spec, kernel):
    """SciPy's COO -> CSR, from the same triples in no order."""
    csr = fc.as_scipy(spec, np.asarray(kernel))
    coo = csr.tocoo()
    order = np.random.default_rng(0).permutation(coo.nnz)
    data, rows, columns = coo.data[order], coo.row[order], coo.col[order]
    return lambda: scipy.sparse.coo_array((data, (rows, columns)), shape=spec.shape).tocsr().data


def build(rounds, small):
    for name, arguments in LAYERS.items():
        if small and "ResNet" in name:
            continue
        spec, kernel = layer(*arguments)
        host = np.asarray(kernel)
        contestants = {
            "full": full(spec),
            "as_scipy": lambda spec=spec, host=host: fc.as_scipy(spec, host).data,
            "as_bcsr": partial(jax.jit(partial(fc.as_bcsr, spec)), kernel),
            "as_bcoo": partial(jax.jit(partial(fc.as_bcoo, spec)), kernel),
        }
        if spec.nse < 2e7:
            contestants["COO to CSR"] = from_triples(spec, kernel)
        times = interleaved(contestants, rounds)
        print(f"\n{name}: {spec.nse:,} entries; full {times.median('full') * 1e3:.1f} ms")
        for other in list(contestants)[1:]:
            print(f"  {other:10} {times.ratio(other, 'full'):6.2f} x full")
        if "COO to CSR" in contestants:
            print(f"  as_scipy is {times.ratio('COO to CSR', 'as_scipy'):.0f} times faster than COO to CSR")


def growth(rounds):
    print("\nas_scipy, 16 channels 3x3 on n x n: time over entries, from 10^4 to 10^8")
    contestants, entries = {}, {}
    for n in (2, 6, 20, 64, 200):
        spec, kernel = layer((1, 16, n, n), (16, 16, 3, 3), CONV, "SAME", 1)
        host = np.asarray(kernel)
        contestants[str(n)] = lambda spec=spec, host=host: fc.as_scipy(spec, host).data
        entries[str(n)] = spec.nse
    times = interleaved(contestants, rounds)
    for n, nse in entries.items():
        seconds = times.median(n)
        print(f"  {nse:12,} entries {seconds * 1e3:9.2f} ms {seconds / nse * 1e9:8.2f} ns each")


def products(rounds):
    print("\nbatched_apply: time over that of the convolution (the way that the rule takes is marked)")
    for name, (lhs, rhs, groups) in STACKS.items():
        for dtype in ("float32", "float64"):
            for count in (1, 16, 128):
                spec, kernel = layer(lhs, rhs, (1,) * (len(lhs) - 2), "SAME", groups)
                kernel = kernel.astype(dtype)
                xs = jnp.ones((count, *spec.in_shape), dtype)
                methods = [m for m in METHODS if m != "dense" or spec.out_size * spec.in_size < 2e7]
                times = interleaved(
                    {
                        m: partial(jax.jit(partial(fc.batched_apply, spec, method=m)), kernel, xs)
                        for m in methods
                    },
                    rounds,
                )
                taken = fastest_method(spec, count, np.dtype(dtype), jax.default_backend())
                ratios = "  ".join(
                    f"{'*' if m == taken else ' '}{m} {times.ratio(m, 'convolution'):.2f}" for m in methods
                )
                print(f"  {name:34} {dtype} x{count:<4} {ratios}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="leave the 116 million entries out")
    parser.add_argument("--products", action="store_true", help="only the products")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if not arguments.products:
        build(arguments.rounds, arguments.small)
        growth(arguments.rounds)
    products(arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

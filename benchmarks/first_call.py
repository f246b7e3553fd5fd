"""What the first call costs: importing, tracing, compiling, the size of the program, peak memory.

Each figure comes from a process of its own, so nothing is warm. Only the modules are compiled to bytecode, as
pip leaves them. Peak memory is read from /proc, on Linux.
"""

import json
import os
import statistics
import subprocess
import sys

IMPORT = """
import time
start = time.perf_counter(); import jax
jax_seconds = time.perf_counter() - start; start = time.perf_counter()
import jaxconv_fc
print(jax_seconds, time.perf_counter() - start)
"""

CALL = """
import json, sys, time
import jax, numpy as np
import jaxconv_fc as fc
verb, n = sys.argv[1], int(sys.argv[2])
spec = fc.conv_spec((1, 16, n, n), (16, 16, 3, 3), (1, 1), "SAME")
kernel = jax.numpy.asarray(np.ones(spec.rhs_shape, np.float32))
jax.block_until_ready(jax.jit(lambda v: v + 1)(kernel))  # JAX itself has started
def peak():  # getrusage would begin with the peak of the process that started this one
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
before = peak()
call = {
    "as_matrix": lambda: jax.jit(fc.as_matrix)(spec, kernel),
    "as_bcsr": lambda: jax.jit(fc.as_bcsr, static_argnums=0)(spec, kernel),
    "as_scipy": lambda: fc.as_scipy(spec, np.asarray(kernel)),
    "apply": lambda: jax.jit(fc.apply)(spec, kernel, jax.numpy.ones(spec.in_shape)),
    "kernel_matrix": lambda: jax.jit(fc.kernel_matrix)(spec, jax.numpy.ones(spec.in_shape)),
}[verb]
def timed():
    start = time.perf_counter(); result = jax.block_until_ready(call())
    return time.perf_counter() - start, result
first, result = timed()
size = sum(v.nbytes for v in jax.tree.leaves(result)) if verb != "as_scipy" else 8 * spec.nse
most = peak() - before
del result
again = timed()[0]
program = 0
if verb in ("as_matrix", "as_bcsr"):
    program = len(jax.jit(getattr(fc, verb), static_argnums=0).lower(spec, kernel).as_text())
print(json.dumps({"first": first, "again": again, "program": program, "peak": most, "size": size}))
"""

SIZES = {
    "as_matrix": (4, 20, 34),
    "as_bcsr": (4, 64, 200),
    "as_scipy": (4, 64, 200),
    "apply": (4, 64),
    "kernel_matrix": (4, 64),
}


def imports(rounds):
    """Milliseconds of `import jax`, and of `import jaxconv_fc` after it: medians."""
    pairs = [[float(v) for v in _run(IMPORT).split()] for _ in range(rounds + 1)][1:]  # the first compiles
    return {
        "jax": 1e3 * statistics.median(a for a, _ in pairs),
        "ours": 1e3 * statistics.median(b for _, b in pairs),
    }


def first_calls(quick):
    for verb, sizes in SIZES.items():
        for n in sizes[:1] if quick else sizes:
            found = json.loads(_run(CALL, verb, str(n)))
            yield f"{verb}, 16 channels, {n}x{n}", found


def _run(code, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return done.stdout

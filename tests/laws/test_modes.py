"""Every public function in every mode of JAX: the result is that of the plain call.

The plain call is that of conftest.py: 64 bits, strict promotion of dtypes and ranks, the highest precision.
"""

import contextlib

import functions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import SEED, count
from functions import TABLE
from jax.experimental.jet import jet

MODES = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "checking_leaks": jax.checking_leaks,
    "x64 off": lambda: jax.enable_x64(False),
    "standard promotion": lambda: jax.numpy_dtype_promotion("standard"),
    "ranks promoted": lambda: jax.numpy_rank_promotion("allow"),
    **{f"precision {p}": lambda p=p: jax.default_matmul_precision(p) for p in ("bfloat16", "float32")},
}
# Modes that exclude no error of one another, so that one program stands for all of them.
TOGETHER = {
    "disable_jit": ("disable_jit",),
    "debugging": ("debug_nans", "debug_infs", "checking_leaks"),
    "as users have it": ("x64 off", "standard promotion", "ranks promoted", "precision bfloat16"),
}
EACH = count("MODES", 0)  # each mode alone for every function, its vmap and its gradient
PRODUCTS = ("apply", "apply_transpose", "kernel_vjp", "batched_apply", "as_matrix")


def plain(name):
    return functions.call(name)


def mapped(name):
    return jax.vmap(lambda *arrays: TABLE[name].call(functions.SPEC, *arrays))(
        *(np.stack([v, v[::-1]]) for v in functions.samples())
    )


def gradient(name):
    def loss(kernel, x):
        leaves = jax.tree.leaves(TABLE[name].call(functions.SPEC, kernel, x, functions.samples()[2]))
        return sum(jnp.sum(v) for v in leaves if jnp.issubdtype(v.dtype, jnp.inexact))

    return jax.grad(loss, (0, 1))(*functions.samples()[:2])


ROWS = {name: (plain, name) for name in TABLE}
ROWS |= {f"vmap of {n}": (mapped, n) for n, row in TABLE.items() if row.jit and (EACH or n in PRODUCTS)}
ROWS |= {f"grad of {n}": (gradient, n) for n, row in TABLE.items() if row.grad and (EACH or n in PRODUCTS)}


def drawn():
    """The sets of modes that each row meets. By default a product meets all, and a tenth of the other rows a
    random one."""
    if EACH:
        return {row: [(mode,) for mode in MODES] for row in ROWS}
    rng, sets = np.random.default_rng(SEED), list(TOGETHER.values())
    rows = (row for row in ROWS if rng.random() < 0.1)
    return {row: [sets[rng.integers(len(sets))]] for row in rows} | dict.fromkeys(PRODUCTS, sets)


DRAWN = drawn()


def equal(got, want, what):
    """Equal trees of arrays, numbers and words. A mode may choose another form, which rounds differently."""
    assert jax.tree.structure(got) == jax.tree.structure(want), what
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(theirs, str):
            assert ours == theirs, what
        else:
            close = 1e-4 * (1 + np.max(np.abs(theirs), initial=0))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=close, err_msg=what)


def test_the_table_has_every_public_function():
    assert functions.CLASSES | set(TABLE) == functions.PUBLIC


@pytest.mark.parametrize("row", DRAWN)
def test_a_mode_changes_no_result(row):
    """And no mode leaves anything behind for the plain calls after it."""
    of, name = ROWS[row]
    want = of(name)
    for modes in DRAWN[row]:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(MODES[mode]())
            equal(of(name), want, f"{row} with {modes}")
    equal(of(name), want, f"{row} afterwards")


@pytest.mark.parametrize("name", PRODUCTS)
def test_jet(name):
    """The Taylor series along a line in kernel and x: a product of two lines is a parabola."""
    kernel, x, y = functions.samples(np.float64)

    def of(t):
        return TABLE[name].call(functions.SPEC, kernel * (1 + t), x * (1 - 2 * t), y * (1 + 3 * t))

    def both(t):
        slope = jax.jacfwd(of)
        return jet(of, (t,), ((1.0, 0.0, 0.0),)), (
            of(t),
            [slope(t), jax.jacfwd(slope)(t), jnp.zeros_like(of(t))],
        )

    equal(*jax.jit(both)(0.0), name)

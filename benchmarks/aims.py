"""What the figures should be, and a few ratios that a change must not spoil."""

import statistics
from functools import partial

import jax
import jax.numpy as jnp

import jaxconv_fc as fc
from benchmarks import peers
from benchmarks.layers import conv_one, kernel_of, random
from benchmarks.rows import jitted
from benchmarks.timing import interleaved, ratio


def aims(results):
    """[{aim, seen, met}] for the tables that are there."""
    tables = {table["name"]: table["rows"] for table in results["tables"]}
    found = []

    def aim(text, values, limit, most=True, of=max):
        if values:
            seen = of(values)
            found.append(
                {"aim": text, "seen": f"{seen:.2f}", "met": seen <= limit if most else seen >= limit}
            )

    def limits(name, least=0):
        return [r["ratios"]["limit"] for r in tables.get(name, ()) if _entries(r) >= least]

    def others(name):
        return [v for r in tables.get(name, ()) for peer, v in r["ratios"].items() if peer != "limit"]

    aim("dense: at most 1.15 x `jnp.full`, median", limits("dense"), 1.15, of=statistics.median)
    aim("dense: at most 1.3 x `jnp.full`, each", limits("dense"), 1.3)
    aim("dense: faster than every other way", others("dense"), 1, most=False, of=min)
    aim(
        "dense: at least 6 x faster, median of the best other way",
        _best(tables.get("dense", ())),
        6,
        most=False,
        of=statistics.median,
    )
    aim("`update_matrix`: at most 0.12 x `jnp.full`", limits("update"), 0.12)
    aim("`as_scipy`: at most 1.1 x XLA filling, from 100,000 entries on", limits("as_scipy", 1e5), 1.1)
    coo = [r["ratios"].get("COO to CSR, shuffled") for r in tables.get("as_scipy", ()) if _entries(r) >= 1e5]
    aim("`as_scipy`: at least 10 x SciPy's COO to CSR", [v for v in coo if v], 10, most=False, of=min)
    for table in results["tables"]:
        if table["name"].startswith("growth_"):
            slopes = [table["slope"]] if table.get("slope") else []
            aim(f"{table['name'].removeprefix('growth_')}: slope at most 1.05", slopes, 1.05)
    aim("`matrix_vjp`: at most 0.7 x one read", limits("matrix_vjp"), 0.7)
    forward, back = (
        _median(tables.get(name, ()), "stride 2, float64") for name in ("apply", "apply_transpose")
    )
    aim("M^T y, stride 2, float64: at most 1.3 x M x", [back / forward] if forward and back else [], 1.3)
    aim("loop: at least 5 x faster", others("loop"), 5, most=False, of=min)
    wins = [
        r["ratios"]["lax"]
        for r in tables.get("batched", ())
        if r["name"].startswith(("depthwise", "one channel")) and "float32" in r["name"]
    ]
    aim("`batched_apply`: at least 5 x lax, depthwise and one channel, float32", wins, 5, most=False, of=min)
    aim(
        "`batched_apply`: at most 1.1 x lax on 30 random layers",
        [1 / r["ratios"]["lax"] for r in tables.get("random_layers", ())],
        1.1,
    )
    if "imports" in results:
        aim("import: at most 80 ms over `import jax`", [results["imports"]["ours"]], 80)
        beyond = [r["first"] - r["again"] for r in results["first_calls"].values()]
        aim("first call: at most 0.6 s beyond its run", beyond, 0.6)
    return found


def _entries(row):
    words = row["size"].split()
    return (
        int(words[0].replace(",", "")) if len(words) > 1 and words[1].startswith("entries") else float("inf")
    )


def _best(rows):
    """Of each row, the time of the fastest other way over ours."""
    return [
        min(v for peer, v in r["ratios"].items() if peer != "limit") for r in rows if len(r["ratios"]) > 1
    ]


def _median(rows, name):
    return next((statistics.median(r["seconds"]["ours"]) for r in rows if r["name"] == name), None)


# -- guard --------------------------------------------------------------------------------------------


def _guarded():
    """name -> (numerator, denominator, most): far above what is measured, for machines that are not quiet."""
    dense = fc.conv_spec((1, 16, 16, 16), (16, 16, 3, 3), (1, 1), "SAME")
    depthwise = fc.conv_spec((1, 32, 28, 28), (32, 1, 3, 3), (1, 1), "SAME", feature_group_count=32)
    kernel, deep = kernel_of(dense), kernel_of(depthwise)
    matrix, xs = random(dense.shape), random((64, *depthwise.in_shape))
    as_matrix = jitted(partial(fc.as_matrix, dense), kernel)
    full = jitted(lambda v: jnp.full(dense.shape, v), jnp.float32(0.5))
    read = jitted(jnp.sum, matrix)
    lax_batch = jitted(jax.vmap(partial(conv_one, depthwise), (None, 0)), deep, xs)
    big = fc.conv_spec((1, 32, 32, 32), (32, 32, 3, 3), (1, 1), "SAME")
    host = jax.device_get(kernel_of(big))
    return {
        "as_matrix / jnp.full": (as_matrix, full, 2.5),
        "as_matrix / vmap(conv)(eye)": (as_matrix, peers.vmap_eye(dense, kernel), 0.6),
        "matrix_vjp / one read": (jitted(partial(fc.matrix_vjp, dense), matrix), read, 2.5),
        "batched_apply / lax, depthwise": (
            jitted(partial(fc.batched_apply, depthwise), deep, xs),
            lax_batch,
            0.5,
        ),
        "as_scipy / COO to CSR": (
            lambda: fc.as_scipy(big, host),
            peers.scipy_triples(big, host, shuffled=True),
            0.25,
        ),
    }


def guard(tries=3):
    """Whether every guarded ratio is within its bound in one of a few tries: other work may slow one."""
    good = True
    for name, (call, other, most) in _guarded().items():
        for _ in range(tries):
            seen = ratio(interleaved({"a": call, "b": other}, rounds=5), "a", to="b")
            if seen <= most:
                break
        print(f"{name}: {seen:.2f} (at most {most})", flush=True)
        good &= seen <= most
    return good

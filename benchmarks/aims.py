"""What the figures should be, and a few ratios that a change must not spoil."""

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxconv_fc as fc
from benchmarks import peers
from benchmarks.layers import conv_one, kernel_of, random
from benchmarks.rows import jitted
from benchmarks.timing import interleaved, ratio


class Aim(NamedTuple):
    """A bound on figures of some tables. Over the limit they are to be small, other ways over ours large."""

    text: str
    tables: str  # names, separated by spaces
    bound: float
    limit: bool = False  # whether the figures are ours over the limit; else the times of other ways over ours
    entries: tuple[float, float] = (0, float("inf"))  # only rows with so many entries
    of: Callable[[Iterable[float]], float] | None = None  # None: the worst figure
    rows: str = ""  # what the names of its rows begin with
    peers: str = ""  # what the names of the other ways begin with


BUILDERS = "dense update as_scipy as_bcsr as_bcoo matrix_vjp matrix_of matrix_of_eager"
PRODUCTS = "apply apply_transpose kernel_vjp apply_batch apply_transpose_batch kernel_vjp_batch"
AIMS = (
    Aim("dense: at most 1.15 x `jnp.full`, median", "dense", 1.15, limit=True, of=statistics.median),
    Aim("dense: at most 1.3 x `jnp.full`, each", "dense", 1.3, limit=True),
    Aim("`update_matrix`: at most 0.12 x `jnp.full`", "update", 0.12, limit=True),
    Aim("`as_bcsr`, `as_bcoo`: at most 2 x XLA filling, from 100,000 entries on", "as_bcsr as_bcoo", 2,
        limit=True, entries=(1e5, float("inf"))),
    Aim("`as_scipy`: at most 1.1 x XLA filling, from 100,000 entries on", "as_scipy", 1.1,
        limit=True, entries=(1e5, float("inf"))),
    Aim("`as_scipy`: at most 1.5 x XLA filling, below", "as_scipy", 1.5, limit=True, entries=(0, 1e5)),
    Aim("`matrix_vjp`: at most 0.7 x one read", "matrix_vjp", 0.7, limit=True),
    Aim("matrices: no other way faster by more than 5 %", BUILDERS, 0.95),
    Aim("products: no other way faster by more than 5 %", PRODUCTS, 0.95),
    Aim("a solver's loop: at least 5 x faster", "loop", 5),
    Aim("`batched_apply`: no other way faster by more than 5 %", "batched random_layers", 0.95),
    Aim("`sparse_matrix_of`: at least 10 x faster than any other sparse way", "sparse_matrix_of", 10),
    Aim("`affine_layers`: at least 20 x faster than a gradient per output", "affine_layers", 20),
    Aim("gradients of a batch: no other way faster by more than 5 %",
        "gradient_norms patch_moment model_gradient_norms", 0.95),
    *(Aim(f"a training step of {name}: lax takes at least {least} times as long", "models", least,
          rows=f"{name}, batch 8, NHWC, float32", peers="lax")
      for name, least in {"MobileNetV2": 10, "ResNeXt": 40, "ConvNeXt": 4.5, "DCGAN generator": 3.5,
                          "U-Net 3-D": 14, "ResNet-50 blocks": 2.5, "ResNet-18 blocks": 1.4}.items()),
    Aim("networks: lax not faster by more than 2 %", "models models_forward", 0.98, peers="lax"),
    Aim("networks: torch takes at least 0.5 of our time", "models", 0.5, peers="torch"),
    Aim("spectra: no other way faster by more than 5 %", "singular_values spectral_norm", 0.95),
)  # fmt: skip
NO_RIVALS = ("np.full", "(estimate)", "(dense)")  # another limit, and other results
MOST_IMPORT, MOST_FIRST = 80, 0.25  # ms over `import jax`; s beyond the run of a first call


def aims(results):
    """[{aim, seen, met}] for the tables that are there."""
    tables = {table["name"]: table["rows"] for table in results["tables"]}
    found = []

    def add(text, seen, met):
        found.append({"aim": text, "seen": f"{seen:.2f}", "met": met})

    for aim in AIMS:
        rows = [row for name in aim.tables.split() for row in tables.get(name, ()) if _counts(aim, row)]
        ratios = [pair for row in rows for pair in row["ratios"].items() if not pair[0].endswith(NO_RIVALS)]
        values = [v for name, v in ratios if (name == "limit") == aim.limit and name.startswith(aim.peers)]
        if values:
            seen = (aim.of or (max if aim.limit else min))(values)
            add(aim.text, seen, seen <= aim.bound if aim.limit else seen >= aim.bound)
    if "imports" in results:
        add(f"import: at most {MOST_IMPORT} ms over `import jax`", results["imports"]["ours"],
            results["imports"]["ours"] <= MOST_IMPORT)  # fmt: skip
        beyond = max(row["first"] - row["again"] for row in results["first_calls"].values())
        add(f"first call: at most {MOST_FIRST} s beyond its run", beyond, beyond <= MOST_FIRST)
    return found


def _counts(aim, row):
    """Whether an aim is about this row: by its name, and by how many entries it has."""
    if not row["name"].startswith(aim.rows):
        return False
    if aim.entries == Aim._field_defaults["entries"]:
        return True
    entries = int(row["size"].split()[0].replace(",", ""))  # "124,000 entries, ..."
    return aim.entries[0] <= entries < aim.entries[1]


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

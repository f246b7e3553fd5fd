"""Results as Markdown."""

import itertools
import json
import statistics
from pathlib import Path

from benchmarks.timing import spread


def markdown(results):
    lines = [
        "# Measured",
        "",
        results["machine"] + ".",
        "`python -m benchmarks`, a row in one process: medians of at most so many rounds as the table says, "
        "every contestant once a round; in brackets the quartiles. A figure below the name of another way is "
        "its time over ours, **bold** where the other way is faster; after +, what it took once before, such "
        "as the detection and colouring of a pattern.",
        *([results["remark"]] if "remark" in results else []),
        "",
    ]
    if results.get("aims"):
        lines += ["## Aims", "", "| aim | seen | met |", "|---|---|---|"]
        lines += [
            f"| {aim['aim']} | {aim['seen']} | {'yes' if aim['met'] else 'no'} |" for aim in results["aims"]
        ]
        lines.append("")
    for table in results["tables"]:
        lines += [f"## {table['title']}", "", *_body(table), ""]
    if "imports" in results:
        lines += _first_calls(results)
    return "\n".join(lines)


def _body(table):
    rows = table["rows"]
    peers = list(dict.fromkeys(itertools.chain(*([*row["ratios"], *row["cannot"]] for row in rows))))
    peers = [name for name in peers if name != "limit"]
    limited = bool(table["limit"])
    head = ["", "", *(["limit"] if limited else []), "ours", *(["ours / limit"] if limited else []), *peers]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    notes = []
    for row in rows:
        cells = [row["name"], row["size"]]
        if limited:
            cells.append(_time(spread(row["seconds"]["limit"])[1]))
        low, middle, high = spread(row["seconds"]["ours"])
        cells.append(f"{_time(middle)} ({_time(low)} to {_time(high)})" + _about(row, "ours"))
        if limited:
            cells.append(f"{row['ratios']['limit']:.2f}")
        cells += [_cell(row, peer, notes) for peer in peers]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    if limited:
        yield f"Limit: {table['limit']}."
    for number, note in enumerate(notes, 1):
        yield f"({number}) {note}."
    if table["note"]:
        yield table["note"]
    yield f"{table['run']}."


def _cell(row, peer, notes):
    if peer in row["ratios"]:
        ratio = row["ratios"][peer]
        before = f" (+{row['prepared'][peer]:.0f} s)" if peer in row["prepared"] else ""
        return (f"**{_ratio(ratio)}**" if ratio < 1 else _ratio(ratio)) + before + _about(row, peer)
    reason = row["cannot"].get(peer)
    if not reason:
        return "–"
    if reason not in notes:
        notes.append(reason)
    return f"– ({notes.index(reason) + 1})"


def _about(row, name):
    about = row.get("about", {}).get(name)
    return f" ({about})" if about else ""


def _ratio(value):
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _time(seconds):
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _first_calls(results):
    found = results["imports"]
    yield "## First calls"
    yield ""
    yield (
        f"`import jax` {found['jax']:.0f} ms; `import jaxconv_fc` after it {found['ours']:.0f} ms. Every row "
        "is a process of its own. Beyond its run: the first call less a second one, which compiles nothing. "
        f"{found['run']}."
    )
    yield ""
    yield "| | first call | beyond its run | program | result | peak memory above what was there |"
    yield "|---|---|---|---|---|---|"
    for name, row in results["first_calls"].items():
        program = f"{row['program'] / 1e3:.1f} kB" if row["program"] else "–"
        yield (
            f"| {name} | {_time(row['first'])} | {_time(max(row['first'] - row['again'], 0))} | {program} | "
            f"{row['size'] / 1e6:,.1f} MB | {row['peak'] / 1e6:,.0f} MB |"
        )


# -- the table of docs/measured.md --------------------------------------------------------------------------

# folder of results -> how the table calls the machine
MACHINES = {"cpu": "2 CPU cores", "h200": "NVIDIA H200"}
# table -> what it is; the fastest of the peers counts, or the one that is named
SUMMARY = {
    "dense": ("`as_matrix`, over `jnp.full`", None),
    "update": ("`update_matrix`, over `jnp.full`", "as_matrix"),
    "as_scipy": ("`as_scipy`, over XLA writing the same arrays", "COO to CSR, shuffled"),
    "as_bcsr": ("`as_bcsr`, over XLA writing the same arrays", None),
    "matrix_vjp": ("`matrix_vjp`, over one read of the cotangent", None),
    "apply": ("`apply`, one example", "lax"),
    "apply_transpose": ("`apply_transpose`, one example", "lax"),
    "kernel_vjp": ("`kernel_vjp`, one example", "lax"),
    "loop": ("100 steps of conjugate gradients", None),
    "batched": ("`batched_apply`", "lax"),
    "matrix_of": ("`matrix_of` a linear network", None),
    "sparse_matrix_of": ("`sparse_matrix_of` a linear network", "asdex"),
    "affine_layers": ("`affine_layers`", None),
    "models": ("a training step, `with_products`", "lax"),
    "models_forward": ("a network, forward, `with_products`", "lax"),
    "model_gradient_norms": ("`curvature.model_gradient_norms`", None),
    "singular_values": ("all singular values, circular", "NumPy recipe"),
    "spectral_norm": ("the largest singular value", "power iteration"),
}


def summary(folder):
    """Medians over the rows of each table: ours over the limit, and the fastest other way over ours."""
    found = {}
    for machine in MACHINES:
        path = Path(folder) / machine / "results.json"
        if path.exists():
            found[machine] = {table["name"]: table for table in json.loads(path.read_text())["tables"]}
    lines = [
        "| | " + " | ".join(f"{MACHINES[m]}: over the limit | other ways, over ours" for m in found) + " |"
    ]
    lines.append("|---|" + "---|---|" * len(found))
    for name, (text, peer) in SUMMARY.items():
        cells = [cell for tables in found.values() for cell in _summed(tables.get(name), peer)]
        if set(cells) != {"–"}:
            lines.append("| " + " | ".join([text, *cells]) + " |")
    return "\n".join(lines)


def _summed(table, peer):
    if table is None:
        return "–", "–"
    limits = [row["ratios"]["limit"] for row in table["rows"] if "limit" in row["ratios"]]
    limit = f"{statistics.median(limits):.2f}" if limits and table["name"] not in UNLIMITED else "–"
    best = []
    for row in table["rows"]:
        others = {name: v for name, v in row["ratios"].items() if name not in ("limit", "np.full")}
        if peer in others or (peer is None and others):
            best.append((others[peer], peer) if peer else min((v, name) for name, v in others.items()))
    if not best:
        return limit, "–"
    names = statistics.multimode(name for _, name in best)
    values = [v for v, _ in best]
    middle, low, high = (_ratio(of(values)) for of in (statistics.median, min, max))
    return limit, f"{middle} ({low} to {high}), {names[0]}"


UNLIMITED = ("apply", "apply_transpose", "kernel_vjp", "batched")  # their limit says little to a reader

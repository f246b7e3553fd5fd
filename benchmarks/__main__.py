"""python -m benchmarks: see benchmarks/__init__.py."""

import argparse
import contextlib
import itertools
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import jax
import jaxlib

import jaxconv_fc as fc
from benchmarks import (
    aims,
    curvature,
    dense,
    first_call,
    functions,
    gradients,
    models,
    products,
    report,
    rows,
    sparse,
    spectrum,
)

TABLES = {
    table.name: table
    for module in (dense, sparse, products, gradients, functions, spectrum, curvature, models)
    for table in module.TABLES
}

QUICK_ROWS = 1  # of every table


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}, first_call")
    parser.add_argument(
        "--quick", action="store_true", help="one small row of each table, whose results are compared"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--summary", action="store_true", help="print the table of docs/measured.md, of committed results"
    )
    parser.add_argument("--guard", action="store_true", help="a few ratios only; fails where one is far off")
    args = parser.parse_args()
    if args.summary:
        print(report.summary(args.out))
        return 0
    if args.guard:
        return 0 if aims.guard() else 1
    wanted = args.tables or [*TABLES, "first_call"]
    if unknown := set(wanted) - {*TABLES, "first_call"}:
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join([*TABLES, 'first_call'])}")
    rounds = 1 if args.quick else args.rounds
    args.out.mkdir(parents=True, exist_ok=True)
    results = _earlier(args.out, {"machine": _machine(), "platform": jax.default_backend()}, args.quick)
    run = _run()  # now: the code is loaded, and what is checked out may change
    for name in wanted:
        if name in TABLES:
            table = _measure(TABLES[name], rounds, args, run)
            tables = {known["name"]: known for known in results["tables"]} | {name: table}
            results["tables"] = [tables[known] for known in TABLES if known in tables]
            _write(results, args.out)
    if "first_call" in wanted:
        results["imports"] = first_call.imports(rounds) | {"run": run}
        results["first_calls"] = dict(first_call.first_calls(args.quick))
    _write(results, args.out)
    for aim in results["aims"]:
        print(f"{'met   ' if aim['met'] else 'MISSED'} {aim['aim']}: {aim['seen']}")
    return 0


def _earlier(folder, here, quick):
    """The results in this folder if they are of this machine: a run replaces the tables that it measures."""
    with contextlib.suppress(OSError):
        results = json.loads((folder / "results.json").read_text())
        if not (quick or results["quick"]) and {key: results[key] for key in here} == here:
            return results
    return here | {"quick": quick, "tables": []}


def _measure(table, rounds, args, run):
    print(f"\n{table.title}", flush=True)
    found = []
    rounds = rounds if args.quick else rounds * table.times
    for row in itertools.islice(table.rows(args.quick), QUICK_ROWS if args.quick else None):
        start = time.perf_counter()
        one = rows.measure(row, rounds, args.quick)
        found.append(asdict(one))
        ratios = "  ".join(f"{name} {value:.3g}" for name, value in one.ratios.items())
        print(f"  {one.name}: {ratios}  [{time.perf_counter() - start:.0f} s]", flush=True)
        with contextlib.suppress(RuntimeError):
            jax.clear_caches()
    about = {"name": table.name, "title": table.title, "limit": table.limit, "note": table.note}
    return about | {"run": f"{run}; {rounds} rounds", "rows": found}


def _machine():
    device, processor = jax.devices()[0], platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        processor += f", {sum(line.startswith('processor') for line in lines)} cores"
    return processor if device.platform == "cpu" else f"{device.device_kind}; host {processor}"


def _run():
    """What was measured, and when."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return (
        f"Python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"jaxconv_fc {fc.__version__}; commit {commit.stdout.strip()}; {datetime.now(UTC):%Y-%m-%d}"
    )


def _write(results, folder):
    measured = results["platform"] == "cpu" and not results["quick"]  # the aims are those of a CPU
    results["aims"] = aims.aims(results) if measured else []
    (folder / "results.md").write_text(report.markdown(results))
    (folder / "results.json").write_text(json.dumps(_rounded(results), indent=1) + "\n")


def _rounded(value):
    """Four digits of every number: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())

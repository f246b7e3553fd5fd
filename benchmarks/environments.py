"""asdex needs Python 3.12 and a JAX that may not be the current one: an environment of its own, made once."""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER, WANTED = "asdex", ("asdex==0.5.2", "jax==0.11.2", "jaxlib==0.11.2")
TABLES = ("dense", "as_bcsr", "as_bcoo", "matrix_of")


def beside_asdex(folder, rounds, tables):
    """The tables that asdex is in, ours beside it, from that environment; a sentence where there is none."""
    wanted = [name for name in TABLES if name in tables]
    if importlib.util.find_spec(PEER) or not wanted:
        return None
    python = _python()
    if python is None:
        return "needs Python 3.12, which was not found"
    home = folder.resolve() / ".asdex"
    if not (home / "bin" / "python").exists():
        print(f"making an environment for {PEER} in {home}", flush=True)
        subprocess.run([python, "-m", "venv", home], check=True)
        subprocess.run([home / "bin" / "pip", "install", "-q", *WANTED, "numpy", "scipy"], check=True)
    with tempfile.TemporaryDirectory() as out:
        command = [home / "bin" / "python", "-m", "benchmarks", *wanted, "--only", PEER, "--out", out]
        command += ["--rounds", str(rounds)]
        subprocess.run(command, check=True, cwd=ROOT)
        return json.loads((Path(out) / "results.json").read_text())


def merged(tables, found):
    """`tables` with the ratios of the other environment."""
    if found is None:
        return
    for table in tables:
        if table["name"] not in TABLES:
            continue
        if isinstance(found, str):
            for row in table["rows"]:
                row["cannot"][PEER] = found
            continue
        theirs = next(t for t in found["tables"] if t["name"] == table["name"])
        for row, other in zip(table["rows"], theirs["rows"], strict=True):
            row["cannot"].pop(PEER, None)
            for field in ("ratios", "cannot", "prepared"):
                if PEER in other[field]:
                    row[field][PEER] = other[field][PEER]
        table["note"] = f"{table['note']} asdex and ours beside it: {found['versions']}.".strip()


def _python():
    found = shutil.which("python3.12")
    if (
        found
        and subprocess.run([found, "-c", "import venv"], capture_output=True, check=False).returncode == 0
    ):
        return found
    kept = sorted(Path.home().glob(".pyenv/versions/3.12.*/bin/python"))
    return str(kept[-1]) if kept else None

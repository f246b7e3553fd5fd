"""What the environment may set for a run of the tests. All of it is read here.

HYPOTHESIS_PROFILE=long      2,000 examples per Hypothesis test instead of 5
JAXCONV_FC_SEED=123          replay the random cases of an earlier run, whose header prints its seed
JAXCONV_FC_GEOMETRIES=2000   random geometries per test; without it every file has its own number
JAXCONV_FC_KERNELS=50        random kernels whose gradients are compared with and without jit; from 10 on
                             also in double precision and for costly functions
JAXCONV_FC_PROGRAMS=2000     random programs that are compared with jax.jacobian
JAXCONV_FC_NETWORKS=300      random networks that are sampled inside their radius
JAXCONV_FC_MODES=1           each mode of JAX alone, for every public function, its vmap and its gradient
JAXCONV_FC_DTYPES=8          so many dtypes of each kind, or all that there are, for every function of arrays;
                             without it one, for a function of each row of the table in docs/start.md
JAXCONV_FC_NORMS=300         random geometries whose norms are compared, in twelve dtypes by turns
JAXCONV_FC_CASES=folder      cases computed elsewhere: closed_forms.json, and layers of trained networks in
                             realnet_*.json with realnet_*.npz; without it their tests are skipped
XLA_FLAGS=                   programs optimised as users run them, which takes longer
"""

import os
import secrets
from importlib.metadata import version
from pathlib import Path

import pytest

# Most of the time would go into compiling thousands of small programs that run once. A program is compiled as
# one part: in several, for threads, it takes a third more of the cores' time.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):  # others abort at a flag that they do not know
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # no stack of callers for every operation
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of matrices this small its threads only wait
# Written back, so that the workers of pytest-xdist inherit it and draw the same cases.
SEED = int(os.environ.setdefault("JAXCONV_FC_SEED", str(secrets.randbits(32))))
HYPOTHESIS_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
CASES = Path(os.environ["JAXCONV_FC_CASES"]) if "JAXCONV_FC_CASES" in os.environ else None


def numbers(first, further):
    """Random cases by number: those of every run, and as many further ones that ``-m long`` runs."""
    return [*range(first), *map(rarely, range(first, first + further))]


def rarely(*case):
    """A case that ``-m long`` runs."""
    return pytest.param(*case, marks=pytest.mark.long)


def drawn(cases, most, always=()):
    """So many of the cases, others from run to run, beside those of every run; ``-m long`` has the rest."""
    cases = list(cases)
    turned = [cases[(SEED + i) % len(cases)] for i in range(len(cases))]
    chosen = [*always, *(case for case in turned if case not in always)][:most]
    return [case if case in chosen else rarely(case) for case in cases]


def count(of, default):
    """How many random cases to draw: JAXCONV_FC_<of>, or the default of the file."""
    return int(os.environ.get(f"JAXCONV_FC_{of}", default))


def of_devices(number):
    """The environment of a process with so many virtual devices, which imports this checkout."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={number}",
        "PYTHONPATH": os.pathsep.join(
            [*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")]
        ),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }

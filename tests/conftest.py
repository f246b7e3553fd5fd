"""Strict numerics for every test, Hypothesis profiles, and a seed that is chosen at run time.

HYPOTHESIS_PROFILE=long      2,000 examples per Hypothesis test instead of a few
JAXCONV_FC_SEED=123          replay the random geometries of an earlier run (the header prints its seed)
JAXCONV_FC_GEOMETRIES=2000   how many random geometries the tests hold against the oracle
"""

import os
import secrets

import hypothesis
import jax
import numpy as np
import pytest

# Thousands of small programs are compiled here to run once, and most of that would be the optimiser. What
# the variable says already is left alone: XLA_FLAGS= tests programs as users run them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# No test may lean on an implicit conversion or an implicit broadcast of ranks.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_LENIENT = {
    "deadline": None,  # the first example of a shape compiles
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    "print_blob": True,
}
hypothesis.settings.register_profile("default", max_examples=12, **_LENIENT)
hypothesis.settings.register_profile("long", max_examples=2000, **_LENIENT)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Set in the environment so that the workers of pytest-xdist, which inherit it, draw from the same seed.
os.environ.setdefault("JAXCONV_FC_SEED", str(secrets.randbits(32)))


def pytest_report_header():
    return f"random geometries: JAXCONV_FC_SEED={os.environ['JAXCONV_FC_SEED']}, jax {jax.__version__}"


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Every geometry compiles programs of its own: kept to the end, they would fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _forget_programs_of_random_geometries(request):
    """Thousands at once are more mappings than Linux grants a process: LLVM ends in a segmentation fault."""
    yield
    if {"chunk", "number"} & set(request.fixturenames):
        jax.clear_caches()


@pytest.fixture
def run_seed():
    """The seed of this run; a test that uses it names it in its failures."""
    return int(os.environ["JAXCONV_FC_SEED"])


@pytest.fixture
def rng():
    """A fixed generator, for tests whose data need not vary."""
    return np.random.default_rng(0)

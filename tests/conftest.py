"""Strict numerics for every test, Hypothesis profiles and fixtures. Settings are in environment.py."""

import gc

import environment
import hypothesis
import jax
import numpy as np
import pytest
from handwritten import COMPILED

from jaxconv_fc.products import cpu

# No test may lean on an implicit conversion or an implicit broadcast of ranks.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Unless told otherwise, a GPU rounds the factors of float32 products to 10 bits and a TPU to 7. The tests
# compare with bounds of float32. test_precision.py has what the library asks for without this line.
jax.config.update("jax_default_matmul_precision", "highest")

_LENIENT = {
    "deadline": None,  # the first example of a shape compiles
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    "print_blob": True,
}
hypothesis.settings.register_profile("default", max_examples=5, **_LENIENT)
hypothesis.settings.register_profile("long", max_examples=2000, **_LENIENT)
hypothesis.settings.load_profile(environment.HYPOTHESIS_PROFILE)


MOST_PROGRAMS = 500  # that a process keeps from file to file
_kept = 0  # how many programs had been compiled when they were last forgotten


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of ``pytest -n 2``: each file to one worker, which compiles what its tests share once. In the order of
    collection, so that the small doctests come last and the workers end together."""
    from xdist.scheduler import LoadFileScheduling

    if config.option.dist != "load":
        return None
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_finish():
    """What is imported stays. Python would look through all of it, again and again, for what is no longer
    used: a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_report_header():
    devices = ", ".join(f"{device.platform}: {device.device_kind}" for device in jax.devices())
    return [
        f"random geometries: JAXCONV_FC_SEED={environment.SEED}, jax {jax.__version__}",
        f"devices: {devices}",
    ]


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """A program takes 12 of the 65,530 mappings that Linux allows a process, and 2 MB of memory. Until there
    are many, files share what they all compile: the operations of arrays that are not jitted. The tests of a
    file share more."""
    global _kept
    yield
    if len(COMPILED) - _kept > MOST_PROGRAMS:
        jax.clear_caches()
        _kept = len(COMPILED)


@pytest.fixture(params=["sums over taps", "convolutions"])
def cpu_form(request, monkeypatch):
    """Both forms that a product has on the CPU: geometries as small as these would all take the first."""
    if request.param == "convolutions":
        jax.clear_caches()
        monkeypatch.setattr(cpu, "MOST_TERMS", -1)
        monkeypatch.setattr(cpu, "MOST_DOTS", -1)
    yield request.param
    if request.param == "convolutions":
        jax.clear_caches()


@pytest.fixture
def run_seed():
    """The seed of this run; a test that uses it names it in its failures."""
    return environment.SEED


@pytest.fixture
def rng():
    """A fixed generator, for tests whose data need not vary."""
    return np.random.default_rng(0)

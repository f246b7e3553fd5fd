"""What a user finds without reading: dir(), help() and the version."""

import importlib.metadata
import pydoc
import re
import subprocess
import sys

import pytest

import jaxconv_fc as fc


def test_dir_shows_the_public_names_and_modules_and_nothing_else():
    shown = set(dir(fc))
    assert {"as_matrix", "conv_spec", "ConvSpec", "__version__"} <= shown
    assert {"curvature", "neurons", "show", "spectrum", "testing"} <= shown
    assert not {"annotations", "axis", "entries", "products", "functions", "matrix"} & shown
    assert {name for name in shown if name.startswith("_")} == {"__version__"}
    assert all(hasattr(fc, name) for name in shown)


@pytest.mark.parametrize("module", [fc.curvature, fc.neurons, fc.show, fc.spectrum, fc.testing])
def test_public_modules_show_what_is_public(module):
    assert sorted(dir(module)) == sorted(module.__all__)
    text = pydoc.render_doc(module, renderer=pydoc.plaintext)
    assert all(re.search(rf"\b{name}\(", text) for name in module.__all__)


def test_help_begins_with_a_map_that_names_every_function():
    missing = [name for name in fc.__all__ if not re.search(rf"\b{name}\b", fc.__doc__)]
    assert missing == ["ConvSite"]  # an entry of what find_convs returns
    assert fc.__doc__.splitlines()[0] in pydoc.render_doc(fc, renderer=pydoc.plaintext)


def test_the_version_is_that_of_the_distribution():
    assert fc.__version__ == importlib.metadata.version("jaxconv_fc")


def test_an_import_loads_nothing_that_only_some_functions_need():
    """scipy.sparse and scipy.special take as long to load as the whole library."""
    heavy = ("scipy.sparse", "scipy.special", "jax.experimental.sparse", "matplotlib", "highspy", "matfree")
    code = f"import jaxconv_fc, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""What an example says before it runs; that each one runs is a step of .ci/run."""

import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("example", "module", "extras"),
    [
        ("digits.py", "sklearn.datasets", "examples"),
        ("digits.py", "matplotlib", "examples"),
        ("private.py", "sklearn.datasets", "examples"),
        ("spectrum.py", "matfree", "examples,spectrum"),
        ("lipschitz.py", "optax", "examples,networks"),
        ("deblur.py", "lineax", "examples,spectrum"),
    ],
)
def test_an_example_names_the_extra_that_it_lacks(example, module, extras, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    message = str(stopped.value)
    assert message.count("\n") == 0
    assert f"pip install 'jaxconv_fc[{extras}]'" in message
    assert module.split(".")[0] in message


def test_progress_of_streaming_is_one_line_without_a_terminal(monkeypatch, capsys):
    pytest.importorskip("resource")
    small = ["--size", "16", "--channels", "4", "--megabytes", "0.05"]
    monkeypatch.setattr(sys, "argv", ["streaming.py", *small])
    runpy.run_path(str(EXAMPLES / "streaming.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "\r" not in out
    assert sum("output rows" in line for line in out.splitlines()) == 1

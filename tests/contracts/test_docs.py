"""Every public name is in the API reference, with formula, shapes, errors, source and a doctest.

And every block of Python in the site runs: in a notebook when the site is built, elsewhere as a doctest.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import jaxconv_fc as fc
from benchmarks import report

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MATHS = (DOCS / "maths.md").read_text()
MODULES = [name for name in dir(fc) if inspect.ismodule(getattr(fc, name))]


def public_names():
    """``{"apply": <function>, "spectrum.rank": <function>, ...}``: all that a user is told of."""
    found = {name: getattr(fc, name) for name in fc.__all__}
    for module in MODULES:
        room = getattr(fc, module)
        for name in room.__all__:
            if getattr(room, name) not in found.values():
                found[f"{module}.{name}"] = getattr(room, name)
    return found


NAMES = public_names()
FUNCTIONS = [name for name, value in NAMES.items() if not inspect.isclass(value)]
CLASSES = [name for name, value in NAMES.items() if inspect.isclass(value)]


def docstring(name):
    return inspect.getdoc(NAMES[name]) or ""


def section(name, title):
    """The indented lines under a heading such as ``Args:``; empty without one."""
    found = re.search(rf"^{title}:\n((?:(?:  .*)?\n)+)", docstring(name) + "\n", re.MULTILINE)
    return found[1] if found else ""


def entries(name, title):
    """What a section describes, ``["in_shape", "out_shape", "tol"]`` if the first entry describes two."""
    heads = re.findall(r"^  (\S[^:`]*):", section(name, title), re.MULTILINE)
    return [entry.strip().lstrip("*") for head in heads for entry in head.split(",")]


def sources():
    """``[("apply_transpose", 2), ...]``: the functions that the first table of maths.md has a section for."""
    for number, row in re.findall(r"^\| \[(\d+)\].*\|(.*)\|$", MATHS, re.MULTILINE):
        for word in re.findall(r"`(\w+)`", row):
            yield from ((name, number) for name in FUNCTIONS if name.split(".")[-1] == word)


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_begins_with_a_formula_or_law(name):
    first = docstring(name).split("\n\n")[0]
    formula = r"=|@|\|\||\^| / |>|\bsum\b|\bM\[|\w\(\w"  # the last one: a call that is the definition
    assert any(re.search(formula, literal) for literal in re.findall(r"``([^`]+)``", first)), first


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_has_every_argument_the_result_and_the_errors(name):
    signature = inspect.signature(NAMES[name])
    assert entries(name, "Args") == list(signature.parameters)
    assert section(name, "Returns") or signature.return_annotation in (None, "None")
    errors = section(name, "Raises")
    found = entries(name, "Raises")
    assert found, "no errors"
    assert all(re.fullmatch(r"[A-Z]\w+Error", error) for error in found), found
    assert not re.search(r"\. +[A-Z]\w+Error:", errors), "one error per line"


@pytest.mark.parametrize("name", CLASSES)
def test_the_docstring_of_a_class_has_every_attribute(name):
    fields = getattr(NAMES[name], "_fields", None) or [f.name for f in dataclasses.fields(NAMES[name])]
    assert set(fields) <= set(entries(name, "Attributes"))


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_has_a_doctest(name):
    assert re.search(r"^>>> ", docstring(name), re.MULTILINE)


@pytest.mark.parametrize(("name", "number"), list(sources()))
def test_a_docstring_names_its_section_of_the_mathematics(name, number):
    assert re.search(rf"docs/maths\.md,\s+sections?[\s\d,and]*\b{number}\b", docstring(name))


def test_every_section_that_is_named_exists():
    sections = set(re.findall(r"^## (\d+)\.", MATHS, re.MULTILINE))
    for file in (ROOT / "jaxconv_fc").rglob("*.py"):
        for numbers in re.findall(r"docs/maths\.md,\s+sections?\s+([\d,and\s]+)", file.read_text()):
            assert set(re.findall(r"\d+", numbers)) <= sections, file


def test_every_public_name_is_in_the_api_reference():
    shown = []
    for page in sorted((DOCS / "api").glob("*.md")):
        module = "jaxconv_fc"
        for directive, value in re.findall(r"^\.\. (\w+):: ([\w.]+)", page.read_text(), re.MULTILINE):
            if directive == "currentmodule":
                module = value
            else:
                shown.append(f"{module}.{value}".removeprefix("jaxconv_fc."))
    assert sorted(shown) == sorted(NAMES)


PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *ROOT.glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_python_runs(page):
    """In a notebook as a cell; elsewhere as a doctest, which pytest collects from the page."""
    text = page.read_text()
    fence = r"^ *```+(?:python|py|pycon|ipython3?)\b[^\n]*\n(.*?)^ *```"
    blocks = re.findall(fence, text, re.MULTILINE | re.DOTALL)
    assert all(block.startswith(">>> ") for block in blocks), blocks
    cells = re.findall(r"^```+\{code-cell\}", text, re.MULTILINE)
    assert bool(cells) == text.startswith("---\nfile_format: mystnb"), "cells are run in notebooks only"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page):
    for target in re.findall(r"\]\(([\w./-]+\.\w+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_figures_shown_are_those_of_the_committed_results():
    begin, end = "<!-- measured: python -m benchmarks --summary -->", "<!-- end of measured -->"
    shown = (DOCS / "measured.md").read_text().split(begin)[1].split(end)[0].strip()
    assert shown == report.summary(ROOT / "benchmarks" / "results")


def files_of_the_house():
    """The files of the library in the order of CONTRIBUTING's table, as ``folder/file.py``."""
    source, folder = ROOT / "jaxconv_fc", ""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## The house")[1].split("## ")[0]
    for room, cell in re.findall(r"^\| (`\w+/` |)\| (`[^|]*) \|", table, re.MULTILINE):
        folder = room.strip(" `") or folder
        for name in re.findall(r"`(\w+)`", cell):
            inside = f"{folder}{name}.py"
            yield inside if (source / inside).exists() else f"{name}.py"


def test_imports_point_up_the_table_of_the_house():
    """Those inside of functions too. The table names every file."""
    source, row_of = ROOT / "jaxconv_fc", {name: row for row, name in enumerate(files_of_the_house())}
    files = {str(f.relative_to(source)): f for f in source.rglob("*.py") if f.name != "__init__.py"}
    assert files.keys() == row_of.keys()
    for name, file in files.items():
        found = re.findall(r"^ *from jaxconv_fc\.?([\w.]*) import ([^\n(]*)", file.read_text(), re.MULTILINE)
        for module, names in found:
            for imported in [module, *(f"{module}.{n.split()[0]}" for n in names.split(", ") if n)]:
                row = row_of.get(imported.strip(".").replace(".", "/") + ".py", -1)
                assert row < row_of[name], f"{name} imports {imported}"

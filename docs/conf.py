"""How the site is built: python -m sphinx -W --keep-going -j auto docs docs/_build/html

Warnings are errors, so a link or a reference that leads nowhere fails the build, as does a cell that raises.
"""

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import jaxconv_fc as fc

logger = logging.getLogger(__name__)

# The notebooks inherit these: pages look alike on every machine, and programs that run once compile faster.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

project = "jaxconv_fc"
copyright = "The jaxconv_fc authors"
version = release = fc.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [("py:class", r"(?!jaxconv_fc\.).*")]  # types of other libraries

html_theme = "furo"
html_title = f"jaxconv_fc {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sphinx = False

# Notebooks: run anew at every build, and stop it where a cell raises.
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
myst_enable_extensions = ["tasklist"]
myst_heading_anchors = 3  # the anchors that GitHub gives headings

# Docstrings.
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 88

_MODULES = ("", "spectrum.", "neurons.", "show.", "testing.")
_HEADINGS = re.findall(r"^## (\d+)\. (.*)$", (Path(__file__).parent / "maths.md").read_text(), re.MULTILINE)
_ANCHORS = {number: nodes.make_id(f"{number}. {title}") for number, title in _HEADINGS}


def link_sections(app: Any, what: Any, name: Any, obj: Any, options: Any, lines: list[str]) -> None:
    """``docs/maths.md, sections 3 and 14`` in a docstring becomes links to these sections."""

    def linked(match: re.Match[str]) -> str:
        numbers = re.findall(r"\d+", match[0])
        links = [f"`section {n} <../maths.html#{_ANCHORS[n]}>`__" for n in numbers]
        return f"docs/maths.md, {' and '.join(links)}"

    source = r"docs/maths\.md,\s+sections?\s+\d+(\s+and\s+\d+)?"
    lines[:] = re.sub(source, linked, "\n".join(lines)).split("\n")


def resolve_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """:func:`apply` in a docstring is the public function, whichever module the docstring belongs to."""
    domain, document = env.get_domain("py"), node.get("refdoc", "")
    for module in _MODULES:
        full = f"jaxconv_fc.{module}{node.get('reftarget')}"
        if node.get("refdomain") == "py" and full in domain.objects:
            return domain.resolve_xref(env, document, app.builder, node["reftype"], full, node, contnode)
    return None


class Gallery(SphinxDirective):
    """Thumbnails. A line is ``page#section caption``. It shows the first picture there, and leads there."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        entries = [line.split(maxsplit=1) for line in self.content]
        return [nodes.container(classes=["gallery"], entries=entries)]


def fill_galleries(app: Any, doctree: Any, docname: str) -> None:
    for gallery in doctree.findall(lambda node: isinstance(node, nodes.container) and "entries" in node):
        for place, caption in gallery["entries"]:
            page, section = place.split("#")
            sections = [v for v in app.env.get_doctree(page).findall(nodes.section) if section in v["ids"]]
            picture = next((image for v in sections for image in v.findall(nodes.image)), None)
            if picture is None:
                logger.warning("%s has no picture", place, location=gallery)
                continue
            target = f"{app.builder.get_relative_uri(docname, page)}#{section}"
            link = nodes.reference("", caption, refuri=target, internal=True)
            thumbnail = nodes.image(uri=picture["uri"], candidates=picture["candidates"], alt=caption)
            gallery += nodes.container("", thumbnail, nodes.paragraph("", "", link), classes=["thumb"])


def setup(app: Any) -> None:
    app.add_directive("gallery", Gallery)
    app.connect("doctree-resolved", fill_galleries)
    app.connect("autodoc-process-docstring", link_sections)
    app.connect("missing-reference", resolve_name)

"""How the site is built: python -m sphinx -W --keep-going docs docs/_build

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

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the notebooks inherit it: pages look alike on every machine

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
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # the anchors that GitHub gives headings

# Docstrings.
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

_MODULES = ("jaxconv_fc", "jaxconv_fc.spectrum", "jaxconv_fc.neurons", "jaxconv_fc.show", "jaxconv_fc.testing")
_HEADINGS = re.findall(r"^## (\d+)\. (.*)$", (Path(__file__).parent / "maths.md").read_text(), re.MULTILINE)
_SECTIONS = {number: nodes.make_id(f"{number}. {title}") for number, title in _HEADINGS}


def link_sections(app: Any, what: Any, name: Any, obj: Any, options: Any, lines: list[str]) -> None:
    """``docs/maths.md, section 3`` in a docstring becomes a link to that section."""
    text = re.sub(
        r"docs/maths\.md,\s+section\s+(\d+)",
        lambda match: f"`{match[0]} <../maths.html#{_SECTIONS[match[1]]}>`__",
        "\n".join(lines),
    )
    lines[:] = text.split("\n")


def resolve_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """:func:`apply` in a docstring means the public function, whichever module the docstring belongs to."""
    domain = env.get_domain("py")
    for module in _MODULES:
        full = f"{module}.{node.get('reftarget')}"
        if node.get("refdomain") == "py" and full in domain.objects:
            document = node.get("refdoc", "")
            return domain.resolve_xref(env, document, app.builder, node["reftype"], full, node, contnode)
    return None


class Gallery(SphinxDirective):
    """Thumbnails that lead to pages. A line is ``page number caption``, with the number of a picture of it."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        return [nodes.container(classes=["gallery"], entries=[line.split(maxsplit=2) for line in self.content])]


def fill_galleries(app: Any, doctree: Any, docname: str) -> None:
    for gallery in doctree.findall(lambda node: isinstance(node, nodes.container) and "entries" in node):
        for page, number, caption in gallery["entries"]:
            pictures = list(app.env.get_doctree(page).findall(nodes.image))[int(number) :]
            if not pictures:
                logger.warning("%s has no picture %s", page, number, location=gallery)
                continue
            target = app.builder.get_relative_uri(docname, page)
            link = nodes.reference("", caption, refuri=target, internal=True)
            copy = {name: pictures[0][name] for name in ("uri", "candidates")}
            thumbnail = nodes.image(**copy, alt=caption)
            gallery += nodes.container("", thumbnail, nodes.paragraph("", "", link), classes=["thumb"])


def setup(app: Any) -> None:
    app.add_directive("gallery", Gallery)
    app.connect("doctree-resolved", fill_galleries)
    app.connect("autodoc-process-docstring", link_sections)
    app.connect("missing-reference", resolve_name)

"""A table of a notebook. Its lines have the colour of the text, so it suits light and dark pages."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_LEFT, _RIGHT = (f"padding:2px 8px;text-align:{side}" for side in ("left", "right"))


def table(rows: Iterable[Sequence[str]], words: Sequence[int], head: bool = True) -> str:
    """An HTML table of texts. The columns ``words`` are aligned to the left; the first row may be a head."""
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if head and i == 0 else "td"
        cells = (
            f'<{tag} style="{_LEFT if j in words else _RIGHT}">{html.escape(cell)}</{tag}>'
            for j, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"

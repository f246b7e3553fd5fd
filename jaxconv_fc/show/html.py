"""Tables of a notebook. Their lines have the colour of the text, so they suit light and dark pages."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import fields

from jaxconv_fc.memory import readable
from jaxconv_fc.show.text import format_matrix
from jaxconv_fc.spec import ConvSpec, conv_spec

_ALWAYS = "lhs_shape", "rhs_shape", "window_strides", "padding"
_SHOWN = 16, 32  # rows and columns of the largest M that is shown beside a geometry
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


def spec_table(spec: ConvSpec) -> str:
    """The arguments of a geometry that are not the default, and the size of M; M itself too, if small."""
    ones = (1,) * len(spec.axes)
    default = conv_spec((1,) * (len(ones) + 2), (1,) * (len(ones) + 2), ones, "VALID")
    rows = []
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name in _ALWAYS or value != getattr(default, field.name):
            rows.append((field.name, str(value)))
    rows.append(("in_shape → out_shape", f"{spec.in_shape} → {spec.out_shape}"))
    density = spec.nse / max(1, spec.out_size * spec.in_size)
    rows.append(("M", f"{spec.out_size:,} × {spec.in_size:,}, {spec.nse:,} stored ({density:.2%})"))
    sizes = spec.nbytes("float32")._asdict().items()
    rows.append(("float32", ", ".join(f"{name} {readable(size)}" for name, size in sizes)))
    small = spec.out_size <= _SHOWN[0] and spec.in_size <= _SHOWN[1]
    return table(rows, (0, 1), head=False) + (format_matrix(spec)._repr_html_() if small else "")

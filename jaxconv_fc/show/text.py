"""M as text, the way a textbook prints it, the names of kernel entries, and a geometry as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from string import ascii_lowercase

import jax.numpy as jnp
import numpy as np

from jaxconv_fc.geometry.arguments import Array
from jaxconv_fc.geometry.entries import stored_entries
from jaxconv_fc.geometry.memory import readable
from jaxconv_fc.geometry.spec import ConvSpec, as_operand, check_spec, conv_spec
from jaxconv_fc.show.html import table


class MatrixText(str):
    """The text of a matrix. A notebook shows it as a table: bars become borders, and zeros are pale."""

    def _repr_html_(self) -> str:
        lines = []
        for line in self.splitlines():
            cells = []
            for separator, entry in re.findall(r"([ |\[]*)([^ |\]]+)", line):
                style = "text-align:center;padding:2px 6px"
                style += f";border-left:{separator.count('|')}px solid" if "|" in separator else ""
                style += ";opacity:0.3" if entry == "0" else ""
                cells.append(f'<td style="{style}">{entry}</td>')
            lines.append(f"<tr>{''.join(cells)}</tr>")
        return f'<table style="border-collapse:collapse;font-family:monospace">{"".join(lines)}</table>'


def format_matrix(
    spec: ConvSpec, kernel: Array | None = None, *, max_rows: int = 40, max_columns: int = 80
) -> MatrixText:
    """M as text: line ``i`` shows ``M[i, 0]``, ``M[i, 1]``, ..., by name, or by value when a kernel is given.

    Names follow the row-major order of the kernel: ``a, b, c, ...``, or ``k0, k1, ...`` for more than 26
    entries. Taps that meet are a sum: ``a+c``. A space separates neighbours along the last axis of
    ``spec.in_shape``, ``|`` separates rows of the image, ``||`` channels, and so on (axes of size 1 do not
    count). Beyond ``max_rows`` or ``max_columns`` the middle is left out. In a notebook the text, which is a
    ``str``, shows as a table.

    Args:
      spec: the geometry.
      kernel: array of shape ``spec.rhs_shape``.
      max_rows, max_columns: how many are shown at most.

    Returns:
      A ``str``.

    Raises:
      TypeError, ValueError: the kernel is not an array of shape ``spec.rhs_shape``.

    >>> import jaxconv_fc as fc
    >>> print(fc.format_matrix(fc.conv_spec((1, 1, 3, 3), (1, 1, 2, 2), (1, 1), "VALID")))
    [a b 0|c d 0|0 0 0]
    [0 a b|0 c d|0 0 0]
    [0 0 0|a b 0|c d 0]
    [0 0 0|0 a b|0 c d]
    """
    check_spec(spec)
    text = entry_text(spec, None if kernel is None else as_operand("kernel", kernel, spec, "rhs_shape"))
    columns = _ends(spec.in_size, max_columns)
    lines = []
    for row in _ends(spec.out_size, max_rows):
        entries = entries_of_row(spec, row, [c for c in columns if c is not None]) if row is not None else {}
        cells = ["..." if c is None else text(entries.get(c, [])) for c in columns]
        lines.append(cells if row is not None else None)
    width = max((len(v) for line in lines if line for v in line if v != "..."), default=1)
    return MatrixText("\n".join("..." if v is None else _bracketed(spec, columns, v, width) for v in lines))


def _bracketed(spec: ConvSpec, columns: Sequence[int | None], cells: Sequence[str], width: int) -> str:
    """One row. Before a column stands a bar for each inner axis of the input whose index is 0 again there."""
    parts = []
    for column, cell in zip(columns, cells, strict=True):
        bars = "|" * sum(column % block == 0 for block in blocks(spec.in_shape)) if column is not None else ""
        if parts:
            parts.append(" " if parts[-1] == "..." else bars or " ")
        parts.append(cell if cell == "..." else cell.rjust(width))
    return f"[{''.join(parts)}]"


def blocks(shape: Sequence[int]) -> list[int]:
    """The sizes of the blocks that delimiters stand between: rows of the image, channels, and so on."""
    shape = [n for n in shape if n > 1]
    return [math.prod(shape[-i:]) for i in range(1, len(shape))]


def entries_of_row(spec: ConvSpec, row: int, shown: Sequence[int]) -> dict[int, list[int]]:
    """``{column: taps}`` of some columns of a row: the flat indices of the kernel entries that meet there."""
    met: dict[int, list[int]] = {}
    for _, columns, taps in stored_entries(spec, np.array([row])):
        among = np.isin(columns, shown)
        for column, tap in zip(columns[among].tolist(), taps[among].tolist(), strict=True):
            met.setdefault(column, []).append(tap)
    return met


def entry_text(spec: ConvSpec, kernel: Array | None) -> Callable[[Sequence[int]], str]:
    """The function that writes an entry of M, given the flat indices of the kernel entries that meet there.

    It writes their names, ``a+c``, or the sum of their values where a kernel is given.
    """
    if kernel is None:
        few = math.prod(spec.rhs_shape) <= len(ascii_lowercase)
        return lambda taps: "+".join(ascii_lowercase[t] if few else f"k{t}" for t in taps) or "0"
    flat = np.asarray(kernel).ravel()
    code = "g" if jnp.issubdtype(flat.dtype, jnp.inexact) else "d"
    return lambda taps: f"{np.add.reduce(flat[taps], dtype=flat.dtype):{code}}" if taps else "0"


def _ends(size: int, most: int) -> list[int | None]:
    """The indices ``range(size)``; if there are more than ``most``, both ends with None between them."""
    if size <= most:
        return list(range(size))
    return [*range((most + 1) // 2), None, *range(size - most // 2, size)]


def _spec_table(spec: ConvSpec) -> str:
    """The arguments of a geometry that are not the default, and the size of M; M itself too, if small."""
    ones = (1,) * len(spec.axes)
    default = conv_spec((1, 1, *ones), (1, 1, *ones), ones, "VALID")
    always = "lhs_shape", "rhs_shape", "window_strides", "padding"
    values = [(field.name, getattr(spec, field.name)) for field in fields(spec)]
    rows = [(n, str(value)) for n, value in values if n in always or value != getattr(default, n)]
    rows.append(("in_shape → out_shape", f"{spec.in_shape} → {spec.out_shape}"))
    density = spec.nse / max(1, spec.out_size * spec.in_size)
    rows.append(("M", f"{spec.out_size:,} × {spec.in_size:,}, {spec.nse:,} stored ({density:.2%})"))
    sizes = spec.nbytes("float32")._asdict().items()
    rows.append(("float32", ", ".join(f"{name} {readable(size)}" for name, size in sizes)))
    small = spec.out_size <= 16 and spec.in_size <= 32
    return table(rows, (0, 1), head=False) + (format_matrix(spec)._repr_html_() if small else "")


# Notebooks look for it there. The geometry itself knows nothing of text.
ConvSpec._repr_html_ = _spec_table

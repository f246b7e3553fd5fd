"""M as text, the way a textbook prints it, and the names of kernel entries."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from string import ascii_lowercase

import jax.numpy as jnp
import numpy as np

from jaxconv_fc.arguments import Array
from jaxconv_fc.entries import stored_entries
from jaxconv_fc.spec import ConvSpec, as_operand, check_spec


class MatrixText(str):
    """The text of a matrix. A notebook shows it as a table: bars become borders, and zeros are pale."""

    def _repr_html_(self) -> str:
        return _html(self)


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
    return MatrixText("\n".join("..." if v is None else _line(spec, columns, v, width) for v in lines))


def _html(text: str) -> str:
    lines = []
    for line in text.splitlines():
        cells = [_html_cell(*pair) for pair in re.findall(r"([ |\[]*)([^ |\]]+)", line)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table style="border-collapse:collapse;font-family:monospace">{"".join(lines)}</table>'


def _html_cell(separator: str, text: str) -> str:
    style = "text-align:center;padding:2px 6px"
    style += f";border-left:{separator.count('|')}px solid" if "|" in separator else ""
    style += ";opacity:0.3" if text == "0" else ""
    return f'<td style="{style}">{text}</td>'


def _line(spec: ConvSpec, columns: Sequence[int | None], cells: Sequence[str], width: int) -> str:
    parts = []
    for column, cell in zip(columns, cells, strict=True):
        separator = " " if column is None or not parts or parts[-1] == "..." else _separator(spec, column)
        parts += [separator] * bool(parts) + [cell if cell == "..." else cell.rjust(width)]
    return f"[{''.join(parts)}]"


def _separator(spec: ConvSpec, column: int) -> str:
    """The text before a column: a bar for each inner axis of the input whose index is 0 again there."""
    return "|" * sum(column % block == 0 for block in blocks(spec.in_shape)) or " "


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

"""M and its neurons, to look at: as text, as pictures and as tables of a notebook."""

from jaxconv_fc.show.field import animate as animate
from jaxconv_fc.show.field import receptive_field as receptive_field
from jaxconv_fc.show.matrix import spy as spy
from jaxconv_fc.show.text import format_matrix as format_matrix

__all__ = [
    "animate",
    "format_matrix",
    "receptive_field",
    "spy",
]


def __dir__() -> list[str]:
    return list(__all__)

"""M and its neurons, to look at: as text, as pictures and as tables of a notebook."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from jaxconv_fc.show.text import format_matrix as format_matrix

if _TYPE_CHECKING:
    from jaxconv_fc.show.field import animate as animate
    from jaxconv_fc.show.field import receptive_field as receptive_field
    from jaxconv_fc.show.matrix import spy as spy

__all__ = [
    "animate",
    "format_matrix",
    "receptive_field",
    "spy",
]

# Pictures are loaded when first touched: `import jaxconv_fc` needs the text alone.
_PICTURES = {"animate": "field", "receptive_field": "field", "spy": "matrix"}


def __getattr__(name: str) -> _Any:
    if name in _PICTURES:
        return getattr(_import_module(f"{__name__}.{_PICTURES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)

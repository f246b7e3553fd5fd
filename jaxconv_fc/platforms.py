"""The table of platforms: what each one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxconv_fc.cpu import CPU
from jaxconv_fc.forms import Forms
from jaxconv_fc.gpu import GPU
from jaxconv_fc.sharding import Bound, PlatformForms
from jaxconv_fc.tpu import TPU

PLATFORMS = {"cpu": CPU, "gpu": GPU, "tpu": TPU}  # names as in jax.default_backend()


def on_each(of: Callable[[Forms], Callable[..., Any]], *given: Any) -> PlatformForms:
    """``of(record)(*given, *operands)``, with the record of the platform on which the program runs."""
    return PlatformForms(**{name: Bound(of(record), given) for name, record in PLATFORMS.items()})

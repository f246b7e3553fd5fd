"""What a program does on a GPU. What it shares with a TPU is in :mod:`jaxconv_fc.accelerators`."""

from __future__ import annotations

from jaxconv_fc import accelerators
from jaxconv_fc.forms import Forms

GPU = Forms(
    correlate=accelerators.correlate,
    kernel_gradient=accelerators.kernel_gradient,
    fold=accelerators.fold,
    svd=accelerators.svd,
    singular_values=accelerators.singular_values,
    method=lambda spec, count, dtype: "convolution",
    column_bytes=None,
)

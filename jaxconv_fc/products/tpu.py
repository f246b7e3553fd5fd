"""What a program does on a TPU. What it shares with a GPU is in :mod:`jaxconv_fc.products.accelerators`.

A form of its own takes the place of a shared one: ``ACCELERATOR._replace(fold=...)``.
"""

from jaxconv_fc.products.accelerators import ACCELERATOR

TPU = ACCELERATOR

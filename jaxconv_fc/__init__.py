"""The matrix of any convolution in JAX, its transpose and its gradients."""

import importlib as _importlib
from typing import Any as _Any

from jaxconv_fc.adjoint import kernel_matrix as kernel_matrix
from jaxconv_fc.adjoint import matrix_vjp as matrix_vjp
from jaxconv_fc.adjoint import transpose as transpose
from jaxconv_fc.batched import batched_apply as batched_apply
from jaxconv_fc.composition import compose as compose
from jaxconv_fc.dense import as_affine as as_affine
from jaxconv_fc.dense import as_matrix as as_matrix
from jaxconv_fc.dense import matrix_columns as matrix_columns
from jaxconv_fc.dense import matrix_rows as matrix_rows
from jaxconv_fc.dense import update_matrix as update_matrix
from jaxconv_fc.functions.affine import local_affine as local_affine
from jaxconv_fc.functions.affine import matrix_of as matrix_of
from jaxconv_fc.functions.connect import fully_connected as fully_connected
from jaxconv_fc.functions.find import find_convs as find_convs
from jaxconv_fc.functions.sites import ConvSite as ConvSite
from jaxconv_fc.linear_operator import as_linear_operator as as_linear_operator
from jaxconv_fc.memory import memory_limit as memory_limit
from jaxconv_fc.products import apply as apply
from jaxconv_fc.products import apply_transpose as apply_transpose
from jaxconv_fc.products import kernel_vjp as kernel_vjp
from jaxconv_fc.projection import conv_distance as conv_distance
from jaxconv_fc.projection import detect_conv as detect_conv
from jaxconv_fc.projection import kernel_from_matrix as kernel_from_matrix
from jaxconv_fc.projection import nearest_conv as nearest_conv
from jaxconv_fc.show import format_matrix as format_matrix
from jaxconv_fc.sparse.formats import as_bcoo as as_bcoo
from jaxconv_fc.sparse.formats import as_bcsr as as_bcsr
from jaxconv_fc.sparse.formats import as_scipy as as_scipy
from jaxconv_fc.sparse.formats import diagonals as diagonals
from jaxconv_fc.sparse.rows import row_block as row_block
from jaxconv_fc.sparse.rows import row_blocks as row_blocks
from jaxconv_fc.sparse.shards import shard_bcoo as shard_bcoo
from jaxconv_fc.sparse.shards import shard_matrix as shard_matrix
from jaxconv_fc.spec import ConvSpec as ConvSpec
from jaxconv_fc.spec import conv_spec as conv_spec

# Public modules whose names are general words, loaded when first touched.
_MODULES = ("spectrum", "testing")


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

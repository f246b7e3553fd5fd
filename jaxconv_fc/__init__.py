"""The matrix of any convolution in JAX, its transpose and its gradients."""

import importlib as _importlib
from typing import Any as _Any

from jaxconv_fc.adjoint import compose as compose
from jaxconv_fc.adjoint import conv_distance as conv_distance
from jaxconv_fc.adjoint import detect_conv as detect_conv
from jaxconv_fc.adjoint import kernel_from_matrix as kernel_from_matrix
from jaxconv_fc.adjoint import kernel_matrix as kernel_matrix
from jaxconv_fc.adjoint import kernel_vjp as kernel_vjp
from jaxconv_fc.adjoint import matrix_vjp as matrix_vjp
from jaxconv_fc.adjoint import nearest_conv as nearest_conv
from jaxconv_fc.adjoint import transpose as transpose
from jaxconv_fc.affine import local_affine as local_affine
from jaxconv_fc.affine import matrix_of as matrix_of
from jaxconv_fc.apply import apply as apply
from jaxconv_fc.apply import apply_transpose as apply_transpose
from jaxconv_fc.batched import batched_apply as batched_apply
from jaxconv_fc.dense import as_affine as as_affine
from jaxconv_fc.dense import as_matrix as as_matrix
from jaxconv_fc.dense import matrix_columns as matrix_columns
from jaxconv_fc.dense import matrix_rows as matrix_rows
from jaxconv_fc.dense import update_matrix as update_matrix
from jaxconv_fc.linear_operator import as_linear_operator as as_linear_operator
from jaxconv_fc.show import format_matrix as format_matrix
from jaxconv_fc.sparse import as_bcoo as as_bcoo
from jaxconv_fc.sparse import as_bcsr as as_bcsr
from jaxconv_fc.sparse import as_scipy as as_scipy
from jaxconv_fc.sparse import diagonals as diagonals
from jaxconv_fc.sparse import row_block as row_block
from jaxconv_fc.sparse import row_blocks as row_blocks
from jaxconv_fc.sparse import shard_bcoo as shard_bcoo
from jaxconv_fc.sparse import shard_matrix as shard_matrix
from jaxconv_fc.spec import ConvSpec as ConvSpec
from jaxconv_fc.spec import conv_spec as conv_spec
from jaxconv_fc.spec import memory_limit as memory_limit
from jaxconv_fc.tracing import ConvSite as ConvSite
from jaxconv_fc.tracing import find_convs as find_convs
from jaxconv_fc.tracing import fully_connected as fully_connected

# Public modules whose names are general words, loaded when first touched.
_MODULES = ("spectrum", "testing")


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The matrix of any convolution in JAX, its transpose and its gradients.

M @ x.ravel() == conv(x, kernel).ravel(), with M of shape (out_size, in_size) for one example.

    the geometry            conv_spec, ConvSpec
    M, dense                as_matrix, as_affine, matrix_rows, matrix_columns, update_matrix, memory_limit
    M, sparse               as_bcoo, as_bcsr, as_scipy, as_scipy_affine, row_block, row_blocks
    M by its diagonals      diagonals, diagonal_offsets, interleaved_rows
    over devices            shard_matrix, shard_bcoo
    M x and M^T y, no M     apply, apply_transpose, batched_apply, as_linear_operator
    the transpose           transpose, testing.assert_transpose
    gradients               kernel_vjp, kernel_matrix, matrix_vjp
    from M to a kernel      kernel_from_matrix, conv_distance, detect_conv, nearest_conv
    two convolutions        compose
    any JAX function        with_products, find_convs, fully_connected
    a function's matrix     matrix_of, sparse_matrix_of, local_affine, as_conv
    its affine layers       affine_layers, AffineLayers, AffineLayer
    in the place of lax's   conv_general_dilated
    gradients of a batch    curvature.gradient_norms, curvature.kfac_factors, ... (help(jaxconv_fc.curvature))
    norms and spectrum      spectrum.spectral_norm, spectrum.singular_values, ... (help(jaxconv_fc.spectrum))
    neurons                 neurons.receptive_field, neurons.projective_field, ... (help(jaxconv_fc.neurons))
    to look at              format_matrix, show.spy, show.receptive_field, show.animate
    for your own tests      testing.assert_matches_lax, testing.dot_test

Start with ``spec = conv_spec(x.shape, kernel.shape, (1, 1), "SAME")`` and ``as_matrix(spec, kernel)``.
"""

import importlib as _importlib
import types as _types
from typing import Any as _Any

from jaxconv_fc.functions.affine import local_affine as local_affine
from jaxconv_fc.functions.affine import matrix_of as matrix_of
from jaxconv_fc.functions.as_conv import as_conv as as_conv
from jaxconv_fc.functions.connect import fully_connected as fully_connected
from jaxconv_fc.functions.convolutions import conv_general_dilated as conv_general_dilated
from jaxconv_fc.functions.convolutions import with_products as with_products
from jaxconv_fc.functions.find import find_convs as find_convs
from jaxconv_fc.functions.layers import affine_layers as affine_layers
from jaxconv_fc.functions.network import AffineLayer as AffineLayer
from jaxconv_fc.functions.network import AffineLayers as AffineLayers
from jaxconv_fc.functions.sites import ConvSite as ConvSite
from jaxconv_fc.functions.sparse import sparse_matrix_of as sparse_matrix_of
from jaxconv_fc.geometry.memory import memory_limit as memory_limit
from jaxconv_fc.geometry.spec import ConvSpec as ConvSpec
from jaxconv_fc.geometry.spec import conv_spec as conv_spec
from jaxconv_fc.matrix.dense import as_affine as as_affine
from jaxconv_fc.matrix.dense import as_matrix as as_matrix
from jaxconv_fc.matrix.dense import matrix_columns as matrix_columns
from jaxconv_fc.matrix.dense import matrix_rows as matrix_rows
from jaxconv_fc.matrix.dense import update_matrix as update_matrix
from jaxconv_fc.matrix.detect import detect_conv as detect_conv
from jaxconv_fc.matrix.detect import nearest_conv as nearest_conv
from jaxconv_fc.matrix.formats import as_bcoo as as_bcoo
from jaxconv_fc.matrix.formats import as_bcsr as as_bcsr
from jaxconv_fc.matrix.formats import as_scipy as as_scipy
from jaxconv_fc.matrix.formats import as_scipy_affine as as_scipy_affine
from jaxconv_fc.matrix.formats import diagonal_offsets as diagonal_offsets
from jaxconv_fc.matrix.formats import diagonals as diagonals
from jaxconv_fc.matrix.formats import interleaved_rows as interleaved_rows
from jaxconv_fc.matrix.projection import conv_distance as conv_distance
from jaxconv_fc.matrix.projection import kernel_from_matrix as kernel_from_matrix
from jaxconv_fc.matrix.rows import row_block as row_block
from jaxconv_fc.matrix.rows import row_blocks as row_blocks
from jaxconv_fc.matrix.shards import shard_bcoo as shard_bcoo
from jaxconv_fc.matrix.shards import shard_matrix as shard_matrix
from jaxconv_fc.products.adjoint import kernel_matrix as kernel_matrix
from jaxconv_fc.products.adjoint import matrix_vjp as matrix_vjp
from jaxconv_fc.products.adjoint import transpose as transpose
from jaxconv_fc.products.batched import batched_apply as batched_apply
from jaxconv_fc.products.composition import compose as compose
from jaxconv_fc.products.linear_operator import as_linear_operator as as_linear_operator
from jaxconv_fc.products.product import apply as apply
from jaxconv_fc.products.product import apply_transpose as apply_transpose
from jaxconv_fc.products.product import kernel_vjp as kernel_vjp
from jaxconv_fc.show.text import format_matrix as format_matrix

__version__ = "0.1.0"

# Public modules whose names are general words, loaded when first touched.
_MODULES = ("curvature", "neurons", "show", "spectrum", "testing")


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = sorted(  # pyright: ignore[reportUnsupportedDunderAll]
    name for name, value in globals().items() if name[0] != "_" and not isinstance(value, _types.ModuleType)
)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]

from jaxconv_fc.apply import apply as apply, apply_transpose as apply_transpose
from jaxconv_fc.dense import as_affine as as_affine, as_matrix as as_matrix
from jaxconv_fc.dense import matrix_columns as matrix_columns, matrix_rows as matrix_rows
from jaxconv_fc.spec import ConvSpec as ConvSpec, conv_spec as conv_spec, memory_limit as memory_limit
from jaxconv_fc.show import format_matrix as format_matrix

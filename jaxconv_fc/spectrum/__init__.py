"""Norms and spectrum of M itself, with its padding, strides and dilations as they are."""

from jaxconv_fc.spectrum.bounds import spectral_norm_bounds as spectral_norm_bounds
from jaxconv_fc.spectrum.golub_kahan import SingularTriplet as SingularTriplet
from jaxconv_fc.spectrum.largest import singular_triplet as singular_triplet
from jaxconv_fc.spectrum.largest import spectral_norm as spectral_norm
from jaxconv_fc.spectrum.largest import top_singular_values as top_singular_values
from jaxconv_fc.spectrum.norms import column_norms as column_norms
from jaxconv_fc.spectrum.norms import frobenius_norm as frobenius_norm
from jaxconv_fc.spectrum.norms import inf_norm as inf_norm
from jaxconv_fc.spectrum.norms import one_norm as one_norm
from jaxconv_fc.spectrum.norms import orthogonality_residual as orthogonality_residual
from jaxconv_fc.spectrum.norms import row_norms as row_norms
from jaxconv_fc.spectrum.norms import trace as trace
from jaxconv_fc.spectrum.power import PowerStep as PowerStep
from jaxconv_fc.spectrum.power import power_step as power_step
from jaxconv_fc.spectrum.power import start_vector as start_vector
from jaxconv_fc.spectrum.systems import lstsq as lstsq
from jaxconv_fc.spectrum.systems import pseudo_inverse as pseudo_inverse
from jaxconv_fc.spectrum.systems import solve as solve
from jaxconv_fc.spectrum.values import condition_number as condition_number
from jaxconv_fc.spectrum.values import log_abs_det as log_abs_det
from jaxconv_fc.spectrum.values import rank as rank
from jaxconv_fc.spectrum.values import singular_values as singular_values

__all__ = [
    "PowerStep",
    "SingularTriplet",
    "column_norms",
    "condition_number",
    "frobenius_norm",
    "inf_norm",
    "log_abs_det",
    "lstsq",
    "one_norm",
    "orthogonality_residual",
    "power_step",
    "pseudo_inverse",
    "rank",
    "row_norms",
    "singular_triplet",
    "singular_values",
    "solve",
    "spectral_norm",
    "spectral_norm_bounds",
    "start_vector",
    "top_singular_values",
    "trace",
]


def __dir__() -> list[str]:
    return list(__all__)

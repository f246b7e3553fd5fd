"""Gradients of a whole batch: their norms, inner products and Kronecker factors."""

from jaxconv_fc.curvature.factors import kfac_factors as kfac_factors
from jaxconv_fc.curvature.moments import patch_moment as patch_moment
from jaxconv_fc.curvature.norms import gradient_gram as gradient_gram
from jaxconv_fc.curvature.norms import gradient_norms as gradient_norms

__all__ = [
    "gradient_gram",
    "gradient_norms",
    "kfac_factors",
    "patch_moment",
]


def __dir__() -> list[str]:
    return list(__all__)

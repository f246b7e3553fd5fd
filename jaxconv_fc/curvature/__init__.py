"""Gradients of a whole batch: their norms, inner products and Kronecker factors."""

from jaxconv_fc.curvature.factors import kfac_factors as kfac_factors
from jaxconv_fc.curvature.model import ModelLayer as ModelLayer
from jaxconv_fc.curvature.model import model_gradient_norms as model_gradient_norms
from jaxconv_fc.curvature.model import model_gram as model_gram
from jaxconv_fc.curvature.model import model_kfac as model_kfac
from jaxconv_fc.curvature.model import model_layers as model_layers
from jaxconv_fc.curvature.moments import patch_moment as patch_moment
from jaxconv_fc.curvature.norms import gradient_gram as gradient_gram
from jaxconv_fc.curvature.norms import gradient_norms as gradient_norms

__all__ = [
    "ModelLayer",
    "gradient_gram",
    "gradient_norms",
    "kfac_factors",
    "model_gradient_norms",
    "model_gram",
    "model_kfac",
    "model_layers",
    "patch_moment",
]


def __dir__() -> list[str]:
    return list(__all__)

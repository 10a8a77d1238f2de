"""Curvature: the compressed Fisher matrix or the Gram matrix, their spectra, damping."""

from ooc_influence.curvature.curvature import Curvature, resolve_curvature
from ooc_influence.curvature.dual import GramCurvature, fit_gram, gram_matrix
from ooc_influence.curvature.fit import choose_method, fit_curvature, fit_fisher
from ooc_influence.curvature.low_rank import LowRankCurvature
from ooc_influence.curvature.spectral import DiagonalCurvature, SpectralCurvature

__all__ = [
    "Curvature",
    "DiagonalCurvature",
    "GramCurvature",
    "LowRankCurvature",
    "SpectralCurvature",
    "choose_method",
    "fit_curvature",
    "fit_fisher",
    "fit_gram",
    "gram_matrix",
    "resolve_curvature",
]  # fmt: skip

"""Curvature: the compressed Fisher matrix or the Gram matrix, their spectra, damping."""

from ooc_influence.curvature.curvature import Curvature, resolve_curvature
from ooc_influence.curvature.damping import DampingMode
from ooc_influence.curvature.diagonal import DiagonalCurvature
from ooc_influence.curvature.fisher import fit_fisher
from ooc_influence.curvature.gram import GramCurvature
from ooc_influence.curvature.gram_fit import fit_gram, gram_matrix
from ooc_influence.curvature.leading import TopCurvature
from ooc_influence.curvature.side import choose_side, fit_curvature
from ooc_influence.curvature.spectral import SpectralCurvature

__all__ = [
    "Curvature", "DampingMode", "DiagonalCurvature", "GramCurvature", "SpectralCurvature", "TopCurvature",
    "choose_side", "fit_curvature", "fit_fisher", "fit_gram", "gram_matrix", "resolve_curvature",
]  # fmt: skip

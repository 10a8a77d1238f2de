"""Curvature: the compressed Fisher matrix or the Gram matrix, their spectra, damping."""

from ooc_influence.curvature.costs import (
    USUAL_PASSES,
    choose_method,
    fisher_memory,
    fit_size,
    gram_memory,
    largest_rank,
    plan_low_rank,
    reduced_alternatives,
)
from ooc_influence.curvature.curvature import Curvature
from ooc_influence.curvature.eigen import (
    DEFAULT_DAMPING,
    BlockShape,
    precondition_bytes,
    resolved,
    self_influence_bytes,
)
from ooc_influence.curvature.fit import fit_curvature, fit_fisher, fit_gram, fit_kronecker, gram_matrix
from ooc_influence.curvature.kronecker import PRIOR, KroneckerPrior, has_prior
from ooc_influence.curvature.resolve import resolve_curvature
from ooc_influence.curvature.rows import choose_rows
from ooc_influence.curvature.trajectory import OWN_EFFECT, TRAJECTORY, find_effects, fit_trajectory

__all__ = [
    "DEFAULT_DAMPING", "OWN_EFFECT", "PRIOR", "TRAJECTORY", "USUAL_PASSES", "BlockShape", "Curvature", "KroneckerPrior",
    "choose_method", "choose_rows", "find_effects", "fisher_memory", "fit_curvature", "fit_fisher", "fit_gram",
    "fit_kronecker", "fit_size", "fit_trajectory", "gram_matrix", "gram_memory", "has_prior", "largest_rank",
    "plan_low_rank", "precondition_bytes", "reduced_alternatives", "resolve_curvature", "resolved",
    "self_influence_bytes",
]  # fmt: skip

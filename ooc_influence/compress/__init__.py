"""Compressors: what is kept of a gradient."""

from ooc_influence.compress.compressor import Compressor, Eigenbasis, KroneckerBasis
from ooc_influence.compress.defaults import LARGEST_STORE, WIDE, DefaultDropout, RowBudget, kronecker_basis
from ooc_influence.compress.dropout import Dropout, all_entries, variance_factors
from ooc_influence.compress.eigenbasis import RetainedEnergy, basis_weights, fit_eigenbasis, has_residuals
from ooc_influence.compress.kronecker import WhitenedEnergy
from ooc_influence.compress.projection import (
    FullGradient,
    Gaussian,
    Grass,
    Identity,
    LoGra,
    Pca,
    Projection,
    Rademacher,
    Sjlt,
)
from ooc_influence.compress.reduce import reduce_store
from ooc_influence.compress.representation import rewrite_store
from ooc_influence.compress.residuals import RESIDUALS, unpack_norms
from ooc_influence.compress.sketch import SKETCH_DIMS, check_sketch, query_turn, residual_factors, write_sketch
from ooc_influence.store import PilotMoments

BASELINES = {kind.name: kind for kind in (Gaussian, Rademacher, Sjlt, Grass, LoGra, Pca, Identity)}

__all__ = [
    "BASELINES",
    "LARGEST_STORE",
    "RESIDUALS",
    "SKETCH_DIMS",
    "WIDE",
    "Compressor",
    "DefaultDropout",
    "Dropout",
    "Eigenbasis",
    "FullGradient",
    "Gaussian",
    "Grass",
    "Identity",
    "KroneckerBasis",
    "LoGra",
    "Pca",
    "PilotMoments",
    "Projection",
    "Rademacher",
    "RetainedEnergy",
    "RowBudget",
    "Sjlt",
    "WhitenedEnergy",
    "all_entries",
    "basis_weights",
    "check_sketch",
    "fit_eigenbasis",
    "has_residuals",
    "kronecker_basis",
    "query_turn",
    "reduce_store",
    "residual_factors",
    "rewrite_store",
    "unpack_norms",
    "variance_factors",
    "write_sketch",
]

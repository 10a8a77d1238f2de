"""Curvature: the compressed Fisher matrix or the Gram matrix, their spectra, damping."""

from ooc_influence.curvature.costs import FitShapes, fisher_memory, gram_memory, module_ranges
from ooc_influence.curvature.curvature import Curvature, resolve_curvature
from ooc_influence.curvature.eigen import (
    DEFAULT_DAMPING,
    BlockShape,
    precondition_bytes,
    resolved,
    self_influence_bytes,
)
from ooc_influence.curvature.fit import choose_method, fit_curvature, fit_fisher, fit_gram, gram_matrix
from ooc_influence.curvature.rows import choose_rows

__all__ = [
    "DEFAULT_DAMPING", "BlockShape", "Curvature", "FitShapes", "choose_method", "choose_rows", "fisher_memory",
    "fit_curvature", "fit_fisher", "fit_gram", "gram_matrix", "gram_memory", "module_ranges", "precondition_bytes",
    "resolve_curvature", "resolved", "self_influence_bytes",
]  # fmt: skip

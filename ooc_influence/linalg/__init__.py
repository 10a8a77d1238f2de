"""BLAS and eigendecompositions: what curvature and influence stand on."""

from ooc_influence.linalg.blas import GramAccumulator
from ooc_influence.linalg.eigen import symmetric_eigen

__all__ = ["GramAccumulator", "symmetric_eigen"]

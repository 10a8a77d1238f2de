"""Curvature: the compressed Fisher matrix, its spectrum, damping."""

from ooc_influence.curvature.curvature import Curvature, resolve_curvature
from ooc_influence.curvature.damping import DampingMode
from ooc_influence.curvature.fisher import fit_fisher

__all__ = ["Curvature", "DampingMode", "fit_fisher", "resolve_curvature"]

"""BLAS, eigendecompositions, spectra, row weights: what compress, curvature and influence stand on."""

from ooc_influence.linalg.accumulate import GramAccumulator
from ooc_influence.linalg.eigen import symmetric_eigen
from ooc_influence.linalg.engines import Team, choose_engine
from ooc_influence.linalg.rows import Rows, WeightedRows
from ooc_influence.linalg.spectrum import Spectrum, Way, spectrum_ways, top_spectrum
from ooc_influence.linalg.triangle import TriangleTiles
from ooc_influence.linalg.weights import ONE_LABEL, Weighting, clipped_rows, parse_weighting, row_weights

__all__ = [
    "ONE_LABEL", "GramAccumulator", "Rows", "Spectrum", "Team", "TriangleTiles", "Way", "WeightedRows", "Weighting",
    "choose_engine", "clipped_rows", "parse_weighting", "row_weights", "spectrum_ways",
    "symmetric_eigen", "top_spectrum",
]  # fmt: skip

"""BLAS, eigendecompositions, spectra, row weights: what compress, curvature and influence stand on."""

from ooc_influence.linalg.accumulate import (
    DiagonalAccumulator,
    GramAccumulator,
    ProductAccumulator,
    TriangleTiles,
    list_tiles,
    tile_side,
)
from ooc_influence.linalg.backend import Team, choose_engine
from ooc_influence.linalg.rows import (
    ONE_LABEL,
    Rows,
    WeightedRows,
    check_one_label,
    clipped_rows,
    parse_weighting,
    row_errors,
    row_weights,
)
from ooc_influence.linalg.spectrum import Solver, Spectrum, spectrum_solvers, symmetric_eigen, top_spectrum
from ooc_influence.linalg.subspace import Top, find_top, iteration_bytes, orthonormal_slabs, start_basis

__all__ = [
    "ONE_LABEL",
    "DiagonalAccumulator",
    "GramAccumulator",
    "ProductAccumulator",
    "Rows",
    "Solver",
    "Spectrum",
    "Team",
    "Top",
    "TriangleTiles",
    "WeightedRows",
    "check_one_label",
    "choose_engine",
    "clipped_rows",
    "find_top",
    "iteration_bytes",
    "list_tiles",
    "orthonormal_slabs",
    "parse_weighting",
    "row_errors",
    "row_weights",
    "spectrum_solvers",
    "start_basis",
    "symmetric_eigen",
    "tile_side",
    "top_spectrum",
]  # fmt: skip

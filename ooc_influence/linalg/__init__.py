"""BLAS, eigendecompositions, spectra, row weights: what compress, curvature and influence stand on."""

from ooc_influence.linalg.accumulate import (
    TILE,
    DiagonalAccumulator,
    MatrixAccumulator,
    Tile,
    TriangleTiles,
    list_tiles,
    mirror,
    tile_side,
)
from ooc_influence.linalg.backend import (
    Engine,
    Floats,
    Matrix,
    Team,
    check_device_memory,
    choose_engine,
    parse_device,
    row_squares,
)
from ooc_influence.linalg.kept import KeptNorms, kept_dampings, sign_energy
from ooc_influence.linalg.rows import (
    ONE_LABEL,
    Numbers,
    Range,
    RowPartition,
    WeightedBlock,
    WeightedRows,
    check_one_label,
    is_token_loss,
    parse_weighting,
    partition_rows,
    row_errors,
    row_weights,
)
from ooc_influence.linalg.spectrum import (
    TOLERANCE,
    Eigenpairs,
    Solver,
    Spectrum,
    block_moments,
    choose_solver,
    iteration_bytes,
    iteration_memory,
    multiply_rows,
    orthonormal_slabs,
    spectrum_solvers,
    start_basis,
    subspace_iteration,
    symmetric_eigen,
    top_spectrum,
)
from ooc_influence.linalg.whitening import (
    LayerMoments,
    Whitening,
    basis_settings,
    damping_scope,
    kronecker_damping,
    kronecker_dampings,
    mean_moments,
    storage_scale,
    whitening_damping,
)
from ooc_influence.linalg.whole import choose_whole_engine, multiply_whole

__all__ = [
    "ONE_LABEL", "TILE", "TOLERANCE", "DiagonalAccumulator", "Eigenpairs", "Engine", "Floats", "KeptNorms",
    "LayerMoments", "Matrix", "MatrixAccumulator", "Numbers", "Range", "RowPartition", "Solver", "Spectrum", "Team",
    "Tile", "TriangleTiles", "WeightedBlock", "WeightedRows", "Whitening", "basis_settings", "block_moments",
    "check_device_memory", "check_one_label", "choose_engine", "choose_solver", "choose_whole_engine",
    "damping_scope", "is_token_loss", "iteration_bytes", "iteration_memory", "kept_dampings", "kronecker_damping",
    "kronecker_dampings", "list_tiles", "mean_moments", "mirror", "multiply_rows", "multiply_whole",
    "orthonormal_slabs", "parse_device", "parse_weighting", "partition_rows", "row_errors", "row_squares",
    "row_weights", "sign_energy", "spectrum_solvers", "start_basis", "storage_scale", "subspace_iteration",
    "symmetric_eigen", "tile_side", "top_spectrum", "whitening_damping",
]  # fmt: skip

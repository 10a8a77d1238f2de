"""Eigendecomposition of symmetric matrices in float64: F = V diag(e) Vᵀ."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

Matrix = npt.NDArray[np.float64]


def symmetric_eigen(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """Return eigenvalues (d,), largest first, and eigenvectors (d, d) as columns; ``matrix`` is overwritten.

    The matrix is positive semi-definite by construction; eigenvalues that rounding made negative become zero.
    """
    values, vectors = scipy.linalg.eigh(matrix.T, overwrite_a=True, check_finite=False, driver="evd")
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]

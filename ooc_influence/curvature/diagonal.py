"""F's diagonal: the second moment of every column, f_j = (1/m) Σ w g_j², and nothing between columns.

    g_qᵀ (F + λI)⁻¹ g_i = Σ_j g_qj g_ij / (f_j + λ)

It costs one pass at the speed of reading, k numbers of memory, and no rotation afterwards. It is F itself, but for the
rounding of stored rows, where the columns are F's eigenbasis: a store that ``reduce`` has rotated. Elsewhere it is the
diagonal approximation. The group holds Σ w g² (``sum-00000``) and f, in the order of the columns (``eigenvalues``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.curvature import Matrix, share_outside
from ooc_influence.curvature.damping import resolved
from ooc_influence.curvature.spectral import SummedCurvature
from ooc_influence.curvature.sums import Sums, write_sum
from ooc_influence.store import create_array

_TILE_BYTES = 2**20  # of squared rows at a time: they stay in cache


class DiagonalCurvature(SummedCurvature, kinds=("diagonal",)):
    """A curvature of columns that have nothing to do with each other; its eigenvectors are the columns."""

    def fisher(self) -> Matrix:
        """Return F, (d, d)."""
        return np.diag(self.eigenvalues)

    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        """See :meth:`Curvature.precondition`."""
        result = np.empty((len(values), *gradients.shape))
        for out, value in zip(result, values, strict=True):
            np.divide(gradients, self.eigenvalues + value, out=out)
        return result

    def working_bytes(self, queries: int, values: int) -> int:
        """See :meth:`Curvature.working_bytes`."""
        return 8 * self.d * (queries * values + 2)

    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        """See :meth:`Curvature.self_influence`."""
        weights = (1 / (self.eigenvalues[:, None] + np.asarray(values))).astype(np.float32)
        result = np.empty((len(values), len(gradients)), np.float32)
        step = _rows(self.d)
        squares = np.empty((min(step, len(gradients)), self.d), np.float32)
        for start in range(0, len(gradients), step):
            part = gradients[start : start + step]
            np.square(part, out=squares[: len(part)])
            result[:, start : start + step] = (squares[: len(part)] @ weights).T
        return result

    def self_working_bytes(self, values: int) -> int:
        """See :meth:`Curvature.self_working_bytes`."""
        return 4 * self.d * (_rows(self.d) + 3 * values)

    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        """See :meth:`Curvature.outside_share`."""
        whole = np.asarray(gradients, np.float64)
        span = resolved(self.eigenvalues)
        return share_outside(np.square(whole[:, span]).sum(1), whole)


def _rows(d: int) -> int:
    return max(1, _TILE_BYTES // (4 * max(1, d)))


def write_diagonal(group: Any, total: Sums) -> None:
    """Write sums and their spectrum into a group."""
    (square,) = total.squares
    write_sum(group, 0, square)
    create_array(group, "eigenvalues", square.shape, square.shape, "float64", check=True)[...] = square / total.live

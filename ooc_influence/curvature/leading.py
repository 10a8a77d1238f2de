"""F by the top r of its spectrum: F ≈ V diag(e) Vᵀ + ē (I − V Vᵀ), ē the mean of the eigenvalues that are not known.

The trace is known, and with it ē = (tr F − Σ e)/(k − r). With z = Vᵀg, (F + λI)⁻¹ g = V z/(e + λ) + (g − V z)/(ē + λ)
for any λ. The group holds ``eigenvalues`` (r,) and ``eigenvectors`` (k, r) in float64 and, where F itself was summed,
the undamped sum as tiles of a triangle (``sum-00000``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.curvature import Matrix, dimension, share_outside
from ooc_influence.curvature.spectral import SummedCurvature, self_rows
from ooc_influence.errors import InputError
from ooc_influence.store import CHUNK_TARGET, array_store, find_array, open_group, read_part

_PANEL = 256  # rows brought to float64 at a time by each thread of self-influence
_LEAST_ROWS = 1024  # that all of them hold at a time, counted whatever their number
_reading = threading.Lock()  # threads that find norms read V once
VECTORS = "eigenvectors"


class TopCurvature(SummedCurvature, kinds=("top",)):
    """A curvature of which the leading eigenvectors are kept.

    Attributes
    ----------
    rest : float
        ē, what stands for each eigenvalue that is not known.
    """

    _vectors: Matrix | None = None

    def _load(self) -> None:
        super()._load()
        self.rest = float(self._attrs["rest"])

    @property
    def keeps_sums(self) -> bool:
        """See :class:`SummedCurvature`; not where the spectrum was found from the rows."""
        return bool(self._attrs["summed"])

    @property
    def eigenvectors(self) -> Matrix:
        """V, (d, r), one eigenvector a column (read on first use, then held)."""
        with _reading:
            if self._vectors is None:
                held = np.empty((self.d, len(self.eigenvalues)))
                for rows, values in self._slabs():
                    held[rows] = values
                self.check_fit()
                self._vectors = held
        return self._vectors

    def _slabs(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield V by rows: as it is held, or read and not kept."""
        step = slab_rows(len(self.eigenvalues))
        array: Any = None
        if self._vectors is None:
            array = find_array(open_group(array_store(self.path, read_only=True, chunk_bytes={}), "r"), VECTORS)
            step = int(array.chunks[0])
        for start in range(0, self.d, step):
            rows = slice(start, min(self.d, start + step))
            yield rows, read_part(array, rows) if self._vectors is None else self._vectors[rows]

    def fisher(self) -> Matrix:
        """Return F, (d, d), read from disk.

        Raises
        ------
        InputError
            If it was never summed.
        """
        if not self.keeps_sums:
            raise InputError(
                f"expected a curvature that keeps F; received {self.path}, whose spectrum was found from the rows: fit "
                "without rank, or with more memory"
            )
        return super().fisher()

    def effective_dimension(self, value: float) -> float:
        """Return d(λ), at most: the eigenvalues that are not known give most where they are all the same."""
        others = min(self.d, self.rows) - len(self.eigenvalues)
        tail = self.rest * (self.d - len(self.eigenvalues))
        return dimension(self.eigenvalues, value) + (tail / (tail / others + value) if others > 0 and tail > 0 else 0)

    def least_dimension(self, value: float) -> float:
        """See :class:`Curvature`: the eigenvalues that are not known give least where they are as large as can be."""
        tail = self.rest * (self.d - len(self.eigenvalues))
        return dimension(self.eigenvalues, value) + (tail / (float(self.eigenvalues[-1]) + value) if tail > 0 else 0)

    def _rotate(self, whole: Matrix) -> Matrix:
        """Return z = gradients @ V, (q, r)."""
        found = np.zeros((len(whole), len(self.eigenvalues)))
        for rows, values in self._slabs():
            found += whole[:, rows] @ values
        return found

    @property
    def _is_whole(self) -> bool:
        return len(self.eigenvalues) == self.d

    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        """See :meth:`Curvature.precondition`: V is read twice, a slab at a time, for all λ."""
        whole = np.asarray(gradients, np.float64)
        rotated = self._rotate(whole)
        result = np.empty((len(values), *whole.shape))
        for rows, vectors in self._slabs():
            outside = 0.0 if self._is_whole else whole[:, rows] - rotated @ vectors.T
            for out, value in zip(result, values, strict=True):
                np.matmul(rotated / (self.eigenvalues + value), vectors.T, out=out[:, rows])
                if not self._is_whole:
                    out[:, rows] += outside / (self.rest + value)
        self.check_fit()
        return result

    def working_bytes(self, queries: int, values: int) -> int:
        """See :meth:`Curvature.working_bytes`."""
        r = len(self.eigenvalues)
        held = 8 * self.d * r if self._vectors is not None else 0
        return held + top_working_bytes(self.d, r, queries, values)

    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        """See :meth:`Curvature.self_influence`."""
        result = np.empty((len(values), len(gradients)), np.float32)
        for start in range(0, len(gradients), _PANEL):  # float64: most of a norm may lie in the span
            part = gradients[start : start + _PANEL].astype(np.float64)
            squares = np.square(part @ self.eigenvectors)
            outside = np.zeros(len(part)) if self._is_whole else np.square(part).sum(1) - squares.sum(1)
            for out, value in zip(result, values, strict=True):
                rest = 0.0 if self._is_whole else np.maximum(outside, 0) / (self.rest + value)
                out[start : start + _PANEL] = squares @ (1 / (self.eigenvalues + value)) + rest
        return result

    def self_working_bytes(self, values: int) -> int:
        """See :meth:`Curvature.self_working_bytes`."""
        return top_self_bytes(self.d, len(self.eigenvalues), values)

    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        """See :meth:`Curvature.outside_share`: outside what is known of the spectrum."""
        whole = np.asarray(gradients, np.float64)
        return share_outside(np.square(self._rotate(whole)).sum(1), whole)

    def facts(self) -> dict[str, Any]:
        """See :meth:`Curvature.facts`; with what is known of the rest of the spectrum."""
        least = self.least_dimension(self.damping_value()) if self.trace > 0 else 0.0
        named = ("rank", "left_out", "rest", "passes", "residual", "converged", "way")
        found = super().facts() | {name: self._attrs[name] for name in named}
        return found | {"effective_dimension_at_least": least}


def top_working_bytes(d: int, r: int, queries: int, values: int) -> int:
    """Return what preconditioning by the top r of a spectrum of ``d`` columns holds."""
    step = min(d, slab_rows(r))
    return 3 * 8 * step * r + 8 * queries * (d * (1 + values) + 2 * r + 2 * step)


def top_self_bytes(d: int, r: int, values: int) -> int:
    """Return what self-influence by the top r of a spectrum of ``d`` columns holds."""
    rows = max(_LEAST_ROWS, self_rows(d))
    return 8 * d * r + 8 * rows * (2 * d + 2 * r + values + 2) + 8 * values * r + 3 * CHUNK_TARGET


def slab_rows(r: int) -> int:
    """Return the rows of a chunk of (k, r) eigenvectors."""
    return max(1, CHUNK_TARGET // (8 * max(1, r)))

"""The Gram side, for fewer rows than columns: K = A Aᵀ (m, m) with A = diag(√w) G, and F = AᵀA/m by K's eigenvectors.

With K = U diag(m e) Uᵀ, F's eigenvectors are V = AᵀU diag(m e)^(-1/2), (k, r), and Woodbury's identity
(F + λI)⁻¹ = (1/λ)[I − Aᵀ(AAᵀ + mλI)⁻¹A] becomes (1/λ)[I − V diag(e/(e + λ)) Vᵀ]: any λ, without the rows. The group
holds ``eigenvalues`` (r,), ``eigenvectors`` (k, r) and K itself, undamped, as ``gram`` (m, m), in float64. Eigenvectors
beyond :data:`HELD_BYTES` stay on disk and are read slab by slab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from ooc_influence.curvature.curvature import Curvature, Matrix, share_outside
from ooc_influence.curvature.damping import resolved
from ooc_influence.curvature.kernel import open_matrix
from ooc_influence.curvature.need import slab_rows
from ooc_influence.errors import CurvatureNotFoundError
from ooc_influence.store import array_store, exists, find_array, open_group, read_part

HELD_BYTES = 256 * 2**20  # of eigenvectors: up to here they are kept in memory
_ROWS = 1024  # rows whose self-influence is found at a time


class GramCurvature(Curvature, kinds=("gram",)):
    """A curvature of fewer rows than columns: eigenvectors are kept where F has an eigenvalue at all."""

    _vectors: Matrix | None = None

    @property
    def gram(self) -> zarr.Array[Any]:
        """K = A Aᵀ, (m, m) float64 on disk, undamped: row i is the i-th of the rows chosen, zero where dropped.

        Raises
        ------
        CurvatureNotFoundError
            If it was fitted before K was kept.
        """
        if not exists(self.path / "gram" / "zarr.json"):
            raise CurvatureNotFoundError(f"expected the Gram matrix in {self.path}; received none: fit with refit=True")
        found = open_matrix(self.path / "gram")
        self.check_fit()
        return found

    @property
    def eigenvectors(self) -> Matrix:
        """V, (d, r), one eigenvector a column (read on first use)."""
        if self._vectors is None:
            self._vectors = self._read("eigenvectors")
            self.check_fit()
        return self._vectors

    def _slabs(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield V slab by slab of its rows: all of it at once where it is small."""
        if self._vectors is not None or self._bytes <= HELD_BYTES:
            yield slice(0, self.d), self.eigenvectors
            return
        array = find_array(open_group(array_store(self.path, read_only=True, chunk_bytes={}), "r"), "eigenvectors")
        for start in range(0, self.d, self._slab_rows):
            rows = slice(start, min(self.d, start + self._slab_rows))
            yield rows, read_part(array, rows)
        self.check_fit()

    @property
    def _bytes(self) -> int:
        return 8 * self.d * len(self.eigenvalues)

    @property
    def _slab_rows(self) -> int:
        return slab_rows(self.d, len(self.eigenvalues))

    def fisher(self) -> Matrix:
        """Return F, (d, d), made of its spectrum."""
        return np.asarray((self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T)

    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        """See :meth:`Curvature.precondition`."""
        rotated = self._rotate(gradients)
        result = np.empty((len(values), *gradients.shape))
        for rows, vectors in self._slabs():
            for out, value in zip(result, values, strict=True):
                inside = (rotated * (self.eigenvalues / (self.eigenvalues + value))) @ vectors.T
                np.subtract(gradients[:, rows], inside, out=out[:, rows])
                out[:, rows] /= value
        return result

    def _rotate(self, gradients: npt.NDArray[Any]) -> Matrix:
        """Return Vᵀg of some rows, (b, r) float64: most of a norm may lie in the span, and the rest is a difference."""
        rotated = np.zeros((len(gradients), len(self.eigenvalues)))
        for rows, vectors in self._slabs():
            rotated += np.asarray(gradients[:, rows], np.float64) @ vectors
        return rotated

    def working_bytes(self, queries: int, values: int) -> int:
        """See :meth:`Curvature.working_bytes`."""
        return gram_working_bytes(self.d, len(self.eigenvalues), queries, values)

    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        """See :meth:`Curvature.self_influence`."""
        result = np.empty((len(values), len(gradients)), np.float32)
        for start in range(0, len(gradients), _ROWS):
            part = gradients[start : start + _ROWS]
            squares = np.square(self._rotate(part))
            total = np.einsum("ij,ij->i", part, part, dtype=np.float64)
            for out, value in zip(result, values, strict=True):
                found = (total - squares @ (self.eigenvalues / (self.eigenvalues + value))) / value
                out[start : start + _ROWS] = np.maximum(found, 0)
        return result

    def self_working_bytes(self, values: int) -> int:
        """See :meth:`Curvature.self_working_bytes`."""
        return gram_self_bytes(self.d, len(self.eigenvalues), values)

    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        """See :meth:`Curvature.outside_share`."""
        span = resolved(self.eigenvalues)
        inside = np.square(self._rotate(gradients)[:, span]).sum(1)
        return share_outside(inside, np.asarray(gradients, np.float64))


def gram_vectors_bytes(d: int, r: int) -> int:
    """Return what is held of V, (d, r), at a time."""
    whole = 8 * d * r
    return whole if whole <= HELD_BYTES else 2 * 8 * r * slab_rows(d, r)


def gram_working_bytes(d: int, r: int, queries: int, values: int) -> int:
    """Return what preconditioning by ``r`` eigenvectors of ``d`` columns holds."""
    return gram_vectors_bytes(d, r) + 8 * queries * (d * (2 + values) + 3 * r)


def gram_self_bytes(d: int, r: int, values: int) -> int:
    """Return what self-influence by ``r`` eigenvectors of ``d`` columns holds."""
    width = d if 8 * d * r <= HELD_BYTES else slab_rows(d, r)
    return gram_vectors_bytes(d, r) + 8 * _ROWS * (width + 3 * r + math.ceil(d / 2)) + 8 * values * r

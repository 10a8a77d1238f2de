"""The top of the spectrum of a symmetric matrix F known by its products: block subspace iteration.

Q ← orth(F Q) from a seeded random start, with a Rayleigh-Ritz step after every product (Halko, Martinsson and Tropp
2011, arXiv 0909.4061). It ends when the eigenvalues wanted hold hardly more of the trace than a product before. Q is
float32 for the products and orthonormalised in float64; the eigenvectors are orthonormal in float64. Memory: 16 k c
bytes, c columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ooc_influence.linalg.backend import Floats

Matrix = npt.NDArray[np.float64]
TOLERANCE = 1e-4  # relative growth of the sum of eigenvalues in a pass below which it ends
_SLAB = 1024  # rows turned to float64 at a time


class Top(NamedTuple):
    """The top eigenpairs.

    Attributes
    ----------
    eigenvalues : (r,) float64
        Largest first: vᵀ F v.
    vectors : (k, r) float32
        Columns, orthonormal to float32's rounding (see :func:`orthonormal_slabs`), the largest entry of each positive.
    residual : float
        The largest ‖F v − e v‖, relative to the largest eigenvalue.
    passes : int
        Products with F.
    converged : bool
        Whether it ended before the passes allowed did.
    """

    eigenvalues: Matrix
    vectors: Floats
    residual: float
    passes: int
    converged: bool


def iteration_bytes(k: int, columns: int) -> int:
    """Return what the iteration holds beside what multiplies, in bytes: the product, two bases, small matrices."""
    return 16 * k * columns + 40 * columns**2 + 8 * _SLAB * 3 * columns


def start_basis(k: int, columns: int, seed: int) -> Floats:
    """Return a random orthonormal basis, (k, columns), the same for a seed every time."""
    return _orthonormal(np.random.default_rng(seed).standard_normal((columns, k)))


def _orthonormal(product: Matrix) -> Floats:
    """Return orthonormal columns (k, c) with the span of the rows of ``product`` (c, k), which is overwritten."""
    found = scipy.linalg.qr(product.T, mode="economic", overwrite_a=True, check_finite=False)[0]
    return np.asarray(found, np.float32, order="F")


def find_top(
    multiply: Callable[[Floats], Matrix],
    basis: Floats,
    r: int,
    passes: int,
    save: Callable[[int, float, Floats], None],
    done: int = 0,
    held: float = 0.0,
) -> Top:
    """Return the top ``r`` eigenpairs of F.

    Parameters
    ----------
    multiply : callable
        Returns (F Q)ᵀ (c, k) float64 of Q (k, c).
    basis : (k, c) float32
        Where to start: orthonormal, c ≥ r.
    r : int
        Pairs wanted.
    passes : int
        Products at most.
    save : callable
        Told the passes done, what the eigenvalues held, and the basis for the next pass.
    done, held : int, float
        What it was told when ``basis`` was saved.
    """
    k, columns = basis.shape
    while True:
        product = multiply(basis)
        done += 1
        small = cross(basis, product)
        values, turn = scipy.linalg.eigh((small + small.T) / 2, check_finite=False)
        before, held = held, float(values[-r:].sum())
        exact = columns == k  # any basis of everything holds all there is
        converged = exact or (done > 1 and held - before <= TOLERANCE * held)
        if converged or done >= passes:
            break
        basis = _orthonormal(product)
        del product
        save(done, held, basis)
    chosen, turned = np.maximum(values[::-1][:r], 0.0), np.ascontiguousarray(turn[:, ::-1][:, :r])
    vectors, squares = np.empty((k, r), np.float32), np.zeros(r)
    largest = np.zeros(r, np.float32)
    for rows in _slabs(k):
        part = basis[rows].astype(np.float64) @ turned
        squares += np.square(product[:, rows].T @ turned - part * chosen).sum(0)
        vectors[rows] = part
        found = vectors[rows][np.abs(part).argmax(0), np.arange(r)]
        largest = np.where(np.abs(found) > np.abs(largest), found, largest)
    vectors *= np.where(largest < 0, np.float32(-1), np.float32(1))  # LAPACK's signs depend on rounding
    residual = float(np.sqrt(squares.max())) / max(float(chosen[0]), np.finfo(np.float64).tiny)
    return Top(chosen, vectors, residual, done, converged)


def cross(left: Floats, right: Matrix) -> Matrix:
    """Return leftᵀ rightᵀ, (c, d) float64, of ``left`` (k, c) float32 and ``right`` (d, k)."""
    total = np.zeros((left.shape[1], len(right)))
    for rows in _slabs(len(left)):
        total += left[rows].T.astype(np.float64) @ right[:, rows].T
    return total


def orthonormal_slabs(vectors: Floats, step: int = _SLAB) -> Iterator[tuple[slice, Matrix]]:
    """Yield the columns of ``vectors`` (k, r), orthonormal to float32's rounding, so to float64's, slab by slab."""
    small = np.zeros((vectors.shape[1], vectors.shape[1]))
    for rows in _slabs(len(vectors)):
        part = vectors[rows].astype(np.float64)
        small += part.T @ part
    factor = scipy.linalg.cholesky(small, lower=True, overwrite_a=True, check_finite=False)
    for rows in _slabs(len(vectors), step):
        yield rows, scipy.linalg.solve_triangular(factor, vectors[rows].T.astype(np.float64), lower=True).T


def _slabs(k: int, step: int = _SLAB) -> list[slice]:
    return [slice(start, min(k, start + step)) for start in range(0, k, step)]

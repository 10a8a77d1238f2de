"""How far compression moves F, inverse-Hessian-vector products and scores: bounds to compute, and the errors measured.

X (n, p) holds full train gradients, F = XᵀX/n, g a query's gradient, S the compression, λ an absolute damping. Exact
and compressed::

    K = XXᵀ/n    v = (F + λI)⁻¹ g     s = Xv              K̃ = XSᵀSXᵀ/n    ṽ = (SFSᵀ + λI)⁻¹ Sg    s̃ = XSᵀṽ

Two identities (derived in docs/theory.md) bring all errors down to one matrix and one vector of random sums::

    s̃ − s = λ(K̃ + λI)⁻¹ η    ṽ − Sv = −(SFSᵀ + λI)⁻¹ SXᵀ η/n    η = X(SᵀS − I)v

so ‖s̃ − s‖ ≤ ‖η‖ and ‖ṽ − Sv‖ ≤ ‖η‖/(2√(nλ)), whatever S is; E‖η‖² and E‖K̃ − K‖_F² are bounded in
:mod:`ooc_influence.compress.dropout`. By Jensen's inequality their roots bound mean errors, and by Markov's a root
over √δ bounds an error with probability 1 − δ. F and K have the same eigenvalues, so ‖K̃ − K‖_F bounds how far those of
F move (Hoffman and Wielandt 1953).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import spearmanr

from ooc_influence.errors import InputError

Floats = npt.NDArray[np.float64]
Compress = Callable[[Floats], Floats]
_COLUMNS = 4096  # of X in float64 at a time


@dataclass(frozen=True, eq=False)
class CompressionErrors:
    """Relative errors, or bounds of their root mean squares.

    Attributes
    ----------
    fisher : float
        ‖K̃ − K‖_F / ‖K‖_F.
    ihvp : (q,) float64
        ‖ṽ − Sv‖ / ‖v‖.
    scores : (q,) float64
        ‖s̃ − s‖ / ‖s‖.
    rank : (q,) float64 or None
        Spearman's correlation of s̃ and s; None for a bound.
    """

    fisher: float
    ihvp: Floats
    scores: Floats
    rank: Floats | None = None


class ExactInfluence:
    """Influence without compression: what compressed rows are compared with, and what bounds are computed from.

    Parameters
    ----------
    gradients : (n, p) float
        Full gradients of train rows, rows scaled by √w for a weighted curvature (scores are then scaled as well).
    queries : (q, p) float
        Full gradients of queries.

    Raises
    ------
    InputError
        For shapes that do not match.
    """

    def __init__(self, gradients: npt.NDArray[Any], queries: npt.NDArray[Any]) -> None:
        if gradients.ndim != 2 or queries.ndim != 2 or gradients.shape[1] != queries.shape[1]:
            raise InputError(f"expected (n, p) and (q, p) gradients; received {gradients.shape} and {queries.shape}")
        self.gradients, self.queries = gradients, queries
        self.n, self.p = gradients.shape
        self.energies = np.zeros(self.p)  # ‖x_e‖²
        self.kernel, self._cross = np.zeros((self.n, self.n)), np.zeros((len(queries), self.n))
        for first in range(0, self.p, _COLUMNS):
            part = np.asarray(gradients[:, first : first + _COLUMNS], np.float64)
            self.energies[first : first + _COLUMNS] = np.square(part).sum(0)
            self.kernel += part @ part.T
            self._cross += np.asarray(queries[:, first : first + _COLUMNS], np.float64) @ part.T
        self.kernel /= self.n

    @property
    def trace(self) -> float:
        """tr(F)."""
        return float(np.trace(self.kernel))

    def scores(self, value: float) -> Floats:
        """Return s = X(F + λI)⁻¹ g for each query, (q, n), as g Xᵀ(K + λI)⁻¹."""
        return _solve(self.kernel, self._cross, value)

    def products(self, value: float) -> Floats:
        """Return v = (F + λI)⁻¹ g for each query, (q, p), as (g − Xᵀs/n)/λ."""
        back = self.scores(value).astype(self.gradients.dtype) @ self.gradients
        return np.asarray((np.asarray(self.queries, np.float64) - back / self.n) / value)

    def measure(self, compress: Compress, value: float) -> CompressionErrors:
        """Return the errors of a compression: a linear map of (m, p) rows to (m, k)."""
        rows, queries = compress(self.gradients), compress(self.queries)
        exact, v = self.scores(value), self.products(value)
        kernel = rows @ rows.T / self.n
        scores = _solve(kernel, queries @ rows.T, value)
        products = (queries - scores @ rows / self.n) / value
        rank = np.array([spearmanr(a, b).statistic for a, b in zip(scores, exact, strict=True)])
        return CompressionErrors(
            float(np.linalg.norm(kernel - self.kernel) / np.linalg.norm(self.kernel)),
            _norms(products - compress(v)) / _norms(v),
            _norms(scores - exact) / _norms(exact),
            rank,
        )

    def dropout_bounds(self, factors: Floats, value: float) -> CompressionErrors:
        """Return the bounds for dropout, from ν_e of :func:`ooc_influence.compress.variance_factors`, (p,)."""
        total = np.square(self.products(value)) @ (factors * self.energies)
        return self._bounds(float(factors @ np.square(self.energies)), np.asarray(total), value)

    def projection_bounds(self, k: int, value: float) -> CompressionErrors:
        """Return the bounds for a Gaussian, Rademacher or sparse projection to ``k`` numbers."""
        whole, exact = float(self.energies.sum()), self.scores(value)
        total = (np.square(self.products(value)).sum(1) * whole + np.square(exact).sum(1)) / k
        return self._bounds((whole**2 + np.square(self.n * self.kernel).sum()) / k, total, value)

    def _bounds(self, fisher: float, total: Floats, value: float) -> CompressionErrors:
        """Return relative bounds from those of E‖X(SᵀS − I)Xᵀ‖² and E‖η‖²."""
        exact, v = _norms(self.scores(value)), _norms(self.products(value))
        root = np.sqrt(total)
        kernel = float(np.sqrt(fisher) / (self.n * np.linalg.norm(self.kernel)))
        return CompressionErrors(kernel, root / (2 * np.sqrt(self.n * value)) / v, root / exact)

    def concentration(self) -> float:
        """Return p Σ‖x_e‖⁴/(Σ‖x_e‖²)²: 1 where all coordinates have the same energy, p where one has all of it.

        The bound for uniform dropout is below the Gaussian one where this is below 1 + 1/e, with e = tr(F)²/‖F‖_F² the
        effective rank (docs/theory.md).
        """
        return float(self.p * np.square(self.energies).sum() / self.energies.sum() ** 2)


def reduction_bounds(
    rows: Floats, queries: Floats, bounds: CompressionErrors, exact: ExactInfluence, r: int, value: float
) -> CompressionErrors:
    """Add to a mask's bounds what its reduction to the top r of the masked rows' own eigenbasis can change.

    With e_j the eigenvalues of the masked F and z a masked query in its eigenbasis, scores change by at most
    √n ‖z_{>r}‖ max_{j>r} √e_j/(e_j + λ), K by √(Σ_{j>r} e_j²); products are the first r numbers of the masked ones.

    Parameters
    ----------
    rows, queries : (n, k), (q, k) float64
        Masked gradients, of the mask that ``bounds`` are of.
    r : int
        Numbers kept.
    """
    values, vectors = np.linalg.eigh(rows @ rows.T / exact.n)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    kept = min(r, int((values > values[0] * len(values) * np.finfo(np.float64).eps).sum()))
    inside = queries @ rows.T @ vectors[:, :kept] / np.sqrt(exact.n * values[:kept])
    outside = np.sqrt(np.maximum(np.square(queries).sum(1) - np.square(inside).sum(1), 0))
    tail = values[kept:]
    steepest = float((np.sqrt(tail) / (tail + value)).max(initial=0.0))
    return CompressionErrors(
        bounds.fisher + float(np.linalg.norm(tail) / np.linalg.norm(exact.kernel)),
        bounds.ihvp,
        bounds.scores + np.sqrt(exact.n) * outside * steepest / _norms(exact.scores(value)),
    )


def _solve(kernel: Floats, cross: Floats, value: float) -> Floats:
    """Return cross (kernel + λI)⁻¹."""
    if not value > 0:
        raise InputError(f"expected an absolute damping > 0; received {value}")
    factor = cho_factor(kernel + value * np.eye(len(kernel)))
    return np.asarray(cho_solve(factor, cross.T).T)


def _norms(rows: Floats) -> Floats:
    return np.asarray(np.linalg.norm(rows, axis=1))

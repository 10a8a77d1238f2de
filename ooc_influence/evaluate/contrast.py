"""By how much one removal raises losses more than others do, with intervals in which the luck of a choice counts.

The removal of a query's strongest rows is compared with m others, each in runs of the same seed: δ_jq is the loss of
query q after the one minus that after other j. How much the m differ among themselves says what a removal without a
reason could do, so the interval of a query's mean is one in which a further such removal would be found,

    mean_j δ_jq ± t · w_q √(1 + 1/m)        w_q² = Var_j δ_jq ,

not one of the mean alone, which any fixed rows leave if they are only compared often enough. Of the mean over Q
queries, whose lists differ, the variance is tr(AW), W the covariance of the δ_j (Q, Q) and A = (I + 11ᵀ/m)/Q²; where
each query has others of its own, A = (1 + 1/m)I/Q² and W is diagonal. Degrees of freedom are those of Satterthwaite
(1946), (m − 1) tr(AW)²/tr((AW)²). Queries count as they are, not as a sample of others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

Floats = npt.NDArray[np.float64]
_TAIL = 0.975  # of intervals of 95 %


@dataclass(frozen=True, eq=False)
class Contrast:
    """By how much losses are higher without the strongest rows than after m other removals, with 95 % intervals.

    Attributes
    ----------
    differences : (m, q) float64
        For every other removal and query, the loss without the query's strongest rows minus the loss after the other.
    shared : bool
        Whether the other removals are the same for all queries.
    """

    differences: Floats
    shared: bool

    @property
    def means(self) -> Floats:
        """Each query's mean, (q,)."""
        return np.asarray(self.differences.mean(0))

    @property
    def intervals(self) -> Floats:
        """Each query's interval, (q, 2); NaN where there is a single other removal."""
        m = len(self.differences)
        half = self._quantile(m - 1) * np.sqrt(self._variances * (1 + 1 / m))
        return np.stack([self.means - half, self.means + half], axis=1)

    @property
    def mean(self) -> float:
        """Mean over queries."""
        return float(self.differences.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The mean's interval; NaN where there is a single other removal."""
        m, q = self.differences.shape
        left = self.differences - self.means
        if m < 2:
            return float("nan"), float("nan")
        covariance = left.T @ left / (m - 1)  # of queries, over the other removals
        if self.shared:
            weights = np.eye(q) + 1 / m
        else:
            covariance, weights = np.diag(np.diag(covariance)), (1 + 1 / m) * np.eye(q)
        product = weights @ covariance / q**2
        variance, squares = float(np.trace(product)), float(np.trace(product @ product))
        freedom = (m - 1) * variance**2 / squares if squares > 0 else m - 1
        half = self._quantile(freedom) * np.sqrt(variance)
        return self.mean - half, self.mean + half

    @property
    def higher(self) -> int:
        """In how many comparisons the loss without the strongest rows is the higher one."""
        return int((self.differences > 0).sum())

    @property
    def comparisons(self) -> int:
        """Comparisons of two removals, for one query: m · q."""
        return int(self.differences.size)

    @property
    def _variances(self) -> Floats:
        """Return w², (q,); NaN for a single other removal."""
        m, q = self.differences.shape
        return np.full(q, np.nan) if m < 2 else np.asarray(self.differences.var(0, ddof=1))

    @staticmethod
    def _quantile(freedom: float) -> float:
        return float(student.ppf(_TAIL, freedom)) if freedom > 0 else float("nan")

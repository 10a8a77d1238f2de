"""Upper bounds of the scores of wide rows, from those that their sketch gives.

By Cauchy-Schwarz, a row's score and its sketch's differ by at most Σ_t E[q, t] F[row, t]
(:mod:`ooc_influence.compress.residuals`), times the row's weight where it is divided by its norm. What a score's
negative can be at most is bounded in the same way, for lists of the smallest. Bounds are found with the scores of a
tile, and those of rows that matter again, in float64: what is proven does not depend on the product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from ooc_influence.compress import RESIDUALS, unpack_norms
from ooc_influence.influence.engine import BEYOND, Floats
from ooc_influence.store import GradientStore

Numbers = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float64]
ROUNDING = 2.0**-20  # of bounds in float32, relative
_MOST_WEIGHT, _LEAST_WEIGHT = 2.0**45, 2.0**-63


@dataclass(frozen=True, eq=False)
class UpperBounds:
    """Bounds of some queries' scores.

    Attributes
    ----------
    factors : (L · q, t) float64
        E of each list; infinite where nothing is known.
    most_weight : float or None
        Rows with larger weights, or none, have norms that float32 lost, and nothing is known of them; None: the weights
        of the wide rows are the same, whatever they are.
    """

    factors: Matrix
    most_weight: float | None = None

    @classmethod
    def of(cls, factors: Matrix, norm_weights: Floats | None) -> Self:
        """Return those of lists with E; ``norm_weights`` are what squares of wide rows are summed with for norms."""
        if norm_weights is None:
            return cls(factors)
        largest = max(1.0, float(norm_weights.max(initial=0)))  # sums beyond have lost nothing that counts
        return cls(factors, _MOST_WEIGHT / largest**0.5)

    def divided(self, units: Floats) -> UpperBounds:
        """Return those of queries that are divided by ``units``, (L · q,)."""
        return replace(self, factors=self.factors / units[:, None])

    def rows(
        self, packed: npt.NDArray[np.int64], weights: Floats | None
    ) -> tuple[Matrix, npt.NDArray[np.bool_]]:  # fmt: skip
        """Return F of rows (b,), (L or 1, b, t), and whether they say nothing, (L or 1, b); F is zero there.

        ``weights`` are what the rows' scores are multiplied by, (L or 1, b).
        """
        norms = unpack_norms(packed)
        factors = np.concatenate([norms, np.ones((len(norms), 1), np.float32)], axis=1).astype(np.float64)[None]
        known = np.isfinite(norms).all(axis=1, keepdims=True).T
        if weights is not None:
            sizes = np.abs(weights.astype(np.float64))
            factors = factors * sizes[:, :, None]
            if self.most_weight is not None:  # a row of zeros has no weight
                plausible = (sizes >= _LEAST_WEIGHT) & (sizes <= self.most_weight)
                known = known & (plausible | (norms[:, 2] == 0))
        unknown = np.asarray(~(known & np.isfinite(factors).all(axis=2)), np.bool_)
        factors[unknown] = 0
        return factors, unknown

    def tile(self, factors: Matrix, unknown: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Return what to give :meth:`Engine.raised` for a tile, given :meth:`rows`: (L · q, t + 2), (L or 1, t + 2, b).

        A factor more makes bounds of unknown rows say nothing, and another those of lists that nothing is known of.
        """
        lists, rows = len(self.factors), factors.shape[:2]
        known = np.where(self.beyond[:, None], 0, self.factors)
        left = np.concatenate([known, np.ones((lists, 1)), np.where(self.beyond, BEYOND, 0)[:, None]], axis=1)
        right = np.concatenate([factors, np.where(unknown, BEYOND, 0)[:, :, None], np.ones((*rows, 1))], axis=2)
        right = np.minimum(right, np.finfo(np.float32).max)
        return left.astype(np.float32), np.ascontiguousarray(right.swapaxes(1, 2), np.float32)

    @property
    def beyond(self) -> npt.NDArray[np.bool_]:
        """Of which lists nothing is known, (L · q,)."""
        return np.asarray((~(self.factors <= BEYOND)).any(axis=1), np.bool_)

    def above(self, scores: Floats, lists: Numbers, factors: Matrix, unknown: npt.NDArray[np.bool_]) -> Floats:
        """Return upper bounds of pairs, (c,), rounded up.

        Parameters
        ----------
        scores : (c,) float32
            Exact ones by the sketch, or their negatives.
        lists : (c,) int64
            Each pair's.
        factors, unknown : (L or 1, c, t), (L or 1, c)
            Of each pair's row: see :meth:`rows`.
        """
        levels, pairs = lists * len(factors) // len(self.factors), np.arange(len(lists))
        with np.errstate(over="ignore", invalid="ignore"):
            found = scores + np.einsum("ct,ct->c", self.factors[lists], factors[levels, pairs])
        found[unknown[levels, pairs] | self.beyond[lists]] = BEYOND
        single = np.minimum(found, BEYOND).astype(np.float32)
        return np.asarray(np.nextafter(single, np.float32(np.inf)))


def residual_norms(store: GradientStore, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Return the norms of rows of a sketch, packed, (stop - start,)."""
    return np.asarray(store.small(f"columns/{RESIDUALS}", start, stop))


def residuals_of(store: GradientStore, rows: Numbers) -> npt.NDArray[np.int64]:
    """Return those of rows by number."""
    return np.asarray(store.values(f"columns/{RESIDUALS}", rows), np.int64)

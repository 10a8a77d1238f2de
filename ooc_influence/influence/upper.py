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

    def rows(self, packed: npt.NDArray[np.int64], weights: Floats | None) -> Floats:
        """Return F of rows (b,), (L or 1, t + 2, b): what to give :meth:`Engine.raised`, beside :attr:`lists`.

        ``weights`` are what the rows' scores are multiplied by, (L or 1, b). One factor more makes the bounds of rows
        of which nothing is known say nothing, and another those of such lists.
        """
        norms = unpack_norms(packed)
        sizes = np.ones((1, len(packed)), np.float32) if weights is None else np.abs(weights)
        factors = np.empty((len(sizes), len(norms) + 3, len(packed)), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(norms, sizes[:, None], out=factors[:, : len(norms)])
            factors[:, len(norms)] = sizes
            known = np.asarray(np.isfinite(factors[:, : len(norms) + 1].sum(axis=1)), np.bool_)
        if weights is not None and self.most_weight is not None:  # a row of zeros has no weight
            plausible = (sizes >= _LEAST_WEIGHT) & (sizes <= self.most_weight)
            known &= plausible | (norms[-1] == 0)
        factors[:, -2], factors[:, -1] = np.where(known, 0, BEYOND), 1
        if not known.all():
            levels, lost = np.nonzero(np.logical_not(known))
            factors[levels, :-2, lost] = 0
        return factors

    @property
    def lists(self) -> Matrix:
        """E of lists, (L · q, t + 2): see :meth:`rows`."""
        beyond = np.asarray(np.logical_not((self.factors <= BEYOND).all(axis=1)), np.bool_)
        known = np.where(beyond[:, None], 0, self.factors)
        return np.concatenate([known, np.ones((len(known), 1)), np.where(beyond, BEYOND, 0)[:, None]], axis=1)

    def slack(self, lists: Numbers, rows: Numbers, factors: Floats) -> Matrix:
        """Return what scores of pairs may be off by, (c,), given their lists and their rows' indices in ``factors``."""
        levels = lists * len(factors) // len(self.factors)
        return np.asarray(np.einsum("ct,ct->c", self.lists[lists], factors[levels, :, rows], dtype=np.float64))

    def above(self, scores: Floats, lists: Numbers, rows: Numbers, factors: Floats) -> Floats:
        """Return upper bounds of pairs, (c,), rounded up; see :meth:`slack`.

        ``scores`` (c,) are exact ones by the sketch, or their negatives.
        """
        found = scores + self.slack(lists, rows, factors)
        single = np.where(found < BEYOND, found, BEYOND).astype(np.float32)
        return np.asarray(np.nextafter(single, np.float32(np.inf)))


def residual_norms(store: GradientStore, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Return the norms of rows of a sketch, packed, (stop - start,)."""
    return np.asarray(store.small(f"columns/{RESIDUALS}", start, stop))


def residuals_of(store: GradientStore, rows: Numbers) -> npt.NDArray[np.int64]:
    """Return those of rows by number."""
    return np.asarray(store.values(f"columns/{RESIDUALS}", rows), np.int64)

"""How well a score finds known wrong labels: AUC, and the share found after checking the top of the list.

AUC = (R − m(m+1)/2) / (m (n−m)) with R the sum of the flagged rows' ranks (ties share their mean rank), m flagged of n:
the probability that a flagged row scores above another one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from ooc_influence.errors import InputError


def auc(scores: npt.ArrayLike, flagged: npt.ArrayLike) -> float:
    """Return the probability that a flagged row scores above one that is not.

    Parameters
    ----------
    scores : (n,) float
        Higher is more suspect.
    flagged : (n,) bool
        The rows that are wrong.

    Raises
    ------
    InputError
        If shapes differ, or all rows or none are flagged.
    """
    values, marks = _checked(scores, flagged)
    wrong = int(marks.sum())
    ranks = rankdata(values)[marks].sum()
    return float((ranks - wrong * (wrong + 1) / 2) / (wrong * (len(marks) - wrong)))


def recall_at(scores: npt.ArrayLike, flagged: npt.ArrayLike, fraction: float) -> float:
    """Return the share of flagged rows among the highest-scoring ``fraction`` of all rows.

    Parameters
    ----------
    scores, flagged
        As for :func:`auc`.
    fraction : float
        How much of the data is checked, in (0, 1].

    Raises
    ------
    InputError
        As for :func:`auc`, or for a fraction outside (0, 1].
    """
    values, marks = _checked(scores, flagged)
    if not 0 < fraction <= 1:
        raise InputError(f"expected a fraction in (0, 1]; received {fraction}")
    checked = np.argsort(-values, kind="stable")[: round(fraction * len(values))]
    return float(marks[checked].sum() / marks.sum())


def _checked(scores: npt.ArrayLike, flagged: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    values, marks = np.asarray(scores, np.float64), np.asarray(flagged, bool)
    if values.ndim != 1 or values.shape != marks.shape or not 0 < marks.sum() < len(marks):
        raise InputError(
            f"expected scores (n,) and flags (n,) with some rows flagged and some not; received {values.shape} and "
            f"{marks.shape} with {int(marks.sum())} flagged"
        )
    return values, marks

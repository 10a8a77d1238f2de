"""What happens to a model when rows are removed: leave-one-out effects and removal curves, by retraining.

The effect of a removal is the outcome with all rows minus the outcome without these: with larger outcomes for a better
fit, rows that helped (proponents, positive scores) have positive effects. Both runs of a difference have the same seed.
A removal curve removes the rows that a ranking puts first for a target, and measures that target: how few of them turn
the prediction is its "brittleness" (Ilyas et al. 2022, arXiv 2202.00622).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.evaluate.retrain import Measure, Rows, Runs, Train, retrain
from ooc_influence.options import RetrainOptions, takes

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Outcomes without single rows.

    Attributes
    ----------
    rows : (r,) int64
        The rows left out, one at a time.
    base : (repeats, q) float64
        Outcomes with all rows.
    outcomes : (repeats, r, q) float64
        Outcomes without each row.
    """

    rows: npt.NDArray[np.int64]
    base: Floats
    outcomes: Floats

    @property
    def effects(self) -> Floats:
        """By how much leaving a row out lowers each outcome, (q, r) like scores: mean over repeats."""
        return np.asarray((self.base[:, None] - self.outcomes).mean(0).T)

    @property
    def standard_errors(self) -> Floats:
        """Standard errors of the effects over repeats, (q, r); NaN for a single one."""
        return _standard_error((self.base[:, None] - self.outcomes).T)


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """Outcomes of targets without the rows that matter most to each.

    Attributes
    ----------
    counts : (c,) int64
        Numbers of rows removed.
    base : (repeats, t) float64
        Each target's outcome with all rows.
    outcomes : (repeats, t, c) float64
        Each target's outcome without the first rows of its ranking.
    """

    counts: npt.NDArray[np.int64]
    base: Floats
    outcomes: Floats

    @property
    def effects(self) -> Floats:
        """By how much the removal lowers each target's outcome, (t, c): mean over repeats."""
        return np.asarray((self.base[..., None] - self.outcomes).mean(0))

    @property
    def mean(self) -> Floats:
        """Mean effect over targets, (c,)."""
        return np.asarray(self.effects.mean(0))

    @property
    def standard_error(self) -> Floats:
        """Standard error of the mean over targets, (c,); NaN for a single target."""
        return _standard_error(self.effects.T)

    def flipped(self, threshold: float = 0.0) -> Floats:
        """Return the share of targets whose mean outcome fell from ``threshold`` or above to below it, (c,).

        With outcomes that are margins (right class against the rest) and a threshold of 0: the share of right answers
        that the removal turned wrong. NaN where no target was above.
        """
        right = self.base.mean(0) >= threshold
        if not right.any():
            return np.full(len(self.counts), np.nan)
        return np.asarray((self.outcomes.mean(0)[right] < threshold).mean(0))


@takes(RetrainOptions)
def leave_one_out(
    train: Train,
    measure: Measure,
    n: int,
    folder: str | Path,
    *,
    rows: npt.ArrayLike | None = None,
    repeats: int = 1,
    **options: Unpack[RetrainOptions],
) -> LeaveOneOut:
    """Retrain without each of some rows, and with all.

    Parameters
    ----------
    train, measure, folder
        As for :func:`retrain`.
    n : int
        Rows in all.
    rows : (r,) int, optional
        The rows to leave out, one at a time; default every one: n runs.
    repeats : int
        Seeds to repeat it with. A single row's effect is usually smaller than the noise of training.
    **options : RetrainOptions
        See :mod:`ooc_influence.options`.

    Raises
    ------
    InputError
        For rows outside 0 to n - 1, or as for :func:`retrain`.
    MismatchError, RunFailedError, StoreWriteError
        As for :func:`retrain`.
    """
    left_out = np.arange(n) if rows is None else np.asarray(rows, np.int64)
    if left_out.ndim != 1 or not len(left_out) or left_out.min() < 0 or left_out.max() >= n or n < 2:
        raise InputError(f"expected rows (r,) from 0 to {n - 1} to leave out; received {left_out.shape}")
    removed = [np.empty(0, np.int64), *left_out[:, None]]
    runs = _without(train, measure, n, removed, folder, repeats, options)
    outcomes = runs.outcomes.reshape(repeats, len(removed), -1)
    return LeaveOneOut(left_out, outcomes[:, 0], outcomes[:, 1:])


@takes(RetrainOptions)
def removal_curve(
    train: Train,
    measure: Measure,
    n: int,
    ranking: npt.ArrayLike,
    counts: Sequence[int],
    folder: str | Path,
    *,
    targets: npt.ArrayLike | None = None,
    repeats: int = 1,
    **options: Unpack[RetrainOptions],
) -> RemovalCurve:
    """Remove the rows that matter most to each target, retrain, and measure the target.

    To compare rankings (of another method, of random rows), call it with each, in folders of their own.

    Parameters
    ----------
    train, measure, folder
        As for :func:`retrain`.
    n : int
        Rows in all.
    ranking : (t, r) int
        Rows in the order of their importance to each target: ``top_influential(...).proponents.rows``.
    counts : sequence of int
        How many of them to remove: whole numbers from 1 to r, ascending.
    targets : (t,) int, optional
        The index of each target among the measured rows; default ``0 ... t - 1``.
    repeats : int
        Seeds to repeat it with.
    **options : RetrainOptions
        See :mod:`ooc_influence.options`.

    Raises
    ------
    InputError
        For a ranking with rows outside 0 to n - 1 or repeated ones, counts or targets that do not fit it, or as for
        :func:`retrain`.
    MismatchError, RunFailedError, StoreWriteError
        As for :func:`retrain`.
    """
    ranked, sizes = np.asarray(ranking, np.int64), np.asarray(counts, np.int64)
    if sizes.ndim != 1 or not len(sizes) or sizes[0] < 1 or (np.diff(sizes) <= 0).any() or sizes[-1] >= n:
        raise InputError(f"expected counts from 1 to n - 1 = {n - 1}, ascending; received {list(counts)}")
    if ranked.ndim != 2 or not ranked.size or ranked.shape[1] < sizes[-1] or ranked.min() < 0 or ranked.max() >= n:
        raise InputError(
            f"expected a ranking (t, at least {sizes[-1]}) of rows 0 to {n - 1}; received {ranked.shape}: leave "
            "dropped queries out, and rank enough rows"
        )
    if (np.diff(np.sort(ranked[:, : sizes[-1]])) == 0).any():
        raise InputError("expected a ranking of distinct rows for each target; received one that repeats a row")
    indices = np.arange(len(ranked)) if targets is None else np.asarray(targets, np.int64)
    if indices.shape != (len(ranked),) or indices.min() < 0:
        raise InputError(f"expected an index >= 0 for each of {len(ranked)} targets; received {indices.shape}")
    removed = [np.empty(0, np.int64), *(row[:size] for row in ranked for size in sizes)]
    runs = _without(train, measure, n, removed, folder, repeats, options)
    if indices.max() >= runs.outcomes.shape[1]:
        raise InputError(f"expected targets below {runs.outcomes.shape[1]}, the outcomes; received {indices.max()}")
    outcomes = runs.outcomes.reshape(repeats, len(removed), -1)
    without = outcomes[:, 1:].reshape(repeats, len(ranked), len(sizes), -1)
    of_target = np.take_along_axis(without, indices[None, :, None, None], 3)[..., 0]
    return RemovalCurve(sizes, outcomes[:, 0, indices], of_target)


class Removals(Sequence[Rows]):
    """All of some rows, (n,) bool, but a few, run by run, without an (m, n) array; the whole list repeated."""

    def __init__(
        self, rows: Rows, removed: Sequence[npt.NDArray[np.int64]] | npt.NDArray[np.int64], repeats: int = 1
    ) -> None:  # fmt: skip
        self._rows, self._removed, self._repeats = rows, removed, repeats

    def __len__(self) -> int:
        return self._repeats * len(self._removed)

    def __getitem__(self, run: Any) -> Any:
        rows = self._rows.copy()
        rows[self._removed[range(len(self))[run] % len(self._removed)]] = False
        return rows


def _without(
    train: Train,
    measure: Measure,
    n: int,
    removed: Sequence[npt.NDArray[np.int64]],
    folder: str | Path,
    repeats: int,
    options: RetrainOptions,
) -> Runs:
    """Retrain without each set of rows, every repeat with a seed of its own."""
    if repeats < 1:
        raise InputError(f"expected repeats >= 1; received {repeats}")
    seeds = [repeat for repeat in range(repeats) for _ in removed]
    subsets = Removals(np.ones(n, bool), removed, repeats)
    return retrain(train, measure, subsets, folder, seeds=seeds, **options)


def _standard_error(values: Floats) -> Floats:
    """Return the standard error of the mean over the last axis; NaN for a single value."""
    count = values.shape[-1]
    return np.full(values.shape[:-1], np.nan) if count < 2 else np.asarray(values.std(-1, ddof=1) / np.sqrt(count))

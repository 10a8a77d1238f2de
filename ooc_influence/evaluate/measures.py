"""How good scores are: at finding known wrong labels (AUC, recall), at predicting retrained models (LDS).

The linear datamodeling score says how well scores predict what models trained on parts of the data do. For query q and
m models, each trained on a subset S_j of the rows and measured as o_j (larger = better fit)::

    LDS(q) = Spearman over j of (Σ_{i in S_j} score(q, i), o_j)

and the LDS is its mean over queries (Ilyas et al. 2022, arXiv 2202.00622; Park et al. 2023, TRAK, arXiv 2303.14186).
Scores with the measurement a loss are positive for proponents, so the outcome to correlate with is *minus* the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import mannwhitneyu, rankdata

from ooc_influence.errors import InputError
from ooc_influence.evaluate.retrain import ranges
from ooc_influence.memory import MemoryBudget, MemoryModel
from ooc_influence.parallel import blas_threads, cores, tree_sum
from ooc_influence.progress import Progress

if TYPE_CHECKING:
    import dask.array as da
    import zarr

Floats = npt.NDArray[np.float64]
_QUERIES = 1024  # of a block
_ROWS = 1024  # of a tile in float64
_TIE = 2.0**-40  # of Σ|score|: sums closer than this differ by rounding only


def auc(scores: npt.ArrayLike, flagged: npt.ArrayLike) -> float:
    """Return the probability that a flagged row scores above one that is not, a tie counted as half; NaN for NaN.

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
    wins = mannwhitneyu(values[marks], values[~marks], method="asymptotic").statistic  # a tie is half of one
    return float(wins / (marks.sum() * (~marks).sum()))


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


def fuse_ranks(*scores: npt.ArrayLike, k: float = 60) -> npt.NDArray[np.float64]:
    """Combine several rankings of the same rows, such as influence and BM25: Σ 1/(k + rank), reciprocal rank fusion.

    Cormack, Clarke and Büttcher 2009. Only the order of scores counts, so they need no common unit.

    Parameters
    ----------
    *scores : (q, n) array, several
        Larger is better; equal scores share their mean rank, and NaN comes last.
    k : float
        How little the first ranks stand out; 60 is usual.

    Returns
    -------
    (q, n) float64
        Larger is better.

    Raises
    ------
    InputError
        For no scores, or of different shapes, or k below 0.
    """
    arrays = [np.asarray(each, np.float64) for each in scores]
    shapes = sorted({each.shape for each in arrays})
    if len(shapes) != 1 or len(shapes[0]) != 2 or not k >= 0:
        raise InputError(f"expected scores (q, n) of one shape, and k >= 0; received shapes {shapes} and k={k}")
    ranks = [rankdata(np.where(np.isnan(each), np.inf, -each), axis=1) for each in arrays]
    return np.asarray(np.sum([1 / (k + each) for each in ranks], axis=0))


def _checked(scores: npt.ArrayLike, flagged: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    values, marks = np.asarray(scores, np.float64), np.asarray(flagged, bool)
    if values.ndim != 1 or values.shape != marks.shape or not 0 < marks.sum() < len(marks):
        raise InputError(
            f"expected scores (n,) and flags (n,) with some rows flagged and some not; received {values.shape} and "
            f"{marks.shape} with {int(marks.sum())} flagged"
        )
    return values, marks


@dataclass(frozen=True, eq=False)
class LdsResult:
    """The result of :func:`lds`.

    Attributes
    ----------
    per_query : (q,) float64
        Each query's rank correlation; NaN where it is left out.
    dropped_queries, dropped_rows : int
        Queries and train rows whose scores are NaN: the queries are left out, the rows contribute nothing.
    constant_queries : int
        Queries left out because their outcomes, or their summed scores, are the same for every subset.
    predictions : (m, q) float64
        Summed scores.
    outcomes : (m, q) float64
        As given.
    """

    per_query: Floats
    dropped_queries: int
    dropped_rows: int
    constant_queries: int
    predictions: Floats
    outcomes: Floats

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        """The queries that are not left out, (q,)."""
        return ~np.isnan(self.per_query)

    @property
    def mean(self) -> float:
        """The LDS: mean over queries that are not left out; NaN if all are."""
        return float(self.per_query[self.counted].mean()) if self.counted.any() else float("nan")

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, the queries taken as a sample and the subsets as given; NaN for one query."""
        counted = self.per_query[self.counted]
        return float(counted.std(ddof=1) / np.sqrt(len(counted))) if len(counted) > 1 else float("nan")

    def subset_error(self) -> float:
        """Return the standard error of the mean, the subsets taken as a sample and the queries as given.

        A jackknife: the mean is computed again without each subset in turn. O(m² q) time.
        """
        predicted = rankdata(self.predictions[:, self.counted], axis=0)
        measured = rankdata(self.outcomes[:, self.counted], axis=0)
        m = len(predicted)
        if m < 3 or not predicted.size:
            return float("nan")
        means = np.array([np.nanmean(_correlation(*_without(run, predicted, measured))) for run in range(m)])
        return float(np.sqrt((m - 1) / m * np.square(means - means.mean()).sum()))

    def __repr__(self) -> str:
        left_out = f"{self.dropped_queries} dropped, {self.constant_queries} constant"
        return f"<LDS {self.mean:.4f} ± {self.standard_error:.4f} over {self.counted.sum()} queries ({left_out})>"


def lds(
    scores: npt.NDArray[Any] | zarr.Array[Any] | da.Array,
    subsets: npt.NDArray[np.bool_],
    outcomes: npt.ArrayLike,
    *,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> LdsResult:
    """Return how well summed scores rank the outcomes of models trained on subsets of the rows.

    Parameters
    ----------
    scores : (q, n) array, Zarr array or Dask array
        Influence of each train row on each query; read block by block. NaN for dropped rows and dropped queries.
    subsets : (m, n) bool
        The rows each model was trained on.
    outcomes : (m, q) float
        What was measured, larger = better fit: minus the query's loss, say. May be NaN for dropped queries.
    memory : int or str, optional
        Budget for the process, such as ``"4GiB"``; default half of what is free. A Dask array's blocks are its own.
    progress : bool, optional
        Show a progress line; silent by default.

    Returns
    -------
    LdsResult
        Values per query and their mean.

    Raises
    ------
    InputError
        For shapes that do not match, fewer than two subsets, outcomes that are not finite, or scores that are infinite
        or NaN elsewhere than in whole rows and columns.
    MemoryBudgetError
        If the budget is too small.
    """
    measured = np.asarray(outcomes, np.float64)
    q, n = _check_shapes(scores, subsets, measured)
    m = len(measured)
    sums = _Sums(np.zeros((m, q)), np.zeros(q), np.zeros(q, np.int64), np.zeros(n, np.int64))
    with Progress("lds", q * n, progress, unit="score") as bar:
        parts = _dask_parts if hasattr(scores, "to_delayed") else _array_parts
        for queries, rows, part in parts(scores, subsets, memory):
            sums.predictions[:, queries] += part.predictions
            sums.sizes[queries] += part.sizes
            sums.missing[queries] += part.missing
            sums.missing_rows[rows] += part.missing_rows
            bar.advance((queries.stop - queries.start) * (rows.stop - rows.start))
    dropped, dropped_rows = _check_missing(sums, q, n)
    wrong = ~np.isfinite(measured[:, ~dropped]).all(1)
    if wrong.any():
        raise InputError(
            f"expected finite outcomes; received NaN or Inf of runs {ranges(np.flatnonzero(wrong).tolist())}: leave "
            "those subsets out, or finish them"
        )
    unit = np.maximum(sums.sizes * _TIE, np.finfo(np.float64).tiny)
    predictions = np.rint(sums.predictions / unit) * unit
    constant = ~dropped & ((np.ptp(predictions, 0) <= 2 * unit) | (np.ptp(measured, 0) == 0))
    per_query = np.full(q, np.nan)
    kept = ~dropped & ~constant
    per_query[kept] = _correlation(*(rankdata(values[:, kept], axis=0) for values in (predictions, measured)))
    return LdsResult(per_query, int(dropped.sum()), dropped_rows, int(constant.sum()), predictions, measured)


class _Sums(NamedTuple):
    """Sums over blocks of scores.

    ``predictions`` (m, q), ``sizes`` (q,) Σ|score|, ``missing`` (q,) and ``missing_rows`` (n,) numbers of NaN.
    """

    predictions: Floats
    sizes: Floats
    missing: npt.NDArray[np.int64]
    missing_rows: npt.NDArray[np.int64]


Part = tuple[slice, slice, _Sums]


def _check_shapes(scores: Any, subsets: Any, outcomes: Floats) -> tuple[int, int]:
    shapes = (np.shape(scores), np.shape(subsets), outcomes.shape)
    if any(len(shape) != 2 for shape in shapes) or shapes[2] != (shapes[1][0], shapes[0][0]):
        raise InputError(f"expected scores (q, n), subsets (m, n) and outcomes (m, q); received {shapes}")
    if shapes[0][1] != shapes[1][1] or np.asarray(subsets[:1]).dtype != bool:
        raise InputError(
            f"expected subsets (m, {shapes[0][1]}) bool, as wide as the scores; received {shapes[1]} "
            f"{np.asarray(subsets[:1]).dtype}"
        )
    if len(outcomes) < 2 or not all(shapes[0]):
        raise InputError(f"expected scores and at least two subsets; received {shapes[0]} scores, {len(outcomes)}")
    return int(shapes[0][0]), int(shapes[0][1])


def _array_parts(scores: Any, subsets: Any, memory: int | str | None) -> Iterator[Part]:
    """Yield the sums of blocks of an array that is sliced: NumPy's or Zarr's."""
    (q, n), m = scores.shape, len(subsets)
    queries = min(q, _QUERIES)
    model = MemoryModel(
        stage=f"lds of {q} queries and {m} subsets",
        fixed=8 * m * q * 8 + m * _ROWS * 9 + queries * _ROWS * 26,  # sums and ranks; a tile
        per_worker=0,
        per_row=8 * queries + m,
        max_rows=8192,
        advice="fewer queries at a time",
    )
    step = MemoryBudget.of(memory).plan(model)
    for left in range(0, n, step):
        columns = slice(left, min(n, left + step))
        inside = np.asarray(subsets[:, columns])
        for top in range(0, q, queries):
            rows = slice(top, min(q, top + queries))
            yield rows, columns, _sums(np.asarray(scores[rows, columns]), inside)


def _dask_parts(scores: Any, subsets: Any, memory: int | str | None) -> Iterator[Part]:
    """Yield the sums of a Dask array's blocks: a row of blocks at a time, computed where they are."""
    from dask.base import compute
    from dask.delayed import delayed

    edges = np.cumsum([0, *scores.chunks[1]]).tolist()
    columns = [slice(*ends) for ends in pairwise(edges)]
    task, top = delayed(_sums, pure=False), 0
    for height, blocks in zip(scores.chunks[0], scores.to_delayed(), strict=True):
        parts = [task(block, np.asarray(subsets[:, c])) for block, c in zip(blocks, columns, strict=True)]
        missing_rows = [part.missing_rows for part in parts]
        with blas_threads(cores()):  # Dask has its own threads
            total, *missing = compute(tree_sum(parts, _add), *missing_rows)
        total = total._replace(missing_rows=np.concatenate(missing))
        yield slice(top, top + height), slice(0, edges[-1]), total
        top += height


def _add(left: _Sums, right: _Sums) -> _Sums:
    """Add up what belongs to queries."""
    return _Sums(
        left.predictions + right.predictions,
        left.sizes + right.sizes,
        left.missing + right.missing,
        left.missing_rows[:0],
    )


def _sums(tile: npt.NDArray[Any], inside: npt.NDArray[np.bool_]) -> _Sums:
    """Return the sums over a block of scores (q, w) for subsets (m, w).

    Raises
    ------
    InputError
        For infinite scores.
    """
    (q, w), m = tile.shape, len(inside)
    sums = _Sums(np.zeros((m, q)), np.zeros(q), np.zeros(q, np.int64), np.zeros(w, np.int64))
    for low in range(0, w, _ROWS):
        part = slice(low, low + _ROWS)
        scores = tile[:, part].astype(np.float64)
        missing = np.isnan(scores)
        scores[missing] = 0
        sums.sizes[...] += np.abs(scores).sum(1)
        if not np.isfinite(sums.sizes).all():
            raise InputError("expected finite scores, NaN where rows are dropped; received Inf: check the curvature")
        sums.predictions[...] += inside[:, part].astype(np.float64) @ scores.T
        sums.missing[...] += missing.sum(1)
        sums.missing_rows[part] = missing.sum(0)
    return sums


def _check_missing(sums: _Sums, q: int, n: int) -> tuple[npt.NDArray[np.bool_], int]:
    """Return which queries are dropped, and how many train rows."""
    dropped, rows = sums.missing == n, int((sums.missing_rows == q).sum())
    if not dropped.all() and rows < n:
        expected = np.where(dropped, n, rows)
        other = np.flatnonzero(sums.missing != expected)
        if len(other):
            raise InputError(
                f"expected NaN for dropped queries and dropped train rows, all of their scores; received NaN between "
                f"numbers for queries {ranges(other.tolist()[:20])}"
            )
    return dropped, 0 if dropped.all() else rows


def _correlation(left: Floats, right: Floats) -> Floats:
    """Return Pearson's correlation of columns, (q,); NaN where one is constant."""
    left, right = left - left.mean(0), right - right.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((left * right).sum(0) / np.sqrt(np.square(left).sum(0) * np.square(right).sum(0)))


def _without(run: int, *ranks: Floats) -> list[Floats]:
    """Return ranks as they are without one of the runs: those above it move down by one, its equals by a half."""
    rest = []
    for rank in ranks:
        others = np.delete(rank, run, 0)
        rest.append(others - (others > rank[run]) - 0.5 * (others == rank[run]))
    return rest

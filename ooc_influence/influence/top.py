"""The strongest proponents and opponents of each query, without the (q, n) matrix.

Each stripe of train rows keeps a running best list a query; lists merge up a tree. Rows tie-break by number, smaller
first, so the result is the same for every division of the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import Curvature, DampingMode
from ooc_influence.errors import InputError
from ooc_influence.influence.pair import FloatTile, Pair, score_tiles
from ooc_influence.progress import Progress
from ooc_influence.store import GradientStore, PathLike
from ooc_influence.stripes import Stripe, check_workers, cut_stripes, run_stripes

_NO_ROW = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Ranking:
    """Train rows in order of influence, for each query.

    Attributes
    ----------
    rows : (q, top) int64
        Row numbers in the train store; -1 for a query that is dropped.
    scores : (q, top) float32
        Their scores; NaN for a query that is dropped.
    ids : (q, top)
        Their ids; the row numbers where the store has none.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    ids: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class TopInfluential:
    """What :func:`top_influential` found.

    Attributes
    ----------
    proponents : Ranking
        Highest scores first: rows that lowered the query's loss most.
    opponents : Ranking
        Lowest scores first: rows that raised it most.
    query_ids : (q,)
        Ids of the queries; their row numbers where the query store has none.
    damping : float
        λ itself.
    """

    proponents: Ranking
    opponents: Ranking
    query_ids: npt.NDArray[Any]
    damping: float

    def to_dict(self) -> Mapping[str, Any]:
        """Return the result as JSON-ready values, one entry a query."""
        queries = []
        for number, name in enumerate(self.query_ids.tolist()):
            lists = {}
            for side in ("proponents", "opponents"):
                ranking: Ranking = getattr(self, side)
                columns = (ranking.rows[number], ranking.ids[number], ranking.scores[number])
                lists[side] = [
                    {"row": row, "id": row_id, "score": score}
                    for row, row_id, score in zip(*(column.tolist() for column in columns), strict=True)
                    if row >= 0
                ]
            queries.append({"query": number, "id": name, **lists})
        return {"damping": self.damping, "queries": queries}


class BestList:
    """The ``top`` largest scores of each query so far, with their rows.

    Parameters
    ----------
    queries, top : int
        Sizes.
    """

    def __init__(self, queries: int, top: int) -> None:
        self.scores = np.full((queries, top), -np.inf, np.float32)
        self.rows = np.full((queries, top), _NO_ROW, np.int64)

    def add(self, tile: FloatTile, first_row: int) -> None:
        """Take in scores (q, rows) of train rows from ``first_row`` on; NaN never enters."""
        top = self.scores.shape[1]
        candidates = tile > self.scores[:, -1:]  # rows come in order: an equal score further on loses the tie
        counts = candidates.sum(1)
        for number in np.flatnonzero(counts):
            columns = np.flatnonzero(candidates[number])
            scores = tile[number, columns]
            if len(columns) > 2 * top:
                limit = -np.partition(-scores, top - 1)[top - 1]
                above, level = np.flatnonzero(scores > limit), np.flatnonzero(scores == limit)
                chosen = np.concatenate([above, level[: top - len(above)]])
                columns, scores = columns[chosen], scores[chosen]
            self._merge(number, scores, first_row + columns)

    def merged(self, other: BestList) -> BestList:
        """Return the best of both, leaving both as they are."""
        result = BestList(*self.scores.shape)
        result.scores, result.rows = self.scores.copy(), self.rows.copy()
        for number in range(len(self.scores)):
            result._merge(number, other.scores[number], other.rows[number])
        return result

    def _merge(self, number: Any, scores: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> None:
        all_scores = np.concatenate([self.scores[number], scores])
        all_rows = np.concatenate([self.rows[number], rows])
        order = np.lexsort((all_rows, -all_scores))[: self.scores.shape[1]]
        self.scores[number], self.rows[number] = all_scores[order], all_rows[order]


def top_influential(
    query: GradientStore | PathLike,
    train: GradientStore | PathLike,
    top: int = 10,
    curvature: Curvature | PathLike | None = None,
    damping: float | None = None,
    damping_mode: DampingMode = "relative",
    *,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> TopInfluential:
    """Return each query's strongest proponents and opponents among the train rows.

    Parameters
    ----------
    query, train : GradientStore or path
        (q, k) and (n, k).
    top : int
        How many of each; fewer where the train store has fewer live rows.
    curvature, damping, damping_mode, workers, memory, progress
        As for :func:`influence_scores`.

    Returns
    -------
    TopInfluential
        Row numbers, ids and scores, (q, top) each; ties in order of row number.

    Raises
    ------
    InputError
        For top < 1.
    MismatchError, CurvatureNotFoundError, StaleCurvatureError, SingularFisherError, MemoryBudgetError
        As for :func:`influence_scores`.
    """
    if top < 1:
        raise InputError(f"expected top >= 1; received {top}")
    pair = Pair.open(query, train, curvature, damping, damping_mode)
    slots, top = check_workers(workers), min(top, pair.train.n)
    entry = 4 + 8  # a score and its row; lists are there twice more while they merge, and once more when joined
    blocks, block_rows = pair.plan(
        memory, slots, stage="top", tile_bytes=4 + 1, lists=2 * 3 * entry * top, fixed=4 * entry * top * pair.query.n
    )
    stripes = cut_stripes(0, pair.train.n, block_rows, slots)
    found = []
    with Progress("top", len(blocks) * pair.train.n, progress) as bar:
        for start, stop in blocks:
            found.append(
                run_stripes(
                    _best_of_stripe,
                    stripes,
                    bar,
                    pair.train,
                    block_rows,
                    pair.precondition(start, stop),
                    top,
                    slots=slots,
                    reduce=_merge_both,
                )
            )
    proponents, opponents = (
        _ranking(pair.train, [both[side] for both in found], sign) for side, sign in ((0, 1), (1, -1))
    )
    return TopInfluential(proponents, opponents, pair.query.ids(), pair.damping)


Both = tuple[BestList, BestList]


def _best_of_stripe(
    stripe: Stripe, key: str, train: GradientStore, block_rows: int, queries: FloatTile, top: int
) -> Both:
    largest, smallest = BestList(len(queries), top), BestList(len(queries), top)
    for first, tile in score_tiles(stripe, key, train, block_rows, queries):
        largest.add(tile, first)
        smallest.add(np.negative(tile, out=tile), first)
    return largest, smallest


def _merge_both(left: Both, right: Both) -> Both:
    return left[0].merged(right[0]), left[1].merged(right[1])


def _ranking(train: GradientStore, parts: list[BestList], sign: int) -> Ranking:
    rows = np.concatenate([part.rows for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    filled = rows != _NO_ROW  # dropped rows leave lists short, a dropped query leaves its list empty
    longest = int(filled.sum(1).max())
    rows, scores, filled = rows[:, :longest], sign * scores[:, :longest], filled[:, :longest]
    ids = train.ids(np.where(filled, rows, 0))
    return Ranking(np.where(filled, rows, -1), np.where(filled, scores, np.nan).astype(np.float32), ids)

"""The strongest proponents and opponents of each query, without the (q, n) matrix.

Each stripe of train rows keeps the best of each query; the lists are merged as stripes finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import DampingMode
from ooc_influence.errors import InputError
from ooc_influence.influence.best import ENTRY_BYTES, NO_ROW, Best, BestList, list_bytes, merge
from ooc_influence.influence.checkpoints import AnyCurvature, Dampings, Marks, Stores
from ooc_influence.influence.engine import Floats, make_engine
from ooc_influence.influence.parts import Cutting, Part, Parts
from ooc_influence.influence.ranking import Ranking, TopInfluential
from ooc_influence.influence.scoring import Normalize, Scoring
from ooc_influence.influence.tiles import Columns, Costs, Work, score_tiles
from ooc_influence.progress import Progress
from ooc_influence.store import PathLike
from ooc_influence.stripes import Stripe, check_workers

_SIDES = ("proponents", "opponents")


def top_influential(
    query: Stores,
    train: Stores,
    top: int = 10,
    curvature: AnyCurvature | Sequence[AnyCurvature] = None,
    damping: Dampings = None,
    damping_mode: DampingMode = "relative",
    *,
    normalize: Normalize | None = None,
    average_queries: bool | str = False,
    rows: Any = None,
    combine: str = "mean",
    device: str | None = None,
    resume: PathLike | None = None,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> TopInfluential:
    """Return each query's strongest proponents and opponents among the train rows.

    Parameters
    ----------
    query, train : GradientStore or path, or lists of them
        (q, k) and (n, k); lists for several checkpoints.
    top : int
        How many of each; fewer where the train store has fewer live rows.
    curvature, damping, damping_mode, normalize, average_queries, rows, combine, device, workers, memory, progress
        As for :func:`influence_scores`. Rows that no checkpoint saw (``rows=``) are in no list.
    resume : path, optional
        A folder to keep finished parts in: the same call, interrupted or killed, goes on from there. It is removed at
        the end.

    Returns
    -------
    TopInfluential
        Row numbers, ids and scores, (q, top) each, or (L, q, top) for a list of dampings; ties in order of row number.

    Raises
    ------
    InputError
        For top < 1.
    StoreExistsError
        If ``resume`` holds something else than this call's parts.
    MismatchError, CurvatureNotFoundError, StaleCurvatureError, SingularFisherError, MemoryBudgetError
        As for :func:`influence_scores`.
    """
    scoring = Scoring.open(
        query, train, curvature, damping, damping_mode, normalize=normalize, average_queries=average_queries, rows=rows,
        device=device, combine=combine,
    )  # fmt: skip
    lists = find_top(scoring, top, None, resume=resume, workers=workers, memory=memory, progress=progress)
    return lists.ranked(scoring, 0)


class Lists(NamedTuple):
    """Largest scores, and largest negated scores, with their rows.

    Attributes
    ----------
    scores : (2, L, M, q, top) float32
        For every λ, module and query; -inf where there are fewer.
    rows : (2, L, M, q, top) int64
        Row numbers; :data:`NO_ROW` where there are fewer.
    outside : (q,) float64
        See :class:`TopInfluential`.
    """

    scores: Floats
    rows: npt.NDArray[np.int64]
    outside: npt.NDArray[np.float64]

    def ranked(self, scoring: Scoring, module: int) -> TopInfluential:
        """Return one module's lists, cut to the longest."""
        scores, rows = (scoring.squeeze(np.moveaxis(part[:, :, module], 0, 1)) for part in (self.scores, self.rows))
        filled = rows != NO_ROW  # dropped rows leave lists short, a dropped query leaves its list empty
        longest = int(filled.sum(-1).max())
        scores, rows, filled = (part[..., :longest] for part in (scores, rows, filled))
        ids = scoring.checkpoints[0].train.ids(np.where(filled, rows, 0))
        rows, scores = np.where(filled, rows, -1), np.where(filled, scores, np.nan).astype(np.float32)
        proponents, opponents = (
            Ranking(rows[..., side, :, :], sign * scores[..., side, :, :], ids[..., side, :, :])
            for side, sign in enumerate((np.float32(1), np.float32(-1)))
        )
        return TopInfluential(proponents, opponents, scoring.queries.names, scoring.damping, self.outside)


def top_costs(top: int, left_rows: int, n: int, modules: int = 1) -> Costs:
    """Return what top lists of ``n`` rows hold, ``left_rows`` preconditioned queries in all."""
    both = 2 * ENTRY_BYTES * top  # a query's two lists
    own = 2 * list_bytes(top, n) + 3 * both  # of the stripe; of those before, of one more, and merged
    return Costs(tile=4 + 1, left=own, fixed=4 * both * left_rows * modules, modules=modules)  # and while ids are found


def find_top(
    scoring: Scoring,
    top: int,
    columns: Columns | None,
    *,
    resume: PathLike | None,
    workers: int | None,
    memory: int | str | None,
    progress: bool | None,
) -> Lists:
    """Return the best lists of every query, for every λ and module.

    Raises
    ------
    InputError, StoreExistsError, MemoryBudgetError
        See :func:`top_influential`.
    """
    if top < 1:
        raise InputError(f"expected top >= 1; received {top}")
    slots, top = check_workers(workers), min(top, scoring.n)
    modules = 1 if columns is None else len(columns[0])
    parts = Parts(resume, scoring.digest(kind="top", top=top, modules=modules))
    blocks, block_rows = scoring.plan(
        "top", memory, slots, top_costs(top, scoring.lambdas * scoring.q, scoring.n, modules), queries=parts.queries
    )
    parts.begin(blocks[0][1])
    work = scoring.work(block_rows, columns)
    cutting = Cutting(scoring.n, block_rows, work.row_bytes)
    shape = (len(_SIDES), scoring.lambdas, modules, scoring.q, top)
    found = Lists(np.empty(shape, np.float32), np.empty(shape, np.int64), np.empty(scoring.q))
    with Progress("top", len(blocks) * scoring.n, progress) as bar:
        for start, stop in blocks:
            left = scoring.left(start, stop)
            found.outside[start:stop] = left.outside
            lists: dict[str, Best] = {}

            def take(stripe: Stripe, part: Part, lists: dict[str, Best] = lists) -> None:
                for name in _SIDES:
                    lists[name] = merge(lists.get(name), (part[f"{name}_scores"], part[f"{name}_rows"]))

            parts.run(
                f"{start}-{stop}", best_of_stripe, cutting, bar, work, top, scoring.seen, *left.arrays, slots=slots,
                take=take,
            )  # fmt: skip
            for side, name in enumerate(_SIDES):
                scores, numbers = (part.reshape(*shape[1:3], stop - start, top) for part in lists[name])
                found.scores[side, :, :, start:stop], found.rows[side, :, :, start:stop] = scores, numbers
    parts.remove()
    scoring.warn_outside(found.outside)
    return found


def best_of_stripe(stripe: Stripe, key: str, work: Work, top: int, seen: Marks | None, *lefts: Floats) -> Part:
    """Return the best lists of a stripe: largest scores, and largest negated scores."""
    lists = [BestList(len(lefts[0]) * work.modules, top, stripe.stop - stripe.start) for _ in _SIDES]
    with make_engine(work.device) as engine:
        for tile in score_tiles(engine, stripe, key, work, seen, lefts):
            scores = tile.scores.reshape(-1, tile.stop - tile.start)
            for own, sign in zip(lists, (1, -1), strict=True):
                own.add(scores, tile.start, engine, sign)
    part: dict[str, npt.NDArray[Any]] = {}
    for name, own in zip(_SIDES, lists, strict=True):
        part[f"{name}_scores"], part[f"{name}_rows"] = own.best()
    return part

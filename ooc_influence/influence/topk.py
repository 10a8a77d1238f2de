"""Proponents and opponents: each query's lists of the train rows with the largest and the smallest scores."""

from __future__ import annotations

from typing import Unpack

from ooc_influence.errors import InputError
from ooc_influence.influence.checkpoints import Stores
from ooc_influence.influence.lists import ListPass, Lists, check_rows, top_tiles
from ooc_influence.influence.ranking import TopInfluential
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.sketch import sketched_lists
from ooc_influence.influence.tiles import Columns, ScoreParts
from ooc_influence.options import TopOptions, takes
from ooc_influence.parallel import check_workers
from ooc_influence.progress import Progress


@takes(TopOptions)
def top_influential(
    query: Stores,
    train: Stores,
    top: int = 10,
    **options: Unpack[TopOptions],
) -> TopInfluential:
    """Return each query's strongest proponents and opponents among the train rows.

    Rows that no checkpoint saw (``rows=``) are in no list.

    Parameters
    ----------
    query, train : GradientStore or path, or lists of them
        (q, k) and (n, k); lists for several checkpoints.
    top : int
        How many of each; fewer where the train store has fewer live rows.
    **options : TopOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    TopInfluential
        Row numbers, ids and scores, (q, top) each, or (L, q, top) for a list of dampings; ties in order of row number.

    Raises
    ------
    InputError
        For top < 1, or a product that these rows cannot be multiplied by.
    StoreExistsError
        If ``resume`` holds something else than this call's parts.
    StoreBusyError
        If the same call is running with this ``resume``.
    MismatchError, CurvatureNotFoundError, StaleCurvatureError, SingularFisherError, MemoryBudgetError
        As for :func:`influence_scores`.
    """
    scoring = ScoreRequest.open(query, train, options, lists=True)
    lists = find_top(scoring, top, None, options)
    return lists.ranked(scoring, 0)


def find_top(
    scoring: ScoreRequest,
    top: int,
    columns: Columns | None,
    options: TopOptions,
) -> Lists:
    """Return the best lists of every query, for every λ and module."""
    if top < 1:
        raise InputError(f"expected top >= 1; received {top}")
    if options["sketch"] is not None and columns is None:
        return sketched_lists(scoring, top, options)
    slots, top = check_workers(options["workers"]), min(top, scoring.n)
    modules = 1 if columns is None else len(columns[0])
    parts = ScoreParts(options["resume"], scoring.digest(kind="top", top=top, modules=modules))
    bounded = scoring.work(1, columns).bounded
    tile = top_tiles(top, scoring.lambdas * scoring.q, scoring.n, modules, bounded=bounded)
    blocks, block_rows = scoring.plan("top", options["memory"], slots, tile, queries=parts.queries)
    work = scoring.work(block_rows, columns, product=options["product"])
    check_rows(work)
    lists = ListPass(work, scoring.seen, blocks, parts, slots)
    with parts.claimed(), Progress("top", len(blocks) * scoring.n, options["progress"]) as bar:
        found = lists.run(scoring.precondition, top, bar)
    scoring.warn_outside(found.outside)
    return found

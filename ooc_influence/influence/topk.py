"""Proponents and opponents: each query's lists of the train rows with the largest and the smallest scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.influence.checkpoints import Stores
from ooc_influence.influence.costs import TileMemory
from ooc_influence.influence.engine import Floats
from ooc_influence.influence.exact import PAIR_BYTES
from ooc_influence.influence.heap import ENTRY_BYTES, NO_ROW, Best, list_bytes, merge
from ooc_influence.influence.ranking import Ranking, TopInfluential
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.search import SIDES, best_of_stripe
from ooc_influence.influence.tiles import Columns, Part, ScoreParts, ScoreTask
from ooc_influence.influence.trial import check_product
from ooc_influence.options import TopOptions, takes
from ooc_influence.parallel import Stripe, check_workers
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
    search : mapping
        See :class:`TopInfluential`.
    """

    scores: Floats
    rows: npt.NDArray[np.int64]
    outside: npt.NDArray[np.float64]
    search: Mapping[str, Any]

    def ranked(self, scoring: ScoreRequest, module: int) -> TopInfluential:
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
        names = scoring.queries.names
        found = (names, scoring.damping, self.outside, scoring.settings, self.search)
        return TopInfluential(proponents, opponents, *found)


_TILE_SCORES = 2**22  # scores found at a time: more gain nothing


def top_tiles(top: int, query_rows: int, n: int, modules: int = 1, *, bounded: bool = True) -> TileMemory:
    """Return what a pass for lists of ``top`` of ``n`` rows holds, for ``query_rows`` preconditioned queries in all.

    ``bounded`` says whether rows are found by a quick product (:attr:`ScoreTask.bounded`).
    """
    both = 2 * ENTRY_BYTES * top  # a query's two lists
    lists = 2 * list_bytes(top, n) + 3 * both  # of the stripe; of those before, of one more, and merged
    fixed = 4 * both * query_rows * modules  # with what looking up the ids takes
    if not bounded:
        return TileMemory(per_score=4 + 1, per_query=lists, fixed=fixed, modules=modules)
    lists += 2 * PAIR_BYTES * 2 * top  # where both are scored exactly
    # a tile, its products in whole numbers and as numbers, which of them are looked at; rows, rounded
    sizes = {"per_score": 4 + 8 + 4 + 1, "per_number": 4 + 2, "most_scores": _TILE_SCORES}
    return TileMemory(per_query=lists, fixed=fixed, modules=modules, **sizes)


def find_top(
    scoring: ScoreRequest,
    top: int,
    columns: Columns | None,
    options: TopOptions,
) -> Lists:
    """Return the best lists of every query, for every λ and module."""
    if top < 1:
        raise InputError(f"expected top >= 1; received {top}")
    slots, top = check_workers(options["workers"]), min(top, scoring.n)
    modules = 1 if columns is None else len(columns[0])
    parts = ScoreParts(options["resume"], scoring.digest(kind="top", top=top, modules=modules))
    bounded = scoring.work(1, columns).bounded
    tile = top_tiles(top, scoring.lambdas * scoring.q, scoring.n, modules, bounded=bounded)
    blocks, block_rows = scoring.plan("top", options["memory"], slots, tile, queries=parts.queries)
    work = scoring.work(block_rows, columns, product=options["product"])
    _check_product(work)
    shape = (len(SIDES), scoring.lambdas, modules, scoring.q, top)
    scores, numbers, outside = np.empty(shape, np.float32), np.empty(shape, np.int64), np.empty(scoring.q)
    products: set[str] = set()
    exact = 0
    with parts.claimed(), Progress("top", len(blocks) * scoring.n, options["progress"]) as bar:
        for start, stop in blocks:
            queries = scoring.precondition(start, stop)
            outside[start:stop] = queries.outside
            lists: dict[str, Best] = {}

            def add(stripe: Stripe, part: Part, lists: dict[str, Best] = lists) -> None:
                nonlocal exact
                products.add(str(part["product"]))
                exact += int(part["exact"])
                for name in SIDES:
                    lists[name] = merge(lists.get(name), (part[f"{name}_scores"], part[f"{name}_rows"]))

            parts.run(
                f"{start}-{stop}", best_of_stripe, work, bar, top, scoring.seen,
                *work.read_as_rows(queries.arrays), slots=slots,
                on_result=add,
            )  # fmt: skip
            for side, name in enumerate(SIDES):
                block = (part.reshape(*shape[1:3], stop - start, top) for part in lists[name])
                scores[side, :, :, start:stop], numbers[side, :, :, start:stop] = block
    scoring.warn_outside(outside)
    total = scoring.lambdas * modules * scoring.q * scoring.n
    search = {"product": " and ".join(sorted(products)), "rescored": exact / total if bounded else None}
    return Lists(scores, numbers, outside, search)


def _check_product(work: ScoreTask) -> None:
    """Check that rows can be multiplied as asked; raise InputError if not."""
    for number, store in enumerate(work.stores):
        check_product(work.product, store.layout.encoding, work.as_stored(number))
    if work.product not in ("auto", "float32") and not work.bounded:
        raise InputError(
            f"expected product auto or float32 for rows that are not mapped, are divided by norms that no column "
            f"holds, or are multiplied on a device; received {work.product!r}: leave it out"
        )

"""The best lists of some queries: searched stripe by stripe, and merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.influence.checkpoints import Marks
from ooc_influence.influence.costs import TileMemory
from ooc_influence.influence.engine import Floats
from ooc_influence.influence.exact import PAIR_BYTES
from ooc_influence.influence.heap import ENTRY_BYTES, NO_ROW, Best, list_bytes, merge
from ooc_influence.influence.ranking import Ranking, TopInfluential
from ooc_influence.influence.request import PreconditionedQueries, ScoreRequest
from ooc_influence.influence.search import BOUND_SIDES, SIDES, best_of_stripe
from ooc_influence.influence.tiles import Part, ScoreParts, ScoreTask
from ooc_influence.influence.trial import check_product
from ooc_influence.parallel import Stripe
from ooc_influence.progress import Progress


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
    bounds : (scores, rows) or None
        Of a sketch's rows: in the same form, the rows whose wide scores have the largest upper bounds.
    proven : (L, q) bool or None
        See :class:`TopInfluential`.
    """

    scores: Floats
    rows: npt.NDArray[np.int64]
    outside: npt.NDArray[np.float64]
    search: Mapping[str, Any]
    bounds: tuple[Floats, npt.NDArray[np.int64]] | None = None
    proven: npt.NDArray[np.bool_] | None = None

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
        proven = None if self.proven is None else scoring.squeeze(self.proven)
        return TopInfluential(proponents, opponents, *found, proven)


_TILE_SCORES = 2**22  # scores found at a time: more gain nothing


def top_tiles(
    top: int, query_rows: int, n: int, modules: int = 1, *, bounded: bool = True, upper: bool = False
) -> TileMemory:  # fmt: skip
    """Return what a pass for lists of ``top`` of ``n`` rows holds, for ``query_rows`` preconditioned queries in all.

    ``bounded`` says whether rows are found by a quick product (:attr:`ScoreTask.bounded`), ``upper`` whether there are
    lists by upper bounds as well.
    """
    sides = 4 if upper else 2
    both = sides * ENTRY_BYTES * top  # a query's lists
    lists = sides * list_bytes(top, n) + 3 * both  # of the stripe; of those before, of one more, and merged
    fixed = 4 * both * query_rows * modules  # with what looking up the ids takes
    bounds = 4 if upper else 0
    if not bounded:
        return TileMemory(per_score=4 + 1 + bounds, per_query=lists, fixed=fixed, modules=modules)
    lists += 2 * PAIR_BYTES * sides * top  # where all are scored exactly
    # a tile, its products in whole numbers and as numbers, which of them are looked at; rows, rounded
    sizes = {"per_score": 4 + 8 + 4 + 1 + bounds, "per_number": 4 + 2, "most_scores": _TILE_SCORES}
    return TileMemory(per_query=lists, fixed=fixed, modules=modules, **sizes)


class ListPass(NamedTuple):
    """A pass over train rows for lists.

    Attributes
    ----------
    work : ScoreTask
        The rows.
    seen : (C, n) bool or None
        Which of them each checkpoint was trained on.
    blocks : sequence of (start, stop)
        Queries taken at a time.
    parts : ScoreParts
        What keeps results of stripes.
    slots : int
        Tasks at a time.
    name : str
        What names of parts begin with.
    """

    work: ScoreTask
    seen: Marks | None
    blocks: Sequence[tuple[int, int]]
    parts: ScoreParts
    slots: int
    name: str = ""

    def run(self, read: Callable[[int, int], PreconditionedQueries], top: int, bar: Progress) -> Lists:
        """Return the lists of all queries; ``read(start, stop)`` gives some of them, preconditioned."""
        work, q = self.work, self.blocks[-1][1]
        shape, outside = (work.lambdas, work.modules, q, top), np.empty(q)
        found: dict[str, Best] = {}
        products: set[str] = set()
        exact = 0
        for start, stop in self.blocks:
            queries = read(start, stop)
            outside[start:stop] = queries.outside
            names = SIDES if queries.bounds is None else (*SIDES, *BOUND_SIDES)
            lists: dict[str, Best] = {}

            def add(
                stripe: Stripe, part: Part, lists: dict[str, Best] = lists, names: Sequence[str] = names
            ) -> None:  # fmt: skip
                nonlocal exact
                products.add(str(part["product"]))
                exact += int(part["exact"])
                for name in names:
                    lists[name] = merge(lists.get(name), (part[f"{name}_scores"], part[f"{name}_rows"]))

            self.parts.run(
                f"{self.name}{start}-{stop}", best_of_stripe, work, bar, top, self.seen, queries.bounds,
                *work.read_as_rows(queries.arrays), slots=self.slots, on_result=add,
            )  # fmt: skip
            for name in names:
                scores, rows = found.setdefault(name, (np.empty(shape, np.float32), np.empty(shape, np.int64)))
                block = (*shape[:2], stop - start, top)
                scores[:, :, start:stop], rows[:, :, start:stop] = (part.reshape(block) for part in lists[name])
        total = work.lambdas * work.modules * q * work.rows
        search = {"product": " and ".join(sorted(products)), "rescored": exact / total if work.bounded else None}
        bounds = _stacked(found, BOUND_SIDES) if BOUND_SIDES[0] in found else None
        return Lists(*_stacked(found, SIDES), outside, search, bounds)


def _stacked(found: Mapping[str, Best], names: Sequence[str]) -> Best:
    """Return lists by side as one, (2, ...)."""
    return np.stack([found[name][0] for name in names]), np.stack([found[name][1] for name in names])


def check_rows(work: ScoreTask) -> None:
    """Check that rows can be multiplied as asked; raise InputError if not."""
    for number, store in enumerate(work.stores):
        check_product(work.product, store.layout.encoding, work.as_stored(number))
    if work.product not in ("auto", "float32") and not work.bounded:
        raise InputError(
            f"expected product auto or float32 for rows that are not mapped, are divided by norms that no column "
            f"holds, or are multiplied on a device; received {work.product!r}: leave it out"
        )

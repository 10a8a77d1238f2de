"""What top lists look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Ranking:
    """Train rows in order of influence, for each query; with an axis of λ in front where a list of dampings was given.

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
        Ids of the queries; their row numbers where the query store has none, the groups' names where they are averaged.
    damping : float, list of float, or list of these
        λ itself; (L,) for a list of dampings; one of these for each checkpoint where there are several.
    outside_share : (q,) float64
        Share of each query's squared gradient outside the span of the training spectrum, mean over checkpoints: no
        train row speaks to that part. NaN for dropped queries and without a curvature.
    """

    proponents: Ranking
    opponents: Ranking
    query_ids: npt.NDArray[Any]
    damping: Any
    outside_share: npt.NDArray[np.float64]

    @property
    def dampings(self) -> int | None:
        """How many dampings a list gave, L; None for a single one."""
        return len(self.proponents.rows) if self.proponents.rows.ndim == 3 else None

    def at(self, number: int) -> TopInfluential:
        """Return what was found with one of several dampings.

        Raises
        ------
        IndexError
            If there is no such one.
        """
        proponents, opponents = (
            Ranking(side.rows[number], side.scores[number], side.ids[number])
            for side in (self.proponents, self.opponents)
        )
        own = [values[number] for values in self.damping] if np.ndim(self.damping) == 2 else self.damping[number]
        return TopInfluential(proponents, opponents, self.query_ids, own, self.outside_share)

    def to_dict(self) -> Mapping[str, Any]:
        """Return the result as JSON-ready values: an entry a query, or ``by_damping`` with one of these for each λ."""
        if self.dampings is not None:
            return {"by_damping": [self.at(number).to_dict() for number in range(self.dampings)]}
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
            outside = self.outside_share[number].item()
            queries.append(
                {"query": number, "id": name, "outside_share": None if np.isnan(outside) else outside, **lists}
            )
        return {"damping": self.damping, "queries": queries}

"""What top lists look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.progress import html_table, optional_library

_SHOWN = 20  # queries in a notebook's table


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

    def of_query(self, number: int) -> dict[str, list[tuple[int, Any, float]]]:
        """Return a query's ``proponents`` and ``opponents``, (row, id, score) each, as they are shown to a reader.

        Lists end where the sign of scores changes: a proponent's is positive, an opponent's negative. Both are empty
        for a query that is dropped. For one damping; see :meth:`at`.
        """
        lists = {}
        for side, sign in (("proponents", 1), ("opponents", -1)):
            ranking: Ranking = getattr(self, side)
            columns = (ranking.rows[number], ranking.ids[number], ranking.scores[number])
            entries = zip(*(column.tolist() for column in columns), strict=True)
            lists[side] = [(row, name, score) for row, name, score in entries if row >= 0 and sign * score > 0]
        return lists

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

    def to_pandas(self) -> Any:
        """Return a DataFrame with a line an entry of a list: query, query_id, side, rank, row, id, score, and damping.

        Raises
        ------
        MissingExtraError
            Without pandas.
        """
        pandas = optional_library("pandas", "tables")
        if self.dampings is not None:
            parts = [self.at(number) for number in range(self.dampings)]
            return pandas.concat([part.to_pandas() for part in parts], ignore_index=True)
        frames = []
        for side in ("proponents", "opponents"):
            ranking: Ranking = getattr(self, side)
            q, top = ranking.rows.shape
            query, rank = np.repeat(np.arange(q), top), np.tile(np.arange(1, top + 1), q)
            lists = (ranking.rows.ravel(), ranking.ids.ravel(), ranking.scores.ravel())
            columns = dict(zip(("row", "id", "score"), lists, strict=True))
            frames.append(pandas.DataFrame({"query": query, "side": side, "rank": rank, **columns}))
        frame = pandas.concat(frames).sort_values(["query", "side", "rank"], ascending=[True, False, True])
        frame.insert(1, "query_id", np.asarray(self.query_ids)[frame["query"]])
        frame["damping"] = str(self.damping) if np.ndim(self.damping) else self.damping
        return frame[frame["row"] >= 0].reset_index(drop=True)

    def __repr__(self) -> str:
        levels = "" if self.dampings is None else f"{self.dampings} dampings, "
        q, top = self.proponents.rows.shape[-2:]
        return f"<TopInfluential {levels}{q} queries, {top} proponents and opponents each, damping={self.damping}>"

    def _repr_html_(self) -> str:
        found = self if self.dampings is None else self.at(0)
        lines = []
        for number, name in enumerate(found.query_ids[:_SHOWN].tolist()):
            lists = found.of_query(number).values()
            sides = [", ".join(f"{own} ({score:+.3g})" for _, own, score in entries) for entries in lists]
            lines.append((name, *sides))
        more = len(found.query_ids) - len(lines)
        return html_table(repr(self) + (f", {more} more" if more else ""), ("query", "proponents", "opponents"), lines)

"""Rankings of train rows, query by query: what calls that make lists return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    stored : (q, top) float32, or None
        Of a ranking by exact scores (:func:`rerank`), the scores of the rows as they are stored.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    ids: npt.NDArray[Any]
    stored: npt.NDArray[np.float32] | None = None

    def at(self, number: int) -> Ranking:
        """Return the ranking of one of several dampings."""
        return Ranking(self.rows[number], self.scores[number], self.ids[number])

    def first(self, count: int) -> Ranking:
        """Return the first ``count`` rows of each query."""
        stored = None if self.stored is None else self.stored[..., :count]
        return Ranking(self.rows[..., :count], self.scores[..., :count], self.ids[..., :count], stored)

    def of_query(self, number: int) -> list[tuple[int, Any, float]]:
        """Return a query's train rows, (row, id, score) each."""
        columns = (self.rows[number], self.ids[number], self.scores[number])
        return [entry for entry in zip(*(column.tolist() for column in columns), strict=True) if entry[0] >= 0]

    def stored_scores(self, number: int) -> dict[int, float] | None:
        """Return the scores of a query's train rows as they are stored, by row; None where these made the ranking."""
        if self.stored is None:
            return None
        return dict(zip(self.rows[number].tolist(), self.stored[number].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class TopInfluential:
    """Result of :func:`top_influential`.

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
        train row can account for that part. NaN for dropped queries and without a curvature.
    settings : mapping
        What was asked for or taken by default: the curvature's path, damping and its mode, and ``normalize``.
    search : mapping
        How the rows were found, which changes nothing in the lists: ``product``, and ``rescored``, the share of all
        scores that were computed again, exactly; None where the scores of the product are those of the lists. With
        ``sketch=``, see [influence](influence.md#lists-by-a-sketch).
    proven : (q,) bool, or None
        With ``sketch=``: of which queries both lists are proven complete, no other row having scores that high; (L, q)
        for a list of dampings. False for dropped queries. None without a sketch, or with one that proves nothing.
    """

    proponents: Ranking
    opponents: Ranking
    query_ids: npt.NDArray[Any]
    damping: Any
    outside_share: npt.NDArray[np.float64]
    settings: Mapping[str, Any]
    search: Mapping[str, Any] = field(default_factory=dict)
    proven: npt.NDArray[np.bool_] | None = None

    @property
    def dampings(self) -> int | None:
        """How many dampings a list gave, L; None for a single one."""
        return len(self.proponents.rows) if self.proponents.rows.ndim == 3 else None

    def at(self, number: int) -> TopInfluential:
        """Return the result for one of several dampings.

        Raises
        ------
        IndexError
            If there is no such one.
        """
        damping = [values[number] for values in self.damping] if np.ndim(self.damping) == 2 else self.damping[number]
        proponents, opponents = self.proponents.at(number), self.opponents.at(number)
        settings = {**self.settings, "damping": self.settings["damping"][number]}
        found = (self.query_ids, damping, self.outside_share, settings, self.search)
        return TopInfluential(proponents, opponents, *found, None if self.proven is None else self.proven[number])

    def _lists(self, number: int) -> dict[str, list[tuple[int, Any, float]]]:
        """Return all of a query's proponents and opponents."""
        return {"proponents": self.proponents.of_query(number), "opponents": self.opponents.of_query(number)}

    def of_query(self, number: int) -> dict[str, list[tuple[int, Any, float]]]:
        """Return a query's ``proponents`` and ``opponents``, (row, id, score) each, as they are shown to a reader.

        Lists end where the sign of scores changes: a proponent's is positive, an opponent's negative. Both are empty
        for a query that is dropped. For one damping; see :meth:`at`.
        """
        signs = {"proponents": 1, "opponents": -1}
        return {
            side: [entry for entry in entries if signs[side] * entry[2] > 0]
            for side, entries in self._lists(number).items()
        }

    def to_dict(self) -> Mapping[str, Any]:
        """Return the result as JSON-ready values: an entry a query, or ``by_damping`` with one of these for each λ."""
        if self.dampings is not None:
            levels = [self.at(number).to_dict() for number in range(self.dampings)]
            return {"by_damping": levels, "settings": self.settings, "search": self.search}
        queries = []
        for number, name in enumerate(self.query_ids.tolist()):
            lists: dict[str, Any] = {
                side: [{"row": row, "id": row_id, "score": score} for row, row_id, score in entries]
                for side, entries in self._lists(number).items()
            }
            for side, ranking in (("proponents", self.proponents), ("opponents", self.opponents)):
                stored = ranking.stored_scores(number)
                if stored is not None:
                    lists[side] = [entry | {"stored_score": stored[entry["row"]]} for entry in lists[side]]
            if self.proven is not None:
                lists["proven"] = bool(self.proven[number])
            outside = self.outside_share[number].item()
            queries.append(
                {"query": number, "id": name, "outside_share": None if np.isnan(outside) else outside, **lists}
            )
        return {"damping": self.damping, "queries": queries, "settings": self.settings, "search": self.search}

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
        records = [
            (number, query_id, side, rank, *entry)
            for number, query_id in enumerate(self.query_ids.tolist())
            for side, entries in self._lists(number).items()
            for rank, entry in enumerate(entries, 1)
        ]
        columns = ["query", "query_id", "side", "rank", "row", "id", "score"]
        frame = pandas.DataFrame.from_records(records, columns=columns).astype({"score": "float32"})
        frame["damping"] = str(self.damping) if np.ndim(self.damping) else self.damping
        return frame

    def __repr__(self) -> str:
        levels = "" if self.dampings is None else f"{self.dampings} dampings, "
        q, top = self.proponents.rows.shape[-2:]
        return f"<TopInfluential {levels}{q} queries, {top} proponents and opponents each, damping={self.damping}>"

    def _repr_html_(self) -> str:
        shown = self if self.dampings is None else self.at(0)
        lines = []
        for number, query in enumerate(shown.query_ids[:_SHOWN].tolist()):
            lists = shown.of_query(number).values()
            sides = [", ".join(f"{name} ({score:+.3g})" for _, name, score in entries) for entries in lists]
            lines.append((query, *sides))
        more = len(shown.query_ids) - len(lines)
        return html_table(repr(self) + (f", {more} more" if more else ""), ("query", "proponents", "opponents"), lines)

"""Whether lists by a sketch are complete: no row that is not a candidate can have a score as good as those listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ooc_influence.influence.engine import Floats
from ooc_influence.influence.heap import NO_ROW, Numbers
from ooc_influence.influence.request import PreconditionedQueries

Read = Callable[[int, int], PreconditionedQueries]


class Proof(NamedTuple):
    """What is known of the lists of some queries.

    Attributes
    ----------
    entries : (2, L, q, top) bool
        Which entries are certain: they score higher than the upper bound of every row that is not a candidate.
    lists : (2, L, q) bool
        Which lists are complete: all of their entries are certain.
    live : (q,) bool
        Which queries are not dropped.
    listed : int
        Entries of all lists.
    """

    entries: npt.NDArray[np.bool_]
    lists: npt.NDArray[np.bool_]
    live: npt.NDArray[np.bool_]
    listed: int

    @classmethod
    def of(cls, scores: Floats, rows: Numbers, outside: Floats) -> Self:
        """Return that of lists (2, L, q, top), and the highest bounds of other rows than candidates, (2, L, q)."""
        filled = rows != NO_ROW
        entries = filled & (scores > outside[..., None])
        complete = (entries == filled).all(-1) & (filled.all(-1) | (outside == -np.inf))
        live = filled.any(axis=(0, 1, 3))
        return cls(entries, complete & live, live, int(filled.sum()))

    @property
    def queries(self) -> npt.NDArray[np.bool_]:
        """Of which queries both lists are complete, (L, q)."""
        return np.asarray(self.lists.all(0))

    @property
    def facts(self) -> dict[str, Any]:
        """What :attr:`TopInfluential.search` says of it: a query counts if its lists are complete at every λ."""
        return {
            "queries": int(self.live.sum()),
            "proven_queries": int(self.queries.all(0).sum()),
            "proven_share": float(self.entries.sum() / self.listed) if self.listed else 1.0,
        }


def highest_outside(bounds: tuple[Floats, Numbers], candidates: Numbers) -> Floats:
    """Return the highest upper bound of the rows that are not candidates, (...,); -inf where all rows are.

    Parameters
    ----------
    bounds : (scores, rows), (..., c) each
        The rows with the largest bounds, largest first.
    candidates : (..., c) int64
        As many rows, :data:`NO_ROW` where there are fewer.
    """
    count = candidates.shape[-1]
    most, rows, first = bounds[0].reshape(-1, count), bounds[1].reshape(-1, count), candidates.reshape(-1, count)
    found = np.full(len(rows), -np.inf, np.float32)
    for number, (best, others, own) in enumerate(zip(most, rows, first, strict=True)):
        if own[-1] != NO_ROW:  # there are more rows
            outside = np.flatnonzero(~np.isin(others, own))
            found[number] = best[outside[0] if len(outside) else -1]
    return found.reshape(candidates.shape[:-1])


def list_ends(scores: Floats, rows: Numbers) -> Floats:
    """Return the score that a row must at least have to be in a list, of lists (..., top); -inf where there is room."""
    return np.asarray(np.where(rows[..., -1] == NO_ROW, np.float32(-np.inf), scores[..., -1]))


def chosen(read: Read, numbers: Numbers) -> Read:
    """Return what reads some of the queries that ``read`` does, by their numbers, ascending."""

    def some(start: int, stop: int) -> PreconditionedQueries:
        wanted = numbers[start:stop]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        return joined([read(int(run[0]), int(run[-1]) + 1) for run in runs])

    return some


def joined(queries: list[PreconditionedQueries]) -> PreconditionedQueries:
    """Return several sets of one checkpoint's queries as one, λ by λ."""
    k = queries[0].arrays[0].shape[-1]
    arrays = np.concatenate([each.arrays[0].reshape(-1, len(each.dropped), k) for each in queries], axis=1)
    outside, dropped, norms = (
        np.concatenate([getattr(each, name) for each in queries]) for name in ("outside", "dropped", "norms")
    )
    return PreconditionedQueries([arrays.reshape(-1, k)], outside, dropped, norms)

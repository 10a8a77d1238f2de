"""What became of a curvature's rows since it was fitted: nothing, rows to add or to subtract, or too much.

A curvature remembers the commit records of the chunks its rows lie in and which of its rows were dropped. Rows that
are still there under their record are the same rows; a chunk that was part-filled and has grown is told by the checksum
of its first rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.rows import ChosenRows, Numbers, Range
from ooc_influence.store import GradientStore

NO_PLACES: Numbers = np.empty(0, np.int64)


class Change(NamedTuple):
    """What became of the rows.

    Attributes
    ----------
    added : (first, last) or None
        Places of new rows, behind the old ones.
    removed : (m,) int64
        Places of rows dropped since.
    refit : str
        Why the old sum is of no use any more; empty where it is.
    """

    added: Range | None = None
    removed: Numbers = NO_PLACES
    refit: str = ""

    @property
    def nothing(self) -> bool:
        """Whether the rows are what they were."""
        return self.added is None and not len(self.removed) and not self.refit


@dataclass(frozen=True, eq=False)
class RowRecord:
    """What a curvature remembers of its rows.

    Attributes
    ----------
    first, count : int
        Row of place 0 where they are a range, and how many they are.
    numbers : (count,) int64 or None
        Their numbers; None for a range.
    selection : mapping
        How they were chosen.
    records : (chunks,) uint64
        The store's commit records at the fit.
    dropped : (count,) bool
        Which of them were dropped.
    """

    first: int
    count: int
    numbers: Numbers | None
    selection: Mapping[str, Any]
    records: npt.NDArray[np.uint64]
    dropped: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, chosen: ChosenRows) -> RowRecord:
        """Return what there is to remember of rows as they are now."""
        records = chosen.store.records[: -(-chosen.store.n // chosen.store.layout.chunk_rows)].copy()
        return cls(chosen.first, chosen.count, chosen.numbers, chosen.selection, records, chosen.dropped())

    @classmethod
    def load(cls, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> RowRecord:
        """Return what :meth:`facts` and :meth:`arrays` wrote down."""
        dropped = np.unpackbits(arrays["dropped"], count=int(facts["count"])).astype(np.bool_)
        return cls(
            int(facts["first"]),
            int(facts["count"]),
            arrays.get("numbers"),
            facts["selection"],
            arrays["records"],
            dropped,
        )

    def facts(self) -> dict[str, Any]:
        """Return what goes into a curvature's attributes."""
        return {"first": self.first, "count": self.count, "selection": dict(self.selection)}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what goes into a curvature's arrays."""
        numbers = {} if self.numbers is None else {"numbers": self.numbers}
        return {"records": self.records, "dropped": np.packbits(self.dropped), **numbers}

    @property
    def live(self) -> int:
        """Rows that were not dropped."""
        return self.count - int(self.dropped.sum())

    def change(self, store: GradientStore, chosen: ChosenRows | None = None) -> Change:
        """Return how the rows have changed in the store they came from.

        ``chosen`` are those of a new fit with the same selection: then the answer is about these, as they were chosen.
        """
        last = self.first + self.count if self.numbers is None else int(self.numbers[-1]) + 1
        n = store.n if chosen is None or chosen.numbers is not None else chosen.first + chosen.count
        if n < last:
            return Change(refit="rows are gone")
        then = ChosenRows(store, self.first, self.count, self.numbers, None, None, self.selection)
        if not store.holds(self.records, then.chunks().tolist()):
            return Change(refit="rows were written again")
        now = then.dropped_now() if chosen is None else chosen.dropped()[: self.count]
        if (self.dropped & ~now).any():
            return Change(refit="rows that were dropped are back")
        removed = np.flatnonzero(now & ~self.dropped)
        drawn = self.selection.get("of")
        grown = (drawn or self.selection).get("stop", 0) is None and n > (
            last if drawn is None else int(self.selection["rows"])
        )
        if drawn is not None and (grown or len(removed)):
            return Change(refit="a sample is drawn anew")
        return Change((self.count, n - self.first) if grown else None, removed)

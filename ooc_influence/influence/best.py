"""The largest scores of each query, kept up to date tile by tile.

A tile is compared with each query's limit, its ``top``-th best score so far, and only what exceeds it is looked at:
about top · log(n / top) scores of a query in all. Those wait unsorted behind the list until there is no more room.
Rows tie-break by number, smaller first, so the result is the same for every division of the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.influence.engine import Engine, Floats, Found

NO_ROW = np.iinfo(np.int64).max
_CANDIDATES = 2**16  # scores taken from a tile at a time
ENTRY_BYTES = 4 + 8  # a score and its row


def capacity(top: int, rows: int) -> int:
    """Return the places of a list of the best of ``rows``: those, and some that wait."""
    return max(top, min(rows, max(2 * top, top + 64)))


def list_bytes(top: int, rows: int) -> int:
    """Return the bytes a query's list holds."""
    return ENTRY_BYTES * capacity(top, rows)


class BestList:
    """The ``top`` largest scores of each query so far, with their rows.

    Parameters
    ----------
    queries, top : int
        Sizes.
    rows : int
        Train rows that will come.
    """

    def __init__(self, queries: int, top: int, rows: int) -> None:
        self.top = top
        self._scores = np.full((queries, capacity(top, rows)), -np.inf, np.float32)
        self._rows = np.full((queries, capacity(top, rows)), NO_ROW, np.int64)
        self._counts = np.zeros(queries, np.int64)
        self._limits = np.full(queries, -np.inf, np.float32)

    def add(self, tile: Any, first_row: int, engine: Engine, sign: int = 1) -> None:
        """Take in ``sign`` · scores (q, rows) of train rows from ``first_row`` on, in order; NaN never enters."""
        waiting = [(0, tile.shape[1])]
        while waiting:
            low, high = waiting.pop()
            found = engine.above(tile[:, low:high], self._limits, max(_CANDIDATES, len(self._counts)), sign)
            if found is None or not self._append(found, first_row + low):
                middle = (low + high) // 2  # the first half raises the limits for the second
                waiting += [(middle, high), (low, middle)]

    def _append(self, found: Found, first_row: int) -> bool:
        """Put candidates behind the lists; return False where one has no room for them."""
        if not len(found.numbers):
            return True
        more = np.bincount(found.numbers, minlength=len(self._counts))
        full = np.flatnonzero(self._counts + more > self._scores.shape[1])
        if len(full):
            self._compact(full)
            if (self._counts[full] + more[full] > self._scores.shape[1]).any():
                return False
        starts = np.cumsum(more) - more
        places = self._counts[found.numbers] + np.arange(len(found.numbers)) - starts[found.numbers]
        self._scores[found.numbers, places] = found.values
        self._rows[found.numbers, places] = first_row + found.columns
        self._counts += more
        return True

    def _compact(self, numbers: npt.NDArray[np.int64]) -> None:
        """Sort the lists of some queries, leaving the best: a score and its place in one whole number, largest last."""
        step = max(1, _CANDIDATES // self._scores.shape[1])
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step]
            bits = (self._scores[part] + np.float32(0)).view(np.uint32)  # -0 as 0: they are equal
            ascending = np.where(bits >> 31, ~bits, bits | np.uint32(2**31)).astype(np.uint64)
            places = np.arange(bits.shape[1], dtype=np.uint64)  # rows ascend with them
            keys = np.sort((~ascending << np.uint64(32)) | places, axis=1)[:, : self.top]
            chosen = (keys & np.uint64(2**32 - 1)).astype(np.int64)
            scores, rows = (np.take_along_axis(values[part], chosen, 1) for values in (self._scores, self._rows))
            self._scores[part, : self.top], self._rows[part, : self.top] = scores, rows
            self._scores[part, self.top :], self._rows[part, self.top :] = -np.inf, NO_ROW
            self._counts[part] = (rows != NO_ROW).sum(1)
            self._limits[part] = scores[:, -1]

    def best(self) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Return scores and rows, (q, top) each, best first; -inf and :data:`NO_ROW` where there are fewer."""
        self._compact(np.arange(len(self._counts)))
        return self._scores[:, : self.top], self._rows[:, : self.top]


Best = tuple[Floats, npt.NDArray[np.int64]]


def merge(first: Best | None, other: Best) -> Best:
    """Return the best of two sets of lists, scores and rows (q, top) each, of different train rows."""
    if first is None:
        return other
    scores, rows = np.empty_like(other[0]), np.empty_like(other[1])
    step = max(1, _CANDIDATES // (2 * scores.shape[1]))
    for start in range(0, len(scores), step):
        part = slice(start, start + step)
        both = np.concatenate([first[0][part], other[0][part]], axis=1)
        all_rows = np.concatenate([first[1][part], other[1][part]], axis=1)
        order = np.lexsort((all_rows, -both))[:, : scores.shape[1]]
        scores[part], rows[part] = np.take_along_axis(both, order, 1), np.take_along_axis(all_rows, order, 1)
    return scores, rows

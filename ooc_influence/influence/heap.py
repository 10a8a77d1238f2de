"""The largest scores of each query, kept up to date tile by tile, from scores that are exact or have a known bound.

A tile is compared with each query's limit, the ``top``-th best that a score must at least be, so far, and only what may
exceed it is looked at: about top · log(n / top) scores of a query in all. Candidates are kept unsorted behind the list
until it is full. Of scores s̃ with bounds e, s̃ − e counts towards the limit and s̃ + e against it; a list that is full of
such that cannot be told apart is scored exactly (Fagin and others 2003 call it a threshold algorithm). Ties are broken
by row number, smaller first, so the result is the same for every division of the work, and for every product that
scores are found with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.influence.engine import Engine, Entries, Floats

NO_ROW = np.iinfo(np.int64).max
_CANDIDATES = 2**16  # scores taken from a tile at a time
_ROUNDING = 2.0**-22  # of the arithmetic with bounds in float32, relative
ENTRY_BYTES = 4 + 4 + 8  # the least and the most that a score can be, and its row

Numbers = npt.NDArray[np.int64]
Rescore = Callable[[Numbers, Numbers], Floats]  # lists and rows (c,) of some pairs: their exact scores (c,)


def capacity(top: int, rows: int) -> int:
    """Return the length of a list of the best of ``rows``: those, and some candidates that are not sorted yet."""
    return max(top, min(rows, 4 * top + 64))


def list_bytes(top: int, rows: int) -> int:
    """Return the bytes a query's list holds."""
    return ENTRY_BYTES * capacity(top, rows)


class Bounds(NamedTuple):
    """What the scores of a tile (m, b) may be off by: Σ_t E[list, t] F[group, column, t] + ρ |score|.

    Attributes
    ----------
    lists : (m, t) float64
        E.
    groups : (m,) int64
        Which F each list has.
    rows : (G, b, t) float64
        F.
    relative : float
        ρ.
    most : (G, t) float64
        The largest F of all columns, or more.
    """

    lists: npt.NDArray[np.float64]
    groups: Numbers
    rows: npt.NDArray[np.float64]
    relative: float
    most: npt.NDArray[np.float64]

    @classmethod
    def make(
        cls, lists: npt.NDArray[np.float64], groups: Numbers, rows: npt.NDArray[np.float64], relative: float
    ) -> Bounds:
        """Return the bounds of a tile."""
        columns = [rows[:, :, number].max(axis=1, initial=0) for number in range(rows.shape[2])]  # along b: quicker
        return cls(lists, groups, rows, relative, np.stack(columns, axis=1))

    def cut(self, low: int, high: int) -> Bounds:
        """Return those of columns ``low`` to ``high``."""
        return self._replace(rows=self.rows[:, low:high])

    def largest(self) -> npt.NDArray[np.float64]:
        """Return the most that Σ_t is in each list, or more, (m,); NaN for a list that has no scores."""
        with np.errstate(invalid="ignore"):
            return np.asarray(np.einsum("mt,mt->m", self.lists, self.most[self.groups]))

    def of(self, entries: Entries) -> npt.NDArray[np.float64]:
        """Return those of some entries, (c,)."""
        factors = self.rows[self.groups[entries.rows], entries.columns]
        with np.errstate(invalid="ignore"):
            errors = np.einsum("ct,ct->c", self.lists[entries.rows], factors)
        errors[np.isnan(errors)] = 0  # no error times an infinite factor: a query of zeros
        return np.asarray(errors + (self.relative + _ROUNDING) * np.abs(entries.values))


class TopKHeap:
    """The ``top`` largest scores of each query so far, with their rows.

    Parameters
    ----------
    queries, top : int
        Sizes.
    rows : int
        Train rows that will come.
    rescore : callable, optional
        Returns the exact scores of (list, row) pairs; for scores with bounds.
    """

    def __init__(self, queries: int, top: int, rows: int, rescore: Rescore | None = None) -> None:
        self.top = top
        shape = (queries, capacity(top, rows))
        self._least, self._most = (np.full(shape, -np.inf, np.float32) for _ in range(2))
        self._rows = np.full(shape, NO_ROW, np.int64)
        self._counts = np.zeros(queries, np.int64)
        self._limits = np.full(queries, -np.inf, np.float32)
        self._rescore = rescore
        self._empty = True

    def add(self, tile: Any, first_row: int, engine: Engine, sign: int = 1, bounds: Bounds | None = None) -> None:
        """Take in ``sign`` · scores (q, rows) of train rows from ``first_row`` on, in order; NaN never enters."""
        if self._empty and tile.shape[1] >= self.top:
            self._limits = _first_limits(engine.nth_largest(tile, self.top, sign), bounds)
        self._empty = False
        waiting = [(0, tile.shape[1])]
        while waiting:
            low, high = waiting.pop()
            part = None if bounds is None else bounds.cut(low, high)
            limits = self._limits if part is None else lowered(self._limits, part)
            found = engine.above(tile[:, low:high], limits, max(_CANDIDATES, len(self._counts)), sign)
            if found is None or not self.append(found, first_row + low, part):
                middle = (low + high) // 2  # the first half raises the limits for the second
                waiting += [(middle, high), (low, middle)]

    @property
    def limits(self) -> Floats | None:
        """What a score must exceed to be in each list, (q,); None before the first tile."""
        return None if self._empty else self._limits

    def append(self, found: Entries, first_row: int, bounds: Bounds | None) -> bool:
        """Put entries of a tile behind the lists; return False if one has no room for them."""
        least = most = found.values
        if bounds is not None and len(found.rows):
            errors = bounds.of(found)
            possible = found.values + errors > self._limits[found.rows]
            found, errors = found.where(possible), errors[possible]
            least, most = ((found.values + side * errors).astype(np.float32) for side in (-1, 1))
        if not len(found.rows):
            return True
        more = np.bincount(found.rows, minlength=len(self._counts))
        full = np.flatnonzero(self._counts + more > self._rows.shape[1])
        if len(full):
            self._compact(full)
            full = full[self._counts[full] + more[full] > self._rows.shape[1]]
            if bounds is not None and len(full):
                self._score_exactly(full[self._counts[full] > self.top])
                full = full[self._counts[full] + more[full] > self._rows.shape[1]]
            if len(full):
                return False
        starts = np.cumsum(more) - more
        lists = found.rows
        slots = self._counts[lists] + np.arange(len(lists)) - starts[lists]
        self._least[lists, slots], self._most[lists, slots] = least, most
        self._rows[lists, slots] = first_row + found.columns
        self._counts += more
        return True

    def _compact(self, numbers: Numbers) -> None:
        """Sort the lists of some queries by what scores are at least, leaving out what cannot be among the best.

        A key is a score and its index, in one whole number.
        """
        step = max(1, _CANDIDATES // self._rows.shape[1])
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step]
            bits = (self._least[part] + np.float32(0)).view(np.uint32)  # -0 as 0: they are equal
            ascending = np.where(bits >> 31, ~bits, bits | np.uint32(2**31)).astype(np.uint64)
            indices = np.arange(bits.shape[1], dtype=np.uint64)  # rows ascend with them
            keys = np.sort((~ascending << np.uint64(32)) | indices, axis=1)
            order = (keys & np.uint64(2**32 - 1)).astype(np.int64)
            least, most, rows = (np.take_along_axis(each[part], order, 1) for each in self._columns)
            limits = least[:, self.top - 1]
            kept = most >= limits[:, None]
            kept[:, : self.top] = True
            # scores that are exact and equal: the first rows have them
            kept[:, self.top :] &= ~((least == most) & (least == limits[:, None]))[:, self.top :]
            self._put(part, kept, least, most, rows)
            self._limits[part] = np.maximum(self._limits[part], limits)

    @property
    def _columns(self) -> tuple[Any, Any, Any]:
        return self._least, self._most, self._rows

    def _put(self, part: Numbers, kept: npt.NDArray[np.bool_], least: Any, most: Any, rows: Any) -> None:
        """Write some lists' entries that are kept, one after the other."""
        columns = (least, most, rows)
        counts = (kept & (rows != NO_ROW)).sum(1)
        width = max(1, int(kept.sum(1).max(initial=0)))
        order = np.argsort(~kept, axis=1, kind="stable")[:, :width]
        inside = np.arange(width) < counts[:, None]
        empties: tuple[Any, ...] = (-np.inf, -np.inf, NO_ROW)
        for target, values, empty in zip(self._columns, columns, empties, strict=True):
            target[part] = empty
            target[part, :width] = np.where(inside, np.take_along_axis(values, order, 1), empty)
        self._counts[part] = counts

    def _score_exactly(self, numbers: Numbers) -> None:
        """Score all entries of some lists exactly, and leave the best."""
        if not len(numbers) or self._rescore is None:
            return
        lists, rows = self.entries(numbers)
        self.replace(numbers, self._rescore(lists, rows))

    def entries(self, numbers: Numbers | None = None) -> tuple[Numbers, Numbers]:
        """Return the lists and rows of all entries, (c,) each, of all lists or some of them."""
        if numbers is None:
            numbers = np.arange(len(self._counts))
            self._compact(numbers)
        filled = np.arange(self._rows.shape[1]) < self._counts[numbers][:, None]
        return np.repeat(numbers, self._counts[numbers]), self._rows[numbers][filled]

    def replace(self, numbers: Numbers | None, scores: Floats) -> None:
        """Give the entries of :meth:`entries` their exact scores, and leave the best, in order."""
        numbers = np.arange(len(self._counts)) if numbers is None else numbers
        filled = np.arange(self._rows.shape[1]) < self._counts[numbers][:, None]
        exact, rows = np.full(filled.shape, -np.inf, np.float32), self._rows[numbers]
        exact[filled] = np.where(np.isnan(scores), -np.inf, scores)
        rows[exact == -np.inf] = NO_ROW
        order = np.lexsort((rows, -exact))
        exact, rows = np.take_along_axis(exact, order, 1), np.take_along_axis(rows, order, 1)
        kept = rows != NO_ROW
        kept[:, self.top :] = False
        self._put(numbers, kept, exact, exact, rows)
        self._limits[numbers] = np.maximum(self._limits[numbers], exact[:, self.top - 1])

    def best(self) -> tuple[Floats, Numbers]:
        """Return scores and rows, (q, top) each, best first; -inf and :data:`NO_ROW` where there are fewer.

        Of scores with bounds, after :meth:`replace`.
        """
        self._compact(np.arange(len(self._counts)))
        return self._least[:, : self.top], self._rows[:, : self.top]


def _first_limits(scores: Floats, bounds: Bounds | None) -> Floats:
    """Return limits just below each list's ``top``-th best score of its first tile."""
    if bounds is not None:
        relative = bounds.relative + _ROUNDING
        with np.errstate(invalid="ignore"):
            lowered = scores - bounds.largest() - relative * np.abs(scores)
        scores = np.where(np.isnan(lowered), -np.inf, lowered).astype(np.float32)
    return np.nextafter(scores, np.float32(-np.inf))


def lowered(limits: npt.NDArray[np.floating], bounds: Bounds) -> Floats:
    """Return what s̃ must exceed for s to be able to exceed the limits, (m,), rounded down."""
    least = limits - bounds.largest()
    relative = bounds.relative + _ROUNDING
    with np.errstate(invalid="ignore"):
        least = np.where(least > 0, least / (1 + relative), least / (1 - relative))
        least -= _ROUNDING * np.abs(least)
    least = np.where(np.isnan(least), -np.inf, least)
    return np.asarray(np.where(limits == np.inf, np.inf, least), np.float32)


Best = tuple[Floats, Numbers]


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

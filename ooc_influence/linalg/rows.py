"""Some rows of a store, each times √w: what a (weighted) Fisher matrix F = (1/m) Σ w_i g_i g_iᵀ is a sum over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ooc_influence.linalg.weights import Weighting, clipped_rows, row_weights
from ooc_influence.store import GradientStore, read_into

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class WeightedRows:
    """Some rows of a store, numbered from 0, each times √w; zero where dropped.

    Attributes
    ----------
    store : GradientStore
        The store.
    ranges : sequence of (start, stop)
        The rows, ascending.
    weights : {"ggn", "trak"} or None
        Their weights.
    tombstones : (m,) bool or None
        Which of them are dropped: looked at once, so that every pass over them multiplies the same rows.
    """

    store: GradientStore
    ranges: Sequence[tuple[int, int]]
    weights: Weighting | None = None
    tombstones: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.tombstones is None and self.store.has_dropped and self.m:
            found = np.concatenate([self.store.small("dropped", *part) for part in self._pieces()])
            object.__setattr__(self, "tombstones", found)

    @property
    def path(self) -> object:
        """Where the store is: tasks of other processes must be able to see it."""
        return self.store.path

    @property
    def m(self) -> int:
        """Rows, dropped ones included."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def live(self) -> int:
        """Rows that are not dropped."""
        return self.m - (0 if self.tombstones is None else int(self.tombstones.sum()))

    def clipped(self) -> int:
        """Return how many live rows' losses are so small that their weights are clipped."""
        if self.weights is None:
            return 0
        total = first = 0
        for start, stop in self._pieces():
            losses, last = self.store.small("loss", start, stop), first + stop - start
            if self.tombstones is not None:
                losses = losses[~self.tombstones[first:last]]
            total, first = total + clipped_rows(losses, self.weights), last
        return total

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges in pieces whose small values take little memory."""
        size = self.store.layout.group_rows
        for start, stop in self.ranges:
            for low in range(start, stop, size):
                yield low, min(stop, low + size)

    def buffer(self, rows: int) -> Rows:
        """Return room for blocks of at most ``rows`` rows, (rows, k)."""
        return np.empty((min(rows, max(1, self.m)), self.store.k), np.float32)

    def read(self, low: int, high: int, out: Rows) -> Rows:
        """Return rows ``low`` to ``high`` times √w, zero where dropped, as the first rows of ``out``."""
        first, done = 0, 0
        for start, stop in self.ranges:
            a, b = start + max(0, low - first), min(stop, start + high - first)
            first += stop - start
            if a >= b:
                continue
            part = out[done : done + b - a]
            done += b - a
            read_into(self.store, a, b, part)
            if self.weights is not None:
                part *= np.sqrt(row_weights(self.store.small("loss", a, b), self.weights))[:, None].astype(np.float32)
        if self.tombstones is not None:
            out[:done][self.tombstones[low : low + done]] = 0
        return out[:done]

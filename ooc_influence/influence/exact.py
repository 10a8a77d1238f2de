"""Scores of single pairs of a query and a train row, in float32 and in one fixed order of sums.

The score of a pair does not depend on what else is scored beside it, on threads or on blocks of rows: it is made of
sums in one order (:func:`ooc_influence.store.row_products`). It is what lists are made of, whichever product found
their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.influence.checkpoints import Marks
from ooc_influence.influence.engine import Floats, HostEngine
from ooc_influence.influence.tiles import ScoreTask, row_shares, row_weights
from ooc_influence.store import RowSpan, row_products

Numbers = npt.NDArray[np.int64]
_ROOM = 2**21  # numbers of a side gathered at a time, by all threads: fewer are slow where they wait for each other
PAIR_BYTES = 64  # of a pair: its list and row, their indices and order twice, its score
_SPAN = 2**16  # rows whose weights are read at once, for those of them that are wanted


class Pairs(NamedTuple):
    """Pairs of a list and a row, in order of rows.

    Attributes
    ----------
    rows : (u,) int64
        Each row once, ascending.
    indices, lists : (c,) int64
        Each pair's index in ``rows``, ascending, and its list.
    order : (c,) int64
        Where each pair came from.
    """

    rows: Numbers
    indices: Numbers
    lists: Numbers
    order: Numbers

    @classmethod
    def of(cls, lists: Numbers, rows: Numbers) -> Pairs:
        """Return the pairs of lists and rows, (c,) each."""
        unique, indices = np.unique(rows, return_inverse=True)
        order = np.argsort(indices, kind="stable")
        return cls(unique, indices[order], lists[order], order)

    def within(self, start: int, stop: int) -> Pairs:
        """Return the pairs of rows ``start`` to ``stop`` of :attr:`rows`, as indices from 0, in order of lists."""
        low, high = np.searchsorted(self.indices, (start, stop)).tolist()
        order = np.argsort(self.lists[low:high], kind="stable")
        parts = (part[low:high][order] for part in self[1:])
        indices, lists, origin = parts
        return Pairs(self.rows[start:stop], indices - start, lists, origin)


def exact_scores(
    engine: HostEngine,
    work: ScoreTask,
    seen: Marks | None,
    queries: Sequence[Floats],
    lists: Numbers,
    rows: Numbers,
    batch: int,
) -> Floats:
    """Return the scores of pairs, (c,).

    Parameters
    ----------
    engine : HostEngine
        Threads to work with.
    work : ScoreTask
        The train rows.
    seen : (C, n) bool or None
        Which rows each checkpoint was trained on.
    queries : sequence of (L · q, width) float32
        Of each checkpoint.
    lists, rows : (c,) int64
        Indices of lists (M, L, q), and row numbers.
    batch : int
        Rows decoded at a time.
    """
    pairs = Pairs.of(lists, rows)
    scores = np.empty(len(rows), np.float32)
    streams = [
        engine.picked(store, pairs.rows, batch, as_stored=work.as_stored(number))
        for number, store in enumerate(work.stores)
    ]
    by_norm = [work.norm_weights(number) for number in range(len(work.stores))]
    for blocks in zip(*streams, strict=True):
        part = pairs.within(blocks[0].start, blocks[0].stop)
        total = np.zeros(len(part.lists))
        for number, block in enumerate(blocks):
            products = _dots(engine, work.columns[number], queries[number], block.gradients, part)
            by_number = by_norm[number]
            squares = None if by_number is None else _squares(block.gradients, by_number)
            weights = pair_weights(engine, work, seen, number, part.rows, squares)
            if weights is not None:
                level = part.lists % len(queries[0]) * work.lambdas // len(queries[0])
                products *= weights[level % len(weights), part.indices]
            total += products
        scores[part.order] = total
    return scores


def _dots(
    engine: HostEngine, columns: Sequence[slice], queries: Floats, rows: Floats, pairs: Pairs
) -> npt.NDArray[np.float64]:
    """Return the products of pairs, (c,)."""
    products = np.empty(len(pairs.lists))
    modules, numbers = np.divmod(pairs.lists, len(queries))
    step = max(1, _ROOM // (engine.threads * max(1, rows.shape[1])))

    def work(part: slice) -> None:
        room = np.empty((2, min(step, part.stop - part.start), rows.shape[1]), np.float32)
        for start in range(part.start, part.stop, step):
            cut = slice(start, min(part.stop, start + step))
            left, right = room[:, : cut.stop - start]
            queries.take(numbers[cut], axis=0, out=left, mode="clip")  # the default mode buffers
            rows.take(pairs.indices[cut], axis=0, out=right, mode="clip")
            if len(columns) == 1:
                products[cut] = row_products(left, right)
                continue
            for module in np.unique(modules[cut]):
                mine = modules[cut] == module
                products[cut][mine] = row_products(left[mine, columns[module]], right[mine, columns[module]])

    engine.divide(work, len(products), max(1, -(-len(products) // engine.threads)))
    return products


def pair_weights(
    engine: HostEngine,
    work: ScoreTask,
    seen: Marks | None,
    number: int,
    rows: Numbers,
    squares: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.float32] | None:
    """Return what a checkpoint's scores of some rows, ascending, are multiplied by, (L or 1, b); None for one.

    ``squares`` are their squared norms, (L, b), where they are found from the rows.
    """
    if seen is None and not work.margins and work.curvatures is None:
        return None
    parts = []
    edges = [0, *(np.flatnonzero(np.diff(rows // _SPAN)) + 1).tolist(), len(rows)]
    for low, high in pairwise(edges):
        first, last = int(rows[low]), int(rows[high - 1]) + 1
        span, wanted = RowSpan(first, last, None, None), rows[low:high] - first
        shares = row_shares(work, seen, first, last)
        if squares is None:
            weights = row_weights(engine, work, shares, number, span)
            parts.append(None if weights is None else weights[:, wanted])
        else:  # of these rows, not of all between them
            shares = None if shares is None else shares[:, wanted]
            parts.append(row_weights(engine, work, shares, number, span, squares[:, low:high]))
    return np.concatenate([part for part in parts if part is not None], axis=1)


def _squares(rows: Floats, weights: Floats) -> npt.NDArray[np.float64]:
    """Return the sums of squares of rows (b, k), weighted by each of (L, k), (L, b)."""
    squares = np.empty((len(weights), len(rows)))
    step = max(1, _ROOM // max(1, 2 * rows.shape[1]))
    for start in range(0, len(rows), step):
        part = np.square(rows[start : start + step], dtype=np.float64)
        for number, each in enumerate(weights):
            squares[number, start : start + step] = np.multiply(part, each).sum(axis=1)
    return squares

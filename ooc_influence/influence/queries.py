"""What stands on the query side: every row of the query store, or means of them.

A score is linear in the query, so the influence on the mean of some queries' losses is that of their mean gradient:
one left-hand row instead of many, read in bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.influence.aggregate import Grouping, parse_groups, weighted_sums
from ooc_influence.memory import block_limit
from ooc_influence.store import GradientStore, read_blocks

Factors = Callable[[int, int], npt.NDArray[np.float64]]
_BLOCK_ROWS = 1024  # rows read at a time where they are averaged


@dataclass(frozen=True, eq=False)
class Queries:
    """Rows of query stores, or their means.

    Attributes
    ----------
    names : (q,)
        Ids of the rows, or the names of the groups they are averaged in.
    groups : Grouping or None
        Those groups; None for every row by itself.
    """

    names: npt.NDArray[Any]
    groups: Grouping | None

    @classmethod
    def of(cls, store: GradientStore, average: bool | str) -> Queries:
        """Return every row of ``store``, the mean of all (True), or a mean for each value of a column (its name).

        Raises
        ------
        InputError
            If there is no such column.
        """
        if average is False:
            return cls(store.ids(), None)
        if average is True:
            return cls(np.array(["mean"]), Grouping(np.array(["mean"]), np.zeros(store.n, np.int64)))
        if not isinstance(average, str):
            raise InputError(f"expected average_queries True, False or a column's name; received {average!r}")
        groups = parse_groups(average, store)
        return cls(groups.names, groups)

    @classmethod
    def none(cls) -> Queries:
        """Return no queries."""
        return cls(np.empty(0), None)

    def __len__(self) -> int:
        return len(self.names)

    def reading_bytes(self, store: GradientStore) -> int:
        """Return what :meth:`read` holds beside what it returns and its double."""
        if self.groups is None:
            return store.reading_bytes
        return store.reading_bytes + 2 * 4 * store.k * min(_BLOCK_ROWS, block_limit(store.k), store.n)

    def read(
        self, store: GradientStore, start: int, stop: int, factors: Factors | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return gradients ``start`` to ``stop``, (stop - start, k), and which of them are of dropped rows only.

        ``factors`` gives what rows of the store are multiplied by, before they are averaged.
        """
        if self.groups is None:
            dropped = store.small("dropped", start, stop) if store.has_dropped else np.zeros(stop - start, bool)
            rows = store.rows(start, stop)
            return rows if factors is None else rows * factors(start, stop)[:, None], dropped
        sums, counts = np.zeros((stop - start, store.k)), np.zeros(stop - start)
        for block in read_blocks(store, 0, store.n, min(_BLOCK_ROWS, block_limit(store.k))):
            codes = self.groups.codes[block.start : block.stop] - start
            inside = (codes >= 0) & (codes < stop - start)
            if block.dropped is not None:
                inside &= ~block.dropped
            weights = np.where(inside, 1 if factors is None else factors(block.start, block.stop), 0)
            found, part = weighted_sums(block.gradients, codes, weights.astype(np.float32))
            sums[found] += part
            counts += np.bincount(codes[inside], minlength=stop - start)
        return sums / np.maximum(counts, 1)[:, None], counts == 0

"""The store an extraction writes: created once the first batch worked, claimed, filled row by row, resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, MismatchError
from ooc_influence.extract.batching import Batching, Sharding
from ooc_influence.extract.metadata import RowMetadata
from ooc_influence.extract.plan import Plan, open_existing
from ooc_influence.store import GradientStore, PathLike, check_finite

Floats = npt.NDArray[np.float32]


class Target:
    """One writer's rows of a store, ``start`` to ``stop``.

    Attributes
    ----------
    store : GradientStore or None
        None until the first batch has been computed, where there was none before.
    start : int
        First row of this writer.
    stop : int or None
        Row behind its last one; None for a store that grows.
    """

    def __init__(
        self, path: PathLike, plan: Plan, metadata: RowMetadata, batching: Batching, sharding: Sharding | None
    ) -> None:
        self._path, self._plan, self._metadata = path, plan, metadata
        self._first_row, self._sharding = batching.first_row, sharding
        if sharding is not None and batching.first_row:
            raise InputError(f"expected first_row 0 with sharding; received {batching.first_row}: rows are fixed there")
        self.start, self.stop = batching.first_row, None
        self.store = open_existing(path, plan)
        if sharding is not None:
            group_rows = plan.group_rows if self.store is None else self.store.layout.group_rows
            self.start, self.stop = sharding.range(group_rows)
        if self.store is not None:
            self._claim(self.store)
        elif sharding is None:
            self._check_gap(0)

    def _claim(self, store: GradientStore) -> None:
        start, stop = (0, None) if self._sharding is None else (self.start, self.stop)
        writer = store.writer(start, stop)
        try:
            self._check_gap(writer.next_row)
        except InputError:
            store.close()
            raise

    def _check_gap(self, committed: int) -> None:
        if committed < self.start:
            raise InputError(
                f"expected first_row <= {committed}, the rows committed in {self._path}; received {self.start}: rows "
                "are appended without a gap"
            )

    @property
    def next_row(self) -> int:
        """Number of the next row to be written."""
        return self.start if self.store is None else self.store.writer().next_row

    def own(self, row: int, count: int) -> int:
        """Return how many of ``count`` rows from ``row`` on are this writer's."""
        last = row + count if self.stop is None else min(row + count, self.stop)
        return max(0, last - max(row, self.start))

    def take(self, batch: Any, row: int, losses: Floats, rows: Floats) -> None:
        """Append what of a batch is new and this writer's; ``row`` is the store row of its first sample.

        Raises
        ------
        NonFiniteError
            For NaN or Inf in what would be appended.
        MismatchError
            If rows that are committed already have other losses in the store.
        """
        small = self._metadata.take(batch, row - self._first_row, len(losses))
        low = max(0, self.next_row - row)
        high = len(losses) if self.stop is None else min(len(losses), self.stop - row)
        ids = small.pop("example_id", None)
        if self.store is None:
            check_finite(row + low, rows[low:high], losses[low:high], ids[low:high] if ids else None)
            self._create(small if ids is None else {"example_id": ids, **small})
            low = max(0, self.next_row - row)  # another process may have made the store, and filled it, meanwhile
        assert self.store is not None
        self.check_same_data(batch, row, losses, min(low, len(losses)))
        if low < high:
            columns = {name.removeprefix("columns/"): values[low:high] for name, values in small.items()}
            self.store.append(
                rows[low:high], loss=losses[low:high], ids=ids[low:high] if ids else None, columns=columns
            )

    def _create(self, small: Mapping[str, list[Any]]) -> None:
        dtypes = {name.removeprefix("columns/"): dtype for name, dtype in self._metadata.dtypes(small).items()}
        plan = self._plan
        GradientStore.create(
            self._path,
            plan.mask,
            dtype=plan.dtype,
            storage=plan.storage,
            planned_rows=plan.planned_rows,
            ids=dtypes.pop("example_id", None),
            columns=dtypes,
            attributes=plan.attributes,
            exist_ok=True,  # another writer may have been first: open_existing checks that it is the same store
        )
        store = open_existing(self._path, plan)
        assert store is not None
        self._claim(store)
        self.store = store

    def check_same_data(self, batch: Any, row: int, losses: Floats, count: int | None = None) -> None:
        """Compare losses (b,) of a batch, and ids, with those stored for its first ``count`` rows (default all).

        Raises
        ------
        MismatchError
            If they differ: the data or its order changed since.
        """
        low, high = max(row, self.start), row + (len(losses) if count is None else count)
        if self.store is None or low >= high or self.store.n < high:
            return
        stored = self.store.small("loss", low, high)
        if not np.allclose(stored, losses[low - row : high - row], rtol=1e-2, atol=1e-6):
            raise MismatchError(
                f"expected rows {low}-{high} to have the losses stored in {self.store.path}; received others: the "
                "batches or their order changed since; extract to another path"
            )

        ids = self._metadata.take(batch, row - self._first_row, len(losses)).get("example_id")
        if ids is not None and self.store.ids(np.arange(low, high)).tolist() != ids[low - row : high - row]:
            raise MismatchError(
                f"expected rows {low}-{high} to have the ids stored in {self.store.path}; received others: the ids or "
                "their order changed since; extract to another path"
            )

    def close(self) -> None:
        """Commit what is finished and let others write."""
        if self.store is not None:
            self.store.close()

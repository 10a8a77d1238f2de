"""The store an extraction writes: created once the first batch worked, claimed, filled row by row, resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.compress import RetainedEnergy, basis_weights
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.extract.batching import Batching, Shard
from ooc_influence.extract.metadata import RowMetadata
from ooc_influence.extract.plan import Plan, open_existing
from ooc_influence.store import (
    GradientStore,
    PathLike,
    Storage,
    StoredReduction,
    check_finite,
    mark_dropped,
    missing_spans,
)

logger = logging.getLogger("ooc_influence")
Floats = npt.NDArray[np.float32]
_SKIPPED = np.finfo(np.float32).max  # the norm of a row that was not finite
OnNonFinite = Literal["raise", "skip"]


class Computed(NamedTuple):
    """What is computed of some samples, on the host.

    Attributes
    ----------
    losses : (b,) float32
        Per-sample losses.
    rows : (b, k) float32
        What is stored of their gradients.
    norms : (b,) float32
        Norms of the masked gradients, before any reduction.
    """

    losses: Floats
    rows: Floats
    norms: Floats

    @classmethod
    def empty(cls, rows: int, k: int) -> Computed:
        """Return room for ``rows`` rows of ``k`` numbers."""
        return cls(np.empty(rows, np.float32), np.empty((rows, k), np.float32), np.empty(rows, np.float32))

    def put(self, places: npt.NDArray[np.int64], found: Computed) -> None:
        """Write what was found at ``places``; those outside are left out."""
        inside = (places >= 0) & (places < len(self.losses))
        for mine, values in zip(self, found, strict=True):
            mine[places[inside]] = values[inside]

    def part(self, low: int, high: int) -> Computed:
        """Return samples ``low`` to ``high``."""
        return Computed(*(values[low:high] for values in self))


class Sink:
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
        self,
        path: PathLike,
        plan: Plan,
        metadata: RowMetadata,
        batching: Batching,
        shard: Shard | None,
        total: int | None,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise InputError(f"expected on_nonfinite 'raise' or 'skip'; received {on_nonfinite!r}")
        self._skip, self._share = on_nonfinite == "skip", RetainedEnergy()
        self._path, self._plan, self._metadata = path, plan, metadata
        self._first_row, self._shard, self._total = batching.first_row, shard, total
        self.start: int = batching.first_row
        self.stop: int | None = None
        self.store = open_existing(path, plan)
        if self.store is not None:
            self._claim(self.store)
        elif shard is not None:
            if total is None:
                raise InputError(
                    f"expected a store at {path} for several writers, since the number of samples is not known; "
                    "received none: make it with init_store ('ooc-influence init') and give the rows"
                )
            self._set_range(total, self._layout_sizes(total))
        else:
            self._check_gap(0)

    def _layout_sizes(self, rows: int) -> int:
        """Return the rows of a group, in a store that is still to be made for several writers."""
        chunk_rows, group_chunks = self._storage(rows).sizes(self._plan.k, self._plan.dtype, rows)
        return chunk_rows * group_chunks

    def _storage(self, rows: int | None) -> Storage:
        """Return the chunking to make a store with: groups small enough that every writer gets a share."""
        storage = self._plan.storage
        if self._shard is None or rows is None:
            return storage
        chunk_rows, group_chunks = storage.sizes(self._plan.k, self._plan.dtype, rows)
        share = -(-rows // chunk_rows) // self._shard.count
        return replace(storage, group_chunks=max(1, min(group_chunks, share)))

    def _set_range(self, planned: int, group_rows: int) -> None:
        self.start, self.stop = (self._shard or Shard(0, 1)).range(planned, group_rows)
        if self._first_row:
            raise InputError(
                f"expected first_row 0 for a store with planned rows; received {self._first_row}: rows are fixed there"
            )
        if self._total is not None and self._total != planned:
            raise InputError(
                f"expected {planned} samples, the rows planned for {self._path}; received batches with {self._total}: "
                "init_store ('ooc-influence init') with more rows makes room"
            )

    def _claim(self, store: GradientStore) -> None:
        planned = store.layout.planned_rows
        if planned is not None:
            self._set_range(planned, store.layout.group_rows)
            if self.start == self.stop:
                return  # more writers than groups of rows: nothing for this one
            writer = store.writer(self.start, self.stop)
        elif self._shard is not None:
            raise InputError(
                f"expected a store with planned rows at {self._path} for shard={self._shard.index, self._shard.count}; "
                "received one that grows by itself: make one with init_store ('ooc-influence init')"
            )
        else:
            writer = store.writer()
        self._decide_again(store)
        try:
            self._check_gap(writer.next_row)
        except InputError:
            store.close()
            raise

    def _decide_again(self, store: GradientStore) -> None:
        """Unmark rows that a run skipped which was killed before it committed them: their samples may be others now."""
        size, missing = store.layout.group_rows, missing_spans(store.records, store.layout, self.start, self.stop)
        for group in sorted(store.dropped_groups()) if missing else ():
            rows = slice(group * size, min((group + 1) * size, store.stored_rows))
            numbers = rows.start + np.flatnonzero(store.read("dropped", rows))
            numbers = numbers[
                [any(a <= row and (b is None or row < b) for a, b in missing) for row in numbers.tolist()]
            ]
            if numbers.size:
                numbers = numbers[store.read("grad_norm", rows)[numbers - rows.start] == _SKIPPED]
            if numbers.size:
                mark_dropped(store.path, store.layout, numbers, dropped=False)
                store.reload()

    def _check_gap(self, committed: int) -> None:
        if committed < self.start:
            raise InputError(
                f"expected first_row <= {committed}, the rows committed in {self._path}; received {self.start}: rows "
                "are appended without a gap"
            )

    @property
    def next_row(self) -> int:
        """Number of the next row to be written: the first that is missing."""
        if self.store is None or self.start == self.stop:
            return self.start
        return self.store.writer(self.start, self.stop).next_row

    @property
    def finished(self) -> bool:
        """Whether nothing is missing of a range that has an end."""
        return self.store is not None and self.stop is not None and self.next_row >= self.stop

    def own(self, row: int, count: int) -> int:
        """Return how many of ``count`` rows from ``row`` on are this writer's."""
        last = row + count if self.stop is None else min(row + count, self.stop)
        return max(0, last - max(row, self.start))

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the disk."""
        return 0.0 if self.store is None else self.store.waited

    def record(self, **attributes: Any) -> None:
        """Record something in the store's attributes, where this is its only writer."""
        if self.store is not None and self._shard is None:
            self.store.record(**attributes)

    def verified(self, facts: Mapping[str, Any]) -> None:
        """Record what the check of the gathered entries found; of several writers, the first does."""
        recorded = {**(self._plan.attributes.get("verification") or {}), **facts}
        self._plan.attributes["verification"] = recorded
        if self.store is not None and (self._shard is None or self._shard.index == 0):
            self.store.record(verification=recorded)

    def take(self, batch: Any, row: int, found: Computed) -> None:
        """Append what of a batch is new and this writer's; ``row`` is the store row of its first sample.

        Raises
        ------
        NonFiniteError
            For NaN or Inf in what would be appended.
        MismatchError
            If rows that are committed already have other losses in the store.
        """
        count = len(found.losses)
        small = self._metadata.take(batch, row - self._first_row, count)
        end = row + count if self.stop is None else min(row + count, self.stop)
        if self._skip:
            found = self._without_nonfinite(found)
        if self.store is None:
            low = max(0, self.next_row - row)
            new, ids = found.part(low, end - row), small.get("example_id")
            check_finite(row + low, new.rows, new.losses, ids[low : end - row] if ids else None)
            self._create(small)
        assert self.store is not None
        self.check_same_data(batch, row, found.losses, min(max(0, self.next_row - row), count))
        while self.next_row < end:  # more than once where a repair left several gaps
            low = max(0, self.next_row - row)
            high = end - row
            room = self.store.writer().room
            if room is not None:
                high = min(high, low + room)
            self._append({name: values[low:high] for name, values in small.items()}, found.part(low, high))

    def _append(self, small: Mapping[str, list[Any]], new: Computed) -> None:
        assert self.store is not None
        values = {name.removeprefix("columns/"): found for name, found in small.items()}
        ids = values.pop("example_id", None)
        skipped, first = new.norms == _SKIPPED, self.next_row
        self.store.append(new.rows, loss=new.losses, grad_norm=new.norms, ids=ids, columns=values, dropped=skipped)
        if skipped.any():
            logger.warning("rows %s are not finite: dropped", (first + np.flatnonzero(skipped)).tolist())
        if isinstance(self._plan.reduction, StoredReduction):
            weights = basis_weights(self._plan.attributes, self._plan.reduction.facts)
            self._share = self._share.plus(RetainedEnergy.of(new.rows, new.norms, new.losses, ~skipped, weights))

    def _without_nonfinite(self, found: Computed) -> Computed:
        """Return rows with zeros for those that are not finite, which their norm tells."""
        bad = ~(np.isfinite(found.losses) & np.isfinite(found.norms) & np.isfinite(found.rows).all(axis=1))
        if not bad.any():
            return found
        return Computed(
            np.where(bad, 0, found.losses).astype(np.float32),
            np.where(bad[:, None], 0, found.rows).astype(np.float32),
            np.where(bad, _SKIPPED, found.norms).astype(np.float32),
        )

    def _drop_skipped(self) -> None:
        """Drop the rows that were not finite in a run of an earlier version, killed before it could mark them."""
        store = self.store
        if store is None or not self._skip:
            return
        store.reload()
        for start in range(0, store.n, store.layout.group_rows):
            stop = min(store.n, start + store.layout.group_rows)
            bad = (store.small("grad_norm", start, stop) == _SKIPPED) & ~store.small("dropped", start, stop)
            if bad.any():
                store.drop(start + np.flatnonzero(bad))
                logger.warning("rows %s are not finite: dropped", (start + np.flatnonzero(bad)).tolist())

    def _create(self, small: Mapping[str, list[Any]]) -> None:
        dtypes = {name.removeprefix("columns/"): dtype for name, dtype in self._metadata.dtypes(small).items()}
        plan = self._plan
        GradientStore.create(
            self._path,
            plan.mask,
            storage=self._storage(self._total),
            planned_rows=self._total if self._shard is not None else None,
            ids=dtypes.pop("example_id", None),
            columns=dtypes,
            exist_ok=True,  # another writer may have been first: open_existing checks that it is the same store
            **plan.create_options,
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
        losses = np.where(np.isfinite(losses), losses, 0)  # as rows that were skipped have
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
        """Commit what is finished, and let others write."""
        if self.store is not None:
            self.store.close()
            self._drop_skipped()
            if self._shard is None:  # several writers would write over each other's
                self._share.record(self.store)

"""The extraction loop: batches in, committed rows out, resumable at any point.

The plan is the caller's batches in their order. A resumed run passes over batches whose rows are committed; the batch
that straddles the boundary is computed whole and its committed rows thrown away, so that the rows equal an
uninterrupted run's bit for bit on the same machine.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ooc_influence.compress import Dropout
from ooc_influence.errors import (
    InputError,
    MismatchError,
    OocInfluenceWarning,
)
from ooc_influence.extract.batching import (
    Batches,
    Batching,
    RowSource,
    Sharding,
    batch_size,
    count_rows,
    open_batches,
    row_values,
    to_device,
)
from ooc_influence.extract.layers import ModuleSelection
from ooc_influence.extract.plan import Plan, make_plan, open_existing, parse_device
from ooc_influence.extract.taps import GradientTaps, PerSampleLoss, tapped
from ooc_influence.progress import Progress
from ooc_influence.store import GradientStore, PathLike, Storage, column_dtype

logger = logging.getLogger("ooc_influence")


@dataclass(frozen=True)
class _RowMetadata:
    """Where a row's id and columns come from."""

    ids: RowSource | None
    columns: Mapping[str, RowSource]

    def take(self, batch: Any, first: int, count: int) -> dict[str, list[Any]]:
        """Return the values of a batch's rows by array path; ``first`` counts from the first sample given."""
        named = {} if self.ids is None else {"example_id": self.ids}
        named |= {f"columns/{name}": source for name, source in self.columns.items()}
        return {name: row_values(source, name, batch, first, count) for name, source in named.items()}


def extract_gradients(
    model: torch.nn.Module,
    per_sample_loss: PerSampleLoss,
    batches: Batches,
    store: PathLike,
    *,
    compressor: Dropout | None = None,
    like: GradientStore | PathLike | None = None,
    modules: ModuleSelection = None,
    dtype: str = "float16",
    device: torch.device | str | None = None,
    ids: RowSource | None = None,
    columns: Mapping[str, RowSource] | None = None,
    loss_kind: str | None = None,
    batching: Batching | None = None,
    storage: Storage | None = None,
    sharding: Sharding | None = None,
    progress: bool | None = None,
) -> GradientStore:
    """Extract compressed per-sample gradients of a model into a store on disk, or go on where a run stopped.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model. It is put in evaluation mode meanwhile and comes back as it was.
    per_sample_loss : callable (model, batch) -> (b,) tensor
        The loss of each sample. Sample s of a batch must be at place s of axis 0 in every tapped layer.
    batches : iterable, or callable start_row -> iterable
        Batches in a fixed order (a DataLoader without shuffling). Tensors, tuples, dicts and objects with ``.to`` are
        moved to the device. A callable is given the number of samples already done and returns the batches after them.
    store : path
        The store to write. A store of the same run is continued: its finished rows are not computed again.
    compressor : Dropout, optional
        What to keep of each gradient; default ``Dropout()``.
    like : GradientStore or path, optional
        A train store whose mask to use instead: makes a query store. The model must be the same.
    modules : str, sequence of str, callable, optional
        Layers to tap: name patterns or a predicate ``(name, module) -> bool``; default every supported layer.
    dtype : {"float16", "bfloat16", "float32"}
        Representation on disk; float16 has a float32 scale a row.
    device : torch.device or str, optional
        Where to run; default where the model is.
    ids : sequence or callable, optional
        An id (str or int) for each sample: indexed by sample number, or ``batch -> sequence``.
    columns : mapping of str to sequence or callable, optional
        Further per-row values (bool, int, float, str), given like ``ids``.
    loss_kind : str, optional
        Which loss it is, recorded: ``"cross_entropy"`` for one-label cross-entropy; row weights need to know.
    batching : Batching, optional
        Where the samples go in the store; checks.
    storage : Storage, optional
        Chunking.
    sharding : Sharding, optional
        This process is one of several that fill the store together.
    progress : bool, optional
        Show a progress line; silent by default.

    Returns
    -------
    GradientStore
        Open for reading; (n, k).

    Raises
    ------
    InputError
        For an empty data set, a loss of the wrong shape, k larger than p, ids or columns that do not match.
    UnsupportedModelError
        If no layer can be tapped, or samples of a batch influence each other.
    NonFiniteError
        For NaN or Inf in a loss or gradient; what came before is committed.
    MismatchError
        If ``store`` or ``like`` belongs to another mask, model or setting.
    StoreBusyError
        If another process writes the same range.
    StoreWriteError
        If the disk refuses; a later run goes on from the last commit.
    """
    batching, storage = batching or Batching(), storage or Storage()
    target = parse_device(model, device)
    plan = make_plan(model, compressor, like, modules, dtype, loss_kind, storage, sharding)
    metadata = _RowMetadata(ids, columns or {})
    opened = open_existing(store, plan)
    job = _Extraction(store, plan, metadata, batching, sharding, opened)
    try:
        with (
            tapped(model, plan.mask, target) as taps,
            Progress("extract", _total(batches, sharding), progress) as bar,
        ):
            job.run(taps, model, per_sample_loss, batches, target, bar)
    finally:
        job.close()
    return GradientStore.open(store)


def _total(batches: Batches, sharding: Sharding | None) -> int | None:
    return count_rows(batches) if sharding is None else sharding.rows // sharding.count


class _Extraction:
    """One call's way through the batches."""

    def __init__(
        self,
        path: PathLike,
        plan: Plan,
        metadata: _RowMetadata,
        batching: Batching,
        sharding: Sharding | None,
        store: GradientStore | None,
    ) -> None:
        self._path, self._plan, self._metadata = path, plan, metadata
        self._batching, self._sharding = batching, sharding
        self._store = store
        self._start, self._stop = batching.first_row, None
        if sharding is not None:
            group_rows = plan.storage.rows_for(plan.mask.k, plan.dtype) * plan.storage.group_chunks  # type: ignore[arg-type]
            self._start, self._stop = sharding.range(group_rows)
        if store is not None:
            self._claim(store)
        elif sharding is None:
            self._check_gap(0)

    def _claim(self, store: GradientStore) -> None:
        start, stop = (0, None) if self._sharding is None else (self._start, self._stop)
        writer = store.writer(start, stop)
        try:
            self._check_gap(writer.next_row)
        except InputError:
            store.close()
            raise

    def _check_gap(self, committed: int) -> None:
        if committed < self._start:
            raise InputError(
                f"expected first_row <= {committed}, the rows committed in {self._path}; received {self._start}: rows "
                "are appended without a gap"
            )

    @property
    def _next_row(self) -> int:
        return self._start if self._store is None else self._store.writer().next_row

    def run(
        self,
        taps: GradientTaps,
        model: torch.nn.Module,
        per_sample_loss: PerSampleLoss,
        batches: Batches,
        device: torch.device,
        bar: Progress,
    ) -> None:
        """Read the batches to their end, or to the end of this writer's range."""
        first_row = self._batching.first_row
        row, source = open_batches(batches, first_row, self._next_row)
        bar.advance(row - first_row)
        computed = 0
        for batch in source:
            if self._stop is not None and row >= self._stop:
                break
            size = batch_size(batch)
            if size is not None and row + size <= self._next_row:
                row += size
                bar.advance(size)
                continue
            probe = self._batching.check_independence and computed == 0
            losses, rows = taps.rows(model, per_sample_loss, to_device(batch, device), size=size, probe=probe)
            if computed == 0 and taps.silent:
                _warn_silent(taps.silent)
            self._take(batch, row, losses.float().cpu().numpy(), rows.cpu().numpy())
            row += len(losses)
            computed += len(losses)
            bar.advance(len(losses))
        if self._store is None:
            raise InputError("expected batches with samples; received none: the data set is empty")
        if self._stop is not None and row < self._stop and self._next_row < self._stop:
            raise InputError(
                f"expected samples for rows up to {self._stop}; received {row}: batches must cover the whole data set"
            )

    def _take(self, batch: Any, row: int, losses: npt.NDArray[np.float32], rows: npt.NDArray[np.float32]) -> None:
        """Append what of a batch is new and in range; ``row`` is the store row of its first sample."""
        small: dict[str, Any] = dict(self._metadata.take(batch, row - self._batching.first_row, len(losses)))
        if self._store is None:
            self._create(small)
        assert self._store is not None
        low = self._next_row - row
        high = len(losses) if self._stop is None else min(len(losses), self._stop - row)
        self._check_same_data(self._store, row, losses[: max(0, low)])
        if low >= high:
            return
        ids = small.pop("example_id", None)
        columns = {name.removeprefix("columns/"): values[low:high] for name, values in small.items()}
        self._store.append(
            rows[low:high],
            loss=losses[low:high],
            ids=ids[low:high] if ids is not None else None,
            columns=columns,
        )

    def _create(self, small: Mapping[str, Any]) -> None:
        """Create the store once the first batch has shown that everything works, and what types columns have."""
        dtypes = {name.removeprefix("columns/"): column_dtype(values) for name, values in small.items()}
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
        self._store = store

    def _check_same_data(self, store: GradientStore, row: int, losses: npt.NDArray[np.float32]) -> None:
        """Compare the recomputed losses of committed rows with the stored ones: the data must not have changed."""
        low = max(row, self._start)
        if not len(losses) or store.n < row + len(losses):
            return
        stored = store.small("loss", low, row + len(losses))
        if not np.allclose(stored, losses[low - row :], rtol=1e-2, atol=1e-4):
            raise MismatchError(
                f"expected rows {low}-{row + len(losses)} to have the losses stored in {store.path}; received others: "
                "the batches or their order changed since; extract to another path"
            )

    def close(self) -> None:
        """Commit what is finished and let others write."""
        if self._store is not None:
            self._store.close()
            logger.info("%d rows committed in %s; run again to go on", self._store.committed, self._path)


def _warn_silent(names: set[str]) -> None:
    named = ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    warnings.warn(
        f"no gradient reached these layers in the first batch, their entries are zero there: {named}",
        OocInfluenceWarning,
        stacklevel=4,
    )

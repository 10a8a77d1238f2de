"""The extraction loop: batches in, committed rows out, resumable at any point.

The plan is the caller's batches in their order. A resumed run passes over batches whose rows are committed; the batch
that straddles the boundary is computed whole and its committed rows thrown away, so that the rows equal an
uninterrupted run's bit for bit on the same machine.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ooc_influence.compress import Dropout
from ooc_influence.errors import InputError, OocInfluenceWarning
from ooc_influence.extract.batching import (
    Batches,
    Batching,
    Shard,
    batch_size,
    count_rows,
    open_batches,
    to_device,
)
from ooc_influence.extract.layers import ModuleSelection
from ooc_influence.extract.metadata import RowMetadata, RowSource
from ooc_influence.extract.plan import make_plan, parse_device
from ooc_influence.extract.rows import RowGatherer
from ooc_influence.extract.taps import PerSampleLoss, Taps, tapped
from ooc_influence.extract.target import Target
from ooc_influence.progress import Progress
from ooc_influence.store import GradientStore, PathLike, Storage

logger = logging.getLogger("ooc_influence")


def extract_gradients(
    model: torch.nn.Module,
    per_sample_loss: PerSampleLoss,
    batches: Batches,
    store: PathLike,
    *,
    compressor: Dropout | None = None,
    like: GradientStore | PathLike | None = None,
    modules: ModuleSelection = None,
    fallback: bool = False,
    dtype: str = "float16",
    device: torch.device | str | None = None,
    ids: RowSource | None = None,
    columns: Mapping[str, RowSource] | None = None,
    loss_kind: str | None = None,
    batching: Batching | None = None,
    storage: Storage | None = None,
    shard: tuple[int, int] | None = None,
    check_model: bool = True,
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
        The store to write: a folder, or an fsspec URL. A store of the same run is continued: its finished rows are not
        computed again.
    compressor : Dropout, optional
        What to keep of each gradient; default ``Dropout()``.
    like : GradientStore or path, optional
        A train store whose mask to use instead: makes a query store. The model must be the same.
    modules : str, sequence of str, callable, optional
        Layers to tap: name patterns or a predicate ``(name, module) -> bool``; default every supported layer, or those
        that are trained where the others are frozen.
    fallback : bool
        Tap selected layers of unknown kinds too, through ``torch.func``, at the cost of their full gradients.
    dtype : {"float16", "bfloat16", "float32", "int8", "int4"}
        Representation on disk; float16, int8 and int4 have a float32 scale a row.
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
        Chunking and codec.
    shard : (int, int), optional
        This process is writer i of N (from 0) that fill one store together, on one machine or several that see the same
        folder or object store. The number of rows has to be known: from the batches, or from :func:`init_store`. A
        writer whose share is finished does nothing.
    check_model : bool
        Refuse another model than the one ``store`` or ``like`` was made with; False warns and records it instead.
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
        For NaN or Inf in a loss or gradient; the batches before it are committed.
    MismatchError
        If ``store`` or ``like`` belongs to another mask, model or setting.
    StoreBusyError
        If another process writes the same range.
    StoreWriteError
        If the disk refuses; a later run goes on from the last commit.
    """
    batching = batching or Batching()
    device = parse_device(model, device)
    plan = make_plan(
        model, compressor, like, modules, fallback, dtype, loss_kind, storage, store, check_model=check_model
    )
    total = count_rows(batches)
    metadata = RowMetadata.of(ids, columns)
    metadata.check_length(total)
    metadata.check_ids()
    target = Target(store, plan, metadata, batching, Shard.parse(shard), total)
    if target.finished:
        target.close()
        return GradientStore.open(store)
    layers = [module.layer for module in plan.mask.modules]
    try:
        with (
            tapped(model, layers, device, skip=plan.mask.empty_modules, probe=batching.check_independence) as taps,
            Progress("extract", total if target.stop is None else target.own(0, target.stop), progress) as bar,
        ):
            gatherer = RowGatherer(plan.mask, device)
            _Run(target, taps, gatherer, per_sample_loss, device, bar).read(batches, batching.first_row)
    finally:
        target.close()
        logger.info("%s: finished rows are committed", store)
    return GradientStore.open(store)


class _Run:
    """One way through the batches."""

    def __init__(
        self,
        target: Target,
        taps: Taps,
        gatherer: RowGatherer,
        per_sample_loss: PerSampleLoss,
        device: torch.device,
        bar: Progress,
    ) -> None:
        self._target, self._taps, self._gatherer, self._loss = target, taps, gatherer, per_sample_loss
        self._device, self._bar = device, bar
        self._sizes_hold: bool | None = None  # whether a batch's first tensor tells its size; known after one batch

    def read(self, batches: Batches, first_row: int) -> None:
        """Read the batches to their end, or to the end of this writer's range.

        Raises
        ------
        InputError
            If there are none, or too few for the range.
        """
        target = self._target
        row, source = open_batches(batches, first_row, target.next_row)
        self._bar.advance(target.own(first_row, row - first_row))
        for batch in source:
            if target.stop is not None and row >= target.stop:
                break
            count = self._one(batch, row)
            self._bar.advance(target.own(row, count))
            row += count
        if target.store is None:
            raise InputError("expected batches with samples; received none: the data set is empty")
        if target.stop is not None and target.next_row < target.stop:
            raise InputError(
                f"expected samples for rows up to {target.stop}; received {row}: batches must cover the whole data set"
            )

    def _one(self, batch: Any, row: int) -> int:
        """Pass over a batch, or compute it and store its rows; return its number of samples.

        The first batch is always looked at: its losses show whether the data is still the same.
        """
        size = None if self._sizes_hold is False else batch_size(batch)
        done = size is not None and row + size <= self._target.next_row
        if done and self._sizes_hold:
            return size or 0
        moved = to_device(batch, self._device)
        look = done or (size is None and row < self._target.next_row)
        losses = self._taps.losses(self._loss, moved) if look else None
        if losses is not None and row + len(losses) <= self._target.next_row:
            self._target.check_same_data(batch, row, losses.float().cpu().numpy())
        else:
            losses, rows = self._gatherer(self._taps, self._loss, moved)
            self._check_size(size, len(losses))
            if self._taps.silent:
                self._warn_silent()
            self._target.take(batch, row, losses.float().cpu().numpy(), rows.cpu().numpy())
        self._sizes_hold = size == len(losses)
        return len(losses)

    def _check_size(self, size: int | None, count: int) -> None:
        if self._sizes_hold and size != count:
            raise InputError(
                f"expected one loss for each of the batch's {size} samples; received {count}: "
                "the first tensor of a batch must have one entry a sample on axis 0"
            )

    def _warn_silent(self) -> None:
        """Say, once, which tapped layers the first computed batch did not reach; all of them is an error."""
        names = sorted(name or "(the model)" for name in self._taps.silent)
        if self._taps.all_silent:
            raise InputError(
                "expected the loss to use the layers of the model given; received one that reaches none of them: is "
                "per_sample_loss calling another model?"
            )
        self._taps.silent.clear()
        named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warnings.warn(
            f"no gradient reached these layers in the first batch, their entries are zero there: {named}",
            OocInfluenceWarning,
            stacklevel=5,
        )

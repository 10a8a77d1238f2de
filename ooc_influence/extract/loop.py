"""The extraction: plan, pilot, target and run put together; resumable at any point.

The plan is the caller's batches in their order. A resumed run passes over batches whose rows are committed; the batch
that straddles the boundary is computed whole and its committed rows thrown away, so that the rows equal an
uninterrupted run's bit for bit on the same machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ooc_influence.compress import Compressor, Dropout, Identity, fit_eigenbasis
from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError
from ooc_influence.extract.batching import Batches, Batching, BudgetBatches, Shard, count_rows
from ooc_influence.extract.check import LayersDisagreeError
from ooc_influence.extract.layers import warn_if_training
from ooc_influence.extract.metadata import RowMetadata, RowSource
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.pilot import PilotData, pilot_path
from ooc_influence.extract.plan import Plan, Settings, make_plan, parse_device, with_metric
from ooc_influence.extract.run import BatchRun, BudgetRun, RowGatherer
from ooc_influence.extract.selection import Adjustments, ModuleSelection
from ooc_influence.extract.sink import OnNonFinite, Sink
from ooc_influence.extract.tapping import tapped
from ooc_influence.extract.taps import PerSampleLoss
from ooc_influence.progress import Progress
from ooc_influence.store import (
    GradientStore,
    LayerShape,
    LograReduction,
    PathLike,
    Storage,
    StorePath,
    exists,
    parse_path,
    remove_tree,
)

logger = logging.getLogger("ooc_influence")


def extract_gradients(
    model: torch.nn.Module,
    per_sample_loss: PerSampleLoss,
    batches: Batches | BudgetBatches,
    store: PathLike,
    *,
    compressor: Compressor | Callable[[int], Compressor] | None = None,
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
    pilot: Batches | BudgetBatches | None = None,
    metric: AdamMetric | None = None,
    on_nonfinite: OnNonFinite = "raise",
    check_model: bool = True,
    check_gradients: bool = True,
    origin: Mapping[str, Any] | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> GradientStore:
    """Extract compressed per-sample gradients of a model into a store on disk, or go on where a run stopped.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model. It is put in evaluation mode meanwhile and comes back as it was.
    per_sample_loss : callable (model, batch) -> (b,) tensor
        The loss of each sample. Sample s of a batch must be at place s of axis 0 in every tapped layer.
    batches : iterable, callable start_row -> iterable, or BudgetBatches
        Batches in a fixed order (a DataLoader without shuffling). Tensors, tuples, dicts and objects with ``.to`` are
        moved to the device. A callable is given the number of samples already done and returns the batches after them.
        :class:`BudgetBatches` cuts samples by a budget of tokens and halves it where the device runs out of memory.
    store : path
        The store to write: a folder, or an fsspec URL. A store of the same run is continued: its finished rows are not
        computed again.
    compressor : Dropout, Gaussian, Rademacher, Sjlt, Grass, LoGra, Pca or Identity, optional
        What to keep of each gradient; default ``Dropout()``. Also a function of p, the entries of the tapped layers,
        that returns one.
    like : GradientStore or path, optional
        A train store whose mask to use instead: makes a query store. The model must be the same.
    modules : str, sequence of str, callable, optional
        Layers to tap: name patterns or a predicate ``(name, module) -> bool``; default every supported layer, or those
        that are trained where the others are frozen. Patterns that begin with ``!`` leave layers out.
    fallback : bool
        Tap selected layers of unknown kinds too, through ``torch.func``, at the cost of their full gradients.
    dtype : {"float16", "bfloat16", "float32", "int8", "int4"}
        Representation on disk; float16, int8 and int4 have a float32 scale a row.
    device : torch.device or str, optional
        Where to run; default where the model is.
    ids : sequence or callable, optional
        An id (str or int) for each sample: indexed by sample number, or ``batch -> sequence`` (not with a budget).
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
    pilot : iterable or callable, optional
        Batches for the pilot that importance sampling and an eigenbasis need; by default some of ``batches``, spread
        evenly where they can be addressed (a list, a DataLoader, a budget), else the first ones.
    metric : AdamMetric, optional
        Weigh entries as the optimiser that trained the model did.
    on_nonfinite : {"raise", "skip"}
        What to do with a sample whose loss or gradient has NaN or Inf: stop and name it, or record it as a dropped row.
    check_model : bool
        Refuse another model than the one ``store`` or ``like`` was made with; False warns and records it instead.
    check_gradients : bool
        Compare entries of the first and the last sample of the first batch with autograd's gradients of the loss before
        a row is stored, for about one and a half training steps of two samples; what was verified is recorded. A layer
        whose samples cannot be told apart, or whose weight is used without calling it, is left out and named; one that
        differs goes through the fallback where that is allowed.
    origin : mapping, optional
        What a new store's rows are made from, JSON values by name, such as the model's path and the data's: recorded,
        and shown by ``info`` and on a report's page.
    memory : int or str, optional
        Budget for the process while it makes an eigenbasis of the pilot's rows, such as ``"4GiB"``; by default half of
        what is free. Batches have a budget of their own (:class:`BudgetBatches`); rows on their way to the disk are a
        few chunks.
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
        If no layer can be tapped, samples of a batch influence each other, or a layer's entries differ from autograd's
        gradients.
    NonFiniteError
        For NaN or Inf in a loss or gradient; the batches before it are committed.
    MismatchError
        If ``store`` or ``like`` belongs to another mask, model or setting.
    StoreBusyError
        If another process writes the same range.
    StoreWriteError
        If the disk refuses; a later run goes on from the last commit.
    MemoryBudgetError
        If an eigenbasis does not fit the budget, or a batch's rows the memory that is free.
    """
    batching = batching or Batching()
    device = parse_device(model, device)
    settings = Settings(compressor, like, modules, fallback, dtype, loss_kind, storage, check_model, metric, origin)
    place = Shard.parse(shard)
    warn_if_training(model)
    total = len(batches) if isinstance(batches, BudgetBatches) else count_rows(batches)
    metadata = RowMetadata.of(ids, columns)
    metadata.check_length(total)
    metadata.check_ids()

    def attempt(settings: Settings) -> None:
        source = batches if pilot is None else pilot
        data = PilotData(model, per_sample_loss, source, device, progress, memory, check_gradients)
        plan = make_plan(model, settings, store, None if place else PilotRun(data, store))
        target = Sink(store, plan, metadata, batching, place, total, on_nonfinite)
        try:
            if not target.finished:
                fill(target, plan, data, batches, batching, known=total)
        except LayersDisagreeError as error:
            error.final = target.store is not None
            raise
        finally:
            target.close()
            logger.info("%s: finished rows are committed", store)

    adjusting(settings, attempt)
    remove_pilot(store)
    return GradientStore.open(store)


T = TypeVar("T")


def adjusting(settings: Settings, attempt: Callable[[Settings], T]) -> T:
    """Attempt something, again without layers that the first batch showed to be others than they seemed.

    Raises
    ------
    LayersDisagreeError
        Where another attempt would not help.
    """
    while True:
        try:
            return attempt(settings)
        except LayersDisagreeError as error:
            if error.final or settings.like is not None:
                raise
            settings = replace(settings, adjusted=_adjusted(settings, error))


def _adjusted(settings: Settings, error: LayersDisagreeError) -> Adjustments:
    """Return what leaves out, or puts through the fallback, the layers that an error names; else raise it."""
    without, through = dict(settings.adjusted.without), list(settings.adjusted.fallback)
    for each in error.layers:
        name = "" if each.name == "(the model)" else each.name
        if each.reason is not None and name not in without:
            without[name] = each.reason
        elif each.reason is None and settings.fallback and name not in through:
            through.append(name)
            logger.warning("layer %s differs from what its class suggests: it goes through the fallback", each.name)
        else:
            raise error
    return Adjustments(without, tuple(through))


def fill(
    target: Sink,
    plan: Plan,
    data: PilotData,
    batches: Batches | BudgetBatches,
    batching: Batching,
    *,
    known: int | None,
    label: str = "extract",
    check: bool = True,
) -> None:
    """Run the model over the batches whose rows are missing; ``known`` is how many samples they hold, if that is."""
    layers = [module.layer for module in plan.mask.modules]
    with (
        tapped(
            data.model,
            layers,
            data.device,
            skip=plan.mask.empty_modules,
            probe=batching.check_independence,
            check=check and data.check,
            mask=None if isinstance(plan.reduction, LograReduction) else plan.mask,
        ) as taps,
        Progress(label, known if target.stop is None else target.own(0, target.stop), data.progress) as bar,
    ):
        gatherer = RowGatherer(plan.mask, data.device, plan.reduction)
        parts = (target, taps, gatherer, data.per_sample_loss, data.device, bar)
        if isinstance(batches, BudgetBatches):
            BudgetRun(*parts).read(batches, plan.k, batching.first_row)
        else:
            BatchRun(*parts).read(batches, batching.first_row)


class PilotRun:
    """Runs what a compressor has to know beforehand: moments of the layers, an eigenbasis of wide rows.

    Parameters
    ----------
    data : PilotData
        The model and the pilot's batches.
    store : path
        The store that is to be made.
    """

    def __init__(self, data: PilotData, store: PathLike) -> None:
        self._data, self._path = data, parse_path(store)

    def __call__(self, plan: Plan, compressor: Compressor, layers: list[LayerShape], metric: AdamMetric | None) -> Plan:
        """Return the plan with its mask and reduction.

        Raises
        ------
        InputError, UnsupportedModelError, MemoryBudgetError
            See :func:`extract_gradients`.
        """
        basis, known = compressor.reduce, self._data.count()
        if basis is not None and known is not None and known < basis.r:
            raise InputError(
                f"expected at least r = {basis.r} samples to make an eigenbasis from; received {known}: use a smaller "
                "r (--dims), or no reduction"
            )
        wide = replace(compressor, reduce=None) if isinstance(compressor, Dropout) else Identity()
        plan = replace(plan, attributes=plan.attributes | {"compressor": wide.to_dict()})
        place = pilot_path(self._path)
        try:  # of a run that was killed
            found = GradientStore.open(place)
            alike = found.attrs.get("compressor") == wide.to_dict()
            mask = found.mask if alike and (found.attrs.get("metric") is None) == (metric is None) else None
        except StoreNotFoundError:
            mask = None
        if mask is None or [module.layer for module in mask.modules] != layers:
            mask = wide.draw(layers, self._data.moments(layers, wide.pilot_samples) if wide.pilot_samples else ())
            plan = with_metric(replace(plan, mask=mask), metric, self._data.model)
        else:
            plan = replace(plan, mask=mask, attributes=plan.attributes | {"metric": found.attrs.get("metric")})
        plan.attributes["verification"] |= self._data.verification
        if basis is None:
            return plan
        pilot = replace(plan, storage=Storage(), dtype="float16")
        try:
            self._fill(pilot, place, basis.pilot_rows)
        except MismatchError:  # it is of other data, or another model
            remove_tree(place)
            self._fill(pilot, place, basis.pilot_rows)
        rows = GradientStore.open(place)
        reduction = fit_eigenbasis(
            rows, basis.r, weights=basis.weights, memory=self._data.memory, progress=self._data.progress
        )
        return replace(plan, reduction=reduction, attributes=plan.attributes | {"compressor": compressor.to_dict()})

    def _fill(self, plan: Plan, place: StorePath, rows: int) -> None:
        target = Sink(place, plan, RowMetadata.of(None, None), Batching(), None, None, "skip")
        try:
            known = min(rows, self._data.count() or rows)
            fill(
                target, plan, self._data, self._data.part(rows), Batching(), known=known, label="pilot rows",
                check=not self._data.verification,
            )  # fmt: skip
        finally:
            target.close()


def remove_pilot(store: PathLike) -> None:
    """Remove the pilot's wide rows, now that the store has their basis."""
    place = pilot_path(parse_path(store))
    if exists(place):
        remove_tree(place)

"""Extraction: what a store will hold is planned, with a pilot if the compressor needs one, and its rows are computed.

Rows are those of the caller's batches in their order. A resumed run skips batches whose rows are committed; the batch
that straddles the boundary is computed completely and its committed rows are discarded, so that the rows equal those of
an uninterrupted run bit for bit on the same machine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, Unpack

import torch

from ooc_influence.compress import Compressor, Dropout
from ooc_influence.errors import InputError, StoreNotFoundError
from ooc_influence.extract.check import LayersDisagreeError
from ooc_influence.extract.checkpoints import Checkpoint, CheckpointSource, open_checkpoints, recorded_checkpoints
from ooc_influence.extract.data import (
    Batches,
    Batching,
    BudgetBatches,
    RowChoice,
    RowMetadata,
    RowSource,
    Shard,
    batch_size,
    count_rows,
)
from ooc_influence.extract.fingerprint import fingerprint_as
from ooc_influence.extract.full_basis import factors_path, keep_factors
from ooc_influence.extract.layers import find_uses, warn_if_training
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.passes import ModelSetup, fill
from ooc_influence.extract.pilot import Pilot, remove_pilot
from ooc_influence.extract.selection import Adjustments, ModuleSelection, select_layers
from ooc_influence.extract.sink import Sink, StorePlan, open_existing, same_model
from ooc_influence.extract.taps import PerSampleLoss, parameter_sequence
from ooc_influence.fingerprint import check_same, checkpoint_names
from ooc_influence.options import ExtractOptions, InitOptions, takes
from ooc_influence.store import (
    GradientStore,
    LayerShape,
    Mask,
    PathLike,
    Representation,
    Storage,
    as_store,
    check_extracted,
    parse_path,
    parse_representation,
)

logger = logging.getLogger("ooc_influence")


@takes(ExtractOptions)
def extract_gradients(
    model: torch.nn.Module,
    per_sample_loss: PerSampleLoss,
    batches: Batches | BudgetBatches,
    store: PathLike,
    *,
    ids: RowSource | None = None,
    columns: Mapping[str, RowSource] | None = None,
    batching: Batching | None = None,
    **options: Unpack[ExtractOptions],
) -> GradientStore:
    """Extract compressed per-sample gradients of a model into a store on disk, or continue where a run stopped.

    ``memory`` bounds the making of an eigenbasis from the pilot's rows. Batches have a budget of their own
    (:class:`BudgetBatches`); rows on their way to the disk are a few chunks.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model. It is put in evaluation mode meanwhile and comes back as it was.
    per_sample_loss : callable (model, batch) -> (b,) tensor
        The loss of each sample. Sample s of a batch must be at index s of axis 0 in every tapped layer.
    batches : iterable, callable start_row -> iterable, or BudgetBatches
        Batches in a fixed order (a DataLoader without shuffling). Tensors, tuples, dicts and objects with ``.to`` are
        moved to the device. A callable is given the number of samples already done and returns the batches after them.
        :class:`BudgetBatches` cuts samples by a budget of tokens and halves it where the device runs out of memory.
    store : path
        The store to write: a folder, or an fsspec URL. A store of the same run is continued: its finished rows are not
        computed again.
    ids : sequence or callable, optional
        An id (str or int) for each sample: indexed by sample number, or ``batch -> sequence`` (not with a budget).
    columns : mapping of str to sequence or callable, optional
        Further per-row values (bool, int, float, str), given like ``ids``.
    batching : Batching, optional
        Where the samples go in the store; checks.
    **options : ExtractOptions
        See :mod:`ooc_influence.options`.

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
        If the disk refuses; a later run continues from the last commit.
    MemoryBudgetError
        If an eigenbasis does not fit the budget, or a batch's rows the memory that is free.
    """
    batching = batching or Batching()
    device = parse_device(model, options["device"])
    settings = Settings.of(options).with_checkpoints(model)
    setup = ModelSetup(
        model, per_sample_loss, device, options["progress"], options["check_gradients"], settings.seed_of_labels
    )
    writer = Shard.parse(options["shard"])
    warn_if_training(model)
    total = len(batches) if isinstance(batches, BudgetBatches) else count_rows(batches)
    metadata = RowMetadata.of(ids, columns)
    metadata.check_length(total)
    metadata.check_ids()
    source = batches if options["pilot"] is None else options["pilot"]
    choice = RowChoice(settings.sample, settings.draws)
    batches, metadata = choice.batches(batches, total), choice.metadata(metadata, total)
    total = choice.count(total)

    def attempt(settings: Settings) -> None:
        keeps_rows = settings.of_pilot and source is batches and not batching.first_row
        pilot = None if writer else Pilot(setup, source, options["memory"], keeps_rows=keeps_rows)
        plan = plan_store(model, settings, store, pilot)
        _check_factors(plan, settings, options["keep_factors"])
        sink = Sink(store, plan, metadata, batching, writer, total, options["on_nonfinite"])
        try:
            if not sink.finished:
                known = None if pilot is None else pilot.known_rows(plan, store)
                fill(sink, setup, batches, batching, total=total, checkpoints=settings.opened, known=known)
        except LayersDisagreeError as error:
            error.final = sink.store is not None
            raise
        finally:
            sink.close()
            logger.info("%s: finished rows are committed", store)

    adjusting(settings, attempt)
    remove_pilot(store)
    extracted = GradientStore.open(store)
    if options["keep_factors"] and writer is None:
        keep_factors(Pilot(setup, source, options["memory"]), extracted, factors_path(extracted))
    return extracted


@takes(InitOptions)
def init_store(
    model: torch.nn.Module,
    store: PathLike,
    rows: int,
    *,
    ids: str | None = None,
    columns: Mapping[str, str] | None = None,
    per_sample_loss: PerSampleLoss | None = None,
    **options: Unpack[InitOptions],
) -> GradientStore:
    """Make an empty store of ``rows`` rows for ``extract_gradients(..., shard=(i, N))`` to fill.

    This fixes the rows, the mask, the basis, the representation, and the types of ids and columns. On an existing store
    of the same settings, more rows extend the plan for further data; readers opened before still see what they opened.

    Parameters
    ----------
    model : torch.nn.Module
        The model. Without a pilot, only its weights are read, for the fingerprint.
    store : path
        The store to make.
    rows : int
        Rows of the whole store, n.
    ids : {"str", "int64"}, optional
        Type of the rows' ids, where they will have some.
    columns : mapping of str to {"bool", "int64", "float64", "str"}, optional
        Types of further per-row values, by name.
    per_sample_loss : callable (model, batch) -> (b,) tensor, optional
        The loss of each sample, for a ``pilot`` (which may be the whole data; some of it is taken).
    **options : InitOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GradientStore
        Open for reading, (0, k) when new.

    Raises
    ------
    InputError
        For rows below one or below those planned already, or types that are not known, or a compressor that needs a
        pilot without data for one.
    MismatchError
        If a store is there that was made with other settings or another model.
    StoreWriteError
        If the disk refuses.
    """
    if type(rows) is not int or rows < 1:
        raise InputError(f"expected rows >= 1; received {rows!r}")
    for name, kind, allowed in [("ids", ids or "str", ("str", "int64"))] + [
        (f"column {name}", kind, ("bool", "int64", "float64", "str")) for name, kind in (columns or {}).items()
    ]:
        if kind not in allowed:
            raise InputError(f"expected {name} of type {', '.join(allowed)}; received {kind!r}")
    settings = Settings.of(options).with_checkpoints(model)
    pilot_run, check_gradients = None, options["check_gradients"]
    if per_sample_loss is not None and options["pilot"] is not None:
        device = parse_device(model, options["device"])
        seed = settings.seed_of_labels
        setup = ModelSetup(model, per_sample_loss, device, options["progress"], check_gradients, seed)
        pilot_run = Pilot(setup, options["pilot"], options["memory"])

    def attempt(settings: Settings) -> StorePlan:
        plan = plan_store(model, settings, store, pilot_run)
        _check_factors(plan, settings, options["keep_factors"])
        if pilot_run is not None and check_gradients and not pilot_run.verification:
            pilot_run.verify([module.layer for module in plan.mask.modules])
            plan.attributes["verification"] |= pilot_run.verification
        return plan

    plan = adjusting(settings, attempt)
    existing = open_existing(store, plan)
    if existing is None:
        GradientStore.create(
            store, plan.mask, storage=plan.storage, planned_rows=rows, ids=ids, columns=columns, **plan.create_options
        ).close()
        remove_pilot(store)
        made = GradientStore.open(store)
        if options["keep_factors"] and pilot_run is not None:
            keep_factors(pilot_run, made, factors_path(made))
        return made
    check_same(
        f"the store at {store}", {"ids": existing.layout.ids, "columns": existing.layout.columns},
        {"ids": ids, "columns": dict(columns or {})}, "give the same, or another path",
    )  # fmt: skip
    existing.grow(rows)
    return GradientStore.open(store)


def row_types(
    batches: Batches, ids: RowSource | None, columns: Mapping[str, RowSource] | None, choice: RowChoice
) -> tuple[int | None, str | None, dict[str, str]]:
    """Return the number of rows made of a choice of samples, if it is known, and the types of their ids and columns.

    If these are functions of a batch, the first batch is read.
    """
    metadata = RowMetadata.of(ids, columns)
    of_batch = {}
    if any(callable(source) for source in metadata.sources.values()):
        batch = next(iter(batches(0) if callable(batches) else batches), None)
        size = None if batch is None else batch_size(batch)
        if size is None:
            raise InputError("expected a first batch that tells its size; received none: give ids and columns as lists")
        of_batch = metadata.take(batch, 0, size)
    types = {name.removeprefix("columns/"): kind for name, kind in metadata.dtypes(of_batch).items()}
    return choice.count(count_rows(batches)), choice.id_type(types.pop("example_id", None)), types


def _check_factors(plan: StorePlan, settings: Settings, keep: bool) -> None:
    """Refuse, before rows are computed, to keep factors that there are none of, or that the train store has."""
    if keep and (settings.like is not None or not plan.mask.has_basis):
        raise InputError(
            "expected keep_factors (--keep-factors) for a train store in a Kronecker basis; received "
            f"{'like= a train store, which keeps them' if settings.like is not None else 'another basis'}: leave it out"
        )


T = TypeVar("T")


def adjusting(settings: Settings, attempt: Callable[[Settings], T]) -> T:
    """Attempt an extraction, again with other layers if the first batch showed that some are not what they seem."""
    while True:
        try:
            return attempt(settings)
        except LayersDisagreeError as error:
            if error.final or settings.like is not None:
                raise
            settings = replace(settings, adjusted=_adjusted(settings, error))


def _adjusted(settings: Settings, error: LayersDisagreeError) -> Adjustments:
    """Return the adjustments that leave out, or use the fallback for, the layers that an error names; or raise it."""
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


def parse_device(model: torch.nn.Module, device: torch.device | str | None) -> torch.device:
    """Return the device to run on, by default the model's; one that is unknown or missing is refused."""
    try:
        chosen = parameter_sequence(model)[0].device if device is None else torch.device(device)
    except RuntimeError as error:
        raise InputError(f"expected a device such as 'cuda' or 'cpu'; received {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"expected a device that is there; received {str(chosen)!r} and PyTorch sees no GPU: use 'cpu'"
        )
    return chosen


@dataclass(frozen=True)
class Settings:
    """The options of :func:`extract_gradients` that determine what a store holds, and the necessary adjustments."""

    compressor: Compressor | Callable[[int], Compressor] | None = None
    like: GradientStore | PathLike | None = None
    modules: ModuleSelection = None
    fallback: bool = False
    dtype: str = "float16"
    loss_kind: str | None = None
    storage: Storage | None = None
    check_model: bool = True
    metric: AdamMetric | None = None
    origin: Mapping[str, Any] | None = None
    labels: str = "dataset"
    label_seed: int = 0
    draws: int = 1
    sample: int | None = None
    checkpoints: Sequence[CheckpointSource] | CheckpointSource | None = None
    opened: tuple[Checkpoint, ...] = ()
    adjusted: Adjustments = field(default_factory=Adjustments)
    in_training: bool = False  # the model's weights change: they need not be those of ``like``

    @classmethod
    def of(cls, options: InitOptions) -> Settings:
        """Return the settings among a call's options."""
        asked: Mapping[str, Any] = options
        return cls(**{each.name: asked[each.name] for each in fields(cls) if each.name in asked})

    def __post_init__(self) -> None:
        if self.labels not in ("dataset", "sampled"):
            raise InputError(f"expected labels 'dataset' or 'sampled'; received {self.labels!r}")
        if self.labels == "dataset" and self.draws != 1:
            raise InputError(
                f"expected draws=1 with the data set's labels; received {self.draws!r}: use labels='sampled' "
                "(--labels sampled)"
            )
        if isinstance(self.label_seed, bool) or not isinstance(self.label_seed, int):
            raise InputError(f"expected label_seed as a whole number; received {self.label_seed!r}")

    def with_checkpoints(self, model: torch.nn.Module) -> Settings:
        """Return the settings with the checkpoints opened: as given, or those of the train store."""
        sources, train = self.checkpoints, None if self.like is None else as_store(self.like)
        if sources is None and train is not None and self.labels == "dataset":
            sources = recorded_checkpoints(train)
        if sources and self.labels == "sampled":
            raise InputError(
                "expected no checkpoints with sampled labels, which are those of the model itself; received both: "
                "leave checkpoints out, the rows are of the same basis"
            )
        opened = open_checkpoints(model, sources)
        if opened and train is not None and "averaged" not in train.attrs:  # averages in training are of no checkpoints
            received = checkpoint_names({"checkpoints": [each.to_dict() for each in opened]})
            check_same(
                train.path, {"checkpoints": checkpoint_names(train.attrs)}, {"checkpoints": received},
                "give the same, or checkpoints=() for the model's own gradients",
            )  # fmt: skip
        return replace(self, opened=opened)

    @property
    def seed_of_labels(self) -> int | None:
        """The seed of sampled labels; None for the data set's."""
        return self.label_seed if self.labels == "sampled" else None

    @property
    def of_pilot(self) -> bool:
        """Whether rows are of the same labels, weights and model as those of a pilot."""
        return self.labels == "dataset" and self.like is None and self.metric is None and not self.opened

    @property
    def labels_record(self) -> dict[str, Any]:
        """What a store records of its labels."""
        if self.labels == "dataset":
            return {"kind": "dataset"}
        return {"kind": "sampled", "seed": self.label_seed, "draws": self.draws}


def plan_store(model: torch.nn.Module, settings: Settings, path: PathLike, pilot: Pilot | None) -> StorePlan:
    """Return the plan of a store at ``path``: its mask is the train store's, an earlier run's, or drawn.

    ``pilot`` runs the pilot that a compressor may need; None if there is no data for one.
    """
    representation = parse_representation(settings.dtype)
    kind = settings.loss_kind
    if kind is not None and not isinstance(kind, str):
        raise InputError(f"expected loss_kind as a string; received {type(kind).__name__}")
    reference = _open_if_there(path if settings.like is None else settings.like)
    fingerprint = fingerprint_as(model, None if reference is None else reference.model_fingerprint)
    attributes: dict[str, Any] = {
        "model": {"fingerprint": fingerprint, "class": type(model).__name__},
        "loss_kind": kind,
        "origin": _parse_origin(settings.origin),
        "labels": settings.labels_record,
        "sample": settings.sample,
    }
    if settings.opened:
        attributes["checkpoints"] = [each.to_dict() for each in settings.opened]
    if settings.like is not None:
        return _plan_like(model, settings, representation, path, attributes)
    adjusted = settings.adjusted
    if reference is not None and not adjusted:
        adjusted = Adjustments.of(reference.attrs.get("adjusted"))
    layers, share, missed = select_layers(model, settings.modules, fallback=settings.fallback, adjusted=adjusted)
    chosen = settings.compressor or Dropout()
    if callable(chosen):
        chosen = chosen(sum(layer.entries for layer in layers))
    left_out = {name: {"reason": reason, "share": part} for name, (reason, part) in missed.items()}
    attributes |= {
        "compressor": chosen.to_dict(), "covered": share, "verification": {"checked": False, "left_out": left_out},
    }  # fmt: skip
    if adjusted:
        attributes["adjusted"] = adjusted.to_dict()
    plan = StorePlan(Mask(()), None, representation, attributes, settings.storage or Storage(), settings.check_model)
    if reference is not None and _same_run(reference, layers, attributes):
        return _same_metric(replace(plan, mask=reference.mask, reduction=reference.reduction), reference, settings)
    if settings.metric is not None and not chosen.weighs_entries:
        raise InputError(
            f"expected no metric with {type(chosen).__name__}; received one: it weighs entries, which "
            f"{type(chosen).__name__} never sees"
        )
    if not chosen.pilot_samples and chosen.reduce is None:
        mask = chosen.draw(layers)
        plan = replace(plan, mask=mask, reduction=chosen.generated(mask))
        return plan.weighted_by(settings.metric, model)
    if pilot is None:
        raise InputError(
            f"expected data for the pilot that {chosen!r} needs; received none: give per_sample_loss= and pilot= to "
            "init_store, or sampling='uniform' without reduce"
        )
    return pilot.run(plan, chosen, layers, settings.metric, path)


def _parse_origin(origin: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if origin is None:
        return None
    try:
        return dict(json.loads(json.dumps(dict(origin))))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"expected origin as a mapping of names to JSON values; received {origin!r}: {error}"
        ) from error


def _same_metric(plan: StorePlan, earlier: GradientStore, settings: Settings) -> StorePlan:
    """Return the plan of a resumed run, its metric checked against the one that the mask carries."""
    metric = earlier.attrs.get("metric")
    expected, received = (value and "adam" for value in (metric, settings.metric))
    check_same(earlier.path, {"metric=": expected}, {"metric=": received}, "give the same, or another path")
    return plan if metric is None else replace(plan, attributes=plan.attributes | {"metric": metric})


def _plan_like(
    model: torch.nn.Module,
    settings: Settings,
    dtype: Representation,
    path: PathLike,
    attributes: dict[str, Any],
) -> StorePlan:
    """Return the plan of a query store, with the mask, reduction and scaling of its train store."""
    if settings.compressor is not None or settings.modules is not None or settings.fallback or settings.metric:
        raise InputError(
            "expected either like= or compressor=, modules=, fallback= and metric=; received both: like fixes the mask"
        )
    assert settings.like is not None
    train = settings.like if isinstance(settings.like, GradientStore) else GradientStore.open(settings.like)
    check_extracted(train)
    if train.path == parse_path(path):
        raise InputError(f"expected a query store apart from its train store; received {path} for both")
    if not settings.in_training:
        attributes["model"] = same_model(train, attributes["model"], settings.check_model)
    attributes |= {name: train.attrs.get(name) for name in ("compressor", "covered", "metric")}
    left_out = (train.attrs.get("verification") or {}).get("left_out", {})
    attributes["verification"] = {"checked": False, "left_out": left_out}
    find_uses(model, [module.layer for module in train.mask.modules])
    return StorePlan(
        train.mask, train.reduction, dtype, attributes, settings.storage or Storage(), settings.check_model,
        train.basis_path,
    )  # fmt: skip


def _open_if_there(store: GradientStore | PathLike) -> GradientStore | None:
    try:
        return as_store(store)
    except StoreNotFoundError:
        return None


def _same_run(store: GradientStore, layers: list[LayerShape], attributes: dict[str, Any]) -> bool:
    """Return whether a store is of an earlier run with the same compressor and layers, so that its mask is kept."""
    same = store.attrs.get("compressor") == attributes["compressor"]
    return bool(same and [module.layer for module in store.mask.modules] == layers)

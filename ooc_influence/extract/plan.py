"""What a run will store, fixed before it starts, and checked against what an earlier run stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ooc_influence.compress import Compressor, Dropout, FullGradient, LoGra
from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError, warn
from ooc_influence.extract.fingerprint import fingerprint_as, short_fingerprint
from ooc_influence.extract.layers import find_uses
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.selection import Adjustments, ModuleSelection, select_layers
from ooc_influence.extract.tapping import parameter_sequence
from ooc_influence.store import (
    GradientStore,
    LayerShape,
    Mask,
    PathLike,
    Reduction,
    Representation,
    Storage,
    StoredReduction,
    check_free,
    check_writable,
    columns_digest,
    kept_at,
    parse_path,
    parse_representation,
)


@dataclass(frozen=True)
class Plan:
    """All that fixes what a store will hold.

    Attributes
    ----------
    mask : Mask
        The kept entries.
    reduction : Reduction or None
        What masked rows are multiplied by.
    dtype : str
        Representation of the rows.
    attributes : dict
        What the store records about how its rows are made.
    storage : Storage
        Chunking and codec, as far as the caller insists on them.
    check_model : bool
        Whether another model than the store's is an error, or a warning.
    kept_at : str or None
        The store that keeps the reduction, where this one will only refer to it.
    """

    mask: Mask
    reduction: Reduction | None
    dtype: Representation
    attributes: dict[str, Any]
    storage: Storage
    check_model: bool
    kept_at: str | None = None

    @property
    def k(self) -> int:
        """Numbers stored a row."""
        return self.mask.k if self.reduction is None else self.reduction.columns

    @property
    def columns_digest(self) -> str:
        """What the columns mean; see :attr:`GradientStore.columns_digest`."""
        return columns_digest(self.mask.digest, None if self.reduction is None else self.reduction.facts)

    @property
    def create_options(self) -> dict[str, Any]:
        """What the store is created with, by the names of :meth:`GradientStore.create`."""
        reduction: Any = self.reduction
        scale = None
        if isinstance(reduction, StoredReduction) and self.dtype in ("int8", "int4"):
            scale = reduction.column_scale()  # columns of an eigenbasis differ by orders of magnitude
        if self.kept_at is not None:
            reduction = {**reduction.facts, "path": self.kept_at}
        return {
            "dtype": self.dtype, "reduction": reduction, "column_scale": scale, "attributes": self.attributes,
        }  # fmt: skip

    @property
    def model(self) -> dict[str, Any]:
        """What is recorded about the model."""
        found: dict[str, Any] = self.attributes["model"]
        return found


def parse_device(model: torch.nn.Module, device: torch.device | str | None) -> torch.device:
    """Return where to run: the device asked for, if it is there, or the model's.

    Raises
    ------
    InputError
        For a device that is not known or not there.
    """
    home = parameter_sequence(model)[0].device
    try:
        chosen = home if device is None else torch.device(device)
    except RuntimeError as error:
        raise InputError(f"expected a device such as 'cuda' or 'cpu'; received {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"expected a device that is there; received {str(chosen)!r} and PyTorch sees no GPU: use 'cpu'"
        )
    return chosen


Pilot = Callable[[Plan, Compressor, list[LayerShape], AdamMetric | None], Plan]


@dataclass(frozen=True)
class Settings:
    """What a caller asks a store to be; see :func:`extract_gradients`.

    Attributes
    ----------
    compressor, like, modules, fallback, dtype, loss_kind, storage, check_model, metric, origin
        As given.
    adjusted : Adjustments
        What the first batch showed of the model's layers.
    """

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
    adjusted: Adjustments = field(default_factory=Adjustments)


def make_plan(model: torch.nn.Module, settings: Settings, path: PathLike, pilot: Pilot | None) -> Plan:
    """Fix mask, reduction and attributes: from the train store, an earlier run's store, or by drawing them.

    Parameters
    ----------
    model : nn.Module
        The model.
    settings : Settings
        What is asked for.
    path : path
        The store to be made, or gone on with.
    pilot : callable (plan, pilot samples) -> Plan or None
        Runs the pilot that a compressor may need; None where there is no data for one.

    Raises
    ------
    InputError, MismatchError, UnsupportedModelError
        See :func:`extract_gradients`.
    """
    representation = parse_representation(settings.dtype)
    kind = settings.loss_kind
    if kind is not None and not isinstance(kind, str):
        raise InputError(f"expected loss_kind as a string; received {type(kind).__name__}")
    attributes: dict[str, Any] = {
        "model": {"fingerprint": _fingerprint(model, settings.like, path), "class": type(model).__name__},
        "loss_kind": kind,
        "origin": _parse_origin(settings.origin),
    }
    if settings.like is not None:
        return _plan_like(model, settings, representation, path, attributes)
    existing = _existing(path)
    adjusted = settings.adjusted
    if existing is not None and not adjusted:
        adjusted = Adjustments.of(existing.attrs.get("adjusted"))
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
    plan = Plan(Mask(()), None, representation, attributes, settings.storage or Storage(), settings.check_model)
    if existing is not None and _same_run(existing, layers, attributes):
        return _same_metric(replace(plan, mask=existing.mask, reduction=existing.reduction), existing, settings)
    if not chosen.pilot_samples and chosen.reduce is None:
        if settings.metric is not None and isinstance(chosen, LoGra):
            raise InputError("expected no metric with LoGra; received one: it weighs entries, which LoGra never sees")
        mask = chosen.draw(layers)
        reduction = chosen.generated(mask) if isinstance(chosen, FullGradient) else None
        return with_metric(replace(plan, mask=mask, reduction=reduction), settings.metric, model)
    if pilot is None:
        raise InputError(
            f"expected data for the pilot that {chosen!r} needs; received none: give per_sample_loss= and pilot= to "
            "init_store, or sampling='uniform' without reduce"
        )
    return pilot(plan, chosen, layers, settings.metric)


def _fingerprint(model: torch.nn.Module, like: GradientStore | PathLike | None, path: PathLike) -> str:
    """Return the model's fingerprint, in the form of the store that it will be compared with."""
    try:
        store = like if isinstance(like, GradientStore) else GradientStore.open(path if like is None else like)
    except StoreNotFoundError:
        return fingerprint_as(model, None)
    return fingerprint_as(model, store.model_fingerprint)


def _parse_origin(origin: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if origin is None:
        return None
    try:
        return dict(json.loads(json.dumps(dict(origin))))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"expected origin as a mapping of names to JSON values; received {origin!r}: {error}"
        ) from error


def with_metric(plan: Plan, metric: AdamMetric | None, model: torch.nn.Module) -> Plan:
    """Return a plan whose mask carries the metric."""
    if metric is None:
        return plan
    mask, facts = metric.apply(plan.mask, model)
    if facts["never_updated"]:
        warn(
            f"{facts['never_updated']} of {mask.k} kept entries were never updated by the optimiser; their weight is 0"
        )
    return replace(plan, mask=mask, attributes=plan.attributes | {"metric": facts})


def _same_metric(plan: Plan, earlier: GradientStore, settings: Settings) -> Plan:
    """Return the plan of a run that goes on, its metric checked against the one that the mask carries."""
    held, attributes = earlier.attrs.get("metric"), plan.attributes
    if (held is None) != (settings.metric is None):
        raise MismatchError(
            f"expected metric= as in the run that {earlier.path} is from, {(held or {}).get('name')}; received "
            f"{'one' if settings.metric else 'none'}: give the same, or another path"
        )
    return plan if held is None else replace(plan, attributes=attributes | {"metric": held})


def _plan_like(
    model: torch.nn.Module,
    settings: Settings,
    dtype: Representation,
    path: PathLike,
    attributes: dict[str, Any],
) -> Plan:
    """Return the plan of a query store: mask, reduction and scaling of its train store."""
    if settings.compressor is not None or settings.modules is not None or settings.fallback or settings.metric:
        raise InputError(
            "expected either like= or compressor=, modules=, fallback= and metric=; received both: like fixes the mask"
        )
    assert settings.like is not None
    train = settings.like if isinstance(settings.like, GradientStore) else GradientStore.open(settings.like)
    if train.path == parse_path(path):
        raise InputError(f"expected a query store apart from its train store; received {path} for both")
    attributes["model"] = _same_model(train, attributes["model"], settings.check_model)
    attributes |= {name: train.attrs.get(name) for name in ("compressor", "covered", "metric")}
    left_out = (train.attrs.get("verification") or {}).get("left_out", {})
    attributes["verification"] = {"checked": False, "left_out": left_out}
    find_uses(model, [module.layer for module in train.mask.modules])
    return Plan(
        train.mask, train.reduction, dtype, attributes, settings.storage or Storage(), settings.check_model,
        kept_at(train),
    )  # fmt: skip


def _existing(path: PathLike) -> GradientStore | None:
    try:
        return GradientStore.open(path)
    except StoreNotFoundError:
        return None


def _same_run(store: GradientStore, layers: list[LayerShape], attributes: dict[str, Any]) -> bool:
    """Return whether a store is of an earlier run with the same compressor and layers, whose mask is to be kept."""
    alike = store.attrs.get("compressor") == attributes["compressor"]
    return bool(alike and [module.layer for module in store.mask.modules] == layers)


def _same_model(store: GradientStore, model: dict[str, Any], check: bool) -> dict[str, Any]:
    """Return what to record about a model that has to be the one of ``store``.

    Raises
    ------
    MismatchError
        If it is another, and that was not allowed.
    """
    if store.model_fingerprint == model["fingerprint"]:
        return model
    if check:
        raise MismatchError(
            f"expected the model that {store.path} was made with, model fingerprint "
            f"{short_fingerprint(store.model_fingerprint)}; received {short_fingerprint(model['fingerprint'])} (names, "
            "shapes or values of its tensors differ): load the same checkpoint, or allow another with "
            "check_model=False (--other-model)"
        )
    warn(
        f"the model is not the one that {store.path} was made with; its rows are taken as comparable because "
        "check_model=False (--other-model) says so"
    )
    recorded = store.attrs.get("model")
    expected: dict[str, Any] = dict(recorded) if isinstance(recorded, Mapping) else {"fingerprint": recorded}
    return {**expected, "other": [*expected.get("other", []), model["fingerprint"]]}


def open_existing(path: PathLike, plan: Plan) -> GradientStore | None:
    """Open the store of an earlier run to go on with it; None where there is none.

    Raises
    ------
    MismatchError
        If it was made with other settings or, unless that is allowed, another model.
    """
    try:
        store = GradientStore.open(path, mode="a")
    except StoreNotFoundError:
        check_free(parse_path(path), "a store or nothing")
        check_writable(parse_path(path))
        return None
    attrs, layout, wanted = store.attrs, store.layout, plan.storage
    for what, expected, received in (
        ("compressor", attrs.get("compressor"), plan.attributes["compressor"]),
        ("selected layers (digest of mask and basis)", store.columns_digest, plan.columns_digest),
        ("dtype", layout.dtype, plan.dtype),
        ("chunk_rows", layout.chunk_rows, wanted.chunk_rows or layout.chunk_rows),
        ("group_chunks", layout.group_chunks, wanted.group_chunks or layout.group_chunks),
        ("codec", layout.codec, wanted.codec or layout.codec),
        ("loss_kind", attrs.get("loss_kind"), plan.attributes["loss_kind"]),
    ):
        if expected != received:
            one, other = _differing(expected, received)
            raise MismatchError(
                f"expected the {what} of the store at {path} ({one}); received {other}: extract to another path, or "
                "remove the store"
            )
    if store.model_fingerprint != plan.model["fingerprint"]:
        store.record(model=_same_model(store, plan.model, plan.check_model))
    return store


def _differing(expected: Any, received: Any) -> tuple[str, str]:
    """Return in words what two settings are; of mappings, the entries that differ."""
    if not isinstance(expected, Mapping) or not isinstance(received, Mapping):
        return _short(expected), _short(received)
    names = [name for name in {**expected, **received} if expected.get(name) != received.get(name)]
    pairs = [(name, expected.get(name), received.get(name)) for name in names]
    return (
        ", ".join(_entry(name, own, other) for name, own, other in pairs),
        ", ".join(_entry(name, own, other) for name, other, own in pairs),
    )


def _entry(name: str, value: Any, other: Any) -> str:
    """Return an entry of settings in words; of one that holds settings itself, what differs from ``other``."""
    if value is None:
        return f"no {name}"
    if not isinstance(value, Mapping):
        return f"{name} {value}"
    kept = {key: own for key, own in value.items() if own is not None}
    text, _ = _differing(value, other) if isinstance(other, Mapping) else _differing(kept, {})
    return f"{name} with {text}"


def _short(value: Any) -> str:
    """Return a setting in words, a digest by its beginning."""
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text

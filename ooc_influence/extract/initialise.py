"""Making the store that several writers will fill, or giving it room for more rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ooc_influence.compress import Compressor
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.extract.batching import Batches, BudgetBatches, batch_size, count_rows
from ooc_influence.extract.loop import PilotRun, adjusting, remove_pilot
from ooc_influence.extract.metadata import RowMetadata, RowSource
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.pilot import PilotData
from ooc_influence.extract.plan import Plan, Settings, make_plan, open_existing, parse_device
from ooc_influence.extract.selection import ModuleSelection
from ooc_influence.extract.taps import PerSampleLoss
from ooc_influence.store import GradientStore, PathLike, Storage


def init_store(
    model: torch.nn.Module,
    store: PathLike,
    rows: int,
    *,
    compressor: Compressor | None = None,
    like: GradientStore | PathLike | None = None,
    modules: ModuleSelection = None,
    fallback: bool = False,
    dtype: str = "float16",
    ids: str | None = None,
    columns: Mapping[str, str] | None = None,
    loss_kind: str | None = None,
    storage: Storage | None = None,
    check_model: bool = True,
    check_gradients: bool = True,
    origin: Mapping[str, Any] | None = None,
    per_sample_loss: PerSampleLoss | None = None,
    pilot: Batches | BudgetBatches | None = None,
    metric: AdamMetric | None = None,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> GradientStore:
    """Make an empty store of ``rows`` rows for ``extract_gradients(..., shard=(i, N))`` to fill.

    What is fixed here once: the rows, the mask, the basis, the representation, what belongs to each row. On a store
    that is there already, of the same settings, more rows make room for further data; readers opened before see what
    they opened.

    Parameters
    ----------
    model, store, compressor, like, modules, fallback, dtype, loss_kind, storage, check_model, check_gradients, origin
        As for :func:`extract_gradients`. Without a pilot, the model's weights are looked at for the fingerprint only.
    rows : int
        Rows of the whole store, n.
    ids : {"str", "int64"}, optional
        Type of the rows' ids, where they will have some.
    columns : mapping of str to {"bool", "int64", "float64", "str"}, optional
        Types of further per-row values, by name.
    per_sample_loss, pilot, metric, device, memory, progress
        As for :func:`extract_gradients`: for the pilot of importance sampling or an eigenbasis. ``pilot`` may be the
        whole data; some of it is taken.

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
    for name, kind, known in [("ids", ids or "str", ("str", "int64"))] + [
        (f"column {name}", kind, ("bool", "int64", "float64", "str")) for name, kind in (columns or {}).items()
    ]:
        if kind not in known:
            raise InputError(f"expected {name} of type {', '.join(known)}; received {kind!r}")
    settings = Settings(compressor, like, modules, fallback, dtype, loss_kind, storage, check_model, metric, origin)
    data = None
    if per_sample_loss is not None and pilot is not None:
        source = parse_device(model, device)
        data = PilotData(model, per_sample_loss, pilot, source, progress, memory, check_gradients)

    def attempt(settings: Settings) -> Plan:
        plan = make_plan(model, settings, store, None if data is None else PilotRun(data, store))
        if data is not None and check_gradients and not data.verification:
            data.verify([module.layer for module in plan.mask.modules])
            plan.attributes["verification"] |= data.verification
        return plan

    plan = adjusting(settings, attempt)
    found = open_existing(store, plan)
    if found is None:
        GradientStore.create(
            store,
            plan.mask,
            storage=plan.storage,
            planned_rows=rows,
            ids=ids,
            columns=columns,
            **plan.create_options,
        ).close()
        remove_pilot(store)
        return GradientStore.open(store)
    kinds = (found.layout.ids, found.layout.columns)
    if kinds != (ids, dict(columns or {})):
        raise MismatchError(
            f"expected ids and columns as in the store at {store}, {kinds}; received {(ids, dict(columns or {}))}: "
            "give the same, or another path"
        )
    found.grow(rows)
    return GradientStore.open(store)


def row_types(
    batches: Batches, ids: RowSource | None, columns: Mapping[str, RowSource] | None
) -> tuple[int | None, str | None, dict[str, str]]:
    """Return the number of samples, where it is known, and the types of ids and columns that the samples have.

    Where they are functions of a batch, the first batch is read.

    Raises
    ------
    InputError
        If there is no first batch, or values have no type that can be stored.
    """
    metadata = RowMetadata.of(ids, columns)
    taken = {}
    if any(callable(source) for source in metadata.sources.values()):
        batch = next(iter(batches(0) if callable(batches) else batches), None)
        size = None if batch is None else batch_size(batch)
        if size is None:
            raise InputError("expected a first batch that tells its size; received none: give ids and columns as lists")
        taken = metadata.take(batch, 0, size)
    types = {name.removeprefix("columns/"): kind for name, kind in metadata.dtypes(taken).items()}
    return count_rows(batches), types.pop("example_id", None), types

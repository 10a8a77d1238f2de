"""The store an extraction writes: planned before it starts, created once the first batch worked, filled, resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ooc_influence.compress import RetainedEnergy, basis_weights
from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError, warn
from ooc_influence.extract.data import Batching, RowMetadata, Shard
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.packing import SignPacker
from ooc_influence.fingerprint import check_same, check_same_rows, checkpoint_names
from ooc_influence.linalg import KeptNorms, storage_scale
from ooc_influence.options import OnNonFinite
from ooc_influence.store import (
    Encoding,
    GradientStore,
    Mask,
    PathLike,
    Reduction,
    Representation,
    Storage,
    StoredReduction,
    check_extracted,
    check_free,
    check_writable,
    columns_digest,
    mark_dropped,
    missing_spans,
    parse_path,
    refuse_nonfinite,
    row_norms,
)

logger = logging.getLogger("ooc_influence")
Floats = npt.NDArray[np.float32]
_SKIPPED = np.finfo(np.float32).max  # the norm recorded for a row that was not finite


@dataclass(frozen=True)
class StorePlan:
    """Everything that determines what a store will hold."""

    mask: Mask
    reduction: Reduction | None  # the map that masked rows are multiplied by
    dtype: Representation
    attributes: dict[str, Any]  # recorded: how the rows are made
    storage: Storage  # chunking and codec, where the caller chose them
    check_model: bool  # whether another model than the store's is an error, or a warning
    kept_at: str | None = None  # the store that holds the reduction, if this one only refers to it

    @property
    def k(self) -> int:
        """Numbers stored per row."""
        return self.mask.k if self.reduction is None else self.reduction.columns

    @property
    def columns_digest(self) -> str:
        """Digest of what the columns mean: :attr:`GradientStore.columns_digest`."""
        return columns_digest(self.mask.digest, None if self.reduction is None else self.reduction.facts)

    @property
    def create_options(self) -> dict[str, Any]:
        """Arguments of :meth:`GradientStore.create`."""
        reduction: Any = self.reduction
        if self.kept_at is not None:
            reduction = {**reduction.facts, "path": self.kept_at}
        return {
            "dtype": self.dtype, "reduction": reduction, "column_scale": self.column_scale,
            "attributes": self.attributes,
        }  # fmt: skip

    @cached_property
    def column_scale(self) -> Floats | None:
        """What the columns of stored rows are divided by, (k,)."""
        return storage_scale(self.dtype, self.mask, self.reduction, self.attributes)

    @property
    def packs(self) -> bool:
        """Whether a batch's rows are handed over in their stored form: of signs, unless a reduction needs the rest."""
        return self.dtype == "sign" and not isinstance(self.reduction, StoredReduction)

    @cached_property
    def kept_norms(self) -> KeptNorms:
        """The columns of norms that are kept beside rows of signs."""
        return KeptNorms.of(self.dtype, self.mask, self.attributes, reduced=self.reduction is not None)

    @property
    def model(self) -> dict[str, Any]:
        """What is recorded about the model."""
        recorded: dict[str, Any] = self.attributes["model"]
        return recorded

    def weighted_by(self, metric: AdamMetric | None, model: torch.nn.Module) -> StorePlan:
        """Return the plan with the metric, if there is one, multiplied into the mask's weights."""
        if metric is None:
            return self
        mask, facts = metric.apply(self.mask, model)
        if facts["never_updated"]:
            warn(
                f"{facts['never_updated']} of {mask.k} kept entries were never updated by the optimiser; their weight "
                "is 0"
            )
        return replace(self, mask=mask, attributes=self.attributes | {"metric": facts})


def same_model(store: GradientStore, model: dict[str, Any], check: bool) -> dict[str, Any]:
    """Return what to record about a model that must be the one of ``store``; another is refused, or warned of."""
    if store.model_fingerprint == model["fingerprint"]:
        return model
    if check:
        check_same(
            store.path, {"model": store.model_fingerprint}, {"model": model["fingerprint"]},
            "names, shapes or values of its tensors differ: load the same checkpoint, or allow another with "
            "check_model=False (--other-model)",
        )  # fmt: skip
    warn(
        f"the model is not the one that {store.path} was made with; its rows are treated as comparable because of "
        "check_model=False (--other-model)"
    )
    recorded = store.attrs.get("model")
    expected: dict[str, Any] = dict(recorded) if isinstance(recorded, Mapping) else {"fingerprint": recorded}
    return {**expected, "other": [*expected.get("other", []), model["fingerprint"]]}


def requested_rows(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return which labels were asked for, by what a store recorded of them, how many samples, at which checkpoints."""
    labels = attributes.get("labels") or {"kind": "dataset"}  # of stores from before there were others
    return {
        "labels": labels.get("requested", labels), "sample": attributes.get("sample"),
        "checkpoints": checkpoint_names(attributes),
    }  # fmt: skip


def open_existing(path: PathLike, plan: StorePlan) -> GradientStore | None:
    """Open the store of an earlier run with the same settings, to resume it; None if there is none."""
    try:
        store = GradientStore.open(path, mode="a")
    except StoreNotFoundError:
        check_free(parse_path(path), "a store or nothing")
        check_writable(parse_path(path))
        return None
    check_extracted(store)
    digest = "selected layers (digest of mask and basis)"
    expected = {
        "compressor": store.attrs.get("compressor"), digest: store.columns_digest, "dtype": store.layout.dtype,
        "loss_kind": store.attrs.get("loss_kind"), **requested_rows(store.attrs), **store.layout.storage,
    }  # fmt: skip
    received = {
        "compressor": plan.attributes["compressor"], digest: plan.columns_digest, "dtype": plan.dtype,
        "loss_kind": plan.attributes["loss_kind"], **requested_rows(plan.attributes),
        **plan.storage.over(store.layout),
    }  # fmt: skip
    check_same(f"the store at {path}", expected, received, "extract to another path, or remove the store")
    if store.model_fingerprint != plan.model["fingerprint"]:
        store.record(model=same_model(store, plan.model, plan.check_model))
    return store


class Computed(NamedTuple):
    """Results for some samples, on the host.

    Attributes
    ----------
    losses : (b,) float32
        Per-sample losses.
    rows : (b, k) float32 or (b, columns) uint8
        The numbers stored of their gradients, or their stored form (:class:`SignPacker`).
    sums : (b, m) float64
        Beside a stored form, scales and the norms that are kept; else m is 0.
    norms : (b,) float32
        Norms of the masked gradients, before any reduction; of the whitened ones, where that is of these.
    """

    losses: Floats
    rows: npt.NDArray[Any]
    sums: npt.NDArray[np.float64]
    norms: Floats

    def _each(self, function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Computed:
        return Computed(*map(function, self))

    def room(self, rows: int) -> Computed:
        """Return uninitialised arrays for other ``rows`` rows."""
        return self._each(lambda values: np.empty((rows, *values.shape[1:]), values.dtype))

    def put(self, indices: npt.NDArray[np.int64], computed: Computed) -> None:
        """Write results at ``indices``; those out of range are ignored."""
        inside = (indices >= 0) & (indices < len(self.losses))
        pairs: Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = zip(self, computed, strict=True)
        for mine, values in pairs:
            mine[indices[inside]] = values[inside]

    def part(self, low: int, high: int) -> Computed:
        """Return samples ``low`` to ``high``."""
        return self._each(lambda values: values[low:high])

    @property
    def sizes(self) -> npt.NDArray[np.float64]:
        """The rows' norms, or of a stored form a number that is finite where they are, (b,)."""
        return row_norms(self.rows) if self.rows.dtype == np.float32 else self.sums.sum(axis=1) + self.norms

    def zeroing_nonfinite(self) -> Computed:
        """Return the results with zeros for rows that are not finite, marked by the norm ``_SKIPPED``."""
        bad = ~(np.isfinite(self.losses) & np.isfinite(self.norms) & np.isfinite(self.sizes))
        if not bad.any():
            return self
        cleared = self._each(
            lambda values: np.where(bad.reshape(-1, *[1] * (values.ndim - 1)), values.dtype.type(0), values)
        )
        cleared.norms[bad] = _SKIPPED
        return cleared


class Sink:
    """One writer's rows of a store, ``start`` to ``stop``, which is None for a store that grows.

    ``store`` is None until the first batch of a new store has been computed; ``plan`` is what it will hold.
    """

    def __init__(
        self, path: PathLike, plan: StorePlan, metadata: RowMetadata, batching: Batching, shard: Shard | None,
        total: int | None, on_nonfinite: OnNonFinite = "raise",
    ) -> None:  # fmt: skip
        if on_nonfinite not in ("raise", "skip"):
            raise InputError(f"expected on_nonfinite 'raise' or 'skip'; received {on_nonfinite!r}")
        self._skip, self._energy = on_nonfinite == "skip", RetainedEnergy()
        self.plan, self._path, self._metadata = plan, path, metadata
        self._first_row, self._shard, self._total = batching.first_row, shard, total
        self.start: int = batching.first_row
        self.stop: int | None = None
        self.store = open_existing(path, plan)
        if self.store is not None:
            self._claim(self.store)
        else:
            self._begin()

    def _begin(self) -> None:
        """Determine this writer's range of a store that is not there yet."""
        total = self._total
        if self._shard is None:
            self._check_gap(0)
        elif total is None:
            raise InputError(
                f"expected a store at {self._path} for several writers, since the number of samples is not known; "
                "received none: make it with init_store ('ooc-influence init') and give the rows"
            )
        else:
            chunk_rows, group_chunks = self._storage(total).sizes(self.plan.k, self.plan.dtype, total)
            self._set_range(total, chunk_rows * group_chunks)

    @property
    def _planned(self) -> int | None:
        """The planned rows of a new store; None for one that grows."""
        return self._total if self._shard is not None else None

    def _storage(self, rows: int | None) -> Storage:
        """Return the chunking of a new store: with groups small enough that every writer gets a share."""
        storage = self.plan.storage
        if self._shard is None or rows is None:
            return storage
        chunk_rows, group_chunks = storage.sizes(self.plan.k, self.plan.dtype, rows)
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
                "init_store ('ooc-influence init') with more rows extends the plan"
            )

    def _claim(self, store: GradientStore) -> None:
        planned = store.layout.planned_rows
        if planned is not None:
            self._set_range(planned, store.layout.group_rows)
            if self.start == self.stop:
                return  # there are more writers than groups of rows: none is left for this one
            writer = store.writer(self.start, self.stop)
        elif self._shard is not None:
            raise InputError(
                f"expected a store with planned rows at {self._path} for shard={self._shard.index, self._shard.count}; "
                "received one that grows by itself: make one with init_store ('ooc-influence init')"
            )
        else:
            writer = store.writer()
        self._restore_uncommitted(store)
        try:
            self._check_gap(writer.next_row)
        except InputError:
            store.close()
            raise

    def _restore_uncommitted(self, store: GradientStore) -> None:
        """Remove tombstones of rows that a killed run skipped but did not commit: their samples may have changed."""
        size, missing = store.layout.group_rows, missing_spans(store.records, store.layout, self.start, self.stop)
        for group in sorted(store.dropped_groups()) if missing else ():
            rows = slice(group * size, min((group + 1) * size, store.stored_rows))
            dropped = rows.start + np.flatnonzero(store.read("dropped", rows))
            uncommitted = [
                any(start <= row and (stop is None or row < stop) for start, stop in missing)
                for row in dropped.tolist()
            ]  # fmt: skip
            dropped = dropped[uncommitted]
            if dropped.size:
                dropped = dropped[store.read("grad_norm", rows)[dropped - rows.start] == _SKIPPED]
            if dropped.size:
                mark_dropped(store.path, store.layout, dropped, dropped=False)
                store.reload()

    def _check_gap(self, committed: int) -> None:
        if committed < self.start:
            raise InputError(
                f"expected first_row <= {committed}, the rows committed in {self._path}; received {self.start}: rows "
                "are appended without a gap"
            )

    @property
    def next_row(self) -> int:
        """The first row that is missing, which is written next."""
        if self.store is None or self.start == self.stop:
            return self.start
        return self.store.writer(self.start, self.stop).next_row

    @property
    def _encoding(self) -> Encoding:
        """The stored form of rows."""
        if self.store is not None:
            return self.store.layout.encoding
        return Encoding.of(self.plan.dtype, self.plan.k)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as :meth:`take` expects it."""
        return self._encoding.row_bytes if self.plan.packs else 4 * self.plan.k

    def packer(self, device: torch.device) -> SignPacker | None:
        """Return what makes rows' stored form on a device; None where :meth:`take` expects the numbers."""
        if not self.plan.packs:
            return None
        scale = self.plan.column_scale if self.store is None else self.store.column_scale
        return SignPacker(self._encoding, scale, self.plan.kept_norms, device)

    @property
    def finished(self) -> bool:
        """Whether the writer has an end and no row before it is missing."""
        return self.store is not None and self.stop is not None and self.next_row >= self.stop

    def own_rows(self, row: int, count: int) -> int:
        """Return how many of ``count`` rows from ``row`` on belong to this writer."""
        last = row + count if self.stop is None else min(row + count, self.stop)
        return max(0, last - max(row, self.start))

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the disk."""
        return 0.0 if self.store is None else self.store.waited

    def record(self, **attributes: Any) -> None:
        """Record something in the store's attributes, if this is its only writer."""
        if self.store is not None and self._shard is None:
            self.store.record(**attributes)

    def verified(self, facts: Mapping[str, Any]) -> None:
        """Record the result of comparing gathered entries with autograd; of several writers, the first does."""
        recorded = {**(self.plan.attributes.get("verification") or {}), **facts}
        self.plan.attributes["verification"] = recorded
        if self.store is not None and (self._shard is None or self._shard.index == 0):
            self.store.record(verification=recorded)

    def labels_drawn(self, drawn: bool) -> None:
        """Check, after a first batch, that the loss draws labels if they are to be sampled; otherwise record it.

        Raises
        ------
        InputError
            If several draws of labels were asked for and there are none.
        MismatchError
            If the rows of earlier runs have the data set's labels, and these do not.
        """
        labels = self.plan.attributes["labels"]
        if labels["kind"] != "sampled":
            return
        if drawn:
            before = None if self.store is None else self.store.attrs["labels"]["kind"]
            if before == "dataset":
                check_same(self._path, {"labels": before}, {"labels": "sampled"}, "extract to another path")
            return
        advice = "compute it by ooc_influence.cross_entropy, token_cross_entropy or a loss of ooc_influence.hf"
        if labels["draws"] > 1:
            raise InputError(
                f"expected a loss that draws labels, for draws={labels['draws']}; received one that has the data "
                f"set's only: {advice}"
            )
        warn(f"the loss draws no labels, so rows have the data set's labels, which is recorded: {advice}")
        self.plan.attributes["labels"] = {"kind": "dataset", "requested": labels}
        if self.store is not None and (self._shard is None or self._shard.index == 0):
            self.store.record(labels=self.plan.attributes["labels"])

    def take(self, batch: Any, row: int, computed: Computed) -> None:
        """Append the rows of a batch that are missing and belong to this writer; its first sample is store row ``row``.

        Raises
        ------
        NonFiniteError
            For NaN or Inf in what would be appended.
        MismatchError
            If committed rows have other losses or ids in the store.
        """
        count = len(computed.losses)
        metadata = self._metadata.take(batch, row - self._first_row, count)
        end = row + count if self.stop is None else min(row + count, self.stop)
        if self._skip:
            computed = computed.zeroing_nonfinite()
        if self.store is None:
            low = max(0, self.next_row - row)
            new, ids = computed.part(low, end - row), metadata.get("example_id")
            refuse_nonfinite(row + low, new.sizes, new.losses, ids[low : end - row] if ids else None)
            self._create(metadata)
        assert self.store is not None
        self.check_same_data(batch, row, computed.losses, min(max(0, self.next_row - row), count))
        while self.next_row < end:  # more than once where a repair left several gaps
            low, high = max(0, self.next_row - row), end - row
            rows_left = self.store.writer().rows_left
            if rows_left is not None:
                high = min(high, low + rows_left)
            self._append({name: values[low:high] for name, values in metadata.items()}, computed.part(low, high))

    def _append(self, metadata: Mapping[str, list[Any]], new: Computed) -> None:
        assert self.store is not None
        columns = {name.removeprefix("columns/"): values for name, values in metadata.items()}
        ids = columns.pop("example_id", None)
        skipped, first = new.norms == _SKIPPED, self.next_row
        small: dict[str, Any] = {"loss": new.losses, "grad_norm": new.norms, "ids": ids, "dropped": skipped}
        if self.plan.packs:
            columns |= dict(zip(self.plan.kept_norms.weights, new.sums.T[1:], strict=True))
            self.store.append_encoded(new.rows, new.sums[:, 0].astype(np.float32), columns=columns, **small)
        else:
            self.store.append(new.rows, columns=columns, **small)
        if skipped.any():
            logger.warning("rows %s are not finite: dropped", (first + np.flatnonzero(skipped)).tolist())
        if isinstance(self.plan.reduction, StoredReduction):
            weights = basis_weights(self.plan.attributes, self.plan.reduction.facts)
            self._energy = self._energy.plus(RetainedEnergy.of(new.rows, new.norms, new.losses, ~skipped, weights))

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

    def _create(self, metadata: Mapping[str, list[Any]]) -> None:
        dtypes = {name.removeprefix("columns/"): dtype for name, dtype in self._metadata.dtypes(metadata).items()}
        kept = dict.fromkeys(self.plan.kept_norms.weights, "float64")
        if dtypes.keys() & kept:
            raise InputError(
                f"expected no column called {', '.join(kept)}; received one: they are kept beside signs; rename it"
            )
        GradientStore.create(
            self._path,
            self.plan.mask,
            storage=self._storage(self._total),
            planned_rows=self._planned,
            ids=dtypes.pop("example_id", None),
            columns=dtypes | kept,
            exist_ok=True,  # another writer may have been first: open_existing checks that it is the same store
            **self.plan.create_options,
        )
        store = open_existing(self._path, self.plan)
        assert store is not None
        self._claim(store)
        self.store = store

    def check_same_data(self, batch: Any, row: int, losses: Floats, count: int | None = None) -> None:
        """Refuse a batch whose losses (b,) or ids differ from those stored for its first ``count`` rows."""
        low, high = max(row, self.start), row + (len(losses) if count is None else count)
        if self.store is None or low >= high or self.store.n < high:
            return
        stored = self.store.small("loss", low, high)
        losses = np.where(np.isfinite(losses), losses, 0)  # the loss stored for rows that were skipped
        advice = "the data or its order changed since; extract to another path"
        path = self.store.path
        # where the logits round differently, some tokens' labels are drawn differently
        sampled = self.plan.attributes["labels"]["kind"] == "sampled"
        rtol, agreeing = (5e-2, 0.5) if sampled else (1e-2, 1.0)
        received = losses[low - row : high - row]
        check_same_rows(path, low, {"losses": stored}, {"losses": received}, advice, rtol=rtol, agreeing=agreeing)
        ids = self._metadata.take(batch, row - self._first_row, len(losses)).get("example_id")
        if ids is not None:
            names = np.array(ids[low - row : high - row], object)
            check_same_rows(path, low, {"ids": self.store.ids(np.arange(low, high))}, {"ids": names}, advice)

    def commit(self) -> Any:
        """Commit what was appended; return how many rows there are, for :meth:`drop_from`."""
        if self.store is not None:
            self.store.flush()
        return self.next_row

    def drop_from(self, rows: Any) -> None:
        """Drop the rows that were appended since :meth:`commit` returned ``rows``.

        Raises
        ------
        MismatchError
            If the store has fewer rows.
        """
        there = self.next_row
        if there < rows:
            raise self._too_few(rows, there)
        if there > rows:
            assert self.store is not None
            self.store.drop(np.arange(rows, there))

    def _too_few(self, rows: int, there: int) -> MismatchError:
        return MismatchError(
            f"expected at least {rows} rows in {self._path}, as when the checkpoint was saved; received {there}: "
            "continue from an earlier checkpoint, or collect to another path"
        )

    def finish(self, **attributes: Any) -> None:
        """Record attributes of a finished store."""
        self.record(**attributes)

    def close(self) -> None:
        """Commit what is finished, and release the claim."""
        if self.store is not None:
            self.store.close()
            self._drop_skipped()
            energy = self._energy
            if self._shard is None:  # several writers would overwrite each other's sums
                energy = energy.record(self.store)
            energy.warn(self.store.path)

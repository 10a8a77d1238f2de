"""Rows of another tool as a store: an array, block by block, with ids, losses, columns and what its numbers are."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError
from ooc_influence.fingerprint import check_same, check_same_rows
from ooc_influence.interchange.blocks import ImportedBlock, Source
from ooc_influence.interchange.masks import describe_mask, is_unknown, unknown_mask
from ooc_influence.interchange.sources import open_source
from ooc_influence.linalg import KeptNorms, storage_scale
from ooc_influence.options import ImportOptions, takes
from ooc_influence.progress import Progress
from ooc_influence.store import (
    GradientStore,
    Mask,
    PathLike,
    Reduction,
    StorePath,
    as_store,
    check_free,
    check_writable,
    columns_digest,
    mark_dropped,
    parse_path,
    parse_representation,
    refuse_nonfinite,
    row_norms,
)

_CHECKED = 256  # rows written last that are compared before others follow
_ADVICE = "import to another path, or remove the store"


@takes(ImportOptions)
def import_rows(rows: Any, store: PathLike, **options: Unpack[ImportOptions]) -> GradientStore:
    """Write rows that something else computed to a store, or resume.

    Everything that needs rows alone works with it: curvatures, scores, lists, self-influence, selection, reduction.
    What runs the model again (query stores extracted like it, tokens, re-ranking, checks) is refused: import the
    queries too, ``like=`` this store.

    Parameters
    ----------
    rows : (n, k) array, iterable of (b, k) arrays, or path
        NumPy's arrays, mapped or not, Zarr's and Dask's are read some rows at a time; a path is of a ``.npy`` file, or
        of a ``.parquet`` file with a column of lists. They are stored as float32 numbers, in ``dtype``.
    store : path
        The store to make. One that an interrupted import left continues where it was, or after more rows came; an
        iterable begins at the first row again.
    **options : ImportOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GradientStore
        Open for reading, (n, k).

    Raises
    ------
    InputError
        For what is no array of rows, values that do not fit it, or a mask that does not.
    NonFiniteError
        For NaN or Inf, unless ``on_nonfinite="skip"``; rows before stay.
    MismatchError
        If ``store`` is of something else, or of other rows.
    StoreExistsError, StoreBusyError, StoreWriteError
        As for :meth:`GradientStore.create` and :meth:`GradientStore.append`.
    """
    source, path = open_source(rows, options), parse_path(store)
    if options["on_nonfinite"] not in ("raise", "skip"):
        raise InputError(f"expected on_nonfinite 'raise' or 'skip'; received {options['on_nonfinite']!r}")
    plan = _Plan.of(source, path, options)
    skip = options["on_nonfinite"] == "skip"
    blocks: Iterator[ImportedBlock] | None = None
    target = plan.open(path, source)
    if target is None:  # a store is made once the first block has proved to be one
        blocks = source.blocks(0)
        blocks = chain([_checked(next(blocks), skip)], blocks)
        target = plan.create(path, source)
    with target, Progress("import", source.n, options["progress"]) as bar:
        start = target.writer(0, target.layout.planned_rows).next_row
        _forget_uncommitted(target, start)
        bar.advance(start)
        stop = 0
        for block in source.blocks(max(0, start - _CHECKED)) if blocks is None else blocks:
            cleaned, dropped = _clean(block, skip)
            stop = block.start + len(block.rows)
            known = min(len(block.rows), max(0, start - block.start))
            if known:
                plan.check_written(target, cleaned.part(0, known))
            if known < len(block.rows):
                plan.append(target, cleaned.part(known, len(block.rows)), dropped[known:])
                bar.advance(len(block.rows) - known)
        if stop < start:
            raise _too_few(target, stop)
    written = GradientStore.open(path, "a")
    if source.n is not None:
        written.plan_rows(None)
    return GradientStore.open(path)


@dataclass(frozen=True)
class _Plan:
    """What a store of imported rows holds.

    Attributes
    ----------
    mask : Mask or None
        What is known of the numbers; None for nothing.
    reduction : Reduction, mapping or None
        What masked rows were multiplied by.
    dtype : str
        Representation.
    attributes : dict
        What is recorded.
    options : ImportOptions
        As asked.
    """

    mask: Mask | None
    reduction: Reduction | dict[str, Any] | None
    dtype: Any
    attributes: dict[str, Any]
    options: ImportOptions

    @classmethod
    def of(cls, source: Source, path: StorePath, options: ImportOptions) -> _Plan:
        """Return what a source's rows are, from a mask, another store, or nothing."""
        like, description = options["like"], options["mask"]
        dtype = parse_representation(options["dtype"] or "float32")
        facts = {"mask": "described" if description is not None else "unknown", "loss": source.has_loss}
        attributes: dict[str, Any] = {"loss_kind": options["loss_kind"], "imported": facts}
        if like is None:
            mask = None if description is None else describe_mask(description, source.k)
            return cls(mask, None, dtype, attributes, options)
        if description is not None:
            raise InputError("expected mask or like (--mask, --like); received both: like has the mask")
        train = as_store(like)
        if train.path == path:
            raise InputError(f"expected a store to import to apart from the one it is like; received {path} for both")
        if train.k != source.k:
            raise InputError(f"expected rows of {train.k} numbers, as in {train.path}; received {source.k}")
        names = ("model", "compressor", "covered", "metric")
        attributes |= {name: train.attrs[name] for name in names if name in train.attrs}
        attributes["loss_kind"] = options["loss_kind"] or train.attrs.get("loss_kind")
        facts["mask"] = f"like {train.path}"
        reduction: Any = train.reduction
        if reduction is not None and train.basis_path is not None:
            reduction = {**reduction.facts, "path": train.basis_path}
        return cls(train.mask, reduction, dtype, attributes, options)

    def open(self, path: StorePath, source: Source) -> GradientStore | None:
        """Open the store of an earlier import; None where there is none."""
        try:
            target = GradientStore.open(path, "a")
        except StoreNotFoundError:
            check_free(path, "a store or nothing")
            check_writable(path)
            return None
        self._check_same(target, source)
        n = source.n
        if n is not None and n < target.n:
            raise _too_few(target, n)
        if n is not None and target.n < n != target.layout.planned_rows:
            target.plan_rows(n)
        return target

    def create(self, path: StorePath, source: Source) -> GradientStore:
        """Make an empty store."""
        mask = self.mask or unknown_mask(source.k)
        kept = self._kept(mask)
        reduction = None if isinstance(self.reduction, dict) else self.reduction
        return GradientStore.create(
            path, mask, dtype=self.dtype, storage=self.options["storage"], planned_rows=source.n,
            ids=source.dtypes.get("example_id"),
            columns=_columns(source.dtypes) | dict.fromkeys(kept.weights, "float64"), reduction=self.reduction,
            column_scale=storage_scale(self.dtype, mask, reduction, self.attributes), attributes=self.attributes,
        )  # fmt: skip

    def _kept(self, mask: Mask) -> KeptNorms:
        return KeptNorms.of(self.dtype, mask, self.attributes, reduced=self.reduction is not None)

    def _check_same(self, target: GradientStore, source: Source) -> None:
        if "imported" not in target.attrs:
            raise MismatchError(
                f"expected a store of imported rows at {target.path}; received another: import to another path"
            )
        layout = target.layout
        digest = target.columns_digest
        if self.mask is not None:
            facts: Any = self.reduction.facts if isinstance(self.reduction, Reduction) else self.reduction
            digest = columns_digest(self.mask.digest, facts)
        unknown = "unknown" if is_unknown(target.mask) and self.mask is None else target.attrs["imported"]["mask"]
        kept = self._kept(target.mask).weights
        expected = {
            "mask": unknown, "digest of the mask": target.columns_digest, "numbers a row": layout.k,
            "dtype": layout.dtype, "ids": layout.ids,
            "columns": _without(layout.columns, kept),
            "loss_kind": target.attrs.get("loss_kind"), "losses": target.attrs["imported"]["loss"],
        }  # fmt: skip
        received = {
            "mask": self.attributes["imported"]["mask"], "digest of the mask": digest, "numbers a row": source.k,
            "dtype": self.dtype, "ids": source.dtypes.get("example_id"),
            "columns": _without(_columns(source.dtypes), kept),
            "loss_kind": self.attributes["loss_kind"], "losses": source.has_loss,
        }  # fmt: skip
        check_same(f"the store at {target.path}", expected, received, _ADVICE)

    def append(self, target: GradientStore, block: ImportedBlock, dropped: npt.NDArray[np.bool_]) -> None:
        """Append a block, whose dropped rows are zeros."""
        small = _small(block)
        columns = small.pop("columns") | self._kept(target.mask).columns(block.rows)
        target.append(block.rows, columns=columns, dropped=dropped if dropped.any() else None, **small)

    def check_written(self, target: GradientStore, block: ImportedBlock) -> None:
        """Check that rows written by an earlier import are those of a block.

        Raises
        ------
        MismatchError
            If they are not.
        """
        low, high = block.start, block.start + len(block.rows)
        form, small = target.layout.encoding, _small(block)
        raw, scale = np.empty((high - low, form.columns), form.dtype), np.empty(high - low, np.float32)
        form.encode_into(block.rows, raw, scale, target.column_scale)
        expected = {
            "numbers": np.ones(high - low, np.bool_), "losses": target.small("loss", low, high),
            "norms": target.small("grad_norm", low, high),
        }  # fmt: skip
        received = {
            "numbers": (raw == target.raw_rows(low, high)).all(axis=1), "losses": np.asarray(small["loss"], np.float32),
            "norms": np.asarray(row_norms(block.rows) if small["grad_norm"] is None else small["grad_norm"], "f4"),
        }  # fmt: skip
        if target.layout.ids:
            expected["ids"], received["ids"] = target.small("example_id", low, high), np.asarray(small["ids"])
        check_same_rows(target.path, low, expected, received, f"the rows or their order changed since; {_ADVICE}")


def _too_few(store: GradientStore, rows: int) -> MismatchError:
    return MismatchError(
        f"expected the {store.n} rows of {store.path}, or more; received {rows}: import to another path, or remove the "
        "store"
    )


def _without(columns: Mapping[str, str], names: Container[str]) -> dict[str, str]:
    return {name: kind for name, kind in columns.items() if name not in names}


def _columns(dtypes: dict[str, str]) -> dict[str, str]:
    return {
        name.removeprefix("columns/"): kind for name, kind in dtypes.items() if name.startswith("columns/")
    }  # fmt: skip


def _small(block: ImportedBlock) -> dict[str, Any]:
    """Return the values of a block as :meth:`GradientStore.append` takes them."""
    values = block.values
    columns = {name.removeprefix("columns/"): each for name, each in values.items() if name.startswith("columns/")}
    loss = values.get("loss")
    return {
        "loss": np.zeros(len(block.rows), np.float32) if loss is None else loss, "grad_norm": values.get("grad_norm"),
        "ids": values.get("example_id"), "columns": columns,
    }  # fmt: skip


def _checked(block: ImportedBlock, skip: bool) -> ImportedBlock:
    """Return a block, whose rows must be finite if they are not to be skipped; raise NonFiniteError."""
    if not skip:
        small = _small(block)
        refuse_nonfinite(block.start, row_norms(block.rows), np.asarray(small["loss"], np.float32), small["ids"])
    return block


def _clean(block: ImportedBlock, skip: bool) -> tuple[ImportedBlock, npt.NDArray[np.bool_]]:
    """Return a block with zeros for rows that are not finite, if these are to be skipped, and which they are, (b,)."""
    sizes = row_norms(block.rows)
    for name in ("loss", "grad_norm"):
        if name in block.values:
            with np.errstate(over="ignore", invalid="ignore"):
                sizes = sizes + np.abs(np.asarray(block.values[name], np.float32))
    bad = ~np.isfinite(sizes)
    if not skip or not bad.any():
        return block, np.zeros(len(bad), np.bool_)
    values = {
        name: np.where(bad, each.dtype.type(0), each) if name in ("loss", "grad_norm") else each
        for name, each in block.values.items()
    }
    return replace(block, rows=np.where(bad[:, None], np.float32(0), block.rows), values=values), bad


def _forget_uncommitted(store: GradientStore, start: int) -> None:
    """Remove tombstones of rows that a killed import dropped but did not commit: they may be others now."""
    size = store.layout.group_rows
    for group in sorted(store.dropped_groups()):
        rows = slice(group * size, min((group + 1) * size, store.stored_rows))
        dropped = rows.start + np.flatnonzero(store.read("dropped", rows))
        if (dropped >= start).any():
            mark_dropped(store.path, store.layout, dropped[dropped >= start], dropped=False)
            store.reload()

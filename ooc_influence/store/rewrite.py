"""New stores from old ones (merged, or without the dropped rows), and upgrading stores of older formats in place.

Rows are copied in their stored form, bit by bit. Where a chunk of a source is a chunk of the new store, its file is
linked (or copied, across file systems) instead of written; its rows are still read once and checked against their
commit record.

Format 1 to 2: every group gets its file of commit records, the groups with dropped rows are listed, the attributes get
a digest. Format 2 to 3: only the number changes; int8 and int4 rows stay without blocks, and so do rows appended later.
The last write decides: an interrupted upgrade leaves a readable store of the old format and is simply repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ooc_influence.errors import InputError, StoreDamagedError
from ooc_influence.fingerprint import array_digest, check_same, checkpoint_names
from ooc_influence.progress import Progress
from ooc_influence.store import commits, local, paths
from ooc_influence.store.arrays import open_group, writable_array
from ooc_influence.store.claim import make_claim
from ooc_influence.store.commits import SmallValues, list_tombstone_groups, mark_dropped
from ooc_influence.store.gradient_store import GradientStore, as_store, create_store
from ooc_influence.store.layout import FORMAT_VERSION, TOMBSTONES, Storage, write_attributes
from ooc_influence.store.paths import PathLike, array_store, is_local, not_free, parse_path
from ooc_influence.store.reader import repeated_ids
from ooc_influence.store.view import StoreView
from ooc_influence.store.writer import RangeWriter


def merge_stores(
    sources: Sequence[GradientStore | PathLike],
    out: PathLike,
    *,
    move: bool = False,
    progress: bool | None = None,
) -> GradientStore:
    """Concatenate stores of one mask and model into a new one; the sources stay as they are.

    Parameters
    ----------
    sources : sequence of GradientStore or path
        At least one; their rows follow each other in this order. Dropped rows stay dropped.
    out : path
        The store to make.
    move : bool
        Remove each source once the new store holds all rows.
    progress : bool, optional
        Show a progress line; silent by default.

    Returns
    -------
    GradientStore
        Open for reading; (sum of n, k).

    Raises
    ------
    MismatchError
        If masks, models, loss kinds, representations, ids or columns differ.
    InputError
        If an id is in two of the stores, or a source is not finished.
    StoreExistsError
        If something is at ``out``.
    StoreDamagedError
        If a chunk of a source does not match its commit record.
    """
    stores = [as_store(source) for source in sources]
    if not stores:
        raise InputError("expected stores to merge; received none")
    for store in stores:
        _check_alike(stores[0], store)
        if store.committed > store.n or (store.layout.planned_rows or 0) > store.n:
            raise InputError(
                f"expected finished stores to merge; received {store.path} with rows missing: finish or repair it first"
            )
    if len({str(store.path) for store in stores} | {str(parse_path(out))}) <= len(stores):
        raise InputError("expected different stores to merge into another; received one of them twice")
    merged = _create_same(stores[0], out, [str(store.path) for store in stores])
    with merged, Progress("merge", sum(store.n for store in stores), progress) as bar:
        writer = merged.writer()
        for store in stores:
            for chunk in range(-(-store.n // store.layout.chunk_rows)):
                bar.advance(_move_chunk(store, chunk, writer))
    merged.reload()
    again = next(repeated_ids(merged), None)
    if again is not None:
        paths.remove_tree(merged.path)
        raise InputError(f"expected ids that do not repeat; received stores where {again}: rename them, or compact one")
    if move:
        for store in stores:
            paths.remove_tree(store.path)
    return GradientStore.open(merged.path)


def _check_alike(first: GradientStore, other: GradientStore) -> None:
    def facts(store: GradientStore) -> dict[str, Any]:
        layout, scale = store.layout, store.column_scale
        return store.fingerprints | {
            "loss_kind": store.attrs.get("loss_kind"),
            "labels": (store.attrs.get("labels") or {}).get("kind", "dataset"),
            "checkpoints": checkpoint_names(store.attrs),
            "dtype": layout.dtype,
            "block": layout.block,
            "column_scale": None if scale is None else array_digest(scale),
            "ids": layout.ids,
            "columns": layout.columns,
        }

    check_same(
        first.path, facts(first), facts(other), "extract one of them again, with like= (--like) the other",
        other=other.path,
    )  # fmt: skip


def _inherited(store: GradientStore, sources: list[str]) -> dict[str, Any]:
    """Return the attributes that a store made of another's rows takes over: not those of its own rows only."""
    fixed = {"format", "version", "created", "p", "mask_digest", "reduction", "layout", "digest"}
    of_its_rows = {"reduced", "measured"}
    kept = {name: value for name, value in store.attrs.items() if name not in fixed | of_its_rows}
    if len(sources) > 1 and kept.get("origin"):  # each file numbers its own documents
        kept["origin"] = {**kept["origin"], "documents": None}
    return kept | {"made_from": sources}


def create_like(store: GradientStore, out: PathLike, sources: list[str], **changes: Any) -> GradientStore:
    """Create an empty store with the settings of another, but for ``changes``: arguments of :meth:`create`, ``mask``.

    ``attributes`` are added to those it has.
    """
    layout = store.layout
    settings = {
        "dtype": layout.dtype,
        "storage": Storage(layout.chunk_rows, layout.group_chunks, layout.codec),
        "ids": layout.ids,
        "columns": layout.columns,
        "reduction": store.reduction,
        "column_scale": store.column_scale,
    }
    attributes = _inherited(store, sources) | changes.pop("attributes", {})
    mask = changes.pop("mask", store.mask)
    return GradientStore.create(out, mask, attributes=attributes, **(settings | changes))


def _create_same(store: GradientStore, out: PathLike, sources: list[str], ids: str | None = None) -> GradientStore:
    """Create an empty store that grows, whose rows have exactly the stored form of another's."""
    target = parse_path(out)
    layout = replace(store.layout, planned_rows=None, ids=store.layout.ids or ids)
    attributes = _inherited(store, sources)
    if not create_store(target, layout, store.mask, store.reduction, attributes, store.column_scale):
        raise not_free(target)
    return GradientStore.open(target, "a")


def _read_checked(store: GradientStore, chunk: int) -> tuple[Any, SmallValues]:
    """Return a chunk's rows in their stored form and its other values, checked against its record."""
    start = chunk * store.layout.chunk_rows
    stop = min(store.n, start + store.layout.chunk_rows)
    raw = store.raw_rows(start, stop)
    small = {name: store.small(name, start, stop) for name in store.layout.row_arrays}
    if commits.checksum([raw, *small.values()]) != commits.crc_of(int(store.records[chunk])):
        raise StoreDamagedError(
            f"expected rows {start}-{stop} of {store.path} to match their commit record; received other bytes: "
            "'ooc-influence verify' lists what else is damaged"
        )
    return raw, small


def _move_chunk(store: GradientStore, chunk: int, writer: RangeWriter) -> int:
    """Append a chunk to a writer, by a link where possible; return its rows."""
    raw, small = _read_checked(store, chunk)
    rows = store.layout.chunk_rows
    aligned = writer.next_row % rows == 0 and len(raw) == rows and is_local(store.path)
    source = store.path / "gradients" / f"c.{chunk}.0" if aligned else None
    dropped = store.small("dropped", chunk * rows, chunk * rows + len(raw)) if store.has_dropped else None
    writer.append_raw(raw, small, source, dropped)  # type: ignore[arg-type]
    return len(raw)


def compact_store(store: GradientStore | PathLike, out: PathLike, *, progress: bool | None = None) -> GradientStore:
    """Write a new store without the dropped rows; the source stays as it is.

    Row numbers change. If the source has no ids, the new store gets its row numbers as ids, so that rows can still be
    identified.

    Parameters
    ----------
    store : GradientStore or path
        The store to rewrite.
    out : path
        The store to make.
    progress : bool, optional
        Show a progress line; silent by default.

    Returns
    -------
    GradientStore
        Open for reading; (live rows, k).

    Raises
    ------
    InputError
        If rows are missing.
    StoreExistsError, StoreDamagedError
        As for :func:`merge_stores`.
    """
    source = as_store(store)
    if source.committed > source.n:
        raise InputError(f"expected a store without gaps; received {source.path}: finish or repair it first")
    compacted = _create_same(source, out, [str(source.path)], ids="int64")
    with compacted, Progress("compact", source.n, progress) as bar:
        writer = compacted.writer()
        for chunk in range(-(-source.n // source.layout.chunk_rows)):
            raw, small = _read_checked(source, chunk)
            start = chunk * source.layout.chunk_rows
            live = ~source.small("dropped", start, start + len(raw))
            small = {"example_id": start + np.arange(len(raw)), **small} if source.layout.ids is None else small
            if live.any():
                writer.append_raw(raw[live], {name: values[live] for name, values in small.items()})
            bar.advance(len(raw))
    return GradientStore.open(compacted.path)


def upgrade_store(path: PathLike) -> bool:
    """Upgrade a store to the present format; return whether there was anything to do.

    Raises
    ------
    StoreBusyError
        If another process writes to it.
    StoreDamagedError
        If its commit records have a gap.
    """
    store = GradientStore.open(path)
    if store.attrs["format"] == FORMAT_VERSION:
        return False
    claim = make_claim(store.path, 0, store.layout.planned_rows)
    try:
        store.reload()
        if store.attrs["format"] == 1:
            _upgrade_first(store)
        write_attributes(store.path, {**store.attrs, "format": FORMAT_VERSION, "layout": store.layout.to_dict()})
    finally:
        claim.release()
    return True


def _upgrade_first(store: GradientStore) -> None:
    files = array_store(store.path)
    group = open_group(files, "r+")
    records: commits.Records = np.asarray(store.records)
    writable_array(group, "commits")[...] = records
    group.require_group(TOMBSTONES)
    list_tombstone_groups(files, store.dropped_groups())
    if is_local(store.path):  # locks of the old format
        for name in paths.names(store.path / "commits"):
            if name.startswith(".claim-") and not name.rpartition(".")[2].isdigit():
                paths.remove_file(store.path / "commits" / name)
        local.sync_tree(store.path)
    files.sync_folders()


def copy_tombstones(source: StoreView, target: StoreView) -> None:
    """Mark as dropped in ``target`` the rows that are dropped in ``source``, including rows still to be written.

    Raises
    ------
    StoreBusyError, StoreWriteError
        See :func:`mark_dropped`.
    """
    size = source.layout.group_rows
    for group in sorted(source.dropped_groups()):
        rows = slice(group * size, min(source.n, (group + 1) * size))
        missing = np.flatnonzero(source.read("dropped", rows) & ~target.read("dropped", rows))
        if missing.size:
            mark_dropped(target.path, target.layout, rows.start + missing)

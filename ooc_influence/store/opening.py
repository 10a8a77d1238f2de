"""Opening a store's folder: whether it is one, of a format this version reads, with metadata that fit together.

Nothing from a store is run: its attributes and metadata are JSON, checked value by value (:mod:`.metadata`); no array
holds Python objects other than text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ooc_influence._version import __version__
from ooc_influence.errors import StoreDamagedError, StoreFormatError, StoreNotFoundError, StoreReadError, refused
from ooc_influence.store import commits, place
from ooc_influence.store.arrays import open_group, read_whole
from ooc_influence.store.layout import ATTRIBUTES, FORMAT_VERSION, READABLE_VERSIONS, Layout
from ooc_influence.store.metadata import METADATA
from ooc_influence.store.place import StorePath, array_store, is_local

_REQUIRED = {"format": int, "layout": dict, "mask_digest": str, "created": dict, "p": int}


def open_store(path: StorePath) -> tuple[dict[str, Any], Layout, Any, dict[str, Any]]:
    """Return a store's attributes, its layout, its Zarr group to read from, and its arrays by name.

    Raises
    ------
    StoreNotFoundError
        If there is none.
    StoreReadError
        If this user may not read it.
    StoreFormatError
        If it is not a store, of a format this version does not read, or its metadata contradict each other.
    """
    _check_there(path)
    attrs = read_attributes(path)
    layout = Layout.from_dict(attrs["layout"], path)
    may_lack = ["dropped"] if attrs["format"] > 1 else ["dropped", "commits"]
    files = array_store(path, read_only=True, chunk_bytes=layout.chunk_sizes, may_lack=may_lack)
    group = open_group(files, "r")
    arrays = {name: open_array(group, name, path) for name in layout.arrays}
    for name, array in arrays.items():
        layout.check_array(name, array, path)
    place.remember_opened(path)
    return attrs, layout, group, arrays


def _check_there(path: StorePath) -> None:
    try:
        if place.is_file(path / METADATA):
            return
        found = "a folder without one" if place.exists(path) else "no such path"
    except Exception as error:  # whatever an object store's client makes of a bucket, key or permission
        if is_local(path) and isinstance(error, OSError):
            raise StoreReadError(refused(f"to read the store at {path}", error)) from error
        raise StoreNotFoundError(
            f"expected a gradient store at {path}; received {type(error).__name__}: {error}: check the URL, the "
            "credentials and the endpoint"
        ) from error
    raise StoreNotFoundError(
        f"expected a gradient store at {path}; received {found}: make one with extract_gradients or "
        "'ooc-influence extract'"
    )


def check_lengths(array: Callable[[str], Any], layout: Layout, records: commits.Records) -> None:
    """Check that every per-row array is as long as the rows committed in it: Zarr clips what lies behind an end.

    Parameters
    ----------
    array : callable
        Returns an array by name.

    Raises
    ------
    StoreDamagedError
        Naming the first that is not.
    """
    held = np.flatnonzero(records)
    if not held.size:
        return
    rows = int(held[-1]) * layout.chunk_rows + int(commits.rows_in(records)[held[-1]])
    for name in ("gradients", "dropped", *layout.row_arrays):
        length = array(name).shape[0]
        if length < rows:
            raise StoreDamagedError(
                f"expected {rows} rows in array {array(name).store_path}; received {length}: its zarr.json was edited "
                "or damaged; restore it from a backup"
            )


def read_attributes(path: StorePath) -> dict[str, Any]:
    """Return what a store's root says about it, checked.

    Raises
    ------
    StoreFormatError
        If it is not a store's, or of a format this version does not read.
    """
    try:
        group = open_group(array_store(path, read_only=True), "r")
        attrs: Any = dict(group.attrs).get(ATTRIBUTES)
    except (ValueError, TypeError, AttributeError, KeyError, FileNotFoundError) as error:
        raise StoreFormatError(
            f"expected a gradient store at {path}; received a zarr.json that cannot be read ({error}): "
            "restore it from a backup"
        ) from error
    fits = isinstance(attrs, dict) and all(isinstance(attrs.get(name), kind) for name, kind in _REQUIRED.items())
    if not fits or not isinstance(attrs["created"].get("id"), str) or not _tells_reduction(attrs.get("reduction")):
        raise StoreFormatError(
            f"expected a gradient store at {path}; received another Zarr group: give the folder that "
            "extract_gradients wrote"
        )
    if attrs["format"] not in READABLE_VERSIONS:
        raise StoreFormatError(
            f"expected store format {FORMAT_VERSION} at {path}; received {attrs['format']}: "
            f"upgrade ooc_influence (this is {__version__})"
        )
    if attrs["format"] > 1 and attrs.get("digest") != attributes_digest(attrs):
        raise StoreFormatError(
            f"expected the attributes of {path} as they were written; received others: zarr.json was edited or "
            "damaged; restore it from a backup"
        )
    return dict(attrs)


def _tells_reduction(facts: Any) -> bool:
    return facts is None or (
        isinstance(facts, dict) and all(isinstance(facts.get(name), str) for name in ("name", "digest"))
    )


def attributes_digest(attrs: Mapping[str, Any]) -> str:
    """Return the SHA-256 over a store's attributes, themselves stored without it."""
    rest = {name: value for name, value in attrs.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_array(group: Any, name: str, where: object) -> Any:
    """Return an array of a store.

    Raises
    ------
    StoreFormatError
        If its metadata are not possible.
    """
    try:
        return group[name]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreFormatError(
            f"expected array {name!r} in {where}; received metadata that cannot be read ({error}): restore its "
            "zarr.json from a backup"
        ) from error


def read_records(array: Any, layout: Layout, version: int) -> commits.Records:
    """Return the commit records of a store, from their array.

    Raises
    ------
    StoreDamagedError
        If a file of them is missing or damaged.
    """
    records: commits.Records = np.asarray(read_whole(array))
    if version == 1 and layout.planned_rows is None:  # there a missing file reads as zeros
        rows = commits.rows_in(records)
        seen, held = commits.leading_rows(records, layout.chunk_rows), int(rows.sum())
        if held > seen:
            raise StoreDamagedError(
                f"expected the commit records {array.store_path} without a gap; received {seen} rows before one "
                f"and {held} in all: a file of 'commits' is missing or damaged; restore it from a backup"
            )
    return records


def read_damaged_records(array: Any, layout: Layout) -> tuple[commits.Records, list[tuple[tuple[int, int], str]]]:
    """Return the commit records of a store, zero where a file of them cannot be read, and which rows those are."""
    records = np.zeros(array.shape, np.uint64)
    damaged = []
    for start in range(0, len(records), layout.group_chunks):
        stop = min(len(records), start + layout.group_chunks)
        try:
            records[start:stop] = array[start:stop]
        except (ValueError, StoreDamagedError) as error:
            rows = (start * layout.chunk_rows, stop * layout.chunk_rows)
            damaged.append((rows, f"commit records: {error}"))
    return records, damaged

"""Opening a store's folder: whether it is one, of a format this version reads, with metadata that fit together.

Nothing from a store is run: its attributes and metadata are JSON, checked value by value (:mod:`.metadata`); no array
holds Python objects other than text.
"""

from __future__ import annotations

import datetime
import json
import socket
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ooc_influence._version import __version__
from ooc_influence.errors import (
    InputError,
    StoreBusyError,
    StoreDamagedError,
    StoreExistsError,
    StoreFormatError,
    StoreNotFoundError,
    StoreReadError,
    StoreWriteError,
    refused,
)
from ooc_influence.fingerprint import json_digest
from ooc_influence.store import commits, paths
from ooc_influence.store.arrays import create_array, open_group, read_whole
from ooc_influence.store.claim import Claim, claimed_rows, make_claim, may_write, read_claims
from ooc_influence.store.commits import Committer
from ooc_influence.store.encoding import FloatRows
from ooc_influence.store.layout import ATTRIBUTES, FORMAT_VERSION, READABLE_VERSIONS, Layout
from ooc_influence.store.local import METADATA
from ooc_influence.store.mask import Mask
from ooc_influence.store.paths import NewFolder, StorePath, array_store, is_local
from ooc_influence.store.reduction import Reduction

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
    paths.remember_opened(path)
    return attrs, layout, group, arrays


def _check_there(path: StorePath) -> None:
    try:
        if paths.is_file(path / METADATA):
            return
        found = "a folder without one" if paths.exists(path) else "no such path"
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
    return json_digest(rest)


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


def create_store(
    path: StorePath,
    layout: Layout,
    mask: Mask,
    reduction: Reduction | Mapping[str, Any] | None,
    attributes: Mapping[str, Any],
    column_scale: FloatRows | None,
) -> bool:
    """Write a store without rows; return False where something else is at ``path``.

    Raises
    ------
    StoreWriteError
        If the disk refuses.
    """
    claim = None
    try:
        if paths.is_file(path / METADATA):
            return False
        if not is_local(path):  # built in place: two that do so at once would mix
            claim = Claim(path, name="create")
        with NewFolder(path) as folder:
            group = open_group(folder.arrays, "w")
            layout.create_arrays(group)
            if column_scale is not None:
                create_array(group, "column_scale", (layout.k,), (layout.k,), "float32", check=True, dims=("column",))[
                    ...
                ] = column_scale
            mask.save(group)
            if isinstance(reduction, Reduction):
                reduction.save(group)
            group.create_group("curvature")
            attrs = json.loads(
                json.dumps(dict(attributes) | _fixed(layout, mask, reduction))
            )  # as they will be read back
            group.attrs[ATTRIBUTES] = attrs | {"digest": attributes_digest(attrs)}
            return folder.publish()
    except OSError as error:
        if isinstance(error, (StoreBusyError, StoreExistsError)):
            raise
        raise StoreWriteError(refused(f"to make a store at {path}", error, ", or choose another path")) from error
    finally:
        if claim is not None:
            claim.release()


def _fixed(layout: Layout, mask: Mask, reduction: Reduction | Mapping[str, Any] | None) -> dict[str, Any]:
    created = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "id": uuid.uuid4().hex,
    }
    fixed = {"format": FORMAT_VERSION, "version": __version__, "created": created, "p": mask.p}
    facts = reduction.facts if isinstance(reduction, Reduction) else reduction
    return fixed | {"mask_digest": mask.digest, "reduction": facts and dict(facts), "layout": layout.to_dict()}


def parse_column_scale(column_scale: Any, k: int) -> FloatRows | None:
    """Return column scales as (k,) float32.

    Raises
    ------
    InputError
        If they are not positive and finite, one a column.
    """
    if column_scale is None:
        return None
    found = np.asarray(column_scale, np.float32)
    if found.shape != (k,) or not (np.isfinite(found) & (found > 0)).all():
        raise InputError(f"expected {k} positive column scales; received shape {found.shape}, or some that are not")
    return found


def write_attributes(path: StorePath, attributes: Mapping[str, Any]) -> None:
    """Replace a store's attributes, in one write of one file."""
    files = array_store(path)
    attrs = json.loads(json.dumps({name: value for name, value in attributes.items() if name != "digest"}))
    open_group(files, "r+").attrs[ATTRIBUTES] = attrs | {"digest": attributes_digest(attrs)}
    files.sync_folders()


def grow_store(path: StorePath, layout: Layout, records: Any, rows: int) -> None:
    """Give a planned store room for ``rows`` rows in all; readers opened before see what they opened.

    Raises
    ------
    InputError
        If the store is not a planned one, or has more already.
    StoreBusyError
        If a range of it is being written.
    """
    planned = layout.planned_rows
    if planned is None or rows < planned:
        received = "one that grows by itself" if planned is None else f"one planned for {planned}"
        raise InputError(f"expected a store planned for at most {rows} rows at {path}; received {received}")
    plan_rows(path, layout, records, rows)


def plan_rows(path: StorePath, layout: Layout, records: Any, rows: int | None) -> None:
    """Fix how many rows a store will have, for several writers to divide; None: it grows by appending again.

    Raises
    ------
    InputError
        For fewer rows than are committed, or None while planned ones are missing.
    StoreBusyError
        If a range of it is being written.
    """
    held, planned = commits.leading_rows(records, layout.chunk_rows), layout.planned_rows
    if (rows is None and held < (planned or 0)) or (rows is not None and rows < held):
        raise InputError(f"expected {held} of {planned} rows at {path} to be planned so; received {rows}")
    if rows == planned:
        return
    claim = make_claim(path, name="grow")
    try:
        for name, (generation, owner) in read_claims(path).items():
            if claimed_rows(name) is not None and may_write(path, name, generation, owner):
                raise StoreBusyError(
                    f"expected no writer of {path} while it grows; received one ({name}): {owner}: wait for it"
                )
        layout = Layout.from_dict(layout.to_dict() | {"planned_rows": rows}, path)
        if rows is not None:
            Committer(array_store(path), layout, records, claim).make_room(rows, rows)
        write_attributes(path, {**read_attributes(path), "layout": layout.to_dict()})
    finally:
        claim.release()

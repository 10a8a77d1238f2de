"""Making a store: whole or not at all; and giving a planned store room for more rows."""

from __future__ import annotations

import datetime
import json
import socket
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from ooc_influence._version import __version__
from ooc_influence.errors import InputError, StoreBusyError, StoreExistsError, StoreWriteError, refused
from ooc_influence.store import commits, place
from ooc_influence.store.arrays import create_array, open_group
from ooc_influence.store.claim import Claim, claimed_rows, may_write, read_claims
from ooc_influence.store.committer import Committer
from ooc_influence.store.encoding import FloatRows
from ooc_influence.store.layout import ATTRIBUTES, FORMAT_VERSION, Layout
from ooc_influence.store.mask import Mask
from ooc_influence.store.metadata import METADATA
from ooc_influence.store.opening import attributes_digest, read_attributes
from ooc_influence.store.place import NewFolder, StorePath, array_store, is_local
from ooc_influence.store.ranges import make_claim
from ooc_influence.store.reduction import Reduction


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
        if place.is_file(path / METADATA):
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


def nothing_expected(path: StorePath) -> str:
    """Return what to say where there is something at the path of a new store."""
    return f"expected nothing at {path}; received something: choose another path or remove it"


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

"""A curvature on disk: a Zarr group whose attributes say what it is of, and whether it is finished.

A fit is written beside its place and renamed (on an object store: its root's metadata is put last). One that replaces
another takes its place at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

from ooc_influence._version import __version__
from ooc_influence.errors import InputError, StoreWriteError, refused
from ooc_influence.store import (
    GradientStore,
    NewFolder,
    StorePath,
    array_store,
    check_free,
    create_array,
    is_file,
    is_free,
    open_group,
)

FORMAT = 2
READABLE = (1, 2)
_ATTRIBUTES = "ooc_influence_curvature"
_PART = 2**20  # numbers in a chunk of a long array


def write_curvature(path: StorePath, attributes: Mapping[str, Any], write: Callable[[Any], Mapping[str, Any]]) -> None:
    """Make a curvature at ``path``, in place of one that is there.

    Parameters
    ----------
    path : StorePath
        Where.
    attributes : mapping
        What is known of it beforehand: JSON values.
    write : callable
        Given a Zarr group, writes the arrays and returns further attributes.

    Raises
    ------
    StoreWriteError
        If the folder cannot be written.
    """
    try:
        with NewFolder(path, replace=True) as folder:
            group = open_group(folder.arrays, "w")
            found = write(group)
            marks = {"format": FORMAT, "version": __version__, "fit": uuid.uuid4().hex, "complete": True}
            group.attrs[_ATTRIBUTES] = dict(attributes) | dict(found) | marks
            folder.publish()
    except OSError as error:
        raise StoreWriteError(
            refused(f"to write the curvature to {path}", error, ", or give another path with out= (--out)")
        ) from error


def write_long(group: Any, name: str, values: Any) -> None:
    """Write a long array of numbers, (n,), with checksums."""
    array = create_array(group, name, values.shape, (min(max(1, len(values)), _PART),), values.dtype, check=True)
    for start in range(0, len(values), _PART):
        array[start : start + _PART] = values[start : start + _PART]


def check_replaceable(path: StorePath) -> None:
    """Check that only a curvature, or nothing, is at ``path``.

    Raises
    ------
    StoreExistsError
        If something else is there.
    """
    for _ in range(10):  # another fit may be replacing one at this moment
        if _attributes(path) is not None or is_free(path):
            return
    check_free(path, "a curvature or nothing")


def complete_attributes(path: StorePath) -> dict[str, Any] | None:
    """Return the attributes of the finished curvature at ``path``; None where there is none."""
    found = _attributes(path)
    return found if found and found.get("complete") else None


def _attributes(path: StorePath) -> dict[str, Any] | None:
    if not is_file(path / "zarr.json"):
        return None
    try:
        found = dict(open_group(array_store(path, read_only=True), "r").attrs).get(_ATTRIBUTES)
    except (ValueError, TypeError, OSError):  # a damaged zarr.json, or a folder being replaced
        return None
    return found if isinstance(found, dict) else None


def curvature_path(train: GradientStore, name: str) -> StorePath:
    """Return where a store keeps the curvature ``name``.

    Raises
    ------
    InputError
        If the name could leave the store's folder.
    """
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise InputError(f"expected a curvature name without slashes; received {name!r}")
    return train.path / "curvature" / name

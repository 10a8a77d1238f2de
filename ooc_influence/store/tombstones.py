"""Marking rows as dropped. Their numbers stay; scores, top lists and curvatures pass over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, StoreDamagedError, StoreWriteError, refused
from ooc_influence.store.arrays import open_group, writable_array
from ooc_influence.store.claim import make_claim, wait_for
from ooc_influence.store.layout import MARKS, Layout
from ooc_influence.store.paths import ArrayStore, StorePath, array_store

if TYPE_CHECKING:
    from ooc_influence.store.view import StoreView


def parse_numbers(rows: npt.ArrayLike, n: int) -> npt.NDArray[Any]:
    """Return distinct row numbers below ``n`` from numbers or (n,) marks.

    Raises
    ------
    InputError
        For anything else.
    """
    given = np.asarray(rows)
    if given.dtype == bool and given.shape == (n,):
        given = np.flatnonzero(given)
    numbers = np.unique(given)
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers[0] < 0 or numbers[-1] >= n):
        raise InputError(
            f"expected row numbers in [0, {n}), or {n} marks; received {given.dtype} of shape "
            f"{given.shape} from {numbers[0]} to {numbers[-1]}"
        )
    return numbers


def parse_marks(tombstones: npt.ArrayLike, rows: int) -> npt.NDArray[np.bool_]:
    """Return (rows,) marks of dropped rows.

    Raises
    ------
    InputError
        For anything else.
    """
    given = np.asarray(tombstones)
    if given.dtype != bool or given.shape != (rows,):
        raise InputError(f"expected dropped of shape ({rows},) and dtype bool; received {given.shape}, {given.dtype}")
    return given


def marked_groups(group: Any) -> list[int]:
    """Return the groups of rows that have dropped ones, as listed in an open store.

    Raises
    ------
    StoreDamagedError
        If the list cannot be read.
    """
    try:
        return [int(number) for number in group[MARKS].attrs["dropped"]]
    except (KeyError, ValueError, TypeError) as error:
        raise StoreDamagedError(
            f"expected the list of groups with dropped rows in {group.store_path}; received none: {error}: restore "
            f"{MARKS}/zarr.json from a backup"
        ) from error


def list_groups(files: ArrayStore, groups: Iterable[int]) -> None:
    """List the groups that have dropped rows, after their marks: a reader looks for the files of these."""
    open_group(files, "r+")[MARKS].attrs["dropped"] = sorted(groups)
    files.sync_folders()


def mark_dropped(path: StorePath, layout: Layout, numbers: npt.NDArray[Any], *, dropped: bool = True) -> None:
    """Mark rows as dropped, or as live again, durably; while another process marks some, this waits.

    Raises
    ------
    StoreBusyError
        If another process holds the right to mark rows for minutes.
    StoreWriteError
        If the disk refuses.
    """
    claim = wait_for(lambda: make_claim(path, name="drop"))
    try:
        files = array_store(path)
        group = open_group(files, "r+")
        writable_array(group, "dropped").set_orthogonal_selection((numbers,), dropped)
        files.sync_folders()
        list_groups(files, set(marked_groups(group)) | set((numbers // layout.group_rows).tolist()))
    except OSError as error:
        raise StoreWriteError(refused(f"to mark rows of {path} as dropped", error, ", then run again")) from error
    finally:
        claim.release()


def copy_tombstones(source: StoreView, target: StoreView) -> None:
    """Mark the rows of ``target`` that are dropped in ``source``, row by row the same; also rows still to be written.

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

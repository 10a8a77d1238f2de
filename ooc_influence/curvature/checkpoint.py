"""What a fit has done so far, kept beside its target until it is finished: a killed fit goes on from there.

The folder ``.<name>.partial`` holds the settings of the fit and its partial results: sums over some places of the rows,
finished tiles, the basis of the last pass. Each appears whole, and one that replaces another before that other is
removed. Only the process that holds the folder's claim uses it; another one that fits the same at the same time does so
without. Results are saved when the last time is :data:`INTERVAL` seconds ago, or thirty times as long as saving took.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from ooc_influence.errors import StoreBusyError, StoreWriteError, refused
from ooc_influence.store import (
    CHUNK_TARGET,
    Claim,
    NewFolder,
    StorePath,
    array_store,
    create_array,
    exists,
    is_local,
    make_claim,
    names,
    open_group,
    read_bytes,
    remove_empty,
    remove_tree,
    write_bytes,
)

logger = logging.getLogger("ooc_influence")
INTERVAL = 25.0  # seconds between two savings of a partial result
_SHARE = 30  # times the last saving's seconds that pass before the next: saving costs a few per cent at most
_SETTINGS, _CLAIMS = "settings.json", "commits"
_FACTS = "ooc_influence_partial"


class FitCheckpoint:
    """The partial results of one fit.

    Parameters
    ----------
    target : StorePath
        Where the curvature will be.
    settings : mapping
        All that its numbers depend on, and nothing that a budget decides: JSON values. What was kept under other
        settings is removed.

    Attributes
    ----------
    path : StorePath
        The folder.
    usable : bool
        Whether this process may use it.
    """

    def __init__(self, target: StorePath, settings: Mapping[str, Any]) -> None:
        self.path = _folder(target)
        self._claim = None
        try:
            self._claim = self._claimed()
        except StoreBusyError:
            logger.info("another process is fitting %s: this one keeps no partial results", target)
        except OSError as error:
            raise StoreWriteError(
                refused(f"to write the curvature to {target}", error, ", or give another place with out= (--out)")
            ) from error
        self.usable = self._claim is not None
        if self.usable:
            self._settle(_digest(settings))

    def _claimed(self, tries: int = 20) -> Claim:
        try:
            if is_local(self.path):
                (self.path / _CLAIMS).mkdir(parents=True, exist_ok=True)
            return make_claim(self.path, name="fit")
        except OSError as error:
            if not tries or not isinstance(error.__cause__ or error, FileNotFoundError):
                raise
        return self._claimed(tries - 1)  # another fit finished at this moment, and removed the folder

    def _settle(self, digest: bytes) -> None:
        """Remove what other settings left behind."""
        if read_bytes(self.path / _SETTINGS) == digest:
            return
        self._clear()
        write_bytes(self.path / _SETTINGS, digest)

    def _clear(self) -> None:
        """Remove all but the claim; the settings first, without which nothing else counts."""
        for name in (_SETTINGS, *names(self.path)):
            if name != _CLAIMS:
                remove_tree(self.path / name)

    def results(self, kind: str) -> dict[str, StorePath]:
        """Return the latest finished results of a kind by name."""
        return latest_results(self.path, kind) if self.usable else {}

    def close(self, *, finished: bool) -> None:
        """Give the folder back; remove it if the fit is finished."""
        if self._claim is None:
            return
        done = finished or not any(name not in (_CLAIMS, _SETTINGS) for name in names(self.path))
        if done:  # while the claim is held: what comes after it may be another fit's
            self._clear()
        self._claim.release(remove=done)
        self._claim = None
        if done:
            remove_empty(self.path / _CLAIMS)
            remove_empty(self.path)

    def __enter__(self) -> FitCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        kept = self.usable and bool(latest_results(self.path, ""))
        self.close(finished=kind is None)
        if kind is not None and kept:
            logger.warning("what the fit has done so far is kept in %s: run it again to go on", self.path)


def begun(target: StorePath, settings: Mapping[str, Any]) -> dict[str, StorePath]:
    """Return the latest results that earlier runs of the same fit kept, by name: what to plan by."""
    folder = _folder(target)
    return latest_results(folder, "") if read_bytes(folder / _SETTINGS) == _digest(settings) else {}


def _folder(target: StorePath) -> StorePath:
    return target.parent / f".{target.name}.partial"


def _digest(settings: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest().encode()


def latest_results(folder: StorePath, kind: str) -> dict[str, StorePath]:
    """Return the latest finished results in a folder by name: of ``<kind>-<name>-<number>`` the highest number."""
    found: dict[str, tuple[int, StorePath]] = {}
    for entry in names(folder):
        name, _, number = entry.rpartition("-")
        if entry.startswith((".", _CLAIMS)) or not number.isdigit() or not name.startswith(kind):
            continue
        if int(number) > found.get(name, (-1, folder))[0] and exists(folder / entry / "zarr.json"):
            found[name] = (int(number), folder / entry)
    return {name: path for name, (_, path) in found.items()}


def save_result(
    folder: StorePath, name: str, number: int, facts: Mapping[str, Any], write: Callable[[Any], None]
) -> None:
    """Save a result as ``<name>-<number>`` and remove the one it replaces.

    ``write`` puts its arrays into a Zarr group.
    """
    before = latest_results(folder, name).get(name)
    with NewFolder(folder / f"{name}-{number}", replace=True) as new:
        group = open_group(new.arrays, "w")
        write(group)
        group.attrs[_FACTS] = dict(facts)
        new.publish()
    if before is not None and before.name != f"{name}-{number}":
        remove_tree(before)


def read_facts(path: StorePath) -> dict[str, Any]:
    """Return what was written down about a result."""
    facts: Any = open_group(array_store(path, read_only=True), "r").attrs[_FACTS]
    return dict(facts)


class SavingClock:
    """When it is time to save again.

    Parameters
    ----------
    interval : float
        Seconds between two savings, at least.
    """

    def __init__(self, interval: float) -> None:
        self._interval, self._due = interval, time.monotonic() + interval

    def due(self) -> bool:
        """Return whether it is."""
        return time.monotonic() >= self._due

    def run(self, save: Callable[[], None]) -> None:
        """Save, and set the next time."""
        began = time.monotonic()
        save()
        now = time.monotonic()
        self._due = now + max(self._interval, _SHARE * (now - began))


def write_slabs(group: Any, name: str, matrix: npt.NDArray[Any]) -> None:
    """Write a matrix in chunks of whole rows, with checksums."""
    rows, columns = matrix.shape
    step = max(1, min(rows, CHUNK_TARGET // max(1, columns * matrix.itemsize)))
    array = create_array(group, name, matrix.shape, (step, columns), matrix.dtype, check=True)
    for start in range(0, rows, step):
        array[start : start + step] = matrix[start : start + step]

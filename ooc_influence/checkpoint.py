"""Output that takes long is kept part by part, so that the same call, interrupted or killed, resumes where it stopped.

What is asked for is described by *settings*: JSON values, such as a digest, that decide the result, and nothing that a
budget decides. They are written before the first part; output with other settings is not resumed. A part is written
whole or not at all, and is durable once it has its name. A :class:`ResumableOutput` is a folder of parts; a
:class:`ResumableArray` is the result itself, whose chunks are the parts.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from ooc_influence._version import __version__
from ooc_influence.errors import StoreBusyError, StoreWriteError, refused, writing
from ooc_influence.store import (
    Claim,
    NewFolder,
    StorePath,
    array_store,
    check_free,
    exists,
    is_free,
    is_local,
    make_claim,
    make_folder,
    names,
    not_free,
    open_group,
    read_bytes,
    remove_empty,
    remove_partial_files,
    remove_tree,
    writable_array,
    write_bytes,
)

logger = logging.getLogger("ooc_influence")
Arrays = Mapping[str, npt.NDArray[Any]]
Settings = Mapping[str, Any]
INTERVAL = 25.0  # seconds between two savings of a partial result
_SHARE = 30  # times the last saving's seconds that pass before the next: saving costs a few per cent at most
_SETTINGS, _CLAIMS = "settings.json", "commits"
_FACTS = "ooc_influence_partial"
_PARTS = re.compile(r"\.?(settings\.json|[a-z0-9-]+-\d+-\d+\.npz)(\.[0-9a-f]{32}\.partial)?")  # what may be removed
_OTHER_CALL = "those of another call (other rows, curvature or settings)"


class ResumableOutput:
    """The finished parts of one output, in a folder; without a folder, none are kept.

    A part is a file of arrays ``<name>.npz``, or a Zarr group ``<name>-<number>`` of which the highest number counts.
    Tasks in other processes can be given it, to put parts.

    Attributes
    ----------
    path : StorePath or None
        The folder.
    settings : dict
        All that the result depends on: JSON values, as they are read back.
    """

    def __init__(self, path: StorePath | None = None, settings: Settings | None = None) -> None:
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings or {}))
        self._interval = INTERVAL

    def clock(self) -> SavingClock:
        """Return a clock that says when to save a partial result: never without a folder."""
        return SavingClock(math.inf if self.path is None else self._interval)

    @property
    def kept_settings(self) -> dict[str, Any] | None:
        """The settings of the parts that are there; None without parts, or where a file of that name is not ours."""
        data = None if self.path is None else read_bytes(self.path / _SETTINGS)
        try:
            values = None if data is None else json.loads(data)
        except ValueError:
            return None
        return values if isinstance(values, dict) else None

    def check(self) -> None:
        """Check that the folder is free or holds parts of this output; raise StoreExistsError if not."""
        if self.path is None:
            return
        with self._writing():
            kept = self.kept_settings
            if kept is None or _types(kept) != _types(self.settings):
                check_free(self.path, "the partial results of this call, or nothing,")
            elif kept != self.settings:
                raise not_free(self.path, "the partial results of this call", _OTHER_CALL)

    def begin(self) -> None:
        """Make the folder and write the settings, unless some are there."""
        if self.path is None:
            return
        with self._writing():
            if exists(self.path / _SETTINGS):
                return
            make_folder(self.path)
            write_bytes(self.path / _SETTINGS, json.dumps(self.settings, sort_keys=True, indent=1).encode())

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"a folder for partial results at {self.path}", ", or choose another")

    def part_names(self) -> list[str]:
        """Return the names of the parts that are files of arrays."""
        files = [] if self.path is None else names(self.path)
        return [name.removesuffix(".npz") for name in files if name.endswith(".npz") and not name.startswith(".")]

    def put(self, name: str, arrays: Arrays) -> None:
        """Write a part that is a file of arrays; do nothing without a folder."""
        if self.path is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        with writing(f"to keep partial results in {self.path}", ", then run again"):
            write_bytes(self.path / f"{name}.npz", buffer.getvalue())

    def get(self, name: str) -> dict[str, npt.NDArray[Any]] | None:
        """Return the arrays of a part; None where it is missing or, with a warning, cannot be read."""
        path = None if self.path is None else self.path / f"{name}.npz"
        try:
            data = None if path is None else read_bytes(path)
            if data is None:
                return None
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s): it counts as missing", path, error)
            return None

    def groups(self, kind: str = "") -> dict[str, StorePath]:
        """Return where the latest finished Zarr groups are, by name: those whose names start with ``kind``."""
        latest: dict[str, tuple[int, StorePath]] = {}
        for entry in [] if self.path is None else names(self.path):
            name, _, number = entry.rpartition("-")
            if self.path is None or entry.startswith(".") or not number.isdigit() or not name.startswith(kind):
                continue
            if int(number) > latest.get(name, (-1,))[0] and exists(self.path / entry / "zarr.json"):
                latest[name] = int(number), self.path / entry
        return {name: path for name, (_, path) in latest.items()}

    def put_group(self, name: str, number: int, facts: Mapping[str, Any], write: Callable[[Any], None]) -> None:
        """Write a part that is a Zarr group and remove the one it replaces.

        ``write`` puts arrays into the group; ``facts`` are JSON values that :func:`read_facts` returns.
        """
        if self.path is None:
            return
        before = self.groups(name).get(name)
        with NewFolder(self.path / f"{name}-{number}", replace=True) as new:
            group = open_group(new.arrays, "w")
            write(group)
            group.attrs[_FACTS] = dict(facts)
            new.publish()
        if before is not None and before.name != f"{name}-{number}":
            remove_tree(before)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Use the folder alone; where the context ends without an error, its parts and, if empty, it are removed.

        Raises
        ------
        StoreBusyError
            If another process uses it: the same call, which is running.
        StoreExistsError
            If another call was first.
        """
        if self.path is None:
            yield
            return
        self.begin()
        with self._writing():
            claim = _claim_folder(self.path, "parts")
        try:
            self.begin()  # again: the process that had it may have finished at this moment
            self.check()
            yield
            for name in names(self.path):
                if _PARTS.fullmatch(name):
                    remove_tree(self.path / name)
            claim.release(remove=True)
            remove_empty(self.path / _CLAIMS)
            remove_empty(self.path)
        finally:
            claim.release()


def _types(settings: Settings) -> dict[str, type]:
    return {name: type(value) for name, value in settings.items()}


def _claim_folder(folder: StorePath, name: str, tries: int = 20) -> Claim:
    try:
        if is_local(folder):
            (folder / _CLAIMS).mkdir(parents=True, exist_ok=True)
        return make_claim(folder, name=name)
    except OSError as error:
        if not tries or not isinstance(error.__cause__ or error, FileNotFoundError):
            raise
    return _claim_folder(folder, name, tries - 1)  # another process finished at this moment, and removed the folder


def read_facts(path: StorePath) -> dict[str, Any]:
    """Return the facts that were written with a group."""
    facts: Any = open_group(array_store(path, read_only=True), "r").attrs[_FACTS]
    return dict(facts)


class ClaimedOutput(ResumableOutput):
    """Parts of what is to be at a path, in a hidden folder beside it that one process at a time may use. A context.

    Parts of other settings are removed. While another process holds the folder, this one keeps no parts: ``path`` is
    None. Where the context ends without an error, or nothing was kept, the folder is removed.

    Parameters
    ----------
    target : StorePath
        Where the result will be.
    settings : mapping
        All that the result depends on: JSON values.
    what, then : str
        What the parts are of, and what else can be done, for messages.
    """

    def __init__(
        self,
        target: StorePath,
        settings: Settings,
        what: str = "the curvature",
        then: str = ", or give another path with out= (--out)",
    ) -> None:
        path = partial_path(target)
        super().__init__(path, settings)
        self._of = "the fit" if what == "the curvature" else what
        self._claim: Claim | None = None
        try:
            self._claim = _claim_folder(path, "fit")
            if self.kept_settings != self.settings:
                self._clear()
                self.begin()
        except StoreBusyError:
            logger.info("another process is making %s: this one keeps no partial results", target)
            self.path = None
        except OSError as error:
            raise StoreWriteError(refused(f"to write {what} to {target}", error, then)) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return ResumableOutput, (self.path, self.settings), {"_interval": self._interval}

    def _clear(self) -> None:
        """Remove all but the claim; the settings first, without which nothing else counts."""
        assert self.path is not None
        for name in (_SETTINGS, *names(self.path)):
            if name != _CLAIMS:
                remove_tree(self.path / name)

    def close(self, *, finished: bool) -> None:
        """Release the folder; remove it if the result is there or nothing was kept."""
        if self._claim is None or self.path is None:
            return
        done = finished or not any(name not in (_CLAIMS, _SETTINGS) for name in names(self.path))
        if done:  # while the claim is held: what comes after it may be another process's
            self._clear()
        self._claim.release(remove=done)
        self._claim = None
        if done:
            remove_empty(self.path / _CLAIMS)
            remove_empty(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.end(finished=kind is None)

    def end(self, *, finished: bool) -> None:
        """Release the folder, see :meth:`close`, and say where the parts of what is not finished are."""
        kept = bool(self.groups() or self.part_names())
        self.close(finished=finished)
        if kept and not finished:
            logger.warning("partial results of %s are kept in %s: run it again to resume", self._of, self.path)


def kept_groups(target: StorePath, settings: Settings) -> dict[str, StorePath]:
    """Return the groups that an earlier :class:`ClaimedOutput` with the same settings kept, by name: to plan by."""
    output = ResumableOutput(partial_path(target), settings)
    return output.groups() if output.kept_settings == output.settings else {}


def partial_path(target: StorePath) -> StorePath:
    """Return the folder of the parts of what is to be at a path."""
    return target.parent / f".{target.name}.partial"


class SavingClock:
    """When it is time to save again: at most every ``interval`` seconds."""

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


@dataclass(frozen=True)
class ResumableArray:
    """A Zarr array on disk or object storage that is written chunk by chunk.

    A chunk is written once, whole: on a disk under another name, synced, then renamed; on an object store by one PUT.
    So a chunk that is there is finished and durable, and needs no further mark. The array's attributes hold the digest
    of its call, and ``complete`` once every chunk is there.

    Attributes
    ----------
    path : StorePath
        Where it is.
    shape, chunks : tuple of int
        Sizes of the array and of its chunks.
    """

    path: StorePath
    shape: tuple[int, ...]
    chunks: tuple[int, ...]

    @property
    def paths(self) -> list[StorePath]:
        """What workers must be able to see."""
        return [self.path]

    @classmethod
    def find(cls, path: StorePath, kind: str, digest: str) -> Self | None:
        """Return the array that the same call began at ``path``; None where nothing is there.

        Its attribute ``ooc_influence_<kind>`` has the digest of all that its values depend on.
        """
        if is_free(path):
            return None
        try:
            array = zarr.open_array(array_store(path, read_only=True), mode="r")
            begun: Any = dict(array.attrs)[f"ooc_influence_{kind}"]
            begun_by = begun["digest"]
        except Exception as error:  # no array, a damaged one, or something else altogether
            raise not_free(path) from error
        if begun_by != digest:
            raise not_free(path, "nothing, or the output begun by the same call,", _OTHER_CALL)
        return cls(path, array.shape, array.chunks)

    @classmethod
    def create(
        cls, path: StorePath, kind: str, digest: str, facts: Mapping[str, Any], make: Callable[[Any], Any]
    ) -> Self:
        """Create the array, whole or not at all, by ``make(store)``; ``facts`` are further attributes."""
        with NewFolder(path) as folder:
            array = make(folder.arrays)
            marks = {"version": __version__, "complete": False, f"ooc_influence_{kind}": {"digest": digest}}
            array.attrs.update({**facts, **marks})
            if not folder.publish():
                raise not_free(path)
        return cls(path, array.shape, array.chunks)

    def open(self) -> zarr.Array[Any]:
        """Return the array, to read; missing chunks read as the fill value."""
        return zarr.open_array(array_store(self.path, read_only=True), mode="r")

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return bool(self.open().attrs["complete"])

    def finished_chunks(self) -> set[tuple[int, ...]]:
        """Return the indices of the chunks that are there."""
        keys = (name.split(".") for name in names(self.path))
        return {tuple(map(int, key[1:])) for key in keys if key[0] == "c" and len(key) == len(self.shape) + 1}

    def finish(self, **facts: Any) -> None:
        """Mark the array as complete and remove what interrupted writes left behind."""
        if is_local(self.path):
            remove_partial_files(self.path, lambda name: name.startswith("c."))
        files = array_store(self.path)
        writable_array(files).attrs.update({**facts, "complete": True})
        files.sync_folders()

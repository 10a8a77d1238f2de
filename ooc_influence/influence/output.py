"""A score array on disk or object storage that is written chunk by chunk and goes on where it was.

A chunk is written once, whole: on a disk under another name, synced, then renamed; on an object store by one PUT. So a
chunk that is there is finished and durable, and needs no further mark. The array's attributes hold a digest of all that
the scores depend on, and ``complete`` once every chunk is there; rows that are missing until then read as NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from ooc_influence._version import __version__
from ooc_influence.errors import MismatchError, StoreExistsError, StoreWriteError, refused
from ooc_influence.influence.engine import Floats
from ooc_influence.store import (
    CHUNK_TARGET,
    NewFolder,
    StorePath,
    array_store,
    create_array,
    exists,
    is_file,
    is_local,
    names,
    remove_partial_files,
    writable_array,
)

_ATTRIBUTES = "ooc_influence_scores"


@dataclass(frozen=True)
class Output:
    """Scores (..., q, n) at a path; the leading axes are λ and module, where there are several.

    Attributes
    ----------
    path : StorePath
        Where.
    shape : tuple of int
        Leading sizes, queries, rows.
    chunks : (int, int)
        Queries and rows of a chunk; it holds one entry of the leading axes.
    """

    path: StorePath
    shape: tuple[int, ...]
    chunks: tuple[int, int]

    @property
    def paths(self) -> list[StorePath]:
        """What workers must be able to see."""
        return [self.path]

    @classmethod
    def find(cls, path: StorePath, digest: str) -> Output | None:
        """Return the output that a call with these settings began at ``path``; None where nothing is there.

        Raises
        ------
        StoreExistsError
            If something else is there.
        """
        if not exists(path) or (not is_file(path) and not names(path)):
            return None
        found = _attributes(path)
        if found is None:
            raise StoreExistsError(f"expected nothing at {path}; received something: choose another path or remove it")
        if found["digest"] != digest:
            raise StoreExistsError(
                f"expected nothing at {path}, or scores begun by the same call; received scores of another one (other "
                "rows, curvature or settings): choose another path or remove it"
            )
        array = zarr.open_array(array_store(path, read_only=True), mode="r")
        height, width = array.chunks[-2:]
        return cls(path, array.shape, (height, width))

    @classmethod
    def create(
        cls, path: StorePath, shape: tuple[int, ...], block: tuple[int, int], digest: str, facts: Mapping[str, Any]
    ) -> Output:
        """Create an empty array, whole or not at all; ``block`` is what is written at once, (queries, rows).

        Raises
        ------
        StoreExistsError
            If something was put there in the meantime.
        """
        width = min(block[1], shape[-1])
        chunks = (max(1, min(block[0], 1 << (CHUNK_TARGET // (4 * width)).bit_length() - 1)), width)
        with NewFolder(path) as folder:
            array = create_array(
                folder.arrays,
                None,
                shape,
                (1,) * (len(shape) - 2) + chunks,
                "float32",
                fill=float("nan"),
                dims=facts["dims"],
            )
            array.attrs.update({**facts, "version": __version__, "complete": False, _ATTRIBUTES: {"digest": digest}})
            if not folder.publish():
                raise StoreExistsError(f"expected nothing at {path}; received something meanwhile: choose another path")
        return cls(path, shape, chunks)

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return bool(self.open().attrs["complete"])

    def open(self) -> zarr.Array[Any]:
        """Return the array, to read."""
        return zarr.open_array(array_store(self.path, read_only=True), mode="r")

    def check_queries(self, queries: int) -> None:
        """Check that blocks of so many queries are whole chunks.

        Raises
        ------
        MismatchError
            If they are not.
        """
        if queries % self.chunks[0] and queries < self.shape[-2]:
            raise MismatchError(
                f"expected room for {self.chunks[0]} queries at a time, with which {self.path} was begun; received a "
                f"budget for {queries}: give as much --memory as then, or remove it"
            )

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the row ranges of queries ``start`` to ``stop`` of which a chunk is not there, joined."""
        leading = int(np.prod(self.shape[:-2], dtype=np.int64))
        first, last = start // self.chunks[0], -(-stop // self.chunks[0])
        found = np.zeros(-(-self.shape[-1] // self.chunks[1]), np.int64)
        for name in names(self.path):
            place = name.split(".")
            if place[0] == "c" and len(place) == len(self.shape) + 1 and first <= int(place[-2]) < last:
                found[int(place[-1])] += 1
        lacking = np.concatenate([[False], found < leading * (last - first), [False]])
        edges = np.flatnonzero(lacking[1:] != lacking[:-1]).reshape(-1, 2) * self.chunks[1]
        return [(int(low), min(int(high), self.shape[-1])) for low, high in edges]

    def finish(self, **facts: Any) -> zarr.Array[Any]:
        """Mark the array as complete, remove what interrupted writes left behind, and return it."""
        if is_local(self.path):
            remove_partial_files(self.path, lambda name: name.startswith("c."))
        files = array_store(self.path)
        writable_array(files).attrs.update({**facts, "complete": True})
        files.sync_folders()
        return self.open()


class OutputWriter:
    """Writes tiles of an output in a thread, one while the next is computed. A context.

    Parameters
    ----------
    output : Output
        Where.
    first_query : int
        The tiles' first query, at the start of a chunk.
    """

    def __init__(self, output: Output, first_query: int) -> None:
        self._files = array_store(output.path)
        self._array = writable_array(self._files)
        self._leading, self._first = output.shape[:-2], first_query
        self._thread = ThreadPoolExecutor(1, "ooc_influence-scores")
        self._task: Future[None] | None = None

    def write(self, first_row: int, tile: Floats) -> None:
        """Write scores (L, M, q, rows); the tile before is written then, so two may be in use."""
        self.wait()
        queries, rows = tile.shape[-2:]
        place = (slice(self._first, self._first + queries), slice(first_row, first_row + rows))
        whole = tile.reshape(*self._leading, queries, rows)
        self._task = self._thread.submit(self._array.__setitem__, (..., *place), whole)

    def wait(self) -> None:
        """Wait until what was given is written."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def __enter__(self) -> OutputWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with contextlib.suppress(BaseException) if kind is not None else contextlib.nullcontext():
            self.wait()
        self._thread.shutdown()
        self._files.sync_folders()


def _attributes(path: StorePath) -> dict[str, Any] | None:
    try:
        found = dict(zarr.open_array(array_store(path, read_only=True), mode="r").attrs).get(_ATTRIBUTES)
    except Exception:  # no array, a damaged one, or something else altogether
        return None
    return found if isinstance(found, dict) else None


def write_error(path: StorePath, error: OSError) -> StoreWriteError:
    """Return what to say where scores cannot be written."""
    return StoreWriteError(refused(f"to write scores to {path}", error, ", then run the same call again: it goes on"))

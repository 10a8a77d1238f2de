"""A local Zarr store whose chunk reads are memory maps and whose writes are durable.

Reads: ``get`` returns a buffer over an ``mmap`` of the chunk file, and :data:`MAPPED` is a buffer prototype whose array
buffer *adopts* a whole-selection assignment instead of copying it, so that reading inside one uncompressed chunk
through Zarr's own interface is zero-copy. Writes: temporary file, ``fsync``, rename; folders that gained an entry are
remembered and synced by :meth:`LocalArrayStore.sync_folders`, which has to run before a commit record is written.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.storage import LocalStore

from ooc_influence.errors import StoreDamagedError, StoreReadError, refused
from ooc_influence.store import disk
from ooc_influence.store.metadata import METADATA, check_document


class _AdoptingArray(cpu.NDBuffer):
    """An array buffer that takes over a value assigned to all of it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        data = value._data if isinstance(value, cpu.NDBuffer) else value
        keys = key if isinstance(key, tuple) else (key,)
        whole = len(keys) == len(self.shape) and all(
            isinstance(part, slice) and part.indices(size) == (0, size, 1)
            for part, size in zip(keys, self.shape, strict=True)
        )
        if whole and getattr(data, "shape", None) == self.shape and data.dtype == self.dtype:
            self._data = data
        else:
            super().__setitem__(key, value)


_FEW, _WRITERS = 64, 8  # small files that are written one after the other; threads for more of them
MAPPED = BufferPrototype(buffer=cpu.Buffer, nd_buffer=_AdoptingArray)


def is_chunk(key: str) -> bool:
    """Return whether a key is a chunk's, whatever the metadata say chunks are called: not metadata of Zarr 3 or 2."""
    name = key.rsplit("/", 1)[-1]
    return name != METADATA and not name.startswith(".")


def checked(found: Buffer | None, root: object, key: str) -> Buffer | None:
    """Return what was read under a key, metadata looked at (:mod:`.metadata`)."""
    if found is None or key.rsplit("/", 1)[-1] != METADATA:
        return found
    return cpu.Buffer.from_bytes(check_document(found.to_bytes(), f"{root}/{key}"))


def map_file(path: str | Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a file's bytes as a memory map that lives as long as arrays that look at it.

    Copy-on-write: torch takes it without a warning, and writing to it never reaches the file.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(handle).st_size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(handle, 0, access=mmap.ACCESS_COPY), np.uint8)
    finally:
        os.close(handle)


class LocalArrayStore(LocalStore):
    """A folder of Zarr arrays: mapped chunk reads, durable writes.

    Parameters
    ----------
    root : str or Path
        The folder.
    read_only : bool
        Refuse writes.
    chunk_bytes : mapping of str to int or None, optional
        Array path to the size of each of its chunk files, where it is known: another size raises
        :class:`StoreDamagedError`. Where it is given, so does a missing file of any array, which otherwise reads as
        the fill value.
    may_lack : collection of str
        Arrays of which files may be missing nevertheless.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        read_only: bool = False,
        chunk_bytes: Mapping[str, int | None] | None = None,
        may_lack: Collection[str] = (),
    ) -> None:
        super().__init__(root, read_only=read_only)
        self.chunk_bytes = None if chunk_bytes is None else dict(chunk_bytes)
        self.may_lack = frozenset(may_lack)
        self._new_entries: set[Path] = set()
        self._guard = threading.Lock()

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same store, writable or not."""
        return type(self)(self.root, read_only=read_only, chunk_bytes=self.chunk_bytes, may_lack=self.may_lack)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes under ``key``: a memory map for a whole chunk, ordinary reads otherwise."""
        if byte_range is not None or not is_chunk(key):
            try:
                return checked(await super().get(key, prototype, byte_range), self.root, key)
            except PermissionError as error:
                raise StoreReadError(refused(f"to read {self.root}/{key}", error)) from error
        if not self._is_open:
            await self._open()
        mapped = self.map_chunk(key)  # in the event loop: mapping reads nothing, a thread would cost more
        return None if mapped is None else (prototype or MAPPED).buffer.from_array_like(mapped)

    def map_chunk(self, key: str) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the bytes of the chunk under ``key`` as a map; None where it is missing and may be.

        What ``get`` does, without the event loop: for streaming through chunks.
        """
        array = key.rpartition("/")[0]
        path = f"{self.root}/{key}"
        try:
            mapped = map_file(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            if self.chunk_bytes is None or array in self.may_lack:
                return None
            raise StoreDamagedError(missing_chunk(path)) from None
        except PermissionError as error:
            raise StoreReadError(refused(f"to read {path}", error)) from error
        expected = (self.chunk_bytes or {}).get(array)
        if expected is not None and mapped.size != expected:
            raise StoreDamagedError(short_chunk(path, expected, mapped.size))
        return mapped

    async def set(self, key: str, value: Buffer) -> None:
        """Write ``value`` under ``key``: whole and on the disk, or not at all."""
        if not self._is_open:
            await self._open()
        self._check_writable()
        await asyncio.to_thread(self._put, self.root / key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write ``value`` unless ``key`` exists."""
        if not (self.root / key).exists():
            await self.set(key, value)

    def _put(self, path: Path, value: Buffer) -> None:
        if not path.parent.exists():
            self._gained(disk.make_folders(path.parent))
        disk.write_file(path, value.as_buffer_like())
        self._gained([path.parent])

    def put_all(self, documents: Mapping[str, bytes]) -> None:
        """Write many small values, each whole and on the disk: waiting for the disk once for several of them."""
        paths = {self.root / key: data for key, data in documents.items()}
        folders = sorted({path.parent for path in paths})
        for folder in folders:
            self._gained(disk.make_folders(folder))
        if len(paths) <= _FEW:
            for path, data in paths.items():
                disk.write_file(path, data)
        else:
            with ThreadPoolExecutor(_WRITERS) as pool:
                list(pool.map(disk.write_file, paths.keys(), paths.values()))
        self._gained(folders)

    def link(self, source: Path, key: str) -> None:
        """Put a file that is on the disk already under ``key``, by a link where possible."""
        path = self.root / key
        disk.link_file(source, path)
        self._gained([path.parent])

    def _gained(self, folders: list[Path]) -> None:
        with self._guard:
            self._new_entries.update(folders)

    def sync_folders(self) -> None:
        """Make the names of all files written so far durable."""
        with self._guard:
            folders, self._new_entries = self._new_entries, set()
        disk.sync_folders(folders)


def missing_chunk(path: object) -> str:
    """Return what to say of a committed chunk that is not there."""
    return f"expected the committed chunk {path}; received no file: 'ooc-influence verify' lists what else is damaged"


def short_chunk(path: object, expected: int, received: int) -> str:
    """Return what to say of a committed chunk of another size."""
    return (
        f"expected {expected} bytes in the committed chunk {path}; received {received}: 'ooc-influence verify' lists "
        "what else is damaged"
    )
